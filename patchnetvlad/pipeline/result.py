# SPDX-License-Identifier: MIT
"""The result of a run, under its public name."""

from patchnetvlad.pipeline.record import RunRecord as RerankResult

__all__ = ["RerankResult"]
