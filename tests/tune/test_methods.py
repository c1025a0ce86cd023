"""What is a setting beside plain LoRA: each trains, and what is exported is what was trained."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorikeet.config import ExportConfig, TuneConfig
from lorikeet.data.encode import encode_all
from lorikeet.errors import InputError
from lorikeet.export.stage import export
from lorikeet.prompt import PromptFormat
from lorikeet.tune import loop
from lorikeet.tune.fast import Scorer

from ..conftest import make_conversations
from .interrupted import tune_interrupted


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TuneConfig:
    return TuneConfig(
        model=str(tiny_model), data=str(chats), max_steps=6, eval_steps=2, learning_rate=1e-2, dtype="float32"
    )


@pytest.mark.parametrize(
    "method",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "pissa", "use_rslora": True},
        {"loraplus_lr_ratio": 8.0},
        {"optim": "adamw_8bit"},
    ],
    ids=str,
)
def test_it_trains_and_the_merged_model_is_the_tuned_one(
    config: TuneConfig, tiny_model: Path, tmp_path: Path, method: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    losses: list[float] = []
    score = Scorer.mean_loss
    monkeypatch.setattr(Scorer, "mean_loss", lambda *a, **k: losses.append(score(*a, **k)) or losses[-1])
    run = loop.tune(replace(config, **method), out=tmp_path / "run")
    tuned = run.manifest()["tuned"]
    assert tuned["best_val_loss"] < tuned["first_val_loss"] - 0.05
    assert tuned["first_val_loss"] == losses[0]
    export(run.root, ExportConfig(formats=("adapter", "merged")))
    merged = AutoModelForCausalLM.from_pretrained(run.root / "merged", dtype=torch.float32).eval()
    base = AutoModelForCausalLM.from_pretrained(tiny_model)
    plain = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    adapted = PeftModel.from_pretrained(base, str(run.root / "adapter")).eval()
    row = encode_all(
        PromptFormat.load(run.root / "adapter"), make_conversations(1), max_length=200, on_long="error"
    ).rows[0]
    ids = torch.tensor([row.ids])
    with torch.no_grad():
        a, b, c = (model(input_ids=ids).logits for model in (adapted, merged, plain))
    assert (a - b).abs().mean() / (a - c).abs().mean() < 0.1  # bfloat16 keeps 8 bits of each weight


def test_pissa_starts_as_the_base_and_exports_twice_the_rank(config: TuneConfig, tmp_path: Path) -> None:
    plain = loop.tune(replace(config, max_steps=1), out=tmp_path / "plain").manifest()["tuned"]
    run = loop.tune(replace(config, max_steps=1, init_lora_weights="pissa"), out=tmp_path / "pissa")
    assert run.manifest()["tuned"]["first_val_loss"] == pytest.approx(plain["first_val_loss"], rel=1e-3)
    written = json.loads((run.root / "adapter" / "adapter_config.json").read_text())
    assert (written["r"], written["lora_alpha"], written["init_lora_weights"]) == (32, 32, True)
    assert written["target_modules"] == sorted(config.target_modules)  # PEFT's set has another order in every process


def test_a_rank_that_pissa_cannot_have_is_refused(config: TuneConfig, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"lora_r is 33, and .*k_proj has 32 .* give --lora-r 32 or less"):
        loop.tune(replace(config, init_lora_weights="pissa", lora_r=33), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    loop.tune(replace(config, init_lora_weights="pissa", lora_r=32, max_steps=1), out=tmp_path / "run")


def test_b_learns_faster_with_lora_plus(config: TuneConfig) -> None:
    from lorikeet.tune.optimizer import make_optimizer, set_learning_rate

    parameters = {f"layer.lora_{part}.default.weight": torch.nn.Parameter(torch.zeros(2, 2)) for part in "AB"}
    optimizer = make_optimizer(parameters, replace(config, loraplus_lr_ratio=16.0))
    set_learning_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    a, b = parameters.values()
    assert (rates[id(a)], rates[id(b)]) == (0.5, 8.0)


@pytest.mark.parametrize(
    "rank", [16, 64]
)  # of 64 the matrices are large enough for 8 bits and a code book that all share
def test_eight_bit_moments_resume_bit_for_bit(config: TuneConfig, tmp_path: Path, monkeypatch: Any, rank: int) -> None:
    config = replace(config, optim="adamw_8bit", save_steps=2, lora_r=rank)
    whole = loop.tune(config, out=tmp_path / "whole")
    tune_interrupted(config, tmp_path / "broken", monkeypatch, at_step=3)
    resumed = loop.resume(tmp_path / "broken")
    name = "adapter/adapter_model.safetensors"
    assert (whole.root / name).read_bytes() == (resumed.root / name).read_bytes()


def test_tuning_stops_early_when_validation_does_not_improve(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = iter([5.0, 4.0, 4.5, 4.2, 3.0])
    monkeypatch.setattr(Scorer, "mean_loss", lambda *_, **__: next(losses))
    run = loop.tune(replace(config, max_steps=100, eval_steps=2, early_stopping_patience=2), out=tmp_path / "run")
    assert (run.manifest()["tuned"]["steps"], run.manifest()["tuned"]["best_step"]) == (6, 2)
    assert "stopped early: 2 validations without improvement" in capsys.readouterr().err
