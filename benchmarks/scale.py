"""Retrieval of many images: what kinds of index cost and find, up to what the memory carries.

    python benchmarks/scale.py [measure] [--sizes 30000 100000 ...] [--work DIR] [--output DIR]
    python benchmarks/scale.py report [--output DIR]
    python benchmarks/scale.py plan --images 1e7 --dimension 512 --kind map

``measure`` makes up global descriptors (see :func:`streets`), builds each kind of index as
``patchnetvlad.search.retrieve`` builds it, and searches it with 500 queries:

building    core-seconds of training the lists, of training the codes, of finding the list of every
            descriptor, and of adding
searching   core-milliseconds a query, 100 candidates, at several settings, the package's among them
recall@R    share of the queries whose nearest descriptor is among the first R = 1, 10, 100 found
overlap     share of the nearest 100 that is among the 100 found
place@R     share of the queries of which one of the four frames around them is among the first R
bytes       of the index's file, a descriptor
memory      largest resident set of building and searching, less what the process had before; the
            descriptors come from a file in blocks

A core-second is a second of one thread's time on the processor (``time.process_time``, FAISS with
one thread), which other work on the machine does not enter directly. Every cell runs in a process
of its own. The centres of the lists, and the list of every descriptor, are computed once for all
kinds of the same size and dimension, and their time is counted in each.

Written after every cell: ``scale.json``, from which a later run goes on; at the end and by
``report``: ``scale.md``, ``scale.png`` and ``scale_recall.png``. ``plan`` works out what a number
of images takes from what was measured.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from scale_cells import lists_for

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

STREET = 100  # images a street
BLOCK = 100  # streets made up at a time
HELD_OUT = (17, 37, 57, 77, 97)  # frames of a street that are queries
SHARED, AREA = 0.037, 0.16  # of the squared norm: what all images share, and those of a street
ALONG = float(np.exp(-1 / 17))  # correlation of a street's share from one image to the next
STEP = (0.84, 1.70)  # of the Beta distribution of the correlation of the rest
SPECTRUM = (1.5, 0.5)  # standard deviations of the first and the last dimension
QUERIES, TOP = 500, 100
AMONG = 30_000  # images, along whose streets the queries of all sizes are
READ = 50_000  # descriptors read at a time
SIZES = (30_000, 100_000, 300_000, 1_000_000)
MOST_LISTS = 2048


def streets(block: int, dimension: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Make up global descriptors of walks along 100 streets, float32: images and queries.

    A descriptor is the sum of what all images share, of what those of a street share, which
    changes slowly along it, and of what changes from image to image by a correlation that is drawn
    for each step: now the walker stands, now turns round a corner. The shares, the correlations
    and the spread over the dimensions were fitted to the similarities of 187 frames of a walk
    through a building; ``docs/scale.md`` compares them. Five frames of each street are held out.

    Returns
    -------
    images : ndarray [100 * 100, dimension]
        Street by street.
    queries : ndarray [100 * 5, dimension]
    """
    random = np.random.default_rng([seed, dimension, block])
    draw = Drawing(random, dimension)
    slow, fast = draw(BLOCK), draw(BLOCK)
    frames = np.empty((BLOCK, STREET + len(HELD_OUT), dimension), np.float32)
    for n in range(frames.shape[1]):
        if n:
            slow = mixed(slow, draw(BLOCK), ALONG)
            fast = mixed(fast, draw(BLOCK), random.beta(*STEP, (BLOCK, 1)))
        frames[:, n] = np.sqrt(AREA) * slow + np.sqrt(1 - SHARED - AREA) * fast
    frames += np.float32(np.sqrt(SHARED)) * shared(dimension)
    frames /= np.linalg.norm(frames, axis=2, keepdims=True)
    held_out = frames[:, HELD_OUT].reshape(-1, dimension)
    return np.delete(frames, HELD_OUT, axis=1).reshape(-1, dimension), held_out


class Drawing:
    """Draw normal vectors [n, P] whose squared norm is 1 in the mean, of uneven dimensions."""

    def __init__(self, random: np.random.Generator, dimension: int) -> None:
        self.random = random
        self.scale = np.linspace(*SPECTRUM, dimension, dtype=np.float32)
        self.scale /= np.linalg.norm(self.scale)

    def __call__(self, count: int) -> np.ndarray:
        values = self.random.standard_normal((count, len(self.scale)), dtype=np.float32)
        return values * self.scale


def mixed(old: np.ndarray, new: np.ndarray, share: Any) -> np.ndarray:
    """Go on from ``old`` with a correlation of ``share``."""
    share = np.asarray(share, np.float32)
    return share * old + np.sqrt(1 - share**2) * new


def shared(dimension: int) -> np.ndarray:
    """Return the unit vector of what all images share."""
    vector = Drawing(np.random.default_rng(dimension), dimension)(1)[0]
    return vector / np.linalg.norm(vector)


def statistics(dimension: int) -> dict[str, float]:
    """Measure similarities (cosines) of made-up descriptors, as they are known of real ones."""
    images, queries = streets(0, dimension)
    rows = images.reshape(BLOCK, STREET, dimension)[:, : HELD_OUT[0]]  # none is missing there
    found: dict[str, Any] = {}
    for apart in (1, 2, 5, 10):
        cosines = np.einsum("snd,snd->sn", rows[:, apart:], rows[:, :-apart])
        found |= {f"mean {apart}": cosines.mean(), f"spread {apart}": cosines.std()}
    one = rows[:, 0]
    others = (one @ one.T)[np.triu_indices(BLOCK, 1)]
    found |= {"mean other": others.mean(), "spread other": others.std()}
    found["high other"] = np.quantile(others, 0.99)
    # As many as the real images, of two streets; the median over streets.
    distances = []
    for street in range(0, BLOCK, 2):
        few = images[street * STREET :][:154]
        its = queries[street * len(HELD_OUT) :][: len(HELD_OUT)]
        distances.append(np.sqrt(np.maximum(2 - 2 * its @ few.T, 0)))
    ordered = np.sort(np.concatenate(distances), axis=1)
    found |= {f"distance {rank}": np.median(ordered[:, rank - 1]) for rank in (1, 2, 10, 100)}
    return {name: round(float(value), 3) for name, value in found.items()}


class Descriptors:
    """Made-up descriptors [N, P] in a file, of which the first are used for smaller sizes."""

    def __init__(self, folder: Path, dimension: int) -> None:
        self.dimension = dimension
        self.file = folder / f"descriptors-{dimension}.f32"

    def make(self, count: int) -> None:
        """Append blocks until there are ``count``."""
        bytes_a_block = BLOCK * STREET * self.dimension * 4
        have = self.file.stat().st_size // bytes_a_block if self.file.is_file() else 0
        with self.file.open("ab") as file:
            file.truncate(have * bytes_a_block)
            for block in range(have, -(-count // (BLOCK * STREET))):
                streets(block, self.dimension)[0].tofile(file)

    def read(self, first: int, count: int) -> np.ndarray:
        # Not mapped: pages of the file would count as memory of the process.
        rows = np.fromfile(
            self.file, np.float32, count * self.dimension, offset=4 * first * self.dimension
        )
        return rows.reshape(-1, self.dimension)

    def blocks(self, count: int) -> Iterator[tuple[int, np.ndarray]]:
        for first in range(0, count, READ):
            yield first, self.read(first, min(READ, count - first))

    def queries(self, count: int, among: int) -> tuple[np.ndarray, np.ndarray]:
        """Make up queries [count, P] along the streets of the first ``among``.

        Also given are the rows [count, 4] of the frames before and after each.
        """
        blocks = range(-(-among // (BLOCK * STREET)))
        rows = np.concatenate([streets(block, self.dimension)[1] for block in blocks])
        rows = rows[: among // STREET * len(HELD_OUT)]
        chosen = np.linspace(0, len(rows) - 1, count).astype(int)
        street, number = np.divmod(chosen, len(HELD_OUT))
        after = STREET * street + np.take(HELD_OUT, number) - number
        return rows[chosen], after[:, None] + np.arange(-2, 2)


def factories(count: int, dimension: int, most_lists: int) -> list[str]:
    """Return the kinds of index to be measured; the exact one, which others need, first."""
    ivf = f"IVF{lists_for(count, most_lists)}"
    if dimension > 128:
        codes = dimension // 8
        return [
            "Flat", "SQfp16", f"{ivf},Flat", f"{ivf},PQ{codes}", f"{ivf},RaBitQ",
            f"{ivf},RaBitQ,Refine(SQfp16)", "HNSW32",
        ]  # fmt: skip
    kinds = ["Flat", f"{ivf},SQfp16", f"{ivf},PQ32", f"{ivf},RaBitQ"]
    kinds += [f"{ivf},RaBitQ,Refine(SQfp16)"]
    if count <= 1_000_000:
        kinds += ["SQfp16", f"{ivf},Flat", "HNSW32"]
    if count == 100_000:
        kinds += [f"{ivf},RaBitQ4", f"{ivf},PQ16", f"{ivf},PQ64", f"{ivf},PQ32,Refine(SQfp16)"]
        kinds += [f"RR128,{ivf},RaBitQ", "HNSW32_SQfp16"]
    return kinds


def settings_of(built: Any) -> list[dict[str, int]]:
    """Return settings of search to be tried, the package's own first."""
    import faiss

    lists = faiss.try_extract_index_ivf(built)
    if lists is not None:
        default = lists.nprobe
        several = (16, 64, 256, 512, 1024) if built.ntotal <= 1_000_000 else (64, 512)
        tried = [n for n in several if n <= lists.nlist and n != default]
        return [{"nprobe": n} for n in [default, *tried]]
    if hasattr(built, "hnsw"):
        return [{"efSearch": n} for n in (built.hnsw.efSearch, 64, 100, 400, 800)]
    return [{}]


class Stopwatch:
    """Core-seconds of this process, by what they went into."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.process_time()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.process_time() - start


def prepare(built: Any) -> None:
    """Set what the package sets before it trains an index."""
    from patchnetvlad.search import index

    for part in index.index_parts(built):
        if hasattr(part, "do_polysemous_training"):
            part.do_polysemous_training = False
    index.set_parameter(built, "efConstruction", index.EF_CONSTRUCTION)


def sample_of(data: Descriptors, count: int, lists: int) -> np.ndarray:
    """Return what lists are trained with; FAISS takes 256 a list, and 65,536 for codes."""
    return data.read(0, min(count, max(256 * lists, 65_536)))


def centres(work: Path, data: Descriptors, count: int, lists: int) -> tuple[Any, float]:
    """Return the trained quantizer of lists, and the core-seconds that it took, once."""
    import faiss

    from patchnetvlad.search import index

    file = work / f"centres-{data.dimension}-{min(count, 256 * lists)}-{lists}.faiss"
    about = file.with_suffix(".json")
    if not about.is_file():
        built = index.empty_index(f"IVF{lists},Flat", data.dimension)
        clock = Stopwatch()
        with clock("lists"):
            built.train(sample_of(data, count, lists)[: 256 * lists])
        faiss.write_index(built.quantizer, str(file))
        about.write_text(json.dumps(clock.seconds["lists"]))
    return faiss.read_index(str(file)), json.loads(about.read_text())


def assignments(work: Path, data: Descriptors, quantizer: Any, count: int) -> tuple[Path, float]:
    """Return a file of the list of every descriptor, and the core-seconds that it took, once."""
    file = work / f"lists-{data.dimension}-{count}-{quantizer.ntotal}.i64"
    about = file.with_suffix(".json")
    if not about.is_file():
        clock = Stopwatch()
        with file.open("wb") as written:
            for _, rows in data.blocks(count):
                with clock("assign"):
                    found = quantizer.search(rows, 1)[1]
                found.astype(np.int64).tofile(written)
        about.write_text(json.dumps(clock.seconds["assign"]))
    return file, json.loads(about.read_text())


def build(work: Path, data: Descriptors, count: int, factory: str) -> tuple[Any, dict[str, float]]:
    """Build an index as ``retrieve`` does, but from blocks; give it and the core-seconds."""
    import faiss

    from patchnetvlad.search import index

    built = index.empty_index(factory, data.dimension)
    prepare(built)
    clock = Stopwatch()
    refine = built if isinstance(built, faiss.IndexRefine) else None
    ivf: Any = faiss.downcast_index(refine.base_index) if refine is not None else built
    assigned = None
    lists = faiss.try_extract_index_ivf(built)
    if isinstance(ivf, faiss.IndexIVF):
        quantizer, clock.seconds["lists"] = centres(work, data, count, ivf.nlist)
        assigned, clock.seconds["assign"] = assignments(work, data, quantizer, count)
        ivf.quantizer.add(faiss.rev_swig_ptr(quantizer.get_xb(), quantizer.ntotal * data.dimension)
                          .reshape(-1, data.dimension))  # fmt: skip
    if not built.is_trained:
        sample = sample_of(data, count, lists.nlist if lists is not None else 0)
        with clock("train"):
            built.train(sample)
        del sample
    for first, rows in data.blocks(count):
        if assigned is None:
            with clock("add"):
                built.add(rows)
            continue
        where = np.fromfile(assigned, np.int64, len(rows), offset=8 * first)
        with clock("add"):
            ivf.add_core(len(rows), faiss.swig_ptr(rows), None, faiss.swig_ptr(where))
            if refine is not None:
                refine.refine_index.add(rows)
                refine.ntotal = ivf.ntotal
    return built, clock.seconds


def search(
    built: Any, queries: np.ndarray, places: np.ndarray, nearest: np.ndarray | None
) -> tuple[list[dict[str, Any]], np.ndarray]:
    """Search at each setting; give settings, core-seconds a query, recalls and overlap.

    ``places`` [Q, m] are the rows of the right place; ``nearest`` [Q, 100] is None for the exact
    index itself. The rows found at the package's setting are given, too.
    """
    from patchnetvlad.search import index

    index.set_search_parameters(built, TOP, built.ntotal)
    rows = []
    for number, settings in enumerate(settings_of(built)):
        for name, value in settings.items():
            index.set_parameter(built, name, value)
        built.search(queries[:20], TOP)
        times = []
        while len(times) < 3 and sum(times) < 2:
            start = time.process_time()
            found = built.search(queries, TOP)[1]
            times.append(time.process_time() - start)
        if number == 0:
            first, nearest = found, found if nearest is None else nearest
        row: dict[str, Any] = {"settings": settings, "seconds": min(times) / len(queries)}
        row["package"] = number == 0
        for rank in (1, 10, 100):
            hits = (found[:, :rank] == nearest[:, :1]).any(axis=1)
            right = (found[:, :rank, None] == places[:, None]).any(axis=(1, 2))
            row |= {f"recall {rank}": float(hits.mean()), f"place {rank}": float(right.mean())}
        same = [len(np.intersect1d(a, b)) for a, b in zip(found, nearest, strict=True)]
        row["overlap"] = float(np.mean(same) / nearest.shape[1])
        rows.append(row)
    return rows, first


def measure(task: dict[str, Any]) -> dict[str, Any]:
    """Build and search one kind of index: a cell of the table."""
    import faiss

    faiss.omp_set_num_threads(1)
    work, count, factory = Path(task["work"]), task["count"], task["factory"]
    data = Descriptors(work, task["dimension"])
    made, truth = np.load(task["queries"]), Path(task["truth"])
    before = peak()
    built, seconds = build(work, data, count, factory)
    nearest = None if factory == "Flat" else np.load(truth)
    rows, found = search(built, made["queries"], made["places"], nearest)
    if factory == "Flat":
        np.save(truth, found)
    used = peak() - before
    with tempfile.NamedTemporaryFile(dir=work, suffix=".faiss") as file:
        faiss.write_index(built, file.name)
        size = os.stat(file.name).st_size
    return {"build": seconds, "search": rows, "bytes": size / count, "memory": used}


def peak() -> int:
    """Return the largest resident set of this process so far, bytes."""
    largest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return largest * (1 if sys.platform == "darwin" else 1024)


def key_of(dimension: int, count: int, factory: str) -> str:
    return f"{dimension} {count} {factory}"


def run_all(
    sizes: list[int], dimensions: list[int], kinds: str, most_lists: int, queries: int,
    work: Path, output: Path, say: Callable[[str], None],
) -> dict[str, Any]:  # fmt: skip
    """Measure what ``scale.json`` does not have yet; write it after every cell."""
    from measure import machine, run
    from report import write

    work.mkdir(parents=True, exist_ok=True)
    output.mkdir(parents=True, exist_ok=True)
    file = output / "scale.json"
    results = json.loads(file.read_text()) if file.is_file() else {"cells": {}}
    if results.setdefault("queries", queries) != queries:
        raise SystemExit(f"{file} has cells of {results['queries']} queries; name another --output")
    results["about"] = machine()
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    for dimension in dimensions:
        results.setdefault("statistics", {})[str(dimension)] = statistics(dimension)
        for count in sorted(sizes):
            todo = factories(count, dimension, most_lists)
            todo = [f for f in todo if f == "Flat" or re.search(kinds, f)]
            done = [f for f in todo if key_of(dimension, count, f) in results["cells"]]
            if len(done) == len(todo):
                continue
            data = Descriptors(work, dimension)
            data.make(count)
            among = min(AMONG, *sizes)
            asked = work / f"queries-{dimension}-{queries}-{among}.npz"
            truth = work / f"nearest-{dimension}-{queries}-{among}-{count}.npy"
            if not asked.is_file():
                made, places = data.queries(queries, among)
                np.savez(asked, queries=made, places=places)
            if not truth.is_file():
                done = [f for f in done if f != "Flat"]
            for factory in (f for f in todo if f not in done):
                task = {
                    "work": str(work), "count": count, "dimension": dimension, "factory": factory,
                    "queries": str(asked), "truth": str(truth),
                }  # fmt: skip
                start = time.perf_counter()
                words = [sys.executable, __file__, "--child", json.dumps(task)]
                run(words, {**os.environ, **one})
                cell = json.loads((work / "found.json").read_text())
                results["cells"][key_of(dimension, count, factory)] = cell
                write(file, json.dumps(results, indent=1) + "\n")
                say(f"{key_of(dimension, count, factory)}: {time.perf_counter() - start:.0f} s")
    return results


def main(words: list[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    if words[:1] == ["--child"]:
        task = json.loads(words[1])
        (Path(task["work"]) / "found.json").write_text(json.dumps(measure(task)))
        return 0
    if words[:1] == ["plan"]:
        from scale_plan import main as plan

        return plan(words[1:])
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", choices=("measure", "report"), default="measure")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="descriptors")
    parser.add_argument("--dimensions", type=int, nargs="+", default=[128], help="P")
    parser.add_argument("--kinds", default="", help="regular expression of factories (all)")
    parser.add_argument("--most_lists", type=int, default=MOST_LISTS)
    parser.add_argument("--queries", type=int, default=QUERIES)
    parser.add_argument("--work", type=Path, default=HERE.parent / "build" / "scale",
                        help="folder of descriptors, 4 P bytes each")  # fmt: skip
    parser.add_argument("--output", type=Path, default=HERE)
    args = parser.parse_args(words)
    if args.what == "measure":
        run_all(
            args.sizes, args.dimensions, args.kinds, args.most_lists, args.queries, args.work,
            args.output, lambda text: print(text, file=sys.stderr, flush=True),
        )  # fmt: skip
    from scale_report import show

    print(show(args.output))
    return 0


if __name__ == "__main__":
    sys.exit(main())
