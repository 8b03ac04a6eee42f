# SPDX-License-Identifier: MIT
"""The site that is made of the documentation."""

from __future__ import annotations

import ast
import graphlib
import importlib
import os
import re
import subprocess
import sys
from html.parser import HTMLParser

import grimp
import pytest
from conftest import REPOSITORY

import patchnetvlad
from patchnetvlad.config import Config
from patchnetvlad.config_ini import KEYS

pytestmark = pytest.mark.docs

DOCS, PACKAGE = REPOSITORY / "docs", REPOSITORY / "patchnetvlad"
PAGES = sorted(DOCS.glob("*.md"))
DOORS = {"patchnetvlad.models.local_matcher", "patchnetvlad.models.models_generic"}
# What a browser fetches to show a page, as against links that a reader follows.
LOADED = {
    "script": "src", "img": "src", "iframe": "src", "source": "src", "link": "href", "use": "href",
}  # fmt: skip

sys.path.insert(0, str(DOCS / "_build"))
import hooks  # noqa: E402
import rooms  # noqa: E402


class Loaded(HTMLParser):
    """Collects what a page loads."""

    def __init__(self):
        super().__init__()
        self.urls = []

    def handle_starttag(self, tag, attrs):
        url = dict(attrs).get(LOADED.get(tag, ""))
        if url:
            self.urls.append(url)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    words = [sys.executable, "-m", "mkdocs", "build", "--strict"]  # --quiet does not see warnings
    built = subprocess.run(
        [*words, "--site-dir", str(folder)],
        cwd=REPOSITORY,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


def test_builds_without_a_warning(site):
    for page in PAGES:
        assert (site / f"{page.stem}.html").is_file()
    for notebook in (REPOSITORY / "examples").glob("*.ipynb"):
        assert (site / "examples" / f"{notebook.stem}.html").is_file()


def test_loads_nothing_from_elsewhere(site):
    for page in site.rglob("*.html"):
        parser = Loaded()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.urls
        for url in parser.urls:
            assert not re.match(r"(\w+:)?//", url), f"{page.name} loads {url}"
    for style in site.rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//", style.read_text(encoding="utf-8"))
    # Search, too, where the site is opened from the disk.
    assert "iframe-worker.js" in (site / "index.html").read_text(encoding="utf-8")
    assert (site / "search" / "search_index.js").is_file()


def test_the_whole_public_api_is_there(site):
    page = (site / "reference" / "index.html").read_text(encoding="utf-8")
    for name in patchnetvlad.__all__:
        module = importlib.import_module("patchnetvlad")
        home = getattr(module, name).__module__
        anchors = {f'id="patchnetvlad.{name}"', f'id="{home}.{name}"'}
        assert any(anchor in page for anchor in anchors), name
    for module in hooks.modules():
        assert (site / "reference" / f"{module}.html").is_file()


def test_modules_of_the_reference_exist():
    listed = {f"patchnetvlad.{name}" for names in hooks.MODULES.values() for name in names}
    assert listed == set(hooks.modules())


def test_formulas_and_diagrams_are_part_of_the_page(site):
    page = (site / "method.html").read_text(encoding="utf-8")
    assert page.count("<math") > 20
    assert "$" not in re.sub(r"<script.*?</script>|<style.*?</style>", "", page, flags=re.DOTALL)
    assert "<svg" in page
    assert "method-title" in page
    assert rooms.picture().splitlines()[-2] in (site / "architecture.html").read_text("utf-8")


def test_picture_of_the_rooms_is_up_to_date():
    have = rooms.PICTURE.read_text(encoding="utf-8")
    assert have == rooms.picture(), "run python docs/_build/rooms.py"


def test_picture_of_the_rooms_shows_all_imports():
    names = rooms.rooms()
    found = {name: set() for name in names}
    graph = grimp.build_graph("patchnetvlad", cache_dir=None)
    for module in graph.modules - DOORS:
        for imported in graph.find_modules_directly_imported_by(module):
            both = [f"{name}.".split(".")[1] for name in (module, imported)]
            if both[0] in found and both[1] in found and both[0] != both[1]:
                found[both[0]].add(both[1])
    assert rooms.imports(names) == found
    picture = rooms.picture()
    for name in names:
        below = ", ".join(sorted(found[name], key=names.index)) or "no other room"
        assert f"<title>{name} imports {below}</title>" in picture


def test_no_file_needs_itself():
    graph = grimp.build_graph("patchnetvlad", exclude_type_checking_imports=True, cache_dir=None)
    needs = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(needs) > 150
    graphlib.TopologicalSorter(needs).prepare()  # CycleError names those of a circle


def test_functions_that_return_errors_end_in_error():
    """``x_error`` returns an error, and what returns none is not called so."""
    checked = 0
    for file in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.FunctionDef) and node.returns:
                returned = ast.unparse(node.returns).strip("'\"")
                is_error = re.fullmatch(r"(\w+\.)*\w*(Error|Exception)", returned) is not None
                assert is_error == node.name.endswith("_error"), f"{file}: {node.name}"
                checked += is_error
    assert checked > 10


def test_picture_of_the_rooms_has_no_arrow_upwards():
    with pytest.raises(ValueError, match="models"):
        rooms.drawing(["matching", "models"], {"matching": set(), "models": {"matching"}})


def test_architecture_names_files_and_functions_that_exist():
    pages = [DOCS / "architecture.md", REPOSITORY / "CONTRIBUTING.md"]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    files = set(re.findall(r"`(\w+(?:/\w+)*/?(?:\.py)?)`", text))
    files = {name for name in files if "/" in name and not name.endswith(("/x.py", "site/"))}
    assert len(files) > 50
    for name in files:
        assert (PACKAGE / name).exists() or (REPOSITORY / name).exists(), name
    steps = re.findall(r"^\|[^|]+\| `(\w[\w/]*\.py)` \| `(\w+)` \|$", text, re.MULTILINE)
    assert len(steps) > 30
    for file, name in steps:
        tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
        assert name in {getattr(node, "name", None) for node in tree.body}, f"{file}: {name}"


def test_architecture_lists_every_room():
    rows = re.findall(r"^\| (`[^|]*`) \|", (DOCS / "architecture.md").read_text("utf-8"), re.M)
    listed = [name for row in rows for name in re.findall(r"`(\w+)(?:/|\.py)`", row)]
    assert sorted(listed) == sorted(rooms.rooms())


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_functions_that_pages_name_exist(page):
    names = re.findall(r"`(patchnetvlad(?:\.\w+)+)`", page.read_text(encoding="utf-8"))
    for name in names:
        parts = name.split(".")
        for i in range(len(parts), 0, -1):
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ModuleNotFoundError:
                continue
            for part in parts[i:]:
                found = getattr(found, part)
            break


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_python_in_pages_can_be_parsed(page):
    for code in re.findall(r"^```python\n(.*?)^```", page.read_text("utf-8"), re.M | re.S):
        ast.parse(code)


def test_five_lines_of_the_first_page_run(tmp_path, monkeypatch):
    import numpy as np
    from PIL import Image

    monkeypatch.chdir(tmp_path)
    (tmp_path / "map").mkdir()
    generator = np.random.default_rng(0)
    for i in (1, 2, 3):
        blocks = generator.integers(0, 255, (9, 12, 3), dtype=np.uint8)
        picture = Image.fromarray(blocks).resize((320, 240), Image.Resampling.BICUBIC)
        picture.save(f"map/{i}.jpg")
    picture.save("query.jpg")
    (code,) = re.findall(
        r"^```python\n(.*?)^```", (DOCS / "index.md").read_text("utf-8"), re.M | re.S
    )
    names: dict[str, object] = {}
    exec(compile(code, "index.md", "exec"), names)
    assert names["answer"].best.key == "map/3.jpg"
    names["index"].close()


def rows_of_configuration():
    text = (DOCS / "configuration.md").read_text(encoding="utf-8")
    for section, table in re.findall(r"^## `\[(\w+)\]`\n(.*?)(?=^## |\Z)", text, re.M | re.S):
        for row in re.findall(r"^\| (`.*?) \| (.*) \|$", table, re.M):
            for key in re.findall(r"`(\w+)`", row[0]):
                yield section, key.lower(), row[1]


def test_every_key_stands_in_its_section_and_no_other():
    documented = [(section, key) for section, key, _ in rows_of_configuration()]
    known = [(section, key) for section, keys in KEYS.items() for key in keys]
    assert sorted(documented) == sorted(known)


def test_defaults_are_those_of_the_configuration():
    default = Config()
    found = 0
    for section, key, text in rows_of_configuration():
        spec = KEYS[section][key]
        if spec.required or "default" not in text:
            continue
        value = getattr(default, spec.field)
        forms = (f"`{value}` (default", f"`{value}`: ", f"default {value}", f"{value} (default")
        assert any(form in text for form in forms), f"{key}: {text}"
        found += 1
    assert found == 13
