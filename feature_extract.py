# SPDX-License-Identifier: MIT
"""Door: `python feature_extract.py` is the command `patchnetvlad-feature-extract`.

What the research code's script defines can be imported from here; it is loaded when it is used.
"""

import sys

import lazy_loader

from patchnetvlad.cli.feature_extract import main

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "patchnetvlad.research_code",
    submod_attrs={"data_sets": ["feature_extract"]},
)

if __name__ == "__main__":
    sys.exit(main())
