# SPDX-License-Identifier: MIT
"""An index of places amid forks and damage: each costs what it hits, and nothing else."""

import contextlib
import logging
import os
import shutil
import sqlite3
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
from place_data import SMALL, picture
from test_store_cli import NAMES, write

from patchnetvlad import PlaceIndex, load_model
from patchnetvlad.base.text import parse_json
from patchnetvlad.cli import store as store_command
from patchnetvlad.errors import FeatureError, OutputError, PatchNetVLADError
from patchnetvlad.features.inspect import store_info, verify_features
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.places.saved import FAISS_FILE

pytestmark = [
    pytest.mark.usefixtures("thin_network"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
KEYS = tuple("abcde")


@pytest.fixture(scope="module")
def model():
    return load_model(SMALL, device="cpu")


@pytest.fixture(scope="module")
def described(model):
    torch.set_num_threads(1)
    return model.describe([picture(i) for i in range(8)])


def make(model, folder, described, keys=KEYS):
    index = PlaceIndex(model, folder)
    index.add(described[: len(keys)], keys=list(keys))
    return index


def in_child(work):
    """Run in a forked process; return its status, -SIGKILL if it was killed."""
    child = os.fork()
    if child == 0:
        status = 99
        try:
            status = work() or 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def flip(folder, key, byte):
    """Change one bit of a record."""
    with contextlib.closing(sqlite3.connect(folder / INDEX_FILE)) as db:
        query = "SELECT shard, start FROM records WHERE name = ?"
        shard, start = db.execute(query, (key,)).fetchone()
    file = folder / f"features-{shard:05d}.bin"
    content = bytearray(file.read_bytes())
    content[start + byte] ^= 1
    file.write_bytes(content)


# --- forks ----------------------------------------------------------------------------------------


@forks
class TestForks:
    def test_one_of_both_writes(self, model, described, tmp_path):
        index = make(model, tmp_path / "a", described)

        def add():
            assert index.query(described[0]).best.key == "a"
            with pytest.raises(FeatureError):
                index.add(described[5], keys="child")
            index.close()

        assert in_child(add) == 0
        index.add(described[6], keys="parent")
        assert in_child(add) == 0  # the lock is still the parent's
        index.close()
        loaded = PlaceIndex.load(tmp_path / "a", model)
        assert loaded.keys == (*KEYS, "parent")
        assert loaded.query(described[6]).best.key == "parent"

    def test_a_child_writes_when_its_parent_has_done(self, model, described, tmp_path):
        index = make(model, tmp_path / "a", described)
        index.save()  # lets go of the folder
        assert in_child(lambda: index.add(described[5], keys="child")) == 0
        index.add(described[6], keys="parent")
        index.close()
        assert PlaceIndex.load(tmp_path / "a", model).keys == (*KEYS, "child", "parent")

    def test_while_other_threads_add_and_ask(self, model, described, tmp_path):
        index = make(model, tmp_path / "a", described)
        stop = threading.Event()

        def add():
            number = 0
            while not stop.is_set():
                index.add(described[number % 5], keys=f"more{number}")
                index.query(described[0], rerank=False)
                number += 1

        def look():
            assert len(index) == len(index.keys)
            assert index.query(described[1], rerank=False).best.key in ("b", *index.keys[5:])
            with pytest.raises(FeatureError):
                index.add(described[5], keys="child")

        thread = threading.Thread(target=add)
        thread.start()
        try:
            assert [in_child(look) for _ in range(10)] == [0] * 10
        finally:
            stop.set()
            thread.join()
        index.close()
        assert PlaceIndex.load(tmp_path / "a", model).keys == index.keys
        assert verify_features(tmp_path / "a", progress=False).sound


# --- saving -------------------------------------------------------------------------------------


def test_saving_that_fails_leaves_no_folder(model, described, tmp_path, monkeypatch):
    index = make(model, None, described)
    monkeypatch.setattr(
        "shutil.copyfile", lambda *paths: (_ for _ in ()).throw(OSError(28, "full"))
    )
    with pytest.raises(OutputError, match=f"{tmp_path}/saved "):
        index.save(tmp_path / "saved")
    assert not any(tmp_path.iterdir())


# --- damage ---------------------------------------------------------------------------------------


class TestDamage:
    @pytest.fixture(params=["unsaved", "saved"])
    def folder(self, request, model, described, tmp_path):
        with make(model, tmp_path / "a", described) as index:
            if request.param == "saved":
                index.save()
        return tmp_path / "a"

    def test_a_global_descriptor(self, folder, model, described, caplog):
        (folder / GLOBAL_FILE).unlink(missing_ok=True)
        flip(folder, "c", 5)
        with caplog.at_level(logging.WARNING):
            index = PlaceIndex.load(folder, model)
        assert "record of c " in caplog.text
        assert index.keys == ("a", "b", "d", "e")
        for i, key in ((0, "a"), (4, "e")):
            assert index.query(described[i]).best.key == key
            assert np.array_equal(index.image(key), described[i].image) or index.image(key).size
        with pytest.raises(FeatureError, match=f"--drop {folder} "):
            index.add(described[2], keys="c")
        with pytest.raises(OutputError, match=f"--drop {folder} "):
            index.save()

    def test_what_is_beside_it_keeps_its_image(self, folder, model, described):
        (folder / GLOBAL_FILE).unlink(missing_ok=True)
        before = PlaceIndex.load(folder, model).image("e")
        flip(folder, "c", 5)
        assert np.array_equal(PlaceIndex.load(folder, model).image("e"), before)

    @pytest.mark.parametrize("byte", [5, 2000])
    def test_it_is_taken_out_and_added_again(self, folder, model, described, byte, capsys):
        before = PlaceIndex.load(folder, model).image("e")
        flip(folder, "c", byte)
        assert store_command.main(["verify", "--drop", str(folder)]) == 1
        assert "c: features-00000.bin" in capsys.readouterr().out
        assert store_command.main(["verify", str(folder)]) == 0
        index = PlaceIndex.load(folder, model)
        assert index.keys == ("a", "b", "d", "e")
        assert np.array_equal(index.image("e"), before)
        index.add(described[2], keys="c")
        index.save()
        index.close()
        loaded = PlaceIndex.load(folder, model)
        assert loaded.keys == ("a", "b", "d", "e", "c")
        for i, key in enumerate(KEYS):
            assert loaded.query(described[i]).best.key == key
        assert verify_features(folder, progress=False).sound

    def test_a_copy_is_without_it(self, folder, model, described, tmp_path):
        (folder / GLOBAL_FILE).unlink(missing_ok=True)
        flip(folder, "c", 5)
        PlaceIndex.load(folder, model).save(tmp_path / "copy")
        copy = PlaceIndex.load(tmp_path / "copy", model)
        assert copy.keys == ("a", "b", "d", "e")
        copy.add(described[2], keys="c")
        assert copy.query(described[2]).best.key == "c"
        copy.close()
        assert verify_features(tmp_path / "copy", progress=False).sound

    def test_patches_are_passed_over(self, folder, model, described, caplog, tmp_path):
        flip(folder, "c", 2000)
        index = PlaceIndex.load(folder, model)
        for i, key in enumerate(KEYS):
            answer = index.query(described[i])
            assert {place.key for place in answer.places} == {*KEYS} - {"c"}
            assert answer.best.key == key or key == "c"
        assert caplog.text.count("record of c ") == 1
        assert index.query(described[2], rerank=False).best.key == "c"
        with pytest.raises(FeatureError, match=f"record of c in {folder} .*--drop {folder} "):
            index.description("c")
        index.save(tmp_path / "copy")
        assert verify_features(tmp_path / "copy", progress=False).sound

    def test_all_patches(self, model, described, tmp_path):
        with make(model, tmp_path / "a", described, "ab"):
            pass
        flip(tmp_path / "a", "a", 2000)
        flip(tmp_path / "a", "b", 2000)
        with pytest.raises(
            FeatureError, match=f"record of a in {tmp_path}/a .*--drop {tmp_path}/a "
        ):
            PlaceIndex.load(tmp_path / "a", model).query(described[0])

    def test_records_that_are_gone(self, folder, model):
        with contextlib.closing(sqlite3.connect(folder / INDEX_FILE)) as db, db:
            db.execute("DELETE FROM records WHERE name = 'b'")
        assert PlaceIndex.load(folder, model).keys == ("a", "c", "d", "e")
        found = verify_features(folder, drop=True, progress=False)
        assert [damage.image for damage in found.damages if damage.image] == ["b"]
        assert verify_features(folder, progress=False).sound
        assert PlaceIndex.load(folder, model).keys == ("a", "c", "d", "e")


class TestChecksums:
    def test_rows_that_are_exchanged(self, model, described, tmp_path):
        with make(model, tmp_path / "a", described) as index:
            index.save()
        file = tmp_path / "a" / GLOBAL_FILE
        np.save(file, np.load(file)[::-1])
        index = PlaceIndex.load(tmp_path / "a", model)
        for i, key in enumerate(KEYS):
            assert index.query(described[i], rerank=False).best.key == key
        assert not verify_features(tmp_path / "a", progress=False).sound

    def test_rows_of_features_that_are_matched(self, tmp_path):
        names = NAMES
        write(tmp_path / "f", "float16")
        StoreReader(tmp_path / "f", names)
        file = tmp_path / "f" / GLOBAL_FILE
        np.save(file, np.load(file)[::-1])
        with pytest.raises(
            FeatureError, match=rf"{tmp_path}/f: {GLOBAL_FILE} .*seq/0\.jpg;.*feature_extract"
        ):
            StoreReader(tmp_path / "f", names)

    @pytest.mark.parametrize("kind", ["HNSW8", "SQfp16"])
    def test_bytes_of_faiss(self, kind, described, tmp_path):
        model = load_model(replace(SMALL, faiss_index=kind), device="cpu")
        with make(model, tmp_path / "a", described) as index:
            index.save()
        file = tmp_path / "a" / FAISS_FILE
        content = file.read_bytes()
        for byte in range(0, len(content), 97):
            damaged = bytearray(content)
            damaged[byte] ^= 255
            file.write_bytes(damaged)
            index = PlaceIndex.load(tmp_path / "a", model)
            assert [index.query(d, rerank=False).best.key for d in described[:5]] == [*KEYS]
        for end in range(0, len(content), 97):
            file.write_bytes(content[:end])
            assert len(PlaceIndex.load(tmp_path / "a", model)) == 5

    def test_faiss_of_other_descriptors(self, described, tmp_path):
        model = load_model(replace(SMALL, faiss_index="HNSW8"), device="cpu")
        with make(model, tmp_path / "a", described) as index:
            index.save()
        with make(model, tmp_path / "b", described[::-1]) as index:
            index.save()
        (tmp_path / "b" / FAISS_FILE).replace(tmp_path / "a" / FAISS_FILE)
        index = PlaceIndex.load(tmp_path / "a", model)
        assert [index.query(d, rerank=False).best.key for d in described[:5]] == [*KEYS]


VALUES = (None, -1, 2**62, 1.5, "text", b"\xff", "[" * 100_000, '[["O", [2]]]', "{}")
COLUMNS = {
    "about": ("value",),
    "images": ("name",),
    "records": ("shard", "start", "bytes", "head", "arrays", "head_crc32", "crc32", "modified"),
    "places": ("key", "x", "z", "height", "image"),
}


@pytest.mark.parametrize(("table", "column"), [(t, c) for t, of in COLUMNS.items() for c in of])
def test_values_of_other_kinds(table, column, model, described, tmp_path):
    with make(model, tmp_path / "a", described, "abc") as index:
        index.save()
    where = {"about": "key = 'manifest'", "records": "name = 'b'"}.get(table, "place = 1")
    for number, value in enumerate(VALUES):
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "a", folder)
        with (
            contextlib.suppress(sqlite3.IntegrityError),
            contextlib.closing(sqlite3.connect(folder / INDEX_FILE)) as db,
            db,
        ):
            db.execute(f"UPDATE {table} SET {column} = ? WHERE {where}", (value,))
        for use in (
            lambda to=folder: asked(PlaceIndex.load(to, model), described),
            lambda to=folder: StoreReader(to).shapes(1),
            lambda to=folder: StoreReader(to, ["a", "b", "c"]).read(1),
            lambda to=folder: store_info(to),
            lambda to=folder: verify_features(to, progress=False),
            lambda to=folder: verify_features(to, drop=True, progress=False),
        ):
            with contextlib.suppress(PatchNetVLADError):
                use()


def asked(index, described):
    assert index.query(described[0]).best.key == "a"
    assert index.query(described[2]).best.key == "c"
    assert index.positions is None or len(index.positions) == len(index)
    index.image("b")


def test_json_that_is_nested_too_deep():
    with pytest.raises(ValueError, match="deep"):
        parse_json("[" * 100_000)
