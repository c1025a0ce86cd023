"""Audio files <-> samples: any container that FFmpeg's libraries read, to mono float32 at 16 kHz, within bounds.

    samples = decode(Path("question.webm"))
    data = encode_wav(samples, 24_000)

A file is only ever read as data: no program is started and no name reaches a shell.
"""

from __future__ import annotations

import io
import math
from pathlib import Path

import numpy as np

from lorikeet.errors import InputError, MissingExtraError
from lorikeet.speech import HEARING_HZ, Samples


def decode(data: bytes | Path, *, max_seconds: float = 300.0) -> Samples:
    """Return the audio in a file or its bytes, mono float32 at `HEARING_HZ`, in [-1, 1].

    Decoding stops at `max_seconds`, however long the file claims to be. Raises InputError for what is missing, no
    audio, empty, or longer.
    """
    try:
        import av
    except ImportError as error:
        raise MissingExtraError("av", "speech") from error
    name = data.name if isinstance(data, Path) else "the audio"
    if isinstance(data, Path):
        if not data.is_file():
            raise InputError(f"{data} is not there; give an audio file")
        data = data.read_bytes()
    most = int(max_seconds * HEARING_HZ)
    parts: list[Samples] = []
    total = 0
    try:
        with av.open(io.BytesIO(data), mode="r", metadata_errors="ignore") as container:
            if not container.streams.audio:
                raise InputError(f"{name} holds no sound; give a WAV, FLAC, MP3, OGG or WebM file")
            # The channels stay apart here: FFmpeg's own mix to mono makes equal channels 3 dB louder.
            resampler = av.AudioResampler(format="fltp", rate=HEARING_HZ)
            for frame in container.decode(container.streams.audio[0]):
                for resampled in resampler.resample(frame):
                    parts.append(resampled.to_ndarray().mean(axis=0))
                    total += parts[-1].size
                if total > most:
                    raise InputError(f"{name} is longer than {max_seconds:g} seconds; give a shorter one")
            parts += [resampled.to_ndarray().mean(axis=0) for resampled in resampler.resample(None)]
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{name} is not an audio file that can be read; give a WAV, FLAC, MP3, OGG or WebM file"
        ) from error
    if not sum(part.size for part in parts):
        raise InputError(f"{name} is empty; record something first")
    samples = np.concatenate(parts).astype(np.float32, copy=False)
    return np.clip(np.nan_to_num(samples), -1.0, 1.0)


def encode_wav(samples: Samples, sample_rate_hz: int) -> bytes:
    """Return `samples` as a 16-bit mono WAV file."""
    import wave

    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes((np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes())
    return target.getvalue()


def level_db(samples: Samples) -> float:
    """Return the level of `samples` in decibels below full scale, from their root mean square; -inf for silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return 10 * math.log10(power) if power > 0 else -math.inf
