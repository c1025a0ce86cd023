"""What a request asks of an answer beyond its length: functions, formats, log-probabilities, penalties; by OpenAI's client."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import openai
import pytest

from lorikeet.engine import EngineBusyError, EngineDownError
from lorikeet.errors import EngineError, RequestError
from lorikeet.messages import AnswerOptions, Delta, Message, TokenLogprob, ToolCall, Usage
from lorikeet.serve.assistant import Assistant, Done, Text
from lorikeet.serve.http import create_app
from lorikeet.serve.models import Models, Served
from lorikeet.serve.wire import Answer
from tests.serve.fakes import ScriptedEngine, served, serving

HI: Any = [{"role": "user", "content": "Hi"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city.",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
CLOCK: Any = {"type": "function", "function": {"name": "get_time"}}
CALLED: Any = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'}},
        {"id": "call_2", "type": "function", "function": {"name": "get_time", "arguments": "{}"}},
    ],
}
RESULTS: Any = [
    {"role": "tool", "tool_call_id": "call_2", "content": "noon"},
    {"role": "tool", "tool_call_id": "call_1", "content": [{"type": "text", "text": "snow"}]},
]
CALLS = (
    Delta("One moment."),
    Delta("", tool_calls=(ToolCall(0, "call_1", "get_weather", '{"ci'),)),
    Delta("", tool_calls=(ToolCall(0, "", "", 'ty": "Oslo"}'), ToolCall(1, "call_2", "get_time", ""))),
    Delta("", tool_calls=(ToolCall(1, "", "", "{}"),)),
    Delta("", "tool_calls", Usage(20, 9)),
)
LIKELY = TokenLogprob("Hé", -0.25, (72, 195, 169))
LOGPROBS = (
    Delta("Hé", logprobs=(TokenLogprob("Hé", -0.25, (72, 195, 169), (LIKELY, TokenLogprob("No", -2.0, (78, 111)))),)),
    Delta("!", logprobs=(TokenLogprob("!", -math.inf, (33,)),)),
    Delta("", "stop", Usage(5, 2)),
)


@contextmanager
def client_of(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with served(create_app(serving(Assistant(engine), "parrot"), page=False)) as url:
        yield openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=20)


@pytest.fixture(scope="module")
def engine() -> ScriptedEngine:
    return ScriptedEngine()


@pytest.fixture(scope="module")
def client(engine: ScriptedEngine) -> Iterator[openai.OpenAI]:
    with client_of(engine) as client:
        yield client


def ask(client: openai.OpenAI, messages: Any = HI, **options: Any) -> Any:
    return client.chat.completions.create(model="parrot", messages=messages, **options)


def test_every_option_reaches_the_engine(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    schema = {"type": "object", "properties": {"n": {"const": None}}}
    ask(
        client,
        frequency_penalty=-2,
        presence_penalty=0.5,
        logit_bias={"11": -100, "7": 1.5},
        logprobs=True,
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        tools=[WEATHER, CLOCK],
        tool_choice="auto",
        parallel_tool_calls=False,
    )
    bare = {"name": "get_time", "parameters": {"type": "object", "properties": {}}}
    assert engine.answer_options[-1] == AnswerOptions(
        frequency_penalty=-2,
        presence_penalty=0.5,
        logit_bias={"11": -100, "7": 1.5},
        top_logprobs=3,
        response_format={"type": "json_schema", "json_schema": {"name": "n", "schema": schema, "strict": True}},
        tools=(WEATHER, {"type": "function", "function": bare}),
        tool_choice="auto",
        parallel_tool_calls=False,
    )


def test_what_is_not_asked_for_is_left_to_the_engine(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    ask(client, logprobs=False, response_format={"type": "text"}, tools=[], tool_choice="none", logit_bias={})
    assert engine.answer_options[-1] == AnswerOptions()
    ask(client, logprobs=True, response_format={"type": "json_object"})
    assert engine.answer_options[-1] == AnswerOptions(top_logprobs=0, response_format={"type": "json_object"})


def test_a_named_function_is_offered_alone_and_required(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    named = {"type": "function", "function": {"name": "get_weather"}}
    ask(client, tools=[CLOCK, WEATHER], tool_choice=named)
    assert engine.answer_options[-1] == AnswerOptions(
        tools=(WEATHER,), tool_choice="required", parallel_tool_calls=False
    )


def test_calls_come_whole_and_streamed() -> None:
    with client_of(ScriptedEngine(*CALLS)) as client:
        whole = ask(client, tools=[WEATHER, CLOCK]).choices[0]
        chunks = list(ask(client, tools=[WEATHER, CLOCK], stream=True))
        with client.chat.completions.stream(model="parrot", messages=HI, tools=[WEATHER, CLOCK]) as stream:
            gathered = stream.get_final_completion().choices[0]
    expected = [("call_1", "get_weather", {"city": "Oslo"}), ("call_2", "get_time", {})]
    for choice in (whole, gathered):
        calls = choice.message.tool_calls
        assert [(c.id, c.function.name, json.loads(c.function.arguments)) for c in calls] == expected
        assert choice.message.content == "One moment."
        assert choice.finish_reason == "tool_calls"
    pieces = [call for chunk in chunks for call in chunk.choices[0].delta.tool_calls or ()]
    assert [(p.index, p.id, p.function.name) for p in pieces] == [
        (0, "call_1", "get_weather"), (0, None, None), (1, "call_2", "get_time"), (1, None, None),
    ]  # fmt: skip


def test_an_answer_of_calls_alone_has_no_content() -> None:
    with client_of(ScriptedEngine(*CALLS[1:])) as client:
        message = ask(client, tools=[WEATHER, CLOCK]).choices[0].message
    assert message.content is None
    assert len(message.tool_calls) == 2


def test_results_of_functions_are_taken(client: openai.OpenAI, engine: ScriptedEngine) -> None:
    ask(client, [*HI, CALLED, *RESULTS], tools=[WEATHER, CLOCK])
    calls = (ToolCall(0, "call_1", "get_weather", '{"city": "Oslo"}'), ToolCall(1, "call_2", "get_time", "{}"))
    assert engine.asked[-1] == [
        Message("user", "Hi"),
        Message("assistant", "", tool_calls=calls),
        Message("tool", "noon", tool_call_id="call_2"),
        Message("tool", "snow", tool_call_id="call_1"),
    ]


def test_logprobs_come_whole_and_streamed() -> None:
    with client_of(ScriptedEngine(*LOGPROBS)) as client:
        whole = ask(client, logprobs=True, top_logprobs=2).choices[0].logprobs
        chunks = list(ask(client, logprobs=True, top_logprobs=2, stream=True))
    streamed = [token for chunk in chunks if (found := chunk.choices[0].logprobs) for token in found.content]
    assert whole.content == streamed
    assert [(t.token, t.logprob, t.bytes) for t in streamed] == [("Hé", -0.25, [72, 195, 169]), ("!", -9999, [33])]
    assert [(t.token, t.logprob) for t in streamed[0].top_logprobs] == [("Hé", -0.25), ("No", -2)]
    assert streamed[1].top_logprobs == []


def test_without_logprobs_there_are_none(client: openai.OpenAI) -> None:
    assert ask(client).choices[0].logprobs is None


DEEP: Any = {}
for _ in range(200):
    DEEP = {"items": DEEP}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("frequency_penalty", {"frequency_penalty": 2.1}),
        ("presence_penalty", {"presence_penalty": "high"}),
        ("logit_bias.5", {"logit_bias": {"5": 101}}),
        ("logit_bias", {"logit_bias": {"hello": 1}}),
        ("logit_bias", {"logit_bias": {"-1": 1}}),
        ("logit_bias", {"logit_bias": {str(n): 0 for n in range(1025)}}),
        ("logprobs", {"logprobs": 2}),
        ("top_logprobs", {"logprobs": True, "top_logprobs": 21}),
        ("top_logprobs", {"top_logprobs": 2}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "json_object", "json_schema": {"name": "x"}}}),
        ("response_format.type", {"response_format": {"type": "grammar"}}),
        ("response_format", {"response_format": "json"}),
        ("response_format.json_schema.name", {"response_format": {"type": "json_schema", "json_schema": {"name": ""}}}),
        (
            "response_format.json_schema.schema",
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": DEEP}}},
        ),
        ("tools.0.function", {"tools": [{"type": "function"}]}),
        ("tools.0.type", {"tools": [{"type": "web_search", "function": {"name": "x"}}]}),
        ("tools.0.function.name", {"tools": [{"type": "function", "function": {"name": "two words"}}]}),
        (
            "tools.0.function.parameters",
            {"tools": [{"type": "function", "function": {"name": "x", "parameters": DEEP}}]},
        ),
        ("tools", {"tools": [CLOCK, CLOCK]}),
        ("tools", {"tools": [CLOCK] * 129}),
        ("tool_choice", {"tool_choice": "required"}),
        ("n", {"n": 2}),
        ("n", {"n": True}),
        ("tool_choice", {"tools": [CLOCK], "tool_choice": "any"}),
        ("tool_choice", {"tools": [CLOCK], "tool_choice": {"type": "function"}}),
        ("tool_choice", {"tools": [CLOCK], "tool_choice": {"type": "function", "function": {"name": "get_weather"}}}),
        ("tool_choice", {"tools": [CLOCK], "tool_choice": [CLOCK]}),
        ("parallel_tool_calls", {"tools": [CLOCK], "parallel_tool_calls": "yes"}),
        ("messages.1.tool_call_id", {"messages": [*HI, {"role": "tool", "content": "x"}]}),
        ("messages.0.tool_calls", {"messages": [{**CALLED, "role": "user"}]}),
        ("messages.1.content", {"messages": [*HI, {"role": "assistant", "content": None}]}),
        ("messages.1.content", {"messages": [*HI, {"role": "assistant", "tool_calls": []}]}),
        ("messages", {"messages": [*HI, RESULTS[0]]}),
        ("messages", {"messages": [*HI, CALLED, RESULTS[0]]}),
        ("messages", {"messages": [*HI, CALLED, RESULTS[0], RESULTS[0], RESULTS[1]]}),
        ("messages", {"messages": [*HI, CALLED, *HI]}),
        ("messages", {"messages": [*HI, CALLED]}),
        ("messages", {"messages": RESULTS}),
        (
            "messages.1.tool_calls.0.function.arguments",
            {"messages": [*HI, {"role": "assistant", "tool_calls": [
                {"id": "a", "type": "function", "function": {"name": "x", "arguments": "{city"}}]}]},
        ),
    ],
)  # fmt: skip
def test_a_wrong_option_is_400_and_named(
    client: openai.OpenAI, engine: ScriptedEngine, param: str, body: dict[str, Any]
) -> None:
    before = len(engine.asked)
    for stream in (False, True):
        response = httpx.post(f"{client.base_url}chat/completions", json={"messages": HI, "stream": stream, **body})
        error = response.json()["error"]
        assert response.status_code == 400, response.text
        assert (error["type"], error["param"]) == ("invalid_request_error", param)
        assert error["message"].startswith(param.split(".")[0]) or param == "messages"
        assert "\n" not in error["message"]
    assert len(engine.asked) == before


class FailingEngine(ScriptedEngine):
    """Answers every request with one error."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self.error = error

    def stream(self, *_: Any, **__: Any) -> Iterator[Delta]:  # type: ignore[override]
        def deltas() -> Iterator[Delta]:
            raise self.error
            yield

        return deltas()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("error", "status", "param", "retry"),
    [
        (RequestError("tools: this model knows none", field="tools"), 400, "tools", None),
        (RequestError("the request exceeds the context size"), 400, None, None),
        (EngineBusyError("the engine is busy (quota); ask again later"), 503, None, "2"),
        (EngineDownError("the engine is being started again"), 503, None, "2"),
        (EngineError("the engine answered 500"), 502, None, None),
    ],
)
def test_what_the_engine_says_has_its_status_and_field(
    error: Exception, status: int, param: str | None, retry: str | None, stream: bool
) -> None:
    with client_of(FailingEngine(error)) as client, pytest.raises(openai.APIStatusError) as caught:
        ask(client, stream=stream)
    assert (caught.value.status_code, caught.value.param) == (status, param)
    assert caught.value.response.headers.get("retry-after") == retry
    assert str(error) in str(caught.value)


def test_times_are_told_by_hand_set_clock() -> None:
    times = iter([10.0, 10.25, 12.25])
    answer = Answer("parrot", clock_s=lambda: next(times))
    for event in (Text("a"), Text("b"), Done("stop", Usage(3, 5))):
        answer.take(event)
    assert answer.whole()["lorikeet"]["timings"] == {"ttft_ms": 250.0, "tokens_per_s": 2.0}  # 4 tokens in 2 s


@pytest.mark.parametrize("stream", [False, True])
def test_times_are_told(stream: bool) -> None:
    with client_of(ScriptedEngine("a", "b", "c", delay_s=0.05)) as client:
        answer = ask(client, stream=stream)
        last = list(answer)[-1] if stream else answer
    timings = last.model_extra["lorikeet"]["timings"]
    assert 50 <= timings["ttft_ms"] < 2000
    assert 0 < timings["tokens_per_s"] <= 25  # two more tokens, at least 0.1 s apart


def test_an_answer_without_a_token_has_no_times() -> None:
    with client_of(ScriptedEngine(Delta("", "stop", Usage(3, 0)))) as client:
        assert ask(client).model_extra["lorikeet"]["timings"] == {"ttft_ms": None, "tokens_per_s": None}


def test_models_tell_what_is_known_of_their_file() -> None:
    tuned = Served(
        name="mine", assistant=Assistant(ScriptedEngine()), kind="tuned", quant="q8_0", sha256="a" * 64,
        adapter_sha256="b" * 64, proved=True,
    )  # fmt: skip
    remote = Served(name="far", assistant=Assistant(ScriptedEngine()), kind="remote")
    with served(create_app(Models(tuned, remote), page=False)) as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any")
        facts = [model.model_extra["lorikeet"] for model in client.models.list()]  # type: ignore[index]
        assert client.models.retrieve("far").model_extra == {"lorikeet": facts[1]}
    assert facts == [
        {"kind": "tuned", "quant": "q8_0", "gguf_sha256": "a" * 64, "adapter_sha256": "b" * 64, "proved": True},
        {"kind": "remote", "quant": None, "gguf_sha256": None, "adapter_sha256": None, "proved": False},
    ]
