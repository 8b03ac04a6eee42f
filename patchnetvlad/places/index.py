# SPDX-License-Identifier: MIT
"""A place index, which can grow and be queried."""

from __future__ import annotations

import io
import os
import tempfile
import time
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad.base.files import make_folder
from patchnetvlad.base.names import locate
from patchnetvlad.datasets.images import decode_image, load_image, native_size
from patchnetvlad.errors import (
    ArgumentError,
    ConfigError,
    FeatureError,
    KeyNotFoundError,
    OutputError,
)
from patchnetvlad.evaluation.confidence import find_confidence
from patchnetvlad.features.store.index import present_manifests
from patchnetvlad.pipeline.sequence import SequenceOptions
from patchnetvlad.places.adding import NewImages
from patchnetvlad.places.answers import Answer, Place
from patchnetvlad.places.checks import (
    check_model,
    check_path,
    check_query,
    check_types,
    hint_at_root,
    hold_images,
    new_keys,
    new_positions,
)
from patchnetvlad.places.description import Description, reshaped
from patchnetvlad.places.folder import DamagedRecordError, PlaceFolder, way_out
from patchnetvlad.places.inputs import ImageLike, is_one
from patchnetvlad.places.model import PlaceModel
from patchnetvlad.places.ranked import Ranked, is_sure, retrieved
from patchnetvlad.places.replacing import delete_folder, is_unused
from patchnetvlad.places.reranking import Reranker
from patchnetvlad.places.rows import Row, Rows
from patchnetvlad.places.saved import (
    FAISS_FILE,
    SavedPlaces,
    checksums,
    read_saved,
    storage_kind,
)
from patchnetvlad.places.sequence import PlaceSequence
from patchnetvlad.search.growing import GrowingIndex


class PlaceIndex:
    """A growing collection of images of known places, which can be queried.

    Features are kept in a feature store on disk, and global descriptors also in memory, in a FAISS
    index (``faiss_index`` of the configuration, of a type that needs no training). When
    :meth:`add` returns, its images are on disk. Patches that were compared with queries stay in
    memory, up to half of ``memory_mb``.

    Any number of threads may query while one adds; threads that add take turns. So do threads that
    extract features or re-rank, because each uses all processors.

    Parameters
    ----------
    model : PlaceModel
        From :func:`patchnetvlad.load_model`.
    path : str or Path, optional
        New or empty folder for the index. By default a temporary folder, which is deleted with
        the index; copy it with :meth:`save`.

    Raises
    ------
    FeatureError
        The folder is not empty; use :meth:`load` to open an index.
    ConfigError
        The configuration's ``faiss_index`` needs training.
    OutputError
        The folder cannot be created.

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
        if folder is not None and not is_unused(folder):
            raise FeatureError(
                f"{folder} holds features already; PlaceIndex.load opens them, or name another "
                "folder"
                if present_manifests(folder)
                else f"{folder} is not empty; name another folder"
            )
        self._begin(model, storage_kind(model.config), folder)

    def _begin(
        self,
        model: PlaceModel,
        kind: str,
        path: Path | None,
        patch_sizes: Sequence[int] = (),
        root: str | Path = "",
    ) -> None:
        self.model = model
        self._root = root
        config = model.config
        self._confidence = find_confidence(config, model.checkpoint)
        self._rows = Rows(
            GrowingIndex(model.dimension, config.faiss_index, config.faiss_parameters)
        )
        self._finalizer = None
        if path is None:
            path = Path(tempfile.mkdtemp(prefix="patchnetvlad-"))
            self._finalizer = weakref.finalize(self, delete_folder, path, os.getpid())
        self.path = path
        sizes = patch_sizes or (config.patch_sizes if config.uses_patches else ())
        self._folder = PlaceFolder(path, model, kind, self._rows, sizes)
        self._reranker = Reranker(self._folder)  # which must not refer to this object
        weakref.finalize(self, self._reranker.abandon)
        self._extracted = False  # feature_extract wrote the features
        self._fixed = ""  # why nothing can be added
        self._passed_over: set[int] = set()  # rows whose patches are damaged
        self._closed = False

    def __repr__(self) -> str:
        return f"PlaceIndex({len(self)} images, {str(self.path)!r})"

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, (str, os.PathLike)) and self._rows.find(key) is not None

    def __enter__(self) -> PlaceIndex:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def keys(self) -> tuple[str, ...]:
        """Keys of the N images, in the order in which they were added."""
        return self._rows.keys()

    @property
    def positions(self) -> NDArray[np.float64] | None:
        """Positions [N, 2 or 3] of the images, NaN where unknown; None if no image has one."""
        return self._rows.positions()

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
            As for :meth:`PlaceModel.describe`, or its result. Several images are held in memory
            together; add the frames of a long video one by one.
        keys : str or sequence of str, optional
            Names of the images in answers, unique in the index (``a//b`` is ``a/b``). By default
            the path of an image, or ``image-`` and its number in the index.
        positions : array-like [n, 2 or 3], optional
            Where the images were taken, in any unit; None, or NaN in any coordinate, if unknown.
        progress : bool, default False
            Show a progress bar on stderr.

        Raises
        ------
        ImageError
            Some images cannot be read. All others are added before this is raised.
        FeatureError
            A key already exists, keys or positions do not fit the images, or the disk is full;
            images added before are kept.
        """
        self._check_open()
        one = is_one(images) or isinstance(images, Description)
        todo = [images] if one else hold_images(images)
        with self._folder.adding:
            if self._fixed:
                raise FeatureError(f"nothing can be added to {self.path}: {self._fixed}")
            if todo:
                self._folder.start_writing()  # before keys are looked up: others may have added
            names = new_keys(todo, keys, self._rows)
            where = new_positions(positions, len(todo), self._rows.dimension)
            if not todo:
                return
            new = NewImages(todo, names, where)
            self._folder.add(new.features(self.model, self._folder.kind, progress))
            new.check_read()

    # --- querying ---------------------------------------------------------------------------------

    def query(
        self,
        image: ImageLike | Description,
        top_k: int = 5,
        rerank: bool = True,
        *,
        threshold: float | None = None,
        candidates: int = 100,
        min_confidence: float | None = None,
        budget_ms: float | None = None,
    ) -> Answer:
        """Find the places most similar to an image.

        Parameters
        ----------
        image : path, PIL image, array, tensor or Description
            One image, as for :meth:`PlaceModel.describe`, or its result.
        top_k : int, default 5
            Maximum number of places to return.
        rerank : bool, default True
            Re-rank by patches. No effect for models without patches. With ``rerank = auto`` in the
            configuration, queries are not re-ranked whose first answer is sure without.
        threshold : float, optional
            If the score of the first place is lower, ``Answer.best`` is None.
        candidates : int, default 100
            Number of images to retrieve by global descriptor and re-rank; at least ``top_k``.
        min_confidence : float, optional
            If the confidence of the first place is lower, ``Answer.best`` is None; 0 to 1.
        budget_ms : float, optional
            Time for the query, in ms. Candidates are re-ranked, the nearest first, as long as it
            lasts; describing the image and re-ranking the first few are done in any case. The
            answer is that for ``candidates = Answer.num_reranked``.

        Returns
        -------
        Answer

        Raises
        ------
        ImageError
            The image cannot be read.
        FeatureError
            Stored features are damaged, or the description is from a different model.
        ArgumentError
            ``top_k`` or ``candidates`` is less than 1, ``threshold`` is not a number, or
            ``budget_ms`` is negative.
        ConfigError
            ``min_confidence`` is given, and the index has no confidences.

        Notes
        -----
        Patches of the query are rounded like those of the index, so answers equal those of
        ``patchnetvlad-feature-extract`` and ``patchnetvlad-feature-match``.
        """
        self._check_open()
        began = time.monotonic()
        check_query(top_k, candidates, threshold, min_confidence, budget_ms)
        if min_confidence is not None and self._confidence is None:
            raise ConfigError(
                f"min_confidence = {min_confidence:g}: the confidences of these weights and "
                "settings are not known; set confidence in the configuration to a file of "
                "patchnetvlad calibrate-confidence"
            )
        rerank = rerank and self.model.config.uses_patches
        query, patches = self._reranker.describe(image, rerank)
        wanted = max(top_k, candidates) if rerank or self._confidence is not None else top_k
        until = None if budget_ms is None else began + budget_ms / 1000
        found = self._answer(query, patches, wanted, rerank, until)
        distances, rows, scores, order = found.distances, found.rows, found.scores, found.order
        places = tuple(
            Place(
                key=(known := self._rows[int(rows[i])]).key,
                score=float(scores[i]),
                rank=rank,
                distance=float(distances[i]),
                position=known.position,
                row=int(rows[i]),
                confidence=found.confidence if rank == 1 else None,
            )
            for rank, i in enumerate(order[:top_k].tolist(), start=1)
        )
        return Answer(
            places, query, found.reranked, threshold, self, min_confidence,
            len(rows) if found.reranked else 0,
        )  # fmt: skip

    def sequence(
        self,
        length: int = 10,
        *,
        method: str = "viterbi",
        speed: float = 1.0,
        traverses: str | Path = "auto",
        gap: float | None = None,
    ) -> PlaceSequence:
        """Begin a sequence of queries, in which those before help each.

        Parameters
        ----------
        length : int, default 10
            Queries that help each other: the one that is asked, and those before it.
        method : {"viterbi", "posterior", "lines"}, default "viterbi"
            See :mod:`patchnetvlad.search.sequences`.
        speed : float, default 1
            Expected motion from one query to the next, in index images.
        traverses, gap
            Traverses of the index images, by their keys, as for
            :func:`~patchnetvlad.datasets.traverses.find_traverses`, and where they are cut.

        Returns
        -------
        PlaceSequence

        Raises
        ------
        ArgumentError
            A value is out of range.
        ImageListError
            The traverses are not known.

        Examples
        --------
        >>> drive = index.sequence(10)  # doctest: +SKIP
        >>> for image in camera:  # doctest: +SKIP
        ...     print(drive.query(image).best)
        """
        options = SequenceOptions(length, 0, method, speed, traverses, gap)
        return PlaceSequence(self, options.search(1.0), traverses, gap)

    def _answer(
        self,
        query: Description,
        patches: list[Tensor],
        count: int,
        rerank: bool,
        until: float | None,
    ) -> Ranked:
        """Retrieve candidates and, if they are to be and not sure already, re-rank them.

        Images whose records are damaged are passed over in re-ranking.
        """
        config = self.model.config
        while True:
            passed_over = self._passed_over if rerank else set()
            distances, rows = self._rows.search(query.descriptor, count, passed_over)
            found = retrieved(distances, rows, self._confidence)
            if not rerank or is_sure(config, found):
                return found
            if not len(rows):
                return replace(found, reranked=True)  # of nothing
            try:
                scores, order = self._reranker.rerank(query, patches, rows, until)
                return found.reordered(scores, order, self._confidence, config)
            except DamagedRecordError as error:
                bad = self._folder.pass_over(rows.tolist()) | {error.row}
                self._passed_over |= bad
                if len(self._passed_over) >= len(self):  # nothing is left to answer with
                    raise

    def image(self, key: str) -> NDArray[np.uint8]:
        """Return the image of a key, [H, W, 3] of uint8, as seen by the network.

        The index keeps a JPEG of it, except for features written by ``feature_extract``: then the
        image file is read, and must still exist.

        Raises
        ------
        KeyNotFoundError
            There is no such key.
        ImageError
            The file cannot be read.
        """
        return self._image(self._find(key))[0]

    def picture(self, key: str) -> NDArray[np.uint8]:
        """Return the image of a key, [H, W, 3] of uint8, in its original aspect ratio, for viewing.

        Raises
        ------
        KeyNotFoundError
            There is no such key.
        ImageError
            As of :meth:`image`.
        """
        return reshaped(*self._image(self._find(key)))

    def _image(self, row: int) -> tuple[NDArray[np.uint8], float]:
        """Return an image as the network saw it, and its width over its height before that."""
        height, width = self._rows[row].size
        jpeg = self._folder.jpeg(row)
        if jpeg:
            pixels = np.asarray(decode_image(jpeg, f"that is kept of {self._rows[row].key!r}"))
            kept = Image.open(io.BytesIO(jpeg), formats=("JPEG",))  # not decoded again
            wide, tall = kept.info.get("jfif_density", (1, 1))
            return pixels, width / height * tall / wide
        with hint_at_root(self._root):
            decoded = load_image(locate(self._root, self._rows[row].key), (height, width))
        aspect = decoded.width / decoded.height
        return np.asarray(decoded.resize((width, height), Image.Resampling.BILINEAR)), aspect

    def description(self, key: str) -> Description:
        """Return the description of an index image, for example to match and plot it.

        Raises
        ------
        KeyNotFoundError
            There is no such key.
        FeatureError
            Its features are damaged.
        ImageError
            As of :meth:`image`.
        """
        row = self._find(key)
        image, aspect = self._image(row)
        found = self._reranker.patches(row) if self.model.config.uses_patches else []
        return Description(
            descriptor=self._folder.descriptor(row).copy(),
            patches=tuple(p.cpu().numpy() for p in found),
            grids=self.model.grids(self._rows[row].size),
            image=image,
            config=self.model.config,
            name=self._rows[row].key,
            checkpoint=self.model.checkpoint,
            aspect=aspect,
        )

    def _find(self, key: str) -> int:
        self._check_open()
        if not isinstance(key, (str, os.PathLike)):
            raise ArgumentError(f"the key {key!r} is not a text; give a str")
        row = self._rows.find(key)
        if row is None:
            raise KeyNotFoundError(f"{os.fspath(key)!r} is not in the index of {len(self)} images")
        return row

    # --- keeping ----------------------------------------------------------------------------------

    def save(self, path: str | Path | None = None) -> Path:
        """Complete the index on disk, or copy it to another folder.

        The folder is also a feature store: with the list ``index.txt`` in it,
        ``patchnetvlad-feature-match`` takes it as the features of the index.

        Parameters
        ----------
        path : str or Path, optional
            By default the folder of the index. Another folder must be new or empty, or hold a
            saved index, which is replaced. This index continues to use its own folder.

        Returns
        -------
        Path

        Raises
        ------
        OutputError
            The folder holds something else, or cannot be written.
        """
        self._check_open()
        check_path(path)
        given = self.path if path is None else Path(path)
        with self._folder.adding:
            if given.resolve() != self.path.resolve():
                self._folder.save_copy(given.resolve())
                return given
            if self._finalizer is not None:
                raise OutputError("the index lives in a temporary folder; give save a path")
            if self._extracted:
                raise OutputError(
                    f"{self.path} is left as patchnetvlad-feature-extract wrote it; give save "
                    "another folder"
                )
            if self._folder.damaged:
                count = len(self._folder.damaged)
                raise OutputError(f"{count} images are damaged; {way_out(self.path)}")
            self._folder.complete(self.path)
        return given

    @classmethod
    def load(
        cls, path: str | Path, model: PlaceModel, *, dataset_root: str | Path = ""
    ) -> PlaceIndex:
        """Open an index from a folder.

        Parameters
        ----------
        path : str or Path
            Folder of an index, saved or not, even if its process was killed; or a feature store
            written by ``patchnetvlad-feature-extract``, which can be queried, and copied by
            :meth:`save`, but not added to.
        model : PlaceModel
            The model with which the features were extracted.
        dataset_root : str or Path, default ""
            Root folder of the images, for features of a list of relative names from
            ``patchnetvlad-feature-extract``. A PlaceIndex stores its images itself.

        Returns
        -------
        PlaceIndex

        Raises
        ------
        FeatureError
            There is no index, it is damaged, or it was made with a different model.
        """
        check_types(model, path)
        if path is None:
            raise ArgumentError("path = None; name the folder of an index")
        folder = Path(path).absolute()
        saved = read_saved(folder)
        check_model(folder, saved.manifest, model)
        saved.check_complete(folder)
        kind, made = saved.manifest.local_features, tuple(saved.manifest.patch_sizes)
        if kind == "npy":  # of a model without patches
            kind = storage_kind(model.config)
        index = cls.__new__(cls)
        index._begin(model, kind, folder, made, dataset_root)
        if made and made != model.config.patch_sizes:
            index._fixed = f"it has patches of other sizes, too ({', '.join(map(str, made))})"
        if saved.is_index:
            rows = saved.rows()
        else:
            index._extracted = True
            index._fixed = (
                "patchnetvlad-feature-extract wrote it; save() a copy and add to that, or extract "
                "with a longer list"
            )
            rows = _extracted_rows(saved, model, dataset_root)
        index._restore(rows, saved)
        return index

    def _restore(self, rows: list[Row], saved: SavedPlaces) -> None:
        """Take over the images of a folder, but for those that are damaged."""
        faiss = self._rows.faiss
        known = faiss.load(self.path / FAISS_FILE, checksums(rows))
        self._folder.damaged.update(saved.damaged())
        whole, descriptors = self._folder.descriptors(rows[known:], saved.names)
        self._rows.restore([*rows[:known], *whole])
        if descriptors:
            faiss.add(np.stack(descriptors))
        if self._folder.damaged and not self._fixed:
            self._fixed = f"{len(self._folder.damaged)} images are damaged; {way_out(self.path)}"

    def close(self) -> None:
        """Release files, threads and memory; a temporary index is deleted."""
        with self._folder.adding:
            self._folder.stop_writing()
            self._closed = True
            self._reranker.close()
            if self._finalizer is not None:
                self._finalizer()

    def _check_open(self) -> None:
        if self._closed:
            raise FeatureError(f"the index in {self.path} is closed; PlaceIndex.load opens it")


def _extracted_rows(saved: SavedPlaces, model: PlaceModel, root: str | Path) -> list[Row]:
    """Return the images of features that ``feature_extract`` wrote; their sizes may be native."""
    fixed = model.config.image_size
    with hint_at_root(root):
        return [
            Row(
                name,
                saved.records[name],
                None,
                fixed if fixed != (0, 0) else native_size(locate(root, name)),
                place,
            )
            for place, name in enumerate(saved.names)
        ]
