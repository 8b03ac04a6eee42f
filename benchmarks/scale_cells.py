"""What ``scale.py`` measured, cell by cell, and the growth fitted to it."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

STYLES = {  # colours of Okabe and Ito
    "Flat": ("#000000", "o"),
    "SQfp16": ("#999999", "s"),
    "HNSW32": ("#009E73", "^"),
    "IVF,Flat": ("#56B4E9", "v"),
    "IVF,SQfp16": ("#0072B2", "D"),
    "IVF,PQ32": ("#E69F00", "P"),
    "IVF,RaBitQ": ("#D55E00", "X"),
    "IVF,RaBitQ,Refine(SQfp16)": ("#CC79A7", "*"),
}
CODES = 65_536  # descriptors that codes are trained with, at most
STAGES = ("lists", "assign", "train", "add")

FOUND = ("recall@1", "@10", "@100", "overlap", "place@1", "@100")


@dataclass(frozen=True)
class Cell:
    """One kind of index of one size: P, N, the factory, and what was measured."""

    dimension: int
    count: int
    factory: str
    found: dict[str, Any]

    @property
    def kind(self) -> str:
        """The factory without its number of lists."""
        return re.sub(r"IVF\d+", "IVF", self.factory)

    @property
    def lists(self) -> int:
        """The number of lists; 0 without."""
        number = re.search(r"IVF(\d+)", self.factory)
        return int(number[1]) if number else 0

    @property
    def by_rule(self) -> bool:
        """Whether there are as many lists as sizes that are compared have."""
        return self.lists in (0, lists_for(self.count, 1 << 30))

    @property
    def build(self) -> float:
        """Core-seconds of building."""
        return sum(self.found["build"].get(stage, 0.0) for stage in STAGES)

    @property
    def own(self) -> dict[str, Any]:
        """The search with the package's settings."""
        return next(row for row in self.found["search"] if row["package"])

    @property
    def measures(self) -> dict[str, float]:
        """What growth is fitted to."""
        return {"build": self.build, "search": self.own["seconds"], "bytes": self.found["bytes"]}


@dataclass(frozen=True)
class Fit:
    """A power law c N^e, by least squares of the logarithms, and the standard error of e."""

    factor: float
    exponent: float
    error: float
    counts: tuple[float, ...]

    def __call__(self, count: Any) -> Any:
        return self.factor * np.asarray(count, float) ** self.exponent

    def __str__(self) -> str:
        return f"{self.exponent:.2f} ± {self.error:.2f}"


def load(folder: Path) -> tuple[dict[str, Any], list[Cell]]:
    """Read ``scale.json``: all of it, and its cells by dimension, size and kind."""
    results = json.loads((folder / "scale.json").read_text(encoding="utf-8"))
    cells = []
    for key, found in results["cells"].items():
        dimension, count, factory = key.split(" ")
        cells.append(Cell(int(dimension), int(count), factory, found))
    known = list(STYLES)
    order = {kind: known.index(kind) if kind in known else len(known) for kind in
             {cell.kind for cell in cells}}  # fmt: skip
    cells.sort(key=lambda c: (c.dimension, c.count, order[c.kind], c.kind))
    return results, cells


def fit(points: list[tuple[float, float]]) -> Fit | None:
    """Fit a power law to (N, value); None of fewer than three points."""
    if len(points) < 3:
        return None
    x, y = np.log([p[0] for p in points]), np.log([p[1] for p in points])
    spread = ((x - x.mean()) ** 2).sum()
    exponent = ((x - x.mean()) * y).sum() / spread
    rest = y - y.mean() - exponent * (x - x.mean())
    error = np.sqrt((rest**2).sum() / (len(x) - 2) / spread)
    factor = np.exp(y.mean() - exponent * x.mean())
    counts = tuple(sorted(p[0] for p in points))
    return Fit(float(factor), float(exponent), float(error), counts)


def fits(cells: list[Cell], measure: str, dimension: int = 128) -> dict[str, Fit]:
    """Fit the growth of a measure of each kind; of ``search``, with the package's settings."""
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if measure == "build" and "PQ" in cell.kind and cell.count < CODES:
            continue  # FAISS trains codes with fewer in another way, which takes longer.
        if cell.dimension == dimension and cell.by_rule:
            points.setdefault(cell.kind, []).append((cell.count, cell.measures[measure]))
    found = {kind: fit(values) for kind, values in points.items()}
    return {kind: one for kind, one in found.items() if one is not None}


def core(seconds: float) -> str:
    """Format core-seconds."""
    if seconds >= 10:
        return f"{seconds:,.0f}"
    return f"{seconds:.2g}"


def lists_for(count: int, most: int) -> int:
    """Return the number of lists of this many descriptors: about 2 sqrt(N), a power of two."""
    return min(most, 2 ** round(np.log2(2 * count**0.5)))
