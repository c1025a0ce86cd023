"""Answers on their way out: pulled from threads, ended when the client leaves, failures put into OpenAI's kinds.

    pulled = pull(events, limiter)
    return ClosingResponse(pulled, written(pulled), media_type="text/event-stream")

It knows neither chat nor sound; `http` and `audio` write what goes out.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import AsyncGenerator, AsyncIterator, Generator
from typing import Any, TypeVar

import anyio
import anyio.to_thread
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from lorikeet.engine import EngineBusyError, EngineDownError
from lorikeet.errors import EngineError, InputError, LorikeetError, MachineError

STATUSES: tuple[tuple[type[LorikeetError], int], ...] = (
    (InputError, 400),
    (EngineBusyError, 503),
    (EngineDownError, 503),
    (EngineError, 502),
    (MachineError, 503),
    (LorikeetError, 500),
)
"""The status of an exception is that of the first class it belongs to."""

T = TypeVar("T")


async def pull(events: Generator[T, None, None], limiter: anyio.CapacityLimiter) -> AsyncGenerator[T, None]:
    """Yield what a synchronous generator yields, each in a thread, and close it at the end, whatever the end is."""
    try:
        while (event := await anyio.to_thread.run_sync(next, events, None, limiter=limiter)) is not None:
            yield event
    finally:
        with anyio.CancelScope(shield=True):
            # When the server ends, a thread may still be waiting for an event; it ends with the engine, and so does `events`.
            if inspect.getgeneratorstate(events) != inspect.GEN_RUNNING:
                await anyio.to_thread.run_sync(events.close)


class ClosingResponse(StreamingResponse):
    """A stream that closes its source when the client is gone, rather than when the collector comes by."""

    def __init__(
        self, source: AsyncGenerator[Any, None], content: AsyncIterator[str | bytes], *, media_type: str
    ) -> None:
        """Send `content`, which reads from `source`, and close `source` at the end, whatever the end is."""
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the stream."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._source.aclose()


def server_sent_event(value: Any) -> str:
    """Return `value` as one event of a `text/event-stream`."""
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def status_of(error: LorikeetError) -> int:
    """Return the HTTP status that says `error`."""
    return next(status for kind, status in STATUSES if isinstance(error, kind))


def kind_of(status: int) -> str:
    """Return OpenAI's kind of an error with this status."""
    return "invalid_request_error" if status < 500 else "server_error"
