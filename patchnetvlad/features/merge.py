# SPDX-License-Identifier: MIT
"""Merging the shares that independent jobs, ``--shard I/N``, have extracted."""

from __future__ import annotations

import contextlib
import itertools
import logging
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.base.files import digest, set_time_stamp, sync_folder
from patchnetvlad.base.names import is_remote, normal_name
from patchnetvlad.base.text import format_bytes
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Writer
from patchnetvlad.features.lock import LOCK_FILE, locked
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    SHARD_FILES,
    SHARES_FOLDER,
    Manifest,
    erase,
    find_shares,
    refuse,
)
from patchnetvlad.features.names import disk_errors, places_of
from patchnetvlad.features.npy_files import map_array
from patchnetvlad.features.npy_writer import NpyWriter
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.store.codec import split_record
from patchnetvlad.features.store.index import Record, StoreIndex, present_manifests
from patchnetvlad.features.store.records import RecordError, read_record
from patchnetvlad.features.store.share import Share, is_finished
from patchnetvlad.features.store.writer import COMMIT_BYTES, StoreWriter

logger = logging.getLogger(__name__)

_SHOWN = 5  # shares that a message names


@dataclass(frozen=True)
class _Part:
    """A share on disk; ``names`` are as listed, ``missing`` are those without features."""

    folder: Path
    share: Share
    manifest: Manifest
    places: list[int]
    names: list[str]
    missing: list[str]
    moved: str

    @classmethod
    def read(cls, folder: Path) -> _Part:
        with contextlib.closing(StoreIndex(folder)) as index, index.snapshot():
            if not index.share:
                raise FeatureError(
                    f"{folder} is not a share: it holds features that feature_extract wrote "
                    "without --shard"
                )
            rows = index.rows("SELECT place, name FROM images ORDER BY place")
            have = {name for (name,) in index.rows("SELECT name FROM records")}
        names = [name for _, name in rows]
        return cls(
            folder,
            Share.parse(index.share),
            index.manifest,
            [row for row, _ in rows],
            names,
            [name for name in names if normal_name(name) not in have],
            index.moved,
        )

    @property
    def again(self) -> str:
        """The command that extracts this share."""
        return f"feature_extract --shard {self.share}"

    def images(self) -> dict[str, list[int]]:
        """Return the rows of each image in the whole list, ordered by their first rows."""
        ours = places_of(self.names)
        return {name: [self.places[i] for i in rows] for name, rows in ours.items()}

    def records(self) -> dict[str, Record]:
        """Return the records by the name of their image."""
        with contextlib.closing(StoreIndex(self.folder)) as index:
            return index.records()


def merge_shares(
    output: str | Path,
    shares: Sequence[str | Path] = (),
    *,
    keep: bool = False,
    resume: bool = True,
    progress: bool = True,
) -> int:
    """Merge the shares of an extraction into what one run would have written.

    An interrupted merge is resumed.

    Parameters
    ----------
    output : str or Path
        Folder for the features, in the layout of the configuration of the jobs.
    shares : sequence of str or Path
        The folders of all shares, wherever they are; by default, those of jobs with this
        ``output`` as their ``output_dir``.
    keep : bool, default False
        Keep the shares. By default the records of a share are deleted once all of them are safe
        in ``output``, so that at most one share is on the disk twice.
    resume : bool, default True
        Resume from features of the same list and configuration in ``output``. False replaces
        them.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    int
        N, the number of images in the list.

    Raises
    ------
    FeatureError
        A share is missing, unfinished or damaged; shares are not of one list, configuration and
        number of shares; other features are in ``output``, or the disk has too little space.
    """
    for path in (output, *shares):
        if is_remote(path):
            raise FeatureError(f"{path} is a URL; shares are merged on a disk, copy them to one")
    output = Path(output)
    folders = [Path(folder) for folder in shares] or find_shares(output)
    if not folders:
        return _merged_before(output)
    parts = sorted((_Part.read(folder) for folder in folders), key=lambda part: part.share)
    _check_alike(parts)
    manifest = parts[0].manifest
    # Otherwise an earlier merge was killed during its final clean-up.
    if not (resume and all(part.moved for part in parts) and is_finished(output, manifest)):
        _check_complete(parts)
        names = _whole_list(parts)
        if resume:
            for have in present_manifests(output):
                if have != manifest:
                    raise refuse(
                        output, have, manifest, "name another folder, or give --no-resume to "
                        "replace them",
                    )  # fmt: skip
        with open_writer(output, names, manifest, resume=resume) as writer:
            _merge(writer, output, parts, keep, resume, progress)
    for part in parts:
        if part.moved or not keep:
            _remove(part.folder)
    _remove_empty_folders(output)
    return manifest.num_images


def _merged_before(output: Path) -> int:
    """Return the number of images of features that are complete; FeatureError if they are not."""
    have = present_manifests(output)
    if not (output / GLOBAL_FILE).is_file() or len(have) != 1 or have[0] is None:
        raise FeatureError(
            f"there are no shares in {output / SHARES_FOLDER}; feature_extract --shard I/N with "
            "this --output_features_dir writes them"
        )
    logger.info("there are no shares in %s, which has all features already", output)
    _remove_empty_folders(output)
    return have[0].num_images


def _check_alike(parts: Sequence[_Part]) -> None:
    """Raise FeatureError unless the shares are distinct and of one extraction."""
    first = parts[0]
    for part in parts:
        if part.share.count != first.share.count:
            raise FeatureError(
                f"{first.folder} is one of {first.share.count} shares, {part.folder} one of "
                f"{part.share.count}; name those that belong together after the folder, or delete "
                "the others"
            )
        if part.manifest != first.manifest:
            raise FeatureError(
                f"{first.folder} and {part.folder} were extracted with different settings "
                f"({'; '.join(first.manifest.differences(part.manifest))}); extract one of them "
                f"again: feature_extract --shard I/{part.share.count} --no-resume"
            )
    for part, other in itertools.pairwise(parts):
        if part.share == other.share:
            raise FeatureError(
                f"{part.folder} and {other.folder} are the same share {part.share}; name one of "
                "them"
            )


def _check_complete(parts: Sequence[_Part]) -> None:
    """Raise FeatureError unless all shares are there and done."""
    count = parts[0].share.count
    have = {part.share.index for part in parts}
    missing = [Share(i, count) for i in range(count) if i not in have]
    if missing:
        which = ", ".join(map(str, missing[:_SHOWN]))
        raise FeatureError(
            f"{_shares(which, missing)} missing; run feature_extract --shard {missing[0]}, with "
            "the same arguments as the others otherwise"
        )
    waiting = [part for part in parts if part.missing]
    if waiting:
        which = ", ".join(str(part.share) for part in waiting[:_SHOWN])
        part = waiting[0]
        raise FeatureError(
            f"{_shares(which, waiting)} not finished: {part.folder} has no features yet of "
            f"{len(part.missing)} of {len(part.names)} images, as {part.missing[0]}; run "
            f"{part.again} again, it resumes from there"
        )


def _shares(which: str, all_of_them: Sequence[object]) -> str:
    many = len(all_of_them) > 1
    more = ", ..." if len(all_of_them) > _SHOWN else ""
    return f"{len(all_of_them)} shares ({which}{more}) are" if many else f"share {which} is"


def _whole_list(parts: Sequence[_Part]) -> list[str]:
    """Return the whole image list; FeatureError if the shares do not make it up."""
    names = [""] * parts[0].manifest.num_images
    for part in parts:
        for row, name in zip(part.places, part.names, strict=True):
            names[row] = name
    total = sum(len(part.places) for part in parts)
    listed = digest(normal_name(name) for name in names)
    if total != len(names) or listed != parts[0].manifest.images:
        raise FeatureError(
            f"the shares have {total} of {len(names)} images: some are in two shares, or in none. "
            "Were they extracted with different cachebatchsize? Extract them with one, and "
            "--no-resume"
        )
    return names


def _merge(
    writer: Writer,
    output: Path,
    parts: Sequence[_Part],
    keep: bool,
    resume: bool,
    progress: bool,
) -> None:
    rows = _earlier_rows(output) if isinstance(writer, NpyWriter) and resume else None
    total = newest = dimension = 0
    todo = []
    for part in parts:
        images, records = part.images(), part.records()
        for record in records.values():
            total += record.bytes
            newest = max(newest, record.modified)
            dimension = record.head // 4
        missing = [
            name
            for name, listed in images.items()
            if not _is_there(writer, rows, listed, records[name])
        ]
        if missing and part.moved:
            raise FeatureError(
                f"share {part.share} was moved to {part.moved} before, but {output} has no "
                f"features of {len(missing)} of its images, as {missing[0]}; run {part.again} "
                "--no-resume to compute them again"
            )
        todo.append((missing, sum(records[name].bytes for name in missing)))
    left = sum(need for _, need in todo)
    if left:
        _check_space(output, parts, [need for _, need in todo], dimension, keep)
    if left < total:
        done = format_bytes(total - left)
        logger.info("%s of %s are in %s already", done, format_bytes(total), output)
    if left:
        writer.start()
    if isinstance(writer, NpyWriter):
        writer.durable = True
    with tqdm(
        total=total,
        initial=total - left,
        desc="Merging",
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=not progress,
    ) as bar:
        for part, (missing, _) in zip(parts, todo, strict=True):
            with locked(part.folder) if not keep else contextlib.nullcontext():
                _copy(writer, part, missing, bar)
                if not keep and not part.moved:
                    _drop_records(part.folder, output)
    writer.finish()
    if isinstance(writer, NpyWriter):
        set_time_stamp(output / GLOBAL_FILE, newest)
        sync_folder(output)


def _earlier_rows(output: Path) -> NDArray[np.floating] | None:
    """Open the global descriptors of ``.npy`` files, finished or not; None if there are none."""
    for name in (GLOBAL_FILE, f"{GLOBAL_FILE}.part"):
        with contextlib.suppress(FeatureError):
            return map_array(output / name)
    return None


def _is_there(
    writer: Writer, rows: NDArray[np.floating] | None, listed: Sequence[int], record: Record
) -> bool:
    """Return True if the output has this record, in the rows ``listed``, or a newer one."""
    i = listed[0]
    if not writer.done[listed].all():
        return False
    if isinstance(writer, StoreWriter):
        have = writer.records[writer.names[i]]
        same = (have.arrays, have.crc32) == (record.arrays, record.crc32)
        return same or have.modified > record.modified
    assert rows is not None
    head = np.ascontiguousarray(rows[i], dtype=np.float32)
    return zlib.crc32(head.data, zlib.crc32(record.arrays.encode())) == record.head_crc32


def _check_space(
    output: Path, parts: Sequence[_Part], needs: Sequence[int], dimension: int, keep: bool
) -> None:
    """Log how much space merging takes at most; FeatureError if too little is free.

    ``needs`` are the bytes to be copied from each share.
    """
    manifest = parts[0].manifest
    rows = 4 * dimension * manifest.num_images
    # .npy files: global descriptors come first, and each file has a header. A store has an index.
    is_npy = manifest.local_features == "npy"
    used = most = rows if is_npy else 0
    for part, need in zip(parts, needs, strict=True):
        if is_npy:
            used += max(
                0, need + (128 * len(manifest.patch_sizes) - 4 * dimension) * len(part.names)
            )
        else:
            used += need + (part.folder / INDEX_FILE).stat().st_size
        most = max(most, used)
        if not keep and part.folder.stat().st_dev == output.stat().st_dev:
            used -= sum(file.stat().st_size for file in part.folder.glob(SHARD_FILES))
    most = max(most, used if is_npy else used + rows)
    free = shutil.disk_usage(output).free
    logger.info(
        "merging %d shares with the features of %d images: at most %s more on the disk; %s are "
        "free in %s",
        len(parts),
        manifest.num_images,
        format_bytes(most),
        format_bytes(free),
        output,
    )
    if most > free:
        hint = "name another folder, and the shares after it"
        raise FeatureError(
            f"merging needs {format_bytes(most)}, but {output} has {format_bytes(free)} free; "
            + (f"leave out --keep, or {hint}" if keep else hint)
        )


def _copy(writer: Writer, part: _Part, names: Sequence[str], bar: tqdm) -> None:
    """Copy the records of some images, and flush them to the disk."""
    images, records = part.images(), part.records()
    pending = 0
    try:
        for name in names:
            record = records.get(name)
            if record is None:
                raise FeatureError(
                    f"{part.folder} has changed meanwhile; run {part.again} to its end, then merge"
                )
            buffer = read_record(part.folder, record, name)
            descriptor, *arrays = split_record(buffer, record.arrays)
            writer.write(images[name][0], descriptor, arrays, record.modified)
            bar.update(record.bytes)
            pending += record.bytes
            if pending >= COMMIT_BYTES:
                writer.commit()
                pending = 0
    except RecordError as error:
        raise FeatureError(
            f"share {part.share} is damaged: {error}, with --shard {part.share}"
        ) from None
    finally:
        writer.commit()  # keep what is done


def _drop_records(folder: Path, output: Path) -> None:
    """Delete the records of a merged share; its list is still needed."""
    with contextlib.closing(StoreIndex(folder, writable=True)) as index:
        index.add([], [("INSERT OR REPLACE INTO about VALUES ('moved', ?)", (str(output),))])
    with disk_errors(folder):
        for file in folder.glob(SHARD_FILES):
            file.unlink()


def _remove(folder: Path) -> None:
    """Delete a share, except files in its folder that are not ours."""
    with disk_errors(folder):
        (folder / LOCK_FILE).unlink(missing_ok=True)
        erase(folder)
    with contextlib.suppress(OSError):  # not empty
        folder.rmdir()


def _remove_empty_folders(output: Path) -> None:
    """Delete empty folders of shares."""
    below = output / SHARES_FOLDER
    for folder in (*below.glob("*-of-*"), below):
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()
