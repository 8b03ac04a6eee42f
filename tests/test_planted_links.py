# SPDX-License-Identifier: MIT
"""Links that somebody planted where files are written: no writer changes what they lead to."""

import contextlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from test_store_cli import write

from patchnetvlad.base import files
from patchnetvlad.engines.journal import Journal
from patchnetvlad.errors import PatchNetVLADError
from patchnetvlad.features.convert import convert_features
from patchnetvlad.live.outputs import VideoWriter
from patchnetvlad.models.checkpoint import save_safetensors
from patchnetvlad.search.growing import GrowingIndex

pytestmark = pytest.mark.skipif(os.name != "posix", reason="links of POSIX systems")

MINE = b"somebody else's file\n"


def store(folder):
    write(folder / "f", "float16")


def npy_files(folder):
    write(folder / "f", "npy")


def hdf5(folder):
    convert_features(folder / "source", folder / "f.h5", "hdf5", progress=False)


def video(folder):
    with contextlib.closing(VideoWriter(folder / "v.avi", 10)) as writer:
        writer.write(np.zeros((32, 32, 3), np.uint8))


def journal(folder):
    Journal(folder / "a.journal", (3, 2)).close()


def faiss(folder):
    index = GrowingIndex(4, "HNSW4", "")
    index.add(np.eye(4, dtype=np.float32))
    index.save(folder / "places.faiss", np.arange(4, dtype=np.uint32))


def weights(folder):
    save_safetensors({"a": torch.zeros(3)}, folder / "a.safetensors")


def text(folder):
    files.replace_text(folder / "a.txt", ["a\n"])


WRITERS = [store, npy_files, hdf5, video, journal, faiss, weights, text]


def foretold(folder, monkeypatch, work):
    """Run a writer; return the names, below the folder, that it opens, replaces or leaves."""
    folder.mkdir()
    if work is hdf5:
        write(folder / "source", "float32")
    names = set()
    with monkeypatch.context() as patch:
        for name in ("open", "replace", "unlink"):
            call = getattr(os, name)

            def note(path, *rest, call=call, **keywords):
                names.add(os.fspath(path) if not isinstance(path, int) else "")
                return call(path, *rest, **keywords)

            patch.setattr(os, name, note)
        work(folder)
    names |= {str(file) for file in folder.rglob("*") if file.is_file()}
    below = {Path(name).relative_to(folder) for name in names if name.startswith(f"{folder}/")}
    return {path for path in below if path.parts[0] != "source"}


@pytest.mark.parametrize("work", WRITERS)
def test_nothing_is_written_through_them(tmp_path, monkeypatch, work):
    """One link a run, under each name that two earlier runs gave, and under usual ones."""
    names = foretold(tmp_path / "a", monkeypatch, work) & foretold(
        tmp_path / "b", monkeypatch, work
    )
    for path in list(names):
        names |= {path.with_name(f"{path.name}{end}") for end in (".part", ".part-journal")}
        names |= {path.with_name(f"{path.stem}.part{path.suffix}")}
    if work is text:  # what is linked on purpose is replaced
        names.remove(Path("a.txt"))
    assert names
    for i, path in enumerate(sorted(names)):
        folder, victim = tmp_path / str(i), tmp_path / f"victim-{i}"
        link = folder / path
        link.parent.mkdir(parents=True)
        if work is hdf5:
            write(folder / "source", "float32")
        victim.write_bytes(MINE)
        link.symlink_to(victim)
        with contextlib.suppress(PatchNetVLADError):  # to refuse is right, too
            work(folder)
        assert victim.read_bytes() == MINE, path


def test_leftovers_of_killed_processes_go(tmp_path):
    left = []

    def killed(target):
        with files.new_file(target) as temporary:
            temporary.write_bytes(b"half")
            os.kill(os.getpid(), 9)

    for name in ("a.txt", "b.txt"):
        pid = os.fork()
        if pid == 0:
            killed(tmp_path / name)
        os.waitpid(pid, 0)
        left += [file.name for file in tmp_path.iterdir()]
    assert len(set(left)) == 2  # the second took that of the first away
    with files.new_file(tmp_path / "c.txt") as ours:  # which is in use
        files.replace_text(tmp_path / "d.txt", ["d\n"])
        assert {file.name for file in tmp_path.iterdir()} == {"d.txt", ours.name}
    assert {file.name for file in tmp_path.iterdir()} == {"c.txt", "d.txt"}


def test_names_differ_each_time(tmp_path):
    names = set()
    for _ in range(2):
        with files.new_file(tmp_path / "a") as temporary:
            names.add(temporary.name)
    assert len(names) == 2
