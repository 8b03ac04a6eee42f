# SPDX-License-Identifier: MIT
"""Extraction in shares, and merging them to what one run writes."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import thin
from conftest import SHARED, needs_shared
from hypothesis import given
from hypothesis import strategies as st
from killing import fork, needs_fork
from PIL import Image
from place_data import SMALL, write_ini, write_list
from test_store_cli import flip

from patchnetvlad import PlaceIndex, load_model
from patchnetvlad.cli import feature_extract as extract_cli
from patchnetvlad.cli import store as store_cli
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines import local_extract
from patchnetvlad.errors import (
    ArgumentError,
    FeatureError,
    ImageListError,
    OtherFeaturesError,
    OutputError,
)
from patchnetvlad.features import lock
from patchnetvlad.features import names as features_names
from patchnetvlad.features.convert import convert_features
from patchnetvlad.features.inspect import store_info, verify_features
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.merge import merge_shares
from patchnetvlad.features.open import open_reader, open_writer
from patchnetvlad.features.store import (
    index as store_index,
)
from patchnetvlad.features.store import (
    share as store_share,
)
from patchnetvlad.features.store import (
    writer as store_writer,
)
from patchnetvlad.features.store.codec import encode_patches
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.features.store.records import read_record
from patchnetvlad.features.store.share import Share, ShareFolder
from patchnetvlad.features.store.share_writer import open_share
from patchnetvlad.own_data.check import _check_features
from patchnetvlad.pipeline.extract import extract

pytestmark = pytest.mark.usefixtures("thin_network")

CONFIG = replace(SMALL, cache_batch_size=2)
# Batches of one: [3], [8]; the others are of two images, some of which are repeats.
LISTED = ["0.png", "1.png", "./0.png", "2.png", "3.png", "1.png", "sub/../2.png", "0.png", "4.png"]
SHARD_BYTES = 40_000


def content(folder):
    """Everything that features consist of, but what only a run of its own can have."""
    found = {
        file.relative_to(folder).as_posix(): file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.suffix in (".npy", ".bin", ".json")
    }
    if (folder / "features.sqlite").exists():
        with contextlib.closing(sqlite3.connect(folder / "features.sqlite")) as db:
            for table in ("about", "images", "records"):
                found[table] = db.execute(f"SELECT * FROM {table}").fetchall()
    return found


def stored(folder):
    """What merged shares and one run have in common: all but which shards the records are in."""
    found = {name: value for name, value in content(folder).items() if not name.endswith(".bin")}
    if "records" in found:
        with contextlib.closing(StoreIndex(folder)) as index:
            found["records"] = {
                name: (record.arrays, record.modified, bytes(read_record(folder, record, name)))
                for name, record in index.records().items()
            }
    return found


def records_of(share):
    return sorted(ShareFolder.read(share).records().items())


# --- with a network -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "sub").mkdir()
    rng = np.random.default_rng(0)
    for i in range(5):
        blocks = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((160, 120)).save(root / f"{i}.png")
        os.utime(root / f"{i}.png", ns=(10**18 + i, 10**18 + i))
    write_list(root / "list.txt", LISTED)
    return root


@pytest.fixture(autouse=True)
def small_files(monkeypatch):
    monkeypatch.setattr(store_writer, "SHARD_BYTES", SHARD_BYTES)


@pytest.fixture
def copied(images, tmp_path):
    """The images, for tests that change them."""
    return shutil.copytree(images, tmp_path / "images")


def run(images, out, config=CONFIG, **keywords):
    return extract(
        config, images / "list.txt", images, out, device="cpu", progress=False, **keywords
    )


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """One run without shares."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_writer, "SHARD_BYTES", SHARD_BYTES)
        run(images, folder)
    assert len(list(folder.glob("*.bin"))) == 2
    return stored(folder)


@pytest.fixture(scope="module")
def extracted(images, tmp_path_factory):
    """Shares that are not merged, to be copied."""
    folder = tmp_path_factory.mktemp("extracted")
    for i in range(3):
        run(images, folder, shard=(i, 3))
    return folder


@pytest.fixture
def waiting(extracted, tmp_path):
    return shutil.copytree(extracted, tmp_path / "waiting")


@pytest.mark.parametrize(
    ("changes", "naming", "count"),
    [
        pytest.param({}, "stem", 3, id="float16"),
        pytest.param({"local_features": "int8"}, "stem", 2, id="int8"),
        pytest.param({"local_features": "map", "image_size": (0, 0)}, "stem", 1, id="map"),
        pytest.param({"local_features": "npy"}, "path", 3, id="npy"),
        pytest.param({"pooling": "netvlad"}, "stem", 7, id="netvlad"),
    ],
)
def test_merged_shares_are_what_one_run_writes(images, tmp_path, changes, naming, count):
    config = replace(CONFIG, **changes)
    out, seen = tmp_path / "out", []
    rows = run(images, tmp_path / "whole", config, feature_names=naming)
    expected = stored(tmp_path / "whole")
    batch_of = local_extract._describe_batch

    def watched(describer, batch, kind):
        seen.append([i for i, _ in batch])
        return batch_of(describer, batch, kind)

    for i in reversed(range(count)):  # in any order
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(local_extract, "_describe_batch", watched)
            found = run(images, out, config, feature_names=naming, shard=f"{i}/{count}")
        places = Share(i, count).rows(LISTED, 2)
        np.testing.assert_array_equal(found, rows[places].reshape(found.shape))
        info = store_info(out / "shards" / f"{i}-of-{count}")
        assert (info.layout, info.finished, info.share) == ("store", True, f"{i}/{count}")
        assert info.num_images == info.num_done == len(places)
    assert sorted(map(len, seen)) == [1, 1, 1, 2]  # 2 and 3 stand in different batches, so does 4
    assert not content(out).get("globalfeats.npy")

    shards = {file.stat().st_ino for file in out.glob("shards/*/*.bin")}
    assert merge_shares(out, progress=False) == len(LISTED)
    assert stored(out) == expected
    if "records" in expected:
        assert {file.stat().st_ino for file in out.glob("*.bin")} == shards  # none was copied
    assert {file.name for file in out.iterdir() if file.is_dir()} == {
        file.name for file in (tmp_path / "whole").iterdir() if file.is_dir()
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_extract, "stream_features", None)  # nothing is left to do
        np.testing.assert_array_equal(run(images, out, config, feature_names=naming), rows)
    assert stored(out) == expected


def test_images_that_change_before_the_merge_are_seen_after_it(copied, tmp_path):
    for name, changes in (("npy", {"local_features": "npy"}), ("netvlad", {"pooling": "netvlad"})):
        config = replace(CONFIG, **changes)
        run(copied, tmp_path / name, config, shard="0/1", feature_names="path")
        before = (copied / "3.png").stat().st_mtime_ns
        os.utime(copied / "3.png", ns=(before + 5 * 10**9,) * 2)
        merge_shares(tmp_path / name, progress=False)
        paths = ImageList.read(copied / "list.txt").image_paths(copied)
        manifest = Manifest.of(
            config, LISTED, store_index.present_manifests(tmp_path / name)[0].checkpoint,
            naming="path", root=copied,
        )  # fmt: skip
        with open_writer(tmp_path / name, LISTED, manifest, paths) as writer:
            assert writer.done.tolist() == [name != "3.png" for name in LISTED]
        os.utime(copied / "3.png", ns=(before, before))


def test_nothing_but_its_own_images_concerns_a_share(copied, tmp_path, monkeypatch):
    for i in (2, 3, 4):
        (copied / f"{i}.png").unlink()
    assert run(copied, tmp_path, shard="0/4").shape == (5, 128)
    with pytest.raises(ImageListError, match=r"\b2\.png .*list\.txt, line 4\).*--dataset_root_dir"):
        run(copied, tmp_path, shard="1/4")
    for i in (2, 3, 4):
        shutil.copy(copied / "0.png", copied / f"{i}.png")
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=40_000))
    run(copied, tmp_path, shard="0/4", resume=False)  # 2 images of 5
    with pytest.raises(
        FeatureError, match=rf"80\.6 kB.*{tmp_path}/shards/0-of-1 .*\b40 kB.*--output_features_dir"
    ):
        run(copied, tmp_path, shard="0/1")


def test_a_share_goes_on_where_it_was(copied, tmp_path, caplog):
    run(copied, tmp_path, shard="0/2")
    folder = tmp_path / "shards" / "0-of-2"
    before, records = content(folder), records_of(folder)
    assert run(copied, tmp_path, shard="0/2").shape == (7, 128)
    assert content(folder) == before
    os.utime(copied / "1.png", ns=(5, 5))
    run(copied, tmp_path, shard="0/2")
    after = content(folder)
    assert after["features-share.json"] == before["features-share.json"]
    assert [new == old for new, old in zip(records_of(folder), records, strict=True)] == [
        True, False, True,
    ]  # fmt: skip
    run(copied, tmp_path, shard="0/2", resume=False)
    assert len(content(folder)["features-00000.bin"]) == len(before["features-00000.bin"])
    with pytest.raises(FeatureError, match=rf"{folder} .*cachebatchsize.*--no-resume"):
        run(copied, tmp_path, replace(CONFIG, cache_batch_size=3), shard="0/2")
    with pytest.raises(OtherFeaturesError, match=r"patch_sizes: \[2, 3\] -> \[2, 5\]"):
        run(copied, tmp_path, replace(CONFIG, patch_sizes=(2, 5)), shard="0/2")
    with (
        lock.locked(folder),
        pytest.raises(FeatureError, match=f"another process.*{folder}"),
    ):
        run(copied, tmp_path, shard="0/2")


def test_broken_images(copied, tmp_path, whole, capsys):
    good = (copied / "3.png").read_bytes()
    stamp = (copied / "3.png").stat().st_mtime_ns
    (copied / "3.png").write_bytes(b"\x89PNG")
    write_ini(copied / "config.ini")

    def command(share):
        return extract_cli.main([
            "--config_path", str(copied / "config.ini"), "--dataset_root_dir", str(copied),
            "--dataset_file_path", str(copied / "list.txt"), "--output_features_dir",
            str(tmp_path / "out"), "--nocuda", "--shard", share,
        ])  # fmt: skip

    assert command("0/2") == 0
    out, _ = capsys.readouterr()
    assert "Done with share 0/2: 7 images. When all shares are done, run patchnetvlad store" in out
    assert command("1/2") == 2
    error = capsys.readouterr().err
    assert re.search(r"\b1 of 2\b.* 3\.png \(.*list\.txt, line 5\)", error)
    assert store_cli.main(["info", str(tmp_path / "out" / "shards" / "1-of-2")]) == 0
    out, _ = capsys.readouterr()
    assert "share 1/2 of a feature store, float16, not finished\n" in out
    assert "missing      3.png\n" in out
    assert store_cli.main(["merge", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert re.search(r"share 1/2\b.*\b1 of 2\b.* 3\.png;.* --shard 1/2 ", error)
    (copied / "3.png").write_bytes(good)
    os.utime(copied / "3.png", ns=(stamp, stamp))
    assert command("1/2") == 0
    assert store_cli.main(["merge", str(tmp_path / "out")]) == 0
    assert f"Done. The features of 9 images are in {tmp_path / 'out'}\n" in capsys.readouterr().out
    ours = stored(tmp_path / "out")
    paths = [ours.pop("about"), whole["about"]]  # the images lie elsewhere
    assert ours == {key: value for key, value in whole.items() if key != "about"}
    first, second = (json.loads(dict(about)["manifest"]) for about in paths)
    assert {key for key in first if first[key] != second[key]} == {"paths", "root"}


KILLED = """
import os, signal, sys
from patchnetvlad.features.store import writer
from patchnetvlad.engines import local_extract
from patchnetvlad.cli import feature_extract as cli

calls = 0
def killed(self, *arguments):
    global calls
    calls += 1
    if calls == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return write(self, *arguments)

write = writer.StoreWriter.write
writer.StoreWriter.write = killed
local_extract.COMMIT_BYTES = 1
sys.exit(cli.main(sys.argv[1:]))
"""


@needs_fork
def test_commands_that_are_killed(images, tmp_path, whole, capsys):
    write_ini(tmp_path / "config.ini")
    out = tmp_path / "out"
    extraction = [
        "--config_path", tmp_path / "config.ini", "--dataset_root_dir", images, "--nocuda",
        "--dataset_file_path", images / "list.txt", "--output_features_dir", out, "--shard", "0/1",
    ]  # fmt: skip

    words = [sys.executable, "-c", thin.IN_A_PROCESS + KILLED, *map(str, extraction)]
    done = subprocess.run(words, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    folder = out / "shards" / "0-of-1"
    assert [store_info(folder).num_done, store_info(folder).finished] == [5, False]
    assert extract_cli.main([str(word) for word in extraction]) == 0
    assert "5 of 9 images" in capsys.readouterr().out

    def merging():
        calls, adopt = itertools.count(1), store_writer.StoreWriter.adopt_shard

        def killed(self, *arguments):
            if next(calls) == 2:
                os.kill(os.getpid(), signal.SIGKILL)
            return adopt(self, *arguments)

        store_writer.StoreWriter.adopt_shard = killed
        store_cli.main(["merge", str(out)])

    assert os.waitpid(fork(merging), 0)[1] == signal.SIGKILL
    assert 0 < len(content(out)["records"]) < 5
    assert store_cli.main(["merge", str(out)]) == 0
    assert "are in " in capsys.readouterr().out
    assert stored(out) == whole


def test_words(images, tmp_path, capsys):
    for shard in ("3/3", "a/b", "-1/3", "0/0", "1", "1/3/5", "", " 0/1", "\u0660/\u0661", "0/1\n"):
        with pytest.raises(ArgumentError, match="I/N"):
            run(images, tmp_path, shard=shard)
    for shard in ((3, 3), (-1, 3), (0, 1, 2), (0,)):
        with pytest.raises(ArgumentError, match="I/N"):
            run(images, tmp_path, shard=shard)
    assert extract_cli.main(["--dataset_file_path", "x", "--shard", "3/3"]) == 2
    assert "'3/3'" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


@given(
    st.lists(st.sampled_from("abcdefghij"), min_size=1, max_size=30),
    st.integers(1, 5),
    st.integers(1, 40),
)
def test_shares_make_up_the_list(names, batch_size, count):
    parts = [Share(i, count).rows(names, batch_size) for i in range(count)]
    assert sorted(itertools.chain(*parts)) == list(range(len(names)))
    assert parts == [sorted(part) for part in parts]
    firsts = [names.index(name) for name in names]
    batches = [sorted({firsts[i] // batch_size for i in part}) for part in parts]
    assert list(itertools.chain(*batches)) == sorted({i // batch_size for i in firsts})
    assert max(map(len, batches)) - min(map(len, batches)) <= 1
    owners = [{names[i] for i in part} for part in parts]
    assert sum(map(len, owners)) == len(set(names))


# --- what shares are not good for -----------------------------------------------------------------


def test_shares_that_are_not_merged_cannot_be_used(waiting, images, tmp_path, capsys):
    part = waiting / "shards" / "1-of-3"
    merge = f"patchnetvlad-store merge {waiting}$"
    for use in (
        lambda folder: open_reader(folder, LISTED, CONFIG),
        lambda folder: convert_features(folder, tmp_path / "x", "float32", progress=False),
    ):
        with pytest.raises(FeatureError, match=rf"{part} .*share 1/3\b.*{merge}"):
            use(part)
        with pytest.raises(FeatureError, match=merge):
            use(waiting)
    with pytest.raises(FeatureError, match=f"{part} .*share 1/3"):
        PlaceIndex.load(part, load_model(CONFIG, device="cpu"))
    listed = ImageList.read(images / "list.txt")
    assert "share 1/3" in _check_features(part, listed, "index")[2][0]
    assert f"patchnetvlad-store merge {waiting}" in _check_features(waiting, listed, "")[2][0]
    before = content(waiting)
    with pytest.raises(FeatureError, match=f"{waiting}/shards .*patchnetvlad-store merge"):
        run(images, waiting)
    with pytest.raises(FeatureError, match=f"{part} .*share 1/3"):
        run(images, part)
    with pytest.raises(OutputError, match=f"{part} "):
        merge_shares(part, [waiting / "shards" / f"{i}-of-3" for i in range(3)], progress=False)
    assert content(waiting) == before
    assert store_cli.main(["info", str(waiting)]) == 2
    assert f"patchnetvlad-store merge {waiting}\n" in capsys.readouterr().err
    assert store_cli.main(["info", str(part)]) == 0
    assert f"{part}: share 1/3 of a feature store, float16, finished\n" in capsys.readouterr().out
    assert store_cli.main(["verify", str(part)]) == 0
    assert f"{part}, share 1/3: sound; records read: 1\n" in capsys.readouterr().out


def test_the_jobs_of_features_that_are_complete(waiting, images, whole, caplog):
    merge_shares(waiting, keep=True, progress=False)
    assert records_of(waiting / "shards" / "1-of-3")
    run(images, waiting)  # may go on, beside shares that were kept
    with caplog.at_level(logging.INFO):
        assert run(images, waiting, shard="1/3").shape == (2, 128)
    assert "2 of 2 images" in caplog.text
    merge_shares(waiting, progress=False)
    assert not (waiting / "shards").exists()
    with caplog.at_level(logging.INFO):
        assert run(images, waiting, shard="1/3").shape == (0, 128)
    assert f"share 1/3 are in {waiting} " in caplog.text
    assert not (waiting / "shards").exists()
    assert stored(waiting) == whole
    assert merge_shares(waiting) == len(LISTED)
    with pytest.raises(OtherFeaturesError, match=r"patch_sizes: \[2, 3\] -> \[2, 5\]"):
        run(images, waiting, replace(CONFIG, patch_sizes=(2, 5)), shard="0/3")


# --- merging, without a network -------------------------------------------------------------------

NAMES = [f"seq/{i}.jpg" for i in range(7)] + ["seq/0.jpg", "./seq/4.jpg"]
SMALL = Config(
    num_pcs=8, patch_sizes=(2, 5), strides=(1, 2), patch_weights=(0.5, 0.5), cache_batch_size=2
)
KINDS = ("float16", "npy")


def features(name):
    rng = np.random.default_rng(sum(os.path.normpath(name).encode()))
    values = [rng.standard_normal((n, 8)).astype(np.float32) for n in (1, 6, 3)]
    return values[0][0], [array.astype(np.float32) for array in values[1:]]


def manifest_of(kind, **changes):
    config = replace(SMALL, local_features=kind)
    return replace(Manifest.of(config, NAMES, "c" * 64, naming="path"), **changes)


def encoded(arrays, kind):
    import torch

    return encode_patches([torch.from_numpy(array) for array in arrays], kind)


def write_share(out, share, kind="float16", only=None, batch_size=2, modified=7, **changes):
    places = share.rows(NAMES, batch_size)
    names = [NAMES[i] for i in places]
    manifest = manifest_of(kind, **changes)
    with open_share(out, share, places, names, manifest, [], resume=False) as writer:
        writer.start()
        for i in features_names.rows_by_name(names).values():
            if only is None or i[0] in only:
                row, arrays = features(names[i[0]])
                writer.write(i[0], row, encoded(arrays, kind), modified)
        writer.commit()
        if only is None:
            writer.finish()
    return share.folder(out)


def write_shares(out, kind="float16", count=3):
    return [write_share(out, Share(i, count), kind) for i in range(count)]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    found = {}
    for kind in KINDS:
        folder = tmp_path_factory.mktemp(kind)
        with open_writer(folder, NAMES, manifest_of(kind)) as writer:
            writer.start()
            for i in range(7):
                row, arrays = features(NAMES[i])
                writer.write(i, row, encoded(arrays, kind), 7)
            writer.finish()
        found[kind] = stored(folder)
    return found


def merge(out, *shares, **keywords):
    return merge_shares(out, shares, progress=False, **keywords)


def test_shares_from_anywhere(tmp_path, undisturbed):
    for kind in KINDS:
        out = tmp_path / kind
        folders = [folder.rename(tmp_path / f"{kind}{i}") for i, folder in
                   enumerate(write_shares(tmp_path / "made", kind))]  # fmt: skip
        before = [content(folder) for folder in folders]
        assert merge(out, *reversed(folders), keep=True) == len(NAMES)
        assert stored(out) == undisturbed[kind]
        assert [content(folder) for folder in folders] == before
        (folders[0] / "slurm.log").touch()
        merge(out, *folders)
        assert stored(out) == undisturbed[kind]
        assert [file.name for file in folders[0].iterdir()] == ["slurm.log"]
        assert not any(folder.exists() for folder in folders[1:])


def test_images_that_have_urls(tmp_path, monkeypatch):
    monkeypatch.setitem(globals(), "NAMES", [f"s3://city/{os.path.normpath(n)}" for n in NAMES])
    for kind in KINDS:
        with open_writer(tmp_path / kind, NAMES, manifest_of(kind)) as writer:
            writer.start()
            for name, (i, *_) in features_names.rows_by_name(NAMES).items():
                row, arrays = features(name)
                writer.write(i, row, encoded(arrays, kind), 7)
            writer.finish()
        write_shares(tmp_path / "out" / kind, kind)
        assert merge(tmp_path / "out" / kind) == len(NAMES)
        assert stored(tmp_path / "out" / kind) == stored(tmp_path / kind)


def test_what_does_not_belong_together(tmp_path, undisturbed):
    out = tmp_path / "out"
    folders = write_shares(out)

    def refused(match, *shares, to=out, **keywords):
        before = content(out)
        with pytest.raises(FeatureError, match=match) as caught:
            merge(to, *shares, **keywords)
        assert len(str(caught.value)) < 600
        assert content(out) == before
        return str(caught.value)

    refused("feature_extract --shard 1/3", folders[0], folders[2])
    refused(r"\(0/3, 2/3\).*feature_extract --shard 0/3", folders[1])
    refused(f"{folders[0]} .*share 0/3", *folders, folders[0])
    refused(f"{tmp_path}/nowhere .*--shard I/N", tmp_path / "nowhere")
    refused(f"{tmp_path}/none/shards; feature_extract --shard I/N", to=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    refused("s3://city/x .*disk", to="s3://city/x")
    refused("s3://city/0 .*disk", "s3://city/0")
    with open_writer(tmp_path / "plain", NAMES, manifest_of("float16")) as writer:
        writer.start()
    refused(f"{tmp_path}/plain .*--shard I/N", *folders, tmp_path / "plain")

    other = tmp_path / "other"
    write_share(other, Share(1, 3), num_pcs=9, images="x")
    write_share(other, Share(1, 4))
    write_share(other, Share(0, 3), batch_size=3)
    refused(
        r"0-of-3 and .*1-of-3 .*num_pcs: 8 -> 9\).*--shard I/3 --no-resume",
        folders[0], other / "shards" / "1-of-3", folders[2],
    )  # fmt: skip
    refused(r"0-of-3 .*\b3\b.*1-of-4 .*\b4\b", *folders, other / "shards" / "1-of-4")
    refused(r"\b10\b.*\b9\b.*cachebatchsize.*--no-resume", other / "shards" /
            "0-of-3", *folders[1:])  # fmt: skip
    write_share(out, Share(2, 3), only=[0])
    refused(rf"share 2/3\b.*{folders[2]} .*\b2\b.*\b4\b.*seq/5\.jpg;.*--shard 2/3")
    with open_writer(other, NAMES, manifest_of("float16", num_pcs=9)) as writer:
        writer.start()
    write_share(out, Share(2, 3))
    refused(rf"{other} .*\(num_pcs: 9 -> 8\);.*--no-resume", *folders,
            to=other)  # fmt: skip
    with (
        lock.locked(folders[1]),
        pytest.raises(FeatureError, match=f"another process.*{folders[1]}"),
    ):
        merge(out)
    write_share(out, Share(0, 3))  # which was merged before that was noticed
    merge(other, *folders, resume=False)
    assert stored(other)["records"] == undisturbed["float16"]["records"]


@pytest.mark.parametrize("kind", KINDS)
def test_more_shares_than_batches(tmp_path, undisturbed, kind):
    write_shares(tmp_path, kind, 6)
    assert merge(tmp_path) == 9
    assert stored(tmp_path) == undisturbed[kind]


def test_damaged_records(tmp_path, undisturbed):
    """Those that are copied, as all are to the files of the research code."""
    kind = "npy"
    folders = write_shares(tmp_path, kind)
    flip(folders[1], "seq/3.jpg")
    match = rf"share 1/3\b.*seq/3\.jpg in {folders[1]}/.*verify --drop {folders[1]} .*--shard 1/3"
    for _ in range(2):
        with pytest.raises(FeatureError, match=match):
            merge(tmp_path)
    assert not list(folders[0].glob("*.bin"))  # is done
    assert verify_features(folders[1], drop=True, progress=False).num_dropped == 1
    with pytest.raises(
        FeatureError, match=rf"share 1/3\b.*{folders[1]} .*seq/3\.jpg;.*--shard 1/3"
    ):
        merge(tmp_path)
    write_share(tmp_path, Share(1, 3), kind)
    merge(tmp_path)
    assert stored(tmp_path) == undisturbed[kind]


@pytest.mark.parametrize(
    ("file", "key", "value"),
    [
        ("features-share.json", "share", "3/2"), ("features-share.json", "share", 5),
        ("features-share.json", "rows", [0]), ("features-share.json", "rows", {}),
        ("features-share.json", "rows", [99, 0, 1]), ("features-share.json", "names", [1, 2, 3]),
        ("features-share.json", "manifest", []), ("features-share.json", "moved", None),
        ("features-00001.json", "records", [[1]]), ("features-00001.json", "records", 5),
        ("features-00001.json", "records", [["a.jpg", 0, None, 3, 1, "[]", 0, 0, 0]]),
        ("features-00001.json", "records", [["a.jpg", 0, 0, 3, 1, "\ud800", 0, 0, 0]]),
        ("features-00001.json", "records", [[None, 0, 0, 3, 1, "[]", 0, 0, 0]]),
    ],
)  # fmt: skip
def test_damaged_json(tmp_path, file, key, value):
    part = write_shares(tmp_path)[1]
    content = json.loads((part / file).read_text())
    assert key in content
    (part / file).write_text(json.dumps({**content, key: value}))
    for use in (ShareFolder.read, store_info, lambda _: merge(tmp_path)):
        with pytest.raises(FeatureError, match=file):
            use(part)


def test_a_share_that_is_missing(tmp_path):
    shutil.rmtree(write_shares(tmp_path)[1])
    with pytest.raises(FeatureError, match=f"1/3 .*{tmp_path}"):
        merge(tmp_path)


def test_damaged_shards(tmp_path, undisturbed):
    """Of those that are moved, global descriptors are read; all else is for verify."""
    folders = write_shares(tmp_path)
    record = dict(records_of(folders[1]))["seq/3.jpg"]
    file = folders[1] / f"features-{record.shard:05d}.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(FeatureError, match=rf"share 1/3\b.*{file} .*--shard 1/3"):
        merge(tmp_path)
    file.write_bytes(whole)
    flip(folders[1], "seq/3.jpg")
    match = rf"seq/3\.jpg in {tmp_path / file.name} .*verify --drop {tmp_path} "
    for _ in range(2):
        with pytest.raises(FeatureError, match=match):
            merge(tmp_path)
    assert verify_features(tmp_path, drop=True, progress=False).num_dropped == 1
    with pytest.raises(
        FeatureError, match=rf"share 1/3\b.*{tmp_path} .*seq/3\.jpg;.*--shard 1/3 --no-resume"
    ):
        merge(tmp_path)
    write_share(tmp_path, Share(1, 3))
    merge(tmp_path)
    assert stored(tmp_path) == undisturbed["float16"]
    flip(tmp_path, "seq/3.jpg", byte=40)
    assert [damage.image for damage in verify_features(tmp_path, progress=False).damages] == [
        "seq/3.jpg"
    ]


@pytest.mark.parametrize("kind", KINDS)
def test_space(tmp_path, undisturbed, monkeypatch, caplog, kind):
    folders = write_shares(tmp_path, kind)
    free = SimpleNamespace(free=0)
    monkeypatch.setattr("shutil.disk_usage", lambda _: free)

    def need(**keywords):
        with pytest.raises(FeatureError, match=rf"[0-9.]+ (kB|bytes)\b.*{tmp_path} ") as caught:
            merge(tmp_path, **keywords)
        number, unit = re.search(r"([0-9.]+) (kB|bytes)\b", str(caught.value)).groups()
        return float(number) * {"kB": 1000, "bytes": 1}[unit]

    kept, moved = need(keep=True), need()
    assert not content(tmp_path).get("records")
    assert all(list(folder.glob("*.bin")) for folder in folders)
    parts = [folder / f"features-{i:05d}.bin" for i, folder in enumerate(folders)]
    parts = [file.stat().st_size for file in parts]
    used = sum(len(v) for v in undisturbed[kind].values() if isinstance(v, bytes))
    assert kept == pytest.approx(used + (0 if kind == "npy" else sum(parts)), abs=1000)
    assert kept - moved >= (parts[0] if kind == "npy" else 0.99 * sum(parts))
    free.free = kept + 100
    with caplog.at_level(logging.INFO):
        merge(tmp_path)
    assert re.search(rf"\b3 shares\b.*\b9 images\b.*{tmp_path}", caplog.text)
    assert stored(tmp_path) == undisturbed[kind]


def test_features_that_are_there_already(tmp_path, undisturbed):
    """Of an interrupted run without shares, of older images, of newer ones."""
    for stamp, expected in ((6, 7), (8, 8), (7, 7)):
        out = tmp_path / str(stamp)
        with open_writer(out, NAMES, manifest_of("float16")) as writer:
            writer.start()
            for i in (0, 1, 2):
                row, arrays = features(NAMES[i if stamp == 7 else i + 3])
                writer.write(i, row, encoded(arrays, "float16"), stamp)
            writer.commit()
        write_shares(out)
        merge(out)
        with contextlib.closing(StoreIndex(out)) as index:
            assert {index.records()[name].modified for name in NAMES[:3]} == {expected}
        assert (content(out)["globalfeats.npy"] == undisturbed["float16"]["globalfeats.npy"]) == (
            stamp != 8
        )
        if stamp == 7:
            assert stored(out) == undisturbed["float16"]


def test_a_share_that_was_moved(tmp_path, undisturbed, capsys):
    folders = write_shares(tmp_path)
    os.truncate(folders[2] / "features-00002.bin", 100)
    with pytest.raises(
        FeatureError, match=rf"share 2/3\b.*{folders[2]}/features-00002\.bin .*--shard 2/3"
    ):
        merge(tmp_path)
    info = store_info(folders[0])
    assert (info.share, info.moved, info.num_done) == ("0/3", str(tmp_path), 3)
    assert store_cli.main(["info", str(folders[0])]) == 0
    assert f"moved to {tmp_path} " in capsys.readouterr().out
    assert store_cli.main(["verify", str(folders[0])]) == 2
    assert re.search(rf"share 0/3\b.*{tmp_path} ", capsys.readouterr().err)
    assert store_share.is_merged(tmp_path, Share(0, 3), manifest_of("float16"))
    assert not store_share.is_merged(tmp_path, Share(2, 3), manifest_of("float16"))
    write_share(tmp_path, Share(2, 3))
    for words in ({"resume": False}, {}):
        to = tmp_path if words else tmp_path / "elsewhere"
        match = rf"share 0/3\b.*{tmp_path}\b.*{to}\b.*\b2\b"
        with pytest.raises(FeatureError, match=match):
            merge(to, *folders, **words)
    assert merge(tmp_path) == 9
    assert stored(tmp_path) == undisturbed["float16"]


def test_killed_as_the_manifest_gets_its_name(tmp_path, undisturbed, monkeypatch):
    write_shares(tmp_path, "npy")
    replacing = os.replace

    def killed(source, target):
        if target == tmp_path / "features.json":
            raise KeyboardInterrupt
        replacing(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", killed)
        with pytest.raises(KeyboardInterrupt):
            merge(tmp_path)
    assert (tmp_path / "globalfeats.npy").exists()
    merge(tmp_path)
    assert stored(tmp_path) == undisturbed["npy"]
    assert not (tmp_path / "shards").exists()


# --- a real data set ------------------------------------------------------------------------------


@pytest.mark.slow
@needs_shared
@pytest.mark.timeout(3600)
def test_tower(real_network, tmp_path):
    tower = SHARED / "tower"
    config = replace(
        Config.load("performance"),
        resume_path=str(SHARED / "checkpoints" / "reference_WPCA"),
        num_pcs=128,
    )
    words = (config, tower / "query.txt", tower)
    extract(*words, tmp_path / "whole", device="cpu", progress=False)
    for i in range(3):
        extract(*words, tmp_path / "out", device="cpu", shard=(i, 3), progress=False)
    assert merge(tmp_path / "out") == 33
    assert stored(tmp_path / "out") == stored(tmp_path / "whole")
