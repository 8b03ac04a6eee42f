# SPDX-License-Identifier: MIT
"""Visual place recognition with Patch-NetVLAD (Hausler et al., CVPR 2021).

Global NetVLAD descriptors retrieve images of the same place, locally-global patch descriptors
re-rank them.

In a notebook
    ``load_model`` gives a model that describes images; ``match`` says how similar two described
    images are, and where; a ``PlaceIndex`` grows by images and says which place an image shows.

For whole data sets
    ``extract`` writes the features of an image list, ``rerank`` retrieves, re-ranks and evaluates
    the images of every query, ``evaluate`` does the last alone. They are what the commands
    ``patchnetvlad-feature-extract`` and ``patchnetvlad-feature-match`` call.

For papers
    ``plot_match``, ``plot_answers``, ``plot_recalls``, ``plot_precision_recall``,
    ``plot_similarity`` and ``plot_trajectory`` draw, ``save_figure`` writes PDF, SVG, PNG, JPEG.

Nothing is printed, but reported to the logger ``patchnetvlad``; what goes wrong by the user's doing
is a ``PatchNetVLADError``. Names are imported when they are first used, so that ``import
patchnetvlad`` is quick.
"""

from __future__ import annotations

import logging
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from patchnetvlad.config import Config as Config
    from patchnetvlad.errors import PatchNetVLADError as PatchNetVLADError
    from patchnetvlad.evaluation.plots import plot_answers as plot_answers
    from patchnetvlad.evaluation.plots import plot_match as plot_match
    from patchnetvlad.evaluation.plots import plot_precision_recall as plot_precision_recall
    from patchnetvlad.evaluation.plots import plot_recalls as plot_recalls
    from patchnetvlad.evaluation.plots import plot_similarity as plot_similarity
    from patchnetvlad.evaluation.plots import plot_trajectory as plot_trajectory
    from patchnetvlad.evaluation.plots import read_runs as read_runs
    from patchnetvlad.evaluation.plots import save_figure as save_figure
    from patchnetvlad.evaluation.recall import recall_at_n as recall_at_n
    from patchnetvlad.evaluation.report import write_report as write_report
    from patchnetvlad.features.extract import extract as extract
    from patchnetvlad.pipeline import RerankResult as RerankResult
    from patchnetvlad.pipeline import evaluate as evaluate
    from patchnetvlad.pipeline import rerank as rerank
    from patchnetvlad.place_index import Answer as Answer
    from patchnetvlad.place_index import Place as Place
    from patchnetvlad.place_index import PlaceIndex as PlaceIndex
    from patchnetvlad.place_match import Match as Match
    from patchnetvlad.place_match import match as match
    from patchnetvlad.place_model import Description as Description
    from patchnetvlad.place_model import PlaceModel as PlaceModel
    from patchnetvlad.place_model import load_model as load_model

__version__ = "1.0.0"

logging.getLogger(__name__).addHandler(logging.NullHandler())

_HOMES = {
    "Answer": "place_index",
    "Config": "config",
    "Description": "place_model",
    "Match": "place_match",
    "PatchNetVLADError": "errors",
    "Place": "place_index",
    "PlaceIndex": "place_index",
    "PlaceModel": "place_model",
    "RerankResult": "pipeline",
    "evaluate": "pipeline",
    "extract": "features.extract",
    "load_model": "place_model",
    "match": "place_match",
    "plot_answers": "evaluation.plots",
    "plot_match": "evaluation.plots",
    "plot_precision_recall": "evaluation.plots",
    "plot_recalls": "evaluation.plots",
    "plot_similarity": "evaluation.plots",
    "plot_trajectory": "evaluation.plots",
    "read_runs": "evaluation.plots",
    "recall_at_n": "evaluation.recall",
    "rerank": "pipeline",
    "save_figure": "evaluation.plots",
    "write_report": "evaluation.report",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'patchnetvlad' has no attribute {name!r}")
    return getattr(import_module(f"patchnetvlad.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
