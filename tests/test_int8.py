# SPDX-License-Identifier: MIT
"""``precision = int8``: its products against plain integers, its ranges, its refusals.

Processors without instructions for it sum up pairs of products in 16 bits, which values above 127
can overflow. There, tests of exact values keep below, and all others allow it.
"""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import REPOSITORY
from PIL import Image
from torch import nn

from patchnetvlad.assets.catalog import SHIPPED_CHECKPOINT
from patchnetvlad.base import device
from patchnetvlad.base.device import choose_precision, multiplies_int8
from patchnetvlad.cli import calibrate as cli
from patchnetvlad.cli import feature_extract
from patchnetvlad.config import Config
from patchnetvlad.datasets.images import IMAGENET_MEAN, IMAGENET_STD, input_transform, load_image
from patchnetvlad.errors import (
    ArgumentError,
    AssetError,
    CheckpointError,
    ConfigError,
    DeviceError,
    FeatureError,
    ImageError,
)
from patchnetvlad.features.open import open_reader
from patchnetvlad.models.checkpoint import load_network
from patchnetvlad.models.describer import Describer
from patchnetvlad.models.encoder import build_encoder, for_inference
from patchnetvlad.models.int8 import (
    Int8Encoder,
    Ranges,
    add_int8_product,
    encoder_sha256,
    find_ranges,
    measure_ranges,
    quantise_rows,
    ranges_file,
    read_ranges,
    whiten_int8,
)
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.recipes.calibrate import calibrate

LARGEST = 255 if multiplies_int8() else 127
BOUNDS = (-2.2, 2.7)
CONFIG = Config(
    resume_path="./pretrained_models/imagenet_WPCA",
    num_pcs=128,
    image_size=(96, 128),
    match_image_size=(96, 128),
    patch_sizes=(2, 3),
    strides=(1, 1),
    patch_weights=(0.5, 0.5),
    precision="int8",
)
INI = """
[feature_extract]
cachebatchsize = 2
imageresizeW = 128
imageresizeH = 96
[global_params]
pooling = patchnetvlad
resumePath = ./pretrained_models/imagenet_WPCA
num_pcs = 128
patch_sizes = 2,3
strides = 1,1
precision = int8
"""


@pytest.fixture
def offered(monkeypatch):
    """Let this processor pass for one with the instructions."""
    monkeypatch.setattr(device, "multiplies_int8", lambda: True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for i in range(5):
        blocks = rng.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(blocks).resize((160, 120)).save(root / f"{i}.png")
    (root / "list.txt").write_text("".join(f"{i}.png\n" for i in range(5)))
    return root


@pytest.fixture
def thin_ranges(thin_network, thin_home, images):
    """The ranges of the thin network, beside its checkpoint."""
    made = calibrate(CONFIG, images, device="cpu", progress=False)
    yield made.file
    made.file.unlink(missing_ok=True)


def without_overflow(ranges):
    """Where the largest values would overflow, let values fill the lower half of the steps."""
    if LARGEST == 255:
        return ranges
    return replace(
        ranges, inputs=tuple((low, low + 2 * (high - low)) for low, high in ranges.inputs)
    )


def whole_numbers(convolution, seed):
    """Give weights that 8 bits hold exactly, with a scale of 1."""
    random = torch.Generator().manual_seed(seed)
    shape = convolution.weight.shape
    weight = torch.randint(-127, 128, shape, generator=random).float()
    weight.flatten(1)[:, 0] = 127.0
    convolution.weight.data.copy_(weight)
    convolution.bias.data.copy_(torch.randint(-9, 10, shape[:1], generator=random).float())
    return convolution


class TestInt8Encoder:
    @pytest.mark.parametrize("size", [(6, 8), (7, 5), (1, 1), (32, 30)])
    def test_a_convolution_is_that_of_whole_numbers(self, size):
        convolution = whole_numbers(nn.Conv2d(20, 24, 3, padding=1), 0)
        image = torch.randint(0, LARGEST + 1, (1, 20, *size)).float()
        encode = Int8Encoder(nn.Sequential(convolution), Ranges("", ((0.0, 255.0),), 1))
        expected = F.conv2d(
            image.long(), convolution.weight.long(), convolution.bias.long(), padding=1
        )
        found = encode(image)
        assert found.dtype == torch.float32
        assert found.is_contiguous()
        torch.testing.assert_close(found.long(), expected, rtol=0, atol=0)

    @pytest.mark.parametrize("size", [(6, 8), (7, 5), (2, 3), (32, 31)])
    def test_layers_are_those_of_whole_numbers(self, size):
        """Rectified, rounded to the nearest of 256 steps, cut off, pooled."""
        first = whole_numbers(nn.Conv2d(3, 16, 3, padding=1), 1)
        last = whole_numbers(nn.Conv2d(16, 8, 3, padding=1), 2)
        encoder = nn.Sequential(first, nn.ReLU(), nn.MaxPool2d(2), last)
        image = torch.randint(0, LARGEST + 1, (1, 3, *size)).float()
        step = 1024 if LARGEST == 255 else 2048  # a power of two: dividing by it is exact
        encode = Int8Encoder(encoder, Ranges("", ((0.0, 255.0), (0.0, 255.0 * step)), 1))
        maps = F.conv2d(image.double(), first.weight.double(), first.bias.double(), padding=1)
        levels = (maps.clamp_min(0) / step).round().clamp_max(255)
        assert levels.max() <= LARGEST
        levels = F.max_pool2d(levels, 2)
        expected = step * F.conv2d(levels, last.weight.double(), padding=1)
        expected += last.bias.double()[:, None, None]
        torch.testing.assert_close(encode(image).double(), expected, rtol=1e-6, atol=0)

    def test_values_below_zero(self):
        """Of a normalised image: borders are zeros of the network, not the least value."""
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1))
        images = torch.empty(2, 3, 12, 10).uniform_(-1, 0.95)
        ranges = without_overflow(Ranges("", ((-1.0, 1.0),), 1))
        found = Int8Encoder(encoder, ranges)(images)
        assert (found - encoder(images)).abs().max() < 0.05

    def test_larger_values_are_cut_off(self):
        convolution = nn.Conv2d(1, 1, 1, bias=False)
        convolution.weight.data.fill_(1.0)
        encode = Int8Encoder(nn.Sequential(convolution), Ranges("", ((0.0, 2.0),), 1))
        found = encode(torch.tensor([-1.0, 0.0, 1.0, 2.0, 9.0]).view(1, 1, 1, 5))
        torch.testing.assert_close(
            found.flatten(), torch.tensor([0.0, 0.0, 1.0, 2.0, 2.0]), rtol=0, atol=0.005
        )

    def test_images_do_not_depend_on_each_other(self):
        torch.manual_seed(0)
        encoder = nn.Sequential(nn.Conv2d(3, 32, 3), nn.ReLU(), nn.Conv2d(32, 16, 3))
        images = torch.randn(3, 3, 40, 30)
        encode = Int8Encoder(encoder, measure_ranges(encoder, images, BOUNDS))
        together = encode(images)
        torch.testing.assert_close(encode(images), together, rtol=0, atol=0)
        for image, found in zip(images, together, strict=True):
            torch.testing.assert_close(encode(image[None])[0], found, rtol=0, atol=0)

    @pytest.mark.parametrize(
        "other",
        [
            nn.GELU(),
            nn.MaxPool2d(3, 2),
            nn.MaxPool2d(2, ceil_mode=True),
            nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect"),
        ],
    )
    def test_other_layers(self, other):
        with pytest.raises(ArgumentError, match=f"VGG16.*{type(other).__name__}"):
            measure_ranges(nn.Sequential(nn.Conv2d(3, 3, 1), other), [torch.ones(3, 8, 8)], BOUNDS)

    def test_needs_ranges(self):
        with pytest.raises(ArgumentError, match="ranges"):
            for_inference(build_encoder(), "int8")
        with pytest.raises(ArgumentError, match=r"\b1\b.*\b13\b"):
            Int8Encoder(build_encoder(), Ranges("", ((0.0, 1.0),), 1))


class TestWhitening:
    def test_rows(self):
        matrix = torch.tensor([[0.5, -1.0, 0.25], [0.0, 0.0, 0.0], [254.0, 1.0, -2.0]])
        rounded, scales = quantise_rows(matrix)
        assert rounded.dtype == torch.int8
        assert rounded.tolist() == [[64, -127, 32], [0, 0, 0], [127, 0, -1]]
        torch.testing.assert_close(scales[[0, 2]], torch.tensor([1 / 127, 2.0]))

    def test_sums_are_exact(self):
        """Also of so many products of the largest values that float32 could not hold the sum."""
        size = 4096
        vectors = torch.full((3, size), 127.0)
        vectors[1, ::2], vectors[2, 1] = -127.0, 126.0
        weight = torch.full((5, size), 127, dtype=torch.int8)
        weight[1, 1], weight[2, ::3] = 126, -127
        total = torch.ones(3, 5)
        add_int8_product(total, vectors, weight.T)
        expected = vectors.long() @ weight.long().T
        assert expected.max() == 127 * 127 * size > 2**24
        torch.testing.assert_close(total, expected.float() + 1, rtol=0, atol=0)

    def test_is_near_that_of_floats(self):
        torch.manual_seed(0)
        vectors, weight, bias = torch.randn(20, 300), torch.randn(64, 300), torch.randn(64)
        found = whiten_int8(vectors, *quantise_rows(weight), bias)
        expected = F.normalize(F.linear(vectors, weight, bias), dim=1)
        torch.testing.assert_close(found.square().sum(dim=1), torch.ones(20))
        assert (found * expected).sum(dim=1).min() > 0.9998


class TestRealNetwork:
    """The shipped weights with the ranges that are shipped beside them."""

    def test_photographs(self, real_network):
        """Those of the demo, as a picture of the documentation shows them."""
        config = replace(CONFIG, resume_path=str(SHIPPED_CHECKPOINT), precision="exact")
        network = load_network(replace(config, patch_vlad="direct"), "cpu")
        ranges = without_overflow(find_ranges(SHIPPED_CHECKPOINT, network.encoder))
        int8, exact = Describer(network, precision="int8", ranges=ranges), Describer(network)
        picture = load_image(REPOSITORY / "docs" / "images" / "match.jpg")
        transform = input_transform((128, 160))
        halves = [(0, 0, picture.width // 2, picture.height)]
        halves += [(picture.width // 2, 0, picture.width, picture.height)]
        images = torch.stack([transform(picture.crop(half)) for half in halves])
        maps, expected = int8.encode(images), exact.encode(images)
        assert F.cosine_similarity(maps, expected).median() > 0.999
        assert (maps - expected).norm() < 0.05 * expected.norm()
        for ours, theirs in zip(int8.describe(images), exact.describe(images), strict=True):
            assert (ours.descriptor * theirs.descriptor).sum() > 0.999
            for a, b in zip(ours.patches, theirs.patches, strict=True):
                assert (a * b).sum(dim=1).median() > 0.995
        again = int8.describe(images[1:])[0]
        together = int8.describe(images)[1]
        for a, b in zip([again.descriptor, *again.patches],
                        [together.descriptor, *together.patches], strict=True):  # fmt: skip
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    def test_the_shipped_ranges(self):
        ranges = read_ranges(ranges_file(SHIPPED_CHECKPOINT))
        low, high = ranges.inputs[0]
        black, white = (
            [(value - m) / s for m, s in zip(IMAGENET_MEAN, IMAGENET_STD, strict=True)]
            for value in (0, 1)
        )
        assert low == pytest.approx(min(black))
        assert high == pytest.approx(max(white))
        assert all(low == 0 for low, _ in ranges.inputs[1:])
        assert len(ranges.inputs) == 13


class TestRefusals:
    def test_processors_without_the_instructions(self, monkeypatch):
        monkeypatch.setattr(device, "multiplies_int8", lambda: False)
        with pytest.raises(DeviceError, match=r"int8.*VNNI.*\bcpu\b.*precision = auto"):
            choose_precision("int8", torch.device("cpu"))

    @pytest.mark.parametrize("kind", ["cuda", "mps"])
    def test_other_devices(self, offered, kind):
        with pytest.raises(DeviceError, match=rf"int8.*\b{kind}\b.*precision = auto"):
            choose_precision("int8", torch.device(kind))
        assert choose_precision("int8", torch.device("cpu")) == "int8"

    def test_processors_that_pytorch_does_not_know(self, monkeypatch):
        multiplies_int8.cache_clear()
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
        try:
            assert not multiplies_int8()
        finally:
            multiplies_int8.cache_clear()

    def test_other_encoders(self):
        with pytest.raises(ConfigError, match=r"int8.*vgg16.*resnet18"):
            Config(precision="int8", encoder="resnet18")

    def test_nothing_is_extracted(self, thin_network, images, tmp_path, monkeypatch, capsys):
        monkeypatch.setattr(device, "multiplies_int8", lambda: False)
        (tmp_path / "my.ini").write_text(INI)
        assert run_command(images, tmp_path) == 2
        error = capsys.readouterr().err
        assert "precision = int8" in error
        assert len(error.strip().splitlines()) <= 2
        assert not (tmp_path / "out").exists()

    def test_no_ranges(self, thin_network, thin_home, offered):
        missing = thin_home / "pretrained_models" / "imagenet_WPCA128.int8.json"
        with pytest.raises(AssetError, match=rf"{re.escape(str(missing))}.*patchnetvlad calibrate"):
            Describer.load(CONFIG, torch.device("cpu"))

    def test_ranges_of_other_weights(self, thin_ranges, offered):
        content = json.loads(thin_ranges.read_text())
        thin_ranges.write_text(json.dumps({**content, "encoder": "0" * 64}))
        with pytest.raises(CheckpointError, match=rf"{thin_ranges.name}.*calibrate"):
            Describer.load(CONFIG, torch.device("cpu"))

    @pytest.mark.parametrize(
        "damaged",
        ["", "{", "[]", "null", '{"encoder": "a", "images": 1}',
         '{"encoder": "a", "images": 1, "inputs": [[1, 2]]}',
         '{"encoder": "a", "images": 1, "inputs": [[0, NaN]]}',
         '{"encoder": "a", "images": 1, "inputs": [[0, Infinity]]}',
         '{"encoder": "a", "images": 1, "inputs": [[0, 0]]}',
         '{"encoder": "a", "images": 1, "inputs": [[0, 1, 2]]}',
         '{"encoder": "a", "images": 1, "inputs": 5}',
         '{"encoder": "a", "images": 1e999, "inputs": [[0, 1]]}',
         '{"encoder": "a", "images": 1, "inputs": [["x", 1]]}'],
    )  # fmt: skip
    def test_damaged_ranges(self, thin_ranges, offered, damaged):
        thin_ranges.write_text(damaged)
        with pytest.raises(CheckpointError, match=rf"{thin_ranges.name}.*calibrate"):
            Describer.load(CONFIG, torch.device("cpu"))

    @pytest.mark.parametrize("inputs", [[], [[-1, 1], [0, 1]]])
    def test_ranges_of_other_layers(self, thin_ranges, offered, inputs):
        content = json.loads(thin_ranges.read_text())
        thin_ranges.write_text(json.dumps({**content, "inputs": inputs}))
        with pytest.raises(CheckpointError, match=rf"{thin_ranges.name}.*calibrate"):
            Describer.load(CONFIG, torch.device("cpu"))


class TestCalibrate:
    def test_ranges(self):
        """The least and largest values that enter a convolution, on all images."""
        torch.manual_seed(0)
        encoder = nn.Sequential(
            nn.Conv2d(3, 8, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 4, 3), nn.Conv2d(4, 2, 1)
        )
        images = torch.randn(4, 3, 20, 16)
        ranges = measure_ranges(encoder, images, BOUNDS)
        second, third = (encoder[:n](images).detach() for n in (2, 4))
        assert ranges.images == 4
        assert ranges.encoder == encoder_sha256(encoder)
        assert ranges.inputs[0] == BOUNDS
        assert ranges.inputs[1] == (0.0, pytest.approx(float(second.max())))
        least, most = float(third.min()), float(third.max())
        assert ranges.inputs[2] == (pytest.approx(least), pytest.approx(most))

    def test_maps_of_zeros(self):
        encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3))
        encoder[0].bias.data.fill_(-1e3)
        ranges = measure_ranges(encoder, torch.randn(2, 3, 9, 9), BOUNDS)
        found = Int8Encoder(encoder, ranges)(torch.randn(1, 3, 9, 9))
        torch.testing.assert_close(found, encoder[2].bias.data.view(1, 4, 1, 1).expand(1, 4, 5, 5))

    def test_end_to_end(self, thin_network, thin_home, images, tmp_path, offered, capsys):
        """From the command to features that match their images like those of floats."""
        (tmp_path / "my.ini").write_text(INI)
        words = ["--config_path", str(tmp_path / "my.ini"), "--images", str(images), "--nocuda"]
        file = ranges_file(thin_home / "pretrained_models" / "imagenet_WPCA128.safetensors")
        try:
            assert cli.main(words) == 0
            assert str(file) in capsys.readouterr().out
            assert read_ranges(file).images == 5
            before = file.read_bytes()
            assert cli.main(words) == 0
            assert file.read_bytes() == before
            assert run_command(images, tmp_path) == 0
        finally:
            file.unlink(missing_ok=True)
        names = [f"{i}.png" for i in range(5)]
        reader = open_reader(tmp_path / "out", names, CONFIG, images)
        assert reader.manifest.precision == "int8"
        assert reader.manifest.patch_vlad == "direct"
        describer = Describer(load_network(replace(CONFIG, precision="exact"), "cpu"))
        transform = input_transform(CONFIG.image_size)
        for i, name in enumerate(names):
            (expected,) = describer.describe(transform(load_image(images / name))[None])
            found = torch.from_numpy(np.array(reader.global_descriptors[i]))
            assert (found * expected.descriptor).sum() > 0.995
            for ours, theirs in zip(reader.patches(i), expected.patches, strict=True):
                assert (ours * theirs).sum(dim=1).median() > 0.999

    def test_broken_images(self, thin_network, thin_home, images, tmp_path, caplog):
        (tmp_path / "broken.png").write_bytes(b"no image")
        with pytest.raises(ImageError, match=str(tmp_path)):
            calibrate(CONFIG, tmp_path, device="cpu", progress=False)
        assert not ranges_file(thin_home / "pretrained_models" / "imagenet_WPCA128").exists()
        Image.open(images / "0.png").save(tmp_path / "good.png")
        Image.new("RGB", (40, 9)).save(tmp_path / "flat.png")
        native = replace(CONFIG, image_size=(0, 0))
        made = calibrate(native, tmp_path, device="cpu", progress=False)
        made.file.unlink()
        assert made.images == 1
        assert "broken.png" in caplog.text
        assert "flat.png" in caplog.text

    def test_number_of_images(self, thin_network, images):
        made = calibrate(CONFIG, images, most_images=2, device="cpu", progress=False)
        made.file.unlink()
        assert made.images == 2
        with pytest.raises(ArgumentError, match="most_images"):
            calibrate(CONFIG, images, most_images=0, device="cpu", progress=False)

    def test_names(self):
        assert ranges_file("a/b_WPCA512.pth.tar") == Path("a/b_WPCA512.int8.json")
        assert ranges_file("b.safetensors") == Path("b.int8.json")
        assert ranges_file("b.pt") == Path("b.pt.int8.json")

    def test_weights_that_share_the_shipped_encoder(self, real_network, tmp_path):
        """Such as those that ``fit`` makes: ranges are of the encoder, not of the file."""
        config = replace(CONFIG, resume_path=str(SHIPPED_CHECKPOINT), precision="exact")
        encoder = load_network(config, "cpu").encoder
        found = find_ranges(tmp_path / "other.pth.tar", encoder)
        assert found == read_ranges(ranges_file(SHIPPED_CHECKPOINT))


class TestStore:
    def test_other_precisions_are_other_features(self, thin_ranges, images, tmp_path, offered):
        def run(config):
            return extract(
                config, images / "list.txt", images, tmp_path, device="cpu", progress=False
            )

        first = run(CONFIG)
        np.testing.assert_array_equal(run(CONFIG), first)
        other = replace(CONFIG, precision="exact")  # and direct sums, as int8
        with pytest.raises(FeatureError, match="precision: int8 -> exact"):
            run(other)

    def test_batches(self, thin_ranges, images, tmp_path, offered):
        """The size of batches does not change a bit."""
        for size in (1, 4):
            extract(
                replace(CONFIG, cache_batch_size=size),
                *(images / "list.txt", images, tmp_path / str(size)),
                device="cpu", progress=False,
            )  # fmt: skip
        for file in ("globalfeats.npy", "features-00000.bin"):
            assert (tmp_path / "1" / file).read_bytes() == (tmp_path / "4" / file).read_bytes()

    def test_integral_sums_become_direct(self):
        config = Config(precision="int8", patch_vlad="integral")
        assert config.patch_vlad == "direct"
        assert Config(patch_vlad="integral").patch_vlad == "integral"


def run_command(images, folder):
    return feature_extract.main(
        ["--config_path", str(folder / "my.ini"), "--dataset_file_path", str(images / "list.txt"),
         "--dataset_root_dir", str(images), "--output_features_dir", str(folder / "out"),
         "--nocuda"]
    )  # fmt: skip
