# SPDX-License-Identifier: MIT
"""Features in the layout of the research code: one ``.npy`` file per image and patch size.

Each code reads the files of the other. ``features.json``, beside ``globalfeats.npy``, says what the
features were made from.
"""

from __future__ import annotations

import os
import threading
import zlib
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import atomic_file, time_stamp
from patchnetvlad.base.names import is_remote, normal_name
from patchnetvlad.base.text import one_line
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    Manifest,
    check_fits,
    find_shares,
    read_manifest,
)
from patchnetvlad.features.store.codec import Arrays

Array = NDArray[np.float32]

# NumPy reads the head of a file with ast.literal_eval, which can fail where several threads call it
# (seen with CPython 3.11: "AST constructor recursion depth mismatch").
_HEADERS = threading.Lock()


def patch_file(directory: Path, prefix: str, patch_size: int, name: str, naming: str) -> Path:
    """Return the file of one image's patch descriptors at one size.

    Parameters
    ----------
    directory : Path
    prefix : str
        ``patchfeats``.
    patch_size : int
    name : str
        The image's name in its list.
    naming : {"stem", "path"}
        ``patchfeats_psize5_{stem}.npy``, or ``patchfeats_psize5_{relative path}.npy``, where
        the path keeps its folders and its extension.

    Returns
    -------
    Path
    """
    if naming == "stem":
        tail = os.path.splitext(os.path.basename(name))[0]
    else:
        parts = PurePosixPath(name.replace("://", "/", 1) if is_remote(name) else name).parts
        tail = "/".join("__" if part == ".." else part for part in parts if part not in ("/", "."))
    return directory / f"{prefix}_psize{patch_size}_{tail}.npy"


def check_unique(names: Sequence[str], naming: str) -> None:
    """Raise FeatureError if two images would share a file."""
    seen: dict[Path, str] = {}
    for name in names:
        file = patch_file(Path(), "patchfeats", 0, name, naming)
        if file in seen:
            other = seen[file]
            if normal_name(other) == normal_name(name):
                continue  # the same image again, with the same features
            hint = (
                "give --feature_names path, which keeps the folders in the names"
                if naming == "stem"
                else "rename one of them"
            )
            raise FeatureError(
                f"the images {other} and {name} would share the feature file {file.name}; {hint}"
            )
        seen[file] = name


class NpyReader(Reader):
    """Reads a feature directory of this package or of the research code.

    Parameters
    ----------
    directory : str or Path
    names : sequence of str
        The image list that the features were extracted from.
    config : Config, optional
        The configuration for matching, whose patch sizes are given; by default all. FeatureError
        without for features of the research code.
    dataset_root : str or Path, default ""
        Folder that relative names lie under.
    image_paths : sequence of Path or str, optional
        Where the images are, whose time stamps are not known without. The age of a URL is not
        known, either.

    Raises
    ------
    FeatureError
        The directory or a file is missing, or was made from another list or configuration.
    """

    kind = "npy"
    directory: Path

    def __init__(
        self,
        directory: str | Path,
        names: Sequence[str],
        config: Config | None = None,
        dataset_root: str | Path = "",
        image_paths: Sequence[Path | str] | None = None,
    ) -> None:
        self.directory = Path(directory)
        self.names = names
        self.global_descriptors = load_global_descriptors(self.directory, names)
        self.manifest = read_manifest(self.directory / MANIFEST_FILE)
        if not is_as_written(self.global_descriptors, self.manifest):
            raise FeatureError(
                f"{self.directory / GLOBAL_FILE} was changed or damaged after its extraction; "
                f"extract again with --no-resume, or delete {MANIFEST_FILE} beside it to use it "
                "unchecked"
            )
        if self.manifest is None and config is None:
            raise FeatureError(
                f"{directory} holds features of the research code, which do not say what they were "
                "made with: give --config_path, the configuration that they were extracted with"
            )
        if self.manifest is not None and config is not None:
            check_fits(self.directory, self.manifest, names, config, dataset_root)
        made: Any = config or self.manifest
        has_patches = config is None or config.uses_patches
        self.stored_sizes = self.patch_sizes = made.patch_sizes if has_patches else ()
        self._naming = self.manifest.naming if self.manifest else "stem"
        self._image_paths = image_paths

    def _files(self, i: int) -> list[Path]:
        return [
            patch_file(self.directory, "patchfeats", size, self.names[i], self._naming)
            for size in self.patch_sizes
        ]

    def arrays(self, i: int) -> Arrays:
        """Read the files."""
        return load_patches(self._files(i))

    def descriptor(self, i: int) -> Array:
        """Return a row of ``globalfeats.npy``."""
        return self.global_descriptors[i]

    def shapes(self, i: int) -> list[Sequence[int]]:
        """Look at the heads of the files."""
        return [map_array(file).shape[::-1] for file in self._files(i)]

    def size(self, i: int) -> int:
        """Return the bytes of the files."""
        return sum(file.stat().st_size for file in self._files(i) if file.is_file())

    def modified(self, i: int) -> int:
        """Return the time stamp of the image, unless it has changed since."""
        if self._image_paths is None:
            return 0
        stamp = time_stamp(self._image_paths[i])
        files = self._files(i) or [self.directory / GLOBAL_FILE]
        return stamp if stamp <= min(map(time_stamp, files)) else 0


def load_global_descriptors(
    directory: Path, names: Sequence[str], failed: Collection[int] = ()
) -> Array:
    """Read ``globalfeats.npy`` [N, P] of N named images; FeatureError if it does not fit.

    Only the rows ``failed`` may be non-finite.
    """
    file = directory / GLOBAL_FILE
    if not file.is_file():
        traces = (f"{GLOBAL_FILE}.part", INDEX_FILE)
        hint = (
            f"its shares are not merged yet; run patchnetvlad-store merge {directory}"
            if find_shares(directory)
            else "its extraction is not finished; run feature_extract again, it resumes from there"
            if any((directory / trace).is_file() for trace in traces)
            else "run feature_extract with this --output_features_dir first"
        )
        raise FeatureError(f"there is no {GLOBAL_FILE} in {directory}: {hint}")
    rows = load_array(file)
    if len(rows) != len(names):
        raise FeatureError(
            f"{file} has {len(rows)} rows for {len(names)} images in the list; it was extracted "
            "from another list"
        )
    bad = np.flatnonzero(~np.isfinite(rows).all(axis=1))
    for i in bad.tolist():
        if i not in failed:
            raise FeatureError(f"{file}: row {i} ({names[i]}) is not finite; extract again")
    return rows


def rows_crc32(rows: NDArray[Any]) -> int:
    """Return the CRC-32 of global descriptors [N, P], as float32."""
    return zlib.crc32(np.ascontiguousarray(rows, dtype="<f4").data)


def is_as_written(rows: NDArray[Any], manifest: Manifest | None) -> bool:
    """Return False if global descriptors do not agree with the checksum in the manifest."""
    known = manifest.global_crc32 if manifest is not None else 0
    return not known or rows_crc32(rows) == known


def load_patches(files: Iterable[Path]) -> Arrays:
    """Read the patch descriptors of one image: [n_s, P] of float32, of each file [P, n_s].

    FeatureError as a file is missing or damaged.
    """
    return [np.ascontiguousarray(load_array(file).T) for file in files]


def load_array(file: Path) -> Array:
    """Read a matrix of descriptors [n, m] as float32; FeatureError if it is missing or damaged."""
    return np.array(map_array(file), np.float32)


class ArrayError(FeatureError):
    """A file that holds no matrix; ``problem`` says why in a few words."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(f"the feature file {file} {problem}; delete it and extract again")
        self.problem = problem


def map_array(file: Path) -> NDArray[np.floating[Any]]:
    """Map a matrix of descriptors [n, m] into memory, in its own dtype.

    Raises
    ------
    FeatureError
        If the file is missing or damaged, or holds something else.
    """
    try:
        with _HEADERS:
            values = np.load(file, mmap_mode="r", allow_pickle=False)
    except FileNotFoundError:
        raise FeatureError(
            f"the feature file {file} is missing; run feature_extract for its image list"
        ) from None
    except Exception as error:  # NumPy raises errors of many types
        raise ArrayError(file, f"is damaged ({one_line(error)})") from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f":
        raise ArrayError(file, "does not hold a matrix of descriptors")
    return values


def save_array(file: Path, values: NDArray[Any], *, sync: bool = False) -> None:
    """Write an array to a ``.npy`` file atomically; ``sync`` makes it survive a power failure."""
    with atomic_file(file) as stream:
        np.save(stream, values, allow_pickle=False)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())
