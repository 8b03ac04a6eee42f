# SPDX-License-Identifier: MIT
"""Make the pictures that README and documentation show: ``make pictures``.

All are made from the photographs of ``patchnetvlad-demo`` and the checkpoint in the package.
"""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from patchnetvlad import (
    Config,
    PlaceIndex,
    extract,
    load_model,
    match,
    plot_answers,
    plot_precision_recall,
    plot_recalls,
    plot_similarity,
    read_runs,
    rerank,
    save_figure,
)
from patchnetvlad.assets import demo_images
from patchnetvlad.cli.demo import OTHERS, PAIRS, write_dataset
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.live import draw_overlay, recognise

IMAGES = Path(__file__).resolve().parent / "images"
DPI = 150  # of the screen; papers take PDF


def make_match_pictures(out: Path) -> None:
    """Make the pictures of a match."""
    photographs = demo_images()
    query, candidate = photographs["montmartre_far"], photographs["montmartre_close"]

    model = load_model("demo", device="cpu")
    found = match(*model.describe([query, candidate]))
    save_figure(found.plot(), out / "match.jpg", dpi=DPI)
    save_figure(found.plot(colour_by="score"), out / "match_score.jpg", dpi=DPI)


def make_live_picture(out: Path) -> None:
    """Make the picture of live recognition."""
    photographs = demo_images()
    with PlaceIndex(load_model("demo", device="cpu")) as index:
        for name in (*PAIRS.values(), *OTHERS):
            index.add(photographs[name], keys=name.replace("_", " "))
        (seen,) = recognise(photographs["montmartre_far"], index, threshold=0.02, matches=True)
        assert seen.frame is not None
        assert seen.place is not None
        frame = draw_overlay(
            seen.frame.image,
            replace(seen, latency=math.nan),  # of this machine
            thumbnail=index.picture(seen.place.key),
            matches=True,
        )
    picture = Image.fromarray(frame)
    picture.thumbnail((820, 820), Image.Resampling.LANCZOS)
    picture.save(out / "live.jpg", quality=80)


def make_data_set_pictures(out: Path, folder: Path) -> None:
    """Make the others, from features and results in ``folder``."""
    write_dataset(folder)
    truth_file, results = folder / "ground_truth.npz", folder / "results"
    config = replace(Config.load("demo"), n_values=tuple(range(1, 11)))
    lists = folder / "query.txt", folder / "index.txt"
    features = folder / "features_query", folder / "features_index"
    descriptors = [
        extract(config, images, "", kept, device="cpu", progress=False)
        for images, kept in zip(lists, features, strict=True)
    ]
    result = rerank(
        config,
        *lists,
        *features,
        ground_truth=truth_file,
        results_dir=results,
        device="cpu",
        progress=False,
    )

    positives = GroundTruth.load(truth_file).positives()
    best = {"NetVLAD": result.retrieved[:, :3], "Patch-NetVLAD": result.reranked[:, :3]}
    figure = plot_answers(
        result.query_names,
        {name: [[result.index_names[i] for i in row] for row in top] for name, top in best.items()},
        right={
            name: [np.isin(*both) for both in zip(top, positives, strict=True)]
            for name, top in best.items()
        },
        scores={
            "NetVLAD": result.scores["NetVLAD"][:, :3],
            "Patch-NetVLAD": result.scores["PatchNetVLAD"][:, :3],
        },
    )
    save_figure(figure, out / "answers.jpg", dpi=DPI)

    # For the README: what re-ranking is for. Those that retrieval alone gets wrong.
    wrong_at_first = [
        q
        for q, right in enumerate(positives)
        if result.retrieved[q, 0] not in right and result.reranked[q, 0] in right
    ]
    figure = plot_answers(
        [result.query_names[q] for q in wrong_at_first],
        {
            name: [[result.index_names[top[q, 0]]] for q in wrong_at_first]
            for name, top in best.items()
        },
        right={
            name: [[bool(top[q, 0] in positives[q])] for q in wrong_at_first]
            for name, top in best.items()
        },
        width=12,
    )
    save_figure(figure, out / "reranked.jpg", dpi=DPI)

    runs = read_runs([results])
    save_figure(plot_recalls(runs), out / "recalls.png", dpi=DPI)
    save_figure(plot_precision_recall(runs), out / "precision_recall.png", dpi=DPI)

    queries, index = descriptors
    similarity = queries @ index.T
    figure = plot_similarity(similarity, positives=positives, answers=result.retrieved, width=8)
    save_figure(figure, out / "similarity.png", dpi=DPI)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, default=IMAGES, help="default: docs/images")
    output = parser.parse_args().output_dir
    make_match_pictures(output)
    make_live_picture(output)
    with tempfile.TemporaryDirectory() as temporary:
        make_data_set_pictures(output, Path(temporary))
    print(f"The pictures are in {output}")
