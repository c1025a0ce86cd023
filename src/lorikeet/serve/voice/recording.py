"""The audio of a conversation that may still be needed.

    recording.append(samples)
    recording.cut(turn.start_ms, speech_end_ms)

It is cut by place in time, counted from the first sample, and knows nothing of what was said.
"""

from __future__ import annotations

import numpy as np

from lorikeet.speech import HEARING_HZ, Samples


class Recording:
    """The audio of the conversation that may still be needed, at 16 kHz, by its place in time."""

    def __init__(self) -> None:
        """Begin at 0 ms."""
        self._bytes = bytearray()
        self._start = 0

    @property
    def end(self) -> int:
        """How many samples were recorded."""
        return self._start + len(self._bytes) // 4

    def append(self, samples: Samples) -> None:
        """Record on."""
        self._bytes += samples.astype("<f4", copy=False).tobytes()

    def cut(self, start_ms: float, end_ms: float | None = None) -> Samples:
        """Return what was recorded between two places, as far as it is still here."""
        first = max(0, int(start_ms * HEARING_HZ / 1000) - self._start)
        last = len(self._bytes) // 4 if end_ms is None else max(0, int(end_ms * HEARING_HZ / 1000) - self._start)
        return np.frombuffer(bytes(self._bytes[4 * first : 4 * last]), "<f4")

    def forget_before(self, ms: float) -> None:
        """Let go of what is older."""
        count = min(int(ms * HEARING_HZ / 1000) - self._start, len(self._bytes) // 4)
        if count > HEARING_HZ:
            del self._bytes[: 4 * count]
            self._start += count
