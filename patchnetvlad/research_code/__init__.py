# SPDX-License-Identifier: MIT
"""Code that only the original import paths need; the doors re-export it."""
