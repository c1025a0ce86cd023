"""Text to speech: the packaged voice, and those that a user installs.

    voice = load_voice("hibari")
    for samples in voice.speak(sayable("**Hello**, it is 10:05.")): ...

A voice is given words that can be said (`sayable`); it knows nothing of markdown, numbers or conversations.
"""

from __future__ import annotations

import pickle
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.errors import InputError, MachineError, MissingExtraError
from lorikeet.speech import Samples, Voice
from lorikeet.weights import packaged_voice

COQUI_MODEL = "tts_models/en/ljspeech/tacotron2-DDC"
"""The voice that `coqui` alone means."""

KOKORO_SPEAKER = "af_heart"
KNOWN = (
    "hibari (packaged), kokoro:FOLDER[@SPEAKER] (pip install kokoro-onnx), "
    "coqui, coqui:FOLDER or tts_models/... (pip install 'coqui-tts[cpu,codec]'), off"
)


class HibariVoice:
    """The packaged neural voice: English, 24 kHz, about a hundred times faster than real time."""

    name = "hibari"

    def __init__(self, model: Any) -> None:
        """Wrap a loaded `hibari.Hibari`."""
        self._model = model
        self._lock = threading.Lock()
        self.sample_rate_hz = int(model.sample_rate)

    def speak(self, text: str) -> Iterator[Samples]:
        """Yield the spoken `text`, a sentence at a time; the same text always sounds the same."""
        for sentence in self._model.split_sentences(text):
            with self._lock:
                samples: Samples = self._model(sentence, seed=0)
            if samples.size:
                yield samples


class KokoroVoice:
    """Kokoro-82M through `kokoro-onnx`: 24 kHz, 54 speakers; its phonemiser is under the GPL, so a user installs it."""

    sample_rate_hz = 24_000

    def __init__(self, model: Any, speaker: str) -> None:
        """Wrap a loaded `kokoro_onnx.Kokoro`."""
        self.name = f"kokoro@{speaker}"
        self._model, self._speaker = model, speaker
        self._lock = threading.Lock()

    def speak(self, text: str) -> Iterator[Samples]:
        """Yield the spoken `text` in one piece."""
        if not text.strip():
            return
        language = "en-gb" if self._speaker.startswith("b") else "en-us"
        with self._lock:
            samples, _ = self._model.create(text, voice=self._speaker, lang=language)
        yield np.asarray(samples, np.float32)


class CoquiVoice:
    """A model of Coqui TTS; each has its own sample rate."""

    def __init__(self, name: str, model: Any) -> None:
        """Wrap a loaded `TTS.api.TTS`."""
        self.name = name
        self._model = model
        self._lock = threading.Lock()
        self.sample_rate_hz = int(model.synthesizer.output_sample_rate)

    def speak(self, text: str) -> Iterator[Samples]:
        """Yield the spoken `text`, a sentence at a time."""
        for sentence in self._model.synthesizer.split_into_sentences(text):
            with self._lock:
                samples = self._model.tts(sentence, split_sentences=False)
            if len(samples):
                yield np.asarray(samples, np.float32)


def load_voice(name: str) -> Voice:
    """Return the voice `name`.

    Raises InputError for an unknown one, MissingExtraError or MachineError if its package or its files are not here.
    """
    kind, _, rest = name.partition(":")
    if name == "hibari":
        return _load_hibari()
    if kind == "kokoro":
        folder, _, speaker = rest.partition("@")
        return _load_kokoro(folder, speaker or KOKORO_SPEAKER)
    if kind == "coqui" or name.startswith("tts_models/"):
        return _load_coqui(name, Path(rest) if rest else None)
    raise InputError(f"--voice {name} is not known; there are: {KNOWN}")


def _load_hibari() -> Voice:
    packaged_voice()
    try:
        from hibari import Hibari
    except ImportError as error:
        raise MissingExtraError("hibari-tts", "speech") from error
    return HibariVoice(Hibari(threads=1))


def _load_kokoro(folder: str, speaker: str) -> Voice:
    if not folder:
        raise InputError("--voice kokoro needs its files: kokoro:FOLDER, with kokoro*.onnx and voices*.bin in it")
    models, voices = sorted(Path(folder).glob("*.onnx")), sorted(Path(folder).glob("voices*.bin"))
    if not models or not voices:
        raise InputError(
            f"--voice kokoro:{folder} has no *.onnx and voices*.bin in it; both come with Kokoro's releases"
        )
    try:
        from kokoro_onnx import Kokoro
    except ImportError as error:
        raise MachineError(
            "kokoro-onnx is not installed; pip install kokoro-onnx (it brings a phonemiser under the GPL)"
        ) from error
    try:
        model = Kokoro(str(models[0]), str(voices[0]))
    # The errors of onnxruntime and numpy's files have nothing narrower in common.
    except Exception as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MachineError(f"cannot load the voice kokoro:{folder}: {why}; the packaged one is hibari") from error
    if speaker not in model.get_voices():
        raise InputError(f"--voice kokoro has no speaker {speaker}; there are: {', '.join(model.get_voices())}")
    return KokoroVoice(model, speaker)


def _load_coqui(name: str, folder: Path | None) -> Voice:
    checkpoint, config = (_only(folder, "*.pth"), folder / "config.json") if folder else (None, None)
    if config is not None and not config.is_file():
        raise InputError(f"--voice {name} has no config.json in it; name the folder of a Coqui model")
    try:
        from TTS.api import TTS
    except ImportError as error:
        raise MachineError("coqui-tts is not installed; pip install 'coqui-tts[cpu,codec]'") from error
    except OSError as error:  # torchaudio made for another torch
        why = str(error).splitlines()[0]
        raise MachineError(f"coqui-tts cannot be loaded: {why}; torchaudio must be of torch's own kind") from error
    try:
        if checkpoint is not None:
            model = TTS(model_path=str(checkpoint), config_path=str(config), progress_bar=False)
        else:
            model = TTS(COQUI_MODEL if name == "coqui" else name, progress_bar=False)
    except (OSError, ValueError, KeyError, RuntimeError, pickle.UnpicklingError) as error:
        why = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MachineError(f"cannot load the voice {name}: {why}; the packaged one is hibari") from error
    return CoquiVoice(name, model)


def _only(folder: Path, pattern: str) -> Path:
    """Return the model file in `folder`, the best one where training left several."""
    found = sorted(folder.glob(pattern), key=lambda path: (not path.name.startswith("best_model"), path.name))
    if not found:
        raise InputError(f"--voice coqui:{folder} has no {pattern} in it; name the folder of a Coqui model")
    return found[0]
