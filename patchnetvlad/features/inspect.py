# SPDX-License-Identifier: MIT
"""Inspecting feature folders: their contents, and whether these are intact.

All of it works image by image, so that a directory may be larger than the memory.
"""

from __future__ import annotations

import contextlib
import fnmatch
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.base.names import is_remote
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.hdf5 import Hdf5Reader
from patchnetvlad.features.lock import locked
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    SHARD_FILES,
    SHARE_FILE,
    Manifest,
    find_shares,
    read_manifest,
)
from patchnetvlad.features.names import rows_by_name
from patchnetvlad.features.npy_files import ArrayError, is_as_written, load_array, map_array
from patchnetvlad.features.store.index import StoreIndex, shard_file
from patchnetvlad.features.store.records import (
    RecordError,
    feature_folder,
    opened_index,
    read_record,
)

_SHOWN = 5  # missing images that are named
_PATCH_FILE = re.compile(r"patchfeats_psize(\d+)_(.*)\.npy", re.DOTALL)


def check_on_disk(path: str | Path) -> None:
    """Raise FeatureError if features are in object storage, where they can only be matched."""
    if is_remote(path):
        raise FeatureError(
            f"{path} lies in object storage; copy it to a disk to verify or convert it"
        )


def layout_of(path: Path) -> str:
    """Return the layout of features: "store", "npy" or "hdf5"; FeatureError if there are none."""
    if path.is_file():
        return "hdf5"
    if not path.is_dir():
        raise FeatureError(f"there is no feature directory {path}")
    if any((path / name).is_file() for name in (INDEX_FILE, SHARE_FILE)):
        return "store"
    if any((path / name).is_file() for name in (GLOBAL_FILE, f"{GLOBAL_FILE}.part")):
        return "npy"
    shares = find_shares(path)
    if shares:
        raise FeatureError(
            f"{path} has no features yet but {len(shares)} shares, such as {shares[0]}; when all "
            f"are done, run patchnetvlad-store merge {path}"
        )
    raise FeatureError(
        f"there are no features in {path}: neither {INDEX_FILE} nor {GLOBAL_FILE}; name the folder "
        "that was given to feature_extract as --output_features_dir"
    )


# --- information ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreInfo:
    """Content of a feature directory.

    Attributes
    ----------
    path : str
    layout : {"store", "npy", "hdf5"}
    finished : bool
        Whether every image has its features, but for those that have failed.
    share : str
        Which share of an extraction it is, as ``"0/3"``, whose images these are; empty for others.
    moved : str
        The folder that a merge has moved the records of the share to; empty while they are here.
    num_images, num_done : int
        Of a directory of the research code, which has no list, the rows of ``globalfeats.npy``.
    num_bytes : int
        On disk, all files together.
    bytes_per_image : float
        Of what is in use.
    dimension : int or None
        P; None before the first image is done.
    missing : tuple of str
        The first few images without features; by their row where names are not kept.
    failed : dict of str to str
        Images that could not be extracted on a cluster, and why.
    dead_bytes : int
        Bytes of records that were replaced or never finished; ``convert`` leaves them behind.
    num_shards : int
    kind : {"float16", "float32", "int8", "map", "npy"}
        How patches are kept.
    rounded : str
        The coarser kind that they were converted from; empty if there was none.
    patch_sizes, strides : tuple of int
        Strides are empty where they are not known.
    image_size : tuple of int or None
        (height, width) that images were resized to, px; (0, 0) for native sizes; None where it
        is not known.
    pooling, patch_vlad, encoder, precision, checkpoint : str
        As in :class:`~patchnetvlad.features.manifest.Manifest`; empty where not known.
    """

    path: str
    layout: str
    finished: bool
    num_images: int
    num_done: int
    num_bytes: int
    bytes_per_image: float
    dimension: int | None
    missing: tuple[str, ...] = ()
    failed: dict[str, str] = field(default_factory=dict)
    dead_bytes: int = 0
    num_shards: int = 0
    kind: str = "npy"
    rounded: str = ""
    patch_sizes: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    image_size: tuple[int, ...] | None = None
    pooling: str = ""
    patch_vlad: str = ""
    encoder: str = ""
    precision: str = ""
    checkpoint: str = ""
    share: str = ""
    moved: str = ""


def store_info(path: str | Path) -> StoreInfo:
    """Look up what a feature directory holds, or an HDF5 file that was converted from one.

    Parameters
    ----------
    path : str or Path
        A feature store, or ``.npy`` files of this package or of the research code; finished or
        not. Or the URL of a store, of which the index is fetched.

    Returns
    -------
    StoreInfo

    Raises
    ------
    FeatureError
        There are no features, or what describes them is damaged.
    """
    folder = feature_folder(path)
    if isinstance(folder, RemoteFolder):
        return _store_info(folder)
    layout = layout_of(folder)
    if layout == "store":
        return _store_info(folder)
    return _npy_info(folder) if layout == "npy" else _hdf5_info(folder)


def _made_with(manifest: Manifest | None) -> dict[str, Any]:
    """Return the fields of a manifest under the names of :class:`StoreInfo`."""
    if manifest is None:
        return {}
    made = {key: tuple(v) if isinstance(v, list) else v for key, v in asdict(manifest).items()}
    for key in ("images", "paths", "num_images", "num_pcs", "naming", "root", "global_crc32"):
        del made[key]
    return {"kind": made.pop("local_features"), **made}


def _store_info(directory: Path | RemoteFolder) -> StoreInfo:
    with opened_index(directory) as index:
        names, records, failed = index.names(), index.records(), index.failed
    without = [name for name in dict.fromkeys(names) if name not in records]
    missing = [name for name in without if name not in failed]
    if isinstance(directory, Path):
        sizes = {file.name: file.stat().st_size for file in directory.iterdir() if file.is_file()}
    else:
        sizes = directory.names()
    shards = [size for name, size in sizes.items() if fnmatch.fnmatchcase(name, SHARD_FILES)]
    total = sum(shards) + sum(sizes.get(name, 0) for name in (INDEX_FILE, GLOBAL_FILE))
    dead = max(0, sum(shards) - sum(record.bytes for record in records.values()))
    return StoreInfo(
        path=str(directory),
        layout="store",
        finished=not missing and (bool(index.share) or GLOBAL_FILE in sizes),
        num_images=len(names),
        num_done=sum(name in records for name in names),
        num_bytes=total,
        bytes_per_image=(total - dead) / max(1, len(records)),
        dimension=next((record.head // 4 for record in records.values()), None),
        missing=tuple(missing[:_SHOWN]),
        failed=failed,
        dead_bytes=dead,
        num_shards=len(shards),
        share=str(index.share),
        moved=index.moved,
        **_made_with(index.manifest),
    )


def _npy_info(directory: Path) -> StoreInfo:
    file, manifest = _npy_state(directory)
    rows = map_array(file)
    missing = _unfinished(rows)
    files = _patch_files(directory)
    total = sum(path.stat().st_size for path in [*files, file])
    num_done = len(rows) - len(missing)
    sizes = tuple(sorted({size for size, _ in files.values()}))
    return StoreInfo(
        path=str(directory),
        layout="npy",
        finished=file.name == GLOBAL_FILE and not missing,
        num_images=len(rows),
        num_done=num_done,
        num_bytes=total,
        bytes_per_image=total / max(1, num_done),
        dimension=rows.shape[1],
        missing=tuple(f"row {i}" for i in missing[:_SHOWN]),
        **{"patch_sizes": sizes, **_made_with(manifest)},
    )


def _hdf5_info(path: Path) -> StoreInfo:
    with contextlib.closing(Hdf5Reader(path)) as reader:
        total = path.stat().st_size
        return StoreInfo(
            path=str(path),
            layout="hdf5",
            finished=True,
            num_images=len(reader.names),
            num_done=len(reader.names),
            num_bytes=total,
            bytes_per_image=total / len(set(reader.names)),
            dimension=len(reader.descriptor(0)),
            **_made_with(reader.manifest),
        )


# --- .npy files -----------------------------------------------------------------------------------


def _npy_state(directory: Path) -> tuple[Path, Manifest | None]:
    """Return the file of global descriptors, finished or not, and the manifest."""
    # Their names change one after the other.
    files = [directory / GLOBAL_FILE, directory / f"{GLOBAL_FILE}.part"]
    manifest = read_manifest(directory / MANIFEST_FILE)
    if manifest is None:
        manifest = read_manifest(directory / f"{MANIFEST_FILE}.part")
    return next(file for file in files if file.is_file()), manifest


def _patch_files(directory: Path) -> dict[Path, tuple[int, str]]:
    """Find the ``.npy`` files of patches, with the size and the name in each file's name."""
    found = {}
    for file in sorted(directory.rglob("*.npy")):
        match = _PATCH_FILE.fullmatch(file.relative_to(directory).as_posix())
        if match:
            found[file] = int(match[1]), match[2]
    return found


def _unfinished(rows: NDArray[Any]) -> list[int]:
    """Return the rows that are not finite: those of images that have no features yet."""
    return [i for i, row in enumerate(rows) if not np.isfinite(row).all()]


# --- verification ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Damage:
    """Damage in a feature directory.

    Attributes
    ----------
    file : Path
    problem : str
    image : str
        Name of the image; of ``.npy`` files, the end of the file's name. Empty for a file that
        concerns all images.
    start : int or None
        Where in the file the record lies, bytes.
    """

    file: Path
    problem: str
    image: str = ""
    start: int | None = None

    def __str__(self) -> str:
        subject = f"{self.image}: " if self.image else ""
        where = f" at byte {self.start}" if self.start is not None else ""
        return f"{subject}{self.file.name}{where} {self.problem}"


@dataclass(frozen=True)
class Verification:
    """Result of :func:`verify_features`.

    Attributes
    ----------
    layout : {"store", "npy"}
    num_checked : int
        Records of a store, or ``.npy`` files of patches, that were read.
    num_missing : int
        Images that have no features yet, which is not damage.
    damages : tuple of Damage
    num_dropped : int
        Records or files that were taken out.
    share : str
        Which share of an extraction it is, as ``"0/3"``; empty for others.
    of_places : bool
        Whether it is an index of places, whose damaged images are taken out of its list, too.
    """

    layout: str
    num_checked: int
    num_missing: int
    damages: tuple[Damage, ...]
    num_dropped: int
    share: str = ""
    of_places: bool = False

    @property
    def sound(self) -> bool:
        """True if nothing is damaged."""
        return not self.damages


def verify_features(
    directory: str | Path, *, drop: bool = False, progress: bool = True
) -> Verification:
    """Read all features in a directory, and check that they are what was written.

    Of a store, every record must agree with its checksum, and ``globalfeats.npy`` with the
    records. Files of patches in ``.npy`` have no checksums: each must load, be finite, and have
    the shape of its like.

    Parameters
    ----------
    directory : str or Path
    drop : bool, default False
        Take out what is damaged, so that the same ``feature_extract`` command computes just that
        again: damaged records leave the index of a store, which loses ``globalfeats.npy`` until
        then; damaged ``.npy`` files of patches are deleted. An index of places goes on without the
        images, which can be added again.
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
    check_on_disk(directory)
    directory = Path(directory)
    layout = layout_of(directory)
    if layout == "hdf5":
        raise FeatureError(f"{directory} is a file; verify checks feature directories")
    verify = _verify_store if layout == "store" else _verify_npy
    with locked(directory) if drop else contextlib.nullcontext():
        return verify(directory, drop, progress)


def _verify_store(directory: Path, drop: bool, progress: bool) -> Verification:
    with opened_index(directory) as index:
        names, records, failed = index.names(), index.records(), index.failed
        of_places = isinstance(index, StoreIndex) and index.has_places
    if index.moved:
        raise FeatureError(
            f"the records of {directory}, share {index.share}, are in {index.moved} now; "
            f"patchnetvlad-store merge {index.moved} continues with the others"
        )
    rows_of = rows_by_name(names)
    file = directory / GLOBAL_FILE
    rows, damages = _global_rows(file, len(names))
    missing = [name for name in rows_of if name not in records]
    if rows is not None and set(missing) - set(failed):
        damages.append(Damage(file, f"is there, but {len(missing)} images have no features"))
    bad: list[Damage] = []
    if of_places:  # nothing computes them again
        bad += [Damage(directory / INDEX_FILE, "has no record of it", name) for name in missing]
        missing = []
    differ: list[str] = []
    with _progress_bar(sum(record.bytes for record in records.values()), progress) as bar:
        for name, record in records.items():  # in the order of the disk
            try:
                read_record(directory, record, name)
                head = np.frombuffer(read_record(directory, record, name, head=True), np.float32)
            except RecordError as error:
                shard = shard_file(directory, record.shard)
                bad.append(Damage(shard, error.problem, name, record.start))
            else:
                copies = [] if rows is None else [rows[i] for i in rows_of.get(name, [])]
                if not all(np.array_equal(copy, head) for copy in copies):
                    differ.append(name)
            bar.update(record.bytes)
    if differ:
        problem = f"differs from the records of {len(differ)} images, as {differ[0]}"
        damages.append(Damage(file, problem))
    damages = bad + damages
    if drop and damages:
        # First this one: without it the features count as unfinished.
        file.unlink(missing_ok=True)
        with opened_index(directory, writable=True) as index:
            if isinstance(index, StoreIndex) and of_places:
                index.forget(damage.image for damage in bad)
            else:
                index.remove(damage.image for damage in bad)
    return Verification(
        layout="store",
        num_checked=len(records),
        num_missing=sum(len(rows_of[name]) for name in missing),
        damages=tuple(damages),
        num_dropped=len(bad) if drop else 0,
        share=str(index.share),
        of_places=of_places,
    )


def _progress_bar(num_bytes: int, progress: bool) -> Any:
    return tqdm(
        total=num_bytes,
        desc="Verifying",
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=not progress,
    )


def _global_rows(file: Path, count: int | None) -> tuple[NDArray[Any] | None, list[Damage]]:
    """Open ``globalfeats.npy``; None if it is missing or cannot be used."""
    if not file.is_file():
        return None, []
    try:
        rows = map_array(file)
    except ArrayError as error:
        return None, [Damage(file, error.problem)]
    if count not in (None, len(rows)):
        return None, [Damage(file, f"has {len(rows)} rows for {count} images")]
    return rows, []


def _verify_npy(directory: Path, drop: bool, progress: bool) -> Verification:
    global_file, manifest = _npy_state(directory)
    if drop and manifest is None:
        raise FeatureError(
            f"{directory} has no note of what its features were made from, as the research code "
            "writes none: feature_extract cannot compute single images again; verify without "
            "--drop, and extract again"
        )
    finished = global_file.name == GLOBAL_FILE
    rows, damages = _global_rows(global_file, manifest.num_images if manifest else None)
    missing = [] if rows is None else _unfinished(rows)
    if finished and rows is not None and not is_as_written(rows, manifest):
        damages.append(Damage(global_file, "does not agree with its checksum"))
    if finished and missing:
        damages.append(Damage(global_file, f"is not finite in row {missing[0]}"))
    files = _patch_files(directory)
    if manifest is not None:  # files of other sizes are left over from other features
        files = {file: key for file, key in files.items() if key[0] in manifest.patch_sizes}
    counts = _usual_counts(files) if manifest is None else manifest.patch_counts()
    dimension = None if rows is None else rows.shape[1]
    bad: list[Damage] = []
    with _progress_bar(sum(file.stat().st_size for file in files), progress) as bar:
        for file, (size, name) in files.items():
            problem = _patch_problem(file, dimension, counts.get(size))
            if problem:
                bad.append(Damage(file, problem, name))
            bar.update(file.stat().st_size)
    damages = bad + damages
    if finished:
        have = set(files.values())
        sizes = sorted({size for size, _ in have})
        for name in dict.fromkeys(name for _, name in files.values()):
            for size in sizes:
                if (size, name) not in have:
                    file = directory / f"patchfeats_psize{size}_{name}.npy"
                    damages.append(Damage(file, "is missing", name))
    if drop:
        for damage in bad:
            damage.file.unlink(missing_ok=True)
    return Verification(
        layout="npy",
        num_checked=len(files),
        num_missing=len(missing),
        damages=tuple(damages),
        num_dropped=len(bad) if drop else 0,
    )


def _usual_counts(files: dict[Path, tuple[int, str]]) -> dict[int, int]:
    """Return the most frequent number of patches of each size."""
    counted: dict[int, Counter[int]] = {}
    for file, (size, _) in files.items():
        with contextlib.suppress(FeatureError):
            counted.setdefault(size, Counter())[map_array(file).shape[1]] += 1
    return {size: counter.most_common(1)[0][0] for size, counter in counted.items()}


def _patch_problem(file: Path, dimension: int | None, count: int | None) -> str:
    """Return what is wrong with a file of patches [P, n]; empty if nothing is."""
    try:
        values = load_array(file)
    except ArrayError as error:
        return error.problem
    wanted = (dimension or values.shape[0], count or values.shape[1])
    if values.shape != wanted:
        return f"is of shape {list(values.shape)}, not {list(wanted)}"
    return "" if np.isfinite(values).all() else "is not finite"
