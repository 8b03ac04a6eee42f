# SPDX-License-Identifier: MIT
"""Triton kernels for CUDA GPUs: the slowest steps of re-ranking, without large temporaries.

Each gives what plain PyTorch gives, see :mod:`~patchnetvlad.matching.nearest` and
:mod:`~patchnetvlad.matching.batched_ransac`, and is called from there alone. Import this module
through :func:`~patchnetvlad.matching.fused.fused_kernels`, which knows where there is Triton.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK_QUERY, BLOCK_CANDIDATE, BLOCK_DIMS = 128, 128, 64
"""Tile of similarities that one program computes, and dimensions that it multiplies at a time."""

NEAREST_OPTIONS: dict[str, int] = {"num_warps": 8, "num_stages": 3}
"""How a tile's program is compiled."""

_GROUP = 8  # rows of tiles that are visited together, so that their operands stay in the L2 cache
_LOW = 2**31 - 1

# Products and sums are rounded one by one, as PyTorch does, so that all devices agree.
_EXACT: dict[str, Any] = {"enable_fp_fusion": False}


# --- mutual nearest neighbours --------------------------------------------------------------------


def can_match(pairs: Sequence[tuple[Tensor, Tensor]]) -> bool:
    """Whether :func:`nearest` takes these pairs: float16, dimensions a multiple of 16, aligned."""
    dims = pairs[0][0].shape[1]
    parts = {id(part): part for pair in pairs for part in pair}  # a query is in many
    return dims % 16 == 0 and all(
        part.dtype == torch.float16
        and part.is_contiguous()
        and part.shape[1] == dims
        and len(part) > 0
        and part.data_ptr() % 16 == 0
        for part in parts.values()
    )


def nearest(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Find the nearest neighbours of B pairs of patch sets in one launch.

    A tile of similarities is reduced to its rows' and columns' maxima where it is computed, so
    that no similarity is ever written to memory.

    Parameters
    ----------
    pairs : sequence of (Tensor [n, P], Tensor [m, P]) of float16, length B
        Query and candidate descriptors; n and m may vary. See :func:`can_match`.

    Returns
    -------
    candidate_of_query : Tensor [B, max n] of int64
        The first of the most similar candidate patches; any number beyond n.
    query_of_candidate : Tensor [B, max m] of int64
        Likewise.
    """
    device, dims = pairs[0][0].device, pairs[0][0].shape[1]
    numbers = [
        [query.data_ptr(), candidate.data_ptr(), len(query), len(candidate)]
        for query, candidate in pairs
    ]
    most_query = max(len(query) for query, _ in pairs)
    most_candidate = max(len(candidate) for _, candidate in pairs)
    table = torch.tensor(numbers, dtype=torch.int64)  # [B, 4]
    if device.type == "cuda":
        table = table.pin_memory().to(device, non_blocking=True)
    lowest = torch.iinfo(torch.int64).min
    best = torch.full(
        (len(pairs), most_query + most_candidate), lowest, dtype=torch.int64, device=device
    )
    step = next(size for size in (BLOCK_DIMS, 32, 16) if dims % size == 0)
    tiles = triton.cdiv(most_query, BLOCK_QUERY) * triton.cdiv(most_candidate, BLOCK_CANDIDATE)
    _nearest[(tiles, len(pairs))](
        table, best, dims, most_query, most_candidate,
        BLOCK_QUERY, BLOCK_CANDIDATE, step, _GROUP, **NEAREST_OPTIONS,
    )  # fmt: skip
    places = _LOW - (best & 0xFFFFFFFF)
    return places[:, :most_query], places[:, most_query:]


@triton.jit
def _key(value, place):  # type: ignore[no-untyped-def]
    """Pack a similarity and its place so that larger is more similar, then earlier."""
    value = tl.where(value == 0, 0.0, value)  # -0 equals 0
    bits = value.to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits.to(tl.int64) << 32) | (2147483647 - place).to(tl.int64)


@triton.jit
def _nearest(  # type: ignore[no-untyped-def]
    table,
    best,
    dims,
    most_query,
    most_candidate,
    BLOCK_QUERY: tl.constexpr,
    BLOCK_CANDIDATE: tl.constexpr,
    BLOCK_DIMS: tl.constexpr,
    GROUP: tl.constexpr,
):
    tile, pair = tl.program_id(0), tl.program_id(1)
    n = tl.load(table + 4 * pair + 2).to(tl.int32)
    m = tl.load(table + 4 * pair + 3).to(tl.int32)
    rows, columns = tl.cdiv(n, BLOCK_QUERY), tl.cdiv(m, BLOCK_CANDIDATE)
    if tile >= rows * columns:
        return
    first = tile // (GROUP * columns) * GROUP
    height = tl.minimum(rows - first, GROUP)
    inside = tile % (GROUP * columns)
    row, column = first + inside % height, inside // height

    # What lies beyond the last patch repeats it, and is left out at the end.
    query_places = row * BLOCK_QUERY + tl.arange(0, BLOCK_QUERY)
    candidate_places = column * BLOCK_CANDIDATE + tl.arange(0, BLOCK_CANDIDATE)
    depth = tl.arange(0, BLOCK_DIMS)
    query = tl.load(table + 4 * pair).to(tl.pointer_type(tl.float16))
    candidate = tl.load(table + 4 * pair + 1).to(tl.pointer_type(tl.float16))
    query = tl.multiple_of(query, 16)
    candidate = tl.multiple_of(candidate, 16)
    queries = query + tl.minimum(query_places, n - 1)[:, None].to(tl.int64) * dims + depth[None, :]
    candidates = (
        candidate
        + tl.minimum(candidate_places, m - 1)[None, :].to(tl.int64) * dims
        + depth[:, None]
    )
    similarity = tl.zeros((BLOCK_QUERY, BLOCK_CANDIDATE), tl.float32)
    for _ in range(0, dims, BLOCK_DIMS):
        similarity = tl.dot(tl.load(queries), tl.load(candidates), similarity)
        queries += BLOCK_DIMS
        candidates += BLOCK_DIMS
    there = (query_places < n)[:, None] & (candidate_places < m)[None, :]
    similarity = tl.where(there, similarity, float("-inf"))

    values, places = tl.max(similarity, axis=1, return_indices=True)
    keys = _key(values, column * BLOCK_CANDIDATE + places)
    target = best + pair.to(tl.int64) * (most_query + most_candidate)
    tl.atomic_max(target + query_places, keys, mask=query_places < n, sem="relaxed")
    values, places = tl.max(similarity, axis=0, return_indices=True)
    keys = _key(values, row * BLOCK_QUERY + places)
    target += most_query
    tl.atomic_max(target + candidate_places, keys, mask=candidate_places < m, sem="relaxed")


# --- RANSAC ---------------------------------------------------------------------------------------


def proper_samples(
    draws: Tensor, candidate: Tensor, query: Tensor, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """Draw samples of four matches, and tell which can come from a view of a plane.

    Parameters
    ----------
    draws : Tensor [A, 4] of int64
        Below 2^31.
    candidate, query : Tensor [B, 2, L] of float32
        Key points from the middle, px.
    counts : Tensor [B] of int64
        Matches; four or more.

    Returns
    -------
    samples : Tensor [4, B, A] of int64
    proper : Tensor [B, A] of bool
    """
    num_draws, (num_problems, _, length) = len(draws), candidate.shape
    samples = draws.new_empty((4, num_problems, num_draws))
    proper = torch.empty((num_problems, num_draws), dtype=torch.bool, device=draws.device)
    block = 256
    _proper_samples[(triton.cdiv(num_draws, block), num_problems)](
        draws, candidate.contiguous(), query.contiguous(), counts, samples, proper,
        num_draws, num_problems, length, block, **_EXACT,
    )  # fmt: skip
    return samples, proper


@triton.jit
def _drawn(draws, sample, num_draws, last, I: tl.constexpr):  # type: ignore[no-untyped-def]  # noqa: E741
    values = tl.load(draws + 4 * sample + I, mask=sample < num_draws, other=0)
    return (values * (last + 1)) >> 31


@triton.jit
def _corners(x0, x1, x2, x3, y0, y1, y2, y3):  # type: ignore[no-untyped-def]
    """Return twice the areas of three triangles with the last point, and of the first three."""
    x0, x1, x2 = x0 - x3, x1 - x3, x2 - x3
    y0, y1, y2 = y0 - y3, y1 - y3, y2 - y3
    first = x1 * y2 - y1 * x2
    second = x2 * y0 - y2 * x0
    third = x0 * y1 - y0 * x1
    return first, second, third, first + second + third


@triton.jit
def _proper_samples(  # type: ignore[no-untyped-def]
    draws, candidate, query, counts, samples, proper, num_draws, num_problems, length,
    BLOCK: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(1)
    sample = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = sample < num_draws
    last = tl.load(counts + problem) - 4
    # Four different numbers by Floyd's method.
    a = _drawn(draws, sample, num_draws, last, 0)
    b = _drawn(draws, sample, num_draws, last + 1, 1)
    b = tl.where(b == a, last + 1, b)
    c = _drawn(draws, sample, num_draws, last + 2, 2)
    c = tl.where((c == a) | (c == b), last + 2, c)
    d = _drawn(draws, sample, num_draws, last + 3, 3)
    d = tl.where((d == a) | (d == b) | (d == c), last + 3, d)

    x = candidate + problem * 2 * length
    y = x + length
    p0, p1, p2, p3 = _corners(
        tl.load(x + a), tl.load(x + b), tl.load(x + c), tl.load(x + d),
        tl.load(y + a), tl.load(y + b), tl.load(y + c), tl.load(y + d),
    )  # fmt: skip
    x = query + problem * 2 * length
    y = x + length
    q0, q1, q2, q3 = _corners(
        tl.load(x + a), tl.load(x + b), tl.load(x + c), tl.load(x + d),
        tl.load(y + a), tl.load(y + b), tl.load(y + c), tl.load(y + d),
    )  # fmt: skip
    ok = (p0 * q0 > 0) & (p1 * q1 > 0) & (p2 * q2 > 0) & (p3 * q3 > 0)
    tl.store(proper + problem * num_draws + sample, ok, mask=there)
    target = samples + problem.to(tl.int64) * num_draws + sample
    step = num_problems.to(tl.int64) * num_draws
    tl.store(target, a, mask=there)
    tl.store(target + step, b, mask=there)
    tl.store(target + 2 * step, c, mask=there)
    tl.store(target + 3 * step, d, mask=there)


def count_inliers(homographies: Tensor, candidate: Tensor, query: Tensor, counts: Tensor) -> Tensor:
    """Count the inliers of homographies.

    Parameters
    ----------
    homographies : Tensor [9, B, K] of float32 or float64
    candidate, query : Tensor [B, 2, L] of the same type
        In units of the threshold.
    counts : Tensor [B] of int64
        Matches that are there; the rest is NaN.

    Returns
    -------
    Tensor [B, K] of int64
    """
    _, num_problems, num_tried = homographies.shape
    found = torch.empty((num_problems, num_tried), dtype=torch.int64, device=candidate.device)
    block = 64
    _count_inliers[(triton.cdiv(num_tried, block), num_problems)](
        homographies.contiguous(), candidate.contiguous(), query.contiguous(), counts, found,
        num_problems, num_tried, candidate.shape[2], block, 64, **_EXACT,
    )  # fmt: skip
    return found


@triton.jit
def _count_inliers(  # type: ignore[no-untyped-def]
    homographies, candidate, query, counts, found, num_problems, num_tried, length,
    BLOCK: tl.constexpr, MATCHES: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(1)
    tried = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = tried < num_tried
    step = num_problems * num_tried
    h = homographies + problem * num_tried + tried
    h0 = tl.load(h, mask=there, other=0.0)[:, None]
    h1 = tl.load(h + step, mask=there, other=0.0)[:, None]
    h2 = tl.load(h + 2 * step, mask=there, other=0.0)[:, None]
    h3 = tl.load(h + 3 * step, mask=there, other=0.0)[:, None]
    h4 = tl.load(h + 4 * step, mask=there, other=0.0)[:, None]
    h5 = tl.load(h + 5 * step, mask=there, other=0.0)[:, None]
    h6 = tl.load(h + 6 * step, mask=there, other=0.0)[:, None]
    h7 = tl.load(h + 7 * step, mask=there, other=0.0)[:, None]
    h8 = tl.load(h + 8 * step, mask=there, other=0.0)[:, None]
    x = candidate + problem * 2 * length
    u = query + problem * 2 * length
    count = tl.load(counts + problem).to(tl.int32)
    total = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, count, MATCHES):
        match = start + tl.arange(0, MATCHES)
        given = match < count
        xs = tl.load(x + match, mask=given, other=0.0)[None, :]
        ys = tl.load(x + length + match, mask=given, other=0.0)[None, :]
        us = tl.load(u + match, mask=given, other=0.0)[None, :]
        vs = tl.load(u + length + match, mask=given, other=0.0)[None, :]
        depth = h6 * xs + h7 * ys + h8
        right = h0 * xs + h1 * ys + h2 - us * depth
        down = h3 * xs + h4 * ys + h5 - vs * depth
        inlier = (right * right + down * down <= depth * depth) & given[None, :]
        total += tl.sum(inlier.to(tl.int32), axis=1)
    tl.store(found + problem * num_tried + tried, total.to(tl.int64), mask=there)


def inlier_sums(homographies: Tensor, candidate: Tensor, query: Tensor) -> Tensor:
    """Sum up what least squares over the inliers of homographies needs.

    Parameters
    ----------
    homographies : Tensor [9, B, R] of float64
    candidate, query : Tensor [B, 2, L] of float64
        In units of the threshold; NaN where there is no match.

    Returns
    -------
    Tensor [4, 6, B, R] of float64
        Sums over the inliers of w f p: weight w = 1 / depth^2, factors f = 1, u, v, u^2 + v^2,
        powers p = x^2, xy, x, y^2, y, 1.
    """
    _, num_problems, num_tried = homographies.shape
    length = candidate.shape[2]
    sums = homographies.new_empty((4, 6, num_problems, num_tried))
    block = triton.next_power_of_2(max(length, 2))
    _inlier_sums[(num_problems * num_tried,)](
        homographies.contiguous(), candidate.contiguous(), query.contiguous(), sums,
        num_problems * num_tried, num_tried, length, block, block.bit_length() - 1,
        num_warps=2, **_EXACT,
    )  # fmt: skip
    return sums


@triton.jit
def _fold(terms, BLOCK: tl.constexpr, FOLDS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Sum BLOCK terms by halves: the order in which ``batched_ransac`` sums up."""
    for i in tl.static_range(FOLDS):
        terms = tl.sum(tl.reshape(terms, (2, BLOCK >> (i + 1))), axis=0)
    return tl.sum(terms, axis=0)  # of the one that is left


@triton.jit
def _inlier_sums(  # type: ignore[no-untyped-def]
    homographies, candidate, query, sums, total, num_tried, length,
    BLOCK: tl.constexpr, FOLDS: tl.constexpr,
):  # fmt: skip
    this = tl.program_id(0)
    problem = this // num_tried
    h0 = tl.load(homographies + this)
    h1 = tl.load(homographies + total + this)
    h2 = tl.load(homographies + 2 * total + this)
    h3 = tl.load(homographies + 3 * total + this)
    h4 = tl.load(homographies + 4 * total + this)
    h5 = tl.load(homographies + 5 * total + this)
    h6 = tl.load(homographies + 6 * total + this)
    h7 = tl.load(homographies + 7 * total + this)
    h8 = tl.load(homographies + 8 * total + this)
    match = tl.arange(0, BLOCK)
    given = match < length
    points = candidate + problem * 2 * length + match
    x = tl.load(points, mask=given, other=float("nan"))
    y = tl.load(points + length, mask=given, other=float("nan"))
    points = query + problem * 2 * length + match
    u = tl.load(points, mask=given, other=float("nan"))
    v = tl.load(points + length, mask=given, other=float("nan"))
    depth = h6 * x + h7 * y + h8
    right = h0 * x + h1 * y + h2 - u * depth
    down = h3 * x + h4 * y + h5 - v * depth
    inside = right * right + down * down <= depth * depth
    weight = 1.0 / (depth * depth)
    for f in tl.static_range(4):
        if f == 0:
            scaled = weight
        elif f == 1:
            scaled = weight * u
        elif f == 2:
            scaled = weight * v
        else:
            scaled = weight * (u * u + v * v)
        target = sums + 6 * f * total + this
        for p in tl.static_range(6):
            if p == 0:
                terms = scaled * (x * x)
            elif p == 1:
                terms = scaled * (x * y)
            elif p == 2:
                terms = scaled * x
            elif p == 3:
                terms = scaled * (y * y)
            elif p == 4:
                terms = scaled * y
            else:
                terms = scaled
            terms = tl.where(inside, terms, 0.0)
            tl.store(target + p * total, _fold(terms, BLOCK, FOLDS))
