# SPDX-License-Identifier: MIT
"""Door: ``python -m patchnetvlad.tools.gen_image_file_list`` lists the images of a folder."""

import sys

from patchnetvlad.cli.gen_image_file_list import main

if __name__ == "__main__":
    sys.exit(main())
