# SPDX-License-Identifier: MIT
"""Foundations: names, files, object storage, devices, text."""
