# SPDX-License-Identifier: MIT
"""Retrieval by every kind of FAISS index, and the file that keeps one."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re

import faiss
import numpy as np
import pytest

from patchnetvlad import Config
from patchnetvlad.errors import ConfigError, FeatureError, OutputError
from patchnetvlad.search import growing
from patchnetvlad.search import index as search_index
from patchnetvlad.search.growing import GrowingIndex
from patchnetvlad.search.index_file import SIDECAR
from patchnetvlad.search.retrieve import retrieve

DIMS = 32


def clustered(count, seed, dims=DIMS, places=150):
    """Unit vectors about shared centres, as of images of some places."""
    centres = np.random.default_rng(99).standard_normal((places, dims))
    rng = np.random.default_rng(seed)
    vectors = centres[rng.integers(0, places, count)]
    vectors = vectors + 0.3 * rng.standard_normal((count, dims))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Make FAISS use one thread: for small data, on a busy machine, it is the fastest by far."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    yield
    faiss.omp_set_num_threads(before)


@pytest.fixture(scope="module")
def world():
    """Give queries [60, P], index [1500, P], and rows of the index, nearest first."""
    queries, index = clustered(60, 1), clustered(1500, 2)
    distance = ((queries[:, None].astype(float) - index) ** 2).sum(2)
    return queries, index, np.argsort(distance, axis=1, kind="stable")


@pytest.fixture
def log(caplog):
    caplog.set_level(logging.INFO, logger="patchnetvlad.search")
    return caplog


def recall(found, truth):
    return np.mean([len(np.intersect1d(a, b)) / len(a) for a, b in zip(found, truth, strict=True)])


def assert_full(found, shape, count):
    assert found.shape == shape
    assert found.dtype == np.int64
    assert found.min() >= 0
    assert found.max() < count
    assert all(len(set(row)) == len(row) for row in found.tolist())


class TestFlat:
    def test_all_distances(self, world, log):
        queries, index, truth = world
        found = retrieve(queries, index, 25)
        np.testing.assert_array_equal(found, truth[:, :25])
        assert found.dtype == np.int64
        assert not log.messages

    def test_bits_are_those_of_faiss(self):
        index = np.repeat(clustered(40, 3), 2, axis=0)  # ties
        queries = clustered(30, 4)
        flat = faiss.IndexFlatL2(DIMS)
        flat.add(index)
        np.testing.assert_array_equal(retrieve(queries, index, 9), flat.search(queries, 9)[1])

    @pytest.mark.parametrize("factory", ["Flat", "HNSW8", "IVF4,Flat"])
    @pytest.mark.parametrize("top_k", [1, 12, 13, 500])
    def test_clamped_to_the_index(self, factory, top_k):
        queries, index = clustered(5, 1), clustered(12, 2)
        found = retrieve(queries, index, top_k, factory=factory)
        assert_full(found, (5, min(top_k, 12)), 12)

    @pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
    def test_types_and_layouts(self, world, factory):
        queries, index, _ = world
        want = retrieve(queries, index, 7, factory=factory)
        wide = np.repeat(index, 2, axis=1)[:, ::2]
        assert not wide.flags.c_contiguous
        for q, i in (
            (queries.astype(float), index.astype(float)),
            (np.asfortranarray(queries), wide),
        ):
            np.testing.assert_array_equal(retrieve(q, i, 7, factory=factory), want)
        half = index.astype(np.float16)
        np.testing.assert_array_equal(
            retrieve(queries, half, 7, factory=factory),
            retrieve(queries, half.astype(np.float32), 7, factory=factory),
        )

    @pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
    def test_nothing_to_search(self, factory):
        none, some = np.empty((0, DIMS), np.float32), clustered(9, 1)
        for queries, index, shape in ((none, some, (0, 4)), (some, none, (9, 0))):
            found = retrieve(queries, index, 4, factory=factory)
            assert found.shape == shape
            assert found.dtype == np.int64


class TestFactories:
    # Bounds on recall@1 (of the nearest one among the first) and recall@50 (of the 50 nearest).
    @pytest.mark.parametrize(
        ("factory", "first", "fifty"),
        [
            (" Flat ", 1, 1),
            ("IDMap,Flat", 1, 1),
            ("SQfp16", 0.98, 0.99),
            ("SQ8", 0.9, 0.97),
            ("HNSW16", 0.98, 0.97),
            ("IVF64, Flat", 0.98, 0.9),
            ("IVF32_HNSW8,Flat", 0.98, 0.9),
            ("IDMap,IVF16,SQfp16", 0.98, 0.97),
            ("IVF16,PQ16", 0.5, 0.8),
            ("IVF16,PQ8x4,RFlat", 0.9, 0.8),
            ("OPQ8,IVF16,PQ8x4fs", 0.1, 0.3),
            ("PCA24,Flat", 0.4, 0.65),
            ("NSG16", 0.9, 0.9),
        ],
    )
    def test_recall(self, world, factory, first, fifty):
        queries, index, truth = world
        found = retrieve(queries, index, 50, factory=factory)
        assert_full(found, (60, 50), 1500)
        assert np.mean(found[:, 0] == truth[:, 0]) >= first
        assert recall(found, truth[:, :50]) >= fifty

    def test_approximate_is_approximate(self, world):
        """Each kind of index is the one that was asked for."""
        queries, index, truth = world
        found = retrieve(queries, index, 50, factory="PQ2x4")
        assert recall(found, truth[:, :50]) < 0.9

    def test_efsearch_covers_the_candidates(self, world):
        queries, index, truth = world
        found = retrieve(queries, index, 700, factory="HNSW8")
        assert_full(found, (60, 700), 1500)
        assert recall(found, truth[:, :700]) > 0.95

    def test_missing_ones_are_searched_exactly(self, world, log, monkeypatch):
        queries, index, truth = world
        built = faiss.index_factory(DIMS, "IVF128,Flat")
        built.cp.min_points_per_centroid = 1
        built.train(index)
        built.add(index)
        short = (built.search(queries, 12)[1] < 0).any(axis=1)
        assert 0 < short.sum() < len(queries)  # or there is nothing to test
        monkeypatch.setattr(search_index, "set_parameter", lambda *_: None)  # one list is searched
        monkeypatch.setattr(growing, "set_parameter", lambda *_: None)  # one list is searched
        found = retrieve(queries, index, 12, factory="IVF128,Flat")
        assert_full(found, (60, 12), 1500)
        np.testing.assert_array_equal(found[short], truth[short, :12])
        assert recall(found[~short], truth[~short, :12]) < 1
        assert f"fewer than 12 images for {short.sum()} of 60 queries" in log.text

    def test_probes(self):
        """Lists that hold few images each: enough of them are searched at once."""
        index = clustered(600, 1)
        built = faiss.index_factory(DIMS, "IVF200,Flat")
        built.cp.min_points_per_centroid = 1
        built.train(index)
        built.add(index)
        for k, probes in ((1, 25), (50, 67), (300, 200)):
            search_index.set_search_parameters(built, k, 600)
            assert built.nprobe == probes
        built = faiss.index_factory(DIMS, "HNSW8")
        for k, candidates in ((1, 64), (300, 600)):
            search_index.set_search_parameters(built, k, 600)
            assert built.hnsw.efSearch == candidates

    def test_parameters(self, world, tmp_path):
        queries, index = world[:2]
        truth = retrieve(queries, index, 10)

        def found(parameters, factory="IVF64,Flat"):
            path = tmp_path / f"{factory}.faiss"  # is built once
            rows = retrieve(
                queries, index, 10, factory=factory, parameters=parameters, index_path=path
            )
            return recall(rows, truth)

        assert found("nprobe=1") < found("nprobe = 16") == found("")
        assert found("nprobe=64") == found("nprobe=100000000") == 1
        # FAISS refuses these itself, for want of memory.
        for factory, name, most in (
            ("IVF64,PQ8x4fs", "nprobe", 64),
            ("IVF64,PQ4x4,RFlat", "k_factor_rf", 150),
            ("HNSW8", "efSearch", 1500),
        ):
            assert found(f"{name}=900000000", factory) == found(f"{name}={most}", factory)

    def test_parameters_of_graphs(self):
        def built(factory, parameters):
            index = faiss.index_factory(DIMS, factory)
            search_index.set_search_parameters(index, 10, 600, parameters)
            return index

        assert built("HNSW8", "efSearch=7").hnsw.efSearch == 7
        for parameters, wanted in (
            ("", 64),
            ("nprobe=50", 100),
            ("efSearch=7", 7),
            ("quantizer_efSearch=8", 8),
            ("efSearch=7,quantizer_efSearch=8,nprobe=60", 8),
            ("quantizer_efSearch=8,efSearch=7", 8),
        ):
            index = built("IVF64_HNSW8,Flat", parameters)
            assert faiss.downcast_index(index.quantizer).hnsw.efSearch == wanted
            assert index.nprobe == (50 if "50" in parameters else 60 if "60" in parameters else 16)

    @pytest.mark.parametrize("factory", ["IVF16,Flat", "IVF4,PQ2x4", "PCA8,SQ8"])
    def test_repeats(self, world, tmp_path, factory):
        digests = set()
        for name in "ab":
            retrieve(world[0], world[1][:400], 1, factory=factory, index_path=tmp_path / name)
            digests.add(hashlib.sha256((tmp_path / name).read_bytes()).hexdigest())
        assert len(digests) == 1

    def test_log(self, world, log, capfd):
        retrieve(world[0], world[1][:400], 1, factory="IVF16,PQ4x4")
        assert re.search(r"IVF16,PQ4x4 .*\b400 descriptors.*\b624\b", log.text)
        assert re.search(r"IVF16,PQ4x4 .*\b400 descriptors.*\b32 dimensions", log.text)
        assert "built IVF16,PQ4x4 in " in log.text
        assert "WARNING" not in capfd.readouterr().err  # FAISS would repeat it four times


class TestErrors:
    @pytest.mark.parametrize(
        ("factory", "parameters", "says"),
        [
            ("Flat", "nprobe=5", "Flat .*nprobe;"),
            ("HNSW8", "nprobe=5", "HNSW8 .*nprobe;"),
            ("IVF4,Flat", "nprobes=5", "'nprobes=5' .*nprobe, efSearch, k_factor_rf"),
            ("PQ8x4", "ht=20", "'ht=20'"),
            ("HNSW8", "efConstruction=4", "'efConstruction=4'"),
            ("IVF4,Flat", "nprobe=2,k_factor_rf=2", "IVF4,Flat .*k_factor_rf;"),
            (
                "IVF4,Flat",
                "nprobe",
                "'nprobe' .*whole number from 1",
            ),
            ("IVF4,Flat", "nprobe=6 4", "'nprobe=6 4'"),
            ("IVF4,Flat", "nprobe=6,,", "''"),
            ("IVF4,Flat", "nprobe=1,nprobe=64", "= nprobe=1,nprobe=64"),
            ("IVF4,Flat", None, "= None"),
            ("IVF4,Flat", "nprobe=0", "'nprobe=0'"),
            ("IVF4,Flat", "nprobe=-1", "'nprobe=-1'"),
            ("IVF4,Flat", "nprobe=2.5", r"'nprobe=2\.5'"),
            ("IVF4,Flat", "nprobe=2147483648", "'nprobe=2147483648'"),
            ("IVF0,Flat", "nprobe=5", "= IVF0,Flat"),
            ("IVF99999999,Flat", "nprobe=5", r"99999999 lists.*\b100 images"),
        ],
    )
    def test_parameters(self, factory, parameters, says, tmp_path):
        index = clustered(100, 0)
        path = tmp_path / "index.faiss"
        with pytest.raises(ConfigError, match=says):
            retrieve(index, index, 5, factory=factory, parameters=parameters, index_path=path)
        assert not path.exists()
        if not factory.startswith(("IVF", "PQ")):  # which do not grow
            with pytest.raises(ConfigError, match=says):
                GrowingIndex(DIMS, factory, parameters)
        if "'" in says:
            with pytest.raises(ConfigError, match=says):
                retrieve(index[:0], index, 5, factory=factory, parameters=parameters)
            with pytest.raises(ConfigError, match=says):
                Config(faiss_parameters=parameters)

    @pytest.mark.parametrize(
        ("factory", "says"),
        [
            ("flat", "Flat, SQfp16, HNSW32"),
            ("", "Flat, SQfp16, HNSW32"),
            ("IVF4,Bogus", "Bogus"),
            ("IVF99999999,Flat", r"99999999 lists.*\b100 images.*IVF2"),
            ("IVF1M,Flat", "1048576 lists"),
            ("IMI2x9,Flat", "262144 lists"),
            ("IVF101,Flat", "101 lists"),
            ("PQ8", r"256 centres.*\b100 images.*PQ8x4"),
            ("IVF4,PQ8", "256 centres"),
            ("PCA8,IVF4,PQ4", "256 centres"),
            ("HNSW8,PQ8", "256 centres"),
            ("PQ5x4", "32 dimensions"),
            ("PCA64,Flat", "100 descriptors.*32 dimensions.*64"),
            ("PCA8,IDMap,Flat", "100 descriptors.*32 dimensions"),
            ("HNSW0", "number"),  # aborts in FAISS
            ("HNSW1", "number"),
            ("NSG1,Flat", "number"),
            ("PQ4x0", "number"),
            ("IVF0,Flat", "number"),
        ],
    )
    def test_factories(self, factory, says, tmp_path):
        path = tmp_path / "index.faiss"
        with pytest.raises(ConfigError, match=f"faiss_index = {factory} .*{says}") as error:
            retrieve(clustered(3, 1), clustered(100, 2), 5, factory=factory, index_path=path)
        assert "/project" not in str(error.value)
        assert len(str(error.value)) < 330
        assert list(tmp_path.iterdir()) == []

    def test_enough_lists(self):
        """As many images as lists will do, and a number that ends in 0 is not 0."""
        retrieve(clustered(3, 1), clustered(100, 2), 5, factory="IVF100,Flat")
        retrieve(clustered(3, 1), clustered(100, 2), 5, factory="HNSW10")

    @pytest.mark.parametrize("top_k", [0, -3])
    def test_top_k(self, top_k):
        with pytest.raises(ValueError, match=f"top_k = {top_k} "):
            retrieve(clustered(3, 1), clustered(5, 2), top_k)

    def test_dimensions(self):
        with pytest.raises(FeatureError, match=r"queries.*\b4\b.*\b5\b"):
            retrieve(clustered(2, 1, dims=4), clustered(2, 1, dims=5), 1)
        with pytest.raises(FeatureError, match=r"queries.*\(32,\)"):
            retrieve(clustered(2, 1)[0], clustered(2, 1), 1)

    @pytest.mark.parametrize("factory", ["Flat", "SQfp16"])
    @pytest.mark.parametrize("value", [np.nan, np.inf])
    def test_not_finite(self, factory, value):
        queries, index = clustered(4, 1), clustered(6, 2)
        queries[2, 1] = value
        with pytest.raises(FeatureError, match=r"query 2\b"):
            retrieve(queries, index, 3, factory=factory)
        index[4, 0] = value
        with pytest.raises(FeatureError, match=r"(index image 4|query 0)\b"):
            retrieve(queries[:1], index, 6, factory=factory)


class TestFile:
    FACTORY = "IVF4,SQfp16"

    @pytest.fixture
    def world(self, world):
        return world[0], world[1][:300], None

    @pytest.fixture
    def saved(self, world, tmp_path, log):
        """Give the saved index, and a function that retrieves with it and returns the log."""
        queries, index, _ = world
        path = tmp_path / "new" / "folder" / "index.faiss"

        def again(index=index, factory=self.FACTORY):
            log.clear()
            found = retrieve(queries, index, 20, factory=factory, index_path=path)
            np.testing.assert_array_equal(found, retrieve(queries, index, 20, factory=factory))
            return log.messages

        again()
        return path, again

    @staticmethod
    def sidecar(path):
        return path.with_name(path.name + SIDECAR)

    def test_plain_faiss_reads_it(self, saved, world):
        path, _ = saved
        index = faiss.read_index(str(path))
        assert (index.ntotal, index.d) == world[1].shape
        assert {file.name for file in path.parent.iterdir()} == {
            "index.faiss",
            "index.faiss.fingerprint.json",
        }
        fingerprint = json.loads(self.sidecar(path).read_text())
        assert fingerprint["descriptors"] == hashlib.sha256(world[1].tobytes()).hexdigest()
        assert fingerprint["factory"] == self.FACTORY

    def test_used_again(self, saved):
        path, again = saved
        for file in (path, self.sidecar(path)):
            os.utime(file, ns=(10**18, 10**18))
        messages = again()
        assert f"using {self.FACTORY} of {path}" in messages[0]
        assert path.stat().st_mtime_ns == self.sidecar(path).stat().st_mtime_ns == 10**18

    def test_it_is_the_file_that_answers(self, saved, world):
        """An index of other descriptors with a forged fingerprint gives other answers."""
        path, _ = saved
        queries, index, _ = world
        flat = faiss.index_factory(DIMS, "Flat")
        flat.add(index[::-1].copy())
        faiss.write_index(flat, str(path))
        fingerprint = json.loads(self.sidecar(path).read_text())
        fingerprint["file"] = hashlib.sha256(path.read_bytes()).hexdigest()
        self.sidecar(path).write_text(json.dumps(fingerprint))
        found = retrieve(queries, index, 20, factory=self.FACTORY, index_path=path)
        np.testing.assert_array_equal(found, len(index) - 1 - retrieve(queries, index, 20))

    @pytest.mark.parametrize("change", ["value", "fewer", "dimensions", "factory"])
    def test_built_again_for_others(self, saved, world, log, change):
        path, again = saved
        queries, index, _ = world
        before = path.read_bytes()
        if change == "value":
            index = index.copy()
            index[70, 3] += 1e-3
            says = "SHA-256"
        elif change == "fewer":
            index, says = index[:-1], "300, not 299"
        elif change == "dimensions":
            log.clear()
            retrieve(queries[:, :16], index[:, :16], 3, factory=self.FACTORY, index_path=path)
            assert "32, not 16" in log.text
            assert path.read_bytes() != before
            return
        else:
            says = "IVF4,SQfp16, not HNSW8"
        messages = again(index, "HNSW8" if change == "factory" else self.FACTORY)
        assert re.match(f"{path} .*{says}", messages[0])
        assert path.read_bytes() != before
        assert "using" in again(index, "HNSW8" if change == "factory" else self.FACTORY)[0]

    @pytest.mark.parametrize("damage", ["bit", "short", "empty", "other index", "sidecar", "list"])
    def test_built_again_when_damaged(self, saved, damage):
        path, again = saved
        before = path.read_bytes()
        if damage == "bit":
            path.write_bytes(before[:-9] + bytes([before[-9] ^ 1]) + before[-8:])
        elif damage == "short":
            path.write_bytes(before[:-100])
        elif damage == "empty":
            path.write_bytes(b"")
        elif damage == "other index":  # what a run leaves that is killed before its last step
            other = faiss.IndexFlatL2(DIMS)
            other.add(clustered(300, 7))
            faiss.write_index(other, str(path))
        else:
            self.sidecar(path).write_text("{" if damage == "sidecar" else "[]")
        messages = again()
        assert re.match(f"{path} .*damaged", messages[0])
        assert path.read_bytes() == before
        assert "using" in again()[0]

    @pytest.mark.parametrize("first", [True, False])
    @pytest.mark.parametrize("step", [1, 2])
    def test_killed_while_saving(self, saved, monkeypatch, step, first):
        """After a run that ended at either rename, no wrong index is used, and none is refused."""
        path, again = saved
        if first:
            path.unlink()
            self.sidecar(path).unlink()
        other = clustered(300, 8)
        count = 0

        def replace(*names, real=os.replace):
            nonlocal count
            count += 1
            if count == step:
                raise KeyboardInterrupt
            real(*names)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            with pytest.raises(KeyboardInterrupt):
                again(other)
        assert not list(path.parent.glob(".*"))
        again(other)  # compares with a search without the file
        assert "using" in again(other)[0]

    def test_index_deleted(self, saved):
        path, again = saved
        path.unlink()
        assert "building" in again()[0]
        assert "using" in again()[0]

    def test_other_files_are_not_overwritten(self, world, tmp_path):
        path = tmp_path / "notes.txt"
        path.write_text("mine")
        with pytest.raises(
            OutputError, match=rf"faiss_index_path = {path} .*notes\.txt\.fingerprint\.json"
        ):
            retrieve(*world[:2], 3, index_path=path)
        assert path.read_text() == "mine"
        with pytest.raises(OutputError, match=f"faiss_index_path = {tmp_path} "):
            retrieve(*world[:2], 3, index_path=tmp_path)

    def test_folder_cannot_be_made(self, world, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(OutputError, match=f"{tmp_path}/file "):
            retrieve(*world[:2], 3, index_path=tmp_path / "file" / "index.faiss")

    @pytest.mark.parametrize(
        ("error", "words"),
        [
            (OSError(28, "No space left"), "No space left"),
            (RuntimeError("write error"), "write error"),
        ],
    )
    def test_cannot_be_written(self, world, tmp_path, monkeypatch, error, words):
        def write(index, name):
            (tmp_path / name).write_bytes(b"half")
            raise error

        monkeypatch.setattr(faiss, "write_index", write)
        with pytest.raises(
            OutputError, match=rf"faiss_index_path = {tmp_path}/index\.faiss .*{words}"
        ):
            retrieve(*world[:2], 3, index_path=tmp_path / "index.faiss")
        assert list(tmp_path.iterdir()) == []

    def test_name_too_long(self, world, tmp_path):
        with pytest.raises(OutputError, match=f"faiss_index_path = {tmp_path}/x{{250}} "):
            retrieve(*world[:2], 3, index_path=tmp_path / ("x" * 250))

    def test_flat_is_kept_too(self, world, tmp_path):
        for _ in range(2):
            found = retrieve(*world[:2], 5, index_path=tmp_path / "flat")
            np.testing.assert_array_equal(found, retrieve(*world[:2], 5))
        assert faiss.read_index(str(tmp_path / "flat")).ntotal == 300


class TestGPU:
    """What is handed to FAISS's GPU functions; no GPU takes part."""

    @pytest.fixture
    def moved(self, monkeypatch):
        moved = []

        def to_gpus(index):
            moved.append(type(index).__name__)
            return faiss.clone_index(index)

        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 2)
        monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", to_gpus)
        return moved

    @pytest.mark.parametrize(
        ("factory", "top_k", "calls"),
        [
            ("Flat", 5, ["IndexFlat"]),
            ("IDMap,Flat", 5, ["IndexIDMap"]),
            ("PCA16,Flat", 5, ["IndexPreTransform"]),
            ("IVF16,Flat", 5, ["IndexFlatL2", "IndexIVFFlat"]),  # the first one trains
        ],
    )
    def test_moved(self, world, moved, log, factory, top_k, calls):
        queries, index, _ = world
        found = retrieve(queries, index, top_k, factory=factory, gpu=True)
        assert moved == calls
        np.testing.assert_array_equal(found, retrieve(queries, index, top_k, factory=factory))
        assert "CPU" not in log.text

    @pytest.mark.parametrize(
        ("factory", "says"),
        [
            ("HNSW8", "IndexHNSWFlat"),
            ("IDMap,HNSW8", "IndexHNSWFlat"),
            ("IVF8_HNSW8,Flat", "IndexHNSWFlat"),
            ("SQfp16", "IndexScalarQuantizer"),
            ("IVF8,Flat,RFlat", "IndexRefineFlat"),
        ],
    )
    def test_stays(self, world, moved, log, factory, says):
        retrieve(*world[:2], 5, factory=factory, gpu=True)
        assert re.search(rf"{factory} on the CPU.*{says}", log.text)
        assert set(moved) <= {"IndexFlatL2"}  # for training

    def test_too_many_candidates(self, moved, log):
        index = clustered(2100, 1)
        found = retrieve(index[:2], index, 2049, gpu=True)
        assert_full(found, (2, 2049), 2100)
        assert moved == []
        assert re.search(r"\b2049\b.*\b2048\b", log.text)

    @pytest.mark.parametrize("factory", ["Flat", "IVF8,Flat"])
    def test_gpu_fails(self, world, moved, log, monkeypatch, factory):
        def fail(index):
            raise RuntimeError("Error in void f() at /a/b.cpp:12: out of GPU memory")

        monkeypatch.setattr(faiss, "index_cpu_to_all_gpus", fail)
        found = retrieve(*world[:2], 5, factory=factory, gpu=True)
        np.testing.assert_array_equal(found, retrieve(*world[:2], 5, factory=factory))
        assert f"searching {factory} on the CPU: out of GPU memory" in log.messages

    def test_not_asked_for(self, world, moved):
        retrieve(*world[:2], 5, factory="IVF8,Flat")
        assert moved == []

    def test_faiss_without_gpu(self, world, monkeypatch):
        monkeypatch.setattr(faiss, "get_num_gpus", lambda: 0)
        found = retrieve(*world[:2], 5, gpu=True)
        np.testing.assert_array_equal(found, world[2][:, :5])
