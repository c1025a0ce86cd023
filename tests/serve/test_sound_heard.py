"""The audio routes on the packaged voice and ears: what is spoken in each format is sent back and heard word for word."""

from __future__ import annotations

import io
import re
import threading
import time
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import openai
import pytest

from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.speech import HEARING_HZ, Samples
from lorikeet.speech.audio import decode, decode_pcm16, encode_wav
from lorikeet.speech.encode import ENCODED_HZ, FORMATS
from lorikeet.speech.hear import load_ears
from lorikeet.speech.speak import load_voice
from tests.serve.fakes import ScriptedEngine, served, serving

FIRST = "The garden is quiet in the morning, and the birds come to drink."
SECOND = "After lunch we walk to the river."


@pytest.fixture(scope="module")
def client() -> Iterator[openai.OpenAI]:
    assistant: Any = Assistant(ScriptedEngine())
    app = create_app(serving(assistant), ears=load_ears("whisper-tiny.en"), voice=load_voice("hibari"), page=False)
    with served(app) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)


@pytest.fixture(scope="module")
def recording(client: openai.OpenAI) -> Samples:
    """Both sentences, two seconds into the recording and a second apart."""
    parts = [np.zeros(2 * HEARING_HZ, np.float32)]
    for text in (FIRST, SECOND):
        parts += [decode(speak(client, text, response_format="flac")), np.zeros(HEARING_HZ, np.float32)]
    return np.concatenate(parts)


def speak(client: openai.OpenAI, text: str, **options: Any) -> bytes:
    return client.audio.speech.create(input=text, model="tts-1", voice="alloy", **options).content


def words(text: str) -> list[str]:
    return re.findall("[a-z]+", text.lower())


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_is_understood(client: openai.OpenAI, name: str) -> None:
    data = speak(client, FIRST, response_format=name)
    if name == "pcm":
        data = encode_wav(decode_pcm16(data), ENCODED_HZ)
    heard = client.audio.transcriptions.create(model="whisper-1", file=(f"speech.{name}", data))
    assert words(heard.text) == words(FIRST)


def test_twice_as_fast_is_half_as_long_and_still_understood(client: openai.OpenAI) -> None:
    plain, fast = (decode(speak(client, FIRST, response_format="mp3", speed=speed)) for speed in (1, 2))
    assert fast.size / plain.size == pytest.approx(0.5, abs=0.03)
    brisk = speak(client, FIRST, response_format="mp3", speed=1.25)
    assert words(client.audio.transcriptions.create(model="whisper-1", file=("a.mp3", brisk)).text) == words(FIRST)


def test_segments_and_words_have_the_times_of_the_recording(client: openai.OpenAI, recording: Samples) -> None:
    heard = client.audio.transcriptions.create(
        model="whisper-1",
        file=("a.wav", encode_wav(recording, HEARING_HZ)),
        response_format="verbose_json",
        timestamp_granularities=["word", "segment"],
    )
    assert words(heard.text) == words(FIRST + SECOND)
    assert heard.duration == pytest.approx(recording.size / HEARING_HZ, abs=0.01)
    assert heard.segments and heard.words
    assert [words(segment.text) for segment in heard.segments] == [words(FIRST), words(SECOND)]
    assert [words(word.word)[0] for word in heard.words] == words(FIRST + SECOND)
    begins_s, *_, ends_s = np.flatnonzero(np.abs(recording) > 0.02) / HEARING_HZ
    assert heard.words[0].start == pytest.approx(begins_s, abs=0.3)
    assert heard.words[-1].end == pytest.approx(ends_s, abs=0.3)
    assert all(0 <= word.start <= word.end <= later.end for word, later in pairwise(heard.words))
    silence = heard.segments[1].start - heard.segments[0].end
    assert silence == pytest.approx(1.0, abs=0.5)


@pytest.mark.parametrize(("container", "codec", "rate_hz"), [("mp4", "aac", 44_100), ("webm", "libopus", 48_000)])
def test_what_phones_and_browsers_record_becomes_subtitles(
    client: openai.OpenAI, recording: Samples, container: str, codec: str, rate_hz: int
) -> None:
    data = packed(recording, container, codec, rate_hz)
    text = client.audio.transcriptions.create(model="whisper-1", file=(f"a.{container}", data), response_format="srt")
    first, second, rest = str(text).split("\n\n")
    assert rest == ""
    assert [words(cue.split("\n", 2)[2]) for cue in (first, second)] == [words(FIRST), words(SECOND)]
    assert re.match(r"1\n00:00:0[12],\d{3} --> 00:00:0\d,\d{3}\n", first)


def packed(samples: Samples, container: str, codec: str, rate_hz: int) -> bytes:
    """Return `samples` as a file of another maker's: stereo, in its container."""
    import av

    target = io.BytesIO()
    with av.open(target, "w", format=container) as file:
        stream = file.add_stream(codec, rate=rate_hz, layout="stereo")
        frame = av.AudioFrame.from_ndarray(np.stack([samples, samples]), format="fltp", layout="stereo")
        frame.sample_rate = HEARING_HZ
        file.mux(stream.encode(frame))
        file.mux(stream.encode(None))
    return target.getvalue()


def test_a_language_that_is_not_heard_is_400(client: openai.OpenAI, recording: Samples) -> None:
    file = ("a.wav", encode_wav(recording, HEARING_HZ))
    with pytest.raises(openai.BadRequestError, match=r"'de' is not heard by whisper-tiny\.en; it hears: en"):
        client.audio.transcriptions.create(model="whisper-1", file=file, language="de")


def test_silence_has_no_segments(client: openai.OpenAI) -> None:
    file = ("a.wav", encode_wav(np.zeros(2 * HEARING_HZ, np.float32), HEARING_HZ))
    heard = client.audio.transcriptions.create(model="whisper-1", file=file, response_format="verbose_json")
    assert (heard.text, heard.segments, heard.language, heard.duration) == ("", [], "en", 2.0)


def test_a_prompt_tells_how_a_name_is_spelt(client: openai.OpenAI) -> None:
    file = ("a.flac", speak(client, "We take the Brannock line to the coast.", response_format="flac"))
    heard = client.audio.transcriptions.create(model="whisper-1", file=file, prompt="The Brannock line. Brannock Rail.")
    assert "Brannock" in heard.text


def test_who_speaks_is_heard_between_the_windows_of_a_long_recording(recording: Samples) -> None:
    ears, long_s = load_ears("whisper-tiny.en"), []
    turn = recording[2 * HEARING_HZ : 5 * HEARING_HZ]

    def hear_long() -> None:
        assert "river" in ears.transcribe(np.tile(recording, 5)).text
        long_s.append(time.monotonic())

    thread = threading.Thread(target=hear_long)
    thread.start()
    time.sleep(0.3)
    assert ears.transcribe(turn).text
    turn_s = time.monotonic()
    thread.join()
    assert turn_s < long_s[0]
