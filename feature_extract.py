# SPDX-License-Identifier: MIT
"""Door: `python feature_extract.py` is the command `patchnetvlad-feature-extract`."""

import sys

from patchnetvlad.cli.feature_extract import main

if __name__ == "__main__":
    sys.exit(main())
