# SPDX-License-Identifier: MIT
"""Traverses: which images were taken on one way, and in which order."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.text import one_line
from patchnetvlad.errors import ImageListError

SOURCES = ("auto", "names", "list")

# A name's folder and beginning, and the number that its stem ends with: a frame, or a time stamp
# such as 1403636579.763555527.
_NUMBERED = re.compile(r"^(.*?)([0-9]{6,20}\.[0-9]{1,20}|(?<![0-9])[0-9]{1,20})$", re.DOTALL)
_KAPTURE = re.compile(r"#\s*(kapture format|timestamp,\s*device_id)")
_WAY_OUT = "give --traverses FILE, a table (.csv) with the columns name, traverse and order"


@dataclass(frozen=True, eq=False)
class Traverses:
    """The traverses of the images of a list.

    Attributes
    ----------
    number : ndarray [n] of int64
        Traverse of each image.
    order : ndarray [n] of float64
        What the images of a traverse are in order of: frame numbers, time stamps, or rows.
    source : str
        What says so, such as "the numbers in the names".
    measured : bool
        Whether differences of ``order`` are those of frames or of time.
    """

    number: NDArray[np.int64]
    order: NDArray[np.float64]
    source: str
    measured: bool

    def pieces(self, gap: float | None = None) -> list[NDArray[np.int64]]:
        """Return the rows of each traverse in order.

        Parameters
        ----------
        gap : float, optional
            A traverse is cut where ``order`` grows by more than this from one image to the next.

        Returns
        -------
        list of ndarray of int64
            Rows of the list; images of the same order stay in that of the list.

        Examples
        --------
        >>> of = by_names(["b/1.jpg", "a/9.jpg", "a/2.jpg", "a/10.jpg"])
        >>> [rows.tolist() for rows in of.pieces()]
        [[0], [2, 1, 3]]
        >>> [rows.tolist() for rows in of.pieces(gap=5)]
        [[0], [2], [1, 3]]
        """
        rows = np.lexsort((self.order, self.number))
        cut = np.diff(self.number[rows]) != 0
        if gap is not None:
            cut |= np.diff(self.order[rows]) > gap
        return np.split(rows, np.flatnonzero(cut) + 1) if len(rows) else []

    def step(self, gap: float | None = None) -> float | None:
        """Return the mean difference between neighbours; None where none is more than 0.

        Those of more than three medians do not count: they are gaps.
        """
        pieces = [np.diff(self.order[rows]) for rows in self.pieces(gap)]
        steps = np.concatenate([np.empty(0), *pieces])
        steps = steps[steps > 0]
        return float(steps[steps <= 3 * np.median(steps)].mean()) if len(steps) else None


def by_names(names: Sequence[str]) -> Traverses | None:
    """Order images by the number that their names end with, without suffix.

    What comes before the number, folders included, tells the traverse.

    Parameters
    ----------
    names : sequence of n str

    Returns
    -------
    Traverses or None
        None if a name does not end with a number, if two images of a traverse have the same, or if
        fewer than half of the images are in a traverse of three or more: these are no traverses.
    """
    numbers: dict[str, int] = {}
    number, order = np.empty(len(names), dtype=np.int64), np.empty(len(names))
    for i, name in enumerate(names):
        folder, slash, file = name.rpartition("/")
        found = _NUMBERED.match(file.rpartition(".")[0] or file)
        if found is None:
            return None
        number[i] = numbers.setdefault(folder + slash + found[1], len(numbers))
        order[i] = float(found[2])
    sizes = np.bincount(number)
    if len({*zip(number.tolist(), order.tolist(), strict=True)}) < len(names):
        return None
    if 2 * sizes[sizes >= 3].sum() < len(names):
        return None
    return Traverses(number, order, "the numbers in the names", True)


def by_list(names: Sequence[str]) -> Traverses:
    """Order images as in the list; the folder of an image tells its traverse."""
    numbers: dict[str, int] = {}
    folders = (name.rpartition("/")[0] for name in names)
    number = np.array([numbers.setdefault(of, len(numbers)) for of in folders], dtype=np.int64)
    source = "the order of the lists, each folder a traverse"
    return Traverses(number, np.arange(len(names), dtype=np.float64), source, False)


def find_traverses(source: str | Path, *lists: Sequence[str]) -> list[Traverses]:
    """Find the traverses of queries and index images.

    Parameters
    ----------
    source : str or Path
        ``names``: :func:`by_names`. ``list``: :func:`by_list`. ``auto``: by names if that is
        possible for all lists, otherwise by list. Or a file, see :func:`read_traverses`.
    *lists : sequence of str
        Names of the images of each list.

    Returns
    -------
    list of Traverses
        One a list.

    Raises
    ------
    ImageListError
        The file cannot be read or lacks an image, or the names have no numbers.
    """
    if source not in SOURCES:
        return read_traverses(source, *lists)
    found = [None if source == "list" else by_names(names) for names in lists]
    known = [of for of in found if of is not None]
    if len(known) == len(lists):
        return known
    if source == "names":
        names = lists[found.index(None)]
        raise ImageListError(
            f"the names of the images, such as {names[0]}, do not end with numbers that order them "
            f"within traverses; {_WAY_OUT}"
        )
    return [by_list(names) for names in lists]


def read_traverses(path: str | Path, *lists: Sequence[str]) -> list[Traverses]:
    """Read traverses from a table, or from a record of kapture.

    A table (CSV) names its columns in the first line: ``name``, and perhaps ``traverse`` (by
    default all images are of one) and ``order`` (a number, such as a time stamp; by default the
    order of the lines). ``records_camera.txt`` of kapture has lines of time stamp, device and
    image: a device is a traverse. Images that are in no list are passed over.

    Parameters
    ----------
    path : str or Path
    *lists : sequence of str
        Names of the images of each list, exactly as in the file.

    Returns
    -------
    list of Traverses
        One a list.

    Raises
    ------
    ImageListError
        The file cannot be read, a line is none of these, or an image is missing or there twice.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, ValueError) as error:
        raise ImageListError(f"{path} cannot be read: {one_line(error)}; {_WAY_OUT}") from None
    try:
        rows = _kapture(text) if _KAPTURE.match(text) else _table(text)
    except (ValueError, csv.Error) as error:
        raise ImageListError(f"{path}, {error}; {_WAY_OUT}") from None
    numbers: dict[str, int] = {}
    known: dict[str, tuple[int, float]] = {}
    wanted = {name for names in lists for name in names}
    for line, name, traverse, order in rows:
        if name in known:
            raise ImageListError(f"{path}, line {line}: {name} is there twice")
        if name in wanted:
            known[name] = numbers.setdefault(traverse, len(numbers)), order
    found = []
    for names in lists:
        missing = [name for name in names if name not in known]
        if missing:
            raise ImageListError(
                f"{path} has no line for {len(missing)} of {len(names)} images of a list, first "
                f"{missing[0]}; names must be the same to the letter"
            )
        both = np.array([known[name] for name in names], dtype=np.float64).reshape(-1, 2)
        source = f"{Path(path).name}"
        found.append(Traverses(both[:, 0].astype(np.int64), both[:, 1], source, True))
    return found


_Row = tuple[int, str, str, float]  # line, name, traverse, order


def _table(text: str) -> list[_Row]:
    reader = csv.reader(io.StringIO(text, newline=""))
    head = [cell.strip().lower() for cell in next(reader, [])]
    if "name" not in head or len(set(head)) < len(head):
        raise ValueError("line 1 does not name the columns")
    rows: list[_Row] = []
    for cells in reader:
        if not cells:
            continue
        line = reader.line_num
        if len(cells) != len(head):
            raise ValueError(f"line {line} has {len(cells)} cells, the head {len(head)}")
        row = dict(zip(head, cells, strict=True))
        order = _number(row["order"], line) if "order" in row else float(len(rows))
        rows.append((line, row["name"], row.get("traverse", ""), order))
    return rows


def _kapture(text: str) -> list[_Row]:
    rows: list[_Row] = []
    for line, content in enumerate(text.splitlines(), start=1):
        if not content.strip() or content.startswith("#"):
            continue
        fields = [field.strip() for field in content.split(",", 2)]
        if len(fields) != 3:
            raise ValueError(f"line {line} is not a time stamp, a device and an image")
        rows.append((line, fields[2], fields[1], _number(fields[0], line)))
    return rows


def _number(text: str, line: int) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"line {line}: the order {text!r} is not a number")
    return value
