# SPDX-License-Identifier: MIT
"""Choosing where to compute."""

from __future__ import annotations

import torch

from patchnetvlad.errors import DeviceError


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
    """
    name = str(name)
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
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
    return torch.device(name)


def describe_device(device: torch.device) -> str:
    """Say in a few words what a device is."""
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    if device.type == "cpu":
        return f"cpu ({torch.get_num_threads()} threads)"
    return str(device)
