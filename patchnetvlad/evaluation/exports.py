# SPDX-License-Identifier: MIT
"""Results in the formats of other programs and of benchmarks."""

from __future__ import annotations

import csv
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import replace_text
from patchnetvlad.base.text import table_cell
from patchnetvlad.errors import ConfigError, GroundTruthError, ImageListError
from patchnetvlad.evaluation import pairs as evaluation_pairs
from patchnetvlad.evaluation.poses import Pose, find_poses

logger = logging.getLogger(__name__)

ROBOTCAR_CAMERAS = ("left", "rear", "right")


def write_hloc(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
) -> None:
    """Write pairs for hloc: one ``query index`` per line, best first.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    query_names, index_names : sequence of str
        Names of Q and N images.
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``.

    Raises
    ------
    ImageListError
        A name holds blanks.
    OutputError
        The file cannot be written.
    """
    _check_hloc(query_names, index_names)
    _check_predictions(query_names, index_names, predictions)
    pairs = (
        f"{name} {index_names[i]}\n"
        for name, candidates in zip(query_names, predictions, strict=True)
        for i in candidates
    )
    replace_text(path, pairs)


def write_msls(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
) -> None:
    """Write predictions for Mapillary SLS, task im2im, with one line per query.

    A line holds the key of the query and the keys of its candidates, best first, with a blank
    between. The key of an image is the name of its file, without folder and suffix.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    query_names, index_names : sequence of str
        Names of Q and N images.
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``, none twice for a query.

    Raises
    ------
    ImageListError
        Two images have the same key, or one that would be read as something else.
    ValueError
        A query has a candidate twice.
    OutputError
        The file cannot be written.
    """
    queries, index = _msls_keys(query_names, "queries"), _msls_keys(index_names, "index")
    _check_predictions(query_names, index_names, predictions)
    ordered = np.sort(predictions, axis=1)
    twice = np.flatnonzero((ordered[:, 1:] == ordered[:, :-1]).any(axis=1))
    if len(twice):
        raise ValueError(f"row {twice[0]} of the predictions has a candidate twice")
    replace_text(
        path,
        (
            " ".join([key, *(index[i] for i in candidates)]) + "\n"
            for key, candidates in zip(queries, predictions, strict=True)
        ),
    )


def write_robotcar(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
    *,
    poses: Mapping[str, Pose],
) -> None:
    """Write a submission for RobotCar Seasons (v2): ``camera/name.jpg qw qx qy qz tx ty tz``.

    A query gets the pose of its best candidate, from world to camera. Where that one has no pose,
    the best that has one counts, which is said in the log.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    query_names : sequence of Q str
        Paths that end in ``left|rear|right/timestamp.jpg``.
    index_names : sequence of N str
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``, best first.
    poses : mapping of str to Pose
        As ``poses.read_reference_poses`` gives them.

    Raises
    ------
    ImageListError
        A query is not an image of RobotCar Seasons, or is there twice.
    GroundTruthError
        No candidate of a query has a pose.
    OutputError
        The file cannot be written.
    """
    _write_poses(path, _robotcar_names(query_names), index_names, predictions, poses)


def write_cmu(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
    *,
    poses: Mapping[str, Pose],
) -> None:
    """Write a submission for Extended CMU Seasons: ``name.jpg qw qx qy qz tx ty tz``.

    As :func:`write_robotcar`, but for the names: those of the files, without folder.
    """
    _write_poses(path, _cmu_names(query_names), index_names, predictions, poses)


def write_csv(
    path: Path,
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
    *,
    scores: NDArray[np.floating] | None = None,
    distances: NDArray[np.floating] | None = None,
    right: NDArray[np.bool_] | None = None,
    confidences: NDArray[np.floating] | None = None,
) -> None:
    """Write a table with one line per candidate.

    Its columns are query, rank, index, score, distance, right and confidence.

    Columns that are not given, and NaN, are empty.

    Parameters
    ----------
    path : Path
        Replaced as a whole; its folder must exist.
    query_names, index_names : sequence of str
        Names of Q and N images, quoted where they need it.
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``, best first; their rank counts from 1.
    scores : ndarray [Q, k] of float, optional
        Of the candidates in ``predictions``; larger is more similar.
    distances : ndarray [Q, k] of float, optional
        Between the positions of query and candidate, in the unit of the ground truth.
    right : ndarray [Q, k] of bool, optional
        Whether a candidate is a right answer; 1 or 0 in the table.
    confidences : ndarray [Q] of float, optional
        How likely first answers are right, 0 to 1; empty for other candidates.

    Raises
    ------
    ValueError
        The shapes differ.
    OutputError
        The file cannot be written.
    """
    _check_predictions(query_names, index_names, predictions)
    columns = []
    sure = None
    if confidences is not None:
        sure = np.full(predictions.shape, np.nan)
        sure[:, :1] = confidences[:, None]
    for name, values in (
        ("scores", scores),
        ("distances", distances),
        ("right", right),
        ("confidences", sure),
    ):
        if values is None:
            values = np.full(predictions.shape, np.nan)
        elif values.shape != predictions.shape:
            raise ValueError(
                f"{name} of shape {list(values.shape)} for predictions of {list(predictions.shape)}"
            )
        columns.append(values.astype(np.int64) if values.dtype.kind == "b" else values)

    def rows() -> Iterable[Sequence[object]]:
        yield "query", "rank", "index", "score", "distance", "right", "confidence"
        for q, name in enumerate(map(table_cell, query_names)):
            for rank, i in enumerate(predictions[q], start=1):
                cells = (column[q, rank - 1] for column in columns)
                yield name, rank, table_cell(index_names[i]), *("" if x != x else x for x in cells)

    writer = csv.writer(_Echo(), lineterminator="\n")
    replace_text(path, (writer.writerow(row) for row in rows()))


class _Echo:
    """A file for ``csv.writer`` that hands every line back."""

    def write(self, line: str) -> str:
        return line


def candidate_distances(
    query_positions: NDArray[np.floating],
    index_positions: NDArray[np.floating],
    predictions: NDArray[np.integer],
) -> NDArray[np.float64]:
    """Compute how far each candidate is from its query.

    Parameters
    ----------
    query_positions : ndarray [Q, 2] of float
    index_positions : ndarray [N, 2] of float
    predictions : ndarray [Q, k] of int

    Returns
    -------
    ndarray [Q, k] of float64
        In the unit of the positions.
    """
    away = index_positions[predictions] - query_positions[:, None]  # [Q, k, 2]
    return np.linalg.norm(away.astype(np.float64), axis=2)


def _check_predictions(
    query_names: Sequence[str], index_names: Sequence[str], predictions: NDArray[np.integer]
) -> None:
    if predictions.ndim != 2 or len(predictions) != len(query_names):
        raise ValueError(
            f"predictions of shape {list(predictions.shape)} for {len(query_names)} queries"
        )
    if predictions.size and not 0 <= predictions.min() <= predictions.max() < len(index_names):
        raise ValueError(f"predictions beyond the {len(index_names)} index images")


def _check_hloc(query_names: Sequence[str], index_names: Sequence[str]) -> None:
    for name in (*query_names, *index_names):
        if name.split() != [name]:
            raise ImageListError(
                f"the name {name!r} cannot stand in hloc's pairs, which have a blank between two "
                "names; rename the image, or export csv"
            )


def _check_msls(query_names: Sequence[str], index_names: Sequence[str]) -> None:
    _msls_keys(query_names, "queries")
    _msls_keys(index_names, "index")


def _msls_keys(names: Sequence[str], what: str) -> list[str]:
    keys = [PurePosixPath(name.replace("\\", "/")).stem for name in names]
    for key, name in zip(keys, names, strict=True):
        if key.split() != [key] or "#" in key or "," in key:
            raise ImageListError(
                f"the name {name!r} gives no key for Mapillary SLS: a key is a file's name "
                "without suffix, and holds no blank, comma or '#'"
            )
    _check_unique(keys, names, f"the {what} of Mapillary SLS")
    return keys


def _check_robotcar(query_names: Sequence[str], index_names: Sequence[str]) -> None:
    _robotcar_names(query_names)


def _robotcar_names(names: Sequence[str]) -> list[str]:
    short = []
    for name in names:
        path = PurePosixPath(name.replace("\\", "/"))
        if path.parent.name not in ROBOTCAR_CAMERAS or path.stem.split() != [path.stem]:
            raise ImageListError(
                f"the query {name!r} is not an image of RobotCar Seasons: its path must end in "
                "left, rear or right and timestamp.jpg"
            )
        short.append(f"{path.parent.name}/{path.stem}.jpg")
    _check_unique(short, names, "the queries of RobotCar Seasons")
    return short


def _check_cmu(query_names: Sequence[str], index_names: Sequence[str]) -> None:
    _cmu_names(query_names)


def _cmu_names(names: Sequence[str]) -> list[str]:
    short = [PurePosixPath(name.replace("\\", "/")).name for name in names]
    for file, name in zip(short, names, strict=True):
        if file.split() != [file]:
            raise ImageListError(
                f"the query {name!r} is not an image of Extended CMU Seasons: it holds blanks"
            )
    _check_unique(short, names, "the queries of Extended CMU Seasons")
    return short


def _check_unique(keys: Sequence[str], names: Sequence[str], what: str) -> None:
    key, count = Counter(keys).most_common(1)[0] if keys else ("", 0)
    if count > 1:
        same = [name for name, other in zip(names, keys, strict=True) if other == key]
        raise ImageListError(
            f"{what} must have different names, but {same[0]!r} and {same[1]!r} are both {key}; "
            "leave one out of the list"
        )


def _write_poses(
    path: Path,
    short_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
    poses: Mapping[str, Pose],
) -> None:
    _check_predictions(short_names, index_names, predictions)
    known = find_poses(index_names, poses)
    has_pose = np.array([pose is not None for pose in known], dtype=bool)[predictions]  # [Q, k]
    none = np.flatnonzero(~has_pose.any(axis=1))
    if len(none):
        raise GroundTruthError(
            f"no candidate of {len(none)} queries has a reference pose, first "
            f"{short_names[none[0]]}; give the reference poses of all index images"
        )
    best = has_pose.argmax(axis=1)
    if best.any():
        logger.warning(
            "%s: the best candidate of %d of %d queries has no reference pose; the next one that "
            "has counts",
            path.name,
            np.count_nonzero(best),
            len(best),
        )
    lines = []
    for name, row, column in zip(short_names, predictions, best, strict=True):
        pose = known[row[column]]
        assert pose is not None
        lines.append(f"{pose.line(name)}\n")
    replace_text(path, lines)


def _check_nothing(query_names: Sequence[str], index_names: Sequence[str]) -> None:
    pass


@dataclass(frozen=True)
class Export:
    """A format that results can be written in.

    Attributes
    ----------
    write : callable
        ``write(path, query_names, index_names, predictions, **more)``.
    check : callable
        ``check(query_names, index_names)`` raises ImageListError for names that the format
        cannot hold.
    file : str
        What is appended to the name of the method, to be the name of the file.
    needs, takes : tuple of str
        The keyword arguments that ``write`` must and may have.
    """

    write: Callable[..., None]
    check: Callable[[Sequence[str], Sequence[str]], None]
    file: str
    needs: tuple[str, ...] = ()
    takes: tuple[str, ...] = ()


EXPORTS: dict[str, Export] = {
    "kapture10": Export(evaluation_pairs.write_pairs, _check_nothing, "_predictions.txt"),
    "kapture11": Export(
        evaluation_pairs.write_scored_pairs,
        evaluation_pairs.check_names,
        "_kapture11.txt",
        needs=("scores",),
    ),
    "hloc": Export(write_hloc, _check_hloc, "_hloc.txt"),
    "msls": Export(write_msls, _check_msls, "_msls.csv"),
    "robotcar": Export(write_robotcar, _check_robotcar, "_robotcar.txt", needs=("poses",)),
    "cmu": Export(write_cmu, _check_cmu, "_cmu.txt", needs=("poses",)),
    "csv": Export(
        write_csv,
        _check_nothing,
        "_candidates.csv",
        takes=("scores", "distances", "right", "confidences"),
    ),
}
"""By the name that the command line has for it."""


def check_exports(
    exports: Sequence[str],
    query_names: Sequence[str],
    index_names: Sequence[str],
    poses: Mapping[str, Pose] | None = None,
) -> None:
    """Check, before any work is done, that results can be written in these formats.

    Parameters
    ----------
    exports : sequence of str
        Keys of ``EXPORTS``.
    query_names, index_names : sequence of str
    poses : mapping of str to Pose, optional
        As ``poses.read_reference_poses`` gives them.

    Raises
    ------
    ConfigError
        An export is unknown, or needs poses and there are none.
    ImageListError
        A name that a format cannot hold.
    GroundTruthError
        No index image has a pose.
    """
    for name in exports:
        if name not in EXPORTS:
            raise ConfigError(f"there is no export {name!r}; there are {', '.join(EXPORTS)}")
        EXPORTS[name].check(query_names, index_names)
        if "poses" not in EXPORTS[name].needs:
            continue
        if poses is None:
            raise ConfigError(
                f"the export {name} needs the poses of the index images: --reference_poses FILE"
            )
        missing = find_poses(index_names, poses).count(None)
        if missing == len(index_names):
            raise GroundTruthError(
                f"none of the {missing} index images has a reference pose: the list begins with "
                f"{index_names[0]!r}, the poses with {next(iter(poses))!r}; are they of the same "
                "data set?"
            )
        if missing:
            logger.warning("%d of %d index images have no pose", missing, len(index_names))


def write_exports(
    folder: Path,
    method: str,
    exports: Sequence[str],
    query_names: Sequence[str],
    index_names: Sequence[str],
    predictions: NDArray[np.integer],
    *,
    scores: NDArray[np.floating] | None = None,
    distances: NDArray[np.floating] | None = None,
    right: NDArray[np.bool_] | None = None,
    confidences: NDArray[np.floating] | None = None,
    poses: Mapping[str, Pose] | None = None,
) -> list[Path]:
    """Write the candidates that a method found in several formats.

    An export that needs scores is left out where there are none (candidates of another
    retrieval), which is said in the log.

    Parameters
    ----------
    folder : Path
    method : str
        What the names of the files begin with, such as ``PatchNetVLAD``.
    exports : sequence of str
        Keys of ``EXPORTS``.
    query_names, index_names : sequence of str
        Names of Q and N images.
    predictions : ndarray [Q, k] of int
        Rows of ``index_names``, best first.
    scores : ndarray [Q, k] of float, optional
        Of the candidates in ``predictions``; larger is more similar.
    distances : ndarray [Q, k] of float, optional
    right : ndarray [Q, k] of bool, optional
    confidences : ndarray [Q] of float, optional
    poses : mapping of str to Pose, optional

    Returns
    -------
    list of Path
        The files.

    Raises
    ------
    ConfigError
        An export is unknown, or needs poses and there are none.
    ImageListError, GroundTruthError, OutputError, ValueError
        See the formats.
    """
    given = {
        "scores": scores,
        "distances": distances,
        "right": right,
        "confidences": confidences,
        "poses": poses,
    }
    written = []
    for name in dict.fromkeys(exports):
        if name not in EXPORTS:
            raise ConfigError(f"there is no export {name!r}; there are {', '.join(EXPORTS)}")
        export = EXPORTS[name]
        more = {key: given[key] for key in (*export.needs, *export.takes)}
        if "poses" in more and poses is None:
            raise ConfigError(
                f"the export {name} needs the poses of the index images: --reference_poses FILE"
            )
        if "scores" in export.needs and scores is None:
            logger.info("%s has no scores, so there is no %s of it", method, name)
            continue
        path = export_path(folder, method, name)
        export.write(path, query_names, index_names, predictions, **more)
        written.append(path)
    return written


def export_path(folder: Path, method: str, export: str) -> Path:
    """Return the file that ``write_exports`` writes an export to."""
    return folder / f"{method}{EXPORTS[export].file}"
