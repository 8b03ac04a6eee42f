# SPDX-License-Identifier: MIT
"""Checking that the parts of a data set fit together."""

from __future__ import annotations

import os
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from patchnetvlad.assets.checkpoints import is_trained_for_places
from patchnetvlad.base.names import absolute, normal_name
from patchnetvlad.base.text import SHOWN, some
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.images import image_troubles
from patchnetvlad.errors import FeatureError, GroundTruthError, RemoteError
from patchnetvlad.evaluation.doubts import doubts
from patchnetvlad.own_data.summary import PositiveStatistics, positive_statistics

# Words in names of lists or of weights -> the data they are about.
_TOPICS = {
    "Pittsburgh": r"pitts",
    "Tokyo 24/7": r"tokyo",
    "Mapillary": r"mapillary|msls",
    "Nordland": r"nordland",
}


@dataclass(frozen=True)
class DatasetCheck:
    """Results of :func:`check_dataset`.

    Attributes
    ----------
    facts : tuple of str
        What was counted.
    remarks : tuple of str
        What may be intended, but is worth a look.
    problems : tuple of str
        What does not fit, or cannot be read.
    statistics : PositiveStatistics or None
        None without ground truth that fits the lists.
    """

    facts: tuple[str, ...]
    remarks: tuple[str, ...]
    problems: tuple[str, ...]
    statistics: PositiveStatistics | None = None

    @property
    def sound(self) -> bool:
        """Whether there are no problems."""
        return not self.problems


def check_dataset(
    query_list: str | Path,
    index_list: str | Path,
    *,
    root: str | Path = "",
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    query_features: str | Path | None = None,
    index_features: str | Path | None = None,
    config: str | Path | Config | None = None,
    full: bool = False,
    progress: bool = True,
) -> DatasetCheck:
    """Check a data set: images, lists, features, ground truth, weights.

    Parameters
    ----------
    query_list, index_list : str or Path
        Image lists, or folders of images.
    root : str or Path
        Folder that relative names lie under.
    ground_truth : str or Path, optional
        See :meth:`~patchnetvlad.datasets.ground_truth.GroundTruth.load`.
    threshold : float, optional
        Used in place of ``posDistThr``.
    query_features, index_features : str or Path, optional
        Folders of features, finished or not.
    config : str, Path or Config, optional
        The configuration whose weights are checked.
    full : bool, default False
        Decode every image as a whole; otherwise only its header is read.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    DatasetCheck

    Raises
    ------
    ImageListError
        A list cannot be read.
    ConfigError
        The configuration cannot be read.
    """
    lists = {
        "queries": ImageList.read(query_list, root),
        "index images": ImageList.read(index_list, root),
    }
    facts, remarks, problems = [], [], []
    for what, listed in lists.items():
        facts.append(f"{what}: {len(listed)} ({listed.path})")
        repeated = [name for name, count in Counter(listed.names).items() if count > 1]
        if repeated:
            remarks.append(
                f"{listed.path} names {len(repeated)} images more than once: {some(repeated)}"
            )
    locations = [
        {absolute(path): name for path, name in zip(l_.image_locations(root), l_, strict=True)}
        for l_ in lists.values()
    ]
    both = [name for path, name in locations[0].items() if path in locations[1]]
    if both:
        remarks.append(f"{len(both)} images are both query and index, trivially right: "
                       f"{some(both)}")  # fmt: skip

    for what, listed in lists.items():
        problems += _broken_images(listed, what, root, full, progress)
    for what, listed, directory in (
        ("queries", lists["queries"], query_features),
        ("index images", lists["index images"], index_features),
    ):
        if directory is not None:
            fact, said, wrong = _check_features(directory, listed, what)
            facts += fact
            remarks += said
            problems += wrong
    statistics = None
    if ground_truth is not None:
        try:
            statistics = _check_truth(
                GroundTruth.load(
                    ground_truth, threshold, (lists["queries"].names, lists["index images"].names)
                ),
                lists,
                ground_truth,
                facts,
                remarks,
            )
        except GroundTruthError as error:
            problems.append(str(error))
    if config is not None:
        loaded = config if isinstance(config, Config) else Config.load(config)
        names = [str(listed.path) for listed in lists.values()] + [str(ground_truth or "")]
        names += [os.path.dirname(listed.names[0]) for listed in lists.values()]
        remarks += weights_hints(loaded.resume_path, [*names, loaded.dataset_name])
    return DatasetCheck(tuple(facts), tuple(remarks), tuple(problems), statistics)


def weights_hints(resume_path: str, names: Sequence[str]) -> list[str]:
    """Return hints that the weights do not fit a data set, judging only by names.

    Parameters
    ----------
    resume_path : str
        The configuration's ``resumePath``.
    names : sequence of str
        Names of lists or data sets.

    Returns
    -------
    list of str
        Empty if nothing is known against the combination.
    """
    weights = re.split(r"[/\\]", resume_path)[-1]
    if not is_trained_for_places(resume_path):
        return [
            f"the weights {weights} were never trained for place recognition; for recalls to be "
            "reported use mapillary_WPCA or pittsburgh_WPCA (resumePath)"
        ]
    topics = [topic for topic, words in _TOPICS.items() if _any(words, names)]
    hints = []
    if _any(_TOPICS["Mapillary"], [weights]) and {"Pittsburgh", "Tokyo 24/7"} & set(topics):
        hints.append(
            f"the weights {weights} were trained on Mapillary, the data set is "
            f"{topics[0]}; published recalls on it are of the weights pittsburgh_WPCA (resumePath)"
        )
    if _any("pitts", [weights]) and {"Mapillary", "Nordland"} & set(topics):
        hints.append(
            f"the weights {weights} were trained on Pittsburgh, the data set is "
            f"{topics[0]}; published recalls on it are of the weights mapillary_WPCA (resumePath)"
        )
    return hints


def _any(words: str, names: Sequence[str]) -> bool:
    return any(re.search(words, name, re.IGNORECASE) for name in names)


def _broken_images(
    listed: ImageList, what: str, root: str | Path, full: bool, progress: bool
) -> list[str]:
    """Return no problem, or one that names the first unreadable images."""
    found = image_troubles(listed.image_locations(root), full)
    bar = tqdm(found, f"Checking {what}", len(listed), unit="image", disable=not progress)
    broken = [
        f"{error} ({listed.path.name}, line {line})"
        for error, line in zip(bar, listed.lines, strict=True)
        if error
    ]
    if not broken:
        return []
    return [f"{len(broken)} of {len(listed)} {what} cannot be read: {some(broken, '; ')}"]


def _check_features(
    directory: str | Path, listed: ImageList, what: str
) -> tuple[list[str], list[str], list[str]]:
    """Return facts, remarks and problems of a directory of features."""
    from patchnetvlad.features.inspect import store_info
    from patchnetvlad.features.manifest import check_no_share
    from patchnetvlad.features.store.records import feature_folder, opened_index

    try:
        check_no_share(Path(directory))
        info = store_info(directory)
        names = None
        if info.layout == "store":
            with opened_index(feature_folder(directory)) as index:
                names = index.names()
    except (FeatureError, RemoteError) as error:
        return [], [], [str(error)]
    facts = [f"features of {what}: {info.num_done} of {info.num_images} ({directory})"]
    problems = []
    remarks = []
    if info.num_images != len(listed):
        problems.append(
            f"{directory} has features of {info.num_images} images, {listed.path} names "
            f"{len(listed)}; they must be of the same list"
        )
    elif names is not None and [*map(normal_name, names)] != [*map(normal_name, listed)]:
        pairs = enumerate(zip(names, listed, strict=True))
        row = next(i for i, (a, b) in pairs if normal_name(a) != normal_name(b))
        problems.append(
            f"{directory} has features of other images than {listed.path}, first in line "
            f"{listed.lines[row]}: {names[row]}, not {listed.names[row]}"
        )
    if not info.finished:
        remarks.append(f"{directory} is not finished; the same feature_extract command resumes it")
    return facts, remarks, problems


def _check_truth(
    truth: GroundTruth,
    lists: dict[str, ImageList],
    source: str | Path,
    facts: list[str],
    remarks: list[str],
) -> PositiveStatistics:
    """Measure ground truth; GroundTruthError if it does not fit the lists."""
    queries, index = lists["queries"], lists["index images"]
    rows = len(truth.utm_queries), len(truth.utm_index)
    counts = len(queries), len(index)
    if rows != counts and rows == counts[::-1]:
        raise GroundTruthError(
            f"{source} has {rows[0]} queries and {rows[1]} index images, the lists have "
            f"{counts[0]} and {counts[1]}: are the two lists mixed up?"
        )
    truth.check_counts(*counts, source)
    truth.check_unit(source)
    found = positive_statistics(truth)
    within = "" if truth.distance is None else f", positives within {truth.distance:g}"
    facts.append(f"ground truth: {source}{within}")
    least, median, most = found.per_query
    facts.append(f"positives: {least} to {most} per query, median {median:g}")
    remarks += doubts(truth.positives(), (), index.names)
    if truth.distance is not None:
        low, middle, high = found.nearest
        facts.append(f"nearest index image: {low:.4g} to {high:.4g} away, median {middle:.4g}")
    if len(found.without) == len(queries):
        remarks.append(
            "no query has a right answer: are positions of queries and index in the same unit and "
            "zone, and is the threshold right?"
        )
    elif found.without:
        names = [queries.where(q) for q in found.without[:SHOWN]]
        more = f", and {len(found.without) - SHOWN} more" if len(found.without) > SHOWN else ""
        remarks.append(
            f"{len(found.without)} of {len(queries)} queries have no right answer and count as "
            f"missed: {', '.join(names)}{more}"
        )
    return found
