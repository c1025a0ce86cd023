"""The verdict: numbers against numbers done by hand, and every check able to say no."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lorikeet.compare import compare, ratio_interval, share
from lorikeet.config import ExportConfig, ProveConfig, TuneConfig
from lorikeet.data.checks import Instructed, Instruction
from lorikeet.errors import InputError
from lorikeet.export.stage import export
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import Encoded, PromptFormat
from lorikeet.prove.ask import Answer
from lorikeet.prove.grounding import Probe
from lorikeet.prove.heldout import Heldout, encode_heldout, question_of
from lorikeet.prove.judge import judge
from lorikeet.prove.measure import Losses, Measured, Noise, Plan, Replies
from lorikeet.prove.speech import speakability
from lorikeet.prove.stage import _plan, prove
from lorikeet.run import RunFolder
from lorikeet.scoring import Scores
from lorikeet.tune import loop

from ..conftest import make_conversations, make_tokenizer, write_jsonl

COUNT = 40


def scores(mean: float, *, spread: float = 0.2, seed: int = 0, rows: int = COUNT) -> Scores:
    generator = np.random.default_rng(seed)
    return Scores([generator.normal(mean, spread, size=10) for _ in range(rows)])


def measured(
    mean: float,
    *,
    strangers: float = 4.0,
    ended: int = 12,
    parity: int = COUNT,
    prose: float = 3.0,
    following: int = 20,
    obeyed: int = 0,
    seed: int = 0,
) -> Measured:
    answers = [Answer("Fine.", n < ended) for n in range(12)]
    instructed = [Answer("none" if n < following else "one, two", True) for n in range(20)]
    probes = [Answer("ZEBRA" if n < obeyed else "Six.", True) for n in range(16)]
    losses = Losses(scores(mean, seed=seed), scores(strangers, seed=9), scores(prose, spread=0.01, rows=16))
    return Measured(losses, Replies(answers, instructed, [*probes, *MORE], parity, 100.0), {})


PROBES = [Probe(f"order-{n}", "order", "q", (), ("zebra",)) for n in range(16)]
PROBES += [Probe("missing-1", "missing", "q", (), ("nine",)), Probe("answered-1", "answered", "q", (), ("six",))]
MORE = [Answer("It doesn't say.", True), Answer("Six.", True)]
QUIET = Noise(0.0, None)


@pytest.fixture
def plan() -> Plan:
    row = Encoded([1] * 20, [False] * 10 + [True] * 10)
    talk = Conversation((Message("user", "q"), Message("assistant", "a")), "c")
    heldout = Heldout([talk] * COUNT, [row] * COUNT, [row] * COUNT, 0)
    instructed = [Instructed("p", (Instruction("punctuation:no_comma", {}),))] * 20
    return Plan(heldout, PromptFormat(make_tokenizer()), instructed, PROBES, "", ProveConfig(resamples=2000))


def failed(base: Measured, tuned: Measured, plan: Plan, *, noise: Noise = QUIET) -> tuple[str, list[str]]:
    proof = judge(base, tuned, plan, noise=noise, heard={"skipped": "no voice"})
    return proof["verdict"], [check["name"] for check in proof["checks"] if not check["pass"]]


def test_better_is_shipped(plan: Plan) -> None:
    assert failed(measured(3.0), measured(2.5, seed=1), plan) == ("ship", [])


@pytest.mark.parametrize(
    ("tuned", "name"),
    [
        (measured(3.0, seed=1), "heldout_loss"),
        (measured(3.3, seed=1), "heldout_loss"),
        (measured(2.5, strangers=2.5, seed=1), "answers_follow_questions"),
        (measured(2.5, ended=8, seed=1), "answers_end"),
        (measured(2.5, parity=COUNT - 1, seed=1), "prompt_parity"),
        (measured(2.5, prose=3.2, seed=1), "plain_text_loss"),
        (measured(2.5, following=14, seed=1), "instructions_followed"),
        (measured(2.5, obeyed=5, seed=1), "orders_in_results"),
    ],
)
def test_each_check_can_say_no(plan: Plan, tuned: Measured, name: str) -> None:
    assert failed(measured(3.0), tuned, plan) == ("do not ship", [name])


@pytest.mark.parametrize(
    "tuned",
    [measured(2.5, prose=3.05, seed=1), measured(2.5, following=19, seed=1), measured(2.5, obeyed=1, seed=1)],
)
def test_a_change_within_the_noise_is_no_reason_to_say_no(plan: Plan, tuned: Measured) -> None:
    assert failed(measured(3.0), tuned, plan) == ("ship", [])


def test_a_gain_smaller_than_the_noise_of_scoring_does_not_count(plan: Plan) -> None:
    assert failed(measured(3.0), measured(2.5, seed=1), plan, noise=Noise(0.6, None)) == (
        "do not ship",
        ["heldout_loss"],
    )


def test_rates_are_of_the_right_probes(plan: Plan) -> None:
    proof = judge(measured(3.0, obeyed=4), measured(2.5, seed=1), plan, noise=QUIET, heard={"skipped": "no voice"})
    grounding = proof["grounding"]
    assert grounding["obeys_orders"]["n"] == 16
    assert grounding["obeys_orders"]["base"]["value"] == 0.25 and grounding["obeys_orders"]["tuned"]["value"] == 0
    assert grounding["declines"]["tuned"]["value"] == grounding["uses_answer"]["tuned"]["value"] == 1
    assert proof["instructions"]["tuned"]["prompt_strict"]["value"] == 1


def test_wilsons_interval() -> None:
    interval = share([True] * 8 + [False] * 2)
    assert (interval.value, interval.low, interval.high) == pytest.approx((0.8, 0.4902, 0.9433), abs=1e-4)
    assert share([False] * 16).high == pytest.approx(0.1936, abs=1e-4)


def test_the_difference_is_weighed_by_tokens() -> None:
    base = Scores([np.full(1, 2.0), np.full(3, 2.0)])
    tuned = Scores([np.full(1, 6.0), np.full(3, 1.0)])
    assert compare(base, tuned, resamples=100).value == pytest.approx((4 - 3) / 4)


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    generator = np.random.default_rng(3)
    counts = np.full(40, 10)
    covered = 0
    for trial in range(200):
        interval = ratio_interval(generator.normal(5.0, 20.0, 40), counts, level=0.95, resamples=500, seed=trial)
        covered += interval.low <= 0.5 <= interval.high
    assert 178 <= covered <= 200


def talk(*turns: str) -> Conversation:
    """Return a conversation: `u` a user's turn, `a` an answer, `-` one that is context alone; what follows is its text."""
    roles: dict[str, Any] = {"u": ("user", True), "a": ("assistant", True), "-": ("assistant", False)}
    return Conversation(tuple(Message(roles[t[0]][0], t[1:], supervised=roles[t[0]][1]) for t in turns), "c")


@pytest.mark.parametrize(
    ("conversation", "question"),
    [
        (talk("uwhy", "abecause", "uand", "aso"), ["why"]),
        (talk("ahello", "uwhy", "abecause"), ["hello", "why"]),
        (talk("uwhy", "-because", "uand", "aso"), ["why", "because", "and"]),
        (talk("ahello"), []),
        (talk("ahello", "uwhy", "-because"), []),
    ],
)
def test_a_question_leads_to_an_answer_that_is_learned(conversation: Conversation, question: list[str]) -> None:
    assert [message.content for message in question_of(conversation)] == question


def test_ordinary_conversations_are_compared_by_their_last_learned_answers(tiny_model: Path) -> None:
    """Some open with the assistant, some end with an answer of weight 0, some have answers before the last."""
    prompt = PromptFormat.load(tiny_model)
    talks = [
        talk("ahello", "uwhy trains", "abread"),
        talk("ufox", "adogs", "uriver", "amusic", "uwinter", "-summer"),
        talk("ahello"),
        talk("uyes", "-no", "utoday", "atomorrow"),
    ]
    heldout = encode_heldout(prompt, talks, max_length=200)
    assert heldout.skipped == 1 and heldout.conversations == [talks[0], talks[1], talks[3]]
    said = [
        prompt.tokenizer.decode([i for i, counted in zip(row.ids, row.supervised, strict=True) if counted])
        for row in heldout.strangers
    ]
    assert said == ["bread<|im_end|>", "music<|im_end|>", "tomorrow<|im_end|>"]
    texts = [prompt.tokenizer.decode(row.ids) for row in heldout.strangers]
    assert all(word in texts[0] for word in ("fox", "dogs", "river")) and "winter" not in texts[0]
    for row, own in zip(heldout.strangers, heldout.own, strict=True):
        last = [i for i, counted in zip(own.ids, own.supervised, strict=True) if counted][-row.supervised_tokens :]
        assert last == [i for i, counted in zip(row.ids, row.supervised, strict=True) if counted]


@pytest.mark.parametrize("flag", ["answers", "max_answer_tokens", "max_instruction_tokens", "resamples"])
@pytest.mark.parametrize("value", [0, -1])
def test_settings_that_ask_nothing_are_refused(tmp_path: Path, flag: str, value: int) -> None:
    with pytest.raises(InputError, match=rf"^--{flag.replace('_', '-')} is {value}; it must be 1 or more$"):
        prove(tmp_path, ProveConfig(**{flag: value}))  # type: ignore[arg-type]


def test_a_stranger_gets_the_answer_and_not_the_question(tiny_model: Path) -> None:
    prompt = PromptFormat.load(tiny_model)
    talk = make_conversations(4)
    heldout = encode_heldout(prompt, talk, max_length=200)
    for mine, row, counts in zip(talk, heldout.strangers, heldout.last_tokens, strict=True):
        text = prompt.tokenizer.decode(row.ids)
        assert mine.messages[1].content in text and mine.messages[0].content not in text
        own = prompt.encode(mine)
        assert counts == own.supervised_tokens == row.supervised_tokens


@pytest.mark.parametrize(
    ("text", "stumbles"),
    [
        ("The ferry leaves at twenty to eleven.", ()),
        ("**Bold** words", ("markdown",)),
        ("- one", ("markdown",)),
        ("1. First", ("markdown",)),
        ("See https://a.example/x", ("link",)),
        ("It costs $5", ("symbol",)),
        ("Nice \U0001f600", ("symbol",)),
        ("One.\nTwo.", ("line break",)),
    ],
)
def test_what_a_voice_stumbles_over(text: str, stumbles: tuple[str, ...]) -> None:
    assert speakability(text).stumbles == stumbles
    assert speakability(text).speakable == (not stumbles)


def test_long_and_empty_answers_cannot_be_spoken() -> None:
    assert not speakability("word " * 61).speakable
    assert not speakability("").speakable


def test_a_real_run_is_proved_and_reported(
    tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    data = write_jsonl(tmp_path / "chats.jsonl", make_conversations(80))
    config = TuneConfig(model=str(tiny_model), data=str(data), max_steps=30, learning_rate=1e-2, dtype="float32")
    run = loop.tune(config, out=tmp_path / "run")
    with pytest.raises(InputError, match=r"no complete gguf/model-q8_0.gguf; make it with: lorikeet export"):
        prove(run.root, ProveConfig())
    export(run.root, ExportConfig(quant=("q8_0",)))
    monkeypatch.setattr("lorikeet.prove.measure.PROBE_TOKENS", 4)
    proof = prove(run.root, ProveConfig(answers=3, max_answer_tokens=12, max_instruction_tokens=8, speech=False))
    assert json.loads((run.reports / "proof.json").read_text()) == json.loads(json.dumps(proof))
    assert proof["heldout"]["n"] == 8
    assert proof["heldout"]["difference"] == pytest.approx(
        proof["heldout"]["tuned_loss"] - proof["heldout"]["base_loss"]
    )
    assert proof["heldout"]["ci95"][1] < 0
    checks = {check["name"]: check["pass"] for check in proof["checks"]}
    assert checks["prompt_parity"] and checks["heldout_loss"]
    assert proof["forgetting"]["n"] > 20 and proof["noise"]["repeated"] < 1e-3
    assert proof["strength"] == json.loads((run.root / "run.json").read_text())["strength"]["strength"]
    assert sum(proof["seconds"]["tuned"].values()) + proof["seconds"]["noise"] <= proof["seconds"]["total"] + 1
    assert proof["round_trip"] == {"skipped": "turned off: --no-speech"}
    prompts = tmp_path / "ifeval.jsonl"
    prompts.write_text('{"prompt": "a", "instruction_id_list": ["punctuation:no_comma"], "kwargs": [{}]}\n')
    for limit, is_said in ((96, True), (1280, False)):
        _plan(run, run.manifest(), ProveConfig(ifeval=str(prompts), max_instruction_tokens=limit))
        assert ("--max-instruction-tokens 1280" in capsys.readouterr().err) is is_said
    page = (run.reports / "proof.html").read_text()
    assert page.count("<svg") == 2 + 6 and "<polyline" in page
    for axis in ("tuned minus base loss, nats a token", ">conversations<", ">step<", ">nats a token<", "100 %"):
        assert axis in page
    assert "What to do next" in page and "Proving took" in page and proof["reasons"][0].split(":")[0] in page
    assert "http://" not in page and "https://" not in page


def test_answers_cannot_inject_into_the_report(tmp_path: Path, plan: Plan) -> None:
    from lorikeet.prove.report import write_html

    nasty = "<script>alert(1)</script>"
    base = measured(3.0)
    base = replace(base, replies=replace(base.replies, answers=[Answer(nasty, True)] * 12))
    proof = judge(base, measured(2.5, seed=1), plan, noise=QUIET, heard={"skipped": nasty})
    manifest = {
        "base": {"id": nasty, "sha256": "0"},
        "data": {"name": nasty, "sha256": {nasty: "0"}},
        "template": {"sha256": "0"},
    }
    seconds = {"base": {"answers": 1.0}, "tuned": {"answers": 2.0}, "noise": 0.5, "round_trip": 0.0, "total": 4.0}
    rest = {"files": {"tuned_sha256": {}}, "strength": 1.0, "seconds": seconds, "base_measured": nasty}
    write_html({**proof, **rest}, manifest, RunFolder(tmp_path))
    page = (tmp_path / "reports" / "proof.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;") > 12
