# SPDX-License-Identifier: MIT
"""Extraction and re-ranking on a Ray cluster of several nodes, some of which are killed."""

import contextlib
import os
import signal
import time

import numpy as np
import pytest
import torch
from PIL import Image

from patchnetvlad import extract
from patchnetvlad.config import Config
from patchnetvlad.features.store import StoreIndex, read_record

ray = pytest.importorskip("ray")
from ray.cluster_utils import Cluster  # noqa: E402

# As many as this process computes with, so that products are rounded alike.
CPUS = torch.get_num_threads()
NODE = {"num_cpus": CPUS, "object_store_memory": 80 * 2**20, "include_dashboard": False}
CONFIG = Config(
    resume_path="./pretrained_models/imagenet_WPCA",
    num_pcs=128,
    image_size=(96, 128),
    match_image_size=(96, 128),
    patch_sizes=(2, 3),
    strides=(1, 1),
    patch_weights=(0.5, 0.5),
    cache_batch_size=2,
    n_values=(1, 5, 10),
)
COUNT = 24


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of pictures, with a list of them all and one of every third."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    names = [f"{i:02d}.png" for i in range(COUNT)]
    for name in names:
        coarse = Image.fromarray(rng.integers(0, 255, (12, 16, 3), dtype=np.uint8))
        coarse.resize((160, 120), Image.Resampling.BICUBIC).save(folder / name)
    (folder / "index.txt").write_text("".join(f"{name}\n" for name in names))
    (folder / "query.txt").write_text("".join(f"{name}\n" for name in names[::3]))
    return folder


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """What one process makes of them."""
    folder = tmp_path_factory.mktemp("alone")
    for part in ("index", "query"):
        extract(CONFIG, images / f"{part}.txt", images, folder / part, device="cpu", progress=False)
    return folder


def _slow_and_deadly():
    """Make images named slow take a while, and those named deadly kill who decodes them."""
    from PIL import Image

    original = Image.open

    def opened(path, *arguments, **keywords):
        time.sleep(0.15)
        if "deadly" in str(path):
            os.kill(os.getpid(), signal.SIGKILL)
        return original(path, *arguments, **keywords)

    Image.open = opened


@pytest.fixture(scope="module")
def cluster():
    cluster = Cluster(initialize_head=True, head_node_args=NODE)
    # By value, because workers cannot import this module.
    scope = {"os": os, "signal": signal, "time": time, "__builtins__": __builtins__}
    hook = type(_slow_and_deadly)(_slow_and_deadly.__code__, scope)
    hook.__module__ = "__main__"
    ray.init(
        address=cluster.address,
        log_to_driver=False,
        logging_level="ERROR",
        runtime_env={"worker_process_setup_hook": hook},
    )
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def features(folder):
    """All that a store holds, by the names of its images."""
    with contextlib.closing(StoreIndex(folder)) as index:
        return {
            name: (bytes(read_record(folder, record, name)), record.modified)
            for name, record in index.records().items()
        }


def on_cluster(images, output, config=CONFIG, **keywords):
    return extract(
        config, images / "index.txt", images, output, cluster="auto", progress=False, **keywords
    )


class TestExtraction:
    def test_is_that_of_one_process(self, cluster, images, alone, tmp_path):
        rows = on_cluster(images, tmp_path)
        np.testing.assert_array_equal(rows, np.load(alone / "index/globalfeats.npy"))
        assert features(tmp_path) == features(alone / "index")
        assert sorted(file.suffix for file in tmp_path.iterdir() if file.suffix != ".bin") == [
            ".lock",
            ".npy",
            ".sqlite",
        ]
        # One process goes on with it, and finds nothing to do.
        before = features(tmp_path)
        extract(CONFIG, images / "index.txt", images, tmp_path, device="cpu", progress=False)
        assert features(tmp_path) == before
