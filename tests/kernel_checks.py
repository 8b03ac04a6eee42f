# SPDX-License-Identifier: MIT
"""Triton's kernels against plain PyTorch: to the last bit, ties included.

``TRITON_INTERPRET=1 python kernel_checks.py KERNEL CASES [KERNEL CASES ...]`` runs them in
Triton's interpreter, on the CPU.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import triton

from patchnetvlad.matching import batched_ransac, kernels


def nearest(cases: int, device: str = "cpu") -> None:
    """Whole numbers, whose products and sums are exact, so that many similarities are equal."""
    random = np.random.default_rng(0)
    for case in range(cases):
        dims = 16 * int(random.integers(1, 5))
        most = int(random.choice([3, 40, 150]))
        spread = int(random.integers(0, 3))  # 0: all are equal
        query = None
        pairs = []
        for _ in range(int(random.integers(1, 4))):
            n, m = random.integers(1, most + 1, 2)
            if query is None or random.random() < 0.5:
                query = _whole(random, n, dims, spread, device)
            pairs.append((query, _whole(random, m, dims, spread, device)))
        assert kernels.can_match(pairs)
        of_query, of_candidate = kernels.nearest(pairs)
        for b, (query, candidate) in enumerate(pairs):
            similarity = query.float() @ candidate.float().T
            found = of_query[b, : len(query)], of_candidate[b, : len(candidate)]
            assert torch.equal(found[0], similarity.argmax(dim=1)), (case, b)
            assert torch.equal(found[1], similarity.argmax(dim=0)), (case, b)


def _whole(random, n, dims, spread, device):
    values = random.integers(-spread, spread + 1, (n, dims))
    return torch.from_numpy(values).half().to(device)


def _problems(random, device):
    """Make up matches on a grid, of which some follow a shift."""
    num_problems, length = int(random.integers(1, 4)), int(random.integers(4, 40))
    counts = torch.from_numpy(random.integers(4, length + 1, num_problems))
    candidate = random.integers(0, 40, (num_problems, 2, length)) * 16.0 + 7
    query = random.integers(0, 40, (num_problems, 2, length)) * 16.0 + 7
    follow = random.random((num_problems, 1, length)) < 0.6
    query = np.where(follow, candidate + 32, query)
    return [torch.from_numpy(x).to(device) for x in (candidate, query)] + [counts.to(device)]


def _in_units(random, device):
    candidate, query, counts = _problems(random, device)
    there = torch.arange(candidate.shape[2], device=device) < counts[:, None]
    candidate, query = (
        torch.where(there[:, None], (points - 320) / 24, torch.nan) for points in (candidate, query)
    )
    shift = torch.tensor([1, 0, 32 / 24, 0, 1, 32 / 24, 0, 0, 1], dtype=torch.float64)
    noise = random.normal(0, 0.003, (9, len(counts), 70))
    return (shift[:, None, None] + torch.from_numpy(noise)).to(device), candidate, query, counts


def samples(cases: int, device: str = "cpu") -> None:
    random = np.random.default_rng(1)
    draws = torch.from_numpy(batched_ransac._draws(0)).to(device)
    proper = 0
    for case in range(cases):
        candidate, query, counts = _problems(random, device)
        candidate, query, part = candidate.float(), query.float(), draws[: 300 + case].contiguous()
        found = kernels.proper_samples(part, candidate, query, counts)
        expected = batched_ransac._samples(part, counts)
        assert torch.equal(found[0], expected), case
        points = (batched_ransac._take(points, expected) for points in (candidate, query))
        assert torch.equal(found[1], batched_ransac._proper(*points)), case
        proper += int(found[1].sum())
    assert proper > 10 * cases


def counts(cases: int, device: str = "cpu") -> None:
    random = np.random.default_rng(2)
    inliers = 0
    for case in range(cases):
        homographies, candidate, query, number = _in_units(random, device)
        for dtype in (torch.float32, torch.float64):
            given = [x.to(dtype) for x in (homographies, candidate, query)]
            found = kernels.count_inliers(*given, number)
            assert torch.equal(found, batched_ransac._inside(*given).sum(dim=-1)), case
            inliers += int(found.sum())
    assert inliers > 10 * cases


def sums(cases: int, device: str = "cpu") -> None:
    random = np.random.default_rng(3)
    for case in range(cases):
        homographies, candidate, query, _ = _in_units(random, device)
        homographies = homographies[..., : 1 + case % 4]
        found = kernels.inlier_sums(homographies, candidate, query)
        # On the CPU, where there are no kernels to take.
        given = (x.cpu() for x in (homographies, candidate, query))
        expected = batched_ransac._inlier_sums(*given)
        assert torch.equal(found.cpu(), expected), case
        assert expected.any()


def compile_all(capability: int) -> dict[str, Any]:
    """Compile every kernel for a kind of GPU; there need not be one."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    def compiled(kernel, types, constants, aligned=(), **options):
        place = {name: (kernel.arg_names.index(name),) for name in kernel.arg_names}
        source = ASTSource(
            fn=kernel,
            signature={name: types.get(name, "constexpr") for name in kernel.arg_names},
            constexprs={place[name]: value for name, value in constants.items()},
            attrs={place[name]: [["tt.divisibility", 16]] for name in aligned},
        )
        return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)

    numbers = dict.fromkeys(
        ("dims", "most_query", "most_candidate", "num_draws", "num_problems", "num_tried",
         "length", "total"),
        "i32",
    )  # fmt: skip
    points = dict.fromkeys(("homographies", "candidate", "query", "sums"), "*fp64")
    single = points | dict.fromkeys(("homographies", "candidate", "query"), "*fp32")
    tables = dict.fromkeys(("table", "best", "draws", "counts", "samples", "found"), "*i64")

    def given(kernel, *more):
        types = {k: v for part in (numbers, tables, *more) for k, v in part.items()}
        return {name: types[name] for name in kernel.arg_names if name in types}

    nearest, proper = kernels._nearest, kernels._proper_samples
    counts, sums = kernels._count_inliers, kernels._inlier_sums
    tile = {
        "BLOCK_QUERY": kernels.BLOCK_QUERY, "BLOCK_CANDIDATE": kernels.BLOCK_CANDIDATE,
        "BLOCK_DIMS": kernels.BLOCK_DIMS, "GROUP": 8,
    }  # fmt: skip
    apart = {"enable_fp_fusion": False}
    return {
        "nearest": compiled(
            nearest, given(nearest), tile, ("table", "best", "dims"), **kernels.NEAREST_OPTIONS
        ),
        "samples": compiled(
            proper, given(proper, single, {"proper": "*i1"}), {"BLOCK": 256}, **apart
        ),
        **{
            f"counts {types['query']}": compiled(
                counts, given(counts, types), {"BLOCK": 64, "MATCHES": 64}, **apart
            )
            for types in (points, single)
        },
        "sums": compiled(
            sums, given(sums, points), {"BLOCK": 2048, "FOLDS": 11}, num_warps=2, **apart
        ),
    }


CHECKS = {check.__name__: check for check in (nearest, samples, counts, sums)}

if __name__ == "__main__":
    for kernel, cases in zip(sys.argv[1::2], map(int, sys.argv[2::2]), strict=True):
        CHECKS[kernel](cases)
        print(kernel, cases, "cases are equal")
