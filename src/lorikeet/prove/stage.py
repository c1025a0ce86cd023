"""The proof stage: an exported run -> `reports/proof.json`, `reports/proof.html`, and a verdict that can be no.

    proof = prove(Path("runs/mine"), ProveConfig())
    proof["verdict"]                                   # "ship" or "do not ship"

Base and tuned model are measured (`measure`) as GGUF files of the same type, by the engine that serves, then compared
(`judge`). It owns the order of things and the files; it does no arithmetic.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorikeet.card import write_card
from lorikeet.config import ProveConfig, require_positive
from lorikeet.data.instructions import load_prompts
from lorikeet.data.load import load_conversations
from lorikeet.errors import InputError
from lorikeet.files import sha256_file, write_atomic
from lorikeet.prompt import PromptFormat
from lorikeet.prove.base import measure_base
from lorikeet.prove.grounding import load_probes
from lorikeet.prove.heldout import encode_heldout
from lorikeet.prove.instructions import IFEVAL_TOKENS
from lorikeet.prove.judge import judge
from lorikeet.prove.measure import Measured, Plan, measure, measure_noise, timed
from lorikeet.prove.report import write_html
from lorikeet.prove.roundtrip import round_trip
from lorikeet.prove.words import reasons
from lorikeet.run import RunFolder
from lorikeet.weights import base_gguf_path


def prove(root: Path, config: ProveConfig) -> dict[str, Any]:
    """Compare base and tuned model, write the reports and return what `proof.json` holds.

    Raises InputError if the run is not exported, or for settings that ask nothing.
    """
    require_positive(config, "answers", "max_answer_tokens", "max_instruction_tokens", "resamples")
    run = RunFolder.open(root)
    name = f"gguf/model-{config.quant}.gguf"
    tuned_gguf = run.require(name, command="lorikeet export")
    run.verify(name)
    manifest = run.manifest()
    base_gguf = _base_gguf(run, manifest, config)
    base_sha256 = sha256_file(base_gguf)
    plan = _plan(run, manifest, config)
    kept = {who: run.reports / f"ifeval-{who}.jsonl" if config.ifeval else None for who in ("base", "tuned")}
    seconds: dict[str, Any] = {}
    with timed(seconds, "total"):
        with _progress(plan.steps) as done:
            base = measure_base(base_gguf, plan, kept=kept["base"], done=done)
            tuned = measure(tuned_gguf, plan, strangers=True, kept=kept["tuned"], done=done)
            f16 = base_gguf_path(manifest, "f16")
            other = f16 if f16.is_file() and config.quant != "f16" else None
            with timed(seconds, "noise"):
                noise = measure_noise(base_gguf, other, plan, base.measured.losses.own, done=done)
        with timed(seconds, "round_trip"):
            heard = _heard(base.measured, tuned, config)
        proof = judge(base.measured, tuned, plan, noise=noise, heard=heard)
    proof["strength"] = float((manifest.get("strength") or {}).get("strength", 1.0))
    proof["reasons"] = reasons(proof)
    proof["base_measured"] = base.created
    proof["seconds"] = {"base": base.measured.seconds, "tuned": tuned.seconds, **seconds}
    proof["files"] = {
        "tuned": name,
        "tuned_sha256": manifest["artefacts"][name]["sha256"],
        "base": manifest["base"],
        "base_sha256": base_sha256,
    }
    write_atomic(run.reports / "proof.json", json.dumps(proof, indent=2) + "\n")
    write_html(proof, manifest, run)
    run.update(proof={"verdict": proof["verdict"], "quant": config.quant})
    write_card(run)
    return proof


def _heard(base: Measured, tuned: Measured, config: ProveConfig) -> dict[str, Any]:
    if not config.speech:
        return {"skipped": "turned off: --no-speech"}
    texts = [[answer.text for answer in measured.replies.answers] for measured in (base, tuned)]
    return round_trip(*texts, resamples=config.resamples)


def _base_gguf(run: RunFolder, manifest: dict[str, Any], config: ProveConfig) -> Path:
    path = base_gguf_path(manifest, config.quant)
    if not path.is_file():
        raise InputError(
            f"the base of {run.root} is not in the cache as {config.quant}; make it with: lorikeet export {run.root}"
        )
    return path


def _plan(run: RunFolder, manifest: dict[str, Any], config: ProveConfig) -> Plan:
    """Return what both models are asked; everything that can be wrong with it is said before the engine starts."""
    file = run.require("data/heldout.jsonl", command="lorikeet tune")
    run.verify("data/heldout.jsonl")
    prompt = PromptFormat.load(run.require("adapter", command="lorikeet tune"))
    instructed = load_prompts(Path(config.ifeval) if config.ifeval else None)
    if config.ifeval and config.max_instruction_tokens < IFEVAL_TOKENS:
        print(
            f"answers to {config.ifeval} end at {config.max_instruction_tokens} tokens, so what must be longer fails for both "
            f"models; as IFEval is asked, and slower: --max-instruction-tokens {IFEVAL_TOKENS}",
            file=sys.stderr,
            flush=True,
        )
    conversations = load_conversations(str(file)).conversations
    heldout = encode_heldout(prompt, conversations, max_length=manifest["config"]["tune"]["max_length"])
    return Plan(heldout, prompt, instructed, load_probes(), str(manifest.get("system_prompt", "")), config)


@contextmanager
def _progress(total: int) -> Iterator[Callable[[], None]]:
    """Give a function that counts a row scored or a question answered."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("proving"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)
        if not console.is_terminal:
            print("proving: base and tuned model, side by side", file=sys.stderr, flush=True)
        yield lambda: bar.advance(task)
