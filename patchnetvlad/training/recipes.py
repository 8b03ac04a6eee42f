# SPDX-License-Identifier: MIT
"""Recipes: what the batches of an epoch are, and the loss of each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from patchnetvlad.config_train import TrainConfig
from patchnetvlad.errors import ImageError
from patchnetvlad.training.losses import multi_similarity_loss, triplet_loss
from patchnetvlad.training.mining import DescribeAll, Triplet, draw_queries, mine
from patchnetvlad.training.places import PlaceSet
from patchnetvlad.training.tuples import TupleSet


class Batch(Protocol):
    """The images of a step."""

    @property
    def paths(self) -> tuple[Path | str, ...]:
        """M images."""

    @property
    def count(self) -> int:
        """How many of what the progress bar counts."""

    def without(self, broken: Mapping[int, ImageError]) -> Batch:
        """Return the batch without the images in these rows, or raise their error."""

    def loss(self, vectors: Tensor) -> Tensor:
        """Compute the loss of the global descriptors [M, d] of its images."""


@dataclass(frozen=True, eq=False)
class Round:
    """Batches that are known at the same time.

    Attributes
    ----------
    number : int
        In the epoch, from 0.
    batches : sequence of Batch
    draws : list of tuple of int
        For each batch, a number for each image, which chooses its view.
    state : dict
        Numbers and text by which the recipe makes it again.
    """

    number: int
    batches: Sequence[Batch]
    draws: list[tuple[int, ...]]
    state: dict[str, Any] = field(default_factory=dict)


class Recipe(Protocol):
    """Makes the batches of training.

    Attributes
    ----------
    unit : str
        What the progress bar counts.
    """

    unit: str

    @property
    def images(self) -> Sequence[Path | str]:
        """All images that may be in a batch."""

    @property
    def index(self) -> Sequence[Path | str]:
        """Those that the vocabulary is made of."""

    def steps(self) -> int:
        """Estimate the steps of an epoch."""

    def total(self) -> int:
        """Estimate how many of its units an epoch has."""

    def rounds(
        self, epoch: int, describe: DescribeAll, start: Mapping[str, Any] | None = None
    ) -> Iterator[Round]:
        """Yield the rounds of an epoch, each when the ones before are done.

        Parameters
        ----------
        epoch : int
            From 0.
        describe : DescribeAll
        start : mapping, optional
            The ``state`` of a round, with its ``number``, from which an interrupted epoch goes on.

        Yields
        ------
        Round
        """


@dataclass(frozen=True, eq=False)
class TripletBatch:
    """Queries, positives, then the negatives of each triplet.

    Attributes
    ----------
    triplets : sequence of Triplet
        B of them.
    margin : float
    paths : tuple of Path or str
        2 B + n images.
    """

    triplets: Sequence[Triplet]
    margin: float
    paths: tuple[Path | str, ...] = ()

    @property
    def count(self) -> int:
        """B."""
        return len(self.triplets)

    def without(self, broken: Mapping[int, ImageError]) -> TripletBatch:
        """Raise the first error: all images could be read when triplets were looked for."""
        for error in broken.values():
            raise error
        return self

    def loss(self, vectors: Tensor) -> Tensor:
        """Compute the loss of the descriptors [2 B + n, d]."""
        counts = torch.tensor([len(t.negatives) for t in self.triplets], device=vectors.device)
        sizes = [self.count, self.count, int(counts.sum())]
        queries, positives, negatives = vectors.split(sizes)
        return triplet_loss(queries, positives, negatives, counts, self.margin)


class TripletRecipe:
    """Triplets with hard negatives, as in the research code.

    Parameters
    ----------
    data : TupleSet
    config : TrainConfig
    """

    unit = "query"

    def __init__(self, data: TupleSet, config: TrainConfig) -> None:
        self._data, self._config = data, config
        self.images = tuple(dict.fromkeys([*data.queries, *data.index]))
        self.index = data.index

    def steps(self) -> int:
        """Count the batches that all queries make."""
        return -(-len(self._data.queries) // self._config.batch_size)

    def total(self) -> int:
        """Count the queries."""
        return len(self._data.queries)

    def rounds(
        self, epoch: int, describe: DescribeAll, start: Mapping[str, Any] | None = None
    ) -> Iterator[Round]:
        """Yield a round for each search for hard negatives; see :class:`Recipe`."""
        config, data = self._config, self._data
        random = np.random.default_rng([config.seed, epoch])
        subsets = draw_queries(data, config.cached_queries, random)
        first = 0
        if start is not None:
            random.bit_generator.state = start["random"]
            found = [Triplet(q, p, tuple(negatives)) for q, p, negatives in start["triplets"]]
            yield self._round(epoch, start["number"], found, start)
            first = start["number"] + 1
        for number in range(first, len(subsets)):
            triplets = mine(
                data,
                subsets[number],
                describe,
                random,
                cached_negatives=config.cached_negatives,
                num_negatives=config.num_negatives,
            )
            chosen = [triplets[i] for i in random.permutation(len(triplets))]
            state = {
                "random": random.bit_generator.state,
                "triplets": [[t.query, t.positive, list(t.negatives)] for t in chosen],
            }
            yield self._round(epoch, number, chosen, state)

    def _round(
        self, epoch: int, number: int, triplets: Sequence[Triplet], state: Mapping[str, Any]
    ) -> Round:
        size = self._config.batch_size
        batches = [
            TripletBatch(batch, self._config.margin, self._paths(batch))
            for batch in (triplets[i : i + size] for i in range(0, len(triplets), size))
        ]
        return Round(
            number, batches, _draws(batches, self._config.seed, epoch, number), dict(state)
        )

    def _paths(self, batch: Sequence[Triplet]) -> tuple[Path | str, ...]:
        data = self._data
        return (
            *(data.queries[triplet.query] for triplet in batch),
            *(data.index[triplet.positive] for triplet in batch),
            *(data.index[row] for triplet in batch for row in triplet.negatives),
        )


@dataclass(frozen=True, eq=False)
class PlaceBatch:
    """Several images of several places.

    Attributes
    ----------
    paths : tuple of Path or str
        M images.
    labels : tuple of int
        Numbers of their places.
    """

    paths: tuple[Path | str, ...]
    labels: tuple[int, ...]

    @property
    def count(self) -> int:
        """M."""
        return len(self.paths)

    def without(self, broken: Mapping[int, ImageError]) -> PlaceBatch:
        """Return the batch without these rows."""
        kept = [row for row in range(len(self.paths)) if row not in broken]
        return PlaceBatch(
            tuple(self.paths[row] for row in kept), tuple(self.labels[row] for row in kept)
        )

    def loss(self, vectors: Tensor) -> Tensor:
        """Compute the loss of the descriptors [M, d]."""
        return multi_similarity_loss(vectors, torch.tensor(self.labels, device=vectors.device))


class PlaceRecipe:
    """Batches of places, and multi-similarity loss.

    Parameters
    ----------
    data : PlaceSet
    config : TrainConfig
    """

    unit = "image"

    def __init__(self, data: PlaceSet, config: TrainConfig) -> None:
        self._data, self._config = data, config
        self.images = self.index = data.images
        self._steps, self._total = self._estimate()

    def _estimate(self) -> tuple[int, int]:
        batches = self._draw(0)
        return len(batches), sum(batch.count for batch in batches)

    def _draw(self, epoch: int) -> list[PlaceBatch]:
        random = np.random.default_rng([self._config.seed, epoch])
        drawn = self._data.draw(random, self._config.places, self._config.images_a_place)
        return [
            PlaceBatch(
                tuple(self._data.images[row] for rows in batch for row in rows),
                tuple(label for label, rows in enumerate(batch) for _ in rows),
            )
            for batch in drawn
        ]

    def steps(self) -> int:
        """Count the batches of the first epoch."""
        return self._steps

    def total(self) -> int:
        """Count the images of the first epoch."""
        return self._total

    def rounds(
        self, epoch: int, describe: DescribeAll, start: Mapping[str, Any] | None = None
    ) -> Iterator[Round]:
        """Yield one round, which follows from the number of the epoch; see :class:`Recipe`."""
        batches = self._draw(epoch)
        yield Round(0, batches, _draws(batches, self._config.seed, epoch, 0))


def _draws(batches: Sequence[Batch], seed: int, epoch: int, number: int) -> list[tuple[int, ...]]:
    """Draw a number for each image of each batch."""
    random = np.random.default_rng([seed, epoch, number, 1])  # apart from what draws the batches
    return [tuple(random.integers(2**31, size=len(batch.paths)).tolist()) for batch in batches]
