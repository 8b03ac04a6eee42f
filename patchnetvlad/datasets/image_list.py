# SPDX-License-Identifier: MIT
"""Image lists: text files that name one image per line, or folders of images."""

from __future__ import annotations

import codecs
import logging
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from patchnetvlad.assets.data_files import resolve_image_list
from patchnetvlad.base.files import check_inputs_stay, make_folder, replace_text
from patchnetvlad.base.names import is_remote, locate
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.datasets.formats import IMAGE_SUFFIXES, has_image_suffix, left_out
from patchnetvlad.errors import ImageListError, RemoteNotFoundError

logger = logging.getLogger(__name__)

_SHOWN = 5  # broken entries that a message names
_LONGEST = 200  # characters of an entry that a message shows
_LOOKED_UP = 64  # images in object storage that are looked up beforehand


@dataclass(frozen=True)
class ImageList:
    """The images of one data set, in order.

    Attributes
    ----------
    path : Path
        The text file, or the folder.
    names : tuple of str
        As written in the file, but without quotes, and with ``/`` between folders; a name
        identifies its image everywhere. Those of a folder are relative to it.
    lines : tuple of int
        Line of each name in the file, from 1.
    folder : str
        The folder that was listed; empty for a text file.
    """

    path: Path
    names: tuple[str, ...]
    lines: tuple[int, ...]
    folder: str = ""

    @classmethod
    def read(cls, path: str | Path, root: str | Path = "") -> ImageList:
        """Read an image list, or list the images of a folder.

        Blank lines, surrounding white space, byte-order marks, the line ends of any system and
        comments (lines that begin with ``#``) are ignored. A name may be enclosed in single or
        double quotes, within which white space and ``#`` are kept. A backslash separates
        folders, as on Windows; it becomes ``/``, except on Windows itself. Text is UTF-8, or
        UTF-16 with a byte-order mark. A bare name of a benchmark's list, such as
        ``pitts30k_imageNames_index.txt``, is fetched on first use.

        Of a folder, and those below it, all images are listed but hidden ones, in natural order
        (2 before 10); see :func:`list_folder`.

        Parameters
        ----------
        path : str or Path
            A text file, or a folder.
        root : str or Path, default ""
            A folder may be given relative to it.

        Returns
        -------
        ImageList

        Raises
        ------
        ImageListError
            There is no such file or folder, it is not text, names no image, or has unclosed quotes.

        Examples
        --------
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "index.txt")
        ...     _ = path.write_text("# my map\\n\\nmap/1.jpg\\nmap/2.jpg\\n")
        ...     images = ImageList.read(path)
        >>> images.names, images.lines
        (('map/1.jpg', 'map/2.jpg'), (3, 4))
        """
        if (folder := _folder(path, root)) is not None:
            names = tuple(list_folder(folder))
            return cls(folder, names, tuple(range(1, len(names) + 1)), str(folder))
        file = resolve_image_list(path)
        try:
            raw = file.read_bytes()
            encoding = "utf-16" if raw.startswith(_UTF16_MARKS) else "utf-8-sig"
            text = raw.decode(encoding)
            if "\0" in text:
                raise ImageListError(f"{file} is not a text file; it must name one image per line")
        except UnicodeDecodeError as error:
            raise ImageListError(
                f"{file} is not a text file in UTF-8 (byte {error.start}); it must name one image "
                "a line"
            ) from None
        except OSError as error:
            raise ImageListError(f"{file} cannot be read: {error.strerror}") from None
        # Not splitlines(): file names may hold characters that it takes for line ends.
        text = text.replace("\r\n", "\n").replace("\r", "\n")
        entries, disabled = [], []
        for number, line in enumerate(text.split("\n"), start=1):
            entry = line.lstrip("\ufeff").strip()
            if entry.startswith("#"):
                if entry.lower().endswith(IMAGE_SUFFIXES):
                    disabled.append(number)
            elif entry:
                try:
                    entries.append((number, _name(entry)))
                except ValueError as error:
                    raise ImageListError(
                        f"{file}, line {number}: {entry[:_LONGEST]!r} {error}"
                    ) from None
        if disabled:
            logger.info(
                "%s: %d lines that begin with # are comments, first line %d; a name that begins "
                "so is written in quotes",
                file,
                len(disabled),
                disabled[0],
            )
        if not entries:
            raise ImageListError(f"{file} names no image; it must have one name per line")
        lines, names = zip(*entries, strict=True)
        _check_no_table(file, names, lines)
        return cls(file, names, lines)

    def __len__(self) -> int:
        return len(self.names)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def where(self, i: int) -> str:
        """Return the name, file and line of entry ``i``, for messages."""
        name = self.names[i]
        if len(name) > _LONGEST:
            name = f"{name[: _LONGEST // 2]} ... {name[-_LONGEST // 2 :]}"
        if self.folder:
            return f"{name} (in {self.folder})"
        return f"{name} ({self.path}, line {self.lines[i]})"

    def take(self, rows: Sequence[int]) -> ImageList:
        """Return the images in some rows."""
        names, lines = self.names, self.lines
        return ImageList(
            self.path,
            tuple(names[i] for i in rows),
            tuple(lines[i] for i in rows),
            self.folder,
        )

    def base(self, root: str | Path = "") -> str | Path:
        """Return the root folder of relative names: the folder that was listed, or ``root``."""
        return self.folder or root

    def image_paths(self, root: str | Path = "") -> list[Path]:
        """Return the paths of the images; relative names are resolved against ``root``.

        A name with accents also finds a file whose name is the same in another Unicode form
        (NFC, NFD), as other systems write it.

        Raises
        ------
        ImageListError
            An image is in object storage; see :meth:`image_locations`.
        """
        paths = []
        for i, path in enumerate(self.image_locations(root)):
            if isinstance(path, str):
                raise ImageListError(
                    f"{self.where(i)} is {path}, in object storage; here images must be on a disk"
                )
            paths.append(path)
        return paths

    def image_locations(self, root: str | Path = "") -> list[Path | str]:
        """Return where the images are: paths on disk, as :meth:`image_paths`, or URLs.

        Parameters
        ----------
        root : str or Path, default ""
            Folder that relative names lie under, which may be a URL, such as
            ``s3://bucket/prefix``. Names that are URLs stay as they are.

        Returns
        -------
        list of Path or str
            URLs are str.
        """
        root = self.base(root)
        below, folder = is_remote(root), Path(root)
        locations: list[Path | str] = []
        for name in self.names:
            location = locate(root, name) if below else name
            if is_remote(location):
                locations.append(location)
            elif name.isascii():
                locations.append(folder / name)  # which an absolute name replaces
            else:
                locations.append(_on_disk(folder, Path(name)))
        return locations

    def check_images(self, root: str | Path = "") -> None:
        """Raise ImageListError if an image is missing, empty or not a file.

        In object storage only a sample is looked up, spread over the list: it shows whether the
        root is right, at the same cost for a list of any length.

        Parameters
        ----------
        root : str or Path
            Folder that relative names lie under, or its URL.

        Raises
        ------
        RemoteError
            The storage cannot be reached.
        """
        locations = self.image_locations(root)
        remote = [(i, url) for i, url in enumerate(locations) if isinstance(url, str)]
        self._look_up(remote, root)
        broken = []
        for i, path in enumerate(locations):
            if isinstance(path, str):
                continue
            try:
                if not path.is_file():
                    problem = "is not a file" if path.exists() else "is missing"
                    if os.sep == "/" and _DRIVE.match(self.names[i]):
                        problem += " (a path of Windows; give names below --dataset_root_dir)"
                elif path.stat().st_size == 0:
                    problem = "is empty (0 bytes)"
                else:
                    continue
            except (OSError, ValueError) as error:
                problem = f"cannot be reached: {getattr(error, 'strerror', None) or error}"
            broken.append(f"{self.where(i)} {problem}")
        self._check_none_broken(broken, len(self), root)

    def _look_up(self, remote: Sequence[tuple[int, str]], root: str | Path) -> None:
        step = max(1, len(remote) // _LOOKED_UP)
        sample = remote[::step]

        def trouble(entry: tuple[int, str]) -> str:
            i, url = entry
            folder, _, name = url.rpartition("/")
            try:
                empty = RemoteFolder(folder).size(name) == 0
            except RemoteNotFoundError:
                return f"{self.where(i)} is missing"
            return f"{self.where(i)} is empty (0 bytes)" if empty else ""

        if sample:
            with ThreadPoolExecutor(min(8, len(sample)), "look up") as pool:
                broken = [problem for problem in pool.map(trouble, sample) if problem]
            # A long list is not looked up as a whole, so some images may well be missing.
            if step == 1 or len(broken) == len(sample):
                self._check_none_broken(broken, len(sample), root)

    def _check_none_broken(self, broken: Sequence[str], looked_at: int, root: str | Path) -> None:
        if not broken:
            return
        more = f"; and {len(broken) - _SHOWN} more" if len(broken) > _SHOWN else ""
        raise ImageListError(
            f"{len(broken)} of {looked_at} images cannot be used: "
            f"{'; '.join(broken[:_SHOWN])}{more}. "
            f"Images are looked for under {str(self.base(root)) or 'the current folder'!r}; "
            "is --dataset_root_dir right?"
        )


def _name(entry: str) -> str:
    """Return the name that an entry of a list means; ValueError if that is unclear."""
    quote = entry[0]
    if quote == '"' or (quote == "'" and entry[-1] == quote and len(entry) > 1):
        name = entry[1:-1]
        if len(entry) == 1 or entry[-1] != quote:
            raise ValueError("begins with a quote that does not end it; give one name per line")
        if quote in name:
            raise ValueError("holds quotes within quotes; give one name per line")
        if not name.strip():
            raise ValueError("names nothing")
    elif entry[-1] == '"':
        raise ValueError("ends with a quote that does not begin it; give one name per line")
    else:
        name = entry
    return name.replace("\\", "/") if os.sep == "/" else name


def _check_no_table(file: Path, names: Sequence[str], lines: Sequence[int]) -> None:
    """Raise ImageListError if each line is an image's name and more, as in a table."""
    heading = len(names) > 1 and not _ROW.match(names[0]) and not has_image_suffix(names[0])
    rows = range(heading, len(names))
    if all(_ROW.match(names[i]) and not has_image_suffix(names[i].strip()) for i in rows):
        i = rows[0]
        raise ImageListError(
            f"{file}, line {lines[i]}: {names[i][:_LONGEST]!r} is a row of a table; an image list "
            "has one name per line, and nothing else"
        )


def _on_disk(root: Path, name: Path) -> Path:
    """Return the path of a name, in the Unicode form in which each of its parts is on disk."""
    wanted = root / name
    if os.path.lexists(wanted):
        return wanted
    path = root
    for part in name.parts:
        for form in ("NFC", "NFD"):
            other = path / unicodedata.normalize(form, part)
            if not os.path.lexists(path / part) and os.path.lexists(other):
                path = other
                break
        else:
            path = path / part
    return path if os.path.lexists(path) else wanted


_DRIVE = re.compile("[A-Za-z]:/")
_ROW = re.compile(
    rf"[^,;\t]*?({'|'.join(map(re.escape, IMAGE_SUFFIXES))})[\"']?\s*[,;\t ]\s*\S", re.IGNORECASE
)
_UTF16_MARKS = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)


def list_folder(folder: Path) -> list[str]:
    """List the images in a folder and its subfolders, relative to the folder.

    Parameters
    ----------
    folder : Path

    Returns
    -------
    list of str
        In natural order (2 before 10), with ``/`` between folders; without hidden ones.

    Raises
    ------
    ImageListError
        There is no image, or a name that cannot stand in a list: see :func:`check_names`.
    """
    found = filter(has_image_suffix, visible_files(folder, "**/*"))
    names = [file.relative_to(folder).as_posix() for file in found]
    if not names:
        raise ImageListError(
            f"there is no image in {folder} or below it ({' '.join(IMAGE_SUFFIXES)})"
        )
    check_names(names, "an image list")
    return sorted(names, key=natural_key)


def _folder(path: str | Path, root: str | Path) -> Path | None:
    """Return the folder that a path names, relative to ``root`` or as it is; None for others."""
    if is_remote(path):
        return None
    given = Path(path).expanduser()
    places = [given] if not root or is_remote(root) else [Path(root) / given, given]
    try:
        return next((place for place in places if place.is_dir()), None)
    except (OSError, ValueError):  # a name that no folder can have
        return None


def write_image_list(
    folder: str | Path, out_file: str | Path, recursive: bool = False
) -> list[str]:
    """List the images of a folder in a text file, in natural order (2 before 10).

    Parameters
    ----------
    folder : str or Path
        Names begin with this path, as given.
    out_file : str or Path
        Replaced as a whole.
    recursive : bool, default False
        Include the folders below it.

    Returns
    -------
    list of str
        The names.

    Raises
    ------
    ImageListError
        The folder does not exist, holds no image, or holds a file whose name cannot be listed:
        it is not UTF-8, has blanks or quotes around it, begins with ``#``, or contains a line end
        or (except on Windows) a backslash.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ImageListError(f"there is no folder {root}")

    def images(pattern: str) -> list[str]:
        found = (file for file in root.glob(pattern) if has_image_suffix(file))
        return sorted((str(file) for file in found if file.is_file()), key=natural_key)

    pattern = "**/*" if recursive else "*"
    names = images(pattern)
    others = "; ".join(left_out(visible_files(root, pattern)))
    if not names:
        below = len(images("**/*"))
        hint = f"; there are {below} in the folders below it: give --recursive" if below else ""
        hint += f"; {others}" if others else ""
        raise ImageListError(f"there is no image in {root} ({' '.join(IMAGE_SUFFIXES)}){hint}")
    if others:
        logger.info("%s: %s", root, others)
    check_names(names, "a list")
    out = Path(out_file)
    check_inputs_stay([out], names)
    make_folder(out.parent)
    write_names(names, out)
    return names


def visible_files(folder: Path, pattern: str = "*") -> Iterator[Path]:
    """Yield the files in a folder whose names match a pattern, except hidden files."""
    for file in folder.glob(pattern):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if not hidden and file.is_file():
            yield file


def write_names(names: Sequence[str], path: Path) -> Path:
    """Write an image list atomically; return its path.

    Raises
    ------
    ImageListError
        A name cannot be listed.
    OutputError
        The file cannot be written.
    """
    check_names(names, str(path))
    replace_text(path, (f"{name}\n" for name in names))
    return path


def check_names(names: Sequence[str], target: str) -> None:
    """Raise ImageListError unless a list of these names, ``target``, is read back unchanged."""
    for name in names:
        if not _can_be_listed(name):
            raise ImageListError(
                f"the name {name!r} cannot stand in {target}, which has one name per line, ignores "
                "blanks and quotes around it and lines that begin with #, and reads \\ as /; "
                "rename it"
            )
        try:
            name.encode()
        except UnicodeEncodeError:
            raw = name.encode(errors="surrogatepass") if os.name == "nt" else os.fsencode(name)
            raise ImageListError(f"the name of the file {raw!r} is not UTF-8; rename it") from None


def _can_be_listed(name: str) -> bool:
    """Return whether a name is read back unchanged from a list."""
    if not name or name != name.lstrip("\ufeff").strip() or name.startswith("#"):
        return False
    if re.search("[\r\n\0]", name):
        return False
    try:
        return _name(name) == name
    except ValueError:
        return False


def natural_key(name: str) -> list[tuple[int, int | str]]:
    """Return a sort key in which numbers count by value."""
    parts = re.split(r"([0-9]+)", name)
    return [(0, int(part)) if part.isdecimal() else (1, part) for part in parts]
