# SPDX-License-Identifier: MIT
"""All there is to know about a GPU, in one short run: right, how fast, and where the time goes.

    python benchmarks/gpu.py [--device cuda] [--minutes 8] [--output DIR] [--kit DIR] ...

Each stage runs in a process of its own with its own share of the time, the most valuable first;
one that fails, hangs or runs out of memory does not stop the others. Every row is written when it
is measured, to ``gpu.json`` and ``gpu.md``; ``gpu.png`` is drawn at the end, ``gpu_profile.txt``
has the profiles and ``gpu.log`` all that the stages printed. The stages are

limits      products of matrices and copies, which the others are compared with
tests       the tests that need the device
agreement   features, matches and scores against the CPU's, step by step; recalls of data sets
extraction  images a second and peak memory, against the research code
reranking   ms a query of 100 candidates, against the research code
profile     the largest items of extraction and of re-ranking
robustness  several processes on one device; little memory

Nothing is fetched. What the checkout does not have, such as the research code and photographs,
comes out of a kit that ``benchmarks/gpu_kit.py`` makes where there is a network; what is missing
is left out, and the table says so. ``--device cpu --small`` tries everything on tiny images; its
numbers are of no use.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from gpu_kit import environment_of
from gpu_table import Record, markdown

from patchnetvlad.base.device import choose_device
from patchnetvlad.errors import DeviceError

ROOT = Path(__file__).resolve().parents[1]
# Seconds of 480, in the order of their value; what one leaves over, later ones may use.
SHARES = {
    "limits": 30,
    "tests": 75,
    "agreement": 65,
    "extraction": 110,
    "reranking": 135,
    "profile": 35,
    "robustness": 30,
}


def main() -> int:
    arguments = parse()
    try:
        device = choose_device(arguments.device)
    except DeviceError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    with cleaned_up():
        if arguments.make_reference:
            return reference(arguments)
        return run_stages(arguments, device)


def parse(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="cuda (default), cuda:N or cpu")
    parser.add_argument("--small", action="store_true", help="tiny images, small models")
    parser.add_argument("--minutes", type=float, default=8.0, help="of all stages (default: 8)")
    parser.add_argument("--stages", nargs="+", choices=list(SHARES), default=list(SHARES))
    parser.add_argument(
        "--output", type=Path, default=Path("build/gpu"), metavar="DIR",
        help="gets gpu.json, gpu.md, gpu.png, gpu_profile.txt and gpu.log (default: build/gpu)",
    )  # fmt: skip
    parser.add_argument(
        "--kit", type=Path, default=Path("build/gpu_kit"), metavar="DIR",
        help="what gpu_kit.py made: research code, photographs, the CPU's answers "
        "(default: build/gpu_kit)",
    )  # fmt: skip
    parser.add_argument(
        "--tower", type=Path, default=None, metavar="DIR",
        help="a data set: images, index.txt, query.txt and ground_truth.npz",
    )  # fmt: skip
    parser.add_argument(
        "--reference", type=Path, default=None, metavar="FILE",
        help="the CPU's answers for the data sets (default: reference.npz of the kit)",
    )  # fmt: skip
    parser.add_argument(
        "--make-reference", type=Path, default=None, metavar="FILE",
        help="compute the CPU's answers, write them to FILE, and do no more",
    )  # fmt: skip
    arguments = parser.parse_args(words)
    if arguments.minutes <= 0:
        parser.error("--minutes must be more than 0")
    return arguments


@contextlib.contextmanager
def cleaned_up() -> Iterator[None]:
    """Turn SIGTERM into an exit, on which running stages are ended and folders removed."""

    def leave(*_: object) -> None:
        raise SystemExit(143)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def run_stages(arguments: argparse.Namespace, device: torch.device) -> int:
    """Run the stages one after the other; 1 if one did not pass."""
    output = arguments.output.absolute()
    record = Record.begin(output, about(device))
    (output / "gpu.log").write_text("")
    (output / "gpu_profile.txt").unlink(missing_ok=True)
    end = time.monotonic() + 60 * arguments.minutes
    with tempfile.TemporaryDirectory(prefix="patchnetvlad-gpu-") as work:
        options = stage_options(arguments, device, work)
        for n, name in enumerate(arguments.stages):
            later = sum(SHARES[other] for other in arguments.stages[n + 1 :])
            kept = later * 60 * arguments.minutes / sum(SHARES[s] for s in arguments.stages)
            run_stage(record, name, options, end - kept - time.monotonic())
            print(f"{name}: {record.read()['stages'][name]['status']}", flush=True)
    with contextlib.suppress(Exception):
        record.chart()
    content = record.read()
    print(markdown(content))
    return int(any(stage["status"] != "passed" for stage in content["stages"].values()))


def reference(arguments: argparse.Namespace) -> int:
    """Compute the CPU's answers and write them to a file."""
    kit = arguments.kit.absolute() if arguments.kit.is_dir() else None
    os.environ.update(environment_of(kit))
    with tempfile.TemporaryDirectory(prefix="patchnetvlad-gpu-") as work:
        from gpu_checks import make_reference
        from gpu_job import Job

        arguments.output = Path(work) / "output"
        cpu = torch.device("cpu")
        Record.begin(arguments.output, about(cpu))
        options = stage_options(arguments, cpu, work)
        make_reference(
            arguments.make_reference, Job.of("agreement", {**options, "seconds": 3600.0})
        )
    return 0


def about(device: torch.device) -> dict[str, str]:
    """Describe what is measured on."""
    from measure import machine

    found = machine()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["device"] = (
            f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB, "
            f"{properties.multi_processor_count} multiprocessors, CUDA {torch.version.cuda}, "
            f"cuDNN {torch.backends.cudnn.version()}"
        )
    else:
        found["device"] = "the CPU: a rehearsal, whose numbers are of no use"
    return found


def stage_options(arguments: argparse.Namespace, device: torch.device, work: str) -> dict[str, Any]:
    """Collect what a stage's process is told; see ``gpu_job.Job``."""
    kit = arguments.kit.absolute()
    tower = arguments.tower or kit / "tower"
    reference = arguments.reference or kit / "reference.npz"
    return {
        "device": str(device),
        "small": arguments.small,
        "output": str(arguments.output.absolute()),
        "work": work,
        "kit": str(kit) if kit.is_dir() else None,
        "tower": str(tower.absolute()) if tower.is_dir() else None,
        "reference": str(reference.absolute()) if reference.is_file() else None,
    }


def run_stage(record: Record, name: str, options: dict[str, Any], seconds: float) -> None:
    """Run a stage in a process of its own, which is ended when its time is over."""
    if seconds <= 0:
        record.stage(name, status="no time left", seconds=0.0)
        return
    record.stage(name, status="running")
    start = time.monotonic()
    failure = Path(options["work"]) / "failure.txt"
    failure.unlink(missing_ok=True)
    words = [sys.executable, str(Path(__file__).with_name("gpu_job.py")), name]
    words.append(json.dumps({**options, "seconds": seconds, "failure": str(failure)}))
    kit = Path(options["kit"]) if options["kit"] else None
    with Path(options["output"], "gpu.log").open("a") as log:
        log.write(f"\n=== {name} ({seconds:.0f} s) ===\n")
        log.flush()
        process = subprocess.Popen(
            words,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**os.environ, **environment_of(kit), "PYTHONPATH": python_path(kit)},
            preexec_fn=os.setpgrp,
        )
        try:
            code: int | None = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(process.pid, signal.SIGKILL)  # also what the stage started
            process.wait()
    passed = {"seconds": time.monotonic() - start}
    if code == 0:
        record.stage(name, status="passed", **passed)
    elif code is None:
        record.stage(name, status="out of time", error=f"ended after {seconds:.0f} s", **passed)
    else:
        said = failure.read_text() if failure.is_file() else f"exit status {code}"
        record.stage(name, status="failed", error=said, **passed)


def python_path(kit: Path | None) -> str:
    """Let stages import the package, the benchmarks and, last, the packages of a kit."""
    folders = [str(ROOT), str(ROOT / "benchmarks"), os.environ.get("PYTHONPATH", "")]
    if kit is not None and (kit / "site").is_dir():
        folders.append(str(kit / "site"))
    return os.pathsep.join(folder for folder in folders if folder)


if __name__ == "__main__":
    sys.exit(main())
