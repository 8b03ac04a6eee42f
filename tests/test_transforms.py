# SPDX-License-Identifier: MIT
"""Decoding of images of all kinds, and the network's input."""

from __future__ import annotations

import io
import pickle

import numpy as np
import pytest
from PIL import Image
from torch import float32

from patchnetvlad.datasets.images import input_transform, load_image, native_size
from patchnetvlad.errors import ImageError

RNG = np.random.default_rng(0)
RGB = RNG.integers(0, 256, (5, 7, 3), dtype=np.uint8)
GREY = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
STD = np.array([0.229, 0.224, 0.225])
ALPHA = RNG.integers(0, 256, (5, 7), dtype=np.uint8)
# What each EXIF orientation asks a viewer to do to the stored pixels.
ORIENTATIONS = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: a.transpose(1, 0, 2),
    6: lambda a: np.rot90(a, -1),
    7: lambda a: np.rot90(a, 2).transpose(1, 0, 2),
    8: np.rot90,
}


def three(grey):
    return np.repeat(np.asarray(grey)[..., None], 3, axis=2)


def mode_in(path):
    with Image.open(path) as image:
        return image.mode


def decoded(path):
    image = load_image(path)
    assert image.mode == "RGB"
    return np.asarray(image)


@pytest.mark.parametrize(
    ("mode", "pixels", "expected"),
    [
        ("RGB", RGB, RGB),
        ("RGBA", np.dstack([RGB, ALPHA]), RGB),
        ("L", GREY, three(GREY)),
        ("LA", np.dstack([GREY, ALPHA]), three(GREY)),
    ],
)
@pytest.mark.parametrize("suffix", ["png", "tiff", "webp"])
def test_eight_bits(tmp_path, mode, pixels, expected, suffix):
    path = tmp_path / f"a.{suffix}"
    image = Image.fromarray(pixels)
    assert image.mode == mode
    image.save(path, lossless=True, exact=True)
    np.testing.assert_array_equal(decoded(path), expected)
    assert native_size(path) == (5, 7)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("transparency", [None, 1, bytes([255, 0, 128])])
def test_palette(tmp_path, transparency):
    colours = [[255, 0, 0], [10, 200, 30], [1, 2, 3]]
    indices = np.array([[0, 1, 2], [2, 1, 0]], dtype=np.uint8)
    image = Image.frombytes("P", (3, 2), indices.tobytes())
    image.putpalette([value for colour in colours for value in colour])
    path = tmp_path / "a.png"
    image.save(path, **({} if transparency is None else {"transparency": transparency}))
    assert mode_in(path) == "P"
    np.testing.assert_array_equal(decoded(path), np.array(colours)[indices])


def test_one_bit(tmp_path):
    Image.fromarray(GREY > 127).save(tmp_path / "a.png")
    assert mode_in(tmp_path / "a.png") == "1"
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), three((GREY > 127) * 255))


def test_cmyk(tmp_path):
    ink = np.dstack([255 - RGB, np.zeros((5, 7), dtype=np.uint8)])
    Image.frombytes("CMYK", (7, 5), ink.tobytes()).save(tmp_path / "a.tiff")
    np.testing.assert_array_equal(decoded(tmp_path / "a.tiff"), RGB)
    flat = np.full((16, 16, 4), (0, 255, 255, 0), dtype=np.uint8)
    Image.frombytes("CMYK", (16, 16), flat.tobytes()).save(tmp_path / "a.jpg", quality=95)
    np.testing.assert_allclose(decoded(tmp_path / "a.jpg")[8, 8], [255, 0, 0], atol=3)


@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_sixteen_bits_grey(tmp_path, suffix):
    values = np.array([[0, 128, 129, 257], [32896, 65535, 65000, 256]], dtype=np.uint16)
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(values).save(path)
    np.testing.assert_array_equal(
        decoded(path), three([[0, 0, 1, 1], [128, 255, 253, 1]]).astype(np.uint8)
    )


def test_sixteen_bits_colour(tmp_path):
    import cv2

    cv2.imwrite(str(tmp_path / "a.png"), RGB[..., ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(decoded(tmp_path / "a.png"), RGB)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 0.5, 1]], [[0, 128, 255]]),
        ([[0, 100.4, 255]], [[0, 100, 255]]),
        ([[-3, 100, 1e9]], [[0, 100, 255]]),
        ([[np.nan, 1, np.inf]], [[0, 1, 255]]),
    ],
)
def test_float(tmp_path, values, expected):
    path = tmp_path / "a.tiff"
    Image.fromarray(np.array(values, dtype=np.float32)).save(path)
    np.testing.assert_array_equal(decoded(path), three(expected))


@pytest.mark.parametrize("orientation", [*ORIENTATIONS, 0, 9, 65535])
@pytest.mark.parametrize("suffix", ["jpg", "png", "tiff", "webp"])
def test_orientation(tmp_path, orientation, suffix):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    smooth = np.add.outer(np.arange(32), np.arange(48))[..., None] * np.array([1, 2, 3])
    stored = smooth.astype(np.uint8)
    lossy = {"quality": 100} if suffix == "jpg" else {"lossless": True, "exact": True}
    Image.fromarray(stored).save(path, exif=exif, **lossy)
    expected = ORIENTATIONS.get(orientation, lambda a: a)(stored)
    np.testing.assert_allclose(
        decoded(path).astype(int), expected.astype(int), atol=6 if suffix == "jpg" else 0
    )
    assert native_size(path) == expected.shape[:2]


def test_animation(tmp_path):
    frames = [Image.new("RGB", (4, 3), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    np.testing.assert_array_equal(decoded(tmp_path / "a.gif"), np.full((3, 4, 3), [255, 0, 0]))


def encoded(suffix, side=64):
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (side, side, 3), dtype=np.uint8)).save(stream, suffix)
    return stream.getvalue()


def huge_bmp():
    raw = bytearray(encoded("bmp"))
    raw[18:26] = (60000).to_bytes(4, "little") * 2  # width, height
    return bytes(raw)


def damaged_exif():
    image, stream, exif = Image.new("RGB", (32, 32)), io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    image.save(stream, "jpeg", exif=exif)
    return stream.getvalue().replace(b"Exif\0\0MM\0*\0\0\0\x08", b"Exif\0\0MM\0*\0\0\0\xff")


BROKEN = {
    "truncated.jpg": encoded("jpeg")[:-500],
    "truncated.png": encoded("png")[:-500],
    "header.jpg": encoded("jpeg")[:200],
    "zero.jpg": b"",
    "text.jpg": b"this is no image\n",
    "bomb.bmp": huge_bmp(),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(BROKEN[name])
    with pytest.raises(ImageError) as caught:
        load_image(path)
    message = str(caught.value)
    assert str(path) in message
    assert ("0 bytes" in message) == (name == "zero.jpg")
    assert "\n" not in message
    if not name.startswith("truncated"):
        with pytest.raises(ImageError, match=f"{path} "):
            native_size(path)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_damaged_exif_does_not_matter(tmp_path):
    (tmp_path / "a.jpg").write_bytes(damaged_exif())
    assert decoded(tmp_path / "a.jpg").shape == (32, 32, 3)
    assert native_size(tmp_path / "a.jpg") == (32, 32)


@pytest.mark.parametrize("read", [load_image, native_size])
def test_no_file(tmp_path, read):
    with pytest.raises(ImageError, match=rf"{tmp_path}/absent\.jpg "):
        read(tmp_path / "absent.jpg")
    with pytest.raises(ImageError, match=f"{tmp_path} .*folder"):
        read(tmp_path)


@pytest.mark.parametrize("kind", ["jpeg", "png", "tiff", "gif", "webp", "bmp", "ppm"])
@pytest.mark.filterwarnings("ignore")
def test_whatever_the_damage_only_image_errors(tmp_path, kind):
    """Damaged and whole images alike: their size is that of their pixels."""
    whole, rng, path = encoded(kind, 24), np.random.default_rng(1), tmp_path / "a"
    for _ in range(150):
        raw = np.frombuffer(whole, dtype=np.uint8).copy()
        places = rng.integers(0, min(len(raw), 300), size=3)
        raw[places] = rng.choice(np.array([0, 255, rng.integers(256)]), size=3)
        path.write_bytes(raw.tobytes())
        try:
            shape = decoded(path).shape[:2]
        except ImageError:
            continue
        assert native_size(path) == shape


def by_hand(pixels, size):
    """Bilinear resize whose triangle grows with the reduction, then ImageNet's normalisation."""
    values = pixels.astype(np.float64)
    for axis, length in enumerate(size):
        have = values.shape[axis]
        scale = have / length
        support = max(scale, 1)
        centres = (np.arange(length) + 0.5) * scale
        distance = np.abs(np.arange(have)[None] + 0.5 - centres[:, None]) / support
        weights = np.maximum(1 - distance, 0)
        weights /= weights.sum(axis=1, keepdims=True)
        values = np.moveaxis(np.tensordot(weights, values, axes=(1, axis)), 0, axis)
    return ((values / 255 - np.array([0.485, 0.456, 0.406])) / STD).transpose(2, 0, 1)


@pytest.mark.parametrize("size", [(48, 64), (20, 90), (33, 17), (7, 120), (30, 41)])
def test_input_transform(size):
    pixels = RNG.integers(0, 256, (30, 41, 3), dtype=np.uint8)
    tensor = input_transform(size)(Image.fromarray(pixels))
    assert (tensor.shape, tensor.dtype) == ((3, *size), float32)
    # Pillow rounds to whole grey levels twice: after either axis.
    levels = np.abs(tensor.numpy() - by_hand(pixels, size)) * 255 * STD[:, None, None]
    assert levels.max() < 1.01
    assert levels.mean() < 0.35


@pytest.mark.parametrize("size", [(48, 64), (20, 90), (0, 0)])
def test_equal_to_torchvision(size):
    """The research code's transform, to the last bit."""
    transforms = pytest.importorskip("torchvision.transforms")
    image = Image.fromarray(RNG.integers(0, 256, (30, 41, 3), dtype=np.uint8))
    resized = transforms.Resize(size)(image) if all(size) else image
    expected = transforms.Normalize([0.485, 0.456, 0.406], STD.tolist())(
        transforms.ToTensor()(resized)
    )
    found = input_transform(size)(image)
    assert (found == expected).all()
    assert found.is_contiguous()
    assert (input_transform(size)(np.asarray(image)) == expected).all()
    assert (pickle.loads(pickle.dumps(input_transform(size)))(image) == expected).all()


def test_native_size_is_kept():
    tensor = input_transform((0, 0))(Image.fromarray(RGB))
    np.testing.assert_allclose(tensor, by_hand(RGB, (5, 7)), atol=1e-6)


def test_default_size():
    assert input_transform()(Image.new("RGB", (5, 5))).shape == (3, 480, 640)
