# SPDX-License-Identifier: MIT
"""What only the original import paths need; the doors hand it on."""
