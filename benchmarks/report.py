# SPDX-License-Identifier: MIT
"""Results of the benchmarks: stored as JSON, shown as a table and as a chart.

    python benchmarks/report.py [DIR]

redraws the table and the chart of a folder's ``bench.json``.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.patches import Patch

PARTS = {"extract": "extraction", "disk": "disk", "rerank": "re-ranking", "retrieval": "retrieval"}
COLOURS = {  # of Okabe and Ito, which everybody can tell apart
    "extract": "#0072B2", "disk": "#CC79A7", "rerank": "#E69F00", "retrieval": "#009E73",
}  # fmt: skip
TICKS = (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100)
HEADINGS = (
    "case", "program", "time", "times faster", "peak memory", "times less", "on disk",
    "times smaller", "of sgemm", "of copy", "remarks",
)  # fmt: skip
Row = dict[str, Any]


class Results:
    """What was measured, by part and case; every change is written at once.

    ``order`` are the names of the cases, as they are to follow each other within a part.
    """

    def __init__(
        self, folder: Path, about: dict[str, str] | None = None, order: Sequence[str] = ()
    ) -> None:
        self.folder, self.about, self.order = folder, about, list(order)
        self.file = folder / "bench.json"
        self.cases: dict[str, Any] = {}
        if self.file.is_file():
            self.cases = json.loads(self.file.read_text(encoding="utf-8"))

    def put(self, part: str, name: str, rows: list[Row]) -> None:
        """Replace the rows of a case."""
        case = {"part": part, "name": name, "about": self.about, "rows": rows}
        self.cases[f"{part} {name}"] = case
        known = {name: n for n, name in enumerate([*PARTS, *self.order])}
        self.cases = dict(
            sorted(
                self.cases.items(),
                key=lambda c: (known[c[1]["part"]], known.get(c[1]["name"], len(known))),
            )
        )
        write(self.file, json.dumps(self.cases, indent=1) + "\n")
        self.show()

    def show(self) -> None:
        """Write the table and the chart."""
        write(self.folder / "bench.md", self.table())
        chart(self.rows(), self.folder / "bench.png")

    def rows(self) -> Iterator[tuple[str, str, Row]]:
        """Give part, case and row of everything."""
        for case in self.cases.values():
            for row in case["rows"]:
                yield case["part"], case["name"], row

    def table(self) -> str:
        """Return everything as Markdown: where it was measured, and one table."""
        lines = ["# This package and the research code, side by side", "", INTRODUCTION, ""]
        abouts: dict[str, list[str]] = {}
        for case in self.cases.values():
            about = case["about"]
            text = (
                f"{about['date']}. {about['machine']}. {about['versions']}; research code "
                f"{about['research_code']}."
            )
            abouts.setdefault(text, []).append(case["name"])
        for text, names in abouts.items():
            lines.append(f"- {text}" + (f" Of {', '.join(names)}." if len(abouts) > 1 else ""))
        limits = [row for _, _, row in self.rows() if "sgemm_flops" in row]
        if limits:
            sgemm = [row["sgemm_flops"] / 1e9 for row in limits]
            copy = [row["copy_bytes"] / 1e9 for row in limits]
            lines.append(
                f"- Limits, by case: sgemm {min(sgemm):.0f} to {max(sgemm):.0f} GFLOP/s, copy "
                f"{min(copy):.1f} to {max(copy):.1f} GB/s."
            )
        lines += ["", line_of(HEADINGS), line_of(["---"] * len(HEADINGS))]
        before = ""
        for part, name, row in self.rows():
            case = f"{PARTS[part]}, {name}: {row['label']}" if name != part else (
                f"{PARTS[part]}: {row['label']}"
            )  # fmt: skip
            lines.append(line_of([case if case != before else "", row["program"], *cells(row)]))
            before = case
        return "\n".join(lines) + "\n"


INTRODUCTION = """\
Made by `make bench` (`benchmarks/bench.py`). Both programs take turns on the CPU, with the same
images, features and checkpoints; figures are medians. Time: seconds per image or per query without
start-up, from runs with two different numbers of them. Peak memory: the largest resident set of the
process, including pages of mapped files. Of sgemm: the rate of arithmetic of the task (VGG16 and
whitening, or products of descriptors), as a share of this machine's rate for large matrix products
(on a CPU, `fast` needs fewer operations than are counted, due to Winograd's algorithm). Of copy:
the rate at which features are read, as a share of the rate of copies in memory. Features of
candidates are in the page cache, and no candidate occurs twice, except in cases with the name of a
data set in brackets (`--data_set`), which follow the data set. First answers and lines: agreement
with the research code in the prediction files, with ties in any order."""


def line_of(words: Any) -> str:
    return f"| {' | '.join(words)} |"


def cells(row: Row) -> list[str]:
    """Format the numbers of a row; what was not measured stays empty."""

    units = {"image": " per image", "query": " per query"}

    def cell(key: str, text: Callable[[float], str]) -> str:
        return text(row[key]) if key in row else ""

    return [
        cell("seconds", lambda s: duration(s) + units.get(row["unit"], "") * (s > 0)),
        cell("seconds_ratio", times),
        cell("peak_bytes", lambda b: f"{b / 1e6:,.0f} MB"),
        cell("peak_bytes_ratio", times),
        cell("bytes", lambda b: f"{b / 1e6:.3g} MB per image"),
        cell("bytes_ratio", times),
        cell("sgemm_share", percent),
        cell("copy_share", percent),
        remarks(row),
    ]  # fmt: skip


def duration(seconds: float) -> str:
    if seconds <= 0:
        return "too short to measure"
    if seconds >= 0.1:
        return f"{seconds:.2f} s"
    return f"{seconds * 1e3:.1f} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} us"


def times(ratio: float) -> str:
    return f"{ratio:.2g} x" if ratio < 10 else f"{ratio:.0f} x"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %" if share >= 0.01 else f"{100 * share:.1g} %"


def remarks(row: Row) -> str:
    """Say what has no column of its own."""
    said = []
    if "agreement" in row:
        same = row["agreement"]
        said.append(f"first answers {same['same_first']} of {same['queries']}")
        said.append(f"lines {100 * same['same_lines']:.1f} %")
    if "recall_1" in row:
        said.append(f"as exact search: first {100 * row['recall_1']:.1f} %")
        said.append(f"best 100 {100 * row['recall_100']:.1f} %")
        said.append(f"first query {duration(row['build_seconds'])}, building included")
    return ", ".join(said)


def chart(rows: Iterator[tuple[str, str, Row]], file: Path) -> None:
    """Draw the ratios as bars: times faster, less memory, smaller."""
    ours = [(part, name, row) for part, name, row in rows if not is_reference(row)]
    panels = (
        ("seconds_ratio", "times faster"),
        ("peak_bytes_ratio", "times less peak memory"),
        ("bytes_ratio", "times smaller on disk"),
    )
    found = [(key, title, [o for o in ours if key in o[2]]) for key, title in panels]
    found = [panel for panel in found if panel[2]]
    if not found:
        return
    figure, axes = plt.subplots(
        len(found),
        1,
        figsize=(9, 0.9 * len(found) + 0.27 * sum(len(panel[2]) for panel in found)),
        gridspec_kw={"height_ratios": [len(panel[2]) + 1.5 for panel in found]},
        squeeze=False,
        layout="constrained",
    )
    for axis, (key, title, bars) in zip(axes[:, 0], found, strict=True):
        values = [row[key] for _, _, row in bars]
        places = range(len(bars))
        axis.barh(
            places, [v - 1 for v in values], left=1, color=[COLOURS[part] for part, _, _ in bars]
        )
        names = [
            f"{PARTS[part] if name == part else name}: {row['program'].removeprefix('ours, ')}"
            for part, name, row in bars
        ]
        axis.set_yticks(places, names, fontsize=9)
        axis.invert_yaxis()
        axis.set_xscale("log")
        low, high = min(0.7, 0.7 * min(values)), 1.5 * max(2, *values)
        axis.set_xlim(low, high)
        axis.set_xticks([t for t in TICKS if low <= t <= high])
        axis.minorticks_off()
        axis.axvline(1, color="black", linewidth=1)
        axis.set_title(f"{title} than the research code (logarithmic; 1: the same)", fontsize=10)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.spines[["top", "right"]].set_visible(False)
        for place, value in zip(places, values, strict=True):
            axis.annotate(
                f"{value:.2g}", (max(1, value), place), (3, 0), textcoords="offset points",
                va="center", fontsize=9,
            )  # fmt: skip
    parts = [part for part in PARTS if any(part == bar[0] for panel in found for bar in panel[2])]
    figure.legend(
        handles=[Patch(color=COLOURS[part], label=PARTS[part]) for part in parts],
        loc="outside lower center",
        ncols=len(parts),
        fontsize=9,
    )
    figure.savefig(file, dpi=130)
    plt.close(figure)


def is_reference(row: Row) -> bool:
    return row["program"].startswith("research code")


def write(file: Path, text: str) -> None:
    """Replace a file as a whole."""
    temporary = file.with_name(f"{file.name}.part")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(file)


if __name__ == "__main__":
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).resolve().parent
    results = Results(folder)
    results.show()
    print(results.table())
