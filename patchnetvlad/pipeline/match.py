# SPDX-License-Identifier: MIT
"""Whole data sets: retrieve, re-rank, evaluate."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.arguments import checked
from patchnetvlad.base.device import choose_device
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines.engine import Engine
from patchnetvlad.engines.journal import Journal
from patchnetvlad.engines.open import open_engine
from patchnetvlad.engines.rerank import Reranking, collect_scores
from patchnetvlad.evaluation.confidence import Confidence
from patchnetvlad.evaluation.doubts import doubts
from patchnetvlad.evaluation.metrics import SEQUENCE, Metrics, evaluate_methods
from patchnetvlad.evaluation.recall import queries_without_positives
from patchnetvlad.pipeline.inputs import MatchInputs, read_inputs, search_available, search_rules
from patchnetvlad.pipeline.outputs import open_outputs
from patchnetvlad.pipeline.record import Ranking, RunRecord
from patchnetvlad.pipeline.result import RerankResult
from patchnetvlad.pipeline.run_record import origin_of
from patchnetvlad.pipeline.selection import select, settle
from patchnetvlad.pipeline.sequence import SequenceOptions, check_sequence, rank_by_sequence
from patchnetvlad.search.by_protocol import retrieve_for_benchmark
from patchnetvlad.search.exact import distances_to
from patchnetvlad.search.retrieve import IndexSpec

logger = logging.getLogger(__name__)


@checked
def rerank(
    config: Config | str | Path,
    query_list: str | Path | ImageList | None,
    index_list: str | Path | ImageList | None,
    query_features: str | Path,
    index_features: str | Path,
    *,
    dataset_root: str | Path = "",
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    results_dir: str | Path | None = None,
    protocol: str | None = None,
    candidates: str | Path | None = None,
    sequence: SequenceOptions | None = None,
    exports: Sequence[str] = (),
    reference_poses: Sequence[str | Path] = (),
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
    cluster: str | None = None,
) -> RerankResult:
    """Retrieve and re-rank the index images of every query, and compute recalls.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a built-in configuration.
    query_list, index_list : str or Path or ImageList or None
        Image lists, with one image per line, or folders of images; None: the lists of the
        protocol.
    query_features, index_features : str or Path
        Folders written by ``feature_extract``, of this package or of the research code; or URLs
        of stores, such as ``s3://bucket/prefix``.
    dataset_root : str or Path, default ""
        Root folder of the images; read only if images were not resized.
    ground_truth : str or Path, optional
        A file for :meth:`~patchnetvlad.datasets.ground_truth.GroundTruth.load`, such as a
        ``.npz`` with ``utmQ``, ``utmDb`` and ``posDistThr``; by default that of the protocol.
    threshold : float, optional
        Overrides ``posDistThr``.
    results_dir : str or Path, optional
        Gets ``NetVLAD_predictions.txt``, ``PatchNetVLAD_predictions.txt``, ``run.json`` and
        ``scores.npz`` (see ``pipeline.run_record``) and, with ground truth, ``recalls.txt`` and
        ``metrics.json``. During re-ranking, it also holds a journal of finished queries.
    protocol : str, optional
        Name of a benchmark, which sets the search rules and checks that lists and ground truth
        are the right ones; see ``datasets.benchmarks.BENCHMARKS``.
    candidates : str or Path, optional
        File of candidates from another method, to be re-ranked instead of those of retrieval
        (overrides ``pred_input_path``): hloc or kapture pairs, or ``.npy``; see
        :func:`~patchnetvlad.search.candidates.load_candidates`.
    sequence : SequenceOptions, optional
        Also score the candidates along the traverses of the queries, as the method "Sequence".
    exports : sequence of str
        Further formats of predictions to write to ``results_dir``; see
        ``evaluation.exports.EXPORTS``.
    reference_poses : sequence of str or Path
        Files with poses of the index images, for exports that need them.
    device : str, default "auto"
    resume : bool, default True
        Reuse the queries already re-ranked by an interrupted run with the same features and
        settings.
    progress : bool, default True
        Show a progress bar on stderr.
    cluster : str, optional
        Use a Ray cluster: ``local``, ``auto`` or its address; see
        :mod:`patchnetvlad.engines.ray.engine`.

    Returns
    -------
    RerankResult

    Raises
    ------
    PatchNetVLADError
        Bad input. It is detected before matching begins, except for missing or damaged patch
        files.
    """
    if not isinstance(config, Config):
        config = Config.load(config)
    config.check_matching()
    if cluster is None:
        choose_device(device)
    inputs = read_inputs(
        config,
        (query_list, index_list),
        (query_features, index_features),
        dataset_root=dataset_root,
        ground_truth=ground_truth,
        threshold=threshold,
        protocol=protocol,
        candidates=candidates,
    )
    if sequence is not None:
        k = min(max(config.n_values), len(inputs.images[1]))
        k = k if inputs.candidates is None else inputs.candidates.shape[1]
        scored = inputs.candidates is None or config.uses_patches
        check_sequence(sequence, *inputs.names, k, scored=scored)
    traverses = None if sequence is None else sequence.traverses
    confidence = inputs.confidence
    outputs = open_outputs(inputs, results_dir, exports, reference_poses, traverses)
    with open_engine(cluster, device, progress) as engine:
        retrieved = _retrieve(inputs, engine, confidence)
        rankings = [retrieved]
        outputs.write_predictions(retrieved)
        if config.uses_patches:
            selected = select(config, retrieved.confidences)
            journal = outputs.open_journal(retrieved.rows, engine.device, resume)
            found = _match(inputs, retrieved.rows, selected, engine, journal, progress)
            rankings.append(settle(config, retrieved, found, selected, confidence))
            outputs.write_predictions(rankings[1])
    about = None
    if sequence is not None:
        last = rankings[-1]
        # Scores of a query are compared with each other only, so that queries may differ in kind.
        scores = last.ordering if last.scores is None else last.scores
        sequenced = rank_by_sequence(sequence, last.method, last.rows, scores, *inputs.names)
        rankings.append(sequenced.ranking)
        outputs.write_predictions(sequenced.ranking)
        about = sequenced.about
    record = _judge(inputs, rankings, about)
    outputs.write_record(record)
    return record


def _retrieve(inputs: MatchInputs, engine: Engine, confidence: Confidence | None) -> Ranking:
    """Search the index for the nearest images of each query, unless candidates are given."""
    if inputs.candidates is not None:
        return Ranking("NetVLAD", inputs.candidates, None, None)
    config, (queries, index) = inputs.config, inputs.readers
    rules = inputs.rules or search_rules(config, inputs.ground_truth)
    rows = retrieve_for_benchmark(
        rules,
        queries.global_descriptors,
        engine.rows(index),
        *inputs.names,
        max(config.n_values),
        spec=IndexSpec(
            config.faiss_index,
            config.faiss_parameters,
            config.faiss_index_path,
            gpu=engine.device.type == "cuda",
        ),
        search=search_available(engine.search, index),
    )
    away = distances_to(queries.global_descriptors, index.global_descriptors, rows)
    scores = -away.astype(np.float64)
    sure = None if confidence is None else confidence.of_retrieval(away)
    return Ranking("NetVLAD", rows, scores, scores, confidences=sure)


def _match(
    inputs: MatchInputs,
    retrieved: NDArray[np.int64],
    selected: NDArray[np.bool_] | None,
    engine: Engine,
    journal: Journal | None,
    progress: bool,
) -> Reranking:
    """Order the candidates [Q, k] of every query that is selected by their patches."""
    config, readers = inputs.config, inputs.readers
    queries, index = (of.image_locations(inputs.dataset_root) for of in inputs.images)
    with (
        contextlib.closing(journal) if journal else contextlib.nullcontext(),
        engine.matching(config, readers, (queries, index), inputs.names) as run,
    ):
        return collect_scores(
            retrieved, config, run, journal=journal, progress=progress, wanted=selected
        )


def _judge(
    inputs: MatchInputs, rankings: Sequence[Ranking], sequence: dict[str, Any] | None
) -> RunRecord:
    """Compute how good the candidates are, as far as there is ground truth."""
    config, positives = inputs.config, inputs.positives
    by = {of.method: of for of in rankings}
    reranked, sequenced = by.get("PatchNetVLAD"), by.get(SEQUENCE)
    scores = {of.method: of.scores for of in rankings if of.scores is not None}
    confidences = {of.method: of.confidences for of in rankings if of.confidences is not None}
    metrics: dict[str, Metrics] = {}
    if positives is not None:
        for doubt in doubts(positives, *inputs.names):
            logger.warning("%s", doubt)
        answers = {of.method: of.rows for of in rankings}
        metrics = evaluate_methods(
            answers,
            positives,
            config.n_values,
            scores,
            interval_block=config.interval_block,
            query_names=inputs.names[0],
            confidences=confidences,
        )
    recalls = {method: values.recalls for method, values in metrics.items()}
    unanswerable = queries_without_positives(positives) if positives is not None else 0
    return RunRecord(
        *inputs.names,
        rankings[0].rows,
        None if reranked is None else reranked.rows,
        None if reranked is None else reranked.patch_scores,
        config.n_values,
        recalls,
        unanswerable,
        scores,
        metrics,
        _citation(inputs, recalls, unanswerable),
        origin_of(inputs),
        confidences,
        None if reranked is None else reranked.selection,
        None if reranked is None else reranked.selected,
        None if sequenced is None else sequenced.rows,
        sequence,
    )


def _citation(
    inputs: MatchInputs, recalls: dict[str, NDArray[np.float64]], unanswerable: int
) -> str:
    """Say in one line how the numbers of a benchmark came about; nothing without one."""
    if inputs.rules is None:
        return ""
    config, (queries, index) = inputs.config, inputs.images
    line = inputs.rules.citation_line(
        num_queries=len(queries),
        num_index=len(index),
        weights=f"{config.resume_path}{config.num_pcs or ''}",
        weights_hash=inputs.checkpoint,
        config=Path(config.source).stem,
        n_values=config.n_values,
        recalls=recalls,
        num_without_positives=unanswerable,
        tolerance=inputs.threshold,
    )
    if inputs.candidates_file is not None:
        line += f"; candidates from {Path(inputs.candidates_file).name}"
    return line


@checked
def evaluate(
    result: RerankResult,
    ground_truth: GroundTruth | str | Path,
    *,
    threshold: float | None = None,
    n_values: Sequence[int] | None = None,
    interval_block: str | None = None,
) -> dict[str, Metrics]:
    """Evaluate the answers for a data set, for example again with other rules.

    Parameters
    ----------
    result : RerankResult
        From :func:`rerank`.
    ground_truth : GroundTruth or str or Path
        Ground truth, or its file.
    threshold : float, optional
        Distance within which an answer is right, in the unit of the ground truth; by default
        that of the ground truth.
    n_values : sequence of int, optional
        Values of N for recall@N; by default those of ``result``. An N larger than the number k
        of candidates counts as k.
    interval_block : str, optional
        What the intervals draw, see :func:`~patchnetvlad.evaluation.intervals.choose_bootstrap`;
        by default that of the configuration of ``result``, or ``auto``.

    Returns
    -------
    dict of str to Metrics
        For ``"NetVLAD"``, ``"PatchNetVLAD"`` if patches were used, and ``"Sequence"`` if there are
        answers of sequences.

    Raises
    ------
    GroundTruthError
        The file cannot be read, or belongs to other lists.
    ValueError
        An N is less than 1.

    Examples
    --------
    >>> import numpy as np
    >>> from patchnetvlad import evaluate
    >>> from patchnetvlad.datasets.ground_truth import GroundTruth
    >>> from patchnetvlad.pipeline.result import RerankResult
    >>> retrieved, reranked = np.array([[0, 1]]), np.array([[1, 0]])
    >>> result = RerankResult(("q",), ("a", "b"), retrieved, reranked, None, (1,), {}, 0)
    >>> truth = GroundTruth(np.zeros((1, 2)), np.array([[90.0, 0], [3, 4]]), 25.0)
    >>> {method: found.recalls.tolist() for method, found in evaluate(result, truth).items()}
    {'NetVLAD': [0.0], 'PatchNetVLAD': [1.0]}
    """
    if isinstance(ground_truth, GroundTruth):
        truth, source = ground_truth, "the ground truth"
        truth = truth if threshold is None else replace(truth, threshold=threshold)
    else:
        truth, source = (
            GroundTruth.load(ground_truth, threshold, (result.query_names, result.index_names)),
            str(ground_truth),
        )
    truth.check_counts(len(result.query_names), len(result.index_names), source)
    truth.check_unit(source)
    if interval_block is None:
        interval_block = result.origin.config.interval_block if result.origin else "auto"
    return evaluate_methods(
        result.answers(),
        truth.positives(),
        result.n_values if n_values is None else n_values,
        result.scores,
        interval_block=interval_block,
        query_names=result.query_names,
        confidences=result.confidences,
    )
