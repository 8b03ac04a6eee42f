# SPDX-License-Identifier: MIT
"""The data set tower on a Ray cluster whose second node comes and is lost, against one process."""

import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
from conftest import SHARED, needs_shared
from ray_cluster import NODE

from patchnetvlad import extract, rerank
from patchnetvlad.config import Config
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.features.store.records import read_record

pytest.importorskip("ray")

pytestmark = [
    needs_shared,
    pytest.mark.cluster,
    pytest.mark.slow,
    pytest.mark.timeout(3600),
]
TOWER = SHARED / "tower"
CONFIG = Config(
    resume_path=str(SHARED / "checkpoints" / "reference_WPCA"), num_pcs=128, cache_batch_size=4
)


def with_a_node_lost(cluster, seconds, job):
    """Do a job while a node is added, and killed so many seconds later."""
    with ThreadPoolExecutor(1) as thread:  # Ray adds nodes in the main thread only
        future = thread.submit(job)
        node = cluster.add_node(**NODE)
        time.sleep(seconds)
        assert not future.done()
        cluster.remove_node(node, allow_graceful=False)
        return future.result()


def features(folder):
    with contextlib.closing(StoreIndex(folder)) as index:
        records = index.records()
    assert len({(record.shard, record.start) for record in records.values()}) == len(records)
    used = {f"features-{record.shard:05d}.bin" for record in records.values()}
    assert {file.name for file in folder.glob("*.bin")} == used
    return {name: bytes(read_record(folder, record, name)) for name, record in records.items()}


def test_tower_is_that_of_one_process(cluster, tmp_path):
    for part in ("query", "index"):
        listed = TOWER / f"{part}.txt"
        extract(CONFIG, listed, TOWER, tmp_path / "here" / part, device="cpu", progress=False)
        output = tmp_path / "there" / part
        job = partial(extract, CONFIG, listed, TOWER, output, cluster="auto", progress=False)
        if part == "query":
            job()
        else:
            with_a_node_lost(cluster, 30, job)
        found = features(output)
        assert found == features(tmp_path / "here" / part)
        assert len(found) == len(listed.read_text().split())

    def match(where, **keywords):
        folder = tmp_path / where
        return rerank(
            CONFIG,
            TOWER / "query.txt",
            TOWER / "index.txt",
            folder / "query",
            folder / "index",
            ground_truth=TOWER / "ground_truth.npz",
            results_dir=folder / "results",
            progress=False,
            **keywords,
        )

    here = match("here", device="cpu")
    there = with_a_node_lost(cluster, 15, partial(match, "there", cluster="auto"))
    np.testing.assert_array_equal(there.retrieved, here.retrieved)
    np.testing.assert_array_equal(there.patch_scores, here.patch_scores)
    files = ("NetVLAD_predictions.txt", "PatchNetVLAD_predictions.txt", "recalls.txt")
    for name in files:
        mine, theirs = (tmp_path / where / "results" / name for where in ("here", "there"))
        assert mine.read_bytes() == theirs.read_bytes()
    assert (tmp_path / "there/results/recalls.txt").read_bytes() == (
        TOWER / "expected/B/recalls.txt"
    ).read_bytes()
