"""The whole loop on packaged parts, stage after stage, and a summary of what changed.

    root = run_quickstart(Path("runs/quickstart"), minutes=5)

It calls the stages in their order and hands nothing from one to the next but the run folder.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from lorikeet.config import PACKAGED_DATA, PACKAGED_MODEL, ExportConfig, ProveConfig, TuneConfig, VerifyConfig
from lorikeet.errors import InputError
from lorikeet.run import RunFolder

RECIPE = TuneConfig(
    model=PACKAGED_MODEL,
    data=PACKAGED_DATA,
    max_length=1024,
    epochs=1.0,
    learning_rate=1e-3,
    lora_dropout=0.0,
    eval_steps=25,
    warmup_ratio=0.05,
)
"""The settings of `recipes/quickstart.toml`."""


def run_quickstart(out: Path, *, minutes: float) -> Path:
    """Tune, export and prove in a new folder at or beside `out`; return it. A verdict of no is part of the summary.

    Raises InputError if `minutes` is not above 0.
    """
    from dataclasses import replace

    if not minutes > 0:
        raise InputError(f"--minutes is {minutes}; it must be above 0")
    began = time.monotonic()
    root = _free(out)
    _title(1, "tune", f"{PACKAGED_MODEL} on {PACKAGED_DATA}, at most {minutes:g} min")
    from lorikeet.tune.loop import tune

    tune(replace(RECIPE, max_minutes=minutes), out=root)
    _title(2, "export", "adapter, merged 16-bit, GGUF f16 and q8_0; is each the model that was tuned?")
    from lorikeet.export.stage import export

    export(root, ExportConfig())
    from lorikeet.export.parity import describe, verify

    for line in describe(verify(root, VerifyConfig())):
        print(line, file=sys.stderr)
    _title(3, "prove", "base against tuned, on conversations that tuning never saw")
    from lorikeet.prove.stage import prove

    proof = prove(root, ProveConfig())
    print(summary(RunFolder.open(root), proof, seconds=time.monotonic() - began))
    return root


def summary(run: RunFolder, proof: dict[str, Any], *, seconds: float) -> str:
    """Return what a person wants to know at the end: what changed, where the files are, what to type next."""
    heldout, speech = proof["heldout"], proof["speakability"]
    low, high = heldout["ci95"]
    lines = [
        "",
        f"Verdict: {proof['verdict']}, after {seconds / 60:.1f} min",
        f"  held-out loss      {heldout['base_loss']:.3f} -> {heldout['tuned_loss']:.3f}   "
        f"({heldout['difference']:+.3f}, 95 % interval {low:+.3f} to {high:+.3f}, {heldout['n']} conversations)",
        f"  can be spoken      {speech['base']['speakable']:.0%} -> {speech['tuned']['speakable']:.0%} of answers, "
        f"{speech['base']['mean_words']:.0f} -> {speech['tuned']['mean_words']:.0f} words",
        *_advice(run, proof),
        "",
    ]
    for pair in _telling(proof["answers"])[:2]:
        lines += [
            f"  asked    {_short(pair['question'])}",
            f"  before   {_short(pair['base']['text'])}",
            f"  after    {_short(pair['tuned']['text'])}",
            "",
        ]
    command = typed_command()
    lines += [
        f"  report   {run.reports / 'proof.html'}",
        f"  files    {run.root}: adapter/  merged/  gguf/  reports/",
        f"  next     {command} serve {run.root}      the page and the API",
        f"           {command} chat {run.root}       in the terminal",
        f"           {command} tune --model {PACKAGED_MODEL} --data YOUR.jsonl --out runs/mine",
        "",
    ]
    return "\n".join(lines)


def _advice(run: RunFolder, proof: dict[str, Any]) -> list[str]:
    """Return why the verdict is no, and what may turn it; nothing if it is yes."""
    from lorikeet.prove.words import next_steps, reasons

    if proof["verdict"] == "ship":
        return []
    steps = next_steps(proof, run=str(run.root), command=typed_command())
    return [
        *(f"  why not            {line}" for line in reasons(proof)),
        *(f"  what may help      {step}" for step in steps),
    ]


def typed_command() -> str:
    """Return how this command line is called from here: `lorikeet` if it is on the PATH, else its path."""
    started = Path(sys.argv[0])
    if started.name != "lorikeet" or shutil.which("lorikeet"):
        return "lorikeet"
    return os.path.relpath(started)


def _telling(answers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the answers, those whose question is short and whose speakability changed first."""
    return sorted(
        answers,
        key=lambda a: (
            len(a["question"]) > 200,
            not a["tuned"]["ended"],
            len(a["base"]["speech"]["stumbles"]) + (a["base"]["speech"]["words"] > 60) == 0,
        ),
    )


def _short(text: str, *, width: int = 240) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 4].rsplit(" ", 1)[0] + " ..."


def _free(out: Path) -> Path:
    """Return `out`, or the first of out-2, out-3, ... that is not there."""
    candidates = [out, *(out.with_name(f"{out.name}-{number}") for number in range(2, 1000))]
    return next(path for path in candidates if not path.exists())


def _title(number: int, verb: str, what: str) -> None:
    print(f"\n[{number}/4] {verb}: {what}", file=sys.stderr, flush=True)
