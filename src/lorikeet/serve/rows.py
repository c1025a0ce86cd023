"""Kept conversations -> rows that `tune` reads.

    rows = sft_rows(store.conversations(), rated_only=False)
    rows = preference_rows(store.conversations())

A row's prompt is what the model was given, block of search results included, so that training sees what serving gave.
A turn that `tune` would not read, such as one about a function's result, makes no row. It knows neither SQL nor files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from lorikeet.data.load import why_broken

WHOLE = "stop"
"""Answers that ended otherwise are no examples, unless they were corrected."""


def sft_rows(conversations: Iterable[dict[str, Any]], *, rated_only: bool) -> Iterator[dict[str, Any]]:
    """Yield `{"id", "messages"}`, with `"weight": 0` at answers that are not learned from.

    A correction stands in the place of its answer; answers rated down or cut short without one are left out, and with
    `rated_only` those that nobody rated too. Turns that only go on with an earlier row share one row with it.
    """
    for conversation in conversations:
        rows: list[dict[str, Any]] = []
        for turn in conversation["turns"]:
            answer = _best_answer(turn, rated_only=rated_only)
            if answer is None:
                continue
            messages = [*_context(turn["prompt"]), {"role": "assistant", "content": answer}]
            if why_broken({"messages": messages}):
                continue
            if rows and _continues(rows[-1]["messages"], messages):
                learned = rows.pop()["messages"]
                messages[: len(learned)] = learned
            rows.append({"id": turn["id"], "messages": messages})
        yield from rows


def preference_rows(conversations: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yield `{"id", "prompt", "chosen", "rejected"}`, TRL's conversational layout, for each answer with a correction."""
    for conversation in conversations:
        for turn in conversation["turns"]:
            row = _preference(turn)
            if row and not why_broken(row):
                yield row


def _preference(turn: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of a turn, None if its answer was not corrected or the correction says the same."""
    answer, correction = turn["answer"], turn["feedback"]["correction"]
    if not correction or not answer.strip() or correction.strip() == answer.strip():
        return None
    return {
        "id": turn["id"],
        "prompt": turn["prompt"],
        "chosen": [{"role": "assistant", "content": correction}],
        "rejected": [{"role": "assistant", "content": answer}],
    }


def _best_answer(turn: dict[str, Any], *, rated_only: bool) -> str | None:
    """Return the answer to learn from, None if there is none."""
    feedback = turn["feedback"]
    if feedback["correction"]:
        return str(feedback["correction"])
    if feedback["rating"] == "down" or turn["outcome"] != WHOLE or (rated_only and feedback["rating"] is None):
        return None
    return str(turn["answer"]) if turn["answer"].strip() else None


def _context(prompt: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a prompt in which no earlier answer is learned from."""
    return [{**message, "weight": 0} if message["role"] == "assistant" else message for message in prompt]


def _continues(row: list[dict[str, Any]], messages: list[dict[str, Any]]) -> bool:
    """Say whether `messages` begin with exactly the turns of `row`."""
    texts = [[(message["role"], message["content"]) for message in part] for part in (row, messages)]
    return texts[1][: len(row)] == texts[0]
