# SPDX-License-Identifier: MIT
"""A few seconds of the fuzzer: broken files end in errors of this package, and in nothing else."""

from __future__ import annotations

import pickle

import fuzz_api
import numpy as np
import pytest
from fuzz import TARGETS, UNPICKLED, Target, Trap, fuzz, try_file
from hypothesis import strategies as st

from patchnetvlad.errors import PatchNetVLADError

FEWER = {"mat": 10, "store": 30, "json": 60, "journal": 60}


@pytest.fixture(scope="module", autouse=True)
def threads_of_the_index():
    """End those of the index that calls share: other tests count theirs."""
    yield
    if fuzz_api.index.cache_info().currsize:
        fuzz_api.index().close()
        fuzz_api.index.cache_clear()


@pytest.mark.parametrize("name", TARGETS)
def test_parsers(name):
    # What is drawn depends on which modules are loaded, so not many can be asked for.
    # A .mat costs a process, a store many files. `python tests/fuzz.py --target mat` feeds as many
    # as one likes.
    counts = fuzz(TARGETS[name], start=0, examples=FEWER.get(name, 300))
    assert counts[True] > 0  # files that it never gets past the door with would show nothing
    assert counts[False] > 0 or name == "journal"  # a damaged one is begun anew


class LongError(PatchNetVLADError):
    """An error whose message is not shortened."""

    __str__ = Exception.__str__


class TestTheFuzzerItself:
    def test_it_counts(self):
        def read(path):
            if path.read_bytes():
                raise PatchNetVLADError(f"{path} is not empty")

        assert fuzz(Target(st.just(b""), ".bin", read), 0, 20) == {True: 1}
        counts = fuzz(Target(st.binary(max_size=2), ".bin", read), 0, 50)
        assert counts[True] + counts[False] == 50
        assert counts[False] > 5

    @pytest.mark.parametrize(
        "error",
        [
            ValueError("file.bin"),
            PatchNetVLADError("no name"),
            LongError("file.bin\n\n"),
            LongError("file.bin" + "x" * 5000),
        ],
        ids=["another", "nameless", "lines", "long"],
    )
    def test_it_sees_what_is_wrong(self, tmp_path, error):
        def read(path):
            raise error

        with pytest.raises((ValueError, AssertionError)):
            try_file(Target(st.binary(), ".bin", read), tmp_path / "file.bin", b"")

    def test_it_sees_what_is_unpickled(self, tmp_path, monkeypatch):
        def read(path):
            np.load(path, allow_pickle=True)

        monkeypatch.setenv(UNPICKLED, "")
        monkeypatch.delenv(UNPICKLED)
        with pytest.raises(AssertionError, match="a pickle was read"):
            try_file(Target(st.binary(), ".npy", read), tmp_path / "file.npy", pickle.dumps(Trap()))
