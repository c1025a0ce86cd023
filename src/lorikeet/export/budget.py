"""How much of a measurement fits into the seconds that are given to it.

    clock = Clock(seconds=240)
    clock.tick(350)                                  # 350 tokens have been computed
    count = clock.fit(costs)                         # how many of the items that cost so many tokens fit as well

The rate is measured on what is asked first, so that the plan is made on this machine as it is now. It does not know what is
measured.
"""

from __future__ import annotations

import time
from collections.abc import Iterable


class Clock:
    """The rate of a measurement in tokens a second, and what is left of its time."""

    def __init__(self, *, seconds: float) -> None:
        """Start now, with so many seconds to spend."""
        self.seconds = seconds
        self._began = self._timed_from = time.monotonic()
        self._tokens = self._timed_tokens = 0

    def tick(self, tokens: int) -> None:
        """Say that `tokens` more have been computed. The first call is not timed: it reads the weights from disk."""
        if not self._tokens:
            self._timed_from = time.monotonic()
        else:
            self._timed_tokens += tokens
        self._tokens += tokens

    @property
    def spent_s(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._began

    @property
    def tokens_per_s(self) -> float:
        """The rate so far; infinite before the second call of `tick`."""
        if not self._timed_tokens:
            return float("inf")
        return self._timed_tokens / max(1e-9, time.monotonic() - self._timed_from)

    def needs_s(self, tokens: float) -> float:
        """Return how long `tokens` more take at the rate so far."""
        return tokens / self.tokens_per_s

    def fit(self, costs: Iterable[float], *, seconds: float | None = None) -> int:
        """Return how many of the first items, each of so many tokens, fit into `seconds`, or into what is left."""
        left = (self.seconds - self.spent_s if seconds is None else seconds) * self.tokens_per_s
        count = 0
        for cost in costs:
            left -= cost
            if not left >= 0:
                break
            count += 1
        return count
