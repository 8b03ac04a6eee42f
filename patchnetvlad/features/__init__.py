# SPDX-License-Identifier: MIT
"""Features on disk: stores, ``.npy`` files, HDF5, and what they were made from."""
