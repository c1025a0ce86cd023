"""The learning rate of a step, and how many steps fit into a time."""

from __future__ import annotations

import math

FLOOR = 0.0
"""The cosine ends here."""


def learning_rate(step: int, *, total_steps: int, peak: float, warmup_ratio: float) -> float:
    """Return the rate of `step` (from 0): a linear rise over the warm-up, then half a cosine down (SGDR, 1608.03983)."""
    warmup = max(1, round(warmup_ratio * total_steps))
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, total_steps - warmup)
    return FLOOR + (peak - FLOOR) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def steps_that_fit(seconds: float, *, step_s: float, validation_s: float, eval_steps: int) -> int:
    """Return how many steps, with their validations and one at the end, fit into `seconds`; 0 if none does."""
    per_step = step_s + validation_s / eval_steps
    return max(0, int((seconds - validation_s) / per_step))
