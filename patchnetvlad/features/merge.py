# SPDX-License-Identifier: MIT
"""Merging the shares extracted by independent jobs, ``--shard I/N``."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from patchnetvlad.base.files import check_free, check_inputs_stay, digest, free_bytes
from patchnetvlad.base.names import is_remote, normal_name
from patchnetvlad.base.text import format_bytes
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Writer
from patchnetvlad.features.lock import LOCK_FILE, locked
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    SHARD_FILES,
    SHARES_FOLDER,
    erase,
    find_shares,
    other_features_error,
)
from patchnetvlad.features.names import disk_errors, rows_by_name
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.store.codec import split_record
from patchnetvlad.features.store.index import Record, present_manifests, shard_file
from patchnetvlad.features.store.records import RecordError, read_record
from patchnetvlad.features.store.share import Share, ShareFolder, is_finished
from patchnetvlad.features.store.writer import COMMIT_BYTES

logger = logging.getLogger(__name__)

_SHOWN = 5  # shares that a message names


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
        Keep the shares, and copy them. By default their files are moved to ``output``; those that
        cannot be moved are deleted once all their records are there, so that at most one share is
        on the disk twice.
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
    check_inputs_stay([output], folders, "name another folder for the merged features")
    if not folders:
        return _merged_before(output)
    parts = sorted(map(ShareFolder.read, folders), key=lambda part: part.share)
    _check_alike(parts)
    manifest = parts[0].manifest
    # Otherwise an earlier merge was killed during its final clean-up.
    if not (resume and all(part.moved for part in parts) and is_finished(output, manifest)):
        _check_complete(parts)
        names = _whole_list(parts)
        if resume:
            for have in present_manifests(output):
                if have != manifest:
                    raise other_features_error(
                        output, have, manifest, "name another folder, or give --no-resume to "
                        "replace them",
                    )  # fmt: skip
        with open_writer(output, names, manifest, resume=resume) as writer:
            _merge(writer, output, parts, keep, progress)
    for part in parts:
        if part.moved or not keep:
            _remove(part.directory)
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
    logger.info("there are no shares in %s, which is complete already", output)
    _remove_empty_folders(output)
    return have[0].num_images


def _check_alike(parts: Sequence[ShareFolder]) -> None:
    """Raise FeatureError unless the shares are distinct and of one extraction."""
    first = parts[0]
    for part in parts:
        if part.share.count != first.share.count:
            raise FeatureError(
                f"{first.directory} is one of {first.share.count} shares, {part.directory} one of "
                f"{part.share.count}; name those that belong together after the folder, or delete "
                "the others"
            )
        if part.manifest != first.manifest:
            raise FeatureError(
                f"{first.directory} and {part.directory} were extracted with different settings "
                f"({'; '.join(first.manifest.differences(part.manifest))}); extract one of them "
                f"again: feature_extract --shard I/{part.share.count} --no-resume"
            )
    for part, other in itertools.pairwise(parts):
        if part.share == other.share:
            raise FeatureError(
                f"{part.directory} and {other.directory} are the same share {part.share}; name one "
                "of them"
            )


def _check_complete(parts: Sequence[ShareFolder]) -> None:
    """Raise FeatureError unless all shares are there and done."""
    count = parts[0].share.count
    have = {part.share.index for part in parts}
    missing = [Share(i, count) for i in range(count) if i not in have]
    if missing:
        which = ", ".join(map(str, missing[:_SHOWN]))
        raise FeatureError(
            f"{_shares(which, missing)} missing; run feature_extract --shard {missing[0]}, with "
            f"the same arguments as of {parts[0].directory} otherwise"
        )
    waiting = [part for part in parts if part.missing()]
    if waiting:
        which = ", ".join(str(part.share) for part in waiting[:_SHOWN])
        part, without = waiting[0], waiting[0].missing()
        raise FeatureError(
            f"{_shares(which, waiting)} not finished: {part.directory} has no features yet of "
            f"{len(without)} of {len(part.listed)} images, as {without[0]}; run {_again(part)} "
            "again, it resumes from there"
        )


def _again(part: ShareFolder) -> str:
    """Return the command that extracts this share."""
    return f"feature_extract --shard {part.share}"


def _shares(which: str, all_of_them: Sequence[object]) -> str:
    many = len(all_of_them) > 1
    more = ", ..." if len(all_of_them) > _SHOWN else ""
    return f"{len(all_of_them)} shares ({which}{more}) are" if many else f"share {which} is"


def _whole_list(parts: Sequence[ShareFolder]) -> list[str]:
    """Return the whole image list; FeatureError if the shares do not make it up."""
    names = [""] * parts[0].manifest.num_images
    for part in parts:
        for row, name in zip(part.rows, part.listed, strict=True):
            names[row] = name
    total = sum(len(part.rows) for part in parts)
    listed = digest(normal_name(name) for name in names)
    if total != len(names) or listed != parts[0].manifest.images:
        raise FeatureError(
            f"the shares have {total} of {len(names)} images: some are in two shares, or in none. "
            "Were they extracted with different cachebatchsize? Extract them with one, and "
            "--no-resume"
        )
    return names


def _merge(
    writer: Writer, output: Path, parts: Sequence[ShareFolder], keep: bool, progress: bool
) -> None:
    """Take over what is not in ``output``, share by share, and finish.

    Records are moved with their shards where they can be, else copied.
    """
    writer.durable = True
    everything = [record for part in parts for record in part.records().values()]
    todo = [_missing(writer, output, part) for part in parts]
    total = sum(record.bytes for record in everything)
    left = sum(record.bytes for missing in todo for record in missing.values())
    if left < total:
        done = format_bytes(total - left)
        logger.info("%s of %s are in %s already", done, format_bytes(total), output)
    if left:
        _check_space(output, parts, todo, keep)
        writer.start()
    with tqdm(
        total=total,
        initial=total - left,
        desc="Merging",
        unit="B",
        unit_scale=True,
        unit_divisor=1000,
        disable=not progress,
    ) as bar:
        for part, missing in zip(parts, todo, strict=True):
            with locked(part.directory) if not keep else contextlib.nullcontext():
                if not keep:
                    missing = _move_shards(writer, part, missing, bar)
                _copy(writer, part, missing, bar)
                if not keep and not part.moved:
                    part.mark_moved(output)
    writer.finish(modified=max(record.modified for record in everything))


def _missing(writer: Writer, output: Path, part: ShareFolder) -> dict[str, Record]:
    """Return the records of a share that the output has not, by the names of their images."""
    row_of = _first_rows(part)
    missing = {
        name: record
        for name, record in part.records().items()
        if not writer.holds(row_of[name], record)
    }
    if missing and part.moved:
        raise FeatureError(
            f"share {part.share} was moved to {part.moved} before, but {output} has no features of "
            f"{len(missing)} of its images, as {next(iter(missing))}; run {_again(part)} "
            "--no-resume to compute them again"
        )
    return missing


def _first_rows(part: ShareFolder) -> dict[str, int]:
    """Return the first row of each image of a share in the whole list."""
    return {name: part.rows[mine[0]] for name, mine in rows_by_name(part.listed).items()}


def _move_shards(
    writer: Writer, part: ShareFolder, missing: dict[str, Record], bar: tqdm
) -> dict[str, Record]:
    """Move the shards with the records ``missing``; return those that have to be copied."""
    by_shard: dict[int, dict[str, Record]] = {}
    for name, record in missing.items():
        by_shard.setdefault(record.shard, {})[name] = record
    for shard, records in by_shard.items():
        file = shard_file(part.directory, shard)
        end = max(record.start + record.bytes for record in records.values())
        if not file.is_file() or file.stat().st_size < end:
            raise FeatureError(
                f"share {part.share} is damaged: {file} is missing or cut off; run {_again(part)}, "
                "which computes what is missing"
            )
        if writer.adopt_shard(file, list(records.items())):
            missing = {name: r for name, r in missing.items() if name not in records}
            bar.update(sum(record.bytes for record in records.values()))
    return missing


def _check_space(
    output: Path, parts: Sequence[ShareFolder], todo: Sequence[dict[str, Record]], keep: bool
) -> None:
    """Log how much space merging takes at most; FeatureError if too little is free.

    ``todo`` are the records to be taken over from each share.
    """
    manifest = parts[0].manifest
    is_npy = manifest.local_features == "npy"
    head = max(record.head for missing in todo for record in missing.values())
    # .npy files have a header each, and their global descriptors are in one.
    more = 128 * len(manifest.patch_sizes) - head if is_npy else 0
    used = most = head * manifest.num_images
    for part, missing in zip(parts, todo, strict=True):
        there = part.directory.stat().st_dev == output.stat().st_dev and not keep
        if not there or is_npy:
            used += sum(max(0, record.bytes + more) for record in missing.values())
        most = max(most, used)
        if there and is_npy:
            used -= sum(file.stat().st_size for file in part.directory.glob(SHARD_FILES))
    logger.info(
        "merging %d shares with the features of %d images: at most %s more on the disk; %s are "
        "free in %s",
        len(parts),
        manifest.num_images,
        format_bytes(most),
        format_bytes(free_bytes(output)),
        output,
    )
    way_out = "name another folder, and the shares after it"
    if keep:
        way_out = f"leave out --keep, or {way_out}"
    check_free("merging needs", most, output, way_out, FeatureError)


def _copy(writer: Writer, part: ShareFolder, missing: dict[str, Record], bar: tqdm) -> None:
    """Copy records, and flush them to the disk."""
    row_of = _first_rows(part)
    pending = 0
    try:
        for name, record in missing.items():
            buffer = read_record(part.directory, record, name)
            descriptor, *arrays = split_record(buffer, record.arrays)
            writer.write(row_of[name], descriptor, arrays, record.modified)
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
