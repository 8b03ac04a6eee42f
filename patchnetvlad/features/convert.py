# SPDX-License-Identifier: MIT
"""Converting features from one layout to another, image by image."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.base.device import choose_device, choose_precision, describe_device
from patchnetvlad.base.files import check_free, check_inputs_stay, digest, free_bytes
from patchnetvlad.base.text import format_bytes
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.from_maps import MapReader
from patchnetvlad.features.hdf5 import Hdf5Reader, import_h5py, open_hdf5
from patchnetvlad.features.inspect import StoreInfo, check_on_disk, layout_of, store_info
from patchnetvlad.features.interface import ListWriter, Reader
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    MANIFEST_FILE,
    Manifest,
    check_checkpoint,
    check_fits,
    check_naming,
    other_features_error,
    read_manifest,
)
from patchnetvlad.features.names import rows_by_name, rows_to_do
from patchnetvlad.features.npy_files import NpyReader, check_unique
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.store.codec import (
    Arrays,
    decode_patches,
    encode_patches,
    record_bytes,
)
from patchnetvlad.features.store.index import present_manifests
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.features.store.writer import COMMIT_BYTES
from patchnetvlad.models.describer import Describer

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
    check_inputs_stay([target], [source], "name another target")
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
    with contextlib.closing(_open_reader(source, images, config, dataset_root, device)) as reader:
        names = images.names if images is not None else _names(reader)
        have = reader.manifest or _assumed(config, names, dataset_root)
        check_fits(source, have, names, config or have.to_config(source), dataset_root or "")
        job = _Job(reader, names, have, _target_manifest(reader, names, have, to, feature_names))
        if job.manifest.rounded:
            logger.info(
                "descriptors stay rounded to %s: as %s they are larger, and no more precise",
                job.manifest.rounded,
                to,
            )
        with _open_writer(target, to, job, dataset_root) as writer:
            job.run(writer, target, to, progress)
    return store_info(target)


def _open_reader(
    path: Path,
    images: ImageList | None,
    config: Config | None,
    root: str | Path | None,
    device: str,
) -> Reader:
    """Open features of which no image's are missing; patches of feature maps are computed."""
    layout = layout_of(path)
    if layout == "hdf5":
        return Hdf5Reader(path)
    if layout == "npy":
        return _open_npy(path, images, config, root)
    reader = StoreReader(path)
    _check_complete(reader)
    if reader.kind != "map":
        return reader
    if config is None:
        raise FeatureError(
            f"{path} holds feature maps, of which patches are computed: give --config_path, "
            "the configuration that they were extracted with"
        )
    if not config.uses_patches:
        raise FeatureError(
            f"{config.source} has pooling = {config.pooling}, without patches; name a "
            "configuration with pooling = patchnetvlad to convert feature maps"
        )
    check_checkpoint(path, reader.manifest, config)
    chosen = choose_device(device)

    def load() -> Describer:
        precision = choose_precision(config.precision, chosen)
        logger.info("computing on %s, %s", describe_device(chosen), precision)
        return Describer.load(config, chosen)

    return MapReader(reader, config, load, chosen)


def _open_npy(
    path: Path, images: ImageList | None, config: Config | None, root: str | Path | None
) -> NpyReader:
    if images is None:
        raise FeatureError(
            f"{path} holds .npy files, which do not say the names of all images: give "
            "--dataset_file_path, the list that they were extracted from"
        )
    known = read_manifest(path / MANIFEST_FILE)
    where = images.image_locations(root) if root is not None else None
    reader = NpyReader(path, images.names, config if known is None else None, "", where)
    num_pcs = known.num_pcs if known is not None else config.num_pcs if config is not None else 0
    dimension = len(reader.descriptor(0))
    if num_pcs not in (0, dimension):
        raise FeatureError(
            f"{path / GLOBAL_FILE} has descriptors of dimension {dimension}; num_pcs is {num_pcs} "
            f"in {config.source if config else path / MANIFEST_FILE}"
        )
    return reader


def _assumed(config: Config | None, names: Sequence[str], root: str | Path | None) -> Manifest:
    """Return the manifest of features of the research code."""
    assert config is not None
    made_with = replace(config, local_features="npy", patch_vlad="integral")
    # The checkpoint is unknown; an empty hash is skipped when matching.
    return Manifest.of(made_with, names, checkpoint="", root=root or "")


def _names(reader: Reader) -> list[str]:
    return [reader.names[i] for i in range(len(reader.names))]


def _check_complete(reader: StoreReader) -> None:
    """Raise FeatureError unless a store has its list, and features of all images."""
    assert reader.manifest is not None
    if reader.manifest.images != digest(_names(reader)[: reader.manifest.num_images]):
        raise FeatureError(
            f"{reader.directory} is damaged: its list of images is not the one that its features "
            "are of; extract again with --no-resume"
        )
    missing = list(dict.fromkeys(n for i, n in enumerate(_names(reader)) if not reader.size(i)))
    if missing and set(missing) <= set(reader.failed):
        raise FeatureError(
            f"{reader.directory} has no features of {len(missing)} images that failed, as "
            f"{missing[0]} ({reader.failed[missing[0]]}); repair them and run feature_extract "
            "again, or extract a list without them"
        )
    if missing:
        raise FeatureError(
            f"{reader.directory} has no features yet of {len(missing)} of {len(reader.names)} "
            f"images, as {missing[0]}; run feature_extract again, it computes what is missing"
        )


def _target_manifest(
    reader: Reader, names: Sequence[str], have: Manifest, to: str, feature_names: str
) -> Manifest:
    """Return the manifest of a conversion; FeatureError if it cannot be written."""
    kind = "float16" if to == "hdf5" else to
    rounded = have.rounded or reader.kind
    if not have.patch_sizes:
        if to not in ("npy", "hdf5"):
            raise FeatureError(
                f"{reader.directory} holds global descriptors only, which are float32 everywhere; "
                "convert them to npy or hdf5"
            )
        kind = rounded = "npy"
    elif to == "npy":
        check_naming(feature_names)
        check_unique(names, feature_names)
    return replace(
        have,
        local_features=kind,
        naming=feature_names if kind == "npy" else "path",
        rounded=rounded if _DIGITS[rounded] < _DIGITS[kind] else "",
    )


@dataclass(frozen=True, eq=False)
class _Job:
    """What is converted: features as they are read, and what they will be."""

    reader: Reader
    names: Sequence[str]
    have: Manifest
    manifest: Manifest

    def run(self, writer: ListWriter, target: Path, to: str, progress: bool) -> None:
        """Write what is not done, and finish."""
        count = len(rows_by_name(self.names))
        todo = rows_to_do(self.names, writer.done)
        if writer.done.any():
            logger.info("%d of %d images are in %s already", count - len(todo), count, target)
        if todo:
            self._check_space(target, to, todo)
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
                descriptor, arrays = self._read(i)
                writer.write(i, descriptor, arrays, self.reader.modified(i))
                pending += sum(array.nbytes for array in arrays)
                if pending >= COMMIT_BYTES:
                    writer.commit()
                    pending = 0
        finally:
            writer.commit()  # keep what is done
        writer.finish()

    def _read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        """Read features in the kind of the target; FeatureError if they do not fit."""
        reader, kind = self.reader, self.manifest.local_features
        descriptor, arrays = reader.read(i)
        expected = self.have.patch_counts()
        by_size = arrays[1:] if reader.kind == "int8" else arrays  # scales come first
        for size, patches in zip(self.have.patch_sizes, by_size, strict=True):
            if len(patches) != expected.get(size, len(patches)):
                height, width = self.have.image_size
                raise FeatureError(
                    f"{reader.directory}: {self.names[i]} has {len(patches)} patches of size "
                    f"{size}; images of {height} x {width} px (height x width) have "
                    f"{expected[size]}. Are image size, patch_sizes and strides those that it was "
                    "extracted with?"
                )
            if patches.shape[1] != len(descriptor):
                raise FeatureError(
                    f"{reader.directory}: patches of {self.names[i]} are of dimension "
                    f"{patches.shape[1]}, its global descriptor of {len(descriptor)}"
                )
        if reader.kind != kind:
            arrays = encode_patches(decode_patches(arrays, reader.kind), kind)
        return descriptor, arrays

    def _check_space(self, target: Path, to: str, todo: Sequence[int]) -> None:
        """Log how much space images will take; FeatureError if too little is free."""
        dimension = len(self.reader.descriptor(todo[0]))
        counts = []
        for i in range(0, len(self.names), max(1, len(self.names) // _SAMPLE)):
            with contextlib.suppress(FeatureError):  # reported when it is read
                counts.append(self.reader.counts(i))
        need = sum(record_bytes(self.manifest.local_features, dimension, n, 0) for n in counts)
        if to == "hdf5":  # key points, sizes and scores; headers
            need += sum(12 * sum(n) + 4000 for n in counts)
        need = need * len(todo) // max(1, len(counts))
        logger.info(
            "%d images from %s will take %s as %s; %s are free for %s",
            len(todo),
            self.reader.directory,
            format_bytes(need),
            to,
            format_bytes(free_bytes(target)),
            target,
        )
        way_out = "name a target elsewhere, or convert to a smaller kind"
        check_free(f"{target} needs", need, target, way_out, FeatureError)


@contextlib.contextmanager
def _open_writer(target: Path, to: str, job: _Job, root: str | Path | None) -> Iterator[ListWriter]:
    """Open the target; an interrupted conversion to a directory is resumed."""
    if to == "hdf5":
        with open_hdf5(target, job.names, job.manifest, root) as writer:
            yield writer
        return
    for have in present_manifests(target):
        if have is None or have.differences(job.manifest):
            raise other_features_error(target, have, job.manifest, "name another target")
    with open_writer(target, job.names, job.manifest) as opened:
        yield opened
