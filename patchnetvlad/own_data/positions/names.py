# SPDX-License-Identifier: MIT
"""Positions from file names, frame numbers and the order of a list."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from patchnetvlad.datasets.ground_truth import CLIP_DISTANCE
from patchnetvlad.errors import ConfigError
from patchnetvlad.own_data.positions.base import Positions, number_of, unknown

FRAME_PATTERN = (
    r"(?i)(?:^|/)(?P<clip>[^/]*?)(?:[_\-. ]*(?:frame|image|img))?[_\-. ]*(?P<frame>[0-9]+)\.[^./]+$"
)
"""Clip and frame number in a name such as ``floor1/hall_frame_000012.jpg``: "hall" and 12."""


def positions_from_names(names: Sequence[str]) -> Positions:
    """Read UTM coordinates from names such as ``@0544822@4179498@10@S@...@.jpg``.

    The fields between the @ of a file's name are easting, northing (metres), zone number, zone
    letter, latitude, longitude, pano id, tile, heading (degrees), pitch, roll, height, timestamp
    and note. All fields after the northing may be empty or absent.

    Parameters
    ----------
    names : sequence of n str

    Returns
    -------
    Positions
        In metres; NaN for names without easting and northing.

    Examples
    --------
    >>> found = positions_from_names(["map/@0544822@4179498@10@S@37.76@@@@90@.jpg", "other.jpg"])
    >>> found.values.tolist(), found.zones
    ([[544822.0, 4179498.0], [nan, nan]], ('10N', ''))
    """
    values = np.full((len(names), 2), np.nan)
    headings, zones = unknown(len(names)), []
    for i, name in enumerate(names):
        fields = name.rsplit("/", 1)[-1].split("@")[1:]
        fields += [""] * (9 - len(fields))
        values[i] = [number_of(field) for field in fields[:2]]
        headings[i] = number_of(fields[8])
        zones.append(parse_zone(fields[2] + fields[3], values[i, 1], number_of(fields[4])))
    values[~np.isfinite(values).all(axis=1)] = np.nan
    return Positions(values, "metres", headings, tuple(zones))


def parse_zone(text: str, northing: float = math.nan, latitude: float = math.nan) -> str:
    """Read a UTM zone: a number, and the letter of a latitude band or of a hemisphere.

    Parameters
    ----------
    text : str
        Such as ``10S``, ``32 n`` or ``56``.
    northing : float, optional
        Metres. It tells the band S (32 to 40 degrees north) from the southern hemisphere.
    latitude : float, optional
        Degrees. If it is known, it decides the hemisphere.

    Returns
    -------
    str
        The number and N or S, or ``?`` where nothing tells the hemisphere; empty if there is no
        zone in the text.

    Examples
    --------
    >>> parse_zone("32 n"), parse_zone("10S", northing=4179498.0), parse_zone("56S", latitude=-33.9)
    ('32N', '10N', '56S')
    """
    match = re.fullmatch(r"\s*([0-9]{1,2})\s*([A-Za-z]?).*", text, re.DOTALL)
    if match is None or not 1 <= int(match[1]) <= 60:
        return ""
    letter = match[2].upper()
    if math.isfinite(latitude):
        north = latitude >= 0
    elif letter == "S":
        north = not math.isfinite(northing) or 3.5e6 < northing < 4.5e6
    elif not letter:
        return f"{int(match[1])}?"
    else:
        north = letter >= "N"
    return f"{int(match[1])}{'N' if north else 'S'}"


def positions_from_frames(names: Sequence[str], pattern: str | None = None) -> Positions:
    """Read clip and frame number from names; the position is (1000 x clip, frame number).

    Parameters
    ----------
    names : sequence of n str
        Names of all clips, which are numbered in sorted order, from 0.
    pattern : str, optional
        Regular expression that is searched in each name, with a group ``frame`` of digits and, if
        there is more than one clip, a group ``clip``. The default takes the number at the end of
        the file's name as the frame, and the text before it, without the folders and without a
        word like ``frame``, as the clip.

    Returns
    -------
    Positions
        In frames; NaN for names that the pattern does not match.

    Raises
    ------
    ConfigError
        The pattern is not a regular expression, or has no group ``frame``.

    Examples
    --------
    >>> positions_from_frames(["hall_left_frame_12.jpg", "stairs_frame_7.jpg"]).values.tolist()
    [[0.0, 12.0], [1000.0, 7.0]]
    """
    search = compile_pattern(pattern or FRAME_PATTERN, "frame_pattern")
    if "frame" not in search.groupindex:
        raise ConfigError(
            f"the frame pattern {pattern!r} has no group named frame; write for example "
            r"'(?P<clip>\w+)/(?P<frame>\d+)'"
        )
    has_clip = "clip" in search.groupindex
    found: list[tuple[str, float]] = []
    for name in names:
        match = search.search(name)
        frame = number_of(match["frame"] or "") if match else math.nan
        found.append(((match["clip"] or "") if match and has_clip else "", frame))
    clips = sorted({clip for clip, frame in found if math.isfinite(frame)})
    number = {clip: CLIP_DISTANCE * i for i, clip in enumerate(clips)}
    values = np.array(
        [[number[clip] if math.isfinite(frame) else math.nan, frame] for clip, frame in found]
    ).reshape(-1, 2)
    shown = ", ".join(clip or "(no name)" for clip in clips[:5]) + ", ..." * (len(clips) > 5)
    notes = [f"clips: {len(clips)} ({shown})"] if clips else []
    return Positions(
        values,
        "frames",
        unknown(len(names)),
        sequences=tuple(clip for clip, _ in found),
        notes=tuple(notes),
    )


def positions_from_order(count: int) -> Positions:
    """Return the row of each image in its list, from 0, as its frame number: (0, row)."""
    values = np.stack([np.zeros(count), np.arange(count, dtype=np.float64)], axis=1)
    return Positions(values, "frames", unknown(count))


def compile_pattern(pattern: str, what: str) -> re.Pattern[str]:
    """Compile the regular expression of the option ``what``; ConfigError if it is not one."""
    try:
        return re.compile(pattern)
    except (re.error, OverflowError, RecursionError) as error:
        raise ConfigError(f"{what} = {pattern!r} is not a regular expression: {error}") from None
