# SPDX-License-Identifier: MIT
"""The network and the matcher as files for other programs."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from place_data import SMALL, picture

from patchnetvlad import load_model, match
from patchnetvlad.cli.export import main
from patchnetvlad.datasets.images import input_transform
from patchnetvlad.errors import ArgumentError
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
    with pytest.raises(ArgumentError, match="no patches"):
        export(replace(SPATIAL, pooling="netvlad"), tmp_path / "a.onnx", matcher="b.onnx")
    assert main(["--config_path", "demo", "--output", str(tmp_path / "n" / "a.onnx")]) == 0
    assert str(tmp_path / "n" / "a.onnx") in capsys.readouterr().out
