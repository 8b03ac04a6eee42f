# SPDX-License-Identifier: MIT
"""One command from folders to answers, and all commands under one name."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

import patchnetvlad
from patchnetvlad.cli import feature_extract, feature_match, report, run, umbrella
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.features.lock import LOCK_FILE
from patchnetvlad.pipeline.run_record import read_run

pytestmark = pytest.mark.usefixtures("thin_network")

INI = """
[feature_extract]
cachebatchsize = 4
imageresizeW = 128
imageresizeH = 96

[feature_match]
matcher = {matcher}
n_values_all = 1,5,100
imageresizeW = 128
imageresizeH = 96
patchWeights2Use = 0.6,0.4

[global_params]
pooling = patchnetvlad
resumePath = {weights}
threads = 1
num_pcs = 128
patch_sizes = 2,3
strides = 1,1
"""


def config_file(path, matcher="RANSAC", weights="./pretrained_models/imagenet_WPCA"):
    path.write_text(INI.format(matcher=matcher, weights=weights))
    return str(path)


def picture(seed):
    blocks = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    return Image.fromarray(blocks).resize((200, 150), Image.Resampling.BICUBIC)


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Folders of ten index images, in one more folder each half, and of three views of some."""
    monkeypatch.chdir(tmp_path)
    for i in range(10):
        folder = tmp_path / "the map" / ("a" if i < 5 else "b")
        folder.mkdir(parents=True, exist_ok=True)
        picture(i).save(folder / f"{i}.png")
    (tmp_path / "views").mkdir()
    for i in (2, 9, 4):
        picture(i).crop((6, 4, 194, 146)).save(tmp_path / "views" / f"view{i}.png")
    (tmp_path / "views" / ".hidden.png").write_bytes(b"no image")
    config_file(tmp_path / "c.ini")
    return tmp_path


WORDS = ["--index", "the map", "--queries", "views", "--config_path", "c.ini", "--nocuda"]
CREATE = ["dataset", "create", "--output_dir", "o"]
ANSWERS = {"view2.png": "a/2.png", "view4.png": "a/4.png", "view9.png": "b/9.png"}


def answers(out):
    record = read_run(out)
    best = (record.index_names[row] for row in record.reranked[:, 0])
    return dict(zip(record.query_names, best, strict=True))


def test_two_folders_to_answers(world, capsys):
    assert run.main(WORDS) == 0
    out = world / "patchnetvlad_run"
    assert answers(out) == ANSWERS
    text = capsys.readouterr().out
    for query, answer in ANSWERS.items():
        line = re.search(rf"^{query} +{answer} +[\d.]+ +(\d+), (\d+)$", text, re.MULTILINE)
        assert line, text
        assert 10 < int(line[1]) <= 5 * 7
        assert 10 < int(line[2]) <= 4 * 6
    assert "by size 2, 3 (of 35, 24)" in text
    assert "never trained" in text
    assert "Recall" not in text
    assert f"open {out.relative_to(world) / 'report.html'}" in text
    page = (out / "report.html").read_text("utf-8")
    assert all(name in page for name in ANSWERS)
    assert "cannot be shown" not in page


def test_again_only_what_is_new_is_done(world, capsys, monkeypatch):
    assert run.main(WORDS) == 0
    out = world / "patchnetvlad_run"
    files = [file for file in out.rglob("*") if file.is_file() and file.name != LOCK_FILE]
    before = {file: file.stat().st_mtime_ns for file in files}
    with monkeypatch.context() as patch:

        def nothing(*arguments, **options):
            raise AssertionError("it was done again")

        patch.setattr("patchnetvlad.recipes.run.rerank", nothing)
        patch.setattr("patchnetvlad.recipes.run.write_report", nothing)
        patch.setattr("patchnetvlad.models.describer.load_network", nothing)
        assert run.main(WORDS) == 0
    after = {file: file.stat().st_mtime_ns for file in before}
    assert after == before
    assert "b/9.png" in capsys.readouterr().out

    picture(11).save(world / "views" / "new.png")
    picture(11).save(world / "the map" / "b" / "11.png")
    assert run.main(WORDS) == 0
    assert answers(out) == {**ANSWERS, "new.png": "b/11.png"}
    assert read_run(out).index_names[-1] == "b/11.png"  # after 9
    assert "new.png" in (out / "report.html").read_text("utf-8")

    capsys.readouterr()
    config_file(world / "other.ini", matcher="spatialApproximator")
    assert run.main([*WORDS[:-3], "--config_path", "other.ini", "--nocuda"]) == 0
    assert read_run(out).origin.config.matcher == "spatialApproximator"
    assert "patches that agree" not in capsys.readouterr().out


def test_what_was_damaged_is_made_again(world):
    assert run.main(WORDS) == 0
    out = world / "patchnetvlad_run"
    (out / "scores.npz").write_bytes(b"")
    (out / "report.html").unlink()
    assert run.main(WORDS) == 0
    assert answers(out) == ANSWERS
    assert (out / "report.html").is_file()


def test_positions_in_names_are_used(world, capsys):
    for folder, files in (("map", range(10)), ("asked", (2, 9))):
        (world / folder).mkdir()
        for i in files:
            name = f"@{500000 + 100 * i}@5300000@32@U@@@@@@@@@{i}@@.png"
            picture(i).save(world / folder / name)
    picture(4).save(world / "asked" / "@590000@5300000@.png")  # far away
    words = ["--index", "map", "--queries", "asked", "--config_path", "c.ini", "--output", "o"]
    assert run.main([*words, "--nocuda"]) == 0
    text = capsys.readouterr().out
    assert "====> Recall PatchNetVLAD@1: 0.6667" in text
    assert "Recall PatchNetVLAD@5" in text
    assert "@100" not in text  # of ten images
    assert "1 of 3 queries" in text
    assert len(re.findall(r"\d, \d+ +right$", text, re.MULTILINE)) == 2
    with np.load(world / "o" / "ground_truth.npz") as truth:
        assert truth["utmDb"].shape == (10, 2)
        assert truth["posDistThr"] == 25
    # Read from the results that stand.
    assert run.main([*words, "--nocuda"]) == 0
    assert "====> Recall PatchNetVLAD@1: 0.6667" in capsys.readouterr().out
    assert run.main([*words, "--nocuda", "--posDistThr", "100000"]) == 0
    text = capsys.readouterr().out
    assert "====> Recall PatchNetVLAD@1: 1.0000" in text
    assert "of 3 queries" not in text


def test_ground_truth_that_is_given(world, capsys):
    np.savez(
        "gt.npz", utmQ=np.array([[2.0, 0], [4, 0], [9, 0]]), utmDb=np.eye(10, 2), posDistThr=1.5
    )
    assert run.main([*WORDS, "--ground_truth", "gt.npz"]) == 0
    assert "Recall NetVLAD@5" in capsys.readouterr().out
    assert json.loads((world / "patchnetvlad_run" / "metrics.json").read_text())["methods"]
    assert run.main([*WORDS, "--ground_truth", "none.npz"]) == 2
    assert "none.npz" in capsys.readouterr().err
    assert run.main([*WORDS, "--positions", "exif"]) == 2  # asked for, and there is none
    assert "EXIF" in capsys.readouterr().err


def test_right_answers_by_name(world, capsys):
    lines = ["query,right", "view2.png,a/2.png", "view4.png,a/3.png", "view9.png,b/8.png,b/9.png"]
    (world / "pairs.csv").write_text("\n".join(lines))
    assert run.main([*WORDS, "--ground_truth", "pairs.csv"]) == 0
    text = capsys.readouterr().out
    assert "====> Recall PatchNetVLAD@1: 0.6667" in text
    assert re.search(r"^view4.png .* wrong$", text, re.MULTILINE)
    page = (world / "patchnetvlad_run" / "report.html").read_text("utf-8")
    assert "Right is what the ground truth names" in page
    assert '"distance":null' in page
    assert read_run(world / "patchnetvlad_run").origin.threshold is None
    (world / "pairs.csv").write_text("view2.png,a/20.png")
    assert run.main([*WORDS, "--ground_truth", "pairs.csv"]) == 2
    error = capsys.readouterr().err
    assert "pairs.csv, line 1" in error
    assert "a/20.png" in error


def test_from_python(world):
    found = patchnetvlad.run("c.ini", "the map", "views", "o", device="cpu", progress=False)
    assert found.record.reranked.shape == (3, 10)
    assert found.positives is None
    assert found.report.is_file()
    assert found.folder == world.relative_to(world) / "o"


def test_folders_in_place_of_lists(world, capsys):
    listed = ImageList.read("the map")
    assert listed.names == (
        *(f"a/{i}.png" for i in range(5)),
        *(f"b/{i}.png" for i in range(5, 10)),
    )
    assert ImageList.read("views", world).names == tuple(ANSWERS)
    assert listed.image_paths("nowhere")[7] == world.relative_to(world) / "the map" / "b" / "7.png"
    shared = ["--config_path", "c.ini", "--nocuda"]
    for folder, out in (("the map", "f/i"), ("views", "f/q")):
        words = [*shared, "--dataset_file_path", folder, "--output_features_dir", out]
        assert feature_extract.main(words) == 0
        assert "patchnetvlad match" in capsys.readouterr().out.splitlines()[-1]
    words = [*shared, "--query_file_path", "views", "--index_file_path", "the map"]
    words += ["--query_input_features_dir", "f/q", "--index_input_features_dir", "f/i"]
    assert feature_match.main(words) == 0
    text = capsys.readouterr().out
    assert all(re.search(f"{query} +{answer} ", text) for query, answer in ANSWERS.items())
    assert "patchnetvlad report results" in text.splitlines()[-1]
    assert answers(world / "results") == ANSWERS
    assert report.main(["results", "--nocuda"]) == 0
    assert "cannot be shown" not in (world / "results" / "report.html").read_text("utf-8")


def test_a_folder_without_images(world, capsys):
    (world / "empty").mkdir()
    assert run.main([*WORDS[2:], "--index", "empty"]) == 2
    assert "empty" in capsys.readouterr().err


def test_outputs_go_under_the_current_folder(world):
    words = ["--config_path", "c.ini", "--nocuda", "--dataset_file_path", "views"]
    assert feature_extract.main(words) == 0
    assert (world / "output_features" / "globalfeats.npy").is_file()


def in_a_process(*words, **options):
    words = [sys.executable, "-m", "patchnetvlad", *words]
    return subprocess.run(words, capture_output=True, text=True, check=False, **options)


def test_umbrella(capsys):
    for words in ([], ["--help"]):
        with pytest.raises(SystemExit) as ended:
            umbrella.main(words)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(re.search(rf"^ +{name}\b", text, re.MULTILINE) for name in umbrella.COMMANDS)
    with pytest.raises(SystemExit) as ended:
        umbrella.main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"patchnetvlad {patchnetvlad.__version__}\n"
    with pytest.raises(SystemExit) as ended:
        umbrella.main(["extrakt"])
    assert ended.value.code == 2
    assert "extract" in capsys.readouterr().err


@pytest.mark.parametrize("name", umbrella.COMMANDS)
def test_commands_go_by_the_name_they_were_called_by(name, capsys):
    with pytest.raises(SystemExit) as ended:
        umbrella.main([name, "--help"], prog="some program")
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"usage: some program {name} ")


@pytest.mark.parametrize(
    ("prog", "wanted"),
    [
        ("patchnetvlad match", " patchnetvlad extract "),
        ("python -m patchnetvlad match", " python -m patchnetvlad extract "),
        ("patchnetvlad-feature-match", " patchnetvlad-feature-extract "),
        ("", " feature_extract "),
    ],
)
def test_messages_name_commands_as_the_user_does(world, capsys, prog, wanted):
    words = ["--config_path", "c.ini", "--nocuda", "--query_file_path", "views"]
    words += ["--index_file_path", "the map", "--query_input_features_dir", "feature_extract/q"]
    words += ["--index_input_features_dir", "feature_extract/i"]
    assert feature_match.main(words, prog=prog) == 2
    error = capsys.readouterr().err
    assert wanted in error
    assert "feature_extract/q" in error


def test_help_of_the_program_waits_for_nothing():
    code = "import sys; from patchnetvlad.cli import umbrella\n"
    code += "try: umbrella.main(['--help'])\nexcept SystemExit: pass\n"
    code += "print(sorted({'numpy', 'torch', 'argcomplete', 'PIL'} & sys.modules.keys()))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["run", "--index", "gone", "--queries", "views"], "gone"),
        (["run", *WORDS[:4], "--config_path", "sped"], "speed"),
        (["run", *WORDS[:-1], "--device", "gpu"], "gpu"),
        (["extract", "--dataset_file_path", "gone.txt"], "gone.txt"),
        (["extract", "--dataset_file_path", "views", "--config_path", "no.ini"], "no.ini"),
        (["match-two", "--first_im_path", "no.jpg", "--second_im_path", "no.jpg"], "no.jpg"),
        (["live", "--output", "out.gif"], "out.gif"),
        (["report", "nowhere"], "nowhere"),
        (
            ["dataset", "create", "--images", "gone", "--query_every", "2", "--output_dir", "o"],
            "gone",
        ),
        (
            ["dataset", "create", "--images", "views", "--query_every", "1", "--output_dir", "o"],
            "1",
        ),
    ],
)
def test_mistakes_are_noticed_before_pytorch_is_loaded(world, capsys, words, named):
    code = "import sys; from patchnetvlad.cli import umbrella\n"
    code += "status = umbrella.main(sys.argv[1:])\n"
    code += "print(status, sorted({'torch', 'cv2'} & sys.modules.keys()))"
    run = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    assert run.stdout.splitlines()[-1] == "2 []", run.stderr
    assert named in run.stderr


def test_lists_of_matching_are_read_before_pytorch_is_loaded(world):
    words = ["--query_file_path", "views", "--index_file_path", "gone.txt"]
    words += ["--query_input_features_dir", "q", "--index_input_features_dir", "i"]
    run = in_a_process("match", *words)
    assert run.returncode == 2
    assert "gone.txt" in run.stderr


def complete(line, tmp_path):
    """Return what is offered at the end of a line, as argcomplete tells the shell."""
    out = tmp_path / "offered"
    env = {
        **os.environ, "_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(out),
        "_ARGCOMPLETE_IFS": "\n", "COMP_LINE": line, "COMP_POINT": str(len(line)),
        "_ARGCOMPLETE_SUPPRESS_SPACE": "1",
    }  # fmt: skip
    in_a_process(env=env)
    return out.read_text().split("\n")


def test_completion(tmp_path, capsys):
    assert set(complete("patchnetvlad ex", tmp_path)) == {"export", "extract"}
    assert "--dataset_file_path" in complete("patchnetvlad extract --data", tmp_path)
    assert set(complete("patchnetvlad dataset cr", tmp_path)) == {"create"}
    assert "--query_every" in complete("patchnetvlad dataset create --query_e", tmp_path)
    for shell in ("bash", "zsh", "fish"):
        assert umbrella.main(["completion", shell]) == 0
        code = capsys.readouterr().out
        assert "patchnetvlad" in code
        if shutil.which(shell):
            checked = subprocess.run([shell, "-n"], input=code, text=True, check=False)
            assert checked.returncode == 0
