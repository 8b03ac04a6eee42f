# SPDX-License-Identifier: MIT
"""Names of images and folders: paths and URLs, relative and absolute."""

from __future__ import annotations

import os
import posixpath
import re
from pathlib import Path

_URL = re.compile(r"(?:[A-Za-z][A-Za-z0-9+.-]+::)*[A-Za-z][A-Za-z0-9+.-]+://")  # C:// is not one
# A URL as a Path, which drops one slash.
_PATH_OF_URL = re.compile(r"(s3|s3a|gs|gcs|az|abfs|abfss|http|https|hdfs|file|memory):/(?=[^/])")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is a URL, such as ``s3://bucket/prefix``.

    Examples
    --------
    >>> [is_remote(path) for path in ("s3://b/x", "file:///tmp/x", "tower/x", "C:/x", "C://x")]
    [True, True, False, False, False]
    """
    if isinstance(path, str):
        return "://" in path and _URL.match(path) is not None
    return _PATH_OF_URL.match(os.fspath(path)) is not None


def url_of(path: str | os.PathLike[str]) -> str:
    """Return a path as a URL, with the slash that ``Path`` drops."""
    return path if isinstance(path, str) else _PATH_OF_URL.sub(r"\1://", os.fspath(path))


def locate(root: str | os.PathLike[str], name: str) -> str:
    """Return the location of an image in a list: a URL, or a path on disk, possibly relative.

    Parameters
    ----------
    root : str or Path
        Folder that relative names lie under: a URL, or one on disk.
    name : str
        A name that is a URL or an absolute path stays as it is.

    Returns
    -------
    str

    Examples
    --------
    >>> locate("s3://b/maps/", "seq/../1.jpg"), locate("maps", "s3://b/1.jpg")
    ('s3://b/maps/1.jpg', 's3://b/1.jpg')
    """
    if is_remote(name):
        return name
    if not is_remote(root):
        return os.path.join(root, name)
    if os.path.isabs(name):
        return name
    url = url_of(root).rstrip("/")
    parts = name.split("/")
    if "" in parts or "." in parts or ".." in parts:  # object stores do not resolve these
        scheme, bucket, folder = split_url(url)
        inside = posixpath.normpath(posixpath.join("/", folder, name))
        return f"{scheme}{bucket}{inside}"
    return f"{url}/{name}"


def absolute(path: str | os.PathLike[str]) -> str:
    """Return an absolute path, or a URL unchanged."""
    return url_of(path) if is_remote(path) else os.path.abspath(path)


def absolute_location(location: Path | str) -> Path | str:
    """Return an absolute path, or a URL (a str) unchanged."""
    return location if isinstance(location, str) else Path(os.path.abspath(location))


def normal_name(name: str | os.PathLike[str]) -> str:
    """Return the normal form of an image's name; a URL is returned unchanged."""
    return url_of(name) if is_remote(name) else os.path.normpath(name)


def split_url(url: str) -> tuple[str, str, str]:
    """Split a URL into ``s3://``, the bucket (or host), and the path below, without a slash."""
    scheme, _, rest = url.rpartition("://")
    bucket, _, folder = rest.partition("/")
    return f"{scheme}://", bucket, folder
