"""Held-out conversations, encoded for scoring in their own context and in a stranger's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from lorikeet.errors import InputError
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import Encoded, PromptFormat

MOST_STRANGERS = 24
"""Answers scored after a stranger's question: the effect is large, so few conversations show it."""


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out conversations, encoded in their own context and in a stranger's."""

    conversations: list[Conversation]
    own: list[Encoded]
    strangers: list[Encoded]
    """The last answer of the first ones after the context of another; only that answer is supervised."""
    skipped: int
    """Conversations longer than max_length, or that the template refuses."""

    @property
    def last_tokens(self) -> list[int]:
        """Supervised tokens of each last answer."""
        return [row.supervised_tokens for row in self.strangers]

    @property
    def longest_tokens(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in (*self.own, *self.strangers))


def encode_heldout(prompt: PromptFormat, conversations: Sequence[Conversation], *, max_length: int) -> Heldout:
    """Return the conversations that fit, each with the next one's context as the stranger's. Raises InputError if under 2 fit."""
    kept, own = [], []
    for conversation in conversations:
        try:
            row = prompt.encode(conversation)
        except InputError:
            continue
        if len(row.ids) <= max_length and row.supervised_tokens:
            kept.append(conversation)
            own.append(row)
    if len(kept) < 2:
        raise InputError(f"{len(kept)} held-out conversations fit into {max_length} tokens; at least 2 are needed")
    strangers = []
    for conversation, other in zip(kept[:MOST_STRANGERS], [*kept[1:], kept[0]], strict=False):
        swapped = Conversation((*other.messages[:-1], conversation.messages[-1]), conversation.origin)
        strangers.append(only_last_answer(prompt.encode(swapped)))
    return Heldout(kept, own, strangers, len(conversations) - len(kept))


def only_last_answer(row: Encoded) -> Encoded:
    """Return `row` with nothing supervised but its last answer."""
    end = max(place for place, counted in enumerate(row.supervised) if counted) + 1
    start = end
    while start and row.supervised[start - 1]:
        start -= 1
    return Encoded(row.ids, [start <= place < end for place in range(len(row.ids))])


def question_of(conversation: Conversation) -> tuple[Message, ...]:
    """Return the turns before the first answer."""
    first = next(index for index, message in enumerate(conversation.messages) if message.role == "assistant")
    return conversation.messages[:first]
