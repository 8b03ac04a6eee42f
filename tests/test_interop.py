# SPDX-License-Identifier: MIT
"""The research code itself, run beside ours as a black box: each reads the other's features."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import REPOSITORY, SHARED, needs_shared

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import research_code

from patchnetvlad.config import Config
from patchnetvlad.matching.fusion import fuse_scores
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank

pytestmark = [needs_shared, pytest.mark.slow, pytest.mark.network, pytest.mark.timeout(1800)]
TOWER = SHARED / "tower"


@pytest.fixture(scope="module", params=[True, False], ids=["spatial", "ransac"])
def world(request, tmp_path_factory):
    """Every fourth image of the tower, extracted by both."""
    folder = tmp_path_factory.mktemp("interop")
    config = research_code.write_config(
        folder / "config.ini", research_code.write_checkpoint(folder), fast=request.param
    )
    truth = dict(np.load(TOWER / "ground_truth.npz"))
    for part, key in (("query", "utmQ"), ("index", "utmDb")):
        names = (TOWER / f"{part}.txt").read_text().split()[::4]
        (folder / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
        truth[key] = truth[key][::4]
        extract(config, folder / f"{part}.txt", TOWER, folder / "ours" / part)
        research_code.run(
            "feature_extract", "--config_path", config,
            "--dataset_file_path", folder / f"{part}.txt", "--dataset_root_dir", TOWER,
            "--output_features_dir", folder / "theirs" / part,
        )  # fmt: skip
    np.savez(folder / "gt.npz", **truth)
    return folder, config


@pytest.mark.parametrize("features", ["ours", "theirs"])
def test_same_recalls_from_the_same_features(world, features):
    folder, config = world
    results = folder / f"results_{features}"
    result = rerank(
        config,
        folder / "query.txt",
        folder / "index.txt",
        folder / features / "query",
        folder / features / "index",
        ground_truth=folder / "gt.npz",
        results_dir=results / "ours",
    )
    (results / "theirs").mkdir()
    research_code.run(
        "feature_match", "--config_path", config, "--dataset_root_dir", TOWER,
        "--query_file_path", folder / "query.txt", "--index_file_path", folder / "index.txt",
        "--query_input_features_dir", folder / features / "query",
        "--index_input_features_dir", folder / features / "index",
        "--ground_truth_path", folder / "gt.npz", "--result_save_folder", results / "theirs",
    )  # fmt: skip
    compare(result, results, Config.load(config))


def compare(result, results, config):
    ours, theirs = (
        {
            # The research code puts the folder of the images before their names.
            file.name: file.read_text().replace(f"{TOWER}/", "").splitlines()
            for file in (results / who).iterdir()
        }
        for who in ("ours", "theirs")
    )
    assert ours["recalls.txt"] == theirs["recalls.txt"]
    assert ours["NetVLAD_predictions.txt"] == theirs["NetVLAD_predictions.txt"]
    # Candidates of one score stand in the order of retrieval here, in any order there.
    lines = (found["PatchNetVLAD_predictions.txt"][2:] for found in (ours, theirs))
    count = result.retrieved.shape[1]
    for n, (our_line, their_line) in enumerate(zip(*lines, strict=True)):
        q = n // count
        fused = fuse_scores(result.patch_scores[q], config.patch_weights)
        score = dict(zip([result.index_names[i] for i in result.retrieved[q]], fused, strict=True))
        (query, answer), (their_query, their_answer) = (
            line.split(", ") for line in (our_line, their_line)
        )
        assert query == their_query
        assert score[answer] == pytest.approx(score[their_answer], abs=1e-9)


def test_same_features(world):
    folder, _ = world
    for theirs in (folder / "theirs").rglob("*.npy"):
        ours = folder / "ours" / theirs.relative_to(folder / "theirs")
        np.testing.assert_allclose(np.load(ours), np.load(theirs), atol=1e-4)
