# SPDX-License-Identifier: MIT
"""benchmarks/scale.py: made-up descriptors, indexes as the package builds them, the plan."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import scale  # noqa: E402
import scale_cells  # noqa: E402
import scale_plan  # noqa: E402
import scale_report  # noqa: E402

from patchnetvlad.search import index as search_index  # noqa: E402

KINDS = ("Flat", "IVF64,SQfp16", "IVF64,RaBitQ,Refine(SQfp16)", "IVF64,PQ4x4", "HNSW8",
         "RR128,IVF64,RaBitQ")  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    made = scale.Descriptors(tmp_path_factory.mktemp("scale"), 128)
    made.make(2000)
    return made


# Made-up descriptors ----------------------------------------------------------------------------


def test_descriptors_are_those_of_their_seed_and_resemble_real_ones():
    images, queries = scale.streets(0, 128)
    assert images.shape == (10_000, 128)
    assert queries.shape == (500, 128)
    assert images.dtype == queries.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(images, axis=1), 1, atol=1e-5)
    assert np.array_equal(images, scale.streets(0, 128)[0])
    assert not np.array_equal(images, scale.streets(1, 128)[0])
    found, real = scale.statistics(128), scale_report.REAL
    assert set(found) == set(real)
    for name in ("mean 1", "mean 2", "mean 5", "mean 10", "mean other", "spread 1", "spread other"):
        assert found[name] == pytest.approx(real[name], abs=0.03), name
    for name in ("distance 1", "distance 10", "distance 100"):
        assert found[name] == pytest.approx(real[name], abs=0.1), name


def test_blocks_are_made_once_and_go_on(tmp_path):
    made = scale.Descriptors(tmp_path, 16)
    made.make(10_001)
    first = made.read(0, 5)
    assert made.file.stat().st_size == 2 * 10_000 * 16 * 4
    made.make(5)
    assert made.file.stat().st_size == 2 * 10_000 * 16 * 4
    with made.file.open("ab") as file:  # an interrupted block
        file.write(b"half")
    made.make(20_001)
    assert made.file.stat().st_size == 3 * 10_000 * 16 * 4
    assert np.array_equal(made.read(0, 5), first)
    assert np.array_equal(made.read(20_000, 10_000), scale.streets(2, 16)[0])


def test_queries_are_along_the_first_streets(data):
    queries, places = data.queries(50, among=2000)
    assert places.min() >= 0
    assert places.max() < 2000
    rows = data.read(0, 2000)
    similarities = queries @ rows.T
    around = np.take_along_axis(similarities, places, axis=1)
    # As similar as neighbours, the inner two, and those two apart, the outer two, are.
    np.testing.assert_allclose(around.mean(axis=0), [0.26, 0.45, 0.45, 0.26], atol=0.08)
    assert similarities.mean() < 0.05


# Indexes ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("factory", KINDS)
def test_indexes_are_built_as_the_package_builds_them(data, factory, monkeypatch):
    monkeypatch.setattr(scale, "READ", 700)  # several blocks
    built, seconds = scale.build(data.file.parent, data, 2000, factory)
    package = search_index.build_index(data.read(0, 2000), factory, gpu=False)
    queries, _ = data.queries(20, among=2000)
    for index in (built, package):
        search_index.set_search_parameters(index, 10, index.ntotal)
    assert built.ntotal == 2000
    assert set(seconds) <= set(scale_cells.STAGES)
    ours, theirs = built.search(queries, 10)[1], package.search(queries, 10)[1]
    if factory == "HNSW8":  # whose graph depends on the blocks that are added
        assert np.mean([len(np.intersect1d(a, b)) for a, b in zip(ours, theirs, strict=True)]) > 9
    else:
        assert np.array_equal(ours, theirs)


def test_measured_recalls_are_those_of_their_definition(data):
    built, _ = scale.build(data.file.parent, data, 2000, "IVF64,Flat")
    queries, places = data.queries(40, among=2000)
    nearest = np.argsort(-queries @ data.read(0, 2000).T, axis=1)[:, : scale.TOP]
    rows, found = scale.search(built, queries, places, nearest)
    assert found.shape == nearest.shape
    assert rows[0]["package"]
    assert not any(row["package"] for row in rows[1:])
    every = next(row for row in rows if row["settings"] == {"nprobe": 64})
    assert every["recall 1"] == every["recall 100"] == every["overlap"] == 1
    right = [len(np.intersect1d(a, b)) > 0 for a, b in zip(nearest, places, strict=True)]
    assert every["place 100"] == np.mean(right)
    assert rows[0]["overlap"] < 1
    assert rows[0]["recall 1"] <= rows[0]["recall 10"] <= rows[0]["recall 100"] <= 1


# The whole --------------------------------------------------------------------------------------


def test_measuring_goes_on_where_it_stopped(tmp_path, capsys):
    words = [
        "--sizes", "2000", "--kinds", "Refine", "--queries", "20",
        "--work", str(tmp_path / "work"), "--output", str(tmp_path),
    ]  # fmt: skip
    assert scale.main(words) == 0
    assert capsys.readouterr().err.count("\n") == 2
    first = json.loads((tmp_path / "scale.json").read_text())
    factory = "IVF64,RaBitQ,Refine(SQfp16)"
    assert list(first["cells"]) == ["128 2000 Flat", f"128 2000 {factory}"]
    assert first["cells"]["128 2000 Flat"]["bytes"] == pytest.approx(512, abs=1)
    assert scale.main(words) == 0
    assert capsys.readouterr().err == ""  # no cell is measured again
    assert json.loads((tmp_path / "scale.json").read_text())["cells"] == first["cells"]
    assert f"`{factory}`" in (tmp_path / "scale.md").read_text()
    for name in ("scale.png", "scale_recall.png"):
        assert (tmp_path / name).stat().st_size > 10_000
    with pytest.raises(SystemExit, match=r"scale\.json .*\b20\b"):
        scale.main([*words, "--queries", "30"])


def test_fit_of_a_power_law():
    exact = scale_cells.fit([(n, 3e-6 * n**1.25) for n in (1e4, 1e5, 1e6)])
    assert exact.exponent == pytest.approx(1.25)
    assert exact.error == pytest.approx(0, abs=1e-9)
    assert exact(1e7) == pytest.approx(3e-6 * 1e7**1.25)
    bent = scale_cells.fit([(1e4, 1.0), (1e5, 20.0), (1e6, 100.0)])
    # By hand: slope 1 of the decades, rests (-0.1, 0.2, -0.1) / decade
    assert bent.exponent == pytest.approx(1)
    rests = np.log10([1, 20, 100]) - (np.log10([1, 20, 100]).mean() + np.array([-1, 0, 1]))
    assert bent.error == pytest.approx(np.sqrt((rests**2).sum() / 2))
    assert scale_cells.fit([(1e4, 1.0), (1e5, 20.0)]) is None


def test_tables_are_what_was_measured():
    results, cells = scale_cells.load(BENCHMARKS)
    assert (BENCHMARKS / "scale.md").read_text() == scale_report.table(results, cells)
    text = scale_report.DOCS.read_text()
    assert text.count("<!-- scale.py") == text.count("<!-- end -->") > 10
    assert scale_report.filled(text, BENCHMARKS) == text


# The plan ---------------------------------------------------------------------------------------


def test_features_have_the_size_that_was_measured():
    bench = json.loads((BENCHMARKS / "bench.json").read_text())
    for row in bench["disk disk"]["rows"]:
        kind = row["program"].removeprefix("ours, ")
        if kind in ("float32", "float16", "int8", "map"):
            each = scale_plan.feature_bytes(4096, kind, bench) + 4 * 4096
            assert row["bytes"] == pytest.approx(each, rel=0.003), kind


def planned(words: str) -> str:
    return scale_plan.plan(words.split())


def test_plan_by_hand():
    text = planned(
        "--images 1e7 --dimension 512 --kind float16 --price_core_hour 2 --price_gb_month 3"
    )
    assert "| local features, `float16` | 958 kB | 9.58 TB |" in text
    assert "| `globalfeats.npy` | 2.05 kB | 20.5 GB |" in text
    bench = json.loads((BENCHMARKS / "bench.json").read_text())
    rows = bench["extract speed-K16"]["rows"]
    (each,) = [row["cpu_seconds"] for row in rows if row["program"] == "ours, fast"]
    hours = each * 1e7 / 3600
    line = f"| {each:.2f} | {float(f'{hours:.3g}'):,.0f} | {hours / 24 / 64:.1f} |"
    assert f"| CPU, `precision = fast` {line}" in text
    assert f"{hours:,.0f} core-hours x price | {2 * hours:,.0f} |" in text
    stored = (936 * 512 * 2 + 2048 + 2048 + 200) * 1e7 / 1e9
    assert f"{stored:,.0f} GB x price | {3 * stored:,.0f} |" in text
    assert "not measured" in text


def test_plan_of_a_measured_size_is_the_measurement():
    _, cells = scale_cells.load(BENCHMARKS)
    cell = [c for c in cells if (c.dimension, c.kind) == (128, "IVF,SQfp16")][-1]

    def fields(words: str) -> list[str]:
        text = planned(f"{words} --dimension 128 --part indexes")
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `{cell.kind}`")]
        return [field.strip() for field in line.strip("|").split("|")]

    found = fields(f"--images {cell.count}")
    assert found[1] == scale_plan.size(cell.found["bytes"] * cell.count)
    assert found[3:6] == [
        scale_plan.hours(cell.build),
        scale_cells.core(cell.own["seconds"]),
        f"{cell.own['recall 1']:.2f}",
    ]
    assert found[8:] == [f"{cell.count:,}", ""]
    # Ten shards of that size cost ten times as much.
    found = fields(f"--images {10 * cell.count} --shard {cell.count}")
    assert found[3:5] == [
        scale_plan.hours(10 * cell.build),
        scale_cells.core(10 * cell.own["seconds"]),
    ]
    # Beyond it, lists are searched for a time that grows as N, and descriptors assigned as N^1.5.
    found = fields(f"--images {4 * cell.count} --shard {4 * cell.count}")
    assert found[4] == scale_cells.core(4 * cell.own["seconds"])
    stages = cell.found["build"]
    seconds = 4 * (stages["lists"] + stages["train"] + stages["add"]) + 8 * stages["assign"]
    assert found[3] == scale_plan.hours(seconds)
    assert found[9] == "4"


def test_plan_refuses_what_it_does_not_know(capsys):
    with pytest.raises(SystemExit):
        scale_plan.plan(["--images", "1e7", "--dimension", "77"])
    assert re.search(r"error: .*--dimension.*\b77\b", capsys.readouterr().err)
    with pytest.raises(SystemExit):
        scale_plan.plan(["--images", "0"])
    assert "error: --images " in capsys.readouterr().err
    assert "Nothing was measured" in planned("--images 1000 --dimension 512 --part indexes")
