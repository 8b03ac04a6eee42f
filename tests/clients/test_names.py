# SPDX-License-Identifier: MIT
"""The names that programs of users import, with their signatures, and the commands they run."""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]

FUNCTIONS = {
    "patchnetvlad.tools": {"PATCHNETVLAD_ROOT_DIR": None},
    "patchnetvlad.tools.datasets": {
        "PlaceDataset": "query_file_path index_file_path dataset_root_dir ground_truth_path config "
        "posDistThr",
        "input_transform": "resize",
    },
    "patchnetvlad.tools.patch_matcher": {
        "PatchMatcher": "matcher patch_sizes strides all_keypoints all_indices",
        "torch_nn": "x y",
    },
    "patchnetvlad.models.models_generic": {
        "get_backend": "",
        "get_model": "encoder encoder_dim config append_pca_layer",
        "get_pca_encoding": "model vlad_encoding",
        "Flatten": "",
        "L2Norm": "dim",
    },
    "patchnetvlad.models.netvlad": {
        "NetVLAD": "num_clusters dim normalize_input vladv2 use_faiss",
    },
    "patchnetvlad.models.patchnetvlad": {
        "PatchNetVLAD": "num_clusters dim normalize_input vladv2 use_faiss patch_sizes strides",
        "get_integral_feature": "feat_in",
        "get_square_regions_from_integral": "feat_integral patch_size patch_stride",
    },
    "patchnetvlad.models.local_matcher": {
        "calc_receptive_boxes": "height width",
        "calc_keypoint_centers_from_patches": "config patch_size_h patch_size_w stride_h stride_w",
        "normalise_func": "input_diff num_patches patch_weights",
        "local_matcher": "predictions eval_set input_query_local_features_prefix "
        "input_index_local_features_prefix config device",
    },
    "patchnetvlad.training_tools.msls": {
        "MSLS": "root_dir cities nNeg transform mode task subtask seq_length posDistThr negDistThr "
        "cached_queries cached_negatives positive_sampling bs threads margin exclude_panos",
        "ImagesFromList": "images transform",
    },
    "patchnetvlad.training_tools.get_clusters": {
        "get_clusters": "cluster_set model encoder_dim device opt config",
    },
    "patchnetvlad.training_tools.train_epoch": {
        "train_epoch": "train_dataset model optimizer criterion encoder_dim device epoch_num opt "
        "config writer",
    },
    "patchnetvlad.training_tools.val": {
        "val": "eval_set model encoder_dim device opt config writer epoch_num write_tboard "
        "pbar_position",
    },
    "patchnetvlad.training_tools.tools": {
        "pca": "x num_pcs subtract_mean",
        "save_checkpoint": "state opt is_best_sofar filename",
        "humanbytes": "B",
    },
    "feature_extract": {"feature_extract": "eval_set model device opt config"},
    "feature_match": {
        "feature_match": "eval_set device opt config",
        "compute_recall": "gt predictions numQ n_values recall_str",
        "write_kapture_output": "opt eval_set predictions outfile_name",
        "write_recalls_output": "opt recalls_netvlad recalls_patchnetvlad n_values",
    },
    "match_two": {
        "match_two": "model device config im_one im_two plot_save_path",
        "plot_two": "cv_im_one cv_im_two inlier_keypoints_one inlier_keypoints_two plot_save_path",
        "apply_patch_weights": "input_scores num_patches patch_weights",
    },
    "download_models": {"download_all_models": "ask_for_permission"},
}
"""By module: names, and the first of their parameters; ours may have more, with defaults."""

COMMANDS = {
    "feature_extract": "--config_path --dataset_file_path --dataset_root_dir --output_features_dir "
    "--nocuda",
    "feature_match": "--config_path --dataset_root_dir --query_file_path --index_file_path "
    "--query_input_features_dir --index_input_features_dir --ground_truth_path "
    "--result_save_folder --posDistThr --nocuda",
    "match_two": "--config_path --first_im_path --second_im_path --plot_save_path --nocuda",
    "match_realtime": "--config_path --nocuda",
    "download_models": "--ask_for_permission",
    "train": "--config_path --cache_path --save_path --resume_path --cluster_path "
    "--dataset_root_dir --identifier --nEpochs --start_epoch --save_every_epoch --threads --nocuda",
    "add_pca": "--config_path --resume_path --dataset_root_dir --dataset_choice --threads --nocuda",
}


@pytest.fixture(autouse=True)
def in_the_checkout(monkeypatch):
    """Scripts are imported from the folder that they lie in."""
    monkeypatch.syspath_prepend(str(REPOSITORY))


@pytest.mark.parametrize(
    ("module", "name", "parameters"),
    [(module, name, p) for module, names in FUNCTIONS.items() for name, p in names.items()],
)
def test_importable(module, name, parameters):
    found = getattr(importlib.import_module(module), name)
    if parameters is None:
        assert Path(found, "configs", "performance.ini").is_file()
        return
    theirs = inspect.signature(found).parameters
    names = parameters.split()
    assert list(theirs)[: len(names)] == names
    more = list(theirs.values())[len(names) :]
    assert all(
        p.default is not p.empty or p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in more
    )


def test_scripts_load_what_is_used(monkeypatch):
    """A script's help does not wait for PyTorch, though its functions need it."""
    for script in ("feature_extract", "feature_match", "match_two"):
        monkeypatch.delitem(sys.modules, script, raising=False)
        module = importlib.import_module(script)
        assert module.main.__module__ == f"patchnetvlad.cli.{script}"
        assert set(FUNCTIONS[script]) == set(module.__all__)
        assert not set(FUNCTIONS[script]) & set(vars(module))


@pytest.mark.parametrize("command", COMMANDS)
def test_flags(command, capsys):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(f"patchnetvlad.cli.{command}").main(["--help"])
    assert ended.value.code == 0
    shown = capsys.readouterr().out.replace(",", " ").replace("[", " ").replace("]", " ").split()
    assert set(COMMANDS[command].split()) <= set(shown)


@pytest.mark.parametrize("name", ["netvlad_extract", "performance", "speed", "storage", "train"])
def test_configurations(name):
    from patchnetvlad.tools import PATCHNETVLAD_ROOT_DIR

    assert Path(PATCHNETVLAD_ROOT_DIR, "configs", f"{name}.ini").is_file()
