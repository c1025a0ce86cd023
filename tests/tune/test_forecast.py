"""The forecast changes nothing, comes near what is measured, and refuses with settings that would do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from lorikeet.cli import run as run_cli
from lorikeet.config import TuneConfig
from lorikeet.data.encode import encode_all
from lorikeet.errors import MachineError
from lorikeet.prompt import PromptFormat
from lorikeet.tune import forecast
from lorikeet.tune.adapter import apply_lora, load_base
from lorikeet.tune.fast import Scorer
from lorikeet.tune.forecast import Forecast, measure

from ..conftest import make_conversations

CPU = torch.device("cpu")


def measured(tiny_model: Path, config: TuneConfig) -> tuple[Scorer, Forecast]:
    rows = encode_all(PromptFormat.load(tiny_model), make_conversations(30), max_length=200, on_long="error").rows
    torch.manual_seed(0)
    scorer = Scorer.build(apply_lora(load_base(tiny_model, torch.float32, CPU), config), config, dtype=torch.float32)
    return scorer, measure(scorer, rows, config, steps=100, validation_tokens=500)


def test_it_leaves_gradients_and_random_state_as_they_were(tiny_model: Path) -> None:
    before = torch.get_rng_state()
    config = TuneConfig(lora_dropout=0.5)
    scorer, found = measured(tiny_model, config)
    torch.manual_seed(0)
    apply_lora(load_base(tiny_model, torch.float32, CPU), config)
    expected = torch.rand(3)
    torch.set_rng_state(before)
    scorer, found = measured(tiny_model, config)
    assert torch.equal(torch.rand(3), expected)
    assert all(parameter.grad is None for parameter in scorer.model.parameters())
    assert found.steps == 100 and found.tokens_per_s > 0 and found.seconds > 0


def test_memory_kept_per_token_is_what_the_pass_keeps(tiny_model: Path) -> None:
    """Two layers of 64 and 128 in float32: at least each layer's inputs and products, at most a few times that."""
    _, found = measured(tiny_model, TuneConfig(lora_dropout=0.0))
    least = 2 * (4 * 64 + 3 * 128) * 4
    assert least < found.bytes_per_token < 12 * least
    assert found.checkpointed_bytes_per_token < found.bytes_per_token


def test_what_does_not_fit_is_refused_with_settings_that_would(tiny_model: Path, tmp_path: Path) -> None:
    _, found = measured(tiny_model, TuneConfig())
    config = TuneConfig()
    tight = replace(
        found,
        fixed_bytes=1_000_000_000,
        available_bytes=1_500_000_000,
        largest_tokens=2048,
        bytes_per_token=500_000.0,
        checkpointed_bytes_per_token=50_000.0,
    )
    with pytest.raises(
        MachineError, match=r"needs about 2.1 GB .* 1.5 GB are free; --max-length 896 would do or --grad"
    ):
        tight.require(config, tmp_path)
    with pytest.raises(MachineError, match="choose a smaller model"):
        replace(tight, fixed_bytes=2_000_000_000).require(config, tmp_path)
    replace(tight, available_bytes=3_000_000_000).require(config, tmp_path)


def test_a_machine_without_room_ends_with_3_and_leaves_no_run(
    tiny_model: Path, chats: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    given = ["tune", "--model", str(tiny_model), "--data", str(chats), "--out", str(out), "--max-steps", "2"]
    monkeypatch.setattr(forecast, "available_bytes", lambda _: 1000)
    assert run_cli(given) == 3
    assert "the weights of" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    monkeypatch.undo()
    monkeypatch.setattr(forecast.checkpoint, "size_bytes", lambda _: 1 << 60)
    assert run_cli(given) == 3
    assert "GB free and" in capsys.readouterr().err.splitlines()[-1]
    assert not out.exists()
    monkeypatch.undo()
    assert run_cli(given) == 0
    assert any(line.startswith("forecast: ") for line in capsys.readouterr().err.splitlines())
