"""When does somebody begin to speak, pause, go on, and end? Pure: probabilities in, events out, one frame of 32 ms each.

    taker = TurnTaker(TurnSettings())
    for probability in vad_probabilities:
        for event in taker.hear(probability):
            ...

Its only clock is the audio itself, so a recording gives the same events however fast it is fed. A turn runs like this:

    idle --Started--> speaking --Paused--> pausing --Ended--> ended --(reopening window)--> idle
                         ^---- Resumed -------'                 |
                         ^---- Started(reopens=True) -----------'

`Paused` comes early, so that transcription and answer can be prepared; `Resumed` says that they are void. `Ended` comes
after the silence that closes a turn, a longer one while what was said does not sound finished. Who speaks again within
the reopening window goes on with the same turn.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from lorikeet.speech.vad import FRAME_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnSettings:
    """What decides; the names of the first three are OpenAI's."""

    threshold: float = 0.5
    """Probability from which a frame is speech; below it by `HYSTERESIS`, it is silence again."""
    silence_duration_ms: int = 384
    """Silence that ends a turn which sounds finished."""
    prefix_padding_ms: int = 300
    """Audio before the first frame of speech that belongs to the turn."""
    unfinished_factor: float = 2.0
    """So many times the silence ends a turn that does not sound finished."""
    pause_ms: int = 96
    """Silence after which a turn may be over, and is prepared for."""
    start_ms: int = 64
    """Speech that begins a turn: less is a click."""
    reopen_ms: int = 1200
    """Who speaks again so soon after the end of speech goes on with the same turn."""


HYSTERESIS = 0.15
"""Silero's own distance between the thresholds of speech and silence."""


@dataclass(frozen=True, slots=True)
class Started:
    """Somebody speaks."""

    at_ms: int
    """Where the speech begins, the padding before it included."""
    reopens: bool
    """Whether it goes on with the turn before, which ended too early."""


@dataclass(frozen=True, slots=True)
class Paused:
    """The speech stopped; the turn may be over."""

    speech_end_ms: int
    """Where the last frame of speech ended."""


@dataclass(frozen=True, slots=True)
class Resumed:
    """The speech goes on: what was prepared at the pause is void."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The turn is over."""

    speech_end_ms: int
    """Where the last frame of speech ended."""
    at_ms: int
    """How much audio had been heard when that was decided."""


TurnEvent = Started | Paused | Resumed | Ended


_UNFINISHED = re.compile(
    r"(?i)\b(?:a|an|and|are|as|at|because|but|by|for|from|if|in|into|is|my|of|on|or|our|so|than|that|the|their|then|to|"
    r"was|were|when|which|while|who|will|with|your|um|uh|er)[.?!]+$"
)
"""A last word that no sentence ends with."""


def sounds_finished(text: str) -> bool:
    """Say whether what was said up to a pause is a whole sentence, by Whisper's own punctuation and the last word."""
    text = text.rstrip("\"'” ")
    if not text.endswith((".", "?", "!")) or text.endswith(("..", "…")):
        return False
    return _UNFINISHED.search(text) is None


class TurnTaker:
    """The turns of one listener."""

    def __init__(self, settings: TurnSettings) -> None:
        """Begin in silence."""
        self.settings = settings
        self.heard_ms = 0
        """How much audio was heard."""
        self._in_turn = False
        self._paused = False
        self._finished = True
        self._speech_ms = 0
        """Speech on end, while a turn may begin or go on."""
        self._silence_ms = 0
        self._speech_end_ms = 0
        self._reopens_until_ms = 0

    @property
    def in_turn(self) -> bool:
        """Whether somebody is speaking, or pausing."""
        return self._in_turn

    @property
    def may_begin(self) -> bool:
        """Whether the last frame was speech, though not yet enough for a turn."""
        return self._speech_ms > 0 and not self._in_turn

    def hear(self, probability: float) -> list[TurnEvent]:
        """Return what the next frame, of that probability of speech, makes happen."""
        self.heard_ms += FRAME_MS
        threshold = self.settings.threshold
        if probability >= (threshold - HYSTERESIS if self._in_turn and not self._paused else threshold):
            return self._hear_speech()
        return self._hear_silence()

    def judge(self, *, finished: bool) -> None:
        """Take note of whether what was said up to the pause sounds finished."""
        self._finished = finished

    def reset(self) -> None:
        """Forget the turn under way, and that one may go on."""
        self._in_turn = self._paused = False
        self._speech_ms = self._silence_ms = self._reopens_until_ms = 0

    def _hear_speech(self) -> list[TurnEvent]:
        self._speech_ms += FRAME_MS
        if self._in_turn and not self._paused:
            self._silence_ms = 0
            self._speech_end_ms = self.heard_ms
            return []
        if self._speech_ms < self.settings.start_ms:
            return []
        self._speech_end_ms, self._silence_ms = self.heard_ms, 0
        if self._in_turn:
            self._paused = False
            return [Resumed()]
        self._in_turn = True
        begin_ms = self.heard_ms - self._speech_ms
        reopens = begin_ms < self._reopens_until_ms
        return [Started(max(0, begin_ms - self.settings.prefix_padding_ms), reopens)]

    def _hear_silence(self) -> list[TurnEvent]:
        self._speech_ms = 0
        if not self._in_turn:
            return []
        self._silence_ms = self.heard_ms - self._speech_end_ms
        if not self._paused and self._silence_ms >= self.settings.pause_ms:
            self._paused, self._finished = True, True
            return [Paused(self._speech_end_ms), *self._end_if_due()]
        return self._end_if_due()

    def _end_if_due(self) -> list[TurnEvent]:
        limit_ms = self.settings.silence_duration_ms * (1 if self._finished else self.settings.unfinished_factor)
        if not self._paused or self._silence_ms < limit_ms:
            return []
        self._in_turn = self._paused = False
        self._reopens_until_ms = self._speech_end_ms + self.settings.reopen_ms
        return [Ended(self._speech_end_ms, self.heard_ms)]
