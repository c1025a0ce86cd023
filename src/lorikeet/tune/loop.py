"""The tuning stage, from data to adapter, in reading order.

    tune(config, out=Path("runs/mine"))
    resume(Path("runs/mine"))

It writes the run folder: `run.json`, `metrics.jsonl`, `checkpoints/`, `adapter/`, `data/` (parts for `export` and `prove`),
`reports/inspect.html` and `reports/loss.png`. Interrupted, it writes a checkpoint and says how to go on.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

from lorikeet.config import TuneConfig, check_tune
from lorikeet.data.clean import Split, common_system, deduplicate, split
from lorikeet.data.encode import Encoding, encode_all
from lorikeet.data.inspect import inspect_data, write_page
from lorikeet.data.load import PREFERENCE, Loaded, load_conversations
from lorikeet.errors import InputError, Interrupted, MachineError, is_out_of_memory
from lorikeet.files import (
    alone,
    atomic_file,
    atomic_folder,
    could_go,
    is_full,
    remove_leftovers,
    sha256_file,
    sha256_text,
    write_atomic,
)
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import Encoded, PromptFormat, freeze_dates
from lorikeet.run import RunFolder, resident_bytes
from lorikeet.tune import checkpoint
from lorikeet.tune.adapter import save_adapter
from lorikeet.tune.batches import Batch, count_steps, steps
from lorikeet.tune.forecast import Forecast, measure
from lorikeet.tune.learner import Learner
from lorikeet.tune.plot import plot_loss
from lorikeet.tune.progress import progress, say
from lorikeet.tune.schedule import learning_rate, steps_that_fit
from lorikeet.tune.stop import between_steps, stoppable
from lorikeet.tune.track import Trackers, require_trackers
from lorikeet.weights import cache_folder, hub_revision, licence, model_identity, resolve_model

FITTED_AT = 4
"""After this many steps the schedule is fitted to --max-minutes; the first of them warms up and does not count."""

SAFETY = 0.85
"""The share of the remaining time that the fitted schedule plans with."""

COMPILE_FROM_S = 600
"""Runs that are expected to last so long are compiled: it costs about half a minute and saves about a sixth of the time."""

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

    Raises InputError for data, model or settings that cannot be tuned, with nothing left in `out`, and Interrupted, which
    says how to go on, when it is stopped.
    """
    check_tune(config)
    require_trackers(config.track)
    RunFolder.require_free(out)
    with stoppable(lambda: _way_on(out)):
        inputs = _read(config)
        prepared, counts = _prepare(config, inputs, date.today())
        with alone(out, command="tune"):
            run = RunFolder.create(out, config={"tune": asdict(config)})
            try:
                return _start(run, config, inputs, prepared, counts)
            except Exception as error:
                refused = isinstance(error, InputError | MachineError) or is_out_of_memory(error)
                if refused and checkpoint.latest(run) is None:
                    shutil.rmtree(out, ignore_errors=True)  # nothing is in it but settings, and its name is free
                raise


def _way_on(root: Path) -> str:
    """Return how a run that is stopped outside of its steps goes on."""
    if not (root / "run.json").is_file():
        return "stopped, nothing is written yet; give the same command to start again"
    if RunFolder(root).manifest().get("status") == "tuned":
        return f"stopped; {root} is tuned, go on with: lorikeet export {root}"
    return f"stopped; go on with: lorikeet tune --resume {root}"


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
            "sha256": _hashes(inputs.loaded.files),
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


def _hashes(files: Sequence[Path]) -> dict[str, str]:
    """Return the sha256 of each file, by its path from the folder that holds them all."""
    home = os.path.commonpath([file.parent for file in files])
    return {Path(os.path.relpath(file, home)).as_posix(): sha256_file(file) for file in files}


def _data_origin(file: Path) -> dict[str, str]:
    """Return the revision and the licence of data from the hub; '' for files of one's own."""
    revision = hub_revision(file)
    root = next((folder for folder in file.parents if folder.name == revision), file.parent)
    return {"revision": revision, "licence": licence(root) if revision else ""}


def _write_report(run: RunFolder, config: TuneConfig, counts: dict[str, int]) -> None:
    """Write what `inspect` shows of the data to reports/inspect.html; not for data that would take minutes."""
    if sum(counts[part] for part in ("train", "validation", "heldout")) <= INSPECTED:
        write_page(inspect_data(config), run.root / "reports" / "inspect.html")
    else:
        say(f"more than {INSPECTED} conversations; to look into them: lorikeet inspect {config.data}")


def resume(root: Path) -> RunFolder:
    """Go on with the run at `root` from its newest checkpoint, or from the start before the first; return it.

    Raises InputError if it is no run, is tuned already, is being tuned, or its base or data have changed, and Interrupted,
    which says how to go on, when it is stopped.
    """
    run = RunFolder.open(root)
    with stoppable(lambda: _way_on(root)), alone(root, command="tune"):
        remove_leftovers(root)
        return _go_on(run)


def _go_on(run: RunFolder) -> RunFolder:
    """Tune from where the manifest says that the run is."""
    manifest = run.manifest()
    if manifest.get("status") == "tuned":
        raise InputError(f"{run.root} is tuned already; go on with: lorikeet export {run.root}")
    try:
        config = read_config(manifest["config"]["tune"])
        started = manifest["status"] != "created"
        data, base, frozen = (
            (manifest["data"]["sha256"], manifest["base"]["sha256"], date.fromisoformat(manifest["template"]["date"]))
            if started
            else ({}, "", date.today())
        )
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise InputError(
            f"{run.manifest_path} does not hold what tune wrote there ({type(error).__name__}: {error}); tune into a new folder"
        ) from error
    require_trackers(config.track)
    inputs = _read(config)
    if started and _hashes(inputs.loaded.files) != data:
        raise InputError(f"{config.data} has changed since {run.root} was started; tune into a new folder")
    if started and model_identity(config.model, inputs.base_folder)["sha256"] != base:
        raise InputError(f"{config.model} is not the model that {run.root} was started with; tune into a new folder")
    prepared, counts = _prepare(config, inputs, frozen)
    return _loop(run, config, prepared) if started else _start(run, config, inputs, prepared, counts)


def read_config(recorded: dict[str, Any]) -> TuneConfig:
    """Return the settings that a manifest holds. Raises TypeError or AttributeError for others, InputError as `check_tune` does."""
    values: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in recorded.items()}
    config = TuneConfig(**values)
    check_tune(config)
    return config


def _read(config: TuneConfig) -> Inputs:
    """Read data and tokenizer, the cheap parts first, and say what was found."""
    loaded = load_conversations(config.data)
    distinct = deduplicate(loaded.conversations)
    parts = split(
        distinct, validation_share=config.validation_share, heldout_share=config.heldout_share, seed=config.seed
    )
    base_folder = resolve_model(config.model)
    prompt = PromptFormat.load(base_folder)
    say(
        f"{config.data}: {len(loaded.conversations)} conversations ({loaded.layout}), "
        f"{len(loaded.conversations) - len(distinct)} repeated, {len(loaded.broken)} broken; "
        f"{len(parts.train)} to train, {len(parts.validation)} to validate, {len(parts.heldout)} held out"
    )
    if PREFERENCE in loaded.layout:
        say("preference rows train on their chosen answers; the rejected ones are not used")
    for broken in loaded.broken[:3]:
        say(f"left out {broken.where}: {broken.why}")
    return Inputs(base_folder, prompt, loaded, parts)


def _prepare(config: TuneConfig, inputs: Inputs, frozen: date) -> tuple[Prepared, dict[str, int]]:
    """Encode the parts, with the template's date `frozen`, and return them with their counts."""
    inputs.prompt.template = freeze_dates(inputs.prompt.template, frozen)
    train, validation = (_encode(config, inputs, part) for part in (inputs.parts.train, inputs.parts.validation))
    truncated, dropped = train.truncated + validation.truncated, train.dropped + validation.dropped
    if truncated or dropped:
        reasons = Counter(train.reasons) + Counter(validation.reasons)
        why = "; ".join(f"{count} {reason}" for reason, count in reasons.most_common(3))
        say(
            f"{truncated} conversations truncated to {config.max_length} tokens "
            f"({train.cut_tokens + validation.cut_tokens} tokens cut), {dropped} left out{f': {why}' if why else ''}, "
            f"{validation.truncated + validation.dropped} of them to validate; see: lorikeet inspect {config.data}"
        )
    say(f"{train.tokens} tokens to train on, {train.supervised_tokens / train.tokens:.0%} of them supervised")
    counts = {
        "train": len(train.rows),
        "validation": len(validation.rows),
        "heldout": len(inputs.parts.heldout),
        "truncated": truncated,
        "dropped": dropped,
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
    with _with_remedies(run):
        learner = Learner.load(config, prepared.base_folder)
        say(
            f"{config.model} on {learner.device.type} in {learner.precision}: "
            f"{sum(p.numel() for p in learner.parameters.values()) / 1e6:.1f} M trained parameters"
        )
        _say_plain(learner.scorer.plain)
        validation = learner.scorer.pack(prepared.validation)
        newest = checkpoint.latest(run)
        state = _restore(run, learner, prepared, newest) if newest else _first_state(run, learner, prepared, validation)
        trackers = Trackers.open(run, config, first_step=state.step)
        state = _take_steps(run, learner, prepared, validation, trackers, state)
        if _is_patience_spent(config, state):
            say(f"stopped early: {state.since_best} validations without improvement")
        finished = _finish(run, learner, prepared, state)
        trackers.finish(finished.manifest()["tuned"])
        return finished


@contextmanager
def _with_remedies(run: RunFolder) -> Iterator[None]:
    """Let the MachineError of a full disk say what could go, and how a run that has a checkpoint goes on."""
    try:
        yield
    except MachineError as error:
        if not is_full(error.__cause__) or checkpoint.latest(run) is None:
            raise
        removable = [cache_folder() / "gguf", *checkpoint.spare(run)]
        raise MachineError(f"{error}{could_go(removable)}; then: lorikeet tune --resume {run.root}") from error


def _restore(run: RunFolder, learner: Learner, prepared: Prepared, newest: Path) -> checkpoint.State:
    """Return the state of the checkpoint `newest`, from which the learner goes on."""
    state = checkpoint.restore(newest, learner.parameters, learner.optimizer, learner.scaler)
    began = time.monotonic()
    _compile_again(run, learner, prepared)
    state = replace(state, elapsed_s=state.elapsed_s + time.monotonic() - began)
    _keep_metrics_until(run, state.step)
    say(f"going on from step {state.step} of {state.total_steps}")
    return state


def _first_state(run: RunFolder, learner: Learner, prepared: Prepared, validation: list[Batch]) -> checkpoint.State:
    """Forecast the run, validate the base, write the first checkpoint and return its state.

    Raises MachineError for a run that cannot fit.
    """
    config = learner.config
    total = config.max_steps or count_steps(
        len(prepared.train), conversations_per_step=_per_step(config), epochs=config.epochs
    )
    validation_tokens = sum(batch.tokens for batch in validation)
    forecast = measure(learner.scorer, prepared.train, config, steps=total, validation_tokens=validation_tokens)
    say(forecast.sentence(config))
    forecast.require(config, run.root)
    began = time.monotonic()
    if "compiled" in run.manifest():  # it was stopped before its first checkpoint: what was decided stands
        compiled = _compile_again(run, learner, prepared)
    else:
        compiled = _pays(config, forecast) and _compile(learner, prepared)
    run.update(
        compiled=compiled,
        native=learner.scorer.native,
        forecast=asdict(forecast),
        dtype=learner.precision,
        device=learner.device.type,
        plain=learner.scorer.plain,
    )
    _keep_metrics_until(run, -1)
    state = checkpoint.State(0, total, 0, float("inf"), elapsed_s=0.0, validation_s=0.0, tokens=0)
    before = time.monotonic()
    state, _ = _validate(run, state, learner, validation)
    now = time.monotonic()
    state = replace(state, elapsed_s=now - began, validation_s=now - before)
    checkpoint.save(run, state, learner.parameters, learner.optimizer, learner.scaler)
    return state


def _per_step(config: TuneConfig) -> int:
    """Return how many conversations a step learns from."""
    return config.batch_size * config.gradient_accumulation_steps


def _take_steps(
    run: RunFolder,
    learner: Learner,
    prepared: Prepared,
    validation: list[Batch],
    trackers: Trackers,
    state: checkpoint.State,
) -> checkpoint.State:
    """Tune from `state` until the run is done, validating and writing checkpoints on the way; return the last state.

    Raises Interrupted, with a checkpoint written, and DivergedError.
    """
    config = learner.config
    stream = steps(
        prepared.train,
        per_step=_per_step(config),
        max_tokens=learner.scorer.packed_tokens,
        share=learner.scorer.shares,
        seed=config.seed,
        first_step=state.step,
    )
    began = time.monotonic() - state.elapsed_s
    learner.model.train()
    with between_steps() as interrupted, progress(config, state) as show:
        while not _is_done(config, state):
            state, row = _take_step(run, learner, stream, state, began=began)
            if config.max_minutes and state.step == FITTED_AT:
                state = _fit(config, state, [*run.metrics(), row])
            if _is_done(config, state) or state.step % config.eval_steps == 0:
                state, row["val_loss"] = _validate(run, state, learner, validation, row=row)
                state = replace(state, elapsed_s=time.monotonic() - began)
            else:
                run.append_metrics(row)
            trackers.log(row)
            show(state, row)
            done, improved = _is_done(config, state), state.best_step == state.step
            if done or improved or interrupted() or state.step % config.save_steps == 0:
                checkpoint.save(run, state, learner.parameters, learner.optimizer, learner.scaler)
                checkpoint.prune(run, keep=config.save_total_limit, best_step=state.best_step)
            if interrupted() and not done:
                raise Interrupted(
                    f"stopped at step {state.step} of {state.total_steps}; go on with: lorikeet tune --resume {run.root}"
                )
    return state


def _take_step(
    run: RunFolder, learner: Learner, stream: Iterator[list[Batch]], state: checkpoint.State, *, began: float
) -> tuple[checkpoint.State, dict[str, Any]]:
    """Take the step after `state`; return the state after it, and its row of metrics. The run `began` at that monotonic time."""
    config, step_began = learner.config, time.monotonic()
    batches = next(stream)
    rate = learning_rate(
        state.step, total_steps=state.total_steps, peak=config.learning_rate, warmup_ratio=config.warmup_ratio
    )
    loss = learner.step(batches, rate=rate)
    if not loss < float("inf"):
        raise DivergedError(
            f"the loss is {loss} at step {state.step + 1}; lower learning_rate ({config.learning_rate}), "
            f"then tune into a new folder (the last good checkpoint is in {run.root / 'checkpoints'})"
        )
    now, tokens = time.monotonic(), sum(batch.tokens for batch in batches)
    state = replace(state, step=state.step + 1, tokens=state.tokens + tokens, elapsed_s=now - began)
    return state, {
        "step": state.step,
        "loss": loss,
        "learning_rate": rate,
        "tokens": tokens,
        "supervised_tokens": sum(len(batch.labels) for batch in batches),
        "tokens_per_s": round(tokens / (now - step_began), 1),
        "rss_bytes": resident_bytes(),
        "elapsed_s": round(state.elapsed_s, 3),
    }


def _pays(config: TuneConfig, forecast: Forecast) -> bool:
    """Return whether blocks are to be compiled: it was asked for, or saves more time than it takes."""
    lasts_s = min(forecast.seconds, config.max_minutes * 60 or forecast.seconds)
    return config.torch_compile == "on" or (config.torch_compile == "auto" and lasts_s >= COMPILE_FROM_S)


def _compile(learner: Learner, prepared: Prepared) -> bool:
    """Compile the blocks; return whether they are, and say why they are not."""
    say("compiling the blocks: half a minute")
    scorer = learner.scorer
    known = len(scorer.plain)
    if why_not := scorer.compile(_compiled_for(learner, prepared)):
        say(f"blocks are not compiled: {why_not}")
    _say_plain(scorer.plain[known:])
    return not why_not


def _compile_again(run: RunFolder, learner: Learner, prepared: Prepared) -> bool:
    """Compile what the run was started with compiled; return whether it is, and say so where that cannot be."""
    manifest, scorer = run.manifest(), learner.scorer
    if not manifest.get("compiled"):
        return False
    why_not = scorer.compile(_compiled_for(learner, prepared), native=manifest["native"])
    if why_not or scorer.native != manifest["native"]:
        say(
            f"what was compiled before is not: {why_not or 'attention'}; from here on the run is slower, and not bit for bit "
            "what it would have been"
        )
    return not why_not


def _compiled_for(learner: Learner, prepared: Prepared) -> Batch:
    """Return the micro-batch that blocks are compiled with: always the same one of a run, since the code depends on it."""
    return learner.scorer.pack(prepared.train[: _per_step(learner.config)])[-1]


def _say_plain(reasons: Sequence[str]) -> None:
    """Say what is computed the plain way."""
    for reason in reasons:
        say(f"the plain, slower path is taken for {reason}")


def _is_done(config: TuneConfig, state: checkpoint.State) -> bool:
    return state.step >= state.total_steps or _time_is_up(config, state) or _is_patience_spent(config, state)


def _is_patience_spent(config: TuneConfig, state: checkpoint.State) -> bool:
    return bool(config.early_stopping_patience) and state.since_best >= config.early_stopping_patience


def _finish(run: RunFolder, learner: Learner, prepared: Prepared, state: checkpoint.State) -> RunFolder:
    """Write the adapter that validated best, its tokenizer with the frozen template, and the plot."""
    config = learner.config
    checkpoint.load_parameters(checkpoint.folder(run, state.best_step), learner.parameters)
    with atomic_folder(run.root / "adapter") as target:
        save_adapter(learner.model, target, base=config.model.partition("@")[0], start=learner.start)
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
            "adapter_sha256": run.manifest()["artefacts"]["adapter"]["sha256"]["adapter_model.safetensors"],
            "elapsed_s": round(state.elapsed_s, 1),
            "tokens": state.tokens,
            "tokens_per_s": round(sum(r.get("tokens", 0) for r in rows) / max(1e-9, sum(_step_s(r) for r in rows)), 1),
            "peak_rss_bytes": resident_bytes(peak=True),
            "gpu": learner.gpu,
        },
    )
    say(
        f"validation loss {first:.3f} -> {state.best_loss:.3f} (best at step {state.best_step} of {state.step}) "
        f"in {state.elapsed_s / 60:.1f} min; adapter in {run.root / 'adapter'}"
    )
    if state.best_step == 0:
        say("no step validated better than the base model: the adapter changes nothing; try a lower learning_rate")
    return run


def _step_s(row: dict[str, Any]) -> float:
    return float(row["tokens"] / row["tokens_per_s"]) if row.get("tokens_per_s") else 0.0


def _validate(
    run: RunFolder,
    state: checkpoint.State,
    learner: Learner,
    validation: list[Batch],
    *,
    row: dict[str, Any] | None = None,
) -> tuple[checkpoint.State, float]:
    """Append the step's row with its validation loss; return the state, the best step in it, and the loss."""
    loss = learner.scorer.mean_loss(validation, device=learner.device)
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
    say(f"{step_s:.1f} s a step: {fitted.total_steps} of {state.total_steps} steps fit into {config.max_minutes:g} min")
    return fitted


def _time_is_up(config: TuneConfig, state: checkpoint.State) -> bool:
    return bool(config.max_minutes) and state.step > 0 and state.elapsed_s >= config.max_minutes * 60


def _keep_metrics_until(run: RunFolder, step: int) -> None:
    """Drop the metrics of steps that came after the checkpoint gone on from."""
    rows = [row for row in run.metrics() if row["step"] <= step]
    write_atomic(run.metrics_path, "".join(json.dumps(row) + "\n" for row in rows))
