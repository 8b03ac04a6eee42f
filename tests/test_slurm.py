# SPDX-License-Identifier: MIT
"""The scripts for SLURM, with stand-ins for ``srun`` and ``scontrol`` on this machine."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import thin
from conftest import REPOSITORY
from place_data import write_ini, write_list, write_pictures

from patchnetvlad import extract
from patchnetvlad.cli import store
from patchnetvlad.features.store.index import StoreIndex
from patchnetvlad.features.store.records import read_record

SCRIPTS = REPOSITORY / "examples" / "slurm"
COUNT = 9
# Notes which node a command is for, and runs it here.
SRUN = """#!/bin/sh
while [ "${1#--}" != "$1" ]; do
    case $1 in --nodelist=*) node=${1#--nodelist=} ;; esac
    shift
done
echo "$node: $*" >>"$NOTES"
exec "$@"
"""
SCONTROL = """#!/bin/sh
[ "$1 $2 $3" = "show hostnames node[1-2]" ] && printf 'node1\\nnode2\\n'
"""

pytestmark = [
    pytest.mark.usefixtures("thin_network"),
    pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash"),
]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, their list, and what one process makes of them."""
    folder = tmp_path_factory.mktemp("slurm")
    names = [f"{i}.png" for i in range(COUNT)]
    write_pictures(folder, names)
    write_list(folder / "query.txt", names[::4])
    write_ini(folder / "small.ini", n_values="1,5")
    extract(
        folder / "small.ini", folder / "index.txt", folder, folder / "alone", device="cpu",
        progress=False,
    )  # fmt: skip
    return folder


@pytest.fixture
def job(world, tmp_path):
    """The environment of a job, with the commands of this repository."""
    (tmp_path / "bin").mkdir()
    for name, text in (("srun", SRUN), ("scontrol", SCONTROL)):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    for name in ("feature-extract", "feature-match"):
        command = tmp_path / "bin" / f"patchnetvlad-{name}"
        words = thin.command(f"patchnetvlad.cli.{name.replace('-', '_')}")
        command.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@"\n')
        command.chmod(0o755)
    clean = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    folders = [tmp_path / "bin", Path(sys.executable).parent, os.environ["PATH"]]
    return clean | {
        "PATH": os.pathsep.join(map(str, folders)),
        "PYTHONPATH": str(REPOSITORY),
        "NOTES": str(tmp_path / "notes"),
        "CUDA_VISIBLE_DEVICES": "",
        "SLURM_JOB_ID": str(os.getpid()),
        "SLURM_CPUS_PER_TASK": "1",
        "CONFIG": str(world / "small.ini"),
        "IMAGES": str(world),
        "FEATURES": str(tmp_path / "features"),
    }


def run(script, job, *words, **more):
    return subprocess.run(
        ["bash", SCRIPTS / script, *map(str, words)],
        env=job | more,
        capture_output=True,
        text=True,
    )


def features(folder):
    """All that a store holds, by the names of its images."""
    with contextlib.closing(StoreIndex(folder)) as index:
        return {
            name: bytes(read_record(folder, record, name))
            for name, record in index.records().items()
        }


def share(job, i, count, **more):
    array = {"ID": i, "COUNT": count, "MIN": 0, "MAX": count - 1} | more
    return {f"SLURM_ARRAY_TASK_{key}": str(value) for key, value in array.items()}


@pytest.mark.parametrize("script", sorted(SCRIPTS.glob("*.sbatch")), ids=lambda path: path.stem)
def test_bash_reads_it(script):
    subprocess.run(["bash", "-n", script], check=True)
    lines = script.read_text(encoding="utf-8").splitlines()
    # SLURM takes no options after the first command.
    first = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert all(i < first for i, line in enumerate(lines) if line.startswith("#SBATCH"))


class TestShards:
    def test_two_jobs_and_a_merge(self, world, job, tmp_path):
        lists = {"LIST": str(world / "index.txt")}
        for i in (1, 0):
            done = run("shards.sbatch", job, **lists, **share(job, i, 2))
            assert done.returncode == 0, done.stderr
            assert f"Done with share {i}/2" in done.stdout
        assert store.main(["merge", job["FEATURES"]]) == 0
        assert features(tmp_path / "features") == features(world / "alone")
        whole = (world / "alone" / "globalfeats.npy").read_bytes()
        assert (tmp_path / "features" / "globalfeats.npy").read_bytes() == whole

    def test_some_jobs_again(self, world, job, tmp_path):
        """The array says nothing of their number then."""
        job = job | {"LIST": str(world / "index.txt")}
        some = share(job, 1, 1, MIN=1, MAX=1)
        refused = run("shards.sbatch", job, **some)
        assert refused.returncode == 2
        assert "SHARES=N" in refused.stderr
        assert not (tmp_path / "features").exists()
        done = run("shards.sbatch", job, **some, SHARES="3")
        assert done.returncode == 0, done.stderr
        assert (tmp_path / "features/shards/1-of-3/features-share.json").is_file()

    def test_what_is_missing_is_said(self, job):
        refused = run("shards.sbatch", job, **share(job, 0, 1))
        assert refused.returncode != 0
        assert "LIST: " in refused.stderr


def mine(word):
    """Processes whose command line holds a word."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if word in (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode():
                found.append(entry.name)
    return found


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/cmdline").is_file(), reason="looks at processes")
class TestRayCluster:
    @pytest.fixture
    def job(self, world, job, tmp_path):
        pytest.importorskip("ray")
        return job | {
            "QUERIES": str(world / "query.txt"),
            "INDEX": str(world / "index.txt"),
            "RESULTS": str(tmp_path / "results"),
            "RAY_START_OPTIONS": "--object-store-memory=100000000",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_CPUS_ON_NODE": "64",
        }

    def test_two_nodes(self, world, job, tmp_path):
        done = run("ray_cluster.sbatch", job, "--export", "csv")
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.count(": 2 nodes, 2 CPUs, 0 GPUs") == 3
        rows = np.load(tmp_path / "features/index/globalfeats.npy")
        np.testing.assert_allclose(rows, np.load(world / "alone/globalfeats.npy"), atol=1e-5)
        assert (tmp_path / "results/PatchNetVLAD_candidates.csv").is_file()
        pairs = (tmp_path / "results/PatchNetVLAD_predictions.txt").read_text().splitlines()[2:]
        assert pairs[::5] == [f"{i}.png, {i}.png" for i in range(0, COUNT, 4)]

        notes = (tmp_path / "notes").read_text().splitlines()
        assert [note.partition(": ")[0] for note in notes] == ["node1", "node2"] * 2
        assert "--head" in notes[0]
        assert "--address=" in notes[1]
        assert mine(f"ray-{job['SLURM_JOB_ID']}/") == []  # all has ended
        assert not Path(f"/tmp/ray-{job['SLURM_JOB_ID']}").exists()

    def test_cancelled(self, job):
        """SLURM asks all to end; nothing of Ray stays."""
        script = subprocess.Popen(
            ["bash", SCRIPTS / "ray_cluster.sbatch"],
            env=job,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        word = f"ray-{job['SLURM_JOB_ID']}/"
        deadline = time.monotonic() + 120
        while not mine(word) and time.monotonic() < deadline:
            time.sleep(0.2)
        assert mine(word)
        script.send_signal(signal.SIGTERM)
        assert script.wait(timeout=120) == 143
        assert mine(word) == []
