# SPDX-License-Identifier: MIT
"""``python -m patchnetvlad``: the program ``patchnetvlad``."""

import sys

from patchnetvlad.cli.umbrella import main

if __name__ == "__main__":
    sys.exit(main(prog="python -m patchnetvlad"))
