# SPDX-License-Identifier: MIT
"""Convert predictions of kapture to the format of Mapillary SLS."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from patchnetvlad.cli._common import add_debug_argument, command, say


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Convert the file that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m patchnetvlad.training_tools.convert_kapture_to_msls",
        description="Convert predictions in kapture's format to that of Mapillary SLS: a line for "
        "each query, with its key and those of its candidates, best first.",
    )
    parser.add_argument("pairs", metavar="PAIRS", help="such as PatchNetVLAD_predictions.txt")
    parser.add_argument("output", metavar="OUTPUT", help="text file to write")
    add_debug_argument(parser)
    arguments = parser.parse_args(argv)

    from patchnetvlad.base.files import check_inputs_stay
    from patchnetvlad.evaluation.exports import write_msls
    from patchnetvlad.search.candidates import rank_pairs, read_pairs

    pairs, output = Path(arguments.pairs), Path(arguments.output)
    check_inputs_stay([output], [pairs])
    read = read_pairs(pairs)
    queries = list(dict.fromkeys(pair.query for pair in read))
    index = list(dict.fromkeys(pair.candidate for pair in read))
    write_msls(output, queries, index, rank_pairs(pairs, read, queries, index))
    say(f"{output}: {len(queries)} queries")
    return 0
