# SPDX-License-Identifier: MIT
"""Retry policy: how often, and after which delays, a failed operation is tried again."""

from __future__ import annotations

import itertools
import math
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass

_random = random.SystemRandom()  # a seed would let all workers wait for the same time


@dataclass(frozen=True)
class Retries:
    """A retry policy with exponential backoff.

    Attributes
    ----------
    first, longest : float
        The first wait and the longest one, s.
    attempts : float
        Number of attempts, with the first one; by default any number.
    seconds : float
        Time after which nothing is tried again; by default never.
    spread : float
        Share of each wait that is random.

    Examples
    --------
    >>> list(Retries(first=1.0, longest=3.0, attempts=4).waits())
    [1.0, 2.0, 3.0]
    """

    first: float
    longest: float = math.inf
    attempts: float = math.inf
    seconds: float = math.inf
    spread: float = 0.0

    def waits(self) -> Iterator[float]:
        """Start the first attempt now; yield the delay, in s, before each further one."""
        begin = time.monotonic()

        def each() -> Iterator[float]:
            wait = self.first
            for attempt in itertools.count(1):
                if attempt >= self.attempts or time.monotonic() - begin >= self.seconds:
                    return
                yield wait * _random.uniform(1.0 - self.spread, 1.0)
                wait = min(2 * wait, self.longest)

        return each()
