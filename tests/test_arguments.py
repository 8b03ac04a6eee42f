# SPDX-License-Identifier: MIT
"""Arguments of odd types, at the public doors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import patchnetvlad as pv
from patchnetvlad.base.arguments import argument_errors, checked
from patchnetvlad.config import Config
from patchnetvlad.errors import (
    ArgumentError,
    DrawingError,
    KeyNotFoundError,
    OutputError,
    PatchNetVLADError,
)


@checked
def door(
    path: str | Path = "",
    count: int = 1,
    share: float | None = None,
    flag: bool = False,
    names: Sequence[str] = (),
    sections: Mapping[str, Sequence[int]] | None = None,
    config: Config | None = None,
    pair: tuple[int, int] = (0, 0),
    device: str = "auto",
    values: Any = None,
) -> str:
    return "open"


class TestDoors:
    @pytest.mark.parametrize(
        "sound",
        [
            {"path": Path("a")},
            {"path": None},  # as its default, which is empty
            {"count": np.int64(3), "share": np.float32(0.5)},
            {"count": 3.0, "share": 2, "flag": np.True_},
            {"names": np.array(["a", "b"])},
            {"names": (name for name in "ab")},
            {"sections": {"a": [1, 2], "b": np.arange(3), "c": range(4)}},
            {"config": Config(), "values": object()},
            {"pair": [1, 2]},
            {"pair": np.arange(2), "device": torch.device("cpu")},
        ],
    )
    def test_let_in_what_fits(self, sound):
        assert door(**sound) == "open"

    @pytest.mark.parametrize(
        "odd",
        [
            {"path": 5}, {"path": b"a"}, {"path": ["a"]}, {"count": "1"}, {"count": 1.5},
            {"count": None}, {"share": "x"}, {"share": 1j}, {"flag": "no"}, {"names": 5},
            {"names": ["a", 1]}, {"names": {"a": 1}}, {"names": np.arange(3)}, {"sections": []},
            {"sections": {1: [1]}}, {"sections": {"a": ["b"]}}, {"config": {}}, {"config": Config},
            {"pair": 5}, {"pair": "ab"},
        ],
    )  # fmt: skip
    def test_name_what_does_not(self, odd):
        (name,) = odd
        with pytest.raises(ArgumentError, match=name):
            door(**odd)
        with pytest.raises((TypeError, ValueError)):  # as Python would say it
            door(**odd)

    def test_leave_other_mistakes_to_python(self):
        with pytest.raises(TypeError, match="unknown"):
            door(unknown=1)

    def test_cut_long_values(self):
        with pytest.raises(ArgumentError) as caught:
            door(count=["x" * 10**6] * 10)
        assert len(str(caught.value)) < 200

    def test_values_that_cannot_be_shown(self):
        class Odd:
            def __repr__(self):
                raise RuntimeError

        with pytest.raises(ArgumentError, match="Odd"):
            door(count=Odd())


def test_errors_of_values():
    @argument_errors("it cannot count", DrawingError)
    def count(values):
        return values.all().sum() / len(values)

    assert count(np.ones(1)) == 1
    for odd in (None, 5, np.zeros(())):
        with pytest.raises(DrawingError, match="it cannot count"):
            count(odd)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda: pv.extract(5, "list.txt"), "config"),
        (lambda: pv.extract("demo", ["a.jpg"]), "image_list"),
        (lambda: pv.rerank("demo", "q", "i", b"q", "i"), "query_features"),
        (lambda: pv.rerank("demo", "q", "i", "q", "i", protocol=()), "protocol"),
        (lambda: pv.evaluate({}, "truth.npz"), "result"),
        (lambda: pv.run("demo", 1, "queries"), "index"),
        (lambda: pv.write_report(None), "results_dir"),
        (lambda: pv.read_runs([1]), "folders"),
        (lambda: pv.read_runs({"a": None}), "folders"),
        (lambda: pv.Config.load({}), "path_or_name"),
        (lambda: pv.Config.from_mapping([]), "sections"),
        (lambda: pv.Config.from_mapping({None: {}}), "sections"),
        (lambda: pv.plot_recalls([1]), "runs"),
        (lambda: pv.plot_precision_recall({1: ([1.0], [1.0])}), "runs"),
        (lambda: pv.plot_match(None), "match"),
        (lambda: pv.plot_similarity(np.eye(2), width="wide"), "width"),
        (lambda: pv.save_figure(None, "a.png"), "figure"),
        (lambda: pv.save_figure(pv.plot_recalls({"a": ([1], [1])}), 5), "path"),
        (lambda: pv.recall_at_n(5, [[1]], [1]), "recall_at_n"),
        (lambda: pv.recall_at_n([[1]], [[1]], None), "recall_at_n"),
    ],
)
def test_public_functions(call, named):
    with pytest.raises(PatchNetVLADError, match=named) as caught:
        call()
    assert isinstance(caught.value, ValueError)


class TestMessages:
    @pytest.mark.parametrize("kind", [OutputError, ArgumentError, KeyNotFoundError])
    def test_are_short_whatever_values_they_name(self, kind):
        message = str(kind(f"a.txt holds {'x' * 10**5}\n\n\n{'y' * 10**5}; give another"))
        assert message.startswith("a.txt holds xx")
        assert message.endswith("yy; give another")
        assert len(message) < 2000
        assert "\n" not in message

    def test_of_two_lines_stay_as_they_are(self):
        assert str(ArgumentError("one\ntwo")) == "one\ntwo"
