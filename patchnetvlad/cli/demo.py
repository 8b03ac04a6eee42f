# SPDX-License-Identifier: MIT
"""``patchnetvlad-demo``: the three commands, one after the other, on real images."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from patchnetvlad.assets.data_files import demo_images
from patchnetvlad.cli import feature_extract, feature_match, match_two
from patchnetvlad.cli._common import (
    add_debug_argument,
    add_device_arguments,
    command,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.cli._names import called
from patchnetvlad.errors import PatchNetVLADError

# Each query and the index image of the same place, then index images of other places.
PAIRS = {
    "montmartre_far": "montmartre_close",
    "gcs_far": "gcs_close",
    "tokyo_query": "tokyo_db",
    "photo_from_iss": "satellite_img",
    "thermal": "visible",
}
OTHERS = ("notre_dame", "chartres", "sist_chapel", "china", "flower")


def write_dataset(folder: Path) -> None:
    """Write image lists and ground truth for the images of the demo.

    Parameters
    ----------
    folder : Path
        Gets ``query.txt`` (5 images), ``index.txt`` (10 images) and ``ground_truth.npz``, which
        puts every place 100 m from the next.
    """
    import numpy as np

    photographs = demo_images()
    index = [*PAIRS.values(), *OTHERS]
    folder.mkdir(parents=True, exist_ok=True)
    for name, entries in (("query.txt", list(PAIRS)), ("index.txt", index)):
        lines = [f"{photographs[entry]}\n" for entry in entries]
        (folder / name).write_text("".join(lines), encoding="utf-8")
    positions = np.array([[100.0 * place, 0.0] for place in range(len(index))])
    np.savez(
        folder / "ground_truth.npz",
        utmQ=positions[: len(PAIRS)],
        utmDb=positions,
        posDistThr=25.0,
        unit="m",
    )


def first_answers(predictions: Path) -> dict[str, str]:
    """Read the best answer of each query, name to name, from a predictions file."""
    photographs = demo_images()
    lines = predictions.read_text(encoding="utf-8").splitlines()
    answers: dict[str, str] = {}
    for query in PAIRS:
        # Whole lines are compared, because paths may hold commas.
        pairs = {f"{photographs[query]}, {path}": name for name, path in photographs.items()}
        answers[query] = next(pairs[line] for line in lines if line in pairs)
    return answers


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the demo as the command line says."""
    arguments = build_parser().parse_args(argv)
    folder = Path(arguments.output_dir)
    shared = ["--config_path", "demo"]
    shared += ["--nocuda"] if arguments.nocuda else []
    shared += ["--device", arguments.device] if arguments.device else []
    shared += ["--debug"] if arguments.debug else []

    write_dataset(folder)
    for part in ("index", "query"):
        _run(
            "extract",
            feature_extract.main,
            "--dataset_file_path", folder / f"{part}.txt",
            "--output_features_dir", folder / f"features_{part}",
            *shared,
        )  # fmt: skip
    results = folder / "results"
    _run(
        "match",
        feature_match.main,
        "--query_file_path", folder / "query.txt",
        "--index_file_path", folder / "index.txt",
        "--query_input_features_dir", folder / "features_query",
        "--index_input_features_dir", folder / "features_index",
        "--ground_truth_path", folder / "ground_truth.npz",
        "--result_save_folder", results,
        *shared,
    )  # fmt: skip
    photographs = demo_images()
    answers = first_answers(results / "PatchNetVLAD_predictions.txt")
    for query, answer in answers.items():
        _run(
            "match-two",
            match_two.main,
            "--first_im_path", photographs[query],
            "--second_im_path", photographs[answer],
            "--plot_save_path", folder / "matches" / query,
            *shared,
        )  # fmt: skip

    retrieved = first_answers(results / "NetVLAD_predictions.txt")
    say(f"\n{'Query':16}{'NetVLAD':26}{'Patch-NetVLAD':26}Picture of the matches")
    for query, answer in answers.items():
        first, second = (
            f"{name} ({'right' if PAIRS[query] == name else 'wrong'})"
            for name in (retrieved[query], answer)
        )
        picture = folder / "matches" / query / match_two.PLOT_FILE
        say(f"{query:16}{first:26}{second:26}{picture}")
    say_next(f"{called('run')} --index FOLDER --queries FOLDER does the same with your own images")
    return 0


def _run(name: str, main: Callable[..., int], *words: str | Path) -> None:
    """Show a command, and run it in this process."""
    texts = [str(word) for word in words]
    say(f"\n$ {called(name)} {shlex.join(texts)}")
    if status := main(texts):
        raise PatchNetVLADError(f"{called(name)} ended with status {status}")


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Recognise five places among ten images: extract features, retrieve and re-rank "
        "candidates, compute recalls, and draw the matches.",
    )
    parser.add_argument(
        "--output_dir", default="demo", metavar="DIR", help="folder for results (default: demo)"
    )
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


if __name__ == "__main__":
    sys.exit(main())
