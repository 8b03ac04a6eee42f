# SPDX-License-Identifier: MIT
"""What scores are usual, and how a match is said in words."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from test_plots import described, photograph

from patchnetvlad import Config, match
from patchnetvlad.evaluation.usual import agreeing, known_usual, measure_usual, patches_of
from patchnetvlad.places.description import reshaped
from patchnetvlad.places.usual import agreement


def test_measured_on_a_run():
    right = np.array([[True, False, False], [False, True, False], [True, True, False]])
    scores = np.array([[0.9, 0.3, 0.1], [0.4, 0.6, 0.1], [0.7, 0.6, 0.2]])
    patches = (100 * scores[:, :, None] * [1, 2]).astype(int)
    usual = measure_usual(right, scores, patches)
    assert (usual.right.pairs, usual.wrong.pairs, usual.best_wrong.pairs) == (2, 1, 3)
    assert usual.right.score == pytest.approx(np.quantile([0.9, 0.7], (0.1, 0.5, 0.9)))
    assert usual.best_wrong.score == pytest.approx(np.quantile([0.3, 0.4, 0.2], (0.1, 0.5, 0.9)))
    assert usual.wrong.patches == ((40, 40, 40), (80, 80, 80))
    assert measure_usual(right[:, :1] | True, scores[:, :1]).best_wrong is None


def test_patches_that_agree_are_read_from_scores():
    config = Config.load("demo")
    patches = patches_of(config)
    assert patches == (1131, 936, 759)
    scores = -np.array([[3, 0, 5], [0, 1, 700]]) / patches
    found = agreeing(scores.astype(np.float32), patches, "RANSAC")
    np.testing.assert_array_equal(found, [[3, 0, 5], [0, 1, 700]])
    assert agreeing(scores, patches, "spatialApproximator") is None
    assert agreeing(scores, (), "RANSAC") is None
    assert patches_of(replace(config, match_image_size=(0, 0))) == ()


def test_what_is_known_goes_with_weights_and_settings():
    config = Config.load("demo")
    for usual in known_usual(config):
        assert usual.source
        assert usual.right.score[1] > usual.best_wrong.score[1]
    assert len(known_usual(config)) == 2
    assert known_usual(config, "ab" * 32) == ()
    assert known_usual(replace(config, matcher="spatialApproximator")) == ()
    assert known_usual(replace(config, patch_sizes=(5,), strides=(1,), patch_weights=(1.0,))) == ()
    assert known_usual(Config.load("performance")) == ()


def test_agreement_in_words():
    first, second = described(photograph(0)), described(photograph(1), shift=2)
    found = match(first, second)
    counts = [len(matches.query_patches) for matches in found.matches]
    said = agreement(found)
    for count, grid in zip(counts, first.grids, strict=True):
        assert f"{count} of {len(grid)} of size {grid.patch_size}" in said
    assert "not known" in said  # of these settings
    ours = replace(Config.load("demo"), ransac="opencv")
    known = agreement(replace(found, query=replace(first, config=ours)))
    assert known.count("right pairs") == known.count("wrong pairs") == 2


@pytest.mark.parametrize(
    ("aspect", "shape"),
    [(0.0, (30, 40)), (4 / 3, (30, 40)), (2.0, (30, 60)), (0.5, (80, 40)), (1.0, (40, 40))],
)
def test_images_in_their_own_shape(aspect, shape):
    image = np.zeros((30, 40, 3), np.uint8)
    assert reshaped(image, aspect).shape[:2] == shape
