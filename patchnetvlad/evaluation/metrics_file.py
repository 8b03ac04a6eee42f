# SPDX-License-Identifier: MIT
"""``metrics.json``: all metrics of a run, with their provenance."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from patchnetvlad.assets.data_files import resolve_ground_truth
from patchnetvlad.base.files import file_sha256, replace_text
from patchnetvlad.base.text import json_text, plain_json
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import OutputError
from patchnetvlad.evaluation.metrics import Metrics
from patchnetvlad.version import __version__

FORMAT = "patchnetvlad metrics 1"


def provenance(
    config: Config,
    queries: ImageList,
    index: ImageList,
    *,
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    checkpoint: str | None = None,
    extra: Mapping[str, Any] | None = None,
    date: datetime | None = None,
) -> dict[str, Any]:
    """Return the provenance of metrics, so that they can be cited and reproduced.

    Files are named without their folders, and told apart by their SHA-256.

    Parameters
    ----------
    config : Config
    queries, index : ImageList
    ground_truth : str or Path, optional
        The file, or the name of a benchmark's.
    threshold : float, optional
        Distance of a positive that was used, in the unit of the ground truth.
    checkpoint : str, optional
        SHA-256 of the weights, as manifests of features hold it.
    extra : mapping, optional
        More entries, such as a protocol's name; they may hold paths, numbers and arrays.
    date : datetime, optional
        By default now.

    Returns
    -------
    dict
        JSON's types alone.

    Raises
    ------
    OutputError
        A file cannot be read any more.
    GroundTruthError
        There is no such ground truth.
    """
    settings = asdict(config)
    settings["source"] = Path(config.source).name
    truth = None
    if ground_truth is not None:
        truth = {**_file(resolve_ground_truth(ground_truth)), "threshold": threshold}
    content = {
        "version": __version__,
        "date": (date or datetime.now(timezone.utc)).isoformat(timespec="seconds"),
        "config": settings,
        "checkpoint": {"name": config.resume_path, "num_pcs": config.num_pcs, "sha256": checkpoint},
        "queries": {**_list(queries), "images": len(queries)},
        "index": {**_list(index), "images": len(index)},
        "ground_truth": truth,
        **(extra or {}),
    }
    return plain_json(content)


def write_metrics(
    path: str | Path, methods: Mapping[str, Metrics], provenance: Mapping[str, Any]
) -> None:
    """Write the metrics of methods, and their provenance, as JSON.

    Parameters
    ----------
    path : str or Path
        Usually ``metrics.json``. Replaced as a whole; its folder must exist.
    methods : mapping of str to Metrics
        By name, such as ``"NetVLAD"`` and ``"PatchNetVLAD"``.
    provenance : mapping
        From :func:`provenance`; anything that is no number that JSON knows becomes null.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    content = {
        "format": FORMAT,
        "provenance": provenance,
        "methods": {name: metrics.to_dict() for name, metrics in methods.items()},
    }
    replace_text(Path(path), [json_text(plain_json(content))])


def _list(images: ImageList) -> dict[str, str]:
    if images.path.is_file():
        return _file(images.path)
    # A folder, or several lists in one, of a protocol.
    names = "".join(f"{name}\n" for name in images.names).encode(errors="surrogateescape")
    return {"file": images.path.name, "sha256": hashlib.sha256(names).hexdigest()}


def _file(path: Path) -> dict[str, str]:
    try:
        return {"file": path.name, "sha256": file_sha256(path)}
    except OSError as error:
        raise OutputError(f"{path} cannot be read any more: {error.strerror}") from None
