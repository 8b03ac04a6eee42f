# SPDX-License-Identifier: MIT
"""``patchnetvlad-store``: information about feature directories, verification, conversion."""

from __future__ import annotations

import contextlib
import json
import os
import re
import sqlite3
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchnetvlad.cli import store as cli
from patchnetvlad.config import Config
from patchnetvlad.errors import FeatureError, PatchNetVLADError
from patchnetvlad.features import manifest, open
from patchnetvlad.features.convert import convert_features
from patchnetvlad.features.inspect import store_info, verify_features
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.npy_files import NpyReader
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.store import writer as store_writer
from patchnetvlad.features.store.codec import encode_patches
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.features.store.records import opened_index
from patchnetvlad.models.grid import PatchGrid
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.inputs import check_same_model

CONFIG = Config(
    num_pcs=4, patch_sizes=(2, 5), strides=(1, 2), patch_weights=(0.5, 0.5),
    image_size=(96, 128), match_image_size=(96, 128),
)  # fmt: skip
NAMES = ["seq/0.jpg", "seq/1.jpg", "other/2.jpg", "seq/3.jpg"]
COUNTS = {2: 5 * 7, 5: 1 * 2}  # patches on a map of 6 x 8 cells
CHECKPOINT = "c" * 64
STAMP = 1_600_000_000_123_456_789


def unit(rng, count):
    rows = rng.standard_normal((count, 4)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


pytestmark = pytest.mark.usefixtures("thin_network")

RNG = np.random.default_rng(0)
ROWS = unit(RNG, 4)
PATCHES = [[unit(RNG, n) for n in COUNTS.values()] for _ in NAMES]
TOLERANCE = {"float32": 0, "npy": 0, "float16": 5e-4, "hdf5": 5e-4, "int8": 8e-3}


def tensors(i):
    import torch

    return [torch.from_numpy(patches) for patches in PATCHES[i]]


def write(folder, kind="float16", images=range(4), paths=None, checkpoint=CHECKPOINT, **keywords):
    """Write some images' features, and finish if they are all."""
    config = replace(CONFIG, local_features=kind)
    manifest = Manifest.of(config, NAMES, checkpoint, **keywords)
    with open_writer(folder, NAMES, manifest, paths) as writer:
        for i in images:
            if not writer.done[i]:
                writer.write(i, ROWS[i], encode_patches(tensors(i), kind))
        writer.commit()
        if writer.done.all():
            writer.finish()
    return folder


def write_research(folder):
    """Write what the research code writes: no manifest."""
    write(folder, "npy")
    (folder / "features.json").unlink()
    return folder


def check(folder, tolerance, names=NAMES):
    reads = open.open_reader(folder, names, CONFIG)
    np.testing.assert_array_equal(reads.global_descriptors, ROWS)
    for i in range(len(NAMES)):
        for ours, theirs in zip(reads.patches(i), PATCHES[i], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=tolerance)
    return reads


def contents(folder):
    return {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "features.lock"
    }


def records(folder):
    with opened_index(folder) as index:
        return index.records()


def flip(folder, name, byte=20):
    """Change one bit of a record."""
    record = records(folder)[name]
    with (folder / f"features-{record.shard:05d}.bin").open("r+b") as file:
        file.seek(record.start + byte)
        value = file.read(1)[0]
        file.seek(record.start + byte)
        file.write(bytes([value ^ 4]))
    return record


@pytest.fixture
def image_list(tmp_path):
    file = tmp_path / "list.txt"
    file.write_text("".join(f"{name}\n" for name in NAMES))
    return file


def run(*words):
    return cli.main([str(word) for word in words])


class TestInfo:
    @pytest.mark.parametrize("kind", ["float16", "float32", "int8"])
    def test_finished(self, tmp_path, capsys, kind):
        folder = write(tmp_path / "f", kind)
        assert run("info", folder, "--json") == 0
        info = json.loads(capsys.readouterr().out)
        assert info == json.loads(json.dumps(asdict(store_info(folder))))
        patches = sum(COUNTS.values())
        each = {"float16": 8 * patches, "float32": 16 * patches, "int8": 8 * patches}[kind] + 16
        shard = (folder / "features-00000.bin").stat().st_size
        assert shard == 4 * each
        index, rows = (folder / n for n in ("features.sqlite", "globalfeats.npy"))
        total = shard + index.stat().st_size + rows.stat().st_size
        expected = {
            "layout": "store", "kind": kind, "finished": True, "num_images": 4, "num_done": 4,
            "missing": [], "num_bytes": total, "bytes_per_image": total / 4, "dead_bytes": 0,
            "num_shards": 1, "dimension": 4, "patch_sizes": [2, 5], "strides": [1, 2],
            "image_size": [96, 128], "pooling": "patchnetvlad", "patch_vlad": "integral",
            "precision": "exact", "checkpoint": CHECKPOINT,
        }  # fmt: skip
        assert {key: info[key] for key in expected} == expected

        assert run("info", folder) == 0
        out = capsys.readouterr().out
        for words in (
            f"{folder}: feature store, {kind}, finished", "4 of 4", "1 shard", "P = 4",
            "2 (stride 1), 5 (stride 2)", "128 x 96 px", "cccccccccccc\n",
        ):  # fmt: skip
            assert words in out
        assert "no longer" not in out

    def test_unfinished(self, tmp_path, capsys):
        folder = write(tmp_path / "f", images=[1])
        info = store_info(folder)
        assert (info.finished, info.num_done, info.num_images) == (False, 1, 4)
        assert info.missing == ("seq/0.jpg", "other/2.jpg", "seq/3.jpg")
        assert run("info", folder) == 0
        out = capsys.readouterr().out
        assert "not finished" in out
        assert "seq/0.jpg, other/2.jpg, seq/3.jpg\n" in out

    def test_replaced_records_are_dead(self, tmp_path, capsys):
        paths = [tmp_path / f"{i}.jpg" for i in range(4)]
        for path in paths:
            path.touch()
        folder = write(tmp_path / "f", paths=paths)
        os.utime(paths[0], ns=(STAMP, STAMP))
        write(folder, paths=paths)
        info = store_info(folder)
        assert info.finished
        assert info.dead_bytes == records(folder)["seq/0.jpg"].bytes
        assert run("info", folder) == 0
        assert "no longer in use" in capsys.readouterr().out
        # A conversion to the same kind leaves them behind.
        assert convert_features(folder, tmp_path / "g", "float16", progress=False).dead_bytes == 0
        assert check(tmp_path / "g", 5e-4)

    def test_npy(self, tmp_path):
        folder = write(tmp_path / "f", "npy", images=[0, 3])
        info = store_info(folder)
        assert (info.layout, info.kind, info.finished) == ("npy", "npy", False)
        assert (info.num_done, info.num_images, info.dimension) == (2, 4, 4)
        assert info.missing == ("row 1", "row 2")
        info = store_info(write(folder, "npy"))
        assert (info.finished, info.missing, info.strides) == (True, (), (1, 2))
        assert info.num_bytes > 4 * 4 * (4 + 4 * sum(COUNTS.values()))

    def test_of_the_research_code(self, tmp_path, capsys):
        folder = write_research(tmp_path / "f")
        info = store_info(folder)
        assert (info.finished, info.num_images, info.dimension) == (True, 4, 4)
        assert (info.patch_sizes, info.strides, info.image_size) == ((2, 5), (), None)
        assert run("info", folder) == 0
        assert "research code" in capsys.readouterr().out

    @pytest.mark.parametrize("job", ["info", "verify", "convert"])
    def test_nothing_there(self, tmp_path, capsys, job):
        more = [tmp_path / "g", "--to", "npy"] if job == "convert" else []
        assert run(job, tmp_path / "nowhere", *more) == 2
        assert f"{tmp_path / 'nowhere'}\n" in capsys.readouterr().err
        assert run(job, tmp_path, *more) == 2
        error = capsys.readouterr().err
        assert f"{tmp_path}: " in error
        assert not (tmp_path / "g").exists()


class TestVerify:
    @pytest.mark.parametrize("kind", ["float16", "int8", "npy"])
    def test_sound(self, tmp_path, capsys, kind):
        folder = write(tmp_path / "f", kind)
        before = contents(folder)
        assert run("verify", folder) == 0
        out = capsys.readouterr().out
        assert (
            "sound; files of patches read: 8" if kind == "npy" else "sound; records read: 4"
        ) in out
        assert run("verify", "--drop", folder) == 0
        assert contents(folder) == before

    @pytest.mark.parametrize("byte", [0, 20, -1])
    def test_a_flipped_bit_is_found_and_dropped(self, tmp_path, capsys, byte):
        folder = write(tmp_path / "f")
        length = records(folder)["other/2.jpg"].bytes
        record = flip(folder, "other/2.jpg", byte % length)
        before = contents(folder)
        assert run("verify", folder) == 1
        out = capsys.readouterr().out
        line = f"other/2.jpg: features-00000.bin at byte {record.start} does not agree with its"
        assert line in out
        assert f"{folder}: damaged: 1; records read: 4\n" in out
        assert f"patchnetvlad store verify --drop {folder}" in out
        assert contents(folder) == before  # looking changes nothing

        found = verify_features(folder, progress=False)
        (damage,) = found.damages
        assert (damage.image, damage.start) == ("other/2.jpg", record.start)
        with pytest.raises(
            FeatureError, match=rf"other/2\.jpg .*patchnetvlad-store verify --drop {folder} "
        ):
            check(folder, 1)

        assert run("verify", "--drop", folder) == 1
        assert "taken out: 1;" in capsys.readouterr().out
        assert sorted(records(folder)) == sorted(set(NAMES) - {"other/2.jpg"})
        assert not (folder / "globalfeats.npy").exists()
        config = replace(CONFIG, local_features="float16")
        with open_writer(folder, NAMES, Manifest.of(config, NAMES, CHECKPOINT)) as writer:
            assert writer.done.tolist() == [True, True, False, True]
        assert run("verify", folder) == 0  # unfinished, but sound
        assert "sound; records read: 3; images without features yet: 1\n" in capsys.readouterr().out
        write(folder)
        check(folder, 5e-4)
        assert run("verify", folder) == 0

    def test_cut_off_and_missing_shards(self, tmp_path, monkeypatch):
        monkeypatch.setattr(store_writer, "SHARD_BYTES", 1)  # a shard an image
        folder = write(tmp_path / "f")
        assert store_info(folder).num_shards == 4
        shard = folder / "features-00001.bin"
        shard.write_bytes(shard.read_bytes()[:-1])
        (folder / "features-00003.bin").unlink()
        found = verify_features(folder, progress=False)
        assert [(d.image, d.file.name, d.problem) for d in found.damages] == [
            ("seq/1.jpg", "features-00001.bin", "is cut off"),
            ("seq/3.jpg", "features-00003.bin", "cannot be read (No such file or directory)"),
        ]
        assert verify_features(folder, drop=True, progress=False).num_dropped == 2
        assert sorted(records(folder)) == ["other/2.jpg", "seq/0.jpg"]

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            (lambda rows: rows[[1, 0, 2, 3]], r"\b2 images.*seq/0\.jpg"),
            (lambda rows: rows[:3], r"\b3 rows.*\b4 images"),
            (lambda rows: rows[0], "matrix"),
        ],
    )
    def test_global_descriptors(self, tmp_path, capsys, change, words):
        folder = write(tmp_path / "f")
        np.save(folder / "globalfeats.npy", change(ROWS))
        assert run("verify", folder) == 1
        assert re.search(rf"globalfeats\.npy .*{words}", capsys.readouterr().out)
        assert run("verify", "--drop", folder) == 1
        assert len(records(folder)) == 4
        write(folder, images=[])  # computes nothing, but writes them again
        check(folder, 5e-4)

    def test_drop_waits_for_no_one(self, tmp_path):
        folder = write(tmp_path / "f")
        flip(folder, "seq/0.jpg")
        manifest = Manifest.of(CONFIG, NAMES, CHECKPOINT)
        with (
            open_writer(folder, NAMES, manifest),
            pytest.raises(FeatureError, match=f"another process.*{folder}; "),
        ):
            verify_features(folder, drop=True, progress=False)
        assert len(records(folder)) == 4

    @pytest.mark.parametrize(
        ("damage", "words"),
        [
            (lambda file: file.write_bytes(file.read_bytes()[:-4]), "damaged"),
            (lambda file: file.write_bytes(b"junk"), "damaged"),
            (lambda file: np.save(file, np.full((4, 2), np.nan, np.float32)), "finite"),
            (
                lambda file: np.save(file, np.ones((3, 2), np.float32)),
                r"\[3, 2\].*\[4, 2\]",
            ),
            (
                lambda file: np.save(file, np.ones((4, 3), np.float32)),
                r"\[4, 3\].*\[4, 2\]",
            ),
            (lambda file: np.save(file, np.ones((4, 2), int)), "matrix"),
            (lambda file: np.savez(file.open("wb"), a=np.ones((4, 2))), "matrix"),
        ],
    )
    @pytest.mark.parametrize("ours", [True, False])
    def test_npy(self, tmp_path, capsys, damage, words, ours):
        folder = write(tmp_path / "f", "npy") if ours else write_research(tmp_path / "f")
        file = folder / "patchfeats_psize5_1.npy"
        damage(file)
        assert run("verify", folder) == 1
        out = capsys.readouterr().out
        assert re.search(rf"1: {file.name} .*{words}", out)
        assert len(verify_features(folder, progress=False).damages) == 1
        if not ours:
            assert run("verify", "--drop", folder) == 2
            assert f"{folder} " in capsys.readouterr().err
            assert file.exists()
            return
        before = contents(folder)
        assert run("verify", "--drop", folder) == 1
        assert set(before) - set(contents(folder)) == {file.name}
        manifest = Manifest.of(replace(CONFIG, local_features="npy"), NAMES, CHECKPOINT)
        with open_writer(folder, NAMES, manifest) as writer:
            assert writer.done.tolist() == [True, False, True, True]
        write(folder, "npy")
        check(folder, 0)
        assert run("verify", folder) == 0

    def test_npy_files_that_are_missing(self, tmp_path, capsys):
        folder = write(tmp_path / "f", "npy", naming="path")
        (folder / "patchfeats_psize2_seq" / "3.jpg.npy").unlink()
        assert run("verify", folder) == 1
        assert "seq/3.jpg: 3.jpg.npy " in capsys.readouterr().out

    def test_npy_rows(self, tmp_path, capsys):
        folder = write_research(tmp_path / "f")
        rows = ROWS.copy()
        rows[2, 0] = np.inf
        np.save(folder / "globalfeats.npy", rows)
        assert run("verify", folder) == 1
        assert re.search(r"globalfeats\.npy .*row 2\b", capsys.readouterr().out)


class TestConvert:
    @pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
    @pytest.mark.parametrize("names", ["stem", "path"])
    def test_to_npy_and_back(self, tmp_path, image_list, kind, names):
        first = write(tmp_path / "first", kind)
        words = ["--to", "npy", "--feature_names", names]
        assert run("convert", first, tmp_path / "npy", *words) == 0
        check(tmp_path / "npy", TOLERANCE[kind])
        direct = write(tmp_path / "direct", "npy", naming=names)
        assert contents(tmp_path / "npy").keys() == contents(direct).keys()
        if kind == "float32":
            assert contents(tmp_path / "npy") == contents(direct)
        assert run("convert", tmp_path / "npy", tmp_path / "second", "--to", kind,
                   "--dataset_file_path", image_list) == 0  # fmt: skip
        check(tmp_path / "second", TOLERANCE[kind])
        info = [replace(store_info(tmp_path / f), path="") for f in ("first", "second")]
        assert info[0] == info[1]

    @pytest.mark.parametrize("kind", ["float32", "float16", "int8"])
    @pytest.mark.parametrize("to", ["float32", "float16", "int8"])
    def test_between_stores(self, tmp_path, capsys, kind, to):
        source = write(tmp_path / "f", kind)
        assert run("convert", source, tmp_path / "g", "--to", to) == 0
        check(tmp_path / "g", max(TOLERANCE[kind], TOLERANCE[to]))
        more = ["int8", "float16", "float32"]
        out = capsys.readouterr().out
        assert ("no more precise" in out) == (more.index(to) > more.index(kind))
        assert f"Done. The features of 4 images are in {tmp_path / 'g'} ({to}, " in out
        shards = [(f / "features-00000.bin").read_bytes() for f in (source, tmp_path / "g")]
        assert (shards[0] == shards[1]) == (kind == to)
        with StoreReaderOf(tmp_path / "g") as manifest:
            expected = Manifest.of(replace(CONFIG, local_features=to), NAMES, CHECKPOINT)
            assert manifest == expected

    def test_one_image_twice(self, tmp_path):
        names = ["a.jpg", "b.jpg", "./a.jpg"]
        manifest = Manifest.of(replace(CONFIG, local_features="float32"), names, CHECKPOINT)
        with open_writer(tmp_path / "f", names, manifest) as writer:
            for i in (0, 1):
                writer.write(i, ROWS[i], PATCHES[i])
            writer.finish()
        (tmp_path / "l.txt").write_text("\n".join(names))
        convert_features(tmp_path / "f", tmp_path / "a.h5", "hdf5", progress=False)
        convert_features(tmp_path / "a.h5", tmp_path / "n", "npy", progress=False)
        convert_features(
            tmp_path / "n", tmp_path / "g", "float16", image_list=tmp_path / "l.txt", progress=False
        )
        reads = StoreReader(tmp_path / "g", names, CONFIG)
        np.testing.assert_array_equal(reads.global_descriptors, ROWS[[0, 1, 0]])
        np.testing.assert_allclose(reads.patches(2)[0], PATCHES[0][0], atol=5e-4)
        assert len(records(tmp_path / "g")) == 2

    @pytest.mark.parametrize(
        "change",
        [
            "DELETE FROM images WHERE place = 3",
            "UPDATE images SET place = place + 9",
            "UPDATE images SET place = 9 WHERE place = 1",
            "UPDATE images SET name = 'seq/0.jpg' WHERE place = 2",
        ],
    )
    def test_a_list_that_was_changed(self, tmp_path, image_list, change):
        source = write(tmp_path / "f")
        with contextlib.closing(sqlite3.connect(source / "features.sqlite")) as db, db:
            db.execute(change)
        same = change.startswith("UPDATE images SET place = place")  # in the same order
        for listed in (None, image_list):
            target = tmp_path / f"to-{listed is None}"
            with contextlib.nullcontext() if same else pytest.raises(FeatureError, match="f "):
                convert_features(source, target, "npy", image_list=listed, progress=False)
            assert target.exists() == same

    @pytest.mark.parametrize("to", ["int8", "npy"])
    def test_goes_on_where_it_was_interrupted(self, tmp_path, monkeypatch, to):
        source, target = write(tmp_path / "f"), tmp_path / "g"
        read, asked = StoreReader.read, []

        def reads(self, i):
            asked.append(i)
            if len(asked) == 3:
                raise KeyboardInterrupt
            return read(self, i)

        monkeypatch.setattr(StoreReader, "read", reads)
        with pytest.raises(KeyboardInterrupt):
            convert_features(source, target, to, progress=False)
        assert store_info(target).num_done == 2
        convert_features(source, target, to, progress=False)
        assert asked == [0, 1, 2, 2, 3]
        check(target, 8e-3)
        before = contents(target)
        asked.clear()
        convert_features(source, target, to, progress=False)  # nothing is left to do
        assert not asked
        assert contents(target) == before

    @pytest.mark.parametrize("to", ["float32", "npy"])
    def test_what_was_rounded_otherwise_is_not_mixed(self, tmp_path, monkeypatch, capsys, to):
        """Whatever is written and resumed: the source, or one that was converted from it."""
        coarse, exact = write(tmp_path / "int8", "int8"), write(tmp_path / "float32", "float32")
        convert_features(coarse, tmp_path / "later", "float16", progress=False)
        target = tmp_path / "g"
        with monkeypatch.context() as patch:
            patch.setattr(StoreReader, "modified", lambda self, i: 1 // (2 - i))
            with pytest.raises(ZeroDivisionError):
                convert_features(coarse, target, to, progress=False)
        assert (store_info(target).num_done, store_info(target).rounded) == (2, "int8")
        before = contents(target)
        for source in (exact, write(tmp_path / "float16", "float16")):
            assert run("convert", source, target, "--to", to) == 2
            error = capsys.readouterr().err
            assert re.search(rf"{target} .*\(rounded: int8 -> .*target", error)
            assert contents(target) == before
        assert run("convert", tmp_path / "later", target, "--to", to) == 0
        check(target, 8e-3)
        assert run("info", target) == 0
        assert "rounded to int8" in capsys.readouterr().out
        # Extraction goes on, too, and leaves the note.
        if to == "npy":
            (target / "patchfeats_psize2_1.npy").unlink()
        else:
            flip(target, "seq/1.jpg")
            verify_features(target, drop=True, progress=False)
        write(target, to)
        check(target, 8e-3)
        assert store_info(target).rounded == "int8"

    def test_a_naming_that_is_unknown(self, tmp_path):
        source = write(tmp_path / "f")
        with pytest.raises(FeatureError, match="feature_names = 'stme'"):
            convert_features(source, tmp_path / "g", "npy", feature_names="stme")
        assert not (tmp_path / "g").exists()

    def test_images_that_have_not_changed_are_not_computed_again(self, tmp_path, image_list):
        """Whichever way features went, feature_extract knows their images' time stamps."""
        paths = [tmp_path / name for name in NAMES]
        for path in paths:
            path.parent.mkdir(exist_ok=True)
            Image.new("RGB", (128, 96)).save(path)
            os.utime(path, ns=(STAMP, STAMP))
        write(tmp_path / "f", paths=paths, root=tmp_path)

        def convert_to(source, target, to, **keywords):
            convert_features(tmp_path / source, tmp_path / target, to, progress=False, **keywords)

        convert_to("f", "a.h5", "hdf5")
        convert_to("a.h5", "int8", "int8")
        convert_to("f", "npy", "npy")
        convert_to("npy", "float32", "float32", image_list=image_list, dataset_root=tmp_path)
        for kind in ("int8", "float32"):
            manifest = Manifest.of(
                replace(CONFIG, local_features=kind), NAMES, CHECKPOINT, root=tmp_path
            )
            with open_writer(tmp_path / kind, NAMES, manifest, paths) as writer:
                assert writer.done.all()
        os.utime(paths[1], ns=(STAMP + 1, STAMP + 1))
        with open_writer(tmp_path / kind, NAMES, manifest, paths) as writer:
            assert writer.done.tolist() == [True, False, True, True]

    def test_of_the_research_code(self, tmp_path, image_list, capsys, ini):
        source = write_research(tmp_path / "f")
        words = ["convert", source, tmp_path / "g", "--to", "float16"]
        assert run(*words) == 2
        assert "--dataset_file_path" in capsys.readouterr().err
        words += ["--dataset_file_path", image_list]
        assert run(*words) == 2
        assert "--config_path" in capsys.readouterr().err
        assert not (tmp_path / "g").exists()
        assert run(*words, "--config_path", ini) == 0
        reads = check(tmp_path / "g", 5e-4)
        assert reads.manifest.checkpoint == ""
        ours = StoreReader(write(tmp_path / "ours"), NAMES, CONFIG)
        check_same_model(reads, ours, CONFIG)  # may be matched with any checkpoint's
        info = store_info(tmp_path / "g")
        assert (info.checkpoint, info.patch_vlad) == ("", "integral")
        assert run("info", tmp_path / "g") == 0
        assert "unknown" in capsys.readouterr().out

    @pytest.mark.parametrize(
        ("change", "words"),
        [
            ({"strides": (1, 1)}, r"seq/0\.jpg .*\b2 patches.*size 5\b.*96 x 128"),
            (
                {"image_size": (96, 96), "match_image_size": (96, 96)},
                r"seq/0\.jpg .*\b35 patches.*size 2\b.*96 x 96",
            ),
            ({"num_pcs": 512}, r"globalfeats\.npy .*\b4\b.*num_pcs.*\b512"),
            ({"patch_sizes": (2, 4)}, r"patchfeats_psize4_0\.npy .*feature_extract"),
        ],
    )
    def test_of_the_research_code_with_a_wrong_configuration(
        self, tmp_path, image_list, change, words
    ):
        source = write_research(tmp_path / "f")
        with pytest.raises(FeatureError, match=words):
            convert_features(
                source, tmp_path / "g", "float16", image_list=image_list,
                config=replace(CONFIG, **change), progress=False,
            )  # fmt: skip

    def test_a_list_that_does_not_fit(self, tmp_path):
        (tmp_path / "l.txt").write_text("\n".join(NAMES[::-1]))
        for kind in ("npy", "float16"):
            write(tmp_path / kind, kind)
            with pytest.raises(FeatureError, match=f"{tmp_path / kind} .*image list"):
                convert_features(
                    tmp_path / kind, tmp_path / "g", "int8", image_list=tmp_path / "l.txt"
                )

    def test_a_target_with_other_features(self, tmp_path, capsys):
        source = write(tmp_path / "f")
        other = write(tmp_path / "g", "int8", checkpoint="d" * 64)
        before = contents(other)
        assert run("convert", source, other, "--to", "int8") == 2
        error = capsys.readouterr().err
        assert re.search(rf"{other} .*checkpoint: dddddddddddd -> cccccccccccc.*target", error)
        assert run("convert", source, source, "--to", "npy") == 2
        assert contents(other) == before
        (tmp_path / "file").touch()
        assert run("convert", source, tmp_path / "file", "--to", "npy") == 2
        assert f"{tmp_path / 'file'} " in capsys.readouterr().err

    def test_sources_that_are_not_whole(self, tmp_path, capsys):
        unfinished = write(tmp_path / "f", images=[0, 1, 3])
        assert run("convert", unfinished, tmp_path / "g", "--to", "npy") == 2
        assert re.search(rf"{unfinished} .*\b1 of 4\b.*other/2\.jpg", capsys.readouterr().err)
        damaged = write(tmp_path / "d")
        flip(damaged, "seq/1.jpg")
        assert run("convert", damaged, tmp_path / "g", "--to", "int8") == 2
        assert f"verify --drop {damaged} " in capsys.readouterr().err
        assert store_info(tmp_path / "g").num_done == 1

    def test_stems_that_repeat(self, tmp_path, capsys):
        names = ["a/1.jpg", "b/1.jpg"]
        manifest = Manifest.of(replace(CONFIG, local_features="float32"), names, CHECKPOINT)
        with open_writer(tmp_path / "f", names, manifest) as writer:
            for i in (0, 1):
                writer.write(i, ROWS[i], PATCHES[i])
            writer.finish()
        assert run("convert", tmp_path / "f", tmp_path / "g", "--to", "npy") == 2
        assert "--feature_names path" in capsys.readouterr().err
        assert not (tmp_path / "g").exists()

    def test_too_little_space(self, tmp_path, monkeypatch):
        source = write(tmp_path / "f")
        disk = type("Usage", (), {"free": 500})
        monkeypatch.setattr("shutil.disk_usage", lambda folder: disk)
        for to, target in (("npy", "g"), ("hdf5", "g.h5")):
            with pytest.raises(FeatureError, match=rf"{tmp_path / target} .* kB\b.*\b500 bytes"):
                convert_features(source, tmp_path / target, to, progress=False)
        assert not (tmp_path / "g.h5").exists()
        monkeypatch.undo()
        convert_features(source, tmp_path / "g", "npy", progress=False)
        check(tmp_path / "g", 5e-4)

    def test_global_descriptors_alone(self, tmp_path, image_list):
        config = replace(CONFIG, pooling="netvlad")
        manifest = Manifest.of(config, NAMES, CHECKPOINT)
        with open_writer(tmp_path / "f", NAMES, manifest) as writer:
            for i in range(4):
                writer.write(i, ROWS[i], [])
            writer.finish()
        with pytest.raises(FeatureError, match=f"{tmp_path}/f .*global descriptors.*npy.*hdf5"):
            convert_features(tmp_path / "f", tmp_path / "g", "int8", image_list=image_list)
        convert_features(tmp_path / "f", tmp_path / "a.h5", "hdf5", image_list=image_list)
        convert_features(tmp_path / "a.h5", tmp_path / "g", "npy", progress=False)
        assert contents(tmp_path / "g") == contents(tmp_path / "f")


class StoreReaderOf:
    """Gives the manifest of a store."""

    def __init__(self, folder):
        self.index = StoreIndex(folder)

    def __enter__(self):
        return self.index.manifest

    def __exit__(self, *exception):
        self.index.close()


class TestHdf5:
    def test_layout(self, tmp_path):
        import h5py

        file = tmp_path / "deep" / "a.h5"
        source = write(tmp_path / "f", "float32")
        assert run("convert", source, file, "--to", "hdf5") == 0
        assert [f.name for f in file.parent.iterdir()] == ["a.h5"]
        names = set()
        with h5py.File(file) as h5:
            # As hloc lists the images of a file.
            h5.visititems(
                lambda _, item: (
                    names.add(item.parent.name.strip("/"))
                    if isinstance(item, h5py.Dataset)
                    else None
                )
            )
            assert names == set(NAMES)
            assert h5.attrs["coordinates"] == "resized"
            for i, name in enumerate(NAMES):
                group = h5[name]
                n = sum(COUNTS.values())
                shapes = {key: (item.shape, item.dtype.name) for key, item in group.items()}
                assert shapes == {
                    "keypoints": ((n, 2), "float32"),
                    "descriptors": ((4, n), "float16"),
                    "scores": ((n,), "float16"),
                    "patch_sizes": ((n,), "int16"),
                    "image_size": ((2,), "int64"),
                    "global_descriptor": ((4,), "float32"),
                }
                assert group["image_size"][:].tolist() == [128, 96]
                assert group["patch_sizes"][:].tolist() == [2] * 35 + [5] * 2
                assert (group["scores"][:] == 1).all()
                np.testing.assert_array_equal(group["global_descriptor"], ROWS[i])
                np.testing.assert_array_equal(
                    group["descriptors"][:].T, np.concatenate(PATCHES[i]).astype(np.float16)
                )

    def test_key_points(self, tmp_path):
        """Centres, where (0, 0) is the middle of the top-left pixel."""
        import h5py

        convert_features(write(tmp_path / "f"), tmp_path / "a.h5", "hdf5", progress=False)
        with h5py.File(tmp_path / "a.h5") as h5:
            points = h5["seq/1.jpg/keypoints"][:]
        # Two cells are the px 0 to 31, five are 0 to 79; the second size has a stride of 2 cells.
        assert points[:2].tolist() == [[15.5, 15.5], [31.5, 15.5]]
        assert points[7].tolist() == [15.5, 31.5]
        assert points[-2:].tolist() == [[39.5, 39.5], [71.5, 39.5]]
        grids = [PatchGrid.of_map((6, 8), s, t) for s, t in ((2, 1), (5, 2))]
        np.testing.assert_array_equal(np.floor(points), np.vstack([g.keypoints for g in grids]))

    def test_key_points_on_the_original_images(self, tmp_path, capsys):
        import h5py

        for name in NAMES:
            (tmp_path / name).parent.mkdir(exist_ok=True)
            Image.new("RGB", (256, 96)).save(tmp_path / name)  # twice as wide
        source = write(tmp_path / "f")
        words = ["convert", source, tmp_path / "a.h5", "--to", "hdf5", "--dataset_root_dir"]
        assert run(*words, tmp_path) == 0
        with h5py.File(tmp_path / "a.h5") as h5:
            assert h5.attrs["coordinates"] == "original"
            points = h5["seq/1.jpg/keypoints"][:]
            assert h5["seq/1.jpg/image_size"][:].tolist() == [256, 96]
        assert points[0].tolist() == [31.5, 15.5]  # px 0 to 63
        assert run(*words[:2], tmp_path / "b.h5", *words[3:], tmp_path / "nowhere") == 2
        assert "--dataset_root_dir" in capsys.readouterr().err
        assert not list(tmp_path.glob("b.h5*"))

    def test_native_sizes(self, tmp_path):
        import h5py

        sizes = [(128, 96), (160, 112)]
        names = ["a.png", "b.png"]
        config = replace(
            CONFIG, image_size=(0, 0), match_image_size=(0, 0), patch_sizes=(2,), strides=(1,),
            patch_weights=(1.0,), local_features="float32",
        )  # fmt: skip
        manifest = Manifest.of(config, names, CHECKPOINT)
        with open_writer(tmp_path / "f", names, manifest) as writer:
            for i, (width, height) in enumerate(sizes):
                Image.new("RGB", (width, height)).save(tmp_path / names[i])
                count = (width // 16 - 1) * (height // 16 - 1)
                writer.write(i, ROWS[i], [unit(RNG, count)])
            writer.finish()
        convert_features(
            tmp_path / "f", tmp_path / "a.h5", "hdf5", dataset_root=tmp_path, progress=False
        )
        with h5py.File(tmp_path / "a.h5") as h5:
            assert h5["a.png/keypoints"].shape == (35, 2)
            assert h5["b.png/keypoints"].shape == (54, 2)
            assert h5["b.png/keypoints"][-1].tolist() == [143.5, 95.5]
            assert h5["b.png/image_size"][:].tolist() == [160, 112]
        Image.new("RGB", (400, 400)).save(tmp_path / "b.png")
        with pytest.raises(FeatureError, match=r"b\.png .*\b54\b.*400 x 400.*\b576\b"):
            convert_features(
                tmp_path / "f", tmp_path / "b.h5", "hdf5", dataset_root=tmp_path, progress=False
            )

    @pytest.mark.parametrize("to", ["float16", "float32", "int8", "npy"])
    def test_there_and_back(self, tmp_path, to):
        source = write(tmp_path / "f")
        convert_features(source, tmp_path / "a.h5", "hdf5", progress=False)
        assert run("convert", tmp_path / "a.h5", tmp_path / "g", "--to", to) == 0
        reads = check(tmp_path / "g", max(5e-4, TOLERANCE[to]))
        expected = Manifest.of(replace(CONFIG, local_features=to), NAMES, CHECKPOINT)
        assert reads.manifest == expected
        if to == "float16":
            shards = [(f / "features-00000.bin").read_bytes() for f in (source, tmp_path / "g")]
            assert shards[0] == shards[1]

    def test_info(self, tmp_path, capsys):
        convert_features(write(tmp_path / "f"), tmp_path / "a.h5", "hdf5", progress=False)
        info = store_info(tmp_path / "a.h5")
        assert (info.layout, info.kind, info.num_images) == ("hdf5", "float16", 4)
        assert run("info", tmp_path / "a.h5") == 0
        assert "HDF5 file, float16" in capsys.readouterr().out
        assert run("verify", tmp_path / "a.h5") == 2
        assert f"{tmp_path}/a.h5 " in capsys.readouterr().err

    def test_what_is_not_read(self, tmp_path, capsys):
        import h5py

        with h5py.File(tmp_path / "hloc.h5", "w") as h5:
            h5["a.jpg/keypoints"] = np.zeros((3, 2))
        (tmp_path / "junk.h5").write_bytes(b"junk" * 1000)
        convert_features(write(tmp_path / "f"), tmp_path / "cut.h5", "hdf5", progress=False)
        with h5py.File(tmp_path / "cut.h5", "a") as h5:
            del h5["seq/1.jpg"]
        for name, words in (
            ("hloc", "patchnetvlad-store"),
            ("junk", "HDF5"),
            ("cut", "3 of 4 images"),
        ):
            assert run("convert", tmp_path / f"{name}.h5", tmp_path / "g", "--to", "npy") == 2
            error = capsys.readouterr().err
            assert words in error
            assert f"{name}.h5" in error
            assert len(error.splitlines()) <= 2
        assert not (tmp_path / "g").exists()

    def test_a_file_that_is_there(self, tmp_path, capsys):
        source = write(tmp_path / "f")
        (tmp_path / "a.h5").write_text("mine")
        assert run("convert", source, tmp_path / "a.h5", "--to", "hdf5") == 2
        assert f"{tmp_path}/a.h5 " in capsys.readouterr().err
        assert (tmp_path / "a.h5").read_text() == "mine"

    def test_nothing_is_left_of_a_failure(self, tmp_path):
        source = write(tmp_path / "f")
        flip(source, "seq/3.jpg")
        with pytest.raises(FeatureError, match=r"seq/3\.jpg"):
            convert_features(source, tmp_path / "a.h5", "hdf5", progress=False)
        assert not list(tmp_path.glob("a.h5*"))

    def test_without_h5py(self, tmp_path, capsys, monkeypatch):
        source = write(tmp_path / "f")
        (tmp_path / "a.h5").touch()
        monkeypatch.setitem(sys.modules, "h5py", None)
        for words in (
            [source, tmp_path / "b.h5", "--to", "hdf5"],
            [tmp_path / "a.h5", tmp_path / "g", "--to", "npy"],
        ):
            assert run("convert", *words) == 2
            assert 'pip install "patchnetvlad[hdf5]"' in capsys.readouterr().err
        assert run("convert", source, tmp_path / "g", "--to", "npy") == 0


# --- with the model -------------------------------------------------------------------------------

INI = """
[feature_extract]
cachebatchsize = 2
imageresizeW = 128
imageresizeH = 96
local_features = {kind}

[feature_match]
matcher = RANSAC
n_values_all = 1,5,10
imageresizeW = 128
imageresizeH = 96
patchWeights2Use = 0.6,0.4

[global_params]
pooling = {pooling}
resumePath = ./pretrained_models/imagenet_WPCA
threads = 1
num_pcs = {pcs}
patch_sizes = 2,5
strides = 1,2
patch_vlad = {vlad}
precision = exact
"""


@pytest.fixture
def ini(tmp_path):
    """Fits the synthetic features; names no checkpoint that there is."""
    file = tmp_path / "mine.ini"
    file.write_text(INI.format(kind="float16", pooling="patchnetvlad", pcs=4, vlad="integral"))
    return file


@pytest.fixture(scope="module")
def extracted(tmp_path_factory):
    """Three pictures, and their features as maps and as npy files."""
    root = tmp_path_factory.mktemp("world")
    for i in range(3):
        blocks = np.random.default_rng(i).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((160, 120)).save(root / f"{i}.png")
    (root / "list.txt").write_text("0.png\n1.png\n2.png\n")
    for kind in ("map", "npy"):
        file = root / f"{kind}.ini"
        file.write_text(INI.format(kind=kind, pooling="patchnetvlad", pcs=128, vlad="direct"))
        extract_as(root, kind, root / kind)
    return root


def extract_as(root, kind, folder):
    extract(root / f"{kind}.ini", root / "list.txt", root, folder, device="cpu", progress=False)


def test_from_maps(extracted, tmp_path, capsys):
    words = ["convert", extracted / "map", tmp_path / "f", "--to", "npy", "--nocuda"]
    assert run(*words) == 2
    assert "--config_path" in capsys.readouterr().err
    assert run(*words, "--config_path", extracted / "map.ini") == 0
    ours, direct = contents(tmp_path / "f"), contents(extracted / "npy")
    assert ours.keys() == direct.keys()
    made_with = [json.loads(files["features.json"]) for files in (ours, direct)]
    assert made_with[0] == {**made_with[1], "rounded": "map"}
    assert ours["globalfeats.npy"] == direct["globalfeats.npy"]
    for name in ours:
        if name.startswith("patchfeats"):
            stored = [np.load(folder / name) for folder in (tmp_path / "f", extracted / "npy")]
            similar = (stored[0] * stored[1]).sum(axis=0)
            assert similar.min() > 0.999, name  # the maps were rounded to float16


def test_from_maps_of_another_checkpoint(extracted, tmp_path, capsys, monkeypatch):
    config = tmp_path / "c.ini"
    config.write_text(INI.format(kind="map", pooling="netvlad", pcs=128, vlad="direct"))
    words = ["convert", extracted / "map", tmp_path / "f", "--to", "npy", "--nocuda"]
    assert run(*words, "--config_path", config) == 2
    assert f"{config} has pooling = netvlad" in capsys.readouterr().err
    monkeypatch.setattr(manifest, "file_sha256", lambda file: "d" * 64)
    assert run(*words, "--config_path", extracted / "map.ini") == 2
    assert "imagenet_WPCA128.safetensors" in capsys.readouterr().err
    assert not (tmp_path / "f").exists()


def test_extraction_computes_just_what_was_dropped(extracted, tmp_path, capsys, monkeypatch):
    config = tmp_path / "float16.ini"
    config.write_text(INI.format(kind="float16", pooling="patchnetvlad", pcs=128, vlad="direct"))
    folder = tmp_path / "f"
    arguments = (config, extracted / "list.txt", extracted, folder)

    def go():
        extract(*arguments, device="cpu", progress=False)

    go()
    flip(folder, "1.png", 2000)
    assert run("verify", "--drop", folder) == 1
    described = []
    from patchnetvlad.engines import local_extract as module

    round_patches = module.round_patches
    monkeypatch.setattr(
        module, "round_patches", lambda *words: described.append(1) or round_patches(*words)
    )
    go()
    assert len(described) == 1
    assert run("verify", folder) == 0
    assert store_info(folder).finished
    direct = NpyReader(extracted / "npy", ["0.png", "1.png", "2.png"], Config.load(config))
    again = StoreReader(folder, ["0.png", "1.png", "2.png"], Config.load(config))
    for i in range(3):
        for ours, theirs in zip(again.patches(i), direct.patches(i), strict=True):
            np.testing.assert_allclose(ours, theirs, atol=5e-4)


def test_help_and_wrong_words(capsys):
    for words in (["--help"], ["info", "--help"], ["convert", "--help"]):
        with pytest.raises(SystemExit) as caught:
            run(*words)
        assert caught.value.code == 0
    for words in ([], ["look"], ["convert", "a", "b"], ["convert", "a", "b", "--to", "zip"]):
        with pytest.raises(SystemExit) as caught:
            run(*words)
        assert caught.value.code == 2
    with pytest.raises(PatchNetVLADError, match=r"'zip'.*hdf5"):
        convert_features(Path("a"), Path("b"), "zip")
