"""Speech to text: Whisper through faster-whisper.

ears = load_ears("whisper-tiny.en")
ears.transcribe(samples).text
"""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from lorikeet.errors import InputError, MachineError, MissingExtraError
from lorikeet.speech import HEARING_HZ, Ears, Samples, Transcript
from lorikeet.speech.audio import level_db
from lorikeet.weights import PACKAGES, packaged

SILENCE_DB = -55.0
"""Audio below this level is silence; Whisper invents words for it."""

NO_SPEECH_PROBABILITY = 0.6
LOG_PROBABILITY = -1.0
"""A segment that Whisper thinks is no speech, and is unsure of, is left out: the thresholds of its paper (2212.04356)."""


class WhisperEars:
    """Whisper on CTranslate2, 8-bit integers on the CPU."""

    def __init__(self, name: str, model: Any) -> None:
        """Wrap a loaded `faster_whisper.WhisperModel`."""
        self.name = name
        self._model = model
        self._lock = threading.Lock()

    def transcribe(self, samples: Samples) -> Transcript:
        """Return what is said in `samples`, mono at 16 kHz; one call at a time."""
        duration_s = samples.size / HEARING_HZ
        if level_db(samples) < SILENCE_DB:
            return Transcript("", duration_s)
        with self._lock:
            segments, _ = self._model.transcribe(
                samples,
                language="en" if self.name.endswith(".en") else None,
                beam_size=1,
                condition_on_previous_text=False,
            )
            spoken = [
                segment.text.strip()
                for segment in segments
                if segment.no_speech_prob < NO_SPEECH_PROBABILITY or segment.avg_logprob > LOG_PROBABILITY
            ]
        return Transcript(" ".join(text for text in spoken if text), duration_s)


def load_ears(name: str, *, threads: int = 2) -> Ears:
    """Return the speech recogniser `name`: a packaged name, a CTranslate2 folder, or a size that the hub has.

    Raises InputError for an unknown name, MissingExtraError without faster-whisper, MachineError if it cannot be loaded.
    """
    if name in PACKAGES and name.startswith("whisper"):
        return WhisperEars(name, _load(str(packaged(name)), threads))
    if Path(name).is_dir():
        if not (Path(name) / "model.bin").is_file():
            raise InputError(f"{name} is no Whisper folder for CTranslate2 (no model.bin); try --ears whisper-tiny.en")
        return WhisperEars(Path(name).name, _load(name, threads))
    sizes = _sizes()
    if name.removeprefix("whisper-") in sizes:
        return WhisperEars(name, _load(name.removeprefix("whisper-"), threads))
    raise InputError(
        f"--ears {name} is not known; packaged is whisper-tiny.en, sizes are {', '.join(sizes)}, or name a folder, or off"
    )


def _sizes() -> list[str]:
    try:
        from faster_whisper import available_models
    except ImportError as error:
        raise MissingExtraError("faster-whisper", "speech") from error
    return list(available_models())


def _load(source: str, threads: int) -> Any:
    try:
        from faster_whisper import WhisperModel
    except ImportError as error:
        raise MissingExtraError("faster-whisper", "speech") from error
    try:
        return WhisperModel(source, device="cpu", compute_type="int8", cpu_threads=threads, num_workers=1)
    except (RuntimeError, OSError, ValueError) as error:
        raise MachineError(
            f"cannot load the ears {source}: {str(error).splitlines()[0]}; the packaged one is whisper-tiny.en"
        ) from error
