# SPDX-License-Identifier: MIT
"""The commands. Each module parses words into one call of a typed function, and prints."""
