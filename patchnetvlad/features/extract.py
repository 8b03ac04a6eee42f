# SPDX-License-Identifier: MIT
"""Extraction: from an image list to stored features, as a stream.

Images are decoded ahead by threads, described on one device or more, and written by a thread of
its own. Nothing but what is under way is held in memory.
"""

from __future__ import annotations

import contextlib
import logging
import math
import queue
import shutil
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.assets import file_sha256, resolve_checkpoint
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.transforms import (
    check_side,
    input_transform,
    load_image,
    native_size,
)
from patchnetvlad.device import (
    choose_devices,
    choose_precision,
    count_cpus,
    describe_device,
    serial_pool,
)
from patchnetvlad.errors import FeatureError, ImageError
from patchnetvlad.features.describe import Describer
from patchnetvlad.features.formats import check_unique, places_to_do
from patchnetvlad.features.manifest import GLOBAL_FILE, Manifest, stored_bytes
from patchnetvlad.features.store import (
    COMMIT_BYTES,
    Writer,
    encode_map,
    encode_patches,
    open_writer,
    record_bytes,
)
from patchnetvlad.geometry import feature_map_shape, patch_grids
from patchnetvlad.remote import is_remote
from patchnetvlad.units import format_bytes

logger = logging.getLogger(__name__)

_Batch = list[tuple[int, "Tensor | ImageError"]]  # places in the list, and what is there
_COMMIT_SECONDS = 5.0
_SAMPLE = 200  # images whose sizes are looked up for an estimate


def extract(
    config: Config | str | Path,
    image_list: str | Path | ImageList,
    dataset_root: str | Path = "",
    output_dir: str | Path = "output_features",
    *,
    device: str = "auto",
    feature_names: str = "stem",
    resume: bool = True,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Extract the features of an image list into a directory.

    A run that was interrupted goes on where it stopped; features that are there already are
    not computed again.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a shipped configuration.
    image_list : str or Path or ImageList
        Text file, one image a line.
    dataset_root : str or Path, default ""
        Folder that relative names in the list lie under, or its URL, such as
        ``s3://bucket/prefix``.
    output_dir : str or Path, default "output_features"
        Gets ``globalfeats.npy`` [N, P] of float32 and, for patchnetvlad pooling, a feature
        store; or, with ``local_features = npy``, for every image and patch size s
        ``patchfeats_psize{s}_{stem}.npy`` [P, n_s] of float32.
    device : str, default "auto"
        Without a number, ``cuda`` stands for as many GPUs as ``nGPU`` in the configuration
        says; each gets its share of the images.
    feature_names : {"stem", "path"}, default "stem"
        Name ``.npy`` files by an image's stem (the layout of the research code), or by its
        whole name in the list, for lists in which stems repeat. A store needs no such names.
    resume : bool, default True
        Go on with the features that are there, or refuse those that do not fit. False replaces
        them.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    ndarray [N, P] of float32
        The global descriptors.

    Raises
    ------
    PatchNetVLADError
        Bad input, or too little space. Everything but images that are broken or too small is
        noticed before the first is read; with such files, the others are still extracted before
        ImageError names these.
    """
    if is_remote(output_dir):
        raise FeatureError(
            f"features are written to object storage, as {output_dir}, by the workers of a "
            "cluster: give --cluster local, which needs no other machine"
        )
    if not isinstance(config, Config):
        config = Config.load(config)
    targets = choose_devices(device, config.num_gpus)
    images = image_list if isinstance(image_list, ImageList) else ImageList.read(image_list)
    images.check_images(dataset_root)
    if config.uses_patches:
        if config.local_features == "npy":
            check_unique(images.names, feature_names)
        if config.image_size != (0, 0):
            patch_grids(config.image_size, config.patch_sizes, config.strides)  # do they fit?
    checkpoint = resolve_checkpoint(config.resume_path, config.num_pcs)
    precision = choose_precision(config.precision, targets[0])
    manifest = Manifest.of(
        config,
        images.names,
        file_sha256(checkpoint),
        naming=feature_names,
        precision=precision,
        root=dataset_root,
    )
    output = Path(output_dir)
    paths = images.image_locations(dataset_root)
    with open_writer(output, images.names, manifest, paths, resume) as writer:
        todo = places_to_do(images.names, writer.done)
        if len(todo) < len(images):
            done = int(writer.done.sum())
            if done:
                logger.info(
                    "%d of %d images have features in %s already", done, len(images), output
                )
        if todo:
            describers = [Describer.load(config, target) for target in targets]
            for target in targets:
                logger.info("computing on %s, %s", describe_device(target), precision)
            todo_paths = [paths[i] for i in todo]
            freed = 0 if resume else stored_bytes(output)
            _check_space(output, config, describers[0], todo_paths, freed)
            writer.start()
            decode = _Decoder(paths, config, pin=targets[0].type == "cuda")
            _extract_into(writer, describers, decode, images, todo, config, progress)
        writer.finish()
    return np.load(output / GLOBAL_FILE)


# --- space ----------------------------------------------------------------------------------------


def _check_space(
    output: Path, config: Config, describer: Describer, paths: list[Path | str], freed: int
) -> None:
    """Say what features will take on disk; FeatureError if it has not got it.

    ``freed`` bytes will be free when features that stand there have made way.
    """
    sizes = [config.image_size]
    if config.image_size == (0, 0):
        sizes = []
        for path in paths[:: max(1, len(paths) // _SAMPLE)]:
            try:
                sizes.append(native_size(path))
            except ImageError:
                continue  # it is named when its turn comes
    shapes = [feature_map_shape(size) for size in sizes if min(size) >= config.min_image_side]
    if not shapes:
        return
    dimension = describer.dimension

    def total(kind: str) -> float:
        each = [
            record_bytes(
                kind,
                dimension,
                describer.patch_counts(shape),
                describer.map_channels * shape[0] * shape[1],
            )
            for shape in shapes
        ]
        return sum(each) / len(each) * len(paths)

    kind = config.local_features if config.uses_patches else "npy"
    need, free = total(kind), shutil.disk_usage(output).free + freed
    logger.info(
        "features of %d images will take %s (%s an image, %s); %s are free in %s",
        len(paths),
        format_bytes(need),
        format_bytes(need / len(paths)),
        kind if config.uses_patches else "float32",
        format_bytes(free),
        output,
    )
    if need > free:
        smaller = [
            f"{other} ({format_bytes(total(other))})"
            for other in ("float16", "int8", "map")
            if config.uses_patches and total(other) < need
        ]
        way_out = f"local_features = {' or '.join(smaller)}, or " if smaller else ""
        raise FeatureError(
            f"the features need {format_bytes(need)}, but {output} has {format_bytes(free)} free; "
            f"use {way_out}another --output_features_dir"
        )


# --- the stream -----------------------------------------------------------------------------------


class _Decoder:
    """Decodes images to normalised tensors [3, H, W]."""

    def __init__(self, paths: Sequence[Path | str], config: Config, pin: bool) -> None:
        self.paths = paths
        self.pin = pin  # in memory that a GPU copies from in the background
        self.transform = input_transform(config.image_size)
        self.min_side = config.min_image_side

    def __call__(self, i: int) -> Tensor | ImageError:
        """Decode image ``i``; a broken one gives its error, so that it does not end the run."""
        try:
            image: Tensor = self.transform(load_image(self.paths[i]))
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


def _extract_into(
    writer: Writer,
    describers: Sequence[Describer],
    decode: Callable[[int], Tensor | ImageError],
    images: ImageList,
    todo: Sequence[int],
    config: Config,
    progress: bool,
) -> None:
    # Batches are the same in every run, however often it was interrupted.
    batches: dict[int, list[int]] = {}
    for i in todo:
        batches.setdefault(i // config.cache_batch_size, []).append(i)
    threads = config.threads or min(8, count_cpus())
    # Of native sizes nothing is known; an eighth of the budget is for what waits.
    size = 12 * math.prod(config.image_size)
    ahead = config.memory_mb * 2**20 // 8 // size if size else threads + 1
    ahead = max(threads + 1, min(ahead, 2 * config.cache_batch_size * len(describers)))
    kind = config.local_features if config.uses_patches else "npy"
    broken: list[str] = []

    def work(describer: Describer, batch: _Batch) -> tuple[_Batch, Iterable[_Described]]:
        return batch, _describe_batch(describer, batch, kind)

    with (
        serial_pool(threads, "decode") as decoders,
        contextlib.closing(_decoded(decoders, decode, list(batches.values()), ahead)) as decoded,
        _Background(writer, limit=config.memory_mb * 2**20 // 4) as background,
        tqdm(
            total=len(images),
            initial=len(images) - len(todo),
            desc="Extracting",
            unit="image",
            disable=not progress,
        ) as bar,
    ):
        for batch, described in _on_devices(work, decoded, describers):
            for i, image in batch:
                if isinstance(image, ImageError):
                    broken.append(f"{images.where(i)}: {image}")
            for features in described:
                background.put(features)
            background.end_batch()
            bar.update(len(batch))
    if broken:
        raise ImageError(
            f"{len(broken)} of {len(images)} images could not be decoded, all others are "
            f"extracted: {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}. "
            "Repair the files, or put other images in their places, and run the command again: it "
            "goes on from here"
        )


def _decoded(
    pool: ThreadPoolExecutor,
    decode: Callable[[int], Tensor | ImageError],
    batches: Sequence[list[int]],
    ahead: int,
) -> Generator[_Batch]:
    """Give decoded batches in order, with ``ahead`` images under way."""
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
    """Describe batches, each on whichever device is free; give the results in order."""
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
    """Describe the readable images of a batch, in its order."""
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
    for i, _ in readable:
        feature_map, descriptor = encoded.pop(i)
        if kind == "map":
            arrays = encode_map(feature_map)
        else:
            arrays = encode_patches(describer.patches(feature_map), kind)
        yield _Described(i, descriptor.cpu().numpy(), arrays)


def _same_sized(batch: Sequence[tuple[int, Tensor]]) -> list[list[tuple[int, Tensor]]]:
    """Split a batch into groups of images of one size; a single group if images are resized."""
    groups: dict[torch.Size, list[tuple[int, Tensor]]] = {}
    for i, image in batch:
        groups.setdefault(image.shape, []).append((i, image))
    return list(groups.values())


class _Background:
    """Writes features in a thread of its own; what was put in before an error is still written.

    Parameters
    ----------
    writer : Writer
    limit : int
        Bytes that may wait.
    """

    def __init__(self, writer: Writer, limit: int) -> None:
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
        """Hand over an image; wait while too much is waiting, raise what went wrong in writing."""
        with self._changed:
            while self._bytes and self._bytes + described.nbytes > self._limit:
                self._raise()
                self._changed.wait()
            self._raise()
            self._waiting.append(described)
            self._bytes += described.nbytes
            self._changed.notify_all()

    def end_batch(self) -> None:
        """Say that a batch is complete: only whole batches are made safe.

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
