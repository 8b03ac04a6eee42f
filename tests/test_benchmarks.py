# SPDX-License-Identifier: MIT
"""Benchmarks: what is asserted, how they are searched, the citation line."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import numpy as np
import pytest

from patchnetvlad.assets import catalog, data_files
from patchnetvlad.datasets.benchmarks import BENCHMARKS, Benchmark, Group
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList, write_names
from patchnetvlad.errors import (
    AssetError,
    ConfigError,
    GroundTruthError,
    ImageListError,
    OutputError,
)
from patchnetvlad.search.by_protocol import CUTOUTS, retrieve_for_benchmark, retrieve_in_groups
from patchnetvlad.search.retrieve import IndexSpec, retrieve, retrieve_by

NAMES = ("pitts30k", "tokyo247", "nordland", "msls-val", "robotcar-v2", "extended-cmu")


def images(*names: str, file: str = "list.txt") -> ImageList:
    return ImageList(Path(file), names, tuple(range(1, len(names) + 1)))


def numbered(count: int, pattern: str = "{}.jpg", file: str = "list.txt") -> ImageList:
    return images(*(pattern.format(i) for i in range(count)), file=file)


def small(name: str, **changes: object) -> Benchmark:
    """The benchmark with other counts."""
    return dataclasses.replace(Benchmark.load(name), **changes)


def message_of(error: type[Exception], call, *words: object) -> str:
    with pytest.raises(error) as caught:
        call(*words)
    message = str(caught.value)
    assert message.count("\n") <= 1
    return message


# The registry ----------------------------------------------------------------------------------


def test_names():
    assert tuple(BENCHMARKS) == NAMES
    assert all(Benchmark.load(name).name == name for name in NAMES)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pitts3k", "pitts30k"),
        ("Nordland", "nordland"),
        ("msls", "msls-val"),
        ("?", "pitts30k, tokyo247, nordland"),
    ],
)
def test_unknown_name(name, words):
    message = message_of(ConfigError, Benchmark.load, name)
    assert repr(name) in message
    assert words in message


def test_what_the_benchmarks_name_is_published():
    for benchmark in BENCHMARKS.values():
        assert {*benchmark.query_lists, *benchmark.index_lists} <= {*catalog.IMAGE_LISTS}
        assert benchmark.ground_truth in (None, *catalog.GROUND_TRUTH_FILES)


def test_groups_add_up():
    benchmark = Benchmark.load("msls-val")
    assert (
        sum(group.num_queries for group in benchmark.groups_needed) == benchmark.num_queries == 740
    )
    assert sum(group.num_index for group in benchmark.groups_needed) == benchmark.num_index


def test_seven_frames():
    """What is said of Nordland's tolerance is what its ground truth means."""
    benchmark = Benchmark.load("nordland")
    positions = np.repeat(np.arange(40.0), 2).reshape(-1, 2)
    positives = GroundTruth(positions, positions, benchmark.tolerance).positives()
    assert positives[20].tolist() == list(range(20 - 7, 20 + 7 + 1))
    assert "7 frames" in benchmark.remark
    assert benchmark.tolerance_text == "10 on [i, i], which is 7 frames"
    assert Benchmark.load("pitts30k").tolerance_text == "25 m"
    assert Benchmark.load("robotcar-v2").tolerance_text == ""


def test_no_published_lists():
    benchmark = Benchmark.load("robotcar-v2")
    message = message_of(ImageListError, benchmark.lists)
    assert re.search("robotcar-v2 .*patchnetvlad-dataset create", message)
    assert benchmark.truth() is None


# The published files ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The data files of the pinned wheel, fetched unless they lie with the package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATCHNETVLAD_HOME", str(tmp_path_factory.mktemp("home")))
        try:
            data_files.fetch_data()
        except AssetError as error:
            if "no package index" in str(error):
                pytest.skip(str(error).splitlines()[0])
            raise
        yield


@pytest.mark.network
@pytest.mark.usefixtures("published")
class TestPublished:
    @pytest.mark.parametrize(
        ("name", "num_queries", "num_index", "tolerance"),
        [
            ("pitts30k", 6816, 10_000, 25),
            ("tokyo247", 315, 75_984, 25),
            ("nordland", 27_592, 27_592, 10),
        ],
    )
    def test_ground_truth_passes(self, name, num_queries, num_index, tolerance):
        benchmark = Benchmark.load(name)
        queries, index = benchmark.lists()
        truth = benchmark.truth()
        benchmark.check(queries, index, truth)
        assert (len(queries), len(index)) == (num_queries, num_index)
        assert (len(truth.utm_queries), len(truth.utm_index)) == (num_queries, num_index)
        assert truth.threshold == tolerance

    @pytest.mark.parametrize("name", ["pitts30k", "tokyo247", "nordland"])
    def test_another_distance_does_not(self, name):
        benchmark = Benchmark.load(name)
        truth = dataclasses.replace(benchmark.truth(), threshold=26.0)
        message = message_of(GroundTruthError, benchmark.check, *benchmark.lists(), truth)
        assert re.search(rf"\b{name}\b.*posDistThr.*\b26\b", message)

    def test_tokyo_in_another_order_does_not(self):
        benchmark = Benchmark.load("tokyo247")
        truth = benchmark.truth()
        rolled = dataclasses.replace(truth, utm_index=np.roll(truth.utm_index, 1, axis=0))
        message = message_of(GroundTruthError, benchmark.check, *benchmark.lists(), rolled)
        assert re.search(r"\btokyo247\b.* 0 to 11\b.*\b12\b", message)

    def test_msls(self, tmp_path):
        benchmark = Benchmark.load("msls-val")
        queries, index = benchmark.lists()
        benchmark.check(queries, index)
        assert (len(queries), len(index)) == (740, 18_871)
        assert benchmark.truth() is None
        (cph_q, cph_i), (sf_q, sf_i) = benchmark.groups(queries.names, index.names)
        assert (len(cph_q), len(cph_i)) == (498, 12_556)
        assert (len(sf_q), len(sf_i)) == (242, 6315)
        assert all("/sf/" in index.names[row] for row in sf_i)
        written = benchmark.write_lists(tmp_path / "new")
        assert [path.name for path in written] == ["query.txt", "index.txt"]
        assert ImageList.read(written[0]).names == queries.names
        assert ImageList.read(written[1]).names == index.names
        assert "mapillarysf_imageNames_query.txt" in queries.where(739)

    def test_lists_of_another_benchmark_do_not_pass(self):
        message = message_of(
            ImageListError, Benchmark.load("pitts30k").check, *Benchmark.load("tokyo247").lists()
        )
        assert "6,816 queries" in message
        assert "315" in message
        assert "tokyo247_imageNames_query.txt" in message


# What is asserted ------------------------------------------------------------------------------


class TestCheck:
    def test_counts(self):
        benchmark = small("pitts30k", num_queries=2, num_index=3)
        benchmark.check(numbered(2), numbered(3))
        message = message_of(
            ImageListError, benchmark.check, numbered(2), numbered(4, file="index.txt")
        )
        assert re.search(r"\bpitts30k\b.*\b3 index images\b.*index\.txt .*\b4\b", message)

    def test_ground_truth_of_other_lists(self):
        benchmark = small("pitts30k", num_queries=2, num_index=3)
        truth = GroundTruth(np.zeros((2, 2)), np.zeros((4, 2)), 25.0)
        message = message_of(GroundTruthError, benchmark.check, numbered(2), numbered(3), truth)
        assert re.search(r"\bpitts30k: utmDb .*\b4 rows\b.*\b3 index images", message)

    def test_frames_must_be_diagonal(self):
        benchmark = small("nordland", num_queries=4, num_index=4)
        diagonal = np.repeat(np.arange(4.0), 2).reshape(-1, 2)
        benchmark.check(numbered(4), numbered(4), GroundTruth(diagonal, diagonal, 10.0))
        straight = diagonal * [1, 0]
        truth = GroundTruth(diagonal, straight, 10.0)
        message = message_of(GroundTruthError, benchmark.check, numbered(4), numbered(4), truth)
        assert re.search(r"\[1, 1\] .*image 1\b.*utmDb.*\[1\.0, 0\.0\]", message)

    def test_cutouts_without_ground_truth(self):
        benchmark = small("tokyo247", num_queries=1, num_index=None)
        benchmark.check(numbered(1), numbered(24))
        message = message_of(ImageListError, benchmark.check, numbered(1), numbered(25))
        assert re.search(r"list\.txt .*\b25 images\b.*\b12\b", message)

    def test_city_counts(self):
        benchmark = small(
            "msls-val",
            num_queries=3,
            num_index=4,
            groups_needed=(Group("cph", 1, 2), Group("sf", 2, 2)),
        )
        index = images("cph/database/a", "cph/database/b", "sf/database/a", "sf/database/b")
        benchmark.check(images("sf/query/1", "cph/query/1", "sf/query/2"), index)
        message = message_of(
            ImageListError,
            benchmark.check,
            images("sf/query/1", "cph/query/1", "cph/query/2", file="q.txt"),
            index,
        )
        assert re.search(r"\b1 queries\b.*\bcph\b.*q\.txt .*\b2\b", message)
        message = message_of(
            ImageListError,
            benchmark.check,
            images("sf/1", "cph/1", "zurich/2", file="q.txt"),
            index,
        )
        assert re.search(r"zurich/2 \(q\.txt, line 3\) .*cph\|sf", message)

    def test_cameras_of_robotcar(self):
        benchmark = Benchmark.load("robotcar-v2")
        index = images("images/overcast-reference/rear/1.jpg")
        benchmark.check(images("night\\rear\\2.jpg", "./sun/left/3.jpg"), index)
        message = message_of(ImageListError, benchmark.check, images("night/rear.jpg"), index)
        assert "night/rear.jpg (list.txt, line 1) " in message

    def test_slices_of_cmu(self):
        benchmark = Benchmark.load("extended-cmu")
        index = images("slice2/database/1.jpg", "slice3/database/1.jpg")
        benchmark.check(images("slice3/query/1.jpg"), index)
        message = message_of(ImageListError, benchmark.check, images("slice4/query/1.jpg"), index)
        assert re.search(r"\bslice4\b.*\b1 queries\b.*index", message)


# How is searched -------------------------------------------------------------------------------


class TestGroups:
    def test_all_together(self):
        ((queries, index),) = Benchmark.load("pitts30k").groups(["a", "b"], ["c"])
        assert (queries.tolist(), index.tolist()) == ([0, 1], [0])

    def test_by_the_innermost_folder(self):
        groups = Benchmark.load("msls-val").groups(
            ["/disk/sf/train_val/cph/query/1", "/disk/sf/train_val/sf/query/2"],
            ["./train_val/sf/database/sf.jpg", "C:\\train_val\\cph\\1.jpg", "sf/cph.jpg"],
        )
        assert [(q.tolist(), n.tolist()) for q, n in groups] == [([0], [1]), ([1], [0, 2])]

    def test_a_part_without_queries_is_not_searched(self):
        groups = Benchmark.load("extended-cmu").groups(["slice3/1"], ["slice2/1", "slice3/1"])
        assert [(q.tolist(), n.tolist()) for q, n in groups] == [([0], [1])]

    def test_no_group(self):
        message = message_of(
            ImageListError, Benchmark.load("msls-val").groups, ["cph.jpg"], ["cph/1"]
        )
        assert re.search(r"cph\.jpg .*cph\|sf", message)

    def test_a_part_without_index(self):
        message = message_of(ImageListError, Benchmark.load("msls-val").groups, ["sf/1"], ["cph/1"])
        assert re.search(r"\bsf\b.*\b1 queries\b.*index", message)


@pytest.fixture
def world():
    """Queries [7, 8] and an index [40, 8] of random descriptors."""
    random = np.random.default_rng(0)
    return random.random((7, 8), np.float32), random.random((40, 8), np.float32)


def nearest(query, index, rows, k):
    """Brute force, among these rows."""
    distances = ((index[rows].astype(np.float64) - query) ** 2).sum(axis=1)
    return [int(rows[i]) for i in np.argsort(distances, kind="stable")[:k]]


class TestRetrieveInGroups:
    GROUPS = (
        (np.array([0, 3, 6]), np.arange(0, 40, 2)),
        (np.array([1, 2, 4, 5]), np.arange(1, 40, 2)),
    )

    def test_each_query_finds_its_own(self, world):
        queries, index = world
        found = retrieve_in_groups(queries, index, 5, self.GROUPS)
        assert (found.shape, found.dtype) == ((7, 5), np.int64)
        for members, rows in self.GROUPS:
            for q in members:
                assert found[q].tolist() == nearest(queries[q], index, rows, 5)

    def test_one_group_is_plain_retrieval(self, world):
        queries, index = world
        everything = [(np.arange(7), np.arange(40))]
        np.testing.assert_array_equal(
            retrieve_in_groups(queries, index, 9, everything), retrieve(queries, index, 9)
        )

    def test_parameters(self, world):
        truth = retrieve_in_groups(*world, 2, self.GROUPS)
        found = [
            retrieve_in_groups(*world, 2, self.GROUPS, spec=IndexSpec("IVF4,Flat", parameters))
            for parameters in ("nprobe=4", "nprobe=1")
        ]
        np.testing.assert_array_equal(found[0], truth)
        assert (found[1] != truth).any()

    def test_no_more_than_the_smallest_group_has(self, world):
        groups = [(np.arange(4), np.arange(3)), (np.arange(4, 7), np.arange(3, 40))]
        found = retrieve_in_groups(*world, 10, groups)
        assert found.shape == (7, 3)
        assert (found[:4] < 3).all()
        assert (found[4:] >= 3).all()

    def test_images_without_features_are_in_no_answer(self, world):
        """A search leaves them out, so that a group may have less than k of them left."""
        queries, index = world
        index[[4, 7]] = np.nan
        numbers = []

        def search(ours, rows, top_k, spec):
            there = np.flatnonzero(np.isfinite(rows).all(axis=1))
            numbers.append(len(there))
            return there[retrieve_by(ours, rows[there], top_k, spec)]

        groups = [(np.arange(4), np.arange(5)), (np.arange(4, 7), np.arange(5, 40))]
        found = retrieve_in_groups(queries, index, 10, groups, search=search)
        assert numbers == [4, 34]
        assert found.shape == (7, 4)
        for q in range(7):
            rows = np.setdiff1d(groups[q > 3][1], [4, 7])
            assert found[q].tolist() == nearest(queries[q], index, rows, 4)

    def test_saved_indexes_are_kept_apart(self, world, tmp_path):
        path = tmp_path / "index.faiss"
        first = retrieve_in_groups(*world, 5, self.GROUPS, spec=IndexSpec(index_path=path))
        assert {file.name for file in tmp_path.glob("*.faiss.?")} == {
            "index.faiss.0",
            "index.faiss.1",
        }
        again = retrieve_in_groups(*world, 5, self.GROUPS, spec=IndexSpec(index_path=path))
        np.testing.assert_array_equal(first, again)

    @pytest.mark.parametrize(
        "groups",
        [
            [],
            [(np.arange(6), np.arange(40))],
            [(np.arange(7), np.arange(40)), (np.array([0]), np.arange(40))],
        ],
        ids=["none", "one query in none", "one query in two"],
    )
    def test_queries_must_be_in_one_group(self, world, groups):
        with pytest.raises(ValueError, match="one group"):
            retrieve_in_groups(*world, 5, groups)

    def test_group_without_index(self, world):
        with pytest.raises(ValueError, match=r"group .*index"):
            retrieve_in_groups(*world, 5, [(np.arange(7), np.arange(0))])


class TestRetrieve:
    def test_per_city(self, world):
        queries, index = world
        cities = ["cph", "sf"]
        query_names = [f"{cities[i % 2]}/query/{i}" for i in range(7)]
        index_names = [f"{cities[i // 20]}/database/{i}" for i in range(40)]
        found = retrieve_for_benchmark(
            Benchmark.load("msls-val"), queries, index, query_names, index_names, 4
        )
        for q in range(7):
            rows = np.arange(20) + 20 * (q % 2)
            assert found[q].tolist() == nearest(queries[q], index, rows, 4)

    def test_best_cutout_of_each_panorama(self):
        random = np.random.default_rng(1)
        queries = random.random((6, 8), np.float32)
        index = random.random((5 * CUTOUTS, 8), np.float32)
        names = [str(i) for i in range(len(index))]
        # Not by a file name: the benchmark decides.
        found = retrieve_for_benchmark(
            Benchmark.load("tokyo247"), queries, index, names[:6], names, 3
        )
        assert found.shape == (6, 3)
        for q in range(6):
            best = [
                nearest(queries[q], index, np.arange(CUTOUTS) + CUTOUTS * p, 1)[0] for p in range(5)
            ]
            assert found[q].tolist() == nearest(queries[q], index, np.array(best), 3)

    def test_plain(self, world):
        names = [str(i) for i in range(40)]
        np.testing.assert_array_equal(
            retrieve_for_benchmark(Benchmark.load("pitts30k"), *world, names[:7], names, 6),
            retrieve(*world, 6),
        )


# What is said ----------------------------------------------------------------------------------


class TestCitation:
    def test_everything(self):
        line = Benchmark.load("nordland").citation_line(
            num_queries=27_592,
            num_index=27_592,
            weights="/somewhere/mapillary_WPCA4096.pth.tar",
            weights_hash="0123456789abcdef" * 4,
            config="performance",
            n_values=(1, 5),
            recalls={"NetVLAD": np.array([0.25, 1 / 3]), "PatchNetVLAD": [0.5, 0.75]},
            num_without_positives=2,
            version="1.2.3",
        )
        assert line == (
            "nordland: 27,592 queries, 27,592 index images, tolerance 10 on [i, i], which is 7 "
            "frames; weights mapillary_WPCA4096.pth.tar (sha256 0123456789ab); config performance; "
            "patchnetvlad 1.2.3; NetVLAD R@1 0.2500 R@5 0.3333; PatchNetVLAD R@1 0.5000 R@5 0.7500;"
            " 2 queries without a positive, counted as missed; positions are [i, i], so that a "
            "distance of 10 is 7 frames (7 * sqrt(2) = 9.9), not 10"
        )

    def test_without_ground_truth(self):
        line = Benchmark.load("robotcar-v2").citation_line(
            num_queries=1, num_index=2, weights=None, config="speed"
        )
        assert line.startswith("robotcar-v2: 1 queries, 2 index images; weights not known; config")
        assert "no recalls: no ground truth" in line
        assert "visuallocalization.net" in line
        assert "\n" not in line

    def test_ground_truth_of_ones_own(self):
        words = {"num_queries": 1, "num_index": 2, "weights": None, "config": "speed"}
        line = Benchmark.load("robotcar-v2").citation_line(
            **words, tolerance=5.0, n_values=[1], recalls={"NetVLAD": [1.0]}
        )
        assert "2 index images, tolerance 5 m; " in line
        line = Benchmark.load("pitts30k").citation_line(**words, tolerance=5.0)
        assert "tolerance 25 m" in line

    @pytest.mark.parametrize(
        ("name", "weights", "said"),
        [
            ("pitts30k", "mapillary_WPCA128.pth.tar", "weights of mapillary; the paper uses those"),
            ("msls-val", "pittsburgh_WPCA512.pth.tar", "weights of pittsburgh"),
            ("msls-val", "x/pitts_WPCA512.pth.tar", "weights of pittsburgh"),
            ("pitts30k", "pittsburgh_WPCA128.pth.tar", None),
            ("nordland", "mapillary_WPCA128.pth.tar", None),
            ("nordland", "pittsburgh/own.pth.tar", None),
        ],
    )
    def test_unusual_weights_are_said(self, name, weights, said):
        notes = Benchmark.load(name).notes(weights)
        spoken = [note for note in notes if note.startswith("weights of")]
        assert len(spoken) == (said is not None)
        assert all(note.startswith(said) for note in spoken)


# Lists -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", " a.jpg", "a.jpg\n", "a\nb.jpg", "a\rb", "\0"])
def test_names_that_cannot_stand_in_a_list(tmp_path, name):
    with pytest.raises(ImageListError, match=rf"{re.escape(repr(name))} .*{tmp_path}/out\.txt"):
        write_names(["fine.jpg", name], tmp_path / "out.txt")
    assert list(tmp_path.iterdir()) == []


def test_list_that_cannot_be_written(tmp_path):
    with pytest.raises(OutputError, match=rf"{tmp_path}/missing/out\.txt "):
        write_names(["a"], tmp_path / "missing" / "out.txt")
