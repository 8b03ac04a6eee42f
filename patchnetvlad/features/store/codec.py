# SPDX-License-Identifier: MIT
"""The encoding of records: descriptors to stored arrays, and bytes back to arrays."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.device import download, upload
from patchnetvlad.base.text import parse_json

Arrays = list[NDArray[Any]]


def round_patches(patches: Sequence[Tensor], kind: str) -> list[Tensor]:
    """Round patch descriptors, on their device, as :func:`encode_patches` stores them."""
    if kind == "int8":
        scales = [p.abs().amax(dim=1).clamp_min(1e-12) / 127 for p in patches]
        values = [
            (p / s[:, None]).round().to(torch.int8) for p, s in zip(patches, scales, strict=True)
        ]
        return [torch.cat(scales), *values]
    dtype = torch.float16 if kind == "float16" else torch.float32
    return [p.to(dtype) for p in patches]


def round_map(feature_map: Tensor) -> Tensor:
    """Round a feature map, on its device, as :func:`encode_map` stores it."""
    return feature_map.to(torch.float16).contiguous()


def encode_patches(patches: Sequence[Tensor], kind: str) -> Arrays:
    """Encode patch descriptors as the arrays of a record.

    Parameters
    ----------
    patches : sequence of Tensor [n_s, P] of float32
        One per patch size, on any device.
    kind : {"float32", "float16", "int8", "npy"}
        int8 keeps one scale per patch: its largest component becomes 127.

    Returns
    -------
    list of ndarray
        One [n_s, P] per patch size; for int8, the scales [sum n_s] of float32 come first.
    """
    return [values.numpy() for values in download(round_patches(patches, kind))]


def decode_patches(arrays: Arrays, kind: str, device: torch.device | str = "cpu") -> list[Tensor]:
    """Decode the arrays of :func:`encode_patches`.

    Parameters
    ----------
    arrays : list of ndarray
        One [n_s, P] per patch size; for int8, after the scales.
    kind : {"float32", "float16", "int8", "npy"}
    device : torch.device or str, default "cpu"

    Returns
    -------
    list of Tensor [n_s, P] of float32
        Descriptors that were rounded to int8 are L2-normalised again.
    """
    tensors = [upload(array, torch.device(device)) for array in arrays]
    if kind != "int8":
        return [tensor.float() for tensor in tensors]
    # A scale for all of a patch's components has no effect on a unit vector.
    return [torch.nn.functional.normalize(tensor.float(), dim=1) for tensor in tensors[1:]]


def encode_map(feature_map: Tensor) -> Arrays:
    """Encode a feature map [D, h, w] as the arrays of a record: one array of float16."""
    return [round_map(feature_map).cpu().numpy()]


def decode_map(arrays: Arrays, device: torch.device | str = "cpu") -> Tensor:
    """Return the feature map [D, h, w] of a record's arrays as float32 on a device."""
    (feature_map,) = arrays
    return upload(feature_map, torch.device(device)).float()


def record_bytes(kind: str, dimension: int, num_patches: Sequence[int], map_numbers: int) -> int:
    """Return how many bytes the features of one image take on disk.

    Parameters
    ----------
    kind : {"float16", "float32", "int8", "map", "npy"}
    dimension : int
        P, of global and of patch descriptors.
    num_patches : sequence of int
        n_s of each size.
    map_numbers : int
        D * h * w of the feature map.

    Returns
    -------
    int
    """
    patches = sum(num_patches)
    local = {
        "float16": 2 * patches * dimension,
        "float32": 4 * patches * dimension,
        "npy": 4 * patches * dimension + 128 * len(num_patches),
        "int8": patches * (dimension + 4),
        "map": 2 * map_numbers,
    }[kind]
    # The row of globalfeats.npy, and in a store its copy in the record.
    return local + 4 * dimension * (1 if kind == "npy" else 2)


def split_record(buffer: bytearray, layout: str) -> Arrays:
    """Return the arrays of a record as views of its bytes; ``layout`` is :attr:`Record.arrays`."""
    arrays, start = [], 0
    for dtype, shape in parse_json(layout):
        array = np.frombuffer(buffer, dtype, math.prod(shape), start)
        arrays.append(array.reshape(shape))
        start += array.nbytes
    return arrays
