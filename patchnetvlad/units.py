# SPDX-License-Identifier: MIT
"""Numbers as people read them."""

from __future__ import annotations


def format_bytes(count: float) -> str:
    """Write a number of bytes in a readable unit of powers of 1000."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if count < 100 else f"{count:.0f} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
