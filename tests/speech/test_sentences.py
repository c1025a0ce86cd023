"""A turn of several sentences is heard to its last word: Whisper leaves a last sentence open, often cut off."""

from __future__ import annotations

import numpy as np
import pytest

from lorikeet.speech import HEARING_HZ
from lorikeet.speech.audio import resample
from lorikeet.speech.hear import _last_closed, load_ears
from lorikeet.speech.speak import load_voice

ZERO = 100


@pytest.mark.parametrize(
    ("tokens", "expected"),
    [
        ([ZERO, 1, 2, ZERO + 50], (0, 0.0)),  # one sentence, closed
        ([ZERO, 1, 2, ZERO + 50, ZERO + 60, 3, 4], (4, 1.2)),  # the second is open: to be heard from 1.2 s on
        ([ZERO, 1, 2, ZERO + 50, ZERO + 50, 3, ZERO + 90], (0, 0.0)),
        ([ZERO, 1, 2], (0, 0.0)),  # open from the start: the same sound would be heard again
        ([1, 2], (0, 0.0)),
        ([], (0, 0.0)),
    ],
)
def test_what_is_left_open(tokens: list[int], expected: tuple[int, float]) -> None:
    assert _last_closed(tokens, zero=ZERO) == (expected[0], pytest.approx(expected[1]))


@pytest.mark.parametrize(
    ("text", "last"),
    [
        ("You're right, and I'm sorry to hear that. What's your name?", "your name?"),
        ("No, it's a good idea to tell him. He can't just walk in without telling him.", "without telling him."),
        ("The bus company will take it, and the traffic will be light.", "be light."),
    ],
)
def test_the_last_words_are_heard(text: str, last: str) -> None:
    voice, ears = load_voice("hibari"), load_ears("whisper-tiny.en")
    sound = resample(np.concatenate(list(voice.speak(text))), voice.sample_rate_hz, HEARING_HZ)
    assert ears.transcribe(sound).text.endswith(last)
