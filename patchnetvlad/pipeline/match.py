# SPDX-License-Identifier: MIT
"""Whole data sets: retrieve, re-rank, evaluate."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.device import choose_device
from patchnetvlad.base.files import make_folder, replace_text
from patchnetvlad.config import Config
from patchnetvlad.datasets.benchmarks import Benchmark as Rules
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.engines.journal import open_journal
from patchnetvlad.engines.open import open_engine
from patchnetvlad.engines.rerank import collect_scores
from patchnetvlad.evaluation.exports import (
    EXPORTS,
    candidate_distances,
    check_exports,
    export_path,
    write_exports,
)
from patchnetvlad.evaluation.metrics import Metrics, by_method, evaluate_methods
from patchnetvlad.evaluation.metrics_file import provenance, write_metrics
from patchnetvlad.evaluation.pairs import write_pairs
from patchnetvlad.evaluation.poses import read_reference_poses
from patchnetvlad.evaluation.recall import format_recalls, queries_without_positives
from patchnetvlad.features.open import open_reader
from patchnetvlad.matching.fusion import fuse_scores, raw_scores, reorder
from patchnetvlad.pipeline.inputs import (
    check_failed,
    check_same_model,
    read_lists,
    search_available,
    search_rules,
)
from patchnetvlad.pipeline.result import RerankResult
from patchnetvlad.pipeline.run_record import RUN_FILES, write_run
from patchnetvlad.search.by_protocol import retrieve_for_benchmark
from patchnetvlad.search.candidates import load_candidates
from patchnetvlad.search.exact import distances_to

logger = logging.getLogger(__name__)
Scores = NDArray[np.float64] | None


def rerank(
    config: Config | str | Path,
    query_list: str | Path | None,
    index_list: str | Path | None,
    query_features: str | Path,
    index_features: str | Path,
    *,
    dataset_root: str | Path = "",
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    results_dir: str | Path | None = None,
    protocol: str | None = None,
    candidates: str | Path | None = None,
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
        A configuration, an INI file, or the name of a shipped configuration.
    query_list, index_list : str or Path or None
        Image lists, one image a line; None: the protocol's.
    query_features, index_features : str or Path
        Directories that ``feature_extract`` wrote, here or by the research code; or URLs of
        stores, such as ``s3://bucket/prefix``.
    dataset_root : str or Path, default ""
        Folder of the images; read only when images were not resized.
    ground_truth : str or Path, optional
        A ``.npz`` with ``utmQ``, ``utmDb`` and ``posDistThr``; by default the protocol's.
    threshold : float, optional
        Used in place of ``posDistThr``.
    results_dir : str or Path, optional
        Gets ``NetVLAD_predictions.txt``, ``PatchNetVLAD_predictions.txt``, ``run.json`` and
        ``scores.npz`` (see ``evaluation.run_record``) and, with ground truth, ``recalls.txt`` and
        ``metrics.json``. While queries are re-ranked, a journal in it
        keeps what is done.
    protocol : str, optional
        Name of a benchmark, which says what is searched how, and asserts that lists and ground
        truth are the benchmark's; see ``datasets.benchmarks.BENCHMARKS``.
    candidates : str or Path, optional
        Candidates of another method to be re-ranked, in place of retrieval (and of
        ``pred_input_path``): pairs of hloc or kapture, or ``.npy``; see
        :func:`~patchnetvlad.search.candidates.load_candidates`.
    exports : sequence of str
        Further formats that predictions are written in to ``results_dir``; see
        ``evaluation.exports.EXPORTS``.
    reference_poses : sequence of str or Path
        Files of the index images' poses, for the exports that need them.
    device : str, default "auto"
    resume : bool, default True
        Take over the queries that an interrupted run with the same features and settings
        re-ranked.
    progress : bool, default True
        Show a progress bar on stderr.
    cluster : str, optional
        Retrieve and re-rank on a Ray cluster: ``local``, ``auto`` or its address; see
        :mod:`patchnetvlad.engines.ray.rerank`.

    Returns
    -------
    RerankResult

    Raises
    ------
    PatchNetVLADError
        Bad input; all of it is noticed before matching begins, except missing or damaged patch
        files.
    """
    if not isinstance(config, Config):
        config = Config.load(config)
    config.check_matching()
    if candidates is not None:
        config = replace(config, predictions_path=str(candidates))
    rules = Rules.load(protocol) if protocol is not None else None
    if cluster is None:
        choose_device(device)
    queries, index = read_lists(query_list, index_list, rules)
    if ground_truth is None and rules is not None:
        ground_truth = rules.ground_truth
    truth = None
    if ground_truth is not None:
        truth = GroundTruth.load(ground_truth, threshold)
    elif threshold is not None:
        logger.info("a distance for positives has no effect without ground truth")
    if rules is not None:
        rules.check(queries, index, truth)
    if truth is not None and ground_truth is not None:
        truth.check_counts(len(queries), len(index), ground_truth)
    top_k = max(config.n_values)
    given = None  # candidates of another method
    if config.predictions_path is not None:
        given = load_candidates(config.predictions_path, queries.names, index.names, top_k)
        if rules is not None:
            rules.check_candidates(given, queries.names, index.names)
    poses = read_reference_poses(reference_poses) if reference_poses else None
    check_exports(exports, queries.names, index.names, poses)
    query_reader = open_reader(query_features, queries.names, config, dataset_root)
    index_reader = open_reader(index_features, index.names, config, dataset_root)
    check_same_model(query_reader, index_reader, config)
    check_failed(query_reader, index_reader, given if config.uses_patches else None)
    if config.uses_patches and config.match_image_size == (0, 0):
        for images in (queries, index):
            images.check_images(dataset_root)  # their sizes will be read
    output = make_folder(results_dir) if results_dir is not None else None
    if output is not None:  # What an earlier run left must not be taken for this one's.
        for file in ("recalls.txt", "metrics.json", "report.html", *RUN_FILES):
            (output / file).unlink(missing_ok=True)
        for method in ("NetVLAD", "PatchNetVLAD"):
            for export in EXPORTS:
                export_path(output, method, export).unlink(missing_ok=True)

    positives = truth.positives() if truth is not None else None
    scores: dict[str, NDArray[np.float64]] = {}

    def write(method: str, predictions: NDArray[np.int64], ordering: Scores) -> None:
        """``ordering`` are scores that candidates are ordered by, comparable or not."""
        if output is None:
            return
        write_pairs(output / f"{method}_predictions.txt", queries.names, index.names, predictions)
        away = right = None
        if truth is not None and positives is not None and "csv" in exports:
            away = candidate_distances(truth.utm_queries, truth.utm_index, predictions)
            right = np.array([np.isin(*both) for both in zip(predictions, positives, strict=True)])
        for export in dict.fromkeys(exports):
            write_exports(
                output,
                method,
                [export],
                queries.names,
                index.names,
                predictions,
                scores=ordering if export == "kapture11" else scores.get(method),
                distances=away,
                right=right,
                poses=poses,
            )

    reranking = journal = None
    readers, names = (query_reader, index_reader), (queries.names, index.names)
    with open_engine(cluster, device, progress) as engine:
        if given is not None:
            retrieved = given
        else:
            search = rules or search_rules(config, ground_truth)
            retrieved = retrieve_for_benchmark(
                search,
                query_reader.global_descriptors,
                engine.rows(index_reader),
                *names,
                top_k,
                factory=config.faiss_index,
                parameters=config.faiss_parameters,
                index_path=config.faiss_index_path,
                gpu=engine.device.type == "cuda",
                search=search_available(engine.search, index_reader),
            )
            descriptors = query_reader.global_descriptors, index_reader.global_descriptors
            scores["NetVLAD"] = -distances_to(*descriptors, retrieved).astype(np.float64)
        write("NetVLAD", retrieved, scores.get("NetVLAD"))
        if config.uses_patches:
            if output is not None:
                journal = open_journal(
                    output, config, retrieved, readers, names, engine.device, resume
                )
            paths = queries.image_locations(dataset_root), index.image_locations(dataset_root)
            with (
                contextlib.closing(journal) if journal else contextlib.nullcontext(),
                engine.matching(config, readers, paths, names) as run,
            ):
                reranking = collect_scores(
                    retrieved, config, run, journal=journal, progress=progress
                )
            raw = raw_scores(reranking.scores, config.patch_weights)
            scores["PatchNetVLAD"] = reorder(raw, retrieved, reranking.predictions)
            fused = [fuse_scores(values, config.patch_weights) for values in reranking.scores]
            ordering = 0.0 - np.array(fused).reshape(retrieved.shape)
            write(
                "PatchNetVLAD",
                reranking.predictions,
                reorder(ordering, retrieved, reranking.predictions),
            )

    metrics: dict[str, Metrics] = {}
    if positives is not None:
        answers = by_method(retrieved, reranking.predictions if reranking else None)
        metrics = evaluate_methods(answers, positives, config.n_values, scores)
    recalls = {method: values.recalls for method, values in metrics.items()}
    unanswerable = queries_without_positives(positives) if positives is not None else 0
    checkpoint = query_reader.manifest.checkpoint if query_reader.manifest else ""
    citation = ""
    if rules is not None:
        citation = rules.citation_line(
            num_queries=len(queries),
            num_index=len(index),
            weights=f"{config.resume_path}{config.num_pcs or ''}",
            weights_hash=checkpoint,
            config=Path(config.source).stem,
            n_values=config.n_values,
            recalls=recalls,
            num_without_positives=unanswerable,
            tolerance=truth.threshold if truth is not None else None,
        )
        if config.predictions_path is not None:
            citation += f"; candidates from {Path(config.predictions_path).name}"
    if output is not None and truth is not None:
        lines = [
            f"{line}\n"
            for method, values in recalls.items()
            for line in format_recalls(method, config.n_values, values)
        ]
        replace_text(output / "recalls.txt", lines)
        about = provenance(
            config,
            queries,
            index,
            ground_truth=ground_truth,
            threshold=truth.threshold,
            checkpoint=checkpoint or None,
            extra={
                "protocol": protocol,
                "citation": citation or None,
                "candidates": config.predictions_path,
            },
        )
        write_metrics(output / "metrics.json", metrics, about)
    if output is not None:
        write_run(
            output,
            config,
            queries,
            index,
            dataset_root=dataset_root,
            query_features=query_features,
            index_features=index_features,
            ground_truth=ground_truth,
            threshold=truth.threshold if truth is not None else None,
            protocol=protocol,
            checkpoint=checkpoint,
            citation=citation,
            retrieved=retrieved,
            reranked=reranking.predictions if reranking else None,
            patch_scores=reranking.scores if reranking else None,
            scores=scores,
        )
    if journal is not None:
        journal.remove()  # all that it led to is written
    return RerankResult(
        queries.names,
        index.names,
        retrieved,
        reranking.predictions if reranking else None,
        reranking.scores if reranking else None,
        config.n_values,
        recalls,
        unanswerable,
        scores,
        metrics,
        citation,
    )


def evaluate(
    result: RerankResult,
    ground_truth: GroundTruth | str | Path,
    *,
    threshold: float | None = None,
    n_values: Sequence[int] | None = None,
) -> dict[str, Metrics]:
    """Compute how good the answers for a data set are, such as by other rules than before.

    Parameters
    ----------
    result : RerankResult
        Of :func:`rerank`.
    ground_truth : GroundTruth or str or Path
        It, or its ``.npz`` file.
    threshold : float, optional
        Distance up to which an answer is right, in the unit of the ground truth; by default what
        that says.
    n_values : sequence of int, optional
        The N of recall@N; by default those of ``result``. Candidates that were not retrieved are
        not found: an N that is larger than their number k counts as k.

    Returns
    -------
    dict of str to Metrics
        Of ``"NetVLAD"`` and, where patches were used, ``"PatchNetVLAD"``.

    Raises
    ------
    GroundTruthError
        The file cannot be read, or is of other lists.
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
        truth, source = GroundTruth.load(ground_truth, threshold), str(ground_truth)
    truth.check_counts(len(result.query_names), len(result.index_names), source)
    return evaluate_methods(
        by_method(result.retrieved, result.reranked),
        truth.positives(),
        result.n_values if n_values is None else n_values,
        result.scores,
    )
