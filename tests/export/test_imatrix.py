"""The importance matrix against sums made by hand, its file, and how export uses it for tuned and base model."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gguf import GGUFReader, quants
from transformers import AutoModelForCausalLM, LlamaModel

from lorikeet.config import ExportConfig, TuneConfig
from lorikeet.errors import InputError
from lorikeet.export import budget, imatrix, stage
from lorikeet.export.gguf import namer, write_gguf
from lorikeet.export.imatrix import Importance, collect
from lorikeet.gguf_header import read_header
from lorikeet.run import RunFolder
from lorikeet.tune import loop
from lorikeet.weights import base_gguf_path

from ..conftest import make_conversations, make_model, write_jsonl

ROWS = [[5, 9, 30, 7, 12], [40, 41, 5]]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))


def tuned_run(tmp_path: Path, name: str = "run", count: int = 60) -> RunFolder:
    base = tmp_path / "base"
    if not base.is_dir():
        make_model(base)
    data = write_jsonl(tmp_path / f"{name}.jsonl", make_conversations(count))
    config = TuneConfig(model=str(base), data=str(data), max_steps=3, learning_rate=1e-2, dtype="float32")
    return loop.tune(config, out=tmp_path / name)


def collected(folder: Path) -> Importance:
    return collect(folder, ROWS, name_of=namer(folder), dtype="float32")


@pytest.mark.parametrize("tied", [True, False])
def test_sums_are_those_made_by_hand(tmp_path: Path, tied: bool) -> None:
    """What goes into the first layer's projections and into its MLP's last matrix, from the model's own parts."""
    folder = make_model(tmp_path / "model", tied=tied)
    found = collected(folder)
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    layer = model.model.layers[0]
    expected, inside = torch.zeros(64), torch.zeros(128)
    with torch.no_grad():
        for ids in ROWS:
            embedded = model.model.embed_tokens(torch.tensor([ids]))
            expected += layer.input_layernorm(embedded).square().sum(dim=(0, 1))
            states = model(torch.tensor([ids]), output_hidden_states=True).hidden_states
            rotary = model.model.rotary_emb(embedded, torch.arange(len(ids))[None])
            mask = torch.full((len(ids), len(ids)), float("-inf")).triu(1)[None, None]
            attended = embedded + layer.self_attn(layer.input_layernorm(embedded), rotary, mask)[0]
            normed = layer.post_attention_layernorm(attended)
            gated = layer.mlp.act_fn(layer.mlp.gate_proj(normed)) * layer.mlp.up_proj(normed)
            assert torch.allclose(attended + layer.mlp.down_proj(gated), states[1], atol=1e-4)
            inside += gated.square().sum(dim=(0, 1))
    for name in ("attn_q", "attn_k", "attn_v"):
        assert found.sums[f"blk.0.{name}.weight"] == pytest.approx(expected.numpy(), rel=1e-4)
    assert found.sums["blk.0.ffn_down.weight"] == pytest.approx(inside.numpy(), rel=1e-3)
    assert found.of("blk.0.attn_q.weight") == pytest.approx(expected.numpy() / 8, rel=1e-4)
    assert set(found.counts.values()) == {8}
    assert len(found.sums) == 14  # seven a layer: neither the head nor the embedding
    assert found.of("output.weight") is None
    assert (found.tokens, found.conversations) == (8, 2)


def test_the_file_is_what_llama_imatrix_writes(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    found, path = collected(folder), tmp_path / "imatrix.gguf"
    found.save(path, dataset="calibration.jsonl")
    reader = GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.type"] == "imatrix"
    assert fields["imatrix.datasets"] == ["calibration.jsonl"]
    assert (fields["imatrix.chunk_count"], fields["imatrix.chunk_size"]) == (2, 4)
    assert "general.architecture" not in fields
    shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in reader.tensors}
    assert shapes["blk.1.ffn_down.weight.in_sum2"] == (128,)
    assert shapes["blk.1.ffn_down.weight.counts"] == (1,)
    again = Importance.load(path)
    assert again.counts == found.counts
    assert all((again.sums[name] == found.sums[name]).all() for name in found.sums)


def test_another_file_is_no_matrix(tmp_path: Path, tiny_model: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(tiny_model, path, quant="q8_0", name="m")
    with pytest.raises(InputError, match="not an importance matrix"):
        Importance.load(path)


def test_a_weight_that_nothing_went_through_counts_evenly(tmp_path: Path) -> None:
    """Its bytes are those without a matrix, and the others' are not."""
    folder = make_model(tmp_path / "model")
    found = collected(folder)
    found.counts["blk.1.attn_q.weight"] = 0
    assert found.of("blk.1.attn_q.weight") is None
    files = {}
    for name, matrix in (("with", found), ("without", None)):
        write_gguf(folder, tmp_path / f"{name}.gguf", quant="q4_0", name="m", importance=matrix)
        files[name] = {t.name: bytes(t.data) for t in GGUFReader(tmp_path / f"{name}.gguf").tensors}
    same = {name for name, data in files["with"].items() if data == files["without"][name]}
    assert "blk.1.attn_q.weight" in same
    assert not same & {"blk.0.attn_q.weight", "blk.0.ffn_up.weight", "blk.1.attn_k.weight"}


def test_a_file_with_the_matrix_errs_less_where_it_counts(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    found = collected(folder)
    write_gguf(folder, tmp_path / "f16.gguf", quant="f16", name="m")
    exact = {t.name: t.data.astype(np.float32) for t in GGUFReader(tmp_path / "f16.gguf").tensors}
    errors = []
    for matrix in (found, None):
        write_gguf(folder, tmp_path / "m.gguf", quant="q4_0", name="m", importance=matrix)
        back = {t.name: quants.dequantize(t.data, t.tensor_type) for t in GGUFReader(tmp_path / "m.gguf").tensors}
        errors.append(sum((np.square(back[n] - exact[n]) * (found.of(n))).sum() for n in found.sums))
    assert errors[0] < 0.9 * errors[1]


def test_the_model_is_run_on_so_many_tokens_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_model(tmp_path / "model")
    monkeypatch.setattr(imatrix, "MAX_TOKENS", 6)
    monkeypatch.setattr(imatrix, "MAX_LENGTH", 4)
    found = collected(folder)
    assert (found.tokens, found.conversations) == (4, 1)


class Machine:
    """A clock that moves on when the model is run: a second a conversation."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        forward = LlamaModel.forward
        monkeypatch.setattr(budget, "time", SimpleNamespace(monotonic=lambda: self.now_s))
        monkeypatch.setattr(LlamaModel, "forward", lambda *a, **k: (self.run(), forward(*a, **k))[1])

    def run(self) -> None:
        self.now_s += 1.0


@pytest.mark.parametrize(("budget_s", "count"), [(60, 40), (30, 30), (1, imatrix.LEAST_CONVERSATIONS)])
def test_as_many_conversations_as_fit_the_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budget_s: float, count: int
) -> None:
    folder = make_model(tmp_path / "model")
    said: list[str] = []
    told: list[tuple[int, int]] = []
    machine = Machine(monkeypatch)
    rows = [[5, 9, 30 + n] for n in range(40)]
    found = collect(
        folder,
        rows,
        name_of=namer(folder),
        dtype="float32",
        budget_s=budget_s,
        progress=lambda *now: told.append(now),
        say=said.append,
    )
    assert (found.conversations, found.tokens, machine.now_s) == (count, 3 * count, count)
    assert said[0].startswith(f"importance matrix: {count} of 40 conversations, 3 tokens/s, {count - 16} s left")
    assert ("all of them would take 40 s" in said[0]) is (count < 40)
    assert told[-1] == (count, count)


def test_base_and_tuned_are_asked_as_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second of the two, whichever it is and however much time it has, gets what the first got."""
    run = tuned_run(tmp_path)
    Machine(monkeypatch)
    stage.export(run.root, ExportConfig(quant=("q4_0",), strength="1", budget_s=20))
    matrix = base_gguf_path(run.manifest(), "q4_0").with_name("imatrix.gguf")
    assert (
        Importance.load(matrix).conversations == Importance.load(run.root / "data" / "imatrix.gguf").conversations == 20
    )
    (run.root / "data" / "imatrix.gguf").unlink()
    (run.root / "gguf" / "model-q4_0.gguf").unlink()
    stage.export(run.root, ExportConfig(quant=("q4_0",), strength="1", budget_s=40))
    assert Importance.load(run.root / "data" / "imatrix.gguf").conversations == 20


def test_a_second_run_on_the_same_conversations_takes_as_many_as_the_base_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch)
    first = tuned_run(tmp_path, "first")
    second = RunFolder.open(Path(shutil.copytree(first.root, tmp_path / "again" / "second")))
    for run, budget_s in ((first, 20), (second, 40)):
        stage.export(run.root, ExportConfig(quant=("q4_0",), strength="1", budget_s=budget_s))
        assert Importance.load(run.root / "data" / "imatrix.gguf").conversations == 20
    assert base_gguf_path(first.manifest(), "q4_0") == base_gguf_path(second.manifest(), "q4_0")


def test_inputs_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[0].input_layernorm.weight.data[3] = torch.inf
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"the inputs of blk\.0\.attn_q\.weight are not finite"):
        collected(folder)


def test_tuned_and_base_have_matrices_of_the_runs_conversations(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tuned_run(tmp_path)
    stage.export(run.root, ExportConfig(quant=("q4_0", "q8_0")))
    manifest = run.manifest()
    sha = manifest["artefacts"]["data/calibration.jsonl"]["sha256"]["calibration.jsonl"]
    assert manifest["artefacts"]["gguf/model-q4_0.gguf"]["calibration_sha256"] == sha
    assert "calibration_sha256" not in manifest["artefacts"]["gguf/model-q8_0.gguf"]
    base = base_gguf_path(manifest, "q4_0")
    assert sha[:16] in base.parent.name
    assert sha[:16] not in base_gguf_path(manifest, "q8_0").parent.name
    for path in (run.root / "gguf" / "model-q4_0.gguf", base):
        assert read_header(path).metadata["quantize.imatrix.entries_count"] == 14
    matrices = [Importance.load(path) for path in (run.root / "data" / "imatrix.gguf", base.with_name("imatrix.gguf"))]
    assert matrices[0].tokens == matrices[1].tokens > 100
    assert (matrices[0].sums["blk.0.ffn_down.weight"] != matrices[1].sums["blk.0.ffn_down.weight"]).any()
    assert "without an importance matrix" not in capsys.readouterr().err


def test_another_runs_conversations_give_another_base(tmp_path: Path) -> None:
    paths = []
    for name, count in (("first", 60), ("second", 59)):
        run = tuned_run(tmp_path, name, count)
        stage.export(run.root, ExportConfig(quant=("q4_0",)))
        paths.append(base_gguf_path(run.manifest(), "q4_0"))
    assert paths[0] != paths[1]
    assert paths[0].read_bytes() != paths[1].read_bytes()


def test_without_conversations_one_line_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tuned_run(tmp_path)
    run.forget("data/calibration.jsonl")
    stage.export(run.root, ExportConfig(quant=("q4_0",)))
    assert "keeps no data/calibration.jsonl: q4_0 is made without an importance matrix" in capsys.readouterr().err
    assert "quantize.imatrix.entries_count" not in read_header(run.root / "gguf" / "model-q4_0.gguf").metadata
    stage.convert(str(tmp_path / "base"), "q4_0")
    assert "comes without training conversations: q4_0 is made without" in capsys.readouterr().err


def test_turning_the_matrix_off_makes_the_file_again(tmp_path: Path) -> None:
    run = tuned_run(tmp_path)
    stage.export(run.root, ExportConfig(quant=("q4_0",)))
    with_it = (run.root / "gguf" / "model-q4_0.gguf").read_bytes()
    stage.export(run.root, ExportConfig(quant=("q4_0",), imatrix=False))
    assert (run.root / "gguf" / "model-q4_0.gguf").read_bytes() != with_it
    assert base_gguf_path(run.manifest(), "q4_0").is_file()
    stage.export(run.root, ExportConfig(quant=("q4_0",)))
    assert (run.root / "gguf" / "model-q4_0.gguf").read_bytes() == with_it
