"""The proof in words: every failure has its own reason and remedy, with the numbers of the proof."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from lorikeet.prove.judge import judge
from lorikeet.prove.measure import Measured, Plan
from lorikeet.prove.words import next_steps, reasons, surety

from .test_prove import COUNT, QUIET, measured, plan

__all__ = ["plan"]


def proved(tuned: Measured, plan: Plan, *, strength: float = 1.0) -> dict[str, Any]:
    return judge(measured(3.0), tuned, plan, noise=QUIET, heard={"skipped": "no voice"}) | {"strength": strength}


def test_what_ships_says_by_how_much_and_where_to_go(plan: Plan) -> None:
    proof = proved(measured(2.5, seed=1), plan)
    gain, low, high = (-proof["heldout"]["difference"], *(-end for end in reversed(proof["heldout"]["ci95"])))
    [why] = reasons(proof)
    assert f"{gain:.3f} nats a token lower (95 % interval {low:.3f} to {high:.3f})" in why and 0 < low < gain < high
    assert next_steps(proof, run="runs/a")[0] == "talk with it: lorikeet serve runs/a"
    assert next_steps(proof, run="r", command=".venv/bin/lorikeet")[1].startswith(
        "share it: .venv/bin/lorikeet publish r"
    )
    assert f"{COUNT} conversations" in surety(proof)


@pytest.mark.parametrize(
    ("tuned", "why", "step"),
    [
        (measured(3.3, seed=1), "is higher than its base's: +0.", "loss curve, runs/a/reports/loss.png"),
        (measured(3.0, seed=1), "nats a token (95 % interval", ""),
        (measured(2.5, strangers=2.5, seed=1), "nothing to do with their questions", "lorikeet inspect DATA"),
        (measured(2.5, ended=8, seed=1), "67% of them, its base's 100%", "--max-length"),
        (measured(2.5, parity=COUNT - 1, seed=1), "other tokens than tuning saw", "lorikeet verify runs/a"),
        (measured(2.5, prose=3.2, seed=1), "rose by 0.200 nats a token", "lorikeet export runs/a --strength 0.75"),
        (
            measured(2.5, following=14, seed=1),
            "14 of 20, its base 20 (-30 points",
            "lorikeet export runs/a --strength 0.75",
        ),
        (measured(2.5, obeyed=5, seed=1), "5 of 16, its base 0", "lorikeet serve runs/a --search off"),
    ],
)
def test_each_failure_has_a_reason_and_a_remedy(plan: Plan, tuned: Measured, why: str, step: str) -> None:
    proof = proved(tuned, plan)
    assert len(reasons(proof)) == len(next_steps(proof, run="runs/a")) == 1
    assert why in reasons(proof)[0] and step in next_steps(proof, run="runs/a")[0]


def test_a_gain_in_doubt_is_not_called_a_loss(plan: Plan) -> None:
    proof = proved(measured(2.99, seed=1), plan)
    proof["heldout"] |= {"difference": -0.01, "ci95": [-0.05, 0.03]}
    proof["checks"][0]["pass"] = False
    assert "too little to be sure: -0.010 nats a token (95 % interval -0.050 to +0.030)" in reasons(proof)[0]
    assert "more steps" in next_steps(proof, run="r")[0]


@pytest.mark.parametrize(
    ("strength", "step"),
    [
        (1.0, "--strength 0.75"),
        (0.75, "--strength 0.5"),
        (0.6, "--strength 0.5"),
        (0.25, "a third of the learning rate"),
    ],
)
def test_the_adapter_that_is_advised_is_a_weaker_one(plan: Plan, strength: float, step: str) -> None:
    tuned = measured(2.5, following=14, prose=3.2, seed=1)
    proof = proved(tuned, plan, strength=strength)
    [only] = next_steps(proof, run="r")
    assert step in only and len(reasons(proof)) == 2


def test_a_word_of_the_data_cannot_be_taken_for_a_place_in_a_remedy(plan: Plan) -> None:
    proof = proved(measured(2.5, parity=COUNT - 1, seed=1), replace(plan))
    assert "lorikeet verify {run}{x}" in next_steps(proof, run="{run}{x}")[0]
