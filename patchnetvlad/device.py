# SPDX-License-Identifier: MIT
"""Choosing where to compute."""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch

from patchnetvlad.errors import DeviceError

T = TypeVar("T")


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return the device of that name, or the best that is there.

    Parameters
    ----------
    name : str or torch.device, default "auto"
        ``auto`` (CUDA, else Apple's MPS, else the CPU), ``cpu``, ``cuda``, ``cuda:N`` or
        ``mps``.

    Returns
    -------
    torch.device

    Raises
    ------
    DeviceError
        The name is unknown, or this machine has no such device.

    Examples
    --------
    >>> choose_device("cpu")
    device(type='cpu')
    """
    name = str(name)
    if name == "auto":
        if torch.cuda.is_available():
            # With its number: "cuda" alone means another device in another thread.
            return torch.device("cuda", torch.cuda.current_device())
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    kind, _, number = name.partition(":")
    if kind not in ("cpu", "cuda", "mps") or (number and not (kind == "cuda" and number.isdigit())):
        raise DeviceError(f"unknown device {name!r}; give auto, cpu, cuda, cuda:N or mps")
    if kind == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise DeviceError(
                f"device {name!r}: PyTorch {torch.__version__} finds no CUDA GPU here; "
                "use --device auto or --nocuda"
            )
        if number and int(number) >= count:
            raise DeviceError(f"device {name!r}: there are {count} GPUs, numbered from 0")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise DeviceError(f"device {name!r} is not available here; use --device auto")
    if kind == "cuda" and not number:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device(name)


def choose_devices(name: str | torch.device = "auto", count: int = 1) -> list[torch.device]:
    """Return the devices that share a job: several only of CUDA, and only if none is named.

    Parameters
    ----------
    name : str or torch.device, default "auto"
        As for :func:`choose_device`.
    count : int, default 1
        GPUs at most; 0 for all.

    Returns
    -------
    list of torch.device

    Raises
    ------
    DeviceError
        As for :func:`choose_device`.
    """
    device = choose_device(name)
    if device.type != "cuda" or ":" in str(name) or count == 1:
        return [device]
    there = torch.cuda.device_count()
    return [torch.device("cuda", i) for i in range(min(count, there) if count else there)]


def choose_precision(precision: str, device: torch.device) -> str:
    """Return ``exact`` or ``fast``: ``auto`` is fast on CUDA; only CUDA and CPUs have both."""
    if precision == "auto":
        return "fast" if device.type == "cuda" else "exact"
    return precision if device.type in ("cuda", "cpu") else "exact"


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Multiply in float32 (``exact``) or in TensorFloat-32 (``fast``) on a CUDA device.

    TensorFloat-32 rounds what is multiplied to 11 bits, and adds up in float32. The setting is the
    whole process's: the first of several jobs at a time decides, and the last puts it back.
    """
    if device.type != "cuda":
        yield
        return
    global _jobs, _before
    with _arithmetic_lock:
        if _jobs == 0:
            _before = [getattr(owner, name) for owner, name in _tf32_settings()]
            for (owner, name), value in zip(_tf32_settings(), _before, strict=True):
                fast = True if isinstance(value, bool) else "tf32"
                exact = False if isinstance(value, bool) else "ieee"
                setattr(owner, name, fast if precision == "fast" else exact)
        _jobs += 1
    try:
        yield
    finally:
        with _arithmetic_lock:
            _jobs -= 1
            if _jobs == 0:
                for (owner, name), value in zip(_tf32_settings(), _before, strict=True):
                    setattr(owner, name, value)


_arithmetic_lock = threading.Lock()
_jobs = 0
_before: list[Any] = []


def _tf32_settings() -> list[tuple[Any, str]]:
    """Return where PyTorch keeps the setting; since 2.9 under new names that exclude the old."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv") and hasattr(backends.cudnn.conv, "fp32_precision"):
        return [(backends.cudnn.conv, "fp32_precision"), (backends.cuda.matmul, "fp32_precision")]
    return [(backends.cudnn, "allow_tf32"), (backends.cuda.matmul, "allow_tf32")]


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that a device's memory, or the machine's, did not suffice."""
    # The CPU's allocator and MPS raise plain RuntimeErrors.
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error) for text in texts)
    )


def count_cpus() -> int:
    """Count the processors that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def describe_device(device: torch.device) -> str:
    """Say in a few words what a device is."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def run_parallel(work: Callable[[int], T], count: int) -> list[T]:
    """Run ``work(0)`` to ``work(count - 1)`` on PyTorch's number of threads, one thread a call.

    For many small operations: PyTorch's own parallelism meets after each of them, which is slow
    when another thread of this process needs the processor, too.
    """
    threads = torch.get_num_threads()
    if threads == 1 or count == 1:
        return [work(i) for i in range(count)]
    return list(_serial_workers(threads).map(work, range(count)))


def serial_pool(size: int, name: str) -> ThreadPoolExecutor:
    """Start threads in which PyTorch computes without further threads.

    Those would go on waiting actively for more work, on processors that others need.
    """
    together = threading.Barrier(size + 1)

    def begin() -> None:
        torch.get_num_threads()  # takes over the process's number, which it would do later
        torch.set_num_threads(1)
        together.wait(60)

    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(size, name, begin)
    for _ in range(size):
        pool.submit(int)
    together.wait(60)  # for ever, where a thread cannot start
    torch.set_num_threads(threads)  # a part of the setting is the whole process's
    return pool


@lru_cache(maxsize=1)
def _serial_workers(size: int) -> ThreadPoolExecutor:
    return serial_pool(size, "patchnetvlad")


if hasattr(os, "register_at_fork"):  # threads do not survive a fork
    os.register_at_fork(after_in_child=_serial_workers.cache_clear)
