# SPDX-License-Identifier: MIT
"""Extraction: from an image list to stored features."""

from __future__ import annotations

import logging
import math
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.assets import file_sha256, resolve_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.transforms import native_size
from patchnetvlad.device import choose_devices, choose_precision, describe_device
from patchnetvlad.errors import ArgumentError, FeatureError, ImageError
from patchnetvlad.features.describe import Describer
from patchnetvlad.features.formats import check_unique, places_to_do
from patchnetvlad.features.manifest import GLOBAL_FILE, Manifest, stored_bytes
from patchnetvlad.features.shares import (
    Share,
    ShareWriter,
    check_no_shares,
    is_merged,
    open_share,
)
from patchnetvlad.features.store import Writer, open_writer, record_bytes
from patchnetvlad.features.stream import Decoder, stream_features
from patchnetvlad.geometry import count_patches, feature_map_shape, patch_grids
from patchnetvlad.remote import RemoteFolder, is_remote
from patchnetvlad.units import format_bytes

logger = logging.getLogger(__name__)

_SAMPLE = 200  # images whose sizes are looked up for an estimate


def extract(
    config: Config | str | Path,
    image_list: str | Path | ImageList,
    dataset_root: str | Path = "",
    output_dir: str | Path = "output_features",
    *,
    device: str = "auto",
    feature_names: str = "stem",
    resume: bool = True,
    shard: str | tuple[int, int] | None = None,
    progress: bool = True,
    cluster: str | None = None,
) -> NDArray[np.float32]:
    """Extract the features of an image list into a directory.

    A run that was interrupted goes on where it stopped; features that are there already are
    not computed again.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a shipped configuration.
    image_list : str or Path or ImageList
        Text file, one image a line.
    dataset_root : str or Path, default ""
        Folder that relative names in the list lie under, or its URL, such as
        ``s3://bucket/prefix``.
    output_dir : str or Path, default "output_features"
        Gets ``globalfeats.npy`` [N, P] of float32 and, for patchnetvlad pooling, a feature
        store; or, with ``local_features = npy``, for every image and patch size s
        ``patchfeats_psize{s}_{stem}.npy`` [P, n_s] of float32.
    device : str, default "auto"
        Without a number, ``cuda`` stands for as many GPUs as ``nGPU`` in the configuration
        says; each gets its share of the images.
    feature_names : {"stem", "path"}, default "stem"
        Name ``.npy`` files by an image's stem (the layout of the research code), or by its
        whole name in the list, for lists in which stems repeat. A store needs no such names.
    resume : bool, default True
        Go on with the features that are there, or refuse those that do not fit. False replaces
        them.
    shard : str or (int, int), optional
        ``"I/N"``, I from 0: extract only one of N shares of the list, to a folder of its own in
        ``output_dir/shards``. :func:`~patchnetvlad.features.shares.merge_shares` puts them
        together when N jobs have done theirs.
    progress : bool, default True
        Show a progress bar on stderr.
    cluster : str, optional
        Extract on a Ray cluster: ``local``, ``auto`` or its address; see
        :func:`~patchnetvlad.cluster.extract.extract_on_cluster`.

    Returns
    -------
    ndarray [N, P] of float32
        The global descriptors; of a share, those of its images, [0, P] if it is merged already.

    Raises
    ------
    PatchNetVLADError
        Bad input, or too little space. Everything but images that are broken or too small is
        noticed before the first is read; with such files, the others are still extracted before
        ImageError names these.
    """
    if is_remote(output_dir) and cluster is None:
        raise FeatureError(
            f"features are written to object storage, as {output_dir}, by the workers of a "
            "cluster: give --cluster local, which needs no other machine"
        )
    if not isinstance(config, Config):
        config = Config.load(config)
    output = Path(output_dir)
    share = None if shard is None else Share.parse(shard)
    if share is not None and cluster is not None:
        raise ArgumentError("shard is for clusters without Ray; give it or cluster, not both")
    if share is None and resume and not is_remote(output_dir):
        check_no_shares(output)
    images = image_list if isinstance(image_list, ImageList) else ImageList.read(image_list)
    if cluster is not None:
        from patchnetvlad.cluster.extract import extract_on_cluster

        return extract_on_cluster(
            cluster,
            config,
            images,
            dataset_root,
            output_dir,
            device=device,
            feature_names=feature_names,
            resume=resume,
            progress=progress,
        )
    targets = choose_devices(device, config.num_gpus)
    precision = choose_precision(config.precision, targets[0])
    whole, places = images, None
    if share is not None:
        places = share.places(whole.names, config.cache_batch_size)
        images = whole.take(places)
    manifest = plan(config, whole, dataset_root, feature_names, precision, images)
    paths = images.image_locations(dataset_root)
    opened: AbstractContextManager[Writer]
    if share is not None and places is not None:
        if resume and is_merged(output, share, manifest):
            logger.info("the features of share %s are in %s already", share, output)
            return np.empty((0, config.num_pcs), dtype=np.float32)
        opened = open_share(output, share, places, images.names, manifest, paths, resume)
        output = share.folder(output)
    else:
        opened = open_writer(output, images.names, manifest, paths, resume)
    with opened as writer:
        todo = left_to_do(writer, images, output)
        if todo:
            describers = [Describer.load(config, target) for target in targets]
            for target in targets:
                logger.info("computing on %s, %s", describe_device(target), precision)
            todo_paths = [paths[i] for i in todo]
            freed = 0 if resume else stored_bytes(output)
            check_space(
                output,
                config,
                todo_paths,
                freed,
                dimension=describers[0].dimension,
                map_channels=describers[0].map_channels,
            )
            writer.start()
            decode = Decoder(paths, config, pin=targets[0].type == "cuda")
            with tqdm(
                total=len(images),
                initial=len(images) - len(todo),
                desc="Extracting",
                unit="image",
                disable=not progress,
            ) as bar:
                broken = stream_features(
                    writer, describers, decode, todo, config, bar.update, places
                )
            if broken:
                raise ImageError(broken_text(images, broken))
        writer.finish()
        if isinstance(writer, ShareWriter):
            return writer.global_descriptors()
    return np.load(output / GLOBAL_FILE)


def plan(
    config: Config,
    images: ImageList,
    dataset_root: str | Path,
    feature_names: str,
    precision: str,
    part: ImageList | None = None,
) -> Manifest:
    """Check what is to be extracted, and describe the outcome.

    The parameters and errors are those of :func:`extract`; ``part`` are the images that will be
    read, by default all.
    """
    (part or images).check_images(dataset_root)
    if config.uses_patches:
        if config.local_features == "npy":
            check_unique(images.names, feature_names)
        if config.image_size != (0, 0):
            patch_grids(config.image_size, config.patch_sizes, config.strides)  # do they fit?
    checkpoint = resolve_checkpoint(config.resume_path, config.num_pcs)
    return Manifest.of(
        config,
        images.names,
        file_sha256(checkpoint),
        naming=feature_names,
        precision=precision,
        root=dataset_root,
    )


def left_to_do(writer: Writer, images: ImageList, output: Path | RemoteFolder) -> list[int]:
    """Return the first place of each image without features; say in the log how many have some."""
    done = int(writer.done.sum())
    if done:
        logger.info("%d of %d images have features in %s already", done, len(images), output)
    return places_to_do(images.names, writer.done)


def broken_text(images: ImageList, broken: Mapping[int, ImageError]) -> str:
    """Say which images could not be decoded, and what to do."""
    named = [f"{images.where(i)}: {error}" for i, error in broken.items()]
    return (
        f"{len(broken)} of {len(images)} images could not be decoded, all others are "
        f"extracted: {'; '.join(named[:5])}{'; ...' if len(broken) > 5 else ''}. "
        "Repair the files, or put other images in their places, and run the command again: it "
        "goes on from here"
    )


# --- space ----------------------------------------------------------------------------------------


def check_space(
    output: Path | RemoteFolder,
    config: Config,
    paths: Sequence[Path | str],
    freed: int,
    *,
    dimension: int,
    map_channels: int,
) -> float:
    """Say what features will take on disk; FeatureError if it has not got it.

    Parameters
    ----------
    output : Path or RemoteFolder
        Object storage has room for everything.
    config : Config
    paths : sequence of Path or str
        The images.
    freed : int
        Bytes that will be free when features that stand there have made way.
    dimension : int
        P.
    map_channels : int
        D.

    Returns
    -------
    float
        Bytes an image; 0 where they are not known.
    """
    sizes = [config.image_size]
    if config.image_size == (0, 0):
        sizes = []
        for path in paths[:: max(1, len(paths) // _SAMPLE)]:
            try:
                sizes.append(native_size(path))
            except ImageError:
                continue  # it is named when its turn comes
    shapes = [feature_map_shape(size) for size in sizes if min(size) >= config.min_image_side]
    if not shapes:
        return 0.0

    def total(kind: str) -> float:
        each = [
            record_bytes(
                kind,
                dimension,
                count_patches(shape, config.patch_sizes, config.strides)
                if config.uses_patches
                else [],
                map_channels * shape[0] * shape[1],
            )
            for shape in shapes
        ]
        return sum(each) / len(each) * len(paths)

    kind = config.local_features if config.uses_patches else "npy"
    need = total(kind)
    free = shutil.disk_usage(output).free + freed if isinstance(output, Path) else math.inf
    logger.info(
        "features of %d images will take %s (%s an image, %s)%s in %s",
        len(paths),
        format_bytes(need),
        format_bytes(need / len(paths)),
        kind if config.uses_patches else "float32",
        f"; {format_bytes(free)} are free" if free < math.inf else "",
        output,
    )
    if need > free:
        smaller = [
            f"{other} ({format_bytes(total(other))})"
            for other in ("float16", "int8", "map")
            if config.uses_patches and total(other) < need
        ]
        way_out = f"local_features = {' or '.join(smaller)}, or " if smaller else ""
        raise FeatureError(
            f"the features need {format_bytes(need)}, but {output} has {format_bytes(free)} free; "
            f"use {way_out}another --output_features_dir"
        )
    return need / len(paths)
