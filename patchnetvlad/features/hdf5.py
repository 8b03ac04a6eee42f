# SPDX-License-Identifier: MIT
"""Features in one HDF5 file, in the layout of hloc (hierarchical localization).

Each image has one group, named like the image, with the datasets

- ``keypoints`` [n, 2] of float32: the patches' centres (x, y), px; (0, 0) is the centre of the
  top-left pixel.
- ``image_size`` [2] of int64: (width, height), px, of the image that key points are in. That is
  the original image, as for hloc, if the folder of the images is given; else the resized one.
- ``descriptors`` [P, n] of float16 and ``scores`` [n] of float16, all 1.
- ``patch_sizes`` [n] of int16: the side of each patch, cells. Patches are grouped by size.
- ``global_descriptor`` [P] of float32.

The attributes ``patchnetvlad`` of the file (what the features were made from, JSON), and ``places``
(rows in the image list) and ``modified`` (time stamp of the image, ns) of each group, are needed to
read the features back.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import disk_errors, make_folder, new_file
from patchnetvlad.base.names import locate, normal_name
from patchnetvlad.datasets.images import native_size
from patchnetvlad.encoders import ENCODERS
from patchnetvlad.errors import FeatureError, ImageError
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.names import rows_by_name
from patchnetvlad.features.store.codec import Arrays
from patchnetvlad.models.grid import patch_grids

_VERSION = 1


def import_h5py() -> Any:
    """Import h5py, which is optional; FeatureError if it is not installed."""
    try:
        import h5py
    except ImportError:
        raise FeatureError(
            'HDF5 files need the package h5py: pip install "patchnetvlad[hdf5]"'
        ) from None
    return h5py


# --- reading --------------------------------------------------------------------------------------


class Hdf5Reader(Reader):
    """Reads a file of :func:`open_hdf5`."""

    kind = "float16"

    def __init__(self, path: Path) -> None:
        self.directory = path
        h5py = import_h5py()
        with contextlib.ExitStack() as on_error, self._errors():
            self._file = on_error.enter_context(h5py.File(path, "r"))
            if "patchnetvlad" not in self._file.attrs:
                raise FeatureError(
                    f"{path} was not written by patchnetvlad-store: it has no attribute "
                    "'patchnetvlad' that says what the features were made from"
                )
            version = int(self._file.attrs["patchnetvlad_version"])
            if version != _VERSION:
                raise FeatureError(
                    f"{path} is of version {version}; this release of patchnetvlad reads version "
                    f"{_VERSION}"
                )
            self.manifest = Manifest.from_json(self._file.attrs["patchnetvlad"], path)
            by_row: dict[int, Any] = {}

            def look(_: str, item: Any) -> None:
                if isinstance(item, h5py.Group) and "places" in item.attrs:
                    by_row.update(dict.fromkeys(item.attrs["places"].tolist(), item.name))

            self._file.visititems(look)
            if sorted(by_row) != list(range(self.manifest.num_images)):
                raise FeatureError(
                    f"{path} has {len(by_row)} of {self.manifest.num_images} images; write it "
                    "again with patchnetvlad-store convert"
                )
            self._groups = [by_row[i] for i in range(len(by_row))]
            self.names = [self._file[group].attrs["name"] for group in self._groups]
            self.stored_sizes = self.patch_sizes = self.manifest.patch_sizes
            on_error.pop_all()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FeatureError:
            raise
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise FeatureError(
                f"{self.directory} is not an HDF5 file of patchnetvlad-store, or is damaged "
                f"({' '.join(str(error).split())})"
            ) from None

    def arrays(self, i: int) -> Arrays:
        """Read the patches of a group."""
        if not self.stored_sizes:
            return []
        with self._errors():
            group = self._file[self._groups[i]]
            patches = np.ascontiguousarray(group["descriptors"][:].T)  # [n, P]
            sizes = group["patch_sizes"][:]
            return [patches[sizes == size] for size in self.stored_sizes]

    def descriptor(self, i: int) -> NDArray[np.float32]:
        """Read the global descriptor of a group."""
        with self._errors():
            descriptor: NDArray[np.float32] = self._file[self._groups[i]]["global_descriptor"][:]
            return descriptor

    def shapes(self, i: int) -> list[Sequence[int]]:
        """Count patches by their sizes."""
        if not self.stored_sizes:
            return []
        with self._errors():
            group = self._file[self._groups[i]]
            sizes, dimension = group["patch_sizes"][:], len(group["descriptors"])
        return [(int((sizes == size).sum()), dimension) for size in self.stored_sizes]

    def size(self, i: int) -> int:
        """Return the bytes of the descriptors of a group."""
        with self._errors():
            return 2 * sum(n * dimension for n, dimension in self.shapes(i))

    def modified(self, i: int) -> int:
        """Return the time stamp in the group."""
        with self._errors():
            return int(self._file[self._groups[i]].attrs["modified"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


# --- writing --------------------------------------------------------------------------------------


@contextlib.contextmanager
def open_hdf5(
    target: Path, names: Sequence[str], manifest: Manifest, root: str | Path | None
) -> Iterator[Hdf5Writer]:
    """Open a new file for writing, which is renamed when it is complete.

    Parameters
    ----------
    target : Path
    names : sequence of str
        The image list.
    manifest : Manifest
        That of the file.
    root : str or Path or None
        Folder of the images, for key points on these. Images that were not resized are looked up
        in any case.

    Yields
    ------
    Hdf5Writer

    Raises
    ------
    PatchNetVLADError
        The file cannot be written, or an image cannot be read or has changed.
    """
    h5py = import_h5py()
    make_folder(target.parent)
    on_originals = root is not None or tuple(manifest.image_size) == (0, 0)
    with (
        disk_errors(f"{target} cannot be written", "name another", FeatureError, (RuntimeError,)),
        new_file(target) as temporary,
        h5py.File(temporary, "w") as file,
    ):
        file.attrs["patchnetvlad"] = manifest.to_json()
        file.attrs["patchnetvlad_version"] = _VERSION
        file.attrs["coordinates"] = "original" if on_originals else "resized"
        yield Hdf5Writer(file, names, manifest, (root or "") if on_originals else None)


class Hdf5Writer:
    """Writes features to an open file.

    Parameters
    ----------
    file : h5py.File
    names : sequence of str
    manifest : Manifest
    root : str or Path or None
        Folder of the images that key points are on; None if they are on resized ones.

    Attributes
    ----------
    done : ndarray [N] of bool
        Images that are written: none at first.
    """

    def __init__(
        self, file: Any, names: Sequence[str], manifest: Manifest, root: str | Path | None
    ) -> None:
        self.done = np.zeros(len(names), dtype=bool)
        self._file, self._names, self._manifest, self._root = file, names, manifest, root
        self._rows_of = rows_by_name(names)

    def start(self) -> None:
        """Do nothing: the file is new."""

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        """Write the group of image ``i``, with patches of float16; see :meth:`Sink.write`."""
        name = normal_name(self._names[i])
        title = name.replace(os.sep, "/").strip("/")
        if title in self._file:
            raise FeatureError(
                f"the image {name} has the HDF5 name of another, {title}; rename one of them"
            )
        size = tuple(self._manifest.image_size)
        if self._root is not None:
            size = _original_size(locate(self._root, self._names[i]))
        group = self._file.create_group(title)
        group.attrs["places"] = np.array(self._rows_of[name], dtype=np.int64)
        group.attrs["name"] = name
        group.attrs["modified"] = np.int64(modified)
        group["global_descriptor"] = descriptor
        _fill(group, arrays, self._manifest, size)
        self.done[self._rows_of[name]] = True

    def commit(self) -> None:
        """Do nothing: the file counts only as a whole."""

    def finish(self, failed: Mapping[str, str] | None = None) -> None:
        """Do nothing: who opened the file gives it its name."""

    def close(self) -> None:
        """Do nothing: who opened the file closes it."""


def _original_size(path: str) -> tuple[int, int]:
    try:
        return native_size(path)
    except ImageError as error:
        raise ImageError(
            f"{error}; key points in px of the original images need these: is --dataset_root_dir "
            "right?"
        ) from None


def _fill(
    group: Any, arrays: Sequence[NDArray[Any]], manifest: Manifest, size: tuple[int, ...]
) -> None:
    """Write patches to a group, with key points on an image of (height, width) px."""
    group["image_size"] = np.array(size[::-1], dtype=np.int64)
    if not manifest.patch_sizes:
        return
    native = tuple(manifest.image_size) == (0, 0)
    height, width = size if native else manifest.image_size
    sizes, strides = manifest.patch_sizes, manifest.strides
    grids = patch_grids((height, width), sizes, strides, ENCODERS[manifest.encoder])
    patches = np.concatenate(arrays)
    if sum(map(len, grids)) != len(patches):
        raise FeatureError(
            f"{group.name} has {len(patches)} patches; an image of {height} x {width} px (height "
            f"x width) has {sum(map(len, grids))}: it has changed since, or is another"
        )
    scale = np.array(size[::-1]) / (width, height)  # of distances from the edge, at -0.5 px
    points = np.concatenate([(grid.centres + 0.5) * scale - 0.5 for grid in grids])
    of_patches = [np.full(len(grid), grid.patch_size, dtype=np.int16) for grid in grids]
    group["keypoints"] = points.astype(np.float32)
    group["descriptors"] = np.ascontiguousarray(patches.T)
    group["scores"] = np.ones(len(points), dtype=np.float16)
    group["patch_sizes"] = np.concatenate(of_patches)
