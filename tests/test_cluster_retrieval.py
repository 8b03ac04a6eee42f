# SPDX-License-Identifier: MIT
"""Retrieval by shards on a cluster of two nodes, against retrieval on one machine."""

from __future__ import annotations

import json
import logging
import os
import re
import threading

import faiss
import numpy as np
import pytest
from ray_cluster import CPUS, NODE
from test_retrieval import clustered

from patchnetvlad.datasets.benchmarks import Benchmark
from patchnetvlad.engines.ray import connection, search_worker
from patchnetvlad.engines.ray import search as sharded
from patchnetvlad.engines.ray.search import merge
from patchnetvlad.errors import ClusterError, ConfigError, FeatureError, OutputError
from patchnetvlad.search import exact, retrieve
from patchnetvlad.search import index as search_index
from patchnetvlad.search.by_protocol import retrieve_for_benchmark
from patchnetvlad.search.index_file import SIDECAR
from patchnetvlad.search.rows import Rows

ray = pytest.importorskip("ray")

pytestmark = pytest.mark.cluster

COUNT, DIMS = 2600, 32  # three blocks, the last not whole


@pytest.fixture(scope="module", autouse=True)
def two_nodes(cluster):
    """Search on a second node as well, with all threads that they have."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(CPUS)
    node = cluster.add_node(**NODE)
    cluster.wait_for_nodes()
    yield
    faiss.omp_set_num_threads(before)
    cluster.remove_node(node)


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="patchnetvlad")
    return caplog


@pytest.fixture(scope="module")
def world():
    return clustered(60, 1), clustered(COUNT, 2)


@pytest.fixture
def shards(cluster, monkeypatch):
    """Give a function that retrieves with three shards, and collect these."""
    made = []
    start = sharded._Shards._start

    def starting(self, shard):
        start(self, shard)
        made.append(shard)

    monkeypatch.setattr(sharded._Shards, "_start", starting)

    def search(*args, num_shards=3, **options):
        made.clear()
        return sharded.retrieve(*args, num_shards=num_shards, progress=False, **options)

    search.made = made
    return search


@pytest.fixture
def file(world, tmp_path):
    np.save(tmp_path / "globalfeats.npy", world[1])
    return tmp_path / "globalfeats.npy"


def in_process(queries, index, top_k, factory="Flat", num_shards=3, path=None):
    """Do what the driver and its actors do, within this process."""
    plan = search_worker.SearchPlan(
        factory, "", *index.shape, faiss.omp_get_max_threads(), path, connection.code_version()
    )
    trained = []
    if not plan.empty().is_trained:
        data = search_worker.trained_index(plan, [ray.put(index)], np.arange(len(index)))
        trained = [ray.put(data)]
    cuts = sharded._cuts(len(index), num_shards)
    shards = [
        search_worker.IndexShard(
            plan, [ray.put(index[a:b])], a, b - 1, f"shard-{i}-of-{len(cuts)}", trained
        )
        for i, (a, b) in enumerate(cuts)
    ]
    return np.concatenate(
        [
            merge([shard.search(queries[a:b], top_k) for shard in shards], top_k)
            for a, b in sharded._batches(*queries.shape)
        ]
    )[:, : len(index)]


class TestExact:
    @pytest.mark.parametrize(
        ("num_queries", "count", "dims", "top_k"),
        [
            (1, 5000, 64, 10),
            (19, 4097, 128, 100),  # compared one by one
            (300, 3100, 512, 25),  # by products of matrices, with an odd last block
            (257, 3077, 500, 1),
            (1001, 2999, 130, 150),
            (4400, 2100, 33, 40),  # two blocks of queries
            (8200, 2049, 16, 3),  # two batches
            (30, 40, 8, 100),
        ],
    )
    def test_equals_one_index(self, cluster, num_queries, count, dims, top_k):
        rng = np.random.default_rng(count)
        index = rng.standard_normal((count, dims), np.float32)
        queries = rng.standard_normal((num_queries, dims), np.float32)
        copies = count // 2  # half of all images are copies of others, or queries
        index[rng.permutation(count)[:copies]] = index[rng.integers(0, count, copies)]
        index[rng.integers(0, count, 9)] = queries[rng.integers(0, num_queries, 9)]
        want = retrieve.retrieve(queries, index, top_k)
        np.testing.assert_array_equal(in_process(queries, index, top_k), want)

    def test_on_two_nodes(self, shards, monkeypatch):
        rng = np.random.default_rng(1)
        index = rng.standard_normal((3077, 512), np.float32)
        index[rng.permutation(3077)[:2000]] = index[rng.integers(0, 3077, 2000)]
        queries = rng.standard_normal((301, 512), np.float32)
        nodes = []
        search = sharded._Shards.search

        def searching(self, *args):
            nodes.extend(map(node_of, self.shards))
            return search(self, *args)

        monkeypatch.setattr(sharded._Shards, "search", searching)
        found = shards(queries, index, 100)
        np.testing.assert_array_equal(found, retrieve.retrieve(queries, index, 100))
        assert len(nodes) == 3
        assert len(set(nodes)) == 2

    @pytest.mark.parametrize("top_k", [1, 7, 100, 1500])
    @pytest.mark.parametrize("num_queries", [3, 400])
    def test_ties_across_shards(self, cluster, num_queries, top_k):
        """Few places, many images of each: ties at every cut, in all shards."""
        rng = np.random.default_rng(top_k)
        places = rng.integers(-2, 3, (5, 320)).astype(np.float32)  # distances have no rounding
        index = places[rng.integers(0, 5, COUNT)]
        queries = places[rng.integers(0, 5, num_queries)]
        found = in_process(queries, index, top_k)
        distance = ((queries[:, None] - places) ** 2).sum(2)
        nearer = {tuple(p): i for i, p in enumerate(places.tolist())}
        place = np.array([nearer[tuple(row)] for row in index.tolist()])
        truth = np.argsort(distance[:, place], axis=1, kind="stable")[:, :top_k]
        np.testing.assert_array_equal(found, truth)
        np.testing.assert_array_equal(retrieve.retrieve(queries, index, top_k), truth)

    def test_random_cuts(self, cluster):
        rng = np.random.default_rng(5)
        for num_shards in (1, 2, 5):
            count, dims = int(rng.integers(3000, 6000)), int(rng.integers(100, 600))
            index = rng.standard_normal((count, dims), np.float32)
            queries = index[rng.integers(0, count, 270)] + np.float32(0.01)
            found = in_process(queries, index, 30, num_shards=num_shards)
            np.testing.assert_array_equal(found, retrieve.retrieve(queries, index, 30))

    def test_default_number(self, cluster, world):
        assert sharded._places(2) == 2
        assert sharded._places(1) == 4
        assert sharded._places(64) == 2

    def test_file_is_read_by_workers(self, shards, world, file, monkeypatch):
        queries, index = world
        monkeypatch.setattr(sharded, "_send", None)  # nothing is sent
        found = shards(queries, Rows.open(f"file://{file}"), 20)
        np.testing.assert_array_equal(found, retrieve.retrieve(queries, index, 20))

    def test_file_that_workers_do_not_see(self, shards, world, file, log, monkeypatch):
        """The driver's own machine has the file; it is as if the workers' disk were another."""
        queries, index = world
        rows = Rows.open(file)

        def read(self):
            assert self.path == str(file)
            return index[np.asarray(self.numbers)]

        os.utime(file)  # workers find a file with another time
        monkeypatch.setattr(Rows, "read", read)
        found = shards(queries, rows, 20, factory="IVF16,Flat")
        want = retrieve.retrieve(queries, index, 20, factory="IVF16,Flat")
        assert (found == want).mean() > 0.99
        assert re.search(r"IVF16,Flat .*\b2600 of 2600 images: .*sent", log.text)
        assert re.search("index images 1024-2047 .*sent", log.text)
        assert f"({file} " in log.text

    def test_types(self, shards, world):
        queries, index = world
        half = index.astype(np.float16)
        found = shards(queries.astype(float), np.asfortranarray(half), 7)
        np.testing.assert_array_equal(found, retrieve.retrieve(queries, half, 7))

    def test_groups_of_a_protocol(self, shards, world, file):
        queries, index = world
        names = [["cph/a.jpg", "sf/a.jpg"][i % 2] for i in range(len(index))]
        benchmark = Benchmark("", "", group_folder="cph|sf", cutouts=1)
        arguments = names[: len(queries)], names, 9
        want = retrieve_for_benchmark(benchmark, queries, index, *arguments)
        search = lambda *args: shards(*args[:3], **vars(args[3]))  # noqa: E731
        options = {"search": search}
        found = retrieve_for_benchmark(benchmark, queries, Rows.open(file), *arguments, **options)
        np.testing.assert_array_equal(found, want)
        options["spec"] = retrieve.IndexSpec("IVF8,Flat", "nprobe=8")
        found = retrieve_for_benchmark(benchmark, queries, Rows.open(file), *arguments, **options)
        np.testing.assert_array_equal(found, want)
        options["spec"] = retrieve.IndexSpec("IVF8,Flat", "efSearch=8")
        with pytest.raises(ConfigError, match=r"IVF8,Flat .*efSearch"):
            retrieve_for_benchmark(benchmark, queries, Rows.open(file), *arguments, **options)

    def test_other_code_on_a_node(self, shards, world, monkeypatch):
        monkeypatch.setattr(sharded, "code_version", lambda: "0.9 (01234567)")
        for factory in ("Flat", "IVF8,Flat"):
            with pytest.raises(ClusterError, match=r"node .*patchnetvlad .*\b0\.9 \(01234567\)"):
                shards(*world, 3, factory=factory)

    def test_other_arithmetic_is_said(self, shards, world, log, monkeypatch):
        assert search_worker.arithmetic_digest() == search_worker.arithmetic_digest()
        monkeypatch.setattr(search_worker, "arithmetic_digest", lambda: "of another processor")
        monkeypatch.setattr(sharded, "arithmetic_digest", lambda: "of another processor")
        shards(*world, 3)
        assert "round distances" in log.text


class TestApproximate:
    # Bounds on the share of candidates that are those of exact search.
    @pytest.mark.parametrize(
        ("factory", "share"),
        [
            ("SQfp16", 0.99),
            ("HNSW16", 0.97),
            ("IVF16,Flat", 0.95),
            ("IVF32_HNSW8,Flat", 0.9),
            ("IDMap,IVF16,SQfp16", 0.95),
            ("IVF16,PQ8x4,RFlat", 0.9),
            ("PCA24,Flat", 0.6),
        ],
    )
    def test_recall(self, cluster, world, factory, share):
        queries, index = world
        found = in_process(queries, index, 30, factory)
        assert found.shape == (60, 30)
        assert all(len(set(row)) == 30 for row in found.tolist())
        truth = retrieve.retrieve(queries, index, 30)
        same = [len(np.intersect1d(*rows)) / 30 for rows in zip(found, truth, strict=True)]
        assert np.mean(same) >= share

    def test_parameters(self, shards, world):
        queries, index = world
        truth = retrieve.retrieve(queries, index, 10)
        found = shards(queries, index, 10, factory="IVF64,Flat", parameters="nprobe=64")
        np.testing.assert_array_equal(found, truth)
        found = shards(queries, index, 10, factory="IVF64,Flat", parameters="nprobe=1")
        assert (found != truth).any()
        with pytest.raises(ConfigError, match=r"IVF64,Flat .*efSearch"):
            shards(queries, index, 10, factory="IVF64,Flat", parameters="efSearch=3")

    @pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF16,PQ8x4"])
    def test_as_one_index(self, cluster, world, factory):
        """Trained with the same rows and searched in the same lists, it finds the same."""
        queries, index = world
        want = retrieve.retrieve(queries, index, 10, factory=factory)
        found = in_process(queries, index, 10, factory)
        same = [len(np.intersect1d(*rows)) / 10 for rows in zip(found, want, strict=True)]
        assert np.mean(same) > 0.99

    def test_sample(self, shards, world, file, monkeypatch):
        """An index is trained with a sample, as large as is needed, the same each time."""
        queries, index = world
        monkeypatch.setattr(sharded, "TRAINING_ROWS", 3)
        source, asked = sharded._source, []

        def giving(given, rows):
            asked.append(rows)
            return source(given, rows)

        monkeypatch.setattr(sharded, "_source", giving)
        found = [shards(queries, Rows.open(file), 10, factory="IVF16,PQ8x4") for _ in "ab"]
        np.testing.assert_array_equal(*found)
        first, again = (rows for rows in asked if not isinstance(rows, slice))
        np.testing.assert_array_equal(first, again)
        assert len(np.unique(first)) == 768
        np.testing.assert_array_equal(Rows.open(file)[first].read(), index[first])
        truth = retrieve.retrieve(queries, index, 10)
        assert np.mean([len(np.intersect1d(*r)) for r in zip(found[0], truth, strict=True)]) > 5

    def test_missing_ones_are_searched_exactly(self, shards, log):
        """Lists that the queries lie far from hold all images but a few."""
        index = clustered(COUNT, 3)
        index[:2590] = index[0]
        queries = clustered(20, 4)
        want = retrieve.retrieve(queries, index, 50, factory="IVF128,Flat")
        assert re.search(r"IVF128,Flat .*\b50 images\b.*exactly", log.text)
        log.clear()
        np.testing.assert_array_equal(shards(queries, index, 50, factory="IVF128,Flat"), want)
        assert re.search(r"IVF128,Flat .*\b50 images\b.*exactly", log.text)


class TestFiles:
    @pytest.mark.parametrize("factory", ["Flat", "IVF16,PQ8x4"])
    def test_plain_faiss_opens_them(self, shards, world, tmp_path, log, factory):
        queries, index = world
        path = tmp_path / "new" / "city.faiss"
        found = shards(queries, index, 20, factory=factory, index_path=path)
        assert "3 partitions, 0 of them" in log.text
        files = sorted(tmp_path.glob("new/*.faiss"))
        names = [f"city.shard-{i}-of-3.faiss" for i in range(3)]
        names += ["city.trained.faiss"] if factory.startswith("IVF") else []
        assert [file.name for file in files] == names
        parts = []
        for i, name in enumerate(names[:3]):
            built = faiss.read_index(str(path.with_name(name)))
            search_index.set_search_parameters(built, 20, COUNT)
            parts.append(built.search(queries, 20))
            end = min(COUNT, 1024 * (i + 1))
            assert built.ntotal == end - 1024 * i
            assert parts[-1][1].min() >= 1024 * i
            assert parts[-1][1].max() < end
        np.testing.assert_array_equal(merge(parts, 20), found)
        if factory == "Flat":
            np.testing.assert_array_equal(found, retrieve.retrieve(queries, index, 20))
        times = [file.stat().st_mtime_ns for file in files]
        log.clear()
        again = shards(queries, index, 20, factory=factory, index_path=path)
        np.testing.assert_array_equal(again, found)
        assert "3 partitions, 3 of them" in log.text
        assert [file.stat().st_mtime_ns for file in files] == times

    def test_parts_merge_into_one(self, cluster, world, tmp_path):
        """Shards of a kind with lists are one index after FAISS's own merge_from."""
        queries, index = world
        path = tmp_path / "city.faiss"
        found = in_process(queries, index, 20, "IVF16,SQfp16", path=str(path))
        whole, *rest = (faiss.read_index(str(f)) for f in sorted(tmp_path.glob("*shard*.faiss")))
        for part in rest:
            whole.merge_from(part, 0)
        assert whole.ntotal == COUNT
        search_index.set_search_parameters(whole, 20, COUNT)
        np.testing.assert_array_equal(whole.search(queries, 20)[1], found)

    def test_what_changed_is_built_again(self, shards, world, tmp_path, log):
        queries, index = world
        path = tmp_path / "city.faiss"
        shards(queries, index, 5, factory="SQfp16", index_path=path)
        index = index.copy()
        index[1500] = -index[1500]
        (tmp_path / "city.shard-2-of-3.faiss").write_bytes(b"damaged")
        log.clear()
        found = shards(queries, index, 5, factory="SQfp16", index_path=path)
        assert "3 partitions, 1 of them" in log.text
        assert (found == retrieve.retrieve(queries, index, 5, factory="SQfp16")).all()
        about = json.loads((tmp_path / f"city.shard-1-of-3.faiss{SIDECAR}").read_text())
        assert (about["first"], about["images"], about["of"]) == (1024, 1024, COUNT)

    def test_other_files_are_kept(self, shards, world, tmp_path):
        other = tmp_path / "city.shard-1-of-3.faiss"
        other.write_bytes(b"mine")
        with pytest.raises(OutputError, match=f"{other} "):
            shards(*world, 5, index_path=tmp_path / "city.faiss")
        assert other.read_bytes() == b"mine"


class TestErrors:
    @pytest.mark.parametrize(
        ("factory", "says"),
        [("flat", "HNSW32"), ("IVF99999,Flat", "2600 images"), ("PQ5x4", "32 dimensions")],
    )
    def test_factories(self, shards, world, factory, says):
        with pytest.raises(ConfigError, match=f"faiss_index = {factory} .*{says}"):
            shards(*world, 5, factory=factory)
        assert not shards.made

    def test_refused_by_a_worker(self, shards, world):
        with pytest.raises(ConfigError, match=r"PCA64,Flat .*64") as error:
            shards(*world, 5, factory="PCA64,Flat")
        assert "Traceback" not in str(error.value)

    def test_arguments(self, shards, world):
        queries, index = world
        with pytest.raises(ValueError, match="top_k = 0 "):
            shards(queries, index, 0)
        with pytest.raises(ValueError, match="num_shards = 0 "):
            shards(queries, index, 1, num_shards=0)
        with pytest.raises(FeatureError, match=r"queries.*\b31\b.*\b32\b"):
            shards(queries[:, :31], index, 1)
        assert shards(queries[:0], index, 4).shape == (0, 4)
        assert shards(queries, index[:0], 4).shape == (60, 0)

    def test_not_finite(self, shards, world):
        queries, index = (array.copy() for array in world)
        queries[2, 1] = np.nan
        with pytest.raises(FeatureError, match=r"query 2\b"):
            shards(queries, index, 3)
        index[2070, 0] = np.nan
        with pytest.raises(FeatureError, match=r"query 0\b"):
            exact.check_found(queries[:1], in_process(queries[:1], index, COUNT))
        with pytest.raises(FeatureError, match=r"index image 2070\b"):
            in_process(queries[:1], index, 3, "SQfp16")

    def test_files(self, tmp_path, world, file, shards):
        with pytest.raises(FeatureError, match=rf"{tmp_path}/none\.npy "):
            Rows.open(tmp_path / "none.npy")
        np.save(tmp_path / "flat.npy", world[1][0])
        with pytest.raises(FeatureError, match=rf"{tmp_path}/flat\.npy .*\(32,\)"):
            Rows.open(tmp_path / "flat.npy")
        rows = Rows.open(file)
        file.unlink()
        with pytest.raises(FeatureError, match=f"{file} "):
            shards(world[0], rows, 3)


def ask(shard, question):
    """Return what a function gives in the process of an actor."""
    return ray.get(shard.actor.__ray_call__.remote(lambda _: question()))


def kill(shard):
    """Kill the process of an actor, as the system does when memory runs out."""
    os.kill(ask(shard, os.getpid), 9)


def node_of(shard):
    return ask(shard, lambda: ray.get_runtime_context().get_node_id())


class TestDeath:
    def test_worker_dies_between_building_and_searching(self, shards, world, monkeypatch):
        search = sharded._Shards.search

        def killing(self, *args):
            for shard in self.shards[:2]:
                kill(shard)
            return search(self, *args)

        monkeypatch.setattr(sharded._Shards, "search", killing)
        for factory in ("Flat", "IVF16,SQfp16"):
            found = shards(*world, 20, factory=factory)
            want = retrieve.retrieve(*world, 20, factory=factory)
            assert (found == want).mean() > 0.99

    def test_worker_that_always_dies(self, shards, world, monkeypatch):
        prepare = sharded._Shards.prepare

        def preparing(self, progress):
            prepare(self, progress)
            for _ in range(sharded.RESTARTS + 1):
                kill(self.shards[1])

        monkeypatch.setattr(sharded._Shards, "prepare", preparing)
        with pytest.raises(ClusterError, match=r"index images 1024-2047: .*\b4\b"):
            shards(*world, 5)

    def test_node_dies_in_mid_run(self, cluster, shards, world, monkeypatch):
        """Killed while its workers search, whose shards are made again on what is left."""
        queries, index = np.tile(world[0], (300, 1)), clustered(8000, 6)
        want = retrieve.retrieve(queries, index, 20)
        node = cluster.add_node(**NODE)
        cluster.wait_for_nodes()
        before, after = [], []
        search = sharded._Shards.search

        def searching(self, *args):
            before.extend(map(node_of, self.shards))
            thread = threading.Timer(0.1, cluster.remove_node, (node, False))
            thread.start()
            found = search(self, *args)
            thread.join()
            after.extend(map(node_of, self.shards))
            return found

        monkeypatch.setattr(sharded._Shards, "search", searching)
        found = shards(queries, index, 20, num_shards=6)
        np.testing.assert_array_equal(found, want)
        assert node.node_id in before
        assert node.node_id not in after
