"""Hearing and speaking: `audio` (decode, resample), `hear` (speech to text), `speak` (text to speech).

The two protocols below are all that the assistant knows of them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

Samples = NDArray[np.float32]
"""Mono audio, float32 in [-1, 1], shape (samples,)."""

HEARING_HZ = 16_000
"""The sample rate that every `Ears` takes."""


@dataclass(frozen=True, slots=True)
class Transcript:
    """What was heard."""

    text: str
    """The words; '' where there was no speech."""
    duration_s: float
    """Length of the audio."""


@dataclass(frozen=True, slots=True)
class Word:
    """A word that was heard."""

    text: str
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """A stretch of speech, about a sentence, with what Whisper thinks of its own text."""

    text: str
    start_s: float
    end_s: float
    words: tuple[Word, ...] = ()
    """Empty unless they were asked for."""
    tokens: tuple[int, ...] = ()
    temperature: float = 0.0
    log_probability: float = 0.0
    """Mean of the tokens' natural logarithms."""
    compression: float = 0.0
    """Bytes of the text for each byte of it compressed; high where it repeats itself."""
    no_speech_probability: float = 0.0


@dataclass(frozen=True, slots=True)
class TimedTranscript:
    """What was heard, and when."""

    segments: tuple[Segment, ...]
    """In order; empty where there was no speech."""
    language: str
    """ISO 639-1 code of what was heard, or of what was asked for."""
    duration_s: float
    """Length of the audio."""

    @property
    def text(self) -> str:
        """The words of all segments."""
        return " ".join(segment.text for segment in self.segments)


class Ears(Protocol):
    """Speech to text."""

    name: str

    def transcribe(self, samples: Samples) -> Transcript:
        """Return what is said in `samples`, mono at `HEARING_HZ`."""
        ...

    def transcribe_timed(
        self,
        samples: Samples,
        *,
        language: str = "",
        prompt: str = "",
        temperature: float = 0.0,
        words: bool = False,
    ) -> Generator[Segment, None, TimedTranscript]:
        """Yield what is said in `samples`, mono at `HEARING_HZ`, and when, as it is heard; return all of it.

        With `words` each word has its times too. Between two segments others are heard; who closes it hears no more.
        `language` is an ISO 639-1 code, '' to find out. `prompt` is a text that the words may follow on from. At a
        `temperature` of 0 the likeliest words are taken, and a higher one is tried only where these look wrong.
        Raises RequestError for a language that is not heard.
        """
        ...


class Voice(Protocol):
    """Text to speech."""

    name: str
    sample_rate_hz: int

    def speak(self, text: str) -> Iterator[Samples]:
        """Yield the spoken `text`, a sentence at a time, mono at `sample_rate_hz`."""
        ...
