# SPDX-License-Identifier: MIT
"""Models that describe images, and matches of two."""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image
from place_data import SMALL, picture

import patchnetvlad
from patchnetvlad import PatchNetVLADError, PlaceIndex, load_model, match
from patchnetvlad.assets import demo_images
from patchnetvlad.assets.catalog import SHIPPED_CHECKPOINT
from patchnetvlad.datasets.images import input_transform, load_image
from patchnetvlad.errors import (
    CheckpointError,
    ConfigError,
    DeviceError,
    FeatureError,
    ImageError,
    RemoteError,
)
from patchnetvlad.models.describer import Describer

pytestmark = pytest.mark.usefixtures("thin_network")


@pytest.fixture(scope="module")
def model():
    return load_model(SMALL, device="cpu")


class TestLoadModel:
    def test_by_name_file_and_config(self, real_network, tmp_path):
        file = tmp_path / "mine.ini"
        file.write_text(
            "[feature_extract]\nimageresizeW = 128\nimageresizeH = 96\ncachebatchsize = 2\n"
            "[global_params]\npooling = netvlad\nnum_pcs = 128\n"
            f"resumePath = {SHIPPED_CHECKPOINT}\n"
        )
        for config in ("demo", file, SMALL):
            model = load_model(config, device="cpu")
            assert model.dimension == 128
            assert model.device == torch.device("cpu")
        assert load_model(file, device="cpu").config.pooling == "netvlad"

    def test_weights_replace_those_of_the_configuration(self, real_network, tmp_path):
        config = replace(SMALL, resume_path=str(tmp_path / "nowhere"))
        assert load_model(config, weights=SHIPPED_CHECKPOINT, device="cpu").dimension == 128
        with pytest.raises(CheckpointError, match=r"num_pcs = 64;.*num_pcs = 128"):
            load_model(replace(SMALL, num_pcs=64), weights=SHIPPED_CHECKPOINT, device="cpu")

    def test_errors_are_the_packages_own(self):
        with pytest.raises(ConfigError, match=r"'demmo'.*'demo'"):
            load_model("demmo")
        with pytest.raises(DeviceError, match="'tpu'"):
            load_model("demo", device="tpu")

    def test_nothing_is_printed(self, capfd, caplog):
        caplog.set_level(logging.INFO, "patchnetvlad")
        model = load_model(SMALL, device="cpu")
        match(*model.describe([picture(0), picture(1)]))
        assert capfd.readouterr() == ("", "")
        assert " on cpu " in caplog.text


class TestDescribe:
    def test_as_the_network_says(self, model, tmp_path):
        path = tmp_path / "a.png"
        picture(0, (300, 200)).save(path)
        found = model.describe(path)
        tensor = input_transform((96, 128))(load_image(path))
        expected = Describer.load(SMALL, torch.device("cpu")).describe(tensor[None])[0]
        np.testing.assert_array_equal(found.descriptor, expected.descriptor)
        for ours, theirs in zip(found.patches, expected.patches, strict=True):
            np.testing.assert_array_equal(ours, theirs)
        assert found.name == str(path)
        assert found.image.shape == (96, 128, 3)
        assert [p.shape for p in found.patches] == [(35, 128), (24, 128)]
        assert [k.shape for k in found.keypoints] == [(35, 2), (24, 2)]
        assert found.keypoints[0][0].tolist() == [15, 15]
        assert "35 of size 2, 24 of size 3" in repr(found)

    def test_everything_that_stands_for_an_image(self, model, tmp_path):
        image = picture(1)
        array = np.asarray(image)
        image.save(tmp_path / "a.png")
        tensor = torch.from_numpy(array.copy()).permute(2, 0, 1)
        rgba = np.dstack([array, np.full(array.shape[:2], 9, np.uint8)])
        kinds = [
            tmp_path / "a.png",
            str(tmp_path / "a.png"),
            image,
            image.convert("RGBA"),
            array,
            rgba,
            tensor,
            tensor.float() / 255,
        ]
        one = model.describe(image)
        for kind in kinds:
            np.testing.assert_array_equal(model.describe(kind).descriptor, one.descriptor)
        found = model.describe(kinds)
        assert len(found) == len(kinds)
        for described in found:
            np.testing.assert_array_equal(described.patches[1], one.patches[1])
        for several in (
            np.stack([array, array]),
            torch.stack([tensor, tensor]),
            (x for x in (image, array)),
            [image],
        ):
            found = model.describe(several)
            assert isinstance(found, list)
            np.testing.assert_array_equal(found[-1].descriptor, one.descriptor)
        grey = array[:, :, 0]
        three = np.dstack([grey] * 3)
        expected = model.describe(three).descriptor
        for kind in (grey, grey[:, :, None], torch.from_numpy(grey.copy())):
            np.testing.assert_array_equal(model.describe(kind).descriptor, expected)

    def test_order_and_none(self, model):
        images = [picture(i) for i in range(7)]
        found = model.describe(images)
        for image, described in zip(images, found, strict=True):
            np.testing.assert_array_equal(described.image, np.asarray(image))
        assert model.describe([]) == []

    def test_native_sizes(self):
        native = load_model(replace(SMALL, image_size=(0, 0)), device="cpu")
        sizes = [(128, 96), (160, 96), (128, 96)]
        found = native.describe([picture(0, size) for size in sizes])
        assert [d.image.shape[1::-1] for d in found] == sizes
        assert [len(d.patches[0]) for d in found] == [35, 45, 35]
        with pytest.raises(ImageError, match=r"40 x 96.*48"):
            native.describe(picture(0, (40, 96)))

    @pytest.mark.parametrize(
        ("image", "words"),
        [
            (np.zeros((96, 128, 3)), "float64"),
            (np.zeros((96, 128, 2), np.uint8), r"\[96, 128, 2\]"),
            (np.zeros((0, 128, 3), np.uint8), r"\[0, 128, 3\]"),
            (torch.zeros(5, 96, 128), r"\[5, 96, 128\]"),
            (torch.randn(3, 96, 128), "floats.*uint8"),
            (torch.full((3, 96, 128), float("nan")), "nan"),
            ([1], "int"),
            (["no_such.png"], r"no_such\.png"),
        ],
    )
    def test_bad_images(self, model, image, words):
        with pytest.raises(ImageError, match=words):
            model.describe(image)

    def test_which_image_is_bad(self, model):
        with pytest.raises(ImageError, match="image 2 "):
            model.describe([picture(0), picture(1), np.zeros((9, 9), np.float32)])

    def test_a_truncated_image_of_pillow(self, model, tmp_path):
        picture(0).save(tmp_path / "a.png")
        content = (tmp_path / "a.png").read_bytes()
        (tmp_path / "a.png").write_bytes(content[: len(content) // 2])
        with (
            Image.open(tmp_path / "a.png") as image,
            pytest.raises(ImageError, match=r"image 0 .*truncated"),
        ):
            model.describe(image)

    def test_threads_take_turns(self, model):
        images = [picture(i) for i in range(4)]
        expected = [d.descriptor for d in model.describe(images)]
        found = {}

        def work(i):
            found[i] = [d.descriptor for d in model.describe(images)]

        threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for i in range(4):
            np.testing.assert_array_equal(found[i], expected)


class TestMatch:
    def test_real_photographs(self, real_network):
        model = load_model("demo", device="cpu")
        images = demo_images()
        a, b = model.describe([images["tokyo_query"], images["tokyo_db"]])
        found = match(a, b)
        weights = model.config.patch_weights
        assert found.score == pytest.approx(-(found.patch_scores @ np.array(weights)))
        assert found.score > 0
        for (ours, theirs), matches in zip(found.inliers, found.matches, strict=True):
            assert ours.shape == theirs.shape == (len(matches.query_patches), 2)
            assert matches.score == pytest.approx(-len(ours) / len(a.patches[0]), rel=0.5)
        # The homography maps the candidate's key points onto the query's.
        best = max(range(3), key=lambda s: len(found.inliers[s][0]))
        ours, theirs = found.inliers[best]
        mapped = np.c_[theirs, np.ones(len(theirs))] @ found.homography.T
        away = np.linalg.norm(mapped[:, :2] / mapped[:, 2:] - ours, axis=1)
        assert away.max() < 24.0 + 1e-6
        assert f"score={found.score:.5f}" in repr(found)

    def test_of_an_image_with_itself(self, model):
        (a,) = model.describe([picture(0)])
        found = match(a, a)
        assert found.score == pytest.approx(1.0)
        np.testing.assert_allclose(found.homography, np.eye(3), atol=1e-6)
        figure = found.plot()
        assert any(f"{found.score:.5f}" in text.get_text() for text in figure.findobj(Text))

    def test_spatial_scores_have_no_homography(self):
        config = replace(SMALL, matcher="spatialApproximator")
        a, b = load_model(config, device="cpu").describe([picture(0), picture(1)])
        assert match(a, b).homography is None

    def test_what_cannot_be_matched(self, model):
        a = model.describe(picture(0))
        other = load_model(replace(SMALL, patch_sizes=(2, 4)), device="cpu")
        with pytest.raises(FeatureError, match=r"3 \(stride.*4 \(stride"):
            match(a, other.describe(picture(0)))
        plain = load_model(replace(SMALL, pooling="netvlad"), device="cpu")
        with pytest.raises(ConfigError, match=r"demo\.ini: .*pooling = patchnetvlad.*netvlad"):
            match(plain.describe(picture(0)), plain.describe(picture(1)))
        with pytest.raises(FeatureError, match=r"\bstr\b"):
            match("a.png", a)


def test_the_public_names():
    for name in patchnetvlad.__all__:
        assert getattr(patchnetvlad, name).__doc__
        assert name in dir(patchnetvlad)
    assert issubclass(PatchNetVLADError, Exception)
    with pytest.raises(AttributeError, match="extract_all"):
        _ = patchnetvlad.extract_all


@pytest.mark.parametrize("what", ["file", "bytes", "mapping", "number"])
def test_what_is_no_image(model, what, tmp_path):
    (tmp_path / "a").write_bytes(b"line\nline\n")
    with (tmp_path / "a").open("rb") as file:
        given = {"file": file, "bytes": bytearray(b"a"), "mapping": {"a": 1}, "number": 5}[what]
        with pytest.raises(ImageError, match=type(given).__name__):
            model.describe(given)
        with pytest.raises(ImageError, match=type(given).__name__):
            PlaceIndex(model).add(given)


def test_a_host_that_is_not_there(model):
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="localhost:1") as caught:
        model.describe("http://localhost:1/a.jpg")
    assert time.monotonic() - begin < 10
    assert "AWS" not in str(caught.value)


def test_messages_can_be_printed(model):
    with pytest.raises(ImageError) as caught:
        model.describe("\ud800.jpg")
    assert str(caught.value).encode()
