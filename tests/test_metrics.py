# SPDX-License-Identifier: MIT
"""Metrics: against counting by hand, against scikit-learn, and as they are written."""

from __future__ import annotations

import hashlib
import json
import math
import re
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats
from sklearn.metrics import auc, average_precision_score, precision_recall_curve

from patchnetvlad.base.files import file_sha256
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import GroundTruthError, OutputError
from patchnetvlad.evaluation.intervals import Bootstrap
from patchnetvlad.evaluation.metrics import (
    PRECISIONS,
    Metrics,
    evaluate_methods,
    evaluate_predictions,
    mean_average_precision_at_n,
    precision_recall,
)
from patchnetvlad.evaluation.metrics_file import provenance, write_metrics
from patchnetvlad.evaluation.per_query import average_precisions
from patchnetvlad.evaluation.recall import recall_at_n
from patchnetvlad.matching.fusion import raw_scores, reorder
from patchnetvlad.matching.pair import PatchMatches, similarity
from patchnetvlad.version import __version__

repeatable = settings(max_examples=200, deadline=None, derandomize=True, database=None)
NONE = np.array([], dtype=np.int64)


@st.composite
def retrievals(draw):
    """Draw candidates [Q, k] and positives of a few queries, and some N."""
    num_index = draw(st.integers(1, 12))
    k = draw(st.integers(1, num_index))
    num_queries = draw(st.integers(1, 6))
    images = st.integers(0, num_index - 1)
    predictions = [draw(st.permutations(range(num_index)))[:k] for _ in range(num_queries)]
    positives = [
        draw(st.lists(images, max_size=num_index, unique=True)) for _ in range(num_queries)
    ]
    n_values = draw(st.lists(st.integers(1, 15), min_size=1, max_size=4))
    return np.array(predictions), [np.array(row, dtype=np.int64) for row in positives], n_values


answers = st.lists(
    # Few different scores, so that ties are the rule; and some of any kind.
    st.tuples(
        st.booleans(),
        st.one_of(
            st.sampled_from([-2.0, 0.0, 0.5, 1.0]),
            st.floats(allow_nan=False, allow_infinity=False, width=32),
        ),
    ),
    min_size=1,
    max_size=30,
)


@repeatable
@given(retrievals())
def test_recall_is_what_counting_gives(retrieval):
    predictions, positives, n_values = retrieval
    answerable = [q for q, right in enumerate(positives) if len(right)]
    everything = recall_at_n(predictions, positives, n_values)
    some = recall_at_n(predictions, positives, n_values, all_queries=False)
    for n, of_all, of_some in zip(n_values, everything, some, strict=True):
        found = sum(
            any(candidate in positives[q].tolist() for candidate in row[:n])
            for q, row in enumerate(predictions.tolist())
        )
        assert of_all == found / len(predictions)
        assert of_some == (found / len(answerable) if answerable else 0)


def average_precision_by_hand(candidates, right, n):
    if not right:
        return 0.0
    total = 0.0
    for r in range(1, min(n, len(candidates)) + 1):
        if candidates[r - 1] in right:
            total += sum(candidate in right for candidate in candidates[:r]) / r
    return total / min(len(right), n)


@repeatable
@given(retrievals())
def test_map_is_what_counting_gives(retrieval):
    predictions, positives, n_values = retrieval
    answerable = sum(len(right) > 0 for right in positives)
    everything = mean_average_precision_at_n(predictions, positives, n_values)
    some = mean_average_precision_at_n(predictions, positives, n_values, all_queries=False)
    for n, of_all, of_some in zip(n_values, everything, some, strict=True):
        total = sum(
            average_precision_by_hand(row, right.tolist(), n)
            for row, right in zip(predictions.tolist(), positives, strict=True)
        )
        assert math.isclose(of_all, total / len(predictions), abs_tol=1e-12)
        assert math.isclose(of_some, total / max(answerable, 1), abs_tol=1e-12)


@repeatable
@given(st.permutations(range(10)), st.sets(st.integers(0, 9), min_size=1))
def test_map_of_all_candidates_is_that_of_scikit_learn(ranking, right):
    truth = [candidate in right for candidate in ranking]
    expected = average_precision_score(truth, -np.arange(10.0))
    found = mean_average_precision_at_n([ranking], [sorted(right)], [10, 50])
    # Beyond the number of images, N changes nothing: no query has more positives than that.
    np.testing.assert_allclose(found, expected, rtol=1e-12)


class TestMeanAveragePrecision:
    def test_by_hand(self):
        predictions = np.array([[7, 2, 9, 4], [1, 3, 5, 6], [0, 8, 2, 3]])
        positives = [np.array([2, 4]), np.array([1]), NONE]
        # First query: nothing; 1/2 of 2; (1/2 + 2/4) of 2. Second: found at once.
        expected = np.array([0 + 1, 0.25 + 1, 0.5 + 1])
        for everything, queries in ((True, 3), (False, 2)):
            found = mean_average_precision_at_n(predictions, positives, (1, 2, 4), everything)
            np.testing.assert_allclose(found, expected / queries)

    def test_more_positives_than_n(self):
        predictions, positives = [[1, 2, 3]], [range(100)]
        np.testing.assert_array_equal(
            mean_average_precision_at_n(predictions, positives, (1, 3, 6)), [1, 1, 0.5]
        )

    def test_repetitions_count_once(self):
        found = mean_average_precision_at_n([[1, 1, 1]], [[1, 1, 2]], [3])
        np.testing.assert_array_equal(found, [0.5])

    def test_candidates_that_are_none(self):
        found = mean_average_precision_at_n([[-1, 5], [5]], [[5], [5]], [2])
        np.testing.assert_array_equal(found, [0.75])

    @pytest.mark.parametrize("all_queries", [True, False])
    def test_nothing_counts(self, all_queries):
        for compute in (recall_at_n, mean_average_precision_at_n):
            np.testing.assert_array_equal(compute([], [], (1, 5), all_queries), [0, 0])
            np.testing.assert_array_equal(compute([[1]], [NONE], (1, 5), all_queries), [0, 0])

    def test_bad_input(self):
        with pytest.raises(ValueError, match=r"\b1\b.*predictions.*\b2\b.*positives"):
            mean_average_precision_at_n([[1]], [[1], [2]], [1])
        with pytest.raises(ValueError, match="N = 0"):
            mean_average_precision_at_n([[1]], [[1]], [1, 0])


@repeatable
@given(answers)
def test_curve_is_that_of_scikit_learn(queries):
    right, scores = (np.array(values) for values in zip(*queries, strict=True))
    ours = precision_recall(right, scores)
    np.testing.assert_array_equal(ours.thresholds, np.unique(scores)[::-1])
    if not right.any():
        assert not ours.precision.any()
        assert not ours.recall.any()
        assert (ours.average_precision, ours.auc) == (0, 0)
        return
    precision, recall, thresholds = precision_recall_curve(right, scores)
    # Theirs ascends in thresholds, and ends with a point of precision 1 and recall 0.
    np.testing.assert_array_equal(ours.thresholds, thresholds[::-1])
    np.testing.assert_allclose(ours.precision, precision[-2::-1], rtol=1e-12)
    np.testing.assert_allclose(ours.recall, recall[-2::-1], rtol=1e-12)
    expected = average_precision_score(right, scores)
    assert math.isclose(ours.average_precision, expected, rel_tol=1e-9)
    assert math.isclose(ours.auc, auc(recall, precision), rel_tol=1e-9)


@repeatable
@given(answers, st.integers(0, 10), st.sampled_from([1.0, 0.99, 0.9, 0.75, 0.5]))
def test_curve_is_what_counting_gives(queries, missed, wanted):
    relevant = sum(right for right, _ in queries) + missed
    curve = precision_recall(*zip(*queries, strict=True), relevant=relevant)
    points = []
    for threshold in sorted({score for _, score in queries}, reverse=True):
        accepted = [right for right, score in queries if score >= threshold]
        true = sum(accepted)
        precision, recall = true / len(accepted), true / relevant if relevant else 0.0
        f1 = 2 * precision * recall / (precision + recall) if true else 0.0
        points.append((threshold, precision, recall, f1))
    found = zip(curve.thresholds, curve.precision, curve.recall, curve.f1, strict=True)
    np.testing.assert_allclose(list(found), points, rtol=1e-12)
    if relevant > missed:
        scale = (relevant - missed) / relevant
        right, scores = zip(*queries, strict=True)
        expected = average_precision_score(right, scores) * scale
        assert math.isclose(curve.average_precision, expected, rel_tol=1e-9)
        assert curve.f1[curve.best()] == max(curve.f1)
        assert np.argmax(curve.f1) == curve.best()  # the strictest of equals
    else:
        assert curve.best() is None
    good = [i for i, point in enumerate(points) if point[1] >= wanted]
    assert curve.at_precision(wanted) == (good[-1] if good else None)
    if good:
        assert curve.recall[good[-1]] == max(curve.recall[good])


class TestPrecisionRecall:
    def test_by_hand(self):
        curve = precision_recall([True, True, False, True], [9, 7, 7, 1], relevant=6)
        np.testing.assert_array_equal(curve.thresholds, [9, 7, 1])
        np.testing.assert_allclose(curve.precision, [1, 2 / 3, 3 / 4])
        np.testing.assert_allclose(curve.recall, [1 / 6, 2 / 6, 3 / 6])
        assert (curve.at_precision(1), curve.at_precision(0.7), curve.at_precision(0)) == (0, 2, 2)
        assert curve.best() == 2
        assert math.isclose(curve.average_precision, (1 + 2 / 3 + 3 / 4) / 6)
        assert math.isclose(curve.auc, (1 + (1 + 2 / 3) / 2 + (2 / 3 + 3 / 4) / 2) / 6)
        assert (curve.relevant, curve.correct) == (6, 3)

    def test_the_best_score_is_a_wrong_answers(self):
        curve = precision_recall([False, True], [2, 1])
        assert curve.at_precision(1) is None
        assert curve.best() == 1

    def test_queries_without_candidates_are_never_accepted(self):
        curve = precision_recall([False, True, False], [-np.inf, 1, -np.inf], relevant=3)
        np.testing.assert_array_equal(curve.thresholds, [1])
        np.testing.assert_array_equal(curve.precision, [1])
        np.testing.assert_allclose(curve.recall, [1 / 3])

    @pytest.mark.parametrize("scores", [[], [-np.inf]])
    def test_nothing_is_accepted(self, scores):
        curve = precision_recall([False] * len(scores), scores)
        assert len(curve.thresholds) == 0
        assert (curve.average_precision, curve.auc) == (0, 0)
        assert curve.best() is None
        assert curve.at_precision(0) is None

    def test_rounding_takes_no_precision_away(self):
        """0.1 + 0.2 is more than 0.3 in floating point."""
        right = [True] * 3 + [False] * 7
        curve = precision_recall(right, np.zeros(10))
        assert curve.at_precision(0.1 + 0.2) == 0

    @pytest.mark.parametrize(
        ("right", "scores", "relevant", "words"),
        [
            ([True], [1, 2], None, r"scores.*\[2\].*\[1\]"),
            ([[True]], [[1]], None, r"scores.*\[1, 1\]"),
            ([True, True], [1, np.nan], None, "query 1 .*nan"),
            ([True], [np.inf], None, "query 0 .*inf"),
            ([True, True], [1, 2], 1, r"\b2\b.*right.*\b1\b"),
        ],
    )
    def test_bad_input(self, right, scores, relevant, words):
        with pytest.raises(ValueError, match=words):
            precision_recall(right, scores, relevant)


class TestScores:
    def test_raw_scores_are_similarities(self):
        rng = np.random.default_rng(0)
        scores = -rng.random((5, 4, 3))
        weights = (0.45, 0.15, 0.4)
        found = raw_scores(scores, weights)
        for q in range(5):
            for c in range(4):
                matches = [PatchMatches(float(s), NONE, NONE) for s in scores[q, c]]
                assert found[q, c] == similarity(matches, weights)

    def test_no_negative_zero(self):
        assert not np.signbit(raw_scores(np.zeros((1, 2, 1)), (1.0,))).any()

    @pytest.mark.parametrize("shape", [(5, 3), (5, 4, 2)])
    def test_shapes(self, shape):
        with pytest.raises(
            ValueError, match=rf"scores.*{re.escape(str(list(shape)))}.*\[queries, candidates, 3\]"
        ):
            raw_scores(np.zeros(shape), (1, 1, 1))

    def test_reorder(self):
        rng = np.random.default_rng(0)
        before = np.stack([rng.permutation(30)[:8] for _ in range(20)])
        after = np.stack([rng.permutation(row) for row in before])
        scores = rng.random(before.shape)
        found = reorder(scores, before, after)
        for q in range(20):
            of = dict(zip(before[q].tolist(), scores[q].tolist(), strict=True))
            assert found[q].tolist() == [of[c] for c in after[q].tolist()]

    def test_reorder_needs_the_same_candidates(self):
        rows = np.array([[1, 2]])
        with pytest.raises(ValueError, match="candidates"):
            reorder(np.zeros((1, 2)), rows, rows + 1)
        with pytest.raises(ValueError, match=r"scores.*\[1, 3\].*\[1, 2\]"):
            reorder(np.zeros((1, 3)), rows, rows)


PREDICTIONS = np.array([[4, 2, 9], [1, 3, 5], [7, 0, 6], [8, 2, 1]])
POSITIVES = [np.array([9, 2]), np.array([1]), NONE, np.array([8])]
SCORES = np.array([0.4, 0.9, 0.2, 0.3])


class TestEvaluate:
    def test_numbers(self):
        metrics = evaluate_predictions(PREDICTIONS, POSITIVES, (1, 3), SCORES)
        content = metrics.to_dict()
        assert (content["queries"], content["queries_without_positives"]) == (4, 1)
        assert content["recall"] == {"1": 0.5, "3": 0.75}
        assert content["recall_of_queries_with_positives"] == {"1": 2 / 3, "3": 1.0}
        first = (1 / 2 + 2 / 3) / 2
        assert content["map"] == {"1": 0.5, "3": pytest.approx((first + 2) / 4)}
        assert content["map_of_queries_with_positives"]["3"] == pytest.approx((first + 2) / 3)
        curve = content["precision_recall"]
        assert (curve["relevant_queries"], curve["right_queries"]) == (3, 2)
        assert curve["curve"]["thresholds"] == [0.9, 0.4, 0.3, 0.2]
        assert curve["curve"]["precision"] == pytest.approx([1, 1 / 2, 2 / 3, 1 / 2])
        assert curve["curve"]["recall"] == pytest.approx([1 / 3, 1 / 3, 2 / 3, 2 / 3])
        assert curve["recall_at_full_precision"] == pytest.approx(1 / 3)
        assert curve["average_precision"] == pytest.approx((1 + 2 / 3) / 3)
        assert curve["best"] == pytest.approx(
            {"threshold": 0.3, "precision": 2 / 3, "recall": 2 / 3, "f1": 2 / 3}
        )
        assert set(curve["at_precision"]) == {str(p) for p in PRECISIONS}
        assert curve["at_precision"]["1.0"]["threshold"] == 0.9
        assert Metrics.from_dict(content).to_dict() == content

    def test_scores_of_all_candidates(self):
        columns = np.stack([SCORES, SCORES - 1, SCORES - 2], axis=1)
        plain = evaluate_predictions(PREDICTIONS, POSITIVES, (1,), SCORES)
        found = evaluate_predictions(PREDICTIONS, POSITIVES, (1,), columns)
        assert found.to_json() == plain.to_json()

    def test_all_queries(self):
        metrics = evaluate_predictions(PREDICTIONS, POSITIVES, (1,), SCORES, all_queries=True)
        assert metrics.curve.relevant == 4

    def test_without_scores(self):
        metrics = evaluate_predictions(PREDICTIONS.tolist(), POSITIVES, (1,))
        content = json.loads(metrics.to_json())
        assert content["precision_recall"] is None
        assert Metrics.from_dict(content).to_dict() == content

    def test_nothing_is_right(self):
        metrics = evaluate_predictions(PREDICTIONS, [NONE] * 4, (1,), SCORES)
        content = json.loads(metrics.to_json())["precision_recall"]
        assert content["best"]["threshold"] is None
        assert content["recall_at_full_precision"] == content["auc"] == 0

    def test_intervals(self):
        random = np.random.default_rng(0)
        predictions = np.argsort(random.random((200, 12)), axis=1)
        positives = [np.arange(i % 4) for i in range(200)]
        scores = random.random(200)
        plain = evaluate_predictions(predictions, positives, (5, 1, 12), scores)
        metrics = evaluate_predictions(
            predictions, positives, (5, 1, 12), scores, bootstrap=Bootstrap(200, block=1)
        )
        content = metrics.to_dict()
        assert Metrics.from_dict(content).to_dict() == content
        found = content.pop("intervals")
        assert content == plain.to_dict()
        assert (found["level"], found["drawn"], found["block"]) == (0.95, "single queries", 1)
        per_query = average_precisions(predictions, positives, (5,))[:, 0]
        theirs = stats.bootstrap(
            (per_query,), np.mean, n_resamples=5000, method="percentile", random_state=1
        ).confidence_interval
        assert found["map"]["5"] == pytest.approx([theirs.low, theirs.high], abs=0.01)
        for name in ("recall", "recall_of_queries_with_positives", "map"):
            for n, (low, high) in found[name].items():
                assert low <= content[name][n] <= high, (name, n)
        right = round(200 * content["recall"]["5"])
        exact = stats.binomtest(right, 200).proportion_ci()
        assert found["recall"]["5"] == pytest.approx([exact.low, exact.high], abs=0.02)
        curve = content["precision_recall"]
        for area in ("auc", "average_precision"):
            assert found[area][0] < curve[area] < found[area][1]
        band = np.array([found["precision"][key] for key in ("recall", "low", "high")])
        assert (band[1] <= band[2]).all()
        assert band[0].max() <= max(curve["curve"]["recall"])

    def test_intervals_that_are_damaged(self):
        found = evaluate_predictions(
            PREDICTIONS, POSITIVES, (1, 3), SCORES, bootstrap=Bootstrap(4, resamples=50)
        ).to_dict()
        whole = found["intervals"]
        for broken in (
            [],
            {**whole, "recall": {"1": [0, 1]}},
            {**whole, "recall": []},
            {**whole, "map": {"1": [0, 1], "3": [0, 1, 1]}},
            {**whole, "auc": [0, 2]},
            {**whole, "auc": 0.5},
            {**whole, "precision": {"recall": [0.5], "low": [0.1, 0.2], "high": [0.5]}},
            {**whole, "precision": {"recall": [None], "low": [0], "high": [0]}},
        ):
            with pytest.raises((KeyError, TypeError, ValueError)):
                Metrics.from_dict({**found, "intervals": broken})

    def test_intervals_of_recalls_do_not_fall_with_n(self):
        """One right in all does not know less than one right in nearly all."""
        rows = np.tile([0, 1, 2], (100, 1))
        rows[0] = [1, 0, 2]
        found = evaluate_predictions(rows, [[0]] * 100, (1, 2), bootstrap=Bootstrap(100))
        (low, _), (at_two, high) = found.intervals.by_n["recall"]
        assert 0.9 < low == at_two
        assert high == 1

    def test_methods_are_drawn_alike(self):
        answers = {"a": PREDICTIONS, "b": PREDICTIONS[:, ::-1]}
        found = evaluate_methods(answers, POSITIVES, (1, 3), {"a": SCORES})
        assert {of.intervals.drawn for of in found.values()} == {"blocks of 2 consecutive queries"}
        assert found["a"].intervals.by_n["recall"][1].tolist() == (
            found["b"].intervals.by_n["recall"][1].tolist()
        )
        assert found["b"].intervals.areas == {}
        names = ["x/1", "x/2", "y/1", "y/2"]
        by_traverse = evaluate_methods(
            answers, POSITIVES, (1,), {}, interval_block="traverse", query_names=names
        )
        assert by_traverse["a"].intervals.to_dict((1,))["drawn"] == "2 groups of queries"
        assert by_traverse["a"].intervals.block is None
        assert evaluate_methods({"a": PREDICTIONS[:0]}, [], (1,), {})["a"].intervals is None

    def test_counts_must_agree(self):
        with pytest.raises(ValueError, match=r"\b4\b.*predictions.*\b3\b.*positives"):
            evaluate_predictions(PREDICTIONS, POSITIVES[:3], (1,))
        with pytest.raises(ValueError, match=r"scores.*\[3\].*\[4\]"):
            evaluate_predictions(PREDICTIONS, POSITIVES, (1,), SCORES[:3])


@pytest.fixture
def lists(tmp_path):
    found = []
    for name, text in (("queries.txt", "a.jpg\nb.jpg\n"), ("index.txt", "c.jpg\n")):
        (tmp_path / name).write_text(text)
        found.append(ImageList.read(tmp_path / name))
    return found


class TestWriting:
    def test_everything(self, tmp_path, lists):
        np.savez(tmp_path / "gt.npz", utmQ=[[0, 0]], utmDb=[[0, 0]], posDistThr=5)
        date = datetime(2025, 1, 2, 3, 4, 5, 678, tzinfo=timezone.utc)
        config = Config.load("speed")
        given = provenance(
            config,
            *lists,
            ground_truth=tmp_path / "gt.npz",
            threshold=5.0,
            checkpoint="0" * 64,
            extra={"protocol": "[ 1  2 ]", "device": np.float32("nan"), "root": tmp_path},
            date=date,
        )
        path = tmp_path / "metrics.json"
        path.write_text("older")
        methods = {"NetVLAD": evaluate_predictions(PREDICTIONS, POSITIVES, (1, 3), SCORES)}
        write_metrics(str(path), methods, given)
        text = path.read_text(encoding="utf-8")
        content = json.loads(text, parse_constant=pytest.fail)
        assert content["methods"]["NetVLAD"] == methods["NetVLAD"].to_dict()
        assert '"thresholds": [ 0.9, 0.4, 0.3, 0.2 ]' in text  # not a line each
        found = content["provenance"]
        assert found == given
        assert found["version"] == __version__
        assert found["date"] == "2025-01-02T03:04:05+00:00"
        assert found["config"]["patch_sizes"] == [5]
        assert found["config"]["source"] == "speed.ini"
        assert found["queries"] == {
            "file": "queries.txt",
            "sha256": file_sha256(tmp_path / "queries.txt"),
            "images": 2,
        }
        assert found["index"]["images"] == 1
        assert found["ground_truth"] == {
            "file": "gt.npz",
            "sha256": file_sha256(tmp_path / "gt.npz"),
            "threshold": 5.0,
        }
        assert found["checkpoint"]["sha256"] == "0" * 64
        assert (found["protocol"], found["device"], found["root"]) == (
            "[ 1  2 ]", None, str(tmp_path),
        )  # fmt: skip
        assert not list(tmp_path.glob("*.part"))

    def test_little_is_known(self, tmp_path, lists):
        given = provenance(Config(), *lists)
        assert given["ground_truth"] is given["checkpoint"]["sha256"] is None
        age = datetime.now(timezone.utc) - datetime.fromisoformat(given["date"])
        assert abs(age.total_seconds()) < 60
        write_metrics(tmp_path / "metrics.json", {}, given)
        assert json.loads((tmp_path / "metrics.json").read_text())["methods"] == {}

    def test_files_that_are_gone(self, tmp_path, lists):
        with pytest.raises(GroundTruthError, match=r"absent\.npz"):
            provenance(Config(), *lists, ground_truth=tmp_path / "absent.npz")

    def test_several_lists_in_one(self, lists):
        """Those of a protocol are no file; their names are what is hashed."""
        joined = replace(lists[0], path=Path("a.txt + b.txt"))
        about = provenance(Config(), joined, lists[1])["queries"]
        names = "".join(f"{name}\n" for name in joined.names).encode()
        assert about["file"] == "a.txt + b.txt"
        assert about["sha256"] == hashlib.sha256(names).hexdigest()

    def test_a_folder_that_is_not_there(self, tmp_path):
        path = tmp_path / "absent" / "metrics.json"
        with pytest.raises(OutputError, match=rf"{tmp_path}/absent/metrics\.json "):
            write_metrics(path, {}, {})
