# SPDX-License-Identifier: MIT
"""Door: `python match_two.py` is the command `patchnetvlad-match-two`.

What the research code's script defines can be imported from here; it is loaded when it is used.
"""

import sys

import lazy_loader

from patchnetvlad.cli.match_two import main

__getattr__, __dir__, __all__ = lazy_loader.attach(
    "patchnetvlad.research_code",
    submod_attrs={"pair": ["apply_patch_weights", "match_two", "plot_two"]},
)

if __name__ == "__main__":
    sys.exit(main())
