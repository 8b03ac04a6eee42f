# SPDX-License-Identifier: MIT
"""One stage of a run on a GPU, in this process: what all stages share, and how one is started.

    python benchmarks/gpu_job.py STAGE OPTIONS

is what ``gpu.py`` calls, with its options as JSON.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import research_code
import torch
from gpu_table import RESEARCH, Record
from PIL import Image
from torch import Tensor
from workload import ONE_SIZE, THREE_SIZES, Settings, photographs, view, write_checkpoint

from patchnetvlad.config import Config
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.models.describer import Describer

ROOT = Path(__file__).resolve().parents[1]
SMALL_SIZE = (128, 160)
PERFORMANCE, SPEED, THREE = "performance, K = 64", "speed, K = 16", "three sizes, P = 128"
CASES = {
    PERFORMANCE: Settings(4096, 64, THREE_SIZES),
    "performance, K = 16": Settings(4096, 16, THREE_SIZES),
    SPEED: Settings(512, 16, ONE_SIZE),
    "storage, K = 16": Settings(128, 16, ONE_SIZE),
    THREE: Settings(128, 16, THREE_SIZES),
}


@dataclass(frozen=True)
class Job:
    """A stage: where it computes, what it works on, and where its rows go.

    Attributes
    ----------
    stage : str
    device : torch.device
    small : bool
        Try everything on little.
    work : Path
        Folder that all stages share, and that is removed in the end.
    kit, tower : Path or None
        Folders, where they are there.
    reference : Path or None
        The CPU's answers for data sets.
    record : Record
    end : float
        When the time is over, by the monotonic clock.
    """

    stage: str
    device: torch.device
    small: bool
    work: Path
    kit: Path | None
    tower: Path | None
    reference: Path | None
    record: Record
    end: float

    @classmethod
    def of(cls, stage: str, options: dict[str, Any]) -> Job:
        def path(key: str) -> Path | None:
            return Path(options[key]) if options[key] else None

        return cls(
            stage,
            torch.device(options["device"]),
            options["small"],
            Path(options["work"]),
            path("kit"),
            path("tower"),
            path("reference"),
            Record(Path(options["output"])),
            time.monotonic() + options["seconds"],
        )

    # --- results ---

    def put(self, case: str, program: str, **values: Any) -> None:
        """Write down a row at once."""
        self.record.put(self.stage, {"case": case, "program": program, **values})
        print(case, program, values, flush=True)

    def left(self) -> float:
        """Seconds until the process is ended."""
        return self.end - time.monotonic()

    def limit(self, name: str, key: str) -> float | None:
        """Return what the stage ``limits`` measured, in units a second; None if it did not."""
        scale = {"tera": 1e12, "giga": 1e9}[key]
        rows = [row for row in self.record.rows("limits") if row["case"] == name]
        return rows[0][key] * scale if rows and key in rows[0] else None

    # --- the device ---

    @property
    def on_gpu(self) -> bool:
        return self.device.type == "cuda"

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds_of(self, work: Callable[[int], object], least: float = 1.0) -> float:
        """Time ``work(0)``, ``work(1)``, ...; give the median after two to warm up.

        ``work`` is told how often it was called, to work on something else each time.
        """
        times: list[float] = []
        n = 0
        for n in range(1 if self.small else 2):
            work(n)
        while len(times) < (1 if self.small else 5) or (not self.small and sum(times) < least):
            n += 1
            self.synchronize()
            start = time.perf_counter()
            work(n)
            self.synchronize()
            times.append(time.perf_counter() - start)
        return median(times)

    def peak_of(self, work: Callable[[], object]) -> int | None:
        """Return the most bytes that tensors took on the device meanwhile; None on a CPU."""
        if not self.on_gpu:
            return None
        self.synchronize()
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.synchronize()
        return torch.cuda.max_memory_allocated(self.device)

    # --- what is worked on ---

    def settings(self, case: str) -> Settings:
        """Return the settings of a case; small ones have few clusters and components."""
        full = CASES[case]
        if not self.small:
            return full
        pcs, clusters = max(16, full.num_pcs // 64), full.num_clusters // 8
        return Settings(pcs, clusters, full.sizes, image_size=SMALL_SIZE)

    def checkpoint(self, case: str) -> Path:
        """Write a case's made-up checkpoint, once; return its stem."""
        settings = self.settings(case)
        clusters, pcs = settings.num_clusters, settings.num_pcs
        return write_checkpoint(self.work, clusters, pcs, self.views[:2])

    def config_file(self, case: str, **more: Any) -> Path:
        """Write a configuration of a case."""
        words = [case, *(f"{key}={Path(str(value)).name}" for key, value in more.items())]
        name = "".join(c if c.isalnum() else "_" for c in "_".join(words))
        path = self.work / f"{name}.ini"
        return self.settings(case).write(path, self.checkpoint(case), **more)

    def config(self, case: str, **more: Any) -> Config:
        return Config.load(self.config_file(case, **more))

    def describer(self, case: str, **more: Any) -> Describer:
        return Describer.load(self.config(case, **more), self.device)

    @cached_property
    def views(self) -> list[Image.Image]:
        """Photographs from many viewpoints, no two alike, as many as candidates and queries."""
        random = np.random.default_rng(0)
        originals = list(photographs(fetch=False).values())
        height, width = SMALL_SIZE if self.small else (480, 640)
        count = self.num_candidates + self.num_queries
        views = (view(originals[n % len(originals)], random) for n in range(count))
        return [image.resize((width, height)) for image in views]

    @property
    def num_candidates(self) -> int:
        return 6 if self.small else 100

    @property
    def num_queries(self) -> int:
        return 2 if self.small else 8

    def tensors(self, first: int, count: int) -> Tensor:
        """Return some views as normalised images [count, 3, H, W] on the device."""
        size = self.views[0].size[::-1]
        transform = input_transform(size)
        images = [transform(self.views[n % len(self.views)]) for n in range(first, first + count)]
        return torch.stack(images).to(self.device)

    def image_files(self, count: int) -> tuple[Path, list[str]]:
        """Write views as JPEG files under ``count`` names, once; return folder and names."""
        folder = self.work / "images"
        folder.mkdir(exist_ok=True)
        names = [f"{n:05d}.jpg" for n in range(count)]
        for n, name in enumerate(names):
            if (folder / name).is_file():
                continue
            if n < len(self.views):
                self.views[n].save(folder / name, quality=92)
            else:
                os.link(folder / names[n % len(self.views)], folder / name)
        return folder, names

    # --- the research code ---

    @cached_property
    def has_research_code(self) -> bool:
        folders = [ROOT / ".whl", ROOT.parent / ".whl"]
        return research_code.at_hand([*folders, *([self.kit] if self.kit else [])])

    def without_research_code(self, cases: Sequence[str]) -> None:
        """Say in a row a case why the research code is not there to be compared with."""
        for case in cases:
            self.put(case, RESEARCH, remark="not at hand: neither RESEARCH_CODE, a kit nor a wheel")


def end_with_parent() -> None:
    """End this process and its children when the one that started it is gone."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os.killpg(0, signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


def main() -> int:
    import gpu_checks
    import gpu_speed

    stages: dict[str, Callable[[Job], None]] = {
        "limits": gpu_speed.limits,
        "tests": gpu_checks.device_tests,
        "agreement": gpu_checks.agreement,
        "extraction": gpu_speed.extraction,
        "reranking": gpu_speed.reranking,
        "profile": gpu_speed.profile,
        "robustness": gpu_checks.robustness,
    }
    name, options = sys.argv[1], json.loads(sys.argv[2])
    end_with_parent()
    try:
        stages[name](Job.of(name, options))
    except Exception as error:
        traceback.print_exc()
        Path(options["failure"]).write_text(f"{type(error).__name__}: {error}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
