# SPDX-License-Identifier: MIT
"""Object storage: folders that have a URL, such as ``s3://bucket/prefix``, through fsspec.

Requests are retried with exponential backoff, unless the error is permanent. fsspec is imported
only when there is a URL. Endpoint, region and credentials come from the environment
(``AWS_ENDPOINT_URL``, ``AWS_ACCESS_KEY_ID``, ..., ``~/.aws``) and from fsspec's configuration.

obstore (0.12) passes the same tests with a failing network, and has less overhead, but a process
that forks after using it hangs in the child, and it reads no profiles of ``~/.aws``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import posixpath
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from patchnetvlad.base.files import new_file
from patchnetvlad.base.names import split_url, url_of
from patchnetvlad.base.retry import Retries
from patchnetvlad.errors import RemoteAccessError, RemoteError, RemoteNotFoundError

ATTEMPTS = 8
"""Number of attempts at a request."""

GIVE_UP_SECONDS = 180.0
"""Time after which a failing request is not retried."""

FIRST_WAIT, LONGEST_WAIT = 0.2, 15.0
"""Seconds before the second attempt, and the longest wait; it doubles in between."""

PART_BYTES = 16 * 2**20
"""Large objects are copied in parts of this size, a few at a time."""

_PARTS_AT_A_TIME = 4
_T = TypeVar("_T")


@dataclass(frozen=True)
class RemoteFolder:
    """A folder in object storage. It can be pickled and used from several threads.

    Parameters
    ----------
    url : str or Path
        Such as ``s3://bucket/prefix``; any URL that fsspec knows.
    options : dict, optional
        For fsspec's file system, beside those of the environment, such as ``{"anon": True}``.

    Raises
    ------
    RemoteNotFoundError
        From any method: there is no such object.
    RemoteAccessError
        The credentials do not allow it.
    RemoteError
        The store cannot be reached, has no such bucket, or a package is missing.
    """

    url: str
    options: dict[str, Any] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        scheme, _, rest = url_of(self.url).rpartition("://")
        object.__setattr__(self, "url", f"{scheme}://{rest.rstrip('/')}")

    def __str__(self) -> str:
        return self.url

    def child(self, name: str) -> RemoteFolder:
        """Return a folder in this one."""
        return RemoteFolder(self.url_of(name), self.options)

    def url_of(self, name: str) -> str:
        """Return the URL of an object in this folder."""
        return f"{self.url}/{name}" if name else self.url

    def read(self, name: str, start: int = 0, size: int | None = None) -> bytes:
        """Read an object, or bytes ``start`` to ``start + size`` of it.

        Parameters
        ----------
        name : str
        start : int, default 0
        size : int, optional
            By default, up to the end.

        Returns
        -------
        bytes
            Fewer than ``size`` only where the object ends.
        """
        return self._try("read", name, lambda files, path: _read(files, path, start, size))

    def write(self, name: str, data: bytes | Path) -> None:
        """Write an object atomically.

        Parameters
        ----------
        name : str
        data : bytes or Path
            Its content, or a file with it.
        """
        size = len(data) if isinstance(data, bytes) else data.stat().st_size
        self._try("written", name, lambda files, path: _write(files, path, data, size))

    def names(self, prefix: str = "") -> dict[str, int]:
        """List objects.

        Parameters
        ----------
        prefix : str, default ""
            Start of their names.

        Returns
        -------
        dict of str to int
            Sizes in bytes by name, relative to this folder, with ``/`` between folders; sorted by
            name. Empty if there is no such folder.
        """
        scheme, bucket, folder = split_url(self.url)
        if scheme in _S3:
            inside = f"{folder}/" if folder else ""
            pages = self._s3_pages(bucket, inside + prefix)
            found = {key[len(inside) :]: size for key, size in pages}
        else:
            found = self._try("listed", "", _listed)
        return {name: found[name] for name in sorted(found) if name.startswith(prefix)}

    def _s3_pages(self, bucket: str, prefix: str) -> Iterator[tuple[str, int]]:
        """List keys page by page: fsspec restarts after an error, and older versions just stop."""
        more: dict[str, Any] = {}
        while True:

            def page(files: Any, path: str, more: dict[str, Any] = more) -> dict[str, Any]:
                answer = files.call_s3("list_objects_v2", Bucket=bucket, Prefix=prefix, **more)
                if answer.get("IsTruncated") and not answer.get("NextContinuationToken"):
                    raise _CutShortError("a page of the listing is cut short")
                return dict(answer)

            answer = self._try("listed", "", page)
            for entry in answer.get("Contents", ()):
                if not entry["Key"].endswith("/"):  # what consoles leave for a folder
                    yield entry["Key"], entry["Size"]
            if not answer.get("IsTruncated"):
                return
            more = {"ContinuationToken": answer["NextContinuationToken"]}

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; missing ones are ignored."""

        def remove(name: str) -> None:
            with contextlib.suppress(RemoteNotFoundError):
                self._try("deleted", name, lambda files, path: files.rm_file(path))

        with ThreadPoolExecutor(_PARTS_AT_A_TIME) as pool:
            list(pool.map(remove, names))

    def size(self, name: str) -> int:
        """Return the size of an object in bytes."""
        return int(self._try("read", name, _info)["size"])

    def revision(self, name: str) -> str:
        """Return a token that changes whenever the object is rewritten (such as its ETag)."""
        info = self._try("read", name, _info)
        keys = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created", "size")
        return " ".join(str(info[key]) for key in keys if key in info)

    def fetch(self, name: str, file: Path) -> Path:
        """Copy an object to a file, in parts, and return the file.

        OSError if it cannot be written.
        """
        size, revision = self.size(name), self.revision(name)

        def move(temporary: Path, start: int) -> None:
            part = self.read(name, start, min(PART_BYTES, size - start))
            with temporary.open("r+b") as stream:
                stream.seek(start)
                stream.write(part)

        with new_file(file) as temporary:
            with temporary.open("wb") as stream:
                stream.truncate(size)
            with ThreadPoolExecutor(_PARTS_AT_A_TIME) as pool:
                list(pool.map(partial(move, temporary), range(0, size, PART_BYTES)))
            if self.revision(name) != revision:
                raise RemoteError(
                    f"{self.url_of(name)} was rewritten while it was read; try again when that "
                    "has ended"
                )
        return file

    def _try(self, what: str, name: str, request: Callable[[Any, str], _T]) -> _T:
        """Call a request with the file system and the path, with retries."""
        url = self.url_of(name)
        files, path = _open(url, self.options)
        return _retried(url, what, lambda: request(files, path))


def read_url(url: str, start: int = 0, size: int | None = None) -> bytes:
    """Read the object at a URL; parameters and errors as for :meth:`RemoteFolder.read`."""
    folder, _, name = url.rpartition("/")
    return RemoteFolder(folder).read(name, start, size)


_S3 = ("s3://", "s3a://")
# Writing there is atomic; elsewhere, a file would be seen growing.
_OBJECT_STORES = (*_S3, "gs://", "gcs://", "az://", "abfs://", "abfss://", "adl://", "memory://")


class _CutShortError(Exception):
    """Fewer bytes arrived than there are."""


def _read(files: Any, path: str, start: int, size: int | None) -> bytes:
    if size == 0:
        return b""
    # s3fs asks for the size first, unless a range is given.
    whole = start == 0 and size is None and not _is_s3(files)
    span = {} if whole else {"start": start, "end": None if size is None else start + size}
    try:
        data: bytes = files.cat_file(path, **span)
    except Exception as error:
        if _code(error) not in ("InvalidRange", "416"):
            raise
        data = b""  # it ends before
    # A body of unknown length may be cut short unnoticed; a broken connection is noticed.
    if (size is not None and len(data) < size) or (not data and not whole):
        there = max(0, _info(files, path)["size"] - start)
        if len(data) != (there if size is None else min(there, size)):
            raise _CutShortError(f"{len(data)} bytes arrived, of {there}")
    elif size is not None and len(data) > size:
        raise _CutShortError(f"{len(data)} bytes arrived, {size} were requested")
    return data


def _write(files: Any, path: str, data: bytes | Path, size: int) -> None:
    if f"{_protocol(files)}://" in _OBJECT_STORES:
        _put(files, path, data, size)
    else:
        files.makedirs(posixpath.dirname(path), exist_ok=True)
        temporary = f"{path}.{uuid.uuid4().hex[:8]}.part"
        try:
            _put(files, temporary, data, size)
            files.mv(temporary, path)
        except BaseException:
            with contextlib.suppress(Exception):
                files.rm_file(temporary)
            raise
    there = _info(files, path)["size"]
    if there != size:
        raise _CutShortError(f"{there} bytes are there, of {size}")


def _put(files: Any, path: str, data: bytes | Path, size: int) -> None:
    if isinstance(data, bytes):
        files.pipe_file(path, data)
    else:
        # A store takes no more than 10 000 parts.
        parts = {"chunksize": max(PART_BYTES, size // 9000)} if _is_s3(files) else {}
        files.put_file(str(data), path, **parts)


def _info(files: Any, path: str) -> dict[str, Any]:
    files.invalidate_cache()
    info: dict[str, Any] = files.info(path)
    if info.get("type") == "directory":
        raise FileNotFoundError(path)
    return info


def _listed(files: Any, path: str) -> dict[str, int]:
    files.invalidate_cache()
    try:
        found = files.find(path, detail=True)
    except FileNotFoundError:
        return {}
    root = path.rstrip("/") + "/"
    return {
        name[len(root) :]: info["size"] for name, info in found.items() if name.startswith(root)
    }


def _retried(url: str, what: str, request: Callable[[], _T]) -> _T:
    """Make a request until it succeeds, fails permanently, or has had all its attempts."""
    policy = Retries(FIRST_WAIT, LONGEST_WAIT, ATTEMPTS, GIVE_UP_SECONDS, spread=0.5)
    begin, waits, attempt = time.monotonic(), policy.waits(), 0
    scheme, _, _ = split_url(url)
    while True:
        attempt += 1
        try:
            return request()
        except Exception as error:  # each file system raises its own
            if not _is_transient(error):
                raise _refusal_error(url, what, error) from None
            wait = next(waits, None)
            if attempt >= _CONNECTS and scheme not in _S3 and _is_unreachable(error):
                wait = None  # no storage that is restarted, but a host that is not there
            if wait is None:
                seconds = time.monotonic() - begin
                right = "AWS_ENDPOINT_URL or the region" if scheme in _S3 else "the URL"
                raise RemoteError(
                    f"{url} cannot be {what}: given up after {attempt} attempts in {seconds:.0f} s "
                    f"({_reason(error)}); is the storage up, and {right} right? Run the same "
                    "command again when it is, nothing is lost"
                ) from None
        time.sleep(wait)


_TRANSIENT_CODES = {
    "BadDigest", "IncompleteBody", "InternalError", "NoSuchUpload", "RequestTimeout",
    "RequestTimeoutException", "ServiceUnavailable", "SlowDown", "Throttling",
    "ThrottlingException", "TooManyRequests", "XAmzContentSHA256Mismatch",
}  # fmt: skip
_TRANSIENT_KINDS = {
    "ClientConnectionError", "ClientPayloadError", "ConnectionError", "HTTPClientError",
    "IncompleteRead", "IncompleteReadError", "ResponseParserError", "TimeoutError",
}  # fmt: skip
"""By name, of botocore, aiohttp, asyncio and others, which are not imported."""

_CONNECTS = 3  # attempts to connect to a web server

_FINAL = {
    errno.EACCES, errno.EEXIST, errno.EINVAL, errno.EISDIR, errno.ENAMETOOLONG, errno.ENOENT,
    errno.ENOSPC, errno.ENOSYS, errno.ENOTDIR, errno.EPERM, errno.EROFS,
}  # fmt: skip


def _is_transient(error: BaseException) -> bool:
    if isinstance(error, _CutShortError):
        return True
    status = _status(error)
    if _code(error) in _TRANSIENT_CODES or status in (408, 429) or status >= 500:
        return True
    if status >= 300:
        return False
    if {kind.__name__ for kind in type(error).__mro__} & _TRANSIENT_KINDS:
        return True
    if isinstance(error, (FileNotFoundError, PermissionError, FileExistsError)):
        return False
    # s3fs makes an OSError of any answer, some with another number for 500 and 503.
    return isinstance(error, OSError) and error.errno not in _FINAL


def _is_unreachable(error: BaseException) -> bool:
    return "ClientConnectorError" in {kind.__name__ for kind in type(error).__mro__}


def _response(error: BaseException) -> dict[str, Any]:
    """Return the response of S3 behind an error, as botocore keeps it; empty if there is none.

    s3fs raises its own errors, caused by botocore's.
    """
    cause: BaseException | None = error
    for _ in range(4):
        response = getattr(cause, "response", None)
        if isinstance(response, dict):
            return response
        cause = cause.__cause__ if cause is not None else None
    return {}


def _code(error: BaseException) -> str:
    return str(_response(error).get("Error", {}).get("Code", ""))


def _status(error: BaseException) -> int:
    """Return the HTTP status behind an error; 0 where it is not known."""
    status = _response(error).get("ResponseMetadata", {}).get("HTTPStatusCode")
    for value in (status, getattr(error, "status", None), getattr(error, "code", None)):
        with contextlib.suppress(TypeError, ValueError):
            return int(value)  # type: ignore[arg-type]
    return 0


def _reason(error: BaseException) -> str:
    answer = _response(error).get("Error", {})
    text = " ".join(str(answer.get("Message") or error).split())[:200]
    name = _code(error) or type(error).__name__.strip("_")
    return f"{name}: {text}" if text else name


def _refusal_error(url: str, what: str, error: Exception) -> RemoteError:
    """Return the error of a request that is not retried."""
    if isinstance(error, RemoteError):
        return error
    code, (scheme, bucket, _) = _code(error), split_url(url)
    if code == "NoSuchBucket":
        return RemoteError(f"{url} cannot be {what}: there is no bucket {bucket}; is it right?")
    if isinstance(error, FileNotFoundError):
        return RemoteNotFoundError(f"{url} does not exist")
    reason = _reason(error)
    if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
        where = (
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
            if scheme in _S3
            else "the environment"
        )
        return RemoteAccessError(
            f"{url} cannot be {what}: access denied ({reason}); check the credentials in {where}"
        )
    return RemoteError(f"{url} cannot be {what} ({reason}); is the URL right?")


_file_systems: dict[tuple[int, str], Any] = {}  # of S3, by process and settings
_opening = threading.Lock()


def _after_fork() -> None:
    global _opening
    _opening = threading.Lock()  # another thread may have held it
    if "fsspec.asyn" in sys.modules:  # older versions wait for their thread, which is not here
        sys.modules["fsspec.asyn"].reset_lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def _open(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    """Return this process's file system for a URL, and the path in it."""
    scheme, _, _ = split_url(url)
    with _opening_errors(scheme):
        if scheme in _S3:
            return _s3(options), url[len(scheme) :]
        import fsspec

        # fsspec keeps one per thread.
        files, path = fsspec.core.url_to_fs(url, use_listings_cache=False, **options)
        return files, path


def _s3(options: dict[str, Any]) -> Any:
    given = [entry for entry in os.environ.items() if entry[0].startswith("AWS_")]
    key = os.getpid(), repr((sorted(options.items()), sorted(given)))
    files = _file_systems.get(key)
    if files is not None:
        return files
    with _opening:
        if key not in _file_systems:
            _file_systems[key] = _new_s3(options)
        return _file_systems[key]


def _new_s3(options: dict[str, Any]) -> Any:
    import fsspec
    from fsspec.config import apply_config

    kind: Any = fsspec.get_filesystem_class("s3")
    given = apply_config(kind, options)
    config = {"connect_timeout": 10, "read_timeout": 30, "max_pool_connections": 32}
    if not {"AWS_MAX_ATTEMPTS", "AWS_RETRY_MODE"} & set(os.environ):
        # For each part of a large object; an object that still fails is retried as a whole.
        config["retries"] = {"mode": "standard", "total_max_attempts": 3}  # type: ignore[assignment]
    # An instance of our own, since it is changed; cached listings would be stale.
    own = {"use_listings_cache": False, "skip_instance_cache": True}
    config_kwargs = {**config, **given.get("config_kwargs", {})}
    files = kind(**{**given, **own, "config_kwargs": config_kwargs})
    files.retries = 1  # in addition to botocore's and ours
    files.max_concurrency = _PARTS_AT_A_TIME
    files.connect()  # here, where no other thread does
    return files


@contextlib.contextmanager
def _opening_errors(scheme: str) -> Iterator[None]:
    try:
        yield
    except ImportError as error:
        if scheme in _S3 or error.name == "fsspec":
            package = "s3fs" if scheme in _S3 else "fsspec"
            raise RemoteError(
                f"{scheme} needs the package {package}: pip install 'patchnetvlad[s3]'"
            ) from None
        raise RemoteError(f"{scheme} needs another package: {_reason(error)}") from None
    except Exception as error:  # such as a missing profile
        raise RemoteError(
            f"{scheme} cannot be opened ({_reason(error)}); check its settings in the environment"
        ) from None


def _protocol(files: Any) -> str:
    return files.protocol if isinstance(files.protocol, str) else files.protocol[0]


def _is_s3(files: Any) -> bool:
    return f"{_protocol(files)}://" in _S3
