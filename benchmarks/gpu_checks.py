# SPDX-License-Identifier: MIT
"""Stages that check: tests, agreement with the CPU, several processes, little memory."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gpu_job import PERFORMANCE, ROOT, SPEED, Job
from gpu_speed import Reranking, describe
from torch import Tensor
from workload import has_demo_images, write_list

from patchnetvlad.config import Config
from patchnetvlad.config_ini import RANSACS
from patchnetvlad.engines.local_extract import Decoder, stream_features
from patchnetvlad.engines.rerank import rerank_candidates
from patchnetvlad.errors import DeviceError
from patchnetvlad.features.merge import merge_shares
from patchnetvlad.matching.nearest import Pairs, mutual_nearest_neighbours
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.grid import patch_grids
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.pipeline.result import RerankResult

# --- tests ----------------------------------------------------------------------------------------

_OUTCOME = re.compile(r"^(\S+::.*?) (PASSED|FAILED|SKIPPED|ERROR|XFAIL|XPASS)\b")
_KINDS = {"PASSED": "passed", "XFAIL": "passed", "SKIPPED": "skipped"}
_NOT_COLLECTED = re.compile(r"^_+ ERROR collecting (\S+)")
_MISSING = re.compile(r"^E +ModuleNotFoundError: No module named '([^']+)'")
_NEEDS = re.compile(r"cuda|devices", re.IGNORECASE)


def device_tests(job: Job, folder: Path = ROOT / "tests") -> None:
    """Run the tests marked ``cuda`` or ``device``, without plugins; count as they end."""
    files = [file for file in sorted(folder.glob("test_*.py")) if _NEEDS.search(file.read_text())]
    words = [sys.executable, "-m", "pytest", "-v", "-m", "cuda or device", "--tb=short"]
    words += ["-p", "no:cacheprovider", "-o", "addopts=", "--continue-on-collection-errors"]
    words += [str(file) for file in files]
    counts = {"passed": 0, "failed": 0, "skipped": 0}
    failures: list[str] = []
    not_collected: list[str] = []
    missing: list[str] = []
    for line in lines_of(words):
        if found := _NOT_COLLECTED.match(line):
            not_collected.append(found.group(1))
        elif found := _MISSING.match(line):
            missing.append(found.group(1))
        elif found := _OUTCOME.match(line):
            name, outcome = found.groups()
            counts[_KINDS.get(outcome, "failed")] += 1
            if outcome not in _KINDS:
                failures.append(name)
                job.put(name, "failed", remark="see gpu.log")
            job.put("all", "cuda or device", **counts)
    remark = f"without {', '.join(not_collected)}: no {', '.join(missing)}" if missing else None
    job.put("all", "cuda or device", **counts, remark=remark)
    if failures:
        raise RuntimeError(f"{len(failures)} tests failed, the first is {failures[0]}")
    if len(not_collected) > len(missing):
        raise RuntimeError(f"{', '.join(not_collected)} cannot be collected; see gpu.log")
    if not sum(counts.values()):
        raise RuntimeError("no test has these marks, or pytest could not start; see gpu.log")


def lines_of(words: Sequence[str]) -> Iterator[str]:
    """Run pytest without plugins; give, and print, its lines as they come."""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    with subprocess.Popen(
        words,
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            yield line


# --- agreement ------------------------------------------------------------------------------------

NUM_IMAGES = 4  # one query and three candidates
# The original arithmetic of patches magnifies rounding errors (see docs/migration.md).
_VARIANTS = {
    "exact": {"precision": "exact"},
    "exact, direct": {"precision": "exact", "patch_vlad": "direct"},
    "fast": {"precision": "fast"},
    "fast, direct": {"precision": "fast", "patch_vlad": "direct"},
    "half, direct": {"precision": "half", "patch_vlad": "direct"},
}


def agreement(job: Job) -> None:
    """Compare each step on the device with the CPU's in float32, then whole data sets."""
    config = shipped_config(job)
    images = torch.cat([job.tensors(n, 1) for n in range(NUM_IMAGES)])
    cpu = torch.device("cpu")
    expected: dict[str, Steps] = {}
    for case, changes in _VARIANTS.items():
        if changes["precision"] == "half" and not job.on_gpu:
            job.put(case, "", remark="not on this device")
            continue
        settings = replace(config, **changes)
        exact = replace(settings, precision="exact")
        if exact.patch_vlad not in expected:
            expected[exact.patch_vlad] = Steps(Describer.load(exact, cpu), images)
        found = Steps(Describer.load(settings, job.device), images)
        steps_agree(job, case, settings, found, expected[exact.patch_vlad])
    for name, folder in data_sets(job):
        for precision in ("exact", "fast", *(["half"] if job.on_gpu else [])):
            answers_agree(job, name, folder, precision)


def shipped_config(job: Job) -> Config:
    """Return the demonstration's configuration, for small images where they are small."""
    config = Config.load("demo")
    if job.small:
        size = job.settings(PERFORMANCE).image_size
        config = replace(config, image_size=size, match_image_size=size)
    return config


class Steps:
    """What each step gives for some images, on the CPU: maps, global descriptors, patches."""

    def __init__(self, describer: Describer, images: Tensor) -> None:
        maps = describer.encode(images)
        self.device = describer.device
        self.maps = maps.cpu()
        self.globals = describer.global_descriptors(maps).cpu()
        patches = [describer.patches(feature_map) for feature_map in maps]
        self.patches = [[p.cpu() for p in of_image] for of_image in patches]

    def matches(self, device: torch.device, size: int) -> list[Pairs]:
        """Match the first image's patches of a size with the others', on a device."""
        query, *candidates = [of_image[size].to(device) for of_image in self.patches]
        return [mutual_nearest_neighbours(query, candidate) for candidate in candidates]

    def scores(self, config: Config, device: torch.device) -> np.ndarray:
        """Score the others as candidates of the first; [candidates, S]."""
        grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)
        candidates = np.arange(1, len(self.patches))[None]
        patches = [[p.to(device) for p in of_image] for of_image in self.patches]
        found = rerank_candidates(
            candidates,
            *(patches.__getitem__,) * 2,
            *(lambda i: grids,) * 2,
            config,
            device=device,
            progress=False,
        )
        return found.scores[0]


def steps_agree(job: Job, case: str, config: Config, ours: Steps, cpu: Steps) -> None:
    """Write down how far each step is from the CPU's."""
    deviation(job, case, "feature maps", ours.maps, cpu.maps)
    deviation(job, case, "global descriptors", ours.globals, cpu.globals)
    for n, size in enumerate(config.patch_sizes):
        mine, theirs = ([of_image[n] for of_image in s.patches] for s in (ours, cpu))
        deviation(job, case, f"patches of size {size}", torch.stack(mine), torch.stack(theirs))
        similar = [of[0] @ torch.cat(of[1:]).T for of in (mine, theirs)]
        deviation(job, case, f"similarities at size {size}", *similar)
        same_patches = [cpu.matches(device, n) for device in (job.device, torch.device("cpu"))]
        job.put(case, f"matches of the same patches, size {size}", equal=share_equal(*same_patches))
        matched = [ours.matches(job.device, n), cpu.matches(torch.device("cpu"), n)]
        job.put(case, f"matches, size {size}", equal=share_equal(*matched))
    for ransac in RANSACS:
        settings = replace(config, ransac=ransac)
        scores = ours.scores(settings, job.device)
        exact = replace(settings, precision="exact")
        theirs = cpu.scores(exact, torch.device("cpu"))
        deviation(job, case, f"scores, {ransac}", *map(torch.from_numpy, (scores, theirs)))


def deviation(job: Job, case: str, step: str, ours: Tensor, cpu: Tensor) -> None:
    """Write down the largest deviation, and the norm of all to the norm of the CPU's."""
    if not torch.isfinite(ours).all():
        raise RuntimeError(f"{step}, {case}: not all numbers are finite")
    away = (ours.double() - cpu.double()).abs()
    relative = float(away.norm() / cpu.double().norm().clamp_min(1e-300))
    job.put(case, step, largest=float(away.max()), relative=relative)


def share_equal(ours: Sequence[Pairs], theirs: Sequence[Pairs]) -> float:
    """Return the share of the pairs of either that both have."""
    both = either = 0
    for mine, others in zip(ours, theirs, strict=True):
        first, second = (
            {*zip(*(p.tolist() for p in pairs), strict=True)} for pairs in (mine, others)
        )
        both, either = both + len(first & second), either + len(first | second)
    return both / either if either else 1.0


# --- data sets ---


def data_sets(job: Job) -> Iterator[tuple[str, Path]]:
    """Give the data sets that are there, each a folder with lists and ground truth."""
    if has_demo_images():
        from patchnetvlad.cli.demo import write_dataset

        folder = job.work / "demo"
        write_dataset(folder)
        yield "demo", folder
    else:
        job.put("demo", "", remark="the photographs are not at hand")
    if job.tower is not None:
        yield "tower", job.tower
    else:
        job.put("tower", "", remark="not at hand")


def answers(folder: Path, config: Config, device: str, work: Path) -> RerankResult:
    """Extract and match a data set."""
    for part in ("query", "index"):
        listing, output = folder / f"{part}.txt", work / f"features_{part}"
        extract(config, listing, folder, output, device=device, resume=False, progress=False)
    return rerank(
        config,
        folder / "query.txt",
        folder / "index.txt",
        work / "features_query",
        work / "features_index",
        ground_truth=folder / "ground_truth.npz",
        device=device,
        progress=False,
    )


def data_config(config: Config) -> Config:
    """Return the configuration in which data sets are matched: homographies by ``batched``."""
    return replace(config, ransac="batched", n_values=(1, 5, 10))


def answers_agree(job: Job, name: str, folder: Path, precision: str) -> None:
    """Compare the answers and recalls of a data set with the CPU's."""
    config = replace(data_config(shipped_config(job)), precision=precision)
    expected = reference_of(job, name)
    if expected is None and name != "demo":
        job.put(name, precision, remark="no reference of the CPU at hand")
        return
    if expected is None:
        exact = replace(config, precision="exact")
        expected = arrays_of(answers(folder, exact, "cpu", job.work / "cpu"))
    found = arrays_of(answers(folder, config, str(job.device), job.work / f"{name}_{precision}"))
    recalls = [" ".join(f"{r:.3f}" for r in of["recalls"][-1]) for of in (found, expected)]
    job.put(
        f"{name}, {precision}",
        "first answers",
        equal=float((found["reranked"][:, 0] == expected["reranked"][:, 0]).mean()),
        remark=f"recalls {recalls[0]}, on the CPU {recalls[1]}",
    )
    job.put(
        f"{name}, {precision}",
        "retrieved",
        equal=float((found["retrieved"] == expected["retrieved"]).mean()),
    )


def arrays_of(result: RerankResult) -> dict[str, np.ndarray]:
    assert result.reranked is not None
    recalls = np.array([result.recalls[method] for method in ("NetVLAD", "PatchNetVLAD")])
    return {"retrieved": result.retrieved, "reranked": result.reranked, "recalls": recalls}


def reference_of(job: Job, name: str) -> dict[str, np.ndarray] | None:
    """Read the CPU's answers, if they are of the same configuration."""
    if job.reference is None:
        return None
    with np.load(job.reference) as stored:
        if str(stored["about"]) != reference_about(job):
            job.put(name, "reference", remark="of another configuration; computed again")
            return None
        keys = ("retrieved", "reranked", "recalls")
        if f"{name}_recalls" not in stored:
            return None
        return {key: stored[f"{name}_{key}"] for key in keys}


def reference_about(job: Job) -> str:
    config = data_config(shipped_config(job))
    kept = ("patch_sizes", "image_size", "ransac", "matcher", "patch_vlad", "n_values")
    return json.dumps({key: getattr(config, key) for key in kept})


def make_reference(file: Path, job: Job) -> None:
    """Compute the CPU's answers for the data sets that are there, and write them to a file."""
    config = replace(data_config(shipped_config(job)), precision="exact")
    found: dict[str, Any] = {"about": np.array(reference_about(job))}
    for name, folder in data_sets(job):
        print(f"{name} on the CPU", flush=True)
        arrays = arrays_of(answers(folder, config, "cpu", job.work / name))
        found |= {f"{name}_{key}": value for key, value in arrays.items()}
    np.savez_compressed(file, **found)


# --- robustness -----------------------------------------------------------------------------------


def robustness(job: Job) -> None:
    """Share the device among describers and processes, and leave little memory."""
    two_describers(job)
    two_processes(job)
    for mebibytes in (2048, 512, 128, 32):
        little_memory(job, mebibytes)


class Kept:
    """A sink of features that keeps them."""

    def __init__(self) -> None:
        self.features: dict[int, list[np.ndarray]] = {}

    def write(self, i: int, descriptor: np.ndarray, arrays: Sequence[np.ndarray]) -> None:
        self.features[i] = [descriptor, *arrays]

    def commit(self) -> None:
        pass


def two_describers(job: Job) -> None:
    """Let two models on one device share the images, as two GPUs do."""
    count = 4 if job.small else 20
    folder, names = job.image_files(count)
    config = job.config(SPEED, local_features="float32")
    found = []
    for number in (1, 2):
        describers = [Describer.load(config, job.device) for _ in range(number)]
        kept = Kept()
        decode = Decoder([folder / name for name in names], config, pin=job.on_gpu)
        broken = stream_features(kept, describers, decode, range(count), config, lambda _: None)
        assert not broken
        found.append(kept.features)
    put_difference(job, "two models share the images", *found)


def put_difference(job: Job, case: str, one: dict[Any, Any], other: dict[Any, Any]) -> None:
    """Write down the share of images with the very same features, and the largest deviation."""
    if one.keys() != other.keys():
        raise RuntimeError(f"{case}: {len(one)} and {len(other)} images have features")
    pairs = [(a, b) for i in one for a, b in zip(one[i], other[i], strict=True)]
    same = [all(map(np.array_equal, one[i], other[i])) for i in one]
    largest = max(float(np.abs(a.astype(np.float64) - b).max()) for a, b in pairs)
    job.put(case, "features", equal=float(np.mean(same)), largest=largest)


def two_processes(job: Job) -> None:
    """Extract two shares of a list at a time, each in its process, and put them together."""
    count = 4 if job.small else 20
    folder, names = job.image_files(count)
    listing = write_list(job.work / "shared.txt", names)
    config = job.config_file(SPEED, local_features="npy")
    whole = job.work / "whole"
    alone = extract(config, listing, folder, whole, device=str(job.device), progress=False)
    output = job.work / "in_shares"
    words = [sys.executable, "-m", "patchnetvlad.cli.feature_extract", "--config_path", config]
    words += ["--dataset_root_dir", folder, "--dataset_file_path", listing]
    words += ["--output_features_dir", output, "--device", job.device]
    processes = [
        subprocess.Popen([*map(str, words), "--shard", f"{i}/2"], cwd=ROOT) for i in range(2)
    ]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeError(f"processes that share a device ended with {codes}; see gpu.log")
    merge_shares(output)
    shared = np.load(output / "globalfeats.npy")
    rows = [dict(enumerate(r[None] for r in rows)) for rows in (alone, shared)]
    put_difference(job, "two processes share the images", *rows)


def little_memory(job: Job, mebibytes: int) -> None:
    """Extract and re-rank with that much memory beside the model: it goes on, or says one line."""
    case = f"{mebibytes} MiB beside the model"
    if not job.on_gpu:
        job.put(case, "extraction", remark="not on this device")
        return
    describer = job.describer(SPEED)
    images = job.tensors(0, 5).cpu()
    bench = Reranking(job)
    expected = describe(describer, images)[0].cpu()
    within(
        job, case, "extraction", mebibytes, lambda: describe(describer, images)[0].cpu(), expected
    )
    config = bench.config(SPEED, "host float16", matcher="RANSAC", ransac="batched")
    read = bench.reader(SPEED, "host float16", config)
    scores = one_query(job, config, read)
    within(job, case, "re-ranking", mebibytes, lambda: one_query(job, config, read), scores)


def one_query(job: Job, config: Config, read: Callable[[int], list[Tensor]]) -> Tensor:
    """Score all candidates of one query."""
    grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)
    found = rerank_candidates(
        np.arange(job.num_candidates)[None],
        lambda q: read(job.num_candidates),
        read,
        *(lambda i: grids,) * 2,
        config,
        device=job.device,
        progress=False,
    )
    return torch.from_numpy(found.scores)


def within(
    job: Job, case: str, what: str, mebibytes: int, work: Callable[[], Tensor], expected: Tensor
) -> None:
    """Do some work with little memory; anything but its outcome or one line is an error."""
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(job.device).total_memory
    allowed = torch.cuda.memory_reserved(job.device) + mebibytes * 2**20
    torch.cuda.set_per_process_memory_fraction(min(1.0, allowed / total), job.device)
    try:
        found = work()
    except DeviceError as error:
        if "\n" in str(error):
            raise
        job.put(case, what, remark=f"says: {str(error)[:120]}")
    else:
        largest = float((found.double() - expected.double()).abs().max())
        job.put(case, what, largest=largest, remark="goes on")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0, job.device)
        torch.cuda.empty_cache()
