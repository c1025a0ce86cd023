"""The proof stage: an exported run -> `reports/proof.json`, `reports/proof.html`, and a verdict that can be no.

    proof = prove(Path("runs/mine"), ProveConfig())
    proof["verdict"]                                   # "ship" or "do not ship"

Base and tuned model are compared as GGUF files of the same type, by the engine that serves, on held-out conversations.
The verdict is `ship` if every check passes:

- `heldout_loss`: the tuned model's loss is lower, and the 95 % interval of the difference excludes 0;
- `answers_follow_questions`: answers are more probable after their own question than after another's (99 % interval).
  Data whose answers have nothing to do with the questions lowers the loss too, by style alone, and is caught here;
- `answers_end`: the tuned model's answers end by themselves about as often as the base's;
- `prompt_parity`: the template in the file gives exactly the tokens that tuning saw.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lorikeet.card import write_card
from lorikeet.config import ProveConfig
from lorikeet.data.load import load_conversations
from lorikeet.engine import LlamaEngine
from lorikeet.errors import InputError
from lorikeet.files import write_atomic
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import Encoded, PromptFormat
from lorikeet.prove.compare import compare, ratio_interval
from lorikeet.prove.report import write_html
from lorikeet.prove.speech import Speakability, speakability
from lorikeet.run import RunFolder
from lorikeet.scoring import Scorer, Scores
from lorikeet.weights import base_gguf_path

MOST_STRANGERS = 24
"""Answers scored after a stranger's question: the effect is large, so few conversations show it."""

ENDING_TOLERANCE = 0.25
"""How much rarer the tuned model's answers may end by themselves: three of twelve."""

Done = Callable[[], None]


@dataclass(frozen=True, slots=True)
class Heldout:
    """Held-out conversations, encoded in their own context and in a stranger's."""

    conversations: list[Conversation]
    own: list[Encoded]
    strangers: list[Encoded]
    """The last answer of the first ones after the context of another; only that answer is supervised."""
    skipped: int
    """Conversations longer than max_length, or that the template refuses."""

    @property
    def last_tokens(self) -> list[int]:
        """Supervised tokens of each last answer."""
        return [row.supervised_tokens for row in self.strangers]


@dataclass(frozen=True, slots=True)
class Answer:
    """One model's answer to a held-out question."""

    text: str
    ended: bool
    """Whether it ended by itself, not at the token limit."""
    speech: Speakability


@dataclass(frozen=True, slots=True)
class Measured:
    """What one GGUF file did."""

    own: Scores
    strangers: Scores
    """Empty for the base, which is not asked."""
    answers: list[Answer]
    parity: int
    """Questions whose tokens from the file's own template and tokenizer equal those of tuning."""
    tokens_per_s: float
    """Decoding speed over the answers."""


def prove(root: Path, config: ProveConfig) -> dict[str, Any]:
    """Compare base and tuned model, write the reports and return what `proof.json` holds.

    Raises InputError if the run is not exported.
    """
    run = RunFolder.open(root)
    name = f"gguf/model-{config.quant}.gguf"
    tuned_gguf = run.require(name, command="lorikeet export")
    run.verify(name)
    manifest = run.manifest()
    base_gguf = base_gguf_path(manifest, config.quant)
    if not base_gguf.is_file():
        raise InputError(
            f"the base of {root} is not in the cache as {config.quant}; make it with: lorikeet export {root}"
        )
    heldout_file = run.require("data/heldout.jsonl", command="lorikeet tune")
    run.verify("data/heldout.jsonl")
    prompt = PromptFormat.load(run.require("adapter", command="lorikeet tune"))
    conversations = load_conversations(str(heldout_file)).conversations
    heldout = encode_heldout(prompt, conversations, max_length=manifest["config"]["tune"]["max_length"])
    with _progress(2 * len(heldout.own) + len(heldout.strangers) + 2 * min(config.answers, len(heldout.own))) as done:
        base = measure(base_gguf, replace(heldout, strangers=[]), prompt, config, done)
        tuned = measure(tuned_gguf, heldout, prompt, config, done)
    proof = judge(base, tuned, heldout, config)
    proof["files"] = {"tuned": name, "tuned_sha256": manifest["artefacts"][name]["sha256"], "base": manifest["base"]}
    write_atomic(run.reports / "proof.json", json.dumps(proof, indent=2) + "\n")
    write_html(proof, manifest, run.reports)
    run.update(proof={"verdict": proof["verdict"], "quant": config.quant})
    write_card(run)
    return proof


def encode_heldout(prompt: PromptFormat, conversations: Sequence[Conversation], *, max_length: int) -> Heldout:
    """Return the conversations that fit, each with the next one's context as the stranger's. Raises InputError if under 2 fit."""
    kept, own = [], []
    for conversation in conversations:
        try:
            row = prompt.encode(conversation)
        except InputError:
            continue
        if len(row.ids) <= max_length and row.supervised_tokens:
            kept.append(conversation)
            own.append(row)
    if len(kept) < 2:
        raise InputError(f"{len(kept)} held-out conversations fit into {max_length} tokens; at least 2 are needed")
    strangers = []
    for conversation, other in zip(kept[:MOST_STRANGERS], [*kept[1:], kept[0]], strict=False):
        swapped = Conversation((*other.messages[:-1], conversation.messages[-1]), conversation.origin)
        strangers.append(only_last_answer(prompt.encode(swapped)))
    return Heldout(kept, own, strangers, len(conversations) - len(kept))


def only_last_answer(row: Encoded) -> Encoded:
    """Return `row` with nothing supervised but its last answer."""
    end = max(place for place, counted in enumerate(row.supervised) if counted) + 1
    start = end
    while start and row.supervised[start - 1]:
        start -= 1
    return Encoded(row.ids, [start <= place < end for place in range(len(row.ids))])


def measure(gguf: Path, heldout: Heldout, prompt: PromptFormat, config: ProveConfig, done: Done) -> Measured:
    """Score the held-out conversations with the model in `gguf`, and let it answer the first questions greedily."""
    longest = max(len(row.ids) for row in (*heldout.own, *heldout.strangers))
    with LlamaEngine(gguf, scoring=True, context_tokens=longest + 1) as engine:
        scorer = Scorer(engine)
        own = scorer.score(heldout.own, done=done)
        strangers = scorer.score(heldout.strangers, done=done)
    questions = [_question(conversation) for conversation in heldout.conversations]
    with LlamaEngine(gguf, context_tokens=longest + config.max_answer_tokens) as engine:
        parity = sum(engine.tokenize(engine.render(q)) == prompt.prompt_ids(q) for q in questions)
        answers, tokens, decoding_s = [], 0, 0.0
        for question in questions[: config.answers]:
            answer, count, seconds = _answer(engine, question, config)
            answers.append(answer)
            tokens += count
            decoding_s += seconds
            done()
    return Measured(own, strangers, answers, parity, round(tokens / decoding_s, 1))


def judge(base: Measured, tuned: Measured, heldout: Heldout, config: ProveConfig) -> dict[str, Any]:
    """Return the proof: the verdict, its checks, and everything that the reports show."""
    difference = compare(base.own, tuned.own, resamples=config.resamples)
    own_last = Scores(tuned.own.by_token[: len(heldout.strangers)]).last(heldout.last_tokens)
    follows = ratio_interval(
        tuned.strangers.loss - own_last.loss, own_last.tokens, level=0.99, resamples=config.resamples, seed=1
    )
    ended = {"base": _share(a.ended for a in base.answers), "tuned": _share(a.ended for a in tuned.answers)}
    checks = [
        _check("heldout_loss", difference.high, "below 0", passed=difference.high < 0),
        _check("answers_follow_questions", follows.low, "above 0", passed=follows.low > 0),
        _check(
            "answers_end",
            ended["tuned"],
            f"at least {max(0.0, ended['base'] - ENDING_TOLERANCE):.2f}",
            passed=ended["tuned"] >= ended["base"] - ENDING_TOLERANCE,
        ),
        _check("prompt_parity", tuned.parity / len(heldout.own), "exactly 1", passed=tuned.parity == len(heldout.own)),
    ]
    spoken = {
        who: {
            "speakable": _share(a.speech.speakable for a in measured.answers),
            "mean_words": round(sum(a.speech.words for a in measured.answers) / len(measured.answers), 1),
            "stumbles": _share(bool(a.speech.stumbles) for a in measured.answers),
        }
        for who, measured in (("base", base), ("tuned", tuned))
    }
    return {
        "verdict": "ship" if all(check["pass"] for check in checks) else "do not ship",
        "quant": config.quant,
        "heldout": {
            "n": len(heldout.own),
            "skipped": heldout.skipped,
            "tokens": int(base.own.tokens.sum()),
            "base_loss": base.own.mean,
            "tuned_loss": tuned.own.mean,
            "difference": difference.value,
            "ci95": [difference.low, difference.high],
        },
        "checks": checks,
        "answers_follow_questions": asdict(follows),
        "answers_end": ended,
        "speakability": spoken,
        "decode_tokens_per_s": {"base": base.tokens_per_s, "tuned": tuned.tokens_per_s},
        "per_conversation": [
            {"id": c.origin, "base": b / n, "tuned": t / n}
            for c, b, t, n in zip(
                heldout.conversations, base.own.loss, tuned.own.loss, base.own.tokens.tolist(), strict=True
            )
        ],
        "answers": [
            {"question": _question(c)[-1].content, "wanted": c.messages[len(_question(c))].content}
            | {"base": asdict(b), "tuned": asdict(t)}
            for c, b, t in zip(heldout.conversations, base.answers, tuned.answers, strict=False)
        ],
    }


def _question(conversation: Conversation) -> tuple[Message, ...]:
    """Return the turns before the first answer."""
    first = next(index for index, message in enumerate(conversation.messages) if message.role == "assistant")
    return conversation.messages[:first]


def _answer(engine: LlamaEngine, question: Sequence[Message], config: ProveConfig) -> tuple[Answer, int, float]:
    """Return the greedy answer through the served path, its tokens, and the seconds from its first piece to its end."""
    text, ended, tokens = "", False, 0
    first = 0.0
    for delta in engine.stream(question, max_tokens=config.max_answer_tokens, temperature=0.0, seed=0):
        first = first or time.monotonic()
        text += delta.text
        ended = delta.finish_reason == "stop"
        tokens = delta.usage.completion_tokens if delta.usage else tokens
    return Answer(text, ended, speakability(text)), tokens, max(1e-9, time.monotonic() - first)


def _check(name: str, value: float, limit: str, *, passed: bool) -> dict[str, Any]:
    return {"name": name, "value": round(value, 4), "limit": limit, "pass": bool(passed)}


def _share(flags: Iterator[bool]) -> float:
    values = list(flags)
    return round(sum(values) / len(values), 3)


@contextmanager
def _progress(total: int) -> Iterator[Done]:
    """Give a function that counts a conversation scored or a question answered."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("proving"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        if not console.is_terminal:
            print("proving: base and tuned model on held-out conversations", file=sys.stderr, flush=True)
        yield lambda: bar.advance(task)
