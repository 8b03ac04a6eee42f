# SPDX-License-Identifier: MIT
"""A checkpoint without training: a vocabulary and whitening from images."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from patchnetvlad.base.device import choose_device
from patchnetvlad.base.files import check_inputs_stay, make_folder
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import IMAGE_SUFFIXES, ImageList, natural_key
from patchnetvlad.encoders import DEFAULT, ENCODERS
from patchnetvlad.errors import ArgumentError, ImageListError
from patchnetvlad.models.backbones import encoder_of
from patchnetvlad.models.checkpoint import encoder_named, model_from_state
from patchnetvlad.models.model import Flatten, L2Norm
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.training.card import images_digest, write_card
from patchnetvlad.training.clusters import cluster, sample_cells
from patchnetvlad.training.describe import describe_images
from patchnetvlad.training.files import check_output, load_weights, save_model
from patchnetvlad.training.maps import Inputs
from patchnetvlad.training.mining import DescribeAll
from patchnetvlad.training.tuples import Area
from patchnetvlad.training.validation import validate
from patchnetvlad.training.whitening import whitening_layer

WHITENING_IMAGES = 10_000
N_VALUES = (1, 5, 10)


@dataclass(frozen=True)
class Fitted:
    """Files written by :func:`fit`.

    Attributes
    ----------
    checkpoint, card : Path
    num_images : int
        Images that whitening was computed from; 0 without whitening.
    num_broken : int
        Images that could not be read, and were passed over.
    encoder : str
        Its name, for the configuration.
    recalls : dict of int to float or None
        Recall@N of the validation areas, by N; None without any.
    """

    checkpoint: Path
    card: Path
    num_images: int
    num_broken: int
    encoder: str
    recalls: dict[int, float] | None = None


def fit(
    images: str | Path,
    output: str | Path,
    *,
    encoder: str | Path | None = None,
    num_clusters: int = 64,
    num_pcs: int = 128,
    config: Config | str | Path = "netvlad_extract",
    dataset_root: str | Path = "",
    num_images: int = WHITENING_IMAGES,
    vladv2: bool = False,
    half: bool = False,
    random: bool = False,
    validation: Sequence[Area] = (),
    distance: float = 25.0,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Fitted:
    """Make a checkpoint from the weights of an encoder and images, without training.

    Cells of the feature maps of up to 500 images are clustered to a vocabulary; the global VLAD
    vectors of up to ``num_images`` images give a whitening layer. Images that cannot be read are
    passed over, and counted.

    Parameters
    ----------
    images : str or Path
        A folder, whose images and those of the folders below it are taken, or an image list.
    output : str or Path
        Checkpoint to write, ``.pth.tar`` or ``.safetensors``. Its model card is beside it.
    encoder : str or Path, optional
        Checkpoint whose encoder is taken, the name of an encoder, or a file of its published
        weights; see :func:`~patchnetvlad.training.files.load_weights`. By default that of
        ``config``.
    num_clusters : int, default 64
        K; 0 keeps the vocabulary of ``encoder``.
    num_pcs : int, default 128
        P, less than the number of images; 0 for no whitening.
    config : Config or str or Path, default "netvlad_extract"
        Of which ``image_size``, which must be one for all, ``cache_batch_size``, ``threads``,
        ``memory_mb`` and ``precision`` are used.
    dataset_root : str or Path, default ""
        Folder that relative names of a list lie under.
    num_images : int, default 10000
        That whitening is computed from, chosen at random from more. While they are needed, their
        vectors take ``4 * D * K * num_images`` bytes in the folder of ``output``.
    vladv2 : bool, default False
        Give the assignment layer a bias; see :class:`~patchnetvlad.models.netvlad.NetVLAD`.
    half : bool, default False
        Store float16, which takes half the room.
    random : bool, default False
        Give the encoder that is named weights by chance, to try things without a network.
    validation : sequence of Area, default ()
        Whose recalls are written to the card, by the code that validates training.
    distance : float, default 25
        An index image within it is right, in the unit of the areas' positions.
    device : str, default "auto"
    seed : int, default 0
        Of the choices of images and cells, and of k-means.
    progress : bool, default True

    Returns
    -------
    Fitted

    Raises
    ------
    ArgumentError
        There are too few images for so many clusters or components; or the encoder needs timm,
        which is not installed.
    ImageListError, ImageError
        There are no images, or none can be read.
    CheckpointError, AssetError
        The encoder cannot be loaded, or has no vocabulary to keep.
    OutputError
        The checkpoint cannot be written, or is an input.
    """
    target = check_output(output)
    check_inputs_stay([target], [images, encoder])
    settings = config if isinstance(config, Config) else Config.load(config)
    paths = find_images(images, dataset_root)
    chosen = [paths[i] for i in choose_rows(len(paths), num_images, seed)]
    check_components(num_pcs, len(chosen))
    if random:
        network, name = _by_chance(encoder or settings.encoder, settings, num_clusters, seed)
        source = f"{name}, with random weights"
    else:
        start = encoder or settings.encoder
        network, path, name = _start(start, settings, keep_pool=num_clusters == 0, vladv2=vladv2)
        source = path.name if name == DEFAULT else f"{name}, of {path.name}"
    network.to(choose_device(device))
    if num_clusters:
        bare = network.get_submodule("encoder")
        cells = sample_cells(bare, paths, settings, seed=seed, progress=progress)
        found = cluster(cells, num_clusters, seed)
        pool = NetVLAD(num_clusters, cells.shape[1], vladv2=vladv2)
        pool.init_params(found.centroids, found.descriptors)
        network.pool = pool.to(choose_device(device))
    make_folder(target.parent)
    broken = 0
    if num_pcs:
        broken = add_whitening(
            network, chosen, settings, num_pcs, folder=target.parent, progress=progress
        )
    save_model(network.state_dict(), target, half=half, num_pcs=num_pcs)
    used = len(chosen) - broken if num_pcs else 0
    vocabulary = f"{num_clusters} clusters" if num_clusters else f"that of {source}"
    facts = {
        "encoder": source,
        "images": f"{len(paths)}, from {images}",
        "sha256 of their names": images_digest(paths),
        "vocabulary": vocabulary,
        "components": f"{num_pcs}, from {used} images",
        "images that could not be read": broken,
        "image size": f"{settings.image_size[1]} x {settings.image_size[0]} px",
        "seed": seed,
    }
    recalls = None
    if validation:
        facts["right answers"] = f"within {distance:g} (unit of the positions)"
        recalls = validate(validation, _describer(network, settings, progress), distance, N_VALUES)
    how = "Made without training, by k-means and principal component analysis."
    return Fitted(target, write_card(target, how, facts, recalls), used, broken, name, recalls)


def add_pca(
    checkpoint: str | Path,
    paths: Sequence[Path | str],
    config: Config,
    num_pcs: int,
    *,
    num_images: int = WHITENING_IMAGES,
    device: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> Fitted:
    """Write a copy of a checkpoint with a whitening layer.

    Parameters
    ----------
    checkpoint : str or Path
        ``NAME.pth.tar``, as training writes it. Written is ``NAME_WPCA{P}.pth.tar``, beside it.
    paths : sequence of Path or str
        Images, of which up to ``num_images`` are chosen at random.
    config : Config
        See :func:`~patchnetvlad.training.describe.describe_images`; its ``vladv2`` is that of the
        checkpoint.
    num_pcs : int
        P, less than the number of images.
    num_images : int, default 10000
    device : str, default "auto"
    seed : int, default 0
        Of the choice of images.
    progress : bool, default True

    Returns
    -------
    Fitted

    Raises
    ------
    ArgumentError, CheckpointError, AssetError, ImageError, OutputError
        As for :func:`fit`.
    """
    chosen = [paths[i] for i in choose_rows(len(paths), num_images, seed)]
    check_components(max(num_pcs, 1), len(chosen))
    network, source, encoder = _start(checkpoint, config, keep_pool=True, vladv2=config.vladv2)
    network.to(choose_device(device))
    name = source.name.removesuffix(".pth.tar").removesuffix(".safetensors")
    target = source.with_name(f"{name}_WPCA{num_pcs}.pth.tar")
    check_inputs_stay([target], [source, *chosen])
    broken = add_whitening(
        network, chosen, config, num_pcs, folder=target.parent, progress=progress
    )
    save_model(network.state_dict(), target, num_pcs=num_pcs)
    used = len(chosen) - broken
    facts = {
        "weights": source.name,
        "components": f"{num_pcs}, from {used} images",
        "sha256 of their names": images_digest(chosen),
        "images that could not be read": broken,
        "image size": f"{config.image_size[1]} x {config.image_size[0]} px",
        "seed": seed,
    }
    how = f"{source.name} with a whitening layer by principal component analysis."
    return Fitted(target, write_card(target, how, facts), used, broken, encoder)


def find_images(images: str | Path, dataset_root: str | Path = "") -> list[Path | str]:
    """Return the images of a folder and its subfolders, in natural order, or those of a list.

    Raises
    ------
    ImageListError
        There are none.
    """
    folder = Path(images)
    if not folder.is_dir():
        return ImageList.read(images).image_locations(dataset_root)
    names = [str(file) for file in folder.rglob("*") if file.suffix.lower() in IMAGE_SUFFIXES]
    if not names:
        raise ImageListError(f"there is no image in {folder} ({' '.join(IMAGE_SUFFIXES)})")
    return [Path(name) for name in sorted(names, key=natural_key)]


def choose_rows(count: int, most: int, seed: int) -> list[int]:
    """Choose up to ``most`` of ``count`` rows at random, ascending."""
    return sorted(np.random.default_rng(seed).permutation(count)[:most].tolist())


def check_components(num_pcs: int, num_images: int) -> None:
    """Raise ArgumentError if there are too few images for so many components."""
    if num_pcs and not 1 <= num_pcs < num_images:
        raise ArgumentError(
            f"num_pcs = {num_pcs} of {num_images} images; give 1 to {num_images - 1}, or more "
            "images"
        )


def add_whitening(
    network: nn.Module,
    paths: Sequence[Path | str],
    config: Config,
    num_pcs: int,
    *,
    folder: Path,
    inputs: Inputs | None = None,
    progress: bool = True,
) -> int:
    """Compute a whitening layer from images, and add it to a network.

    Parameters
    ----------
    network : nn.Module
        With the children ``encoder`` and ``pool``; gets ``WPCA``, in place of one that it has.
    paths : sequence of Path or str
    config : Config
        See :func:`~patchnetvlad.training.describe.describe_images`.
    num_pcs : int
    folder : Path
        Where vectors are while they are needed.
    inputs : Inputs, optional
        What the network takes; by default the images.
    progress : bool, default True

    Returns
    -------
    int
        Images that could not be read.

    Raises
    ------
    ArgumentError
        There are too few images.
    """
    bare = nn.Module()
    for name in ("encoder", "pool"):
        bare.add_module(name, network.get_submodule(name))
    with tempfile.TemporaryDirectory(prefix=".vectors.", dir=folder) as place:
        title = "vectors" if progress else ""
        file = Path(place, "vectors.npy")
        found = describe_images(bare, paths, config, inputs=inputs, file=file, title=title)
        broken = len(found.broken)
        check_components(num_pcs, len(paths) - broken)
        weight, bias = whitening_layer(found.packed(), num_pcs)
        del found  # before its file goes
    layer = nn.Conv2d(weight.shape[1], num_pcs, 1)
    layer.weight, layer.bias = nn.Parameter(weight), nn.Parameter(bias)
    device = next(network.parameters()).device
    network.WPCA = nn.Sequential(layer, Flatten(), L2Norm(dim=-1)).to(device)
    return broken


def _start(
    source: str | Path, config: Config, *, keep_pool: bool, vladv2: bool
) -> tuple[nn.Module, Path, str]:
    """Load the network that fitting starts from, with its vocabulary if that is kept.

    Also returned are the file, and the name of the encoder, which is that of the weights.
    """
    _check_one_size(config)
    state, path = load_weights(source)
    name = encoder_of(state, str(path))
    pooling = "netvlad" if keep_pool else "avg"
    wanted = replace(config, pooling=pooling, num_pcs=0, vladv2=vladv2, encoder=name)
    return model_from_state(wanted, state, str(path)).eval().requires_grad_(False), path, name


def _by_chance(
    name: str | Path, config: Config, num_clusters: int, seed: int
) -> tuple[nn.Module, str]:
    """Build a network with random weights, without a vocabulary; return the encoder's name, too."""
    _check_one_size(config)
    if str(name) not in ENCODERS or not num_clusters:
        raise ArgumentError(
            f"random weights are for an encoder by its name ({', '.join(ENCODERS)}), not for "
            f"{name!r} with num_clusters = {num_clusters}"
        )
    torch.manual_seed(seed)
    network = nn.Module()
    network.add_module("encoder", encoder_named(str(name)))
    return network.eval().requires_grad_(False), str(name)


def _check_one_size(config: Config) -> None:
    if config.image_size == (0, 0):
        raise ArgumentError(
            f"{config.source}: the images must be made one size; set imageresizeh and imageresizew"
        )


def _describer(network: nn.Module, config: Config, progress: bool) -> DescribeAll:
    def describe(
        paths: Sequence[Path | str],
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        found = describe_images(network, paths, config, title="validation" if progress else "")
        return found.vectors, np.isin(np.arange(len(paths)), found.readable)

    return describe
