"""Questions to a running engine, several at once: llama.cpp decodes its slots together, much faster than one by one.

    with Asking(engine) as asking:
        short, long = asking.start(some, max_tokens=40), asking.start(others, max_tokens=160)
        answers = list(short)

Answers are greedy and come through the served path. Lists that are started before the first is read share the slots, so none
stands empty while the last answers of a list are written. It does not judge them.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Self

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


class Asking:
    """A running engine that answers lists of questions, up to `SLOTS` at once whichever list they are from."""

    def __init__(self, engine: LlamaEngine) -> None:
        """Ask `engine`."""
        self.engine = engine
        self._pool = ThreadPoolExecutor(SLOTS)

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Ask nothing more, and wait for what is being answered."""
        self._pool.shutdown(cancel_futures=True)

    def start(self, questions: Sequence[Sequence[Message]], *, max_tokens: int) -> Iterator[Answer]:
        """Begin to ask, after what was started before, and return the answers in the questions' order as they come."""
        return self._pool.map(partial(ask, self.engine, max_tokens=max_tokens), questions)


def counted(answers: Iterator[Answer], done: Done) -> list[Answer]:
    """Return the answers; `done` is called after each."""
    found = []
    for answer in answers:
        found.append(answer)
        done()
    return found


def decode_speed(engine: LlamaEngine, ids: Sequence[int]) -> float:
    """Return tokens/s of decoding one answer after the prompt `ids` with nothing else running: the median of three."""
    body = {"prompt": list(ids), "n_predict": SPEED_TOKENS, "ignore_eos": True, "temperature": 0, "cache_prompt": False}
    speeds = [float(engine.post("/completion", body)["timings"]["predicted_per_second"]) for _ in range(SPEED_RUNS)]
    return round(statistics.median(speeds), 1)
