"""The fast path against the plain one: attention per document, shared LoRA products, loss in chunks, whole families."""

from __future__ import annotations

import itertools
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._inductor import config as inductor
from torch.nn import functional
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from lorikeet.config import TuneConfig
from lorikeet.data.encode import encode_all
from lorikeet.prompt import Encoded, PromptFormat
from lorikeet.run import RunFolder
from lorikeet.tune import attention, fast, linear, loss, native
from lorikeet.tune.adapter import apply_lora, load_base, trained_parameters
from lorikeet.tune.attention import document_attention
from lorikeet.tune.batches import pack, pack_all
from lorikeet.tune.fast import FAMILIES, Scorer
from lorikeet.tune.forecast import measure
from lorikeet.tune.native import load_attention

from ..conftest import make_conversations, make_model, make_tokenizer

CPU = torch.device("cpu")


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, bounds: list[int], window: int) -> torch.Tensor:
    """Attention written out, one document at a time, the shared start among its keys."""
    shared, parts = bounds[0], []
    for start, end in itertools.pairwise([0, *bounds] if shared else bounds):
        before = shared if start else 0
        keys = torch.tensor([*range(before), *range(start, end)])
        place = torch.arange(before + end - start)
        seen = place[before:, None] >= place[None]
        if window:
            seen &= place[before:, None] - place[None] < window
        some = (q[None, :, start:end], k[None, :, keys], v[None, :, keys])
        parts.append(functional.scaled_dot_product_attention(*some, attn_mask=seen, enable_gqa=True)[0])
    return torch.cat(parts, dim=1)


def compiler(folder: Path, script: str) -> Path:
    """Write a program that is called as a C++ compiler is."""
    path = folder / "c++"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)
    return path


@pytest.fixture(scope="module")
def built() -> None:
    if sys.platform != "linux" or not shutil.which("g++"):
        pytest.skip("attention is built on Linux by g++, which is not here")
    assert load_attention("g++") == ""


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    attention._schedule.cache_clear()
    monkeypatch.setattr(attention, "BLOCK", 16)  # so that some documents take several blocks,
    monkeypatch.setattr(attention, "KEPT", 40)  # and some of these compute their weights again
    yield
    attention._schedule.cache_clear()


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("shared", [0, 9, 21])
@pytest.mark.parametrize("lengths", [[1], [7, 1, 12], [33, 70, 16]])
def test_attention_stays_inside_each_document(lengths: list[int], shared: int, window: int) -> None:
    bounds = torch.tensor([shared, *lengths]).cumsum(0)
    torch.manual_seed(0)
    q = torch.randn(6, int(bounds[-1]), 8, requires_grad=True)
    k, v = (torch.randn(2, int(bounds[-1]), 8, requires_grad=True) for _ in range(2))
    ours = document_attention(q, k, v, bounds, attention.weights_kept(bounds), 8**-0.5, window)
    theirs = reference(q, k, v, bounds.tolist(), window)
    assert torch.allclose(ours, theirs, atol=1e-6)
    upper = torch.randn_like(ours)
    for a, b in zip(
        torch.autograd.grad(ours, (q, k, v), upper), torch.autograd.grad(theirs, (q, k, v), upper), strict=True
    ):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.usefixtures("built", "small_blocks")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("window", [0, 5, 40])
@pytest.mark.parametrize("shared", [0, 9, 21])
@pytest.mark.parametrize(
    ("lengths", "heads", "key_heads"),
    [([1], 6, 2), ([90], 6, 3), ([7, 1, 12], 4, 4), ([7, 40, 12, 40, 33], 3, 1), ([33, 70, 16, 33, 5], 9, 3)],
)
def test_native_attention_is_the_same(
    lengths: list[int],
    heads: int,
    key_heads: int,
    shared: int,
    window: int,
    threads: int,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(attention.torch, "get_num_threads", lambda: threads)
    bounds = torch.tensor([shared, *lengths]).cumsum(0)
    torch.manual_seed(0)
    # As in a model, heads lie inside tokens; scores are large, so that weights differ.
    sizes = (heads, key_heads, key_heads, heads)
    parts = [(3 * torch.randn(int(bounds[-1]), size, 8)).to(dtype).transpose(0, 1) for size in sizes]
    q, k, v = (part.requires_grad_() for part in parts[:3])
    room = attention.weights_kept(bounds)
    assert attention._scheduled(bounds, window, k) is not None
    found = []
    for way, kind in ((False, torch.float32), (False, dtype), (True, dtype), (True, dtype)):
        some = [part.detach().to(kind).requires_grad_() for part in (q, k, v)]
        out = document_attention(*some, bounds, room, 8**-0.5, window, native=way)
        found.append((out, *torch.autograd.grad(out, some, parts[3].to(kind))))
    for exact, plain, one, again in zip(*found, strict=True):
        plain_error, error = ((exact - value).square().mean().sqrt() for value in (plain, one))
        assert error < 2 * plain_error + 4e-6 * exact.square().mean().sqrt() + 1e-7
        assert torch.equal(one, again)
        assert one.stride() == plain.stride()


def test_a_schedule_holds_each_block_once_and_keeps_threads_busy() -> None:
    for lengths, threads, heads in (([40, 170, 300, 90], 2, 3), ([40] * 20, 4, 1), ([500, 40], 2, 4), ([500], 3, 3)):
        bounds = tuple(torch.tensor([45, *lengths]).cumsum(0).tolist())
        schedule = attention._schedule(bounds, 0, heads, threads)
        assert schedule is not None
        blocks = [row[1:8].tolist() for row in schedule]
        expected = list(attention._blocks(torch.tensor(bounds), 0))
        assert {tuple(b[4:6]) for b in blocks} == {(b.queries.start, b.queries.stop) for b in expected}
        for block in expected:
            rows = [row for row in schedule.tolist() if row[5:7] == [block.queries.start, block.queries.stop]]
            assert sorted(head for row in rows for head in range(row[8], row[9])) == list(range(heads))
        work = [0] * threads
        for row in schedule.tolist():
            keys = row[2] - row[1] + row[4] - row[3]
            work[row[0]] += (row[6] - row[5]) * keys * (row[9] - row[8])
        assert max(work) * threads <= 1.6 * sum(work)
    assert attention._schedule((0, 500), 0, 1, 2) is None  # a single document of one key head is one thread's work
    assert attention._schedule((900, *range(910, 1300, 10)), 0, 8, 16) is None  # sixteen gradients of a long start


def test_attention_that_cannot_be_built_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    broken = compiler(tmp_path, "echo 'attention.cpp:1: error: omp.h is not here' >&2; exit 1")
    assert load_attention(str(broken)) == "attention.cpp:1: error: omp.h is not here"
    assert "c++" in load_attention("/nowhere/c++")
    compiler(tmp_path, "printf '\\377 nothing said\n' >&2; exit 1")
    assert load_attention(str(broken)).endswith("nothing said")
    compiler(tmp_path, "while [ $1 != -o ]; do shift; done; echo no library > $2")
    assert "too short" in load_attention(str(broken))
    assert not [path for path in tmp_path.rglob("*") if path.suffix in {".part", ".so"}]


def test_a_damaged_library_is_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "is_loaded", lambda: False)
    library = native._library("g++")
    library.parent.mkdir()
    library.write_bytes(b"damaged")
    loaded = []

    def load(path: Path) -> None:  # the real one would register the operators a second time
        loaded.append(path.read_bytes())
        if loaded[-1] == b"damaged":
            raise OSError("cannot be loaded")

    monkeypatch.setattr(native, "_build", lambda path, _: path.write_bytes(b"whole"))
    monkeypatch.setattr(native.torch.ops, "load_library", load)
    assert load_attention("g++") == ""
    assert loaded == [b"damaged", b"whole"]


def test_attention_is_a_well_formed_operator() -> None:
    bounds = torch.tensor([0, 5, 9])
    q, k, v = (torch.randn(heads, 9, 8, requires_grad=True) for heads in (4, 2, 2))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(
        attention._forward, (q, k, v, bounds, attention.weights_kept(bounds), 0.3, 0, False), test_utils=checks
    )


@pytest.mark.parametrize("count", [1, 8, 300])
def test_chunked_loss_is_cross_entropy(count: int) -> None:
    torch.manual_seed(0)
    hidden, head = torch.randn(count, 16, requires_grad=True), torch.randn(50, 16)
    labels = torch.randint(50, (count,))
    ours = loss.chunked_loss(hidden, head, labels)
    theirs = functional.cross_entropy(hidden @ head.t(), labels, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-6)
    (a,), (b,) = torch.autograd.grad(3 * ours, hidden), torch.autograd.grad(3 * theirs, hidden)
    assert torch.allclose(a, b, atol=1e-5)
    with torch.no_grad():
        assert torch.allclose(loss.chunked_loss(hidden, head, labels), theirs, rtol=1e-6)


def test_the_loss_of_a_token_that_is_all_but_impossible_is_finite_and_right() -> None:
    hidden, head = torch.tensor([[300.0, -2.0]], requires_grad=True), torch.eye(2)
    ours = loss.chunked_loss(hidden, head, torch.tensor([1]))
    assert ours.item() == pytest.approx(302)
    assert torch.autograd.grad(ours, hidden)[0].tolist() == [[1, -1]]


def test_masks_draw_every_element_for_itself() -> None:
    """Four elements share one number that is drawn: each is dropped as often, and alone as often as with a neighbour."""
    torch.manual_seed(0)
    masks = linear.Masks(0.3, widest=64)
    masks.draw(4096, dtype=torch.float32, device=CPU)
    dropped = (masks.pool.view(-1, 4) == 0).float()
    assert dropped.mean(0).tolist() == pytest.approx([0.3] * 4, abs=0.005)
    assert torch.corrcoef(dropped.T).fill_diagonal_(0).abs().max() < 0.01


def test_masks_drop_the_asked_share_and_are_new_at_each_step() -> None:
    torch.manual_seed(0)
    masks = linear.Masks(0.05, widest=300)
    x = torch.ones(400, 300)
    masks.draw(400, dtype=torch.float32, device=CPU)
    first, second = (linear.window(masks.pool, torch.tensor(place), x) for place in (0.1, 0.8))
    assert first.shape == x.shape and first.unique().tolist() == pytest.approx([0, 1 / 0.95])
    assert (first == 0).float().mean().item() == pytest.approx(0.05, abs=0.003)
    assert not torch.equal(first, second)
    masks.draw(400, dtype=torch.float32, device=CPU)
    assert not torch.equal(first, linear.window(masks.pool, torch.tensor(0.1), x))


def awaken(model: Any) -> None:
    """Give the adapter values, as if trained."""
    torch.manual_seed(5)
    for parameter in trained_parameters(model).values():
        torch.nn.init.normal_(parameter, std=0.1)


def rows_of(folder: Path) -> list[Encoded]:
    led = [conversation.with_system("You are a helpful bird.") for conversation in make_conversations(7)]
    return encode_all(PromptFormat.load(folder), led, max_length=200, on_long="error").rows


def gradients(model: Any, total: torch.Tensor) -> list[torch.Tensor]:
    total.backward()  # type: ignore[no-untyped-call]
    return [parameter.grad for parameter in trained_parameters(model).values() if parameter.grad is not None]


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_packed_batch_scores_as_its_conversations_do_one_by_one(family: str, share: bool, tmp_path: Path) -> None:
    """Loss and every gradient of the fast path, packed, equal those of the plain path on each conversation alone."""
    folder = make_model(tmp_path / "model", family=family)
    config = TuneConfig(lora_dropout=0.0)
    rows = rows_of(folder)
    quick = apply_lora(load_base(folder, torch.float32, CPU), config)
    plain = apply_lora(load_base(folder, torch.float32, CPU), config)
    for model in (quick, plain):
        awaken(model)
        model.train()
    scorer = Scorer.build(quick, config, dtype=torch.float32)
    assert scorer.fast and scorer.plain == [] and scorer.masks is not None
    assert isinstance(quick.get_base_model().get_decoder().layers[-1], fast.LastBlock) == (family != "gemma3_text")
    (batch,) = pack_all(rows, max_tokens=1000, share=share)
    assert bool(batch.documents[0]) == share
    ours = scorer.summed_loss(batch)
    theirs = torch.zeros(())
    for row in rows:
        ids = torch.tensor([row.ids])
        logits = plain(input_ids=ids, use_cache=False).logits[0, :-1]
        labels = torch.tensor([i if kept else -100 for i, kept in zip(row.ids, row.supervised, strict=True)])[1:]
        theirs = theirs + functional.cross_entropy(logits, labels, reduction="sum")
    assert torch.allclose(ours, theirs, rtol=1e-5)
    pairs = list(zip(gradients(quick, ours), gradients(plain, theirs), strict=True))
    assert len(pairs) == 2 * 2 * 7  # A and B of seven projections in two layers
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4 * b.abs().max().item()) for a, b in pairs)


def test_a_family_that_is_not_known_is_scored_the_plain_way_and_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family="gemma2")
    model = apply_lora(load_base(folder, torch.float32, CPU), TuneConfig(lora_dropout=0.0))
    scorer = Scorer.build(model, TuneConfig(lora_dropout=0.0), dtype=torch.float32)
    assert not scorer.fast and scorer.plain[0].startswith("attention, LoRA and loss: gemma2 is not one of llama")
    rows = rows_of(folder)
    together = scorer.summed_loss(pack(rows)).item()
    assert together == pytest.approx(sum(scorer.summed_loss(pack([row])).item() for row in rows), rel=1e-4)


def test_layers_that_are_not_attention_see_one_conversation_a_row(tmp_path: Path) -> None:
    """LFM2's convolutions would go on from one conversation of a row into the next."""
    tokenizer = make_tokenizer()
    text = CONFIG_MAPPING["lfm2"](
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        layer_types=["conv", "full_attention"],
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    config = TuneConfig(lora_dropout=0.0, target_modules=("q_proj", "k_proj"))
    model = apply_lora(load_base(tmp_path / "model", torch.float32, CPU), config)
    scorer = Scorer.build(model, config, dtype=torch.float32)
    rows = rows_of(tmp_path / "model")
    alone = [scorer.summed_loss(pack([row])).item() for row in rows]
    assert scorer.summed_loss(pack(rows)).item() != pytest.approx(sum(alone), rel=1e-4)  # what packing would do
    batches = pack_all(rows, max_tokens=scorer.packed_tokens, share=scorer.fast)
    assert len(batches) == len(rows)
    assert sum(scorer.summed_loss(batch).item() for batch in batches) == pytest.approx(sum(alone), rel=1e-6)
    forecast = measure(scorer, rows, config, steps=3, validation_tokens=10)
    assert forecast.largest_tokens == max(len(row.ids) for row in rows)


def test_checkpointing_recomputes_the_same_gradients_dropout_included(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    found = []
    for recompute in (False, True):
        config = TuneConfig(lora_dropout=0.3, gradient_checkpointing=recompute)
        model = apply_lora(load_base(folder, torch.float32, CPU), config)
        awaken(model)
        model.train()
        scorer = Scorer.build(model, config, dtype=torch.float32)
        torch.manual_seed(9)
        batch = pack(rows_of(folder))
        scorer.start_step([batch])
        found.append(gradients(model, scorer.summed_loss(batch)))
    assert len(found[0]) == len(found[1]) == 28
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*found, strict=True))


def test_shared_weights_are_held_once_and_export_as_they_were(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model", family="qwen2")
    base = load_base(folder, torch.float32, CPU)
    before = {name: value.clone() for name, value in base.state_dict().items()}
    model = apply_lora(base, TuneConfig())
    linear.fuse_linears(model)
    layer = base.model.layers[0].self_attn
    starts = {getattr(layer, name).base_layer.weight.untyped_storage().data_ptr() for name in ("q_proj", "k_proj")}
    assert len(starts) == 1
    after = {name.replace(".base_layer", ""): value for name, value in base.state_dict().items() if "lora" not in name}
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def test_without_a_compiler_blocks_stay_as_they_are_and_why_is_said(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = TuneConfig(lora_dropout=0.0)
    scorer = Scorer.build(apply_lora(load_base(tiny_model, torch.float32, CPU), config), config, dtype=torch.float32)
    here = {"clang++"}
    monkeypatch.setattr(fast.shutil, "which", lambda name: f"/usr/bin/{name}" if name in here else None)
    monkeypatch.delenv("CXX", raising=False)
    batch = pack(rows_of(tiny_model))
    assert "there is no C++ compiler g++" in scorer.compile(batch)  # torch.compile looks for no other
    here.add("g++")
    monkeypatch.setenv("CXX", "/nowhere/c++")
    assert "there is no C++ compiler /nowhere/c++" in scorer.compile(batch)  # nor for another than CXX names
    monkeypatch.delenv("CXX")
    monkeypatch.setattr(fast.sysconfig, "get_path", lambda _: "/nowhere")
    assert "Python's headers" in scorer.compile(batch)
    assert scorer.summed_loss(batch).item() > 0


def test_what_a_gpu_needs_to_compile_is_said_where_it_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, here = torch.device("cuda"), {"g++"}
    monkeypatch.setattr(fast.shutil, "which", lambda name: f"/usr/bin/{name}" if name in here else None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(fast, "has_triton", lambda: False)
    assert "Triton" in fast._no_compiler(gpu)
    monkeypatch.setattr(fast, "has_triton", lambda: True)
    assert "there is no C compiler gcc or clang" in fast._no_compiler(gpu)
    here.add("clang")
    assert "C compiler" not in fast._no_compiler(gpu)
    monkeypatch.setenv("CC", "/nowhere/cc")
    assert "there is no C compiler /nowhere/cc" in fast._no_compiler(gpu)


def test_stores_of_products_are_bounded_unless_somebody_has_set_them(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stores = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": str(fast.KERNELS), "LRU_CACHE_CAPACITY": str(fast.PREPARED)}
    config = TuneConfig()
    for given in ({}, dict.fromkeys(stores, "7")):
        for name in stores:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)
        Scorer.build(apply_lora(load_base(tiny_model, torch.float32, CPU), config), config, dtype=torch.float32)
        assert {name: fast.os.environ.get(name) for name in stores} == {**stores, **given}


@pytest.mark.parametrize(
    "said", ["x.cpp:3: fatal error: no space left", "cc1plus: out of memory allocating 65536 bytes"]
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's own
def test_a_compiler_that_fails_leaves_the_blocks_as_they_are_and_why_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    if fast._no_compiler(CPU):
        pytest.skip("there is no compiler here that could fail")
    broken = compiler(tmp_path, f'case "$*" in *--version*) exec g++ "$@";; esac; echo "{said}" >&2; exit 1')
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "cache"))
    config = TuneConfig(lora_dropout=0.5)
    model = apply_lora(load_base(tiny_model, torch.float32, CPU), config)
    scorer = Scorer.build(model, config, dtype=torch.float32)
    batch = pack(rows_of(tiny_model))
    before, state = scorer.mean_loss([batch], device=CPU), torch.get_rng_state()
    torch._dynamo.reset()
    with inductor.patch({"cpp.cxx": (None, str(broken))}):  # it may have read CXX already
        why_not = scorer.compile(batch)
    assert why_not == said
    assert not scorer.native and scorer.plain == []
    assert all(block._compiled_call_impl is None for block in model.get_base_model().model.layers)
    assert torch.equal(torch.get_rng_state(), state) and all(p.grad is None for p in model.parameters())
    assert scorer.mean_loss([batch], device=CPU) == before


@pytest.mark.parametrize("built_already", [False, True])
def test_attention_that_cannot_be_built_is_said(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, built_already: bool
) -> None:
    """Whether another test of this process has built it or not."""
    if sys.platform != "linux":
        pytest.skip("attention is built on Linux alone")
    monkeypatch.setenv("CXX", str(compiler(tmp_path, "echo error: no space left >&2; exit 1")))
    monkeypatch.setattr(native, "is_loaded", lambda: built_already)
    config = TuneConfig()
    model = apply_lora(load_base(tiny_model, torch.float32, CPU), config)
    scorer = Scorer.build(model, config, dtype=torch.float32)
    layers = model.get_base_model().model.layers
    monkeypatch.setattr(type(layers[0]), "compile", lambda *_, **__: None)  # blocks are not what this is about
    if built_already:
        monkeypatch.setattr(fast.Scorer, "summed_loss", lambda self, batch: torch.zeros((), requires_grad=True))
    assert scorer.compile(pack(rows_of(tiny_model))) == ""
    assert scorer.native is built_already
    assert scorer.plain == ([] if built_already else ["attention: error: no space left"])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's own
def test_a_compiled_run_that_is_killed_gives_the_adapter_of_the_uninterrupted_one(
    tiny_model: Path, chats: Path, tmp_path: Path
) -> None:
    code = (
        "import os, signal, sys; from lorikeet import cli; from lorikeet.tune import loop\n"
        "append, at = loop.RunFolder.append_metrics, int(sys.argv.pop(1))\n"
        "def dying(run, row):\n"
        "    append(run, row)\n"
        "    if row['step'] == at: os.kill(os.getpid(), signal.SIGKILL)\n"
        "loop.RunFolder.append_metrics = dying\n"
        "sys.exit(cli.run(sys.argv[1:]))\n"
    )

    def tuned(out: Path, *, killed_at: int) -> int:
        flags = ["--model", str(tiny_model), "--data", str(chats), "--max-steps", "6", "--save-steps", "2"]
        flags += ["--torch-compile", "on", "--dtype", "float32", "--learning-rate", "1e-2", "--out", str(out)]
        given = ["--resume", str(out)] if out.exists() else flags
        return subprocess.run([sys.executable, "-c", code, str(killed_at), "tune", *given], check=False).returncode

    assert tuned(tmp_path / "whole", killed_at=-1) == 0
    for step in (0, 3, 4):
        assert tuned(tmp_path / str(step), killed_at=step) == -signal.SIGKILL
        assert tuned(tmp_path / str(step), killed_at=-1) == 0
        found = [
            (tmp_path / name / "adapter" / "adapter_model.safetensors").read_bytes() for name in ("whole", str(step))
        ]
        assert found[0] == found[1]
        assert RunFolder.open(tmp_path / str(step)).manifest()["compiled"] is True


def test_rows_are_converted_at_once_where_each_call_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    hidden, head, labels = torch.randn(300, 16, requires_grad=True), torch.randn(50, 16), torch.randint(50, (300,))
    found = []
    for rows in (loss.ROWS, loss.CHUNK):
        monkeypatch.setattr(loss, "_rows_at_once", lambda _, rows=rows: rows)
        total = loss.chunked_loss(hidden, head, labels)
        found.append((total, *torch.autograd.grad(total, hidden)))
    assert all(torch.allclose(a, b, rtol=1e-5) for a, b in zip(*found, strict=True))
    monkeypatch.undo()
    on = [loss.working_bytes(50, torch.bfloat16, torch.device(name)) for name in ("cpu", "cuda")]
    assert on == [50 * (256 * 2 + 8 * 8), 50 * (256 * 2 + 256 * 8)]


def varlen_attn(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    cu_seq_q: torch.Tensor,
    cu_seq_k: torch.Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool,
) -> torch.Tensor:
    """What torch documents of its FlashAttention, (tokens, heads, size) -> the same, written out for a CPU."""
    assert cu_seq_q.dtype == torch.int32 and torch.equal(cu_seq_q, cu_seq_k) and max_q == max_k and enable_gqa
    parts = []
    for start, end in itertools.pairwise(cu_seq_q.tolist()):
        assert end - start <= max_q
        place = torch.arange(end - start)
        left, right = window_size
        seen = place[None] - place[:, None] <= right
        if left >= 0:
            seen &= place[:, None] - place[None] <= left
        some = (part[start:end].transpose(0, 1)[None] for part in (query, key, value))
        parts.append(functional.scaled_dot_product_attention(*some, attn_mask=seen, scale=scale, enable_gqa=True)[0])
    return torch.cat(parts, dim=1).transpose(0, 1)


HEADS = {"heads": 6, "key_heads": 2, "size": 8}


def test_flash_attention_is_asked_for_what_document_attention_computes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_attn)
    for dtype, window in itertools.product(attention.HALF, (0, 5, 40)):
        assert attention.why_no_flash(CPU, dtype, **HEADS, window=window) == ""
    assert attention.why_no_flash(CPU, torch.float32, **HEADS) == "FlashAttention does not compute in float32"


def test_flash_attention_that_fails_or_is_wrong_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    given = (CPU, torch.bfloat16)
    assert "FlashAttention is not to be had here" in attention.why_no_flash(*given, **HEADS)  # a CPU has none

    def one_key_more(*parts: Any, window_size: tuple[int, int], **more: Any) -> torch.Tensor:
        left, right = window_size
        return varlen_attn(*parts, window_size=(left + (left >= 0), right + 1), **more)

    monkeypatch.setattr(attention.varlen, "varlen_attn", one_key_more)
    assert "is off by" in attention.why_no_flash(*given, **HEADS)
    assert "is off by" in attention.why_no_flash(*given, **HEADS, window=40)

    def without_window(*parts: Any, window_size: tuple[int, int], **more: Any) -> torch.Tensor:
        return varlen_attn(*parts, window_size=(-1, 0), **more)

    monkeypatch.setattr(attention.varlen, "varlen_attn", without_window)
    assert attention.why_no_flash(*given, **HEADS) == ""
    assert "is off by" in attention.why_no_flash(*given, **HEADS, window=4096)


def test_flash_attention_that_has_no_memory_is_not_taken_for_one_that_is_not_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(attention.varlen, "varlen_attn", full)
    with pytest.raises(torch.OutOfMemoryError):
        attention.why_no_flash(CPU, torch.bfloat16, **HEADS)


def test_a_model_whose_attention_is_flash_attention_scores_the_same(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention.varlen, "varlen_attn", varlen_attn)
    config, rows = TuneConfig(lora_dropout=0.0), rows_of(tiny_model)
    found = []
    for flash in (False, True):
        model = apply_lora(load_base(tiny_model, torch.bfloat16, CPU), config)
        awaken(model)
        scorer = Scorer.build(model, config, dtype=torch.bfloat16)
        scorer.flash = flash
        assert scorer.shares is not flash
        found.append(gradients(model, scorer.summed_loss(pack(rows))))
    assert all((a - b).norm() <= 0.05 * b.norm() for a, b in zip(*found, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*torch.jit.script_method.*:DeprecationWarning")  # inductor's own
def test_compiled_blocks_score_the_same_and_are_compiled_once(tiny_model: Path) -> None:
    found = []
    for compiled in (False, True):
        config = TuneConfig(lora_dropout=0.0)
        model = apply_lora(load_base(tiny_model, torch.float32, CPU), config)
        awaken(model)
        model.train()
        scorer = Scorer.build(model, config, dtype=torch.float32)
        assert not compiled or scorer.compile(pack(rows_of(tiny_model)[:3])) == ""
        found.append(gradients(model, scorer.summed_loss(pack(rows_of(tiny_model)))))
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(*found, strict=True))
    assert len(torch._dynamo.utils.compile_times("csv")[1]) > 0
