# SPDX-License-Identifier: MIT
"""Extraction: from an image list to stored features."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.base.device import choose_devices, choose_precision, describe_device
from patchnetvlad.base.names import is_remote
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines.local_extract import Decoder, stream_features
from patchnetvlad.engines.ray.extract import extract_on_cluster
from patchnetvlad.errors import ArgumentError, FeatureError, ImageError
from patchnetvlad.features.interface import Writer
from patchnetvlad.features.manifest import GLOBAL_FILE, stored_bytes
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.plan import broken_text, left_to_do, plan
from patchnetvlad.features.space import check_space
from patchnetvlad.features.store.share import (
    Share,
    ShareWriter,
    check_no_shares,
    is_merged,
    open_share,
)
from patchnetvlad.models.describer import Describer

logger = logging.getLogger(__name__)


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
        Text file, one image a line; or a folder, all of whose images are meant.
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
        ``output_dir/shards``. :func:`~patchnetvlad.features.merge.merge_shares` puts them
        together when N jobs have done theirs.
    progress : bool, default True
        Show a progress bar on stderr.
    cluster : str, optional
        Extract on a Ray cluster: ``local``, ``auto`` or its address; see
        :func:`~patchnetvlad.engines.ray.extract.extract_on_cluster`.

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
    if isinstance(image_list, ImageList):
        images = image_list
    else:
        images = ImageList.read(image_list, dataset_root)
    dataset_root = images.base(dataset_root)
    if cluster is not None:
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
    rows = None if share is None else share.places(images.names, config.cache_batch_size)
    part = images if rows is None else images.take(rows)
    manifest = plan(config, images, dataset_root, feature_names, precision, part)
    paths = part.image_locations(dataset_root)
    opened: AbstractContextManager[Writer]
    if share is not None and rows is not None:
        if resume and is_merged(output, share, manifest):
            logger.info("the features of share %s are in %s already", share, output)
            return np.empty((0, config.num_pcs), dtype=np.float32)
        opened = open_share(output, share, rows, part.names, manifest, paths, resume)
        output = share.folder(output)
    else:
        opened = open_writer(output, part.names, manifest, paths, resume)
    job = _Job(config, part, paths, rows, output)
    with opened as writer:
        todo = left_to_do(writer, part, output)
        if todo:
            for target in targets:
                logger.info("computing on %s, %s", describe_device(target), precision)
            freed = 0 if resume else stored_bytes(output)
            _extract_rows(job, writer, todo, targets, freed, progress)
        writer.finish()
        if isinstance(writer, ShareWriter):
            return writer.global_descriptors()
    return np.load(output / GLOBAL_FILE)


@dataclass(frozen=True, eq=False)
class _Job:
    """What is extracted, and where to; ``rows`` are those of the whole list, of a share."""

    config: Config
    images: ImageList
    paths: Sequence[Path | str]
    rows: Sequence[int] | None
    output: Path


def _extract_rows(
    job: _Job,
    writer: Writer,
    todo: Sequence[int],
    targets: Sequence[torch.device],
    freed: int,
    progress: bool,
) -> None:
    """Extract the features of the images ``todo``; of those that are broken, tell at the end.

    Raises
    ------
    ImageError
        Images are broken or too small.
    FeatureError
        There is too little space, though ``freed`` bytes will be free.
    """
    describers = [Describer.load(job.config, target) for target in targets]
    check_space(
        job.output,
        job.config,
        [job.paths[i] for i in todo],
        freed,
        dimension=describers[0].dimension,
        map_channels=describers[0].map_channels,
    )
    writer.start()
    decode = Decoder(job.paths, job.config, pin=targets[0].type == "cuda")
    with tqdm(
        total=len(job.images),
        initial=len(job.images) - len(todo),
        desc="Extracting",
        unit="image",
        disable=not progress,
    ) as bar:
        broken = stream_features(writer, describers, decode, todo, job.config, bar.update, job.rows)
    if broken:
        raise ImageError(broken_text(job.images, broken))
