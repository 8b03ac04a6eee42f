# SPDX-License-Identifier: MIT
"""The target of the fuzzer that calls public functions with arguments of odd types and values.

A call may return, or be refused by an error of this package, or by a TypeError or ValueError that
code of this package raises itself.
"""

from __future__ import annotations

import datetime
import functools
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fuzz_features import CONFIG, described, model
from fuzz_parts import Target, check_length
from hypothesis import strategies as st
from PIL import Image
from place_data import picture

import patchnetvlad as pv
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import PatchNetVLADError
from patchnetvlad.evaluation import metrics
from patchnetvlad.plots import dataset_map

PACKAGE = str(Path(pv.__file__).parent) + os.sep


class Refused(PatchNetVLADError):
    """A TypeError or ValueError, as it should be; the fuzzer counts these."""


# Odd values ------------------------------------------------------------------------------------

_MAKERS: dict[str, Callable[[], Any]] = {
    "object": object,
    "generator": lambda: (i for i in range(2)),
    "nothing": lambda: iter(()),
    "bytearray": lambda: bytearray(b"ab"),
    "set": lambda: {1, 2},
    "lambda": lambda: lambda *words: words,
    "date": lambda: datetime.date(2026, 1, 1),
    "path": lambda: Path("/nowhere/at/all"),
    "image": lambda: picture(0, (40, 30)),
    "small image": lambda: Image.new("RGB", (1, 1)),
    "wide image": lambda: Image.new("L", (3000, 2)),
    "class": lambda: int,
    "array 0": lambda: np.zeros(0),
    "array ()": lambda: np.array(1.5),
    "array 3": lambda: np.arange(3.0),
    "array 2 3": lambda: np.arange(6).reshape(2, 3),
    "array 2 0": lambda: np.zeros((2, 0)),
    "array 0 2": lambda: np.zeros((0, 2)),
    "array 2 2 2": lambda: np.zeros((2, 2, 2)),
    "nan": lambda: np.full((2, 2), np.nan),
    "huge": lambda: np.full((2, 2), 1e308),
    "u8": lambda: np.zeros((30, 40, 3), np.uint8),
    "u8 4": lambda: np.zeros((30, 40, 4), np.uint8),
    "u64": lambda: np.full((2, 2), 2**64 - 1, np.uint64),
    "f2": lambda: np.full(3, np.inf, np.float16),
    "bool": lambda: np.array([True, False]),
    "complex": lambda: np.full((2, 2), 1j),
    "text": lambda: np.array([["a", "b"], ["c", "d"]]),
    "objects": lambda: np.array([None, "a", 2], dtype=object),
    "dates": lambda: np.zeros((2, 2), "M8[s]"),
    "records": lambda: np.zeros(2, "f8,i4"),
    "masked": lambda: np.ma.masked_all((2, 2)),
    "tensor": lambda: torch.rand(3, 96, 128),
    "tensor u8": lambda: torch.zeros(3, 96, 128, dtype=torch.uint8),
    "tensor half": lambda: torch.zeros(3, 96, 128, dtype=torch.bfloat16),
    "tensor grad": lambda: torch.rand(3, 96, 128, requires_grad=True),
    "tensor meta": lambda: torch.zeros(3, 96, 128, device="meta"),
    "tensor sparse": lambda: torch.eye(3).to_sparse(),
    "tensor complex": lambda: torch.zeros(3, 96, 128, dtype=torch.complex64),
    "tensor 0": lambda: torch.zeros(0),
    "tensor wide": lambda: torch.zeros(3, 2, 5000),
    "config": lambda: CONFIG,
    "model": model,
    "description": lambda: described()[0],
}  # fmt: skip
# Made anew for each call: generators are used up, arrays may be changed.
made = st.sampled_from(sorted(_MAKERS)).map(lambda name: Made(name))


class Made(NamedTuple):
    """A value of ``_MAKERS``, by name."""

    name: str


def value_of(odd: Any) -> Any:
    if isinstance(odd, Made):
        return _MAKERS[odd.name]()
    if isinstance(odd, list):
        return [value_of(item) for item in odd]
    if isinstance(odd, tuple):
        return tuple(value_of(item) for item in odd)
    if isinstance(odd, dict):
        return {key: value_of(item) for key, item in odd.items()}
    return odd


_plain = st.sampled_from(
    [
        None, True, False, 0, -1, 1, 2, 5, 2**31, 2**63, 2**70, -(2**70), 1.5, -0.5, 1e300,
        float("nan"), float("inf"), -float("inf"), 1j, "", "x", "a.png", "\0", "\ud800", "x" * 3000,
        "s3://x/y", "$x$", "auto", "cpu", "cuda:99", b"x", (), Ellipsis, NotImplemented,
    ]
)  # fmt: skip
_flat = st.one_of(_plain, _plain, made, st.integers(-3, 5), st.floats(), st.text(max_size=4))
odd = st.recursive(
    _flat,
    lambda below: st.one_of(
        st.lists(below, max_size=3),
        st.lists(below, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from(["a", "", "b: NetVLAD", 1, None]), below, max_size=2),
    ),
    max_leaves=4,
)


# Calls -----------------------------------------------------------------------------------------


class Call(NamedTuple):
    """A call: the name of the function, and arguments in place of sound ones."""

    name: str
    arguments: dict[str, Any]


@functools.cache
def index() -> Any:
    made = pv.PlaceIndex(model())
    made.add(described()[:2], keys=["a", "b"], positions=[(1, 2), (3, 4)])
    return made


def add(**arguments: Any) -> None:
    with pv.PlaceIndex(model()) as grown:
        grown.add(**arguments)
        assert len(grown) == len(set(grown.keys)) <= 3


def save(path: Any) -> None:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            index().save(path)
        finally:
            os.chdir(before)


def save_figure(**arguments: Any) -> None:
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        try:
            pv.save_figure(**arguments)
        finally:
            os.chdir(before)


def each(images: Any) -> None:
    for _ in zip(model().describe_each(images), range(3), strict=False):
        pass


@functools.cache
def sound_metrics() -> Any:
    return metrics.evaluate_predictions([[0, 1], [1, 0]], [[0], [0]], (1, 2), [0.5, 0.25])


@functools.cache
def match() -> Any:
    return pv.match(*described()[:2])


@functools.cache
def figure() -> Any:
    return pv.plot_recalls({"a": ([1, 2], [0.5, 0.75])})


def _calls() -> dict[str, tuple[Callable[..., object], dict[str, Any]]]:
    """Return functions, each with sound arguments: all that are to be replaced in turns."""
    pixels = np.zeros((30, 40, 3), np.uint8)
    path = np.arange(6.0).reshape(3, 2)
    predictions = {"predictions": [[0, 1]], "positives": [[0]], "n_values": [1, 2]}
    runs = {"runs": {"a": sound_metrics()}, "title": "", "width": 8.0}
    truth = GroundTruth(path, path, 1.0)
    return {
        "Config": (pv.Config, {field.name: field.default for field in fields(pv.Config)}),
        "Config.load": (pv.Config.load, {"path_or_name": "demo"}),
        "Config.from_json": (pv.Config.from_json, {"content": {}, "source": None}),
        "Config.from_mapping": (
            pv.Config.from_mapping,
            {"sections": {"global_params": {"pooling": "netvlad"}}, "source": "x"},
        ),
        "load_model": (pv.load_model, {"config": "demo", "weights": "/nowhere", "device": "cpu"}),
        "describe": (model().describe, {"images": pixels}),
        "describe_each": (each, {"images": [pixels]}),
        "match": (pv.match, {"a": described()[0], "b": described()[1], "device": "cpu"}),
        "PlaceIndex": (pv.PlaceIndex, {"model": model(), "path": None}),
        "PlaceIndex.load": (
            pv.PlaceIndex.load, {"path": "/nowhere", "model": model(), "dataset_root": ""},
        ),
        "add": (
            add, {"images": described()[:2], "keys": ["a", "b"], "positions": [(1, 2), (3, 4)]}
        ),
        "query": (
            index().query,
            {"image": described()[0], "top_k": 2, "rerank": True, "threshold": 0.5,
             "candidates": 2},
        ),
        "image": (index().image, {"key": "a"}),
        "picture": (index().picture, {"key": "b"}),
        "description": (index().description, {"key": "a"}),
        "contains": (index().__contains__, {"key": "a"}),
        "save": (save, {"path": "x"}),
        "recall_at_n": (pv.recall_at_n, {**predictions, "all_queries": True}),
        "mean_average_precision_at_n": (
            metrics.mean_average_precision_at_n, {**predictions, "all_queries": True}
        ),
        "precision_recall": (
            metrics.precision_recall, {"right": [True], "scores": [0.5], "relevant": None}
        ),
        "evaluate_predictions": (
            metrics.evaluate_predictions, {**predictions, "scores": [0.5], "all_queries": False}
        ),
        "plot_recalls": (pv.plot_recalls, runs),
        "plot_precision_recall": (pv.plot_precision_recall, runs),
        "plot_match": (
            pv.plot_match,
            {"match": match(), "colour_by": "size", "boxes": True, "max_lines": 3,
             "names": ("a", "b"), "width": 8.0},
        ),
        "plot_answers": (
            pv.plot_answers,
            {"queries": [pixels], "answers": [[pixels, None]], "right": [[True, None]],
             "scores": [[0.5, None]], "names": [["a", "b"]], "query_names": ["q"],
             "stacked": False, "title": "t", "width": 8.0},
        ),
        "plot_similarity": (
            pv.plot_similarity,
            {"similarity": np.eye(3), "positives": [[0], [1], []], "answers": [0, 2, -1],
             "label": "l", "title": "t", "width": 8.0},
        ),
        "plot_trajectory": (
            pv.plot_trajectory,
            {"utm_queries": path, "utm_index": path, "answers": [0, 1, -1],
             "right": [True, False, False], "unit": "m", "title": "t", "width": 8.0},
        ),
        "plot_dataset": (
            dataset_map.plot_dataset,
            {"truth": truth, "without": [1], "unit": "m", "zone": "", "title": ""},
        ),
        "save_figure": (save_figure, {"figure": figure(), "path": "a.png", "dpi": 20}),
        "read_runs": (pv.read_runs, {"folders": ["/nowhere"], "methods": ["NetVLAD"]}),
        "extract": (
            pv.extract,
            {"config": "demo", "image_list": "/nowhere", "dataset_root": "", "output_dir": "/no",
             "device": "cpu", "feature_names": "stem", "shard": None, "progress": False},
        ),
        "rerank": (
            pv.rerank,
            {"config": "demo", "query_list": "/nowhere", "index_list": "/nowhere",
             "query_features": "/nowhere", "index_features": "/nowhere", "dataset_root": "",
             "ground_truth": None, "threshold": None, "protocol": None, "candidates": None,
             "exports": (), "reference_poses": (), "device": "cpu", "progress": False},
        ),
        "run": (
            pv.run,
            {"config": "demo", "index": "/nowhere", "queries": "/nowhere", "dataset_root": "",
             "ground_truth": None, "positions": "auto", "threshold": None, "device": "cpu",
             "progress": False},
        ),
        "compare": (
            pv.compare,
            {"runs": ["/nowhere/a", "/nowhere/b"], "output": None, "query_list": None,
             "index_list": None, "ground_truth": None, "threshold": None, "n_values": [1],
             "all_methods": False, "interval_block": None, "title": "", "max_mb": 50,
             "progress": False},
        ),
        "calibrate_confidence": (
            pv.calibrate_confidence,
            {"runs": ["/nowhere/a", "/nowhere/b"], "output": None, "names": None},
        ),
        "write_report": (
            pv.write_report,
            {"results_dir": "/nowhere", "output": None, "title": None, "max_mb": 50,
             "candidates": 5, "matches": 5, "config": None, "query_list": None,
             "ground_truth": None, "threshold": None, "device": "cpu", "progress": False},
        ),
    }  # fmt: skip


CALLS = functools.cache(_calls)


@st.composite
def calls(draw: st.DrawFn) -> Call:
    """Draw a function and some of its arguments, most of the time one."""
    name = draw(st.sampled_from(sorted(CALLS())))
    known = list(CALLS()[name][1])
    wrong = draw(st.lists(st.sampled_from(known), min_size=0, max_size=2, unique=True))
    return Call(name, {key: draw(odd) for key in wrong})


def call(path: Path) -> None:
    """Call what was written to a path; see :func:`write_call`."""
    name, arguments = _written[path]
    function, sound = CALLS()[name]
    given = {**sound, **{key: value_of(value) for key, value in arguments.items()}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            result = function(**given)
            if isinstance(result, Iterator):
                next(result, None)
    except PatchNetVLADError as error:
        check_length(str(error))
        raise Refused(f"{path.name}: {error!s:.200}") from error
    except (TypeError, ValueError) as error:
        check_ours(error)
        raise Refused(f"{path.name}: {error!s:.200}") from error


def check_ours(error: Exception) -> None:
    """Check that code of this package raised an error itself, not what it called."""
    innermost = traceback.extract_tb(error.__traceback__)[-1]
    assert innermost.filename.startswith(PACKAGE), f"{innermost.filename}: {error}"
    check_length(str(error))


_written: dict[Path, Call] = {}


def write_call(path: Path, given: Call) -> None:
    _written.clear()
    _written[path] = given


API = {"api": Target(st.deferred(calls), ".call", call, write_call)}
