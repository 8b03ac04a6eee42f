# SPDX-License-Identifier: MIT
"""Extraction and matching of whole data sets, under the names of the research code."""

from __future__ import annotations

import configparser
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from patchnetvlad.base.files import make_folder, replace_text
from patchnetvlad.config import Config
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.engines.engine import Extraction
from patchnetvlad.engines.local_extract import LocalExtractor
from patchnetvlad.errors import ConfigError
from patchnetvlad.evaluation.pairs import write_pairs
from patchnetvlad.evaluation.recall import format_recalls, recall_at_n
from patchnetvlad.features.manifest import Manifest
from patchnetvlad.features.open import open_writer
from patchnetvlad.features.plan import failed_error
from patchnetvlad.models.describer import Describer
from patchnetvlad.pipeline.match import rerank
from patchnetvlad.research_code.place_dataset import PlaceDataset

Sections = configparser.ConfigParser | Mapping[str, Mapping[str, str]]


def feature_extract(
    eval_set: PlaceDataset, model: nn.Module, device: torch.device, opt: Any, config: Sections
) -> None:
    """Extract the features of a data set with a given network.

    Parameters
    ----------
    eval_set : PlaceDataset
    model : nn.Module
        With the children ``encoder``, ``pool`` and, if there is whitening, ``WPCA``.
    device : torch.device
        Where the network is.
    opt : object
        With the attribute ``output_features_dir``: gets ``globalfeats.npy`` [N, P] and, for every
        image and patch size s, ``patchfeats_psize{s}_{stem}.npy`` [P, n_s]; or what
        ``local_features`` in ``config`` asks for.
    config : ConfigParser
        With ``[global_params]`` and ``[feature_extract]``.

    Raises
    ------
    PatchNetVLADError
        The configuration does not fit, images cannot be read, or the folder cannot be written.
    """
    settings = Config.from_mapping(config)
    if not any(key.lower() == "local_features" for key in config["feature_extract"]):
        settings = replace(settings, local_features="npy")
    images = _image_list("eval_set", (*eval_set.database, *(eval_set.queries or ())))
    manifest = Manifest.of(settings, images.names, "", root=eval_set.dataset_root_dir)
    output, paths = opt.output_features_dir, eval_set.images
    describer = Describer(model.to(device).eval(), memory_mb=settings.memory_mb)
    extraction = Extraction(settings, manifest, images, paths)
    extractor = LocalExtractor(extraction, [describer], progress=True)
    with open_writer(output, images.names, manifest, paths, resume=False) as writer:
        writer.start()
        failed = extractor.run(writer, range(len(images)), 0)
        if failed:
            raise failed_error(images, failed, output, 1)
        writer.finish(failed)


def feature_match(eval_set: PlaceDataset, device: torch.device, opt: Any, config: Sections) -> None:
    """Retrieve and re-rank for each query, and print recalls if there is ground truth.

    Parameters
    ----------
    eval_set : PlaceDataset
        With queries.
    device : torch.device
    opt : object
        With the attributes ``query_input_features_dir``, ``index_input_features_dir``,
        ``ground_truth_path`` (None: no recalls) and ``result_save_folder``, which gets the
        predictions and ``recalls.txt``; see :func:`patchnetvlad.rerank`.
    config : ConfigParser
        With ``[global_params]`` and ``[feature_match]``.

    Raises
    ------
    PatchNetVLADError
        Bad input.
    """
    if eval_set.queries is None:
        raise ConfigError("feature_match: the data set has no queries; give query_file_path")
    found = rerank(
        Config.from_mapping(config),
        _image_list("queries", eval_set.queries),
        _image_list("index", eval_set.database),
        opt.query_input_features_dir,
        opt.index_input_features_dir,
        dataset_root=eval_set.dataset_root_dir,
        ground_truth=opt.ground_truth_path,
        threshold=eval_set.posDistThr,
        results_dir=opt.result_save_folder,
        device=str(device),
    )
    for method, recalls in found.recalls.items():
        _print_recalls(method, found.n_values, recalls)


def compute_recall(
    gt: Sequence[Sequence[int] | NDArray[np.integer]],
    predictions: NDArray[np.integer] | Sequence[Sequence[int]],
    numQ: int,
    n_values: Sequence[int],
    recall_str: str = "",
) -> dict[int, float]:
    """Compute and print the recall@N of some predictions.

    Parameters
    ----------
    gt : sequence of numQ sequences of int
        Right index images of each query.
    predictions : [numQ, k] of int
        Best first.
    numQ : int
    n_values : sequence of int
        The N.
    recall_str : str, default ""
        Name of the method, for the printed lines.

    Returns
    -------
    dict of int to float
        Recalls by N, between 0 and 1.

    Raises
    ------
    ValueError
        There are not ``numQ`` of both.
    """
    if numQ != len(predictions):
        raise ValueError(f"numQ = {numQ}, but {len(predictions)} queries have predictions")
    recalls = recall_at_n(predictions, gt, n_values)
    _print_recalls(recall_str, n_values, recalls)
    return {n: float(recall) for n, recall in zip(n_values, recalls, strict=True)}


def write_kapture_output(
    opt: Any, eval_set: PlaceDataset, predictions: NDArray[np.integer], outfile_name: str
) -> None:
    """Write predictions [Q, k], best first, as pairs of paths in kapture's format.

    Parameters
    ----------
    opt : object
        With the attribute ``result_save_folder``.
    eval_set : PlaceDataset
    predictions : ndarray [Q, k] of int
        Rows of the index images.
    outfile_name : str
        Name of the file in that folder.

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    index, queries = eval_set.images[: eval_set.numDb], eval_set.images[eval_set.numDb :]
    path = make_folder(opt.result_save_folder) / outfile_name
    write_pairs(path, queries, index, predictions)
    print(f"Writing results to {path}")


def write_recalls_output(
    opt: Any,
    recalls_netvlad: Mapping[int, float],
    recalls_patchnetvlad: Mapping[int, float],
    n_values: Sequence[int],
) -> None:
    """Write ``recalls.txt`` to the folder ``opt.result_save_folder``.

    Parameters
    ----------
    opt : object
    recalls_netvlad, recalls_patchnetvlad : mapping of int to float
        As :func:`compute_recall` returns them.
    n_values : sequence of int

    Raises
    ------
    OutputError
        The file cannot be written.
    """
    path = make_folder(opt.result_save_folder) / "recalls.txt"
    both = {"NetVLAD": recalls_netvlad, "PatchNetVLAD": recalls_patchnetvlad}
    lines = [
        f"{line}\n"
        for method, recalls in both.items()
        for line in format_recalls(method, n_values, np.array([recalls[n] for n in n_values]))
    ]
    replace_text(path, lines)
    print(f"Writing recalls to {path}")


def _image_list(title: str, names: Sequence[str]) -> ImageList:
    return ImageList(Path(title), tuple(names), tuple(range(1, len(names) + 1)))


def _print_recalls(method: str, n_values: Sequence[int], recalls: NDArray[np.floating]) -> None:
    for line in format_recalls(method, n_values, recalls):
        print(f"====> {line}")
