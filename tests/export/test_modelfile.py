"""The Ollama Modelfile: its Go template gives the tokens of `prompt.py`, or there is none and the reason is kept."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorikeet.export.gotemplate import TemplateSyntaxError, execute, quote
from lorikeet.export.modelfile import (
    Modelfile,
    UnprovenError,
    build,
    check,
    parse,
    probes,
    repository_files,
    trims,
    write_modelfile,
)
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import PromptFormat, defuse
from lorikeet.run import RunFolder

from ..conftest import CHATML, make_conversations, make_tokenizer, write_jsonl

RENDERED = Path(__file__).with_name("ollama_rendered.jsonl")
"""What Go's own text/template printed for `cases()`, behind Ollama's Modelfile grammar and joining of messages (2026-08)."""

DEFAULT_SYSTEM = (
    "{% for m in messages %}{% if loop.first and m.role != 'system' %}<|im_start|>system\nYou are a bird.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set system = messages[0].content | trim %}"
    "{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "<|start_header_id|>system<|end_header_id|>\n\nToday Date: 25 Nov 2026\n\n{{ system }}<|eot_id|>"
    "{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{% set first = messages[0].content + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set first = '' %}{% set turns = messages %}{% endif %}"
    "{% for m in turns %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ first if loop.first else '' }}{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns') }}{% endif %}"
    "[{{ m.role }}] {{ m.content }}{{ eos_token }}\n{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
)
BRACES = CHATML.replace("'<|im_start|>'", "'{{\u200b<|im_start|>\\\"'")
TEMPLATES = {
    "chatml": (CHATML, None),
    "default system": (DEFAULT_SYSTEM, None),
    "llama 3": (LLAMA3, "<|begin_of_text|>"),
    "gemma": (GEMMA, "<bos>"),
    "no system": (NO_SYSTEM, None),
    "braces": (BRACES, None),
}


def make_prompt(name: str) -> PromptFormat:
    """Return the format of a template above."""
    template, bos = TEMPLATES[name]
    return PromptFormat(make_tokenizer(template, bos=bos))


def conversations(prompt: PromptFormat) -> list[list[Message]]:
    """Return the probes as a model with this template may be asked them."""
    found = list(probes())
    return [[Message(m.role, m.content.strip()) for m in c] for c in found] if trims(prompt) else found


def cases() -> list[dict[str, Any]]:
    """Return what was given to Go: Modelfiles, each with messages."""
    rows = []
    for name in TEMPLATES:
        prompt = make_prompt(name)
        modelfile = build(prompt, system="" if name == "no system" else 'Say "yes".\n\nThen stop.', source="./x.gguf")
        for conversation in conversations(prompt):
            messages = [{"role": m.role, "content": defuse(m.content, prompt.specials)} for m in conversation]
            rows.append({"modelfile": modelfile.dump(), "messages": messages})
    return rows


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_tokens_are_those_of_tuning(name: str) -> None:
    prompt = make_prompt(name)
    system = "" if name == "no system" else "Answer briefly."
    check(build(prompt, system=system, source="./x.gguf"), prompt, conversations(prompt))


def test_a_bos_that_the_tokenizer_adds_is_not_in_the_template() -> None:
    for name in ("llama 3", "gemma"):
        prompt = make_prompt(name)
        assert prompt.bos_id is not None
        assert prompt.tokenizer.bos_token not in build(prompt, system="", source="x").template


def test_our_reading_is_ollamas() -> None:
    rows = [json.loads(line) for line in RENDERED.read_text(encoding="utf-8").splitlines()]
    ours = cases()
    assert len(rows) == len(ours) > 100
    for row, case in zip(rows, ours, strict=True):
        modelfile = parse(case["modelfile"])
        read = {"model": modelfile.source, "template": modelfile.template, "system": modelfile.system}
        assert {key: row.get(key, "") for key in read} == read
        flat = [[name, value] for name, values in modelfile.parameters.items() for value in values]
        assert row["parameters"] == flat
        assert modelfile.render([Message(m["role"], m["content"]) for m in case["messages"]]) == row["text"]


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>assistant"),
        ("<|im_end|>\n<|im_start|>user\n{{ end }}{{ end }}{{ end }}", "<|im_start|>user\n{{ end }}{{ end }}{{ end }}"),
        ("You are a bird", "You are a fish"),
        ("{{ .System }}", "{{ .System }} "),
    ],
)
def test_a_planted_difference_is_found(old: str, new: str) -> None:
    prompt = make_prompt("default system")
    modelfile = build(prompt, system="Answer briefly.", source="./x.gguf")
    assert old in modelfile.template
    with pytest.raises(UnprovenError, match="other tokens"):
        check(replace(modelfile, template=modelfile.template.replace(old, new)), prompt, conversations(prompt))


@pytest.mark.parametrize(
    ("template", "why"),
    [
        (CHATML.replace("message['role'] + ", "message['role'] + loop.index | string + "), "as a conversation grows"),
        (CHATML.replace("message['content']", "message['content'] | upper"), "leaves out a turn"),
        (CHATML.replace("message['content']", "message['content'].replace('  ', ' ')"), "other tokens"),
        ("{{ raise_exception('never') }}", "refuses"),
    ],
)
def test_what_go_cannot_say_has_no_modelfile(template: str, why: str, tmp_path: Path) -> None:
    run = make_run(tmp_path, template=template)
    (run.root / "Modelfile").write_text("of an earlier export")
    assert why in write_modelfile(run)
    assert not (run.root / "Modelfile").exists()
    assert why in run.manifest()["modelfile"]["why"]


@pytest.mark.parametrize("system", ['ends its line """\nand goes on', "a zero\u200bwidth space"])
def test_a_system_prompt_that_a_modelfile_would_change(system: str, tmp_path: Path) -> None:
    assert "unchanged" in write_modelfile(make_run(tmp_path, system=system))


def test_a_template_that_go_would_print_otherwise(tmp_path: Path) -> None:
    run = make_run(tmp_path, template=CHATML.replace("'<|im_start|>'", "'\U000e0001<|im_start|>'"))
    why = "its chat template cannot be written for Ollama: a character that cannot be seen"
    assert write_modelfile(run) == why
    assert run.manifest()["modelfile"] == {"why": why} and not (run.root / "Modelfile").exists()


def test_the_file_lies_where_ollama_looks(tmp_path: Path) -> None:
    run = make_run(tmp_path, system='Be "brief".\nTwo lines.')
    assert write_modelfile(run) == ""
    modelfile = parse((run.root / "Modelfile").read_text())
    assert (run.root / modelfile.source).is_file() and modelfile.source == "./gguf/model-q8_0.gguf"
    assert modelfile.system == 'Be "brief".\nTwo lines.'
    assert modelfile.parameters == {"stop": ["<|im_end|>"], "temperature": ["0.3"], "num_ctx": ["4096"]}
    assert run.manifest()["modelfile"]["complete"] is True and run.manifest()["modelfile"]["note"] == ""


def test_a_template_that_trims_is_noted(tmp_path: Path) -> None:
    run = make_run(tmp_path, template=LLAMA3, bos="<|begin_of_text|>")
    assert write_modelfile(run) == ""
    assert "white space" in run.manifest()["modelfile"]["note"]


def test_files_for_the_hub() -> None:
    text = Modelfile("./gguf/model-q8_0.gguf", "{{ .System }}", "S", {"stop": ["a", "b"], "num_ctx": ["4096"]}).dump()
    files = repository_files(text, gguf="mine-Q8_0.gguf")
    assert parse(files["Modelfile"]).source == "./mine-Q8_0.gguf"
    assert files["template"] == "{{ .System }}" and files["system"] == "S"
    assert json.loads(files["params"]) == {"stop": ["a", "b"], "num_ctx": 4096}


@pytest.mark.parametrize(
    "template",
    [
        "{{- .System }}",
        "{{ .System",
        "{{ if .System }}",
        "{{ end }}",
        "{{ .System | upper }}",
        "{{ with .X }}{{ end }}",
        "{{}}",
    ],
)
def test_what_is_not_in_the_subset_is_refused(template: str) -> None:
    with pytest.raises(TemplateSyntaxError):
        execute(template, {"System": "x", "Messages": []})


def test_else_if_and_quotes() -> None:
    chained = '{{ if eq .A "1" }}one{{ else if eq .A "2" }}two{{ else }}more{{ end }}.'
    assert [execute(chained, {"A": value}) for value in ("1", "2", "3")] == ["one.", "two.", "more."]
    nasty = 'a "b" \\ {{ }} \n\t \u200b\u2028'
    assert execute(quote(nasty), {}) == nasty


def make_run(root: Path, *, template: str = CHATML, bos: str | None = None, system: str = "") -> RunFolder:
    """Return a run with a tokenizer, a file where its GGUF is, and held-out conversations."""
    run = RunFolder.create(root / "run", config={})
    make_tokenizer(template, bos=bos).save_pretrained(run.root / "adapter")
    (run.root / "gguf").mkdir()
    for quant in ("f16", "q8_0"):
        (run.root / "gguf" / f"model-{quant}.gguf").write_bytes(b"GGUF")
        run.record(f"gguf/model-{quant}.gguf", run.root / "gguf" / f"model-{quant}.gguf")
    (run.root / "data").mkdir()
    spaced = [Conversation((Message("user", f"two  spaces {n}"), Message("assistant", "yes")), "") for n in range(2)]
    write_jsonl(run.root / "data" / "heldout.jsonl", [*make_conversations(3), *spaced])
    run.update(system_prompt=system)
    return run
