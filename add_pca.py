# SPDX-License-Identifier: MIT
"""Door: `python add_pca.py` is the command `patchnetvlad-add-pca`."""

import sys

from patchnetvlad.cli.add_pca import main

if __name__ == "__main__":
    sys.exit(main())
