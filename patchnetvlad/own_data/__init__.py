# SPDX-License-Identifier: MIT
"""Data sets of one's own images, and of the files that benchmarks are published with."""
