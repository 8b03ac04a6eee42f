# SPDX-License-Identifier: MIT
"""The training data set, with the interface of the research code."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset

from patchnetvlad.datasets.images import load_image
from patchnetvlad.errors import ArgumentError
from patchnetvlad.own_data.msls import CITIES, read_areas
from patchnetvlad.training.mining import Triplet, draw_queries, mine
from patchnetvlad.training.tuples import Rows, TupleSet

Item = tuple[Tensor, Tensor, Tensor, list[int]]

default_cities = {mode: list(cities) for mode, cities in CITIES.items()}


class ImagesFromList(Dataset[Any]):
    """Images as tensors.

    Parameters
    ----------
    images : sequence of str
        Paths.
    transform : callable
        From a PIL image to a tensor.
    """

    def __init__(self, images: Sequence[Any], transform: Callable[[Any], Tensor]) -> None:
        self.images = np.asarray([str(path) for path in images])
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, idx: int) -> tuple[Tensor, int]:
        """Return (tensor [3, H, W], idx)."""
        return self.transform(load_image(self.images[idx])), idx


class MSLS(Dataset[Item]):
    """Mapillary Street-level Sequences, image by image.

    Parameters
    ----------
    root_dir : str
        Folder that holds ``train_val``.
    cities : str, default ""
        Names, separated by commas; by default those of ``mode`` that are there.
    nNeg : int, default 5
        Negatives per triplet.
    transform : callable, optional
        From a PIL image to a tensor.
    mode : {"train", "val"}, default "train"
    task : {"im2im"}
    subtask : str, default "all"
    seq_length : int
        1.
    posDistThr, negDistThr : float, default 10, 25
        In m.
    cached_queries, cached_negatives : int, default 1000
        Queries of a subset, and index images that are looked through for negatives.
    positive_sampling : bool, default True
        Draw queries at night and sideways more often.
    bs : int, default 24
        Images that are described at a time.
    threads : int, default 8
        Not used.
    margin : float, default 0.1
        Kept for :func:`train_epoch`.
    exclude_panos : bool, default True

    Attributes
    ----------
    qImages, dbImages : ndarray of str
        Paths; only queries that have a positive.
    qIdx : ndarray of int
        Rows of ``qImages``.
    pIdx, nonNegIdx : ndarray of object
        Rows of ``dbImages`` within ``posDistThr``, ``negDistThr`` of each query; the latter in
        training alone.
    all_pos_indices : list of ndarray
        As ``pIdx``, but counted within each city.
    qEndPosList, dbEndPosList : list of int
        Queries and index images of each city.
    night, sideways : ndarray of int
        Rows of queries.
    weights : ndarray of float64
        By which queries are drawn.
    triplets : list
        ``([query, positive, negatives ...], [-1, 1, 0 ...])``; made by :meth:`update_subcache`.
    nCacheSubset : int
        Subsets of an epoch; made by :meth:`new_epoch`.

    Raises
    ------
    ArgumentError
        Sequences are asked for.
    GroundTruthError
        The files are not there, or damaged, or no query has a positive.
    """

    def __init__(
        self,
        root_dir: str,
        cities: str = "",
        nNeg: int = 5,
        transform: Callable[[Any], Tensor] | None = None,
        mode: str = "train",
        task: str = "im2im",
        subtask: str = "all",
        seq_length: int = 1,
        posDistThr: float = 10,
        negDistThr: float = 25,
        cached_queries: int = 1000,
        cached_negatives: int = 1000,
        positive_sampling: bool = True,
        bs: int = 24,
        threads: int = 8,
        margin: float = 0.1,
        exclude_panos: bool = True,
    ) -> None:
        if task != "im2im" or seq_length != 1 or mode not in CITIES:
            raise ArgumentError(
                f"MSLS(mode={mode!r}, task={task!r}, seq_length={seq_length}): supported are "
                f"{' and '.join(CITIES)}, im2im and 1"
            )
        named = cities.split(",") if cities else ()
        areas = read_areas(root_dir, mode, named, subtask=subtask, panoramas=not exclude_panos)
        data = TupleSet.of_areas(areas, posDistThr, max(negDistThr, posDistThr))
        if not positive_sampling:
            data = TupleSet(data.queries, data.index, data.positives, data.close,
                            np.ones(len(data.queries)), data.left_out)  # fmt: skip
        self.data = data
        self.cities = [area.name for area in areas]
        self.nNeg, self.margin, self.transform = nNeg, margin, transform
        self.posDistThr, self.negDistThr = posDistThr, negDistThr
        self.cached_queries, self.cached_negatives = cached_queries, cached_negatives
        self.exclude_panos, self.mode, self.subtask = exclude_panos, mode, subtask
        self.threads, self.bs = threads, bs
        self.qImages, self.dbImages = (
            np.array([str(path) for path in paths]) for paths in (data.queries, data.index)
        )
        self.qIdx = np.arange(len(data.queries))
        self.pIdx = _objects(data.positives)
        self.nonNegIdx = _objects(data.close if mode == "train" else [])
        near = [[rows for rows in area.within(posDistThr) if len(rows)] for area in areas]
        self.all_pos_indices = [rows for of_city in near for rows in of_city]
        self.qEndPosList = [len(of_city) for of_city in near]
        self.dbEndPosList = [len(area.index) for area in areas]
        kept = [np.array([len(rows) > 0 for rows in area.within(posDistThr)]) for area in areas]
        self.night, self.sideways = (
            np.flatnonzero(np.concatenate([flags[k] for flags, k in zip(both, kept, strict=True)]))
            for both in zip(*((area.night, area.sideways) for area in areas), strict=True)
        )
        self.weights = data.weights
        self.triplets: list[tuple[list[int], list[int]]] = []
        self.nCacheSubset, self.current_subset = 0, 0
        self.subcache_indices: list[NDArray[np.int64]] = []

    def __len__(self) -> int:
        return len(self.triplets)

    def new_epoch(self) -> None:
        """Draw the queries of an epoch; ``np.random.seed`` makes this reproducible."""
        random = _generator()
        self.subcache_indices = draw_queries(self.data, self.cached_queries, random)
        self.nCacheSubset, self.current_subset = len(self.subcache_indices), 0

    def update_subcache(self, net: nn.Module | None = None, outputdim: int | None = None) -> None:
        """Make the triplets of the next subset of queries.

        Parameters
        ----------
        net : nn.Module, optional
            With the children ``encoder`` and ``pool``; the negatives are those it takes for near.
            By default positives and negatives are drawn at random.
        outputdim : int, optional
            Not used.
        """
        queries = self.subcache_indices[self.current_subset]
        self.current_subset += 1
        random = _generator()
        if net is None:
            found = [self._draw(int(query), random) for query in queries]
        else:
            found = mine(
                self.data,
                queries,
                lambda paths: self._describe(net, paths),
                random,
                cached_negatives=self.cached_negatives,
                num_negatives=self.nNeg,
            )
        self.triplets = [
            ([t.query, t.positive, *t.negatives], [-1, 1, *[0] * len(t.negatives)]) for t in found
        ]

    def _draw(self, query: int, random: np.random.Generator) -> Triplet:
        far = np.setdiff1d(np.arange(len(self.dbImages)), self.data.close[query])
        negatives = random.permutation(far)[: self.nNeg]
        positive = int(random.choice(self.data.positives[query]))
        return Triplet(query, positive, tuple(int(row) for row in negatives))

    @torch.no_grad()
    def _describe(
        self, net: nn.Module, paths: Sequence[Any]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        device = next(net.parameters()).device
        encoder, pool = net.get_submodule("encoder"), net.get_submodule("pool")
        vectors = []
        for first in range(0, len(paths), self.bs):
            images = [self._load(path) for path in paths[first : first + self.bs]]
            vectors.append(pool(encoder(torch.stack(images).to(device))).cpu().numpy())
        return np.concatenate(vectors), np.ones(len(paths), dtype=bool)

    def _load(self, path: Any) -> Tensor:
        if self.transform is None:
            raise ArgumentError("MSLS reads images by its transform; give one")
        return self.transform(load_image(path))

    def __getitem__(self, idx: int) -> Item:
        """Return a triplet: query and positive [3, H, W], negatives [n, 3, H, W], their rows."""
        rows, _ = self.triplets[idx]
        query, positive, *negatives = rows
        images = [self._load(self.dbImages[row]) for row in (positive, *negatives)]
        return self._load(self.qImages[query]), images[0], torch.stack(images[1:]), list(rows)

    @staticmethod
    def collate_fn(
        batch: Sequence[Item | None],
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, list[int]]:
        """Collate triplets into a batch.

        Returns
        -------
        query, positive : Tensor [B, 3, H, W]
        negatives : Tensor [n, 3, H, W]
        negCounts : Tensor [B] of int64
        indices : list of int
            Rows of all.
        """
        items = [item for item in batch if item is not None]
        queries, positives, negatives, rows = zip(*items, strict=True)
        counts = torch.tensor([len(images) for images in negatives])
        flat = [row for of_item in rows for row in of_item]
        return torch.stack(queries), torch.stack(positives), torch.cat(negatives), counts, flat


def _generator() -> np.random.Generator:
    """Return a generator that depends on ``np.random.seed``, which programs call."""
    return np.random.default_rng(np.random.randint(2**31))  # noqa: NPY002


def _objects(rows: Rows) -> NDArray[Any]:
    found = np.empty(len(rows), dtype=object)
    found[:] = rows
    return found
