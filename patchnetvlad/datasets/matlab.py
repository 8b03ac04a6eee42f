# SPDX-License-Identifier: MIT
"""Structures out of MATLAB files, version 5 to 7.2.

SciPy reads these too, but a damaged file can end the whole process in it.
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Union

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError

_HEADER = 128
_MOST_BYTES = 1 << 29  # of one variable, expanded
_DEEPEST = 8
_MATRIX, _COMPRESSED = 14, 15
_CELL, _STRUCT, _CHAR, _DOUBLE, _UINT64 = 1, 2, 4, 6, 15
_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8"}
_NUMBERS |= {12: "i8", 13: "u8"}
_TEXTS = {1: "latin-1", 2: "latin-1", 16: "utf-8", 4: "utf-16", 17: "utf-16", 18: "utf-32"}
_COMPLEX = 0x800


@dataclass(frozen=True)
class Cells:
    """A cell array: its shape, and its values in column-major order."""

    shape: tuple[int, ...]
    values: list[Value]


Value = Union[NDArray[np.generic], str, Cells, "dict[str, Value]", None]
"""Numbers, one row of text, cells, one structure; None for anything else."""


class _Damaged(ValueError):
    """What is wrong with the bytes."""


def read_variable(path: str | Path, name: str) -> Value:
    """Read one variable of a MATLAB file.

    Parameters
    ----------
    path : str or Path
        A file of version 5, 6 or 7; not of 7.3, which is HDF5.
    name : str

    Returns
    -------
    ndarray or str or Cells or dict or None
        Numbers in their shape and type, text of one row, a cell array, or the fields of a
        structure. None for what is none of these (sparse and complex numbers, objects, functions,
        arrays of structures, text of several rows).

    Raises
    ------
    GroundTruthError
        The file is missing, damaged, of another format, or has no such variable.
    """
    file = Path(path)
    try:
        content = file.read_bytes()
    except OSError as error:
        raise GroundTruthError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        order = _byte_order(content)
        if order is None:
            raise GroundTruthError(
                f"{file} is a MATLAB 7.3 file; save it again with `save -v7`, as it was published"
            )
        names = []
        for found, value in _variables(content, order):
            if found == name:
                return value
            names.append(found)
    except _Damaged as error:
        raise GroundTruthError(f"{file} cannot be read as a MATLAB file: {error}") from None
    raise GroundTruthError(
        f"{file} has no variable {name!r} (it has {', '.join(filter(None, names)) or 'none'})"
    )


def _byte_order(content: bytes) -> str | None:
    """Return ``<`` or ``>``; None for version 7.3."""
    order = {b"IM": "<", b"MI": ">"}.get(content[126:_HEADER])
    if order is None:
        raise _Damaged("it has no MATLAB header")
    version = struct.unpack_from(f"{order}H", content, 124)[0] >> 8
    if version == 2:
        return None
    if version != 1:
        raise _Damaged(f"it is of the unknown version {version}")
    return order


def _variables(content: bytes, order: str) -> list[tuple[str, Value]]:
    found = []
    reader = _Reader(memoryview(content)[_HEADER:], order)
    while reader.left:
        kind, data = reader.element(padded=False)
        if kind == _COMPRESSED:
            kind, data = _Reader(_expanded(data), order).element(padded=False)
        if kind == _MATRIX:
            found.append(_matrix(data, order, 0))
    return found


def _expanded(data: memoryview) -> memoryview:
    machine = zlib.decompressobj()
    try:
        expanded = machine.decompress(data, _MOST_BYTES)
    except zlib.error as error:
        raise _Damaged(f"a variable cannot be expanded: {error}") from None
    if not machine.eof:
        raise _Damaged("a variable is cut off, or far larger than this reader takes")
    return memoryview(expanded)


class _Reader:
    """Takes one element after the other from a run of bytes."""

    def __init__(self, data: memoryview, order: str) -> None:
        self.data, self.order, self.place = data, order, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.place

    def element(self, padded: bool = True) -> tuple[int, memoryview]:
        """Return the next element's type and bytes."""
        if self.left < 8:
            raise _Damaged("it is cut off")
        kind, size = struct.unpack_from(f"{self.order}II", self.data, self.place)
        if kind >> 16:  # a small element: type and size share a word, and four bytes follow
            kind, size = kind & 0xFFFF, kind >> 16
            if size > 4:
                raise _Damaged(f"a small element claims {size} bytes")
            start, end = self.place + 4, self.place + 8
        else:
            start = self.place + 8
            end = start + size
            if padded:
                end += -size % 8
        if start + size > len(self.data):
            raise _Damaged("it is cut off")
        self.place = min(end, len(self.data))
        return kind, self.data[start : start + size]

    def integers(self) -> list[int]:
        """Return the next element, which must be of whole numbers."""
        kind, data = self.element()
        if kind not in (5, 6) or len(data) % 4:
            raise _Damaged("whole numbers are missing")
        return list(struct.unpack(f"{self.order}{len(data) // 4}{'i' if kind == 5 else 'I'}", data))

    def ascii(self) -> str:
        kind, data = self.element()
        if kind not in (1, 2, 16):
            raise _Damaged("a name is missing")
        return bytes(data).decode("latin-1")


def _matrix(data: memoryview, order: str, depth: int) -> tuple[str, Value]:
    """Return name and value of the array in the bytes of a matrix element."""
    if len(data) == 0:
        return "", np.empty((0, 0))
    if depth > _DEEPEST:
        raise _Damaged("it is nested too deep")
    reader = _Reader(data, order)
    flags = reader.integers()
    if len(flags) != 2:
        raise _Damaged("the flags of an array are missing")
    kind, is_complex = flags[0] & 0xFF, bool(flags[0] & _COMPLEX)
    if kind > _UINT64:
        return "", None  # functions and opaque objects have neither shape nor name here
    shape = tuple(reader.integers())
    if len(shape) < 2 or min(shape) < 0:
        raise _Damaged("the shape of an array is missing")
    name = reader.ascii()
    value: Value = None
    if kind == _CELL:
        value = Cells(shape, _arrays(reader, prod(shape), depth))
    elif kind == _STRUCT and prod(shape) == 1:
        value = _structure(reader, depth)
    elif kind == _CHAR:
        value = _text(reader, shape)
    elif kind >= _DOUBLE and not is_complex:
        value = _numbers(reader, shape)
    return name, value


def _arrays(reader: _Reader, count: int, depth: int) -> list[Value]:
    if reader.left < 8 * count:
        raise _Damaged(f"{count} values are announced, but it is cut off")
    values = []
    for _ in range(count):
        kind, data = reader.element()
        if kind != _MATRIX:
            raise _Damaged("an array is missing")
        values.append(_matrix(data, reader.order, depth + 1)[1])
    return values


def _structure(reader: _Reader, depth: int) -> dict[str, Value]:
    lengths = reader.integers()
    if len(lengths) != 1 or lengths[0] < 1:
        raise _Damaged("the length of field names is missing")
    length, joined = lengths[0], reader.ascii()
    if len(joined) % length:
        raise _Damaged("field names are cut off")
    names = [joined[i : i + length].split("\0", 1)[0] for i in range(0, len(joined), length)]
    if len(set(names)) != len(names):
        raise _Damaged("a field is there twice")
    return dict(zip(names, _arrays(reader, len(names), depth), strict=True))


def _text(reader: _Reader, shape: tuple[int, ...]) -> str | None:
    if prod(shape) == 0:
        return ""
    kind, data = reader.element()
    if kind not in _TEXTS:
        raise _Damaged("text is missing")
    encoding = _TEXTS[kind]
    if encoding in ("utf-16", "utf-32"):
        encoding += "-le" if reader.order == "<" else "-be"
    try:
        text = bytes(data).decode(encoding)
    except UnicodeDecodeError:
        raise _Damaged(f"text is no {encoding}") from None
    return text if shape[0] == 1 and len(shape) == 2 else None


def _numbers(reader: _Reader, shape: tuple[int, ...]) -> NDArray[np.generic]:
    kind, data = reader.element()
    if kind not in _NUMBERS:
        raise _Damaged("numbers are missing")
    dtype = np.dtype(reader.order + _NUMBERS[kind])
    if len(data) != prod(shape) * dtype.itemsize:
        raise _Damaged(f"{prod(shape)} numbers are announced, but there are {len(data)} bytes")
    values = np.frombuffer(data, dtype).reshape(shape, order="F")
    return values.astype(dtype.newbyteorder("="))
