"""Is a difference real? Paired bootstrap over rows (Efron and Tibshirani, 1993, chapter 13); Wilson's interval for a share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorikeet.scoring import Scores


@dataclass(frozen=True, slots=True)
class Interval:
    """An estimate and its interval."""

    value: float
    low: float
    high: float


def compare(base: Scores, tuned: Scores, *, level: float = 0.95, resamples: int = 10_000, seed: int = 0) -> Interval:
    """Return tuned minus base loss in nats a token, with the `level` interval; negative is better.

    Conversations are drawn with replacement, both models' losses together, and each draw is weighed by its tokens.
    """
    return ratio_interval(tuned.loss - base.loss, tuned.tokens, level=level, resamples=resamples, seed=seed)


def ratio_interval(
    sums: NDArray[np.float64], counts: NDArray[np.int64], *, level: float, resamples: int, seed: int
) -> Interval:
    """Return sum(sums) / sum(counts) with its bootstrap interval over the rows, both of shape (rows,)."""
    generator = np.random.default_rng(seed)
    draws = np.empty(resamples)
    for start in range(0, resamples, 1000):
        size = min(1000, resamples - start)
        chosen = generator.integers(0, len(sums), size=(size, len(sums)))
        draws[start : start + size] = sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1)
    tail = (1 - level) / 2
    low, high = np.quantile(draws, [tail, 1 - tail])
    return Interval(float(sums.sum() / counts.sum()), float(low), float(high))


def paired_shares(base: Sequence[bool], tuned: Sequence[bool], *, level: float = 0.95, resamples: int) -> Interval:
    """Return the tuned model's share minus the base's over the same rows, with its bootstrap interval."""
    change = np.array(tuned, dtype=np.float64) - np.array(base, dtype=np.float64)
    return ratio_interval(change, np.ones(len(change), dtype=np.int64), level=level, resamples=resamples, seed=2)


def share(flags: Sequence[bool], *, z: float = 1.959964) -> Interval:
    """Return the share of true flags with Wilson's score interval (Wilson, 1927), 95 % by default."""
    n = len(flags)
    p = sum(flags) / n
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
    return Interval(p, max(0.0, middle - half), min(1.0, middle + half))
