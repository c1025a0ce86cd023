"""Hearing and speaking: `audio` (decode, resample), `hear` (speech to text), `speak` (text to speech).

The two protocols below are all that the assistant knows of them.
"""

from __future__ import annotations

from collections.abc import Iterator
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


class Ears(Protocol):
    """Speech to text."""

    name: str

    def transcribe(self, samples: Samples) -> Transcript:
        """Return what is said in `samples`, mono at `HEARING_HZ`."""
        ...


class Voice(Protocol):
    """Text to speech."""

    name: str
    sample_rate_hz: int

    def speak(self, text: str) -> Iterator[Samples]:
        """Yield the spoken `text`, a sentence at a time, mono at `sample_rate_hz`."""
        ...
