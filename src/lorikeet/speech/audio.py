"""Audio files <-> samples: any container that FFmpeg's libraries read, to mono float32 at 16 kHz, within bounds.

    samples = decode(Path("question.webm"))
    data = encode_wav(samples, 24_000)

A file is only ever read as data: no program is started and no name reaches a shell.
"""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.errors import InputError, MissingExtraError
from lorikeet.speech import HEARING_HZ, Samples

CONTAINERS = "wav,w64,aiff,au,caf,flac,mp3,aac,ac3,amr,ogg,mov,mp4,matroska,webm,avi,mpeg,mpegts"
"""What is opened, by FFmpeg's names. Others (concat, hls, dash, sdp, ...) name further files, or listen to the network."""


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
    parts: list[Samples] = []
    total_s = 0.0
    try:
        options = {"format_whitelist": CONTAINERS}
        with av.open(io.BytesIO(data), mode="r", metadata_errors="ignore", options=options) as container:
            if not container.streams.audio:
                raise InputError(f"{name} holds no sound; give a WAV, FLAC, MP3, OGG or WebM file")
            # The channels stay apart here: FFmpeg's own mix to mono makes equal channels 3 dB louder. They stay in one
            # plane: where each has its own, PyAV looks for the end of a list that from 8 channels on has none, and crashes.
            resampler = av.AudioResampler(format="flt", rate=HEARING_HZ)
            for frame in container.decode(container.streams.audio[0]):
                # Asked before it is resampled: at 1 Hz, a few bytes are an hour.
                total_s += frame.samples / max(1, frame.sample_rate)
                if total_s > max_seconds:
                    raise InputError(f"{name} is longer than {max_seconds:g} seconds; give a shorter one")
                parts += map(_mixed, resampler.resample(frame))
            parts += map(_mixed, resampler.resample(None))
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise InputError(
            f"{name} is not an audio file that can be read; give a WAV, FLAC, MP3, OGG or WebM file"
        ) from error
    if not sum(part.size for part in parts):
        raise InputError(f"{name} is empty; record something first")
    samples = np.concatenate(parts).astype(np.float32, copy=False)
    return np.clip(np.nan_to_num(samples), -1.0, 1.0)


def _mixed(frame: Any) -> Samples:
    """Return the mean of a frame's channels, which alternate in its one plane."""
    mixed: Samples = frame.to_ndarray().reshape(-1, frame.layout.nb_channels).mean(axis=1)
    return mixed


class Resampler:
    """Turns a stream of mono audio at one rate into one at another, piece by piece, without seams."""

    def __init__(self, from_hz: int, to_hz: int) -> None:
        """Begin a stream. Raises MissingExtraError without av."""
        try:
            import av
        except ImportError as error:
            raise MissingExtraError("av", "speech") from error
        self._from_hz, self._to_hz = from_hz, to_hz
        self._frame: Any = av.AudioFrame
        self._resampler = av.AudioResampler(format="flt", layout="mono", rate=to_hz) if from_hz != to_hz else None

    def feed(self, samples: Samples) -> Samples:
        """Return what the stream gives once it has `samples`; the last millisecond or so comes with the next piece."""
        if self._resampler is None or not samples.size:
            return samples
        frame = self._frame.from_ndarray(samples.reshape(1, -1), format="flt", layout="mono")
        frame.sample_rate = self._from_hz
        return self._joined(self._resampler.resample(frame))

    def flush(self) -> Samples:
        """Return the rest of the stream, which ends."""
        return self._joined(self._resampler.resample(None)) if self._resampler else np.zeros(0, np.float32)

    def _joined(self, frames: list[Any]) -> Samples:
        parts = [frame.to_ndarray().reshape(-1) for frame in frames]
        return np.concatenate(parts).astype(np.float32, copy=False) if parts else np.zeros(0, np.float32)


def resample(samples: Samples, from_hz: int, to_hz: int) -> Samples:
    """Return a whole recording at another rate."""
    resampler = Resampler(from_hz, to_hz)
    return np.concatenate([resampler.feed(samples), resampler.flush()])


def decode_pcm16(data: bytes) -> Samples:
    """Return little-endian 16-bit mono samples as float32. Raises InputError for half a sample."""
    if len(data) % 2:
        raise InputError("the audio ends in the middle of a sample; pcm16 has two bytes a sample")
    return np.frombuffer(data, "<i2").astype(np.float32) / 32768.0


def encode_pcm16(samples: Samples) -> bytes:
    """Return `samples` as little-endian 16-bit integers."""
    return (np.clip(samples, -1.0, 1.0) * 32767.0).round().astype("<i2").tobytes()


def trim_start(samples: Samples, sample_rate_hz: int, *, audible: float = 0.003) -> Samples:
    """Return `samples` without the silence before the first audible one, but for ten milliseconds of it."""
    loud = np.flatnonzero(np.abs(samples) > audible)
    return samples[max(0, int(loud[0]) - sample_rate_hz // 100) :] if loud.size else samples[:0]


def encode_wav(samples: Samples, sample_rate_hz: int) -> bytes:
    """Return `samples` as a 16-bit mono WAV file."""
    import wave

    target = io.BytesIO()
    with wave.open(target, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(sample_rate_hz)
        file.writeframes(encode_pcm16(samples))
    return target.getvalue()


def level_db(samples: Samples) -> float:
    """Return the level of `samples` in decibels below full scale, from their root mean square; -inf for silence."""
    power = float(np.mean(np.square(samples, dtype=np.float64))) if samples.size else 0.0
    return 10 * math.log10(power) if power > 0 else -math.inf
