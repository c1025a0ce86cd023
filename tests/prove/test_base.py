"""The base is measured once: the same file asked the same gives the same losses and answers without the engine scoring again."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorikeet.config import ProveConfig
from lorikeet.data.instructions import load_prompts
from lorikeet.export.gguf import write_gguf
from lorikeet.prompt import PromptFormat
from lorikeet.prove import base as base_module
from lorikeet.prove.base import key, measure_base
from lorikeet.prove.grounding import load_probes
from lorikeet.prove.heldout import encode_heldout
from lorikeet.prove.measure import Measured, Plan, measure

from ..conftest import make_conversations


@pytest.fixture
def gguf(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "base.gguf"
    write_gguf(tiny_model, path, quant="q8_0", name="tiny")
    return path


@pytest.fixture
def plan(tiny_model: Path) -> Plan:
    prompt = PromptFormat.load(tiny_model)
    config = ProveConfig(answers=2, max_answer_tokens=6, max_instruction_tokens=5)
    heldout = encode_heldout(prompt, make_conversations(4), max_length=200)
    return Plan(heldout, prompt, load_prompts(None)[:3], load_probes()[:2], "Be brief.", config)


def test_the_same_question_is_measured_once(gguf: Path, plan: Plan, monkeypatch: pytest.MonkeyPatch) -> None:
    times: Counter[str] = Counter()

    def counting(*args: Any, **options: Any) -> Measured:
        times["measured"] += 1
        return measure(*args, **options)

    def ask(plan: Plan, *, kept: Path | None = None) -> tuple[Measured, str, int]:
        steps: list[None] = []
        found = measure_base(gguf, plan, kept=kept, done=lambda: steps.append(None))
        return found.measured, found.created, len(steps)

    monkeypatch.setattr(base_module, "measure", counting)
    first, created, steps = ask(plan)
    again, created_again, steps_again = ask(plan)
    assert times["measured"] == 1 and created == created_again and steps == steps_again > 10
    for one, other in ((first.losses.own, again.losses.own), (first.losses.prose, again.losses.prose)):
        assert all(np.array_equal(a, b) for a, b in zip(one.by_token, other.by_token, strict=True))
    assert replace(again.replies, tokens_per_s=0.0) == replace(first.replies, tokens_per_s=0.0)
    assert again.replies.tokens_per_s > 0 and set(again.seconds) == {"decoding_speed"}
    assert {"heldout_loss", "plain_text_loss", "answers", "decoding_speed"} <= set(first.seconds)

    kept = gguf.with_name("ifeval-base.jsonl")
    ask(plan, kept=kept)
    assert times["measured"] == 1 and len(kept.read_text().splitlines()) == 1 + 3


def test_whatever_is_asked_otherwise_is_measured_anew(gguf: Path, plan: Plan) -> None:
    others = [
        replace(plan, config=replace(plan.config, max_answer_tokens=7)),
        replace(plan, config=replace(plan.config, max_instruction_tokens=4)),
        replace(plan, config=replace(plan.config, answers=1)),
        replace(plan, instructed=plan.instructed[:2]),
        replace(plan, probes=plan.probes[:1]),
        replace(plan, system_prompt="Be long."),
        replace(plan, heldout=replace(plan.heldout, own=plan.heldout.own[:3])),
    ]
    keys = [key(gguf, one) for one in (plan, *others)]
    assert key(gguf, replace(plan)) == keys[0]
    gguf.write_bytes(gguf.read_bytes() + b"\0")
    assert len({*keys, key(gguf, plan)}) == len(others) + 2
