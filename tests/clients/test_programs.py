# SPDX-License-Identifier: MIT
"""Programs as users have written them for the research code, each with what it relies on."""

from __future__ import annotations

import configparser
import importlib
from os.path import join
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import thin
import torch
from PIL import Image
from place_data import picture

from patchnetvlad.models.models_generic import get_model, get_pca_encoding
from patchnetvlad.tools import PATCHNETVLAD_ROOT_DIR
from patchnetvlad.tools.datasets import PlaceDataset

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
INDEX, QUERIES = 5, 2
SIZE = 240, 320


@pytest.fixture
def script(monkeypatch):
    """Import a script of the checkout."""
    monkeypatch.syspath_prepend(str(REPOSITORY))
    return importlib.import_module


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with images of five places, two of them seen again, lists and ground truth."""
    root = tmp_path_factory.mktemp("world")
    for i in range(INDEX):
        picture(i).save(root / f"db{i}.png")
    for q in range(QUERIES):
        shifted = np.roll(np.asarray(picture(q + 1)), 2, axis=1)
        Image.fromarray(shifted).save(root / f"query{q}.png")
    (root / "index.txt").write_text("".join(f"db{i}.png\n" for i in range(INDEX)))
    (root / "query.txt").write_text("".join(f"query{q}.png\n" for q in range(QUERIES)))
    np.savez(
        root / "gt.npz",
        utmDb=np.array([[100.0 * i, 0] for i in range(INDEX)]),
        utmQ=np.array([[100.0 * (q + 1), 3] for q in range(QUERIES)]),
        posDistThr=25,
    )
    return root


@pytest.fixture
def config():
    """The configuration that such programs begin with, for small images."""
    parser = configparser.ConfigParser()
    parser.read(join(PATCHNETVLAD_ROOT_DIR, "configs", "performance.ini"))
    parser["global_params"]["num_clusters"] = str(thin.CLUSTERS)
    parser["global_params"]["num_pcs"] = str(thin.COMPONENTS)
    for section in ("feature_extract", "feature_match"):
        parser[section]["imageresizeH"], parser[section]["imageresizeW"] = map(str, SIZE)
    parser["feature_match"]["n_values_all"] = "1,5"
    return parser


@pytest.fixture
def model(config):
    network = get_model(thin.build_encoder(), 512, config["global_params"], append_pca_layer=True)
    network.load_state_dict(thin.state())
    return network.eval()


@pytest.fixture
def features(script, world, config, model, tmp_path):
    """Folders of features of index and queries, as the script's function writes them."""
    for side in ("index", "query"):
        data = PlaceDataset(
            None, str(world / f"{side}.txt"), str(world), None, config["feature_extract"]
        )
        opt = SimpleNamespace(nocuda=True, output_features_dir=str(tmp_path / side))
        script("feature_extract").feature_extract(data, model, CPU, opt, config)
    return tmp_path


def test_features_by_their_files(world, config, model, features):
    """A benchmark's own loop: descriptors by the row of the list, patches by an image's stem."""
    index = np.load(features / "index" / "globalfeats.npy")
    assert index.shape == (INDEX, thin.COMPONENTS)
    assert index.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(index, axis=1), 1, atol=1e-5)
    for size in (2, 5, 8):
        patches = np.load(features / "index" / f"patchfeats_psize{size}_db0.npy")
        assert patches.shape == (thin.COMPONENTS, (15 - size + 1) * (20 - size + 1))
        assert patches.dtype == np.float32
    data = PlaceDataset(None, str(world / "index.txt"), str(world), None, config["feature_extract"])
    with torch.no_grad():
        for images, rows in torch.utils.data.DataLoader(data, batch_size=2):
            local, vlad = model.pool(model.encoder(images))
            found = get_pca_encoding(model, vlad).numpy()
            np.testing.assert_allclose(found, index[rows.numpy()], atol=1e-4)
            assert [tuple(of.shape) for of in local] == [
                (len(rows), thin.CLUSTERS * 512, (16 - s) * (21 - s)) for s in (2, 5, 8)
            ]


def test_matching_by_the_scripts_function(script, world, config, features, capsys):
    data = PlaceDataset(
        str(world / "query.txt"), str(world / "index.txt"), str(world), str(world / "gt.npz"),
        config["feature_extract"],
    )  # fmt: skip
    opt = SimpleNamespace(
        query_input_features_dir=str(features / "query"),
        index_input_features_dir=str(features / "index"),
        ground_truth_path=str(world / "gt.npz"),
        result_save_folder=str(features / "results"),
    )
    script("feature_match").feature_match(data, CPU, opt, config)
    shown = capsys.readouterr().out
    for method in ("NetVLAD", "PatchNetVLAD"):
        assert f"====> Recall {method}@1: 1.0000\n====> Recall {method}@5: 1.0000\n" in shown
        header, columns, *pairs = (
            (features / "results" / f"{method}_predictions.txt").read_text().splitlines()
        )
        assert (header, columns) == ("# kapture format: 1.0", "# query_image, map_image")
        assert len(pairs) == QUERIES * INDEX
        assert pairs[0] == "query0.png, db1.png"
    recalls = (features / "results" / "recalls.txt").read_text().splitlines()
    assert recalls[0] == "Recall NetVLAD@1: 1.0000"
    assert recalls[-1] == "Recall PatchNetVLAD@5: 1.0000"


def test_recalls_and_predictions_of_another_method(script, world, config, tmp_path, capsys):
    """A program that has its own candidates, and writes them as the research code does."""
    module = script("feature_match")
    data = PlaceDataset(
        str(world / "query.txt"), str(world / "index.txt"), str(world), str(world / "gt.npz"),
        config["feature_extract"],
    )  # fmt: skip
    predictions = np.array([[1, 0, 2], [0, 2, 1]])
    recalls = module.compute_recall(data.get_positives(), predictions, data.numQ, [1, 2], "Mine")
    assert capsys.readouterr().out == "====> Recall Mine@1: 0.5000\n====> Recall Mine@2: 1.0000\n"
    assert recalls == {1: 0.5, 2: 1.0}
    with pytest.raises(ValueError, match="numQ = 3"):
        module.compute_recall(data.get_positives(), predictions, 3, [1])
    opt = SimpleNamespace(result_save_folder=str(tmp_path / "out"))
    module.write_kapture_output(opt, data, predictions, "mine.txt")
    lines = (tmp_path / "out" / "mine.txt").read_text().splitlines()
    assert lines[2] == f"{world}/query0.png, {world}/db1.png"
    assert len(lines) == 2 + predictions.size
    module.write_recalls_output(opt, recalls, recalls, [1, 2])
    assert (tmp_path / "out" / "recalls.txt").read_text() == (
        "Recall NetVLAD@1: 0.5000\nRecall NetVLAD@2: 1.0000\n"
        "Recall PatchNetVLAD@1: 0.5000\nRecall PatchNetVLAD@2: 1.0000\n"
    )


def test_pair_in_a_notebook(script, config, model, tmp_path, capsys):
    module = script("match_two")
    images = [np.asarray(picture(i))[..., ::-1] for i in (1, 1, 3)]  # BGR, as from OpenCV
    same = module.match_two(model, CPU, config, images[0], images[1], str(tmp_path / "plots"))
    assert f"Similarity score between the two images is: {same:.5f}." in capsys.readouterr().out
    assert (tmp_path / "plots" / "patchMatchings.png").stat().st_size > 10_000
    assert same > module.match_two(model, CPU, config, images[0], images[2], None) >= 0
    weights = [0.45, 0.15, 0.4]
    assert module.apply_patch_weights([-0.5, -0.25, -0.1], 3, weights) == pytest.approx(-0.3025)
    points = [np.array([[5, 6], [70, 8]]), np.array([[50, 60]])]
    module.plot_two(images[0], images[2], points, points, str(tmp_path / "two"))
    assert (tmp_path / "two" / "patchMatchings.png").stat().st_size > 10_000
