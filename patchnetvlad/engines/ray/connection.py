# SPDX-License-Identifier: MIT
"""Connecting to a Ray cluster, and checking that its nodes run the same code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import socket
from collections.abc import Iterator
from typing import Any

from patchnetvlad.assets.folders import PACKAGE_DIR
from patchnetvlad.errors import ClusterError
from patchnetvlad.version import __version__

logger = logging.getLogger(__name__)

_REACH_SECONDS = 10.0


def import_ray() -> Any:
    """Import Ray; ClusterError if it is not installed."""
    try:
        import ray
    except ImportError:
        raise ClusterError(
            "a cluster needs the package ray, which is not installed: pip install "
            "'patchnetvlad[ray]'"
        ) from None
    return ray


@functools.cache
def code_version() -> str:
    """Return the version of this package, with a digest of its code."""
    digest = hashlib.sha256()
    for file in sorted(PACKAGE_DIR.rglob("*.py")):
        digest.update(file.relative_to(PACKAGE_DIR).as_posix().encode() + b"\0" + file.read_bytes())
    return f"{__version__} ({digest.hexdigest()[:8]})"


def check_code(wanted: str) -> None:
    """Raise ClusterError if this node runs a different version of the package than the driver.

    Parameters
    ----------
    wanted : str
        :func:`code_version` of the driver.
    """
    if code_version() != wanted:
        raise ClusterError(
            f"node {socket.gethostname()} has patchnetvlad {code_version()}, and the driver "
            f"{wanted}; install the same on all nodes"
        )


@contextlib.contextmanager
def connected(address: str) -> Iterator[None]:
    """Connect to a cluster, and disconnect at the end.

    Where this process is connected to one already, as in a notebook that called ``ray.init``, that
    is used, and stays connected.

    Parameters
    ----------
    address : str
        ``local`` starts Ray on this machine alone, for as long as the block lasts. ``auto`` finds
        the cluster that this machine belongs to (``RAY_ADDRESS``, or a ``ray start`` here).
        Everything else is an address: ``host:port`` of the head node, or ``ray://host:port`` of
        its client server.

    Yields
    ------
    None

    Raises
    ------
    ClusterError
        Ray is not installed, or there is no cluster.
    """
    ray = import_ray()
    if ray.is_initialized():
        _report(ray)
        yield
        return
    _check_reachable(address)
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError, OSError, TimeoutError) as error:
        raise _unreachable_error(address, error) from None
    try:
        _report(ray)
        yield
    finally:
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Raise ClusterError if nothing listens at an address; Ray itself would wait for minutes."""
    if address == "auto":
        address = os.environ.get("RAY_ADDRESS", "")
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        return  # Ray reports what is wrong with it
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise _unreachable_error(address, error) from None


def _unreachable_error(address: str, error: Exception) -> ClusterError:
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    text = (
        f"--cluster {address}: no Ray cluster is reached ({reason}); start one by `ray start "
        "--head`, or give --cluster local for this machine alone"
    )
    if address not in ("auto", "local") and "RAY_AUTH_MODE" not in os.environ:
        text += "; if it asks for a token, as Ray's do by default, set RAY_AUTH_MODE=token"
    return ClusterError(text)


def _report(ray: Any) -> None:
    nodes = [node for node in ray.nodes() if node["Alive"]]
    total = ray.cluster_resources()
    dashboard = ray.get_runtime_context().worker.node.webui_url if is_direct() else ""
    logger.info(
        "Ray %s: %d node%s, %g CPUs, %g GPUs%s",
        ray.__version__,
        len(nodes),
        "s" * (len(nodes) != 1),
        total.get("CPU", 0),
        total.get("GPU", 0),
        f", dashboard http://{dashboard}" if dashboard else "",
    )


def is_direct() -> bool:
    """Return True if this process is part of the cluster, not connected through ``ray://``."""
    from ray.util.client import ray as client

    return not client.is_connected()


def has_gpus() -> bool:
    """Return True if the connected cluster has GPUs."""
    return bool(import_ray().cluster_resources().get("GPU", 0) >= 1)
