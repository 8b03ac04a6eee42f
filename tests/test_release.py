# SPDX-License-Identifier: MIT
"""What is published: the wheel, and the files that services around a repository read."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest
from conftest import REPOSITORY

from patchnetvlad.assets import demo_images

pytestmark = pytest.mark.docs
tomllib = pytest.importorskip("tomllib", reason="part of Python from 3.11 on")
PROJECT = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]


@pytest.mark.parametrize(
    ("schema", "files"),
    [
        ("github-workflows", ".github/workflows/*.yml"),
        ("github-issue-forms", ".github/ISSUE_TEMPLATE/[!c]*.yml"),
        ("github-issue-config", ".github/ISSUE_TEMPLATE/config.yml"),
        ("citation-file-format", "CITATION.cff"),
    ],
)
def test_files_for_services_are_of_their_form(schema, files):
    found = sorted(REPOSITORY.glob(files))
    assert found
    check = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}"]
    done = subprocess.run([*check, *found], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_one_version_everywhere():
    version = re.escape(PROJECT["version"])
    for file, form in (
        ("CITATION.cff", rf"^version: {version}$"),
        ("conda/meta.yaml", rf'set version = "{version}"'),
        ("CHANGELOG.md", rf"^## {version}"),
    ):
        assert re.search(form, (REPOSITORY / file).read_text(encoding="utf-8"), re.MULTILINE), file


def test_the_recipe_asks_for_what_the_package_needs():
    recipe = (REPOSITORY / "conda" / "meta.yaml").read_text(encoding="utf-8")
    run = recipe.partition("  run:\n")[2].partition("\n\n")[0]
    there = set(re.findall(r"- (\S+) (>=\S+)", run))
    other_names = {
        "matplotlib": "matplotlib-base", "opencv-python-headless": "opencv", "torch": "pytorch",
    }  # fmt: skip
    wanted = {("python", PROJECT["requires-python"])}
    for requirement in PROJECT["dependencies"]:
        name, version = re.fullmatch(r"([\w-]+)(>=[\d.]+)", requirement).groups()
        wanted.add((other_names.get(name, name), version))
    assert there == wanted


def test_the_hub_entries_ask_for_what_the_package_needs():
    """By the names under which they are imported, but for what only commands need."""
    import hubconf

    imported = {
        "faiss-cpu": "faiss", "opencv-python-headless": "cv2", "pillow": "PIL",
        "scikit-learn": "sklearn",
    }  # fmt: skip
    names = {re.match(r"[\w-]+", requirement)[0] for requirement in PROJECT["dependencies"]}
    names -= {"argcomplete", "pip"}
    assert set(hubconf.dependencies) == {imported.get(name, name) for name in names}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build the wheel from what it is made of, and nothing else."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("dist")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    shutil.copytree(
        REPOSITORY / "patchnetvlad",
        source / "patchnetvlad",
        ignore=shutil.ignore_patterns("__pycache__", "*.pth.tar", "demo_images"),
    )
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*build, "--wheel-dir", out, source], check=True)
    (file,) = out.glob("*.whl")
    return file


def test_the_wheel_holds_all_files_of_the_package_and_only_these(wheel):
    with zipfile.ZipFile(wheel) as content:
        names = {name for name in content.namelist() if ".dist-info/" not in name}
    tracked = subprocess.run(
        ["git", "ls-files", "patchnetvlad"], cwd=REPOSITORY, capture_output=True, text=True
    )
    if tracked.returncode:
        pytest.skip("needs a checkout made by git")
    assert names == set(tracked.stdout.split("\n")) - {""}


def test_the_wheel_works_in_a_bare_environment(wheel, tmp_path):
    """It brings all its files along; its requirements are those of this environment."""
    venv.create(tmp_path / "bare", with_pip=False)
    (site,) = (tmp_path / "bare").glob("[Ll]ib/**/site-packages")
    with zipfile.ZipFile(wheel) as content:
        content.extractall(site)
    here = Path(os.__file__).parent  # the requirements, without the checkout's own path
    libraries = [path for path in sys.path if path.endswith("-packages") and path != str(here)]
    (site / "requirements.pth").write_text("\n".join(libraries) + "\n")
    python = tmp_path / "bare" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {name: v for name, v in os.environ.items() if name != "PYTHONPATH"}
    images = demo_images()
    done = subprocess.run(
        [
            python, "-m", "patchnetvlad.cli.match_two", "--config_path", "demo", "--nocuda",
            "--first_im_path", images["tokyo_db"], "--second_im_path", images["tokyo_query"],
            "--plot_save_path", "pictures",
        ],
        cwd=tmp_path, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "pictures").iterdir())
    where = subprocess.run(
        [python, "-c", "import patchnetvlad; print(patchnetvlad.__file__)"],
        cwd=tmp_path, capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert where.stdout.startswith(str(tmp_path))
