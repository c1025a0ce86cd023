"""Audio in any container, words that survive a round trip, and what is never read aloud."""

from __future__ import annotations

import io
import json
import random
import re
import subprocess
import sys
import time
import types
import wave
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from lorikeet.errors import InputError, LorikeetError, MachineError
from lorikeet.speech import HEARING_HZ
from lorikeet.speech.audio import (
    Resampler,
    decode,
    decode_pcm16,
    encode_pcm16,
    encode_wav,
    level_db,
    resample,
    trim_start,
)
from lorikeet.speech.hear import WhisperEars, cut_repetition, load_ears
from lorikeet.speech.sayable import sayable
from lorikeet.speech.speak import load_voice
from lorikeet.speech.vad import FRAME_SAMPLES, load_vad


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


@pytest.mark.parametrize("channels", [1, 6, 8, 9, 64])
def test_many_channels_become_their_mean(channels: int) -> None:
    data = io.BytesIO()
    with wave.open(data, "wb") as file:
        file.setnchannels(channels)
        file.setsampwidth(2)
        file.setframerate(HEARING_HZ)
        first = np.zeros((HEARING_HZ, channels), np.float32)
        first[:, 0] = tone(1.0)
        file.writeframes((first * 32767).astype("<i2").tobytes())
    assert np.abs(decode(data.getvalue()) - tone(1.0) / channels).max() < 1e-3


@pytest.mark.parametrize(
    "data", [b"", b"this is text, not sound", b"RIFF\0\0\0\0WAVE", b"\0" * 1000, b"OggS" + b"\xff" * 200]
)
def test_what_is_no_audio_is_one_line(data: bytes, tmp_path: Path) -> None:
    path = tmp_path / "note.wav"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"note.wav (is not an audio file|is empty|holds no sound)"):
        decode(path)


@pytest.mark.parametrize(
    "text",
    [
        "ffconcat version 1.0\nfile secret.wav\n",
        "v=0\no=- 0 0 IN IP4 127.0.0.1\ns=x\nc=IN IP4 127.0.0.1\nm=audio 5004 RTP/AVP 0\n",
        "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.wav\n#EXT-X-ENDLIST\n",
    ],
    ids=["concat", "sdp", "hls"],
)
def test_a_file_that_points_elsewhere_is_not_followed(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret.wav").write_bytes(encode_wav(tone(1.0), HEARING_HZ))
    monkeypatch.chdir(tmp_path)
    began_s = time.monotonic()
    with pytest.raises(InputError, match="is not an audio file"):
        decode(text.encode())
    assert time.monotonic() - began_s < 3, "it waited for the network"


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


def test_a_long_recording_lets_a_turn_go_between_two_windows() -> None:
    ears = load_ears("whisper-tiny.en")
    assert isinstance(ears, WhisperEars)
    locked = []

    def windows() -> Iterator[str]:
        for window in ("one", "two"):
            locked.append(ears._lock.locked())
            yield window

    taken = [(window, ears._lock.locked()) for window in ears._take(windows())]
    assert locked == [True, True]
    assert taken == [("one", False), ("two", False)]


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


def test_a_recording_at_another_rate_has_no_seams() -> None:
    whole = tone(1.0, 24_000)
    stream = Resampler(24_000, HEARING_HZ)
    pieces = np.concatenate([*(stream.feed(whole[at : at + 480]) for at in range(0, 24_000, 480)), stream.flush()])
    assert pieces.size == HEARING_HZ
    assert np.abs(pieces[200:-200] - tone(1.0)[200:-200]).max() < 1e-3
    assert np.array_equal(pieces, resample(whole, 24_000, HEARING_HZ))


def test_pcm_there_and_back() -> None:
    samples = decode_pcm16(encode_pcm16(tone(0.1)))
    assert np.abs(samples - tone(0.1)).max() < 1e-3
    with pytest.raises(InputError, match="middle of a sample"):
        decode_pcm16(b"\0\0\0")


def test_silence_before_a_sound_is_cut() -> None:
    sound = np.concatenate([np.zeros(8000, np.float32), tone(0.1)])
    assert trim_start(sound, HEARING_HZ).size == tone(0.1).size + HEARING_HZ // 100 - 1
    assert trim_start(np.zeros(100, np.float32), HEARING_HZ).size == 0


def test_the_detector_hears_live_what_it_hears_in_a_recording() -> None:
    voice = load_voice("hibari")
    said = trim_start(np.concatenate(list(voice.speak("Hello there, how are you?"))), 24_000, audible=0.02)
    speech = resample(said, 24_000, HEARING_HZ)
    samples = np.concatenate([np.zeros(16_000, np.float32), speech, np.zeros(16_000, np.float32)])
    samples = samples[: samples.size // FRAME_SAMPLES * FRAME_SAMPLES]
    stream = load_vad().stream()
    live = np.array([stream.feed(frame) for frame in samples.reshape(-1, FRAME_SAMPLES)])
    whole = load_vad().stream().feed_all(samples)
    assert np.allclose(live, whole, atol=1e-3)
    voiced = np.flatnonzero(whole >= 0.5) * FRAME_SAMPLES
    assert abs(int(voiced[0]) - 16_000) < 4000
    assert int(voiced[-1]) < 16_000 + speech.size + 2000


def test_hearing_needs_no_torch() -> None:
    code = (
        "import sys, numpy as np\nfrom lorikeet.speech.hear import load_ears\n"
        "load_ears('whisper-tiny.en').transcribe(np.random.default_rng(0).normal(0, .1, 32000).astype(np.float32))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_a_draft_is_as_good_as_the_full_window_and_noise_is_dropped_by_both(shared: Path) -> None:
    ears = load_ears("whisper-tiny.en")
    assert isinstance(ears, WhisperEars)
    wrong = {"draft": 0, "whole": 0}
    drafts = total = 0
    for line in (shared / "speech" / "clips.jsonl").read_text().splitlines():
        clip = json.loads(line)
        said = words(clip["text"].replace("ten", "10").replace("mister", "mr"))
        speech, speech_s = ears._find_speech(decode(shared / "speech" / clip["file"]))
        draft = ears._draft(speech, speech_s)
        drafts += draft is not None
        wrong["draft"] += errors(said, words(draft or ears._hear_whole(speech)))
        wrong["whole"] += errors(said, words(ears._hear_whole(speech)))
        total += len(said)
    assert drafts >= 10, "the short window is hardly ever enough"
    assert wrong["draft"] / total < 0.08
    assert wrong["draft"] <= wrong["whole"] + 3


def errors(said: list[str], heard: list[str]) -> int:
    """Return the word edit distance."""
    row = list(range(len(heard) + 1))
    for i, word in enumerate(said, 1):
        before, row[0] = row[0], i
        for j, other in enumerate(heard, 1):
            before, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, before + (word != other))
    return row[-1]


@pytest.mark.parametrize(
    ("text", "once"),
    [
        ("A thin stripe. A thin stripe. A thin", "A thin stripe."),
        ("Go on. Go on. Go on.", "Go on."),
        ("no, no, it is fine", "no, no, it is fine"),
        ("clubs clubs clubs clubs", "clubs"),
        ("ask not what you can do, ask what you can do", "ask not what you can do, ask what you can do"),
        ("", ""),
    ],
)
def test_what_is_said_over_and_over_is_kept_once(text: str, once: str) -> None:
    assert cut_repetition(text) == once


def test_a_draft_that_is_cut_off_or_unsure_is_heard_again_in_the_full_window() -> None:
    ears = load_ears("whisper-tiny.en")
    assert isinstance(ears, WhisperEars)
    voice = load_voice("hibari")
    speech = resample(np.concatenate(list(voice.speak("The garden is quiet in the morning."))), 24_000, HEARING_HZ)
    # So little speech for so many words: the draft is hurried, and not by repeating itself.
    assert ears._draft(speech, 0.3) is None
    assert words(ears._draft(speech, 2.0) or "") == words("The garden is quiet in the morning")


@pytest.mark.parametrize("kind", ["hiss", "loud hiss", "hum", "chord", "clicks", "sweep", "whisper of hiss"])
def test_noises_give_no_words(kind: str) -> None:
    generator = np.random.default_rng(4)
    time_s = np.arange(4 * HEARING_HZ) / HEARING_HZ
    sounds = {
        "hiss": generator.normal(0, 0.05, time_s.size),
        "loud hiss": generator.normal(0, 0.3, time_s.size),
        "hum": 0.3 * np.sin(2 * np.pi * 50 * time_s),
        "chord": 0.1 * sum(np.sin(2 * np.pi * hz * time_s) for hz in (262, 330, 392)),
        "clicks": (generator.random(time_s.size) < 0.0005) * 0.8,
        "sweep": 0.3 * np.sin(2 * np.pi * (200 + 300 * time_s) * time_s),
        "whisper of hiss": generator.normal(0, 0.003, time_s.size),
    }
    samples = np.clip(sounds[kind], -1, 1).astype(np.float32)
    assert load_ears("whisper-tiny.en").transcribe(samples).text == ""


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("kokoro", "needs its files: kokoro:FOLDER"),
        ("kokoro:/nowhere", r"has no \*.onnx and voices\*.bin"),
        ("coqui:/nowhere", r"has no \*.pth in it"),
        ("zeus", "there are: hibari .packaged., kokoro:FOLDER.*pip install kokoro-onnx.*coqui"),
    ],
)
def test_voices_that_a_user_installs_say_what_they_need(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        load_voice(name)


@pytest.mark.parametrize(("package", "name"), [("kokoro_onnx", "kokoro:{folder}"), ("TTS", "coqui")])
def test_a_voice_whose_package_is_not_installed_says_how_to_get_it(
    package: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.setitem(sys.modules, f"{package}.api", None)
    for file in ("kokoro.onnx", "voices.bin"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(MachineError, match=r"is not installed.*pip install"):
        load_voice(name.format(folder=tmp_path))


class StandInKokoro:
    """What `kokoro_onnx.Kokoro` offers, with a tone for a voice."""

    asked: ClassVar[list[tuple[str, str, str]]] = []

    def __init__(self, model_path: str, voices_path: str) -> None:
        assert Path(model_path).name == "kokoro.onnx"
        assert Path(voices_path).name == "voices.bin"

    def get_voices(self) -> list[str]:
        return ["af_heart", "bm_george"]

    def create(self, text: str, voice: str, *, lang: str) -> tuple[np.ndarray, int]:
        self.asked.append((text, voice, lang))
        return tone(0.5, 24_000).astype(np.float64), 24_000


def test_kokoro_speaks_with_the_speaker_that_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("kokoro_onnx")
    module.Kokoro = StandInKokoro  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kokoro_onnx", module)
    for file in ("kokoro.onnx", "voices.bin"):
        (tmp_path / file).write_bytes(b"")
    voice = load_voice(f"kokoro:{tmp_path}@bm_george")
    (samples,) = voice.speak("Good evening.")
    assert (samples.dtype, samples.size, voice.sample_rate_hz) == (np.float32, 12_000, 24_000)
    assert list(voice.speak(" ")) == []
    assert load_voice(f"kokoro:{tmp_path}").name == "kokoro@af_heart"
    assert StandInKokoro.asked == [("Good evening.", "bm_george", "en-gb")]
    with pytest.raises(InputError, match="no speaker zeus; there are: af_heart, bm_george"):
        load_voice(f"kokoro:{tmp_path}@zeus")


def test_a_broken_voice_of_kokoro_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class InvalidProtobuf(Exception):
        """As onnxruntime has it: of no class but Exception."""

    def load(model_path: str, voices_path: str) -> None:
        raise InvalidProtobuf(f"Load model from {model_path} failed:\nProtobuf parsing failed.")

    module = types.ModuleType("kokoro_onnx")
    module.Kokoro = load  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "kokoro_onnx", module)
    for file in ("kokoro.onnx", "voices.bin"):
        (tmp_path / file).write_bytes(b"")
    with pytest.raises(MachineError, match=r"^cannot load the voice kokoro:.*failed:; the packaged one is hibari$"):
        load_voice(f"kokoro:{tmp_path}")
