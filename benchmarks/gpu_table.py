# SPDX-License-Identifier: MIT
"""What a run on a GPU found: kept row by row as JSON, shown as a table and as a chart.

Every row is written when it is measured, each file as a whole, so that a run that ends at any
moment leaves what it had.

    python benchmarks/gpu_table.py [DIR]

makes the table and the chart of a folder's ``gpu.json`` again.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from patchnetvlad.base.files import replace_text

Row = dict[str, Any]

TITLES = {
    "limits": "What the machine can do",
    "tests": "Tests that need the device",
    "agreement": "Features and scores against the CPU's",
    "extraction": "Extraction",
    "reranking": "Re-ranking",
    "profile": "Where the time goes",
    "robustness": "Several processes, little memory",
}
RESEARCH = "research code"
# Of a row: its key, the heading of its column, and how its value is shown.
COLUMNS = (
    ("tera", "TFLOP/s", "{:,.3g}"),
    ("giga", "GB/s", "{:,.4g}"),
    ("passed", "passed", "{:,}"),
    ("failed", "failed", "{:,}"),
    ("skipped", "skipped", "{:,}"),
    ("largest", "largest deviation", "{:.1e}"),
    ("relative", "relative", "{:.1e}"),
    ("equal", "equal", "{:.2%}"),
    ("images_per_second", "images/s", "{:,.3g}"),
    ("milliseconds", "ms", "{:,.3g}"),
    ("ratio", "times faster", "{:.2g}"),
    ("limit_share", "of the limit", "{:.1%}"),
    ("time_share", "of the time", "{:.1%}"),
    ("peak_bytes", "peak device memory, MB", None),
    ("remark", "remark", "{}"),
)


class Record:
    """The stages of a run and their rows, in ``gpu.json`` and ``gpu.md`` of a folder.

    Every change reads the file again, so that a stage in a process of its own can add to it.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = folder / "gpu.json"

    @classmethod
    def begin(cls, folder: Path, about: dict[str, str]) -> Record:
        """Start without rows."""
        folder.mkdir(parents=True, exist_ok=True)
        record = cls(folder)
        record._write({"about": about, "stages": {}})
        return record

    def read(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.file.read_text(encoding="utf-8"))
        return found

    def _write(self, content: dict[str, Any]) -> None:
        replace_text(self.file, [json.dumps(content, indent=1), "\n"])
        replace_text(self.folder / "gpu.md", [markdown(content)])

    def stage(self, name: str, **values: Any) -> None:
        """Say how a stage is going: its status, seconds, error."""
        content = self.read()
        content["stages"].setdefault(name, {"rows": []}).update(values)
        self._write(content)

    def put(self, stage: str, row: Row) -> None:
        """Add a row, or replace the one of the same case and program."""
        content = self.read()
        rows = content["stages"].setdefault(stage, {"rows": []})["rows"]
        same = [n for n, have in enumerate(rows) if _key(have) == _key(row)]
        if same:
            rows[same[0]] = row
        else:
            rows.append(row)
        self._write(content)

    def rows(self, stage: str) -> list[Row]:
        found: list[Row] = self.read()["stages"].get(stage, {}).get("rows", [])
        return found

    def chart(self) -> None:
        """Draw what has a rate or a time, ours beside the research code's."""
        draw(self.read(), self.folder / "gpu.png")


def _key(row: Row) -> tuple[Any, Any]:
    return row["case"], row["program"]


# --- the table ------------------------------------------------------------------------------------


def markdown(content: dict[str, Any]) -> str:
    """Return everything as Markdown: one table a stage, with the columns that its rows fill."""
    lines = ["# On a GPU", "", *(f"- {text}" for text in content["about"].values()), ""]
    lines += ["| stage | outcome | seconds |", "| --- | --- | --- |"]
    for name, stage in content["stages"].items():
        lines.append(f"| {TITLES[name]} | {outcome(stage)} | {stage.get('seconds', 0):.0f} |")
    for name, stage in content["stages"].items():
        if stage["rows"]:
            lines += ["", f"## {TITLES[name]}", "", *_table(stage["rows"])]
    return "\n".join(lines) + "\n"


def outcome(stage: dict[str, Any]) -> str:
    """Say in one line how a stage ended; a stage that never said so was cut off."""
    status = stage.get("status", "cut off")
    if status == "running":
        status = f"cut off after {len(stage['rows'])} rows"
    error = str(stage.get("error", "")).strip().splitlines()
    return f"{status}: {error[-1][:200].replace('|', '/')}" if error else str(status)


def _table(rows: list[Row]) -> Iterator[str]:
    rows = [*map(dict, rows)]
    for row in rows:
        if row.get("compared") and (ratio := times_faster(row, rows)) is not None:
            row["ratio"] = ratio
    used = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    yield _line(["case", "program", *(heading for _, heading, _ in used)])
    yield _line(["---"] * (2 + len(used)))
    before = ""
    for row in rows:
        case = row["case"] if row["case"] != before else ""
        yield _line([case, row["program"], *(_cell(row, key, text) for key, _, text in used)])
        before = row["case"]


def times_faster(row: Row, rows: list[Row]) -> float | None:
    """Compare a row with the research code's of the same case; None if that has no number."""
    for other in rows:
        if other["case"] != row["case"] or other["program"] != RESEARCH:
            continue
        if row.get("images_per_second") and other.get("images_per_second"):
            return float(row["images_per_second"] / other["images_per_second"])
        if (row.get("milliseconds") or 0) > 0 and (other.get("milliseconds") or 0) > 0:
            return float(other["milliseconds"] / row["milliseconds"])
    return None


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(row: Row, key: str, text: str | None) -> str:
    if row.get(key) is None:
        return ""
    if text is None:
        return f"{row[key] / 1e6:,.0f}"
    return text.format(row[key]).replace("|", "/").replace("\n", " ")


# --- the chart ------------------------------------------------------------------------------------


def draw(content: dict[str, Any], file: Path) -> None:
    """Draw images a second and ms a query as bars, logarithmic; nothing where nothing was timed."""
    panels = [
        (stage, key, title, [row for row in _rows(content, stage) if (row.get(key) or 0) > 0])
        for stage, key, title in (
            ("extraction", "images_per_second", "Extraction: images a second (more is better)"),
            ("reranking", "milliseconds", "Re-ranking 100 candidates: ms a query (less is better)"),
        )
    ]
    panels = [panel for panel in panels if panel[3]]
    if not panels:
        return
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    heights = [len(rows) + 3 for *_, rows in panels]
    figure, axes = plt.subplots(
        len(panels),
        1,
        figsize=(9, 0.22 * sum(heights)),
        gridspec_kw={"height_ratios": heights},
        squeeze=False,
        layout="constrained",
    )
    for axis, (_, key, title, rows) in zip(axes[:, 0], panels, strict=True):
        values = [row[key] for row in rows]
        colours = ["#999999" if row["program"].startswith(RESEARCH) else "#0072B2" for row in rows]
        axis.barh(range(len(rows)), values, color=colours)
        names = [f"{row['case']}: {row['program']}" for row in rows]
        axis.set_yticks(range(len(rows)), names, fontsize=7)
        axis.invert_yaxis()
        axis.set_xscale("log")
        axis.set_xlim(min(values) / 2, max(values) * 3)
        axis.set_title(title, fontsize=10)
        axis.spines[["top", "right"]].set_visible(False)
        for n, value in enumerate(values):
            axis.annotate(
                f"{value:.3g}", (value, n), (3, 0), textcoords="offset points",
                va="center", fontsize=7,
            )  # fmt: skip
    partial = file.with_name(f"{file.stem}.part.png")
    figure.savefig(partial, dpi=110)
    partial.replace(file)
    plt.close(figure)


def _rows(content: dict[str, Any], stage: str) -> list[Row]:
    rows: list[Row] = content["stages"].get(stage, {}).get("rows", [])
    return rows


if __name__ == "__main__":
    record = Record(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent)
    record.chart()
    print(markdown(record.read()))
