# SPDX-License-Identifier: MIT
"""The API for notebooks and robots: a model, matches, a place index."""
