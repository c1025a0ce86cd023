"""The audio routes through OpenAI's own client: files as they are spoken, speeds, events, and clients that go away."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lorikeet.errors import MachineError
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.audio import HEARING_PLACES, HEARING_SLOTS, MAX_FILE_S, SPEAKING_PLACES, TURN_S
from lorikeet.serve.http import create_app
from lorikeet.speech import HEARING_HZ, Samples, Segment, TimedTranscript
from lorikeet.speech.audio import decode, decode_pcm16, encode_wav, resample
from lorikeet.speech.encode import ENCODED_HZ, FORMATS
from tests.serve.fakes import CountingEars, ScriptedEngine, ToneVoice, served, serving

SENTENCES = " ".join(["This is a sentence of some words."] * 10)
CONTENT_TYPES = {
    "mp3": "audio/mpeg", "opus": "audio/ogg", "aac": "audio/aac", "flac": "audio/flac", "wav": "audio/wav", "pcm": "audio/pcm",
}  # fmt: skip
MAGIC = {"mp3": b"\xff\xf3", "opus": b"OggS", "aac": b"\xff\xf1", "flac": b"fLaC", "wav": b"RIFF"}


class CountedVoice(ToneVoice):
    """A tone for each sentence, slowly, that counts what it was asked and fails where the text says so."""

    def __init__(self, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.spoken = 0

    def speak(self, text: str) -> Iterator[Samples]:
        if "fail" in text:
            raise MachineError("the voice lost its memory; start it again")
        for samples in super().speak(text):
            time.sleep(self.delay_s)
            self.spoken += 1
            yield samples


def app_of(voice: Any, ears: Any = None) -> Any:
    return create_app(serving(Assistant(ScriptedEngine()), "parrot"), ears=ears, voice=voice, page=False)


@pytest.fixture(scope="module")
def ears() -> CountingEars:
    return CountingEars()


@pytest.fixture(scope="module")
def url(ears: CountingEars) -> Iterator[str]:
    with served(app_of(CountedVoice(), ears)) as base:
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20)


def heard(data: bytes, name: str) -> Samples:
    return resample(decode_pcm16(data), ENCODED_HZ, HEARING_HZ) if name == "pcm" else decode(data)


@pytest.mark.parametrize("name", FORMATS)
def test_speech_comes_in_the_format_that_is_asked_for(client: openai.OpenAI, name: Any) -> None:
    answer = client.audio.speech.create(input=SENTENCES, model="tts-1", voice="alloy", response_format=name)
    assert answer.response.headers["content-type"] == CONTENT_TYPES[name]
    assert answer.content.startswith(MAGIC.get(name, b""))
    samples = heard(answer.content, name)
    assert samples.size / HEARING_HZ == pytest.approx(1.0, abs=0.1)
    assert np.abs(samples).max() == pytest.approx(0.4, abs=0.1)


def test_mp3_is_meant_where_no_format_is_named(client: openai.OpenAI) -> None:
    answer = client.audio.speech.create(input="One.", model="tts-1", voice="alloy")
    assert answer.response.headers["content-type"] == "audio/mpeg"


@pytest.mark.parametrize("speed", [0.25, 1, 2, 4.0])
def test_speech_is_as_fast_as_it_is_asked_for(client: openai.OpenAI, speed: float) -> None:
    answer = client.audio.speech.create(
        input=SENTENCES, model="tts-1", voice="alloy", response_format="pcm", speed=speed
    )
    assert len(answer.content) / 2 / ENCODED_HZ * speed == pytest.approx(1.0, rel=0.05)


def test_text_without_an_end_is_spoken_in_breaths() -> None:
    voice = CountedVoice()
    with served(app_of(voice)) as url:
        for digits, breaths in ((40, 1), (41, 2), (400, 10)):
            voice.spoken = 0
            assert httpx.post(f"{url}/v1/audio/speech", json={"input": "9" * digits}).status_code == 200
            assert voice.spoken == breaths


@pytest.mark.parametrize("name", FORMATS)
def test_sound_goes_out_before_the_last_sentence_is_spoken(name: str) -> None:
    voice = CountedVoice(delay_s=0.1)
    body = {"input": SENTENCES * 2, "response_format": name}
    with served(app_of(voice)) as url, httpx.stream("POST", f"{url}/v1/audio/speech", json=body) as response:
        got = b""
        for piece in response.iter_bytes():
            got += piece
            if len(got) > 1000:
                break
        assert voice.spoken < 10


def test_a_client_that_goes_away_stops_the_voice() -> None:
    voice = CountedVoice(delay_s=0.05)
    body = {"input": SENTENCES * 8, "response_format": "pcm"}
    with served(app_of(voice)) as url:
        with httpx.stream("POST", f"{url}/v1/audio/speech", json=body) as response:
            next(response.iter_bytes())
        time.sleep(0.3)
        spoken = voice.spoken
        time.sleep(0.3)
        assert voice.spoken == spoken < 40


def test_a_voice_that_fails_at_once_is_a_status(url: str) -> None:
    for stream_format in ("audio", "sse"):
        body = {"input": "You fail. Go on.", "stream_format": stream_format, "response_format": "wav"}
        response = httpx.post(f"{url}/v1/audio/speech", json=body)
        assert response.status_code == 503
        assert response.json()["error"]["message"] == "the voice lost its memory; start it again"


def test_a_voice_that_fails_on_the_way_breaks_the_file_off(url: str) -> None:
    body = {"input": "This goes well. Then you fail.", "response_format": "wav"}
    with pytest.raises(httpx.RemoteProtocolError):
        httpx.post(f"{url}/v1/audio/speech", json=body)


def events(response: Any) -> list[Any]:
    assert response.headers["content-type"].startswith("text/event-stream")
    return [json.loads(event.removeprefix("data: ")) for event in response.text.split("\n\n") if event]


def test_speech_as_events_is_the_same_file(client: openai.OpenAI) -> None:
    speech: Any = {"input": SENTENCES, "model": "gpt-4o-mini-tts", "voice": "alloy"}
    file = client.audio.speech.create(**speech).content
    *deltas, done = events(client.audio.speech.create(**speech, stream_format="sse").response)
    assert len(deltas) > 1
    assert {delta["type"] for delta in deltas} == {"speech.audio.delta"}
    assert b"".join(base64.b64decode(delta["audio"]) for delta in deltas) == file
    assert done["type"] == "speech.audio.done"
    assert set(done["usage"]) == {"input_tokens", "output_tokens", "total_tokens"}


def test_a_voice_that_fails_on_the_way_says_so_in_an_event(url: str) -> None:
    body = {"input": "This goes well. Then you fail.", "stream_format": "sse"}
    *_, last = events(httpx.post(f"{url}/v1/audio/speech", json=body))
    assert last["error"]["message"] == "the voice lost its memory; start it again"


def test_many_speeches_at_once_leave_the_server_free() -> None:
    voice = CountedVoice(delay_s=0.1)
    with served(app_of(voice)) as url:
        body = {"input": SENTENCES, "response_format": "pcm"}
        sizes: list[int] = []
        threads = [
            threading.Thread(target=lambda: sizes.append(len(httpx.post(f"{url}/v1/audio/speech", json=body).content)))
            for _ in range(8)
        ]
        for thread in threads:
            thread.start()
        began = time.monotonic()
        assert httpx.get(f"{url}/health").status_code == 200
        assert time.monotonic() - began < 0.5
        for thread in threads:
            thread.join(20)
    assert sizes == [2 * ENCODED_HZ] * 8


def tone(seconds: float) -> Samples:
    return (0.4 * np.sin(np.arange(int(seconds * HEARING_HZ)) / 20)).astype(np.float32)


TONE = ("tone.wav", encode_wav(tone(2.0), HEARING_HZ))
SILENCE = ("silence.wav", encode_wav(np.zeros(HEARING_HZ, np.float32), HEARING_HZ))


def test_a_transcript_comes_in_every_format(client: openai.OpenAI) -> None:
    def ask(name: Any, file: Any = TONE) -> Any:
        return client.audio.transcriptions.create(model="whisper-1", file=file, response_format=name)

    assert ask("json").text == "I heard 2.0 seconds."
    assert ask("text") == "I heard 2.0 seconds.\n"
    assert ask("srt") == "1\n00:00:00,500 --> 00:00:02,000\nI heard 2.0 seconds.\n\n"
    assert ask("vtt") == "WEBVTT\n\n00:00:00.500 --> 00:00:02.000\nI heard 2.0 seconds.\n\n"
    verbose = ask("verbose_json")
    assert (verbose.text, verbose.language, verbose.duration) == ("I heard 2.0 seconds.", "en", 2.0)
    (segment,) = verbose.segments
    assert (segment.id, segment.start, segment.end, segment.text) == (0, 0.5, 2.0, "I heard 2.0 seconds.")
    assert (verbose.words, verbose.usage.seconds) == (None, 2)
    assert [ask(name, SILENCE) for name in ("text", "srt", "vtt")] == ["\n", "", "WEBVTT\n\n"]
    assert (ask("verbose_json", SILENCE).text, ask("verbose_json", SILENCE).segments) == ("", [])


def test_words_have_times_where_they_are_asked_for(client: openai.OpenAI) -> None:
    ask: Any = {"model": "whisper-1", "file": TONE, "response_format": "verbose_json"}
    words = client.audio.transcriptions.create(**ask, timestamp_granularities=["word"])
    assert [word.word for word in words.words] == ["I", "heard", "2.0", "seconds."]
    assert words.words[1].start == pytest.approx(0.875)
    assert words.segments is None
    both = client.audio.transcriptions.create(**ask, timestamp_granularities=["word", "segment"])
    assert (len(both.words), len(both.segments)) == (4, 1)


def test_the_options_reach_the_ears(client: openai.OpenAI, ears: CountingEars) -> None:
    client.audio.transcriptions.create(
        model="whisper-1", file=TONE, language="EN", prompt="A rail line, Brannock", temperature=0.4
    )
    assert ears.asked[-1] == {
        "language": "en", "prompt": "A rail line, Brannock", "temperature": 0.4, "words": False
    }  # fmt: skip


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"response_format": "diarized_json"}, "response_format"), ({"temperature": "1.5"}, "temperature"),
        ({"temperature": "nan"}, "temperature"), ({"temperature": "warm"}, "temperature"),
        ({"prompt": "x" * 4001}, "prompt"), ({"stream": "true"}, "stream"), ({"include[]": "logprobs"}, "include"),
        ({"timestamp_granularities[]": "word"}, "timestamp_granularities"),
        ({"timestamp_granularities[]": "letter", "response_format": "verbose_json"}, "timestamp_granularities"),
    ],
)  # fmt: skip
def test_a_wrong_field_of_a_transcription_is_400_and_named(url: str, fields: dict[str, str], named: str) -> None:
    response = httpx.post(f"{url}/v1/audio/transcriptions", data=fields, files={"file": TONE})
    assert response.status_code == 400
    assert named in response.json()["error"]["message"]


def test_a_recording_that_is_too_long_or_missing_is_400(url: str) -> None:
    long = encode_wav(np.zeros(int((MAX_FILE_S + 1) * HEARING_HZ), np.float32), HEARING_HZ)
    response = httpx.post(f"{url}/v1/audio/transcriptions", files={"file": ("long.wav", long)})
    assert (response.status_code, response.json()["error"]["message"]) == (
        400, "the audio is longer than 300 seconds; give a shorter one",
    )  # fmt: skip
    for request in ({"data": {"model": "whisper-1"}}, {"files": {"files": TONE}}, {"data": {"file": "a.wav"}}):
        response = httpx.post(f"{url}/v1/audio/transcriptions", **request)
        assert (response.status_code, response.json()["error"]["param"]) == (400, "file")


@pytest.mark.parametrize(
    ("route", "sent", "served_name"),
    [("speech", {"json": {"input": "x", "model": "x"}}, "tone"),
     ("transcriptions", {"data": {"model": "x"}, "files": {"file": TONE}}, "counting")],
)  # fmt: skip
def test_an_unknown_model_is_told_what_is_served(url: str, route: str, sent: Any, served_name: str) -> None:
    response = httpx.post(f"{url}/v1/audio/{route}", **sent)
    assert response.status_code == 404
    assert response.json()["error"]["message"] == f"model: 'x' is not served here; ask for {served_name!r} or 'default'"


def test_translations_are_refused_in_words(url: str) -> None:
    response = httpx.post(f"{url}/v1/audio/translations", files={"file": ("a.wav", b"x" * (2 << 20))})
    assert response.status_code == 404
    assert response.json()["error"]["message"].startswith("translations are not made here")


class SlowEars(CountingEars):
    """Hears a window in a tenth of a second, in each of them a word."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows, self.heard = windows, 0

    def transcribe_timed(self, samples: Samples, **options: Any) -> Generator[Segment, None, TimedTranscript]:
        segments = []
        for window in range(self.windows):
            time.sleep(0.1)
            self.heard += 1
            segments.append(Segment(text="word", start_s=window, end_s=window + 1))
            yield segments[-1]
        return TimedTranscript(tuple(segments), "en", float(self.windows))


LONG = ("long.wav", encode_wav(tone(TURN_S + 1), HEARING_HZ))


def transcribe(url: str, *, timeout_s: float = 60) -> httpx.Response:
    return httpx.post(f"{url}/v1/audio/transcriptions", files={"file": LONG}, timeout=timeout_s)


def test_more_recordings_than_may_wait_are_refused_and_the_rest_leave_the_server_free() -> None:
    ears = SlowEars(windows=4)
    most = HEARING_SLOTS + HEARING_PLACES
    with served(app_of(None, ears)) as url, ThreadPoolExecutor(most + 24) as pool:
        asked = [pool.submit(transcribe, url) for _ in range(most + 24)]
        waits_s = []
        while not all(answer.done() for answer in asked):
            began_s = time.monotonic()
            assert httpx.get(f"{url}/health", timeout=20).status_code == 200
            waits_s.append(time.monotonic() - began_s)
            time.sleep(0.1)
        answers = [answer.result() for answer in asked]
    assert {answer.status_code for answer in answers} == {200, 503}
    assert all(answer.json()["text"] == "word word word word" for answer in answers if answer.status_code == 200)
    assert sum(answer.status_code == 200 for answer in answers) >= most
    assert all("retry-after" in answer.headers for answer in answers if answer.status_code == 503)
    assert sorted(waits_s)[len(waits_s) // 2] < 0.5


def test_a_recording_is_heard_no_further_once_its_client_is_gone() -> None:
    ears = SlowEars(windows=100)
    with served(app_of(None, ears)) as url:
        for _ in range(HEARING_SLOTS + 1):
            with pytest.raises(httpx.ReadTimeout):
                transcribe(url, timeout_s=0.5)
        time.sleep(0.4)
        heard = ears.heard
        time.sleep(0.4)
        assert 0 < ears.heard == heard < 60


def test_the_server_ends_in_time_while_it_hears() -> None:
    ears = SlowEars(windows=200)
    with ThreadPoolExecutor(8) as pool:
        with served(app_of(None, ears)) as url:
            for _ in range(8):
                pool.submit(transcribe, url)
            while not ears.heard:
                time.sleep(0.01)
            began_s = time.monotonic()
        assert time.monotonic() - began_s < 5


def test_more_speeches_than_may_be_under_way_are_refused() -> None:
    voice = CountedVoice(delay_s=0.02)
    body = {"input": SENTENCES, "response_format": "pcm"}
    with served(app_of(voice)) as url, ThreadPoolExecutor(SPEAKING_PLACES + 12) as pool:
        asked = [
            pool.submit(httpx.post, f"{url}/v1/audio/speech", json=body, timeout=60)
            for _ in range(SPEAKING_PLACES + 12)
        ]
        statuses = [answer.result().status_code for answer in asked]
        assert set(statuses) == {200, 503}
        assert statuses.count(200) >= SPEAKING_PLACES
        assert httpx.post(f"{url}/v1/audio/speech", json=body).status_code == 200
