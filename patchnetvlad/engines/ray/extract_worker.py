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
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import check_side, input_transform, load_image
from patchnetvlad.engines.local_extract import Decode, Decoder, stream_features
from patchnetvlad.engines.ray.connection import check_code, has_gpus, import_ray, is_direct
from patchnetvlad.errors import ClusterError, DeviceError, ImageError
from patchnetvlad.features.interface import Part, Written
from patchnetvlad.models.describer import Describer


def use_gpus(device: str) -> bool:
    """Return True if the workers need GPUs; DeviceError if the device is not possible."""
    if device not in ("auto", "cpu", "cuda"):
        raise DeviceError(f"--device {device}: on a cluster, give auto, cpu or cuda")
    if device == "cuda" and not has_gpus():
        raise DeviceError("--device cuda: the cluster has no GPU; give auto or cpu")
    return device != "cpu" and has_gpus()


@dataclass(frozen=True, eq=False)
class Batch:
    """The images that a worker extracts at a time.

    Attributes
    ----------
    paths : dict of int to Path or str
        By the first row of the image in the list.
    part : Part
        Writes their features.
    """

    paths: dict[int, Path | str]
    part: Part


@dataclass(frozen=True, eq=False)
class BatchResult:
    """What a worker has done with a :class:`Batch`.

    Attributes
    ----------
    written : Written
    broken : dict of int to str
        Images that could not be decoded, and why.
    """

    written: Written
    broken: dict[int, str]


class FeatureWorker:
    """Ray actor that holds the model and extracts batches of images.

    Parameters
    ----------
    cpus : int
    code : str
        As for :func:`~patchnetvlad.engines.ray.connection.check_code`.
    config : Config
    checkpoint, sha256, server, on_gpu
        As for :func:`load_describer`.
    """

    def __init__(
        self,
        cpus: int,
        code: str,
        config: Config,
        checkpoint: str,
        sha256: str,
        server: Any,
        on_gpu: bool,
    ) -> None:
        check_code(code)
        threads = config.threads or min(8, cpus)
        self._config = replace(config, threads=threads)
        self._on_gpu = on_gpu
        self._describer = load_describer(cpus, self._config, checkpoint, sha256, server, on_gpu)

    def ready(self) -> None:
        """Return as soon as the model is loaded."""

    def run(self, batch: Batch, *decoded: list[Any]) -> BatchResult:
        """Extract a batch, and write its part.

        Parameters
        ----------
        batch : Batch
        *decoded : list of (ndarray [H, W, 3] of uint8 or ImageError)
            Its images one after the other, if they are decoded already.

        Returns
        -------
        BatchResult

        Raises
        ------
        FeatureError
            The features cannot be written.
        """
        decode: Decode = Decoder(batch.paths, self._config, pin=self._on_gpu)
        if decoded:
            given = (image for some in decoded for image in some)
            decode = _Decoded(batch.paths, dict(zip(batch.paths, given, strict=True)), self._config)
        with contextlib.closing(batch.part) as part:
            part.start()
            broken = stream_features(
                part, [self._describer], decode, list(batch.paths), self._config, int
            )
            written = part.finish()
        return BatchResult(written, {i: str(error) for i, error in broken.items()})


class _Decoded:
    """Normalises images that other processes have decoded."""

    def __init__(
        self, paths: Mapping[int, Path | str], given: Mapping[int, Any], config: Config
    ) -> None:
        self._paths, self._given = paths, given
        self._transform = input_transform((0, 0))
        self._min_side = config.min_image_side

    def __call__(self, i: int) -> Tensor | ImageError:
        pixels = self._given[i]
        if isinstance(pixels, ImageError):
            return pixels
        try:
            check_side(self._paths[i], pixels.shape[:2], self._min_side)
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
    cpus: int, config: Config, checkpoint: str, sha256: str, server: Any, on_gpu: bool
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
    server : CheckpointServer or None
        Has it, for nodes that have not.
    on_gpu : bool

    Returns
    -------
    Describer

    Raises
    ------
    ClusterError
        The node has another file of that name, or none, and there is no server.
    """
    torch.set_num_threads(cpus)
    device = torch.device("cuda", 0) if on_gpu else torch.device("cpu")  # Ray shows only ours
    path = Path(checkpoint)
    if path.is_file() and file_sha256(path) == sha256:
        return Describer.load(replace(config, resume_path=checkpoint), device)
    if server is None:
        raise ClusterError(
            f"node {socket.gethostname()} has no {checkpoint}, or another one; put the checkpoint "
            "in a folder that all nodes share"
        )
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, path.name)
        path.write_bytes(import_ray().get(server.read.remote()))
        return Describer.load(replace(config, resume_path=str(path)), device)


class CheckpointServer:
    """Ray actor on the driver's node that serves the checkpoint to other nodes."""

    def __init__(self, path: str) -> None:
        self._path = Path(path)

    def read(self) -> bytes:
        """Return the file's bytes."""
        return self._path.read_bytes()


def serve_checkpoint(path: str) -> Any:
    """Start an actor that serves a checkpoint on this machine; None behind ``ray://``."""
    ray = import_ray()
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    if not is_direct():
        return None
    here = ray.get_runtime_context().get_node_id()
    return (
        ray.remote(CheckpointServer)
        .options(
            num_cpus=0,
            scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
            # Ray lets any node start an actor without processors, also one that just dies.
            max_restarts=-1,
            max_task_retries=-1,
        )
        .remote(path)
    )
