# SPDX-License-Identifier: MIT
"""Checkpoint files that training reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from patchnetvlad.assets.catalog import CHECKPOINT_SUFFIXES, CHECKPOINTS, SHIPPED_CHECKPOINT
from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.files import new_file
from patchnetvlad.errors import ArgumentError, OutputError
from patchnetvlad.models.checkpoint import load_state, save_safetensors

_TORCHVISION = "features."  # of the keys of torchvision's VGG16


def check_output(path: str | Path) -> Path:
    """Return the path of a checkpoint to write; ArgumentError if its suffix is unknown."""
    target = Path(path)
    if not target.name.endswith(CHECKPOINT_SUFFIXES) or target.name in CHECKPOINT_SUFFIXES:
        raise ArgumentError(
            f"the checkpoint {path} must be named *{' or *'.join(CHECKPOINT_SUFFIXES)}"
        )
    if target.is_dir():
        raise ArgumentError(f"the checkpoint {path} is a folder; name a file")
    return target


def save_model(state: Mapping[str, Tensor], path: Path, *, half: bool = False, **more: Any) -> Path:
    """Write a state dict to a file of the kind that its name says; return its path.

    Parameters
    ----------
    state : mapping of str to Tensor
    path : Path
        ``.safetensors``, or else a file of ``torch.save``.
    half : bool, default False
        Store numbers as float16.
    **more
        Stands beside ``state_dict`` in a file of ``torch.save``.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    dtype = torch.float16 if half else torch.float32
    on_cpu = {
        key: value.detach().to("cpu", dtype if value.is_floating_point() else value.dtype)
        for key, value in state.items()
    }
    try:
        if path.suffix == ".safetensors":
            save_safetensors(on_cpu, path, dtype)
        else:
            with new_file(path) as temporary:
                torch.save({**more, "state_dict": on_cpu}, temporary)
    except (OSError, RuntimeError) as error:  # PyTorch's own writer raises the latter
        raise OutputError(f"the checkpoint {path} cannot be written: {error}") from None
    return path


def load_weights(source: str | Path | None = None) -> tuple[dict[str, Tensor], Path]:
    """Read the weights that training or fitting starts from.

    Parameters
    ----------
    source : str or Path, optional
        A checkpoint of this network; its stem, as in ``resumePath``; or torchvision's file of
        VGG16, of which ``features`` become the encoder. By default the checkpoint in this package,
        whose VGG16 was trained on ImageNet.

    Returns
    -------
    state : dict of str to Tensor
    path : Path

    Raises
    ------
    AssetError, CheckpointError
        The file is not found, or cannot be read.
    """
    shipped = f"./{CHECKPOINTS}/{SHIPPED_CHECKPOINT.name}"
    path = resolve_checkpoint(shipped if source is None else str(source), 0)
    state = load_state(path)
    if f"{_TORCHVISION}0.weight" in state:
        state = {
            key.replace(_TORCHVISION, "encoder.", 1): value
            for key, value in state.items()
            if key.startswith(_TORCHVISION)
        }
    return state, path
