# SPDX-License-Identifier: MIT
"""Run the notebooks of this folder from top to bottom, and keep what they print.

``make notebooks`` calls it after a notebook was changed. Pictures are not kept: the photographs in
them are not ours to hand out.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent
TIMEOUT = 300  # seconds a cell


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


def keep_text(notebook: nbformat.NotebookNode) -> None:
    """Leave of the outputs only what was printed, and nothing that changes from run to run."""
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type != "code":
            continue
        kept = []
        for output in cell.outputs:
            data = output.get("data", {})
            if output.get("name") == "stderr" or "image/png" in data:
                continue
            if "text/plain" in data:
                output.data, output.metadata = {"text/plain": data["text/plain"]}, {}
            kept.append(output)
        cell.outputs = kept
    notebook.metadata = {
        "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
        "language_info": {"name": "python"},
    }


def main() -> None:
    """Run all notebooks, and write them back."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        print(path.name, flush=True)
        notebook = execute(path)
        keep_text(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
