"""Prompts with verifiable instructions, answered and counted; answers that can be resumed.

    answers = answer_prompts(asking, load_prompts(None), max_tokens=96, kept=None, done=done)
    score = accuracy(prompts, base_answers, tuned_answers, resamples=10_000)

Asked without the run's system prompt, as IFEval is: a guard of general ability. The prompts are those of `data.instructions`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.compare import ratio_interval, share
from lorikeet.data.checks import Instructed, followed
from lorikeet.files import sha256_file, sha256_text
from lorikeet.messages import Message
from lorikeet.prove.ask import Answer, Asking, Done

IFEVAL_TOKENS = 1280
"""Longest answer that IFEval's own authors allowed."""

REPORT_EVERY_S = 20.0


def answer_prompts(
    asking: Asking, prompts: Sequence[Instructed], *, max_tokens: int, kept: Path | None, done: Done
) -> list[Answer]:
    """Return the answers. With `kept`, each is appended to that file, and what it holds of this very question is not asked again.

    Progress with the rate and the time left goes to stderr for a long set.
    """
    gguf = asking.engine.path
    known = _Kept(kept, gguf, prompts, max_tokens) if kept else None
    answers = list(known.answers) if known else []
    for _ in answers:
        done()
    if answers:
        print(f"{gguf.name}: {len(answers)}/{len(prompts)} prompts were answered before", file=sys.stderr, flush=True)
    progress = _Progress(gguf.name, len(answers), len(prompts))
    rest = [[Message("user", prompt.prompt)] for prompt in prompts[len(answers) :]]
    for answer in asking.start(rest, max_tokens=max_tokens):
        answers.append(answer)
        done()
        if known:
            known.add(answer)
        progress.say(len(answers))
    return answers


def keep_answers(
    kept: Path, gguf: Path, prompts: Sequence[Instructed], *, max_tokens: int, answers: Sequence[Answer]
) -> None:
    """Write all `answers` of the model in `gguf` to the file `kept`, as `answer_prompts` leaves them there."""
    known = _Kept(kept, gguf, prompts, max_tokens)
    for answer in answers[len(known.answers) :]:
        known.add(answer)


class _Progress:
    """A line with the rate and the time left, now and then, counted from the first answer."""

    def __init__(self, name: str, answered: int, total: int) -> None:
        self._name, self._first, self._total = name, answered + 1, total
        self._began_s = self._told_s = 0.0

    def say(self, answered: int) -> None:
        now_s = time.monotonic()
        if answered == self._first:
            self._began_s = self._told_s = now_s
        if now_s - self._told_s > REPORT_EVERY_S:
            rate = (answered - self._first) / (now_s - self._began_s)
            left_min = (self._total - answered) / rate / 60
            print(
                f"{self._name}: {answered}/{self._total} prompts, {60 * rate:.0f} a minute, {left_min:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
            self._told_s = now_s


class _Kept:
    """Answers on the disk: a line that says whose they are and to what, then one a line, in the prompts' order."""

    def __init__(self, path: Path, gguf: Path, prompts: Sequence[Instructed], max_tokens: int) -> None:
        """Read what is there, if it is of the same model, prompts and limit; else start over."""
        asked = sha256_text(json.dumps([prompt.prompt for prompt in prompts]))
        head = json.dumps({"model_sha256": sha256_file(gguf), "prompts_sha256": asked, "max_tokens": max_tokens})
        self._path = path
        self.answers: list[Answer] = []
        lines = path.read_text(encoding="utf-8").split("\n") if path.is_file() else []
        if lines and lines[0] == head:
            for line in lines[1:-1]:  # what follows the last line break was cut off
                self.answers.append(Answer(**json.loads(line)))
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join([head, *(json.dumps(asdict(a)) for a in self.answers), ""]), encoding="utf-8")

    def add(self, answer: Answer) -> None:
        """Append one answer."""
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(asdict(answer)) + "\n")


def accuracy(
    prompts: Sequence[Instructed], base: Sequence[Answer], tuned: Sequence[Answer], *, resamples: int
) -> dict[str, Any]:
    """Return strict and loose accuracy of both models by prompt and by instruction, and the difference that the verdict uses.

    Intervals are 95 %: Wilson's for prompts, a bootstrap over prompts for instructions and for the difference.
    """
    result: dict[str, Any] = {"prompts": len(prompts), "instructions": sum(len(p.instructions) for p in prompts)}
    counts = np.array([len(p.instructions) for p in prompts])
    strict: dict[str, Any] = {}
    for who, answers in (("base", base), ("tuned", tuned)):
        result[who] = {}
        for kind in ("strict", "loose"):
            verdicts = [followed(p, a.text, loose=kind == "loose") for p, a in zip(prompts, answers, strict=True)]
            sums = np.array([sum(v) for v in verdicts], dtype=np.float64)
            by_instruction = ratio_interval(sums, counts, level=0.95, resamples=resamples, seed=3)
            result[who][f"prompt_{kind}"] = asdict(share([all(v) for v in verdicts]))
            result[who][f"instruction_{kind}"] = asdict(by_instruction)
            strict.setdefault(kind, {})[who] = sums
    change = strict["strict"]["tuned"] - strict["strict"]["base"]
    result["difference"] = asdict(ratio_interval(change, counts, level=0.95, resamples=resamples, seed=4))
    return result
