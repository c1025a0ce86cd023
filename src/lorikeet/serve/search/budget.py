"""How many tokens of search results an engine can read in the time that a user will wait.

speed = measure_prefill(engine, context_tokens=4096)                   # tokens a second, on the engine as it runs
tokens = budget_tokens(speed, wait_ms=1000, context_tokens=4096)
"""

from __future__ import annotations

import random
import time
from contextlib import closing

from lorikeet.engine import Engine
from lorikeet.messages import Message

SHORT_WORDS, LONG_WORDS = 16, 240
"""Words of the two texts that are timed; what one costs more than the other is the prefill alone."""

LEAST_TOKENS, MOST_TOKENS = 96, 1024
"""One snippet with its frame, and about ten."""

_WORDS = ("apple", "river", "stone", "cloud", "light", "paper", "green", "north", "table", "music", "water", "glass")


def measure_prefill(engine: Engine, *, context_tokens: int) -> float | None:
    """Return how many tokens of a prompt `engine` reads a second; None where it does not say how many it read.

    Two texts of random words are read, so that no cache has them, and one token is written after each. The faster of
    two tries counts: what else a starting machine does slows one of them.
    """
    speeds = [_measure_once(engine, long_words=min(LONG_WORDS, context_tokens // 3)) for _ in range(2)]
    return max(speeds) or None


def _measure_once(engine: Engine, *, long_words: int) -> float:
    """Return the tokens a second, or 0 where nothing can be said."""
    short_s, short_tokens = _time(engine, SHORT_WORDS)
    long_s, long_tokens = _time(engine, long_words)
    if long_tokens <= short_tokens or long_s <= short_s:
        return 0.0
    return (long_tokens - short_tokens) / (long_s - short_s)


def _time(engine: Engine, words: int) -> tuple[float, int]:
    """Return the seconds and the prompt tokens of a question of so many random words."""
    text = " ".join(random.choices(_WORDS, k=words))
    tokens = 0
    began_s = time.perf_counter()
    # A seed keeps llama.cpp from using a cached prefix.
    with closing(engine.stream([Message("user", text)], max_tokens=1, temperature=0.0, seed=0)) as deltas:
        for delta in deltas:
            tokens = delta.usage.prompt_tokens if delta.usage else tokens
    return time.perf_counter() - began_s, tokens


def budget_tokens(tokens_per_s: float, *, wait_ms: float, context_tokens: int) -> int:
    """Return the tokens that are read in `wait_ms`, within what makes sense and a quarter of the context."""
    return int(min(max(tokens_per_s * wait_ms / 1000, LEAST_TOKENS), MOST_TOKENS, context_tokens // 4))
