# SPDX-License-Identifier: MIT
"""Pictures: what is in them, and what is written to files."""

from __future__ import annotations

import io
import json
import re
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import matplotlib
import numpy as np
import pytest
from conftest import REPOSITORY
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_hex
from PIL import Image

import patchnetvlad
from patchnetvlad import (
    Config,
    Description,
    match,
    plot_answers,
    plot_match,
    plot_precision_recall,
    plot_recalls,
    plot_similarity,
    plot_trajectory,
    read_runs,
    save_figure,
)
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import DrawingError, ImageError, OutputError, ResultsError
from patchnetvlad.evaluation.intervals import Bootstrap
from patchnetvlad.evaluation.metrics import evaluate_predictions, precision_recall
from patchnetvlad.evaluation.metrics_file import write_metrics
from patchnetvlad.models.grid import patch_grids
from patchnetvlad.plots.dataset_map import plot_dataset
from patchnetvlad.plots.drawing import CM, METHODS, NEUTRAL, RIGHT, WRONG, shortened, text_width
from patchnetvlad.plots.spread import spread_out
from patchnetvlad.plots.training import plot_training

SIZES, STRIDES = (2, 5), (1, 1)


def photograph(seed: int, height: int = 128, width: int = 160) -> np.ndarray:
    small = np.random.default_rng(seed).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def described(image: np.ndarray, seed: int = 0, shift: int = 0, name: str = "") -> Description:
    """Describe an image by unit vectors of chance, those of the same seed shifted by columns."""
    config = replace(
        Config.load("demo"), patch_sizes=SIZES, strides=STRIDES, patch_weights=(0.5, 0.5)
    )
    grids = patch_grids(image.shape[:2], SIZES, STRIDES)
    patches = []
    for size, grid in zip(SIZES, grids, strict=True):
        table = np.random.default_rng(seed + size).normal(size=(40, 60, 16))
        vectors = table[grid.indices[:, 1], grid.indices[:, 0] + shift]
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        patches.append(vectors.astype(np.float32))
    descriptor = np.ones(16, dtype=np.float32) / 4
    return Description(descriptor, tuple(patches), tuple(grids), image, config, name)


@pytest.fixture(scope="module")
def found():
    first = described(photograph(0), name="some/folder/query.jpg")
    return match(first, described(photograph(1), shift=2, name="candidate.jpg"))


def texts(figure) -> list[str]:
    return [text.get_text() for text in figure.findobj(matplotlib.text.Text) if text.get_text()]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def lines_of(figure, what: str, place: int) -> list[np.ndarray]:
    """Return the polylines of one patch size."""
    return [
        line
        for collection in figure.axes[0].collections
        if (collection.get_gid() or "").startswith(f"{what}-{place}-")
        for line in collection.get_segments()
    ]


def rendered(figure, kind: str = "png", **options) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format=kind, **options)
    return content.getvalue()


def drawn(figure):
    """Draw a figure, and return what measures its texts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def cut_off(figure) -> bool:
    """Tell whether anything leaves the figure, by more than half a mm."""
    box = figure.get_tightbbox(drawn(figure))
    (width, height), most = figure.get_size_inches(), 0.05 * CM
    within = box.x0 > -most and box.y0 > -most and box.x1 < width + most and box.y1 < height + most
    return not within


class TestMatch:
    def test_lines_join_matched_patches(self, found):
        figure = plot_match(found, max_lines=1000)
        offset = found.query.image.shape[1] + 20
        for place, (start, end) in enumerate(found.inliers):
            assert len(start) > 10
            drawn = np.array(lines_of(figure, "matches", place))
            # Key points are middles of patches, truncated to whole px.
            np.testing.assert_array_equal(np.floor(drawn[:, 0]), start)
            np.testing.assert_array_equal(np.floor(drawn[:, 1]), end + np.array([offset, 0]))
        assert legend(figure) == [
            f"patch size {size}: {len(start)} of {len(grid)} agree"
            for size, grid, (start, _) in zip(SIZES, found.query.grids, found.inliers, strict=True)
        ]
        total = sum(len(start) for start, _ in found.inliers)
        assert f"Similarity score {found.score:.5f}: {total} patches agree" in texts(figure)
        assert {"query.jpg", "candidate.jpg"} <= set(texts(figure))

    def test_boxes_are_the_cells_of_matched_patches(self, found):
        figure = plot_match(found)
        offset = found.query.image.shape[1] + 20
        boxes = []
        for place, size in enumerate(SIZES):
            drawn = lines_of(figure, "patches", place)
            assert 2 <= len(drawn) <= 4
            assert len(drawn) % 2 == 0
            cells = {tuple(16 * i) for i in found.query.grids[place].indices}
            for square in drawn:
                low, high = square.min(axis=0), square.max(axis=0)
                np.testing.assert_array_equal(high - low, [16 * size] * 2)
                left = low + 0.5 - [offset if low[0] > offset - 1 else 0, 0]
                assert tuple(left) in cells
                boxes.append((low, high))
        for i, (low, high) in enumerate(boxes):  # none overlaps another
            for other_low, other_high in boxes[:i]:
                assert (low >= other_high).any() or (other_low >= high).any()
        assert not lines_of(plot_match(found, boxes=False), "patches", 0)

    def test_few_lines_that_are_announced(self, found):
        total = sum(len(start) for start, _ in found.inliers)
        for options, most in (({}, 15), ({"max_lines": 7}, 7), ({"max_lines": None}, total)):
            figure = plot_match(found, **options)
            lines = [lines_of(figure, "matches", place) for place in range(2)]
            assert sum(map(len, lines)) == most
            assert abs(len(lines[0]) - len(lines[1])) <= 1 or most == total
            (title,) = (text for text in texts(figure) if text.startswith("Similarity"))
            assert title.endswith(f"agree, {most} drawn" if most < total else "agree")

    def test_lines_are_far_from_each_other(self):
        rng = np.random.default_rng(0)
        crowd = rng.normal(size=(500, 2))
        apart = np.array([[100.0, 0.0], [0.0, 100.0], [-100.0, -100.0]])
        chosen = spread_out([np.concatenate([crowd, apart]), crowd[:4]], 6)
        assert {500, 501, 502} <= set(chosen[0].tolist())
        assert [len(rows) for rows in chosen] == [3, 3]
        assert [len(rows) for rows in spread_out([crowd[:2], crowd], 9)] == [2, 7]
        assert [rows.tolist() for rows in spread_out([crowd[:0], crowd[:3]], 3)] == [[], [0, 1, 2]]
        same = spread_out([np.zeros((9, 2))], 4)[0]
        assert len(set(same.tolist())) == 4

    def test_images_keep_their_shape(self, found):
        wide = replace(found, query=replace(found.query, aspect=2.5))
        figure = plot_match(wide, max_lines=None)
        left, right = figure.axes[0].images
        assert tuple(left.get_extent()) == (-0.5, 319.5, 127.5, -0.5)
        assert tuple(right.get_extent()) == (339.5, 499.5, 127.5, -0.5)
        start, end = (np.array(lines_of(figure, "matches", 0))[:, i] for i in (0, 1))
        np.testing.assert_allclose(np.floor((start + 0.5) / [2, 1] - 0.5), found.inliers[0][0])
        np.testing.assert_allclose(np.floor(end), found.inliers[0][1] + [340, 0])
        for square in lines_of(figure, "patches", 0):
            across = 64 if square[:, 0].min() < 320 else 32
            np.testing.assert_allclose(np.ptp(square, axis=0), [across, 32])
        assert not cut_off(figure)

    def test_colours_of_scores(self, found):
        first, second = found.query, found.candidate
        # Make one match of the larger patches less similar than the others.
        patches = second.patches[1].copy()
        j = found.matches[1].candidate_patches[0]
        patches[j] = patches[j] + 0.5 * np.roll(patches[j], 1)
        patches[j] /= np.linalg.norm(patches[j])
        changed = match(first, replace(second, patches=(second.patches[0], patches)))
        figure = plot_match(changed, colour_by="score", boxes=False, max_lines=1000)
        found_pairs = changed.matches[1]
        scores = [
            first.patches[1][a] @ patches[b]
            for a, b in zip(found_pairs.query_patches, found_pairs.candidate_patches, strict=True)
        ]
        assert min(scores) < 0.97 < max(scores)
        bar = figure.axes[1]
        assert bar.get_ylim() == pytest.approx((min(scores), max(scores)), abs=1e-6)
        assert bar.get_ylabel() == "cosine similarity"
        colours = {
            tuple(np.round(colour, 5))
            for collection in figure.axes[0].collections
            if (collection.get_gid() or "").startswith("matches-1")
            for colour in collection.get_colors()
        }
        viridis = matplotlib.colormaps["viridis"]
        assert {tuple(np.round(viridis(0.0), 5)), tuple(np.round(viridis(1.0), 5))} <= colours
        assert len(plot_match(changed).axes) == 1  # no bar for sizes

    def test_sizes_differ_without_colour(self, found):
        handles = plot_match(found).legends[0].legend_handles
        markers = {handle.get_marker() for handle in handles}
        assert len(markers) == len({handle.get_color() for handle in handles}) == len(SIZES)

    @pytest.mark.parametrize("colour_by", ["size", "score"])
    def test_no_match_at_all(self, colour_by, tmp_path):
        nothing = match(described(photograph(0)), described(photograph(1), seed=50))
        empty = replace(
            nothing,
            matches=tuple(
                replace(m, query_patches=m.query_patches[:0], homography=None,
                        candidate_patches=m.candidate_patches[:0])
                for m in nothing.matches
            ),
        )  # fmt: skip
        figure = plot_match(empty, colour_by=colour_by)
        assert legend(figure) == [
            f"patch size {size}: 0 of {len(grid)} agree"
            for size, grid in zip(SIZES, nothing.query.grids, strict=True)
        ]
        save_figure(figure, tmp_path / "a.png")

    def test_one_match(self, found):
        one = replace(
            found,
            matches=tuple(
                replace(m, query_patches=m.query_patches[:1],
                        candidate_patches=m.candidate_patches[:1])
                for m in found.matches
            ),
        )  # fmt: skip
        figure = plot_match(one, colour_by="score")
        assert legend(figure)[0].startswith("patch size 2: 1 of ")
        only = replace(one, matches=(one.matches[0], replace(one.matches[1],
                       query_patches=one.matches[1].query_patches[:0],
                       candidate_patches=one.matches[1].candidate_patches[:0])))  # fmt: skip
        assert any(text.endswith(": 1 patch agrees") for text in texts(plot_match(only)))

    @pytest.mark.parametrize("shape", [(96, 400), (400, 96), (80, 80)])
    def test_images_of_different_sizes(self, shape):
        figure = plot_match(match(described(photograph(0)), described(photograph(1, *shape))))
        left, right = figure.axes[0].images
        assert tuple(left.get_extent()) == (-0.5, 159.5, 127.5, -0.5)
        assert tuple(right.get_extent()) == (179.5, 179.5 + shape[1], shape[0] - 0.5, -0.5)
        width, height = figure.get_size_inches() / CM
        assert width == pytest.approx(16)
        assert height < 16
        assert not cut_off(figure)

    @pytest.mark.parametrize(
        "name", ["x" * 300 + ".jpg", "写真 $1_$.png", "a\nb\t.png", "\udc80.jpg"]
    )
    def test_odd_names(self, found, name):
        odd = replace(found, query=replace(found.query, name=name))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            figure = plot_match(odd, width=8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Glyph .* missing")
            assert not cut_off(figure)
        shown = texts(figure)[0]
        assert "\n" not in shown
        assert len(shown) < 40

    def test_names_that_are_given(self, found):
        assert {"day", "night"} <= set(texts(plot_match(found, names=("day", "night"))))

    def test_from_an_image_that_is_gone(self, found):
        gone = replace(found.candidate, image=np.zeros((0, 0, 3), np.uint8), name="gone.jpg")
        with pytest.raises(DrawingError, match=r"candidate.*gone\.jpg"):
            plot_match(replace(found, candidate=gone))

    def test_bad_options(self, found):
        with pytest.raises(DrawingError, match=r"'colour'.*size, score"):
            plot_match(found, colour_by="colour")
        with pytest.raises(DrawingError, match="max_lines = 0"):
            plot_match(found, max_lines=0)
        for names in ("ab", ("a",), ("a", "b", "c")):
            with pytest.raises(DrawingError, match=re.escape(f"names = {names!r}")):
                plot_match(found, names=names)
        with pytest.raises(DrawingError, match="width = 1 cm"):
            plot_match(found, width=1)
        without = replace(found, query=replace(found.query, patches=()))
        with pytest.raises(DrawingError, match=r"colour_by=.size"):
            plot_match(without, colour_by="score")
        assert len(lines_of(plot_match(without), "matches", 0)) > 5

    def test_the_method_draws_the_same(self, found):
        assert rendered(found.plot(max_lines=5)) == rendered(plot_match(found, max_lines=5))


class TestAnswers:
    IMAGES = tuple(photograph(i) for i in range(6))

    def frames(self, figure) -> list[tuple[str, str]]:
        return [
            (to_hex(patch.get_edgecolor()).upper(), patch.get_linestyle())
            for patch in figure.axes[0].patches
            if not patch.get_fill()
        ]

    def test_frames_and_marks(self):
        a, b, c, *_ = self.IMAGES
        figure = plot_answers([a], [[a, b, c]], right=[[True, False, None]])
        assert len(figure.axes[0].images) == 4
        frames = self.frames(figure)
        assert [colour for colour, _ in frames] == [RIGHT, WRONG, NEUTRAL]
        assert len({dashes for _, dashes in frames[:2]}) == 2  # they differ without colour, too
        assert [line.get_label() for line in figure.axes[0].lines] == ["tick", "cross"]
        assert legend(figure) == ["✓ right answer", "✗ wrong answer"]

    def test_unknown_truth_is_neutral(self):
        figure = plot_answers(self.IMAGES[:1], [self.IMAGES[1:4]])
        assert [colour for colour, _ in self.frames(figure)] == [NEUTRAL] * 3
        assert not figure.legends
        assert not figure.axes[0].lines

    @pytest.mark.parametrize("stacked", [False, True])
    def test_before_and_after(self, stacked):
        a, b, c, d, *_ = self.IMAGES
        figure = plot_answers(
            [a, b],
            {"NetVLAD": [[c, d], [d]], "Patch-NetVLAD": [[d, c], []]},
            right={"NetVLAD": [[False, True], [np.bool_(False)]],
                   "Patch-NetVLAD": [[True, False], []]},
            scores={"NetVLAD": [[-0.5, -0.75], [-1]], "Patch-NetVLAD": [[0.07, 0.06], []]},
            names={"NetVLAD": [["c", "d"], ["d"]], "Patch-NetVLAD": [["d", "c"], []]},
            query_names=["first", "second"],
            stacked=stacked,
            title="Both",
            width=8 if stacked else 16,
        )  # fmt: skip
        colours = [colour for colour, _ in self.frames(figure)]
        assert colours == [WRONG, RIGHT, RIGHT, WRONG, WRONG]
        written = texts(figure)
        expected = ["NetVLAD", "Patch-NetVLAD", "-0.5000", "-0.7500", "-1.0000", "0.0700", "first"]
        for text in [*expected, "0.0600", "second", "Both", "query", "no match"]:
            assert text in written
        rules = [line for line in figure.axes[0].lines if line.get_label() == "method"]
        assert {to_hex(line.get_color()).upper() for line in rules} == set(METHODS.values())
        # Captions stand above their pictures.
        (caption,) = (t for t in figure.axes[0].texts if t.get_text() == "first")
        assert caption.get_position()[1] <= min(figure.axes[0].images[0].get_extent()[2:])
        assert written.count("NetVLAD") == (2 if stacked else 1)
        assert written.count("1") == (1 if stacked else 2)
        assert not cut_off(figure)
        width, height = figure.get_size_inches() / CM
        assert width == pytest.approx(8 if stacked else 16)
        # Images of one column stand below each other and do not overlap.
        boxes = [image.get_extent() for image in figure.axes[0].images]
        assert all(0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height for x0, x1, y1, y0 in boxes)
        for i, (x0, x1, y1, y0) in enumerate(boxes):
            for u0, u1, v1, v0 in boxes[:i]:
                assert x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0

    def test_kinds_of_images(self, tmp_path):
        Image.fromarray(self.IMAGES[0]).save(tmp_path / "a.png")
        grey = self.IMAGES[1][:, :, 0]
        dot = np.full((1, 1, 3), 9, np.uint8)
        pillow = Image.fromarray(grey)
        figure = plot_answers(
            [str(tmp_path / "a.png")],
            [[tmp_path / "a.png", grey, pillow, dot, photograph(3, 400, 30), None]],
        )
        pixels = [np.asarray(image.get_array()) for image in figure.axes[0].images]
        np.testing.assert_array_equal(pixels[0], self.IMAGES[0])
        for i in (2, 3):
            np.testing.assert_array_equal(pixels[i], np.repeat(grey[:, :, None], 3, axis=2))
        assert len(pixels) == 6
        assert "no image" in texts(figure)
        x0, x1, y1, y0 = figure.axes[0].images[5].get_extent()
        assert (y1 - y0) / (x1 - x0) == pytest.approx(400 / 30)

    def test_large_photographs_are_reduced(self):
        large = photograph(0, 2000, 3000)
        figure = plot_answers([large], [[large] * 3])
        for image in figure.axes[0].images:
            height, width = image.get_array().shape[:2]
            x0, x1, *_ = image.get_extent()
            assert width == pytest.approx((x1 - x0) * CM * 300, abs=2)
            assert height == pytest.approx(width * 2 / 3, abs=1)

    def test_a_file_is_decoded_once(self, tmp_path, monkeypatch):
        from patchnetvlad.datasets import images as datasets_images
        from patchnetvlad.plots import drawing

        decoded = []
        load = datasets_images.load_image
        monkeypatch.setattr(drawing, "load_image", lambda path: decoded.append(path) or load(path))
        Image.fromarray(self.IMAGES[0]).save(tmp_path / "a.png")
        plot_answers([tmp_path / "a.png"], {"a": [[tmp_path / "a.png"]] * 1, "b": [[]]})
        assert len(decoded) == 1

    def test_long_names_stay_in_their_columns(self):
        a = self.IMAGES[0]
        name = "W" * 80 + ".jpg"
        figure = plot_answers([a], [[a] * 5], names=[[name] * 5], query_names=[name])
        renderer = drawn(figure)
        shown = [text for text in figure.axes[0].texts if "W" in text.get_text()]
        boxes = sorted((text.get_window_extent(renderer) for text in shown), key=lambda b: b.x0)
        assert len(boxes) == 6
        assert all(a.x1 < b.x0 for a, b in pairwise(boxes))
        assert all(text.get_text().endswith(".jpg") for text in shown)

    def test_too_much(self):
        a = self.IMAGES[0]
        with pytest.raises(DrawingError, match=r"1010 .*300"):
            plot_answers([a] * 10, [[a] * 100] * 10)
        with pytest.raises(DrawingError, match=r"21 .*16 cm"):
            plot_answers([a], {"a": [[a] * 10], "b": [[a] * 10]})
        assert len(plot_answers([a] * 50, [[a] * 5] * 50).axes[0].images) == 300

    def test_numbers_that_differ(self):
        a = self.IMAGES[0]
        with pytest.raises(DrawingError, match="no queries"):
            plot_answers([], [])
        with pytest.raises(DrawingError, match=r"answers\D+2\D+1"):
            plot_answers([a], [[a], [a]])
        with pytest.raises(DrawingError, match=r"scores\D+1\D.*\D2\D"):
            plot_answers([a], [[a, a]], scores=[[1.0]])
        with pytest.raises(DrawingError, match=r"right.*'x'.*'y'"):
            plot_answers([a], {"y": [[a]]}, right={"x": [[True]]})
        with pytest.raises(DrawingError, match=r"2 query_names\D+1\D"):
            plot_answers([a], [[a]], query_names=["a", "b"])

    def test_images_that_are_none(self, tmp_path):
        with pytest.raises(ImageError, match=r"missing\.png"):
            plot_answers([tmp_path / "missing.png"], [[]])
        for bad in (np.zeros((4, 4, 3)), np.zeros((4, 4, 4), np.uint8), np.zeros(5, np.uint8)):
            with pytest.raises(DrawingError, match=r"query 0.*\[\d"):
                plot_answers([bad], [[]])


class TestCurves:
    def test_recalls(self):
        runs = {"mine": ([10, 1, 5], [0.9, 0.5, 0.75]), "theirs": ([1, 100], [0.25, 1.0])}
        figure = plot_recalls(runs, title="Recalls")
        (axes,) = figure.axes
        first, second = axes.lines
        assert first.get_xdata().tolist() == [1, 5, 10]  # sorted
        assert first.get_ydata().tolist() == [50, 75, 90]
        assert second.get_ydata().tolist() == [25, 100]
        assert legend(figure) == ["mine", "theirs"]
        assert axes.get_xscale() == "log"
        drawn(figure)
        assert [t.get_text() for t in axes.get_xticklabels()] == ["1", "5", "10", "100"]
        assert axes.get_ylim() == (20, 102)
        assert "Recalls" in texts(figure)

    def test_bands_are_the_intervals(self):
        random = np.random.default_rng(0)
        rows, right = np.argsort(random.random((40, 6)), axis=1), [[0, 1]] * 40
        metrics = evaluate_predictions(
            rows, right, (5, 1), random.random(40), bootstrap=Bootstrap(40)
        )
        (band,) = plot_recalls({"a": metrics, "b": ([1, 5], [0.2, 0.4])}).axes[0].collections
        corners = band.get_paths()[0].vertices
        low, high = 100 * metrics.intervals.by_n["recall"][1]
        at_one = corners[corners[:, 0] == 1, 1]
        assert (at_one.min(), at_one.max()) == pytest.approx((low, high))
        (band,) = plot_precision_recall({"a": metrics, "b": metrics.curve}).axes[0].collections
        corners = band.get_paths()[0].vertices
        np.testing.assert_allclose(np.unique(corners[:, 0]), 100 * metrics.intervals.band[0])

    def test_methods_have_their_colours(self):
        curve = ([1, 5], [0.5, 0.6])
        names = ["Patch-NetVLAD", "day: NetVLAD", "PatchNetVLAD", "mine"]
        lines = plot_recalls(dict.fromkeys(names, curve)).axes[0].lines
        colours = [to_hex(line.get_color()).upper() for line in lines]
        assert colours[:2] == [METHODS["Patch-NetVLAD"], METHODS["NetVLAD"]]
        assert len(set(colours)) == 4  # a second run of a method has a shade of its colour
        many = plot_recalls({f"{i}: NetVLAD": curve for i in range(12)}).axes[0].lines
        assert len({to_hex(line.get_color()) for line in many}) == 12

    def test_names_with_an_underscore(self):
        assert [t.strip() for t in legend(plot_recalls({"_a": ([1], [1])}))] == ["_a"]

    def test_linear_where_n_is_small(self):
        figure = plot_recalls({"a": (range(1, 26), np.linspace(0.5, 1, 25))})
        assert figure.axes[0].get_xscale() == "linear"
        assert len(figure.axes[0].lines[0].get_markevery()) <= 10

    def test_runs_differ_without_colour(self):
        runs = {f"run {i}": ([1, 5], [i / 20, i / 15]) for i in range(12)}
        lines = plot_recalls(runs).axes[0].lines
        looks = {(line.get_marker(), str(line._unscaled_dash_pattern)) for line in lines}
        assert len(looks) == 12
        markers = [line.get_marker() for line in lines[:8]]
        assert len(set(markers)) == 8

    @pytest.mark.parametrize("width", [8, 16])
    def test_nothing_is_cut_off(self, width):
        runs = {f"a rather long name of run {i} {'y' * 5 * i}": ([1, 5], [0, 1]) for i in range(12)}
        figure = plot_recalls(runs, width=width, title="t" * 200)
        assert not cut_off(figure)
        assert figure.get_figwidth() == pytest.approx(width * CM)
        axes = figure.axes[0].get_window_extent()
        assert axes.height > 0.35 * width * CM * figure.dpi  # the legend leaves room
        below = figure.legends[0].get_window_extent(drawn(figure))
        assert below.y1 < axes.y0

    def test_precision_recall(self):
        curve = precision_recall([True, False, True, True], [0.9, 0.8, 0.7, 0.6], 5)
        figure = plot_precision_recall({"a": curve, "b": ([1.0, 0.5], [0.25, 0.5])})
        first, second = figure.axes[0].lines
        np.testing.assert_allclose(first.get_xdata(), [20, 20, 40, 60])
        np.testing.assert_allclose(first.get_ydata(), [100, 50, 200 / 3, 75])
        np.testing.assert_allclose(second.get_xdata(), [25, 50])
        area = 100 * curve.average_precision
        assert legend(figure) == [f"a (AP {area:.1f})", "b (AP 37.5)"]

    def test_runs_without_answers_are_left_out(self):
        curves = {"a": precision_recall([], []), "b": precision_recall([True], [1.0])}
        assert legend(plot_precision_recall(curves)) == ["b (AP 100.0)"]
        with pytest.raises(DrawingError, match="precision-recall"):
            plot_precision_recall({"a": precision_recall([], [])})

    @pytest.mark.parametrize(
        ("runs", "message"),
        [
            ({}, r"\b0 runs"),
            ({str(i): ([1], [1]) for i in range(13)}, r"13 .*12\b"),
            ({"a": ([1, 5], [0.5])}, "a: 2 .*N.* 1 recalls"),
            ({"a": ([], [])}, "a: 0 .*N"),
            ({"a": ([1], [81.8])}, r"a: recalls.*81\.8"),
            ({"a": ([1], [np.nan])}, "a: recalls.*nan"),
            ({"a": ([0], [0.5])}, "a: N = 0"),
        ],
    )
    def test_bad_recalls(self, runs, message):
        with pytest.raises(DrawingError, match=message):
            plot_recalls(runs)

    def test_bad_curves(self):
        with pytest.raises(DrawingError, match="a: recall falls"):
            plot_precision_recall({"a": ([1, 1], [0.5, 0.4])})
        with pytest.raises(DrawingError, match=r"a: 1 precisions.* 2 "):
            plot_precision_recall({"a": ([1], [0.5, 0.6])})
        with pytest.raises(DrawingError, match=r"\b0 runs"):
            plot_precision_recall({})


class TestTraining:
    def test_panels(self):
        recalls = {2: {1: 0.2, 5: 0.5}, 4: {1: 0.3, 5: 0.4}}
        figure = plot_training({n: 1 / n for n in range(1, 5)}, recalls)
        loss, recall = figure.axes
        assert list(loss.lines[0].get_xdata()) == [1, 2, 3, 4]
        by_n = {line.get_label(): list(line.get_ydata()) for line in recall.lines}
        assert (by_n["recall@1"], by_n["recall@5"]) == ([20, 30], [50, 40])
        assert list(recall.lines[-1].get_xdata()) == [2]  # the best recall@5
        assert len(plot_training({1: 0.5}).axes) == 1

    @pytest.mark.parametrize(("losses", "recalls"), [({}, {}), ({1: 0.1}, {1: {5: 50.0}})])
    def test_bad(self, losses, recalls):
        with pytest.raises(DrawingError):
            plot_training(losses, recalls)


class TestRuns:
    @pytest.fixture
    def results(self, tmp_path):
        for name, first in (("day", 0), ("night", 2)):
            folder = tmp_path / "results" / name
            folder.mkdir(parents=True)
            metrics = {
                method: evaluate_predictions(
                    [[first, 1], [1, 0], [0, 2]], [[0], [1], []], (1, 2), scores=[0.9, 0.5, 0.7]
                )
                for method in ("NetVLAD", "PatchNetVLAD")
            }
            write_metrics(folder / "metrics.json", metrics, {})
        return tmp_path / "results"

    def test_names(self, results):
        runs = read_runs([results / "day", results / "night" / "metrics.json"])
        assert list(runs) == ["day: NetVLAD", "day: Patch-NetVLAD", "night: NetVLAD",
                              "night: Patch-NetVLAD"]  # fmt: skip
        assert list(read_runs([results / "day"])) == ["NetVLAD", "Patch-NetVLAD"]
        assert list(read_runs(results / "day", methods=["NetVLAD"])) == ["NetVLAD"]
        named = read_runs({"A": results / "day", "B": results / "night"}, methods=["PatchNetVLAD"])
        assert list(named) == ["A: Patch-NetVLAD", "B: Patch-NetVLAD"]

    def test_values_are_those_that_were_written(self, results):
        run = read_runs([results / "day"])["NetVLAD"]
        expected = evaluate_predictions(
            [[0, 1], [1, 0], [0, 2]], [[0], [1], []], (1, 2), scores=[0.9, 0.5, 0.7]
        )
        assert run.to_json() == expected.to_json()
        assert legend(plot_recalls(read_runs([results / "day", results / "night"]))) == [
            "day: NetVLAD", "day: Patch-NetVLAD", "night: NetVLAD", "night: Patch-NetVLAD",
        ]  # fmt: skip
        assert len(plot_precision_recall(read_runs([results / "day"])).axes[0].lines) == 2

    def test_what_cannot_be_read(self, results, tmp_path):
        with pytest.raises(ResultsError, match=rf"{results}/metrics\.json.*feature-match"):
            read_runs([results])
        with pytest.raises(ResultsError, match="twice"):
            read_runs([results / "day", results / "day"])
        with pytest.raises(ResultsError, match="no folders"):
            read_runs([])
        with pytest.raises(ResultsError, match=r"NetVLAD, PatchNetVLAD.*SIFT"):
            read_runs([results / "day"], methods=["SIFT"])
        file = results / "day" / "metrics.json"
        whole = json.loads(file.read_text())
        for broken in (
            {**whole, "format": "other"},
            {**whole, "methods": {"NetVLAD": {}}},
            {**whole, "methods": []},
            [],
        ):
            file.write_text(json.dumps(broken))
            with pytest.raises(ResultsError, match=str(file)):
                read_runs([results / "day"])
        file.write_text("{")
        with pytest.raises(ResultsError, match=str(file)):
            read_runs([results / "day"])


class TestSimilarity:
    def test_values_positives_and_answers(self):
        values = np.arange(12, dtype=np.float32).reshape(3, 4)
        figure = plot_similarity(
            values, positives=[[0, 1], [], [3]], answers=[[1, 0], [2, 0], [3, 0]], title="All"
        )
        axes, bar = figure.axes
        np.testing.assert_array_equal(axes.images[0].get_array(), values)
        assert bar.get_ylabel() == "cosine similarity"
        assert legend(figure)[1:] == ["best answers: right (2)", "best answers: wrong (1)"]
        (outline,) = (c for c in axes.collections if c.get_gid() == "positives")
        edges = {tuple(map(tuple, line)) for line in outline.get_segments()}
        assert edges == {
            ((-0.5, -0.5), (1.5, -0.5)), ((-0.5, 0.5), (1.5, 0.5)),  # two cells, one outline
            ((-0.5, -0.5), (-0.5, 0.5)), ((1.5, -0.5), (1.5, 0.5)),
            ((2.5, 1.5), (3.5, 1.5)), ((2.5, 2.5), (3.5, 2.5)),
            ((2.5, 1.5), (2.5, 2.5)), ((3.5, 1.5), (3.5, 2.5)),
        }  # fmt: skip
        right, wrong = axes.collections[1:3]
        assert right.get_offsets().tolist() == [[1, 0], [3, 2]]
        assert wrong.get_offsets().tolist() == [[2, 1]]
        assert not cut_off(figure)

    def test_large_matrices_keep_their_maxima(self):
        values = np.zeros((2500, 5001), dtype=np.float32)
        values[1234, 4321] = 7.0
        values[2499, 5000] = np.nan
        figure = plot_similarity(values, answers=np.full(2500, 4321))
        shown = figure.axes[0].images[0].get_array()
        assert shown.shape == (834, 1001)
        assert shown[1234 // 3, 4321 // 5] == 7.0
        assert (shown == 7.0).sum() == 1
        assert bool(shown.mask[-1, -1])
        assert figure.axes[0].images[0].get_extent() == [-0.5, 5004.5, 2501.5, -0.5]
        assert figure.axes[0].get_xlim() == (-0.5, 5000.5)
        assert legend(figure) == ["best answers (2500)"]

    def test_scattered_positives_become_an_overlay(self):
        rng = np.random.default_rng(0)
        positives = [rng.integers(0, 1000, 20) for _ in range(1000)]
        figure = plot_similarity(rng.random((1000, 1000)), positives=positives)
        _, overlay = figure.axes[0].images
        mask = np.zeros((1000, 1000), dtype=bool)
        for q, row in enumerate(positives):
            mask[q, row] = True
        np.testing.assert_array_equal(overlay.get_array()[..., 3] > 0, mask)

    @pytest.mark.parametrize("shape", [(1, 1), (1, 5000), (5000, 1), (33, 120)])
    @pytest.mark.parametrize("width", [8, 16])
    def test_shapes(self, shape, width):
        values = np.random.default_rng(0).random(shape)
        figure = plot_similarity(values, answers=[0] * shape[0], positives=[[0]] * shape[0],
                                 width=width)  # fmt: skip
        assert not cut_off(figure)
        width_cm, height = figure.get_size_inches() / CM
        assert width_cm == pytest.approx(width)
        assert 3 < height < 2 * width

    @pytest.mark.parametrize(
        ("values", "options", "message"),
        [
            (np.zeros((0, 4)), {}, r"an array \[0, 4\]"),
            (np.zeros(4), {}, r"an array \[4\]"),
            (np.zeros((2, 2), dtype=complex), {}, "complex128"),
            (np.zeros((2, 3)), {"positives": [[0]]}, r"positives\D+1\D+2\b"),
            (np.zeros((2, 3)), {"positives": [[0], [3]]}, r"positive\D+3\b"),
            (np.zeros((2, 3)), {"answers": [0, 3]}, r"row 3\D+3\b"),
            (np.zeros((2, 3)), {"answers": [0]}, r"answers.*\[1\].*\b2\b"),
            (np.zeros((2, 3)), {"answers": [0.5, 1.0]}, "float64"),
        ],
    )
    def test_bad_values(self, values, options, message):
        with pytest.raises(DrawingError, match=message):
            plot_similarity(values, **options)


class TestTrajectory:
    QUERIES = np.array([[500010.0, 4000001.0], [500020.0, 4000002.0], [500030.0, 4000003.0]])
    INDEX = np.array([[500010.0, 4000000.0], [500020.0, 4000000.0], [500060.0, 4000000.0]])

    def test_right_wrong_and_none(self):
        figure = plot_trajectory(self.QUERIES, self.INDEX, [0, 2, -1], [True, False, False])
        (axes,) = figure.axes
        assert legend(figure) == ["index images (3)", "queries: right (1)", "queries: wrong (1)",
                                  "queries: no answer (1)"]  # fmt: skip
        assert len({h.get_marker() for h in figure.legends[0].legend_handles[1:]}) == 3
        (lines,) = (c for c in axes.collections if c.get_gid() == "answers")
        (line,) = lines.get_segments()
        assert line.tolist() == [[10, 2], [50, 0]]  # from the query to its answer
        assert axes.get_aspect() == 1
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("x - 500010, m", "y - 4000000, m")
        assert not cut_off(figure)

    def test_without_truth_all_answers_have_lines(self):
        figure = plot_trajectory(self.QUERIES, self.INDEX, [[0, 1], [2, 1], [1, 0]])
        (lines,) = (c for c in figure.axes[0].collections if c.get_gid() == "answers")
        assert len(lines.get_segments()) == 3
        assert legend(figure) == ["index images (3)", "queries: answered (3)"]

    def test_frames_stand_in_columns(self):
        queries = np.array([[0.0, 5.0], [2000.0, 7.0]])
        figure = plot_trajectory(queries, queries, [0, 1], [True, True], unit="frames")
        (axes,) = figure.axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("clip", "frame")
        points = axes.collections[-1].get_offsets()
        np.testing.assert_allclose(points, [[0.12, 5], [2.12, 7]])

    @pytest.mark.parametrize(
        ("options", "labels"),
        [
            ({}, ("x + 99990, m", "y - 4000000, m")),
            ({"zone": "32N"}, ("east of -99990 m, UTM zone 32N", "north of 4000000 m")),
            ({"unit": "frames"}, ("clip", "frame")),
        ],
    )
    def test_maps_of_data_sets_have_the_same_axes(self, options, labels):
        truth = GroundTruth(self.QUERIES - [600000, 0], self.INDEX - [600000, 0], 25.0)
        (axes,) = plot_dataset(truth, **options).axes
        assert (axes.get_xlabel(), axes.get_ylabel()) == labels

    @pytest.mark.parametrize("coordinates", [1, 3])
    def test_other_numbers_of_coordinates(self, coordinates):
        positions = np.arange(4.0)[:, None] * np.ones(coordinates)
        figure = plot_trajectory(positions, positions, range(4), [True] * 4)
        points = np.asarray(figure.axes[0].collections[0].get_offsets())
        np.testing.assert_array_equal(points[:, 0], range(4))
        np.testing.assert_array_equal(points[:, 1], range(4) if coordinates == 3 else [0] * 4)

    @pytest.mark.parametrize("extent", [(1, 1), (1000, 1), (1, 1000), (0, 0), (0, 5)])
    def test_shapes_of_maps(self, extent):
        path = np.random.default_rng(0).random((50, 2)) * extent
        figure = plot_trajectory(path, path, range(50), [True] * 50, width=8, title="t" * 99)
        assert not cut_off(figure)
        width, height = figure.get_size_inches() / CM
        assert width == pytest.approx(8)
        assert 3 < height < 14

    def test_no_queries(self):
        figure = plot_trajectory(np.zeros((0, 2)), self.INDEX, np.zeros(0, int), [])
        assert legend(figure) == ["index images (3)"]

    def test_many_points_are_pixels_in_vector_files(self, tmp_path):
        path = np.random.default_rng(0).random((30000, 2))
        save_figure(plot_trajectory(path, path, range(30000), [True] * 30000), tmp_path / "a.pdf")
        assert (tmp_path / "a.pdf").stat().st_size < 1_000_000

    def test_bad_values(self):
        with pytest.raises(DrawingError, match=r"right.*\[1\]\D+3"):
            plot_trajectory(self.QUERIES, self.INDEX, [0, 1, 2], [True])
        with pytest.raises(DrawingError, match=r"row 3\D+3"):
            plot_trajectory(self.QUERIES, self.INDEX, [0, 1, 3], [True] * 3)
        with pytest.raises(DrawingError, match=r"utm_index.*\[3\]"):
            plot_trajectory(self.QUERIES, [1.0, 2.0, 3.0], [0, 1, 2])
        with pytest.raises(DrawingError, match=r"utm_queries.*\b1\b.*nan"):
            plot_trajectory([[0, 0], [np.nan, 0]], self.INDEX, [0, 0])


class TestFiles:
    @pytest.fixture
    def figure(self):
        a = photograph(0)
        return plot_answers([a], [[a, a]], right=[[True, False]], query_names=["Zürich"])

    def test_kinds(self, figure, tmp_path):
        starts = {"png": b"\x89PNG", "jpg": b"\xff\xd8", "jpeg": b"\xff\xd8", "pdf": b"%PDF",
                  "svg": b"<?xml", "PNG": b"\x89PNG"}  # fmt: skip
        for ending, start in starts.items():
            path = tmp_path / "new" / f"a.{ending}"
            save_figure(figure, path)
            assert path.read_bytes().startswith(start)
        assert sorted(p.name for p in (tmp_path / "new").iterdir()) == sorted(
            f"a.{ending}" for ending in starts
        )

    def test_size_in_print(self, figure, tmp_path):
        save_figure(figure, tmp_path / "a.png", dpi=254)
        with Image.open(tmp_path / "a.png") as image:
            assert image.size[0] == pytest.approx(1600, abs=1)  # 16 cm
        save_figure(figure, tmp_path / "a.pdf")
        box = re.search(rb"/MediaBox \[ ?0 0 ([\d.]+)", (tmp_path / "a.pdf").read_bytes())
        assert float(box[1]) == pytest.approx(16 / 2.54 * 72, abs=0.1)

    def test_pdf_embeds_truetype(self, figure, tmp_path):
        save_figure(figure, tmp_path / "a.pdf")
        content = (tmp_path / "a.pdf").read_bytes()
        assert b"/FontFile2" in content  # TrueType, the whole of it or a part
        assert b"/Subtype /Type3" not in content

    def test_svg_text_stays_text(self, figure, tmp_path):
        save_figure(figure, tmp_path / "a.svg")
        content = (tmp_path / "a.svg").read_text(encoding="utf-8")
        for text in ("Zürich", "query", "right answer"):
            assert re.search(rf"<text [^>]*>[^<]*{text}", content)

    @pytest.mark.parametrize("ending", ["png", "jpg", "pdf", "svg"])
    def test_equal_pictures_are_equal_files(self, found, tmp_path, monkeypatch, ending):
        for i, epoch in enumerate(("1000000000", "1500000000")):
            monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
            save_figure(plot_match(found), tmp_path / f"{i}.{ending}")
        first, second = ((tmp_path / f"{i}.{ending}").read_bytes() for i in (0, 1))
        assert first == second
        assert not re.search(rb"CreationDate|<dc:date>|20\d\d-\d\d-\d\d", first)

    @pytest.mark.parametrize("name", ["a.bmp", "a", "a.eps", ".png"])
    def test_other_endings(self, figure, tmp_path, name):
        with pytest.raises(DrawingError, match=rf"{re.escape(name)}: .*\.png, .*\.svg"):
            save_figure(figure, tmp_path / name)
        assert not list(tmp_path.iterdir())

    def test_what_cannot_be_written(self, figure, tmp_path):
        (tmp_path / "a.png").mkdir()
        with pytest.raises(OutputError, match=r"a\.png"):
            save_figure(figure, tmp_path / "a.png")
        assert [p.name for p in tmp_path.iterdir()] == ["a.png"]

    def test_settings_around_do_not_matter(self, found):
        expected = rendered(plot_match(found))
        settings = {"font.size": 30, "axes.facecolor": "red", "lines.linewidth": 9,
                    "font.family": "serif", "image.cmap": "jet", "text.usetex": True}  # fmt: skip
        with matplotlib.rc_context(settings):
            figure = plot_match(found)
            assert matplotlib.rcParams["font.size"] == 30  # and are left alone
        assert rendered(figure) == expected

    @pytest.mark.parametrize("draw", [
        lambda: plot_recalls({"a": ([1, 5, 10], [0.1, 0.2, 0.3])}),
        lambda: plot_similarity(np.eye(9), answers=[0] * 9),
        lambda: plot_trajectory(np.eye(2), np.eye(2), [0, 1]),
    ])  # fmt: skip
    def test_ticks_are_in_the_style(self, draw):
        with matplotlib.rc_context({"xtick.labelsize": 30, "ytick.labelsize": 30}):
            figure = draw()
            drawn(figure)
            for axes in figure.axes:
                sizes = {t.get_fontsize() for t in (*axes.get_xticklabels(),
                                                    *axes.get_yticklabels())}  # fmt: skip
                assert sizes <= {7.0}

    def test_saved_by_matplotlib_they_are_sharp(self, figure, tmp_path):
        figure.savefig(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            assert image.size[0] == pytest.approx(16 / 2.54 * 200, abs=1)
        figure.savefig(tmp_path / "a.pdf")
        assert b"/FontFile2" in (tmp_path / "a.pdf").read_bytes()

    def test_notebooks_show_figures(self, figure):
        png = figure._repr_png_()
        with Image.open(io.BytesIO(png)) as image:
            assert image.size[0] == pytest.approx(16 / 2.54 * 150, abs=1)


class TestText:
    def test_shortened_text_fits(self):
        name = "a_long_folder_name_frame_000123.jpg"
        assert shortened(name, 20) == name
        for width in (0.8, 1.5, 2.5):
            text = shortened(name, width, 7)
            assert "…" in text
            assert text_width(text, 7) <= width
            assert name.startswith(text.split("…")[0])
            assert name.endswith(text.split("…")[1])
        assert shortened("写真" * 30, 2.0).count("…") == 1
        assert shortened("", 1) == ""


def test_the_public_api_has_all_pictures():
    from patchnetvlad import plots

    for name in plots.__all__:
        if name.startswith("plot_"):
            assert getattr(patchnetvlad, name) is getattr(plots, name)


def test_documented_code_is_that_of_the_pictures():
    page = (REPOSITORY / "docs" / "pictures.md").read_text(encoding="utf-8")
    script = (REPOSITORY / "docs" / "make_pictures.py").read_text(encoding="utf-8")
    flat = [line.strip() for line in script.splitlines() if line.strip()]
    shown = 0
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        lines = [line.strip() for line in block.splitlines() if line.strip()]
        others = ('save_figure(figure, "figure.pdf")', "plot_trajectory(", "import *")
        if any(other in block for other in others):
            continue
        assert any(flat[i : i + len(lines)] == lines for i in range(len(flat))), block
        shown += 1
    assert shown == 4


def test_pictures_of_the_documentation_are_all_made():
    scripts = [REPOSITORY / "docs" / f"make_{what}.py" for what in ("pictures", "report_picture")]
    script = "".join(script.read_text(encoding="utf-8") for script in scripts)
    made = set(re.findall(r'(?:out|"images") / "([\w.]+)"', script))
    images = REPOSITORY / "docs" / "images"
    others = {"method.svg", "rooms.svg"}  # drawn by hand; by the build of the documentation
    there = {file.name for file in images.iterdir()} - {"CREDITS.md"} - others
    assert made == there
    assert all((images / name).stat().st_size < 300_000 for name in made)
    for page in [REPOSITORY / "README.md", *(REPOSITORY / "docs").glob("*.md")]:
        shown = re.findall(r"!\[[^]]*\]\((?:docs/)?images/([^)]+)\)", page.read_text("utf-8"))
        assert set(shown) <= made | others, page.name


@pytest.mark.slow
def test_documented_code_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    page = (REPOSITORY / "docs" / "pictures.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.S)
    names: dict[str, object] = {}
    for block in [*blocks[1:], blocks[0]]:  # the first saves a figure, any
        exec(compile(block, "pictures.md", "exec"), names)
    assert (tmp_path / "figure.pdf").stat().st_size > 1000
    assert {file.name for file in (tmp_path / "pictures").glob("*.[jp][pn]g")} == {
        "match.jpg", "match_score.jpg", "recalls.png", "precision_recall.png",
    }  # fmt: skip


def test_settings_in_force_do_not_matter(tmp_path):
    runs = {"a": ([1, 5], [0.5, 0.75])}
    save_figure(plot_recalls(runs), tmp_path / "plain.png")
    settings = {
        "savefig.bbox": "tight",
        "savefig.facecolor": "red",
        "font.size": 20,
        "axes.unicode_minus": False,
    }
    with matplotlib.rc_context(settings):
        save_figure(plot_recalls(runs), tmp_path / "other.png")
        assert matplotlib.rcParams["font.size"] == 20
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "other.png").read_bytes()


def test_threads_draw_one_at_a_time(tmp_path):
    before = dict(matplotlib.rcParams)
    runs = {"a": ([1, 5], [0.5, 0.75])}

    def draw(i):
        save_figure(plot_recalls(runs), tmp_path / f"{i}.svg")
        return (tmp_path / f"{i}.svg").read_bytes()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(6) as pool:
            assert len(set(pool.map(draw, range(6)))) == 1
    finally:
        sys.setswitchinterval(interval)
    assert dict(matplotlib.rcParams) == before


@pytest.mark.parametrize(
    ("draw", "words"),
    [
        (lambda: plot_recalls({"a": ([1.5, 2.0], [0.1, 0.2])}), r"a: .*\bN\b"),
        (lambda: plot_recalls({"a": (["1", "5"], [0.1, 0.2])}), r"a: .*\bN\b"),
        (lambda: plot_recalls({"a": 5}), "plot_recalls"),
        (lambda: plot_similarity(np.eye(2), positives=[[0.7], [1]]), "positives"),
        (
            lambda: plot_trajectory(np.zeros((2, 2)), np.ones((2, 2)), [0, 1], [None, True]),
            "right",
        ),
        (lambda: save_figure(plot_recalls({"a": ([1], [0.1])}), "a.png", dpi=0), "dpi = 0"),
    ],
)
def test_values_that_cannot_be_drawn(draw, words):
    with pytest.raises(DrawingError, match=words):
        draw()
