# SPDX-License-Identifier: MIT
"""Engines: where computation runs, in this process or on a cluster."""
