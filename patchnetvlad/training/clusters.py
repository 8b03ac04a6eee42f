# SPDX-License-Identifier: MIT
"""Vocabularies: clusters of cells of feature maps."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from patchnetvlad.base.files import new_file
from patchnetvlad.config import Config
from patchnetvlad.errors import ArgumentError, CheckpointError
from patchnetvlad.training.describe import describe_images
from patchnetvlad.training.maps import Inputs

logger = logging.getLogger(__name__)

NUM_IMAGES = 500
CELLS_AN_IMAGE = 100
_ITERATIONS = 100


@dataclass(frozen=True, eq=False)
class Clusters:
    """A vocabulary, and what it was made from.

    Attributes
    ----------
    centroids : ndarray [K, D] of float32
    descriptors : ndarray [M, D] of float32
        L2-normalised cells of feature maps that were clustered.
    """

    centroids: NDArray[np.float32]
    descriptors: NDArray[np.float32]

    def save(self, path: Path) -> Path:
        """Write an HDF5 file with ``centroids`` and ``descriptors``; return its path.

        Raises
        ------
        ArgumentError
            h5py is not installed.
        """
        h5py = check_h5py()
        with new_file(path) as temporary, h5py.File(temporary, "w") as file:
            file.create_dataset("centroids", data=self.centroids)
            file.create_dataset("descriptors", data=self.descriptors)
        return path

    @classmethod
    def load(cls, path: Path) -> Clusters:
        """Read a file written by :meth:`save` or by the research code.

        Raises
        ------
        CheckpointError
            The file is missing or damaged, or has no such arrays.
        ArgumentError
            h5py is not installed.
        """
        h5py = check_h5py()
        try:
            with h5py.File(path, "r") as file:
                arrays = [np.asarray(file[key], np.float32) for key in ("centroids", "descriptors")]
        except FileNotFoundError:
            raise CheckpointError(f"the file of clusters {path} does not exist") from None
        except (OSError, KeyError, ValueError, TypeError) as error:
            raise CheckpointError(
                f"{path} is damaged, or has no centroids and descriptors: {error}"
            ) from None
        if any(x.ndim != 2 or not np.isfinite(x).all() for x in arrays) or (
            arrays[0].shape[1] != arrays[1].shape[1]
        ):
            shapes = " and ".join(str(list(x.shape)) for x in arrays)
            raise CheckpointError(
                f"{path}: centroids and descriptors must be finite, [K, D] and [M, D], not {shapes}"
            )
        return cls(*arrays)


class _SomeCells(nn.Module):
    """Chooses cells of feature maps at random: [N, D, h, w] to [N, count * D]."""

    def __init__(self, count: int, seed: int) -> None:
        super().__init__()
        self.count = count
        self.random = torch.Generator().manual_seed(seed)

    def forward(self, maps: Tensor) -> Tensor:
        cells = F.normalize(maps, dim=1).flatten(2)  # [N, D, h * w]
        chosen = [x[:, self._choose(x.shape[1])].T.flatten() for x in cells]
        return torch.stack(chosen)

    def _choose(self, most: int) -> Tensor:
        if most < self.count:  # a small map gives some cells twice
            return torch.randint(most, (self.count,), generator=self.random)
        return torch.randperm(most, generator=self.random)[: self.count]


def sample_cells(
    encoder: nn.Module,
    paths: Sequence[Path | str],
    config: Config,
    *,
    inputs: Inputs | None = None,
    num_images: int = NUM_IMAGES,
    cells_an_image: int = CELLS_AN_IMAGE,
    seed: int = 0,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Sample L2-normalised cells of the feature maps of some images.

    Parameters
    ----------
    encoder : nn.Module
        Maps [N, 3, H, W] to [N, D, h, w].
    paths : sequence of Path or str
        Images, of which ``num_images`` are chosen at random.
    config : Config
        See :func:`~patchnetvlad.training.describe.describe_images`.
    inputs : Inputs, optional
        What the encoder takes; by default the images.
    num_images : int, default 500
    cells_an_image : int, default 100
    seed : int, default 0
        Of both choices.
    progress : bool, default True

    Returns
    -------
    ndarray [M, D] of float32
        M is at most ``num_images * cells_an_image``.

    Raises
    ------
    ImageError
        No image could be read.
    """
    chosen = np.random.default_rng(seed).permutation(len(paths))[:num_images]
    model = nn.Module()
    model.add_module("encoder", encoder)
    model.add_module("pool", _SomeCells(cells_an_image, seed))
    title = "cells" if progress else ""
    sample = [paths[i] for i in np.sort(chosen)]
    found = describe_images(model, sample, config, inputs=inputs, title=title)
    vectors: NDArray[np.float32] = found.vectors[found.readable]
    return vectors.reshape(len(vectors) * cells_an_image, -1)


def cluster(descriptors: NDArray[np.float32], num_clusters: int, seed: int = 0) -> Clusters:
    """Cluster descriptors by k-means.

    Parameters
    ----------
    descriptors : ndarray [M, D] of float32
    num_clusters : int
        K.
    seed : int, default 0
        Of the descriptors that k-means starts from.

    Returns
    -------
    Clusters

    Raises
    ------
    ArgumentError
        There are fewer than two clusters, or more than descriptors.
    """
    if not 2 <= num_clusters <= len(descriptors):
        raise ArgumentError(
            f"num_clusters = {num_clusters} of {len(descriptors)} descriptors; give 2 to "
            f"{len(descriptors)}, or more images"
        )
    import faiss

    k_means = faiss.Kmeans(
        descriptors.shape[1],
        num_clusters,
        niter=_ITERATIONS,
        seed=seed,
        min_points_per_centroid=1,
        max_points_per_centroid=len(descriptors),  # all
    )
    k_means.train(np.ascontiguousarray(descriptors, np.float32))
    return Clusters(np.asarray(k_means.centroids, np.float32), descriptors)


def check_h5py() -> Any:
    """Return the library h5py; ArgumentError if it is not installed."""
    try:
        import h5py
    except ImportError:
        raise ArgumentError(
            "files of clusters need h5py: pip install 'patchnetvlad[train]'"
        ) from None
    return h5py
