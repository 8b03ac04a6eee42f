# SPDX-License-Identifier: MIT
"""How cost grows with the number of index images: time a query and memory, from made-up features.

For data sets of 1, 2, 4 and 8 sizes, a real feature store is written through the writer that
extraction uses: a global descriptor of 512 numbers and 60 patches of 32 numbers (float16) an image,
6 kB, so that 100,000 images fit on the disk. Then, in a process of its own for each size, so that
its memory is its own:

opening     reading the store's index and the global descriptors
retrieval   100 candidates of each of 200 queries, by exact search and by lists (IVF)
re-ranking  these candidates, by RANSAC and by rapid spatial scoring

Each is measured three times, and medians are given. Files are in the page cache. Peak memory is the
largest resident set of that process, pages of mapped files included: with exact search, and after
search by lists; what the libraries alone take is given beside it.

    python benchmarks/growth.py [--sizes 12500 25000 50000 100000] [--output DIR]

Written: ``growth.md`` and ``growth.png``, after every size.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import machine, run
from report import duration, line_of, write

from patchnetvlad.config import Config
from patchnetvlad.engines.rerank import rerank_candidates
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.open import open_reader, open_writer
from patchnetvlad.features.store.codec import encode_patches
from patchnetvlad.models.grid import patch_grids
from patchnetvlad.search.retrieve import retrieve

SIZES = (12_500, 25_000, 50_000, 100_000)
GLOBAL_DIM, PATCH_DIM = 512, 32
IMAGE_SIZE = (160, 224)  # 10 x 14 cells, on which 6 x 10 patches of size 5 lie
FACTORIES = ("Flat", "IVF256,Flat")
MATCHERS = ("RANSAC", "spatialApproximator")
CONFIG = Config(
    num_pcs=GLOBAL_DIM, patch_sizes=(5,), strides=(1,), patch_weights=(1.0,),
    image_size=IMAGE_SIZE, match_image_size=IMAGE_SIZE,
)  # fmt: skip
COMMIT = 10_000  # images


def write_store(folder: Path, count: int, places: int, seed: int) -> float:
    """Write a store of made-up features of places, in turn; return the seconds that writing took.

    Images of one place differ by noise.
    """
    (grid,) = patch_grids(IMAGE_SIZE, CONFIG.patch_sizes, CONFIG.strides)
    names = names_of(count)
    seconds = 0.0
    with open_writer(folder, names, Manifest.of(CONFIG, names, "")) as writer:
        random = np.random.default_rng(seed)
        for first in range(0, count, COMMIT):
            which = np.arange(first, min(first + COMMIT, count)) % places
            whole = noisy(which, (GLOBAL_DIM,), random)
            patches = torch.from_numpy(noisy(which, (len(grid), PATCH_DIM), random))
            start = time.perf_counter()
            for n in range(len(which)):
                writer.write(first + n, whole[n], encode_patches([patches[n]], "float16"))
            writer.commit()
            seconds += time.perf_counter() - start
        start = time.perf_counter()
        writer.finish()
        return seconds + time.perf_counter() - start


def places_of(count: int) -> int:
    """Count the places that this many images show: ten images each."""
    return max(1, count // 10)


def names_of(count: int) -> list[str]:
    return [f"{i:06d}.png" for i in range(count)]


def noisy(which: np.ndarray, shape: tuple[int, ...], random: np.random.Generator) -> np.ndarray:
    """Make up unit vectors [n, *shape] of places: each place's own, with noise."""
    own = {
        place: np.random.default_rng(place).standard_normal(shape, dtype=np.float32)
        for place in np.unique(which).tolist()
    }
    values = np.stack([own[place] for place in which.tolist()])
    values += 0.7 * random.standard_normal(values.shape, dtype=np.float32)
    return values / np.linalg.norm(values, axis=-1, keepdims=True)


def several(work: Callable[[], Any], repeats: int) -> tuple[float, Any]:
    """Give the median of several times, s, and the last result; one is held at a time."""
    times, result = [], None
    for _ in range(repeats):
        del result
        start = time.perf_counter()
        result = work()
        times.append(time.perf_counter() - start)
    return statistics.median(times), result


def peak() -> int:
    """Return the largest resident set of this process so far, bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024)


def measure(folder: Path, count: int, num_queries: int, candidates: int, repeats: int) -> Any:
    """Open, retrieve and re-rank; give the median seconds of each, and what was right."""
    import faiss  # noqa: F401

    found: dict[str, Any] = {"base": peak()}
    found["open"], index = several(
        lambda: open_reader(folder / "index", names_of(count), CONFIG), repeats
    )
    queries = open_reader(folder / "queries", names_of(num_queries), CONFIG)

    def search(factory: str) -> Any:
        """Retrieve with all queries and with one, so that loading the index drops out."""

        def retrieved(rows: Any) -> Any:
            saved = None if factory == "Flat" else folder / f"{factory}.faiss"
            return retrieve(
                rows, index.global_descriptors, candidates, factory=factory, index_path=saved
            )

        first = queries.global_descriptors[:1]
        found[f"build {factory}"], _ = several(lambda: retrieved(first), 1)
        few, _ = several(lambda: retrieved(first), repeats)
        many, predictions = several(lambda: retrieved(queries.global_descriptors), repeats)
        found[f"retrieve {factory}"] = (many - few) / (num_queries - 1)
        return predictions

    exact = search("Flat")
    grids = patch_grids(IMAGE_SIZE, CONFIG.patch_sizes, CONFIG.strides)

    def reranked(matcher: str) -> Any:
        return rerank_candidates(
            exact, queries.patches, index.patches, lambda i: grids, lambda i: grids,
            replace(CONFIG, matcher=matcher), progress=False,
        )  # fmt: skip

    places = places_of(count)
    for matcher in MATCHERS:
        seconds, reranking = several(partial(reranked, matcher), repeats)
        found[f"rerank {matcher}"] = seconds / num_queries
        right = reranking.predictions[:, 0] % places == np.arange(num_queries) % places
        found[f"right {matcher}"] = float(right.mean())
    found["peak"] = peak()
    for factory in FACTORIES[1:]:
        same = [len(np.intersect1d(a, b)) for a, b in zip(search(factory), exact, strict=True)]
        found[f"recall {factory}"] = float(np.mean(same) / exact.shape[1])
    found["peak with lists"] = peak()
    return found


def grow(sizes: list[int], num_queries: int, candidates: int, repeats: int, output: Path) -> None:
    """Measure each size in a process of its own; write the table and the chart."""
    output.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, Any]] = []
    for count in sizes:
        with tempfile.TemporaryDirectory(prefix="patchnetvlad-growth-") as name:
            folder = Path(name)
            places = places_of(count)
            seconds = write_store(folder / "index", count, places, seed=1)
            write_store(folder / "queries", num_queries, places, seed=2)
            size = sum(file.stat().st_size for file in (folder / "index").iterdir())
            task = {
                "folder": name, "count": count, "num_queries": num_queries,
                "candidates": min(candidates, count), "repeats": repeats,
            }  # fmt: skip
            child = run([sys.executable, __file__, "--child", json.dumps(task)])
            row = json.loads((folder / "found.json").read_text())
            row |= {"count": count, "write": seconds, "bytes": size}
            rows.append(row)
        print(f"{count}: {child.seconds:.0f} s", file=sys.stderr, flush=True)
        write(output / "growth.md", table(rows, num_queries, candidates))
        chart(rows, output / "growth.png")
    print(table(rows, num_queries, candidates))


def columns(rows: list[dict[str, Any]]) -> dict[str, Callable[[dict[str, Any]], str]]:
    """Give the columns of the table."""
    shown: dict[str, Callable[[dict[str, Any]], str]] = {
        "index images": lambda r: f"{r['count']:,}",
        "on disk": lambda r: f"{r['bytes'] / 1e6:,.0f} MB",
        "writing an image": lambda r: duration(r["write"] / r["count"]),
        "opening": lambda r: duration(r["open"]),
    }
    for factory in FACTORIES:
        shown[f"retrieval a query, {factory}"] = lambda r, f=factory: (
            duration(r[f"retrieve {f}"])
            + (f" ({100 * r[f'recall {f}']:.0f} %)" if f != "Flat" else "")
        )
        if factory != "Flat":
            shown[f"building {factory}"] = lambda r, f=factory: duration(r[f"build {f}"])
    for matcher in MATCHERS:
        shown[f"re-ranking a query, {matcher}"] = lambda r, m=matcher: (
            f"{duration(r[f'rerank {m}'])} ({100 * r[f'right {m}']:.0f} %)"
        )
    shown["peak memory"] = lambda r: f"{r['peak'] / 1e6:,.0f} MB"
    shown["with lists"] = lambda r: f"{r['peak with lists'] / 1e6:,.0f} MB"
    shown["libraries alone"] = lambda r: f"{r['base'] / 1e6:,.0f} MB"
    return shown


def table(rows: list[dict[str, Any]], num_queries: int, candidates: int) -> str:
    """Return the results as Markdown."""
    about = machine()
    shown = columns(rows)
    lines = [
        "# How cost grows with the data set",
        "",
        "Made by `make bench-scale` (`benchmarks/growth.py`): made-up features in a real store, "
        f"{num_queries} queries, {candidates} candidates each; global descriptors of {GLOBAL_DIM} "
        f"numbers, 60 patches of {PATCH_DIM} numbers (float16) an image. Files are in the page "
        "cache. In brackets: of retrieval, the share of the candidates of exact search that it "
        "found; of re-ranking, queries whose first answer is right. Peak memory is the largest "
        "resident set of the process, pages of mapped files included: with exact search, with "
        "search by lists after it, and of the libraries alone.",
        "",
        f"{about['date']}. {about['machine']}. {about['versions']}.",
        "",
        line_of(shown),
        line_of(["---"] * len(shown)),
        *(line_of(text(row) for text in shown.values()) for row in rows),
    ]
    return "\n".join(lines) + "\n"


def chart(rows: list[dict[str, Any]], file: Path) -> None:
    """Draw time a query and memory over the number of images, both axes logarithmic."""
    from matplotlib import pyplot as plt

    lines = {f"retrieval, {factory}": f"retrieve {factory}" for factory in FACTORIES}
    lines |= {f"re-ranking, {matcher}": f"rerank {matcher}" for matcher in MATCHERS}
    lines["opening the store"] = "open"
    counts = [row["count"] for row in rows]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained")
    styles = zip(
        ("#0072B2", "#56B4E9", "#E69F00", "#D55E00", "#009E73"), ("o", "s", "^", "v", "D"),
        strict=True,
    )  # fmt: skip
    for (label, key), (colour, marker) in zip(lines.items(), styles, strict=True):
        values = [1e3 * max(row[key], 1e-9) for row in rows]
        left.plot(counts, values, color=colour, marker=marker, label=label)
    left.set_yscale("log")
    left.yaxis.set_major_formatter("{x:g}")
    left.set_ylabel("ms a query (opening: ms)")
    memory = [row["peak"] / 1e6 for row in rows]
    right.plot(counts, memory, color="#0072B2", marker="o", label="peak memory")
    right.plot(counts, [row["base"] / 1e6 for row in rows], "--", color="black", label="libraries")
    right.plot(counts, [row["bytes"] / 1e6 for row in rows], color="#CC79A7", marker="s",
               label="store on disk")  # fmt: skip
    right.set_ylabel("MB")
    right.set_ylim(bottom=0)
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.set_xticks(counts, [f"{count:,}" for count in counts])
        axis.minorticks_off()
        axis.set_xlabel("index images")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
    figure.savefig(file, dpi=130)
    plt.close(figure)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="index images")
    parser.add_argument("--queries", type=int, default=200)
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).resolve().parent, metavar="DIR"
    )
    parser.add_argument("--child", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child is None:
        grow(
            list(arguments.sizes), arguments.queries, arguments.candidates, arguments.repeats,
            arguments.output,
        )  # fmt: skip
        return 0
    task = json.loads(arguments.child)
    folder = Path(task.pop("folder"))
    write(folder / "found.json", json.dumps(measure(folder, **task)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
