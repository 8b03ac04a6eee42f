# SPDX-License-Identifier: MIT
"""Features in the layout of the research code: one ``.npy`` file per image and patch size.

Each code reads the files of the other. ``features.json``, beside ``globalfeats.npy``, says what the
features were made from.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import (
    atomic_file,
    remove_leftovers,
    set_time_stamp,
    sync_folder,
    time_stamp,
    write_all,
)
from patchnetvlad.base.names import is_remote, normal_name
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    Manifest,
    check_fits,
    erase,
    find_shares,
)
from patchnetvlad.features.names import disk_errors, places_of, unfinished
from patchnetvlad.features.store.codec import Arrays

Array = NDArray[np.float32]

# NumPy reads the head of a file with ast.literal_eval, which can fail where several threads call it
# (seen with CPython 3.11: "AST constructor recursion depth mismatch").
_HEADERS = threading.Lock()


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; None if there is none, as in directories of the research code."""
    hint = "delete it to use the features unchecked, or extract again with --no-resume"
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise FeatureError(f"{path} is damaged ({error}); {hint}") from None
    return Manifest.from_json(text, path, hint)


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


class NpyWriter:
    """Writes ``.npy`` files, and resumes an interrupted run.

    Patch files come first; then the image's row of ``globalfeats.npy.part``. A finite row
    therefore marks a finished image. :meth:`finish` renames the file to its final name.

    Parameters
    ----------
    directory : Path
    names : sequence of str
        The image list.
    manifest : Manifest
    image_paths : sequence of Path or str, optional
        Where the images are: features older than their image are not reused. The age of a URL is
        not known.
    resume : bool, default True
        False replaces what is there.

    Attributes
    ----------
    done : ndarray [N] of bool
        Images whose features are on disk.
    durable : bool
        Whether what is committed survives a power failure, too, which takes longer; False at
        first.

    Raises
    ------
    FeatureError
        Two images would share a file.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        manifest: Manifest,
        image_paths: Sequence[Path | str] | None = None,
        resume: bool = True,
    ) -> None:
        if manifest.patch_sizes:
            check_unique(names, manifest.naming)
        self.directory = directory
        self.names = names
        self.manifest = manifest
        self.image_paths = image_paths
        self.done = np.zeros(len(names), dtype=bool)
        self._rows_of = places_of(names)
        self._finished = directory / GLOBAL_FILE
        self._finished_manifest = directory / MANIFEST_FILE
        self._partial = directory / f"{GLOBAL_FILE}.part"
        self._partial_manifest = directory / f"{MANIFEST_FILE}.part"
        self._continued = manifest  # of an earlier run; equal except for its rounding
        self._rows: Array | None = None  # of an earlier run
        self._file: IO[bytes] | None = None  # the partial one
        self._start = 0  # of its rows
        self._resumed = False
        self.durable = False
        self._folders: set[Path] = set()  # below the directory, with files not yet committed
        if resume:
            self._look()

    def _look(self) -> None:
        """Find what an earlier run has left here."""
        files = (self._finished_manifest, self._partial_manifest)
        have = [manifest for manifest in map(read_manifest, files) if manifest is not None]
        if not have or any(manifest != self.manifest for manifest in have):
            return
        self._continued = have[0]
        for file in (self._finished, self._partial):
            self._rows = self._read_rows(file)
            if self._rows is not None:
                self._resumed = file == self._partial
                return

    def _read_rows(self, file: Path) -> Array | None:
        """Read global descriptors, and mark their images as done; None if they cannot be used."""
        try:
            rows = load_array(file)
        except FeatureError:
            return None
        if len(rows) != len(self.names):
            return None
        for i in np.flatnonzero(np.isfinite(rows).all(axis=1)).tolist():
            self.done[i] = self._is_current(i, file)
        return rows

    def _is_current(self, i: int, file: Path) -> bool:
        """Return True if the files of image ``i`` are complete and not older than the image."""
        files = [self._patch_file(i, size) for size in self.manifest.patch_sizes]
        try:
            for patches in files:
                map_array(patches)  # raises if it is truncated
            oldest = min(path.stat().st_mtime_ns for path in files or [file])
            image = self.image_paths[i] if self.image_paths is not None else ""
            return isinstance(image, str) or image.stat().st_mtime_ns <= oldest
        except (FeatureError, OSError):
            return False

    def _patch_file(self, i: int, size: int) -> Path:
        return patch_file(self.directory, "patchfeats", size, self.names[i], self.manifest.naming)

    def _open(self, dimension: int) -> IO[bytes]:
        """Create the partial file from existing rows, and delete finished features."""
        rows = self._rows
        if rows is None or rows.shape[1] != dimension:
            rows = np.empty((len(self.names), dimension), dtype=np.float32)
            self.done[:] = False
        manifest = self._continued
        if not self.done.any():
            erase(self.directory)
            manifest = self.manifest
        rows[~self.done] = np.nan
        if manifest.naming == "path":
            remove_leftovers(self.directory, below=True)
        save_array(self._partial, rows)
        with atomic_file(self._partial_manifest) as stream:
            stream.write(manifest.to_json().encode())
        # In this order: rows without a manifest would pass for those of the research code.
        self._finished.unlink(missing_ok=True)
        self._finished_manifest.unlink(missing_ok=True)
        self._rows, self._resumed = None, True
        self._start = self._partial.stat().st_size - rows.nbytes
        # No memory map: that is a bus error where the disk is full.
        return self._partial.open("r+b", buffering=0)

    def start(self) -> None:
        """Do nothing: features that are to be replaced are deleted at the first write."""

    def commit(self) -> None:
        """Do nothing unless ``durable``: files are complete as soon as they have their names."""
        if self.durable and self._file is not None:
            with disk_errors(self.directory):
                os.fsync(self._file.fileno())
            for folder in self._folders:
                sync_folder(self.directory / folder)
            sync_folder(self.directory)
            self._folders.clear()

    def close(self) -> None:
        """Close the partial file."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def write(
        self, i: int, descriptor: Array, arrays: Sequence[NDArray[Any]], modified: int = 0
    ) -> None:
        """Write the features of image ``i``, for every row of the list that names it.

        Parameters
        ----------
        i : int
            Row in the image list.
        descriptor : ndarray [P]
            Global descriptor.
        arrays : sequence of ndarray [n_s, P]
            Patch descriptors, one array per patch size.
        modified : int, default 0
            Time stamp of the image, ns, of features that were computed before. The files get it,
            since their own time stamps say how old the features are.

        Raises
        ------
        FeatureError
            The disk is full, or the directory cannot be written.
        """
        row = np.ascontiguousarray(descriptor, dtype=np.float32)
        with disk_errors(self.directory):
            if self._file is None:
                self._file = self._open(len(row))
            names = [self.names[j] for j in self._rows_of[normal_name(self.names[i])]]
            files = write_patch_files(
                self.directory, self.manifest, names, arrays, modified, sync=self.durable
            )
        for file in files if self.durable else ():
            self._folders.update(file.relative_to(self.directory).parents)
        self.write_row(i, row)

    def write_row(self, i: int, descriptor: Array) -> None:
        """Write the global descriptor [P] of image ``i``, whose patch files exist already."""
        listed = self._rows_of[normal_name(self.names[i])]
        row = np.ascontiguousarray(descriptor, dtype=np.float32)
        with disk_errors(self.directory):
            if self._file is None:
                self._file = self._open(len(row))
            for j in listed:
                self._file.seek(self._start + j * row.nbytes)
                write_all(self._file.fileno(), row)
        self.done[listed] = True

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Give the finished files their final names.

        Raises
        ------
        FeatureError
            Images are missing.
        """
        self.close()
        if not self.done.all():
            raise unfinished(self.directory, int((~self.done).sum()))
        with disk_errors(self.directory):
            if self._resumed:
                os.replace(self._partial, self._finished)
            if self._partial_manifest.is_file():
                os.replace(self._partial_manifest, self._finished_manifest)
            self._partial.unlink(missing_ok=True)  # of a run killed as it began to replace these
        self._resumed = False


def write_patch_files(
    directory: Path,
    manifest: Manifest,
    names: Iterable[str],
    arrays: Sequence[NDArray[Any]],
    modified: int = 0,
    *,
    sync: bool = False,
) -> list[Path]:
    """Write the patch descriptors [n_s, P] of an image, one array a patch size.

    Parameters
    ----------
    directory : Path
    manifest : Manifest
    names : iterable of str
        Under which the image stands in the list.
    arrays : sequence of ndarray [n_s, P]
    modified : int, default 0
        Time stamp of the image, as for :meth:`NpyWriter.write`.
    sync : bool, default False
        Write them so that they survive a power failure.

    Returns
    -------
    list of Path
        The files.
    """
    written = []
    for size, patch in zip(manifest.patch_sizes, arrays, strict=True):
        stored = np.ascontiguousarray(patch.T, dtype=np.float32)
        for file in {patch_file(directory, "patchfeats", size, n, manifest.naming) for n in names}:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_array(file, stored, sync=sync)
            set_time_stamp(file, modified)
            written.append(file)
    return written


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
        raise ArrayError(file, f"is damaged ({error})") from None
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
