# SPDX-License-Identifier: MIT
"""Which files are taken for images, whatever their names say."""

from __future__ import annotations

import io
import os
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from patchnetvlad.datasets import formats, images
from patchnetvlad.datasets.formats import FORMATS, has_image_suffix, left_out
from patchnetvlad.datasets.image_list import ImageList, write_image_list
from patchnetvlad.datasets.images import decode_image, load_image, load_reduced, native_size
from patchnetvlad.errors import ConfigError, ImageError, ImageListError, SourceError
from patchnetvlad.live.sources import Folder, Video, open_source

SMOOTH = np.add.outer(np.arange(96), np.arange(128))[..., None] * np.array([1, 0.5, 1.1])
PICTURE = Image.fromarray(SMOOTH.astype(np.uint8))
EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n%%EndComments\n(x) show\n%%EOF\n"
HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + b"\0" * 100
OTHERS = {
    "PostScript": EPS,
    "PDF": b"%PDF-1.7\n",
    "Photoshop": b"8BPS\0\1" + b"\0" * 40,
    "JPEG XL": b"\0\0\0\x0cJXL \r\n\x87\n" + b"\0" * 40,
    "raw photograph": b"II*\0\x10\0\0\0CR\2\0" + b"\0" * 40,
    "video": b"\0\0\0\x18ftypisom\0\0\2\0isommp41" + b"\0" * 40,
    "archive": b"PK\3\4" + b"\0" * 40,
    "web page": b"<!DOCTYPE html><html><body>404</body></html>",
    "LFS": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 12345\n",
}


@pytest.fixture
def without_heif(monkeypatch):
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    formats.is_available.cache_clear()
    yield
    formats.is_available.cache_clear()


def saved(kind, **options):
    stream = io.BytesIO()
    PICTURE.save(stream, kind, **options)
    return stream.getvalue()


@pytest.mark.parametrize("kind", OTHERS)
@pytest.mark.parametrize("suffix", ["jpg", "tif", "png"])
def test_what_is_no_image_is_named(tmp_path, kind, suffix):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(OTHERS[kind])
    for read in (load_image, native_size, lambda path: load_reduced(path, 64)):
        with pytest.raises(ImageError, match=kind) as caught:
            read(path)
        assert str(path) in str(caught.value)


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_no_program_is_run(tmp_path, monkeypatch):
    program = tmp_path / "bin" / "gs"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\necho 10\necho run >> {tmp_path}/ran\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    for content in (EPS, b"\xc5\xd0\xd3\xc6" + EPS, b"II" + EPS, EPS[1:]):
        (tmp_path / "x.jpg").write_bytes(content)
        with pytest.raises(ImageError, match=r"x\.jpg"):
            load_image(tmp_path / "x.jpg")
    assert not (tmp_path / "ran").exists()


def test_only_listed_decoders_see_a_file(tmp_path, monkeypatch):
    """Others that are registered in this process are not asked, though they would take it."""
    seen = []
    monkeypatch.setitem(Image.OPEN, "ANY", (lambda *_: seen.append("made"), lambda _: True))
    (tmp_path / "a.jpg").write_bytes(b"any content at all")
    with pytest.raises(ImageError):
        load_image(tmp_path / "a.jpg")
    assert not seen
    for kind in ("PCX", "TGA", "SGI", "ICO"):
        (tmp_path / "a.png").write_bytes(saved(kind))
        with pytest.raises(ImageError, match=rf"{tmp_path}/a\.png .*JPEG, PNG"):
            load_image(tmp_path / "a.png")


@pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.name)
def test_every_format_is_read_under_any_name(tmp_path, known):
    if not formats.is_available(known):
        pytest.skip(f"{known.name} is not there")
    content = saved("PNG") if known.name == "PNG" else saved(known.name)
    for suffix in known.suffixes:
        assert has_image_suffix(f"a{suffix}")
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    assert native_size(path) == (96, 128)
    pixels = np.asarray(load_image(path), dtype=float)
    assert np.abs(pixels - np.asarray(PICTURE)).mean() < 6
    assert np.array_equal(pixels, np.asarray(decode_image(content, "x")))


def test_the_main_image_of_an_mpo(tmp_path):
    content = saved("MPO", save_all=True, append_images=[Image.new("RGB", (20, 20))])
    (tmp_path / "a.mpo").write_bytes(content)
    assert load_image(tmp_path / "a.mpo").size == (128, 96)


def test_heic_without_its_package(tmp_path, without_heif):
    (tmp_path / "a.jpg").write_bytes(HEIC)
    with pytest.raises(ImageError, match=rf"{tmp_path}/a\.jpg .*HEIC .*patchnetvlad\[heif\]"):
        load_image(tmp_path / "a.jpg")
    (tmp_path / "b.heic").write_bytes(HEIC)
    assert not has_image_suffix("b.heic")
    with pytest.raises(SourceError, match=r"b\.heic.*HEIC"):
        open_source(tmp_path / "b.heic")
    (tmp_path / "a.jpg").unlink()
    with pytest.raises(ImageListError, match=r"1 \.heic files .*patchnetvlad\[heif\]"):
        write_image_list(tmp_path, tmp_path / "l.txt")


def test_a_raw_photograph_is_not_its_thumbnail(tmp_path):
    """DNG and NEF are TIFF, whose first page is a thumbnail."""
    for name, tags in (("dng", {50706: b"\1\4\0\0"}), ("nef", {254: 1, 330: 8})):
        path = tmp_path / f"{name}.tif"
        PICTURE.save(path, tiffinfo=tags)
        with pytest.raises(ImageError, match=f"{path} .*raw photograph"):
            load_image(path)
    PICTURE.save(tmp_path / "a.tif", tiffinfo={254: 0})
    assert load_image(tmp_path / "a.tif").size == PICTURE.size


class TestLimit:
    def test_it_can_be_set(self, tmp_path, monkeypatch):
        path = tmp_path / "a.png"
        PICTURE.save(path)
        monkeypatch.setenv(images.LIMIT_VARIABLE, str(96 * 128 - 1))
        for read in (load_image, native_size):
            with pytest.raises(ImageError, match=f"{path} .*{images.LIMIT_VARIABLE}") as caught:
                read(path)
            assert "128 x 96" in str(caught.value)
            assert "broken" not in str(caught.value)
        monkeypatch.setenv(images.LIMIT_VARIABLE, str(96 * 128))
        assert load_image(path).size == (128, 96)
        for value in ("x", "0", "-1", "1e9"):
            monkeypatch.setenv(images.LIMIT_VARIABLE, value)
            with pytest.raises(ConfigError, match=f"{images.LIMIT_VARIABLE} = {value!r}"):
                load_image(path)

    @pytest.mark.filterwarnings("error")
    def test_pillows_own_limit_does_not_count(self, tmp_path, monkeypatch):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
        PICTURE.save(tmp_path / "a.png")
        assert load_image(tmp_path / "a.png").size == (128, 96)

    @pytest.mark.filterwarnings("error")
    @pytest.mark.parametrize("orientation", [1, 3, 6, 7])
    @pytest.mark.parametrize(
        ("mode", "suffix"),
        [
            ("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("RGB", "png"), ("RGBA", "png"),
            ("P", "png"), ("1", "png"), ("I;16", "png"),
            ("I", "tif"), ("F", "tif"), ("RGB", "webp"),
        ],
    )  # fmt: skip
    def test_large_images_are_reduced(self, tmp_path, monkeypatch, mode, suffix, orientation):
        wide = PICTURE.resize((640, 480))
        if mode.startswith("I"):
            grey = np.asarray(wide.convert("L"))
            wide = Image.fromarray(grey.astype(np.uint16 if mode == "I;16" else np.int32) * 257)
        else:
            wide = wide.convert(mode)
        assert wide.mode == mode
        exif = Image.Exif()
        exif[0x0112] = orientation
        path = tmp_path / f"a.{suffix}"
        wide.save(path, exif=exif)
        whole = load_image(path)
        monkeypatch.setattr(images, "WHOLE_PIXELS", 1000)
        monkeypatch.setattr(images, "_STRIP_PIXELS", 20_000)
        enough = (45, 60) if orientation < 5 else (60, 45)
        found = load_image(path, enough)
        assert 2 * enough[0] <= found.height < whole.height
        assert 2 * enough[1] <= found.width < whole.width
        size = enough[::-1]
        resized = [np.asarray(one.resize(size, Image.Resampling.BILINEAR), float)
                   for one in (found, whole)]  # fmt: skip
        assert np.abs(resized[0] - resized[1]).mean() < (12 if mode == "1" else 3)
        assert load_image(path).size == whole.size  # all pixels are wanted
        assert load_image(path, (0, 0)).size == whole.size


def test_what_is_skipped_is_counted(tmp_path):
    names = ["a.jfif", "b.JPE", "c.mpo", "d.gif", "e.NEF", "f.dng", "g.mp4", "h.txt", "i", "j.x3f"]
    for name in names:
        (tmp_path / name).touch()
    said = "; ".join(left_out(sorted(tmp_path.iterdir())))
    for part in ("1 .nef", "1 .dng", "1 .mp4", "1 .txt", "1 without a suffix", "1 .x3f"):
        assert part in said
    assert not any(suffix in said for suffix in (".jfif", ".jpe", ".mpo", ".gif"))
    assert len(write_image_list(tmp_path, tmp_path / "out" / "l.txt")) == 4


class TestTables:
    @pytest.mark.parametrize(
        "text",
        [
            "image_path,label\nh/0.jpg,1\nh/1.jpg,2\n",
            "h/0.jpg;1\nh/1.jpg;2\n",
            "name\tx\nh/0.png\t1\n",
            "h/0.jpg 17\nh/1.jpg 3\n",
            '"h/0.jpg", "x"\n'.replace('"', ""),
        ],
    )
    def test_a_table_is_no_list(self, tmp_path, text):
        (tmp_path / "t.csv").write_text(text)
        with pytest.raises(ImageListError, match=r"t\.csv, line \d+: .*table"):
            ImageList.read(tmp_path / "t.csv")

    @pytest.mark.parametrize("text", ["a,b.jpg\nc, d.jpg\n", "x.jpg y.jpg\n", "a.jpg\nb.png,1\n"])
    def test_a_list_may_hold_such_names(self, tmp_path, text):
        (tmp_path / "t.txt").write_text(text)
        assert len(ImageList.read(tmp_path / "t.txt")) == text.count("\n")


class TestLive:
    @pytest.mark.parametrize("kind", ["JPEG", "PNG", "HEIF"])
    def test_photographs_are_told_by_content(self, tmp_path, kind):
        if kind == "HEIF":
            pytest.importorskip("pillow_heif")
            formats.is_available(FORMATS[-1])
        path = tmp_path / "a.mp4"
        path.write_bytes(saved(kind))
        source = open_source(path)
        assert isinstance(source, Folder)
        assert source.read().image.shape == (96, 128, 3)

    @pytest.mark.parametrize(
        "text", ["#EXTM3U\nhttp://host/x.ts\n", "ffconcat version 1.0\nfile /etc/passwd\n", "v=0\n"]
    )
    def test_no_playlist_is_opened(self, tmp_path, text):
        (tmp_path / "a.mp4").write_text(text)
        with pytest.raises(SourceError, match=rf"{tmp_path}/a\.mp4 .*video"):
            open_source(tmp_path / "a.mp4")

    def test_animations_stay_videos(self, tmp_path):
        frames = [Image.new("RGB", (64, 48), colour) for colour in ("red", "green", "blue")]
        frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
        assert isinstance(open_source(tmp_path / "a.gif"), Video)


def test_no_library_prints(tmp_path):
    """Neither Pillow's warnings nor libtiff's lines reach the terminal."""
    content = bytearray(saved("TIFF", compression="tiff_lzw"))
    content[60:200] = bytes((7 * byte + 3) % 256 for byte in content[60:200])
    (tmp_path / "a.tif").write_bytes(content)
    exif = Image.Exif()
    exif[0x0112] = 6
    content = saved("JPEG", exif=exif).replace(b"MM\0*\0\0\0\x08", b"MM\0*\0\0\0\xff")
    (tmp_path / "b.jpg").write_bytes(content)
    samples = saved("TIFF").replace(struct.pack("<HHI", 277, 3, 1), struct.pack("<HHI", 277, 3, 9))
    (tmp_path / "c.tif").write_bytes(samples)
    (tmp_path / "list.txt").write_text("a.tif\nb.jpg\nc.tif\n")
    code = (
        "from patchnetvlad.cli.dataset import main; main(['check', '--full', "
        "'--query_file_path', 'list.txt', '--index_file_path', 'list.txt'])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip
    lines = [line for line in run.stderr.replace("\r", "\n").split("\n") if "Checking" not in line]
    assert not any(lines), run.stderr
    assert "a.tif" in run.stdout


def test_stderr_of_others_arrives(capfd):
    from patchnetvlad.base.quiet import without_libtiff

    with without_libtiff():
        os.write(2, b"ZIPDecode: Decoding error.\nimportant: a disk is full\n")
        with without_libtiff():
            os.write(2, b"tempfile.tif: nonsense\n")
    assert capfd.readouterr().err == "important: a disk is full\n"
