"""One turn: when it looks things up, what it tells, and what it leaves out of a long history."""

from __future__ import annotations

from contextlib import closing
from datetime import date

import pytest

from lorikeet.messages import Message
from lorikeet.serve.assistant import Assistant, Done, Found, SearchFailed, Searching, Text, fit
from lorikeet.serve.search.decide import decide

from .fakes import EchoEngine, OneSource


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        ("What's the WEATHER like?", 'you asked about "weather"'),
        ("who won in 2026", 'you asked about "2026"'),
        ("and in 2025?", 'you asked about "2025"'),
        ("and in 2024?", None),
        ("the currents of the sea", None),
        ("who wrote Emma", None),
    ],
)
def test_keywords_and_the_two_last_years_ask_for_a_search(question: str, reason: str | None) -> None:
    assert decide(question, today=date(2026, 11, 23)) == reason


def test_the_events_of_a_turn() -> None:
    assistant = Assistant(EchoEngine(), system_prompt="", provider=OneSource())
    events = list(assistant.respond([Message("user", "news today")], search="auto"))
    assert [type(event) for event in events] == [Searching, Found] + [Text] * 10 + [Done]
    assert "".join(event.text for event in events if isinstance(event, Text)) == "news today"


def test_off_never_searches_and_always_does() -> None:
    provider = OneSource()
    assistant = Assistant(EchoEngine(), system_prompt="", provider=provider)
    list(assistant.respond([Message("user", "weather today")], search="off"))
    assert provider.queries == []
    events = list(assistant.respond([Message("user", "hello")], search="always"))
    assert isinstance(events[0], Searching) and events[0].reason == "you asked to always look up"


def test_a_failed_search_is_told_and_the_question_stays_plain() -> None:
    engine = EchoEngine()
    assistant = Assistant(engine, system_prompt="", provider=OneSource("DuckDuckGo did not answer within 8 s"))
    events = list(assistant.respond([Message("user", "weather")], search="auto"))
    assert isinstance(events[1], SearchFailed) and "8 s" in events[1].message
    assert engine.asked[0][-1].content == "weather"


def test_closing_stops_the_engine() -> None:
    engine = EchoEngine()
    with closing(Assistant(engine, system_prompt="").respond([Message("user", "long" * 50)])) as events:  # type: ignore[type-var]
        next(events)
    assert engine.stopped.is_set() and engine.said == 1


def test_a_long_history_loses_its_oldest_turns_first() -> None:
    turns = [Message("user" if n % 2 == 0 else "assistant", f"{n} " + "x" * 300) for n in range(21)]
    kept = fit([Message("system", "s"), *turns], tokens=600)
    assert kept[0].role == "system" and kept[-1] == turns[-1]
    assert kept[1].role == "user" and 2 < len(kept) < 10
    assert kept[1:] == turns[-(len(kept) - 1) :]
    assert fit(turns[-1:], tokens=5) == turns[-1:]
