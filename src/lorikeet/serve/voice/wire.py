"""The shapes of OpenAI's Realtime API: client events read and checked, items and responses written.

    event = read_event(text)                # raises EventError, which becomes an `error` event
    send(item_event("conversation.item.added", item))

Fields that would change what happens and are not served are refused; those that change nothing pass. It knows no
sound, no thread and no socket.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from lorikeet.errors import InputError
from lorikeet.messages import HALF_CHARACTERS, Usage, has_half_characters
from lorikeet.serve.note import new_id

RATE_HZ = 24_000
MAX_TEXT_CHARACTERS = 32_000
VOICES = ("alloy", "ash", "ballad", "coral", "echo", "sage", "shimmer", "verse", "marin", "cedar", "default")
"""Names that OpenAI's clients send by habit; they mean what is served."""

MODELS = (
    "default", "gpt-realtime", "gpt-realtime-2", "gpt-realtime-mini", "gpt-4o-realtime-preview",
    "gpt-4o-mini-realtime-preview",
)  # fmt: skip
"""As `VOICES`: a session begins with the default model then, and one that has begun keeps its own."""


class EventError(InputError):
    """A client event is at fault; the session goes on."""

    def __init__(self, message: str, *, code: str = "invalid_value", param: str | None = None) -> None:
        """Say what is wrong in words, in OpenAI's code, and in which field."""
        super().__init__(message)
        self.code, self.param = code, param


class _Loose(BaseModel):
    model_config = ConfigDict(strict=True, extra="ignore", allow_inf_nan=False)


class PcmFormat(_Loose):
    """16-bit little-endian samples, the one format that is served."""

    type: Literal["audio/pcm"] = "audio/pcm"
    rate: Literal[24000] = 24000


class ServerVad(_Loose):
    """When a turn begins and ends."""

    type: Literal["server_vad"] = "server_vad"
    threshold: float | None = Field(None, ge=0.05, le=0.98)
    prefix_padding_ms: int | None = Field(None, ge=0, le=2000)
    silence_duration_ms: int | None = Field(None, ge=100, le=5000)
    create_response: bool | None = None
    interrupt_response: bool | None = None
    idle_timeout_ms: None = None


class Transcription(_Loose):
    """Whether transcripts of what the user said are sent."""

    model: str | None = Field(None, max_length=100)
    language: str | None = Field(None, max_length=20)


class AudioInput(_Loose):
    """The microphone's side."""

    format: PcmFormat | None = None
    transcription: Transcription | None = None
    turn_detection: ServerVad | None = None


class AudioOutput(_Loose):
    """The speaker's side."""

    format: PcmFormat | None = None
    voice: str | None = Field(None, max_length=100)
    speed: float | None = Field(None, ge=1, le=1)


class Audio(_Loose):
    """Both sides."""

    input: AudioInput | None = None
    output: AudioOutput | None = None


class Extension(_Loose):
    """What Lorikeet adds to a session."""

    model_config = ConfigDict(extra="forbid")
    search: Literal["auto", "off", "always"] | None = None
    events: bool | None = None


Modalities = Annotated[list[Literal["text", "audio"]], Field(min_length=1, max_length=1)]
Words = Annotated[str | None, Field(max_length=MAX_TEXT_CHARACTERS)]
Nothing = Annotated[list[Any] | None, Field(max_length=0)]
MaxTokens = Annotated[int, Field(ge=1, le=1_000_000)] | Literal["inf"]


class SessionFields(_Loose):
    """What `session.update` may change."""

    type: Literal["realtime"] = "realtime"
    model: str | None = None
    instructions: Words = None
    output_modalities: Modalities | None = None
    max_output_tokens: MaxTokens | None = None
    audio: Audio | None = None
    tools: Nothing = None
    prompt: None = None
    lorikeet: Extension | None = None


class ContentPart(_Loose):
    """A part of an item."""

    type: Literal["input_text", "input_audio", "output_text", "output_audio", "text", "audio"]
    text: str | None = Field(None, max_length=MAX_TEXT_CHARACTERS)
    transcript: str | None = Field(None, max_length=MAX_TEXT_CHARACTERS)
    audio: str | None = None


class ItemFields(_Loose):
    """An item that a client makes."""

    type: Literal["message"]
    role: Literal["system", "user", "assistant"]
    content: list[ContentPart] = Field(min_length=1, max_length=16)
    id: str | None = Field(None, min_length=1, max_length=64)


class ResponseFields(_Loose):
    """What `response.create` may ask for."""

    instructions: Words = None
    output_modalities: Modalities | None = None
    max_output_tokens: MaxTokens | None = None
    conversation: Literal["auto", "none"] | None = None
    input: Annotated[list[ItemFields] | None, Field(max_length=256)] = None
    metadata: Annotated[dict[str, str] | None, Field(max_length=16)] = None
    tools: Nothing = None


class _Event(_Loose):
    event_id: str | None = Field(None, max_length=512)


class SessionUpdate(_Event):
    """Change the session."""

    type: Literal["session.update"]
    session: SessionFields


class Append(_Event):
    """More audio."""

    type: Literal["input_audio_buffer.append"]
    audio: str


class Commit(_Event):
    """The user's turn is over."""

    type: Literal["input_audio_buffer.commit"]


class Clear(_Event):
    """Forget the audio."""

    type: Literal["input_audio_buffer.clear"]


class ItemCreate(_Event):
    """Put an item into the conversation."""

    type: Literal["conversation.item.create"]
    item: ItemFields
    previous_item_id: str | None = None


class ItemRetrieve(_Event):
    """Show an item."""

    type: Literal["conversation.item.retrieve"]
    item_id: str


class ItemDelete(_Event):
    """Take an item out of the conversation."""

    type: Literal["conversation.item.delete"]
    item_id: str


class ItemTruncate(_Event):
    """Say how much of a spoken answer was heard."""

    type: Literal["conversation.item.truncate"]
    item_id: str
    content_index: int
    audio_end_ms: int = Field(ge=0)


class ResponseCreate(_Event):
    """Answer now."""

    type: Literal["response.create"]
    response: ResponseFields | None = None


class ResponseCancel(_Event):
    """Stop answering."""

    type: Literal["response.cancel"]
    response_id: str | None = None


ClientEvent = (
    SessionUpdate
    | Append
    | Commit
    | Clear
    | ItemCreate
    | ItemRetrieve
    | ItemDelete
    | ItemTruncate
    | ResponseCreate
    | ResponseCancel
)
_EVENTS: TypeAdapter[ClientEvent] = TypeAdapter(Annotated[ClientEvent, Field(discriminator="type")])
EVENT_TYPES = tuple(kind.model_fields["type"].annotation.__args__[0] for kind in ClientEvent.__args__)


def read_event(text: str) -> ClientEvent:
    """Return the client event in a message. Raises EventError, with words that name the field."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EventError("the event is no JSON", code="invalid_json") from error
    if not isinstance(body, dict):
        raise EventError("an event is a JSON object with a type", code="invalid_json")
    if has_half_characters(body):
        raise EventError(HALF_CHARACTERS, code="invalid_json")
    kind = body.get("type")
    if kind not in EVENT_TYPES:
        shown = json.dumps(kind)[:60] if kind is not None else "no type"
        raise EventError(f"type: {shown} is not served; there are: {', '.join(EVENT_TYPES)}", param="type")
    try:
        return _EVENTS.validate_python(body)
    except ValidationError as error:
        problem = error.errors()[0]
        field = ".".join(str(part) for part in problem["loc"][1:])
        raise EventError(f"{field}: {_decapitalise(str(problem['msg']))}", param=field) from error
    except RecursionError as error:
        raise EventError("the event is nested too deeply", code="invalid_json") from error


def given_id(text: str) -> str | None:
    """Return the `event_id` that a broken event gives itself, None if it gives none."""
    try:
        body = json.loads(text)
    except (ValueError, RecursionError):
        return None
    name = body.get("event_id") if isinstance(body, dict) else None
    return name[:512] if isinstance(name, str) else None


def check_model(name: str, served: Iterable[str], *, param: str) -> None:
    """Raise EventError for a model that is not `served`, nor means what is."""
    served = tuple(served)
    if name not in (*MODELS, *served):
        words = f"{param}: {name[:100]!r} is not served here; ask for {', '.join(map(repr, served))} or 'default'"
        raise EventError(words, code="model_not_found", param=param)


def read_audio(encoded: str) -> bytes:
    """Return the bytes of base64 audio. Raises EventError."""
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise EventError("audio: this is no base64", code="invalid_audio", param="audio") from error
    if len(data) % 2:
        raise EventError("audio: pcm16 has two bytes a sample", code="invalid_audio", param="audio")
    return data


def server_event(kind: str, **fields: Any) -> dict[str, Any]:
    """Return a server event."""
    return {"type": kind, "event_id": new_id("event"), **fields}


def error_event(
    message: str,
    *,
    kind: str = "invalid_request_error",
    code: str | None = None,
    param: str | None = None,
    event_id: str | None = None,
) -> dict[str, Any]:
    """Return an `error` event; `event_id` is that of the client's event which is at fault."""
    error = {"type": kind, "code": code, "message": message, "param": param, "event_id": event_id}
    return server_event("error", error=error)


def response_usage(usage: Usage | None) -> dict[str, Any] | None:
    """Return the `usage` of a response."""
    if usage is None:
        return None
    prompt, completion = usage.prompt_tokens, usage.completion_tokens
    return {
        "total_tokens": prompt + completion,
        "input_tokens": prompt,
        "output_tokens": completion,
        "input_token_details": {"text_tokens": prompt, "audio_tokens": 0, "cached_tokens": 0},
        "output_token_details": {"text_tokens": completion, "audio_tokens": 0},
    }


def _decapitalise(text: str) -> str:
    text = text.removeprefix("Value error, ")
    return text[:1].lower() + text[1:]
