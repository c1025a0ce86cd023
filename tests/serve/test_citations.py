"""Marks in an answer become links to the sources that were given, and to nothing else; none of it is spoken."""

from __future__ import annotations

import pytest

from lorikeet.messages import Source
from lorikeet.serve.assistant import Done, Found, Searching, Text
from lorikeet.serve.ui.page import Talk, _linked, _shown_events
from lorikeet.speech.sayable import sayable

SOURCES = (
    Source("Snow <b>", "https://weather.example/oslo?a=1&b=2", "Light snow."),
    Source("Evil", "javascript:alert(1)", "x"),
    Source("Odd", "https://odd.example/a(b)<c> d>", "x"),
)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Snow [1].", "Snow [\\[1\\]](<https://weather.example/oslo?a=1&b=2>)."),
        ("Snow [2], [4], [0].", "Snow [2], [4], [0]."),
        ("Odd [3]", "Odd [\\[3\\]](<https://odd.example/a%28b%29%3Cc%3E%20d%3E>)"),
        ("a [1](https://evil.example) link", "a [1](https://evil.example) link"),
    ],
)
def test_marks_become_links(text: str, shown: str) -> None:
    assert _linked(text, SOURCES) == shown


def test_the_links_stand_below_the_answer_and_are_not_said() -> None:
    talk = Talk()
    events = [Searching("why", "q"), Found(SOURCES[:2]), Text("Light snow [1]."), Done("stop", None)]
    said = list(_shown_events(iter(events), talk))[-1]
    assert said == "Light snow [1]."
    assert sayable(said) == "Light snow."
    below = talk.shown[-1]["content"]
    assert 'href="https://weather.example/oslo?a=1&amp;b=2"' in below and "Snow &lt;b&gt;" in below
    assert "javascript" not in below and below.count("<a ") == 1
