# SPDX-License-Identifier: MIT
"""Numbers and lists as people read them."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 5
"""Names that a message shows of many."""


def format_bytes(count: float) -> str:
    """Write a number of bytes in a readable unit of powers of 1000.

    Examples
    --------
    >>> format_bytes(23_200_000)
    '23.2 MB'
    """
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def some(names: Sequence[str], mark: str = ", ") -> str:
    """Write the first few of many names, and how many more there are.

    Examples
    --------
    >>> some(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e, and 2 more'
    """
    more = f"{mark}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{mark.join(names[:SHOWN])}{more}"
