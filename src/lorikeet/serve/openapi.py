"""The API's answers and errors as types, for the OpenAPI document (`create_app(...).openapi()`).

    app = FastAPI(responses=ERRORS)
    @app.post("/v1/chat/completions", responses=CHAT)

It owns what the document promises; `wire` writes the answers, and a test holds each to its type here.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class _Exact(BaseModel):
    model_config = ConfigDict(extra="forbid")


class ErrorFields(_Exact):
    """What went wrong."""

    message: str
    type: Literal["invalid_request_error", "server_error", "requests"]
    """`requests` goes with 429, as OpenAI's does."""
    param: str | None
    """The field of the request that is at fault, where it is one."""
    code: str | None


class ErrorBody(_Exact):
    """An error in OpenAI's shape."""

    error: ErrorFields


class ModelFacts(_Exact):
    """What is known of a model's file."""

    kind: Literal["tuned", "base", "file", "remote"]
    quant: str | None
    gguf_sha256: str | None
    adapter_sha256: str | None
    proved: bool
    """Whether the run's proof is about exactly this file."""


class ModelCard(_Exact):
    """A model that can be asked for."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: Literal["lorikeet"]
    lorikeet: ModelFacts


class ModelList(_Exact):
    """The models, the default first."""

    object: Literal["list"]
    data: list[ModelCard]


class FunctionCall(_Exact):
    """A function and its arguments, JSON text."""

    name: str
    arguments: str


class FullCall(_Exact):
    """A function that the model calls."""

    id: str
    type: Literal["function"]
    function: FunctionCall


class AnswerMessage(_Exact):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    tool_calls: list[FullCall] | None = None


class OtherToken(_Exact):
    """A token that could have stood in a place."""

    token: str
    logprob: float
    bytes: list[int]


class ChosenToken(OtherToken):
    """A token of the answer."""

    top_logprobs: list[OtherToken]


class Logprobs(_Exact):
    """The answer's tokens, with natural logarithms of their probabilities."""

    content: list[ChosenToken]
    refusal: None


class Choice(_Exact):
    """The one answer."""

    index: Literal[0]
    message: AnswerMessage
    logprobs: Logprobs | None
    finish_reason: Literal["stop", "length", "tool_calls"]


class UsageCounts(_Exact):
    """Token counts."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class NumberedSource(_Exact):
    """A search result; `[number]` in the answer means it."""

    number: int
    title: str
    url: str


class SearchReport(_Exact):
    """What a search did."""

    reason: str
    query: str
    failed: str | None
    sources: list[NumberedSource]


class ContextReport(_Exact):
    """What fitted the context."""

    dropped_turns: int
    """How many of the oldest turns did not fit, and were not read."""
    max_tokens: int | None
    """How long the answer could be."""


class Timings(_Exact):
    """How long the answer took."""

    ttft_ms: float | None
    """From the request to the first token, the wait in line and a search included."""
    tokens_per_s: float | None
    """Of the tokens after the first."""


class MemoryRecord(_Exact):
    """Where the turn was kept."""

    id: str
    conversation: str


class Extras(_Exact):
    """What OpenAI's shape has no place for."""

    search: SearchReport | None
    context: ContextReport
    timings: Timings
    memory: MemoryRecord | None


class ChatCompletion(_Exact):
    """An answer, whole."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[Choice]
    usage: UsageCounts | None
    lorikeet: Extras


class Health(_Exact):
    """Whether the server would answer."""

    status: Literal["ok", "failed"]
    reason: str = ""


TEXT: dict[str, Any] = {"schema": {"type": "string"}}
"""A body that is no JSON."""

ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "The request is at fault: `param` names the field, where it is one."},
    "5XX": {
        "model": ErrorBody,
        "description": "The server or its engine is; 503 says in Retry-After when to come back.",
    },
}
CHAT: dict[int | str, dict[str, Any]] = {
    200: {
        "model": ChatCompletion,
        "description": "The answer; with `stream` its chunks as server-sent events, the last one `[DONE]`.",
        "content": {"text/event-stream": TEXT},
    }
}
HEALTH: dict[int | str, dict[str, Any]] = {
    200: {"model": Health},
    503: {"model": Health, "description": "It would not."},
}
