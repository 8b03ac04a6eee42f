# SPDX-License-Identifier: MIT
"""Ground truth files, positives, recall."""

from __future__ import annotations

import re
import zipfile

import numpy as np
import pytest
from conftest import SHARED, needs_shared

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import GroundTruthError
from patchnetvlad.evaluation.recall import (
    format_recalls,
    queries_without_positives,
    recall_at_n,
)

QUERIES = np.array([[0.0, 0.0], [100.0, 100.0]])
INDEX = np.array([[15.0, 20.0], [0.0, 25.001], [0.0, 0.0]])
GOOD = {"utmQ": QUERIES, "utmDb": INDEX, "posDistThr": 25.0}


@pytest.fixture
def saved(tmp_path):
    def save(writer=np.savez, **arrays):
        path = tmp_path / "truth.npz"
        writer(path, **arrays)
        return path

    return save


def message_of(path, **keywords):
    with pytest.raises(GroundTruthError) as caught:
        GroundTruth.load(path, **keywords)
    message = str(caught.value)
    assert str(path) in message
    assert message.count("\n") <= 1
    return message


@pytest.mark.parametrize(
    "threshold",
    [25, 25.0, np.float32(25), np.array(25), np.array([25]), np.array([[25.0]]), np.uint8(25)],
    ids=["int", "float", "float32", "0-d", "1-element", "1x1", "uint8"],
)
@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
def test_load(saved, threshold, writer):
    truth = GroundTruth.load(str(saved(writer, **{**GOOD, "posDistThr": threshold})))
    assert (truth.threshold, type(truth.threshold)) == (25.0, float)
    np.testing.assert_array_equal(truth.utm_queries, QUERIES)
    np.testing.assert_array_equal(truth.utm_index, INDEX)


@pytest.mark.parametrize("dtype", [np.int64, np.uint8, np.float16, np.float32])
def test_positions_of_any_kind_of_number(saved, dtype):
    truth = GroundTruth.load(saved(**{**GOOD, "utmQ": QUERIES.astype(dtype)}))
    assert truth.utm_queries.dtype == np.float64
    np.testing.assert_array_equal(truth.utm_queries, QUERIES)


@pytest.mark.parametrize("stored", [{}, {"posDistThr": 1}, {"posDistThr": np.array("far")}])
def test_another_threshold(saved, stored):
    path = saved(utmQ=QUERIES, utmDb=INDEX, **stored)
    assert GroundTruth.load(path, threshold=30).threshold == 30


NAN = np.array([[0, 0], [0, 0], [np.nan, 0], [0, np.inf]])


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("utmQ", None, ["'utmQ'", "(it holds utmDb, posDistThr)"]),
        ("utmDb", None, ["'utmDb'"]),
        ("posDistThr", None, ["'posDistThr'", "utmQ, utmDb", "--posDistThr"]),
        ("posDistThr", [25, 30], ["'posDistThr'", "int64", "[2]"]),
        ("posDistThr", [], ["'posDistThr'", "number"]),
        ("posDistThr", "far", ["'posDistThr'", "number"]),
        ("posDistThr", 1j, ["'posDistThr'", "number"]),
        ("posDistThr", np.nan, ["nan"]),
        ("posDistThr", -1, ["-1.0"]),
        ("utmQ", NAN, ["'utmQ'", "2 rows", "row 2 (from 0)"]),
        ("utmDb", NAN.astype(np.float32), ["'utmDb'", "NaN"]),
        ("utmDb", np.zeros(4), ["'utmDb'", "[n, 2]", "float64", "[4]"]),
        ("utmDb", np.zeros((0, 2)), ["'utmDb'", "[n, 2]"]),
        ("utmDb", np.zeros((2, 1, 2)), ["'utmDb'", "[n, 2]"]),
        ("utmDb", np.array([["a", "b"]]), ["'utmDb'", "[n, 2]"]),
        ("utmDb", np.zeros((3, 3)), ["'utmQ' has 2", "'utmDb' has 3"]),
        ("utmDb", np.array([None]), ["objects"]),
        ("utmDb", np.zeros((9, 5)), ["'utmDb'", "[9, 5]"]),
        ("utmDb", np.zeros((1, 9)), ["'utmDb'", "[1, 9]"]),
        ("utmDb", np.zeros((3, 9)), ["'utmDb'", "[3, 9]"]),
        ("utmQ", np.ones((2, 2), bool), ["'utmQ'", "[n, 2]", "bool"]),
    ],
)
def test_bad_arrays(saved, key, value, words):
    arrays = {name: array for name, array in {**GOOD, key: value}.items() if array is not None}
    message = message_of(saved(**arrays))
    assert all(word in message for word in words), message


RNG = np.random.default_rng(0)
LONG = RNG.random((9, 2))


@pytest.mark.parametrize(
    ("queries", "index", "upright"),
    [
        (LONG.T, LONG[:7].T, (True, True)),
        (LONG[:2].T, LONG.T, (True, True)),  # of the other's shape, the first is transposed, too
        (LONG[:3].T, LONG.T, (True, True)),
        (LONG, LONG[:7].T, (False, True)),
        (LONG[:3], LONG.T, (False, True)),
        (LONG[:2], LONG, (False, False)),
        (LONG[:3], LONG[:2], (False, False)),
        (RNG.random((9, 3)), RNG.random((2, 3)), (False, False)),
        (RNG.random((9, 1)), RNG.random((7, 1)), (False, False)),
    ],
)
def test_transposed_positions(saved, caplog, queries, index, upright):
    caplog.set_level("INFO", "patchnetvlad")
    truth = GroundTruth.load(saved(utmQ=queries, utmDb=index, posDistThr=25))
    for found, given, turned in zip(
        (truth.utm_queries, truth.utm_index), (queries, index), upright, strict=True
    ):
        np.testing.assert_array_equal(found, given.T if turned else given)
    assert len(caplog.messages) == sum(upright)
    assert all("transposed" in message for message in caplog.messages)


def test_a_bad_row_of_transposed_positions(saved):
    bad = LONG.T.copy()
    bad[1, 6] = np.nan
    assert re.search(r"utmQ.*\b1 rows\b.*\brow 6\b", message_of(saved(**{**GOOD, "utmQ": bad})))


@pytest.mark.parametrize(
    "keys",
    [
        ("utm_queries", "utm_index", "threshold"),
        ("UTMQ", "utmDB", "posdistthr"),
        ("utm_q", "utm_db", "pos_dist_thr"),
        ("utmQ", "utmDb", "PosDistThr"),
    ],
)
def test_other_names_of_keys(saved, caplog, keys):
    caplog.set_level("INFO", "patchnetvlad")
    truth = GroundTruth.load(saved(**dict(zip(keys, GOOD.values(), strict=True))))
    np.testing.assert_array_equal(truth.utm_queries, QUERIES)
    np.testing.assert_array_equal(truth.utm_index, INDEX)
    assert truth.threshold == 25
    assert re.search(f"{keys[2]!r}.*'posDistThr'", caplog.messages[-1])


def test_exact_keys_come_first(saved):
    truth = GroundTruth.load(saved(**GOOD, utm_q=LONG, threshold=3))
    assert (len(truth.utm_queries), truth.threshold) == (2, 25)


def test_ambiguous_keys(saved):
    arrays = {"utm_q": QUERIES, "UTMQ": QUERIES, "utmDb": INDEX, "posDistThr": 25}
    assert re.search("utm_q and UTMQ.*'utmQ'", message_of(saved(**arrays)))


def test_other_arrays_do_no_harm(saved):
    """Not even those that cannot be read without unpickling."""
    names = np.array(["a.jpg", None], dtype=object)
    truth = GroundTruth.load(saved(**GOOD, dbImageFns=names))
    assert len(truth.utm_index) == 3


def test_members_that_are_no_arrays(tmp_path):
    path = tmp_path / "truth.npz"
    with zipfile.ZipFile(path, "w") as archive:
        for name in GOOD:
            archive.writestr(f"{name}.npy", b"1 2\n3 4\n")
    assert re.search(r"'utmQ'.*\[n, 2\]", message_of(path))


def test_bad_thresholds_given(saved):
    for threshold in (np.nan, np.inf, -1.0):
        assert str(threshold) in message_of(saved(**GOOD), threshold=threshold)


def damage(raw):
    middle = len(raw) // 3
    return raw[:middle] + bytes(255 - byte for byte in raw[middle : middle + 40]) + raw[middle:]


@pytest.mark.parametrize("writer", [np.savez, np.savez_compressed])
@pytest.mark.parametrize(
    "break_it",
    [
        damage,
        lambda raw: raw[: len(raw) // 2],
        lambda raw: raw[:120] + bytes([raw[120] ^ 255]) + raw[121:],
        lambda raw: b"",
        lambda raw: b"PK\x03\x04",
        lambda raw: b"positions\n",
    ],
    ids=["middle", "half", "byte", "empty", "start", "text"],
)
def test_damaged(saved, writer, break_it):
    rng = np.random.default_rng(0)
    path = saved(writer, utmQ=rng.random((40, 2)), utmDb=rng.random((40, 2)), posDistThr=25)
    path.write_bytes(break_it(path.read_bytes()))
    message_of(path)


@pytest.mark.parametrize("array", [np.zeros((3, 2)), np.array({"utmQ": 1}, dtype=object)])
def test_npy(tmp_path, array):
    path = tmp_path / "truth.npy"
    np.save(path, array, allow_pickle=True)
    assert "truth.npy" in message_of(path)


def test_no_file(tmp_path):
    message_of(tmp_path)
    message_of(tmp_path / "absent.npz")


def test_counts():
    truth = GroundTruth(QUERIES, INDEX, 25)
    truth.check_counts(2, 3, "truth.npz")
    with pytest.raises(GroundTruthError, match=r"truth\.npz: utmQ .*\b2 rows\b.*\b3 queries"):
        truth.check_counts(3, 3, "truth.npz")
    with pytest.raises(GroundTruthError, match=r"truth\.npz: utmDb .*\b3 rows\b.*\b2 index") as one:
        truth.check_counts(2, 2, "truth.npz")
    assert "exchanged" not in str(one.value)
    with pytest.raises(GroundTruthError, match=r"truth\.npz: utmQ .*exchanged"):
        truth.check_counts(3, 2, "truth.npz")


@pytest.mark.parametrize("offset", [(0, 0), (391_016.25, 6_572_144.5)])
@pytest.mark.parametrize("far", [0, 50], ids=["small", "large"])
def test_positives(offset, far):
    index = np.concatenate([INDEX, np.full((far, 2), 1e5)]) + offset
    truth = GroundTruth(QUERIES + offset, index, 25.0)
    first, second = truth.positives()
    np.testing.assert_array_equal(first, [0, 2])
    assert first.dtype == second.dtype == np.int64
    assert len(second) == 0
    assert queries_without_positives([first, second]) == 1


@pytest.mark.parametrize("threshold", [0.0, 25.00001])
def test_small_indexes_are_searched_exactly(threshold):
    """At real coordinates, squares take all digits that double precision has."""
    rng = np.random.default_rng(0)
    for _ in range(20):
        queries = rng.random((4, 2)) * 1000 + [500_000, 5_000_000]
        index = queries + np.array([0.6, 0.8]) * max(0, threshold - 1e-6)
        found = GroundTruth(queries, index, threshold).positives()
        assert all(q in right for q, right in enumerate(found))


@needs_shared
def test_real_positives():
    truth = GroundTruth.load(SHARED / "tower" / "ground_truth.npz")
    truth.check_counts(33, 154, "tower")
    distance = np.linalg.norm(truth.utm_queries[:, None] - truth.utm_index, axis=2)
    for right, away in zip(truth.positives(), distance, strict=True):
        np.testing.assert_array_equal(right, np.flatnonzero(away <= 2))


class TestRecall:
    PREDICTIONS = np.array([[4, 2, 9], [1, 3, 5], [7, 0, 6], [8, 2, 1]])
    POSITIVES = (np.array([9, 2]), np.array([1]), np.array([], dtype=np.int64), np.array([3]))

    def test_all_queries_count(self):
        recalls = recall_at_n(self.PREDICTIONS, self.POSITIVES, (1, 2, 3))
        np.testing.assert_array_equal(recalls, [0.25, 0.5, 0.5])

    def test_order_of_n_and_beyond_k(self):
        recalls = recall_at_n(self.PREDICTIONS, self.POSITIVES, (100, 1, 4))
        np.testing.assert_array_equal(recalls, [0.5, 0.25, 0.5])

    def test_plain_lists(self):
        lists = [p.tolist() for p in self.POSITIVES]
        recalls = recall_at_n(self.PREDICTIONS.tolist(), lists, [1, 2])
        np.testing.assert_array_equal(recalls, [0.25, 0.5])

    @pytest.mark.parametrize("predictions", [[], np.zeros((0, 5), dtype=np.int64)])
    def test_no_queries(self, predictions):
        np.testing.assert_array_equal(recall_at_n(predictions, [], (1, 5)), [0, 0])

    def test_counts_must_agree(self):
        with pytest.raises(ValueError, match=r"\b4\b.*predictions.*\b3\b.*positives"):
            recall_at_n(self.PREDICTIONS, self.POSITIVES[:3], (1,))

    def test_against_counting(self):
        rng = np.random.default_rng(0)
        predictions = np.stack([rng.permutation(30)[:12] for _ in range(50)])
        positives = [rng.choice(30, rng.integers(0, 4), replace=False) for _ in range(50)]
        for n in (1, 5, 12, 20):
            hits = [
                not set(row[:n].tolist()).isdisjoint(right.tolist())
                for row, right in zip(predictions, positives, strict=True)
            ]
            assert recall_at_n(predictions, positives, [n]) == sum(hits) / 50

    def test_lines(self):
        assert format_recalls("NetVLAD", (1, 20), np.array([0.81818, 1])) == [
            "Recall NetVLAD@1: 0.8182",
            "Recall NetVLAD@20: 1.0000",
        ]
        with pytest.raises(ValueError):
            format_recalls("NetVLAD", (1, 20), np.array([0.5]))
