# SPDX-License-Identifier: MIT
"""Targets of the fuzzer: feature stores, indexes of places, journals, and all JSON that is read."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import shutil
import sqlite3
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import thin
import torch
from fuzz_parts import Target, damaged, use_all
from hypothesis import strategies as st
from place_data import SMALL, picture

from patchnetvlad import PlaceIndex, PlaceModel, load_model
from patchnetvlad.config import Config
from patchnetvlad.engines.journal import Journal
from patchnetvlad.errors import ImageError, ImageListError
from patchnetvlad.evaluation.intervals import Bootstrap
from patchnetvlad.evaluation.metrics import evaluate_predictions
from patchnetvlad.evaluation.metrics_file import FORMAT
from patchnetvlad.features.convert import convert_features
from patchnetvlad.features.inspect import store_info, verify_features
from patchnetvlad.features.manifest import Manifest, read_manifest
from patchnetvlad.features.merge import merge_shares
from patchnetvlad.features.open import open_reader, open_writer
from patchnetvlad.features.store.codec import encode_patches
from patchnetvlad.features.store.reader import StoreReader
from patchnetvlad.features.store.share import Share, ShareFolder
from patchnetvlad.features.store.share_writer import open_share
from patchnetvlad.pipeline.record import Origin, RunRecord
from patchnetvlad.pipeline.run_record import read_run, write_run
from patchnetvlad.plots.curves import read_runs
from patchnetvlad.report.results import load_results
from patchnetvlad.search.index_file import load_or_build

NAMES = ["a.jpg", "b/c.jpg", "d.jpg"]
CONFIG = Config(
    num_pcs=4, patch_sizes=(2, 5), strides=(1, 2), patch_weights=(0.5, 0.5),
    image_size=(96, 128), match_image_size=(96, 128),
)  # fmt: skip
COUNTS = (35, 2)  # patches of both sizes on a map of 6 x 8 cells
TREE = dict[str, bytes]


def rows(count: int) -> Any:
    return torch.nn.functional.normalize(torch.randn(count, 4), dim=1)


def write_images(writer: Any, kind: str) -> None:
    for i in np.flatnonzero(~writer.done).tolist():
        writer.write(i, rows(1)[0].numpy(), encode_patches([rows(n) for n in COUNTS], kind))


def manifest(kind: str) -> Manifest:
    return Manifest.of(replace(CONFIG, local_features=kind), NAMES, "c" * 64, naming="path")


@functools.cache
def model() -> PlaceModel:
    """Load a thin network, from a data directory that lasts as long as the process."""
    home = Path(tempfile.mkdtemp(prefix="patchnetvlad-fuzz-"))
    thin.write_checkpoint(home)
    before = os.environ.get("PATCHNETVLAD_HOME")
    build = thin.checkpoint.build_encoder
    os.environ["PATCHNETVLAD_HOME"] = str(home)
    thin.use()
    try:
        return load_model(SMALL, device="cpu")
    finally:
        thin.checkpoint.build_encoder = build
        os.environ.pop("PATCHNETVLAD_HOME")
        if before is not None:
            os.environ["PATCHNETVLAD_HOME"] = before
        shutil.rmtree(home)


@functools.cache
def described() -> list[Any]:
    return model().describe([picture(i) for i in range(3)])


def tree_of(make: Callable[[Path], object]) -> TREE:
    """Return the files of a folder that is made."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder, "made")
        root.mkdir()
        make(root)
        files = [file for file in sorted(root.rglob("*")) if file.is_file()]
        return {str(file.relative_to(root)): file.read_bytes() for file in files}


def make_store(folder: Path, kind: str = "float16") -> None:
    with open_writer(folder, NAMES, manifest(kind)) as writer:
        writer.start()
        write_images(writer, kind)
        writer.finish()


def make_places(folder: Path) -> None:
    with PlaceIndex(model(), folder) as index:
        index.add(described()[:2], keys=["a", "b"], positions=[(1.0, 2.0), (3.0, 4.0)])
        index.save()


def make_shares(folder: Path) -> None:
    for i in range(2):
        share = Share(i, 2)
        mine = share.rows(NAMES, 2)
        listed = [NAMES[row] for row in mine]
        whole = manifest("float16")
        with open_share(folder, share, mine, listed, whole, [], resume=False) as writer:
            writer.start()
            for row in range(len(mine)):
                arrays = encode_patches([rows(n) for n in COUNTS], "float16")
                writer.write(row, rows(1)[0].numpy(), arrays)
            writer.finish()


def make_results(folder: Path) -> None:
    found = np.array([[0, 1], [1, 2]])
    origin = Origin(
        "2026-01-01T00:00:00+00:00", {"python": "3"}, "q.txt", "i.txt", "", "q", "i", None, 25.0,
        None, None, None, CONFIG,
    )  # fmt: skip
    scores = {"NetVLAD": np.array([[0.5, 0.25], [0.75, 0.0]])}
    record = RunRecord(("q0", "q1"), tuple(NAMES), found, None, None, (1,), {}, 0, scores)
    write_run(folder, replace(record, origin=origin))
    metrics = evaluate_predictions(
        found, [[0], [2]], (1, 2), scores["NetVLAD"], bootstrap=Bootstrap(2, resamples=20)
    )
    provenance = {"config": None, "ground_truth": None, "queries": {}, "citation": ""}
    content = {
        "format": FORMAT, "provenance": provenance, "methods": {"NetVLAD": metrics.to_dict()}
    }  # fmt: skip
    (folder / "metrics.json").write_text(json.dumps(content))


@functools.cache
def trees() -> dict[str, TREE]:
    torch.manual_seed(0)
    return {
        "store": tree_of(make_store),
        "int8": tree_of(lambda folder: make_store(folder, "int8")),
        "npy": tree_of(lambda folder: make_store(folder, "npy")),
        "places": tree_of(make_places),
        "shares": tree_of(make_shares),
        "results": tree_of(make_results),
    }


def plant(folder: Path, tree: TREE) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name, content in tree.items():
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)


# Damage ----------------------------------------------------------------------------------------

VALUES = st.one_of(
    st.sampled_from(
        [
            None, -1, 0, 1, 2**31, 2**62, 2**63 - 1, -(2**63), 1.5, float("inf"), "", "text",
            b"\xff", b"\0" * 16, "[" * 5000, '[["O", [2]]]', '[["<f4", [-1]]]', "{}", "[1, 2]",
            '[["<f4", [4]], ["<f2", [9999999999999]]]', '[["<f4", [4]], ["V0", [1, 1]]]',
        ]
    ),
    st.text(max_size=8).filter(lambda text: not any("\ud800" <= c <= "\udfff" for c in text)),
    st.integers(-(2**63), 2**63 - 1),
)  # fmt: skip
COLUMNS = {
    "about": ("key", "value"),
    "images": ("place", "name"),
    "records": (
        "name", "shard", "start", "bytes", "head", "arrays", "head_crc32", "crc32", "modified"
    ),
    "places": ("place", "key", "x", "y", "z", "height", "width", "image"),
    "scores": ("query", "scores", "crc"),
}  # fmt: skip
_SCHEMA = (
    "DROP TABLE {0}", "DELETE FROM {0}", "ALTER TABLE {0} RENAME TO other",
    "ALTER TABLE {0} ADD COLUMN more", "PRAGMA user_version = 7", "CREATE TABLE places (place)",
    "DROP TABLE {0}; CREATE TABLE {0} (place, name, value, key)",
    "DROP TABLE {0}; CREATE VIEW {0} AS SELECT 1 AS place, 2 AS name, 3 AS key, 4 AS value",
    "PRAGMA encoding = 'UTF-16'; VACUUM",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'CREATE TABLE {0} (' || x'ff'",
    "INSERT INTO {0} SELECT * FROM {0}",
)  # fmt: skip


class Statement(NamedTuple):
    """Damage in an SQLite file: what is executed there, whether it works or not."""

    text: str
    values: tuple[Any, ...] = ()


@st.composite
def statements(draw: st.DrawFn, tables: tuple[str, ...]) -> Statement:
    table = draw(st.sampled_from(tables))
    if draw(st.integers(0, 3)) == 0:
        return Statement(draw(st.sampled_from(_SCHEMA)).format(table))
    column = draw(st.sampled_from(COLUMNS[table]))
    where = draw(st.sampled_from(["", " LIMIT 1", " WHERE rowid = 2", " WHERE name = 'b/c.jpg'"]))
    return Statement(f"UPDATE OR REPLACE {table} SET {column} = ?{where}", (draw(VALUES),))


class Damage(NamedTuple):
    """What is changed in one of the trees: a file's bytes (None: it is gone), and statements."""

    tree: str
    file: str = ""
    content: bytes | None = b""
    statements: tuple[Statement, ...] = ()


@st.composite
def stores(draw: st.DrawFn) -> Damage:
    """Draw a store, an index of places, or files of another layout, of which one is damaged."""
    name = draw(st.sampled_from(["store", "store", "int8", "places", "places", "npy", "shares"]))
    tree = trees()[name]
    if "features.sqlite" in tree and draw(st.booleans()):
        tables = ("about", "images", "records", *["places"] * 2 * (name == "places"))
        some = draw(st.lists(statements(tables), min_size=0, max_size=2))
        return Damage(name, "", b"", tuple(some))
    file = draw(st.sampled_from([name for name in tree if not name.endswith("features.lock")]))
    changed = damaged(st.just(tree[file]), (0, 1, 1, 1, 3))
    return Damage(name, file, draw(st.one_of(changed, changed, changed, st.none(), st.just(b""))))


def execute(file: Path, some: tuple[Statement, ...]) -> None:
    with contextlib.closing(sqlite3.connect(file)) as db:
        for statement in some:
            with contextlib.suppress(sqlite3.Error), db:
                if statement.values:
                    db.execute(*statement)
                else:
                    db.executescript(statement.text)


def write_damage(folder: Path, damage: Damage) -> None:
    plant(folder, trees()[damage.tree])
    if damage.file:
        (folder / damage.file).unlink()
        if damage.content is not None:
            (folder / damage.file).write_bytes(damage.content)
    if damage.statements:
        execute(folder / "features.sqlite", damage.statements)
    (folder / "fuzz.txt").write_text(damage.tree)


# Readers ---------------------------------------------------------------------------------------


def read_store(folder: Path) -> None:
    """Use a folder in all ways; those that may change it come last, each on a copy."""
    tree = (folder / "fuzz.txt").read_text()
    (folder / "fuzz.txt").unlink()
    if tree == "places":
        uses: tuple[Callable[[Path], object], ...] = (ask, grow, read_records)
    elif tree == "shares":
        uses = (read_share, merge)
    elif tree == "npy":
        uses = (read_features, convert, extract)
    else:
        uses = (read_records, read_features, convert, extract)
    use_all(folder, [store_info, verify, *map(on_copy, (*uses, drop))])


def on_copy(use: Callable[[Path], object]) -> Callable[[Path], object]:
    def used(folder: Path) -> None:
        with tempfile.TemporaryDirectory() as above:
            copy = Path(above, folder.name)
            shutil.copytree(folder, copy)
            use(copy)

    return used


def verify(folder: Path) -> None:
    verify_features(folder, progress=False)


def drop(folder: Path) -> None:
    verify_features(folder, progress=False, drop=True)


def read_records(folder: Path) -> None:
    with contextlib.closing(StoreReader(folder)) as reader:
        everything = range(len(reader.names))
        ways = (reader.read, reader.descriptor, reader.shapes, reader.counts, reader.modified)
        for i in everything:
            use_all(folder, [lambda _, way=way, i=i: way(i) for way in ways])


def read_features(folder: Path) -> None:
    with contextlib.closing(open_reader(folder, NAMES, CONFIG)) as reader:
        assert reader.global_descriptors.shape == (3, 4)
        for i in range(3):
            assert [len(patches) for patches in reader.patches(i)] == list(COUNTS)


def convert(folder: Path) -> None:
    (folder.parent / "list.txt").write_text("".join(f"{name}\n" for name in NAMES))
    to = "npy" if (folder / "features.sqlite").exists() else "float32"
    target = folder.parent / f"{folder.name}-to"
    convert_features(
        folder, target, to, image_list=folder.parent / "list.txt", feature_names="path",
        progress=False,
    )  # fmt: skip


def extract(folder: Path) -> None:
    """Go on with what is there, as an extraction does."""
    kind = "float16" if (folder / "features.sqlite").exists() else "npy"
    with open_writer(folder, NAMES, manifest(kind)) as writer:
        write_images(writer, kind)
        writer.finish()


def read_share(folder: Path) -> None:
    for i in range(2):
        share = ShareFolder.read(folder / "shards" / f"{i}-of-2")
        assert len(share.names()) == len(share.rows)
        share.missing()
        store_info(share.directory)
        verify_features(share.directory, progress=False)


def merge(folder: Path) -> None:
    merge_shares(folder, progress=False)


def ask(folder: Path) -> None:
    with PlaceIndex.load(folder, model()) as index:
        assert len(index.keys) == len(index)
        for key in index.keys:
            with contextlib.suppress(ImageError):  # which names the image
                index.description(key)
        answer = index.query(described()[0], top_k=2)
        assert all(np.isfinite(place.score) for place in answer.places)
        assert index.positions is None or len(index.positions) == len(index)


def grow(folder: Path) -> None:
    with PlaceIndex.load(folder, model()) as index:
        index.save(folder.parent / f"{folder.name}-copy")
        index.add(described()[2], keys="c", positions=[(5.0, 6.0)])
        assert index.query(described()[2]).best is not None
        index.save()


# Journals --------------------------------------------------------------------------------------

SHAPE = (3, 2)


@functools.cache
def journal() -> bytes:
    def make(folder: Path) -> None:
        written = Journal(folder / "made", SHAPE)
        for q in range(4):
            written.add(q, np.full(SHAPE, q / 2))
        written.close()

    return tree_of(make)["made"]


def journals() -> st.SearchStrategy[Any]:
    return damaged(st.builds(journal), (0, 1, 3)) | st.lists(
        statements(("scores",)), max_size=2
    ).map(tuple)


def write_journal(path: Path, content: bytes | tuple[Statement, ...]) -> None:
    for file in path.parent.glob(f"{path.name}*"):
        file.unlink()
    path.write_bytes(content if isinstance(content, bytes) else journal())
    if not isinstance(content, bytes):
        execute(path, content)


def read_journal(path: Path) -> None:
    for again in range(2):  # damaged ones are replaced; then they are sound
        with contextlib.closing(Journal(path, SHAPE)) as opened:
            for q, scores in opened.scores.items():
                assert scores.shape == SHAPE
                assert (scores == q / 2).all() or again
            if again:
                assert opened.scores[2**20].tolist() == np.ones(SHAPE).tolist()
            opened.add(2**20, np.ones(SHAPE))


# JSON ------------------------------------------------------------------------------------------

DEEP = "[" * 3000 + "]" * 3000
RAW = [
    DEEP,
    "[" * 100_000,
    '{"a":' * 3000,
    "NaN",
    "-Infinity",
    "1e999",
    "9" * 5000,
    "1" + "0" * 400,
]
ODD = st.one_of(
    st.sampled_from([None, True, False, 0, -1, 1.5, 2**70, -(2**70), 1e300, "", "\ud800", "a\0b"]),
    st.sampled_from(
        ["NaN", "0/1", "../x", "\n\n\n", [], {}, [[]], [None], {"": None}, [{}], [1e99]]
    ),
    st.text(st.characters(), max_size=6),
    st.integers(3000, 6000).map(lambda length: "x" * length),
    st.sampled_from(range(len(RAW))).map(lambda i: f"@@RAW{i}@@"),
)


def places_in(tree: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Return the ways to all values of a tree of JSON."""
    items: Any = ()
    if isinstance(tree, (dict, list)):
        items = tree.items() if isinstance(tree, dict) else enumerate(tree)
    return [at, *(way for key, value in items for way in places_in(value, (*at, key)))]


def changed(tree: Any, at: tuple[Any, ...], how: str, value: Any) -> Any:
    """Return a tree with one value replaced or taken out, or with one more beside it."""
    if not at:
        return value
    copy = tree.copy()
    if len(at) > 1:
        copy[at[0]] = changed(copy[at[0]], at[1:], how, value)
    elif how == "replace":
        copy[at[0]] = value
    elif how == "remove":
        del copy[at[0]]
    elif isinstance(copy, dict):
        copy[value if isinstance(value, str) else "more"] = copy[at[0]]
    else:
        copy.append(value)
    return copy


@st.composite
def json_of(draw: st.DrawFn, text: bytes) -> bytes:
    """Draw JSON in which some values are others, missing, or not JSON at all."""
    tree = json.loads(text)
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        at = draw(st.sampled_from(places_in(tree)))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "more"]))
        tree = changed(tree, at, how, draw(ODD))
    written = json.dumps(tree)
    for i, raw in enumerate(RAW):
        written = written.replace(f'"@@RAW{i}@@"', raw)
    return written.encode()


@functools.cache
def built_index() -> TREE:
    return tree_of(lambda folder: load_or_build(DESCRIPTORS, "Flat", folder / "i.faiss", False))


DESCRIPTORS = np.eye(4, dtype=np.float32)


@st.composite
def json_files(draw: st.DrawFn) -> Damage:
    """Draw a folder of which a file of JSON is damaged."""
    name = draw(st.sampled_from(["results", "results", "npy", "shares", "faiss"]))
    tree = built_index() if name == "faiss" else trees()[name]
    file = draw(st.sampled_from([name for name in tree if name.endswith(".json")]))
    return Damage(name, file, draw(damaged(json_of(tree[file]))))


def write_json(folder: Path, damage: Damage) -> None:
    plant(folder, built_index() if damage.tree == "faiss" else trees()[damage.tree])
    (folder / damage.file).write_bytes(damage.content or b"")
    (folder / "fuzz.txt").write_text(damage.tree)


def read_json(folder: Path) -> None:
    tree = (folder / "fuzz.txt").read_text()
    (folder / "fuzz.txt").unlink()
    if tree == "results":
        use_all(folder, [read_run, lambda to: read_runs([to]), load])
    elif tree == "npy":
        text = (folder / "features.json").read_bytes()
        with contextlib.suppress(ImageListError):
            manifest = read_manifest(folder / "features.json")
            assert manifest is None or manifest.to_json().encode() or text
        use_all(folder, [store_info, verify, read_features, on_copy(convert), on_copy(extract)])
    elif tree == "shares":
        use_all(folder, [store_info, verify, read_share, on_copy(merge)])
    else:
        built = load_or_build(DESCRIPTORS, "Flat", folder / "i.faiss", False)
        assert built.ntotal == 4


def load(folder: Path) -> None:
    load_results(folder, None, None, None, None, None)


FEATURES = {
    "store": Target(st.deferred(stores), "", read_store, write_damage),
    "journal": Target(st.deferred(journals), ".journal", read_journal, write_journal),
    "json": Target(st.deferred(json_files), "", read_json, write_json),
}
