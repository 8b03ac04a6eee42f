# SPDX-License-Identifier: MIT
"""Image lists: reading, checking, writing."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from patchnetvlad.datasets.image_list import IMAGE_SUFFIXES, ImageList, write_image_list
from patchnetvlad.errors import ImageListError

NAMES = ("db/a.jpg", "straße/道 1.jpg")
TEXT = "\n".join(NAMES)


@pytest.fixture
def listed(tmp_path):
    def write(content):
        path = tmp_path / "list.txt"
        path.write_bytes(content)
        return path

    return write


@pytest.mark.parametrize(
    ("content", "lines"),
    [
        (TEXT.encode(), (1, 2)),
        (f"{TEXT}\n".encode(), (1, 2)),
        (f"{TEXT}\n".replace("\n", "\r\n").encode(), (1, 2)),
        (f"{TEXT}\n".encode("utf-8-sig"), (1, 2)),
        (TEXT.encode("utf-16"), (1, 2)),
        (b"\xfe\xff" + TEXT.replace("\n", "\r\n").encode("utf-16-be"), (1, 2)),
        (f"\n \t\n{NAMES[0]}  \n\n\n\t{NAMES[1]}\r\n\r\n".encode(), (3, 6)),
    ],
    ids=["plain", "newline", "CRLF", "BOM", "UTF-16", "UTF-16-BE-CRLF", "blank"],
)
def test_read(listed, content, lines):
    path = listed(content)
    images = ImageList.read(str(path))
    assert images == ImageList(path, NAMES, lines)
    assert (len(images), tuple(images)) == (2, NAMES)
    assert images.where(1) == f"{NAMES[1]} ({path}, line {lines[1]})"


def test_only_line_ends_end_a_line(listed):
    """As opposed to str.splitlines."""
    name = "a\x0bb\x0cc\x1cd\x85e\u2028f.jpg"
    assert ImageList.read(listed(f"{name}\n".encode())).names == (name,)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "names no image"),
        (b"\xef\xbb\xbf\r\n \n", "names no image"),
        ("gro\xdf.jpg\n".encode("latin-1"), r"UTF-8 \(byte 3\)"),
        (TEXT.encode("utf-16") + b"\n", "not a text file"),
        ("a.jpg\n".encode("utf-16-le"), "not a text file"),
        (TEXT.encode("utf-32"), "not a text file"),
        (bytes(range(256)), "not a text file"),
    ],
    ids=["empty", "blank", "Latin-1", "odd", "UTF-16-without-BOM", "UTF-32", "bytes"],
)
def test_no_list(listed, content, words):
    path = listed(content)
    with pytest.raises(ImageListError, match=words) as caught:
        ImageList.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["", "absent.txt"], ids=["folder", "absent"])
def test_no_file(tmp_path, name):
    with pytest.raises(ImageListError, match="image list") as caught:
        ImageList.read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_paths(tmp_path, listed):
    absolute = str(tmp_path / "c.jpg")
    images = ImageList.read(listed(f"a/b.jpg\n{absolute}\n".encode()))
    assert images.image_paths() == [Path("a/b.jpg"), Path(absolute)]
    assert images.image_paths("root") == [Path("root/a/b.jpg"), Path(absolute)]


class TestCheckImages:
    def test_good(self, tmp_path, listed, monkeypatch):
        (tmp_path / "b.jpg").write_bytes(b"1")
        listed(b"b.jpg\n")
        ImageList.read(tmp_path / "list.txt").check_images(tmp_path)
        monkeypatch.chdir(tmp_path)
        ImageList.read("list.txt").check_images()

    def test_broken(self, tmp_path, listed):
        (tmp_path / "good.jpg").write_bytes(b"1")
        (tmp_path / "zero.jpg").touch()
        (tmp_path / "folder").mkdir()
        path = listed(b"good.jpg\n\nabsent.jpg\nzero.jpg\nfolder\n" + b"x" * 300 + b"\n")
        with pytest.raises(ImageListError) as caught:
            ImageList.read(path).check_images(tmp_path)
        message = str(caught.value)
        assert message.startswith("4 of 5 images cannot be used")
        assert f"absent.jpg ({path}, line 3) is missing" in message
        assert f"zero.jpg ({path}, line 4) is empty (0 bytes)" in message
        assert f"folder ({path}, line 5) is no file" in message
        assert f"xxx ({path}, line 6) cannot be reached" in message
        assert repr(str(tmp_path)) in message
        assert "good.jpg (" not in message

    def test_only_the_first_are_named(self, listed):
        names = "".join(f"{i}.jpg\n" for i in range(1000))
        with pytest.raises(ImageListError, match="1000 of 1000") as caught:
            ImageList.read(listed(names.encode())).check_images()
        message = str(caught.value)
        assert message.count("is missing") == 5
        assert "; and 995 more" in message
        assert "current folder" in message


class TestWrite:
    @pytest.fixture
    def folder(self, tmp_path):
        root = tmp_path / "images"
        for name in ("10.jpg", "9.JPG", "a2.Png", "a10.jpeg", "b/3.jpg", "b/c/20.TIFF"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        for name in ("notes.txt", "jpg", "a.jpg.bak"):
            (root / name).touch()
        (root / "d.jpg").mkdir()
        return root

    def test_one_folder_in_natural_order(self, folder, tmp_path):
        out = tmp_path / "new" / "list.txt"
        expected = [f"{folder}/{name}" for name in ("9.JPG", "10.jpg", "a2.Png", "a10.jpeg")]
        assert write_image_list(folder, out) == expected
        assert out.read_bytes() == "".join(f"{name}\n" for name in expected).encode()
        assert os.listdir(out.parent) == ["list.txt"]

    def test_recursive(self, folder, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        out = Path("list.txt")
        out.write_text("previous\n" * 99)
        names = write_image_list("images", out, recursive=True)
        assert names == [
            f"images/{name}"
            for name in ("9.JPG", "10.jpg", "a2.Png", "a10.jpeg", "b/3.jpg", "b/c/20.TIFF")
        ]
        assert ImageList.read(out).names == tuple(names)

    @pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
    def test_suffixes(self, tmp_path, suffix):
        for name in (f"a{suffix}", f"b{suffix.upper()}"):
            (tmp_path / name).touch()
        assert len(write_image_list(tmp_path, tmp_path / "list.txt")) == 2

    @pytest.mark.parametrize(
        ("name", "words"),
        [
            ("absent", "there is no folder .*absent"),
            ("images/notes.txt", "there is no folder .*notes.txt"),
            ("images/b/c/empty", r"there is no image in .*empty \(\.jpg \.jpeg .*\)$"),
            ("images/b/deep", "there is no image in .*there are 1 in the folders.*--recursive"),
        ],
    )
    def test_nothing_to_list(self, folder, tmp_path, name, words):
        (folder / "b/c/empty").mkdir()
        (folder / "b/deep/er").mkdir(parents=True)
        (folder / "b/deep/er/1.jpg").touch()
        out = tmp_path / "list.txt"
        with pytest.raises(ImageListError, match=words):
            write_image_list(tmp_path / name, out)
        assert not out.exists()

    @pytest.mark.skipif(sys.platform != "linux", reason="needs file names of arbitrary bytes")
    def test_a_name_that_no_list_can_hold(self, tmp_path):
        for name in (b"1.jpg", b"gro\xdf.jpg"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
        with pytest.raises(ImageListError, match=r"gro\\xdf\.jpg' is not UTF-8"):
            write_image_list(tmp_path, tmp_path / "list.txt")
        assert not (tmp_path / "list.txt").exists()
