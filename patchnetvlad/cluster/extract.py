# SPDX-License-Identifier: MIT
"""Extraction on a cluster: workers that hold the model write whole shards of the store.

The driver, which is the process that the command runs in, only says who does what, and enters in
the index of the store where the records lie that workers have written.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from patchnetvlad.assets import file_sha256, resolve_checkpoint
from patchnetvlad.cluster.connection import (
    check_code,
    code_version,
    connected,
    has_gpus,
    import_ray,
    is_direct,
)
from patchnetvlad.cluster.object_store import (
    ObjectStoreWriter,
    open_object_store,
    publish_shard,
)
from patchnetvlad.cluster.pool import TRIES, Failure, Pool, Task, task_size
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.transforms import check_side, input_transform, load_image
from patchnetvlad.device import choose_precision
from patchnetvlad.errors import ClusterError, DeviceError, FeatureError, ImageError
from patchnetvlad.features.describe import Describer
from patchnetvlad.features.extract import check_space, left_to_do, plan
from patchnetvlad.features.formats import (
    NpyWriter,
    disk_errors,
    places_of,
    write_patch_files,
)
from patchnetvlad.features.manifest import GLOBAL_FILE, Manifest, stored_bytes
from patchnetvlad.features.store import (
    Record,
    ShardWriter,
    StoreWriter,
    Writer,
    open_writer,
    time_stamp,
)
from patchnetvlad.features.stream import Decode, Decoder, batched, stream_features
from patchnetvlad.models.backbone import ENCODER_DIM
from patchnetvlad.models.checkpoint import load_state, model_from_state
from patchnetvlad.remote import (
    RemoteFolder,
    absolute_place,
    is_remote,
    normal_name,
    url_of,
)

logger = logging.getLogger(__name__)

TASK_BYTES = 512 * 2**20
"""A worker is given about so many bytes of features to compute at a time, ..."""
TASK_IMAGES = 256
"""... and at most so many images."""

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
        As of :func:`~patchnetvlad.cluster.connection.connected`.
    config, images, dataset_root, output_dir, feature_names, resume, progress
        As of :func:`patchnetvlad.extract`.
    device : {"auto", "cpu", "cuda"}
        ``cuda``: one worker a GPU; images are decoded on processors all over the cluster.
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


def use_gpus(device: str) -> bool:
    """Say whether the workers of a cluster are to have GPUs; DeviceError if that cannot be."""
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device {device}: on a cluster, give auto, cpu or cuda")
    if device == "cuda" and not has_gpus():
        raise DeviceError("--device cuda: the cluster has no GPU; give auto or cpu")
    return device != "cpu" and has_gpus()


def _dimension(config: Config) -> int:
    """Return P."""
    if config.num_pcs or config.pooling in ("max", "avg"):
        return config.num_pcs or ENCODER_DIM
    path = resolve_checkpoint(config.resume_path, config.num_pcs)
    pool: Any = model_from_state(config, load_state(path), source=str(path)).pool
    return int(pool.num_clusters) * ENCODER_DIM


def _failed_text(images: ImageList, failed: Mapping[str, str], output: Path | RemoteFolder) -> str:
    places = places_of(images.names)
    named = [f"{images.where(places[name][0])}: {why}" for name, why in failed.items()]
    return (
        f"{len(failed)} of {len(images)} images have no features, after {TRIES} attempts: "
        f"{'; '.join(named[:5])}{'; ...' if len(named) > 5 else ''}. All others are extracted in "
        f"{output}. Repair the files and run the command again: it tries only these"
    )


# --- the driver's side ----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Share:
    """Images that a worker describes, and the shard that it writes.

    Attributes
    ----------
    names : dict of int to list of str
        By the image's first place in the list: the names that it has there.
    paths : dict of int to Path
    modified : dict of int to int
        Time stamps, ns.
    shard : int
        Number of its shard of the store.
    """

    names: dict[int, list[str]]
    paths: dict[int, Path | str]
    modified: dict[int, int]
    shard: int


@dataclass(frozen=True, eq=False)
class Done:
    """What a worker has done with a share.

    Attributes
    ----------
    records : list of (str, Record)
        What it has written to a store.
    descriptors : dict of int to ndarray [P]
        Where the driver has no quick way to read them: of images whose patches it has written to
        ``.npy`` files, or to object storage.
    broken : dict of int to str
        Images that could not be decoded, and why.
    """

    records: list[tuple[str, Record]]
    descriptors: dict[int, NDArray[np.float32]]
    broken: dict[int, str]


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
        self._places = places_of(images.names)
        self._shard = writer.last_shard if isinstance(writer, StoreWriter) else -1
        # Images of any size are decoded where they are described, for want of room on the way.
        processors = import_ray().cluster_resources().get("CPU", 0)
        self._apart = on_gpus and config.image_size != (0, 0) and processors >= 1
        self._decode = import_ray().remote(num_cpus=1)(_decode_pixels)
        checkpoint = os.path.abspath(resolve_checkpoint(config.resume_path, config.num_pcs))
        model = checkpoint, keep(checkpoint), on_gpus
        self._arguments = (code_version(), config, manifest, output, *model)

    def run(self, todo: Sequence[int], each: float, progress: bool) -> dict[str, str]:
        """Describe images of ``each`` bytes; say which have failed, by name, and why."""
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
            self.writer.sweep()  # what workers left that died
        return failed

    def _check_seen(self, i: int, why: str) -> None:
        """Raise FeatureError if an image is there, but not on the nodes."""
        path = self.paths[i]
        if isinstance(path, Path) and why.endswith(f"{path} does not exist") and path.is_file():
            raise FeatureError(
                f"a node does not have the image {path}, which is there on this machine; images "
                "and features must lie in folders that all nodes share, or in object storage"
            )

    def _name(self, i: int) -> str:
        return normal_name(self.images.names[i])

    def _parts(self, todo: Sequence[int], each: float) -> Iterable[list[int]]:
        """Divide images into parts of whole batches."""
        size = task_size(len(todo), TASK_IMAGES, self.on_gpus)
        size = min(size, TASK_BYTES / each) if each else size
        batches = list(batched(todo, self.config.cache_batch_size).values())
        together = max(1, round(size / self.config.cache_batch_size))
        for start in range(0, len(batches), together):
            yield [i for batch in batches[start : start + together] for i in batch]

    def _task(self, part: Sequence[int]) -> Task:
        return Task(f"extract {len(part)} images from {self._name(part[0])}", part)

    def _share(self, task: Task) -> tuple[Any, ...]:
        """Give the arguments of :meth:`FeatureWorker.run`."""
        self._shard += 1
        share = Share(
            {i: [self.images.names[j] for j in self._places[self._name(i)]] for i in task.items},
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
        """Make what a worker has written count."""
        if isinstance(self.writer, ObjectStoreWriter):
            self.writer.keep({self._name(i): row for i, row in done.descriptors.items()})
        if isinstance(self.writer, StoreWriter):
            self.writer.adopt(done.records)
        elif isinstance(self.writer, NpyWriter):
            for i, descriptor in done.descriptors.items():
                self.writer.write_row(i, descriptor)


# --- the workers' side ----------------------------------------------------------------------------


class FeatureWorker:
    """Holds the model, and describes shares of images; an actor.

    Parameters
    ----------
    cpus : int
    code : str
        As of :func:`~patchnetvlad.cluster.connection.check_code`.
    config : Config
    manifest : Manifest
        Of all the features.
    output : Path or RemoteFolder
        Their folder.
    checkpoint : str
        Its path on the driver's machine.
    keeper : Keeper or None
        Has it, for nodes that have not.
    on_gpu : bool
    """

    def __init__(
        self,
        cpus: int,
        code: str,
        config: Config,
        manifest: Manifest,
        output: Path | RemoteFolder,
        checkpoint: str,
        keeper: Any,
        on_gpu: bool,
    ) -> None:
        check_code(code)
        threads = config.threads or min(8, cpus)
        self._config = replace(config, threads=threads)
        self._manifest = manifest
        self._output = output
        self._on_gpu = on_gpu
        self._describer = load_describer(
            cpus, self._config, checkpoint, manifest.checkpoint, keeper, on_gpu
        )

    def ready(self) -> None:
        """Return as soon as the model is loaded."""

    def run(self, share: Share, *decoded: list[Any]) -> Done:
        """Describe a share, and write its shard.

        Parameters
        ----------
        share : Share
        *decoded : list of (ndarray [H, W, 3] of uint8 or ImageError)
            Its images one after the other, if they are decoded already.

        Returns
        -------
        Done

        Raises
        ------
        FeatureError
            The shard cannot be written.
        """
        if isinstance(self._output, Path):
            return self._run(share, decoded, self._output, None)
        with tempfile.TemporaryDirectory(prefix="patchnetvlad-") as folder:
            return self._run(share, decoded, Path(folder), self._output)

    def _run(
        self, share: Share, decoded: Sequence[Any], output: Path, remote: RemoteFolder | None
    ) -> Done:
        if not output.is_dir():
            raise FeatureError(
                f"node {socket.gethostname()} has no folder {output}; images and features must lie "
                "in folders that all nodes share, or in object storage"
            )
        writer: _Shard | _PatchFiles
        if self._manifest.local_features == "npy" and remote is None:
            writer = _PatchFiles(output, self._manifest, share.names)
        else:
            names = {i: normal_name(listed[0]) for i, listed in share.names.items()}
            writer = _Shard(output, share.shard, names, share.modified)
        decode: Decode = Decoder(share.paths, self._config, pin=self._on_gpu)
        if decoded:
            given = (image for part in decoded for image in part)
            decode = _Decoded(share, dict(zip(share.paths, given, strict=True)), self._config)
        with contextlib.closing(writer):
            broken = stream_features(
                writer, [self._describer], decode, list(share.paths), self._config, int
            )
            writer.finish()
        texts = {i: str(error) for i, error in broken.items()}
        if isinstance(writer, _PatchFiles):
            return Done([], writer.descriptors, texts)
        if remote is None:
            return Done(writer.records, {}, texts)
        publish_shard(remote, writer, self._manifest)
        return Done(writer.records, writer.descriptors, texts)


class _Shard(ShardWriter):
    """Keeps global descriptors, too, which are small."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.descriptors: dict[int, NDArray[np.float32]] = {}

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        super().write(i, descriptor, arrays, modified)
        self.descriptors[i] = descriptor


class _PatchFiles:
    """Writes the ``.npy`` files of patches, and keeps global descriptors for the driver."""

    def __init__(
        self, directory: Path, manifest: Manifest, names: Mapping[int, Sequence[str]]
    ) -> None:
        self.descriptors: dict[int, NDArray[np.float32]] = {}
        self._directory, self._manifest, self._names = directory, manifest, names

    def write(
        self, i: int, descriptor: NDArray[np.float32], arrays: Sequence[Any], modified: int = 0
    ) -> None:
        with disk_errors(self._directory):
            write_patch_files(self._directory, self._manifest, self._names[i], arrays)
        self.descriptors[i] = descriptor

    def commit(self) -> None:
        pass

    def finish(self) -> None:
        pass

    def close(self) -> None:
        pass


class _Decoded:
    """Normalises images that other processes have decoded."""

    def __init__(self, share: Share, given: Mapping[int, Any], config: Config) -> None:
        self._share, self._given = share, given
        self._transform = input_transform((0, 0))
        self._min_side = config.min_image_side

    def __call__(self, i: int) -> Tensor | ImageError:
        pixels = self._given[i]
        if isinstance(pixels, ImageError):
            return pixels
        try:
            check_side(self._share.paths[i], pixels.shape[:2], self._min_side)
        except ImageError as error:
            return error
        return self._transform(pixels)


def _decode_pixels(
    paths: Sequence[Path | str], size: tuple[int, int], code: str
) -> list[NDArray[np.uint8] | ImageError]:
    """Decode and resize images; what is broken gives its error."""
    check_code(code)
    resize = input_transform(size)
    found: list[NDArray[np.uint8] | ImageError] = []
    for path in paths:
        try:
            found.append(resize.pixels(load_image(path)))
        except ImageError as error:
            found.append(error)
    return found


def load_describer(
    cpus: int, config: Config, checkpoint: str, sha256: str, keeper: Any, on_gpu: bool
) -> Describer:
    """Load the model in a worker.

    Parameters
    ----------
    cpus : int
        Processors that it may use.
    config : Config
    checkpoint : str
        Path on the driver's machine.
    sha256 : str
        Of the checkpoint.
    keeper : Keeper or None
        Has it, for nodes that have not.
    on_gpu : bool

    Returns
    -------
    Describer

    Raises
    ------
    ClusterError
        The node has another file of that name, or none and there is no keeper.
    """
    torch.set_num_threads(cpus)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")  # Ray shows only ours
    path = Path(checkpoint)
    if path.is_file() and file_sha256(path) == sha256:
        return Describer.load(replace(config, resume_path=checkpoint), device)
    if keeper is None:
        raise ClusterError(
            f"node {socket.gethostname()} has no {checkpoint}, or another one; put the checkpoint "
            "in a folder that all nodes share"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, path.name)
        path.write_bytes(import_ray().get(keeper.read.remote()))
        return Describer.load(replace(config, resume_path=str(path)), device)


class Keeper:
    """Has a file for nodes that have not; an actor on the driver's."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def read(self) -> bytes:
        """Return the file's bytes."""
        return self._path.read_bytes()


def keep(path: str) -> Any:
    """Start a keeper for a file on this machine; None where that cannot be, behind ``ray://``."""
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not is_direct():
        return None
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(Keeper)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
            # Ray lets any node start an actor without processors, also one that just dies.
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(path)
    )
