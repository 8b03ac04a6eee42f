# SPDX-License-Identifier: MIT
"""Readers for the official files of benchmarks.

``.mat`` files of NetVLAD's data release (Pittsburgh, Tokyo) and the csv folders of Mapillary
Street-level Sequences. Each gives names, positions and the distance for a positive, and can be
written as image lists and ground truth.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import check_inputs_stay, make_folder
from patchnetvlad.datasets.benchmarks import Benchmark
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import write_names
from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.own_data.matfile import (
    Value,
    cell_names,
    columns,
    number,
    read_variable,
)

MSLS_VAL_CITIES = ("cph", "sf")
MSLS_SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")

_TRUE, _FALSE = ("true", "1", "1.0"), ("false", "0", "0.0")
_KEY = re.compile(r"[A-Za-z0-9_-]+")


@dataclass(frozen=True, eq=False)
class OfficialSet:
    """A data set as its official files describe it.

    Attributes
    ----------
    source : Path
        File or folder that was read.
    query_names : tuple of str
        Q names, relative to the folder of the data set.
    index_names : tuple of str
        N names.
    truth : GroundTruth
        Positions of both in metres (UTM), in this order, and the distance for a positive.
    left_out : dict of str to int
        How many images were left out, by reason.
    """

    source: Path
    query_names: tuple[str, ...]
    index_names: tuple[str, ...]
    truth: GroundTruth
    left_out: dict[str, int]

    def write(self, folder: str | Path) -> tuple[Path, Path, Path]:
        """Write ``query.txt``, ``index.txt`` and ``ground_truth.npz``.

        Parameters
        ----------
        folder : str or Path
            Made if it is missing. Each file is replaced as a whole.

        Returns
        -------
        query_list, index_list, ground_truth : Path

        Raises
        ------
        OutputError
            A file cannot be written.
        ImageListError
            A name cannot be listed.
        """
        out = make_folder(folder)
        queries = write_names(self.query_names, out / "query.txt")
        index = write_names(self.index_names, out / "index.txt")
        return queries, index, self.truth.save(out / "ground_truth.npz")

    def truth_for(self, query_names: Sequence[str], index_names: Sequence[str]) -> GroundTruth:
        """Return the ground truth in the order of other lists of the same images.

        Images are found by the end of their names, starting at the folder that the official names
        begin with: ``./Mapillary/train_val/cph/query/images/K.jpg`` is
        ``train_val/cph/query/images/K.jpg``. Suffixes may differ (``.png`` for ``.jpg``).

        Parameters
        ----------
        query_names, index_names : sequence of str
            Names as in the lists; they may be fewer than in the official files.

        Returns
        -------
        GroundTruth

        Raises
        ------
        GroundTruthError
            A name is not in the official files, or the end of a name fits several images.
        """
        return GroundTruth(
            self.truth.utm_queries[self._rows(query_names, self.query_names, "queries")],
            self.truth.utm_index[self._rows(index_names, self.index_names, "index images")],
            self.truth.threshold,
        )

    def _rows(self, wanted: Sequence[str], known: Sequence[str], what: str) -> NDArray[np.int64]:
        rows: dict[tuple[str, ...], int] = {}
        for row, name in enumerate(known):
            if rows.setdefault(_parts(name), row) != row:
                raise GroundTruthError(f"{self.source} names two {what} {name}")
        lengths = sorted({len(parts) for parts in rows}, reverse=True)
        found: dict[int, str] = {}
        for name in wanted:
            parts = _parts(name)
            ends = (parts[-n:] for n in lengths if n <= len(parts))
            row = next((rows[end] for end in ends if end in rows), -1)
            if row < 0:
                raise GroundTruthError(
                    f"{self.source} has no position for {name}; are the lists of the same data set?"
                )
            if row in found:
                raise GroundTruthError(
                    f"{name} and {found[row]} both fit {known[row]} of {self.source}"
                )
            found[row] = name
        return np.array(list(found), dtype=np.int64)


KINDS = ("pittsburgh", "tokyo247", "msls")


def import_official(
    path: str | Path,
    output_dir: str | Path,
    *,
    kind: str | None = None,
    protocol: str | None = None,
) -> OfficialSet:
    """Write lists and ground truth of an official download.

    Parameters
    ----------
    path : str or Path
        A ``.mat`` of NetVLAD's data release, or the folder of Mapillary Street-level Sequences.
    output_dir : str or Path
        Gets ``query.txt``, ``index.txt`` and ``ground_truth.npz``.
    kind : {"pittsburgh", "tokyo247", "msls"}, optional
        Kind of download; by default guessed from the name: a folder is msls, a file with tokyo in
        its name is tokyo247.
    protocol : str, optional
        Write the lists of this benchmark, and the ground truth in their order.

    Returns
    -------
    OfficialSet
        What the official files say, whatever the protocol.

    Raises
    ------
    ConfigError
        The kind or the benchmark is unknown.
    GroundTruthError
        A file is missing or damaged, or has other images than the benchmark.
    """
    if kind is None:
        kind = "pittsburgh"
        if Path(path).is_dir():
            kind = "msls"
        elif "tokyo" in Path(path).name.lower():
            kind = "tokyo247"
    readers: dict[str, Callable[[str | Path], OfficialSet]] = {
        "pittsburgh": read_pittsburgh,
        "tokyo247": read_tokyo247,
        "msls": read_msls,
    }
    if kind not in readers:
        raise ConfigError(f"unknown kind {kind!r}; one of {', '.join(KINDS)}")
    rules = Benchmark.load(protocol) if protocol is not None else None
    lists = rules.lists() if rules is not None else None
    written = [Path(output_dir, name) for name in ("query.txt", "index.txt", "ground_truth.npz")]
    check_inputs_stay(written, [path, *(images.path for images in lists or ())])
    found = readers[kind](path)
    if rules is None or lists is None:
        found.write(output_dir)
        return found
    queries, index = lists
    truth = found.truth_for(queries.names, index.names)
    rules.check(queries, index, truth)
    rules.write_lists(output_dir)
    truth.save(Path(output_dir) / "ground_truth.npz")
    return found


# Structures of NetVLAD's data release ----------------------------------------------------------


def read_pittsburgh(
    path: str | Path, *, index_folder: str = "", query_folder: str = "queries_real"
) -> OfficialSet:
    """Read a ``pitts30k_*.mat`` or ``pitts250k_*.mat`` of NetVLAD's data release.

    Parameters
    ----------
    path : str or Path
    index_folder : str, default ""
        Folder of the index images (``000`` and so on) within the data set's own.
    query_folder : str, default "queries_real"
        Folder of the query images.

    Returns
    -------
    OfficialSet
        In the order of the file.

    Raises
    ------
    GroundTruthError
        The file is missing or damaged, or does not hold this structure.

    Notes
    -----
    The structure ``dbStruct`` has the fields ``dbImageFns`` and ``qImageFns`` (cell arrays of
    names), ``utmDb`` and ``utmQ`` ([2, n]), ``posDistThr``; ``numImages`` and ``numQueries`` are
    compared where they are there. Fields are found by name, so their order does not matter.
    """
    return _read_structure(Path(path), index_folder, query_folder, None)


def read_tokyo247(
    path: str | Path,
    *,
    index_folder: str = "",
    query_folder: str = "247query_v3",
    index_suffix: str | None = ".png",
) -> OfficialSet:
    """Read the ``tokyo247.mat`` of NetVLAD's data release.

    Parameters
    ----------
    path : str or Path
    index_folder : str, default ""
        Folder of the index images (``03814`` and so on) within the data set's own.
    query_folder : str, default "247query_v3"
        Folder of the query images.
    index_suffix : str or None, default ".png"
        In place of the suffix of the index images: the file says ``.jpg``, but the images are
        given out as ``.png``. None: as the file says.

    Returns
    -------
    OfficialSet
        In the order of the file: the 12 cut-outs of each panorama follow each other.

    Raises
    ------
    GroundTruthError
        The file is missing or damaged, or does not hold this structure.

    Notes
    -----
    The fields are those of :func:`read_pittsburgh`; time stamps beside them are not used.
    """
    return _read_structure(Path(path), index_folder, query_folder, index_suffix)


def _read_structure(
    file: Path, index_folder: str, query_folder: str, index_suffix: str | None
) -> OfficialSet:
    fields = _load_structure(file)
    index = cell_names(fields, ("dbImageFns", "dbImage"), file)
    queries = cell_names(fields, ("qImageFns", "qImage"), file)
    if index_suffix is not None:
        index = [str(PurePosixPath(name).with_suffix(index_suffix)) for name in index]
    for key, names in (("numImages", index), ("numQueries", queries)):
        if key in fields and number(fields, key, file) != len(names):
            raise GroundTruthError(
                f"{file}: {key} is {number(fields, key, file):g}, but {len(names)} are named"
            )
    truth = GroundTruth(
        columns(fields, "utmQ", len(queries), file),
        columns(fields, "utmDb", len(index), file),
        number(fields, "posDistThr", file),
    )
    if truth.threshold < 0:
        raise GroundTruthError(f"{file}: posDistThr is {truth.threshold:g}; it must be 0 or more")
    return OfficialSet(
        file,
        tuple(str(PurePosixPath(query_folder, name)) for name in queries),
        tuple(str(PurePosixPath(index_folder, name)) for name in index),
        truth,
        {},
    )


def _load_structure(file: Path) -> dict[str, Value]:
    structure = read_variable(file, "dbStruct")
    if not isinstance(structure, dict):
        raise GroundTruthError(
            f"{file}: 'dbStruct' is not one structure; needed is a file of NetVLAD's data release, "
            "such as pitts30k_test.mat or tokyo247.mat"
        )
    return structure


# Mapillary Street-level Sequences --------------------------------------------------------------


def read_msls(
    root: str | Path,
    cities: Sequence[str] = MSLS_VAL_CITIES,
    *,
    threshold: float = 25.0,
    subtask: str = "all",
    keep_panoramas: bool = False,
    keep_unanswerable: bool = False,
) -> OfficialSet:
    """Read cities of Mapillary Street-level Sequences from their csv files.

    Parameters
    ----------
    root : str or Path
        Folder that holds ``train_val``.
    cities : sequence of str, default ("cph", "sf")
        Folders in ``train_val``; the default is the validation set.
    threshold : float, default 25.0
        Distance for a positive, in m.
    subtask : str, default "all"
        Column of ``subtask_index.csv``; its images count.
    keep_panoramas : bool, default False
        Whether panoramas count.
    keep_unanswerable : bool, default False
        Whether queries without a positive in their city count.

    Returns
    -------
    OfficialSet
        City by city, each in the order of ``postprocessed.csv``. Names are relative to ``root``:
        ``train_val/<city>/query/images/<key>.jpg``. Positions are UTM in each city's own zone, so
        cities must be searched apart.

    Raises
    ------
    GroundTruthError
        A file is missing or damaged, or the files of a folder name different images.

    Notes
    -----
    The defaults are the rules of the official evaluation of single images: images of the subtask
    count, on both sides; panoramas do not (``pano`` in ``raw.csv``); queries without a positive
    within the distance are dropped. Of the validation set, 498 queries in cph and 242 in sf
    are to be left. The official code takes for granted that the rows
    of the csv files fit each other; here they are joined by ``key``. ``seq_info.csv`` is not
    needed for single images.
    """
    if subtask not in MSLS_SUBTASKS:
        raise GroundTruthError(
            f"no subtask {subtask!r} of MSLS: there are {' '.join(MSLS_SUBTASKS)}"
        )
    if not (np.isfinite(threshold) and threshold >= 0):
        raise GroundTruthError(f"the distance for a positive is {threshold}; it must be 0 or more")
    if not cities or len(set(cities)) != len(cities):
        raise GroundTruthError(f"cities must be named, each once, not {' '.join(cities) or 'none'}")
    source = Path(root)
    names: dict[str, list[str]] = {"query": [], "database": []}
    positions: dict[str, list[NDArray[np.float64]]] = {"query": [], "database": []}
    left_out: dict[str, int] = {}

    def leave_out(reason: str, count: int) -> None:
        if count:
            left_out[reason] = left_out.get(reason, 0) + count

    for city in cities:
        if not (source / "train_val" / city).is_dir():
            raise GroundTruthError(
                f"there is no folder {source / 'train_val' / city}; name the folder that holds "
                "train_val (ground truth of the cities in test is not published)"
            )
        found: dict[str, tuple[list[str], NDArray[np.float64]]] = {}
        for side in ("query", "database"):
            keys, utm, counts, pano = read_msls_side(source / "train_val" / city / side, subtask)
            leave_out(f"not in subtask {subtask}", int((~counts).sum()))
            if not keep_panoramas:
                leave_out("panoramas", int((counts & pano).sum()))
                counts &= ~pano
            if not counts.any():
                raise GroundTruthError(
                    f"{source / 'train_val' / city / side} has no image that counts in {subtask}"
                )
            kept = np.flatnonzero(counts)
            found[side] = ([keys[row] for row in kept], utm[kept])
        keys, utm = found["query"]
        if not keep_unanswerable:
            right = GroundTruth(utm, found["database"][1], threshold).positives()
            kept = np.flatnonzero([len(rows) > 0 for rows in right])
            leave_out("queries without a positive", len(keys) - len(kept))
            found["query"] = ([keys[row] for row in kept], utm[kept])
        for side, (keys, utm) in found.items():
            names[side] += [f"train_val/{city}/{side}/images/{key}.jpg" for key in keys]
            positions[side].append(utm)
    if not names["query"]:
        raise GroundTruthError(
            f"no query of {' '.join(cities)} in {source} has a positive within {threshold:g} m"
        )
    return OfficialSet(
        source,
        tuple(names["query"]),
        tuple(names["database"]),
        GroundTruth(
            np.concatenate(positions["query"]), np.concatenate(positions["database"]), threshold
        ),
        left_out,
    )


def read_msls_side(
    folder: Path, subtask: str
) -> tuple[list[str], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_]]:
    """Read the images of one side of a city of MSLS.

    Parameters
    ----------
    folder : Path
        ``train_val/<city>/query`` or ``database``.
    subtask : str

    Returns
    -------
    keys : list of str, length n
    utm : ndarray [n, 2] of float64
    counts : ndarray [n] of bool
        Whether an image is of the subtask.
    panoramas : ndarray [n] of bool

    Raises
    ------
    GroundTruthError
        A file is missing or damaged, or the files name different images.
    """
    file = folder / "postprocessed.csv"
    table = read_msls_table(file, ("easting", "northing"))
    keys = list(table)
    utm = np.empty((len(keys), 2))
    for row, (key, (line, *values)) in enumerate(table.items()):
        for column, (name, value) in enumerate(zip(("easting", "northing"), values, strict=True)):
            utm[row, column] = _coordinate(value, f"{file}, line {line}: {name} of {key}")
    flags = []
    for name, column_name in (("subtask_index.csv", subtask), ("raw.csv", "pano")):
        other = read_msls_table(folder / name, (column_name,))
        for key in keys:
            if key not in other:
                raise GroundTruthError(f"{folder / name} has no image {key}, which is in {file}")
        for key, (line, *_) in other.items():
            if key not in table:
                raise GroundTruthError(
                    f"{folder / name}, line {line}: the image {key} is not in {file}"
                )
        flags.append(
            np.array(
                [
                    read_flag(
                        other[key][1],
                        f"{folder / name}, line {other[key][0]}: {column_name} of {key}",
                    )
                    for key in keys
                ],
                dtype=bool,
            )
        )
    return keys, utm, flags[0], flags[1]


def read_msls_table(file: Path, columns: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Read columns of a csv file of MSLS: key -> (line, value of each), in its order.

    Raises
    ------
    GroundTruthError
        The file is missing or damaged, or lacks a column.
    """
    try:
        text = file.read_bytes().decode("utf-8-sig")
    except FileNotFoundError:
        raise GroundTruthError(
            f"there is no {file}; unpack the metadata of MSLS into the same folder as its images"
        ) from None
    except OSError as error:
        raise GroundTruthError(f"{file} cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise GroundTruthError(f"{file} is not text in UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise GroundTruthError(f"{file} is not a text file")
    rows: dict[str, tuple[Any, ...]] = {}
    line = 0
    try:
        reader = csv.reader(io.StringIO(text, newline=""), strict=True)
        header = [name.strip() for name in next(reader, [])]
        for name in ("key", *columns):
            if header.count(name) != 1:
                raise GroundTruthError(
                    f"{file} needs one column {name!r} (its first line has "
                    f"{', '.join(filter(None, header)) or 'none'})"
                )
        where = [header.index(name) for name in ("key", *columns)]
        for cells in reader:
            line = reader.line_num
            if not any(cell.strip() for cell in cells):
                continue
            if len(cells) != len(header):
                raise GroundTruthError(
                    f"{file}, line {line}: {len(cells)} columns, but the first line has "
                    f"{len(header)}"
                )
            key, *values = (cells[column].strip() for column in where)
            if not _KEY.fullmatch(key):
                raise GroundTruthError(
                    f"{file}, line {line}: {key[:40]!r} is not a key (letters, digits, - and _)"
                )
            if key in rows:
                raise GroundTruthError(
                    f"{file}, line {line}: the key {key} is in line {rows[key][0]}, too"
                )
            rows[key] = (line, *values)
    except csv.Error as error:
        raise GroundTruthError(f"{file}, after line {line}: {error}") from None
    if not rows:
        raise GroundTruthError(f"{file} names no image")
    return rows


def _coordinate(text: str, where: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not np.isfinite(value):
        raise GroundTruthError(f"{where} is {text[:40]!r}, not a finite number")
    return value


def read_flag(text: str, where: str) -> bool:
    """Read a truth value; GroundTruthError, which says ``where``, if it is none."""
    word = text.lower()
    if word not in _TRUE + _FALSE:
        raise GroundTruthError(f"{where} is {text[:40]!r}, neither True nor False")
    return word in _TRUE


def _parts(name: str) -> tuple[str, ...]:
    """Return the folders and the stem of a name, which images are compared by."""
    path = PurePosixPath(name.replace("\\", "/"))
    return (*path.parts[:-1], path.stem)
