# SPDX-License-Identifier: MIT
"""The network and the matcher as files for other programs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import thin
import torch
from place_data import SMALL, picture, write_pictures

from patchnetvlad import load_model, match
from patchnetvlad.cli.export import main
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.encoders import ENCODERS
from patchnetvlad.errors import ArgumentError, ImageError, ImageListError, OutputError
from patchnetvlad.models import checkpoint
from patchnetvlad.models.grid import ENCODER_DIM
from patchnetvlad.models.model import build_model
from patchnetvlad.recipes.export import export

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")
pytest.importorskip("onnxscript")

pytestmark = pytest.mark.usefixtures("thin_network")
SPATIAL = replace(SMALL, matcher="spatialApproximator", patch_vlad="direct")


@pytest.fixture(scope="module")
def files(tmp_path_factory, thin_network):
    folder = tmp_path_factory.mktemp("exported")
    return export(SPATIAL, folder / "network.onnx", matcher=folder / "matcher.onnx", uint8=True)


def open_file(path):
    return onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])


def names_of(values):
    return [value.name for value in values]


def test_names_shapes_and_settings(files):
    network = onnx.load(files.network)
    onnx.checker.check_model(network, full_check=True)
    assert network.opset_import[0].version >= 17
    assert names_of(network.graph.input) == ["image"]
    assert names_of(network.graph.output) == [
        "descriptor", "patches_2", "patches_3", "keypoints_2", "keypoints_3",
    ]  # fmt: skip
    shape = network.graph.input[0].type.tensor_type.shape.dim
    assert [axis.dim_param or axis.dim_value for axis in shape] == ["batch", "height", "width", 3]
    about = json.loads({p.key: p.value for p in network.metadata_props}["patchnetvlad"])
    assert about["patch_sizes"] == [2, 3]
    assert about["image_size"] == [96, 128]
    assert len(about["checkpoint"]) == 64
    assert files.difference < 1e-4


@pytest.mark.parametrize("shape", [(1, 96, 128), (3, 100, 75), (2, 208, 160)])
def test_as_the_model(files, shape):
    """Of any number and size of images; key points of the grid."""
    count, height, width = shape
    random = np.random.default_rng(0)
    images = random.integers(0, 256, (count, height, width, 3), np.uint8)
    names = ["descriptor", "patches_2", "patches_3", "keypoints_2", "keypoints_3"]
    descriptors, *found = open_file(files.network).run(names, {"image": images})
    model = load_model(replace(SPATIAL, image_size=(0, 0), match_image_size=(0, 0)), device="cpu")
    for i, expected in enumerate(model.describe(list(images))):
        np.testing.assert_allclose(descriptors[i], expected.descriptor, atol=1e-4)
        for s in range(2):
            np.testing.assert_allclose(found[s][i], expected.patches[s], atol=1e-4)
            np.testing.assert_array_equal(found[2 + s], expected.grids[s].keypoints)


def test_score_as_match(files):
    """The matcher says what ``match`` says of two images, and which patches agree."""
    pictures = [np.asarray(picture(i).resize((128, 96))) for i in (1, 4)]
    shifted = np.roll(pictures[0], 16, axis=1)
    model = load_model(SPATIAL, device="cpu")
    session, matcher = open_file(files.network), open_file(files.matcher)
    names = names_of(session.get_outputs())[1:]
    for other in (shifted, pictures[1]):
        given = {}
        for side, image in (("query", pictures[0]), ("candidate", other)):
            features = session.run(names, {"image": image[None]})
            for name, values in zip(names, features, strict=True):
                given[f"{side}_{name}"] = values[0] if name.startswith("patches") else values
        score, *matches = matcher.run(None, given)
        expected = match(*model.describe([pictures[0], other]))
        assert score == pytest.approx(expected.score, rel=1e-5)
        for found, of in zip(matches, expected.matches, strict=True):
            (rows,) = np.nonzero(found >= 0)
            pairs = zip(of.query_patches, of.candidate_patches, strict=True)
            assert {*zip(rows, found[rows], strict=True)} == {*pairs}


def test_images_of_any_size(tmp_path):
    """Resized as in extraction: fine grains would come through any other filter."""
    made = export(SPATIAL, tmp_path / "network.onnx", resize=True)
    session = open_file(made.network)
    model = load_model(SPATIAL, device="cpu")
    for size in ((128, 96), (640, 431), (90, 70)):
        grains = np.random.default_rng(0).normal(0, 60, (size[1], size[0], 3))
        image = np.clip(np.asarray(picture(2, size)) + grains, 0, 255).astype(np.uint8)
        descriptor, patches = session.run(["descriptor", "patches_3"], {"image": image[None]})
        (expected,) = model.describe([image])
        np.testing.assert_allclose(descriptor[0], expected.descriptor, atol=2e-3)
        np.testing.assert_allclose(patches[0], expected.patches[1], atol=5e-3)
    with pytest.raises(ArgumentError, match="small"):
        export(
            replace(SPATIAL, image_size=(0, 0), source="small.ini"),
            tmp_path / "a.onnx",
            resize=True,
        )


def test_int8(files, tmp_path, monkeypatch):
    """All layers but the first; descriptors are nearly the same, for images not seen before."""
    same = torch.eye(ENCODER_DIM)[:, :, None, None]
    layers = {"encoder.1.weight": same, "encoder.1.bias": torch.zeros(ENCODER_DIM)}
    file = tmp_path / "two128.safetensors"
    checkpoint.save_safetensors({**thin.state(), **layers}, file, torch.float32)
    second = torch.nn.Conv2d(ENCODER_DIM, ENCODER_DIM, 1)
    monkeypatch.setattr(checkpoint, "build_encoder", lambda: thin.build_encoder().append(second))
    write_pictures(tmp_path, [f"{i}.png" for i in range(3)])
    config = replace(SPATIAL, resume_path=str(tmp_path / "two"))
    made = export(config, tmp_path / "network.onnx", resize=True, int8=tmp_path)
    assert made.difference < 1e-4
    assert 0.99 < made.cosine < 0.999999
    types = {t.name: t.data_type for t in onnx.load(made.network).graph.initializer}
    assert types["network.encoder.0.weight"] == onnx.TensorProto.FLOAT
    assert types["network.encoder.1.weight_quantized"] == onnx.TensorProto.INT8
    images = np.stack([np.asarray(picture(i)) for i in range(10, 14)])
    names = ["descriptor", "patches_2", "keypoints_2"]
    found, expected = (open_file(f.network).run(names, {"image": images}) for f in (made, files))
    for ours, theirs in zip(found[:2], expected[:2], strict=True):
        cosines = (ours * theirs).sum(axis=-1)
        assert cosines.min() > 0.98
        assert np.median(cosines) < 0.999999
    np.testing.assert_array_equal(found[2], expected[2])


def test_int8_refused(tmp_path):
    """With what is at fault, and before anything is written."""
    images, output = tmp_path / "images", tmp_path / "network.onnx"
    images.mkdir()
    with pytest.raises(ImageListError, match="images"):
        export(SPATIAL, output, int8=images)
    write_pictures(images, ["a.png", "b.png"])
    (images / "b.png").write_bytes(b"no picture")
    with pytest.raises(ImageError, match=r"b\.png"):
        export(SPATIAL, output, int8=images)
    with pytest.raises(ArgumentError, match=r"network\.pt2"):
        export(SPATIAL, output.with_suffix(".pt2"), int8=images)
    with pytest.raises(ArgumentError, match="dinov2_vits14"):
        export(replace(SPATIAL, encoder="dinov2_vits14"), output, int8=images)
    (images / "a.png").rename(images / "a.onnx")
    (images / "list.txt").write_text(str(images / "a.onnx"))
    with pytest.raises(OutputError, match=r"a\.onnx"):
        export(SPATIAL, images / "a.onnx", int8=images / "list.txt")
    assert [*tmp_path.iterdir()] == [images]


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ["resnet18", "dinov2_vits14"])
def test_other_encoders(encoder, tmp_path):
    """With weights by chance, for images of sizes that were not traced."""
    if encoder.startswith("dinov2"):
        pytest.importorskip("timm")
    network = build_model(
        checkpoint.encoder_named(encoder),
        ENCODERS[encoder].channels,
        pooling="netvlad",
        num_clusters=4,
        num_pcs=8,
    )
    checkpoint.save_safetensors(
        network.state_dict(), tmp_path / "other8.safetensors", torch.float32
    )
    config = replace(
        SPATIAL,
        encoder=encoder,
        resume_path=str(tmp_path / "other"),
        num_pcs=8,
        image_size=(0, 0),
        match_image_size=(0, 0),
    )
    session = open_file(export(config, tmp_path / "network.onnx", uint8=True).network)
    model = load_model(config, device="cpu")
    for shape in ((1, 98, 140), (2, 150, 131)):
        images = np.random.default_rng(0).integers(0, 256, (*shape, 3), np.uint8)
        names = ["descriptor", "patches_3", "keypoints_3"]
        descriptors, patches, keypoints = session.run(names, {"image": images})
        for i, expected in enumerate(model.describe(list(images))):
            np.testing.assert_allclose(descriptors[i], expected.descriptor, atol=1e-4)
            np.testing.assert_allclose(patches[i], expected.patches[1], atol=1e-4)
            np.testing.assert_array_equal(keypoints, expected.grids[1].keypoints)


def test_normalised_images_by_torch_export(tmp_path):
    """The same as a program of PyTorch, of a network without patches."""
    config = replace(SPATIAL, pooling="netvlad")
    made = export(config, tmp_path / "network.pt2")
    assert made.difference is None
    program = torch.export.load(made.network).module()
    images = torch.stack([input_transform((64, 80))(picture(i)) for i in range(3)])
    with torch.no_grad():
        (descriptors,) = program(images)
    model = load_model(replace(config, image_size=(64, 80)), device="cpu")
    expected = [found.descriptor for found in model.describe([picture(i) for i in range(3)])]
    np.testing.assert_allclose(descriptors, expected, atol=1e-5)


def test_command(tmp_path, capsys):
    words = ["--config_path", "netvlad_extract", "--output"]
    assert main([*words, str(tmp_path / "a.tflite")]) == 2
    assert "a.tflite" in capsys.readouterr().err
    assert main([*words, str(tmp_path / "a.onnx"), "--int8", str(tmp_path / "absent")]) == 2
    assert "absent" in capsys.readouterr().err
    with pytest.raises(ArgumentError, match="no patches"):
        export(replace(SPATIAL, pooling="netvlad"), tmp_path / "a.onnx", matcher="b.onnx")
    assert main(["--config_path", "demo", "--output", str(tmp_path / "n" / "a.onnx")]) == 0
    assert str(tmp_path / "n" / "a.onnx") in capsys.readouterr().out
