# SPDX-License-Identifier: MIT
"""Time our commands against the research code's, in turn, on the demonstration's photographs.

Whole processes are timed, start-up and loading of the model included, on the CPU. Run it on a
machine that does nothing else:

    python benchmarks/compare.py [--repeats 3] [--copies 2]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import research_code
import torch
from PIL import Image, ImageOps

import patchnetvlad
from patchnetvlad.assets import demo_images


def write_images(folder: Path, copies: int) -> int:
    """Write each photograph and its mirrored and cropped variants as RGB files, with a list."""
    folder.mkdir()
    names = []
    for name, path in demo_images().items():
        image = ImageOps.exif_transpose(Image.open(path)).convert("RGB").resize((640, 480))
        for copy in range(copies):
            variant = ImageOps.mirror(image) if copy % 2 else image
            variant = variant.crop((8 * copy, 0, 640 - 8 * copy, 480))
            names.append(f"{name}_{copy}.png")
            variant.save(folder / names[-1])
    (folder / "images.txt").write_text("".join(f"{name}\n" for name in names))
    return len(names)


def timed(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def ours(script: str, *arguments: str | Path) -> None:
    words = [sys.executable, "-m", f"patchnetvlad.cli.{script}", *map(str, arguments), "--nocuda"]
    subprocess.run(words, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--copies", type=int, default=2, help="variants of each photograph")
    arguments = parser.parse_args()
    research_code.install()
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        images = folder / "images"
        count = write_images(images, arguments.copies)
        checkpoint = research_code.write_checkpoint(folder)
        for label, fast in (("1 size, spatial", True), ("3 sizes, RANSAC", False)):
            times: dict[tuple[str, str], list[float]] = {}
            for repeat in range(arguments.repeats):
                for who, run, more in (
                    ("research code", research_code.run, ""),
                    ("ours", ours, ""),
                    ("ours, direct", ours, "patch_vlad = direct"),
                ):
                    config = research_code.write_config(
                        folder / "config.ini", checkpoint, fast=fast, more=more
                    )
                    features = folder / f"{who} {fast} {repeat}"
                    results = folder / "results" / who
                    results.mkdir(parents=True, exist_ok=True)
                    listing = images / "images.txt"
                    shared = ["--config_path", config, "--dataset_root_dir", images]
                    extract = [
                        *shared,
                        "--dataset_file_path", listing, "--output_features_dir", features,
                    ]  # fmt: skip
                    match = [
                        *shared,
                        "--query_file_path", listing, "--index_file_path", listing,
                        "--query_input_features_dir", features,
                        "--index_input_features_dir", features,
                        "--result_save_folder", results,
                    ]  # fmt: skip
                    for job, script, words in (
                        ("extract", "feature_extract", extract),
                        ("match", "feature_match", match),
                    ):
                        seconds = timed(lambda r=run, s=script, w=words: r(s, *w))
                        times.setdefault((who, job), []).append(seconds / count)
            for job, unit in (("extract", "image"), ("match", "query")):
                theirs = times["research code", job]
                cells = [label, f"{job}, s a {unit}", f"{statistics.median(theirs):.2f}"]
                for who in ("ours", "ours, direct"):
                    mine = times[who, job]
                    ratio = statistics.median(t / m for t, m in zip(theirs, mine, strict=True))
                    cells.append(f"{statistics.median(mine):.2f} ({ratio:.1f} x)")
                rows.append(f"| {' | '.join(cells)} |")
    print(
        f"{time.strftime('%Y-%m-%d')}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"Python {platform.python_version()}, torch {torch.__version__}, NumPy {np.__version__}, "
        f"OpenCV {cv2.__version__}; patchnetvlad {patchnetvlad.__version__} and research code "
        f"{research_code.VERSION}; {count} images, each matched with all; "
        f"medians of {arguments.repeats} runs in turn\n"
    )
    print("| configuration, P = 128 | job | research code | ours | ours, `patch_vlad = direct` |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
