# SPDX-License-Identifier: MIT
"""The commands, as a user calls them, on small pictures."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import thin
from conftest import REPOSITORY
from PIL import Image

from patchnetvlad.cli import feature_extract, feature_match, match_two
from patchnetvlad.cli.convert_kapture_to_msls import main as convert_kapture_to_msls
from patchnetvlad.cli.gen_image_file_list import main as gen_image_file_list
from patchnetvlad.evaluation.recall import recall_at_n

pytestmark = pytest.mark.usefixtures("thin_network")

HEIGHT, WIDTH = 96, 128  # a feature map of 6 x 8 cells
SIZES = {2: 5 * 7, 3: 4 * 6}  # patches a size

INI = """
[feature_extract]
batchsize = 5
cachebatchsize = {batch}
local_features = {local}
imageresizeW = {width}
imageresizeH = {height}

[feature_match]
matcher = {matcher}
ransac = {ransac}
faiss_index = {faiss}
n_values_all = 1,5,10
dataset_name = {dataset}
pred_input_path = {predictions}
imageresizeW = {width}
imageresizeH = {height}
patchWeights2Use = 0.6,0.4

[global_params]
pooling = {pooling}
resumePath = ./pretrained_models/imagenet_WPCA
threads = {threads}
num_pcs = 128
ngpu = 1
patch_sizes = 2,3
strides = 1,1
patch_vlad = {patch_vlad}
"""


def write_config(path, **changes):
    values = {
        "batch": 2, "width": WIDTH, "height": HEIGHT, "matcher": "RANSAC", "dataset": "NA",
        "predictions": "None", "pooling": "patchnetvlad", "threads": 0,
        "patch_vlad": "direct", "local": "npy", "ransac": "opencv", "faiss": "Flat", **changes,
    }  # fmt: skip
    path.write_text(INI.format(**values))
    return str(path)


def picture(seed, size=(200, 150)):
    """Coarse random blocks: smooth enough to survive resizing, distinct enough to tell apart."""
    blocks = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize(size, Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Six places; queries are crops of the first three, in another kind of file each."""
    root = tmp_path_factory.mktemp("a world")  # a space in the name
    (root / "index").mkdir()
    (root / "query").mkdir()
    for i in range(6):
        picture(i).save(root / "index" / f"place{i}.jpg", quality=92)
    views = [picture(i).crop((6, 4, 194, 146)) for i in range(3)]
    views[0].convert("RGBA").save(root / "query" / "view0.png")
    views[1].convert("CMYK").save(root / "query" / "view1.jpg", quality=92)
    views[2].quantize(256).save(root / "query" / "view2.png")
    (root / "index.txt").write_text("".join(f"index/place{i}.jpg\n" for i in range(6)))
    (root / "query.txt").write_text("query/view0.png\r\nquery/view1.jpg\r\n\r\nquery/view2.png")
    np.savez(
        root / "gt.npz",
        utmQ=np.array([[0, 0], [10, 0], [999, 0]]),  # the third has no right answer
        utmDb=np.array([[10 * i, 0] for i in range(6)]),
        posDistThr=3,
    )
    return root


def extract(root, part, config, out, *more):
    return feature_extract.main(
        ["--config_path", config, "--dataset_file_path", str(root / f"{part}.txt"),
         "--dataset_root_dir", str(root), "--output_features_dir", str(out), "--nocuda", *more]
    )  # fmt: skip


def match(root, config, features, results, *more):
    return feature_match.main(
        ["--config_path", config, "--dataset_root_dir", str(root),
         "--query_file_path", str(root / "query.txt"), "--index_file_path", str(root / "index.txt"),
         "--query_input_features_dir", str(features / "query"),
         "--index_input_features_dir", str(features / "index"),
         "--result_save_folder", str(results), "--nocuda", *more]
    )  # fmt: skip


@pytest.fixture(scope="module")
def features(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("features")
    config = write_config(folder / "config.ini")
    assert extract(world, "query", config, folder / "query") == 0
    assert extract(world, "index", config, folder / "index") == 0
    return folder


def pairs(path):
    lines = path.read_text().splitlines()
    assert lines[:2] == ["# kapture format: 1.0", "# query_image, map_image"]
    return [tuple(line.split(", ")) for line in lines[2:]]


def test_features_have_the_layout_of_the_research_code(features):
    descriptors = np.load(features / "query" / "globalfeats.npy")
    assert descriptors.shape == (3, 128)
    assert descriptors.dtype == np.float32
    np.testing.assert_allclose(np.linalg.norm(descriptors, axis=1), 1, atol=1e-5)
    for stem in ("view0", "view1", "view2"):
        for size, count in SIZES.items():
            patches = np.load(features / "query" / f"patchfeats_psize{size}_{stem}.npy")
            assert patches.shape == (128, count)
            assert patches.dtype == np.float32
            np.testing.assert_allclose(np.linalg.norm(patches, axis=0), 1, atol=1e-5)
    assert not list(features.rglob("*.part"))


@pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
def test_match(world, features, tmp_path, capsys, matcher):
    config = write_config(tmp_path / "c.ini", matcher=matcher)
    results = tmp_path / "not" / "yet" / "there"
    assert (
        match(world, config, features, results, "--ground_truth_path", str(world / "gt.npz")) == 0
    )
    out = capsys.readouterr().out
    ranked = {}
    for method in ("NetVLAD", "PatchNetVLAD"):
        found = pairs(results / f"{method}_predictions.txt")
        assert len(found) == 3 * 6  # ten are asked for; there are six
        queries = [query for query, _ in found]
        assert queries == sorted(queries)
        ranked[method] = np.array([int(answer[-5]) for _, answer in found]).reshape(3, 6)
        assert all(sorted(row) == list(range(6)) for row in ranked[method])
    assert ranked["PatchNetVLAD"][:, 0].tolist() == [0, 1, 2]
    expected = [
        f"Recall {method}@{n}: {recall:.4f}"
        for method, rows in ranked.items()
        for n, recall in zip((1, 5, 10), recall_at_n(rows, [[0], [1], []], (1, 5, 10)), strict=True)
    ]
    assert (results / "recalls.txt").read_text() == "".join(f"{line}\n" for line in expected)
    assert "Recall PatchNetVLAD@1: 0.6667" in expected
    shown = [line for line in out.splitlines() if line.startswith("====> ")]
    assert shown == [f"====> {line}" for line in expected if "@10:" not in line]  # of 6 images
    assert "1 of 3 queries" in out
    # Three queries: each is a block, and nothing but them is drawn.
    intervals = re.search(r"^95 % intervals.*: *\n.*\nNetVLAD .*\nPatchNetVLAD +(.*)", out, re.M)
    assert intervals, out
    assert intervals[1].split()[0] == "0.000-1.000"


@pytest.mark.parametrize(
    ("options", "drawn"),
    [((), "single queries"), (("--interval_block", "2"), "blocks of 2"),
     (("--interval_block", "traverse"), "single queries")],
)  # fmt: skip
def test_intervals_of_blocks(world, features, tmp_path, capsys, options, drawn):
    config = write_config(tmp_path / "c.ini", matcher="spatialApproximator")
    truth = ("--ground_truth_path", str(world / "gt.npz"))
    assert match(world, config, features, tmp_path / "r", *truth, *options) == 0
    assert f"bootstrap over {drawn}" in capsys.readouterr().out
    stored = json.loads((tmp_path / "r" / "metrics.json").read_text())["methods"]
    for method in stored.values():
        assert drawn in method["intervals"]["drawn"]
        for n, (low, high) in method["intervals"]["recall"].items():
            assert low <= method["recall"][n] <= high
    asked = json.loads((tmp_path / "r" / "run.json").read_text())["config"]["interval_block"]
    assert asked == (options[1] if options else "auto")


def test_an_interval_block_that_is_none(world, features, tmp_path, capsys):
    config = write_config(tmp_path / "c.ini", matcher="spatialApproximator")
    assert match(world, config, features, tmp_path / "r", "--interval_block", "floor") == 2
    assert "--interval_block floor" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_match_without_ground_truth(world, features, tmp_path, capsys):
    config = write_config(tmp_path / "c.ini", matcher="spatialApproximator")
    assert match(world, config, features, tmp_path / "r") == 0
    assert not (tmp_path / "r" / "recalls.txt").exists()
    out = capsys.readouterr().out
    for i, kind in enumerate(("png", "jpg", "png")):
        assert re.search(rf"^query/view{i}.{kind} +index/place{i}.jpg ", out, re.MULTILINE)
    assert "Recall" not in out


def test_threshold_of_the_command_line_counts(world, features, tmp_path):
    config = write_config(tmp_path / "c.ini", matcher="spatialApproximator")
    more = ["--ground_truth_path", str(world / "gt.npz"), "--posDistThr"]
    assert match(world, config, features, tmp_path, *more, "1000") == 0
    assert "Recall NetVLAD@1: 1.0000" in (tmp_path / "recalls.txt").read_text()


def test_candidates_of_another_retrieval(world, features, tmp_path):
    np.save(tmp_path / "p.npy", np.array([[5, 0], [4, 1], [3, 2]]))
    config = write_config(tmp_path / "c.ini", predictions=tmp_path / "p.npy")
    assert match(world, config, features, tmp_path) == 0
    assert [answer[-5] for _, answer in pairs(tmp_path / "NetVLAD_predictions.txt")] == list(
        "504132"
    )
    ranked = [answer[-5] for _, answer in pairs(tmp_path / "PatchNetVLAD_predictions.txt")]
    assert ranked == list("051423")


@pytest.mark.parametrize("by", ["dataset_name", "file"])
def test_tokyo_keeps_one_cutout_a_panorama(world, features, tmp_path, by):
    config = write_config(tmp_path / "c.ini", dataset="tokyo247" if by == "dataset_name" else "NA")
    gt = tmp_path / ("tokyo247.npz" if by == "file" else "gt.npz")
    gt.write_bytes((world / "gt.npz").read_bytes())
    assert match(world, config, features, tmp_path, "--ground_truth_path", str(gt)) == 0
    # Six images are less than one panorama's twelve cut-outs: one answer a query is left.
    assert len(pairs(tmp_path / "PatchNetVLAD_predictions.txt")) == 3


@pytest.mark.parametrize("dataset", ["NA", "tokyo247"])
def test_parameters_of_an_index(world, features, tmp_path, capsys, dataset):
    config = write_config(
        tmp_path / "c.ini", dataset=dataset, faiss="HNSW8\nfaiss_parameters = nprobe=2"
    )
    assert match(world, config, features, tmp_path) == 2
    assert re.search("HNSW8 .*nprobe;", capsys.readouterr().err)


@pytest.mark.parametrize("patch_vlad", ["direct", "integral"])
@pytest.mark.parametrize("local", ["float32", "float16", "int8", "map"])
def test_every_kind_of_store(world, tmp_path, local, patch_vlad):
    """Recalls are those of ``.npy`` files, whichever way features are kept and matched."""
    changes = {"local": local, "patch_vlad": patch_vlad}
    config = write_config(tmp_path / "c.ini", **changes)
    for part in ("query", "index"):
        assert extract(world, part, config, tmp_path / part) == 0
    store = (tmp_path / "index" / "features-00000.bin").stat().st_size
    each = {
        "float32": 4 * 59 * 128, "float16": 2 * 59 * 128, "int8": 59 * (128 + 4),
        "map": 2 * 512 * 6 * 8,
    }[local]  # fmt: skip
    assert store == 6 * (4 * 128 + each)
    for matcher, ransac in (
        ("RANSAC", "opencv"), ("RANSAC", "fast"), ("RANSAC", "batched"),
        ("spatialApproximator", "opencv"),
    ):  # fmt: skip
        config = write_config(tmp_path / "c.ini", matcher=matcher, ransac=ransac, **changes)
        truth = ["--ground_truth_path", str(world / "gt.npz")]
        assert match(world, config, tmp_path, tmp_path / "r", *truth) == 0
        found = pairs(tmp_path / "r" / "PatchNetVLAD_predictions.txt")
        assert [answer for _, answer in found[::6]] == [f"index/place{i}.jpg" for i in range(3)]
        assert not list((tmp_path / "r").glob("*.journal"))


@pytest.mark.parametrize("pooling", ["netvlad", "max", "avg"])
def test_global_poolings(world, tmp_path, pooling):
    config = write_config(tmp_path / "c.ini", pooling=pooling)
    if pooling != "netvlad":  # no vocabulary, and so no PCA of it
        text = Path(config).read_text().replace("num_pcs = 128", "num_pcs = 0")
        text = text.replace("imagenet_WPCA", "imagenet_WPCA128.safetensors")
        Path(config).write_text(text)
    for part in ("query", "index"):
        assert extract(world, part, config, tmp_path / part) == 0
        names = sorted(file.name for file in (tmp_path / part).glob("*[!k]"))  # less the .lock
        assert names == ["features.json", "globalfeats.npy"]
    dimensions = np.load(tmp_path / "query" / "globalfeats.npy").shape[1]
    assert dimensions == (128 if pooling == "netvlad" else 512)
    assert match(world, config, tmp_path, tmp_path / "r") == 0
    assert sorted(file.name for file in (tmp_path / "r").iterdir()) == [
        "NetVLAD_predictions.txt", "run.json", "scores.npz",
    ]  # fmt: skip


def test_native_sizes(world, tmp_path):
    """Images of several sizes in one list, each kept as it is."""
    root = tmp_path / "images"
    root.mkdir()
    for i, size in enumerate([(128, 96), (160, 112), (128, 96), (144, 144)]):
        picture(i, size).save(root / f"{i}.png")
    (root / "index.txt").write_text("".join(f"{i}.png\n" for i in range(4)))
    (root / "query.txt").write_text("1.png\n3.png\n")
    config = write_config(tmp_path / "c.ini", width=0, height=0, batch=4)
    for part in ("query", "index"):
        assert extract(root, part, config, tmp_path / part) == 0
    shape = np.load(tmp_path / "index" / "patchfeats_psize2_1.npy").shape
    assert shape == (128, 6 * 9)
    assert match(root, config, tmp_path, tmp_path / "r") == 0
    found = pairs(tmp_path / "r" / "PatchNetVLAD_predictions.txt")
    assert found[0] == ("1.png", "1.png")
    assert found[4] == ("3.png", "3.png")


def test_workers_and_batches_do_not_change_features(world, features, tmp_path):
    config = write_config(tmp_path / "c.ini", batch=3, threads=2)
    assert extract(world, "query", config, tmp_path / "query") == 0
    for file in (features / "query").glob("*.npy"):
        np.testing.assert_allclose(
            np.load(tmp_path / "query" / file.name), np.load(file), atol=2e-5
        )


def test_results_of_an_earlier_run_are_not_left(world, features, tmp_path):
    config = write_config(tmp_path / "c.ini", matcher="spatialApproximator")
    truth = ["--ground_truth_path", str(world / "gt.npz")]
    assert match(world, config, features, tmp_path / "r", *truth) == 0
    assert (tmp_path / "r" / "recalls.txt").exists()
    assert match(world, config, features, tmp_path / "r") == 0
    assert not (tmp_path / "r" / "recalls.txt").exists()


@pytest.mark.parametrize("local", ["npy", "float16"])
def test_features_of_other_images_of_the_same_names(tmp_path, capsys, local):
    config = write_config(tmp_path / "c.ini", local=local)
    for season in (1, 2):
        root = tmp_path / str(season)
        root.mkdir()
        picture(season).save(root / "0.jpg")
        (root / "index.txt").write_text("0.jpg\n")
    out = tmp_path / "f"
    assert extract(tmp_path / "1", "index", config, out) == 0
    first = np.load(out / "globalfeats.npy")
    assert extract(tmp_path / "2", "index", config, out) == 2
    error = capsys.readouterr().err
    assert re.search(f"{out} .*another folder.*--no-resume", error)
    np.testing.assert_array_equal(np.load(out / "globalfeats.npy"), first)
    assert extract(tmp_path / "2", "index", config, out, "--no-resume") == 0
    assert np.abs(np.load(out / "globalfeats.npy") - first).max() > 0.01


def test_images_too_small_for_their_patches_are_named(tmp_path, capsys):
    picture(0, (128, 96)).save(tmp_path / "0.png")
    picture(0, (300, 20)).save(tmp_path / "1.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "2.png")
    (tmp_path / "index.txt").write_text("0.png\n1.png\n2.png\n")
    config = write_config(tmp_path / "c.ini", width=0, height=0)
    assert extract(tmp_path, "index", config, tmp_path / "f") == 2
    error = capsys.readouterr().err
    assert re.search(r"/1\.png .*300 x 20 px.*\b48 px", error)
    assert "2.png" in error
    assert (tmp_path / "f" / "patchfeats_psize3_0.npy").exists()
    words = ["--first_im_path", str(tmp_path / "0.png"), "--second_im_path"]
    words += [str(tmp_path / "2.png"), "--config_path", config, "--plot_save_path", str(tmp_path)]
    assert match_two.main([*words, "--nocuda"]) == 2
    assert re.search(r"/2\.png .*1 x 1 px.*\b48 px", capsys.readouterr().err)


def test_patches_that_do_not_fit_are_noticed_before_a_download(tmp_path, capsys, monkeypatch):
    def no_download(*arguments):
        raise AssertionError("a checkpoint was looked for")

    monkeypatch.setattr("patchnetvlad.features.plan.resolve_checkpoint", no_download)
    picture(0).save(tmp_path / "0.png")
    (tmp_path / "index.txt").write_text("0.png\n")
    config = write_config(tmp_path / "c.ini", height=32)
    assert extract(tmp_path, "index", config, tmp_path / "f") == 2
    assert re.search(r"\b3\b.*\b2 x 8\b.*patch_sizes", capsys.readouterr().err)


def test_the_work_goes_on_when_nobody_reads_the_output(world, tmp_path):
    config = write_config(tmp_path / "c.ini")
    words = [*thin.command("patchnetvlad.cli.feature_extract"), "--config_path", config]
    words += ["--dataset_file_path", str(world / "query.txt"), "--dataset_root_dir", str(world)]
    words += ["--output_features_dir", str(tmp_path / "f"), "--nocuda"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert process.stdout
    process.stdout.close()
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "f" / "globalfeats.npy").exists()


def test_a_broken_image_does_not_stop_the_others(world, tmp_path, capsys):
    root = tmp_path / "images"
    root.mkdir()
    for i in range(4):
        picture(i).save(root / f"{i}.jpg")
    whole = (root / "2.jpg").read_bytes()
    (root / "2.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "index.txt").write_text("".join(f"{i}.jpg\n" for i in range(4)))
    config = write_config(tmp_path / "c.ini")
    assert extract(root, "index", config, tmp_path / "f") == 2
    error = capsys.readouterr().err
    assert "2.jpg" in error
    assert "line 3" in error
    assert "Traceback" not in error
    assert (tmp_path / "f" / "patchfeats_psize2_3.npy").exists()
    assert not (tmp_path / "f" / "globalfeats.npy").exists()

    kept = (tmp_path / "f" / "patchfeats_psize2_3.npy").stat().st_mtime_ns
    (root / "2.jpg").write_bytes(whole)
    assert extract(root, "index", config, tmp_path / "f") == 0
    assert "3 of 4 images" in capsys.readouterr().out
    assert (tmp_path / "f" / "patchfeats_psize2_3.npy").stat().st_mtime_ns == kept
    assert np.isfinite(np.load(tmp_path / "f" / "globalfeats.npy")).all()


@pytest.mark.parametrize(
    ("entry", "problem"),
    [("gone.jpg", "missing"), ("empty.jpg", "0 bytes"), ("", "file")],
)
def test_lists_are_checked_before_the_model_is_loaded(
    world, tmp_path, capsys, monkeypatch, entry, problem
):
    def no_model(*arguments):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("patchnetvlad.models.describer.load_network", no_model)
    (tmp_path / "empty.jpg").touch()
    picture(0).save(tmp_path / "good.jpg")
    (tmp_path / "index.txt").write_text(f"good.jpg\n\n./{entry}\n")
    config = write_config(tmp_path / "c.ini")
    assert extract(tmp_path, "index", config, tmp_path / "f") == 2
    error = capsys.readouterr().err
    assert f"{entry} (" in error
    assert "line 3" in error
    assert problem in error
    assert not (tmp_path / "f").exists()


def test_images_that_share_a_stem(world, tmp_path, capsys):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        picture(ord(folder)).save(tmp_path / folder / "1.jpg")
    (tmp_path / "index.txt").write_text("a/1.jpg\nb/1.jpg\n")
    (tmp_path / "query.txt").write_text("b/1.jpg\n")
    config = write_config(tmp_path / "c.ini")
    assert extract(tmp_path, "index", config, tmp_path / "index") == 2
    error = capsys.readouterr().err
    assert "a/1.jpg and b/1.jpg" in error
    assert "--feature_names path" in error
    assert not (tmp_path / "index").exists()
    for part in ("index", "query"):
        assert extract(tmp_path, part, config, tmp_path / part, "--feature_names", "path") == 0
    assert (tmp_path / "index" / "patchfeats_psize2_a" / "1.jpg.npy").exists()
    assert match(tmp_path, config, tmp_path, tmp_path / "r") == 0
    assert pairs(tmp_path / "r" / "PatchNetVLAD_predictions.txt")[0] == ("b/1.jpg", "b/1.jpg")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["--config_path", "sped"], "'speed'"),
        (["--query_file_path", "nowhere.txt"], "nowhere.txt"),
        (["--query_input_features_dir", "nowhere"], "feature_extract"),
        (["--ground_truth_path", "nowhere.npz"], "nowhere.npz"),
        (["--device", "cuda:99"], "cuda:99"),
        (["--device", "gpu"], "auto, cpu, cuda"),
    ],
)
def test_errors_are_short_and_name_the_way_out(world, features, tmp_path, capsys, change, words):
    config = write_config(tmp_path / "c.ini")
    arguments = {
        "--config_path": config,
        "--dataset_root_dir": str(world),
        "--query_file_path": str(world / "query.txt"),
        "--index_file_path": str(world / "index.txt"),
        "--query_input_features_dir": str(features / "query"),
        "--index_input_features_dir": str(features / "index"),
        "--result_save_folder": str(tmp_path / "r"),
        **dict([change]),
    }
    assert feature_match.main([word for pair in arguments.items() for word in pair]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert words in captured.err
    assert len(captured.err.strip().splitlines()) <= 2
    assert not (tmp_path / "r").exists()


def test_debug_shows_the_traceback(tmp_path):
    words = [sys.executable, "-m", "patchnetvlad.cli.match_two", "--config_path", "no_such.ini"]
    loud = subprocess.run([*words, "--debug"], capture_output=True, text=True, check=False)
    assert "Traceback" in loud.stderr
    assert "ConfigError" in loud.stderr


def test_without_debug_there_is_no_traceback(capsys):
    assert match_two.main(["--config_path", "no_such.ini"]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_nocuda_and_device_contradict(world, tmp_path, capsys):
    config = write_config(tmp_path / "c.ini")
    assert extract(world, "query", config, tmp_path / "f", "--device", "cuda") == 2
    assert re.search("--nocuda.*--device cuda", capsys.readouterr().err)


def score_of(out):
    found = re.search(
        r"^Similarity score between the two images is: (-?\d+\.\d{5})\. "
        r"Larger scores indicate better matches\.$",
        out,
        re.MULTILINE,
    )
    assert found
    return float(found[1])


@pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
def test_match_two(world, tmp_path, capsys, matcher):
    config = write_config(tmp_path / "c.ini", matcher=matcher)
    scores = {}
    first = str(world / "query" / "view0.png")
    for second in ("place0", "place5"):
        plots = tmp_path / "plots" / second
        words = ["--first_im_path", first, "--plot_save_path", str(plots)]
        words += ["--second_im_path", str(world / "index" / f"{second}.jpg")]
        assert match_two.main(["--config_path", config, "--nocuda", *words]) == 0
        scores[second] = score_of(capsys.readouterr().out)
        with Image.open(plots / "patchMatchings.png") as plot:
            assert plot.size[0] > 1000
            assert len(plot.convert("RGB").getcolors(maxcolors=2**20)) > 1000
    assert scores["place0"] > scores["place5"]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", ["$_$.png", "cost $5_$6.png", "写真, 1.png"])
def test_match_two_of_oddly_named_files(tmp_path, name):
    config = write_config(tmp_path / "c.ini")
    picture(0).save(tmp_path / name)
    words = ["--first_im_path", str(tmp_path / name), "--second_im_path", str(tmp_path / name)]
    words += ["--plot_save_path", str(tmp_path / "p"), "--config_path", config, "--nocuda"]
    assert match_two.main(words) == 0
    assert (tmp_path / "p" / "patchMatchings.png").exists()


@pytest.mark.parametrize("matcher", ["RANSAC", "spatialApproximator"])
def test_match_two_of_degenerate_images(world, tmp_path, capsys, matcher):
    config = write_config(tmp_path / "c.ini", matcher=matcher)
    Image.new("L", (64, 64), 0).save(tmp_path / "black.png")
    same = world / "index" / "place0.jpg"
    scores = []
    for first, second in ((same, same), (same, tmp_path / "black.png"),
                          (tmp_path / "black.png", tmp_path / "black.png")):  # fmt: skip
        words = ["--first_im_path", str(first), "--second_im_path", str(second)]
        words += ["--plot_save_path", str(tmp_path), "--config_path", config, "--nocuda"]
        assert match_two.main(words) == 0
        scores.append(score_of(capsys.readouterr().out))
    assert np.isfinite(scores).all()
    if matcher == "RANSAC":
        assert scores[0] == pytest.approx(1.0)  # every patch is an inlier, weights add up to 1
    assert scores[0] > scores[1]


@pytest.mark.parametrize(
    "script", ["feature_extract", "feature_match", "match_two", "download_models"]
)
def test_scripts_are_doors(script, tmp_path, monkeypatch, capsys):
    path = REPOSITORY / f"{script}.py"
    assert len(path.read_text().splitlines()) < 30  # with the names that they hand on
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    console = Path(sys.executable).with_name(f"patchnetvlad-{script.replace('_', '-')}")
    assert console.is_file()
    same = subprocess.run([str(console), "--help"], capture_output=True, text=True, check=True)
    flags = r"--\w+"
    assert set(re.findall(flags, shown)) == set(re.findall(flags, same.stdout)) > {"--help"}


def test_gen_image_file_list(world, tmp_path, capsys):
    out = tmp_path / "lists" / "index.txt"
    words = ["--dataset_root_dir", str(world / "index"), "--out_file", str(out)]
    assert gen_image_file_list(words) == 0
    assert out.read_text().splitlines() == [
        str(world / "index" / f"place{i}.jpg") for i in range(6)
    ]
    assert gen_image_file_list([words[0], str(world), *words[2:]]) == 2
    assert "--recursive" in capsys.readouterr().err


def test_convert_kapture_to_msls(tmp_path, capsys):
    pairs, out = tmp_path / "PatchNetVLAD_predictions.txt", tmp_path / "msls.txt"
    lines = ["# kapture format: 1.0\n# query_image, map_image\n"]
    for candidate in ("b1", "b2"):
        lines += [f"cph/query/{q}.jpg, cph/database/{candidate}{q}.jpg\n" for q in ("aa", "cc")]
    pairs.write_text("".join(lines))
    assert convert_kapture_to_msls([str(pairs), str(out)]) == 0
    # What the research code's script writes of the same file.
    assert out.read_text() == "aa b1aa b2aa\ncc b1cc b2cc\n"
    assert convert_kapture_to_msls([str(tmp_path / "none.txt"), str(out)]) == 2
    assert "none.txt" in capsys.readouterr().err
    assert convert_kapture_to_msls([str(pairs), str(pairs)]) == 2
    assert pairs.read_text() == "".join(lines)


def test_help_waits_for_no_library():
    """Neither NumPy nor PyTorch is imported before the words of a command are read."""
    code = """
import contextlib, importlib, sys
for name in sys.argv[1:]:
    with contextlib.suppress(SystemExit):
        importlib.import_module(f"patchnetvlad.cli.{name}").main(["--help"])
    print("heavy:", name, sorted({"numpy", "torch"} & sys.modules.keys()))
"""
    folder = REPOSITORY / "patchnetvlad" / "cli"
    names = sorted(file.stem for file in folder.glob("[a-z]*.py"))
    run = subprocess.run(
        [sys.executable, "-c", code, *names], capture_output=True, text=True, check=True
    )
    assert re.findall("^heavy: (.*)$", run.stdout, re.MULTILINE) == [f"{name} []" for name in names]
    assert run.stdout.count("usage: ") == len(names) == 23


def check_work_without_output(words, how, file):
    run = subprocess.run(
        ["sh", "-c", f'"$@" {how}', "sh", *map(str, words)],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr
    assert file.exists()
    assert "Traceback" not in run.stderr
    assert ("is lost: No space left" in run.stderr) == (how == ">/dev/full")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("how", [">&-", "2>&-", ">&- 2>&-", ">/dev/full", "2>/dev/full"])
def test_output_is_not_the_work(world, tmp_path, how):
    words = [sys.executable, "-m", "patchnetvlad.cli.dataset", "create", "--no-map"]
    words += ["--images", world / "index", "--positions", "frames", "--query_every", 3]
    words += ["--output_dir", tmp_path / "d"]
    check_work_without_output(words, how, tmp_path / "d" / "ground_truth.npz")


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("how", ["<&- >&- 2>&-", ">/dev/full 2>&1"])
def test_output_is_not_the_work_of_extraction(world, tmp_path, how):
    config = write_config(tmp_path / "c.ini")
    words = [*thin.command("patchnetvlad.cli.feature_extract"), "--config_path", config]
    words += ["--dataset_file_path", world / "query.txt", "--dataset_root_dir", world]
    words += ["--output_features_dir", tmp_path / "f", "--nocuda"]
    check_work_without_output(words, how, tmp_path / "f" / "globalfeats.npy")


def test_names_do_not_steer_the_terminal(tmp_path, capsys):
    name = "a\x1b[2J\x9b1A\u202egpj.exe\rdone.jpg"
    (tmp_path / "list.txt").write_text(f'"{name}"\n', newline="")
    config = write_config(tmp_path / "c.ini")
    words = ["--config_path", config, "--dataset_file_path", str(tmp_path / "list.txt")]
    assert feature_extract.main([*words, "--output_features_dir", str(tmp_path / "f")]) == 2
    shown = capsys.readouterr().err
    assert "\\x1b[2J" in shown
    assert not set(shown) & set("\x1b\x9b\u202e\r")
