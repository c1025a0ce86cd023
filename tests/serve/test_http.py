"""The API through OpenAI's own client: answers, errors, limits, search notes, sound, and clients that go away."""

from __future__ import annotations

import io
import json
import wave
from collections.abc import Iterator
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from lorikeet.config import ServeConfig
from lorikeet.messages import Source
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.wire import ChatRequest
from lorikeet.speech.audio import encode_wav
from tests.serve.fakes import CountingEars, ScriptedEngine, ScriptedProvider, ToneVoice, served, serving

OSLO = Source("Weather in Oslo", "https://weather.example/oslo", "Light snow, minus two degrees.")
PIECES = ("The ", "🦜", " says ", "čau", ", ", "twice", ".")
HI: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine(*PIECES)


@pytest.fixture(scope="module")
def url(engine: ScriptedEngine) -> Iterator[str]:
    assistant = Assistant(engine, system_prompt="Be brief.", provider=ScriptedProvider(OSLO), config=ServeConfig())
    app = create_app(serving(assistant, "parrot"), ears=CountingEars(), voice=ToneVoice(), page=False)
    with served(app) as base:
        yield base


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20)


def post(url: str, **body: Any) -> httpx.Response:
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": HI, **body})


def test_streamed_and_whole_answers_are_the_same(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="parrot", messages=HI)
    chunks = list(client.chat.completions.create(model="default", messages=HI, stream=True))
    assert whole.choices[0].message.content == "".join(PIECES)
    assert "".join(c.choices[0].delta.content or "" for c in chunks) == "".join(PIECES)
    assert [c.choices[0].delta.content for c in chunks[1:-1]] == list(PIECES)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks] == [None] * (len(chunks) - 1) + ["stop"]
    assert len({c.id for c in chunks}) == 1
    assert (whole.model, chunks[0].model, whole.object, chunks[0].object) == (
        "parrot", "parrot", "chat.completion", "chat.completion.chunk",
    )  # fmt: skip
    assert whole.usage is not None
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens, whole.usage.total_tokens) == (7, 7, 14)
    assert whole.choices[0].finish_reason == "stop"


def test_usage_comes_last_and_only_where_it_is_asked_for(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True}
    *rest, last = client.chat.completions.create(model="parrot", messages=HI, stream=True, stream_options=options)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.total_tokens == 14
    assert all(chunk.usage is None for chunk in rest)
    plain = list(client.chat.completions.create(model="parrot", messages=HI, stream=True))
    assert all(chunk.choices and chunk.usage is None for chunk in plain)


def test_the_stream_is_server_sent_events(url: str) -> None:
    with httpx.stream("POST", f"{url}/v1/chat/completions", json={"messages": HI, "stream": True}) as response:
        text = response.read().decode()
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, done, end = text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    assert all(event.startswith("data: {") and "\n" not in event for event in events)
    assert "usage" not in json.loads(events[0][6:])


def test_the_options_reach_the_engine(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    client.chat.completions.create(
        model="parrot",
        messages=HI,
        temperature=0,
        top_p=0.5,
        seed=-1,
        stop="end",
        max_completion_tokens=2,
        max_tokens=9,
    )
    assert engine.options[-1] == {"max_tokens": 2, "temperature": 0, "top_p": 0.5, "seed": 2**32 - 2, "stop": ["end"]}


def test_the_limit_is_a_length(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(model="parrot", messages=HI, max_tokens=2)
    assert answer.choices[0].finish_reason == "length"
    assert answer.choices[0].message.content == "The 🦜"


def test_content_may_come_in_parts_and_developers_are_the_system(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    parts: Any = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    client.chat.completions.create(
        model="parrot", messages=[{"role": "developer", "content": "Obey."}, {"role": "user", "content": parts}]
    )
    assert [(m.role, m.content) for m in engine.asked[-1]] == [("system", "Obey."), ("user", "one\ntwo")]


def test_the_models_are_listed_with_the_served_one_first(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["parrot"]
    assert client.models.retrieve("parrot").id == "parrot"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


def test_an_unknown_model_is_404_in_openais_shape(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=HI)
    assert caught.value.code == "model_not_found"
    assert caught.value.param == "model"
    assert "parrot" in str(caught.value)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1), ("temperature", 2.1), ("temperature", "hot"), ("temperature", True), ("top_p", 1.1),
        ("max_tokens", 0), ("max_tokens", 1.5), ("max_tokens", 10**9), ("max_completion_tokens", -1), ("seed", 2**70),
        ("stop", ["a"] * 5), ("stop", [""]), ("stop", 3), ("n", 2), ("functions", [{}]),
        ("stream", "yes"), ("messages", []),
        ("messages", "Hi"), ("messages", [{"role": "user", "content": "x"}] * 1025), ("lorikeet", {"search": "maybe"}),
        ("lorikeet", {"serach": "off"}),
    ],
)  # fmt: skip
def test_a_wrong_field_is_400_and_named(url: str, engine: ScriptedEngine, field: str, value: Any) -> None:
    before = len(engine.asked)
    for stream in (False, True):
        response = post(url, **{"stream": stream, field: value})
        error = response.json()["error"]
        assert response.status_code == 400
        assert error["type"] == "invalid_request_error"
        assert error["param"].split(".")[0] == field
        assert field in error["message"]
        assert "\n" not in error["message"]
    assert len(engine.asked) == before


@pytest.mark.parametrize(
    ("message", "field"),
    [
        ({"role": "robot", "content": "x"}, "messages.0.role"),
        ({"role": "user"}, "messages.0.content"),
        ({"role": "user", "content": None}, "messages.0.content"),
        ({"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}, "messages.0.content"),
    ],
)
def test_a_wrong_message_is_named(url: str, message: Any, field: str) -> None:
    response = post(url, messages=[message])
    assert (response.status_code, response.json()["error"]["param"]) == (400, field)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe", b"[" * 5000, b'{"messages": NaN}', b""])
def test_a_body_that_is_no_json_is_400(url: str, content: bytes) -> None:
    response = httpx.post(f"{url}/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_harmless_fields_of_clients_pass(url: str) -> None:
    harmless = {"user": "me", "store": False, "n": 1, "logprobs": False, "top_logprobs": 0, "presence_penalty": 0}
    assert post(url, **harmless, tools=[], tool_choice="auto", response_format={"type": "text"}).status_code == 200


def test_null_is_the_same_as_left_out(url: str) -> None:
    fields = set(ChatRequest.model_fields) - {"messages", "model", "lorikeet"}
    assert len(fields) > 15
    assert post(url, **dict.fromkeys(fields)).status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_refused_conversation_is_400_also_when_streamed(url: str, stream: bool) -> None:
    response = post(url, stream=stream, messages=[{"role": "user", "content": "too long"}])
    assert response.status_code == 400
    assert "context size" in response.json()["error"]["message"]


def test_an_unknown_route_has_openais_shape(url: str) -> None:
    response = httpx.get(f"{url}/v1/chat/completions")
    assert response.status_code == 404
    assert response.json()["error"]["type"] == "invalid_request_error"


def test_search_is_off_unless_asked_for(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    weather: Any = [{"role": "user", "content": "What is the weather?"}]
    answer = client.chat.completions.create(model="parrot", messages=weather)
    assert engine.asked[-1][-1].content == "What is the weather?"
    assert answer.model_extra["lorikeet"]["search"] is None  # type: ignore[index]


@pytest.mark.parametrize("stream", [False, True])
def test_a_search_is_told_in_the_lorikeet_field(client: openai.OpenAI, engine: ScriptedEngine, stream: bool) -> None:
    weather: Any = [{"role": "user", "content": "What is the weather?"}]
    extra = {"lorikeet": {"search": "auto"}}
    answer: Any = client.chat.completions.create(model="parrot", messages=weather, stream=stream, extra_body=extra)
    last = list(answer)[-1] if stream else answer
    assert last.model_extra["lorikeet"]["search"] == {
        "reason": 'you asked about "weather"',
        "query": "What is the weather?",
        "failed": None,
        "sources": [{"number": 1, "title": OSLO.title, "url": OSLO.url}],
    }
    assert last.model_extra["lorikeet"]["memory"] is None
    assert "Light snow" in engine.asked[-1][-1].content


def test_a_failed_search_is_told_and_answered() -> None:
    assistant = Assistant(ScriptedEngine(), provider=ScriptedProvider(failure="nobody there"))
    with served(create_app(serving(assistant, "parrot"), page=False)) as url:
        answer = post(url, lorikeet={"search": "always"}).json()
    assert answer["choices"][0]["message"]["content"] == "Hello there."
    assert answer["lorikeet"]["search"]["failed"] == "nobody there"


def test_health_follows_the_engine() -> None:
    engine = ScriptedEngine()
    with served(create_app(serving(Assistant(engine), "parrot"), page=False)) as url:
        assert (httpx.get(f"{url}/health").status_code, httpx.get(f"{url}/health").json()) == (200, {"status": "ok"})
        engine.down = True
        assert (httpx.get(f"{url}/health").status_code, httpx.get(f"{url}/health").json()["status"]) == (503, "failed")
        response = post(url)
        assert response.status_code == 502
        assert response.json()["error"]["type"] == "server_error"


def test_a_failure_on_the_way_is_said_in_the_stream() -> None:
    app = create_app(serving(Assistant(ScriptedEngine("Well", "<fail>")), "parrot"), page=False)
    with served(app) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        got = []
        with pytest.raises(openai.APIError, match="middle of an answer"):
            got.extend(client.chat.completions.create(model="parrot", messages=HI, stream=True))
        assert post(url).status_code == 502


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_goes_away_stops_the_engine(stream: bool) -> None:
    engine = ScriptedEngine(*["word "] * 400, delay_s=0.02)
    with served(create_app(serving(Assistant(engine), "parrot"), page=False)) as url:
        if stream:
            with httpx.stream("POST", f"{url}/v1/chat/completions", json={"messages": HI, "stream": True}) as response:
                next(response.iter_lines())
        else:
            with pytest.raises(httpx.ReadTimeout):
                httpx.post(f"{url}/v1/chat/completions", json={"messages": HI}, timeout=0.5)
        assert engine.closed.wait(2)
        assert engine.given < 60


def test_answers_under_way_do_not_block_one_another() -> None:
    engine = ScriptedEngine(*["word "] * 50, delay_s=0.02)
    with (
        served(create_app(serving(Assistant(engine), "parrot"), page=False)) as url,
        httpx.stream("POST", f"{url}/v1/chat/completions", json={"messages": HI, "stream": True}) as response,
    ):
        next(response.iter_lines())
        assert httpx.get(f"{url}/health").status_code == 200
        assert engine.given < len(engine.pieces)  # health did not wait for the answer's end


def test_what_is_heard_comes_back(client: openai.OpenAI, url: str) -> None:
    tone = encode_wav(np.sin(np.arange(24_000) / 20).astype(np.float32), 16_000)
    assert client.audio.transcriptions.create(model="whisper-1", file=("a.wav", tone)).text == "I heard 1.5 seconds."
    evil = ("$(touch x); ../../a.wav", tone)
    assert (
        client.audio.transcriptions.create(model="counting", file=evil, response_format="text")
        == "I heard 1.5 seconds.\n"
    )
    silence = encode_wav(np.zeros(16_000, np.float32), 16_000)
    assert client.audio.transcriptions.create(model="default", file=("a.wav", silence)).text == ""


def test_what_is_no_sound_is_400(client: openai.OpenAI) -> None:
    for data in (b"this is text, not sound", b"", encode_wav(np.zeros(0, np.float32), 16_000)):
        with pytest.raises(openai.BadRequestError):
            client.audio.transcriptions.create(model="whisper-1", file=("a.wav", data))
    with pytest.raises(openai.NotFoundError):
        client.audio.transcriptions.create(model="nobody", file=("a.wav", b"x"))


def test_what_is_said_is_a_wav(client: openai.OpenAI) -> None:
    speech: Any = {"model": "tts-1", "voice": "alloy", "response_format": "wav"}
    answer = client.audio.speech.create(input="**One.** Two. https://x.example 🦜", **speech)
    assert answer.response.headers["content-type"] == "audio/wav"
    with wave.open(io.BytesIO(answer.content)) as file:
        assert (file.getnchannels(), file.getframerate()) == (1, 24_000)
        samples = np.frombuffer(file.readframes(-1), "<i2")
    assert samples.size == 2 * 2400  # two sentences, the URL is not said
    assert np.abs(samples).max() > 10_000


@pytest.mark.parametrize(
    "body",
    [
        {"input": ""}, {"input": "x" * 4097}, {"input": "🦜"}, {"input": "x", "voice": "nobody"},
        {"input": "x", "response_format": "mp4"}, {"input": "x", "speed": 0.2}, {"input": "x", "speed": 4.1},
        {"input": "x", "stream_format": "chunks"}, {},
    ],
)  # fmt: skip
def test_what_cannot_be_said_is_400(url: str, body: Any) -> None:
    response = httpx.post(f"{url}/v1/audio/speech", json={"model": "tts-1", "voice": "alloy", **body})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


def test_a_server_without_ears_and_voice_says_so() -> None:
    with served(create_app(serving(Assistant(ScriptedEngine()), "parrot"), page=False)) as url:
        speech = httpx.post(f"{url}/v1/audio/speech", json={"input": "x"})
        hearing = httpx.post(f"{url}/v1/audio/transcriptions", files={"file": ("a.wav", b"x")})
    assert (speech.status_code, hearing.status_code) == (400, 400)
    assert "--voice off" in speech.text
    assert "--ears off" in hearing.text


def test_null_is_as_if_absent(url: str) -> None:
    for field in ({"lorikeet": None}, {"lorikeet": {"search": None, "conversation": None}}):
        answer = post(url, **field)
        assert (answer.status_code, answer.json()["lorikeet"]["search"]) == (200, None)
    streamed = post(url, stream=True, stream_options={"include_usage": None})
    assert streamed.status_code == 200
    assert '"usage"' not in streamed.text


def test_health_can_be_asked_for_its_head_alone(url: str) -> None:
    answer = httpx.head(f"{url}/health")
    assert (answer.status_code, answer.content) == (200, b"")


def test_an_answer_follows_a_system_turn_or_another_answer(url: str, engine: ScriptedEngine) -> None:
    for messages in ([{"role": "system", "content": "Be."}], [*HI, {"role": "assistant", "content": "Hello."}]):
        answer = post(url, messages=messages, lorikeet={"search": "always"})
        assert (answer.status_code, answer.json()["lorikeet"]["search"]) == (200, None)
        assert [(m.role, m.content) for m in engine.asked[-1]][-1] == (messages[-1]["role"], messages[-1]["content"])
    call = {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    refused = post(url, messages=[*HI, {"role": "assistant", "tool_calls": [call]}])
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "messages")
    assert post(url, messages=[]).status_code == 400


def test_what_did_not_fit_is_told(url: str) -> None:
    history = [{"role": role, "content": "word " * 2000} for role in ("user", "assistant") * 2]
    answer = post(url, messages=[*history, *HI], max_tokens=2000).json()
    assert answer["lorikeet"]["context"]["max_tokens"] == 2000
    assert answer["lorikeet"]["context"]["dropped_turns"] == 4
    assert post(url).json()["lorikeet"]["context"] == {"dropped_turns": 0, "max_tokens": 512}
    *_, last, _ = post(url, messages=[*history, *HI], stream=True).text.strip().split("\n\n")
    assert json.loads(last[6:])["lorikeet"]["context"]["dropped_turns"] == 4
