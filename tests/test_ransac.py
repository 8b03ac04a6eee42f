# SPDX-License-Identifier: MIT
"""Homographies by RANSAC: three methods, on what matching makes them face."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from patchnetvlad.config_ini import RANSACS
from patchnetvlad.errors import ConfigError
from patchnetvlad.matching import batched_ransac
from patchnetvlad.matching.batched_ransac import batched_homographies
from patchnetvlad.matching.ransac import homography_inliers
from patchnetvlad.models.grid import patch_grids

(GRID,) = patch_grids((480, 640), [2], [1])
VIEW = np.array([[0.9, 0.08, 40.0], [-0.05, 1.05, -10.0], [2e-4, -1e-4, 1.0]])
SQUARE = np.array([[0, 0], [160, 0], [160, 160], [0, 160]])


def project(homography, points):
    x = np.c_[points, np.ones(len(points))] @ homography.T
    return x[:, :2] / x[:, 2:]


def errors(homography, query, candidate):
    return np.hypot(*(project(homography, candidate) - query).T)


def wrong(n, seed):
    """Random matches: each patch once, by ascending candidate patch."""
    rng = np.random.default_rng(seed)
    query, candidate = (rng.permutation(len(GRID))[:n] for _ in range(2))
    return GRID.keypoints[query], GRID.keypoints[np.sort(candidate)], 1


def planted(n, share, seed, homography=VIEW):
    """Make a share of the random matches follow a homography, to the nearest patch."""
    query, candidate, stride = wrong(n, seed)
    seen = project(homography, candidate)
    snapped = np.round((seen - GRID.keypoints[0]) / 16).astype(int) * 16 + GRID.keypoints[0]
    follow = np.random.default_rng(seed + 1).random(n) < share
    return np.where(follow[:, None], snapped, query), candidate, stride


MIXED = [
    *(wrong(n, seed) for seed, n in enumerate([5, 9, 30, 80, 150, 257, 340])),
    *(planted(n, share, 50) for n in (12, 64, 200) for share in (0.3, 0.6, 0.9)),
    (SQUARE[:2], SQUARE[:2], 1),
    (SQUARE + 32, SQUARE, 1),
]


def assert_same(ours, theirs):
    for (a, inside_a), (b, inside_b) in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(inside_a, inside_b)
        assert inside_a.dtype == inside_b.dtype == bool
        assert (a is None) == (b is None)
        if a is not None:
            assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("method", RANSACS)
class TestEveryMethod:
    @pytest.mark.parametrize("share", [0.3, 0.6, 1.0])
    @pytest.mark.parametrize("stride", [1, 3])
    def test_planted(self, method, share, stride):
        query, candidate, _ = planted(200, share, 7)
        query, candidate = query * stride, candidate * stride
        scale = np.diag([stride, stride, 1])
        true = scale @ VIEW @ np.linalg.inv(scale)
        follow = errors(true, query, candidate) <= 12 * stride  # snapping moves by 8 2^0.5 px
        assert follow.sum() >= share * 200 * 0.8
        homography, inliers = homography_inliers(query, candidate, stride, method)
        assert inliers[follow].mean() >= 0.95
        assert inliers[~follow].sum() <= 0.1 * (~follow).sum()
        assert errors(homography, project(true, candidate), candidate)[follow].max() < 16 * stride
        assert homography[2, 2] == pytest.approx(1)

    @pytest.mark.parametrize("n", range(4))
    def test_too_few(self, method, n):
        homography, inliers = homography_inliers(SQUARE[:n], SQUARE[:n], 1, method)
        assert homography is None
        assert inliers.tolist() == [False] * n

    @pytest.mark.parametrize("copies", [1, 2, 5])
    def test_exact(self, method, copies):
        """Four matches, also each several times."""
        points, shift = np.tile(SQUARE, (copies, 1)), np.array([32, 16])
        homography, inliers = homography_inliers(points + shift, points, 1, method)
        np.testing.assert_allclose(homography, [[1, 0, 32], [0, 1, 16], [0, 0, 1]], atol=1e-6)
        assert inliers.all()

    @pytest.mark.parametrize("n", [4, 5, 40])
    @pytest.mark.parametrize("direction", [(16, 0), (0, 16), (16, 16), (32, 16), (0, 0)])
    def test_on_a_line_or_a_point(self, method, n, direction):
        points = np.outer(np.arange(n), direction) + 7
        other = GRID.keypoints[:: len(GRID) // n][:n]
        for query, candidate in ((points, points), (points, other), (other, points)):
            homography, inliers = homography_inliers(query, candidate, 1, method)
            assert len(inliers) == n
            if method != "opencv" or n > 4:  # it fits four without a look at how they lie
                assert homography is None
                assert not inliers.any()

    def test_small_grids(self, method):
        """Nearly everything degenerates; there is a homography exactly if there are inliers."""
        rng = np.random.default_rng(0)
        for _ in range(50 if method == "batched" else 500):
            n, side = rng.integers(5, 12), rng.integers(1, 6)
            query, candidate = rng.integers(0, side, (2, n, 2)) * 16 + 7
            homography, inliers = homography_inliers(query, candidate, 1, method)
            assert inliers.shape == (n,)
            assert (homography is None) == (not inliers.any())
            if homography is not None:
                assert inliers.sum() >= (1 if method == "opencv" else 4)
                assert np.isfinite(homography).all()

    def test_three_inliers_are_none(self, method):
        """USAC_FAST finds a homography with three inliers here."""
        query = [[4, 0], [4, 0], [2, 0], [0, 2], [3, 2], [3, 2], [2, 4], [0, 2]]
        candidate = [[0, 3], [3, 4], [1, 4], [3, 2], [3, 3], [1, 4], [1, 1], [0, 2]]
        query, candidate = (np.array(cells) * 16 + 7 for cells in (query, candidate))
        homography, inliers = homography_inliers(query, candidate, 1, method)
        assert inliers.sum() == 0 if homography is None else inliers.sum() >= 4

    def test_repeatable(self, method):
        def run(problem):
            return homography_inliers(*problem, method)

        once = [run(problem) for problem in MIXED]
        assert_same(once, [run(problem) for problem in reversed(MIXED)][::-1])
        with ThreadPoolExecutor(4) as pool:
            assert_same(once, pool.map(run, MIXED))


def test_unknown_method():
    with pytest.raises(ConfigError, match=r"'magsac'.*opencv, fast, batched"):
        homography_inliers(SQUARE, SQUARE, 1, "magsac")


def test_opencv_is_the_default():
    for query, candidate, stride in (wrong(60, 3), planted(90, 0.5, 4)):
        points = candidate.astype(np.float32), query.astype(np.float32)
        expected, mask = cv2.findHomography(*points, cv2.RANSAC, 24.0 * stride)
        homography, inliers = homography_inliers(query, candidate, stride)
        assert homography.tobytes() == expected.tobytes()
        np.testing.assert_array_equal(inliers, mask.ravel().astype(bool))


@pytest.mark.parametrize("method", ["fast", "batched"])
class TestAgainstOpenCV:
    """Inlier counts decide the score. OpenCV's own vary by as much from seed to seed."""

    def counts(self, problems, method):
        ours, theirs = (
            np.array([homography_inliers(*p, m)[1].sum() for p in problems])
            for m in (method, "opencv")
        )
        return ours, theirs

    def test_right(self, method):
        ours, theirs = self.counts(
            [planted(n, share, n) for n in (40, 120, 300) for share in (0.3, 0.6, 0.9)], method
        )
        assert (np.abs(ours - theirs) <= 2 + 0.1 * theirs).all(), (ours, theirs)

    def test_wrong(self, method):
        ours, theirs = self.counts([wrong(n, n) for n in range(60, 300, 24)], method)
        assert abs(ours.mean() - theirs.mean()) <= (2 if method == "fast" else 1), (ours, theirs)
        assert (np.abs(ours - theirs) <= 5).all(), (ours, theirs)


@pytest.fixture(scope="module")
def together():
    return batched_homographies(MIXED)


class TestBatched:
    def test_alone_and_in_any_order(self, together):
        assert_same(together, [batched_homographies([problem])[0] for problem in MIXED])
        order = np.random.default_rng(0).permutation(len(MIXED))
        shuffled = batched_homographies([MIXED[i] for i in order])
        assert_same([together[i] for i in order], shuffled)

    @pytest.fixture
    def set_threads(self):
        before = torch.get_num_threads()
        yield torch.set_num_threads
        torch.set_num_threads(before)

    @pytest.mark.parametrize("elements", [2**10, 2**18])
    def test_memory_changes_nothing(self, together, monkeypatch, set_threads, elements):
        set_threads(1)  # more only wait for each other where others use the processor, too
        monkeypatch.setattr(batched_ransac, "_elements", lambda device: elements)
        assert_same(together, batched_homographies(MIXED))

    @pytest.mark.parametrize("threads", [1, 3])
    def test_threads_of_pytorch_change_nothing(self, together, set_threads, threads):
        set_threads(threads)
        assert_same(together, batched_homographies(MIXED))

    def test_seed(self, together):
        other = batched_homographies(MIXED, seed=1)
        assert any((a[1] != b[1]).any() for a, b in zip(together, other, strict=True))
        assert_same(other, batched_homographies(MIXED, seed=1))

    def test_inliers_are_those_of_the_homography(self, together):
        fitted = 0
        for (query, candidate, _), (homography, inliers) in zip(MIXED, together, strict=True):
            if homography is not None:
                fitted += 1
                error = errors(homography, query, candidate)
                clear = np.abs(error - 24) > 1e-6
                np.testing.assert_array_equal((error <= 24)[clear], inliers[clear])
        assert fitted >= 15

    def test_none(self):
        assert batched_homographies([]) == []

    def test_no_mirror_and_no_twist(self):
        mirror = np.array([[-1.0, 0, 640], [0, 1, 0], [0, 0, 1]])
        mirrored = planted(100, 1.0, 0, mirror)
        twisted = SQUARE[[1, 0, 2, 3]], SQUARE, 1
        turned = planted(100, 1.0, 0, np.array([[-1.0, 0, 640], [0, -1, 480], [0, 0, 1]]))
        solutions = batched_homographies([mirrored, twisted, turned])
        assert [int(inliers.sum()) for _, inliers in solutions][1:] == [0, 100]
        assert solutions[1][0] is None
        assert solutions[0][1].sum() < 50
        assert homography_inliers(*mirrored)[1].all()

    def test_samples(self):
        """Four different matches each, all equally often."""
        draws = torch.from_numpy(batched_ransac._draws(0))
        for m in (4, 7, 600):
            samples = batched_ransac._samples(draws, torch.tensor([m]))[:, 0].numpy()
            assert samples.min() >= 0
            assert samples.max() < m
            assert (np.diff(np.sort(samples, axis=0), axis=0) > 0).all()
            often = np.bincount(samples.ravel(), minlength=m) / samples.size
            spread = (1 / (m * samples.size)) ** 0.5
            assert np.abs(often - 1 / m).max() < 5 * spread

    def test_fit(self):
        """The same as equation by equation, each divided by the depth of before."""
        random = np.random.default_rng(0)
        before = np.array([0.9, 0.1, 0.3, 0.0, 1.1, -0.2, 0.15, -0.1, 1.0])
        candidate = random.uniform(-2, 2, (30, 2))
        query = project(before.reshape(3, 3), candidate) + random.uniform(-0.5, 0.5, (30, 2))
        inside = np.arange(30) % 3 > 0
        query[~inside] += 5
        rows = []
        for (u, v), (x, y) in zip(query[inside], candidate[inside], strict=True):
            depth = before[6:] @ [x, y, 1]
            rows.append(np.array([x, y, 1, 0, 0, 0, -u * x, -u * y, u]) / depth)
            rows.append(np.array([0, 0, 0, x, y, 1, -v * x, -v * y, v]) / depth)
        system = np.array(rows)
        expected = np.linalg.lstsq(system[:, :8], system[:, 8], rcond=None)[0]
        sums = batched_ransac._inlier_sums(
            torch.from_numpy(before)[:, None, None],
            *(torch.from_numpy(points.T.copy())[None] for points in (candidate, query)),
        )
        fitted = batched_ransac._fit(sums)
        np.testing.assert_allclose(fitted.ravel(), [*expected, 1], rtol=1e-7, atol=1e-9)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
    def test_cuda(self, together):
        for ours, theirs in zip(batched_homographies(MIXED, device="cuda"), together, strict=True):
            np.testing.assert_array_equal(ours[1], theirs[1])
            if theirs[0] is not None:
                np.testing.assert_allclose(ours[0], theirs[0], rtol=1e-9, atol=1e-12)
