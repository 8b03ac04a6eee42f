# SPDX-License-Identifier: MIT
"""The report of a run: what the page says. How it behaves is in test_report_browser.py."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shutil
import stat
from collections import Counter
from dataclasses import replace
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from report_data import NASTY, SMALL, make_run, write_picture

from patchnetvlad.base.files import replace_text
from patchnetvlad.cli import report as command
from patchnetvlad.errors import OutputError, ResultsError
from patchnetvlad.models.grid import patch_grids
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import evaluate, rerank
from patchnetvlad.pipeline.run_record import read_run
from patchnetvlad.report.html import json_block, wilson_interval
from patchnetvlad.report.page import common_folder
from patchnetvlad.report.write import write_report

pytestmark = pytest.mark.usefixtures("thin_network")


class Page(HTMLParser):
    """Reads a page as a browser does: what stands in which element."""

    def __init__(self, path):
        super().__init__()
        self.scripts, self.elements, self.text = {}, [], ""
        self._script = None
        self.feed(path.read_text(encoding="utf-8"))
        self.data = json.loads(self.scripts["data"])

    def handle_starttag(self, tag, attributes):
        self.elements.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._script = dict(attributes).get("id", tag)
            self.scripts[self._script] = ""

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._script = None

    def handle_data(self, data):
        if self._script is not None:
            self.scripts[self._script] += data
        else:
            self.text += data

    def details(self):
        size = self.data["detailChunk"]
        chunks = range((self.data["queries"] + size - 1) // size)
        return [row for n in chunks for row in json.loads(self.scripts[f"details-{n}"])]

    def small(self, image):
        n, place = divmod(image, self.data["smallChunk"])
        return json.loads(self.scripts.get(f"small-{n}", "[]") or "[]")[place]

    def large(self):
        n = 0
        found = []
        while f"large-{n}" in self.scripts:
            found += json.loads(self.scripts[f"large-{n}"])
            n += 1
        return dict(zip(self.data["large"], found, strict=True))


def report(run, **options):
    return Page(write_report(run.results, progress=False, **options))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("a run"))


@pytest.fixture(scope="module")
def few(tmp_path_factory):
    """A smaller run, for tests that make several pages."""
    return make_run(tmp_path_factory.mktemp("a small run"), 12, 20, 5)


@pytest.fixture(scope="module")
def page(run, tmp_path_factory):
    return report(run, output=tmp_path_factory.mktemp("page") / "all.html", candidates=3)


@pytest.fixture(scope="module")
def matched(tmp_path_factory):
    """A run with real features of small pictures; its queries are crops of the first places."""
    root = tmp_path_factory.mktemp("matched")
    for i in range(6):
        write_picture(root / f"index/{i}.jpg", i, (200, 150))
    for i in range(3):
        whole = Image.open(root / f"index/{i}.jpg")
        (root / "query").mkdir(exist_ok=True)
        whole.crop((8, 6, 192, 146)).save(root / f"query/{i}.jpg", quality=90)
    for part, count in (("query", 3), ("index", 6)):
        lines = [f"{part}/{i}.jpg\n" for i in range(count)]
        (root / f"{part}.txt").write_text("".join(lines))
    places = np.arange(6)[:, None] * [100.0, 0.0]
    np.savez(root / "gt.npz", utmQ=places[:3], utmDb=places, posDistThr=25.0)
    for part in ("query", "index"):
        extract(SMALL, root / f"{part}.txt", root, root / part, device="cpu", progress=False)
    return root, SMALL


def match(matched, results, config=None, **options):
    root, usual = matched
    return rerank(
        config or usual,
        root / "query.txt",
        root / "index.txt",
        root / "query",
        root / "index",
        dataset_root=root,
        results_dir=results,
        device="cpu",
        progress=False,
        **options,
    )


# What a run writes down ------------------------------------------------------------------------


@pytest.mark.parametrize("with_truth", [True, False])
def test_run_record(matched, tmp_path, with_truth):
    root, config = matched
    (tmp_path / "run.json").write_text("of an earlier run")
    truth = root / "gt.npz" if with_truth else None
    result = match(matched, tmp_path, ground_truth=truth)
    record = read_run(tmp_path)
    assert record.origin.config == config
    assert record.query_names == result.query_names
    assert record.index_names == result.index_names
    np.testing.assert_array_equal(record.retrieved, result.retrieved)
    np.testing.assert_array_equal(record.reranked, result.reranked)
    np.testing.assert_allclose(record.patch_scores, result.patch_scores, rtol=1e-6)
    assert record.scores.keys() == result.scores.keys()
    for method, values in result.scores.items():
        np.testing.assert_array_equal(record.scores[method], values)
    assert record.origin.dataset_root == str(root)
    assert record.origin.query_list == str(root / "query.txt")
    assert record.origin.index_features == str(root / "index")
    assert record.origin.ground_truth == (str(truth) if truth else None)
    assert record.origin.threshold == (25.0 if truth else None)
    assert re.fullmatch("[0-9a-f]{64}", record.origin.checkpoint)
    assert record.origin.versions.keys() >= {"patchnetvlad", "python", "torch", "numpy"}
    assert record.origin == result.origin
    assert (record.n_values, record.citation) == (result.n_values, result.citation)
    if with_truth:
        again = evaluate(record, truth)
        assert again.keys() == result.metrics.keys() == {"NetVLAD", "PatchNetVLAD"}
        for method, metrics in again.items():
            np.testing.assert_array_equal(metrics.recalls, result.recalls[method])
    assert not list(tmp_path.glob("*.part"))


def test_run_record_is_made_absolute(matched, tmp_path, monkeypatch):
    root, config = matched
    monkeypatch.chdir(root)
    rerank(
        config, "query.txt", "index.txt", "query", "index",
        results_dir=tmp_path, device="cpu", progress=False,
    )  # fmt: skip
    record = read_run(tmp_path)
    assert record.origin.dataset_root == str(root)
    assert record.origin.query_features == str(root / "query")


def edit_json(name, value):
    def change(folder):
        content = json.loads((folder / "run.json").read_text())
        content[name] = value
        (folder / "run.json").write_text(json.dumps(content))

    return change


def edit_array(name, change):
    def apply(folder):
        with np.load(folder / "scores.npz") as content:
            arrays = dict(content)
        arrays[name] = change(arrays[name])
        if arrays[name] is None:
            del arrays[name]
        np.savez(folder / "scores.npz", **arrays)

    return apply


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda f: (f / "run.json").write_text("{"), "run.json"),
        (lambda f: (f / "run.json").write_text("[]"), "run.json"),
        (edit_json("format", "patchnetvlad run 9"), "run 9"),
        (edit_json("config", {"pooling": "??"}), "pooling"),
        (edit_json("config", 3), "config"),
        (edit_json("config", {"pooling": None}), "pooling"),
        (edit_json("config", {"resume_path": 3}), "resume_path"),
        (edit_json("config", {"patch_vlad": []}), "patch_vlad"),
        (edit_json("config", {"num_pcs": "many"}), "num_pcs"),
        (edit_json("config", {"patch_sizes": [2, "5"]}), "patch_sizes"),
        (edit_array("scores_NetVLAD", lambda a: a * np.nan), "NaN"),
        (edit_array("patch_scores", lambda a: a - np.inf), "infinities"),
        (edit_json("queries", 7), "7"),
        (edit_json("index", True), "index"),
        (edit_json("threshold", "far"), "threshold"),
        (edit_json("dataset_root", None), "dataset_root"),
        (lambda f: (f / "scores.npz").unlink(), "scores.npz"),
        (lambda f: (f / "scores.npz").write_bytes(b"PK"), "scores.npz"),
        (edit_array("retrieved", lambda a: a[:, 0]), "retrieved"),
        (edit_array("retrieved", lambda a: a + 99), "retrieved"),
        (edit_array("retrieved", lambda a: None), "retrieved"),
        (edit_array("reranked", lambda a: a[:, ::-1] * 0), "reranked"),
        (edit_array("patch_scores", lambda a: a[..., :1]), "patch_scores"),
        (edit_array("scores_NetVLAD", lambda a: a[:-1]), "scores_NetVLAD"),
        (edit_array("index_names", lambda a: a[:-9]), "names|index"),
    ],
)
def test_damaged_record(run, tmp_path, capsys, damage, says):
    folder = tmp_path / "results"
    shutil.copytree(run.results, folder)
    read_run(folder)
    damage(folder)
    if says == "names|index":  # cut within a name: still as many, of another name
        assert read_run(folder).index_names != run.index.names
        return
    with pytest.raises(ResultsError, match=says):
        read_run(folder)
    assert command.main([str(folder)]) == 2
    assert len(capsys.readouterr().err.strip().splitlines()) == 1
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        (("provenance", "checkpoint"), None, "checkpoint"),
        (("provenance", "ground_truth"), 3, "ground_truth"),
        (("provenance", "config", "pooling"), None, "config"),
        (("provenance", "date"), 3, "date"),
        (("methods", "NetVLAD"), 3, "NetVLAD"),
        (("methods", "NetVLAD", "recall"), {"1": None}, "recall@1"),
        (("methods", "NetVLAD", "recall"), {"1": "x"}, "recall@1"),
        (("methods", "NetVLAD", "recall"), {"1": 7}, "recall@1"),
        (("methods", "NetVLAD", "recall"), {"1": float("nan")}, "recall@1"),
        (("methods", "NetVLAD", "recall"), {"1": 10**400}, "damaged"),
        (("methods", "NetVLAD", "recall"), {"a": 0.5}, "'a'"),
        (("methods", "NetVLAD", "precision_recall"), 3, "precision_recall"),
        (("methods", "NetVLAD", "precision_recall", "best"), {"f1": 0.5}, "best"),
        (("methods", "NetVLAD", "precision_recall", "curve", "recall"), [2], "recall of the curve"),
    ],
)
@pytest.mark.parametrize("recorded", [True, False])
def test_damaged_metrics(run, tmp_path, capsys, path, value, says, recorded):
    folder = shutil.copytree(run.results, tmp_path / "results")
    if not recorded:
        (folder / "run.json").unlink()
    content = json.loads((folder / "metrics.json").read_text())
    place = content
    for name in path[:-1]:
        place = place[name]
    place[path[-1]] = value
    (folder / "metrics.json").write_text(json.dumps(content))
    words = ["--query_file_path", str(run.root / "query.txt"), "--dataset_root_dir", str(run.root)]
    if recorded and path[1] == "config":  # the run's own is in run.json
        assert command.main([str(folder), *words]) == 0
        return
    assert command.main([str(folder), *words]) == 2
    error = capsys.readouterr().err
    assert "metrics.json" in error
    assert says in error
    assert len(error.strip().splitlines()) == 1


# What the page says ----------------------------------------------------------------------------


def by_hand(run):
    """Work out each query's status, ranks and distance the slow way."""
    for q, where in enumerate(run.truth.utm_queries):
        away = [float(np.hypot(*(place - where))) for place in run.truth.utm_index]
        right = {i for i, distance in enumerate(away) if distance <= run.truth.threshold}
        before, after = list(run.retrieved[q]), list(run.reranked[q])
        was, now = before[0] in right, after[0] in right
        status = {(1, 1): "r", (0, 0): "w", (0, 1): "s", (1, 0): "h"}[was, now] if right else "n"
        ranks = [
            next((r for r, row in enumerate(rows, 1) if row in right), 0)
            for rows in (before, after)
        ]
        yield status, *ranks, away, right


def test_queries(run, page):
    data = page.data
    assert data["names"][: data["queries"]] == list(run.queries.names)
    expected = list(by_hand(run))
    assert data["status"] == "".join(status for status, *_ in expected)
    assert set(data["status"]) == set("rwshn")  # or this tests little
    assert data["before"] == [before for _, before, *_ in expected]
    assert data["after"] == [after for _, _, after, *_ in expected]
    assert all(type(rank) is int for rank in data["before"] + data["after"])
    answers = [data["names"][i] for i in data["answer"]]
    assert answers == [run.index.names[row] for row in run.reranked[:, 0]]
    np.testing.assert_allclose(data["score"], run.scores["PatchNetVLAD"][:, 0], rtol=1e-4)
    first = [away[run.reranked[q, 0]] for q, (*_, away, _) in enumerate(expected)]
    np.testing.assert_allclose(data["distance"], first, rtol=1e-4)


def test_candidates(run, page):
    rows = {name: i for i, name in enumerate(run.index.names)}
    for q, (details, (_, before, after, away, right)) in enumerate(
        zip(page.details(), by_hand(run), strict=True)
    ):
        shown = {}
        for image, was, now, netvlad, raw, sizes, distance, is_right in details["c"]:
            row = rows[page.data["names"][image]]
            shown[row] = (was, now)
            assert distance == pytest.approx(away[row], rel=1e-4)
            assert is_right == (row in right)
            if not was:  # not a candidate: the nearest right one, where none was found
                assert not before
                assert row == min(right, key=lambda i: away[i])
                continue
            assert run.retrieved[q, was - 1] == run.reranked[q, now - 1] == row
            assert netvlad == pytest.approx(run.scores["NetVLAD"][q, was - 1], rel=1e-4)
            assert raw == pytest.approx(run.scores["PatchNetVLAD"][q, now - 1], rel=1e-4)
            np.testing.assert_allclose(sizes, run.patch_scores[q, was - 1], rtol=1e-4)
        wanted = {*run.retrieved[q, :3], *run.reranked[q, :3]}
        if right:
            wanted.add(
                run.retrieved[q, before - 1] if before else min(right, key=lambda i: away[i])
            )
            if after:
                wanted.add(run.reranked[q, after - 1])
        assert set(shown) == wanted


def test_recalls_are_those_of_the_metrics(run, page):
    stored = json.loads((run.results / "metrics.json").read_text())["methods"]
    for method in stored.values():
        for n, value in method["recall"].items():
            ends = method["intervals"]["recall"][n], wilson_interval(round(value * 40), 40)
            small = "".join(f"{100 * low:.1f}\u2013{100 * high:.1f}" for low, high in ends)
            assert f"{100 * value:.1f}{small}" in page.text, n
        assert f"bootstrap over {method['intervals']['drawn']}" in page.text
        low, high = method["intervals"]["average_precision"]
        assert f"{100 * low:.1f}\u2013{100 * high:.1f}" in page.text
    counts = Counter(page.data["status"])
    right = counts["r"] + counts["s"]
    assert f"The first answer is right for {right} ({100 * right / 40:.1f} %)" in page.text
    assert "ab" * 32 in page.text
    assert str(run.root) in page.text


def test_wilson_interval():
    from scipy.stats import binomtest

    for right, total in ((0, 5), (27, 33), (5, 5), (1, 7000)):
        exact = binomtest(right, total).proportion_ci(method="wilson")
        assert wilson_interval(right, total) == pytest.approx((exact.low, exact.high), abs=1e-12)
    assert wilson_interval(0, 0) == (0.0, 1.0)


def test_names_are_data(few, tmp_path):
    """Whatever a name holds, it is no markup, no script and no placeholder."""
    title = "</title><script>alert(1)</script>{{data}}"
    plain = report(few, output=tmp_path / "plain.html")
    page = report(few, output=tmp_path / "odd.html", title=title)
    assert title in page.text
    tags = [tag for tag, _ in page.elements]
    assert tags == [tag for tag, _ in plain.elements]
    for name in NASTY:
        assert f"query/{name}" in page.data["names"]
    source = (tmp_path / "odd.html").read_bytes()
    assert b"<img" not in source
    assert b"onerror" in source  # in a name
    for block, text in page.scripts.items():
        if block not in ("script", "style"):
            assert not re.search("[<>&\u2028]", text), block
    assert json.loads(json_block(list(NASTY))) == list(NASTY)


def test_page_loads_nothing(page):
    for tag, attributes in page.elements:
        for name, value in attributes.items():
            assert name not in ("src", "srcset", "action", "style"), tag
            assert not name.startswith("on"), (tag, name)
            if name == "href":
                assert value.startswith(("#", "data:,")), value
    (policy,) = (a["content"] for _, a in page.elements if a.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "eval(" not in page.scripts["script"]
    assert "innerHTML" not in page.scripts["script"]


def test_references_of_elements(page):
    """Labels point at elements that are there, and no two have one id."""
    ids = [a["id"] for _, a in page.elements if "id" in a]
    assert len(ids) == len(set(ids))
    for tag, attributes in page.elements:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids), tag
        if tag == "use":
            assert attributes["href"][1:] in ids
        if tag == "a":
            assert attributes["href"][1:] in ids


@pytest.mark.parametrize(
    ("names", "folder"),
    [
        (["a/b/q.jpg", "a/b/i.jpg"], "a/b/"),
        (["a/bc/q.jpg", "a/bd/i.jpg"], "a/"),
        (["query/1.jpg", "index/1.jpg"], ""),
        (["/data/x/1.jpg"], "/data/x/"),
        (["a/b", "a/b"], "a/"),
        (["a/b", "a/b/c"], "a/"),
        (["1.jpg", "2.jpg"], ""),
    ],
)
def testcommon_folder(names, folder):
    assert common_folder(names) == folder


def test_same_results_same_bytes(few, tmp_path):
    pages = [write_report(few.results, tmp_path / f"{i}.html", progress=False) for i in (0, 1)]
    assert pages[0].read_bytes() == pages[1].read_bytes()


# Pictures --------------------------------------------------------------------------------------


def test_pictures_are_those_of_the_images(run, page):
    def mean(image):
        return np.asarray(image.convert("RGB"), dtype=float).mean(axis=(0, 1))

    large = page.large()
    assert len(large) == len(page.data["names"])
    for image in (0, 5, 17, 40, len(page.data["names"]) - 1):
        original = Image.open(run.root / page.data["names"][image])
        for text in (page.small(image), large[image]):
            shown = Image.open(io.BytesIO(base64.b64decode(text)))
            assert shown.get_format_mimetype() == page.data["media"]
            assert max(shown.size) <= 480
            assert page.data["ratios"][image] == pytest.approx(4 / 3, abs=0.02)
            np.testing.assert_allclose(mean(shown), mean(original), atol=6)


def test_size_is_bounded(run, tmp_path, caplog):
    sizes = []
    for max_mb in (2, 0.4, 0.25, 0.16):
        file = write_report(run.results, tmp_path / "small.html", max_mb=max_mb, progress=False)
        sizes.append(file.stat().st_size)
        assert sizes[-1] <= max_mb * 1e6
        page = Page(file)
        assert "images have a small picture (" in page.text
        shown = sum(page.small(i) is not None for i in range(len(page.data["names"])))
        assert shown == len(page.data["names"]) or "have no picture, for lack of room" in page.text
    assert sizes[0] > sizes[-1] > 0.1e6
    with pytest.raises(ResultsError, match=r"\b0\.\d MB\b.*--max_mb.*\b0\.02\b"):
        write_report(run.results, tmp_path / "small.html", max_mb=0.02, progress=False)
    assert (tmp_path / "small.html").stat().st_size == sizes[-1]  # the last good one


def test_images_that_are_missing_or_broken(tmp_path):
    run = make_run(tmp_path, 12, 20, 5, nasty=False)
    (tmp_path / "query/00003.jpg").unlink()
    (tmp_path / "query/00004.jpg").write_bytes(b"no picture")
    page = report(run)
    assert page.small(3) is page.small(4) is None
    assert page.small(5) is not None
    assert f"2 of {len(page.data['names'])} images cannot be shown" in page.text
    shutil.move(tmp_path / "index", tmp_path / "elsewhere" / "index")
    shutil.move(tmp_path / "query", tmp_path / "elsewhere" / "query")
    page = report(run)
    assert all(page.small(i) is None for i in range(12)) if "small-0" in page.scripts else True
    assert not page.large()
    page = report(run, dataset_root=tmp_path / "elsewhere")
    assert page.small(5) is not None


# What may be missing ---------------------------------------------------------------------------


def test_without_features(page):
    assert "Matched patches are not drawn: " in page.text
    assert all("m" not in details for details in page.details())


def test_without_ground_truth(tmp_path):
    run = make_run(tmp_path, 12, 20, 5, truth=False)
    page = report(run)
    changed = run.reranked[:, 0] != run.retrieved[:, 0]
    assert page.data["status"] == "".join("c" if c else "u" for c in changed)
    assert page.data["before"] is page.data["distance"] is page.data["map"] is None
    assert "There is no ground truth" in page.text
    assert page.text.index("Answers") < page.text.index("Where this comes from")
    assert "Recall" not in page.text.split("Answers")[0]
    assert page.data["usual"] == []  # of weights by chance
    assert f"changed the first answer of {changed.sum()}" in page.text


def test_units(tmp_path):
    """Distances have a unit, and numbers of clips are no distances."""
    run = make_run(tmp_path, 12, 20, 5)
    assert report(run).data["unit"] == "m"
    rng = np.random.default_rng(0)
    clips = [1000.0 * rng.integers(0, 3, n) for n in (12, 20)]
    frames = [np.stack([x, rng.integers(0, 40, len(x))], axis=1) for x in clips]
    np.savez(tmp_path / "clips.npz", utmQ=frames[0], utmDb=frames[1], posDistThr=2)
    page = report(run, ground_truth=tmp_path / "clips.npz", threshold=2)
    assert page.data["unit"] == "frames"
    assert "within 2 frames of the query, in the same clip" in page.text
    best = run.reranked[:, 0]
    same = clips[0] == clips[1][best]
    away = np.abs(frames[0][:, 1] - frames[1][best, 1])
    assert page.data["distance"] == [a if ok else None for a, ok in zip(away, same, strict=True)]
    assert page.data["map"]["clips"] == 3
    # What is known of whole numbers is what the file says.
    whole = np.arange(20.0)[:, None]
    np.savez(tmp_path / "whole.npz", utmQ=whole[:12], utmDb=whole, posDistThr=2)
    assert report(run, ground_truth=tmp_path / "whole.npz").data["unit"] == ""
    np.savez(tmp_path / "said.npz", utmQ=whole[:12], utmDb=whole, posDistThr=2, unit="m")
    assert report(run, ground_truth=tmp_path / "said.npz").data["unit"] == "m"


def test_what_is_usual_is_measured_on_the_run(run, page):
    (usual,) = page.data["usual"]
    right = np.array([
        np.isin(row, of) for row, of in zip(run.reranked, run.truth.positives(), strict=True)
    ])  # fmt: skip
    scores = run.scores["PatchNetVLAD"]
    first = scores[:, 0]
    for name, mask in (("right", right[:, 0]), ("wrong", ~right[:, 0])):
        assert usual[name]["pairs"] == mask.sum() > 0
        expected = np.quantile(first[mask], (0.1, 0.5, 0.9))
        np.testing.assert_allclose(usual[name]["score"], expected)
    wrong = [next(s for s, ok in zip(*row, strict=True) if not ok)
             for row in zip(scores, right, strict=True) if not row[1].all()]  # fmt: skip
    np.testing.assert_allclose(usual["best_wrong"]["score"], np.quantile(wrong, (0.1, 0.5, 0.9)))
    grids = patch_grids(run.config.match_image_size, run.config.patch_sizes, run.config.strides)
    assert page.data["patches"] == [len(grid) for grid in grids]
    middle = f"{usual['right']['score'][1]:.3f}"
    assert "What scores mean" in page.text
    assert f"Right first answers ({right[:, 0].sum()}){middle}" in page.text


def test_without_patches(tmp_path):
    run = make_run(tmp_path, 12, 20, 5, patches=False)
    page = report(run)
    assert page.data["after"] is None
    assert set(page.data["status"]) <= set("rwn")
    assert page.data["sizes"] == []
    np.testing.assert_allclose(page.data["score"], run.scores["NetVLAD"][:, 0], rtol=1e-4)
    assert "Patch-NetVLAD" not in page.text


def test_ground_truth_that_is_gone(tmp_path, capsys):
    run = make_run(tmp_path, 12, 20, 5)
    (tmp_path / "gt.npz").rename(tmp_path / "moved.npz")
    page = report(run)
    assert "Right and wrong are not known: " in page.text
    assert "Recall@N over all queries" in page.text  # from metrics.json
    assert report(run, ground_truth=tmp_path / "moved.npz").data["before"] is not None
    assert command.main([str(run.results), "--ground_truth_path", str(tmp_path / "gt.npz")]) == 2
    assert "gt.npz" in capsys.readouterr().err
    assert command.main([str(run.results), "--posDistThr", "9"]) == 2  # it would have no effect
    assert "gt.npz" in capsys.readouterr().err


def test_another_threshold(few, tmp_path):
    page = report(few, output=tmp_path / "r.html", threshold=60.0)
    other = replace(few, truth=replace(few.truth, threshold=60.0))
    assert page.data["status"] == "".join(status for status, *_ in by_hand(other))
    assert "the ground truth is another one" not in page.text
    page = report(other, output=tmp_path / "r.html", ground_truth=few.root / "gt.npz")
    assert page.data["threshold"] == 25.0
    edit_json("threshold", 60.0)(shutil.copytree(few.results, tmp_path / "results"))
    moved = replace(other, results=tmp_path / "results")
    page = report(moved, ground_truth=few.root / "gt.npz")  # the run's own distance
    assert page.data["threshold"] == 60.0


def test_ground_truth_that_changed(tmp_path):
    run = make_run(tmp_path, 12, 20, 5)
    replace(run.truth, utm_queries=run.truth.utm_queries + 1e6).save(tmp_path / "gt.npz")
    assert "the ground truth is another one" in report(run).text


def test_results_without_a_record(run, page, tmp_path):
    """Of the research code, or of an earlier version."""
    folder = tmp_path / "old"
    folder.mkdir()
    for file in ("NetVLAD_predictions.txt", "PatchNetVLAD_predictions.txt", "metrics.json"):
        shutil.copy(run.results / file, folder)
    old = replace(run, results=folder)
    given = {
        "query_list": run.root / "query.txt",
        "index_list": run.root / "index.txt",
        "dataset_root": run.root,
        "ground_truth": run.root / "gt.npz",
    }
    full = report(old, **given, candidates=3)
    for key in ("names", "status", "before", "after", "answer", "distance"):
        assert full.data[key] == page.data[key], key
    assert full.data["score"] is None
    assert "There is no run.json" in full.text

    with pytest.raises(
        ResultsError, match=r"NetVLAD_predictions\.txt, line \d+ .*--query_file_path"
    ):
        report(old)  # names that hold the separator
    for file in folder.glob("*.txt"):
        lines = file.read_text().split("\n")[:-1]
        file.write_text("".join(f"{line}\n" for line in lines if ", c" not in line))
    # Every query has to have as many candidates.
    with pytest.raises(
        ResultsError,
        match=r"NetVLAD_predictions\.txt: .*\b\d+ to \d+ candidates.*--query_file_path",
    ):
        report(old)


def test_predictions_alone(tmp_path, capsys):
    run = make_run(tmp_path / "whole", 12, 20, 5, nasty=False)
    folder = tmp_path / "alone"
    folder.mkdir()
    shutil.copy(run.results / "NetVLAD_predictions.txt", folder)
    page = report(replace(run, results=folder), dataset_root=run.root)
    assert [page.data["names"][i] for i in page.data["answer"]] == [
        run.index.names[row] for row in run.retrieved[:, 0]
    ]
    assert page.small(0) is not None
    assert "The index list is not known" in page.text
    words = [str(folder), "--ground_truth_path", str(run.root / "gt.npz")]
    assert command.main(words) == 2
    assert "--index_file_path" in capsys.readouterr().err
    words += ["--index_file_path", str(run.root / "index.txt"), "--output", str(tmp_path / "r")]
    assert command.main([*words, "--dataset_root_dir", str(run.root)]) == 0
    assert Page(tmp_path / "r").data["before"] is not None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["nowhere"], "nowhere; "),
        (["."], "results"),
        (["{results}", "--candidates", "0"], "candidates = 0"),
        (["{results}", "--max_mb", "0"], "max_mb = 0"),
        (["{results}", "--max_mb", "nan"], "max_mb = nan"),
        (["{results}", "--device", "cuda:99"], "cuda:99"),
        (["{results}", "--posDistThr", "-1"], "-1;"),
        (["{results}", "--posDistThr", "nan"], " nan"),
        (["{results}", "--posDistThr", "inf"], " inf"),
        (["{results}", "--query_input_features_dir", "nowhere"], "nowhere"),
        (["{results}", "--output", "."], "error: . "),
        (["{results}", "--query_file_path", "{root}/index.txt"], "60 images"),
        (["{results}", "--config_path", "storage"], "patch sizes"),
        (["{results}", "--output", "nowhere/r.html"], "nowhere/r.html "),
    ],
)
def test_bad_input(run, tmp_path, monkeypatch, capsys, words, says):
    monkeypatch.chdir(tmp_path)
    words = [word.format(results=run.results, root=run.root) for word in words]
    assert command.main(words) == 2
    error = capsys.readouterr().err
    (line,) = error.strip().splitlines()
    assert line.startswith("error: ")
    assert says in line


# What is given in place of the run's -----------------------------------------------------------


def with_protocol(run, folder):
    shutil.copytree(run.results, folder)
    edit_json("protocol", "some benchmark")(folder)
    edit_json("citation", "R@1 as they were")(folder)
    return replace(run, results=folder)


def test_page_of_other_ground_truth(few, tmp_path):
    copy = with_protocol(few, tmp_path / "results")
    before = report(copy)
    assert before.text.count("some benchmark") > 1  # the title, and where it comes from
    assert "R@1 as they were" in before.text
    sha256 = "SHA-256 of the ground truth"
    assert sha256 in before.text
    shutil.copy(few.root / "gt.npz", tmp_path / "moved.npz")
    page = report(copy, ground_truth=tmp_path / "moved.npz")
    assert "R@1 as they were" in page.text
    assert sha256 in page.text
    assert "moved.npz" in page.text
    other = replace(few.truth, utm_queries=few.truth.utm_queries[::-1]).save(tmp_path / "o_gt.npz")
    for given in ({"ground_truth": other, "threshold": 9.0}, {"threshold": 9.0}):
        page = report(copy, **given)
        assert "some benchmark" not in page.text
        assert "R@1 as they were" not in page.text
        name = "o_gt.npz" if "ground_truth" in given else "gt.npz"
        assert f"Ground truth {name}, distance 9, in place of the run's." in page.text
        assert (sha256 in page.text) == ("ground_truth" not in given)


def test_page_of_other_lists(few, tmp_path):
    copy = with_protocol(few, tmp_path / "results")
    page = report(copy, query_list=few.root / "query.txt")
    assert "R@1 as they were" in page.text
    names = (few.root / "index.txt").read_text().split("\n")[:-1]
    (tmp_path / "other.txt").write_text("".join(f"{name}\n" for name in reversed(names)))
    page = report(copy, index_list=tmp_path / "other.txt")
    assert "R@1 as they were" not in page.text
    assert "some benchmark" not in page.text
    assert "Index list other.txt in place of the run's." in page.text
    assert "20 images, other.txt" in page.text
    assert "SHA-256 of the index list" not in page.text
    assert "SHA-256 of the query list" in page.text


def test_stored_curves_go_with_their_ground_truth(few, tmp_path):
    folder = tmp_path / "old"
    shutil.copytree(few.results, folder, ignore=shutil.ignore_patterns("run.json", "scores.npz"))
    old = replace(few, results=folder)
    given = {
        "query_list": few.root / "query.txt",
        "index_list": few.root / "index.txt",
        "dataset_root": few.root,
    }
    curves = "Best F1"
    assert curves in report(old, **given).text
    assert curves in report(old, **given, ground_truth=few.root / "gt.npz").text
    assert curves not in report(old, **given, ground_truth=few.root / "gt.npz", threshold=9).text
    other = replace(few.truth, utm_queries=few.truth.utm_queries[::-1]).save(tmp_path / "gt.npz")
    page = report(old, **given, ground_truth=other)
    assert curves not in page.text
    assert "Recall@N over all queries" in page.text


def test_another_configuration(few, tmp_path):
    options = {"output": tmp_path / "r.html", "matches": 0}
    same = replace(
        few.config, resume_path="elsewhere/mapillary_WPCA", matcher="spatialApproximator"
    )
    page = report(few, config=replace(same, source="given.ini"), **options)
    assert "Configuration given.ini in place of the run's" in page.text
    assert "chance.ini" in page.text
    for other in ({"num_pcs": 512}, {"resume_path": "pittsburgh_WPCA"}):
        with pytest.raises(
            ResultsError, match=r"chance\.ini .*\bmapillary_WPCA with num_pcs = 128"
        ):
            report(few, config=replace(few.config, **other), **options)


def test_given_candidates(few, tmp_path):
    folder = shutil.copytree(few.results, tmp_path / "results")
    edit_json("candidates", "/somewhere/their.npy")(folder)
    with np.load(folder / "scores.npz") as content:
        arrays = {name: of for name, of in content.items() if name != "scores_NetVLAD"}
    np.savez(folder / "scores.npz", **arrays)
    page = report(replace(few, results=folder))
    assert "Given candidates" in page.text
    assert "Candidates are another method's, of their.npy" in page.text
    assert not re.search(r"(?<!Patch-)(?<!that )NetVLAD(?!s)", page.text)


# Files -----------------------------------------------------------------------------------------


def test_output_through_a_link(few, tmp_path):
    (tmp_path / "there").mkdir()
    link = tmp_path / "r.html"
    link.symlink_to("there/r.html")
    for _ in range(2):  # nothing is there; something is
        report(few, output=link)
        assert link.is_symlink()
        assert (tmp_path / "there/r.html").stat().st_size > 1e5


@pytest.mark.parametrize("name", ["run.json", "scores.npz", "metrics.json", "a_predictions.txt"])
def test_output_is_no_result(run, tmp_path, name):
    before = (run.results / "run.json").read_bytes()
    link = tmp_path / "link.html"
    link.symlink_to(run.results / name)
    for output in (run.results / name, link):
        with pytest.raises(OutputError, match=f"{output} "):
            report(run, output=output)
    assert (run.results / "run.json").read_bytes() == before
    assert not list(run.results.glob("*.part"))


def test_output_that_is_no_file(run, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    replace_text(tmp_path / ("x" * 253), ["text"])  # a name may be as long as the system allows
    for name in ("pipe", "loop", "x" * 300):
        with pytest.raises(OutputError, match=f"{tmp_path / name} "):
            report(run, output=tmp_path / name)
        with pytest.raises(OutputError, match=f"{tmp_path / name} "):
            replace_text(tmp_path / name, ["text"])
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


def test_a_new_match_removes_the_old_report(matched, tmp_path):
    (tmp_path / "report.html").write_text("old")
    match(matched, tmp_path)
    assert not (tmp_path / "report.html").exists()


# Matched patches -------------------------------------------------------------------------------


@pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
def test_lines(matched, tmp_path, matcher):
    root, config = matched
    config = replace(config, matcher=matcher)
    result = match(matched, tmp_path, config, ground_truth=root / "gt.npz")
    page = Page(write_report(tmp_path, device="cpu", progress=False))
    grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)
    rows = {name: i for i, name in enumerate(result.index_names)}
    for q, details in enumerate(page.details()):
        lines = {rows[page.data["names"][details["c"][m[0]][0]]]: m[1:] for m in details["m"]}
        assert set(lines) >= {result.reranked[q, 0], result.retrieved[q, 0]}
        for row, sizes in lines.items():
            place = list(result.retrieved[q]).index(row)
            total = sum(count for count, *_ in sizes)
            assert sum(few for *_, few in sizes) == min(total, 15)
            for s, ((count, ends, few), grid) in enumerate(zip(sizes, grids, strict=True)):
                assert few <= len(ends) // 4 == min(count, 60)
                assert all(0 <= value <= 1000 for value in ends)
                if matcher == "RANSAC":  # the score says how many there are
                    score = result.patch_scores[q, place, s]
                    assert count == pytest.approx(-score * len(grid), abs=1e-3)
        # A query is a crop of its place: the lines of the first answer join equal places.
        ends = np.array(lines[q][0][1]).reshape(-1, 4) / 1000
        if matcher == "RANSAC":
            crop = np.array([8, 6, 192, 146]) / [200, 150, 200, 150]
            moved = crop[:2] + ends[:, :2] * (crop[2:] - crop[:2])
            assert np.abs(moved - ends[:, 2:]).max() < 0.25
    assert page.data["inliers"] == (matcher == "RANSAC")


def test_lines_of_feature_maps_and_of_moved_features(matched, tmp_path):
    root, config = matched
    config = replace(config, local_features="map")
    for part in ("query", "index"):
        extract(config, root / f"{part}.txt", root, tmp_path / part, device="cpu", progress=False)
    results = tmp_path / "results"
    rerank(
        config, root / "query.txt", root / "index.txt", tmp_path / "query", tmp_path / "index",
        dataset_root=root, results_dir=results, device="cpu", progress=False,
    )  # fmt: skip
    page = Page(write_report(results, device="cpu", progress=False))
    drawn = [details["m"] for details in page.details()]
    shutil.move(tmp_path / "query", tmp_path / "elsewhere")
    page = Page(write_report(results, device="cpu", progress=False))
    assert "Matched patches are not drawn: " in page.text
    page = Page(
        write_report(results, query_features=tmp_path / "elsewhere", device="cpu", progress=False)
    )
    assert [details["m"] for details in page.details()] == drawn


def test_as_many_lines_as_asked_for(matched, tmp_path):
    root, _ = matched
    match(matched, tmp_path, ground_truth=root / "gt.npz")
    page = Page(write_report(tmp_path, matches=1, device="cpu", progress=False))
    assert sum("m" in details for details in page.details()) == 1
    assert "Matched patches are drawn for 1 of 3 queries" in page.text
    page = Page(write_report(tmp_path, matches=0, device="cpu", progress=False))
    assert not any("m" in details for details in page.details())
