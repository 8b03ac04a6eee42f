# SPDX-License-Identifier: MIT
"""Small pictures, and a configuration for them."""

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


# The same as a file; the rest is said by whoever writes it.
INI = """
[feature_extract]
cachebatchsize = 2
local_features = {local}
imageresizeW = 128
imageresizeH = 96
[feature_match]
matcher = RANSAC
n_values_all = {n_values}
imageresizeW = 128
imageresizeH = 96
patchWeights2Use = {weights}
[global_params]
pooling = patchnetvlad
resumePath = ./pretrained_models/imagenet_WPCA
num_pcs = 128
patch_sizes = 2,3
strides = 1,1
"""


def write_ini(file, local="float16", n_values="1", weights="0.5,0.5"):
    file.write_text(INI.format(local=local, n_values=n_values, weights=weights))
    return file


def picture(seed, size=(128, 96)):
    blocks = np.random.default_rng(seed).integers(0, 255, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


def write_pictures(folder, names):
    """Write a picture of 160 x 120 px for each name, and their list; return the list."""
    for i, name in enumerate(names):
        picture(i, (160, 120)).save(folder / name)
    return write_list(folder / "index.txt", names)


def write_list(file, names):
    file.write_text("".join(f"{name}\n" for name in names))
    return file
