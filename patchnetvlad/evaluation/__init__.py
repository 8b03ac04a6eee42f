# SPDX-License-Identifier: MIT
"""Judging results: recall, files for other tools, pictures."""
