"""Real engines and many clients: models side by side, nobody's words in another's answer, and a client that leaves."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from lorikeet.config import ServeConfig
from lorikeet.engine import LlamaEngine
from lorikeet.export.gguf import write_gguf
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.models import Models, Served
from lorikeet.serve.note import Origin
from tests.serve.fakes import served, serving

from ..conftest import make_model
from .test_many import wait_until

ROOT = Path(__file__).resolve().parents[2]
QUESTIONS = ["the quick brown fox", "seven clever lorikeets sing about weather", "winter trains please", "yes"]

TOOLS_TEMPLATE = """\
{%- if tools %}<|im_start|>system
Call functions as <tool_call>{"name": ..., "arguments": ...}</tool_call>. <tools>
{%- for tool in tools %}
{{ tool | tojson }}
{%- endfor %}
</tools><|im_end|>
{% endif %}
{%- for message in messages %}
{%- if message.role == 'tool' %}<|im_start|>user
<tool_response>{{ message.content }}</tool_response><|im_end|>
{% else %}<|im_start|>{{ message.role }}
{{ message.content or '' }}
{%- for call in message.tool_calls or [] %}
<tool_call>{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}</tool_call>
{%- endfor %}<|im_end|>
{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


def tiny_gguf(folder: Path, *, seed: int) -> Path:
    path = folder / f"tiny-{seed}.gguf"
    write_gguf(make_model(folder / f"model-{seed}", seed=seed), path, quant="f16", name=f"tiny-{seed}")
    return path


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Two models of other weights and the same words, side by side."""
    folder = tmp_path_factory.mktemp("side")
    config = ServeConfig(slots=2, queue=64, temperature=0.0)
    with (
        LlamaEngine(tiny_gguf(folder, seed=0), slots=3, context_tokens=512) as one,
        LlamaEngine(tiny_gguf(folder, seed=1), slots=3, context_tokens=512) as other,
    ):
        tuned = Assistant(one, system_prompt="the lazy dogs", config=config)
        base = tuned.beside(other, origin=Origin(name="base"))
        models = Models(Served(name="tuned", assistant=tuned), Served(name="base", assistant=base))
        with served(create_app(models, page=False)) as base_url:
            yield base_url


def client(url: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0, timeout=60)


def likeliest(url: str, model: str, question: str) -> dict[str, float]:
    """Return the likeliest next tokens, and the logarithms of their probabilities."""
    answer = client(url).chat.completions.create(
        model=model, messages=[{"role": "user", "content": question}], max_tokens=8, logprobs=True, top_logprobs=5
    )
    assert answer.choices[0].logprobs and answer.choices[0].logprobs.content
    return {top.token: top.logprob for top in answer.choices[0].logprobs.content[0].top_logprobs}


def is_alike(some: dict[str, float], others: dict[str, float]) -> bool:
    both = some.keys() & others.keys()
    return len(both) >= 3 and all(abs(some[token] - others[token]) < 0.05 for token in both)


def test_what_one_model_has_read_is_never_used_for_another(url: str) -> None:
    """The prompts are the same to the letter, so a cache that did not ask who read them would be taken."""
    alone = {(model, text): likeliest(url, model, text) for model in ("tuned", "base") for text in QUESTIONS}
    for text in QUESTIONS:
        assert not is_alike(alone["tuned", text], alone["base", text])
    for _ in range(2):
        for text in QUESTIONS:
            for model in ("base", "tuned", "base"):
                assert is_alike(likeliest(url, model, text), alone[model, text]), (model, text)
    asked = [(model, text) for text in QUESTIONS for model in ("tuned", "base")] * 4
    with ThreadPoolExecutor(8) as pool:
        for each, found in zip(asked, pool.map(lambda each: likeliest(url, *each), asked), strict=True):
            assert is_alike(found, alone[each]), each


def test_every_client_gets_its_own_answer(url: str) -> None:
    """Each must say a word of its own, which the schema leaves it no way around, and is charged for its own prompt."""

    def ask(number: int) -> tuple[Any, int]:
        fields = {"code": {"const": f"canary-{number}"}}
        schema = {"type": "object", "properties": fields, "required": ["code"], "additionalProperties": False}
        answer = client(url).chat.completions.create(
            model="tuned" if number % 2 else "base",
            messages=[{"role": "user", "content": "yes " * (number + 1)}],
            response_format={"type": "json_schema", "json_schema": {"name": "code", "strict": True, "schema": schema}},
            max_tokens=64,
        )
        assert answer.usage
        return json.loads(str(answer.choices[0].message.content)), answer.usage.prompt_tokens

    with ThreadPoolExecutor(12) as pool:
        found = list(pool.map(ask, range(24)))
    assert [code for code, _ in found] == [{"code": f"canary-{number}"} for number in range(24)]
    counts = [tokens for _, tokens in found]
    assert counts == [*range(counts[0], counts[0] + 24 * (counts[1] - counts[0]), counts[1] - counts[0])]


def test_a_client_that_leaves_while_its_prompt_is_read_frees_the_slot() -> None:
    from lorikeet.weights import packaged_gguf

    with LlamaEngine(packaged_gguf(), context_tokens=4096, slots=1) as engine:
        assistant = Assistant(engine, config=ServeConfig(slots=1, context_tokens=4096))
        with served(create_app(serving(assistant), page=False)) as url:
            question = "Tell me which of these words is the odd one out: " + "apple pear plum cherry " * 500
            for stream in (True, False):
                body = {
                    "messages": [{"role": "user", "content": question}],
                    "stream": stream,
                    "max_tokens": 8,
                    "seed": 1,
                }
                began = time.monotonic()
                with pytest.raises(httpx.ReadTimeout):
                    httpx.post(f"{url}/v1/chat/completions", json=body, timeout=0.2)
                wait_until(lambda: assistant.queue.answering == 0)
                hi = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1, "seed": 1}
                assert httpx.post(f"{url}/v1/chat/completions", json=hi, timeout=60).status_code == 200
                left_s = time.monotonic() - began
            began = time.monotonic()
            assert httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120).status_code == 200
            assert left_s < 0.7 * (time.monotonic() - began), "the prompt of who had left was read to its end"


def test_a_template_that_knows_tools_is_given_them(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = make_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TOOLS_TEMPLATE
    tokenizer.save_pretrained(folder)
    write_gguf(folder, tmp_path / "tools.gguf", quant="f16", name="tools")
    city = {"type": "string", "enum": ["Oslo", "Rome"]}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"], "additionalProperties": False}
    tool: Any = {"type": "function", "function": {"name": "get_weather", "description": "w", "parameters": parameters}}
    messages: Any = [{"role": "user", "content": "the weather please"}]
    with LlamaEngine(tmp_path / "tools.gguf", context_tokens=2048) as engine:
        with served(create_app(serving(Assistant(engine)), page=False)) as url:
            ask = client(url).chat.completions.create
            without = ask(model="default", messages=messages, max_tokens=4, seed=1)
            offered = ask(model="default", messages=messages, tools=[tool], max_tokens=4, seed=1)
            call = {
                "id": "call_1",
                "type": "function",
                "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
            }
            messages += [
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "tool_call_id": "call_1", "content": "winter in the mountains"},
            ]
            called = ask(model="default", messages=messages, tools=[tool], max_tokens=4, seed=1)
            counts = [answer.usage.prompt_tokens for answer in (without, offered, called) if answer.usage]
            assert counts[0] + 100 < counts[1] < counts[2] - 20
        rendered = engine.post("/apply-template", {"messages": messages, "tools": [tool]})["prompt"]
        assert '"name": "get_weather"' in rendered and "<tool_response>winter in the mountains" in rendered


def test_a_short_load_mixes_and_loses_nothing(tmp_path: Path) -> None:
    """The benchmark of many clients, in its short form."""
    path = tmp_path / "load.json"
    command = [sys.executable, "benchmarks/load.py", "--clients", "8", "--seconds", "8", "--soak-minutes", "0"]
    done = subprocess.run([*command, "--json", str(path)], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    result = json.loads(path.read_text())
    level = result["levels"][0]
    assert result["wrong"] == 0 and level["answered"] >= 8
    assert (level["failed"], level["lost"], level["mixed"]) == (0, 0, 0)
    assert result["swaps_noticed"] >= 0.75
