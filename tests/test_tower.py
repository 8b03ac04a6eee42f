# SPDX-License-Identifier: MIT
"""A real data set, against what the research code made of it.

The original arithmetic of patch descriptors leaves rounding error where a cluster hardly occurs in
a patch (see docs/migration.md), which is another on another processor. So re-ranked lists are
compared by their first answers and, give or take one query, by their recalls.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import SHARED, needs_shared

from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.evaluation.calibration import area_under_risk_coverage
from patchnetvlad.evaluation.confidence import shipped_confidence
from patchnetvlad.features.convert import convert_features
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.recipes.confidence import answers_of

pytestmark = [needs_shared, pytest.mark.tower, pytest.mark.timeout(1800)]
TOWER = SHARED / "tower"
# Integral images round as the processor and its threads do. On an Intel Xeon, all first answers are
# the reference's. On an AMD EPYC two of them differ in A and three in B, and recall is one query
# off at an N, or two with one thread.
MOST_OFF = 2 / 33 + 1e-4
LEAST_EQUAL = 29


def config(**changes):
    return Config(
        resume_path=str(SHARED / "checkpoints" / "reference_WPCA"),
        num_pcs=128,
        cache_batch_size=4,
        **changes,
    )


CONFIG_A = config(
    patch_sizes=(5,), strides=(1,), matcher="spatialApproximator", patch_weights=(1.0,)
)
CONFIG_B = config()


@pytest.fixture(scope="module")
def features(tmp_path_factory):
    """Features of all three sizes; matching with fewer uses only what it needs."""
    folder = tmp_path_factory.mktemp("tower")
    for part in ("query", "index"):
        extract(CONFIG_B, TOWER / f"{part}.txt", TOWER, folder / part, device="cpu")
    return folder


@pytest.fixture(scope="module")
def rounded(features, tmp_path_factory):
    """The same features as int8."""
    folder = tmp_path_factory.mktemp("int8")
    for part in ("query", "index"):
        convert_features(features / part, folder / part, to="int8")
    return folder


@pytest.fixture(scope="module")
def maps(tmp_path_factory):
    folder = tmp_path_factory.mktemp("maps")
    settings = replace(CONFIG_B, local_features="map")
    for part in ("query", "index"):
        extract(settings, TOWER / f"{part}.txt", TOWER, folder / part, device="cpu")
    return folder


def expected(name, method):
    """Read the reference's answers, query by query, as names."""
    answers: dict[str, list[str]] = {}
    for line in (TOWER / "expected" / name / f"{method}_predictions.txt").read_text().splitlines():
        if not line.startswith("#"):
            query, answer = line.split(", ")
            answers.setdefault(query, []).append(answer)
    return answers


def expected_recalls(name, method):
    lines = (TOWER / "expected" / name / "recalls.txt").read_text().splitlines()
    return [float(line.split(": ")[1]) for line in lines if line.startswith(f"Recall {method}@")]


def run(settings, features, results):
    return rerank(
        settings,
        TOWER / "query.txt",
        TOWER / "index.txt",
        features / "query",
        features / "index",
        dataset_root=TOWER,
        ground_truth=TOWER / "ground_truth.npz",
        results_dir=results,
        device="cpu",
    )


def names(result, rows):
    return {
        query: [result.index_names[i] for i in row]
        for query, row in zip(result.query_names, rows, strict=True)
    }


def test_global_descriptors(features):
    ours = np.load(features / "query" / "globalfeats.npy")
    np.testing.assert_allclose(
        ours, np.load(TOWER / "expected" / "globalfeats_query.npy"), atol=1e-5
    )


@pytest.mark.parametrize(("name", "settings"), [("A", CONFIG_A), ("B", CONFIG_B)])
def test_reference_results(features, tmp_path, name, settings):
    result = run(settings, features, tmp_path)
    assert (tmp_path / "NetVLAD_predictions.txt").read_bytes().count(b"\n") == 2 + 33 * 100

    queries, index = (np.load(features / part / "globalfeats.npy") for part in ("query", "index"))
    places = {image: i for i, image in enumerate(result.index_names)}
    for q, (query, answers) in enumerate(names(result, result.retrieved).items()):
        for ours, theirs in zip(answers, expected(name, "NetVLAD")[query], strict=True):
            if ours != theirs:  # only where the distances tie
                a, b = (
                    ((queries[q] - index[places[image]]) ** 2).sum() for image in (ours, theirs)
                )
                assert a == pytest.approx(b, abs=1e-5)
    np.testing.assert_allclose(
        result.recalls["NetVLAD"], expected_recalls(name, "NetVLAD"), atol=1e-4
    )

    reference = expected(name, "PatchNetVLAD")
    reranked = names(result, result.reranked)
    equal = sum(reranked[query][0] == answers[0] for query, answers in reference.items())
    print(f"{name}: {equal} of 33 first answers equal; recalls {result.recalls['PatchNetVLAD']}")
    assert equal >= LEAST_EQUAL
    theirs = expected_recalls(name, "PatchNetVLAD")
    np.testing.assert_allclose(result.recalls["PatchNetVLAD"], theirs, atol=MOST_OFF)
    assert result.num_without_positives == 0


@pytest.mark.parametrize(
    ("changes", "kind"),
    [
        pytest.param({"ransac": "fast"}, "features", id="fast"),
        pytest.param({"ransac": "batched"}, "features", id="batched", marks=pytest.mark.slow),
        pytest.param({"ransac": "fast"}, "rounded", id="fast-int8"),
        pytest.param({"ransac": "fast"}, "maps", id="fast-map", marks=pytest.mark.slow),
        pytest.param({}, "maps", id="map", marks=pytest.mark.slow),
    ],
)
def test_recalls_of_other_ways(request, tmp_path, changes, kind):
    """Recall is at most two queries off the reference's at any N."""
    folder = request.getfixturevalue(kind)
    for name, settings in (("A", CONFIG_A), ("B", CONFIG_B)):
        if name == "A" and kind == "features":
            continue  # no homographies
        result = run(replace(settings, **changes), folder, tmp_path)
        recalls = result.recalls["PatchNetVLAD"]
        print(f"{name}: {recalls}")
        reference = expected_recalls(name, "PatchNetVLAD")
        np.testing.assert_allclose(recalls, reference, atol=MOST_OFF)


def test_confidence(features, tmp_path):
    """Whatever floor is left out, confidences order answers better than distances do.

    With those that are shipped, which are of the same weights in another file and were fitted on
    more data than this, about half of the queries need re-ranking.
    """
    always = run(replace(CONFIG_B, ransac="fast"), features, tmp_path / "always")
    truth = GroundTruth.load(TOWER / "ground_truth.npz")
    of = answers_of(always, truth.positives())["PatchNetVLAD"]
    assert len(set(of.groups)) == 2
    by_distance = area_under_risk_coverage(-of.distances, of.right)
    assert area_under_risk_coverage(of.held_out, of.right) < by_distance

    shipped = shipped_confidence()
    ours = replace(shipped, checkpoint={"name": "reference_WPCA128", "sha256": ""})
    ours.save(tmp_path / "c.json")
    settings = replace(CONFIG_B, ransac="fast", confidence=str(tmp_path / "c.json"), rerank="auto")
    auto = run(settings, features, tmp_path / "auto")
    assert 0 < auto.selection.reranked < 33 * 2 / 3
    assert auto.recalls["PatchNetVLAD"][0] >= always.recalls["PatchNetVLAD"][0] - 1 / 33 - 1e-9
    sure = auto.metrics["PatchNetVLAD"].calibration
    right = np.array([row[0] in p for row, p in zip(auto.reranked, truth.positives(), strict=True)])
    assert sure.aurc < (~right).mean()
