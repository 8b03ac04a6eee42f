# SPDX-License-Identifier: MIT
"""Extraction on a cluster: workers that hold the model write whole shards of the store.

The driver, the process that runs the command, only hands out work and enters the records that
workers have written in the index of the store.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.names import absolute_location, normal_name
from patchnetvlad.config import Config
from patchnetvlad.engines.engine import Extraction
from patchnetvlad.engines.local_extract import batched, extraction_bar
from patchnetvlad.engines.ray.connection import code_version, import_ray
from patchnetvlad.engines.ray.extract_worker import (
    Batch,
    FeatureWorker,
    decode_pixels,
    serve_checkpoint,
)
from patchnetvlad.engines.ray.pool import TRIES, Failure, Pool, Task, task_size
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.interface import Writer
from patchnetvlad.models.checkpoint import load_state, model_from_state

TASK_BYTES = 512 * 2**20
"""A task is about this many bytes of features, ..."""
TASK_IMAGES = 256
"""... and at most this many images."""

_DECODED_TOGETHER = 16


def _dimension(config: Config) -> int:
    """Return P."""
    if config.num_pcs or config.pooling in ("max", "avg"):
        return config.num_pcs or config.geometry.channels
    path = resolve_checkpoint(config.resume_path, config.num_pcs)
    pool: Any = model_from_state(config, load_state(path), source=str(path)).pool
    return int(pool.num_clusters) * config.geometry.channels


class RayExtractor:
    """Extracts features on the cluster that this process is connected to.

    Images and output lie in folders that all nodes have under the same names. The features are
    those of one process, to the last bit where all nodes compute alike.

    Images that cannot be decoded, and those that kill the workers they are given to, do not end
    the job: after three attempts they count as failed.

    Parameters
    ----------
    extraction : Extraction
    on_gpus : bool
        One worker per GPU; images are decoded on processors all over the cluster. Otherwise
        workers on all nodes that have processors.
    progress : bool
        Show a progress bar.

    Attributes
    ----------
    dimension, map_channels : int
        P and D.
    """

    def __init__(self, extraction: Extraction, on_gpus: bool, progress: bool) -> None:
        self.config = config = extraction.config
        self.images = extraction.images
        self.paths = [absolute_location(path) for path in extraction.paths]
        self.on_gpus, self.progress = on_gpus, progress
        self.dimension, self.map_channels = _dimension(config), config.geometry.channels
        # Images of native size are decoded by the worker that extracts them: no room on the way.
        processors = import_ray().cluster_resources().get("CPU", 0)
        self._apart = on_gpus and config.image_size != (0, 0) and processors >= 1
        self._decode = import_ray().remote(num_cpus=1)(decode_pixels)
        checkpoint = os.path.abspath(resolve_checkpoint(config.resume_path, config.num_pcs))
        sha256 = extraction.manifest.checkpoint
        self._arguments = (
            code_version(),
            config,
            checkpoint,
            sha256,
            serve_checkpoint(checkpoint),
            on_gpus,
        )

    def run(self, writer: Writer, todo: Sequence[int], record_bytes: float) -> dict[str, str]:
        """Extract the features of the images in the rows ``todo``; see :class:`Extractor`."""
        failed: dict[str, str] = {}
        attempts: dict[int, int] = {}
        with (
            Pool(FeatureWorker, self._arguments, on_gpus=self.on_gpus) as pool,
            extraction_bar(len(self.images), todo, self.progress) as bar,
        ):
            for rows in self._split(todo, record_bytes):
                pool.add(self._task(rows))
            for task, result in pool.run(functools.partial(self._batch, writer), make=self._task):
                if isinstance(result, Failure):
                    if not result.blamed:
                        raise result.error
                    what = (
                        "killed the workers that it was given to (out of memory?)"
                        if result.died
                        else f"cannot be described: {result.reason}"
                    )
                    failed |= {self._name(i): f"{self.paths[i]} {what}" for i in task.items}
                    bar.update(len(task.items))
                    continue
                writer.adopt(result.written)
                for i, why in result.broken.items():
                    attempts[i] = attempts.get(i, 0) + 1
                    if attempts[i] >= TRIES:
                        check_seen(self.paths[i], why)
                        failed[self._name(i)] = why
                again = [i for i in result.broken if attempts[i] < TRIES]
                if again:
                    pool.add(self._task(again))
                bar.update(len(task.items) - len(again))
        return failed

    def _name(self, i: int) -> str:
        return normal_name(self.images.names[i])

    def _split(self, todo: Sequence[int], record_bytes: float) -> Iterable[list[int]]:
        """Divide images into tasks of whole batches."""
        size = task_size(len(todo), TASK_IMAGES, self.on_gpus)
        size = min(size, TASK_BYTES / record_bytes) if record_bytes else size
        batches = list(batched(todo, self.config.cache_batch_size).values())
        together = max(1, round(size / self.config.cache_batch_size))
        for start in range(0, len(batches), together):
            yield [i for batch in batches[start : start + together] for i in batch]

    def _task(self, rows: Sequence[int]) -> Task:
        return Task(f"extract {len(rows)} images from {self._name(rows[0])}", rows)

    def _batch(self, writer: Writer, task: Task) -> tuple[Any, ...]:
        """Return the arguments of :meth:`FeatureWorker.run`."""
        paths = {i: self.paths[i] for i in task.items}
        batch = Batch(paths, writer.part(task.items))
        if not self._apart:
            return (batch,)
        size, files = self.config.image_size, list(paths.values())
        return (
            batch,
            *(
                self._decode.options(name=f"decode images from {files[start]}").remote(
                    files[start : start + _DECODED_TOGETHER], size, code_version()
                )
                for start in range(0, len(files), _DECODED_TOGETHER)
            ),
        )


def check_seen(path: Path | str, why: str) -> None:
    """Raise FeatureError if an image is missing on a node (that is ``why``), but exists here."""
    if isinstance(path, Path) and why.endswith(f"{path} does not exist") and path.is_file():
        raise FeatureError(
            f"a node does not have the image {path}, which is there on this machine; images "
            "and features must lie in folders that all nodes share, or in object storage"
        )
