# SPDX-License-Identifier: MIT
"""Feature directories as a whole: what is in them, whether it is sound, and other forms of it.

All of it works image by image, so that a directory may be larger than the memory.

HDF5 files are laid out as hloc (hierarchical localization) lays out its own: one group an image,
named by the image, with the datasets

- ``keypoints`` [n, 2] of float32: the patches' centres (x, y), px; (0, 0) is the centre of the
  top-left pixel. They are exact, where :class:`~patchnetvlad.geometry.PatchGrid` truncates to
  whole px: a patch of s cells begins at a multiple of 16 px and its centre is 8 s - 0.5 px on.
- ``image_size`` [2] of int64: (width, height), px, of the image that key points are in. That is
  the original image, as for hloc, where the images' folder is given, and else the resized one.
- ``descriptors`` [P, n] of float16 and ``scores`` [n] of float16, all 1.
- ``patch_sizes`` [n] of int16: the side of each patch, cells. Sizes follow one another.
- ``global_descriptor`` [P] of float32.

The file's attributes ``patchnetvlad`` (what the features were made from, JSON) and each group's
``places`` (rows in the image list) and ``modified`` (time stamp of the image, ns) lead back.
"""

from __future__ import annotations

import contextlib
import json
import logging
import math
import os
import re
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.assets import file_sha256, resolve_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.transforms import native_size
from patchnetvlad.device import choose_device, choose_precision, describe_device
from patchnetvlad.errors import FeatureError, ImageError, PatchNetVLADError, make_folder
from patchnetvlad.features.describe import Describer
from patchnetvlad.features.formats import (
    NpyReader,
    check_unique,
    load_array,
    patch_file,
    places_of,
    read_manifest,
)
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SHARD_FILES,
    Manifest,
    check_fits,
)
from patchnetvlad.features.store import (
    Arrays,
    Record,
    StoreIndex,
    _locked,
    _present,
    _shard_file,
    _Shards,
    _split,
    decode_patches,
    encode_patches,
    open_writer,
    record_bytes,
)
from patchnetvlad.geometry import feature_map_shape, grid_shape, patch_grids
from patchnetvlad.models.backbone import PADDING, RECEPTIVE_FIELD, STRIDE
from patchnetvlad.models.checkpoint import load_model

logger = logging.getLogger(__name__)

TARGETS = ("float16", "float32", "int8", "npy", "hdf5")
_DIGITS = {"int8": 0, "float16": 1, "hdf5": 1, "float32": 2, "npy": 2}  # which keeps more
_COMMIT_BYTES = 64 * 2**20
_COMMIT_SECONDS = 5.0
_SAMPLE = 200  # images whose patches are counted for an estimate
_SHOWN = 5  # missing images that are named
_PATCH_FILE = re.compile(r"patchfeats_psize(\d+)_(.*)\.npy", re.DOTALL)


# --- information ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreInfo:
    """What a feature directory holds.

    Attributes
    ----------
    path : str
    layout : {"store", "npy", "hdf5"}
    kind : {"float16", "float32", "int8", "map", "npy"}
        How patches are kept.
    finished : bool
        Whether every image has its features.
    num_images, num_done : int
        Of a directory of the research code, which has no list, the rows of ``globalfeats.npy``.
    missing : tuple of str
        The first few images without features; by their row where names are not kept.
    num_bytes : int
        On disk, all files together.
    bytes_per_image : float
        Of what is in use.
    dead_bytes : int
        Bytes of records that were replaced or never finished; ``convert`` leaves them behind.
    num_shards : int
    dimension : int or None
        P; None before the first image is done.
    patch_sizes, strides : tuple of int
        Strides are empty where they are not known.
    image_size : tuple of int or None
        (height, width) that images were resized to, px; (0, 0) for native sizes; None where it
        is not known.
    pooling, patch_vlad, precision, checkpoint, naming : str
        As in :class:`~patchnetvlad.features.manifest.Manifest`; empty where not known.
    """

    path: str
    layout: str
    kind: str
    finished: bool
    num_images: int
    num_done: int
    missing: tuple[str, ...]
    num_bytes: int
    bytes_per_image: float
    dead_bytes: int
    num_shards: int
    dimension: int | None
    patch_sizes: tuple[int, ...]
    strides: tuple[int, ...]
    image_size: tuple[int, ...] | None
    pooling: str
    patch_vlad: str
    precision: str
    checkpoint: str
    naming: str


def store_info(path: str | Path) -> StoreInfo:
    """Look up what a feature directory, or an HDF5 file of :func:`convert_features`, holds.

    Parameters
    ----------
    path : str or Path
        A feature store, or ``.npy`` files of this package or of the research code; finished or
        not.

    Returns
    -------
    StoreInfo

    Raises
    ------
    FeatureError
        There are no features, or what describes them is damaged.
    """
    path = Path(path)
    layout = _layout(path)
    if layout == "store":
        return _store_info(path)
    return _npy_info(path) if layout == "npy" else _hdf5_info(path)


def _layout(path: Path) -> str:
    """Tell how features are kept; FeatureError if there are none."""
    if path.is_file():
        return "hdf5"
    if not path.is_dir():
        raise FeatureError(f"there is no feature directory {path}")
    if (path / INDEX_FILE).is_file():
        return "store"
    if any((path / name).is_file() for name in (GLOBAL_FILE, f"{GLOBAL_FILE}.part")):
        return "npy"
    raise FeatureError(
        f"there are no features in {path}: neither {INDEX_FILE} nor {GLOBAL_FILE}; name the folder "
        "that was given to feature_extract as --output_features_dir"
    )


def _store_info(directory: Path) -> StoreInfo:
    with contextlib.closing(StoreIndex(directory)) as index:
        names, records = index.names(), index.records()
    missing = [name for name in dict.fromkeys(names) if name not in records]
    shards = [file.stat().st_size for file in directory.glob(SHARD_FILES)]
    live = sum(record.bytes for record in records.values())
    rest = [directory / name for name in (INDEX_FILE, GLOBAL_FILE)]
    total = sum(shards) + sum(file.stat().st_size for file in rest if file.is_file())
    dimension = next((record.head // 4 for record in records.values()), None)
    dead = max(0, sum(shards) - live)
    return _info(
        directory,
        "store",
        index.manifest,
        finished=not missing and (directory / GLOBAL_FILE).is_file(),
        num_images=len(names),
        num_done=sum(name in records for name in names),
        missing=tuple(missing[:_SHOWN]),
        num_bytes=total,
        bytes_per_image=(total - dead) / max(1, len(records)),
        dead_bytes=dead,
        num_shards=len(shards),
        dimension=dimension,
    )


def _npy_info(directory: Path) -> StoreInfo:
    file, manifest = _npy_state(directory)
    rows = load_array(file, 2)
    done = np.isfinite(rows).all(axis=1)
    files = _patch_files(directory)
    total = sum(path.stat().st_size for path in [*files, file])
    missing = np.flatnonzero(~done)
    return _info(
        directory,
        "npy",
        manifest,
        finished=file.name == GLOBAL_FILE and len(missing) == 0,
        num_images=len(rows),
        num_done=int(done.sum()),
        missing=tuple(f"row {i}" for i in missing[:_SHOWN].tolist()),
        num_bytes=total,
        bytes_per_image=total / max(1, int(done.sum())),
        dimension=rows.shape[1],
        patch_sizes=tuple(sorted({size for size, _ in files.values()})),
    )


def _npy_state(directory: Path) -> tuple[Path, Manifest | None]:
    """Return the file of global descriptors, finished or not, and the manifest."""
    files = [directory / GLOBAL_FILE, directory / f"{GLOBAL_FILE}.part"]
    # Their names change one after the other.
    manifest = read_manifest(directory / MANIFEST_FILE)
    if manifest is None:
        manifest = read_manifest(directory / f"{MANIFEST_FILE}.part")
    return next(file for file in files if file.is_file()), manifest


def _hdf5_info(path: Path) -> StoreInfo:
    with contextlib.closing(_Hdf5Source(path)) as source:
        total = path.stat().st_size
        return _info(
            path,
            "hdf5",
            source.manifest,
            finished=True,
            num_images=len(source.names),
            num_done=len(source.names),
            num_bytes=total,
            bytes_per_image=total / len(set(source.names)),
            dimension=source.dimension,
        )


def _info(path: Path, layout: str, manifest: Manifest | None, **known: Any) -> StoreInfo:
    about: dict[str, Any] = {
        "path": str(path),
        "layout": layout,
        "kind": "npy",
        "missing": (),
        "dead_bytes": 0,
        "num_shards": 0,
        "patch_sizes": (),
        "strides": (),
        "image_size": None,
        **dict.fromkeys(("pooling", "patch_vlad", "precision", "checkpoint", "naming"), ""),
        **known,
    }
    if manifest is not None:
        keys = ("pooling", "patch_vlad", "precision", "checkpoint", "naming")
        about |= {key: getattr(manifest, key) for key in keys}
        about |= {
            "kind": manifest.local_features,
            "patch_sizes": tuple(manifest.patch_sizes),
            "strides": tuple(manifest.strides),
            "image_size": tuple(manifest.image_size),
        }
    return StoreInfo(**about)


def _patch_files(directory: Path) -> dict[Path, tuple[int, str]]:
    """Find the ``.npy`` files of patches, with the size and the name in each file's name."""
    found = {}
    for file in sorted(directory.rglob("*.npy")):
        match = _PATCH_FILE.fullmatch(file.relative_to(directory).as_posix())
        if match:
            found[file] = int(match[1]), match[2]
    return found


# --- verification ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """Something in a feature directory that is not as it was written.

    Attributes
    ----------
    file : Path
    problem : str
    image : str
        Name of the image; of ``.npy`` files, the end of the file's name. Empty for a file that
        concerns all images.
    shard, start : int or None
        Where the record lies: number of the shard, byte offset in it.
    """

    file: Path
    problem: str
    image: str = ""
    shard: int | None = None
    start: int | None = None

    def __str__(self) -> str:
        subject = f"{self.image}: " if self.image else ""
        where = f" at byte {self.start}" if self.start is not None else ""
        return f"{subject}{self.file.name}{where} {self.problem}"


@dataclass(frozen=True)
class Verification:
    """What :func:`verify_features` found.

    Attributes
    ----------
    layout : {"store", "npy"}
    num_checked : int
        Records of a store, or ``.npy`` files of patches, that were read.
    num_missing : int
        Images that have no features yet, which is no damage.
    damages : tuple of Damage
    num_dropped : int
        Records or files that were taken out.
    """

    layout: str
    num_checked: int
    num_missing: int
    damages: tuple[Damage, ...]
    num_dropped: int

    @property
    def sound(self) -> bool:
        """Whether nothing was damaged."""
        return not self.damages


def verify_features(
    directory: str | Path, *, drop: bool = False, progress: bool = True
) -> Verification:
    """Read all features in a directory, and check that they are what was written.

    Of a store, every record must agree with its checksum, and ``globalfeats.npy`` with the
    records. ``.npy`` files have no checksums: each must load, be finite, and have the shape of
    its like.

    Parameters
    ----------
    directory : str or Path
    drop : bool, default False
        Take out what is damaged, so that the same ``feature_extract`` command computes just that
        again: damaged records leave the index of a store, which loses ``globalfeats.npy`` until
        then; damaged ``.npy`` files of patches are deleted.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    Verification

    Raises
    ------
    FeatureError
        There are no features, the index itself is damaged, or, with ``drop``, another process
        writes there or the directory is the research code's.
    """
    directory = Path(directory)
    layout = _layout(directory)
    if layout == "hdf5":
        raise FeatureError(f"{directory} is a file; verify checks feature directories")
    with _locked(directory) if drop else contextlib.nullcontext():
        if layout == "store":
            return _verify_store(directory, drop, progress)
        return _verify_npy(directory, drop, progress)


def _progress_bar(what: str, total: int, progress: bool) -> Any:
    return tqdm(
        total=total, desc=what, unit="B", unit_scale=True, unit_divisor=1000, disable=not progress
    )


def _verify_store(directory: Path, drop: bool, progress: bool) -> Verification:
    with contextlib.closing(StoreIndex(directory)) as index:
        names, records = index.names(), index.records()
    places = places_of(names)
    file = directory / GLOBAL_FILE
    rows, damages = _stored_rows(file, len(names))
    missing = [name for name in places if name not in records]
    if rows is not None and missing:
        damages.append(Damage(file, f"is there, but {len(missing)} images have no features"))
    bad: list[Damage] = []
    differ: list[str] = []
    total = sum(record.bytes for record in records.values())
    with (
        contextlib.closing(_Shards(directory)) as shards,
        _progress_bar("Verifying", total, progress) as bar,
    ):
        for name, record in records.items():  # in the order of the disk
            try:
                shards.read(record, name)
                descriptor = np.frombuffer(shards.read(record, name, head=True), np.float32)
                if rows is not None and any(
                    not np.array_equal(rows[i], descriptor) for i in places.get(name, ())
                ):
                    differ.append(name)
            except FeatureError:
                problem = _what_is_wrong(directory, record)
                shard = _shard_file(directory, record.shard)
                bad.append(Damage(shard, problem, name, record.shard, record.start))
            bar.update(record.bytes)
    if differ:
        damages.append(
            Damage(file, f"differs from the records of {len(differ)} images, as {differ[0]}")
        )
    damages = bad + damages
    if drop and damages:
        # It first: without it nothing takes the features for finished.
        file.unlink(missing_ok=True)
        with contextlib.closing(StoreIndex(directory, writable=True)) as index:
            index.remove(damage.image for damage in bad)
    return Verification(
        "store",
        len(records),
        sum(len(places[name]) for name in missing),
        tuple(damages),
        len(bad) if drop else 0,
    )


def _what_is_wrong(directory: Path, record: Record) -> str:
    """Say why a record that could not be read could not."""
    try:
        size = _shard_file(directory, record.shard).stat().st_size
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if size < record.start + record.bytes:
        return "is cut off"
    return "does not agree with its checksum"


def _stored_rows(file: Path, count: int | None) -> tuple[NDArray[Any] | None, list[Damage]]:
    """Open ``globalfeats.npy`` without reading it; None and what is wrong if that is no use."""
    try:
        rows = np.load(file, mmap_mode="r")
    except FileNotFoundError:
        return None, []
    except Exception as error:  # NumPy raises whatever it trips over.
        return None, [Damage(file, f"is damaged ({error})")]
    if rows.ndim != 2 or rows.dtype.kind != "f":
        return None, [Damage(file, "does not hold a matrix of descriptors")]
    if count is not None and len(rows) != count:
        return None, [Damage(file, f"has {len(rows)} rows for {count} images")]
    return rows, []


def _verify_npy(directory: Path, drop: bool, progress: bool) -> Verification:
    global_file, manifest = _npy_state(directory)
    finished = global_file.name == GLOBAL_FILE
    if drop and manifest is None:
        raise FeatureError(
            f"{directory} has no note of what its features were made from, as the research code "
            "writes none: feature_extract cannot compute single images again; verify without "
            "--drop, and extract again"
        )
    rows, damages = _stored_rows(global_file, manifest.num_images if manifest else None)
    missing = 0
    if rows is not None:
        unfinite = np.flatnonzero([not np.isfinite(row).all() for row in rows])
        if finished and len(unfinite):
            damages.append(Damage(global_file, f"is not finite in row {unfinite[0]}"))
        missing = len(unfinite)
    files = _patch_files(directory)
    if manifest is not None:  # files of other sizes are left over from other features
        files = {file: key for file, key in files.items() if key[0] in manifest.patch_sizes}
    dimension = rows.shape[1] if rows is not None else None
    counts = _patch_counts(manifest)
    if not counts and (manifest is None or tuple(manifest.image_size) != (0, 0)):
        counts = _usual_counts(files)
    bad: list[Damage] = []
    with _progress_bar("Verifying", sum(file.stat().st_size for file in files), progress) as bar:
        for file, (size, name) in files.items():
            problem = _patch_file_problem(file, dimension, counts.get(size))
            if problem:
                bad.append(Damage(file, problem, name))
            bar.update(file.stat().st_size)
    damages = bad + damages
    if finished:
        sizes = sorted({size for size, _ in files.values()})
        have = set(files.values())
        for name in dict.fromkeys(name for _, name in files.values()):
            for size in sizes:
                if (size, name) not in have:
                    file = directory / f"patchfeats_psize{size}_{name}.npy"
                    damages.append(Damage(file, "is missing", name))
    if drop:
        for damage in bad:
            damage.file.unlink(missing_ok=True)
    return Verification("npy", len(files), missing, tuple(damages), len(bad) if drop else 0)


def _usual_counts(files: dict[Path, tuple[int, str]]) -> dict[int, int]:
    """Return the most frequent number of patches of each size."""
    counted: dict[int, Counter[int]] = {}
    for file, (size, _) in files.items():
        with contextlib.suppress(OSError, ValueError, EOFError):
            counted.setdefault(size, Counter())[np.load(file, mmap_mode="r").shape[-1]] += 1
    return {size: counter.most_common(1)[0][0] for size, counter in counted.items()}


def _patch_file_problem(file: Path, dimension: int | None, count: int | None) -> str:
    """Say what is wrong with a file of patches [P, n]; empty if nothing is."""
    try:
        values = np.load(file, allow_pickle=False)
    except Exception as error:  # NumPy raises whatever it trips over.
        return f"is damaged ({error})"
    if values.ndim != 2 or values.dtype.kind != "f":
        return "does not hold a matrix of descriptors"
    wanted = (dimension or values.shape[0], count or values.shape[1])
    if values.shape != wanted:
        return f"is of shape {list(values.shape)}, not {list(wanted)}"
    return "" if np.isfinite(values).all() else "is not finite"


def _patch_counts(manifest: Manifest | None) -> dict[int, int]:
    """Count the patches of each size on an image; empty for native sizes."""
    if manifest is None or tuple(manifest.image_size) == (0, 0):
        return {}
    shape = feature_map_shape(manifest.image_size)
    pairs = zip(manifest.patch_sizes, manifest.strides, strict=True)
    return {size: math.prod(grid_shape(shape, size, stride)) for size, stride in pairs}


# --- sources of a conversion ----------------------------------------------------------------------


class _Source(Protocol):
    """Features that can be read image by image."""

    path: Path
    manifest: Manifest
    """That of the patches that are read, which a store of maps has not."""
    names: Sequence[str]
    kind: str
    """How the arrays that are read hold patches; see :func:`encode_patches`."""
    dimension: int
    """P."""

    def counts(self, i: int) -> list[int]:
        """Return n_s of each patch size of image ``i``, without reading them."""

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        """Read the global descriptor [P] and the patches of image ``i``."""

    def modified(self, i: int) -> int:
        """Return the time stamp of the image that was extracted, ns; 0 if it is not known."""

    def close(self) -> None:
        """Let go of the files."""


class _StoreSource:
    """Reads a store; FeatureError unless it has all images."""

    def __init__(
        self, path: Path, images: ImageList | None, config: Config | None, root: str | Path
    ) -> None:
        self.path = path
        with contextlib.closing(StoreIndex(path)) as index:
            self.stored, self.records = index.names(), index.records()
        self.manifest = index.manifest
        self.names: Sequence[str] = self.stored
        if images is not None:
            check_fits(path, self.manifest, images.names, _config_of(self.manifest, path), root)
            self.names = images.names
        if config is not None:
            check_fits(path, self.manifest, self.names, config, root)
        missing = [name for name in dict.fromkeys(self.stored) if name not in self.records]
        if missing:
            raise FeatureError(
                f"{path} has no features yet of {len(missing)} of {len(self.stored)} images, as "
                f"{missing[0]}; run feature_extract again, it computes what is missing"
            )
        self.kind = self.manifest.local_features
        self.dimension = self.records[self.stored[0]].head // 4
        self._shards = _Shards(path)

    def layout(self, i: int) -> list[tuple[str, list[int]]]:
        """Return dtype and shape of the arrays of image ``i``, but for its descriptor."""
        return json.loads(self.records[self.stored[i]].arrays)[1:]

    def counts(self, i: int) -> list[int]:
        return [shape[0] for _, shape in self.layout(i) if len(shape) == 2]  # 1: scales of int8

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        record = self.records[self.stored[i]]
        buffer = self._shards.read(record, self.stored[i])
        descriptor, *arrays = _split(buffer, record.arrays)
        return descriptor, arrays

    def modified(self, i: int) -> int:
        return self.records[self.stored[i]].modified

    def close(self) -> None:
        self._shards.close()


class _MapSource:
    """Computes the patches of a store of feature maps; the model is loaded at the first."""

    def __init__(self, store: _StoreSource, config: Config | None, device: str) -> None:
        self.path, self.names, self.dimension = store.path, store.names, store.dimension
        self.kind = "float32"
        if config is None:
            raise FeatureError(
                f"{store.path} holds feature maps, of which patches are computed: give "
                "--config_path, the configuration that they were extracted with"
            )
        if not config.uses_patches:
            raise FeatureError(
                f"{config.source} has pooling = {config.pooling}, without patches; name a "
                "configuration with pooling = patchnetvlad to convert feature maps"
            )
        checkpoint = resolve_checkpoint(config.resume_path, config.num_pcs)
        if file_sha256(checkpoint) != store.manifest.checkpoint:
            raise FeatureError(
                f"{store.path} holds feature maps of another checkpoint than {checkpoint}, which "
                f"{config.source} names"
            )
        self._store, self._config = store, config
        self._device = choose_device(device)
        precision = choose_precision(config.precision, self._device)
        self._describer: Describer | None = None
        self.manifest = replace(
            store.manifest,
            patch_sizes=list(config.patch_sizes),
            strides=list(config.strides),
            patch_vlad=config.patch_vlad,
            precision="fast" if "fast" in (precision, store.manifest.precision) else "exact",
        )
        self._precision = precision

    def counts(self, i: int) -> list[int]:
        ((_, (_, *shape)),) = self._store.layout(i)
        pairs = zip(self.manifest.patch_sizes, self.manifest.strides, strict=True)
        return [math.prod(grid_shape(shape, size, stride)) for size, stride in pairs]

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        if self._describer is None:
            logger.info("computing on %s, %s", describe_device(self._device), self._precision)
            self._describer = Describer(
                load_model(self._config, self._device),
                precision=self._precision,
                memory_mb=self._config.memory_mb,
            )
        descriptor, (feature_map,) = self._store.read(i)
        on_device = torch.from_numpy(feature_map).to(self._device).float()
        return descriptor, encode_patches(self._describer.patches(on_device), "float32")

    def modified(self, i: int) -> int:
        return self._store.modified(i)

    def close(self) -> None:
        self._store.close()


class _NpySource:
    """Reads ``.npy`` files of this package or of the research code."""

    kind = "npy"

    def __init__(
        self,
        path: Path,
        images: ImageList | None,
        config: Config | None,
        root: str | Path,
        has_images: bool,
    ) -> None:
        self.path = path
        manifest = read_manifest(path / MANIFEST_FILE)
        if images is None:
            raise FeatureError(
                f"{path} holds .npy files, which do not say the names of all images: give "
                "--dataset_file_path, the list that they were extracted from"
            )
        if manifest is None and config is None:
            raise FeatureError(
                f"{path} holds features of the research code, which do not say what they were "
                "made with: give --config_path, the configuration that they were extracted with"
            )
        self.names: Sequence[str] = images.names
        if manifest is not None:
            reads_with = _config_of(manifest, path)
        else:
            assert config is not None
            reads_with = config
            manifest = _research_manifest(config, images.names, root)
        self.manifest = manifest
        self._reader = NpyReader(path, images.names, reads_with, root)
        if config is not None and self._reader.manifest is not None:
            check_fits(path, manifest, images.names, config, root)
        self.dimension = self._reader.global_descriptors.shape[1]
        if manifest.num_pcs not in (0, self.dimension):
            raise FeatureError(
                f"{path / GLOBAL_FILE} has descriptors of dimension {self.dimension}; num_pcs is "
                f"{manifest.num_pcs} in {reads_with.source}"
            )
        self._paths = images.image_paths(root) if has_images else None

    def _files(self, i: int) -> list[Path]:
        return [
            patch_file(self.path, "patchfeats", size, self.names[i], self._reader.naming)
            for size in self.manifest.patch_sizes
        ]

    def counts(self, i: int) -> list[int]:
        try:
            return [np.load(file, mmap_mode="r").shape[1] for file in self._files(i)]
        except (OSError, ValueError, EOFError, IndexError):
            return []  # it is named when its turn comes

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        patches = self._reader.patches(i) if self.manifest.patch_sizes else []
        return self._reader.global_descriptors[i], [patch.numpy() for patch in patches]

    def modified(self, i: int) -> int:
        if self._paths is None:
            return 0
        try:
            stamp = self._paths[i].stat().st_mtime_ns
            files = self._files(i) or [self.path / GLOBAL_FILE]
            return stamp if all(file.stat().st_mtime_ns >= stamp for file in files) else 0
        except OSError:
            return 0

    def close(self) -> None:
        """Nothing is open."""


def _research_manifest(config: Config, names: Sequence[str], root: str | Path) -> Manifest:
    """Describe features of the research code: no one knows their checkpoint."""
    # An empty value is one that matching does not compare.
    config = replace(config, local_features="npy", patch_vlad="integral")
    return Manifest.of(config, names, checkpoint="", naming="stem", precision="exact", root=root)


def _config_of(manifest: Manifest, path: Path) -> Config:
    """Return a configuration that matches features of a manifest."""
    patches: dict[str, Any] = {}
    if manifest.patch_sizes:
        patches = {
            "patch_sizes": tuple(manifest.patch_sizes),
            "strides": tuple(manifest.strides),
            "patch_vlad": manifest.patch_vlad,
        }
    height, width = manifest.image_size
    return Config(
        pooling=manifest.pooling,
        num_pcs=manifest.num_pcs,
        image_size=(height, width),
        match_image_size=(height, width),
        source=str(path),
        **patches,
    )


# --- HDF5 -----------------------------------------------------------------------------------------

_HDF5_VERSION = 1


def _h5py() -> Any:
    try:
        import h5py
    except ImportError:
        raise FeatureError(
            'HDF5 files need the package h5py: pip install "patchnetvlad[hdf5]"'
        ) from None
    return h5py


class _Hdf5Source:
    """Reads a file of :func:`_write_hdf5`."""

    kind = "float16"

    def __init__(self, path: Path, images: ImageList | None = None, root: str | Path = "") -> None:
        self.path = path
        h5py = _h5py()
        with self._errors():
            self._file = h5py.File(path, "r")
        try:
            with self._errors():
                self._open(h5py)
            self.names: Sequence[str] = self._stored
            if images is not None:
                config = _config_of(self.manifest, path)
                check_fits(path, self.manifest, images.names, config, root)
                self.names = images.names
        except BaseException:
            self._file.close()
            raise

    def _open(self, h5py: Any) -> None:
        if "patchnetvlad" not in self._file.attrs:
            raise FeatureError(
                f"{self.path} was not written by patchnetvlad-store: it has no attribute "
                "'patchnetvlad' that says what the features were made from"
            )
        version = int(self._file.attrs["patchnetvlad_version"])
        if version != _HDF5_VERSION:
            raise FeatureError(
                f"{self.path} is of version {version}; this release of patchnetvlad reads version "
                f"{_HDF5_VERSION}"
            )
        self.manifest = Manifest.from_json(self._file.attrs["patchnetvlad"], self.path)
        by_place: dict[int, tuple[str, str]] = {}

        def look(name: str, item: Any) -> None:
            if isinstance(item, h5py.Group) and "places" in item.attrs:
                for place in item.attrs["places"].tolist():
                    by_place[place] = name, item.attrs["name"]

        self._file.visititems(look)
        if sorted(by_place) != list(range(self.manifest.num_images)):
            raise FeatureError(
                f"{self.path} has {len(by_place)} of {self.manifest.num_images} images; write it "
                "again with patchnetvlad-store convert"
            )
        self._groups = [by_place[i][0] for i in range(len(by_place))]
        self._stored = [by_place[i][1] for i in range(len(by_place))]
        self.dimension = len(self._file[self._groups[0]]["global_descriptor"])

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FeatureError:
            raise
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise FeatureError(
                f"{self.path} is no HDF5 file of patchnetvlad-store, or is damaged "
                f"({' '.join(str(error).split())})"
            ) from None

    def counts(self, i: int) -> list[int]:
        if not self.manifest.patch_sizes:
            return []
        with self._errors():
            sizes = self._file[self._groups[i]]["patch_sizes"][:]
        return [int((sizes == size).sum()) for size in self.manifest.patch_sizes]

    def read(self, i: int) -> tuple[NDArray[np.float32], Arrays]:
        with self._errors():
            group = self._file[self._groups[i]]
            descriptor = group["global_descriptor"][:]
            if not self.manifest.patch_sizes:
                return descriptor, []
            patches = np.ascontiguousarray(group["descriptors"][:].T)  # [n, P]
            sizes = group["patch_sizes"][:]
            return descriptor, [patches[sizes == size] for size in self.manifest.patch_sizes]

    def modified(self, i: int) -> int:
        with self._errors():
            return int(self._file[self._groups[i]].attrs["modified"])

    def close(self) -> None:
        self._file.close()


def _centres(
    size: tuple[int, int], patch_sizes: Sequence[int], strides: Sequence[int]
) -> NDArray[np.float32]:
    """Return the centres (x, y) [n, 2] of all patches on an image of (height, width), px.

    (0, 0) is the centre of the top-left pixel.
    """
    found = [np.empty((0, 2), dtype=np.float32)]
    for grid in patch_grids(size, patch_sizes, strides):
        middle = (RECEPTIVE_FIELD - 1) / 2 - PADDING + STRIDE * (grid.patch_size - 1) / 2
        found.append((STRIDE * grid.stride * grid.indices + middle).astype(np.float32))
    return np.concatenate(found)


def _write_hdf5(
    source: _Source, target: Path, manifest: Manifest, root: str | Path | None, progress: bool
) -> None:
    """Write all features to one file, which gets its name when it is whole."""
    h5py = _h5py()
    places = places_of(source.names)
    make_folder(target.parent)
    temporary = target.with_name(f"{target.name}.part")
    # Images that were not resized are as they are.
    resized = None if tuple(manifest.image_size) == (0, 0) else tuple(manifest.image_size)
    try:
        file = h5py.File(temporary, "w")  # fails while another process writes it
    except OSError as error:
        raise _cannot_write(target, error) from None
    try:
        with (
            file,
            tqdm(total=len(places), desc="Converting", unit="image", disable=not progress) as bar,
        ):
            file.attrs["patchnetvlad"] = manifest.to_json()
            file.attrs["patchnetvlad_version"] = _HDF5_VERSION
            file.attrs["coordinates"] = "resized" if resized and root is None else "original"
            for name, rows in places.items():
                if _group_name(name) in file:
                    raise FeatureError(
                        f"the image {name} has the HDF5 name of another, {_group_name(name)}; "
                        "rename one of them"
                    )
                descriptor, arrays = _as_kind(source, rows[0], "float16")
                original = None
                if resized is None or root is not None:
                    original = _original_size(Path(root or "") / source.names[rows[0]])
                group = file.create_group(_group_name(name))
                group.attrs["places"] = np.array(rows, dtype=np.int64)
                group.attrs["name"] = name
                group.attrs["modified"] = np.int64(source.modified(rows[0]))
                group["global_descriptor"] = descriptor
                _write_patches(group, arrays, manifest, resized or original, original)
                bar.update()
        os.replace(temporary, target)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) and not isinstance(error, PatchNetVLADError):
            raise _cannot_write(target, error) from None
        raise


def _cannot_write(file: Path, error: OSError) -> FeatureError:
    reason = error.strerror or " ".join(str(error).split())
    return FeatureError(f"{file} cannot be written: {reason}")


def _group_name(name: str) -> str:
    return name.replace(os.sep, "/").strip("/")


def _original_size(path: Path) -> tuple[int, int]:
    try:
        return native_size(path)
    except ImageError as error:
        raise ImageError(
            f"{error}; key points in px of the original images need these: is --dataset_root_dir "
            "right?"
        ) from None


def _write_patches(
    group: Any,
    arrays: Arrays,
    manifest: Manifest,
    size: Sequence[int] | None,
    original: tuple[int, int] | None,
) -> None:
    assert size is not None
    sizes = [
        np.full(len(patches), s, dtype=np.int16)
        for patches, s in zip(arrays, manifest.patch_sizes, strict=True)
    ]
    group["image_size"] = np.array((original or tuple(size))[::-1], dtype=np.int64)
    if not sizes:
        return
    height, width = size
    points = _centres((height, width), manifest.patch_sizes, manifest.strides)
    if original is not None:
        scale = np.array(original[::-1], dtype=np.float32) / (width, height)
        points = ((points + 0.5) * scale - 0.5).astype(np.float32)
    patches = np.concatenate(arrays)
    if len(points) != len(patches):
        raise FeatureError(
            f"{group.name} has {len(patches)} patches; an image of {height} x {width} px (height "
            f"x width) has {len(points)}: it has changed since, or is another"
        )
    group["keypoints"] = points
    group["descriptors"] = np.ascontiguousarray(patches.T)
    group["scores"] = np.ones(len(points), dtype=np.float16)
    group["patch_sizes"] = np.concatenate(sizes)


# --- conversion -----------------------------------------------------------------------------------


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
    """Write features in another form, with what they were made from.

    Where the target is a directory, a conversion that was interrupted goes on where it stopped.

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
        How to name ``.npy`` files, as in :func:`~patchnetvlad.features.extract.extract_features`.
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
    source, target = Path(source), Path(target)
    if to not in TARGETS:
        raise FeatureError(f"{to!r} is unknown; convert to one of {', '.join(TARGETS)}")
    if to == "hdf5":
        _h5py()
        if target.exists():
            raise FeatureError(f"{target} is there already; name another file")
    elif target.is_file():
        raise FeatureError(f"{target} is a file; name a folder for {to} features")
    if not isinstance(config, Config) and config is not None:
        config = Config.load(config)
    images = ImageList.read(image_list) if image_list is not None else None
    with contextlib.closing(_open_source(source, images, config, dataset_root, device)) as features:
        manifest = _target_manifest(features, to, feature_names)
        if to == "hdf5":
            _report(features, target, to, len(places_of(features.names)))
            _write_hdf5(features, target, manifest, dataset_root, progress)
        else:
            _write_directory(features, target, manifest, to, progress)
    return store_info(target)


def _open_source(
    path: Path,
    images: ImageList | None,
    config: Config | None,
    dataset_root: str | Path | None,
    device: str,
) -> _Source:
    root = "" if dataset_root is None else dataset_root
    layout = _layout(path)
    if layout == "hdf5":
        return _Hdf5Source(path, images, root)
    if layout == "npy":
        return _NpySource(path, images, config, root, has_images=dataset_root is not None)
    store = _StoreSource(path, images, config, root)
    if store.kind != "map":
        return store
    try:
        return _MapSource(store, config, device)
    except BaseException:
        store.close()
        raise


def _target_manifest(source: _Source, to: str, feature_names: str) -> Manifest:
    """Describe what a conversion writes; FeatureError if it cannot be written."""
    has_patches = bool(source.manifest.patch_sizes)
    if not has_patches and to not in ("npy", "hdf5"):
        raise FeatureError(
            f"{source.path} holds global descriptors only, which are float32 everywhere; convert "
            "them to npy or hdf5"
        )
    if to == "npy":
        if has_patches:
            check_unique(source.names, feature_names)
        return replace(source.manifest, local_features="npy", naming=feature_names)
    kind = "float16" if to == "hdf5" and has_patches else to
    if not has_patches:
        return replace(source.manifest, local_features="npy")
    return replace(source.manifest, local_features=kind, naming="path")


def _write_directory(
    source: _Source, target: Path, manifest: Manifest, to: str, progress: bool
) -> None:
    if target.is_dir():
        for have in _present(target):
            if have != manifest:
                how = "of unknown make"
                if have is not None:
                    how = f"made otherwise ({'; '.join(have.differences(manifest))})"
                raise FeatureError(f"{target} holds features {how}; name another target")
    with open_writer(target, source.names, manifest) as writer:
        places = places_of(source.names).values()
        todo = [rows[0] for rows in places if not writer.done[rows].all()]
        if writer.done.any():
            logger.info(
                "%d of %d images are in %s already",
                int(writer.done.sum()),
                len(writer.done),
                target,
            )
        if todo:
            _report(source, target, to, len(todo))
            writer.start()
            written, since = 0, time.monotonic()
            with tqdm(
                total=len(places),
                initial=len(places) - len(todo),
                desc="Converting",
                unit="image",
                disable=not progress,
            ) as bar:
                try:
                    for i in todo:
                        descriptor, arrays = _as_kind(source, i, to)
                        writer.write(i, descriptor, arrays)
                        written += sum(array.nbytes for array in arrays)
                        if written >= _COMMIT_BYTES or time.monotonic() - since > _COMMIT_SECONDS:
                            writer.commit()
                            written, since = 0, time.monotonic()
                        bar.update()
                except BaseException:
                    with contextlib.suppress(FeatureError):
                        writer.commit()  # what is done is done
                    raise
        writer.finish()
        if to != "npy":
            _stamp(target, source)


def _stamp(target: Path, source: _Source) -> None:
    """Give records the time stamps of their images, or feature_extract takes them for old."""
    stamps = {os.path.normpath(name): source.modified(i) for i, name in enumerate(source.names)}
    with contextlib.closing(StoreIndex(target, writable=True)) as index:
        index.add(
            (name, replace(record, modified=stamps[name]))
            for name, record in index.records().items()
            if record.modified == 0 and stamps.get(name)
        )


def _as_kind(source: _Source, i: int, to: str) -> tuple[NDArray[np.float32], Arrays]:
    """Read the features of image ``i`` as arrays of another kind, checked."""
    descriptor, arrays = source.read(i)
    manifest = source.manifest
    expected = _patch_counts(manifest)
    by_size = arrays[1:] if source.kind == "int8" else arrays  # scales come first
    for size, patches in zip(manifest.patch_sizes, by_size, strict=True):
        if expected and len(patches) != expected[size]:
            height, width = manifest.image_size
            raise FeatureError(
                f"{source.path}: {source.names[i]} has {len(patches)} patches of size {size}; "
                f"images of {height} x {width} px (height x width) have {expected[size]}. Are "
                "image size, patch_sizes and strides those that it was extracted with?"
            )
        if patches.shape[1] != len(descriptor):
            raise FeatureError(
                f"{source.path}: patches of {source.names[i]} are of dimension {patches.shape[1]}, "
                f"its global descriptor of {len(descriptor)}"
            )
    if source.kind != to:
        arrays = encode_patches(decode_patches(arrays, source.kind), to)
    return descriptor, arrays


# --- space ----------------------------------------------------------------------------------------


def _report(source: _Source, target: Path, to: str, count: int) -> None:
    """Say what a conversion will take; FeatureError if the disk has not got it."""
    step = max(1, len(source.names) // _SAMPLE)
    counts = [source.counts(i) for i in range(0, len(source.names), step)]
    width = source.dimension
    kind = "float16" if to == "hdf5" else to
    need = sum(record_bytes(kind, width, n, 0, width) for n in counts) / len(counts) * count
    if to == "hdf5":  # key points, sizes and scores; headers
        need += (sum(map(sum, counts)) / len(counts) * 12 + 4000) * count
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
    if source.manifest.patch_sizes and _DIGITS[to] > _DIGITS[source.kind]:
        logger.info(
            "descriptors stay rounded to %s: as %s they take more space, and are no more precise",
            source.kind,
            to,
        )


def format_bytes(count: float) -> str:
    """Write a number of bytes in a readable unit of powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
