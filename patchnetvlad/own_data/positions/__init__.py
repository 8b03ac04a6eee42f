# SPDX-License-Identifier: MIT
"""Where images were taken: one reader per source."""
