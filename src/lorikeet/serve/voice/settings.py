"""A voice session's settings: what `session.update` changes and `session.created` shows.

settings = SessionSettings.of("my-model", "Be brief.", speaks=True)
settings = settings.updated(fields, voice=voice)      # raises EventError, and changes nothing then
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from lorikeet.serve.assistant import Search
from lorikeet.serve.note import new_id
from lorikeet.serve.voice import wire
from lorikeet.serve.voice.turn import TurnSettings
from lorikeet.serve.voice.wire import EventError
from lorikeet.speech import Voice

SESSION_S = 3600
"""A session's longest life, as OpenAI's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What a session is set to."""

    model: str
    instructions: str
    modalities: tuple[str, ...]
    max_output_tokens: int | str | None = None
    voice: str = "default"
    turns: TurnSettings = field(default_factory=TurnSettings)
    detects_turns: bool = True
    responds: bool = True
    interrupts: bool = True
    transcribes: bool = True
    search: Search = "off"
    tells_events: bool = False
    """Whether searches and waterfalls are told in events of Lorikeet's own."""
    session_id: str = field(default_factory=lambda: new_id("sess"))
    conversation_id: str = field(default_factory=lambda: new_id("conv"))
    expires_at: int = field(default_factory=lambda: int(time.time()) + SESSION_S)

    @classmethod
    def of(cls, model: str, instructions: str, *, speaks: bool) -> SessionSettings:
        """Return what a session begins with."""
        return cls(model=model, instructions=instructions, modalities=("audio" if speaks else "text",))

    def updated(
        self, fields: wire.SessionFields, *, voice: Voice | None, models: Collection[str] = ()
    ) -> SessionSettings:
        """Return the settings with what `fields` give; what they do not name stays, at every depth.

        `models` are the names that may be chosen among. Raises EventError.
        """
        given = fields.model_fields_set
        changes: dict[str, Any] = {}
        if fields.model is not None:
            wire.check_model(fields.model, models, param="session.model")
            changes["model"] = fields.model if fields.model in models else self.model
        if "instructions" in given:
            changes["instructions"] = fields.instructions or ""
        if fields.output_modalities:
            if voice is None and fields.output_modalities == ["audio"]:
                raise EventError("output_modalities: this server does not speak: it was started with --voice off")
            changes["modalities"] = tuple(fields.output_modalities)
        if "max_output_tokens" in given:
            changes["max_output_tokens"] = fields.max_output_tokens
        if fields.lorikeet:
            changes |= _named({"search": fields.lorikeet.search, "tells_events": fields.lorikeet.events})
        if fields.audio and fields.audio.output and fields.audio.output.voice:
            name = fields.audio.output.voice
            if name not in (*wire.VOICES, voice.name if voice else "default"):
                raise EventError(f"voice: {name[:40]!r} is not known", param="session.audio.output.voice")
            changes["voice"] = name
        if fields.audio and fields.audio.input:
            changes |= self._listening(fields.audio.input)
        return replace(self, **changes)

    def _listening(self, fields: wire.AudioInput) -> dict[str, Any]:
        changes: dict[str, Any] = {}
        if "transcription" in fields.model_fields_set:
            changes["transcribes"] = fields.transcription is not None
        if "turn_detection" not in fields.model_fields_set:
            return changes
        vad = fields.turn_detection
        if vad is None:
            # Nothing of it is left to go on from when it is switched on again.
            return changes | {"detects_turns": False, "turns": TurnSettings(), "responds": True, "interrupts": True}
        turns = {"threshold": vad.threshold, "prefix_padding_ms": vad.prefix_padding_ms}
        turns["silence_duration_ms"] = vad.silence_duration_ms
        changes |= {"detects_turns": True, "turns": replace(self.turns, **_named(turns))}
        return changes | _named({"responds": vad.create_response, "interrupts": vad.interrupt_response})

    def audio_output(self) -> dict[str, Any]:
        """Return the speaker's side as the API shows it."""
        return {"format": {"type": "audio/pcm", "rate": wire.RATE_HZ}, "voice": self.voice}

    def fields(self) -> dict[str, Any]:
        """Return the session as the API shows it."""
        shown = {key: asdict(self.turns)[key] for key in ("threshold", "prefix_padding_ms", "silence_duration_ms")}
        detection = {
            "type": "server_vad",
            **shown,
            "create_response": self.responds,
            "interrupt_response": self.interrupts,
            "idle_timeout_ms": None,
        }
        return {
            "type": "realtime",
            "object": "realtime.session",
            "id": self.session_id,
            "model": self.model,
            "expires_at": self.expires_at,
            "instructions": self.instructions,
            "output_modalities": list(self.modalities),
            "max_output_tokens": self.max_output_tokens or "inf",
            "tools": [],
            "tool_choice": "auto",
            "truncation": "auto",
            "audio": {
                "input": {
                    "format": {"type": "audio/pcm", "rate": wire.RATE_HZ},
                    "transcription": {"model": "default"} if self.transcribes else None,
                    "noise_reduction": None,
                    "turn_detection": detection if self.detects_turns else None,
                },
                "output": {**self.audio_output(), "speed": 1.0},
            },
            "lorikeet": {"search": self.search, "events": self.tells_events},
        }


def _named(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values that a client gave."""
    return {name: value for name, value in values.items() if value is not None}
