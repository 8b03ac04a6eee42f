# SPDX-License-Identifier: MIT
"""The feature store: raw shards, and an SQLite index of what lies where in them."""
