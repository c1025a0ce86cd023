"""Three artefacts of one model: adapter on base, merged weights, and GGUF in llama.cpp, number against number."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import GGUFReader
from peft import PeftModel
from transformers import AutoModelForCausalLM

from lorikeet.config import ExportConfig, TuneConfig
from lorikeet.data.encode import encode_all
from lorikeet.engine import LlamaEngine
from lorikeet.errors import InputError
from lorikeet.export.families import rotary_factors
from lorikeet.export.gguf import permute, write_gguf
from lorikeet.export.stage import export
from lorikeet.gguf_header import read_header
from lorikeet.prompt import PromptFormat
from lorikeet.run import RunFolder
from lorikeet.scoring import Scorer
from lorikeet.tune import loop
from lorikeet.weights import base_gguf_path

from ..conftest import CHATML, make_conversations, make_model, make_tokenizer, write_jsonl


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))


def tuned_run(tmp_path: Path, model: Path) -> RunFolder:
    data = write_jsonl(tmp_path / "chats.jsonl", make_conversations())
    config = TuneConfig(
        model=str(model), data=str(data), max_steps=6, learning_rate=1e-2, lora_alpha=32, dtype="float32"
    )
    return loop.tune(config, out=tmp_path / "run")


@pytest.mark.parametrize(("family", "tied"), [("llama", True), ("llama", False), ("qwen2", True), ("qwen3", False)])
def test_adapter_merged_and_gguf_are_one_model(tmp_path: Path, family: str, tied: bool) -> None:
    base_folder = make_model(tmp_path / "base", family=family, tied=tied)
    run = export(tuned_run(tmp_path, base_folder).root, ExportConfig())
    base = AutoModelForCausalLM.from_pretrained(base_folder)
    adapted = PeftModel.from_pretrained(base, str(run.root / "adapter")).eval()
    merged = AutoModelForCausalLM.from_pretrained(run.root / "merged", dtype=torch.float32).eval()
    rows = encode_all(
        PromptFormat.load(run.root / "adapter"), make_conversations(6), max_length=200, on_long="error"
    ).rows
    ids = torch.tensor([rows[0].ids])
    with torch.no_grad():
        with_adapter, with_merged = adapted(input_ids=ids).logits, merged(input_ids=ids).logits
        plain = AutoModelForCausalLM.from_pretrained(base_folder)(input_ids=ids).logits
    rounding = (with_adapter - with_merged).abs().mean() / (with_adapter - plain).abs().mean()
    assert rounding < 0.1  # bfloat16 keeps 8 bits of each weight
    with torch.no_grad():
        expected = []
        for row in rows:
            logits = merged(input_ids=torch.tensor([row.ids])).logits[0, :-1]
            labels = torch.tensor([i if kept else -100 for i, kept in zip(row.ids, row.supervised, strict=True)])[1:]
            expected.append(torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item())
    for quant, tolerance in (("f16", 2e-3), ("q8_0", 2e-2)):
        with LlamaEngine(run.root / "gguf" / f"model-{quant}.gguf", scoring=True, context_tokens=256) as engine:
            assert Scorer(engine).score(rows).loss == pytest.approx(expected, rel=tolerance)


def test_the_served_template_gives_the_tuned_tokens(tmp_path: Path) -> None:
    run = export(tuned_run(tmp_path, make_model(tmp_path / "base")).root, ExportConfig(quant=("q8_0",)))
    prompt = PromptFormat.load(run.root / "adapter")
    with LlamaEngine(run.root / "gguf" / "model-q8_0.gguf") as engine:
        for conversation in make_conversations(20):
            messages = conversation.with_system("be brief: 1. 22 <|im_end|> \U0001f99c\n\n3").messages[:-1]
            assert engine.tokenize(engine.render(messages)) == prompt.prompt_ids(messages)


def test_of_several_templates_the_default_is_written(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": "{{ 'never' }}"}
    folder = make_model(tmp_path / "base", tokenizer=tokenizer)
    write_gguf(folder, tmp_path / "model.gguf", quant="q8_0", name="several")
    assert read_header(tmp_path / "model.gguf").metadata["tokenizer.chat_template"] == CHATML


def test_a_bos_is_written_once(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(bos="<|begin|>")
    run = export(
        tuned_run(tmp_path, make_model(tmp_path / "base", tokenizer=tokenizer)).root, ExportConfig(quant=("q8_0",))
    )
    prompt = PromptFormat.load(run.root / "adapter")
    messages = make_conversations(1)[0].messages[:1]
    with LlamaEngine(run.root / "gguf" / "model-q8_0.gguf") as engine:
        served = engine.tokenize(engine.render(messages))
    assert served == prompt.prompt_ids(messages)
    assert served.count(tokenizer.bos_token_id) == 1


def test_the_header_says_what_it_must(tmp_path: Path) -> None:
    run = export(tuned_run(tmp_path, make_model(tmp_path / "base")).root, ExportConfig(quant=("q8_0",)))
    path = run.root / "gguf" / "model-q8_0.gguf"
    header = read_header(path)
    tokenizer = PromptFormat.load(run.root / "adapter").tokenizer
    assert header.metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert header.metadata["tokenizer.chat_template"] == tokenizer.chat_template
    assert header.metadata["tokenizer.ggml.pre"] == "smollm"
    assert set(header.special_tokens()) == {"<|endoftext|>", "<|im_start|>", "<|im_end|>"}
    assert "output.weight" not in header.tensors
    assert header.tensors == {t.name: tuple(int(n) for n in t.shape) for t in GGUFReader(path).tensors}


def test_a_second_export_keeps_what_is_there(tmp_path: Path) -> None:
    run = tuned_run(tmp_path, make_model(tmp_path / "base"))
    export(run.root, ExportConfig())
    times = {
        path: path.stat().st_mtime_ns for path in run.root.rglob("*") if path.is_file() and path.name != "run.json"
    }
    export(run.root, ExportConfig())
    assert {path: path.stat().st_mtime_ns for path in times} == times


def test_the_base_is_written_the_same_way(tmp_path: Path) -> None:
    run = export(tuned_run(tmp_path, make_model(tmp_path / "base")).root, ExportConfig(quant=("q8_0",)))
    base, tuned = (
        read_header(base_gguf_path(run.manifest(), "q8_0")),
        read_header(run.root / "gguf" / "model-q8_0.gguf"),
    )
    assert base.tensors == tuned.tensors
    assert {k: v for k, v in base.metadata.items() if k != "general.name"} == {
        k: v for k, v in tuned.metadata.items() if k != "general.name"
    }


def test_an_adapter_of_another_base_is_refused(tmp_path: Path) -> None:
    run = tuned_run(tmp_path, make_model(tmp_path / "base"))
    shutil.rmtree(tmp_path / "base")
    make_model(tmp_path / "base", seed=5)
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    assert config["hidden_size"] == 64
    with pytest.raises(InputError, match="not the model"):
        export(run.root, ExportConfig())
    assert not (run.root / "merged").exists()


def test_a_changed_adapter_is_refused(tmp_path: Path) -> None:
    run = tuned_run(tmp_path, make_model(tmp_path / "base"))
    path = run.root / "adapter" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(InputError, match="not the file that was recorded"):
        export(run.root, ExportConfig())


def test_an_unknown_architecture_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "base")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "architectures": ["MambaForCausalLM"]}))
    with pytest.raises(InputError, match="MambaForCausalLM cannot be written"):
        write_gguf(folder, tmp_path / "x.gguf", quant="f16", name="x")
    assert not (tmp_path / "x.gguf").exists()


def test_permute_pairs_the_halves() -> None:
    rows = torch.arange(8.0).reshape(8, 1)
    assert permute(rows, 2).flatten().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_llama3_rotary_factors() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0}
    rope |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
    config = {"rope_parameters": rope, "hidden_size": 2048, "num_attention_heads": 32, "head_dim": 64}
    factors = rotary_factors(config)
    assert factors is not None and factors.shape == (32,)
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](LlamaConfig(**config), "cpu")
    plain = 1.0 / (500000.0 ** (torch.arange(0, 64, 2) / 64))
    assert np.allclose(plain.numpy() / factors, scaled.numpy(), rtol=1e-5)
