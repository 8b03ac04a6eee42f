# SPDX-License-Identifier: MIT
"""Results in the formats of other programs, and the poses that some of them need."""

from __future__ import annotations

import csv
import logging
import re

import numpy as np
import pytest

from patchnetvlad.errors import ConfigError, GroundTruthError, ImageListError, OutputError
from patchnetvlad.evaluation.exports import (
    EXPORTS,
    candidate_distances,
    check_exports,
    export_path,
    write_cmu,
    write_csv,
    write_exports,
    write_hloc,
    write_msls,
    write_robotcar,
)
from patchnetvlad.evaluation.pairs import write_pairs, write_scored_pairs
from patchnetvlad.evaluation.poses import Pose, find_poses, read_reference_poses

QUERIES = ["q/b.jpg", "q/a.jpg"]
INDEX = ["db/0.jpg", "db/1.jpg", "db/2.jpg"]
PREDICTIONS = np.array([[2, 0], [1, 2]])
SCORES = np.array([[0.75, 0.1], [3.0, -2.5]])

HALF = 0.5**0.5
TURN = (HALF, 0.0, 0.0, HALF)
"""A quarter turn about z: x to y, y to -x."""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out.txt"


def only_file(path):
    assert [file.name for file in path.parent.iterdir()] == [path.name]
    return path.read_text(encoding="utf-8")


def test_kapture10(path):
    write_pairs(path, QUERIES, INDEX, PREDICTIONS)
    assert only_file(path) == (
        "# kapture format: 1.0\n# query_image, map_image\n"
        "q/b.jpg, db/2.jpg\nq/b.jpg, db/0.jpg\nq/a.jpg, db/1.jpg\nq/a.jpg, db/2.jpg\n"
    )


def test_kapture11(path):
    write_scored_pairs(path, QUERIES, INDEX, PREDICTIONS, SCORES.astype(np.float32))
    assert only_file(path) == (
        "# kapture format: 1.1\n# query_image, map_image, score\n"
        "q/b.jpg, db/2.jpg, 0.75\nq/b.jpg, db/0.jpg, 0.1\n"
        "q/a.jpg, db/1.jpg, 3.0\nq/a.jpg, db/2.jpg, -2.5\n"
    )


class TestKapturePackage:
    """What the package itself reads of our pairs."""

    names = (["q/ü 1.jpg", "q/a.jpg"], INDEX)

    @pytest.fixture
    def reader(self):
        return pytest.importorskip("kapture.io.csv", reason="the package kapture is absent")

    def test_table(self, path, reader):
        scores = np.random.default_rng(0).normal(size=(2, 2)) * [1e-9, 1e9]
        write_scored_pairs(path, *self.names, PREDICTIONS, scores)
        assert reader.get_version_from_csv_file(str(path)) == "1.1"
        with path.open(encoding="utf-8") as file:
            table = reader.table_from_file(file)
        expected = [
            [name, INDEX[i], repr(float(score))]
            for name, row, values in zip(self.names[0], PREDICTIONS, scores, strict=True)
            for i, score in zip(row, values, strict=True)
        ]
        assert table == expected

    def test_as_pairs_file_of_a_data_set(self, tmp_path, reader):
        """As its tools use it: to choose among the matches of a data set."""
        features = pytest.importorskip("kapture.io.features")
        pairs = tmp_path / "pairs.txt"
        write_scored_pairs(pairs, *self.names, PREDICTIONS, SCORES)
        ours = {
            (INDEX[i], q) for q, row in zip(self.names[0], PREDICTIONS, strict=True) for i in row
        }
        other = ("db/0.jpg", "q/a.jpg")
        assert len(ours) == 4
        assert other not in ours
        for pair in [*ours, other]:
            file = features.get_matches_fullpath(pair, "r2d2", str(tmp_path))
            features.image_matches_to_file(file, np.zeros((1, 3)))
        assert set(reader.matches_from_dir("r2d2", str(tmp_path))) == {*ours, other}
        found = reader.matches_from_dir("r2d2", str(tmp_path), matches_pairsfile_path=str(pairs))
        assert set(found) == ours


@pytest.mark.parametrize("name", ["a,b.jpg", "#1.jpg", "a\r.jpg", " a.jpg"])
def test_names_that_kapture_misreads(path, name):
    with pytest.raises(ImageListError, match=rf"{re.escape(repr(name))}.*kapture 1\.1"):
        write_scored_pairs(path, [name, "b.jpg"], INDEX, PREDICTIONS, SCORES)
    with pytest.raises(ImageListError, match=rf"{re.escape(repr(name))}.*kapture 1\.1"):
        check_exports(["kapture11"], QUERIES, [*INDEX, name])
    assert not path.exists()


def test_scores_that_do_not_fit(path, caplog):
    with pytest.raises(ValueError, match=r"scores.*\[2, 1\].*\[2, 2\]"):
        write_scored_pairs(path, QUERIES, INDEX, PREDICTIONS, SCORES[:, :1])
    with pytest.raises(ValueError, match=r"\b2 scores.*finite"):
        write_scored_pairs(path, QUERIES, INDEX, PREDICTIONS, [1, np.inf] * SCORES)
    with caplog.at_level(logging.INFO):
        write_scored_pairs(path, QUERIES, INDEX, PREDICTIONS, SCORES)
        assert not caplog.text
        write_scored_pairs(path, QUERIES, INDEX, PREDICTIONS, np.array([[1, 1], [1, 2]]))
    assert re.search(r"out\.txt: .*\b1 of 2\b", caplog.text)


def test_hloc(path):
    write_hloc(path, QUERIES, INDEX, PREDICTIONS)
    assert only_file(path) == (
        "q/b.jpg db/2.jpg\nq/b.jpg db/0.jpg\nq/a.jpg db/1.jpg\nq/a.jpg db/2.jpg\n"
    )


@pytest.mark.parametrize("name", ["a b.jpg", "a\u00a0b.jpg", "a\tb.jpg"])
def test_hloc_has_no_blanks_in_names(path, name):
    with pytest.raises(ImageListError, match=rf"{re.escape(repr(name))}.*hloc"):
        write_hloc(path, QUERIES, [name, *INDEX], PREDICTIONS)
    assert not path.exists()


class TestMsls:
    queries = ("val/cph/query/images/-A_1.jpg", "val/cph/query/images/b.jpg")
    index = ("val/cph/database/images/x.jpg", "val/cph/database/images/_y-.jpg", "z.jpg")

    def test_lines(self, path):
        write_msls(path, self.queries, self.index, PREDICTIONS)
        assert only_file(path) == "-A_1 z x\nb _y- z\n"

    def test_as_the_official_evaluation_reads_it(self, path):
        """By NumPy, as text; rows by key, of equal length."""
        rng = np.random.default_rng(0)
        index = [f"{i:022d}.jpg" for i in range(50)]
        predictions = np.stack([rng.permutation(50)[:20] for _ in range(2)])
        write_msls(path, self.queries, index, predictions)
        table = np.loadtxt(path, ndmin=2, dtype=str)
        assert table.shape == (2, 21)
        assert table[:, 0].tolist() == ["-A_1", "b"]
        np.testing.assert_array_equal(table[:, 1:].astype(int), predictions)
        write_msls(path, self.queries[:1], index, predictions[:1])
        assert np.loadtxt(path, ndmin=2, dtype=str).shape == (1, 21)

    @pytest.mark.parametrize("name", ["a b.jpg", "#a.jpg", "a,b.jpg", "", "a/ .jpg"])
    def test_keys(self, path, name):
        with pytest.raises(ImageListError, match=rf"{re.escape(repr(name))}.*Mapillary SLS"):
            write_msls(path, [self.queries[0], name], self.index, PREDICTIONS)
        with pytest.raises(ImageListError, match=rf"{re.escape(repr(name))}.*Mapillary SLS"):
            check_exports(["msls"], self.queries, [name])

    @pytest.mark.parametrize("names", [("sf/a.jpg", "cph/a.jpg"), ("a.jpg", "a.png")])
    def test_equal_keys(self, path, names):
        for lists in ((names, self.index), (self.queries, (*names, "c.jpg"))):
            with pytest.raises(ImageListError) as caught:
                write_msls(path, *lists, PREDICTIONS)
            assert f"{names[0]!r} and {names[1]!r}" in str(caught.value)
        assert not path.exists()

    def test_candidates_twice(self, path):
        with pytest.raises(ValueError, match=r"row 1 .*predictions"):
            write_msls(path, self.queries, self.index, np.array([[0, 1], [2, 2]]))


class TestCsv:
    def test_all_columns(self, path):
        queries = ['a "b", c.jpg', "ü\n.jpg"]
        write_csv(
            path, queries, INDEX, PREDICTIONS,
            scores=SCORES.astype(np.float32), distances=np.array([[1.5, np.nan], [0, 1e6]]),
            right=np.array([[True, False], [False, True]]), confidences=np.array([0.75, 0.5]),
        )  # fmt: skip
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.DictReader(file))
        columns = ["query", "rank", "index", "score", "distance", "right", "confidence"]
        assert list(rows[0]) == columns
        assert [tuple(row.values()) for row in rows] == [
            (queries[0], "1", "db/2.jpg", "0.75", "1.5", "1", "0.75"),
            (queries[0], "2", "db/0.jpg", "0.1", "", "0", ""),
            (queries[1], "1", "db/1.jpg", "3.0", "0.0", "0", "0.5"),
            (queries[1], "2", "db/2.jpg", "-2.5", "1000000.0", "1", ""),
        ]

    def test_without_scores(self, path):
        write_csv(path, QUERIES, INDEX, PREDICTIONS)
        lines = only_file(path).splitlines()
        assert lines[:2] == [
            "query,rank,index,score,distance,right,confidence",
            "q/b.jpg,1,db/2.jpg,,,,",
        ]
        assert len(lines) == 5

    def test_names_are_no_formulas(self, path):
        names = ["=1+1.jpg", "+a.jpg", "-b.jpg", "@c.jpg", "\tx.jpg", "plain/-d.jpg"]
        write_csv(path, names, names, np.arange(6)[:, None])
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file))
        expected = ["./=1+1.jpg", "./+a.jpg", "./-b.jpg", "./@c.jpg", "./\tx.jpg", "plain/-d.jpg"]
        assert [row["query"] for row in rows] == [row["index"] for row in rows] == expected

    def test_shapes(self, path):
        with pytest.raises(ValueError, match=r"right.*\[2\].*\[2, 2\]"):
            write_csv(path, QUERIES, INDEX, PREDICTIONS, right=np.array([True, False]))

    def test_distances(self):
        found = candidate_distances(
            np.array([[0, 0], [1e6, 0]]), np.array([[3, 4], [1e6, 7], [0, 0]]), PREDICTIONS
        )
        np.testing.assert_array_equal(found, [[0, 5], [7, 1e6]])


NVM = """NVM_V3

3
./overcast-reference/rear/1.png\t400 {q} 1 2 3 0 0
./overcast-reference/left/2.png 400 1 0 0 0 -1 0 0 0 0

"sub dir/3.png" 400 1 0 0 0 0 0 5 0 0

1
0 0 0 255 255 255 1 0 0 1 1
"""
COLMAP = """# Image list with two lines of data per image:
#   IMAGE_ID, QW, QX, QY, QZ, TX, TY, TZ, CAMERA_ID, NAME
# Number of images: 2
7 {q} 2 -1 -3 1 overcast-reference/rear/1.png
10.5 20.5 -1 1.5 2.5 33
8 1 0 0 0 1 0 0 3 overcast-reference/left/2.png

"""
TRAIN = """overcast-reference/rear/1.jpg 0 1 0 1 -1 0 0 2 0 0 1 3 0 0 0 1

overcast-reference/left/2.jpg 1 0 0 -1 0 1 0 0 0 0 1 0 0 0 0 1
"""
CMU = """img_00122_c0_1303398475046031us.jpg {q} 1 2 3
img_00123_c1_1303398475046032us.jpg 1 0 0 0 -1 0 0
"""
WRITTEN = " ".join(map(repr, TURN))


class TestPoses:
    """One camera at (1, 2, 3), whose x axis in the world is -y; one at (-1, 0, 0)."""

    @pytest.mark.parametrize(
        ("content", "names"),
        [
            (NVM, ["overcast-reference/rear/1", "overcast-reference/left/2", "sub dir/3"]),
            (COLMAP, ["overcast-reference/rear/1", "overcast-reference/left/2"]),
            (TRAIN, ["overcast-reference/rear/1", "overcast-reference/left/2"]),
            (CMU, ["img_00122_c0_1303398475046031us", "img_00123_c1_1303398475046032us"]),
        ],
        ids=["nvm", "colmap", "train", "cmu"],
    )
    @pytest.mark.parametrize("ends", ["\n", "\r\n"], ids=["unix", "windows"])
    def test_official_files(self, path, content, names, ends):
        text = content.format(q=WRITTEN).replace("\n", ends)
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        poses = read_reference_poses(path)
        assert list(poses) == names
        first, second = list(poses.values())[:2]
        np.testing.assert_allclose(first.rotation, TURN, atol=1e-15)
        # R c = (-2, 1, 3)
        np.testing.assert_allclose(first.translation, [2, -1, -3], atol=1e-14)
        assert second == Pose((1, 0, 0, 0), (1, 0, 0))

    def test_several_files(self, tmp_path):
        for name, content in (("a", TRAIN), ("b", CMU.format(q=WRITTEN)), ("c", CMU)):
            (tmp_path / name).write_text(content)
        assert len(read_reference_poses([tmp_path / "a", str(tmp_path / "b")])) == 4
        (tmp_path / "c").write_text("./overcast-reference/left/2.png 1 0 0 0 -1 0 1e-9\n")
        with pytest.raises(GroundTruthError, match=rf"{tmp_path}/c, line 1: .*/left/2\.png"):
            read_reference_poses([tmp_path / "a", tmp_path / "c"])

    def test_random_rotations(self, path):
        """Matrix to quaternion and back; the pose takes the centre to the origin."""
        rng = np.random.default_rng(0)
        for axis in [*np.eye(3), *rng.normal(size=(50, 3))]:
            axis = axis / np.linalg.norm(axis)
            centre = rng.normal(size=3) * 1000
            for angle in (0, 1e-9, np.pi / 2, np.pi - 1e-9, np.pi, rng.uniform(0, 2 * np.pi)):
                x, y, z = axis
                cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
                turn = np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross
                matrix = np.eye(4)
                matrix[:3] = np.column_stack([turn, centre])
                pose = Pose.from_camera_to_world(matrix)
                again = Pose.from_centre(pose.rotation, centre)
                np.testing.assert_allclose(again.translation, -turn.T @ centre, atol=1e-9)
                np.testing.assert_allclose(pose.translation, again.translation, atol=1e-9)
                expected = np.array([np.cos(angle / 2), *-np.sin(angle / 2) * axis])
                assert abs(expected @ pose.rotation) == pytest.approx(1, abs=1e-12)
                assert pose.rotation[0] >= 0

    def test_as_kapture_reads_robotcar(self, tmp_path):
        """Another program's reading of the same file; its poses are from world to camera."""
        pytest.importorskip("kapture", reason="the package kapture is absent")
        tool = pytest.importorskip("tools.kapture_import_RobotCar_Seasons")
        rng = np.random.default_rng(1)
        with (tmp_path / "robotcar_v2_train.txt").open("w") as file:
            for i in range(10):
                q = rng.normal(size=4)
                q /= np.linalg.norm(q)
                pose = Pose.from_translation(q.tolist(), [0, 0, 0])
                matrix = np.eye(4)
                matrix[:3, 3] = rng.normal(size=3)
                matrix[:3, :3] = np.linalg.qr(rng.normal(size=(3, 3)))[0]
                matrix[:3, 0] *= np.linalg.det(matrix[:3, :3])
                assert pose.rotation == pytest.approx(q)
                print(f"night/rear/{i}.jpg", *matrix.ravel(), file=file)
        ours = read_reference_poses(tmp_path / "robotcar_v2_train.txt")
        theirs = tool.read_robotcar_v2_train(str(tmp_path))
        assert len(ours) == len(theirs) == 10
        for name, pose in theirs.items():
            mine = ours[name.removesuffix(".jpg")]
            np.testing.assert_allclose(mine.translation, pose.t.ravel(), atol=1e-12)
            assert abs(np.dot(mine.rotation, pose.r_raw)) == pytest.approx(1, abs=1e-12)

    @pytest.mark.parametrize(
        ("content", "words"),
        [
            ("", "no image"),
            ("# nothing\n\n", "no image"),
            ("a.jpg 1 0 0 0 1 2\n", r"line 1: .*\b7\b.*\b8\b.*\b17\b"),
            ("a.jpg 1 0 0 0 1 2 3\nb.jpg 1 0 0 0 1 2 x\n", "line 2: .*'x'"),
            ("a.jpg 1 0 0 0 1 2 nan\n", "line 1: .*NaN"),
            ("a.jpg 1 1 0 0 1 2 3\n", r"line 1: .*quaternion.*\b1\.41421\b"),
            ("a.jpg 0 0 0 0 1 2 3\n", r"line 1: .*quaternion.*\b0\b"),
            ("a.jpg 1 0 0 1 0 2 0 2 0 0 1 3 0 0 0 1", "line 1: .*matrix"),
            ("a.jpg 1 0 0 1 0 1 0 2 0 0 -1 3 0 0 0 1", "line 1: .*matrix"),
            ("a.jpg 1 0 0 0 0 1 0 0 0 0 1 0 1 2 3 1", "line 1: .*last row"),
            ("a.jpg 1 0 0 inf 0 1 0 0 0 0 1 0 0 0 0 1", "line 1: .*NaN"),
            ("NVM_V3\n\nmany\n", "line 3: .*'many'"),
            ("NVM_V3\n\n2\na.jpg 1 1 0 0 0 1 2 3 0 0\n", "last camera"),
            ("NVM_V3\n\n1\na.jpg 1 1 0 0 0 1 2\n", r"line 4: .*\b8\b.*\b11\b"),
            ("1 1 0 0 0 1 2 3 1 a.jpg\n\n2 1 0 0 0 1\n", r"line 3: .*\b6\b.*\b10\b"),
        ],
    )
    def test_bad_files(self, path, content, words):
        path.write_text(content)
        with pytest.raises(GroundTruthError, match=words) as caught:
            read_reference_poses(path)
        assert words == "no image" or str(path) in str(caught.value)

    def test_unreadable(self, path):
        with pytest.raises(GroundTruthError, match=f"{path} .*: No such file"):
            read_reference_poses(path)
        with pytest.raises(GroundTruthError, match=f"{path.parent} "):
            read_reference_poses(path.parent)
        path.write_bytes(b"\xff\xfe\x00")
        with pytest.raises(GroundTruthError, match=f"{path} .*UTF-8"):
            read_reference_poses(path)

    def test_names(self):
        poses = {"rear/1": Pose((1, 0, 0, 0), (1, 0, 0)), "img": Pose((1, 0, 0, 0), (2, 0, 0))}
        names = ["rear/1.jpg", "/x/rear/1.png", ".\\x\\rear\\1.jpg", "left/1.jpg", "1.jpg",
                 "near/1.jpg", "x/img.jpg", "img/1.jpg", "", ".", "bear/1.jpg"]  # fmt: skip
        found = [pose and pose.translation[0] for pose in find_poses(names, poses)]
        assert found == [1, 1, 1, None, None, None, 2, None, None, None, None]


class TestSubmissions:
    POSES = {  # noqa: RUF012
        "db/0": Pose((1, 0, 0, 0), (0, 0, 0)),
        "db/1": Pose((1, 0, 0, 0), (1, 0.1, -3)),
        "db/2": Pose(TURN, (2, 0, 0)),
    }

    def test_robotcar(self, path):
        queries = ["images/night/rear/1418.jpg", "sun\\left\\1419.png"]
        write_robotcar(path, queries, INDEX, PREDICTIONS, poses=self.POSES)
        assert only_file(path) == (
            "rear/1418.jpg 0.7071067811865476 0.0 0.0 0.7071067811865476 2 0 0\n"
            "left/1419.jpg 1 0 0 0 1 0.1 -3\n"
        )

    def test_cmu(self, path):
        queries = ["slice2/query/img_1_c0_5us.jpg", "img_2_c0_6us.jpg"]
        write_cmu(path, queries, INDEX, PREDICTIONS, poses=self.POSES)
        lines = [line.split() for line in only_file(path).splitlines()]
        assert [line[0] for line in lines] == ["img_1_c0_5us.jpg", "img_2_c0_6us.jpg"]
        assert [[float(x) for x in line[1:]] for line in lines] == [
            [*TURN, 2, 0, 0],
            [1, 0, 0, 0, 1, 0.1, -3],
        ]

    def test_a_reference_as_query_gets_its_own_pose(self, tmp_path, path):
        """The check that the data sets advise."""
        (tmp_path / "all.nvm").write_text(NVM.format(q=WRITTEN))
        poses = read_reference_poses(tmp_path / "all.nvm")
        images = ["overcast-reference/rear/1.jpg"]
        write_robotcar(path, images, images, np.array([[0]]), poses=poses)
        name, *numbers = path.read_text().split()
        assert name == "rear/1.jpg"
        np.testing.assert_allclose(np.array(numbers, float), [*TURN, 2, -1, -3], atol=1e-14)

    def test_candidates_without_pose(self, path, caplog):
        poses = {name: pose for name, pose in self.POSES.items() if name != "db/2"}
        queries = ["rear/1.jpg", "rear/2.jpg"]
        write_robotcar(path, queries, INDEX, PREDICTIONS, poses=poses)
        assert re.search(r"out\.txt: .*\b1 of 2\b", caplog.text)
        assert [line.split()[5] for line in path.read_text().splitlines()] == ["0", "1"]
        path.unlink()
        with pytest.raises(GroundTruthError, match=r"\b1 queries\b.*rear/2\.jpg"):
            write_robotcar(path, queries, INDEX, PREDICTIONS, poses={"db/0": poses["db/0"]})
        assert not path.exists()

    @pytest.mark.parametrize("name", ["1418.jpg", "night/1418.jpg", "rear/x/1.jpg", "rear/1 8.jpg"])
    def test_names_that_are_not_of_robotcar(self, path, name):
        with pytest.raises(ImageListError, match=f"'{name}'.*RobotCar Seasons"):
            write_robotcar(path, ["rear/1.jpg", name], INDEX, PREDICTIONS, poses=self.POSES)

    @pytest.mark.parametrize("write", [write_robotcar, write_cmu])
    def test_queries_twice(self, path, write):
        queries = ["night/rear/1.jpg", "sun/rear/1.jpg"]
        with pytest.raises(ImageListError, match=r"'night/rear/1\.jpg'.*'sun/rear/1\.jpg'"):
            write(path, queries, INDEX, PREDICTIONS, poses=self.POSES)


class TestAll:
    QUERIES = ("night/rear/1.jpg", "night/rear/2.jpg")
    POSES = TestSubmissions.POSES

    def test_every_export(self, tmp_path):
        assert list(EXPORTS) == ["kapture10", "kapture11", "hloc", "msls", "robotcar", "cmu", "csv"]
        check_exports(list(EXPORTS), self.QUERIES, INDEX, self.POSES)
        files = write_exports(
            tmp_path, "X", [*EXPORTS, "hloc"], self.QUERIES, INDEX, PREDICTIONS,
            scores=SCORES, distances=SCORES, right=SCORES > 0, poses=self.POSES,
        )  # fmt: skip
        assert sorted(files) == sorted(tmp_path.iterdir())
        assert files == [export_path(tmp_path, "X", name) for name in EXPORTS]
        assert [file.name for file in files] == [
            "X_predictions.txt", "X_kapture11.txt", "X_hloc.txt", "X_msls.csv", "X_robotcar.txt",
            "X_cmu.txt", "X_candidates.csv",
        ]  # fmt: skip
        counts = [len(file.read_text().splitlines()) for file in files]
        assert counts == [6, 6, 4, 2, 2, 2, 5]

    def test_without_scores(self, tmp_path, caplog):
        names = ["kapture11", "csv"]
        with caplog.at_level(logging.INFO):
            files = write_exports(tmp_path, "X", names, self.QUERIES, INDEX, PREDICTIONS)
        assert [file.name for file in files] == ["X_candidates.csv"]
        assert re.search(r"\bX\b.*\bkapture11\b", caplog.text)

    def test_wrong_requests(self, tmp_path):
        for run in (
            check_exports,
            lambda *words: write_exports(tmp_path, "X", *words, PREDICTIONS),
        ):
            with pytest.raises(ConfigError, match=r"'hlok'.* kapture10, "):
                run(["hlok"], QUERIES, INDEX)
            with pytest.raises(ConfigError, match=r"\bcmu\b.*poses"):
                run(["cmu"], QUERIES, INDEX)
        with pytest.raises(GroundTruthError, match=r"'db/0\.jpg'.*'other/1'"):
            check_exports(["cmu"], QUERIES, INDEX, {"other/1": Pose(TURN, (0, 0, 0))})
        assert not list(tmp_path.iterdir())

    def test_some_poses_missing(self, caplog):
        check_exports(["cmu"], QUERIES, INDEX, {"db/0": Pose(TURN, (0, 0, 0))})
        assert "2 of 3 index images" in caplog.text

    @pytest.mark.parametrize("write", [write_hloc, write_msls, write_csv])
    def test_predictions_that_do_not_fit(self, path, write):
        for wrong in (PREDICTIONS[:1], PREDICTIONS[0], PREDICTIONS + 1, PREDICTIONS - 1):
            with pytest.raises(ValueError, match="predictions"):
                write(path, QUERIES, INDEX, wrong)
        assert not list(path.parent.iterdir())

    def test_folders_that_cannot_be_written(self, tmp_path):
        with pytest.raises(OutputError, match=rf"{tmp_path}/absent/X_hloc\.txt .*No such file"):
            write_exports(tmp_path / "absent", "X", ["hloc"], QUERIES, INDEX, PREDICTIONS)
        (tmp_path / "X_hloc.txt").mkdir()
        with pytest.raises(OutputError, match=rf"{tmp_path}/X_hloc\.txt "):
            write_exports(tmp_path, "X", ["hloc"], QUERIES, INDEX, PREDICTIONS)
        assert [file.name for file in tmp_path.iterdir()] == ["X_hloc.txt"]
