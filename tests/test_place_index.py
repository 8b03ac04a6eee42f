# SPDX-License-Identifier: MIT
"""A map of places that grows, is asked, saved and loaded."""

from __future__ import annotations

import copy
import gc
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import faiss
import numpy as np
import pytest
import thin
import torch
from conftest import DEVICES, SHARED, needs_shared
from PIL import Image
from place_data import SMALL, picture, write_list

from patchnetvlad import Config, PlaceIndex, load_model, match
from patchnetvlad.base.files import write_all
from patchnetvlad.errors import (
    ArgumentError,
    ConfigError,
    DrawingError,
    FeatureError,
    ImageError,
    ImageListError,
    KeyNotFoundError,
    OutputError,
)
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.places import folder as places_folder

pytestmark = pytest.mark.usefixtures("thin_network")

COUNT = 12


@pytest.fixture(scope="module")
def model():
    return load_model(SMALL, device="cpu")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Index pictures, and as queries the same with something over a corner."""
    root = tmp_path_factory.mktemp("world")
    for i in range(COUNT):
        image = picture(i)
        image.save(root / f"i{i:02d}.png")
        image.paste((9, 9, 9), (0, 0, 24, 20))
        image.save(root / f"q{i:02d}.png")
    for part in "iq":
        names = [f"{part}{i:02d}.png" for i in range(COUNT)]
        (root / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def paths(world, part, start=0, end=COUNT):
    return [world / f"{part}{i:02d}.png" for i in range(start, end)]


def ranks(index, queries, **options):
    return [[place.row for place in index.query(q, COUNT, **options).places] for q in queries]


def same(ours, theirs):
    assert [p.row for p in ours.places] == [p.row for p in theirs.places]
    assert [p.score for p in ours.places] == [p.score for p in theirs.places]
    assert [p.distance for p in ours.places] == [p.distance for p in theirs.places]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["float16", "float32", "int8", "map"])
def test_same_ranks_as_the_commands(world, tmp_path, kind, device):
    config = replace(SMALL, local_features=kind)
    asked = write_list(tmp_path / "q.txt", [f"q{i:02d}.png" for i in range(4)])
    for part, images in (("i", world / "i.txt"), ("q", asked)):
        extract(config, images, world, tmp_path / part, device=device)
    result = rerank(
        config, asked, world / "i.txt", tmp_path / "q", tmp_path / "i", device=device,
        dataset_root=world,
    )  # fmt: skip
    model = load_model(config, device=device)
    index = PlaceIndex(model)
    index.add(paths(world, "i"))
    queries = paths(world, "q", 0, 4)
    assert ranks(index, queries) == result.reranked.tolist()
    assert ranks(index, queries, rerank=False) == result.retrieved.tolist()
    for q, query in enumerate(queries):
        found = [place.score for place in index.query(query, COUNT).places]
        np.testing.assert_allclose(found, result.scores["PatchNetVLAD"][q], atol=1e-12)
    # Features of the command are an index, too.
    loaded = PlaceIndex.load(tmp_path / "i", model)
    assert ranks(loaded, queries) == result.reranked.tolist()
    assert loaded.keys == result.index_names
    with pytest.raises(FeatureError, match=rf"{tmp_path}/i\b.*save\(\)"):
        loaded.add(picture(50))
    # And an index is features for the command.
    saved = index.save(tmp_path / "saved")
    again = rerank(
        config, asked, saved / "index.txt", tmp_path / "q", saved, device=device,
        dataset_root=world,
    )  # fmt: skip
    np.testing.assert_array_equal(again.reranked, result.reranked)


class TestAdd:
    def test_in_parts_as_at_once(self, model, world):
        at_once, in_parts = PlaceIndex(model), PlaceIndex(model)
        at_once.add(paths(world, "i"))
        in_parts.add(paths(world, "i", 0, 5))
        for path in paths(world, "i", 5, 7):
            in_parts.add(path)
        in_parts.add(model.describe(paths(world, "i", 7)))
        assert at_once.keys == in_parts.keys == tuple(map(str, paths(world, "i")))
        for query in paths(world, "q"):
            same(at_once.query(query), in_parts.query(query))

    def test_keys_and_positions(self, model):
        index = PlaceIndex(model)
        index.add([picture(0), picture(1)])
        assert index.positions is None
        index.add(picture(2), keys="two", positions=(1, 2))
        index.add([picture(3), picture(4)], keys=("a/b", "c"), positions=[[3, 4], [np.nan, 0]])
        assert index.keys == ("image-000000", "image-000001", "two", "a/b", "c")
        expected = [[np.nan] * 2, [np.nan] * 2, [1, 2], [3, 4], [np.nan] * 2]
        np.testing.assert_array_equal(index.positions, expected)
        assert "a/b" in index
        assert "a//b" in index  # the same path
        assert "x" not in index
        best = index.query(picture(3)).best
        assert (best.key, best.position, best.rank, best.row) == ("a/b", (3.0, 4.0), 1, 3)
        assert best.score == pytest.approx(1.0, abs=1e-3)
        assert best.distance == pytest.approx(0.0, abs=1e-3)
        assert index.query(picture(4)).best.position is None

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"keys": ["a"]}, FeatureError, r"1 keys\D+2\b"),
            ({"keys": ["a", "a"]}, FeatureError, "'a' .*keys="),
            ({"keys": ["there", "a"]}, FeatureError, "'there' .*keys="),
            ({"keys": ["./there", "a"]}, FeatureError, r"'\./there' .*keys="),
            ({"keys": ["a", 3]}, FeatureError, r"key 3\b.*str"),
            ({"keys": ["a", ""]}, ImageListError, "''"),
            ({"keys": ["a", "b\nc"]}, ImageListError, r"'b\\nc'"),
            ({"positions": [[1, 2]]}, FeatureError, r"positions.*\[1, 2\].*\[2, 2\]"),
            ({"positions": [[1, 2, 3]] * 2}, FeatureError, r"positions.*\[2, 3\].*\[2, 2\]"),
            ({"positions": [["x", "y"]] * 2}, FeatureError, "positions.*numbers"),
            ({"positions": [[np.inf, 0]] * 2}, FeatureError, "positions.*finite"),
        ],
    )
    def test_bad_arguments_change_nothing(self, model, options, error, words):
        index = PlaceIndex(model)
        index.add(picture(0), keys="there", positions=[0, 0])
        with pytest.raises(error, match=words):
            index.add([picture(1), picture(2)], **options)
        assert index.keys == ("there",)

    def test_iterators_that_reuse_a_buffer(self, model):
        def frames():
            buffer = np.empty((96, 128, 3), np.uint8)
            for i in range(5):
                buffer[:] = np.asarray(picture(i))
                yield buffer

        expected = [model.describe(picture(i)).descriptor for i in range(5)]
        found = [d.descriptor for d in model.describe(frames())]
        np.testing.assert_array_equal(found, expected)
        index = PlaceIndex(model)
        index.add(frames())
        for i in range(5):
            assert index.query(picture(i)).best.row == i

    def test_one_lazy_image_several_times(self, model, tmp_path):
        picture(0).save(tmp_path / "a.png")
        with Image.open(tmp_path / "a.png") as image:
            found = model.describe([image] * 6)
        np.testing.assert_array_equal(found[5].descriptor, found[0].descriptor)

    def test_keys_after_a_broken_image(self, model):
        index = PlaceIndex(model)
        with pytest.raises(ImageError):
            index.add([picture(0), np.zeros((0, 3, 3), np.uint8), picture(1)])
        index.add(picture(2))
        assert index.keys == ("image-000000", "image-000002", "image-000003")

    def test_positions_of_some(self, model):
        index = PlaceIndex(model)
        index.add([picture(0), picture(1)], positions=[(1, 2), None])
        index.add([picture(2)], positions=(p for p in [(3, 4)]))
        np.testing.assert_array_equal(index.positions, [[1, 2], [np.nan, np.nan], [3, 4]])

    def test_broken_images_do_not_stop_the_others(self, model, world, tmp_path):
        (tmp_path / "broken.png").write_bytes(b"junk")
        images = [paths(world, "i")[0], tmp_path / "broken.png", paths(world, "i")[2]]
        index = PlaceIndex(model)
        with pytest.raises(ImageError, match=rf"1 of 3 .*{tmp_path}/broken\.png"):
            index.add(images, keys=["a", "b", "c"], positions=[[0, 0], [1, 1], [2, 2]])
        assert index.keys == ("a", "c")
        assert index.query(images[2]).best.key == "c"
        np.testing.assert_array_equal(index.positions, [[0, 0], [2, 2]])

    def test_descriptions_of_another_model(self, model):
        other = load_model(replace(SMALL, patch_sizes=(2, 4)), device="cpu")
        described = other.describe(picture(0))
        index = PlaceIndex(model)
        for use in (index.add, index.query):
            with pytest.raises(FeatureError, match=r"patch_sizes = \(2, 4\).*\(2, 3\)"):
                use(described)
        with pytest.raises(FeatureError, match="both"):
            index.add([picture(0), model.describe(picture(1))])

    def test_nothing(self, model, tmp_path):
        index = PlaceIndex(model)
        index.add([])
        answer = index.query(picture(0))
        assert (answer.places, answer.best) == ((), None)
        index.save(tmp_path / "empty")
        loaded = PlaceIndex.load(tmp_path / "empty", model)
        assert len(loaded) == 0
        loaded.add(picture(0))
        assert PlaceIndex.load(tmp_path / "empty", model).keys == ("image-000000",)


class TestQuery:
    def test_threshold(self, model, world):
        index = PlaceIndex(model)
        index.add(paths(world, "i"))
        answer = index.query(world / "q03.png", top_k=3)
        assert len(answer.places) == 3
        assert answer.best == answer.places[0]
        score = answer.best.score
        assert index.query(world / "q03.png", threshold=score).best.key == str(world / "i03.png")
        assert index.query(world / "q03.png", threshold=score + 1e-6).best is None

    def test_score_and_order_are_those_of_match(self, model, world):
        index = PlaceIndex(model)
        index.add(paths(world, "i", 0, 4))
        answer = index.query(model.describe(world / "q02.png"))
        for place in answer.places:
            found = match(answer.query, index.description(place.key))
            assert found.score == pytest.approx(place.score, abs=0.03)  # stored as float16

    def test_retrieval_alone(self, model, world):
        index = PlaceIndex(model)
        index.add(paths(world, "i"))
        answer = index.query(world / "q05.png", 4, rerank=False)
        assert not answer.reranked
        distances = [place.distance for place in answer.places]
        assert distances == sorted(distances)
        assert [place.score for place in answer.places] == [-d for d in distances]

    def test_few_candidates(self, model, world):
        index = PlaceIndex(model)
        index.add(paths(world, "i"))
        first = index.query(world / "q01.png", 3, rerank=False).places
        answer = index.query(world / "q01.png", 2, candidates=3)
        assert {p.row for p in answer.places} <= {p.row for p in first}
        assert len(answer.places) == 2
        assert answer.num_reranked == 3

    def test_time_that_is_too_short(self, model):
        torch.set_num_threads(1)
        index = PlaceIndex(model)
        index.add([picture(i) for i in range(20)], keys=[f"{i}" for i in range(20)])
        within = index.query(picture(3), 20, budget_ms=0)
        assert within.num_reranked == len(within.places) == 8
        fewer = index.query(picture(3), 20, rerank=False).places[:8]
        assert {p.row for p in within.places} == {p.row for p in fewer}
        assert within.places == index.query(picture(3), 8, candidates=8).places
        plain = index.query(picture(3), 20)
        assert plain.num_reranked == 20
        assert index.query(picture(3), 20, budget_ms=1e9).places == plain.places
        assert index.query(picture(3), rerank=False, budget_ms=0).num_reranked == 0

    @pytest.mark.parametrize(
        "options",
        [
            {"top_k": 0},
            {"top_k": "3"},
            {"top_k": 2.5},
            {"candidates": 0},
            {"threshold": "a"},
            {"threshold": float("nan")},
            {"budget_ms": -1},
            {"budget_ms": "soon"},
        ],
    )
    def test_bad_numbers(self, model, options):
        [(name, value)] = options.items()
        with pytest.raises(ArgumentError, match=f"{name} = {value!r}"):
            PlaceIndex(model).query(picture(0), **options)

    def test_bad_arguments(self, model, tmp_path):
        index = PlaceIndex(model)
        index.add(picture(0), keys="a")
        for call, error, words in (
            (lambda: PlaceIndex(tmp_path, model), ArgumentError, r"PlaceIndex\(model, path\)"),
            (lambda: PlaceIndex.load(model, tmp_path), ArgumentError, r"PlaceIndex\(model, path\)"),
            (lambda: PlaceIndex("demo"), ArgumentError, "load_model"),
            (lambda: index.add(5), ImageError, r"\bint\b"),
            (lambda: index.add(picture(1), keys=5), FeatureError, "keys = 5"),
            (lambda: index.query(None), ImageError, "query .*one"),
            (lambda: index.image(0), ArgumentError, r"key 0\b.*str"),
            (lambda: index.save(5), ArgumentError, "path = 5"),
            (lambda: model.describe(None), ImageError, "NoneType"),
            (lambda: model.describe(Image.new("RGB", (0, 5))), ImageError, "image 0 .*0 x 5 px"),
            (lambda: load_model(None), ConfigError, "config = None"),
            (lambda: load_model("demo", 5), ConfigError, "weights = 5"),
        ):
            with pytest.raises(error, match=words):
                call()
        index.add(picture(1), keys=tmp_path / "b")
        assert tmp_path / "b" in index

    def test_descriptions_without_patches(self, model):
        index = PlaceIndex(model)
        index.add(picture(0), keys="a")
        bare = index.query(picture(5), rerank=False).query
        for use in (index.add, index.query):
            with pytest.raises(FeatureError, match=r"query\(rerank=False\)"):
                use(bare)
        with pytest.raises(FeatureError, match=r"model\.describe"):
            match(bare, model.describe(picture(0)))
        assert index.query(bare, rerank=False).best.key == "a"
        other = replace(model.describe(picture(0)), checkpoint="0" * 64)
        with pytest.raises(FeatureError, match="weights"):
            index.add(other)

    def test_a_descriptor_that_is_not_finite(self, model, tmp_path):
        index = PlaceIndex(model, tmp_path / "a")
        described = model.describe(picture(0))
        broken = replace(described, descriptor=described.descriptor * np.nan)
        with pytest.raises(FeatureError, match=r"\bnan\b"):
            index.add([model.describe(picture(1)), broken], keys=["one", "nan"])
        index.add(picture(2), keys="two")
        assert index.query(picture(2)).best.key == "two"
        assert PlaceIndex.load(tmp_path / "a", model).keys == ("one", "two")

    def test_answers_can_be_copied(self, model):
        index = PlaceIndex(model)
        index.add(picture(0), keys="a")
        answer = index.query(picture(0))
        for copied in (copy.deepcopy(answer), pickle.loads(pickle.dumps(answer))):
            assert copied.places == answer.places
            assert copied.best == answer.best
            with pytest.raises(DrawingError, match="copied"):
                copied.plot()
        assert answer.plot().axes

    def test_several_images(self, model):
        with pytest.raises(ImageError, match=r"query .*one"):
            PlaceIndex(model).query([picture(0), picture(1)])

    def test_without_patches(self, world, tmp_path):
        plain = load_model(replace(SMALL, pooling="netvlad"), device="cpu")
        index = PlaceIndex(plain, tmp_path / "index")
        index.add(paths(world, "i"))
        answer = index.query(world / "q07.png")
        assert not answer.reranked
        assert answer.best.key == str(world / "i07.png")
        described = index.description(answer.best.key)
        assert described.patches == described.grids == ()
        np.testing.assert_array_equal(
            described.descriptor, plain.describe(world / "i07.png").descriptor
        )
        loaded = PlaceIndex.load(index.save(tmp_path / "saved"), plain)
        same(loaded.query(world / "q07.png"), answer)
        loaded.add(picture(77))
        assert len(PlaceIndex.load(tmp_path / "saved", plain)) == COUNT + 1

    def test_description_and_image(self, model, world):
        index = PlaceIndex(model)
        index.add(world / "i04.png", keys="four")
        expected = model.describe(world / "i04.png")
        found = index.description("four")
        np.testing.assert_array_equal(found.descriptor, expected.descriptor)
        for ours, theirs in zip(found.patches, expected.patches, strict=True):
            np.testing.assert_allclose(ours, theirs, atol=1e-3)
        away = np.abs(index.image("four").astype(float) - expected.image)
        assert away.mean() < 3  # JPEG
        with pytest.raises(KeyNotFoundError, match=r"'five'\D+1\b"):
            index.image("five")

    def test_pictures_keep_their_shape(self, model, tmp_path):
        wide = picture(3).resize((600, 200))
        with PlaceIndex(model) as index:
            index.add(wide, keys="wide")
            saved = index.save(tmp_path / "saved")
        with PlaceIndex.load(saved, model) as index:
            for image in (index.picture("wide"), index.description("wide").picture):
                assert image.shape[1] / image.shape[0] == pytest.approx(3, rel=0.01)
            assert index.image("wide").shape == model.describe(wide).image.shape
            assert model.describe(wide).aspect == 3

    def test_another_kind_of_faiss_index(self, world, tmp_path):
        model = load_model(replace(SMALL, faiss_index="HNSW8"), device="cpu")
        index = PlaceIndex(model, tmp_path / "a")
        index.add(paths(world, "i", 0, 8))
        index.save()
        index.add(paths(world, "i", 8))
        index.close()
        loaded = PlaceIndex.load(tmp_path / "a", model)  # the tail is added to what was saved
        assert isinstance(loaded._rows.faiss._built, faiss.IndexHNSWFlat)
        for i, query in enumerate(paths(world, "q")):
            assert loaded.query(query).best.row == i
        with pytest.raises(ConfigError, match=r"IVF2,Flat .*Flat, SQfp16"):
            PlaceIndex(load_model(replace(SMALL, faiss_index="IVF2,Flat"), device="cpu"))

    def test_parameters_of_faiss(self, world):
        config = replace(SMALL, faiss_index="HNSW8", faiss_parameters="efSearch=5")
        index = PlaceIndex(load_model(config, device="cpu"))
        index.add(paths(world, "i"))
        index.query(paths(world, "q")[0], 2)
        assert index._rows.faiss._built.hnsw.efSearch == 5
        config = replace(config, faiss_parameters="nprobe=5")
        with pytest.raises(ConfigError, match=r"HNSW8 .*nprobe"):
            PlaceIndex(load_model(config, device="cpu"))


class TestThreads:
    """Those that match are started once, and end with the index."""

    @pytest.fixture
    def index(self, model):
        index = PlaceIndex(model)
        index.add([picture(i) for i in range(4)])
        yield index
        index.close()

    @staticmethod
    def alive():
        prefixes = ("load_", "match_", "verify_")
        return {t.ident for t in threading.enumerate() if t.name.startswith(prefixes)}

    def test_kept_between_queries(self, index):
        torch.set_num_threads(3)
        index.query(picture(0), rerank=False)
        assert not self.alive()
        index.query(picture(0))
        threads = self.alive()
        assert threads
        assert torch.get_num_threads() == 3
        for i in range(4):
            assert index.query(picture(i)).best.row == i
            assert self.alive() == threads
            assert torch.get_num_threads() == 3
        index.close()
        assert not self.alive()

    def test_end_with_the_index(self, model):
        index = PlaceIndex(model)
        index.add(picture(0))
        index.query(picture(0))
        threads = [t for t in threading.enumerate() if t.ident in self.alive()]
        assert threads
        del index
        for thread in threads:
            thread.join(60)
        assert not self.alive()

    def test_candidates_are_read_once(self, index, monkeypatch):
        read = []
        original = places_folder.PlaceReader.read

        def noted(reader, i):
            read.append(reader.names[i])
            return original(reader, i)

        monkeypatch.setattr(places_folder.PlaceReader, "read", noted)
        for i in range(3):
            assert index.query(picture(i)).best.row == i
        assert sorted(read) == sorted(index.keys)
        index.add(picture(4))
        assert index.query(picture(4)).best.row == 4
        assert sorted(read) == sorted(index.keys)

    def test_answers_are_those_of_an_index_that_was_not_asked_before(self, index, model, tmp_path):
        index.save(tmp_path / "saved")
        for i in range(4):
            with PlaceIndex.load(tmp_path / "saved", model) as fresh:
                same(index.query(picture(i)), fresh.query(picture(i)))

    @pytest.mark.parametrize("count", [3, 1])
    def test_as_many_as_pytorch_uses(self, index, count):
        torch.set_num_threads(2)
        described = index.model.describe(picture(1))  # once: their number decides on rounding
        expected = index.query(described)
        torch.set_num_threads(count)
        same(index.query(described), expected)
        names = [thread.name for thread in threading.enumerate()]
        assert sum(name.startswith("match_") for name in names) == count
        assert torch.get_num_threads() == count

    def test_an_error_is_forgotten(self, index, monkeypatch):
        expected = index.query(picture(2))

        def broken(*arguments):
            raise FeatureError("damaged")

        index.add(picture(5))  # which is not in memory
        before = torch.get_num_threads()
        with monkeypatch.context() as patch:
            patch.setattr(places_folder.PlaceReader, "read", broken)
            with pytest.raises(FeatureError, match="damaged"):
                index.query(picture(5))
        assert torch.get_num_threads() == before
        assert not self.alive()
        assert index.query(picture(5)).best.row == 4
        assert index.query(picture(2)).best == expected.best

    def test_closed_while_others_ask(self, index, model):
        described = [model.describe(picture(i)) for i in range(4)]
        index.query(described[0])
        found: list[object] = []

        def ask():
            try:
                while True:
                    found.append(index.query(described[1]).best.row)
            except FeatureError as error:
                found.append(str(error))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        while len(found) < 6:
            time.sleep(0.001)
        index.close()
        for thread in threads:
            thread.join()
        assert {answer for answer in found if isinstance(answer, int)} == {1}
        assert len([answer for answer in found if "is closed" in str(answer)]) == 3
        assert not self.alive()

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_process_starts_its_own(self, index):
        torch.set_num_threads(1)  # those of OpenMP do not survive a fork
        expected = index.query(picture(3))
        child = os.fork()
        if child == 0:
            status = 1
            try:
                signal.alarm(60)
                same(index.query(picture(3)), expected)
                status = 0
            finally:
                os._exit(status)
        assert os.waitpid(child, 0)[1] == 0
        same(index.query(picture(3)), expected)


class TestKeeping:
    def test_temporary_folders_go(self, model):
        index = PlaceIndex(model)
        index.add(picture(0))
        folder = index.path
        assert folder.is_dir()
        index.close()
        assert not folder.exists()
        with pytest.raises(FeatureError, match=rf"{folder} .*PlaceIndex\.load"):
            index.query(picture(0))
        other = PlaceIndex(model)
        folder = other.path
        del other
        gc.collect()
        assert not folder.exists()

    def test_links_mounts_and_other_folders(self, model, world, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        index = PlaceIndex(model, "relative")
        index.add(paths(world, "i", 0, 2))
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        assert index.query(world / "q01.png").best.row == 1
        (tmp_path / "link").symlink_to(tmp_path / "real")
        for _ in range(2):
            index.save(tmp_path / "link")
        assert (tmp_path / "link").is_symlink()
        assert len(PlaceIndex.load(tmp_path / "real", model)) == 2
        index.save(".")  # empty, and cannot be renamed
        assert len(PlaceIndex.load(tmp_path / "elsewhere", model)) == 2

    def test_images_of_extracted_features(self, model, world, tmp_path, monkeypatch):
        extract(SMALL, world / "i.txt", world, tmp_path / "features", device="cpu")
        monkeypatch.chdir(tmp_path)
        index = PlaceIndex.load(tmp_path / "features", model, dataset_root=world)
        answer = index.query(world / "q01.png")
        found = match(answer.query, index.description(answer.best.key))
        assert found.score == pytest.approx(answer.best.score)
        assert answer.plot().axes
        with pytest.raises(ImageError, match="dataset_root"):
            PlaceIndex.load(tmp_path / "features", model).image("i01.png")

    @pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
    @pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
    def test_a_forked_process_leaves_the_folder_alone(self, model):
        index = PlaceIndex(model)
        index.add(picture(0))
        child = os.fork()
        if child == 0:
            index._finalizer()
            os._exit(0)
        os.waitpid(child, 0)
        assert index.query(picture(0)).best.row == 0

    def test_an_interrupted_commit_is_caught_up_with(self, model, tmp_path, monkeypatch):
        index = PlaceIndex(model, tmp_path / "a")
        index.add(picture(0), keys="zero")
        add = StoreIndex.add

        def interrupted(*arguments):
            add(*arguments)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(StoreIndex, "add", interrupted)
            with pytest.raises(KeyboardInterrupt):
                index.add(picture(1), keys="one")
        index.add(picture(2), keys="two")
        assert index.keys == ("zero", "one", "two")
        for i, key in enumerate(index.keys):
            assert index.query(picture(i)).best.key == key

    def test_what_is_added_is_kept_in_parts(self, model, tmp_path, monkeypatch):
        kept = []
        add = StoreIndex.add
        monkeypatch.setattr(StoreIndex, "add", lambda *words: kept.append(1) or add(*words))
        monkeypatch.setattr(places_folder, "COMMIT_BYTES", 1)
        index = PlaceIndex(model, tmp_path / "a")
        index.add([picture(i) for i in range(3)])
        assert len(kept) >= 3
        assert len(PlaceIndex.load(tmp_path / "a", model)) == 3

    def test_loading_while_another_process_adds(self, model, tmp_path):
        code = f"""
{thin.IN_A_PROCESS}from test_place_index import *
model = load_model(SMALL, device="cpu")
described = model.describe(picture(0))
index = PlaceIndex(model, {str(tmp_path / "a")!r})
for i in range(150):
    index.add(described, keys=str(i))
    if i == 0:
        print("begun", flush=True)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        assert process.stdout.readline() == "begun\n"
        counts = []
        while process.poll() is None:
            counts.append(len(PlaceIndex.load(tmp_path / "a", model)))
        process.stdout.close()
        assert process.returncode == 0
        assert counts == sorted(counts)
        assert len(PlaceIndex.load(tmp_path / "a", model)) == 150

    def test_a_new_process_says_the_same(self, model, world, tmp_path):
        index = PlaceIndex(model)
        index.add(paths(world, "i"), positions=np.arange(2 * COUNT).reshape(COUNT, 2))
        index.save(tmp_path / "saved")
        code = f"""
import json
{thin.IN_A_PROCESS}from test_place_index import *
model = load_model(SMALL, device="cpu")
with PlaceIndex.load({str(tmp_path / "saved")!r}, model) as index:
    answers = [index.query(p).places for p in sys.argv[1:]]
print(json.dumps([[[p.key, p.score, p.distance, p.position] for p in a] for a in answers]))
"""
        queries = [str(path) for path in paths(world, "q")]
        done = subprocess.run(
            [sys.executable, "-c", code, *queries], capture_output=True, text=True, check=True
        )
        for query, theirs in zip(queries, json.loads(done.stdout), strict=True):
            ours = index.query(query).places
            assert [[p.key, p.score, p.distance, list(p.position)] for p in ours] == theirs

    def test_saving_again_and_in_place(self, model, world, tmp_path):
        index = PlaceIndex(model, tmp_path / "home")
        index.add(paths(world, "i", 0, 3))
        assert index.save() == tmp_path / "home"
        assert len(np.load(tmp_path / "home" / GLOBAL_FILE)) == 3
        index.add(paths(world, "i", 3, 5))
        for _ in range(2):
            index.save(tmp_path / "copy")
        assert len((tmp_path / "copy" / "index.txt").read_text().split()) == 5
        assert sorted(p.name for p in tmp_path.iterdir()) == ["copy", "home"]
        index.add(paths(world, "i", 5, 6))
        assert len(PlaceIndex.load(tmp_path / "copy", model)) == 5
        assert len(PlaceIndex.load(tmp_path / "home", model)) == 6

    def test_folders_that_hold_something_else(self, model, world, tmp_path):
        (tmp_path / "full").mkdir()
        (tmp_path / "full" / "thesis.tex").write_text("mine")
        index = PlaceIndex(model)
        with pytest.raises(OutputError, match=f"{tmp_path}/full "):
            index.save(tmp_path / "full")
        extract(SMALL, world / "i.txt", world, tmp_path / "features", device="cpu")
        with pytest.raises(OutputError, match=f"{tmp_path}/features "):
            index.save(tmp_path / "features")
        with pytest.raises(FeatureError, match=rf"{tmp_path}/features .*PlaceIndex\.load"):
            PlaceIndex(model, tmp_path / "features")
        with pytest.raises(OutputError, match="save a path"):
            index.save()
        index.save(tmp_path / "map")
        (tmp_path / "map" / "notes.txt").write_text("mine")
        with pytest.raises(OutputError, match=f"{tmp_path}/map "):
            index.save(tmp_path / "map")
        with pytest.raises(FeatureError, match=f"{tmp_path}/full "):
            PlaceIndex(model, tmp_path / "full")
        with PlaceIndex(model, tmp_path / "live") as live:
            live.add(picture(0))
            with pytest.raises(OutputError, match=f"{tmp_path}/live "):
                index.save(tmp_path / "live")
            assert live.query(picture(0)).best.row == 0
        assert sorted(path.name for path in tmp_path.iterdir()) == [
            "features", "full", "live", "map",
        ]  # fmt: skip
        with pytest.raises(FeatureError, match=rf"{tmp_path}/full: .*PlaceIndex\.save"):
            PlaceIndex.load(tmp_path / "full", model)
        assert (tmp_path / "full" / "thesis.tex").read_text() == "mine"

    def test_copied_features_can_grow(self, model, world, tmp_path):
        extract(SMALL, world / "i.txt", world, tmp_path / "features", device="cpu")
        before = (tmp_path / "features" / INDEX_FILE).read_bytes()
        copy = PlaceIndex.load(tmp_path / "features", model).save(tmp_path / "copy")
        index = PlaceIndex.load(copy, model)
        index.add(picture(60), keys="new")
        assert index.query(picture(60)).best.key == "new"
        assert (tmp_path / "features" / INDEX_FILE).read_bytes() == before

    def test_saving_changes_no_extracted_features(self, model, world, tmp_path):
        extract(SMALL, world / "i.txt", world, tmp_path / "features", device="cpu")
        before = {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()}
        index = PlaceIndex.load(tmp_path / "features", model, dataset_root=world)
        for folder in (None, tmp_path / "features"):
            with pytest.raises(OutputError, match=f"{tmp_path}/features .*save"):
                index.save(folder)
        after = {file.name: file.read_bytes() for file in (tmp_path / "features").iterdir()}
        assert after == before

    def test_saved_with_fewer_patch_sizes(self, model, world, tmp_path):
        """What a store holds stays what it says that it holds."""
        full = PlaceIndex(model, tmp_path / "a")
        full.add(paths(world, "i", 0, 4))
        full.close()
        fewer = replace(SMALL, patch_sizes=(3,), strides=(1,), patch_weights=(1.0,))
        index = PlaceIndex.load(tmp_path / "a", load_model(fewer, device="cpu"))
        expected = index.query(world / "q01.png")
        index.save()
        index.save(tmp_path / "copy")
        for folder in ("a", "copy"):
            again = PlaceIndex.load(tmp_path / folder, index.model)
            same(again.query(world / "q01.png"), expected)
            whole = PlaceIndex.load(tmp_path / folder, model)
            assert whole.query(world / "q01.png").best.row == 1
            whole.add(picture(90), keys="more")
            whole.close()

    def test_another_model(self, model, world, tmp_path):
        index = PlaceIndex(model, tmp_path / "a")
        index.add(paths(world, "i", 0, 2))
        index.close()
        for changes, words in (
            ({"image_size": (96, 160)}, r"image_size .*\[96, 128\].*\[96, 160\]"),
            ({"patch_sizes": (2, 4)}, r"size 4\b"),
            ({"patch_vlad": "direct"}, "patch_vlad .*integral.*direct"),
        ):
            other = load_model(replace(SMALL, **changes), device="cpu")
            with pytest.raises(FeatureError, match=f"{tmp_path}/a .*{words}"):
                PlaceIndex.load(tmp_path / "a", other)
        fewer = replace(SMALL, patch_sizes=(3,), strides=(1,), patch_weights=(1.0,))
        loaded = PlaceIndex.load(tmp_path / "a", load_model(fewer, device="cpu"))
        assert loaded.query(world / "q01.png").best.row == 1
        with pytest.raises(FeatureError, match=rf"{tmp_path}/a: .*\(2, 3\)"):
            loaded.add(picture(9))

    def test_one_process_writes(self, model, tmp_path):
        first = PlaceIndex(model, tmp_path / "a")
        first.add(picture(0))
        second = PlaceIndex.load(tmp_path / "a", model)
        with pytest.raises(FeatureError, match=f"{tmp_path}/a; "):
            second.add(picture(1))
        first.add(picture(2), keys="two")
        first.close()
        second.add(picture(1))  # and catches up with the first
        assert second.keys == ("image-000000", "two", "image-000002")
        assert second.query(picture(2)).best.key == "two"
        assert PlaceIndex.load(tmp_path / "a", model).keys == second.keys
        first = PlaceIndex.load(tmp_path / "a", model)
        second.add(picture(3))
        second.close()
        first.save()
        assert (tmp_path / "a" / "index.txt").read_text().split() == list(first.keys)
        assert len(first) == 4

    def test_a_killed_process_loses_nothing_that_was_added(self, model, tmp_path):
        code = f"""
{thin.IN_A_PROCESS}from test_place_index import *
index = PlaceIndex(load_model(SMALL, device="cpu"), {str(tmp_path / "a")!r})
for i in range(1000):
    index.add(picture(i), keys=str(i))
    print(i, flush=True)
"""
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.strip() == "3":
                break
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        index = PlaceIndex.load(tmp_path / "a", model)
        assert len(index) >= 4
        for i in range(4):
            assert index.query(picture(i)).best.key == str(i)
        index.add(picture(5000))
        assert index.query(picture(5000)).best.score == pytest.approx(1.0, abs=1e-3)

    def test_a_full_disk(self, model, tmp_path, monkeypatch):
        index = PlaceIndex(model, tmp_path / "a")
        index.add(picture(0))

        left = 7  # arrays; an image has three

        def full(descriptor, array):
            nonlocal left
            left -= 1
            if left < 0:
                raise OSError(28, "No space left on device")
            write_all(descriptor, array)

        with monkeypatch.context() as patch:
            patch.setattr("patchnetvlad.features.store.shard_writer.write_all", full)
            with pytest.raises(FeatureError, match="No space left"):
                index.add([picture(i) for i in range(1, 5)], keys=list("abcd"))
        assert index.keys == ("image-000000", "a", "b")
        assert index.query(picture(2)).best.key == "b"
        assert PlaceIndex.load(tmp_path / "a", model).keys == index.keys
        index.add([picture(3), picture(4)], keys=list("cd"))
        for i in range(1, 5):
            assert index.query(picture(i)).best.row == i
        assert len(PlaceIndex.load(tmp_path / "a", model)) == 5


def readers_and_writer(model, seconds, readers, total):
    """Ask in threads while images are added; give the number of answers that were checked."""
    index = PlaceIndex(model)
    index.add([picture(i) for i in range(4)], keys=[str(i) for i in range(4)])
    queries = {i: model.describe(picture(i)) for i in range(total)}
    wrong: list[str] = []
    answered = [0] * readers
    end = time.monotonic() + seconds
    written = threading.Event()

    def read(number):
        random = np.random.default_rng(number)
        while time.monotonic() < end or not written.is_set():
            there = len(index)
            i = int(random.integers(there))
            answer = index.query(queries[i], 3, rerank=bool(random.integers(2)))
            best = answer.best
            if best.key != str(i) or best.distance > 1e-3 or best.row != i:
                wrong.append(f"{i}: {best}")
            if len({p.row for p in answer.places}) != 3:
                wrong.append(f"{i}: {answer.places}")
            answered[number] += 1

    def run(number):
        try:
            read(number)
        except Exception as error:
            wrong.append(repr(error))

    threads = [threading.Thread(target=run, args=(n,)) for n in range(readers)]
    for thread in threads:
        thread.start()
    pause = seconds / (total - 4)
    for i in range(4, total):
        index.add(queries[i] if i % 2 else picture(i), keys=str(i))
        time.sleep(max(0.0, end - seconds + pause * (i - 3) - time.monotonic()))
    written.set()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert len(index) == total
    assert min(answered) > 0
    return sum(answered)


def test_readers_beside_a_writer(model):
    assert readers_and_writer(model, seconds=3.0, readers=4, total=20) > 10


@pytest.mark.slow
def test_eight_readers_beside_a_writer_for_a_minute(model):
    print(readers_and_writer(model, seconds=60.0, readers=8, total=60), "answers")


@needs_shared
@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_tower(real_network, tmp_path):
    """The whole of a real data set, added in two parts, saved, and loaded again."""
    tower = SHARED / "tower"
    config = replace(
        Config.load("demo"), resume_path=str(SHARED / "checkpoints" / "reference_WPCA")
    )
    lists = {part: (tower / f"{part}.txt").read_text().split() for part in ("query", "index")}
    for part in lists:
        extract(config, tower / f"{part}.txt", tower, tmp_path / part, device="cpu")
    result = rerank(
        config, tower / "query.txt", tower / "index.txt", tmp_path / "query", tmp_path / "index",
        dataset_root=tower, device="cpu",
    )  # fmt: skip
    model = load_model(config, device="cpu")
    index = PlaceIndex(model)
    images = [tower / name for name in lists["index"]]
    index.add(images[:50], keys=lists["index"][:50])
    index.add(images[50:], keys=lists["index"][50:])
    loaded = PlaceIndex.load(index.save(tmp_path / "saved"), model)
    for q, name in enumerate(lists["query"]):
        answer = loaded.query(tower / name, top_k=100)
        assert [place.row for place in answer.places] == result.reranked[q].tolist()
        if q < 3:
            same(index.query(tower / name, top_k=100), answer)
