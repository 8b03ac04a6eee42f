# SPDX-License-Identifier: MIT
"""The benchmark for GPUs, tried without one: rows are kept, stages are apart, little is needed."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
NOT_NEEDED = (
    *("pyproj", "ray", "h5py", "hypothesis", "mkdocs", "moto", "s3fs", "boto3", "playwright"),
    *("nbformat", "pytest_timeout", "mypy", "ruff", "kapture"),
)

BLOCKER = f"""
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {NOT_NEEDED!r}:
            with open({{marks!r}}, "a") as file:
                file.write(name + chr(10))
            raise ModuleNotFoundError(f"No module named {{{{name!r}}}}", name=name)

sys.meta_path.insert(0, Blocked())
open({{marks!r}}, "a").close()
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


def run_gpu(*words, **environment) -> subprocess.CompletedProcess[str]:
    paths = [environment.pop("first", ""), str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, words)],
        env={**os.environ, **environment, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )


def stages(folder: Path) -> dict:
    return json.loads((folder / "gpu.json").read_text())["stages"]


# The record and its table ------------------------------------------------------------------------


@pytest.fixture
def record(tmp_path):
    from gpu_table import Record

    return Record.begin(tmp_path, {"device": "a device"})


class TestRecord:
    def test_every_row_is_in_both_files_at_once(self, record):
        record.stage("extraction", status="running")
        record.put("extraction", {"case": "speed", "program": "ours", "images_per_second": 812.5})
        assert record.rows("extraction")[0]["images_per_second"] == 812.5
        assert "| speed | ours | 812 |" in (record.folder / "gpu.md").read_text()

    def test_a_row_of_the_same_case_and_program_is_replaced(self, record):
        for count in (1, 2):
            record.put("tests", {"case": "all", "program": "cuda", "passed": count})
        assert [row["passed"] for row in record.rows("tests")] == [2]

    def test_a_stage_that_never_ended_is_cut_off(self, record):
        record.stage("reranking", status="running")
        record.put("reranking", {"case": "a", "program": "b", "milliseconds": 1.0})
        assert "| Re-ranking | cut off after 1 rows |" in (record.folder / "gpu.md").read_text()

    def test_errors_take_one_line(self, record):
        record.stage("tests", status="failed", error="Traceback\n  |\nValueError: a | b", seconds=3)
        assert "| failed: ValueError: a / b | 3 |" in (record.folder / "gpu.md").read_text()

    def test_like_is_compared_with_like(self, record):
        rows = (
            ("fast", "research code", {"images_per_second": 2.0}),
            ("fast", "from JPEG", {"images_per_second": 30.0, "compared": True}),
            ("fast", "tensors", {"images_per_second": 90.0}),
            ("slow", "from JPEG", {"images_per_second": 30.0, "compared": True}),
        )
        for case, program, values in rows:
            record.put("extraction", {"case": case, "program": program, **values})
        for program, values in (("research code", 900.0), ("ours", 9.0)):
            row = {"case": "q", "program": program, "milliseconds": values, "compared": True}
            record.put("reranking", row)
        text = (record.folder / "gpu.md").read_text()
        assert "|  | from JPEG | 30 | 15 |" in text
        assert "|  | tensors | 90 |  |" in text
        assert "| slow | from JPEG | 30 |  |" in text
        assert "|  | ours | 9 | 1e+02 |" in text

    def test_columns_without_values_are_left_out(self, record):
        record.put("limits", {"case": "copy", "program": "read", "giga": 4300.0, "tera": None})
        table = (record.folder / "gpu.md").read_text()
        assert "| case | program | GB/s |" in table
        assert "| copy | read | 4,300 |" in table

    def test_chart(self, record):
        record.chart()
        assert not (record.folder / "gpu.png").exists()  # nothing was timed
        record.put("reranking", {"case": "a", "program": "b", "milliseconds": 1.0})
        record.put("reranking", {"case": "a", "program": "c", "milliseconds": None})
        record.chart()
        assert (record.folder / "gpu.png").read_bytes().startswith(b"\x89PNG")
        assert {file.name for file in record.folder.iterdir()} == {"gpu.json", "gpu.md", "gpu.png"}


# Stages in processes of their own ----------------------------------------------------------------

STAGE = """
import json, sys, time
from pathlib import Path
from gpu_table import Record
name, options = sys.argv[1], json.loads(sys.argv[2])
record = Record(Path(options["output"]))
record.put(name, {"case": name, "program": "first", "milliseconds": 1.5})
if name == "limits":
    Path(options["failure"]).write_text("ValueError: it is broken")
    sys.exit(1)
if name == "extraction":
    import os, signal
    os.kill(os.getpid(), signal.SIGSEGV)
if name == "agreement":
    time.sleep(600)
"""


@pytest.fixture
def runner(tmp_path, monkeypatch):
    """The runner with stages that fail, hang or crash after a row."""
    import gpu

    (tmp_path / "gpu_job.py").write_text(STAGE)
    (tmp_path / "gpu.py").touch()
    monkeypatch.setattr(gpu, "__file__", str(tmp_path / "gpu.py"))
    monkeypatch.setattr(gpu, "about", lambda device: {"device": "none"})
    return gpu


class TestRunner:
    def test_stages_do_not_stop_each_other(self, runner, tmp_path, capsys):
        names = ["limits", "agreement", "extraction", "reranking"]
        words = ["--device", "cpu", "--output", str(tmp_path / "out"), "--minutes", "0.3"]
        arguments = runner.parse([*words, "--stages", *names])
        assert runner.run_stages(arguments, runner.torch.device("cpu")) == 1
        found = stages(tmp_path / "out")
        assert [found[name]["status"] for name in names] == [
            "failed", "out of time", "failed", "passed",
        ]  # fmt: skip
        assert found["limits"]["error"] == "ValueError: it is broken"
        assert found["extraction"]["error"] == f"exit status -{int(signal.SIGSEGV)}"
        for name in names:
            assert found[name]["rows"] == [{"case": name, "program": "first", "milliseconds": 1.5}]
        printed = capsys.readouterr().out
        assert "| Re-ranking | passed |" in printed
        assert "| Extraction | failed: exit status -11 |" in printed

    def test_a_hanging_stage_leaves_later_ones_their_time(self, runner, tmp_path):
        words = ["--device", "cpu", "--output", str(tmp_path / "out"), "--minutes", "0.2"]
        arguments = runner.parse([*words, "--stages", "agreement", "reranking"])
        start = time.monotonic()
        runner.run_stages(arguments, runner.torch.device("cpu"))
        assert time.monotonic() - start < 12
        found = stages(tmp_path / "out")
        shares = [runner.SHARES[name] for name in ("agreement", "reranking")]
        assert found["agreement"]["seconds"] < 12 * shares[0] / sum(shares) + 2
        assert found["reranking"]["status"] == "passed"

    def test_what_is_left_by_a_run_that_is_killed(self, tmp_path):
        output = tmp_path / "out"
        words = ["--device", "cpu", "--small", "--output", output, "--stages", "limits", "tests"]
        process = subprocess.Popen(
            [sys.executable, str(BENCHMARKS / "gpu.py"), *map(str, words)],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            until = time.monotonic() + 120
            while time.monotonic() < until:
                if (output / "gpu.json").is_file() and stages(output).get("limits", {}).get("rows"):
                    break
                time.sleep(0.05)
        finally:
            process.kill()
            process.wait()
        time.sleep(2)  # the stage ends itself, and writes no more
        rows = stages(output)["limits"]["rows"]
        assert rows[0]["case"] == "float32"
        assert rows[0]["tera"] > 0
        assert "float32" in (output / "gpu.md").read_text()
        left = json.dumps(stages(output))
        time.sleep(2)
        assert json.dumps(stages(output)) == left

    def test_no_such_device(self, tmp_path, monkeypatch, capsys):
        import gpu

        monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(sys, "argv", ["gpu.py", "--output", str(tmp_path / "out")])
        assert gpu.main() == 2
        assert "--device auto or --nocuda" in capsys.readouterr().err
        assert not (tmp_path / "out").exists()


# What they need ----------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [pytest.param(["limits", "agreement"], marks=pytest.mark.tower)])
def test_what_is_not_needed_is_not_imported(tmp_path, names):
    marks = tmp_path / "marks.txt"
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(marks=str(marks)))
    output = tmp_path / "out"
    done = run_gpu(
        *("--device", "cpu", "--small", "--output", output, "--stages", *names),
        first=str(tmp_path),
        PATCHNETVLAD_HOME=str(tmp_path),
        XDG_CACHE_HOME=str(tmp_path),
    )
    assert done.returncode == 0, done.stdout + (output / "gpu.log").read_text()
    assert marks.read_text() == ""  # it was in force, and nobody asked
    found = stages(output)
    assert [found[name]["status"] for name in names] == ["passed"] * len(names)
    same = [row for row in found["agreement"]["rows"] if row["case"] == "exact"]
    assert {row["program"] for row in same} >= {"feature maps", "matches, size 2", "scores, fast"}
    assert all(row.get("largest", 0) == 0 and row.get("equal", 1) == 1 for row in same)


def test_blocking_blocks(tmp_path):
    (tmp_path / "sitecustomize.py").write_text(BLOCKER.format(marks=str(tmp_path / "marks.txt")))
    done = subprocess.run(
        [sys.executable, "-c", "import h5py"],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert (tmp_path / "marks.txt").read_text() == "h5py\n"


class TestTests:
    """The stage that runs pytest."""

    @pytest.fixture
    def job(self, record):
        from types import SimpleNamespace

        def put(case, program, **values):
            record.put("tests", {"case": case, "program": program, **values})

        return SimpleNamespace(put=put, rows=lambda: record.rows("tests"))

    def write(self, tmp_path, **files):
        for name, body in files.items():
            text = f"import pytest\n{body}\n"
            (tmp_path / f"test_{name}.py").write_text(text)

    MARKED = "@pytest.mark.cuda\ndef test_{0}():\n    {1}\n"

    def test_counts(self, job, tmp_path):
        import gpu_checks

        self.write(
            tmp_path,
            good=self.MARKED.format("a", "pass") + self.MARKED.format("b", "pytest.skip()"),
            other="def test_without_mark():\n    assert False\n",
            lacking="import a_module_that_nobody_has  # cuda\n",
        )
        gpu_checks.device_tests(job, tmp_path)
        (row,) = job.rows()
        assert (row["passed"], row["failed"], row["skipped"]) == (1, 0, 1)
        assert "test_lacking.py: no a_module_that_nobody_has" in row["remark"]

    def test_failures_are_named(self, job, tmp_path):
        import gpu_checks

        self.write(tmp_path, bad=self.MARKED.format("c", "assert 1 == 2"))
        with pytest.raises(RuntimeError, match=r"\b1 tests\b.*test_bad\.py::test_c"):
            gpu_checks.device_tests(job, tmp_path)
        assert [row["program"] for row in job.rows()] == ["failed", "cuda or device"]

    def test_no_tests(self, job, tmp_path):
        import gpu_checks

        self.write(tmp_path, none="def test_of_cuda():\n    pass\n")
        with pytest.raises(RuntimeError, match=r"gpu\.log"):
            gpu_checks.device_tests(job, tmp_path)


class TestResearchCode:
    def test_a_wheel_at_hand_is_unpacked(self, tmp_path, monkeypatch):
        import zipfile

        import research_code

        monkeypatch.setattr(research_code, "FOLDER", tmp_path / "code")
        assert not research_code.at_hand([tmp_path / "missing", tmp_path])
        with zipfile.ZipFile(tmp_path / "patchnetvlad-0.1.8-py3-none-any.whl", "w") as wheel:
            wheel.writestr("patchnetvlad/__init__.py", "")
            wheel.writestr("patchnetvlad-0.1.8.data/scripts/feature_extract.py", "pass")
        assert research_code.at_hand([tmp_path])
        words = research_code.words_of("feature_extract", "--a", 1, device="cuda")
        assert Path(words[-3]).read_text() == "pass"
        assert words[-2:] == ["--a", "1"]
        assert research_code.words_of("feature_extract")[-1] == "--nocuda"
