# SPDX-License-Identifier: MIT
"""Training: step, validate, save, epoch by epoch."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.optim import Optimizer
from tqdm import tqdm

from patchnetvlad.base.device import count_cpus, serial_pool
from patchnetvlad.config_train import TrainConfig
from patchnetvlad.errors import ImageError
from patchnetvlad.models.backbones import frozen_part
from patchnetvlad.models.model import GlobalDescriptor
from patchnetvlad.training.describe import describe_images
from patchnetvlad.training.files import Progress, save_training
from patchnetvlad.training.history import History
from patchnetvlad.training.maps import Inputs
from patchnetvlad.training.ranks import Ranks
from patchnetvlad.training.recipes import Batch, Recipe, Round, TripletBatch
from patchnetvlad.training.schedule import learning_rate, set_learning_rate
from patchnetvlad.training.tuples import Area
from patchnetvlad.training.validation import validate

logger = logging.getLogger(__name__)
_ALONE = Ranks()


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
    trained : nn.Module
        With the children ``encoder`` and ``pool`` as well, of which the former takes ``inputs``:
        the network, or what follows its frozen layers.
    optimiser : Optimizer
    config : TrainConfig
    recipe : Recipe
    inputs : Inputs
    areas : sequence of Area
        For validation.
    epochs : int
        In all, for the learning rate.
    threads : int
        That decode images; 0 chooses their number.
    board : Board or None
    bars : bool
        Show progress bars.
    ranks : Ranks
        Processes that train together.
    scaler : GradScaler
        Of gradients in mixed precision; not enabled otherwise.
    passed_over : set of str
        Why images were left out that could not be read.
    """

    network: nn.Module
    trained: nn.Module
    optimiser: Optimizer
    config: TrainConfig
    recipe: Recipe
    inputs: Inputs
    areas: Sequence[Area]
    epochs: int
    threads: int = 0
    board: Board | None = None
    bars: bool = True
    ranks: Ranks = _ALONE
    scaler: GradScaler = field(default_factory=lambda: GradScaler("cuda", enabled=False))
    passed_over: set[str] = field(default_factory=set)

    def describe(
        self, paths: Sequence[Path | str]
    ) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Extract features with the current network; see :class:`DescribeAll`."""
        config = self.config.for_images(self.threads)
        mine = [paths[row] for row in self.ranks.share(len(paths))]
        vectors, broken, trouble = np.zeros((len(mine), 0), np.float32), [*range(len(mine))], None
        try:
            found = describe_images(self.trained, mine, config, inputs=self.inputs)
            vectors, broken = found.vectors, list(found.broken)
            self.pass_over(found.broken.values())
        except ImageError as error:  # of all of this share
            trouble = error
        parts = self.ranks.exchange((len(mine), broken, vectors.shape[1]))
        width = max(d for _, _, d in parts)
        if width == 0:
            raise trouble or ImageError("no image could be read")
        if vectors.shape[1] == 0:
            vectors = np.zeros((len(mine), width), np.float32)
        counts = [count for count, _, _ in parts]
        every = self.ranks.gather(torch.from_numpy(vectors), counts).numpy()
        starts = np.cumsum([0, *counts])
        readable = np.ones(len(paths), dtype=bool)
        for start, (_, rows, _) in zip(starts, parts, strict=False):
            readable[start + np.array(rows, dtype=int)] = False
        return every, readable

    def pass_over(self, errors: Iterable[ImageError]) -> None:
        """Log and count images that cannot be read, each once."""
        for error in errors:
            if str(error) not in self.passed_over:
                self.passed_over.add(str(error))
                logger.info("passed over: %s", error)


def freeze(encoder: nn.Module) -> None:
    """Freeze an encoder, except for its last block; see :func:`frozen_part`."""
    for part in frozen_part(encoder):
        part.requires_grad_(False)


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

    All that is drawn by chance follows from the seed, the number of the epoch and that of the step,
    so that training which goes on from a checkpoint ends with the weights of training that was
    never interrupted.

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
        Gets the loss and the recalls of each epoch; and, except with triplets, the recalls before
        the first.

    Returns
    -------
    Progress
        Where it ended: after ``epochs``, or when the score had not improved for ``patience``
        epochs.
    """
    config = training.config

    def save(within: dict[str, Any]) -> None:
        at = replace(progress, within=within, scaler=training.scaler.state_dict())
        if training.ranks.first:
            save_training(folder, training.network, training.optimiser, at, best=False)

    if progress == Progress() and training.areas and config.loss != "triplet":
        before = _validate(training, 0, "before training")
        if history is not None:
            history.add(0, None, before)
    while progress.epoch < epochs:
        loss = train_epoch(training, progress.epoch, progress.within, save)
        done = progress.epoch + 1
        logger.info("epoch %d: loss %.6f", done, loss)
        best = False
        scaler = training.scaler.state_dict() or None
        progress = replace(progress, epoch=done, within=None, scaler=scaler)
        judged = bool(training.areas) and done % config.epochs_a_validation == 0
        if judged:
            progress, best = _judge(training, progress)
        if training.ranks.first:
            network, optimiser = training.network, training.optimiser
            save_training(folder, network, optimiser, progress, best=best, keep=keep)
        if history is not None:
            history.add(done, loss, progress.recalls if judged else {})
        waited = progress.not_improved * config.epochs_a_validation
        if config.patience and waited >= config.patience:
            score = f"recall@{_score_n(config)}"
            logger.info("%s has not improved for %d epochs: this is the end", score, waited)
            break
    return progress


def train_epoch(
    training: Training,
    epoch: int,
    within: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], object] | None = None,
) -> float:
    """Train for one epoch; return the mean loss of its steps.

    Parameters
    ----------
    training : Training
    epoch : int
        Its number, from 0.
    within : mapping, optional
        Where an interrupted epoch goes on; see :class:`~patchnetvlad.training.files.Progress`.
    save : callable, optional
        Called with that after every ``save_steps`` steps.

    Returns
    -------
    float
    """
    config, recipe = training.config, training.recipe
    losses: list[float] = [] if within is None else list(within["losses"])
    done = 0 if within is None else int(within["done"])
    first_step = epoch * recipe.steps()
    start = None if within is None else within["round"]
    title = f"epoch {epoch + 1}"
    with tqdm(total=recipe.total(), desc=title, unit=recipe.unit, disable=not training.bars) as bar:
        for found in recipe.rounds(epoch, training.describe, start):
            bar.update(sum(batch.count for batch in found.batches[:done]))
            steps = learn(training, found, epoch, len(losses), done)
            for number, (loss, batch) in enumerate(steps, done + 1):
                losses.append(loss)
                if training.board is not None:
                    step = first_step + len(losses)
                    training.board.add_scalar("Train/Loss", loss, step)
                    if isinstance(batch, TripletBatch):
                        negatives = len(batch.paths) - 2 * batch.count
                        training.board.add_scalar("Train/nNeg", negatives, step)
                bar.set_postfix(loss=f"{np.mean(losses):.4f}", refresh=False)
                bar.update(batch.count)
                whole = number % config.accumulate == 0 or number == len(found.batches)
                steps_done = -(-len(losses) // config.accumulate)
                due = config.save_steps and steps_done % config.save_steps == 0
                if save is not None and whole and due:
                    at = {"number": found.number, **found.state}
                    save({"round": at, "done": number, "losses": losses})
            done = 0
    mean = float(np.mean(losses)) if losses else 0.0
    if not losses:
        logger.info("epoch %d: there was nothing to learn from", epoch + 1)
    if training.board is not None:
        training.board.add_scalar("Train/AvgLoss", mean, epoch + 1)
    return mean


def learn(
    training: Training, found: Round, epoch: int, step: int, done: int = 0
) -> Iterator[tuple[float, Batch]]:
    """Take a step for each batch of a round.

    Parameters
    ----------
    training : Training
    found : Round
    epoch, step : int
        Number of the epoch, and steps made in it before.
    done : int, default 0
        Batches of the round that are done.

    Yields
    ------
    loss : float
    batch : Batch
        Without the images that could not be read.
    """
    network, config, optimiser = training.trained, training.config, training.optimiser
    todo = list(zip(found.batches, found.draws, strict=True))[done:]
    training.network.train()
    try:
        with contextlib.closing(_decoded(training, todo)) as decoded:
            for number, (batch, images) in enumerate(decoded):
                seeds = np.random.SeedSequence([config.seed, epoch, step + number])
                torch.manual_seed(int(seeds.generate_state(1)[0]))  # of layers that drop some
                if config.optimiser != "ADAM" or config.schedule != "step" or config.warm_up_steps:
                    steps, epochs = training.recipe.steps(), training.epochs
                    rate = learning_rate(config, epoch, step + number, steps, epochs)
                    set_learning_rate(optimiser, rate)
                place = number % config.accumulate
                if place == 0:
                    optimiser.zero_grad()
                    learnt = False
                loss = torch.zeros(())
                if batch.paths:
                    learnt = True
                    loss = _loss(training, images, batch)
                    together = min(config.accumulate, len(todo) - (number - place))
                    if loss.requires_grad:
                        training.scaler.scale(loss / together).backward()
                if learnt and (place == config.accumulate - 1 or number == len(todo) - 1):
                    training.ranks.add_gradients(network.parameters())
                    training.scaler.step(optimiser)
                    training.scaler.update()
                yield loss.item(), batch
    finally:
        training.network.eval()


def _loss(training: Training, images: Tensor, batch: Batch) -> Tensor:
    """Compute the loss of a batch, of whose images this process has its share."""
    device = next(training.trained.parameters()).device
    half = training.scaler.is_enabled()
    with torch.autocast(device.type, torch.float16, enabled=half):
        return batch_loss(training.trained, images.to(device), batch, training.ranks)


def batch_loss(network: nn.Module, images: Tensor, batch: Batch, ranks: Ranks = _ALONE) -> Tensor:
    """Compute the loss of a batch.

    Parameters
    ----------
    network : nn.Module
        With the children ``encoder``, ``pool`` and, optionally, ``WPCA``.
    images : Tensor [m, ...] of float32
        What the encoder takes, of the images that are for this process.
    batch : Batch
        Of M images.
    ranks : Ranks, default only this process
        Those that share the batch; gradients are those of this process's images.

    Returns
    -------
    Tensor []
    """
    vectors = images.new_zeros(0, 0)
    if len(images):
        vectors = GlobalDescriptor(network)(images).float()  # [m, K * D], or [m, P] if whitened
    parts = ranks.exchange(tuple(vectors.shape))
    if len(images) == 0:
        vectors = images.new_zeros(0, max(width for _, width in parts))
    return batch.loss(ranks.gather(vectors, [count for count, _ in parts]))


def _judge(training: Training, progress: Progress) -> tuple[Progress, bool]:
    """Validate; return what has come of it, and whether it is the best so far."""
    recalls = _validate(training, progress.epoch, f"epoch {progress.epoch}")
    score = recalls[_score_n(training.config)]
    improved = score > progress.best_score
    best = improved or (score == progress.best_score and training.config.loss != "triplet")
    if best:
        logger.info("epoch %d is the best so far", progress.epoch)
    judged = replace(
        progress,
        recalls=recalls,
        best_score=max(score, progress.best_score),
        not_improved=0 if improved else progress.not_improved + 1,
    )
    return judged, best


def _validate(training: Training, epoch: int, title: str) -> dict[int, float]:
    """Compute the recalls of the validation areas, and log them."""
    recalls = validate(training.areas, training.describe, training.config.validation_distance)
    found = ", ".join(f"recall@{n} {value:.4f}" for n, value in recalls.items())
    logger.info("%s: %s", title, found)
    if training.board is not None:
        for n, value in recalls.items():
            training.board.add_scalar(f"Val/Recall_{n}", value, epoch)
    return recalls


def _score_n(config: TrainConfig) -> int:
    """Return N of the recall by which checkpoints are compared."""
    return 5 if config.loss == "triplet" else 1


def _decoded(
    training: Training, todo: Sequence[tuple[Batch, Sequence[int]]]
) -> Generator[tuple[Batch, Tensor], None, None]:
    """Yield batches, two ahead, with what the network takes of their images [m, ...].

    Batches are without the images that cannot be read, and tensors have those that are for this
    process.
    """
    ranks = training.ranks

    def read(batch: Batch, draws: Sequence[int]) -> dict[int, Future[Tensor | ImageError]]:
        decode = training.inputs.decoder(batch.paths, draws)
        return {int(row): pool.submit(decode, int(row)) for row in ranks.share(len(batch.paths))}

    with serial_pool(training.threads or min(8, count_cpus()), "decode") as pool:
        waiting: list[dict[int, Future[Tensor | ImageError]]] = []
        try:
            for number in range(len(todo) + 2):
                if number < len(todo):
                    waiting.append(read(*todo[number]))
                if number < 2:
                    continue
                batch = todo[number - 2][0]
                images = {row: future.result() for row, future in waiting.pop(0).items()}
                broken: dict[int, ImageError] = {}
                for errors in ranks.exchange(
                    {i: x for i, x in images.items() if isinstance(x, ImageError)}
                ):
                    broken |= errors
                training.pass_over(broken.values())
                kept = [image for image in images.values() if isinstance(image, Tensor)]
                batch = batch.without(broken) if broken else batch
                yield batch, torch.stack(kept) if kept else torch.zeros(0)
        finally:
            for futures in waiting:
                for future in futures.values():
                    future.cancel()
