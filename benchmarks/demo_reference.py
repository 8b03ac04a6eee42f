# SPDX-License-Identifier: MIT
"""Run the research code on the demonstration's photographs, and keep what it says.

Its features, predictions, recalls and scores of two images go to ``tests/golden/demo.json`` and
``demo.npz``, which the tests compare ours with. Only another checkpoint or other photographs ask
for new ones:

    python benchmarks/demo_reference.py
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import research_code
import torch

from patchnetvlad.assets import demo_images
from patchnetvlad.cli.demo import PAIRS, write_dataset

GOLDEN = Path(__file__).resolve().parents[1] / "tests" / "golden"
N_VALUES = "1,5,10"
CASES = {"spatial": True, "ransac": False}
"""Name of each case, and whether it is the fast one, of one patch size."""


def write_config(path: Path, checkpoint: Path, *, fast: bool) -> Path:
    """Write a configuration for both programs that asks for no more answers than there are."""
    research_code.write_config(path, checkpoint, fast=fast)
    path.write_text(re.sub(r"(n_values_all = ).*", rf"\g<1>{N_VALUES}", path.read_text()))
    return path


def read_predictions(path: Path) -> list[list[str]]:
    """Read a file of predictions: the names of the answers to each query, best first."""
    names = {str(file): name for name, file in demo_images().items()}
    answers: dict[str, list[str]] = {query: [] for query in PAIRS}
    for line in path.read_text().splitlines()[2:]:
        query, answer = line.split(", ")
        answers[names[query]].append(names[answer])
    return list(answers.values())


def similarity(config: Path, first: Path, second: Path, folder: Path) -> float:
    """Return what the research code's ``match_two`` says of two images."""
    words = research_code.words_of(
        "match_two", "--config_path", config, "--first_im_path", first,
        "--second_im_path", second, "--plot_save_path", folder,
    )  # fmt: skip
    done = subprocess.run(
        words, check=True, capture_output=True, text=True, cwd=research_code.FOLDER,
        env=research_code.environment(),
    )  # fmt: skip
    found = re.search(r"Similarity score between the two images is: (-?[\d.]+)\. ", done.stdout)
    assert found, done.stdout
    return float(found[1])


def run_case(folder: Path, config: Path) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Extract, match and compare pairs; return the answers, and the global descriptors."""
    descriptors = {}
    for part in ("query", "index"):
        research_code.run(
            "feature_extract", "--config_path", config, "--dataset_root_dir", "",
            "--dataset_file_path", folder / f"{part}.txt", "--output_features_dir", folder / part,
        )  # fmt: skip
        descriptors[part] = np.load(folder / part / "globalfeats.npy")
    results = folder / "results"
    results.mkdir()
    research_code.run(
        "feature_match", "--config_path", config, "--dataset_root_dir", "",
        "--query_file_path", folder / "query.txt", "--index_file_path", folder / "index.txt",
        "--query_input_features_dir", folder / "query",
        "--index_input_features_dir", folder / "index",
        "--ground_truth_path", folder / "ground_truth.npz", "--result_save_folder", results,
    )  # fmt: skip
    photographs = demo_images()
    scores = {
        f"{query}, {answer}": similarity(config, photographs[query], photographs[answer], results)
        for query, answer in PAIRS.items()
    }
    return {
        "NetVLAD": read_predictions(results / "NetVLAD_predictions.txt"),
        "PatchNetVLAD": read_predictions(results / "PatchNetVLAD_predictions.txt"),
        "recalls": (results / "recalls.txt").read_text().splitlines(),
        "scores": scores,
    }, descriptors


def main() -> None:
    answers: dict[str, Any] = {
        "queries": list(PAIRS),
        "cpu": torch.backends.cpu.get_cpu_capability(),  # on which rounding depends
        "threads": torch.get_num_threads(),
    }
    for name, fast in CASES.items():
        with tempfile.TemporaryDirectory() as made:
            folder = Path(made)
            write_dataset(folder)
            checkpoint = research_code.write_checkpoint(folder)
            config = write_config(folder / "config.ini", checkpoint, fast=fast)
            answers[name], descriptors = run_case(folder, config)
    GOLDEN.mkdir(exist_ok=True)
    (GOLDEN / "demo.json").write_text(json.dumps(answers, indent=1) + "\n")
    np.savez(GOLDEN / "demo.npz", **descriptors)


if __name__ == "__main__":
    main()
