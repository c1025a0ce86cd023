"""Samples -> audio files, while they are spoken: WAV, FLAC, Opus, MP3, AAC, or bare samples; slower or faster.

    for data in encode(change_speed(voice.speak(text), voice.sample_rate_hz, 1.5), voice.sample_rate_hz, "mp3"):
        send(data)

Everything is mono at 24 kHz. A file goes out in one pass, so its header says that the length is unknown. Files are read in
`audio`.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np

from lorikeet.errors import MissingExtraError
from lorikeet.speech import Samples
from lorikeet.speech.audio import Resampler, encode_pcm16

ENCODED_HZ = 24_000
"""What OpenAI's `pcm` is, what the packaged voice speaks, and a rate that every encoder here takes."""

SLOWEST, FASTEST = 0.25, 4.0
_UNKNOWN_BYTES = 0xFFFFFFFF
_BITS_PER_S = 64_000
"""Of MP3, Opus and AAC: speech in mono needs no more."""


@dataclass(frozen=True, slots=True)
class _Format:
    """How FFmpeg writes a format."""

    media_type: str
    container: str = ""
    codec: str = ""
    options: dict[str, str] = field(default_factory=dict)
    lossy: bool = True


_FORMATS = {
    "mp3": _Format("audio/mpeg", "mp3", "libmp3lame", {"write_xing": "0", "id3v2_version": "0"}),
    "opus": _Format("audio/ogg", "ogg", "libopus", {"page_duration": "100000"}),
    "aac": _Format("audio/aac", "adts", "aac"),
    "flac": _Format("audio/flac", "flac", "flac", lossy=False),
    "wav": _Format("audio/wav"),
    "pcm": _Format("audio/pcm"),
}
FORMATS = tuple(_FORMATS)
"""The names of what `encode` writes, as OpenAI's API names them; the first is its default."""


def media_type(name: str) -> str:
    """Return the Content-Type of the format `name`."""
    return _FORMATS[name].media_type


def encode(parts: Iterable[Samples], sample_rate_hz: int, name: str) -> Iterator[bytes]:
    """Yield the file of the format `name` in pieces, each as soon as the samples for it are there."""
    resampled = _resample(parts, sample_rate_hz)
    if name in {"pcm", "wav"}:
        if name == "wav":
            yield _wav_header()
        for part in resampled:
            yield encode_pcm16(part)
        return
    yield from _encode_av(resampled, _FORMATS[name])


def change_speed(parts: Iterable[Samples], sample_rate_hz: int, speed: float) -> Iterator[Samples]:
    """Yield speech that is `speed` times as fast, at its own pitch (FFmpeg's `atempo`, which overlaps and adds)."""
    if speed == 1.0:
        yield from parts
        return
    av = _av()
    graph = av.filter.Graph()
    chain = [graph.add_abuffer(format="flt", sample_rate=sample_rate_hz, layout="mono")]
    # One filter does not go below half, and beyond twice it leaves samples out: such a change is made in two steps.
    steps = [speed] if 0.5 <= speed <= 2 else [speed**0.5] * 2
    chain += [graph.add("atempo", repr(float(step))) for step in steps]
    chain += [graph.add("aformat", "sample_fmts=flt"), graph.add("abuffersink")]
    for before, after in pairwise(chain):
        before.link_to(after)
    graph.configure()
    for frame in _frames(av, parts, sample_rate_hz):
        graph.push(frame)
        yield from _pull(av, graph)
    graph.push(None)
    yield from _pull(av, graph)


def _encode_av(parts: Iterable[Samples], form: _Format) -> Iterator[bytes]:
    av = _av()
    sink = _Sink()
    container = av.open(sink, "w", format=form.container, options={**form.options, "flush_packets": "1"})
    with container:
        stream = container.add_stream(form.codec, rate=ENCODED_HZ, layout="mono")
        if form.lossy:
            stream.bit_rate = _BITS_PER_S
        for frame in _frames(av, parts, ENCODED_HZ):
            for packet in stream.encode(frame):
                container.mux(packet)
            if data := sink.take():
                yield data
        for packet in stream.encode(None):
            container.mux(packet)
    yield sink.take()


class _Sink:
    """What FFmpeg writes to; it cannot be rewound."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []

    def write(self, data: bytes) -> int:
        """Keep what was written."""
        self._pieces.append(bytes(data))
        return len(data)

    def take(self) -> bytes:
        """Return what was written since the last time."""
        data, self._pieces = b"".join(self._pieces), []
        return data


def _frames(av: Any, parts: Iterable[Samples], sample_rate_hz: int) -> Iterator[Any]:
    position = 0
    for part in parts:
        if not part.size:
            continue
        frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(part).reshape(1, -1), format="flt", layout="mono")
        frame.sample_rate = sample_rate_hz
        frame.pts = position
        position += part.size
        yield frame


def _pull(av: Any, graph: Any) -> Iterator[Samples]:
    while True:
        try:
            samples: Samples = graph.pull().to_ndarray().reshape(-1)
        except (av.error.BlockingIOError, av.error.EOFError):
            return
        yield samples


def _resample(parts: Iterable[Samples], sample_rate_hz: int) -> Iterator[Samples]:
    resampler = Resampler(sample_rate_hz, ENCODED_HZ)
    for part in parts:
        yield resampler.feed(part)
    yield resampler.flush()


def _wav_header() -> bytes:
    """Return the header of a 16-bit mono WAV file whose length is not known."""
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, 1, ENCODED_HZ, 2 * ENCODED_HZ, 2, 16)
    head = struct.pack("<4sI4s", b"RIFF", _UNKNOWN_BYTES, b"WAVE")
    return head + form + struct.pack("<4sI", b"data", _UNKNOWN_BYTES)


def _av() -> Any:
    try:
        import av
        import av.filter
    except ImportError as error:
        raise MissingExtraError("av", "speech") from error
    return av
