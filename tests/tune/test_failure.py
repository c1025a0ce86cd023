"""Tuning when the disk is full, it is stopped, another process is at work, or files are damaged: one line, nothing lost."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors.torch import load_file, save_file

from lorikeet.cli import run as run_cli
from lorikeet.config import TuneConfig
from lorikeet.errors import InputError, Interrupted, MachineError
from lorikeet.files import sha256_tree
from lorikeet.run import RunFolder
from lorikeet.tune import checkpoint, loop, sweep
from lorikeet.tune.fast import Scorer

from ..conftest import make_conversations, make_model, write_jsonl
from ..disk import largest_file


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> TuneConfig:
    folder = tmp_path_factory.mktemp("given")
    return TuneConfig(
        model=str(make_model(folder / "base")),
        data=str(write_jsonl(folder / "chats.jsonl", make_conversations())),
        max_steps=6,
        learning_rate=1e-2,
        eval_steps=3,
        save_steps=2,
        dtype="float32",
    )


@pytest.fixture(scope="module")
def whole(config: TuneConfig, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """The run that nothing happened to."""
    return loop.tune(config, out=tmp_path_factory.mktemp("whole") / "run")


def adapter(run: RunFolder) -> bytes:
    return (run.root / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def part(config: TuneConfig, whole: RunFolder, tmp_path: Path) -> RunFolder:
    """A copy of it that is not at its end."""
    run = RunFolder(shutil.copytree(whole.root, tmp_path / "part"))
    run.update(status="tuning")
    run.forget("adapter")
    shutil.rmtree(run.root / "adapter")
    shutil.rmtree(checkpoint.folder(run, 6))
    return run


def at(call: Callable[..., Any], number: int, around: Callable[[], Any]) -> Callable[..., Any]:
    """Return `call`, whose call of this number happens within `around()`."""
    calls = [0]

    def wrapped(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] != number:
            return call(*given, **named)
        with around():
            return call(*given, **named)

    return wrapped


@pytest.mark.parametrize(
    ("owner", "name", "number", "limit_bytes", "file"),
    [
        (RunFolder, "append_metrics", 4, 500, "metrics.jsonl"),  # step 3; the line is cut
        (checkpoint, "save", 2, 20_000, "step-000002"),  # in the adapter's file
        (checkpoint, "save", 2, 100_000, "step-000002"),  # in the optimizer's
        (loop, "save_adapter", 1, 20_000, "adapter"),
    ],
)
def test_a_full_disk_ends_with_one_line_and_the_run_goes_on_to_the_same_adapter(
    config: TuneConfig,
    whole: RunFolder,
    tmp_path: Path,
    owner: Any,
    name: str,
    number: int,
    limit_bytes: int,
    file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(owner, name, at(getattr(owner, name), number, lambda: largest_file(limit_bytes)))
    with pytest.raises(MachineError) as caught:
        loop.tune(config, out=run.root)
    line = str(caught.value)
    assert line.startswith(f"cannot write {run.root}") and f"{file}: File too large; what was there is kept" in line
    assert line.endswith(f"then: lorikeet tune --resume {run.root}") and "\n" not in line
    assert not list(run.root.rglob("*.part"))
    assert adapter(loop.resume(run.root)) == adapter(whole)


def test_a_disk_that_is_full_before_the_first_checkpoint_leaves_no_run(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "save", at(checkpoint.save, 1, lambda: largest_file(20_000)))
    with pytest.raises(MachineError, match=r"free some space and try again$"):
        loop.tune(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_checkpoints_that_going_on_needs_are_not_offered(whole: RunFolder) -> None:
    kept = {path.name for path in (whole.root / "checkpoints").iterdir()}
    best = whole.manifest()["tuned"]["best_step"]
    spare = {path.name for path in checkpoint.spare(whole)}
    assert spare == kept - {"step-000006", f"step-{best:06d}"}


def stopping(_: Any = None, **__: Any) -> Any:
    """Be told to stop, as from outside."""
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(5)
    raise AssertionError("the signal was not heard")


@pytest.mark.parametrize(
    ("owner", "name", "written"),
    [
        (loop, "load_conversations", False),
        (loop, "measure", True),
        (Scorer, "mean_loss", True),
        (loop, "save_adapter", True),
    ],
)
def test_stopped_anywhere_it_says_how_to_go_on(
    config: TuneConfig,
    whole: RunFolder,
    tmp_path: Path,
    owner: Any,
    name: str,
    written: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(owner, name, lambda *_, **__: stopping())
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        loop.tune(config, out=run.root)
    assert signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    if not written:
        assert str(caught.value) == "stopped, nothing is written yet; give the same command to start again"
        assert not run.root.exists()
        return
    assert str(caught.value) == f"stopped; go on with: lorikeet tune --resume {run.root}"
    assert run_cli(["tune", "--resume", str(run.root)]) == 0
    assert adapter(run) == adapter(whole)


def test_a_stopped_sweep_names_itself_and_no_trial(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Scorer, "mean_loss", lambda *_, **__: stopping())
    with pytest.raises(Interrupted, match=rf"^stopped; go on with: lorikeet tune --resume {tmp_path / 'sweep'}$"):
        sweep.sweep(config, ["lora_r=4,8"], trials=0, out=tmp_path / "sweep")
    assert (tmp_path / "sweep" / "trial-000" / "run.json").is_file()


def test_a_second_process_is_kept_out_and_touches_nothing(
    config: TuneConfig, part: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (part.root / "checkpoints" / ".step-000004.17.part").mkdir()
    before = sha256_tree(part.root)
    with FileLock(part.root / ".tune.lock"):
        assert run_cli(["tune", "--resume", str(part.root)]) == 2
    line = f"lorikeet: another lorikeet tune is writing {part.root}; wait for it to end, or stop it\n"
    assert capsys.readouterr().err == line
    assert sha256_tree(part.root) == before and (part.root / "checkpoints" / ".step-000004.17.part").is_dir()
    (tmp_path / "new").mkdir()
    with FileLock(tmp_path / "new" / ".tune.lock"), pytest.raises(InputError, match="another lorikeet tune is writing"):
        loop.tune(config, out=tmp_path / "new")
    (tmp_path / "sweep").mkdir()
    with FileLock(tmp_path / "sweep" / ".tune.lock"), pytest.raises(InputError, match="another lorikeet tune is"):
        sweep.sweep(config, ["lora_r=4,8"], trials=0, out=tmp_path / "sweep")


def damage_json(path: Path, **changes: Any) -> None:
    held = json.loads(path.read_text())
    for name, value in changes.items():
        if value is None:
            del held[name]
        else:
            held[name] = value
    path.write_text(json.dumps(held))


@pytest.mark.parametrize(
    "changes",
    [
        {"status": None},
        {"config": None},
        {"config": {"tune": [1]}},
        {"config": {"tune": {"max_length": "x"}}},
        {"data": None},
        {"base": {}},
        {"template": {"date": "yesterday"}},
    ],
    ids=str,
)
def test_a_manifest_without_what_tune_wrote_is_refused_in_one_line(
    part: RunFolder, changes: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    damage_json(part.manifest_path, **changes)
    assert run_cli(["tune", "--resume", str(part.root)]) == 2
    line = capsys.readouterr().err
    assert "does not hold what tune wrote there" in line and line.count("\n") == 1


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: cut(folder / checkpoint.ADAPTER),
        lambda folder: cut(folder / checkpoint.OPTIMIZER),
        lambda folder: (folder / checkpoint.OPTIMIZER).unlink(),
        lambda folder: save_file(
            {k: v for k, v in load_file(folder / checkpoint.OPTIMIZER).items() if k != "random"},
            folder / checkpoint.OPTIMIZER,
        ),
        lambda folder: cut(folder / checkpoint.STATE),
        lambda folder: damage_json(folder / checkpoint.STATE, step=None),
    ],
)
def test_a_damaged_checkpoint_is_refused_in_one_line_and_without_it_the_run_goes_on(
    part: RunFolder, whole: RunFolder, damage: Callable[[Path], Any]
) -> None:
    newest = checkpoint.latest(part)
    assert newest is not None
    damage(newest)
    with pytest.raises(InputError, match=rf"^{newest} cannot be read .*; remove it to go on") as caught:
        loop.resume(part.root)
    assert "\n" not in str(caught.value)
    shutil.rmtree(newest)
    assert adapter(loop.resume(part.root)) == adapter(whole)


def without_a_weight(folder: Path) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file)
    weights.pop(next(name for name in weights if "o_proj" in name))
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: cut(folder / "model.safetensors"), r"model.safetensors cannot be read \(.*\); restore"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b""), r"model.safetensors cannot be read"),
        (lambda folder: damage_json(folder / "config.json", hidden_size=96), r"another shape \(model.embed_tokens"),
        (lambda folder: damage_json(folder / "config.json", num_hidden_layers=3), r"lacks weights .*model.layers.2"),
        (without_a_weight, r"lacks weights .*o_proj"),
        (lambda folder: (folder / "tokenizer.json").write_text("{}"), "holds no tokenizer that can be read"),
        (lambda folder: damage_json(folder / "tokenizer.json", model={"type": "BPE"}), "holds no tokenizer that"),
    ],
)
def test_a_damaged_base_is_refused_in_one_line_and_leaves_no_run(
    config: TuneConfig,
    tmp_path: Path,
    damage: Callable[[Path], Any],
    message: str,
) -> None:
    base = Path(shutil.copytree(config.model, tmp_path / "base"))
    damage(base)
    with pytest.raises(InputError, match=message) as caught:
        loop.tune(replace(config, model=str(base)), out=tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_damaged_sweep_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for text in ("{", "[]", '{"config": {}, "space": []}'):
        (tmp_path / "sweep.json").write_text(text)
        assert run_cli(["tune", "--resume", str(tmp_path)]) == 2
        line = capsys.readouterr().err
        assert "sweep.json cannot be read" in line and line.count("\n") == 1


def test_files_of_one_name_are_told_apart_when_a_run_goes_on(config: TuneConfig, tmp_path: Path) -> None:
    rows = make_conversations(70)
    for language, some in (("en", rows[:35]), ("de", rows[35:])):
        (tmp_path / "data" / language).mkdir(parents=True)
        write_jsonl(tmp_path / "data" / language / "train.jsonl", some)
    run = loop.tune(replace(config, data=str(tmp_path / "data"), max_steps=1), out=tmp_path / "run")
    assert sorted(run.manifest()["data"]["sha256"]) == ["de/train.jsonl", "en/train.jsonl"]
    for language in ("en", "de"):
        run.update(status="tuning")
        file = tmp_path / "data" / language / "train.jsonl"
        held = file.read_text()
        file.write_text(held.replace("quick", "slow"))
        assert file.read_text() != held
        with pytest.raises(InputError, match="has changed since"):
            loop.resume(run.root)
        file.write_text(held)
    assert loop.resume(run.root).manifest()["status"] == "tuned"


def test_the_report_is_about_the_settings_and_cut_validation_is_counted(
    config: TuneConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    reports: list[dict[str, Any]] = []
    write = loop.write_page
    monkeypatch.setattr(loop, "write_page", lambda report, path: (reports.append(report), write(report, path)))
    settings = replace(config, max_steps=1, max_length=24, on_long="drop", validation_share=0.3, heldout_share=0.2)
    data = loop.tune(settings, out=tmp_path / "run").manifest()["data"]
    (report,) = reports
    assert report["truncated"]["conversations"] == 0 and report["left_out"]["conversations"] >= data["dropped"] > 0
    assert (report["split"]["validation"], report["split"]["heldout"]) == (18, 12)
    left_out = [line for line in capsys.readouterr().err.splitlines() if "of them to validate" in line]
    assert len(left_out) == 1 and f"{data['dropped']} left out" in left_out[0]
    assert f", {18 - data['validation']} of them to validate" in left_out[0] and data["validation"] < 18
    assert data["dropped"] == 18 - data["validation"] + 30 - data["train"]


def test_a_run_that_can_no_longer_be_compiled_says_so(
    part: RunFolder, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    part.update(compiled=True, native=True)
    monkeypatch.setenv("CXX", "/nowhere/c++")
    loop.resume(part.root)
    errors = capsys.readouterr().err
    assert "what was compiled before is not: there is no C++ compiler /nowhere/c++" in errors
    assert "not bit for bit" in errors
