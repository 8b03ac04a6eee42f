# SPDX-License-Identifier: MIT
"""Image lists, decoding, ground truth, benchmarks."""
