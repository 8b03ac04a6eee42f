# SPDX-License-Identifier: MIT
"""What a run reads: lists, rules of the search, and which images have no features."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.datasets.benchmarks import Benchmark as Rules
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines.engine import Array, Reader
from patchnetvlad.errors import ConfigError, FeatureError
from patchnetvlad.features.npy_files import NpyReader
from patchnetvlad.features.store.reader import StoreReader

logger = logging.getLogger(__name__)


def search_rules(config: Config, ground_truth: str | Path | None) -> Rules:
    """Return how to search without a protocol: as the research code, which goes by names."""
    names = (config.dataset_name, "" if ground_truth is None else Path(ground_truth).name)
    if names[0] == "tokyo247" or "tokyo247" in names[1]:
        logger.info("Tokyo 24/7: of the 12 cut-outs of a panorama, only the best counts")
        return Rules.load("tokyo247")
    return Rules("", "")


def read_lists(
    query_list: str | Path | None, index_list: str | Path | None, rules: Rules | None
) -> tuple[ImageList, ImageList]:
    """Read the lists; the protocol's, where none is given."""
    if query_list is not None and index_list is not None:
        return ImageList.read(query_list), ImageList.read(index_list)
    if rules is None:
        raise ConfigError("give the lists of queries and of index images, or a protocol")
    queries, index = rules.lists()
    if query_list is not None:
        queries = ImageList.read(query_list)
    if index_list is not None:
        index = ImageList.read(index_list)
    return queries, index


def check_failed(queries: Reader, index: Reader, given: NDArray[np.int64] | None) -> None:
    """Say which images have no features; FeatureError if queries or candidates are among them."""
    for reader, what in ((queries, "queries"), (index, "index images")):
        failed = reader.failed if isinstance(reader, StoreReader) else {}
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
    if not isinstance(index, StoreReader) or not index.failed:
        return search

    there = np.asarray(np.isfinite(index.global_descriptors).all(axis=1))

    def available(queries: Array, rows: Any, top_k: int, **keywords: Any) -> NDArray[np.int64]:
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
        return numbers[search(queries, rows[numbers], top_k, **keywords)]

    return available


def check_same_model(
    queries: StoreReader | NpyReader, index: StoreReader | NpyReader, config: Config
) -> None:
    """Raise FeatureError unless one model made the features of queries and index."""
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
