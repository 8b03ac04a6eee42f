# SPDX-License-Identifier: MIT
"""Re-ranking of one query after the other, with the patches that a folder keeps."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from patchnetvlad.engines.readers import as_matched
from patchnetvlad.engines.rerank import rerank_candidates
from patchnetvlad.errors import ImageError
from patchnetvlad.features.store.codec import decode_patches, encode_map, encode_patches
from patchnetvlad.features.store.reader import decode_map
from patchnetvlad.matching.fusion import raw_scores
from patchnetvlad.places.adding import patch_tensors
from patchnetvlad.places.checks import check_description
from patchnetvlad.places.description import Description
from patchnetvlad.places.folder import PlaceFolder
from patchnetvlad.places.inputs import is_one
from patchnetvlad.places.rows import Row


class Reranker:
    """Orders the candidates of a query by their patches.

    Parameters
    ----------
    folder : PlaceFolder
    """

    def __init__(self, folder: PlaceFolder) -> None:
        self._folder = folder
        self._model = folder.model

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
            with self._one_thread():
                patches = model.patches(feature_map)
        else:
            patches = model.patches(encoded.feature_map)
        return model.described(encoded, patches), self._rounded(patches)

    def patches(self, row: Row) -> list[Tensor]:
        """Return the patches [n_s, P] of an image of the folder, the same as are compared."""
        with self._one_thread() if self._folder.kind == "map" else contextlib.nullcontext():
            return self._folder.patches(row)

    @contextlib.contextmanager
    def _one_thread(self) -> Iterator[None]:
        """Compute patches of feature maps as re-ranking does: in one thread.

        Their number decides on the order of sums, and so on rounding.
        """
        with self._model.turn:
            threads = torch.get_num_threads()
            torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)

    def _rounded(self, patches: Sequence[Tensor]) -> list[Tensor]:
        kind = "float32" if self._folder.kind == "map" else self._folder.kind
        arrays = encode_patches(patches, kind)
        return self._as_matched(decode_patches(arrays, kind, self._model.device))

    def _as_matched(self, patches: Sequence[Tensor]) -> list[Tensor]:
        return [as_matched(p, self._model.precision) for p in patches]

    def rerank(
        self, query: Description, patches: list[Tensor], rows: NDArray[np.int64]
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Order candidates; threads take turns.

        Parameters
        ----------
        query : Description
        patches : list of Tensor [n_s, P]
            Those of the query, as of :meth:`describe`.
        rows : ndarray [k] of int64
            Candidates, nearest first.

        Returns
        -------
        scores : ndarray [k] of float64
            Raw scores of the candidates; larger is more similar.
        order : ndarray [k] of int64
            Which of the candidates is first, second and so on.
        """
        model, config = self._model, self._model.config
        known = [self._folder.rows[row] for row in rows.tolist()]
        with model.turn:
            found = rerank_candidates(
                np.arange(len(rows))[None],
                lambda _: patches,
                lambda i: self._as_matched(self._folder.patches(known[i])),
                lambda _: query.grids,
                lambda i: model.grids(known[i].size),
                config,
                names=([query.name], [row.key for row in known]),
                device=model.device,
                progress=False,
            )
        return raw_scores(found.scores, config.patch_weights)[0], found.predictions[0]
