# SPDX-License-Identifier: MIT
"""What a run returns, by its public name."""

from patchnetvlad.pipeline.record import RunRecord as RerankResult

__all__ = ["RerankResult"]
