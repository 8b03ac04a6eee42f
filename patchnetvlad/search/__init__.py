# SPDX-License-Identifier: MIT
"""Retrieval by global descriptors."""
