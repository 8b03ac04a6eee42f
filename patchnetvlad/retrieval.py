# SPDX-License-Identifier: MIT
"""Retrieval: the index images nearest to each query, by global descriptor."""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import re
import textwrap
import threading
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets import file_sha256, stream_sha256
from patchnetvlad.errors import ConfigError, FeatureError, OutputError, make_folder
from patchnetvlad.files import new_file, replacing

if TYPE_CHECKING:
    import torch

    from patchnetvlad.cluster.retrieval import Rows

Search = Callable[[NDArray[np.float32], int], tuple[NDArray[np.float32], NDArray[np.int64]]]

logger = logging.getLogger(__name__)

CUTOUTS = 12
"""Perspective cut-outs of one Tokyo 24/7 panorama, which follow each other in its list."""
EXAMPLES = "Flat, SQfp16, HNSW32, IVF1024,Flat or IVF4096,PQ64"
PARAMETERS = ("nprobe", "efSearch", "k_factor_rf")
"""Of FAISS's indexes, those that say how much is searched."""
PARAMETER_EXAMPLES = (
    "examples are nprobe=64 for IVF, efSearch=200 for HNSW, nprobe=64,k_factor_rf=10 for IVF and "
    "RFlat"
)
EF_CONSTRUCTION = 100
REFINE_FACTOR = 4
GPU_LIMIT = 2048
"""Most candidates, and most lists probed, of a search that FAISS does on a GPU."""
GPU_INDEXES = (
    "IndexFlat",
    "IndexFlatL2",
    "IndexIVFFlat",
    "IndexIVFFlatL2",
    "IndexIVFPQ",
    "IndexIVFScalarQuantizer",
)
SIDECAR = ".fingerprint.json"
_FAISS_SETTINGS = threading.Lock()


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
    """Find the nearest index images of each query, by Euclidean distance.

    The search is exact for ``Flat``, and images of one distance stand in the order of their rows.
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
        Candidates a query, from 1; clamped to N.
    factory : str, default "Flat"
        Kind of index, in the language of FAISS's ``index_factory``.
    parameters : str, default ""
        How much is searched, in the language of FAISS's ``ParameterSpace``, such as ``nprobe=64``
        or ``nprobe=64,k_factor_rf=10``; see :func:`parse_parameters`. What is not named is set as
        above, and what is larger than all there is means all.
    index_path : str or Path, optional
        File of FAISS that keeps the built index; another retrieval from the same descriptors with
        the same ``factory`` reads it instead of building. ``<index_path>.fingerprint.json`` says
        what it was built from; if that differs or the file is damaged, it is built again.
    gpu : bool, default False
        Search on the GPUs, where FAISS has them and a version of the index for them.
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
        FAISS does not know ``factory``, or cannot build it from these descriptors, or it has not
        one of ``parameters``.
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
        _check_parameters(factory, index.shape[1], parameters)
    gpu = gpu and faiss.get_num_gpus() > 0
    if factory == "Flat" and index_path is None and device is not None and device.type == "cuda":
        from patchnetvlad.search.on_device import nearest_rows

        found = nearest_rows(queries, index, k, device)[1]
    elif factory == "Flat" and not gpu:
        search: Search = lambda q, k: faiss.knn(q, index, k)  # noqa: E731
        if index_path is not None:
            search = _load_or_build(index, factory, index_path, gpu).search
        found = exact_search(search, queries, k)[1]
    else:
        built = _load_or_build(index, factory, index_path, gpu, parameters)
        _set_search_parameters(built, k, len(index), parameters, factory)
        found = _search(built, queries, k, factory, gpu).astype(np.int64)
        bad = incomplete(found, factory)
        if bad.any():
            found[bad] = exact_search(lambda q, k: faiss.knn(q, index, k), queries[bad], k)[1]
    check_found(queries, found)
    return found


def check_search(queries: tuple[int, ...], index: tuple[int, ...], top_k: int) -> int:
    """Return how many candidates a search can have, from the shapes of the descriptors.

    Raises
    ------
    ValueError
        ``top_k`` is less than 1.
    FeatureError
        The shapes do not fit each other.
    """
    if top_k < 1:
        raise ValueError(f"top_k = {top_k} must be 1 or more")
    for name, shape in (("queries", queries), ("index", index)):
        if len(shape) != 2:
            raise FeatureError(
                f"the global descriptors of the {name} have shape {shape}; needed is "
                "[images, dimensions]"
            )
    if queries[1] != index[1]:
        raise FeatureError(
            f"the queries' global descriptors have {queries[1]} dimensions, the index's "
            f"{index[1]}; extract both with the same configuration"
        )
    return min(top_k, index[0])


def exact_search(
    search: Search, queries: NDArray[np.float32], k: int
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Search exactly, in a way that depends on nothing but the queries and each block of rows.

    Equal distances stand in the order of rows, also where they are cut off. FAISS alone keeps any
    of them from k = 100, and computes distances otherwise for k = 1 and for fewer queries than
    threads.

    Parameters
    ----------
    search : callable
        Takes queries and k; returns squared distances and rows, as FAISS does.
    queries : ndarray [Q, P] of float32
    k : int

    Returns
    -------
    distances : ndarray [Q, k] of float32
        Squared, nearest first.
    rows : ndarray [Q, k] of int64
        -1 where there are no more.
    """
    import faiss

    threads = faiss.omp_get_max_threads()
    with _FAISS_SETTINGS:  # the first of these is the whole process's
        before = faiss.cvar.distance_compute_min_k_reservoir
        try:
            faiss.cvar.distance_compute_min_k_reservoir = 2**31 - 1
            faiss.omp_set_num_threads(max(1, min(threads, len(queries))))
            distances, rows = search(queries, max(k, 2))
        finally:
            faiss.cvar.distance_compute_min_k_reservoir = before
            faiss.omp_set_num_threads(threads)
    return distances[:, :k], rows[:, :k].astype(np.int64)


def incomplete(found: NDArray[np.int64], factory: str) -> NDArray[np.bool_]:
    """Return, and say in the log, for which queries [Q] an index found fewer than k images."""
    ordered = np.sort(found, axis=1)
    bad: NDArray[np.bool_] = (ordered[:, 0] < 0) | (ordered[:, 1:] == ordered[:, :-1]).any(axis=1)
    if bad.any():
        logger.info(
            "%s found fewer than %d images for %d of %d queries; searching exactly for these",
            factory,
            found.shape[1],
            bad.sum(),
            len(found),
        )
    return bad


def check_found(queries: NDArray[np.float32], found: NDArray[np.int64]) -> None:
    """Raise FeatureError if an exact search found fewer than k images [Q, k] for a query."""
    short = np.flatnonzero((found < 0).any(axis=1))
    if len(short):
        finite = np.isfinite(queries[short[0]]).all()
        raise FeatureError(
            f"the global descriptor of query {short[0]} "
            + ("has no finite distance to some of the index's" if finite else "is not finite")
            + "; extract again"
        )


def _search(built: Any, queries: NDArray[np.float32], k: int, factory: str, gpu: bool) -> Any:
    """Search on the GPUs if that is wanted and can be done; rows [Q, k], -1 where none."""
    import faiss

    if gpu:
        reason = _why_not_on_gpu(built, k)
        if reason is None:
            try:
                return faiss.index_cpu_to_all_gpus(built).search(queries, k)[1]
            except RuntimeError as error:
                reason = _reason(error)
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


def parse_parameters(text: str) -> dict[str, int]:
    """Read what limits a search, such as ``nprobe=64,k_factor_rf=10``.

    Parameters
    ----------
    text : str
        Names of :data:`PARAMETERS`, before which may stand ``quantizer_``, for the index over the
        centres of lists, and whole numbers.

    Returns
    -------
    dict of str to int

    Raises
    ------
    ConfigError
        The text has another form.
    """
    if not isinstance(text, str):
        raise ConfigError(f"faiss_parameters = {text!r} is no text; {PARAMETER_EXAMPLES}")
    given: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        found = re.fullmatch(
            rf"((?:quantizer_)*(?:{'|'.join(PARAMETERS)}))\s*=\s*0*([1-9]\d{{0,8}})",
            part.strip(),
            re.ASCII,
        )
        if found is None:
            raise ConfigError(
                f"faiss_parameters: {part.strip()!r} is not one of {', '.join(PARAMETERS)} with a "
                f"whole number from 1; {PARAMETER_EXAMPLES}"
            )
        if found[1] in given:
            raise ConfigError(f"faiss_parameters = {text} has {found[1]} twice")
        given[found[1]] = int(found[2])
    return given


def _check_parameters(factory: str, dims: int, parameters: str) -> None:
    """Raise ConfigError if a kind of index, which FAISS knows, has not these parameters."""
    given = parse_parameters(parameters)
    empty = _empty(factory, dims) if given else None
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


def _set_search_parameters(
    built: Any, k: int, total: int, parameters: str = "", factory: str = "this index"
) -> None:
    """Set how much is searched; ``total`` images have the index and, if it is one, its parts."""
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
    if "efSearch" in given:  # of an index with lists, it is that of the graph over their centres
        values.pop("quantizer_efSearch", None)
    for name, value in values.items():
        if name not in given:
            _set_parameter(built, name, value)
    # More than there is would be refused by some kinds of index, for want of memory.
    most = {"k_factor_rf": -(-total // k)}
    if lists is not None:
        most["nprobe"] = lists.nlist
    for name in sorted(given, key=len):  # efSearch before quantizer_efSearch, which it may set
        _set_given(built, name, min(given[name], most.get(name, total)), factory)


def _set_parameter(built: Any, name: str, value: int) -> None:
    import faiss

    with contextlib.suppress(RuntimeError):  # an index without that parameter
        faiss.ParameterSpace().set_index_parameter(built, name, value)


def _load_or_build(
    index: NDArray[np.float32],
    factory: str,
    index_path: str | Path | None,
    gpu: bool,
    parameters: str = "",
) -> Any:
    path = Path(index_path) if index_path is not None else None
    if path is None:
        return _build(index, factory, gpu, parameters)
    want = {
        "format": 1,
        "factory": factory,
        "images": index.shape[0],
        "dimensions": index.shape[1],
        "descriptors": hashlib.sha256(index.data).hexdigest(),
    }
    built = _load(path, want)
    if built is None:
        make_folder(path.parent)  # before the time that building takes
        built = _build(index, factory, gpu, parameters)
        _save(built, path, want)
    return built


def _build(index: NDArray[np.float32], factory: str, gpu: bool, parameters: str = "") -> Any:
    """Build an index [N, P]; ConfigError if FAISS cannot."""
    count, dims = index.shape
    _require_finite(index)
    built = _prepare(factory, count, dims, parameters)
    level = logging.DEBUG if factory == "Flat" else logging.INFO
    logger.log(level, "building %s of %d descriptors of %d dimensions", factory, count, dims)
    start = time.perf_counter()
    with _refusals(factory, count, dims):
        if not built.is_trained:
            _train(built, index, gpu)
        if hasattr(built, "id_map"):
            built.add_with_ids(index, np.arange(count, dtype=np.int64))
        else:
            built.add(index)
    logger.log(level, "built %s in %.1f s", factory, time.perf_counter() - start)
    return built


def _require_finite(index: NDArray[np.float32], first: int = 0) -> None:
    """Raise FeatureError unless descriptors, from row ``first`` of the index on, are finite."""
    if len(index) and not (np.isfinite(index.min()) and np.isfinite(index.max())):
        row = first + np.flatnonzero(~np.isfinite(index).all(axis=1))[0]
        raise FeatureError(
            f"the global descriptor of index image {row} is not finite; extract again"
        )


def _prepare(factory: str, count: int, dims: int, parameters: str = "") -> Any:
    """Make an empty index that is to be trained with ``count`` descriptors, and set it up.

    ConfigError if it could not be searched with ``parameters``, before time is spent on it.
    """
    _check_numbers(factory)
    for number, unit, bits in re.findall(r"IVF(\d+)([kM]?)|IMI2x(\d+)", factory):
        lists = int(number) * {"": 1, "k": 1 << 10, "M": 1 << 20}[unit] if number else 1
        lists *= 4 ** min(int(bits), 32) if bits else 1
        _require_vectors(factory, lists, count, "lists", f"IVF{max(1, count // 39)}")
    built = _empty(factory, dims)
    _check_parameters(factory, dims, parameters)
    needed = 0
    for part in _parts(built):
        pq = getattr(part, "pq", None)
        if pq is not None:
            _require_vectors(
                factory, pq.ksub, count, "centres a sub-quantizer", "fewer bits (PQ8x4)"
            )
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
    _set_parameter(built, "efConstruction", EF_CONSTRUCTION)
    return built


@contextlib.contextmanager
def _refusals(factory: str, count: int, dims: int) -> Iterator[None]:
    """Turn what FAISS refuses while an index is built into a ConfigError."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"faiss_index = {factory} cannot be built of {count} descriptors of {dims} dimensions: "
            f"{_reason(error)}; examples are {EXAMPLES}"
        ) from None


def _check_numbers(factory: str) -> None:
    # FAISS aborts the process at these, or reserves memory for the lists before looking further.
    if re.search(r"(?<!\d)0+(?!\d)|(HNSW|NSG)0*1(?!\d)", factory):
        raise ConfigError(
            f"faiss_index = {factory} has a number that is too small; examples are {EXAMPLES}"
        )


def _empty(factory: str, dims: int) -> Any:
    """Make an index without vectors; ConfigError if FAISS does not know the factory."""
    import faiss

    try:
        return faiss.index_factory(dims, factory, faiss.METRIC_L2)
    except (RuntimeError, MemoryError) as error:
        raise ConfigError(
            f"faiss_index = {factory} is refused by FAISS for {dims} dimensions: {_reason(error)}; "
            f"examples are {EXAMPLES}"
        ) from None


class GrowingIndex:
    """An index of FAISS that descriptors are added to between searches.

    Not thread-safe: nobody may search while descriptors are added.

    Parameters
    ----------
    dimension : int
        P.
    factory : str, default "Flat"
        Kind of index, as of :func:`retrieve`, that needs no training.
    parameters : str, default ""
        How much is searched, as of :func:`retrieve`.

    Raises
    ------
    ConfigError
        FAISS does not know the factory, or it needs training, or has not one of ``parameters``.
    """

    def __init__(self, dimension: int, factory: str = "Flat", parameters: str = "") -> None:
        self.dimension = dimension
        self.factory = "".join(factory.split())
        self._parameters = parameters
        _check_numbers(self.factory)
        self._built = _empty(self.factory, dimension)
        if not self._built.is_trained or "NSG" in self.factory:
            raise ConfigError(
                f"faiss_index = {factory} has to be trained, so it cannot grow; give Flat, SQfp16 "
                "or HNSW32"
            )
        _check_parameters(self.factory, dimension, parameters)
        _set_parameter(self._built, "efConstruction", EF_CONSTRUCTION)

    def __len__(self) -> int:
        return int(self._built.ntotal)

    def add(self, descriptors: NDArray[np.float32]) -> None:
        """Add descriptors [n, P]; FeatureError if one is not finite."""
        if not np.isfinite(descriptors).all():
            raise FeatureError("a global descriptor is not finite; describe the image again")
        self._built.add(np.ascontiguousarray(descriptors, dtype=np.float32))

    def search(
        self, descriptor: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Find the nearest of what was added, in the order of adding counted from 0.

        Parameters
        ----------
        descriptor : ndarray [P] of float32
        k : int
            At most as many as there are.

        Returns
        -------
        distances : ndarray [m] of float32
            Euclidean, nearest first.
        rows : ndarray [m] of int64
            m is k, or less where an approximate search finds less.
        """
        if k < 1 or len(self) == 0:
            return np.empty(0, np.float32), np.empty(0, np.int64)
        _set_search_parameters(self._built, k, len(self), self._parameters, self.factory)
        squared, rows = self._built.search(np.asarray(descriptor, np.float32)[None], k)
        found = rows[0] >= 0
        return np.sqrt(np.maximum(squared[0][found], 0)), rows[0][found].astype(np.int64)

    def save(self, path: Path) -> None:
        """Write an index that takes long to build; OutputError if that cannot be done."""
        import faiss

        if self.factory == "Flat":  # the descriptors themselves
            path.unlink(missing_ok=True)
            return
        with replacing(path) as file:
            untyped: Any = faiss
            file.write(untyped.serialize_index(self._built).tobytes())

    def load(self, path: Path, count: int) -> int:
        """Read what :meth:`save` wrote.

        Parameters
        ----------
        path : Path
        count : int
            Descriptors that there are now; a file of more is not used.

        Returns
        -------
        int
            How many descriptors it had; 0 if it is of no use.
        """
        import faiss

        if self.factory == "Flat" or not path.is_file():
            return 0
        try:
            untyped: Any = faiss
            built = untyped.deserialize_index(np.fromfile(path, np.uint8))
        except (OSError, RuntimeError, MemoryError) as error:
            logger.info("%s is built again: it is damaged (%s)", path, _reason(error))
            return 0
        same_kind = type(built) is type(self._built) and built.d == self.dimension
        if not same_kind or built.ntotal > count:
            logger.info("%s is built again: it is of another kind of index", path)
            return 0
        self._built = built
        return len(self)


def _require_vectors(factory: str, needed: int, count: int, what: str, instead: str) -> None:
    if needed > count:
        raise ConfigError(
            f"faiss_index = {factory} has {needed} {what}, but the index has only {count} images "
            f"to train them with; give {instead} or Flat"
        )


def _train(built: Any, index: NDArray[np.float32], gpu: bool) -> None:
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
        logger.info("training on the CPU: %s", _reason(error))
        lists.clustering_index = None
        built.train(index)
    finally:
        lists.clustering_index = None


def _parts(index: Any) -> Iterator[Any]:
    """Yield an index and those that it wraps."""
    import faiss

    yield index
    for name in ("index", "base_index", "storage"):
        if getattr(index, name, None) is not None:
            yield from _parts(faiss.downcast_index(getattr(index, name)))


def _reason(error: BaseException) -> str:
    """What FAISS says, without its functions and source files."""
    text = " ".join(str(error).split()) or "out of memory"
    text = re.sub(r"^Error in .* at \S+:\d+: ", "", text)
    text = re.sub(r"^Error: '.*?' failed: ", "", text)
    return textwrap.shorten(text, 160, placeholder=" ...")


def _load(path: Path, want: dict[str, Any]) -> Any:
    """Read a saved index; None if there is none, or (said in the log) none that fits."""
    import faiss

    sidecar = path.with_name(path.name + SIDECAR)
    if path.is_dir():
        raise OutputError(f"faiss_index_path = {path} is a folder; name a file")
    if not path.exists():
        return None
    try:
        have = json.loads(sidecar.read_text(encoding="utf-8"))
        if not isinstance(have, dict):
            raise ValueError("not a fingerprint")
        for key, value in want.items():
            if have.get(key) != value:
                logger.info(
                    "%s is built again: its %s is %s, not %s",
                    path,
                    "SHA-256 of the descriptors" if key == "descriptors" else key,
                    have.get(key),
                    value,
                )
                return None
        with path.open("rb") as file:  # One file throughout, even if another process replaces it.
            if stream_sha256(file) != have.get("file"):
                raise ValueError("not the file that the fingerprint is of")
            file.seek(0)
            untyped: Any = faiss  # its stubs lack the reader
            built = faiss.read_index(untyped.PyCallbackIOReader(file.read))
        if (built.ntotal, built.d) != (want["images"], want["dimensions"]):
            raise ValueError(f"{built.ntotal} descriptors of {built.d} dimensions")
    except FileNotFoundError:
        # Ours never lacks it, see _save: this may be anything.
        raise OutputError(
            f"faiss_index_path = {path} is not overwritten: it has no {sidecar.name}, so it is "
            "not known to be a saved index; name another file or delete it"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        logger.info("%s is built again: it is damaged (%s)", path, _reason(error))
        return None
    logger.info("using %s of %s", want["factory"], path)
    return built


def _save(built: Any, path: Path, fingerprint: dict[str, Any]) -> None:
    import faiss

    sidecar = path.with_name(path.name + SIDECAR)
    try:
        # The fingerprint names the file's own hash, so that a run that ends between these two
        # leaves a pair that does not match; in this order, the inner one first, it leaves no index
        # without one.
        with new_file(path) as index, new_file(sidecar) as about:
            faiss.write_index(built, str(index))
            text = json.dumps({**fingerprint, "file": file_sha256(index)}, indent=1)
            about.write_text(text + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:
        raise OutputError(
            f"faiss_index_path = {path} cannot be written: {_reason(error)}; name another file"
        ) from None
    logger.info("kept the index in %s", path)


def retrieve_in_groups(
    queries: NDArray[np.float32],
    index: NDArray[np.float32] | Rows,
    top_k: int,
    groups: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]],
    *,
    factory: str = "Flat",
    parameters: str = "",
    index_path: str | Path | None = None,
    gpu: bool = False,
    search: Callable[..., NDArray[np.int64]] = retrieve,
) -> NDArray[np.int64]:
    """Find the nearest index images of each query within its own group, such as its city.

    Parameters
    ----------
    queries : ndarray [Q, P] of float
        Global descriptors.
    index : ndarray [N, P] of float
    top_k : int
        Candidates a query, from 1; clamped to the index images of the smallest group.
    groups : sequence of (ndarray [q] of int, ndarray [n] of int)
        Rows of ``queries`` and of ``index`` that belong together; each query in one group.
    factory, parameters, gpu
        As of :func:`retrieve`.
    index_path : str or Path, optional
        As of :func:`retrieve`; of several groups, each has a file of its own, whose name ends in
        the number of the group, from 0.
    search : callable
        What searches each group, such as that of :mod:`patchnetvlad.cluster.retrieval`; may find
        less than k.

    Returns
    -------
    ndarray [Q, k] of int64
        Rows of the whole ``index``, nearest first.

    Raises
    ------
    ValueError
        A query is in no group or in several, or a group has no index images.
    PatchNetVLADError
        As of :func:`retrieve`.

    Examples
    --------
    The nearest image of the other city is not looked at:

    >>> queries = np.array([[1.0, 0.0]], np.float32)
    >>> index = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    >>> groups = [(np.array([0]), np.array([1, 2]))]
    >>> retrieve_in_groups(queries, index, top_k=1, groups=groups).tolist()
    [[2]]
    """
    members = np.concatenate([rows for rows, _ in groups]) if groups else np.empty(0, np.int64)
    if not np.array_equal(np.sort(members), np.arange(len(queries))):
        raise ValueError("each query must be in exactly one group")
    if any(len(rows) == 0 for _, rows in groups):
        raise ValueError("each group must have index images")
    k = min([top_k, *(len(rows) for _, rows in groups)])
    if k < top_k:
        logger.info("only %d candidates a query: the smallest group has no more images", k)
    parts = []
    for number, (query_rows, index_rows) in enumerate(groups):
        path = Path(index_path) if index_path is not None else None
        if path is not None and len(groups) > 1:
            path = path.with_name(f"{path.name}.{number}")
        inside = search(
            queries[query_rows],
            index[index_rows],
            k,
            factory=factory,
            parameters=parameters,
            index_path=path,
            gpu=gpu,
        )
        parts.append(index_rows[inside])
    k = min([k, *(part.shape[1] for part in parts)])  # of some images there are no features
    found = np.empty((len(queries), k), np.int64)
    for (query_rows, _), part in zip(groups, parts, strict=True):
        found[query_rows] = part[:, :k]
    return found


def keep_best_cutout(predictions: NDArray[np.int64], top_k: int) -> NDArray[np.int64]:
    """Keep the best-ranked cut-out of each panorama (the rule of Tokyo 24/7).

    Parameters
    ----------
    predictions : ndarray [Q, k] of int
        Candidates, best first; images 12 p to 12 p + 11 are cut from panorama p.
    top_k : int
        Candidates to keep a query.

    Returns
    -------
    ndarray [Q, m] of int64
        m is top_k, or the number of panoramas if that is smaller. 12 * top_k candidates a query,
        or all of a short index, always hold that many.
    """
    kept = []
    for row in predictions:
        _, first = np.unique(row // CUTOUTS, return_index=True)
        kept.append(row[np.sort(first)][:top_k])
    return np.array(kept, dtype=np.int64)


def load_predictions(path: str | Path, num_queries: int, num_index: int) -> NDArray[np.int64]:
    """Read candidates of another retrieval from a .npy file.

    Parameters
    ----------
    path : str or Path
        Array [Q, k] of rows of the index list, best first.
    num_queries, num_index : int
        Q, and the bound of the rows.

    Returns
    -------
    ndarray [Q, k] of int64

    Raises
    ------
    FeatureError
        The file is missing, or its shape or values do not fit.
    """
    try:
        predictions = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises whatever it trips over.
        raise FeatureError(f"pred_input_path = {path} cannot be read: {_reason(error)}") from None
    if (
        not isinstance(predictions, np.ndarray)
        or predictions.ndim != 2
        or predictions.shape[1] == 0
        or predictions.dtype.kind not in "iu"
    ):
        raise FeatureError(
            f"pred_input_path = {path} must hold whole numbers of shape [queries, candidates]"
        )
    if len(predictions) != num_queries:
        raise FeatureError(
            f"pred_input_path = {path} has {len(predictions)} rows for {num_queries} queries"
        )
    row, column = np.nonzero((predictions < 0) | (predictions >= num_index))
    if len(row):
        raise FeatureError(
            f"pred_input_path = {path}: row {row[0]}, column {column[0]} is "
            f"{predictions[row[0], column[0]]}; the index list has rows 0 to {num_index - 1}"
        )
    ordered = np.sort(predictions, axis=1)
    repeated = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(repeated):
        raise FeatureError(
            f"pred_input_path = {path}: row {repeated[0]} has a candidate twice; each may be there "
            "once"
        )
    return predictions.astype(np.int64)


def load_candidates(
    path: str | Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    top_k: int | None = None,
) -> NDArray[np.int64]:
    """Read candidates of another retrieval, from an array or from pairs of names.

    What a file holds is seen from its content:

    - a ``.npy`` file: see ``load_predictions``;
    - pairs of kapture, whose first line is ``# kapture format: 1.0`` or ``1.1``, or whose lines
      are a query's name, a comma and more: ``query, index`` or ``query, index, score``;
    - pairs of hloc: ``query index``, separated by blanks.

    Names must be those of the lists, to the letter. The lines of a query need not follow each
    other; their order is that of its candidates, but scores, where there are any, go first: the
    largest is the best, as in kapture's own tools. A candidate that a query has twice counts
    once.

    Parameters
    ----------
    path : str or Path
    query_names, index_names : sequence of str
        Names of Q and N images.
    top_k : int, optional
        Candidates that are wanted a query. No query may have fewer, unless all have as many.

    Returns
    -------
    ndarray [Q, k] of int64
        Rows of ``index_names``, best first; k is ``top_k``, or what the file has if that is less
        or ``top_k`` is not given.

    Raises
    ------
    FeatureError
        The file cannot be read, names an image that is not in the lists, or lacks candidates.
    """
    file = Path(path)
    try:
        with file.open("rb") as opened:
            start = opened.read(6)
        if file.suffix == ".npy" or start.startswith((b"\x93NUMPY", b"PK\x03\x04")):
            return load_predictions(path, len(query_names), len(index_names))[:, :top_k]
        text = file.read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError
    except OSError as error:
        raise FeatureError(f"pred_input_path = {path} cannot be read: {error.strerror}") from None
    except FeatureError:
        raise
    except ValueError:
        raise FeatureError(
            f"pred_input_path = {path} is neither a .npy file nor text in UTF-8 with pairs of "
            "kapture or hloc"
        ) from None
    found = _read_pairs(path, text.split("\n"), query_names, index_names)
    missing = [name for name in query_names if name not in found]
    if missing:
        raise FeatureError(
            f"pred_input_path = {path} has no candidates for {len(missing)} of "
            f"{len(query_names)} queries, first {missing[0]}"
        )
    most = max(map(len, found.values()))
    wanted = most if top_k is None else min(top_k, most)
    least = min(found, key=lambda name: len(found[name]))
    if len(found[least]) < wanted:
        raise FeatureError(
            f"pred_input_path = {path} has {len(found[least])} candidates for {least}, but "
            f"{most} for others; every query needs {wanted} (the largest of n_values_all, or what "
            "others have if that is less)"
        )
    return np.array([found[name][:wanted] for name in query_names], dtype=np.int64)


def _read_pairs(
    path: str | Path, lines: Sequence[str], query_names: Sequence[str], index_names: Sequence[str]
) -> dict[str, list[int]]:
    """Read pairs of names; rows of the index list by name of a query, best first."""
    queries = set(query_names)
    rows = {name: i for i, name in reversed(list(enumerate(index_names)))}
    kapture = _is_kapture(lines, queries)
    comment, form = ("#", "query, index or query, index, score") if kapture else ("# ", "two names")
    found: dict[str, list[tuple[int, float]]] = {}
    fields_before = 0
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(comment):
            continue
        where = f"pred_input_path = {path}, line {number}"
        fields = [field.strip() for field in line.split(",")] if kapture else line.split()
        if len(fields) not in ((2, 3) if kapture else (2,)):
            kind, separator = ("kapture", "comma") if kapture else ("hloc", "blank")
            raise FeatureError(
                f"{where} has {len(fields)} fields; pairs of {kind} have {form}, and no name holds "
                f"a {separator}"
            )
        if fields_before and len(fields) != fields_before:
            raise FeatureError(f"{where} has {len(fields)} fields, those before {fields_before}")
        fields_before = len(fields)
        for name, names, what in ((fields[0], queries, "query"), (fields[1], rows, "index")):
            if name not in names:
                raise FeatureError(
                    f"{where}: {name} is not in the {what} list{_resembling(name, names)}"
                )
        try:
            score = float(fields[2]) if len(fields) == 3 else 0.0
        except ValueError:
            score = float("nan")
        if np.isnan(score):
            raise FeatureError(f"{where}: the score {fields[2]!r} is not a number")
        found.setdefault(fields[0], []).append((rows[fields[1]], score))
    best_first, moved, repeated = {}, 0, 0
    for name, candidates in found.items():
        ordered = sorted(candidates, key=lambda candidate: -candidate[1])
        best_first[name] = list(dict.fromkeys(row for row, _ in ordered))
        moved += ordered != candidates
        repeated += len(candidates) - len(best_first[name])
    if moved:
        logger.info("%s: the candidates of %d queries were put in order of score", path, moved)
    if repeated:
        logger.info("%s: %d candidates that a query had already were left out", path, repeated)
    return best_first


def _is_kapture(lines: Sequence[str], queries: Collection[str]) -> bool:
    if re.match(r"#\s*kapture format", lines[0]):
        return True
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    return (
        "," in first and first.split(",")[0].strip() in queries and first.split()[0] not in queries
    )


def _resembling(name: str, names: Collection[str]) -> str:
    """Words that name an entry of a list with the same file name, if there is one."""
    file = name.replace("\\", "/").rsplit("/", 1)[-1]
    same = (other for other in names if other.replace("\\", "/").rsplit("/", 1)[-1] == file)
    other = next(same, None)
    return f", which has {other}; names must be the same to the letter" if other else ""


def distances_to(
    queries: NDArray[np.float32], index: NDArray[np.float32], candidates: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Compute the distances of queries to their candidates by global descriptor.

    Parameters
    ----------
    queries : ndarray [Q, P] of float32
    index : ndarray [N, P] of float32
    candidates : ndarray [Q, k] of int64
        Rows of ``index``.

    Returns
    -------
    ndarray [Q, k] of float32
        Euclidean distances.
    """
    found = np.empty(candidates.shape, dtype=np.float32)
    for q, row in enumerate(candidates):  # [Q, k, P] would be large
        found[q] = np.linalg.norm(index[row] - queries[q], axis=1)
    return found
