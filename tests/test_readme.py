# SPDX-License-Identifier: MIT
"""What the README and the documentation say is true."""

from __future__ import annotations

import functools
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import REPOSITORY
from PIL import Image

from patchnetvlad.assets.catalog import (
    GROUND_TRUTH_FILES,
    IMAGE_LISTS,
    RELEASED_CHECKPOINTS,
    SHIPPED_CHECKPOINT,
)
from patchnetvlad.base.files import file_sha256
from patchnetvlad.config import Config
from patchnetvlad.config_ini import CONFIG_DIR
from patchnetvlad.features.store.codec import record_bytes

pytestmark = pytest.mark.docs

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
IN_PYTHON = (REPOSITORY / "docs" / "python.md").read_text(encoding="utf-8")


def blocks(language, text=README):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def test_is_short():
    assert len(README.splitlines()) <= 120


def test_python_prints_what_it_says(capsys):
    for code, output in zip(blocks("python"), blocks("text"), strict=True):
        exec(compile(code, "README.md", "exec"), {})
        printed = capsys.readouterr().out.splitlines()
        expected = output.splitlines()
        assert [line.split()[1] for line in printed] == [line.split()[1] for line in expected]
        numbers = [[float(line.split()[0]) for line in of] for of in (printed, expected)]
        np.testing.assert_allclose(*numbers, atol=0.002)


def test_page_on_python_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("first.jpg", "chartres.jpg")):
        blocks_of_colour = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
        image = Image.fromarray(blocks_of_colour).resize((320, 240), Image.Resampling.BICUBIC)
        image.save(name)
        if name == "first.jpg":
            image.crop((16, 0, 320, 240)).save("second.jpg")
    names: dict[str, object] = {}
    for code in blocks("python", IN_PYTHON):
        exec(compile(code.replace("path/to/checkout", str(REPOSITORY)), "python.md", "exec"), names)
        for what, shape in re.findall(r"^a\.(\w+)  # (\[[^:]*\]):", code, re.MULTILINE):
            have = getattr(names["a"], what)
            have = have if isinstance(have, tuple) else (have,)
            assert ", ".join(str(list(part.shape)) for part in have) == shape, what
    assert names["answer"].best.key == "Tokyo"
    assert names["found"].score > 0.1
    names["index"].close()


def commands():
    for block in blocks("bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = line.split()
            if words and "patchnetvlad" in words[0]:
                yield words[0].removeprefix(".venv/bin/"), words[1:]


@functools.cache
def help_of(*command):
    return subprocess.run([*command, "--help"], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("name", "words"), list(commands()))
def test_commands_exist_and_know_their_flags(name, words):
    console = Path(sys.executable).with_name(name)
    command = [str(console)]
    job = []
    while words and not words[0].startswith("-"):  # of a command that has several, and on what
        job.append(words[0])
        words = words[1:]
    shown = help_of(*command, *job[:1])
    for flag, value in zip(words[::2], words[1::2], strict=True):
        assert re.search(rf"{flag}\b", shown)
        if flag == "--config_path":
            Config.load(value)
        if value.endswith(("imageNames_index.txt", "imageNames_query.txt")):
            assert value in IMAGE_LISTS
        if flag == "--ground_truth_path":
            assert value in GROUND_TRUTH_FILES
    assert words or len(job) > 1


def test_table_of_configurations():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]*?) \|([^|]*)\| (\d+) \| ([^|]*?) \|", README, re.M)
    shipped = {file.stem for file in CONFIG_DIR.glob("*.ini")}
    assert {name for name, *_ in rows} == shipped - {"train", "train_modern"}
    for name, sizes, _, components, space in rows:
        config = Config.load(name)
        assert config.num_pcs == int(components)
        if config.uses_patches:
            assert sizes == ", ".join(map(str, config.patch_sizes))
            patches = sum((31 - size) * (41 - size) for size in config.patch_sizes)
            count = record_bytes("float16", config.num_pcs, [patches], 0)
            number, unit = space.split()
            assert unit == "MB"
            decimals = len(number.split(".")[1])
            assert number == f"{count / 1e6:.{decimals}f}"
        else:
            assert space == f"{config.num_pcs * 4 // 1000} kB"


def test_names_of_weights():
    for name in re.findall(r"\w+_WPCA\d+", README):
        assert f"{name}.pth.tar" in RELEASED_CHECKPOINTS


def test_model_card_is_of_the_shipped_checkpoint():
    card = SHIPPED_CHECKPOINT.with_name("MODEL_CARD.md").read_text(encoding="utf-8")
    assert file_sha256(SHIPPED_CHECKPOINT) in card


def test_links_lead_somewhere():
    pages = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md"]
    for page in [*pages, *(REPOSITORY / "docs").glob("*.md")]:
        for link in re.findall(
            r"\]\((?!https?:|\.\./\.\./actions/)([^)#]+)\)", page.read_text(encoding="utf-8")
        ):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
