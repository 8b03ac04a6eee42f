# SPDX-License-Identifier: MIT
"""Loading images: from files to normalised tensors."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

from patchnetvlad.base.names import is_remote, url_of
from patchnetvlad.base.quiet import without_libtiff
from patchnetvlad.base.remote import read_url
from patchnetvlad.datasets.formats import open_as_image
from patchnetvlad.errors import ConfigError, ImageError, RemoteAccessError, RemoteNotFoundError

if TYPE_CHECKING:
    from torch import Tensor

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_EXIF_ORIENTATION = 0x0112
_HEADER_BYTES = 2**16  # of an object whose size is wanted, at first
_ON_ITS_SIDE = (5, 6, 7, 8)  # values of the orientation that swap height and width

LIMIT_VARIABLE = "PATCHNETVLAD_MAX_PIXELS"
"""The environment variable that sets how many pixels an image may have."""

MAX_PIXELS = 2**29
"""Pixels that an image may have at most, unless the variable says otherwise."""

WHOLE_PIXELS = 178_956_970
"""Images of more are reduced while they are decoded, if they are to be resized anyway."""

_STRIP_PIXELS = 2**24  # of a large image, that are converted at a time
_LARGE = threading.Lock()  # so that one large image at a time is in memory

logging.getLogger("PIL").addHandler(logging.NullHandler())  # whose words mean nothing to users


def load_image(path: str | Path, enough: Sequence[int] | None = None) -> Image.Image:
    """Decode an image of any kind to upright RGB.

    Grey, palette, CMYK and transparent images are converted (transparency is dropped), images
    of 16 bits per channel are scaled to 8, and the camera's EXIF orientation is applied.

    Parameters
    ----------
    path : str or Path
        Or a URL, such as ``s3://bucket/image.jpg``.
    enough : (int, int), optional
        (height, width) in px, to which the image will be resized. If it has more than
        :data:`WHOLE_PIXELS`, it is then reduced while it is decoded, to twice this size or more,
        which takes much less memory. Without it, or with (0, 0), all pixels are returned.

    Returns
    -------
    PIL.Image.Image
        Mode RGB, fully decoded.

    Raises
    ------
    ImageError
        The file is missing, truncated, or not an image, or has more pixels than
        :func:`max_pixels` allows.
    RemoteError
        Object storage cannot be reached; the image itself may be fine.
    """
    with open_image(path) as image:
        if image.width * image.height <= WHOLE_PIXELS:
            return to_rgb(image)
        with _LARGE:
            return _reduced_rgb(image, enough) if enough and all(enough) else to_rgb(image)


def decode_image(content: bytes, what: str) -> Image.Image:
    """Decode the bytes of an image file as :func:`load_image` does; ``what`` names them in errors.

    Raises
    ------
    ImageError
        They are no image.
    """
    with _opened(io.BytesIO(content), what) as image:
        return to_rgb(image)


def max_pixels() -> int:
    """Return how many pixels an image may have, by default :data:`MAX_PIXELS`.

    Raises
    ------
    ConfigError
        The environment variable ``PATCHNETVLAD_MAX_PIXELS`` is not a number above 0.
    """
    text = os.environ.get(LIMIT_VARIABLE, "").strip() or str(MAX_PIXELS)
    if not text.isdecimal() or int(text) == 0:
        raise ConfigError(f"{LIMIT_VARIABLE} = {text!r} must be a number of pixels above 0")
    return int(text)


def load_reduced(path: str | Path, side: int) -> Image.Image:
    """Decode an image as :func:`load_image` does, reduced to ``side`` px on its longer side.

    A JPEG file is decoded at a fraction of its size if that is enough, which is much faster.
    Smaller images are not enlarged.

    Parameters
    ----------
    path : str or Path
    side : int
        In px.

    Returns
    -------
    PIL.Image.Image
        Mode RGB.

    Raises
    ------
    ImageError
        The file is missing, truncated, or not an image.
    """
    with open_image(path) as image:
        image.draft(None, (side, side))
        rgb = to_rgb(image)
        rgb.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
        return rgb


def native_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) in px of the upright image, from the file's header if possible.

    Parameters
    ----------
    path : str or Path
        Or a URL, of which only the header is read if that is enough.

    Returns
    -------
    (int, int)

    Raises
    ------
    ImageError
        The file is missing or not an image.
    RemoteError
        Object storage cannot be reached.
    """
    if is_remote(path):
        with contextlib.suppress(ImageError), open_image(path, _HEADER_BYTES) as image:
            return _upright_size(image)
    with open_image(path) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    if image.format == "TIFF":  # which Pillow turns itself, some versions while decoding
        image.load()
    width, height = image.size
    turned = image.getexif().get(_EXIF_ORIENTATION) in _ON_ITS_SIDE
    return (width, height) if turned else (height, width)


def image_troubles(paths: Sequence[Path | str], full: bool = False) -> Iterator[str]:
    """Yield for each image why it cannot be read, or an empty string.

    Parameters
    ----------
    paths : sequence of Path or str
        Files or URLs.
    full : bool, default False
        Decode whole images, not only their headers.

    Yields
    ------
    str
        In the order of the paths.
    """
    read: Callable[[Path | str], object] = load_image if full else native_size

    def trouble(path: Path | str) -> str:
        try:
            read(path)
        except ImageError as error:
            return str(error)
        except (OSError, ValueError) as error:
            return f"the image {path} cannot be reached: {error}"
        return ""

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        yield from pool.map(trouble, paths)


@contextlib.contextmanager
def open_image(path: str | Path, most: int | None = None) -> Iterator[Image.Image]:
    """Open an image, or only its first bytes if it is in object storage.

    Its format is one of :data:`~patchnetvlad.datasets.formats.FORMATS`, whatever the name says.
    Any exception in the block is raised as an ImageError.
    """
    if is_remote(path):
        path = url_of(path)
        with _opened(_fetched(path, most), path) as image:
            yield image
        return
    try:
        if not stat.S_ISREG(mode := os.stat(path).st_mode):
            what = "a folder" if stat.S_ISDIR(mode) else "not a file"
            raise ImageError(f"the image {path} is broken: it is {what}")
        file = open(path, "rb")  # noqa: SIM115 (closed below)
    except FileNotFoundError:
        raise ImageError(f"the image {path} does not exist") from None
    except (OSError, ValueError) as error:
        if isinstance(error, ImageError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise ImageError(f"the image {path} is broken: {reason}") from None
    with file, _opened(file, path) as image:
        yield image


@contextlib.contextmanager
def _opened(file: IO[bytes], path: str | Path) -> Iterator[Image.Image]:
    """Open an image from a file that stands at its beginning."""
    limit = max_pixels()
    try:
        name = os.fspath(path) if isinstance(file, io.BufferedReader) else ""
        with open_as_image(file, name) as image:
            if image.width * image.height > limit:
                raise _TooLarge(
                    f"the image {path} has {image.width} x {image.height} px; at most {limit} are "
                    f"read: {LIMIT_VARIABLE}=N sets another limit, if it is an image that you trust"
                )
            with without_libtiff() if image.format == "TIFF" else contextlib.nullcontext():
                yield image
    except _TooLarge:
        raise
    except Exception as error:  # Pillow's decoders raise whatever their formats trip over.
        file.seek(0)
        what = (
            f"broken: {str(error) or type(error).__name__}" if file.read(1) else "empty (0 bytes)"
        )
        raise ImageError(f"the image {path} is {what}") from None


class _TooLarge(ImageError):
    """An image that has more pixels than are read."""


def _fetched(url: str, most: int | None) -> io.BytesIO:
    try:
        return io.BytesIO(read_url(url, 0, most))
    except RemoteNotFoundError:
        raise ImageError(f"the image {url} does not exist") from None
    except RemoteAccessError as error:
        raise ImageError(f"the image {error}") from None


def check_side(path: str | Path, size: tuple[int, int], min_side: int) -> None:
    """Raise ImageError if an image of (height, width) px has a side shorter than ``min_side``."""
    height, width = size
    if min(height, width) < min_side:
        raise ImageError(
            f"the image {path} of {width} x {height} px is too small; needed are {min_side} px on "
            "each side"
        )


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an open image to upright RGB, as :func:`load_image` does."""
    image.load()
    image = ImageOps.exif_transpose(image)
    return _plain_rgb(image, _brightest(image))


def _brightest(image: Image.Image) -> float:
    """Return the largest value of an image of one channel of more than 8 bits; 0 for others."""
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        return float(values.max(initial=0))
    if image.mode.startswith("I"):
        return float(np.asarray(image).max(initial=0))
    return 0.0


def _plain_rgb(image: Image.Image, brightest: float) -> Image.Image:
    """Convert an image, or a part of one whose brightest value is given, to RGB."""
    if image.mode.startswith("I"):  # 16 bits in one channel; Pillow itself would cut at 255
        grey = np.asarray(image, dtype=np.float64)
        if image.mode != "I" or brightest > 255:
            grey = grey / 257
        image = Image.fromarray(np.clip(np.round(grey), 0, 255).astype(np.uint8))
    elif image.mode == "F":
        values = np.nan_to_num(np.asarray(image, dtype=np.float32))
        if brightest <= 1:
            values = values * 255
        image = Image.fromarray(np.clip(np.round(values), 0, 255).astype(np.uint8))
    image.info.pop("transparency", None)  # of a palette; Pillow would warn
    return image if image.mode == "RGB" else image.convert("RGB")


def _reduced_rgb(image: Image.Image, enough: Sequence[int]) -> Image.Image:
    """Convert a large image to upright RGB, reduced to twice (height, width) or more.

    JPEG is decoded at a fraction of its size; of other formats the decoded pixels are held once,
    and converted in strips.
    """
    height, width = (2 * side for side in enough)
    if image.getexif().get(_EXIF_ORIENTATION) in _ON_ITS_SIDE:
        height, width = width, height
    image.draft(None, (width, height))
    image.load()
    factor = max(1, min(image.width // width, image.height // height))
    reduced = Image.new("RGB", (-(-image.width // factor), -(-image.height // factor)))
    brightest = _brightest(image)
    rows = factor * max(1, _STRIP_PIXELS // image.width // factor)
    for top in range(0, image.height, rows):
        strip = image.crop((0, top, image.width, min(top + rows, image.height)))
        reduced.paste(_plain_rgb(strip, brightest).reduce(factor), (0, top // factor))
    exif: Any = Image.Exif()
    exif[_EXIF_ORIENTATION] = image.getexif().get(_EXIF_ORIENTATION, 1)
    reduced.info["exif"] = exif.tobytes()
    return ImageOps.exif_transpose(reduced)


def input_transform(
    resize: Sequence[int] = (480, 640),
) -> InputTransform:
    """Return the transform from an RGB image to the network's input.

    Parameters
    ----------
    resize : (int, int), default (480, 640)
        (height, width) in px, reached by Pillow's antialiased bilinear filter; (0, 0) keeps
        the image's size.

    Returns
    -------
    callable
        Maps a PIL image, or an array [H, W, 3] of uint8, to a float32 tensor [3, H, W], normalised
        by ImageNet's mean and standard deviation.
    """
    height, width = resize
    return InputTransform((width, height) if height and width else None)


class InputTransform:
    """From an RGB image to the network's input; can be pickled, for a DataLoader's workers.

    Equal to torchvision's transforms bit for bit, without importing torchvision, which takes
    longer than extracting an image's features, and more memory than the network.
    """

    def __init__(self, size: tuple[int, int] | None) -> None:
        self.size = size

    def pixels(self, image: Image.Image | NDArray[np.uint8]) -> NDArray[np.uint8]:
        """Return the resized pixels of an image, [H, W, 3]."""
        image = to_rgb(image if isinstance(image, Image.Image) else Image.fromarray(image))
        if self.size is not None:
            image = image.resize(self.size, Image.Resampling.BILINEAR)
        return np.array(image)

    def __call__(self, image: Image.Image | NDArray[np.uint8]) -> Tensor:
        """Return the resized and normalised image, [3, H, W]."""
        import torch

        pixels = torch.from_numpy(self.pixels(image)).permute(2, 0, 1)  # [3, H, W]
        values = pixels.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
        mean, std = (torch.tensor(v)[:, None, None] for v in (IMAGENET_MEAN, IMAGENET_STD))
        return values.sub_(mean).div_(std)
