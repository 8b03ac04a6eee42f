# SPDX-License-Identifier: MIT
"""A match in words: how many patches agree, and what is typical."""

from __future__ import annotations

from patchnetvlad.evaluation.usual import Spread, known_usual
from patchnetvlad.places.match import Match


def agreement(match: Match) -> str:
    """Say how many patches of two images agree, and what is usual of right and wrong pairs.

    Parameters
    ----------
    match : Match

    Returns
    -------
    str
        Two lines or more.
    """
    counts = [
        f"{len(found.query_patches)} of {len(grid)} of size {grid.patch_size}"
        for found, grid in zip(match.matches, match.query.grids, strict=True)
    ]
    said = f"Patches that agree: {', '.join(counts)}."
    known = known_usual(match.query.config, match.query.checkpoint)
    if not known:
        return (
            f"{said}\nWhat is usual for right and wrong pairs is not known of these weights and "
            "settings: patchnetvlad-report measures it on data with ground truth."
        )
    lines = [said]
    for usual in known:
        lines.append(f"Usual on {usual.source}:")
        lines += [_line("right", usual.right), _line("wrong", usual.best_wrong)]
    return "\n".join(filter(None, lines))


def _line(kind: str, spread: Spread | None) -> str:
    if spread is None:
        return ""
    patches = ", ".join(f"{low:.0f} to {high:.0f}" for low, _, high in spread.patches)
    low, _, high = spread.score
    what = f"  {kind} pairs: score {low:.3f} to {high:.3f}"
    return f"{what}, {patches} patches by size." if patches else f"{what}."
