# SPDX-License-Identifier: MIT
"""The notebooks in examples/ run from top to bottom."""

from __future__ import annotations

import base64
import io
import sys
import tempfile
from pathlib import Path

import nbformat
import pytest
from conftest import REPOSITORY
from PIL import Image

pytestmark = pytest.mark.docs

EXAMPLES = REPOSITORY / "examples"
NOTEBOOKS = sorted(EXAMPLES.glob("*.ipynb"))
SHOWN = {"first_steps": 3, "own_dataset": 1, "anatomy": 5}
"""Pictures in each."""

sys.path.insert(0, str(EXAMPLES))
import run  # noqa: E402


def pictures(notebook, kind="image/png"):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if kind in output.get("data", {})
    ]


@pytest.fixture(autouse=True)
def own_folders(tmp_path, monkeypatch):
    """Jupyter's own files go, too, and so does what a notebook would forget to delete."""
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(path, marks=() if path.stem == "first_steps" else pytest.mark.slow)
        for path in NOTEBOOKS
    ],
    ids=lambda path: path.stem,
)
def test_runs(path, tmp_path):
    before = set(EXAMPLES.rglob("*"))
    done = run.execute(path)
    assert len(pictures(done)) == SHOWN[path.stem]
    assert {p for p in set(EXAMPLES.rglob("*")) - before if p.suffix != ".pyc"} <= {
        EXAMPLES / "__pycache__"
    }
    assert not list((tmp_path / "tmp").iterdir())


def test_first_steps_takes_five_lines():
    """From photographs to a ranked place and a picture of the match."""
    notebook = nbformat.read(EXAMPLES / "first_steps.ipynb", as_version=4)
    cell = next(cell for cell in notebook.cells if "PlaceIndex(" in cell.source)
    lines = [line for line in cell.source.splitlines() if line.strip()]
    assert len(lines) == 5
    assert "import" in lines[0]
    assert lines[-1].endswith(".plot()")


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_kept_with_what_it_shows(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert len(pictures(notebook, "image/jpeg")) == SHOWN[path.stem]
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    text = path.read_text(encoding="utf-8")
    for folder in (REPOSITORY, Path.home(), Path(tempfile.gettempdir())):
        assert f"{folder}/" not in text
    assert len(text) < 800_000


def test_pictures_become_small_and_warnings_go():
    png = io.BytesIO()
    Image.new("RGB", (1800, 600)).save(png, "PNG")
    drawn = {
        "image/png": base64.b64encode(png.getvalue()).decode(),
        "text/plain": "<Figure at 0x7>",
    }
    cell = nbformat.v4.new_code_cell("1")
    cell.outputs = [
        nbformat.v4.new_output("stream", name="stdout", text="said"),
        nbformat.v4.new_output("stream", name="stderr", text="warned"),
        nbformat.v4.new_output("display_data", data=drawn),
        nbformat.v4.new_output(
            "execute_result", data={"text/plain": "1", "text/html": "<b>1</b>"}, execution_count=1
        ),
    ]
    notebook = nbformat.v4.new_notebook(cells=[cell])
    run.keep_what_is_shown(notebook)
    said, picture, result = cell.outputs
    assert said.text == "said"
    assert result.data == {"text/plain": "1"}
    assert set(picture.data) == {"image/jpeg", "text/plain"}
    assert "0x" not in picture.data["text/plain"]
    small = Image.open(io.BytesIO(base64.b64decode(picture.data["image/jpeg"])))
    assert small.size == (900, 300)
