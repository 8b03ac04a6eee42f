# SPDX-License-Identifier: MIT
"""The journal of re-ranking: scores of finished queries, used to resume a run."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import sqlite3
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from patchnetvlad.base.device import choose_precision
from patchnetvlad.base.files import digest, drop_link
from patchnetvlad.base.names import absolute
from patchnetvlad.config import Config
from patchnetvlad.encoders import DEFAULT
from patchnetvlad.errors import OutputError
from patchnetvlad.features.interface import Reader
from patchnetvlad.version import __version__

logger = logging.getLogger(__name__)

# Commits go to a log, which is synced when it is moved to the database, not once per query. With
# the lock held until the end, the log needs no shared memory, which network file systems lack.
_SETTINGS = ("locking_mode = EXCLUSIVE", "journal_mode = WAL", "synchronous = NORMAL")
_TABLE = """
CREATE TABLE IF NOT EXISTS scores (
    query INTEGER PRIMARY KEY, scores BLOB NOT NULL, crc INTEGER NOT NULL
)"""
_NOT_DAMAGED = ("locked", "unable to open", "readonly", "full", "disk I/O")  # in SQLite's messages


def open_journal(
    output: Path,
    config: Config,
    retrieved: NDArray[np.int64],
    readers: Sequence[Reader],
    names: Sequence[Sequence[str]],
    device: torch.device,
    resume: bool,
) -> Journal:
    """Open the journal of a re-ranking, which is named by a digest of its inputs.

    Parameters
    ----------
    output : Path
        Folder of the results.
    config : Config
    retrieved : ndarray [Q, k] of int64
        Candidates of each query.
    readers, names : sequence
        Of queries and index images: their features, and their lists.
    device : torch.device
    resume : bool
        Resume from an existing journal; False deletes it.

    Returns
    -------
    Journal
    """
    words = [
        __version__,
        config.matcher,
        config.ransac,
        choose_precision(config.precision, device),
        device.type,
        config.patch_vlad,
        *map(str, (*config.patch_sizes, *config.strides, *config.match_image_size)),
        *([] if config.encoder == DEFAULT else [config.encoder]),
        str(retrieved.shape),
        hashlib.sha256(retrieved.tobytes()).hexdigest(),
    ]
    for reader, listed in zip(readers, names, strict=True):
        have = reader.manifest
        words.append(have.to_json() if have else absolute(str(reader.directory)))
        words.append(reader.revision())
        words.append(digest(listed))
    path = output / f"rerank-{digest(words)[:16]}.journal"
    if not resume:
        path.unlink(missing_ok=True)
    journal = Journal(path, (retrieved.shape[1], len(config.patch_sizes)))
    if journal.scores:
        logger.info("%d of %d queries are re-ranked already", len(journal.scores), len(retrieved))
    return journal


class Journal:
    """Checkpoint file with the scores of finished queries, used to resume a run.

    It is an SQLite database. Each query is a transaction of its own, so a killed run loses none;
    a power cut can lose those of the last moments, which the operating system had not written yet.
    A file that is damaged, or not such a database, is replaced by an empty one.

    Parameters
    ----------
    path : Path
    shape : (int, int)
        Candidates k and patch sizes S.

    Attributes
    ----------
    scores : dict of int to ndarray [k, S] of float64
        By query, as they were when the file was opened; those with a wrong checksum are left out.

    Raises
    ------
    OutputError
        The file cannot be written, or another process is writing it.
    """

    def __init__(self, path: Path, shape: tuple[int, int]) -> None:
        self.path = path
        with self._errors():
            try:
                self._open(shape)
            except (sqlite3.DatabaseError, UnicodeError) as error:
                if any(sign in str(error) for sign in _NOT_DAMAGED):
                    raise
                self.remove()
                self._open(shape)

    def _open(self, shape: tuple[int, int]) -> None:
        drop_link(self.path)
        self._db = sqlite3.connect(self.path, isolation_level=None)
        for setting in _SETTINGS:
            self._db.execute(f"PRAGMA {setting}")
        (state,) = self._db.execute("PRAGMA quick_check(1)").fetchone()
        if state != "ok":
            raise sqlite3.DatabaseError(state)
        self._db.execute(_TABLE)
        self.scores: dict[int, NDArray[np.float64]] = {
            q: np.frombuffer(values, np.float64).reshape(shape)
            for q, values, crc in self._db.execute("SELECT query, scores, crc FROM scores")
            if isinstance(q, int)
            and 0 <= q < 2**32  # as far as checksums tell numbers from each other
            and isinstance(values, bytes)
            and len(values) == 8 * shape[0] * shape[1]
            and crc == _checksum(q, values)
        }

    def add(self, q: int, scores: NDArray[np.float64]) -> None:
        """Store the scores [k, S] of query ``q``."""
        values = np.ascontiguousarray(scores, dtype=np.float64).tobytes()
        with self._errors():
            self._db.execute(
                "INSERT OR REPLACE INTO scores (query, scores, crc) VALUES (?, ?, ?)",
                (q, values, _checksum(q, values)),
            )

    def close(self) -> None:
        """Close the file."""
        with contextlib.suppress(sqlite3.Error):  # of what could not be written before
            self._db.close()

    def remove(self) -> None:
        """Close the file and delete it."""
        self.close()
        for ending in ("", "-wal", "-journal"):
            self.path.with_name(f"{self.path.name}{ending}").unlink(missing_ok=True)

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            if "locked" in str(error):
                raise OutputError(
                    f"{self.path} is in use by another process; wait until that has ended, or "
                    "name another folder"
                ) from None
            raise OutputError(
                f"{self.path} cannot be written: {error}; the queries in it are kept, and the same "
                "command resumes from there"
            ) from None


def _checksum(q: int, values: bytes) -> int:
    return zlib.crc32(values, q)
