# SPDX-License-Identifier: MIT
"""A map of places that grows and is asked: the second half of what a notebook or robot needs."""

from __future__ import annotations

import contextlib
import io
import itertools
import math
import numbers
import os
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence, Sized
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.base.files import make_folder, replace_text
from patchnetvlad.base.names import locate, normal_name
from patchnetvlad.datasets.image_list import check_names
from patchnetvlad.datasets.images import load_image, native_size
from patchnetvlad.engines.readers import as_matched
from patchnetvlad.engines.rerank import rerank_candidates
from patchnetvlad.errors import (
    ArgumentError,
    FeatureError,
    ImageError,
    KeyNotFoundError,
    OutputError,
    PatchNetVLADError,
)
from patchnetvlad.features.lock import LOCK_FILE, locked
from patchnetvlad.features.manifest import INDEX_FILE, SHARD_FILES
from patchnetvlad.features.npy_files import load_global_descriptors
from patchnetvlad.features.store.codec import (
    Arrays,
    decode_patches,
    encode_map,
    encode_patches,
    split_record,
)
from patchnetvlad.features.store.index import Record, StoreIndex, present_manifests
from patchnetvlad.features.store.records import RecordError, read_record
from patchnetvlad.features.store.writer import COMMIT_BYTES, StoreWriter
from patchnetvlad.matching.fusion import raw_scores
from patchnetvlad.places.answers import Answer, Place
from patchnetvlad.places.checks import check_model, check_types, hint_at_root, hold_images, path_of
from patchnetvlad.places.description import Description, Encoded
from patchnetvlad.places.folder import (
    FAISS_FILE,
    LIST_FILE,
    SCHEMA,
    check_on_disk,
    delete_folder,
    exchange_folder,
    has_places,
    is_replaceable,
    place_rows,
    position_of,
    storage_kind,
)
from patchnetvlad.places.inputs import ImageLike, is_one
from patchnetvlad.places.lock import ReadWriteLock
from patchnetvlad.places.model import PlaceModel
from patchnetvlad.search.growing import GrowingIndex

_COMMIT_SECONDS = 5.0
_JPEG_QUALITY = 85


class PlaceIndex:
    """Images of known places, to which more can be added at any time, and which can be asked.

    Features are kept in a feature store on disk, so that their number is bounded by the disk, and
    global descriptors in memory, in an index of FAISS (``faiss_index`` of the configuration, a
    kind that needs no training). What :meth:`add` has returned from is on the disk.

    Any number of threads may ask, while one adds; more that add take turns. So do threads that
    describe or re-rank, each of which uses all processors.

    Parameters
    ----------
    model : PlaceModel
        Of :func:`patchnetvlad.load_model`.
    path : str or Path, optional
        Folder to live in: new, or empty. By default a temporary one, which goes when the index
        does, unless :meth:`save` copies it.

    Raises
    ------
    FeatureError
        The folder is not empty; :meth:`load` opens an index.
    ConfigError
        The configuration's ``faiss_index`` needs training.
    OutputError
        The folder cannot be made.

    Examples
    --------
    >>> from patchnetvlad import PlaceIndex, load_model
    >>> from patchnetvlad.assets.data_files import demo_images
    >>> images = demo_images()
    >>> index = PlaceIndex(load_model("demo", device="cpu"))
    >>> index.add([images["flower"], images["tokyo_db"]], keys=["flower", "tokyo"])
    >>> answer = index.query(images["tokyo_query"])
    >>> answer.best.key
    'tokyo'
    """

    def __init__(self, model: PlaceModel, path: str | Path | None = None) -> None:
        check_types(model, path)
        folder = None if path is None else make_folder(path).absolute()
        if folder is not None and any(file.name != LOCK_FILE for file in folder.iterdir()):
            raise FeatureError(
                f"{folder} holds features already; PlaceIndex.load opens them, or name another "
                "folder"
                if present_manifests(folder)
                else f"{folder} is not empty; name another folder"
            )
        self._begin(model, storage_kind(model.config), folder)

    def _begin(
        self, model: PlaceModel, kind: str, path: Path | None, root: str | Path = ""
    ) -> None:
        self.model = model
        self._root = root
        self._kind = kind
        self._patch_sizes = model.config.patch_sizes if model.config.uses_patches else ()
        self._finalizer = None
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="patchnetvlad-"))
            self._finalizer = weakref.finalize(self, delete_folder, path, os.getpid())
        self.path = path
        self._keys: list[str] = []
        self._rows: dict[str, int] = {}  # by key, normalised as a path
        self._records: list[Record] = []
        self._positions: list[tuple[float, ...] | None] = []
        self._dimension = 0  # of positions; 0 while there are none
        self._sizes: list[tuple[int, int]] = []
        self._faiss = GrowingIndex(
            model.dimension, model.config.faiss_index, model.config.faiss_parameters
        )
        self._reading = ReadWriteLock()
        self._adding = threading.RLock()
        # Written, but not yet committed: key, position, size, global descriptor.
        self._pending: list[tuple[str, Any, tuple[int, int], NDArray[np.float32]]] = []
        self._writer: StoreWriter | None = None
        self._open = contextlib.ExitStack()
        self._extracted = False  # feature_extract wrote the features
        self._fixed = ""  # why nothing can be added
        self._closed = False

    def __repr__(self) -> str:
        return f"PlaceIndex({len(self)} images, {str(self.path)!r})"

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (str, os.PathLike)) and normal_name(key) in self._rows

    def __enter__(self) -> PlaceIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the N images, in the order in which they were added."""
        return tuple(self._keys)

    @property
    def positions(self) -> NDArray[np.float64] | None:
        """Positions [N, 2 or 3] of the images, NaN where there is none; None if there are none."""
        with self._reading.shared():
            known = list(self._positions)
        if self._dimension == 0:
            return None
        return np.array([p if p is not None else (math.nan,) * self._dimension for p in known])

    # --- adding -----------------------------------------------------------------------------------

    def add(
        self,
        images: Any,
        keys: str | Iterable[str] | None = None,
        positions: ArrayLike | Iterable[Any] | None = None,
        *,
        progress: bool = False,
    ) -> None:
        """Add images.

        Parameters
        ----------
        images : one image or several, or Descriptions
            As for :meth:`PlaceModel.describe`; or what that returned. Several are held in memory:
            of a long video, add one frame after the other.
        keys : str or sequence of str, optional
            What the images are called in answers; each once in the index, where ``a//b`` is
            ``a/b``. By default the path of an image, or ``image-`` and its number in the index.
        positions : array-like [n, 2 or 3], optional
            Where the images were taken, in any unit; None, or NaN in any coordinate, where that
            is not known.
        progress : bool, default False
            Show a progress bar on stderr.

        Raises
        ------
        ImageError
            Images cannot be read. All others have been added before this is raised.
        FeatureError
            A key is there already, keys or positions do not fit the images, or the disk is full;
            what was added before is kept.
        """
        self._check_open()
        one = is_one(images) or isinstance(images, Description)
        todo = [images] if one else hold_images(images)
        with self._adding:
            if self._fixed:
                raise FeatureError(f"nothing can be added to {self.path}: {self._fixed}")
            if todo:
                self._writing()  # before keys are looked up, which others may have added
            names = self._new_keys(todo, keys)
            where = self._new_positions(positions, len(todo))
            if not todo:
                return
            broken: list[str] = []
            try:
                self._add(todo, names, where, broken, progress)
            finally:
                self._commit()
            if broken:
                raise ImageError(
                    f"{len(broken)} of {len(todo)} images could not be read, all others were "
                    f"added: {'; '.join(broken[:5])}{'; ...' if len(broken) > 5 else ''}"
                )

    def _add(
        self,
        todo: Sequence[Any],
        names: Sequence[str],
        where: Sequence[tuple[float, ...] | None],
        broken: list[str],
        progress: bool,
    ) -> None:
        written, last = 0, time.monotonic()
        for i, image, descriptor, arrays, modified in self._features(todo, broken, progress):
            if not np.isfinite(descriptor).all():
                raise FeatureError(f"the global descriptor of {names[i]} is not finite")
            also = self._statement(names[i], where[i], image)
            try:
                self._writing().append(names[i], descriptor, arrays, also, modified)
            except BaseException:
                with contextlib.suppress(FeatureError):
                    self._commit()  # what is whole counts
                self._stop_writing()
                raise
            self._pending.append((names[i], where[i], image.shape[:2], descriptor))
            written += sum(array.nbytes for array in arrays)
            if written > COMMIT_BYTES or time.monotonic() - last > _COMMIT_SECONDS:
                self._commit()
                written, last = 0, time.monotonic()

    def _features(
        self, todo: Sequence[Any], broken: list[str], progress: bool
    ) -> Iterator[tuple[int, NDArray[np.uint8], NDArray[np.float32], Arrays, int]]:
        """Give place in ``todo``, image, global descriptor, arrays to store, time stamp."""
        ready = [isinstance(x, Description) for x in todo]
        if not any(ready):
            for x in self.model.encode(todo, progress=progress, broken=broken):
                yield x.place, x.image, x.descriptor, self._encode(x), x.modified
            return
        if not all(ready):
            raise FeatureError("add either images or descriptions, not both at once")
        if self._kind == "map":
            raise FeatureError(
                "descriptions cannot be added to an index that keeps feature maps "
                "(local_features = map); add the images"
            )
        for i, described in enumerate(todo):
            self._check_description(described, self.model.config.uses_patches)
            arrays = encode_patches(_tensors(described), self._kind)
            yield i, described.image, described.descriptor, arrays, 0

    def _encode(self, encoded: Encoded) -> Arrays:
        if self._kind == "map":
            return encode_map(encoded.feature_map)
        return encode_patches(self.model.patches(encoded.feature_map), self._kind)

    def _statement(
        self, key: str, position: tuple[float, ...] | None, image: NDArray[np.uint8]
    ) -> list[tuple[str, Sequence[Any]]]:
        jpeg = io.BytesIO()
        Image.fromarray(image).save(jpeg, "JPEG", quality=_JPEG_QUALITY)
        xyz = (*(position or ()), None, None, None)[:3]
        place = len(self._keys) + len(self._pending)
        values = (place, key, *xyz, *image.shape[:2], jpeg.getvalue())
        return [(SCHEMA, ()), ("INSERT INTO places VALUES (?, ?, ?, ?, ?, ?, ?, ?)", values)]

    def _writing(self) -> StoreWriter:
        """Return the writer; it keeps other processes from writing, from the first on."""
        if self._writer is None:
            with contextlib.ExitStack() as on_error:
                on_error.enter_context(locked(self.path))
                manifest = self.model.manifest([], self._kind)
                if (self.path / INDEX_FILE).is_file():
                    with contextlib.closing(StoreIndex(self.path)) as index:
                        manifest, names = index.manifest, index.names()
                        self._catch_up(index)
                else:
                    names = []
                writer = StoreWriter(self.path, names, manifest)
                on_error.callback(writer.close)
                writer.start()
                self._open = on_error.pop_all()
                self._writer = writer
        return self._writer

    def _stop_writing(self) -> None:
        self._writer = None
        self._open.close()

    def _commit(self) -> None:
        """Bring to the disk what was written, and let it be found."""
        writer = self._writer
        if not self._pending or writer is None:
            return
        pending, self._pending = self._pending, []
        try:
            try:
                writer.commit()
            finally:
                names = [normal_name(key) for key, *_ in pending]
                there = [i for i, name in enumerate(names) if name in writer.records]
                self._publish(
                    [pending[i][0] for i in there],
                    [writer.records[names[i]] for i in there],
                    [pending[i][1] for i in there],
                    [pending[i][2] for i in there],
                    [pending[i][3] for i in there],
                )
        except BaseException:
            # Whatever is on the disk and not in memory now, as after Ctrl-C, is caught up with
            # when the store is opened to write again.
            self._stop_writing()
            raise

    def _publish(
        self,
        keys: Sequence[str],
        records: Sequence[Record],
        positions: Sequence[tuple[float, ...] | None],
        sizes: Sequence[tuple[int, int]],
        descriptors: Sequence[NDArray[np.float32]],
    ) -> None:
        """Let images that are on the disk be found: FAISS last, which says what can be."""
        if not keys:
            return
        with self._reading.alone():
            self._dimension = next((len(p) for p in positions if p is not None), self._dimension)
            self._rows.update(
                {normal_name(key): i for i, key in enumerate(keys, start=len(self._keys))}
            )
            self._keys += keys
            self._records += records
            self._positions += positions
            self._sizes += sizes
            self._faiss.add(np.stack(descriptors))

    def _catch_up(self, index: StoreIndex) -> None:
        """Take over what was added to the folder, by another process or before an interruption."""
        with index.snapshot():
            names, records = index.names(), index.records()
            rows = place_rows(index) or []
        lists: tuple[list[Any], ...] = (self._keys, self._records, self._positions, self._sizes)
        done = min(*(len(known) for known in lists), len(self._faiss))
        if len(rows) != len(names) or names[:done] != [*map(normal_name, self._keys[:done])]:
            raise FeatureError(f"{self.path} has been changed by another process; load it again")
        for known in lists:
            del known[done:]
        new = names[done:]
        self._publish(
            [row[1] for row in rows[done:]],
            [records[name] for name in new],
            [position_of(row) for row in rows[done:]],
            [row[5:7] for row in rows[done:]],
            [self._head(name, records[name]) for name in new],
        )

    def _new_keys(self, todo: Sequence[Any], keys: str | Iterable[str] | None) -> list[str]:
        if keys is None:
            names = [x.name if isinstance(x, Description) else path_of(x) for x in todo]
            free = (
                name
                for number in itertools.count(len(self))
                if (name := f"image-{number:06d}") not in self._rows
            )
            names = [name or next(free) for name in names]
        elif isinstance(keys, (str, os.PathLike)):
            names = [os.fspath(keys)]
        elif isinstance(keys, Iterable):
            names = [os.fspath(key) if isinstance(key, os.PathLike) else key for key in keys]
        else:
            raise FeatureError(f"keys = {keys!r} are no texts")
        if len(names) != len(todo):
            raise FeatureError(f"there are {len(names)} keys for {len(todo)} images")
        seen: set[str] = set()
        check_names([key for key in names if isinstance(key, str)], LIST_FILE)
        for key in names:
            if not isinstance(key, str):
                raise FeatureError(f"the key {key!r} is no text; give a str")
            same = normal_name(key)
            if same in self._rows or same in seen:
                there = "in the index already" if same in self._rows else "given twice"
                raise FeatureError(f"the key {key!r} is {there}; each image needs its own (keys=)")
            seen.add(same)
        return names

    def _new_positions(self, positions: Any, count: int) -> list[tuple[float, ...] | None]:
        if positions is None:
            return [None] * count
        wanted = (self._dimension,) if self._dimension else (2, 3)
        try:
            if not isinstance(positions, np.ndarray):
                rows = [*positions]
                given = (len(row) for row in rows if isinstance(row, Sized))
                unknown = (math.nan,) * next(given, wanted[0])
                positions = [unknown if row is None else row for row in rows]
            values = np.asarray(positions, dtype=np.float64)
        except (TypeError, ValueError):
            raise FeatureError("positions must be numbers, two or three an image") from None
        values = values[None] if values.ndim == 1 and count == 1 else values
        if values.ndim != 2 or len(values) != count or values.shape[1] not in wanted:
            raise FeatureError(
                f"positions have shape {list(values.shape)}; needed is [{count}, "
                f"{' or '.join(map(str, wanted))}]"
            )
        if np.isinf(values).any():
            raise FeatureError("positions must be finite, or NaN where they are not known")
        return [None if np.isnan(row).any() else tuple(row.tolist()) for row in values]

    # --- asking -----------------------------------------------------------------------------------

    def query(
        self,
        image: ImageLike | Description,
        top_k: int = 5,
        rerank: bool = True,
        *,
        threshold: float | None = None,
        candidates: int = 100,
    ) -> Answer:
        """Find the places that an image shows.

        Parameters
        ----------
        image : path, PIL image, array, tensor or Description
            One image, as for :meth:`PlaceModel.describe`; or what that returned.
        top_k : int, default 5
            Places to be given, at most.
        rerank : bool, default True
            Let patches decide on the order. Without effect for models without patches.
        threshold : float, optional
            Least score of a match: where the first place's is lower, ``Answer.best`` is None.
        candidates : int, default 100
            Images that are re-ranked: the first of those retrieved by global descriptor; at
            least ``top_k``.

        Returns
        -------
        Answer

        Raises
        ------
        ImageError
            The image cannot be read.
        FeatureError
            Stored features are damaged, or the description is of another model.
        ArgumentError
            ``top_k`` or ``candidates`` is not a number from 1, or ``threshold`` is none.

        Notes
        -----
        The query's patches are rounded as those of the index are, so answers are those of
        ``patchnetvlad-feature-extract`` and ``patchnetvlad-feature-match``.
        """
        self._check_open()
        for what, value in (("top_k", top_k), ("candidates", candidates)):
            if not isinstance(value, numbers.Integral) or value < 1:
                raise ArgumentError(f"{what} = {value!r} must be a whole number from 1")
        if threshold is not None and (
            not isinstance(threshold, numbers.Real) or math.isnan(threshold)
        ):
            raise ArgumentError(f"threshold = {threshold!r} must be a number, or None")
        rerank = rerank and self.model.config.uses_patches
        query, patches = self._described_query(image, rerank)
        with self._reading.shared():
            k = min(max(top_k, candidates) if rerank else top_k, len(self._keys))
            distances, rows = self._faiss.search(query.descriptor, k)
        scores = -distances.astype(np.float64)
        order = np.arange(len(rows))
        if rerank and len(rows):
            scores, order = self._rerank(query, patches, rows)
        places = tuple(
            Place(
                self._keys[rows[i]],
                float(scores[i]),
                rank,
                float(distances[i]),
                self._positions[rows[i]],
                int(rows[i]),
            )
            for rank, i in enumerate(order[:top_k].tolist(), start=1)
        )
        return Answer(places, query, rerank, threshold, self)

    def _described_query(self, image: Any, with_patches: bool) -> tuple[Description, list[Tensor]]:
        """Describe a query; its patches as they are compared, too."""
        if isinstance(image, Description):
            self._check_description(image, with_patches)
            return image, self._rounded(_tensors(image)) if with_patches else []
        if not is_one(image):
            raise ImageError("query takes one image; ask for several one after the other")
        (encoded,) = self.model.encode([image])
        patches: list[Tensor] = []
        if with_patches and self._kind == "map":
            with self._one_thread():
                patches = self.model.patches(
                    _decoded_map(encode_map(encoded.feature_map), self.model)
                )
        elif with_patches:
            patches = self.model.patches(encoded.feature_map)
        rounded = self._rounded(patches) if with_patches else []
        return self.model.described(encoded, patches), rounded

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Compute patches of feature maps as re-ranking does: in one thread.

        Their number decides on the order of sums, and so on rounding.
        """
        with self.model.turn:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    def _rounded(self, patches: Sequence[Tensor]) -> list[Tensor]:
        kind = "float32" if self._kind == "map" else self._kind
        return self._as_matched(
            decode_patches(encode_patches(patches, kind), kind, self.model.device)
        )

    def _as_matched(self, patches: Sequence[Tensor]) -> list[Tensor]:
        return [as_matched(p, self.model.precision) for p in patches]

    def _rerank(
        self, query: Description, patches: list[Tensor], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the raw scores of candidates, and their order."""
        config = self.model.config
        with self.model.turn:
            found = rerank_candidates(
                np.arange(len(rows))[None],
                lambda _: patches,
                lambda i: self._as_matched(self._patches(int(rows[i]))),
                lambda _: query.grids,
                lambda i: self.model.grids(self._sizes[rows[i]]),
                config,
                names=([query.name], [self._keys[row] for row in rows]),
                device=self.model.device,
                progress=False,
            )
        return raw_scores(found.scores, config.patch_weights)[0], found.predictions[0]

    def _patches(self, row: int) -> list[Tensor]:
        """Read the patches of an image, or compute them from its feature map."""
        record = self._records[row]
        arrays = split_record(self._read(self._keys[row], record), record.arrays)[1:]
        if self._kind == "map":
            return self.model.describer.patches(_decoded_map(arrays, self.model))
        patches = decode_patches(arrays, self._kind, self.model.device)
        by_size = dict(zip(self._patch_sizes, patches, strict=True))
        return [by_size[size] for size in self.model.config.patch_sizes]

    def _head(self, key: str, record: Record) -> NDArray[np.float32]:
        """Read a global descriptor."""
        return np.frombuffer(self._read(key, record, head=True), np.float32)

    def _read(self, key: str, record: Record, *, head: bool = False) -> bytearray:
        """Read a record, or its head; FeatureError if it is not there as it was written."""
        try:
            return read_record(self.path, record, key, head=head)
        except RecordError as error:
            if not self.path.is_dir():
                raise FeatureError(
                    f"the folder of the index, {self.path}, is gone; load it again"
                ) from None
            raise FeatureError(
                f"the record of {key} in {self.path} {error.problem}; load a copy, or add its "
                "images to a new index"
            ) from None

    def image(self, key: str) -> NDArray[np.uint8]:
        """Return the image of a key, [H, W, 3] of uint8, as the network saw it.

        A JPEG of it is kept; but for features that ``feature_extract`` wrote, the image file is
        read, which must still be there.

        Raises
        ------
        KeyNotFoundError
            There is no such key.
        ImageError
            The file cannot be read.
        """
        row = self._row(key)
        with contextlib.closing(StoreIndex(self.path)) as index:
            found = has_places(index) and index.rows(
                "SELECT image FROM places WHERE place = ?", (row,)
            )
        if found and found[0][0]:
            return np.asarray(Image.open(io.BytesIO(found[0][0])).convert("RGB"))
        height, width = self._sizes[row]
        with hint_at_root(self._root):
            decoded = load_image(locate(self._root, self._keys[row]))
        return np.asarray(decoded.resize((width, height), Image.Resampling.BILINEAR))

    def description(self, key: str) -> Description:
        """Return the description of an image of the index, such as to match and plot it.

        Raises
        ------
        KeyNotFoundError
            There is no such key.
        FeatureError
            Its features are damaged.
        ImageError
            As of :meth:`image`.
        """
        row = self._row(key)
        image = self.image(key)
        config = self.model.config
        with self._one_thread() if self._kind == "map" else contextlib.nullcontext():
            found = self._patches(row) if config.uses_patches else []
        patches = tuple(p.cpu().numpy() for p in found)
        descriptor = self._head(self._keys[row], self._records[row]).copy()
        return Description(
            descriptor,
            patches,
            self.model.grids(self._sizes[row]),
            image,
            config,
            self._keys[row],
            self.model.checkpoint,
        )

    def _row(self, key: str) -> int:
        self._check_open()
        if not isinstance(key, (str, os.PathLike)):
            raise ArgumentError(f"the key {key!r} is no text; give a str")
        try:
            return self._rows[normal_name(key)]
        except KeyError:
            raise KeyNotFoundError(
                f"{os.fspath(key)!r} is not in the index of {len(self)} images"
            ) from None

    def _check_description(self, described: Description, with_patches: bool) -> None:
        ours, theirs = self.model.config, described.config
        for name in ("patch_sizes", "strides", "image_size", "pooling", "patch_vlad"):
            if getattr(ours, name) != getattr(theirs, name):
                raise FeatureError(
                    f"the description was made with {name} = {getattr(theirs, name)}, the index "
                    f"has {getattr(ours, name)}; describe with the index's model"
                )
        if len(described.descriptor) != self.model.dimension:
            raise FeatureError(
                f"the description has {len(described.descriptor)} dimensions, the index "
                f"{self.model.dimension}; describe with the index's model"
            )
        if described.checkpoint not in ("", self.model.checkpoint):
            raise FeatureError(
                "the description was made with other weights than the index; describe with the "
                "index's model"
            )
        if not with_patches:
            return
        grids = self.model.grids(described.image.shape[:2])
        shapes = [(len(grid), self.model.dimension) for grid in grids]
        if [patches.shape for patches in described.patches] != shapes:
            raise FeatureError(
                "the image was described without patches, as query(rerank=False) does"
                if not described.patches
                else "the patches of the description do not fit its image; describe it again"
            )

    # --- keeping ----------------------------------------------------------------------------------

    def save(self, path: str | Path | None = None) -> Path:
        """Complete the index on disk, or copy it to another folder.

        The folder is a feature store, too: with the list ``index.txt`` in it, it can be given to
        ``patchnetvlad-feature-match`` as the features of the index.

        Parameters
        ----------
        path : str or Path, optional
            By default the folder that the index lives in. Another one must be new or empty, or
            hold a saved index, which is then replaced. This index goes on living where it was.

        Returns
        -------
        Path

        Raises
        ------
        OutputError
            The folder holds something else, or cannot be written.
        """
        self._check_open()
        if not isinstance(path, (str, os.PathLike, type(None))):
            raise ArgumentError(f"path = {path!r} is no path")
        check_on_disk(path)
        given = self.path if path is None else Path(path)
        target = given.resolve()
        with self._adding:
            same = target == self.path.resolve()
            if same and self._finalizer is not None:
                raise OutputError("the index lives in a temporary folder; give save a path")
            if same and self._extracted:
                raise OutputError(
                    f"{self.path} is left as patchnetvlad-feature-extract wrote it; give save "
                    "another folder"
                )
            if same:
                self._complete(self.path)
                return given
            if target.exists() and not is_replaceable(target):
                raise OutputError(
                    f"{target} holds something other than a saved index; name another folder"
                )
            if not self.path.is_dir():
                raise OutputError(f"the folder of the index, {self.path}, is gone")
            parent = make_folder(target.parent)
            part = Path(tempfile.mkdtemp(prefix=f".{target.name}-", dir=parent))
            try:
                part.chmod(0o755)
                self._copy(part)
                exchange_folder(part, target)
            except PatchNetVLADError:
                raise
            except OSError as error:
                raise OutputError(
                    f"{target} cannot be written: {error.strerror or error}; name another folder"
                ) from None
            finally:
                shutil.rmtree(part, ignore_errors=True)
        return given

    def _copy(self, folder: Path) -> None:
        self._stop_writing()  # which commits nothing: what is added is committed
        if (self.path / INDEX_FILE).is_file():
            with contextlib.closing(StoreIndex(self.path)) as index:
                index.copy_to(folder / INDEX_FILE)
            # Shards after it: they only grow.
            for file in sorted(self.path.glob(SHARD_FILES)):
                shutil.copyfile(file, folder / file.name)
        self._complete(folder)

    def _complete(self, folder: Path) -> None:
        """Write what makes the folder a finished feature store."""
        self._stop_writing()
        with contextlib.ExitStack() as stack:
            stack.enter_context(locked(folder))
            if not (folder / INDEX_FILE).is_file():
                StoreIndex.create(folder, [], self.model.manifest([], self._kind)).close()
            index = StoreIndex(folder, writable=True)
            stack.callback(index.close)
            places = place_rows(index)  # perhaps more than this object knows of
            if places is not None and folder == self.path:
                self._catch_up(index)
            keys = self._keys if places is None else [row[1] for row in places]
            # Of other patch sizes than the model's, perhaps: only the list is new.
            listed = self.model.manifest(keys, self._kind)
            manifest = replace(
                index.manifest,
                images=listed.images,
                paths=listed.paths,
                num_images=listed.num_images,
            )
            about = ("UPDATE about SET value = ? WHERE key = 'manifest'", (manifest.to_json(),))
            rows = [
                ("INSERT INTO places VALUES (?, ?, NULL, NULL, NULL, ?, ?, NULL)", (i, key, *size))
                for i, (key, size) in enumerate(zip(self._keys, self._sizes, strict=True))
            ]
            index.add([], [(SCHEMA, ()), about, *(rows if places is None else [])])
            if keys:
                writer = StoreWriter(folder, keys, manifest)
                stack.callback(writer.close)
                writer.finish()
            replace_text(folder / LIST_FILE, [f"{key}\n" for key in keys])
            self._faiss.save(folder / FAISS_FILE)

    @classmethod
    def load(
        cls, path: str | Path, model: PlaceModel, *, dataset_root: str | Path = ""
    ) -> PlaceIndex:
        """Open an index that lives in a folder.

        Parameters
        ----------
        path : str or Path
            Of an index that was saved, or lived there, even if its process was killed; or features
            that ``patchnetvlad-feature-extract`` wrote into a store, which can be asked, and
            copied by :meth:`save`, but not added to.
        model : PlaceModel
            As the features were extracted with.
        dataset_root : str or Path, default ""
            Folder of the images, where ``patchnetvlad-feature-extract`` wrote the features of a
            list of relative names. A PlaceIndex keeps its images itself.

        Returns
        -------
        PlaceIndex

        Raises
        ------
        FeatureError
            There is no index, it is damaged, or it was made with another model.
        """
        check_types(model, path)
        folder = Path(path).absolute()
        if not (folder / INDEX_FILE).is_file():
            raise FeatureError(
                f"there is no index in {folder}: PlaceIndex.save writes one; features in .npy "
                "files are converted by patchnetvlad-store convert"
            )
        with contextlib.closing(StoreIndex(folder)) as stored, stored.snapshot():
            stored.check_whole()
            names, records, manifest = stored.names(), stored.records(), stored.manifest
            rows = place_rows(stored)
        check_model(folder, manifest, model)
        missing = [name for name in names if name not in records]
        if missing or len(set(names)) != len(names):
            raise FeatureError(
                f"{folder}: "
                + (f"{len(missing)} images have no features yet" if missing else "images repeat")
                + "; only complete features of images that are listed once can be searched"
            )
        index = cls.__new__(cls)
        index._begin(model, manifest.local_features, folder, dataset_root)
        if index._kind == "npy":  # of a model without patches
            index._kind = storage_kind(model.config)
        made = tuple(manifest.patch_sizes)
        if made and made != index._patch_sizes:
            index._patch_sizes = made
            index._fixed = f"it has patches of other sizes, too ({', '.join(map(str, made))})"
        if rows is None:
            index._extracted = True
            index._fixed = (
                "patchnetvlad-feature-extract wrote it; save() a copy and add to that, or extract "
                "with a longer list"
            )
            fixed = model.config.image_size
            with hint_at_root(dataset_root):
                sizes = [
                    fixed if fixed != (0, 0) else native_size(locate(dataset_root, name))
                    for name in names
                ]
            positions: list[tuple[float, ...] | None] = [None] * len(names)
        else:
            if [row[0] for row in rows] != list(range(len(names))):
                raise FeatureError(f"{folder / INDEX_FILE} is damaged: places and images differ")
            sizes = [(height, width) for *_, height, width in rows]
            positions = [position_of(row) for row in rows]
        index._keys = names if rows is None else [row[1] for row in rows]
        index._rows = {name: i for i, name in enumerate(names)}
        index._records = [records[name] for name in names]
        index._positions, index._sizes = positions, sizes
        index._dimension = next((len(p) for p in positions if p is not None), 0)
        start = index._faiss.load(folder / FAISS_FILE, len(names))
        index._faiss.add(index._descriptors(start))
        return index

    def _descriptors(self, start: int) -> NDArray[np.float32]:
        """Read the global descriptors of the images from ``start`` on."""
        with contextlib.suppress(FeatureError):
            return load_global_descriptors(self.path, self._keys)[start:]
        heads = [
            self._head(key, record)
            for key, record in zip(self._keys[start:], self._records[start:], strict=True)
        ]
        return np.stack(heads) if heads else np.empty((0, self.model.dimension), np.float32)

    def close(self) -> None:
        """Let go of the files; a temporary index is gone then."""
        with self._adding:
            self._stop_writing()
            self._closed = True
            if self._finalizer is not None:
                self._finalizer()

    def _check_open(self) -> None:
        if self._closed:
            raise FeatureError(f"the index in {self.path} is closed; PlaceIndex.load opens it")


def _tensors(described: Description) -> list[Tensor]:
    return [torch.from_numpy(patches) for patches in described.patches]


def _decoded_map(arrays: Arrays, model: PlaceModel) -> Tensor:
    (feature_map,) = arrays
    return torch.from_numpy(feature_map).to(model.device).float()
