# SPDX-License-Identifier: MIT
"""Ground truth without positions: which index images are right answers to each query."""

from __future__ import annotations

import csv
import difflib
import logging
import pickle
import re
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.names import normal_name
from patchnetvlad.errors import GroundTruthError

logger = logging.getLogger(__name__)

Names = tuple[Sequence[str], Sequence[str]]
Rows = tuple[NDArray[np.int64], ...]

TABLES = (".csv", ".tsv", ".txt")
ROWS_KEY, PAIRS_KEY = "positives", "pairs"
"""Arrays of an ``.npz``: [Q, m], filled up with -1, or pairs [P, 2] of query and index image."""


def read_table(file: Path, names: Names | None) -> Rows:
    """Read right answers by name: ``query, right image`` per line, or several images on a line.

    Commas, semicolons or tabs separate. Lines that begin with # and a first line of titles are
    passed over. In place of names there may be numbers, from 0, in the order of the lists.

    Parameters
    ----------
    file : Path
    names : (sequence of Q str, sequence of N str) or None
        Of queries and index images, as in the lists.

    Returns
    -------
    tuple of Q ndarray of int64
        Rows of the index list, ascending. A query that the table does not name has none.

    Raises
    ------
    GroundTruthError
        The table cannot be read, names what is in neither list, or there are no ``names``.
    """
    if names is None:
        raise GroundTruthError(f"{file} names images; it can only be read together with the lists")
    lines = _cells(file)
    number = re.compile(r"\d+")
    if all(number.fullmatch(cell) for _, row in lines for cell in row):
        pairs = [(int(row[0]), int(cell)) for _, row in lines for cell in row[1:]]
        return rows_of_pairs(file, np.array(pairs, dtype=np.int64).reshape(-1, 2), names)
    queries, index = _Finder(file, names[0], "query"), _Finder(file, names[1], "index image")
    found: list[set[int]] = [set() for _ in names[0]]
    for line, row in lines:
        right = {j for cell in row[1:] for j in index.rows(cell, line)}
        for q in queries.rows(row[0], line):
            found[q] |= right
    return _said(file, [np.array(sorted(rows), dtype=np.int64) for rows in found])


def read_array(file: Path, names: Names | None) -> Rows:
    """Read an ``.npy`` of right answers, as VPR-Bench and the validation sets of GSV-Cities have.

    Parameters
    ----------
    file : Path
        Whole numbers [Q, m], filled up with -1; or objects, one a query, each a list or an array of
        whole numbers, or [Q, 2] with the query's number before it. Of pickled objects, only such
        arrays and numbers are read; nothing that a pickle may name is ever called.
    names : (sequence of Q str, sequence of N str) or None

    Returns
    -------
    tuple of Q ndarray of int64
        Rows of the index list, ascending.

    Raises
    ------
    GroundTruthError
        The file cannot be read, or holds something else.
    """
    with file.open("rb") as stream:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0
        shape, _, dtype = (read if version == (1, 0) else np.lib.format.read_array_header_2_0)(
            stream
        )
        if not dtype.hasobject:
            stream.seek(0)
            return rows_of_array(file, np.load(stream, allow_pickle=False), names)
        items = _unpickled(file, stream)
    if len(shape) == 2 and shape[1] == 2 and all(np.ndim(item) for item in items[1::2]):
        order = [int(item) for item in items[::2]]
        if order != list(range(len(order))):
            raise GroundTruthError(f"{file}: the queries are not numbered 0, 1, 2, ... in order")
        items = items[1::2]
    elif len(shape) == 2:
        items = [np.array(items[i : i + shape[1]]) for i in range(0, len(items), shape[1])]
    return _checked(file, [np.atleast_1d(item) for item in items], names)


def rows_of_array(file: Path, values: NDArray[Any], names: Names | None) -> Rows:
    """Return the right answers from an array [Q, m] of integers, padded with -1."""
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2):
        raise GroundTruthError(
            f"{file}: right answers must be whole numbers of shape [queries, most answers], filled "
            f"up with -1, not {values.dtype} of shape {list(values.shape)}"
        )
    rows = values.reshape(len(values), -1).astype(np.int64)
    return _checked(file, [row[row != -1] for row in rows], names)


def rows_of_pairs(file: Path, pairs: NDArray[Any], names: Names | None) -> Rows:
    """Return the right answers from an array of pairs [P, 2]: query and index image, from 0."""
    if pairs.dtype.kind not in "iu" or pairs.ndim != 2 or pairs.shape[1] != 2:
        raise GroundTruthError(
            f"{file}: pairs must be whole numbers of shape [n, 2], query and index image, not "
            f"{pairs.dtype} of shape {list(pairs.shape)}"
        )
    most = int(pairs[:, 0].max(initial=-1)) + 1
    count = most if names is None else len(names[0])
    if most > count or pairs.min(initial=0) < 0:
        raise GroundTruthError(
            f"{file} names query {most - 1 if most > count else int(pairs.min())}, of {count} in "
            "the list, numbered from 0"
        )
    ordered = pairs[np.argsort(pairs[:, 0], kind="stable"), 1].astype(np.int64)
    ends = np.cumsum(np.bincount(pairs[:, 0], minlength=count))
    return _checked(file, np.split(ordered, ends[:-1]), names)


def _checked(file: Path, found: Sequence[NDArray[Any]], names: Names | None) -> Rows:
    """Check rows against the lists; sort them, each once."""
    for q, rows in enumerate(found):
        if len(rows) and rows.dtype.kind not in "iu":
            raise GroundTruthError(f"{file}: the right answers of query {q} are not whole numbers")
        most = np.iinfo(np.int64).max if names is None else len(names[1])
        wrong = [int(row) for row in rows if not 0 <= row < most]
        if wrong:
            raise GroundTruthError(
                f"{file}: query {q} (from 0) has the right answer {wrong[0]}, but the list has "
                f"{most} index images, numbered from 0; is it of these lists?"
            )
    return _said(file, [np.unique(rows).astype(np.int64) for rows in found])


def _said(file: Path, found: Sequence[NDArray[np.int64]]) -> Rows:
    logger.info(
        "%s: %d right answers to %d of %d queries",
        file, sum(map(len, found)), sum(len(rows) > 0 for rows in found), len(found),
    )  # fmt: skip
    return tuple(found)


def _cells(file: Path) -> list[tuple[int, list[str]]]:
    """Return the cells of a table, by line, without comments and titles."""
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise GroundTruthError(f"{file} cannot be read as a text in UTF-8: {error}") from None
    lines = [
        (number, line)
        for number, line in enumerate(text.split("\n"), start=1)
        if line.strip() and not line.startswith("#")
    ]
    mark = max(",;\t", key=lambda mark: sum(line.count(mark) for _, line in lines))
    table = []
    for number, line in lines:
        row = [cell.strip() for cell in next(csv.reader([line], delimiter=mark))]
        if len(row) < 2:
            raise GroundTruthError(
                f"{file}, line {number}: {line.strip()[:80]!r} must name a query and a right "
                "image, with a comma between"
            )
        table.append((number, [row[0], *(cell for cell in row[1:] if cell)]))
    if table and re.match(r"query\w*( image)?$|image$", table[0][1][0], re.IGNORECASE):
        table = table[1:]
    if not table:
        raise GroundTruthError(f"{file} names no right answer")
    return table


class _Finder:
    """Finds the rows of images by their names, or by the ends of their paths."""

    def __init__(self, file: Path, names: Sequence[str], what: str) -> None:
        self.file, self.names, self.what = file, names, what
        self.exact: dict[str, list[int]] = {}
        for i, name in enumerate(names):
            self.exact.setdefault(normal_name(name), []).append(i)
        self.ends: dict[str, set[str]] = {}

    def rows(self, name: str, line: int) -> list[int]:
        key = normal_name(name)
        if key in self.exact:
            return self.exact[key]
        if not self.ends:
            for whole in self.exact:
                parts = whole.split("/")
                for i in range(1, len(parts)):
                    self.ends.setdefault("/".join(parts[i:]), set()).add(whole)
        like = sorted(self.ends.get(key, ()))
        if len(like) == 1:
            return self.exact[like[0]]
        if like:
            hint = f"{like[0]} and {like[1]} both end so: give the whole name"
        else:
            near = difflib.get_close_matches(key, self.exact, n=1)
            hint = f"did you mean {near[0]}?" if near else f"its first is {self.names[0]}"
        raise GroundTruthError(
            f"{self.file}, line {line}: no {self.what} of the list is called {name}; {hint}"
        )


# Pickled arrays, read as data -----------------------------------------------------------------


class _Kind:
    """Stands in for a NumPy type of numbers."""

    def __init__(self, code: str, *rest: object) -> None:
        self.code, self.order = code, "="

    def __setstate__(self, state: Any) -> None:
        self.order = state[1]

    def numbers(self, data: object) -> NDArray[Any]:
        if not (isinstance(data, bytes) and re.fullmatch("[iu][1248]", self.code)):
            raise ValueError(f"it holds {self.code}, not whole numbers")
        return np.frombuffer(data, dtype=f"{self.order if self.order in '<>' else '='}{self.code}")


class _Array:
    """Stands in for a NumPy array."""

    content: Any = ()

    def __init__(self, *arguments: object) -> None: ...

    def __setstate__(self, state: Any) -> None:
        _, shape, kind, _, data = state
        self.content = data if kind.code.startswith("O") else kind.numbers(data)
        if len(shape) > 2 or len(self.content) != np.prod(shape, dtype=int):
            raise ValueError("an array in it has another shape than its content")


def _scalar(kind: _Kind, data: object) -> Any:
    return kind.numbers(data)[0]


class _Reader(pickle.Unpickler):
    """Knows the parts of NumPy arrays alone, and makes stand-ins of these."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):  # how old pickles hold bytes
            return lambda text, _: text.encode("latin1")
        if (module, name) == ("__builtin__", "bytes"):
            return lambda: b""
        known = {"_reconstruct": _Array, "ndarray": _Array, "dtype": _Kind, "scalar": _scalar}
        modules = ("numpy", "numpy.core.multiarray", "numpy._core.multiarray")
        if module not in modules or name not in known:
            raise ValueError(f"it holds {module}.{name}, which is not read: only arrays of numbers")
        return known[name]


def _unpickled(file: Path, stream: IO[bytes]) -> list[Any]:
    """Return the items of an array of objects: whole numbers, or arrays [m] of them."""

    def plain(item: Any) -> NDArray[Any]:
        content = item.content if isinstance(item, _Array) else item
        if not isinstance(content, (list, tuple)):
            return np.asarray(content)
        return np.array([int(plain(of)) for of in content], dtype=np.int64)

    try:
        array = _Reader(stream).load()
        return [plain(item) for item in array.content]
    except Exception as error:  # a pickle may be damaged in any way
        raise GroundTruthError(
            f"{file} holds something else than lists of right answers: {error}; write it as .csv, "
            "one query and right image per line"
        ) from None
