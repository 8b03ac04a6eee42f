# SPDX-License-Identifier: MIT
"""Checkpoints, image lists, ground truth and example images: found on disk or downloaded."""

from patchnetvlad.assets.checkpoints import download_checkpoint, resolve_checkpoint
from patchnetvlad.assets.data_files import (
    demo_images,
    example_image,
    fetch_data,
    resolve_ground_truth,
    resolve_image_list,
)
from patchnetvlad.assets.folders import data_dirs, data_home, find_asset

__all__ = [
    "data_dirs",
    "data_home",
    "demo_images",
    "download_checkpoint",
    "example_image",
    "fetch_data",
    "find_asset",
    "resolve_checkpoint",
    "resolve_ground_truth",
    "resolve_image_list",
]
