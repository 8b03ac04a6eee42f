# SPDX-License-Identifier: MIT
"""The research code itself, run beside ours as a black box: each reads the other's features."""

from __future__ import annotations

import sys

import numpy as np
import pytest
from conftest import REPOSITORY, SHARED, needs_shared

sys.path.insert(0, str(REPOSITORY / "benchmarks"))
import research_code

from patchnetvlad.features.extract import extract_features
from patchnetvlad.pipeline import match_features

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
        extract_features(config, folder / f"{part}.txt", TOWER, folder / "ours" / part)
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
    match_features(
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
    for name in ("recalls.txt", "NetVLAD_predictions.txt", "PatchNetVLAD_predictions.txt"):
        # The research code puts the folder of the images before their names.
        theirs = (results / "theirs" / name).read_text().replace(f"{TOWER}/", "")
        assert (results / "ours" / name).read_text() == theirs


def test_same_features(world):
    folder, _ = world
    for theirs in (folder / "theirs").rglob("*.npy"):
        ours = folder / "ours" / theirs.relative_to(folder / "theirs")
        np.testing.assert_allclose(np.load(ours), np.load(theirs), atol=1e-4)
