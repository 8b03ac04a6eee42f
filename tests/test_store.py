# SPDX-License-Identifier: MIT
"""The feature store: round trips, resuming after kills and full disks, and what is refused."""

from __future__ import annotations

import contextlib
import errno
import gc
import itertools
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from feature_cases import different
from killing import fork, killed, needs_fork

from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError, OtherFeaturesError, OutputError
from patchnetvlad.features.inspect import verify_features
from patchnetvlad.features.lock import LOCK_FILE
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.npy_files import NpyReader
from patchnetvlad.features.npy_writer import NpyWriter
from patchnetvlad.features.open import open_reader, open_writer
from patchnetvlad.features.store import (
    codec,
    shard_writer,
)
from patchnetvlad.features.store import (
    index as store_index,
)
from patchnetvlad.features.store import (
    records as store_records,
)
from patchnetvlad.features.store import (
    writer as store_writer,
)
from patchnetvlad.features.store.codec import encode_map, encode_patches
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.features.store.records import RecordError
from patchnetvlad.features.store.writer import StoreWriter

CONFIG = Config(
    num_pcs=8,
    patch_sizes=(2, 5),
    strides=(1, 2),
    patch_weights=(0.5, 0.5),
    local_features="float32",
)
KINDS = ("float32", "float16", "int8")
NAMES = [f"seq 1/{i}.jpg" for i in range(7)]
RNG = np.random.default_rng(0)


def unit(count):
    values = torch.from_numpy(RNG.standard_normal((count, 8)).astype(np.float32))
    return torch.nn.functional.normalize(values, dim=1)


ROWS = unit(7).numpy()
PATCHES = [[unit(6), unit(3)] for _ in NAMES]
ENCODED = {kind: [encode_patches(p, kind) for p in PATCHES] for kind in KINDS}


def manifest(config=CONFIG, names=NAMES, checkpoint="c", **keywords):
    return Manifest.of(config, names, checkpoint, **keywords)


def opened(folder, config=CONFIG, names=NAMES, checkpoint="c", **keywords):
    return open_writer(folder, names, manifest(config, names, checkpoint), **keywords)


def write(folder, images=None, config=CONFIG, names=NAMES, commit=2, **keywords):
    """Write the features of images, of all that lack them unless said; return which had some."""
    with opened(folder, config, names, **keywords) as writer:
        before = writer.done.copy()
        todo = np.flatnonzero(~before).tolist() if images is None else images
        if todo:
            writer.start()
        for n, i in enumerate(todo, start=1):
            writer.write(i, ROWS[i], ENCODED[config.local_features][i])
            if n % commit == 0:
                writer.commit()
        writer.commit()
        if images is None:
            writer.finish()
    return before.tolist()


def check(folder, config=CONFIG, names=NAMES):
    reader = open_reader(folder, names, config)
    np.testing.assert_array_equal(reader.global_descriptors, ROWS)
    for i, expected in enumerate(PATCHES):
        assert len(reader.patches(i)) == len(expected)
        for ours, theirs in zip(reader.patches(i), expected, strict=True):
            assert torch.equal(ours, theirs)


def content(folder):
    """Everything that a store holds: index, shards and globalfeats.npy."""
    found = {f.name: f.read_bytes() for f in folder.iterdir() if f.suffix in (".bin", ".npy")}
    with contextlib.closing(sqlite3.connect(folder / "features.sqlite")) as db:
        for table in ("about", "images", "records"):
            found[table] = db.execute(f"SELECT * FROM {table}").fetchall()
        found["integrity"] = db.execute("PRAGMA integrity_check").fetchall()
    return found


def sound_records(folder):
    """Read all that the index of a store names; return how many records that is."""
    if not (folder / "features.sqlite").exists():
        return 0
    with contextlib.closing(StoreIndex(folder)) as index:
        records = index.records()
    for name, record in records.items():
        store_records.read_record(folder, record, name)
    return len(records)


def write_some(writer, images):
    for i in images:
        writer.write(i, ROWS[i], ENCODED["float32"][i])


def edit_index(folder, *statement):
    with contextlib.closing(sqlite3.connect(folder / "features.sqlite")) as db, db:
        db.execute(*statement)


def refused(folder, match, **keywords):
    with pytest.raises(FeatureError, match=match) as caught, opened(folder, **keywords):
        pass
    assert str(folder) in str(caught.value)
    assert len(str(caught.value)) < 400
    return str(caught.value)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "some" / "features"


@pytest.fixture
def shards(monkeypatch):
    """Few records a shard."""
    monkeypatch.setattr(store_writer, "SHARD_BYTES", 600)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_BYTES", 600)
        write(folder)
    found = content(folder)
    assert len([name for name in found if name.endswith(".bin")]) == 4
    return found


class TestRoundTrip:
    def test_layout(self, folder):
        write(folder)
        check(folder)
        assert {f.name for f in folder.iterdir()} == {
            "globalfeats.npy", "features.sqlite", "features-00000.bin", "features.lock"
        }  # fmt: skip
        shard = (folder / "features-00000.bin").read_bytes()
        parts = [[row, *patches] for row, patches in zip(ROWS, PATCHES, strict=True)]
        assert shard == b"".join(np.asarray(a).tobytes() for part in parts for a in part)

    @pytest.mark.parametrize("kind", KINDS)
    def test_kinds(self, folder, kind):
        config = replace(CONFIG, local_features=kind)
        write(folder, config=config)
        reader = open_reader(folder, NAMES, config)
        assert isinstance(reader, StoreReader)
        np.testing.assert_array_equal(reader.global_descriptors, ROWS)
        for i, expected in enumerate(PATCHES):
            for ours, theirs in zip(reader.patches(i), expected, strict=True):
                assert (ours.dtype, ours.shape) == (torch.float32, theirs.shape)
                largest = theirs.abs().amax(dim=1, keepdim=True)
                bound = {
                    "float32": torch.zeros_like(theirs),
                    "float16": theirs.abs() * 2**-11 + 2**-24,
                    "int8": (largest / 127).expand_as(theirs),
                }[kind]
                assert ((ours - theirs).abs() <= bound).all()
        sizes = {"float32": 4 * 9 * 8, "float16": 2 * 9 * 8, "int8": 9 * 8 + 4 * 9}
        assert (folder / "features-00000.bin").stat().st_size == 7 * (4 * 8 + sizes[kind])

    def test_int8_has_a_scale_a_patch(self):
        patches = [torch.tensor([[1.0, -0.5, 0.0], [0.001, 0.0005, -0.001], [0.0, 0.0, 0.0]])]
        scales, values = encode_patches(patches, "int8")
        assert (scales.dtype, values.dtype) == (np.float32, np.int8)
        assert values.tolist() == [[127, -64, 0], [127, 64, -127], [0, 0, 0]]
        np.testing.assert_allclose(scales[:2], [1 / 127, 0.001 / 127], rtol=1e-6)
        (decoded,) = codec.decode_patches([scales, values], "int8")
        np.testing.assert_allclose(decoded.norm(dim=1), [1, 1, 0], atol=1e-6)

    def test_maps(self, folder):
        config = replace(CONFIG, local_features="map")
        maps = [torch.from_numpy(RNG.standard_normal((4, 3, w)).astype("f4")) for w in (5, 2)]
        names = NAMES[:2]
        with opened(folder, config, names) as writer:
            for i, feature_map in enumerate(maps):
                writer.write(i, ROWS[i], encode_map(feature_map))
            writer.finish()
        other_patches = replace(config, patch_sizes=(3,), strides=(1,), patch_weights=(1.0,))
        for reading in (config, other_patches):
            reader = open_reader(folder, names, reading)
            for i, feature_map in enumerate(maps):
                assert torch.equal(reader.feature_map(i), feature_map.half().float())
        with pytest.raises(FeatureError, match=f"{folder} .*patch descriptors"):
            reader.patches(0)

    def test_native_sizes(self, folder):
        patches = [[unit(n), unit(m)] for n, m in ((1, 2), (40, 7), (3, 3))]
        names = NAMES[:3]
        with opened(folder, names=names) as writer:
            for i, arrays in enumerate(patches):
                writer.write(i, ROWS[i], encode_patches(arrays, "float32"))
            writer.finish()
        reader = open_reader(folder, names, CONFIG)
        for i, expected in enumerate(patches):
            assert all(torch.equal(a, b) for a, b in zip(reader.patches(i), expected, strict=True))

    def test_some_sizes_only(self, folder):
        write(folder)
        config = replace(CONFIG, patch_sizes=(5,), strides=(2,), patch_weights=(1.0,))
        (patches,) = open_reader(folder, NAMES, config).patches(3)
        assert torch.equal(patches, PATCHES[3][1])

    def test_one_image_twice_has_one_record(self, folder):
        names = ["a/1.jpg", "2.jpg", "./a/1.jpg", "b/../a/1.jpg"]
        write(folder, [1, 0], names=names)
        assert write(folder, names=names) == [True] * 4
        reader = open_reader(folder, names, CONFIG)
        assert sound_records(folder) == 2
        np.testing.assert_array_equal(reader.global_descriptors, ROWS[[0, 1, 0, 0]])
        for i in (0, 2, 3):
            assert torch.equal(reader.patches(i)[0], PATCHES[0][0])

    @pytest.mark.parametrize("name", ["a b", "100%", "50%3f", "what?", "#1", "?mode=memory", "道ß"])
    def test_names_of_directories(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        write(tmp_path / name)
        check(tmp_path / name)
        check(Path(name))
        assert write(Path(name)) == [True] * 7
        assert [f.name for f in tmp_path.iterdir()] == [name]

    def test_the_same_paths_under_other_names(self, tmp_path):
        folder = tmp_path / "features"
        with open_writer(folder, NAMES, manifest(root=tmp_path)) as writer:
            for i in range(7):
                writer.write(i, ROWS[i], ENCODED["float32"][i])
            writer.finish()
        check(folder, names=[str(tmp_path / name) for name in NAMES])

    def test_not_finished(self, folder):
        with opened(folder) as writer:
            writer.write(0, ROWS[0], ENCODED["float32"][0])
            with pytest.raises(FeatureError, match=rf"{folder}: 6\b"):
                writer.finish()
        with pytest.raises(FeatureError, match=f"{folder}: .*feature_extract"):
            open_reader(folder, NAMES, CONFIG)

    def test_no_folder_can_be_made(self, tmp_path):
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match=f"{tmp_path}/file "), opened(tmp_path / "file"):
            pass


class TestReading:
    def test_many_threads(self, folder, shards):
        write(folder)
        reader = open_reader(folder, NAMES, CONFIG)

        def read(i):
            return all(map(torch.equal, reader.patches(i), PATCHES[i]))

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(read, [i % 7 for i in range(400)]))

    @pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
    def test_no_descriptors_are_leaked(self, folder, shards, tmp_path):
        write(folder)
        damaged, later = tmp_path / "damaged", tmp_path / "later"
        shutil.copytree(folder, damaged)
        shutil.copytree(folder, later)
        (damaged / "features.sqlite").write_bytes(b"junk" * 1000)
        edit_index(later, "PRAGMA user_version = 2")
        gc.collect()
        before = os.listdir("/proc/self/fd")
        for _ in range(3):
            check(folder)
            write(folder)
            for broken in (damaged, later):
                refused(broken, "--no-resume")
            refused(folder, "checkpoint: c -> d", checkpoint="d")
        gc.collect()
        assert os.listdir("/proc/self/fd") == before

    @pytest.mark.parametrize(
        ("names", "settings", "words"),
        [
            (["elsewhere.png", *NAMES[1:]], {}, r"\b1\b.*\b7\b.* elsewhere\.png"),
            (NAMES, {"num_pcs": 512}, r"num_pcs = 8\b.*\b512\b"),
            (NAMES, {"match_image_size": (240, 320)}, r"\[480, 640\].* imageresizeh.*\[240, 320\]"),
            (NAMES, {"strides": (1, 1)}, r"size 5\b.*stride 1\b.*\b5 \(stride 2\)"),
        ],
    )
    def test_misfits(self, folder, names, settings, words):
        write(folder)
        with pytest.raises(FeatureError, match=words):
            open_reader(folder, names, replace(CONFIG, **settings))

    @pytest.mark.parametrize("place", [0, 31, 32, 200, -1])
    def test_damaged_records(self, folder, shards, place):
        write(folder)
        with contextlib.closing(StoreIndex(folder)) as index:
            record = index.records()[NAMES[3]]
        shard = folder / f"features-{record.shard:05d}.bin"
        with shard.open("r+b") as file:
            file.seek(record.start + place % record.bytes)
            (byte,) = file.read(1)
            file.seek(-1, os.SEEK_CUR)
            file.write(bytes([byte ^ 1]))
        reader = open_reader(folder, NAMES, CONFIG)
        with pytest.raises(RecordError, match="checksum") as caught:
            reader.patches(3)
        for word in (NAMES[3], str(shard), f"verify --drop {folder}", "feature_extract"):
            assert word in str(caught.value)
        for i in (0, 1, 2, 4, 5, 6):
            reader.patches(i)
        # globalfeats.npy is not made from a damaged descriptor.
        (folder / "globalfeats.npy").unlink()
        if place in (0, 31):
            with pytest.raises(RecordError, match=f"{NAMES[3]} in {shard} .*checksum"):
                write(folder)
        with contextlib.closing(StoreIndex(folder, writable=True)) as index:
            index.remove([NAMES[3]])
        assert write(folder) == [True] * 3 + [False] + [True] * 3
        check(folder)

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ("bytes = 1 << 60", "cut off"),
            ("start = 630", "cut off"),
            ("shard = 7", "No such file"),
            ("start = start - 4", "checksum"),
        ],
    )
    def test_damaged_rows_of_the_index(self, folder, shards, change, words):
        write(folder)
        edit_index(folder, f"UPDATE records SET {change} WHERE name = ?", [NAMES[5]])
        reader = open_reader(folder, NAMES, CONFIG)
        reader.patches(4)
        with pytest.raises(RecordError, match=words) as caught:
            reader.patches(5)
        assert NAMES[5] in str(caught.value)
        assert "feature_extract" in str(caught.value)

    def test_a_folder_that_is_gone(self, folder, shards):
        write(folder)
        with contextlib.closing(StoreIndex(folder, writable=True)) as index:
            shutil.rmtree(folder)
            with pytest.raises(FeatureError, match=f"{folder} .*gone"):
                index.failed = {NAMES[0]: "why"}

    def test_a_damaged_row_is_mended(self, folder, shards):
        write(folder)
        change = "UPDATE records SET arrays = replace(arrays, '8', '4') WHERE name = ?"
        edit_index(folder, change, [NAMES[5]])
        assert verify_features(folder, drop=True, progress=False).num_dropped == 1
        write(folder)
        check(folder)

    def test_missing_records(self, folder):
        write(folder)
        edit_index(folder, "DELETE FROM records WHERE name = ?", [NAMES[2]])
        with pytest.raises(FeatureError, match=rf"{folder} .*{NAMES[2]}; .*feature_extract"):
            open_reader(folder, NAMES, CONFIG).patches(2)
        assert write(folder) == [True, True, False, True, True, True, True]
        check(folder)

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(b"junk" * 1000),
            lambda file: file.write_bytes(file.read_bytes()[:3000]),
            lambda file: file.write_bytes(
                file.read_bytes()[:4096] + b"\xff" * (len(file.read_bytes()) - 4096)
            ),
            lambda file: edit_index(file.parent, "DELETE FROM about"),
            lambda file: edit_index(file.parent, "UPDATE about SET value = '{}'"),
            lambda file: edit_index(file.parent, "DROP TABLE records"),
        ],
        ids=["empty", "junk", "cut", "torn", "no-manifest", "bad-manifest", "no-table"],
    )
    def test_damaged_index(self, folder, damage):
        write(folder)
        damage(folder / "features.sqlite")
        with pytest.raises(FeatureError, match=rf"{folder}/features\.sqlite .*--no-resume"):
            open_reader(folder, NAMES, CONFIG)
        refused(folder, r"features\.sqlite .*--no-resume")
        write(folder, resume=False)
        check(folder)

    def test_later_version(self, folder):
        write(folder)
        edit_index(folder, "PRAGMA user_version = 2")
        for use in (lambda: open_reader(folder, NAMES, CONFIG), lambda: write(folder)):
            with pytest.raises(
                FeatureError, match=rf"{folder}/features\.sqlite .*version 2\b.*--no-resume"
            ):
                use()
        write(folder, resume=False)
        check(folder)

    def test_locked_index(self, folder, monkeypatch):
        monkeypatch.setattr(store_index, "BUSY_SECONDS", 0.05)
        write(folder)
        with contextlib.closing(sqlite3.connect(folder / "features.sqlite")) as db:
            db.execute("BEGIN EXCLUSIVE")
            with pytest.raises(FeatureError, match=rf"{folder}/features\.sqlite .*locked"):
                open_reader(folder, NAMES, CONFIG)
        check(folder)

    def test_what_reads_cannot_write(self, folder):
        write(folder)
        with (
            contextlib.closing(StoreIndex(folder)) as index,
            pytest.raises(FeatureError, match=rf"{folder}/features\.sqlite .*permissions"),
        ):
            index.remove([NAMES[0]])

    def test_read_only_directory(self, folder):
        write(folder)
        for path in (folder, *folder.iterdir()):
            path.chmod(0o555 if path.is_dir() else 0o444)
        try:
            if os.access(folder, os.W_OK):
                pytest.skip("permissions do not restrain this user")
            check(folder)
            refused(folder, "Permission denied")
        finally:
            folder.chmod(0o755)


_OF_LISTS = ("list", "order")  # which may change: test_changed_lists.py
DIFFERENT = {
    **{kind: how for kind, how in different(CONFIG, NAMES).items() if kind not in _OF_LISTS},
    "kind": (
        {"config": replace(CONFIG, local_features="int8")},
        "local_features: float32 -> int8",
    ),
    "npy": ({"config": replace(CONFIG, local_features="npy")}, "local_features: float32 -> npy"),
    "pooling": ({"config": replace(CONFIG, pooling="netvlad")}, "pooling: patchnetvlad -> netvlad"),
}


class TestOtherFeatures:
    @pytest.mark.parametrize("finished", [True, False])
    @pytest.mark.parametrize("kind", DIFFERENT)
    def test_are_refused(self, folder, kind, finished):
        write(folder, None if finished else [0, 1])
        before = content(folder)
        keywords, words = DIFFERENT[kind]
        text = refused(folder, "--no-resume", **keywords)
        assert words in text
        assert content(folder) == before

    def test_of_another_folder(self, folder):
        write(folder)
        with (
            pytest.raises(OtherFeaturesError, match=f"{folder} .*another folder"),
            open_writer(folder, NAMES, manifest(root="/elsewhere")),
        ):
            pass

    def test_unknown_ones_are_refused(self, folder):
        folder.mkdir(parents=True)
        np.save(folder / "globalfeats.npy", ROWS)
        refused(folder, "--no-resume")
        write(folder, resume=False)
        check(folder)

    def test_no_resume_replaces(self, folder, shards, undisturbed):
        write(folder, config=replace(CONFIG, local_features="float16"))
        with opened(folder, resume=False) as writer:
            assert not writer.done.any()
        open_reader(folder, NAMES, CONFIG)  # nothing is lost before there is something new
        write(folder, [0], resume=False)
        assert sound_records(folder) == 1
        with pytest.raises(FeatureError, match=rf"globalfeats\.npy in {folder}\b.*feature_extract"):
            open_reader(folder, NAMES, CONFIG)
        write(folder)
        assert content(folder) == undisturbed

    def test_from_npy_to_a_store_and_back(self, folder, undisturbed, shards):
        npy = replace(CONFIG, local_features="npy")

        def write_npy():
            with opened(folder, npy, resume=False) as writer:
                assert isinstance(writer, NpyWriter)
                for i in range(7):
                    writer.write(i, ROWS[i], encode_patches(PATCHES[i], "npy"))
                writer.finish()
            assert isinstance(open_reader(folder, NAMES, npy), NpyReader)
            check(folder, npy)
            assert not list(folder.glob("features[-.]*[bq]*"))

        write_npy()
        refused(folder, "local_features: npy -> float32")
        write(folder, resume=False)
        check(folder)
        assert not (folder / "features.json").exists()
        found = content(folder)
        assert {name: found[name] for name in undisturbed} == undisturbed
        write_npy()

    def test_two_at_once(self, folder):
        with opened(folder):
            refused(folder, "another process.*--output_features_dir")
        write(folder)

    @needs_fork
    def test_two_processes_at_once(self, folder):
        ours, theirs = os.pipe()

        def hold():
            with opened(folder) as writer:
                writer.write(0, ROWS[0], ENCODED["float32"][0])
                os.write(theirs, b"x")
                time.sleep(60)

        pid = fork(hold)
        try:
            os.read(ours, 1)
            refused(folder, "another process")
            refused(folder, "another process", resume=False)
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            os.close(ours)
            os.close(theirs)
        write(folder)  # the lock went with its process
        check(folder)


class TestResuming:
    @pytest.mark.parametrize("first", [[], [0], [0, 1, 2], [0, 1, 2, 3, 4, 5], list(range(7))])
    def test_goes_on(self, folder, shards, undisturbed, first):
        write(folder, first)
        assert write(folder) == [i in first for i in range(7)]
        assert content(folder) == undisturbed

    def test_finished_features_are_left_alone(self, folder):
        write(folder)

        def there():
            files = [f for f in folder.iterdir() if f.name != LOCK_FILE]
            return {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in files}

        before = there()
        assert write(folder) == [True] * 7
        assert there() == before

    @pytest.mark.parametrize("text", [None, b"", b"junk", "cut"])
    def test_global_descriptors_are_made_again(self, folder, shards, undisturbed, text):
        write(folder)
        file = folder / "globalfeats.npy"
        if text is None:
            file.unlink()
        else:
            file.write_bytes(file.read_bytes()[:-4] if text == "cut" else text)
        assert write(folder) == [True] * 7
        assert content(folder) == undisturbed

    def test_what_was_not_committed_is_cut_off(self, folder, shards, undisturbed):
        write(folder, [0, 1, 2])
        with opened(folder) as writer:
            writer.write(3, ROWS[3], ENCODED["float32"][3])
        (folder / "features-00001.bin").open("ab").write(b"half a record")
        (folder / "features-00002.bin").write_bytes(b"and a shard")
        (folder / "features.sqlite.part").write_bytes(b"junk")
        (folder / "features.sqlite.part-journal").write_bytes(b"junk")
        assert write(folder) == [True] * 3 + [False] * 4
        (folder / "features.sqlite.part").unlink()
        assert content(folder) == undisturbed

    @pytest.mark.parametrize("cut", [0, 1, 319, 320, 640])
    @pytest.mark.parametrize("shard", [0, 1, 3])
    def test_truncated_shards(self, folder, shards, shard, cut):
        write(folder)
        file = folder / f"features-{shard:05d}.bin"
        with contextlib.closing(StoreIndex(folder)) as index:
            ends = {
                name: r.start + r.bytes for name, r in index.records().items() if r.shard == shard
            }
        size = max(ends.values()) - cut
        if size < 0:
            file.unlink()
        else:
            os.truncate(file, size)
        lost = [NAMES.index(name) for name, end in ends.items() if end > size]
        if lost:
            with pytest.raises(
                RecordError, match=rf"{NAMES[lost[-1]]} in {file} .*feature_extract"
            ):
                open_reader(folder, NAMES, CONFIG).patches(lost[-1])
        assert write(folder) == [i not in lost for i in range(7)]
        check(folder)
        assert sound_records(folder) == 7

    def test_images_newer_than_their_features_are_done_again(self, folder, tmp_path):
        paths = [tmp_path / f"{i}.jpg" for i in range(7)]
        for path in paths:
            path.touch()
            os.utime(path, (1, 1))
        write(folder, image_paths=paths)
        assert write(folder, image_paths=paths) == [True] * 7
        os.utime(paths[2], (2, 2))
        paths[4].unlink()  # unknown is not newer
        expected = [i != 2 for i in range(7)]
        with opened(folder, image_paths=paths) as writer:
            assert writer.done.tolist() == expected
        check(folder)  # and is not touched before there is something new
        assert write(folder, image_paths=paths) == expected
        assert write(folder, image_paths=paths) == [True] * 7
        check(folder)

    def test_images_that_change_meanwhile_are_done_again(self, folder, tmp_path):
        path = tmp_path / "0.jpg"
        path.touch()
        os.utime(path, (1, 1))
        with opened(folder, names=NAMES[:1], image_paths=[path]) as writer:
            os.utime(path, (2, 2))
            writer.write(0, ROWS[0], ENCODED["float32"][0])
            writer.finish()
        with opened(folder, names=NAMES[:1], image_paths=[path]) as writer:
            assert not writer.done.any()

    def test_an_interrupt_within_a_record(self, folder, shards, undisturbed, monkeypatch):
        def interrupted(descriptor, array):
            os.write(descriptor, b"half")
            raise KeyboardInterrupt

        with opened(folder) as writer:
            for i in range(7):
                with monkeypatch.context() as patch:
                    patch.setattr(shard_writer, "write_all", interrupted)
                    with pytest.raises(KeyboardInterrupt):
                        write_some(writer, [i])
                write_some(writer, [i])
            writer.finish()
        assert content(folder) == undisturbed


@needs_fork
class TestKilled:
    def test_at_every_call(self, folder, shards, undisturbed):
        """Killed at the first call that changes files, at a later one, and so on."""
        sound = set()
        for moment in itertools.count(step=5):
            shutil.rmtree(folder, ignore_errors=True)
            for again in (0, 3):  # the second run is killed, too, at the odd moments
                lived = not killed(lambda: write(folder), moment + again)
                sound.add(sound_records(folder))
            write(folder)
            assert content(folder) == undisturbed
            if lived:
                break
        assert moment > 60
        assert {0, 7} < sound <= {0, 2, 4, 6, 7}  # whole batches

    def test_at_any_moment(self, folder, tmp_path):
        names = [f"{i}.jpg" for i in range(150)]
        arrays = [RNG.standard_normal((50, 64)).astype(np.float32) for _ in names]

        def write_slowly(folder):
            with open_writer(folder, names, manifest(names=names)) as writer:
                for n, i in enumerate(np.flatnonzero(~writer.done)):
                    writer.write(i, arrays[i][0], [arrays[i], arrays[-i]])
                    if n % 3 == 0:
                        writer.commit()
                        time.sleep(0.001)
                writer.finish()

        write_slowly(tmp_path / "whole")
        done = [0]
        for _ in range(5):
            pid = fork(lambda: write_slowly(folder))
            time.sleep(random.uniform(0.02, 0.1))
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            done.append(sound_records(folder))
            if folder.exists():
                with open_writer(folder, names, manifest(names=names)) as writer:
                    assert writer.done.sum() == done[-1]
        assert done == sorted(done)
        write_slowly(folder)
        assert content(folder) == content(tmp_path / "whole")

    @pytest.mark.parametrize("finished", [True, False])
    def test_while_the_index_was_written(self, folder, shards, undisturbed, finished):
        write(folder, None if finished else [0, 1, 2])

        def die():
            db = sqlite3.connect(folder / "features.sqlite")
            db.execute("PRAGMA cache_size = 1")
            db.execute("DELETE FROM records")
            db.executemany(
                "INSERT INTO images VALUES (?, ?)", ((i, "x" * 3000) for i in range(99, 199))
            )
            os.kill(os.getpid(), signal.SIGKILL)

        os.waitpid(fork(die), 0)
        assert (folder / "features.sqlite-journal").stat().st_size > 0
        if finished:
            check(folder)
        assert write(folder) == [finished or i < 3 for i in range(7)]
        assert content(folder) == undisturbed


def disk_full(*arguments, **keywords):
    raise OSError(errno.ENOSPC, "No space left on device")


class TestFullDisk:
    def goes_on(self, folder, undisturbed, at_least=0):
        assert sound_records(folder) >= at_least
        write(folder)
        assert content(folder) == undisturbed

    @pytest.mark.parametrize("after", range(0, 22, 2))
    def test_within_a_record(self, folder, shards, undisturbed, monkeypatch, after):
        calls = itertools.count()
        real = os.write

        def short(descriptor, view):
            if next(calls) >= after:
                disk_full()
            return real(descriptor, view[: (len(view) + 1) // 2])

        with monkeypatch.context() as patch:
            patch.setattr(os, "write", short)
            with pytest.raises(FeatureError, match=f"{folder}: ") as caught:
                write(folder)
        assert "No space left on device" in str(caught.value)
        self.goes_on(folder, undisturbed, at_least=after // 30)

    def test_whole_records_are_committed(self, folder, monkeypatch):
        with opened(folder) as writer:
            write_some(writer, [0, 1, 2])
            with monkeypatch.context() as patch:
                patch.setattr(os, "write", disk_full)
                with pytest.raises(FeatureError, match=f"{folder}: No space left"):
                    write_some(writer, [3])
            assert writer.done.sum() == 3
            write_some(writer, range(3, 7))  # there is space again
            writer.finish()
        check(folder)

    @pytest.mark.parametrize("call", ["fsync", "ftruncate", "open", "lseek"])
    @pytest.mark.parametrize("started", [True, False])
    def test_other_calls(self, folder, shards, undisturbed, monkeypatch, call, started):
        if started:
            write(folder, [0, 1, 2])
        with opened(folder) as writer, monkeypatch.context() as patch:
            patch.setattr(os, call, disk_full)
            with pytest.raises(FeatureError, match=f"{folder}: ") as caught:
                write_some(writer, range(3 * started, 7))
            assert "No space left on device" in str(caught.value)
        self.goes_on(folder, undisturbed, 3 * started)

    def test_what_was_not_synced_is_never_entered(self, folder, monkeypatch):
        with opened(folder) as writer:
            writer.write(0, ROWS[0], ENCODED["float32"][0])
            with monkeypatch.context() as patch:
                patch.setattr(os, "fsync", disk_full)
                with pytest.raises(FeatureError, match=f"{folder}: No space left"):
                    writer.commit()
            writer.commit()
            assert not writer.done.any()
        assert sound_records(folder) == 0

    def test_index(self, folder, undisturbed, shards):
        write(folder, [0, 1])
        with opened(folder) as writer:
            writer.start()
            (pages,) = writer._index.db.execute("PRAGMA page_count").fetchone()
            writer._index.db.execute(f"PRAGMA max_page_count = {pages}")
            for i in range(2, 4):
                writer.write(i, ROWS[i], ENCODED["float32"][i])
            writer._pending = [(name * 50, record) for name, record in writer._pending * 9]
            writer._pending = [(f"{n}{name}", r) for n, (name, r) in enumerate(writer._pending)]
            with pytest.raises(FeatureError, match=f"{folder}: ") as caught:
                writer.commit()
            assert "disk is full" in str(caught.value)
        self.goes_on(folder, undisturbed, 2)

    @pytest.mark.parametrize(
        "error", [OSError(errno.ENOSPC, "No space left"), OSError("192 requested and 92 written")]
    )
    def test_global_descriptors(self, folder, undisturbed, shards, monkeypatch, error):
        def full(stream, *arguments, **keywords):
            stream.write(b"half of it")
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(np.lib.format, "write_array_header_1_0", full)
            with pytest.raises(FeatureError, match=f"{folder}: "):
                write(folder)
        assert not list(folder.glob(".*"))
        self.goes_on(folder, undisturbed, 7)


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A file system of 1 MB."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no file system can be mounted here: {getattr(error, 'stderr', error)}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


class TestRealDisk:
    NAMES = tuple(f"{'long/' * 40}{i}.jpg" for i in range(120))

    def write(self, folder):
        with opened(folder, names=self.NAMES) as writer:
            for n, i in enumerate(np.flatnonzero(~writer.done)):
                rows = np.full((7, 50), i, dtype=np.float32)
                writer.write(i, rows[0], [rows, rows])
                if n % 5 == 4:
                    writer.commit()
            writer.finish()

    @pytest.mark.parametrize("pages", [0, 1, 2, 5, 9, 14, 20, 21, 22, 23, 24, 40, 60, 90, 110])
    def test_full(self, disk, tmp_path, pages):
        """However much space is left, in pages of 4 kB: 0 do not do for an empty index."""
        folder, filler = disk / "features", disk / "filler"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "features.lock").touch()
        free = shutil.disk_usage(disk).free
        filler.write_bytes(bytes(free - 4096 * pages))
        try:
            with pytest.raises(FeatureError, match=f"{folder}: ") as caught:
                self.write(folder)
            assert "full" in str(caught.value) or "No space left" in str(caught.value)
            done = sound_records(folder)
            assert done >= 4 * (pages - 40) // 3
            with pytest.raises(FeatureError, match=f"{folder}: "):  # still full
                self.write(folder)
            assert sound_records(folder) >= done
        finally:
            filler.unlink()
        self.write(folder)
        self.write(tmp_path)
        assert content(folder) == content(tmp_path)

    def test_read_only(self, disk):
        folder = disk / "read only"
        write(folder)
        subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
        try:
            check(folder)
            with contextlib.closing(StoreIndex(folder)) as index:
                assert len(index.records()) == 7
            refused(folder, "Read-only")
            with pytest.raises(FeatureError, match=f"{folder}: Read-only"):
                StoreWriter(folder, NAMES, manifest()).start()
        finally:
            subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
