# SPDX-License-Identifier: MIT
"""Image lists: reading, checking, writing."""

from __future__ import annotations

import os
import re
import sys
import unicodedata
from pathlib import Path

import pytest

from patchnetvlad.datasets.formats import IMAGE_SUFFIXES
from patchnetvlad.datasets.image_list import ImageList, write_image_list
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
        (f"{TEXT}\n".replace("\n", "\r").encode(), (1, 2)),
        (f"\ufeff{NAMES[0]}\n\ufeff{NAMES[1]}\n".encode(), (1, 2)),
        (f"# images: 2\n{NAMES[0]}\n  #c.jpg\n#\n{NAMES[1]}\n".encode(), (2, 5)),
        (f"\"{NAMES[0]}\"\r\n '{NAMES[1]}' \r\n".encode(), (1, 2)),
    ],
    ids=[
        "plain",
        "newline",
        "CRLF",
        "BOM",
        "UTF-16",
        "UTF-16-BE-CRLF",
        "blank",
        "CR",
        "two-BOMs",
        "comments",
        "quotes",
    ],
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
    ("line", "name"),
    [
        ("'tis it.jpg", "'tis it.jpg"),
        ("a #1.jpg", "a #1.jpg"),
        ('"#1.jpg"', "#1.jpg"),
        ('" 1.jpg "', " 1.jpg "),
        ('"it\'s"', "it's"),
        ("'6\".jpg'", '6".jpg'),
        ("./#1.jpg", "./#1.jpg"),
        ("/data/db/1.jpg", "/data/db/1.jpg"),
    ],
)
def test_names_are_kept(listed, line, name):
    assert ImageList.read(listed(f"{line}\n".encode())).names == (name,)


@pytest.mark.skipif(os.sep == "\\", reason="names of Windows stay as they are there")
@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("db\\new 1\\1.jpg", "db/new 1/1.jpg"),
        ('".\\db\\1.jpg"', "./db/1.jpg"),
        ("data/db\\1.jpg", "data/db/1.jpg"),
        ("C:\\data\\1.jpg", "C:/data/1.jpg"),
    ],
)
def test_names_of_windows(listed, tmp_path, line, name):
    images = ImageList.read(listed(f"{line}\r\n".encode()))
    assert images.names == (name,)
    assert images.image_paths(tmp_path) == [tmp_path / name]


def test_images_that_are_commented_out_are_counted(listed, caplog):
    caplog.set_level("INFO", "patchnetvlad")
    ImageList.read(listed(b"# a comment\na.jpg\n"))
    assert not caplog.messages
    path = listed(b"# a comment\na.jpg\n#b.JPG\n# c.png\n")
    assert ImageList.read(path).names == ("a.jpg",)
    assert re.match(rf"{path}: 2 lines\b.*#.*\bline 3\b", caplog.messages[0])


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        ('"b.jpg', "begins"),
        ('"', "begins"),
        ('b.jpg"', "ends"),
        ('"b.jpg", "c.jpg"', "within"),
        ("'b.jpg' 'c.jpg'", "within"),
        ('"b.jpg",1', "begins"),
        ('""', "nothing"),
        ("' '", "nothing"),
        ('"' + "x" * 9999, "begins"),
    ],
)
def test_unclear_entries(listed, entry, words):
    path = listed(f"a.jpg\n\n{entry}\n".encode())
    with pytest.raises(ImageListError, match=words) as caught:
        ImageList.read(path)
    assert str(caught.value).startswith(f"{path}, line 3: {repr(entry)[:8]}")
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "no image"),
        (b"# a.jpg\n", "no image"),
        (b"\xef\xbb\xbf\r\n \n", "no image"),
        ("gro\xdf.jpg\n".encode("latin-1"), r"UTF-8 \(byte 3\)"),
        (TEXT.encode("utf-16") + b"\n", "text"),
        ("a.jpg\n".encode("utf-16-le"), "text"),
        (TEXT.encode("utf-32"), "text"),
        (bytes(range(256)), "text"),
    ],
    ids=["empty", "comment", "blank", "Latin-1", "odd", "UTF-16-without-BOM", "UTF-32", "bytes"],
)
def test_no_list(listed, content, words):
    path = listed(content)
    with pytest.raises(ImageListError, match=words) as caught:
        ImageList.read(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("name", ["", "absent.txt"], ids=["folder", "absent"])
def test_no_file(tmp_path, name):
    with pytest.raises(ImageListError, match="image") as caught:
        ImageList.read(tmp_path / name)
    assert str(tmp_path / name) in str(caught.value)


def test_paths(tmp_path, listed):
    absolute = str(tmp_path / "c.jpg")
    images = ImageList.read(listed(f"a/b.jpg\n{absolute}\n".encode()))
    assert images.image_paths() == [Path("a/b.jpg"), Path(absolute)]
    assert images.image_paths("root") == [Path("root/a/b.jpg"), Path(absolute)]


@pytest.mark.parametrize(("listed_as", "on_disk"), [("NFC", "NFD"), ("NFD", "NFC"), ("NFC", "NFC")])
def test_accents_of_another_system(tmp_path, listed, listed_as, on_disk):
    name = "stra\u00dfe/caf\u00e9/\u00e4 1.jpg"
    file = tmp_path / unicodedata.normalize(on_disk, name)
    file.parent.mkdir(parents=True)
    file.write_bytes(b"1")
    written = unicodedata.normalize(listed_as, name)
    images = ImageList.read(listed(f"{written}\nd\u00e9.jpg\n".encode()))
    assert images.names[0] == written  # the key, and what results say
    found, absent = images.image_paths(tmp_path)
    assert found.read_bytes() == b"1"
    assert absent == tmp_path / "d\u00e9.jpg"
    assert images.image_paths("elsewhere")[0] == Path("elsewhere") / written


def test_accents_of_both_systems(tmp_path, listed):
    """The folder by one, the file by another; and where both exist, the name is taken as it is."""
    folder = unicodedata.normalize("NFD", "\u00e4")
    (tmp_path / folder).mkdir()
    names = [f"\u00e4/{unicodedata.normalize(form, chr(0xE9))}.jpg" for form in ("NFC", "NFD")]
    paths = [tmp_path / folder / Path(name).name for name in names]
    if not os.path.supports_unicode_filenames:
        for path in paths:
            path.write_text(path.name)
        images = ImageList.read(listed("\n".join(names).encode()))
        assert images.image_paths(tmp_path) == paths


class TestCheckImages:
    @pytest.mark.skipif(os.sep == "\\", reason="is a path there")
    def test_drives_of_windows(self, tmp_path, listed):
        with pytest.raises(
            ImageListError,
            match=r"D:/data/a\.jpg \(.*list\.txt, line 1\).*Windows.*--dataset_root_dir",
        ):
            ImageList.read(listed(b"D:\\data\\a.jpg\n")).check_images(tmp_path)

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
        assert message.startswith("4 of 5 images ")
        assert f"absent.jpg ({path}, line 3) " in message
        assert re.search(rf"zero\.jpg \({path}, line 4\) .*\b0 bytes", message)
        assert f"folder ({path}, line 5) " in message
        assert f"xxx ({path}, line 6) " in message
        assert repr(str(tmp_path)) in message
        assert "good.jpg (" not in message

    def test_only_the_first_are_named(self, listed):
        names = "".join(f"{i}.jpg\n" for i in range(1000))
        with pytest.raises(ImageListError, match="1000 of 1000") as caught:
            ImageList.read(listed(names.encode())).check_images()
        message = str(caught.value)
        assert message.count("list.txt, line ") == 5
        assert " 995 " in message
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
            ("absent", "folder .*absent$"),
            ("images/notes.txt", r"folder .*notes\.txt$"),
            ("images/b/c/empty", r"/empty \(\.jpg \.jpeg .*\)$"),
            ("images/b/deep", r"/deep \(.*\b1\b.*--recursive"),
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

    @pytest.mark.skipif(sys.platform != "linux", reason="needs file names of any characters")
    @pytest.mark.parametrize("name", [" a.jpg", "#a.jpg", '"a.jpg', "a\\b.jpg", "a\n.jpg"])
    def test_a_name_that_would_be_read_otherwise(self, tmp_path, monkeypatch, name):
        monkeypatch.chdir(tmp_path)
        for file in ("1.jpg", name):
            Path(file).touch()
        with pytest.raises(ImageListError, match=re.escape(repr(name))):
            write_image_list(".", "list.txt")
        if "\n" not in name and "\\" not in name:  # harmless behind a folder
            names = write_image_list(tmp_path, "list.txt")
            assert ImageList.read("list.txt").names == tuple(names)

    @pytest.mark.skipif(sys.platform != "linux", reason="needs file names of arbitrary bytes")
    def test_a_name_that_no_list_can_hold(self, tmp_path):
        for name in (b"1.jpg", b"gro\xdf.jpg"):
            Path(os.fsdecode(os.fsencode(tmp_path) + b"/" + name)).touch()
        with pytest.raises(ImageListError, match=r"gro\\xdf\.jpg'.*UTF-8"):
            write_image_list(tmp_path, tmp_path / "list.txt")
        assert not (tmp_path / "list.txt").exists()
