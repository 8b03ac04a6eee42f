# SPDX-License-Identifier: MIT
"""The maths of a pair: neighbours, spatial consistency, fusion."""
