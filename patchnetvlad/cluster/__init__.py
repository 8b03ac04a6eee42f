# SPDX-License-Identifier: MIT
"""Work on many machines, by Ray."""
