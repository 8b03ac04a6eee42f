# SPDX-License-Identifier: MIT
"""Door: `python feature_match.py` is the command `patchnetvlad-feature-match`.

What the research code's script defines can be imported from here; it is loaded when it is used.
"""

import sys

import lazy_loader

from patchnetvlad.cli.feature_match import main

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "patchnetvlad.research_code",
    submod_attrs={
        "data_sets": [
            "compute_recall",
            "feature_match",
            "write_kapture_output",
            "write_recalls_output",
        ]
    },
)

if __name__ == "__main__":
    sys.exit(main())
