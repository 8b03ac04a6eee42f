# SPDX-License-Identifier: MIT
"""Feed the parsers broken files: ``python tests/fuzz.py --minutes 10 --seed 0``.

Every file must be read, or refused by an error of this package whose message names the file in
one or two lines. Anything else fails, and hypothesis prints the smallest file that shows it.
Nothing may ever be unpickled. ``fuzz_features.py`` damages stores, journals and JSON,
``fuzz_api.py`` calls public functions with odd arguments. ``tests/test_fuzz.py`` runs a few
seconds of it all.
"""

from __future__ import annotations

import argparse
import functools
import io
import itertools
import logging
import os
import pickle
import sys
import tempfile
import time
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import safetensors.torch
import torch
from fuzz_api import API
from fuzz_features import FEATURES
from fuzz_parts import Target, check_message, damaged
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from patchnetvlad.config import Config
from patchnetvlad.config_ini import CONFIG_DIR
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.images import load_image, native_size
from patchnetvlad.errors import ImageListError, PatchNetVLADError
from patchnetvlad.models.checkpoint import load_state
from patchnetvlad.models.int8 import read_ranges
from patchnetvlad.own_data.official import read_pittsburgh
from patchnetvlad.own_data.positions.poses import positions_from_poses
from patchnetvlad.own_data.positions.table import positions_from_table
from patchnetvlad.own_data.positions.track import read_gpx
from patchnetvlad.search.candidates import load_candidates, load_predictions

EXAMPLES = 200
SLOW = {"mat": 20, "store": 60}  # a process each, and many files
UNPICKLED = "PATCHNETVLAD_FUZZ_UNPICKLED"


# Parts of files --------------------------------------------------------------------------------

anything = st.text(st.characters(), max_size=12)
numbers = st.one_of(
    st.sampled_from(
        ["0", "-1", "1", "5", "1e3", "nan", "inf", "-inf", "1e999", "0x10", "1_0", "1,5", "٣", ""]
    ),
    st.integers(-(10**30), 10**30).map(str),
    st.integers(4000, 5000).map(lambda digits: "9" * digits),  # more than int() takes
    st.floats().map(str),
)
ENCODINGS = ("utf-8", "utf-8", "utf-8-sig", "utf-16", "utf-16-be", "utf-32", "latin-1", "cp1252")


@st.composite
def encoded(draw: st.DrawFn, texts: st.SearchStrategy[str]) -> bytes:
    """Write text in one of the encodings and with one of the line ends that are about."""
    text = draw(texts).replace("\n", draw(st.sampled_from(["\n", "\n", "\r\n", "\r", "\r\r\n"])))
    encoding = draw(st.sampled_from(ENCODINGS))
    return text.encode(encoding, "surrogatepass" if encoding.startswith("utf") else "replace")


def lines(line: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    return st.lists(line, max_size=8).map("\n".join)


names = st.lists(
    st.one_of(
        st.sampled_from(
            ["a.jpg", "b 1.png", "db", "straße", "ä", "a\u0308", "/", "\\", "//", "..", ".", "C:"]
        ),
        st.sampled_from(
            ['"', "'", "#", " ", "\t", "\ufeff", "\0", "\x1c", "\u2028", ",", "\ud800"]
        ),
        st.integers(200, 5000).map(lambda length: "x" * length),
        anything,
    ),
    max_size=4,
).map("".join)
lists = damaged(encoded(lines(names)))


@st.composite
def tables(draw: st.DrawFn) -> str:
    """Draw a table as programs export it, with columns of positions; for readers of csv."""
    columns = draw(
        st.lists(
            st.one_of(
                st.sampled_from(
                    [
                        "name",
                        "image",
                        "lat",
                        "lon",
                        "Latitude",
                        "easting",
                        "northing",
                        "key",
                        "time",
                    ]
                ),
                anything,
            ),
            min_size=1,
            max_size=5,
        )
    )
    cell = st.one_of(names, numbers, numbers.map(lambda text: f'"{text}"'))
    width = st.integers(0, 6) if draw(st.booleans()) else st.just(len(columns))
    rows = [draw(st.lists(cell, min_size=n, max_size=n)) for n in draw(st.lists(width, max_size=6))]
    separator = draw(st.sampled_from([",", ",", ";", "\t", " ", ", "]))
    return "\n".join(separator.join(row) for row in [columns, *rows])


csv_files = damaged(encoded(st.one_of(tables(), lines(names))))


def _set(name: str, value: str) -> None:
    os.environ[name] = value


class Trap:
    """Unpickling it leaves a trace in the environment."""

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str, str]]:
        return _set, (UNPICKLED, "1")


DTYPES = (
    "f8", "f8", "f4", "f2", ">f8", "longdouble", "i8", "u8", "i1", "bool", "c16", "U3", "S3",
    "M8[s]", "V4", "f8,i4",
)  # fmt: skip


KINDS = ("positions", "rows", "array", "header", "objects", "bytes")


@st.composite
def arrays(draw: st.DrawFn, kinds: Sequence[str] = KINDS) -> bytes:
    """Draw an ``.npy`` file: of numbers, of objects, or with a header that does not fit."""
    kind = draw(st.sampled_from(kinds))
    file = io.BytesIO()
    if kind == "bytes":
        return draw(st.binary(max_size=200))
    if kind == "positions":
        shape = draw(st.sampled_from([(3, 2), (10, 2), (10, 2), (2, 10), (5, 3), (2, 2), ()]))
        metres = draw(st.sampled_from([st.floats(-1e7, 1e7), st.floats(-1e7, 1e7), st.floats()]))
        np.save(file, draw(hnp.arrays("f8", shape, elements=metres)))
    elif kind == "rows":
        shape = draw(st.sampled_from([(3, 2), (3, 5), (2, 5), (3, 0)]))
        np.save(file, draw(hnp.arrays("i8", shape, elements=st.integers(0, 11))) % 11)
    elif kind == "array":
        dtype = np.dtype(draw(st.sampled_from(DTYPES)))
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=6))
        plain = dtype.kind == "V"
        np.save(file, np.zeros(shape, dtype) if plain else draw(hnp.arrays(dtype, shape)))
    elif kind == "objects":
        if draw(st.booleans()):
            return pickle.dumps(Trap())  # np.load takes what is no .npy for a pickle
        np.save(file, np.array([Trap()], dtype=object), allow_pickle=True)
    else:
        description = draw(st.sampled_from(["'<f8'", "'|O'", "'<f0'", "[('a', '<f8')]", "'", "1"]))
        shape = draw(
            st.sampled_from(["(3, 2)", "(-1, 2)", "(10**9,)", "(99999999999, 2)", "(", "2"])
        )
        header = f"{{'descr': {description}, 'fortran_order': False, 'shape': {shape}, }}"
        header = draw(st.sampled_from([header, header, "(" * 3000, "{}", "[1]", "\0"]))
        version = draw(st.sampled_from([b"\1\0", b"\2\0", b"\3\0", b"\4\0"]))
        length = len(header).to_bytes(2 if version == b"\1\0" else 4, "little")
        file.write(b"\x93NUMPY" + version + length + header.encode())
        file.write(bytes(draw(st.sampled_from([0, 48, 100]))))
    return file.getvalue()


@st.composite
def archives(draw: st.DrawFn) -> bytes:
    """Draw an ``.npz`` file of ground truth."""
    known = ["utmQ", "utmDb", "posDistThr"]
    other = st.one_of(st.sampled_from(["utm_queries", "utmq", "UTM-DB", "threshold"]), anything)
    keys = draw(st.one_of(st.just(known), st.just(known), st.lists(other, max_size=4)))
    file = io.BytesIO()
    warnings.filterwarnings("ignore", "Duplicate name", module="zipfile")
    with zipfile.ZipFile(file, "w", draw(st.sampled_from([0, zipfile.ZIP_DEFLATED]))) as archive:
        kinds = draw(st.sampled_from([KINDS, ["positions"]]))
        for key in keys:
            content = draw(arrays(kinds))
            if key == "posDistThr" and draw(st.booleans()):
                buffer = io.BytesIO()
                np.save(buffer, draw(st.sampled_from([25.0, 0.0, -1.0, 1e300])))
                content = buffer.getvalue()
            name = key.encode("utf-8", "replace").decode() + draw(
                st.sampled_from([".npy", ".npy", ""])
            )
            archive.writestr(zipfile.ZipInfo(name or "x"), content)
    return file.getvalue()


npz_files = damaged(st.one_of(archives(), archives(), arrays()))

_SHIPPED = [path.read_text(encoding="utf-8") for path in sorted(CONFIG_DIR.glob("*.ini"))]
_KEYS = sorted({line.split("=")[0].strip() for text in _SHIPPED for line in text.splitlines()})
_values = st.one_of(
    numbers,
    st.lists(numbers, max_size=4).map(",".join),
    st.sampled_from(
        [
            "RANSAC",
            "true",
            "None",
            "~",
            "~\0",
            "~nobody/x",
            "%(x)s",
            "${x}",
            "patchnetvlad",
            "netvlad",
        ]
    ),
    anything,
)
_settings = st.one_of(
    st.tuples(
        st.one_of(st.sampled_from(_KEYS), anything), st.sampled_from([" = ", ":", ""]), _values
    ).map("".join),
    st.sampled_from(
        [
            "[global_params]",
            "[GLOBAL_PARAMS]",
            "[DEFAULT]",
            "[train]",
            "[x]",
            "[",
            "[]",
            "  more",
            "#",
        ]
    ),
    anything,
    st.integers(300, 3000).map(lambda length: "k" * length + " = 1"),
)


@st.composite
def configurations(draw: st.DrawFn) -> str:
    """Draw a shipped configuration with a few lines changed."""
    text = draw(st.sampled_from(_SHIPPED)).splitlines()
    for _ in range(draw(st.integers(0, 4))):
        i = draw(st.integers(0, len(text)))
        text[i : i + draw(st.sampled_from([0, 1, 1, 5]))] = draw(st.lists(_settings, max_size=3))
    return "\n".join(text)


ini_files = damaged(encoded(st.one_of(configurations(), configurations(), lines(_settings))))


_TABLE = "image,lat,lon,heading\na.jpg,55.6761,12.5683,90\nb 1.png,55.6762,12.5684,91\n"
_POSES = [2 * b"1 0 0 1.5 0 1 0 2 0 0 1 3\n", b"1.0 1 2 3 0 0 0 1\n2.0 1 2 4 0 0 0 1\n"]
_POINT = '<trkpt lat="55.1" lon="12.2"><time>2024-01-01T00:00:0{}Z</time></trkpt>'
_TRACK = f"<gpx><trk><trkseg>{''.join(_POINT.format(n) for n in range(3))}</trkseg></trk></gpx>"
_CANDIDATES = "query,rank,index,score\n" + "".join(
    f'q{q},{rank},"i{rank}",0.5\n' for q in range(3) for rank in (2, 1)
)
_RANGES = '{"encoder": "ab", "images": 2, "inputs": [[-2.1, 2.6], [0.0, 700.5]]}'
_PAIRS = "# kapture format: 1.1\n# query_image, map_image, score\n"
_pairs = st.lists(
    st.tuples(
        st.sampled_from(["q0", "q1", "q2", "x"]),
        st.sampled_from([" ", ", ", ",", "  "]),
        st.sampled_from(["i0", "i1", "i2", "i3", "y"]),
        st.sampled_from(["", "", ", 0.5", ", nan", " 1"]),
    ).map("".join),
    max_size=8,
)


@st.composite
def pairs(draw: st.DrawFn) -> str:
    """Draw pairs of hloc or kapture; often each query has one."""
    separator = draw(st.sampled_from([" ", ", "]))
    whole = [f"q{q}{separator}i{i}" for q in range(3) for i in range(draw(st.integers(1, 1)))]
    return draw(st.sampled_from(["", "", _PAIRS])) + "\n".join(
        whole * draw(st.integers(0, 1)) + draw(_pairs) * draw(st.integers(0, 1))
    )


@functools.cache
def matlab_file() -> bytes:
    """A file in the layout of NetVLAD's data release."""
    from scipy.io import savemat

    fields = {
        "whichSet": "test",
        "dbImageFns": np.array([[f"0/{i}.jpg"] for i in range(3)], dtype=object),
        "utmDb": np.arange(6.0).reshape(2, 3),
        "qImageFns": np.array([[f"q/{i}.jpg"] for i in range(2)], dtype=object),
        "utmQ": np.arange(4.0).reshape(2, 2),
        "numImages": 3.0,
        "numQueries": 2.0,
        "posDistThr": 25.0,
        "posDistSqThr": 625.0,
        "nonTrivPosDistSqThr": 100.0,
    }
    file = io.BytesIO()
    savemat(file, {"dbStruct": fields})
    return file.getvalue()


# Parsers ---------------------------------------------------------------------------------------


def read_list(path: Path) -> None:
    images = ImageList.read(path)
    assert len(images.names) == len(images.lines) > 0
    assert list(images.lines) == sorted(set(images.lines))
    assert all(name.strip() and "\n" not in name and "\r" not in name for name in images.names)
    assert len(images.image_paths(path.parent)) == len(images)
    try:
        images.check_images(path.parent)
    except ImageListError as error:
        check_message(error, path)


def read_ground_truth(path: Path) -> None:
    for threshold in (30.0, None):
        truth = GroundTruth.load(path, threshold)
        for positions in (truth.utm_queries, truth.utm_index):
            assert positions.dtype == np.float64
            assert positions.ndim == 2
            assert np.isfinite(positions).all()
        assert truth.utm_queries.shape[1] == truth.utm_index.shape[1]
        assert truth.threshold >= 0
        truth.check_counts(len(truth.utm_queries), len(truth.utm_index), path)


def read_config(path: Path) -> None:
    config = Config.load(path)
    config.check_matching()
    assert Config.global_params(config)["num_pcs"] == str(config.num_pcs)


def read_predictions(path: Path) -> None:
    found = load_predictions(path, 3, 10)
    assert found.dtype == np.int64
    assert found.shape[0] == 3
    assert found.min() >= 0
    assert found.max() < 10


def read_table(path: Path) -> None:
    found = positions_from_table(path, ["a.jpg", "b 1.png"])
    assert found.values.shape == (2, 2)


def read_track(path: Path) -> None:
    read_gpx(path)


def read_poses(path: Path) -> None:
    found = positions_from_poses(path, ["1.0.png", "2.0.png"], in_order=True)
    assert found.values.shape == (2, 2)


def read_pairs(path: Path) -> None:
    found = load_candidates(path, ["q0", "q1", "q2"], ["i0", "i1", "i2", "i3"], 2)
    assert found.shape[0] == 3
    assert 0 <= found.min() <= found.max() < 4


def read_matlab(path: Path) -> None:
    found = read_pittsburgh(path)
    assert len(found.truth.utm_queries) == len(found.query_names)


def image_files() -> list[bytes]:
    """Make a small image in each of several formats."""
    pixels = np.random.default_rng(0).integers(0, 255, (24, 32, 3), dtype=np.uint8)
    made = []
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "GIF", "BMP", "PPM", "JPEG2000"):
        file = io.BytesIO()
        Image.fromarray(pixels).save(file, kind)
        made.append(file.getvalue())
    return made


def checkpoint_files() -> list[bytes]:
    """Make small checkpoints as ``torch.save`` writes them, old and new."""
    state = {"encoder.0.weight": torch.ones(2, 3), "module.pool.centroids": torch.zeros(4, 5)}
    made = []
    for content in (state, {"state_dict": state, "epoch": 3, "best_score": np.float64(0.5)}):
        for zipped in (True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=zipped)
            made.append(file.getvalue())
    return made


def read_image(path: Path) -> None:
    image = load_image(path)
    assert image.mode == "RGB"
    assert min(image.size) > 0
    assert native_size(path)[0] > 0


def read_checkpoint(path: Path) -> None:
    for key, value in load_state(path).items():
        assert isinstance(key, str)
        assert value.device.type == "cpu"


TARGETS = {
    "list": Target(lists, ".txt", read_list),
    "npz": Target(npz_files, ".npz", read_ground_truth),
    "ini": Target(ini_files, ".ini", read_config),
    "npy": Target(damaged(arrays() | arrays(["rows"])), ".npy", read_predictions),
    "csv": Target(csv_files | damaged(st.just(_TABLE.encode())), ".csv", read_table),
    "gpx": Target(damaged(encoded(st.just(_TRACK))), ".gpx", read_track),
    "poses": Target(damaged(st.sampled_from(_POSES)), ".txt", read_poses),
    "pairs": Target(damaged(encoded(pairs())), ".txt", read_pairs),
    "candidates": Target(damaged(st.just(_CANDIDATES.encode())), ".csv", read_pairs),
    "image": Target(damaged(st.sampled_from(image_files())), ".jpg", read_image),
    "checkpoint": Target(damaged(st.sampled_from(checkpoint_files())), ".pth.tar", read_checkpoint),
    "safetensors": Target(
        damaged(st.just(safetensors.torch.save({"encoder.0.weight": torch.ones(2, 3)}))),
        ".safetensors",
        read_checkpoint,
    ),
    "ranges": Target(damaged(st.just(_RANGES.encode())), ".json", read_ranges),
    "mat": Target(damaged(st.builds(matlab_file)), ".mat", read_matlab),
    **FEATURES,
    **API,
}


def try_file(target: Target, path: Path, content: bytes) -> bool:
    """Tell whether a file is read; fail unless it is, or is refused as it should be."""
    target.write(path, content)
    try:
        target.read(path)
    except PatchNetVLADError as error:
        check_message(error, path)
        return False
    finally:
        assert UNPICKLED not in os.environ, "a pickle was read"
    return True


def fuzz(target: Target, start: int, examples: int = EXAMPLES) -> Counter[bool]:
    """Feed a parser files, the same for the same ``start``; count those it reads and refuses."""
    counts: Counter[bool] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"file{target.suffix}"

        @seed(start)
        @settings(
            max_examples=examples,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(target.contents)
        def feed(content: bytes) -> None:
            counts[try_file(target, path, content)] += 1

        feed()
    return counts


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Feed the parsers broken files.")
    parser.add_argument("--minutes", type=float, default=10)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    arguments = parser.parse_args(argv)
    logging.disable()
    end = time.monotonic() + 60 * arguments.minutes
    wanted = list(dict.fromkeys(arguments.target or TARGETS))
    counts = {name: Counter[bool]() for name in wanted}
    for number in itertools.count():
        for name in wanted:
            if number and time.monotonic() > end:  # each has been fed
                break
            start = arguments.seed * 1_000_000 + number
            try:
                counts[name] += fuzz(TARGETS[name], start, SLOW.get(name, EXAMPLES))
            except Exception:
                print(f"{name}: failed with --seed {arguments.seed}, round {number}")
                raise
        if time.monotonic() > end:
            break
    for name, count in counts.items():
        print(f"{name}: {count[True]} files read, {count[False]} refused, none of them wrongly")
    return 0


if __name__ == "__main__":
    sys.exit(main())
