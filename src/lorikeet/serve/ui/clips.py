"""Spoken answers for the page's players: a few hundred WAV files under names that cannot be guessed.

clips = Clips()
name = clips.keep(samples, 24_000)
clips.path(name)
"""

from __future__ import annotations

import secrets
import shutil
import threading
import weakref
from collections import deque
from pathlib import Path
from tempfile import mkdtemp

from lorikeet.speech import Samples
from lorikeet.speech.audio import encode_wav

KEPT = 200
"""Answers that can still be played; older files are deleted."""


class Clips:
    """A folder of spoken answers that goes with this object, at the latest when the process ends."""

    def __init__(self) -> None:
        """Make the folder."""
        self._folder = Path(mkdtemp(prefix="lorikeet-spoken-"))
        # Not a TemporaryDirectory: one that is collected warns, and nobody but the collector knows when a page is done with.
        weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
        self._names: deque[str] = deque()
        self._lock = threading.Lock()

    def keep(self, samples: Samples, sample_rate_hz: int) -> str:
        """Write the samples as a WAV file and return its name."""
        name = f"{secrets.token_urlsafe(18)}.wav"
        (self._folder / name).write_bytes(encode_wav(samples, sample_rate_hz))
        with self._lock:
            self._names.append(name)
            old = self._names.popleft() if len(self._names) > KEPT else None
        if old:
            (self._folder / old).unlink(missing_ok=True)
        return name

    def path(self, name: str) -> Path | None:
        """Return the file of a name that `keep` gave and that is still kept, None for any other."""
        with self._lock:
            return self._folder / name if name in self._names else None
