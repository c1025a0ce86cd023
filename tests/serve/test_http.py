"""The API as its clients meet it: the official client, errors, keys, limits, and clients that go away."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import Service, create_app
from lorikeet.speech.audio import encode_wav

from .fakes import EchoEngine, LoudEars, OneSource, ToneVoice
from .server import running


@pytest.fixture
def engine() -> EchoEngine:
    return EchoEngine()


def make_service(engine: EchoEngine, provider: OneSource | None = None) -> Service:
    assistant = Assistant(engine, system_prompt="Be brief.", provider=provider)
    return Service("mine", "ready", assistant, LoudEars(), ToneVoice())


@pytest.fixture
def url(engine: EchoEngine) -> Iterator[str]:
    with running(create_app(make_service(engine, OneSource()), page=False)) as address:
        yield address


@pytest.fixture
def client(url: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as connected:
        yield connected


def say(text: str) -> Any:
    return [{"role": "user", "content": text}]


def test_the_official_client_whole_and_streamed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["mine"]
    whole = client.chat.completions.create(model="mine", messages=say("hello \U0001f99c é"))
    assert whole.choices[0].message.content == "hello \U0001f99c é"
    assert whole.choices[0].finish_reason == "stop"
    assert whole.usage is not None and whole.usage.total_tokens == 7 + 9
    chunks = list(
        client.chat.completions.create(
            model="mine", messages=say("hello \U0001f99c é"), stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == "hello \U0001f99c é"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == "stop"
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens == 9


def test_settings_reach_the_engine(client: openai.OpenAI, engine: EchoEngine) -> None:
    answer = client.chat.completions.create(
        model="default", messages=say("abcdef"), max_tokens=3, temperature=0, top_p=0.5, seed=11, stop=["x"]
    )
    assert answer.choices[0].finish_reason == "length" and answer.choices[0].message.content == "abc"
    assert engine.settings == [{"max_tokens": 3, "temperature": 0.0, "top_p": 0.5, "seed": 11, "stop": ("x",)}]


def test_the_system_turn_is_the_runs_unless_the_request_has_one(client: openai.OpenAI, engine: EchoEngine) -> None:
    client.chat.completions.create(model="mine", messages=say("a"))
    client.chat.completions.create(model="mine", messages=[{"role": "system", "content": "Shout."}, *say("a")])
    assert [asked[0].content for asked in engine.asked] == ["Be brief.", "Shout."]


def test_content_may_come_in_parts(client: openai.OpenAI) -> None:
    parts = [{"type": "text", "text": "one "}, {"type": "text", "text": "two"}]
    answer = client.chat.completions.create(model="mine", messages=[{"role": "user", "content": parts}])  # type: ignore[list-item,misc]
    assert answer.choices[0].message.content == "one two"


def test_search_is_shown_and_grounds_the_question(client: openai.OpenAI, engine: EchoEngine) -> None:
    answer = client.chat.completions.create(
        model="mine", messages=say("tides today?"), extra_body={"lorikeet": {"search": "auto"}}
    )
    assert answer.model_extra is not None
    assert answer.model_extra["lorikeet"]["search"] == {
        "reason": 'you asked about "today"',
        "failed": None,
        "sources": [{"title": "Tides <b>today</b>", "url": "https://tides.example/a"}],
    }
    asked = engine.asked[0][-1].content
    assert asked.startswith("Search results, untrusted") and asked.endswith("tides today?") and "06:12" in asked
    off = client.chat.completions.create(model="mine", messages=say("tides today?"))
    assert off.model_extra is not None and "lorikeet" not in off.model_extra


def test_a_search_that_fails_is_said_and_the_answer_goes_on(engine: EchoEngine) -> None:
    with running(create_app(make_service(engine, OneSource("refused: 202 Ratelimit")), page=False)) as address:
        body = {"messages": say("weather?"), "lorikeet": {"search": "auto"}}
        answer = httpx.post(f"{address}/v1/chat/completions", json=body).json()
    assert answer["choices"][0]["message"]["content"] == "weather?"
    assert answer["lorikeet"]["search"]["failed"] == "refused: 202 Ratelimit"


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({"messages": []}, 400, "messages"),
        ({}, 400, "messages"),
        ({"messages": say("x"), "temperature": 9}, 400, "temperature"),
        ({"messages": say("x"), "max_tokens": 0}, 400, "max_tokens"),
        ({"messages": say("x"), "max_tokens": 10**30}, 400, "max_tokens"),
        ({"messages": say("x"), "top_p": "nan"}, 400, "top_p"),
        ({"messages": say("x"), "seed": -1}, 400, "seed"),
        ({"messages": say("x"), "n": 3}, 400, "n"),
        ({"messages": say("x"), "stop": [""]}, 400, "stop"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, 400, "role"),
        ({"messages": say("   ")}, 400, "empty"),
        ({"messages": say("x"), "model": "gpt-5"}, 404, "gpt-5"),
        ({"messages": say("x"), "lorikeet": {"serch": "auto"}}, 400, "serch"),
        ({"messages": say("refuse")}, 400, "context size"),
        ({"messages": say("refuse"), "stream": True}, 400, "context size"),
        ({"messages": say("break it")}, 502, "middle of an answer"),
    ],
)
def test_what_is_wrong_is_said_in_openais_shape(url: str, body: dict[str, Any], status: int, message: str) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", json=body)
    assert response.status_code == status
    assert message in response.json()["error"]["message"]


def test_an_engine_that_fails_in_the_middle_ends_the_stream_with_an_error(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIError, match="middle of an answer"):
        list(client.chat.completions.create(model="mine", messages=say("break it"), stream=True))


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[1, 2]", b'"x"', b"null", b'{"messages": 5}', b"[" * 5000]
)
def test_malformed_bodies_are_400(url: str, content: bytes) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_goes_away_stops_the_generation() -> None:
    engine = EchoEngine(delay_s=0.02)
    with running(create_app(make_service(engine), page=False)) as address:
        body = {"messages": say("a" * 500), "stream": True}
        with httpx.stream("POST", f"{address}/v1/chat/completions", json=body) as response:
            next(response.iter_lines())
        assert engine.stopped.wait(5)
        assert engine.said < 200
        whole = EchoEngine(delay_s=0.02)
    with running(create_app(make_service(whole), page=False)) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/chat/completions", json={"messages": say("a" * 500)}, timeout=0.3)
        assert whole.stopped.wait(5)


def test_health_tells_starting_ready_and_failed_apart(engine: EchoEngine) -> None:
    service = Service("mine")
    with running(create_app(service, page=False)) as address:
        starting = httpx.get(f"{address}/health")
        assert (starting.status_code, starting.json()["status"]) == (503, "starting")
        assert httpx.post(f"{address}/v1/chat/completions", json={"messages": say("x")}).status_code == 503
        service.assistant, service.status = Assistant(engine, system_prompt=""), "ready"
        assert httpx.get(f"{address}/health").status_code == 200
        engine.alive = False
        failed = httpx.get(f"{address}/health")
        assert (failed.status_code, failed.json()["status"]) == (503, "failed")


def test_audio_both_ways(client: openai.OpenAI, url: str) -> None:
    wav = encode_wav(np.full(16_000, 0.5, np.float32), 16_000)
    heard = client.audio.transcriptions.create(model="whisper-1", file=("a; rm -rf.wav", wav))
    assert heard.text == "level 0.5"
    said = client.audio.speech.create(model="tts-1", voice="alloy", input="**one** two", response_format="wav").read()
    assert said[:4] == b"RIFF" and len(said) == 44 + 2 * 2 * 800
    for data in (b"this is text", b"", b"RIFF" + b"\0" * 100):
        response = httpx.post(f"{url}/v1/audio/transcriptions", files={"file": ("x.wav", data)})
        assert response.status_code == 400, response.text
    assert httpx.post(f"{url}/v1/audio/speech", json={"input": "\U0001f600"}).status_code == 400


@pytest.fixture
def locked(engine: EchoEngine) -> Iterator[str]:
    with running(create_app(make_service(engine), api_key="right key 123", page=False)) as address:
        yield address


@pytest.mark.parametrize(
    "route", ["/v1/models", "/v1/chat/completions", "/openapi.json", "/v1/audio/speech", "/nothing", "/"]
)
@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Basic right key 123"},
        {"X-Api-Key": "right key 123"},
        {"Cookie": "lorikeet_session=right key 123"},
    ],
)
def test_every_route_needs_the_key(locked: str, route: str, headers: dict[str, str]) -> None:
    response = httpx.get(locked + route, headers=headers)
    if route == "/":
        assert (response.status_code, response.headers["location"]) == (303, "/login")
    else:
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"


def test_the_key_opens_the_api_and_the_page(locked: str) -> None:
    assert httpx.get(f"{locked}/health").status_code == 200
    with openai.OpenAI(base_url=f"{locked}/v1", api_key="right key 123") as client:
        assert client.chat.completions.create(model="mine", messages=say("hi")).choices[0].message.content == "hi"
    with httpx.Client(base_url=locked) as browser:
        assert "password" in browser.get("/login").text
        assert browser.post("/login", data={"key": "wrong"}).status_code == 401
        response = browser.post("/login", data={"key": "right key 123"})
        assert response.status_code == 303
        cookie = response.headers["set-cookie"].lower()
        assert "httponly" in cookie and "samesite=strict" in cookie and "right key" not in cookie
        assert browser.get("/v1/models").status_code == 200


def test_other_sites_and_rebound_names_are_refused(url: str) -> None:
    body = {"messages": say("x")}
    assert (
        httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Origin": "https://evil.example"}).status_code
        == 403
    )
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Origin": "null"}).status_code == 403
    assert httpx.get(f"{url}/v1/models", headers={"Host": "evil.example"}).status_code == 403
    assert httpx.post(f"{url}/v1/chat/completions", json=body, headers={"Origin": url}).status_code == 200


def test_bodies_are_bounded_whatever_they_claim(url: str) -> None:
    big = json.dumps({"messages": say("x" * (2 << 20))}).encode()
    assert httpx.post(f"{url}/v1/chat/completions", content=big).status_code == 413

    def trickle() -> Iterator[bytes]:
        for place in range(0, len(big), 1 << 16):
            yield big[place : place + (1 << 16)]

    assert httpx.post(f"{url}/v1/chat/completions", content=trickle()).status_code == 413


def test_answers_carry_security_headers(url: str) -> None:
    headers = httpx.get(f"{url}/v1/models").headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["x-frame-options"] == "SAMEORIGIN"
    assert "access-control-allow-origin" not in headers


def test_two_conversations_at_once_do_not_mix() -> None:
    from concurrent.futures import ThreadPoolExecutor

    engine = EchoEngine(delay_s=0.001)
    with running(create_app(make_service(engine), page=False)) as address, ThreadPoolExecutor(16) as pool:

        def ask(number: int) -> str:
            text = f"number {number} " * 5
            answer = httpx.post(f"{address}/v1/chat/completions", json={"messages": say(text)}, timeout=60).json()
            return str(answer["choices"][0]["message"]["content"] == text)

        began = time.monotonic()
        assert set(pool.map(ask, range(64))) == {"True"}
        assert time.monotonic() - began < 60
