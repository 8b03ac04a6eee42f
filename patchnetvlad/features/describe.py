# SPDX-License-Identifier: MIT
"""Description of images: encoder, pooling and whitening, within a bounded memory."""

from __future__ import annotations

import contextlib
import gc
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from patchnetvlad.errors import DeviceError
from patchnetvlad.geometry import grid_shape
from patchnetvlad.models.backbone import ENCODER_DIM, for_inference
from patchnetvlad.models.model import get_pca_encoding
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD

logger = logging.getLogger(__name__)

T = TypeVar("T")
MIB = 2**20

_ENCODER_FLOATS_A_PIXEL = 192  # of VGG16: input and output of conv1_2, and room to work
_CACHE_BYTES = 32 * MIB  # larger blocks are not faster on a CPU


@dataclass(frozen=True, eq=False)
class Descriptors:
    """What the network says about one image.

    Attributes
    ----------
    descriptor : Tensor [P]
        Global descriptor, L2-normalised.
    patches : list of Tensor [n_s, P]
        Patch descriptors, L2-normalised, one matrix a patch size, patches row-major.
    """

    descriptor: Tensor
    patches: list[Tensor]


class Describer:
    """Describes images with a model, in chunks that fit a budget of memory.

    Where a device runs out of memory all the same, the chunks are halved, and the work goes on.

    Parameters
    ----------
    model : nn.Module
        With the children ``encoder``, ``pool`` and, optionally, ``WPCA``. With ``fast``
        precision its encoder is converted.
    precision : {"exact", "fast"}, default "exact"
        exact: float32. fast: encoder and whitening of patches in half precision (on CUDA with
        sums in float32); pooling and global whitening in float32 as before.
    memory_mb : int, default 1024
        Budget beside the model, MiB.

    Attributes
    ----------
    device : torch.device
        The model's.
    """

    def __init__(self, model: nn.Module, *, precision: str = "exact", memory_mb: int = 1024):
        self.model = model
        encoder: Any = model.encoder
        pool: Any = model.pool
        self._encoder, self._pool = encoder, pool
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._dtype = torch.float32 if precision == "exact" else torch.float16
        self._exact = precision == "exact"
        self._encoder.to(self._dtype)
        self._encode = for_inference(self._encoder)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        if hasattr(model, "WPCA"):
            wpca: Any = model.WPCA
            wpca = wpca.module if isinstance(wpca, nn.DataParallel) else wpca
            self._weight = wpca[0].weight.detach().flatten(1).to(self._dtype)  # [P, K * D]
            self._bias = wpca[0].bias.detach()
        self._encoder_bytes = memory_mb * MIB // 2
        self._block_bytes = memory_mb * MIB // 4
        if self.device.type == "cpu":
            self._block_bytes = min(self._block_bytes, _CACHE_BYTES)

    @property
    def dimension(self) -> int:
        """P: length of the descriptors, of images and of patches."""
        if self._bias is not None:
            return len(self._bias)
        clusters = self._pool.num_clusters if isinstance(self._pool, NetVLAD) else 1
        return clusters * self.map_channels

    @property
    def map_channels(self) -> int:
        """D: channels of the feature map."""
        return self._pool.dim if isinstance(self._pool, NetVLAD) else ENCODER_DIM

    def patch_counts(self, map_shape: tuple[int, int]) -> list[int]:
        """Count the patches of each size on a map of (h, w) cells."""
        if not isinstance(self._pool, PatchNetVLAD):
            return []
        grids = [
            grid_shape(map_shape, size, stride)
            for size, stride in zip(self._pool.patch_sizes, self._pool.strides, strict=True)
        ]
        return [rows * columns for rows, columns in grids]

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Compute feature maps.

        On a CPU images are encoded one at a time, which costs no time there, and makes the
        outcome independent of how images are batched.

        Parameters
        ----------
        images : Tensor [N, 3, H, W] of float32
            Normalised.

        Returns
        -------
        Tensor [N, D, h, w] of float32
            On the model's device.

        Raises
        ------
        DeviceError
            Not even one image fits into the device's memory.
        """
        need = images[0].numel() // 3 * _ENCODER_FLOATS_A_PIXEL * self._dtype.itemsize
        step = 1 if self.device.type == "cpu" else max(1, self._encoder_bytes // need)
        maps: list[Tensor] = []
        start = 0
        with self._arithmetic():
            while start < len(images):
                part = images[start : start + step]
                try:
                    batch = part.to(self.device, self._dtype, non_blocking=True)
                    maps.append(self._encode(batch).float())
                except RuntimeError as error:
                    step = min(step, len(part)) // 2
                    if not _out_of_memory(error) or step == 0:
                        raise self._too_large(error) from None
                    self._encoder_bytes = step * need
                    self._recover(f"{step} images at a time")
                    continue
                start += len(part)
        return torch.cat(maps)

    @torch.inference_mode()
    def describe(self, images: Tensor) -> list[Descriptors]:
        """Describe images [N, 3, H, W]; see :func:`describe`."""
        return self.describe_maps(self.encode(images))

    @torch.inference_mode()
    def describe_maps(self, maps: Tensor) -> list[Descriptors]:
        """Describe feature maps [N, D, h, w] of :meth:`encode`."""
        descriptors = self.global_descriptors(maps)
        return [Descriptors(d, self.patches(m)) for d, m in zip(descriptors, maps, strict=True)]

    @torch.inference_mode()
    def global_descriptors(self, maps: Tensor) -> Tensor:
        """Compute the global descriptors [N, P] of feature maps [N, D, h, w]."""

        def pool(part: Tensor) -> Tensor:
            pooled = self._pool
            if not isinstance(pooled, NetVLAD):
                vlad = pooled(part)
            else:
                x, assignment = pooled.assign(part)
                vlad = pooled.vlad(x.flatten(2), assignment.flatten(2))
            return get_pca_encoding(self.model, vlad) if self._weight is not None else vlad

        with self._arithmetic():
            # One at a time: a product of another shape would round otherwise.
            return torch.cat([pool(part[None]) for part in maps])

    @torch.inference_mode()
    def patches(self, feature_map: Tensor) -> list[Tensor]:
        """Compute the patch descriptors of one feature map.

        Parameters
        ----------
        feature_map : Tensor [D, h, w] of float32

        Returns
        -------
        list of Tensor [n_s, P] of float32
            One a patch size; empty for a model without patches.

        Raises
        ------
        ConfigError
            A patch size is larger than the map.
        DeviceError
            The device's memory does not do.
        """
        pool = self._pool
        if not isinstance(pool, PatchNetVLAD):
            return []
        with self._arithmetic():
            x, assignment = pool.assign(feature_map[None])
            while True:
                try:
                    return pool.whitened(
                        x[0],
                        assignment[0],
                        self._weight,
                        self._bias,
                        block_bytes=self._block_bytes,
                    )
                except RuntimeError as error:
                    if not _out_of_memory(error) or self._block_bytes < MIB:
                        raise self._too_large(error) from None
                    self._block_bytes //= 2
                    self._recover(f"blocks of {self._block_bytes / MIB:.0f} MiB")

    @contextlib.contextmanager
    def _arithmetic(self) -> Iterator[None]:
        """Keep TensorFloat-32 out of exact arithmetic; convolutions use it by default."""
        before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
        torch.backends.cudnn.allow_tf32 = not self._exact
        torch.backends.cuda.matmul.allow_tf32 = False
        try:
            yield
        finally:
            torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before

    def _recover(self, how: str) -> None:
        logger.info("%s is out of memory; going on with %s", self.device, how)
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _too_large(self, error: RuntimeError) -> Exception:
        if not _out_of_memory(error):
            return error
        return DeviceError(
            f"the memory of {self.device} does not do for one image; use smaller images "
            "(imageresizeh, imageresizew), or --device cpu"
        )


def _out_of_memory(error: RuntimeError) -> bool:
    # The CPU's allocator and MPS raise plain RuntimeErrors.
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or any(t in str(error) for t in texts)


def describe(model: nn.Module, images: Tensor) -> list[Descriptors]:
    """Describe a batch of images.

    Parameters
    ----------
    model : nn.Module
        With the children ``encoder``, ``pool`` and, optionally, ``WPCA``.
    images : Tensor [N, 3, H, W] of float32
        Normalised.

    Returns
    -------
    list of Descriptors, length N
        On the model's device. P is K * D where the model has no PCA layer.
    """
    return Describer(model).describe(images)
