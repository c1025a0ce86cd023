"""What a conversation by voice consists of: its items, the turn being spoken, the answer on its way.

    item = Item(new_id("item"), "user", "input_audio", pending=True)
    item.fields()               # as the Realtime API shows it

State alone: `session` owns and changes it, on its one thread. It knows no socket and no clock but that of playing.
"""

from __future__ import annotations

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

from lorikeet.serve.note import Note
from lorikeet.serve.voice import wire
from lorikeet.serve.voice.mind import Finished, Heard, Job, Looked
from lorikeet.serve.voice.turn import Ended
from lorikeet.speech import Samples


@dataclass(slots=True)
class Item:
    """A turn of the conversation."""

    id: str
    role: str
    kind: str
    """The type of its one content part."""
    text: str = ""
    pending: bool = False
    """Whether its transcript is still being made."""
    status: str = "completed"
    clauses: list[tuple[str, float]] = field(default_factory=list)
    """Of a spoken answer: each clause with the milliseconds of its sound."""
    note: Note | None = None
    """Of an answer that was given to the memory: what was given."""

    def fields(self) -> dict[str, Any]:
        """Return it as the API shows it."""
        spoken = self.kind in {"input_audio", "output_audio"}
        part = {"type": self.kind, "transcript" if spoken else "text": None if self.pending else self.text}
        shown = {"id": self.id, "object": "realtime.item", "type": "message", "status": self.status, "role": self.role}
        return {**shown, "content": [] if self.status == "in_progress" else [part]}

    @property
    def spoken_ms(self) -> float:
        """How long its sound is."""
        return sum(ms for _, ms in self.clauses)

    def heard_text(self, heard_ms: float) -> str:
        """Return the words that were heard after so many milliseconds: whole clauses, and the begun one's share."""
        text = ""
        for clause, clause_ms in self.clauses:
            if heard_ms >= clause_ms:
                text += clause
                heard_ms -= clause_ms
                continue
            words = clause.split()
            text += " ".join(words[: int(len(words) * heard_ms / clause_ms)])
            break
        return text.strip()


@dataclass(slots=True)
class Reply:
    """An answer on its way."""

    generation: int
    job: Job
    options: wire.ResponseFields
    item: Item
    id: str
    speaks: bool = True
    kept: bool = True
    """Whether it becomes part of the conversation."""
    retracted: bool = False
    """Whether it answers a turn that was not over; then nothing is remembered of it."""
    shown: bool = False
    """Whether the client knows of it."""
    text: str = ""
    unsent_text: str = ""
    pending: deque[Samples] = field(default_factory=deque)
    sent_ms: float = 0.0
    played_until_s: float = 0.0
    """When the sound that was sent will have been played."""
    untold: list[Looked] = field(default_factory=list)
    """What a search did before the client knew of the answer."""
    failure: str = ""
    """What went wrong before the client knew of the answer."""
    finished: Finished | None = None
    stages_s: dict[str, float] = field(default_factory=dict)
    """When each stage of the turn was reached."""

    @property
    def heard_ms(self) -> float:
        """How much of its sound was played by now."""
        ahead_ms = max(0.0, self.played_until_s - time.monotonic()) * 1000
        return max(0.0, self.sent_ms - ahead_ms)


@dataclass(slots=True)
class UserTurn:
    """What somebody is saying, or has just said."""

    item_id: str
    start_ms: int
    end_s: float = 0.0
    """When the speech ended, by the wall clock."""
    reply: Reply | None = None
    """The answer prepared since the last pause."""
    job: Job | None = None
    heard: Heard | None = None
    ended: Ended | None = None
    committed: bool = False
