# SPDX-License-Identifier: MIT
"""Reading checkpoints, checking them against the configuration, loading models.

Pickled code in a checkpoint is never run: ``.safetensors`` files hold tensors only, and other
files are read by PyTorch's restricted unpickler.
"""

from __future__ import annotations

import _codecs
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.device import choose_device
from patchnetvlad.base.files import new_file
from patchnetvlad.base.text import format_bytes
from patchnetvlad.config import Config
from patchnetvlad.encoders import DEFAULT
from patchnetvlad.errors import CheckpointError
from patchnetvlad.models.backbones import build_backbone, encoder_of
from patchnetvlad.models.encoder import build_encoder
from patchnetvlad.models.model import build_model

_MOST_UNPACKED = 10  # times the size of the file; torch.save does not compress


def load_state(path: str | Path, prefix: str = "") -> dict[str, Tensor]:
    """Read the tensors of a checkpoint, in float32 on the CPU.

    Parameters
    ----------
    path : str or Path
        A ``.safetensors`` file, or one written by ``torch.save``: a state dict, or a dict with
        one under ``state_dict``. ``module.`` parts of ``DataParallel`` are removed from keys.
    prefix : str
        Return only keys that start with it, and remove it from them.

    Returns
    -------
    dict of str to Tensor

    Raises
    ------
    CheckpointError
        The file is damaged, is not a checkpoint, or holds objects whose loading would run code.
    """
    path = Path(path)
    state = _read_safetensors(path) if path.suffix == ".safetensors" else _read_torch(path)
    for key, value in state.items():
        _check_tensor(key, value, str(path))
    plain = {re.sub(r"(?<![^.])module\.", "", key): value for key, value in state.items()}
    return {
        key[len(prefix) :]: value.float() if value.is_floating_point() else value
        for key, value in plain.items()
        if key.startswith(prefix)
    }


def _check_tensor(key: str, value: Tensor, source: str) -> None:
    """Raise CheckpointError unless a tensor has plain values, all of which are in the file."""
    what = ""
    if value.is_quantized or value.is_nested or value.layout is not torch.strided:
        what = "quantised" if value.is_quantized else "sparse or nested"
    elif value.device.type != "cpu":
        what = f"on the device {value.device.type!r}, without values"
    elif value.is_complex():
        what = "complex"
    elif value.numel() * value.element_size() > value.untyped_storage().nbytes():
        what = f"of shape {list(value.shape)}, of which most repeat"
    if what:
        raise CheckpointError(
            f"{source}: the tensor {key!r} is {what}; save plain tensors (dense, of floating "
            "point, contiguous)"
        )


def save_safetensors(
    state: dict[str, Tensor], path: str | Path, dtype: torch.dtype = torch.float16
) -> None:
    """Write a state dict as ``.safetensors``, floating-point tensors in ``dtype``."""
    from safetensors.torch import save_file

    path = Path(path)
    kept = {
        key: (value.to(dtype) if value.is_floating_point() else value).contiguous()
        for key, value in state.items()
    }
    with new_file(path) as temporary:
        save_file(kept, temporary)
        temporary.chmod(0o644)  # the library writes for its owner only


def load_network(config: Config | str | Path, device: str | torch.device = "auto") -> nn.Module:
    """Build the network of a configuration and load its checkpoint.

    A released checkpoint that is not on this machine is downloaded.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a shipped configuration.
    device : str or torch.device, default "auto"

    Returns
    -------
    nn.Module
        In evaluation mode, with the children ``encoder``, ``pool`` and, if the configuration
        has ``num_pcs``, ``WPCA``.

    Raises
    ------
    ConfigError, DeviceError
    AssetError
        The checkpoint is not found.
    CheckpointError
        It does not fit the configuration.
    """
    if not isinstance(config, Config):
        config = Config.load(config)
    target = choose_device(device)
    path = resolve_checkpoint(config.resume_path, config.num_pcs)
    model = model_from_state(config, load_state(path), source=str(path))
    model = model.to(target)
    if target.type != "cpu":  # where tensor cores want it
        model = model.to(memory_format=torch.channels_last)
    return model.eval().requires_grad_(False)


def model_from_state(
    config: Config, state: dict[str, Tensor], source: str = "the checkpoint"
) -> nn.Module:
    """Build the network of a configuration around the tensors of a checkpoint.

    The number of clusters K is read from the checkpoint; P and the encoder must be those of the
    configuration.

    Parameters
    ----------
    config : Config
    state : dict of str to Tensor
        As :func:`load_state` returns it.
    source : str
        Named in error messages.

    Returns
    -------
    nn.Module
        On the CPU.

    Raises
    ------
    CheckpointError
        The tensors do not fit the configuration.
    ArgumentError
        The encoder needs timm, which is not installed.
    """
    _check_encoder(config, state, source)
    dim = config.geometry.channels
    uses_vlad = config.pooling in ("patchnetvlad", "netvlad")
    num_clusters = _check_vlad(config, state, source) if uses_vlad else 1
    if config.num_pcs:
        _check_whitening(config, state, dim * num_clusters, source)
    with torch.device("meta"):  # whitening layers are large: no memory, no random numbers
        model = build_model(
            encoder_named(config.encoder),
            dim,
            pooling=config.pooling,
            num_clusters=num_clusters,
            num_pcs=config.num_pcs,
            vladv2=config.vladv2,
            patch_sizes=config.patch_sizes,
            strides=config.strides,
            patch_vlad=config.patch_vlad,
        )
    wanted = model.state_dict()
    more = next((key for key in state if key.startswith("encoder.") and key not in wanted), None)
    if more is not None and config.encoder != DEFAULT:
        raise CheckpointError(
            f"{source} has a tensor {more!r}, which is not of {config.encoder}: its encoder is "
            "another one, of the same family"
        )
    for key, value in wanted.items():
        if key not in state:
            raise CheckpointError(f"{source}: the tensor {key!r} is missing")
        if key.startswith("WPCA") and state[key].ndim == 2:
            state = {**state, key: state[key][:, :, None, None]}
        if state[key].shape != value.shape:
            raise _shape_error(source, key, state[key], list(value.shape))
        if not state[key].is_floating_point():
            raise CheckpointError(
                f"{source}: the tensor {key!r} is of type {str(state[key].dtype)[6:]}; needed is "
                "floating point"
            )
        # The extremes are NaN or infinite if anything is; isfinite itself takes a lot of memory.
        if not all(torch.isfinite(extreme) for extreme in state[key].aminmax()):
            raise CheckpointError(f"{source}: the tensor {key!r} holds NaN or infinite values")
    model.load_state_dict({key: state[key] for key in wanted}, assign=True)
    return model


def encoder_named(name: str) -> nn.Module:
    """Build an encoder by its name in a configuration, without trained weights.

    Raises
    ------
    ArgumentError
        It needs timm, which is not installed.
    """
    return build_encoder() if name == DEFAULT else build_backbone(name)


def _check_encoder(config: Config, state: dict[str, Tensor], source: str) -> None:
    found = encoder_of(state, source)
    if found != config.encoder:
        raise CheckpointError(
            f"{source} is a checkpoint of the encoder {found}, but {config.source} has encoder = "
            f"{config.encoder}; set encoder = {found}, or use another checkpoint"
        )


def _check_vlad(config: Config, state: dict[str, Tensor], source: str) -> int:
    centroids = state.get("pool.centroids")
    if centroids is None:
        raise CheckpointError(
            f"{source} has no NetVLAD vocabulary ('pool.centroids'), which "
            f"pooling = {config.pooling} needs; use pooling = max or avg, or another checkpoint"
        )
    if centroids.ndim != 2:
        raise _shape_error(source, "pool.centroids", centroids, f"[K, {config.geometry.channels}]")
    if not len(centroids):
        raise CheckpointError(f"{source} has a NetVLAD vocabulary of no clusters (K = 0)")
    if ("pool.conv.bias" in state) != config.vladv2:
        raise CheckpointError(
            f"{source} {'has' if not config.vladv2 else 'lacks'} the bias of vladv2 "
            f"('pool.conv.bias'); set vladv2 = {not config.vladv2} in {config.source}"
        )
    return len(centroids)


def _check_whitening(
    config: Config, state: dict[str, Tensor], pooled_dim: int, source: str
) -> None:
    weight = state.get("WPCA.0.weight")
    if weight is None:
        raise CheckpointError(
            f"{source} has no PCA layer, but {config.source} asks for num_pcs = {config.num_pcs}; "
            "set num_pcs = 0 or use a checkpoint with one"
        )
    if weight.ndim < 2:
        needed = [config.num_pcs, pooled_dim, 1, 1]
        raise _shape_error(source, "WPCA.0.weight", weight, needed)
    if weight.shape[0] != config.num_pcs:
        raise CheckpointError(
            f"{source} has a PCA layer of {weight.shape[0]} components, but {config.source} asks "
            f"for num_pcs = {config.num_pcs}; set num_pcs = {weight.shape[0]}"
        )
    if weight.shape[1] != pooled_dim:
        raise CheckpointError(
            f"{source} has a PCA layer for descriptors of {weight.shape[1]} dimensions, but "
            f"pooling = {config.pooling} gives {pooled_dim}; set num_pcs = 0 or use another "
            "checkpoint"
        )


def _shape_error(source: str, key: str, have: Tensor, needed: object) -> CheckpointError:
    return CheckpointError(
        f"{source}: the tensor {key!r} has shape {list(have.shape)}; needed is {needed}"
    )


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint {path} does not exist") from None
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is damaged or no safetensors file: {error}") from None


def read_contents(path: Path) -> Any:
    """Read all that a file of ``torch.save`` holds: tensors, numbers, text, and lists of them.

    Raises
    ------
    CheckpointError
        The file is damaged, or holds objects whose loading would run code.
    """
    _check_unpacked_size(path)
    allowed = torch.serialization.get_safe_globals()
    try:
        # Training writes its scores beside the weights, as NumPy numbers.
        torch.serialization.add_safe_globals(_NUMPY_SCALARS)
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"the checkpoint {path} does not exist") from None
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        holds = f" ({found[1]})" if found else ""
        raise CheckpointError(
            f"{path} is damaged, or holds objects other than tensors{holds} whose loading would "
            "run code, so it is refused; save its state_dict alone"
        ) from None
    except Exception as error:  # The unpickler raises whatever it trips over.
        reason = " ".join(str(error).split())[:120]
        raise CheckpointError(f"{path} is damaged or no checkpoint: {reason}") from None
    finally:
        torch.serialization.clear_safe_globals()
        torch.serialization.add_safe_globals(allowed)


def _read_torch(path: Path) -> dict[str, Tensor]:
    content = read_contents(path)
    state = content.get("state_dict", content) if isinstance(content, dict) else None
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in state.items()
    ):
        raise CheckpointError(f"{path} holds no state_dict of tensors")
    return state


def _check_unpacked_size(path: Path) -> None:
    """Raise CheckpointError for an archive that unpacks to far more than its own size."""
    try:
        if not zipfile.is_zipfile(path):
            return
        with zipfile.ZipFile(path) as archive:
            unpacked = sum(entry.file_size for entry in archive.infolist())
        size = path.stat().st_size
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return  # torch.load says what is wrong
    if unpacked > _MOST_UNPACKED * size:
        raise CheckpointError(
            f"{path} of {format_bytes(size)} would unpack to {format_bytes(unpacked)}, as no "
            "checkpoint does that torch.save wrote; it is refused"
        )


def _numpy_scalar(module: str) -> Any:
    """Return a stand-in for NumPy's own unpickling function, under the name a file uses."""

    def scalar(dtype: np.dtype[Any], data: bytes) -> Any:
        return np.frombuffer(data, dtype)[0]

    scalar.__module__, scalar.__qualname__ = module, "scalar"
    return scalar


_NUMPY_SCALARS: list[Any] = [
    _numpy_scalar("numpy.core.multiarray"),
    _numpy_scalar("numpy._core.multiarray"),
    np.dtype,
    *{type(np.dtype(kind)) for kind in ("f4", "f8", "i4", "i8", "?")},
    _codecs.encode,
]
