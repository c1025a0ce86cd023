"""Audio files as they are spoken: every format is decoded again, and another speed keeps the pitch."""

from __future__ import annotations

import numpy as np
import pytest

from lorikeet.speech import HEARING_HZ, Samples
from lorikeet.speech.audio import decode, decode_pcm16, resample
from lorikeet.speech.encode import ENCODED_HZ, FORMATS, change_speed, encode


def tone(seconds: float, rate_hz: int = ENCODED_HZ) -> Samples:
    return (0.3 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def pitch_hz(samples: Samples, rate_hz: int) -> float:
    return float(np.abs(np.fft.rfft(samples)).argmax() * rate_hz / samples.size)


@pytest.mark.parametrize("rate_hz", [24_000, 22_050])
@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_heard_again(name: str, rate_hz: int) -> None:
    pieces = list(encode(np.array_split(tone(2.0, rate_hz), 4), rate_hz, name))
    data = b"".join(pieces)
    heard = resample(decode_pcm16(data), ENCODED_HZ, HEARING_HZ) if name == "pcm" else decode(data)
    assert heard.size / HEARING_HZ == pytest.approx(2.0, abs=0.08)
    assert pitch_hz(heard, HEARING_HZ) == pytest.approx(440, abs=2)
    assert np.abs(heard).max() == pytest.approx(0.3, abs=0.05)


@pytest.mark.parametrize("name", FORMATS)
def test_the_first_bytes_do_not_wait_for_the_last_words(name: str) -> None:
    asked = 0

    def speak() -> object:
        nonlocal asked
        for part in np.array_split(tone(4.0), 4):
            asked += 1
            yield part

    pieces = encode(speak(), ENCODED_HZ, name)  # type: ignore[arg-type]
    got = b""
    while len(got) < 500:
        got += next(pieces)
    assert asked == 1


@pytest.mark.parametrize("speed", [0.25, 0.5, 0.8, 1.0, 1.7, 3.0, 4.0])
def test_another_speed_keeps_the_pitch(speed: float) -> None:
    changed = np.concatenate(list(change_speed(np.array_split(tone(2.0), 5), ENCODED_HZ, speed)))
    assert changed.size / ENCODED_HZ * speed == pytest.approx(2.0, rel=0.04)
    assert pitch_hz(changed, ENCODED_HZ) == pytest.approx(440, abs=2)
