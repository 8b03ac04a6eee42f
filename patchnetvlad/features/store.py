# SPDX-License-Identifier: MIT
"""Feature directories: ``globalfeats.npy`` and one ``.npy`` an image and patch size.

The layout is that of the research code: either side reads what the other wrote. Beside it
stands ``features.json``, which says what the features were made from, so that features of
another list or configuration are noticed instead of silently matched.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path, PurePosixPath
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError, make_folder

GLOBAL_FILE = "globalfeats.npy"
MANIFEST_FILE = "features.json"
NAMINGS = ("stem", "path")

Array = NDArray[np.float32]


@dataclass(frozen=True)
class Manifest:
    """What the features of a directory were made from.

    Attributes
    ----------
    images : str
        SHA-256 over the names of the image list.
    paths : str
        SHA-256 over the images' absolute paths.
    num_images : int
    checkpoint : str
        SHA-256 of the checkpoint's file.
    pooling : str
    num_pcs : int
    patch_sizes, strides : list of int
    image_size : list of int
        (height, width) that images were resized to, px; (0, 0) for native sizes.
    patch_vlad : {"direct", "integral"}
    naming : {"stem", "path"}
        Whether files are named by an image's stem or by its whole name in the list.
    """

    images: str
    paths: str
    num_images: int
    checkpoint: str
    pooling: str
    num_pcs: int
    patch_sizes: list[int]
    strides: list[int]
    image_size: list[int]
    patch_vlad: str
    naming: str

    @classmethod
    def of(
        cls,
        config: Config,
        names: Sequence[str],
        checkpoint: str,
        naming: str,
        root: str | Path = "",
    ) -> Manifest:
        """Describe the features of a configuration for a list of names below a folder."""
        if naming not in NAMINGS:
            raise FeatureError(
                f"feature_names = {naming!r} is unknown; one of {', '.join(NAMINGS)}"
            )
        return cls(
            images=_digest(os.path.normpath(name) for name in names),
            paths=_digest(os.path.abspath(os.path.join(root, name)) for name in names),
            num_images=len(names),
            checkpoint=checkpoint,
            pooling=config.pooling,
            num_pcs=config.num_pcs,
            patch_sizes=list(config.patch_sizes) if config.uses_patches else [],
            strides=list(config.strides) if config.uses_patches else [],
            image_size=list(config.image_size),
            patch_vlad=config.patch_vlad,
            naming=naming,
        )

    def differences(self, other: Manifest) -> list[str]:
        """Name what differs, as ``key: this -> that``."""
        mine, theirs = asdict(self), asdict(other)
        return [f"{key}: {mine[key]} -> {theirs[key]}" for key in mine if mine[key] != theirs[key]]


def _digest(words: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(words).encode()).hexdigest()


def read_manifest(path: Path) -> Manifest | None:
    """Read a manifest; None if there is none, as in directories of the research code."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        return Manifest(**{field.name: content[field.name] for field in fields(Manifest)})
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise FeatureError(
            f"{path} is damaged ({error}); delete it to use the features without checks"
        ) from None


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
    """
    if naming == "stem":
        tail = os.path.splitext(os.path.basename(name))[0]
    else:
        parts = PurePosixPath(name).parts
        tail = "/".join("__" if part == ".." else part for part in parts if part not in ("/", "."))
    return directory / f"{prefix}_psize{patch_size}_{tail}.npy"


def check_unique(names: Sequence[str], naming: str) -> None:
    """Raise FeatureError if two images would share a file."""
    seen: dict[Path, str] = {}
    for name in names:
        file = patch_file(Path(), "patchfeats", 0, name, naming)
        if file in seen:
            other = seen[file]
            if os.path.normpath(other) == os.path.normpath(name):
                continue  # the same image twice, with the same features
            way_out = (
                "give --feature_names path, which keeps the folders in the names"
                if naming == "stem"
                else "rename one of them"
            )
            raise FeatureError(
                f"the images {other} and {name} would share the feature file {file.name}; {way_out}"
            )
        seen[file] = name


class FeatureWriter:
    """Writes a feature directory, and goes on where an interrupted run stopped.

    Patch files come first; then the image's row of ``globalfeats.npy.part``. A finite row
    therefore marks a finished image. :meth:`finish` renames the file to its final name. Features
    that stand here already make way at the first :meth:`write`, not before.

    Parameters
    ----------
    directory : Path
    names : sequence of str
        The image list.
    manifest : Manifest
    image_paths : sequence of Path, optional
        Where the images lie: features older than their image are not taken over.

    Attributes
    ----------
    done : ndarray [N] of bool
        Images whose features are on disk.
    replaced : list of str
        How the finished features that stand here, and will make way, differ.

    Raises
    ------
    FeatureError
        Two images would share a file, or the directory cannot be made.
    """

    def __init__(
        self,
        directory: Path,
        names: Sequence[str],
        manifest: Manifest,
        image_paths: Sequence[Path] | None = None,
    ) -> None:
        if manifest.patch_sizes:
            check_unique(names, manifest.naming)
        self.directory = directory
        self.names = names
        self.manifest = manifest
        self.image_paths = image_paths
        self.done = np.zeros(len(names), dtype=bool)
        self.replaced: list[str] = []
        self._finished = directory / GLOBAL_FILE
        self._finished_manifest = directory / MANIFEST_FILE
        self._partial = directory / f"{GLOBAL_FILE}.part"
        self._partial_manifest = directory / f"{MANIFEST_FILE}.part"
        self._kept: Array | None = None  # rows of an earlier run
        self._rows: Array | None = None  # memory map of the partial file
        self._resumed = False
        make_folder(directory)
        self._look()

    def _look(self) -> None:
        """Find out what an earlier run left here."""
        for file, its_manifest in (
            (self._finished, self._finished_manifest),
            (self._partial, self._partial_manifest),
        ):
            present: Manifest | None = None
            with contextlib.suppress(FeatureError):
                present = read_manifest(its_manifest)
            if present == self.manifest:
                self._kept = self._read_rows(file)
                if self._kept is not None:
                    self._resumed = file == self._partial
                    return
            elif present is not None and file == self._finished and file.is_file():
                self.replaced = present.differences(self.manifest)

    def _read_rows(self, file: Path) -> Array | None:
        """Read global descriptors and note whose images are done; None if they are of no use."""
        try:
            rows = _load(file, 2)
        except FeatureError:
            return None
        if len(rows) != len(self.names):
            return None
        for i in np.flatnonzero(np.isfinite(rows).all(axis=1)).tolist():
            self.done[i] = self._is_current(i, file)
        return rows

    def _is_current(self, i: int, file: Path) -> bool:
        """Tell whether the files of image ``i`` are whole, and not older than the image."""
        files = [self._patch_file(i, size) for size in self.manifest.patch_sizes]
        try:
            for patches in files:
                np.load(patches, mmap_mode="r")  # ValueError if it is truncated
            oldest = min(path.stat().st_mtime_ns for path in files or [file])
            return self.image_paths is None or self.image_paths[i].stat().st_mtime_ns <= oldest
        except (OSError, ValueError, EOFError):
            return False

    def _patch_file(self, i: int, size: int) -> Path:
        return patch_file(self.directory, "patchfeats", size, self.names[i], self.manifest.naming)

    def _open(self, dimension: int) -> Array:
        """Make the partial file, from the rows that are there; finished features make way."""
        rows = self._kept
        if rows is None or rows.shape[1] != dimension:
            rows = np.empty((len(self.names), dimension), dtype=np.float32)
        rows[~self.done] = np.nan
        # Written in full: a memory map of a sparse file is a bus error on a full disk.
        _save_atomically(self._partial, rows)
        text = json.dumps(asdict(self.manifest), indent=2) + "\n"
        _write_atomically(self._partial_manifest, text.encode())
        self._finished_manifest.unlink(missing_ok=True)
        self._finished.unlink(missing_ok=True)
        self._kept = None
        return np.lib.format.open_memmap(self._partial, mode="r+")

    def write(self, i: int, descriptor: Array, patches: Sequence[Array]) -> None:
        """Write the features of image ``i``.

        Parameters
        ----------
        i : int
            Place in the list.
        descriptor : ndarray [P]
            Global descriptor.
        patches : sequence of ndarray [n_s, P]
            One a patch size.

        Raises
        ------
        FeatureError
            The disk is full, or the directory cannot be written.
        """
        try:
            if self._rows is None:
                self._rows = self._open(len(descriptor))
            for size, patch in zip(self.manifest.patch_sizes, patches, strict=True):
                file = self._patch_file(i, size)
                file.parent.mkdir(parents=True, exist_ok=True)
                _save_atomically(file, np.ascontiguousarray(patch.T, dtype=np.float32))
            self._rows[i] = descriptor
        except OSError as error:
            raise FeatureError(
                f"features cannot be written to {self.directory}: {error.strerror or error}; what "
                "is written is kept, and the same command goes on from there"
            ) from None
        self.done[i] = True

    def finish(self) -> None:
        """Give the finished files their final names.

        Raises
        ------
        FeatureError
            Images are missing.
        """
        if not self.done.all():
            raise FeatureError(
                f"{self.directory}: {int((~self.done).sum())} images have no features yet"
            )
        if self._rows is not None:
            self._rows.flush()  # type: ignore[attr-defined]
            self._rows = None
            self._resumed = True
        if self._resumed:
            os.replace(self._partial, self._finished)
            os.replace(self._partial_manifest, self._finished_manifest)


class FeatureReader:
    """Reads a feature directory of this package or of the research code.

    Parameters
    ----------
    directory : str or Path
    names : sequence of str
        The image list that the features were extracted from.
    config : Config
        What they are to be matched with.
    dataset_root : str or Path, default ""
        Folder that relative names lie under.

    Attributes
    ----------
    manifest : Manifest or None
        None for directories of the research code.
    global_descriptors : ndarray [N, P] of float32

    Raises
    ------
    FeatureError
        The directory or a file is missing, or was made from another list or configuration.
    """

    def __init__(
        self,
        directory: str | Path,
        names: Sequence[str],
        config: Config,
        dataset_root: str | Path = "",
    ) -> None:
        self.directory = Path(directory)
        self.dataset_root = dataset_root
        self.names = names
        self.config = config
        file = self.directory / GLOBAL_FILE
        if not file.is_file():
            unfinished = file.with_name(f"{GLOBAL_FILE}.part").is_file()
            way_out = (
                "its extraction is not finished; run feature_extract again, it goes on from there"
                if unfinished
                else "run feature_extract with this --output_features_dir first"
            )
            raise FeatureError(f"there is no {GLOBAL_FILE} in {self.directory}: {way_out}")
        self.global_descriptors = _load(file, dims=2)
        if len(self.global_descriptors) != len(names):
            raise FeatureError(
                f"{file} has {len(self.global_descriptors)} rows for {len(names)} images in the "
                "list; it was extracted from another list"
            )
        bad = np.flatnonzero(~np.isfinite(self.global_descriptors).all(axis=1))
        if len(bad):
            raise FeatureError(
                f"{file}: row {bad[0]} ({names[bad[0]]}) is not finite; extract again"
            )
        self.manifest = read_manifest(self.directory / MANIFEST_FILE)
        self._check_manifest()
        self.naming = self.manifest.naming if self.manifest else "stem"

    def _check_manifest(self) -> None:
        if self.manifest is None:
            return
        have = self.manifest
        mine = Manifest.of(
            self.config, self.names, have.checkpoint, have.naming, root=self.dataset_root
        )
        if have.images != mine.images and have.paths != mine.paths:
            raise FeatureError(
                f"{self.directory} was extracted from another image list (or the list has changed "
                "since); extract again"
            )
        if have.num_pcs != mine.num_pcs:
            raise FeatureError(
                f"{self.directory} was extracted with num_pcs = {have.num_pcs}; "
                f"{self.config.source} has {mine.num_pcs}"
            )
        if _family(have.pooling) != _family(mine.pooling):
            raise FeatureError(
                f"{self.directory} was extracted with pooling = {have.pooling}; "
                f"{self.config.source} has {mine.pooling}"
            )
        if tuple(have.image_size) != self.config.match_image_size:
            raise FeatureError(
                f"{self.directory} was extracted from images of {have.image_size} (height, width) "
                f"px; imageresizeh, imageresizew in [feature_match] of {self.config.source} are "
                f"{list(self.config.match_image_size)}"
            )
        if not self.config.uses_patches:
            return
        made = dict(zip(have.patch_sizes, have.strides, strict=True))
        for size, stride in zip(mine.patch_sizes, mine.strides, strict=True):
            if made.get(size) != stride:
                has = ", ".join(f"{s} (stride {t})" for s, t in made.items()) or "none"
                raise FeatureError(
                    f"{self.directory} has no patches of size {size} and stride {stride}; "
                    f"it has {has}"
                )

    def patches(self, i: int) -> list[Array]:
        """Read the patch descriptors of image ``i``.

        Parameters
        ----------
        i : int
            Place in the list.

        Returns
        -------
        list of ndarray [n_s, P] of float32
            One a patch size of the configuration.

        Raises
        ------
        FeatureError
            A file is missing or damaged.
        """
        return load_patches(
            self.directory, "patchfeats", self.config.patch_sizes, self.names[i], self.naming
        )


def _family(pooling: str) -> str:
    """Return the kind of global descriptor: that of patchnetvlad is NetVLAD's."""
    return "netvlad" if pooling == "patchnetvlad" else pooling


def load_patches(
    directory: Path, prefix: str, patch_sizes: Sequence[int], name: str, naming: str
) -> list[Array]:
    """Read the patch descriptors [n_s, P] of one image, one array a patch size.

    The parameters are those of :func:`patch_file`; FeatureError as there is no file, or it is
    damaged.
    """
    return [_load(patch_file(directory, prefix, size, name, naming), 2).T for size in patch_sizes]


def _load(file: Path, dims: int) -> Array:
    try:
        values = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise FeatureError(
            f"the feature file {file} is missing; run feature_extract for its image list"
        ) from None
    except Exception as error:  # NumPy raises whatever it trips over.
        raise FeatureError(
            f"the feature file {file} is damaged ({error}); delete it and extract again"
        ) from None
    if not isinstance(values, np.ndarray) or values.ndim != dims or values.dtype.kind != "f":
        raise FeatureError(f"{file} does not hold a matrix of descriptors")
    return values.astype(np.float32, copy=False)


@contextlib.contextmanager
def _atomic_file(file: Path) -> Iterator[IO[bytes]]:
    # The same name in every run, so that what a killed one left is overwritten.
    temporary = file.with_name(f".{_digest([file.name])[:32]}.part")
    try:
        with temporary.open("wb") as stream:
            yield stream
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _save_atomically(file: Path, values: NDArray[Any]) -> None:
    with _atomic_file(file) as stream:
        np.save(stream, values, allow_pickle=False)


def _write_atomically(file: Path, content: bytes) -> None:
    with _atomic_file(file) as stream:
        stream.write(content)
