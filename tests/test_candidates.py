# SPDX-License-Identifier: MIT
"""Candidates of other methods, from arrays and from pairs of names."""

from __future__ import annotations

import logging
import re

import numpy as np
import pytest

from patchnetvlad.errors import FeatureError
from patchnetvlad.evaluation.exports import write_csv, write_hloc
from patchnetvlad.evaluation.pairs import write_pairs, write_scored_pairs
from patchnetvlad.search.candidates import Pair, load_candidates, parse_pairs

QUERIES = ["q/b.jpg", "q/a.jpg"]
INDEX = ["db/0.jpg", "db/1.jpg", "db/2.jpg"]
PREDICTIONS = np.array([[2, 0], [1, 2]])

HLOC = "q/b.jpg db/2.jpg\nq/b.jpg db/0.jpg\nq/a.jpg db/1.jpg\nq/a.jpg db/2.jpg\n"
KAPTURE = "# kapture format: 1.0\n# query_image, map_image\n" + HLOC.replace(" ", ", ")
SCORED = (
    "# kapture format: 1.1\n# query_image, map_image, score\n"
    "q/b.jpg, db/2.jpg, 3\nq/b.jpg, db/0.jpg, -1e-3\n"
    "q/a.jpg, db/1.jpg, .5\nq/a.jpg, db/2.jpg, 0.5\n"
)


TABLE = "query,rank,index,score,right\n" + "".join(
    f"{query},{rank},{index},,\n"
    for query, index, rank in (
        ("q/b.jpg", "db/0.jpg", 2), ("q/a.jpg", "db/1.jpg", 1), ("q/a.jpg", "db/2.jpg", 10),
        ("q/b.jpg", "db/2.jpg", 1),
    )
)  # fmt: skip


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pairs.txt"


@pytest.fixture
def load(path):
    def from_text(text, *more):
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return load_candidates(path, QUERIES, INDEX, *more)

    return from_text


@pytest.fixture
def message_of(load, path):
    def from_text(text, *more):
        with pytest.raises(FeatureError) as caught:
            load(text, *more)
        message = str(caught.value)
        assert f"pred_input_path = {path}" in message
        assert "\n" not in message
        return message

    return from_text


@pytest.mark.parametrize("text", [HLOC, KAPTURE, SCORED], ids=["hloc", "kapture10", "kapture11"])
@pytest.mark.parametrize(
    "change",
    [
        lambda text: text,
        lambda text: text.rstrip("\n"),
        lambda text: text.replace("\n", "\r\n"),
        lambda text: "\ufeff" + text.replace("\n", "\n\n"),
        lambda text: text + "# the end\n",
        lambda text: text.replace(", ", ",").replace(" db", "\t db"),
    ],
    ids=["plain", "no end", "windows", "blank lines", "comment", "spacing"],
)
def test_pairs(load, text, change):
    found = load(change(text))
    np.testing.assert_array_equal(found, PREDICTIONS)
    assert found.dtype == np.int64


def test_kapture_without_header(load):
    body = KAPTURE.split("\n", 2)[2]
    np.testing.assert_array_equal(load(body), PREDICTIONS)
    np.testing.assert_array_equal(load("# pairs\n" + body), PREDICTIONS)


def test_scores_under_the_old_version(load):
    np.testing.assert_array_equal(load(SCORED.replace("1.1", "1.0")), PREDICTIONS)


def test_names_with_commas_in_hloc(path):
    path.write_text("a,b.jpg c,d.jpg\n")
    assert load_candidates(path, ["a,b.jpg"], ["x", "c,d.jpg"]).tolist() == [[1]]
    path.write_text("a, b\n")  # kapture's if a is a query, hloc's if "a," is
    assert load_candidates(path, ["a"], ["b"]).tolist() == [[0]]
    assert load_candidates(path, ["a,"], ["b"]).tolist() == [[0]]


def test_names_with_blanks_in_kapture(path):
    path.write_text("# kapture format: 1.0\na b.jpg, c d.jpg\n")
    assert load_candidates(path, ["a b.jpg"], ["c d.jpg"]).tolist() == [[0]]


def test_names_with_commas_in_kapture(path, caplog):
    """As feature_match writes them: the lists say where a name ends."""
    queries, index = ["q/a, b.jpg", "q/c,d , e.jpg"], ["x, 1", "y,z.jpg", "x"]
    predictions = np.array([[1, 0], [2, 1]])
    write_pairs(path, queries, index, predictions)
    np.testing.assert_array_equal(load_candidates(path, queries, index), predictions)
    path.write_text("# kapture format: 1.1\nq, x, 1\n")  # a score, unless "x, 1" is a name
    assert load_candidates(path, ["q"], index).tolist() == [[0]]
    assert load_candidates(path, ["q"], ["y", "x"]).tolist() == [[1]]


@pytest.mark.parametrize("queries", [None, ["q,b.jpg", "q, c.jpg"]])
def test_pairs_without_the_index_list(queries):
    """All that a report of predictions alone knows."""
    names = [(pair.query, pair.candidate) for pair in parse_pairs(["q,b.jpg, db/0.jpg"], queries)]
    assert names == [("q,b.jpg", "db/0.jpg")]
    lines = ["", "# kapture format: 1.0", "q, c.jpg, db/0.jpg"]
    if queries is None:
        with pytest.raises(ValueError, match=r"line 3: .*'db/0\.jpg'"):
            parse_pairs(lines)
    else:
        assert parse_pairs(lines, queries) == [Pair(3, "q, c.jpg", "db/0.jpg", None)]


def test_round_trips(tmp_path):
    rng = np.random.default_rng(0)
    queries, index = [f"q/ü{i}.jpg" for i in range(7)], [f"d/{i}.jpg" for i in range(30)]
    predictions = np.stack([rng.permutation(30)[:12] for _ in queries])
    scores = -np.sort(rng.normal(size=predictions.shape), axis=1)
    write_pairs(tmp_path / "kapture10", queries, index, predictions)
    write_scored_pairs(tmp_path / "kapture11", queries, index, predictions, scores)
    write_hloc(tmp_path / "hloc", queries, index, predictions)
    np.save(tmp_path / "array.npy", predictions.astype(np.int32))
    for file in tmp_path.iterdir():
        for top_k in (None, 12, 100):
            found = load_candidates(str(file), queries, index, top_k)
            np.testing.assert_array_equal(found, predictions, err_msg=file.name)
        found = load_candidates(file, queries, index, 5)
        np.testing.assert_array_equal(found, predictions[:, :5], err_msg=file.name)


def test_order(load, caplog):
    mixed = "q/a.jpg db/1.jpg\nq/b.jpg db/2.jpg\nq/a.jpg db/2.jpg\nq/b.jpg db/0.jpg\n"
    with caplog.at_level(logging.INFO):
        np.testing.assert_array_equal(load(mixed), PREDICTIONS)
        assert not caplog.text
        found = load(SCORED.replace("-1e-3", "7"))
    assert found.tolist() == [[0, 2], [1, 2]]
    assert re.search(r"pairs\.txt: .*\b1 queries.*score", caplog.text)


def test_candidates_twice(load, caplog):
    with caplog.at_level(logging.INFO):
        found = load("q/b.jpg db/2.jpg\nq/b.jpg db/2.jpg\n" + HLOC.split("\n", 1)[1])
    np.testing.assert_array_equal(found, PREDICTIONS)
    assert re.search(r"pairs\.txt: 1 candidates", caplog.text)
    # The better score counts, wherever it stands.
    found = load(SCORED + "q/b.jpg, db/0.jpg, 9\n")
    assert found.tolist() == [[0, 2], [1, 2]]


def test_images_listed_twice(path):
    path.write_text(HLOC)
    found = load_candidates(path, [*QUERIES, "q/b.jpg"], ["db/2.jpg", *INDEX])
    assert found.tolist() == [[0, 1], [2, 0], [0, 1]]


def test_ragged(load, message_of):
    ragged = HLOC + "q/a.jpg db/0.jpg\n"
    for top_k in (None, 3, 100):
        message = message_of(ragged, *([] if top_k is None else [top_k]))
        assert re.search(r"\b2 candidates\b.*q/b\.jpg.*\b3\b", message)
    np.testing.assert_array_equal(load(ragged, 2), PREDICTIONS)
    np.testing.assert_array_equal(load(ragged, 1), PREDICTIONS[:, :1])


def test_unknown_names(message_of):
    assert re.search(r"line 5: q/c\.jpg .*query", message_of(HLOC + "q/c.jpg db/0.jpg\n"))
    assert re.search(r"line 5: db/9\.jpg .*index", message_of(KAPTURE.replace("db/1", "db/9")))
    message = message_of(SCORED.replace("db/1", "/data\\db\\1"))
    assert re.search(r"line 5: /data\\db\\1\.jpg .*index.* db/1\.jpg", message)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", r"\b2 of 2 queries.*q/b\.jpg"),
        ("\n\n", r"\b2 of 2 queries"),
        ("# kapture format: 1.1\n", r"\b2 of 2 queries"),
        ("q/b.jpg db/0.jpg\n", r"\b1 of 2 queries.*q/a\.jpg"),
        ("q/b.jpg\n", "line 1 .*1 fields.*hloc"),
        ("q/b.jpg db/0.jpg 0.5\n", "line 1 .*3 fields.*hloc"),
        (KAPTURE + "q/b.jpg\n", "line 7 .*1 fields.*kapture"),
        (KAPTURE + "q/b.jpg, a, 1, 2\n", "line 7 .*4 fields.*kapture"),
        (KAPTURE + "q/b.jpg, db/0.jpg, 1\n", r"line 7 .*3 fields.*\b2\b"),
        (SCORED.replace("3\n", "high\n"), "line 3: .*'high'"),
        (SCORED.replace(".5", "nan"), "line 5: .*'nan'"),
        (b"q/b.jpg \xff\n", "text"),
        (HLOC.encode("utf-16"), "text"),
        (b"\x89HDF\r\n\x1a\n\0", "text"),
        (b"PK\x03\x04 damaged", "cannot be read"),
        (b"\x93NUMPY\x01\x00\x09\x00{'descr'(", "cannot be read"),
    ],
)
def test_wrong_files(message_of, text, words):
    assert re.search(words, message_of(text))


def test_arrays_by_content(path):
    with path.open("wb") as file:
        np.save(file, PREDICTIONS)
    np.testing.assert_array_equal(load_candidates(path, QUERIES, INDEX), PREDICTIONS)
    with path.open("wb") as file:
        np.save(file, PREDICTIONS + 1)
    with pytest.raises(
        FeatureError, match=rf"pred_input_path = {path}: row 0, column 0\b.* 3\b.*\b2\b"
    ):
        load_candidates(path, QUERIES, INDEX)


@pytest.mark.parametrize("name", ["absent.npy", "absent.txt", "."])
def test_no_file(tmp_path, name):
    with pytest.raises(FeatureError, match=f"pred_input_path = {tmp_path / name} "):
        load_candidates(tmp_path / name, QUERIES, INDEX)


class TestTable:
    def test_by_rank(self, load):
        np.testing.assert_array_equal(load(TABLE), PREDICTIONS)
        np.testing.assert_array_equal(load(TABLE.replace("\n", "\r\n")), PREDICTIONS)

    def test_by_score_and_by_line(self, load):
        rows = [("q/b.jpg", "db/0.jpg", -1), ("q/b.jpg", "db/2.jpg", 0.5)]
        rows += [("q/a.jpg", "db/1.jpg", 2), ("q/a.jpg", "db/2.jpg", 1e-3)]
        scored = "".join(f"{query},{score},{index}\n" for query, index, score in rows)
        np.testing.assert_array_equal(load(f"Query,score,Index\n{scored}"), PREDICTIONS)
        plain = "".join(f"{index},{query}\n" for query, index, _ in rows)
        np.testing.assert_array_equal(load(f"index,query\n{plain}"), [[0, 2], [1, 2]])

    def test_names_that_look_like_formulas(self, tmp_path):
        names, index = ["=1+1.jpg", "a,b.jpg"], ["@9.jpg", "./+.jpg", 'a "b".jpg']
        write_csv(tmp_path / "a.csv", names, index, PREDICTIONS)
        np.testing.assert_array_equal(
            load_candidates(tmp_path / "a.csv", names, index), PREDICTIONS
        )

    @pytest.mark.parametrize(
        ("text", "words"),
        [
            (TABLE.replace(",10,", ",ten,"), ["line 4", "'ten'"]),
            (TABLE.replace("q/b.jpg,1,db/2.jpg,,", "q/b.jpg,1"), ["line 5", "2 cells", "5"]),
            (TABLE.replace("db/2", "db/9"), ["line 4", "db/9.jpg"]),
            ("query,index\n", ["2 of 2 queries"]),
            ('query,index\n"q/b.jpg,db/0.jpg\n', ["line"]),
        ],
    )
    def test_broken(self, message_of, text, words):
        message = message_of(text)
        assert all(word in message for word in words), message
