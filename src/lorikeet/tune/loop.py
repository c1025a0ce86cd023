"""The tuning stage, from data to adapter, in reading order.

    tune(config, out=Path("runs/mine"))
    resume(Path("runs/mine"))

It writes the run folder: `run.json`, `metrics.jsonl`, `checkpoints/`, `adapter/`, `data/heldout.jsonl` (for `prove`)
and `reports/loss.png`. Interrupted, it writes a checkpoint and says how to go on.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from lorikeet.config import TuneConfig
from lorikeet.data.clean import Split, common_system, deduplicate, split
from lorikeet.data.load import Loaded, load_conversations
from lorikeet.errors import InputError, Interrupted
from lorikeet.files import atomic_file, atomic_folder, sha256_file, sha256_text, write_atomic
from lorikeet.messages import Conversation
from lorikeet.prompt import PromptFormat, freeze_dates
from lorikeet.run import RunFolder
from lorikeet.tune import checkpoint
from lorikeet.tune.adapter import apply_lora, load_base, pick_device, pick_dtype, save_adapter, trained_parameters
from lorikeet.tune.batches import Batch, count_steps, encode_all, pack, steps
from lorikeet.tune.loss import mean_loss, summed_loss
from lorikeet.tune.plot import plot_loss
from lorikeet.tune.schedule import learning_rate, steps_that_fit
from lorikeet.weights import model_identity, resolve_model

FITTED_AT = 4
"""After this many steps the schedule is fitted to --max-minutes; the first of them warms up and does not count."""

SAFETY = 0.85
"""The share of the remaining time that the fitted schedule plans with."""

HELDOUT = "data/heldout.jsonl"


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the loop needs, and nothing read again."""

    prompt: PromptFormat
    train: list[Any]
    validation: list[Batch]
    base_folder: Path


def tune(config: TuneConfig, *, out: Path) -> RunFolder:
    """Tune from the start into the new run folder `out` and return it.

    Raises InputError for data, model or settings that cannot be tuned, before anything is written.
    """
    check(config)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        RunFolder.create(out, config={})
    base_folder, prompt, loaded, parts = _read(config)
    today = date.today()
    prompt.template = freeze_dates(prompt.template, today)
    prepared, counts = _prepare(config, base_folder, prompt, parts)
    run = RunFolder.create(out, config={"tune": asdict(config)})
    _write_heldout(run, parts.heldout, config.system_prompt)
    run.update(
        status="tuning",
        base=model_identity(config.model, base_folder),
        data={
            "name": config.data,
            "layout": loaded.layout,
            "sha256": {file.name: sha256_file(file) for file in loaded.files},
            "broken": len(loaded.broken),
            **counts,
        },
        template={"sha256": sha256_text(prompt.template), "date": today.isoformat()},
        system_prompt=common_system([c.with_system(config.system_prompt) for c in parts.train]),
    )
    return _loop(run, config, prepared)


def resume(root: Path) -> RunFolder:
    """Go on with the run at `root` from its newest checkpoint and return it.

    Raises InputError if it is no run, is tuned already, or its base or data have changed.
    """
    run = RunFolder.open(root)
    manifest = run.manifest()
    if manifest["status"] == "tuned":
        raise InputError(f"{root} is tuned already; go on with: lorikeet export {root}")
    try:
        fields = manifest["config"]["tune"]
        config = TuneConfig(**(fields | {"target_modules": tuple(fields["target_modules"])}))
        frozen = date.fromisoformat(manifest["template"]["date"])
        base, hashes = manifest["base"], manifest["data"]["sha256"]
    except (KeyError, TypeError) as error:
        raise InputError(
            f"{root} stopped before tuning began, so there is nothing to resume; remove it and tune again"
        ) from error
    base_folder, prompt, loaded, parts = _read(config)
    if {file.name: sha256_file(file) for file in loaded.files} != hashes:
        raise InputError(f"{config.data} has changed since {root} was started; tune into a new folder")
    if model_identity(config.model, base_folder)["sha256"] != base["sha256"]:
        raise InputError(f"{config.model} is not the model that {root} was started with; tune into a new folder")
    prompt.template = freeze_dates(prompt.template, frozen)
    prepared, _ = _prepare(config, base_folder, prompt, parts)
    return _loop(run, config, prepared)


def check(config: TuneConfig) -> None:
    """Raise InputError for a setting out of its range, naming it."""
    for name in (
        "max_length",
        "learning_rate",
        "epochs",
        "batch_size",
        "gradient_accumulation_steps",
        "lora_r",
        "lora_alpha",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "max_grad_norm",
    ):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name)}; it must be above 0")
    for name in ("max_steps", "max_minutes", "weight_decay"):
        if not getattr(config, name) >= 0:
            raise InputError(f"{name} is {getattr(config, name)}; it must not be negative")
    for name in ("lora_dropout", "warmup_ratio", "validation_share", "heldout_share"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least 0 and below 1")


def _read(config: TuneConfig) -> tuple[Path, PromptFormat, Loaded, Split]:
    """Read data and tokenizer, the cheap parts first, and say what was found."""
    loaded = load_conversations(config.data)
    distinct = deduplicate(loaded.conversations)
    parts = split(
        distinct, validation_share=config.validation_share, heldout_share=config.heldout_share, seed=config.seed
    )
    base_folder = resolve_model(config.model)
    prompt = PromptFormat.load(base_folder)
    _say(
        f"{config.data}: {len(loaded.conversations)} conversations ({loaded.layout}), "
        f"{len(loaded.conversations) - len(distinct)} repeated, {len(loaded.broken)} broken; "
        f"{len(parts.train)} to train, {len(parts.validation)} to validate, {len(parts.heldout)} held out"
    )
    for broken in loaded.broken[:3]:
        _say(f"left out {broken.where}: {broken.why}")
    return base_folder, prompt, loaded, parts


def _prepare(
    config: TuneConfig, base_folder: Path, prompt: PromptFormat, parts: Split
) -> tuple[Prepared, dict[str, int]]:
    """Encode the parts and return them with their counts."""

    def encode(conversations: list[Conversation]) -> Any:
        led = [conversation.with_system(config.system_prompt) for conversation in conversations]
        return encode_all(prompt, led, max_length=config.max_length, on_long=config.on_long)

    train, validation = encode(parts.train), encode(parts.validation)
    if train.truncated or train.dropped:
        _say(f"longer than {config.max_length} tokens: {train.truncated} truncated; {train.dropped} dropped")
    _say(f"{train.tokens} tokens to train on, {train.supervised_tokens / train.tokens:.0%} of them supervised")
    ordered = sorted(validation.rows, key=lambda row: len(row.ids))
    batches = [pack(ordered[i : i + config.batch_size]) for i in range(0, len(ordered), config.batch_size)]
    counts = {
        "train": len(train.rows),
        "validation": len(validation.rows),
        "heldout": len(parts.heldout),
        "truncated": train.truncated,
        "dropped": train.dropped,
        "train_tokens": train.tokens,
        "supervised_tokens": train.supervised_tokens,
    }
    return Prepared(prompt, train.rows, batches, base_folder), counts


def _write_heldout(run: RunFolder, conversations: list[Conversation], system_prompt: str) -> None:
    """Keep what tuning never sees, as it will be prompted, for `prove`."""
    lines = [
        json.dumps({"id": c.origin, "messages": [m.as_dict() for m in c.with_system(system_prompt).messages]})
        for c in conversations
    ]
    write_atomic(run.root / HELDOUT, "\n".join(lines) + "\n")
    run.record(HELDOUT, run.root / HELDOUT)


def _loop(run: RunFolder, config: TuneConfig, prepared: Prepared) -> RunFolder:
    """Tune from the newest checkpoint, or from the start, to the end; write adapter and plot."""
    device = pick_device()
    dtype = pick_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    base = load_base(prepared.base_folder, dtype, device)
    model = apply_lora(base, config)
    parameters = trained_parameters(model)
    optimizer = torch.optim.AdamW(parameters.values(), lr=config.learning_rate, weight_decay=config.weight_decay)
    _say(
        f"{config.model} on {device.type} in {str(dtype).removeprefix('torch.')}: "
        f"{sum(p.numel() for p in parameters.values()) / 1e6:.1f} M trained parameters"
    )
    run.update(dtype=str(dtype).removeprefix("torch."), device=device.type)

    per_step = config.batch_size * config.gradient_accumulation_steps
    total = config.max_steps or count_steps(len(prepared.train), conversations_per_step=per_step, epochs=config.epochs)
    newest = checkpoint.latest(run)
    if newest:
        state = checkpoint.restore(newest, parameters, optimizer)
        _keep_metrics_until(run, state.step)
        _say(f"going on from step {state.step} of {state.total_steps}")
    else:
        _keep_metrics_until(run, -1)
        state = checkpoint.State(0, total, 0, float("inf"), elapsed_s=0.0, validation_s=0.0, tokens=0)
        before = time.monotonic()
        state = _validate(run, state, model, prepared.validation, dtype)
        spent = time.monotonic() - before
        state = replace(state, elapsed_s=spent, validation_s=spent)
        checkpoint.save(run, state, parameters, optimizer)

    stream = steps(
        prepared.train,
        batch_size=config.batch_size,
        accumulation=config.gradient_accumulation_steps,
        seed=config.seed,
        first_step=state.step,
    )
    began = time.monotonic() - state.elapsed_s
    model.train()
    with _interruptible() as interrupted, _progress(state) as show:
        while state.step < state.total_steps and not _time_is_up(config, state):
            step_began = time.monotonic()
            rate = learning_rate(
                state.step, total_steps=state.total_steps, peak=config.learning_rate, warmup_ratio=config.warmup_ratio
            )
            batches = [batch.to(device) for batch in next(stream)]
            supervised = sum(len(batch.labels) for batch in batches)
            loss = 0.0
            for batch in batches:
                partial = summed_loss(model, batch, autocast_dtype=dtype) / supervised
                partial.backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                loss += partial.item()
            if not loss < float("inf"):
                raise InputError(
                    f"the loss is {loss} at step {state.step + 1}; lower learning_rate ({config.learning_rate}), "
                    f"then tune into a new folder (the last good checkpoint is in {run.root / 'checkpoints'})"
                )
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)

            tokens = sum(batch.tokens for batch in batches)
            state = replace(
                state, step=state.step + 1, tokens=state.tokens + tokens, elapsed_s=time.monotonic() - began
            )
            row = {
                "step": state.step,
                "loss": loss,
                "learning_rate": rate,
                "tokens": tokens,
                "supervised_tokens": supervised,
                "tokens_per_s": round(tokens / (time.monotonic() - step_began), 1),
                "rss_bytes": resident_bytes(),
                "elapsed_s": round(state.elapsed_s, 3),
            }
            if config.max_minutes and state.step == FITTED_AT:
                state = _fit(config, state, [*run.metrics(), row])
            last = state.step == state.total_steps or _time_is_up(config, state)
            if last or state.step % config.eval_steps == 0:
                state = _validate(run, state, model, prepared.validation, dtype, row=row)
                state = replace(state, elapsed_s=time.monotonic() - began)
            else:
                run.append_metrics(row)
            show(state, row)
            improved = state.best_step == state.step
            if last or improved or interrupted() or state.step % config.save_steps == 0:
                checkpoint.save(run, state, parameters, optimizer)
                checkpoint.prune(run, keep=config.save_total_limit, best_step=state.best_step)
            if interrupted() and not last:
                raise Interrupted(
                    f"stopped at step {state.step} of {state.total_steps}; go on with: lorikeet tune --resume {run.root}"
                )
    return _finish(run, config, prepared, model, parameters, state)


def _finish(
    run: RunFolder, config: TuneConfig, prepared: Prepared, model: Any, parameters: Any, state: checkpoint.State
) -> RunFolder:
    """Write the adapter that validated best, its tokenizer with the frozen template, and the plot."""
    checkpoint.load_parameters(checkpoint.folder(run, state.best_step), parameters)
    with atomic_folder(run.root / "adapter") as target:
        save_adapter(model, target, base=config.model.partition("@")[0])
        prepared.prompt.tokenizer.chat_template = prepared.prompt.template
        prepared.prompt.tokenizer.save_pretrained(str(target))
    run.record("adapter", run.root / "adapter", step=state.best_step)
    rows = run.metrics()
    with atomic_file(run.reports / "loss.png") as path:
        plot_loss(rows, path, title=f"{config.model} on {config.data}")
    first = next((row["val_loss"] for row in rows if "val_loss" in row), float("nan"))
    run.update(
        status="tuned",
        tuned={
            "steps": state.step,
            "best_step": state.best_step,
            "first_val_loss": first,
            "best_val_loss": state.best_loss,
            "elapsed_s": round(state.elapsed_s, 1),
            "tokens": state.tokens,
            "tokens_per_s": round(sum(r.get("tokens", 0) for r in rows) / max(1e-9, sum(_step_s(r) for r in rows)), 1),
            "peak_rss_bytes": resident_bytes(peak=True),
        },
    )
    _say(
        f"validation loss {first:.3f} -> {state.best_loss:.3f} (best at step {state.best_step} of {state.step}) "
        f"in {state.elapsed_s / 60:.1f} min; adapter in {run.root / 'adapter'}"
    )
    if state.best_step == 0:
        _say("no step validated better than the base model: the adapter changes nothing; try a lower learning_rate")
    return run


def _step_s(row: dict[str, Any]) -> float:
    return float(row["tokens"] / row["tokens_per_s"]) if row.get("tokens_per_s") else 0.0


def _validate(
    run: RunFolder,
    state: checkpoint.State,
    model: Any,
    batches: list[Batch],
    dtype: torch.dtype,
    *,
    row: dict[str, Any] | None = None,
) -> checkpoint.State:
    """Append the step's row with its validation loss; return the state, the best step in it."""
    device = next(model.parameters()).device
    loss = mean_loss(model, [batch.to(device) for batch in batches], autocast_dtype=dtype)
    run.append_metrics(
        {**(row or {"step": state.step, "elapsed_s": 0.0, "rss_bytes": resident_bytes()}), "val_loss": loss}
    )
    return replace(state, best_step=state.step, best_loss=loss) if loss < state.best_loss else state


def _fit(config: TuneConfig, state: checkpoint.State, rows: list[dict[str, Any]]) -> checkpoint.State:
    """Return the state with the number of steps that fit the time, judged by the steps done so far but the first."""
    timed = rows[-(FITTED_AT - 1) :]
    step_s = sum(_step_s(row) for row in timed) / len(timed)
    left = config.max_minutes * 60 * SAFETY - state.elapsed_s
    more = steps_that_fit(left, step_s=step_s, validation_s=state.validation_s, eval_steps=config.eval_steps)
    fitted = replace(state, total_steps=min(state.total_steps, state.step + more))
    _say(
        f"{step_s:.1f} s a step: {fitted.total_steps} of {state.total_steps} steps fit into {config.max_minutes:g} min"
    )
    return fitted


def _time_is_up(config: TuneConfig, state: checkpoint.State) -> bool:
    return bool(config.max_minutes) and state.step > 0 and state.elapsed_s >= config.max_minutes * 60


def _keep_metrics_until(run: RunFolder, step: int) -> None:
    """Drop the metrics of steps that came after the checkpoint gone on from."""
    rows = [row for row in run.metrics() if row["step"] <= step]
    write_atomic(run.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))


def resident_bytes(*, peak: bool = False) -> int:
    """Return the memory that this process holds now, or at its `peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        key = "VmHWM:" if peak else "VmRSS:"
        for line in status.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


@contextmanager
def _interruptible() -> Iterator[Any]:
    """Give a function that says whether Ctrl-C or SIGTERM came; a second Ctrl-C ends at once."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        _say("stopping after this step; the checkpoint follows")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress(state: checkpoint.State) -> Iterator[Any]:
    """Give a function that shows a step: a bar on a terminal, a line now and then elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
    )
    began, first = time.monotonic(), state.step
    with Progress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=state.total_steps, completed=state.step, loss=0.0, rate=0.0, left="?")
        mean: list[float] = []

        def show(now: checkpoint.State, row: dict[str, Any]) -> None:
            mean.append(row["loss"])
            each = (time.monotonic() - began) / (now.step - first)
            left_s = each * (now.total_steps - now.step)
            left = f"{int(left_s // 60)}:{int(left_s % 60):02d}"
            loss = sum(mean[-20:]) / len(mean[-20:])
            bar.update(task, completed=now.step, total=now.total_steps, loss=loss, rate=row["tokens_per_s"], left=left)
            if not console.is_terminal and (now.step % 10 == 0 or now.step == now.total_steps):
                _say(
                    f"step {now.step}/{now.total_steps}  loss {loss:.3f}  {row['tokens_per_s']:.0f} tokens/s  {left} left"
                )

        yield show


def _say(line: str) -> None:
    """Write one line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)
