# SPDX-License-Identifier: MIT
"""Extraction on a cluster: workers that hold the model write whole shards of the store.

The driver, the process that runs the command, only hands out work and enters the records that
workers have written in the index of the store.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.device import choose_precision
from patchnetvlad.base.files import time_stamp
from patchnetvlad.base.names import absolute_place, is_remote, normal_name, url_of
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines.local_extract import batched
from patchnetvlad.engines.ray.connection import code_version, connected, import_ray
from patchnetvlad.engines.ray.extract_worker import (
    Done,
    FeatureWorker,
    Share,
    decode_pixels,
    keep,
    use_gpus,
)
from patchnetvlad.engines.ray.pool import TRIES, Failure, Pool, Task, task_size
from patchnetvlad.errors import FeatureError, ImageError
from patchnetvlad.features.interface import Writer
from patchnetvlad.features.manifest import GLOBAL_FILE, Manifest, stored_bytes
from patchnetvlad.features.names import places_of
from patchnetvlad.features.npy_files import NpyWriter
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.plan import left_to_do, plan
from patchnetvlad.features.space import check_space
from patchnetvlad.features.store.remote_writer import ObjectStoreWriter, open_object_store
from patchnetvlad.features.store.writer import StoreWriter
from patchnetvlad.models.checkpoint import load_state, model_from_state
from patchnetvlad.models.grid import ENCODER_DIM

TASK_BYTES = 512 * 2**20
"""A task is about this many bytes of features, ..."""
TASK_IMAGES = 256
"""... and at most this many images."""

_DECODED_TOGETHER = 16


def extract_on_cluster(
    address: str,
    config: Config,
    images: ImageList,
    dataset_root: str | Path = "",
    output_dir: str | Path = "output_features",
    *,
    device: str = "auto",
    feature_names: str = "stem",
    resume: bool = True,
    progress: bool = True,
) -> NDArray[np.float32]:
    """Extract the features of an image list on a Ray cluster; see :func:`patchnetvlad.extract`.

    Images and output lie in folders that all nodes have under the same names. The features are
    those of one process, to the last bit where all nodes compute alike.

    Images that cannot be decoded, and those that kill the workers they are given to, do not end
    the job: after three attempts they are written down in the store as having failed, with the
    reason. The store can be matched then; such images are found for no query. The same command
    tries them again.

    Parameters
    ----------
    address : str
        As for :func:`~patchnetvlad.engines.ray.connection.connected`.
    config, images, dataset_root, output_dir, feature_names, resume, progress
        As for :func:`patchnetvlad.extract`.
    device : {"auto", "cpu", "cuda"}
        ``cuda``: one worker per GPU; images are decoded on processors all over the cluster.
        ``cpu``: workers on all nodes that have processors. ``auto`` is ``cuda`` where there is one.

    Returns
    -------
    ndarray [N, P] of float32
        The global descriptors.

    Raises
    ------
    PatchNetVLADError
        As :func:`patchnetvlad.extract`.
    ClusterError
        There is no cluster, or none of its nodes can do the work.
    """
    with connected(address):
        on_gpus = use_gpus(device)
        kind = torch.device("cuda" if on_gpus else "cpu")
        precision = choose_precision(config.precision, kind)
        manifest = plan(config, images, dataset_root, feature_names, precision)
        paths = [absolute_place(place) for place in images.image_locations(dataset_root)]
        with contextlib.ExitStack() as stack:
            output: Path | RemoteFolder
            writer: Writer
            if is_remote(output_dir):
                output = RemoteFolder(url_of(output_dir))
                remote = open_object_store(output, images.names, manifest, paths, resume)
                writer = stack.enter_context(remote)
            else:
                output = Path(os.path.abspath(output_dir))
                local = open_writer(output, images.names, manifest, paths, resume)
                writer = stack.enter_context(local)
            todo = left_to_do(writer, images, output)
            failed: dict[str, str] = {}
            if todo:
                each = check_space(
                    output,
                    config,
                    [paths[i] for i in todo],
                    stored_bytes(output) if isinstance(output, Path) and not resume else 0,
                    dimension=_dimension(config),
                    map_channels=ENCODER_DIM,
                )
                writer.start()
                job = _Job(config, manifest, images, paths, output, writer, on_gpus)
                failed = job.run(todo, each, progress)
            if failed and isinstance(writer, StoreWriter) and writer.records:
                writer.finish(failed)
            elif not failed:
                writer.finish()
            if failed:
                raise ImageError(_failed_text(images, failed, output))
            if isinstance(output, Path):
                return np.load(output / GLOBAL_FILE, mmap_mode="r")
            assert isinstance(writer, ObjectStoreWriter)
            return np.load(writer.directory / GLOBAL_FILE)


def _dimension(config: Config) -> int:
    """Return P."""
    if config.num_pcs or config.pooling in ("max", "avg"):
        return config.num_pcs or ENCODER_DIM
    path = resolve_checkpoint(config.resume_path, config.num_pcs)
    pool: Any = model_from_state(config, load_state(path), source=str(path)).pool
    return int(pool.num_clusters) * ENCODER_DIM


def _failed_text(images: ImageList, failed: Mapping[str, str], output: Path | RemoteFolder) -> str:
    rows = places_of(images.names)
    named = [f"{images.where(rows[name][0])}: {why}" for name, why in failed.items()]
    return (
        f"{len(failed)} of {len(images)} images have no features, after {TRIES} attempts: "
        f"{'; '.join(named[:5])}{'; ...' if len(named) > 5 else ''}. All others are extracted in "
        f"{output}. Repair the files and run the command again: it tries only these"
    )


class _Job:
    """An extraction on the cluster that this process is connected to."""

    def __init__(
        self,
        config: Config,
        manifest: Manifest,
        images: ImageList,
        paths: Sequence[Path | str],
        output: Path | RemoteFolder,
        writer: Writer,
        on_gpus: bool,
    ) -> None:
        self.config = config
        self.images = images
        self.paths = paths
        self.output = output
        self.writer = writer
        self.on_gpus = on_gpus
        self._rows_of = places_of(images.names)
        self._shard = writer.last_shard if isinstance(writer, StoreWriter) else -1
        # Images of native size are decoded by the worker that extracts them: no room on the way.
        processors = import_ray().cluster_resources().get("CPU", 0)
        self._apart = on_gpus and config.image_size != (0, 0) and processors >= 1
        self._decode = import_ray().remote(num_cpus=1)(decode_pixels)
        checkpoint = os.path.abspath(resolve_checkpoint(config.resume_path, config.num_pcs))
        model = checkpoint, keep(checkpoint), on_gpus
        self._arguments = (code_version(), config, manifest, output, *model)

    def run(self, todo: Sequence[int], each: float, progress: bool) -> dict[str, str]:
        """Extract images of ``each`` bytes of features; return why images failed, by name."""
        failed: dict[str, str] = {}
        attempts: dict[int, int] = {}
        with (
            Pool(FeatureWorker, self._arguments, on_gpus=self.on_gpus) as pool,
            tqdm(
                total=len(self.images),
                initial=len(self.images) - len(todo),
                desc="Extracting",
                unit="image",
                disable=not progress,
            ) as bar,
        ):
            for part in self._parts(todo, each):
                pool.add(self._task(part))
            for task, result in pool.run(self._share, make=self._task):
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
                self._take(result)
                for i, why in result.broken.items():
                    attempts[i] = attempts.get(i, 0) + 1
                    if attempts[i] >= TRIES:
                        self._check_seen(i, why)
                        failed[self._name(i)] = why
                again = [i for i in result.broken if attempts[i] < TRIES]
                if again:
                    pool.add(self._task(again))
                bar.update(len(task.items) - len(again))
        if isinstance(self.writer, StoreWriter):
            self.writer.sweep()  # what dead workers left
        return failed

    def _check_seen(self, i: int, why: str) -> None:
        """Raise FeatureError if an image exists here, but not on the nodes."""
        path = self.paths[i]
        if isinstance(path, Path) and why.endswith(f"{path} does not exist") and path.is_file():
            raise FeatureError(
                f"a node does not have the image {path}, which is there on this machine; images "
                "and features must lie in folders that all nodes share, or in object storage"
            )

    def _name(self, i: int) -> str:
        return normal_name(self.images.names[i])

    def _parts(self, todo: Sequence[int], each: float) -> Iterable[list[int]]:
        """Divide images into tasks of whole batches."""
        size = task_size(len(todo), TASK_IMAGES, self.on_gpus)
        size = min(size, TASK_BYTES / each) if each else size
        batches = list(batched(todo, self.config.cache_batch_size).values())
        together = max(1, round(size / self.config.cache_batch_size))
        for start in range(0, len(batches), together):
            yield [i for batch in batches[start : start + together] for i in batch]

    def _task(self, part: Sequence[int]) -> Task:
        return Task(f"extract {len(part)} images from {self._name(part[0])}", part)

    def _share(self, task: Task) -> tuple[Any, ...]:
        """Return the arguments of :meth:`FeatureWorker.run`."""
        self._shard += 1
        share = Share(
            {i: [self.images.names[j] for j in self._rows_of[self._name(i)]] for i in task.items},
            {i: self.paths[i] for i in task.items},
            {i: time_stamp(self.paths[i]) for i in task.items},
            self._shard,
        )
        if not self._apart:
            return (share,)
        paths = [self.paths[i] for i in task.items]
        return (
            share,
            *(
                self._decode.options(name=f"decode images from {paths[start]}").remote(
                    paths[start : start + _DECODED_TOGETHER], self.config.image_size, code_version()
                )
                for start in range(0, len(paths), _DECODED_TOGETHER)
            ),
        )

    def _take(self, done: Done) -> None:
        """Enter what a worker has written in the index."""
        if isinstance(self.writer, ObjectStoreWriter):
            self.writer.keep({self._name(i): row for i, row in done.descriptors.items()})
        if isinstance(self.writer, StoreWriter):
            self.writer.adopt(done.records)
        elif isinstance(self.writer, NpyWriter):
            for i, descriptor in done.descriptors.items():
                self.writer.write_row(i, descriptor)
