# SPDX-License-Identifier: MIT
"""Readable numbers, lists and JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n", "\uff1d", "\uff0b", "\uff0d", "\uff20")
SHOWN = 5
"""Number of names that a message shows."""


def format_bytes(count: float) -> str:
    """Format a number of bytes with a decimal unit.

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
    """Join the first few of many names, and say how many more there are.

    Examples
    --------
    >>> some(["a", "b", "c", "d", "e", "f", "g"])
    'a, b, c, d, e, and 2 more'
    """
    more = f"{mark}and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return f"{mark.join(names[:SHOWN])}{more}"


def shortened(name: str, longest: int = 40) -> str:
    """Shorten a name to its end if it is longer than a column of a table.

    Examples
    --------
    >>> shortened("seq/1.jpg"), shortened("a/long/way/down/to/1.jpg", longest=12)
    ('seq/1.jpg', '...to/1.jpg')
    """
    return name if len(name) <= longest else f"...{name[4 - longest :]}"


def table_cell(name: str) -> str:
    """Return a name for a CSV cell, in a form that spreadsheets do not read as a formula.

    One that begins with = + - @ or a control character gets ``./`` in front, by which a path stays
    the same.

    Examples
    --------
    >>> table_cell("map/1.jpg"), table_cell("=1+1.jpg"), table_cell("@0544822@4179498@.jpg")
    ('map/1.jpg', './=1+1.jpg', './@0544822@4179498@.jpg')
    """
    return f"./{name}" if name[:1] in _FORMULA else name


def plain_json(value: Any) -> Any:
    """Convert a value to JSON's types; NaN and infinities become None."""
    import numpy as np  # here, because commands that only print help do not need it

    if isinstance(value, Mapping):
        return {str(key): plain_json(item) for key, item in value.items()}
    if isinstance(value, (np.ndarray, np.generic)):
        return plain_json(value.tolist())
    if isinstance(value, (list, tuple)):
        return [plain_json(item) for item in value]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, (str, int)):
        return value
    return str(value)


def json_text(content: Mapping[str, Any]) -> str:
    """Return indented JSON, with each list of numbers on one line."""
    text = json.dumps(content, indent=2, allow_nan=False)
    return re.sub(r'\[\n[^][{}"]*\]', lambda found: " ".join(found[0].split()), text) + "\n"


def one_line(reason: object, longest: int = 250) -> str:
    """Return the message of an error on one line, cut off where it is too long.

    Examples
    --------
    >>> one_line(ValueError("a\\nb")), one_line(ValueError()), one_line("abcdef", longest=3)
    ('a b', 'ValueError', 'abc ...')
    """
    text = " ".join(str(reason).split()) or type(reason).__name__
    return text if len(text) <= longest else f"{text[:longest].rstrip()} ..."


def parse_json(text: str | bytes) -> Any:
    """Parse JSON; ValueError if it is invalid or nested too deeply."""
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("JSON that is nested too deep") from None
