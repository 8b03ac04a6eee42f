# SPDX-License-Identifier: MIT
"""What a machine without a GPU can show of one: operands never mix devices, nothing waits.

Computations run on fake CUDA tensors, which have shapes and devices but no values: PyTorch raises
where operands lie on different devices, where a value is asked for, and where a shape depends on
values. Copies back to the CPU are refused as well. Triton's kernels run in its interpreter.
"""

from __future__ import annotations

import ast
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import DEVICES, REPOSITORY
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode

from patchnetvlad.base.device import choose_precision, memory_budget, upload
from patchnetvlad.errors import DeviceError
from patchnetvlad.features.store.codec import round_map, round_patches
from patchnetvlad.matching import on_device
from patchnetvlad.matching.nearest import mutual_nearest_neighbours, mutual_on_device, pairs_of
from patchnetvlad.matching.pair import match_pair
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.encoder import build_encoder, for_inference
from patchnetvlad.models.grid import ENCODER_DIM, patch_grids
from patchnetvlad.models.model import build_model
from patchnetvlad.search import on_device as search
from patchnetvlad.search.retrieve import retrieve

GPU = torch.device("cuda", 0)
SIZE, SIZES, STRIDES = (96, 128), (2, 3), (1, 2)
GRIDS = patch_grids(SIZE, SIZES, STRIDES)


class NothingBack(TorchDispatchMode):
    """Refuses to copy from a GPU to the CPU."""

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        found = function(*arguments, **(keywords or {}))
        from_gpu = any(isinstance(x, torch.Tensor) and x.device.type == "cuda" for x in arguments)
        if from_gpu and isinstance(found, torch.Tensor) and found.device.type == "cpu":
            raise AssertionError(f"{function} waits for the GPU")
        return found


@pytest.fixture
def fake():
    with FakeTensorMode(allow_non_fake_inputs=False), NothingBack():
        yield


def model(pooling="patchnetvlad", vladv2=False, patch_vlad="integral", num_pcs=32):
    with GPU:
        return build_model(
            build_encoder(), ENCODER_DIM, pooling=pooling, num_clusters=4, num_pcs=num_pcs,
            vladv2=vladv2, patch_sizes=SIZES, strides=STRIDES, patch_vlad=patch_vlad,
        )  # fmt: skip


def descriptors(dtype=torch.float32):
    return [torch.empty(len(grid), 16, device=GPU, dtype=dtype) for grid in GRIDS]


class TestFakes:
    """The fakes themselves notice what they are to notice."""

    def test_mixed_devices(self, fake):
        with pytest.raises(RuntimeError, match="device"):
            torch.empty(3, device=GPU) + torch.empty(3)

    def test_values(self, fake):
        values = torch.empty(3, device=GPU)
        with pytest.raises(DataDependentOutputException):
            values.sum().item()
        with pytest.raises(DynamicOutputShapeException):
            values.nonzero()
        with pytest.raises(AssertionError, match="waits for the GPU"):
            values.cpu()


class TestExtraction:
    @pytest.mark.parametrize("precision", ["exact", "fast", "half"])
    def test_encoder(self, fake, precision):
        maps = for_inference(model().encoder, precision)(torch.empty(3, 3, *SIZE, device=GPU))
        assert (maps.shape, maps.device, maps.dtype) == ((3, 512, 6, 8), GPU, torch.float32)
        assert maps.is_contiguous()

    @pytest.mark.parametrize("precision", ["exact", "fast"])
    @pytest.mark.parametrize("patch_vlad", ["integral", "direct"])
    @pytest.mark.parametrize("vladv2", [False, True])
    def test_descriptors(self, fake, precision, patch_vlad, vladv2):
        describer = Describer(model(vladv2=vladv2, patch_vlad=patch_vlad), precision=precision)
        maps = describer.encode(torch.empty(3, 3, *SIZE, device=GPU))
        found = describer.global_descriptors(maps)
        assert (found.shape, found.device) == ((3, 32), GPU)
        patches = describer.patches(maps[0])
        assert [p.shape for p in patches] == [(len(grid), 32) for grid in GRIDS]
        assert {p.device for p in patches} == {GPU}

    @pytest.mark.parametrize("pooling", ["netvlad", "max", "avg"])
    def test_global_descriptors(self, fake, pooling):
        describer = Describer(model(pooling))
        found = describer.global_descriptors(torch.empty(3, ENCODER_DIM, 6, 8, device=GPU))
        assert (found.shape, found.device) == ((3, 32), GPU)

    def test_forward(self, fake):
        """The way that code written for the research code takes."""
        local, vlad = model().pool(torch.empty(2, ENCODER_DIM, 6, 8, device=GPU))
        assert vlad.device == GPU
        assert {part.device for part in local} == {GPU}

    @pytest.mark.parametrize("kind", ["float16", "float32", "int8"])
    def test_rounding(self, fake, kind):
        assert {part.device for part in round_patches(descriptors(), kind)} == {GPU}
        assert round_map(torch.empty(512, 6, 8, device=GPU)).device == GPU


class TestMatching:
    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
    @pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
    def test_scores(self, fake, matcher, dtype):
        candidates = [descriptors(dtype) for _ in range(3)]
        scores = on_device.score_candidates(
            descriptors(dtype), candidates, GRIDS, [GRIDS] * 3, matcher
        )
        assert (scores.shape, scores.device, scores.dtype) == ((3, 2), GPU, torch.float64)

    def test_native_sizes(self, fake):
        other = patch_grids((112, 96), SIZES, STRIDES)
        candidates = [
            [torch.empty(len(grid), 16, device=GPU) for grid in grids] for grids in (GRIDS, other)
        ]
        for matcher in ("RANSAC", "spatialApproximator"):
            scores = on_device.score_candidates(
                descriptors(), candidates, GRIDS, [GRIDS, other], matcher
            )
            assert (scores.shape, scores.device) == ((2, 2), GPU)

    def test_matches(self, fake):
        found = on_device.find_matches(descriptors(), [descriptors()] * 2)
        assert (found.shape, found.device) == ((2, 2, max(map(len, GRIDS))), GPU)


def test_search(fake):
    queries, block = (torch.empty(n, 16, device=GPU) for n in (4, 50))
    best = torch.empty((4, 0), dtype=torch.int64, device=GPU)
    for start in (0, 50):
        best = search._nearer(best, queries, block, start, 10)
    assert (best.shape, best.device) == ((4, 10), GPU)


# --- values ---------------------------------------------------------------------------------------


def pictured(random, sizes=GRIDS, noise=0.4, base=None):
    """Make up descriptors, like those of ``base`` if it is given."""
    found = []
    for i, grid in enumerate(sizes):
        values = random.standard_normal((len(grid), 16))
        if base is not None:
            values = noise * values + base[i].numpy()
        found.append(torch.nn.functional.normalize(torch.from_numpy(values).float()))
    return found


@pytest.mark.parametrize("device", DEVICES)
class TestScores:
    """All candidates at once on a device against one pair at a time on the CPU."""

    def compare(self, device, query, candidates, query_grids, candidate_grids, matcher):
        found = on_device.score_candidates(
            [part.to(device) for part in query],
            [[part.to(device) for part in of] for of in candidates],
            query_grids,
            candidate_grids,
            matcher,
        )
        expected = [
            [m.score for m in match_pair(query, of, query_grids, grids, matcher, "batched")]
            for of, grids in zip(candidates, candidate_grids, strict=True)
        ]
        assert np.any(expected)
        np.testing.assert_allclose(found.cpu(), expected, rtol=1e-12, atol=1e-15)

    @pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
    def test_equal(self, device, matcher):
        random = np.random.default_rng(0)
        query = pictured(random)
        candidates = [pictured(random, base=query), pictured(random), pictured(random, base=query)]
        self.compare(device, query, candidates, GRIDS, [GRIDS] * 3, matcher)

    @pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
    def test_native_sizes(self, device, matcher):
        random = np.random.default_rng(1)
        query, other = pictured(random), patch_grids((112, 96), SIZES, STRIDES)
        tiny = patch_grids((48, 48), SIZES, STRIDES)
        grids = [GRIDS, other, tiny]
        candidates = [pictured(random, base=query), pictured(random, other), pictured(random, tiny)]
        self.compare(device, query, candidates, GRIDS, grids, matcher)

    @pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
    def test_nothing_matches_but_one(self, device, matcher):
        """Of descriptors that are all alike, the first ones match."""
        alike = [torch.full((len(grid), 16), 0.25) for grid in GRIDS]
        found = mutual_on_device([(part.to(device),) * 2 for part in alike]).cpu().numpy()
        for pairs in pairs_of(found):
            assert [part.tolist() for part in pairs] == [[0], [0]]
        scores = on_device.score_candidates(
            [part.to(device) for part in alike],
            [[part.to(device) for part in alike]],
            GRIDS,
            [GRIDS],
            matcher,
        )
        if matcher == "RANSAC":
            assert scores.tolist() == [[0, 0]]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("block_bytes", [2**29, 4000])
@pytest.mark.parametrize(
    ("n", "queries", "k"), [(500, 30, 10), (3, 4, 7), (300, 5, 120), (60, 1, 1)]
)
def test_search_equals_faiss(device, block_bytes, n, queries, k, monkeypatch):
    """Equal descriptors among them, which stand in the order of their rows."""
    monkeypatch.setattr(search, "BLOCK_BYTES", block_bytes)
    random = np.random.default_rng(n)
    index = random.standard_normal((n, 16)).astype(np.float32)
    index[n // 2 :: 3] = index[0]
    asked = index[random.integers(0, n, queries)] + np.float32(0.2) * random.standard_normal(
        (queries, 16)
    ).astype(np.float32)
    asked[0] = index[0]
    distances, rows = search.nearest_rows(asked, index, k, torch.device(device))
    np.testing.assert_array_equal(rows, retrieve(asked, index, k))
    exact = ((asked[:, None].astype(np.float64) - index[rows]) ** 2).sum(axis=2)
    np.testing.assert_allclose(distances, exact, rtol=1e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_search_of_numbers_that_are_not_finite(device):
    index = np.eye(4, dtype=np.float32)
    queries = np.array([[np.nan, 0, 0, 0], [0, 1, 0, 0]], np.float32)
    _, rows = search.nearest_rows(queries, index, 3, torch.device(device))
    assert rows.tolist() == [[-1, -1, -1], [1, 0, 2]]
    index[2] = np.inf
    _, rows = search.nearest_rows(queries[1:], index, 4, torch.device(device))
    assert rows.tolist() == [[1, 0, 3, -1]]


class TestHalf:
    """``precision = half`` on the CPU, where it is not offered, for its values."""

    def test_whitening(self):
        torch.manual_seed(0)
        built = build_model(
            torch.nn.Identity(), 64, pooling="patchnetvlad", num_clusters=4, num_pcs=32,
            patch_sizes=SIZES, strides=STRIDES, patch_vlad="direct",
        )  # fmt: skip
        built.WPCA[0].weight.data *= 3e5  # out of float16's range
        built.WPCA[0].bias.data *= 3e5
        maps = torch.randn(1, 64, 6, 8)
        exact, half = (Describer(built, precision=p).patches(maps[0]) for p in ("exact", "half"))
        for ours, theirs in zip(half, exact, strict=True):
            assert torch.linalg.vector_norm(ours - theirs, dim=1).max() < 3e-3
            assert not torch.equal(ours, theirs)

    def test_only_on_gpus(self):
        for device in ("cpu", "mps"):
            with pytest.raises(
                DeviceError, match=rf"precision = half .*\b{device}\b.*precision = auto"
            ):
                choose_precision("half", torch.device(device))
        assert choose_precision("half", GPU) == "half"


def test_memory_budget():
    cpu = torch.device("cpu")
    assert memory_budget(100, cpu) == memory_budget(100, GPU) == 100 * 2**20
    assert memory_budget(0, cpu) == 2**30


@pytest.mark.parametrize("device", DEVICES)
def test_upload(device):
    values = np.arange(6, dtype=np.float16).reshape(2, 3)
    found = upload(values, torch.device(device))
    assert found.device.type == torch.device(device).type
    np.testing.assert_array_equal(found.cpu().numpy(), values)


# --- the kernels ----------------------------------------------------------------------------------


class TestKernels:
    @pytest.mark.parametrize(
        "cases",
        [
            {"nearest": 20, "samples": 8, "counts": 8, "sums": 8},
            pytest.param({"nearest": 200}, marks=pytest.mark.slow),
        ],
        ids=["few", "many"],
    )
    def test_interpreted(self, cases):
        """Each equals plain PyTorch to the last bit; see kernel_checks."""
        pytest.importorskip("triton", reason="PyTorch comes without Triton here")
        script = REPOSITORY / "tests" / "kernel_checks.py"
        environment = {
            **os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY),
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, script, *(str(word) for pair in cases.items() for word in pair)],
            env=environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr[-2000:]
        said = [f"{kernel} {number} cases are equal\n" for kernel, number in cases.items()]
        assert done.stdout == "".join(said)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("kernel", ["nearest", "samples", "counts", "sums"])
    def test_compiled(self, kernel):
        import kernel_checks

        kernel_checks.CHECKS[kernel](200, "cuda")

    @pytest.mark.parametrize("capability", [80, 90])
    def test_compiled_without_a_gpu(self, capability):
        """To machine code; products and sums are not fused, so that they round as PyTorch's do."""
        pytest.importorskip("triton", reason="PyTorch comes without Triton here")
        import kernel_checks

        compiled = kernel_checks.compile_all(capability)
        assert len(compiled) == 5
        for name, kernel in compiled.items():
            assert kernel.asm["cubin"]
            if name != "nearest":
                assert "fma.rn" not in kernel.asm["ptx"]
        assert compiled["nearest"].metadata.shared <= 99 * 1024  # a block's most on small GPUs
        assert ("wgmma" if capability == 90 else "mma.sync") in compiled["nearest"].asm["ptx"]
        assert ", 0x10" in compiled["nearest"].asm["ptx"]  # copied 16 bytes at a time

    def test_a_kernel_that_fails_gives_way(self, monkeypatch, caplog):
        """A GPU for which Triton cannot compile is computed on by PyTorch alone."""
        from patchnetvlad.matching import fused as module
        from patchnetvlad.matching import nearest

        class Broken:
            def can_match(self, pairs):
                return True

            def nearest(self, pairs):
                raise ValueError("no such instruction\nand more")

        monkeypatch.setattr(module, "_fused_failed", False)
        monkeypatch.setattr(
            nearest, "fused_kernels", lambda _: None if module._fused_failed else Broken()
        )
        query, candidate = torch.randn(20, 16), torch.randn(30, 16)
        for _ in range(2):
            found = pairs_of(mutual_on_device([(query, candidate)]).numpy())[0]
            np.testing.assert_array_equal(found, mutual_nearest_neighbours(query, candidate))
        assert [r.getMessage() for r in caplog.records] == [
            "Triton cannot compile for this GPU (ValueError: no such instruction); computing with "
            "PyTorch alone"
        ]

    def test_memory_is_no_matter_of_compiling(self, monkeypatch):
        from patchnetvlad.matching import fused as module

        def full():
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(module, "_fused_failed", False)
        with pytest.raises(torch.OutOfMemoryError):
            module.attempt_fused(full)
        assert not module._fused_failed


# --- no tensor on a default device by accident ----------------------------------------------------

MAKERS = {"arange", "empty", "eye", "full", "linspace", "ones", "rand", "randn", "tensor", "zeros"}
ON_THE_CPU = {
    "matching/nearest.py": {"_similarity"},  # which NumPy reads
    "matching/kernels.py": {"nearest"},  # pinned, then copied
    "models/netvlad.py": {"__init__"},  # parameters, moved with the module
    "models/winograd.py": {"__init__", "_both_axes", "_memory"},  # of CPUs alone
    "base/device.py": {"start_download"},  # the copies
}


def makers_without_device():
    package = REPOSITORY / "patchnetvlad"
    rooms = ("matching", "models", "features", "search", "engines")
    for room in (*rooms, "base/device.py", "places/model.py"):
        files = [package / room] if room.endswith(".py") else sorted((package / room).rglob("*.py"))
        for file in files:
            name = file.relative_to(package).as_posix()
            tree = ast.parse(file.read_text(encoding="utf-8"))
            functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
            for function in functions:
                for call in ast.walk(function):
                    if (
                        isinstance(call, ast.Call)
                        and isinstance(call.func, ast.Attribute)
                        and isinstance(call.func.value, ast.Name)
                        and call.func.value.id == "torch"
                        and call.func.attr in MAKERS
                        and not any(word.arg == "device" for word in call.keywords)
                    ):
                        yield name, function.name, call.lineno


def test_tensors_are_made_on_a_device():
    found = {(name, function) for name, function, _ in makers_without_device()}
    allowed = {(name, function) for name, functions in ON_THE_CPU.items() for function in functions}
    assert found == allowed
