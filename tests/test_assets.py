# SPDX-License-Identifier: MIT
"""Assets: look-up, wheels through pip, checkpoints from a hub that a loopback server plays."""

from __future__ import annotations

import errno
import hashlib
import os
import random
import re
import shutil
import socket
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub.constants
import huggingface_hub.file_download
import numpy as np
import pytest

from patchnetvlad.assets import catalog, checkpoints, data_files, folders, wheels
from patchnetvlad.cli import download_data, download_models
from patchnetvlad.errors import AssetError, GroundTruthError, ImageListError

NAME, HUB_NAME = "pittsburgh_WPCA128.pth.tar", "pitts_WPCA128.pth.tar"
BODY = random.Random(0).randbytes(3_000_000)
BREAK_AT = 1_000_000


def patch_hub(monkeypatch: pytest.MonkeyPatch, name: str, value: object) -> None:
    """Set a constant of the hub library, of which older releases keep a second copy."""
    monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setattr(huggingface_hub.file_download, name, value, raising=False)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data directory, and nothing to be found anywhere else."""
    monkeypatch.setattr(folders, "PACKAGE_DIR", tmp_path / "package")
    monkeypatch.setenv("PATCHNETVLAD_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    patch_hub(monkeypatch, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "home"


def put(path: Path, content: bytes = b"x") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def everything_under(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


# Directories -----------------------------------------------------------------------------------


def test_data_home_prefers_the_variable_then_the_package_then_the_cache(home, monkeypatch):
    assert folders.data_home() == home
    monkeypatch.delenv("PATCHNETVLAD_HOME")
    folders.PACKAGE_DIR.mkdir()
    assert folders.data_home() == folders.PACKAGE_DIR
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert folders.data_home() == home.parent / "cache" / "patchnetvlad"
    assert folders.data_dirs() == [folders.PACKAGE_DIR, home.parent / "cache" / "patchnetvlad"]


# Lists and ground truth ------------------------------------------------------------------------


@pytest.fixture
def no_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(wheel: wheels.Wheel, folder: Path) -> Path:
        pytest.fail(f"{wheel.requirement} was asked for")

    monkeypatch.setattr(wheels, "_pip_download", refuse)


@pytest.mark.usefixtures("no_pip")
def test_a_file_wins_over_a_known_name(home):
    name = "pitts30k_imageNames_index.txt"
    fetched = put(home / catalog.LISTS / name)
    assert data_files.resolve_image_list(name) == fetched
    own = put(Path(name))
    assert data_files.resolve_image_list(name) == own


@pytest.mark.usefixtures("no_pip")
@pytest.mark.parametrize("place", ["home", "package", "cache"])
def test_the_ways_to_name_a_list(home, place):
    base = {"home": home, "package": folders.PACKAGE_DIR, "cache": folders.data_dirs()[-1]}[place]
    mine = put(base / "dataset_imagenames" / "mine.txt")
    in_package = folders.PACKAGE_DIR / "dataset_imagenames" / "mine.txt"
    for spelling in ("mine.txt", "dataset_imagenames/mine.txt", "./dataset_imagenames/mine.txt"):
        assert data_files.resolve_image_list(spelling) == mine
    assert data_files.resolve_image_list(in_package) == mine


@pytest.mark.usefixtures("home", "no_pip")
def test_unknown_names_are_named_with_their_neighbours():
    with pytest.raises(ImageListError, match=r"pits30k_imageNames_index\.txt") as caught:
        data_files.resolve_image_list("pits30k_imageNames_index.txt")
    assert " pitts30k_imageNames_index.txt" in str(caught.value)
    with pytest.raises(ImageListError, match=r"(?s)\bzzz\b.*\btokyo247_imageNames_query\.txt"):
        data_files.resolve_image_list("zzz")
    with pytest.raises(GroundTruthError, match=r"pitts30k\.npz.*\n.*pitts30k_test\.npz"):
        data_files.resolve_ground_truth("pitts30k.npz")
    with pytest.raises(ImageListError, match=r"elsewhere/pitts30k_imageNames_index\.txt"):
        data_files.resolve_image_list("/elsewhere/pitts30k_imageNames_index.txt")
    with pytest.raises(AssetError, match=r"tokyo_db\.png"):
        data_files.example_image("tokyo_db.jpg")


# Wheels through pip ----------------------------------------------------------------------------


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all that pip can see."""
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    (tmp_path / "index").mkdir()
    return tmp_path / "index"


def build_wheel(folder: Path, files: dict[str, bytes]) -> str:
    """Write patchnetvlad-0.1.8 with these files and return its hash."""
    info = "patchnetvlad-0.1.8.dist-info"
    about = {
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: patchnetvlad\nVersion: 0.1.8\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        f"{info}/RECORD": b"",
    }
    path = folder / "patchnetvlad-0.1.8-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in (files | about).items():
            archive.writestr(name, content)
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture
def wheel(index: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A small wheel in place of the published one; gives the content of its data files."""
    content = {
        member: f"{member}\nno newline at the end".encode()
        for member in wheels.DATA_WHEEL.members.values()
    }
    digest = build_wheel(index, content | {"patchnetvlad/code.py": b"raise SystemExit"})
    pinned = wheels.Wheel("patchnetvlad==0.1.8", digest, wheels.DATA_WHEEL.members)
    monkeypatch.setattr(wheels, "DATA_WHEEL", pinned)
    monkeypatch.setattr(data_files, "DATA_WHEEL", pinned)
    return content


def test_first_use_fetches_the_data_files_and_nothing_else(home, wheel, caplog):
    caplog.set_level("INFO", "patchnetvlad")
    found = data_files.resolve_image_list("dataset_imagenames/example_imageNames_index.txt")
    assert found == home / "dataset_imagenames" / "example_imageNames_index.txt"
    for local, member in wheels.DATA_WHEEL.members.items():
        assert (home / local).read_bytes() == wheel[member]
    assert len(everything_under(home)) == len(wheel) == 17
    assert str(home) in caplog.text
    assert {path.name for path in home.iterdir()} == {"dataset_imagenames"} | {
        "dataset_gt_files",
        "example_images",
    }


@pytest.mark.usefixtures("wheel")
def test_what_is_there_is_neither_fetched_nor_touched(home, index, monkeypatch):
    own = put(home / catalog.LISTS / "pitts30k_imageNames_index.txt", b"edited")
    paths = data_files.fetch_data()
    assert own in paths
    assert own.read_bytes() == b"edited"
    shutil.rmtree(index)
    assert data_files.fetch_data() == paths
    assert data_files.resolve_ground_truth("tokyo247.npz").is_relative_to(home)
    assert data_files.example_image("tokyo_db.png").is_relative_to(home)


def assert_fails(home: Path, *patterns: str) -> None:
    with pytest.raises(AssetError) as caught:
        data_files.fetch_data()
    text = str(caught.value)
    assert len(text.splitlines()) <= 2
    assert len(text) < 600
    for pattern in patterns:
        assert re.search(pattern, text), text
    assert everything_under(home) == []


@pytest.mark.usefixtures("index")
def test_pip_does_not_have_it(home):
    assert_fails(home, r"patchnetvlad==0\.1\.8", "no package index", "patchnetvlad-download-data")


@pytest.mark.usefixtures("index")
def test_pip_reaches_nothing(home, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    assert_fails(home, "no package index", "patchnetvlad-download-data", "PATCHNETVLAD_HOME")


def test_pip_refuses_another_hash(home, index):
    build_wheel(index, {"patchnetvlad/dataset_imagenames/example_imageNames_index.txt": b"evil"})
    assert_fails(home, r"patchnetvlad==0\.1\.8", "hash")


def test_another_hash_is_refused_even_if_pip_lets_it_pass(home, index, monkeypatch):
    build_wheel(index, {})

    def lax_pip(words: list[str], **options: object) -> subprocess.CompletedProcess[str]:
        shutil.copy(next(index.iterdir()), words[words.index("--dest") + 1])
        return subprocess.CompletedProcess(words, 0, "", "")

    monkeypatch.setattr(subprocess, "run", lax_pip)
    assert_fails(home, r"patchnetvlad-0\.1\.8-py3-none-any\.whl", "hash")


@pytest.mark.usefixtures("index")
def test_python_without_pip(home, tmp_path, monkeypatch):
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec "{os.path.realpath(sys.executable)}" -S -I "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(bare))
    assert_fails(home, "python -m ensurepip")


def test_nothing_in_the_current_folder_is_run(home, wheel, tmp_path, monkeypatch):
    for name in ("pip.py", "random.py"):
        (tmp_path / name).write_text("open('ran', 'w').close()")
    monkeypatch.chdir(tmp_path)
    assert data_files.resolve_image_list(catalog.IMAGE_LISTS[0]).is_file()
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    ("stderr", "reason"),
    [
        ("ERROR: Could not install: [Errno 28] No space left on device", "no space left"),
        ("WARNING: hm\nERROR: one\nERROR: the last one\n", "the last one"),
        ("Traceback\n  odd\nValueError: odd\n", "ValueError: odd"),
        ("", "pip said nothing"),
    ],
)
def test_reasons_of_pip(stderr, reason):
    assert reason in wheels._pip_reason(stderr)


@pytest.mark.usefixtures("wheel")
def test_a_full_disk_leaves_no_partial_file(home, monkeypatch):
    def full(source: object, target: object, length: int = 0) -> None:
        target.write(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfileobj", full)
    assert_fails(home, "No space left", re.escape(str(home)), "PATCHNETVLAD_HOME")


@pytest.mark.parametrize("local", ["../evil.txt", "a/../../evil.txt", "/evil.txt"])
def test_nothing_leaves_the_data_directory(home, index, monkeypatch, local):
    digest = build_wheel(index, {"m": b"evil"})
    monkeypatch.setattr(
        wheels, "DATA_WHEEL", wheels.Wheel("patchnetvlad==0.1.8", digest, {local: "m"})
    )
    monkeypatch.setattr(
        data_files, "DATA_WHEEL", wheels.Wheel("patchnetvlad==0.1.8", digest, {local: "m"})
    )
    assert_fails(home, re.escape(f" {local}, "), re.escape(str(home)))
    assert not list(home.parent.rglob("evil.txt"))


def test_a_member_that_is_not_there(home, index, monkeypatch):
    digest = build_wheel(index, {})
    monkeypatch.setattr(
        wheels, "DATA_WHEEL", wheels.Wheel("patchnetvlad==0.1.8", digest, {"a.txt": "gone.txt"})
    )
    monkeypatch.setattr(
        data_files, "DATA_WHEEL", wheels.Wheel("patchnetvlad==0.1.8", digest, {"a.txt": "gone.txt"})
    )
    assert_fails(home, r"patchnetvlad-0\.1\.8-py3-none-any\.whl .*gone\.txt")


def test_several_processes_fetch_at_once(home, wheel):
    code = (
        "from patchnetvlad.assets import data_files, folders, wheels; from pathlib import Path\n"
        f"folders.PACKAGE_DIR = Path({str(folders.PACKAGE_DIR)!r})\n"
        f"wheels.DATA_WHEEL = data_files.DATA_WHEEL = wheels.Wheel('patchnetvlad==0.1.8', "
        f"{wheels.DATA_WHEEL.sha256!r}, "
        f"{dict(wheels.DATA_WHEEL.members)!r})\n"
        "print(len(data_files.fetch_data()))"
    )
    root = str(Path(__file__).parents[1])
    runs = [
        subprocess.Popen([sys.executable, "-c", code], cwd=root, stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["17"] * 3
    for local, member in wheels.DATA_WHEEL.members.items():
        assert (home / local).read_bytes() == wheel[member]
    assert len(everything_under(home)) == 17


# A hub on this machine -------------------------------------------------------------------------


def closed_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return sock.getsockname()[1]


class Hub:
    """The hub's HEAD and GET of one file: GET is redirected to another host, as for large files.

    `breaks` says how often a body ends early, and `reset` whether it ends in a TCP reset;
    `dead` answers 503 once the first body broke.
    """

    def __init__(self) -> None:
        self.body, self.digest = BODY, hashlib.sha256(BODY).hexdigest()
        self.breaks, self.reset, self.dead, self.ranges_work = 0, False, False, True
        self.requests: list[tuple[str, str]] = []
        self.ranges: list[str | None] = []
        self.cdn_tokens: list[str | None] = []
        self.watch: Callable[[], None] = lambda: None
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *words: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        self.endpoint = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()

    def answer(self, request: BaseHTTPRequestHandler) -> None:
        self.requests.append((request.command, request.path))
        self.watch()

        def head(status: int, **headers: object) -> None:
            request.send_response(status)
            for name, value in headers.items():
                request.send_header(name.replace("_", "-"), str(value))
            request.end_headers()

        if HUB_NAME not in request.path:
            head(404, Content_Length=0, X_Error_Code="EntryNotFound")
        elif request.command == "HEAD":
            about = {"X_Repo_Commit": "c" * 40, "X_Linked_Etag": f'"{self.digest}"'}
            head(200, ETag='"other"', Content_Length=len(self.body), **about)
        elif not request.path.startswith("/cdn/"):
            where = f"http://localhost:{self.port}/cdn/{HUB_NAME}"
            head(302, Location=where, Content_Length=0)
        else:
            self.send_body(request, head)

    def send_body(self, request: BaseHTTPRequestHandler, head: Callable[..., None]) -> None:
        wanted = request.headers.get("Range")
        self.ranges.append(wanted)
        self.cdn_tokens.append(request.headers.get("Authorization"))
        if self.dead and len(self.ranges) > 1:
            return head(503, Content_Length=0)
        start = 0
        if wanted and self.ranges_work:
            start = int(re.fullmatch(r"bytes=(\d+)-", wanted)[1])
            spread = f"bytes {start}-{len(self.body) - 1}/{len(self.body)}"
            head(206, Content_Length=len(self.body) - start, Content_Range=spread)
        else:
            head(200, Content_Length=len(self.body), Accept_Ranges="bytes")
        if self.breaks:
            self.breaks -= 1
            request.wfile.write(self.body[start : start + BREAK_AT])
            request.wfile.flush()
            if self.reset:
                linger = struct.pack("ii", 1, 0)
                request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            request.close_connection = True
        else:
            request.wfile.write(self.body[start:])


@pytest.fixture
def hub(home: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    hub = Hub()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    # What the library writes at a time; it is more than the whole of our small file otherwise.
    patch_hub(monkeypatch, "DOWNLOAD_CHUNK_SIZE", BREAK_AT // 10)
    yield hub
    hub.server.shutdown()
    hub.server.server_close()


def test_only_the_checkpoint_that_is_needed_is_downloaded(home, hub, caplog):
    caplog.set_level("INFO", "patchnetvlad")
    path = checkpoints.resolve_checkpoint("./pretrained_models/pittsburgh_WPCA", 128)
    assert path == home / "pretrained_models" / NAME
    assert path.read_bytes() == BODY
    assert everything_under(home) == [path]
    assert {HUB_NAME in requested for _, requested in hub.requests} == {True}
    assert hub.cdn_tokens == [None], "the token went to another host"
    assert f"{NAME} (3 MB), revision {'c' * 40} of " in caplog.text
    assert f"to {path.parent}" in caplog.text

    seen = len(hub.requests)
    assert checkpoints.resolve_checkpoint("./pretrained_models/pittsburgh_WPCA", 128) == path
    assert checkpoints.download_checkpoint("pittsburgh_WPCA128") == path
    assert len(hub.requests) == seen


@pytest.mark.parametrize("reset", [False, True])
def test_a_dropped_connection_is_resumed(home, hub, reset):
    target = home / "pretrained_models" / NAME
    seen_early = []
    hub.watch = lambda: seen_early.append(target.exists())
    hub.breaks, hub.reset = 1, reset
    assert checkpoints.download_checkpoint(NAME).read_bytes() == BODY
    assert seen_early == [False] * len(hub.requests)
    assert len(hub.ranges) == 2
    # After a reset the operating system may have thrown away the last bytes that arrived.
    assert reset or hub.ranges == [None, f"bytes={BREAK_AT}-"]
    assert everything_under(home) == [target]


def test_a_later_call_goes_on_where_an_earlier_one_broke(home, hub):
    hub.breaks, hub.dead = 1, True
    with pytest.raises(AssetError, match=r"pitts_WPCA128\.pth\.tar.*503"):
        checkpoints.download_checkpoint(NAME)
    target = home / "pretrained_models" / NAME
    assert not target.exists()
    assert [path.stat().st_size for path in home.rglob("*.part")] == [BREAK_AT]

    hub.dead, before = False, len(hub.ranges)
    assert checkpoints.download_checkpoint(NAME) == target
    assert target.read_bytes() == BODY
    assert hub.ranges[before:] == [f"bytes={BREAK_AT}-"]
    assert everything_under(home) == [target]


def test_a_hub_that_ignores_ranges(home, hub):
    hub.breaks, hub.ranges_work = 1, False
    assert checkpoints.download_checkpoint(NAME).read_bytes() == BODY


def assert_by_hand(caught: pytest.ExceptionInfo[AssetError], home: Path, endpoint: str) -> None:
    """The message says in two lines where to get the file, and where to put it."""
    text = str(caught.value)
    assert len(text.splitlines()) == 2
    assert f"{endpoint}/TobiasRobotics/Patch-NetVLAD/resolve/main/{HUB_NAME} " in text
    assert f" {home / 'pretrained_models' / NAME}" in text
    assert "HF_ENDPOINT" in text
    assert everything_under(home) == []


def test_a_damaged_body(home, hub):
    hub.body = BODY[:-1] + bytes([BODY[-1] ^ 1])
    with pytest.raises(AssetError, match="sha256") as caught:
        checkpoints.download_checkpoint(NAME)
    assert_by_hand(caught, home, hub.endpoint)


def test_not_on_the_hub(home, hub):
    with pytest.raises(AssetError, match=r"mapillary_WPCA512\.pth\.tar.*404"):
        checkpoints.download_checkpoint("mapillary_WPCA512")
    assert everything_under(home) == []


def test_unreachable(home, hub, monkeypatch):
    endpoint = f"http://127.0.0.1:{closed_port()}"
    monkeypatch.setenv("HF_ENDPOINT", endpoint + "/")
    with pytest.raises(AssetError) as caught:
        checkpoints.download_checkpoint(NAME)
    assert_by_hand(caught, home, endpoint)


def test_offline(home, hub, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(AssetError, match="HF_HUB_OFFLINE") as caught:
        checkpoints.download_checkpoint(NAME)
    assert_by_hand(caught, home, hub.endpoint)
    assert hub.requests == []


def test_a_revision_of_the_hub_can_be_asked_for(home, hub, monkeypatch):
    monkeypatch.setenv("PATCHNETVLAD_HUB_REVISION", "d" * 40)
    assert checkpoints.download_checkpoint(NAME).read_bytes() == BODY
    assert f"/resolve/{'d' * 40}/" in hub.requests[0][1]


def test_the_cache_of_the_hub_is_used_as_it_is(hub, tmp_path):
    snapshot = tmp_path / "hub" / "models--TobiasRobotics--Patch-NetVLAD" / "snapshots" / "c0ffee"
    cached = put(snapshot / HUB_NAME)
    put(snapshot.parents[1] / "refs" / "main", b"c0ffee")
    assert checkpoints.download_checkpoint(NAME) == cached
    assert hub.requests == []


def test_a_full_disk_is_noticed_before_and_during(home, hub, monkeypatch):
    usage = shutil.disk_usage(home.parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2_000_000))
    with pytest.raises(AssetError, match=rf"{NAME} .*3 MB.*2 MB.*PATCHNETVLAD_HOME") as caught:
        checkpoints.download_checkpoint(NAME)
    assert str(home) in str(caught.value)
    assert hub.ranges == []

    def full(*words: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.undo()
    monkeypatch.setenv("PATCHNETVLAD_HOME", str(home))
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setattr("huggingface_hub.file_download.http_get", full)
    with pytest.raises(AssetError, match=f"{NAME} .*No space left") as caught:
        checkpoints.download_checkpoint(NAME)
    assert str(home) in str(caught.value)


def test_questions(home, hub, monkeypatch):
    asked: list[tuple[str, int | None]] = []

    def refuse(name: str, size: int | None) -> bool:
        asked.append((name, size))
        return False

    with pytest.raises(checkpoints.DownloadDeclined, match="imagenet_WPCA128"):
        checkpoints.download_checkpoint(NAME, confirm=refuse)
    assert asked == [(NAME, len(BODY))]
    assert hub.ranges == []
    assert everything_under(home) == []

    # A large download is asked for at a terminal; not elsewhere, nor when yes is assumed.
    monkeypatch.setattr(checkpoints, "ask", refuse)
    monkeypatch.setattr(checkpoints, "LARGE_DOWNLOAD", 1_000_000)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    with pytest.raises(checkpoints.DownloadDeclined):
        checkpoints.resolve_checkpoint("pretrained_models/pittsburgh_WPCA", 128)
    path = checkpoints.resolve_checkpoint("pretrained_models/pittsburgh_WPCA", 128, assume_yes=True)
    assert len(asked) == 2
    for terminal, limit in ((False, 1_000_000), (True, len(BODY))):
        path.unlink()
        monkeypatch.setattr(sys.stdin, "isatty", lambda terminal=terminal: terminal, raising=False)
        monkeypatch.setattr(checkpoints, "LARGE_DOWNLOAD", limit)
        assert checkpoints.resolve_checkpoint("pretrained_models/pittsburgh_WPCA", 128) == path
    assert len(asked) == 2


@pytest.mark.parametrize(("typed", "answer"), [("y", True), (" YES ", True), ("n", False)])
def test_answers(monkeypatch, typed, answer):
    monkeypatch.setattr("builtins.input", lambda prompt: typed)
    assert checkpoints.ask("a", 2 * 10**9) is answer


def test_no_answer_is_no(monkeypatch):
    def end(prompt: str) -> str:
        assert "2,000 MB" in prompt
        raise EOFError

    monkeypatch.setattr("builtins.input", end)
    assert checkpoints.ask("a", 2 * 10**9) is False


# Which checkpoint a configuration means --------------------------------------------------------


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        checkpoints,
        "download_checkpoint",
        lambda name, confirm: pytest.fail(f"{name} was asked for"),
    )


@pytest.mark.usefixtures("no_hub")
def test_search_order_of_checkpoints(home):
    stem, expected = "./pretrained_models/mapillary_WPCA", []
    for path in (
        folders.data_dirs()[-1] / f"{stem}512.safetensors",
        folders.PACKAGE_DIR / f"{stem}512.safetensors",
        home / f"{stem}512.safetensors",
        Path(f"{stem}512.safetensors"),
        folders.PACKAGE_DIR / f"{stem}512.pth.tar",
        home / f"{stem}512.pth.tar",
        Path(f"{stem}512.pth.tar"),
        home / stem,
        Path(stem),
    ):  # each is found before all that come before it
        expected.append(put(path))
        assert checkpoints.resolve_checkpoint(stem, 512) == expected[-1]
    assert checkpoints.resolve_checkpoint(f"{stem}512.safetensors", 0) == expected[3]
    # The package's own path, written out, means the data directories as well.
    for path in expected[1], expected[4], expected[7]:
        path.unlink()
    spelled_out = folders.PACKAGE_DIR / "pretrained_models" / "mapillary_WPCA"
    assert checkpoints.resolve_checkpoint(str(spelled_out), 512) == expected[5]


@pytest.mark.usefixtures("home", "no_hub")
@pytest.mark.parametrize("name", ["own.pth", "own.pt", "own.safetensors", "own.pth.tar"])
def test_a_full_file_name(tmp_path, name):
    own = put(tmp_path / "own" / name)
    assert checkpoints.resolve_checkpoint(str(own), 4096) == own
    assert checkpoints.resolve_checkpoint(f"own/{name}", 0) == Path("own", name)


@pytest.mark.usefixtures("home", "no_hub")
def test_without_components_the_suffix_alone_is_appended():
    own = put(Path("own", "vgg.pth.tar"))
    assert checkpoints.resolve_checkpoint("own/vgg", 0) == own


@pytest.mark.usefixtures("no_hub")
def test_a_missing_checkpoint_is_explained(home):
    put(home / "pretrained_models" / "own_WPCA64.safetensors")
    put(home / "pretrained_models" / "own_WPCA1024.pth.tar")
    put(home / "pretrained_models" / "own_WPCA9.txt")
    for stem, components, hint in (
        ("./pretrained_models/own_WPCA", 128, "num_pcs = 64, 1024"),
        ("./pretrained_models/mapillary_WPCA", 256, "num_pcs = 128, 512, 4096"),
        ("./pretrained_models/pittsburgh_WPCA", 0, "num_pcs = 128, 512, 4096"),
        ("./pretrained_models/nothing", 128, ""),
        ("/elsewhere/pretrained_models/mapillary_WPCA", 512, ""),
    ):
        with pytest.raises(AssetError) as caught:
            checkpoints.resolve_checkpoint(stem, components, pooling="netvlad")
        text = str(caught.value)
        assert len(text.splitlines()) == 2
        assert stem in text
        assert f"num_pcs = {components}, pooling = netvlad" in text
        assert hint in text.splitlines()[1]
        assert text.count("num_pcs = ") == 1 + bool(hint)
        assert "--config_path demo" in text.splitlines()[1]
    with pytest.raises(AssetError, match=re.escape(str(home / "pretrained_models"))):
        checkpoints.resolve_checkpoint("./pretrained_models/nothing", 128)


def test_unknown_released_name():
    with pytest.raises(AssetError, match=r"mapilary_WPCA512.*mapillary_WPCA512"):
        checkpoints.download_checkpoint("mapilary_WPCA512")


# Commands --------------------------------------------------------------------------------------


def test_download_models_command(home, hub, capsys, monkeypatch):
    assert download_models.main(["pittsburgh_WPCA128"]) == 0
    assert capsys.readouterr().out == f"{NAME}: downloaded, {home / 'pretrained_models' / NAME}\n"

    for name in catalog.RELEASED_CHECKPOINTS:
        put(home / "pretrained_models" / name)
    seen = len(hub.requests)
    assert len(download_models.download_all_models(ask_for_permission=True)) == 6
    assert len(hub.requests) == seen
    assert capsys.readouterr().out.count("already there") == 6

    (home / "pretrained_models" / NAME).unlink()
    monkeypatch.setattr("builtins.input", lambda prompt: "n")
    assert len(download_models.download_models(ask_for_permission=True)) == 5
    assert f"{NAME}: not downloaded" in capsys.readouterr().out

    assert download_models.main(["--models", "nothing"]) == 2
    assert "nothing.pth.tar" in capsys.readouterr().err
    with pytest.raises(AssetError):
        download_models.main(["nothing", "--debug"])


def test_top_level_script_needs_no_hub_library_for_its_help():
    script = Path(__file__).parents[1] / "download_models.py"
    code = (
        "import runpy, sys; sys.argv[1:] = ['--help']\n"
        f"try: runpy.run_path({str(script)!r}, run_name='__main__')\n"
        "except SystemExit as end: assert end.code == 0\n"
        "assert not {'torch', 'huggingface_hub', 'sklearn'} & sys.modules.keys()"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=script.parent, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    assert "--ask_for_permission" in run.stdout


@pytest.mark.usefixtures("wheel")
def test_download_data_command(home, capsys):
    assert download_data.main([]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 17
    assert all(Path(line).is_file() for line in lines)


# The real wheels -------------------------------------------------------------------------------


def fetched_or_skipped(fetch: Callable[[], object]) -> object:
    try:
        return fetch()
    except AssetError as error:
        if "no package index" in str(error):
            pytest.skip(str(error).splitlines()[0])
        raise


@pytest.mark.network
def test_the_published_data(home):
    paths = fetched_or_skipped(data_files.fetch_data)
    assert len(paths) == len(everything_under(home)) == 17
    for name, lines in (("pitts30k_imageNames_index", 10_000), ("pitts30k_imageNames_query", 6816)):
        text = data_files.resolve_image_list(f"{name}.txt").read_text()
        assert len(text.splitlines()) == lines
    for name in catalog.GROUND_TRUTH_FILES:
        with np.load(data_files.resolve_ground_truth(name), allow_pickle=False) as file:
            assert file.files


@pytest.mark.network
def test_the_demonstration(home, monkeypatch):
    from PIL import Image

    photographs = fetched_or_skipped(data_files.demo_images)
    assert tuple(photographs) == catalog.DEMO_IMAGES
    for path in photographs.values():
        with Image.open(path) as image:
            assert min(image.size) > 100
    assert all(path.is_relative_to(home) for path in photographs.values())
    monkeypatch.setattr(wheels, "_pip_download", lambda *words: pytest.fail("fetched again"))
    assert data_files.demo_images() == photographs
