"""Prompts with verifiable instructions: the packaged thirty-two, or any file in IFEval's layout; answers that can be resumed.

    prompts = load_prompts(None)                     # packaged; or load_prompts(Path("ifeval-541.jsonl"))
    score = accuracy(prompts, base_answers, tuned_answers, resamples=10_000)

Asked without the run's system prompt, as IFEval is: a guard of general ability. `checks` says what follows an instruction.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.engine import LlamaEngine
from lorikeet.errors import InputError
from lorikeet.files import sha256_file, sha256_text
from lorikeet.messages import Message
from lorikeet.prove.ask import Answer, Done, ask_each
from lorikeet.prove.checks import Instructed, followed, parse_instruction
from lorikeet.prove.compare import ratio_interval, share

REPORT_EVERY_S = 20.0


def load_prompts(file: Path | None) -> list[Instructed]:
    """Return the prompts of `file`, or the packaged ones. Raises InputError, naming the line, for what cannot be checked."""
    if file is None:
        text = resources.files("lorikeet.prove").joinpath("instructions.jsonl").read_text(encoding="utf-8")
    elif file.is_file():
        text = file.read_text(encoding="utf-8")
    else:
        raise InputError(f"--ifeval {file} is not there; give a JSONL file in IFEval's layout")
    prompts = []
    for number, line in enumerate(text.splitlines(), start=1):
        if line.strip():
            prompts.append(_prompt(line, f"{file or 'the packaged prompts'}:{number}"))
    if not prompts:
        raise InputError(f"{file} holds no prompts; give a JSONL file in IFEval's layout")
    return prompts


def _prompt(line: str, origin: str) -> Instructed:
    try:
        row = json.loads(line)
        pairs = list(zip(row["instruction_id_list"], row["kwargs"], strict=True))
        return Instructed(str(row["prompt"]), tuple(parse_instruction(name, values) for name, values in pairs))
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{origin} is no row in IFEval's layout (prompt, instruction_id_list, kwargs): {error}"
        ) from error
    except InputError as error:
        raise InputError(f"{origin}: {error}") from error


def answer_prompts(
    engine: LlamaEngine, prompts: Sequence[Instructed], *, max_tokens: int, kept: Path | None, done: Done
) -> list[Answer]:
    """Return the answers. With `kept`, each is appended to that file, and what it holds of this very question is not asked again.

    Progress with the rate and the time left goes to stderr for a long set.
    """
    known = _Kept(kept, engine.path, prompts, max_tokens) if kept else None
    answers = list(known.answers) if known else []
    for _ in answers:
        done()
    began, told, first = time.monotonic(), time.monotonic(), len(answers)
    rest = [[Message("user", prompt.prompt)] for prompt in prompts[first:]]
    for answer in ask_each(engine, rest, max_tokens=max_tokens):
        answers.append(answer)
        done()
        if known:
            known.add(answer)
        now = time.monotonic()
        if now - told > REPORT_EVERY_S:
            rate = (len(answers) - first) / (now - began)
            left_s = (len(prompts) - len(answers)) / rate
            print(
                f"{engine.path.name}: {len(answers)}/{len(prompts)} prompts, {60 * rate:.0f} a minute, {left_s / 60:.1f} min left",
                file=sys.stderr,
                flush=True,
            )
            told = now
    return answers


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
