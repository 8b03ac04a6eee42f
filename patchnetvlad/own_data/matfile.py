# SPDX-License-Identifier: MIT
"""Variables of MATLAB files, version 5 to 7.2.

SciPy reads them, but a damaged file may crash the interpreter, so it runs in a separate process.
"""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO, Union

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.errors import GroundTruthError

SECONDS = 300  # that reading may take
_MOST_BYTES = 2 << 30  # of memory that the other process may take
_DEEPEST = 8
_TREE = "tree"


@dataclass(frozen=True)
class Cells:
    """A cell array: its shape, and its values in column-major order."""

    shape: tuple[int, ...]
    values: list[Value]


Value = Union[NDArray[np.generic], str, Cells, "dict[str, Value]", None]
"""Numbers, one row of text, cells, one structure; None for anything else."""


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
        structure. None for everything else (sparse and complex numbers, objects, functions, arrays
        of structures, text of several rows).

    Raises
    ------
    GroundTruthError
        The file is missing, damaged, of another format, or has no such variable.
    """
    file = Path(path)
    try:
        file.open("rb").close()
    except OSError as error:
        raise GroundTruthError(f"{file} cannot be read: {error.strerror or error}") from None
    try:
        child = subprocess.run(
            [sys.executable, "-c", _CHILD, json.dumps(sys.path), str(file.absolute()), name],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=SECONDS,
            env={**os.environ, "OPENBLAS_NUM_THREADS": "1"},
        )
    except subprocess.TimeoutExpired:
        raise _damaged_error(file, f"it takes more than {SECONDS} s") from None
    said = child.stderr.decode("utf-8", "replace").strip().splitlines()
    if child.returncode == _REFUSED and said:
        raise GroundTruthError(f"{file} {said[-1]}")
    if child.returncode < 0:
        raise _damaged_error(file, f"the process that read it died of {_signal(-child.returncode)}")
    if child.returncode > 0:
        raise _damaged_error(file, said[-1][:200] if said else f"exit status {child.returncode}")
    try:
        with np.load(io.BytesIO(child.stdout), allow_pickle=False) as arrays:
            return _unpacked(json.loads(str(arrays[_TREE])), arrays)
    except (ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _damaged_error(file, str(error)) from None


_REFUSED = 3  # exit status; the last line on stderr says, after the file's name, why
_CHILD = """
import json, sys
sys.path[:] = json.loads(sys.argv[1])
from patchnetvlad.own_data.matfile import serve_variable
sys.exit(serve_variable(sys.argv[2], sys.argv[3], sys.stdout.buffer))
"""


def _damaged_error(file: Path, why: str) -> GroundTruthError:
    return GroundTruthError(
        f"{file} cannot be read as a MATLAB file: {why}; get it again, or save it with `save -v7`"
    )


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _unpacked(node: Any, arrays: Any) -> Value:
    """Build a value from its JSON and the arrays that this refers to."""
    if node is None or isinstance(node, str):
        return node
    if isinstance(node, int):
        return np.asarray(arrays[f"a{node}"])
    if "fields" in node:
        return {key: _unpacked(value, arrays) for key, value in node["fields"].items()}
    return Cells(tuple(node["shape"]), [_unpacked(value, arrays) for value in node["values"]])


# In the other process --------------------------------------------------------------------------


class _Refused(Exception):
    """The message that follows the file's name."""


def serve_variable(path: str, name: str, output: BinaryIO) -> int:
    """Write a variable to `output` in the form of ``.npz``; return the exit status.

    Parameters
    ----------
    path, name : str
        As for :func:`read_variable`.
    output : binary file
        Gets the array ``tree``, the value in JSON, and the arrays of numbers in it.

    Returns
    -------
    int
        0, or another status after a line on stderr that says what is wrong.
    """
    try:
        value = _load(path, name)
        arrays: list[NDArray[np.generic]] = []
        named: dict[str, Any] = {_TREE: json.dumps(_packed(value, arrays, 0))}
        named |= {f"a{i}": array for i, array in enumerate(arrays)}
        content = io.BytesIO()
        np.savez(content, **named)
        output.write(content.getbuffer())
        output.flush()
    except _Refused as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return _REFUSED
    except MemoryError:
        print("it needs far more memory than such files do", file=sys.stderr)
        return 1
    except Exception as error:  # SciPy raises every kind on damaged files
        print(next(iter(str(error).splitlines()), type(error).__name__), file=sys.stderr)
        return 1
    return 0


def _load(path: str, name: str) -> Any:
    import warnings

    from scipy.io.matlab import loadmat, matfile_version, whosmat

    _limit_memory()
    warnings.simplefilter("ignore")
    major = matfile_version(path)[0]
    if major == 2:
        raise _Refused("is a MATLAB 7.3 file; save it again with `save -v7`, as it was published")
    if major == 0:
        raise _Refused("cannot be read as a MATLAB file: it has no MATLAB header of version 5")
    found = loadmat(path, variable_names=[name], uint16_codec=_text_codec(path))
    if name not in found:
        names = ", ".join(variable for variable, *_ in whosmat(path)) or "none"
        raise _Refused(f"has no variable {name!r} (it has {names[:200]})")
    return found[name]


def _text_codec(path: str) -> str:
    """Return the encoding of 16-bit characters, which MATLAB itself writes."""
    with open(path, "rb") as file:
        return "utf-16-le" if file.read(128).endswith(b"IM") else "utf-16-be"


def _limit_memory() -> None:
    """Let a huge variable end in a MemoryError, where the system can do that."""
    try:
        import resource
    except ImportError:  # Windows
        return
    hard = resource.getrlimit(resource.RLIMIT_DATA)[1]
    limit = _MOST_BYTES if hard == resource.RLIM_INFINITY else min(_MOST_BYTES, hard)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


def _packed(value: Any, arrays: list[NDArray[np.generic]], depth: int) -> Any:
    """Turn what SciPy gives into JSON, whose whole numbers are rows of `arrays`."""
    if depth > _DEEPEST:
        raise _Refused("cannot be read as a MATLAB file: it is nested too deep")
    if type(value) is not np.ndarray:
        return None  # sparse, an object, a function
    if value.dtype.names is not None:
        if value.size != 1:
            return None
        fields = zip(value.dtype.names, value.reshape(-1)[0], strict=True)
        return {"fields": {key: _packed(part, arrays, depth + 1) for key, part in fields}}
    if value.dtype.kind == "O":
        cells = value.reshape(-1, order="F")
        return {"shape": value.shape, "values": [_packed(c, arrays, depth + 1) for c in cells]}
    if value.dtype.kind == "U":
        return "".join(value.tolist()) if value.ndim == 1 and value.size <= 1 else None
    if value.dtype.kind not in "biuf":
        return None
    arrays.append(value)
    return len(arrays) - 1


def field_of(fields: dict[str, Value], names: Sequence[str], file: Path) -> tuple[str, Value]:
    """Return the first of some fields that a structure has, and its name."""
    for name in names:
        if name in fields:
            return name, fields[name]
    raise GroundTruthError(
        f"{file}: dbStruct has no {names[0]!r} (it has {', '.join(fields) or 'nothing'})"
    )


def cell_names(fields: dict[str, Value], keys: Sequence[str], file: Path) -> list[str]:
    """Return the file names of a cell array, with ``/`` between folders."""
    key, cells = field_of(fields, keys, file)
    if not isinstance(cells, Cells) or not cells.values:
        raise GroundTruthError(f"{file}: {key} must be a cell array of file names")
    if len(cells.values) != max(cells.shape):
        raise GroundTruthError(
            f"{file}: {key} must be one column of file names, not {list(cells.shape)}"
        )
    names = []
    for row, text in enumerate(cells.values):
        name = text.strip().replace("\\", "/") if isinstance(text, str) else ""
        if PurePosixPath(name).name in ("", "..") or not name.isprintable():
            raise GroundTruthError(
                f"{file}: {key}, row {row} (from 0), is not a file name"
                + (f" but {name[:40]!r}" if name else "")
            )
        names.append(name)
    return names


def numbers(fields: dict[str, Value], key: str, file: Path) -> NDArray[np.float64]:
    """Return the numbers of a field as float64."""
    values = field_of(fields, (key,), file)[1]
    if not isinstance(values, np.ndarray):
        raise GroundTruthError(f"{file}: {key} must be numbers")
    return values.astype(np.float64)


def number(fields: dict[str, Value], key: str, file: Path) -> float:
    """Return the one finite number of a field."""
    values = numbers(fields, key, file).reshape(-1)
    if values.size != 1 or not np.isfinite(values[0]):
        raise GroundTruthError(f"{file}: {key} must be one finite number")
    return float(values[0])


def columns(fields: dict[str, Value], key: str, count: int, file: Path) -> NDArray[np.float64]:
    """Return the positions of images.

    Parameters
    ----------
    fields : dict of str to Value
        Of a structure.
    key : str
        Name of the field, which holds them as [2, N].
    count : int
        N.
    file : Path
        For messages.

    Returns
    -------
    ndarray [N, 2] of float64

    Raises
    ------
    GroundTruthError
        The field is missing, of another shape, or holds values that are not finite.
    """
    values = numbers(fields, key, file)
    if values.shape == (count, 2) != (2, 2):
        values = values.T
    if values.shape != (2, count):
        raise GroundTruthError(
            f"{file}: {key} must be of shape [2, {count}], one position per image, not "
            f"{list(values.shape)}"
        )
    bad = np.flatnonzero(~np.isfinite(values).all(axis=0))
    if len(bad):
        raise GroundTruthError(
            f"{file}: {key} holds NaN or infinite values for {len(bad)} images, first for image "
            f"{bad[0]} (from 0)"
        )
    return np.ascontiguousarray(values.T)
