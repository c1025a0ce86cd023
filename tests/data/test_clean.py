"""Distinct first, then parts that share no question."""

from __future__ import annotations

import pytest

from lorikeet.data.clean import common_system, deduplicate, split
from lorikeet.errors import InputError
from lorikeet.messages import Conversation, Message

from ..conftest import make_conversations


def test_repetitions_differ_at_most_in_case_and_space() -> None:
    rows = [Conversation((Message("user", q), Message("assistant", "a"))) for q in ("Hi  there", "hi there ", "hi")]
    assert [c.messages[0].content for c in deduplicate(rows)] == ["Hi  there", "hi"]


def test_the_parts_are_disjoint_complete_and_stable() -> None:
    rows = make_conversations(200)
    parts = split(rows, validation_share=0.05, heldout_share=0.1, seed=1)
    assert (len(parts.heldout), len(parts.validation), len(parts.train)) == (20, 10, 170)
    origins = [c.origin for part in (parts.train, parts.validation, parts.heldout) for c in part]
    assert sorted(origins) == sorted(c.origin for c in rows)
    assert split(list(reversed(rows)), validation_share=0.05, heldout_share=0.1, seed=1) == parts
    assert split(rows, validation_share=0.05, heldout_share=0.1, seed=2) != parts


def test_a_question_is_never_in_two_parts() -> None:
    rows = [
        Conversation((Message("user", f"question {n // 4}"), Message("assistant", f"answer {n}")), str(n))
        for n in range(120)
    ]
    parts = split(rows, validation_share=0.1, heldout_share=0.1, seed=3)
    questions = [{c.messages[0].content for c in part} for part in (parts.train, parts.validation, parts.heldout)]
    assert not questions[0] & questions[1] and not questions[0] & questions[2] and not questions[1] & questions[2]


def test_too_few_are_refused() -> None:
    with pytest.raises(InputError, match="12 distinct conversations; at least 24"):
        split(make_conversations(12), validation_share=0.1, heldout_share=0.1, seed=0)


def test_the_common_system_turn_needs_a_majority() -> None:
    led = [c.with_system("be brief") for c in make_conversations(6)]
    assert common_system([*led, *make_conversations(5)]) == "be brief"
    assert common_system([*led, *make_conversations(6)]) == ""
