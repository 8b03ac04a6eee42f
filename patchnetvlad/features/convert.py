# SPDX-License-Identifier: MIT
"""Converting features from one layout to another, image by image."""

from __future__ import annotations

import contextlib
import logging
import shutil
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from patchnetvlad.base.text import format_bytes
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.hdf5 import Hdf5Source, import_h5py, write_hdf5
from patchnetvlad.features.inspect import StoreInfo, check_on_disk, layout_of, store_info
from patchnetvlad.features.manifest import Manifest, check_fits, check_naming, refuse
from patchnetvlad.features.names import places_of, places_to_do
from patchnetvlad.features.npy_files import check_unique
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.sources import MapSource, NpySource, Source, StoreSource
from patchnetvlad.features.store.codec import record_bytes
from patchnetvlad.features.store.index import present_manifests
from patchnetvlad.features.store.writer import COMMIT_BYTES

logger = logging.getLogger(__name__)

TARGETS = ("float16", "float32", "int8", "npy", "hdf5")
_DIGITS = {
    "int8": 0,
    "float16": 1,
    "hdf5": 1,
    "map": 1,
    "float32": 2,
    "npy": 2,
}  # per number
_SAMPLE = 200  # images whose patches are counted for an estimate


def convert_features(
    source: str | Path,
    target: str | Path,
    to: str,
    *,
    image_list: str | Path | None = None,
    config: Config | str | Path | None = None,
    dataset_root: str | Path | None = None,
    feature_names: str = "stem",
    device: str = "auto",
    progress: bool = True,
) -> StoreInfo:
    """Write features in another layout, with their manifest.

    If the target is a directory, an interrupted conversion is resumed.

    Parameters
    ----------
    source : str or Path
        A finished feature store, a directory of ``.npy`` files of this package or of the research
        code, or an HDF5 file that this function wrote.
    target : str or Path
        The directory, or with ``hdf5`` the file, to write.
    to : {"float16", "float32", "int8", "npy", "hdf5"}
        The same form as the source's gives a copy without bytes of replaced records.
    image_list : str or Path, optional
        The list that the features were extracted from; ``.npy`` files need it.
    config : Config or str or Path, optional
        What they were extracted with. Features of the research code need it, and feature maps,
        of which the patches are computed; others are checked against it.
    dataset_root : str or Path, optional
        Folder that the images lie under. With it, key points of HDF5 files are in px of the
        original images. ``.npy`` files gain the time stamps of their images, by which
        ``feature_extract`` tells later whether an image has changed.
    feature_names : {"stem", "path"}, default "stem"
        How to name ``.npy`` files, as in :func:`~patchnetvlad.pipeline.extract.extract`.
    device : str, default "auto"
        Where patches of feature maps are computed.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    StoreInfo
        Of the target.

    Raises
    ------
    PatchNetVLADError
        The source is unfinished or damaged, or needs a list or a configuration, or one that is
        given does not fit; the target holds other features, or has too little space.
    """
    for path in (source, target):
        check_on_disk(path)
    source, target = Path(source), Path(target)
    if to not in TARGETS:
        raise FeatureError(f"{to!r} is unknown; convert to one of {', '.join(TARGETS)}")
    if to == "hdf5":
        import_h5py()
        if target.exists():
            raise FeatureError(f"{target} is there already; name another file")
    elif target.is_file():
        raise FeatureError(f"{target} is a file; name a folder for {to} features")
    if not isinstance(config, Config) and config is not None:
        config = Config.load(config)
    images = ImageList.read(image_list) if image_list is not None else None
    with contextlib.closing(_open_source(source, images, config, dataset_root, device)) as features:
        names = images.names if images is not None else features.names
        fits = config or features.manifest.to_config(source)
        check_fits(source, features.manifest, names, fits, dataset_root or "")
        features.names = names
        manifest = _target_manifest(features, to, feature_names)
        if manifest.rounded:
            logger.info(
                "descriptors stay rounded to %s: as %s they are larger, and no more precise",
                manifest.rounded,
                to,
            )
        if to == "hdf5":
            _check_space(features, target, to, len(places_of(names)))
            write_hdf5(features, target, manifest, dataset_root, progress)
        else:
            _write_directory(features, target, manifest, progress)
    return store_info(target)


def _open_source(
    path: Path,
    images: ImageList | None,
    config: Config | None,
    root: str | Path | None,
    device: str,
) -> Source:
    layout = layout_of(path)
    if layout == "hdf5":
        return Hdf5Source(path)
    if layout == "npy":
        return NpySource(path, images, config, root)
    store = StoreSource(path)
    return MapSource(path, config, device) if store.kind == "map" else store


def _target_manifest(source: Source, to: str, feature_names: str) -> Manifest:
    """Return the manifest of a conversion; FeatureError if it cannot be written."""
    kind = "float16" if to == "hdf5" else to
    rounded = source.manifest.rounded or source.kind
    if not source.manifest.patch_sizes:
        if to not in ("npy", "hdf5"):
            raise FeatureError(
                f"{source.path} holds global descriptors only, which are float32 everywhere; "
                "convert them to npy or hdf5"
            )
        kind = rounded = "npy"
    elif to == "npy":
        check_naming(feature_names)
        check_unique(source.names, feature_names)
    return replace(
        source.manifest,
        local_features=kind,
        naming=feature_names if kind == "npy" else "path",
        rounded=rounded if _DIGITS[rounded] < _DIGITS[kind] else "",
    )


def _write_directory(source: Source, target: Path, manifest: Manifest, progress: bool) -> None:
    """Write a store or ``.npy`` files; resume an interrupted conversion."""
    for have in present_manifests(target):
        if have is None or have.differences(manifest):
            raise refuse(target, have, manifest, "name another target")
    kind = manifest.local_features
    with open_writer(target, source.names, manifest) as writer:
        count = len(places_of(source.names))
        todo = places_to_do(source.names, writer.done)
        if writer.done.any():
            logger.info("%d of %d images are in %s already", count - len(todo), count, target)
        if todo:
            _check_space(source, target, kind, len(todo))
            writer.start()
        pending = 0
        try:
            for i in tqdm(
                todo,
                total=count,
                initial=count - len(todo),
                desc="Converting",
                unit="image",
                disable=not progress or not todo,
            ):
                descriptor, arrays = source.read_as(i, kind)
                writer.write(i, descriptor, arrays, source.modified(i))
                pending += sum(array.nbytes for array in arrays)
                if pending >= COMMIT_BYTES:
                    writer.commit()
                    pending = 0
        finally:
            writer.commit()  # keep what is done
        writer.finish()


def _check_space(source: Source, target: Path, to: str, count: int) -> None:
    """Log how much space ``count`` images will take; FeatureError if too little is free."""
    sample = range(0, len(source.names), max(1, len(source.names) // _SAMPLE))
    counts = [source.counts(i) for i in sample]
    kind, width = "float16" if to == "hdf5" else to, source.dimension
    need = sum(record_bytes(kind, width, n, 0) for n in counts)
    if to == "hdf5":  # key points, sizes and scores; headers
        need += sum(12 * sum(n) + 4000 for n in counts)
    need = need * count // len(counts)
    folder = next(parent for parent in (target, *target.absolute().parents) if parent.is_dir())
    free = shutil.disk_usage(folder).free
    logger.info(
        "%d images from %s will take %s as %s; %s are free in %s",
        count,
        source.path,
        format_bytes(need),
        to,
        format_bytes(free),
        folder,
    )
    if need > free:
        raise FeatureError(
            f"{target} needs {format_bytes(need)}, but {folder} has {format_bytes(free)} free; "
            "name a target elsewhere, or convert to a smaller kind"
        )
