# SPDX-License-Identifier: MIT
"""Door: `python feature_match.py` is the command `patchnetvlad-feature-match`."""

import sys

from patchnetvlad.cli.feature_match import main

if __name__ == "__main__":
    sys.exit(main())
