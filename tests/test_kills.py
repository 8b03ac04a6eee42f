# SPDX-License-Identifier: MIT
"""Commands that are killed at random moments, again and again, end with the undisturbed result."""

from __future__ import annotations

import random
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

pytestmark = [pytest.mark.slow, pytest.mark.timeout(3600)]

KILLS = 30
IMAGES = 48
INI = """
[feature_extract]
cachebatchsize = 3
local_features = {local}
imageresizeW = 320
imageresizeH = 240
[feature_match]
matcher = RANSAC
n_values_all = 1,5,40
imageresizeW = 320
imageresizeH = 240
patchWeights2Use = 0.5,0.5
[global_params]
pooling = patchnetvlad
resumePath = ./pretrained_models/imagenet_WPCA
num_pcs = 128
patch_sizes = 2,5
strides = 1,1
"""


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("killed")
    rng = np.random.default_rng(0)
    for i in range(IMAGES):
        blocks = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((320, 240)).save(root / f"{i}.png")
    (root / "list.txt").write_text("".join(f"{i}.png\n" for i in range(IMAGES)))
    for local in ("float16", "npy"):
        (root / f"{local}.ini").write_text(INI.format(local=local))
    return root


def start(name, *words):
    command = [sys.executable, "-m", f"patchnetvlad.cli.{name}", *map(str, words), "--nocuda"]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def extraction(world, local, out):
    return start(
        "feature_extract", "--config_path", world / f"{local}.ini", "--dataset_root_dir", world,
        "--dataset_file_path", world / "list.txt", "--output_features_dir", out,
    )  # fmt: skip


def matching(world, features, out):
    return start(
        "feature_match", "--config_path", world / "float16.ini", "--dataset_root_dir", world,
        "--query_file_path", world / "list.txt", "--index_file_path", world / "list.txt",
        "--query_input_features_dir", features, "--index_input_features_dir", features,
        "--result_save_folder", out,
    )  # fmt: skip


def undisturbed(process):
    """Wait for a process; return the seconds it took."""
    begin = time.monotonic()
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return time.monotonic() - begin


def killed(launch, seconds, folder):
    """Kill a command until it was killed KILLS times and is done; return how it went."""
    moments = random.Random(0)
    kills = resumed = 0
    while True:
        process = launch()
        # Not in the first moments, which only import; after enough kills it may finish.
        wait = moments.uniform(0.3, 1.0) * seconds if kills < KILLS else None
        try:
            output, _ = process.communicate(timeout=wait)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            output, _ = process.communicate()
            kills += 1
        resumed += " already" in output
        if process.returncode == 0:
            if kills >= KILLS:
                return resumed
            for file in folder.iterdir():  # too early: once more from the start
                file.unlink()
        else:
            assert process.returncode == -signal.SIGKILL, output


def content(folder):
    files = {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.suffix in (".npy", ".bin", ".txt", ".json")
    }
    if (folder / "features.sqlite").exists():
        with sqlite3.connect(folder / "features.sqlite") as db:
            files["records"] = db.execute("SELECT * FROM records ORDER BY name").fetchall()
    return files


@pytest.mark.parametrize("local", ["float16", "npy"])
def test_extraction(world, tmp_path, local):
    seconds = undisturbed(extraction(world, local, tmp_path / "whole"))
    out = tmp_path / "killed"
    resumed = killed(lambda: extraction(world, local, out), seconds, out)
    print(f"{KILLS} kills, {resumed} runs that went on from earlier work")
    assert resumed >= KILLS // 4
    assert content(out) == content(tmp_path / "whole")


def test_matching(world, tmp_path):
    features = tmp_path / "features"
    undisturbed(extraction(world, "float16", features))
    seconds = undisturbed(matching(world, features, tmp_path / "whole"))
    out = tmp_path / "killed"
    resumed = killed(lambda: matching(world, features, out), seconds, out)
    print(f"{KILLS} kills, {resumed} runs that went on from earlier work")
    assert resumed >= KILLS // 4
    assert content(out) == content(tmp_path / "whole")
