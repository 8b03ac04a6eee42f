# SPDX-License-Identifier: MIT
"""Extraction in this process: a stream from image files to written features.

Threads decode images ahead, one or more devices compute features, and another thread writes them.
Only images that are under way are held in memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.base.device import (
    count_cpus,
    describe_device,
    memory_budget,
    serial_pool,
    start_download,
)
from patchnetvlad.base.names import normal_name
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import check_side, input_transform, load_image
from patchnetvlad.engines.engine import Extraction
from patchnetvlad.errors import ImageError
from patchnetvlad.features.interface import Sink, Writer
from patchnetvlad.features.store.codec import round_map, round_patches
from patchnetvlad.features.store.writer import COMMIT_BYTES
from patchnetvlad.models.describer import Describer

logger = logging.getLogger(__name__)

_Batch = list[tuple[int, "Tensor | ImageError"]]  # rows of the list, and their images
Decode = Callable[[int], "Tensor | ImageError"]
_COMMIT_SECONDS = 5.0


class LocalExtractor:
    """Extracts features in this process.

    Parameters
    ----------
    extraction : Extraction
    describers : sequence of Describer
        Each gets its share of the images.
    progress : bool
        Show a progress bar.

    Attributes
    ----------
    dimension, map_channels : int
        P and D.
    """

    def __init__(
        self, extraction: Extraction, describers: Sequence[Describer], progress: bool
    ) -> None:
        for describer in describers:
            where = describe_device(describer.device)
            logger.info("computing on %s, %s", where, extraction.manifest.precision)
        self._extraction, self._progress = extraction, progress
        self._describers = describers
        self.dimension = self._describers[0].dimension
        self.map_channels = self._describers[0].map_channels

    def run(self, writer: Writer, todo: Sequence[int], record_bytes: float) -> dict[str, str]:
        """Extract the features of the images in the rows ``todo``; see :class:`Extractor`."""
        config, images = self._extraction.config, self._extraction.images
        on_gpu = self._describers[0].device.type == "cuda"
        decode = Decoder(self._extraction.paths, config, pin=on_gpu)
        with extraction_bar(len(images), todo, self._progress) as bar:
            broken = stream_features(
                writer, self._describers, decode, todo, config, bar.update, self._extraction.rows
            )
        return {normal_name(images.names[i]): str(error) for i, error in broken.items()}


def extraction_bar(total: int, todo: Sequence[int], progress: bool) -> tqdm:
    """Return the progress bar of an extraction."""
    return tqdm(
        total=total,
        initial=total - len(todo),
        desc="Extracting",
        unit="image",
        disable=not progress,
    )


class Decoder:
    """Decodes images to normalised tensors [3, H, W].

    Parameters
    ----------
    paths : sequence or mapping of int to Path or str
        Files or URLs.
    config : Config
    pin : bool
        Decode to memory that a GPU copies from in the background.
    """

    def __init__(
        self, paths: Sequence[Path | str] | Mapping[int, Path | str], config: Config, pin: bool
    ) -> None:
        self.paths = paths
        self.pin = pin
        self.size = config.image_size
        self.transform = input_transform(self.size)
        self.min_side = config.min_image_side

    def __call__(self, i: int) -> Tensor | ImageError:
        """Decode image ``i`` to [3, H, W]; return, not raise, the error of a broken one."""
        try:
            image: Tensor = self.transform(load_image(self.paths[i], self.size))
            check_side(self.paths[i], (image.shape[1], image.shape[2]), self.min_side)
            return image.pin_memory() if self.pin else image
        except ImageError as error:
            return error


@dataclass(frozen=True)
class _Described:
    """The features of one image, ready to be written."""

    i: int
    descriptor: NDArray[np.float32]
    arrays: list[NDArray[Any]]

    @property
    def nbytes(self) -> int:
        return self.descriptor.nbytes + sum(array.nbytes for array in self.arrays)


def stream_features(
    writer: Sink,
    describers: Sequence[Describer],
    decode: Decode,
    todo: Sequence[int],
    config: Config,
    advance: Callable[[int], object],
    rows: Sequence[int] | None = None,
) -> dict[int, ImageError]:
    """Extract the features of images and write them.

    Parameters
    ----------
    writer : Sink
        Ready for writing.
    describers : sequence of Describer
        One per device; each gets a part of the images.
    decode : callable
        Returns the normalised image [3, H, W] of a row of the list, or its error. Called from
        several threads.
    todo : sequence of int
        Rows, in order.
    config : Config
    advance : callable
        Called with the number of images that are done since the last call.
    rows : sequence of int, optional
        Rows of these images in the whole list, if they are a part of one.

    Returns
    -------
    dict of int to ImageError
        The images that could not be decoded.
    """
    batches = list(batched(todo, config.cache_batch_size, rows).values())
    threads = config.threads or min(8, count_cpus())
    # Native sizes are unknown; an eighth of the budget is for images that wait.
    size = 12 * math.prod(config.image_size)
    memory = memory_budget(config.memory_mb, torch.device("cpu"))
    ahead = memory // 8 // size if size else threads + 1
    ahead = max(threads + 1, min(ahead, 2 * config.cache_batch_size * len(describers)))
    kind = config.local_features if config.uses_patches else "npy"
    broken: dict[int, ImageError] = {}

    def work(describer: Describer, batch: _Batch) -> tuple[_Batch, Iterable[_Described]]:
        return batch, _describe_batch(describer, batch, kind)

    with (
        serial_pool(threads, "decode") as decoders,
        contextlib.closing(_decoded(decoders, decode, batches, ahead)) as decoded,
        _Background(writer, limit=memory // 4) as background,
    ):
        for batch, described in _on_devices(work, decoded, describers):
            broken |= {i: image for i, image in batch if isinstance(image, ImageError)}
            for features in described:
                background.put(features)
            background.end_batch()
            advance(len(batch))
    return broken


def batched(
    todo: Sequence[int], size: int, rows: Sequence[int] | None = None
) -> dict[int, list[int]]:
    """Group rows of the list into batches, by the number of the batch.

    Batches are the same in every run, however often it was interrupted, and in every part of a
    list, whose images have the rows ``rows`` in the whole list.
    """
    batches: dict[int, list[int]] = {}
    for i in todo:
        row = i if rows is None else rows[i]
        batches.setdefault(row // size, []).append(i)
    return batches


def _decoded(
    pool: ThreadPoolExecutor,
    decode: Decode,
    batches: Sequence[list[int]],
    ahead: int,
) -> Generator[_Batch]:
    """Yield decoded batches in order, with ``ahead`` images under way."""
    waiting: deque[Future[Tensor | ImageError]] = deque()
    upcoming = (i for batch in batches for i in batch)

    def refill() -> None:
        while len(waiting) < ahead and (i := next(upcoming, None)) is not None:
            waiting.append(pool.submit(decode, i))

    try:
        for batch in batches:
            refill()
            images = []
            for i in batch:
                images.append((i, waiting.popleft().result()))
                refill()
            yield images
    finally:
        for future in waiting:
            future.cancel()


def _on_devices(
    work: Callable[[Describer, _Batch], tuple[_Batch, Iterable[_Described]]],
    batches: Iterable[_Batch],
    describers: Sequence[Describer],
) -> Iterator[tuple[_Batch, Iterable[_Described]]]:
    """Process batches, each on the next free device; yield the results in order."""
    if len(describers) == 1:
        for batch in batches:
            yield work(describers[0], batch)
        return
    free: queue.SimpleQueue[Describer] = queue.SimpleQueue()
    for describer in describers:
        free.put(describer)

    def share(batch: _Batch) -> tuple[_Batch, Iterable[_Described]]:
        describer = free.get()
        try:
            batch, described = work(describer, batch)
            return batch, list(described)  # here, in this thread
        finally:
            free.put(describer)

    waiting: deque[Future[tuple[_Batch, Iterable[_Described]]]] = deque()
    with ThreadPoolExecutor(len(describers), thread_name_prefix="device") as pool:
        try:
            for batch in batches:
                waiting.append(pool.submit(share, batch))
                if len(waiting) > len(describers):
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def _describe_batch(describer: Describer, batch: _Batch, kind: str) -> Iterator[_Described]:
    """Extract the features of the readable images of a batch, in order.

    On a GPU, the features of one image are copied while those of the next are computed.
    """
    readable = [(i, image) for i, image in batch if isinstance(image, Tensor)]
    encoded: dict[int, tuple[Tensor, Tensor]] = {}
    for group in _same_sized(readable):
        on_device = [
            image.to(describer.device, non_blocking=image.is_pinned()) for _, image in group
        ]
        maps = describer.encode(torch.stack(on_device))
        descriptors = describer.global_descriptors(maps)
        for (i, _), feature_map, descriptor in zip(group, maps, descriptors, strict=True):
            encoded[i] = feature_map, descriptor
    waiting: deque[tuple[int, Callable[[], list[Tensor]]]] = deque()
    behind = 0 if describer.device.type == "cpu" else 1
    for i, _ in readable:
        feature_map, descriptor = encoded.pop(i)
        if kind == "map":
            rounded = [round_map(feature_map)]
        else:
            rounded = round_patches(describer.patches(feature_map), kind)
        waiting.append((i, start_download([descriptor, *rounded])))
        if len(waiting) > behind:
            yield _fetched(*waiting.popleft())
    while waiting:
        yield _fetched(*waiting.popleft())


def _fetched(i: int, wait: Callable[[], list[Tensor]]) -> _Described:
    descriptor, *arrays = [tensor.numpy() for tensor in wait()]
    return _Described(i, descriptor, arrays)


def _same_sized(batch: Sequence[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Group the images of a batch by size; there is one group if images are resized."""
    groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for i, image in batch:
        groups.setdefault(image.shape, []).append((i, image))
    return list(groups.values())


class _Background:
    """Writes features in a thread of its own, including what was put in before an error.

    Parameters
    ----------
    writer : Sink
    limit : int
        Bytes that may wait to be written.
    """

    def __init__(self, writer: Sink, limit: int) -> None:
        self._writer = writer
        self._limit = limit
        self._waiting: deque[_Described | None] = deque()  # None ends a batch
        self._bytes = 0
        self._closed = False
        self._error: BaseException | None = None
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="write", daemon=True)

    def __enter__(self) -> _Background:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()
        if exception[0] is None:
            self._raise()

    def _raise(self) -> None:
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def put(self, described: _Described) -> None:
        """Queue an image; wait while too much is queued; raise errors of writing."""
        with self._changed:
            while self._bytes and self._bytes + described.nbytes > self._limit:
                self._raise()
                self._changed.wait()
            self._raise()
            self._waiting.append(described)
            self._bytes += described.nbytes
            self._changed.notify_all()

    def end_batch(self) -> None:
        """Mark the end of a batch: only whole batches are committed.

        A batch that is computed again after an interruption is then the same as before.
        """
        with self._changed:
            self._waiting.append(None)
            self._changed.notify_all()

    def _run(self) -> None:
        written, since = 0, time.monotonic()
        try:
            while True:
                with self._changed:
                    while not self._waiting and not self._closed:
                        self._changed.wait()
                    if not self._waiting:
                        break
                    described = self._waiting.popleft()
                if described is not None:
                    self._writer.write(described.i, described.descriptor, described.arrays)
                    written += described.nbytes
                    with self._changed:
                        self._bytes -= described.nbytes
                        self._changed.notify_all()
                elif written >= COMMIT_BYTES or time.monotonic() - since > _COMMIT_SECONDS:
                    self._writer.commit()
                    written, since = 0, time.monotonic()
            self._writer.commit()
        except BaseException as error:
            with self._changed:
                self._error = error
                self._bytes = 0
                self._changed.notify_all()
