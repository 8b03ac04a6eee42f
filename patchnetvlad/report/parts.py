# SPDX-License-Identifier: MIT
"""Parts of pages: the head, tables, data for scripts, and filling of templates."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.plots.drawing import METHODS, SEQUENCE

DASH = "&#8211;"
Interval = tuple[float, float]
_STYLE = Path(__file__).with_name("template.css")
_HEAD = """<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>{style}</style>"""


def json_block(content: Any) -> str:
    """Return JSON text that is safe in a script element: ASCII without ``<``, ``>``, ``&``."""
    text = json.dumps(content, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def page_head(title: str, script: str) -> str:
    """Return the head of a page, whose security policy lets in its script and style alone.

    Parameters
    ----------
    title : str
        Text.
    script : str
        JavaScript that the page holds.

    Returns
    -------
    str
        HTML, with the style.
    """
    style = _STYLE.read_text(encoding="utf-8")
    # After the name that the style has for it.
    for method, colour in {**METHODS, "Sequence": SEQUENCE}.items():
        style = style.replace(f"/* {method} */", colour)
    policy = "; ".join(
        [
            "default-src 'none'",
            "img-src data:",
            f"script-src '{_hash(script)}'",
            f"style-src '{_hash(style)}'",
            "base-uri 'none'",
            "form-action 'none'",
        ]
    )
    return _HEAD.format(title=escape(title), policy=escape(policy), style=style)


def _hash(text: str) -> str:
    """Return what a content security policy names an inline element by."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def fill(template: str, parts: Mapping[str, str], blocks: Mapping[str, str]) -> Iterator[bytes]:
    """Yield a page in pieces: a template with ``{{names}}`` of parts, and ``{{blocks}}`` of JSON.

    Parameters
    ----------
    template : str
    parts : mapping of str to str
        HTML by name.
    blocks : mapping of str to str
        Of :func:`json_block`, by the id of its element.

    Yields
    ------
    bytes
    """
    for text in re.split(r"(\{\{\w+\}\})", template):
        if text == "{{blocks}}":
            for name, block in blocks.items():
                yield f'<script type="application/json" id="{name}">{block}</script>\n'.encode()
        elif text.startswith("{{"):
            # Paths may hold bytes that are no text.
            yield parts[text[2:-2]].encode(errors="replace")
        else:
            yield text.encode()


def section(name: str, title: str, body: str) -> str:
    """Return a section with a heading; nothing without a body."""
    if not body:
        return ""
    heading = f'<h2 id="{name}-title">{title}</h2>'
    return f'<section aria-labelledby="{name}-title">{heading}{body}</section>'


def percent(share: float) -> str:
    """Return a share in per cent."""
    return f"{100 * share:.1f} %"


def small(interval: Interval | NDArray[np.float64] | None) -> str:
    """Return the ends of an interval of shares as a small line in per cent; nothing for None."""
    if interval is None:
        return ""
    return f"<small>{100 * interval[0]:.1f}{DASH}{100 * interval[1]:.1f}</small>"


def table(caption: str, head: Sequence[str], rows: Sequence[str]) -> str:
    """Return a table of numbers; in narrow windows each row is a block, and cells name theirs."""
    columns = "".join(f'<th role="columnheader" scope="col">{name}</th>' for name in head)
    return (
        f'<table class="numbers" role="table"><caption>{caption}</caption><thead role="rowgroup">'
        f'<tr role="row">{columns}</tr></thead><tbody role="rowgroup">{"".join(rows)}</tbody>'
        "</table>"
    )


def row(name: str, cells: str) -> str:
    """Return a row of a table: its name and its cells, as HTML."""
    return f'<tr role="row"><th role="rowheader" scope="row">{name}</th>{cells}</tr>'


def cell(column: str, text: str) -> str:
    """Return a cell under the name of its column; the text is HTML."""
    return f'<td role="cell" data-label="{escape(column)}">{text}</td>'
