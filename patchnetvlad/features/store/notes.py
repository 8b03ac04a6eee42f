# SPDX-License-Identifier: MIT
"""Notes: JSON files beside shards that say which records are in them.

A shard counts with its note, ``features-00012.json`` beside ``features-00012.bin``, until its
records are entered in an index. The jobs of ``--shard`` write notes, and workers that write to
object storage.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import astuple
from pathlib import Path

from patchnetvlad.base.files import digest
from patchnetvlad.base.text import one_line, parse_json
from patchnetvlad.errors import FeatureError
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.store.index import Record, shard_name


def note_name(shard: int) -> str:
    """Return the name of the note of a shard."""
    return str(Path(shard_name(shard)).with_suffix(".json"))


def encode_note(manifest: Manifest, records: Iterable[tuple[str, Record]]) -> bytes:
    """Return the note of a shard with these records, by the names of their images."""
    listed = [[name, *astuple(record)] for name, record in records]
    return json.dumps({"manifest": _digest(manifest), "records": listed}).encode()


def decode_note(text: bytes, manifest: Manifest, source: str) -> list[tuple[str, Record]]:
    """Return the records of a note; none if it is of an extraction with another manifest.

    FeatureError, which names ``source``, if it is damaged.
    """
    try:
        content = parse_json(text)
        if content["manifest"] != _digest(manifest):
            return []
        records = [(name, Record(*values)) for name, *values in content["records"]]
        for name, record in records:
            if not (isinstance(name, str) and record.is_possible):
                raise ValueError(f"{name!r} has an impossible record")
        return records
    except (ValueError, TypeError, KeyError) as error:
        raise FeatureError(
            f"{source} is damaged ({one_line(error)}); delete it, and run feature_extract again, "
            "which computes what is missing"
        ) from None


def _digest(manifest: Manifest) -> str:
    """Return what distinguishes this extraction from others into the same folder."""
    return digest([manifest.to_json()])
