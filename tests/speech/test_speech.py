"""Audio in any container, words that survive a round trip, and what is never read aloud."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import numpy as np
import pytest

from lorikeet.errors import InputError, LorikeetError
from lorikeet.speech import HEARING_HZ
from lorikeet.speech.audio import decode, encode_wav, level_db
from lorikeet.speech.hear import load_ears
from lorikeet.speech.sayable import sayable
from lorikeet.speech.speak import load_voice


def tone(seconds: float, rate_hz: int = HEARING_HZ) -> np.ndarray:
    return (0.5 * np.sin(2 * np.pi * 440 * np.arange(int(seconds * rate_hz)) / rate_hz)).astype(np.float32)


def words(text: str) -> list[str]:
    return re.findall(r"[a-z']+", text.lower())


def test_wav_there_and_back() -> None:
    samples = decode(encode_wav(tone(1.0), HEARING_HZ))
    assert samples.dtype == np.float32 and samples.shape == (HEARING_HZ,)
    assert np.abs(samples - tone(1.0)).max() < 1e-3


def test_rates_and_channels_become_mono_at_16_khz(tmp_path: Path) -> None:
    import av

    stereo = np.stack([tone(2.0, 44_100), tone(2.0, 44_100)])
    for name, codec in (("a.flac", "flac"), ("a.mp3", "libmp3lame"), ("a.webm", "libopus"), ("a.ogg", "libopus")):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream(codec, rate=48_000 if codec == "libopus" else 44_100)
            resampler = av.AudioResampler(format=stream.format, layout="stereo", rate=stream.rate)
            frame = av.AudioFrame.from_ndarray(stereo, format="fltp", layout="stereo")
            frame.sample_rate = 44_100
            for piece in [*resampler.resample(frame), *resampler.resample(None)]:
                container.mux(stream.encode(piece))
            container.mux(stream.encode(None))
        samples = decode(tmp_path / name)
        assert abs(samples.size / HEARING_HZ - 2.0) < 0.1, name
        assert abs(level_db(samples) - level_db(tone(2.0))) < 1.0, name


@pytest.mark.parametrize(
    "data", [b"", b"this is text, not sound", b"RIFF\0\0\0\0WAVE", b"\0" * 1000, b"OggS" + b"\xff" * 200]
)
def test_what_is_no_audio_is_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "note.wav"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"note.wav (is not an audio file|is empty|holds no sound)"):
        decode(path)


def test_a_long_file_is_refused_before_it_is_decoded_whole() -> None:
    with pytest.raises(InputError, match="longer than 2 seconds"):
        decode(encode_wav(tone(30.0), HEARING_HZ), max_seconds=2.0)


def test_hundreds_of_mangled_files_never_raise_anything_else() -> None:
    generator = random.Random(2)
    whole = encode_wav(tone(0.2), HEARING_HZ)
    for _ in range(300):
        mangled = bytearray(whole[: generator.randrange(8, len(whole))])
        for _ in range(generator.randint(1, 20)):
            mangled[generator.randrange(min(len(mangled), 60))] = generator.randrange(256)
        try:
            samples = decode(bytes(mangled))
        except LorikeetError:
            continue
        assert np.isfinite(samples).all() and np.abs(samples).max() <= 1


def test_a_spoken_sentence_is_heard_word_for_word() -> None:
    voice, ears = load_voice("hibari"), load_ears("whisper-tiny.en")
    sentence = "The garden is quiet in the morning, and the birds come to drink."
    samples = np.concatenate(list(voice.speak(sentence)))
    assert level_db(samples) > -35
    heard = ears.transcribe(decode(encode_wav(samples, voice.sample_rate_hz)))
    assert words(heard.text) == words(sentence)
    again = np.concatenate(list(voice.speak(sentence)))
    assert np.array_equal(samples, again)


def test_silence_and_noise_say_nothing() -> None:
    ears = load_ears("whisper-tiny.en")
    assert ears.transcribe(np.zeros(2 * HEARING_HZ, np.float32)).text == ""
    hiss = np.random.default_rng(0).normal(0, 0.02, 3 * HEARING_HZ).astype(np.float32)
    assert ears.transcribe(hiss).text == ""


def test_people_are_understood(shared: Path) -> None:
    ears = load_ears("whisper-tiny.en")
    clips = [json.loads(line) for line in (shared / "speech" / "clips.jsonl").read_text().splitlines()]
    clear = {"jfk.wav", "sb_spk1_snt5.wav", "sb_spk1_snt4.wav"}
    for clip in clips:
        if clip["file"] in clear:
            heard = ears.transcribe(decode(shared / "speech" / clip["file"]))
            assert words(heard.text) == words(clip["text"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Plain words.", "Plain words."),
        ("**Bold** and _so_ `on`", "Bold and so on."),
        ("# Title\n- one\n- two", "Title. one. two."),
        ("See [the page](https://a.example/x) now.", "See the page now."),
        ("It is at https://a.example/x?y=1 today.", "It is at today."),
        ("As they say [1], fine.", "As they say, fine."),
        ("Nice \U0001f600\U0001f1e9\U0001f1ea!", "Nice!"),
        ("```py\nprint(1)\n```\nDone.", "Done."),
        ("2 * 3 is six", "two times three is six."),
        ("\U0001f600", ""),
    ],
)
def test_what_is_read_aloud(text: str, said: str) -> None:
    assert sayable(text) == said


def test_unknown_names_say_what_there_is() -> None:
    with pytest.raises(InputError, match=r"--voice zeus is not known; there are: hibari"):
        load_voice("zeus")
    with pytest.raises(InputError, match=r"--ears zeus is not known; packaged is whisper-tiny.en, sizes are tiny"):
        load_ears("zeus")
