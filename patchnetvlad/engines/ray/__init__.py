# SPDX-License-Identifier: MIT
"""The engine on a Ray cluster: the same work on many machines. Ray is imported only on demand."""
