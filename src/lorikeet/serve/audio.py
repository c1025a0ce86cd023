"""The API's sound: `/v1/audio/transcriptions` and `/v1/audio/speech`, in OpenAI's shapes.

    add_audio_routes(app, ears, voice)      # None: the route says that the server does not hear, or does not speak

It owns these two routes; `speech` hears, speaks and writes files, `http.create_app` is the one caller.
"""

from __future__ import annotations

import base64
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import closing
from itertools import chain
from typing import Annotated

import anyio
from fastapi import FastAPI, File, Form, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from lorikeet.errors import InputError, LorikeetError
from lorikeet.serve.guard import AUDIO_LIMIT_BYTES, error_body
from lorikeet.serve.models import UnknownModelError
from lorikeet.serve.stream import ClosingResponse, kind_of, pull, server_sent_event, status_of
from lorikeet.serve.wire import SpeechRequest
from lorikeet.speech import Ears, Samples, Voice
from lorikeet.speech.audio import decode
from lorikeet.speech.clauses import split_clauses
from lorikeet.speech.encode import change_speed, encode, media_type
from lorikeet.speech.sayable import sayable

HEARING_MODELS = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "default")
SPEAKING_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "default")
VOICES = (
    "default", "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer",
    "verse",
)  # fmt: skip
"""Names that OpenAI's clients send by habit; they mean what is served."""

SPEAKING_THREADS = 4
"""Speeches that are made at once; further ones wait without a thread. A voice speaks one clause at a time anyway."""


def add_audio_routes(app: FastAPI, ears: Ears | None, voice: Voice | None) -> None:
    """Add the two routes to `app`; without `ears` or `voice` theirs answers 400."""

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

    limiter = anyio.CapacityLimiter(SPEAKING_THREADS)

    @app.post("/v1/audio/speech")
    async def speak(body: SpeechRequest) -> Response:
        if voice is None:
            raise InputError("this server does not speak: it was started with --voice off")
        _check_model(body.model, (*SPEAKING_MODELS, voice.name))
        if body.voice not in (*VOICES, voice.name):
            raise InputError(f"voice: {body.voice[:40]!r} is not known; there is: {voice.name}")
        pulled = pull(_speech(voice, body), limiter)
        # The first sound decides the status: after it an error can only break the stream off.
        first = await anext(pulled)
        if body.stream_format == "sse":
            return ClosingResponse(pulled, _sound_events(first, pulled), media_type="text/event-stream")
        return ClosingResponse(pulled, _joined(first, pulled), media_type=media_type(body.response_format))


def _speech(voice: Voice, body: SpeechRequest) -> Generator[bytes, None, None]:
    """Yield the file that `body` asks for, in pieces; the first comes once the first clause has been spoken.

    Raises InputError if nothing can be spoken.
    """
    with closing(_clauses(voice, body.input)) as clauses:
        first = next(clauses, None)
        if first is None:
            raise InputError("input: nothing in it can be spoken")
        spoken = change_speed(chain([first], clauses), voice.sample_rate_hz, body.speed or 1.0)
        yield from filter(None, encode(spoken, voice.sample_rate_hz, body.response_format))


def _clauses(voice: Voice, text: str) -> Generator[Samples, None, None]:
    for clause in split_clauses(text):
        if words := sayable(clause):
            yield from voice.speak(words)


async def _joined(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    yield first
    async for data in rest:
        yield data


async def _sound_events(first: bytes, rest: AsyncGenerator[bytes, None]) -> AsyncGenerator[str, None]:
    """Yield a file as OpenAI's events of speech; a failure on the way is the last one."""
    try:
        async for data in _joined(first, rest):
            yield server_sent_event({"type": "speech.audio.delta", "audio": base64.b64encode(data).decode()})
    except LorikeetError as error:
        yield server_sent_event(error_body(str(error), kind=kind_of(status_of(error))))
        return
    # A voice reads words: it has no tokens to count, and clients expect the field.
    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0}
    yield server_sent_event({"type": "speech.audio.done", "usage": usage})


def _check_model(name: str, known: Sequence[str]) -> None:
    """Raise UnknownModelError for a name that is not served."""
    if name not in known:
        served = next(n for n in (known[0], *known) if n not in {"default", "whisper-1", "tts-1"})
        raise UnknownModelError(f"model: {name[:100]!r} is not served here; ask for {served!r} or 'default'")
