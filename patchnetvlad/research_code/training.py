# SPDX-License-Identifier: MIT
"""The parts of training under the names and signatures of the research code.

``opt`` is a namespace of the command's options, ``config`` a ``ConfigParser`` with the section
``[train]``.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm import tqdm

from patchnetvlad.base.files import make_folder, new_file
from patchnetvlad.config_train import TrainConfig
from patchnetvlad.research_code.msls import MSLS
from patchnetvlad.training.clusters import cluster, sample_cells
from patchnetvlad.training.describe import describe_images
from patchnetvlad.training.validation import N_VALUES, recalls_of

logger = logging.getLogger(__name__)

Section = Mapping[str, Mapping[str, str]]


def get_clusters(
    cluster_set: MSLS,
    model: nn.Module,
    encoder_dim: int,
    device: torch.device,
    opt: Any,
    config: Section,
) -> None:
    """Cluster cells of index images to a file in ``opt.cache_path``.

    It is ``centroids/vgg16_mapillary_{num_clusters}_desc_cen.hdf5``, with ``centroids`` [K, D] and
    ``descriptors`` [M, D].

    Parameters
    ----------
    cluster_set : MSLS
        Whose ``dbImages`` are sampled.
    model : nn.Module
        With the child ``encoder``.
    encoder_dim : int
        Not used.
    device : torch.device
    opt : namespace
        With ``cache_path`` and ``threads``.
    config : mapping
        With the section ``[train]``.
    """
    settings = TrainConfig.from_sections(config)
    count = settings.num_clusters
    folder = make_folder(Path(opt.cache_path) / "centroids")
    encoder = model.get_submodule("encoder").to(device).eval()
    paths = [str(path) for path in cluster_set.dbImages]
    cells = sample_cells(encoder, paths, settings.for_images(opt.threads), seed=settings.seed)
    cluster(cells, count, settings.seed).save(folder / f"vgg16_mapillary_{count}_desc_cen.hdf5")


def train_epoch(
    train_dataset: Any,
    model: nn.Module,
    optimizer: Optimizer,
    criterion: Any,
    encoder_dim: int,
    device: torch.device,
    epoch_num: int,
    opt: Any,
    config: Section,
    writer: Any,
) -> None:
    """Train for one epoch, with triplets of a data set such as :class:`MSLS`.

    ``criterion`` gets anchors, positives and negatives [n, K * D]; what it returns is divided by
    n, so that it should sum up.

    Parameters
    ----------
    train_dataset : MSLS or another data set
        With ``qIdx``, ``new_epoch``, ``nCacheSubset``, ``update_subcache`` and ``collate_fn``.
    model : nn.Module
        With the children ``encoder`` and ``pool``.
    optimizer : Optimizer
    criterion : callable
    encoder_dim : int
        D.
    device : torch.device
    epoch_num : int
        From 0; for ``writer``.
    opt : namespace
        With ``threads``.
    config : mapping
        With the section ``[train]``.
    writer : SummaryWriter
        Gets ``Train/Loss``, ``Train/nNeg`` and ``Train/AvgLoss``.
    """
    settings = TrainConfig.from_sections(config)
    encoder, pool = model.get_submodule("encoder"), model.get_submodule("pool")
    size = settings.batch_size
    steps = epoch_num * -(-len(train_dataset.qIdx) // size)
    train_dataset.new_epoch()
    losses: list[float] = []
    for _ in range(train_dataset.nCacheSubset):
        model.eval()
        train_dataset.update_subcache(model, encoder_dim * pool_clusters(pool))
        model.train()
        batches = DataLoader(
            train_dataset,
            size,
            shuffle=True,
            num_workers=opt.threads,
            collate_fn=train_dataset.collate_fn,
        )
        for query, positive, negatives, counts, _ in tqdm(batches, desc="train", leave=False):
            images = torch.cat([query, positive, negatives]).to(device)
            counts = counts.to(device)
            split = [len(query), len(positive), len(negatives)]
            anchors, right, wrong = pool(encoder(images)).split(split)
            optimizer.zero_grad()
            pairs = (vectors.repeat_interleave(counts, dim=0) for vectors in (anchors, right))
            loss = criterion(*pairs, wrong) / len(negatives)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            writer.add_scalar("Train/Loss", losses[-1], steps + len(losses))
            writer.add_scalar("Train/nNeg", len(negatives), steps + len(losses))
    mean = float(np.mean(losses)) if losses else 0.0
    logger.info("epoch %d: loss %.4f", epoch_num, mean)
    writer.add_scalar("Train/AvgLoss", mean, epoch_num)


def pool_clusters(pool: nn.Module) -> int:
    """Return K of a pooling layer; 1 if it has no clusters."""
    return int(getattr(pool, "num_clusters", 1))


def val(
    eval_set: MSLS,
    model: nn.Module,
    encoder_dim: int,
    device: torch.device,
    opt: Any,
    config: Section,
    writer: Any,
    epoch_num: int = 0,
    write_tboard: bool = False,
    pbar_position: int = 0,
) -> dict[int, float]:
    """Compute recall@N of a data set, searching each city separately.

    Parameters
    ----------
    eval_set : MSLS
    model : nn.Module
        With the children ``encoder`` and ``pool``.
    encoder_dim : int
        Not used.
    device : torch.device
    opt : namespace
        With ``threads``.
    config : mapping
        With the section ``[train]``.
    writer : SummaryWriter
        Gets ``Val/Recall_N``, with ``write_tboard``.
    epoch_num : int, default 0
    write_tboard : bool, default False
    pbar_position : int, default 0
        Not used.

    Returns
    -------
    dict of int to float
        For N = 1, 5, 10, 20, 50, 100.
    """
    settings = TrainConfig.from_sections(config).for_images(opt.threads)

    def vectors(paths: NDArray[np.str_]) -> NDArray[np.float32]:
        found = describe_images(model.to(device).eval(), [str(path) for path in paths], settings)
        return np.asarray(found.vectors)

    queries, index = vectors(eval_set.qImages), vectors(eval_set.dbImages)
    hits, q, n = np.zeros(len(N_VALUES)), 0, 0
    ends = zip(eval_set.qEndPosList, eval_set.dbEndPosList, strict=True)
    for num_queries, num_index in ends:
        right = eval_set.all_pos_indices[q : q + num_queries]
        if num_queries:
            found = recalls_of(queries[q : q + num_queries], index[n : n + num_index], right)
            hits += found * num_queries
        q, n = q + num_queries, n + num_index
    recalls = {n: float(hit / max(q, 1)) for n, hit in zip(N_VALUES, hits, strict=True)}
    for number, value in recalls.items():
        logger.info("recall@%d: %.4f", number, value)
        if write_tboard:
            writer.add_scalar(f"Val/Recall_{number}", value, epoch_num)
    return recalls


def save_checkpoint(
    state: dict[str, Any], opt: Any, is_best_sofar: bool, filename: str = "checkpoint.pth.tar"
) -> None:
    """Write a checkpoint to ``opt.save_file_path``; the best also as ``model_best.pth.tar``.

    With ``opt.save_every_epoch``, its name is that of the epoch, ``checkpoint_epoch{N}.pth.tar``.

    Parameters
    ----------
    state : dict
        With ``epoch``.
    opt : namespace
        With ``save_file_path`` and ``save_every_epoch``.
    is_best_sofar : bool
    filename : str, default "checkpoint.pth.tar"
    """
    name = filename
    if opt.save_every_epoch:
        stem = filename.removesuffix(".pth.tar")
        name = f"{stem}_epoch{state['epoch']}.pth.tar"
    for each in (name, "model_best.pth.tar") if is_best_sofar else (name,):
        with new_file(Path(opt.save_file_path) / each) as temporary:
            torch.save(state, temporary)


def humanbytes(B: float) -> str:
    """Format a number of bytes, such as ``1.46 KB``."""
    size, unit = float(B), 0
    while size >= 1024 and unit < 4:
        size, unit = size / 1024, unit + 1
    return f"{size:.2f} {'KMGT'[unit - 1]}B" if unit else f"{size} Byte"
