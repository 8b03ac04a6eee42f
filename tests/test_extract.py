# SPDX-License-Identifier: MIT
"""The stream of extraction: memory, devices, precision, space, and what happens on errors."""

from __future__ import annotations

import logging
import re
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import DEVICES
from PIL import Image
from torch import nn

from patchnetvlad.base import device
from patchnetvlad.base.device import arithmetic, choose_devices, choose_precision, run_parallel
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import input_transform, load_image
from patchnetvlad.engines import local, local_extract
from patchnetvlad.errors import DeviceError, FeatureError, ImageError
from patchnetvlad.features.open import open_reader
from patchnetvlad.models.checkpoint import load_network
from patchnetvlad.models.describer import Describer, describe
from patchnetvlad.models.model import build_model
from patchnetvlad.pipeline.extract import extract

HEIGHT, WIDTH = 96, 128
CONFIG = Config(
    resume_path="./pretrained_models/imagenet_WPCA",
    num_pcs=128,
    image_size=(HEIGHT, WIDTH),
    match_image_size=(HEIGHT, WIDTH),
    patch_sizes=(2, 3),
    strides=(1, 1),
    patch_weights=(0.5, 0.5),
    cache_batch_size=2,
)
PATCHES = 5 * 7 + 4 * 6


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(5):
        blocks = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((160, 120)).save(root / f"{i}.png")
    (root / "list.txt").write_text("".join(f"{i}.png\n" for i in range(5)))
    return root


@pytest.fixture(scope="module")
def model():
    return load_network(CONFIG, "cpu")


def run(images, out, config=CONFIG, *, device="cpu", **keywords):
    return extract(
        config, images / "list.txt", images, out, device=device, progress=False, **keywords
    )


def content(folder):
    return {
        file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".npy", ".bin")
    }


class TestMemory:
    @pytest.fixture
    def tiny(self):
        """A model whose encoder passes on its images, of 8 channels, as feature maps."""
        torch.manual_seed(0)
        model = build_model(
            nn.Identity(), 8, pooling="patchnetvlad", num_clusters=6, num_pcs=5,
            patch_sizes=(2, 3), strides=(1, 2),
        )  # fmt: skip
        return model.eval().requires_grad_(False)

    def test_budget_does_not_change_descriptors(self, tiny):
        images = torch.randn(3, 8, 6, 7)
        expected = describe(tiny, images)
        assert describe(tiny, images[:0]) == []
        for block_bytes in (1, 3000, 10000):
            describer = Describer(tiny)
            describer._block_bytes = block_bytes
            found = describer.describe(images)
            for ours, theirs in zip(found, expected, strict=True):
                torch.testing.assert_close(ours.descriptor, theirs.descriptor)
                for a, b in zip(ours.patches, theirs.patches, strict=True):
                    torch.testing.assert_close(a, b)

    def test_batches_halve_when_memory_runs_out(self, tiny, caplog):
        describer = Describer(tiny)
        describer.device = torch.device("meta")  # anything but a CPU, which takes one at a time
        seen = []

        class Encoder(nn.Module):
            def forward(self, x):
                seen.append(len(x))
                if len(x) > 2:
                    raise torch.OutOfMemoryError("out of memory")
                return x

        describer._encode = Encoder()
        images = torch.randn(9, 8, 6, 7)
        with caplog.at_level(logging.INFO), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.Tensor, "to", lambda self, *a, **k: self)
            encoded = describer.encode(images)
        torch.testing.assert_close(encoded, images)
        assert seen[:3] == [9, 4, 2]
        assert sum(seen[2:]) == 9
        assert " 2 at a time" in caplog.text

    def test_blocks_halve_when_memory_runs_out(self, tiny, monkeypatch, caplog):
        describer = Describer(tiny)
        feature_map = torch.randn(8, 6, 7)
        expected = describer.patches(feature_map)
        whitened, blocks = tiny.pool.whitened, []

        def short_of_memory(*arguments, block_bytes):
            blocks.append(block_bytes)
            if block_bytes > 4 * 2**20:
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return whitened(*arguments, block_bytes=block_bytes)

        monkeypatch.setattr(tiny.pool, "whitened", short_of_memory)
        with caplog.at_level(logging.INFO):
            found = describer.patches(feature_map)
        assert blocks == [2**25, 2**24, 2**23, 2**22]
        assert " 4 MiB" in caplog.text
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b)
        describer.patches(feature_map)
        assert blocks[4:] == [2**22]  # it remembers

    @pytest.mark.parametrize(("kind", "together"), [("cpu", 3), ("meta", 1)])
    def test_threads_take_turns_where_a_block_fills_the_memory(
        self, tiny, monkeypatch, kind, together
    ):
        describer = Describer(tiny)
        describer.device = torch.device(kind)  # meta stands for a GPU
        whitened = tiny.pool.whitened
        working, most, meeting = [], [], threading.Barrier(together)

        def counted(*arguments, **keywords):
            meeting.wait(10)  # raises, where there are not so many at a time
            working.append(1)
            most.append(len(working))
            time.sleep(0.05)
            working.pop()
            return whitened(*arguments, **keywords)

        monkeypatch.setattr(tiny.pool, "whitened", counted)
        with ThreadPoolExecutor(3) as pool:
            assert len(list(pool.map(describer.patches, torch.randn(3, 8, 6, 7)))) == 3
        assert max(most) <= together

    def test_too_little_for_one_image(self, tiny, monkeypatch):
        def never(*arguments, **keywords):
            raise torch.OutOfMemoryError("CUDA out of memory")

        monkeypatch.setattr(tiny.pool, "whitened", never)
        with pytest.raises(DeviceError, match=r"\bcpu\b.*imageresizeh, imageresizew.*--device"):
            Describer(tiny).patches(torch.randn(8, 6, 7))

    def test_other_errors_are_not_taken_for_it(self, tiny, monkeypatch):
        def broken(*arguments, **keywords):
            raise RuntimeError("shape mismatch")

        monkeypatch.setattr(tiny.pool, "whitened", broken)
        with pytest.raises(RuntimeError, match="shape mismatch"):
            Describer(tiny).patches(torch.randn(8, 6, 7))


class TestStream:
    def test_batches_and_threads_change_nothing(self, images, tmp_path):
        run(images, tmp_path / "a")
        run(images, tmp_path / "b", replace(CONFIG, cache_batch_size=5, threads=3, memory_mb=64))
        assert content(tmp_path / "a") == content(tmp_path / "b")

    def test_several_devices_share_the_images_in_order(self, images, tmp_path, monkeypatch):
        run(images, tmp_path / "a")
        used = []
        original = local_extract._describe_batch

        def slow_at_first(describer, batch, kind):
            used.append(describer)
            if batch[0][0] == 0:
                time.sleep(0.5)
            return original(describer, batch, kind)

        monkeypatch.setattr(local, "choose_devices", lambda *_: [torch.device("cpu")] * 2)
        monkeypatch.setattr(local_extract, "_describe_batch", slow_at_first)
        run(images, tmp_path / "b")
        assert len(set(used)) == 2
        assert content(tmp_path / "a") == content(tmp_path / "b")

    def test_an_error_of_one_device_ends_the_run_and_keeps_the_rest(
        self, images, tmp_path, monkeypatch
    ):
        original = local_extract._describe_batch

        def fails(describer, batch, kind):
            if batch[0][0] == 4:
                raise DeviceError("lost")
            return original(describer, batch, kind)

        monkeypatch.setattr(local, "choose_devices", lambda *_: [torch.device("cpu")] * 2)
        with monkeypatch.context() as patch:
            patch.setattr(local_extract, "_describe_batch", fails)
            with pytest.raises(DeviceError, match="lost"):
                run(images, tmp_path / "a")
        run(images, tmp_path / "a")
        run(images, tmp_path / "b")
        assert content(tmp_path / "a") == content(tmp_path / "b")

    def test_an_error_in_writing_ends_the_run(self, images, tmp_path, monkeypatch):
        from patchnetvlad.features.store.writer import StoreWriter

        write = StoreWriter.write

        def fails(self, i, *rest):
            if i == 3:
                raise FeatureError("no space")
            write(self, i, *rest)

        with monkeypatch.context() as patch:
            patch.setattr(StoreWriter, "write", fails)
            with pytest.raises(FeatureError, match="no space"):
                run(images, tmp_path / "a")
        run(images, tmp_path / "a")
        run(images, tmp_path / "b")
        assert content(tmp_path / "a") == content(tmp_path / "b")

    def test_a_broken_image(self, images, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"\x89PNG")
        lines = [images / "0.png", tmp_path / "broken.png", images / "1.png"]
        (tmp_path / "list.txt").write_text("".join(f"{line}\n" for line in lines))
        with pytest.raises(
            ImageError, match=r"\b1 of 3 images\b.*broken\.png \(.*list\.txt, line 2\)"
        ):
            run(tmp_path, tmp_path / "out")
        Image.new("RGB", (160, 120), "red").save(tmp_path / "broken.png")
        assert run(tmp_path, tmp_path / "out").shape == (3, 128)

    def test_an_image_listed_twice_is_computed_once(self, images, tmp_path):
        (images / "twice.txt").write_text("0.png\n1.png\n./0.png\n")
        out = extract(
            CONFIG, images / "twice.txt", images, tmp_path / "out", device="cpu", progress=False
        )
        np.testing.assert_array_equal(out[0], out[2])
        size = (tmp_path / "out" / "features-00000.bin").stat().st_size
        assert size == 2 * (4 * 128 + 2 * 128 * PATCHES)

    @pytest.mark.parametrize("device", DEVICES)
    @pytest.mark.parametrize("kind", ["float16", "int8", "map", "npy"])
    def test_what_is_written_is_what_the_network_says(self, images, model, tmp_path, device, kind):
        """Of every image its own features, whatever order a device works in."""
        config = replace(
            CONFIG, local_features=kind, precision="exact", patch_vlad="direct", cache_batch_size=3
        )
        run(images, tmp_path, config, device=device)
        names = [f"{i}.png" for i in range(5)]
        reader = open_reader(tmp_path, names, config, images)
        transform = input_transform(config.image_size)
        expected = Describer(load_network(config, "cpu"))
        for i, name in enumerate(names):
            (described,) = expected.describe(transform(load_image(images / name))[None])
            row = reader.global_descriptors[i]
            np.testing.assert_allclose(row, described.descriptor, atol=2e-5)
            if kind == "map":
                continue
            for ours, theirs in zip(reader.patches(i), described.patches, strict=True):
                assert (ours * theirs).sum(dim=1).min() > (0.99999 if kind == "npy" else 0.999)


class TestSpace:
    def test_the_need_is_said(self, images, tmp_path, caplog):
        with caplog.at_level(logging.INFO):
            run(images, tmp_path / "out")
        each = 2 * 128 * PATCHES + 8 * 128
        assert re.search(rf"\b5 images\b.* {5 * each / 1000:.3g} kB", caplog.text)
        size = sum(len(data) for data in content(tmp_path / "out").values())
        assert size == pytest.approx(5 * each, abs=200)  # the header of globalfeats.npy

    def test_a_disk_that_has_not_got_it(self, images, tmp_path, monkeypatch):
        free = SimpleNamespace(free=50_000)
        monkeypatch.setattr("shutil.disk_usage", lambda path: free)
        with pytest.raises(FeatureError) as caught:
            run(images, tmp_path / "out")
        message = str(caught.value)
        assert re.search(r"80\.6 kB.*/out .*\b50 kB\b.*local_features = int8 ", message)
        assert "float16" not in message
        assert not content(tmp_path / "out")
        free.free = 10**9
        assert run(images, tmp_path / "out").shape == (5, 128)
        free.free = 60_000  # as much again makes way
        assert run(images, tmp_path / "out", resume=False).shape == (5, 128)
        free.free = 0
        assert run(images, tmp_path / "out").shape == (5, 128)  # nothing is left to write


class TestPrecision:
    def test_choice(self):
        assert choose_precision("auto", torch.device("cpu")) == "exact"
        assert choose_precision("auto", torch.device("cuda")) == "fast"
        assert choose_precision("exact", torch.device("cuda")) == "exact"
        assert choose_precision("fast", torch.device("cpu")) == "fast"
        assert choose_precision("fast", torch.device("mps")) == "exact"

    def test_settings_of_several_jobs(self, monkeypatch):
        """The first decides, the last puts back; also what a user has set by the new names."""
        cuda = torch.device("cuda")  # settings can be made without one

        def settings():
            return [getattr(owner, name) for owner, name in device._tf32_settings()]

        before = settings()
        with arithmetic(cuda, "fast"):
            fast = settings()
            inner = arithmetic(cuda, "fast")
            inner.__enter__()
        assert settings() == fast != before
        inner.__exit__(None, None, None)
        assert settings() == before
        with arithmetic(cuda, "exact"):
            assert all(value in (False, "ieee") for value in settings())
        with arithmetic(torch.device("cpu"), "fast"):
            assert settings() == before
        assert settings() == before

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("precision", ["exact", "fast", "half"])
    def test_on_a_gpu(self, model, precision):
        torch.manual_seed(0)
        images = torch.randn(3, 3, HEIGHT, WIDTH)
        config = replace(CONFIG, patch_vlad="direct")
        expected = Describer(load_network(config, "cpu")).describe(images)
        found = Describer(load_network(config, "cuda"), precision=precision).describe(images)
        least = 0.99999 if precision == "exact" else 0.99
        for ours, theirs in zip(found, expected, strict=True):
            assert (ours.descriptor.cpu() * theirs.descriptor).sum() > least
            for a, b in zip(ours.patches, theirs.patches, strict=True):
                assert (a.cpu() * b).sum(dim=1).min() > least


class TestDevices:
    def test_how_many(self, monkeypatch):
        assert choose_devices("cpu", 4) == [torch.device("cpu")]
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)

        def names(name, count):
            return [str(device) for device in choose_devices(name, count)]

        assert names("auto", 1) == ["cuda:0"]
        assert names("cuda", 2) == ["cuda:0", "cuda:1"]
        assert names("auto", 0) == names("auto", 8) == ["cuda:0", "cuda:1", "cuda:2"]
        assert names("cuda:2", 3) == ["cuda:2"]

    def test_parallel_work_in_order(self):
        before = torch.get_num_threads()
        try:
            for threads in (2, 3, 1):
                torch.set_num_threads(threads)
                inside = run_parallel(lambda i: (i, torch.get_num_threads()), 10)
                assert inside == [(i, 1) for i in range(10)]
                assert torch.get_num_threads() == threads
        finally:
            torch.set_num_threads(before)
