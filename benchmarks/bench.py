# SPDX-License-Identifier: MIT
"""Ours and the research code side by side, in one run, on the same images and checkpoints.

Both run on the CPU, in turn, as whole processes; see ``measure`` for how time and memory are
measured. The parts are

extract     time an image and peak memory; share of the machine's sgemm limit that the arithmetic of
            VGG16 and whitening makes up
disk        bytes an image of each form of features, files of every kind counted
rerank      time a query of 100 candidates from features that both read, ranks compared: views of
            the shipped photographs (no candidate twice, files in the page cache) or, with
            --data_set, a data set of your own; shares of the copy limit (features read) and of
            the sgemm limit (products of descriptors)
retrieval   search by global descriptors, within this process: made-up descriptors in clusters

    python benchmarks/bench.py [--quick] [--parts rerank disk] [--cases 'performance*' ...]

Results are written after every case: raw numbers to ``bench.json``, from which ``bench.md`` and
``bench.png`` are made. A run of some parts or cases replaces these, and keeps the others.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import report
import research_code
import torch
from measure import Limits, Run, in_turn, machine, medians, run
from workload import (
    ONE_SIZE,
    THREE_SIZES,
    Settings,
    matching_flops,
    write_checkpoint,
    write_images,
    write_list,
    write_views,
)

from patchnetvlad.base.device import multiplies_int8
from patchnetvlad.base.files import file_sha256
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.features.manifest import GLOBAL_FILE, Manifest
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.store.codec import encode_patches
from patchnetvlad.matching.fusion import fuse_scores
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.search.retrieve import retrieve

PARTS = ("extract", "disk", "rerank", "retrieval")
RESEARCH = "research code"
CANDIDATES = 100


@dataclass
class Bench:
    """One run: its options, its folder for what is passing, and what it found."""

    folder: Path
    results: report.Results
    repeats: int
    quick: bool
    cases: Sequence[str]
    data_set: tuple[Path, Path, Path] | None = None  # root, queries, index images
    failed: list[str] = field(default_factory=list)

    def wants(self, name: str, default: bool = True) -> bool:
        """Whether a case is to be measured: one that is named, or that all runs measure."""
        return any(fnmatch.fnmatch(name, case) for case in self.cases) or (
            default and not self.cases
        )

    def case(self, part: str, name: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        """Measure a case and keep its rows; a failure does not end the run."""
        say(f"{part} {name}")
        start = time.perf_counter()
        try:
            rows = measure()
        except Exception:
            traceback.print_exc()
            self.failed.append(f"{part} {name}")
            return
        self.results.put(part, name, rows)
        say(f"  {time.perf_counter() - start:.0f} s")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def ours(script: str, *arguments: str | Path) -> Run:
    """Run one of our commands."""
    words = [sys.executable, "-m", f"patchnetvlad.cli.{script}", *map(str, arguments), "--nocuda"]
    return run(words)


def theirs(script: str, *arguments: str | Path) -> Run:
    """Run a script of the research code."""
    words = research_code.words_of(script, *arguments)
    return run(words, research_code.environment(), str(research_code.FOLDER))


def rows_of(
    measured: dict[str, list[dict[str, float]]],
    limits: Limits,
    flops: float,
    *,
    label: str,
    unit: str,
    **more: Any,
) -> list[dict[str, Any]]:
    """Turn what was measured into rows, with ratios of medians to the research code."""
    rows = []
    theirs = medians(measured[RESEARCH])
    for name, repeats in measured.items():
        values = medians(repeats)
        row = {"label": label, "program": name, "unit": unit, **values, "repeats": repeats}
        row |= {**limits.to_json(), **more}
        if values["seconds"] > 0:  # not with the few images of a quick run
            row["sgemm_share"] = flops / values["seconds"] / limits.sgemm
        if name != RESEARCH:
            row["peak_bytes_ratio"] = theirs["peak_bytes"] / values["peak_bytes"]
            if min(values["seconds"], theirs["seconds"]) > 0:
                row["seconds_ratio"] = theirs["seconds"] / values["seconds"]
        rows.append(row)
    return rows


# --- extraction -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Extraction:
    """A case: what is extracted, and for how many images each program runs."""

    settings: Settings
    counts: tuple[int, int] = (5, 15)
    variants: bool = False  # also with patch_vlad = direct, and precision = fast or int8
    default: bool = True


EXTRACTIONS = {
    "performance-K64": Extraction(Settings(4096, 64, THREE_SIZES), (5, 10), variants=True),
    "performance-K16": Extraction(Settings(4096, 16, THREE_SIZES), (5, 10)),
    "speed-K16": Extraction(Settings(512, 16), variants=True),
    "speed-K64": Extraction(Settings(512, 64), (5, 10), variants=True, default=False),
    "storage-K16": Extraction(Settings(128, 16)),
    "netvlad512-K64": Extraction(Settings(512, 64, pooling="netvlad")),
    "netvlad4096-K64": Extraction(Settings(4096, 64, pooling="netvlad"), default=False),
}
QUICK_EXTRACTIONS = ("storage-K16", "netvlad512-K64")


def extract_once(
    program: Callable[..., Run], config: Path, images: Path, names: Sequence[str], output: Path
) -> Run:
    """Extract the features of some images into a new folder."""
    shutil.rmtree(output, ignore_errors=True)
    listing = write_list(output.with_suffix(".txt"), names)
    return program(
        "feature_extract", "--config_path", config, "--dataset_root_dir", images,
        "--dataset_file_path", listing, "--output_features_dir", output,
    )  # fmt: skip


def extraction(bench: Bench) -> None:
    images = bench.folder / "images"
    names = write_images(images, max(case.counts[1] for case in EXTRACTIONS.values()))
    for name, case in EXTRACTIONS.items():
        default = name in QUICK_EXTRACTIONS if bench.quick else case.default
        if bench.wants(name, default):
            bench.case("extract", name, partial(measure_extraction, bench, case, images, names))
    shutil.rmtree(images)


def measure_extraction(
    bench: Bench, case: Extraction, images: Path, names: Sequence[str]
) -> list[dict[str, Any]]:
    settings = case.settings
    with tempfile.TemporaryDirectory(dir=bench.folder) as name:
        folder = Path(name)
        # Not in one folder for all: a checkpoint of K = 64 and P = 4096 has 537 MB.
        stem = write_checkpoint(folder, settings.num_clusters, settings.num_pcs)
        config = settings.write(folder / "config.ini", stem)
        configs = {RESEARCH: (theirs, config), "ours": (ours, config)}
        variants = {"direct": {"patch_vlad": "direct"}, "fast": {"precision": "fast"}}
        if multiplies_int8():  # the ranges of the shipped encoder, which it has, are in the package
            variants["int8"] = {"precision": "int8"}
        for name, changes in variants.items() if case.variants else ():
            changed = settings.write(folder / f"{name}.ini", stem, **changes)
            configs[f"ours, {name}"] = (ours, changed)

        def program(command: Callable[..., Run], config: Path, count: int) -> Run:
            return extract_once(command, config, images, names[:count], folder / "features")

        # Whole batches of 5, but for a quick run.
        counts = (1, 2) if bench.quick else case.counts
        limits = Limits()
        limits.measure()
        measured = in_turn(
            {who: partial(program, *what) for who, what in configs.items()},
            dict.fromkeys(configs, counts),
            bench.repeats,
            say,
        )
        limits.measure()
    sizes = ", ".join(map(str, settings.sizes)) if settings.num_patches else "no patches"
    label = f"{sizes}; P = {settings.num_pcs}, K = {settings.num_clusters}"
    return rows_of(measured, limits, settings.flops, label=label, unit="image", counts=counts)


# --- disk -----------------------------------------------------------------------------------------


def disk(bench: Bench) -> None:
    """Bytes an image of ``performance``; they do not depend on K, so a small K is used."""
    settings = Settings(128 if bench.quick else 4096, 16, THREE_SIZES)
    if not bench.wants("disk"):
        return
    count = 1 if bench.quick else 5
    images = bench.folder / "images"
    names = write_images(images, count)
    stem = write_checkpoint(bench.folder, settings.num_clusters, settings.num_pcs)

    def measure() -> list[dict[str, Any]]:
        output = bench.folder / "features"
        forms = [(RESEARCH, theirs, "npy")]
        forms += [(form, ours, form) for form in ("npy", "float32", "float16", "int8", "map")]
        rows: list[dict[str, Any]] = []
        for program, command, form in forms:
            config = settings.write(bench.folder / "config.ini", stem, local_features=form)
            extract_once(command, config, images, names, output)
            size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file()) / count
            row = {"label": f"2, 5, 8; P = {settings.num_pcs}", "bytes": size, "unit": "image"}
            row["program"] = program if program == RESEARCH else f"ours, {form}"
            if rows:
                row["bytes_ratio"] = rows[0]["bytes"] / size
            rows.append(row)
            say(f"  {program}: {size / 1e6:.2f} MB an image")
            shutil.rmtree(output)
        return rows

    bench.case("disk", "disk", measure)
    shutil.rmtree(images)
    Path(f"{stem}{settings.num_pcs}.pth.tar").unlink()


# --- re-ranking -----------------------------------------------------------------------------------


Counts = tuple[int, int]


@dataclass(frozen=True)
class Rerank:
    """A case: how candidates are scored, and for how many queries each program runs."""

    matcher: str
    sizes: tuple[int, ...]
    counts: Counts  # of the research code
    exact_counts: Counts  # of ours with opencv
    fast_counts: Counts = (2, 26)
    default: bool = True

    def programs(self, quick: bool) -> dict[str, tuple[Callable[..., Run], str, str, Counts]]:
        """Give the command, layout of features, ``ransac`` and numbers of queries of each."""
        found = {RESEARCH: (theirs, "npy", "opencv", self.counts)}
        if self.matcher != "RANSAC":
            for layout in ("npy", "float16"):
                found[f"ours, {layout}"] = (ours, layout, "opencv", self.exact_counts)
        else:
            for ransac, layout in (
                ("opencv", "npy"), ("opencv", "float16"), ("fast", "npy"), ("fast", "float16"),
                ("batched", "float16"),
            ):  # fmt: skip
                counts = self.exact_counts if ransac == "opencv" else self.fast_counts
                found[f"ours, {ransac}, {layout}"] = (ours, layout, ransac, counts)
        return {name: (*what, (1, 2) if quick else n) for name, (*what, n) in found.items()}


RERANKS = {
    "RANSAC-2,5,8": Rerank("RANSAC", THREE_SIZES, (1, 5), (2, 10)),
    "spatial-2,5,8": Rerank("spatialApproximator", THREE_SIZES, (1, 7), (2, 26)),
    "spatial-5": Rerank("spatialApproximator", ONE_SIZE, (2, 14), (2, 26)),
    "RANSAC-5": Rerank("RANSAC", ONE_SIZE, (1, 5), (2, 10), default=False),
}
VIEWS = 10  # different queries; further ones have the same features under other names
NUM_PCS = 128  # of the shipped checkpoint


class MatchingFiles:
    """Features of queries and index images in each layout, and lists of the first n queries.

    Attributes
    ----------
    queries, index : dict of str to str
        Names, and those that their features were extracted under.
    predictions : ndarray [Q, k] of int64
        Candidates of each query, nearest first.
    """

    def __init__(self, bench: Bench, images: Path) -> None:
        self.folder = bench.folder / "matching"
        self.images = images
        self.checkpoint = research_code.write_checkpoint(self.folder)
        self.extracted = self.folder / "extracted"
        self.queries: dict[str, str] = {}
        self.index: dict[str, str] = {}

    @classmethod
    def of_views(
        cls, bench: Bench, num_queries: int, num_views: int, num_index: int
    ) -> MatchingFiles:
        """Make features of many views of a few photographs.

        Each query has its candidates under names of their own, so that none is read twice. The
        features behind them are the same: links to the same ``.npy`` files, or copies in a store.
        """
        folder = bench.folder / "matching"
        folder.mkdir()
        files = cls(bench, folder / "images")
        views, index = write_views(files.images, num_views, num_index)
        files._extract([*views, *index])
        numbers = range(num_queries)
        files.queries = {f"q{q:02d}.png": views[q % num_views] for q in numbers}
        files.index = {f"{q:02d}_{name}": name for q in numbers for name in index}
        starts = len(index) * np.arange(num_queries)[:, None]
        nearest = files._nearest([views[q % num_views] for q in numbers], index)
        files.predictions = (starts + nearest).astype(np.int64)
        return files

    @classmethod
    def of_data_set(
        cls, bench: Bench, root: Path, num_queries: int, queries: list[str], index: list[str]
    ) -> MatchingFiles:
        """Extract a data set's features; candidates are as they come, and come again."""
        (bench.folder / "matching").mkdir()
        files = cls(bench, root)
        queries = queries[:num_queries]
        files._extract([*queries, *index])
        files.queries = {name: name for name in queries}
        files.index = {name: name for name in index}
        files.predictions = files._nearest(queries, index)[:, :CANDIDATES]
        return files

    def _extract(self, names: Sequence[str]) -> None:
        config = Settings(NUM_PCS, sizes=THREE_SIZES).write(
            self.folder / "extract.ini", self.checkpoint, local_features="npy"
        )
        extract_once(ours, config, self.images, names, self.extracted)
        self.rows = np.load(self.extracted / GLOBAL_FILE)
        self.places = {name: i for i, name in enumerate(names)}

    def _nearest(self, queries: Sequence[str], index: Sequence[str]) -> np.ndarray:
        own = self.rows[[self.places[name] for name in index]]
        asked = [self.rows[self.places[name]] for name in queries]
        return np.array([np.argsort(((own - row) ** 2).sum(axis=1)) for row in asked])

    def add(self, names: dict[str, str], layout: str, config: Path, target: Path) -> Path:
        """Put the features of images ({name: where from}) into a folder, unless they are there."""
        if (target / GLOBAL_FILE).is_file():
            return target
        rows = self.rows[[self.places[source] for source in names.values()]]
        settings = Config.load(config)
        if layout == "npy":
            target.mkdir(parents=True)
            np.save(target / GLOBAL_FILE, rows)
            for name, source in names.items():
                for size in settings.patch_sizes:
                    link(self._file(self.extracted, size, source), self._file(target, size, name))
            return target
        sha = file_sha256(Path(f"{self.checkpoint}{NUM_PCS}.pth.tar"))
        manifest = Manifest.of(settings, list(names), sha, root=self.images)
        encoded: dict[str, list[np.ndarray]] = {}
        with open_writer(target, list(names), manifest) as writer:
            for i, source in enumerate(names.values()):
                if source not in encoded:
                    files = [self._file(self.extracted, s, source) for s in settings.patch_sizes]
                    patches = [torch.from_numpy(np.load(file).T.copy()) for file in files]
                    encoded[source] = encode_patches(patches, layout)
                writer.write(i, rows[i], encoded[source])
            writer.finish()
        return target

    @staticmethod
    def _file(folder: Path, size: int, name: str) -> Path:
        return folder / f"patchfeats_psize{size}_{Path(name).stem}.npy"

    def options(self, case: Rerank, layout: str, ransac: str, count: int) -> list[Any]:
        """Return the options of feature_match for the first queries."""
        key = f"{case.matcher}_{len(case.sizes)}_{layout}_{ransac}_{count}"
        np.save(self.folder / f"{count}.npy", self.predictions[:count])
        config = Settings(NUM_PCS, sizes=case.sizes).write(
            self.folder / f"{key}.ini",
            self.checkpoint,
            matcher=case.matcher,
            ransac=ransac,
            local_features=layout,
            pred_input_path=self.folder / f"{count}.npy",
        )
        features = self.folder / f"features_{len(case.sizes)}_{layout}"
        queries = dict(list(self.queries.items())[:count])
        lists = [write_list(self.folder / f"q{count}.txt", list(queries))]
        lists.append(write_list(self.folder / "index.txt", list(self.index)))
        folders = [self.add(queries, layout, config, features / f"queries{count}")]
        folders.append(self.add(self.index, layout, config, features / "index"))
        results = self.folder / "results" / key
        results.mkdir(parents=True, exist_ok=True)
        return [
            "--config_path", config, "--dataset_root_dir", self.images,
            "--query_file_path", lists[0], "--index_file_path", lists[1],
            "--query_input_features_dir", folders[0], "--index_input_features_dir", folders[1],
            "--result_save_folder", results,
        ]  # fmt: skip


def link(source: Path, target: Path) -> None:
    """Link a file, or copy it where links cannot be made."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def reranking(bench: Bench) -> None:
    wanted = [name for name, case in RERANKS.items() if bench.wants(name, case.default)]
    if not wanted:
        return
    programs = [RERANKS[name].programs(bench.quick) for name in wanted]
    num_queries = max(what[-1][1] for case in programs for what in case.values())
    say("features to re-rank")
    if bench.data_set is not None:
        root, *lists = bench.data_set
        where = f" ({root.resolve().name})"
        queries, index = (ImageList.read(listing).names for listing in lists)
        files = MatchingFiles.of_data_set(bench, root, num_queries, list(queries), list(index))
    else:
        where = ""
        views, candidates = (2, 3) if bench.quick else (VIEWS, CANDIDATES)
        files = MatchingFiles.of_views(bench, num_queries, views, candidates)
    for name in wanted:
        measure = partial(measure_reranking, bench, files, RERANKS[name])
        bench.case("rerank", f"{name}{where}", measure)
    shutil.rmtree(files.folder)


def measure_reranking(bench: Bench, files: MatchingFiles, case: Rerank) -> list[dict[str, Any]]:
    programs = {
        name: (*what, (few, min(many, len(files.queries))))
        for name, (*what, (few, many)) in case.programs(bench.quick).items()
    }
    options = {
        (name, count): files.options(case, layout, ransac, count)
        for name, (_, layout, ransac, counts) in programs.items()
        for count in counts
    }
    limits = Limits()
    limits.measure()
    measured = in_turn(
        {
            name: lambda n, name=name, run=run: run("feature_match", *options[name, n])
            for name, (run, *_) in programs.items()
        },
        {name: counts for name, (*_, counts) in programs.items()},
        bench.repeats,
        say,
    )
    limits.measure()
    candidates = files.predictions.shape[1]
    label = f"{case.matcher}, {', '.join(map(str, case.sizes))}; P = {NUM_PCS}"
    rows = rows_of(
        measured, limits, matching_flops(NUM_PCS, case.sizes, candidates),
        label=label, unit="query", candidates=candidates,
    )  # fmt: skip

    def last(name: str) -> list[Any]:
        return options[name, programs[name][-1][1]]

    scores = our_scores(last(next(name for name in programs if name != RESEARCH)))
    reference = lines_of(last(RESEARCH))
    patches = Settings(NUM_PCS, sizes=case.sizes).num_patches
    for row in rows:
        name = row["program"]
        layout = programs[name][1]
        row["bytes_read"] = candidates * patches * NUM_PCS * (4 if layout == "npy" else 2)
        if row["seconds"] > 0:
            row["copy_share"] = row["bytes_read"] / row["seconds"] / limits.copy
        if name != RESEARCH:
            row["agreement"] = agreement(reference, lines_of(last(name)), scores)
    return rows


def lines_of(options: Sequence[Any]) -> dict[str, list[str]]:
    """Read the candidates of each query, best first, that a run wrote."""
    folder = options[options.index("--result_save_folder") + 1]
    ranked: dict[str, list[str]] = {}
    for line in (folder / "PatchNetVLAD_predictions.txt").read_text().splitlines()[2:]:
        query, candidate = (Path(name).name for name in line.split(", "))
        ranked.setdefault(query, []).append(candidate)
    return ranked


def our_scores(options: Sequence[Any]) -> dict[tuple[str, str], float]:
    """Compute the fused score of each query and candidate with ours, to know which are tied."""
    values = dict(zip(options[::2], options[1::2], strict=True))
    config = Config.load(values["--config_path"])
    result = rerank(
        config,
        values["--query_file_path"],
        values["--index_file_path"],
        values["--query_input_features_dir"],
        values["--index_input_features_dir"],
        dataset_root=values["--dataset_root_dir"],
        device="cpu",
        progress=False,
    )
    assert result.patch_scores is not None
    return {
        (Path(query).name, Path(result.index_names[i]).name): score
        for query, row, scores in zip(
            result.query_names, result.retrieved, result.patch_scores, strict=True
        )
        for i, score in zip(
            row.tolist(), fuse_scores(scores, config.patch_weights).tolist(), strict=True
        )
    }


def agreement(
    reference: dict[str, list[str]],
    ranked: dict[str, list[str]],
    scores: dict[tuple[str, str], float],
) -> dict[str, Any]:
    """Count equal first answers and equal lines; candidates of one score may change places."""
    shared = sorted(reference.keys() & ranked.keys())
    first = lines = total = 0
    for query in shared:
        same = [
            a == b or abs(scores[query, a] - scores[query, b]) < 1e-9
            for a, b in zip(reference[query], ranked[query], strict=True)
        ]
        first, lines, total = first + same[0], lines + sum(same), total + len(same)
    return {"queries": len(shared), "same_first": first, "same_lines": lines / total}


# --- retrieval ------------------------------------------------------------------------------------

FACTORIES = ("Flat", "SQfp16", "HNSW32", "IVF100,Flat")


def clustered(
    count: int, num_queries: int, dim: int, seed: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Make up unit descriptors of places, ten images each, and of queries at some of them."""
    random = np.random.default_rng(seed)
    places = random.standard_normal((max(1, count // 10), dim), dtype=np.float32)

    def seen(which: np.ndarray) -> np.ndarray:
        noise = random.standard_normal((len(which), dim), dtype=np.float32)
        views = places[which] + 0.7 * noise
        return views / np.linalg.norm(views, axis=1, keepdims=True)

    return seen(np.arange(count) % len(places)), seen(random.integers(0, len(places), num_queries))


def retrieval(bench: Bench) -> None:
    if bench.wants("retrieval"):
        bench.case("retrieval", "retrieval", partial(measure_retrieval, bench))


def measure_retrieval(bench: Bench) -> list[dict[str, Any]]:
    import faiss

    size = (1000, 100, 64) if bench.quick else (10_000, 1_000, 512)
    index, queries = clustered(*size)

    def flat(queries: np.ndarray, factory: str) -> np.ndarray:
        built = faiss.IndexFlatL2(index.shape[1])
        built.add(index)
        return built.search(queries, CANDIDATES)[1]

    def search(queries: np.ndarray, factory: str) -> np.ndarray:
        path = bench.folder / f"{factory}.faiss"
        return retrieve(queries, index, CANDIDATES, factory=factory, index_path=path)

    def seconds(find: Callable[..., np.ndarray], queries: np.ndarray, factory: str) -> float:
        start = time.perf_counter()
        find(queries, factory)
        return time.perf_counter() - start

    exact = flat(queries, "")
    first: float | None = None
    rows = []
    for program, factory, find in (
        (f"{RESEARCH}: IndexFlatL2", "", flat),
        *((f"ours, {factory}", factory, search) for factory in FACTORIES),
    ):
        build = seconds(find, queries[:1], factory)  # later ones read the built index
        found = find(queries, factory)
        # From one query and from all, so that loading the index drops out.
        times = [
            (seconds(find, queries, factory) - seconds(find, queries[:1], factory))
            / (len(queries) - 1)
            for _ in range(5)
        ]
        each = float(np.median(times))
        first = first or each
        same = [len(np.intersect1d(a, b)) for a, b in zip(found, exact, strict=True)]
        rows.append(
            {
                "label": f"{size[0]:,} x {size[2]}, {size[1]:,} queries, best {CANDIDATES}",
                "program": program,
                "unit": "query",
                "seconds": each,
                "build_seconds": build,
                "recall_1": float((found[:, 0] == exact[:, 0]).mean()),
                "recall_100": float(np.mean(same) / CANDIDATES),
            }
        )
        if factory:
            rows[-1]["seconds_ratio"] = first / each
    return rows


# --- all ------------------------------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--cases",
        nargs="+",
        default=[],
        metavar="PATTERN",
        help=f"only these of {', '.join((*EXTRACTIONS, 'disk', *RERANKS, 'retrieval'))}; some are "
        "measured only if they are named",
    )
    parser.add_argument(
        "--data_set",
        nargs=3,
        type=Path,
        metavar=("ROOT", "QUERIES", "INDEX"),
        help="re-rank a data set of your own, in place of views of the shipped photographs: its "
        "folder, and lists of its queries and index images",
    )
    parser.add_argument("--repeats", type=int, default=None, help="runs in turn (default: 2)")
    parser.add_argument(
        "--quick",
        action="store_true",
        help="a few images, once: says whether all works, its numbers are of no use",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=None,
        metavar="DIR",
        help="folder for the results (default: that of this script; build/bench with --quick)",
    )
    arguments = parser.parse_args()
    output = arguments.output or (
        Path("build/bench") if arguments.quick else Path(__file__).resolve().parent
    )
    output.mkdir(parents=True, exist_ok=True)
    research_code.install()
    repeats = arguments.repeats or (1 if arguments.quick else 2)
    about = {**machine(), "research_code": research_code.VERSION}
    results = report.Results(output, about, [*EXTRACTIONS, *RERANKS])
    jobs = dict(zip(PARTS, (extraction, disk, reranking, retrieval), strict=True))
    with tempfile.TemporaryDirectory(prefix="patchnetvlad-bench-") as name:
        data_set = tuple(arguments.data_set) if arguments.data_set else None
        bench = Bench(Path(name), results, repeats, arguments.quick, arguments.cases, data_set)
        for part in arguments.parts:
            try:
                jobs[part](bench)
            except Exception:
                traceback.print_exc()
                bench.failed.append(part)
    print(results.table())
    say(f"written to {output}: bench.md, bench.png, bench.json")
    if bench.failed:
        say(f"failed: {', '.join(bench.failed)}")
    return 1 if bench.failed else 0


if __name__ == "__main__":
    sys.exit(main())
