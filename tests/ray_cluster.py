# SPDX-License-Identifier: MIT
"""One Ray cluster on this machine, for all tests that need one; nodes come and go."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time

import pytest
import torch
from fault_proxy import FaultProxy

# As many as this process computes with, so that products are rounded alike.
CPUS = torch.get_num_threads()
NODE = {"num_cpus": CPUS, "object_store_memory": 100 * 2**20}


def _slow_and_deadly():
    """Make images named slow take a while, and those named deadly kill who decodes them."""
    from PIL import Image, PngImagePlugin

    original, accept = Image.OPEN[PngImagePlugin.PngImageFile.format]

    def opened(file, path):
        name = os.path.basename(str(path))
        if name.startswith("slow"):
            time.sleep(1)
        if name.startswith("deadly"):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(file, path)

    Image.OPEN["PNG"] = opened, accept


def hook():
    """Return that by value, because workers cannot import this module."""
    scope = {"os": os, "signal": signal, "time": time, "__builtins__": __builtins__}
    copied = type(_slow_and_deadly)(_slow_and_deadly.__code__, scope)
    copied.__module__ = "__main__"
    return copied


@pytest.fixture(scope="session")
def storage():
    """An S3 server behind a proxy that can fail, and what the environment says of it."""
    moto_server = pytest.importorskip("moto.server")
    moto = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    with FaultProxy(*moto.get_host_and_port()) as proxy:
        proxy.environment = {
            "AWS_ENDPOINT_URL": proxy.url,
            "AWS_ACCESS_KEY_ID": "key",
            "AWS_SECRET_ACCESS_KEY": "secret",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_MAX_ATTEMPTS": "1",  # of attempts, only ours count
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }
        yield proxy
    moto.stop()


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    """Where workers put their temporary files."""
    return tmp_path_factory.mktemp("scratch")


def runtime_env(variables):
    """Return what workers are started with."""
    return {
        "worker_process_setup_hook": hook(),
        "env_vars": variables,
        # A shell gets it as it is, and the folder may have a space in its name.
        "py_executable": shlex.quote(sys.executable),
    }


@pytest.fixture(scope="session")
def cluster(storage, scratch):
    """A node, with which this process is connected."""
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False})
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env=runtime_env({**storage.environment, "TMPDIR": str(scratch)}),
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()
