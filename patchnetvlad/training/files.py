# SPDX-License-Identifier: MIT
"""Checkpoint files that training reads and writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from patchnetvlad.assets.catalog import CHECKPOINT_SUFFIXES, CHECKPOINTS, SHIPPED_CHECKPOINT
from patchnetvlad.assets.checkpoints import download_weights, resolve_checkpoint
from patchnetvlad.base.files import new_file
from patchnetvlad.encoders import DEFAULT, ENCODERS
from patchnetvlad.errors import ArgumentError, CheckpointError, OutputError
from patchnetvlad.models.backbones import encoder_state, weights_url
from patchnetvlad.models.checkpoint import load_state, read_contents, save_safetensors


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
    """Write a state dict to a file, in the format given by its suffix; return its path.

    Parameters
    ----------
    state : mapping of str to Tensor
    path : Path
        ``.safetensors``, or else a file of ``torch.save``.
    half : bool, default False
        Store numbers as float16.
    **more
        Stands beside ``state_dict`` in a file of ``torch.save``.

    Returns
    -------
    Path

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
    """Read the initial weights of training or fitting.

    Parameters
    ----------
    source : str or Path, optional
        A checkpoint of this network; its stem, as in ``resumePath``; the name of an encoder,
        whose published weights are downloaded where they are not on this machine; or a file of
        such weights, of torchvision, timm or DINOv2's authors. ``vgg16``, the default, is the
        checkpoint in this package, whose VGG16 was trained on ImageNet.

    Returns
    -------
    state : dict of str to Tensor
    path : Path

    Raises
    ------
    AssetError, CheckpointError
        The file is not found, or cannot be downloaded or read.
    ArgumentError
        The encoder needs timm, which is not installed.
    """
    if source in ENCODERS and source != DEFAULT:
        path = download_weights(weights_url(str(source)))
        return encoder_state(load_state(path)), path
    shipped = f"./{CHECKPOINTS}/{SHIPPED_CHECKPOINT.name}"
    path = resolve_checkpoint(shipped if source in (None, DEFAULT) else str(source), 0)
    return encoder_state(load_state(path)), path


@dataclass(frozen=True)
class Progress:
    """The state of training, apart from the weights.

    Attributes
    ----------
    epoch : int
        Epochs that are done.
    recalls : dict of int to float
        Of the latest validation, by N.
    best_score : float
        Best recall@5 so far.
    not_improved : int
        Validations since then.
    within : dict, optional
        Where training is within the next epoch: the round of the recipe, how many of its batches
        are done, and the losses of the epoch. None between epochs.
    scaler : dict, optional
        State of the scale of gradients in mixed precision.
    """

    epoch: int = 0
    recalls: dict[int, float] = field(default_factory=dict)
    best_score: float = 0.0
    not_improved: int = 0
    within: dict[str, Any] | None = None
    scaler: dict[str, Any] | None = None


def save_training(
    folder: Path,
    network: nn.Module,
    optimiser: Optimizer,
    progress: Progress,
    *,
    best: bool,
    keep: bool = False,
) -> Path:
    """Write ``checkpoint.pth.tar``, from which training can resume; return its path.

    Parameters
    ----------
    folder : Path
    network : nn.Module
    optimiser : Optimizer
    progress : Progress
    best : bool
        Write ``model_best.pth.tar`` as well.
    keep : bool, default False
        Write ``checkpoint_epoch{N}.pth.tar``, which no later epoch replaces, as well.

    Returns
    -------
    Path

    Raises
    ------
    OutputError
        A file cannot be written.
    """
    more = {**vars(progress), "optimizer": optimiser.state_dict(), "parallel": False}
    for key in ("within", "scaler"):
        if not more[key]:
            del more[key]
    names = ["checkpoint.pth.tar"]
    names += ["model_best.pth.tar"] if best else []
    names += [f"checkpoint_epoch{progress.epoch}.pth.tar"] if keep else []
    for name in reversed(names):  # what training goes on from is written when all else is
        save_model(network.state_dict(), folder / name, **more)
    return folder / "checkpoint.pth.tar"


def load_training(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], Progress]:
    """Read a checkpoint of training, of this package or of the research code.

    Returns
    -------
    state : dict of str to Tensor
        Of the network.
    optimiser : dict
        State of the optimiser.
    progress : Progress

    Raises
    ------
    CheckpointError
        The file is damaged, or is no checkpoint of training.
    """
    file = Path(path)
    state = load_state(file)
    content = {} if file.suffix == ".safetensors" else read_contents(file)
    missing = [key for key in ("epoch", "optimizer", "best_score") if key not in content]
    if missing:
        raise CheckpointError(
            f"{file} has no {' and no '.join(missing)}: training resumes from "
            "a checkpoint.pth.tar that it wrote"
        )
    recalls = {int(n): float(value) for n, value in dict(content.get("recalls") or {}).items()}
    progress = Progress(
        int(content["epoch"]),
        recalls,
        float(content["best_score"]),
        int(content.get("not_improved", 0)),
        content.get("within"),
        content.get("scaler"),
    )
    return state, content["optimizer"], progress
