# SPDX-License-Identifier: MIT
"""Extraction: from an image list to stored features."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.assets.checkpoints import find_checkpoint
from patchnetvlad.base.arguments import checked
from patchnetvlad.base.files import check_inputs_stay
from patchnetvlad.base.names import is_remote
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines.engine import Engine, Extraction
from patchnetvlad.engines.open import open_engine
from patchnetvlad.errors import ArgumentError, FeatureError
from patchnetvlad.features.interface import Writer
from patchnetvlad.features.manifest import feature_files
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.plan import failed_error, left_to_do, plan
from patchnetvlad.features.space import check_space
from patchnetvlad.features.store.share import Share, check_no_shares, is_merged
from patchnetvlad.features.store.share_writer import open_share

logger = logging.getLogger(__name__)


@checked
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
    skip_broken: bool = False,
) -> NDArray[np.float32]:
    """Extract the features of an image list into a folder.

    An interrupted run resumes, and existing features are not computed again, even if images were
    added to the list, removed from it or reordered (in a store; ``.npy`` files belong to one list).

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a built-in configuration.
    image_list : str or Path or ImageList
        Text file with one image per line, or a folder of images.
    dataset_root : str or Path, default ""
        Root folder of relative names in the list, or its URL, such as ``s3://bucket/prefix``.
    output_dir : str or Path, default "output_features"
        Gets ``globalfeats.npy`` [N, P] of float32 and, for patchnetvlad pooling, a feature
        store; or, with ``local_features = npy``, for every image and patch size s
        ``patchfeats_psize{s}_{stem}.npy`` [P, n_s] of float32.
    device : str, default "auto"
        Without a number, ``cuda`` means as many GPUs as ``nGPU`` in the configuration, which
        share the images.
    feature_names : {"stem", "path"}, default "stem"
        Name ``.npy`` files after the stem of an image (as in the research code), or after its
        full name in the list, for lists with repeated stems. A store needs no such names.
    resume : bool, default True
        Keep existing features, or refuse those of other settings. False replaces them.
    shard : str or (int, int), optional
        ``"I/N"``, I from 0: extract only one of N shares of the list, to a subfolder of
        ``output_dir/shards``. When all N jobs are done, merge the shares with
        :func:`~patchnetvlad.features.merge.merge_shares`.
    progress : bool, default True
        Show a progress bar on stderr.
    cluster : str, optional
        Extract on a Ray cluster: ``local``, ``auto`` or its address; see
        :class:`~patchnetvlad.engines.ray.extract.RayExtractor`. Images that fail there are
        recorded in the store, with the reason, as with ``skip_broken``.
    skip_broken : bool, default False
        Finish a store without the images that cannot be decoded, with a warning instead of an
        ImageError. No query finds these images. The same call tries them again.

    Returns
    -------
    ndarray [N, P] of float32
        Global descriptors; for a share, those of its images, [0, P] if already merged.

    Raises
    ------
    PatchNetVLADError
        Bad input, or too little disk space. Everything except broken or too small images is
        detected before the first image is read; all other images are extracted before an
        ImageError names these.
    ClusterError
        There is no cluster, or none of its nodes can do the work.
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
    if not is_remote(output_dir):
        checkpoint = find_checkpoint(config.resume_path, config.num_pcs)
        check_inputs_stay(feature_files(output), [images.path, config.source, checkpoint])
    dataset_root = images.base(dataset_root)
    with open_engine(cluster, device, progress) as engine:
        rows = None if share is None else share.rows(images.names, config.cache_batch_size)
        part = images if rows is None else images.take(rows)
        precision = engine.precision(config)
        manifest = plan(config, images, dataset_root, feature_names, precision, part)
        paths = part.image_locations(dataset_root)
        opened: AbstractContextManager[Writer]
        if share is not None and rows is not None:
            if resume and is_merged(output, share, manifest):
                logger.info("the features of share %s are in %s already", share, output)
                return np.empty((0, config.num_pcs), dtype=np.float32)
            opened = open_share(output, share, rows, part.names, manifest, paths, resume)
        else:
            opened = open_writer(output_dir, part.names, manifest, paths, resume)
        with opened as writer:
            _complete(engine, Extraction(config, manifest, part, paths, rows), writer, skip_broken)
            return writer.global_descriptors()


def _complete(engine: Engine, extraction: Extraction, writer: Writer, skip_broken: bool) -> None:
    """Extract the features that are missing, and finish.

    Raises
    ------
    ImageError
        Images have failed, and all others are done.
    FeatureError
        There is too little space.
    """
    todo = left_to_do(writer, extraction.images)
    failed: dict[str, str] = {}
    if todo:
        extractor = engine.extractor(extraction)
        record_bytes = check_space(
            writer.location,
            extraction.config,
            [extraction.paths[i] for i in todo],
            writer.replaced_bytes,
            dimension=extractor.dimension,
            map_channels=extractor.map_channels,
        )
        writer.start()
        failed = extractor.run(writer, todo, record_bytes)
    left_out = writer.allows_failures and bool(writer.done.any())
    if not failed or (left_out and (engine.leaves_out or skip_broken)):
        writer.finish(failed)
    if failed:
        error = failed_error(extraction.images, failed, writer.location, engine.attempts)
        if not (left_out and skip_broken):
            raise error
        logger.warning("%s", error)
