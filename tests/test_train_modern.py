# SPDX-License-Identifier: MIT
"""Training by places: batches, loss, learning rates, kept maps, going on within an epoch."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import thin
import torch
from PIL import Image
from place_data import picture, write_list
from torch import nn

from patchnetvlad import Config, extract
from patchnetvlad.cli import train as train_command
from patchnetvlad.config_train import TrainConfig
from patchnetvlad.datasets.images import input_transform, load_image
from patchnetvlad.errors import ArgumentError, ConfigError, GroundTruthError, ImageError
from patchnetvlad.models import checkpoint
from patchnetvlad.models.checkpoint import load_state
from patchnetvlad.training import loop
from patchnetvlad.training.areas import area_of_images
from patchnetvlad.training.fit import add_pca
from patchnetvlad.training.losses import multi_similarity_loss
from patchnetvlad.training.maps import cache_maps, split_encoder
from patchnetvlad.training.places import PlaceSet
from patchnetvlad.training.recipes import PlaceRecipe
from patchnetvlad.training.schedule import learning_rate
from patchnetvlad.training.start import train_network
from patchnetvlad.training.views import view_of

pytest.importorskip("pytorch_metric_learning")
pytest.importorskip("h5py")

COUNT = 36  # images, of twelve places
SMALL = TrainConfig(
    loss="multisimilarity",
    places=3,
    images_a_place=2,
    cell_size=3,
    cache_batch_size=4,
    optimiser="ADAMW",
    learning_rate=0.001,
    schedule="cosine",
    warm_up_steps=2,
    num_clusters=4,
    image_size=(96, 128),
    positive_distance=2,
    negative_distance=4,
    validation_distance=2,
    cache_maps=True,
    save_steps=1,
)
TRIPLETS = replace(SMALL, loss="triplet", optimiser="SGD", schedule="step", warm_up_steps=0,
                   batch_size=4, num_negatives=2, cached_queries=12)  # fmt: skip
WHITENED = replace(SMALL, train_pca=True, num_pcs=8)


def build_encoder() -> nn.Sequential:
    """A network of two convolutions, of which training freezes the first."""
    first = nn.Conv2d(3, 512, 16, stride=16)
    return nn.Sequential(
        OrderedDict([("0", first), ("23", nn.ReLU()), ("24", nn.Conv2d(512, 512, 1))])
    )


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    random = torch.Generator().manual_seed(1)
    last = torch.eye(512) + 0.02 * torch.randn(512, 512, generator=random)
    state = thin.state() | {"encoder.24.weight": last[:, :, None, None],
                            "encoder.24.bias": torch.zeros(512)}  # fmt: skip
    file = tmp_path_factory.mktemp("weights") / "layers.safetensors"
    checkpoint.save_safetensors(state, file, torch.float32)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "build_encoder", build_encoder)
        yield file


def frames(count, clip=0):
    return np.stack([np.full(count, 1000.0 * clip), np.arange(count)], axis=1)


def write_walk(folder, noise):
    """Write images: three frames at a place are alike, but for noise."""
    random = np.random.default_rng(0)
    for i in range(COUNT):
        pixels = np.asarray(picture(i // 3), np.int64)
        pixels += random.integers(-noise, noise, pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{i:02}.png")
    return folder


@pytest.fixture(scope="module")
def walk(tmp_path_factory):
    return write_walk(tmp_path_factory.mktemp("walk"), 40)


def area(walk, count=COUNT):
    return area_of_images("walk", [walk / f"{i:02}.png" for i in range(count)], frames(count))


def run(walk, weights, out, config=SMALL, epochs=2, **more):
    given = {"weights": weights, "device": "cpu", "progress": False, "threads": 1, **more}
    areas = [area(walk)]
    return train_network(
        config, areas, areas, out / "save", out / "cache", epochs=epochs, **given
    )  # fmt: skip


def final(trained):
    return load_state(trained.folder / "checkpoints" / "checkpoint.pth.tar")


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key


@pytest.fixture(scope="module")
def trained(walk, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained")
    return out, run(walk, weights, out)


@pytest.fixture(scope="module")
def triplets(walk, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("triplets")
    return out, run(walk, weights, out, TRIPLETS)


@pytest.fixture(scope="module")
def whitened(walk, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("whitened")
    return out, run(walk, weights, out, WHITENED)


def places_of(positions, cell=3, turn=0.0, gap=4, headings=None):
    images = [f"{i}.png" for i in range(len(positions))]
    made = area_of_images("a", images, np.asarray(positions, float), headings)
    return PlaceSet.of_areas([made], cell, turn, gap)


class TestPlaces:
    def test_cells(self):
        found = places_of(np.concatenate([frames(7), frames(3, clip=1)]))
        assert [rows.tolist() for rows in found.places()] == [[0, 1, 2], [3, 4, 5], [7, 8, 9]]

    def test_images_that_are_alone_are_counted(self, caplog):
        with caplog.at_level(logging.INFO):
            places_of(np.concatenate([frames(7), frames(3, clip=1)]))
        assert "3 places of 9 images; 1 images" in caplog.text

    def test_cells_of_other_epochs_begin_elsewhere(self):
        found = places_of(frames(7), gap=0)
        assert found.places(1 / 3)[0].tolist() == [0, 1]

    def test_areas_share_no_place(self):
        areas = [area_of_images(name, [f"{name}{i}" for i in range(2)], frames(2)) for name in "ab"]
        found = PlaceSet.of_areas(areas, 3, 0, 4)
        assert [rows.tolist() for rows in found.places()] == [[0, 1], [2, 3]]
        (batch,) = found.draw(np.random.default_rng(0), 2, 2)
        assert len(batch) == 2

    def test_headings(self):
        headings = np.array([10.0, 170, 20, 190, np.nan, np.nan, 350, 95])
        found = places_of([[0, 0]] * 8 + [[99, 9]] * 2, turn=180,
                          headings=np.append(headings, [0, 0.0]))  # fmt: skip
        assert [rows.tolist() for rows in found.places()] == [[4, 5], [0, 1, 2, 7], [3, 6], [8, 9]]
        assert len(replace(found, turn=0).places()) == 2

    def test_queries_take_part(self):
        positions = frames(8)
        both = area_of_images("a", [f"{i}.png" for i in range(8)], positions)
        both = replace(both, queries=tuple(f"q{i}.png" for i in range(8)), one_list=False)
        assert [len(rows) for rows in PlaceSet.of_areas([both], 3, 0, 0).places()] == [6, 6, 4]

    def test_batches(self):
        found = places_of(frames(300), gap=30)
        seen = []
        for batch in found.draw(np.random.default_rng(1), 4, 2):
            assert 2 <= len(batch) <= 4
            assert {len(rows) for rows in batch} == {2}
            at = [found.positions[rows, 1] for rows in batch]
            for i, one in enumerate(at):
                assert np.ptp(one) <= 2
                others = np.concatenate(at[:i] + at[i + 1 :])
                assert np.abs(one[:, None] - others[None]).min() > 30
            seen += [int(rows.min()) // 3 for rows in batch]
        assert len(seen) > 80
        again = found.draw(np.random.default_rng(1), 4, 2)
        assert [rows.tolist() for rows in again[0]] == [
            rows.tolist() for rows in found.draw(np.random.default_rng(1), 4, 2)[0]
        ]
        assert [rows.tolist() for rows in again[0]] != [
            rows.tolist() for rows in found.draw(np.random.default_rng(2), 4, 2)[0]
        ]

    def test_places_of_one_image(self):
        with pytest.raises(GroundTruthError, match=r"\b4 images.*\b3\b.*cellsize"):
            places_of(10 * frames(4))

    def test_one_place(self):
        with pytest.raises(GroundTruthError, match=r"\b6 images.*\b9\b.*negdistthr"):
            places_of(frames(6), gap=9)


class TestLoss:
    def test_known_answer(self):
        """Two places, of which one image of the second is nearer to the first."""
        angles = torch.tensor([0.0, 0.4, 1.5, 0.6])
        vectors = torch.stack([angles.cos(), angles.sin()], dim=1)
        labels = torch.tensor([0, 0, 1, 1])
        near = torch.cos(angles[:, None] - angles[None])
        right = labels[:, None] == labels[None]
        total = 0.0
        for i in range(4):
            positives = [j for j in range(4) if right[i, j] and j != i]
            negatives = [j for j in range(4) if not right[i, j]]
            hard = max(near[i, j] for j in negatives)
            easy = min(near[i, j] for j in positives)
            pulled = [near[i, j] for j in positives if near[i, j] - 0.1 < hard]
            pushed = [near[i, j] for j in negatives if near[i, j] + 0.1 > easy]
            if pulled:
                total += np.log1p(sum(np.exp(-float(s)) for s in pulled))
            if pushed:
                total += np.log1p(sum(np.exp(50 * float(s)) for s in pushed)) / 50
        loss = multi_similarity_loss(vectors, labels)
        assert loss.item() == pytest.approx(total / 4, abs=1e-5)

    def test_without_the_library(self, monkeypatch, walk, weights, tmp_path):
        monkeypatch.setitem(sys.modules, "pytorch_metric_learning", None)
        with pytest.raises(ArgumentError, match=r"patchnetvlad\[train\].*triplet"):
            run(walk, weights, tmp_path)


class TestLearningRate:
    def rates(self, steps=10, epochs=2, **changes):
        config = replace(SMALL, learning_rate=1.0, **changes)
        return [learning_rate(config, epoch, step, steps, epochs)
                for epoch in range(epochs) for step in range(steps)]  # fmt: skip

    def test_cosine(self):
        found = self.rates(schedule="cosine", warm_up_steps=0)
        expected = (1 + np.cos(np.pi * np.arange(20) / 20)) / 2
        np.testing.assert_allclose(found, expected, atol=1e-12)

    def test_linear_after_warming_up(self):
        found = self.rates(schedule="linear", warm_up_steps=4)
        expected = (1 - np.arange(20) / 20) * np.minimum(1, np.arange(1, 21) / 4)
        np.testing.assert_allclose(found, expected, atol=1e-12)

    @pytest.mark.parametrize(("optimiser", "last"), [("SGD", 0.5), ("ADAMW", 0.5), ("ADAM", 1.0)])
    def test_steps(self, optimiser, last):
        found = self.rates(schedule="step", warm_up_steps=0, optimiser=optimiser, step_epochs=1)
        assert found == [1.0] * 10 + [last] * 10


class TestMaps:
    def frozen(self):
        encoder = build_encoder()
        encoder.load_state_dict(encoder.state_dict())
        loop.freeze(encoder)
        return split_encoder(encoder)

    def config(self):
        return SMALL.for_images(1)

    def test_are_what_the_frozen_layers_compute(self, walk, weights, tmp_path):
        frozen, _ = self.frozen()
        paths = [walk / "03.png", walk / "00.png"]
        maps = cache_maps(frozen, paths, self.config(), tmp_path, progress=False)
        for row, path in enumerate(paths):
            image = input_transform((96, 128))(load_image(path))
            with torch.no_grad():
                expected = frozen(image[None])[0]
            found = maps.decoder(paths)(row)
            assert found.shape == (512, 6, 8)
            torch.testing.assert_close(found, expected.half().float(), rtol=1e-3, atol=1e-4)

    def test_are_computed_once(self, walk, tmp_path):
        frozen, _ = self.frozen()
        paths = [tmp_path / f"{i}.png" for i in range(3)]
        for i, path in enumerate(paths):
            picture(i).save(path)
        cache_maps(frozen, paths[:2], self.config(), tmp_path, progress=False)
        for path in paths[:2]:
            path.unlink()  # which cannot be read again
        maps = cache_maps(frozen, paths, self.config(), tmp_path, progress=False)
        assert [maps.has_failed(path) for path in paths] == [False] * 3
        picture(7).save(paths[0])
        again = cache_maps(frozen, paths, self.config(), tmp_path, progress=False)
        assert not torch.equal(again.decoder(paths)(0), maps.decoder(paths)(1))
        torch.testing.assert_close(again.decoder(paths)(1), maps.decoder(paths)(1))
        with pytest.raises(ImageError):  # of other weights, they are computed anew
            cache_maps(self.frozen()[0], paths[1:2], self.config(), tmp_path, progress=False)

    def test_of_a_part_of_the_images(self, walk, tmp_path):
        frozen, _ = self.frozen()
        paths = [walk / f"{i:02}.png" for i in range(4)]
        for part in (paths[:3], paths[1:], paths[:3]):
            maps = cache_maps(frozen, part, self.config(), tmp_path, progress=False)
            assert all(maps.decoder(part)(row).shape == (512, 6, 8) for row in range(3))

    def test_images_that_cannot_be_read(self, walk, tmp_path, caplog):
        frozen, _ = self.frozen()
        (tmp_path / "broken.png").write_text("no image")
        paths = [walk / "00.png", tmp_path / "broken.png"]
        maps = cache_maps(frozen, paths, self.config(), tmp_path, progress=False)
        assert [maps.has_failed(path) for path in paths] == [False, True]
        assert "1 of 2 images" in caplog.text
        assert isinstance(maps.decoder(paths)(1), ImageError)

    def test_views(self, walk, tmp_path):
        frozen, _ = self.frozen()
        paths = [walk / "00.png", walk / "05.png"]
        maps = cache_maps(frozen, paths, self.config(), tmp_path, views=2, progress=False)
        plain, first, second = (maps.decoder(paths, draws)(0) for draws in (None, [6, 6], [1, 1]))
        assert torch.equal(plain, first)
        assert not torch.allclose(plain, second, rtol=0.05, atol=0.05)

    def test_nothing_is_frozen(self):
        with pytest.raises(ConfigError, match=r"cachemaps = False"):
            split_encoder(nn.Sequential(nn.Conv2d(3, 4, 1)))


class TestViews:
    def test_follow_from_the_seed(self):
        image = picture(3)
        first, again, other = (view_of(image, np.random.default_rng(s)) for s in (1, 1, 2))
        assert first.size == image.size
        assert first.tobytes() == again.tobytes()
        assert len({first.tobytes(), other.tobytes(), image.tobytes()}) == 3


class TestTraining:
    def test_frozen_layers_stay_and_others_learn(self, trained, weights):
        before, after = load_state(weights), final(trained[1])
        assert torch.equal(after["encoder.0.weight"], before["encoder.0.weight"])
        assert not torch.equal(after["encoder.24.weight"], before["encoder.24.weight"])
        assert after["pool.centroids"].shape == (4, 512)

    def test_checkpoint_is_one_of_the_whole_network(self, trained):
        content = torch.load(trained[1].checkpoint, weights_only=True)
        assert set(content) == {
            "epoch", "state_dict", "recalls", "best_score", "not_improved", "optimizer", "parallel",
        }  # fmt: skip
        assert content["best_score"] == trained[1].progress.best_score > 0

    @pytest.mark.parametrize("config", [SMALL, TRIPLETS])
    def test_maps_change_nothing_but_rounding(self, walk, weights, tmp_path, config):
        config = replace(config, save_steps=0)
        kept = run(walk, weights, tmp_path / "kept", config, epochs=1)
        clusters = next((tmp_path / "kept").rglob("*.hdf5"))
        more = {"epochs": 1, "clusters": clusters}
        kept = run(walk, weights, tmp_path / "kept", config, **more)
        plain = run(walk, weights, tmp_path / "plain", replace(config, cache_maps=False), **more)
        start = load_state(weights)
        for key, value in final(plain).items():
            change = (value - start[key]).norm() if key in start and "pool" not in key else 1.0
            assert (final(kept)[key] - value).norm() <= 0.05 * change, key

    def test_it_learns(self, weights, tmp_path):
        walk = write_walk(tmp_path, 255)
        made = run(walk, weights, tmp_path, replace(SMALL, save_steps=0, places=6), epochs=8)
        history = json.loads((made.folder / "history.json").read_text())
        losses = [of["loss"] for of in history["epochs"].values()][1:]
        assert losses[0] > 0
        assert np.mean(losses[-2:]) < 0.9 * losses[0]

    @pytest.mark.parametrize("step", [1, 3, 5])
    @pytest.mark.parametrize("kind", ["trained", "triplets", "whitened"])
    def test_killed_between_steps(self, kind, step, request, walk, weights, tmp_path, monkeypatch):
        out, made = request.getfixturevalue(kind)
        config = {"trained": SMALL, "triplets": TRIPLETS, "whitened": WHITENED}[kind]
        steps, batch_loss = [], loop.batch_loss

        def killed(*arguments):
            steps.append(1)
            if len(steps) == step + 1:
                raise KeyboardInterrupt
            return batch_loss(*arguments)

        monkeypatch.setattr(loop, "batch_loss", killed)
        clusters = next((out / "cache").rglob("*.hdf5"))
        with pytest.raises(KeyboardInterrupt):
            run(walk, weights, tmp_path, config, clusters=clusters)
        monkeypatch.setattr(loop, "batch_loss", batch_loss)
        (left,) = tmp_path.rglob("checkpoint.pth.tar")
        again = run(walk, weights, tmp_path, config, resume=left)
        assert again.progress == made.progress
        assert_same(final(again), final(made))

    @pytest.mark.parametrize("cache_maps", [True, False])
    def test_unreadable_images_are_left_out(self, walk, weights, tmp_path, caplog, cache_maps):
        broken = tmp_path / "broken.png"
        broken.write_text("no image")
        images = [*(walk / f"{i:02}.png" for i in range(COUNT - 1)), broken]
        areas = [area_of_images("walk", images, frames(COUNT))]
        config = replace(SMALL, cache_maps=cache_maps)
        caplog.set_level(logging.INFO)
        made = train_network(
            config, areas, areas, tmp_path / "save", tmp_path / "cache", epochs=1,
            weights=weights, device="cpu", progress=False,
        )  # fmt: skip
        assert made.progress.epoch == 1
        assert "broken.png" in caplog.text

    def test_a_batch_of_nothing_but_unreadable_images(self, walk, weights, tmp_path):
        recipe = PlaceRecipe(places_of(frames(COUNT)), SMALL)
        (found,) = recipe.rounds(0, None)
        batch = found.batches[0].without({0: ImageError("gone")})
        assert batch.paths == found.batches[0].paths[1:]
        assert batch.count == len(batch.labels) == found.batches[0].count - 1


class TestTrainedWhitening:
    def test_is_fitted_first_and_learns(self, walk, weights, whitened, tmp_path):
        """Without a step that changes anything, it is that of add_pca."""
        still = replace(WHITENED, learning_rate=1e-30, weight_decay=0)
        trained = run(walk, weights, tmp_path, still, epochs=1)
        last = trained.folder / "checkpoints" / "checkpoint.pth.tar"
        bare = {k: v for k, v in load_state(last).items() if not k.startswith("WPCA")}
        torch.save({"state_dict": bare}, tmp_path / "bare.pth.tar")
        images = [*area(walk).index]
        added = add_pca(tmp_path / "bare.pth.tar", images, SMALL.for_images(), 8, progress=False)
        fitted = load_state(added.checkpoint)["WPCA.0.weight"]
        start = load_state(trained.checkpoint)["WPCA.0.weight"]
        scale = fitted.abs().max()
        torch.testing.assert_close(start / scale, fitted / scale, atol=2e-2, rtol=0)
        learnt = load_state(whitened[1].checkpoint)["WPCA.0.weight"]
        assert not torch.equal(start, learnt)

    def test_the_checkpoint_is_that_of_a_configuration(self, walk, whitened, tmp_path):
        file = whitened[1].checkpoint
        assert file.name == "model_best_WPCA8.pth.tar"
        assert "trained" in file.with_name("model_best_WPCA8.md").read_text()
        path = str(file).removesuffix("8.pth.tar")
        config = Config(
            resume_path=path, num_pcs=8, image_size=(96, 128), pooling="netvlad",
            cache_batch_size=4,
        )  # fmt: skip
        write_list(tmp_path / "all.txt", [path.name for path in area(walk).index])
        found = extract(config, tmp_path / "all.txt", walk, tmp_path / "out", progress=False)
        assert found.shape == (COUNT, 8)
        np.testing.assert_allclose(np.linalg.norm(found, axis=1), 1, atol=1e-5)

    def test_recalls_before_training(self, whitened):
        epochs = json.loads((whitened[1].folder / "history.json").read_text())["epochs"]
        assert list(epochs) == ["0", "1", "2"]
        assert epochs["0"]["loss"] is None
        assert 0 <= epochs["0"]["recall"]["1"] <= 1

    def test_too_few_images(self, walk, weights, tmp_path):
        with pytest.raises(ArgumentError, match="num_pcs = 64 of 36 images"):
            run(walk, weights, tmp_path, replace(WHITENED, num_pcs=64))


class TestSteps:
    def test_gradients_of_several_batches(self, trained, walk, weights, tmp_path):
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        config = replace(SMALL, accumulate=3)
        made = run(walk, weights, tmp_path, config, epochs=1, clusters=clusters)
        content = torch.load(made.checkpoint, weights_only=True)
        taken = {int(of["step"]) for of in content["optimizer"]["state"].values()}
        assert taken == {2}  # of four batches
        assert not torch.equal(
            final(made)["encoder.24.weight"], final(trained[1])["encoder.24.weight"]
        )

    def test_views_on_the_fly(self, trained, walk, weights, tmp_path):
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        config = replace(SMALL, cache_maps=False, augment=True)
        more = {"epochs": 1, "clusters": clusters}
        views = run(walk, weights, tmp_path / "a", config, **more)
        again = run(walk, weights, tmp_path / "b", config, **more)
        plain = run(walk, weights, tmp_path / "c", replace(config, augment=False), **more)
        assert_same(final(again), final(views))
        key = "encoder.24.weight"
        assert not torch.equal(final(plain)[key], final(views)[key])

    def test_mixed_precision_is_for_gpus(self, trained, walk, weights, tmp_path):
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        made = run(walk, weights, tmp_path, replace(SMALL, mixed_precision=True), clusters=clusters)
        assert_same(final(made), final(trained[1]))

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    def test_mixed_precision(self, walk, weights, tmp_path):
        config = replace(SMALL, mixed_precision=True, learning_rate=1e-4)
        made = run(walk, weights, tmp_path / "a", config, epochs=1, device="cuda")
        left = made.folder / "checkpoints" / "checkpoint.pth.tar"
        assert torch.load(left, weights_only=True)["scaler"]["scale"] > 0
        again = run(walk, weights, tmp_path / "b", config, resume=left, device="cuda")
        assert again.progress.epoch == 2
        for value in final(again).values():
            assert value.isfinite().all()


PROCESS = f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import test_train_modern as modern
modern.checkpoint.build_encoder = modern.build_encoder
out, walk, weights, clusters, what = map(Path, sys.argv[1:6])
kinds = {{"places": modern.OF_TWO, "triplets": modern.OF_TWO_TRIPLETS, "kills": modern.KILLED}}
more = {{"clusters": clusters}}
if what.name == "kills":
    left = sorted(out.rglob("checkpoint.pth.tar"), key=lambda file: file.stat().st_mtime_ns)
    more |= {{"epochs": int(sys.argv[6]), "resume": left[-1] if left else None}}
modern.run(walk, weights, out, kinds[what.name], **more)
"""
OF_TWO = replace(
    SMALL, optimiser="SGD", learning_rate=0.05, cache_maps=False, places=2, save_steps=0
)
OF_TWO_TRIPLETS = replace(TRIPLETS, learning_rate=0.05, batch_size=2, save_steps=0)
KILLED = replace(SMALL, places=2)


@pytest.mark.cluster
class TestProcesses:
    @pytest.mark.parametrize("kind", ["places", "triplets"])
    def test_two_are_as_one_with_twice_the_batch(self, kind, trained, weights, tmp_path):
        walk = write_walk(tmp_path, 120)
        (walk / "17.png").write_text("no image")
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        script = tmp_path / "process.py"
        script.write_text(PROCESS)
        launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", script]
        given = [tmp_path / "two", walk, weights, clusters, kind]
        done = subprocess.run(
            [sys.executable, *map(str, [*launch, *given])],
            env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        (left,) = (tmp_path / "two").rglob("checkpoint.pth.tar")
        one = {
            "places": replace(OF_TWO, places=4),
            "triplets": replace(OF_TWO_TRIPLETS, batch_size=4),
        }
        made = run(walk, weights, tmp_path / "one", one[kind], clusters=clusters)
        found, expected = load_state(left), final(made)
        before = load_state(weights)["encoder.24.weight"]
        assert (expected["encoder.24.weight"] - before).abs().max() > 1e-4
        for key, value in expected.items():
            torch.testing.assert_close(found[key], value, rtol=0, atol=1e-5)

    @pytest.mark.parametrize(
        "kills", [2, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])]
    )
    def test_killed_at_any_moment(self, kills, trained, walk, weights, tmp_path):
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        script = tmp_path / "process.py"
        script.write_text(PROCESS)
        out = tmp_path / "killed"
        epochs = 2 + kills // 2  # more steps than kills
        given = [script, out, walk, weights, clusters, "kills", epochs]
        words = [sys.executable, *map(str, given)]
        random = np.random.default_rng(7)

        def saved():
            return {file: file.stat().st_mtime_ns for file in out.rglob("checkpoint.pth.tar")}

        for _ in range(kills):
            process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            for _ in range(random.integers(1, 3)):
                before = saved()
                while saved() == before and process.poll() is None:
                    time.sleep(0.002)
            time.sleep(random.uniform(0, 0.1))
            process.kill()
            assert process.wait() == -signal.SIGKILL  # it was not done
        left = max(saved(), key=lambda file: file.stat().st_mtime_ns)
        made = run(walk, weights, tmp_path, KILLED, epochs=epochs, resume=left)
        whole = run(walk, weights, tmp_path / "b", KILLED, epochs=epochs, clusters=clusters)
        assert made.progress == whole.progress
        assert_same(final(made), final(whole))


INI = """
[train]
loss = multisimilarity
places = 3
imagesperplace = 2
cellsize = 3
cachemaps = True
cachedviews = 2
cachebatchsize = 4
optim = adamw
schedule = Linear
savesteps = 2
num_clusters = 4
posdistthr = 2
negdistthr = 4
valdistthr = 2
imageresizew = 128
imageresizeh = 96
{more}
"""


class TestCommand:
    def test_own_images(self, walk, weights, tmp_path, capsys):
        (tmp_path / "mine.ini").write_text(INI.format(more=""))
        np.save(tmp_path / "positions.npy", frames(COUNT))
        listed = write_list(tmp_path / "list.txt", [f"{i:02}.png" for i in range(COUNT)])
        words = [
            "--config_path", str(tmp_path / "mine.ini"), "--images", str(listed),
            "--positions", str(tmp_path / "positions.npy"), "--dataset_root_dir", str(walk),
            "--cache_path", str(tmp_path / "cache"), "--save_path", str(tmp_path / "save"),
            "--weights", str(weights), "--nEpochs", "1", "--cell", "9", "--nocuda",
        ]  # fmt: skip
        assert train_command.main(words) == 0
        best = next(tmp_path.rglob("model_best.pth.tar"))
        assert f"resumePath = {best}" in capsys.readouterr().out
        assert len(list((tmp_path / "cache" / "maps").glob("*/view[01]"))) == 2

    def test_built_in(self):
        config = TrainConfig.load("train_modern")
        assert (config.loss, config.optimiser) == ("multisimilarity", "ADAMW")
        assert config.cache_maps
        assert config.train_pca
        with pytest.raises(ConfigError, match="num_pcs"):
            replace(config, num_pcs=0)

    @pytest.mark.parametrize(
        ("more", "word"),
        [
            ("loss = hinge", "loss"),
            ("schedule = never", "schedule"),
            ("places = 1", "places"),
            ("imagesperplace = 1", "imagesperplace"),
            ("cachedviews = 0", "cachedviews"),
            ("warmup = -1", "warmup"),
            ("cellsize = -1", "cellsize"),
            ("accumulate = 0", "accumulate"),
            ("augment = True", "augment"),
            ("amp = half", "amp"),
        ],
    )
    def test_errors(self, tmp_path, more, word):
        key = more.split(" ")[0]
        lines = [
            line for line in INI.format(more="").splitlines() if not line.startswith(f"{key} ")
        ]
        (tmp_path / "mine.ini").write_text("\n".join([*lines, more]))
        with pytest.raises(ConfigError, match=rf"mine\.ini.*{word}"):
            TrainConfig.load(tmp_path / "mine.ini")

    def test_views_without_maps(self, tmp_path):
        text = INI.format(more="").replace("cachemaps = True", "cachemaps = False")
        (tmp_path / "mine.ini").write_text(text)
        with pytest.raises(ConfigError, match=r"mine\.ini.*cachedviews.*cachemaps"):
            TrainConfig.load(tmp_path / "mine.ini")
