# SPDX-License-Identifier: MIT
"""``patchnetvlad-store``: inspect, check, convert and merge feature folders."""

from __future__ import annotations

import argparse
import dataclasses
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from patchnetvlad.base.text import format_bytes
from patchnetvlad.cli._common import (
    add_debug_argument,
    add_device_arguments,
    add_feature_names_argument,
    add_resume_argument,
    command,
    device_from_arguments,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.cli._names import called
from patchnetvlad.encoders import DEFAULT

if TYPE_CHECKING:
    from patchnetvlad.features.inspect import StoreInfo


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do as the command line says; 1 if features are damaged."""
    arguments = build_parser().parse_args(argv)
    run = {"info": _info, "verify": _verify, "convert": _convert, "merge": _merge}[arguments.job]
    return run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser("Inspect, check and convert feature folders, and merge shares.")
    jobs = parser.add_subparsers(dest="job", required=True, metavar="info|verify|convert|merge")

    _add_info(jobs.add_parser(
        "info",
        help="describe a folder",
        description="Describe the contents of a feature folder and how it was made.",
    ))  # fmt: skip
    _add_verify(jobs.add_parser(
        "verify",
        help="read and check all features",
        description="Read and check all features, by checksum in a store. Exit status: 0 if all "
        "are sound, 1 if some are damaged, 2 if they could not be checked.",
    ))  # fmt: skip
    _add_convert(jobs.add_parser(
        "convert",
        help="write features in another format",
        description="Write features in another format. After an interruption, run the command "
        "again to resume, except for hdf5.",
    ))  # fmt: skip
    _add_merge(jobs.add_parser(
        "merge",
        help="merge the shares of an extraction",
        description="Merge the shares written by patchnetvlad extract --shard I/N into what a "
        "single run would have written. After an interruption, run the command again to resume.",
    ))  # fmt: skip
    return parser


def _add_info(info: argparse.ArgumentParser) -> None:
    info.add_argument(
        "directory", metavar="DIR", help="folder of features, also of the research code"
    )
    info.add_argument("--json", action="store_true", help="print JSON, for programs")
    add_debug_argument(info)


def _add_verify(verify: argparse.ArgumentParser) -> None:
    verify.add_argument(
        "directory", metavar="DIR", help="folder of features, also of the research code"
    )
    verify.add_argument(
        "--drop",
        action="store_true",
        help="remove damaged features; the same patchnetvlad extract command then computes only "
        "those",
    )
    add_debug_argument(verify)


def _add_convert(convert: argparse.ArgumentParser) -> None:
    convert.add_argument(
        "source",
        metavar="SOURCE",
        help="folder of features, also of the research code, or an HDF5 file written by this "
        "command",
    )
    convert.add_argument("target", metavar="TARGET", help="folder to write, or for hdf5, the file")
    convert.add_argument(
        "--to",
        required=True,
        choices=("float16", "float32", "int8", "npy", "hdf5"),
        help="a feature store with numbers of this type, .npy files as in the research code, or "
        "one HDF5 file in the layout of hloc",
    )
    convert.add_argument(
        "--dataset_file_path",
        default=None,
        metavar="LIST",
        help="the list from which the features were extracted; required for .npy files",
    )
    convert.add_argument(
        "--config_path",
        default=None,
        metavar="FILE|NAME",
        help="the configuration with which they were extracted; required for features of the "
        "research code and for feature maps (local_features = map)",
    )
    convert.add_argument(
        "--dataset_root_dir",
        default=None,
        metavar="DIR",
        help="root folder of the images; with it, key points in hdf5 are in px of the original "
        "images, otherwise of the resized images",
    )
    add_feature_names_argument(
        convert,
        "with --to npy: name files after the stems of the images (default) or after their full "
        "paths",
    )
    add_device_arguments(convert)
    add_debug_argument(convert)


def _add_merge(merge: argparse.ArgumentParser) -> None:
    merge.add_argument("directory", metavar="DIR", help="the folder given as --output_features_dir")
    merge.add_argument(
        "shares", nargs="*", metavar="SHARE", help="folders of all shares (default: DIR/shards/*)"
    )
    merge.add_argument(
        "--keep",
        action="store_true",
        help="copy the shares and keep them (default: move them to DIR, or delete them once "
        "copied)",
    )
    add_resume_argument(merge, "replaces the features in DIR")
    add_debug_argument(merge)


def _info(arguments: argparse.Namespace) -> int:
    from patchnetvlad.features.inspect import store_info

    info = store_info(arguments.directory)
    if arguments.json:
        say(json.dumps(dataclasses.asdict(info), indent=2))
    else:
        for line in _lines(info):
            say(line)
        say_next(f"{called('store')} verify {shlex.quote(arguments.directory)} checks all of it")
    return 0


def _lines(info: StoreInfo) -> list[str]:
    """Return what a feature directory holds as lines of text."""
    layout = {"store": "feature store", "npy": ".npy files", "hdf5": "HDF5 file"}[info.layout]
    if info.layout != "npy":
        layout += f", {info.kind if info.kind != 'npy' else 'no patches'}"
    elif not info.pooling:
        layout += " of the research code, or without their features.json"
    if info.rounded:
        layout += f", rounded to {info.rounded} before"
    if info.share:
        layout = f"share {info.share} of a {layout}"
    state = "finished" if info.finished else "not finished"
    if info.moved:
        state = f"moved to {info.moved} by a merge that is not finished"
    lines = [f"{info.path}: {layout}, {state}"]

    def line(key: str, text: str) -> None:
        lines.append(f"  {key:<12} {text}")

    line("images", f"{info.num_done} of {info.num_images}")
    if info.missing:
        more = info.num_images - info.num_done > len(info.missing)
        line("missing", f"{', '.join(info.missing)}{', ...' if more else ''}")
    for name, why in info.failed.items():
        line("failed", f"{name}: {why}")
    shards = f", {info.num_shards} shard{'s' * (info.num_shards != 1)}" if info.num_shards else ""
    each = format_bytes(info.bytes_per_image)
    line("on disk", f"{format_bytes(info.num_bytes)}, {each} per image{shards}")
    if info.dead_bytes:
        line("of these", f"{format_bytes(info.dead_bytes)} are of records no longer in use")
    if info.dimension is not None:
        line("dimension", f"P = {info.dimension}")
    if info.strides:
        pairs = zip(info.patch_sizes, info.strides, strict=True)
        line("patch sizes", ", ".join(f"{size} (stride {stride})" for size, stride in pairs))
    elif info.patch_sizes:
        line("patch sizes", ", ".join(map(str, info.patch_sizes)))
    if info.image_size is not None:
        height, width = info.image_size
        line("image size", f"{width} x {height} px" if height else "each image's own")
    if info.pooling:
        vlad = f", patch_vlad {info.patch_vlad}" if info.patch_vlad else ""
        other = "" if info.encoder == DEFAULT else f"encoder {info.encoder}, "
        made = f"{other}pooling {info.pooling}{vlad}, precision {info.precision}"
        line("made with", made)
        line("checkpoint", info.checkpoint[:12] or "unknown")
    return lines


def _verify(arguments: argparse.Namespace) -> int:
    from patchnetvlad.features.inspect import verify_features

    found = verify_features(arguments.directory, drop=arguments.drop)
    for damage in found.damages:
        say(str(damage))
    what = "records" if found.layout == "store" else "files of patches"
    waiting = f"; images without features yet: {found.num_missing}" if found.num_missing else ""
    where = arguments.directory
    if found.share:
        where += f", share {found.share}"
    if found.sound:
        say(f"{where}: sound; {what} read: {found.num_checked}{waiting}")
        return 0
    say(f"{where}: damaged: {len(found.damages)}; {what} read: {found.num_checked}{waiting}")
    if arguments.drop and found.of_places:
        say(f"taken out: {found.num_dropped}; PlaceIndex.load opens the others; add these again")
    elif arguments.drop:
        say(
            f"taken out: {found.num_dropped}; the same {called('extract')} command computes what "
            "is missing"
        )
    else:
        then = f"{called('extract')} then computes that again"
        if found.of_places:
            then = "the images can be added again"
        say(
            f"{called('store')} verify --drop {arguments.directory} takes out what is damaged, "
            f"and {then}"
        )
    return 1


def _merge(arguments: argparse.Namespace) -> int:
    from patchnetvlad.features.merge import merge_shares

    count = merge_shares(
        arguments.directory, arguments.shares, keep=arguments.keep, resume=arguments.resume
    )
    say(f"Done. The features of {count} images are in {arguments.directory}")
    say_next(f"{called('match')}, which reads them as --index_input_features_dir, say")
    return 0


def _convert(arguments: argparse.Namespace) -> int:
    device = device_from_arguments(arguments)

    from patchnetvlad.features.convert import convert_features

    info = convert_features(
        arguments.source,
        arguments.target,
        arguments.to,
        image_list=arguments.dataset_file_path,
        config=arguments.config_path,
        dataset_root=arguments.dataset_root_dir,
        feature_names=arguments.feature_names,
        device=device,
    )
    say(
        f"Done. The features of {info.num_images} images are in {info.path} "
        f"({arguments.to}, {format_bytes(info.num_bytes)})"
    )
    say_next(f"{called('store')} verify {shlex.quote(arguments.target)} reads and checks them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
