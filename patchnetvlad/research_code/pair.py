# SPDX-License-Identifier: MIT
"""Matching two images under the names of the research code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import nn

from patchnetvlad.base.files import make_folder
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.errors import ConfigError
from patchnetvlad.matching.pair import match_pair, similarity
from patchnetvlad.models.describer import describe
from patchnetvlad.models.grid import patch_grids
from patchnetvlad.plots.drawing import COLOURS, new_figure, save_figure
from patchnetvlad.plots.match import plot_match

PLOT_FILE = "patchMatchings.png"
WIDTH = 16.0  # of plot_two, cm
Keypoints = Sequence[NDArray[np.integer]]


def match_two(
    model: nn.Module,
    device: torch.device,
    config: Mapping[str, Mapping[str, str]],
    im_one: NDArray[np.uint8],
    im_two: NDArray[np.uint8],
    plot_save_path: str | Path | None,
) -> float:
    """Match two images by their patches, print their similarity, and draw the matches.

    Parameters
    ----------
    model : nn.Module
        With patches: ``pooling = patchnetvlad``.
    device : torch.device
        Where the network is.
    config : ConfigParser
        With all sections.
    im_one, im_two : ndarray [H, W, 3] of uint8
        Query and index image, BGR as OpenCV reads them.
    plot_save_path : str or Path or None
        Folder that gets ``patchMatchings.png``; None: nothing is drawn.

    Returns
    -------
    float
        The similarity, from 0; larger is better.

    Raises
    ------
    ConfigError
        The model has no patches.
    OutputError
        The drawing cannot be written.
    """
    settings = Config.from_mapping(config)
    settings.check_matching()
    model.to(device).eval()
    query, index = (_side(image, model, device, settings) for image in (im_one, im_two))
    found = match_pair(
        query.patches, index.patches, query.grids, index.grids, settings.matcher, settings.ransac
    )
    score = similarity(found, settings.patch_weights)
    print(
        f"Similarity score between the two images is: {score:.5f}. Larger scores indicate better "
        "matches."
    )
    if plot_save_path is not None:
        for side in (query, index):
            side.patches = [patches.cpu() for patches in side.patches]
        drawn = SimpleNamespace(query=query, candidate=index, matches=found, score=score)
        figure = plot_match(drawn, max_lines=None, names=("", ""))
        save_figure(figure, make_folder(plot_save_path) / PLOT_FILE)
    return score


def plot_two(
    cv_im_one: NDArray[np.uint8],
    cv_im_two: NDArray[np.uint8],
    inlier_keypoints_one: Keypoints,
    inlier_keypoints_two: Keypoints,
    plot_save_path: str | Path,
) -> None:
    """Draw matched key points of two images as lines between them.

    Parameters
    ----------
    cv_im_one, cv_im_two : ndarray [H, W, 3] of uint8
        BGR.
    inlier_keypoints_one, inlier_keypoints_two : sequence of ndarray [m, 2]
        (x, y) in px, one pair of arrays per patch size.
    plot_save_path : str or Path
        Folder that gets ``patchMatchings.png``.

    Raises
    ------
    OutputError
        The drawing cannot be written.
    """
    images = [_rgb(image) for image in (cv_im_one, cv_im_two)]
    offset = images[0].shape[1]
    height, width = max(image.shape[0] for image in images), offset + images[1].shape[1]
    figure = new_figure(WIDTH, WIDTH * height / width)
    axes = figure.add_subplot()
    axes.axis("off")
    for image, left in zip(images, (0, offset), strict=True):
        axes.imshow(image, extent=(left, left + image.shape[1], image.shape[0], 0))
    both = zip(inlier_keypoints_one, inlier_keypoints_two, strict=True)
    for number, (one, two) in enumerate(both):
        ends = np.stack([np.asarray(one), np.asarray(two) + np.array([offset, 0])])  # [2, m, 2]
        axes.plot(
            ends[..., 0], ends[..., 1], color=COLOURS[number % len(COLOURS)], linewidth=0.5,
            marker="o", markersize=1.5,
        )  # fmt: skip
    axes.set(xlim=(0, width), ylim=(height, 0))
    save_figure(figure, make_folder(plot_save_path) / PLOT_FILE)


def apply_patch_weights(
    input_scores: Sequence[float], num_patches: int, patch_weights: Sequence[float]
) -> float:
    """Return the weighted sum of the first ``num_patches`` scores; lower is better."""
    return float(np.dot(input_scores[:num_patches], patch_weights[:num_patches]))


def _side(
    image: NDArray[np.uint8], model: nn.Module, device: torch.device, settings: Config
) -> SimpleNamespace:
    """Describe an image; return what is drawn of it, with its patches on the device."""
    picture = Image.fromarray(_rgb(image))
    tensor = input_transform(settings.image_size)(picture).to(device)
    [described] = describe(model, tensor[None])
    if not described.patches:
        raise ConfigError("match_two: the model has no patches; needed is pooling = patchnetvlad")
    height, width = tensor.shape[1:]
    return SimpleNamespace(
        image=np.asarray(picture.resize((width, height))),
        aspect=picture.width / picture.height,
        grids=patch_grids(
            (height, width), settings.patch_sizes, settings.strides, settings.geometry
        ),
        patches=described.patches,
    )


def _rgb(image: NDArray[np.uint8]) -> NDArray[np.uint8]:
    return np.ascontiguousarray(image[..., ::-1])
