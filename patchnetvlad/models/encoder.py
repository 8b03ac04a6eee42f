# SPDX-License-Identifier: MIT
"""The encoder: VGG16 up to conv5_3, without its last ReLU and pooling layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.errors import ArgumentError
from patchnetvlad.models.int8 import Int8Encoder, Ranges
from patchnetvlad.models.winograd import WinogradEncoder, can_encode

_STRIP_CELLS = 640 * 120  # of maps before the first pooling

# Output channels of each convolution; "pool" halves the resolution.
_VGG16_LAYERS: tuple[int | str, ...] = (
    64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512,
)  # fmt: skip


def build_encoder() -> nn.Sequential:
    """Build VGG16 up to conv5_3, without trained weights.

    Returns
    -------
    nn.Sequential
        29 layers; maps [N, 3, H, W] to [N, 512, H // 16, W // 16]. The last layer is a
        convolution: the descriptors that are pooled are not rectified.
    """
    layers: list[nn.Module] = []
    channels = 3
    for entry in _VGG16_LAYERS:
        if isinstance(entry, str):
            layers.append(nn.MaxPool2d(kernel_size=2, stride=2))
        else:
            layers += [nn.Conv2d(channels, entry, kernel_size=3, padding=1), nn.ReLU(inplace=True)]
            channels = entry
    return nn.Sequential(*layers[:-1])  # without the ReLU of conv5_3


def for_inference(
    encoder: nn.Module, precision: str = "exact", ranges: Ranges | None = None
) -> Callable[[Tensor], Tensor]:
    """Return a function that encodes images faster.

    On a CUDA device, channels are innermost, as its matrix units need them, and ``half`` computes
    convolutions in float16 with sums in float32.

    On a CPU, oneDNN lays maps out in blocks. PyTorch converts them for every convolution, and
    back after it; here, maps stay in blocks from the first layer to the last. For images of
    640 x 480 px the outcome is the same to the last bit; for others, where oneDNN may choose
    another algorithm, up to rounding.

    With ``fast``, it convolves by Winograd's algorithm instead, see
    :class:`~patchnetvlad.models.winograd.WinogradEncoder`; with ``int8``, in 8-bit integers, see
    :class:`~patchnetvlad.models.int8.Int8Encoder`.

    Parameters
    ----------
    encoder : nn.Module
        As :func:`build_encoder` builds it; other encoders are returned as they are.
    precision : {"exact", "fast", "half", "int8"}, default "exact"
    ranges : Ranges, optional
        Of the encoder's values; ``int8`` needs them.

    Returns
    -------
    callable
        Maps [N, 3, H, W] to [N, D, h, w] of float32. It holds copies of the weights.

    Raises
    ------
    ArgumentError
        ``int8`` without ranges, or for an encoder with other layers than VGG16's.
    """
    if precision == "int8":
        if ranges is None:
            raise ArgumentError("precision = int8 needs the ranges of the encoder's values")
        return Int8Encoder(encoder, ranges)
    weights = next(encoder.parameters(), None)
    if (
        weights is None
        or weights.dtype != torch.float32
        or not isinstance(encoder, nn.Sequential)
        or not all(isinstance(x, (nn.Conv2d, nn.ReLU, nn.MaxPool2d)) for x in encoder)
    ):
        return encoder
    if weights.device.type == "cuda" and precision != "exact":
        return _channels_last(encoder, torch.float16 if precision == "half" else torch.float32)
    if weights.device.type != "cpu":
        return encoder
    if precision == "fast" and can_encode(encoder):
        return WinogradEncoder(encoder)
    if not torch.backends.mkldnn.is_available():
        return encoder
    layers = _functions(encoder, Tensor.to_mkldnn)

    # Up to the first pooling maps are large: there, a strip of the image is worked on at a time.
    pools = [n for n, layer in enumerate(encoder, 1) if isinstance(layer, nn.MaxPool2d)]
    start = pools[0] if pools and can_encode(encoder) else 0
    reach = 2 * -(-sum(isinstance(x, nn.Conv2d) for x in encoder[:start]) // 2)

    def apply(layers: Sequence[Callable[[Tensor], Tensor]], x: Tensor) -> Tensor:
        x = x.to_mkldnn()
        for layer in layers:
            x = layer(x)
        return x.to_dense()

    def encode(images: Tensor) -> Tensor:
        rows = max(2, _STRIP_CELLS // (images.shape[0] * images.shape[3]) // 2 * 2)
        if start == 0 or images.shape[2] <= rows + reach:
            return apply(layers, images)
        strips = []
        for first in range(0, images.shape[2] // 2 * 2, rows):
            before = min(reach, first)  # rows that reach into the next layers' sums
            strip = apply(layers[:start], images[:, :, first - before : first + rows + reach])
            strips.append(strip[:, :, before // 2 :][:, :, : rows // 2])
        return apply(layers[start:], torch.cat(strips, dim=2))

    return encode


def _channels_last(encoder: nn.Sequential, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    def convert(values: Tensor) -> Tensor:
        channels = torch.channels_last if values.dim() == 4 else torch.preserve_format
        return values.to(dtype=dtype, memory_format=channels)

    layers = _functions(encoder, convert)

    def encode(images: Tensor) -> Tensor:
        x = convert(images)
        for layer in layers:
            x = layer(x)
        return x.to(torch.float32, memory_format=torch.contiguous_format)

    return encode


def _functions(
    encoder: nn.Sequential, convert: Callable[[Tensor], Tensor]
) -> list[Callable[[Tensor], Tensor]]:
    """Return the layers as functions, with converted weights."""
    layers: list[Callable[[Tensor], Tensor]] = []
    for layer in encoder:
        if isinstance(layer, nn.Conv2d):
            layers.append(_convolution(layer, convert))
        else:
            layers.append(torch.relu_ if isinstance(layer, nn.ReLU) else layer)
    return layers


def _convolution(
    layer: nn.Conv2d, convert: Callable[[Tensor], Tensor]
) -> Callable[[Tensor], Tensor]:
    weight = convert(layer.weight.detach())
    bias = convert(layer.bias.detach()) if layer.bias is not None else None
    stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
    return lambda x: F.conv2d(x, weight, bias, stride, padding, dilation, groups)
