# SPDX-License-Identifier: MIT
"""The encoders that a configuration can name, and the geometry of their feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

Layer = tuple[int, int, int]
"""Side of the kernel, stride and padding of a convolution or pooling, px of its input."""


@dataclass(frozen=True)
class Geometry:
    """Where the cells of a feature map lie on the image, from the layers of the encoder.

    Parameters
    ----------
    channels : int
        D of the feature map.
    layers : tuple of (int, int, int)
        Kernel, stride and padding of every layer that looks at more than one cell of its input,
        or leaves some out; on the longest way through the network.

    Examples
    --------
    >>> vgg16 = ENCODERS["vgg16"]
    >>> vgg16.cell, vgg16.receptive_field, vgg16.padding, vgg16.centre
    (16, 196, 90, 7.5)
    >>> [ENCODERS[name].map_shape((480, 640)) for name in ("vgg16", "dinov2_vits14")]
    [(30, 40), (34, 45)]
    """

    channels: int
    layers: tuple[Layer, ...]

    @cached_property
    def cell(self) -> int:
        """Distance between cells, px of the resized image."""
        return self._derived[0]

    @cached_property
    def receptive_field(self) -> int:
        """Side of the square of px that a cell sees; attention, which sees all, apart."""
        return self._derived[1]

    @cached_property
    def padding(self) -> int:
        """Px by which the first receptive field reaches over the edge of the image."""
        return self._derived[2]

    @property
    def centre(self) -> float:
        """Middle of the first receptive field along each axis, px; that of a pixel is whole."""
        return (self.receptive_field - 1) / 2 - self.padding

    @cached_property
    def _derived(self) -> tuple[int, int, int]:
        cell, field, padding = 1, 1, 0
        for kernel, stride, border in self.layers:
            field += (kernel - 1) * cell
            padding += border * cell
            cell *= stride
        return cell, field, padding

    def map_shape(self, image_size: Sequence[int]) -> tuple[int, int]:
        """Return (h, w) of the feature map of an image of (height, width) px."""
        height, width = image_size
        for kernel, stride, border in self.layers:
            height, width = ((side + 2 * border - kernel) // stride + 1 for side in (height, width))
        return height, width


def _resnet(channels: int, *blocks: Sequence[Layer]) -> Geometry:
    """Return the geometry of a residual network: of blocks, the first of which halves the map."""
    stem = ((7, 2, 3), (3, 2, 1))
    return Geometry(channels, (*stem, *(layer for block in blocks for layer in block)))


_SAME, _HALF = (3, 1, 1), (3, 2, 1)  # of a residual network
_POOL = (2, 2, 0)
_PATCHES = ((14, 14, 0),)  # of DINOv2

ENCODERS: dict[str, Geometry] = {
    "vgg16": Geometry(
        512,
        (
            *(_SAME, _SAME, _POOL),
            *(_SAME, _SAME, _POOL),
            *(_SAME, _SAME, _SAME, _POOL),
            *(_SAME, _SAME, _SAME, _POOL),
            *(_SAME, _SAME, _SAME),
        ),
    ),
    "resnet18": _resnet(256, [_SAME] * 4, [_HALF, *[_SAME] * 3], [_HALF, *[_SAME] * 3]),
    "resnet50": _resnet(1024, [_SAME] * 3, [_HALF, *[_SAME] * 3], [_HALF, *[_SAME] * 5]),
    "dinov2_vits14": Geometry(384, _PATCHES),
    "dinov2_vitb14": Geometry(768, _PATCHES),
}
"""The geometry of each encoder, by the name in a configuration (``encoder``)."""

DEFAULT = "vgg16"
"""The encoder of the paper, and of configurations and checkpoints that name none."""
