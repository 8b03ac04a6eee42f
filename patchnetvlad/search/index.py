# SPDX-License-Identifier: MIT
"""Building FAISS indexes, training them and setting their parameters."""

from __future__ import annotations

import contextlib
import logging
import re
import textwrap
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config_ini import PARAMETER_EXAMPLES, parse_parameters
from patchnetvlad.errors import ConfigError, FeatureError

logger = logging.getLogger(__name__)
EXAMPLES = "Flat, SQfp16, HNSW32, IVF1024,Flat or IVF4096,PQ64"
EF_CONSTRUCTION = 100
REFINE_FACTOR = 4


def check_parameters(factory: str, dims: int, parameters: str) -> None:
    """Raise ConfigError if this FAISS index type does not support the given parameters."""
    given = parse_parameters(parameters)
    empty = empty_index(factory, dims) if given else None
    for name, value in given.items():
        _set_given(empty, name, value, factory)


def _set_given(built: Any, name: str, value: int, factory: str) -> None:
    import faiss

    try:
        faiss.ParameterSpace().set_index_parameter(built, name, value)
    except RuntimeError:
        raise ConfigError(
            f"faiss_parameters: {factory} has no parameter {name}; {PARAMETER_EXAMPLES}"
        ) from None


def set_search_parameters(
    built: Any, k: int, total: int, parameters: str = "", factory: str = "this index"
) -> None:
    """Set the search effort.

    ``total`` is the size of the whole index, of which ``built`` may be one partition.

    Parameters
    ----------
    built : faiss.Index
    k : int
        Neighbours wanted of each query.
    total : int
        Rows of the whole index.
    parameters : str
        As for :func:`~patchnetvlad.search.retrieve.retrieve`.
    factory : str
        Name of the index in errors.
    """
    import faiss

    given = parse_parameters(parameters)
    values = {"efSearch": max(64, 2 * k), "k_factor_rf": REFINE_FACTOR}
    lists = faiss.try_extract_index_ivf(built)
    if lists is not None:
        probes = max(16, lists.nlist // 8, -(-4 * k * lists.nlist // total))
        values["nprobe"] = min(given.get("nprobe", probes), lists.nlist)
        total = max(total, lists.nlist)
        # The graph over the centres of the lists has to find that many of them.
        values["quantizer_efSearch"] = max(64, 2 * values["nprobe"])
        values["efSearch"] = max(values["efSearch"], values["quantizer_efSearch"])
    if "efSearch" in given:  # with lists, it belongs to the graph over their centres
        values.pop("quantizer_efSearch", None)
    for name, value in values.items():
        if name not in given:
            set_parameter(built, name, value)
    # Some kinds of index refuse more than there is, for lack of memory.
    most = {"k_factor_rf": -(-total // k)}
    if lists is not None:
        most["nprobe"] = lists.nlist
    for name in sorted(given, key=len):  # efSearch before quantizer_efSearch, which it may set
        _set_given(built, name, min(given[name], most.get(name, total)), factory)


def set_parameter(built: Any, name: str, value: int) -> None:
    """Set a parameter of an index, if the index has it."""
    import faiss

    with contextlib.suppress(RuntimeError):  # an index without that parameter
        faiss.ParameterSpace().set_index_parameter(built, name, value)


def build_index(index: NDArray[np.float32], factory: str, gpu: bool, parameters: str = "") -> Any:
    """Build an index [N, P]; ConfigError if FAISS cannot.

    Parameters
    ----------
    index : ndarray [N, P] of float32
    factory, gpu, parameters
        As for :func:`~patchnetvlad.search.retrieve.retrieve`.

    Returns
    -------
    faiss.Index
    """
    count, dims = index.shape
    check_finite(index)
    built = prepare_index(factory, count, dims, parameters)
    level = logging.DEBUG if factory == "Flat" else logging.INFO
    logger.log(level, "building %s of %d descriptors of %d dimensions", factory, count, dims)
    start = time.perf_counter()
    with building_errors(factory, count, dims):
        if not built.is_trained:
            train_index(built, index, gpu)
        if hasattr(built, "id_map"):
            built.add_with_ids(index, np.arange(count, dtype=np.int64))
        else:
            built.add(index)
    logger.log(level, "built %s in %.1f s", factory, time.perf_counter() - start)
    return built


def check_finite(index: NDArray[np.float32], first: int = 0) -> None:
    """Raise FeatureError unless descriptors, from row ``first`` of the index on, are finite."""
    if len(index) and not (np.isfinite(index.min()) and np.isfinite(index.max())):
        row = first + np.flatnonzero(~np.isfinite(index).all(axis=1))[0]
        raise FeatureError(
            f"the global descriptor of index image {row} is not finite; extract again"
        )


def prepare_index(factory: str, count: int, dims: int, parameters: str = "") -> Any:
    """Make an empty index that is to be trained with ``count`` descriptors, and set it up.

    ConfigError if it could not be searched with ``parameters``, before time is spent on it.

    Parameters
    ----------
    factory : str
        As FAISS spells it.
    count, dims : int
        Descriptors that it will be trained with, and their dimension.
    parameters : str
        Of the search.

    Returns
    -------
    faiss.Index
    """
    check_numbers(factory)
    for number, unit, bits in re.findall(r"IVF(\d+)([kM]?)|IMI2x(\d+)", factory):
        lists = int(number) * {"": 1, "k": 1 << 10, "M": 1 << 20}[unit] if number else 1
        lists *= 4 ** min(int(bits), 32) if bits else 1
        _check_vectors(factory, lists, count, "lists", f"IVF{max(1, count // 39)}")
    built = empty_index(factory, dims)
    check_parameters(factory, dims, parameters)
    needed = 0
    for part in index_parts(built):
        pq = getattr(part, "pq", None)
        if pq is not None:
            _check_vectors(factory, pq.ksub, count, "centres a sub-quantizer", "fewer bits (PQ8x4)")
            needed = max(needed, pq.ksub)
        needed = max(needed, getattr(part, "nlist", 0))
        if hasattr(part, "do_polysemous_training"):
            # It takes most of the time, for a kind of search by Hamming distance not used here.
            part.do_polysemous_training = False
        for clustering in (getattr(part, "cp", None), getattr(pq, "cp", None)):
            if clustering is not None:
                clustering.min_points_per_centroid = 1  # FAISS warns once a sub-quantizer
    if count < 39 * needed:
        logger.warning(
            "%s has only %d descriptors to be trained with; FAISS advises %d or more",
            factory,
            count,
            39 * needed,
        )
    set_parameter(built, "efConstruction", EF_CONSTRUCTION)
    return built


@contextlib.contextmanager
def building_errors(factory: str, count: int, dims: int) -> Iterator[None]:
    """Turn errors of FAISS while an index is built into a ConfigError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"faiss_index = {factory} cannot be built of {count} descriptors of {dims} dimensions: "
            f"{reason_of(error)}; examples are {EXAMPLES}"
        ) from None


def check_numbers(factory: str) -> None:
    """Raise ConfigError for numbers that would make FAISS abort the process."""
    # It aborts, or reserves memory for the lists before it looks further.
    if re.search(r"(?<!\d)0+(?!\d)|(HNSW|NSG)0*1(?!\d)", factory):
        raise ConfigError(
            f"faiss_index = {factory} has a number that is too small; examples are {EXAMPLES}"
        )


def empty_index(factory: str, dims: int) -> Any:
    """Make an index without vectors; ConfigError if FAISS does not know the factory."""
    import faiss

    try:
        return faiss.index_factory(dims, factory, faiss.METRIC_L2)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"faiss_index = {factory} is refused by FAISS for {dims} dimensions: "
            f"{reason_of(error)}; "
            f"examples are {EXAMPLES}"
        ) from None


def _check_vectors(factory: str, needed: int, count: int, what: str, instead: str) -> None:
    if needed > count:
        raise ConfigError(
            f"faiss_index = {factory} has {needed} {what}, but the index has only {count} images "
            f"to train them with; give {instead} or Flat"
        )


def train_index(built: Any, index: NDArray[np.float32], gpu: bool) -> None:
    """Train an index with descriptors [n, P], on a GPU if wanted."""
    import faiss

    lists: Any = faiss.try_extract_index_ivf(built) if gpu else None
    if lists is None:
        built.train(index)
        return
    # Nearly all time goes into assigning descriptors to centres.
    try:
        assigner = faiss.index_cpu_to_all_gpus(faiss.IndexFlatL2(lists.d))
        lists.clustering_index = assigner
        built.train(index)
    except RuntimeError as error:
        logger.info("training on the CPU: %s", reason_of(error))
        lists.clustering_index = None
        built.train(index)
    finally:
        lists.clustering_index = None


def index_parts(index: Any) -> Iterator[Any]:
    """Yield an index and the indexes that it wraps."""
    import faiss

    yield index
    for name in ("index", "base_index", "storage"):
        if getattr(index, name, None) is not None:
            yield from index_parts(faiss.downcast_index(getattr(index, name)))


def reason_of(error: BaseException) -> str:
    """Return the message of FAISS, without names of functions and source files."""
    text = " ".join(str(error).split()) or "out of memory"
    text = re.sub(r"^Error in .* at \S+:\d+: ", "", text)
    text = re.sub(r"^Error: '.*?' failed: ", "", text)
    return textwrap.shorten(text, 160, placeholder=" ...")
