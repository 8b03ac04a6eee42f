# SPDX-License-Identifier: MIT
"""Re-ranking of single queries, with patches from a folder."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.engines.local_rerank import Matcher, one_thread
from patchnetvlad.engines.readers import as_matched
from patchnetvlad.errors import FeatureError, ImageError
from patchnetvlad.features.store.codec import (
    decode_map,
    decode_patches,
    encode_map,
    encode_patches,
)
from patchnetvlad.matching.fusion import fuse_scores, rank, raw_scores
from patchnetvlad.models.grid import PatchGrid
from patchnetvlad.places.adding import patch_tensors
from patchnetvlad.places.checks import check_description
from patchnetvlad.places.description import Description
from patchnetvlad.places.folder import PlaceFolder
from patchnetvlad.places.inputs import is_one

_STEP = 8  # candidates for each thread between two looks at the time
_QUERY = 0  # the number of any query, since there is one at a time


class Reranker:
    """Orders the candidates of a query by their patches.

    The threads that match are started for the first query, and kept for later ones. So are
    descriptors of candidates, within ``memory_mb`` of the configuration: images of an index never
    change.

    Parameters
    ----------
    folder : PlaceFolder
    """

    def __init__(self, folder: PlaceFolder) -> None:
        self._folder = folder
        self._model = folder.model
        self._matcher: Matcher | None = None
        self._closed = False
        # Of the query that is matched, the only one at a time; names of it and its candidates.
        self._query: tuple[list[Tensor], Sequence[PatchGrid]] = [], ()
        self._names: tuple[dict[int, str], dict[int, str]] = {}, {}

    def describe(self, image: Any, with_patches: bool) -> tuple[Description, list[Tensor]]:
        """Describe a query.

        Parameters
        ----------
        image : path, PIL image, array, tensor or Description
        with_patches : bool
            Whether it is to be re-ranked.

        Returns
        -------
        description : Description
        patches : list of Tensor [n_s, P]
            Its patches as they are compared: rounded as those of the folder are.

        Raises
        ------
        ImageError
            The image cannot be read, or there are several.
        FeatureError
            The description is of another model.
        """
        model = self._model
        if isinstance(image, Description):
            check_description(image, model, with_patches)
            return image, self._rounded(patch_tensors(image)) if with_patches else []
        if not is_one(image):
            raise ImageError("query takes one image; query several one after the other")
        (encoded,) = model.encode([image])
        if not with_patches:
            return model.described(encoded, []), []
        if self._folder.kind == "map":
            feature_map = decode_map(encode_map(encoded.feature_map), model.device)
            with self._as_in_matching():
                patches = model.patches(feature_map)
        else:
            patches = model.patches(encoded.feature_map)
        return model.described(encoded, patches), self._rounded(patches)

    def patches(self, row: int) -> Sequence[Tensor]:
        """Return the patches [n_s, P] of an image of the folder, the same as are compared."""
        with self._as_in_matching() if self._folder.kind == "map" else contextlib.nullcontext():
            return self._folder.patches(row)

    @contextlib.contextmanager
    def _as_in_matching(self) -> Iterator[None]:
        """Compute patches of feature maps as re-ranking does: in one thread.

        Their number decides on the order of sums, and so on rounding.
        """
        with self._model.turn, one_thread():
            yield

    def _rounded(self, patches: Sequence[Tensor]) -> list[Tensor]:
        kind = "float32" if self._folder.kind == "map" else self._folder.kind
        # A thread whose first work for PyTorch falls into another's matching keeps to one thread.
        with self._model.turn:
            arrays = encode_patches(patches, kind)
            return self._as_matched(decode_patches(arrays, kind, self._model.device))

    def _as_matched(self, patches: Sequence[Tensor]) -> list[Tensor]:
        return [as_matched(p, self._model.precision) for p in patches]

    def rerank(
        self,
        query: Description,
        patches: list[Tensor],
        rows: NDArray[np.int64],
        until: float | None = None,
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Order candidates; threads take turns.

        Parameters
        ----------
        query : Description
        patches : list of Tensor [n_s, P]
            Those of the query, as of :meth:`describe`.
        rows : ndarray [k] of int64
            Candidates, nearest first.
        until : float, optional
            Time, of :func:`time.monotonic`, after which no more candidates are compared; the first
            few always are.

        Returns
        -------
        scores : ndarray [m] of float64
            Raw scores of the m candidates that were compared, the nearest; larger is more similar.
        order : ndarray [m] of int64
            Which of them is first, second and so on.
        """
        config = self._model.config
        with self._model.turn:
            matcher = self._open()
            self._query = patches, query.grids
            self._names[0][_QUERY] = query.name
            self._names[1].update((row, self._folder.rows[row].key) for row in rows.tolist())
            try:
                with matcher.matching():
                    scores = np.concatenate(list(_compared(matcher, rows, until)))
            except BaseException:
                self._end_threads()  # which may go on with this query
                raise
            finally:
                self._query = [], ()
                self._names[1].clear()
        order = rank(np.arange(len(scores)), fuse_scores(scores, config.patch_weights))
        return raw_scores(scores[None], config.patch_weights)[0], order

    def _open(self) -> Matcher:
        """Return the matcher, which is made if there is none that can be used."""
        if self._closed:
            raise FeatureError(
                f"the index in {self._folder.path} is closed; PlaceIndex.load opens it"
            )
        if self._matcher is not None and not self._matcher.usable:
            self._end_threads()
        if self._matcher is None:
            self._model.config.check_matching()
            self._matcher = Matcher(
                self._model.config,
                self._model.device,
                (lambda _: self._query[0], self._candidate),
                (
                    lambda _: self._query[1],
                    lambda row: self._model.grids(self._folder.rows[row].size),
                ),
                self._names,
            )
        return self._matcher

    def _candidate(self, row: int) -> list[Tensor]:
        return self._as_matched(self._folder.patches(row))

    def _end_threads(self) -> None:
        matcher, self._matcher = self._matcher, None
        if matcher is not None:
            matcher.close()

    def close(self) -> None:
        """End the threads, and let nothing be re-ranked any more; waits for who does."""
        with self._model.turn:
            self._closed = True
            self._end_threads()

    def abandon(self) -> None:
        """End the threads of an index that nobody holds any more, without waiting for them."""
        matcher, self._matcher = self._matcher, None
        if matcher is not None:
            matcher.close(wait=False)


def _compared(
    matcher: Matcher, rows: NDArray[np.int64], until: float | None
) -> Iterator[NDArray[np.float64]]:
    """Yield scores [n, S] of candidates, a part at a time, as long as the next part has time."""
    step = len(rows) if until is None else _STEP * matcher.threads
    for start in range(0, len(rows), step):
        began = time.monotonic()
        ((_, scores),) = matcher.run([_QUERY], {_QUERY: rows[start : start + step]})
        yield scores
        now = time.monotonic()
        if until is not None and now + (now - began) > until:
            break
