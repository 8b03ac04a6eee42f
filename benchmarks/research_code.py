# SPDX-License-Identifier: MIT
"""Run the research code as a black box, in processes of its own.

It is fetched from the package index into a folder of its own, unless it is at hand: in the folder
that RESEARCH_CODE names, or as a wheel. Three things keep it from running as
it is, and are put right from outside in the process that runs it: its download of VGG16 weights,
which the checkpoint overwrites anyway, and two names that NumPy no longer has.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path

import torch

from patchnetvlad.assets.catalog import SHIPPED_CHECKPOINT
from patchnetvlad.models.checkpoint import load_state

VERSION = "0.1.8"
FOLDER = Path(
    os.environ.get("RESEARCH_CODE", Path.home() / ".cache" / "patchnetvlad" / "research_code")
)

_RUNNER = """
import runpy, sys
import numpy, torchvision
numpy.in1d = numpy.isin
numpy.int = int
build = torchvision.models.vgg16
torchvision.models.vgg16 = lambda *arguments, **options: build(weights=None)
sys.path.insert(0, sys.argv[1])
script = sys.argv[2]
sys.argv = sys.argv[2:]
runpy.run_path(script, run_name="__main__")
"""


def install() -> Path:
    """Fetch the research code, once; return its folder."""
    if not (FOLDER / "patchnetvlad").is_dir():
        subprocess.run(
            [
                sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check",
                "--no-deps", "--target", str(FOLDER), f"patchnetvlad=={VERSION}", "natsort>=8",
            ],
            check=True,
        )  # fmt: skip
    return FOLDER


def at_hand(wheel_folders: Sequence[Path] = ()) -> bool:
    """Whether it can be run without the package index; a wheel of it is unpacked."""
    if (FOLDER / "patchnetvlad").is_dir():
        return True
    for folder in wheel_folders:
        for wheel in sorted(folder.glob(f"patchnetvlad-{VERSION}*.whl")):
            _unpack([*folder.glob("natsort-*.whl"), wheel])
            return True
    return False


def _unpack(wheels: Sequence[Path]) -> None:
    """Lay out wheels in one folder as pip does."""
    folder = FOLDER.with_name(f"{FOLDER.name}.part")
    shutil.rmtree(folder, ignore_errors=True)
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    (folder / "bin").mkdir()
    for script in folder.glob("*.data/scripts/*.py"):
        script.replace(folder / "bin" / script.name)
    folder.replace(FOLDER)


def words_of(script: str, *arguments: str | Path, device: str = "cpu") -> list[str]:
    """Return the command line that runs one of its scripts, from its own folder."""
    folder = install()
    words = [sys.executable, "-c", _RUNNER, str(folder), str(folder / "bin" / f"{script}.py")]
    return [*words, *map(str, arguments), *(["--nocuda"] if device == "cpu" else [])]


def environment() -> dict[str, str]:
    """Return the environment that it runs in: without a display."""
    return {**os.environ, "MPLBACKEND": "Agg"}


def run(script: str, *arguments: str | Path, threads: int | None = None) -> None:
    """Run one of its scripts on the CPU; CalledProcessError if it fails."""
    variables = environment()
    if threads:
        variables["OMP_NUM_THREADS"] = str(threads)
    subprocess.run(
        words_of(script, *arguments),
        check=True,
        env=variables,
        cwd=FOLDER,  # away from our package of the same name
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def write_checkpoint(folder: Path) -> Path:
    """Write the shipped checkpoint as the research code reads it; return its stem."""
    state = load_state(SHIPPED_CHECKPOINT)
    torch.save({"num_pcs": 128, "state_dict": state}, folder / "imagenet_WPCA128.pth.tar")
    return folder / "imagenet_WPCA"


def write_config(path: Path, checkpoint: Path, *, fast: bool) -> Path:
    """Write a configuration for both: like `speed` (one size) or like `performance` (three).

    Images go one by one, as here on a CPU: in the research code, features depend on the batch.
    """
    sizes, strides, weights = ("5", "1", "1") if fast else ("2,5,8", "1,1,1", "0.45,0.15,0.4")
    path.write_text(f"""
[feature_extract]
batchsize = 1
cachebatchsize = 1
local_features = npy
imageresizew = 640
imageresizeh = 480

[feature_match]
matcher = {"spatialApproximator" if fast else "RANSAC"}
n_values_all = 1,5,10,20,50,100
dataset_name = NA
pred_input_path = None
imageresizew = 640
imageresizeh = 480
patchweights2use = {weights}

[global_params]
pooling = patchnetvlad
resumepath = {checkpoint}
threads = 0
num_pcs = 128
ngpu = 1
patch_sizes = {sizes}
strides = {strides}
""")
    return path
