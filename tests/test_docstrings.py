# SPDX-License-Identifier: MIT
"""Docstrings stand on their own, and their examples run."""

from __future__ import annotations

import doctest
import importlib
import inspect
import pkgutil
import sys

import griffe
import pytest
from conftest import REPOSITORY

import patchnetvlad

sys.path.insert(0, str(REPOSITORY / "docs" / "_build"))
import docstrings

pytestmark = pytest.mark.docs

FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
MODULES = sorted(
    f"{module.name}" for module in pkgutil.walk_packages(patchnetvlad.__path__, "patchnetvlad.")
)
# Functions on plain values, which an example explains best.
WITH_EXAMPLE = (
    "config.Config.load",
    "datasets.image_list.ImageList.read",
    "datasets.ground_truth.GroundTruth.positives",
    "own_data.positions.names.positions_from_names",
    "evaluation.metrics.mean_average_precision_at_n",
    "evaluation.metrics.precision_recall",
    "evaluation.recall.recall_at_n",
    "models.grid.PatchGrid.of_map",
    "models.grid.patch_grids",
    "matching.fusion.fuse_scores",
    "matching.nearest.mutual_nearest_neighbours",
    "matching.ransac.homography_inliers",
    "matching.spatial.spatial_score",
    "places.index.PlaceIndex",
    "places.match.match",
    "places.model.PlaceModel.describe",
    "search.retrieve.retrieve",
)
MOST_IN_A_SENTENCE = 3
"""Parameters that a docstring without a section for them may explain in its sentences."""


@pytest.fixture(scope="module")
def package():
    """Return the package as griffe reads it, without running it."""
    return griffe.load(
        "patchnetvlad",
        search_paths=[REPOSITORY],
        docstring_parser="numpy",
        extensions=griffe.load_extensions(docstrings.Docstrings),
    )


def public(package):
    """Yield modules, classes, functions and methods that have no underscore before their name."""
    for member in package.members.values():
        if member.is_alias or member.name.startswith("_"):
            continue
        if member.is_module or member.is_class:
            yield member
            yield from public(member)
        elif member.is_function:
            yield member


def sections(thing):
    return {section.kind.value: section.value for section in thing.docstring.parsed}


def parameters(function):
    return [p.name for p in function.parameters if p.name not in ("self", "cls")]


def test_everything_public_has_a_docstring(package):
    found = list(public(package))
    assert len(found) > 400
    assert not [thing.path for thing in found if not thing.has_docstring]


def test_the_first_line_is_a_sentence(package):
    for thing in public(package):
        summary = thing.docstring.value.split("\n\n")[0]
        assert summary.endswith("."), thing.path
        assert "\n" not in summary, thing.path


def test_parameters_are_those_of_the_signature(package):
    wrong = []
    for thing in public(package):
        if not thing.is_function or "parameters" not in sections(thing):
            continue
        have = [p.name.lstrip("*") for p in sections(thing)["parameters"]]
        if sorted(have) != sorted(parameters(thing)):
            wrong.append(f"{thing.path}: {have}")
    assert not wrong


def test_no_function_leaves_many_parameters_unexplained(package):
    """A sentence explains a few; of more it says where they are explained."""
    wrong = []
    for thing in public(package):
        if not thing.is_function or "parameters" in sections(thing):
            continue
        refers = "<autoref" in thing.docstring.value  # to what has the section
        if len(parameters(thing)) > MOST_IN_A_SENTENCE and not refers:
            wrong.append(thing.path)
    assert not wrong


def test_what_is_returned_is_said(package):
    """Of functions that have sections at all."""
    wrong = []
    for thing in public(package):
        if not thing.is_function or "parameters" not in sections(thing) or thing.returns is None:
            continue
        nothing = str(thing.returns) in ("None", "NoReturn")
        if not nothing and not {"returns", "yields"} & set(sections(thing)):
            wrong.append(thing.path)
    assert not wrong


@pytest.mark.parametrize("name", patchnetvlad.__all__)
def test_names_of_the_package_stand_on_their_own(name, package):
    """Each parameter, each field and what is returned has its entry, with a type."""
    thing = package[name]
    thing = thing.final_target if thing.is_alias else thing
    has = sections(thing)
    if thing.is_function:
        assert [p.name for p in has.get("parameters", [])] == parameters(thing)
        assert "raises" in has
        assert "returns" in has or str(thing.returns) == "None"
        for parameter in has["parameters"]:
            assert parameter.annotation, parameter.name
    elif not issubclass(getattr(patchnetvlad, name), Exception):
        fields = [*has.get("attributes", []), *has.get("parameters", [])]
        named = {field.name for field in fields}
        expected = inspect.signature(getattr(patchnetvlad, name)).parameters
        assert {field for field in expected if not field.startswith("_")} <= named
    assert inspect.getdoc(getattr(patchnetvlad, name)) == inspect.cleandoc(
        getattr(patchnetvlad, name).__doc__
    )


def test_help_of_the_package_names_what_it_has():
    text = patchnetvlad.__doc__
    for name in ("load_model", "match", "PlaceIndex", "extract", "rerank", "evaluate"):
        assert f"``{name}``" in text
    assert set(patchnetvlad.__all__) <= set(dir(patchnetvlad))


@pytest.mark.parametrize("name", WITH_EXAMPLE)
def test_has_an_example(name, package):
    assert ">>> " in package[name].docstring.value


@pytest.mark.parametrize("name", ["patchnetvlad", *MODULES])
def test_examples_run(name):
    if name.endswith("__main__"):
        return
    module = importlib.import_module(name)
    finder = doctest.DocTestFinder(exclude_empty=True)
    runner = doctest.DocTestRunner(optionflags=FLAGS)
    said: list[str] = []
    for test in finder.find(module, name):
        if test.examples:
            runner.run(test, out=said.append)
    assert runner.failures == 0, "".join(said)


def test_examples_are_found():
    finder = doctest.DocTestFinder()
    modules = [importlib.import_module(name) for name in MODULES]
    with_examples = [test for module in modules for test in finder.find(module) if test.examples]
    assert len(with_examples) >= len(WITH_EXAMPLE)
