# SPDX-License-Identifier: MIT
"""Choosing the engine: this process, or a Ray cluster."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from patchnetvlad.engines.engine import Engine
from patchnetvlad.engines.local import LocalEngine
from patchnetvlad.engines.ray.connection import connected
from patchnetvlad.engines.ray.engine import RayEngine


@contextlib.contextmanager
def open_engine(cluster: str | None, device: str, progress: bool) -> Iterator[Engine]:
    """Open the engine of a run: a cluster's if there is one, otherwise this process's."""
    if cluster is None:
        yield LocalEngine(device, progress)
        return
    with connected(cluster):
        yield RayEngine(device, progress)
