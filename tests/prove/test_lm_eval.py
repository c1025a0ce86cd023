"""The guide to lm-eval without lm-eval: its files fit together, and the server takes the requests that lm-eval 0.4.13 sends."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from lorikeet.config import ServeConfig
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from tests.serve.fakes import ScriptedEngine, served, serving

ROOT = Path(__file__).resolve().parents[2]
TASKS = ROOT / "benchmarks" / "lm_eval"


class _Loader(yaml.SafeLoader):
    """YAML with lm-eval's `!function module.name`."""


_Loader.add_constructor("!function", lambda loader, node: loader.construct_scalar(node))


def task() -> dict[str, Any]:
    found: dict[str, Any] = yaml.load((TASKS / "capitals.yaml").read_text(encoding="utf-8"), _Loader)  # a SafeLoader
    return found


def rows() -> list[dict[str, str]]:
    return [json.loads(line) for line in (TASKS / "capitals.jsonl").read_text(encoding="utf-8").splitlines()]


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Call the function that the task names, loaded as lm-eval loads it: from the file beside the task."""
    module_name, _, function = task()["process_results"].partition(".")
    spec = importlib.util.spec_from_file_location(module_name, TASKS / f"{module_name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found: dict[str, float] = getattr(module, function)(doc, results)
    return found


def test_the_guide_names_what_is_there() -> None:
    guide = (ROOT / "docs" / "guide" / "lm-eval.md").read_text(encoding="utf-8")
    asked = task()
    assert f"--tasks {asked['task']}" in guide
    assert (ROOT / re.search(r"--include_path (\S+)", guide)[1]).samefile(TASKS)  # type: ignore[index]
    assert (ROOT / asked["dataset_kwargs"]["data_files"]).samefile(TASKS / "capitals.jsonl")
    assert [metric["metric"] for metric in asked["metric_list"]] == list(process_results(rows()[0], ["x"]))
    assert all(
        set(re.findall(r"{{(\w+)}}", asked["doc_to_text"] + asked["doc_to_target"])) <= set(row) for row in rows()
    )
    assert len({row["country"] for row in rows()}) == len(rows()) == 20


@pytest.mark.parametrize(
    ("answer", "found"),
    [("It is PARIS.", 1.0), ("The capital is Rome.", 0.0), ("", 0.0), ("Parishes have none.", 0.0)],
)
def test_an_answer_is_right_if_it_names_the_capital(answer: str, found: float) -> None:
    assert process_results({"country": "France", "capital": "Paris"}, [answer]) == {"contains": found}


@pytest.mark.parametrize(
    "odd",
    [
        {},
        {"stop": []},  # of tasks without `until`
        {"stop": ["\n\n", "Q:", "</s>", "<|im_end|>"]},  # lm-eval sends four at most
        {"max_tokens": 1280},
        {"temperature": 0},
        {
            "num_beams": 1,
            "top_p": 1.0,
            "top_k": 1,
            "repetition_penalty": 1.0,
        },  # whatever else a task's generation_kwargs hold
    ],
)
def test_a_request_of_lm_eval_is_answered(odd: dict[str, Any]) -> None:
    """The body is as recorded: a few-shot example as turns, greedy, a seed, and fields that OpenAI's API does not know."""
    asked = task()
    settings = asked["generation_kwargs"]
    question = asked["doc_to_text"].replace("{{country}}", "France")
    body = {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": asked["doc_to_text"].replace("{{country}}", "Cuba")},
            {"role": "assistant", "content": "Havana"},
            {"role": "user", "content": question},
        ],
        "model": "mine",
        "max_tokens": settings["max_gen_toks"],
        "temperature": settings["temperature"],
        "stop": settings["until"],
        "seed": 1234,
    } | odd
    engine = ScriptedEngine("It is ", "Paris.")
    with served(create_app(serving(Assistant(engine, config=ServeConfig()), "mine"), page=False)) as url:
        answer = httpx.post(f"{url}/v1/chat/completions", json=body)
        assert answer.status_code == 200, answer.text
        choices = answer.json()["choices"]
    assert [(choice["index"], choice["message"]["content"]) for choice in choices] == [(0, "It is Paris.")]
    assert [(m.role, m.content) for m in engine.asked[0]] == [(m["role"], m["content"]) for m in body["messages"]]
    told = engine.options[0]
    assert (told["temperature"], told["seed"], told["stop"]) == (0, 1234, body["stop"])
    assert told["max_tokens"] == body["max_tokens"]
