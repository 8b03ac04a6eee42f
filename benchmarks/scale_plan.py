# SPDX-License-Identifier: MIT
"""What a number of images takes, from the rates in bench.json and scale.json.

    python benchmarks/scale.py plan --images 1e7 --dimension 512 --kind map

prints sizes, core-hours of extraction, and the memory, time and recall of each kind of index. What
is larger than what was measured is worked out by how the steps grow, and says how many times
larger it is. Prices, machines and the bytes of a photograph are what the options say: they are not
measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import line_of
from scale_cells import STAGES, Cell, core, fits, load

HERE = Path(__file__).resolve().parent
PATCHES = {2: 29 * 39, 5: 26 * 36, 8: 23 * 33}  # of 640 x 480 px
BYTES = {"float32": (4, 0), "float16": (2, 0), "int8": (1, 4)}  # a number, a patch
CONFIGURATIONS = {  # by P: name, patch sizes, and the case of bench.json
    4096: ("performance", (2, 5, 8), "performance-K64"),
    512: ("speed", (5,), "speed-K16"),
    128: ("storage", (5,), "speed-K16"),
}
RERANKING = (
    ("sizes 2, 5, 8, `ransac = opencv`", "rerank RANSAC-2,5,8", "ours, opencv, float16"),
    ("sizes 2, 5, 8, `ransac = fast`", "rerank RANSAC-2,5,8", "ours, fast, float16"),
    ("size 5, rapid spatial scoring", "rerank spatial-5", "ours, float16"),
)
PARTS = ("sizes", "features", "extraction", "indexes", "reranking", "cost")
PHOTOGRAPH = 34_700
"""Mean bytes of 187 photographs of 640 x 360 px (JPEG) of a building."""
INDEX_ROW = 200
"""Bytes an image of features.sqlite, at most: 122 to 197 of 100,000 names of 10 characters."""


def feature_bytes(dimension: int, kind: str, bench: dict[str, Any]) -> float:
    """Return the bytes of an image's local features in a store."""
    if kind == "map":  # whatever P is
        rows = bench["disk disk"]["rows"]
        measured = next(row["bytes"] for row in rows if row["program"] == "ours, map")
        # Of that store, the rest is the global descriptor and the index.
        return measured - 4 * 4096
    each, more = BYTES[kind]
    patches = sum(PATCHES[size] for size in CONFIGURATIONS[dimension][1])
    return patches * (dimension * each + more)


def features(args: argparse.Namespace, bench: dict[str, Any]) -> Iterator[str]:
    """Yield what local features of each kind take, whatever ``--dimension`` and ``--kind`` say."""
    kinds = ("float32", "float16", "int8", "map")
    yield line_of(["configuration", "P", *(f"`{kind}`" for kind in kinds), "`globalfeats.npy`"])
    yield line_of(["---"] * (3 + len(kinds)))
    for dimension, (name, _, _) in CONFIGURATIONS.items():
        each = [feature_bytes(dimension, kind, bench) for kind in kinds]
        each.append(4 * dimension)
        yield line_of([f"`{name}`", str(dimension), *(size(e * args.images) for e in each)])


def size(count: float) -> str:
    for unit, power in (("PB", 1e15), ("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= power:
            return f"{count / power:.3g} {unit}"
    return f"{count:.0f} B"


def hours(seconds: float) -> str:
    """Format core-seconds as core-hours."""
    value = seconds / 3600
    return f"{float(f'{value:.3g}'):,.0f}" if value >= 100 else f"{value:.2g}"


def rate(bench: dict[str, Any], case: str, program: str) -> float:
    """Return the core-seconds of an image or a query."""
    rows = bench[case]["rows"]
    return next(row["cpu_seconds"] for row in rows if row["program"] == program)


def extraction(args: argparse.Namespace, bench: dict[str, Any]) -> Iterator[str]:
    """Yield what extraction takes."""
    name, _, case = CONFIGURATIONS[args.dimension]
    yield line_of(["extraction", "core-s per image", "core-hours", f"days on {args.cores:,} cores"])
    yield line_of(["---"] * 4)
    for words, program in (("exact", "ours"), ("`precision = fast`", "ours, fast")):
        each = rate(bench, f"extract {case}", program)
        total = each * args.images
        days = total / 86400 / args.cores
        measured = "" if case.startswith(name) else f", rate of `{case.split('-')[0]}`"
        yield line_of([f"CPU, {words}{measured}", f"{each:.2f}", hours(total), f"{days:,.1f}"])
    yield line_of([
        "GPU: **not measured**; g GPUs with r images per second each", "", "",
        f"{args.images:.0e} / (86400 r g)".replace("e+0", "e"),
    ])  # fmt: skip


def searching(cell: Cell, count: float, cells: list[Cell]) -> float:
    """Work out the core-seconds of a query for another number of descriptors.

    Graphs grow as was fitted; whatever reads a fixed share of the descriptors, as N.
    """
    exponent = 1.0
    if "HNSW" in cell.kind:
        law = fits(cells, "search").get("HNSW32")
        exponent = law.exponent if law else 1.0
    return float(cell.own["seconds"] * (count / cell.count) ** exponent)


def building(cell: Cell, count: float, cells: list[Cell]) -> float:
    """Work out the core-seconds of building for another number of descriptors.

    Graphs grow as was fitted. With 2 sqrt(N) lists, training them with 256 descriptors each grows
    as N, and comparing all descriptors with all lists as N^1.5.
    """
    times = count / cell.count
    if "HNSW" in cell.kind:
        law = fits(cells, "build").get("HNSW32")
        return cell.build * times ** (law.exponent if law else 1.0)
    return sum(
        cell.found["build"].get(stage, 0.0) * times ** (1.5 if stage == "assign" else 1.0)
        for stage in STAGES
    )


def indexes(args: argparse.Namespace, cells: list[Cell]) -> Iterator[str]:
    """Yield what each kind of index takes."""
    shards = math.ceil(args.images / args.shard)
    each = args.images / shards
    largest: dict[str, Cell] = {}
    for cell in cells:
        if cell.dimension == args.dimension and cell.count <= each:
            largest[cell.kind] = cell  # cells are by size
    if not largest:
        yield f"Nothing was measured of P = {args.dimension} and {each:,.0f} descriptors or fewer."
        return
    yield line_of([
        "index", "memory", f"machines of {args.memory:g} GB", "building, core-hours",
        "search, core-s per query", "recall@1", "overlap", "place@100", "measured at N",
        "extrapolation factor",
    ])  # fmt: skip
    yield line_of(["---"] * 10)
    for kind, cell in largest.items():
        total = cell.found["bytes"] * args.images
        search = shards * searching(cell, each, cells)
        build = shards * building(cell, each, cells)
        yield line_of([
            f"`{kind}`", size(total), f"{math.ceil(total / args.memory / 1e9):,}",
            "copying" if kind in ("Flat", "SQfp16") else hours(build), core(search),
            f"{cell.own['recall 1']:.2f}", f"{cell.own['overlap']:.2f}",
            f"{cell.own['place 100']:.2f}", f"{cell.count:,}",
            "" if each == cell.count else f"{each / cell.count:.3g}",
        ])  # fmt: skip


def cost(args: argparse.Namespace, bench: dict[str, Any], stored: float) -> Iterator[str]:
    """Yield what the storage and the extraction cost at the prices given."""
    _, _, case = CONFIGURATIONS[args.dimension]
    core_hours = rate(bench, f"extract {case}", "ours, fast") * args.images / 3600
    yield line_of(["cost", "formula", "at the assumed prices"])
    yield line_of(["---"] * 3)
    yield line_of([
        "extraction, `precision = fast`", f"{core_hours:,.0f} core-hours x price",
        f"{core_hours * args.price_core_hour:,.0f}",
    ])  # fmt: skip
    yield line_of([
        "features, globals, index of the store, per month", f"{stored / 1e9:,.0f} GB x price",
        f"{stored / 1e9 * args.price_gb_month:,.0f}",
    ])  # fmt: skip


def plan(words: list[str], folder: Path = HERE) -> str:
    """Return the plan as Markdown."""
    parser = options()
    args = parser.parse_args(words)
    for name in ("images", "shard", "cores", "memory"):
        if not 1 <= getattr(args, name) < math.inf:
            parser.error(f"--{name} must be 1 or more")
    args.images = int(args.images)
    bench = json.loads((HERE / "bench.json").read_text(encoding="utf-8"))
    _, cells = load(folder)
    local = feature_bytes(args.dimension, args.kind, bench)
    stored = (local + 8 * args.dimension + INDEX_ROW) * args.images
    shards = math.ceil(args.images / args.shard)
    name, sizes, _ = CONFIGURATIONS[args.dimension]
    heading = (
        f"{args.images:,} images, P = {args.dimension} (`{name}`, patch sizes "
        f"{', '.join(map(str, sizes))}), `local_features = {args.kind}`, {shards} "
        f"shard{'s' * (shards > 1)} of {math.ceil(args.images / shards):,}"
    )
    made = {
        "heading": lambda: iter([heading]),
        "sizes": lambda: sizes_of(args, local),
        "features": lambda: features(args, bench),
        "extraction": lambda: extraction(args, bench),
        "indexes": lambda: indexes(args, cells),
        "reranking": lambda: reranking(bench),
        "cost": lambda: cost(args, bench, stored),
    }
    parts = [args.part] if args.part != "all" else [part for part in made if part != "features"]
    if not (args.price_core_hour and args.price_gb_month):
        parts = [part for part in parts if part != "cost"]
    return "\n\n".join("\n".join(made[part]()) for part in parts) + "\n"


def sizes_of(args: argparse.Namespace, local: float) -> Iterator[str]:
    """Yield the bytes of all that is kept."""
    yield line_of(["on disk", "per image", "total"])
    yield line_of(["---"] * 3)
    for words, each in (
        ("photographs (assumed size)", args.image_bytes),
        (f"local features, `{args.kind}`", local),
        ("global descriptors, in their records", 4 * args.dimension),
        ("`globalfeats.npy`", 4 * args.dimension),
        ("`features.sqlite`, at most", INDEX_ROW),
    ):
        yield line_of([words, size(each), size(each * args.images)])


def reranking(bench: dict[str, Any]) -> Iterator[str]:
    """Yield what re-ranking takes, which does not depend on the number of images."""
    yield line_of(["re-ranking of 100 candidates, P = 128", "views", "indoors"])
    yield line_of(["---"] * 3)
    for words, case, program in RERANKING:
        seconds = [rate(bench, c, program) for c in (case, f"{case} (tower)")]
        yield line_of([words, *(f"{s:.2f} core-s per query" for s in seconds)])


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scale.py plan", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--images", type=float, required=True, help="such as 1e7")
    parser.add_argument("--dimension", type=int, choices=sorted(CONFIGURATIONS), default=512)
    parser.add_argument("--kind", choices=("map", *BYTES), default="float16",
                        help="local_features")  # fmt: skip
    parser.add_argument("--shard", type=float, default=1e7, help="most images of an index shard")
    parser.add_argument("--part", default="all",
                        choices=("all", *PARTS))  # fmt: skip
    parser.add_argument("--image_bytes", type=float, default=PHOTOGRAPH)
    parser.add_argument("--cores", type=int, default=64, help="that extract at a time")
    parser.add_argument("--memory", type=float, default=256, help="GB of a machine for the index")
    parser.add_argument("--price_core_hour", type=float, default=0.0)
    parser.add_argument("--price_gb_month", type=float, default=0.0)
    return parser


def main(words: list[str]) -> int:
    print(plan(words), end="")
    return 0
