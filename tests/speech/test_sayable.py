"""What is said aloud, word for word, and where a stream of text is cut into clauses."""

from __future__ import annotations

import random
import re
import time

import pytest

from lorikeet.speech.clauses import CLAUSE_WORDS, MOST_WORDS, ClauseSplitter, split_clauses
from lorikeet.speech.sayable import cardinal, ordinal, sayable, year


@pytest.mark.parametrize(
    ("number", "words"),
    [
        (0, "zero"),
        (13, "thirteen"),
        (40, "forty"),
        (99, "ninety-nine"),
        (100, "one hundred"),
        (1204, "one thousand two hundred four"),
        (1_000_001, "one million one"),
        (-7, "minus seven"),
        (987_654_321, "nine hundred eighty-seven million six hundred fifty-four thousand three hundred twenty-one"),
    ],
)
def test_cardinals(number: int, words: str) -> None:
    assert cardinal(number) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(1, "first"), (2, "second"), (12, "twelfth"), (20, "twentieth"), (21, "twenty-first"), (103, "one hundred third")],
)
def test_ordinals(number: int, words: str) -> None:
    assert ordinal(number) == words


@pytest.mark.parametrize(
    ("number", "words"),
    [(1905, "nineteen oh five"), (1900, "nineteen hundred"), (2000, "two thousand"), (2005, "two thousand five"),
     (2010, "twenty ten"), (2024, "twenty twenty-four"), (1789, "seventeen eighty-nine")],
)  # fmt: skip
def test_years(number: int, words: str) -> None:
    assert year(number) == words


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("It costs $1,234.50.", "It costs one thousand two hundred thirty-four dollars and fifty cents."),
        ("$1, $0.99 or £3.5 million", "one dollar, ninety-nine cents or three point five million pounds."),
        ("$1.5bn and $5-10", "one point five billion dollars and five to ten dollars."),
        ("At 10:05, 9:30 pm or 12:00.", "At ten oh five, nine thirty P M or twelve o clock."),
        ("3pm and 10 a.m. daily", "three P M and ten A M daily."),
        ("On 2024-03-05 we met.", "On March fifth, twenty twenty-four we met."),
        ("On 3/14/2023.", "On March fourteenth, twenty twenty-three."),
        ("March 3, 2024 and 4 July", "March third, twenty twenty-four and the fourth of July."),
        ("the 5th of May 1999", "the fifth of May, nineteen ninety-nine."),
        ("3.5 km in 12 min at 80 km/h", "three point five kilometers in twelve minutes at eighty kilometers per hour."),
        ("1 kg, 2 lbs, 16 GB", "one kilogram, two pounds, sixteen gigabytes."),
        ("-5°C or 23 °F", "minus five degrees Celsius or twenty-three degrees Fahrenheit."),
        ("50% of 1/2 and 3/4", "fifty percent of one half and three quarters."),
        ("21st, 3rd, 1,000th", "twenty-first, third, one thousandth."),
        ("1939-1945, 5–10 people", "nineteen thirty-nine to nineteen forty-five, five to ten people."),
        ("The 1990s and '80s", "The nineteen nineties and eighties."),
        ("Call 555-1234.", "Call five five five, one two three four."),
        ("007 and 12345678901234567890", "zero zero seven and " + " ".join(
            ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "zero"] * 2) + "."),
        ("Dr. Smith vs. Mr. Jones, e.g. St. Paul", "Doctor Smith versus Mister Jones, for example Saint Paul."),
        ("2+2=4, 5 × 3 = 15", "two plus two equals four, five times three equals fifteen."),
        ("v1.2.3 & B2B", "v one point two point three and B two B."),
        ("bob@a.org or example.com", "bob at a dot org or example dot com."),
        ("No. 5, #1, ~3", "number five, number one, about three."),
        ("well-known 10-year-old", "well-known ten-year-old."),
        ("| a | b |\n|---|---|\n| 1 | 2 |", "a, b. one, two."),
        ("1. First\n2. Second", "one. First. two. Second."),
        ("Hi :) <b>there</b> ![x](http://a/b.png)", "Hi there."),
        ("(https://a.example/b)", ""),
        ("See www.a.example/b?c=d, now.", "See, now."),
        ("\U0001f469\u200d\U0001f4bb\u2728 wow \u2192 great", "wow great."),
        ("$$ \U0001f600 ** `` __", ""),
        ("...", ""),
    ],
)  # fmt: skip
def test_what_is_not_a_word_becomes_words(text: str, said: str) -> None:
    assert sayable(text) == said


def test_whatever_comes_no_digit_markup_or_picture_is_left() -> None:
    generator = random.Random(3)
    pieces = [
        "12", "3.5", "$", "€", "%", "**", "`", "#", "[1]", "](", "http://x.y/z?1=2", "\U0001f600", "<b>", "|", "1:30", "-",
        "/", "word", "Dr.", "\n", " ", " ", ",", ".", "2024-13-45", "99/99/9999", "°C", "km", "\\", "~", "_", "e.g.", "1e5", "½",
    ]  # fmt: skip
    for _ in range(3000):
        text = "".join(generator.choice(pieces) for _ in range(generator.randrange(1, 14)))
        said = sayable(text)
        assert not re.search(r"[0-9*`#<>|\\~_^{}\[\]\U0001f000-\U0001faff]|https?:", said), (text, said)
        assert said == said.strip(), text


def test_a_number_in_a_text_as_long_as_an_answer_may_be_takes_no_time() -> None:
    for unit in ("1,", "*_", "[a](", "1/", "- ", "$1", "a@", "|", "1.", "a.b"):
        assert isinstance(sayable(unit * 5000), str)


@pytest.mark.parametrize(
    ("text", "clauses"),
    [
        (
            "Paris is the capital, and it is large. Go there.",
            ["Paris is the capital, ", "and it is large. ", "Go there."],
        ),
        ("It is 3.5 km, or 1,000 m.", ["It is 3.5 km, ", "or 1,000 m."]),
        ("Ask Dr. Smith or J. K. Rowling.", ["Ask Dr. Smith or J. K. Rowling."]),
        ("See https://a.example/b,c.d now.", ["See https://a.example/b,c.d now."]),
        ("Well... maybe... Yes.", ["Well... maybe... ", "Yes."]),
        ("Sure. It is.", ["Sure. ", "It is."]),
        ("March 3, 2024 was fine.", ["March 3, 2024 was fine."]),
        ("Yes, of course.", ["Yes, of course."]),
        ("1. First of all, go. 2. Then stop.", ["1. First of all, ", "go. ", "2. Then stop."]),
        ('"Stop!" he said. "Why?" "So."', ['"Stop!" he said. ', '"Why?" ', '"So."']),
        ("A [link. Here, too](http://a/b. c) is.", ["A [link. Here, too](http://a/b. c) is."]),
        ("One line\n- two things\nthree", ["One line\n", "- two things\n", "three"]),
        ("```a. B, c d e f. G``` Done.", ["```a. B, c d e f. G``` Done."]),
        (
            "The long first sentence goes on for ever and nobody knows when it ends.",
            ["The long first sentence goes on for ever ", "and nobody knows when it ends."],
        ),
    ],
)
def test_where_clauses_end(text: str, clauses: list[str]) -> None:
    assert list(split_clauses(text)) == clauses


def test_a_stream_of_any_pieces_gives_the_whole_text_and_never_a_worse_cut() -> None:
    text = (
        "Sure, Dr. Lee! It takes 3.5 hours, e.g. by train... and costs $1,200.50 (about 5%). See https://a.example/x.y, "
        "or ask Ms. Ng: she knows.\n- One, two, three things go here, right?\n2. Last."
    )
    generator = random.Random(1)
    for _ in range(300):
        splitter, got, place = ClauseSplitter(), [], 0
        while place < len(text):
            step = generator.randrange(1, 9)
            got += splitter.feed(text[place : place + step])
            place += step
        got += splitter.flush()
        assert "".join(got) == text
        for clause in got[:-1]:
            assert not re.search(r"(Dr|Ms|e\.g|3|\$1|https|a\.example)[.,:]? ?$", clause), got


def test_the_first_clause_does_not_wait_for_the_rest() -> None:
    splitter = ClauseSplitter()
    assert splitter.feed("Parrots are birds,") == []
    assert splitter.feed(" and") == ["Parrots are birds, "]


def streamed(text: str) -> list[str]:
    splitter = ClauseSplitter()
    given = [clause for piece in re.findall(r"\s*\S+", text) for clause in splitter.feed(piece)]
    return [*given, *splitter.flush()]


def test_an_answer_that_never_stops_is_spoken_all_the_same() -> None:
    endless = "The sound of " + "the sound of " * 40
    clauses = streamed(endless.strip())
    assert "".join(clauses) == endless.strip()
    assert {len(clause.split()) for clause in clauses[:-1]} == {MOST_WORDS}
    assert CLAUSE_WORDS <= len(clauses[-1].split()) < MOST_WORDS + CLAUSE_WORDS


@pytest.mark.parametrize(
    "kept",
    [
        "[a name of several words in a row](https://example.org/some-page)",
        "```\n" + "code in many words " * 20 + "\n```",
        "[a name of several words that is not yet written to its end",
        "Dr. Lee",
        "3.5 kilometres",
    ],
)
def test_a_long_clause_is_cut_beside_what_belongs_together(kept: str) -> None:
    text = "word " * (MOST_WORDS - 1) + kept + " word" * 10
    clauses = streamed(text)
    assert "".join(clauses) == text
    assert any(kept in clause for clause in clauses)
    assert kept.startswith(("[a name of several words that", "```")) or len(clauses) == 2


def test_a_bracket_that_never_closes_silences_nothing() -> None:
    assert len(streamed("[" + "the sound of " * 40)) >= 3


def test_a_few_words_more_are_no_clause_of_their_own() -> None:
    text = "word " * (MOST_WORDS + 2) + "end."
    assert [*split_clauses(text)] == [text]


@pytest.mark.parametrize("letter", [", ", "- ", ".", "?", "\n", "a\n", "1", "a-", "a.", "_a"])
def test_no_text_takes_the_square_of_its_length(letter: str) -> None:
    text = letter * (8000 // len(letter))
    began_s = time.process_time()
    clauses = [*split_clauses(text)]
    for clause in clauses:
        sayable(clause)
    assert time.process_time() - began_s < 1.5
    assert "".join(clauses).strip() == text.strip()


def test_a_long_number_is_said_digit_by_digit() -> None:
    assert sayable("7" * 5000) == " ".join(["seven"] * 5000) + "."
