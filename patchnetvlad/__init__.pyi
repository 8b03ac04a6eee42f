# SPDX-License-Identifier: MIT
# The public names: __init__.py imports them from here when they are first used.

from .config import Config as Config
from .errors import PatchNetVLADError as PatchNetVLADError
from .plots.answer import plot_answers as plot_answers
from .plots.match import plot_match as plot_match
from .plots.curves import (
    plot_precision_recall as plot_precision_recall,
    plot_recalls as plot_recalls,
    read_runs as read_runs,
)
from .plots.maps import plot_similarity as plot_similarity, plot_trajectory as plot_trajectory
from .plots.drawing import save_figure as save_figure
from .evaluation.recall import recall_at_n as recall_at_n
from .report.write import write_report as write_report
from .pipeline.extract import extract as extract
from .pipeline.result import RerankResult as RerankResult
from .pipeline.match import evaluate as evaluate, rerank as rerank
from .recipes.compare import compare as compare
from .recipes.confidence import calibrate_confidence as calibrate_confidence
from .recipes.run import RunResult as RunResult, run as run
from .places.answers import Answer as Answer, Place as Place
from .places.index import PlaceIndex as PlaceIndex
from .places.match import Match as Match, match as match
from .places.description import Description as Description
from .places.model import PlaceModel as PlaceModel, load_model as load_model

__version__: str
