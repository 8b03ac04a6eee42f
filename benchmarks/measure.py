# SPDX-License-Identifier: MIT
"""What is measured, and how: whole processes, the limits of the machine, the machine itself.

Time is that of a whole process from start to exit. Time a unit (an image, a query) is
``(t2 - t1) / (n2 - n1)`` of two runs on n1 and n2 units, so that start-up, loading of the model and
the like drop out. Peak memory is the largest resident set of the process (``ru_maxrss``), pages of
mapped files and shared libraries included.
"""

from __future__ import annotations

import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

# In a process of its own: a child's ru_maxrss starts from the memory of the process that starts it.
_HELPER = """
import json, os, subprocess, sys, time
start = time.perf_counter()
child = subprocess.Popen(sys.argv[1:], stdout=subprocess.DEVNULL)
_, status, used = os.wait4(child.pid, 0)
seconds = time.perf_counter() - start
code = os.waitstatus_to_exitcode(status)
print(json.dumps([seconds, used.ru_utime + used.ru_stime, used.ru_maxrss, code]))
"""


@dataclass(frozen=True)
class Run:
    """One process: seconds on the clock and on all cores, and its largest resident set."""

    seconds: float
    cpu_seconds: float
    peak_bytes: int


def run(words: Sequence[str], environment: Mapping[str, str] | None = None, cwd: str = ".") -> Run:
    """Run a command; RuntimeError with the end of its stderr if it fails."""
    helper = subprocess.run(
        [sys.executable, "-S", "-c", _HELPER, *words],
        env=environment,
        cwd=cwd,
        capture_output=True,
        text=True,
    )
    if helper.returncode != 0:
        raise RuntimeError(f"{words[:4]} could not be started:\n{helper.stderr[-2000:]}")
    seconds, cpu_seconds, peak, code = json.loads(helper.stdout)
    if code != 0:
        raise RuntimeError(f"exit status {code} of {words[:4]}:\n{helper.stderr[-2000:]}")
    return Run(seconds, cpu_seconds, peak * (1 if sys.platform == "darwin" else 1024))


def in_turn(
    programs: Mapping[str, Callable[[int], Run]],
    counts: Mapping[str, tuple[int, int]],
    repeats: int,
    say: Callable[[str], None] = lambda text: None,
) -> dict[str, list[dict[str, float]]]:
    """Run programs in turn, each on n1 and on n2 units; give one dict a repeat for each."""
    measured: dict[str, list[dict[str, float]]] = {name: [] for name in programs}
    for _ in range(repeats):
        for name, program in programs.items():
            few, many = counts[name]
            first, second = program(few), program(many)
            each = (second.seconds - first.seconds) / (many - few)
            measured[name].append(
                {
                    "seconds": each,
                    "cpu_seconds": (second.cpu_seconds - first.cpu_seconds) / (many - few),
                    "start_seconds": first.seconds - few * each,
                    "peak_bytes": max(first.peak_bytes, second.peak_bytes),
                }
            )
            say(f"  {name}: {each:.3f} s, peak {second.peak_bytes / 1e6:.0f} MB")
    return measured


def medians(repeats: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Take the median of each number over repeats."""
    return {key: statistics.median(repeat[key] for repeat in repeats) for key in repeats[0]}


def best(work: Callable[[], object], times: int) -> float:
    """Give the shortest of several times, s; the first, which warms up, does not count."""
    seconds = []
    for _ in range(times + 1):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


class Limits:
    """The best that this machine was seen to do: products of matrices, and copies in memory.

    Attributes
    ----------
    sgemm : float
        FLOP/s of float32 products of 4096 x 4096 matrices.
    copy : float
        Bytes/s copied from one tensor of 256 MiB to another, counted once.
    """

    def __init__(self) -> None:
        self.sgemm = self.copy = 0.0

    def measure(self) -> None:
        """Measure again, and keep what is better: before and after what is compared with it."""
        n = 4096
        a, b, out = torch.rand(n, n), torch.rand(n, n), torch.empty(n, n)
        self.sgemm = max(self.sgemm, 2 * n**3 / best(lambda: torch.mm(a, b, out=out), 3))
        source = torch.ones(2**26)
        target = torch.empty_like(source)
        self.copy = max(self.copy, source.nbytes / best(lambda: target.copy_(source), 3))

    def to_json(self) -> dict[str, float]:
        return {"sgemm_flops": self.sgemm, "copy_bytes": self.copy}


def machine() -> dict[str, str]:
    """Describe this machine and the versions of what runs on it."""
    import cv2

    import patchnetvlad

    try:
        import faiss
    except ImportError:
        faiss = None

    return {
        "date": time.strftime("%Y-%m-%d"),
        "machine": f"{platform.system()} {platform.machine()}, {_processor()}, "
        f"{os.cpu_count()} cores, {torch.get_num_threads()} threads, {_memory()}",
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}, "
        f"NumPy {np.__version__}, OpenCV {cv2.__version__}, "
        f"faiss {faiss.__version__ if faiss else 'missing'}, "
        f"patchnetvlad {patchnetvlad.__version__}",
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or "unknown processor"


def _memory() -> str:
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return "unknown memory"
    size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"{math.ceil(size / 2**30)} GiB"
