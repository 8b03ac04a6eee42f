# SPDX-License-Identifier: MIT
"""Extraction and re-ranking on a Ray cluster of several nodes, some of which are killed."""

import contextlib
import functools
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from fault_proxy import KINDS
from place_data import SMALL, write_list, write_pictures
from ray_cluster import CPUS, NODE

from patchnetvlad import extract, rerank
from patchnetvlad.assets.checkpoints import resolve_checkpoint
from patchnetvlad.base.files import file_sha256, time_stamp
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.engines.journal import Journal
from patchnetvlad.engines.ray import connection, extract_worker
from patchnetvlad.engines.ray import extract as on_nodes
from patchnetvlad.engines.ray import pool as pools
from patchnetvlad.engines.ray import rerank as matching_on_nodes
from patchnetvlad.engines.ray.pool import Failure, Pool, Task
from patchnetvlad.engines.ray.rerank import RerankWorker
from patchnetvlad.errors import (
    CheckpointError,
    ClusterError,
    DeviceError,
    FeatureError,
    ImageError,
)
from patchnetvlad.features.convert import convert_features
from patchnetvlad.features.inspect import store_info, verify_features
from patchnetvlad.features.manifest import GLOBAL_FILE, INDEX_FILE, Manifest
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.features.store.records import read_record
from patchnetvlad.features.store.remote_writer import ObjectShardWriter, open_object_store
from patchnetvlad.models.checkpoint import load_state
from patchnetvlad.pipeline.inputs import search_available
from patchnetvlad.search.by_protocol import retrieve_in_groups
from patchnetvlad.search.retrieve import retrieve_by

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.cluster

CONFIG = replace(SMALL, cache_batch_size=2, n_values=(1, 5, 10))
COUNT, SLOW = 24, 40


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of pictures, with a list of them all and one of every third."""
    folder = tmp_path_factory.mktemp("images")
    names = [f"{i:02d}.png" for i in range(COUNT)]
    write_pictures(folder, names)
    write_list(folder / "query.txt", names[::3])
    return folder


@pytest.fixture(scope="module")
def slow_images(images, tmp_path_factory):
    """Images that take a second each to decode in this test's workers."""
    folder = tmp_path_factory.mktemp("waiting")
    names = [f"slow-{i:02d}.png" for i in range(SLOW)]
    for i, name in enumerate(names):
        shutil.copy(images / f"{i % COUNT:02d}.png", folder / name)
    write_list(folder / "index.txt", names)
    return folder


@pytest.fixture(scope="module")
def alone(images, tmp_path_factory):
    """What one process makes of them."""
    folder = tmp_path_factory.mktemp("alone")
    for part in ("index", "query"):
        extract(CONFIG, images / f"{part}.txt", images, folder / part, device="cpu", progress=False)
    return folder


def features(folder):
    """All that a store holds, by the names of its images."""
    with contextlib.closing(StoreIndex(folder)) as index:
        return {
            name: (bytes(read_record(folder, record, name)), record.modified)
            for name, record in index.records().items()
        }


def count_records(folder):
    """How many images are done; 0 as long as there is no store."""
    if not (folder / INDEX_FILE).is_file():
        return 0
    with contextlib.closing(StoreIndex(folder)) as index:
        return len(index.records())


def on_cluster(images, output, config=CONFIG, **keywords):
    return extract(
        config, images / "index.txt", images, output, cluster="auto", progress=False, **keywords
    )


class TestExtraction:
    def test_is_that_of_one_process(self, cluster, images, alone, tmp_path, scratch):
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
        assert not list(scratch.glob("patchnetvlad-*"))  # of workers that are gone

    def test_on_gpus(self, cluster, images, alone, tmp_path, monkeypatch, caplog):
        """Of a node that says it has one: processors of the whole cluster decode for it."""

        class OnProcessor(extract_worker.FeatureWorker):
            def __init__(self, *arguments):
                super().__init__(*arguments[:-1], False)

        monkeypatch.setattr(on_nodes, "FeatureWorker", OnProcessor)
        (tmp_path / "broken.png").write_bytes(b"no picture")
        names = [*(f"{images}/{i:02d}.png" for i in range(4)), f"{tmp_path}/broken.png"]
        (tmp_path / "list.txt").write_text("\n".join(names))
        node = cluster.add_node(**NODE, num_gpus=1)
        try:
            with (
                caplog.at_level(logging.INFO, logger="patchnetvlad"),
                pytest.raises(ImageError, match=r"\b1 of 5\b.*/broken\.png "),
            ):
                extract(
                    replace(CONFIG, precision="exact"), tmp_path / "list.txt", "",
                    tmp_path / "out", cluster="auto", progress=False,
                )  # fmt: skip
        finally:
            cluster.remove_node(node)
        assert "1 GPUs" in caplog.text
        expected = features(alone / "index")
        assert features(tmp_path / "out") == {
            name: expected[os.path.basename(name)] for name in names[:4]
        }

    def test_a_node_that_has_no_images(self, tmp_path):
        """Its errors are no reason to take images for broken."""
        decoded = functools.partial(
            extract_worker.decode_pixels, size=(96, 128), code=connection.code_version()
        )
        paths = [tmp_path / "00.png", tmp_path / "gone.png"]
        whys = [str(error) for error in decoded(paths)]
        assert all("does not exist" in why for why in whys)
        paths[0].touch()
        with pytest.raises(FeatureError, match=rf"{tmp_path}/00\.png"):
            on_nodes.check_seen(paths[0], whys[0])
        on_nodes.check_seen(paths[1], whys[1])

    def test_other_code_on_a_node(self, cluster, images, alone, tmp_path, monkeypatch):
        says = r"node .*patchnetvlad .*\b0\.9 \(01234567\)"
        monkeypatch.setattr(on_nodes, "code_version", lambda: "0.9 (01234567)")
        with pytest.raises(ClusterError, match=says):
            on_cluster(images, tmp_path / "index")
        monkeypatch.setattr(matching_on_nodes, "code_version", lambda: "0.9 (01234567)")
        with pytest.raises(ClusterError, match=says):
            rerank(
                CONFIG, images / "query.txt", images / "index.txt", alone / "query",
                alone / "index", results_dir=tmp_path / "r", cluster="auto", progress=False,
            )  # fmt: skip

    def test_a_node_without_the_checkpoint_gets_it(self, cluster, tmp_path):
        path = resolve_checkpoint(CONFIG.resume_path, CONFIG.num_pcs)
        where = str(tmp_path / f"elsewhere{path.suffix}")
        arguments = CPUS, CONFIG, where, file_sha256(path)
        describer = extract_worker.load_describer(
            *arguments, extract_worker.serve_checkpoint(str(path)), False
        )
        assert describer.dimension == CONFIG.num_pcs
        with pytest.raises(ClusterError, match=f"node .* {where}"):
            extract_worker.load_describer(*arguments, None, False)

    def test_a_checkpoint_that_does_not_fit(self, tmp_path):
        """Where its dimension is needed before workers have it."""
        state = load_state(resolve_checkpoint(CONFIG.resume_path, CONFIG.num_pcs))
        config = replace(CONFIG, num_pcs=0, resume_path=str(tmp_path / "some.pth.tar"))
        torch.save(state, config.resume_path)
        assert on_nodes._dimension(config) == state["pool.centroids"].numel()
        del state["pool.centroids"]
        torch.save(state, config.resume_path)
        with pytest.raises(CheckpointError, match=r"some\.pth\.tar .*vocabulary"):
            on_nodes._dimension(config)

    def test_npy_files_of_images_that_have_urls(self, images, tmp_path):
        names = [f"file://{images}/00.png", "01.png"]
        config = replace(CONFIG, local_features="npy")
        manifest = Manifest.of(config, names, "", root=images)
        row = np.ones(4, np.float32)
        patches = [np.ones((3, 4), np.float32)] * 2
        with open_writer(tmp_path, names, manifest) as writer:
            for i in range(2):
                writer.write(i, row * i, patches)
            writer.finish()
        assert np.load(tmp_path / GLOBAL_FILE).tolist() == [[0] * 4, [1] * 4]


class TestPool:
    """What workers do here takes no time."""

    def run(self, kind, *arguments, items=(0,)):
        def make(some):
            return Task(str(some), some)

        with Pool(kind, arguments, on_gpus=False) as pool:
            pool.add(Task("all", items))
            return list(pool.run(lambda task: (task.items,), make=make))

    def test_why_workers_cannot_start(self, cluster):
        class Worker:
            def __init__(self, cpus):
                from patchnetvlad.errors import CheckpointError

                raise CheckpointError("some.pth.tar does not fit")

            def ready(self):
                pass

        with pytest.raises(ClusterError, match=r"node \w+: some\.pth\.tar "):
            self.run(Worker)

    @pytest.mark.skipif(CPUS < 2, reason="needs two processors")
    def test_a_node_goes_on_with_the_workers_it_has(self, cluster, tmp_path, monkeypatch):
        class Worker:
            def __init__(self, cpus, file):
                import os

                with open(file, "a") as stream:
                    stream.write(".")
                if os.path.getsize(file) > 1:
                    raise MemoryError("no room for two")
                self.file = file

            def ready(self):
                pass

            def run(self, items):
                import os
                import time

                while os.path.getsize(self.file) < 1 + 3:  # tries to start another
                    time.sleep(0.1)
                time.sleep(3)
                return items

        monkeypatch.setattr(pools, "CPUS_A_WORKER", CPUS // 2)
        ((_, result),) = self.run(Worker, str(tmp_path / "starts"))
        assert result == (0,)

    def test_who_is_to_blame(self, cluster, monkeypatch):
        """Of many items the culprits are found, though they be more than workers may die."""
        monkeypatch.setattr(pools, "CRASHES", 6)

        class Worker:
            def __init__(self, cpus):
                pass

            def ready(self):
                pass

            def run(self, items):
                import os

                from patchnetvlad.errors import DeviceError
                from patchnetvlad.features.store.records import RecordError

                if 0 in items:
                    os.kill(os.getpid(), signal.SIGKILL)
                if 1 in items:
                    raise RecordError("1", "a file", "cannot be pickled", "so it says")
                if 2 in items:
                    raise DeviceError("too little memory")
                return items

        found = {task.items: result for task, result in self.run(Worker, items=(0, 1, 2, 3))}
        assert found.pop((3,)) == (3,)
        assert set(found) == {(0,), (1,), (2,)}
        assert all(isinstance(failure, Failure) and failure.blamed for failure in found.values())
        assert [found[i,].died for i in range(3)] == [True, False, False]
        assert "cannot be pickled" in found[1,].reason
        assert found[2,].reason == "too little memory"

    def test_what_is_wrong_with_folders_is_nobodys_fault(self, cluster):
        class Worker:
            def __init__(self, cpus):
                pass

            def ready(self):
                pass

            def run(self, items):
                from patchnetvlad.errors import FeatureError

                raise FeatureError("the disk is full")

        ((task, failure),) = self.run(Worker, items=(0, 1))
        assert (task.tries, failure.blamed, failure.reason) == (3, False, "the disk is full")


class TestFailures:
    def test_broken_and_deadly_images_are_in_the_manifest(self, cluster, images, tmp_path, caplog):
        """They do not stop the job, and can be repaired."""
        folder, output = tmp_path / "images", tmp_path / "out"
        folder.mkdir()
        names = ["00.png", "broken.png", "01.png", "02.png", "deadly.png", "03.png"]
        for name in names:
            shutil.copy(images / f"{names.index(name):02d}.png", folder / name)
        (folder / "broken.png").write_bytes(b"no picture")
        (folder / "list.txt").write_text("".join(f"{name}\n" for name in names))

        def run():
            extract(CONFIG, folder / "list.txt", folder, output, cluster="auto", progress=False)

        with pytest.raises(ImageError, match=r"\b2 of 6 images\b.*\b3 attempts: .*broken\.png"):
            run()
        with contextlib.closing(StoreIndex(output)) as index:
            failed, records = index.failed, index.records()
        assert set(failed) == {"broken.png", "deadly.png"}
        assert f"{folder}/broken.png " in failed["broken.png"]
        assert "killed" in failed["deadly.png"]
        assert set(records) == set(names) - set(failed)
        rows = np.load(output / "globalfeats.npy")
        assert np.isfinite(rows).all(axis=1).tolist() == [name not in failed for name in names]
        used = {f"features-{record.shard:05d}.bin" for record in records.values()}
        assert {file.name for file in output.glob("*.bin")} == used

        info = store_info(output)
        assert info.finished
        assert info.failed == failed
        assert verify_features(output, progress=False).sound
        with pytest.raises(FeatureError, match=rf"{output} .*\b2 images\b.*broken\.png"):
            convert_features(output, tmp_path / "int8", to="int8")

        # They are found for no query, and are no queries.
        (folder / "query.txt").write_text("00.png\n01.png\n")
        extract(CONFIG, folder / "query.txt", folder, tmp_path / "q", device="cpu", progress=False)
        lists = folder / "query.txt", folder / "list.txt"
        with caplog.at_level(logging.WARNING, logger="patchnetvlad"):
            result = rerank(CONFIG, *lists, tmp_path / "q", output, device="cpu", progress=False)
        assert re.search(rf"{output}: 2 index images\b.*broken\.png", caplog.text)
        assert result.reranked.shape == (2, 4)
        assert {1, 4}.isdisjoint(result.reranked.ravel().tolist())
        assert result.reranked[:, 0].tolist() == [0, 2]
        with pytest.raises(FeatureError, match=rf"{output}: 2 queries\b.*deadly\.png"):
            rerank(CONFIG, lists[1], lists[1], output, output, device="cpu", progress=False)

        np.save(tmp_path / "candidates.npy", [[0, 1], [2, 3]])
        with pytest.raises(FeatureError, match=rf"{output}: 2 index images\b.*candidates"):
            rerank(
                replace(CONFIG, n_values=(1, 2)), *lists, tmp_path / "q", output, device="cpu",
                candidates=tmp_path / "candidates.npy", progress=False,
            )  # fmt: skip

        # Repaired, they alone are described.
        for name in failed:
            shutil.copy(images / f"{names.index(name):02d}.png", folder / name)
        before = features(output)
        extract(CONFIG, folder / "list.txt", folder, output, device="cpu", progress=False)
        after = features(output)
        assert {name: after[name] for name in before} == before
        assert set(after) == set(names)
        with contextlib.closing(StoreIndex(output)) as index:
            assert index.failed == {}

    def test_they_are_found_in_no_group(self):
        """Nor do groups that have fewer candidates because of them stand in the others' way."""
        rng = np.random.default_rng(0)
        rows = rng.standard_normal((7, 4)).astype(np.float32)
        rows[[1, 6]] = np.nan
        reader = object.__new__(StoreReader)
        reader.directory, reader.failed, reader.global_descriptors = (
            "store",
            {"1": "", "6": ""},
            rows,
        )
        search = search_available(retrieve_by, reader)
        queries = rng.standard_normal((2, 4)).astype(np.float32)
        groups = [(np.array([1]), np.array([0, 1, 2])), (np.array([0]), np.array([3, 4, 5]))]
        found = retrieve_in_groups(queries, rows, 3, groups, search=search)
        assert found.shape == (2, 2)
        assert set(found[1]) == {0, 2}
        whole = retrieve_in_groups(queries, rows, 3, [groups[1], (np.array([1]), np.array([0]))])
        assert found[0, 0] == whole[0, 0]
        with pytest.raises(FeatureError, match=r"store: .*\b1 index images"):
            retrieve_in_groups(
                queries[:1], rows, 1, [(np.array([0]), np.array([6]))], search=search
            )

    def test_a_node_comes_and_is_lost(self, cluster, slow_images, tmp_path, monkeypatch, caplog):
        ready = []
        begin = Pool._begin

        def noted(pool, worker):
            begin(pool, worker)
            ready.append(worker.node)

        monkeypatch.setattr(Pool, "_begin", noted)
        # Ray adds nodes in the main thread only.
        with ThreadPoolExecutor(1) as thread, caplog.at_level(logging.WARNING, "patchnetvlad"):
            job = thread.submit(on_cluster, slow_images, tmp_path / "on")
            node = cluster.add_node(**NODE)
            while node.node_id not in ready and not job.done():
                time.sleep(0.1)
            time.sleep(1.5)  # it is at work
            cluster.remove_node(node, allow_graceful=False)
            job.result()
        assert node.node_id in ready
        assert "a worker died" in caplog.text
        extract(
            CONFIG,
            slow_images / "index.txt",
            slow_images,
            tmp_path / "alone",
            device="cpu",
            progress=False,
        )
        assert features(tmp_path / "on") == features(tmp_path / "alone")

    def test_a_killed_driver_is_resumed(self, cluster, slow_images, tmp_path, caplog):
        output = tmp_path / "out"
        program = f"""
import inspect, os, signal, sys, time
import ray
sys.path.insert(0, {os.path.dirname(__file__)!r})
import ray_cluster
import test_cluster as test
from pathlib import Path
ray.init(
    address={cluster.address!r},
    log_to_driver=False,
    runtime_env=ray_cluster.runtime_env({{}}),
)
test.on_cluster(Path({str(slow_images)!r}), {str(output)!r})
"""
        words = [sys.executable, "-c", program]
        driver = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            deadline = time.monotonic() + 120
            while count_records(output) < 4 and time.monotonic() < deadline:
                assert driver.poll() is None
                time.sleep(0.02)
        finally:
            driver.kill()
            driver.wait()
        before = features(output)
        assert len(before) >= 4
        with caplog.at_level(logging.INFO, logger="patchnetvlad"):
            on_cluster(slow_images, output)
        assert f"{len(before)} of {SLOW} images" in caplog.text
        with contextlib.closing(StoreIndex(output)) as index:
            records = index.records()
        after = features(output)
        assert {name: after[name] for name in before} == before
        assert len(after) == SLOW
        used = {f"features-{record.shard:05d}.bin" for record in records.values()}
        assert {file.name for file in output.glob("*.bin")} == used


class TestMatching:
    @pytest.mark.parametrize("kind", ["float16", "map"])
    def test_is_that_of_one_process(self, cluster, images, alone, tmp_path, monkeypatch, kind):
        config, source, root = CONFIG, alone, ""
        if kind != "float16":
            # Sizes of images are read: workers run in another folder.
            config = replace(
                CONFIG, local_features=kind, image_size=(0, 0), match_image_size=(0, 0)
            )
            monkeypatch.chdir(images.parent)
            source, root = tmp_path, images.name
            for part in ("index", "query"):
                extract(
                    config, images / f"{part}.txt", images, tmp_path / part, device="cpu",
                    progress=False,
                )  # fmt: skip
        lists = images / "query.txt", images / "index.txt"
        stores = source / "query", source / "index"
        here = rerank(
            config, *lists, *stores, dataset_root=root, results_dir=tmp_path / "here", device="cpu",
            progress=False,
        )  # fmt: skip
        there = rerank(
            config, *lists, *stores, dataset_root=root, results_dir=tmp_path / "there",
            cluster="auto", progress=False,
        )  # fmt: skip
        np.testing.assert_array_equal(here.retrieved, there.retrieved)
        np.testing.assert_array_equal(here.patch_scores, there.patch_scores)
        for method in ("NetVLAD", "PatchNetVLAD"):
            name = f"{method}_predictions.txt"
            assert (tmp_path / "here" / name).read_bytes() == (
                tmp_path / "there" / name
            ).read_bytes()
        assert not list((tmp_path / "there").glob("*.journal"))

    def test_what_a_worker_reads_with_is_let_go(self, alone, monkeypatch):
        """Its tasks are many, and the readers of each hold the records of all its candidates."""

        class Matches(contextlib.nullcontext):
            def __init__(self, config, device, patches, grids, names):
                super().__init__()
                self.patches = patches

            def run(self, queries, rows):
                return [(q, [p.shape for p in self.patches[1](rows[q][0])]) for q in queries]

        monkeypatch.setattr(matching_on_nodes, "Matcher", Matches)
        worker = RerankWorker(
            torch.get_num_threads(), connection.code_version(), CONFIG, None, on_gpu=False
        )
        whole, held = StoreReader(alone / "index"), []
        for q in range(2):
            reader = whole.part([q])
            held.append(weakref.ref(reader))
            group = SimpleNamespace(
                queries=[q], predictions=np.array([[q]]), readers=(reader, reader),
                paths=({}, {}), names=({q: "query"}, {q: "index"}),
            )  # fmt: skip
            assert worker.run(group) == [[p.shape for p in whole.patches(q)]]
            del reader, group
        assert [reader() is None for reader in held] == [True, False]

    def test_a_damaged_record_is_named_when_all_else_is_done(
        self, cluster, images, alone, tmp_path, monkeypatch
    ):
        """The queries that it does not concern are in the journal."""
        config = replace(CONFIG, n_values=(1, 2))
        lists = images / "query.txt", images / "index.txt"
        stores = alone / "query", tmp_path / "index"
        shutil.copytree(alone / "index", tmp_path / "index")
        here = rerank(config, *lists, *stores, device="cpu", progress=False)
        bad = int(here.retrieved[0, 1])
        concerned = {q for q, row in enumerate(here.retrieved.tolist()) if bad in row}
        assert len(concerned) < len(here.retrieved)
        with contextlib.closing(StoreIndex(tmp_path / "index")) as index:
            record = index.records()[f"{bad:02d}.png"]
        shard = next((tmp_path / "index").glob("*.bin"))
        content = bytearray(shard.read_bytes())
        content[record.start + record.bytes - 1] ^= 1
        shard.write_bytes(content)
        monkeypatch.setattr("patchnetvlad.engines.ray.rerank._GROUP", 1)
        with pytest.raises(FeatureError, match=rf"{bad:02d}\.png in {tmp_path}/index/.* checksum"):
            rerank(
                config,
                *lists,
                *stores,
                results_dir=tmp_path / "out",
                cluster="auto",
                progress=False,
            )
        (journal,) = (tmp_path / "out").glob("*.journal")
        scores = Journal(journal, (2, 2)).scores
        assert set(scores) == set(range(len(here.retrieved))) - concerned
        for q, values in scores.items():
            np.testing.assert_array_equal(values, here.patch_scores[q])


class TestObjectStorage:
    def test_what_an_earlier_run_left(self, tmp_path):
        """Or leaves yet, since its workers may live on for a while."""
        pytest.importorskip("fsspec")
        folder = RemoteFolder(f"file://{tmp_path}/store")
        paths = [tmp_path / "a.png", tmp_path / "b.png"]
        for path in paths:
            path.touch()
        names = [path.name for path in paths]
        manifest = Manifest.of(CONFIG, names, "one", root=tmp_path)
        other = Manifest.of(CONFIG, names, "other", root=tmp_path)

        def work(number):
            stamps = dict(enumerate(map(time_stamp, paths)))
            writer = ObjectShardWriter(folder, manifest, number, dict(enumerate(names)), stamps)
            with contextlib.closing(writer):
                writer.start()
                for i in range(2):
                    writer.write(i, np.ones(4, np.float32), [])
                writer.finish()

        def done(manifest, resume=True):
            with open_object_store(folder, names, manifest, paths, resume) as writer:
                found = writer.done.tolist()
                writer.start()
                return found, writer.last_shard

        numbers = {done(manifest)[1] for _ in range(3)}
        assert len(numbers) == 3
        work(7)
        found, last = done(manifest)
        assert found == [True, True]
        assert last >= 7
        os.utime(paths[0], ns=(1, 1))
        assert done(manifest)[0] == [False, True]
        assert done(other, resume=False)[0] == [False, False]
        work(8)
        assert done(other)[0] == [False, False]

    def test_a_fifth_of_the_requests_fail(
        self, cluster, storage, images, alone, tmp_path, monkeypatch, caplog, scratch
    ):
        for name, value in storage.environment.items():
            monkeypatch.setenv(name, value)
        s3fs = pytest.importorskip("s3fs")
        files = s3fs.S3FileSystem()
        files.mkdir("city")
        files.put(f"{images}/", "city/images/", recursive=True)
        names = (images / "index.txt").read_text().split()
        (tmp_path / "list.txt").write_text("\n".join([*names, "broken.png"]))
        files.pipe("city/images/broken.png", b"no picture")
        url = "s3://city/features"

        def run():
            extract(
                CONFIG, tmp_path / "list.txt", "s3://city/images", url, cluster="auto",
                progress=False,
            )  # fmt: skip

        storage.reset(share=0.2)
        # The driver dies half-way.
        original = Pool.run

        def some(*arguments, **keywords):
            for n, result in enumerate(original(*arguments, **keywords)):
                if n == 4:
                    raise KeyboardInterrupt
                yield result

        with monkeypatch.context() as patch:
            patch.setattr(Pool, "run", some)
            with pytest.raises(KeyboardInterrupt):
                run()
        left = set(scratch.glob("patchnetvlad-*"))  # by workers that were at work
        with (
            caplog.at_level(logging.INFO, logger="patchnetvlad"),
            pytest.raises(ImageError, match=r"\b1 of 25\b.*/broken\.png "),
        ):
            run()
        done = re.search(r"(\d+) of 25 images .*s3://city/features", caplog.text)
        assert 4 <= int(done[1]) < 25
        assert set(scratch.glob("patchnetvlad-*")) <= left
        assert sum(storage.counts[kind] for kind in KINDS) > 20

        storage.reset()
        (tmp_path / "fetched").mkdir()
        files.get("city/features/", f"{tmp_path}/fetched/", recursive=True)
        found = features(tmp_path / "fetched")
        expected = features(alone / "index")
        assert {name: content for name, (content, _) in found.items()} == {
            name: content for name, (content, _) in expected.items()
        }
        info = store_info(url)
        assert info.finished
        assert list(info.failed) == ["broken.png"]
        assert info.dead_bytes == 0
        assert not [name for name in files.ls("city/features") if name.endswith(".json")]

        storage.reset(share=0.2, seed=1)
        lists = images / "query.txt", tmp_path / "list.txt"
        there = rerank(CONFIG, *lists, alone / "query", url, cluster="auto", progress=False)
        storage.reset()
        here = rerank(
            CONFIG, lists[0], images / "index.txt", alone / "query", alone / "index",
            device="cpu", progress=False,
        )  # fmt: skip
        np.testing.assert_array_equal(there.reranked, here.reranked)
        np.testing.assert_array_equal(there.patch_scores, here.patch_scores)


class TestBadInput:
    def test_no_ray(self, images, tmp_path, monkeypatch):
        monkeypatch.setitem(sys.modules, "ray", None)
        with pytest.raises(ClusterError, match=r"pip install 'patchnetvlad\[ray\]'"):
            on_cluster(images, tmp_path)

    def test_no_cluster(self, images, tmp_path):
        """In a process of its own, which belongs to none."""
        words = [
            sys.executable, "-m", "patchnetvlad.cli.feature_extract",
            "--config_path", "demo",
            "--dataset_file_path", str(images / "index.txt"),
            "--dataset_root_dir", str(images),
            "--output_features_dir", str(tmp_path),
            "--cluster", "127.0.0.1:1",
        ]  # fmt: skip
        done = subprocess.run(words, capture_output=True, text=True, timeout=200)
        assert done.returncode == 2
        assert re.search("--cluster 127.0.0.1:1: .*ray start --head.*--cluster local", done.stderr)
        assert "Traceback" not in done.stderr

    @pytest.mark.parametrize("device", ["cuda", "cuda:0", "mps"])
    def test_devices(self, cluster, images, tmp_path, device):
        with pytest.raises(DeviceError, match=f"--device {device}"):
            on_cluster(images, tmp_path, device=device)

    def test_other_features_are_refused(self, cluster, images, alone, tmp_path):
        shutil.copytree(alone / "index", tmp_path / "index")
        config = replace(CONFIG, local_features="map")
        with pytest.raises(FeatureError, match="local_features: float16 -> map"):
            on_cluster(images, tmp_path / "index", config)
        assert features(tmp_path / "index") == features(alone / "index")
