"""The 25 instructions: an answer that follows each, one that does not, and the edges between."""

from __future__ import annotations

from typing import Any

import pytest

from lorikeet.data.checks import CHECKS, Instructed, Instruction, followed, parse_instruction, sentences
from lorikeet.data.instructions import load_prompts, prompts_for_choice
from lorikeet.errors import InputError

LONG = "the old harbour was quiet and the boats were sleeping in the morning mist"

CASES: list[tuple[str, dict[str, Any], str, str]] = [
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "at least"}, "A WELL-KNOWN fact", "WELL-KNOWN fact"),
    ("change_case:capital_word_frequency", {"capital_frequency": 2, "capital_relation": "less than"}, "STOP there", "STOP RIGHT there"),
    ("change_case:english_capital", {}, LONG.upper(), LONG.capitalize()),
    ("change_case:english_capital", {}, LONG.upper(), "DAS ALTE BOOT LAG AM MORGEN STILL IM HAFEN UND SCHLIEF"),
    ("change_case:english_lowercase", {}, LONG, LONG.capitalize()),
    ("combination:repeat_prompt", {"prompt_to_repeat": "Why is it Dark?"}, " why is it dark? Because.", "Because. Why is it dark?"),
    ("combination:two_responses", {}, "One.\n******\nTwo.", "Same.\n******\nSame."),
    ("combination:two_responses", {}, "******One.******Two.******", "One.******Two.******Three."),
    ("detectable_content:number_placeholders", {"num_placeholders": 2}, "Dear [name], come at [time].", "Dear [name], come."),
    ("detectable_content:postscript", {"postscript_marker": "P.S."}, "Bye.\np. s. The key is out.", "Bye. PS no dots"),
    ("detectable_content:postscript", {"postscript_marker": "P.P.S"}, "P.P.S One more.", "P.S. One more."),
    ("detectable_format:constrained_response", {}, "My answer is maybe.", "Maybe."),
    ("detectable_format:json_format", {}, '```JSON\n{"a": [1, 2]}\n```', '{"a": 1,}'),
    ("detectable_format:multiple_sections", {"section_spliter": "Day", "num_sections": 2}, "Day 1\nrest\nDay 2\nwalk", "Day one, Day 2"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 2}, "* one\n  - two", "* one\n* two\n* three"),
    ("detectable_format:number_bullet_lists", {"num_bullets": 1}, "**bold** line\n* one", "**bold** line"),
    ("detectable_format:number_highlighted_sections", {"num_highlights": 2}, "*one* and **two**", "*one* and ** **"),
    ("detectable_format:title", {}, "<<night train>>\nIt went.", "<< >>\nIt went."),
    ("keywords:existence", {"keywords": ["Copper", "lantern"]}, "A copper lantern.", "A copper lamp."),
    ("keywords:forbidden_words", {"forbidden_words": ["cat"]}, "A category.", "The Cat sat."),
    ("keywords:frequency", {"keyword": "river", "frequency": 2, "relation": "at least"}, "River, rivers.", "One river."),
    ("keywords:frequency", {"keyword": "river", "frequency": 2, "relation": "less than"}, "One river.", "River, rivers."),
    ("keywords:letter_frequency", {"letter": "Z", "let_frequency": 2, "let_relation": "at least"}, "Zigzag", "zig"),
    ("language:response_language", {"language": "de"}, "Guten Morgen, ich w\u00fcnsche dir einen sch\u00f6nen Tag.", LONG),
    ("language:response_language", {"language": "hi"}, "\u092f\u0939 \u090f\u0915 \u0932\u0902\u092c\u093e \u0935\u093e\u0915\u094d\u092f \u0939\u0948 \u091c\u094b \u0939\u093f\u0928\u094d\u0926\u0940 \u092e\u0947\u0902 \u0939\u0948\u0964", LONG),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "however"}, "One.\n\nHowever, two.", "However, one.\n\nTwo."),
    ("length_constraints:nth_paragraph_first_word", {"num_paragraphs": 2, "nth_paragraph": 2, "first_word": "however"}, 'One.\n\n"However" two.', "One.\n\nHowever.\n\nThree."),
    ("length_constraints:number_paragraphs", {"num_paragraphs": 2}, "One.\n***\nTwo.", "One.\n***\n\n***\nTwo."),
    ("length_constraints:number_sentences", {"num_sentences": 3, "relation": "at least"}, "One. Two! Three?", "Dr. Lorne paid 3.50. That was all."),
    ("length_constraints:number_words", {"num_words": 3, "relation": "less than"}, "Two words.", "Three words here."),
    ("punctuation:no_comma", {}, "None at all.", "One, two."),
    ("startend:end_checker", {"end_phrase": "That is all."}, 'So: "THAT is all."', "That is all. Really."),
    ("startend:quotation", {}, ' "Quoted." ', '"'),
]  # fmt: skip


def holds(name: str, arguments: dict[str, Any], answer: str, *, loose: bool = False) -> bool:
    return followed(Instructed("p", (Instruction(name, arguments),)), answer, loose=loose) == [True]


@pytest.mark.parametrize(("name", "arguments", "good", "bad"), CASES)
def test_an_answer_follows_or_does_not(name: str, arguments: dict[str, Any], good: str, bad: str) -> None:
    assert holds(name, arguments, good)
    assert not holds(name, arguments, bad)


def test_every_instruction_is_tested() -> None:
    assert {case[0] for case in CASES} == set(CHECKS) and len(CHECKS) == 25


@pytest.mark.parametrize("name", sorted(CHECKS))
def test_an_empty_answer_follows_nothing(name: str) -> None:
    arguments = next(case[1] for case in CASES if case[0] == name)
    assert not holds(name, arguments, " \n") and not holds(name, arguments, "", loose=True)


def test_an_opening_line_costs_nothing_when_loose() -> None:
    assert not holds("startend:quotation", {}, 'Sure, here it is:\n"Quoted."')
    assert holds("startend:quotation", {}, 'Sure, here it is:\n"Quoted."', loose=True)
    assert holds("detectable_format:title", {}, "**<<t>>**", loose=True)


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("No stop", 1),
        ("One. Two", 2),
        ("Mr. J. Lorne paid 3.5 crowns. Good!", 2),
        ("1. First\n2. Second.", 1),
        ('He said "Go." She went.', 2),
        ("Wait... what?!", 2),
        ("So did I. We left.", 2),
    ],
)
def test_sentences_are_counted(text: str, count: int) -> None:
    assert sentences(text) == count


def test_what_cannot_be_checked_is_refused() -> None:
    with pytest.raises(InputError, match=r"length_constraints:number_lines is no instruction"):
        parse_instruction("length_constraints:number_lines", {})
    with pytest.raises(InputError, match=r'"about" is neither'):
        parse_instruction("length_constraints:number_words", {"num_words": 3, "relation": "about"})
    with pytest.raises(InputError, match="num_words"):
        parse_instruction("length_constraints:number_words", {"relation": "at least"})
    assert parse_instruction("punctuation:no_comma", {"num_words": None}).arguments == {}


def test_the_packaged_prompts_hold_every_instruction_and_the_file_of_541_can_be_read(shared: Any) -> None:
    assert {i.name for p in load_prompts(None) for i in p.instructions} == set(CHECKS)
    assert len(load_prompts(shared / "prompts" / "ifeval-541.jsonl")) == 541


def test_the_strength_is_not_chosen_on_what_proves_it() -> None:
    choosing, proving = prompts_for_choice(), load_prompts(None)
    assert len(choosing) == 24 and not {p.prompt for p in choosing} & {p.prompt for p in proving}
    assert sum(len(p.instructions) for p in choosing) == 26
