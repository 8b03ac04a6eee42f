# SPDX-License-Identifier: MIT
"""Rehearse a run on a GPU where there is none: ``gpu.py --device cpu --small``.

    python benchmarks/gpu_rehearsal.py [--kit DIR] [--output DIR]

It runs on a copy of the tracked files, in a virtual environment that has nothing but what a machine
with PyTorch has, with the network off where the system lets one switch it off. It fails if a stage
does not pass within its share of five minutes, or if what must not be needed is there.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    *("torch", "torchvision", "numpy", "opencv-python-headless", "pillow", "scikit-learn", "tqdm"),
    *("matplotlib", "safetensors", "huggingface_hub", "pytest", "faiss-cpu", "natsort"),
    *("filelock", "scipy", "lazy_loader"),
)
NOT_NEEDED = (
    *("patchnetvlad", "pyproj", "ray", "h5py", "mkdocs", "hypothesis", "moto", "s3fs"),
    *("pytest_timeout", "playwright", "nbformat", "nbclient", "mypy", "ruff"),
)
MOST_SECONDS = 300


def environment(folder: Path) -> Path:
    """Make the virtual environment, once; return its Python."""
    python = folder / "bin" / "python"
    done = folder / ".installed"
    if not done.is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        words = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check", *PACKAGES]
        subprocess.run([str(python), *words], check=True)
        done.touch()
    found = subprocess.run(
        [str(python), "-c", "import importlib.util as u, sys\n"
         "print(*[name for name in sys.argv[1:] if u.find_spec(name)])", *NOT_NEEDED],
        check=True, capture_output=True, text=True, cwd=folder, env=clean(),
    ).stdout.split()  # fmt: skip
    if found:
        raise SystemExit(f"error: {folder} has {', '.join(found)}; delete it and try again")
    return python


def clean() -> dict[str, str]:
    """Return the environment without what leads to other packages and data."""
    dropped = ("PYTHONPATH", "RESEARCH_CODE", "PATCHNETVLAD_HOME")
    return {key: value for key, value in os.environ.items() if key not in dropped}


def offline() -> list[str]:
    """Return the words before a command that switch its network off; none where none do."""
    words = ["unshare", "--net", "--map-root-user"]
    if (
        shutil.which("unshare")
        and subprocess.run([*words, "true"], capture_output=True).returncode == 0
    ):
        return words
    print("the network cannot be switched off here", file=sys.stderr)
    return []


def copy_tracked(folder: Path) -> None:
    """Copy the tracked files as they are now, and no others."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=MOST_SECONDS / 60, help="more, on a busy machine"
    )
    parser.add_argument("--kit", type=Path, help="see gpu_kit.py (default: without one)")
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "gpu_rehearsal" / "output")
    arguments = parser.parse_args()
    python = environment(ROOT / "build" / "gpu_rehearsal" / "venv")
    output = arguments.output.absolute()
    with tempfile.TemporaryDirectory(prefix="patchnetvlad-rehearsal-") as name:
        folder = Path(name) / "checkout"
        copy_tracked(folder)
        words = [*offline(), str(python), str(folder / "benchmarks" / "gpu.py")]
        words += ["--device", "cpu", "--small", "--output", str(output)]
        words += ["--minutes", str(arguments.minutes)]
        words += ["--kit", str(arguments.kit.absolute())] if arguments.kit else []
        variables = {**clean(), "PYTHONPATH": str(folder), "XDG_CACHE_HOME": str(Path(name) / "c")}
        start = time.monotonic()
        status = subprocess.run(words, cwd=folder, env=variables).returncode
        seconds = time.monotonic() - start
    print(f"{seconds:.0f} s; in {output}: {', '.join(sorted(os.listdir(output)))}")
    return status


if __name__ == "__main__":
    sys.exit(main())
