# SPDX-License-Identifier: MIT
"""Bootstrap intervals and tests, against SciPy and by simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from patchnetvlad.errors import ArgumentError
from patchnetvlad.evaluation.intervals import Bootstrap, mcnemar, weighted_auc, weighted_mean
from patchnetvlad.evaluation.metrics import precision_recall

RANDOM = np.random.default_rng(1)


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
