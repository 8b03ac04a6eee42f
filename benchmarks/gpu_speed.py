# SPDX-License-Identifier: MIT
"""Stages that measure speed: limits, extraction, re-ranking, profile."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import research_code
import torch
from gpu_job import PERFORMANCE, SPEED, THREE, Job
from gpu_table import RESEARCH
from measure import Run, run
from torch import Tensor
from workload import matching_flops, write_list

from patchnetvlad.base.device import arithmetic, choose_precision
from patchnetvlad.base.files import file_sha256
from patchnetvlad.config import Config
from patchnetvlad.engines.engine import PatchReader
from patchnetvlad.engines.local_rerank import Matcher
from patchnetvlad.engines.readers import as_matched, patch_readers
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.store.codec import decode_patches, encode_map, encode_patches
from patchnetvlad.matching.fused import fused_kernels
from patchnetvlad.matching.on_device import find_matches, score_candidates
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import patch_grids
from patchnetvlad.pipeline.extract import extract

# --- limits ---------------------------------------------------------------------------------------


def limits(job: Job) -> None:
    """Measure products of large random matrices, and copies of several times the cache."""
    n = 8192 if job.on_gpu else 512 if job.small else 2048
    for name, dtype, precision in (
        ("float32", torch.float32, "exact"),
        ("TensorFloat-32", torch.float32, "fast"),
        ("bfloat16", torch.bfloat16, "exact"),
        ("float16", torch.float16, "exact"),
    ):
        if not job.on_gpu and name != "float32":
            job.put(name, "products", remark="not on this device")
            continue
        a, b = (torch.randn(n, n, device=job.device).to(dtype) for _ in range(2))
        with arithmetic(job.device, precision):
            seconds = job.seconds_of(lambda _, a=a, b=b: a @ b, 0.2)
        job.put(name, "products", tera=2 * n**3 / seconds / 1e12)
    count = 2**29 if job.on_gpu else 2**22
    source = torch.rand(count, device=job.device)
    target = torch.empty_like(source)
    seconds = job.seconds_of(lambda _: target.copy_(source), 0.2)
    job.put("copy on the device", "read and written", giga=2 * source.nbytes / seconds / 1e9)
    for name in ("pinned", "pageable"):
        if not job.on_gpu:
            job.put(f"copy from host memory, {name}", "read", remark="not on this device")
            continue
        host = torch.rand(2**27)
        host = host.pin_memory() if name == "pinned" else host
        part = target[: len(host)]
        seconds = job.seconds_of(lambda _, h=host, p=part: p.copy_(h, non_blocking=True), 0.2)
        job.put(f"copy from host memory, {name}", "read", giga=host.nbytes / seconds / 1e9)


def product_limit(job: Job, precision: str) -> float | None:
    """Return the FLOP/s that a precision is compared with."""
    chosen = choose_precision(precision, job.device) if job.on_gpu else "exact"
    name = {"exact": "float32", "fast": "TensorFloat-32", "half": "float16"}[chosen]
    return job.limit(name, "tera")


def share_of(flops: float, seconds: float, limit: float | None) -> float | None:
    return flops / seconds / limit if limit else None


# --- extraction -----------------------------------------------------------------------------------

EXTRACTIONS = (PERFORMANCE, SPEED, "performance, K = 16", "storage, K = 16")


def extraction(job: Job) -> None:
    """Measure images a second: first what users get, then the research code, then variants."""
    cases = EXTRACTIONS[:2] if job.small else EXTRACTIONS
    for case in cases:
        from_tensors(job, case, "tensors on the device", precision="auto")
        from_files(job, case)
    if job.has_research_code:
        for case in cases[-1:] if job.small else cases:
            of_research_code(job, case)
    else:
        job.without_research_code(cases)
    for case in EXTRACTIONS[1:2] if job.small else EXTRACTIONS[:2]:
        for name, batch, more in (
            ("exact", 5, {"precision": "exact"}),
            ("fast", 5, {"precision": "fast"}),
            ("fast, direct", 5, {"precision": "fast", "patch_vlad": "direct"}),
            ("fast, one at a time", 1, {"precision": "fast"}),
            ("fast, 20 at a time", 20, {"precision": "fast"}),
            ("half", 5, {"precision": "half"}),
            ("half, 20 at a time", 20, {"precision": "half"}),
        ):
            if "half" in name and not job.on_gpu:
                job.put(case, f"tensors, {name}", remark="not on this device")
            elif not job.small or name in ("fast, direct", "fast, one at a time"):
                from_tensors(job, case, f"tensors, {name}", batch, **more)


def describe(describer: Describer, images: Tensor) -> list[Tensor]:
    """Compute all that is stored of a batch of images; it stays on the device."""
    maps = describer.encode(images)
    found = [describer.global_descriptors(maps)]
    for feature_map in maps:
        found += describer.patches(feature_map)
    return found


def from_tensors(job: Job, case: str, program: str, batch: int = 5, **more: Any) -> None:
    """Measure the network alone, on four batches that lie on the device."""
    if job.small:
        batch = min(batch, 2)
    describer = job.describer(case, **more)
    batches = [job.tensors(n * batch, batch) for n in range(2 if job.small else 4)]
    seconds = job.seconds_of(lambda n: describe(describer, batches[n % len(batches)]))
    peak = job.peak_of(lambda: describe(describer, batches[0]))
    limit = product_limit(job, describer.precision)
    job.put(
        case,
        program,
        images_per_second=batch / seconds,
        peak_bytes=peak,
        limit_share=share_of(batch * job.settings(case).flops, seconds, limit),
        remark=f"{batch} at a time, {describer.precision}",
    )


def from_files(job: Job, case: str) -> None:
    """Measure the command's own way, from JPEG files to a store of float16."""
    few, many = (1, 2) if job.small else (40, 160)
    folder, names = job.image_files(many)
    config = job.config(case)
    output = job.work / "extracted"

    def once(count: int) -> float:
        shutil.rmtree(output, ignore_errors=True)
        listing = write_list(job.work / "images.txt", names[:count])
        start = time.perf_counter()
        extract(config, listing, folder, output, device=str(job.device), progress=False)
        return time.perf_counter() - start

    once(few)  # warms up
    peak = job.peak_of(lambda: once(few))
    seconds = (once(many) - once(few)) / (many - few)
    stored = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    shutil.rmtree(output)
    job.put(
        case,
        "from JPEG to a store",
        images_per_second=1 / seconds if seconds > 0 else None,
        peak_bytes=peak,
        compared=True,
        remark=f"{few} and {many} images, {stored / few / 1e6:.2g} MB an image",
    )


def of_research_code(job: Job, case: str) -> None:
    """Measure the research code's command, as whole processes on two numbers of images."""
    few, many = (1, 2) if job.small else (5, 25)
    folder, names = job.image_files(many)
    config = job.config_file(case)

    def once(count: int) -> Run:
        output = job.work / "research_extracted"
        shutil.rmtree(output, ignore_errors=True)
        listing = write_list(job.work / "research_images.txt", names[:count])
        return research_run(
            job, "feature_extract", "--config_path", config, "--dataset_root_dir", folder,
            "--dataset_file_path", listing, "--output_features_dir", output,
        )  # fmt: skip

    seconds = (-once(few).seconds + once(many).seconds) / (many - few)
    shutil.rmtree(job.work / "research_extracted")
    job.put(case, RESEARCH, images_per_second=1 / seconds if seconds > 0 else None,
            remark=f"{few} and {many} images, from JPEG to .npy")  # fmt: skip


def research_run(job: Job, script: str, *arguments: str | Path) -> Run:
    words = research_code.words_of(script, *arguments, device=job.device.type)
    return run(words, research_code.environment(), str(research_code.FOLDER))


# --- re-ranking -----------------------------------------------------------------------------------

BATCHED = {"matcher": "RANSAC", "ransac": "batched"}
METHODS: dict[str, dict[str, str]] = {
    "batched": BATCHED,
    "fast": {"matcher": "RANSAC", "ransac": "fast"},
    "opencv": {"matcher": "RANSAC", "ransac": "opencv"},
    "spatial": {"matcher": "spatialApproximator"},
}
# Patches of the query and of the candidate, dimensions, warps, stages.
TILES = (
    (128, 128, 64, 4, 3),
    (128, 128, 64, 8, 4),
    (128, 256, 64, 8, 3),
    (256, 128, 64, 8, 3),
    (128, 128, 32, 4, 5),
)
PLACES = ("device", "host float16", "host int8", "maps", "store float16", "store int8")


def reranking(job: Job) -> None:
    """Measure ms a query: first what matters most, then the rest as far as the time goes."""
    bench = Reranking(job)
    for case in (PERFORMANCE, SPEED, THREE):
        bench.measure(case, "device", "batched")
    for place in PLACES[1:]:
        bench.measure(PERFORMANCE, place, "batched")
    for case in (PERFORMANCE, SPEED, THREE):
        bench.parts(case)
        for method in ("spatial", "fast", "opencv"):
            bench.measure(case, "device", method)
    if job.has_research_code:
        for case in (SPEED,) if job.small else (SPEED, PERFORMANCE):
            bench.of_research_code(case)
    else:
        job.without_research_code([SPEED, PERFORMANCE])
    bench.measure(PERFORMANCE, "device", "batched", precision="exact")
    for case in (SPEED,) if job.small else (SPEED, THREE, PERFORMANCE):
        for place in PLACES[1:]:
            for method in ("spatial",) if job.small else ("spatial", "batched", "opencv"):
                bench.measure(case, place, method)


@dataclass(frozen=True)
class Described:
    """The features of all views of a case: patches and maps on the device, one an image.

    Attributes
    ----------
    patches : list of list of Tensor [n_s, P] of float32
    maps : list of Tensor [D, h, w] of float32
    rows : ndarray [N, P] of float32
        Global descriptors.
    """

    patches: list[list[Tensor]]
    maps: list[Tensor]
    rows: np.ndarray

    @classmethod
    def of(cls, job: Job, case: str) -> Described:
        describer = job.describer(case)
        patches, maps, rows = [], [], []
        for n in range(len(job.views)):
            (feature_map,) = describer.encode(job.tensors(n, 1))
            rows.append(describer.global_descriptors(feature_map[None])[0].cpu().numpy())
            maps.append(feature_map)
            patches.append(describer.patches(feature_map))
        return cls(patches, maps, np.array(rows))


class Reranking:
    """Measures re-ranking with the features of views, which lie in one place or another.

    The first views are candidates, the last are queries. A candidate has a number of its own for
    every query, so that no cache helps, but where features are to stay on the device.
    """

    def __init__(self, job: Job) -> None:
        self.job = job
        self.described: dict[str, Described] = {}

    def features(self, case: str) -> Described:
        if case not in self.described:
            self.described[case] = Described.of(self.job, case)
        return self.described[case]

    def config(self, case: str, place: str, **more: Any) -> Config:
        """Return a case's configuration, with memory for all features if they are to stay."""
        memory = 1024
        if place == "device":
            patches = self.features(case).patches
            memory += 4 * sum(p.nbytes for of_image in patches for p in of_image) // 2**20
        return self.job.config(case, memory_mb=memory, **more)

    def flops(self, case: str) -> float:
        """Count the operations of a query's products."""
        job, settings = self.job, self.job.settings(case)
        return matching_flops(
            settings.num_pcs, settings.sizes, job.num_candidates, settings.image_size
        )

    def limit(self) -> float | None:
        """Return the FLOP/s that products of descriptors are compared with."""
        return self.job.limit("float16" if self.job.on_gpu else "float32", "tera")

    def measure(self, case: str, place: str, method: str, **more: Any) -> None:
        """Measure one combination, unless it was measured, and write down its row."""
        job = self.job
        program = ", ".join([method, f"from {place}", *map(str, more.values())])
        if any((r["case"], r["program"]) == (case, program) for r in job.record.rows(job.stage)):
            return
        config = self.config(case, place, **METHODS[method], **more)
        read = self.reader(case, place, config)
        own = 0 if place == "device" else job.num_candidates  # numbers of a query's own
        predictions = own * np.arange(1000)[:, None] + np.arange(job.num_candidates)

        def query(q: int) -> list[Tensor]:
            return read(job.num_candidates + q % job.num_queries)

        def candidate(i: int) -> list[Tensor]:
            return read(i % job.num_candidates)

        seconds, count = seconds_a_query(job, config, (query, candidate), predictions)
        share = share_of(self.flops(case), seconds, self.limit())
        job.put(case, program, milliseconds=1e3 * seconds, remark=f"{count} queries",
                compared=(method == "spatial") == (case == SPEED),
                limit_share=share)  # fmt: skip

    def reader(self, case: str, place: str, config: Config) -> Callable[[int], list[Tensor]]:
        """Return what gives the patches of a view on the device, from where they lie."""
        described, device = self.features(case), self.job.device
        precision = choose_precision(config.precision, device)
        kind = place.rpartition(" ")[2]
        if place == "device":
            ready = [[as_matched(p, precision) for p in patches] for patches in described.patches]
            return lambda i: ready[i]
        if place.startswith("host"):
            arrays = [encode_patches(patches, kind) for patches in described.patches]
            return lambda i: [
                as_matched(p, precision) for p in decode_patches(arrays[i], kind, device)
            ]
        kind = "map" if place == "maps" else kind
        names = [f"{n:05d}.jpg" for n in range(len(described.patches))]
        store = self.write(case, kind, names, range(len(names)))
        (read,) = patch_readers(config, [open_store(store, names, config)], device)
        return read

    def write(self, case: str, kind: str, names: Sequence[str], views: Sequence[int]) -> Path:
        """Write the features of views under names to a folder, once; return it."""
        job, described = self.job, self.features(case)
        key = "".join(c if c.isalnum() else "_" for c in f"features {case} {kind}")
        folder = job.work / f"{key}_{names[0][0]}{len(names)}"
        if folder.is_dir():
            return folder
        config = job.config(case, local_features=kind)
        checkpoint = Path(f"{job.checkpoint(case)}{config.num_pcs}.pth.tar")
        manifest = Manifest.of(config, list(names), file_sha256(checkpoint))
        with open_writer(folder, list(names), manifest) as writer:
            for n, view in enumerate(views):
                if kind == "map":
                    arrays = encode_map(described.maps[view])
                else:
                    arrays = encode_patches(described.patches[view], kind)
                writer.write(n, described.rows[view], arrays)
            writer.finish()
        return folder

    def parts(self, case: str) -> None:
        """Measure matching, and matching with scores, of all candidates of a query at once."""
        job, config = self.job, self.job.config(case)
        precision = choose_precision(config.precision, job.device)
        ready = [
            [as_matched(p, precision) for p in patches] for patches in self.features(case).patches
        ]
        candidates, queries = ready[: job.num_candidates], ready[job.num_candidates :]
        grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)

        def seconds(work: Callable[[list[Tensor]], Tensor]) -> float:
            with torch.inference_mode(), arithmetic(job.device, precision):
                return job.seconds_of(lambda n: work(queries[n % len(queries)]))

        matching = partial(find_matches, candidates=candidates)
        alone = seconds(matching)
        job.put(case, "only nearest neighbours", milliseconds=1e3 * alone,
                limit_share=share_of(self.flops(case), alone, self.limit()))  # fmt: skip
        for matcher in ("RANSAC", "spatialApproximator"):
            scored = seconds(
                lambda query, matcher=matcher: score_candidates(
                    query, candidates, grids, [grids] * len(candidates), matcher
                )
            )
            job.put(case, f"neighbours and scores, {matcher}", milliseconds=1e3 * scored)
        if fused_kernels(job.device) is not None:
            self.tiles(case, lambda: seconds(matching))

    def tiles(self, case: str, seconds: Callable[[], float]) -> None:
        """Try other tiles for the kernel of nearest neighbours."""
        from patchnetvlad.matching import kernels

        names = ("BLOCK_QUERY", "BLOCK_CANDIDATE", "BLOCK_DIMS", "NEAREST_OPTIONS")
        before = [getattr(kernels, name) for name in names]
        for *blocks, warps, stages in TILES:
            options = {"num_warps": warps, "num_stages": stages}
            for name, value in zip(names, [*blocks, options], strict=True):
                setattr(kernels, name, value)
            tile = "x".join(map(str, blocks))
            try:
                milliseconds = 1e3 * seconds()
            except Exception as error:  # a tile may be too large for this GPU
                self.job.put(case, f"neighbours, tile {tile}", remark=str(error)[:80])
                continue
            self.job.put(case, f"neighbours, tile {tile}", milliseconds=milliseconds,
                         remark=f"{warps} warps, {stages} stages")  # fmt: skip
        for name, value in zip(names, before, strict=True):
            setattr(kernels, name, value)

    def of_research_code(self, case: str) -> None:
        """Measure both commands on the same ``.npy`` files, on two numbers of queries."""
        job = self.job
        few, many = (1, 2) if job.small or case == PERFORMANCE else (1, 3)

        def theirs(count: int) -> float:
            words = self.command(case, count, "research")
            return research_run(job, "feature_match", *words).seconds

        def ours(count: int) -> float:
            words = map(str, self.command(case, count, "ours"))
            device = ["--device", str(job.device)]
            python = [research_code.sys.executable, "-m", "patchnetvlad.cli.feature_match"]
            return run([*python, *words, *device]).seconds

        seconds = (-theirs(few) + theirs(many)) / (many - few)
        job.put(case, RESEARCH, milliseconds=1e3 * seconds,
                remark=f"{few} and {many} queries, from .npy")  # fmt: skip
        own = (-ours(few) + ours(many)) / (many - few)
        job.put(case, "our command, from .npy", milliseconds=1e3 * own, compared=True,
                remark=f"{few} and {many} queries")  # fmt: skip

    def command(self, case: str, count: int, who: str) -> list[str | Path]:
        """Return the options of feature_match for ``count`` queries, which both commands take."""
        job = self.job
        names = [f"{n:05d}.jpg" for n in range(job.num_candidates)]
        queries = [f"q{n:04d}.jpg" for n in range(count)]
        views = range(job.num_candidates, job.num_candidates + count)
        predictions = job.work / f"predictions{count}.npy"
        np.save(predictions, np.tile(np.arange(len(names)), (count, 1)))
        results = job.work / f"results_{who}"
        shutil.rmtree(results, ignore_errors=True)
        results.mkdir()
        method = METHODS["batched" if who == "ours" and case == PERFORMANCE else "opencv"]
        more = METHODS["spatial"] if case == SPEED else method
        config = job.config_file(case, local_features="npy", pred_input_path=predictions, **more)
        return [
            "--config_path", config, "--dataset_root_dir", job.image_files(len(names))[0],
            "--query_file_path", write_list(job.work / f"queries{count}.txt", queries),
            "--index_file_path", write_list(job.work / "index.txt", names),
            "--query_input_features_dir", self.write(case, "npy", queries, views),
            "--index_input_features_dir", self.write(case, "npy", names, range(len(names))),
            "--result_save_folder", results,
        ]  # fmt: skip


def open_store(folder: Path, names: Sequence[str], config: Config) -> Any:
    from patchnetvlad.features.open import open_reader

    return open_reader(folder, list(names), config)


def seconds_a_query(
    job: Job,
    config: Config,
    readers: tuple[PatchReader, PatchReader],
    predictions: np.ndarray,
    most: float = 1.5,
) -> tuple[float, int]:
    """Time the matcher on as many queries as take ``most`` seconds; give seconds and queries.

    The first queries warm up, and load what is to stay on the device.
    """
    grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)
    with Matcher(config, job.device, readers, (lambda i: grids, lambda i: grids)) as matcher:

        def seconds(first: int, count: int) -> float:
            job.synchronize()
            start = time.perf_counter()
            scores = list(matcher.run(range(first, first + count), predictions))
            job.synchronize()
            assert len(scores) == count
            return time.perf_counter() - start

        seconds(0, 1)
        one = seconds(1, 1)
        count = 1 if job.small else int(min(100, max(1, most / one)))
        return seconds(2, count) / count, count


# --- profile --------------------------------------------------------------------------------------


def profile(job: Job) -> None:
    """List the largest items of extraction and of re-ranking."""
    cases = (SPEED,) if job.small else (PERFORMANCE, SPEED)
    for case in cases:
        describer = job.describer(case)
        batch = job.tensors(0, 1 if job.small else 5)
        share = share_of(
            len(batch) * job.settings(case).flops, 1.0, product_limit(job, describer.precision)
        )
        work = partial(describe, describer, batch)
        largest_items(job, f"extraction, {case}, {len(batch)} images", work, share)
    bench = Reranking(job)
    for case in cases:
        profile_queries(job, bench, case, 1 if job.small else 3)


def profile_queries(job: Job, bench: Reranking, case: str, count: int) -> None:
    """List the largest items of re-ranking some queries, with features on the device."""
    config = bench.config(case, "device", **BATCHED)
    read = bench.reader(case, "device", config)
    grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)
    predictions = np.tile(np.arange(job.num_candidates), (1 + count, 1))

    def query(q: int) -> list[Tensor]:
        return read(job.num_candidates + q % job.num_queries)

    with Matcher(config, job.device, (query, read), (lambda i: grids, lambda i: grids)) as matcher:

        def queries() -> None:
            list(matcher.run(range(1, 1 + count), predictions))

        share = share_of(count * bench.flops(case), 1.0, bench.limit())
        largest_items(job, f"re-ranking, {case}, {count} queries", queries, share)


def largest_items(
    job: Job, case: str, work: Callable[[], object], limit_seconds: float | None
) -> None:
    """Profile some work after one run to warm up; keep the ten largest items and the table.

    ``limit_seconds`` is how long its arithmetic takes at the limit.
    """
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    seconds = job.seconds_of(lambda _: work(), 0.2)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if job.on_gpu else [])]
    with profiler(activities=activities) as found:
        work()
        job.synchronize()
    events = found.key_averages()
    key = "self_device_time_total" if job.on_gpu else "self_cpu_time_total"

    def seconds_in(event: Any) -> float:
        return float(getattr(event, key)) / 1e6

    total = sum(map(seconds_in, events)) or 1.0
    job.put(case, "all, on the clock", milliseconds=1e3 * seconds,
            limit_share=limit_seconds / seconds if limit_seconds else None,
            remark=f"{1e3 * total:.3g} ms in its items")  # fmt: skip
    for event in sorted(events, key=seconds_in, reverse=True)[:10]:
        job.put(case, event.key[:80], milliseconds=1e3 * seconds_in(event),
                time_share=seconds_in(event) / total, remark=f"{event.count} calls")  # fmt: skip
    with (job.record.folder / "gpu_profile.txt").open("a", encoding="utf-8") as file:
        table = events.table(sort_by=key, row_limit=25, max_name_column_width=90)
        file.write(f"=== {case} ===\n{table}\n\n")
