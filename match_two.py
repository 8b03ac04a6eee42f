# SPDX-License-Identifier: MIT
"""Door: `python match_two.py` is the command `patchnetvlad-match-two`."""

import sys

from patchnetvlad.cli.match_two import main

if __name__ == "__main__":
    sys.exit(main())
