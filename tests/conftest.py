# SPDX-License-Identifier: MIT
"""What several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import thin
import torch
from ray_cluster import cluster, scratch, storage  # noqa: F401

from patchnetvlad.cli._output import end_after_ray
from patchnetvlad.models import checkpoint, encoder

REPOSITORY = Path(__file__).resolve().parents[1]
SHARED = REPOSITORY.parent / "shared"
"""Golden vectors, a real data set and its reference results; not part of the repository."""

HOME = "PATCHNETVLAD_HOME"
"""The variable that names the data directory that is looked into first."""

needs_shared = pytest.mark.skipif(
    not SHARED.is_dir(), reason="the reference data beside the repository is absent"
)

DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[
            pytest.mark.cuda,
            pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
        ],
    ),
]
"""Where tests of values compute: ``@pytest.mark.parametrize("device", DEVICES)``."""

# They would be the last to end, while other processes wait.
LONG = ("test_report.py", "test_place_index.py")


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))


_ended: list[int] = []


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session, exitstatus):
    ran = [item for item in session.items if item.get_closest_marker("cluster")]
    if ran and not hasattr(session.config, "workerinput"):  # whose status nobody asks for
        _ended.append(int(exitstatus) or int(session.testsfailed > 0))


@pytest.hookimpl(trylast=True)
def pytest_unconfigure():
    """End at once after tests of Ray, whose threads may die otherwise, as commands do."""
    if _ended:
        end_after_ray(_ended[-1])


@pytest.fixture(autouse=True)
def threads_of_torch():
    """Leave their number to other tests as it was: it decides on rounding."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def thin_home(tmp_path_factory):
    """A data directory with a network of one convolution."""
    home = tmp_path_factory.mktemp("home")
    thin.write_checkpoint(home)
    return home


@pytest.fixture(scope="module")
def thin_network(thin_home):
    """Let configurations that name the shipped checkpoint mean a network of one convolution."""
    before = os.environ.get(HOME)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(HOME, str(thin_home))
        patch.setattr(checkpoint, "build_encoder", thin.build_encoder)
        yield before


@pytest.fixture
def real_network(thin_network, monkeypatch):
    """Let a test load the shipped checkpoint, amid others that do not."""
    monkeypatch.setattr(checkpoint, "build_encoder", encoder.build_encoder)
    if thin_network is None:
        monkeypatch.delenv(HOME)
    else:
        monkeypatch.setenv(HOME, thin_network)
