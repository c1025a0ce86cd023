"""The audio routes through OpenAI's own client: files as they are spoken, speeds, events, and clients that go away."""

from __future__ import annotations

import base64
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lorikeet.errors import MachineError
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.speech import HEARING_HZ, Samples
from lorikeet.speech.audio import decode, decode_pcm16, resample
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


def app_of(voice: Any) -> Any:
    return create_app(serving(Assistant(ScriptedEngine()), "parrot"), ears=CountingEars(), voice=voice, page=False)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(app_of(CountedVoice())) as base:
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
        body = {"input": "You fail. Go on.", "stream_format": stream_format}
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
