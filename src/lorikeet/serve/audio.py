"""The API's sound: `/v1/audio/transcriptions` and `/v1/audio/speech`, in OpenAI's shapes.

    add_audio_routes(app, ears, voice)      # None: the route says that the server does not hear, or does not speak

It owns these two routes; `speech` hears, speaks and writes files, `http.create_app` is the one caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import numpy as np
from fastapi import FastAPI, File, Form, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from starlette.exceptions import HTTPException

from lorikeet.errors import InputError
from lorikeet.serve.guard import AUDIO_LIMIT_BYTES
from lorikeet.serve.models import UnknownModelError
from lorikeet.serve.wire import SpeechRequest
from lorikeet.speech import Ears, Voice
from lorikeet.speech.audio import decode, encode_wav
from lorikeet.speech.sayable import sayable

HEARING_MODELS = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "default")
SPEAKING_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "default")
VOICES = ("default", "alloy", "ash", "ballad", "coral", "echo", "fable", "nova", "onyx", "sage", "shimmer", "verse")
"""Names that OpenAI's clients send by habit; they mean what is served."""


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


def _check_model(name: str, known: Sequence[str]) -> None:
    """Raise UnknownModelError for a name that is not served."""
    if name not in known:
        served = next(n for n in (known[0], *known) if n not in {"default", "whisper-1", "tts-1"})
        raise UnknownModelError(f"model: {name[:100]!r} is not served here; ask for {served!r} or 'default'")
