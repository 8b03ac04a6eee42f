# SPDX-License-Identifier: MIT
"""Bootstrap intervals and tests, against SciPy and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from patchnetvlad.errors import ArgumentError
from patchnetvlad.evaluation.intervals import (
    Bootstrap,
    choose_bootstrap,
    dependent_length,
    mcnemar,
    traverses,
    weighted_auc,
    weighted_curve,
    weighted_mean,
    widened,
)
from patchnetvlad.evaluation.metrics import precision_recall

RANDOM = np.random.default_rng(1)
COVERED = [(500, 0.75, 0.0), (1000, 0.75, 0.3), (3000, 0.75, 0.4)]  # queries, recall, dependence


class TestDraws:
    @pytest.mark.parametrize("options", [{}, {"block": 1}, {"block": 7}, {"block": 100}])
    def test_as_many_as_there_are_queries(self, options):
        (drawn,) = Bootstrap(50, resamples=40, **options).draws()
        assert drawn.shape == (40, 50)
        assert (drawn.sum(axis=1) == 50).all()

    def test_the_same_whenever_and_however_many_at_a_time(self, monkeypatch):
        bootstrap = Bootstrap(30, resamples=20, seed=3)
        (at_once,) = bootstrap.draws()
        monkeypatch.setattr("patchnetvlad.evaluation.intervals._DRAWN_TOGETHER", 90)
        np.testing.assert_array_equal(np.concatenate(list(bootstrap.draws())), at_once)
        other = np.concatenate(list(Bootstrap(30, resamples=20, seed=4).draws()))
        assert (other != at_once).any()

    def test_blocks_stay_together(self):
        (drawn,) = Bootstrap(12, block=4, resamples=200).draws()
        neighbours = np.roll(drawn, 1, axis=1)
        apart = np.roll(drawn, 6, axis=1)
        corr = [np.corrcoef(drawn.ravel(), other.ravel())[0, 1] for other in (neighbours, apart)]
        assert corr[0] > 0.5 > 0.1 > corr[1]

    def test_groups_stay_together(self):
        (drawn,) = Bootstrap(6, groups="aabbbc", resamples=50).draws()
        assert (drawn[:, 0] == drawn[:, 1]).all()
        assert (drawn[:, 2] == drawn[:, 4]).all()
        assert (drawn[:, [0, 2, 5]].sum(axis=1) == 3).all()

    @pytest.mark.parametrize(
        ("options", "named"),
        [
            ({"num_queries": 0}, "num_queries = 0"),
            ({"num_queries": 5, "block": -1}, "block = -1"),
            ({"num_queries": 5, "resamples": 0}, "resamples = 0"),
            ({"num_queries": 5, "groups": "ab"}, r"2 groups.*\b5\b"),
        ],
    )
    def test_what_cannot_be_is_refused(self, options, named):
        with pytest.raises(ArgumentError, match=named):
            Bootstrap(**options)

    def test_says_what_is_drawn(self):
        assert str(Bootstrap(216)) == "blocks of 6 consecutive queries"
        assert str(Bootstrap(216, block=1)) == "single queries"
        assert str(Bootstrap(6, groups="aabbbc")) == "3 groups of queries"


class TestIntervals:
    def test_against_scipy(self):
        values = RANDOM.random(200) < 0.7
        low, high = Bootstrap(200, block=1, resamples=10_000).interval(weighted_mean(values))
        theirs = stats.bootstrap(
            (values,), np.mean, n_resamples=10_000, method="percentile", random_state=2
        ).confidence_interval
        assert low == pytest.approx(theirs.low, abs=0.011)
        assert high == pytest.approx(theirs.high, abs=0.011)

    def test_against_the_exact_binomial(self):
        values = np.arange(1000) < 820
        low, high = Bootstrap(1000, block=1).interval(weighted_mean(values))
        exact = stats.binomtest(820, 1000).proportion_ci()
        assert low == pytest.approx(exact.low, abs=0.005)
        assert high == pytest.approx(exact.high, abs=0.005)

    def test_several_figures_at_once(self):
        values = RANDOM.random((60, 3))
        low, high = Bootstrap(60).interval(weighted_mean(values))
        assert low.shape == high.shape == (3,)
        assert ((low < values.mean(axis=0)) & (values.mean(axis=0) < high)).all()

    def test_coverage_of_independent_queries(self):
        hits = 0
        for i in range(200):
            values = np.random.default_rng(i).random(300) < 0.75
            bootstrap = Bootstrap(300, block=1, resamples=300, seed=i)
            low, high = bootstrap.interval(weighted_mean(values))
            hits += low <= 0.75 <= high
        assert 0.92 <= hits / 200 <= 0.98

    def test_blocks_are_needed_where_neighbours_are_alike(self):
        """Runs of queries that are right or wrong together."""
        random = np.random.default_rng(0)
        values = np.repeat(random.random(100) < 0.7, 10)
        lows, highs = zip(
            *(
                Bootstrap(1000, block=b, resamples=500).interval(weighted_mean(values))
                for b in (1, 50)
            ),
            strict=True,
        )
        single, blocks = np.subtract(highs, lows)
        independent = 2 * 1.96 * np.sqrt(values.mean() * (1 - values.mean()) / 1000)
        assert single == pytest.approx(independent, rel=0.15)
        assert blocks == pytest.approx(independent * np.sqrt(10), rel=0.25)


class TestAreaUnderTheCurve:
    @pytest.mark.parametrize("ties", [False, True])
    def test_is_that_of_the_curve(self, ties):
        right, answerable = RANDOM.random(80) < 0.6, np.ones(80, dtype=bool)
        answerable[~right & (RANDOM.random(80) < 0.5)] = False
        scores = RANDOM.integers(0, 12, 80).astype(float) if ties else RANDOM.random(80)
        scores[:3] = -np.inf
        scores[right & np.isneginf(scores)] = 0.0
        curve = precision_recall(right, scores, relevant=int(answerable.sum()))
        (found,) = weighted_auc(right, scores, answerable)(np.ones((1, 80)))
        assert found == pytest.approx(curve.auc)

    def test_of_a_resample_is_that_of_the_drawn_queries(self):
        right, scores = RANDOM.random(40) < 0.6, RANDOM.random(40)
        (drawn,) = Bootstrap(40, resamples=5).draws()
        found = weighted_auc(right, scores, np.ones(40, dtype=bool))(drawn)
        for weights, area in zip(drawn.astype(int), found, strict=True):
            rows = np.repeat(np.arange(40), weights)
            assert area == pytest.approx(precision_recall(right[rows], scores[rows], 40).auc)

    def test_steps_and_precision_at_recalls(self):
        right, scores = RANDOM.random(60) < 0.6, RANDOM.integers(0, 20, 60).astype(float)
        curve = precision_recall(right, scores, 60)
        levels = (0.1, 0.25, 0.4, 0.99)
        (found,) = weighted_curve(right, scores, np.ones(60, dtype=bool), levels)(np.ones((1, 60)))
        assert found[1] == pytest.approx(curve.average_precision)
        for level, precision in zip(levels, found[2:], strict=True):
            reached = np.flatnonzero(curve.recall >= level - 1e-9)
            expected = curve.precision[reached[0]] if len(reached) else np.nan
            assert precision == pytest.approx(expected, nan_ok=True)

    def test_nothing_is_accepted(self):
        none = np.zeros(3, dtype=bool)
        found = weighted_curve(none, np.full(3, -np.inf), ~none, (0.5,))(np.ones((2, 3)))
        np.testing.assert_array_equal(found, [[0, 0, np.nan]] * 2)


class TestBlocks:
    def test_all_right_is_not_sure(self):
        low, high = np.array([1.0, 0.0, 0.4]), np.array([1.0, 0.0, 0.6])
        found = widened(low, high, 25)
        for row, right in zip(found[:2], (25, 0), strict=True):
            exact = stats.binomtest(right, 25).proportion_ci()
            assert row == pytest.approx((exact.low, exact.high))
        assert found[2].tolist() == [0.4, 0.6]
        assert Bootstrap(100, block=7).pieces == 15
        assert Bootstrap(4, groups="aabb").pieces == 2

    def test_length_grows_with_dependence(self):
        independent = RANDOM.random(1000) < 0.7
        alike = np.repeat(RANDOM.random(50) < 0.7, 20)
        assert dependent_length(independent) == 10
        assert dependent_length(alike) > 25
        both = dependent_length(np.stack([independent, alike], axis=1))
        assert both == dependent_length(alike)
        assert dependent_length(np.ones(1000)) == 10
        assert [dependent_length(np.arange(n) % 2) for n in (1, 2, 5)] == [1, 1, 2]

    def test_traverses(self):
        names = [f"{t}/Image{i:03}.jpg" for t in ("day", "night") for i in range(5)]
        assert set(traverses(names)) == {"day/Image", "night/Image"}
        hashes = [f"q/{letter}b{letter}.jpg" for letter in "abcdef"]
        assert set(traverses(hashes)) == {"q"}

    def test_settings(self):
        hits, names = np.ones((27, 1)), [f"{i % 2}/{i}.jpg" for i in range(27)]
        assert str(choose_bootstrap("traverse", hits, names)) == "2 groups of queries"
        for setting, given, block in (
            ("auto", names, 3), ("traverse", [], 3), ("traverse", ["a"] * 27, 3), ("4", [], 4),
            ("99", [], 27),
        ):  # fmt: skip
            assert choose_bootstrap(setting, hits, given).block_length == block
        with pytest.raises(ArgumentError, match="interval_block = 'x'"):
            choose_bootstrap("x", hits)


def runs_of_luck(random, count, share, alike):
    """Queries that repeat the answer of the one before with a probability."""
    fresh, repeated = random.random(count) < share, random.random(count) < alike
    start = np.maximum.accumulate(np.where(repeated, 0, np.arange(count)))
    return fresh[start]


@pytest.mark.slow
@pytest.mark.parametrize(("count", "share", "alike"), COVERED)
def test_coverage(count, share, alike):
    """The intervals of the default hold what they are of in 93 to 97 of 100 cases."""
    held = []
    for seed in range(1000):
        hits = runs_of_luck(np.random.default_rng(seed), count, share, alike)
        length = choose_bootstrap("auto", hits[:, None]).block_length
        bootstrap = Bootstrap(count, block=length, resamples=500, seed=seed)
        low, high = bootstrap.interval(weighted_mean(hits))
        held.append(low <= share <= high)
    assert 0.93 <= np.mean(held) <= 0.97


class TestMcNemar:
    def test_against_enumeration(self):
        for won in range(8):
            for lost in range(8):
                ours = np.array([True] * won + [False] * lost + [True, False])
                theirs = np.array([False] * won + [True] * lost + [True, False])
                n = won + lost
                tail = sum(math.comb(n, k) for k in range(min(won, lost) + 1)) / 2**n
                assert mcnemar(ours, theirs) == pytest.approx(min(1.0, 2 * tail))

    def test_of_different_lengths_is_refused(self):
        with pytest.raises(ArgumentError, match=r"\b3\b.*\b4\b"):
            mcnemar(np.ones(3, dtype=bool), np.ones(4, dtype=bool))
