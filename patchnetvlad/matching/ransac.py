# SPDX-License-Identifier: MIT
"""Spatial verification by a homography (paper, section 3.4): one pair, or many at once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.config import RANSACS
from patchnetvlad.errors import ConfigError
from patchnetvlad.models.backbone import STRIDE

TOLERANCE = 1.5
"""Reprojection error of an inlier, in patch strides."""

MIN_MATCHES = 4
"""Matches that a homography needs."""

HYPOTHESES = 1024
"""Homographies that ``batched`` tries on each problem."""

DRAWS = 8
"""Samples drawn for each of these; most are degenerate or no view of a plane."""

REFINED = 16
"""Best homographies of each problem that are refined."""

ROUNDS = 3
"""Times that each of these is refined."""

Problem = tuple[NDArray[np.int64], NDArray[np.int64], int]
Solution = tuple[NDArray[np.float64] | None, NDArray[np.bool_]]


def homography_inliers(
    query_keypoints: NDArray[np.int64],
    candidate_keypoints: NDArray[np.int64],
    stride: int,
    method: str = "opencv",
) -> Solution:
    """Fit a homography from candidate to query keypoints by RANSAC.

    Parameters
    ----------
    query_keypoints, candidate_keypoints : ndarray [m, 2] of int
        Matched patch centres (x, y), px.
    stride : int
        Patch stride t in cells; the inlier threshold is 16 t * 1.5 px.
    method : {"opencv", "fast", "batched"}, default "opencv"
        OpenCV's RANSAC, as the research code; its USAC_FAST, many times faster where little
        matches; or :func:`batched_homographies` of this one problem.

    Returns
    -------
    homography : ndarray [3, 3] of float64, or None
        None when there are fewer than four matches, or when no homography is found. Four matches
        on a line fix no proper homography; ``opencv`` may give a degenerate one for them.
    inliers : ndarray [m] of bool
        Four or more, or none; ``opencv`` may give fewer than four where keypoints repeat.

    Raises
    ------
    ConfigError
        The method is unknown.

    Examples
    --------
    Five matches move by 32 px to the right; the sixth does not:

    >>> ours = np.array([[7, 7], [71, 7], [7, 71], [71, 71], [39, 23], [200, 7]])
    >>> theirs = ours - [32, 0]
    >>> theirs[5] = [7, 200]
    >>> homography, inliers = homography_inliers(ours, theirs, stride=1)
    >>> inliers.tolist()
    [True, True, True, True, True, False]
    >>> (homography @ [0, 0, 1]).round().tolist()
    [32.0, 0.0, 1.0]
    """
    if method not in RANSACS:
        raise ConfigError(f"unknown ransac {method!r}; one of {', '.join(RANSACS)}")
    nobody = np.zeros(len(query_keypoints), dtype=bool)
    if len(query_keypoints) < MIN_MATCHES:
        return None, nobody
    if method == "batched":
        return batched_homographies([(query_keypoints, candidate_keypoints, stride)])[0]
    homography, mask = cv2.findHomography(
        candidate_keypoints.astype(np.float32),
        query_keypoints.astype(np.float32),
        cv2.RANSAC if method == "opencv" else cv2.USAC_FAST,
        STRIDE * stride * TOLERANCE,
    )
    if homography is None or mask is None or not np.isfinite(homography).all():
        return None, nobody
    inliers = mask.ravel().astype(bool)
    if method == "fast" and inliers.sum() < MIN_MATCHES:  # happens where keypoints repeat
        return None, nobody
    return homography, inliers


def batched_homographies(
    problems: Sequence[Problem], *, device: torch.device | str = "cpu", seed: int = 0
) -> list[Solution]:
    """Fit the homographies of many pairs at once by RANSAC.

    Every problem has up to :data:`HYPOTHESES` homographies through four random matches each;
    those with most inliers are fitted again to their inliers. The error is OpenCV's: the distance
    in the query image. Unlike OpenCV's, no homography starts from matches that mirror: a plane
    never looks so, but the far end of a symmetric corridor may.

    What a problem gives does not depend on the other problems or on their order: samples come
    from one table, sums are of integers or in a fixed order, and all else goes element by
    element. For the same reason devices agree, as far as their arithmetic is IEEE 754's.

    Parameters
    ----------
    problems : sequence of (ndarray [m, 2] of int, ndarray [m, 2] of int, int)
        Query keypoints, candidate keypoints (px) and patch stride (cells), as
        :func:`homography_inliers` takes them; m may vary.
    device : torch.device or str, default "cpu"
        Where to compute; the CPU in place of a device without float64 (MPS).
    seed : int, default 0
        Of the random samples.

    Returns
    -------
    list of (ndarray [3, 3] of float64 or None, ndarray [m] of bool)
        Homography from candidate to query px, and its inliers, as of :func:`homography_inliers`.
    """
    device = torch.device(device)
    if device.type == "mps":
        device = torch.device("cpu")
    solutions: list[Solution] = [(None, np.zeros(len(p[0]), dtype=bool)) for p in problems]
    # Of like size together, so that little is padding.
    order = sorted(
        (i for i, (query, _, _) in enumerate(problems) if len(query) >= MIN_MATCHES),
        key=lambda i: len(problems[i][0]),
    )
    groups: list[list[int]] = []
    for i in order:
        each = max(HYPOTHESES * DRAWS, 6 * REFINED * len(problems[i][0]))
        if not groups or (len(groups[-1]) + 1) * each > _elements(device):
            groups.append([])
        groups[-1].append(i)
    # Fetched when all are launched: until then a GPU need not be waited for.
    solved = [_solve([problems[i] for i in group], device, seed) for group in groups]
    for group, (homographies, inliers) in zip(groups, solved, strict=True):
        for i, values, inside in zip(
            group, homographies.cpu().numpy(), inliers.cpu().numpy(), strict=True
        ):
            homography = _in_pixels(values.reshape(3, 3), problems[i])
            inside = inside[: len(problems[i][0])]
            if inside.sum() >= MIN_MATCHES and np.isfinite(homography).all():
                solutions[i] = homography, inside
    return solutions


def _middle(points: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the middle [2] of the box around points: half a whole number, hence exact."""
    return (points.min(axis=0) + points.max(axis=0)) / 2


def _in_pixels(homography: NDArray[np.float64], problem: Problem) -> NDArray[np.float64]:
    """Take a homography from the coordinates of :func:`_solve` to px; [2, 2] becomes 1."""
    query, candidate, stride = problem
    unit = STRIDE * stride * TOLERANCE
    back, there = np.eye(3), np.eye(3)
    back[:2] = np.c_[np.eye(2) * unit, _middle(query)]
    there[:2] = np.c_[np.eye(2), -_middle(candidate)] / unit
    with np.errstate(all="ignore"):
        homography = back @ homography @ there
        return homography / homography[2, 2]


def _solve(problems: Sequence[Problem], device: torch.device, seed: int) -> tuple[Tensor, Tensor]:
    """Solve problems of four or more matches together.

    Parameters
    ----------
    problems : sequence of Problem, length B
    device : torch.device
    seed : int

    Returns
    -------
    homographies : Tensor [B, 9] of float64
        Row-major, of coordinates from :func:`_middle` in units of the inlier threshold.
    inliers : Tensor [B, L] of bool
        L is the largest number of matches.
    """
    lengths = [len(query) for query, _, _ in problems]
    packed = np.full((2, len(problems), 2, max(lengths)), np.nan)  # query and candidate
    for i, (query, candidate, _) in enumerate(problems):
        for side, points in enumerate((query, candidate)):
            packed[side, i, :, : lengths[i]] = (points - _middle(points)).T
    query, candidate = torch.from_numpy(packed).to(device)  # [B, 2, L] each
    units = [STRIDE * stride * TOLERANCE for _, _, stride in problems]
    unit = torch.tensor(units, dtype=torch.float64, device=device)[:, None]

    samples = _samples(
        torch.from_numpy(_draws(seed)).to(device), torch.tensor(lengths, device=device)
    )
    single = query.float(), candidate.float()
    step = max(1, _elements(device) // (8 * len(problems)))
    proper = [
        _proper(*(_take(side, part) for side in single)) for part in samples.split(step, dim=-1)
    ]
    samples = _keep(samples, torch.cat(proper, dim=-1))
    tried = _through(_take(candidate, samples) / unit, _take(query, samples) / unit)  # [9, B, K]

    query, candidate = query / unit[..., None], candidate / unit[..., None]
    single = candidate.float(), query.float()
    step = max(1, _elements(device) // query[:, 0].numel())
    counts = torch.cat(
        [_inside(h, *single).sum(dim=-1) for h in tried.float().split(step, dim=-1)], dim=-1
    )
    best = _largest(counts, REFINED)
    homographies = tried.gather(2, best.expand(9, -1, -1))  # [9, B, R]
    inside = _inside(homographies, candidate, query)
    for _ in range(ROUNDS):
        refined = _fit(homographies, inside, candidate, query)
        theirs = _inside(refined, candidate, query)
        better = theirs.sum(dim=-1) >= inside.sum(dim=-1)  # [B, R]
        homographies = torch.where(better, refined, homographies)
        inside = torch.where(better[..., None], theirs, inside)
    best = _largest(inside.sum(dim=-1), 1)  # [B, 1]
    return (
        homographies.gather(2, best.expand(9, -1, -1))[..., 0].T,
        inside.gather(1, best[..., None].expand(-1, -1, inside.shape[-1]))[:, 0],
    )


def _largest(counts: Tensor, k: int) -> Tensor:
    """Return the places [B, k] of the largest counts [B, n], the first of equal ones first."""
    n = counts.shape[1]
    return (counts * n - torch.arange(n, device=counts.device)).topk(min(k, n), dim=1).indices


def _proper(candidate: Tensor, query: Tensor) -> Tensor:
    """Tell which samples have no three points on a line and keep every triangle's orientation.

    Parameters
    ----------
    candidate, query : Tensor [4, 2, B, A] of float32
        Multiples of half a px; with these the test is exact on images below 16 megapixels.

    Returns
    -------
    Tensor [B, A] of bool
    """
    (theirs, their_rest), (ours, our_rest) = _areas(candidate), _areas(query)
    first, second, third = theirs * ours > 0
    return first & second & third & (their_rest * our_rest > 0)


def _keep(samples: Tensor, proper: Tensor) -> Tensor:
    """Keep the first proper samples of each problem.

    Parameters
    ----------
    samples : Tensor [4, B, A] of int64
    proper : Tensor [B, A] of bool

    Returns
    -------
    Tensor [4, B, HYPOTHESES] of int64
        Padded with samples of one match, which fix no homography.
    """
    place = proper.cumsum(dim=1) - 1
    place = torch.where(proper & (place < HYPOTHESES), place, HYPOTHESES)  # the rest, in one heap
    kept = samples.new_zeros((*samples.shape[:2], HYPOTHESES + 1))
    return kept.scatter_(2, place.expand(4, -1, -1), samples)[..., :HYPOTHESES]


def _fit(homographies: Tensor, inside: Tensor, candidate: Tensor, query: Tensor) -> Tensor:
    """Fit homographies again to their inliers, by linear least squares.

    Each equation is divided by the depth that the previous homography gives, so that the error
    is nearly the distance in the query image.

    Parameters
    ----------
    homographies : Tensor [9, B, R] of float64
    inside : Tensor [B, R, L] of bool
    candidate, query : Tensor [B, 2, L] of float64

    Returns
    -------
    Tensor [9, B, R] of float64
        The last of the nine is 1; not finite where the inliers fix no homography.
    """
    h = homographies[..., None]  # [9, B, R, 1]
    x, y = candidate[:, None].unbind(2)  # [B, 1, L]
    u, v = query[:, None].unbind(2)
    depth = h[6] * x + h[7] * y + h[8]
    weight = 1 / (depth * depth)
    powers = torch.stack([x * x, x * y, x, y * y, y, torch.ones_like(x)])  # [6, B, 1, L]
    sums = torch.stack(
        [
            _total(torch.where(inside, weight * factor * powers, 0))
            for factor in (torch.ones_like(u), u, v, u * u + v * v)
        ]
    )  # [4, 6, B, R]
    plain, by_u, by_v, by_both = sums[:, [[0, 1, 2], [1, 3, 4], [2, 4, 5]]]  # [3, 3, B, R]
    zero = torch.zeros_like(plain)
    system = torch.cat(
        [
            torch.cat([plain, zero, -by_u], dim=1),
            torch.cat([zero, plain, -by_v], dim=1),
            torch.cat([-by_u, -by_v, by_both], dim=1),
        ]
    )[:8]  # the last column is minus the right-hand side
    for i in range(8):  # positive definite: no pivots are needed
        row = system[i] / system[i, i]
        system = system - system[:, i : i + 1] * row
        system[i] = row
    return torch.cat([-system[:, 8], torch.ones_like(zero[:1, 0])])


def _total(terms: Tensor) -> Tensor:
    """Sum over the last dimension in an order that zeros at its end do not change."""
    while (n := terms.shape[-1]) > 1:
        half = 1 << ((n - 1).bit_length() - 1)
        paired = terms[..., : n - half] + terms[..., half:]
        terms = torch.cat([paired, terms[..., n - half : half]], dim=-1)
    return terms[..., 0]


def _elements(device: torch.device) -> int:
    """Return how many numbers a temporary tensor may hold, more or less.

    On the CPU that many stay in its cache, and PyTorch does not share out the work on them among
    threads, which would cost more than it gains.
    """
    return 2**15 if device.type == "cpu" else 2**24


@lru_cache(maxsize=8)
def _draws(seed: int) -> NDArray[np.int64]:
    """Return the random table [draws, 4] of 31-bit numbers behind the samples."""
    return np.random.default_rng(seed).integers(0, 2**31, (HYPOTHESES * DRAWS, 4))


def _samples(draws: Tensor, counts: Tensor) -> Tensor:
    """Choose four different numbers below each count, uniformly (Floyd's method).

    Parameters
    ----------
    draws : Tensor [A, 4] of int64
        Below 2^31.
    counts : Tensor [B] of int64
        Four or more.

    Returns
    -------
    Tensor [4, B, A] of int64
    """
    chosen: list[Tensor] = []
    for i in range(4):
        last = (counts - 4 + i)[:, None]  # [B, 1]
        drawn = (draws[:, i] * (last + 1)) >> 31  # [B, A]
        for other in chosen:
            drawn = torch.where(drawn == other, -1, drawn)
        chosen.append(torch.where(drawn < 0, last, drawn))
    return torch.stack(chosen)


def _areas(points: Tensor) -> tuple[Tensor, Tensor]:
    """Return twice the signed areas of the triangles of four points.

    Parameters
    ----------
    points : Tensor [4, 2, ...] of a float type

    Returns
    -------
    of_last : Tensor [3, ...]
        Of the last point with the second and third, third and first, first and second.
    of_rest : Tensor [...]
        Of the first three.
    """
    x, y = (points[:3] - points[3]).unbind(1)  # [3, ...]
    areas = torch.stack(
        [x[1] * y[2] - y[1] * x[2], x[2] * y[0] - y[2] * x[0], x[0] * y[1] - y[0] * x[1]]
    )
    return areas, areas[0] + areas[1] + areas[2]


def _take(points: Tensor, samples: Tensor) -> Tensor:
    """Look up the points [B, 2, L] of samples [4, B, A]: [4, 2, B, A]."""
    points = points.transpose(0, 1).expand(4, -1, -1, -1)  # [4, 2, B, L]
    return points.gather(3, samples[:, None].expand(-1, 2, -1, -1))


def _through(candidate: Tensor, query: Tensor) -> Tensor:
    """Return the homographies that take four candidate points to four query points.

    With the fourth points as origins, H = sum_i (m_i / l_i) (q_i, 1) r_i^T, where r_i are the
    rows of the adjugate of the matrix of the first three candidate points, and l, m the areas
    that :func:`_areas` gives: no system is solved.

    Parameters
    ----------
    candidate, query : Tensor [4, 2, ...] of float64

    Returns
    -------
    Tensor [9, ...]
        Row-major; not finite or without sense where three points lie on a line.
    """
    ours, _ = _areas(query)
    theirs, _ = _areas(candidate)
    weight = ours / theirs  # [3, ...]
    x, y = (candidate[:3] - candidate[3]).unbind(1)
    rows = torch.stack([y.roll(-1, 0) - y.roll(-2, 0), x.roll(-2, 0) - x.roll(-1, 0), theirs])
    u, v = (query[:3] - query[3]).unbind(1)
    # Rows of H in that frame; the third entry of the first two is 0.
    values = torch.stack([weight * u, weight * v, weight])[:, None] * rows
    values = values[:, :, 0] + values[:, :, 1] + values[:, :, 2]  # [3, 3, ...]
    last = values[2]
    last[2] = last[2] - last[0] * candidate[3, 0] - last[1] * candidate[3, 1]
    for k in range(2):  # back to the given origins
        values[k, 2] = -values[k, 0] * candidate[3, 0] - values[k, 1] * candidate[3, 1]
        values[k] += query[3, k] * last
    return values.flatten(0, 1)


def _inside(homographies: Tensor, candidate: Tensor, query: Tensor) -> Tensor:
    """Tell which matches are inliers of which homographies.

    Parameters
    ----------
    homographies : Tensor [9, B, K]
        Row-major.
    candidate, query : Tensor [B, 2, L]
        NaN where there is no match; the unit of query coordinates is the threshold.

    Returns
    -------
    Tensor [B, K, L] of bool
    """
    h = homographies[..., None]  # [9, B, K, 1]
    x, y = candidate[:, None].unbind(2)  # [B, 1, L]
    u, v = query[:, None].unbind(2)
    # One operation at a time: fused ones round differently from place to place.
    depth = (h[6] * x).add_(h[7] * y).add_(h[8])
    error = (h[0] * x).add_(h[1] * y).add_(h[2]).sub_(u * depth).square_()
    error += (h[3] * x).add_(h[4] * y).add_(h[5]).sub_(v * depth).square_()
    return error <= depth.square_()
