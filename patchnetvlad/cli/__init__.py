# SPDX-License-Identifier: MIT
"""The commands. Each module parses arguments, calls one typed function, and prints the result."""
