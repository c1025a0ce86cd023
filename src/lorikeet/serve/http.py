"""The OpenAI-compatible API, and the page mounted beside it.

    app = create_app(Models(Served(name="mine", assistant=assistant)), ears=ears, voice=voice)

Streamed and whole answers come from one generator of events, pulled in threads; when a client goes away its
generator is closed, which stops the engine. It owns routes and status codes; `wire` owns shapes, `guard` who may ask.
"""

from __future__ import annotations

import json
import time
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing
from typing import Annotated, Any, TypeVar

import anyio
import anyio.to_thread
import numpy as np
from fastapi import FastAPI, File, Form, Request, UploadFile
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from lorikeet.engine import EngineDownError
from lorikeet.errors import EngineError, InputError, LorikeetError, MachineError
from lorikeet.serve.assistant import Event, Waiting
from lorikeet.serve.feedback import add_memory_routes
from lorikeet.serve.guard import AUDIO_LIMIT_BYTES, LOOPBACK_HOSTS, Guard, error_body
from lorikeet.serve.metrics import CONTENT_TYPE, Metrics
from lorikeet.serve.models import Models, Served, UnknownModelError
from lorikeet.serve.note import Note
from lorikeet.serve.queue import BusyError
from lorikeet.serve.voice.realtime import Door
from lorikeet.serve.voice.session import Parts
from lorikeet.serve.wire import Answer, ChatRequest, SpeechRequest
from lorikeet.speech import Ears, Voice
from lorikeet.speech.audio import decode, encode_wav
from lorikeet.speech.sayable import sayable
from lorikeet.speech.vad import load_vad

SPARE_THREADS = 8
"""Threads beside those of the requests that are answered or stand in line: for those that are refused."""

HEARING_MODELS = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "default")
SPEAKING_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "default")
VOICES = ("default", "alloy", "ash", "ballad", "coral", "echo", "fable", "nova", "onyx", "sage", "shimmer", "verse")
"""Names that OpenAI's clients send by habit; they mean what is served."""

STATUSES: tuple[tuple[type[LorikeetError], int], ...] = (
    (InputError, 400),
    (EngineDownError, 503),
    (EngineError, 502),
    (MachineError, 503),
    (LorikeetError, 500),
)
"""The status of an exception is that of the first class it belongs to."""

T = TypeVar("T")
Events = AsyncGenerator[Event, None]


def create_app(
    models: Models,
    *,
    ears: Ears | None = None,
    voice: Voice | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] | None = LOOPBACK_HOSTS,
    page: bool = True,
) -> FastAPI:
    """Return the application: API, health and, unless `page` is False, the page at `/`.

    Clients ask for one of `models` by name; the first is the default and the page's. Without `ears` or `voice` their
    routes and buttons say so. With an `api_key` everything but /health asks for it. `hosts` are the names under which the server may be reached, None
    for any.
    """
    app = FastAPI(title="Lorikeet", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, api_key=api_key, hosts=hosts)
    _add_error_handlers(app)
    _add_models(app, models)
    _add_chat(app, models)
    _add_audio(app, ears, voice)
    metrics = Metrics()
    metrics.watch(models.default.assistant.queue)
    _add_metrics(app, metrics)
    add_memory_routes(app, models.default.assistant.memory, metrics.registry)
    _add_realtime(app, models.default, ears=ears, voice=voice, metrics=metrics)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"])
    def unknown(path: str, request: Request) -> None:
        raise HTTPException(404, f"there is no {request.method} /v1/{path} here")

    if page:
        from lorikeet.serve.ui import mount_page

        mount_page(app, models.default.assistant, model_name=models.default.name, ears=ears, voice=voice)
    return app


def _add_models(app: FastAPI, served: Models) -> None:
    created_s = int(time.time())

    @app.get("/health")
    def health() -> Response:
        problems = [f"{model.name}: {problem}" for model in served if (problem := model.assistant.problem())]
        if not problems:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "reason": "; ".join(problems)}, status_code=503)

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model, created_s) for model in served]}

    @app.get("/v1/models/{name:path}")
    def model(name: str) -> dict[str, Any]:
        return _model_card(served.choose(name), created_s)


def _model_card(model: Served, created_s: int) -> dict[str, Any]:
    """Return OpenAI's model object, with what is known of the file in `lorikeet`."""
    facts = {"kind": model.kind, "quant": model.quant or None, "sha256": model.sha256 or None}
    facts |= {"adapter_sha256": model.adapter_sha256 or None, "proved": model.proved}
    return {"id": model.name, "object": "model", "created": created_s, "owned_by": "lorikeet", "lorikeet": facts}


def _add_chat(app: FastAPI, models: Models) -> None:
    queue = models.default.assistant.queue
    limiter = anyio.CapacityLimiter(queue.slots + queue.places + SPARE_THREADS)

    @app.post("/v1/chat/completions")
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = models.choose(body.model)
        include_usage = body.stream_options is not None and body.stream_options.include_usage
        answer = Answer(model.name, include_usage=include_usage)
        if body.store is not False:
            answer.note = Note(id=answer.id, channel="api", conversation_id=body.lorikeet.conversation)
        events = model.assistant.respond(
            [message.message() for message in body.messages],
            search=body.lorikeet.search,
            max_tokens=body.answer_tokens,
            temperature=body.temperature,
            top_p=body.top_p,
            seed=body.engine_seed,
            stop=body.stop or (),
            note=answer.note,
        )
        pulled = _pull(events, limiter)
        if body.stream:
            # The first event decides the status: an error after it can only be said inside the stream.
            first = await _first(pulled, request)
            if first is None:
                return Response(status_code=499)
            return _ClosingResponse(pulled, _server_sent(first, pulled, answer), media_type="text/event-stream")
        async with aclosing(pulled):
            collected = []
            async for event in pulled:
                if await request.is_disconnected():
                    return Response(status_code=499)
                collected.append(event)
        return JSONResponse(answer.whole(collected))


def _add_audio(app: FastAPI, ears: Ears | None, voice: Voice | None) -> None:
    @app.post("/v1/audio/transcriptions")
    def transcribe(
        file: Annotated[UploadFile, File()],
        model: Annotated[str, Form()] = "default",
        response_format: Annotated[str, Form()] = "json",
    ) -> Response:
        if ears is None:
            raise InputError("this server does not hear: it was started with --ears off")
        _check_model(model, (*HEARING_MODELS, ears.name))
        if response_format not in {"json", "text"}:
            raise InputError(f"response_format {response_format[:40]!r} is not served; there are: json, text")
        data = file.file.read(AUDIO_LIMIT_BYTES + 1)
        if len(data) > AUDIO_LIMIT_BYTES:
            raise HTTPException(413, f"the file is too large; at most {AUDIO_LIMIT_BYTES >> 20} MiB are taken")
        transcript = ears.transcribe(decode(data))
        if response_format == "text":
            return PlainTextResponse(transcript.text + "\n")
        return JSONResponse({"text": transcript.text})

    @app.post("/v1/audio/speech")
    def speak(body: SpeechRequest) -> Response:
        if voice is None:
            raise InputError("this server does not speak: it was started with --voice off")
        _check_model(body.model, (*SPEAKING_MODELS, voice.name))
        if body.voice not in (*VOICES, voice.name):
            raise InputError(f"voice: {body.voice[:40]!r} is not known; there is: {voice.name}")
        parts = list(voice.speak(sayable(body.input)))
        if not parts:
            raise InputError("input: nothing in it can be spoken")
        return Response(encode_wav(np.concatenate(parts), voice.sample_rate_hz), media_type="audio/wav")


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics")
    def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_realtime(app: FastAPI, model: Served, *, ears: Ears | None, voice: Voice | None, metrics: Metrics) -> None:
    vad = load_vad() if ears else None
    parts = Parts(
        assistant=model.assistant, ears=ears, voice=voice, vad=vad, model_name=model.name, on_turn=metrics.note_turn
    )
    app.add_api_websocket_route("/v1/realtime", Door(parts).enter)


def _check_model(name: str, known: Sequence[str]) -> None:
    """Raise UnknownModelError for a name that is not served."""
    if name not in known:
        served = next(n for n in (known[0], *known) if n not in {"default", "whisper-1", "tts-1"})
        raise UnknownModelError(f"model: {name[:100]!r} is not served here; ask for {served!r} or 'default'")


async def _pull(events: Generator[T, None, None], limiter: anyio.CapacityLimiter) -> AsyncGenerator[T, None]:
    """Yield what a synchronous generator yields, each in a thread, and close it at the end, whatever the end is."""
    try:
        while (event := await anyio.to_thread.run_sync(next, events, None, limiter=limiter)) is not None:
            yield event
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(events.close)


async def _first(events: Events, request: Request) -> Event | None:
    """Return the first event that says something; None, with the source closed, if the client leaves before it."""
    async for event in events:
        if not isinstance(event, Waiting):
            return event
        if await request.is_disconnected():
            break
    await events.aclose()
    return None


class _ClosingResponse(StreamingResponse):
    """A stream that closes its source when the client is gone, rather than when the collector comes by."""

    def __init__(self, source: Events, content: AsyncGenerator[str, None], *, media_type: str) -> None:
        super().__init__(content, media_type=media_type, headers={"Cache-Control": "no-store"})
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            with anyio.CancelScope(shield=True):
                await self._source.aclose()


async def _server_sent(first: Event, rest: Events, answer: Answer) -> AsyncGenerator[str, None]:
    """Yield an answer as server-sent events; a failure on the way is its last one."""
    yield _data(answer.first_chunk())
    try:
        for chunk in answer.chunks(first):
            yield _data(chunk)
        async for event in rest:
            for chunk in answer.chunks(event):
                yield _data(chunk)
    except LorikeetError as error:
        yield _data(error_body(str(error), kind=_kind(_status(error))))
        return
    yield "data: [DONE]\n\n"


def _data(value: Any) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


def _status(error: LorikeetError) -> int:
    return next(status for kind, status in STATUSES if isinstance(error, kind))


def _kind(status: int) -> str:
    return "invalid_request_error" if status < 500 else "server_error"


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every failure of the API in OpenAI's shape."""

    def answer(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
        return JSONResponse(error_body(message, kind=_kind(status), param=param, code=code), status_code=status)

    @app.exception_handler(UnknownModelError)
    async def unknown_model(_: Request, error: UnknownModelError) -> Response:
        return answer(404, str(error), "model", "model_not_found")

    @app.exception_handler(BusyError)
    async def busy(_: Request, error: BusyError) -> Response:
        response = answer(503, str(error), code="server_busy")
        response.headers["Retry-After"] = str(error.retry_after_s)
        return response

    @app.exception_handler(LorikeetError)
    async def known(_: Request, error: LorikeetError) -> Response:
        response = answer(_status(error), str(error))
        if response.status_code == 503:
            response.headers["Retry-After"] = "2"
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return answer(400, *_first_problem(error))

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return answer(error.status_code, str(error.detail))

    @app.exception_handler(Exception)
    async def unexpected(_: Request, error: Exception) -> Response:
        return answer(500, f"the server failed ({type(error).__name__}); its log says more")


def _first_problem(error: RequestValidationError) -> tuple[str, str | None]:
    """Return the first problem of a request as one line that begins with its field, and the field."""
    problem = error.errors()[0]
    text = str(problem["msg"]).removeprefix("Value error, ")
    if problem["type"] == "json_invalid":
        return f"the body is no JSON: {problem.get('ctx', {}).get('error', text)}", None
    field = ".".join(str(part) for part in problem["loc"][1:])
    if not field:
        named = text.partition(":")[0]
        return text, named if named.isidentifier() else None
    return f"{field}: {text[0].lower()}{text[1:]}", field
