"""The HTTP application: OpenAI-compatible routes, health, and the page at `/`.

    app = create_app(service, api_key=None, loopback=True)

Errors have OpenAI's shape; one table maps exceptions to statuses. Answers come from synchronous generators that run in
threads; a client that goes away ends its generation.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import anyio
from anyio import to_thread
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from pydantic import BaseModel, ConfigDict, Field, field_validator
from starlette.exceptions import HTTPException

from lorikeet.errors import EngineError, InputError, LorikeetError, MachineError, RequestError
from lorikeet.messages import Message, Role
from lorikeet.serve.assistant import Assistant, Done, Event, Found, Sampling, SearchFailed, Searching, SearchMode, Text
from lorikeet.serve.guard import Guard, error_body
from lorikeet.speech import Ears, Voice
from lorikeet.speech.audio import decode, encode_wav
from lorikeet.speech.speak import spoken

MOST_MESSAGES = 1000
MOST_SPOKEN_CHARACTERS = 4096
USUAL_NAMES = {"default", "whisper-1", "tts-1", "tts-1-hd", "gpt-4o-mini-tts", "gpt-4o-mini-transcribe"}
"""Names that OpenAI's clients send by habit; they mean what is served."""
USUAL_VOICES = {"default", "alloy", "ash", "coral", "echo", "fable", "nova", "onyx", "sage", "shimmer"}

STATUSES: tuple[tuple[type[LorikeetError], int, str], ...] = (
    (RequestError, 400, "invalid_request_error"),
    (InputError, 400, "invalid_request_error"),
    (EngineError, 502, "engine_error"),
    (MachineError, 503, "server_error"),
    (LorikeetError, 500, "server_error"),
)
"""Exception -> status and type; the first that matches."""


@dataclass
class Service:
    """What is served; parts arrive while it starts."""

    model_name: str
    status: Literal["starting", "ready", "failed"] = "starting"
    assistant: Assistant | None = None
    ears: Ears | None = None
    voice: Voice | None = None
    sampling: Sampling = field(default_factory=Sampling)

    def ready(self) -> Assistant:
        """Return the assistant. Raises MachineError while it is not ready."""
        if self.assistant is None or self.status != "ready":
            raise MachineError("the server is starting; try again in a moment")
        return self.assistant


class _Part(BaseModel):
    type: Literal["text"]
    text: str


class _Turn(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part]

    def message(self) -> Message:
        """Return the turn as a message."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        role: Role = "system" if self.role == "developer" else self.role
        return Message(role, text)


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Extension(BaseModel):
    model_config = ConfigDict(extra="forbid")
    search: SearchMode = "off"


class ChatRequest(BaseModel):
    """The body of a chat completion: OpenAI's fields that have a meaning here, and `lorikeet`."""

    messages: list[_Turn] = Field(min_length=1, max_length=MOST_MESSAGES)
    model: str = Field(default="default", max_length=200)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    max_tokens: int | None = Field(default=None, ge=1, le=1 << 17)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=1 << 17)
    temperature: float | None = Field(default=None, ge=0, le=2, allow_inf_nan=False)
    top_p: float | None = Field(default=None, gt=0, le=1, allow_inf_nan=False)
    seed: int | None = Field(default=None, ge=0, le=(1 << 32) - 2)
    stop: str | list[str] | None = None
    n: Literal[1] | None = None
    lorikeet: _Extension = _Extension()

    @field_validator("stop")
    @classmethod
    def _stops(cls, stop: str | list[str] | None) -> list[str] | None:
        stops = [stop] if isinstance(stop, str) else stop
        if stops is not None and (len(stops) > 4 or any(not 0 < len(s) <= 100 for s in stops)):
            raise ValueError("at most 4 texts of 1 to 100 characters")
        return stops

    def sampling(self, default: Sampling) -> Sampling:
        """Return how to draw the answer; what the request leaves open is `default`'s."""
        most = self.max_completion_tokens or self.max_tokens or default.max_tokens
        return Sampling(
            max_tokens=most,
            temperature=default.temperature if self.temperature is None else self.temperature,
            top_p=default.top_p if self.top_p is None else self.top_p,
            seed=self.seed,
            stop=tuple(self.stop or ()),
        )


class SpeechRequest(BaseModel):
    """The body of a speech request."""

    input: str = Field(min_length=1, max_length=MOST_SPOKEN_CHARACTERS)
    model: str = Field(default="default", max_length=200)
    voice: str = Field(default="default", max_length=200)
    response_format: Literal["wav"] = "wav"


def create_app(service: Service, *, api_key: str | None = None, loopback: bool = True, page: bool = True) -> FastAPI:
    """Return the application around `service`; see `guard` for `api_key` and `loopback`, and `page` mounts the UI."""
    app = FastAPI(title="Lorikeet", docs_url=None, redoc_url=None)
    _add_errors(app)
    _add_routes(app, service)
    if page:
        from lorikeet.serve.ui.page import mount_page

        app = mount_page(app, service)
    app.add_middleware(Guard, api_key=api_key, loopback=loopback)
    return app


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(LorikeetError)
    async def known(_: Request, error: LorikeetError) -> Response:
        status, kind = _status(error)
        return JSONResponse(error_body(str(error), kind=kind), status_code=status)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        body = error_body(f"{field or 'the body'}: {first['msg']}", kind="invalid_request_error", param=field or None)
        return JSONResponse(body, status_code=400)

    @app.exception_handler(HTTPException)
    async def other(_: Request, error: HTTPException) -> Response:
        body = error_body(str(error.detail), kind="invalid_request_error")
        return JSONResponse(body, status_code=error.status_code, headers=error.headers)


def _status(error: LorikeetError) -> tuple[int, str]:
    return next((status, kind) for family, status, kind in STATUSES if isinstance(error, family))


def _add_routes(app: FastAPI, service: Service) -> None:
    @app.get("/health")
    def health() -> Response:
        """Say `starting`, `ok` or `failed`; only `ok` is 200."""
        if service.status == "ready" and service.assistant is not None:
            healthy = service.assistant.engine.healthy()
            return JSONResponse({"status": "ok" if healthy else "failed"}, status_code=200 if healthy else 503)
        return JSONResponse({"status": service.status}, status_code=503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        """List what is served."""
        return {
            "object": "list",
            "data": [{"id": service.model_name, "object": "model", "created": 0, "owned_by": "lorikeet"}],
        }

    @app.post("/v1/chat/completions", response_model=None)
    async def chat(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation, streamed or whole, from one generator."""
        assistant = service.ready()
        if body.model not in {service.model_name, "default"}:
            message = f"there is no model {body.model!r}; served is {service.model_name!r}"
            return JSONResponse(
                error_body(message, kind="invalid_request_error", code="model_not_found"), status_code=404
            )
        messages = [turn.message() for turn in body.messages]
        if not messages[-1].content.strip():
            raise RequestError("messages: the last message is empty")
        events = assistant.respond(messages, search=body.lorikeet.search, sampling=body.sampling(service.sampling))
        answer = _Answer(
            service.model_name, include_usage=bool(body.stream_options and body.stream_options.include_usage)
        )
        source = _in_thread(events, request)
        first = await anext(source, None)  # what the engine refuses is a status, not a broken stream
        if body.stream:
            return StreamingResponse(answer.stream(first, source), media_type="text/event-stream")
        return JSONResponse(await answer.whole(first, source))

    @app.post("/v1/audio/transcriptions", response_model=None)
    async def transcribe(
        file: UploadFile,
        model: Annotated[str, Form(max_length=200)] = "default",
        response_format: Annotated[Literal["json", "text"], Form()] = "json",
    ) -> Response:
        """Return what is said in an audio file."""
        service.ready()
        if service.ears is None:
            raise MachineError("the ears are off; start with --ears whisper-tiny.en")
        if model not in USUAL_NAMES | {service.ears.name}:
            raise RequestError(f"model: there is no {model!r}; served is {service.ears.name!r}")
        data = await file.read()
        transcript = await to_thread.run_sync(lambda: service.ears.transcribe(decode(data)))  # type: ignore[union-attr]
        return (
            PlainTextResponse(transcript.text) if response_format == "text" else JSONResponse({"text": transcript.text})
        )

    @app.post("/v1/audio/speech", response_model=None)
    async def speak(body: SpeechRequest) -> Response:
        """Return a text spoken, as WAV."""
        service.ready()
        voice = service.voice
        if voice is None:
            raise MachineError("the voice is off; start with --voice hibari")
        if body.model not in USUAL_NAMES | {voice.name} or body.voice not in USUAL_VOICES | {voice.name}:
            raise RequestError(
                f"model, voice: there is no {body.model!r} with {body.voice!r}; served is {voice.name!r}"
            )
        text = spoken(body.input)
        if not text:
            raise RequestError("input: there is nothing in it to be spoken")
        return Response(await to_thread.run_sync(say, voice, text), media_type="audio/wav")


def say(voice: Voice, text: str) -> bytes:
    """Return `text` spoken by `voice` as a WAV file."""
    import numpy as np

    parts = list(voice.speak(text))
    samples = np.concatenate(parts) if parts else np.zeros(0, np.float32)
    return encode_wav(samples, voice.sample_rate_hz)


async def _in_thread(events: Iterator[Event], request: Request) -> AsyncIterator[Event]:
    """Yield the events, each computed in a thread; stop and close them when the client has gone."""
    try:
        while (event := await to_thread.run_sync(next, events, None)) is not None:
            yield event
            if await request.is_disconnected():
                return
    finally:
        with anyio.CancelScope(shield=True):
            await to_thread.run_sync(events.close)  # type: ignore[attr-defined]  # it is a generator


class _Answer:
    """Turns events into OpenAI's objects."""

    def __init__(self, model: str, *, include_usage: bool) -> None:
        self._common = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}
        self._include_usage = include_usage
        self._search: dict[str, Any] | None = None

    async def whole(self, first: Event | None, rest: AsyncIterator[Event]) -> dict[str, Any]:
        """Return the completion."""
        text, done = "", None
        async for event in _chain(first, rest):
            self._note(event)
            if isinstance(event, Text):
                text += event.text
            elif isinstance(event, Done):
                done = event
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": text},
            "finish_reason": done.finish_reason if done else "stop",
        }
        return {
            **self._common,
            "object": "chat.completion",
            "choices": [choice],
            "usage": _usage(done),
            **self._extension(),
        }

    async def stream(self, first: Event | None, rest: AsyncIterator[Event]) -> AsyncIterator[str]:
        """Yield the chunks as server-sent events."""
        yield self._chunk({"role": "assistant", "content": ""}, None)
        async with aclosing(rest):  # type: ignore[type-var]  # it is an async generator
            try:
                async for event in _chain(first, rest):
                    self._note(event)
                    if isinstance(event, Text):
                        yield self._chunk({"content": event.text}, None)
                    elif isinstance(event, Done):
                        yield self._chunk({}, event.finish_reason)
                        if self._include_usage:
                            yield _event(
                                {
                                    **self._common,
                                    "object": "chat.completion.chunk",
                                    "choices": [],
                                    "usage": _usage(event),
                                }
                            )
            except LorikeetError as error:
                yield _event(error_body(str(error), kind=_status(error)[1]))
        yield "data: [DONE]\n\n"

    def _note(self, event: Event) -> None:
        if isinstance(event, Searching):
            self._search = {"reason": event.reason, "failed": None, "sources": []}
        elif isinstance(event, SearchFailed) and self._search is not None:
            self._search["failed"] = event.message
        elif isinstance(event, Found) and self._search is not None:
            self._search["sources"] = [{"title": s.title, "url": s.url} for s in event.sources]

    def _extension(self) -> dict[str, Any]:
        return {"lorikeet": {"search": self._search}} if self._search else {}

    def _chunk(self, delta: dict[str, Any], finish: str | None) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": finish}
        extension = self._extension() if finish else {}
        return _event({**self._common, "object": "chat.completion.chunk", "choices": [choice], **extension})


async def _chain(first: Event | None, rest: AsyncIterator[Event]) -> AsyncIterator[Event]:
    if first is not None:
        yield first
        async for event in rest:
            yield event


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"


def _usage(done: Done | None) -> dict[str, int] | None:
    if done is None or done.usage is None:
        return None
    prompt, completion = done.usage.prompt_tokens, done.usage.completion_tokens
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}
