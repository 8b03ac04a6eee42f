# SPDX-License-Identifier: MIT
"""The jobs of the commands, as functions: match whole data sets, match two images."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from patchnetvlad import __version__
from patchnetvlad.config import Config
from patchnetvlad.datasets.ground_truth import GroundTruth
from patchnetvlad.datasets.image_list import ImageList
from patchnetvlad.datasets.transforms import (
    check_side,
    input_transform,
    load_image,
    native_size,
)
from patchnetvlad.device import choose_device, choose_precision, describe_device
from patchnetvlad.errors import ConfigError, FeatureError, make_folder
from patchnetvlad.evaluation.kapture import write_pairs
from patchnetvlad.evaluation.recall import (
    format_recalls,
    queries_without_positives,
    recall_at_n,
)
from patchnetvlad.features.describe import Describer
from patchnetvlad.features.formats import NpyReader
from patchnetvlad.features.manifest import GLOBAL_FILE, check_checkpoint, digest
from patchnetvlad.features.store import StoreReader, open_reader
from patchnetvlad.geometry import PatchGrid, patch_grids
from patchnetvlad.matching.pair import PatchMatches, match_pair, similarity
from patchnetvlad.matching.rerank import GridReader, Journal, PatchReader, rerank
from patchnetvlad.retrieval import CUTOUTS, keep_best_cutout, load_predictions, retrieve

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class MatchResult:
    """What matching a data set gave.

    Attributes
    ----------
    query_names, index_names : tuple of str
        Names of Q and N images, as in the lists.
    retrieved : ndarray [Q, k] of int64
        Candidates by global descriptor (NetVLAD), best first: rows of the index list.
    reranked : ndarray [Q, k] of int64 or None
        The same by patches (Patch-NetVLAD); None for configurations without patches.
    patch_scores : ndarray [Q, k, S] of float64 or None
        Score at each patch size of each candidate in ``retrieved``; lower is better.
    n_values : tuple of int
    recalls : dict of str to ndarray [len(n_values)]
        Recall@N of ``"NetVLAD"`` and ``"PatchNetVLAD"``; empty without ground truth.
    num_without_positives : int
        Queries that have no right answer in the index; 0 without ground truth.
    """

    query_names: tuple[str, ...]
    index_names: tuple[str, ...]
    retrieved: NDArray[np.int64]
    reranked: NDArray[np.int64] | None
    patch_scores: NDArray[np.float64] | None
    n_values: tuple[int, ...]
    recalls: dict[str, NDArray[np.float64]]
    num_without_positives: int


def match_features(
    config: Config | str | Path,
    query_list: str | Path,
    index_list: str | Path,
    query_features: str | Path,
    index_features: str | Path,
    *,
    dataset_root: str | Path = "",
    ground_truth: str | Path | None = None,
    threshold: float | None = None,
    results_dir: str | Path | None = None,
    device: str = "auto",
    resume: bool = True,
    progress: bool = True,
) -> MatchResult:
    """Retrieve and re-rank the index images of every query, and compute recalls.

    Parameters
    ----------
    config : Config or str or Path
        A configuration, an INI file, or the name of a shipped configuration.
    query_list, index_list : str or Path
        Image lists, one image a line.
    query_features, index_features : str or Path
        Directories that ``feature_extract`` wrote, here or by the research code.
    dataset_root : str or Path, default ""
        Folder of the images; read only when images were not resized.
    ground_truth : str or Path, optional
        A ``.npz`` with ``utmQ``, ``utmDb`` and ``posDistThr``.
    threshold : float, optional
        Used in place of ``posDistThr``.
    results_dir : str or Path, optional
        Gets ``NetVLAD_predictions.txt``, ``PatchNetVLAD_predictions.txt`` and, with ground
        truth, ``recalls.txt``. While queries are re-ranked, a journal in it keeps what is done.
    device : str, default "auto"
    resume : bool, default True
        Take over the queries that an interrupted run with the same features and settings
        re-ranked.
    progress : bool, default True
        Show a progress bar on stderr.

    Returns
    -------
    MatchResult

    Raises
    ------
    PatchNetVLADError
        Bad input; all of it is noticed before matching begins, except missing or damaged patch
        files.
    """
    if not isinstance(config, Config):
        config = Config.load(config)
    config.check_matching()
    target = choose_device(device)
    queries, index = ImageList.read(query_list), ImageList.read(index_list)
    truth = None
    if ground_truth is not None:
        truth = GroundTruth.load(ground_truth, threshold)
        truth.check_counts(len(queries), len(index), ground_truth)
    elif threshold is not None:
        logger.info("a distance for positives has no effect without ground truth")
    query_reader = open_reader(query_features, queries.names, config, dataset_root)
    index_reader = open_reader(index_features, index.names, config, dataset_root)
    _check_same_model(query_reader, index_reader, config)
    if config.uses_patches and config.match_image_size == (0, 0):
        for images in (queries, index):
            images.check_images(dataset_root)  # their sizes will be read
    output = make_folder(results_dir) if results_dir is not None else None
    if output is not None:  # What an earlier run left must not be taken for this one's.
        for file in ("NetVLAD_predictions.txt", "PatchNetVLAD_predictions.txt", "recalls.txt"):
            (output / file).unlink(missing_ok=True)

    top_k = max(config.n_values)
    if config.predictions_path is not None:
        retrieved = load_predictions(config.predictions_path, len(queries), len(index))[:, :top_k]
    else:
        cutouts = config.dataset_name == "tokyo247" or "tokyo247" in str(ground_truth)
        retrieved = retrieve(
            query_reader.global_descriptors,
            index_reader.global_descriptors,
            top_k * CUTOUTS if cutouts else top_k,
            factory=config.faiss_index,
            index_path=config.faiss_index_path,
            gpu=target.type == "cuda",
        )
        if cutouts:
            logger.info("Tokyo 24/7: of the 12 cut-outs of a panorama, only the best counts")
            retrieved = keep_best_cutout(retrieved, top_k)
    if output is not None:
        write_pairs(output / "NetVLAD_predictions.txt", queries.names, index.names, retrieved)

    reranking = journal = None
    if config.uses_patches:
        logger.info("computing on %s", describe_device(target))
        readers, names = (query_reader, index_reader), (queries.names, index.names)
        if output is not None:
            journal = _journal(output, config, retrieved, readers, names, target, resume)
        with contextlib.closing(journal) if journal else contextlib.nullcontext():
            query_patches, index_patches = _patch_readers(config, readers, target)
            reranking = rerank(
                retrieved,
                query_patches,
                index_patches,
                _grid_reader(config, queries, dataset_root),
                _grid_reader(config, index, dataset_root),
                config,
                names=names,
                device=target,
                journal=journal,
                progress=progress,
            )
        if output is not None:
            write_pairs(
                output / "PatchNetVLAD_predictions.txt",
                queries.names,
                index.names,
                reranking.predictions,
            )

    recalls: dict[str, NDArray[np.float64]] = {}
    unanswerable = 0
    if truth is not None:
        positives = truth.positives()
        unanswerable = queries_without_positives(positives)
        recalls["NetVLAD"] = recall_at_n(retrieved, positives, config.n_values)
        if reranking is not None:
            recalls["PatchNetVLAD"] = recall_at_n(reranking.predictions, positives, config.n_values)
        if output is not None:
            lines = [
                line
                for method, values in recalls.items()
                for line in format_recalls(method, config.n_values, values)
            ]
            temporary = output / "recalls.txt.part"
            temporary.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            temporary.replace(output / "recalls.txt")
    if journal is not None:
        journal.remove()  # all that it led to is written
    return MatchResult(
        queries.names,
        index.names,
        retrieved,
        reranking.predictions if reranking else None,
        reranking.scores if reranking else None,
        config.n_values,
        recalls,
        unanswerable,
    )


@dataclass(frozen=True, eq=False)
class ImagePairResult:
    """What matching two images gave.

    Attributes
    ----------
    score : float
        Similarity: larger is more similar.
    matches : list of PatchMatches
        One a patch size.
    query_grids, candidate_grids : list of PatchGrid
        One a patch size; their key points are in px of the resized images.
    query_image, candidate_image : ndarray [H, W, 3] of uint8
        The images as the network saw them.
    """

    score: float
    matches: list[PatchMatches]
    query_grids: list[PatchGrid]
    candidate_grids: list[PatchGrid]
    query_image: NDArray[np.uint8]
    candidate_image: NDArray[np.uint8]


def match_images(
    config: Config | str | Path,
    first_image: str | Path,
    second_image: str | Path,
    *,
    device: str = "auto",
) -> ImagePairResult:
    """Match the patches of two images.

    Parameters
    ----------
    config : Config or str or Path
        A configuration with patchnetvlad pooling, an INI file, or the name of a shipped one.
    first_image : str or Path
        The query.
    second_image : str or Path
        The candidate.
    device : str, default "auto"

    Returns
    -------
    ImagePairResult

    Raises
    ------
    PatchNetVLADError
        Bad input.
    """
    if not isinstance(config, Config):
        config = Config.load(config)
    config.check_matching()
    if not config.uses_patches:
        raise ConfigError(
            f"{config.source}: matching two images needs pooling = patchnetvlad, "
            f"not {config.pooling}"
        )
    target = choose_device(device)
    images = [load_image(path) for path in (first_image, second_image)]
    height, width = config.match_image_size
    if height and width:
        images = [image.resize((width, height), Image.Resampling.BILINEAR) for image in images]
    for image, path in zip(images, (first_image, second_image), strict=True):
        check_side(path, (image.height, image.width), config.min_image_side)
    logger.info("computing on %s", describe_device(target))
    describer = Describer.load(config, target)
    transform = input_transform((0, 0))  # they are resized already
    described = [describer.describe(transform(image)[None])[0] for image in images]
    grids = [
        patch_grids((image.height, image.width), config.patch_sizes, config.strides)
        for image in images
    ]
    matches = match_pair(
        described[0].patches,
        described[1].patches,
        grids[0],
        grids[1],
        config.matcher,
        config.ransac,
    )
    return ImagePairResult(
        similarity(matches, config.patch_weights),
        matches,
        grids[0],
        grids[1],
        np.asarray(images[0]),
        np.asarray(images[1]),
    )


def _grid_reader(config: Config, images: ImageList, root: str | Path) -> GridReader:
    """Give the patch grids of each image: the same for all, unless sizes are native."""
    if config.match_image_size != (0, 0):
        grids = patch_grids(config.match_image_size, config.patch_sizes, config.strides)
        return lambda i: grids
    paths = images.image_paths(root)

    @functools.lru_cache(maxsize=4096)
    def read(i: int) -> Sequence[PatchGrid]:
        return patch_grids(native_size(paths[i]), config.patch_sizes, config.strides)

    return read


def _patch_readers(
    config: Config, readers: Sequence[StoreReader | NpyReader], device: torch.device
) -> list[PatchReader]:
    """Give patch descriptors on a device, read or computed from feature maps."""
    precision = choose_precision(config.precision, device)
    describer = None
    one_at_a_time = threading.Lock()  # on a GPU, whose memory a block fills

    def reads(reader: StoreReader | NpyReader) -> PatchReader:
        return lambda i: [_as_matched(p, precision) for p in reader.patches(i, device)]

    def computes(reader: StoreReader, describer: Describer) -> PatchReader:
        def patches(i: int) -> list[Tensor]:
            feature_map = reader.feature_map(i, device)
            with one_at_a_time if device.type != "cpu" else contextlib.nullcontext():
                described = describer.patches(feature_map)
            return [_as_matched(p, precision) for p in described]

        return patches

    found: list[PatchReader] = []
    for reader in readers:
        if not isinstance(reader, StoreReader) or reader.manifest.local_features != "map":
            found.append(reads(reader))
            continue
        if describer is None:
            check_checkpoint(reader.directory, reader.manifest, config)
            describer = Describer.load(config, device)
        found.append(computes(reader, describer))
    return found


def _as_matched(patches: Tensor, precision: str) -> Tensor:
    """Half precision doubles what a GPU's memory holds, and its speed."""
    return patches.half() if precision == "fast" and patches.device.type != "cpu" else patches


def _journal(
    output: Path,
    config: Config,
    retrieved: NDArray[np.int64],
    readers: Sequence[StoreReader | NpyReader],
    names: Sequence[Sequence[str]],
    device: torch.device,
    resume: bool,
) -> Journal:
    """Open the journal of a re-ranking; its name says what it is of."""
    words = [
        __version__,
        config.matcher,
        config.ransac,
        choose_precision(config.precision, device),
        device.type,
        config.patch_vlad,
        *map(str, (*config.patch_sizes, *config.strides, *config.match_image_size)),
        str(retrieved.shape),
        hashlib.sha256(retrieved.tobytes()).hexdigest(),
    ]
    for reader, listed in zip(readers, names, strict=True):
        have = reader.manifest
        words.append(have.to_json() if have else os.path.abspath(reader.directory))
        words.append(str((reader.directory / GLOBAL_FILE).stat().st_mtime_ns))
        words.append(digest(listed))
    path = output / f"rerank-{digest(words)[:16]}.journal"
    if not resume:
        path.unlink(missing_ok=True)
    journal = Journal(path, (retrieved.shape[1], len(config.patch_sizes)))
    if journal.scores:
        logger.info("%d of %d queries are re-ranked already", len(journal.scores), len(retrieved))
    return journal


def _check_same_model(
    queries: StoreReader | NpyReader, index: StoreReader | NpyReader, config: Config
) -> None:
    if queries.manifest is None or index.manifest is None:
        return
    # Patches of feature maps will be computed as the configuration says.
    for key, otherwise in (("checkpoint", ""), ("patch_vlad", config.patch_vlad)):
        ours = getattr(queries.manifest, key) or otherwise
        theirs = getattr(index.manifest, key) or otherwise
        if ours and theirs and ours != theirs:
            raise FeatureError(
                f"{queries.directory} and {index.directory} were extracted with different {key} "
                f"({ours[:12]} and {theirs[:12]}); extract both with the same"
            )
