"""The values that every stage passes on: `Message`, `Conversation`, `Source`, `Delta`, `Usage`.

It owns their shape and nothing else: how they become tokens is `prompt`'s business, how sources become text
is `grounding`'s, how files become conversations is `data.load`'s.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True)
class Source:
    """One search result, as a search service gave it: untrusted text."""

    title: str
    url: str
    snippet: str


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    sources: tuple[Source, ...] = ()
    """Search results that belong to a user's turn; `grounding.ground` renders them into `content`."""

    def as_dict(self) -> dict[str, str]:
        """Return `{"role", "content"}`, the form that chat templates and OpenAI's API take."""
        return {"role": self.role, "content": self.content}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A sequence of turns that ends, for training, with the assistant."""

    messages: tuple[Message, ...]
    origin: str = ""
    """Where it came from, for messages to people: `data.jsonl:17`, or the row's id."""

    def with_system(self, prompt: str) -> Conversation:
        """Return the conversation led by a system turn: its own, or `prompt` if it has none and `prompt` is not ''."""
        if not prompt or (self.messages and self.messages[0].role == "system"):
            return self
        return Conversation((Message("system", prompt), *self.messages), self.origin)


@dataclass(frozen=True, slots=True)
class Usage:
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer; the last one has a `finish_reason`."""

    text: str
    finish_reason: Literal["stop", "length"] | None = None
    usage: Usage | None = None
