"""A sweep runs every combination, survives one that diverges, goes on after an interruption, and names the best."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lorikeet.cli import run as run_cli
from lorikeet.config import TuneConfig
from lorikeet.errors import InputError, Interrupted, MachineError, MissingExtraError
from lorikeet.run import RunFolder
from lorikeet.tune import forecast, loop, track
from lorikeet.tune import sweep as sweeps
from lorikeet.tune.sweep import parse_space, resume_sweep, sweep


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TuneConfig:
    return TuneConfig(model=str(tiny_model), data=str(chats), max_steps=4, eval_steps=2, dtype="float32")


def test_every_combination_is_run_and_the_lowest_loss_wins(
    config: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "sweep"
    best = sweep(config, ["learning_rate=1e-5,1e-2", "lora-r=4,8"], trials=0, out=out)
    done = json.loads((out / "sweep.json").read_text())["done"]
    assert [list(t["values"].values()) for t in done] == [[1e-5, 4], [1e-5, 8], [1e-2, 4], [1e-2, 8]]
    losses = [RunFolder.open(out / f"trial-{n:03d}").manifest()["tuned"]["best_val_loss"] for n in range(4)]
    assert [t["loss"] for t in done] == losses and best == out / f"trial-{losses.index(min(losses)):03d}"
    table = capsys.readouterr().out.splitlines()
    assert table[0].split() == ["trial", "learning_rate", "lora_r", "val", "loss", "best", "step", "minutes"]
    assert [line.split()[0] for line in table[1:5]].count("*") == 1
    assert (out / "reports" / "sweep.png").read_bytes().startswith(b"\x89PNG")


def test_an_interrupted_sweep_goes_on_and_ends_as_if_it_had_not_been(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    specs = ["learning_rate=1e-3,1e-2,3e-2"]
    whole = sweep(config, specs, trials=0, out=tmp_path / "whole")
    tune = loop.tune
    calls: list[Path] = []

    def interrupted(given: TuneConfig, *, out: Path) -> RunFolder:
        calls.append(out)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return tune(given, out=out)

    monkeypatch.setattr(loop, "tune", interrupted)
    with pytest.raises(Interrupted, match=rf"stopped; go on with: lorikeet tune --resume {tmp_path / 'broken'}$"):
        sweep(config, specs, trials=0, out=tmp_path / "broken")
    assert run_cli(["tune", "--resume", str(tmp_path / "broken")]) == 0
    assert [path.name for path in calls] == ["trial-000", "trial-001", "trial-001", "trial-002"]
    results: list[Any] = [
        [(t["values"], t["loss"]) for t in json.loads((tmp_path / name / "sweep.json").read_text())["done"]]
        for name in ("whole", "broken")
    ]
    assert results[0] == results[1] and whole.name == resume_sweep(tmp_path / "broken").name


def test_a_run_that_diverges_is_a_trial_without_a_loss(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tune = loop.tune

    def diverging(given: TuneConfig, *, out: Path) -> RunFolder:
        if given.learning_rate > 0.1:
            raise loop.DivergedError("the loss is nan at step 1")
        return tune(given, out=out)

    monkeypatch.setattr(loop, "tune", diverging)
    assert sweep(config, ["learning_rate=1e-2,9"], trials=0, out=tmp_path / "s").name == "trial-000"
    assert "\ntrial 001 has no loss: the loss is nan at step 1\n" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"no trial of .* gave a loss: the loss is nan"):
        sweep(config, ["learning_rate=8,9"], trials=0, out=tmp_path / "t")


def test_a_run_that_does_not_fit_is_a_trial_without_a_loss(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require = forecast.Forecast.require

    def tight(self: forecast.Forecast, given: TuneConfig, folder: Path) -> None:
        require(replace(self, available_bytes=1) if given.lora_r == 8 else self, given, folder)

    monkeypatch.setattr(forecast.Forecast, "require", tight)
    out = tmp_path / "s"
    assert sweep(replace(config, max_steps=1), ["lora_r=8,4"], trials=0, out=out).name == "trial-001"
    first, second = json.loads((out / "sweep.json").read_text())["done"]
    assert first["loss"] is None and "tuning needs about" in first["why"] and second["loss"] > 0
    with pytest.raises(MachineError, match=r"no trial of .* gave a loss: tuning needs about"):
        sweep(replace(config, max_steps=1), ["lora_r=8"], trials=0, out=tmp_path / "t")


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_written(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match="wandb is not installed"):
        sweep(replace(config, track=("wandb",)), ["lora_r=2,4"], trials=0, out=tmp_path / "s")
    assert not (tmp_path / "s").exists()


def test_no_combination_is_run_twice(config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sweeps, "_run_trial", lambda config, root, values: sweeps.Trial(values, config.learning_rate, 1, 1.0, "")
    )
    monkeypatch.setattr(sweeps, "_report", lambda out, done: out)
    rates = "1e-5,1e-4,1e-3,1e-2"
    for trials in (2, 10, 15):
        out = sweep(config, [f"learning_rate={rates}", "lora_r=2,4,8,16"], trials=trials, out=tmp_path / str(trials))
        done = [tuple(t["values"].values()) for t in json.loads((out / "sweep.json").read_text())["done"]]
        assert len(set(done)) == len(done) == trials


def test_fewer_trials_are_chosen_from_the_combinations(config: TuneConfig, tmp_path: Path) -> None:
    sweep(replace(config, max_steps=1), ["learning_rate=1e-3,1e-2,3e-2", "lora_r=4,8"], trials=2, out=tmp_path / "s")
    done = json.loads((tmp_path / "s" / "sweep.json").read_text())["done"]
    assert len(done) == 2 and all(t["values"]["lora_r"] in {4, 8} for t in done)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("learning_rat=1,2", "did you mean learning_rate"),
        ("learning_rate", "names no values"),
        ("learning_rate=fast", "fast is not a number"),
        ("lora_r=4,x", "x is not a whole number"),
        (f"lora_r={','.join(map(str, range(1, 10_002)))}", "10001 combinations; give at most 10000"),
        ("use_rslora=maybe", "maybe is not true or false"),
        ("data=a,b", "not comparable"),
        ("max_length=1,2", "changes what is validated on"),
        ("target_modules=q_proj", "no such setting"),
        ("learning_rate=0,1", "learning_rate is 0.0; it must be above 0"),
        ("dtype=float32,fp16", "dtype is fp16; it must be one of auto, float32, bfloat16, float16"),
        ("optim=adamw,sgd", "optim is sgd; it must be one of adamw, adamw_8bit"),
    ],
)
def test_what_cannot_be_swept_is_said_in_one_line(
    config: TuneConfig, tmp_path: Path, spec: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["tune", "--model", config.model, "--data", config.data, "--out", str(tmp_path / "s"), "--sweep", spec]
    assert run_cli(given) == 2
    errors = capsys.readouterr().err.strip()
    assert message in errors and "\n" not in errors
    assert not (tmp_path / "s").exists()


def test_values_have_their_fields_types() -> None:
    assert parse_space(["use-rslora=true,False", "lora_alpha=8,8.5,8", "lora_r=4", "optim=adamw"]) == {
        "use_rslora": [True, False],
        "lora_alpha": [8.0, 8.5],
        "lora_r": [4],
        "optim": ["adamw"],
    }


def test_a_field_given_twice_is_refused() -> None:
    with pytest.raises(InputError, match="lora_r is given twice"):
        parse_space(["lora_r=4", "lora-r=8"])
