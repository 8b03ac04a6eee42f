# SPDX-License-Identifier: MIT
"""Object storage: a real S3 server on loopback, behind a proxy that fails requests."""

from __future__ import annotations

import io
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import REPOSITORY
from PIL import Image

from patchnetvlad.base import names as base_names
from patchnetvlad.base import remote
from patchnetvlad.base.files import make_folder
from patchnetvlad.base.names import is_remote, locate
from patchnetvlad.base.remote import RemoteFolder
from patchnetvlad.cli import store as store_command
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.images import load_image, native_size
from patchnetvlad.errors import (
    FeatureError,
    ImageError,
    ImageListError,
    OutputError,
    RemoteAccessError,
    RemoteError,
    RemoteNotFoundError,
)
from patchnetvlad.features.inspect import store_info
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.open import open_reader, open_writer
from patchnetvlad.features.store.codec import encode_patches
from patchnetvlad.features.store.records import RecordError
from patchnetvlad.models.grid import patch_grids
from patchnetvlad.own_data.check import check_dataset
from patchnetvlad.pipeline.extract import extract
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.pipeline.run_record import read_run
from patchnetvlad.search import rows as search_rows

pytest.importorskip("s3fs")
boto3 = pytest.importorskip("boto3")
moto_server = pytest.importorskip("moto.server")

from fault_proxy import KINDS, FaultProxy  # noqa: E402

pytestmark = [pytest.mark.s3, pytest.mark.usefixtures("thin_network")]

CONFIG = Config(
    num_pcs=8,
    patch_sizes=(2, 3),
    strides=(1, 1),
    patch_weights=(0.5, 0.5),
    image_size=(96, 128),
    match_image_size=(96, 128),
    local_features="float16",
    n_values=(1, 3),
)
QUERIES, INDEX = [f"q/{i}.jpg" for i in range(3)], [f"map/{i}.jpg" for i in range(6)]


@pytest.fixture(scope="module")
def server():
    """The host and port of an S3 server. Of attempts, only ours count."""
    moto = moto_server.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("AWS_")]:
            patch.delenv(name)
        patch.setenv("AWS_ACCESS_KEY_ID", "key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        patch.setenv("AWS_EC2_METADATA_DISABLED", "true")
        patch.setenv("AWS_MAX_ATTEMPTS", "1")
        patch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "50")  # of a page of a listing
        for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
            patch.setenv(name, os.devnull)
        moto.start()
        try:
            yield moto.get_host_and_port()
        finally:
            moto.stop()


@pytest.fixture(scope="module")
def client(server):
    """An S3 client of its own. Clients take long to make."""
    client = boto3.client("s3", endpoint_url=f"http://{server[0]}:{server[1]}")
    client.create_bucket(Bucket="store")
    return client


@pytest.fixture(autouse=True)
def storage(server, client, monkeypatch):
    """The same; bucket "store" is empty."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{server[0]}:{server[1]}")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket="store"):
        keys = [{"Key": entry["Key"]} for entry in page.get("Contents", ())]
        if keys:
            client.delete_objects(Bucket="store", Delete={"Objects": keys})
    return client


@pytest.fixture(scope="module")
def proxy(server):
    with FaultProxy(*server) as proxy:
        yield proxy


@pytest.fixture
def faults(proxy, storage, monkeypatch):
    """A proxy, without faults yet, that all but ``storage`` goes through."""
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
    proxy.reset()
    return proxy


@pytest.fixture
def folder():
    return RemoteFolder("s3://store/some folder/")


def upload(storage, source, prefix):
    for file in source.iterdir():
        storage.upload_file(str(file), "store", f"{prefix}/{file.name}")


class TestNames:
    @pytest.mark.parametrize(
        "path", ["s3://b", "s3://b/x y", "file:///tmp", "memory://x", "simplecache::s3://b/x"]
    )
    def test_urls(self, path):
        assert is_remote(path)
        assert (
            locate("/data", path)
            == path
            == base_names.absolute(path)
            == base_names.normal_name(path)
        )

    @pytest.mark.parametrize(
        "path", ["", "x", "/x", "C:/x", "C:\\x", "C://x", "a:b", "s3:/b", "x/s3://b", "://x"]
    )
    def test_paths(self, path):
        assert not is_remote(path)
        assert not is_remote(Path("data", path))

    def test_path_of_a_url(self):
        assert is_remote(Path("s3://b/x"))
        assert RemoteFolder(Path("s3://b/x")).url == "s3://b/x"

    @pytest.mark.parametrize(
        ("root", "name", "expected"),
        [
            ("s3://b", "a/1.jpg", "s3://b/a/1.jpg"),
            ("s3://b/x/", "a/1.jpg", "s3://b/x/a/1.jpg"),
            (Path("s3://b/x"), "./a//1.jpg", "s3://b/x/a/1.jpg"),
            ("s3://b/x", "../1.jpg", "s3://b/1.jpg"),
            ("s3://b/x", "../../../1.jpg", "s3://b/1.jpg"),
            ("s3://b/x", "/data/1.jpg", "/data/1.jpg"),
            ("s3://b/x", "gs://c/1.jpg", "gs://c/1.jpg"),
            ("data", "1.jpg", os.path.join("data", "1.jpg")),
        ],
    )
    def test_locate(self, root, name, expected):
        assert locate(root, name) == expected

    def test_manifest_of_urls(self, tmp_path, monkeypatch):
        """The digest of paths is one of URLs, wherever the command is run."""

        def paths(names, root):
            return Manifest.of(CONFIG, names, "c", root=root).paths

        expected = paths(["s3://b/x/1.jpg", "s3://b/x/2.jpg"], "")
        monkeypatch.chdir(tmp_path)
        assert paths(["1.jpg", "./2.jpg"], "s3://b/x/") == expected
        assert paths(["s3://b/x/1.jpg", "s3://b/x/2.jpg"], "data") == expected
        assert paths(["1.jpg", "2.jpg"], "s3://b/y") != expected

    def test_image_locations(self, tmp_path):
        names = ("a.jpg", "s3://c/b.jpg", "/data/ü.jpg")
        images = ImageList(Path("list"), names, (1, 2, 3))
        assert images.image_locations("s3://b/x") == [
            "s3://b/x/a.jpg", "s3://c/b.jpg", Path("/data/ü.jpg")
        ]  # fmt: skip
        assert images.image_locations(tmp_path)[:2] == [tmp_path / "a.jpg", "s3://c/b.jpg"]
        with pytest.raises(
            ImageListError, match=r"\bb\.jpg \(list, line 2\) .*s3://c/b\.jpg.*disk"
        ):
            images.image_paths(tmp_path)


class TestFolder:
    def test_round_trip(self, folder, tmp_path):
        folder.write("a.bin", b"0123456789")
        (tmp_path / "file").write_bytes(b"of a file")
        folder.child("below").write("b.bin", tmp_path / "file")
        folder.write("empty", b"")
        assert folder.names() == {"a.bin": 10, "below/b.bin": 9, "empty": 0}
        assert folder.names("be") == {"below/b.bin": 9}
        assert folder.child("below").names() == {"b.bin": 9}
        assert folder.child("nothing").names() == {}
        assert folder.read("a.bin") == b"0123456789"
        assert folder.read("a.bin", 2, 3) == b"234"
        assert folder.read("a.bin", 7) == b"789"
        assert folder.read("a.bin", 8, 5) == b"89"
        assert folder.read("a.bin", 10, 5) == folder.read("a.bin", 30) == b""
        assert folder.read("empty") == folder.read("empty", 0, 7) == b""
        assert folder.size("a.bin") == 10
        folder.delete(["a.bin", "never there"])
        assert list(folder.names()) == ["below/b.bin", "empty"]

    def test_nothing_is_remembered(self, folder, storage):
        folder.write("a", b"1")
        before = folder.revision("a")
        assert folder.revision("a") == before
        assert list(folder.names()) == ["a"]
        storage.put_object(Bucket="store", Key="some folder/a", Body=b"two")
        storage.put_object(Bucket="store", Key="some folder/b", Body=b"2")
        assert folder.names() == {"a": 3, "b": 1}
        assert folder.read("a") == b"two"
        assert folder.revision("a") != before

    def test_long_listings(self, folder, storage, faults):
        """Pages are asked for one by one; one that fails does not end or repeat the others."""
        keys = [f"{i:03d}" for i in range(70)]
        for key in keys:
            storage.put_object(Bucket="store", Key=f"some folder/{key}", Body=b"x")
        faults.plan = ["none", "503", "cut", "none"]
        assert list(folder.names()) == keys
        assert faults.counts["all"] == 4

    def test_large_objects_in_parts(self, folder, storage, tmp_path, monkeypatch):
        monkeypatch.setattr(remote, "PART_BYTES", 5 * 2**20)  # the least that S3 takes
        content = np.random.default_rng(0).bytes(11 * 2**20)
        (tmp_path / "large").write_bytes(content)
        folder.write("large", tmp_path / "large")
        parts = storage.head_object(Bucket="store", Key="some folder/large")["ETag"]
        assert parts.strip('"').endswith("-3")
        fetched = folder.fetch("large", tmp_path / "fetched")
        assert fetched.read_bytes() == content
        assert sorted(p.name for p in tmp_path.iterdir()) == ["fetched", "large"]

    def test_rows_of_an_array(self, folder, faults, tmp_path, monkeypatch):
        """As the workers of a cluster read global descriptors."""
        monkeypatch.setattr(search_rows, "PART_BYTES", 1000)
        values = np.random.default_rng(0).standard_normal((300, 4), np.float32)
        np.save(tmp_path / "a.npy", values)
        folder.write("a.npy", tmp_path / "a.npy")
        faults.share, faults.kinds = 0.3, ["503", "cut", "close"]
        for url in (folder.url_of("a.npy"), Path(folder.url_of("a.npy"))):
            rows = search_rows.Rows.open(url)
            np.testing.assert_array_equal(rows[100:290].read(), values[100:290])
            np.testing.assert_array_equal(rows[np.array([299, 0, 7])].read(), values[[299, 0, 7]])
        assert all(faults.counts[kind] for kind in faults.kinds), faults.counts
        faults.reset()
        folder.write("a.npy", b"\x93NUMPY")
        with pytest.raises(OSError, match=rf"{folder.url_of('a.npy')} "):
            rows.read()
        with pytest.raises(FeatureError, match=rf"{folder.url_of('a.npy')} "):
            search_rows.Rows.open(folder.url_of("a.npy"))
        with pytest.raises(RemoteNotFoundError, match=rf"{folder.url_of('b.npy')} "):
            search_rows.Rows.open(folder.url_of("b.npy"))
        with pytest.raises(RemoteError, match=r"s3://no-such-bucket/b.npy .*bucket no-such-bucket"):
            search_rows.Rows.open("s3://no-such-bucket/b.npy")

    def test_other_processes(self, folder):
        folder.write("a", b"1")
        copy = pickle.loads(pickle.dumps(folder))
        assert copy == folder
        for method in {"fork", "spawn"} & set(multiprocessing.get_all_start_methods()):
            context = multiprocessing.get_context(method)
            with context.Pool(1) as pool:
                assert pool.apply_async(copy.read, ["a"]).get(60) == b"1"

    @pytest.mark.parametrize("kind", ["memory", "file"])
    def test_other_protocols(self, kind, tmp_path):
        folder = RemoteFolder(f"{kind}://{tmp_path.as_posix()}/x")
        folder.write("a/b", b"12345")
        folder.write("a/b", b"1234567")
        assert folder.names() == {"a/b": 7}
        assert folder.read("a/b", 1, 2) == b"23"
        with pytest.raises(RemoteNotFoundError, match=f"{folder.url}/c "):
            folder.read("c")
        folder.delete(["a/b", "c"])
        assert folder.names() == {}

    @pytest.mark.parametrize(
        ("url", "text"),
        [
            ("s3://no-such-bucket/x", "s3://no-such-bucket/x/a .*bucket no-such-bucket"),
            ("blub://x", r"\bblub:// "),
        ],
    )
    def test_refused(self, url, text):
        with pytest.raises(RemoteError, match=text) as caught:
            RemoteFolder(url).read("a")
        assert not isinstance(caught.value, FileNotFoundError)
        assert "\n" not in str(caught.value)

    @pytest.mark.parametrize(
        ("name", "value"), [("AWS_PROFILE", "nobody"), ("AWS_ENDPOINT_URL", "nonsense")]
    )
    def test_settings(self, name, value, folder, monkeypatch):
        monkeypatch.setenv(name, value)
        with pytest.raises(RemoteError, match=f"s3:// .*{value}"):
            folder.names()

    def test_missing_bucket_everywhere(self):
        folder = RemoteFolder("s3://no-such-bucket")
        for request in (folder.names, lambda: folder.size("a"), lambda: folder.write("a", b"1")):
            with pytest.raises(RemoteError, match=r"s3://no-such-bucket.* bucket no-such-bucket"):
                request()

    def test_missing_object(self, folder, faults):
        with pytest.raises(RemoteNotFoundError, match="s3://store/some folder/a "):
            folder.read("a")
        assert isinstance(RemoteNotFoundError(), FileNotFoundError)
        assert faults.counts["all"] == 1  # not tried again

    def test_denied(self, folder, faults):
        faults.plan = ["403", "403"]
        with pytest.raises(
            RemoteAccessError, match=r"s3://store/some folder/a .*AWS_SECRET_ACCESS_KEY"
        ):
            folder.read("a")
        assert faults.counts["all"] == 1

    def test_without_packages(self):
        code = (
            "import sys; sys.modules['s3fs'] = None\n"
            "from patchnetvlad.base import remote\n"
            "from patchnetvlad.datasets import image_list, images\n"
            "assert 'fsspec' not in sys.modules, 'fsspec is imported without need'\n"
            "try: remote.RemoteFolder('s3://b').names()\n"
            "except remote.RemoteError as error: print(error)\n"
        )
        found = subprocess.run(
            [sys.executable, "-c", code], cwd=REPOSITORY, capture_output=True, text=True, check=True
        )
        assert found.stdout == "s3:// needs the package s3fs: pip install 'patchnetvlad[s3]'\n"


class TestFaults:
    def test_a_fifth_of_the_requests_fails(self, folder, faults, monkeypatch, tmp_path):
        monkeypatch.setattr(remote, "PART_BYTES", 2**16)
        faults.share = 0.2
        rng = np.random.default_rng(0)
        objects = {f"{i:02d}": rng.bytes(1000 * i) for i in range(40)}

        def use(name):
            content = objects[name]
            folder.write(name, content)
            assert folder.read(name) == content
            assert folder.read(name, 500, 700) == content[500:1200]

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(use, objects))
        assert folder.names() == {name: len(content) for name, content in objects.items()}
        folder.write("large", bytes(10) + rng.bytes(2**20))
        assert len(folder.fetch("large", tmp_path / "large").read_bytes()) == 2**20 + 10
        folder.delete(objects)
        assert list(folder.names()) == ["large"]
        assert all(faults.counts[kind] >= 5 for kind in KINDS), faults.counts

    @pytest.mark.parametrize("kind", ["503", "close", "lost", "cut"])
    @pytest.mark.parametrize("job", ["read", "write", "names", "size"])
    def test_all_requests_fail(self, kind, job, folder, faults, monkeypatch):
        if kind == "cut" and job == "size":
            pytest.skip("the answer has no body")
        monkeypatch.setattr(remote, "ATTEMPTS", 3)
        faults.share, faults.kinds = 1, [kind]
        request = {
            "read": lambda: folder.read("a", 0, 10),
            "write": lambda: folder.write("a", b"0123456789"),
            "names": folder.names,
            "size": lambda: folder.size("a"),
        }[job]
        if job != "write":
            faults.plan = ["none"] * 2
            folder.write("a", b"0123456789")
        begin = time.monotonic()
        with pytest.raises(RemoteError, match=r"\b3 attempts") as caught:
            request()
        assert time.monotonic() - begin < 20
        assert str(caught.value).startswith("s3://store/some folder")
        assert len(str(caught.value)) < 500
        assert "\n" not in str(caught.value)

    def test_gives_up_after_a_time(self, folder, faults, monkeypatch):
        monkeypatch.setattr(remote, "ATTEMPTS", 10**6)
        monkeypatch.setattr(remote, "GIVE_UP_SECONDS", 1.0)
        faults.share, faults.kinds = 1, ["503"]
        begin = time.monotonic()
        with pytest.raises(RemoteError, match=r"s3://store/some folder/a .*SlowDown"):
            folder.read("a")
        assert 1 <= time.monotonic() - begin < 15

    def test_nobody_answers(self, folder, monkeypatch):
        monkeypatch.setattr(remote, "ATTEMPTS", 2)
        monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        with pytest.raises(
            RemoteError, match=r"s3://store/some folder/a .*\b2 attempts.*AWS_ENDPOINT_URL"
        ):
            folder.read("a")

    def test_waits_longer_and_longer(self, folder, faults, monkeypatch):
        """By the clock of the requests, since that is what a busy store sees."""
        monkeypatch.setattr(remote, "FIRST_WAIT", 0.2)
        faults.plan = ["503"] * 4
        begin = time.monotonic()
        with pytest.raises(RemoteNotFoundError):
            folder.read("a")
        assert time.monotonic() - begin > 0.5 * (0.2 + 0.4 + 0.8 + 1.6)
        assert faults.counts["all"] == 5


# --- images ---------------------------------------------------------------------------------------


def jpeg(size=(160, 120), seed=0, quality=90):
    pixels = np.random.default_rng(seed).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    stream = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 6  # on its side
    Image.fromarray(pixels).resize(size).save(stream, "JPEG", quality=quality, exif=exif)
    return stream.getvalue()


class TestImages:
    def test_load(self, folder, tmp_path):
        content = jpeg()
        folder.write("a.jpg", content)
        (tmp_path / "a.jpg").write_bytes(content)
        for path in (folder.url_of("a.jpg"), Path(folder.url_of("a.jpg"))):
            np.testing.assert_array_equal(load_image(path), load_image(tmp_path / "a.jpg"))
            assert native_size(path) == native_size(tmp_path / "a.jpg") == (160, 120)

    @pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP", "JPEG"])
    def test_size_by_the_header(self, kind, folder, faults):
        """What cannot be told from the first bytes takes a second request."""
        pixels = np.random.default_rng(0).integers(0, 255, (300, 400, 3), dtype=np.uint8)
        stream = io.BytesIO()
        Image.fromarray(pixels).save(stream, kind, **({"quality": 100} if kind == "JPEG" else {}))
        folder.write("a", stream.getvalue())
        before = faults.counts["all"]
        assert native_size(folder.url_of("a")) == (300, 400)
        assert faults.counts["all"] - before == (1 if kind == "JPEG" else 2)

    def test_broken(self, folder):
        folder.write("cut.jpg", jpeg()[:2000])
        folder.write("empty.jpg", b"")
        for name, text in (
            ("cut.jpg", "broken"),
            ("empty.jpg", "empty"),
            ("gone.jpg", "exist"),
        ):
            with pytest.raises(ImageError, match=rf"s3://store/some folder/{name} .*{text}"):
                load_image(folder.url_of(name))
        with pytest.raises(ImageError, match=r"s3://store/some folder/gone.jpg "):
            native_size(folder.url_of("gone.jpg"))

    def test_an_outage_is_no_fault_of_the_image(self, folder, faults, monkeypatch):
        folder.write("a.jpg", jpeg())
        faults.plan = ["403"]
        with pytest.raises(ImageError, match=r"s3://store/some folder/a.jpg .*denied"):
            load_image(folder.url_of("a.jpg"))
        monkeypatch.setattr(remote, "ATTEMPTS", 2)
        faults.share, faults.kinds = 1, ["close"]
        with pytest.raises(
            RemoteError, match=r"s3://store/some folder/a.jpg .*2 attempts"
        ) as caught:
            load_image(folder.url_of("a.jpg"))
        assert not isinstance(caught.value, ImageError)

    def test_some_are_looked_up_beforehand(self, folder, faults):
        folder.write("0.jpg", jpeg())
        names = tuple(["0.jpg"] * 1000)
        ImageList(Path("list"), names, tuple(range(1000))).check_images(folder.url)
        assert faults.counts["all"] < 80
        with pytest.raises(ImageListError, match=r"\b1 of 2\b.*\bno\.jpg \(list, line 7\)"):
            ImageList(Path("list"), ("0.jpg", "no.jpg"), (3, 7)).check_images(folder.url)


# --- features -------------------------------------------------------------------------------------


def write_store(folder, names, config=CONFIG, seed=0):
    """Write made-up features into a store; those of image 1 are the same in all."""
    rng = torch.Generator().manual_seed(seed)
    grids = patch_grids(config.image_size, config.patch_sizes, config.strides)

    def unit(count, generator):
        return torch.nn.functional.normalize(torch.randn(count, 8, generator=generator), dim=1)

    manifest = Manifest.of(config, names, "c" * 64)
    with open_writer(folder, names, manifest) as writer:
        writer.start()
        for i in range(len(names)):
            generator = torch.Generator().manual_seed(99) if i == 1 else rng
            patches = [unit(len(grid), generator) for grid in grids]
            row = unit(1, generator)[0].numpy()
            writer.write(i, row, encode_patches(patches, config.local_features))
        writer.finish()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    for part, names, seed in (("q", QUERIES, 1), ("idx", INDEX, 2)):
        write_store(root / part, names, seed=seed)
        (root / f"{part}.txt").write_text("".join(f"{name}\n" for name in names))
    return root


def run(data, query_features, index_features, out, **keywords):
    return rerank(
        CONFIG, data / "q.txt", data / "idx.txt", query_features, index_features,
        results_dir=out, device="cpu", progress=False, **keywords,
    )  # fmt: skip


class TestFeatures:
    @pytest.fixture
    def url(self, data, storage):
        upload(storage, data / "q", "run/q")
        upload(storage, data / "idx", "run/idx")
        return "s3://store/run"

    def test_reader(self, url, data):
        ours = open_reader(f"{url}/idx", INDEX, CONFIG, "s3://b/images")
        theirs = open_reader(data / "idx", INDEX, CONFIG)
        np.testing.assert_array_equal(ours.global_descriptors, theirs.global_descriptors)
        for i in range(len(INDEX)):
            for a, b in zip(ours.patches(i), theirs.patches(i), strict=True):
                assert torch.equal(a, b)
        assert str(ours.directory) == f"{url}/idx"

    @pytest.mark.parametrize("share", [0, 0.2])
    def test_match(self, url, data, faults, share, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        faults.share = share
        expected = run(data, data / "q", data / "idx", tmp_path / "disk")
        temporary = tmp_path / "temporary"
        temporary.mkdir()
        monkeypatch.setattr("tempfile.tempdir", str(temporary))
        found = run(data, data / "q", f"{url}/idx", tmp_path / "half")
        found = run(data, f"{url}/q", Path(f"{url}/idx"), tmp_path / "s3")
        np.testing.assert_array_equal(found.reranked, expected.reranked)
        np.testing.assert_array_equal(found.patch_scores, expected.patch_scores)
        assert found.reranked[1, 0] == 1  # image 1 is the same in both
        for file in ("NetVLAD_predictions.txt", "PatchNetVLAD_predictions.txt"):
            assert (tmp_path / "s3" / file).read_bytes() == (tmp_path / "disk" / file).read_bytes()
        origin = read_run(tmp_path / "s3").origin
        assert (origin.query_features, origin.index_features) == (f"{url}/q", f"{url}/idx")
        assert list(temporary.iterdir()) == []
        assert {path.name for path in tmp_path.iterdir()} == {"disk", "half", "s3", "temporary"}

    def test_resumes_by_the_same_features_only(self, url, data, storage, tmp_path, monkeypatch):
        """A journal is of features by their URL and revision, as of files by theirs."""
        from patchnetvlad.engines import journal as engines_journal

        opened = []
        journal = engines_journal.Journal

        def look(path, shape):
            opened.append((path.name, found := journal(path, shape)))
            return found

        monkeypatch.setattr(engines_journal, "Journal", look)
        for _ in range(2):
            run(data, f"{url}/q", f"{url}/idx", tmp_path / "out")
        upload(storage, data / "idx", "run/idx")
        content = (data / "idx" / "globalfeats.npy").read_bytes()
        time.sleep(1.1)  # the revision of an object has a time of whole seconds
        storage.put_object(Bucket="store", Key="run/idx/globalfeats.npy", Body=content)
        run(data, f"{url}/q", f"{url}/idx", tmp_path / "out")
        first, second, third = (name for name, _ in opened)
        assert first == second != third

    def test_of_another_list(self, url, data):
        whole = open_reader(data / "idx", INDEX, CONFIG)
        for rows in (range(len(INDEX))[::-1], [4, 1]):
            reader = open_reader(f"{url}/idx", [INDEX[i] for i in rows], CONFIG)
            np.testing.assert_array_equal(
                reader.global_descriptors, whole.global_descriptors[list(rows)]
            )
            for a, b in zip(reader.patches(1), whole.patches(rows[1]), strict=True):
                assert torch.equal(a, b)
        missing = rf"{url}/idx .*\b1 of 3\b.*elsewhere\.jpg"
        with pytest.raises(FeatureError, match=missing):
            open_reader(f"{url}/idx", [*INDEX[:2], "elsewhere.jpg"], CONFIG)

    def test_a_transfer_is_checked(self, url, data, faults):
        expected = open_reader(data / "idx", INDEX, CONFIG).patches(2)
        reader = open_reader(f"{url}/idx", INDEX, CONFIG)
        before = faults.counts["all"]
        faults.plan = ["flip", "cut", "none"]
        for a, b in zip(reader.patches(2), expected, strict=True):
            assert torch.equal(a, b)
        assert faults.counts["all"] - before == 3

    def test_damaged_records(self, url, storage, data):
        reader = open_reader(f"{url}/idx", INDEX, CONFIG)
        shard = data / "idx" / "features-00000.bin"
        content = bytearray(shard.read_bytes())

        def replace_by(body):
            storage.put_object(Bucket="store", Key="run/idx/features-00000.bin", Body=bytes(body))

        start = reader.find(3)[1].start
        content[start + 40] ^= 1
        replace_by(content)
        reader.patches(2)
        where = f"map/3.jpg in {url}/idx/features-00000.bin"
        with pytest.raises(RecordError, match=rf"{where} .*checksum.*\b3\b"):
            reader.patches(3)
        replace_by(content[: start + 50])
        reader.patches(2)
        with pytest.raises(RecordError, match=f"{where} .*cut off"):
            reader.patches(3)
        storage.delete_object(Bucket="store", Key="run/idx/features-00000.bin")
        with pytest.raises(RecordError, match=f"{where} .*gone"):
            reader.patches(3)

    def test_no_store(self, url, data, storage, tmp_path):
        with pytest.raises(FeatureError, match=f"{url}/no; .*feature_extract"):
            open_reader(f"{url}/no", INDEX, CONFIG)
        storage.delete_object(Bucket="store", Key="run/q/globalfeats.npy")
        with pytest.raises(FeatureError, match=f"{url}/q .*feature_extract"):
            open_reader(f"{url}/q", QUERIES, CONFIG)
        write_store(tmp_path / "npy", INDEX, replace(CONFIG, local_features="npy"))
        upload(storage, tmp_path / "npy", "run/npy")
        with pytest.raises(FeatureError, match=rf"{url}/npy .*\.npy.*convert"):
            open_reader(f"{url}/npy", INDEX, CONFIG)
        storage.put_object(Bucket="store", Key="run/idx/features.sqlite", Body=b"no" * 999)
        with pytest.raises(FeatureError, match=f"{url}/idx/features.sqlite .*damaged"):
            open_reader(f"{url}/idx", INDEX, CONFIG)

    def test_info(self, url, data, capsys):
        ours, theirs = store_info(f"{url}/idx"), store_info(data / "idx")
        assert replace(ours, path="") == replace(theirs, path="")
        assert ours.path == f"{url}/idx"
        assert store_command.main(["info", f"{url}/idx"]) == 0
        assert f"{url}/idx: feature store, float16, finished" in capsys.readouterr().out

    @pytest.mark.parametrize(
        "words", [["verify", "URL"], ["convert", "URL", "out", "--to", "int8"],
                  ["convert", "DISK", "URL", "--to", "int8"]]
    )  # fmt: skip
    def test_not_verified_there(self, words, url, data, capsys, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        places = {"URL": f"{url}/idx", "DISK": str(data / "idx")}
        assert store_command.main([places.get(word, word) for word in words]) == 2
        assert f"{url}/idx " in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_check_dataset(self, url, data, storage):
        for name in (*QUERIES, *INDEX[:-1]):
            storage.put_object(Bucket="store", Key=f"images/{name}", Body=jpeg())
        found = check_dataset(
            data / "q.txt", data / "idx.txt", root="s3://store/images",
            query_features=f"{url}/q", index_features=f"{url}/idx", progress=False,
        )  # fmt: skip
        assert f"features of index images: 6 of 6 ({url}/idx)" in found.facts
        (problem,) = found.problems
        assert "s3://store/images/map/5.jpg " in problem

    def test_outputs_on_disks_only(self, data, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(FeatureError, match="--cluster local"):
            extract(CONFIG, data / "q.txt", "", "s3://store/out")
        for path in ("s3://store/out", Path("s3://store/out")):
            with pytest.raises(OutputError, match=r"s3:/+store/out .*disk"):
                make_folder(path)
        assert list(tmp_path.iterdir()) == []


class TestExtract:
    CONFIG = Config(
        resume_path="./pretrained_models/imagenet_WPCA",
        num_pcs=128,
        image_size=(64, 80),
        match_image_size=(64, 80),
        patch_sizes=(2,),
        strides=(1,),
        patch_weights=(1.0,),
        cache_batch_size=2,
    )

    def test_images_in_object_storage(self, storage, faults, tmp_path):
        for i in range(4):
            file = tmp_path / "images" / "a b" / f"{i}.jpg"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(jpeg(seed=i))
            storage.upload_file(str(file), "store", f"images/a b/{i}.jpg")
        (tmp_path / "list.txt").write_text("".join(f"a b/{i}.jpg\n" for i in range(4)))

        def go(root, out):
            return extract(
                self.CONFIG, tmp_path / "list.txt", root, out, device="cpu", progress=False
            )

        expected = go(tmp_path / "images", tmp_path / "disk")
        faults.share = 0.2
        storage.put_object(Bucket="store", Key="images/a b/2.jpg", Body=b"no image")
        with pytest.raises(
            ImageError, match=r"\b1 of 4\b.*line 3\): .*s3://store/images/a b/2\.jpg "
        ):
            go("s3://store/images/", tmp_path / "s3")
        info = store_info(tmp_path / "s3")
        assert (info.num_done, info.missing) == (3, ("a b/2.jpg",))
        storage.put_object(Bucket="store", Key="images/a b/2.jpg", Body=jpeg(seed=2))
        np.testing.assert_array_equal(go("s3://store/images", tmp_path / "s3"), expected)
        assert faults.counts["all"] > 8
