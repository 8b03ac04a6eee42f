# SPDX-License-Identifier: MIT
"""Features in the layout of the research code: one ``.npy`` file per image and patch size.

Each code reads the files of the other. ``features.json``, beside ``globalfeats.npy``, says what the
features were made from.
"""

from __future__ import annotations

import copy
import os
import threading
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.files import atomic_file
from patchnetvlad.base.names import is_remote, normal_name
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.manifest import (
    GLOBAL_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    Manifest,
    check_fits,
    find_shares,
)

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


class NpyReader:
    """Reads a feature directory of this package or of the research code.

    Parameters
    ----------
    directory : str or Path
    names : sequence of str
        The image list that the features were extracted from.
    config : Config
        The configuration for matching.
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
        self.names: Sequence[str] | Mapping[int, str] = names
        self.config = config
        self.global_descriptors = load_global_descriptors(self.directory, names)
        self.manifest = read_manifest(self.directory / MANIFEST_FILE)
        if self.manifest is not None:
            check_fits(self.directory, self.manifest, names, config, dataset_root)
        self.naming = self.manifest.naming if self.manifest else "stem"

    def stamp(self) -> str:
        """Return a token that changes whenever the features are rewritten."""
        return str((self.directory / GLOBAL_FILE).stat().st_mtime_ns)

    def patches(self, i: int, device: torch.device | str = "cpu") -> list[Tensor]:
        """Read the patch descriptors of image ``i``.

        Parameters
        ----------
        i : int
            Row in the image list.
        device : torch.device or str, default "cpu"

        Returns
        -------
        list of Tensor [n_s, P] of float32
            One per patch size of the configuration.

        Raises
        ------
        FeatureError
            A file is missing or damaged.
        """
        return load_patches(
            self.directory,
            "patchfeats",
            self.config.patch_sizes,
            self.names[i],
            self.naming,
            device,
        )

    def part(self, places: Iterable[int]) -> NpyReader:
        """Return a small reader of the patches of some rows, for another process."""
        part = copy.copy(self)
        part.directory = Path(os.path.abspath(self.directory))
        part.names = {i: self.names[i] for i in places}
        part.global_descriptors = self.global_descriptors[:0]
        return part


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


def load_patches(
    directory: Path,
    prefix: str,
    patch_sizes: Sequence[int],
    name: str,
    naming: str,
    device: torch.device | str = "cpu",
) -> list[Tensor]:
    """Read the patch descriptors of one image, one tensor [n_s, P] of float32 per patch size.

    The parameters are those of :func:`patch_file`; FeatureError as there is no file, or it is
    damaged.
    """
    files = [patch_file(directory, prefix, size, name, naming) for size in patch_sizes]
    arrays = [np.ascontiguousarray(load_array(file).T) for file in files]
    return [torch.from_numpy(array).to(device) for array in arrays]


def load_array(file: Path) -> Array:
    """Read a matrix of descriptors [n, m] as float32; FeatureError if it is missing or damaged."""
    return np.array(map_array(file), np.float32)


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
        raise FeatureError(
            f"the feature file {file} is damaged ({error}); delete it and extract again"
        ) from None
    if not isinstance(values, np.ndarray) or values.ndim != 2 or values.dtype.kind != "f":
        raise FeatureError(f"{file} does not hold a matrix of descriptors")
    return values


def save_array(file: Path, values: NDArray[Any], *, sync: bool = False) -> None:
    """Write an array to a ``.npy`` file atomically; ``sync`` makes it survive a power failure."""
    with atomic_file(file) as stream:
        np.save(stream, values, allow_pickle=False)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())
