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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from patchnetvlad.base.files import make_folder
from patchnetvlad.base.names import locate
from patchnetvlad.datasets.images import native_size
from patchnetvlad.errors import FeatureError, ImageError, PatchNetVLADError
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.names import places_of
from patchnetvlad.features.sources import Features, Source
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


class Hdf5Source(Source):
    """Reads a file of :func:`write_hdf5`."""

    kind = "float16"

    def __init__(self, path: Path) -> None:
        self.path = path
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
            self.dimension = len(self._file[self._groups[0]]["global_descriptor"])
            on_error.pop_all()

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except FeatureError:
            raise
        except (OSError, KeyError, ValueError, RuntimeError) as error:
            raise FeatureError(
                f"{self.path} is not an HDF5 file of patchnetvlad-store, or is damaged "
                f"({' '.join(str(error).split())})"
            ) from None

    def counts(self, i: int) -> list[int]:
        """Count patches by their sizes."""
        if not self.manifest.patch_sizes:
            return []
        with self._errors():
            sizes = self._file[self._groups[i]]["patch_sizes"][:]
        return [int((sizes == size).sum()) for size in self.manifest.patch_sizes]

    def read(self, i: int) -> Features:
        """Read a group."""
        with self._errors():
            group = self._file[self._groups[i]]
            descriptor = group["global_descriptor"][:]
            if not self.manifest.patch_sizes:
                return descriptor, []
            patches = np.ascontiguousarray(group["descriptors"][:].T)  # [n, P]
            sizes = group["patch_sizes"][:]
            return descriptor, [patches[sizes == size] for size in self.manifest.patch_sizes]

    def modified(self, i: int) -> int:
        """Return what the group says."""
        with self._errors():
            return int(self._file[self._groups[i]].attrs["modified"])

    def close(self) -> None:
        """Close the file."""
        self._file.close()


# --- writing --------------------------------------------------------------------------------------


def write_hdf5(
    source: Source, target: Path, manifest: Manifest, root: str | Path | None, progress: bool
) -> None:
    """Write all features to one file, which gets its name when it is complete.

    Parameters
    ----------
    source : Source
    target : Path
    manifest : Manifest
        That of the file.
    root : str or Path or None
        Folder of the images, for key points on these. Images that were not resized are looked up
        in any case.
    progress : bool

    Raises
    ------
    PatchNetVLADError
        The file cannot be written, the features cannot be read, or images cannot or have changed.
    """
    h5py = import_h5py()
    temporary = target.with_name(f"{target.name}.part")
    make_folder(target.parent)
    try:
        file = h5py.File(temporary, "w")  # fails while another process writes it
    except OSError as error:
        raise _cannot_write(target, error) from None
    on_originals = root is not None or tuple(manifest.image_size) == (0, 0)
    try:
        with file:
            file.attrs["patchnetvlad"] = manifest.to_json()
            file.attrs["patchnetvlad_version"] = _VERSION
            file.attrs["coordinates"] = "original" if on_originals else "resized"
            images = places_of(source.names).items()
            for name, rows in tqdm(images, desc="Converting", unit="image", disable=not progress):
                title = name.replace(os.sep, "/").strip("/")
                if title in file:
                    raise FeatureError(
                        f"the image {name} has the HDF5 name of another, {title}; rename one of "
                        "them"
                    )
                size = tuple(manifest.image_size)
                if on_originals:
                    size = _original_size(locate(root or "", source.names[rows[0]]))
                group = file.create_group(title)
                group.attrs["places"] = np.array(rows, dtype=np.int64)
                group.attrs["name"] = name
                group.attrs["modified"] = np.int64(source.modified(rows[0]))
                _fill(group, source.read_as(rows[0], "float16"), manifest, size)
        os.replace(temporary, target)
    except PatchNetVLADError:
        raise
    except (OSError, RuntimeError) as error:
        raise _cannot_write(target, error) from None
    finally:
        temporary.unlink(missing_ok=True)


def _cannot_write(file: Path, error: Exception) -> FeatureError:
    reason = getattr(error, "strerror", None) or " ".join(str(error).split())
    return FeatureError(f"{file} cannot be written: {reason}")


def _original_size(path: str) -> tuple[int, int]:
    try:
        return native_size(path)
    except ImageError as error:
        raise ImageError(
            f"{error}; key points in px of the original images need these: is --dataset_root_dir "
            "right?"
        ) from None


def _fill(group: Any, features: Features, manifest: Manifest, size: tuple[int, ...]) -> None:
    """Write features to a group, with key points on an image of (height, width) px."""
    group["global_descriptor"], arrays = features
    group["image_size"] = np.array(size[::-1], dtype=np.int64)
    if not manifest.patch_sizes:
        return
    native = tuple(manifest.image_size) == (0, 0)
    height, width = size if native else manifest.image_size
    grids = patch_grids((height, width), manifest.patch_sizes, manifest.strides)
    patches = np.concatenate(arrays)
    if sum(map(len, grids)) != len(patches):
        raise FeatureError(
            f"{group.name} has {len(patches)} patches; an image of {height} x {width} px (height "
            f"x width) has {sum(map(len, grids))}: it has changed since, or is another"
        )
    # The centre of s cells is 8 s - 0.5 px from their edge, which the grid truncates: it lies
    # keypoints + 1 px from the image's edge.
    scale = np.array(size[::-1]) / (width, height)
    points = np.concatenate([(grid.keypoints + 1) * scale - 0.5 for grid in grids])
    sizes = [np.full(len(grid), grid.patch_size, dtype=np.int16) for grid in grids]
    group["keypoints"] = points.astype(np.float32)
    group["descriptors"] = np.ascontiguousarray(patches.T)
    group["scores"] = np.ones(len(points), dtype=np.float16)
    group["patch_sizes"] = np.concatenate(sizes)
