# SPDX-License-Identifier: MIT
"""Visual place recognition with Patch-NetVLAD (Hausler et al., CVPR 2021).

Global NetVLAD descriptors retrieve images of the same place, locally-global patch descriptors
re-rank them.

In a notebook
    ``load_model`` gives a model that describes images; ``match`` says how similar two described
    images are, and where; a ``PlaceIndex`` grows by images and says which place an image shows.

For whole data sets
    ``extract`` writes the features of an image list, ``rerank`` retrieves, re-ranks and evaluates
    the images of every query, ``evaluate`` does the last alone, ``compare`` compares runs,
    ``calibrate_confidence`` fits how likely answers are right. They are what the commands
    ``patchnetvlad-feature-extract``, ``patchnetvlad-feature-match``, ``patchnetvlad-compare`` and
    ``patchnetvlad-calibrate-confidence`` call.

For papers
    ``plot_match``, ``plot_answers``, ``plot_recalls``, ``plot_precision_recall``,
    ``plot_similarity`` and ``plot_trajectory`` draw, ``save_figure`` writes PDF, SVG, PNG, JPEG.

Nothing is printed, but reported to the logger ``patchnetvlad``; what goes wrong by the user's doing
is a ``PatchNetVLADError``. Names are imported when they are first used, so that ``import
patchnetvlad`` is quick.
"""

import logging

import lazy_loader

from patchnetvlad.version import __version__ as __version__

logging.getLogger(__name__).addHandler(logging.NullHandler())

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
