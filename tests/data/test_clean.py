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


def alike(question: str, count: int) -> list[Conversation]:
    return [Conversation((Message("user", question), Message("assistant", f"answer {n}"))) for n in range(count)]


def test_a_question_that_opens_many_is_not_held_out_while_others_can_be() -> None:
    for seed in range(20):
        parts = split([*make_conversations(60), *alike("hi", 300)], validation_share=0.05, heldout_share=0.1, seed=seed)
        assert (len(parts.heldout), len(parts.validation)) == (36, 18)
        assert sum(c.messages[0].content == "hi" for c in parts.train) == 300


def test_where_every_question_opens_several_the_parts_are_the_smallest_that_will_do() -> None:
    rows = [row for n in range(6) for row in alike(f"question {n}", 10 + n)]
    parts = split(rows, validation_share=0.05, heldout_share=0.05, seed=1)
    assert sorted((len(parts.heldout), len(parts.validation))) == [10, 11]
    for few in ([*alike("a", 40)], [*alike("a", 200), *alike("b", 200)], [*alike("a", 30), *alike("b", 7)]):
        with pytest.raises(InputError, match="open with the same few questions, so none can be held out"):
            split(few, validation_share=0.05, heldout_share=0.05, seed=1)


@pytest.mark.parametrize(
    ("sizes", "expected"),
    [
        ([150] * 10, (150, 150, 1200)),
        ([7] + [95] * 10, (95, 95, 767)),
        ([3, 3, 3] + [20] * 5, (9, 20, 80)),
        ([9, 9, 9], (9, 9, 9)),
    ],
)
def test_a_part_is_as_large_as_it_must_be_where_questions_open_many(
    sizes: list[int], expected: tuple[int, int, int]
) -> None:
    rows = [row for n, size in enumerate(sizes) for row in alike(f"question {n}", size)]
    for seed in range(10):
        parts = split(rows, validation_share=0.01, heldout_share=0.01, seed=seed)
        assert (len(parts.heldout), len(parts.validation), len(parts.train)) == expected


def test_too_few_are_refused() -> None:
    with pytest.raises(InputError, match="12 distinct conversations; at least 24"):
        split(make_conversations(12), validation_share=0.1, heldout_share=0.1, seed=0)


def test_the_common_system_turn_needs_a_majority() -> None:
    led = [c.with_system("be brief") for c in make_conversations(6)]
    assert common_system([*led, *make_conversations(5)]) == "be brief"
    assert common_system([*led, *make_conversations(6)]) == ""
