# SPDX-License-Identifier: MIT
"""Results of matching that were never matched: pictures, positions and candidates by chance."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList, write_names
from patchnetvlad.evaluation.metrics import by_method, evaluate_methods
from patchnetvlad.evaluation.metrics_file import provenance, write_metrics
from patchnetvlad.evaluation.pairs import write_pairs
from patchnetvlad.matching.fusion import fuse_scores, rank, raw_scores, reorder
from patchnetvlad.pipeline.record import Origin, RunRecord
from patchnetvlad.pipeline.run_record import write_run
from patchnetvlad.version import __version__

NASTY = (
    "</script><img src=x onerror=alert(1)>.jpg",
    "<!--<script>.jpg",
    "\"quoted\" & 'so'.jpg",
    "{{data}}{{script}}.jpg",
    "Straße \u2013 東京 \u2028 🗼.jpg",
    "a,b , c.jpg",
)

SMALL = Config(
    resume_path="./pretrained_models/imagenet_WPCA",
    num_pcs=128,
    patch_sizes=(2, 3),
    strides=(1, 1),
    patch_weights=(0.6, 0.4),
    n_values=(1, 5),
    image_size=(96, 128),
    match_image_size=(96, 128),
    source="small.ini",
)
"""For real features of small pictures."""


@dataclass(frozen=True, eq=False)
class Run:
    """A folder of results, and what is in it."""

    root: Path
    results: Path
    config: Config
    queries: ImageList
    index: ImageList
    truth: GroundTruth | None
    retrieved: np.ndarray
    reranked: np.ndarray | None
    patch_scores: np.ndarray | None
    scores: dict[str, np.ndarray]


def write_picture(path: Path, seed: int, size: tuple[int, int]) -> None:
    values = np.random.default_rng(seed)
    coarse = Image.fromarray(values.integers(0, 255, (6, 8, 3), dtype=np.uint8))
    fine = Image.fromarray(values.integers(0, 255, (size[1] // 4, size[0] // 4, 3), dtype=np.uint8))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.blend(coarse.resize(size, Image.Resampling.BICUBIC), fine.resize(size), 0.25).save(
        path, quality=80
    )


def make_run(
    root: Path,
    num_queries: int = 40,
    num_index: int = 60,
    k: int = 10,
    *,
    patches: bool = True,
    truth: bool = True,
    size: tuple[int, int] = (160, 120),
    nasty: bool = True,
    seed: int = 0,
) -> Run:
    """Write images and results: index images along a street, queries near it, some far away."""
    rng = np.random.default_rng(seed)
    names = {
        "query": [f"query/{i:05d}.jpg" for i in range(num_queries)],
        "index": [f"index/{i:05d}.jpg" for i in range(num_index)],
    }
    if nasty:
        names["query"][: len(NASTY)] = [f"query/{name}" for name in NASTY]
        names["index"][: len(NASTY)] = [f"index/{name}" for name in NASTY]
    every = [*names["query"], *names["index"]]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda i: write_picture(root / every[i], i, size), range(len(every))))
    queries, index = (
        ImageList.read(write_names(names[part], root / f"{part}.txt")) for part in names
    )

    along = np.linspace(0, 12 * num_index, num_index)
    places = np.stack([along, 40 * np.sin(along / 200)], axis=1)
    near = rng.integers(0, num_index, num_queries)
    positions = places[near] + rng.normal(0, 4, (num_queries, 2))
    positions[::11] += 1e4  # without a right answer
    distance = rng.random((num_queries, num_index)) + 0.3
    for shift in range(-2, 3):  # the right ones are closer, mostly
        beside = np.clip(near + shift, 0, num_index - 1)
        distance[np.arange(num_queries), beside] -= rng.random(num_queries) * 0.7
    retrieved = np.argsort(distance, axis=1, kind="stable")[:, :k]
    scores = {"NetVLAD": -np.take_along_axis(distance, retrieved, 1)}
    config = Config(
        pooling="patchnetvlad" if patches else "netvlad",
        num_pcs=128,
        n_values=tuple(n for n in (1, 5, 10, 20, 50, 100) if n <= k),
        source="chance.ini",
    )
    reranked = patch_scores = None
    if patches:
        away = np.linalg.norm(places[retrieved] - positions[:, None], axis=2)
        chance = rng.random((num_queries, k, 3))
        patch_scores = -np.clip(0.5 * np.exp(-away / 40)[..., None] + 0.4 * chance, 0, 1)
        reranked = np.array([
            rank(row, fuse_scores(values, config.patch_weights))
            for row, values in zip(retrieved, patch_scores, strict=True)
        ])  # fmt: skip
        raw = raw_scores(patch_scores, config.patch_weights)
        scores["PatchNetVLAD"] = reorder(raw, retrieved, reranked)

    results = root / "results"
    results.mkdir(exist_ok=True)
    answers = by_method(retrieved, reranked)
    for method, rows in answers.items():
        write_pairs(results / f"{method}_predictions.txt", queries.names, index.names, rows)
    known = file = None
    if truth:
        known = GroundTruth(positions, places, 25.0)
        file = known.save(root / "gt.npz")
        metrics = evaluate_methods(answers, known.positives(), config.n_values, scores)
        about = provenance(config, queries, index, ground_truth=file, threshold=25.0)
        write_metrics(results / "metrics.json", metrics, about)
    origin = Origin(
        date="2026-01-02T03:04:05+00:00",
        versions={"patchnetvlad": __version__},
        query_list=str(queries.path),
        index_list=str(index.path),
        dataset_root=str(root),
        query_features=str(root / "no" / "query"),
        index_features=str(root / "no" / "index"),
        ground_truth=None if file is None else str(file),
        threshold=25.0 if truth else None,
        protocol=None,
        candidates=None,
        checkpoint="ab" * 32,
        config=config,
    )
    found = retrieved, reranked, patch_scores, config.n_values
    record = RunRecord(queries.names, index.names, *found, {}, 0, scores, origin=origin)
    write_run(results, record)
    return Run(
        root, results, config, queries, index, known, retrieved, reranked, patch_scores, scores
    )
