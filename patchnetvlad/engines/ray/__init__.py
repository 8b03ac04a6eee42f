# SPDX-License-Identifier: MIT
"""The same work on many machines, by Ray, which is imported only when it is asked for."""
