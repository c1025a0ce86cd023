"""The certificate: an honest run passes, and each planted fault is caught by the check of its name.

Every fault is planted with all hashes in run.json made consistent, so that only the contents can tell.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from gguf import GGUFReader, GGUFValueType, GGUFWriter
from gguf.scripts.gguf_new_metadata import MetadataDetails, copy_with_new_metadata
from safetensors.torch import load_file, save_file

from lorikeet import cli
from lorikeet.config import ExportConfig, TuneConfig, VerifyConfig
from lorikeet.data.load import load_conversations
from lorikeet.errors import InputError
from lorikeet.export import gguf, merge, parity, served
from lorikeet.export.checks import Checks
from lorikeet.export.parity import describe, divergence, gap_at_difference, verify
from lorikeet.export.stage import export
from lorikeet.export.trained import Greedy
from lorikeet.files import sha256_file, sha256_text
from lorikeet.run import RunFolder
from lorikeet.tune import loop
from lorikeet.weights import base_gguf_path

from ..conftest import CHATML, make_conversations, make_model, make_tokenizer, write_jsonl

QUICK = VerifyConfig(conversations=6, answers=3, answer_tokens=8)
BOS = "<|begin|>"
Q8 = "gguf/model-q8_0.gguf"
MERGED = ExportConfig(formats=("merged",), strength="1")


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with two runs on one base, tuned and not exported, and a cache of its own."""
    home = tmp_path_factory.mktemp("parity")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORIKEET_CACHE", str(home / "cache"))
        base = make_model(home / "base", tokenizer=make_tokenizer(BOS_TEMPLATE, bos=BOS))
        for name, seed in (("mine", 1), ("other", 2)):
            tune(home / name, base, seed=seed)
        yield home


BOS_TEMPLATE = "{{ bos_token }}" + CHATML


def tune(out: Path, base: Path, *, seed: int, **more: Any) -> RunFolder:
    data = write_jsonl(out.with_suffix(".jsonl"), make_conversations())
    return loop.tune(
        TuneConfig(
            model=str(base),
            data=str(data),
            max_steps=12,
            learning_rate=1e-2,
            lora_alpha=32,
            dtype="float32",
            seed=seed,
            **more,
        ),
        out=out,
    )


@pytest.fixture
def run(home: Path, tmp_path: Path) -> RunFolder:
    """A copy of the tuned run, free to be spoilt."""
    shutil.copytree(home / "mine", tmp_path / "run")
    return RunFolder.open(tmp_path / "run")


@pytest.fixture
def no_route(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave the served route out: starting it takes longer than everything else, and it has tests of its own."""
    monkeypatch.setattr(parity, "_check_route", lambda *_: None)


def exported(run: RunFolder, *quants: Any) -> RunFolder:
    quant = ",".join(quants or ("q8_0",))
    assert cli.run(["export", str(run.root), "--quant", quant, "--strength", "1", "--no-verify"]) == 0
    return run


def record(run: RunFolder, *names: str) -> None:
    """Make run.json say that the artefacts are what they are now, made from the adapter that is there now."""
    manifest = run.manifest()
    about = {
        "adapter_sha256": manifest["artefacts"]["adapter"]["sha256"]["adapter_model.safetensors"],
        "strength": manifest.get("strength", {}).get("strength"),
    }
    for name in names:
        run.record(name, run.root / name, **({} if name == "adapter" else about))


def failed(run: RunFolder) -> set[str]:
    """Return the names of the checks that `lorikeet verify` says failed; it exits 1 if there are any."""
    options = [f"--{field.name.replace('_', '-')}={getattr(QUICK, field.name)}" for field in fields(QUICK)]
    with redirect_stdout(StringIO()) as out:
        code = cli.run(["verify", str(run.root), "--json", *options])
    certificate = json.loads(out.getvalue())
    names = {check["name"] for check in certificate["checks"] if not check["pass"]}
    assert certificate["pass"] == (not names) == (code == 0) and code in {0, 1}
    return names


def edit_gguf(path: Path, key: str, value: Any) -> None:
    """Set a number or a text of the same length in a file's header."""
    field = GGUFReader(path, "r+").fields[key]
    part = field.parts[field.data[0]]
    part[:] = np.frombuffer(value.encode(), np.uint8) if isinstance(value, str) else value


def set_gguf(key: str, value: Any, kind: GGUFValueType) -> Callable[[RunFolder], None]:
    """Give the file a key of any length, one that it had or a new one, with the `gguf` package's own tool."""

    def plant(run: RunFolder) -> None:
        path = run.root / Q8
        beside, reader = path.with_suffix(".new"), GGUFReader(path)
        writer = GGUFWriter(beside, arch=str(reader.fields["general.architecture"].contents()))
        removed = [key] if kind == GGUFValueType.ARRAY and key in reader.fields else []
        copy_with_new_metadata(reader, writer, {key: MetadataDetails(kind, value)}, removed)
        beside.replace(path)

    return plant


def edit_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# ------------------------------------------------------------------------------------------------------ an honest run


@pytest.mark.usefixtures("home")
def test_an_honest_run_passes_through_the_real_server(run: RunFolder) -> None:
    exported(run, "f16", "q8_0")
    certificate = verify(run.root, QUICK)
    assert certificate["pass"], describe(certificate)
    names = {check["name"] for check in certificate["checks"]}
    for quant in ("f16", "q8_0"):
        stems = ("kl_mean", "kl_worst", "top1_changed", "weights", "tuning_lost", "served_answers", "served_prompt")
        assert {f"{stem}_{quant}" for stem in (*stems, "greedy", "header")} <= names
        assert len(certificate["answers"][quant]) == 3
    assert certificate == json.loads((run.reports / "parity.json").read_text())
    assert run.certificate() == certificate
    page = (run.reports / "parity.html").read_text()
    assert "One model." in page and "http://" not in page and "<script" not in page


@pytest.mark.usefixtures("home", "no_route")
@pytest.mark.parametrize(("family", "tied"), [("llama", False), ("qwen2", True), ("qwen3", False)])
def test_other_families_pass(tmp_path: Path, family: str, tied: bool) -> None:
    run = tune(tmp_path / "run", make_model(tmp_path / "base", family=family, tied=tied), seed=3)
    exported(run)
    assert failed(run) == set()


@pytest.mark.usefixtures("home", "no_route")
def test_what_is_not_there_is_said(run: RunFolder) -> None:
    export(run.root, ExportConfig(formats=("adapter",), strength="1"))
    certificate = verify(run.root, QUICK)
    assert certificate["pass"]
    assert len(certificate["not_checked"]) == 2
    assert any("not checked: merged" in line for line in describe(certificate))


# ------------------------------------------------------------------------------------------- faults before the export


def changed_template(run: RunFolder) -> None:
    file = run.root / "adapter" / "chat_template.jinja"
    file.write_text(file.read_text().replace("'\n' + message['content']", "': ' + message['content']"))
    record(run, "adapter")
    run.update(template={**run.manifest()["template"], "sha256": sha256_text(file.read_text())})


def doubled_bos(run: RunFolder) -> None:
    file = run.root / "adapter" / "chat_template.jinja"
    file.write_text("{{ bos_token }}" + file.read_text())
    record(run, "adapter")
    run.update(template={**run.manifest()["template"], "sha256": sha256_text(file.read_text())})


def missing_stop(run: RunFolder) -> None:
    edit_json(run.root / "adapter" / "tokenizer_config.json", eos_token="<|endoftext|>")
    record(run, "adapter")


def swapped_adapter(run: RunFolder) -> None:
    other = run.root.parent / "other"
    shutil.copyfile(other / "adapter" / "adapter_model.safetensors", run.root / "adapter" / "adapter_model.safetensors")
    record(run, "adapter")


def swapped_adapter_without_checkpoints(run: RunFolder) -> None:
    shutil.rmtree(run.root / "checkpoints")
    path = run.root / "adapter" / "adapter_model.safetensors"
    save_file(
        {name: -value for name, value in load_file(path).items() if "A" in name}
        | {name: value for name, value in load_file(path).items() if "A" not in name},
        path,
    )
    record(run, "adapter")


def swapped_adapter_without_checkpoints_or_a_change_of_loss(run: RunFolder) -> None:
    """What tuning left is known by its hash alone: a step of rounding moves no loss."""
    shutil.rmtree(run.root / "checkpoints")
    path = run.root / "adapter" / "adapter_model.safetensors"
    save_file({name: value * (1 + 1e-6) for name, value in load_file(path).items()}, path)
    record(run, "adapter")


def stronger_adapter(run: RunFolder) -> None:
    edit_json(run.root / "adapter" / "adapter_config.json", lora_alpha=64)
    record(run, "adapter")


def other_base(run: RunFolder) -> None:
    base = make_model(run.root.parent / "base2", tokenizer=make_tokenizer(BOS_TEMPLATE, bos=BOS), seed=9)
    from lorikeet.weights import model_identity

    run.update(base=model_identity(str(base), base))


def file_of_another_run_before(run: RunFolder) -> None:
    """Merged weights are there, and beside them another run's file, which run.json says was made from them."""
    other = RunFolder.open(run.root.parent / "other")
    exported(other)
    export(run.root, MERGED)
    (run.root / "gguf").mkdir()
    shutil.copyfile(other.root / Q8, run.root / Q8)
    record(run, Q8)


def template_with_a_space_at_its_end(run: RunFolder) -> None:
    file = run.root / "adapter" / "chat_template.jinja"
    file.write_text(file.read_text() + " ")
    record(run, "adapter")
    run.update(template={**run.manifest()["template"], "sha256": sha256_text(file.read_text())})


def norm_of_zeros(run: RunFolder) -> None:
    export(run.root, MERGED)
    edit_tensor(run, "model.layers.1.input_layernorm.weight", lambda value: value * 0)


def layers_exchanged(run: RunFolder) -> None:
    export(run.root, MERGED)
    other = load_file(run.root / "merged" / "model.safetensors")["model.layers.0.mlp.up_proj.weight"]
    edit_tensor(run, "model.layers.1.mlp.up_proj.weight", lambda _: other.clone())


def edit_tensor(run: RunFolder, name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
    path = run.root / "merged" / "model.safetensors"
    weights = load_file(path)
    save_file({**weights, name: change(weights[name])}, path, metadata={"format": "pt"})
    record(run, "merged")


def roles_exchanged(run: RunFolder) -> None:
    edit_json(run.root / "adapter" / "tokenizer_config.json", pad_token="<|im_start|>")
    record(run, "adapter")


def rank_stabilised_by_name(run: RunFolder) -> None:
    edit_json(run.root / "adapter" / "adapter_config.json", use_rslora=True)
    record(run, "adapter")


def another_system_prompt(run: RunFolder) -> None:
    run.update(system_prompt="Answer in French.")


def system_prompt_forgotten(run: RunFolder) -> None:
    for name in ("calibration", "validation", "heldout"):
        path = run.root / "data" / f"{name}.jsonl"
        led = [c.with_system("Answer in French.") for c in load_conversations(str(path)).conversations]
        record(run, f"data/{write_jsonl(path, led).name}")


@pytest.mark.usefixtures("no_route")
@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (file_of_another_run_before, "tuning_lost_q8_0"),
        (template_with_a_space_at_its_end, "template"),
        (norm_of_zeros, "unadapted_weights"),
        (layers_exchanged, "merged_weights"),
        (roles_exchanged, "tokenizer"),
        (rank_stabilised_by_name, "adapter_scale"),
        (another_system_prompt, "system_prompt"),
        (system_prompt_forgotten, "system_prompt"),
        (changed_template, "template"),
        (doubled_bos, "one_bos"),
        (missing_stop, "stop_token"),
        (swapped_adapter, "adapter_is_tuned"),
        (swapped_adapter_without_checkpoints, "validation_loss"),
        (swapped_adapter_without_checkpoints_or_a_change_of_loss, "adapter_is_tuned"),
        (stronger_adapter, "adapter_scale"),
        (other_base, "validation_loss"),
    ],
)
def test_a_fault_before_export_is_caught_by_its_name(
    home: Path, run: RunFolder, plant: Callable[[RunFolder], None], name: str
) -> None:
    shutil.copytree(home / "other", run.root.parent / "other")
    plant(run)
    exported(run)
    found = failed(run)
    assert name in found
    assert "recorded_files" not in found
    with pytest.raises(InputError, match=name):
        run.certificate()


@pytest.mark.usefixtures("home", "no_route")
def test_alpha_over_r_applied_twice_is_caught(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    original = merge.load_adapter

    def twice(folder: Path) -> merge.Adapter:
        adapter = original(folder)
        return merge.Adapter(adapter.pairs, adapter.scale**2, adapter.magnitudes)

    monkeypatch.setattr(merge, "load_adapter", twice)
    exported(run)
    assert {"adapter_scale", "merged_weights", "kl_mean_merged"} <= failed(run)


@pytest.mark.usefixtures("home", "no_route")
def test_an_untied_head_is_caught(run: RunFolder) -> None:
    export(run.root, MERGED)
    folder = run.root / "merged"
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    edit_json(folder / "config.json", tie_word_embeddings=False)
    record(run, "merged")
    exported(run)
    assert "output.weight" in {tensor.name for tensor in GGUFReader(run.root / Q8).tensors}
    assert "tied_head" in failed(run)


@pytest.mark.usefixtures("home", "no_route")
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_parameters", {"rope_theta": 500.0, "rope_type": "default"}),
        ("rms_norm_eps", 1e-2),
        ("max_position_embeddings", 256),
    ],
)
def test_changed_settings_are_caught(run: RunFolder, key: str, value: Any) -> None:
    export(run.root, MERGED)
    edit_json(run.root / "merged" / "config.json", **{key: value})
    record(run, "merged")
    exported(run)
    assert {"merged_config", "header_q8_0"} <= failed(run)


@pytest.mark.usefixtures("home", "no_route")
def test_rows_in_the_wrong_order_are_caught(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gguf, "permute", lambda weight, heads: weight)
    exported(run)
    assert {"weights_q8_0", "kl_mean_q8_0"} <= failed(run)


@pytest.mark.usefixtures("no_route")
def test_a_long_validation_part_is_compared_in_part(
    home: Path, run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parity, "VALIDATION_TOKENS", 150)
    monkeypatch.setattr(parity, "FEWEST_ROWS", 4)
    export(run.root, ExportConfig(formats=("adapter",), strength="1"))
    assert failed(run) == set()
    check = next(
        c for c in json.loads((run.reports / "parity.json").read_text())["checks"] if c["name"] == "validation_loss"
    )
    assert (
        "of 8 conversations, so the limit has the noise of the draw" in check["notes"][1]
        and check["limit"] > parity.VALIDATION_LIMIT
    )
    shutil.copytree(home / "other", run.root.parent / "other")
    swapped_adapter_without_checkpoints(run)
    assert "validation_loss" in failed(run)


@pytest.mark.usefixtures("no_route")
def test_another_adapter_in_a_pissa_run_is_caught(home: Path, tmp_path: Path) -> None:
    run, other = (tune(tmp_path / n, home / "base", seed=s, init_lora_weights="pissa") for n, s in (("a", 1), ("b", 2)))
    export(run.root, ExportConfig(formats=("adapter",), strength="1"))
    assert failed(run) == set()
    shutil.copyfile(
        other.root / "adapter" / "adapter_model.safetensors", run.root / "adapter" / "adapter_model.safetensors"
    )
    record(run, "adapter")
    run.update(
        tuned={
            **run.manifest()["tuned"],
            "adapter_sha256": sha256_file(run.root / "adapter" / "adapter_model.safetensors"),
        }
    )
    assert "adapter_is_tuned" in failed(run)


# -------------------------------------------------------------------------------------------- faults after the export


def file_of_another_run(run: RunFolder) -> None:
    other = run.root.parent / "other"
    shutil.copytree(run.root.parent / "home-other", other)
    exported(RunFolder.open(other))
    shutil.copyfile(other / Q8, run.root / Q8)


def edited(key: str, value: Any) -> Callable[[RunFolder], None]:
    return lambda run: edit_gguf(run.root / Q8, key, value)


def swapped_tokens(run: RunFolder) -> None:
    field = GGUFReader(run.root / Q8, "r+").fields["tokenizer.ggml.tokens"]
    first, second = (field.parts[field.data[i]] for i in _two_of_one_length([field.parts[d] for d in field.data]))
    kept = first.copy()
    first[:] = second
    second[:] = kept


def _two_of_one_length(tokens: list[Any]) -> tuple[int, int]:
    long = [i for i, token in enumerate(tokens) if len(token) == 3]
    return long[0], long[1]


def special_tokens_shifted(run: RunFolder) -> None:
    field = GGUFReader(run.root / Q8, "r+").fields["tokenizer.ggml.token_type"]
    kinds = [field.parts[place] for place in field.data]
    for part, kind in zip(kinds, [int(kinds[-1][0]), *(int(kind[0]) for kind in kinds[:-1])], strict=True):
        part[:] = kind


def a_norm_of_zeros(run: RunFolder) -> None:
    tensor = next(t for t in GGUFReader(run.root / Q8, "r+").tensors if t.name == "blk.1.ffn_norm.weight")
    tensor.data[:] = 0


def one_row_shuffled(run: RunFolder) -> None:
    tensor = next(t for t in GGUFReader(run.root / Q8, "r+").tensors if t.name == "blk.1.ffn_up.weight")
    tensor.data[[3, 4]] = tensor.data[[4, 3]]


@pytest.mark.usefixtures("no_route")
@pytest.mark.parametrize(
    ("plant", "name"),
    [
        (file_of_another_run, "tuning_lost_q8_0"),
        (edited("tokenizer.ggml.eos_token_id", 0), "stop_token"),
        (edited("tokenizer.ggml.add_bos_token", 0), "one_bos"),
        (edited("llama.rope.freq_base", 500.0), "header_q8_0"),
        (edited("llama.context_length", 128), "header_q8_0"),
        (edited("llama.attention.layer_norm_rms_epsilon", 1e-2), "header_q8_0"),
        (edited("tokenizer.ggml.pre", "falcon"), "header_q8_0"),
        (swapped_tokens, "header_q8_0"),
        (special_tokens_shifted, "header_q8_0"),
        (set_gguf("tokenizer.chat_template", BOS_TEMPLATE + "\n", GGUFValueType.STRING), "template"),
        (set_gguf("tokenizer.chat_template.rag", CHATML, GGUFValueType.STRING), "header_q8_0"),
        (set_gguf("general.sampling.temp", 1.5, GGUFValueType.FLOAT32), "header_q8_0"),
        (set_gguf("llama.rope.scaling.factor", 4.0, GGUFValueType.FLOAT32), "header_q8_0"),
        (set_gguf("llama.attention.scale", 0.01, GGUFValueType.FLOAT32), "header_q8_0"),
        (set_gguf("tokenizer.ggml.eot_token_id", 300, GGUFValueType.UINT32), "header_q8_0"),
        (a_norm_of_zeros, "weights_q8_0"),
        (one_row_shuffled, "weights_q8_0"),
    ],
)
def test_a_fault_after_export_is_caught_by_its_name(
    home: Path, run: RunFolder, plant: Callable[[RunFolder], None], name: str
) -> None:
    shutil.copytree(home / "other", run.root.parent / "home-other")
    exported(run)
    plant(run)
    record(run, Q8)
    found = failed(run)
    assert name in found
    assert "recorded_files" not in found


@pytest.mark.usefixtures("no_route")
def test_files_of_the_same_data_and_another_seed_are_caught_in_few_bits_too(home: Path, run: RunFolder) -> None:
    quants = ("q5_k_m", "q4_k_m", "q4_0")
    other = RunFolder.open(Path(shutil.copytree(home / "other", run.root.parent / "other")))
    for each in (run, other):
        exported(each, *quants)
    assert failed(run) == set()
    for quant in quants:
        name = f"gguf/model-{quant}.gguf"
        shutil.copyfile(other.root / name, run.root / name)
        run.record(
            name,
            run.root / name,
            **{k: v for k, v in run.manifest()["artefacts"][name].items() if k not in {"complete", "sha256"}},
        )
    assert {f"blocks_{quant}" for quant in quants} <= failed(run)


@pytest.mark.usefixtures("home", "no_route")
def test_a_file_whose_importance_matrix_is_gone_cannot_be_certified(run: RunFolder) -> None:
    exported(run, "q4_0")
    (run.root / "data" / "imatrix.gguf").unlink()
    assert failed(run) == {"readable"}
    assert (
        "imatrix.gguf is not an importance matrix" in describe(json.loads((run.reports / "parity.json").read_text()))[1]
    )
    exported(run, "q4_0")
    assert failed(run) == set()


# ------------------------------------------------------------------------------------- artefacts that libraries cannot read


def of_another_base(home: Path) -> RunFolder:
    """Return an exported run on a base with more tokens and wider rows."""
    tokenizer = make_tokenizer(BOS_TEMPLATE, bos=BOS)
    tokenizer.add_tokens(["lorikeet", "parakeet"])
    run = tune(home / "wide", make_model(home / "wide-base", tokenizer=tokenizer, hidden_size=128), seed=1)
    return exported(run)


@pytest.fixture(scope="module")
def wide(home: Path) -> RunFolder:
    return of_another_base(home)


def gguf_of_another_base(run: RunFolder, wide: RunFolder) -> None:
    shutil.copyfile(wide.root / Q8, run.root / Q8)
    record(run, Q8)


def merged_of_another_base(run: RunFolder, wide: RunFolder) -> None:
    shutil.rmtree(run.root / "merged")
    shutil.copytree(wide.root / "merged", run.root / "merged")
    record(run, "merged")


def adapter_of_another_base(run: RunFolder, wide: RunFolder) -> None:
    shutil.rmtree(run.root / "adapter")
    shutil.copytree(wide.root / "adapter", run.root / "adapter")
    record(run, "adapter", "merged", Q8)


def damaged_weights(run: RunFolder, _: RunFolder) -> None:
    path = run.root / "merged" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-7])
    record(run, "merged")


def width_that_is_no_number(run: RunFolder, _: RunFolder) -> None:
    edit_json(run.root / "merged" / "config.json", hidden_size="abc")
    record(run, "merged")


def damaged_tokenizer(run: RunFolder, _: RunFolder) -> None:
    (run.root / "merged" / "tokenizer.json").write_text('{"model": []}')
    record(run, "merged")


def damaged_generation_config(run: RunFolder, _: RunFolder) -> None:
    (run.root / "merged" / "generation_config.json").write_text("{")
    record(run, "merged")


def unknown_architecture(run: RunFolder, _: RunFolder) -> None:
    edit_gguf(run.root / Q8, "general.architecture", "lluma")
    record(run, Q8)


def no_merged(run: RunFolder, _: RunFolder) -> None:
    shutil.rmtree(run.root / "merged")


def no_merged_and_none_recorded(run: RunFolder, _: RunFolder) -> None:
    shutil.rmtree(run.root / "merged")
    run.forget("merged")


@pytest.mark.usefixtures("no_route")
@pytest.mark.parametrize(
    ("plant", "name", "note"),
    [
        (gguf_of_another_base, "kl_mean_q8_0", "tokens to choose from"),
        (merged_of_another_base, "kl_mean_merged", "tokens to choose from"),
        (adapter_of_another_base, "adapter_is_tuned", "is not what the best checkpoint holds"),
        (adapter_of_another_base, "readable", "size mismatch"),
        (damaged_weights, "readable", "SafetensorError"),
        (width_that_is_no_number, "readable", "hidden_size"),
        (damaged_tokenizer, "tokenizer", "holds no tokenizer that can be read"),
        (damaged_generation_config, "readable", "JSONDecodeError"),
        (unknown_architecture, "header_q8_0", "general.architecture is lluma"),
        (no_merged, "recorded_files", "merged is in run.json and not here; export again"),
        (no_merged_and_none_recorded, "weights_q8_0", "there is no merged"),
    ],
)
def test_what_cannot_be_read_is_a_check_that_fails_in_a_written_report(
    run: RunFolder, wide: RunFolder, plant: Callable[[RunFolder, RunFolder], None], name: str, note: str
) -> None:
    exported(run)
    plant(run, wide)
    assert name in failed(run)
    certificate = json.loads((run.reports / "parity.json").read_text())
    found = [check for check in certificate["checks"] if check["name"] == name and not check["pass"]]
    assert any(note in line for check in found for line in check["notes"]), found
    assert (run.reports / "parity.html").is_file()


@pytest.mark.usefixtures("home")
def test_a_route_that_answers_otherwise_is_caught(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(run)
    asked = served.ask

    def shouting(url: str, messages: Any, *, most_tokens: int) -> served.Answer:
        answer = asked(
            url, (*messages[:-1], type(messages[-1])("user", "Hello, " + messages[-1].content)), most_tokens=5
        )
        return served.Answer(answer.text.upper() + "!", answer.ended, answer.prompt_tokens, [])

    monkeypatch.setattr(served, "ask", shouting)
    assert {"served_prompt_q8_0", "served_answers_q8_0"} <= failed(run)


SERVING = """
import sys, time
from pathlib import Path
from lorikeet.export.served import serving

with serving(Path(sys.argv[1]), "q8_0") as url:
    print(url, flush=True)
    time.sleep(600)
"""


@pytest.mark.usefixtures("home")
@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_the_server_does_not_outlive_who_asks_it(run: RunFolder, end: signal.Signals) -> None:
    exported(run)
    with subprocess.Popen([sys.executable, "-c", SERVING, str(run.root)], stdout=subprocess.PIPE, text=True) as asking:
        assert asking.stdout
        url = asking.stdout.readline().strip()
        children = Path(f"/proc/{asking.pid}/task/{asking.pid}/children")
        (server,) = children.read_text().split() if children.is_file() else [""]
        assert httpx.get(f"{url}/health", trust_env=False).status_code == 200
        asking.send_signal(end)
    deadline = time.monotonic() + 60
    while answers(url) or Path(f"/proc/{server or 'none'}").exists():
        assert time.monotonic() < deadline, "the server goes on"
        time.sleep(0.1)


def answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health", trust_env=False).is_success
    except httpx.HTTPError:
        return False


# ------------------------------------------------------------------------------------------- answers that quantising turns


@pytest.mark.usefixtures("home", "no_route")
def test_a_flip_is_the_bases_own_if_the_base_flips_too_and_counts_if_it_does_not(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Random weights leave their greedy answers in four bits; with no gap allowed every such answer is one."""
    limits = {name: replace(limit, tie=0.0) for name, limit in parity.LIMITS.items()}
    monkeypatch.setattr(parity, "LIMITS", limits)
    exported(run, "f16", "q4_0")
    run.forget("gguf/model-f16.gguf")  # the base's is what is needed
    (run.root / "gguf" / "model-f16.gguf").unlink()
    own = verify(run.root, QUICK)
    assert verdict(own, "greedy_q4_0") == (True, 0)
    rows = [row for row in own["answers"]["q4_0"] if row["kind"] != "same"]
    assert rows and {row["kind"] for row in rows} == {"the base's own"}
    assert all(row["gap"] > 0 and row["base_gap"] > 0 and row["base_served"] != row["base_trained"] for row in rows)
    assert any("the untuned base, written as the same type, leaves its own answer here too" in n for n in notes(own))
    page = (run.reports / "parity.html").read_text()
    assert "base&#x27;s own" in page or "base's own" in page or "base&#39;s own" in page
    steady, flipping = (base_gguf_path(run.manifest(), quant) for quant in ("f16", "q4_0"))
    kept = flipping.read_bytes()
    try:
        flipping.write_bytes(steady.read_bytes())  # a base that keeps its answers
        counted = verify(run.root, QUICK)
    finally:
        flipping.write_bytes(kept)
    assert verdict(counted, "greedy_q4_0") == (False, len(rows))
    assert {row["kind"] for row in counted["answers"]["q4_0"]} <= {"same", "divergence"}
    assert any("more than rounding explains" in note for note in notes(counted))


def verdict(certificate: dict[str, Any], name: str) -> tuple[bool, float]:
    check = next(check for check in certificate["checks"] if check["name"] == name)
    return check["pass"], check["value"]


def notes(certificate: dict[str, Any]) -> list[str]:
    return [note for check in certificate["checks"] if check["name"] == "greedy_q4_0" for note in check["notes"]]


# -------------------------------------------------------------------------------------------------------- the numbers


@pytest.mark.usefixtures("home", "no_route")
def test_a_certificate_counts_for_the_files_it_is_about(run: RunFolder) -> None:
    with pytest.raises(InputError, match="has no parity certificate; check with: lorikeet verify"):
        run.certificate()
    exported(run)
    assert failed(run) == set()
    run.certificate()
    exported(run, "q8_0", "f16")
    with pytest.raises(InputError, match=r"model-f16.gguf is not what its parity certificate is about"):
        run.certificate()
    edit_gguf(run.root / Q8, "llama.context_length", 128)
    (run.root / "gguf" / "model-f16.gguf").unlink()
    with pytest.raises(InputError, match=r"model-q8_0.gguf is not what"):
        run.certificate()


def test_divergence_against_a_sum_done_by_hand() -> None:
    p, q = np.array([[0.5, 0.25, 0.25]]), np.array([[0.25, 0.5, 0.25]])
    wanted = 0.5 * np.log(2) + 0.25 * np.log(0.5)
    assert divergence(np.log(p).astype(np.float32), np.log(q).astype(np.float32)) == pytest.approx([wanted], rel=1e-5)


def greedy(ids: list[int], *, ended: bool) -> Greedy:
    logits = np.zeros((len(ids), 4), dtype=np.float32)
    for place, index in enumerate(ids):
        logits[place, index] = 2.0
    logits[:, 3] -= 1.0
    return Greedy(ids, logits, ended)


@pytest.mark.parametrize(
    ("ids", "ended", "gap"),
    [([1, 2], True, None), ([1, 2, 0], False, 3.0), ([1, 1], True, 2.0), ([1], True, 3.0), ([1, 2], False, None)],
)
def test_the_gap_where_answers_part(ids: list[int], ended: bool, gap: float | None) -> None:
    trained = greedy([1, 2, 3], ended=True)  # 3 ends the turn: its own logit is 1
    trained.logits[2] = [-2.0, -2.0, -2.0, 1.0]
    assert gap_at_difference(trained, served.Answer("", ended, 1, ids)) == gap


def test_a_value_that_is_no_number_does_not_pass() -> None:
    checks = Checks()
    checks.add("kl", float("nan"), 1.0, artefact="run")
    checks.add("kl", float("inf"), 1.0, artefact="run")
    checks.begin("template", artefact="run")
    assert [(row.row()["pass"], row.row()["value"]) for row in checks.all()] == [
        (True, 0),
        (False, None),
        (False, None),
    ]


def test_a_missing_base_is_one_line(home: Path, run: RunFolder) -> None:
    run.update(base={**run.manifest()["base"], "id": str(home / "gone")})
    with pytest.raises(InputError, match="gone") as caught:
        verify(run.root, QUICK)
    assert "\n" not in str(caught.value)


def test_what_is_less_than_half_a_step_is_kept_on_average() -> None:
    base = torch.full((1000, 1000), 0.05).bfloat16().float()
    weight = base + 1e-5  # a step of bfloat16 is 2.4e-4 here: rounded to the nearest, nothing would be left
    assert torch.equal(weight.bfloat16().float(), base)
    rounded = merge.to_bfloat16(weight, seed=1)
    assert (rounded.float() - base).mean().item() == pytest.approx(1e-5, rel=0.02)
    assert torch.equal(merge.to_bfloat16(-weight, seed=1), -rounded)
    assert torch.equal(merge.to_bfloat16(base, seed=1).float(), base)
