# SPDX-License-Identifier: MIT
"""Features as .npy files: layout, resuming, and what is noticed about others' and broken ones."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from dataclasses import replace

import numpy as np
import pytest
import torch
from feature_cases import different

from patchnetvlad.config import Config
from patchnetvlad.engines.journal import open_journal
from patchnetvlad.errors import FeatureError, OtherFeaturesError, OutputError
from patchnetvlad.features import npy_writer
from patchnetvlad.features.inspect import verify_features
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.names import rows_to_do
from patchnetvlad.features.npy_files import NpyReader, patch_file
from patchnetvlad.features.npy_writer import NpyWriter
from patchnetvlad.features.open import open_writer

CONFIG = Config(
    num_pcs=4,
    patch_sizes=(2, 5),
    strides=(1, 2),
    patch_weights=(0.5, 0.5),
    local_features="npy",
)
NAMES = [f"seq/{i}.jpg" for i in range(5)]
COUNTS = {2: 6, 5: 3}  # patches an image of either size
RNG = np.random.default_rng(0)
ROWS = RNG.standard_normal((5, 4)).astype(np.float32)
PATCHES = [[RNG.standard_normal((n, 4)).astype(np.float32) for n in COUNTS.values()] for _ in NAMES]


def writer(folder, config=CONFIG, names=NAMES, checkpoint="c", naming="stem", **keywords):
    manifest = Manifest.of(config, names, checkpoint, naming=naming)
    folder.mkdir(parents=True, exist_ok=True)  # as open_writer does
    return NpyWriter(folder, names, manifest, **keywords)


def write(folder, images=range(5), **keywords):
    """Write some images' features, all unless said, and finish if they are all."""
    with contextlib.closing(writer(folder, **keywords)) as writes:
        for i in images:
            writes.write(i, ROWS[i], PATCHES[i])
        if writes.done.all():
            writes.finish()
    return writes


def check(folder, config=CONFIG, names=NAMES):
    reads = NpyReader(folder, names, config)
    np.testing.assert_array_equal(reads.global_descriptors, ROWS)
    for i, expected in enumerate(PATCHES):
        patches = reads.patches(i)
        assert len(patches) == len(expected)
        for ours, theirs in zip(patches, expected, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def npy(array):
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=True)
    return stream.getvalue()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "some" / "features"


class TestWriting:
    def test_round_trip_and_layout(self, folder):
        writes = write(folder, [3, 0, 4, 1, 2])
        assert writes.done.all()
        check(folder)
        files = [f"patchfeats_psize{s}_{i}.npy" for s in COUNTS for i in range(5)]
        assert {f.name for f in folder.iterdir()} == {*files, "globalfeats.npy", "features.json"}
        for size, count in COUNTS.items():
            stored = np.load(folder / f"patchfeats_psize{size}_1.npy")
            assert (stored.shape, stored.dtype) == ((4, count), np.float32)
            assert stored.flags.c_contiguous
        manifest = json.loads((folder / "features.json").read_text())
        assert manifest["patch_sizes"] == [2, 5]
        assert manifest["strides"] == [1, 2]
        assert (manifest["num_images"], manifest["image_size"]) == (5, [480, 640])

    def test_half_precision_is_stored_as_single(self, folder):
        writes = writer(folder, names=["a.jpg"])
        writes.write(0, ROWS[0].astype(np.float16), [p.astype(np.float16) for p in PATCHES[0]])
        writes.finish()
        for file in folder.glob("*.npy"):
            assert np.load(file).dtype == np.float32

    def test_without_patches(self, folder):
        config = replace(CONFIG, pooling="netvlad")
        names = ["a/1.jpg", "b/1.jpg"]
        writes = writer(folder, config, names)
        for i in range(2):
            writes.write(i, ROWS[i], [])
        writes.finish()
        reads = NpyReader(folder, names, config)
        np.testing.assert_array_equal(reads.global_descriptors, ROWS[:2])

    def test_changed_global_descriptors_are_noticed(self, folder):
        write(folder)
        file, note = folder / "globalfeats.npy", folder / "features.json"
        rows = np.load(file)
        np.save(file, rows[[1, 0, 2, 3, 4]])
        with pytest.raises(FeatureError, match=r"globalfeats\.npy.*--no-resume.*features\.json"):
            NpyReader(folder, NAMES, CONFIG)
        damages = verify_features(folder, progress=False).damages
        assert file in {damage.file for damage in damages}
        content = json.loads(note.read_text())
        note.write_text(json.dumps({**content, "global_crc32": 0}))  # as of older versions
        assert NpyReader(folder, NAMES, CONFIG).global_descriptors[0].tolist() == rows[1].tolist()
        np.save(file, rows)
        note.write_text(json.dumps(content))
        check(folder)
        damages = verify_features(folder, progress=False).damages
        assert file not in {damage.file for damage in damages}

    def test_not_finished(self, folder):
        with pytest.raises(FeatureError, match=rf"{folder}: 3\b"):
            write(folder, [0, 1]).finish()
        with pytest.raises(FeatureError, match=rf"{folder}/new: 5\b"):
            writer(folder / "new").finish()


def test_scores_of_features_that_were_rewritten_are_not_resumed(folder, tmp_path):
    """A journal is of features by the time of their file."""
    write(folder)
    files = []
    for moment in (1, 1, 2):
        os.utime(folder / "globalfeats.npy", ns=(moment, moment))
        reader = NpyReader(folder, NAMES, CONFIG)
        candidates = np.zeros((5, 2), dtype=np.int64)
        both = (reader, reader), (NAMES, NAMES)
        journal = open_journal(tmp_path, CONFIG, candidates, *both, torch.device("cpu"), True)
        journal.close()
        files.append(journal.path)
    assert files[0] == files[1] != files[2]


class TestNames:
    @pytest.mark.parametrize(
        ("name", "stem", "path"),
        [
            ("a.jpg", "a", "a.jpg"),
            ("a", "a", "a"),
            ("a/b/c/d/e.tar.png", "e.tar", "a/b/c/d/e.tar.png"),
            ("./a/b.jpg", "b", "a/b.jpg"),
            ("a/./b.jpg", "b", "a/b.jpg"),
            ("../../a/b.jpg", "b", "__/__/a/b.jpg"),
            ("/data/a/b.jpg", "b", "data/a/b.jpg"),
            ("straße/道 1.jpg", "道 1", "straße/道 1.jpg"),
            ("@0588@37.75@.jpg", "@0588@37.75@", "@0588@37.75@.jpg"),
            ("道" * 77 + ".jpg", "道" * 77, "道" * 77 + ".jpg"),
        ],
        ids=lambda text: text[:20],
    )
    def test_files(self, tmp_path, name, stem, path):
        for naming, tail in (("stem", stem), ("path", path)):
            file = patch_file(tmp_path, "patchfeats", 2, name, naming)
            assert file == tmp_path / f"patchfeats_psize2_{tail}.npy"
            assert ".." not in file.parts
            if len(os.fsencode(file.name)) > 255:
                continue
            folder = tmp_path / naming
            write(folder, [0], names=[name], naming=naming)
            reads = NpyReader(folder, [name], CONFIG)
            np.testing.assert_array_equal(reads.patches(0)[1], PATCHES[0][1])

    @pytest.mark.parametrize(
        ("naming", "names", "words"),
        [
            (
                "stem",
                ["a/1.jpg", "2.jpg", "b/1.png"],
                ["a/1.jpg and b/1.png", "--feature_names path"],
            ),
            ("path", ["/a/1.jpg", "a/1.jpg"], ["/a/1.jpg and a/1.jpg", "rename"]),
            ("path", ["../1.jpg", "__/1.jpg"], ["../1.jpg and __/1.jpg", "rename"]),
        ],
    )
    def test_collisions_are_refused_at_once(self, folder, naming, names, words):
        with pytest.raises(FeatureError) as caught:
            writer(folder, names=names, naming=naming)
        assert all(word in str(caught.value) for word in words), caught.value
        assert list(folder.iterdir()) == []

    @pytest.mark.parametrize("naming", ["stem", "path"])
    def test_one_image_twice_is_no_collision(self, folder, naming):
        names = ["a/1.jpg", "2.jpg", "./a/1.jpg", "a/1.jpg", "3.jpg"]
        write(folder, names=names, naming=naming)
        reads = NpyReader(folder, names, CONFIG)
        for i in (0, 2, 3):
            np.testing.assert_array_equal(reads.patches(i)[0], PATCHES[3][0])

    @pytest.mark.parametrize("naming", ["stem", "path"])
    def test_one_image_twice_is_written_at_once(self, folder, naming):
        names = ["a/1.jpg", "2.jpg", "b/../a/1.jpg", "a//1.jpg"]
        write(folder, [1, 0], names=names, naming=naming)
        reads = NpyReader(folder, names, CONFIG)
        np.testing.assert_array_equal(reads.global_descriptors, ROWS[[0, 1, 0, 0]])
        for i in (0, 2, 3):
            np.testing.assert_array_equal(reads.patches(i)[1], PATCHES[0][1])

    def test_unknown_naming(self):
        with pytest.raises(FeatureError, match="feature_names = 'stme'"):
            Manifest.of(CONFIG, NAMES, "c", naming="stme")

    def test_paths_keep_images_of_one_stem_apart(self, folder):
        names = ["a/1.jpg", "b/1.jpg", "b/1.png", "../1.jpg", "1"]
        write(folder, names=names, naming="path")
        check(folder, names=names)


DIFFERENT = {
    **different(CONFIG, NAMES),
    "sizes": ({"config": replace(CONFIG, patch_sizes=(2, 4))}, "patch_sizes: [2, 5] -> [2, 4]"),
    "naming": ({"naming": "path"}, "naming: stem -> path"),
}


class TestResuming:
    def test_goes_on(self, folder):
        write(folder, [4, 1])
        old = {file.name: file.stat().st_mtime_ns for file in folder.glob("patchfeats*")}
        assert len(old) == 4
        writes = writer(folder)
        assert writes.done.tolist() == [False, True, False, False, True]
        for i in (0, 2, 3):
            writes.write(i, ROWS[i], PATCHES[i])
        writes.finish()
        check(folder)
        assert {name: (folder / name).stat().st_mtime_ns for name in old} == old

    @pytest.mark.parametrize("kind", DIFFERENT)
    def test_other_features_are_not_taken_over(self, folder, kind):
        write(folder, [4, 1])
        assert not writer(folder, **DIFFERENT[kind][0]).done.any()

    @pytest.mark.parametrize("finished", [True, False])
    @pytest.mark.parametrize("kind", DIFFERENT)
    def test_other_features_are_refused(self, folder, kind, finished):
        write(folder, range(5) if finished else [0, 1])
        before = {file: file.read_bytes() for file in folder.iterdir()}
        keywords, words = DIFFERENT[kind]
        new = writer(folder, **keywords)
        with (
            pytest.raises(OtherFeaturesError) as caught,
            open_writer(folder, new.names, new.manifest),
        ):
            pass
        text = str(caught.value)
        assert all(word in text for word in (str(folder), words, "--no-resume")), text
        assert {file: file.read_bytes() for file in before} == before
        with open_writer(folder, new.names, new.manifest, resume=False) as writes:
            assert not writes.done.any()
            assert not finished or (folder / "globalfeats.npy").exists()  # nothing is lost yet
            writes.write(0, ROWS[0], PATCHES[0][: len(writes.manifest.patch_sizes)])
        assert not (folder / "globalfeats.npy").exists()
        assert not (folder / "features.json").exists()
        with open_writer(folder, new.names, new.manifest) as writes:
            assert writes.done.tolist() == [True] + [False] * 4

    def test_images_of_another_folder_are_other_images(self, folder):
        write(folder)
        manifest = Manifest.of(CONFIG, NAMES, "c", root="/elsewhere")
        assert not NpyWriter(folder, NAMES, manifest).done.any()

    def test_an_image_is_done_when_all_its_rows_are(self):
        """A killed run may have written the first of them alone."""
        names = ["a.jpg", "b.jpg", "./a.jpg"]
        assert rows_to_do(names, np.array([True, True, False])) == [0]
        assert rows_to_do(names, np.array([True, False, True])) == [1]

    def test_images_newer_than_their_features_are_done_again(self, folder, tmp_path):
        write(folder)
        paths = [tmp_path / f"{i}.jpg" for i in range(5)]
        for i, path in enumerate(paths):
            path.touch()
            os.utime(path, (1, 1) if i != 2 else None)
        for size in COUNTS:
            os.utime(folder / f"patchfeats_psize{size}_2.npy", (2, 2))
        done = writer(folder, image_paths=paths).done
        assert done.tolist() == [True, True, False, True, True]

    def test_truncated_patches_are_done_again(self, folder):
        write(folder)
        file = folder / "patchfeats_psize5_1.npy"
        file.write_bytes(file.read_bytes()[:-4])
        assert writer(folder).done.tolist() == [True, False, True, True, True]

    def test_patches_without_their_row_do_not_count(self, folder):
        write(folder, [0])
        for size, patch in zip(COUNTS, PATCHES[1], strict=True):
            np.save(folder / f"patchfeats_psize{size}_1.npy", patch.T)
        assert writer(folder).done.tolist() == [True, False, False, False, False]

    def test_rows_without_their_patches_do_not_count(self, folder):
        write(folder, [0, 1, 2])
        (folder / "patchfeats_psize5_1.npy").unlink()
        assert writer(folder).done.tolist() == [True, False, True, False, False]

    @pytest.mark.parametrize(
        "damage",
        [
            lambda file: file.unlink(),
            lambda file: file.write_bytes(b""),
            lambda file: file.write_bytes(b"junk" * 50),
            lambda file: file.write_bytes(file.read_bytes()[:-16]),
            lambda file: file.write_bytes(file.read_bytes()[:140]),
            lambda file: file.write_bytes(npy(ROWS[0])),
            lambda file: file.write_bytes(npy(np.float32(1))),
            lambda file: file.write_bytes(npy(ROWS[:4])),
            lambda file: file.write_bytes(npy(np.array([None] * 5))),
        ],
        ids=["absent", "empty", "junk", "cut", "cut-short", "1-d", "0-d", "rows", "objects"],
    )
    def test_damaged_rows(self, folder, damage):
        write(folder, [0, 1])
        damage(folder / "globalfeats.npy.part")
        assert not writer(folder).done.any()
        write(folder)
        check(folder)

    @pytest.mark.parametrize(
        "changes",
        [
            {"num_images": -1}, {"num_pcs": 2**70}, {"image_size": [96]}, {"image_size": [-1, 9]},
            {"strides": [1]}, {"patch_sizes": [2, 2]}, {"patch_sizes": [0, 5]},
            {"naming": "x" * 9999},
        ],
    )  # fmt: skip
    def test_impossible_manifest(self, folder, changes):
        write(folder, range(5))
        file = folder / "features.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
        with pytest.raises(FeatureError, match=r"features\.json") as caught:
            writer(folder)
        assert len(str(caught.value)) < 1000

    @pytest.mark.parametrize("text", ["", "junk", "[]", "{}", '{"images": 1}', "\xff"])
    @pytest.mark.parametrize("finished", [True, False])
    def test_damaged_manifest(self, folder, text, finished):
        write(folder, range(5) if finished else [0, 1])
        file = folder / ("features.json" if finished else "features.json.part")
        assert file.is_file()
        file.write_bytes(text.encode("latin-1"))
        with pytest.raises(FeatureError, match=f"{file} .*--no-resume"):
            writer(folder)
        assert not write(folder, resume=False, images=[]).done.any()
        write(folder, resume=False)
        check(folder)

    def test_nothing_is_lost_between_the_renames(self, folder):
        write(folder)
        (folder / "features.json").rename(folder / "features.json.part")
        writes = writer(folder)
        assert writes.done.all()
        writes.finish()
        check(folder)
        assert NpyReader(folder, NAMES, CONFIG).manifest == writes.manifest

    def test_rows_of_another_width_do_not_count(self, folder):
        write(folder, [0, 1])
        (folder / "globalfeats.npy.part").write_bytes(npy(ROWS[:, :3]))
        writes = writer(folder)
        assert writes.done.sum() == 2  # the width of what is to come is not known yet
        writes.write(0, ROWS[0], PATCHES[0])
        assert writes.done.tolist() == [True] + [False] * 4
        write(folder)
        check(folder)

    def test_finished_features_are_left_alone(self, folder):
        write(folder)
        before = {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.iterdir()}
        writes = writer(folder)
        assert writes.done.all()
        writes.finish()
        assert {f: (f.stat().st_mtime_ns, f.read_bytes()) for f in folder.iterdir()} == before

    def test_only_deleted_files_are_computed_again(self, folder):
        write(folder)
        (folder / "patchfeats_psize2_3.npy").unlink()
        writes = writer(folder)
        assert writes.done.tolist() == [True, True, True, False, True]
        with pytest.raises(FeatureError, match=rf"{folder}: 1\b"):
            writes.finish()
        again = writer(folder)  # and interrupted once more
        assert again.done.tolist() == [True, True, True, False, True]
        again.write(3, ROWS[3], PATCHES[3])
        again.finish()
        check(folder)

    def test_damaged_rows_of_finished_features(self, folder):
        write(folder)
        rows = ROWS.copy()
        rows[2, 1] = np.nan
        np.save(folder / "globalfeats.npy", rows)
        assert writer(folder).done.tolist() == [True, True, False, True, True]
        write(folder, [2])
        check(folder)
        (folder / "globalfeats.npy").write_bytes((folder / "globalfeats.npy").read_bytes()[:-4])
        assert not writer(folder).done.any()

    def test_features_of_the_research_code_are_not_replaced(self, folder):
        folder.mkdir(parents=True)
        np.save(folder / "globalfeats.npy", ROWS)
        assert not writer(folder).done.any()
        manifest = Manifest.of(CONFIG, NAMES, "c")
        with (
            pytest.raises(OtherFeaturesError, match=f"{folder} .*--no-resume"),
            open_writer(folder, NAMES, manifest),
        ):
            pass
        with open_writer(folder, NAMES, manifest, resume=False):
            np.testing.assert_array_equal(np.load(folder / "globalfeats.npy"), ROWS)


class TestFullDisk:
    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
            (OSError("19200 requested and 992 written"), "19200 requested and 992 written"),
        ],
    )
    @pytest.mark.parametrize("after", [0, 1, 2, 3, 7])
    def test_rows_before_it_are_kept(self, folder, monkeypatch, error, words, after):
        """A run writes two patch files, once the table of rows, then two files an image."""
        save, saved = np.save, []

        def full(stream, values, **keywords):
            if len(saved) == after:
                stream.write(b"half of it")
                raise error
            saved.append(values.shape)
            save(stream, values, **keywords)

        monkeypatch.setattr(npy_writer.np, "save", full)
        with pytest.raises(FeatureError, match=f"{folder}: {words}"):
            write(folder)
        monkeypatch.undo()
        # The temporary files are gone; the image that failed and those after it are not done.
        whole = {"globalfeats.npy.part", "features.json.part"}
        assert {file.name for file in folder.glob("*.part")} <= whole
        assert [file.name for file in folder.iterdir() if file.name.startswith(".")] == []
        done = {0: 0, 1: 0, 2: 0, 3: 1, 7: 3}[after]
        writes = writer(folder)
        assert writes.done.tolist() == [i < done for i in range(5)]
        for i in range(done, 5):
            writes.write(i, ROWS[i], PATCHES[i])
        writes.finish()
        check(folder)

    def test_no_folder_can_be_made(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        for path in (tmp_path / "file", tmp_path / "file" / "features"):
            with (
                pytest.raises(OutputError, match=f"{path} "),
                open_writer(path, NAMES, Manifest.of(CONFIG, NAMES, "c")),
            ):
                pass

    def test_rows_that_cannot_be_written(self, folder, monkeypatch):
        def full(descriptor, array):
            raise OSError(errno.ENOSPC, "No space left on device")

        write(folder, [0])
        monkeypatch.setattr(npy_writer, "write_all", full)
        with pytest.raises(FeatureError, match=f"{folder}: No space left on device"):
            write(folder, [1])
        monkeypatch.undo()
        assert writer(folder).done.tolist() == [True] + [False] * 4


class TestReading:
    def test_no_folder(self, folder):
        with pytest.raises(
            FeatureError, match=f"{folder}: .*feature_extract .*--output_features_dir"
        ):
            NpyReader(folder, NAMES, CONFIG)

    def test_interrupted(self, folder):
        write(folder, [0])
        with pytest.raises(FeatureError, match=f"{folder}: .*feature_extract again"):
            NpyReader(folder, NAMES, CONFIG)

    @pytest.mark.parametrize(
        ("names", "settings", "words"),
        [
            ([*NAMES[:4], "x.jpg"], {}, ["image list"]),
            (NAMES[::-1], {}, ["image list"]),
            (NAMES[:4], {}, ["5 rows", "4 images"]),
            (NAMES, {"num_pcs": 512}, ["num_pcs = 4", "mine.ini has 512"]),
            (NAMES, {"patch_sizes": (2, 8)}, ["size 8 and stride 2", "2 (stride 1), 5 (stride 2)"]),
            (NAMES, {"strides": (1, 1)}, ["size 5 and stride 1"]),
            (NAMES, {"match_image_size": (240, 320)}, ["[480, 640]", "[240, 320]", "mine.ini"]),
            (NAMES, {"match_image_size": (0, 0)}, ["[480, 640]", "[0, 0]"]),
        ],
    )
    def test_misfits(self, folder, names, settings, words):
        write(folder)
        with pytest.raises(FeatureError) as caught:
            NpyReader(folder, names, replace(CONFIG, source="mine.ini", **settings))
        assert all(word in str(caught.value) for word in [str(folder), *words]), caught.value

    @pytest.mark.parametrize(
        ("settings", "words"),
        [
            ({"pooling": "max"}, "pooling = patchnetvlad"),
            ({"pooling": "netvlad", "match_image_size": (240, 320)}, "[480, 640]"),
        ],
    )
    def test_misfits_without_patches(self, folder, settings, words):
        write(folder)
        with pytest.raises(FeatureError) as caught:
            NpyReader(folder, NAMES, replace(CONFIG, **settings))
        assert words in str(caught.value)

    def test_the_same_paths_under_other_names(self, tmp_path):
        folder = tmp_path / "features"
        write(folder)
        names = [str(tmp_path / name) for name in NAMES]
        with pytest.raises(FeatureError, match=f"{folder} .*image list"):
            NpyReader(folder, names, CONFIG)
        manifest = Manifest.of(CONFIG, NAMES, "c", root=tmp_path)
        (folder / "features.json").write_text(json.dumps(manifest.__dict__))
        NpyReader(folder, names, CONFIG)
        NpyReader(folder, NAMES, CONFIG, "/moved")

    @pytest.mark.parametrize(
        "settings",
        [
            {"patch_sizes": (5,), "strides": (2,)},
            {"pooling": "netvlad"},
            {"matcher": "spatialApproximator", "threads": 4},
        ],
    )
    def test_what_does_not_matter(self, folder, settings):
        write(folder)
        config = replace(CONFIG, **settings)
        reads = NpyReader(folder, NAMES, config)
        np.testing.assert_array_equal(reads.global_descriptors, ROWS)
        if config.uses_patches:
            sizes = [CONFIG.patch_sizes.index(size) for size in config.patch_sizes]
            for ours, s in zip(reads.patches(3), sizes, strict=True):
                np.testing.assert_array_equal(ours, PATCHES[3][s])

    def test_patches_of_a_global_extraction(self, folder):
        config = replace(CONFIG, pooling="netvlad")
        writes = writer(folder, config, ["a.jpg"])
        writes.write(0, ROWS[0], [])
        writes.finish()
        with pytest.raises(FeatureError, match=rf"{folder} .*size 2\b.*stride 1\b"):
            NpyReader(folder, ["a.jpg"], CONFIG)

    @pytest.mark.parametrize(
        ("array", "words"),
        [
            (np.where(np.arange(5)[:, None] == 3, np.nan, ROWS), "row 3 (seq/3.jpg)"),
            (np.where(np.arange(5)[:, None] == 0, np.inf, ROWS), "row 0 (seq/0.jpg)"),
            (ROWS[0], "matrix"),
            (np.zeros((5, 4), dtype=int), "matrix"),
            (np.full((5, 4), None), "damaged"),
        ],
    )
    def test_bad_rows(self, folder, array, words):
        write(folder)
        np.save(folder / "globalfeats.npy", array, allow_pickle=True)
        with pytest.raises(FeatureError) as caught:
            NpyReader(folder, NAMES, CONFIG)
        assert words in str(caught.value)
        assert str(folder / "globalfeats.npy") in str(caught.value)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            (None, "feature_extract"),
            (b"", "damaged"),
            (b"text\n", "damaged"),
            (b"PK\x03\x04", "damaged"),
            (b"\x93NUMPY\x01\x00\x09\x00{'descr'(", "damaged"),
            ("cut", "damaged"),
            ("objects", "damaged"),
            ("cube", "matrix"),
        ],
    )
    def test_bad_patch_files(self, folder, content, words):
        write(folder)
        reads = NpyReader(folder, NAMES, CONFIG)
        file = folder / "patchfeats_psize5_2.npy"
        if content is None:
            file.unlink()
        elif isinstance(content, bytes):
            file.write_bytes(content)
        elif content == "cut":
            file.write_bytes(file.read_bytes()[:-1])
        else:
            array = np.zeros((2, 2, 2)) if content == "cube" else np.array([[None]])
            np.save(file, array, allow_pickle=True)
        reads.patches(1)
        with pytest.raises(FeatureError, match=words) as caught:
            reads.patches(2)
        assert str(file) in str(caught.value)

    @pytest.mark.parametrize("text", ["", "junk", "[]", "{}", "\xff"])
    def test_bad_manifest(self, folder, text):
        write(folder)
        (folder / "features.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(FeatureError, match=rf"{folder}/features\.json .*--no-resume"):
            NpyReader(folder, NAMES, CONFIG)

    @pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
    @pytest.mark.parametrize("order", ["C", "F"])
    def test_directories_of_the_research_code(self, folder, dtype, order):
        folder.mkdir(parents=True)
        np.save(folder / "globalfeats.npy", ROWS.astype(dtype))
        for i, patches in enumerate(PATCHES):
            for size, patch in zip(COUNTS, patches, strict=True):
                stored = np.asarray(patch.T.astype(dtype), order=order)
                np.save(folder / f"patchfeats_psize{size}_{i}.npy", stored)
        reads = NpyReader(folder, NAMES, CONFIG)
        assert reads.manifest is None
        assert reads.global_descriptors.dtype == np.float32
        np.testing.assert_array_equal(reads.global_descriptors, ROWS.astype(dtype))
        for ours, theirs in zip(reads.patches(4), PATCHES[4], strict=True):
            assert ours.dtype == torch.float32
            np.testing.assert_array_equal(ours, theirs.astype(dtype).astype(np.float32))
