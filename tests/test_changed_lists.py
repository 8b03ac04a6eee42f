# SPDX-License-Identifier: MIT
"""Features belong to their images: lists that gain, lose or reorder some."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from place_data import SMALL, picture

from patchnetvlad import PlaceIndex, extract, load_model, rerank
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.errors import FeatureError, ImageError, OtherFeaturesError
from patchnetvlad.features.inspect import store_info, verify_features
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.models.describer import Describer

pytestmark = pytest.mark.usefixtures("thin_network")
NAMES = [f"{i}.jpg" for i in range(6)]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for i, name in enumerate(NAMES):
        picture(i).save(folder / name)
    return folder


@pytest.fixture
def described(monkeypatch):
    """Count the images that the network sees."""
    seen = []
    encode = Describer.encode

    def counted(self, batch):
        seen.extend(range(len(batch)))
        return encode(self, batch)

    monkeypatch.setattr(Describer, "encode", counted)
    return seen


def run(names, images, out, **options):
    listed = ImageList(out.parent / "list.txt", tuple(names), tuple(range(1, len(names) + 1)))
    return extract(SMALL, listed, images, out, device="cpu", progress=False, **options)


class TestExtraction:
    @pytest.mark.parametrize(
        ("before", "after", "new"),
        [
            pytest.param([0, 1, 2], [0, 1, 2, 3], 1, id="gained"),
            pytest.param([0, 1, 2], [3, 0, 1, 2], 1, id="gained-first"),
            pytest.param([0, 1, 2], [0, 2], 0, id="lost"),
            pytest.param([0, 1, 2], [2, 0, 1], 0, id="reordered"),
            pytest.param([0, 1, 2], [4, 2, 2, 5, 0], 2, id="all-of-it"),
            pytest.param([0, 1], [2, 3], 2, id="others"),
        ],
    )
    def test_costs_only_the_new_images(self, images, tmp_path, described, before, after, new):
        names = [NAMES[i] for i in after]
        run([NAMES[i] for i in before], images, tmp_path / "f")
        described.clear()
        rows = run(names, images, tmp_path / "f")
        assert len(described) == new
        expected = run(names, images, tmp_path / "fresh")
        np.testing.assert_array_equal(rows, expected)
        ours, theirs = (StoreReader(tmp_path / f, names, SMALL, images) for f in ("f", "fresh"))
        for i in range(len(names)):
            for a, b in zip(ours.arrays(i), theirs.arrays(i), strict=True):
                np.testing.assert_array_equal(a, b)
        assert not verify_features(tmp_path / "f", progress=False).damages
        info = store_info(tmp_path / "f")
        assert info.finished
        assert (info.num_images, info.num_done) == (len(names), len(names))

    def test_and_back_again(self, images, tmp_path, described):
        whole = np.array(run(NAMES, images, tmp_path / "f"))
        run(NAMES[:2], images, tmp_path / "f")
        described.clear()
        np.testing.assert_array_equal(run(NAMES, images, tmp_path / "f"), whole)
        assert not described

    def test_a_changed_image_is_noticed(self, images, tmp_path, described):
        run(NAMES, images, tmp_path / "f")
        described.clear()
        picture(9).save(images / NAMES[1])
        stamp = (images / NAMES[0]).stat().st_mtime_ns + 10**9
        os.utime(images / NAMES[1], ns=(stamp, stamp))
        run(NAMES[:3], images, tmp_path / "f")
        assert len(described) == 1

    def test_interrupted_between_list_and_features(self, images, tmp_path, described, monkeypatch):
        run(NAMES[:2], images, tmp_path / "f")
        with monkeypatch.context() as patch:
            patch.setattr(Describer, "encode", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
            with pytest.raises(KeyboardInterrupt):
                run(NAMES[1:4], images, tmp_path / "f")
        described.clear()
        np.testing.assert_array_equal(
            run(NAMES[:2], images, tmp_path / "f"), run(NAMES[:2], images, tmp_path / "fresh")
        )
        assert len(described) == 2  # of the fresh ones

    def test_same_names_in_another_folder_are_other_images(self, images, tmp_path):
        run(NAMES, images, tmp_path / "f")
        other = tmp_path / "other"
        images.rename(other)
        for names in (NAMES, NAMES[:3]):
            with pytest.raises(
                OtherFeaturesError, match=f"{tmp_path}/f .*another folder.*--no-resume"
            ):
                run(names, other, tmp_path / "f")

    def test_an_index_of_places_keeps_its_list(self, images, tmp_path, monkeypatch):
        monkeypatch.chdir(images)
        model = load_model(SMALL, device="cpu")
        with PlaceIndex(model, tmp_path / "f") as index:
            index.add(NAMES[:3])
            index.save()
        with pytest.raises(
            OtherFeaturesError, match=f"{tmp_path}/f .*index of places.*--no-resume"
        ):
            run([NAMES[3], NAMES[0]], images, tmp_path / "f")
        with PlaceIndex.load(tmp_path / "f", model) as index:
            assert index.query(NAMES[1]).best.key == NAMES[1]

    def test_other_settings_are_refused(self, images, tmp_path):
        run(NAMES, images, tmp_path / "f")
        listed = ImageList(tmp_path / "list.txt", tuple(NAMES[:2]), (1, 2))
        with pytest.raises(OtherFeaturesError, match=r"strides: \[1, 1\] -> \[2, 2\]"):
            extract(replace(SMALL, strides=(2, 2)), listed, images, tmp_path / "f", device="cpu")


class TestMatching:
    def match(self, queries, index, images, tmp_path):
        lists = [
            ImageList(tmp_path / f"{what}.txt", tuple(names), tuple(range(1, len(names) + 1)))
            for what, names in (("query", queries), ("index", index))
        ]
        return rerank(
            SMALL, *lists, tmp_path / "f", tmp_path / "f", dataset_root=images,
            results_dir=tmp_path / "results", device="cpu", progress=False, resume=False,
        )  # fmt: skip

    def test_a_store_may_hold_more_than_a_list_names(self, images, tmp_path):
        run(NAMES, images, tmp_path / "f")
        queries, index = [NAMES[5], NAMES[1]], [NAMES[3], NAMES[1], NAMES[5]]
        found = self.match(queries, index, images, tmp_path)
        assert [found.index_names[row[0]] for row in found.reranked] == queries
        assert found.reranked.shape == (2, 3)

    def test_images_by_other_names(self, images, tmp_path):
        run(NAMES, images, tmp_path / "f")
        absolute = [str(images / NAMES[i]) for i in (4, 2)]
        found = self.match([NAMES[2]], absolute, images, tmp_path)
        assert found.index_names[found.reranked[0, 0]] == absolute[1]

    def test_a_missing_image_is_named(self, images, tmp_path):
        run(NAMES[:3], images, tmp_path / "f")
        with pytest.raises(
            FeatureError, match=rf"{tmp_path}/f .*\b1 of 3\b.*{NAMES[4]};.*feature_extract"
        ):
            self.match([NAMES[0]], [NAMES[0], NAMES[4], NAMES[1]], images, tmp_path)


class TestBrokenImages:
    def test_are_left_out_when_asked(self, images, tmp_path):
        (images / NAMES[2]).write_bytes(b"\xff\xd8\xff not a photograph")
        rows = run(NAMES, images, tmp_path / "f", skip_broken=True)
        assert np.isnan(rows[2]).all()
        assert np.isfinite(np.delete(rows, 2, axis=0)).all()
        assert list(store_info(tmp_path / "f").failed) == [NAMES[2]]
        found = TestMatching().match([NAMES[0]], NAMES, images, tmp_path)
        assert 2 not in found.retrieved
        assert len(found.retrieved[0]) == len(NAMES) - 1

    def test_are_tried_again(self, images, tmp_path, described):
        (images / NAMES[2]).write_bytes(b"\xff\xd8\xff not a photograph")
        run(NAMES, images, tmp_path / "f", skip_broken=True)
        picture(2).save(images / NAMES[2])
        described.clear()
        assert np.isfinite(run(NAMES, images, tmp_path / "f")).all()
        assert len(described) == 1

    def test_stop_the_run_otherwise(self, images, tmp_path):
        (images / NAMES[2]).write_bytes(b"\xff\xd8\xff not a photograph")
        with pytest.raises(ImageError, match=rf"{NAMES[2]} \(.*list\.txt, line 3\)"):
            run(NAMES, images, tmp_path / "f")
        assert store_info(tmp_path / "f").num_done == len(NAMES) - 1
