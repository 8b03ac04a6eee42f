# SPDX-License-Identifier: MIT
"""The example in C++: it builds, and says of two photographs what ``match-two`` says."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import REPOSITORY
from PIL import Image
from place_data import picture, write_ini

from patchnetvlad.cli import export, match_two

ROOT = os.environ.get("ONNXRUNTIME_ROOT", "")
FIND_OPENCV = "cmake --find-package -DNAME=OpenCV -DCOMPILER_ID=GNU -DLANGUAGE=CXX -DMODE=EXIST"
ORIENTATION, TURNED = 0x0112, 6  # a photograph that lies on its side


def lacking(folder):
    """Return what building it lacks on this machine, or an empty string."""
    if not Path(ROOT, "include").is_dir():
        return "ONNXRUNTIME_ROOT names no release of ONNX Runtime"
    if shutil.which("cmake") is None or shutil.which("c++") is None:
        return "there is no CMake, or no compiler of C++"
    found = subprocess.run(FIND_OPENCV.split(), cwd=folder, capture_output=True, check=False)
    return "" if found.returncode == 0 else "there is no OpenCV for C++"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("build")
    if reason := lacking(folder):
        pytest.skip(reason)
    source = str(REPOSITORY / "examples" / "cpp")
    subprocess.run(["cmake", "-S", source, "-B", folder, "-DCMAKE_BUILD_TYPE=Release"], check=True)
    subprocess.run(["cmake", "--build", folder], check=True)
    return folder / "match_two"


def run(*words):
    return subprocess.run([*map(str, words)], capture_output=True, text=True, check=False)


@pytest.mark.slow
@pytest.mark.usefixtures("thin_network")
def test_score_as_match_two(program, tmp_path, capsys):
    pytest.importorskip("onnxruntime")
    config = write_ini(tmp_path / "spatial.ini")
    config.write_text(config.read_text().replace("RANSAC", "spatialApproximator"))
    network, matcher = tmp_path / "network.onnx", tmp_path / "matcher.onnx"
    words = ["--config_path", str(config), "--matcher", str(matcher), "--output"]
    assert export.main([*words, str(network), "--resize"]) == 0

    first, second = tmp_path / "first.png", tmp_path / "second.jpg"
    picture(0, (320, 250)).save(first)
    exif = Image.Exif()
    exif[ORIENTATION] = TURNED
    seen = picture(0, (300, 240)).crop((60, 20, 300, 240))
    seen.transpose(Image.Transpose.ROTATE_90).save(second, exif=exif, quality=95)
    capsys.readouterr()
    photographs = ["--first_im_path", str(first), "--second_im_path", str(second)]
    plot = ["--plot_save_path", str(tmp_path)]
    assert match_two.main(["--config_path", str(config), *photographs, *plot]) == 0
    says = re.compile(r"Similarity score between the two images is: (-?\d+\.\d+)")
    (expected,) = says.findall(capsys.readouterr().out)
    assert float(expected) > 0

    done = run(program, network, matcher, first, second)
    assert (done.returncode, done.stderr) == (0, "")
    (score,) = says.findall(done.stdout)
    assert float(score) == pytest.approx(float(expected), rel=1e-3)

    for wrong in (1, 2, 3, 4):
        given = [program, network, matcher, first, second]
        given[wrong] = tmp_path / "absent"
        done = run(*given)
        assert done.returncode == 2
        assert len(done.stderr.splitlines()) == 1
        assert str(given[wrong]) in done.stderr
    assert run(program, network).returncode == 2
    done = run(program, matcher, matcher, first, second)  # which takes no images
    assert done.returncode == 2
    assert str(matcher) in done.stderr
