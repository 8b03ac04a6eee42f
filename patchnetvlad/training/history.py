# SPDX-License-Identifier: MIT
"""Loss and recalls of every epoch of a training run, as a file and as a picture."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path

from patchnetvlad.base.files import replace_text
from patchnetvlad.base.text import json_text, parse_json
from patchnetvlad.plots.drawing import save_figure
from patchnetvlad.plots.training import plot_training

logger = logging.getLogger(__name__)

HISTORY_FILE, PICTURE_FILE = "history.json", "training.png"


class History:
    """Loss and recalls by epoch, in the folder of a run.

    Parameters
    ----------
    folder : Path
        Gets ``history.json`` and ``training.png``.
    earlier : Path, optional
        Folder of the run that this one resumes.
    epochs : int, default 0
        Number of epochs that are taken over from the earlier run.
    """

    def __init__(self, folder: Path, earlier: Path | None = None, epochs: int = 0) -> None:
        self._folder = folder
        self.losses: dict[int, float | None] = {}
        self.recalls: dict[int, dict[int, float]] = {}
        if earlier is not None:
            self._read(earlier / HISTORY_FILE, epochs)

    def _read(self, file: Path, epochs: int) -> None:
        try:
            for epoch, of in parse_json(file.read_text(encoding="utf-8"))["epochs"].items():
                if int(epoch) <= epochs:
                    recalls = {int(n): float(value) for n, value in of["recall"].items()}
                    loss = of["loss"]
                    self.losses[int(epoch)] = None if loss is None else float(loss)
                    self.recalls[int(epoch)] = recalls
        except FileNotFoundError:
            return  # of the research code, or moved
        except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
            logger.info("%s cannot be read (%s); earlier epochs will not be drawn", file, error)

    def add(self, epoch: int, loss: float | None, recalls: Mapping[int, float]) -> None:
        """Add an epoch, from 1, with its recalls by N if it was validated; write both files.

        Epoch 0 is before training, and has no loss.

        OutputError if they cannot be written.
        """
        self.losses[epoch], self.recalls[epoch] = loss, dict(recalls)
        rows = {
            str(n): {"loss": self.losses[n], "recall": {str(k): v for k, v in of.items()}}
            for n, of in self.recalls.items()
        }
        replace_text(self._folder / HISTORY_FILE, [json_text({"epochs": rows})])
        losses = {n: loss for n, loss in self.losses.items() if loss is not None}
        if losses:
            save_figure(plot_training(losses, self.recalls), self._folder / PICTURE_FILE)
