# SPDX-License-Identifier: MIT
"""Convolutions of 3 x 3 by Winograd's algorithm, for CPUs (Lavin and Gray, CVPR 2016).

F(4 x 4, 3 x 3): a tile of 6 x 6 cells gives 4 x 4 sums by 36 multiplications per pair of channels,
instead of 144. The transforms are small matrices, so that all work is products of matrices.
In float32, the errors of VGG16's map are about eight times those of direct sums.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from patchnetvlad.base.device import run_parallel

TILE = 4  # cells along a side of an output tile; an input tile is larger by two
MIN_CHANNELS = 16  # of the input; with fewer, the transforms cost more than they save

_INPUT = [
    [4, 0, -5, 0, 1, 0], [0, -4, -4, 1, 1, 0], [0, 4, -4, -1, 1, 0],
    [0, -2, -1, 2, 1, 0], [0, 2, -1, -2, 1, 0], [0, 4, 0, -5, 0, 1],
]  # fmt: skip
_KERNEL: list[list[float]] = [
    [1 / 4, 0, 0], [-1 / 6, -1 / 6, -1 / 6], [-1 / 6, 1 / 6, -1 / 6],
    [1 / 24, 1 / 12, 1 / 6], [1 / 24, -1 / 12, 1 / 6], [0, 0, 1],
]  # fmt: skip
_OUTPUT = [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]

_BLOCK_BYTES = 8 * 2**20  # of transformed tiles; each thread has two such blocks

Group = tuple[nn.Conv2d, bool, bool]  # a convolution; is it rectified, is it pooled


def can_encode(encoder: nn.Module) -> bool:
    """Return True if :class:`WinogradEncoder` supports these layers, as those of VGG16."""
    return isinstance(encoder, nn.Sequential) and bool(_groups(encoder))


def _groups(encoder: nn.Sequential) -> list[Group]:
    """Split an encoder into convolutions and what follows them; [] for any other encoder."""
    groups: list[Group] = []
    for layer in encoder:
        if isinstance(layer, nn.Conv2d) and (
            layer.kernel_size == (3, 3)
            and layer.stride == layer.padding == layer.dilation == (1, 1)
            and layer.groups == 1
            and layer.padding_mode == "zeros"
        ):
            groups.append((layer, False, False))
        elif isinstance(layer, nn.ReLU) and groups and groups[-1][1:] == (False, False):
            groups[-1] = (groups[-1][0], True, False)
        elif (
            isinstance(layer, nn.MaxPool2d)
            and groups
            and not groups[-1][2]
            and (
                (layer.kernel_size, layer.stride, layer.padding) == (2, 2, 0)
                and layer.dilation == 1
                and not layer.ceil_mode
            )
        ):
            groups[-1] = (*groups[-1][:2], True)
        else:
            return []
    return groups


class _Map:
    """A feature map [h, w, C] with a border of zeros, and room for whole tiles.

    Maps of one ``name`` that a thread makes lie in the same memory: only the latest is good.
    """

    def __init__(self, name: str, height: int, width: int, channels: int) -> None:
        self.height, self.width, self.channels = height, width, channels
        self.rows, self.columns = -(-height // TILE), -(-width // TILE)
        # Halved tiles of a map twice as large may reach one cell further.
        shape = TILE * self.rows + 3, TILE * self.columns + 3, channels
        self.padded = _memory(name, shape)

    def clear_border(self) -> None:
        """Zero all but the cells."""
        self.padded[0] = 0
        self.padded[self.height + 1 :] = 0
        self.padded[:, 0] = 0
        self.padded[:, self.width + 1 :] = 0

    @property
    def cells(self) -> Tensor:
        """The map itself."""
        return self.padded[1 : self.height + 1, 1 : self.width + 1]

    def input_tiles(self, first: int, count: int) -> Tensor:
        """Look at rows of tiles as [6, 6, count, columns, C]; neighbours share two cells."""
        return self._tiles(TILE + 2, TILE, self.padded[TILE * first :], count, self.columns)

    def output_tiles(self, first: int, count: int, columns: int, side: int) -> Tensor:
        """Look at rows of tiles as [side, side, count, columns, C], without the border."""
        return self._tiles(side, side, self.padded[side * first + 1 :, 1:], count, columns)

    def _tiles(self, side: int, step: int, start: Tensor, count: int, columns: int) -> Tensor:
        down, right, _ = self.padded.stride()
        return start.as_strided(
            (side, side, count, columns, self.channels),
            (down, right, step * down, step * right, 1),
            start.storage_offset(),
        )


class WinogradEncoder:
    """Encodes images with the layers of an encoder of 3 x 3 convolutions, on a CPU.

    Parameters
    ----------
    encoder : nn.Sequential
        For which :func:`can_encode` is true.
    """

    def __init__(self, encoder: nn.Sequential) -> None:
        groups = _groups(encoder)
        self._layers = [_Layer(f"map {n % 2}", *group) for n, group in enumerate(groups)]

    def __call__(self, images: Tensor) -> Tensor:
        """Encode images [N, C, H, W] of float32 to [N, D, h, w]."""
        return torch.stack([self._encode(image) for image in images])

    @torch.inference_mode()
    def _encode(self, image: Tensor) -> Tensor:
        channels, height, width = image.shape
        x = _Map("image", height, width, channels)
        x.clear_border()
        x.cells.copy_(image.permute(1, 2, 0))
        for layer in self._layers:
            x = layer(x)
        return x.cells.permute(2, 0, 1).contiguous()


class _Layer:
    """A convolution, rectified or not, pooled or not; ``name`` is that of its output."""

    def __init__(self, name: str, convolution: nn.Conv2d, rectify: bool, pool: bool) -> None:
        self.name, self.rectify, self.pool = name, rectify, pool
        self.num_in, self.num_out = convolution.in_channels, convolution.out_channels
        bias, weight = convolution.bias, convolution.weight.detach()
        self.bias = bias.detach() if bias is not None else torch.zeros(self.num_out)
        self.direct = self.num_in < MIN_CHANNELS
        if self.direct:
            self.weight = weight.contiguous(memory_format=torch.channels_last)
            return
        transform = _both_axes(_KERNEL, torch.float64)  # [36, 9]
        self.weight = weight.new_empty(len(transform), self.num_in, self.num_out)
        for kernels, target in zip(weight.split(32), self.weight.split(32, 2), strict=True):
            transformed = transform @ kernels.double().flatten(2).permute(2, 1, 0).flatten(1)
            target.copy_(transformed.view(target.shape))
        self.of_input = _both_axes(_INPUT)  # [36, 36]
        self.of_output = _both_axes(_OUTPUT)  # [16, 36]

    def __call__(self, x: _Map) -> _Map:
        scale = 2 if self.pool else 1
        out = _Map(self.name, x.height // scale, x.width // scale, self.num_out)
        row_bytes = 4 * 36 * x.columns * max(self.num_in, self.num_out)
        shared = -(-x.rows // torch.get_num_threads())
        step = max(1, min(_BLOCK_BYTES // max(1, row_bytes), shared))

        def block(i: int) -> None:
            first = i * step
            count = min(step, x.rows - first)
            with torch.inference_mode():  # which holds for one thread alone
                sums = self._sums(x, first, count)
                if self.pool:
                    sums = torch.maximum(sums[0::2], sums[1::2])
                    sums = torch.maximum(sums[:, 0::2], sums[:, 1::2])
                sums += self.bias
                target = out.output_tiles(first, count, x.columns, TILE // scale)
                if self.rectify:
                    torch.clamp_min(sums, 0, out=target)
                else:
                    target.copy_(sums)

        run_parallel(block, -(-x.rows // step))
        out.clear_border()
        return out

    def _sums(self, x: _Map, first: int, count: int) -> Tensor:
        """Convolve some rows of tiles to [4, 4, count, columns, O]."""
        if self.direct:
            rows = x.padded[TILE * first :][: TILE * count + 2, : TILE * x.columns + 2]
            found = F.conv2d(rows.permute(2, 0, 1)[None], self.weight)[0].permute(1, 2, 0)
            tiles = found.unflatten(1, (-1, TILE)).unflatten(0, (-1, TILE))
            return tiles.permute(1, 3, 0, 2, 4)
        points, tiles = len(self.weight), count * x.columns
        source = x.input_tiles(first, count)
        cells = _memory("tiles 0", source.shape).copy_(source).view(points, -1)
        cells = torch.mm(self.of_input, cells, out=_memory("tiles 1", cells.shape))
        products = _memory("tiles 0", (points, tiles, self.num_out))
        torch.bmm(cells.view(points, tiles, self.num_in), self.weight, out=products)
        sums = _memory("tiles 1", (TILE**2, tiles * self.num_out))
        torch.mm(self.of_output, products.flatten(1), out=sums)
        return sums.view(TILE, TILE, count, x.columns, self.num_out)


_thread = threading.local()


def _memory(name: str, shape: Sequence[int]) -> Tensor:
    """Give the memory that a thread keeps under a name, which is made larger where need be.

    What is allocated and freed again for every layer leaves more holes than it takes.
    """
    size = math.prod(shape)
    kept: Tensor | None = getattr(_thread, name, None)
    if kept is None or len(kept) < size:
        kept = torch.empty(size)
        setattr(_thread, name, kept)
    return kept[:size].view(shape)


def _both_axes(transform: Sequence[Sequence[float]], dtype: torch.dtype = torch.float32) -> Tensor:
    matrix = torch.tensor(transform, dtype=dtype)
    return torch.kron(matrix, matrix)
