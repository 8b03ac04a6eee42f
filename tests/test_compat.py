# SPDX-License-Identifier: MIT
"""Code written for the research code: its import paths, calls and shapes."""

from __future__ import annotations

import configparser
import inspect
from os.path import join

import numpy as np
import pytest
import torch
from PIL import Image

from patchnetvlad.assets.catalog import SHIPPED_CHECKPOINT
from patchnetvlad.models.checkpoint import load_state
from patchnetvlad.models.local_matcher import (
    calc_keypoint_centers_from_patches,
    calc_receptive_boxes,
    local_matcher,
    normalise_func,
)
from patchnetvlad.models.models_generic import (
    Flatten,
    L2Norm,
    get_backend,
    get_model,
    get_pca_encoding,
)
from patchnetvlad.models.netvlad import NetVLAD
from patchnetvlad.models.patchnetvlad import PatchNetVLAD
from patchnetvlad.tools import PATCHNETVLAD_ROOT_DIR
from patchnetvlad.tools.datasets import PlaceDataset, input_transform
from patchnetvlad.tools.patch_matcher import PatchMatcher, torch_nn


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A checkpoint as the research code has them: half of it float64."""
    path = tmp_path_factory.mktemp("checkpoint") / "weights.pth.tar"
    state = load_state(SHIPPED_CHECKPOINT)
    state.update({key: value.double() for key, value in state.items() if "WPCA" in key})
    torch.save({"num_pcs": 128, "state_dict": state}, path)
    return path


def test_a_script_of_a_user(checkpoint, tmp_path):
    config = configparser.ConfigParser()
    config.read(join(PATCHNETVLAD_ROOT_DIR, "configs", "performance.ini"))
    config["feature_match"]["imageresizeW"] = "160"
    config["feature_match"]["imageresizeH"] = "144"

    encoder_dim, encoder = get_backend()
    loaded = torch.load(checkpoint, map_location=lambda storage, loc: storage)
    config["global_params"]["num_pcs"] = str(loaded["num_pcs"])
    config["global_params"]["num_clusters"] = str(loaded["state_dict"]["pool.centroids"].shape[0])
    model = get_model(encoder, encoder_dim, config["global_params"], append_pca_layer=True)
    model.load_state_dict(loaded["state_dict"])
    model.eval()

    transform = input_transform((144, 160))
    noise = np.random.default_rng(0).integers(0, 255, (12, 16, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((320, 240), Image.Resampling.BICUBIC)
    batch = torch.stack([transform(image), transform(image.crop((8, 6, 312, 234)))])
    with torch.no_grad():
        encoding = model.encoder(batch)
        vlad_local, vlad_global = model.pool(encoding)
        assert get_pca_encoding(model, vlad_global).shape == (2, 128)
        features = []
        for vectors in vlad_local:
            batch_size, dim, patches = vectors.shape
            flat = vectors.permute(2, 0, 1).reshape(-1, dim)
            features.append(
                get_pca_encoding(model, flat).reshape(patches, batch_size, -1).permute(1, 2, 0)
            )

    patch_sizes = [int(s) for s in config["global_params"]["patch_sizes"].split(",")]
    strides = [int(s) for s in config["global_params"]["strides"].split(",")]
    weights = np.array(config["feature_match"]["patchWeights2Use"].split(",")).astype(float)
    keypoints, indices = [], []
    for size, stride in zip(patch_sizes, strides, strict=True):
        centres, places = calc_keypoint_centers_from_patches(
            config["feature_match"], size, size, stride, stride
        )
        keypoints.append(centres)
        indices.append(places)
    matcher = PatchMatcher(
        config["feature_match"]["matcher"], patch_sizes, strides, keypoints, indices
    )
    scores, inliers_query, inliers_index = matcher.match(
        [vectors[0].T for vectors in features], [vectors[1] for vectors in features]
    )
    assert len(scores) == len(inliers_query) == len(inliers_index) == 3
    assert all(-1 <= score < 0 for score in scores)
    assert [len(a) for a in inliers_query] == [len(b) for b in inliers_index]
    assert all(a.shape[1] == 2 and a.dtype.kind == "i" for a in inliers_query)
    assert normalise_func(np.array([scores, scores]), 3, weights).tolist() == [0, 0]
    spatial, nobody, nothing = matcher.compare_two_spatial(
        [vectors[0].T for vectors in features], [vectors[1] for vectors in features]
    )
    assert all(score < 0 for score in spatial)
    assert nobody is None
    assert nothing is None


def test_data_set_and_local_matcher(tmp_path):
    config = configparser.ConfigParser()
    config.read(join(PATCHNETVLAD_ROOT_DIR, "configs", "speed.ini"))
    for section in ("feature_extract", "feature_match"):
        config[section].update({"imageresizeW": "128", "imageresizeH": "96"})
    rng = np.random.default_rng(0)
    for i in range(4):
        pixels = rng.integers(0, 255, (60, 80, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{i}.png")
    (tmp_path / "index.txt").write_text("0.png\n1.png\n2.png\n")
    (tmp_path / "query.txt").write_text("3.png\n")
    np.savez(
        tmp_path / "gt.npz",
        utmQ=np.array([[1.0, 0]]),
        utmDb=np.array([[0.0, 0], [1, 0], [5, 0]]),
        posDistThr=np.array(1.0),
    )
    dataset = PlaceDataset(
        str(tmp_path / "query.txt"),
        str(tmp_path / "index.txt"),
        str(tmp_path),
        str(tmp_path / "gt.npz"),
        config["feature_extract"],
    )
    assert (len(dataset), dataset.numDb, dataset.numQ) == (4, 3, 1)
    assert dataset.images == [str(tmp_path / f"{i}.png") for i in range(4)]
    image, place = dataset[3]
    assert image.shape == (3, 96, 128)
    assert place == 3
    (positives,) = dataset.get_positives()
    assert positives.tolist() == [0, 1]
    assert PlaceDataset.parse_text_file(str(tmp_path / "index.txt")) == (dataset.database, 3)
    assert PlaceDataset.parse_gt_file(str(tmp_path / "gt.npz"))[2] == 1

    alone = PlaceDataset(
        None, str(tmp_path / "index.txt"), str(tmp_path), None, config["feature_extract"]
    )
    assert len(alone) == 3

    patches = rng.normal(size=(4, 16, 2 * 4)).astype(np.float32)  # a grid of 2 x 4
    patches[3] = patches[1] + 0.01 * patches[0]
    patches /= np.linalg.norm(patches, axis=1, keepdims=True)
    for i in range(4):
        np.save(tmp_path / f"patchfeats_psize5_{i}.npy", patches[i])
    prefix = str(tmp_path / "patchfeats")
    ranked = local_matcher(np.array([[0, 1, 2]]), dataset, prefix, prefix, config, "cpu")
    assert sorted(ranked[0]) == [0, 1, 2]
    assert ranked[0][0] == 1


def test_small_parts():
    assert Flatten()(torch.ones(2, 3, 1, 1)).shape == (2, 3)
    assert L2Norm(dim=1)(torch.ones(2, 4)).tolist() == [[0.5] * 4] * 2
    boxes = calc_receptive_boxes(3, 2)
    assert boxes.shape == (6, 4)
    assert boxes[1].tolist() == [-74, -90, 121, 105]
    assert boxes[2].tolist() == [-90, -74, 105, 121]
    query = torch.eye(3)
    forward, backward = torch_nn(query, query.flip(0).T)
    assert forward.tolist() == backward.tolist() == [2, 1, 0]


@pytest.mark.parametrize(
    ("thing", "names"),
    [
        (get_model, ["encoder", "encoder_dim", "config", "append_pca_layer"]),
        (get_pca_encoding, ["model", "vlad_encoding"]),
        (NetVLAD, ["num_clusters", "dim", "normalize_input", "vladv2", "use_faiss"]),
        (
            PatchNetVLAD,
            ["num_clusters", "dim", "normalize_input", "vladv2", "use_faiss", "patch_sizes",
             "strides"],
        ),
        (NetVLAD.init_params, ["self", "clsts", "traindescs"]),
        (PatchMatcher, ["matcher", "patch_sizes", "strides", "all_keypoints", "all_indices"]),
        (
            PlaceDataset,
            ["query_file_path", "index_file_path", "dataset_root_dir", "ground_truth_path",
             "config", "posDistThr"],
        ),
        (input_transform, ["resize"]),
        (
            local_matcher,
            ["predictions", "eval_set", "input_query_local_features_prefix",
             "input_index_local_features_prefix", "config", "device"],
        ),
        (normalise_func, ["input_diff", "num_patches", "patch_weights"]),
        (
            calc_keypoint_centers_from_patches,
            ["config", "patch_size_h", "patch_size_w", "stride_h", "stride_w"],
        ),
    ],
)  # fmt: skip
def test_signatures(thing, names):
    assert list(inspect.signature(thing).parameters) == names
