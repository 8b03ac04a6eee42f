# SPDX-License-Identifier: MIT
"""Devices: choosing one, its memory and precision, copies to and from it, CPU threads."""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.errors import DeviceError

T = TypeVar("T")

DEFAULT_MEMORY_MB = 1024
"""Budget of memory where the configuration leaves it open, MiB."""


def choose_device(name: str | torch.device = "auto") -> torch.device:
    """Return the named device, or the best one available.

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
    """Return the devices that share a job: several GPUs, or one device.

    Only ``cuda`` without a number can mean several.

    Parameters
    ----------
    name : str or torch.device, default "auto"
        As for :func:`choose_device`.
    count : int, default 1
        Largest number of GPUs; 0 for all.

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
    """Return the precision in which a device computes.

    Parameters
    ----------
    precision : {"auto", "exact", "fast", "half", "int8"}
        ``auto`` is ``fast`` on CUDA, else ``exact``.
    device : torch.device

    Returns
    -------
    {"exact", "fast", "half", "int8"}
        ``exact`` on devices other than CUDA and the CPU, in place of ``fast``.

    Raises
    ------
    DeviceError
        ``half`` on a device other than CUDA, or ``int8`` on one other than a CPU with
        instructions for it (:func:`multiplies_int8`), where they would be slower, or wrong.
    """
    if precision == "auto":
        return "fast" if device.type == "cuda" else "exact"
    if precision == "half" and device.type != "cuda":
        raise DeviceError(
            f"precision = half needs a CUDA GPU, and this computes on {device}; use precision = "
            "auto, which is fast on GPUs and exact elsewhere"
        )
    if precision == "int8" and not (device.type == "cpu" and multiplies_int8()):
        what = "whose processor has none of them" if device.type == "cpu" else "not a CPU"
        raise DeviceError(
            "precision = int8 needs a CPU with instructions for 8-bit products (AVX512-VNNI, "
            f"AVX-VNNI or AMX), and this computes on {device}, {what}; use precision = auto or fast"
        )
    return precision if device.type in ("cuda", "cpu") else "exact"


@lru_cache
def multiplies_int8() -> bool:
    """Return whether PyTorch sums up products of 8-bit integers exactly on this processor.

    It does with the instructions VNNI and AMX, of all x86 processors that have either. Without
    them it adds pairs of products in 16 bits, which the largest values overflow: that tells.
    """
    if torch.backends.cpu.get_cpu_capability() not in ("AVX2", "AVX512"):
        return False
    pixels = torch.full((1, 64, 4, 4), 255, dtype=torch.uint8, device="cpu")
    weight = torch.full((64, 64, 1, 1), 127, dtype=torch.int8, device="cpu")
    ones = torch.ones(64, device="cpu")
    zeros = torch.zeros(64, dtype=torch.int32, device="cpu")
    where = [1, 1], [0, 0], [1, 1], 1  # stride, padding, dilation, groups
    try:
        packed = torch.ops.onednn.qconv_prepack(weight, ones, 1.0, 0, *where, None)
        product = torch._int_mm(weight.flatten(1), weight.flatten(1))
        sums = torch.ops.onednn.qconv2d_pointwise(
            pixels.contiguous(memory_format=torch.channels_last),
            *(1.0, 0, packed, ones, zeros, None, *where, 1.0, 0, torch.float32, "none", [], ""),
        )
    except (AttributeError, RuntimeError):  # a PyTorch without oneDNN
        return False
    return bool((sums == 64 * 255 * 127).all() and (product == 64 * 127 * 127).all())


def memory_budget(memory_mb: int, device: torch.device) -> int:
    """Return the budget for features and temporaries on a device, in bytes.

    Parameters
    ----------
    memory_mb : int
        MiB; 0 means :data:`DEFAULT_MEMORY_MB`, or half of the free memory of a CUDA GPU if that
        is more.
    device : torch.device

    Returns
    -------
    int
    """
    if memory_mb:
        return memory_mb * 2**20
    free = 0
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
    return max(DEFAULT_MEMORY_MB * 2**20, free // 2)


def upload(values: NDArray[Any], device: torch.device) -> Tensor:
    """Copy an array to a device; to a GPU from pinned memory, without waiting for the copy."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda" and torch.cuda.is_available():
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def download(tensors: Sequence[Tensor]) -> list[Tensor]:
    """Copy tensors from one device to the CPU, and wait for all of them at once."""
    return start_download(tensors)()


def start_download(tensors: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
    """Start to copy tensors from one device to the CPU; return a function that waits for them.

    A GPU copies to pinned memory while it runs what is launched from now on.
    """
    if not tensors or tensors[0].device.type != "cuda":
        copied = [tensor.cpu() for tensor in tensors]
        return lambda: copied
    device = tensors[0].device
    stream, done = _stream(device, "download"), torch.cuda.Event()
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        copies = [
            torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(
                tensor, non_blocking=True
            )
            for tensor in tensors
        ]
        done.record()

    def wait() -> list[Tensor]:
        done.synchronize()
        sources.clear()
        return copies

    sources = list(tensors)  # whose memory must not be used again before
    return wait


@contextlib.contextmanager
def beside(device: torch.device) -> Iterator[None]:
    """Run this thread's copies and kernels on a separate stream; wait for them at the end.

    Keep the tensors that are made within until all work that reads them is done: their memory
    does not belong to the default stream.
    """
    if device.type != "cuda" or not torch.cuda.is_available():
        yield
        return
    stream = _stream(device, "load")
    with torch.cuda.stream(stream):
        yield
        stream.synchronize()


@lru_cache
def _stream(device: torch.device, purpose: str) -> torch.cuda.Stream:
    """Return a GPU's stream for a purpose: one for all threads, since each keeps memory."""
    return torch.cuda.Stream(device)


def empty_cache(device: torch.device) -> None:
    """Return unused memory to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


@contextlib.contextmanager
def arithmetic(device: torch.device, precision: str) -> Iterator[None]:
    """Multiply in float32 (``exact``), or otherwise in TensorFloat-32, on a CUDA device.

    TensorFloat-32 rounds factors to 11 bits and adds products in float32. The setting belongs to
    the process: of several jobs at a time, the first one sets it and the last one restores it.
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
                setattr(owner, name, exact if precision == "exact" else fast)
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
    """Return where PyTorch keeps the setting; 2.9 renamed it and rejects the old names."""
    backends: Any = torch.backends
    if hasattr(backends.cudnn, "conv") and hasattr(backends.cudnn.conv, "fp32_precision"):
        return [(backends.cudnn.conv, "fp32_precision"), (backends.cuda.matmul, "fp32_precision")]
    return [(backends.cudnn, "allow_tf32"), (backends.cuda.matmul, "allow_tf32")]


def out_of_memory(error: BaseException) -> bool:
    """Return True if an error means that the device, or the machine, ran out of memory."""
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
    """Return a short description of a device."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)


def run_parallel(work: Callable[[int], T], count: int) -> list[T]:
    """Run ``work(0)`` to ``work(count - 1)`` on PyTorch's number of threads, one thread per call.

    For many small operations: PyTorch itself synchronises its threads after each of them, which is
    slow when another thread of this process needs the processor, too.
    """
    threads = torch.get_num_threads()
    if threads == 1 or count == 1:
        return [work(i) for i in range(count)]
    return list(_serial_workers(threads).map(work, range(count)))


def serial_pool(size: int, name: str) -> ThreadPoolExecutor:
    """Start threads in which PyTorch starts no threads of its own.

    Those would keep waiting actively for more work, on processors that others need.
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
