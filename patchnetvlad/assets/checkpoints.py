# SPDX-License-Identifier: MIT
"""Finding checkpoints, and downloading them from the Hugging Face Hub."""

from __future__ import annotations

import contextlib
import difflib
import errno
import functools
import logging
import os
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from patchnetvlad.assets.catalog import (
    CHECKPOINT_SUFFIXES,
    CHECKPOINTS,
    HUB_REPOSITORY,
    RELEASED_CHECKPOINTS,
    hub_revision,
)
from patchnetvlad.assets.folders import (
    data_home,
    disk_errors,
    expand_home,
    find_asset,
    is_file,
    megabytes,
    path_inside,
    possible_paths,
)
from patchnetvlad.base.files import check_free, drop_link, file_sha256
from patchnetvlad.base.retry import Retries
from patchnetvlad.errors import AssetError

logger = logging.getLogger(__name__)
LARGE_DOWNLOAD = 500 * 10**6  # bytes; above this a person at a terminal is asked first
TRY_DEMO = (
    "To try things without it: --config_path demo, whose weights, imagenet_WPCA128, are in the "
    "package."
)
"""What errors of missing checkpoints end with."""
DOWNLOADS = Retries(first=1.0, attempts=4)

Confirm = Callable[[str, int | None], bool]


class DownloadDeclined(AssetError):
    """The user declined to download a checkpoint."""


def ask(name: str, size: int | None) -> bool:
    """Ask on the terminal whether `name`, of `size` bytes, should be downloaded."""
    try:
        answer = input(f"Download {name} ({megabytes(size)})? [y/n] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def ask_if_large(name: str, size: int | None) -> bool:
    """Ask as :func:`ask` does, but only before a large download and only at a terminal."""
    small = size is not None and size <= LARGE_DOWNLOAD
    return small or sys.stdin is None or not sys.stdin.isatty() or ask(name, size)


def resolve_checkpoint(
    resume_path: str, num_pcs: int, *, pooling: str | None = None, assume_yes: bool = False
) -> Path:
    """Find the checkpoint of a configuration; download it if it is a released one.

    Parameters
    ----------
    resume_path : str
        The configuration's ``resumePath``: a checkpoint file, or its stem, to which the number
        of principal components and ``.pth.tar`` or ``.safetensors`` are appended. It is taken
        relative to the working directory, then to each of :func:`data_dirs`.
    num_pcs : int
        Number of principal components; 0 if the checkpoint has none.
    pooling : str, optional
        The configuration's ``pooling``, for the error message; all kinds share one checkpoint.
    assume_yes : bool, default False
        Skip the question before a large download. It is asked only at a terminal; elsewhere the
        download starts after a line with its size and folder.

    Returns
    -------
    Path
        The checkpoint on this machine.

    Raises
    ------
    AssetError
        If there is no such checkpoint, or it could not be downloaded.
    """
    if (found := find_checkpoint(resume_path, num_pcs)) is not None:
        return found
    given, names = expand_home(resume_path), _file_names(resume_path, num_pcs)
    for name in names:
        if str(released := path_inside(name, CHECKPOINTS)) in RELEASED_CHECKPOINTS:
            return download_checkpoint(str(released), confirm=None if assume_yes else ask_if_large)

    if sizes := _sizes_at_hand(given):
        hint = f"That checkpoint exists with num_pcs = {', '.join(map(str, sizes))}. {TRY_DEMO}"
    else:
        hint = TRY_DEMO
    folders = dict.fromkeys(
        os.path.abspath(place.parent) for place in possible_paths(given, CHECKPOINTS)
    )
    wanted = f"resumePath = {resume_path}, num_pcs = {num_pcs}"
    wanted += f", pooling = {pooling}" if pooling else ""
    raise AssetError(
        f"no checkpoint for {wanted}: "
        f"none of {', '.join(name.name for name in names)} is in {', '.join(folders)}\n{hint}"
    )


def find_checkpoint(resume_path: str, num_pcs: int) -> Path | None:
    """Find the checkpoint of a configuration on this machine; None if it is not here.

    The parameters are those of :func:`resolve_checkpoint`.
    """
    for name in _file_names(resume_path, num_pcs):
        for place in possible_paths(name, CHECKPOINTS):
            if is_file(place):
                return place
    return None


def is_trained_for_places(resume_path: str) -> bool:
    """Return False for the bundled checkpoint, by its name; its encoder was trained on ImageNet."""
    return not re.match(r"imagenet_WPCA", re.split(r"[/\\]", resume_path)[-1])


def _file_names(resume_path: str, num_pcs: int) -> list[Path]:
    """Return what the file of a checkpoint may be called."""
    given = expand_home(resume_path)
    return [given, *(Path(f"{given}{num_pcs or ''}{suffix}") for suffix in CHECKPOINT_SUFFIXES)]


def _sizes_at_hand(stem: Path) -> list[int]:
    """Return the values of num_pcs for which the checkpoint `stem` exists."""
    names = {
        file.name for place in possible_paths(stem, CHECKPOINTS) for file in place.parent.glob("*")
    }
    if path_inside(stem, CHECKPOINTS) == Path(stem.name):
        names |= RELEASED_CHECKPOINTS.keys()
    form = re.compile(re.escape(stem.name) + r"(\d+)(\.pth\.tar|\.safetensors)")
    return sorted({int(match[1]) for name in names if (match := form.fullmatch(name))})


def download_checkpoint(name: str, *, confirm: Confirm | None = None) -> Path:
    """Return a released checkpoint, downloading it from the model hub if it is missing.

    An interrupted download is resumed, by this call or a later one. The file gets its name only
    when it is complete and matches the SHA-256 that the hub states, if any. ``HF_ENDPOINT``,
    ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are honoured; a copy in the hub's own cache is used as it
    is.

    Parameters
    ----------
    name : str
        A key of `RELEASED_CHECKPOINTS`; ``.pth.tar`` may be left out.
    confirm : callable, optional
        Called with the name and the size in bytes (None if unknown) before the download, which
        starts only if it returns True. By default it starts.

    Returns
    -------
    Path
        The checkpoint on this machine.

    Raises
    ------
    DownloadDeclined
        If `confirm` returned False.
    AssetError
        If the name is unknown, the hub cannot be reached, or the disk is full.
    """
    name = name if name.endswith(".pth.tar") else f"{name}.pth.tar"
    if name not in RELEASED_CHECKPOINTS:
        near = difflib.get_close_matches(name, RELEASED_CHECKPOINTS, n=3, cutoff=0.4)
        raise AssetError(
            f"no released checkpoint {name}: there are {', '.join(near or RELEASED_CHECKPOINTS)}\n"
            f"{TRY_DEMO}"
        )
    if (found := find_asset(f"{CHECKPOINTS}/{name}")) is not None:
        return found
    from huggingface_hub import try_to_load_from_cache

    hub_name = RELEASED_CHECKPOINTS[name]
    cached = try_to_load_from_cache(HUB_REPOSITORY, hub_name, revision=hub_revision())
    if isinstance(cached, str):
        return Path(cached)
    return _once(name, functools.partial(_download_from_hub, hub_name, confirm))


def download_weights(url: str) -> Path:
    """Return a file of published weights of an encoder, downloading it if it is missing.

    It is taken from where PyTorch keeps such files, if it lies there. Downloads are resumed, and
    compared with the SHA-256 that the server states, and the part of it that is in the name.

    Parameters
    ----------
    url : str
        Ends in the file's name, such as ``resnet50-0676ba61.pth``.

    Returns
    -------
    Path
        The file on this machine.

    Raises
    ------
    AssetError
        If the server cannot be reached, or the disk is full.
    """
    from torch.hub import get_dir

    name = url.rpartition("/")[2]
    if (found := find_asset(f"{CHECKPOINTS}/{name}")) is not None:
        return found
    of_torch = Path(get_dir(), "checkpoints", name)
    if is_file(of_torch):
        return of_torch

    def download(target: Path, staging: Path) -> None:
        source = _Source(url, lambda commit: url, url.rpartition("/")[0], token=False)

        def failure_error(reason: str) -> AssetError:
            return AssetError(
                f"could not download {name}: {reason}\n"
                f"Get {url} by hand and put it at {target}. patchnetvlad-fit --random needs no "
                "weights, to try things: what it makes recognises nothing."
            )

        _download(source, target, staging, ask_if_large, failure_error)

    return _once(name, download)


def _once(name: str, download: Callable[[Path, Path], None]) -> Path:
    """Download a file where it is missing, in one process at a time; return its path.

    ``download`` gets the path of the file, and a folder for what has arrived of it.
    """
    from filelock import FileLock

    target = data_home() / CHECKPOINTS / name
    staging = target.parent / ".download"
    with disk_errors(name, target.parent):
        staging.mkdir(parents=True, exist_ok=True)
        lock = staging / f"{name}.lock"
        try:
            with FileLock(lock):
                if not target.is_file():  # another process may have just put it there
                    download(target, staging)
        finally:
            if not list(staging.glob(f"{name}.*.part")):  # a broken download is kept
                lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                staging.rmdir()
    return target


@dataclass(frozen=True)
class _Source:
    """Where a file comes from.

    Attributes
    ----------
    url : str
        Answers with the file's size and hash.
    body : callable
        From the commit that is stated there, if any, to the URL of the file itself.
    title : str
        What the file is of, for messages.
    token : bool or None
        False keeps the user's token of the hub from other servers.
    """

    url: str
    body: Callable[[str | None], str]
    title: str
    token: bool | None = None


def _download_from_hub(hub_name: str, confirm: Confirm | None, target: Path, staging: Path) -> None:
    from huggingface_hub import hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = hf_hub_url(HUB_REPOSITORY, hub_name, revision=hub_revision(), endpoint=endpoint)

    def failure_error(reason: str) -> AssetError:
        return AssetError(
            f"could not download {hub_name} from the model hub: {reason}\n"
            f"Get {url} by hand and put it at {target}, or let HF_ENDPOINT name a mirror. "
            f"{TRY_DEMO}"
        )

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise failure_error("HF_HUB_OFFLINE is set")

    def body(commit: str | None) -> str:
        return hf_hub_url(HUB_REPOSITORY, hub_name, revision=commit, endpoint=endpoint)

    source = _Source(url, body, HUB_REPOSITORY)
    _download(source, target, staging, confirm, failure_error)


def _download(
    source: _Source,
    target: Path,
    staging: Path,
    confirm: Confirm | None,
    failure_error: Callable[[str], AssetError],
) -> None:
    """Download a file, and give it its name when it is complete and verified."""
    from huggingface_hub import get_hf_file_metadata

    try:
        metadata = get_hf_file_metadata(source.url, token=source.token)
    except Exception as error:
        raise failure_error(_hub_reason(error)) from error
    size, digest = metadata.size, re.sub(r"\W", "", metadata.etag or "")
    part = staging / f"{target.name}.{digest[:16]}.part"
    missing = (size or 0) - (part.stat().st_size if part.is_file() else 0)
    way_out = f"set PATCHNETVLAD_HOME to a folder on a larger disk. {TRY_DEMO}"
    check_free(f"{target.name} needs", missing, target.parent, way_out, AssetError)
    if confirm is not None and not confirm(target.name, size):
        raise DownloadDeclined(
            f"{target.name} ({megabytes(size)}) was not downloaded, as asked\n{TRY_DEMO}"
        )
    # With the commit, the body is the one that the size and the hash belong to.
    revision = metadata.commit_hash
    logger.info(
        "downloading %s (%s), %s%s, to %s",
        *(target.name, megabytes(size), f"revision {revision} of " if revision else "from "),
        *(source.title, target.parent),
    )
    try:
        _transfer(source.body(revision), part, size, source.token)
    except Exception as error:
        if _is_of_disk(error):
            raise
        raise failure_error(_hub_reason(error)) from error
    named = re.search(r"-([0-9a-f]{8,64})\.", target.name)  # as PyTorch names files
    expected = named[1] if named else digest if re.fullmatch("[0-9a-f]{64}", digest) else ""
    if not expected:
        logger.info("the server states no SHA-256 of %s: it could not be verified", target.name)
    elif not file_sha256(part).startswith(expected):
        part.unlink()
        raise failure_error("what arrived is damaged (wrong sha256) and was deleted")
    os.replace(part, target)


def _transfer(url: str, part: Path, size: int | None, token: bool | None = None) -> None:
    """Append the missing bytes of `url` to `part`; resume if the connection breaks."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    waits = DOWNLOADS.waits()
    while True:
        drop_link(part)
        with part.open("ab") as file:
            have = file.tell()
            if size is None or have > size:
                file.truncate(have := 0)
            if have == size:
                return
            try:
                http_get(
                    url,
                    file,
                    resume_size=have,
                    headers=build_hf_headers(token=token),
                    expected_size=size,
                    displayed_filename=part.name.partition(".")[0],
                )
                return
            except Exception as error:
                wait = next(waits, None) if _is_transient(error) else None
                if wait is None:
                    raise
                logger.info("%s; trying again", _hub_reason(error))
        time.sleep(wait)


def _status(error: Exception) -> int | None:
    """Return the HTTP status of an error of the hub library, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_of_disk(error: Exception) -> bool:
    """Return True for a full or unwritable disk; a broken connection is an OSError, too."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    return isinstance(error, OSError) and error.errno in disk


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    return not _is_of_disk(error) if status is None else status in (408, 429) or status >= 500


def _hub_reason(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        return f"HTTP status {status}"
    return next(iter(str(error).splitlines()), "")[:160] or type(error).__name__
