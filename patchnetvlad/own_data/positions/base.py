# SPDX-License-Identifier: MIT
"""Positions of images, and code shared by their readers."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError

KINDS = ("latlon", "metres", "frames")
_SHOWN, _LONGEST = 20, 60  # names in a message, and their characters


@dataclass(frozen=True, eq=False)
class Positions:
    """Where n images were taken, in the terms of the source.

    Attributes
    ----------
    values : ndarray [n, 2] of float64
        (latitude, longitude) in degrees, (x, y) in metres, or (1000 x clip, frame number); NaN
        where it is not known.
    kind : {"latlon", "metres", "frames"}
    headings : ndarray [n] of float64
        Degrees, clockwise from north where the source says so; NaN where they are not known.
    zones : tuple of n str
        UTM zone and hemisphere of positions in metres, such as ``32N``; empty where not known.
    sequences : tuple of n str
        The clip of each image; empty if the source knows none.
    notes : tuple of str
        Notes for the user.
    """

    values: NDArray[np.float64]
    kind: str
    headings: NDArray[np.float64]
    zones: tuple[str, ...] = ()
    sequences: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    @property
    def known(self) -> NDArray[np.bool_]:
        """Which images have a position, [n]."""
        return np.asarray(np.isfinite(self.values).all(axis=1))

    def take(self, rows: NDArray[np.int64] | slice) -> Positions:
        """Return the positions of some of the images, without the notes."""
        which = np.arange(len(self))[rows]
        return Positions(
            self.values[which],
            self.kind,
            self.headings[which],
            tuple(self.zones[i] for i in which) if self.zones else (),
            tuple(self.sequences[i] for i in which) if self.sequences else (),
        )


def unknown(count: int) -> NDArray[np.float64]:
    """Return an array [count] of NaN."""
    return np.full(count, np.nan)


def utc_offset(text: str) -> float:
    """Return the seconds of ``+02:00``; 0 for anything else."""
    match = re.fullmatch(r"([+-])(\d\d):?(\d\d)", text.strip())
    if match is None:
        return 0.0
    return (-1 if match[1] == "-" else 1) * (int(match[2]) * 3600.0 + int(match[3]) * 60.0)


def number_of(text: str) -> float:
    """Return a finite number; NaN for any other text."""
    try:
        value = float(text)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) and "_" not in text else math.nan


_AMOUNT = r"([0-9]+(?:[.,][0-9]+)?)"
_PRIMES = "[\u2032\u2019\u00b4]"
_ANGLE = re.compile(
    rf"""([NSEWO])?\s*([-+])?\s*{_AMOUNT}\s*(?:°|º|˚|deg(?:rees)?\b|d\b|:|\s|$)?\s*
    (?:{_AMOUNT}\s*(?:'(?!')|{_PRIMES}|min\b|m\b|:|\s|$)\s*
    (?:{_AMOUNT}\s*(?:"|″|”|''|{_PRIMES}{{2}}|sec\b|s\b)?\s*)?)?([NSEWO])?""",
    re.VERBOSE | re.IGNORECASE,
)


def angle_of(text: str, sides: str) -> float:
    """Return degrees of a number, or of degrees, minutes and seconds; NaN for any other text.

    Parameters
    ----------
    text : str
        Such as ``50 deg 30' 2.5" N``, ``50°30.04'N``, ``S 50.5`` or ``-50.5``.
    sides : {"NS", "EW"}
        The letters of the positive and the negative side.

    Returns
    -------
    float

    Examples
    --------
    >>> angle_of("50 deg 30' 36.00\\" S", "NS"), angle_of("8.25", "EW"), angle_of("8 E", "NS")
    (-50.51, 8.25, nan)
    """
    if not math.isnan(value := number_of(text)):
        return value
    match = _ANGLE.fullmatch(text.strip())
    if match is None:
        return math.nan
    before, sign, *parts, after = match.groups()
    side = (before or after or "").upper().replace("O", "W")  # ouest, oeste, ovest
    numbers = [float((part or "0").replace(",", ".")) for part in parts]
    if (before and after) or side not in ("", *sides) or (sign and side) or max(numbers[1:]) >= 60:
        return math.nan
    degrees = numbers[0] + numbers[1] / 60 + numbers[2] / 3600
    return -degrees if sign == "-" or side == sides[1] else degrees


def check_degrees(latitude: float, longitude: float, where: str) -> None:
    """Raise GroundTruthError unless NaN or degrees of latitude and longitude."""
    if abs(latitude) > 90 or not (math.isnan(longitude) or -180 <= longitude <= 360):
        raise GroundTruthError(
            f"{where}: latitude {latitude:g}, longitude {longitude:g} is not a place on earth; are "
            "the two mixed up, or are they metres (columns x and y)?"
        )


def short(text: str) -> str:
    """Return a text on one line, cut if it is very long."""
    text = " ".join(text.split())  # a quoted cell may hold line ends
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..."


def few(names: Sequence[str]) -> str:
    """Return the first names of a list, shortened, as a text."""
    more = ", ..." if len(names) > _SHOWN else ""
    return ", ".join(map(short, names[:_SHOWN])) + more


def read_bytes(file: Path) -> bytes:
    """Read a file; GroundTruthError if it cannot be read."""
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise GroundTruthError(f"there is no file of positions {file}") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise GroundTruthError(f"{file} cannot be read: {reason}") from None


def read_text(file: Path) -> str:
    """Read a text in UTF-8 or UTF-16; GroundTruthError if it is neither."""
    raw = read_bytes(file)
    encoding = "utf-16" if raw.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig"
    try:
        text = raw.decode(encoding)
    except UnicodeDecodeError as error:
        raise GroundTruthError(f"{file} is not a text file in UTF-8 (byte {error.start})") from None
    if "\0" in text:
        raise GroundTruthError(f"{file} is not a text file")
    return text.replace("\r\n", "\n")
