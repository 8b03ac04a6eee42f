# SPDX-License-Identifier: MIT
"""The INI file: its keys, how each is parsed, and hints for mistakes."""

from __future__ import annotations

import configparser
import difflib
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from patchnetvlad.errors import ConfigError

T = TypeVar("T")
PARAMETERS = ("nprobe", "efSearch", "k_factor_rf")
"""Of FAISS's indexes, those that say how much is searched."""
PARAMETER_EXAMPLES = (
    "examples are nprobe=64 for IVF, efSearch=200 for HNSW, nprobe=64,k_factor_rf=10 for IVF and "
    "RFlat"
)

CONFIG_DIR = Path(__file__).resolve().parent / "configs"
POOLINGS = ("patchnetvlad", "netvlad", "max", "avg")
MATCHERS = ("RANSAC", "spatialApproximator")
PATCH_VLADS = ("integral", "direct")
PRECISIONS = ("auto", "exact", "fast", "half", "int8")
LOCAL_FEATURES = ("float16", "float32", "int8", "map", "npy")
RANSACS = ("opencv", "fast", "batched")
RERANKS = ("always", "auto")
INTERVAL_BLOCKS = "auto, traverse, or a number of queries from 1"

_LONGEST = 400  # characters of a message

_WHOLE = "a whole number"

_EXAMPLES = {
    "cachebatchsize": "5",
    "imageresizew": "640",
    "imageresizeh": "480",
    "matcher": "RANSAC",
    "n_values_all": "1,5,10,20,50,100",
    "patchweights2use": "0.45,0.15,0.4",
    "pooling": "patchnetvlad",
    "resumepath": "./pretrained_models/mapillary_WPCA",
    "num_pcs": "4096",
    "patch_sizes": "2,5,8",
    "strides": "1,1,1",
}


def parse_parameters(text: str) -> dict[str, int]:
    """Parse search parameters, such as ``nprobe=64,k_factor_rf=10``.

    Parameters
    ----------
    text : str
        Names of :data:`PARAMETERS`, before which may stand ``quantizer_``, for the index over the
        centres of lists, and whole numbers.

    Returns
    -------
    dict of str to int

    Raises
    ------
    ConfigError
        The text has another form.
    """
    if not isinstance(text, str):
        raise ConfigError(f"faiss_parameters = {text!r} is not text; {PARAMETER_EXAMPLES}")
    given: dict[str, int] = {}
    for part in text.split(",") if text.strip() else ():
        found = re.fullmatch(
            rf"((?:quantizer_)*(?:{'|'.join(PARAMETERS)}))\s*=\s*0*([1-9]\d{{0,8}})",
            part.strip(),
            re.ASCII,
        )
        if found is None:
            raise ConfigError(
                f"faiss_parameters: {part.strip()!r} is not one of {', '.join(PARAMETERS)} with a "
                f"whole number from 1; {PARAMETER_EXAMPLES}"
            )
        if found[1] in given:
            raise ConfigError(f"faiss_parameters = {text} has {found[1]} twice")
        given[found[1]] = int(found[2])
    return given


@dataclass(frozen=True)
class Key:
    """One key of the INI file: its field, its parser, and a description of valid values."""

    field: str | None
    parse: Callable[[str], Any]
    kind: str
    required: bool = True
    patches_only: bool = False


def _list_of(kind: Callable[[str], T]) -> Callable[[str], tuple[T, ...]]:
    return lambda text: tuple(kind(word) for word in text.split(",") if word.strip())


def boolean(text: str) -> bool:
    """Parse a Boolean as ConfigParser does; ValueError if it is not one."""
    states = configparser.ConfigParser.BOOLEAN_STATES
    if text.lower() not in states:
        raise ValueError(text)
    return states[text.lower()]


def finite(text: str) -> float:
    """Parse a number; ValueError if it is not a finite number."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(text)
    return value


def is_interval_block(text: str) -> bool:
    """Return whether a text says what the intervals of recalls draw, as ``interval_block`` does."""
    return text in ("auto", "traverse") or re.fullmatch("0*[1-9][0-9]{0,8}", text) is not None


def _optional_path(text: str) -> str | None:
    return None if text.lower() in ("", "none") else os.path.expanduser(text)


def _named_or_path(text: str) -> str:
    """Parse ``auto``, ``none`` or a path."""
    return text.lower() if text.lower() in ("auto", "none") else os.path.expanduser(text)


def _lower(text: str) -> str:
    return text.lower()


def _matcher(text: str) -> str:
    return {name.lower(): name for name in MATCHERS}.get(text.lower(), text)


_SIZE_KEYS = {
    "imageresizew": Key("image_width", int, _WHOLE + " of px"),
    "imageresizeh": Key("image_height", int, _WHOLE + " of px"),
}
KEYS: dict[str, dict[str, Key]] = {
    "feature_extract": {
        "batchsize": Key("batch_size", int, _WHOLE, required=False),
        "cachebatchsize": Key("cache_batch_size", int, _WHOLE),
        "local_features": Key("local_features", _lower, "text", required=False),
        **_SIZE_KEYS,
    },
    "feature_match": {
        "matcher": Key("matcher", _matcher, "text", patches_only=True),
        "ransac": Key("ransac", _lower, "text", required=False),
        "faiss_index": Key("faiss_index", str, "text", required=False),
        "faiss_parameters": Key("faiss_parameters", str, "text", required=False),
        "faiss_index_path": Key("faiss_index_path", _optional_path, "a path", required=False),
        "n_values_all": Key("n_values", _list_of(int), "whole numbers, separated by commas"),
        "interval_block": Key("interval_block", _lower, "text", required=False),
        "confidence": Key("confidence", _named_or_path, "a path", required=False),
        "rerank": Key("rerank", _lower, "text", required=False),
        "sure": Key("sure", finite, "a number", required=False),
        "dataset_name": Key("dataset_name", str, "text", required=False),
        "pred_input_path": Key("predictions_path", _optional_path, "a path", required=False),
        **_SIZE_KEYS,
        "patchweights2use": Key(
            "patch_weights", _list_of(finite), "numbers, separated by commas", patches_only=True
        ),
    },
    "global_params": {
        "pooling": Key("pooling", _lower, "text"),
        "resumepath": Key("resume_path", str, "a path"),
        "threads": Key("threads", int, _WHOLE, required=False),
        "num_pcs": Key("num_pcs", int, _WHOLE + " (0: no PCA)"),
        "ngpu": Key("num_gpus", int, _WHOLE, required=False),
        "patch_sizes": Key(
            "patch_sizes", _list_of(int), "whole numbers, separated by commas", patches_only=True
        ),
        "strides": Key(
            "strides", _list_of(int), "whole numbers, separated by commas", patches_only=True
        ),
        "patch_vlad": Key("patch_vlad", _lower, "text", required=False),
        "precision": Key("precision", _lower, "text", required=False),
        "memory_mb": Key("memory_mb", int, _WHOLE + " of MiB", required=False),
        "vladv2": Key("vladv2", boolean, "True or False", required=False),
        "encoder": Key("encoder", _lower, "text", required=False),
        # Read from the checkpoint; old files may still carry it.
        "num_clusters": Key(None, int, _WHOLE, required=False),
    },
}


def config_error(source: str, message: str) -> ConfigError:
    """Return an error; very long values in its message are shortened in the middle."""
    if len(message) > _LONGEST:
        message = f"{message[: _LONGEST // 2]} ... {message[-_LONGEST // 2 :]}"
    return ConfigError(f"{source}: {message}")


def find_config(path_or_name: str | Path) -> Path:
    """Return the path of an INI file, given by path or by the name of a built-in configuration.

    Raises
    ------
    ConfigError
        There is none.
    """
    try:
        path = Path(os.path.expanduser(path_or_name))
    except ValueError:  # ~ and a name that no user can have
        path = Path(path_or_name)
    if os.path.isfile(path):
        return path
    shipped = {file.stem: file for file in sorted(CONFIG_DIR.glob("*.ini"))}
    # A bare name, or the path that the file has in the research code's checkout.
    folders = (".", "configs", "patchnetvlad/configs")
    if path.stem in shipped and path.suffix in ("", ".ini") and path.parent.as_posix() in folders:
        return shipped[path.stem]
    raise ConfigError(
        f"there is no configuration {str(path_or_name)!r}{nearest(path.stem, shipped)}; "
        f"give an INI file or one of {', '.join(shipped)}"
    )


def nearest(word: str, words: Mapping[str, Any] | tuple[str, ...]) -> str:
    """Return a hint at the closest known word, or an empty string."""
    lowered = {name.lower(): name for name in words}
    close = difflib.get_close_matches(word.lower(), list(lowered), n=1, cutoff=0.5)
    return f" (did you mean {lowered[close[0]]!r}?)" if close else ""


def hint_key(key: str, section: str) -> str:
    """Return a hint at the intended section or name of an unknown key."""
    for other, keys in KEYS.items():
        if key in keys:
            return f"; it belongs to [{other}]"
    return nearest(key, KEYS[section]) or f"; the keys are {', '.join(KEYS[section])}"


def hint_misplaced(name: str, read: Mapping[str, Mapping[str, str]]) -> str:
    """Return a hint at where a missing key is, or how to write it."""
    for section, values in read.items():
        if name in values:
            return f" (it is in [{section}])"
    return f"; add a line such as: {name} = {_EXAMPLES[name]}" if name in _EXAMPLES else ""
