# SPDX-License-Identifier: MIT
"""Finding image lists, ground truth and example images, and fetching published ones."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from importlib import resources
from pathlib import Path

from patchnetvlad.assets.catalog import (
    DEMO,
    DEMO_IMAGES,
    EXAMPLE_IMAGES,
    EXAMPLES,
    GROUND_TRUTH,
    GROUND_TRUTH_FILES,
    IMAGE_LISTS,
    LISTS,
)
from patchnetvlad.assets.folders import (
    data_home,
    disk_errors,
    expand_home,
    find_asset,
    is_file,
    path_inside,
    possible_paths,
    write_new,
)
from patchnetvlad.assets.wheels import DATA_WHEEL, DEMO_WHEEL, data_file, fetch_wheel
from patchnetvlad.errors import AssetError, GroundTruthError, ImageListError, PatchNetVLADError


def _resolve(
    path: str | Path, folder: str, known: Iterable[str], error: type[PatchNetVLADError], what: str
) -> Path:
    given = expand_home(path)
    for place in possible_paths(given, folder):
        if is_file(place):
            return place
    inside = path_inside(given, folder)
    if inside is not None and str(inside) in known:
        return data_file(f"{folder}/{inside}")
    near = difflib.get_close_matches(given.name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known by name: {', '.join(known)}"
    raise error(f"no {what} {path}: neither a file nor a known name\n{hint}")


def resolve_image_list(path: str | Path) -> Path:
    """Find an image list; download it if it is a published one.

    Parameters
    ----------
    path : str or Path
        A file, or the name of a list such as ``pitts30k_imageNames_index.txt``, with or without
        ``dataset_imagenames/`` before it. A file wins over a name.

    Returns
    -------
    Path
        The list on this machine.

    Raises
    ------
    ImageListError
        If there is neither such a file nor such a name.
    AssetError
        If the list had to be fetched and could not be.
    """
    return _resolve(path, LISTS, IMAGE_LISTS, ImageListError, "image list")


def resolve_ground_truth(path: str | Path) -> Path:
    """Find a ground truth file; download it if it is a published one.

    Parameters
    ----------
    path : str or Path
        A file, or a name such as ``pitts30k_test.npz``, with or without ``dataset_gt_files/``
        before it. A file wins over a name.

    Returns
    -------
    Path
        The file on this machine.

    Raises
    ------
    GroundTruthError
        If there is neither such a file nor such a name.
    AssetError
        If the file had to be fetched and could not be.
    """
    return _resolve(path, GROUND_TRUTH, GROUND_TRUTH_FILES, GroundTruthError, "ground truth")


def example_image(name: str) -> Path:
    """Return one image of the example pair, downloading it on first use.

    Parameters
    ----------
    name : {"tokyo_query.jpg", "tokyo_db.png"}
        Two images of the same place.

    Returns
    -------
    Path
        The image on this machine.
    """
    if name not in EXAMPLE_IMAGES:
        raise AssetError(f"no example image {name}: there are {' and '.join(EXAMPLE_IMAGES)}")
    return data_file(f"{EXAMPLES}/{name}")


def fetch_data() -> list[Path]:
    """Download all published image lists, ground truth files and the example pair.

    Returns
    -------
    list of Path
        All of these files, whether they were there before or not.
    """
    return list(fetch_wheel(DATA_WHEEL).values())


def demo_images() -> dict[str, Path]:
    """Return the images of the demo, downloading them on first use.

    Returns
    -------
    dict of str to Path
        Name of each image, such as ``"notre_dame"``, and its file. Two names that differ
        in ``_close`` and ``_far``, or ``_db`` and ``_query``, show one place.
    """
    files = [data_file(f"{EXAMPLES}/{name}") for name in EXAMPLE_IMAGES]
    files += fetch_wheel(DEMO_WHEEL).values()
    files += [_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    by_name = {file.stem: file for file in files}
    return {name: by_name[name] for name in DEMO_IMAGES}


def _sample_image(name: str) -> Path:
    """Copy a sample image of scikit-learn to the folder of the other images."""
    local = f"{DEMO}/{name}"
    if (found := find_asset(local)) is not None:
        return found
    target = data_home() / local
    with disk_errors(name, target.parent):
        try:
            image = (resources.files("sklearn.datasets.images") / name).read_bytes()
        except (ImportError, FileNotFoundError) as error:
            raise AssetError(
                f"scikit-learn's sample image {name} is missing: `pip install scikit-learn`"
            ) from error
        with write_new(target) as file:
            file.write(image)
    return target
