# SPDX-License-Identifier: MIT
"""Confidences: how likely the first answer to a query is right.

They are computed by logistic regression on :mod:`signals <patchnetvlad.evaluation.signals>`, whose
coefficients are in a JSON file that
:func:`~patchnetvlad.recipes.confidence.calibrate_confidence` writes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from patchnetvlad.base.files import replace_text
from patchnetvlad.base.text import json_text, one_line, parse_json, plain_json
from patchnetvlad.config import Config
from patchnetvlad.errors import ConfigError
from patchnetvlad.evaluation.signals import SIGNALS, reranking_signals, retrieval_signals

FORMAT = "patchnetvlad confidence 1"
SHIPPED = Path(__file__).parents[1] / "pretrained_models" / "imagenet_WPCA128.confidence.json"
"""Of the bundled checkpoint."""

SETTINGS = (
    "encoder", "pooling", "match_image_size", "patch_sizes", "strides", "patch_weights", "matcher",
)  # fmt: skip
"""Of the configuration, those that distances and scores depend on."""

_OF_RETRIEVAL = SETTINGS[:3]
_LONGEST = 10_000_000  # bytes of a file
_WAY_OUT = "patchnetvlad calibrate-confidence writes such files from runs with ground truth"


@dataclass(frozen=True)
class Logistic:
    """The probability of one method: 1 / (1 + exp(-(intercept + coefficients . signals))).

    Attributes
    ----------
    intercept : float
    coefficients : tuple of float
        One per signal, 0 or more: the larger a signal, the surer. None is negative.
    """

    intercept: float
    coefficients: tuple[float, ...]

    def probability(self, signals: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return the probabilities [Q] of signals [Q, n]."""
        logits = self.intercept + np.asarray(signals, np.float64) @ np.array(self.coefficients)
        found: NDArray[np.float64] = (1 + np.tanh(logits / 2)) / 2
        return found


@dataclass(frozen=True)
class Confidence:
    """What turns distances and scores into probabilities.

    Attributes
    ----------
    methods : dict of str to Logistic
        By name, ``"NetVLAD"`` and perhaps ``"PatchNetVLAD"``.
    checkpoint : dict of str to str
        ``name`` and ``sha256`` of the weights that it is for.
    settings : dict of str to object
        The :data:`SETTINGS` that it is for, as in ``run.json``.
    fitted_on : dict of str to object
        The data, and how good confidences were in cross-validation.
    source : str
        Its file; only for messages.
    """

    methods: dict[str, Logistic]
    checkpoint: dict[str, str]
    settings: dict[str, Any]
    fitted_on: dict[str, Any] = field(default_factory=dict)
    source: str = "the confidences"

    def of_retrieval(self, distances: NDArray[np.floating]) -> NDArray[np.float64]:
        """Return how likely the nearest candidates are right.

        Parameters
        ----------
        distances : ndarray [Q, k] of float
            Of global descriptors, nearest first.

        Returns
        -------
        ndarray [Q] of float64
        """
        return self.methods["NetVLAD"].probability(retrieval_signals(distances))

    def of_reranking(
        self, scores: NDArray[np.floating], first: NDArray[np.integer]
    ) -> NDArray[np.float64] | None:
        """Return how likely answers after re-ranking are right.

        Parameters
        ----------
        scores, first
            As for :func:`~patchnetvlad.evaluation.signals.reranking_signals`.

        Returns
        -------
        ndarray [Q] of float64 or None
            None if no re-ranked run was fitted.
        """
        method = self.methods.get("PatchNetVLAD")
        return None if method is None else method.probability(reranking_signals(scores, first))

    def of_one(self, distances: NDArray[np.floating]) -> float:
        """Return how likely the nearest candidate of one query is right, from distances [k]."""
        return float(self.of_retrieval(np.asarray(distances)[None])[0])

    def misfit(self, config: Config, checkpoint: str = "") -> str:
        """Say what of a configuration or its weights is other than it was in fitting.

        Parameters
        ----------
        config : Config
        checkpoint : str
            SHA-256 of the weights; if it is not known, their name decides.

        Returns
        -------
        str
            Such as ``matcher = 'RANSAC'``; empty if it fits.
        """
        ours, theirs = checkpoint, self.checkpoint["sha256"]
        if not (ours and theirs):
            ours, theirs = weights_name(config), self.checkpoint["name"]
        if ours != theirs:
            return f"other weights ({theirs[:40]}, not {ours[:40]})"
        given = settings_of(config)
        for name in SETTINGS if config.uses_patches else _OF_RETRIEVAL:
            if self.settings[name] != given[name]:
                return f"{name} = {self.settings[name]}, not {given[name]}"
        return ""

    def save(self, path: str | Path) -> None:
        """Write the file; OutputError if that fails."""
        content = {
            "format": FORMAT,
            "checkpoint": self.checkpoint,
            "settings": self.settings,
            "methods": {
                name: {
                    "kind": "logistic regression",
                    "signals": list(SIGNALS[name]),
                    "coefficients": list(of.coefficients),
                    "intercept": of.intercept,
                }
                for name, of in self.methods.items()
            },
            "fitted_on": self.fitted_on,
        }
        replace_text(Path(path), [json_text(plain_json(content))])

    @classmethod
    def load(cls, path: str | Path) -> Confidence:
        """Read a file.

        Raises
        ------
        ConfigError
            It is missing, damaged, of another version or something else.
        """
        file = Path(path)
        try:
            with file.open("rb") as stream:
                content = parse_json(stream.read(_LONGEST))
        except OSError as error:
            raise ConfigError(f"{file} cannot be read: {error.strerror}; {_WAY_OUT}") from None
        except ValueError as error:
            raise ConfigError(f"{file} is not JSON: {one_line(error, 80)}; {_WAY_OUT}") from None
        kind = content.get("format") if isinstance(content, dict) else type(content).__name__
        if kind != FORMAT:
            raise ConfigError(
                f"{file} is of format {kind!r:.80}, this release of patchnetvlad reads {FORMAT!r}; "
                f"{_WAY_OUT}"
            )
        try:
            return cls(*_parsed(content), str(file))
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            what = f"{error} is missing" if isinstance(error, KeyError) else one_line(error, 120)
            raise ConfigError(f"{file} is damaged: {what}; {_WAY_OUT}") from None


def _parsed(
    content: Mapping[str, Any],
) -> tuple[dict[str, Logistic], dict[str, str], dict[str, Any], dict[str, Any]]:
    """Take what a file says; KeyError, TypeError or ValueError if it is not what it must be."""
    methods = {}
    for name, of in content["methods"].items():
        if tuple(of["signals"]) != SIGNALS.get(name):
            raise ValueError(f"{name} has signals {of['signals']!r}, not {SIGNALS.get(name)}")
        weights = tuple(float(value) for value in of["coefficients"])
        intercept = float(of["intercept"])
        if len(weights) != len(SIGNALS[name]) or not all(map(math.isfinite, (*weights, intercept))):
            raise ValueError(f"{name} has coefficients {of['coefficients']!r}, {intercept}")
        if min(weights) < 0:
            raise ValueError(f"{name} has negative coefficients {of['coefficients']!r}")
        methods[name] = Logistic(intercept, weights)
    if "NetVLAD" not in methods:
        raise KeyError("NetVLAD")
    checkpoint = {name: str(content["checkpoint"][name]) for name in ("name", "sha256")}
    settings = {name: content["settings"][name] for name in SETTINGS}
    return methods, checkpoint, settings, dict(content["fitted_on"])


def settings_of(config: Config) -> dict[str, Any]:
    """Return the :data:`SETTINGS` of a configuration as JSON types."""
    found: dict[str, Any] = plain_json({name: getattr(config, name) for name in SETTINGS})
    # Global descriptors are the same with and without patches.
    return {**found, "pooling": "netvlad" if config.uses_patches else config.pooling}


def weights_name(config: Config) -> str:
    """Return the name of a checkpoint, without its folder."""
    return f"{Path(config.resume_path).name}{config.num_pcs or ''}"


@functools.cache
def shipped_confidence() -> Confidence:
    """Return the confidences of the bundled checkpoint."""
    return Confidence.load(SHIPPED)


def find_confidence(config: Config, checkpoint: str = "") -> Confidence | None:
    """Return the confidences that a configuration means.

    Parameters
    ----------
    config : Config
        Its ``confidence`` is ``auto`` for those that are shipped, if they fit, ``none``, or a file.
    checkpoint : str
        SHA-256 of the weights, if it is known.

    Returns
    -------
    Confidence or None

    Raises
    ------
    ConfigError
        The file cannot be used, was fitted with other weights or settings, or
        ``rerank = auto`` has no confidences to decide by.
    """
    found: Confidence | None = None
    why = ""
    if config.confidence == "auto":
        found = shipped_confidence()
        if misfit := found.misfit(config, checkpoint):
            found, why = None, f"; the shipped confidences are of {misfit}"
    elif config.confidence != "none":
        found = Confidence.load(config.confidence)
        if misfit := found.misfit(config, checkpoint):
            raise ConfigError(
                f"confidence = {config.confidence} was fitted with {misfit}; fit one on a run with "
                "these settings by patchnetvlad calibrate-confidence, or set confidence = none"
            )
    if config.rerank == "auto" and config.uses_patches:
        if found is not None and "PatchNetVLAD" not in found.methods:
            found, why = None, f"; {config.confidence} was fitted without re-ranking"
        if found is None:
            raise ConfigError(
                f"{config.source}: rerank = auto needs confidences of these weights and "
                f"settings{why}. Set confidence to a file of patchnetvlad calibrate-confidence, or "
                "rerank = always"
            )
    return found
