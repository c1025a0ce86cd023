"""The shapes of OpenAI's API: requests read and checked, answers and chunks written.

    request = ChatRequest.model_validate(body)
    answer = Answer("my-model")
    answer.take(event)              # of each event; `chunks` takes it and returns what to send of it
    answer.whole()

Fields that would change the answer and are not served (`n`, `audio`, …) are refused rather than ignored; those that
change nothing (`user`, `metadata`, …) pass. What a request may ask of an answer beyond its length and sampling is in
`wire_options`. It knows no HTTP.
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)

from lorikeet.messages import Message, Source, TokenLogprob, ToolCall, Usage
from lorikeet.serve.assistant import Calling, Done, Event, Found, SearchFailed, Searching, Text
from lorikeet.serve.note import Note
from lorikeet.serve.wire_options import MAX_TOOLS, Body, CalledTool, OptionFields, Strict
from lorikeet.speech.encode import FASTEST, FORMATS, SLOWEST

MAX_MESSAGES = 1024
MAX_SPEECH_CHARACTERS = 4096
"""OpenAI's own limit of `input`."""

LEAST_LOGPROB = -9999.0
"""OpenAI's own figure for what never happens: JSON knows no infinity."""

_SEEDS = 2**32 - 1
"""Seeds of llama.cpp are below this; OpenAI's are 64-bit and are folded into it."""

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "functions": ([],),
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


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ChatMessage(Strict):
    """One turn of a request."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    tool_calls: list[CalledTool] | None = Field(None, max_length=MAX_TOOLS)
    """The functions that an assistant's turn called."""
    tool_call_id: Annotated[str, Field(max_length=200)] | None = Field(None, validate_default=True)
    """The call that a tool's turn is the result of."""
    content: Annotated[str | None, BeforeValidator(_join_parts, json_schema_input_type=str | list[TextPart] | None)] = (
        Field(None, validate_default=True)
    )

    @field_validator("tool_calls")
    @classmethod
    def _only_assistants_call(cls, calls: list[CalledTool] | None, info: ValidationInfo) -> list[CalledTool] | None:
        if calls and info.data.get("role") != "assistant":
            raise ValueError("only a turn of the assistant calls functions")
        return calls

    @field_validator("tool_call_id")
    @classmethod
    def _results_name_their_call(cls, call_id: str | None, info: ValidationInfo) -> str | None:
        if not call_id and info.data.get("role") == "tool":
            raise ValueError("is missing; a tool's turn names the call that it is the result of")
        return call_id

    @field_validator("content")
    @classmethod
    def _says_something(cls, content: str | None, info: ValidationInfo) -> str | None:
        if content is None and not info.data.get("tool_calls"):
            raise ValueError("is missing; only a turn that calls functions can be without")
        return content

    def message(self) -> Message:
        """Return the turn as the assistant takes it; a developer's turn is a system turn."""
        return Message(
            "system" if self.role == "developer" else self.role,
            self.content or "",
            tool_calls=tuple(call.call(index) for index, call in enumerate(self.tool_calls or ())),
            tool_call_id=self.tool_call_id or "" if self.role == "tool" else "",
        )


class StreamOptions(Strict):
    """How to stream."""

    include_usage: bool | None = None


class Extension(Strict):
    """What Lorikeet adds to OpenAI's request."""

    model_config = ConfigDict(extra="forbid")
    search: Literal["auto", "off", "always"] = "off"
    conversation: Annotated[str, Field(max_length=100)] = ""
    """A kept conversation that this turn goes on with."""

    @model_validator(mode="before")
    @classmethod
    def _null_is_absent(cls, given: Any) -> Any:
        if given is None:
            return {}
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


class ChatRequest(OptionFields):
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
        Annotated[list[Annotated[str, StringConstraints(min_length=1, max_length=200)]], Field(max_length=4)] | None,
        BeforeValidator(_list, json_schema_input_type=str | list[str] | None),
    ] = None
    store: bool | None = None
    """False keeps this turn out of the server's memory, if it has one."""
    lorikeet: Extension = Extension()

    @model_validator(mode="before")
    @classmethod
    def _served(cls, body: Any) -> Any:
        for name, neutral in _NEUTRAL.items() if isinstance(body, dict) else ():
            value = body.get(name)
            if value is not None and (value is True or value not in neutral):  # True == 1
                raise ValueError(
                    f"{name}: {'only ' + str(neutral[0]) if neutral else 'nothing'} is served; leave it out"
                )
        return body

    @field_validator("messages")
    @classmethod
    def _calls_have_results(cls, messages: list[ChatMessage]) -> list[ChatMessage]:
        """Check that each call of a function has its result right after it, and each result its call."""
        waiting: set[str] = set()
        for place, message in enumerate(messages):
            if message.role == "tool":
                if message.tool_call_id not in waiting:
                    raise ValueError(
                        f"turn {place} is a function's result, but no call before it has that tool_call_id"
                    )
                waiting.discard(message.tool_call_id)
            elif waiting:
                raise ValueError(f"turn {place} comes before the results of {', '.join(sorted(waiting))[:100]}")
            else:
                waiting = {call.id for call in message.tool_calls or ()}
        if waiting:
            raise ValueError(f"the results of {', '.join(sorted(waiting))[:100]} are missing")
        return messages

    @property
    def answer_tokens(self) -> int | None:
        """The limit of the answer, under either of its names."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def engine_seed(self) -> int | None:
        """The seed in the engine's range; equal seeds stay equal."""
        return None if self.seed is None else self.seed % _SEEDS


class SpeechRequest(Body):
    """The body of `/v1/audio/speech`."""

    input: str = Field(min_length=1, max_length=MAX_SPEECH_CHARACTERS)
    model: str = "default"
    voice: str = "default"
    response_format: Annotated[str, AfterValidator(_written)] = FORMATS[0]
    stream_format: Literal["audio", "sse"] = "audio"
    speed: float | None = Field(None, ge=SLOWEST, le=FASTEST)


def source_fields(source: Source) -> dict[str, str]:
    """Return what a client needs to show a source."""
    return {"title": source.title, "url": source.url}


def usage_fields(usage: Usage | None) -> dict[str, int] | None:
    """Return OpenAI's `usage`."""
    if usage is None:
        return None
    total = usage.prompt_tokens + usage.completion_tokens
    return {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.completion_tokens, "total_tokens": total}


def logprob_fields(tokens: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """Return OpenAI's `logprobs` of a choice; None without tokens."""
    if not tokens:
        return None
    content = [{**_token(token), "top_logprobs": [_token(other) for other in token.top]} for token in tokens]
    return {"content": content, "refusal": None}


def _token(token: TokenLogprob) -> dict[str, Any]:
    return {"token": token.token, "logprob": max(token.logprob, LEAST_LOGPROB), "bytes": list(token.bytes)}


def _call_piece(call: ToolCall) -> dict[str, Any]:
    """Return a piece of a call as a stream's delta has it: its id and name come once."""
    if not call.id and not call.name:
        return {"index": call.index, "function": {"arguments": call.arguments}}
    return {"index": call.index, **call.as_dict()}


class Lorikeet:
    """The `lorikeet` field of an answer: what OpenAI's shape has no place for."""

    def __init__(self, *, clock_s: Callable[[], float]) -> None:
        """Start with no search; times count from now."""
        self._clock_s = clock_s
        self._began_s = clock_s()
        self._first_s: float | None = None
        self._last_s = self._began_s
        self._search: dict[str, Any] | None = None
        self._usage: Usage | None = None
        self._context: dict[str, int | None] = {"dropped_turns": 0, "max_tokens": None}

    def note(self, event: Event) -> None:
        """Take in one event as it comes."""
        if isinstance(event, Searching):
            self._search = {"reason": event.reason, "query": event.query, "failed": None, "sources": []}
        elif isinstance(event, Found) and self._search:
            numbered = enumerate(event.sources, start=1)
            self._search["sources"] = [{"number": number, **source_fields(source)} for number, source in numbered]
        elif isinstance(event, SearchFailed) and self._search:
            self._search["failed"] = event.message
        elif isinstance(event, Text | Calling) and self._first_s is None:
            self._first_s = self._clock_s()
        elif isinstance(event, Done):
            self._last_s, self._usage = self._clock_s(), event.usage
            self._context = {"dropped_turns": event.dropped_turns, "max_tokens": event.max_tokens}

    def fields(self, note: Note | None) -> dict[str, Any]:
        """Return the search (None if there was none), what fitted, the times, and where the turn was kept (None: nowhere)."""
        kept = note and note.kept
        memory = {"id": kept.id, "conversation": kept.conversation_id} if kept else None
        return {"search": self._search, "context": self._context, "timings": self._timings(), "memory": memory}

    def _timings(self) -> dict[str, float | None]:
        """Return the wait for the first token, line and search included, and the speed of those after it."""
        if self._first_s is None:
            return {"ttft_ms": None, "tokens_per_s": None}
        later, elapsed_s = (self._usage.completion_tokens - 1 if self._usage else 0), self._last_s - self._first_s
        speed = round(later / elapsed_s, 1) if later > 0 and elapsed_s > 0 else None
        return {"ttft_ms": round((self._first_s - self._began_s) * 1000, 1), "tokens_per_s": speed}


class Answer:
    """One answer on its way out, whole or in chunks, from the same events."""

    def __init__(
        self, model: str, *, include_usage: bool = False, clock_s: Callable[[], float] = time.monotonic
    ) -> None:
        """Begin an answer of `model`; with `include_usage` a stream ends with a chunk of usage."""
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._include_usage = include_usage
        self._lorikeet = Lorikeet(clock_s=clock_s)
        self._text = ""
        self._logprobs: list[TokenLogprob] = []
        self._calls: dict[int, ToolCall] = {}
        self._done = Done("stop", None)
        self.note: Note | None = None
        """What is noted of the turn for the memory; None if it is not to be kept."""

    @property
    def id(self) -> str:
        """The answer's name, by which feedback refers to it."""
        return str(self._head["id"])

    def take(self, event: Event) -> None:
        """Take in one event as it comes."""
        self._lorikeet.note(event)
        if isinstance(event, Text):
            self._text += event.text
            self._logprobs += event.logprobs
        elif isinstance(event, Calling):
            for piece in event.calls:
                call = self._calls.setdefault(piece.index, ToolCall(piece.index, "", "", ""))
                self._calls[piece.index] = ToolCall(
                    piece.index, call.id or piece.id, call.name or piece.name, call.arguments + piece.arguments
                )
        elif isinstance(event, Done):
            self._done = event

    def chunks(self, event: Event) -> list[dict[str, Any]]:
        """Take in an event and return the chunks that it becomes; those of a search wait for the last one."""
        self.take(event)
        if isinstance(event, Text):
            return [self._chunk({"content": event.text}, logprobs=logprob_fields(event.logprobs))]
        if isinstance(event, Calling):
            return [self._chunk({"tool_calls": [_call_piece(call) for call in event.calls]})]
        if isinstance(event, Done):
            last = self._chunk({}, event.finish_reason) | {"lorikeet": self._lorikeet.fields(self.note)}
            usage = self._chunk(None) | {"usage": usage_fields(event.usage)}
            return [last, usage] if self._include_usage else [last]
        return []

    def first_chunk(self) -> dict[str, Any]:
        """Return the chunk that names the role, which opens a stream."""
        return self._chunk({"role": "assistant", "content": ""})

    def whole(self) -> dict[str, Any]:
        """Return the answer of the events so far as one object."""
        message: dict[str, Any] = {"role": "assistant", "content": self._text, "refusal": None}
        if self._calls:
            message |= {
                "content": self._text or None,
                "tool_calls": [c.as_dict() for _, c in sorted(self._calls.items())],
            }
        choice = {"index": 0, "message": message, "logprobs": logprob_fields(self._logprobs)}
        return {
            **self._head,
            "object": "chat.completion",
            "choices": [choice | {"finish_reason": self._done.finish_reason}],
            "usage": usage_fields(self._done.usage),
            "lorikeet": self._lorikeet.fields(self.note),
        }

    def _chunk(
        self, delta: dict[str, Any] | None, finish_reason: str | None = None, *, logprobs: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Return a chunk with `delta`, or with no choice if it is None."""
        choice = {"index": 0, "delta": delta, "logprobs": logprobs, "finish_reason": finish_reason}
        chunk = {**self._head, "object": "chat.completion.chunk", "choices": [choice] if delta is not None else []}
        return chunk | ({"usage": None} if self._include_usage else {})
