"""The packaged conversations: how many, how varied, and that every answer can be said aloud."""

from __future__ import annotations

import json
import re
from importlib import resources
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from lorikeet.prove.speech import speakability

FOLDER = Path(str(resources.files("lorikeet.data"))) / "spoken"
ROWS: list[dict[str, Any]] = [
    json.loads(line)
    for file in sorted(FOLDER.glob("*.jsonl"))
    for line in file.read_text(encoding="utf-8").splitlines()
]
ANSWERS = [(row["id"], m["content"]) for row in ROWS for m in row["messages"] if m["role"] == "assistant"]
SAYABLE = re.compile(r"[A-Za-z\u00c0-\u00ff ',.?!:;-]+")


def words(text: str) -> list[str]:
    return re.findall(r"[a-z0-9']+", text.lower())


def trigrams(row: dict[str, Any]) -> set[tuple[str, ...]]:
    said = words(" ".join(message["content"] for message in row["messages"]))
    return {tuple(said[place : place + 3]) for place in range(len(said) - 2)}


def test_there_are_enough_of_each_kind() -> None:
    assert len(ROWS) >= 400
    assert len({row["id"] for row in ROWS}) == len(ROWS)
    kinds = [row.get("grounded") for row in ROWS]
    assert sum(kind is not None for kind in kinds) >= 80
    assert kinds.count("missing") >= 25
    assert kinds.count("injection") >= 15
    assert set(kinds) == {None, "answered", "missing", "injection"}
    assert sum(len(row["messages"]) > 2 for row in ROWS) >= 80


def test_sources_are_data_and_only_where_the_row_is_grounded() -> None:
    for row in ROWS:
        sources = [source for message in row["messages"] for source in message.get("sources", [])]
        assert bool(sources) == ("grounded" in row), row["id"]
        assert all(s["title"] and s["snippet"] and ".example" in s["url"] for s in sources), row["id"]
        assert all("sources" not in m for m in row["messages"] if m["role"] == "assistant"), row["id"]


def test_roles_alternate_and_end_with_the_assistant() -> None:
    for row in ROWS:
        roles = [message["role"] for message in row["messages"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2), row["id"]


@pytest.mark.parametrize(("name", "answer"), ANSWERS, ids=[f"{name}-{n}" for n, (name, _) in enumerate(ANSWERS)])
def test_every_answer_can_be_said_aloud(name: str, answer: str) -> None:
    assert SAYABLE.fullmatch(answer), "letters and plain punctuation only: numbers are written as they are said"
    assert speakability(answer).speakable
    assert len(re.findall(r"[.?!](?=\s|$)", answer)) <= 3


def test_no_two_conversations_are_alike() -> None:
    grams = [(row["id"], trigrams(row)) for row in ROWS]
    worst = max(
        ((len(a & b) / len(a | b), left, right) for (left, a), (right, b) in combinations(grams, 2)),
        default=(0.0, "", ""),
    )
    assert worst[0] < 0.5, worst


def test_answers_open_in_many_ways() -> None:
    openings = {tuple(words(answer)[:3]) for _, answer in ANSWERS}
    assert len(openings) >= 300
    assert len({tuple(words(answer)[:2]) for _, answer in ANSWERS}) >= 300
