"""A small sweep: the same run with different settings, compared by validation loss, with Optuna.

    sweep(config, ("learning_rate=1e-4,3e-4,1e-3",), trials=0, out=Path("runs/sweep"))
    resume_sweep(Path("runs/sweep"))

Each trial is a whole run folder, OUT/trial-000 and so on; OUT/sweep.json holds what is done, so a sweep that was
stopped goes on where it was.
"""

from __future__ import annotations

import itertools
import json
import math
import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_origin

import optuna

from lorikeet.config import TuneConfig, check_tune, tune_types
from lorikeet.errors import InputError, Interrupted, MachineError
from lorikeet.files import alone, atomic_file, write_atomic
from lorikeet.run import RunFolder
from lorikeet.tune import loop
from lorikeet.tune.forecast import TooLargeError
from lorikeet.tune.plot import plot_sweep
from lorikeet.tune.progress import say
from lorikeet.tune.stop import stoppable
from lorikeet.tune.track import require_trackers

SWEEP = "sweep.json"

INCOMPARABLE = {
    "model": "losses of different models are not comparable",
    "data": "losses on different data are not comparable",
    "system_prompt": "it changes what is validated on",
    "validation_share": "it changes what is validated on",
    "heldout_share": "it changes what is validated on",
    "max_length": "it changes what is validated on",
    "on_long": "it changes what is validated on",
    "seed": "it changes what is validated on",
}
"""Fields that cannot be swept, and why."""

MOST_COMBINATIONS = 10_000
"""A larger space is no small sweep."""

NUMBERS = {int: "a whole number", float: "a number"}

Space = dict[str, list[Any]]


@dataclass(frozen=True, slots=True)
class Trial:
    """One run of a sweep that has ended."""

    values: dict[str, Any]
    loss: float | None
    """Best validation loss; None if it diverged or does not fit into memory."""
    best_step: int
    seconds: float
    why: str
    """Why it has no loss; '' if it has."""
    too_large: bool = False
    """Whether that is because it does not fit into memory."""


def parse_space(specs: Sequence[str]) -> Space:
    """Return what `FIELD=V1,V2,...` names, each value of its field's type.

    Raises InputError for a field that there is not, is given twice or makes runs incomparable, for values of another type,
    and for more combinations than a small sweep has.
    """
    kinds = tune_types()
    space: Space = {}
    for spec in specs:
        name, equals, values = spec.partition("=")
        name = name.strip().removeprefix("--").replace("-", "_")
        if not equals or not values.strip():
            raise InputError(f"--sweep {spec} names no values; write FIELD=V1,V2 such as learning_rate=1e-4,3e-4,1e-3")
        if name in INCOMPARABLE:
            raise InputError(f"--sweep {name}: {INCOMPARABLE[name]}")
        if name in space:
            raise InputError(f"--sweep {name} is given twice; give its values in one: {name}=V1,V2")
        if name not in kinds or get_origin(kinds[name]) is tuple:
            nearest = get_close_matches(name, kinds, n=1)
            hint = f"did you mean {nearest[0]}?" if nearest else "see: lorikeet tune --help"
            raise InputError(f"--sweep {name}: tune has no such setting that can be swept; {hint}")
        space[name] = list(dict.fromkeys(_value(name, text.strip(), kinds[name]) for text in values.split(",")))
    if (size := math.prod(map(len, space.values()))) > MOST_COMBINATIONS:
        raise InputError(f"--sweep has {size} combinations; give at most {MOST_COMBINATIONS}")
    return space


def _value(name: str, text: str, kind: Any) -> Any:
    """Return `text` as the type of the field, whose choices are checked with all settings."""
    if kind is bool:
        if text.lower() not in {"true", "false"}:
            raise InputError(f"--sweep {name}: {text} is not true or false")
        return text.lower() == "true"
    if kind not in NUMBERS:
        return text
    try:
        return kind(text)
    except ValueError as error:
        raise InputError(f"--sweep {name}: {text} is not {NUMBERS[kind]}") from error


def sweep(config: TuneConfig, specs: Sequence[str], *, trials: int, out: Path) -> Path:
    """Run the trials in the new folder `out` and return the best one's run folder.

    All combinations are run; with `trials` above 0 at most so many, chosen by Optuna's TPE sampler (Bergstra et al.,
    2011) from those before, none twice. Raises InputError for settings that cannot be tuned.
    """
    space = parse_space(specs)
    require_trackers(config.track)
    for values in _combinations(space):
        check_tune(replace(config, **values))
    RunFolder.require_free(out)
    settings = {"config": asdict(config), "space": space, "trials": trials, "done": []}
    write_atomic(out / SWEEP, json.dumps(settings, indent=2) + "\n")
    return resume_sweep(out)


def resume_sweep(out: Path) -> Path:
    """Run the trials that are left of the sweep in `out`, write table and plot, and return the best run's folder.

    Raises InputError if `out` holds no whole sweep, another process is at work there, or no trial gave a loss, and
    Interrupted, which says how to go on, when it is stopped.
    """
    way_on = f"go on with: lorikeet tune --resume {out}"
    with alone(out, command="tune"):
        try:
            with stoppable(lambda: f"stopped; {way_on}"):
                return _report(out, _run_trials(out))
        except Interrupted as error:
            raise Interrupted(f"{str(error).partition(';')[0]}; {way_on}") from error


def _run_trials(out: Path) -> list[Trial]:
    """Run the trials that are left of the sweep in `out`; return all of them."""
    try:
        settings = json.loads((out / SWEEP).read_text(encoding="utf-8"))
        config = loop.read_config(settings["config"])
        space: Space = settings["space"]
        done = [Trial(**trial) for trial in settings["done"]]
        combinations = _combinations(space)
        total = min(len(combinations), settings["trials"] or len(combinations))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"{out / SWEEP} cannot be read ({type(error).__name__}: {error}); start the sweep again in a new folder"
        ) from error
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=config.seed), direction="minimize")
    if total == len(combinations):
        for values in combinations:
            study.enqueue_trial(values)
    for number in range(total):
        asked, values = _ask(study, space, [trial.values for trial in done[:number]])
        if number == len(done):
            said = ", ".join(
                f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in values.items()
            )
            say(f"\ntrial {number + 1} of {total}: {said}")
            done.append(_run_trial(replace(config, **values), out / f"trial-{number:03d}", values))
            settings["done"] = [asdict(trial) for trial in done]
            write_atomic(out / SWEEP, json.dumps(settings, indent=2) + "\n")
        loss = done[number].loss
        if loss is None:
            study.tell(asked, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(asked, loss)
    return done


def _ask(
    study: optuna.Study, space: Space, tried: Sequence[dict[str, Any]]
) -> tuple[optuna.trial.Trial, dict[str, Any]]:
    """Return a trial and its values, which are none of those `tried`: where the sampler repeats itself, the first of the others."""
    while True:
        asked = study.ask()
        values = {name: asked.suggest_categorical(name, choices) for name, choices in space.items()}
        if values not in tried:
            return asked, values
        study.tell(asked, state=optuna.trial.TrialState.FAIL)
        study.enqueue_trial(next(others for others in _combinations(space) if others not in tried))


def _combinations(space: Space) -> list[dict[str, Any]]:
    return [dict(zip(space, values, strict=True)) for values in itertools.product(*space.values())]


def _run_trial(config: TuneConfig, root: Path, values: dict[str, Any]) -> Trial:
    """Tune in `root`, going on where an interrupted trial was; a run that diverges or does not fit is a trial without a loss."""
    try:
        if (root / "run.json").is_file():
            run = RunFolder.open(root)
            if run.manifest()["status"] != "tuned":
                run = loop.resume(root)
        else:
            shutil.rmtree(root, ignore_errors=True)
            run = loop.tune(config, out=root)
    except (loop.DivergedError, TooLargeError) as error:
        return Trial(values, None, 0, 0.0, str(error), too_large=isinstance(error, TooLargeError))
    tuned = run.manifest()["tuned"]
    return Trial(values, tuned["best_val_loss"], tuned["best_step"], tuned["elapsed_s"], "")


def _report(out: Path, done: Sequence[Trial]) -> Path:
    """Print the table, write the plot, and return the best trial's folder."""
    good = [(trial.loss, number) for number, trial in enumerate(done) if trial.loss is not None]
    if not good:
        fault = MachineError if all(trial.too_large for trial in done) else InputError
        raise fault(f"no trial of {out} gave a loss: {done[0].why}")
    best = min(good)[1]
    for line in table(done, best=best):
        print(line)
    for number, trial in enumerate(done):
        if trial.why:
            print(f"trial {number:03d} has no loss: {trial.why}")
    curves = [RunFolder(out / f"trial-{number:03d}").metrics() for number in range(len(done))]
    with atomic_file(out / "reports" / "sweep.png") as path:
        plot_sweep([(t.values, t.loss) for t in done], curves, path, best=best)
    print(f"plot: {out / 'reports' / 'sweep.png'}")
    return out / f"trial-{best:03d}"


def table(done: Sequence[Trial], *, best: int) -> list[str]:
    """Return the trials as lines of text, the best one marked."""
    names = list(done[0].values)
    head = ["", "trial", *names, "val loss", "best step", "minutes"]
    rows = [
        [
            "*" if number == best else "",
            f"{number:03d}",
            *(
                f"{trial.values[name]:g}" if isinstance(trial.values[name], float) else str(trial.values[name])
                for name in names
            ),
            "none" if trial.loss is None else f"{trial.loss:.4f}",
            str(trial.best_step),
            f"{trial.seconds / 60:.1f}",
        ]
        for number, trial in enumerate(done)
    ]
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    return ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in [head, *rows]]
