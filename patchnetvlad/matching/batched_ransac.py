# SPDX-License-Identifier: MIT
"""Spatial verification of many pairs of images at once by homographies, on any device."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.device import upload
from patchnetvlad.matching.fused import attempt_fused, fused_kernels
from patchnetvlad.models.grid import STRIDE

TOLERANCE = 1.5
"""Reprojection error of an inlier, in patch strides."""

MIN_MATCHES = 4
"""Matches that a homography needs."""

HYPOTHESES = 1024
"""Homographies tried per problem."""

DRAWS = 8
"""Samples drawn for each of these; most are degenerate or not a view of a plane."""

REFINED = 16
"""Number of best homographies that are refined, per problem."""

ROUNDS = 3
"""Number of refinements of each of these."""

Problem = tuple[NDArray[np.int64], NDArray[np.int64], float]
Solution = tuple[NDArray[np.float64] | None, NDArray[np.bool_]]


def batched_homographies(
    problems: Sequence[Problem], *, device: torch.device | str = "cpu", seed: int = 0
) -> list[Solution]:
    """Fit the homographies of many pairs at once by RANSAC.

    Every problem has up to :data:`HYPOTHESES` homographies through four random matches each;
    those with the most inliers are refitted to their inliers. The error is OpenCV's: the distance
    in the query image. Unlike OpenCV's, no homography starts from matches that mirror: a plane
    never looks so, but the far end of a symmetric corridor may.

    What a problem gives does not depend on the other problems or on their order: samples come
    from one table, sums are of integers or in a fixed order, and all else goes element by
    element. For the same reason devices agree, as far as their arithmetic is IEEE 754's.

    Parameters
    ----------
    problems : sequence of (ndarray [m, 2] of int, ndarray [m, 2] of int, float)
        Query keypoints, candidate keypoints (px) and patch stride (cells of 16 px), as
        :func:`homography_inliers` takes them; m may vary.
    device : torch.device or str, default "cpu"
        Where to compute; the CPU instead of a device without float64 (MPS).
    seed : int, default 0
        Of the random samples.

    Returns
    -------
    list of (ndarray [3, 3] of float64 or None, ndarray [m] of bool)
        Homography from candidate to query px, and its inliers, as for :func:`homography_inliers`.
    """
    device = torch.device(device)
    if device.type == "mps":
        device = torch.device("cpu")
    solutions: list[Solution] = [(None, np.zeros(len(p[0]), dtype=bool)) for p in problems]
    # Problems of similar size together, so that there is little padding.
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
    solved = [_solve_together([problems[i] for i in group], device, seed) for group in groups]
    for group, (homographies, inliers) in zip(groups, solved, strict=True):
        for i, homography, inside in zip(
            group, homographies.cpu().numpy(), inliers.cpu().numpy(), strict=True
        ):
            if inside.any():
                solutions[i] = homography.reshape(3, 3), inside[: len(problems[i][0])]
    return solutions


def _solve_together(
    problems: Sequence[Problem], device: torch.device, seed: int
) -> tuple[Tensor, Tensor]:
    """Pack problems of four or more matches into tensors, and solve them."""
    lengths = [len(query) for query, _, _ in problems]
    packed = np.zeros((2, len(problems), 2, max(lengths)))  # query and candidate
    for i, (query, candidate, _) in enumerate(problems):
        for side, points in enumerate((query, candidate)):
            packed[side, i, :, : lengths[i]] = points.T
    query, candidate = upload(packed, device)
    strides = upload(np.array([stride for _, _, stride in problems], np.float64), device)
    return solve(query, candidate, upload(np.array(lengths), device), strides, seed)


@torch.inference_mode()
def solve(
    query: Tensor, candidate: Tensor, counts: Tensor, strides: Tensor, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Fit the homographies of B problems on their device, without waiting for it.

    Parameters
    ----------
    query, candidate : Tensor [B, 2, L] of float64
        Matched key points (x, y), px, multiples of a half; anything beyond a problem's matches.
    counts : Tensor [B] of int64
        Matches of each problem, from 0 to L.
    strides : Tensor [B] of float64
        Patch strides, cells of 16 px.
    seed : int, default 0
        Of the random samples.

    Returns
    -------
    homographies : Tensor [B, 9] of float64
        From candidate to query px, row-major, the last 1; of no meaning without inliers.
    inliers : Tensor [B, L] of bool
        Four or more, or none.
    """
    device, length = query.device, query.shape[2]
    draws = upload(_draws(seed), device)
    each = max(HYPOTHESES * DRAWS, 6 * REFINED * length)
    step = max(1, _elements(device) // each)
    if fused_kernels(device) is not None:
        step *= 8  # which have no temporaries
    solved = [
        _solve(*part, draws)
        for part in zip(
            query.split(step), candidate.split(step), counts.split(step), strides.split(step),
            strict=True,
        )
    ]  # fmt: skip
    homographies, inliers = zip(*solved, strict=True)
    return torch.cat(homographies), torch.cat(inliers)


def _solve(
    query: Tensor, candidate: Tensor, counts: Tensor, strides: Tensor, draws: Tensor
) -> tuple[Tensor, Tensor]:
    """Solve problems as for :func:`solve`; ``draws`` is the random table behind the samples.

    Points are taken from the middle of the box around them, which is exact, and measured in units
    of the inlier threshold.
    """
    if query.shape[2] < MIN_MATCHES:
        nobody = torch.zeros((len(query), query.shape[2]), dtype=torch.bool, device=query.device)
        return query.new_zeros((len(query), 9)), nobody
    there = torch.arange(query.shape[2], device=query.device) < counts[:, None]  # [B, L]
    middles = [_middle(points, there) for points in (query, candidate)]  # [B, 2] each
    query, candidate = (
        torch.where(there[:, None], points - middle[..., None], torch.nan)
        for points, middle in zip((query, candidate), middles, strict=True)
    )
    unit = STRIDE * TOLERANCE * strides[:, None]  # [B, 1]
    samples = _proper_samples(draws, candidate, query, counts.clamp_min(MIN_MATCHES))
    tried = _through(_take(candidate, samples) / unit, _take(query, samples) / unit)  # [9, B, K]

    query, candidate = query / unit[..., None], candidate / unit[..., None]
    single = candidate.float(), query.float()
    best = _largest(_count_inliers(tried.float(), *single, counts), REFINED)
    homographies = tried.gather(2, best.expand(9, -1, -1))  # [9, B, R]
    found = _count_inliers(homographies, candidate, query, counts)
    for _ in range(ROUNDS):
        refined = _fit(_inlier_sums(homographies, candidate, query))
        theirs = _count_inliers(refined, candidate, query, counts)
        better = theirs >= found  # [B, R]
        homographies = torch.where(better, refined, homographies)
        found = torch.where(better, theirs, found)
    best = _largest(found, 1)  # [B, 1]
    chosen = homographies.gather(2, best.expand(9, -1, -1))  # [9, B, 1]
    inliers = _inside(chosen, candidate, query)[:, 0]
    in_pixels = _in_pixels(chosen[..., 0], unit[:, 0], *middles)  # [9, B]
    valid = (inliers.sum(dim=-1) >= MIN_MATCHES) & in_pixels.isfinite().all(dim=0)
    return in_pixels.T, inliers & valid[:, None]


def _middle(points: Tensor, there: Tensor) -> Tensor:
    """Return the middle [B, 2] of the box around points [B, 2, L]: half a whole number."""
    lowest = torch.where(there[:, None], points, torch.inf).amin(dim=2)
    highest = torch.where(there[:, None], points, -torch.inf).amax(dim=2)
    return (lowest + highest) / 2


def _in_pixels(h: Tensor, unit: Tensor, query: Tensor, candidate: Tensor) -> Tensor:
    """Take homographies [9, B] of :func:`_solve` to px, the last entry 1.

    Parameters
    ----------
    h : Tensor [9, B]
    unit : Tensor [B]
    query, candidate : Tensor [B, 2]
        Middles that points were taken from, px.

    Returns
    -------
    Tensor [9, B]
    """
    rows = h.unflatten(0, (3, 3))  # [3, 3, B]
    x, y = candidate.T
    scaled = rows[:, :2] / unit
    shifted = rows[:, 2] - scaled[:, 0] * x - scaled[:, 1] * y
    rows = torch.cat([scaled, shifted[:, None]], dim=1)
    u, v = query.T
    rows = torch.stack([unit * rows[0] + u * rows[2], unit * rows[1] + v * rows[2], rows[2]])
    return (rows / rows[2, 2]).flatten(0, 1)


def _proper_samples(draws: Tensor, candidate: Tensor, query: Tensor, counts: Tensor) -> Tensor:
    """Choose the first proper samples [4, B, HYPOTHESES] of each problem; see :func:`_proper`."""
    candidate, query = candidate.float(), query.float()
    kernels = fused_kernels(query.device)
    if kernels is not None:
        drawn = attempt_fused(lambda: kernels.proper_samples(draws, candidate, query, counts))
        if drawn is not None:
            return _keep(*drawn)
    samples = _samples(draws, counts)
    step = max(1, _elements(query.device) // (8 * len(counts)))
    proper = [
        _proper(_take(candidate, part), _take(query, part)) for part in samples.split(step, dim=-1)
    ]
    return _keep(samples, torch.cat(proper, dim=-1))


def _count_inliers(tried: Tensor, candidate: Tensor, query: Tensor, counts: Tensor) -> Tensor:
    """Count the inliers [B, K] of homographies [9, B, K], in the type of the points."""
    kernels = fused_kernels(query.device)
    if kernels is not None:
        found = attempt_fused(lambda: kernels.count_inliers(tried, candidate, query, counts))
        if found is not None:
            return found
    step = max(1, _elements(query.device) // query[:, 0].numel())
    parts = [_inside(h, candidate, query).sum(dim=-1) for h in tried.split(step, dim=-1)]
    return torch.cat(parts, dim=-1)


def _inlier_sums(homographies: Tensor, candidate: Tensor, query: Tensor) -> Tensor:
    """Sum up what least squares over inliers needs.

    Each equation is divided by the depth that the homography gives, so that the error is nearly
    the distance in the query image.

    Parameters
    ----------
    homographies : Tensor [9, B, R] of float64
    candidate, query : Tensor [B, 2, L] of float64
        NaN where there is no match.

    Returns
    -------
    Tensor [4, 6, B, R] of float64
        Sums of w f p over the inliers: weights w = 1 / depth^2, factors f = 1, u, v, u^2 + v^2,
        powers p = x^2, xy, x, y^2, y, 1.
    """
    kernels = fused_kernels(query.device)
    if kernels is not None:
        summed = attempt_fused(lambda: kernels.inlier_sums(homographies, candidate, query))
        if summed is not None:
            return summed
    inside = _inside(homographies, candidate, query)  # [B, R, L]
    h = homographies[..., None]  # [9, B, R, 1]
    x, y = candidate[:, None].unbind(2)  # [B, 1, L]
    u, v = query[:, None].unbind(2)
    depth = h[6] * x + h[7] * y + h[8]
    weight = 1 / (depth * depth)
    powers = torch.stack([x * x, x * y, x, y * y, y, torch.ones_like(x)])  # [6, B, 1, L]
    sums = [
        _total(torch.where(inside, weight * factor * powers, 0))
        for factor in (torch.ones_like(u), u, v, u * u + v * v)
    ]
    return torch.stack(sums)


def _fit(sums: Tensor) -> Tensor:
    """Fit homographies by linear least squares.

    Parameters
    ----------
    sums : Tensor [4, 6, B, R] of float64
        As for :func:`_inlier_sums`.

    Returns
    -------
    Tensor [9, B, R] of float64
        The last of the nine is 1; not finite where the inliers fix no homography.
    """
    xx, xy, x, yy, y, one = sums.unbind(1)  # [4, B, R] each
    plain, by_u, by_v, by_both = torch.stack(
        [torch.stack(row, dim=1) for row in ((xx, xy, x), (xy, yy, y), (x, y, one))], dim=1
    )  # [3, 3, B, R]
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


def _largest(counts: Tensor, k: int) -> Tensor:
    """Return the indices [B, k] of the largest counts [B, n]; the first of equal ones."""
    n = counts.shape[1]
    return (counts * n - torch.arange(n, device=counts.device)).topk(min(k, n), dim=1).indices


def _proper(candidate: Tensor, query: Tensor) -> Tensor:
    """Return which samples have no three points on a line and keep every triangle's orientation.

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
    slot = proper.cumsum(dim=1) - 1
    slot = torch.where(proper & (slot < HYPOTHESES), slot, HYPOTHESES)  # the rest shares one
    kept = samples.new_zeros((*samples.shape[:2], HYPOTHESES + 1))
    return kept.scatter_(2, slot.expand(4, -1, -1), samples)[..., :HYPOTHESES]


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
    """Return which matches are inliers of which homographies.

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
    # One operation at a time: fused ones round differently here and there.
    depth = (h[6] * x).add_(h[7] * y).add_(h[8])
    error = (h[0] * x).add_(h[1] * y).add_(h[2]).sub_(u * depth).square_()
    error += (h[3] * x).add_(h[4] * y).add_(h[5]).sub_(v * depth).square_()
    return error <= depth.square_()
