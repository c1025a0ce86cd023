"""Held-out conversations, encoded for scoring in their own context and in a stranger's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

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
    """The last answer of the first ones after another's context; only that answer is supervised."""
    skipped: int
    """Conversations longer than max_length, without an answer to a question, or that the template refuses."""

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
        if len(row.ids) <= max_length and row.supervised_tokens and question_of(conversation):
            kept.append(conversation)
            own.append(row)
    if len(kept) < 2:
        raise InputError(f"{len(kept)} held-out conversations fit into {max_length} tokens; at least 2 are needed")
    strangers = [
        _after_stranger(prompt, conversation, other)
        for conversation, other in zip(kept[:MOST_STRANGERS], [*kept[1:], kept[0]], strict=False)
    ]
    return Heldout(kept, own, strangers, len(conversations) - len(kept))


def _after_stranger(prompt: PromptFormat, conversation: Conversation, other: Conversation) -> Encoded:
    """Return the last answer of `conversation` after what leads to the last one of `other`; nothing else is supervised."""
    context = (replace(message, supervised=False) for message in other.messages[: _learned(other)[-1]])
    answer = conversation.messages[_learned(conversation)[-1]]
    return prompt.encode(Conversation((*context, answer), conversation.origin))


def question_of(conversation: Conversation) -> tuple[Message, ...]:
    """Return the turns before the first answer to a user that is learned from; () if there is none."""
    roles = [message.role for message in conversation.messages]
    asked = (place for place in _learned(conversation) if "user" in roles[:place])
    return conversation.messages[: next(asked, 0)]


def _learned(conversation: Conversation) -> list[int]:
    """Return the places of the answers that are learned from."""
    return [p for p, message in enumerate(conversation.messages) if message.role == "assistant" and message.supervised]
