# SPDX-License-Identifier: MIT
"""A page to look at every query of a run, its candidates and its matches."""
