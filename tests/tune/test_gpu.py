"""What only a CUDA device can show: FlashAttention, every precision resumed bit for bit, the card's memory."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from lorikeet.config import TuneConfig
from lorikeet.messages import Conversation, Message
from lorikeet.tune import forecast, loop
from lorikeet.tune.adapter import apply_lora, load_base, trained_parameters
from lorikeet.tune.attention import why_no_flash
from lorikeet.tune.batches import pack
from lorikeet.tune.fast import Scorer
from lorikeet.tune.learner import Learner

from ..conftest import make_conversations, make_model, write_jsonl
from .interrupted import tune_interrupted
from .test_fast import awaken, gradients, rows_of

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
    pytest.mark.timeout(600),
]

GPU = torch.device("cuda")


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose adapter is wide enough for 8-bit moments."""
    return make_model(tmp_path_factory.mktemp("wide"), hidden_size=256)


@pytest.fixture
def config(wide_model: Path, tmp_path: Path) -> TuneConfig:
    rows = make_conversations(60)
    rows += [  # longer than a block of keys of FlashAttention, which adds up the blocks' gradients in any order if it may
        Conversation((Message("user", f"{n} " * 400), Message("assistant", "one two three " * 100))) for n in range(20)
    ]
    data = write_jsonl(tmp_path / "chats.jsonl", rows)
    return TuneConfig(
        model=str(wide_model), data=str(data), max_steps=6, learning_rate=1e-2, save_steps=2, eval_steps=3
    )


@pytest.mark.parametrize("window", [0, 40])
def test_flash_attention_agrees_for_the_heads_of_llama(window: int) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("FlashAttention needs Ampere or later")
    assert why_no_flash(GPU, torch.bfloat16, heads=32, key_heads=8, size=64, window=window) == ""


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_loss_and_gradients_are_those_of_the_cpu(wide_model: Path, dtype: torch.dtype) -> None:
    config, batch, found = TuneConfig(lora_dropout=0.0), pack(rows_of(wide_model)), []
    for device, computed in ((torch.device("cpu"), torch.float32), (GPU, dtype)):
        model = apply_lora(load_base(wide_model, computed, device), config)
        torch.manual_seed(5)
        for parameter in trained_parameters(model).values():
            parameter.data = torch.randn(parameter.shape).mul_(0.05).to(device)
        scorer = Scorer.build(model, config, dtype=computed)
        loss = scorer.summed_loss(batch.to(device))
        found.append([loss.detach().cpu(), *(g.cpu() for g in gradients(model, loss))])
    tolerance = 1e-4 if dtype == torch.float32 else 0.05
    assert all((a - b).norm() <= tolerance * a.norm() for a, b in zip(*found, strict=True))


@pytest.mark.parametrize(
    "change",
    [
        {"dtype": "bfloat16"},
        {"dtype": "float16"},
        {"dtype": "float32"},
        {"optim": "adamw_8bit"},
        {"load_in_4bit": True, "optim": "adamw_8bit"},
        {"use_dora": True},
        {"gradient_checkpointing": True},
        {"torch_compile": "on"},
    ],
)
def test_an_interrupted_run_gives_the_adapter_of_the_uninterrupted_one(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    config = replace(config, **change)
    whole = loop.tune(config, out=tmp_path / "whole")
    tune_interrupted(config, tmp_path / "broken", monkeypatch, at_step=3)
    resumed = loop.resume(tmp_path / "broken")
    name = "adapter/adapter_model.safetensors"
    assert (whole.root / name).read_bytes() == (resumed.root / name).read_bytes()
    gpu = whole.manifest()["tuned"]["gpu"]
    assert gpu["name"] == torch.cuda.get_device_name() and gpu["peak_bytes"] > 0


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_forecast_of_the_cards_memory_is_not_below_what_is_taken(
    config: TuneConfig, wide_model: Path, checkpointing: bool
) -> None:
    config = replace(config, gradient_checkpointing=checkpointing, max_length=200)
    learner = Learner.load(config, wide_model)
    awaken(learner.model)
    rows = rows_of(wide_model) * 4
    held = torch.cuda.memory_allocated()
    found = forecast.measure(learner.scorer, rows, config, steps=10, validation_tokens=100)
    torch.cuda.reset_peak_memory_stats()
    learner.model.train()
    learner.step([pack(rows[: found.largest_tokens // len(rows[0].ids)])], rate=1e-3)
    assert torch.cuda.max_memory_allocated() - held <= found.memory_bytes
