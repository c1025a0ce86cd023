"""`/v1/realtime`: OpenAI's Realtime API over a WebSocket, for any number of sessions up to a bound.

    door = Door(parts)
    app.add_api_websocket_route("/v1/realtime", door.enter)

It carries text messages between a socket and a `Session`, within limits, and knows nothing of what they mean beyond
their shape. Who may come in at all is the guard's business.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from typing import Any

from starlette.websockets import WebSocket, WebSocketDisconnect

from lorikeet.serve.voice.session import Parts, Session
from lorikeet.serve.voice.settings import SESSION_S
from lorikeet.serve.voice.wire import EventError, check_model, error_event, given_id, read_event

MAX_SESSIONS = 8
"""Conversations at once; each has two threads, and all share the engine."""

MAX_WAITING = 4000
"""Events that may wait for a client that does not read; then it is let go."""

GOING_AWAY, POLICY, TRY_AGAIN_LATER = 1001, 1008, 1013
"""Close codes of RFC 6455 and its registry."""


class Door:
    """Lets clients in, one session each."""

    def __init__(self, *parts: Parts) -> None:
        """Make sessions with the parts of the model that a client asks for; the first are those of the default."""
        self._parts = {each.model_name: each for each in parts}
        self._default = parts[0].model_name
        self._open = 0

    async def enter(self, socket: WebSocket) -> None:
        """Serve one client until it leaves, or its time is over."""
        offered = socket.scope.get("subprotocols") or []
        await socket.accept(subprotocol="realtime" if "realtime" in offered else None)
        model = socket.query_params.get("model", "default")
        refusal = self._refusal(model)
        if refusal is not None:
            await socket.send_text(json.dumps(refusal))
            await socket.close(TRY_AGAIN_LATER if refusal["error"]["code"] == "session_limit" else POLICY)
            return
        self._open += 1
        try:
            await self._serve(socket, model if model in self._parts else self._default)
        finally:
            self._open -= 1

    def _refusal(self, model: str) -> dict[str, Any] | None:
        try:
            check_model(model, self._parts, param="model")
        except EventError as error:
            return error_event(str(error), code=error.code, param=error.param)
        if self._open >= MAX_SESSIONS:
            words = f"{MAX_SESSIONS} voice sessions are open, the most this server takes; try again later"
            return error_event(words, kind="server_error", code="session_limit")
        return None

    async def _serve(self, socket: WebSocket, model: str) -> None:
        loop = asyncio.get_running_loop()
        waiting: asyncio.Queue[dict[str, Any]] = asyncio.Queue()

        def send(event: dict[str, Any]) -> None:
            # The loop may have ended while the session's thread still speaks.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(waiting.put_nowait, event)

        session = Session(self._parts, model=model, send=send)
        writer = asyncio.create_task(_write(socket, waiting))
        reader = asyncio.create_task(_read(socket, session, send))
        try:
            done, _ = await asyncio.wait({writer, reader}, timeout=SESSION_S, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                words = f"a session lasts at most {SESSION_S // 60} minutes; connect again"
                await socket.send_text(json.dumps(error_event(words, code="session_expired")))
                await socket.close(GOING_AWAY)
            elif writer in done:
                await socket.close(POLICY)
        except (WebSocketDisconnect, RuntimeError):
            pass  # the client left first
        finally:
            session.close()
            for task in (writer, reader):
                task.cancel()
            await asyncio.gather(writer, reader, return_exceptions=True)
            await asyncio.to_thread(session.join)  # what was heard is kept before the server may end


async def _read(socket: WebSocket, session: Session, send: Any) -> None:
    """Hand the client's events to the session until it leaves."""
    while True:
        message = await socket.receive()
        if message["type"] == "websocket.disconnect":
            return
        text = message.get("text")
        if text is None:
            send(error_event("events are text, not binary messages", code="invalid_json"))
            continue
        try:
            event = read_event(text)
        except EventError as error:
            send(error_event(str(error), code=error.code, param=error.param, event_id=given_id(text)))
            continue
        if not session.take(event):
            send(error_event("too many events wait already; this one was dropped", code="rate_limit_exceeded"))


async def _write(socket: WebSocket, waiting: asyncio.Queue[dict[str, Any]]) -> None:
    """Send what waits, in order, until the client has left or lets too much wait."""
    while waiting.qsize() <= MAX_WAITING:
        event = await waiting.get()
        try:
            await socket.send_text(json.dumps(event))
        except (WebSocketDisconnect, RuntimeError):
            return
