# SPDX-License-Identifier: MIT
"""The record of a run: its results, their quality, and their provenance."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.config import Config
from patchnetvlad.evaluation.metrics import Metrics, by_method
from patchnetvlad.models.grid import patch_grids


@dataclass(frozen=True, eq=False)
class Ranking:
    """The candidates of every query, as a method orders them.

    Attributes
    ----------
    method : str
        One of :data:`~patchnetvlad.evaluation.metrics.METHODS`.
    rows : ndarray [Q, k] of int64
        Rows of the index list, best first.
    scores : ndarray [Q, k] of float64 or None
        Comparable between queries; larger is more similar. None where another method chose.
    ordering : ndarray [Q, k] of float64 or None
        What the candidates are in order of; larger is better.
    patch_scores : ndarray [Q, k, S] of float64 or None
        Score at each patch size of each candidate that was retrieved, in the order of retrieval;
        lower is better.
    confidences : ndarray [Q] of float64 or None
        How likely first answers are right; None if that is not known.
    selection : Selection or None
        Of ``rerank = auto``.
    selected : ndarray [Q] of bool or None
        Queries that were re-ranked; None: all.
    """

    method: str
    rows: NDArray[np.int64]
    scores: NDArray[np.float64] | None
    ordering: NDArray[np.float64] | None
    patch_scores: NDArray[np.float64] | None = None
    confidences: NDArray[np.float64] | None = None
    selection: Selection | None = None
    selected: NDArray[np.bool_] | None = None


@dataclass(frozen=True)
class Origin:
    """Provenance of the results of a run.

    Attributes
    ----------
    date : str
        When the run ended, ISO 8601, UTC.
    versions : dict of str to str
        Of this package, of Python and of the libraries that compute.
    query_list, index_list : str
        Absolute paths of the lists, or of the folders that stood in their place; where a protocol
        joins several lists, a name that says so.
    dataset_root : str
        Folder that relative names lie under, absolute.
    query_features, index_features : str
        Directories of features, absolute.
    ground_truth : str or None
        Absolute path.
    threshold : float or None
        Distance of a positive, in the unit of the ground truth.
    protocol : str or None
        Name of the benchmark.
    candidates : str or None
        Absolute path of the file of candidates that were re-ranked in place of retrieval.
    checkpoint : str or None
        SHA-256 of the weights, where the features say it.
    config : Config
        As it was given. Relative paths in it are those of the folder that the run was started in.
    """

    date: str
    versions: dict[str, str]
    query_list: str
    index_list: str
    dataset_root: str
    query_features: str
    index_features: str
    ground_truth: str | None
    threshold: float | None
    protocol: str | None
    candidates: str | None
    checkpoint: str | None
    config: Config


@dataclass(frozen=True)
class Selection:
    """Which queries ``rerank = auto`` re-ranked, and what that saved.

    Attributes
    ----------
    queries : int
        Q.
    reranked : int
        Those that were not sure by retrieval alone.
    kept : int
        Of these, whose answer of retrieval stayed, because that of re-ranking is less sure.
    sure : float
        Confidence from which queries were not re-ranked.
    seconds : float
        That re-ranking took a query; 0 if it is not known, as where all had been re-ranked before.
    """

    queries: int
    reranked: int
    kept: int
    sure: float
    seconds: float

    @property
    def saved(self) -> float:
        """Seconds that the other queries would have taken."""
        return (self.queries - self.reranked) * self.seconds


@dataclass(frozen=True, eq=False)
class RunRecord:
    """The results of one run of matching, with their provenance.

    :func:`~patchnetvlad.pipeline.match.rerank` returns it, ``run.json`` and ``scores.npz`` store
    it, and :func:`~patchnetvlad.pipeline.run_record.read_run` reads it from these files. Its public
    name is ``patchnetvlad.RerankResult``.

    Attributes
    ----------
    query_names, index_names : tuple of str
        Names of Q and N images, as in the lists.
    retrieved : ndarray [Q, k] of int64
        Candidates by global descriptor (NetVLAD), best first: rows of the index list.
    reranked : ndarray [Q, k] of int64 or None
        The same candidates, re-ranked by patches (Patch-NetVLAD); None without patches.
    patch_scores : ndarray [Q, k, S] of float64 or None
        Scores of the candidates in ``retrieved`` at each patch size; lower is better. float32 if
        read from a file.
    n_values : tuple of int
    recalls : dict of str to ndarray [len(n_values)]
        Recall@N of each method in :meth:`answers`; empty without ground truth, and if the run was
        read from its files: see :func:`~patchnetvlad.pipeline.match.evaluate`.
    num_without_positives : int
        Number of queries without a right answer in the index; 0 without recalls.
    scores : dict of str to ndarray [Q, k] of float64
        Similarity of the candidates in ``retrieved`` ("NetVLAD": negated distance of global
        descriptors), ``reranked`` ("PatchNetVLAD": negated weighted sum of patch scores) and
        ``sequenced`` ("Sequence", see :mod:`patchnetvlad.search.sequences`), comparable between
        queries; larger is more similar. No "NetVLAD" if the candidates are from another method, no
        "PatchNetVLAD" if some queries were not re-ranked.
    metrics : dict of str to Metrics
        All metrics of these methods; empty without recalls.
    citation : str
        The line to cite; empty without a protocol.
    origin : Origin or None
        Provenance; None if unknown.
    confidences : dict of str to ndarray [Q] of float64
        How likely the first answers in ``retrieved`` ("NetVLAD") and ``reranked`` ("PatchNetVLAD")
        are right, 0 to 1; empty if that is not known.
    selection : Selection or None
        Of ``rerank = auto``; None if all queries were re-ranked.
    was_reranked : ndarray [Q] of bool or None
        Queries that were re-ranked; None: all. ``reranked`` has the others in the order of
        ``retrieved``, and their ``patch_scores`` are 0.
    sequenced : ndarray [Q, k] of int64 or None
        The same candidates, re-scored along the traverses of the queries; None without sequences.
    sequence : dict of str or None
        How, as in ``run.json``.
    """

    query_names: tuple[str, ...]
    index_names: tuple[str, ...]
    retrieved: NDArray[np.int64]
    reranked: NDArray[np.int64] | None
    patch_scores: NDArray[np.floating] | None
    n_values: tuple[int, ...]
    recalls: dict[str, NDArray[np.float64]]
    num_without_positives: int
    scores: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    metrics: dict[str, Metrics] = field(default_factory=dict)
    citation: str = ""
    origin: Origin | None = None
    confidences: dict[str, NDArray[np.float64]] = field(default_factory=dict)
    selection: Selection | None = None
    was_reranked: NDArray[np.bool_] | None = None
    sequenced: NDArray[np.int64] | None = None
    sequence: dict[str, Any] | None = None

    def answers(self) -> dict[str, NDArray[np.int64]]:
        """Return the candidates [Q, k] of each method, by its name, the final ones last."""
        return by_method(self.retrieved, self.reranked, self.sequenced)

    @property
    def method(self) -> str:
        """Name of the method whose answers are final."""
        return list(self.answers())[-1]

    @property
    def final(self) -> NDArray[np.int64]:
        """Candidates [Q, k] as that method orders them."""
        return self.answers()[self.method]


class AgreeingPatches(NamedTuple):
    """How many patches agree with the first answer of each query.

    Attributes
    ----------
    sizes : tuple of S int
        Sides of patches, in cells of the feature map.
    totals : tuple of S int
        Patches of that size in an image.
    best : ndarray [Q, S] of int64
        Those that one homography brings onto patches of the first answer.
    """

    sizes: tuple[int, ...]
    totals: tuple[int, ...]
    best: NDArray[np.int64]


def agreeing_patches(record: RunRecord) -> AgreeingPatches | None:
    """Count the patches that support the first answers of a run.

    Parameters
    ----------
    record : RunRecord

    Returns
    -------
    AgreeingPatches or None
        None where scores are no shares of inliers (``matcher = spatialApproximator``), where images
        were matched at sizes of their own, without patches, and where not all were re-ranked.
    """
    config = None if record.origin is None else record.origin.config
    if record.patch_scores is None or record.reranked is None or config is None:
        return None
    if record.was_reranked is not None and not record.was_reranked.all():
        return None
    if config.matcher != "RANSAC" or config.match_image_size == (0, 0):
        return None
    grids = patch_grids(
        config.match_image_size, config.patch_sizes, config.strides, config.geometry
    )
    totals = tuple(len(grid) for grid in grids)
    first = (record.retrieved == record.final[:, :1]).argmax(axis=1)
    shares = -record.patch_scores[np.arange(len(first)), first]
    return AgreeingPatches(config.patch_sizes, totals, np.rint(shares * totals).astype(np.int64))
