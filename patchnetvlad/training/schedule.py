# SPDX-License-Identifier: MIT
"""The optimiser, and the learning rate of each step."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from patchnetvlad.config_train import TrainConfig


def make_optimiser(network: nn.Module, config: TrainConfig) -> Optimizer:
    """Return the optimiser of the trainable parameters."""
    trained = [p for p in network.parameters() if p.requires_grad]
    rate = config.learning_rate
    if config.optimiser == "ADAM":
        return Adam(trained, lr=rate)
    if config.optimiser == "ADAMW":
        return AdamW(trained, lr=rate, weight_decay=config.weight_decay)
    return SGD(
        [{"params": trained, "initial_lr": rate}],  # which PyTorch's own schedules go on from
        lr=rate,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )


def learning_rate(config: TrainConfig, epoch: int, step: int, steps: int, epochs: int) -> float:
    """Return the learning rate of a step.

    Parameters
    ----------
    config : TrainConfig
    epoch, step : int
        Number of the epoch, and of the step in it, from 0.
    steps, epochs : int
        Steps of the epoch, and epochs in all.

    Returns
    -------
    float
    """
    done = min(1.0, (epoch + step / max(steps, 1)) / max(epochs, 1))
    if config.schedule == "cosine":
        factor = (1 + math.cos(math.pi * done)) / 2
    elif config.schedule == "linear":
        factor = 1 - done
    elif config.optimiser == "ADAM":  # as in the research code
        factor = 1.0
    else:
        factor = config.step_factor ** (epoch // config.step_epochs)
    if config.warm_up_steps:
        factor *= min(1.0, (epoch * steps + step + 1) / config.warm_up_steps)
    return config.learning_rate * factor


def set_learning_rate(optimiser: Optimizer, rate: float) -> None:
    """Set the learning rate of all parameters."""
    for group in optimiser.param_groups:
        group["lr"] = rate
