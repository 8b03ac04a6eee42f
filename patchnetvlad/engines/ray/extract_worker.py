# SPDX-License-Identifier: MIT
"""The workers of extraction: they hold the model and write shards of the store."""

from __future__ import annotations

import contextlib
import socket
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.base.files import file_sha256
from patchnetvlad.base.names import normal_name
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import check_side, input_transform, load_image
from patchnetvlad.engines.local_extract import Decode, Decoder, stream_features
from patchnetvlad.engines.ray.connection import check_code, has_gpus, import_ray, is_direct
from patchnetvlad.errors import ClusterError, DeviceError, FeatureError, ImageError
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.names import disk_errors
from patchnetvlad.features.npy_files import write_patch_files
from patchnetvlad.features.store.index import Record
from patchnetvlad.features.store.remote_writer import publish_shard
from patchnetvlad.features.store.shard_writer import ShardWriter
from patchnetvlad.models.describer import Describer


def use_gpus(device: str) -> bool:
    """Return True if the workers need GPUs; DeviceError if the device is not possible."""
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device {device}: on a cluster, give auto, cpu or cuda")
    if device == "cuda" and not has_gpus():
        raise DeviceError("--device cuda: the cluster has no GPU; give auto or cpu")
    return device != "cpu" and has_gpus()


@dataclass(frozen=True, eq=False)
class Share:
    """A batch of work: the images that a worker extracts, and the shard that it writes.

    Attributes
    ----------
    names : dict of int to list of str
        By the first row of the image in the list: its names in all its rows.
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
    """The result of a worker for a :class:`Share`.

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


class FeatureWorker:
    """Ray actor that holds the model and extracts shares of images.

    Parameters
    ----------
    cpus : int
    code : str
        As for :func:`~patchnetvlad.engines.ray.connection.check_code`.
    config : Config
    manifest : Manifest
        Of all the features.
    output : Path or RemoteFolder
        Their folder.
    checkpoint : str
        Its path on the driver's machine.
    keeper : Keeper or None
        Serves the checkpoint to nodes that do not have it.
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
        """Extract a share, and write its shard.

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


def decode_pixels(
    paths: Sequence[Path | str], size: tuple[int, int], code: str
) -> list[NDArray[np.uint8] | ImageError]:
    """Decode and resize images to [H, W, 3]; a broken image gives its error."""
    check_code(code)
    resize = input_transform(size)
    found: list[NDArray[np.uint8] | ImageError] = []
    for path in paths:
        try:
            found.append(resize.pixels(load_image(path, size)))
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
        The node has another file of that name, or none, and there is no keeper.
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
    """Ray actor on the driver's node that serves the checkpoint to other nodes."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def read(self) -> bytes:
        """Return the file's bytes."""
        return self._path.read_bytes()


def keep(path: str) -> Any:
    """Start an actor that serves a file on this machine; None behind ``ray://``."""
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
