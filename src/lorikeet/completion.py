"""What an OpenAI-compatible server streams -> deltas.

    reader = AnswerReader(top_logprobs=None)
    for event in read_events(response):
        yield from reader.read(event)
    yield reader.last()

Servers differ: some name events, some send comments while they think, some leave out usage, some ignore `stream`, and some
think aloud before they answer. It knows no connection and no model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx

from lorikeet.errors import EngineError, RequestError
from lorikeet.messages import Delta, FinishReason, TokenLogprob, ToolCall, Usage

_OPEN, _CLOSE = "<think>", "</think>"
_FINISHED: dict[str, FinishReason] = {"length": "length", "tool_calls": "tool_calls", "function_call": "tool_calls"}
DONE = "[DONE]"


def read_events(response: httpx.Response) -> Iterator[Any]:
    """Yield the JSON of each event, None for a sign of life, `DONE` at the end. Raises ValueError for what is no JSON.

    An answer that is no stream is one event.
    """
    if response.headers.get("content-type", "").startswith("application/json"):
        yield json.loads(response.read())
        return
    for line in response.iter_lines():
        if line.startswith(":"):
            yield None
        elif line.startswith("data:"):
            data = line.removeprefix("data:").strip()
            yield DONE if data == DONE else json.loads(data)


def error_text(answer: Any) -> str:
    """Return the message of an error in OpenAI's shape, or whatever there is."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    return str(error.get("message", error)) if isinstance(error, dict) else str(error)


class AnswerReader:
    """Reads one answer."""

    def __init__(self, *, top_logprobs: int | None) -> None:
        """Begin an answer for which so many log-probabilities were asked."""
        self._top = top_logprobs
        self._thoughts = Thoughts()
        self._logprobs: list[TokenLogprob] = []
        self._finish: str | None = None
        self._usage: Usage | None = None

    def read(self, event: Any) -> Iterator[Delta]:
        """Yield what an event of `read_events` brings.

        Raises EngineError for an error or another protocol, RequestError for log-probabilities that do not come.
        """
        if event is None:
            yield Delta("")  # a sign of life: whoever asked may have left meanwhile
            return
        if event == DONE:
            self._finish = self._finish or "stop"
            return
        try:
            if event.get("error"):
                raise EngineError(f"the engine failed: {error_text(event)}")
            if event.get("usage"):
                self._usage = Usage(int(event["usage"]["prompt_tokens"]), int(event["usage"]["completion_tokens"]))
            for choice in event.get("choices") or ():
                yield from self._read_choice(choice)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise EngineError(f"the engine speaks another protocol than OpenAI's: {str(event)[:200]}") from error

    def last(self) -> Delta:
        """Return the end of the answer. Raises EngineError if there was none."""
        if self._finish is None:
            raise EngineError("the engine stopped in the middle of an answer; ask again")
        text = self._thoughts.flush()
        return Delta(text, _FINISHED.get(self._finish, "stop"), self._usage, tuple(self._logprobs) if text else ())

    def _read_choice(self, choice: Any) -> Iterator[Delta]:
        self._finish = choice.get("finish_reason") or self._finish
        part = choice.get("delta") or choice.get("message") or {}
        content = part.get("content") or ""
        if self._top is not None:
            self._logprobs += _logprobs((choice.get("logprobs") or {}).get("content") or (), top=self._top)
            if content and not self._logprobs:
                raise RequestError("logprobs: the engine gives none; leave it out", field="logprobs")
        if text := self._thoughts.feed(content):
            yield Delta(text, logprobs=tuple(self._logprobs))
            self._logprobs = []
        elif self._thoughts.thinking:
            self._logprobs = []
        if calls := part.get("tool_calls"):
            yield Delta("", tool_calls=tuple(_tool_call(call, place) for place, call in enumerate(calls)))


class Thoughts:
    """Leaves out what a reasoning model writes between `<think>` and `</think>` before it answers."""

    def __init__(self) -> None:
        """Begin an answer."""
        self._held = ""
        self._answering = False
        self.thinking = False

    def feed(self, text: str) -> str:
        """Return what of the answer is known with `text`."""
        if self._answering:
            return text
        self._held += text
        begun = self._held.lstrip()
        if not self.thinking and begun.startswith(_OPEN):
            self.thinking = True
        if self.thinking:
            _, closed, after = self._held.partition(_CLOSE)
            if not closed or not after.strip():
                return ""
            self.thinking, self._held = False, after.lstrip()
        elif _OPEN.startswith(begun):
            return ""
        self._answering = True
        answer, self._held = self._held, ""
        return answer

    def flush(self) -> str:
        """Return what was held back at the end: white space, or the beginning of a word that looked like a thought."""
        return "" if self.thinking else self._held


def _logprobs(tokens: Any, *, top: int) -> list[TokenLogprob]:
    return [
        TokenLogprob(
            str(token["token"]),
            float(token["logprob"]),
            tuple(int(byte) for byte in token.get("bytes") or ()),
            tuple(_logprobs(token.get("top_logprobs") or (), top=0)[:top]),
        )
        for token in tokens
    ]


def _tool_call(call: Any, place: int) -> ToolCall:
    function = call.get("function") or {}
    arguments = function.get("arguments") or ""
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments)
    return ToolCall(int(call.get("index", place)), call.get("id") or "", function.get("name") or "", arguments)
