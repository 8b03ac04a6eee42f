# SPDX-License-Identifier: MIT
"""Door: `python match_realtime.py` is the command `patchnetvlad-match-realtime`."""

import sys

from patchnetvlad.cli.match_realtime import main

if __name__ == "__main__":
    sys.exit(main())
