# SPDX-License-Identifier: MIT
"""Inputs of matching, and checks that they fit together."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.datasets.benchmarks import Benchmark
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines.engine import Array
from patchnetvlad.errors import ConfigError, FeatureError
from patchnetvlad.evaluation.confidence import Confidence, find_confidence
from patchnetvlad.features.interface import Reader
from patchnetvlad.features.open import open_reader
from patchnetvlad.search.candidates import load_candidates
from patchnetvlad.search.retrieve import IndexSpec

logger = logging.getLogger(__name__)
Pair = tuple[str | Path, str | Path]


@dataclass(frozen=True, eq=False)
class MatchInputs:
    """Checked inputs of a run of matching. Pairs are of queries and index images.

    Attributes
    ----------
    config : Config
    protocol : str or None
        Name of the benchmark.
    rules : Benchmark or None
        The benchmark of that name.
    images : (ImageList, ImageList)
        Q and N images.
    dataset_root : str or Path
        Folder that relative names lie under.
    features : (str or Path, str or Path)
        Directories or URLs of the features, as they were given.
    readers : (Reader, Reader)
        Of these features.
    ground_truth : str or Path or None
        As it was given, or the benchmark's.
    truth : GroundTruth or None
        What it holds.
    candidates_file : str or None
        File of another method's candidates, as it was given.
    candidates : ndarray [Q, k] of int64 or None
        What it holds: rows of the index list, best first.
    """

    config: Config
    protocol: str | None
    rules: Benchmark | None
    images: tuple[ImageList, ImageList]
    dataset_root: str | Path
    features: Pair
    readers: tuple[Reader, Reader]
    ground_truth: str | Path | None
    truth: GroundTruth | None
    candidates_file: str | None
    candidates: NDArray[np.int64] | None

    @property
    def names(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Names of the images, as in the lists."""
        return self.images[0].names, self.images[1].names

    @property
    def threshold(self) -> float | None:
        """Distance of a positive, in the unit of the ground truth."""
        return None if self.truth is None else self.truth.distance

    @property
    def checkpoint(self) -> str:
        """SHA-256 of the weights; empty if the features do not record it."""
        manifest = self.readers[0].manifest
        return manifest.checkpoint if manifest is not None else ""

    @functools.cached_property
    def confidence(self) -> Confidence | None:
        """What tells how likely answers are right; None if the configuration has nothing that fits.

        ConfigError if it names a file that does not fit, or cannot select queries without one.
        """
        if self.candidates is None:
            return find_confidence(self.config, self.checkpoint)
        if self.config.rerank == "auto" and self.config.uses_patches:
            raise ConfigError(
                f"{self.config.source}: rerank = auto decides by the distances of retrieval, and "
                f"{self.candidates_file} has the candidates of another method; set rerank = always"
            )
        return None

    @functools.cached_property
    def positives(self) -> list[NDArray[np.int64]] | None:
        """Rows of the right answers to each query; None without ground truth."""
        return None if self.truth is None else self.truth.positives()


def read_inputs(
    config: Config,
    lists: tuple[str | Path | ImageList | None, str | Path | ImageList | None],
    features: Pair,
    *,
    dataset_root: str | Path,
    ground_truth: str | Path | None,
    threshold: float | None,
    protocol: str | None,
    candidates: str | Path | None,
) -> MatchInputs:
    """Read what a run of matching needs, and check that it fits together.

    Parameters
    ----------
    config : Config
    lists, features : pair of str or Path
        Of queries and index images; a list that is None is the protocol's.
    dataset_root, ground_truth, threshold, protocol, candidates
        As for :func:`~patchnetvlad.pipeline.match.rerank`.

    Returns
    -------
    MatchInputs

    Raises
    ------
    PatchNetVLADError
        Something is missing, damaged, or does not fit the rest.
    """
    rules = Benchmark.load(protocol) if protocol is not None else None
    images = read_lists(*lists, rules, dataset_root)
    if ground_truth is None and rules is not None:
        ground_truth = rules.ground_truth
    truth = _read_truth(ground_truth, threshold, images, rules)
    file = config.predictions_path if candidates is None else str(candidates)
    given = None if file is None else _read_candidates(file, config, images, rules)
    readers = (
        open_reader(features[0], images[0].names, config, images[0].base(dataset_root)),
        open_reader(features[1], images[1].names, config, images[1].base(dataset_root)),
    )
    check_same_model(*readers, config)
    check_failed(*readers, given if config.uses_patches else None)
    if config.uses_patches and config.match_image_size == (0, 0):
        for of in images:
            of.check_images(dataset_root)  # their sizes will be read
    return MatchInputs(
        config, protocol, rules, images, dataset_root, features, readers, ground_truth, truth, file,
        given,
    )  # fmt: skip


def _read_truth(
    ground_truth: str | Path | None,
    threshold: float | None,
    images: tuple[ImageList, ImageList],
    rules: Benchmark | None,
) -> GroundTruth | None:
    """Load ground truth; lists and truth must be the benchmark's, and fit each other."""
    truth = None
    if ground_truth is not None:
        truth = GroundTruth.load(ground_truth, threshold, (images[0].names, images[1].names))
    elif threshold is not None:
        logger.info("a distance for positives has no effect without ground truth")
    if rules is not None:
        rules.check(*images, truth)
    if truth is not None and ground_truth is not None:
        truth.check_counts(len(images[0]), len(images[1]), ground_truth)
        truth.check_unit(ground_truth)
    return truth


def _read_candidates(
    file: str, config: Config, images: tuple[ImageList, ImageList], rules: Benchmark | None
) -> NDArray[np.int64]:
    """Load another method's candidates [Q, k], which must keep to the benchmark's rules."""
    names = images[0].names, images[1].names
    given = load_candidates(file, *names, max(config.n_values))
    if rules is not None:
        rules.check_candidates(given, *names)
    return given


def search_rules(config: Config, ground_truth: str | Path | None) -> Benchmark:
    """Return the search rules without a protocol: as in the research code, by names."""
    names = (config.dataset_name, "" if ground_truth is None else Path(ground_truth).name)
    if names[0] == "tokyo247" or "tokyo247" in names[1]:
        logger.info("Tokyo 24/7: of the 12 cut-outs of a panorama, only the best counts")
        return Benchmark.load("tokyo247")
    return Benchmark("", "")


def read_lists(
    query_list: str | Path | ImageList | None,
    index_list: str | Path | ImageList | None,
    rules: Benchmark | None,
    root: str | Path = "",
) -> tuple[ImageList, ImageList]:
    """Read the lists, or list folders.

    Parameters
    ----------
    query_list, index_list : str or Path or ImageList or None
        None: the protocol's.
    rules : Benchmark or None
        The protocol.
    root : str or Path, default ""
        A folder may be given relative to it.

    Returns
    -------
    queries, index : ImageList

    Raises
    ------
    ConfigError
        There is neither a list nor a protocol.
    ImageListError
        A list cannot be read.
    """

    def read(path: str | Path | ImageList) -> ImageList:
        return path if isinstance(path, ImageList) else ImageList.read(path, root)

    if query_list is not None and index_list is not None:
        return read(query_list), read(index_list)
    if rules is None:
        raise ConfigError("give the lists of queries and of index images, or a protocol")
    queries, index = rules.lists()
    if query_list is not None:
        queries = read(query_list)
    if index_list is not None:
        index = read(index_list)
    return queries, index


def check_failed(queries: Reader, index: Reader, given: NDArray[np.int64] | None) -> None:
    """Log the images without features; FeatureError if queries or candidates are among them."""
    for reader, what in ((queries, "queries"), (index, "index images")):
        failed = reader.failed
        if not failed:
            continue
        named = f"{', '.join(list(failed)[:5])}{', ...' if len(failed) > 5 else ''}"
        if reader is queries:
            raise FeatureError(
                f"{reader.directory}: {len(failed)} {what} have no features ({named}); repair the "
                "images and run feature_extract again, or extract a list without them"
            )
        there = np.asarray(np.isfinite(index.global_descriptors).all(axis=1))
        if given is not None and not there[given].all():
            raise FeatureError(
                f"{index.directory}: {len(failed)} {what} have no features ({named}), and some are "
                "among the candidates; leave them out of these, or repair the images and run "
                "feature_extract again"
            )
        logger.warning(
            "%s: %d %s have no features and cannot be found: %s",
            reader.directory,
            len(failed),
            what,
            named,
        )


def search_available(
    search: Callable[..., NDArray[np.int64]], index: Reader
) -> Callable[..., NDArray[np.int64]]:
    """Leave out the rows of images that have no features."""
    if not index.failed:
        return search

    there = np.asarray(np.isfinite(index.global_descriptors).all(axis=1))

    def available(queries: Array, rows: Any, top_k: int, spec: IndexSpec) -> NDArray[np.int64]:
        # Of a group, such as a city, these are some of the rows.
        mine = np.asarray(
            np.isfinite(rows).all(axis=1) if isinstance(rows, np.ndarray) else there[rows.numbers]
        )
        numbers = np.flatnonzero(mine)
        if not len(numbers):
            raise FeatureError(
                f"{index.directory}: none of {len(mine)} index images that are searched together "
                "has features; repair them and run feature_extract again"
            )
        return numbers[search(queries, rows[numbers], top_k, spec)]

    return available


def check_same_model(queries: Reader, index: Reader, config: Config) -> None:
    """Raise FeatureError unless the features of queries and index are from the same model."""
    if queries.manifest is None or index.manifest is None:
        return
    # Patches of feature maps will be computed as the configuration says.
    for key, otherwise in (("checkpoint", ""), ("patch_vlad", config.patch_vlad)):
        ours = getattr(queries.manifest, key) or otherwise
        theirs = getattr(index.manifest, key) or otherwise
        if ours and theirs and ours != theirs:
            raise FeatureError(
                f"{queries.directory} and {index.directory} were extracted with different {key} "
                f"({ours[:12]} and {theirs[:12]}); extract both with the same"
            )
