# SPDX-License-Identifier: MIT
"""The maths of retrieval: exact search, FAISS indexes, candidates."""
