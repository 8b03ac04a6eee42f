# SPDX-License-Identifier: MIT
"""A data set of index images and queries, with the interface of the research code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.images import input_transform, load_image
from patchnetvlad.errors import GroundTruthError


class PlaceDataset(Dataset[Any]):
    """Index images followed by queries, as normalised tensors.

    Parameters
    ----------
    query_file_path : str or None
        Image list of the queries; None for a data set of index images alone.
    index_file_path : str
        Image list of the index.
    dataset_root_dir : str
        Folder that relative names lie under.
    ground_truth_path : str or None
        ``.npz`` with ``utmQ``, ``utmDb`` and ``posDistThr``.
    config : mapping
        A section with ``imageresizeH`` and ``imageresizeW``, px.
    posDistThr : float, optional
        Used in place of the ground truth's own.

    Attributes
    ----------
    images : list of str
        Paths: the index, then the queries.
    queries, database : list of str
        Names as in the lists.
    numQ, numDb : int
    dataset_root_dir : str
    utmQ, utmDb : ndarray [n, 2] or None
    posDistThr : float or None
    """

    def __init__(
        self,
        query_file_path: str | Path | None,
        index_file_path: str | Path,
        dataset_root_dir: str | Path,
        ground_truth_path: str | Path | None,
        config: Mapping[str, str],
        posDistThr: float | None = None,
    ) -> None:
        super().__init__()
        section = Config.global_params(config)
        index = ImageList.read(index_file_path)
        self.database = list(index.names)
        self.numDb = len(index)
        self.dataset_root_dir = str(dataset_root_dir)
        self.images = [str(path) for path in index.image_locations(dataset_root_dir)]
        self.queries: list[str] | None = None
        self.numQ: int | None = None
        if query_file_path is not None:
            queries = ImageList.read(query_file_path)
            self.queries = list(queries.names)
            self.numQ = len(queries)
            self.images += [str(path) for path in queries.image_locations(dataset_root_dir)]
        self.utmQ: NDArray[np.float64] | None = None
        self.utmDb: NDArray[np.float64] | None = None
        self.posDistThr: float | None = posDistThr
        self._truth: GroundTruth | None = None
        if ground_truth_path is not None:
            self._truth = GroundTruth.load(ground_truth_path, posDistThr)
            self.utmQ = self._truth.utm_queries
            self.utmDb = self._truth.utm_index
            self.posDistThr = self._truth.threshold
        self.positives: NDArray[Any] | None = None
        self.distances: NDArray[Any] | None = None
        self.resize = (int(section["imageresizeh"]), int(section["imageresizew"]))
        self.mytransform = input_transform(self.resize)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """Return (tensor [3, H, W], index)."""
        return self.mytransform(load_image(self.images[index], self.resize)), index

    def __len__(self) -> int:
        return len(self.images)

    def get_positives(self) -> NDArray[Any]:
        """Return for every query the index images within the threshold.

        Returns
        -------
        ndarray [Q] of object
            Arrays of int64, ascending.

        Raises
        ------
        GroundTruthError
            No ground truth was given.
        """
        if self.positives is None:
            if self._truth is None:
                raise GroundTruthError("the data set has no ground truth; give ground_truth_path")
            found = self._truth.positives()
            self.positives = np.empty(len(found), dtype=object)
            self.positives[:] = found
        return self.positives

    @staticmethod
    def parse_text_file(textfile: str | Path) -> tuple[list[str], int]:
        """Read an image list; return its names and their number."""
        names = list(ImageList.read(textfile).names)
        return names, len(names)

    @staticmethod
    def parse_gt_file(
        gtfile: str | Path,
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], float]:
        """Read ground truth; return ``utmQ``, ``utmDb`` and ``posDistThr``."""
        truth = GroundTruth.load(gtfile)
        return truth.utm_queries, truth.utm_index, truth.threshold
