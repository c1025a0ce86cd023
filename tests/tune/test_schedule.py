"""The learning rate rises, then falls along half a cosine; and a time holds so many steps."""

from __future__ import annotations

import pytest

from lorikeet.tune.plot import running_mean
from lorikeet.tune.schedule import learning_rate, steps_that_fit


def test_the_rate_rises_then_falls_to_nothing() -> None:
    rates = [learning_rate(step, total_steps=100, peak=1.0, warmup_ratio=0.1) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == 1.0 == max(rates)
    assert rates[55] == pytest.approx(0.5) and rates[100] == pytest.approx(0.0)
    assert rates[:10] == sorted(rates[:10]) and rates[10:] == sorted(rates[10:], reverse=True)


def test_a_short_run_has_a_rate_too() -> None:
    assert learning_rate(0, total_steps=1, peak=0.3, warmup_ratio=0.01) == 0.3


def test_steps_that_fit_leave_room_for_validation() -> None:
    assert steps_that_fit(110.0, step_s=1.0, validation_s=10.0, eval_steps=100) == 90
    assert steps_that_fit(5.0, step_s=1.0, validation_s=10.0, eval_steps=10) == 0


def test_the_running_mean_of_a_constant_is_that_constant() -> None:
    assert running_mean([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
