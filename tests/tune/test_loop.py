"""The loop on a tiny model: it learns, repeats itself bit for bit, resumes, and is stopped without loss."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from lorikeet import files
from lorikeet.config import TuneConfig
from lorikeet.data.encode import encode_all
from lorikeet.errors import InputError, Interrupted, MachineError, MissingExtraError
from lorikeet.prompt import PromptFormat
from lorikeet.run import RunFolder
from lorikeet.tune import checkpoint, loop, track
from lorikeet.tune.adapter import apply_lora
from lorikeet.tune.batches import Batch, pack
from lorikeet.tune.fast import Scorer

from ..conftest import make_conversations, write_jsonl


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TuneConfig:
    return TuneConfig(
        model=str(tiny_model),
        data=str(chats),
        max_steps=9,
        learning_rate=1e-2,
        eval_steps=4,
        save_steps=3,
        dtype="float32",
    )


def adapter_of(run: Path) -> dict[str, torch.Tensor]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_it_learns_and_writes_the_run_folder(config: TuneConfig, tmp_path: Path) -> None:
    run = loop.tune(config, out=tmp_path / "run")
    manifest = run.manifest()
    assert manifest["status"] == "tuned"
    assert manifest["tuned"]["best_val_loss"] < manifest["tuned"]["first_val_loss"] - 0.1
    rows = run.metrics()
    assert [row["step"] for row in rows] == list(range(10))
    assert {"loss", "learning_rate", "tokens", "supervised_tokens", "tokens_per_s", "rss_bytes", "elapsed_s"} <= rows[
        1
    ].keys()
    assert [row["step"] for row in rows if "val_loss" in row] == [0, 4, 8, 9]
    assert (run.reports / "loss.png").read_bytes().startswith(b"\x89PNG")
    adapter = json.loads((run.root / "adapter" / "adapter_config.json").read_text())
    assert (adapter["r"], adapter["lora_alpha"], adapter["base_model_name_or_path"]) == (16, 16, config.model)
    assert len(list((run.root / "checkpoints").iterdir())) <= config.save_total_limit + 1
    assert not list(run.root.rglob("*.part"))
    assert len((run.root / "data" / "heldout.jsonl").read_text().splitlines()) == manifest["data"]["heldout"] == 8


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(config: TuneConfig, tmp_path: Path) -> None:
    first, second = (loop.tune(config, out=tmp_path / name).root for name in ("a", "b"))
    other = loop.tune(replace(config, seed=1), out=tmp_path / "c").root
    assert equal(adapter_of(first), adapter_of(second))
    assert not equal(adapter_of(first), adapter_of(other))


def test_the_best_checkpoint_is_the_adapter(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    losses = iter([5.0, 4.0, 3.0, 3.5, 4.5])  # steps 0, 2, 4, 6, 8: the run overfits after step 4
    monkeypatch.setattr(Scorer, "mean_loss", lambda *_, **__: next(losses))
    run = loop.tune(replace(config, max_steps=8, eval_steps=2, save_total_limit=1), out=tmp_path / "run")
    assert run.manifest()["tuned"]["best_step"] == 4
    assert sorted(path.name for path in (run.root / "checkpoints").iterdir()) == ["step-000004", "step-000008"]
    kept = load_file(run.root / "checkpoints" / "step-000004" / "adapter.safetensors")
    written = adapter_of(run.root)
    assert len(kept) == len(written)
    assert all(torch.equal(value, written[name.replace(".default", "")]) for name, value in kept.items())


def test_what_the_optimizer_knows_is_restored_where_its_parameters_are(tmp_path: Path) -> None:
    run, scaler = RunFolder.create(tmp_path / "run", config={}), torch.amp.GradScaler("cpu", enabled=False)
    here, elsewhere = ({"a": torch.nn.Parameter(torch.ones(3, device=device))} for device in ("cpu", "meta"))
    optimizer = torch.optim.AdamW(here.values(), fused=True)
    here["a"].grad = torch.ones(3)
    optimizer.step()
    state = checkpoint.State(1, 1, 1, 0.0, elapsed_s=0.0, validation_s=0.0, tokens=1)
    checkpoint.save(run, state, here, optimizer, scaler)
    newest = checkpoint.latest(run)
    assert newest
    for parameters in (here, elsewhere):
        restored = torch.optim.AdamW(parameters.values())
        assert checkpoint.restore(newest, parameters, restored, scaler) == state
        kept = restored.state[parameters["a"]]
        assert kept.keys() == {"step", "exp_avg", "exp_avg_sq"}  # the fused step on a GPU reads the count there, too
        assert all(value.device == parameters["a"].device for value in kept.values())


def test_killed_and_resumed_is_uninterrupted_bit_for_bit(config: TuneConfig, tmp_path: Path) -> None:
    whole = loop.tune(config, out=tmp_path / "whole").root
    code = (
        "import sys; from pathlib import Path; from lorikeet.tune import loop; from lorikeet.config import TuneConfig; import json\n"
        "config = json.loads(sys.argv[1]); config['target_modules'] = tuple(config['target_modules'])\n"
        "append = loop.RunFolder.append_metrics\n"
        "def dying(run, row):\n"
        "    append(run, row)\n"
        "    if row['step'] == int(sys.argv[3]): import os, signal; os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.RunFolder.append_metrics = dying\n"
        "loop.tune(TuneConfig(**config), out=Path(sys.argv[2]))\n"
    )
    for step in (2, 7):
        broken = tmp_path / f"broken-{step}"
        arguments = [sys.executable, "-c", code, json.dumps(config.__dict__), str(broken), str(step)]
        assert subprocess.run(arguments, capture_output=True, check=False).returncode == -signal.SIGKILL
        assert RunFolder.open(broken).manifest()["status"] == "tuning"
        loop.resume(broken)
        assert equal(adapter_of(whole), adapter_of(broken))
        assert [(r["step"], r.get("loss"), r.get("val_loss")) for r in RunFolder.open(broken).metrics()] == [
            (r["step"], r.get("loss"), r.get("val_loss")) for r in RunFolder.open(whole).metrics()
        ]


def test_sigterm_writes_a_checkpoint_and_says_how_to_go_on(config: TuneConfig, tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = [
        "--model",
        config.model,
        "--data",
        config.data,
        "--max-steps",
        "4000",
        "--dtype",
        "float32",
        "--out",
        str(out),
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "from lorikeet.cli import main; main()", "tune", *flags],
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not ((out / "metrics.jsonl").exists() and len(RunFolder(out).metrics()) > 3):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    last = errors.strip().splitlines()[-1]
    assert last.startswith("lorikeet: stopped at step") and f"lorikeet tune --resume {out}" in last
    step = RunFolder.open(out).metrics()[-1]["step"]
    assert (out / "checkpoints" / f"step-{step:06d}" / "state.json").is_file()


def test_accumulation_weighs_every_token_the_same(tiny_model: Path) -> None:
    """Two micro-batches of unequal length give the gradient of one batch of both (transformers' old mistake)."""
    prompt = PromptFormat.load(tiny_model)
    rows = sorted(
        encode_all(prompt, make_conversations(8), max_length=200, on_long="error").rows,
        key=lambda row: row.supervised_tokens,
    )
    gradients = []
    for parts in ([rows], [rows[:7], rows[7:]]):
        torch.manual_seed(0)
        config = TuneConfig(lora_dropout=0.0)
        model = apply_lora(AutoModelForCausalLM.from_pretrained(tiny_model), config)
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        scorer = Scorer.build(model, config, dtype=torch.float32)
        total = sum(row.supervised_tokens for row in rows)
        for part in parts:
            (scorer.summed_loss(pack(part)) / total).backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be above 0"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"learning_rate": float("nan")}, "learning_rate is nan"),
        ({"learning_rate": float("inf")}, "learning_rate is inf; it must be a finite number"),
        ({"epochs": float("inf")}, "epochs is inf"),
        ({"max_minutes": float("inf")}, "max_minutes is inf"),
        ({"seed": 20261125123456}, "seed is 20261125123456; it must be at most 4294967295"),
        ({"epochs": 1e308}, "epochs is 1e\\+308; it must be at most 1000000"),
        ({"max_minutes": 1e308}, "max_minutes is 1e\\+308; it must be at most 1000000"),
        ({"lora_r": 10**30}, "lora_r is 10+; it must be at most 1000000000"),
        ({"system_prompt": "be \udce9"}, "system_prompt is no text"),
        ({"system_prompt": "be\0brief"}, "system_prompt is no text"),
        ({"data": "~no-such-user/chats.jsonl"}, "there is no home folder of that name"),
        ({"dtype": "fp16"}, "dtype is fp16; it must be one of auto, float32"),
        ({"use_dora": True, "init_lora_weights": "pissa"}, "use_dora and init_lora_weights pissa exclude each other"),
        ({"load_in_4bit": True, "init_lora_weights": "pissa"}, "load_in_4bit and init_lora_weights pissa exclude"),
        ({"target_modules": ("q_proj", "lm_head")}, "lm_head cannot get an adapter"),
        ({"target_modules": ("q_proj", "qkv")}, "target_modules: qkv cannot get an adapter in .*q_proj"),
        ({"data": "missing.jsonl"}, "missing.jsonl is not there"),
        ({"model": "/nowhere"}, "/nowhere"),
    ],
)
def test_bad_settings_leave_nothing_behind(
    config: TuneConfig, tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    with pytest.raises(InputError, match=message):
        loop.tune(replace(config, **change), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_run_that_has_no_memory_from_the_start_leaves_nothing_behind(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(loop.Learner, "load", full)
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator"):
        loop.tune(config, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_folder_that_is_there_is_not_touched(config: TuneConfig, tmp_path: Path) -> None:
    (tmp_path / "note").write_text("mine")
    with pytest.raises(InputError, match="is there already"):
        loop.tune(config, out=tmp_path)
    assert (tmp_path / "note").read_text() == "mine"


def test_files_of_ones_own_that_look_like_leftovers_are_not_touched(config: TuneConfig, tmp_path: Path) -> None:
    for name in ("poetry.lock", "film.part"):
        out = tmp_path / name
        out.mkdir()
        (out / name).write_text("mine")
        with pytest.raises(InputError, match="is there already"):
            loop.tune(replace(config, target_modules=("qkv",)), out=out)
        assert (out / name).read_text() == "mine"
    left = tmp_path / "left"
    left.mkdir()
    for name in (".tune.lock", ".run.json.123.part"):
        (left / name).touch()
    loop.tune(replace(config, max_steps=1), out=left)


def test_a_path_with_dollars_and_bytes_that_are_no_text_is_tuned_on(config: TuneConfig, tmp_path: Path) -> None:
    data = write_jsonl(tmp_path / "my $x_{$ \\frac$ caf\udce9.jsonl", make_conversations())
    run = loop.tune(replace(config, data=str(data), max_steps=1), out=tmp_path / "run")
    assert run.manifest()["status"] == "tuned" and run.manifest()["data"]["name"] == str(data)


def test_a_tracker_that_is_not_installed_is_said_before_anything_is_read(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(track.importlib.util, "find_spec", lambda name: None if name == "trackio" else name)
    monkeypatch.setattr(loop, "_read", lambda _: pytest.fail("the data was read first"))
    with pytest.raises(MissingExtraError, match=r"trackio is not installed; .*lorikeet\[track\]"):
        loop.tune(replace(config, track=("wandb", "trackio")), out=tmp_path / "run")


def test_a_full_disk_found_before_a_checkpoint_says_how_to_go_on(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, out = checkpoint.save, tmp_path / "run"

    def full(run: RunFolder, state: checkpoint.State, *given: Any) -> None:
        if state.step:
            monkeypatch.setattr(files.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))  # type: ignore[attr-defined]
        save(run, state, *given)

    monkeypatch.setattr(checkpoint, "save", full)
    with pytest.raises(MachineError, match=rf"0.0 GB free and .* needed; .*; then: lorikeet tune --resume {out}$"):
        loop.tune(config, out=out)
    monkeypatch.undo()
    assert loop.resume(out).manifest()["status"] == "tuned"


def test_what_was_decided_on_compiling_stands_when_a_run_goes_on_before_its_first_checkpoint(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[bool] = []

    def compile_blocks(scorer: Scorer, batch: Batch, *, native: bool = True) -> str:
        compiled.append(native)
        scorer.native = native
        return ""

    def killed(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Scorer, "compile", compile_blocks)
    for asked, from_s, expected in (("on", 0, [True, True]), ("auto", 1e9, []), ("auto", 0, [True, True])):
        out = tmp_path / f"{asked}-{from_s}"
        compiled.clear()
        with monkeypatch.context() as patch:
            patch.setattr(loop, "COMPILE_FROM_S", from_s)
            patch.setattr(loop.checkpoint, "save", killed)
            with pytest.raises(Interrupted):
                loop.tune(replace(config, torch_compile=asked, max_steps=1), out=out)
        monkeypatch.setattr(loop, "COMPILE_FROM_S", 1e9 - from_s)  # so that it would be decided otherwise
        loop.resume(out)
        assert compiled == expected and RunFolder.open(out).manifest()["compiled"] == bool(expected)


def test_resume_refuses_changed_data(config: TuneConfig, chats: Path, tmp_path: Path) -> None:
    run = loop.tune(config, out=tmp_path / "run")
    run.update(status="tuning")
    write_jsonl(chats, make_conversations(61))
    with pytest.raises(InputError, match="has changed since"):
        loop.resume(run.root)


def test_time_bounds_the_run(config: TuneConfig, tmp_path: Path) -> None:
    began = time.monotonic()
    run = loop.tune(
        replace(config, max_steps=0, epochs=1000, max_minutes=0.1, eval_steps=1000, save_steps=1000),
        out=tmp_path / "run",
    )
    tuned = run.manifest()["tuned"]
    assert 1 < tuned["steps"] < 6000
    assert time.monotonic() - began < 30
