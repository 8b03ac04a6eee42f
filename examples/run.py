# SPDX-License-Identifier: MIT
"""Run the notebooks of this folder from top to bottom, and keep what they show.

``make notebooks`` calls it after a notebook was changed. Pictures are kept small.
"""

from __future__ import annotations

import base64
import io
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from PIL import Image

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 300  # seconds a cell
WIDTH = 900  # px of a picture that is kept


def execute(path: Path) -> nbformat.NotebookNode:
    """Return a notebook after all its cells were run, in the notebook's folder.

    Raises
    ------
    nbclient.exceptions.CellExecutionError
        A cell failed.
    """
    notebook = nbformat.read(path, as_version=4)
    context = {"metadata": {"path": str(path.parent)}}
    return NotebookClient(notebook, timeout=TIMEOUT, resources=context).execute()


def keep_what_is_shown(notebook: nbformat.NotebookNode) -> None:
    """Make pictures small, and leave out warnings and what changes from run to run."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
        for output in cell.outputs:
            data = output.get("data", {})
            if "image/png" in data:
                output.data = {"image/jpeg": _small(data["image/png"]), "text/plain": "a picture"}
            elif "text/plain" in data:
                output.data = {"text/plain": data["text/plain"]}
            if "metadata" in output:
                output.metadata = {}
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def _small(png: str) -> str:
    """Turn a picture, as notebooks hold it, into a small JPEG."""
    picture = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    if picture.width > WIDTH:
        height = round(picture.height * WIDTH / picture.width)
        picture = picture.resize((WIDTH, height), Image.Resampling.LANCZOS)
    content = io.BytesIO()
    picture.save(content, "JPEG", quality=80, optimize=True)
    return base64.b64encode(content.getvalue()).decode()


def main() -> None:
    """Run all notebooks, and write them back."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = execute(path)
        keep_what_is_shown(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
