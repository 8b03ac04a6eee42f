# SPDX-License-Identifier: MIT
"""Candidates read from files: arrays of rows, pairs of names of kapture or hloc, or tables."""

from __future__ import annotations

import contextlib
import csv
import io
import logging
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.text import table_cell
from patchnetvlad.errors import FeatureError
from patchnetvlad.search.index import reason_of

logger = logging.getLogger(__name__)

_SCORED = (
    "give pairs of kapture 1.1, a table with a column score, or --by_rank, which takes only the "
    "order of candidates"
)


def load_predictions(path: str | Path, num_queries: int, num_index: int) -> NDArray[np.int64]:
    """Read candidates of another retrieval from a .npy file.

    Parameters
    ----------
    path : str or Path
        Array [Q, k] of rows of the index list, best first.
    num_queries, num_index : int
        Q, and the bound of the rows.

    Returns
    -------
    ndarray [Q, k] of int64

    Raises
    ------
    FeatureError
        The file is missing, or its shape or values do not fit.
    """
    try:
        predictions = np.load(path, allow_pickle=False)
    except Exception as error:  # NumPy raises whatever it trips over.
        raise FeatureError(f"pred_input_path = {path} cannot be read: {reason_of(error)}") from None
    if (
        not isinstance(predictions, np.ndarray)
        or predictions.ndim != 2
        or predictions.shape[1] == 0
        or predictions.dtype.kind not in "iu"
    ):
        raise FeatureError(
            f"pred_input_path = {path} must hold whole numbers of shape [queries, candidates]"
        )
    if len(predictions) != num_queries:
        raise FeatureError(
            f"pred_input_path = {path} has {len(predictions)} rows for {num_queries} queries"
        )
    row, column = np.nonzero((predictions < 0) | (predictions >= num_index))
    if len(row):
        raise FeatureError(
            f"pred_input_path = {path}: row {row[0]}, column {column[0]} is "
            f"{predictions[row[0], column[0]]}; the index list has rows 0 to {num_index - 1}"
        )
    ordered = np.sort(predictions, axis=1)
    repeated = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(repeated):
        raise FeatureError(
            f"pred_input_path = {path}: row {repeated[0]} has a candidate twice; each may be there "
            "once"
        )
    return predictions.astype(np.int64)


def load_candidates(
    path: str | Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    top_k: int | None = None,
) -> NDArray[np.int64]:
    """Read candidates of another retrieval, from an array or from pairs of names.

    The format of a file is recognised by its content:

    - a ``.npy`` file: see ``load_predictions``;
    - pairs of kapture, whose first line is ``# kapture format: 1.0`` or ``1.1``, or whose lines
      are a query's name, a comma and more: ``query, index`` or ``query, index, score``;
    - pairs of hloc: ``query index``, separated by blanks;
    - a table (CSV) whose first line names the columns ``query`` and ``index``, and perhaps ``rank``
      or ``score``, as ``--export csv`` writes it.

    Names must be exactly those of the lists; in pairs of kapture they may hold commas. The lines of
    a query need not be consecutive. Candidates are sorted by score if there are scores, largest
    first, as in kapture's own tools; otherwise they are in the order of the lines. A repeated
    candidate of a query counts once.

    Parameters
    ----------
    path : str or Path
    query_names, index_names : sequence of str
        Names of Q and N images.
    top_k : int, optional
        Candidates wanted per query. No query may have fewer, unless all have the same number.

    Returns
    -------
    ndarray [Q, k] of int64
        Rows of ``index_names``, best first; k is ``top_k``, or what the file has if that is less
        or ``top_k`` is not given.

    Raises
    ------
    FeatureError
        The file cannot be read, names an image that is not in the lists, or lacks candidates.
    """
    file = Path(path)
    with contextlib.suppress(OSError), file.open("rb") as opened:
        start = opened.read(6)
        if file.suffix == ".npy" or start.startswith((b"\x93NUMPY", b"PK\x03\x04")):
            return load_predictions(path, len(query_names), len(index_names))[:, :top_k]
    pairs = read_pairs(path, set(query_names), set(index_names))
    return rank_pairs(path, pairs, query_names, index_names, top_k)


def load_scored(
    path: str | Path, query_names: Sequence[str], index_names: Sequence[str]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Read candidates of another retrieval with their scores, from pairs or a table.

    Parameters
    ----------
    path : str or Path
        As for :func:`load_candidates`, of a format with scores.
    query_names, index_names : sequence of str
        Names of Q and N images.

    Returns
    -------
    rows : ndarray [Q, k] of int64
        Rows of ``index_names``, best first.
    scores : ndarray [Q, k] of float64
        Larger is better.

    Raises
    ------
    FeatureError
        As of :func:`load_candidates`, or the file has no scores.
    """
    if Path(path).suffix == ".npy":
        pairs = []
    else:
        pairs = read_pairs(path, set(query_names), set(index_names), order="score")
    scored = {(of.query, of.candidate): of.score for of in reversed(pairs) if of.score is not None}
    if not scored:
        raise FeatureError(f"pred_input_path = {path} has no scores; {_SCORED}")
    plain = next((of.line for of in pairs if of.score is None), None)
    if plain is not None:
        raise FeatureError(f"pred_input_path = {path}, line {plain} has no score")
    rows = rank_pairs(path, pairs, query_names, index_names)
    scores = [
        [scored[name, index_names[row]] for row in of]
        for name, of in zip(query_names, rows, strict=True)
    ]
    return rows, np.array(scores, dtype=np.float64)


def rank_pairs(
    path: str | Path,
    pairs: Sequence[Pair],
    query_names: Sequence[str],
    index_names: Sequence[str],
    top_k: int | None = None,
) -> NDArray[np.int64]:
    """Gather the candidates of every query from pairs; see :func:`load_candidates`.

    Parameters
    ----------
    path : str or Path
        Their file, for messages.
    pairs : sequence of Pair
    query_names, index_names : sequence of str
        Names of Q and N images.
    top_k : int, optional

    Returns
    -------
    ndarray [Q, k] of int64
        Rows of ``index_names``, best first.

    Raises
    ------
    FeatureError
        A pair names an image that is not in the lists, or a query lacks candidates.
    """
    queries = set(query_names)
    rows = {name: i for i, name in reversed(list(enumerate(index_names)))}
    found = _best_first(path, pairs, queries, rows)
    missing = [name for name in query_names if name not in found]
    if missing:
        raise FeatureError(
            f"pred_input_path = {path} has no candidates for {len(missing)} of "
            f"{len(query_names)} queries, first {missing[0]}"
        )
    most = max(map(len, found.values()))
    wanted = most if top_k is None else min(top_k, most)
    least = min(found, key=lambda name: len(found[name]))
    if len(found[least]) < wanted:
        raise FeatureError(
            f"pred_input_path = {path} has {len(found[least])} candidates for {least}, but "
            f"{most} for others; every query needs {wanted} (the largest of n_values_all, or what "
            "others have if that is less)"
        )
    return np.array([found[name][:wanted] for name in query_names], dtype=np.int64)


def _best_first(
    path: str | Path, pairs: Sequence[Pair], queries: Collection[str], rows: Mapping[str, int]
) -> dict[str, list[int]]:
    """Gather rows of the index list by name of a query, best first."""
    found: dict[str, list[tuple[int, float]]] = {}
    for pair in pairs:
        for name, names, what in ((pair.query, queries, "query"), (pair.candidate, rows, "index")):
            if name not in names:
                raise FeatureError(
                    f"pred_input_path = {path}, line {pair.line}: {name} is not in the {what} "
                    f"list{_resembling(name, names)}"
                )
        found.setdefault(pair.query, []).append((rows[pair.candidate], pair.score or 0.0))
    best_first, moved, repeated = {}, 0, 0
    for name, candidates in found.items():
        ordered = sorted(candidates, key=lambda candidate: -candidate[1])
        best_first[name] = list(dict.fromkeys(row for row, _ in ordered))
        moved += ordered != candidates
        repeated += len(candidates) - len(best_first[name])
    if moved:
        logger.info("%s: the candidates of %d queries were put in order of score", path, moved)
    if repeated:
        logger.info("%s: %d candidates that a query had already were left out", path, repeated)
    return best_first


class Pair(NamedTuple):
    """A line of a file of pairs.

    Attributes
    ----------
    line : int
        Its number, from 1.
    query, candidate : str
        Names of the images.
    score : float or None
        Larger is better; None where the line has none.
    """

    line: int
    query: str
    candidate: str
    score: float | None


def read_pairs(
    path: str | Path,
    queries: Collection[str] | None = None,
    index: Collection[str] | None = None,
    *,
    order: str | None = None,
) -> list[Pair]:
    """Read pairs of kapture or hloc from a file; see :func:`parse_pairs`.

    Parameters
    ----------
    path : str or Path
    queries, index : collection of str, optional
        The names of the lists.
    order : {"rank", "score"}, optional
        Column of a table that pairs are scored by; by default the rank, if it has both.

    Returns
    -------
    list of Pair

    Raises
    ------
    FeatureError
        The file cannot be read, or a line is not a pair.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
        if "\0" in text:
            raise ValueError
    except OSError as error:
        raise FeatureError(f"pred_input_path = {path} cannot be read: {error.strerror}") from None
    except ValueError:
        raise FeatureError(
            f"pred_input_path = {path} is neither a .npy file nor text in UTF-8 with pairs of "
            "kapture or hloc"
        ) from None
    try:
        table = (
            None if queries is None or index is None else _parse_table(text, queries, index, order)
        )
        return parse_pairs(text.split("\n"), queries, index) if table is None else table
    except ValueError as error:
        raise FeatureError(f"pred_input_path = {path}, {error}") from None


def parse_pairs(
    lines: Sequence[str],
    queries: Collection[str] | None = None,
    index: Collection[str] | None = None,
) -> list[Pair]:
    """Parse pairs of kapture or hloc; see :func:`load_candidates`.

    Parameters
    ----------
    lines : sequence of str
        At least one.
    queries, index : collection of str, optional
        The names of the lists. In pairs of kapture, names that hold commas are understood where
        they are given.

    Returns
    -------
    list of Pair
        In the order of the lines.

    Raises
    ------
    ValueError
        A line is not a pair; the message begins with its number.

    Examples
    --------
    >>> parse_pairs(["# kapture format: 1.1", "q/1.jpg, db/7.jpg, 0.5"])
    [Pair(line=2, query='q/1.jpg', candidate='db/7.jpg', score=0.5)]
    >>> parse_pairs(["q/1.jpg db/7.jpg"])
    [Pair(line=1, query='q/1.jpg', candidate='db/7.jpg', score=None)]
    """
    kapture = _is_kapture(lines, queries)
    comment, form = ("#", "query, index or query, index, score") if kapture else ("# ", "two names")
    found: list[Pair] = []
    before = 0  # fields
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith(comment):
            continue
        fields = _split_kapture(line, queries, index) if kapture else line.split()
        if len(fields) not in ((2, 3) if kapture else (2,)):
            kind, separator = ("kapture", "comma") if kapture else ("hloc", "blank")
            raise ValueError(
                f"line {number} has {len(fields)} fields; pairs of {kind} have {form}, and no name "
                f"holds a {separator}"
            )
        before = before or len(fields)
        if len(fields) != before:
            raise ValueError(f"line {number} has {len(fields)} fields, those before {before}")
        score = _number(fields[2]) if len(fields) == 3 else None
        if len(fields) == 3 and score is None:
            raise ValueError(f"line {number}: the score {fields[2]!r} is not a number")
        found.append(Pair(number, fields[0], fields[1], score))
    return found


def _parse_table(
    text: str, queries: Collection[str], index: Collection[str], order: str | None
) -> list[Pair] | None:
    """Parse a table with a head; None where it is none."""
    try:
        reader = csv.reader(io.StringIO(text, newline=""))
        head = [cell.strip().lower() for cell in next(reader, [])]
        if "query" not in head or "index" not in head or len(set(head)) < len(head):
            return None
        columns = ("rank", "score") if order is None else (order,)
        order = next((name for name in columns if name in head), None)
        found: list[Pair] = []
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(head):
                raise ValueError(
                    f"line {reader.line_num} has {len(cells)} cells, the head {len(head)}"
                )
            row = dict(zip(head, cells, strict=True))
            score = None if order is None or row[order] == "" else _number(row[order])
            if order is not None and row[order] and score is None:
                raise ValueError(f"line {reader.line_num}: the {order} {row[order]!r} is no number")
            if score is not None and order == "rank":
                score = -score
            names = (_of_cell(row["query"], queries), _of_cell(row["index"], index))
            found.append(Pair(reader.line_num, *names, score))
    except csv.Error as error:
        raise ValueError(f"line {reader.line_num}: {error}") from None
    return found


def _of_cell(cell: str, names: Collection[str]) -> str:
    """Return the name in a cell, without what keeps spreadsheets from reading it as a formula."""
    short = cell.removeprefix("./")
    return short if cell not in names and table_cell(short) == cell and short in names else cell


def _is_kapture(lines: Sequence[str], queries: Collection[str] | None) -> bool:
    if re.match(r"#\s*kapture format", lines[0]):
        return True
    first = next((line for line in lines if line.strip() and not line.startswith("#")), "")
    if queries is None:
        return "," in first
    known = any(query in queries for query, _ in _cuts(first))
    return known and first.split()[0] not in queries


def _split_kapture(
    line: str, queries: Collection[str] | None, index: Collection[str] | None
) -> list[str]:
    """Split a line at its commas, but for those in names."""
    fields = [field.strip() for field in line.split(",")]
    scored = len(fields) == 3 and _number(fields[2]) is not None
    if len(fields) == 2 or (scored and index is None):
        return fields
    if queries is None:  # a name may hold a comma without a blank after it
        halves = line.split(", ")
        return halves if len(halves) == 2 else fields
    for query, other in _cuts(line):
        if query in queries and (index is None or other in index):
            return [query, other]
    return fields


def _cuts(line: str) -> Iterator[tuple[str, str]]:
    """Cut a line in two at each of its commas."""
    for comma in re.finditer(",", line):
        yield line[: comma.start()].strip(), line[comma.end() :].strip()


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return None if np.isnan(value) else value


def _resembling(name: str, names: Collection[str]) -> str:
    """Words that name an entry of a list with the same file name, if there is one."""
    file = name.replace("\\", "/").rsplit("/", 1)[-1]
    same = (other for other in names if other.replace("\\", "/").rsplit("/", 1)[-1] == file)
    other = next(same, None)
    return f", which has {other}; names must be the same to the letter" if other else ""
