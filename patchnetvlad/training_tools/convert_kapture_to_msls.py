# SPDX-License-Identifier: MIT
"""Door: ``python -m`` this converts predictions to the format of Mapillary SLS."""

import sys

from patchnetvlad.cli.convert_kapture_to_msls import main

if __name__ == "__main__":
    sys.exit(main())
