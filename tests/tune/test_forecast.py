"""The forecast changes nothing, comes near what is measured, and refuses with settings that would do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from lorikeet.cli import run as run_cli
from lorikeet.config import TuneConfig
from lorikeet.data.encode import encode_all
from lorikeet.errors import MachineError
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import PromptFormat
from lorikeet.tune import forecast
from lorikeet.tune.adapter import apply_lora, load_base
from lorikeet.tune.batches import Batch
from lorikeet.tune.fast import Scorer
from lorikeet.tune.forecast import Forecast, measure

from ..conftest import make_conversations, make_tokenizer

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


def test_with_checkpointing_a_token_takes_a_layers_input_each_and_a_whole_block(tiny_model: Path) -> None:
    _, kept = measured(tiny_model, TuneConfig(lora_dropout=0.0))
    _, found = measured(tiny_model, TuneConfig(lora_dropout=0.0, gradient_checkpointing=True))
    assert found.bytes_per_token == found.checkpointed_bytes_per_token
    assert found.checkpointed_bytes_per_token == pytest.approx(kept.checkpointed_bytes_per_token, rel=0.05)
    assert found.bytes_per_token > 2 * 64 * 4 + kept.bytes_per_token / 4


def test_nothing_is_tried_that_would_not_fit(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    time_step = forecast._time_step

    def noted(scorer: Scorer, batch: Batch) -> float:
        tried.append(batch.row_tokens)
        return time_step(scorer, batch)

    monkeypatch.setattr(forecast, "_time_step", noted)
    monkeypatch.setattr(forecast, "FEW", 16)
    monkeypatch.setattr(forecast, "resident_bytes", lambda: 0)
    _, plenty = measured(tiny_model, TuneConfig(lora_dropout=0.0))
    largest = max(tried)
    assert largest > 15
    for spare, expected in ((1.5, largest), (0.5, 15)):  # the sixteenth token is only predicted
        tried.clear()
        room = plenty.at(largest, plenty.bytes_per_token) - plenty.fixed_bytes
        monkeypatch.setattr(forecast, "available_bytes", lambda _, r=room * spare: plenty.fixed_bytes + int(r))
        _, found = measured(tiny_model, TuneConfig(lora_dropout=0.0))
        assert max(tried) == expected and found.tokens_per_s > 0


def test_what_is_kept_once_is_no_tokens(tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy of the adapter in another type is kept whatever the length, and a short conversation is no measure."""
    long = make_conversations(30)
    short = Conversation((Message("user", "a"), Message("assistant", "b")))
    prompt, config, found = PromptFormat.load(tiny_model), TuneConfig(lora_dropout=0.0, lora_r=64), []
    for few, conversations in ((32, long), (8, long), (32, [*long, short])):
        monkeypatch.setattr(forecast, "FEW", few)
        rows = encode_all(prompt, conversations, max_length=200, on_long="error").rows
        model = apply_lora(load_base(tiny_model, torch.bfloat16, CPU), config)
        scorer = Scorer.build(model, config, dtype=torch.bfloat16)
        found.append(measure(scorer, rows, config, steps=10, validation_tokens=100).checkpointed_bytes_per_token)
    assert found[1:] == [pytest.approx(found[0], rel=0.5)] * 2


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


def test_a_disk_without_room_is_refused_with_the_setting_that_takes_less(tiny_model: Path, tmp_path: Path) -> None:
    _, found = measured(tiny_model, TuneConfig())
    full = replace(found, disk_bytes=5 * 10**17, checkpoint_bytes=10**17)
    with pytest.raises(MachineError, match=r"free some or choose another disk; --save-total-limit 1 needs 3\d+\.0 GB$"):
        full.require(TuneConfig(save_total_limit=3), tmp_path)
    with pytest.raises(MachineError, match=r"free some or choose another disk$"):
        full.require(TuneConfig(save_total_limit=1), tmp_path)


def test_weights_without_room_are_refused_with_the_setting_that_takes_less(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(forecast, "available_bytes", lambda _: 1000)
    for device, dtype, in_4bit, advice in (
        (CPU, torch.float32, False, "choose --dtype bfloat16 or a smaller model"),
        (CPU, torch.bfloat16, False, "choose a smaller model"),
        (torch.device("cuda"), torch.bfloat16, False, "choose --load-in-4bit or a smaller model"),
        (torch.device("cuda"), torch.bfloat16, True, "choose a smaller model"),
    ):
        with pytest.raises(MachineError, match=f"{advice}$"):
            forecast.require_room_for_weights(tiny_model, dtype, device, in_4bit=in_4bit)


def test_a_model_that_also_sees_is_measured_by_its_language_model(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = {**sizes, "vocab_size": len(tokenizer), "num_key_value_heads": 2, "head_dim": 16}
    sight = {**sizes, "image_size": 28, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    Gemma3ForConditionalGeneration(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    _, found = measured(tmp_path, TuneConfig())
    assert found.checkpointed_bytes_per_token > 2 * 64 * 4


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
