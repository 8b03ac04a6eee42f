# SPDX-License-Identifier: MIT
"""Retrieval: the nearest reference images of each query by global descriptor."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config_ini import parse_parameters
from patchnetvlad.search.exact import Search, check_found, check_search, exact_search, incomplete
from patchnetvlad.search.index import check_parameters, reason_of, set_search_parameters
from patchnetvlad.search.index_file import load_or_build

if TYPE_CHECKING:
    import torch

logger = logging.getLogger(__name__)
GPU_LIMIT = 2048
"""Largest number of candidates, and of probed lists, that FAISS supports on a GPU."""
GPU_INDEXES = (
    "IndexFlat",
    "IndexFlatL2",
    "IndexIVFFlat",
    "IndexIVFFlatL2",
    "IndexIVFPQ",
    "IndexIVFScalarQuantizer",
)


@dataclass(frozen=True)
class IndexSpec:
    """The index to search: its type, its file, and whether to use GPUs; see :func:`retrieve`.

    Attributes
    ----------
    factory, parameters : str
        Type of the index, and search effort, in the notation of FAISS.
    index_path : str or Path or None
        File in which the index is saved.
    gpu : bool
        Search on GPUs if possible.
    """

    factory: str = "Flat"
    parameters: str = ""
    index_path: str | Path | None = None
    gpu: bool = False


FLAT = IndexSpec()
"""Exact search."""


def retrieve_by(
    queries: NDArray[np.float32],
    index: NDArray[np.float32],
    top_k: int,
    spec: IndexSpec,
    *,
    device: torch.device | None = None,
) -> NDArray[np.int64]:
    """Find the nearest index images of each query, in the index that ``spec`` describes.

    The rest is as for :func:`retrieve`.
    """
    return retrieve(queries, index, top_k, **vars(spec), device=device)


def retrieve(
    queries: NDArray[np.float32],
    index: NDArray[np.float32],
    top_k: int,
    *,
    factory: str = "Flat",
    parameters: str = "",
    index_path: str | Path | None = None,
    gpu: bool = False,
    device: torch.device | None = None,
) -> NDArray[np.int64]:
    """Find the nearest reference images of each query by Euclidean distance.

    The search is exact for ``Flat``, and images at equal distances are in the order of their rows.
    Otherwise it is approximate, with these settings by default: an index with n lists (``IVFn``)
    searches max(16, n / 8) of them, and more where these would hold fewer than 4 k images; a graph
    (``HNSW``) is built with efConstruction 100 and searched with efSearch max(64, 2 k); an index
    that refines (``RFlat``) does so on 4 k candidates. A query for which the index finds fewer
    than k images is answered by exact search.

    Parameters
    ----------
    queries : ndarray [Q, P] of float
        Global descriptors; any type and memory layout, computed with as float32.
    index : ndarray [N, P] of float
    top_k : int
        Candidates per query, from 1; clamped to N.
    factory : str, default "Flat"
        Kind of index, in the language of FAISS's ``index_factory``.
    parameters : str, default ""
        Search effort, in the language of FAISS's ``ParameterSpace``, such as ``nprobe=64`` or
        ``nprobe=64,k_factor_rf=10``; see :func:`parse_parameters`. Parameters that are not named
        are set as above; a number larger than all there is means all.
    index_path : str or Path, optional
        FAISS file that keeps the built index; another retrieval from the same descriptors with
        the same ``factory`` reads it instead of building. ``<index_path>.fingerprint.json`` says
        what it was built from; if that differs or the file is damaged, it is built again.
    gpu : bool, default False
        Search on the GPUs, if FAISS supports them and this kind of index there.
    device : torch.device, optional
        On a CUDA GPU, ``Flat`` is searched there by PyTorch, unless ``index_path`` is given; see
        :func:`~patchnetvlad.search.on_device.nearest_rows`.

    Returns
    -------
    ndarray [Q, min(top_k, N)] of int64
        Rows of ``index``, nearest first; none twice for a query.

    Raises
    ------
    ValueError
        ``top_k`` is less than 1.
    FeatureError
        The dimensions differ, or descriptors are not finite.
    ConfigError
        FAISS does not know ``factory``, cannot build it from these descriptors, or does not
        support one of ``parameters``.
    OutputError
        ``index_path`` cannot be written, or is a file that this function did not write.

    Examples
    --------
    >>> index = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    >>> queries = np.array([[0.8, 0.6]], np.float32)
    >>> retrieve(queries, index, top_k=2).tolist()
    [[2, 0]]
    """
    import faiss

    k = check_search(queries.shape, index.shape, top_k)
    parse_parameters(parameters)
    if k == 0 or len(queries) == 0:
        return np.empty((len(queries), k), np.int64)
    queries = np.ascontiguousarray(queries, dtype=np.float32)
    index = np.ascontiguousarray(index, dtype=np.float32)
    factory = "".join(factory.split())
    if factory == "Flat":
        check_parameters(factory, index.shape[1], parameters)
    gpu = gpu and faiss.get_num_gpus() > 0
    if factory == "Flat" and index_path is None and device is not None and device.type == "cuda":
        from patchnetvlad.search.on_device import nearest_rows

        found = nearest_rows(queries, index, k, device)[1]
    elif factory == "Flat" and not gpu:
        search: Search = lambda q, k: faiss.knn(q, index, k)  # noqa: E731
        if index_path is not None:
            search = load_or_build(index, factory, index_path, gpu).search
        found = exact_search(search, queries, k)[1]
    else:
        built = load_or_build(index, factory, index_path, gpu, parameters)
        set_search_parameters(built, k, len(index), parameters, factory)
        found = _search(built, queries, k, factory, gpu).astype(np.int64)
        bad = incomplete(found, factory)
        if bad.any():
            found[bad] = exact_search(lambda q, k: faiss.knn(q, index, k), queries[bad], k)[1]
    check_found(queries, found)
    return found


def _search(built: Any, queries: NDArray[np.float32], k: int, factory: str, gpu: bool) -> Any:
    """Search on the GPUs if wanted and possible; rows [Q, k], -1 where none."""
    import faiss

    if gpu:
        reason = _why_not_on_gpu(built, k)
        if reason is None:
            try:
                return faiss.index_cpu_to_all_gpus(built).search(queries, k)[1]
            except RuntimeError as error:
                reason = reason_of(error)
        logger.info("searching %s on the CPU: %s", factory, reason)
    return built.search(queries, k)[1]


def _why_not_on_gpu(built: Any, k: int) -> str | None:
    import faiss

    core = built
    while hasattr(core, "index"):  # transforms of the descriptors, maps of rows
        core = faiss.downcast_index(core.index)
    kinds = [core, faiss.downcast_index(core.quantizer)] if hasattr(core, "quantizer") else [core]
    for kind in kinds:
        # FAISS would copy these within main memory, and say nothing.
        if type(kind).__name__ not in GPU_INDEXES:
            return f"{type(kind).__name__} has no GPU version"
    most = max(k, getattr(core, "nprobe", 0))
    return f"{most} is over FAISS's limit of {GPU_LIMIT} there" if most > GPU_LIMIT else None
