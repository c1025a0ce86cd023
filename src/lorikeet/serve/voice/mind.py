"""What an answer takes, one step after another: hear, look up, write, speak; each step posted as soon as it is done.

    mind = Mind(ears=ears, voice=voice, post=inbox.put)
    mind.submit(Job(generation=mind.begin(), assistant=assistant, ...))

One thread does all of it, so hearing, writing and speaking never compete for the same cores within a conversation. A
job that `begin` has overtaken stops at its next step and posts nothing more. It knows no turns and no protocol.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass, field

from lorikeet.errors import LorikeetError
from lorikeet.messages import Message, Usage
from lorikeet.serve.assistant import Assistant, Done, Found, Search, SearchFailed, Searching, Text, Waiting
from lorikeet.serve.note import Note
from lorikeet.speech import Ears, Samples, Transcript, Voice
from lorikeet.speech.audio import resample, trim_start
from lorikeet.speech.clauses import ClauseSplitter
from lorikeet.speech.sayable import sayable

SPEAKING_HZ = 24_000
"""The sample rate of what is said, whatever the voice's own."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """Something to hear, to answer, or both."""

    generation: int | None
    """The answer that it is for, void when another has begun; None for a transcription that is wanted in any case."""
    item_id: str = ""
    """The user's turn that `audio` belongs to."""
    audio: Samples | None = None
    """The user's turn, mono at 16 kHz; None if `history` ends with it."""
    assistant: Assistant | None = None
    """Who answers; None where the transcript alone is wanted."""
    history: tuple[Message, ...] = ()
    """What was said before."""
    speaks: bool = True
    """Whether the answer is spoken."""
    search: Search = "off"
    max_tokens: int | None = None
    note: Note | None = None
    """Filled in as the answer goes on; whoever knows what was heard of it keeps it."""
    confirmed: threading.Event = field(default_factory=threading.Event)
    """Set when the turn is known to be over. Only then is the web asked: half a sentence is nobody's business."""


@dataclass(frozen=True, slots=True)
class Heard:
    """The user's turn as text; '' if nothing was said."""

    job: Job
    transcript: Transcript
    at_s: float


@dataclass(frozen=True, slots=True)
class Looked:
    """A search began or ended."""

    generation: int | None
    event: Searching | Found | SearchFailed
    at_s: float


@dataclass(frozen=True, slots=True)
class Wrote:
    """A piece of the answer."""

    generation: int | None
    text: str
    at_s: float


@dataclass(frozen=True, slots=True)
class Said:
    """A clause of the answer as sound, mono at `SPEAKING_HZ`; its samples are empty where nothing in it can be said."""

    generation: int | None
    text: str
    samples: Samples
    clause_at_s: float
    """When its text was complete."""


@dataclass(frozen=True, slots=True)
class Finished:
    """The answer is complete."""

    generation: int | None
    reason: str
    usage: Usage | None


@dataclass(frozen=True, slots=True)
class Failed:
    """The job ended with an error, in words for the user."""

    job: Job
    message: str
    heard: bool
    """Whether the turn had been transcribed before."""


Thought = Heard | Looked | Wrote | Said | Finished | Failed


class Mind:
    """A worker thread with its queue and the one cancel counter of a conversation."""

    def __init__(self, *, ears: Ears | None, voice: Voice | None, post: Callable[[Thought], object]) -> None:
        """Start the thread; what it thinks is given to `post`, on that thread."""
        self._ears, self._voice, self._post = ears, voice, post
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._generation = 0
        self._thread = threading.Thread(target=self._work, name="mind", daemon=True)
        self._thread.start()

    def begin(self) -> int:
        """Make every answer under way void, and return the number of the next."""
        self._generation += 1
        return self._generation

    def submit(self, job: Job) -> None:
        """Do a job after those that wait."""
        self._jobs.put(job)

    def close(self) -> None:
        """Give up what is under way and end the thread."""
        self.begin()
        self._jobs.put(None)

    def _is_void(self, job: Job) -> bool:
        return job.generation is not None and job.generation != self._generation

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            if self._is_void(job):
                continue
            heard = job.audio is None
            try:
                for thought in self._think(job):
                    if self._is_void(job):
                        break
                    heard = heard or isinstance(thought, Heard)
                    self._post(thought)
            except LorikeetError as error:
                self._fail(job, str(error), heard=heard)
            # The edge of a thread: a defect in one job must not take the conversation along.
            except Exception as error:  # noqa: BLE001
                _log.exception("a voice turn failed")
                self._fail(job, f"the server failed ({type(error).__name__}); its log says more", heard=heard)

    def _fail(self, job: Job, message: str, *, heard: bool) -> None:
        if not self._is_void(job):
            self._post(Failed(job, message, heard))

    def _think(self, job: Job) -> Iterator[Thought]:
        history = job.history
        if job.audio is not None:
            assert self._ears is not None
            transcript = self._ears.transcribe(job.audio)
            yield Heard(job, transcript, time.monotonic())
            if not transcript.text:
                return
            history = (*history, Message("user", transcript.text))
        if job.assistant is not None:
            yield from self._answer(job, job.assistant, history)

    def _answer(self, job: Job, assistant: Assistant, history: tuple[Message, ...]) -> Iterator[Thought]:
        clauses = ClauseSplitter()
        answer = assistant.respond(history, search=job.search, max_tokens=job.max_tokens, note=job.note, urgent=True)
        with closing(answer) as events:
            for event in events:
                if isinstance(event, Text):
                    yield Wrote(job.generation, event.text, time.monotonic())
                    for clause in clauses.feed(event.text):
                        yield self._say(job, clause)
                elif isinstance(event, Done):
                    for clause in clauses.flush():
                        yield self._say(job, clause)
                    yield Finished(job.generation, event.finish_reason, event.usage)
                elif isinstance(event, Waiting):
                    if self._is_void(job):
                        return
                elif isinstance(event, Searching | Found | SearchFailed):
                    yield Looked(job.generation, event, time.monotonic())
                    if isinstance(event, Searching) and not self._is_confirmed(job):
                        return

    def _is_confirmed(self, job: Job) -> bool:
        """Wait until the turn is known to be over; say whether it is still wanted then."""
        while not job.confirmed.wait(0.05):
            if self._is_void(job):
                return False
        return True

    def _say(self, job: Job, clause: str) -> Said:
        began_s = time.monotonic()
        parts: list[Samples] = []
        if job.speaks and self._voice is not None and (words := sayable(clause)):
            for samples in self._voice.speak(words):
                parts.append(resample(samples, self._voice.sample_rate_hz, SPEAKING_HZ))
                if self._is_void(job):
                    break
        return Said(job.generation, clause, trim_start(_join(parts), SPEAKING_HZ), began_s)


def _join(parts: list[Samples]) -> Samples:
    import numpy as np

    return np.concatenate(parts) if parts else np.zeros(0, np.float32)
