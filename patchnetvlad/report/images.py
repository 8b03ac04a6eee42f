# SPDX-License-Identifier: MIT
"""Pictures that fit into a page: small ones of all images, and larger ones if there is room.

How many bytes a picture takes is known only when it is encoded. So the size and quality of the
small ones are chosen by a sample, and lowered when all are encoded and too large after all.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path

from PIL import Image, features

from patchnetvlad.base.device import count_cpus
from patchnetvlad.datasets.images import load_reduced
from patchnetvlad.errors import ImageError


@dataclass(frozen=True)
class Level:
    """Size of a picture: px of its longer side, and quality from 1 to 100."""

    side: int
    quality: int

    def __str__(self) -> str:
        return f"{self.side} px, quality {self.quality}"


SMALL = (Level(192, 68), Level(160, 62), Level(128, 56), Level(104, 50), Level(84, 42),
         Level(64, 34), Level(48, 25))  # fmt: skip
LARGE = (Level(480, 70), Level(400, 64), Level(320, 56))
SMALL_SHARE = 0.55
"""Share of the room that small pictures may take, unless even the smallest need more."""

_SAMPLE = 48
_OVERHEAD = 3  # quotes and comma a picture, in JSON


@dataclass(frozen=True, eq=False)
class Pictures:
    """Pictures of images, as base64 text.

    Attributes
    ----------
    media_type : str
        ``image/webp`` or ``image/jpeg``.
    small : list of str or None
        One an image; None for one that cannot be read or for which there is no room.
    ratios : list of float or None
        Width over height of each image; None where it cannot be read.
    large : dict of int to str
        By image.
    small_level, large_level : Level or None
        How they were made; None where there are none.
    broken : dict of int to str
        Images that cannot be read, and why.
    left_out : int
        Images without a small picture for lack of room.
    """

    media_type: str
    small: list[str | None]
    ratios: list[float | None]
    large: dict[int, str] = field(default_factory=dict)
    small_level: Level | None = None
    large_level: Level | None = None
    broken: dict[int, str] = field(default_factory=dict)
    left_out: int = 0


def make_pictures(
    paths: Sequence[Path | str],
    wanted_large: Sequence[int],
    room: int,
    *,
    progress: bool = True,
) -> Pictures:
    """Encode small and large pictures of images, within a limit of bytes of text.

    Parameters
    ----------
    paths : sequence of Path or str
        The images, by file or URL, the more important ones first: where there is no room even for
        the smallest pictures of all, the last go without.
    wanted_large : sequence of int
        Images that are worth a larger picture, in the order of their worth.
    room : int
        Bytes.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    Pictures
    """
    kind = "WEBP" if features.check("webp") else "JPEG"
    pictures = Pictures(f"image/{kind.lower()}", [None] * len(paths), [None] * len(paths))
    with ThreadPoolExecutor(min(16, count_cpus()), "picture") as pool:
        maker = _Maker(paths, kind, pool, progress)
        sizes = maker.sample_sizes()
        if not sizes:  # not one can be read
            maker.all(range(len(paths)), SMALL[-1], "Reading images")
            return replace(pictures, broken=maker.broken)
        share = SMALL_SHARE if wanted_large else 1.0
        level = next(
            (level for level in SMALL if sizes[level] * len(paths) <= share * room), SMALL[-1]
        )
        while True:
            made = maker.all(range(len(paths)), level, "Small pictures")
            total = sum(len(text) + _OVERHEAD for text, _ in made.values())
            if total <= room or level == SMALL[-1]:
                break
            level = SMALL[SMALL.index(level) + 1]
        used = left_out = 0
        for i, (text, ratio) in made.items():  # in the order of the paths
            pictures.ratios[i] = ratio
            if used + len(text) + _OVERHEAD > room:
                left_out += 1
                continue
            used += len(text) + _OVERHEAD
            pictures.small[i] = text
        readable = [i for i in dict.fromkeys(wanted_large) if i not in maker.broken]
        large_level = next(
            (level for level in LARGE if sizes[level] * len(readable) <= 0.95 * (room - used)),
            LARGE[-1],
        )
        fit = min(len(readable), int((room - used) / sizes[large_level]))
        large = maker.up_to(readable, large_level, room - used, "Large pictures", fit)
    return replace(
        pictures,
        large=large,
        small_level=level,
        large_level=large_level if large else None,
        broken=maker.broken,
        left_out=left_out,
    )


class _Maker:
    """Decodes and encodes in threads; Pillow lets go of the interpreter's lock meanwhile."""

    def __init__(
        self, paths: Sequence[Path | str], kind: str, pool: ThreadPoolExecutor, progress: bool
    ) -> None:
        self.paths = paths
        self.kind = kind
        self.pool = pool
        self.progress = progress
        self.broken: dict[int, str] = {}

    def sample_sizes(self) -> dict[Level, float]:
        """Return the mean bytes of text a picture at each level; empty if none can be read."""
        step = max(1, len(self.paths) // _SAMPLE)

        def measure(path: Path | str) -> list[int] | None:
            try:
                image = load_reduced(path, LARGE[0].side)
            except (ImageError, OSError, ValueError):
                return None
            return [len(self._encode(image, level)) + _OVERHEAD for level in SMALL + LARGE]

        measured = [row for row in self.pool.map(measure, self.paths[::step]) if row]
        if not measured:
            return {}
        means = (sum(column) / len(measured) for column in zip(*measured, strict=True))
        return dict(zip(SMALL + LARGE, means, strict=True))

    def all(self, images: Sequence[int], level: Level, what: str) -> dict[int, tuple[str, float]]:
        """Encode images; gives text and width over height of those that can be read."""
        return dict(self._each(images, level, what))

    def up_to(
        self, images: Sequence[int], level: Level, room: int, what: str, expected: int
    ) -> dict[int, str]:
        """Encode images in their order, as long as there is room."""
        found: dict[int, str] = {}
        used = 0
        for i, (text, _) in self._each(images, level, what, expected):
            used += len(text) + _OVERHEAD
            if used > room:
                break
            found[i] = text
        return found

    def _each(
        self, images: Sequence[int], level: Level, what: str, expected: int | None = None
    ) -> Iterator[tuple[int, tuple[str, float]]]:
        from tqdm import tqdm

        def make(i: int) -> tuple[str, float] | str:
            try:
                image = load_reduced(self.paths[i], level.side)
            except (ImageError, OSError, ValueError) as error:
                return str(error)
            return self._encode(image, level), image.width / image.height

        todo = iter(images)
        with tqdm(
            total=expected or len(images), desc=what, unit="image", disable=not self.progress
        ) as bar:
            while batch := list(islice(todo, 256)):  # who stops early has done little too much
                for i, made in zip(batch, self.pool.map(make, batch), strict=True):
                    bar.update()
                    if isinstance(made, str):
                        self.broken[i] = made
                    else:
                        yield i, made

    def _encode(self, image: Image.Image, level: Level) -> str:
        if max(image.size) > level.side:
            image = image.copy()
            image.thumbnail((level.side, level.side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        content = io.BytesIO()
        if self.kind == "WEBP":
            image.save(content, "WEBP", quality=level.quality, method=4)
        else:
            image.save(content, "JPEG", quality=level.quality, optimize=True)
        return base64.b64encode(content.getvalue()).decode("ascii")
