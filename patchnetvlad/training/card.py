# SPDX-License-Identifier: MIT
"""Model cards: the data and settings behind a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from patchnetvlad.base.files import digest, file_sha256, replace_text
from patchnetvlad.version import __version__

Facts = dict[str, object]
"""Rows of the card's table."""


def write_card(
    checkpoint: Path, how: str, facts: Facts, recalls: Mapping[int, float] | None = None
) -> Path:
    """Write the model card of a checkpoint next to it, with its SHA-256.

    Parameters
    ----------
    checkpoint : Path
        ``name.pth.tar`` or ``name.safetensors``; the page is ``name.md``.
    how : str
        A sentence on how it was made.
    facts : dict of str to object
        Data and settings.
    recalls : mapping of int to float, optional
        Recall@N of NetVLAD, by N, between 0 and 1.

    Returns
    -------
    Path
        The page.

    Raises
    ------
    OutputError
        It cannot be written.
    """
    name = checkpoint.name.removesuffix(".pth.tar").removesuffix(".safetensors")
    page = checkpoint.with_name(f"{name}.md")
    lines = [f"# {name}\n\n", f"{how}\n\n", "| what | value |\n", "|---|---|\n"]
    lines += [f"| {key} | {value} |\n" for key, value in facts.items()]
    lines.append(f"| made by | patchnetvlad {__version__} |\n")
    if recalls is not None:
        lines += ["\nNetVLAD, without re-ranking:\n\n", "| N | recall@N |\n", "|---|---|\n"]
        lines += [f"| {n} | {value:.4f} |\n" for n, value in recalls.items()]
    else:
        lines.append("\nIts recalls were not measured: patchnetvlad-feature-match does.\n")
    lines.append(f"\nsha256 of {checkpoint.name}: {file_sha256(checkpoint)}\n")
    replace_text(page, lines)
    return page


def images_digest(names: Sequence[Path | str]) -> str:
    """Return the SHA-256 of the names of images, which shows that two lists are the same."""
    return digest(str(name) for name in names)
