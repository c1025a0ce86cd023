"""The OpenAI-compatible API, and the page mounted beside it.

    app = create_app(Models(Served(name="mine", assistant=assistant)), ears=ears, voice=voice)

Streamed and whole answers come from one generator of events, pulled in threads; when a client goes away its
generator is closed, which stops the engine. It owns routes and status codes; `wire` owns shapes, `guard` who may ask.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from typing import Any

import anyio
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from lorikeet.errors import LorikeetError, RequestError
from lorikeet.serve.assistant import Event, Waiting
from lorikeet.serve.audio import add_audio_routes
from lorikeet.serve.feedback import add_memory_routes
from lorikeet.serve.guard import LOOPBACK_HOSTS, Guard, error_body
from lorikeet.serve.limits import Limits
from lorikeet.serve.metrics import CONTENT_TYPE, Metrics
from lorikeet.serve.models import Models, Served, UnknownModelError
from lorikeet.serve.note import Note
from lorikeet.serve.openapi import CHAT, ERRORS, HEALTH, ModelCard, ModelList
from lorikeet.serve.queue import BusyError
from lorikeet.serve.stream import ClosingResponse, kind_of, pull, server_sent_event, status_of
from lorikeet.serve.voice.realtime import Door
from lorikeet.serve.voice.session import Parts
from lorikeet.serve.wire import Answer, ChatRequest
from lorikeet.speech import Ears, Voice
from lorikeet.speech.vad import load_vad

SPARE_THREADS = 8
"""Threads beside those of the requests that are answered or stand in line: for those that are refused."""

Events = AsyncGenerator[Event, None]


def create_app(
    models: Models,
    *,
    ears: Ears | None = None,
    voice: Voice | None = None,
    api_key: str | None = None,
    hosts: Sequence[str] | None = LOOPBACK_HOSTS,
    limits: Limits | None = None,
    page: bool = True,
) -> FastAPI:
    """Return the application: API, health and, unless `page` is False, the page at `/`.

    Clients ask for one of `models` by name; the first is the default. Without `ears` or `voice` their
    routes and buttons say so. With an `api_key` everything but /health asks for it. `hosts` are the names under which the
    server may be reached, None for any. `limits` hold each visitor of a public server to a share.
    """
    app = FastAPI(title="Lorikeet", docs_url=None, redoc_url=None, openapi_url=None, responses=ERRORS)
    app.add_middleware(Guard, api_key=api_key, hosts=hosts, limits=limits)
    _add_error_handlers(app)
    _add_models(app, models)
    _add_chat(app, models)
    add_audio_routes(app, ears, voice)
    metrics = Metrics()
    metrics.watch(models.default.assistant.queue)
    _add_metrics(app, metrics)
    add_memory_routes(app, models.default.assistant.memory, metrics.registry)
    _add_realtime(app, models, ears=ears, voice=voice, metrics=metrics)

    @app.api_route("/v1/{path:path}", methods=["GET", "POST", "PUT", "PATCH", "DELETE"], include_in_schema=False)
    def unknown(path: str, request: Request) -> None:
        raise HTTPException(404, f"there is no {request.method} /v1/{path} here")

    if page:
        from lorikeet.serve.ui import mount_page

        mount_page(app, {model.name: model.assistant for model in models}, ears=ears, voice=voice)
    return app


def _add_models(app: FastAPI, served: Models) -> None:
    created_s = int(time.time())

    @app.head("/health", include_in_schema=False)
    @app.get("/health", responses=HEALTH)
    def health() -> Response:
        problem = served.default.assistant.problem()  # another's is that of who asks for it
        if not problem:
            return JSONResponse({"status": "ok"})
        return JSONResponse({"status": "failed", "reason": f"{served.default.name}: {problem}"}, status_code=503)

    @app.get("/v1/models", response_model=ModelList)
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(model, created_s) for model in served]}

    @app.get("/v1/models/{name:path}", response_model=ModelCard)
    def model(name: str) -> dict[str, Any]:
        return _model_card(served.choose(name), created_s)


def _model_card(model: Served, created_s: int) -> dict[str, Any]:
    """Return OpenAI's model object, with what is known of the file in `lorikeet`."""
    facts: dict[str, Any] = {"kind": model.kind, "quant": model.quant or None, "gguf_sha256": model.sha256 or None}
    facts |= {"adapter_sha256": model.adapter_sha256 or None, "proved": model.proved}
    return {"id": model.name, "object": "model", "created": created_s, "owned_by": "lorikeet", "lorikeet": facts}


def _add_chat(app: FastAPI, models: Models) -> None:
    queue = models.default.assistant.queue
    limiter = anyio.CapacityLimiter(queue.slots + queue.places + SPARE_THREADS)

    @app.post("/v1/chat/completions", responses=CHAT)
    async def chat(body: ChatRequest, request: Request) -> Response:
        model = models.choose(body.model)
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
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
            options=body.options(),
            note=answer.note,
        )
        pulled = pull(events, limiter)
        if body.stream:
            # The first event decides the status: an error after it can only be said inside the stream.
            first = await _first(pulled, request)
            if first is None:
                return Response(status_code=499)
            return ClosingResponse(pulled, _server_sent(first, pulled, answer), media_type="text/event-stream")
        async with aclosing(pulled):
            async for event in pulled:
                if await request.is_disconnected():
                    return Response(status_code=499)
                answer.take(event)
        return JSONResponse(answer.whole())


def _add_metrics(app: FastAPI, metrics: Metrics) -> None:
    @app.get("/metrics", response_class=PlainTextResponse)
    def numbers() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)


def _add_realtime(app: FastAPI, models: Models, *, ears: Ears | None, voice: Voice | None, metrics: Metrics) -> None:
    vad = load_vad() if ears else None
    parts = [
        Parts(
            assistant=model.assistant, ears=ears, voice=voice, vad=vad, model_name=model.name, on_turn=metrics.note_turn
        )
        for model in models
    ]
    app.add_api_websocket_route("/v1/realtime", Door(*parts).enter)


async def _first(events: Events, request: Request) -> Event | None:
    """Return the first event that says something; None, with the source closed, if the client leaves before it."""
    async for event in events:
        if not isinstance(event, Waiting):
            return event
        if await request.is_disconnected():
            break
    await events.aclose()
    return None


async def _server_sent(first: Event, rest: Events, answer: Answer) -> AsyncGenerator[str, None]:
    """Yield an answer as server-sent events; a failure on the way is its last one."""
    yield server_sent_event(answer.first_chunk())
    try:
        for chunk in answer.chunks(first):
            yield server_sent_event(chunk)
        async for event in rest:
            for chunk in answer.chunks(event):
                yield server_sent_event(chunk)
    except LorikeetError as error:
        yield server_sent_event(error_body(str(error), kind=kind_of(status_of(error)), param=_field_of(error)))
        return
    yield "data: [DONE]\n\n"


def _field_of(error: LorikeetError) -> str | None:
    """Return the field of a request that an error is about, if it is known."""
    return error.field if isinstance(error, RequestError) else None


def _add_error_handlers(app: FastAPI) -> None:
    """Answer every failure of the API in OpenAI's shape."""

    def answer(status: int, message: str, param: str | None = None, code: str | None = None) -> Response:
        return JSONResponse(error_body(message, kind=kind_of(status), param=param, code=code), status_code=status)

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
        response = answer(status_of(error), str(error), _field_of(error))
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
    place = problem["loc"][1:]
    # A wrong key of an object is the client's own text, and no field.
    field = ".".join(str(part) for part in (place[:-2] if place[-1:] == ("[key]",) else place))[:200]
    if not field:
        named = text.partition(":")[0]
        return text, named if named.isidentifier() else None
    return f"{field}: {text[0].lower()}{text[1:]}", field
