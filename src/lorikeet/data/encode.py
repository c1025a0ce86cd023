"""Conversations -> tokens no longer than a limit; what is truncated or left out is counted, with its reason.

    encoding = encode_all(prompt, conversations, max_length=2048, on_long="truncate")

Tuning trains on these rows and `inspect` shows them: one rule for both.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from rich.console import Console
from rich.progress import track

from lorikeet.errors import InputError
from lorikeet.messages import Conversation
from lorikeet.prompt import Encoded, PromptFormat

SHOWN_FROM = 2000
"""Encoding shows its progress from this many conversations: a thousand take about a second."""

LEAST_SHARED = 8
"""A start of fewer tokens than this is not worth computing apart."""

TOO_LONG = "longer than max_length"
NOTHING_LEFT = "no supervised token within max_length"


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A conversation that cannot be learned from."""

    origin: str
    why: str


@dataclass(frozen=True, slots=True)
class Encoding:
    """Conversations as tokens, and what became of the others."""

    rows: list[Encoded]
    kept: list[int]
    """Per row, the place of its conversation in what was given."""
    truncated: int
    """How many rows were cut to the limit."""
    cut_tokens: int
    """How many tokens that took away."""
    left_out: list[LeftOut]

    @property
    def dropped(self) -> int:
        """How many conversations were left out."""
        return len(self.left_out)

    @property
    def reasons(self) -> dict[str, int]:
        """How many were left out for each reason, the most frequent first."""
        return dict(Counter(entry.why for entry in self.left_out).most_common())

    @property
    def tokens(self) -> int:
        """All tokens."""
        return sum(len(row.ids) for row in self.rows)

    @property
    def supervised_tokens(self) -> int:
        """The tokens that the loss counts."""
        return sum(row.supervised_tokens for row in self.rows)


def encode_all(
    prompt: PromptFormat, conversations: Sequence[Conversation], *, max_length: int, on_long: str
) -> Encoding:
    """Return the conversations as tokens, none longer than `max_length` and each with something to learn.

    Longer ones are truncated or dropped, and so are those that the template refuses or that keep no supervised token.
    Raises InputError when `on_long` is `error` and one is too long.
    """
    console = Console(stderr=True)
    quiet = not console.is_terminal or len(conversations) < SHOWN_FROM
    rows: list[Encoded] = []
    kept: list[int] = []
    left_out: list[LeftOut] = []
    truncated = cut_tokens = 0
    shown = track(conversations, "encoding", console=console, transient=True, disable=quiet)
    for place, conversation in enumerate(shown):
        try:
            row = prompt.encode(conversation)
        except InputError as error:
            left_out.append(LeftOut(conversation.origin, str(error).removeprefix(f"{conversation.origin}: ")))
            continue
        excess = len(row.ids) - max_length
        if excess > 0 and on_long == "error":
            raise InputError(
                f"{conversation.origin}: {len(row.ids)} tokens, more than max_length {max_length}; "
                "raise it, or choose --on-long truncate or drop"
            )
        if excess > 0 and on_long == "drop":
            left_out.append(LeftOut(conversation.origin, TOO_LONG))
            continue
        if excess > 0:
            row = Encoded(row.ids[:max_length], row.supervised[:max_length])
        if not row.supervised_tokens:
            left_out.append(LeftOut(conversation.origin, NOTHING_LEFT))
            continue
        if excess > 0:
            truncated += 1
            cut_tokens += excess
        rows.append(row)
        kept.append(place)
    return Encoding(rows, kept, truncated, cut_tokens, left_out)


def shared_start(rows: Sequence[Encoded]) -> int:
    """Return how many tokens all rows start with, none supervised or followed by one that is; 0 if it is not worth it."""
    first, last = min(row.ids for row in rows), max(row.ids for row in rows)
    alike = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(first, last, strict=False)))
    found = min(alike, *(row.supervised.index(True) - 1 for row in rows))
    return found if found >= LEAST_SHARED else 0
