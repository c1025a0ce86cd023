"""What the base does, kept by content: the same file, asked the same things with the same engine, is measured once.

    base = measure_base(gguf, plan, kept=None, done=...)
    base.created                                # when its losses and answers were measured: now, or on an earlier run

The key is the hash of the file's bytes, of every token that is scored, of every turn that is answered, of the limits, and of
what computes. Its speed is measured anew each time, beside the tuned model's, and `measure.measure_noise` scores some of the
conversations again, so kept losses that this machine would not give make the noise that the verdict allows for.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lorikeet.data.prose import prose_rows
from lorikeet.files import sha256_file, sha256_text, write_atomic
from lorikeet.prove.ask import SLOTS, Answer, decode_speed
from lorikeet.prove.instructions import keep_answers
from lorikeet.prove.measure import PROBE_TOKENS, Done, Losses, Measured, Plan, Replies, answering, measure, timed
from lorikeet.run import environment
from lorikeet.scoring import Scores
from lorikeet.weights import cache_folder

FORMAT = 1
"""Of what is kept; it changes with what `_as_dict` writes or how it is measured."""


@dataclass(frozen=True, slots=True)
class Base:
    """What the base did, and when."""

    measured: Measured
    created: str
    """When losses and answers were measured, UTC."""


def measure_base(gguf: Path, plan: Plan, *, kept: Path | None, done: Done) -> Base:
    """Return what the base in `gguf` does; its answers to instructions are kept in the file `kept`, if any."""
    file = cache_folder() / "proofs" / f"{key(gguf, plan)}.json"
    known = _read(file)
    if known is None:
        measured = measure(gguf, plan, strangers=False, kept=kept, done=done)
        created = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write_atomic(file, json.dumps({"created": created, **_as_dict(measured)}))
        return Base(measured, created)
    seconds: dict[str, float] = {}
    with answering(gguf, plan) as engine, timed(seconds, "decoding_speed"):
        speed = decode_speed(engine, plan.prompt.prompt_ids(plan.questions[0]))
    measured = _from_dict(known, tokens_per_s=speed, seconds=seconds)
    if kept:
        limit = plan.config.max_instruction_tokens
        keep_answers(kept, gguf, plan.instructed, max_tokens=limit, answers=measured.replies.instructed)
    for _ in range(_steps(measured)):
        done()
    return Base(measured, known["created"])


def key(gguf: Path, plan: Plan) -> str:
    """Return the name of all that the base's losses and answers depend on."""
    asked = [*plan.questions, *plan.probe_questions]
    config, here = plan.config, environment()
    what = {
        "format": FORMAT,
        "file": sha256_file(gguf),
        "scored": [[row.ids, row.supervised] for row in (*plan.heldout.own, *prose_rows(plan.prompt))],
        "asked": [[message.as_dict() for message in question] for question in asked],
        "instructed": [instructed.prompt for instructed in plan.instructed],
        "limits": [config.max_answer_tokens, PROBE_TOKENS, config.max_instruction_tokens, SLOTS],
        "engine": [here["versions"].get(name) for name in ("lorikeet", "xllamacpp", "numpy")],
        "machine": here["hardware"],
    }
    return sha256_text(json.dumps(what))[:32]


def _read(file: Path) -> dict[str, Any] | None:
    """Return what the file holds; None if it is not there. It appears whole or not at all."""
    if not file.is_file():
        return None
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return known


def _as_dict(measured: Measured) -> dict[str, Any]:
    losses, replies = measured.losses, measured.replies
    answers = {"answers": replies.answers, "instructed": replies.instructed, "probes": replies.probes}
    return {
        "own": [row.tolist() for row in losses.own.by_token],
        "prose": [row.tolist() for row in losses.prose.by_token],
        **{name: [asdict(answer) for answer in found] for name, found in answers.items()},
        "parity": replies.parity,
    }


def _from_dict(known: dict[str, Any], *, tokens_per_s: float, seconds: dict[str, float]) -> Measured:
    own, prose = (Scores([np.array(row) for row in known[name]]) for name in ("own", "prose"))
    answers, instructed, probes = ([Answer(**a) for a in known[name]] for name in ("answers", "instructed", "probes"))
    replies = Replies(answers, instructed, probes, known["parity"], tokens_per_s)
    return Measured(Losses(own, Scores([]), prose), replies, seconds)


def _steps(measured: Measured) -> int:
    """Return how often `done` would have been called."""
    losses, replies = measured.losses, measured.replies
    rows = (losses.own.by_token, losses.prose.by_token, replies.answers, replies.instructed, replies.probes)
    return sum(len(part) for part in rows)
