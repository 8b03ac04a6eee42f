# SPDX-License-Identifier: MIT
"""Door: `python train.py` is the command `patchnetvlad-train`."""

import sys

from patchnetvlad.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
