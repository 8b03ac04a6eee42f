# SPDX-License-Identifier: MIT
"""FAISS indexes on disk, each with a fingerprint of the descriptors it was built from."""

from __future__ import annotations

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import file_sha256, make_folder, new_file, stream_sha256
from patchnetvlad.base.text import parse_json
from patchnetvlad.errors import OutputError
from patchnetvlad.search.index import build_index, reason_of

logger = logging.getLogger(__name__)
SIDECAR = ".fingerprint.json"


def load_or_build(
    index: NDArray[np.float32],
    factory: str,
    index_path: str | Path | None,
    gpu: bool,
    parameters: str = "",
) -> Any:
    """Read the saved index if it fits; otherwise build it, and save it if there is a path.

    The parameters are those of :func:`~patchnetvlad.search.retrieve.retrieve`.
    """
    path = Path(index_path) if index_path is not None else None
    if path is None:
        return build_index(index, factory, gpu, parameters)
    want = {
        "format": 1,
        "factory": factory,
        "images": index.shape[0],
        "dimensions": index.shape[1],
        "descriptors": hashlib.sha256(index.data).hexdigest(),
    }
    built = load_index(path, want)
    if built is None:
        make_folder(path.parent)  # before the time that building takes
        built = build_index(index, factory, gpu, parameters)
        save_index(built, path, want)
    return built


def load_index(path: Path, want: dict[str, Any]) -> Any:
    """Read a saved index; None if there is none or, with a log message, if it does not fit."""
    import faiss

    sidecar = path.with_name(path.name + SIDECAR)
    if path.is_dir():
        raise OutputError(f"faiss_index_path = {path} is a folder; name a file")
    if not path.exists():
        return None
    try:
        have = parse_json(sidecar.read_text(encoding="utf-8"))
        if not isinstance(have, dict):
            raise ValueError("not a fingerprint")
        for key, value in want.items():
            if have.get(key) != value:
                logger.info(
                    "%s is built again: its %s is %s, not %s",
                    path,
                    "SHA-256 of the descriptors" if key == "descriptors" else key,
                    have.get(key),
                    value,
                )
                return None
        with path.open("rb") as file:  # One file throughout, even if another process replaces it.
            if stream_sha256(file) != have.get("file"):
                raise ValueError("not the file that the fingerprint is of")
            file.seek(0)
            untyped: Any = faiss  # its stubs lack the reader
            built = faiss.read_index(untyped.PyCallbackIOReader(file.read))
        if (built.ntotal, built.d) != (want["images"], want["dimensions"]):
            raise ValueError(f"{built.ntotal} descriptors of {built.d} dimensions")
    except FileNotFoundError:
        # save_index always writes it, so this may be anything.
        raise OutputError(
            f"faiss_index_path = {path} is not overwritten: it has no {sidecar.name}, so it is "
            "not known to be a saved index; name another file or delete it"
        ) from None
    except (OSError, ValueError, RuntimeError) as error:
        logger.info("%s is built again: it is damaged (%s)", path, reason_of(error))
        return None
    logger.info("using %s of %s", want["factory"], path)
    return built


def save_index(built: Any, path: Path, fingerprint: dict[str, Any]) -> None:
    """Write an index and its fingerprint atomically."""
    import faiss

    sidecar = path.with_name(path.name + SIDECAR)
    try:
        # The fingerprint names the file's own hash, so that a run that ends between these two
        # leaves a pair that does not match; in this order, the inner one first, it leaves no index
        # without one.
        with new_file(path) as index, new_file(sidecar) as about:
            faiss.write_index(built, str(index))
            text = json.dumps({**fingerprint, "file": file_sha256(index)}, indent=1)
            about.write_text(text + "\n", encoding="utf-8")
    except (OSError, RuntimeError) as error:  # of FAISS, in its words
        raise OutputError(
            f"faiss_index_path = {path} cannot be written: {reason_of(error)}; name another file"
        ) from None
    logger.info("kept the index in %s", path)
