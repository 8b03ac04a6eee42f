# SPDX-License-Identifier: MIT
"""A checkpoint from images alone: vocabulary, whitening, files."""

from __future__ import annotations

import hashlib
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from place_data import SMALL, picture, write_list

from patchnetvlad.cli.fit import main
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.errors import (
    ArgumentError,
    CheckpointError,
    ImageError,
    ImageListError,
    OutputError,
)
from patchnetvlad.models.checkpoint import load_network, load_state
from patchnetvlad.models.describer import describe
from patchnetvlad.models.whitening import pca
from patchnetvlad.training.clusters import Clusters, cluster
from patchnetvlad.training.fit import fit
from patchnetvlad.training.whitening import whitening_layer

pytestmark = pytest.mark.usefixtures("thin_network")

COUNT = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    (folder / "below").mkdir()
    for i in range(COUNT):
        picture(i).save(folder / ("below" if i % 2 else "") / f"{i}.png")
    return folder


def fit_small(images, output, **more):
    settings = {"config": SMALL, "num_clusters": 4, "num_pcs": 8, "progress": False, **more}
    return fit(images, output, **settings)


class TestFit:
    @pytest.mark.parametrize("suffix", [".pth.tar", ".safetensors"])
    def test_can_be_used(self, images, tmp_path, suffix):
        made = fit_small(images, tmp_path / "new" / f"mine{suffix}")
        config = replace(SMALL, resume_path=str(made.checkpoint), num_pcs=8)
        model = load_network(config)
        assert model.pool.num_clusters == 4
        queries = torch.stack([torch.randn(3, 96, 128) for _ in range(2)])
        first, second = describe(model, queries)
        assert first.descriptor.shape == (8,)
        assert first.patches[0].shape[1] == 8
        assert not torch.allclose(first.descriptor, second.descriptor)
        assert (made.num_images, made.num_broken) == (COUNT, 0)
        assert sorted(file.name for file in made.checkpoint.parent.iterdir()) == [
            "mine.md", made.checkpoint.name,
        ]  # fmt: skip

    def test_descriptors_are_white(self, images, tmp_path):
        made = fit_small(images, tmp_path / "mine.safetensors")
        state = load_state(made.checkpoint)
        bare = load_network(replace(SMALL, pooling="netvlad", num_pcs=0,
                                    resume_path=str(made.checkpoint)))  # fmt: skip
        transform = input_transform(SMALL.image_size)
        tensors = [transform(picture(i)) for i in range(COUNT)]
        with torch.no_grad():
            vectors = bare.pool(bare.encoder(torch.stack(tensors)))
        white = vectors @ state["WPCA.0.weight"].flatten(1).T + state["WPCA.0.bias"]
        torch.testing.assert_close(white.mean(0), torch.zeros(8), atol=1e-4, rtol=0)
        torch.testing.assert_close(torch.cov(white.T), torch.eye(8), atol=1e-3, rtol=0)

    def test_same_again(self, images, tmp_path):
        one, two = (fit_small(images, tmp_path / f"{n}.safetensors") for n in "ab")
        assert one.checkpoint.read_bytes() == two.checkpoint.read_bytes()
        other = fit_small(images, tmp_path / "c.safetensors", seed=1)
        assert other.checkpoint.read_bytes() != one.checkpoint.read_bytes()

    def test_card(self, images, tmp_path):
        made = fit_small(images, tmp_path / "mine.pth.tar", seed=5)
        card = made.card.read_text()
        assert hashlib.sha256(made.checkpoint.read_bytes()).hexdigest() in card
        assert str(images) in card
        assert "| seed | 5 |" in card
        assert "128 x 96 px" in card

    def test_recalls_of_places(self, images, tmp_path, capsys):
        """Every image and its copy are a place; each finds the other."""
        for i in range(COUNT):
            picture(i).save(tmp_path / f"{i}.png")
            noise = np.random.default_rng(i).integers(-9, 9, np.asarray(picture(i)).shape)
            copy = np.clip(np.asarray(picture(i)).astype(int) + noise, 0, 255).astype(np.uint8)
            Image.fromarray(copy).save(tmp_path / f"{i}again.png")
        names = [f"{i}{which}.png" for i in range(COUNT) for which in ("", "again")]
        (tmp_path / "list.txt").write_text("\n".join(names))
        np.save(tmp_path / "xy.npy", [[100.0 * (i // 2), i % 2] for i in range(2 * COUNT)])
        (tmp_path / "small.ini").write_text(
            "[feature_extract]\ncachebatchsize = 4\nimageresizeW = 128\nimageresizeH = 96\n"
            "[global_params]\npooling = netvlad\nresumePath = none\nnum_pcs = 8\n"
        )
        words = ["--images", str(tmp_path / "list.txt"), "--dataset_root_dir", str(tmp_path)]
        words += ["--positions", str(tmp_path / "xy.npy"), "--valdistthr", "2"]
        words += ["--num_clusters", "4", "--num_pcs", "8", "--output", str(tmp_path / "m.pth.tar")]
        assert main([*words, "--config_path", str(tmp_path / "small.ini"), "--nocuda"]) == 0
        assert "1: 1.0000, 5: 1.0000, 10: 1.0000" in capsys.readouterr().out
        assert "| 1 | 1.0000 |" in (tmp_path / "m.md").read_text()

    def test_half_takes_half(self, images, tmp_path):
        whole, half = (
            fit_small(images, tmp_path / f"{half}.pth.tar", half=half) for half in (False, True)
        )
        sizes = [made.checkpoint.stat().st_size for made in (whole, half)]
        assert sizes[1] == pytest.approx(sizes[0] / 2, rel=0.05)

    def test_vladv2_has_a_bias(self, images, tmp_path):
        made = fit_small(images, tmp_path / "mine.pth.tar", vladv2=True)
        config = replace(SMALL, resume_path=str(made.checkpoint), num_pcs=8, vladv2=True)
        assert load_network(config).pool.conv.bias.shape == (4,)

    def test_keeps_a_vocabulary(self, images, tmp_path):
        first = fit_small(images, tmp_path / "first.pth.tar", num_pcs=0)
        second = fit_small(
            images, tmp_path / "second.pth.tar", encoder=first.checkpoint, num_clusters=0
        )
        before, after = load_state(first.checkpoint), load_state(second.checkpoint)
        assert "WPCA.0.weight" not in before
        assert after["WPCA.0.weight"].shape == (8, 4 * 512, 1, 1)
        for key, value in before.items():
            assert torch.equal(after[key], value)

    def test_weights_of_torchvision(self, images, tmp_path, thin_home):
        state = load_state(next((thin_home / "pretrained_models").glob("*.safetensors")))
        weights = {
            key.replace("encoder.", "features."): value
            for key, value in state.items()
            if key.startswith("encoder.")
        }
        torch.save(weights, tmp_path / "vgg16.pth")
        made = fit_small(images, tmp_path / "mine.pth.tar", encoder=tmp_path / "vgg16.pth")
        assert torch.equal(load_state(made.checkpoint)["encoder.0.weight"],
                           state["encoder.0.weight"])  # fmt: skip

    def test_broken_images_are_counted(self, images, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"no image")
        names = [str(file) for file in sorted(images.rglob("*.png"))]
        names.insert(3, "broken.png")
        listed = write_list(tmp_path / "list.txt", names)
        made = fit_small(listed, tmp_path / "mine.safetensors", dataset_root=tmp_path)
        assert (made.num_images, made.num_broken) == (COUNT, 1)
        state = load_state(made.checkpoint)
        assert all(torch.isfinite(value).all() for value in state.values())


class TestErrors:
    def test_too_few_images(self, images, tmp_path):
        with pytest.raises(ArgumentError, match=f"num_pcs = {COUNT} .* {COUNT} images"):
            fit_small(images, tmp_path / "mine.pth.tar", num_pcs=COUNT)
        assert not list(tmp_path.iterdir())

    def test_too_few_cells(self, images, tmp_path):
        with pytest.raises(ArgumentError, match="num_clusters = 9999999"):
            fit_small(images, tmp_path / "mine.pth.tar", num_clusters=9999999)

    def test_no_vocabulary_to_keep(self, images, tmp_path, thin_home):
        state = load_state(next((thin_home / "pretrained_models").glob("*.safetensors")))
        torch.save({k: v for k, v in state.items() if "pool" not in k}, tmp_path / "bare.pth")
        with pytest.raises(CheckpointError, match=r"bare\.pth.*vocabulary"):
            fit_small(
                images, tmp_path / "mine.pth.tar", encoder=tmp_path / "bare.pth", num_clusters=0
            )

    def test_the_encoder_is_not_written_over(self, images, tmp_path):
        file = tmp_path / "mine.pth.tar"
        torch.save({"encoder.0.weight": torch.zeros(1)}, file)
        (tmp_path / "link.pth.tar").symlink_to(file)
        before = file.read_bytes()
        with pytest.raises(OutputError, match=f"{file}, .*{tmp_path}/link"):
            fit_small(images, tmp_path / "link.pth.tar", encoder=file)
        assert file.read_bytes() == before

    def test_native_sizes(self, images, tmp_path):
        with pytest.raises(ArgumentError, match=r"imageresizeh.*imageresizew"):
            fit_small(images, tmp_path / "mine.pth.tar", config=replace(SMALL, image_size=(0, 0)))

    def test_no_image(self, tmp_path):
        with pytest.raises(ImageListError, match=f"{tmp_path} "):
            fit_small(tmp_path, tmp_path / "mine.pth.tar")

    def test_none_readable(self, tmp_path):
        for i in range(9):
            (tmp_path / f"{i}.png").write_bytes(b"no image")
        with pytest.raises(ImageError, match=rf"{tmp_path}/0\.png"):
            fit_small(tmp_path, tmp_path / "mine.pth.tar")

    def test_command(self, images, tmp_path, capsys):
        words = ["--images", str(images), "--output", str(tmp_path / "mine.zip"), "--nocuda"]
        assert main(words) == 2
        assert "mine.zip" in capsys.readouterr().err


def test_command(images, tmp_path, capsys):
    ini = tmp_path / "small.ini"
    ini.write_text(
        "[global_params]\npooling = netvlad\nresumepath = none\nnum_pcs = 0\n"
        "[feature_extract]\ncachebatchsize = 4\nimageresizew = 128\nimageresizeh = 96\n"
    )
    target = tmp_path / "mine.safetensors"
    words = ["--images", str(images), "--output", str(target), "--num_clusters", "4"]
    assert main([*words, "--num_pcs", "8", "--config_path", str(ini), "--nocuda"]) == 0
    assert f"resumePath = {target}" in capsys.readouterr().out
    made = fit_small(images, tmp_path / "other.safetensors")
    assert made.checkpoint.read_bytes() == target.read_bytes()


class TestWhitening:
    @pytest.mark.parametrize(("n", "d", "keep"), [(60, 300, 20), (300, 60, 20), (60, 60, 59)])
    def test_equals_exact_pca(self, n, d, keep):
        random = np.random.default_rng(0)
        x = (random.normal(size=(n, d)) * np.linspace(3, 0.1, d) + 1).astype(np.float32)
        weight, bias = whitening_layer(x, keep)
        components, variances, mean = pca(x.astype(np.float64), keep)
        exact = (components / np.sqrt(variances + 1e-9)).T
        found = weight.flatten(1).numpy()
        exact *= np.sign((exact * found).sum(axis=1))[:, None]
        np.testing.assert_allclose(found, exact, atol=1e-5 * np.abs(exact).max())
        np.testing.assert_allclose(bias, -exact @ mean, atol=1e-3)

    @pytest.mark.parametrize(("n", "keep"), [(5, 5), (5, 0), (1, 1)])
    def test_too_few(self, n, keep):
        with pytest.raises(ArgumentError, match=f"num_pcs = {keep} of {n} descriptors"):
            whitening_layer(np.ones((n, 9), np.float32), keep)

    @pytest.mark.slow
    def test_bounded_memory(self, tmp_path):
        """PCA of 10,000 x 32,768 within 3 GB, against exact components of known data."""
        run = subprocess.run(
            [sys.executable, "-c", _LARGE, str(tmp_path / "x.npy")], capture_output=True, text=True
        )
        assert run.returncode == 0, run.stderr
        error, kilobytes = map(float, run.stdout.split())
        assert error < 1e-4
        assert kilobytes < 3e6


# Rows are made from a few directions of known, well separated variances, and noise.
_LARGE = """
import resource, sys
import numpy as np
from patchnetvlad.training.whitening import whitening_layer
n, d, k = 10_000, 32_768, 32
random = np.random.default_rng(0)
directions = np.linalg.qr(random.normal(size=(d, k)))[0].T.astype(np.float32)
scores = np.linalg.qr(random.normal(size=(n, k)))[0]
scores -= scores.mean(0)
scores = np.linalg.qr(scores)[0] * 0.8 ** np.arange(k) * 100
x = np.lib.format.open_memmap(sys.argv[1], "w+", np.float32, (n, d))
for first in range(0, n, 500):
    x[first : first + 500] = scores[first : first + 500] @ directions + 0.5
weight, bias = whitening_layer(x, k)
found = weight.flatten(1).numpy()
found /= np.linalg.norm(found, axis=1, keepdims=True)
print(np.abs(np.abs((found * directions).sum(1)) - 1).max(),
      resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


class TestClusters:
    def test_finds_them(self):
        random = np.random.default_rng(0)
        centres = np.eye(3, 16, dtype=np.float32)
        points = np.repeat(centres, 50, axis=0) + random.normal(0, 0.01, (150, 16))
        found = cluster(points.astype(np.float32), 3)
        order = found.centroids.argmax(axis=1).argsort()
        np.testing.assert_allclose(found.centroids[order], centres, atol=0.01)

    def test_file(self, tmp_path):
        pytest.importorskip("h5py")
        points = np.random.default_rng(0).normal(size=(20, 4)).astype(np.float32)
        found = cluster(points, 2)
        again = Clusters.load(found.save(tmp_path / "centroids.hdf5"))
        np.testing.assert_array_equal(again.centroids, found.centroids)
        np.testing.assert_array_equal(again.descriptors, points)

    @pytest.mark.parametrize("content", [None, b"no HDF5"])
    def test_broken_file(self, tmp_path, content):
        pytest.importorskip("h5py")
        file = tmp_path / "centroids.hdf5"
        if content is not None:
            file.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"centroids\.hdf5"):
            Clusters.load(file)
