# SPDX-License-Identifier: MIT
"""Drawing results on a frame."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageColor, ImageDraw, ImageFont

from patchnetvlad.live.loop import Recognition
from patchnetvlad.places.match import Match
from patchnetvlad.plots.drawing import COLOURS
from patchnetvlad.plots.spread import MAX_LINES, spread_out

WHITE, GREY, SURE, UNSURE, LOST = "#FFFFFF", "#C8C8C8", "#4DD9A5", "#FFB84D", "#B00020"
_DIM = 0.25  # brightness that is left below text
_BETWEEN = "   "

# Of systems, for names that matplotlib's font lacks characters of.
_OTHER_FONTS = (
    "Noto Sans CJK JP", "Noto Sans CJK SC", "Source Han Sans", "WenQuanYi Zen Hei",
    "Droid Sans Fallback", "Hiragino Sans", "Arial Unicode MS", "Yu Gothic", "Microsoft YaHei",
    "Malgun Gothic", "Noto Sans",
)  # fmt: skip


def draw_overlay(
    image: NDArray[np.uint8],
    recognition: Recognition,
    *,
    thumbnail: NDArray[np.uint8] | None = None,
    matches: bool = False,
) -> NDArray[np.uint8]:
    """Draw what was recognised on a copy of a frame.

    Parameters
    ----------
    image : ndarray [H, W, 3] of uint8
        RGB; the frame, or the last one there was while a camera is lost.
    recognition : Recognition
    thumbnail : ndarray [h, w, 3] of uint8, optional
        The reference image of the best place.
    matches : bool, default False
        Draw lines between some matched patches of the frame and the thumbnail, where there are.

    Returns
    -------
    ndarray [H, W, 3] of uint8
        RGB. Text and thumbnail scale with the frame. The headline is the answer's name: green where
        its score reaches the threshold, amber and "unsure" where it does not, and white without a
        threshold.
    """
    height, width = image.shape[:2]
    size = round(max(11, min(height / 27, width / 34)))
    gap = max(4, size // 2)
    line = round(1.35 * size)
    colour = {True: SURE, False: UNSURE, None: WHITE}[recognition.sure]
    canvas = image.copy()
    if recognition.lost:
        canvas = cv2.convertScaleAbs(canvas, alpha=_DIM)

    room = width - 2 * gap
    lines = _lines(recognition, lambda text: _font(size, False, text)[0].getlength(text) <= room)
    top = max(0, height - len(lines) * line - 2 * gap) if lines else height
    if lines:
        canvas[top:] = cv2.convertScaleAbs(canvas[top:], alpha=_DIM)

    if thumbnail is not None and recognition.places:
        share = 0.4 if matches else 0.3
        box = _thumbnail_box(thumbnail, share * width, width, top - gap, gap)
        if box is not None:
            _paste(canvas, thumbnail, box, colour, border=max(1, size // 8))
            if matches and recognition.match is not None:
                # None behind the text.
                canvas[:top] = _with_lines(canvas, recognition.match, box)[:top]

    rate = f"{recognition.fps:.1f} frames/s" if recognition.fps else ""
    rate_font, rate_text = _font(round(0.8 * size), False, rate)
    pill = (0, 0)
    if rate:
        pill = (int(rate_font.getlength(rate_text)) + 2 * gap, line + gap // 2)
        ground = cv2.convertScaleAbs(image[: pill[1], : pill[0]], alpha=_DIM)
        canvas[: pill[1], : pill[0]] = ground  # of the frame itself, without lines

    picture = Image.fromarray(canvas)
    draw = ImageDraw.Draw(picture)
    if rate:
        draw.text((gap, pill[1] // 2), rate_text, WHITE, rate_font, anchor="lm")
    y = top + gap + line // 2
    for i, (words, name) in enumerate(lines):
        font, text = _fitted(words, name, size, i == 0, room)
        draw.text((gap, y), text, (colour, WHITE, GREY)[min(i, 2)], font, anchor="lm")
        y += line
    if recognition.lost:
        _draw_banner(
            draw, f"Camera lost for {recognition.lost:.0f} s, trying again", width, height, size
        )
    return np.asarray(picture)


def _lines(recognition: Recognition, fits: Callable[[str], bool]) -> list[tuple[str, str]]:
    """Return the lines of text at the bottom: words, and a name that may be shortened.

    Of what is known of the answer, as much is said as ``fits`` on a line.
    """
    if recognition.frame is None:
        return []
    if recognition.kept:
        return [("Kept as the reference", "")]
    if not recognition.places:
        return [("There are no places", "")]
    best = recognition.places[0]
    facts = [f"score {recognition.score:.3f}"]
    if recognition.sure is False:
        facts[:0] = ["unsure"]
        if recognition.threshold is not None and recognition.score < recognition.threshold:
            facts[1] += f", below {recognition.threshold:.3f}"
    if recognition.confidence == recognition.confidence:  # not nan
        facts.append(f"confidence {100 * recognition.confidence:.0f} %")
    if recognition.inliers is not None:
        facts.append(f"{recognition.inliers} patches agree")
    facts.append(f"similarity {recognition.similarity:.2f}")
    while len(facts) > 1 and not fits(_BETWEEN.join(facts)):
        facts.pop()
    lines = [("", best.key), (_BETWEEN.join(facts), "")]
    return lines + [(f"{p.rank}.  {p.score:.3f}  ", p.key) for p in recognition.places[1:]]


def _thumbnail_box(
    thumbnail: NDArray[np.uint8], room: float, width: int, bottom: int, gap: int
) -> tuple[int, int, int, int] | None:
    """Return where the thumbnail goes: left, top, width, height; None if there is no room."""
    h, w = thumbnail.shape[:2]
    scale = min(room / w, (bottom - gap) / h, 0.45 * bottom / h)
    w, h = round(scale * w), round(scale * h)
    return (width - gap - w, gap, w, h) if min(w, h) >= 16 else None


def _paste(
    canvas: NDArray[np.uint8],
    thumbnail: NDArray[np.uint8],
    box: tuple[int, int, int, int],
    colour: str,
    border: int,
) -> None:
    x, y, w, h = box
    rgb = ImageColor.getrgb(colour)
    cv2.rectangle(
        canvas, (x - border, y - border), (x + w + border - 1, y + h + border - 1), rgb, -1
    )
    canvas[y : y + h, x : x + w] = cv2.resize(thumbnail, (w, h), interpolation=cv2.INTER_AREA)


def _with_lines(
    canvas: NDArray[np.uint8], match: Match, box: tuple[int, int, int, int]
) -> NDArray[np.uint8]:
    """Connect matched patches of the frame and of the thumbnail in a box, translucently."""
    under, canvas = canvas, canvas.copy()
    x, y, w, h = box
    thick = max(1, round(min(canvas.shape[:2]) / 260))
    ends = []
    for image, area in (
        (match.query.image, (0, 0, canvas.shape[1], canvas.shape[0])),
        (match.candidate.image, (x, y, w, h)),
    ):
        ends.append((np.array(area[2:]) / image.shape[1::-1], np.array(area[:2])))
    few = spread_out([np.hstack(keypoints) for keypoints in match.inliers], MAX_LINES)
    for s, (keypoints, chosen) in enumerate(zip(match.inliers, few, strict=True)):
        points = [
            np.round(k[chosen] * factor + offset).astype(np.int32)
            for k, (factor, offset) in zip(keypoints, ends, strict=True)
        ]
        rgb = ImageColor.getrgb(COLOURS[s % len(COLOURS)])
        paths = list(np.stack(points, axis=1))  # [2, 2] each
        cv2.polylines(canvas, paths, False, (0, 0, 0), 2 * thick, cv2.LINE_AA)  # an edge
        cv2.polylines(canvas, paths, False, rgb, thick, cv2.LINE_AA)
        for point in np.concatenate(points).tolist():
            cv2.circle(canvas, point, 2 * thick, rgb, -1, cv2.LINE_AA)
    return cv2.addWeighted(under, 0.25, canvas, 0.75, 0)


def _draw_banner(draw: ImageDraw.ImageDraw, text: str, width: int, height: int, size: int) -> None:
    font, text = _fitted(text, "", size, True, width)
    middle = height // 2
    draw.rectangle((0, middle - size, width, middle + size), fill=LOST)
    draw.text((width // 2, middle), text, WHITE, font, anchor="mm")


# --- text -----------------------------------------------------------------------------------------


def _fitted(words: str, name: str, size: int, bold: bool, width: float) -> tuple[Any, str]:
    """Return font and text; of a name that is too wide its end, where a file's own name is."""
    font, text = _font(size, bold, words + name)
    if font.getlength(text) <= width or not name:
        return font, text
    name = text[len(words) :]
    fits, too_long = 0, len(name)
    while too_long - fits > 1:
        middle = (fits + too_long) // 2
        if font.getlength(f"{words}…{name[-middle:]}") <= width:
            fits = middle
        else:
            too_long = middle
    end = name[len(name) - fits :]
    _, slash, rest = end.partition("/")
    return font, f"{words}…{slash + rest if rest else end}"


def _font(size: int, bold: bool, text: str) -> tuple[Any, str]:
    """Return a font that has the characters of a text, and the text, others written as codes."""
    own = _own_font(bold)
    wanted = {ord(c) for c in text}
    path = own
    if wanted - _characters(own):
        path = max([own, *_other_fonts()], key=lambda file: len(wanted & _characters(file)))
        known = _characters(path)
        text = "".join(c if ord(c) in known else c.encode("unicode_escape").decode() for c in text)
    return _loaded(path, size), text


@lru_cache(maxsize=64)
def _loaded(path: str, size: int) -> Any:
    return ImageFont.truetype(path, size)


@lru_cache(maxsize=16)
def _characters(path: str) -> frozenset[int]:
    from matplotlib.ft2font import FT2Font

    return frozenset(FT2Font(path).get_charmap())


@lru_cache(maxsize=2)
def _own_font(bold: bool) -> str:
    import matplotlib

    name = "DejaVuSans-Bold.ttf" if bold else "DejaVuSans.ttf"
    return str(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / name)


@lru_cache(maxsize=1)
def _other_fonts() -> tuple[str, ...]:
    from matplotlib.font_manager import fontManager

    files = {entry.name: entry.fname for entry in reversed(fontManager.ttflist)}
    return tuple(files[name] for name in _OTHER_FONTS if name in files)
