# SPDX-License-Identifier: MIT
"""From image tensors to descriptors: encoder, pooling and whitening in bounded memory."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.device import (
    arithmetic,
    choose_precision,
    empty_cache,
    memory_budget,
    out_of_memory,
)
from patchnetvlad.config import Config
from patchnetvlad.errors import DeviceError
from patchnetvlad.models.checkpoint import load_network
from patchnetvlad.models.encoder import for_inference
from patchnetvlad.models.grid import ENCODER_DIM
from patchnetvlad.models.int8 import Ranges, find_ranges, quantise_rows, whiten_int8
from patchnetvlad.models.model import get_pca_encoding, pca_layer
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD

logger = logging.getLogger(__name__)

T = TypeVar("T")
MIB = 2**20

_ENCODER_FLOATS_A_PIXEL = 192  # of VGG16: input and output of conv1_2, and room to work
_CACHE_BYTES = 32 * MIB  # larger blocks are not faster on a CPU


@dataclass(frozen=True, eq=False)
class Descriptors:
    """The features of one image.

    Attributes
    ----------
    descriptor : Tensor [P]
        Global descriptor, L2-normalised.
    patches : list of Tensor [n_s, P]
        Patch descriptors, L2-normalised, one matrix per patch size, patches row-major.
    """

    descriptor: Tensor
    patches: list[Tensor]


class Describer:
    """Extract features with a model, in chunks that fit a memory budget.

    If a device still runs out of memory, the chunks are halved and the work continues. Threads
    that compute patches take turns, except on a CPU.

    Parameters
    ----------
    model : nn.Module
        With the children ``encoder``, ``pool`` and, optionally, ``WPCA``.
    precision : {"exact", "fast", "half", "int8"}, default "exact"
        fast: products in TensorFloat-32 on a CUDA device; convolutions by Winograd's algorithm on
        a CPU. half: products of float16 on a CUDA device. int8: products of 8-bit integers on a
        CPU.
    memory_mb : int, default 0
        Budget in addition to the model, MiB; see :func:`~patchnetvlad.base.device.memory_budget`.
        One image and its patch descriptors are always held.
    map_channels : int, default 512
        D of the encoder, where the pooling does not say.
    ranges : Ranges, optional
        Of the values in the encoder, for int8.

    Attributes
    ----------
    device : torch.device
        The model's.
    map_channels : int
        D, the number of channels of the feature map.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        precision: str = "exact",
        memory_mb: int = 0,
        map_channels: int = ENCODER_DIM,
        ranges: Ranges | None = None,
    ):
        self.device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self.precision = precision
        self._model = model
        self._pool: Any = model.pool
        self.map_channels = self._pool.dim if isinstance(self._pool, NetVLAD) else map_channels
        encoder: Any = model.encoder
        self._encode = for_inference(encoder, precision, ranges)
        self._weight: Tensor | None = None
        self._bias: Tensor | None = None
        self._scales: Tensor | None = None  # of the rows of a weight of int8
        if hasattr(model, "WPCA"):
            layer = pca_layer(model)
            assert layer.bias is not None
            self._weight = layer.weight.detach().flatten(1)  # [P, K * D]
            self._bias = layer.bias.detach()
            if precision == "half":
                # A power of two keeps all in range, and vanishes when lengths are normalised.
                scale = 2.0 ** -self._weight.abs().max().log2().ceil()
                self._weight, self._bias = (self._weight * scale).half(), self._bias * scale
            if precision == "int8":
                self._weight, self._scales = quantise_rows(self._weight)
        budget = memory_budget(memory_mb, self.device)
        self._encoder_bytes = budget // 2
        self._block_bytes = budget // 4
        self._one_at_a_time = threading.Lock()  # on a GPU, whose memory a block fills
        if self.device.type == "cpu":
            self._block_bytes = min(self._block_bytes, _CACHE_BYTES)

    @classmethod
    def load(cls, config: Config, device: torch.device) -> Describer:
        """Load the model of a configuration to a device.

        The errors are those of :func:`~patchnetvlad.models.checkpoint.load_network`.
        """
        precision = choose_precision(config.precision, device)
        model = load_network(config, device)
        encoder: Any = model.encoder
        ranges = None
        if precision == "int8":
            path = resolve_checkpoint(config.resume_path, config.num_pcs)
            ranges = find_ranges(path, encoder, config.source)
        describer = cls(
            model,
            precision=precision,
            memory_mb=config.memory_mb,
            map_channels=config.geometry.channels,
            ranges=ranges,
        )
        if describer._encode is not encoder:
            model.encoder = nn.Identity()  # the function holds copies of the weights
        if describer._scales is not None:
            model.WPCA = nn.Identity()  # copied likewise
        return describer

    @property
    def dimension(self) -> int:
        """P, the dimension of global and patch descriptors."""
        if self._bias is not None:
            return len(self._bias)
        clusters = self._pool.num_clusters if isinstance(self._pool, NetVLAD) else 1
        return clusters * self.map_channels

    @torch.inference_mode()
    def encode(self, images: Tensor) -> Tensor:
        """Compute feature maps.

        On a CPU images are encoded one at a time, which costs no time there, and makes the
        outcome independent of how images are batched.

        Parameters
        ----------
        images : Tensor [N, 3, H, W] of float32
            Normalised; N >= 1.

        Returns
        -------
        Tensor [N, D, h, w] of float32
            On the model's device.

        Raises
        ------
        DeviceError
            Not even one image fits into the device's memory.
        """
        need = images[0].numel() // 3 * 4 * _ENCODER_FLOATS_A_PIXEL
        step = 1 if self.device.type == "cpu" else max(1, self._encoder_bytes // need)
        maps: list[Tensor] = []
        start = 0
        while start < len(images):
            part = images[start : start + step]
            encoded = self._attempt(partial(self._encode, part.to(self.device)))
            if encoded is not None:
                maps.append(encoded)
                start += len(part)
                continue
            step = self._halved(len(part), 1)
            self._encoder_bytes = step * need
            logger.info("%s is out of memory; going on with %d at a time", self.device, step)
        return torch.cat(maps)

    def describe(self, images: Tensor) -> list[Descriptors]:
        """Extract the features of images [N, 3, H, W]; see :func:`describe`."""
        if len(images) == 0:
            return []
        maps = self.encode(images)
        descriptors = self.global_descriptors(maps)
        return [Descriptors(d, self.patches(m)) for d, m in zip(descriptors, maps, strict=True)]

    @torch.inference_mode()
    def global_descriptors(self, maps: Tensor) -> Tensor:
        """Compute the global descriptors [N, P] of feature maps [N, D, h, w]."""

        def pool(part: Tensor) -> Tensor:
            if isinstance(self._pool, NetVLAD):
                x, assignment = self._pool.assign(part)
                vlad = self._pool.vlad(x.flatten(2), assignment.flatten(2))
            else:
                vlad = self._pool(part)
            if self._weight is None:
                return vlad
            if self._scales is None:
                return get_pca_encoding(self._model, vlad)
            return whiten_int8(vlad, self._weight, self._scales, self._bias)

        # On a CPU one at a time: a product of another shape would round otherwise.
        step = 1 if self.device.type == "cpu" else len(maps)
        with arithmetic(self.device, self.precision):
            return torch.cat([pool(part) for part in maps.split(step)])

    @torch.inference_mode()
    def patches(self, feature_map: Tensor) -> list[Tensor]:
        """Compute the patch descriptors of one feature map.

        Parameters
        ----------
        feature_map : Tensor [D, h, w] of float32
            On the model's device.

        Returns
        -------
        list of Tensor [n_s, P] of float32
            One per patch size; empty for a model without patches.

        Raises
        ------
        ConfigError
            A patch size is larger than the map.
        DeviceError
            The device's memory does not suffice.
        """
        pool = self._pool
        if not isinstance(pool, PatchNetVLAD):
            return []

        def whitened() -> list[Tensor]:
            x, assignment = pool.assign(feature_map[None])
            return pool.whitened(
                x[0], assignment[0], self._weight, self._bias, self._scales,
                block_bytes=self._block_bytes,
            )  # fmt: skip

        with contextlib.nullcontext() if self.device.type == "cpu" else self._one_at_a_time:
            while (described := self._attempt(whitened)) is None:
                self._block_bytes = self._halved(self._block_bytes, MIB)
                logger.info(
                    "%s is out of memory; going on with blocks of %d MiB",
                    self.device,
                    self._block_bytes // MIB,
                )
        return described

    def _attempt(self, work: Callable[[], T]) -> T | None:
        """Do some work; None if there is not enough memory for it."""
        try:
            with arithmetic(self.device, self.precision):
                return work()
        except RuntimeError as error:
            if not out_of_memory(error):
                raise
        empty_cache(self.device)  # out here, nothing of the failed work is held any more
        return None

    def _halved(self, size: int, least: int) -> int:
        if size // 2 < least:
            raise DeviceError(
                f"the memory of {self.device} is too small for one image; use smaller images "
                "(imageresizeh, imageresizew) or another --device"
            )
        return size // 2


def describe(model: nn.Module, images: Tensor) -> list[Descriptors]:
    """Extract the features of a batch of images.

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
