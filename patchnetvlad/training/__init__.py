# SPDX-License-Identifier: MIT
"""Training: vocabularies, whitening, losses, hard negatives and the loop."""
