"""Turns from probabilities alone: the audio's own clock, no model and no thread."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from lorikeet.serve.voice.items import Item
from lorikeet.serve.voice.recording import Recording
from lorikeet.serve.voice.turn import (
    Ended,
    Paused,
    Resumed,
    Started,
    TurnEvent,
    TurnSettings,
    TurnTaker,
    sounds_finished,
)
from lorikeet.speech import HEARING_HZ
from lorikeet.speech.audio import decode
from lorikeet.speech.vad import FRAME_MS, FRAME_SAMPLES, load_vad

SETTINGS = TurnSettings(silence_duration_ms=416, unfinished_factor=2.0, pause_ms=128, start_ms=64, reopen_ms=1200)


def events(*stretches: tuple[float, int], taker: TurnTaker | None = None, finished: bool = True) -> list[TurnEvent]:
    """Return the events of stretches of (probability, milliseconds); each pause is judged at once."""
    taker = taker or TurnTaker(SETTINGS)
    found = []
    for probability, ms in stretches:
        for _ in range(round(ms / FRAME_MS)):
            new = taker.hear(probability)
            if any(isinstance(event, Paused) for event in new):
                taker.judge(finished=finished)
            found += new
    return found


def test_a_sentence_begins_pauses_and_ends() -> None:
    assert events((0, 640), (0.9, 1600), (0, 640)) == [
        Started(640 - 300, reopens=False),
        Paused(2240),
        Ended(2240, 2240 + 416),
    ]


def test_a_click_is_no_turn() -> None:
    assert events((0, 320), (0.9, 32), (0, 320), (0.9, 32), (0, 960)) == []


def test_a_short_pause_is_prepared_for_and_taken_back() -> None:
    found = events((0.9, 960), (0, 320), (0.9, 640), (0, 640))
    assert [type(event) for event in found] == [Started, Paused, Resumed, Paused, Ended]


def test_a_sentence_that_is_not_finished_may_pause_for_600_ms() -> None:
    found = events((0.9, 960), (0, 600), (0.9, 640), (0, 1000), finished=False)
    assert [type(event) for event in found] == [Started, Paused, Resumed, Paused, Ended]
    assert found[-1] == Ended(960 + 608 + 640, 960 + 608 + 640 + 832)


def test_who_goes_on_after_the_end_goes_on_with_the_same_turn() -> None:
    found = events((0.9, 960), (0, 608), (0.9, 640), (0, 640))
    assert [type(event) for event in found] == [Started, Paused, Ended, Started, Paused, Ended]
    assert found[3] == Started(960 + 608 - 300, reopens=True)
    later = events((0.9, 960), (0, 1600), (0.9, 640))
    assert later[-1] == Started(960 + 1600 - 300, reopens=False)


def test_speech_wavers_between_the_two_thresholds() -> None:
    assert [type(event) for event in events((0.9, 320), (0.4, 640), (0.9, 320))] == [Started]
    assert events((0.4, 2000)) == []


def test_a_forgotten_turn_does_not_end() -> None:
    taker = TurnTaker(SETTINGS)
    events((0.9, 960), (0, 200), taker=taker)
    taker.reset()
    assert events((0, 2000), taker=taker) == []
    assert events((0.9, 96), taker=taker)[0].reopens is False  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("What time is it?", True),
        ("Sunday is the best part of the week.", True),
        ("And so, my fellow Americans,", False),
        ("I would like to go to the...", False),
        ("I went to the store and.", False),
        ("Tell me about", False),
        ("", False),
        ('He said "yes."', True),
    ],
)
def test_a_sentence_that_hangs_in_the_air_is_known_by_its_words(text: str, finished: bool) -> None:
    assert sounds_finished(text) is finished


@pytest.mark.parametrize(
    ("heard_ms", "kept"),
    [(0, ""), (500, "One two"), (999, "One two three"), (1000, "One two three four."), (1500, "One two three four. Five"), (9000, "One two three four. Five six.")],
)  # fmt: skip
def test_of_an_interrupted_answer_the_words_that_were_heard_stay(heard_ms: float, kept: str) -> None:
    item = Item("a", "assistant", "output_audio", clauses=[("One two three four. ", 1000.0), ("Five six.", 1000.0)])
    assert item.heard_text(heard_ms) == kept


def test_a_recording_keeps_its_places_when_old_audio_goes() -> None:
    recording = Recording()
    recording.append(np.arange(4 * HEARING_HZ, dtype=np.float32))
    recording.forget_before(2000)
    assert recording.end == 4 * HEARING_HZ
    assert recording.cut(3000, 3001).tolist() == list(range(48_000, 48_016))
    assert recording.cut(0).size == 2 * HEARING_HZ


@pytest.mark.parametrize("kind", ["silence", "hiss", "loud hiss", "hum", "tone", "clicks", "claps"])
def test_silence_and_noise_begin_no_turn(kind: str) -> None:
    generator = np.random.default_rng(0)
    time_s = np.arange(6 * HEARING_HZ) / HEARING_HZ
    claps = np.tile(np.exp(-np.arange(HEARING_HZ) / 800) * generator.normal(0, 0.5, HEARING_HZ), 6)
    sounds = {
        "silence": np.zeros(time_s.size),
        "hiss": generator.normal(0, 0.01, time_s.size),
        "loud hiss": generator.normal(0, 0.2, time_s.size),
        "hum": 0.3 * np.sin(2 * np.pi * 50 * time_s),
        "tone": 0.3 * np.sin(2 * np.pi * 440 * time_s),
        "clicks": (generator.random(time_s.size) < 0.0005) * 0.8,
        "claps": claps,
    }
    samples = np.clip(sounds[kind], -1, 1).astype(np.float32)
    taker = TurnTaker(TurnSettings())
    assert [e for p in load_vad().stream().feed_all(samples) for e in taker.hear(float(p))] == []


def test_people_are_noticed_within_a_fifth_of_a_second(shared: Path) -> None:
    late = []
    for line in (shared / "speech" / "clips.jsonl").read_text().splitlines():
        samples = decode(shared / "speech" / json.loads(line)["file"])
        speech = np.flatnonzero(load_vad().voiced_frames(samples))[0] * FRAME_MS
        taker, stream = TurnTaker(TurnSettings()), load_vad().stream()
        for place in range(0, samples.size - FRAME_SAMPLES, FRAME_SAMPLES):
            if taker.hear(stream.feed(samples[place : place + FRAME_SAMPLES])):
                late.append(taker.heard_ms - speech)
                break
    assert len(late) == 11
    assert max(late) <= 200
