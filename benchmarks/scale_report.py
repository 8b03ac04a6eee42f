"""What ``scale.py`` measured: as a table, as plots with the fitted growth, and in docs/scale.md."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import pyplot as plt
from matplotlib.lines import Line2D
from report import line_of, write
from scale_cells import FOUND, STAGES, STYLES, Cell, core, fits, load

matplotlib.use("Agg")

DOCS = Path(__file__).resolve().parents[1] / "docs" / "scale.md"


def recalls(row: dict[str, Any]) -> list[str]:
    names = ("recall 1", "recall 10", "recall 100", "overlap", "place 1", "place 100")
    return [f"{row[name]:.3f}" for name in names]


def setting(row: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in row["settings"].items())


def main_table(cells: list[Cell]) -> Iterator[str]:
    """Yield the lines of the package's settings."""
    head = (
        "P", "N", "index", "setting", "building, core-s", "lists", "assigning", "codes", "adding",
        "search, core-ms per query", *FOUND, "bytes per descriptor", "memory, MB",
    )  # fmt: skip
    yield line_of(head)
    yield line_of(["---"] * len(head))
    for cell in cells:
        stages = [cell.found["build"].get(stage) for stage in STAGES]
        yield line_of([
            str(cell.dimension), f"{cell.count:,}", f"`{cell.factory}`", setting(cell.own),
            core(cell.build), *("" if s is None else core(s) for s in stages),
            f"{1e3 * cell.own['seconds']:.3g}", *recalls(cell.own),
            f"{cell.found['bytes']:,.0f}", f"{cell.found['memory'] / 1e6:,.0f}",
        ])  # fmt: skip


def settings_table(cells: list[Cell]) -> Iterator[str]:
    """Yield the lines of all other settings."""
    head = ("P", "N", "index", "setting", "search, core-ms per query", *FOUND)
    yield line_of(head)
    yield line_of(["---"] * len(head))
    for cell in cells:
        for row in cell.found["search"]:
            if not row["package"]:
                yield line_of([
                    str(cell.dimension), f"{cell.count:,}", f"`{cell.factory}`", setting(row),
                    f"{1e3 * row['seconds']:.3g}", *recalls(row),
                ])  # fmt: skip


def growth_table(cells: list[Cell]) -> Iterator[str]:
    """Yield the lines of the fitted growth, P = 128."""
    build, search = fits(cells, "build"), fits(cells, "search")
    yield line_of(["index", "sizes", "exponent of building", "exponent of search"])
    yield line_of(["---"] * 4)
    for kind in search:
        # Copying takes no time worth a fit.
        copying = kind in ("Flat", "SQfp16")
        building = str(build[kind]) if kind in build and not copying else ""
        yield line_of([f"`{kind}`", str(len(search[kind].counts)), building, str(search[kind])])


def table(results: dict[str, Any], cells: list[Cell]) -> str:
    """Return everything as Markdown."""
    about = results["about"]
    lines = [
        "# Retrieval of many images",
        "",
        "Made by `make bench-retrieval` (`benchmarks/scale.py`): synthetic descriptors of walks "
        f"along streets, {results['queries']} queries, 100 candidates. Times are core-seconds and "
        "core-milliseconds: processor time of one thread, on a machine that was also doing other "
        "work; where memory limits them, repetitions differed by up to 1.7 times. Recall@R: the "
        "share of queries whose nearest descriptor (by `Flat`) is among the first R; overlap: the "
        "share of the 100 nearest that are among the 100 found; place@R: the share of queries for "
        "which one of the four frames around the query is among the first R. Memory is the peak of "
        "building and searching from a file read in blocks, without libraries. Plots: "
        "[growth](scale.png), [recall against time](scale_recall.png). Conclusions: "
        "[docs/scale.md](../docs/scale.md).",
        "",
        f"{about['date']}. {about['machine']}, no GPU. {about['versions']}. FAISS with one thread.",
        "",
        "## With the package's settings",
        "",
        *main_table(cells),
        "",
        "## Fitted growth",
        "",
        "P = 128, sizes with about 2 sqrt(N) lists; exponent and its standard error.",
        "",
        *growth_table(cells),
        "",
        "## Other settings",
        "",
        *settings_table(cells),
    ]
    return "\n".join(lines) + "\n"


def growth_chart(cells: list[Cell], file: Path) -> None:
    """Draw building and searching over the number of descriptors, with the fitted growth."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    handles = []
    grown = {measure: fits(cells, measure) for measure in ("build", "search")}
    for kind, (colour, marker) in STYLES.items():
        mine = [cell for cell in cells if cell.dimension == 128 and cell.kind == kind]
        said = []
        for axis, measure, scale in zip(axes, ("build", "search"), (1, 1e3), strict=True):
            if measure == "build" and kind in ("Flat", "SQfp16"):
                continue
            for cell in mine:
                axis.plot(
                    cell.count, scale * cell.measures[measure], marker, color=colour,
                    markerfacecolor=colour if cell.by_rule else "white", markersize=7,
                )  # fmt: skip
            law = grown[measure].get(kind)
            if law is None:
                continue
            inside, beyond = np.array(law.counts), np.array([law.counts[-1], mine[-1].count])
            for counts, style in ((inside, "-"), (beyond, ":")):
                axis.plot(counts, scale * law(counts), style, color=colour, linewidth=1.2)
            said.append(f"{measure} {law.exponent:.2f}")
        if mine:
            label = f"{kind}: {', '.join(said)}" if said else kind
            handles.append(Line2D([], [], color=colour, marker=marker, label=label))
    for axis in axes:
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.grid(alpha=0.3)
        axis.set_xlabel("descriptors N, P = 128")
    axes[0].set_ylabel("building, core-seconds")
    axes[1].set_ylabel("search, core-ms a query, the package's settings")
    figure.legend(
        handles=handles, loc="outside lower center", ncols=3, fontsize=9,
        title="lines: fitted c N^e and its e; open: fewer lists than 2 sqrt(N), not fitted, lines "
        "dotted", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(file, dpi=130)
    plt.close(figure)


def recall_chart(cells: list[Cell], file: Path) -> None:
    """Draw what is found over the time of a query, for some numbers of descriptors."""
    counts = sorted({c.count for c in cells if c.dimension == 128 and len(c.found["search"]) > 1})
    shown = counts if len(counts) < 3 else [counts[1], *counts[3:]][:3]
    figure, axes = plt.subplots(
        2, len(shown), figsize=(5.4 * len(shown), 8), sharey="row", sharex="col",
        layout="constrained", squeeze=False,
    )  # fmt: skip
    handles: dict[str, Any] = {}
    for (i, name), (j, count) in product(enumerate(("recall 1", "place 100")), enumerate(shown)):
        axis = axes[i, j]
        for cell in cells:
            if cell.dimension != 128 or cell.count != count or cell.kind not in STYLES:
                continue
            colour, marker = STYLES[cell.kind]
            rows = sorted(cell.found["search"], key=lambda row: row["seconds"])
            (handles[cell.kind],) = axis.plot(
                [1e3 * row["seconds"] for row in rows], [row[name] for row in rows],
                color=colour, marker=marker, label=cell.kind,
            )  # fmt: skip
            axis.plot(1e3 * cell.own["seconds"], cell.own[name], "o", markersize=14,
                      markerfacecolor="none", color=colour)  # fmt: skip
        axis.set_xscale("log")
        axis.grid(alpha=0.3)
        if i == 0:
            axis.set_title(f"N = {count:,}, P = 128", fontsize=10)
        else:
            axis.set_xlabel("core-ms a query")
    axes[0, 0].set_ylabel("recall@1 against exact search")
    axes[1, 0].set_ylabel("place@100")
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=4, fontsize=9,
        title="ringed: the package's settings", title_fontsize=8,
    )  # fmt: skip
    figure.savefig(file, dpi=130)
    plt.close(figure)


BLOCK = re.compile(r"(<!-- scale\.py (.*?) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str, folder: Path) -> str:
    """Put what the commands named in a page's comments print after these comments."""
    from scale_plan import plan

    results, cells = load(folder)

    def made(found: re.Match[str]) -> str:
        name, *words = found[2].split()
        if name == "growth":
            body = "\n".join(growth_table(cells))
        elif name == "matched":
            body = "\n".join(matched_table(results))
        elif name == "cells":
            body = "\n".join(cells_table(cells, int(words[0]), int(words[1])))
        else:
            body = plan(words, folder).strip()
        return f"{found[1]}\n{body}\n\n{found[4]}"

    return BLOCK.sub(made, text)


REAL = {  # frames of a walk through a building: 154 images and 33 queries, P = 128
    "mean 1": 0.450, "mean 2": 0.251, "mean 5": 0.162, "mean 10": 0.127, "mean other": 0.037,
    "spread 1": 0.217, "spread 2": 0.195, "spread 5": 0.149, "spread 10": 0.134,
    "spread other": 0.104, "high other": 0.374, "distance 1": 0.893, "distance 2": 0.965,
    "distance 10": 1.207, "distance 100": 1.413,
}  # fmt: skip


def matched_table(results: dict[str, Any]) -> Iterator[str]:
    """Yield the lines that compare synthetic descriptors with real ones."""
    dimensions = sorted(results["statistics"], key=int)
    yield line_of(["", "real, P = 128", *(f"synthetic, P = {d}" for d in dimensions)])
    yield line_of(["---"] * (2 + len(dimensions)))

    def row(words: str, *names: str) -> str:
        sources = [REAL, *(results["statistics"][d] for d in dimensions)]
        return line_of([words, *(" ± ".join(f"{s[n]:.2f}" for n in names) for s in sources)])

    for apart in (1, 2, 5, 10):
        words = f"cosine of images {apart} apart" if apart > 1 else "cosine of neighbours"
        yield row(words, f"mean {apart}", f"spread {apart}")
    yield row("cosine of images of other streets", "mean other", "spread other")
    yield row("the largest 1 % of these are above", "high other")
    for rank in (1, 2, 10, 100):
        nth = {1: "nearest", 2: "second"}.get(rank, f"{rank}th")
        words = f"distance of a query to its {nth} image, median"
        yield row(words, f"distance {rank}")


def cells_table(cells: list[Cell], dimension: int, count: int) -> Iterator[str]:
    """Yield a short table of one size."""
    head = (
        "index",
        "bytes per descriptor",
        "building, core-s",
        "search, core-ms per query",
        *FOUND,
    )
    yield line_of(head)
    yield line_of(["---"] * len(head))
    for cell in cells:
        if (cell.dimension, cell.count) == (dimension, count):
            yield line_of([
                f"`{cell.factory}`", f"{cell.found['bytes']:,.0f}", core(cell.build),
                f"{1e3 * cell.own['seconds']:.3g}", *recalls(cell.own),
            ])  # fmt: skip


def show(folder: Path) -> str:
    """Write the table and the plots of a folder, and docs/scale.md if it is the repository's."""
    results, cells = load(folder)
    text = table(results, cells)
    write(folder / "scale.md", text)
    growth_chart(cells, folder / "scale.png")
    recall_chart(cells, folder / "scale_recall.png")
    if folder.resolve() == Path(__file__).resolve().parent and DOCS.is_file():
        write(DOCS, filled(DOCS.read_text(encoding="utf-8"), folder))
    return text
