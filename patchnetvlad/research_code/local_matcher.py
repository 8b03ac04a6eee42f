# SPDX-License-Identifier: MIT
"""Geometry, fusion and re-ranking under the names of the research code."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.config import Config
from patchnetvlad.engines.engine import PatchReader
from patchnetvlad.engines.rerank import rerank_candidates
from patchnetvlad.errors import ConfigError
from patchnetvlad.features.npy_files import load_patches, patch_file
from patchnetvlad.matching.fusion import fuse_scores
from patchnetvlad.models.grid import (
    PADDING,
    RECEPTIVE_FIELD,
    STRIDE,
    PatchGrid,
    grid_shape,
    patch_grids,
)
from patchnetvlad.research_code.place_dataset import PlaceDataset


def calc_receptive_boxes(height: int, width: int) -> Tensor:
    """Return the receptive field of each cell of a feature map.

    Parameters
    ----------
    height, width : int
        Of the feature map, cells.

    Returns
    -------
    Tensor [height * width, 4] of float32
        (ymin, xmin, ymax, xmax) in px of the image, row-major; parts may lie outside of it.
    """
    rows, columns = np.divmod(np.arange(height * width), width)
    low = STRIDE * np.stack([columns, rows], axis=1) - PADDING
    return torch.from_numpy(np.concatenate([low, low + RECEPTIVE_FIELD - 1], axis=1)).float()


def calc_keypoint_centers_from_patches(
    config: Mapping[str, str], patch_size_h: int, patch_size_w: int, stride_h: int, stride_w: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the centres and grid indices of all patches of one size.

    Parameters
    ----------
    config : mapping
        The section ``[feature_match]``: ``imageresizeH`` and ``imageresizeW``, px.
    patch_size_h, patch_size_w : int
        Cells; may differ.
    stride_h, stride_w : int
        Cells; may differ.

    Returns
    -------
    keypoints : ndarray [2, n] of int64
        x in the first row, y in the second, px.
    indices : ndarray [2, n] of int64
        Column in the first row, row in the second.
    """
    section = Config.global_params(config)
    height = int(section["imageresizeh"]) // STRIDE
    width = int(section["imageresizew"]) // STRIDE
    # An axis of the grid depends on that axis alone: lay a square grid along each.
    rows = grid_shape((height, height), patch_size_h, stride_h)[0]
    columns = grid_shape((width, width), patch_size_w, stride_w)[0]
    down = PatchGrid.of_map((height, height), patch_size_h, stride_h).keypoints[::rows, 1]
    along = PatchGrid.of_map((width, width), patch_size_w, stride_w).keypoints[:columns, 0]
    row, column = np.divmod(np.arange(rows * columns), columns)
    return np.stack([along[column], down[row]]), np.stack([column, row])


def normalise_func(
    input_diff: NDArray[np.floating], num_patches: int, patch_weights: Sequence[float]
) -> NDArray[np.float64]:
    """Fuse the scores [C, num_patches] of one query's candidates to [C]; lower is better."""
    return fuse_scores(np.asarray(input_diff)[:, :num_patches], list(patch_weights)[:num_patches])


def local_matcher(
    predictions: NDArray[np.integer],
    eval_set: PlaceDataset,
    input_query_local_features_prefix: str,
    input_index_local_features_prefix: str,
    config: Mapping[str, Mapping[str, str]],
    device: torch.device | str,
) -> NDArray[np.int64]:
    """Re-rank the candidates of every query by their patches.

    Parameters
    ----------
    predictions : ndarray [Q, k] of int
        Candidates from retrieval: rows of the data set's index images.
    eval_set : PlaceDataset
        With queries.
    input_query_local_features_prefix, input_index_local_features_prefix : str
        Feature directory joined with ``patchfeats``.
    config : ConfigParser
        With ``[global_params]`` and ``[feature_match]``.
    device : torch.device or str

    Returns
    -------
    ndarray [Q, k] of int64
    """
    settings = Config.from_mapping(config)
    grids = patch_grids(
        settings.match_image_size, settings.patch_sizes, settings.strides, settings.geometry
    )

    def reader(prefix: str, names: Sequence[str]) -> PatchReader:
        folder, start = Path(prefix).parent, os.path.basename(prefix)

        def read(i: int) -> list[Tensor]:
            files = [patch_file(folder, start, s, names[i], "stem") for s in settings.patch_sizes]
            return [torch.from_numpy(patches).to(device) for patches in load_patches(files)]

        return read

    if eval_set.queries is None:
        raise ConfigError("local_matcher: the data set has no queries; give query_file_path")
    return rerank_candidates(
        np.asarray(predictions, dtype=np.int64),
        reader(input_query_local_features_prefix, eval_set.queries),
        reader(input_index_local_features_prefix, eval_set.database),
        lambda i: grids,
        lambda i: grids,
        settings,
        device=device,
    ).predictions
