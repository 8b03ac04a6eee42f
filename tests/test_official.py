# SPDX-License-Identifier: MIT
"""Readers of official files; the tests write such files with known content."""

from __future__ import annotations

import csv
import random
import re
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from scipy.io import savemat

from patchnetvlad.cli import dataset
from patchnetvlad.datasets import benchmarks
from patchnetvlad.datasets.benchmarks import Benchmark, Group
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import GroundTruthError, ImageListError, OutputError, PatchNetVLADError
from patchnetvlad.own_data import matfile
from patchnetvlad.own_data.matfile import Cells, read_variable
from patchnetvlad.own_data.official import OfficialSet, read_msls, read_pittsburgh, read_tokyo247


def message_of(call, *words: object, error: type[Exception] = GroundTruthError, **more) -> str:
    with pytest.raises(error) as caught:
        call(*words, **more)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


# Structures of NetVLAD's data release ----------------------------------------------------------

INDEX = ["000/000001_pitch1_yaw1.jpg", "000/000001_pitch1_yaw2.jpg", "001/001002_pitch2_yaw3.jpg"]
QUERIES = ["000/000546_pitch1_yaw1.jpg", "002/002001_pitch1_yaw12.jpg"]
UTM_INDEX = np.array([[584825.96, 4476945.61], [584825.96, 4476945.61], [585000.5, 4477000.25]])
UTM_QUERIES = np.array([[584835.96, 4476945.61], [1.5, 2.5]])


def cell(names):
    """A cell array, as MATLAB saves one."""
    array = np.empty((len(names), 1), dtype=object)
    array[:, 0] = names
    return array


def pittsburgh_fields():
    return {
        "whichSet": "test",
        "dbImageFns": cell(INDEX),
        "utmDb": UTM_INDEX.T,
        "qImageFns": cell(QUERIES),
        "utmQ": UTM_QUERIES.T,
        "numImages": 3.0,
        "numQueries": 2.0,
        "posDistThr": 25.0,
        "posDistSqThr": 625.0,
        "nonTrivPosDistSqThr": 100.0,
    }


@pytest.fixture
def saved(tmp_path):
    def save(name: str = "pitts30k_test.mat", compressed: bool = True, **changes: object) -> Path:
        fields = {**pittsburgh_fields(), **changes}
        path = tmp_path / name
        kept = {key: value for key, value in fields.items() if value is not None}
        savemat(path, {"dbStruct": kept}, do_compression=compressed)
        return path

    return save


class TestPittsburgh:
    def test_known_answers(self, saved):
        path = saved()
        found = read_pittsburgh(str(path))
        assert found.source == path
        assert found.index_names == tuple(INDEX)
        assert found.query_names == tuple(f"queries_real/{name}" for name in QUERIES)
        np.testing.assert_array_equal(found.truth.utm_index, UTM_INDEX)
        np.testing.assert_array_equal(found.truth.utm_queries, UTM_QUERIES)
        assert found.truth.threshold == 25
        assert [rows.tolist() for rows in found.truth.positives()] == [[0, 1], []]

    def test_folders(self, saved):
        found = read_pittsburgh(saved(), index_folder="images/", query_folder="queries")
        assert found.index_names[0] == f"images/{INDEX[0]}"
        assert found.query_names[0] == f"queries/{QUERIES[0]}"

    @pytest.mark.parametrize(
        "changes",
        [
            {"numImages": None, "numQueries": None, "whichSet": None},
            {"posDistThr": np.uint8(25)},
            {"utmDb": UTM_INDEX},
            {"dbImageFns": cell(INDEX).T},
            {
                "qImageFns": None,
                "qImage": cell(QUERIES),
                "dbImageFns": None,
                "dbImage": cell(INDEX),
            },
            {"dbImageFns": cell([name.replace("/", "\\") for name in INDEX])},
        ],
        ids=["no counts", "integer", "transposed", "row", "short field names", "backslashes"],
    )
    def test_of_clear_meaning(self, saved, changes):
        found = read_pittsburgh(saved(**changes))
        assert found.index_names == tuple(INDEX)
        np.testing.assert_array_equal(found.truth.utm_index, UTM_INDEX)
        assert found.truth.threshold == 25

    def test_two_by_two_is_columns(self, saved):
        found = read_pittsburgh(saved(utmQ=np.array([[1.0, 2.0], [3.0, 4.0]])))
        np.testing.assert_array_equal(found.truth.utm_queries, [[1, 3], [2, 4]])

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"dbImageFns": None}, r"dbStruct .*'dbImageFns'.*whichSet, utmDb"),
            ({"utmQ": None}, "dbStruct .*'utmQ'"),
            ({"posDistThr": None}, "dbStruct .*'posDistThr'"),
            ({"dbImageFns": "one.jpg"}, "dbImageFns .*cell array"),
            ({"dbImageFns": np.zeros((3, 2))}, "dbImageFns .*cell array"),
            ({"qImageFns": np.empty((0, 0), object)}, "qImageFns .*cell array"),
            ({"qImageFns": cell(["a.jpg", 7.0])}, r"qImageFns, row 1\b"),
            ({"qImageFns": cell(["", "a.jpg"])}, r"qImageFns, row 0\b"),
            ({"qImageFns": cell(["a.jpg", ".."])}, r"qImageFns, row 1\b.*'\.\.'"),
            ({"qImageFns": cell(["a.jpg", "b\nc"])}, r"qImageFns, row 1\b"),
            ({"qImageFns": np.array([["a", "b"], ["c", "d"]], object)}, "qImageFns .*one column"),
            ({"utmQ": UTM_QUERIES[:1].T}, r"utmQ .*\[2, 2\]"),
            ({"utmDb": np.zeros((3, 3))}, r"utmDb .*\[2, 3\]"),
            ({"utmDb": "far"}, "utmDb .*numbers"),
            ({"utmDb": UTM_INDEX.T * 1j}, "utmDb .*numbers"),
            ({"utmDb": np.where(np.eye(2, 3), np.nan, 1)}, r"utmDb .*NaN.*\b2 images"),
            ({"posDistThr": -1.0}, "posDistThr .*-1"),
            ({"posDistThr": np.nan}, "posDistThr .*number"),
            ({"posDistThr": np.array([25.0, 30.0])}, "posDistThr .*number"),
            ({"numImages": 4.0}, r"numImages .*\b4\b.*\b3\b"),
            ({"numQueries": 1.0}, r"numQueries .*\b1\b.*\b2\b"),
        ],
    )
    def test_wrong_fields(self, saved, changes, words):
        path = saved(**changes)
        message = message_of(read_pittsburgh, path)
        assert message.startswith(f"{path}")
        assert re.search(words, message)

    def test_other_files(self, tmp_path):
        path = tmp_path / "a.mat"
        assert f"{path} " in message_of(read_pittsburgh, path)
        assert f"{tmp_path} " in message_of(read_pittsburgh, tmp_path)
        savemat(path, {"other": 1.0})
        assert re.search(f"{path} .*'dbStruct'.*other", message_of(read_pittsburgh, path))
        savemat(path, {"dbStruct": 1.0})
        assert re.search(f"{path}: 'dbStruct' .*structure", message_of(read_pittsburgh, path))
        path.write_bytes(b"")
        assert re.search(f"{path} .*save -v7", message_of(read_pittsburgh, path))
        path.write_bytes(b"\x89PNG" * 100)
        assert re.search(f"{path} .*save -v7", message_of(read_pittsburgh, path))

    def test_matlab_73(self, tmp_path):
        path = tmp_path / "a.mat"
        header = b"MATLAB 7.3 MAT-file".ljust(124) + b"\x00\x02IM"
        path.write_bytes(header.ljust(600, b"\0"))
        assert re.search(rf"{path} .*\b7\.3\b.*save -v7", message_of(read_pittsburgh, path))

    @pytest.mark.parametrize("compressed", [True, False])
    @pytest.mark.parametrize(
        "count", [4, pytest.param(200, marks=pytest.mark.slow)], ids=["few", "many"]
    )
    def test_cut_off_and_damaged(self, saved, compressed, count):
        path = saved(compressed=compressed)
        whole = path.read_bytes()
        for length in range(0, len(whole) - 1, 8 * len(whole) // count):
            path.write_bytes(whole[:length])
            assert str(path) in message_of(read_pittsburgh, path)
        chance = random.Random(0)
        for _ in range(count):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 4)):
                damaged[chance.randrange(len(damaged))] = chance.randrange(256)
            path.write_bytes(damaged)
            try:
                found = read_pittsburgh(path)
            except GroundTruthError as error:
                assert str(path) in str(error)  # noqa: PT017
            else:
                assert len(found.index_names) == len(found.truth.utm_index)


def matlab_file(order: str, *variables: bytes) -> bytes:
    """The bytes of a file of version 5, in either byte order."""
    mark = struct.pack(f"{order}HH", 0x0100, 0x4D49)
    return b"MATLAB 5.0 MAT-file".ljust(124) + mark + b"".join(variables)


def element(order: str, kind: int, data: bytes) -> bytes:
    if len(data) <= 4 and kind != 14:
        return struct.pack(f"{order}I", len(data) << 16 | kind) + data.ljust(4, b"\0")
    return struct.pack(f"{order}II", kind, len(data)) + data + b"\0" * (-len(data) % 8)


def array(order: str, kind: int, shape: tuple[int, ...], content: bytes, name: str = "") -> bytes:
    return element(
        order,
        14,
        element(order, 6, struct.pack(f"{order}II", kind, 0))
        + element(order, 5, struct.pack(f"{order}{len(shape)}i", *shape))
        + element(order, 1, name.encode())
        + content,
    )


class TestMatlab:
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_as_matlab_itself_saves(self, tmp_path, order):
        """Text as 16-bit characters; numbers in the smallest type that holds them."""

        def text(value):
            data = value.encode("utf-16-le" if order == "<" else "utf-16-be")
            return array(order, 4, (1, len(value)), element(order, 4, data))

        def whole(values, shape):
            return array(order, 6, shape, element(order, 2, bytes(values)))

        fields = {
            "dbImageFns": array(order, 1, (2, 1), text("000/a.jpg") + text("000/ü.jpg")),
            "utmDb": whole([1, 2, 3, 4], (2, 2)),
            "qImageFns": array(order, 1, (1, 1), text("q/b.jpg")),
            "utmQ": array(order, 6, (2, 1), element(order, 9, struct.pack(f"{order}2d", 0.5, 2))),
            "posDistThr": whole([25], (1, 1)),
            "cp": element(order, 14, b""),
        }
        names = b"".join(name.encode().ljust(32, b"\0") for name in fields)
        content = element(order, 5, struct.pack(f"{order}i", 32)) + element(order, 1, names)
        other = array(order, 6, (1, 1), element(order, 2, b"\7"), "other")
        record = array(order, 2, (1, 1), content + b"".join(fields.values()), "dbStruct")
        path = tmp_path / "a.mat"
        path.write_bytes(matlab_file(order, other, record))
        found = read_pittsburgh(path, query_folder="")
        assert found.index_names == ("000/a.jpg", "000/ü.jpg")
        assert found.query_names == ("q/b.jpg",)
        np.testing.assert_array_equal(found.truth.utm_index, [[1, 2], [3, 4]])
        np.testing.assert_array_equal(found.truth.utm_queries, [[0.5, 2]])
        assert found.truth.threshold == 25

    @pytest.mark.parametrize(
        "value",
        [
            np.arange(24.0).reshape(2, 3, 4),
            np.array([[1, -2]], np.int8),
            np.array([[1, 2**63]], np.uint64),
            np.array([[1.5], [np.nan]], np.float32),
            np.array([[True, False]]),
            np.empty((0, 3)),
        ],
        ids=["3-d", "int8", "uint64", "float32", "logical", "empty"],
    )
    def test_numbers(self, tmp_path, value):
        path = tmp_path / "a.mat"
        savemat(path, {"first": "text", "value": value})
        np.testing.assert_array_equal(read_variable(path, "value"), value)
        assert read_variable(path, "first") == "text"

    @pytest.mark.parametrize(
        "value",
        [
            1 + 2j,
            np.array(["two", "row"]),
            scipy.sparse.csc_array(np.eye(3)),
            np.zeros((1, 2), [("a", "f8")]),
        ],
        ids=["complex", "rows of text", "sparse", "structures"],
    )
    def test_other_kinds_are_passed_over(self, tmp_path, value):
        path = tmp_path / "a.mat"
        savemat(path, {"value": value, "next": 1.0})
        assert read_variable(path, "value") is None
        assert read_variable(path, "next") == 1

    def test_cells_and_structures(self, tmp_path):
        path = tmp_path / "a.mat"
        savemat(path, {"value": {"a": {"b": cell(["x", {"c": "y"}])}}})
        value = read_variable(path, "value")
        assert value == {"a": {"b": Cells((2, 1), ["x", {"c": "y"}])}}

    def test_nested_without_end(self, tmp_path):
        path = tmp_path / "a.mat"
        value = "x"
        for _ in range(30):
            value = cell([value])
        savemat(path, {"value": value})
        assert re.search(f"{path} .*nested", message_of(read_variable, path, "value"))

    def test_far_too_many_cells_are_not_waited_for(self, tmp_path):
        path = tmp_path / "a.mat"
        path.write_bytes(matlab_file("<", array("<", 1, (2**31 - 1, 2**31 - 1), b"", "value")))
        assert re.search(f"{path} .*save -v7", message_of(read_variable, path, "value"))

    @pytest.mark.parametrize(("place", "byte"), [(248, 194), (248, 22), (312, 216), (312, 82)])
    def test_bytes_that_crash_scipy(self, tmp_path, place, byte):
        """They end the process that reads with SIGSEGV, in SciPy 1.17 at least."""
        path = tmp_path / "a.mat"
        savemat(path, {"value": {"a": 1.0, "b": "text"}})
        content = bytearray(path.read_bytes())
        content[place] = byte
        path.write_bytes(content)
        assert re.search(f"{path} .*save -v7", message_of(read_variable, path, "value"))

    @pytest.mark.parametrize(
        ("script", "words"),
        [
            ("kill -SEGV $$", "SIGSEGV"),
            ("kill -KILL $$", "SIGKILL"),
            ("echo trouble >&2; exit 7", "trouble"),
            ("exit 7", r"\b7\b"),
            ("exit 0", ""),
            ("echo rubbish", ""),
            ("exec sleep 60", r"\b1 s\b"),
        ],
    )
    def test_a_process_that_fails(self, tmp_path, monkeypatch, script, words):
        path = tmp_path / "a.mat"
        savemat(path, {"value": 1.0})
        python = tmp_path / "python"
        python.write_text(f"#!/bin/sh\n{script}\n")
        python.chmod(0o700)
        monkeypatch.setattr(sys, "executable", str(python))
        monkeypatch.setattr(matfile, "SECONDS", 1)
        message = message_of(read_variable, path, "value")
        assert re.match(f"{path} .*{words}.*save -v7", message, re.DOTALL)

    def test_version_4(self, tmp_path):
        path = tmp_path / "a.mat"
        savemat(path, {"value": np.zeros((9, 9))}, format="4")
        assert re.search(f"{path} .*version 5", message_of(read_variable, path, "value"))


class TestTokyo:
    def fields(self):
        """Two panoramas; the fields in another order and with time stamps beside them."""
        panoramas = ["03814/381418.231_3946450.428/A", "03829/382929.796_3947059.973/B"]
        index = [f"{name}_012_{30 * i:03}.jpg" for name in panoramas for i in range(12)]
        utm = np.repeat([[381418.23, 3946450.43], [382929.8, 3947059.97]], 12, axis=0)
        return {
            "whichSet": "test",
            "dbImageFns": cell(index),
            "utmDb": utm.T,
            "dbTimeStamp": np.full((1, 24), 201305.0),
            "qImageFns": cell(["00010.jpg"]),
            "utmQ": np.array([[381420.0], [3946450.0]]),
            "qTimeStamp": np.full((1, 1), 201409.0),
            "numImages": 24.0,
            "numQueries": 1.0,
            "posDistThr": 25.0,
            "posDistSqThr": 625.0,
            "nonTrivPosDistSqThr": 100.0,
        }

    def test_known_answers(self, tmp_path):
        path = tmp_path / "tokyo247.mat"
        savemat(path, {"dbStruct": self.fields()})
        found = read_tokyo247(path)
        assert found.query_names == ("247query_v3/00010.jpg",)
        assert found.index_names[12] == "03829/382929.796_3947059.973/B_012_000.png"
        assert found.truth.positives()[0].tolist() == list(range(12))
        as_written = read_tokyo247(path, index_suffix=None, query_folder="query")
        assert as_written.index_names[1] == "03814/381418.231_3946450.428/A_012_030.jpg"
        assert as_written.query_names == ("query/00010.jpg",)

    def test_what_is_written_passes_the_protocol(self, tmp_path):
        path = tmp_path / "tokyo247.mat"
        savemat(path, {"dbStruct": self.fields()})
        queries, index, truth = read_tokyo247(path).write(tmp_path / "tokyo")
        protocol = Benchmark("tokyo-small", "", num_queries=1, num_index=24, cutouts=12)
        protocol.check(ImageList.read(queries), ImageList.read(index), GroundTruth.load(truth))


# Writing, and the order of other lists ---------------------------------------------------------


class TestWrite:
    def test_read_back(self, saved, tmp_path):
        found = read_pittsburgh(saved())
        folder = tmp_path / "new" / "pitts"
        paths = found.write(folder)
        assert [path.name for path in paths] == ["query.txt", "index.txt", "ground_truth.npz"]
        assert sorted(folder.iterdir()) == sorted(paths)
        assert ImageList.read(paths[0]).names == found.query_names
        assert ImageList.read(paths[1]).names == found.index_names
        truth = GroundTruth.load(paths[2])
        np.testing.assert_array_equal(truth.utm_queries, UTM_QUERIES)
        np.testing.assert_array_equal(truth.utm_index, UTM_INDEX)
        assert truth.threshold == 25

    def test_cannot_be_written(self, saved, tmp_path):
        found = read_pittsburgh(saved())
        (tmp_path / "ground_truth.npz").mkdir()
        (tmp_path / "ground_truth.npz" / "x").touch()
        message = message_of(found.write, tmp_path, error=OutputError)
        assert f"{tmp_path}/ground_truth.npz " in message

    def test_names_that_do_not_fit_a_list(self, saved, tmp_path):
        found = read_pittsburgh(saved(), query_folder=" blank")
        message = message_of(found.write, tmp_path, error=ImageListError)
        assert re.search(f"' blank/{QUERIES[0]}' .*{tmp_path}/query.txt", message)


class TestTruthFor:
    @pytest.fixture
    def found(self, saved):
        return read_pittsburgh(saved())

    def test_the_order_of_the_research_lists(self, found):
        queries = [f"./Pittsburgh250k/queries_real/{name}" for name in reversed(QUERIES)]
        index = [f"./Pittsburgh250k/{INDEX[i]}" for i in (2, 0)]
        truth = found.truth_for(queries, index)
        np.testing.assert_array_equal(truth.utm_queries, UTM_QUERIES[::-1])
        np.testing.assert_array_equal(truth.utm_index, UTM_INDEX[[2, 0]])
        assert truth.threshold == 25

    def test_other_suffixes_and_separators(self, found):
        names = [f"D:\\pitts\\{name}".replace("/", "\\").replace(".jpg", ".png") for name in INDEX]
        truth = found.truth_for([], names)
        np.testing.assert_array_equal(truth.utm_index, UTM_INDEX)

    @pytest.mark.parametrize(
        "name",
        ["000001_pitch1_yaw1.jpg", "000/000002_pitch1_yaw1.jpg", "1/000001_pitch1_yaw1.jpg", "."],
    )
    def test_unknown_names(self, found, name):
        message = message_of(found.truth_for, [], [name])
        assert re.search(rf"{found.source} .* {re.escape(name)};", message)

    def test_one_image_twice(self, found):
        message = message_of(found.truth_for, [], [f"a/{INDEX[0]}", f"b/{INDEX[0]}"])
        assert re.search(f"b/{INDEX[0]} and a/{INDEX[0]} .* {INDEX[0]} .*{found.source}", message)

    def test_two_official_images_of_one_name(self, found):
        doubled = OfficialSet(
            found.source, found.query_names, (INDEX[0],) * 3, found.truth, found.left_out
        )
        message = message_of(doubled.truth_for, [], INDEX)
        assert re.search(f"{found.source} .* {INDEX[0]}", message)


# Mapillary Street-level Sequences --------------------------------------------------------------

SUBTASKS = ("all", "s2w", "w2s", "o2n", "n2o", "d2n", "n2d")


def put_csv(path: Path, header: str, rows: list[list[object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["", *header.split(",")])
        writer.writerows([number, *row] for number, row in enumerate(rows))


def put_side(root: Path, city: str, side: str, rows: list[tuple[str, float, bool, bool]]) -> None:
    """Write the four files of a folder; rows of key, easting, whether it counts, panorama."""
    folder = root / "train_val" / city / side
    put_csv(
        folder / "postprocessed.csv",
        "key,easting,northing,unique_cluster,control_panel,night,view_direction",
        [[key, east, 6_170_000.0, 7, False, False, "Forward"] for key, east, _, _ in rows],
    )
    put_csv(
        folder / "raw.csv",
        "key,lon,lat,ca,captured_at,pano",
        [[key, 12.5, 55.6, 90.0, "2018-05-03", pano] for key, _, _, pano in rows],
    )
    put_csv(
        folder / "subtask_index.csv",
        f"key,{','.join(SUBTASKS)}",
        [[key, counts, key == "q2", *[False] * 5] for key, _, counts, _ in rows],
    )
    put_csv(
        folder / "seq_info.csv",
        "key,sequence_key,frame_number",
        [[key, "s", number] for number, (key, *_) in enumerate(rows)],
    )


@pytest.fixture
def msls(tmp_path):
    """Two cities of 3 + 1 queries and 2 + 1 database images that count."""
    root = tmp_path / "msls"
    put_side(
        root,
        "cph",
        "query",
        [
            ("q0", 100.0, True, False),
            ("q1", 100.0, True, True),  # panorama
            ("q2", 225.0, True, False),  # 25 m from d2
            ("q3", 225.1, True, False),  # too far from all
            ("q4", 100.0, False, False),  # not in the subtask
            ("q5", 190.0, True, False),
        ],
    )
    put_side(
        root,
        "cph",
        "database",
        [
            ("d0", 100.0, True, False),
            ("d1", 225.1, True, True),  # panorama
            ("d2", 200.0, True, False),
        ],
    )
    put_side(root, "sf", "query", [("a-_0", 5.0, True, False)])
    put_side(root, "sf", "database", [("b0", 6.0, True, False)])
    return root


class TestMsls:
    def test_known_answers(self, msls):
        found = read_msls(str(msls))
        assert found.query_names == (
            *(f"train_val/cph/query/images/{key}.jpg" for key in ("q0", "q2", "q5")),
            "train_val/sf/query/images/a-_0.jpg",
        )
        assert found.index_names == (
            "train_val/cph/database/images/d0.jpg",
            "train_val/cph/database/images/d2.jpg",
            "train_val/sf/database/images/b0.jpg",
        )
        np.testing.assert_array_equal(found.truth.utm_queries[:, 0], [100, 225, 190, 5])
        np.testing.assert_array_equal(found.truth.utm_index[:, 0], [100, 200, 6])
        assert found.truth.threshold == 25
        assert [rows.tolist() for rows in found.truth.positives()] == [[0], [1], [1], [2]]
        assert found.left_out == {
            "panoramas": 2,
            "not in subtask all": 1,
            "queries without a positive": 1,
        }

    def test_other_rules(self, msls):
        assert len(read_msls(msls, keep_panoramas=True).query_names) == 6
        assert len(read_msls(msls, keep_unanswerable=True).query_names) == 5
        assert len(read_msls(msls, ["cph"], threshold=26).query_names) == 4
        assert len(read_msls(msls, ["sf"]).query_names) == 1

    def test_what_is_written_passes_the_protocol(self, msls, tmp_path):
        queries, index, truth = read_msls(msls).write(tmp_path / "out")
        protocol = Benchmark(
            "msls-small",
            "",
            num_queries=4,
            num_index=3,
            tolerance=25.0,
            group_folder="cph|sf",
            groups_needed=(Group("cph", 3, 2), Group("sf", 1, 1)),
        )
        protocol.check(ImageList.read(queries), ImageList.read(index), GroundTruth.load(truth))

    def test_in_the_order_of_other_lists(self, msls):
        found = read_msls(msls)
        queries = [f"./Mapillary_Street_Level_Sequences/{n}" for n in reversed(found.query_names)]
        truth = found.truth_for(queries, found.index_names)
        np.testing.assert_array_equal(truth.utm_queries, found.truth.utm_queries[::-1])

    def test_rows_in_another_order_are_joined_by_key(self, msls):
        whole = read_msls(msls)
        for name in ("raw.csv", "subtask_index.csv"):
            path = msls / "train_val" / "cph" / "query" / name
            first, *others = path.read_text().splitlines()
            path.write_text("\n".join([first, *reversed(others)]))
        again = read_msls(msls)
        assert again.query_names == whole.query_names
        assert again.left_out == whole.left_out

    def test_byte_order_mark_line_ends_and_blank_lines(self, msls):
        path = msls / "train_val" / "sf" / "query" / "raw.csv"
        text = path.read_text().replace("\n", "\r\n") + "\r\n\r\n"
        path.write_bytes(b"\xef\xbb\xbf" + text.encode())
        assert len(read_msls(msls).query_names) == 4

    @pytest.mark.parametrize(
        ("file", "old", "new", "words"),
        [
            ("postprocessed.csv", "easting", "east", "'easting'.*key, east"),
            ("postprocessed.csv", "225.0", "NaN", "line 4: easting .*q2 .*'NaN'"),
            ("postprocessed.csv", "225.0", "", "line 4: easting .*q2 .*''"),
            ("postprocessed.csv", "225.0", "1,2", r"line 4: 9 columns.*\b8\b"),
            ("postprocessed.csv", "q2", "../q2", r"line 4: '\.\./q2'"),
            ("postprocessed.csv", "q2", "q0", r"line 4: .*\bq0\b.*line 2\b"),
            ("raw.csv", "pano", "key", "'key'"),
            ("raw.csv", "q2", "q9", r"raw\.csv .*\bq2\b"),
            ("raw.csv", "True", "maybe", "line 3: pano .*q1 .*'maybe'.*True.*False"),
            ("raw.csv", "q2", '"q2', r"raw\.csv, .*line"),
            ("subtask_index.csv", "all", "any", "'all'"),
            ("subtask_index.csv", "q2", "q\0", r"subtask_index\.csv .*text"),
        ],
    )
    def test_wrong_files(self, msls, file, old, new, words):
        path = msls / "train_val" / "cph" / "query" / file
        path.write_text(path.read_text().replace(old, new, 1))
        message = message_of(read_msls, msls)
        assert str(path) in message
        assert re.search(words, message)

    def test_more_rows_than_positions(self, msls):
        path = msls / "train_val" / "sf" / "query" / "raw.csv"
        path.write_text(path.read_text().rstrip() + "\n1,more,0,0,0,0,False\n")
        assert re.search(rf"{path}, line 3: .*\bmore\b", message_of(read_msls, msls))

    @pytest.mark.parametrize("content", [b"", b"key\n", b"\xff\xfe\x00", b"\x80", b"\n\n"])
    def test_files_without_images(self, msls, content):
        path = msls / "train_val" / "sf" / "database" / "postprocessed.csv"
        path.write_bytes(content)
        assert str(path) in message_of(read_msls, msls)

    def test_missing_files(self, msls):
        path = msls / "train_val" / "sf" / "database" / "raw.csv"
        path.unlink()
        assert f" {path}; " in message_of(read_msls, msls)
        message = message_of(read_msls, msls / "train_val")
        assert re.search(f"{msls}/train_val/train_val/cph; .*train_val", message)

    def test_wrong_words(self, msls):
        assert re.search("'night'.*all s2w", message_of(read_msls, msls, subtask="night"))
        assert " nan;" in message_of(read_msls, msls, threshold=np.nan)
        assert "sf sf" in message_of(read_msls, msls, ["sf", "sf"])
        assert "none" in message_of(read_msls, msls, [])
        assert f"{msls}/train_val/zurich; " in message_of(read_msls, msls, ["zurich"])

    def test_nothing_left(self, msls):
        message = message_of(read_msls, msls, subtask="s2w")
        assert re.search(f"{msls}/train_val/cph/database .*s2w", message)
        message = message_of(read_msls, msls, ["sf"], threshold=0.5)
        assert re.search(rf"\bsf\b.*{msls} .*\b0\.5 m", message)

    def test_damaged_anyhow(self, msls):
        """Whatever stands in a file, nothing but our own errors comes of it."""
        path = msls / "train_val" / "cph" / "query" / "postprocessed.csv"
        whole = path.read_bytes()
        chance = random.Random(1)
        refused = 0
        for _ in range(200):
            damaged = bytearray(whole)
            for _ in range(chance.randint(1, 3)):
                place = chance.randrange(len(damaged))
                damaged[place : place + chance.randint(0, 2)] = bytes(
                    chance.choice(b'\0\r\n",;.\xff-eq19') for _ in range(chance.randint(0, 3))
                )
            path.write_bytes(damaged)
            try:
                read_msls(msls)
            except PatchNetVLADError as error:
                assert str(msls) in str(error)  # noqa: PT017
                refused += 1
        assert refused > 100


# The command -----------------------------------------------------------------------------------


class TestCommand:
    def run(self, *words):
        return dataset.main(["official", *map(str, words)])

    def test_pittsburgh(self, saved, tmp_path, capsys):
        assert self.run(saved(), "--output_dir", tmp_path / "out") == 0
        assert "2 queries and 3 index images" in capsys.readouterr().out
        truth = GroundTruth.load(tmp_path / "out" / "ground_truth.npz")
        np.testing.assert_array_equal(truth.utm_index, UTM_INDEX)
        assert len(ImageList.read(tmp_path / "out" / "query.txt")) == 2

    def test_order_of_a_protocol(self, saved, tmp_path, monkeypatch):
        lists = {
            "q.txt": [f"./Pittsburgh250k/queries_real/{name}" for name in reversed(QUERIES)],
            "i.txt": [f"./Pittsburgh250k/{name}" for name in reversed(INDEX)],
        }
        for name, names in lists.items():
            (tmp_path / name).write_text("".join(f"{line}\n" for line in names))
        protocol = Benchmark(
            "small", "", (str(tmp_path / "q.txt"),), (str(tmp_path / "i.txt"),), None, 2, 3, 25.0
        )
        monkeypatch.setattr(benchmarks, "BENCHMARKS", {"small": protocol})
        out = tmp_path / "out"
        assert self.run(saved(), "--output_dir", out, "--protocol", "small") == 0
        assert list(ImageList.read(out / "query.txt").names) == lists["q.txt"]
        truth = GroundTruth.load(out / "ground_truth.npz")
        np.testing.assert_array_equal(truth.utm_queries, UTM_QUERIES[::-1])
        np.testing.assert_array_equal(truth.utm_index, UTM_INDEX[::-1])

    def test_what_cannot_be_read(self, saved, tmp_path, capsys):
        assert self.run(tmp_path / "none.mat", "--output_dir", tmp_path / "out") == 2
        assert "none.mat" in capsys.readouterr().err
        assert self.run(saved(), "--kind", "msls", "--output_dir", tmp_path / "out") == 2
        assert "pitts30k_test.mat" in capsys.readouterr().err
        assert self.run(tmp_path, "--output_dir", tmp_path / "out") == 2  # a folder: MSLS
        assert "train_val" in capsys.readouterr().err
        assert not (tmp_path / "out" / "ground_truth.npz").exists()
