# SPDX-License-Identifier: MIT
"""Several processes that train one network, as ``torchrun`` starts them."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor, nn

from patchnetvlad.base.device import choose_device

T = TypeVar("T")

_PATIENCE = timedelta(days=2)  # others may compute maps meanwhile


@dataclass(frozen=True)
class Ranks:
    """The processes that train together; one alone by default.

    Attributes
    ----------
    rank, size : int
        The number of this process, from 0, and how many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and shows progress."""
        return self.rank == 0

    def share(self, count: int) -> NDArray[np.int64]:
        """Return the rows of ``count`` that are for this process, ascending."""
        return np.array_split(np.arange(count), self.size)[self.rank]

    def exchange(self, mine: T) -> list[T]:
        """Return what each process gives, in their order."""
        if self.size == 1:
            return [mine]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, mine)
        return found

    def gather(self, rows: Tensor, counts: Sequence[int]) -> Tensor:
        """Return the rows of all processes, [sum of n_r, d], in their order.

        Gradients flow back to the rows of this process.

        Parameters
        ----------
        rows : Tensor [n_r, d]
            Of this process.
        counts : sequence of int
            n_r of each process.

        Returns
        -------
        Tensor
        """
        if self.size == 1:
            return rows
        padded = rows.new_zeros(max(counts), rows.shape[1])
        padded[: len(rows)] = rows.detach()
        found = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(found, padded)
        parts = [part[:count] for part, count in zip(found, counts, strict=True)]
        parts[self.rank] = rows
        return torch.cat(parts)

    def add_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Add up the gradients of all processes, in each."""
        if self.size == 1:
            return
        trained = [p for p in parameters if p.requires_grad]
        flat = torch.cat([
            (torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in trained
        ])  # fmt: skip
        dist.all_reduce(flat)
        parts = flat.split([p.numel() for p in trained])
        for parameter, part in zip(trained, parts, strict=True):
            parameter.grad = part.view_as(parameter).clone()

    def spread(self, make: Callable[[], T]) -> T:
        """Return in all processes what a function returns in the first, for which others wait."""
        if self.size == 1:
            return make()
        found: list[Any] = [make() if self.first else None]
        dist.broadcast_object_list(found)
        return cast("T", found[0])


@contextlib.contextmanager
def joined(device: str) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the processes that ``torchrun`` has started, if it has.

    Parameters
    ----------
    device : str
        As for :func:`~patchnetvlad.base.device.choose_device`. On CUDA, each process of a machine
        gets a GPU of its own.

    Yields
    ------
    ranks : Ranks
    device : torch.device
        Of this process.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) <= 1 or dist.is_initialized():
        yield Ranks(), choose_device(device)
        return
    where = choose_device(device)
    if where.type == "cuda" and ":" not in device:
        where = choose_device(f"cuda:{os.environ.get('LOCAL_RANK', '0')}")
        torch.cuda.set_device(where)
    backend = "cpu:gloo,cuda:nccl" if where.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=_PATIENCE)
    try:
        yield Ranks(dist.get_rank(), dist.get_world_size()), where
    finally:
        dist.destroy_process_group()
