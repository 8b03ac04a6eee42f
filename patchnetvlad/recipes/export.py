# SPDX-License-Identifier: MIT
"""Export: the network, and the matcher of two images, as ONNX or ``torch.export`` files."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.arguments import checked
from patchnetvlad.base.files import (
    check_inputs_stay,
    file_sha256,
    make_folder,
    replacing,
    temporary_folder,
)
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.images import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    check_side,
    input_transform,
    load_image,
    native_size,
)
from patchnetvlad.encoders import DEFAULT
from patchnetvlad.errors import ArgumentError
from patchnetvlad.models.checkpoint import load_network
from patchnetvlad.models.portable import (
    PortableMatcher,
    PortableNetwork,
    matcher_names,
    output_names,
)
from patchnetvlad.recipes.int8 import Inputs, quantise

logger = logging.getLogger(__name__)

OPSET = 18
SUFFIXES = (".onnx", ".pt2")
TOLERANCE = 1e-4
_PACKAGES = {".onnx": ("onnx", "onnxscript"), ".pt2": ()}
_MOST_IMAGES = 32  # that ranges are taken from


@dataclass(frozen=True)
class Exported:
    """Files written by :func:`export`.

    Attributes
    ----------
    network : Path
    matcher : Path or None
        None for a network without patches, or if it was not asked for.
    difference : float or None
        Largest difference between what ONNX Runtime and PyTorch return for an image, in float32;
        None if it was not compared.
    cosine : float or None
        Of an encoder in int8: between a patch descriptor of an image that ranges were taken from,
        or its global descriptor if the network has no patches, and that in float32; the median.
    """

    network: Path
    matcher: Path | None
    difference: float | None
    cosine: float | None = None


@checked
def export(
    config: Config | str | Path,
    output: str | Path,
    *,
    matcher: str | Path | None = None,
    uint8: bool = False,
    resize: bool = False,
    int8: str | Path | None = None,
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
    resize : bool, default False
        It also takes these of any size, and resizes them as extraction does; implies ``uint8``.
    int8 : str or Path, optional
        VGG16 computes in int8. The ranges of its maps are taken from images of this list or
        folder, as the network will see them; at most 32, evenly spread.

    Returns
    -------
    Exported

    Raises
    ------
    ArgumentError
        A suffix is unknown, a package is missing, the network has no patches to match or no
        int8 version, images are to be resized to no size, or ONNX Runtime disagrees with PyTorch.
    PatchNetVLADError
        The configuration, the checkpoint or an image cannot be read, or a file cannot be written.
    """
    settings = config if isinstance(config, Config) else Config.load(config)
    settings = replace(settings, patch_vlad="direct", precision="exact")
    files = [Path(output), *([] if matcher is None else [Path(matcher)])]
    for file in files:
        _check_suffix(file)
    if matcher is not None and not settings.uses_patches:
        raise ArgumentError(f"{settings.source}: pooling has no patches, so nothing is to match")
    if resize and not all(settings.image_size):
        raise ArgumentError(
            f"{settings.source}: there is no size to resize to; set imageresizew and imageresizeh"
        )
    images = [] if int8 is None else _images_of_ranges(int8, files[0], settings)
    checkpoint = resolve_checkpoint(settings.resume_path, settings.num_pcs)
    check_inputs_stay(files, [settings.source, checkpoint, int8, *images])
    about = _about(settings, file_sha256(checkpoint))
    scale = {"mean": IMAGENET_MEAN, "std": IMAGENET_STD} if uint8 or resize else {}
    size = settings.image_size if resize else None
    loaded = load_network(settings, torch.device("cpu"))
    network = PortableNetwork(loaded, settings, **scale, size=size).eval()
    with temporary_folder(make_folder(files[0].parent)) as folder:
        plain = folder / "float32.onnx" if images else files[0]
        features, difference = _write_network(network, plain, settings, about)
        cosine = None
        if images:
            inputs = partial(_inputs, network.from_uint8, settings)
            cosine = quantise(plain, files[0], map(inputs, images))
    if matcher is not None:
        _write_matcher(settings, files[1], features[1:], about)
    return Exported(files[0], files[1] if matcher is not None else None, difference, cosine)


def _about(settings: Config, checkpoint: str) -> dict[str, Any]:
    """Return what a file says of itself."""
    count = len(settings.patch_sizes) if settings.uses_patches else 0
    return {
        "checkpoint": checkpoint,
        "patch_sizes": list(settings.patch_sizes[:count]),
        "strides": list(settings.strides[:count]),
        "patch_weights": list(settings.patch_weights[:count]),
        "image_size": list(settings.image_size),
    }


def _images_of_ranges(images: str | Path, file: Path, settings: Config) -> list[Path | str]:
    """Return some images of a list or folder, evenly spread, whose sizes can be read."""
    if file.suffix != ".onnx" or importlib.util.find_spec("onnxruntime") is None:
        raise ArgumentError(
            f"{file}: int8 is for .onnx files, and needs onnxruntime: pip install "
            "'patchnetvlad[onnx]'"
        )
    if settings.encoder != DEFAULT:
        raise ArgumentError(
            f"{settings.source}: there is no int8 version of the encoder {settings.encoder}, only "
            f"of {DEFAULT}"
        )
    paths = ImageList.read(images).image_locations()
    chosen = paths[:: -(-len(paths) // _MOST_IMAGES)]
    for path in chosen:
        size = native_size(path)
        check_side(path, size, 1 if all(settings.image_size) else settings.min_image_side)
    return chosen


def _inputs(from_uint8: bool, settings: Config, image: Path | str) -> Inputs:
    """Return an image of a file as the network takes it, resized."""
    transform = input_transform(settings.image_size)
    loaded = load_image(image, settings.image_size)
    values = transform.pixels(loaded) if from_uint8 else transform(loaded).numpy()
    return {"image": values[None]}


def _write_network(
    network: PortableNetwork, file: Path, settings: Config, about: dict[str, Any]
) -> tuple[tuple[Tensor, ...], float | None]:
    """Write the network; return its features of two images, and how ONNX Runtime's differ."""
    least = settings.min_image_side + settings.geometry.cell
    # Of the size that they would be resized to, so that runtimes need not round alike there.
    height, width = network.size or (least + 64, least + 128)  # neither square nor equal
    images = _example_images(network.from_uint8, height, width)
    with torch.no_grad():
        features = network(images)
    names = ["image"], output_names(about["patch_sizes"])
    axes = _axes(network.from_uint8, 2 if network.size else least)
    _write(network, file, (images,), axes, names, about)
    return features, _compare(features, file, (images,), names)


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


def _example_images(uint8: bool, height: int, width: int) -> Tensor:
    """Return two images by chance, which differ."""
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

        logging.getLogger("onnx_ir").setLevel(logging.ERROR)  # it warns of constant key points
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
