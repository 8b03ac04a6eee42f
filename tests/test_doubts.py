# SPDX-License-Identifier: MIT
"""Recalls that cannot be true, and re-ranking that cannot work, are said or refused."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from test_cli import extract, picture, write_config

from patchnetvlad import evaluate
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import ConfigError, GroundTruthError
from patchnetvlad.evaluation.doubts import doubts
from patchnetvlad.models.grid import flat_sizes
from patchnetvlad.pipeline.result import RerankResult

pytestmark = pytest.mark.usefixtures("thin_network")
BERLIN = np.array([[52.5200, 13.4050], [52.5310, 13.3840], [52.5160, 13.3777]])
RESULT = RerankResult(
    ("q",), ("a", "b", "c"), np.array([[0, 1, 2]]), np.array([[2, 1, 0]]), None, (1,), {}, 0
)


class TestDegrees:
    @pytest.mark.parametrize("positions", [BERLIN, BERLIN[:, ::-1], -BERLIN])
    def test_they_are_no_metres(self, tmp_path, positions):
        GroundTruth(positions[:1], positions, 25.0).save(tmp_path / "t.npz")
        with pytest.raises(GroundTruthError, match=r"/t\.npz: .*degrees.*\b25\b.*--posDistThr"):
            evaluate(RESULT, tmp_path / "t.npz")
        assert evaluate(RESULT, tmp_path / "t.npz", threshold=0.0003)  # in degrees, knowingly

    @pytest.mark.parametrize(
        "positions",
        [
            BERLIN * 1000,
            [[391000.5, 5820000.1], [391000.9, 5820000.2], [391000.6, 5820000.3]],
            [[10, 12], [11, 12], [10, 13]],
            [[0.1, 0.2], [0.3, 0.4], [0.5, 0.1]],
        ],
        ids=["metres", "near", "whole", "a table"],
    )
    def test_others_may_be_metres(self, positions):
        positions = np.array(positions, dtype=float)
        GroundTruth(positions[:1], positions, 25.0).check_unit("t")


class TestDoubts:
    def test_nothing_to_say(self):
        assert doubts([[0], [1, 2]], ["q1", "q2"], ["a", "b", "c"]) == []
        assert doubts([[0]], ["q"], ["a"]) == []
        assert doubts([], [], []) == []

    def test_all_or_nearly_all_are_right(self):
        (said,) = doubts([[0, 1], [0, 1]], ["q", "r"], ["a", "b"])
        assert "every" in said
        rows = list(range(20))
        (said,) = doubts([rows, rows[1:]], ["q", "r"], [str(i) for i in rows])
        assert "97.5%" in said

    def test_queries_in_the_index(self):
        (said,) = doubts([[0], [1]], ["a", "x"], ["./a", "b"])
        assert said.startswith("1 of the 2 queries")
        (said,) = doubts([[0], [1]], ["a", "b"], ["a", "b"])
        assert said.startswith("all of the 2 queries")


class TestPatches:
    def test_flat_sizes(self):
        assert flat_sizes((480, 640), (2, 5, 8), (1, 1, 1)) == []
        assert flat_sizes((128, 640), (2, 8), (1, 1)) == [8]
        assert flat_sizes((640, 96), (2, 5), (1, 4)) == [5]

    @pytest.mark.parametrize(
        ("matcher", "said"), [("RANSAC", True), ("spatialApproximator", False)]
    )
    def test_it_is_said_before_extraction(self, tmp_path, capsys, matcher, said):
        picture(0).save(tmp_path / "0.png")
        (tmp_path / "index.txt").write_text("0.png\n")
        config = write_config(tmp_path / "c.ini", height=48, matcher=matcher)
        assert extract(tmp_path, "index", config, tmp_path / "f") == 0
        shown = capsys.readouterr().out
        assert ("patch size 3 leaves one row" in shown) == said

    @pytest.mark.parametrize("weights", [(0.0, 0.0, 0.0), (0.5, -0.1, 0.6), (-1.0, -1.0, -1.0)])
    def test_weights_that_do_not_weigh(self, weights):
        with pytest.raises(
            ConfigError, match=rf"demo\.ini: patchweights2use = {weights[0]},{weights[1]}"
        ):
            dataclasses.replace(Config.load("demo"), patch_weights=weights)
