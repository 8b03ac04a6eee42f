# SPDX-License-Identifier: MIT
"""Download the released checkpoints: the same as the command ``patchnetvlad-download-models``."""

import sys

from patchnetvlad.cli.download_models import download_all_models, download_models, main

__all__ = ["download_all_models", "download_models"]

if __name__ == "__main__":
    sys.exit(main())
