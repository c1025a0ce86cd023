"""How much of the adapter is exported: the strength, a factor on what it adds, chosen on the validation conversations.

    finish(run)                              # what a killed export left undone
    settle(run, base, asked="auto")          # RUN/adapter now has the chosen strength in it

A LoRA adds strength * alpha / r * B A, so a strength is a change of `lora_alpha` in `adapter_config.json` and nothing else:
adapter, merged weights, GGUF and whoever loads the adapter with PEFT get the same. `run.json` keeps the alpha of tuning, so a
strength is never applied on top of another. What `prove` guards counts too: a strength at which plain prose gets dearer than
`prose.MOST_FORGOTTEN` allows is not chosen, nor one at which fewer instructions are followed, asked with other
prompts than those of `prove`. DoRA is not linear in the strength and keeps 1. A model too large to be asked all of it
in the time given is asked less, or nothing and keeps 1; what was left out is said, with the flag that asks it.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from lorikeet.export.budget import Clock
from lorikeet.export.trained import AdapterModel
from lorikeet.files import sha256_file, sha256_text, write_atomic
from lorikeet.messages import Message
from lorikeet.prompt import Encoded, PromptFormat
from lorikeet.run import RunFolder

STRENGTHS = (0.25, 0.5, 0.75, 1.0)
"""What `auto` tries: a full adapter, and three weaker ones."""

TIE = 0.002
"""Nats a token: losses closer than this, or than one standard error of their difference, are equal; the weaker strength is
taken."""

LEAST_CONVERSATIONS = 8
"""Validation conversations below which no choice is made."""

LEAST_PROMPTS = 8
"""Instructions below which none are asked."""

LOSSES_SHARE = 0.5
"""Of the time, for the losses; the rest is for instructions."""

DECODING = 2
"""Times that a token costs which is said, not read: a step of all answers reads every weight for few rows."""

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

Progress = Callable[[int, int], None]

VALIDATION = "data/validation.jsonl"
CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def is_settled(run: RunFolder, *, asked: str, budget_s: float) -> bool:
    """Say whether the strength `asked` is baked into the run's adapter, and no more time was given since to choose it."""
    entry = _entry(run)
    if not entry or entry["asked"] != asked:
        return False
    return bool(
        _config(run)["lora_alpha"] == entry["tuned_alpha"] * entry["strength"]
        and entry.get("cut_at_s", math.inf) >= budget_s
    )


def must_measure(run: RunFolder, *, asked: str, budget_s: float) -> bool:
    """Say whether `settle` will load the model to measure what each strength does."""
    if asked != "auto" or is_settled(run, asked=asked, budget_s=budget_s):
        return False
    return VALIDATION in run.manifest()["artefacts"] and not _config(run).get("use_dora")


def settle(
    run: RunFolder,
    base: Path,
    *,
    asked: str,
    budget_s: float = math.inf,
    before: Callable[[float], None] = lambda _: None,
    progress: Progress = lambda *_: None,
) -> None:
    """Bake the strength `asked` (`auto` or a number above 0, at most 1) into the run's adapter and enter it into `run.json`.

    Nothing is done where that has been done for these weights, unless time cut it short and there is more of it now. `before`
    is told the strength, and what it raises leaves the run as it was. Raises InputError for another strength.
    """
    wanted = _parse(asked)
    entry = _entry(run)
    if entry and is_settled(run, asked=asked, budget_s=budget_s):
        before(entry["strength"])
        return
    config = _config(run)
    tuned_alpha = entry["tuned_alpha"] if entry else config["lora_alpha"]
    if config.get("use_dora"):
        if wanted not in {None, 1.0}:
            raise InputError(f"--strength {asked} is for LoRA; a DoRA adapter is not linear in it, so it stays 1")
        before(1.0)
        _enter(
            run, asked=asked, strength=1.0, tuned_alpha=tuned_alpha, why="a DoRA adapter is not linear in its strength"
        )
        return
    choice = Choice(wanted or 1.0, "asked for")
    if wanted is None:
        unit = tuned_alpha / config["lora_alpha"]
        choice = measure(run, base, unit=unit, clock=Clock(seconds=budget_s), progress=progress)
    before(choice.strength)
    about = {"table": choice.table, "why": choice.why, **({"cut_at_s": budget_s} if choice.cut else {})}
    _bake(run, config, asked=asked, strength=choice.strength, tuned_alpha=tuned_alpha, **about)
    _say(f"adapter strength {choice.strength:g} ({choice.why})")
    for line in choice.cut:
        _say(f"  {line}")


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


@dataclass(frozen=True, slots=True)
class Choice:
    """The strength to export, and what speaks for it."""

    strength: float
    why: str
    table: list[dict[str, Any]] = field(default_factory=list)
    """What was measured at strength 0 and at each of `STRENGTHS`; empty if nothing was."""
    cut: list[str] = field(default_factory=list)
    """What there was no time for, in words."""


Row = dict[str, Any]


def is_dearer(row: Row, best: Row) -> bool:
    """Say whether a strength's validation loss is above the best one's by more than a tie."""
    return bool(row["validation_loss"] > best["validation_loss"] + TIE)


def choose(table: Sequence[Row], dearer: Callable[[Row, Row], bool] = is_dearer) -> float:
    """Return the weakest strength that is not `dearer` than the best of those allowed.

    The first row is strength 0, the base. If plain prose allows none, the weakest is returned: `prove` will say no.
    """
    base, rows = table[0], table[1:]
    allowed = [r for r in rows if r["prose_loss"] - base["prose_loss"] <= PROSE_MARGIN * MOST_FORGOTTEN] or list(
        rows[:1]
    )
    best = min(allowed, key=lambda row: row["validation_loss"])
    return float(min(row["strength"] for row in allowed if not dearer(row, best)))


def measure(run: RunFolder, base: Path, *, unit: float, clock: Clock, progress: Progress = lambda *_: None) -> Choice:
    """Return the strength to export, what was measured, and what there was no time for.

    Losses are nats a token, in the type of tuning. Instructions are asked of the base and of the strengths in question
    alone: first the best by its losses, then the weaker ones until one keeps them. The strength is 1 if the run keeps no
    validation conversations, or if there is no time to compare strengths on `LEAST_CONVERSATIONS`. `unit` is the factor that
    makes the adapter as it is now the full one.
    """
    if VALIDATION not in run.manifest()["artefacts"]:
        return Choice(1.0, f"the run keeps no {VALIDATION} to choose it on")
    run.verify(VALIDATION)
    prompt = PromptFormat.load(run.root / "adapter")
    rows = _validation_rows(prompt, run)
    if not rows:
        return Choice(1.0, "no validation conversation fits")
    with AdapterModel.on(base, run.root / "adapter", _dtype(run)) as model:
        losses = _Losses(model, rows, prose_rows(prompt, limit=1), unit=unit, clock=clock, progress=progress)
        asked = _Instructions(model, prompt, unit=unit, clock=clock)
        planned = losses.plan()
        whole_s = max(
            (clock.spent_s + clock.needs_s(losses.whole_tokens)) / LOSSES_SHARE,
            clock.spent_s + clock.needs_s(losses.whole_tokens + asked.whole_tokens),
        )
        flag = f"--budget-s {math.ceil(1.1 * whole_s)}"
        if not planned:
            return Choice(
                1.0, "not measured: the time given is too short", cut=[f"{flag} measures; --strength sets it"]
            )
        table = losses.measure()
        best = choose(table, losses.are_dearer)
        chosen = asked.greatest_kept(table, most=best)
    tried = f"the weakest no worse than the best of {', '.join(f'{s:g}' for s in STRENGTHS)} on {len(losses.rows)} validation conversations"
    if chosen < best:
        tried = f"{best:g} is {tried}, but follows fewer instructions than the base"
    cut = [*losses.cut, *asked.cut]
    return Choice(chosen, tried, table, [*cut, f"{flag} leaves nothing out"] if cut else [])


class _Losses:
    """Validation and prose losses at every strength, on as many conversations as there is time for, the same at each."""

    def __init__(
        self,
        model: AdapterModel,
        rows: list[Encoded],
        prose: list[Encoded],
        *,
        unit: float,
        clock: Clock,
        progress: Progress,
    ) -> None:
        self.model, self.rows, self.prose = model, rows, prose
        self.unit, self.clock, self.progress = unit, clock, progress
        self.cut: list[str] = []
        self.whole_tokens = self._done = self._total = 0
        self._sums: dict[float, NDArray[np.float64]] = {}
        self._counts: NDArray[np.int64] = np.zeros(0, dtype=np.int64)

    def plan(self) -> bool:
        """Time the base on the first conversations and keep as many as fit; False if `LEAST_CONVERSATIONS` do not."""
        with self.model.at_strength(0.0):
            self.model.losses(self.rows[:LEAST_CONVERSATIONS], done=self.clock.tick)
        times = 1 + len(STRENGTHS)
        costs = [times * len(row.ids) for row in self.rows]
        prose = times * sum(len(row.ids) for row in self.prose)
        self.whole_tokens = sum(costs) + prose
        most_s = self.clock.seconds * LOSSES_SHARE - self.clock.spent_s
        least = sum(costs[:LEAST_CONVERSATIONS]) + prose
        count = self.clock.fit([prose, *costs], seconds=most_s) - 1
        if count < min(LEAST_CONVERSATIONS, len(costs)):
            count = LEAST_CONVERSATIONS if self.clock.needs_s(least) <= self.clock.seconds - self.clock.spent_s else 0
        if count < len(costs):
            self.cut.append(f"{count} of {len(costs)} validation conversations were compared")
        self.rows = self.rows[:count]
        self._total = sum(costs[:count]) + prose
        if count:
            rate, left_s = self.clock.tokens_per_s, self.clock.needs_s(self._total)
            _say(
                f"choosing the strength: {times} strengths on {count} conversations and plain prose, "
                f"{rate:.0f} tokens/s, {left_s:.0f} s left; then instructions"
            )
        return count > 0

    def measure(self) -> list[Row]:
        """Return one row for the base and each strength."""
        table = []
        for strength in (0.0, *STRENGTHS):
            with self.model.at_strength(strength * self.unit):
                self._sums[strength], self._counts = self.model.losses(self.rows, done=self._tick)
                prose, count = self.model.losses(self.prose, done=self._tick)
            loss = float(self._sums[strength].sum() / self._counts.sum())
            losses = {"validation_loss": loss, "prose_loss": float(prose.sum() / count.sum())}
            table.append({"strength": strength, **{name: round(loss, 5) for name, loss in losses.items()}})
        return table

    def are_dearer(self, row: Row, best: Row) -> bool:
        """Say whether a strength is dearer than the best by more than `TIE` and more than the noise of these conversations."""
        difference = self._sums[row["strength"]] - self._sums[best["strength"]]
        noise = ratio_interval(difference, self._counts, level=ONE_ERROR, resamples=RESAMPLES, seed=0)
        return is_dearer(row, best) and noise.low > 0

    def _tick(self, tokens: int) -> None:
        self.clock.tick(tokens)
        self._done += tokens
        self.progress(self._done, self._total)


class _Instructions:
    """Which strengths follow as many instructions as the base, on as many prompts as there is time for."""

    def __init__(self, model: AdapterModel, prompt: PromptFormat, *, unit: float, clock: Clock) -> None:
        self.model, self.prompt, self.unit, self.clock = model, prompt, unit, clock
        self.cut: list[str] = []
        self._prompts = prompts_for_choice()
        lengths = [len(prompt.prompt_ids([Message("user", p.prompt)])) for p in self._prompts]
        self._costs = [length + DECODING * ANSWER_TOKENS for length in lengths]
        self.whole_tokens = len(STRENGTHS) * sum(self._costs)
        """Of all prompts asked as often as may be: of the base, and of every strength but the weakest."""

    def greatest_kept(self, table: list[Row], *, most: float) -> float:
        """Return the greatest strength up to `most` that follows as many instructions as the base, but for `ONE_ERROR`.

        The shares are entered into the `table`'s rows. The weakest is returned unasked if no other keeps them: what
        remains is for `prove` to judge. Where there is no time to ask, `most` is returned.
        """
        weakest, *others = [row for row in table[1:] if row["strength"] <= most]
        if not others:
            return float(weakest["strength"])
        asked = self._fitting(times=1 + len(others))
        if not asked:
            return most
        counts = np.array([len(instructed.instructions) for instructed in asked])

        def ask(row: Row) -> NDArray[np.float64]:
            followed = _followed(self.model, self.prompt, asked, factor=row["strength"] * self.unit)
            found = np.array(followed, dtype=np.float64)
            row["instructions_followed"] = round(float(found.sum() / counts.sum()), 4)
            return found

        base = ask(table[0])
        for row in reversed(others):
            change = ratio_interval(ask(row) - base, counts, level=ONE_ERROR, resamples=RESAMPLES, seed=0)
            if change.high >= 0:
                return float(row["strength"])
        return float(weakest["strength"])

    def _fitting(self, *, times: int) -> list[Instructed]:
        """Return the first prompts that can be asked so many times, none where `LEAST_PROMPTS` cannot."""
        costs = [times * cost for cost in self._costs]
        count = self.clock.fit(costs)
        count = count if count >= LEAST_PROMPTS else 0
        if count < len(costs):
            self.cut.append(f"{count} of {len(costs)} instructions were asked of each strength")
        if count:
            left_s = self.clock.needs_s(sum(costs[:count]))
            _say(
                f"choosing the strength: {count} instructions, asked at most {times} times, {left_s:.0f} s left at most"
            )
        return self._prompts[:count]


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


def _config(run: RunFolder) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((run.root / "adapter" / CONFIG).read_text(encoding="utf-8"))
    return config


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
    """Set `lora_alpha` and enter it."""
    text = json.dumps({**config, "lora_alpha": tuned_alpha * strength}, indent=2) + "\n"
    path = run.root / "adapter" / CONFIG
    _enter(run, asked=asked, strength=strength, tuned_alpha=tuned_alpha, config_sha256=sha256_text(text), **about)
    if config["lora_alpha"] != tuned_alpha * strength:
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


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
