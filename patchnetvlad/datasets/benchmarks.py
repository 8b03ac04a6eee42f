# SPDX-License-Identifier: MIT
"""Benchmarks by name: lists, ground truth, search rules, and conditions to check."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import make_folder
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList, write_names
from patchnetvlad.errors import ConfigError, FeatureError, GroundTruthError, ImageListError
from patchnetvlad.search.by_protocol import CUTOUTS
from patchnetvlad.version import __version__

HASH_DIGITS = 12
"""Digits of the weights' SHA-256 in a citation line."""


@dataclass(frozen=True)
class Group:
    """Images of a benchmark that are searched separately, such as a city.

    Attributes
    ----------
    name : str
        The folder in the images' names.
    num_queries, num_index : int
    """

    name: str
    num_queries: int
    num_index: int


@dataclass(frozen=True)
class Benchmark:
    """A benchmark: how it is run, and the conditions for valid results.

    Attributes
    ----------
    name : str
    title : str
        One line for people.
    query_lists, index_lists : tuple of str
        Published image lists, to be joined in this order; empty: users need their own.
    ground_truth : str or None
        Published ground truth; None: see ``remark``.
    num_queries, num_index : int or None
        Images that the lists must have; None: not asserted.
    tolerance : float or None
        Distance for a positive that the ground truth must have, in ``unit``; None: no
        positions are published.
    unit : {"m", "frames"}
        With ``frames`` the position of image i must be [i, i].
    cutouts : int, default 1
        Index images per panorama, which follow each other. Above 1, ``cutouts`` x k candidates
        are searched, and the best of each panorama is kept.
    group_folder : str or None
        Regular expression for the folders that divide the images into groups, each searched
        separately; None: all are searched together.
    groups_needed : tuple of Group
        Groups that must exist, with their counts; empty: any.
    name_folder : str or None
        Regular expression; a folder of each image's name must match it.
    weights : {"pittsburgh", "mapillary"}
        Training set of the released weights that the paper uses here.
    remark : str
        What readers of the numbers must know; may be empty.
    source : str
        Where the images, and official files, come from.

    Examples
    --------
    >>> Benchmark.load("nordland").num_queries
    27592
    """

    name: str
    title: str
    query_lists: tuple[str, ...] = ()
    index_lists: tuple[str, ...] = ()
    ground_truth: str | None = None
    num_queries: int | None = None
    num_index: int | None = None
    tolerance: float | None = None
    unit: str = "m"
    cutouts: int = 1
    group_folder: str | None = None
    groups_needed: tuple[Group, ...] = ()
    name_folder: str | None = None
    weights: str = "mapillary"
    remark: str = ""
    source: str = ""

    @staticmethod
    def load(name: str) -> Benchmark:
        """Return the benchmark of this name.

        Parameters
        ----------
        name : str
            One of ``BENCHMARKS``.

        Returns
        -------
        Benchmark

        Raises
        ------
        ConfigError
            There is no such benchmark.
        """
        if name in BENCHMARKS:
            return BENCHMARKS[name]
        near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=2, cutoff=0.5)
        hint = (
            f"did you mean {' or '.join(near)}?" if near else f"there are {', '.join(BENCHMARKS)}"
        )
        raise ConfigError(f"no protocol {name!r}; {hint}")

    def lists(self) -> tuple[ImageList, ImageList]:
        """Read the published lists of queries and index images, downloading them on first use.

        Returns
        -------
        queries, index : ImageList
            Several lists (one per city) are joined into one.

        Raises
        ------
        ImageListError
            The benchmark publishes no lists.
        AssetError
            They could not be fetched.
        """
        if not self.query_lists:
            raise ImageListError(
                f"no lists of {self.name} are published; make them (patchnetvlad-dataset create "
                "or python -m patchnetvlad.tools.gen_image_file_list) and name them"
            )
        return _joined(self.query_lists), _joined(self.index_lists)

    def truth(self) -> GroundTruth | None:
        """Read the published ground truth, downloading it on first use; None if there is none.

        Raises
        ------
        AssetError
            It could not be fetched.
        """
        return GroundTruth.load(self.ground_truth) if self.ground_truth is not None else None

    def write_lists(self, folder: str | Path) -> tuple[Path, Path]:
        """Write the published lists as ``query.txt`` and ``index.txt``.

        Parameters
        ----------
        folder : str or Path
            Made if it is missing.

        Returns
        -------
        query_list, index_list : Path

        Raises
        ------
        ImageListError
            The benchmark publishes no lists.
        OutputError
            They cannot be written.
        """
        queries, index = self.lists()
        out = make_folder(folder)
        return (
            write_names(queries.names, out / "query.txt"),
            write_names(index.names, out / "index.txt"),
        )

    def check(self, queries: ImageList, index: ImageList, truth: GroundTruth | None = None) -> None:
        """Raise an error unless lists and ground truth fit the benchmark.

        Parameters
        ----------
        queries, index : ImageList
        truth : GroundTruth, optional
            Positions of both, in the order of the lists.

        Raises
        ------
        ImageListError
            Counts differ from the benchmark's, or names lack the folder that it needs.
        GroundTruthError
            There is not one position per image, the distance differs from the benchmark's, frames
            are not at positions [i, i], or cut-outs of a panorama do not follow each other.
        """
        for what, images, need in (
            ("queries", queries, self.num_queries),
            ("index images", index, self.num_index),
        ):
            self._check_count(what, str(images.path), len(images), need)
            self._check_names(images)
        self._check_groups(queries, index)
        if self.cutouts > 1 and len(index) % self.cutouts:
            raise ImageListError(
                f"protocol {self.name}: {index.path} has {len(index)} images, which is not a "
                f"multiple of the {self.cutouts} cut-outs of a panorama"
            )
        if truth is not None:
            self._check_truth(len(queries), len(index), truth)

    def _check_count(self, what: str, where: str, have: int, need: int | None) -> None:
        if need is not None and have != need:
            raise ImageListError(
                f"protocol {self.name} needs {need:,} {what}, but {where} has {have:,}; use the "
                f"benchmark's own lists, or match without the protocol"
            )

    def _check_names(self, images: ImageList) -> None:
        if self.name_folder is None:
            return
        for i, name in enumerate(images.names):
            if not _folders(name, self.name_folder):
                raise ImageListError(
                    f"protocol {self.name}: {images.where(i)} lies in no folder named like "
                    f"{self.name_folder}; keep the benchmark's folders in the names"
                )

    def _check_groups(self, queries: ImageList, index: ImageList) -> None:
        if self.group_folder is None:
            return
        counts: dict[str, list[int]] = {group.name: [0, 0] for group in self.groups_needed}
        for column, images in enumerate((queries, index)):
            for i, name in enumerate(images.names):
                group = self._group_of(name, images.where(i))
                counts.setdefault(group, [0, 0])[column] += 1
        for need in self.groups_needed:
            have = counts[need.name]
            files = (str(queries.path), str(index.path))
            where = [f"the part {need.name} of {file}" for file in files]
            self._check_count("queries", where[0], have[0], need.num_queries)
            self._check_count("index images", where[1], have[1], need.num_index)
        _check_both(self.name, counts)

    def _check_truth(self, num_queries: int, num_index: int, truth: GroundTruth) -> None:
        source = f"the ground truth of protocol {self.name}"
        truth.check_counts(num_queries, num_index, source)
        if self.tolerance is None:
            return
        if truth.distance is None:
            raise GroundTruthError(
                f"protocol {self.name} needs positions, but {source} holds right answers alone; "
                "match without the protocol"
            )
        if truth.threshold != self.tolerance:
            raise GroundTruthError(
                f"protocol {self.name} needs a distance for positives of {self.tolerance:g}, but "
                f"the ground truth's (posDistThr) is {truth.threshold:g}; give the benchmark's, or "
                "match without the protocol"
            )
        if self.unit == "frames":
            for key, positions in (("utmQ", truth.utm_queries), ("utmDb", truth.utm_index)):
                bad = (positions != np.arange(len(positions))[:, None]).any(axis=1)
                if bad.any():
                    i = int(np.argmax(bad))
                    raise GroundTruthError(
                        f"protocol {self.name} needs the position [{i}, {i}] for image {i}, but "
                        f"{key} has {positions[i].tolist()}; {self.tolerance:g} would then mean "
                        "another number of frames"
                    )
        if self.cutouts > 1:
            panoramas = truth.utm_index.reshape(-1, self.cutouts, truth.utm_index.shape[1])
            bad = (panoramas != panoramas[:, :1]).any(axis=(1, 2))
            if bad.any():
                p = int(np.argmax(bad))
                first, last = p * self.cutouts, (p + 1) * self.cutouts - 1
                raise GroundTruthError(
                    f"protocol {self.name}: index images {first} to {last} (from 0) must be the "
                    f"{self.cutouts} cut-outs of one panorama, but their positions differ; keep "
                    "the order of the benchmark's list"
                )

    def groups(
        self, query_names: Sequence[str], index_names: Sequence[str]
    ) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """Divide the images into groups that are searched separately, by folders in their names.

        Parameters
        ----------
        query_names, index_names : sequence of str
            Q and N names, as in the lists.

        Returns
        -------
        list of (ndarray of int64, ndarray of int64)
            Rows [q] of the query list and [n] of the index list, ascending; each query is in one
            group. A single group if the benchmark searches everything together.

        Raises
        ------
        ImageListError
            A name has no such folder, or a group has queries but no index images.
        """
        if self.group_folder is None:
            return [
                (
                    np.arange(len(query_names), dtype=np.int64),
                    np.arange(len(index_names), dtype=np.int64),
                )
            ]
        rows: dict[str, tuple[list[int], list[int]]] = {}
        for column, names in enumerate((query_names, index_names)):
            for i, name in enumerate(names):
                group = self._group_of(name, name)
                rows.setdefault(group, ([], []))[column].append(i)
        _check_both(self.name, {name: [len(q), len(n)] for name, (q, n) in rows.items()})
        return [
            (np.array(q, dtype=np.int64), np.array(n, dtype=np.int64))
            for q, n in rows.values()
            if q
        ]

    def _group_of(self, name: str, where: str) -> str:
        folders = _folders(name, self.group_folder or "")
        if not folders:
            raise ImageListError(
                f"protocol {self.name} searches images separately by folder, but {where} lies in "
                f"none named like {self.group_folder}; keep the benchmark's folders in the names"
            )
        return folders[-1]  # Folders above the data set may have such names, too.

    def check_candidates(
        self,
        candidates: NDArray[np.int64],
        query_names: Sequence[str],
        index_names: Sequence[str],
    ) -> None:
        """Raise FeatureError unless candidates of another method follow the benchmark's rules.

        Parameters
        ----------
        candidates : ndarray [Q, k] of int64
            Rows of the index list.
        query_names, index_names : sequence of str
            Q and N names, as in the lists.
        """
        for query_rows, index_rows in self.groups(query_names, index_names):
            outside = ~np.isin(candidates[query_rows], index_rows)
            if outside.any():
                row, column = np.argwhere(outside)[0]
                q = query_rows[row]
                raise FeatureError(
                    f"protocol {self.name} searches parts of the data set separately, but "
                    f"candidate {index_names[candidates[q, column]]} of {query_names[q]} is of "
                    "another part"
                )
        if self.cutouts > 1:
            panoramas = np.sort(candidates // self.cutouts, axis=1)
            twice = np.flatnonzero((panoramas[:, 1:] == panoramas[:, :-1]).any(axis=1))
            if len(twice):
                raise FeatureError(
                    f"protocol {self.name} takes one cut-out per panorama, but the candidates of "
                    f"{query_names[twice[0]]} have several of one; keep the best of each"
                )

    def notes(self, weights: str | Path | None = None) -> list[str]:
        """Return notes to print with the numbers: the remark, and unusual weights.

        Parameters
        ----------
        weights : str or Path, optional
            File of the checkpoint.

        Returns
        -------
        list of str
            One sentence each.
        """
        said = [self.remark] if self.remark else []
        others = [other for other in ("pittsburgh", "mapillary") if other != self.weights]
        name = Path(weights).name.lower() if weights is not None else ""
        said += [
            f"weights of {other}; the paper uses those of {self.weights} here"
            for other in others
            if name.startswith((other, other[:5] + "_"))
        ]
        return said

    def citation_line(
        self,
        *,
        num_queries: int,
        num_index: int,
        weights: str | Path | None,
        weights_hash: str = "",
        config: str,
        n_values: Sequence[int] = (),
        recalls: Mapping[str, Sequence[float] | NDArray[np.floating]] | None = None,
        num_without_positives: int = 0,
        tolerance: float | None = None,
        version: str = __version__,
    ) -> str:
        """Return the line to cite, which says how the numbers were obtained.

        Parameters
        ----------
        num_queries, num_index : int
            Images that were matched.
        weights : str or Path or None
            File of the checkpoint, whose name is given; None: not known.
        weights_hash : str, default ""
            SHA-256 of the checkpoint in hexadecimal, whose first 12 digits are given; empty: not
            known.
        config : str
            Name of the configuration.
        n_values : sequence of int
            The N of the recalls.
        recalls : mapping of str to sequence of float, optional
            Recall@N of each method, between 0 and 1; None or empty without ground truth.
        num_without_positives : int, default 0
            Queries without a right answer in the index.
        tolerance : float, optional
            Distance for a positive in m, for the user's own ground truth, if the benchmark has
            none.
        version : str, optional
            Version of this package.

        Returns
        -------
        str
            Without a line end.
        """
        counts = f"{num_queries:,} queries, {num_index:,} index images"
        if self.tolerance is not None:
            counts += f", tolerance {self.tolerance_text}"
        elif tolerance is not None:
            counts += f", tolerance {tolerance:g} m"
        file = "not known" if weights is None else Path(weights).name
        digits = f" (sha256 {weights_hash[:HASH_DIGITS]})" if weights_hash else ""
        parts = [
            f"{self.name}: {counts}",
            f"weights {file}{digits}",
            f"config {config}",
            f"patchnetvlad {version}",
        ]
        for method, values in (recalls or {}).items():
            shown = (f"R@{n} {value:.4f}" for n, value in zip(n_values, values, strict=True))
            parts.append(f"{method} {' '.join(shown)}")
        if recalls:
            parts.append(f"{num_without_positives:,} queries without a positive, counted as missed")
        else:
            parts.append("no recalls: no ground truth")
        parts += self.notes(weights)
        return " ".join("; ".join(parts).split())

    @property
    def tolerance_text(self) -> str:
        """The tolerance with its unit, such as ``25 m``; empty if there is none."""
        if self.tolerance is None:
            return ""
        if self.unit == "frames":
            frames = int(self.tolerance / np.sqrt(2))
            return f"{self.tolerance:g} on [i, i], which is {frames} frames"
        return f"{self.tolerance:g} {self.unit}"


def _joined(names: Sequence[str]) -> ImageList:
    """Read several lists as one; line numbers are kept per file."""
    read = [ImageList.read(name) for name in names]
    if len(read) == 1:
        return read[0]
    first = read[0].path
    return ImageList(
        first.with_name(" + ".join(part.path.name for part in read)),
        tuple(name for part in read for name in part.names),
        tuple(line for part in read for line in part.lines),
    )


def _folders(name: str, pattern: str) -> list[str]:
    """Return the folders in a name that match, outermost first."""
    parents = PurePosixPath(name.replace("\\", "/")).parts[:-1]
    return [folder for folder in parents if re.fullmatch(pattern, folder)]


def _check_both(name: str, counts: Mapping[str, Sequence[int]]) -> None:
    for group, (num_queries, num_index) in counts.items():
        if num_queries and not num_index:
            raise ImageListError(
                f"protocol {name}: the part {group} has {num_queries:,} queries, but no index "
                "images to search"
            )


def _lists(part: str, *datasets: str) -> tuple[str, ...]:
    return tuple(f"{dataset}_imageNames_{part}.txt" for dataset in datasets)


_SERVER = (
    "poses of the queries are not published: recalls are computed by visuallocalization.net from "
    "a pose file"
)

_ALL = (
    Benchmark(
        "pitts30k",
        "Pittsburgh 30k, test set",
        query_lists=_lists("query", "pitts30k"),
        index_lists=_lists("index", "pitts30k"),
        ground_truth="pitts30k_test.npz",
        num_queries=6816,
        num_index=10_000,
        tolerance=25.0,
        weights="pittsburgh",
        source="Pittsburgh 250k, from the authors of NetVLAD; official file pitts30k_test.mat",
    ),
    Benchmark(
        "tokyo247",
        "Tokyo 24/7",
        query_lists=_lists("query", "tokyo247"),
        index_lists=_lists("index", "tokyo247"),
        ground_truth="tokyo247.npz",
        num_queries=315,
        num_index=75_984,
        tolerance=25.0,
        cutouts=CUTOUTS,
        weights="pittsburgh",
        remark=f"of the {CUTOUTS} cut-outs of a panorama only the best counts",
        source="from the authors of NetVLAD; official file tokyo247.mat",
    ),
    Benchmark(
        "nordland",
        "Nordland, summer for winter",
        query_lists=_lists("query", "nordland"),
        index_lists=_lists("index", "nordland"),
        ground_truth="nordland.npz",
        num_queries=27_592,
        num_index=27_592,
        tolerance=10.0,
        unit="frames",
        remark="positions are [i, i], so that a distance of 10 is 7 frames (7 * sqrt(2) = 9.9), "
        "not 10",
        source="frames of NRK's four films of the Nordland line",
    ),
    Benchmark(
        "msls-val",
        "Mapillary Street-level Sequences, validation set (Copenhagen and San Francisco)",
        query_lists=_lists("query", "mapillarycph", "mapillarysf"),
        index_lists=_lists("index", "mapillarycph", "mapillarysf"),
        num_queries=740,
        num_index=18_871,
        tolerance=25.0,
        group_folder="cph|sf",
        groups_needed=(Group("cph", 498, 12_556), Group("sf", 242, 6315)),
        remark="each city is searched on its own",
        source="mapillary.com/dataset/places; ground truth from its csv files",
    ),
    Benchmark(
        "robotcar-v2",
        "RobotCar Seasons v2",
        name_folder="left|rear|right",
        remark=f"all places are searched together; {_SERVER}",
        source="visuallocalization.net; queries of robotcar_v2_test.txt",
    ),
    Benchmark(
        "extended-cmu",
        "Extended CMU Seasons",
        group_folder=r"slice_?[0-9]+",
        remark=f"each slice is searched on its own; {_SERVER}",
        source="visuallocalization.net",
    ),
)

BENCHMARKS: Mapping[str, Benchmark] = {benchmark.name: benchmark for benchmark in _ALL}
"""The benchmarks by name."""
