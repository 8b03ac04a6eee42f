# SPDX-License-Identifier: MIT
"""What all targets of the fuzzer have in common: damage, and what an error must be like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from hypothesis import strategies as st

from patchnetvlad.errors import PatchNetVLADError

MOST_LINES = 2
MOST_CHARACTERS = 2000


class Target(NamedTuple):
    """A parser, and what it is fed.

    Attributes
    ----------
    contents : strategy
    suffix : str
        Of the file's name.
    read : function of a path
    write : function of a path and a content, default Path.write_bytes
        Writes what is read; a folder, perhaps.
    """

    contents: st.SearchStrategy[Any]
    suffix: str
    read: Callable[[Path], object]
    write: Callable[[Path, Any], object] = Path.write_bytes


def check_message(error: PatchNetVLADError, path: Path) -> None:
    message = str(error)
    assert path.name in message, message
    check_length(message.replace(str(path), ""))


def check_length(message: str) -> None:
    assert message.count("\n") < MOST_LINES, message
    assert len(message) < MOST_CHARACTERS, message


def use_all(path: Path, uses: Iterable[Callable[[Path], object]]) -> None:
    """Read a thing in several ways, each of which may refuse it; raise the last refusal."""
    refused = None
    for use in uses:
        try:
            use(path)
        except PatchNetVLADError as error:
            check_message(error, path)
            refused = error
    if refused is not None:
        raise refused


@st.composite
def damaged(
    draw: st.DrawFn, contents: st.SearchStrategy[bytes], times: Sequence[int] = (0, 0, 0, 1, 3)
) -> bytes:
    """Change a few places of a file, most of the time none."""
    content = draw(contents)
    for _ in range(draw(st.sampled_from(times))):
        start = draw(st.integers(0, len(content)))
        end = min(len(content), start + draw(st.sampled_from([0, 1, 4, 100, 10**9])))
        content = content[:start] + draw(st.binary(max_size=8)) + content[end:]
    return content
