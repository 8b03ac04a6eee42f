# SPDX-License-Identifier: MIT
"""Small pictures, and a configuration for them: what tests of models and of indexes share."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
from PIL import Image

from patchnetvlad import Config

SMALL = replace(
    Config.load("demo"),
    image_size=(96, 128),
    match_image_size=(96, 128),
    patch_sizes=(2, 3),
    strides=(1, 1),
    patch_weights=(0.5, 0.5),
)


def picture(seed, size=(128, 96)):
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)
