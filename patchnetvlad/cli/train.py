# SPDX-License-Identifier: MIT
"""``patchnetvlad-train``: train a network on Mapillary SLS or on your own images."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from patchnetvlad.cli._common import (
    add_debug_argument,
    add_device_arguments,
    add_ground_truth_argument,
    add_list_arguments,
    add_root_argument,
    command,
    device_from_arguments,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.encoders import DEFAULT
from patchnetvlad.errors import ConfigError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Train as the command line says."""
    arguments = build_parser().parse_args(argv)
    device = device_from_arguments(arguments)

    from patchnetvlad.config_train import TrainConfig
    from patchnetvlad.training.start import train_network

    config = TrainConfig.load(arguments.config_path)
    training, validation, name = _areas(arguments, config)
    trained = train_network(
        config,
        training,
        validation,
        arguments.save_path or "checkpoints",
        arguments.cache_path or "cache",
        data_name=name,
        weights=arguments.weights,
        clusters=arguments.cluster_path or None,
        resume=arguments.resume_path or None,
        identifier=arguments.identifier,
        epochs=arguments.nEpochs,
        start_epoch=arguments.start_epoch,
        keep=arguments.save_every_epoch,
        threads=arguments.threads,
        device=device,
    )
    say(f"Done. The checkpoint is {trained.checkpoint}")
    more = "" if config.encoder == DEFAULT else f" and encoder = {config.encoder}"
    if config.train_pca:
        ending = f"{config.num_pcs}.pth.tar"
        say_next(
            f"set resumePath = {str(trained.checkpoint).removesuffix(ending)}, num_pcs = "
            f"{config.num_pcs}{more} in [global_params] of a configuration"
        )
        return 0
    say_next(
        f"patchnetvlad-add-pca --resume_path {trained.checkpoint}, with the same images; or set "
        f"resumePath = {trained.checkpoint}, num_pcs = 0{more} in [global_params] of a "
        "configuration"
    )
    return 0


def _areas(arguments: argparse.Namespace, config: Any) -> tuple[list[Any], list[Any], str]:
    """Return what is trained on, what is validated on, and the name of the data."""
    lists = (arguments.query_file_path, arguments.index_file_path, arguments.ground_truth_path)
    if any(lists) and (arguments.images or not all(lists)):
        raise ConfigError(
            "give --query_file_path, --index_file_path and --ground_truth_path; or --images and "
            "--positions; or none of them, to train on Mapillary SLS"
        )
    root = arguments.dataset_root_dir
    if not any(lists) and not arguments.images:
        from patchnetvlad.own_data.msls import read_areas

        both = [read_areas(root, mode, panoramas=config.panoramas) for mode in ("train", "val")]
        return both[0], both[1], "mapillary"
    from patchnetvlad.training.areas import area_of_lists, split_area

    if arguments.images:
        from patchnetvlad.own_data.areas import read_own_images

        area = read_own_images(arguments.images, arguments.positions, root)
    else:
        area = area_of_lists(*lists, dataset_root=root)
    gap = max(config.negative_distance, config.validation_distance)
    cell = 4 * gap if arguments.cell is None else arguments.cell
    training, validation = split_area(area, arguments.val_share, cell, gap, config.seed)
    return [training], [validation], "own"


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Train NetVLAD, either on Mapillary Street-level Sequences or on your own images with "
        "positions: by triplets with hard negatives, as in the research code, or, with "
        "--config_path train_modern, by batches of places.",
    )
    parser.add_argument(
        "--config_path",
        default="train",
        metavar="FILE|NAME",
        help="an INI file with a section [train], or the name of a built-in one: train (default), "
        "train_modern",
    )
    add_root_argument(parser, "lists, or folder of Mapillary SLS that holds train_val")
    _add_research_arguments(parser)
    parser.add_argument(
        "--weights",
        default=None,
        metavar="FILE|NAME",
        help="checkpoint whose encoder is the start of training, torchvision's VGG16 file, or the "
        "name of an encoder, such as resnet50 (default: the bundled checkpoint, or the encoder of "
        "the configuration)",
    )
    own = parser.add_argument_group("your own images, instead of Mapillary SLS")
    add_list_arguments(own)
    add_ground_truth_argument(own, "positions of both lists (.npz with utmQ and utmDb)")
    own.add_argument(
        "--images",
        default=None,
        metavar="DIR|LIST",
        help="one folder or list, whose images are both queries and index",
    )
    own.add_argument(
        "--positions",
        default="auto",
        metavar="SOURCE",
        help="positions of --images: a source as in patchnetvlad dataset create (a table, a GPX "
        "track, poses, names, exif, frames, ...), or a .npy file [N, 2] in the order of the list "
        "(default: auto)",
    )
    own.add_argument(
        "--val_share",
        type=float,
        default=0.2,
        metavar="SHARE",
        help="share of the queries to use for validation (default: 0.2)",
    )
    own.add_argument(
        "--cell",
        type=float,
        default=None,
        metavar="DISTANCE",
        help="side of the square cells, each used as a whole for training or for validation "
        "(default: four times negdistthr)",
    )
    add_device_arguments(parser)
    add_debug_argument(parser)
    return parser


def _add_research_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of the research code."""
    for name, metavar, text in (
        ("cache_path", "DIR", "folder for the vocabulary and for kept maps (default: cache)"),
        ("save_path", "DIR", "folder for checkpoints (default: checkpoints)"),
        ("resume_path", "FILE", "checkpoint.pth.tar to resume training from"),
        ("cluster_path", "FILE", "HDF5 file of a vocabulary, instead of one from the images"),
        ("identifier", "TEXT", "suffix for the name of this run's folder"),
    ):
        parser.add_argument(f"--{name}", default="", metavar=metavar, help=text)
    for name, default, text in (
        ("nEpochs", 30, "total number of epochs"),
        ("start_epoch", 0, "number of the first epoch; overridden by --resume_path"),
        ("threads", 0, "threads that decode images; 0 chooses the number"),
    ):
        parser.add_argument(
            f"--{name}", type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--save_every_epoch", action="store_true", help="keep the checkpoint of each epoch"
    )


if __name__ == "__main__":
    sys.exit(main())
