# SPDX-License-Identifier: MIT
"""The network's parts, how they are put together, and what checkpoints may hold."""

from __future__ import annotations

import collections
import contextlib
import copy
import os
import re
import zipfile
from dataclasses import replace

import numpy as np
import pytest
import thin
import torch
from conftest import DEVICES
from torch import nn

from patchnetvlad.assets.catalog import SHIPPED_CHECKPOINT
from patchnetvlad.base.device import arithmetic
from patchnetvlad.config import Config
from patchnetvlad.errors import CheckpointError, ConfigError
from patchnetvlad.models import checkpoint as models_checkpoint
from patchnetvlad.models import encoder as models_encoder
from patchnetvlad.models.checkpoint import (
    load_network,
    load_state,
    model_from_state,
    save_safetensors,
)
from patchnetvlad.models.describer import describe
from patchnetvlad.models.encoder import build_encoder, for_inference
from patchnetvlad.models.model import build_model
from patchnetvlad.models.models_generic import get_model
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD
from patchnetvlad.research_code.network_parts import get_backend

CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
ENCODER_KEYS = {f"encoder.{n}.{part}" for n in CONVOLUTIONS for part in ("weight", "bias")}
CONFIG = Config(num_pcs=6, patch_sizes=(2, 3), strides=(1, 2), patch_weights=(0.5, 0.5))


@pytest.fixture(scope="module")
def shipped():
    return load_state(SHIPPED_CHECKPOINT)


@pytest.fixture(scope="module")
def state(shipped):
    """A checkpoint of K = 3 clusters and P = 6 components."""
    generator = torch.Generator().manual_seed(0)
    made = {key: value for key, value in shipped.items() if key.startswith("encoder.")}
    for key, shape in (
        ("pool.centroids", (3, 512)),
        ("pool.conv.weight", (3, 512, 1, 1)),
        ("WPCA.0.weight", (6, 1536, 1, 1)),
        ("WPCA.0.bias", (6,)),
    ):
        made[key] = torch.randn(shape, generator=generator)
    return made


@pytest.fixture(scope="module")
def backend():
    return get_backend()


class TestBackend:
    def test_layers(self, backend):
        dim, encoder = backend
        assert (dim, len(encoder), type(encoder[28])) == (512, 29, nn.Conv2d)
        kinds = collections.Counter(type(layer).__name__ for layer in encoder)
        assert kinds == {"Conv2d": 13, "ReLU": 12, "MaxPool2d": 4}
        trained = {key.split(".")[0] for key, p in encoder.named_parameters() if p.requires_grad}
        assert trained == {"24", "26", "28"}

    def test_weights_are_those_shipped(self, backend, shipped):
        for key, value in backend[1].state_dict().items():
            assert torch.equal(value, shipped[f"encoder.{key}"])

    @pytest.mark.parametrize("size", [(48, 64), (63, 47)])
    def test_output(self, backend, size):
        with torch.no_grad():
            features = backend[1](torch.randn(1, 3, *size))
        assert features.shape == (1, 512, size[0] // 16, size[1] // 16)
        assert features.min() < 0

    def test_random_weights(self, shipped):
        dim, encoder = get_backend(weights=None)
        assert dim == 512
        assert not torch.equal(encoder[0].weight, shipped["encoder.0.weight"])
        assert not encoder[21].weight.requires_grad
        assert encoder[24].weight.requires_grad

    def test_nonsense(self):
        with pytest.raises(ConfigError, match="weights='nonsense'"):
            get_backend(weights="nonsense")


def pool_keys(pooling, vladv2):
    if pooling in ("max", "avg"):
        return set()
    return {"pool.centroids", "pool.conv.weight"} | ({"pool.conv.bias"} if vladv2 else set())


@pytest.mark.parametrize("num_pcs", [0, 5])
@pytest.mark.parametrize("vladv2", [False, True])
@pytest.mark.parametrize("pooling", ["netvlad", "max", "avg", "patchnetvlad"])
class TestModel:
    def test_state_dict(self, pooling, vladv2, num_pcs):
        section = {
            "Pooling": pooling.upper(),
            "num_clusters": "3",
            "num_pcs": num_pcs,
            "patch_sizes": "2, 3",
            "STRIDES": "1,1",
            "vladv2": str(vladv2),
        }
        whitening = {"WPCA.0.weight", "WPCA.0.bias"} if num_pcs else set()
        for append in (True, False):
            model = get_model(nn.Conv2d(3, 4, 1), 4, section, append_pca_layer=append)
            assert {k for k in model.state_dict() if not k.startswith("encoder.")} == (
                pool_keys(pooling, vladv2) | (whitening if append else set())
            )
        if pooling == "patchnetvlad":
            assert (model.pool.patch_sizes, model.pool.strides) == ([2, 3], [1, 1])

    @pytest.mark.parametrize("device", DEVICES)
    def test_describe(self, pooling, vladv2, num_pcs, device):
        torch.manual_seed(0)
        model = build_model(
            nn.Identity(),
            4,
            pooling=pooling,
            num_clusters=3,
            num_pcs=num_pcs,
            vladv2=vladv2,
            patch_sizes=(2, 3),
            strides=(1, 2),
        ).eval()
        images = torch.randn(2, 4, 5, 6)
        found = describe(copy.deepcopy(model).to(device), images)
        for image, described in zip(images, found, strict=True):
            maps = image.double().numpy()
            if pooling in ("max", "avg"):
                expected = maps.max(axis=(1, 2)) if pooling == "max" else maps.mean(axis=(1, 2))
                expected = expected / np.linalg.norm(expected)
                patches = []
            else:
                expected = naive_vlad(model.pool, *naive_cells(model.pool, maps))
                patches = [
                    naive_patches(model.pool, maps, s, t)
                    for s, t in ([(2, 1), (3, 2)] if pooling == "patchnetvlad" else [])
                ]
            np.testing.assert_allclose(
                described.descriptor.cpu(), naive_whitening(model, expected), atol=1e-6
            )
            assert len(described.patches) == len(patches)
            for ours, theirs in zip(described.patches, patches, strict=True):
                np.testing.assert_allclose(ours.cpu(), naive_whitening(model, theirs), atol=1e-6)


def naive_cells(pool, maps):
    """Cells [h * w, D], normalised, and their assignments [h * w, K], in double precision."""
    cells = maps.reshape(len(maps), -1).T.astype(np.float64)
    cells = cells / np.linalg.norm(cells, axis=1, keepdims=True)
    logits = cells @ pool.conv.weight.detach().double().numpy()[:, :, 0, 0].T
    if pool.conv.bias is not None:
        logits = logits + pool.conv.bias.detach().double().numpy()
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    return cells, weights / weights.sum(axis=1, keepdims=True)


def naive_vlad(pool, cells, assignments):
    centroids = pool.centroids.detach().double().numpy()
    vlad = np.zeros(centroids.shape)
    for x, a in zip(cells, assignments, strict=True):
        for k, centroid in enumerate(centroids):
            vlad[k] += a[k] * (x - centroid)
    vlad /= np.linalg.norm(vlad, axis=1, keepdims=True)
    return vlad.ravel() / np.linalg.norm(vlad)


def naive_patches(pool, maps, size, stride):
    cells, assignments = naive_cells(pool, maps)
    height, width = maps.shape[1:]
    place = np.arange(height * width).reshape(height, width)
    return np.array(
        [
            naive_vlad(pool, cells[inside], assignments[inside])
            for i in range(0, height - size + 1, stride)
            for j in range(0, width - size + 1, stride)
            for inside in [place[i : i + size, j : j + size].ravel()]
        ]
    )


def naive_whitening(model, vlad):
    if not hasattr(model, "WPCA"):
        return vlad
    layer = model.WPCA[0]
    weight = layer.weight.detach().double().numpy()[:, :, 0, 0]
    white = vlad @ weight.T + layer.bias.detach().double().numpy()
    return white / np.linalg.norm(white, axis=-1, keepdims=True)


@pytest.mark.parametrize("shape", [(7, 9), (11, 5), (3, 3)])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (3, 2), (2, 3), (3, 5)])
@pytest.mark.parametrize("block_bytes", [1, 2000, 2**27])
@pytest.mark.parametrize("patch_vlad", ["direct", "integral"])
@pytest.mark.parametrize("device", DEVICES)
def test_patches_in_blocks(shape, size, stride, block_bytes, patch_vlad, device):
    torch.manual_seed(1)
    sizes, strides = tuple({size, 1, 3}), tuple({size: stride, 1: 2, 3: 1}[s] for s in {size, 1, 3})
    config = replace(CONFIG, patch_sizes=sizes, strides=strides, patch_vlad=patch_vlad)
    model = get_model(nn.Identity(), 6, replace(config, num_pcs=5), append_pca_layer=True)
    pool, layer = (copy.deepcopy(part).to(device) for part in (model.pool, model.WPCA[0]))
    assert pool.integral == (patch_vlad == "integral")
    maps = torch.randn(6, *shape)
    tolerance = 1e-6 if patch_vlad == "direct" else 1e-4
    with torch.no_grad(), arithmetic(torch.device(device), "exact"):
        x, assignment = pool.assign(maps[None].to(device))
        vectors = pool.whitened(x[0], assignment[0], block_bytes=block_bytes)
        whitened = pool.whitened(
            x[0], assignment[0], layer.weight.flatten(1), layer.bias, block_bytes=block_bytes
        )
        local, _ = pool(maps[None].to(device))
        for i, (s, t) in enumerate(zip(sizes, strides, strict=True)):
            expected = naive_patches(model.pool, maps.numpy(), s, t)
            np.testing.assert_allclose(vectors[i].cpu(), expected, atol=tolerance)
            np.testing.assert_allclose(local[i][0].T.cpu(), expected, atol=tolerance)
            np.testing.assert_allclose(
                whitened[i].cpu(), naive_whitening(model, expected), atol=10 * tolerance
            )


class TestForInference:
    @pytest.mark.parametrize("shape", [(1, 3, 480, 640), (1, 3, 96, 128), (2, 3, 97, 65)])
    def test_equal(self, shape):
        torch.manual_seed(0)
        _, encoder = get_backend()
        encode = for_inference(encoder)
        assert encode is not encoder or not torch.backends.mkldnn.is_available()
        images = torch.randn(shape)
        with torch.no_grad():
            torch.testing.assert_close(encode(images), encoder(images), rtol=1e-5, atol=1e-4)

    def test_others_are_left_alone(self):
        for encoder in (nn.Identity(), nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sigmoid())):
            assert for_inference(encoder) is encoder
        half = build_encoder().half()
        assert for_inference(half) is half

    @pytest.mark.parametrize("rows", [2, 6, 64])
    @pytest.mark.parametrize("size", [(33, 40), (64, 64), (70, 18), (131, 20)])
    def test_strips(self, monkeypatch, rows, size):
        """Working on strips of an image gives what working on the whole gives."""
        encoder = build_encoder()[:12]
        images = torch.randn(2, 3, *size)
        monkeypatch.setattr(models_encoder, "_STRIP_CELLS", 2 * rows * size[1])
        in_strips = for_inference(encoder)(images)
        monkeypatch.setattr(models_encoder, "_STRIP_CELLS", 10**9)
        whole = for_inference(encoder)(images)
        torch.testing.assert_close(in_strips, whole, rtol=1e-5, atol=1e-5)


def test_patches_that_do_not_fit():
    pool = PatchNetVLAD(2, 3, patch_sizes="4", strides="1")
    with pytest.raises(ConfigError, match=r"\b4\b.*\b3 x 9\b.*patch_sizes"):
        pool(torch.randn(1, 3, 3, 9))


def test_blank_maps_give_no_nan():
    for pool in (NetVLAD(3, 4), PatchNetVLAD(3, 4, patch_sizes="2", strides="1")):
        out = pool(torch.zeros(1, 4, 5, 5))
        for values in (out,) if isinstance(out, torch.Tensor) else (*out[0], out[1]):
            assert torch.isfinite(values).all()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"pooling": "gem", "num_pcs": 0}, "pooling 'gem'.*netvlad"),
        (
            {"pooling": "patchnetvlad", "num_pcs": 0, "patch_sizes": "2,5", "strides": "1"},
            r"\b2 patch sizes\b.*\b1 strides",
        ),
    ],
)
def test_models_that_cannot_be(section, words):
    with pytest.raises(ConfigError, match=words):
        get_model(nn.Identity(), 4, section)


def test_get_model_of_a_config():
    model = get_model(nn.Identity(), 4, CONFIG, append_pca_layer=True)
    assert model.pool.centroids.shape == (64, 4)
    assert model.WPCA[0].weight.shape == (6, 256, 1, 1)
    assert (model.pool.patch_sizes, model.pool.strides) == ([2, 3], [1, 2])
    assert model.pool.integral


class TestInitParams:
    @pytest.mark.parametrize("layer", [NetVLAD, PatchNetVLAD])
    def test_v2_is_a_softmax_of_squared_distances(self, layer):
        rng = np.random.default_rng(0)
        clusters, descriptors = rng.standard_normal((5, 8)), rng.standard_normal((300, 8))
        pool = layer(5, 8, normalize_input=False, vladv2=True)
        pool.init_params(clusters, descriptors)
        squared = ((descriptors[:, None] - clusters) ** 2).sum(axis=2)
        nearest = np.sort(squared, axis=1)
        alpha = -np.log(0.01) / np.mean(nearest[:, 1] - nearest[:, 0])
        assert pool.alpha == pytest.approx(alpha, rel=1e-5)
        expected = np.exp(-alpha * (squared - nearest[:, :1]))
        expected /= expected.sum(axis=1, keepdims=True)
        with torch.no_grad():
            _, assignment = pool.assign(torch.from_numpy(descriptors.T[None, :, None]).float())
        np.testing.assert_allclose(assignment[0, :, 0].T, expected, atol=1e-4)
        np.testing.assert_allclose(pool.centroids.detach(), clusters, atol=1e-6)

    @pytest.mark.parametrize(
        ("clusters", "descriptors", "words"),
        [
            ((4, 8), (9, 8), "clsts"),
            ((5, 7), (9, 8), "clsts"),
            ((5, 8), (9, 7), "traindescs"),
            ((5, 8), (0, 8), "traindescs"),
            ((5, 8), (8,), "traindescs"),
        ],
    )
    def test_shapes(self, clusters, descriptors, words):
        shape = clusters if words == "clsts" else descriptors
        with pytest.raises(ValueError, match=rf"{words} .*{re.escape(str(shape))}"):
            NetVLAD(5, 8).init_params(np.ones(clusters), np.ones(descriptors))

    def test_one_cluster(self):
        with pytest.raises(ValueError, match=r"clsts .*\(1, 8\)"):
            NetVLAD(1, 8).init_params(np.ones((1, 8)), np.ones((9, 8)))


class TestModelFromState:
    def test_numbers_are_read_from_the_checkpoint(self, state):
        model = model_from_state(CONFIG, state)
        assert set(model.state_dict()) == ENCODER_KEYS | set(state)
        assert (model.pool.num_clusters, len(model.WPCA[0].weight)) == (3, 6)
        assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())

    def test_whitening_may_be_a_matrix_and_more_may_be_there(self, state):
        flat = {**state, "WPCA.0.weight": state["WPCA.0.weight"][:, :, 0, 0], "x": torch.ones(1)}
        model = model_from_state(replace(CONFIG, pooling="netvlad"), flat)
        assert torch.equal(model.WPCA[0].weight, state["WPCA.0.weight"])

    def test_max_pooling_needs_the_encoder_alone(self, state):
        encoder = {key: state[key] for key in ENCODER_KEYS}
        model = model_from_state(replace(CONFIG, pooling="max", num_pcs=0), encoder)
        assert set(model.state_dict()) == ENCODER_KEYS

    @pytest.mark.parametrize(
        ("change", "settings", "words"),
        [
            ({}, {"num_pcs": 512}, ["num_pcs = 512", "num_pcs = 6"]),
            ({"WPCA.0.weight": None}, {}, ["num_pcs = 6", "num_pcs = 0"]),
            ({}, {"vladv2": True}, ["vladv2 = False"]),
            ({"pool.conv.bias": (3,)}, {}, ["vladv2 = True"]),
            ({"pool.centroids": None}, {}, ["pooling = max or avg"]),
            ({}, {"pooling": "avg"}, ["1536 dimensions", "pooling = avg", "512"]),
            ({"pool.centroids": (4, 512)}, {}, ["1536 dimensions", "2048"]),
            ({"pool.centroids": (3,)}, {}, ["'pool.centroids'", "[3]", "[K, 512]"]),
            ({"pool.centroids": ()}, {}, ["'pool.centroids'", "[]"]),
            ({"pool.centroids": (3, 64)}, {}, ["'pool.centroids'", "[3, 64]", "[3, 512]"]),
            ({"pool.conv.weight": None}, {}, ["'pool.conv.weight'", "missing"]),
            ({"pool.conv.weight": (4, 512, 1, 1)}, {}, ["'pool.conv.weight'", "[4, 512, 1, 1]"]),
            ({"WPCA.0.weight": (6,)}, {}, ["'WPCA.0.weight'", "[6]", "[6, 1536, 1, 1]"]),
            ({"WPCA.0.weight": ()}, {}, ["'WPCA.0.weight'", "[]"]),
            ({"WPCA.0.weight": (6, 1536, 3, 3)}, {}, ["'WPCA.0.weight'", "[6, 1536, 3, 3]"]),
            ({"WPCA.0.bias": None}, {}, ["'WPCA.0.bias'", "missing"]),
            ({"encoder.0.weight": None}, {}, ["'encoder.0.weight'", "encoder.0.bias"]),
            ({"encoder.28.bias": None}, {}, ["'encoder.28.bias'", "missing"]),
            ({"encoder.5.weight": (1, 1)}, {}, ["'encoder.5.weight'", "[1, 1]"]),
            ({"encoder.5.bias": torch.full((128,), torch.nan)}, {}, ["'encoder.5.bias'", "NaN"]),
            ({"WPCA.0.bias": torch.full((6,), torch.inf)}, {}, ["'WPCA.0.bias'", "infinite"]),
        ],
    )
    def test_misfits(self, state, monkeypatch, change, settings, words):
        # A random start of the encoder decides nothing here, and takes time.
        monkeypatch.setattr(nn.Conv2d, "reset_parameters", lambda self: None)
        other = dict(state)
        for key, value in change.items():
            if value is None:
                del other[key]
            else:
                other[key] = torch.zeros(value) if isinstance(value, tuple) else value
        with pytest.raises(CheckpointError) as caught:
            model_from_state(replace(CONFIG, **settings), other, source="my.pth.tar")
        message = str(caught.value)
        assert message.startswith("my.pth.tar")
        assert all(word in message for word in words), message

    def test_empty(self):
        with pytest.raises(CheckpointError, match=r"encoder\.0\.weight"):
            model_from_state(CONFIG, {})


TINY = {
    "encoder.0.weight": torch.arange(12.0).reshape(2, 6) / 8,
    "pool.centroids": torch.arange(4.0) / 4,
    "WPCA.0.weight": torch.arange(6, dtype=torch.float64) / 16,
    "steps": torch.tensor(7),
}


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def training_state():
    weight = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([weight], lr=0.1, momentum=0.9)
    weight.sum().backward()
    optimizer.step()
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5)
    return {
        "epoch": 3,
        "best_score": np.float64(0.87),
        "recalls": {1: np.float64(0.5), 5: np.float32(0.75)},
        "not_improved": np.int64(2),
        "parallel": True,
        "optimizer": optimizer.state_dict(),
        "scheduler": {k: v for k, v in scheduler.state_dict().items() if k != "_get_lr"},
    }


class TestFiles:
    @staticmethod
    def check(path):
        loaded = load_state(path)
        assert set(loaded) == set(TINY)
        for key, value in TINY.items():
            assert torch.equal(loaded[key], value.float() if value.is_floating_point() else value)
            assert loaded[key].dtype == (torch.int64 if key == "steps" else torch.float32)

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            lambda state: {"state_dict": state},
            lambda state: {"state_dict": collections.OrderedDict(state), **training_state()},
            lambda state: {f"module.{key}": value for key, value in state.items()},
            lambda state: {f"module.module.{key}": value for key, value in state.items()},
            lambda state: {
                "state_dict": {k.replace(".", ".module.", 1): v for k, v in state.items()}
            },
            lambda state: {
                k: v.half() if v.dtype == torch.float32 else v for k, v in state.items()
            },
        ],
        ids=["bare", "state_dict", "training", "parallel", "twice", "inside", "half"],
    )
    def test_torch(self, tmp_path, wrap, zipped):
        path = tmp_path / "tiny.pth.tar"
        torch.save(wrap(TINY), path, _use_new_zipfile_serialization=zipped)
        self.check(str(path))

    @pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
    def test_safetensors(self, tmp_path, dtype):
        path = tmp_path / "tiny.safetensors"
        save_safetensors(TINY, path, dtype)
        self.check(path)
        assert [file.name for file in tmp_path.iterdir()] == [path.name]
        assert path.stat().st_mode & 0o777 == 0o644

    def test_prefix(self, tmp_path):
        torch.save({f"module.{key}": value for key, value in TINY.items()}, tmp_path / "a.pth")
        assert list(load_state(tmp_path / "a.pth", prefix="encoder.")) == ["0.weight"]

    def test_names_that_merely_contain_module(self, tmp_path):
        torch.save({"submodule.a": torch.ones(1)}, tmp_path / "a.pth")
        assert list(load_state(tmp_path / "a.pth")) == ["submodule.a"]

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize("beside", [True, False])
    def test_pickled_code_is_not_run(self, tmp_path, zipped, beside):
        path, proof = tmp_path / "evil.pth.tar", tmp_path / "proof"
        content = {"state_dict": TINY, "opt": Evil(proof)} if beside else Evil(proof)
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
        with pytest.raises(CheckpointError, match=rf"{path} .*open\).*state_dict"):
            load_state(path)
        assert not proof.exists()

    @pytest.mark.parametrize(
        "content",
        [
            TINY["pool.centroids"],
            [TINY],
            {"state_dict": [1, 2]},
            {"state_dict": {"a": 1}},
            {"epoch": 3},
            {0: torch.ones(1)},
        ],
        ids=["tensor", "list", "list-inside", "number-inside", "number", "key"],
    )
    def test_no_state_dict(self, tmp_path, content):
        path = tmp_path / "a.pth"
        torch.save(content, path)
        with pytest.raises(CheckpointError, match=f"{path} .*state_dict"):
            load_state(path)

    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    @pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
    def test_damaged(self, tmp_path, kind):
        path = tmp_path / ("a.safetensors" if kind == "safetensors" else "a.pth.tar")
        if kind == "safetensors":
            save_safetensors(TINY, path)
        else:
            torch.save(TINY, path, _use_new_zipfile_serialization=kind == "zip")
        whole, rng = path.read_bytes(), np.random.default_rng(0)
        cut = [whole[:length] for length in (0, 1, 9, len(whole) // 3, len(whole) - 9)]
        text = [bytes([first]) + b"his is text\n" for first in range(32, 127)]
        for raw in cut + text:
            path.write_bytes(raw)
            with pytest.raises(CheckpointError) as caught:
                load_state(path)
            assert str(path) in str(caught.value)
            assert "\n" not in str(caught.value)
        for _ in range(200):  # Flipped bits may go unnoticed; but nothing else may be raised.
            raw = bytearray(whole)
            raw[rng.integers(min(len(raw), 300))] ^= 1 << int(rng.integers(8))
            path.write_bytes(raw)
            with contextlib.suppress(CheckpointError):
                assert all(isinstance(value, torch.Tensor) for value in load_state(path).values())

    @pytest.mark.filterwarnings("ignore")  # PyTorch's, of kinds of tensors
    @pytest.mark.parametrize(
        "make",
        [
            lambda: torch.eye(3).to_sparse(),
            lambda: torch.eye(3).to_sparse_csr(),
            lambda: torch.ones(3, device="meta"),
            lambda: torch.ones(3, dtype=torch.complex64),
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            lambda: torch.zeros(1).as_strided((2**20, 2**20), (0, 0)),
            lambda: torch.zeros(4).as_strided((4, 3), (0, 1)),
        ],
        ids=["sparse", "rows", "meta", "complex", "quantised", "stride 0", "overlap"],
    )
    def test_no_plain_tensors(self, tmp_path, make):
        torch.save({"state_dict": {**TINY, "x": make()}}, tmp_path / "a.pth.tar")
        with pytest.raises(CheckpointError, match=rf"{tmp_path}/a\.pth\.tar: .*'x'"):
            load_state(tmp_path / "a.pth.tar")

    def test_it_would_unpack_to_far_more(self, tmp_path):
        path = tmp_path / "a.pth.tar"
        torch.save({"state_dict": {"x": torch.zeros(10**6)}}, tmp_path / "whole")
        assert load_state(tmp_path / "whole")["x"].shape == (10**6,)
        with (
            zipfile.ZipFile(tmp_path / "whole") as whole,
            zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed,
        ):
            for name in whole.namelist():
                packed.writestr(name, whole.read(name))
        with pytest.raises(CheckpointError, match=rf"{path} .*\b4 MB"):
            load_state(path)

    @pytest.mark.parametrize(
        "change",
        [
            {"encoder.0.weight": lambda w: w.to(torch.int8)},
            {"pool.centroids": lambda c: c > 0},
            {"pool.centroids": lambda c: c[:0]},
        ],
        ids=["integers", "booleans", "no clusters"],
    )
    def test_what_is_no_network(self, monkeypatch, change):
        monkeypatch.setattr(models_checkpoint, "build_encoder", thin.build_encoder)
        state = thin.state()
        for key, of in change.items():
            state[key] = of(state[key])
        with pytest.raises(CheckpointError, match=rf"{next(iter(change))}.*(int8|bool)|K = 0"):
            model_from_state(Config.load("demo"), state)

    @pytest.mark.parametrize("name", ["absent.pth.tar", "absent.safetensors"])
    def test_absent(self, tmp_path, name):
        with pytest.raises(CheckpointError, match=f"{tmp_path}/{name} .*exist"):
            load_state(tmp_path / name)
        os.mkdir(tmp_path / name)
        with pytest.raises(CheckpointError, match=f"{tmp_path}/{name} "):
            load_state(tmp_path / name)


def test_load_model(tmp_path, state):
    """From a file of training, in double precision and with DataParallel's prefixes."""
    parallel = {
        f"module.{key.replace('encoder.', 'encoder.module.')}": value
        for key, value in state.items()
    }
    for key in ("WPCA.0.weight", "WPCA.0.bias"):
        parallel[f"module.{key}"] = state[key].double()
    path = tmp_path / "mine_WPCA6.pth.tar"
    torch.save({"state_dict": parallel, **training_state()}, path)
    model = load_network(replace(CONFIG, resume_path=str(tmp_path / "mine_WPCA")), "cpu")
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    with torch.no_grad():
        (described,) = describe(model, torch.randn(1, 3, 64, 80))
    assert described.descriptor.shape == (6,)
    assert [tuple(patches.shape) for patches in described.patches] == [(12, 6), (2, 6)]
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[key])
