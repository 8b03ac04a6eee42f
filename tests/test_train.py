# SPDX-License-Identifier: MIT
"""Training: what is learnt from, the loop, its files, going on after a kill."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from msls_data import write_msls
from PIL import Image
from place_data import picture, write_list

from patchnetvlad.cli import add_pca as add_pca_command
from patchnetvlad.cli import train as train_command
from patchnetvlad.config import Config
from patchnetvlad.config_train import TrainConfig
from patchnetvlad.errors import (
    ArgumentError,
    CheckpointError,
    ConfigError,
    GroundTruthError,
    OutputError,
)
from patchnetvlad.models.checkpoint import load_network, load_state
from patchnetvlad.own_data.msls import read_areas
from patchnetvlad.training import loop
from patchnetvlad.training.areas import area_of_images, split_area
from patchnetvlad.training.files import load_training
from patchnetvlad.training.history import History
from patchnetvlad.training.losses import triplet_loss
from patchnetvlad.training.mining import draw_queries, mine
from patchnetvlad.training.start import train_network
from patchnetvlad.training.tuples import TupleSet
from patchnetvlad.training.validation import validate

pytestmark = pytest.mark.usefixtures("thin_network")

SMALL = TrainConfig(
    batch_size=3,
    cache_batch_size=4,
    learning_rate=0.01,
    num_clusters=4,
    num_negatives=2,
    image_size=(96, 128),
    num_pcs=8,
)


@pytest.fixture(scope="module")
def msls(tmp_path_factory):
    return write_msls(tmp_path_factory.mktemp("msls"))


@pytest.fixture(scope="module")
def train_areas(msls):
    return read_areas(msls)


def weights(folder):
    return load_state(folder / "checkpoints" / "checkpoint.pth.tar")


def run(msls, out, epochs=2, config=SMALL, **more):
    settings = {"device": "cpu", "progress": False, **more}
    return train_network(
        config, read_areas(msls), read_areas(msls, "val"), out / "save", out / "cache",
        epochs=epochs, **settings,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trained(msls, tmp_path_factory, thin_network):
    pytest.importorskip("h5py")
    out = tmp_path_factory.mktemp("trained")
    return out, run(msls, out, identifier="mine")


class TestMsls:
    def test_queries_and_rarity(self, train_areas):
        data = TupleSet.of_areas(train_areas, 10, 25)
        assert len(data.queries) == 7  # one is beside a panorama, which is no index image
        assert data.left_out == 1
        assert len(data.index) == 11
        assert [rows.tolist() for rows in data.positives[:2]] == [[0], [1]]
        assert data.close[1].tolist() == [0, 1, 2, 3]
        # 1, and for each rarity the inverse of its share: 7 / 2 at night, 7 / 3 sideways.
        expected = [1 + 7 / 2 + 7 / 3, 1 + 7 / 3, 1 + 7 / 3, 1, 1 + 7 / 2, 1, 1]
        np.testing.assert_allclose(data.weights, expected)

    def test_panoramas_may_take_part(self, msls):
        areas = read_areas(msls, panoramas=True)
        assert len(TupleSet.of_areas(areas, 10, 25).queries) == 8

    @pytest.mark.parametrize(("mode", "city"), [("train", "trondheim"), ("val", "cph")])
    def test_cities(self, msls, mode, city):
        assert [area.name for area in read_areas(msls, mode)] == [city]

    def test_missing(self, msls, tmp_path):
        with pytest.raises(GroundTruthError, match=f"{tmp_path}/train_val"):
            read_areas(tmp_path)
        with pytest.raises(GroundTruthError, match="train_val/atlantis"):
            read_areas(msls, cities=["atlantis"])


def line(count, step=1.0):
    """Images along a line."""
    positions = np.stack([step * np.arange(count), np.zeros(count)], axis=1)
    return area_of_images("line", [f"{i}.png" for i in range(count)], positions)


class TestTuples:
    def test_no_image_is_its_own_positive(self):
        data = TupleSet.of_areas([line(20)], 1, 3)
        assert data.positives[5].tolist() == [4, 6]
        assert data.close[5].tolist() == [2, 3, 4, 5, 6, 7, 8]

    def test_areas_are_negatives_of_each_other(self):
        data = TupleSet.of_areas([line(5), line(5)], 1, 100)
        assert data.close[0].tolist() == [0, 1, 2, 3, 4]
        assert data.close[7].tolist() == [5, 6, 7, 8, 9]

    def test_places_of_one_image(self):
        with pytest.raises(GroundTruthError, match=r"\b5 queries.*\b10\b.*posdistthr"):
            TupleSet.of_areas([line(5, step=50)], 10, 25)

    def test_one_place(self):
        with pytest.raises(GroundTruthError, match=r"\b5 index images.*\b25\b.*negdistthr"):
            TupleSet.of_areas([line(5)], 10, 25)

    def test_split_shares_no_place(self):
        training, validation = split_area(line(200), share=0.3, cell=20, gap=5, seed=1)
        a, b = training.utm_queries[:, 0], validation.utm_queries[:, 0]
        assert np.abs(a[:, None] - b[None]).min() > 5
        assert 60 <= len(b) <= 80
        assert 100 <= len(a) <= 200 - len(b)
        assert training.queries[0] in {f"{i:.0f}.png" for i in a}
        assert set(training.queries).isdisjoint(validation.queries)

    def test_split_into_nothing(self):
        with pytest.raises(ArgumentError, match=r"\b1000\b.*\b1 cells"):
            split_area(line(10), share=0.2, cell=1000, gap=5, seed=0)
        with pytest.raises(ArgumentError, match="share = 2"):
            split_area(line(10), share=2, cell=2, gap=5, seed=0)

    def test_rare_queries_are_drawn_more_often(self, train_areas):
        data = TupleSet.of_areas(train_areas, 10, 25)
        random = np.random.default_rng(0)
        drawn = np.concatenate([np.concatenate(draw_queries(data, 3, random)) for _ in range(300)])
        share = np.bincount(drawn, minlength=7) / len(drawn)
        np.testing.assert_allclose(share, data.weights / data.weights.sum(), atol=0.03)
        assert [len(rows) for rows in draw_queries(data, 3, random)] == [3, 2, 2]


def vectors_of(table):
    """A description that looks vectors up by the name of the image."""

    def describe(paths):
        found = np.array([table.get(str(path), [np.nan] * 2) for path in paths], np.float32)
        ok = np.isfinite(found).all(axis=1)
        return np.nan_to_num(found), ok

    return describe


class TestMining:
    def found(self, table, seed=0, **more):
        data = TupleSet.of_areas([line(10)], 1, 2)
        settings = {"cached_negatives": 100, "num_negatives": 2, **more}
        return mine(data, np.array([0]), vectors_of(table), np.random.default_rng(seed), **settings)

    def table(self, **changes):
        far = {f"{i}.png": [9.0, i] for i in range(10)}
        return far | {"0.png": [0, 0], "1.png": [1, 0], "2.png": [0, 0]} | changes

    def test_the_nearest(self):
        table = self.table(**{"7.png": [0.5, 0], "4.png": [0, 1.01], "9.png": [1.02, 0]})
        (triplet,) = self.found(table)
        assert (triplet.query, triplet.positive, triplet.negatives) == (0, 1, (7, 4))

    def test_fewer_than_asked_for(self):
        (triplet,) = self.found(self.table(), num_negatives=99)
        assert triplet.negatives == (3, 4, 5, 6, 7, 8, 9)  # 1 and 2 are too close

    def test_looks_through_some(self):
        found = [self.found(self.table(), cached_negatives=3, num_negatives=99, seed=seed)
                 for seed in range(9)]  # fmt: skip
        seen = {triplet.negatives for triplets in found for triplet in triplets}
        assert len(seen) > 1
        assert max(map(len, seen)) <= 3

    def test_unreadable_images_are_in_none(self):
        table = self.table(**{"7.png": [0.5, 0], "4.png": [0.6, 0]})
        del table["7.png"]
        (triplet,) = self.found(table)
        assert triplet.negatives == (4, 3)
        del table["1.png"]
        assert self.found(table) == []


class TestLoss:
    def test_known_answer(self):
        queries, positives = torch.zeros(2, 2), torch.tensor([[1.0, 0], [0, 2.0]])
        negatives = torch.tensor([[1.1, 0], [3.0, 0], [0, 1.0]])
        loss = triplet_loss(queries, positives, negatives, torch.tensor([2, 1]), margin=0.25)
        expected = (max(0, 1 - 1.1 + 0.5) + 0 + (2 - 1 + 0.5)) / 3
        assert loss.item() == pytest.approx(expected, abs=1e-5)


class TestValidation:
    def test_each_area_by_itself(self):
        area = line(5)
        table = {f"{i}.png": [float(i // 2), 0.1 * i] for i in range(5)}
        # 0-1 and 2-3 are next to each other, 4 is nearest to 2 and 3; 1-2 and 3-4 count, too.
        recalls = validate([area], vectors_of(table), 1.0, (1, 2))
        assert recalls == {1: 1.0, 2: 1.0}
        table["4.png"] = [0, 0]
        assert validate([area], vectors_of(table), 1.0, (1,)) == {1: 0.6}

    def test_unreadable_images_count_as_missed(self):
        table = {f"{i}.png": [float(i), 0] for i in range(4)}
        assert validate([line(5)], vectors_of(table), 1.0, (1,)) == {1: 0.8}


class TestFiles:
    def test_checkpoint(self, trained):
        out, made = trained
        assert made.folder.parent == out / "save"
        assert made.folder.name.endswith("_mine")
        content = torch.load(made.folder / "checkpoints" / "checkpoint.pth.tar", weights_only=True)
        assert set(content) == {
            "epoch", "state_dict", "recalls", "best_score", "not_improved", "optimizer", "parallel",
        }  # fmt: skip
        assert content["epoch"] == 2
        assert set(content["recalls"]) == {1, 5, 10, 20, 50, 100}
        assert content["best_score"] == max(content["best_score"], content["recalls"][5])
        assert "pool.centroids" in content["state_dict"]
        assert made.checkpoint.name == "model_best.pth.tar"

    def test_vocabulary(self, trained):
        import h5py

        out, _ = trained
        with h5py.File(out / "cache" / "centroids" / "vgg16_mapillary_4_desc_cen.hdf5") as file:
            assert file["centroids"].shape == (4, 512)
            norms = np.linalg.norm(file["descriptors"], axis=1)
        np.testing.assert_allclose(norms, 1, atol=1e-5)

    def test_tensorboard(self, trained):
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        _, made = trained
        events = accumulator.EventAccumulator(str(made.folder)).Reload()
        assert len(events.Scalars("Train/AvgLoss")) == 2
        assert [event.step for event in events.Scalars("Train/Loss")] == [1, 2, 3, 4, 5, 6]
        assert len(events.Scalars("Val/Recall_5")) == 2

    def test_picture_and_history(self, trained, msls, tmp_path):
        _, made = trained
        history = json.loads((made.folder / "history.json").read_text())["epochs"]
        assert list(history) == ["1", "2"]
        recalls = {int(n): value for n, value in history["2"]["recall"].items()}
        assert recalls == made.progress.recalls
        assert all(isinstance(of["loss"], float) for of in history.values())
        with Image.open(made.folder / "training.png") as picture:
            assert picture.width > 400

    def test_history_is_kept_by_a_run_that_resumes(self, tmp_path):
        before, after = tmp_path / "before", tmp_path / "after"
        before.mkdir()
        after.mkdir()
        history = History(before)
        for epoch in (1, 2, 3):
            history.add(epoch, 1 / epoch, {1: 0.1 * epoch, 5: 0.2 * epoch} if epoch != 2 else {})
        resumed = History(after, before, epochs=2)  # what came after is done again
        resumed.add(3, 0.25, {1: 0.5, 5: 0.6})
        content = json.loads((after / "history.json").read_text())["epochs"]
        assert [of["loss"] for of in content.values()] == [1.0, 0.5, 0.25]
        assert content["1"]["recall"] == {"1": 0.1, "5": 0.2}
        assert content["2"]["recall"] == {}

    @pytest.mark.parametrize("content", ["[1]", "{}", '{"epochs": {"a": 3}}', "\0", None])
    def test_history_that_cannot_be_read_is_begun_again(self, tmp_path, content):
        if content is not None:
            (tmp_path / "history.json").write_text(content)
        out = tmp_path / "out"
        out.mkdir()
        History(out, tmp_path, epochs=5).add(6, 0.1, {})
        assert list(json.loads((out / "history.json").read_text())["epochs"]) == ["6"]

    def test_it_learns(self, trained, msls, tmp_path):
        """Steps on the same triplets lower their loss."""
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        config = replace(SMALL, cached_queries=99, batch_size=99, momentum=0.0, margin=1.0)
        made = run(msls, tmp_path, epochs=6, config=config, clusters=clusters)
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        events = accumulator.EventAccumulator(str(made.folder)).Reload()
        losses = [event.value for event in events.Scalars("Train/AvgLoss")]
        assert losses[-1] < losses[0]

    def test_goes_on_as_if_never_interrupted(self, trained, msls, tmp_path):
        out, made = trained
        clusters = next((out / "cache").rglob("*.hdf5"))
        first = run(msls, tmp_path / "a", epochs=1, clusters=clusters, keep=True)
        kept = first.folder / "checkpoints" / "checkpoint_epoch1.pth.tar"
        second = run(msls, tmp_path / "b", resume=kept)
        assert second.progress == made.progress
        for key, value in weights(made.folder).items():
            assert torch.equal(weights(second.folder)[key], value), key

    def test_killed_within_an_epoch(self, trained, msls, tmp_path, monkeypatch):
        out, made = trained
        clusters = next((out / "cache").rglob("*.hdf5"))
        steps = []

        def killed(network, *rest):
            steps.append(1)
            if len(steps) == 4:
                raise KeyboardInterrupt
            return batch_loss(network, *rest)

        batch_loss = loop.batch_loss
        monkeypatch.setattr(loop, "batch_loss", killed)
        with pytest.raises(KeyboardInterrupt):
            run(msls, tmp_path, clusters=clusters)
        monkeypatch.undo()
        (left,) = tmp_path.rglob("checkpoint.pth.tar")
        again = run(msls, tmp_path, resume=left)
        for key, value in weights(made.folder).items():
            assert torch.equal(weights(again.folder)[key], value), key

    def test_frozen_layers_stay(self):
        encoder = torch.nn.Sequential(*[torch.nn.Linear(2, 2) for _ in range(29)])
        loop.freeze(encoder)
        trained = [any(p.requires_grad for p in layer.parameters()) for layer in encoder]
        assert trained == [False] * 24 + [True] * 5

    def test_stops_early(self, trained, msls, tmp_path):
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        config = replace(SMALL, patience=1, learning_rate=1e-12)
        ended = run(msls, tmp_path, epochs=9, config=config, clusters=clusters).progress
        assert ended.epoch == 2
        assert ended.not_improved == 1


class TestErrors:
    def test_other_clusters(self, trained, msls, tmp_path):
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        with pytest.raises(
            CheckpointError, match=r"vgg16_mapillary_4_desc_cen\.hdf5 .*\b4\b.*num_clusters = 5"
        ):
            run(msls, tmp_path, config=replace(SMALL, num_clusters=5), clusters=clusters)

    def test_resume_from_weights_alone(self, trained, tmp_path):
        torch.save({"state_dict": weights(trained[1].folder)}, tmp_path / "bare.pth.tar")
        with pytest.raises(CheckpointError, match=r"bare\.pth\.tar .*epoch.*checkpoint\.pth\.tar"):
            load_training(tmp_path / "bare.pth.tar")

    def test_resume_with_another_optimiser(self, trained, msls, tmp_path):
        checkpoint = trained[1].folder / "checkpoints" / "checkpoint.pth.tar"
        content = torch.load(checkpoint, weights_only=True)
        content["optimizer"]["param_groups"][0]["params"] = [0]
        torch.save(content, tmp_path / "other.pth.tar")
        with pytest.raises(CheckpointError, match=r"other\.pth\.tar"):
            run(msls, tmp_path, resume=tmp_path / "other.pth.tar")

    def test_folder_that_cannot_be_made(self, trained, msls, tmp_path):
        (tmp_path / "save").write_text("")
        clusters = next((trained[0] / "cache").rglob("*.hdf5"))
        with pytest.raises(OutputError, match=f"{tmp_path}/save "):
            run(msls, tmp_path, clusters=clusters)


INI = """
[train]
batchsize = 3
cachebatchsize = 4
optim = ADAM
lr = 0.01
num_clusters = 4
nNeg = 2
imageresizew = 128
imageresizeh = 96
{more}
[global_params]
pooling = netvlad
num_pcs = 8
vladv2 = False
"""


def write_ini(tmp_path, more=""):
    file = tmp_path / "train.ini"
    file.write_text(INI.format(more=more))
    return str(file)


class TestCommands:
    def test_msls(self, msls, tmp_path, capsys):
        pytest.importorskip("h5py")
        words = [
            "--config_path", write_ini(tmp_path), "--cache_path", str(tmp_path / "cache"),
            "--save_path", str(tmp_path / "save"), "--dataset_root_dir", str(msls),
            "--identifier", "mine", "--nEpochs", "1", "--threads", "1", "--nocuda",
            "--save_every_epoch",
        ]  # fmt: skip
        assert train_command.main(words) == 0
        best = next(tmp_path.rglob("model_best.pth.tar"))
        assert str(best) in capsys.readouterr().out
        words = [
            "--config_path", write_ini(tmp_path), "--resume_path", str(best),
            "--dataset_root_dir", str(msls), "--dataset_choice", "mapillary", "--nocuda",
        ]  # fmt: skip
        before = best.read_bytes()
        assert add_pca_command.main(words) == 0
        assert best.read_bytes() == before
        made = best.with_name("model_best_WPCA8.pth.tar")
        content = torch.load(made, weights_only=True)
        assert content["num_pcs"] == 8
        assert content["state_dict"]["WPCA.0.weight"].shape == (8, 4 * 512, 1, 1)
        config = replace(
            Config.load("netvlad_extract"), resume_path=str(made), num_pcs=8, image_size=(96, 128)
        )
        assert load_network(config).pool.num_clusters == 4

    @pytest.fixture
    def walk(self, tmp_path):
        names = [f"{i}.png" for i in range(40)]
        for i, name in enumerate(names):
            picture(i // 4).save(tmp_path / name)
        np.save(tmp_path / "positions.npy", line(40).utm_queries)
        return write_list(tmp_path / "list.txt", names)

    def test_own_images(self, walk, tmp_path):
        pytest.importorskip("h5py")
        ini = write_ini(tmp_path, "posdistthr = 1\nnegdistthr = 2\nvaldistthr = 1")
        words = [
            "--config_path", ini, "--images", str(walk), "--positions",
            str(tmp_path / "positions.npy"), "--dataset_root_dir", str(tmp_path),
            "--cache_path", str(tmp_path / "cache"), "--save_path", str(tmp_path / "save"),
            "--nEpochs", "1", "--nocuda",
        ]  # fmt: skip
        assert train_command.main(words) == 0
        content = torch.load(next(tmp_path.rglob("checkpoint.pth.tar")), weights_only=True)
        assert content["epoch"] == 1
        assert content["recalls"][1] > 0

    def test_lists_with_ground_truth(self, walk, tmp_path):
        pytest.importorskip("h5py")
        positions = line(40).utm_queries
        np.savez(tmp_path / "truth.npz", utmQ=positions, utmDb=positions, posDistThr=1)
        ini = write_ini(tmp_path, "posdistthr = 0\nnegdistthr = 2\nvaldistthr = 1")
        words = [
            "--config_path", ini, "--query_file_path", str(walk), "--index_file_path", str(walk),
            "--ground_truth_path", str(tmp_path / "truth.npz"),
            "--dataset_root_dir", str(tmp_path), "--cache_path", str(tmp_path / "cache"),
            "--save_path", str(tmp_path / "save"), "--nEpochs", "1", "--nocuda",
        ]  # fmt: skip
        assert train_command.main(words) == 0
        assert next(tmp_path.rglob("checkpoint.pth.tar")).is_file()

    @pytest.mark.parametrize(
        "words", [["--query_file_path", "q.txt"], ["--images", "x", "--index_file_path", "y"]]
    )
    def test_half_of_the_data(self, words, capsys):
        assert train_command.main(words) == 2
        assert "--ground_truth_path" in capsys.readouterr().err

    def test_add_pca_of_nothing(self, capsys):
        assert add_pca_command.main([]) == 2
        assert "--resume_path" in capsys.readouterr().err


class TestConfig:
    def test_shipped_is_the_default(self):
        assert TrainConfig.load("train") == TrainConfig()

    @pytest.mark.parametrize(
        ("more", "word"),
        [
            ("margn = 1", "margn"),
            ("patience = never", "patience"),
            ("momentum = -1", "momentum"),
            ("posdistthr = 30", "posdistthr"),
            ("weightdecay = nan", "weightdecay"),
        ],
    )
    def test_errors(self, tmp_path, more, word):
        with pytest.raises(ConfigError, match=rf"train\.ini.*{word}"):
            TrainConfig.load(write_ini(tmp_path, more))

    def test_other_files(self, tmp_path):
        with pytest.raises(ConfigError, match=r"performance\.ini: .*\[train\].*train\.ini"):
            TrainConfig.load("performance")
