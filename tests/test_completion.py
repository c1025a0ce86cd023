"""What servers stream, as each of them does it: signs of life, thoughts, tools, log-probabilities, and no stream at all."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from lorikeet.completion import AnswerReader, Thoughts, read_events
from lorikeet.errors import EngineError, RequestError
from lorikeet.messages import Delta, TokenLogprob, ToolCall, Usage


def chunk(finish: str | None = None, **delta: Any) -> dict[str, Any]:
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish}]}


def read(*events: Any, top_logprobs: int | None = None, done: bool = True) -> list[Delta]:
    lines = [event if isinstance(event, str) else f"data: {json.dumps(event)}" for event in events]
    text = "\n\n".join([*lines, *(["data: [DONE]"] if done else [])])
    response = httpx.Response(200, headers={"content-type": "text/event-stream"}, text=text)
    reader = AnswerReader(top_logprobs=top_logprobs)
    return [*(delta for event in read_events(response) for delta in reader.read(event)), reader.last()]


def text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def test_events_comments_and_missing_spaces_are_read() -> None:
    deltas = read("event: x", ": ping", 'data:{"choices": [{"delta": {"content": "Hi"}}]}', chunk("stop"))
    assert deltas == [Delta(""), Delta("Hi"), Delta("", "stop")]


def test_usage_may_be_missing_null_or_last() -> None:
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 1}}
    assert read(chunk(content="a"), {"choices": [], "usage": None}, chunk("length"))[-1] == Delta("", "length", None)
    assert read(chunk(content="a"), chunk("stop"), usage)[-1].usage == Usage(3, 1)


def test_an_answer_that_is_no_stream_is_read() -> None:
    body = {"choices": [{"message": {"role": "assistant", "content": "Whole."}, "finish_reason": "stop"}]}
    reader = AnswerReader(top_logprobs=None)
    events = read_events(httpx.Response(200, json=body))
    assert [delta.text for event in events for delta in reader.read(event)] == ["Whole."]
    assert reader.last().finish_reason == "stop"


def test_an_answer_that_breaks_off_is_an_error() -> None:
    with pytest.raises(EngineError, match="middle of an answer"):
        read(chunk(content="a"), done=False)
    with pytest.raises(EngineError, match="out of memory"):
        read(chunk(content="a"), {"error": {"message": "out of memory"}})


@pytest.mark.parametrize("event", ["data: [1]", 'data: {"choices": [3]}', 'data: {"usage": {"tokens": 1}}'])
def test_another_protocol_is_an_error(event: str) -> None:
    with pytest.raises(EngineError, match="another protocol"):
        read(event)


def test_reasoning_is_no_answer() -> None:
    assert text(read(chunk(reasoning_content="Hmm."), chunk(content="Yes."), chunk("stop"))) == "Yes."


@pytest.mark.parametrize("size", [1, 3, 1000])
@pytest.mark.parametrize(
    ("written", "said"),
    [
        ("<think>a <b></think>\n\nYes.", "Yes."),
        ("\n<think>\n</think>Yes </think>.", "Yes </think>."),
        ("<thin ice", "<thin ice"),
        ("  Yes <think>no</think>", "  Yes <think>no</think>"),
        ("<think>never ends", ""),
        ("<th", "<th"),
    ],
)
def test_thoughts_are_left_out_however_they_are_cut(written: str, said: str, size: int) -> None:
    thoughts = Thoughts()
    given = [thoughts.feed(written[start : start + size]) for start in range(0, len(written), size)]
    assert "".join(given) + thoughts.flush() == said


def test_tool_calls_come_in_pieces() -> None:
    first = {"index": 0, "id": "c1", "type": "function", "function": {"name": "weather", "arguments": ""}}
    more = {"index": 0, "function": {"arguments": '{"city"'}}
    *calls, last = read(chunk(tool_calls=[first]), chunk(tool_calls=[more]), chunk("tool_calls"))
    assert [call for delta in calls for call in delta.tool_calls] == [
        ToolCall(0, "c1", "weather", ""),
        ToolCall(0, "", "", '{"city"'),
    ]
    assert last.finish_reason == "tool_calls"


def test_logprobs_stay_with_their_text() -> None:
    token = {"id": 7, "token": "Hi", "bytes": [72, 105], "logprob": -0.5}
    event = chunk(content="Hi")
    event["choices"][0]["logprobs"] = {"content": [{**token, "top_logprobs": [token]}]}
    best = TokenLogprob("Hi", -0.5, (72, 105))
    assert read(event, chunk("stop"), top_logprobs=1)[0].logprobs == (TokenLogprob("Hi", -0.5, (72, 105), (best,)),)
    assert read(event, chunk("stop"), top_logprobs=0)[0].logprobs == (best,)
    assert read(event, chunk("stop"))[0].logprobs == ()


def test_logprobs_that_do_not_come_are_the_requests_fault() -> None:
    with pytest.raises(RequestError, match="logprobs: the engine gives none"):
        read(chunk(content="Hi"), chunk("stop"), top_logprobs=0)
