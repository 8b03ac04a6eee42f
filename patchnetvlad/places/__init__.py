# SPDX-License-Identifier: MIT
"""What notebooks and robots use: a model, matches, an index of places."""
