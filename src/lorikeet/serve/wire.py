"""The shapes of OpenAI's API: requests read and checked, answers and chunks written.

    request = ChatRequest.model_validate(body)
    chunks = Chunks("chatcmpl-1", model="my-model")

Fields that would change the answer and are not served (`tools`, `logprobs`, …) are refused rather than ignored;
those that change nothing (`user`, `metadata`, …) pass. It knows no HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator

from lorikeet.messages import Message, Source, Usage
from lorikeet.serve.assistant import Done, Event, Found, SearchFailed, Searching, Text
from lorikeet.serve.note import Note
from lorikeet.speech.encode import FASTEST, FORMATS, SLOWEST

MAX_MESSAGES = 1024
MAX_SPEECH_CHARACTERS = 4096
"""OpenAI's own limit of `input`."""

_SEEDS = 2**32 - 1
"""Seeds of llama.cpp are below this; OpenAI's are 64-bit and are folded into it."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "tools": ([],),
    "functions": ([],),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
}
"""Fields that are not served, with the values that ask for nothing."""


def _join_parts(content: Any) -> Any:
    """Return a message's text: the string itself, or its text parts joined."""
    if not isinstance(content, list):
        return content
    texts = []
    for part in content:
        if not isinstance(part, dict) or part.get("type") != "text" or not isinstance(part.get("text"), str):
            raise ValueError('a part must be {"type": "text", "text": "..."}; this model reads text alone')
        texts.append(part["text"])
    return "\n".join(texts)


def _list(stop: Any) -> Any:
    return [stop] if isinstance(stop, str) else stop


def _written(name: str) -> str:
    if name not in FORMATS:
        raise ValueError(f"{name[:40]!r} is not written here; there are: {', '.join(FORMATS)}")
    return name


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class ChatMessage(_Strict):
    """One turn of a request."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(_join_parts)]

    def message(self) -> Message:
        """Return the turn as the assistant takes it; a developer's turn is a system turn."""
        return Message("system" if self.role == "developer" else self.role, self.content)


class StreamOptions(_Strict):
    """How to stream."""

    include_usage: bool = False


class Extension(_Strict):
    """What Lorikeet adds to OpenAI's request."""

    model_config = ConfigDict(extra="forbid")
    search: Literal["auto", "off", "always"] = "off"
    conversation: str = Field("", max_length=100)
    """A kept conversation that this turn goes on with."""


class ChatRequest(_Strict):
    """The body of `/v1/chat/completions`."""

    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    model: str = "default"
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    max_tokens: int | None = Field(None, ge=1, le=1_000_000)
    max_completion_tokens: int | None = Field(None, ge=1, le=1_000_000)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: Annotated[
        list[Annotated[str, StringConstraints(min_length=1, max_length=200)]] | None,
        BeforeValidator(_list),
        Field(max_length=4),
    ] = None
    store: bool | None = None
    """False keeps this turn out of the server's memory, if it has one."""
    lorikeet: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _served(cls, body: Any) -> Any:
        for name, neutral in _NEUTRAL.items() if isinstance(body, dict) else ():
            value = body.get(name)
            if value is not None and value not in neutral:
                raise ValueError(
                    f"{name}: {'only ' + str(neutral[0]) if neutral else 'nothing'} is served; leave it out"
                )
        return body

    @property
    def answer_tokens(self) -> int | None:
        """The limit of the answer, under either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def engine_seed(self) -> int | None:
        """The seed in the engine's range; equal seeds stay equal."""
        return None if self.seed is None else self.seed % _SEEDS


class SpeechRequest(_Strict):
    """The body of `/v1/audio/speech`."""

    input: str = Field(min_length=1, max_length=MAX_SPEECH_CHARACTERS)
    model: str = "default"
    voice: str = "default"
    response_format: Annotated[str, AfterValidator(_written)] = FORMATS[0]
    stream_format: Literal["audio", "sse"] = "audio"
    speed: float | None = Field(None, ge=SLOWEST, le=FASTEST)


class SearchNotes:
    """What a search of this answer did, for the response's `lorikeet` field."""

    def __init__(self) -> None:
        """Start with no search."""
        self._search: dict[str, Any] | None = None

    def note(self, event: Event) -> None:
        """Take in one event."""
        if isinstance(event, Searching):
            self._search = {"reason": event.reason, "failed": None, "sources": []}
        elif isinstance(event, Found) and self._search:
            self._search["sources"] = [source_fields(source) for source in event.sources]
        elif isinstance(event, SearchFailed) and self._search:
            self._search["failed"] = event.message

    def fields(self) -> dict[str, Any]:
        """Return `{"search": None}`, or its reason, its failure (a string or None) and its sources."""
        return {"search": self._search}


def source_fields(source: Source) -> dict[str, str]:
    """Return what a client needs to show a source."""
    return {"title": source.title, "url": source.url}


def usage_fields(usage: Usage | None) -> dict[str, int] | None:
    """Return OpenAI's `usage`."""
    if usage is None:
        return None
    total = usage.prompt_tokens + usage.completion_tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}


class Answer:
    """One answer on its way out, whole or in chunks, from the same events."""

    def __init__(self, model: str, *, include_usage: bool = False) -> None:
        """Begin an answer of `model`; with `include_usage` a stream ends with a chunk of usage."""
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._include_usage = include_usage
        self._search = SearchNotes()
        self.note: Note | None = None
        """What is noted of the turn for the memory; None if it is not to be kept."""

    @property
    def id(self) -> str:
        """The answer's name, by which feedback refers to it."""
        return str(self._head["id"])

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """Return the chunks that `event` becomes; those of a search wait for the last one."""
        self._search.note(event)
        if isinstance(event, Text):
            return [self._chunk({"content": event.text})]
        if isinstance(event, Done):
            last = self._chunk({}, event.finish_reason) | {"lorikeet": self._extension()}
            usage = self._chunk(None) | {"usage": usage_fields(event.usage)}
            return [last, usage] if self._include_usage else [last]
        return []

    def first_chunk(self) -> dict[str, Any]:
        """Return the chunk that names the role, which opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def whole(self, events: Iterable[Event]) -> dict[str, Any]:
        """Return the answer as one object."""
        text, reason, usage = "", "stop", None
        for event in events:
            self._search.note(event)
            if isinstance(event, Text):
                text += event.text
            elif isinstance(event, Done):
                reason, usage = event.finish_reason, event.usage
        message = {"role": "assistant", "content": text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": reason}
        answer = {**self._head, "object": "chat.completion", "choices": [choice], "usage": usage_fields(usage)}
        return answer | {"lorikeet": self._extension()}

    def _extension(self) -> dict[str, Any]:
        """Return the `lorikeet` field: the search, and where the turn was kept (None if it was not)."""
        kept = self.note and self.note.kept
        memory = {"id": kept.id, "conversation": kept.conversation_id} if kept else None
        return {**self._search.fields(), "memory": memory}

    def _chunk(self, delta: dict[str, Any] | None, finish_reason: str | None = None) -> dict[str, Any]:
        """Return a chunk with `delta`, or with no choice if it is None."""
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice] if delta is not None else []}
        return chunk | ({"usage": None} if self._include_usage else {})
