# SPDX-License-Identifier: MIT
"""Ground truth without positions: pairs by name, and lists of right answers."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.errors import GroundTruthError

QUERIES = ("night/1.jpg", "night/2.jpg", "night/3.jpg")
INDEX = tuple(f"day/{i}.jpg" for i in range(6))
NAMES = QUERIES, INDEX
RIGHT = [[0, 1], [], [4]]


def load(path, names=NAMES):
    return GroundTruth.load(path, names=names)


def rows(truth):
    return [found.tolist() for found in truth.positives()]


def message_of(path, names=NAMES):
    with pytest.raises(GroundTruthError) as caught:
        load(path, names)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") == 0
    return str(caught.value)


def objects(items, shape=None):
    array = np.empty(len(items), dtype=object)
    array[:] = items
    return array if shape is None else array.reshape(shape)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "night/1.jpg,day/1.jpg\nnight/1.jpg,day/0.jpg\nnight/3.jpg,day/4.jpg\n"),
        (
            "titles.csv",
            "query_image; right\r\nnight/1.jpg; day/1.jpg; day/0.jpg\r\n3.jpg; day/4.jpg",
        ),
        (
            "t.tsv",
            "# made by hand\nnight/1.jpg\tday/0.jpg\tday/1.jpg\n\n./night/3.jpg\tday/4.jpg\n",
        ),
        ("numbers.txt", "0, 1\n0, 0\n2, 4\n"),
        ("quoted.csv", '"night/1.jpg","day/1.jpg","day/0.jpg"\nnight/3.jpg,day/4.jpg,,'),
    ],
)
def test_tables(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    truth = load(tmp_path / name)
    assert rows(truth) == RIGHT
    assert truth.distance is None
    truth.check_counts(3, 6, "it")


def test_ends_of_paths(tmp_path):
    (tmp_path / "p.csv").write_text("1.jpg,day/1.jpg\n")
    names = (("/a/night/1.jpg",), ("/a/day/1.jpg", "/b/day/2.jpg"))
    assert rows(load(tmp_path / "p.csv", names)) == [[0]]
    names = (("/a/night/1.jpg",), ("/a/day/1.jpg", "/b/day/1.jpg"))
    assert "/a/day/1.jpg and /b/day/1.jpg" in message_of(tmp_path / "p.csv", names)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("night/1.jpg,day/1.jpg\nnight/9.jpg,day/0.jpg", ["line 2", "night/9.jpg"]),
        ("night/1.jpg,dya/1.jpg", ["line 1", "dya/1.jpg", " day/1.jpg"]),
        ("night/1.jpg\n", ["line 1", "night/1.jpg"]),
        ("query,right\n", ["p.csv"]),
        ("0,6\n", ["6", "6 index images"]),
        ("3,0\n", ["query 3", "3 "]),
    ],
)
def test_tables_that_do_not_fit(tmp_path, text, named):
    (tmp_path / "p.csv").write_text(text)
    message = message_of(tmp_path / "p.csv")
    assert all(word in message for word in named)


def test_tables_need_the_lists(tmp_path):
    (tmp_path / "p.csv").write_text("a,b\n")
    assert "lists" in message_of(tmp_path / "p.csv", None)


@pytest.mark.parametrize("dtype", [np.int64, np.int16])
def test_arrays_of_numbers(tmp_path, dtype):
    padded = np.array([[1, 0], [-1, -1], [4, -1]], dtype)
    np.save(tmp_path / "a.npy", padded)
    assert rows(load(tmp_path / "a.npy")) == RIGHT
    np.savez(tmp_path / "a.npz", positives=padded)
    assert rows(load(tmp_path / "a.npz")) == RIGHT
    np.savez(tmp_path / "p.npz", pairs=np.array([[2, 4], [0, 1], [0, 0]], dtype))
    assert rows(load(tmp_path / "p.npz")) == RIGHT


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.dtype(">i4"), np.uint16])
@pytest.mark.parametrize("protocol", [2, 3, 4])
def test_lists_of_gsv_cities_and_vpr_bench(tmp_path, dtype, protocol):
    arrays = [np.array(right, dtype) for right in RIGHT]
    forms = {
        "gsv": objects(arrays),
        "lists": objects(RIGHT),
        "vpr_bench": objects(
            [of for q, right in enumerate(arrays) for of in (np.int64(q), right)], (3, 2)
        ),
        "vpr_bench_lists": objects(
            [of for q, right in enumerate(RIGHT) for of in (q, right)], (3, 2)
        ),
    }
    for name, array in forms.items():
        path = tmp_path / f"{name}.npy"
        with path.open("wb") as file:  # as np.save does, which chooses the protocol
            np.lib.format.write_array_header_1_0(
                file, {"descr": "|O", "fortran_order": False, "shape": array.shape}
            )
            pickle.dump(array, file, protocol=protocol)
        assert rows(load(path)) == RIGHT, name
    np.save(tmp_path / "saved.npy", forms["gsv"], allow_pickle=True)
    assert rows(load(tmp_path / "saved.npy")) == RIGHT


def test_as_many_right_answers_for_each_query(tmp_path):
    np.save(tmp_path / "a.npy", objects([0, 1, 2, 3, 4, 5], (3, 2)), allow_pickle=True)
    assert rows(load(tmp_path / "a.npy")) == [[0, 1], [2, 3], [4, 5]]


class Run:
    def __reduce__(self):
        return (print, ("this was run",))


def test_no_pickled_code_is_run(tmp_path, capsys):
    np.save(tmp_path / "a.npy", objects([Run(), Run(), Run()]), allow_pickle=True)
    message = message_of(tmp_path / "a.npy")
    assert "print" in message
    assert "csv" in message
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("protocol", [2, 4])
@pytest.mark.parametrize("content", [[0.5, 1.5], ["a"], {"a": 1}, [[[1]]], None])
def test_other_objects_are_refused(tmp_path, content, protocol):
    path = tmp_path / "a.npy"
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(
            file, {"descr": "|O", "fortran_order": False, "shape": (1,)}
        )
        pickle.dump(content, file, protocol=protocol)
    message_of(path)


@pytest.mark.parametrize("cut", [10, 90, 140, 160, 200])
def test_damage_is_noticed(tmp_path, cut):
    path = tmp_path / "a.npy"
    np.save(path, objects([np.array(right) for right in RIGHT]), allow_pickle=True)
    content = path.read_bytes()
    path.write_bytes(content[:cut])
    message_of(path)


def test_of_other_lists(tmp_path):
    np.save(tmp_path / "a.npy", np.array([[0], [6], [1]]))
    assert "6 index images" in message_of(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([[0.5], [6], [1]]))
    assert "float64" in message_of(tmp_path / "a.npy")
    np.save(tmp_path / "a.npy", np.array([[0], [1]]))
    with pytest.raises(GroundTruthError, match=r"a\.npy .*\b2 queries\b.*\b3\b"):
        load(tmp_path / "a.npy").check_counts(3, 6, "a.npy")
