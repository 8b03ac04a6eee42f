# SPDX-License-Identifier: MIT
"""What training gains: recalls before and after, for several seeds.

Trains from the bundled checkpoint's VGG16 on frames with positions, with whitening, and matches
data sets that were never trained on, in images of the size of training; "before" is the same
without training (``patchnetvlad-fit`` on the same frames). Prints, for each data set, what
``patchnetvlad compare`` says of the runs. Work that is done already is not done again:

    python benchmarks/train_results.py --train FRAMES --data NAME=FOLDER:QUERIES:INDEX ... \
        --seeds 1 2 3 --work build/train

``FRAMES`` holds ``index.txt`` and ``positions.npy``; each data set's folder holds two image lists,
named without suffix, and ``ground_truth.npz``.
"""

from __future__ import annotations

import argparse
import configparser
import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from patchnetvlad import Config, extract, rerank
from patchnetvlad.config_train import TrainConfig
from patchnetvlad.own_data.areas import read_own_images
from patchnetvlad.training.fit import add_pca

ROOT = Path(__file__).resolve().parents[1]
COMPONENTS, N_VALUES = 128, (1, 5, 10)


def main() -> None:
    """Train, match and write ``results.json`` and a table."""
    arguments = parse_arguments()
    work = arguments.work
    work.mkdir(parents=True, exist_ok=True)
    results: dict[str, dict[str, object]] = {}
    for seed in (None, *arguments.seeds):  # one after the other, with what it is good for
        name = "before" if seed is None else f"seed {seed}"
        if seed is None:
            checkpoint, seconds = fitted(arguments, work), None
        else:
            checkpoint, seconds = trained(arguments, work, seed)
        results[name] = {"seconds of training": seconds}
        for data in arguments.data:
            results[name][data.split("=")[0]] = judged(
                checkpoint, data, work / folder_of(name), arguments
            )
        (work / "results.json").write_text(json.dumps(results, indent=1))
    for data in arguments.data:
        name = data.split("=")[0]
        runs = [f"{of}={work / folder_of(of) / 'results' / name}" for of in results]
        run("patchnetvlad", "compare", *runs, "--all_methods", "--output", work / f"compare_{name}")
        print(name, (work / f"compare_{name}" / "comparison.md").read_text(), sep="\n")


def folder_of(name: str) -> str:
    """Return the name of the folder of a checkpoint's results."""
    return name.replace(" ", "_")


def fitted(arguments: argparse.Namespace, work: Path) -> Path:
    """Make the checkpoint without training: a vocabulary and whitening of the same frames."""
    checkpoint = work / f"before_WPCA{COMPONENTS}.pth.tar"
    if not checkpoint.is_file():
        config = train_config(arguments, work, 0)
        run(
            "patchnetvlad", "fit", "--images", arguments.train / "index.txt",
            "--dataset_root_dir", arguments.train, "--num_clusters", arguments.clusters,
            "--num_pcs", COMPONENTS, "--config_path", size_config(config, work),
            "--num_images", arguments.whitening, "--output", checkpoint,
        )  # fmt: skip
    return checkpoint


def trained(arguments: argparse.Namespace, work: Path, seed: int) -> tuple[Path, float]:
    """Train with a seed, and add whitening; return the checkpoint and the seconds it took."""
    folder, config = work / f"train_{seed}", train_config(arguments, work, seed)
    done = folder / "done.json"
    if not done.is_file():
        start = time.perf_counter()
        positions = arguments.train / "positions.npy"
        frames = ["--images", arguments.train / "index.txt", "--dataset_root_dir", arguments.train]
        run(
            "patchnetvlad", "train", "--config_path", config, *frames,
            "--positions", positions, "--save_path", folder,
            "--cache_path", work / "cache", "--nEpochs", arguments.epochs,
            "--cell", arguments.cell, "--val_share", arguments.val_share,
        )  # fmt: skip
        [best] = folder.glob("*/checkpoints/model_best.pth.tar")
        settings = TrainConfig.load(config)
        if settings.train_pca:
            whitened = best.with_name(f"model_best_WPCA{COMPONENTS}.pth.tar")
        else:
            found = read_own_images(arguments.train / "index.txt", positions, arguments.train)
            images, many = settings.for_images(), arguments.whitening
            whitened = add_pca(best, found.index, images, COMPONENTS, num_images=many).checkpoint
        done.write_text(json.dumps([str(whitened), time.perf_counter() - start]))
    path, seconds = json.loads(done.read_text())
    return Path(path), seconds


def train_config(arguments: argparse.Namespace, work: Path, seed: int) -> Path:
    """Write the configuration of training: a built-in one, with what is given here."""
    parser = configparser.ConfigParser()
    parser.read(ROOT / "patchnetvlad" / "configs" / f"{arguments.config}.ini")
    given = dict(pair.split("=", 1) for pair in arguments.set)
    parser["train"].update({"seed": str(seed), "num_clusters": str(arguments.clusters), **given})
    parser["global_params"]["num_pcs"] = str(COMPONENTS)
    path = work / f"train_{seed}.ini"
    with path.open("w") as file:
        parser.write(file)
    return path


def size_config(config: Path, work: Path) -> Path:
    """Write a configuration of extraction with the image size of training."""
    parser = configparser.ConfigParser()
    parser.read([ROOT / "patchnetvlad" / "configs" / "netvlad_extract.ini"])
    trained = configparser.ConfigParser()
    trained.read(config)
    for key in ("imageresizew", "imageresizeh"):
        parser["feature_extract"][key] = trained["train"][key]
    parser["global_params"]["precision"] = "fast"
    path = work / "fit.ini"
    with path.open("w") as file:
        parser.write(file)
    return path


def judged(
    checkpoint: Path, data: str, work: Path, arguments: argparse.Namespace
) -> dict[str, object]:
    """Match a data set with a checkpoint; return the metrics of both methods."""
    name, rest = data.split("=", 1)
    folder, queries, index = rest.split(":")
    root, results = Path(folder), work / "results" / name
    file = results / "metrics.json"
    if not file.is_file():
        size = TrainConfig.load(train_config(arguments, arguments.work, 0)).image_size
        config = replace(
            Config.load(arguments.match_config),
            image_size=size, match_image_size=size,
            resume_path=str(checkpoint), num_pcs=COMPONENTS, ransac="fast", precision="fast",
            n_values=N_VALUES,
        )  # fmt: skip
        for side in (index, queries):
            extract(config, root / f"{side}.txt", root, work / "features" / f"{root.name}_{side}")
        rerank(
            replace(config, n_values=(*N_VALUES, arguments.candidates)),
            root / f"{queries}.txt", root / f"{index}.txt",
            *(work / "features" / f"{root.name}_{side}" for side in (queries, index)),
            dataset_root=root, ground_truth=root / "ground_truth.npz", results_dir=results,
        )  # fmt: skip
    return json.loads(file.read_text())["methods"]


def run(*words: object) -> None:
    """Run a command of this checkout."""
    command, *more = map(str, words)
    subprocess.run([sys.executable, "-m", command, *more], check=True, cwd=ROOT)


def parse_arguments() -> argparse.Namespace:
    """Return the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--train", type=Path, required=True, metavar="FRAMES")
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER:QUERIES:INDEX")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--cell", type=float, default=1000, help="1000: whole clips")
    parser.add_argument("--val_share", type=float, default=0.15)
    parser.add_argument("--whitening", type=int, default=10_000, help="images of whitening")
    parser.add_argument("--clusters", type=int, default=16)
    parser.add_argument("--config", default="train_modern")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="of [train]")
    parser.add_argument("--match_config", default="demo")
    parser.add_argument("--candidates", type=int, default=100)
    parser.add_argument("--work", type=Path, default=Path("build/train"))
    arguments = parser.parse_args()
    for name in ("index.txt", "positions.npy"):
        if not (arguments.train / name).is_file():
            parser.error(
                f"{arguments.train / name} is missing; name a folder of frames that has it"
            )
    return arguments


if __name__ == "__main__":
    main()
