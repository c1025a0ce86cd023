"""The tuning stage, from data to adapter, in reading order.

    tune(config, out=Path("runs/mine"))
    resume(Path("runs/mine"))

It writes the run folder: `run.json`, `metrics.jsonl`, `checkpoints/`, `adapter/`, `data/` (parts for `export` and `prove`),
`reports/inspect.html` and `reports/loss.png`. Interrupted, it writes a checkpoint and says how to go on.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lorikeet.config import TuneConfig
from lorikeet.data.clean import Split, common_system, deduplicate, split
from lorikeet.data.encode import Encoding, encode_all
from lorikeet.data.inspect import inspect_data, write_page
from lorikeet.data.load import PREFERENCE, Loaded, load_conversations
from lorikeet.errors import InputError, Interrupted, MachineError
from lorikeet.files import atomic_file, atomic_folder, remove_leftovers, sha256_file, sha256_text, write_atomic
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import Encoded, PromptFormat, freeze_dates
from lorikeet.run import RunFolder, resident_bytes
from lorikeet.tune import checkpoint
from lorikeet.tune.adapter import apply_lora, load_base, pick_device, pick_dtype, save_adapter, trained_parameters
from lorikeet.tune.batches import Batch, count_steps, pack_all, steps
from lorikeet.tune.fast import Scorer
from lorikeet.tune.forecast import Forecast, measure, require_room_for_weights
from lorikeet.tune.live import draw_line
from lorikeet.tune.optimizer import make_optimizer, set_learning_rate
from lorikeet.tune.plot import plot_loss, running_mean
from lorikeet.tune.schedule import learning_rate, steps_that_fit
from lorikeet.tune.track import Trackers
from lorikeet.weights import hub_revision, licence, model_identity, resolve_model

FITTED_AT = 4
"""After this many steps the schedule is fitted to --max-minutes; the first of them warms up and does not count."""

SAFETY = 0.85
"""The share of the remaining time that the fitted schedule plans with."""

COMPILE_FROM_S = 600
"""Runs that are expected to last so long are compiled: it costs about 25 s and saves about a tenth of the time."""

PLOT_WIDTH, PLOT_HEIGHT = 60, 6
"""Characters of the plot of the loss in a terminal."""

INSPECTED = 5000
"""Data of up to so many conversations is inspected in passing: two thousand take some seconds."""

HELDOUT, VALIDATION, CALIBRATION = "data/heldout.jsonl", "data/validation.jsonl", "data/calibration.jsonl"

CALIBRATION_SIZE = 128
"""Conversations of the training part that are kept for `export` to see what the weights are used for."""


class DivergedError(InputError):
    """The loss is no finite number any more."""


@dataclass(frozen=True, slots=True)
class Inputs:
    """Data and tokenizer as they were read."""

    base_folder: Path
    prompt: PromptFormat
    loaded: Loaded
    parts: Split


@dataclass(frozen=True, slots=True)
class Prepared:
    """What the loop needs, and nothing read again."""

    prompt: PromptFormat
    train: list[Encoded]
    validation: list[Encoded]
    base_folder: Path
    frozen: date
    """The date that the template inserts, where it inserts one."""


def tune(config: TuneConfig, *, out: Path) -> RunFolder:
    """Tune from the start into the new run folder `out` and return it.

    Raises InputError for data, model or settings that cannot be tuned, before anything is written.
    """
    check(config)
    if out.exists() and (not out.is_dir() or any(not path.name.endswith(".part") for path in out.iterdir())):
        RunFolder.create(out, config={})
    inputs = _read(config)
    return _begin(config, inputs, lambda: RunFolder.create(out, config={"tune": asdict(config)}))


def _begin(config: TuneConfig, inputs: Inputs, make_run: Callable[[], RunFolder]) -> RunFolder:
    """Tune from the first step; the run is made when data and model have been found to do."""
    today = date.today()
    inputs.prompt.template = freeze_dates(inputs.prompt.template, today)
    prepared, counts = _prepare(config, inputs, today)
    run = make_run()
    try:
        return _start(run, config, inputs, prepared, counts)
    except MachineError:
        if checkpoint.latest(run) is None:
            shutil.rmtree(run.root)  # nothing is in it but settings, and its name is free for others
        raise


def _start(run: RunFolder, config: TuneConfig, inputs: Inputs, prepared: Prepared, counts: dict[str, int]) -> RunFolder:
    """Write what the run rests on, then tune."""
    parts = inputs.parts
    _write_part(run, HELDOUT, parts.heldout, config.system_prompt)
    _write_part(run, VALIDATION, parts.validation, config.system_prompt)
    _write_part(run, CALIBRATION, parts.train[:CALIBRATION_SIZE], config.system_prompt)
    run.update(
        status="tuning",
        base=model_identity(config.model, inputs.base_folder),
        data={
            "name": config.data,
            "layout": inputs.loaded.layout,
            "sha256": {file.name: sha256_file(file) for file in inputs.loaded.files},
            "broken": len(inputs.loaded.broken),
            "duplicates": len(inputs.loaded.conversations)
            - sum(map(len, (parts.train, parts.validation, parts.heldout))),
            **_data_origin(inputs.loaded.files[0]),
            **counts,
        },
        template={"sha256": sha256_text(inputs.prompt.template), "date": prepared.frozen.isoformat()},
        system_prompt=common_system([c.with_system(config.system_prompt) for c in inputs.parts.train]),
    )
    _write_report(run, config, counts)
    return _loop(run, config, prepared)


def _data_origin(file: Path) -> dict[str, str]:
    """Return the revision and the licence of data from the hub; '' for files of one's own."""
    revision = hub_revision(file)
    root = next((folder for folder in file.parents if folder.name == revision), file.parent)
    return {"revision": revision, "licence": licence(root) if revision else ""}


def _write_report(run: RunFolder, config: TuneConfig, counts: dict[str, int]) -> None:
    """Write what `inspect` shows of the data to reports/inspect.html; not for data that would take minutes."""
    if sum(counts[part] for part in ("train", "validation", "heldout")) <= INSPECTED:
        report = inspect_data(
            config.data,
            model=config.model,
            max_length=config.max_length,
            system_prompt=config.system_prompt,
            seed=config.seed,
        )
        write_page(report, run.root / "reports" / "inspect.html")
    else:
        _say(f"more than {INSPECTED} conversations; to look into them: lorikeet inspect {config.data}")


def resume(root: Path) -> RunFolder:
    """Go on with the run at `root` from its newest checkpoint, or from the start before the first; return it.

    Raises InputError if it is no run, is tuned already, or its base or data have changed.
    """
    run = RunFolder.open(root)
    remove_leftovers(root)
    manifest = run.manifest()
    if manifest["status"] == "tuned":
        raise InputError(f"{root} is tuned already; go on with: lorikeet export {root}")
    try:
        fields = manifest["config"]["tune"]
        settings: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()}
        config = TuneConfig(**settings)
    except (KeyError, TypeError) as error:
        raise InputError(f"{run.manifest_path} holds no settings of tune; tune into a new folder") from error
    inputs = _read(config)
    if manifest["status"] == "created":
        return _begin(config, inputs, lambda: run)
    if {file.name: sha256_file(file) for file in inputs.loaded.files} != manifest["data"]["sha256"]:
        raise InputError(f"{config.data} has changed since {root} was started; tune into a new folder")
    if model_identity(config.model, inputs.base_folder)["sha256"] != manifest["base"]["sha256"]:
        raise InputError(f"{config.model} is not the model that {root} was started with; tune into a new folder")
    frozen = date.fromisoformat(manifest["template"]["date"])
    inputs.prompt.template = freeze_dates(inputs.prompt.template, frozen)
    prepared, _ = _prepare(config, inputs, frozen)
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
        "loraplus_lr_ratio",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "max_grad_norm",
    ):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name)}; it must be above 0")
    for name in ("max_steps", "max_minutes", "weight_decay", "early_stopping_patience"):
        if not getattr(config, name) >= 0:
            raise InputError(f"{name} is {getattr(config, name)}; it must not be negative")
    for name in ("lora_dropout", "warmup_ratio", "validation_share", "heldout_share"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least 0 and below 1")


def _read(config: TuneConfig) -> Inputs:
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
    if PREFERENCE in loaded.layout:
        _say("preference rows train on their chosen answers; the rejected ones are not used")
    for broken in loaded.broken[:3]:
        _say(f"left out {broken.where}: {broken.why}")
    return Inputs(base_folder, prompt, loaded, parts)


def _prepare(config: TuneConfig, inputs: Inputs, frozen: date) -> tuple[Prepared, dict[str, int]]:
    """Encode the parts and return them with their counts."""
    train, validation = (_encode(config, inputs, part) for part in (inputs.parts.train, inputs.parts.validation))
    if train.truncated or train.left_out:
        why = "; ".join(f"{count} {reason}" for reason, count in list(train.reasons.items())[:3])
        _say(
            f"{train.truncated} conversations truncated to {config.max_length} tokens ({train.cut_tokens} tokens cut), "
            f"{train.dropped} left out{f': {why}' if why else ''}; see: lorikeet inspect {config.data}"
        )
    _say(f"{train.tokens} tokens to train on, {train.supervised_tokens / train.tokens:.0%} of them supervised")
    counts = {
        "train": len(train.rows),
        "validation": len(validation.rows),
        "heldout": len(inputs.parts.heldout),
        "truncated": train.truncated,
        "dropped": train.dropped,
        "train_tokens": train.tokens,
        "supervised_tokens": train.supervised_tokens,
    }
    return Prepared(inputs.prompt, train.rows, validation.rows, inputs.base_folder, frozen), counts


def _encode(config: TuneConfig, inputs: Inputs, part: list[Conversation]) -> Encoding:
    """Return a part as tokens. Raises InputError if nothing of it can be learned from."""
    led = [conversation.with_system(config.system_prompt) for conversation in part]
    encoding = encode_all(inputs.prompt, led, max_length=config.max_length, on_long=config.on_long)
    if not encoding.rows:
        why = next(iter(encoding.reasons))
        raise InputError(f"none of the {len(part)} conversations can be learned from: {why} ({config.max_length})")
    return encoding


def _row(message: Message) -> dict[str, Any]:
    return message.as_dict() if message.supervised else {**message.as_dict(), "weight": 0}


def _write_part(run: RunFolder, name: str, conversations: list[Conversation], system_prompt: str) -> None:
    """Keep conversations as they will be prompted, for the stages that follow."""
    lines = [
        json.dumps({"id": c.origin, "messages": [_row(m) for m in c.with_system(system_prompt).messages]})
        for c in conversations
    ]
    write_atomic(run.root / name, "\n".join(lines) + "\n")
    run.record(name, run.root / name)


def _loop(run: RunFolder, config: TuneConfig, prepared: Prepared) -> RunFolder:
    """Tune from the newest checkpoint, or from the start, to the end; write adapter and plot."""
    device = pick_device()
    dtype = pick_dtype(config.dtype, device)
    torch.manual_seed(config.seed)
    require_room_for_weights(prepared.base_folder, dtype, device, in_4bit=config.load_in_4bit)
    base = load_base(prepared.base_folder, dtype, device, in_4bit=config.load_in_4bit)
    model = apply_lora(base, config)
    parameters = trained_parameters(model)
    start = (
        {name: p.detach().clone() for name, p in parameters.items()} if config.init_lora_weights == "pissa" else None
    )
    optimizer = make_optimizer(parameters, config)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    scorer = Scorer.build(model, config, dtype=dtype)
    _say(
        f"{config.model} on {device.type} in {str(dtype).removeprefix('torch.')}: "
        f"{sum(p.numel() for p in parameters.values()) / 1e6:.1f} M trained parameters"
    )
    for reason in scorer.plain:
        _say(f"the plain, slower path is taken for {reason}")

    per_step = config.batch_size * config.gradient_accumulation_steps
    total = config.max_steps or count_steps(len(prepared.train), conversations_per_step=per_step, epochs=config.epochs)
    validation = pack_all(prepared.validation, max_tokens=config.max_length, share=scorer.fast)
    newest = checkpoint.latest(run)
    if not newest:
        validation_tokens = sum(batch.tokens for batch in validation)
        forecast = measure(scorer, prepared.train, config, steps=total, validation_tokens=validation_tokens)
        _say(forecast.sentence(config))
        forecast.require(config, run.root)
        run.update(dtype=str(dtype).removeprefix("torch."), device=device.type, plain=scorer.plain)
        run.update(compiled=_compile(scorer, config, forecast), forecast=asdict(forecast))
    elif run.manifest()["compiled"]:
        scorer.compile()
    if newest:
        state = checkpoint.restore(newest, parameters, optimizer, scaler)
        _keep_metrics_until(run, state.step)
        _say(f"going on from step {state.step} of {state.total_steps}")
    else:
        _keep_metrics_until(run, -1)
        state = checkpoint.State(0, total, 0, float("inf"), elapsed_s=0.0, validation_s=0.0, tokens=0)
        before = time.monotonic()
        state, _ = _validate(run, state, scorer, validation, device)
        spent = time.monotonic() - before
        state = replace(state, elapsed_s=spent, validation_s=spent)
        checkpoint.save(run, state, parameters, optimizer, scaler)
    trackers = Trackers.open(run, config, first_step=state.step)

    stream = steps(
        prepared.train,
        per_step=per_step,
        max_tokens=config.max_length,
        share=scorer.fast,
        seed=config.seed,
        first_step=state.step,
    )
    began = time.monotonic() - state.elapsed_s
    model.train()
    with _interruptible() as interrupted, _progress(config, state) as show:
        while not _is_done(config, state):
            step_began = time.monotonic()
            rate = learning_rate(
                state.step, total_steps=state.total_steps, peak=config.learning_rate, warmup_ratio=config.warmup_ratio
            )
            batches = [batch.to(device) for batch in next(stream)]
            supervised = sum(len(batch.labels) for batch in batches)
            loss = 0.0
            scorer.start_step(batches)
            for batch in batches:
                partial = scorer.summed_loss(batch) / supervised
                scaler.scale(partial).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                loss += partial.item()
            if not loss < float("inf"):
                raise DivergedError(
                    f"the loss is {loss} at step {state.step + 1}; lower learning_rate ({config.learning_rate}), "
                    f"then tune into a new folder (the last good checkpoint is in {run.root / 'checkpoints'})"
                )
            scaler.unscale_(optimizer)
            torch.nn.utils.clip_grad_norm_(parameters.values(), config.max_grad_norm)
            set_learning_rate(optimizer, rate)
            scaler.step(optimizer)
            scaler.update()
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
            if _is_done(config, state) or state.step % config.eval_steps == 0:
                state, row["val_loss"] = _validate(run, state, scorer, validation, device, row=row)
                state = replace(state, elapsed_s=time.monotonic() - began)
            else:
                run.append_metrics(row)
            trackers.log(row)
            show(state, row)
            done, improved = _is_done(config, state), state.best_step == state.step
            if done or improved or interrupted() or state.step % config.save_steps == 0:
                checkpoint.save(run, state, parameters, optimizer, scaler)
                checkpoint.prune(run, keep=config.save_total_limit, best_step=state.best_step)
            if interrupted() and not done:
                raise Interrupted(
                    f"stopped at step {state.step} of {state.total_steps}; go on with: lorikeet tune --resume {run.root}"
                )
    if _is_patience_spent(config, state):
        _say(f"stopped early: {state.since_best} validations without improvement")
    finished = _finish(run, config, prepared, model, parameters, state, start)
    trackers.finish(finished.manifest()["tuned"])
    return finished


def _compile(scorer: Scorer, config: TuneConfig, forecast: Forecast) -> bool:
    """Compile the blocks if that is asked for, or pays; return whether they are, and say why they are not."""
    lasts_s = min(forecast.seconds, config.max_minutes * 60 or forecast.seconds)
    if config.torch_compile == "off" or (config.torch_compile == "auto" and lasts_s < COMPILE_FROM_S):
        return False
    why_not = scorer.compile()
    _say(f"blocks are not compiled: {why_not}" if why_not else "blocks are compiled in the first step; it takes longer")
    return not why_not


def _is_done(config: TuneConfig, state: checkpoint.State) -> bool:
    return state.step >= state.total_steps or _time_is_up(config, state) or _is_patience_spent(config, state)


def _is_patience_spent(config: TuneConfig, state: checkpoint.State) -> bool:
    return bool(config.early_stopping_patience) and state.since_best >= config.early_stopping_patience


def _finish(
    run: RunFolder,
    config: TuneConfig,
    prepared: Prepared,
    model: Any,
    parameters: Any,
    state: checkpoint.State,
    start: dict[str, torch.Tensor] | None,
) -> RunFolder:
    """Write the adapter that validated best, its tokenizer with the frozen template, and the plot."""
    checkpoint.load_parameters(checkpoint.folder(run, state.best_step), parameters)
    with atomic_folder(run.root / "adapter") as target:
        save_adapter(model, target, base=config.model.partition("@")[0], start=start)
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
    scorer: Scorer,
    batches: list[Batch],
    device: torch.device,
    *,
    row: dict[str, Any] | None = None,
) -> tuple[checkpoint.State, float]:
    """Append the step's row with its validation loss; return the state, the best step in it, and the loss."""
    loss = scorer.mean_loss(batches, device=device)
    run.append_metrics(
        {**(row or {"step": state.step, "elapsed_s": 0.0, "rss_bytes": resident_bytes()}), "val_loss": loss}
    )
    if loss < state.best_loss:
        return replace(state, best_step=state.step, best_loss=loss, since_best=0), loss
    return replace(state, since_best=state.since_best + 1), loss


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


class _PlottedProgress(Progress):
    """A progress bar under a small plot of the loss."""

    losses: tuple[float, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the plot, once there is something to plot, and the bar."""
        for number, line in enumerate(draw_line(self.losses, width=PLOT_WIDTH, height=PLOT_HEIGHT)):
            label = {0: f"{max(self.losses):.2f}", PLOT_HEIGHT - 1: f"{min(self.losses):.2f}"}.get(number, "")
            yield Text(f"{label:>8} {line}", style="green")
        yield self.make_tasks_table(self.tasks)


@contextmanager
def _progress(config: TuneConfig, state: checkpoint.State) -> Iterator[Any]:
    """Give a function that shows a step: a plot and a bar on a terminal, a line now and then elsewhere."""
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
    with _PlottedProgress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=state.total_steps, completed=state.step, loss=0.0, rate=0.0, left="?")
        losses: list[float] = []

        def show(now: checkpoint.State, row: dict[str, Any]) -> None:
            losses.append(row["loss"])
            each = (time.monotonic() - began) / (now.step - first)
            left_s = each * (now.total_steps - now.step)
            left = f"{int(left_s // 60)}:{int(left_s % 60):02d}"
            loss = sum(losses[-20:]) / len(losses[-20:])
            if not config.track:
                bar.losses = tuple(running_mean(losses))
            bar.update(task, completed=now.step, total=now.total_steps, loss=loss, rate=row["tokens_per_s"], left=left)
            if not console.is_terminal and (now.step % 10 == 0 or now.step == now.total_steps):
                _say(
                    f"step {now.step}/{now.total_steps}  loss {loss:.3f}  {row['tokens_per_s']:.0f} tokens/s  {left} left"
                )

        yield show


def _say(line: str) -> None:
    """Write one line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)
