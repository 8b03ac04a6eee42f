# SPDX-License-Identifier: MIT
"""Products of 8-bit integers, for CPUs that multiply these several times as quickly as floats.

The encoder's maps are unsigned integers of 8 bits, with one scale per map, which depends on the
values that occur: on images, once, for each checkpoint (:class:`Ranges`). Its weights, and both
factors of the whitening, are signed ones, with a scale per row. Sums are exact, of 32 bits.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.assets.catalog import CHECKPOINT_SUFFIXES, SHIPPED_CHECKPOINT
from patchnetvlad.base.text import one_line, parse_json
from patchnetvlad.errors import ArgumentError, AssetError, CheckpointError

LEVELS, MOST = 255, 127  # largest values of unsigned and of signed numbers
_LEAST_SCALE = 1e-30  # of a row of zeros
_BLOCK_FLOATS = 2**20  # of temporaries, which stay in the cache

Group = tuple[nn.Conv2d, bool, bool]  # a convolution; is it rectified, is it pooled


@dataclass(frozen=True)
class Ranges:
    """Which values the maps of an encoder take.

    Attributes
    ----------
    encoder : str
        SHA-256 of its weights, see :func:`encoder_sha256`.
    inputs : tuple of (float, float)
        Least and largest value that enters each convolution, the first of which the image enters.
    images : int
        On how many images they were measured.
    """

    encoder: str
    inputs: tuple[tuple[float, float], ...]
    images: int

    def to_json(self) -> str:
        """Return the text of a file that :func:`read_ranges` reads."""
        content = {"encoder": self.encoder, "images": self.images, "inputs": self.inputs}
        return json.dumps(content, indent=1) + "\n"


def ranges_file(checkpoint: str | Path) -> Path:
    """Return the path of the ranges of a checkpoint: beside it, ``NAME.int8.json``."""
    path = Path(checkpoint)
    suffix = next((s for s in CHECKPOINT_SUFFIXES if path.name.endswith(s)), "")
    return path.with_name(f"{path.name.removesuffix(suffix)}.int8.json")


def read_ranges(path: str | Path) -> Ranges:
    """Read a file of ranges; CheckpointError, which names it, if it is damaged."""
    try:
        content = parse_json(Path(path).read_text(encoding="utf-8"))
        inputs = tuple((float(low), float(high)) for low, high in content["inputs"])
        ranges = Ranges(str(content["encoder"]), inputs, int(content["images"]))
        if not all(-1e20 < low <= 0 <= high < 1e20 and high - low > 1e-20 for low, high in inputs):
            raise ValueError("inputs are no ranges around 0")
    except (OSError, ValueError, TypeError, KeyError, OverflowError) as error:
        raise CheckpointError(
            f"{path} is damaged ({one_line(error)}); make it again: patchnetvlad calibrate"
        ) from None
    return ranges


def find_ranges(checkpoint: str | Path, encoder: nn.Module, source: str = "FILE") -> Ranges:
    """Return the ranges of a checkpoint: those beside it, or the package's if they are of it.

    Parameters
    ----------
    checkpoint : str or Path
    encoder : nn.Module
        With its weights.
    source : str
        File of the configuration, for messages.

    Returns
    -------
    Ranges

    Raises
    ------
    AssetError
        There are none.
    CheckpointError
        The file beside the checkpoint is damaged, or belongs to other weights.
    """
    named = source if Path(source).is_file() else "FILE"
    way_out = f"patchnetvlad calibrate --config_path {named} --images FOLDER"
    beside = ranges_file(checkpoint)
    file = beside if beside.is_file() else ranges_file(SHIPPED_CHECKPOINT)
    ranges = read_ranges(file) if file.is_file() else None
    if ranges is None or ranges.encoder != encoder_sha256(encoder):
        if file == beside and ranges is not None:
            raise CheckpointError(
                f"{file} belongs to other weights than {checkpoint}; make it again: {way_out}"
            )
        raise AssetError(
            f"precision = int8 needs {beside}, the ranges of the values in the network, which is "
            f"missing; make it from images such as yours: {way_out}"
        )
    if len(ranges.inputs) != (count := len(_groups(encoder))):
        raise CheckpointError(
            f"{file} is damaged ({len(ranges.inputs)} ranges for {count} convolutions); make it "
            f"again: {way_out}"
        )
    return ranges


def encoder_sha256(encoder: nn.Module) -> str:
    """Return the SHA-256 of an encoder's weights, as float32 and in their order."""
    sha256 = hashlib.sha256()
    for name, value in encoder.state_dict().items():
        sha256.update(f"{name}{list(value.shape)}".encode())
        sha256.update(value.detach().float().cpu().contiguous().numpy())
    return sha256.hexdigest()


def measure_ranges(
    encoder: nn.Module, images: Iterable[Tensor], bounds: tuple[float, float]
) -> Ranges:
    """Measure which values enter the convolutions of an encoder.

    Parameters
    ----------
    encoder : nn.Module
        VGG16, as :func:`~patchnetvlad.models.encoder.build_encoder` builds it.
    images : iterable of Tensor [3, H, W]
        Normalised; at least one.
    bounds : (float, float)
        Least and largest value that a normalised image can have.

    Returns
    -------
    Ranges

    Raises
    ------
    ArgumentError
        The encoder has other layers than VGG16's.
    """
    groups = _groups(encoder)
    lows, highs = [0.0] * len(groups), [0.0] * len(groups)
    lows[0], highs[0] = min(bounds[0], 0.0), max(bounds[1], 0.0)
    device = groups[0][0].weight.device
    count = 0
    with torch.inference_mode():
        for image in images:
            count += 1
            x = image[None].to(device)
            for n, (convolution, rectify, pool) in enumerate(groups[:-1], 1):
                x = convolution(x)
                x = x.relu_() if rectify else x
                lows[n] = min(lows[n], float(x.min()))
                highs[n] = max(highs[n], float(x.max()))
                x = F.max_pool2d(x, 2) if pool else x
    # A map of zeros, on all images, needs a range, too.
    found = zip(lows, highs, strict=True)
    inputs = tuple((low, high if high > low else 1.0) for low, high in found)
    return Ranges(encoder_sha256(encoder), inputs, count)


def _groups(encoder: nn.Module) -> list[Group]:
    """Split an encoder into convolutions and what follows them."""
    groups: list[Group] = []
    for layer in encoder if isinstance(encoder, nn.Sequential) else [encoder]:
        if (
            isinstance(layer, nn.Conv2d)
            and layer.padding_mode == "zeros"
            and not isinstance(layer.padding, str)
        ):
            groups.append((layer, False, False))
        elif isinstance(layer, nn.ReLU) and groups and not groups[-1][1]:
            groups[-1] = (groups[-1][0], True, groups[-1][2])
        elif (
            isinstance(layer, nn.MaxPool2d)
            and groups
            and not groups[-1][2]
            and (layer.kernel_size, layer.stride, layer.padding, layer.dilation) == (2, 2, 0, 1)
            and not layer.ceil_mode
        ):
            groups[-1] = (*groups[-1][:2], True)
        else:
            raise ArgumentError(
                f"precision = int8 is for VGG16; this encoder has a layer {one_line(layer, 80)}"
            )
    return groups


class Int8Encoder:
    """Encodes images by products of 8-bit integers, on a CPU.

    Weights are rounded to 8 bits with a scale for each output channel, maps with one for each map.
    The last map is not rounded.

    Parameters
    ----------
    encoder : nn.Sequential
        VGG16, with its weights, as float32 on the CPU.
    ranges : Ranges
        Of these weights. Larger values than these are cut off.

    Raises
    ------
    ArgumentError
        The encoder has other layers, or the ranges belong to another one.
    """

    def __init__(self, encoder: nn.Module, ranges: Ranges) -> None:
        groups = _groups(encoder)
        if len(ranges.inputs) != len(groups):
            raise ArgumentError(
                f"ranges of {len(ranges.inputs)} convolutions do not fit {len(groups)}"
            )
        scales = [(high - low) / LEVELS for low, high in ranges.inputs]
        zeros = [round(-low / s) for (low, _), s in zip(ranges.inputs, scales, strict=True)]
        self._scale, self._zero = scales[0], zeros[0]
        outputs = [*zip(scales[1:], zeros[1:], strict=True), None]
        self._layers = [
            _layer(group, (scale, zero), output)
            for group, scale, zero, output in zip(groups, scales, zeros, outputs, strict=True)
        ]

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> Tensor:
        """Encode images [N, 3, H, W] of float32 to [N, D, h, w] of float32."""
        levels = images.contiguous(memory_format=torch.channels_last) / self._scale
        x = levels.add_(self._zero).round_().clamp_(0, LEVELS).to(torch.uint8)
        for layer in self._layers:
            x = layer(x)
        return x.contiguous()


def _layer(
    group: Group, source: tuple[float, int], output: tuple[float, int] | None
) -> Callable[[Tensor], Tensor]:
    """Return a convolution of uint8 [N, C, H, W] to uint8, or to float32 where it is the last.

    ``source`` and ``output`` are the scale and the zero of its maps.
    """
    convolution, rectify, pool = group
    weight = convolution.weight.detach()
    rounded, scales = quantise_rows(weight.flatten(1))
    dtype = torch.float32 if output is None else torch.uint8
    scale, zero = output or (1.0, 0)
    bias = convolution.bias.detach().clone() if convolution.bias is not None else None
    where = (
        *map(list, (convolution.stride, convolution.padding, convolution.dilation)),
        convolution.groups,
    )
    packed = torch.ops.onednn.qconv_prepack(
        rounded.view(weight.shape), scales, *source, *where, None
    )
    no_zeros = torch.zeros(len(scales), dtype=torch.int32, device=scales.device)
    then = "relu" if rectify else "none"

    def convolve(x: Tensor) -> Tensor:
        x = torch.ops.onednn.qconv2d_pointwise(
            x, *source, packed, scales, no_zeros, bias, *where, scale, zero, dtype, then, [], ""
        )
        if pool:  # PyTorch's own pooling does not take integers
            height, width = x.shape[2] // 2 * 2, x.shape[3] // 2 * 2
            x = torch.maximum(x[:, :, 0:height:2, :width], x[:, :, 1:height:2, :width])
            x = torch.maximum(x[..., 0::2], x[..., 1::2])
        return x

    return convolve


def quantise_rows(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Round the rows of a matrix to 8 bits.

    Parameters
    ----------
    matrix : Tensor [n, d] of float32

    Returns
    -------
    rounded : Tensor [n, d] of int8
        From -127 to 127; the largest of each row, but for its sign, is 127.
    scales : Tensor [n] of float32
        By which the rows are to be multiplied.
    """
    lows, highs = torch.aminmax(matrix, dim=1)
    scales = torch.maximum(-lows, highs).div_(MOST).clamp_min_(_LEAST_SCALE)
    rounded = torch.empty_like(matrix, dtype=torch.int8)
    rows = max(1, _BLOCK_FLOATS // matrix.shape[1])
    for part, scale, target in zip(
        matrix.split(rows), scales.split(rows), rounded.split(rows), strict=True
    ):
        target.copy_((part / scale[:, None]).round_())
    return rounded, scales


def add_int8_product(total: Tensor, vectors: Tensor, weight: Tensor) -> None:
    """Add the product of vectors, rounded to 8 bits, and a matrix of 8-bit integers.

    Parameters
    ----------
    total : Tensor [n, P] of float32
    vectors : Tensor [n, d] of float32
    weight : Tensor [d, P] of int8
        From :func:`quantise_rows` of [P, d], whose scales are the caller's to multiply with.
    """
    rounded, scales = quantise_rows(vectors)
    sums = torch._int_mm(rounded, weight)  # [n, P] of int32, exact
    rows = max(1, _BLOCK_FLOATS // weight.shape[1])
    for target, part, scale in zip(
        total.split(rows), sums.split(rows), scales.split(rows), strict=True
    ):
        target.addcmul_(part.to(total.dtype), scale[:, None])


def whiten_int8(vectors: Tensor, weight: Tensor, scales: Tensor, bias: Tensor | None) -> Tensor:
    """Whiten descriptors as :func:`~patchnetvlad.models.model.get_pca_encoding` does, in int8.

    Parameters
    ----------
    vectors : Tensor [n, d] of float32
    weight : Tensor [P, d] of int8
    scales : Tensor [P] of float32
        Those of the rows of ``weight``.
    bias : Tensor [P] of float32, optional

    Returns
    -------
    Tensor [n, P] of float32
        L2-normalised.
    """
    whitened = vectors.new_zeros(len(vectors), len(weight))
    add_int8_product(whitened, vectors, weight.T)
    whitened *= scales
    return F.normalize(whitened if bias is None else whitened + bias, dim=-1)
