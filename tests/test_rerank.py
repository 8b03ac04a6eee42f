# SPDX-License-Identifier: MIT
"""Re-ranking as a job: its threads, its memory, its journal; see test_matching for its scores."""

from __future__ import annotations

import contextlib
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from patchnetvlad.config import Config
from patchnetvlad.engines import local_rerank
from patchnetvlad.engines.journal import Journal
from patchnetvlad.engines.local_rerank import PatchCache
from patchnetvlad.engines.rerank import rerank_candidates
from patchnetvlad.engines.visiting import visiting_order
from patchnetvlad.errors import DeviceError, FeatureError, OutputError
from patchnetvlad.matching import nearest, on_device
from patchnetvlad.matching.nearest import mutual_nearest_neighbours, mutual_on_device, pairs_of
from patchnetvlad.models.grid import patch_grids

SIZE = (160, 192)
CONFIG = Config(patch_sizes=(2, 3), strides=(1, 2), patch_weights=(0.5, 0.5), match_image_size=SIZE)
GRIDS = patch_grids(SIZE, CONFIG.patch_sizes, CONFIG.strides)
RNG = np.random.default_rng(0)
BASE = [RNG.standard_normal((len(grid), 16)) for grid in GRIDS]


def image(noise, rng):
    found = []
    for base in BASE:
        values = base + noise * rng.standard_normal(base.shape)
        found.append((values / np.linalg.norm(values, axis=1, keepdims=True)).astype(np.float32))
    return found


INDEX = [image(3 if i else 0.3, RNG) for i in range(12)]
QUERIES = [image(0.3, RNG) for _ in range(5)]
PREDICTIONS = np.stack([RNG.permutation(12)[:8] for _ in QUERIES])


def run(config=CONFIG, index=INDEX.__getitem__, **keywords):
    return rerank_candidates(
        PREDICTIONS, QUERIES.__getitem__, index, lambda i: GRIDS, lambda i: GRIDS, config,
        progress=False, **keywords,
    )  # fmt: skip


def ours():
    """Return the threads of re-ranking that are alive."""
    prefixes = ("load", "match", "verify")
    return [thread for thread in threading.enumerate() if thread.name.startswith(prefixes)]


class TestThreads:
    def test_settings_are_put_back(self):
        before = torch.get_num_threads()
        run()
        assert torch.get_num_threads() == before
        assert not ours()

    def test_a_matcher_is_used_again(self):
        """PyTorch has all its threads between two matchings, and queries are loaded each time."""
        expected = run()
        before = 3
        torch.set_num_threads(before)
        loaded = []

        def load(kind, images):
            return lambda i: loaded.append((kind, i)) or images[i]

        matcher = local_rerank.Matcher(
            CONFIG,
            torch.device("cpu"),
            (load("query", QUERIES), load("index", INDEX)),
            (lambda i: GRIDS, lambda i: GRIDS),
        )
        threads = ours()
        for _ in range(2):
            assert torch.get_num_threads() == before
            for q in range(len(QUERIES)):
                with matcher.matching():
                    assert torch.get_num_threads() == 1
                    ((_, scores),) = matcher.run([q], {q: PREDICTIONS[q]})
                assert torch.get_num_threads() == before
                np.testing.assert_array_equal(scores, expected.scores[q])
        assert ours() == threads
        asked = set(PREDICTIONS.ravel().tolist())
        assert sorted(loaded) == sorted(
            [("query", q) for q in range(len(QUERIES))] * 2 + [("index", i) for i in asked]
        )
        matcher.close()
        assert not ours()

    def test_an_error_ends_the_run(self):
        before = torch.get_num_threads()

        def broken(i):
            if i == PREDICTIONS[2, 3]:
                raise FeatureError("damaged")
            time.sleep(0.002)
            return INDEX[i]

        with pytest.raises(FeatureError, match="damaged"):
            run(index=broken)
        assert torch.get_num_threads() == before
        assert not ours()

    @pytest.mark.parametrize("ransac", ["opencv", "fast", "batched"])
    @pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
    def test_blocks_of_candidates_give_the_same(self, monkeypatch, matcher, ransac):
        """What happens on a GPU, on the CPU."""
        config = replace(CONFIG, matcher=matcher, ransac=ransac)
        expected = run(config)
        original = local_rerank.Matcher.__init__

        def as_on_a_gpu(self, *arguments):
            original(self, *arguments)
            self.on_cpu = False

        monkeypatch.setattr(local_rerank.Matcher, "__init__", as_on_a_gpu)
        monkeypatch.setattr(nearest, "BLOCK_BYTES", 3 * 4 * len(GRIDS[0]) ** 2)
        found = run(config)
        if matcher == "RANSAC":
            np.testing.assert_array_equal(found.scores, expected.scores)
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-12)
        np.testing.assert_array_equal(found.predictions, expected.predictions)

    @pytest.mark.parametrize(
        "fits",
        [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(3, marks=pytest.mark.slow)],
    )
    def test_a_full_device(self, monkeypatch, fits):
        """More candidates than ``fits`` are too many for its memory: fewer are matched at once."""
        config = replace(CONFIG, ransac="batched")
        expected = run(config)
        original, score = local_rerank.Matcher.__init__, on_device.score_candidates
        sizes = []

        def as_on_a_gpu(self, *arguments):
            original(self, *arguments)
            self.on_cpu = False

        def full(query, candidates, *more):
            sizes.append(len(candidates))
            if len(candidates) > fits:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return score(query, candidates, *more)

        monkeypatch.setattr(local_rerank.Matcher, "__init__", as_on_a_gpu)
        monkeypatch.setattr(local_rerank, "score_candidates", full)
        found = run(config)
        np.testing.assert_array_equal(found.scores, expected.scores)
        assert max(sizes) > fits >= min(sizes)
        fits = 0
        with pytest.raises(DeviceError, match="memory_mb"):
            run(config)

    @pytest.mark.parametrize("tied", [False, True])
    def test_blocks_of_neighbours(self, tied):
        torch.manual_seed(0)
        query, candidates = torch.randn(30, 8), list(torch.randn(4, 20, 8))
        candidates[1][5] = candidates[1][3]  # a tie
        candidates.append(torch.randn(13, 8))  # of another size
        if tied:
            query[7] = query[2]
        found = mutual_on_device([(query, candidate) for candidate in candidates])
        for pairs, candidate in zip(pairs_of(found.numpy()), candidates, strict=True):
            expected = mutual_nearest_neighbours(query, candidate)
            np.testing.assert_array_equal(pairs, expected)

    @pytest.mark.cuda
    @pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
    @pytest.mark.parametrize("precision", ["exact", "fast", "half"])
    @pytest.mark.parametrize("memory_mb", [0, 64])
    @pytest.mark.parametrize("ransac", ["opencv", "fast", "batched", "spatial"])
    def test_on_a_gpu(self, ransac, memory_mb, precision):
        config = replace(CONFIG, precision="exact", memory_mb=memory_mb)
        if ransac == "spatial":
            config = replace(config, matcher="spatialApproximator")
        else:
            config = replace(config, ransac=ransac)
        expected = run(config).scores
        found = run(replace(config, precision=precision), device="cuda").scores
        # In float16, now and then another patch is the nearest.
        atol = 1e-9 if precision == "exact" else 0.02 * max(1, np.abs(expected).max())
        np.testing.assert_allclose(found, expected, atol=atol)


class TestOrder:
    def test_each_once_and_neighbours_together(self):
        rng = np.random.default_rng(0)
        places = rng.permutation(60)
        predictions = np.array([[(p + d) % 60 for d in range(-4, 5)] for p in places])
        order = visiting_order(predictions)
        assert sorted(order.tolist()) == list(range(60))

        def shared(sequence):
            rows = [set(predictions[q].tolist()) for q in sequence]
            return sum(len(a & b) for a, b in pairwise(rows))

        assert shared(order) > 3 * shared(range(60))
        assert shared(order) >= 0.85 * 59 * 8

    @pytest.mark.parametrize("shape", [(0, 5), (4, 0), (1, 1)])
    def test_nothing_to_order(self, shape):
        order = visiting_order(np.zeros(shape, dtype=np.int64))
        assert order.tolist() == list(range(shape[0]))

    def test_candidates_that_all_share(self):
        rng = np.random.default_rng(0)
        predictions = np.stack([rng.permutation(50)[:40] for _ in range(1000)])
        assert sorted(visiting_order(predictions).tolist()) == list(range(1000))

    def test_nothing_shared(self):
        assert visiting_order(np.arange(12).reshape(4, 3)).tolist() == [0, 1, 2, 3]


class TestCache:
    def test_limit(self):
        loads = []

        def load(key):
            loads.append(key)
            return [torch.zeros(10, 10)]  # 400 bytes

        with ThreadPoolExecutor(1) as pool:
            cache = PatchCache(load, pool, 1000)
            for i in (0, 1, 0, 2, 0, 1):
                cache.fetch((1, i)).result()
            assert loads == [(1, 0), (1, 1), (1, 2), (1, 1)]  # the one used longest ago goes

    def test_what_is_discarded_leaves_room(self):
        with ThreadPoolExecutor(1) as pool:
            cache = PatchCache(lambda key: loads.append(key) or [torch.zeros(10, 10)], pool, 1000)
            loads = []
            for i in (0, 1):
                cache.fetch((1, i)).result()
            cache.discard((1, 0))
            cache.discard((1, 7))  # which is not there
            for i in (2, 1, 0):
                cache.fetch((1, i)).result()
            assert loads == [(1, 0), (1, 1), (1, 2), (1, 0)]
            cache.clear()
            cache.fetch((1, 1)).result()
            assert loads[4:] == [(1, 1)]

    def test_one_load_at_a_time(self):
        loads = []

        def load(key):
            loads.append(key)
            time.sleep(0.05)
            return [torch.zeros(1)]

        with ThreadPoolExecutor(4) as pool:
            cache = PatchCache(load, pool, 1000)
            futures = [cache.fetch((0, 7)) for _ in range(10)]
            assert len({id(future.result()) for future in futures}) == 1
        assert loads == [(0, 7)]

    def test_memory_is_bounded(self, monkeypatch):
        monkeypatch.setattr(local_rerank, "memory_budget", lambda *_: 0)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
        expected = run().scores
        loads = 0
        alive, most, lock = 0, 0, threading.Lock()

        class Counted(torch.Tensor):
            def __del__(self):
                nonlocal alive
                with lock:
                    alive -= 1

        def load(i):
            nonlocal alive, most, loads
            with lock:
                loads += 1
                alive += len(INDEX[i])
                most = max(most, alive)
            return [torch.from_numpy(values).as_subclass(Counted) for values in INDEX[i]]

        outcome = run(index=load)
        np.testing.assert_array_equal(outcome.scores, expected)
        assert loads > 12  # nothing is kept, so candidates are loaded again and again
        # Only what the tasks under way need: 3, the one in the cache, and one that is loaded.
        assert most <= 2 * (3 + 1 + 1)


class TestJournal:
    SHAPE = (8, 2)

    SCORES = np.random.default_rng(1).normal(size=(5, *SHAPE))

    def add(self, journal, queries):
        for q in queries:
            journal.add(q, self.SCORES[q])

    def fill(self, path):
        """Write scores down, those that are there excepted; return how many were."""
        journal = Journal(path, self.SHAPE)
        for q, values in journal.scores.items():
            np.testing.assert_array_equal(values, self.SCORES[q])
        self.add(journal, set(range(5)) - set(journal.scores))
        journal.close()
        return len(journal.scores)

    def resume(self, path):
        """Resume from a file in any state, and look at what came out; see `fill`."""
        found = self.fill(path)
        assert self.fill(path) == 5
        return found

    def test_a_run_takes_what_is_there(self, tmp_path):
        expected = run()
        path = tmp_path / "rerank.journal"
        for there in ((), (0, 1, 3), range(5)):
            journal = Journal(path, self.SHAPE)
            for q in there:
                journal.add(q, expected.scores[q])
            journal.close()
            journal = Journal(path, self.SHAPE)
            assert sorted(journal.scores) == list(there)
            loaded = []

            def load(i, loaded=loaded):
                loaded.append(i)
                return INDEX[i]

            outcome = run(index=load, journal=journal)
            journal.remove()
            np.testing.assert_array_equal(outcome.scores, expected.scores)
            np.testing.assert_array_equal(outcome.predictions, expected.predictions)
            assert bool(loaded) == (len(there) < 5)

    def test_resumes_wherever_it_was_killed(self, tmp_path):
        """What is on the disk at a kill, its last write cut at any byte."""
        path, log = tmp_path / "rerank.journal", tmp_path / "rerank.journal-wal"
        journal = Journal(path, self.SHAPE)
        self.add(journal, range(5))
        state = path.read_bytes(), log.read_bytes()
        journal.close()
        assert not log.exists()
        counts = []
        for keep in (*range(0, len(state[1]), 997), len(state[1])):
            path.write_bytes(state[0])
            log.write_bytes(state[1][:keep])
            counts.append(self.resume(path))
        assert counts == sorted(counts)
        assert set(counts) == set(range(6))

    @pytest.mark.parametrize("step", [1361, pytest.param(17, marks=pytest.mark.slow)])
    def test_damage_is_noticed(self, tmp_path, step):
        path = tmp_path / "rerank.journal"
        self.fill(path)
        whole = path.read_bytes()
        counts = set()
        for place in range(0, len(whole), step):
            content = bytearray(whole)
            content[place] ^= 255
            path.write_bytes(content)
            counts.add(self.resume(path))
            path.write_bytes(whole[:place])
            self.resume(path)
        # A byte of the scores themselves costs one query alone.
        content = bytearray(whole)
        content[whole.index(self.SCORES[3].tobytes()) + 5] ^= 1
        path.write_bytes(content)
        assert self.resume(path) == 4
        assert counts <= set(range(6))

    @pytest.mark.parametrize(
        "name", ["text", "schema", "other query", "other shape", "other table", "log alone"]
    )
    def test_other_files_are_replaced(self, tmp_path, name):
        path = tmp_path / "rerank.journal"
        if name == "text":
            path.write_text("something else\n" * 1000)
        elif name == "other query":
            self.fill(path)
            with contextlib.closing(sqlite3.connect(path)) as db, db:
                db.execute("UPDATE scores SET query = query + 4294967296")
        elif name == "schema":  # its text is not UTF-8, and stands in SQLite's message
            self.fill(path)
            path.write_bytes(path.read_bytes().replace(b"CREATE", b"CRE\xd5TE"))
        elif name == "other shape":
            journal = Journal(path, (9, 2))
            journal.add(0, np.ones((9, 2)))
            journal.close()
        elif name == "other table":
            with contextlib.closing(sqlite3.connect(path)) as db:
                db.execute("CREATE TABLE scores (a, b)")
        else:
            journal = Journal(path, self.SHAPE)
            journal.add(0, np.ones(self.SHAPE))
            log = path.with_name("rerank.journal-wal").read_bytes()
            journal.remove()
            path.with_name("rerank.journal-wal").write_bytes(log)
        assert self.resume(path) == 0

    def test_removed_with_all_that_belongs_to_it(self, tmp_path):
        journal = Journal(tmp_path / "rerank.journal", self.SHAPE)
        journal.add(0, np.zeros(self.SHAPE))
        journal.remove()
        assert not list(tmp_path.iterdir())

    def test_another_process_at_it(self, tmp_path):
        path = tmp_path / "rerank.journal"
        script = (
            "import sys, pathlib\n"
            "from patchnetvlad.engines.journal import Journal\n"
            "journal = Journal(pathlib.Path(sys.argv[1]), (8, 2))\n"
            "print('open', flush=True)\n"
            "input()\n"
        )
        with subprocess.Popen(
            [sys.executable, "-c", script, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as other:
            assert other.stdout.readline() == b"open\n"
            with pytest.raises(OutputError, match=f"{path} .*another process"):
                Journal(path, self.SHAPE)
            other.kill()
        Journal(path, self.SHAPE).close()

    def test_a_full_disk(self, tmp_path):
        resource = pytest.importorskip("resource")
        path = tmp_path / "rerank.journal"
        journal = Journal(path, self.SHAPE)
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
        try:
            with pytest.raises(OutputError, match=f"{path} .*same command"):
                self.add(journal, range(5))
            journal.close()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert 0 < self.resume(path) < 5

    def test_a_folder_that_is_not_there(self, tmp_path):
        path = tmp_path / "none" / "rerank.journal"
        with pytest.raises(OutputError, match=f"{path} "):
            Journal(path, self.SHAPE)
