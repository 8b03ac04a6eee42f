# SPDX-License-Identifier: MIT
"""Matching as a job: protocols, candidates of other methods, further formats, metrics."""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil

import numpy as np
import pytest
from test_cli import match, pairs, world, write_config

from patchnetvlad.cli import feature_extract, feature_match
from patchnetvlad.cli._common import add_protocol_argument
from patchnetvlad.datasets import benchmarks
from patchnetvlad.datasets.benchmarks import Benchmark, Group
from patchnetvlad.evaluation.exports import EXPORTS
from patchnetvlad.evaluation.recall import recall_at_n
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank

__all__ = ["world"]

pytestmark = pytest.mark.usefixtures("thin_network")


@pytest.fixture(scope="module")
def case(world, tmp_path_factory):
    """A folder with features of queries and index images, and their configuration."""
    folder = tmp_path_factory.mktemp("formats")
    config = write_config(folder / "c.ini", local="float16", matcher="spatialApproximator")
    for part in ("query", "index"):
        extract(config, world / f"{part}.txt", world, folder / part, device="cpu")
    return folder, config


def run(world, case, **more):
    folder, config = case
    lists = {"query_list": world / "query.txt", "index_list": world / "index.txt"}
    return rerank(
        config,
        query_features=folder / "query",
        index_features=folder / "index",
        dataset_root=world,
        device="cpu",
        progress=False,
        **{**lists, **more},
    )


def test_scores(world, case):
    """They belong to the candidates beside them, and may be compared between queries."""
    result = run(world, case)
    queries, index = (np.load(case[0] / part / "globalfeats.npy") for part in ("query", "index"))
    for q, row in enumerate(result.retrieved):
        expected = -np.linalg.norm(index[row] - queries[q], axis=1)
        np.testing.assert_allclose(result.scores["NetVLAD"][q], expected, atol=1e-6)
        assert (np.diff(result.scores["NetVLAD"][q]) <= 1e-6).all()
        place = {candidate: n for n, candidate in enumerate(row.tolist())}
        for candidate, score in zip(
            result.reranked[q].tolist(), result.scores["PatchNetVLAD"][q], strict=True
        ):
            sizes = result.patch_scores[q, place[candidate]]
            assert score == pytest.approx(-(0.6 * sizes[0] + 0.4 * sizes[1]))


def test_metrics(world, case, tmp_path):
    result = run(world, case, ground_truth=world / "gt.npz", results_dir=tmp_path)
    content = json.loads((tmp_path / "metrics.json").read_text())
    positives = [[0], [1], []]
    for method, rows in (("NetVLAD", result.retrieved), ("PatchNetVLAD", result.reranked)):
        written = content["methods"][method]
        recalls = recall_at_n(rows, positives, (1, 5, 10))
        assert list(written["recall"].values()) == recalls.tolist()
        assert written["queries_without_positives"] == 1
        assert written["recall_of_queries_with_positives"]["10"] == 1
        assert written["precision_recall"]["relevant_queries"] == 2
        np.testing.assert_array_equal(result.metrics[method].recalls, result.recalls[method])
    about = content["provenance"]
    assert about["ground_truth"]["threshold"] == 3
    assert (about["queries"]["images"], about["index"]["images"]) == (3, 6)
    assert len(about["checkpoint"]["sha256"]) == 64
    assert about["protocol"] is None
    run(world, case, results_dir=tmp_path)  # without ground truth, there are none any more
    assert not (tmp_path / "metrics.json").exists()


def test_exports(world, case, tmp_path):
    result = run(
        world, case, ground_truth=world / "gt.npz", results_dir=tmp_path,
        exports=["kapture11", "hloc", "csv", "csv"],
    )  # fmt: skip
    assert result.reranked is not None
    expected = pairs(tmp_path / "PatchNetVLAD_predictions.txt")
    hloc = (tmp_path / "PatchNetVLAD_hloc.txt").read_text().splitlines()
    assert [tuple(line.split()) for line in hloc] == expected
    kapture = (tmp_path / "PatchNetVLAD_kapture11.txt").read_text().splitlines()[2:]
    assert [tuple(line.split(", ")[:2]) for line in kapture] == expected
    scores = np.array([float(line.split(", ")[2]) for line in kapture]).reshape(3, 6)
    assert (np.diff(scores) <= 0).all()  # their order is that of the lines
    with (tmp_path / "PatchNetVLAD_candidates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 18
    np.testing.assert_allclose(
        [float(row["score"]) for row in rows], result.scores["PatchNetVLAD"].ravel()
    )
    assert (tmp_path / "NetVLAD_hloc.txt").exists()
    run(world, case, results_dir=tmp_path)  # what this run does not write must not stay
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "NetVLAD_predictions.txt", "PatchNetVLAD_predictions.txt", "run.json", "scores.npz",
    ]  # fmt: skip


def test_csv_says_what_is_right(world, case, tmp_path):
    run(world, case, ground_truth=world / "gt.npz", results_dir=tmp_path, exports=["csv"])
    with (tmp_path / "NetVLAD_candidates.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    right = [(row["query"], row["index"]) for row in rows if row["right"] == "1"]
    assert right == [
        ("query/view0.png", "index/place0.jpg"),
        ("query/view1.jpg", "index/place1.jpg"),
    ]


def test_candidates(world, case, tmp_path, capsys):
    (tmp_path / "pairs.txt").write_text(
        "".join(f"query/view{q} index/place{i}.jpg\n"
                for q, rows in (("0.png", "50"), ("1.jpg", "41"), ("2.png", "32")) for i in rows)
    )  # fmt: skip
    folder, config = case
    words = ["--candidates", str(tmp_path / "pairs.txt")]
    assert match(world, config, folder, tmp_path / "r", *words) == 0
    given = [answer[-5] for _, answer in pairs(tmp_path / "r" / "NetVLAD_predictions.txt")]
    assert given == list("504132")
    ranked = [answer[-5] for _, answer in pairs(tmp_path / "r" / "PatchNetVLAD_predictions.txt")]
    assert ranked == list("051423")
    content = json.loads((tmp_path / "r" / "run.json").read_text())
    assert content["candidates"] == str(tmp_path / "pairs.txt")
    assert content["config"]["predictions_path"] is None  # as it was given
    assert "NetVLAD" not in run(world, case, candidates=tmp_path / "pairs.txt").scores
    (tmp_path / "pairs.txt").write_text("query/view0.png index/place9.jpg\n")
    assert match(world, config, folder, tmp_path / "r", *words) == 2
    error = capsys.readouterr().err
    assert re.search(rf"{tmp_path}/pairs\.txt, line 1: .*place9\.jpg", error)


def test_bad_candidates_leave_earlier_results(world, case, tmp_path, capsys):
    folder, config = case
    assert match(world, config, folder, tmp_path, "--export", "hloc") == 0
    before = sorted(path.name for path in tmp_path.iterdir())
    assert match(world, config, folder, tmp_path, "--candidates", "nope.txt") == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    # A file that is read does not make way.
    candidates = tmp_path / "NetVLAD_hloc.txt"
    assert match(world, config, folder, tmp_path, "--candidates", str(candidates)) == 2
    assert "NetVLAD_hloc.txt" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    np.save(tmp_path / "twice.npy", np.array([[0, 0], [1, 2], [3, 4]]))
    words = ["--candidates", str(tmp_path / "twice.npy")]
    assert match(world, config, folder, tmp_path, *words, "--export", "msls") == 2
    assert re.search(r"twice\.npy\b.*row 0\b", capsys.readouterr().err)


class TestProtocol:
    @pytest.fixture
    def towns(self, world, monkeypatch, tmp_path):
        """Two towns that are searched apart: index images 0 to 2 and 3 to 5."""
        root = tmp_path / "towns"
        for part, names in (
            ("query", ["a/view0.png", "a/view1.jpg", "b/view2.png"]),
            ("index", [f"{'aaabbb'[i]}/place{i}.jpg" for i in range(6)]),
        ):
            for name in names:
                (root / part / name[0]).mkdir(parents=True, exist_ok=True)
                shutil.copy(world / part / name[2:], root / part / name)
            (root / f"{part}.txt").write_text("".join(f"{part}/{name}\n" for name in names))
        shutil.copy(world / "gt.npz", root / "gt.npz")
        protocol = Benchmark(
            "towns", "Two towns", (str(root / "query.txt"),), (str(root / "index.txt"),),
            str(root / "gt.npz"), 3, 6, 3.0, group_folder="a|b",
            groups_needed=(Group("a", 2, 3), Group("b", 1, 3)), remark="each on its own",
        )  # fmt: skip
        monkeypatch.setattr(benchmarks, "BENCHMARKS", {"towns": protocol})
        return root

    def test_all_of_it(self, towns, case, tmp_path, capsys):
        config = case[1]
        for part in ("query", "index"):
            assert feature_extract.main(
                ["--config_path", config, "--protocol", "towns", "--part", part,
                 "--dataset_root_dir", str(towns), "--output_features_dir", str(tmp_path / part),
                 "--nocuda"]
            ) == 0  # fmt: skip
        words = [
            "--config_path", config, "--protocol", "towns", "--nocuda",
            "--query_input_features_dir", str(tmp_path / "query"),
            "--index_input_features_dir", str(tmp_path / "index"),
            "--result_save_folder", str(tmp_path / "r"),
        ]  # fmt: skip
        assert feature_match.main(words) == 0
        for query, answer in pairs(tmp_path / "r" / "PatchNetVLAD_predictions.txt"):
            assert query.split("/")[1] == answer.split("/")[1]
        start = "towns: 3 queries, 6 index images, tolerance 3 m; weights imagenet"
        printed = capsys.readouterr().out.splitlines()
        (line,) = (line for line in printed if line.startswith(start))
        assert "PatchNetVLAD R@1" in line
        assert line.endswith("each on its own")
        about = json.loads((tmp_path / "r" / "metrics.json").read_text())["provenance"]
        assert (about["protocol"], about["citation"]) == ("towns", line)

        assert feature_match.main([*words, "--posDistThr", "25"]) == 2
        assert re.search(r"\btowns\b.*\b3\b.*\b25\b", capsys.readouterr().err)
        np.save(tmp_path / "c.npy", np.array([[0, 1], [2, 1], [3, 4]]))
        assert feature_match.main([*words, "--candidates", str(tmp_path / "c.npy")]) == 0
        assert "; candidates from c.npy" in capsys.readouterr().out
        np.save(tmp_path / "c.npy", np.array([[0, 1], [3, 1], [3, 4]]))
        assert feature_match.main([*words, "--candidates", str(tmp_path / "c.npy")]) == 2
        error = capsys.readouterr().err
        assert re.search(r"\bindex/b/place3\.jpg .*query/a/view1\.jpg ", error)

    def test_other_lists(self, world, towns, case, capsys):
        folder, config = case
        assert match(world, config, folder, folder / "r", "--protocol", "towns") == 2
        assert re.search(
            r"\btowns\b.*view0\.png \(.*query\.txt, line 1\) .*a\|b", capsys.readouterr().err
        )

    def test_unknown(self, world, case, capsys):
        folder, config = case
        assert match(world, config, folder, folder / "r", "--protocol", "pitts30") == 2
        assert re.search("'pitts30'.* pitts30k", capsys.readouterr().err)

    @pytest.mark.parametrize("words", [[], ["--protocol", "pitts30k"], ["--part", "query"]])
    def test_lists_are_needed(self, words, capsys):
        with pytest.raises(SystemExit) as stop:
            feature_extract.main(words)
        assert stop.value.code == 2
        assert "--protocol and --part" in capsys.readouterr().err
        if words != ["--protocol", "pitts30k"]:
            folders = ["--query_input_features_dir", "q", "--index_input_features_dir", "i"]
            with pytest.raises(SystemExit):
                feature_match.main(folders)
            assert "--query_file_path is needed, or --protocol" in capsys.readouterr().err


def test_names_that_the_commands_know():
    """They are written out in the command line's own files, which import little."""
    assert tuple(EXPORTS) == feature_match.EXPORT_NAMES
    parser = argparse.ArgumentParser()
    add_protocol_argument(parser, "")
    words = re.findall(r"[\w-]+", parser.format_help())
    assert set(benchmarks.BENCHMARKS) <= set(words)
