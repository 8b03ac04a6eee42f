# SPDX-License-Identifier: MIT
"""What is killed at any change of a file loses nothing, and ends as if undisturbed when run again.

One moment in seventeen is tried; with ``-m slow``, every one.
"""

from __future__ import annotations

import contextlib
import itertools
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from killing import killed, needs_fork
from place_data import SMALL, picture
from test_shares import content, write_shares
from test_store_cli import NAMES, contents, write

from patchnetvlad import PlaceIndex, load_model
from patchnetvlad.errors import FeatureError
from patchnetvlad.features import convert, merge
from patchnetvlad.features.convert import convert_features
from patchnetvlad.features.hdf5 import Hdf5Reader
from patchnetvlad.features.inspect import verify_features
from patchnetvlad.features.lock import LOCK_FILE
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE
from patchnetvlad.features.merge import merge_shares
from patchnetvlad.features.store import writer
from patchnetvlad.features.store.index import StoreIndex, shard_name
from patchnetvlad.places.saved import FAISS_FILE, LIST_FILE

pytestmark = [
    needs_fork,
    pytest.mark.usefixtures("thin_network"),
    pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning"),
]
KEYS = tuple("abcde")
POSITIONS = np.arange(10.0).reshape(5, 2)


def steps(often):
    """Try one moment in ``often``, or, in slow tests, all."""
    return pytest.mark.parametrize("step", [often, pytest.param(1, marks=pytest.mark.slow)])


@dataclass
class Case:
    """Work in a folder, which is killed.

    Attributes
    ----------
    before : Path or None
        Folder that is there before, of which a copy is worked in; None: there is none.
    work : function of a folder
        May be called again, and then does what is left to do.
    check : function of a folder
        Of what was there before: it is still there, after a kill.
    result : function of a folder
        What must be as undisturbed.
    more : sequence of (type, str)
        Further methods that change files.
    """

    before: Path | None
    work: Callable[[Path], object]
    check: Callable[[Path], object]
    result: Callable[[Path], Any]
    more: Sequence[tuple[type, str]] = ()

    def run(self, root: Path, step: int, least: int) -> None:
        """Kill the work at one moment after the other; there must be ``least`` moments."""
        start = self._start(root / "undisturbed")
        self.work(start)
        expected = self.result(start)
        for moment in itertools.count(step=step):
            folder = self._start(root / "killed")
            lived = not killed(lambda to=folder: self.work(to), moment, self.more)
            self.check(folder)
            if lived:
                assert self.result(folder) == expected
                break
            # Another kill, elsewhere: what the first one left must not be in the way of it.
            killed(lambda to=folder: self.work(to), moment // 2 + 1, self.more)
            self.check(folder)
            self.work(folder)
            assert self.result(folder) == expected, moment
        assert moment > least

    def _start(self, folder: Path) -> Path:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        if self.before is not None:
            shutil.copytree(self.before, folder, dirs_exist_ok=True)
        return folder


def hidden(folder):
    return [path for path in folder.rglob("*") if path.name.startswith(".")]


# --- indexes of places ----------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["HNSW8", pytest.param("Flat", marks=pytest.mark.slow)])
def model(request):
    return load_model(replace(SMALL, faiss_index=request.param), device="cpu")


@pytest.fixture(scope="module")
def described(model):
    torch.set_num_threads(1)
    return model.describe([picture(i) for i in range(5)])


def grow(model, folder, described, count=5):
    """Add those of the first images that are not there yet, in two steps."""
    if (folder / INDEX_FILE).is_file():
        index = PlaceIndex.load(folder, model)
    else:
        index = PlaceIndex(model, folder)
    for end in (count - 1, count):
        new = slice(len(index), end)
        index.add(described[new], keys=list(KEYS[new]), positions=POSITIONS[new])
    return index


def index_of(model, folder, described):
    """What an index of places holds, and what it answers; no file is there without a reason."""
    with PlaceIndex.load(folder, model) as index:
        stored = [index.description(key) for key in index.keys]
        found = [index.query(d).places for d in described]
        known = [index.query(d, rerank=False).places for d in described]
        positions = index.positions.tolist()
    with contextlib.closing(StoreIndex(folder)) as store:
        shards = {shard_name(record.shard) for record in store.records().values()}
    ours = {INDEX_FILE, GLOBAL_FILE, LIST_FILE, FAISS_FILE, LOCK_FILE}
    assert {path.name for path in folder.iterdir()} <= ours | shards
    assert verify_features(folder, progress=False).sound
    return [
        [(d.name, d.descriptor.tobytes(), [p.tobytes() for p in d.patches]) for d in stored],
        [[(p.key, p.score, p.distance) for p in places] for places in (*found, *known)],
        positions,
        [(folder / name).read_bytes() for name in (GLOBAL_FILE, LIST_FILE)],
    ]


def has(model, folder, described, *counts):
    """Check that an index has the first so many images, and finds each of them."""
    with PlaceIndex.load(folder, model) as index:
        assert len(index) in counts
        assert index.keys == KEYS[: len(index)]
        for d, key in zip(described, index.keys, strict=False):
            assert index.query(d, rerank=False).best.key == key


@steps(17)
class TestPlaceIndex:
    def test_save_to_a_new_folder(self, model, described, tmp_path, step):
        index = grow(model, tmp_path / "made", described)

        def check(folder):
            assert len(index) == 5
            with contextlib.suppress(FeatureError):
                has(model, folder / "saved", described, 5)

        Case(
            before=None,
            work=lambda folder: index.save(folder / "saved"),
            check=check,
            result=lambda folder: index_of(model, folder / "saved", described),
        ).run(tmp_path, step, 40)

    def test_save_over_another(self, model, described, tmp_path, step):
        with grow(model, tmp_path / "made" / "saved", described, 2) as before:
            before.save()
        index = grow(model, tmp_path / "more", described)
        Case(
            before=tmp_path / "made",
            work=lambda folder: index.save(folder / "saved"),
            check=lambda folder: has(model, folder / "saved", described, 2, 5),
            result=lambda folder: index_of(model, folder / "saved", described),
        ).run(tmp_path, step, 40)

    def test_save_where_it_lives(self, model, described, tmp_path, step):
        grow(model, tmp_path / "made", described).close()

        def save(folder):
            with PlaceIndex.load(folder, model) as index:
                index.save()

        Case(
            before=tmp_path / "made",
            work=save,
            check=lambda folder: has(model, folder, described, 5),
            result=lambda folder: index_of(model, folder, described),
        ).run(tmp_path, step, 10)

    def test_the_first_images(self, model, described, tmp_path, step):
        def add(folder):
            with grow(model, folder, described) as index:
                index.save()

        def check(folder):
            if (folder / INDEX_FILE).is_file():
                has(model, folder, described, *range(6))

        Case(
            before=None,
            work=add,
            check=check,
            result=lambda folder: index_of(model, folder, described),
        ).run(tmp_path, step, 40)

    def test_later_images(self, model, described, tmp_path, step):
        with grow(model, tmp_path / "made", described, 2) as before:
            before.save()

        def add(folder):
            with grow(model, folder, described) as index:
                index.save()

        Case(
            before=tmp_path / "made",
            work=add,
            check=lambda folder: has(model, folder, described, 2, 3, 4, 5),
            result=lambda folder: index_of(model, folder, described),
        ).run(tmp_path, step, 40)

    def test_save_where_adding_was_killed(self, model, described, tmp_path, step):
        index = grow(model, tmp_path / "made", described)
        for moment in itertools.count(step=step):
            folder = tmp_path / str(moment)
            lived = not killed(lambda to=folder: grow(model, to, described), moment)
            index.save(folder)
            has(model, folder, described, 5)
            if lived:
                break
        assert moment > 40


# --- merging and converting -----------------------------------------------------------------------


@steps(17)
@pytest.mark.parametrize(
    ("kind", "keep"), [("float16", False), ("float16", True), ("npy", False)], ids="mcw"
)  # moved, copied, written
def test_merging(tmp_path, monkeypatch, kind, keep, step):
    monkeypatch.setattr(writer, "SHARD_BYTES", 300)
    monkeypatch.setattr(merge, "COMMIT_BYTES", 300)
    write_shares(tmp_path / "made", kind)

    def check(folder):
        if keep:
            assert contents(folder / "shards") == contents(tmp_path / "made" / "shards")

    def result(folder):
        assert not hidden(folder)
        assert (folder / "shards").exists() == keep
        return content(folder)

    def work(folder):
        if (folder / "shards").exists() or not (folder / GLOBAL_FILE).exists():
            merge_shares(folder, keep=keep, progress=False)

    Case(tmp_path / "made", work, check, result).run(tmp_path, step, 100)


@steps(17)
@pytest.mark.parametrize(
    ("source", "to"), [("float16", "npy"), ("npy", "int8"), ("int8", "float16"), ("int8", "hdf5")]
)
def test_converting(tmp_path, monkeypatch, source, to, step):
    monkeypatch.setattr(convert, "COMMIT_BYTES", 300)
    more: list[tuple[type, str]] = []
    if to == "hdf5":
        h5py = pytest.importorskip("h5py")
        more = [(h5py.Group, "create_group"), (h5py.Group, "__setitem__"), (h5py.File, "close")]
    given = write(tmp_path / "source", source)
    before = contents(given)
    image_list = None
    if source == "npy":
        image_list = tmp_path / "list.txt"
        image_list.write_text("".join(f"{name}\n" for name in NAMES))

    def work(folder):
        if not (folder / "to").is_file():  # HDF5: it has its name, so that it is complete
            convert_features(given, folder / "to", to, image_list=image_list, progress=False)

    def check(folder):
        assert contents(given) == before

    def result(folder):
        assert not hidden(folder)
        if to != "hdf5":
            return content(folder / "to")
        with contextlib.closing(Hdf5Reader(folder / "to")) as reader:
            return [[a.tobytes() for a in reader.read(i)[1]] for i in range(len(NAMES))]

    Case(None, work, check, result, more).run(tmp_path, step, 60)
