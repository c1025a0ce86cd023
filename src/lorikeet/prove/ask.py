"""Questions to a running engine, several at once: llama.cpp decodes its slots together, much faster than one by one.

    answers = ask_all(engine, questions, max_tokens=160)

Answers are greedy and come through the served path. It does not judge them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from lorikeet.engine import LlamaEngine
from lorikeet.messages import Message

SLOTS = 8
"""Answers decoded at once."""

SPEED_TOKENS = 64
SPEED_RUNS = 3

Done = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answer."""

    text: str
    ended: bool
    """Whether it ended by itself, not at the token limit."""


def ask(engine: LlamaEngine, question: Sequence[Message], *, max_tokens: int) -> Answer:
    """Return the greedy answer. Raises EngineError."""
    text, ended = "", False
    for delta in engine.stream(question, max_tokens=max_tokens, temperature=0.0, seed=0):
        text += delta.text
        ended = delta.finish_reason == "stop"
    return Answer(text, ended)


def ask_each(engine: LlamaEngine, questions: Sequence[Sequence[Message]], *, max_tokens: int) -> Iterator[Answer]:
    """Yield the answers in the questions' order, up to `SLOTS` decoded at once."""
    pool = ThreadPoolExecutor(SLOTS)
    try:
        yield from pool.map(lambda question: ask(engine, question, max_tokens=max_tokens), questions)
    finally:
        pool.shutdown(cancel_futures=True)


def ask_all(
    engine: LlamaEngine, questions: Sequence[Sequence[Message]], *, max_tokens: int, done: Done = lambda: None
) -> list[Answer]:
    """Return the answers; `done` is called after each."""
    answers = []
    for answer in ask_each(engine, questions, max_tokens=max_tokens):
        answers.append(answer)
        done()
    return answers


def decode_speed(engine: LlamaEngine, ids: Sequence[int]) -> float:
    """Return tokens/s of decoding one answer after the prompt `ids` with nothing else running: the median of three."""
    body = {"prompt": list(ids), "n_predict": SPEED_TOKENS, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    speeds = [float(engine.post("/completion", body)["timings"]["predicted_per_second"]) for _ in range(SPEED_RUNS)]
    return round(statistics.median(speeds), 1)
