# SPDX-License-Identifier: MIT
"""The workers of retrieval, each of which holds a partition of a FAISS index."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.engines.ray.connection import check_code
from patchnetvlad.errors import FeatureError
from patchnetvlad.search.exact import exact_search
from patchnetvlad.search.index import (
    building_errors,
    check_finite,
    prepare_index,
    set_search_parameters,
    train_index,
)
from patchnetvlad.search.index_file import load_index, save_index
from patchnetvlad.search.rows import Rows


@dataclass(frozen=True)
class SearchPlan:
    """The settings that all partitions share."""

    factory: str
    parameters: str
    count: int
    dims: int
    threads: int
    path: str | None
    code: str

    def file(self, part: str) -> Path | None:
        """Return the name of the file of a part of the index."""
        if self.path is None:
            return None
        path = Path(self.path)
        return path.with_name(f"{path.stem}.{part}{path.suffix}")

    def empty(self) -> Any:
        """Make an empty index, set up to be trained."""
        return prepare_index(self.factory, self.count, self.dims, self.parameters)


def arithmetic_digest() -> str:
    """Return a digest of distances; a different one means that last bits differ here."""
    import faiss

    rng = np.random.default_rng(0)
    queries = rng.standard_normal((300, 512), np.float32)
    rows = rng.standard_normal((1060, 512), np.float32)
    few = queries[:5]
    found = [exact_search(lambda q, k: faiss.knn(q, rows, k), q, 64)[0] for q in (queries, few)]
    return hashlib.sha256(b"".join(distances.tobytes() for distances in found)).hexdigest()


class Unreadable(Exception):
    """A worker does not see the file of the rows."""


def _read(source: list[Any]) -> NDArray[np.float32]:
    """Read rows from their file, or take those that were sent."""
    import ray

    rows: NDArray[np.float32] | Rows = ray.get(source[0])
    if not isinstance(rows, Rows):
        return rows
    try:
        return rows.read()
    except Exception as error:  # fsspec raises errors of many types
        raise Unreadable(str(error)) from None


def trained_index(
    plan: SearchPlan, source: list[Any], rows: NDArray[np.int64]
) -> NDArray[np.uint8]:
    """Train an index, or read the one that was; the bytes of its file, without descriptors."""
    import faiss

    check_code(plan.code)
    faiss.omp_set_num_threads(plan.threads)
    sample = _read(source)
    path = plan.file("trained")
    want = {
        "format": 1,
        "factory": plan.factory,
        "images": 0,
        "dimensions": plan.dims,
        "descriptors": hashlib.sha256(sample.data).hexdigest(),
        "of": plan.count,
    }
    built = None if path is None else load_index(path, want)
    if built is None:
        if not np.isfinite(sample).all():
            row = rows[np.flatnonzero(~np.isfinite(sample).all(axis=1))[0]]
            raise FeatureError(
                f"the global descriptor of index image {row} is not finite; extract again"
            )
        built = plan.empty()
        with building_errors(plan.factory, plan.count, plan.dims):
            train_index(built, sample, gpu=False)
        if path is not None:
            save_index(built, path, want)
    untyped: Any = faiss
    data: NDArray[np.uint8] = untyped.serialize_index(built)
    return data


class IndexShard:
    """The actor: rows ``first`` to ``last`` of the index, ready to be searched."""

    def __init__(
        self,
        plan: SearchPlan,
        source: list[Any],
        first: int,
        last: int,
        name: str,
        trained: list[Any],
    ) -> None:
        self.plan, self.source, self.trained = plan, source, trained
        self.first, self.last, self.name = first, last, name
        self.built: Any = None
        self.rows: NDArray[np.float32] | None = None

    def __repr__(self) -> str:
        return f"index images {self.first}-{self.last}"

    def prepare(self) -> tuple[bool, str]:
        """Make the partition ready; whether a file was used, and what distances look like here."""
        import faiss

        faiss.omp_set_num_threads(self.plan.threads)
        used = self._built_or_read() if self.built is None and self.rows is None else False
        return used, arithmetic_digest() if self.plan.factory == "Flat" else ""

    def search(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Search the partition; distances and rows of the whole index."""
        import faiss

        faiss.omp_set_num_threads(self.plan.threads)
        if self.built is None and self.rows is None:  # this worker replaces one that died
            self._built_or_read()
        if self.built is None:
            return self.search_exactly(queries, k)
        if self.plan.factory == "Flat":
            return exact_search(self.built.search, queries, k)
        plan = self.plan
        set_search_parameters(self.built, k, plan.count, plan.parameters, plan.factory)
        distances, rows = self.built.search(queries, k)
        return distances, rows.astype(np.int64)

    def search_exactly(
        self, queries: NDArray[np.float32], k: int
    ) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
        """Search all rows of the partition, whatever its kind of index."""
        import faiss

        faiss.omp_set_num_threads(self.plan.threads)
        rows = _read(self.source) if self.rows is None else self.rows
        distances, found = exact_search(lambda q, k: faiss.knn(q, rows, k), queries, k)
        found[found >= 0] += self.first
        return distances, found

    def _built_or_read(self) -> bool:
        check_code(self.plan.code)
        rows = _read(self.source)
        path = self.plan.file(self.name)
        if self.plan.factory == "Flat" and path is None:
            self.rows = rows
            return False
        data = self._training()
        want = {
            "format": 1,
            "factory": self.plan.factory,
            "images": len(rows),
            "dimensions": self.plan.dims,
            "descriptors": hashlib.sha256(rows.data).hexdigest(),
            "first": self.first,
            "of": self.plan.count,
            "trained": "" if data is None else hashlib.sha256(data.data).hexdigest(),
        }
        built = None if path is None else load_index(path, want)
        used = built is not None
        if built is None:
            built = self._build(rows, data)
            if path is not None:
                save_index(built, path, want)
        self.built = built
        return used

    def _training(self) -> NDArray[np.uint8] | None:
        if not self.trained:
            return None
        import ray

        data: NDArray[np.uint8] = ray.get(self.trained[0])
        return data

    def _build(self, rows: NDArray[np.float32], data: NDArray[np.uint8] | None) -> Any:
        """Add the rows to a copy of the trained index, under their numbers in the whole."""
        import faiss

        check_finite(rows, self.first)
        untyped: Any = faiss
        built = self.plan.empty() if data is None else untyped.deserialize_index(data)
        if not hasattr(built, "id_map") and not _keeps_ids(built):
            built = faiss.IndexIDMap(built)
        with building_errors(self.plan.factory, len(rows), self.plan.dims):
            built.add_with_ids(rows, np.arange(self.first, self.last + 1, dtype=np.int64))
        return built


def _keeps_ids(built: Any) -> bool:
    """Return True if an index numbers its descriptors itself, as one with lists does."""
    import faiss

    core = built
    while isinstance(core, faiss.IndexPreTransform):
        core = faiss.downcast_index(core.index)
    return isinstance(core, faiss.IndexIVF)
