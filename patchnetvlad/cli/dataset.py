# SPDX-License-Identifier: MIT
"""``patchnetvlad-dataset``: make lists and ground truth from your own images; check data sets."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.cli._common import (
    add_debug_argument,
    add_distance_argument,
    add_features_arguments,
    add_ground_truth_argument,
    add_list_arguments,
    add_protocol_argument,
    add_root_argument,
    command,
    new_parser,
    say,
    say_next,
)
from patchnetvlad.cli._names import called
from patchnetvlad.errors import ConfigError


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Do as the command line says; 1 if a data set has problems."""
    arguments = build_parser().parse_args(argv)
    run = {"create": _create, "official": _official, "check": _check}[arguments.job]
    return run(arguments)


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the command."""
    parser = new_parser(
        "Make image lists and ground truth from your own images, or check a data set."
    )
    jobs = parser.add_subparsers(dest="job", required=True, metavar="create|official|check")
    _add_create(jobs.add_parser(
        "create",
        help="make image lists, ground truth and a map from images with positions",
        description="Write index.txt, query.txt, ground_truth.npz, positions.csv and map.png, then "
        "read them back and print a summary.",
    ))  # fmt: skip
    _add_official(jobs.add_parser(
        "official",
        help="make image lists and ground truth from the official files of a benchmark",
        description="Write query.txt, index.txt and ground_truth.npz from the official files of a "
        "benchmark.",
    ))  # fmt: skip
    _add_check(jobs.add_parser(
        "check",
        help="check that images, lists, features, ground truth and weights fit together",
        description="Check a data set. Exit status: 0 if there are no problems, 1 if there are, 2 "
        "if it could not be checked.",
    ))  # fmt: skip
    return parser


def _add_create(create: argparse.ArgumentParser) -> None:
    create.add_argument("--output_dir", required=True, metavar="DIR", help="folder for the files")
    _add_images(create)
    _add_positions(create)
    _add_rules(create)
    create.add_argument(
        "--check_content", action="store_true", help="report images with identical content"
    )
    create.add_argument("--no-map", dest="map", action="store_false", help="do not draw map.png")
    add_debug_argument(create)


def _add_images(create: argparse.ArgumentParser) -> None:
    chosen = create.add_argument_group("images: --images, or --index and --queries")
    chosen.add_argument(
        "--images",
        default=None,
        metavar="DIR|LIST",
        help="folder with its subfolders, or image list, to choose queries from",
    )
    chosen.add_argument("--index", default=None, metavar="DIR|LIST", help="the index images")
    chosen.add_argument("--queries", default=None, metavar="DIR|LIST", help="the queries")
    chosen.add_argument(
        "--dataset_root_dir",
        default="",
        metavar="DIR",
        help="write names relative to this folder (default: names begin with the folder as given)",
    )
    chosen.add_argument(
        "--query_every",
        type=int,
        default=None,
        metavar="N",
        help="with --images: every N-th image of each sequence (clip or folder) is a query",
    )
    chosen.add_argument(
        "--query_start",
        type=int,
        default=None,
        metavar="I",
        help="the first query of each sequence, from 1 (default: the N-th)",
    )
    chosen.add_argument(
        "--query_pattern",
        default=None,
        metavar="REGEX",
        help="with --images: images whose names match this regular expression are queries",
    )
    chosen.add_argument(
        "--order",
        choices=("natural", "plain"),
        default="natural",
        help="order of images in folders: 2 before 10 (default), or character by character",
    )


def _add_positions(create: argparse.ArgumentParser) -> None:
    where = create.add_argument_group("positions")
    where.add_argument(
        "--positions",
        default="auto",
        metavar="SOURCE|FILE",
        help="names (@easting@northing@...@.jpg), exif, frames (clip and frame number in names), "
        "order (i-th query = i-th index image), or a file: .csv, .tsv, .gpx, or KITTI, TUM, COLMAP "
        "or kapture poses; default: auto, that is, names, the poses of a kapture folder, or exif",
    )
    where.add_argument(
        "--query_positions",
        default=None,
        metavar="SOURCE|FILE",
        help="source for the queries, if different",
    )
    where.add_argument(
        "--columns",
        nargs="+",
        default=[],
        metavar="KEY=NAME",
        help="names of columns in a table, for: image, lat, lon, x, y, zone, heading",
    )
    where.add_argument(
        "--frame_pattern",
        default=None,
        metavar="REGEX",
        help="pattern of clip and frame number in names, such as '(?P<clip>\\w+)/(?P<frame>\\d+)'; "
        "default: the number at the end of the file name, and the text before it",
    )
    where.add_argument(
        "--time_offset",
        type=float,
        default=0.0,
        metavar="SECONDS",
        help="added to the capture times of images to get the times of a GPX track",
    )
    where.add_argument(
        "--time_tolerance",
        type=float,
        default=None,
        metavar="SECONDS",
        help="largest gap to the nearest point of a track (default: 10) or pose (default: 0.1)",
    )
    where.add_argument(
        "--pose_plane",
        choices=("xz", "xy", "yz"),
        default=None,
        help="axes of poses to keep (default: xz for KITTI, xy for TUM, the two widest for COLMAP "
        "and kapture)",
    )


def _add_rules(create: argparse.ArgumentParser) -> None:
    rules = create.add_argument_group("ground truth")
    add_distance_argument(
        rules,
        "index images within this distance of a query are right (default: 25 m, or 2 frames)",
    )
    rules.add_argument(
        "--spacing",
        type=float,
        default=None,
        metavar="DISTANCE",
        help="keep an image only if it is this far from the last one kept",
    )
    rules.add_argument(
        "--max_heading_difference",
        type=float,
        default=None,
        metavar="DEGREES",
        help="leave out queries whose positives all face elsewhere",
    )


def _add_official(official: argparse.ArgumentParser) -> None:
    official.add_argument(
        "path",
        metavar="FILE|DIR",
        help="a .mat file of NetVLAD's data release (pitts30k_test.mat, tokyo247.mat), or the "
        "folder of Mapillary Street-level Sequences that holds train_val",
    )
    official.add_argument("--output_dir", required=True, metavar="DIR", help="folder for the files")
    official.add_argument(
        "--kind",
        choices=("pittsburgh", "tokyo247", "msls"),
        default=None,
        help="the benchmark (default: detected from the name)",
    )
    add_protocol_argument(official, "writes its lists, and ground truth in their order")
    add_debug_argument(official)


def _add_check(check: argparse.ArgumentParser) -> None:
    add_list_arguments(check, required=True)
    add_root_argument(check)
    add_ground_truth_argument(
        check,
        "positions (.npz with utmQ, utmDb, posDistThr), right answers (.csv, .npy), or the name of "
        "a benchmark file",
    )
    add_distance_argument(check, "distance of a right answer; overrides the ground truth")
    add_features_arguments(check)
    check.add_argument(
        "--config_path",
        default=None,
        metavar="FILE|NAME",
        help="the configuration whose weights will be used",
    )
    check.add_argument(
        "--full", action="store_true", help="decode every image completely, not only its header"
    )
    add_debug_argument(check)


def _create(arguments: argparse.Namespace) -> int:
    columns = {}
    for word in arguments.columns:
        key, mark, name = word.partition("=")
        if not mark:
            raise ConfigError(f"--columns {word}: write KEY=NAME, for example lat=GPSLatitude")
        columns[key] = name

    from patchnetvlad.own_data.create import create_dataset

    summary = create_dataset(
        arguments.output_dir,
        images=arguments.images,
        index=arguments.index,
        queries=arguments.queries,
        root=arguments.dataset_root_dir,
        positions=arguments.positions,
        query_positions=arguments.query_positions,
        query_every=arguments.query_every,
        query_start=arguments.query_start,
        query_pattern=arguments.query_pattern,
        order=arguments.order,
        frame_pattern=arguments.frame_pattern,
        columns=columns,
        time_offset=arguments.time_offset,
        time_tolerance=arguments.time_tolerance,
        pose_plane=arguments.pose_plane,
        threshold=arguments.posDistThr,
        spacing=arguments.spacing,
        max_heading_difference=arguments.max_heading_difference,
        check_content=arguments.check_content,
        draw_map=arguments.map,
    )
    for line in summary.lines():
        say(line)
    say(f"Done. Lists, ground truth{' and map' if arguments.map else ''} are in {summary.folder}")
    _say_run_in(summary.folder, arguments.dataset_root_dir)
    return 0


def _say_run_in(folder: Path, root: str) -> None:
    """Say how to match the lists that were written to a folder."""
    _say_run(
        index=folder / "index.txt",
        queries=folder / "query.txt",
        ground_truth=folder / "ground_truth.npz",
        output=folder / "run",
        dataset_root_dir=root,
    )


def _say_run(**options: object) -> None:
    """Say how to match, with the options that are given."""
    words = [word for name, value in options.items() if value for word in (f"--{name}", str(value))]
    say_next(f"{called('run')} {shlex.join(words)}")


def _official(arguments: argparse.Namespace) -> int:
    from patchnetvlad.own_data.official import import_official

    found = import_official(
        arguments.path, arguments.output_dir, kind=arguments.kind, protocol=arguments.protocol
    )
    say(f"{len(found.query_names)} queries and {len(found.index_names)} index images")
    for reason, count in found.left_out.items():
        say(f"left out: {count}, {reason}")
    say(f"Done. Lists and ground truth are in {arguments.output_dir}")
    _say_run_in(Path(arguments.output_dir), "IMAGES")
    return 0


def _check(arguments: argparse.Namespace) -> int:
    from patchnetvlad.own_data.check import check_dataset

    found = check_dataset(
        arguments.query_file_path,
        arguments.index_file_path,
        root=arguments.dataset_root_dir,
        ground_truth=arguments.ground_truth_path,
        threshold=arguments.posDistThr,
        query_features=arguments.query_input_features_dir,
        index_features=arguments.index_input_features_dir,
        config=arguments.config_path,
        full=arguments.full,
    )
    for fact in found.facts:
        say(fact)
    for remark in found.remarks:
        say(f"note: {remark}")
    for problem in found.problems:
        say(f"problem: {problem}")
    if found.sound:
        say("Done. No problems")
        _say_run(
            index=arguments.index_file_path,
            queries=arguments.query_file_path,
            ground_truth=arguments.ground_truth_path,
            dataset_root_dir=arguments.dataset_root_dir,
        )
        return 0
    say(f"Problems: {len(found.problems)}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
