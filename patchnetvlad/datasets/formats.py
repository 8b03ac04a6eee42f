# SPDX-License-Identifier: MIT
"""Image formats: one table of suffixes and signatures.

Only the decoders in :data:`FORMATS` are ever handed a file, whatever its name says. Pillow has
others, some of which run programs (PostScript) or only show a part of a file (raw photographs).
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import re
import struct
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from PIL import Image

_HEAD = 64  # bytes from which a kind of file is told
_HEIF_EXTRA = "pip install 'patchnetvlad[heif]' reads them, or convert them to JPEG"


@dataclass(frozen=True)
class ImageFormat:
    """A supported image format.

    Attributes
    ----------
    name : str
        As Pillow calls it.
    module : str
        Makes Pillow able to read it, by being imported.
    suffixes : tuple of str
        Of its files' names.
    optional : bool
        The module may be absent.
    """

    name: str
    module: str
    suffixes: tuple[str, ...]
    optional: bool = False


FORMATS = (
    ImageFormat("JPEG", "PIL.JpegImagePlugin", (".jpg", ".jpeg", ".jpe", ".jfif", ".mpo")),
    ImageFormat("PNG", "PIL.PngImagePlugin", (".png",)),
    ImageFormat("BMP", "PIL.BmpImagePlugin", (".bmp",)),
    ImageFormat("PPM", "PIL.PpmImagePlugin", (".ppm", ".pgm", ".pbm", ".pnm")),
    ImageFormat("TIFF", "PIL.TiffImagePlugin", (".tif", ".tiff")),
    ImageFormat("WEBP", "PIL.WebPImagePlugin", (".webp",)),
    ImageFormat("GIF", "PIL.GifImagePlugin", (".gif",)),
    ImageFormat("JPEG2000", "PIL.Jpeg2KImagePlugin", (".jp2", ".j2k", ".jpx", ".jpf", ".j2c")),
    ImageFormat("AVIF", "PIL.AvifImagePlugin", (".avif",), optional=True),
    ImageFormat("HEIF", "pillow_heif", (".heic", ".heif", ".hif"), optional=True),
)

IMAGE_SUFFIXES = tuple(
    suffix for known in FORMATS if not known.optional for suffix in known.suffixes
)
"""Of images that are always read."""

_OPTIONAL_SUFFIXES = {
    suffix: known for known in FORMATS if known.optional for suffix in known.suffixes
}
_RAW = (
    ".dng", ".cr2", ".cr3", ".crw", ".nef", ".nrw", ".arw", ".srf", ".sr2", ".raf", ".rw2", ".orf",
    ".pef", ".x3f", ".3fr", ".iiq", ".srw", ".rwl", ".gpr",
)  # fmt: skip
_VIDEOS = (
    ".mp4", ".mov", ".avi", ".mkv", ".webm", ".m4v", ".mts", ".m2ts", ".3gp", ".mpg", ".mpeg",
    ".wmv", ".flv", ".ogv", ".insv",
)  # fmt: skip
_OTHER_PICTURES = (
    ".jxl", ".jxr", ".tga", ".psd", ".svg", ".eps", ".ps", ".pdf", ".exr", ".hdr", ".qoi", ".pcx",
    ".ico", ".dds", ".xcf", ".ai", ".wmf", ".emf", ".insp",
)  # fmt: skip

# What a file is whose first bytes match; those that follow `ftyp` are told by _boxes.
_KINDS = (
    (rb"%!PS|\xc5\xd0\xd3\xc6", "PostScript"),
    (rb"%PDF", "a PDF document"),
    (rb"8BPS", "a Photoshop file"),
    (rb"\xff\x0a|\0\0\0\x0cJXL ", "JPEG XL"),
    (rb"FUJIFILMCCD-RAW|II\*\0....CR|II[UR][\0OS]|MMOR|FOVb|\0MRM|HEAPCCDR", "a raw photograph"),
    (rb"qoif", "QOI"),
    (rb"DDS ", "a DDS texture"),
    (rb"\x76\x2f\x31\x01|#\?RADIANCE|#\?RGBE", "a high dynamic range image"),
    (rb"gimp xcf", "a GIMP file"),
    (rb"RIFF....AVI |\x1aE\xdf\xa3|\0\0\x01\xba|FLV\x01|OggS|\x30\x26\xb2\x75", "a video"),
    (rb"PK\x03\x04|\x1f\x8b|7z\xbc\xaf|Rar!|BZh|\xfd7zXZ", "an archive"),
    (rb"version https://git-lfs", "a pointer of Git LFS (git lfs pull fetches the image)"),
    (rb"(?i)\s*(<\?xml[^>]*>)?\s*<svg", "an SVG drawing"),
    (rb"(?i)\s*<(!doctype html|html)", "a web page"),
)  # fmt: skip
_HEIF_BRANDS = (b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs", b"msf1")
_NEW_SUBFILE_TYPE, _SUB_IFDS, _DNG_VERSION = 254, 330, 50706  # tags of TIFF


@functools.cache
def is_available(known: ImageFormat) -> bool:
    """Return whether images of a format can be decoded here; the first call prepares Pillow."""
    try:
        module = importlib.import_module(known.module)
    except ImportError:
        return False
    if known.name == "HEIF":
        module.register_heif_opener()
    return known.name in Image.OPEN and getattr(module, "SUPPORTED", True)


def has_image_suffix(name: str | Path) -> bool:
    """Return whether a file name has the suffix of an image that can be read here."""
    suffix = Path(name).suffix.lower()
    optional = _OPTIONAL_SUFFIXES.get(suffix)
    return suffix in IMAGE_SUFFIXES or (optional is not None and is_available(optional))


def left_out(files: Iterable[Path]) -> list[str]:
    """Return a sentence on each kind of file that is not an image, with the number of files.

    Parameters
    ----------
    files : iterable of Path
        Those with the name of an image are passed over.

    Returns
    -------
    list of str
    """
    counts = Counter(file.suffix.lower() for file in files if not has_image_suffix(file))
    others = {suffix: counts.pop(suffix) for suffix in list(counts) if not _advice(suffix)}
    said = [
        f"{count} {suffix} files are not read{_advice(suffix)}"
        for suffix, count in sorted(counts.items())
    ]
    if others:
        kinds = ", ".join(f"{count} {suffix or 'without a suffix'}" for suffix, count in
                          sorted(others.items(), key=lambda item: -item[1])[:5])  # fmt: skip
        more = ", ..." if len(others) > 5 else ""
        said.append(f"other files, whose names are not those of images: {kinds}{more}")
    return said


def _advice(suffix: str) -> str:
    if suffix in _OPTIONAL_SUFFIXES:
        return f"; {_HEIF_EXTRA}"
    if suffix in _RAW or suffix in _OTHER_PICTURES:
        return "; convert them to JPEG"
    return "; take images from them, for example by ffmpeg" if suffix in _VIDEOS else ""


def open_as_image(file: IO[bytes], name: str) -> Image.Image:
    """Open an image in the first format whose signature it has.

    Parameters
    ----------
    file : binary file
        Stays open.
    name : str
        Path of the file, if it has one: large files may be mapped into memory by it.

    Returns
    -------
    PIL.Image.Image
        Not decoded yet.

    Raises
    ------
    ValueError
        It is nothing that is read; says what it is instead.
    """
    head = file.read(_HEAD)
    kind = _other_kind(head)
    if kind:
        raise ValueError(f"it is {kind}, which is not read; convert it to JPEG or PNG")
    reason = ""
    for known in filter(is_available, FORMATS):
        factory, accept = Image.OPEN[known.name]
        answer = accept(head[:16]) if accept else True
        if isinstance(answer, str) or not answer:  # a text says why not
            continue
        file.seek(0)
        try:
            image: Any = factory(file, name)
        except (SyntaxError, IndexError, TypeError, KeyError, struct.error) as error:
            reason = f" ({known.name}: {error})"
            continue
        _check_first_page(image)
        return image
    names = ", ".join(known.name for known in FORMATS if is_available(known))
    raise ValueError(f"no image of a kind that is read ({names}){reason}")


def _other_kind(head: bytes) -> str:
    """Name what a file is, by its first bytes, if it is nothing that can be read here."""
    if head[4:8] == b"ftyp":
        return _boxes(head)
    return next((name for mark, name in _KINDS if re.match(mark, head, re.DOTALL)), "")


def _boxes(head: bytes) -> str:
    """Tell HEIC, AVIF, raw photographs and videos, which are all made of boxes."""
    length = min(int.from_bytes(head[:4], "big"), len(head))
    brands = [head[at : at + 4] for at in (8, *range(16, length - 3, 4))]
    if brands[0] == b"crx ":
        return "a raw photograph"
    if any(brand in (b"avif", b"avis") for brand in brands):
        return "" if is_available(_OPTIONAL_SUFFIXES[".avif"]) else "AVIF (newer Pillow reads it)"
    if brands[0] == b"mif1" or any(brand in _HEIF_BRANDS for brand in brands):
        known = is_available(_OPTIONAL_SUFFIXES[".heic"])
        return "" if known else "HEIC (pip install 'patchnetvlad[heif]' reads it)"
    return "" if brands[0] in (b"jp2 ", b"jpx ") else "a video"


def _check_first_page(image: Any) -> None:
    """Raise ValueError for a raw photograph in a TIFF, of which Pillow shows the thumbnail."""
    if image.format != "TIFF":
        return
    tags: dict[int, Any] = {}
    with contextlib.suppress(Exception):
        tags = image.tag_v2
    reduced = tags.get(_NEW_SUBFILE_TYPE)
    thumbnail = isinstance(reduced, int) and reduced & 1 and _SUB_IFDS in tags
    if _DNG_VERSION in tags or thumbnail:
        raise ValueError("it is a raw photograph, which is not read; convert it to JPEG or PNG")


def is_video(head: bytes) -> bool:
    """Return whether the first 400 bytes of a file are those of a video or an animation."""
    if _other_kind(head) == "a video" or re.match(_STREAMS, head, re.DOTALL):
        return True
    return any(head[at : at + 1] == head[at + 188 : at + 189] == b"G" for at in (0, 4))  # MPEG-TS


_STREAMS = rb"GIF8|\0\0\0?\x01|YUV4MPEG2|DKIF|\x06\x0e\x2b\x34|....(moov|mdat|wide|pnot)"
