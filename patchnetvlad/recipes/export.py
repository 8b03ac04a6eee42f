# SPDX-License-Identifier: MIT
"""Export: the network, and the matcher of two images, as ONNX or ``torch.export`` files."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.arguments import checked
from patchnetvlad.base.files import check_inputs_stay, file_sha256, make_folder, replacing
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import IMAGENET_MEAN, IMAGENET_STD
from patchnetvlad.errors import ArgumentError
from patchnetvlad.models.checkpoint import load_network
from patchnetvlad.models.portable import (
    PortableMatcher,
    PortableNetwork,
    matcher_names,
    output_names,
)

logger = logging.getLogger(__name__)

OPSET = 18
SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4
_PACKAGES = {".onnx": ("onnx", "onnxscript"), ".pt2": ()}


@dataclass(frozen=True)
class Exported:
    """Files written by :func:`export`.

    Attributes
    ----------
    network : Path
    matcher : Path or None
        None for a network without patches, or if it was not asked for.
    difference : float or None
        Largest difference between what ONNX Runtime and PyTorch return for an image; None if
        it was not compared.
    """

    network: Path
    matcher: Path | None
    difference: float | None


@checked
def export(
    config: Config | str | Path,
    output: str | Path,
    *,
    matcher: str | Path | None = None,
    uint8: bool = False,
) -> Exported:
    """Write the network of a configuration as one file that needs no Python.

    The network maps images ``image`` [N, 3, H, W] of float32, normalised as for training, to
    ``descriptor`` [N, P] and, for each patch size s, ``patches_s`` [N, n_s, P] and ``keypoints_s``
    [n_s, 2]. Their number is free, and so is their size, if two patches of each size fit along
    both axes. Patches are summed up directly, whatever ``patch_vlad`` is.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a built-in configuration.
    output : str or Path
        ``.onnx`` (opset 18), or ``.pt2`` for ``torch.export.load``.
    matcher : str or Path, optional
        Another file: from the patches and key points of two images to their similarity by mutual
        nearest neighbours and rapid spatial scoring, and the matches.
    uint8 : bool, default False
        The network takes ``image`` [N, H, W, 3] of uint8, RGB, and normalises it itself.

    Returns
    -------
    Exported

    Raises
    ------
    ArgumentError
        A suffix is unknown, a package is missing, the network has no patches to match, or ONNX
        Runtime disagrees with PyTorch.
    PatchNetVLADError
        The configuration or the checkpoint cannot be read, or a file cannot be written.
    """
    settings = config if isinstance(config, Config) else Config.load(config)
    settings = replace(settings, patch_vlad="direct", precision="exact")
    files = [Path(output), *([] if matcher is None else [Path(matcher)])]
    for file in files:
        _check_suffix(file)
    if matcher is not None and not settings.uses_patches:
        raise ArgumentError(f"{settings.source}: pooling has no patches, so nothing is to match")
    checkpoint = resolve_checkpoint(settings.resume_path, settings.num_pcs)
    check_inputs_stay(files, [settings.source, checkpoint])
    sizes = settings.patch_sizes if settings.uses_patches else ()
    about = {
        "checkpoint": file_sha256(checkpoint),
        "patch_sizes": list(sizes),
        "strides": list(settings.strides[: len(sizes)]),
        "patch_weights": list(settings.patch_weights[: len(sizes)]),
        "image_size": list(settings.image_size),
    }
    scale = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if uint8 else {}
    loaded = load_network(settings, torch.device("cpu"))
    network = PortableNetwork(loaded, settings, **scale).eval()
    least = settings.min_image_side + settings.geometry.cell
    images = _example_images(uint8, least)
    with torch.no_grad():
        features = network(images)
    names = ["image"], output_names(sizes)
    _write(network, files[0], (images,), _axes(uint8, least), names, about)
    difference = _compare(features, files[0], (images,), names)
    if matcher is not None:
        _write_matcher(settings, files[1], features[1:], about)
    return Exported(files[0], files[1] if matcher is not None else None, difference)


def _write_matcher(
    settings: Config, file: Path, features: Sequence[Tensor], about: dict[str, Any]
) -> None:
    """Write the matcher; ``features`` are patches, then key points, of two images."""
    sizes = settings.patch_sizes
    patches, keypoints = features[: len(sizes)], features[len(sizes) :]
    example: list[Tensor] = []
    for of, at in zip(patches, keypoints, strict=True):
        example += [of[0], at, of[1][1:], at[1:]]  # of different numbers
    numbers = [torch.export.Dim(f"{side}_{s}", min=2) for s in sizes for side in ("n", "m")]
    dynamic = tuple({0: number} for number in numbers for _ in range(2))
    names = matcher_names(sizes)
    module = PortableMatcher(settings).eval()
    _write(module, file, tuple(example), (dynamic,), names, about)
    _compare(module(*example), file, tuple(example), names)


def _check_suffix(file: Path) -> None:
    if file.suffix not in SUFFIXES:
        raise ArgumentError(f"{file}: the suffix must be {' or '.join(SUFFIXES)}")
    missing = [name for name in _PACKAGES[file.suffix] if importlib.util.find_spec(name) is None]
    if missing:
        raise ArgumentError(
            f"{file} needs {' and '.join(missing)}, which are not installed: pip install "
            "'patchnetvlad[onnx]'"
        )


def _example_images(uint8: bool, least: int) -> Tensor:
    """Return two images by chance, larger than the smallest, and neither square nor equal."""
    height, width = least + 64, least + 128
    random = torch.Generator().manual_seed(0)
    if uint8:
        return torch.randint(0, 256, (2, height, width, 3), dtype=torch.uint8, generator=random)
    return torch.randn((2, 3, height, width), generator=random)


def _axes(uint8: bool, least: int) -> tuple[dict[int, Any], ...]:
    """Return the axes of the image that may have any size, of which sides have a least."""
    dim = torch.export.Dim
    axes = (0, 1, 2) if uint8 else (0, 2, 3)
    names = dim("batch"), dim("height", min=least), dim("width", min=least)
    return (dict(zip(axes, names, strict=True)),)


def _write(
    module: nn.Module,
    file: Path,
    example: tuple[Tensor, ...],
    dynamic: tuple[Any, ...],
    names: tuple[list[str], list[str]],
    about: dict[str, Any],
) -> None:
    """Trace a module, and write it to a file."""
    make_folder(file.parent)
    with warnings.catch_warnings(), replacing(file) as part:
        warnings.simplefilter("ignore")
        if file.suffix == ".pt2":
            program = torch.export.export(module, example, dynamic_shapes=dynamic, strict=False)
            extra = {"about.json": json.dumps(about)}
            torch.export.save(program, part, extra_files=extra)
            return
        import onnx

        made = torch.onnx.export(
            module, example, dynamo=True, dynamic_shapes=dynamic, opset_version=OPSET,
            input_names=names[0], output_names=names[1], verbose=False,
        )  # fmt: skip
        assert made is not None
        model = made.model_proto
        onnx.helper.set_model_props(model, {"patchnetvlad": json.dumps(about)})
        onnx.checker.check_model(model)
        part.write(model.SerializeToString())


def _compare(
    expected: tuple[Tensor, ...],
    file: Path,
    example: tuple[Tensor, ...],
    names: tuple[list[str], list[str]],
) -> float | None:
    """Return the largest difference to what a file returns; None without ONNX Runtime."""
    if file.suffix != ".onnx" or importlib.util.find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    given = {name: value.numpy() for name, value in zip(names[0], example, strict=True)}
    found = session.run(names[1], given)
    difference = max(
        float(np.abs(np.asarray(ours, float) - theirs.numpy()).max())
        for ours, theirs in zip(found, expected, strict=True)
    )
    if not difference <= TOLERANCE:  # so that NaN does not pass
        raise ArgumentError(
            f"{file}: ONNX Runtime and PyTorch differ by {difference:.1g}, more than {TOLERANCE}; "
            "the file is of no use (is onnxruntime of the same age as onnx?)"
        )
    logger.info("%s: ONNX Runtime and PyTorch differ by %.1g", file, difference)
    return difference
