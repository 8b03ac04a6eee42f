# SPDX-License-Identifier: MIT
"""Training with triplets: mine, step, validate, save, epoch by epoch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

from patchnetvlad.base.device import count_cpus, serial_pool
from patchnetvlad.config_train import TrainConfig
from patchnetvlad.engines.local_extract import Decoder
from patchnetvlad.models.backbones import frozen_part
from patchnetvlad.training.describe import describe_images
from patchnetvlad.training.files import Progress, save_training
from patchnetvlad.training.history import History
from patchnetvlad.training.losses import triplet_loss
from patchnetvlad.training.mining import Triplet, draw_queries, mine
from patchnetvlad.training.tuples import Area, TupleSet
from patchnetvlad.training.validation import validate

logger = logging.getLogger(__name__)


class Board(Protocol):
    """Logs numbers, like TensorBoard's SummaryWriter."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
        """Log a number."""


@dataclass(eq=False)
class Training:
    """A network in training.

    Attributes
    ----------
    network : nn.Module
        With the children ``encoder`` and ``pool``, on the device where it is trained.
    optimiser : Optimizer
    config : TrainConfig
    data : TupleSet
    areas : sequence of Area
        For validation.
    threads : int
        That decode images; 0 chooses their number.
    board : Board or None
    bars : bool
        Show progress bars.
    """

    network: nn.Module
    optimiser: Optimizer
    config: TrainConfig
    data: TupleSet
    areas: Sequence[Area]
    threads: int = 0
    board: Board | None = None
    bars: bool = True

    def describe(
        self, paths: Sequence[Path | str]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Extract features with the current network; see :class:`DescribeAll`."""
        found = describe_images(self.network, paths, self.config.for_images(self.threads))
        readable = np.ones(len(paths), dtype=bool)
        readable[list(found.broken)] = False
        for error in found.broken.values():
            logger.info("passed over: %s", error)
        return found.vectors, readable


def freeze(encoder: nn.Module) -> None:
    """Freeze an encoder, except for its last block; see :func:`frozen_part`."""
    for part in frozen_part(encoder):
        part.requires_grad_(False)


def make_optimiser(network: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the optimiser of the trainable parameters."""
    trained = [p for p in network.parameters() if p.requires_grad]
    rate = config.learning_rate
    if config.optimiser == "ADAM":
        return torch.optim.Adam(trained, lr=rate)
    return torch.optim.SGD(
        [{"params": trained, "initial_lr": rate}],  # which PyTorch's own schedules go on from
        lr=rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def train(
    training: Training,
    folder: Path,
    epochs: int,
    progress: Progress,
    *,
    keep: bool = False,
    history: History | None = None,
) -> Progress:
    """Train for some epochs; save after each.

    All that is drawn by chance follows from the seed and the number of the epoch, so that training
    which goes on from a checkpoint ends with the weights of training that was never interrupted.

    Parameters
    ----------
    training : Training
    folder : Path
        Gets ``checkpoint.pth.tar`` and ``model_best.pth.tar``.
    epochs : int
        To do in all, with those that ``progress`` has done.
    progress : Progress
        Where training starts.
    keep : bool, default False
        Keep a checkpoint of each epoch.
    history : History, optional
        Gets the loss and the recalls of each epoch.

    Returns
    -------
    Progress
        Where it ended: after ``epochs``, or when recall@5 had not improved for ``patience``
        epochs.
    """
    config = training.config
    while progress.epoch < epochs:
        loss = train_epoch(training, progress.epoch)
        done = progress.epoch + 1
        logger.info("epoch %d: loss %.6f", done, loss)
        best = False
        progress = replace(progress, epoch=done)
        judged = bool(training.areas) and done % config.epochs_a_validation == 0
        if judged:
            progress, best = _judge(training, progress)
        save_training(folder, training.network, training.optimiser, progress, best=best, keep=keep)
        if history is not None:
            history.add(done, loss, progress.recalls if judged else {})
        waited = progress.not_improved * config.epochs_a_validation
        if config.patience and waited >= config.patience:
            logger.info("recall@5 has not improved for %d epochs: this is the end", waited)
            break
    return progress


def train_epoch(training: Training, epoch: int) -> float:
    """Train for one epoch; return the mean loss of its steps.

    Parameters
    ----------
    training : Training
    epoch : int
        Its number, from 0.

    Returns
    -------
    float
    """
    config = training.config
    random = np.random.default_rng([config.seed, epoch])
    if config.optimiser == "SGD":
        for group in training.optimiser.param_groups:
            factor = config.step_factor ** (epoch // config.step_epochs)
            group["lr"] = config.learning_rate * factor
    losses: list[float] = []
    first_step = epoch * -(-len(training.data.queries) // config.batch_size)
    subsets = draw_queries(training.data, config.cached_queries, random)
    title = f"epoch {epoch + 1}"
    with tqdm(total=len(training.data.queries), desc=title, disable=not training.bars) as bar:
        for queries in subsets:
            triplets = mine(
                training.data,
                queries,
                training.describe,
                random,
                cached_negatives=config.cached_negatives,
                num_negatives=config.num_negatives,
            )
            order = random.permutation(len(triplets))
            chosen = [triplets[i] for i in order]
            losses += learn(training, chosen, first_step + len(losses))
            bar.set_postfix(loss=f"{np.mean(losses):.4f}" if losses else "none")
            bar.update(len(queries))
    mean = float(np.mean(losses)) if losses else 0.0
    if not losses:
        logger.info("epoch %d: there was no triplet; nothing was learnt", epoch + 1)
    if training.board is not None:
        training.board.add_scalar("Train/AvgLoss", mean, epoch + 1)
    return mean


def learn(training: Training, triplets: Sequence[Triplet], steps: int = 0) -> list[float]:
    """Take a step for each batch of triplets; return the losses.

    Parameters
    ----------
    training : Training
    triplets : sequence of Triplet
    steps : int, default 0
        Made before, for the board.

    Returns
    -------
    list of float
    """
    network, config, data = training.network, training.config, training.data
    device = next(network.parameters()).device
    size = config.batch_size
    batches = [triplets[first : first + size] for first in range(0, len(triplets), size)]
    paths = [_paths(data, batch) for batch in batches]
    losses = []
    network.train()
    with contextlib.closing(_decoded(paths, config, training.threads)) as decoded:
        for batch, images in zip(batches, decoded, strict=True):
            training.optimiser.zero_grad()
            loss = batch_loss(network, images.to(device), batch, config.margin)
            loss.backward()
            training.optimiser.step()
            losses.append(loss.item())
            if training.board is not None:
                step, negatives = steps + len(losses), len(images) - 2 * len(batch)
                training.board.add_scalar("Train/Loss", losses[-1], step)
                training.board.add_scalar("Train/nNeg", negatives, step)
    network.eval()
    return losses


def batch_loss(
    network: nn.Module, images: Tensor, batch: Sequence[Triplet], margin: float
) -> Tensor:
    """Compute the loss of a batch of B triplets.

    Parameters
    ----------
    network : nn.Module
    images : Tensor [2 B + n, 3, H, W] of float32
        Queries, positives, then the negatives of each triplet.
    batch : sequence of Triplet
    margin : float

    Returns
    -------
    Tensor []
    """
    encoder, pool = network.get_submodule("encoder"), network.get_submodule("pool")
    vectors = pool(encoder(images))  # [2 B + n, K * D]
    counts = torch.tensor([len(triplet.negatives) for triplet in batch], device=vectors.device)
    queries, positives, negatives = vectors.split([len(batch), len(batch), int(counts.sum())])
    return triplet_loss(queries, positives, negatives, counts, margin)


def _judge(training: Training, progress: Progress) -> tuple[Progress, bool]:
    """Validate; return what has come of it, and whether it is the best so far."""
    recalls = validate(training.areas, training.describe, training.config.validation_distance)
    best = recalls[5] > progress.best_score
    logger.info(
        "epoch %d: %s%s",
        progress.epoch,
        ", ".join(f"recall@{n} {value:.4f}" for n, value in recalls.items()),
        ", the best so far" if best else "",
    )
    if training.board is not None:
        for n, value in recalls.items():
            training.board.add_scalar(f"Val/Recall_{n}", value, progress.epoch)
    judged = replace(
        progress,
        recalls=recalls,
        best_score=max(recalls[5], progress.best_score),
        not_improved=0 if best else progress.not_improved + 1,
    )
    return judged, best


def _paths(data: TupleSet, batch: Sequence[Triplet]) -> list[Path | str]:
    """Return the images of a batch: queries, positives, negatives."""
    return [
        *(data.queries[triplet.query] for triplet in batch),
        *(data.index[triplet.positive] for triplet in batch),
        *(data.index[row] for triplet in batch for row in triplet.negatives),
    ]


def _decoded(
    batches: Sequence[Sequence[Path | str]], config: TrainConfig, threads: int
) -> Generator[Tensor, None, None]:
    """Yield the images of batches [M, 3, H, W], two batches ahead.

    Raises
    ------
    ImageError
        One that could be read before cannot be read any more.
    """
    everything = [path for batch in batches for path in batch]
    decode = Decoder(everything, config.for_images(), pin=False)

    def image(row: int) -> Tensor:
        decoded = decode(row)
        if isinstance(decoded, Exception):
            raise decoded
        return decoded

    starts = np.cumsum([0, *(len(batch) for batch in batches)])
    with serial_pool(threads or min(8, count_cpus()), "decode") as pool:
        waiting: list[list[Future[Tensor]]] = []
        try:
            for number in range(len(batches) + 2):
                if number < len(batches):
                    rows = range(starts[number], starts[number + 1])
                    waiting.append([pool.submit(image, row) for row in rows])
                if number >= 2:
                    yield torch.stack([future.result() for future in waiting.pop(0)])
        finally:
            for futures in waiting:
                for future in futures:
                    future.cancel()
