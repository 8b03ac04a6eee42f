# SPDX-License-Identifier: MIT
"""``patchnetvlad-dataset``: data sets made of one's own images, and checks of data sets."""

from __future__ import annotations

import os
import re
import shlex
import shutil

import numpy as np
import pytest
from conftest import REPOSITORY, SHARED, needs_shared
from PIL import Image
from test_positions import metres, photo, write

from patchnetvlad.cli import dataset as cli
from patchnetvlad.cli import run as run_cli
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import ConfigError, GroundTruthError, ImageListError, OutputError
from patchnetvlad.own_data.check import check_dataset, weights_hints
from patchnetvlad.own_data.create import create_dataset
from patchnetvlad.own_data.summary import positive_statistics

TOWER = SHARED / "tower"
STEP = 10 / 111_320  # degrees of latitude in ten metres, roughly


def listed(folder, what):
    return list(ImageList.read(folder / f"{what}.txt").names)


def truth_of(folder):
    with np.load(folder / "ground_truth.npz", allow_pickle=False) as content:
        return {key: content[key] for key in content.files}


@pytest.fixture
def photos(tmp_path):
    """Eleven photographs, ten metres apart on a meridian, and one without a position."""
    for i in range(1, 12):
        photo(tmp_path / "photos" / f"IMG_{i}.jpg", 48 + i * STEP, 11.5, heading=0, colour=20 * i)
    photo(tmp_path / "photos" / "scan.jpg")
    return tmp_path


def utm_names(folder, places, zone=("32", "T"), heading=()):
    """Make files that are named by their places, and return the names."""
    names = []
    for i, (x, y) in enumerate(places):
        angle = heading[i] if len(heading) else ""
        names.append(f"@{x}@{y}@{zone[0]}@{zone[1]}@@@{i}@@{angle}@@@@@@.jpg")
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 12), (20 * i, 0, 0)).save(folder / names[-1])
    return names


class TestTower:
    @needs_shared
    def test_rebuilt_from_file_names_alone(self, tmp_path, capsys):
        words = ["--dataset_root_dir", TOWER, "--images", "images", "--positions", "frames"]
        words += ["--query_every", 5, "--query_start", 6, "--order", "plain"]
        out = tmp_path / "out"
        assert cli.main(["create", *map(str, words), "--output_dir", str(out)]) == 0
        for name in ("index.txt", "query.txt"):
            assert (out / name).read_bytes() == (TOWER / name).read_bytes()
        made, expected = truth_of(out), truth_of(TOWER)
        assert made.pop("unit") == "frames"  # which older files do not say
        assert sorted(made) == sorted(expected)
        for key, values in expected.items():
            assert made[key].dtype == values.dtype
            np.testing.assert_array_equal(made[key], values)
        shown = capsys.readouterr().out
        assert "154 index images, 33 queries" in shown
        assert "2 to 4 per query, median 4" in shown
        assert "warning" not in shown

    @needs_shared
    def test_from_its_lists(self, tmp_path):
        create_dataset(
            tmp_path,
            index=TOWER / "index.txt",
            queries=TOWER / "query.txt",
            root=TOWER,
            positions="frames",
            draw_map=False,
        )
        made, expected = truth_of(tmp_path), truth_of(TOWER)
        for key, values in expected.items():
            np.testing.assert_array_equal(made[key], values)


class TestSources:
    def test_photographs(self, photos):
        summary = create_dataset(photos / "out", images=photos / "photos", query_every=4)
        assert listed(photos / "out", "query") == [
            (photos / "photos" / f"IMG_{i}.jpg").as_posix() for i in (4, 8)
        ]
        names = [f"IMG_{i}.jpg" for i in (1, 2, 3, 5, 6, 7, 9, 10, 11)]  # 2 before 10
        assert [os.path.basename(n) for n in listed(photos / "out", "index")] == names
        made = truth_of(photos / "out")
        assert (made["utmQ"].dtype, made["utmQ"].shape) == (np.float64, (2, 2))
        assert (made["utmDb"].dtype, made["utmDb"].shape) == (np.float64, (9, 2))
        assert made["posDistThr"] == 25
        degrees = np.array([[48 + i * STEP, 11.5] for i in (4, 8)])
        distance = np.linalg.norm(made["utmQ"][1] - made["utmQ"][0])
        assert distance == pytest.approx(metres(degrees)[1], rel=1e-3)
        assert summary.source == "EXIF data"
        assert (summary.zone, summary.unit) == ("32N", "m")
        assert summary.without_position == ((photos / "photos/scan.jpg").as_posix(),)
        assert summary.statistics.per_query == (4, 4.0, 4)
        assert summary.statistics.num_pairs == 8
        assert summary.statistics.nearest[0] == pytest.approx(10, abs=0.05)
        with Image.open(photos / "out" / "map.png") as picture:
            assert min(picture.size) > 500
        assert not list((photos / "out").glob("*part*"))

    def test_names_are_relative_to_the_root(self, photos, monkeypatch):
        monkeypatch.chdir(photos)
        for i, (root, folder) in enumerate(
            (("", "photos"), (photos, "photos"), (photos, photos / "photos"), (".", "photos"))
        ):
            create_dataset(f"out{i}", images=folder, root=root, query_every=4, draw_map=False)
            assert listed(photos / f"out{i}", "query") == ["photos/IMG_4.jpg", "photos/IMG_8.jpg"]

    def test_utm_in_names(self, tmp_path):
        places = [(500000 + 10 * i, 5300000) for i in range(6)]
        names = utm_names(tmp_path / "all", places)
        summary = create_dataset(
            tmp_path / "out", images="all", root=tmp_path, query_pattern="@[03]@@", threshold=10
        )
        assert listed(tmp_path / "out", "query") == [f"all/{names[i]}" for i in (0, 3)]
        made = truth_of(tmp_path / "out")
        assert made["utmQ"].tolist() == [[500000, 5300000], [500030, 5300000]]
        assert summary.source == "UTM in file names"
        assert summary.zone == "32N"
        assert summary.statistics.num_pairs == 3

    def test_table_for_two_folders(self, tmp_path):
        for name in ("map/1.jpg", "map/2.jpg", "day/1.jpg"):
            write(tmp_path / name, "x")
        write(tmp_path / "p.csv", "image,x,y\nmap/1.jpg,0,0\nmap/2.jpg,50,0\nday/1.jpg,45,3\n")
        create_dataset(
            tmp_path / "out", index="map", queries="day", root=tmp_path, positions="p.csv"
        )
        made = truth_of(tmp_path / "out")
        assert made["utmDb"].tolist() == [[0, 0], [50, 0]]
        assert made["utmQ"].tolist() == [[45, 3]]

    def test_what_it_writes_it_reads(self, tmp_path):
        """positions.csv is a source of positions, and gives the same data set."""
        places = [(500000.1 + 7 * i, 5300000.3) for i in range(9)]
        utm_names(tmp_path / "a, b", places, heading=range(9))
        one, two = tmp_path / "one", tmp_path / "two"
        create_dataset(one, images="a, b", root=tmp_path, query_every=3, draw_map=False)
        create_dataset(
            two,
            index=one / "index.txt",
            queries=one / "query.txt",
            root=tmp_path,
            positions=one / "positions.csv",
            max_heading_difference=180,
            draw_map=False,
        )
        for name in ("index.txt", "query.txt", "positions.csv"):
            assert (one / name).read_bytes() == (two / name).read_bytes()
        for key, values in truth_of(one).items():
            np.testing.assert_array_equal(truth_of(two)[key], values)

    def test_positions_of_the_queries_from_another_source(self, tmp_path):
        utm_names(tmp_path / "map", [(691000 + i, 5334000) for i in range(3)])
        photo(tmp_path / "phone" / "1.jpg", 48.137154, 11.576124)
        summary = create_dataset(
            tmp_path / "out",
            index=tmp_path / "map",
            queries=tmp_path / "phone",
            positions="names",
            query_positions="exif",
        )
        assert summary.source == "UTM in file names (index), EXIF data (queries)"
        made = truth_of(tmp_path / "out")
        np.testing.assert_allclose(
            made["utmDb"], [[691000 + i, 5334000] for i in range(3)], atol=1e-3
        )
        assert np.linalg.norm(made["utmQ"][0] - made["utmDb"][0]) < 2000

    def test_track(self, tmp_path):
        gpx = "".join(
            f'<trkpt lat="{48 + 0.0001 * i}" lon="11"><time>2024-05-01T12:00:{2 * i:02}Z</time>'
            "</trkpt>"
            for i in range(20)
        )
        write(tmp_path / "t.gpx", f"<gpx>{gpx}</gpx>")
        for i in range(6):
            photo(tmp_path / "im" / f"{i}.jpg", time=f"2024:05:01 14:00:{5 * i + 1:02}")
        summary = create_dataset(
            tmp_path / "out",
            images=tmp_path / "im",
            query_every=3,
            positions=tmp_path / "t.gpx",
            time_offset=-7200,
        )
        degrees = np.array([[48 + 0.0001 * (5 * i + 1) / 2, 11] for i in (2, 5)])
        distance = np.linalg.norm(np.diff(truth_of(tmp_path / "out")["utmQ"], axis=0))
        assert distance == pytest.approx(metres(degrees)[1], rel=1e-3)
        assert any("taken for UTC: 6" in note for note in summary.notes)

    def test_poses(self, tmp_path):
        for i in range(12):
            write(tmp_path / "image_0" / f"{i:06}.png", "x")
        write(tmp_path / "00.txt", "".join(f"1 0 0 {i} 0 1 0 9 0 0 1 {2 * i}\n" for i in range(12)))
        create_dataset(
            tmp_path / "out", images="image_0", root=tmp_path, query_every=6, positions="00.txt"
        )
        assert truth_of(tmp_path / "out")["utmQ"].tolist() == [[5, 10], [11, 22]]
        with pytest.raises(
            GroundTruthError, match=r"00\.txt .*\b12 poses\b.*\b12 images\b.*query_positions"
        ):
            create_dataset(
                tmp_path / "out2",
                index=tmp_path / "out" / "index.txt",
                queries=tmp_path / "out" / "query.txt",
                root=tmp_path,
                positions="00.txt",
            )

    def test_aligned_traverses(self, tmp_path):
        for i in range(10):
            write(tmp_path / "summer" / f"{i}.jpg", "x")
            write(tmp_path / "winter" / f"w{i + 100}.jpg", "x")
        summary = create_dataset(
            tmp_path / "out",
            index="summer",
            queries="winter",
            root=tmp_path,
            positions="order",
            threshold=1,
        )
        truth = GroundTruth.load(tmp_path / "out" / "ground_truth.npz")
        assert [p.tolist() for p in truth.positives()[:2]] == [[0, 1], [0, 1, 2]]
        assert (summary.unit, summary.num_queries) == ("frames", 10)


class TestRules:
    def test_spacing(self, photos):
        summary = create_dataset(
            photos / "out", images="photos", root=photos, query_every=2, spacing=25
        )
        names = sorted(listed(photos / "out", "index") + listed(photos / "out", "query"))
        assert names == [f"photos/IMG_{i}.jpg" for i in (1, 10, 4, 7)]
        assert summary.num_thinned == 7

    def test_sequences_are_apart(self, tmp_path):
        for folder in ("a", "b"):
            utm_names(tmp_path / "all" / folder, [(10 * i, 0) for i in range(4)])
        create_dataset(tmp_path / "out", images="all", root=tmp_path, query_every=3, spacing=5)
        assert [name[:5] for name in listed(tmp_path / "out", "query")] == ["all/a", "all/b"]

    def test_heading(self, tmp_path):
        utm_names(tmp_path / "i", [(0, 0), (5, 0), (100, 0), (300, 0)], heading=[350, 180, 90, 90])
        places = [(0, 1), (100, 1), (200, 1), (300, 1)]
        names = utm_names(tmp_path / "q", places, heading=[5, 180, 0, ""])
        out = tmp_path / "out"
        summary = create_dataset(
            out, index="i", queries="q", root=tmp_path, max_heading_difference=40
        )
        assert summary.dropped_by_heading == (f"q/{names[1]}",)
        assert summary.without_positive == (f"q/{names[2]}",)  # without any, it stays
        assert (summary.num_facing_elsewhere, summary.num_without_heading) == (1, 1)
        assert listed(out, "query") == [f"q/{names[i]}" for i in (0, 2, 3)]
        shown = "\n".join(summary.lines())
        assert "1 of 3 pairs" in shown
        assert f": 1 (q/{names[1]})" in shown

    def test_heading_needs_headings(self, tmp_path):
        utm_names(tmp_path / "i", [(0, 0), (5, 0), (9, 0)])
        with pytest.raises(GroundTruthError, match=r"max_heading_difference.*queries"):
            create_dataset(
                tmp_path / "out", images=tmp_path / "i", query_every=3, max_heading_difference=40
            )

    def test_self_check(self, tmp_path):
        names = utm_names(tmp_path / "a", [(0, 0), (0, 0), (900, 0)])
        write(tmp_path / "i.txt", f"a/{names[0]}\na/{names[1]}\na/{names[0]}\n")
        write(tmp_path / "q.txt", f"a/{names[0]}\na/{names[2]}\n./a/{names[1]}\n")
        shutil.copy(tmp_path / "a" / names[0], tmp_path / "a" / names[2])
        summary = create_dataset(
            tmp_path / "out",
            index=tmp_path / "i.txt",
            queries=tmp_path / "q.txt",
            root=tmp_path,
            check_content=True,
        )
        assert summary.repeated == (f"a/{names[0]}",)
        assert summary.in_both == (f"a/{names[0]}", f"./a/{names[1]}")
        assert summary.same_place == 1
        assert summary.same_content == ((f"a/{names[0]}", f"a/{names[2]}"),)
        assert summary.without_positive == (f"a/{names[2]}",)
        shown = "\n".join(summary.lines())
        for words in (
            "named twice",
            "trivially right",
            "the same content",
            "without a right answer",
        ):
            assert words in shown

    def test_statistics(self):
        rng = np.random.default_rng(0)
        queries, index = rng.uniform(0, 100, (30, 2)), rng.uniform(0, 100, (50, 2))
        found = positive_statistics(GroundTruth(queries, index, 9.0))
        distances = np.linalg.norm(queries[:, None] - index[None], axis=2)
        near = distances.min(axis=1)
        counts = (distances <= 9).sum(axis=1)
        np.testing.assert_allclose(found.nearest, [near.min(), np.median(near), near.max()])
        assert found.per_query == (counts.min(), np.median(counts), counts.max())
        assert found.without == tuple(np.flatnonzero(counts == 0))
        assert found.without
        assert found.num_pairs == counts.sum()

    def test_a_map_in_the_folder_of_images_is_no_image(self, photos):
        for _ in range(2):
            summary = create_dataset(photos / "photos", images=photos / "photos", query_every=4)
            assert (summary.num_index, len(summary.without_position)) == (9, 1)
        assert (photos / "photos" / "map.png").is_file()


class TestWrongInputs:
    @pytest.mark.parametrize(
        ("options", "words"),
        [
            ({}, "give images.*index.*queries"),
            ({"index": "photos"}, "give images.*index.*queries"),
            ({"images": "photos", "index": "photos"}, "images.*index.*queries.*all"),
            ({"images": "photos"}, "query_every or query_pattern"),
            ({"images": "photos", "query_every": 1}, "query_every = 1 .*2"),
            (
                {"images": "photos", "query_pattern": "(", "query_every": None},
                r"query_pattern = '\('",
            ),
            (
                {"images": "photos", "query_pattern": "a", "query_start": 2},
                "query_start .*query_every",
            ),
            ({"images": "photos", "query_every": 3, "query_start": 0}, "query_start = 0"),
            ({"images": "photos", "query_every": 3, "threshold": -1.0}, "threshold = -1"),
            ({"images": "photos", "query_every": 3, "order": "random"}, "order = 'random'"),
            (
                {"images": "photos", "query_every": 3, "max_heading_difference": 200},
                "max_heading_difference = 200 .*0 to 180",
            ),
            (
                {"index": "photos", "queries": "photos", "query_every": 2},
                "query_every, query_start.* images",
            ),
            (
                {"images": "photos", "query_every": 3, "positions": "frames", "threshold": 1000},
                r"threshold = 1000\b.*\b1000\b",
            ),
        ],
    )
    def test_options(self, photos, options, words):
        with pytest.raises(ConfigError, match=words):
            create_dataset(photos / "out", root=photos, **options)
        assert not (photos / "out").exists()

    @pytest.mark.parametrize(
        ("options", "error", "words"),
        [
            ({"positions": "names"}, GroundTruthError, r"\b12 images\b.*photos/IMG_1\.jpg.*exif"),
            ({"positions": "absent.csv"}, GroundTruthError, r"absent\.csv; .*exif"),
            ({"query_every": 99}, ImageListError, r"no queries\b.*\b12 images"),
            (
                {"query_every": None, "query_pattern": "I"},
                ImageListError,
                r"no index images\b.*\b12 images",
            ),
            ({"images": "none"}, ImageListError, r"\bnone: "),
        ],
    )
    def test_content(self, photos, options, error, words):
        options = {"images": "photos", "query_every": 3, **options}
        with pytest.raises(error, match=words):
            create_dataset(photos / "out", root=photos, **options)
        assert not (photos / "out").exists()

    def test_no_image(self, tmp_path):
        write(tmp_path / "in" / "IMG_1.CR2", "x")
        with pytest.raises(ImageListError, match=rf"{tmp_path}/in .*1 \.cr2 .*JPEG"):
            create_dataset(tmp_path / "out", images=tmp_path / "in", query_every=2)

    def test_folder_outside_the_root(self, photos):
        (photos / "root").mkdir()
        with pytest.raises(ConfigError, match=f"{photos}/photos .*{photos}/root"):
            create_dataset(
                photos / "out", images=photos / "photos", root=photos / "root", query_every=3
            )

    def test_inputs_are_not_replaced(self, photos):
        create_dataset(photos / "out", images="photos", root=photos, query_every=4)
        before = (photos / "out" / "index.txt").read_bytes()
        with pytest.raises(OutputError, match=rf"{photos}/out/index\.txt "):
            create_dataset(
                photos / "out",
                index=photos / "out" / "index.txt",
                queries=photos / "out" / "query.txt",
                root=photos,
            )
        assert (photos / "out" / "index.txt").read_bytes() == before

    @pytest.mark.skipif(os.name == "nt", reason="needs any character in file names")
    def test_a_name_that_no_list_can_hold(self, photos):
        os.rename(photos / "photos/IMG_3.jpg", photos / "photos/IMG_3\n.jpg")
        with pytest.raises(ImageListError, match=r"'IMG_3\\n\.jpg'"):
            create_dataset(photos / "out", images="photos", root=photos, query_every=4)
        assert not (photos / "out").exists()

    def test_command(self, photos, capsys):
        words = ["create", "--images", str(photos / "photos"), "--output_dir", str(photos / "out")]
        assert cli.main([*words, "--query_every", "3", "--columns", "lat"]) == 2
        assert "--columns lat: write KEY=NAME" in capsys.readouterr().err
        assert cli.main(words) == 2
        assert "query_every or query_pattern" in capsys.readouterr().err


class TestCheck:
    @pytest.fixture
    def made(self, photos):
        create_dataset(photos / "out", images="photos", root=photos, query_every=4)
        return photos

    def check(self, made, **options):
        return check_dataset(
            made / "out" / "query.txt",
            made / "out" / "index.txt",
            root=made,
            **{"ground_truth": made / "out" / "ground_truth.npz", "progress": False, **options},
        )

    def test_sound(self, made, capsys):
        found = self.check(made)
        assert (found.sound, found.remarks) == (True, ())
        assert found.statistics.per_query == (4, 4.0, 4)
        assert found.facts[0] == f"queries: 2 ({made / 'out' / 'query.txt'})"
        words = ["--query_file_path", made / "out/query.txt", "--index_file_path"]
        words += [made / "out/index.txt", "--dataset_root_dir", made, "--ground_truth_path"]
        words += [made / "out/ground_truth.npz", "--full"]
        assert cli.main(["check", *map(str, words)]) == 0
        assert "positives: 4 to 4 per query" in capsys.readouterr().out

    def test_broken_images(self, made, capsys):
        (made / "photos/IMG_1.jpg").unlink()
        write(made / "photos/IMG_2.jpg", "no image")
        whole = (made / "photos/IMG_5.jpg").read_bytes()
        (made / "photos/IMG_5.jpg").write_bytes(whole[: len(whole) - 12])
        found = self.check(made)
        (problem,) = found.problems
        assert problem.startswith("2 of 9 index images ")
        assert re.search(r"IMG_1\.jpg .*\(index\.txt, line 1\)", problem)
        assert re.search(r"IMG_2\.jpg .*\(index\.txt, line 2\)", problem)
        assert self.check(made, full=True).problems[0].startswith("3 of 9")
        words = ["--query_file_path", made / "out/query.txt", "--index_file_path"]
        words += [made / "out/index.txt", "--dataset_root_dir", made]
        assert cli.main(["check", *map(str, words)]) == 1
        assert "Problems: 1" in capsys.readouterr().out

    def test_ground_truth_of_other_lists(self, made):
        truth = truth_of(made / "out")
        file = made / "other.npz"
        np.savez(file, utmQ=truth["utmQ"][:1], utmDb=truth["utmDb"], posDistThr=25)
        (problem,) = self.check(made, ground_truth=file).problems
        assert re.search(r"other\.npz: .*utmQ.*\b1 rows", problem)
        np.savez(file, utmQ=truth["utmDb"], utmDb=truth["utmQ"], posDistThr=25)
        assert "mixed up" in self.check(made, ground_truth=file).problems[0]
        assert "out/map.png " in self.check(made, ground_truth=made / "out/map.png").problems[0]

    def test_remarks(self, made):
        file = made / "out" / "index.txt"
        names = file.read_text().splitlines()
        file.write_text("\n".join([*names[:-2], names[0], "photos/IMG_4.jpg"]))
        found = self.check(made, threshold=1)
        assert found.sound
        shown = "\n".join(found.remarks)
        assert re.search(r"\b1 images more than once: photos/IMG_1\.jpg", shown)
        assert re.search(r"\b1 images .*query and index", shown)
        assert "no query" in shown
        found = self.check(made, threshold=10.5, ground_truth=self.moved(made))
        assert "1 of 2 queries" in "\n".join(found.remarks)

    def moved(self, made):
        truth = truth_of(made / "out")
        truth["utmQ"][1] += 1000
        np.savez(made / "moved.npz", **truth)
        return made / "moved.npz"

    def test_features(self, made):
        import torch

        from patchnetvlad.features.manifest import Manifest
        from patchnetvlad.features.open import open_writer
        from patchnetvlad.features.store.codec import encode_patches

        config = Config(
            num_pcs=4, patch_sizes=(2,), strides=(1,), patch_weights=(1.0,), image_size=(96, 128)
        )
        names = listed(made / "out", "index")

        def extract(folder, names, done):
            manifest = Manifest.of(config, names, "c" * 64)
            with open_writer(made / folder, names, manifest) as writer:
                for i in range(done):
                    row = np.ones(4, dtype=np.float32) / 2
                    writer.write(i, row, encode_patches([torch.ones(35, 4) / 2], "float16"))
                writer.commit()
                if done == len(names):
                    writer.finish()
            return made / folder

        found = self.check(made, index_features=extract("good", names, 9))
        assert (found.sound, found.remarks) == (True, ())
        assert any("features of index images: 9 of 9" in fact for fact in found.facts)
        found = self.check(made, index_features=extract("half", names, 3))
        assert found.sound
        assert "not finished" in found.remarks[0]
        found = self.check(made, index_features=extract("few", names[:4], 4))
        assert "features of 4 images" in found.problems[0]
        swapped = [names[1], names[0], *names[2:]]
        found = self.check(made, index_features=extract("swapped", swapped, 9))
        assert f"line 1: {names[1]}, not {names[0]}" in found.problems[0]
        found = self.check(made, query_features=made / "photos")
        assert f"{made}/photos" in found.problems[0]

    @pytest.mark.parametrize(
        ("weights", "names", "words"),
        [
            ("./pretrained_models/mapillary_WPCA", ["pitts30k_imageNames_index.txt"], "Mapillary"),
            ("/pitts/mapillary_WPCA512.pth.tar", ["a.txt", "Tokyo247"], "Tokyo 24/7"),
            ("pittsburgh_WPCA", ["mapillarysf_imageNames_query.txt"], "trained on Pittsburgh"),
            ("pretrained_models/imagenet_WPCA", ["index.txt"], "never trained"),
            ("pittsburgh_WPCA", ["pitts30k_imageNames_index.txt"], None),
            ("/mapillary/pittsburgh_WPCA", ["pitts30k_imageNames_index.txt"], None),
            ("mapillary_WPCA", ["nordland_imageNames_index.txt"], None),
            ("mapillary_WPCA", ["index.txt"], None),
        ],
    )
    def test_weights(self, weights, names, words):
        hints = weights_hints(weights, names)
        assert len(hints) == (words is not None)
        if words:
            assert words in hints[0]

    def test_weights_of_a_configuration(self, made):
        assert "never trained" in self.check(made, config="demo").remarks[0]
        assert self.check(made, config="performance").remarks == ()


def test_commands_in_the_documentation(capsys):
    text = (REPOSITORY / "docs" / "datasets.md").read_text(encoding="utf-8")
    commands = re.findall("^patchnetvlad-dataset (.*)$", text, re.MULTILINE)
    assert {cli.build_parser().parse_args(shlex.split(words)).job for words in commands} == {
        "create",
        "check",
    }
    for job in ("create", "official", "check"):
        with pytest.raises(SystemExit):
            cli.main([job, "--help"])
    run_cli.build_parser().print_help()
    known = set(re.findall(r"--\w+", capsys.readouterr().out))
    assert set(re.findall(r"`(--\w+)", text)) <= known
