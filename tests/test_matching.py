# SPDX-License-Identifier: MIT
"""Retrieval, geometry, matching, fusion and re-ranking, above all where they degenerate."""

from __future__ import annotations

from dataclasses import replace

import cv2
import numpy as np
import pytest
import torch
from conftest import DEVICES

from patchnetvlad.config import Config
from patchnetvlad.engines.rerank import rerank_candidates
from patchnetvlad.errors import ConfigError, FeatureError
from patchnetvlad.features.npy_files import NpyReader
from patchnetvlad.matching.fusion import fuse_scores, rank
from patchnetvlad.matching.nearest import mutual_nearest_neighbours, nearest_neighbours
from patchnetvlad.matching.pair import match_pair, match_patches, similarity
from patchnetvlad.matching.ransac import homography_inliers
from patchnetvlad.matching.spatial import spatial_score
from patchnetvlad.models.grid import PatchGrid, patch_grids
from patchnetvlad.search.by_protocol import keep_best_cutout
from patchnetvlad.search.candidates import load_predictions
from patchnetvlad.search.retrieve import retrieve

MATCHERS = ["RANSAC", "spatialApproximator"]


def unit(*shape, seed=0):
    values = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def tensors(*arrays):
    return [torch.from_numpy(array) for array in arrays]


class TestGrids:
    @pytest.mark.parametrize("size", [(480, 640), (170, 95)])
    @pytest.mark.parametrize(("s", "t"), [(1, 1), (2, 1), (5, 2), (4, 3), (5, 7)])
    def test_centres(self, size, s, t):
        (grid,) = patch_grids(size, [s], [t])
        rows, columns = ((side // 16 - s) // t + 1 for side in size)
        expected = [(j, i) for i in range(rows) for j in range(columns)]
        assert grid.indices.tolist() == [list(place) for place in expected]
        assert grid.keypoints.tolist() == [
            [int(16 * j * t + 8 * (s - 1) + 7.5), int(16 * i * t + 8 * (s - 1) + 7.5)]
            for j, i in expected
        ]
        assert (len(grid), grid.patch_size, grid.stride) == (rows * columns, s, t)

    def test_one_patch(self):
        assert PatchGrid.of_map((3, 3), 3, 1).keypoints.tolist() == [[23, 23]]

    @pytest.mark.parametrize("size", [(63, 640), (480, 63)])
    def test_none_fits(self, size):
        with pytest.raises(ConfigError, match=r"\b4\b.*\b(3 x 40|30 x 3)\b.*patch_sizes"):
            patch_grids(size, [2, 4], [1, 1])


@pytest.mark.parametrize("device", DEVICES)
class TestNearest:
    def test_mutual_against_a_loop(self, device):
        query, candidate = unit(37, 6), unit(21, 6, seed=1)
        likeness = query.astype(np.float64) @ candidate.T.astype(np.float64)
        expected = [
            (i, j)
            for j in range(21)  # RANSAC depends on the order: that of the research code
            for i in range(37)
            if likeness[i, j] == likeness[i].max() == likeness[:, j].max()
        ]
        ours, theirs = mutual_nearest_neighbours(
            *(part.to(device) for part in tensors(query, candidate))
        )
        assert list(zip(ours.tolist(), theirs.tolist(), strict=True)) == expected
        assert ours.dtype == theirs.dtype == np.int64

    def test_directions(self, device):
        query, candidate = tensors(np.eye(3, dtype=np.float32), np.eye(3, dtype=np.float32)[[2, 0]])
        of_candidate, of_query = nearest_neighbours(query.to(device), candidate.to(device))
        assert of_candidate.tolist() == [2, 0]
        assert of_query[[0, 2]].tolist() == [1, 0]

    def test_equal_descriptors_match_once(self, device):
        same = torch.ones(4, 3, device=device) / 3**0.5
        ours, theirs = mutual_nearest_neighbours(same, same)
        assert len(ours) == len(theirs) == 1


class TestHomography:
    SQUARE = np.array([[0, 0], [160, 0], [160, 160], [0, 160]])

    @pytest.mark.parametrize("n", range(4))
    def test_too_few(self, n):
        homography, inliers = homography_inliers(self.SQUARE[:n], self.SQUARE[:n], 1)
        assert homography is None
        assert inliers.tolist() == [False] * n

    def test_exactly_four(self):
        moved = self.SQUARE + np.array([32, 16])
        homography, inliers = homography_inliers(moved, self.SQUARE, 1)
        np.testing.assert_allclose(homography, [[1, 0, 32], [0, 1, 16], [0, 0, 1]], atol=1e-6)
        assert inliers.tolist() == [True] * 4

    @pytest.mark.parametrize("n", [5, 40])
    @pytest.mark.parametrize("direction", [(16, 0), (0, 16), (16, 16), (0, 0)])
    def test_on_a_line_or_a_point(self, n, direction):
        points = np.outer(np.arange(n), direction) + 7
        homography, inliers = homography_inliers(points, points, 1)
        assert homography is None
        assert not inliers.any()
        assert len(inliers) == n

    def test_four_on_a_line(self):
        """OpenCV fits four matches without a look at how they lie; that must not fail."""
        points = np.outer(np.arange(4), (16, 16)) + 7
        homography, inliers = homography_inliers(points, points, 1)
        assert len(inliers) == 4
        assert inliers.all() if homography is not None else not inliers.any()

    @pytest.mark.parametrize(("stride", "kept"), [(1, 30), (3, 31)])
    def test_tolerance_grows_with_the_stride(self, stride, kept):
        points = PatchGrid.of_map((6, 6), 1, 1).keypoints[:31] * 4
        moved = points.copy()
        moved[17] += [48, 0]
        assert homography_inliers(moved, points, stride)[1].sum() == kept


class TestSpatialScore:
    def test_by_hand(self):
        query = np.array([[0, 0], [3, 1], [5, 5]])
        candidate = query + np.array([[1, 0], [1, 3], [4, 0]])  # mean displacement (2, 1)
        expected = -((9 - 1) ** 2 * 2 + (9 - 2) ** 2 + (7 - 1) ** 2 * 2 + (7 - 2) ** 2) / 80
        assert spatial_score(query, candidate, np.array([9, 7]), 80) == pytest.approx(expected)

    def test_nothing_matched(self):
        nobody = np.zeros((0, 2), dtype=np.int64)
        score = spatial_score(nobody, nobody, np.array([9, 7]), 80)
        assert (score, np.signbit(score)) == (0.0, False)


class TestDegenerateImages:
    GRID = PatchGrid.of_map((6, 7), 2, 1)

    @pytest.mark.parametrize("shape", [(6, 7), (30, 40)])
    def test_identical(self, shape):
        grid = PatchGrid.of_map(shape, 2, 1)
        (image,) = tensors(unit(len(grid), 32))
        ransac, rapid = (match_patches(image, image, grid, grid, m) for m in MATCHERS)
        assert ransac.score == -1
        np.testing.assert_allclose(ransac.homography, np.eye(3), atol=1e-4)
        assert rapid.score == pytest.approx(-float((grid.indices.max(axis=0) ** 2).sum()))
        for matches in (ransac, rapid):
            assert matches.query_patches.tolist() == list(range(len(grid)))
            assert matches.candidate_patches.tolist() == list(range(len(grid)))

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("matcher", MATCHERS)
    @pytest.mark.parametrize("value", [0.0, 0.25])
    @pytest.mark.parametrize("both", [True, False])
    def test_blank(self, matcher, value, both, device):
        blank = torch.full((30, 16), value, device=device)
        other = blank if both else torch.from_numpy(unit(30, 16)).to(device)
        for pair in ((blank, other), (other, blank)):
            matches = match_patches(*pair, self.GRID, self.GRID, matcher)
            assert np.isfinite(matches.score)
            assert matches.score <= 0
            assert matcher != "RANSAC" or (matches.score == 0 and matches.homography is None)
            assert matcher == "RANSAC" or len(matches.query_patches) == 1

    @pytest.mark.parametrize("matcher", MATCHERS)
    def test_one_patch(self, matcher):
        grid, (image,) = PatchGrid.of_map((3, 3), 3, 1), tensors(unit(1, 8))
        score = match_patches(image, image, grid, grid, matcher).score
        assert (score, np.signbit(score)) == (0.0, matcher != "RANSAC")

    def test_four_patches(self):
        grid, (image,) = PatchGrid.of_map((3, 3), 2, 1), tensors(unit(4, 8))
        assert match_patches(image, image, grid, grid, "RANSAC").score == -1

    def test_one_row_of_patches_fixes_no_homography(self):
        grid, (image,) = PatchGrid.of_map((2, 30), 2, 1), tensors(unit(29, 8))
        matches = match_patches(image, image, grid, grid, "RANSAC")
        assert (matches.score, matches.homography, len(matches.query_patches)) == (0, None, 0)
        assert match_patches(image, image, grid, grid, "spatialApproximator").score == -(28**2)

    @pytest.mark.parametrize("matcher", MATCHERS)
    def test_images_of_two_sizes(self, matcher):
        """The candidate shows all of the query, in its lower right corner."""
        small, large = PatchGrid.of_map((6, 7), 2, 1), PatchGrid.of_map((12, 20), 2, 1)
        described = unit(len(large), 32)
        corner = [large.indices.tolist().index([x + 13, y + 6]) for x, y in small.indices.tolist()]
        query, candidate = tensors(described[corner], described)
        matches = match_patches(query, candidate, small, large, matcher)
        assert matches.candidate_patches.tolist() == corner
        assert matches.score == pytest.approx({"RANSAC": -1, "spatialApproximator": -41}[matcher])
        if matcher == "RANSAC":
            shift = [[1, 0, -13 * 16], [0, 1, -6 * 16], [0, 0, 1]]
            np.testing.assert_allclose(matches.homography, shift, atol=1e-3)
        backward = match_patches(candidate, query, large, small, matcher)
        assert backward.query_patches.tolist() == corner
        assert backward.score == pytest.approx(
            {"RANSAC": -30 / 209, "spatialApproximator": -30 * (18**2 + 10**2) / 209}[matcher]
        )

    def test_unknown_matcher(self):
        (image,) = tensors(unit(30, 4))
        with pytest.raises(ConfigError, match=r"'LSD'.*RANSAC, spatialApproximator"):
            match_patches(image, image, self.GRID, self.GRID, "LSD")

    def test_similarity(self):
        grids = patch_grids((96, 112), (2, 3), (1, 1))
        first, second = ([torch.from_numpy(unit(len(g), 8, seed=k)) for g in grids] for k in (0, 1))
        same = match_pair(first, first, grids, grids, "RANSAC")
        assert similarity(same, (0.25, 0.5)) == 0.75
        blank = [torch.zeros_like(values) for values in second]
        nothing = similarity(match_pair(first, blank, grids, grids, "RANSAC"), (0.25, 0.5))
        assert (nothing, np.signbit(nothing)) == (0.0, False)


class TestFusion:
    def test_by_hand(self):
        scores = np.array([[-1.0, 5.0], [-3.0, 5.0], [-2.0, 5.0]])
        expected = 0.4 * np.array([1, -1, 0]) / np.sqrt(2 / 3)
        np.testing.assert_allclose(fuse_scores(scores, (0.4, 0.6)), expected, atol=1e-12)

    @pytest.mark.parametrize("count", [0, 1, 2, 100])
    @pytest.mark.parametrize("value", [0.0, -0.1, 1 / 3])
    def test_equal_scores_keep_the_order_of_retrieval(self, count, value):
        fused = fuse_scores(np.full((count, 3), value), (0.45, 0.15, 0.4))
        np.testing.assert_array_equal(fused, np.zeros(count))
        candidates = np.random.default_rng(0).permutation(count)
        np.testing.assert_array_equal(rank(candidates, fused), candidates)

    def test_ties_keep_the_order_of_retrieval(self):
        candidates = np.arange(40)[::-1]
        scores = np.random.default_rng(0).integers(-2, 1, 40).astype(float)
        expected = sorted(range(40), key=lambda c: scores[c])
        np.testing.assert_array_equal(rank(candidates, scores), candidates[expected])

    @pytest.mark.parametrize("shape", [(5,), (5, 2), (5, 4)])
    def test_shapes(self, shape):
        with pytest.raises(ValueError, match=r"scores.*\[candidates, 3\]"):
            fuse_scores(np.zeros(shape), (1, 1, 1))


class TestRetrieve:
    def test_against_all_distances(self):
        queries, index = unit(9, 5), unit(70, 5, seed=1)
        distance = np.linalg.norm(queries[:, None] - index, axis=2)
        found = retrieve(queries, index, 12)
        np.testing.assert_array_equal(found, np.argsort(distance, axis=1)[:, :12])
        assert found.dtype == np.int64

    def test_fewer_index_images_than_candidates(self):
        found = retrieve(unit(4, 5), unit(3, 5, seed=1), 100)
        assert found.shape == (4, 3)
        assert [sorted(row) for row in found.tolist()] == [[0, 1, 2]] * 4

    def test_duplicates(self):
        index = np.repeat(unit(3, 5), 4, axis=0)
        found = retrieve(index[[5]], index, 4)
        assert sorted(found[0].tolist()) == [4, 5, 6, 7]

    def test_memory_layout_does_not_matter(self):
        queries, index = unit(4, 6), unit(9, 6, seed=1)
        np.testing.assert_array_equal(
            retrieve(np.asfortranarray(queries), np.repeat(index, 2, axis=0)[::2], 3),
            retrieve(queries, index, 3),
        )

    def test_dimensions(self):
        with pytest.raises(FeatureError, match=r"queries.*\b4\b.*\b5\b"):
            retrieve(unit(2, 4), unit(2, 5), 1)


class TestBestCutout:
    @pytest.mark.parametrize("num_index", [1, 12, 29, 120, 400])
    @pytest.mark.parametrize("top_k", [1, 3, 10, 100])
    def test_against_a_loop(self, num_index, top_k):
        rng = np.random.default_rng(num_index)
        depth = min(num_index, 12 * top_k)
        predictions = np.stack([rng.permutation(num_index)[:depth] for _ in range(5)])
        expected = []
        for row in predictions.tolist():
            best = {}
            for i in row:
                best.setdefault(i // 12, i)
            expected.append(list(best.values())[:top_k])
        kept = keep_best_cutout(predictions, top_k)
        assert kept.tolist() == expected
        assert kept.shape == (5, min(top_k, -(-num_index // 12)))
        assert kept.dtype == np.int64


class TestLoadPredictions:
    @pytest.fixture
    def path(self, tmp_path):
        return tmp_path / "predictions.npy"

    @pytest.mark.parametrize("dtype", [np.int64, np.uint8, ">i4"])
    def test_good(self, path, dtype):
        np.save(path, np.array([[4, 0], [1, 2]], dtype=dtype))
        predictions = load_predictions(str(path), 2, 5)
        assert predictions.tolist() == [[4, 0], [1, 2]]
        assert predictions.dtype == np.int64

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            ([[0, 1]], r"\b1 rows.*\b2 queries"),
            ([[0, 1], [2, 5]], r"row 1, column 1\b.* 5\b.*\b4\b"),
            ([[0, -1], [2, 3]], r"row 0, column 1\b.* -1\b"),
            (np.full((2, 1), 2**64 - 1, dtype=np.uint64), "18446744073709551615"),
            ([0, 1], r"\[queries, candidates\]"),
            (np.zeros((2, 0), dtype=int), r"\[queries, candidates\]"),
            ([[0.0], [1.0]], "whole numbers"),
            ([["0"], ["1"]], "whole numbers"),
            (np.array([[None], [1]]), "pickle"),
        ],
    )
    def test_bad(self, path, array, words):
        np.save(path, np.asarray(array), allow_pickle=True)
        with pytest.raises(FeatureError, match=rf"pred_input_path = {path}\b.*{words}"):
            load_predictions(path, 2, 5)

    @pytest.mark.parametrize(
        "content",
        [None, b"", b"text\n", b"PK\x03\x04 damaged", b"\x93NUMPY\x01\x00\x09\x00{'descr'("],
        ids=["absent", "empty", "text", "zip", "header"],
    )
    def test_unreadable(self, path, content):
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(FeatureError, match=f"pred_input_path = {path} "):
            load_predictions(path, 2, 5)

    def test_archive(self, path):
        with path.open("wb") as file:
            np.savez(file, np.zeros((2, 2), dtype=int))
        with pytest.raises(
            FeatureError, match=rf"pred_input_path = {path} .*\[queries, candidates\]"
        ):
            load_predictions(path, 2, 5)


def reference_score(query, candidate, size, stride, map_shape, matcher):
    """One pair at one patch size, from the paper's description alone."""
    likeness = query.astype(np.float64) @ candidate.T.astype(np.float64)
    pairs = [(i, j) for j, i in enumerate(likeness.argmax(axis=0)) if likeness[i].argmax() == j]
    rows, columns = ((side - size) // stride + 1 for side in map_shape)
    if not pairs:
        return 0.0
    ours, theirs = (
        np.array([divmod(p, columns)[::-1] for p in side]) for side in np.transpose(pairs)
    )
    if matcher == "RANSAC":
        if len(pairs) < 4:
            return 0.0
        first, second = (
            np.trunc(16 * stride * places + 8 * (size - 1) + 7.5).astype(np.float32)
            for places in (ours, theirs)
        )
        _, mask = cv2.findHomography(second, first, cv2.RANSAC, 24 * stride)
        return -float(mask.sum() if mask is not None else 0) / len(query)
    moved = theirs - ours
    rest = np.abs(moved - moved.mean(axis=0))
    return -sum(((columns - 1 - x) ** 2 + (rows - 1 - y) ** 2) for x, y in rest) / len(query)


SIZES = {
    "one": {"patch_sizes": (5,), "strides": (1,), "patch_weights": (1.0,)},
    "three": {"patch_sizes": (2, 5, 4), "strides": (1, 1, 2), "patch_weights": (0.45, 0.15, 0.4)},
}


@pytest.mark.parametrize("matcher", MATCHERS)
@pytest.mark.parametrize("sizes", SIZES)
class TestRerank:
    IMAGE_SIZE, MAP = (165, 200), (10, 12)

    @pytest.fixture
    def case(self, matcher, sizes):
        """Index images, and queries that are noisy, shifted views of some of them."""
        config = Config(matcher=matcher, match_image_size=self.IMAGE_SIZE, **SIZES[sizes])
        rng = np.random.default_rng(0)
        world = rng.standard_normal((8, 14, 16, 24)).astype(np.float32)
        grids = patch_grids(self.IMAGE_SIZE, config.patch_sizes, config.strides)

        def views(which, shift, noise):
            described = []
            for k in which:
                cells = world[k, shift : shift + 10, shift : shift + 12]
                cells = cells + noise * rng.standard_normal(cells.shape)
                image = []
                for grid in grids:
                    s, t = grid.patch_size, grid.stride
                    patches = np.array(
                        [
                            cells[t * y : t * y + s, t * x : t * x + s].mean(axis=(0, 1))
                            for x, y in grid.indices
                        ]
                    )
                    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
                    image.append(patches.astype(np.float32))
                described.append(image)
            return described

        queries, index = views([3, 6, 0], 2, 0.6), views([*range(8), 3], 0, 0.6)
        index[4] = [np.full_like(values, 24**-0.5) for values in index[4]]  # a blank image
        predictions = np.stack([rng.permutation(9) for _ in queries])
        return config, queries, index, grids, predictions

    @pytest.mark.parametrize("device", DEVICES)
    def test_against_the_reference(self, case, device):
        config, queries, index, grids, predictions = case
        outcome = rerank_candidates(
            predictions,
            queries.__getitem__,
            index.__getitem__,
            lambda i: grids,
            lambda i: grids,
            replace(config, precision="exact"),
            device=device,
            progress=False,
        )
        scores = np.array(
            [
                [
                    [
                        reference_score(q, c, s, t, self.MAP, config.matcher)
                        for q, c, s, t in zip(
                            query, index[i], config.patch_sizes, config.strides, strict=True
                        )
                    ]
                    for i in row
                ]
                for query, row in zip(queries, predictions, strict=True)
            ]
        )
        np.testing.assert_allclose(outcome.scores, scores, atol=1e-9)
        spread = scores.std(axis=1, keepdims=True)
        standard = (scores - scores.mean(axis=1, keepdims=True)) / np.where(spread > 0, spread, 1)
        fused = standard @ np.array(config.patch_weights)
        expected = np.take_along_axis(predictions, np.argsort(fused, axis=1, kind="stable"), axis=1)
        np.testing.assert_array_equal(outcome.predictions, expected)
        np.testing.assert_allclose(outcome.fused, fused, atol=1e-6)
        assert set(outcome.predictions[0, :2]) == {3, 8}
        assert outcome.predictions[1:, 0].tolist() == [6, 0]

    def test_one_candidate(self, case):
        config, queries, index, grids, predictions = case
        outcome = rerank_candidates(
            predictions[:, :1],
            queries.__getitem__,
            index.__getitem__,
            lambda i: grids,
            lambda i: grids,
            config,
            progress=False,
        )
        np.testing.assert_array_equal(outcome.predictions, predictions[:, :1])
        assert np.isfinite(outcome.scores).all()

    def test_features_on_disk(self, case, tmp_path):
        """In the research code's layout: transposed, no manifest; then missing and damaged."""
        config, queries, index, grids, predictions = case
        # Of the blank image, in which all patches are alike, rounding decides what matches, and
        # the order of numbers in memory decides rounding.
        predictions = predictions[predictions != 4].reshape(len(queries), -1)
        names = {"query": [f"q/{i}.jpg" for i in range(3)], "index": [f"{i}.jpg" for i in range(9)]}
        readers = {}
        for kind, images in (("query", queries), ("index", index)):
            folder = tmp_path / kind
            folder.mkdir()
            np.save(folder / "globalfeats.npy", unit(len(images), 8))
            for i, image in enumerate(images):
                for size, values in zip(config.patch_sizes, image, strict=True):
                    np.save(folder / f"patchfeats_psize{size}_{i}.npy", values.T)
            readers[kind] = NpyReader(folder, names[kind], config)

        def run():
            return rerank_candidates(
                predictions,
                readers["query"].patches,
                readers["index"].patches,
                lambda i: grids,
                lambda i: grids,
                config,
                progress=False,
            )

        in_memory = rerank_candidates(
            predictions,
            queries.__getitem__,
            index.__getitem__,
            lambda i: grids,
            lambda i: grids,
            config,
            progress=False,
        )
        np.testing.assert_array_equal(run().predictions, in_memory.predictions)
        last = tmp_path / "index" / f"patchfeats_psize{config.patch_sizes[-1]}_5.npy"
        whole = np.load(last)
        for values, words in (
            (whole[:, :-1], rf"image 5 .*\b{whole.shape[1] - 1} patches"),
            (whole[:-1], r"query 0 .*\b24\b.*image 5 .*\b23\b"),
            (whole[0], f"{last} .*matrix"),
        ):
            np.save(last, values)
            with pytest.raises(FeatureError, match=words):
                run()
        last.write_bytes(last.read_bytes()[:-8])
        with pytest.raises(FeatureError, match=f"{last} .*damaged"):
            run()
        last.unlink()
        with pytest.raises(FeatureError, match=f"{last} .*feature_extract"):
            run()


def test_weights_must_fit():
    config = Config(patch_weights=(1.0,))
    with pytest.raises(ConfigError, match=r"patchweights2use = 1\.0 .*\b1\b.*\b3 patch_sizes"):
        rerank_candidates(np.zeros((1, 1), dtype=np.int64), None, None, None, None, config)
