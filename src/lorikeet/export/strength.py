"""How much of the adapter is exported: the strength, a factor on what it adds, chosen on the validation conversations.

    finish(run)                              # what a killed export left undone
    settle(run, base, asked="auto")          # RUN/adapter now has the chosen strength in it

A LoRA adds strength * alpha / r * B A, so a strength is a change of `lora_alpha` in `adapter_config.json` and nothing else:
adapter, merged weights, GGUF and whoever loads the adapter with PEFT get the same. `run.json` keeps the alpha of tuning, so a
strength is never applied on top of another. What `prove` guards counts too: a strength at which plain prose gets dearer than
`prose.MOST_FORGOTTEN` allows is not chosen, nor one at which fewer instructions are followed, asked with other
prompts than those of `prove`. DoRA is not linear in the strength and keeps 1.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from lorikeet.compare import ratio_interval
from lorikeet.data.checks import Instructed
from lorikeet.data.instructions import count_followed, prompts_for_choice
from lorikeet.data.load import load_conversations
from lorikeet.data.prose import MOST_FORGOTTEN, prose_rows
from lorikeet.errors import InputError
from lorikeet.export.trained import AdapterModel
from lorikeet.files import sha256_file, sha256_text, write_atomic
from lorikeet.messages import Message
from lorikeet.prompt import Encoded, PromptFormat
from lorikeet.run import RunFolder

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""What `auto` tries: a full adapter, and three weaker ones."""

TIE = 0.002
"""Nats a token: losses closer than this are equal, and the weaker strength is taken."""

MOST_TOKENS = 3000
"""Tokens of validation conversations that are scored at each strength: some seconds for the packaged model."""

PROSE_MARGIN = 0.75
"""Share of `MOST_FORGOTTEN` that a strength may use up; the rest is for the interval that `prove` puts around it."""

ANSWER_TOKENS = 48
"""Longest answer to an instruction here."""

RESAMPLES = 10_000
"""Of the bootstrap that puts an interval around the change of instructions followed."""

ONE_ERROR = 0.6827
"""Level of an interval of one standard error to either side. What is within it counts as kept: the rule of one standard
error (Breiman et al., Classification and Regression Trees, 1984, section 3.4.3). A few prompts can be sure of a large loss
alone, so the choice must be stricter than the verdict, whose interval is 95 %."""

VALIDATION = "data/validation.jsonl"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def settle(run: RunFolder, base: Path, *, asked: str) -> None:
    """Bake the strength `asked` (`auto` or a number above 0, at most 1) into the run's adapter and enter it into `run.json`.

    Nothing is done where that has been done for these weights. Raises InputError for another strength.
    """
    wanted = _parse(asked)
    config = json.loads((run.root / "adapter" / CONFIG).read_text(encoding="utf-8"))
    entry = _entry(run)
    tuned_alpha = entry["tuned_alpha"] if entry else config["lora_alpha"]
    if entry and entry["asked"] == asked and config["lora_alpha"] == tuned_alpha * entry["strength"]:
        return
    if config.get("use_dora"):
        if wanted not in {None, 1.0}:
            raise InputError(f"--strength {asked} is for LoRA; a DoRA adapter is not linear in it, so it stays 1")
        _enter(
            run, asked=asked, strength=1.0, tuned_alpha=tuned_alpha, why="a DoRA adapter is not linear in its strength"
        )
        return
    table: list[dict[str, Any]] = []
    why = "asked for"
    if wanted is None:
        wanted, table, why = measure(run, base, alpha_now=config["lora_alpha"], tuned_alpha=tuned_alpha)
    _bake(run, config, asked=asked, strength=wanted, tuned_alpha=tuned_alpha, table=table, why=why)
    print(f"adapter strength {wanted:g} ({why})", file=sys.stderr, flush=True)


def finish(run: RunFolder) -> None:
    """Enter the adapter's hashes if a process was killed between baking a strength and entering them."""
    entry = run.manifest().get("strength") or {}
    adapter = run.manifest()["artefacts"].get("adapter", {})
    path = run.root / "adapter" / CONFIG
    if not path.is_file() or not adapter:
        return
    found = sha256_file(path)
    if adapter["sha256"].get(CONFIG) != found and entry.get("config_sha256") == found:
        _record(run)


def choose(table: Sequence[dict[str, Any]]) -> float:
    """Return the weakest strength whose validation loss is the best of those allowed, but for `TIE`.

    The first row is strength 0, the base. If plain prose allows none, the weakest is returned: `prove` will say no.
    """
    base, rows = table[0], table[1:]
    allowed = [r for r in rows if r["prose_loss"] - base["prose_loss"] <= PROSE_MARGIN * MOST_FORGOTTEN] or list(
        rows[:1]
    )
    best = min(row["validation_loss"] for row in allowed)
    return float(min(row["strength"] for row in allowed if row["validation_loss"] <= best + TIE))


def measure(
    run: RunFolder, base: Path, *, alpha_now: float, tuned_alpha: float
) -> tuple[float, list[dict[str, Any]], str]:
    """Return the strength to export, what was measured at strength 0 and at each of `STRENGTHS`, and why it is that one.

    Losses are nats a token, in the type of tuning. Instructions are asked of the base and of the strengths in question
    alone: first the best by its losses, then the weaker ones until one keeps them. The table is empty, and the strength
    1, if the run keeps no validation conversations.
    """
    if VALIDATION not in run.manifest()["artefacts"]:
        return 1.0, [], f"the run keeps no {VALIDATION} to choose it on"
    run.verify(VALIDATION)
    prompt = PromptFormat.load(run.root / "adapter")
    rows = _validation_rows(prompt, run)
    prose = prose_rows(prompt, limit=1)
    if not rows:
        return 1.0, [], "no validation conversation fits"
    table = []
    with AdapterModel.on(base, run.root / "adapter", _dtype(run)) as model:
        unit = tuned_alpha / alpha_now
        for strength in (0.0, *STRENGTHS):
            with model.at_strength(strength * unit):
                losses = {"validation_loss": model.mean_loss(rows), "prose_loss": model.mean_loss(prose)}
            table.append({"strength": strength, **{name: round(loss, 5) for name, loss in losses.items()}})
        best = choose(table)
        chosen = _keeps_instructions(model, prompt, table, most=best, unit=unit)
    tried = f"the best of {', '.join(f'{s:g}' for s in STRENGTHS)} on {len(rows)} validation conversations"
    if chosen < best:
        tried = f"{best:g} is {tried}, but follows fewer instructions than the base"
    return chosen, table, tried


def _keeps_instructions(
    model: AdapterModel, prompt: PromptFormat, table: list[dict[str, Any]], *, most: float, unit: float
) -> float:
    """Return the greatest strength up to `most` that follows as many instructions as the base, but for `ONE_ERROR`.

    The shares are entered into the `table`'s rows. The weakest is returned unasked if no other keeps
    them: what remains is for `prove` to judge.
    """
    weakest, *others = [row for row in table[1:] if row["strength"] <= most]
    if not others:
        return float(weakest["strength"])
    asked = prompts_for_choice()
    counts = np.array([len(instructed.instructions) for instructed in asked])

    def ask(row: dict[str, Any]) -> NDArray[np.float64]:
        found = np.array(_followed(model, prompt, asked, factor=row["strength"] * unit), dtype=np.float64)
        row["instructions_followed"] = round(float(found.sum() / counts.sum()), 4)
        return found

    base = ask(table[0])
    for row in reversed(others):
        change = ratio_interval(ask(row) - base, counts, level=ONE_ERROR, resamples=RESAMPLES, seed=0)
        if change.high >= 0:
            return float(row["strength"])
    return float(weakest["strength"])


def _followed(model: AdapterModel, prompt: PromptFormat, asked: Sequence[Instructed], *, factor: float) -> list[int]:
    """Return how many instructions of each prompt the model follows with its adapter times `factor`."""
    ids = [prompt.prompt_ids([Message("user", instructed.prompt)]) for instructed in asked]
    stops = prompt.stop_ids | prompt.special_ids
    with model.at_strength(factor):
        answers = model.answer(ids, stop_ids=stops, most_tokens=ANSWER_TOKENS, keep_logits=False)
    return count_followed(asked, [str(prompt.tokenizer.decode(a.ids, skip_special_tokens=True)) for a in answers])


def _validation_rows(prompt: PromptFormat, run: RunFolder) -> list[Encoded]:
    """Return the first validation conversations, `MOST_TOKENS` of them or the first one whole."""
    longest = run.manifest()["config"]["tune"]["max_length"]
    rows: list[Encoded] = []
    total = 0
    for conversation in load_conversations(str(run.root / VALIDATION)).conversations:
        try:
            row = prompt.encode(conversation)
        except InputError:
            continue  # the template refuses it; tuning left it out as well
        if len(row.ids) > longest or not row.supervised_tokens:
            continue
        total += len(row.ids)
        if rows and total > MOST_TOKENS:
            break
        rows.append(row)
    return rows


def _dtype(run: RunFolder) -> torch.dtype:
    """Return the type of tuning; float32 for float16, in which a CPU does not multiply."""
    return torch.bfloat16 if run.manifest().get("dtype") == "bfloat16" else torch.float32


def _parse(asked: str) -> float | None:
    if asked == "auto":
        return None
    try:
        strength = float(asked)
    except ValueError:
        strength = 0.0
    if not 0 < strength <= 1:
        raise InputError(f"--strength {asked} is neither auto nor a number above 0 and at most 1")
    return strength


def _entry(run: RunFolder) -> dict[str, Any] | None:
    """Return what `run.json` says of the strength of these very weights."""
    manifest = run.manifest()
    entry = manifest.get("strength")
    weights = manifest["artefacts"]["adapter"]["sha256"][WEIGHTS]
    return entry if entry and entry["weights_sha256"] == weights else None


def _bake(
    run: RunFolder, config: dict[str, Any], *, asked: str, strength: float, tuned_alpha: float, **about: Any
) -> None:
    """Set `lora_alpha` and enter it. What was made from the adapter as it was is forgotten first."""
    text = json.dumps({**config, "lora_alpha": tuned_alpha * strength}, indent=2) + "\n"
    path = run.root / "adapter" / CONFIG
    changed = config["lora_alpha"] != tuned_alpha * strength
    if changed:
        names = run.manifest()["artefacts"]
        run.forget(*(name for name in names if name == "merged" or name.startswith(("gguf/", "data/imatrix"))))
    _enter(run, asked=asked, strength=strength, tuned_alpha=tuned_alpha, config_sha256=sha256_text(text), **about)
    if changed:
        write_atomic(path, text)
        _record(run)


def _enter(run: RunFolder, *, asked: str, strength: float, tuned_alpha: float, **about: Any) -> None:
    weights = run.manifest()["artefacts"]["adapter"]["sha256"][WEIGHTS]
    run.update(
        strength={"asked": asked, "strength": strength, "tuned_alpha": tuned_alpha, "weights_sha256": weights, **about}
    )


def _record(run: RunFolder) -> None:
    """Enter the adapter's hashes anew, with all else that its entry says."""
    entry = run.manifest()["artefacts"]["adapter"]
    run.record("adapter", run.root / "adapter", **{k: v for k, v in entry.items() if k not in {"complete", "sha256"}})
