# SPDX-License-Identifier: MIT
"""Data sets from your own images, and from the official files of benchmarks."""
