"""The values that every stage passes on: `Message`, `Conversation`, `Source`, `Delta`, `Usage`, `AnswerOptions`.

It owns their shape and nothing else: how they become tokens is `prompt`'s business, how sources become text
is `grounding`'s, how files become conversations is `data.load`'s.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

Role = Literal["system", "user", "assistant", "tool"]
"""`tool` is the result of a function that the assistant called; conversations to tune on have none."""

FinishReason = Literal["stop", "length", "tool_calls"]
"""The model ended by itself, a limit did, or it waits for the functions that it called."""


@dataclass(frozen=True, slots=True)
class Source:
    """One search result, as a search service gave it: untrusted text."""

    title: str
    url: str
    snippet: str


@dataclass(frozen=True, slots=True)
class ToolCall:
    """A function that the model calls; in a stream, a piece of one."""

    index: int
    """Its place among the calls of an answer."""
    id: str
    """What its result refers to; '' in pieces after the first."""
    name: str
    """The function; '' in pieces after the first."""
    arguments: str
    """JSON text, as the model wrote it; the pieces' joined."""

    def as_dict(self) -> dict[str, Any]:
        """Return the form that chat templates and OpenAI's API take."""
        return {"id": self.id, "type": "function", "function": {"name": self.name, "arguments": self.arguments}}


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: Role
    content: str
    sources: tuple[Source, ...] = ()
    """Search results that belong to a user's turn; `grounding.ground` renders them into `content`."""

    tool_calls: tuple[ToolCall, ...] = ()
    """The functions that an assistant's turn calls."""
    tool_call_id: str = ""
    """The call that a tool's turn is the result of."""
    supervised: bool = True
    """Whether an assistant's turn is learned from; one that is not is context (`"weight": 0` in a file)."""

    def as_dict(self) -> dict[str, Any]:
        """Return `{"role", "content"}`, the form that chat templates and OpenAI's API take, with calls if there are any."""
        row: dict[str, Any] = {"role": self.role, "content": self.content}
        if self.tool_calls:
            row["tool_calls"] = [call.as_dict() for call in self.tool_calls]
        if self.tool_call_id:
            row["tool_call_id"] = self.tool_call_id
        return row


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
class TokenLogprob:
    """How probable a token was where it stands."""

    token: str
    logprob: float
    """Natural logarithm of its probability."""
    bytes: tuple[int, ...]
    """Its bytes; a token may be a part of a character."""
    top: tuple[TokenLogprob, ...] = ()
    """The most probable tokens in its place."""


@dataclass(frozen=True, slots=True)
class Delta:
    """A piece of a streamed answer; the last one has a `finish_reason`."""

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    logprobs: tuple[TokenLogprob, ...] = ()
    """The tokens of `text`, where they were asked for."""
    tool_calls: tuple[ToolCall, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class AnswerOptions:
    """What a request can ask of an answer beyond its length, sampling and stops; None leaves it to the engine."""

    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: Mapping[str, float] | None = None
    """Token id -> what is added to its logit."""
    top_logprobs: int | None = None
    """How many tokens are told at each place, 0 for the chosen one alone; None for no log-probabilities."""
    response_format: Mapping[str, Any] | None = None
    """OpenAI's `json_object` or `json_schema`."""
    tools: Sequence[Mapping[str, Any]] = ()
    """Functions that the model may call, in OpenAI's form."""
    tool_choice: str | Mapping[str, Any] | None = None
    parallel_tool_calls: bool | None = None

    def fields(self) -> dict[str, Any]:
        """Return those that were given, as fields of OpenAI's request."""
        names = ("frequency_penalty", "presence_penalty", "logit_bias", "response_format", "tools", "tool_choice")
        given = {name: getattr(self, name) for name in (*names, "parallel_tool_calls")}
        fields = {name: value for name, value in given.items() if value is not None and value != ()}
        if self.top_logprobs is not None:
            # llama-server takes 0 for its own default, so that the most probable one is always told, and dropped if need be.
            fields |= {"logprobs": True, "top_logprobs": max(1, self.top_logprobs)}
        return fields


HALF_CHARACTERS = "a text ends or begins in the middle of a character (half of a surrogate pair); send whole characters"


def has_half_characters(value: Any) -> bool:
    r"""Say whether a JSON value has a surrogate alone, such as `"\ud83d"`, which no UTF-8 can hold (RFC 8259, 8.2)."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    except RecursionError:
        return False  # it is refused for its depth
    return False
