# SPDX-License-Identifier: MIT
"""INI files: what the shipped ones say, and what is said about broken ones."""

from __future__ import annotations

import re
from configparser import ConfigParser
from dataclasses import FrozenInstanceError, fields, replace

import numpy as np
import pytest

from patchnetvlad.config import Config
from patchnetvlad.config_ini import CONFIG_DIR
from patchnetvlad.errors import ConfigError

PERFORMANCE = (CONFIG_DIR / "performance.ini").read_text(encoding="utf-8")
MAPILLARY = "./pretrained_models/mapillary_WPCA"
RANSAC = {
    "patch_sizes": (2, 5, 8),
    "strides": (1, 1, 1),
    "patch_weights": (0.45, 0.15, 0.4),
    "matcher": "RANSAC",
}
RAPID = {
    "patch_sizes": (5,),
    "strides": (1,),
    "patch_weights": (1.0,),
    "matcher": "spatialApproximator",
}
SHIPPED = {
    "performance": {"num_pcs": 4096, **RANSAC},
    "speed": {"num_pcs": 512, **RAPID},
    "storage": {"num_pcs": 128, **RAPID},
    "netvlad_extract": {"num_pcs": 512, "pooling": "netvlad", "patch_weights": ()},
    "demo": {"num_pcs": 128, "resume_path": "./pretrained_models/imagenet_WPCA", **RANSAC},
}
COMMON = {
    "pooling": "patchnetvlad",
    "resume_path": MAPILLARY,
    "image_size": (480, 640),
    "match_image_size": (480, 640),
    "n_values": (1, 5, 10, 20, 50, 100),
    "batch_size": 5,
    "cache_batch_size": 5,
    "threads": 0,
    "num_gpus": 1,
    "vladv2": False,
    "patch_vlad": "integral",
    "precision": "auto",
    "memory_mb": 0,
    "local_features": "float16",
    "ransac": "opencv",
    "faiss_index": "Flat",
    "faiss_parameters": "",
    "faiss_index_path": None,
    "interval_block": "auto",
    "confidence": "auto",
    "rerank": "always",
    "sure": 0.9,
    "dataset_name": "NA",
    "predictions_path": None,
    "encoder": "vgg16",
}


def ini(tmp_path, *replacements, text=PERFORMANCE):
    for old, new in replacements:
        assert old in text
        text = text.replace(old, new)
    path = tmp_path / "mine.ini"
    path.write_text(text, encoding="utf-8")
    return path


def message_of(path):
    with pytest.raises(ConfigError) as caught:
        Config.load(path).check_matching()
    message = str(caught.value)
    assert message.count("\n") <= 1
    assert len(message) < 500
    return message


class TestShipped:
    def test_all_are_known_here(self):
        assert {file.stem for file in CONFIG_DIR.glob("*.ini")} == {
            *SHIPPED,
            "train",
            "train_modern",
        }

    @pytest.mark.parametrize("name", SHIPPED)
    def test_fields(self, name):
        config = Config.load(name)
        expected = {**COMMON, **SHIPPED[name]}
        unset = {"patch_sizes", "strides", "matcher"} if name == "netvlad_extract" else set()
        assert set(expected) | unset == {field.name for field in fields(Config)} - {"source"}
        assert {key: getattr(config, key) for key in expected} == expected
        assert config.source == str(CONFIG_DIR / f"{name}.ini")
        assert config.uses_patches == (name != "netvlad_extract")
        config.check_matching()

    @pytest.mark.parametrize(
        "path", ["speed", "speed.ini", "configs/speed.ini", "patchnetvlad/configs/speed.ini"]
    )
    def test_bare_names(self, path, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert Config.load(path) == Config.load(CONFIG_DIR / "speed.ini")

    def test_a_file_wins_over_a_name(self, tmp_path, monkeypatch):
        ini(tmp_path, ("num_pcs = 4096", "num_pcs = 7")).rename(tmp_path / "speed.ini")
        monkeypatch.chdir(tmp_path)
        assert Config.load("speed.ini").num_pcs == 7
        assert Config.load("speed").num_pcs == 512

    def test_a_folder_does_not_win(self, tmp_path, monkeypatch):
        (tmp_path / "speed").mkdir()
        monkeypatch.chdir(tmp_path)
        assert Config.load("speed").num_pcs == 512

    def test_frozen(self):
        with pytest.raises(FrozenInstanceError):
            Config.load("demo").num_pcs = 1


class TestReading:
    @pytest.mark.parametrize("change", [str.lower, str.upper])
    def test_keys_in_either_case(self, tmp_path, change):
        text = re.sub(r"^\w+(?= =)", lambda key: change(key[0]), PERFORMANCE, flags=re.MULTILINE)
        assert text != PERFORMANCE
        assert Config.load(ini(tmp_path, text=text)) == Config.load("performance")

    @pytest.mark.parametrize(
        "encode",
        [
            lambda text: text.encode("utf-8-sig"),
            lambda text: text.replace("\n", "\r\n").encode(),
            lambda text: b"\xef\xbb\xbf" + text.replace("\n", "\r\n").encode(),
            lambda text: text.replace(" = ", ":").encode(),
            lambda text: ("# Straße\n; 道\n\n" + text + "\n\n").encode(),
        ],
        ids=["BOM", "CRLF", "BOM-CRLF", "colons", "comments"],
    )
    def test_encodings(self, tmp_path, encode):
        path = tmp_path / "mine.ini"
        path.write_bytes(encode(PERFORMANCE))
        assert Config.load(path) == Config.load("performance")

    @pytest.mark.parametrize(
        ("old", "new", "field", "value"),
        [
            ("2,5,8", " 2, 5 ,8,", "patch_sizes", (2, 5, 8)),
            ("RANSAC", "SPATIALapproximator", "matcher", "spatialApproximator"),
            ("patchnetvlad", "PatchNetVLAD", "pooling", "patchnetvlad"),
            ("pred_input_path = None", "pred_input_path =", "predictions_path", None),
            ("pred_input_path = None", "pred_input_path = p.npy", "predictions_path", "p.npy"),
            ("ngpu = 1", "vladv2 = yes", "vladv2", True),
            ("ngpu = 1", "patch_vlad = Direct", "patch_vlad", "direct"),
            (MAPILLARY, "./100%/%d/模型", "resume_path", "./100%/%d/模型"),
            ("ngpu = 1", "num_clusters = 16", "num_gpus", 1),
            ("RANSAC", "RANSAC\nfaiss_parameters = nprobe=9", "faiss_parameters", "nprobe=9"),
            ("[feature_extract]", "[train]\nanything = 1\n[feature_extract]", "num_pcs", 4096),
            ("640\nimageresizeH = 480", "0\nimageresizeH = 0", "image_size", (0, 0)),
            ("640\nimageresizeH = 480", "0\nimageresizeH = 0", "match_image_size", (0, 0)),
        ],
    )
    def test_values(self, tmp_path, old, new, field, value):
        assert getattr(Config.load(ini(tmp_path, (old, new))), field) == value

    def test_a_mapping_and_a_parser(self):
        parser = ConfigParser()
        parser.read_string(PERFORMANCE)
        plain = {name: dict(parser[name]) for name in parser.sections()}
        plain["global_params"]["num_pcs"] = 4096
        assert Config.from_mapping(parser) == Config.from_mapping(plain) == Config()
        text = Config.global_params(Config())
        assert {key: text[key] for key in parser["global_params"]} == dict(parser["global_params"])
        assert Config.global_params({"Num_PCs": 7, "mine": " x "}) == {"num_pcs": "7", "mine": "x"}

    @pytest.mark.parametrize(
        ("absent", "given"), [("feature_extract", "match"), ("feature_match", "extract")]
    )
    def test_one_command_alone(self, tmp_path, absent, given):
        text = re.sub(rf"\[{absent}\][^\[]*", "", PERFORMANCE.replace("= 640", "= 320"))
        config = Config.load(ini(tmp_path, text=text))
        assert config.image_size == config.match_image_size == (480, 320)
        if given == "match":
            config.check_matching()
        else:
            with pytest.raises(ConfigError, match=r"\[feature_match\].*performance\.ini"):
                config.check_matching()

    @pytest.mark.parametrize("pooling", ["netvlad", "max", "AVG"])
    def test_without_patches_their_keys_may_be_absent(self, tmp_path, pooling):
        path = ini(
            tmp_path,
            ("pooling = patchnetvlad", f"pooling = {pooling}"),
            ("matcher = RANSAC\n", ""),
            ("patchWeights2Use = 0.45,0.15,0.4\n", ""),
            ("patch_sizes = 2,5,8\nstrides = 1,1,1", ""),
        )
        config = Config.load(path)
        config.check_matching()
        assert config.pooling == pooling.lower()


class TestErrors:
    @pytest.mark.parametrize(
        ("old", "new", "words"),
        [
            ("num_pcs", "num_pc", ["'num_pc'", "[global_params]", "'num_pcs'"]),
            ("imageresizeW", "imagewidth", ["'imagewidth'", "[feature_extract]", "'imageresize"]),
            ("ngpu", "flux", ["'flux'", "num_pcs"]),
            ("ngpu = 1", "matcher = RANSAC", ["'matcher'", "[feature_match]"]),
            ("[global_params]", "[global]", ["[global]", "'global_params'"]),
            ("[global_params]", "[x]", ["[x]", "[feature_extract], [feature_match]"]),
            ("num_pcs = 4096\n", "", ["'num_pcs'", "num_pcs = 4096"]),
            ("strides = 1,1,1", "", ["'strides'", "strides = 1,1,1"]),
            ("patchWeights2Use = 0.45,0.15,0.4", "", ["'patchweights2use'"]),
            ("num_pcs = 4096", "num_pcs = 4096.0", ["num_pcs = '4096.0'", "whole number"]),
            ("num_pcs = 4096", "num_pcs =", ["num_pcs = ''", "whole number"]),
            ("num_pcs = 4096", "num_pcs = 1\n  2", ["num_pcs = '1\\n2'", "whole number"]),
            ("num_pcs = 4096", "num_pcs = -1", ["num_pcs = -1", "0"]),
            ("threads = 0", "threads = -2", ["threads = -2"]),
            ("cachebatchsize = 5", "cachebatchsize = 0", ["cachebatchsize = 0"]),
            ("strides = 1,1,1", "strides = 1", ["strides = 1 ", "1 ", "3 patch_sizes"]),
            ("strides = 1,1,1", "strides = 1,0,1", ["strides = 1,0,1", "1 or more"]),
            ("strides = 1,1,1", "strides = 1;1;1", ["strides = '1;1;1'", "commas"]),
            ("patch_sizes = 2,5,8", "patch_sizes = 2,2,8", ["patch_sizes = 2,2,8", "twice"]),
            ("patch_sizes = 2,5,8", "patch_sizes =", ["patch_sizes"]),
            ("0.45,0.15,0.4", "0.5,0.5", ["patchweights2use = 0.5,0.5", "2 ", "3 patch_sizes"]),
            ("0.45,0.15,0.4", "1,1,nan", ["patchweights2use = '1,1,nan'", "numbers"]),
            ("0.45,0.15,0.4", "", ["patchweights2use"]),
            ("1,5,10,20,50,100", "0,1", ["n_values_all = 0,1", "from 1"]),
            ("1,5,10,20,50,100", "", ["n_values_all"]),
            ("imageresizeH = 480", "imageresizeH = 0", ["0, 640", "[feature_extract]", "both 0"]),
            ("imageresizeW = 640", "imageresizeW = 15", ["480, 15", "16 px"]),
            ("imageresizeW = 640", "imageresizeW = -640", ["480, -640", "16 px"]),
            ("imageresizeW = 640", "imageresizeW = wide", ["imageresizew = 'wide'", "px"]),
            ("RANSAC", "ransak", ["matcher = 'ransak'", "'RANSAC'"]),
            ("= patchnetvlad", "= patch_netvlad", ["pooling = 'patch_netvlad'", "'patchnetvlad'"]),
            (
                "RANSAC",
                "RANSAC\nfaiss_parameters = 9",
                ["faiss_parameters: '9'", "nprobe"],
            ),
            ("RANSAC", "RANSAC\ninterval_block = 0", ["interval_block = 0", "traverse"]),
            ("RANSAC", "RANSAC\ninterval_block = clip", ["interval_block = clip", "traverse"]),
            ("RANSAC", "RANSAC\nrerank = never", ["rerank = 'never'", "always, auto"]),
            ("RANSAC", "RANSAC\nsure = high", ["sure = 'high'", "a number"]),
            ("RANSAC", "RANSAC\nsure = 90", ["sure = 90", "at most 1"]),
            ("ngpu = 1", "vladv2 = maybe", ["vladv2 = 'maybe'", "True or False"]),
            ("ngpu = 1", "patch_vlad = fast", ["patch_vlad = 'fast'", "integral, direct"]),
            ("ngpu = 1", "num_pcs = 3", ["num_pcs", "line "]),
            ("ngpu = 1", "NUM_PCS = 3", ["num_pcs", "line "]),
            ("ngpu = 1", "[feature_match]", ["feature_match", "line "]),
            ("ngpu = 1", "garbage\n" * 2000, ["garbage"]),
            ("ngpu = 1", "[FEATURE_MATCH]", ["[feature_match]", "twice"]),
            ("ngpu = 1", f"{'k' * 5000} = 1", ["'kkk", " ... ", "num_pcs"]),
            ("num_pcs = 4096", f"num_pcs = {'9' * 5000}", ["num_pcs = '999", "whole number"]),
        ],
    )
    def test_broken_entries(self, tmp_path, old, new, words):
        path = ini(tmp_path, (old, new))
        message = message_of(path)
        assert all(word in message for word in [str(path), *words]), message

    def test_one_broken_size_of_matching(self, tmp_path):
        head, tail = PERFORMANCE.split("[feature_match]")
        text = f"{head}[feature_match]{tail.replace('imageresizeH = 480', 'imageresizeH = 0')}"
        message = message_of(ini(tmp_path, text=text))
        assert "0, 640 in [feature_match]" in message

    def test_a_key_in_the_wrong_section_is_pointed_at(self, tmp_path):
        text = PERFORMANCE.replace("num_pcs = 4096\n", "")
        text = text.replace("[feature_match]", "[feature_match]\nnum_pcs = 4096")
        message = message_of(ini(tmp_path, text=text))
        assert re.search(r"'num_pcs' in \[feature_match\].*\[global_params\]", message)

    @pytest.mark.parametrize(
        "content",
        [
            b"",
            b"just words\n",
            b"\x00\x01\x02\xff\xfe" * 40,
            b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
            PERFORMANCE.encode("utf-16"),
            b"# caf\xe9\n" + PERFORMANCE.encode(),
            b"[global_params\npooling = netvlad\n",
            b"[global_params]\npooling = netvlad\n",
        ],
        ids=["empty", "words", "bytes", "PNG", "UTF-16", "Latin-1", "bracket", "one-section"],
    )
    def test_no_such_ini(self, tmp_path, content):
        path = tmp_path / "mine.ini"
        path.write_bytes(content)
        assert str(path) in message_of(path)

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("perfomance", ["'perfomance'", "'performance'"]),
            ("nowhere/performance.ini", ["'nowhere/performance.ini'", "'performance'"]),
            ("", ["demo, netvlad_extract, performance, speed, storage"]),
            ("a\0b", ["demo"]),
            ("~a\0b", ["demo"]),
            ("~nobody-of-that-name/x.ini", ["~nobody-of-that-name/x.ini"]),
            (".", ["'.'"]),
        ],
    )
    def test_no_such_file(self, tmp_path, monkeypatch, name, words):
        monkeypatch.chdir(tmp_path)
        message = message_of(name)
        assert all(word in message for word in words), message

    def test_names_beyond_what_file_systems_take(self):
        with pytest.raises(ConfigError, match="xxx"):
            Config.load("x" * 5000)


def test_sections_in_either_case_and_defaults(tmp_path):
    text = (CONFIG_DIR / "speed.ini").read_text()
    file = tmp_path / "mine.ini"
    file.write_text(
        "[DEFAULT]\nimageresizeW = 320\nhome = /data\n"
        + text.replace("[global_params]", "[GLOBAL_PARAMS]").replace("imageresizeW = 640\n", "")
    )
    config = Config.load(file)
    assert config.image_size == config.match_image_size == (480, 320)
    assert config.num_pcs == 512


@pytest.mark.parametrize("path", ["/no/such/configs/demo.ini", "mine/configs/speed.ini"])
def test_other_paths_do_not_mean_shipped_files(path):
    with pytest.raises(ConfigError, match=f"'{path}'"):
        Config.load(path)


@pytest.mark.parametrize(
    "path", ["speed", "speed.ini", "./configs/speed.ini", "patchnetvlad/configs/speed.ini"]
)
def test_paths_of_the_original_checkout_do(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Config.load(path).num_pcs == 512


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("threads", "many"),
        ("threads", 100_000_000),
        ("threads", -1),
        ("num_pcs", 0.5),
        ("num_pcs", None),
        ("pooling", 3),
        ("pooling", None),
        ("image_size", 640),
        ("image_size", ("480", "640")),
        ("patch_sizes", "2,5,8"),
        ("patch_weights", (0.5, None, 0.5)),
        ("memory_mb", [512]),
        ("faiss_parameters", 64),
        ("predictions_path", 3),
        ("n_values", {1, 5}),
    ],
)
def test_values_of_other_kinds_are_named(name, value):
    with pytest.raises(ConfigError, match=name):
        Config(**{name: value})


def test_lists_and_numbers_of_numpy_will_do():
    config = Config(patch_sizes=[2, 5, 8], num_pcs=np.int64(512), patch_weights=[0.5, 0.2, 0.3])
    assert config.patch_sizes == (2, 5, 8)
    assert hash(config) == hash(replace(config))
