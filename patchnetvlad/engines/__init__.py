# SPDX-License-Identifier: MIT
"""Engines: who computes, this process or a cluster."""
