# SPDX-License-Identifier: MIT
# The public names: __init__.py imports them from here when they are first used.

from .config import Config as Config
from .errors import PatchNetVLADError as PatchNetVLADError
from .evaluation.plots import (
    plot_answers as plot_answers,
    plot_match as plot_match,
    plot_precision_recall as plot_precision_recall,
    plot_recalls as plot_recalls,
    plot_similarity as plot_similarity,
    plot_trajectory as plot_trajectory,
    read_runs as read_runs,
    save_figure as save_figure,
)
from .evaluation.recall import recall_at_n as recall_at_n
from .evaluation.report import write_report as write_report
from .features.extract import extract as extract
from .pipeline import (
    RerankResult as RerankResult,
    evaluate as evaluate,
    rerank as rerank,
)
from .place_index import (
    Answer as Answer,
    Place as Place,
    PlaceIndex as PlaceIndex,
)
from .place_match import (
    Match as Match,
    match as match,
)
from .place_model import (
    Description as Description,
    PlaceModel as PlaceModel,
    load_model as load_model,
)

__version__: str
