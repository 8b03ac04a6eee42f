# SPDX-License-Identifier: MIT
"""Comparing runs: the numbers, the files, the page, and runs of other methods."""

from __future__ import annotations

import csv
import json
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from report_data import NASTY, make_run
from scipy import stats

from patchnetvlad import compare
from patchnetvlad.cli import compare as command
from patchnetvlad.errors import ArgumentError, GroundTruthError, OutputError, ResultsError
from patchnetvlad.evaluation.comparison import compare_methods
from patchnetvlad.evaluation.exports import write_csv, write_hloc
from patchnetvlad.evaluation.pairs import write_pairs, write_scored_pairs
from patchnetvlad.evaluation.recall import recall_at_n

FILES = {"comparison.csv", "comparison.md", "comparison.tex", "comparison.html", "queries.csv"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("run"), 40, 30, 10, size=(64, 48))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """Names that every format can represent."""
    return make_run(tmp_path_factory.mktemp("plain"), 24, 20, 6, size=(32, 24), nasty=False)


class Page(HTMLParser):
    def __init__(self, path):
        super().__init__()
        self.blocks, self.tags, self.text = {}, [], ""
        self._block = None
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._block = dict(attributes).get("id", tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._block = None

    def handle_data(self, data):
        if self._block is None:
            self.text += data
        else:
            self.blocks[self._block] = self.blocks.get(self._block, "") + data


def two_methods(count=60, seed=0):
    random = np.random.default_rng(seed)
    right = [np.array([0])] * count
    answers = {
        name: np.where(random.random((count, 1)) < share, [[0, 1, 2]], [[1, 2, 0]])
        for name, share in (("A", 0.5), ("B", 0.8))
    }
    return answers, right


class TestNumbers:
    def test_counts_and_tests(self):
        answers, right = two_methods()
        found = compare_methods(answers, right, [1, 3], interval_block="1")
        a, b = (rows[:, 0] == 0 for rows in answers.values())
        difference = found.differences["A", "B"]
        won, lost = int((b & ~a).sum()), int((a & ~b).sum())
        assert (difference.won[0], difference.lost[0]) == (won, lost)
        assert difference.values[0] == pytest.approx((won - lost) / 60)
        exact = stats.binomtest(won, won + lost).pvalue
        assert difference.p_values.tolist() == pytest.approx([exact, 1])
        for name, recalls in zip(answers, found.recalls, strict=True):
            np.testing.assert_allclose(recalls, recall_at_n(answers[name], right, [1, 3]))
        (said,) = found.sentences()
        for part in (f"B finds {won - lost} of 60 queries more than A", f"{won} won and {lost}"):
            assert part in said

    def test_intervals_of_differences_are_paired(self):
        """As SciPy finds them; narrower than those of two unpaired runs."""
        answers, right = two_methods(200)
        gained = (answers["B"][:, 0] == 0).astype(float) - (answers["A"][:, 0] == 0)
        found = compare_methods(answers, right, [1], interval_block="1").differences["A", "B"]
        theirs = stats.bootstrap(
            (gained,), np.mean, n_resamples=5000, method="percentile", random_state=0
        ).confidence_interval
        assert found.ends[0] == pytest.approx([theirs.low, theirs.high], abs=0.015)
        same = compare_methods({"A": answers["A"], "B": answers["A"].copy()}, right, [1])
        assert same.differences["A", "B"].ends.tolist() == [[0, 0]]
        assert "as many" in same.sentences()[0]

    def test_every_pair_and_the_other_way_round(self):
        answers, right = two_methods()
        answers["C"] = answers["A"]
        found = compare_methods(answers, right)
        assert list(found.differences) == [("A", "B"), ("A", "C"), ("B", "C")]
        there, back = found.differences["A", "B"], found.differences["B", "C"]
        np.testing.assert_allclose(there.values, -back.values)
        assert there.won.tolist() == back.lost.tolist()
        assert "fewer" in found.sentences()[2]
        again = compare_methods(answers, right)
        np.testing.assert_array_equal(found.ends, again.ends)

    def test_too_little(self):
        answers, right = two_methods()
        for given in (({"A": answers["A"]}, right), ({"A": [], "B": []}, [])):
            with pytest.raises(ArgumentError):
                compare_methods(*given)
        with pytest.raises(ValueError, match=r"\b60\b.*\b59\b"):
            compare_methods(answers, right[1:])


class TestRuns:
    def test_a_single_folder_before_and_after(self, run, tmp_path, capsys):
        assert command.main([str(run.results), "--output", str(tmp_path / "out")]) == 0
        out = capsys.readouterr().out
        positives = run.truth.positives()
        before, after = (
            recall_at_n(rows, positives, [1])[0] for rows in (run.retrieved, run.reranked)
        )
        assert f"{100 * before:.1f} [" in out
        assert re.search(rf"^Patch-NetVLAD +{100 * after:.1f} \[", out, re.M)
        assert {file.name for file in (tmp_path / "out").iterdir()} == FILES
        assert "comparison.html" in out

    def test_predictions_of_other_methods(self, plain, tmp_path):
        names, rows = (plain.queries.names, plain.index.names), plain.reranked
        scores = -np.arange(rows.size, dtype=float).reshape(rows.shape)
        shuffled = [2, 0, 1, *range(3, len(names[0]))]
        write_pairs(tmp_path / "10.txt", *names, rows)
        write_scored_pairs(tmp_path / "11.txt", *names, rows, scores)
        write_hloc(tmp_path / "hloc.txt", [names[0][q] for q in shuffled], names[1], rows[shuffled])
        write_csv(tmp_path / "a.csv", *names, rows)
        np.save(tmp_path / "a.npy", rows)
        lines = [f"{names[0][q]},{names[1][i]}" for q in range(len(rows)) for i in rows[q]]
        (tmp_path / "b.csv").write_text("\n".join(["query,index", *lines]))
        files = [tmp_path / name for name in ("10.txt", "11.txt", "hloc.txt", "a.csv", "a.npy")]
        found = compare([plain.results, *files, tmp_path / "b.csv"])
        assert len(found.names) == 7
        for difference in found.differences.values():
            assert (difference.won.sum(), difference.lost.sum()) == (0, 0), difference.after

    def test_without_a_run_lists_and_ground_truth_are_given(self, plain, tmp_path):
        rows = {"old": plain.retrieved, "new": plain.reranked}
        for name, of in rows.items():
            np.save(tmp_path / f"{name}.npy", of)
        files = {name: tmp_path / f"{name}.npy" for name in rows}
        lists = {
            "query_list": plain.root / "query.txt",
            "index_list": plain.root / "index.txt",
            "dataset_root": plain.root,
        }
        with pytest.raises(ResultsError, match="--query_file_path"):
            compare(files)
        with pytest.raises(ResultsError, match="--ground_truth_path"):
            compare(files, **lists)
        with pytest.raises(GroundTruthError, match=r"none\.npz"):
            compare(files, **lists, ground_truth=tmp_path / "none.npz")
        found = compare(files, **lists, ground_truth=plain.root / "gt.npz", n_values=[1, 5, 99])
        assert found.n_values == (1, 5)
        np.testing.assert_allclose(
            found.recalls[1], recall_at_n(plain.reranked, plain.truth.positives(), [1, 5])
        )
        assert (compare(files, **lists, ground_truth=plain.root / "gt.npz", threshold=0.0)
                .recalls == 0).all()  # fmt: skip

    def test_queries_in_another_order(self, plain, tmp_path):
        """They are the same queries, and are compared by name."""
        other = tmp_path / "other"
        shutil.copytree(plain.results, other)
        order = np.random.default_rng(0).permutation(len(plain.retrieved))
        with np.load(other / "scores.npz") as stored:
            arrays = dict(stored)
        for name, values in arrays.items():
            if len(values) == len(order) and name != "index_names":
                arrays[name] = values[order]
        names = [plain.queries.names[q] for q in order]
        arrays["query_names"] = np.frombuffer("\n".join(names).encode(), np.uint8)
        np.savez(other / "scores.npz", **arrays)
        found = compare({"here": plain.results, "there": other}, all_methods=True)
        assert found.names == (
            "here: NetVLAD", "here: Patch-NetVLAD", "there: NetVLAD", "there: Patch-NetVLAD",
        )  # fmt: skip
        difference = found.differences["here: Patch-NetVLAD", "there: Patch-NetVLAD"]
        assert (difference.won.sum(), difference.lost.sum()) == (0, 0)

    def test_results_of_an_earlier_version(self, plain, tmp_path):
        """Predictions alone, without a record of the run."""
        old = tmp_path / "old"
        old.mkdir()
        for file in plain.results.glob("*_predictions.txt"):
            shutil.copy(file, old)
        found = compare([plain.results, old])
        assert found.differences[found.names].won.sum() == 0

    def test_what_cannot_be_compared(self, run, plain, tmp_path, capsys):
        (tmp_path / "empty").mkdir()
        (tmp_path / "notes.txt").write_text("these are no pairs at all")
        (tmp_path / "b.csv").write_text("query,index,rank\nquery/00000.jpg,index/00000.jpg,x\n")
        shutil.copytree(plain.results, tmp_path / "twice")
        for words, named in (
            ([plain.results, run.results], str(run.results)),
            ([plain.results, tmp_path / "none"], str(tmp_path / "none")),
            ([plain.results, tmp_path / "empty"], str(tmp_path / "empty")),
            ([plain.results, tmp_path / "notes.txt"], "notes.txt"),
            ([plain.results, tmp_path / "b.csv"], "'x'"),
            ([plain.results, plain.results], "twice"),
            ([f"a={plain.results}", f"a={run.results}"], "called a"),
            ([f"a={plain.results}", tmp_path / "notes.txt"], "NAME=RUN"),
            ([plain.results, "--interval_block", "day"], "day"),
            ([plain.results, "--max_mb", "0"], "max_mb"),
            ([plain.results, "--posDistThr", "-1"], "-1"),
        ):
            assert command.main([str(word) for word in words]) == 2, words
            error = capsys.readouterr().err
            assert named in error
            assert error.count("\n") <= 2

    def test_inputs_stay(self, plain, tmp_path):
        write_csv(tmp_path / "queries.csv", plain.queries.names, plain.index.names, plain.reranked)
        before = (tmp_path / "queries.csv").read_bytes()
        with pytest.raises(OutputError, match=r"queries\.csv"):
            compare([plain.results, tmp_path / "queries.csv"], tmp_path)
        assert (tmp_path / "queries.csv").read_bytes() == before


@pytest.fixture(scope="module")
def out(run, tmp_path_factory):
    """A comparison with odd names, and its folder."""
    folder = tmp_path_factory.mktemp("out")
    np.save(run.root / "c.npy", run.retrieved)
    return folder, compare({"a_b & 50%": run.results, "<c>|": run.root / "c.npy"}, folder)


class TestFiles:
    def test_tables(self, run, out):
        folder, found = out
        with (folder / "comparison.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert [row["run"] for row in rows] == ["a_b & 50%", "<c>|"]
        difference = found.differences[found.names]
        assert float(rows[1]["difference@1"]) == pytest.approx(difference.values[0], rel=1e-5)
        assert int(rows[1]["lost@1"]) == difference.lost[0]
        assert float(rows[0]["recall@10_low"]) == pytest.approx(found.ends[0, 2, 0], rel=1e-5)
        tex = (folder / "comparison.tex").read_text()
        assert r"a\_b \& 50\% & " in tex
        assert all(line.startswith("%") or "a_b" not in line for line in tex.splitlines())
        markdown = (folder / "comparison.md").read_text()
        assert r"| \<c>\| | " in markdown
        assert markdown.count(found.drawn) == 1
        with (folder / "queries.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 40
        right = [int(row["<c>|: right"]) for row in rows]
        assert right == found.hits[1, :, 0].astype(int).tolist()

    def test_page(self, run, out):
        folder, found = out
        page = Page(folder / "comparison.html")
        data = json.loads(page.blocks["data"])
        differ = np.flatnonzero(found.hits[0, :, 0] != found.hits[1, :, 0])
        assert len(data["queries"]) == len(differ) > 0
        for query, q in zip(data["queries"], differ, strict=True):
            assert data["names"][query["image"]] == run.queries.names[q]
            answers = [data["names"][image] for image in query["answers"]]
            wanted = [run.index.names[of[q, 0]] for of in (run.reranked, run.retrieved)]
            assert answers == wanted
            assert query["right"] == found.hits[:, q, 0].astype(int).tolist()
            assert [rank == 1 for rank in query["rank"]] == [bool(x) for x in query["right"]]
        small = [of for name, of in page.blocks.items() if name.startswith("small-")]
        assert sum(map(len, map(json.loads, small))) == len(data["names"])
        assert found.sentences()[0] in page.text
        for tag, attributes in page.tags:
            assert tag not in ("img", "iframe", "link") or attributes.get("href") == "data:,"
            assert not any(name.startswith("on") for name in attributes)
        assert any(name in str(data["names"]) for name in NASTY)
        assert "<c>|" in page.text

    def test_a_page_that_is_too_small(self, run, tmp_path):
        with pytest.raises(ResultsError, match=r"--max_mb"):
            compare(run.results, tmp_path / "x", max_mb=0.01)

    def test_runs_that_differ_nowhere(self, plain, tmp_path):
        np.save(tmp_path / "a.npy", plain.reranked)
        compare([plain.results, tmp_path / "a.npy"], tmp_path / "out")
        page = Page(tmp_path / "out" / "comparison.html")
        assert json.loads(page.blocks["data"])["queries"] == []
        assert "differ nowhere" in page.text
