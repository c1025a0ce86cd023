"""What is noted of one turn while it is answered, for the memory to keep.

    note = Note(id=new_id("turn"), channel="page")
    for event in assistant.respond(turns, note=note): ...
    note.kept                                   # where it was kept, None if it was not

Whoever asks for an answer makes the note, the assistant fills it in, the memory keeps it. It knows none of them.
"""

from __future__ import annotations

import secrets
import time
from dataclasses import dataclass, field
from typing import Literal

from lorikeet.messages import Message, Source, Usage

Channel = Literal["api", "page", "voice"]
"""Where a turn was asked."""

Outcome = Literal["stop", "length", "stopped", "interrupted", "failed"]
"""How an answer ended: by itself, at a limit, by a client that went away, by a voice, by an error."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """The model that answered."""

    name: str
    """As clients know it."""
    quant: str = ""
    """The GGUF type of a run's file; '' where it is not known."""
    gguf_sha256: str = ""
    """Of the file that was served; '' for a remote server."""
    adapter_sha256: str = ""
    """Of the adapter in it, by the run's manifest; '' for a model that is no run's."""


@dataclass(frozen=True, slots=True)
class Kept:
    """Where a turn was kept."""

    id: str
    conversation_id: str


@dataclass(slots=True, kw_only=True)
class Note:
    """One turn, filled in as it goes on."""

    id: str
    """What the client will know the answer by; it cannot be guessed."""
    channel: Channel
    conversation_id: str = ""
    """The conversation that it goes on with; '' for a new one."""
    deferred: bool = False
    """Whether the one who asked keeps it, as with speech, where the end is known later; else the assistant does."""
    origin: Origin = field(default_factory=lambda: Origin(name=""))
    question: str = ""
    """The user's own words; of speech, the transcript."""
    prompt: tuple[Message, ...] = ()
    """What the model was given, exactly: with system turn and search results, without turns that did not fit."""
    answer: str = ""
    outcome: Outcome = "stopped"
    search_reason: str | None = None
    """Why the web was searched, None if it was not."""
    search_failure: str | None = None
    sources: tuple[Source, ...] = ()
    usage: Usage | None = None
    began_s: float = field(default_factory=time.time)
    """Seconds since 1970."""
    timings_ms: dict[str, float] = field(default_factory=dict)
    """Milliseconds after the beginning; of speech, each stage after the end of speech."""
    kept: Kept | None = None


def new_id(kind: str) -> str:
    """Return a name such as `turn_6ad6…` that cannot be guessed: 128 random bits."""
    return f"{kind}_{secrets.token_hex(16)}"
