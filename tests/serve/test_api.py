"""The API with the packaged model behind it: answers of a form, the guide's own lines, and the types in the OpenAPI document."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lorikeet.config import ServeConfig
from lorikeet.engine import LlamaEngine
from lorikeet.messages import Source
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.memory import Memory
from lorikeet.serve.openapi import ChatCompletion, ErrorBody, Health, ModelList
from lorikeet.weights import packaged_gguf
from tests.serve.fakes import ScriptedEngine, ScriptedProvider, served, serving

GUIDE = Path(__file__).resolve().parents[2] / "docs" / "guide" / "api.md"
HI: Any = [{"role": "user", "content": "Describe a bird, please."}]
BIRD: Any = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 20},
        "colour": {"enum": ["green", "blue"]},
        "legs": {"type": "integer", "minimum": 2, "maximum": 2},
    },
    "required": ["name", "colour", "legs"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def engine() -> Iterator[LlamaEngine]:
    if find_spec("xllamacpp") is None:
        pytest.skip("xllamacpp is not installed; it comes with the extra serve")
    with LlamaEngine(packaged_gguf(), context_tokens=1024) as engine:
        yield engine


@pytest.fixture(scope="module")
def url(engine: LlamaEngine, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    config = ServeConfig(context_tokens=1024, max_answer_tokens=60)
    source = Source("Birds", "https://birds.example", "The lorikeet is a green bird.")
    memory = Memory.open(tmp_path_factory.mktemp("memory") / "memory.db")
    assistant = Assistant(engine, config=config, provider=ScriptedProvider(source), memory=memory)
    with served(create_app(serving(assistant), page=False)) as base:
        yield base
    memory.close()


@pytest.fixture(scope="module")
def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0, timeout=60)


@pytest.mark.parametrize("stream", [False, True])
def test_a_models_answer_has_the_form_of_the_schema(client: openai.OpenAI, stream: bool) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "bird", "schema": BIRD, "strict": True}}
    answer: Any = client.chat.completions.create(
        model="default", messages=HI, response_format=shape, seed=1, temperature=1, stream=stream
    )
    text = (
        "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        if stream
        else answer.choices[0].message.content
    )
    bird = json.loads(text)
    assert list(bird) == ["name", "colour", "legs"]
    assert 1 <= len(bird["name"]) <= 20
    assert bird["colour"] in {"green", "blue"}
    assert bird["legs"] == 2


def test_a_schema_that_cannot_be_enforced_is_400(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"n": {"type": "number", "multipleOf": 2}}}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    with pytest.raises(openai.BadRequestError, match="multipleOf") as caught:
        client.chat.completions.create(model="default", messages=HI, response_format=shape)
    assert caught.value.param == "response_format"


def test_functions_are_refused_where_the_template_knows_none(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "function", "function": {"name": "now"}}]
    with pytest.raises(openai.BadRequestError, match="template") as caught:
        client.chat.completions.create(model="default", messages=HI, tools=tools)
    assert caught.value.param == "tools"


def test_a_models_logprobs_are_those_of_its_answer(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="default", messages=HI, max_tokens=5, temperature=0, logprobs=True, top_logprobs=2
    ).choices[0]
    assert answer.logprobs is not None and answer.logprobs.content is not None
    tokens = answer.logprobs.content
    assert b"".join(bytes(token.bytes or ()) for token in tokens).decode() == answer.message.content
    for token in tokens:
        assert len(token.top_logprobs) == 2
        assert token.token == token.top_logprobs[0].token  # temperature 0 takes the most probable one
        assert token.top_logprobs[1].logprob <= token.logprob <= 0


def test_a_bias_keeps_a_token_out(client: openai.OpenAI, engine: LlamaEngine) -> None:
    ask: Any = {"model": "default", "messages": HI, "max_tokens": 4, "temperature": 0, "seed": 1}
    plain = client.chat.completions.create(**ask).choices[0].message.content
    ids = engine.tokenize(str(plain))
    biased = client.chat.completions.create(**ask, logit_bias={str(i): -100 for i in ids}).choices[0].message.content
    assert plain and biased and biased != plain


def test_what_is_answered_has_the_documents_types(url: str) -> None:
    body = {"messages": HI, "max_tokens": 3, "logprobs": True, "top_logprobs": 1, "lorikeet": {"search": "always"}}
    answer = ChatCompletion.model_validate(httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).json())
    assert answer.lorikeet.search is not None and answer.lorikeet.search.sources[0].number == 1
    assert answer.lorikeet.memory is not None and answer.lorikeet.memory.id == answer.id
    assert answer.lorikeet.timings.ttft_ms and answer.choices[0].logprobs
    assert ModelList.model_validate(httpx.get(f"{url}/v1/models").json()).data[0].lorikeet.kind == "file"
    assert Health.model_validate(httpx.get(f"{url}/health").json()).status == "ok"
    for wrong in (httpx.post(f"{url}/v1/chat/completions", json={}), httpx.get(f"{url}/v1/nothing")):
        assert ErrorBody.model_validate(wrong.json()).error.type == "invalid_request_error"


def test_the_document_says_what_every_route_can_answer() -> None:
    document = create_app(serving(Assistant(ScriptedEngine())), page=False).openapi()
    assert {"/health", "/v1/models", "/v1/chat/completions", "/v1/feedback"} <= set(document["paths"])
    for path, operations in document["paths"].items():
        for operation in operations.values():
            assert {"4XX", "5XX"} <= set(operation["responses"]), path
            assert "422" not in operation["responses"], path  # a wrong field is 400
    chat = document["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(chat["200"]["content"]) == {"application/json", "text/event-stream"}
    fields = document["components"]["schemas"]["ChatRequest"]["properties"]
    assert {"tools", "tool_choice", "response_format", "logprobs", "logit_bias", "stop", "lorikeet"} <= set(fields)


def test_the_guides_lines_run(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = GUIDE.read_text(encoding="utf-8").replace("http://127.0.0.1:7860", url)
    blocks = re.findall(r"```(console|python)\n(.*?)```", text, re.DOTALL)
    assert [kind for kind, _ in blocks].count("python") >= 5
    names: dict[str, Any] = {}
    for kind, code in blocks:
        if kind == "python":
            exec(compile(code, str(GUIDE), "exec"), names)
            continue
        ran = subprocess.run(["bash", "-ec", code], capture_output=True, text=True, timeout=60)
        assert ran.returncode == 0, ran.stderr
        assert '"object":"list"' in ran.stdout and '"object":"chat.completion"' in ran.stdout
    printed = capsys.readouterr().out
    assert "tools tools: this model's chat template knows none" in printed
    assert "'timings'" in printed
    names["client"].close()
