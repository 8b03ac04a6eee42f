# SPDX-License-Identifier: MIT
"""The loop: extract the features of each frame, and query the index."""

from __future__ import annotations

import logging
import math
import os
import time
from array import array
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import ArgumentError, ImageError, PatchNetVLADError, SourceError
from patchnetvlad.live.sources import Counts, Frame, Source, open_source
from patchnetvlad.places.answers import Place
from patchnetvlad.places.description import Description
from patchnetvlad.places.index import PlaceIndex
from patchnetvlad.places.match import Match, match
from patchnetvlad.places.model import PlaceModel

logger = logging.getLogger(__name__)

WAIT = 0.5  # s without a frame after which the loop gives word
_FPS_FRAMES = 10  # over which the present frame rate is taken
_MOST_SAID = 5  # broken frames that are reported


@dataclass(frozen=True, eq=False)
class Recognition:
    """What was recognised in one frame, or a note that there is no frame at present.

    Attributes
    ----------
    frame : Frame or None
        None while a camera gives no frame.
    place : Place or None
        The best place; None where none reaches the threshold.
    places : tuple of Place
        The best places, best first, whatever the threshold.
    match : Match or None
        The matched patches of the frame (query) and the best of ``places`` (candidate), where
        they were asked for.
    query : Description or None
        Of the frame.
    latency : float
        s from the frame's arrival to this answer.
    fps : float
        Frames/s of late, the caller's own work between two frames included; 0 at first.
    lost : float
        s for which the camera has been lost; 0 while frames come.
    kept : bool
        The frame was kept as the reference, and not compared.
    threshold : float or None
        Least score of a recognition; None: none was given, so that ``place`` is the best place,
        sure or not.
    min_confidence : float or None
        Least confidence of a recognition, likewise.
    """

    frame: Frame | None
    place: Place | None = None
    places: tuple[Place, ...] = ()
    match: Match | None = None
    query: Description | None = field(default=None, repr=False)
    latency: float = math.nan
    fps: float = 0.0
    lost: float = 0.0
    kept: bool = False
    threshold: float | None = None
    min_confidence: float | None = None

    @property
    def sure(self) -> bool | None:
        """Whether the best place is as good as was asked for; None if nothing was, or without."""
        if (self.threshold is None and self.min_confidence is None) or not self.places:
            return None
        return self.place is not None

    @property
    def confidence(self) -> float:
        """How likely the best of ``places`` is right, 0 to 1, or nan if that is not known."""
        known = self.places[0].confidence if self.places else None
        return math.nan if known is None else known

    @property
    def score(self) -> float:
        """Score of the best of ``places``, whatever the threshold; nan if there is none."""
        return self.places[0].score if self.places else math.nan

    @property
    def similarity(self) -> float:
        """Cosine of the global descriptors of the frame and the best of ``places``, or nan."""
        return 1 - self.places[0].distance ** 2 / 2 if self.places else math.nan

    @property
    def inliers(self) -> int | None:
        """Matched patches of all sizes; None where patches were not matched."""
        if self.match is None:
            return None
        return sum(len(ours) for ours, _ in self.match.inliers)


class KeptFrame:
    """The simplest reference: a single frame, kept until it is replaced.

    Parameters
    ----------
    model : PlaceModel
    threshold : float, optional
        Least score of a recognition.
    rerank : bool, default True
        Match patches; otherwise, and for models without, the score is minus the distance of the
        global descriptors.

    Attributes
    ----------
    description : Description or None
        Of the frame that is kept.
    name : str
    """

    def __init__(
        self, model: PlaceModel, *, threshold: float | None = None, rerank: bool = True
    ) -> None:
        if rerank and model.config.uses_patches:
            model.config.check_matching()
        self.model = model
        self.threshold = threshold
        self.description: Description | None = None
        self.name = ""
        self._rerank = rerank and model.config.uses_patches

    def keep(self, recognition: Recognition) -> bool:
        """Keep the frame of a recognition; False if that has none."""
        if recognition.frame is None or recognition.query is None:
            return False
        self.description = recognition.query
        self.name = recognition.frame.name
        return True

    def image(self, key: str) -> NDArray[np.uint8]:
        """Return the kept frame, [H, W, 3] of uint8, as seen by the network.

        Raises
        ------
        KeyError
            The frame of that name is not kept any more.
        """
        if self.description is None or key != self.name:
            raise KeyError(f"{key!r} is not kept")
        return self.description.image

    def picture(self, key: str) -> NDArray[np.uint8]:
        """Return the kept frame in its original aspect ratio; KeyError as for :meth:`image`."""
        self.image(key)
        assert self.description is not None
        return self.description.picture

    def look_up(self, frame: Frame) -> Recognition:
        """Compare a frame with the one that is kept, or keep it if it is the first."""
        query = self.model.describe(frame.image)
        if self.description is None:
            first = Recognition(frame, query=query, kept=True)
            self.keep(first)
            return first
        distance = float(np.linalg.norm(query.descriptor - self.description.descriptor))
        found = match(query, self.description, device=self.model.device) if self._rerank else None
        score = -distance if found is None else found.score
        best = Place(key=self.name, score=score, position=None, distance=distance, rank=1, row=0)
        enough = self.threshold is None or score >= self.threshold
        place = best if enough else None
        return Recognition(frame, place, (best,), found, query, threshold=self.threshold)


class _Reference(Protocol):
    def look_up(self, frame: Frame) -> Recognition: ...


class _Places:
    """An index as the reference; the options are those of its ``query``."""

    def __init__(
        self,
        index: PlaceIndex,
        matches: bool,
        sequence: Mapping[str, Any] | None,
        **options: Any,
    ) -> None:
        self._index = index
        self._query = index.query if sequence is None else index.sequence(**sequence).query
        self._options = options
        self._matches = matches and options["rerank"] and index.model.config.uses_patches
        self._gone = False  # has an image been missed?

    def look_up(self, frame: Frame) -> Recognition:
        answer = self._query(frame.image, **self._options)
        found = None
        if self._matches and answer.places:
            key = answer.places[0].key
            try:
                place = self._index.description(key)
                found = match(answer.query, place, device=self._index.model.device)
            except ImageError as error:  # of the reference, which may be gone
                level = logging.DEBUG if self._gone else logging.WARNING
                logger.log(level, "no patches are matched with %s: %s", key, error)
                self._gone = True
        return Recognition(
            frame,
            answer.best,
            answer.places,
            found,
            answer.query,
            threshold=answer.threshold,
            min_confidence=answer.min_confidence,
        )


def recognise(
    source: Source | int | str | os.PathLike[str],
    reference: PlaceIndex | KeptFrame,
    *,
    threshold: float | None = None,
    top_k: int = 1,
    rerank: bool = True,
    candidates: int = 100,
    matches: bool = False,
    sequence: Mapping[str, Any] | None = None,
    every: int = 1,
    max_frames: int | None = None,
    give_up: float = 30.0,
    min_confidence: float | None = None,
    budget_ms: float | None = None,
) -> Iterator[Recognition]:
    """Recognise places in the frames of a camera, a video or a folder.

    Parameters
    ----------
    source : Source or int or str or Path
        See :func:`~patchnetvlad.live.open_source`. A source that is opened here is closed at the
        end; ``every`` and ``give_up`` are for such sources alone.
    reference : PlaceIndex or KeptFrame
        What frames are looked up in. A KeptFrame has a threshold of its own, and one place.
    threshold : float, optional
        Least score of a recognition.
    top_k : int, default 1
        Places per frame.
    rerank : bool, default True
        Re-rank by patches.
    candidates : int, default 100
        Images of an index that are re-ranked, at least ``top_k``: fewer take less time.
    matches : bool, default False
        After re-ranking, match the patches of each frame and its best place once more, for
        ``Recognition.match``; a KeptFrame always does.
    sequence : mapping, optional
        Arguments of :meth:`PlaceIndex.sequence`: the frames before help each. Scores, and the
        threshold, are those of sequences then.
    every : int, default 1
        Look at every n-th frame only.
    max_frames : int, optional
        Stop after so many frames were recognised.
    give_up : float, default 30
        s without a frame after which a camera is given up.
    min_confidence : float, optional
        Least confidence of a recognition, 0 to 1; see :meth:`PlaceIndex.query`. Not for a
        sequence, whose places have no confidence.
    budget_ms : float, optional
        Time for each frame with an index, in ms, after which no more of its images are re-ranked;
        see :meth:`PlaceIndex.query`.

    Yields
    ------
    Recognition
        One a frame. While a camera gives none, one without a frame every 0.5 s, so that the
        caller is never kept waiting.

    Raises
    ------
    SourceError
        The source cannot be read, none of its frames could be decoded, or a camera is given up.

    Examples
    --------
    >>> from patchnetvlad import load_model
    >>> from patchnetvlad.assets.data_files import demo_images
    >>> from patchnetvlad.live.loop import KeptFrame, recognise
    >>> folder = demo_images()["notre_dame"].parent
    >>> kept = KeptFrame(load_model("demo", device="cpu"))
    >>> len([seen.score for seen in recognise(folder, kept, max_frames=2)])
    2
    """
    for what, value in (("top_k", top_k), ("candidates", candidates)):
        if value < 1:
            raise PatchNetVLADError(f"{what} = {value} must be 1 or more")
    places: _Reference
    if isinstance(reference, KeptFrame):
        if sequence is not None:
            raise ArgumentError("a sequence needs an index: a kept frame is no traverse")
        if min_confidence is not None:
            raise PatchNetVLADError(
                f"min_confidence = {min_confidence:g} needs an index: a single frame has no other "
                "places to be told from; use threshold"
            )
        places = reference
    else:
        options: dict[str, Any] = {
            "top_k": top_k,
            "rerank": rerank,
            "candidates": candidates,
            "budget_ms": budget_ms,
        }
        if sequence is None:
            options["min_confidence"] = min_confidence
        elif min_confidence is not None:
            raise ArgumentError(
                f"min_confidence = {min_confidence:g} is of single frames; with a sequence, use "
                "threshold"
            )
        places = _Places(reference, matches, sequence, threshold=threshold, **options)
    if isinstance(source, Source):
        yield from _look_up_each(source, places, max_frames)
        return
    with open_source(source, every, give_up) as opened:
        yield from _look_up_each(opened, places, max_frames)


def _look_up_each(
    source: Source, places: _Reference, max_frames: int | None
) -> Iterator[Recognition]:
    """Look up one frame after the other, and leave out those that cannot be used."""
    count = 0
    unfit: list[str] = []  # what is wrong with frames
    times: deque[float] = deque(maxlen=_FPS_FRAMES + 1)
    while not source.ended and (max_frames is None or count < max_frames):
        frame = source.read(WAIT)
        if frame is None:
            if not source.ended:
                yield Recognition(None, lost=source.lost, fps=_rate(times))
            continue
        try:
            found = places.look_up(frame)
        except ImageError as error:  # too small, for example
            source.counts.broken += 1
            level = logging.INFO if len(unfit) < _MOST_SAID else logging.DEBUG
            logger.log(level, "skipped %s: %s", frame.name, error)
            if len(unfit) < _MOST_SAID:
                unfit.append(f"{frame.name}: {error}")
            continue
        count += 1
        now = time.monotonic()
        times.append(now)
        yield replace(found, latency=now - frame.arrived, fps=_rate(times))
    if source.ended and count == 0 and not source.live:
        raise SourceError(
            f"none of the {source.counts.seen} frames of {source.name} can be used"
            + (f"; the first: {unfit[0]}" if unfit else "")
        )


def _rate(times: Sequence[float]) -> float:
    """Return events/s, of the times of some."""
    return (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0


class Rate:
    """Measures how fast a loop runs: the caller shows it every recognition."""

    def __init__(self) -> None:
        self._latencies = array("d")
        self._begin = self._end = 0.0

    def add(self, recognition: Recognition) -> None:
        """Count a recognition, once the caller is done with it."""
        if recognition.frame is None:
            return
        if not self._latencies:
            self._begin = recognition.frame.arrived
        self._latencies.append(recognition.latency)
        self._end = time.monotonic()

    @property
    def processed(self) -> int:
        """Frames that were recognised."""
        return len(self._latencies)

    @property
    def seconds(self) -> float:
        """From the first frame's arrival to the last one's end, s."""
        return self._end - self._begin

    @property
    def fps(self) -> float:
        """Mean frames/s; nan before the first."""
        return self.processed / self.seconds if self.seconds > 0 else math.nan

    def latency(self, percent: float) -> float:
        """Return a percentile of the latencies, s: 50 is the median; nan before the first."""
        return float(np.percentile(self._latencies, percent)) if self._latencies else math.nan

    def report(self, counts: Counts) -> str:
        """Return a two-line summary of speed and dropped frames."""
        parts = [f"{counts.seen} frames seen", f"{self.processed} processed"]
        parts += [f"{counts.dropped} dropped (a newer one had come)"] if counts.dropped else []
        parts += [f"{counts.skipped} left out (--every)"] if counts.skipped else []
        parts += [f"{counts.broken} broken"] if counts.broken else []
        lines = [", ".join(parts)]
        if self._latencies:
            median, most = (1000 * self.latency(percent) for percent in (50, 95))
            lines.append(
                f"{self.fps:.2f} frames/s over {self.seconds:.1f} s; latency: median "
                f"{median:.0f} ms, 95th percentile {most:.0f} ms"
            )
        return "\n".join(lines)
