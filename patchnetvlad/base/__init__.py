# SPDX-License-Identifier: MIT
"""The ground: names, files, object storage, devices, text."""
