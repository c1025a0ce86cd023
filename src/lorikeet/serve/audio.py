"""The API's sound: `/v1/audio/speech` and `/v1/audio/transcriptions`, in OpenAI's shapes.

    add_audio_routes(app, ears, voice)      # None: the route says that the server does not hear, or does not speak

It owns these two routes; `speech` hears, speaks and writes files, `http.create_app` is the one caller.
"""

from __future__ import annotations

import base64
import math
from collections.abc import AsyncGenerator, Generator, Sequence
from contextlib import aclosing, closing
from itertools import chain
from typing import Annotated, Any, Literal, Self

import anyio
from fastapi import FastAPI, Form, Request, UploadFile
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from pydantic import BaseModel, ConfigDict, Field, model_validator
from starlette.exceptions import HTTPException

from lorikeet.errors import InputError, LorikeetError
from lorikeet.serve.guard import AUDIO_LIMIT_BYTES, error_body
from lorikeet.serve.models import UnknownModelError
from lorikeet.serve.openapi import TEXT
from lorikeet.serve.queue import Queue
from lorikeet.serve.stream import ClosingResponse, kind_of, pull, server_sent_event, status_of
from lorikeet.serve.wire import SpeechRequest
from lorikeet.speech import HEARING_HZ, Ears, Samples, Segment, TimedTranscript, Voice, Word
from lorikeet.speech.audio import decode
from lorikeet.speech.clauses import split_clauses
from lorikeet.speech.encode import FORMATS, change_speed, encode, media_type
from lorikeet.speech.sayable import sayable
from lorikeet.speech.subtitles import write_srt, write_vtt

HEARING_MODELS = ("whisper-1", "gpt-4o-transcribe", "gpt-4o-mini-transcribe", "default")
SPEAKING_MODELS = ("tts-1", "tts-1-hd", "gpt-4o-mini-tts", "default")
VOICES = (
    "default", "alloy", "ash", "ballad", "cedar", "coral", "echo", "fable", "marin", "nova", "onyx", "sage", "shimmer",
    "verse",
)  # fmt: skip
"""Names that OpenAI's clients send by habit; they mean what is served."""

MAX_FILE_S = 300.0
"""Longer recordings would take minutes of everybody's cores."""

TURN_S = 30.0
"""A recording of one window is heard as fast as a spoken turn; a longer one window by window, and turns go between."""

HEARING_SLOTS, HEARING_PLACES = 2, 16
"""Recordings that are heard at once, and how many more may wait."""

LOOK_UP_S = 0.1
"""How often a recording that waits looks whether it is its turn."""

MAX_PROMPT_CHARACTERS = 4000
"""Whisper itself reads the last 223 tokens."""

BREATH_WORDS = 40
"""Most words that a voice says in one go. It needs longer for each word the more there are, and keeps all others waiting."""

SPEAKING_THREADS, SPEAKING_PLACES = 4, 36
"""Clauses that are spoken at once, and the most speeches under way. A voice speaks one clause at a time anyway."""


class TranscriptionRequest(BaseModel):
    """The form of `/v1/audio/transcriptions`."""

    model_config = ConfigDict(extra="ignore", allow_inf_nan=False)
    file: UploadFile
    model: str = "default"
    response_format: Literal["json", "text", "srt", "vtt", "verbose_json"] = "json"
    language: str = Field("", max_length=20)
    prompt: str = Field("", max_length=MAX_PROMPT_CHARACTERS)
    temperature: float = Field(0.0, ge=0, le=1)
    stream: Literal["false", "False", "0", ""] = "false"
    granularities: list[Literal["word", "segment"]] = Field([], alias="timestamp_granularities[]", max_length=2)
    include: list[str] = Field([], alias="include[]", max_length=0)
    """`logprobs` of OpenAI's newer models, which is not served."""

    @model_validator(mode="after")
    def _times_have_a_place(self) -> Self:
        if self.granularities and self.response_format != "verbose_json":
            raise ValueError("timestamp_granularities: only response_format 'verbose_json' has room for times")
        return self

    @property
    def is_plain(self) -> bool:
        """Whether the words alone are asked for, as they are heard."""
        return self.response_format in {"json", "text"} and not (self.language or self.prompt or self.temperature)

    def written(self, heard: TimedTranscript, text: str) -> Response:
        """Return what was heard in the format that is asked for."""
        if self.response_format == "text":
            return PlainTextResponse(text + "\n")
        if self.response_format == "srt":
            return PlainTextResponse(write_srt(heard.segments), media_type="application/x-subrip")
        if self.response_format == "vtt":
            return PlainTextResponse(write_vtt(heard.segments), media_type="text/vtt")
        answer: dict[str, Any] = {"text": text, "usage": {"type": "duration", "seconds": math.ceil(heard.duration_s)}}
        if self.response_format == "verbose_json":
            answer |= {"task": "transcribe", "language": heard.language, "duration": round(heard.duration_s, 2)}
            if "segment" in self.granularities or not self.granularities:
                answer["segments"] = [segment_fields(number, segment) for number, segment in enumerate(heard.segments)]
            if "word" in self.granularities:
                answer["words"] = [word_fields(word) for segment in heard.segments for word in segment.words]
        return JSONResponse(answer)


def segment_fields(number: int, segment: Segment) -> dict[str, Any]:
    """Return OpenAI's object of a segment; `seek`, in hundredths of a second, is where it begins."""
    return {
        "id": number,
        "seek": round(segment.start_s * 100),
        "start": segment.start_s,
        "end": segment.end_s,
        "text": segment.text,
        "tokens": list(segment.tokens),
        "temperature": segment.temperature,
        "avg_logprob": segment.log_probability,
        "compression_ratio": segment.compression,
        "no_speech_prob": segment.no_speech_probability,
    }


def word_fields(word: Word) -> dict[str, Any]:
    """Return OpenAI's object of a word."""
    return {"word": word.text, "start": word.start_s, "end": word.end_s}


_MEDIA_TYPES = sorted({*map(media_type, FORMATS), "text/event-stream"})
SPEECH: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "The sound, or with `stream_format` sse its events.",
        "content": {name: {} for name in _MEDIA_TYPES},
    }
}
HEARD: dict[int | str, dict[str, Any]] = {
    200: {
        "description": "What was heard, in the format that is asked for.",
        "content": dict.fromkeys(("text/plain", "application/x-subrip", "text/vtt"), TEXT),
    }
}


def add_audio_routes(app: FastAPI, ears: Ears | None, voice: Voice | None) -> None:
    """Add the two routes to `app`; without `ears` or `voice` theirs answers 400."""
    # Lines and threads of their own: whoever hears or speaks keeps nobody from the other routes.
    hearing = Queue(slots=HEARING_SLOTS, places=HEARING_PLACES)
    hearing_limiter = anyio.CapacityLimiter(HEARING_SLOTS)

    @app.post("/v1/audio/transcriptions", responses=HEARD)
    async def transcribe(form: Annotated[TranscriptionRequest, Form()], request: Request) -> Response:
        if ears is None:
            raise InputError("this server does not hear: it was started with --ears off")
        _check_model(form.model, (*HEARING_MODELS, ears.name))
        with hearing.join() as ticket:
            while not ticket.wait(0):
                if await request.is_disconnected():
                    return Response(status_code=499)
                await anyio.sleep(LOOK_UP_S)
            async with aclosing(pull(_heard(ears, form), hearing_limiter)) as heard:
                async for part in heard:
                    if isinstance(part, Response):
                        return part
                    if await request.is_disconnected():
                        break
        return Response(status_code=499)

    @app.post("/v1/audio/translations")
    def translate() -> None:
        raise HTTPException(404, "translations are not made here; /v1/audio/transcriptions writes down what is said")

    speaking = Queue(slots=SPEAKING_PLACES, places=0)
    speaking_limiter = anyio.CapacityLimiter(SPEAKING_THREADS)

    @app.post("/v1/audio/speech", responses=SPEECH)
    async def speak(body: SpeechRequest) -> Response:
        if voice is None:
            raise InputError("this server does not speak: it was started with --voice off")
        _check_model(body.model, (*SPEAKING_MODELS, voice.name))
        if body.voice not in (*VOICES, voice.name):
            raise InputError(f"voice: {body.voice[:40]!r} is not known; there is: {voice.name}")
        pulled = _counted(pull(_speech(voice, body), speaking_limiter), speaking)
        # The first sound decides the status: after it an error can only break the stream off.
        first = await anext(pulled)
        if body.stream_format == "sse":
            return ClosingResponse(pulled, _sound_events(first, pulled), media_type="text/event-stream")
        return ClosingResponse(pulled, _joined(first, pulled), media_type=media_type(body.response_format))


def _heard(ears: Ears, form: TranscriptionRequest) -> Generator[Segment | Response, None, None]:
    """Yield what is heard in the file as it is heard, and at the end the answer.

    Raises HTTPException for a file that is too large, InputError for one that is no sound.
    """
    data = form.file.file.read(AUDIO_LIMIT_BYTES + 1)
    if len(data) > AUDIO_LIMIT_BYTES:
        raise HTTPException(413, f"the file is too large; at most {AUDIO_LIMIT_BYTES >> 20} MiB are taken")
    samples = decode(data, max_seconds=MAX_FILE_S)
    if form.is_plain and samples.size <= TURN_S * HEARING_HZ:
        turn = ears.transcribe(samples)
        yield form.written(TimedTranscript((), "", turn.duration_s), turn.text)
        return
    timed = yield from ears.transcribe_timed(
        samples,
        language=form.language.lower(),
        prompt=form.prompt,
        temperature=form.temperature,
        words="word" in form.granularities,
    )
    yield form.written(timed, timed.text)


async def _counted(sound: AsyncGenerator[bytes, None], queue: Queue) -> AsyncGenerator[bytes, None]:
    """Yield `sound` while it has a place. Raises BusyError, before anything of it is made, where all are taken."""
    with queue.join():
        async with aclosing(sound):
            async for data in sound:
                yield data


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
        words = sayable(clause).split()
        for start in range(0, len(words), BREATH_WORDS):
            yield from voice.speak(" ".join(words[start : start + BREATH_WORDS]))


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
    """Raise UnknownModelError for a name that is not in `known`, whose last is what is served."""
    if name not in known:
        raise UnknownModelError(f"model: {name[:100]!r} is not served here; ask for {known[-1]!r} or 'default'")
