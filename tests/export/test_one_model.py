"""Every way of tuning and every family through the whole chain: adapter = merged = GGUF = what the server answers over HTTP.

In f16, whose limits are the strictest: what eight bits do to random weights is not asked here.
"""

from __future__ import annotations

import json
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from lorikeet import cli
from lorikeet.config import TuneConfig
from lorikeet.tune import loop

from ..conftest import make_conversations, write_jsonl
from .test_families import family_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 10_000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
UNTIED = {"tie_word_embeddings": False}
DORA: dict[str, Any] = {"use_dora": True}
PISSA: dict[str, Any] = {"init_lora_weights": "pissa"}
RSLORA: dict[str, Any] = {"use_rslora": True}
LORA_PLUS: dict[str, Any] = {"loraplus_lr_ratio": 4.0}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "llama, tied, DoRA": ("llama", {}, DORA),
    "llama, untied, PiSSA": ("llama", UNTIED, PISSA),
    "llama, Llama 3's rope, rsLoRA": ("llama", {"rope_parameters": LLAMA3}, RSLORA),
    "mistral with a window, LoRA+": ("mistral", {"sliding_window": 256}, LORA_PLUS),
    "qwen2, tied, rsLoRA": ("qwen2", {}, RSLORA),
    "qwen2, untied, DoRA": ("qwen2", UNTIED, DORA),
    "qwen3, tied, PiSSA": ("qwen3", {}, PISSA),
    "qwen3, untied, LoRA+": ("qwen3", UNTIED, LORA_PLUS),
    "gemma, plain": ("gemma", {}, {}),
    "gemma2, DoRA": ("gemma2", {"sliding_window": 24}, DORA),
    "gemma3, PiSSA with rsLoRA": ("gemma3_text", {}, {**PISSA, **RSLORA}),
}
QUICK = {"gemma3, PiSSA with rsLoRA", "llama, Llama 3's rope, rsLoRA"}
"""Those that are always run."""


def verified(root: Path) -> dict[str, Any]:
    """Return what `lorikeet verify` writes on a run, the real server asked."""
    with redirect_stdout(StringIO()) as out:
        cli.run(["verify", str(root), "--json", "--conversations=6", "--answers=2", "--answer-tokens=8"])
    certificate: dict[str, Any] = json.loads(out.getvalue())
    return certificate


@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow, id=name) for name in CASES]
)
def test_adapter_merged_gguf_and_server_are_one_model(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    family, config, method = CASES[case]
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    tied = config.get("tie_word_embeddings", family != "mistral")
    base = family_model(tmp_path / "base", family, tied=tied, **config)
    data = write_jsonl(tmp_path / "chats.jsonl", make_conversations())
    learned: dict[str, Any] = {"max_steps": 12, "learning_rate": 1e-2, "lora_alpha": 32, "dtype": "float32"}
    run = loop.tune(TuneConfig(model=str(base), data=str(data), **learned, **method), out=tmp_path / "run")
    assert cli.run(["export", str(run.root), "--quant", "f16", "--no-verify", "--strength", "1"]) == 0
    certificate = verified(run.root)
    found = {(check["name"], check["artefact"]): check for check in certificate["checks"]}
    assert certificate["pass"], [check for check in found.values() if not check["pass"]]
    f16 = "gguf/model-f16.gguf"
    scale = found["adapter_scale", "merged"]["notes"][0]
    assert 0.98 < float(scale.split()[-2]) < 1.02
    for check in ("kl_mean_merged", "adapter_scale"):
        assert found[check, "merged"]["pass"]
    for check in ("kl_mean", "tuning_lost", "served_prompt", "served_answers", "greedy", "weights", "header"):
        assert found[f"{check}_f16", f16]["pass"]
    assert len(certificate["answers"]["f16"]) == 2
    assert ("output.weight" in {tensor.name for tensor in GGUFReader(run.root / f16).tensors}) is not tied
