# SPDX-License-Identifier: MIT
"""Descriptors: computing them, and keeping them on disk."""
