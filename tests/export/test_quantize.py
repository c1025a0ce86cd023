"""Block formats byte by byte, errors against the best there is, the mix of types, and llama.cpp reading the files."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, quants
from gguf.constants import GGML_QUANT_SIZES
from safetensors.torch import load_file, save_file

from lorikeet.config import Quant
from lorikeet.engine import LlamaEngine
from lorikeet.errors import InputError
from lorikeet.export.gguf import write_gguf
from lorikeet.export.mix import FILE_TYPES, Mix
from lorikeet.export.quantize import KINDS, quantize
from lorikeet.messages import Message

from ..conftest import make_model, make_tokenizer

SEARCHED = tuple(kind for kind in KINDS if kind != Kind.Q8_0)


def gauss(rows: int = 64, columns: int = 512, seed: int = 0) -> Any:
    return (np.random.default_rng(seed).standard_normal((rows, columns)) * 0.02).astype(np.float32)


def decoded(values: Any, kind: Kind, importance: Any = None) -> Any:
    return quants.dequantize(quantize(values, kind, importance=importance), kind)


def relative_error(values: Any, kind: Kind) -> float:
    return float(np.sqrt(np.square(decoded(values, kind) - values).mean() / np.square(values).mean()))


CODES = np.array([(7 * i + 3) % 16 for i in range(32)])
FIVE = np.array([(11 * i + 5) % 32 for i in range(32)])


def nibbles(codes: Any) -> bytes:
    return bytes(int(codes[i] & 15) | int(codes[i + 16] & 15) << 4 for i in range(16))


def fifth_bits(codes: Any) -> bytes:
    return struct.pack("<I", sum(int(code >> 4) << place for place, code in enumerate(codes)))


@pytest.mark.parametrize(
    ("kind", "values", "expected"),
    [
        (Kind.Q4_0, 0.25 * (CODES - 8), struct.pack("<e", 0.25) + nibbles(CODES)),
        (Kind.Q5_0, 0.25 * (FIVE - 16), struct.pack("<e", 0.25) + fifth_bits(FIVE) + nibbles(FIVE)),
        (Kind.Q4_1, 0.5 * CODES + 3, struct.pack("<ee", 0.5, 3.0) + nibbles(CODES)),
        (Kind.Q5_1, 0.5 * FIVE - 7, struct.pack("<ee", 0.5, -7.0) + fifth_bits(FIVE) + nibbles(FIVE)),
    ],
)
def test_a_block_is_packed_as_by_hand(kind: Kind, values: Any, expected: bytes) -> None:
    assert quantize(values.astype(np.float32)[np.newaxis], kind).tobytes() == expected


@pytest.mark.parametrize(("kind", "high"), [(Kind.Q4_K, 15), (Kind.Q5_K, 31)])
def test_a_super_block_with_offsets_is_packed_as_by_hand(kind: Kind, high: int) -> None:
    """Steps of 1/64 and 1/32, eight multipliers and offsets that use all six bits, values that lie on the grid."""
    scales, depths = np.array([63, 17, 34, 50, 9, 40, 62, 33]), np.array([12, 63, 1, 20, 48, 35, 22, 60])
    codes = np.array([[(5 * i + 3 * part) % (high + 1) for i in range(32)] for part in range(8)])
    values = (scales[:, None] * codes / 64 - depths[:, None] / 32).astype(np.float32).reshape(1, 256)
    packed = quantize(values, kind)
    head = bytes([*(scales[:4] | (scales[4:] >> 4) << 6), *(depths[:4] | (depths[4:] >> 4) << 6)])
    head += bytes(((scales[4:] & 15) | (depths[4:] & 15) << 4).tolist())
    body = b"".join(bytes(((codes[pair] & 15) | (codes[pair + 1] & 15) << 4).tolist()) for pair in (0, 2, 4, 6))
    fifth = bytes(sum(int(codes[part, i] >> 4) << part for part in range(8)) for i in range(32)) if high == 31 else b""
    assert packed.tobytes() == struct.pack("<ee", 1 / 64, 1 / 32) + head + fifth + body


def test_a_q6_k_block_is_packed_as_by_hand() -> None:
    scales = np.array([-128, 127, -90, 64, 3, -3, 100, 77, -55, 21, 120, -101, 45, 88, -19, 110])
    codes = np.array([[(13 * i + 7 * part) % 64 for i in range(16)] for part in range(16)])
    codes[:, 0] = 0  # the largest is code -32 in every part
    values = (scales[:, None] * (codes - 32) / 1024).astype(np.float32).reshape(1, 256)
    packed = quantize(values, Kind.Q6_K)
    flat = codes.reshape(2, 4, 32)
    low = b"".join(bytes((half[0:2] & 15 | (half[2:4] & 15) << 4).reshape(-1).tolist()) for half in flat)
    high = b"".join(bytes(sum((half[k] >> 4) << 2 * k for k in range(4)).tolist()) for half in flat)
    assert packed.tobytes() == low + high + scales.astype(np.int8).tobytes() + struct.pack("<e", 1 / 1024)


def test_q8_0_is_the_packages_own() -> None:
    values = gauss()
    assert (quantize(values, Kind.Q8_0) == quants.quantize(values, Kind.Q8_0)).all()
    assert (quantize(values, Kind.Q4_0) == quants.quantize(values, Kind.Q4_0)).all()


@pytest.mark.parametrize(
    ("kind", "least", "most"),
    [
        (Kind.Q8_0, 0.004, 0.006),
        (Kind.Q6_K, 0.013, 0.018),
        (Kind.Q5_K, 0.030, 0.037),
        (Kind.Q5_1, 0.030, 0.034),
        (Kind.Q5_0, 0.036, 0.041),
        (Kind.Q4_K, 0.060, 0.071),
        (Kind.Q4_1, 0.060, 0.070),
        (Kind.Q4_0, 0.070, 0.088),
    ],
)
def test_the_error_on_normal_weights(kind: Kind, least: float, most: float) -> None:
    """Relative RMSE; llama.cpp's own, on the same values, is above each upper bound but those of Q8_0 and Q4_0, which are its own."""
    assert least < relative_error(gauss(), kind) < most


@pytest.mark.parametrize(("kind", "half"), [(Kind.Q4_0, 8), (Kind.Q5_0, 16)])
def test_the_search_is_near_the_best_multiplier(kind: Kind, half: int) -> None:
    """The best of three thousand multipliers, each rounded to float16, is not much better than what was found."""
    values = gauss(8, 256, seed=3)
    blocks = values.reshape(-1, 32)
    importance = np.random.default_rng(4).lognormal(0, 1, values.shape[1]).astype(np.float32)
    weights = np.broadcast_to(importance, values.shape).reshape(-1, 32)
    best = np.full(len(blocks), np.inf)
    for step in np.linspace(0.5, 1.3, 1500):
        for sign in (-1, 1):
            scale = (sign * np.abs(blocks).max(axis=1) / (half * step)).astype(np.float16).astype(np.float32)[:, None]
            codes = np.clip(np.rint(blocks / scale), -half, half - 1)
            best = np.minimum(best, (weights * np.square(codes * scale - blocks)).sum(axis=1))
    found = (weights * np.square(decoded(values, kind, importance).reshape(-1, 32) - blocks)).sum(axis=1)
    assert found.sum() < 1.01 * best.sum()


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_of_one_value_are_kept(kind: Kind) -> None:
    values = np.zeros((3, 256), dtype=np.float32)
    values[1], values[2, 5] = 0.5, -2.0
    back = decoded(values, kind)
    assert (back[0] == 0).all()
    assert back[1] == pytest.approx(values[1], rel=0.01)
    assert back[2] == pytest.approx(values[2], rel=0.01, abs=2e-3)  # an offset of -2 in float16


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [65_504.0, 1e-7, 1e-30])
def test_extreme_sizes_do_not_break_a_block(kind: Kind, size: float) -> None:
    values = gauss(4, 256) / np.abs(gauss(4, 256)).max() * np.float32(size)
    back = decoded(values, kind)
    assert np.isfinite(back).all()
    assert np.abs(back - values).max() <= (0.2 if size > 1 else 1.0) * size + 1e-6


@pytest.mark.parametrize("broken", [np.nan, np.inf, 1e9])
def test_broken_values_are_refused(broken: float) -> None:
    values = gauss(2, 256)
    values[1, 17] = broken
    with pytest.raises(ValueError, match=r"not finite|more than float16"):
        quantize(values, Kind.Q4_K)


@pytest.mark.parametrize("kind", KINDS)
def test_the_bytes_depend_on_the_weights_alone(kind: Kind) -> None:
    values, importance = gauss(700, 256), np.random.default_rng(1).lognormal(0, 1, 256).astype(np.float32)
    once = quantize(values, kind, importance=importance, threads=1)
    assert (quantize(values, kind, importance=importance, threads=3) == once).all()
    apart = [quantize(part, kind, importance=importance) for part in np.array_split(values, 7)]
    assert (np.concatenate(apart) == once).all()


@pytest.mark.parametrize("kind", SEARCHED)
def test_importance_lowers_the_error_that_it_weighs(kind: Kind) -> None:
    values, importance = gauss(), np.random.default_rng(1).lognormal(0, 1.5, 512).astype(np.float32)
    without, with_it = ((np.square(decoded(values, kind, i) - values) * importance).mean() for i in (None, importance))
    assert with_it < (0.97 if kind != Kind.Q6_K else 0.99) * without


@pytest.mark.parametrize("kind", SEARCHED)
def test_a_column_a_million_times_as_important_is_kept(kind: Kind) -> None:
    """One input that is always large, as layers of real models have: its weights are exact to what float16 leaves."""
    values, importance = gauss(seed=5), np.full(512, 0.02, dtype=np.float32)
    importance[77] = 7e4
    off = np.abs(decoded(values, kind, importance) - values)[:, 77]
    assert np.median(off) < 1e-4  # the values are about 0.02
    assert off.max() < 2e-4


def test_columns_without_importance_are_still_written() -> None:
    values = gauss()
    importance = np.zeros(512, dtype=np.float32)
    assert np.isfinite(decoded(values, Kind.Q4_K, importance)).all()
    importance[:256] = 1.0
    error = np.sqrt(np.square(decoded(values, Kind.Q4_K, importance) - values).mean(axis=0))
    assert error[256:].max() < 0.02  # the values are about 0.02


def test_a_row_that_no_block_divides_is_refused() -> None:
    with pytest.raises(ValueError, match="100 are no whole number"):
        quantize(gauss(2, 100), Kind.Q4_0)


# ------------------------------------------------------------------------------------------------------------ the mix


@pytest.mark.parametrize(
    ("quant", "name", "columns", "expected"),
    [
        ("q4_k_m", "token_embd.weight", 2048, Kind.Q6_K),
        ("q4_k_m", "token_embd.weight", 576, Kind.Q8_0),
        ("q4_0", "token_embd.weight", 2048, Kind.Q6_K),
        ("q4_0", "token_embd.weight", 576, Kind.Q8_0),
        ("q8_0", "token_embd.weight", 2048, Kind.Q8_0),
        ("q4_k_m", "blk.0.attn_q.weight", 2048, Kind.Q4_K),
        ("q4_k_m", "blk.0.attn_q.weight", 576, Kind.Q5_0),
        ("q5_k_m", "blk.0.attn_q.weight", 576, Kind.Q5_1),
        ("q6_k", "blk.0.attn_q.weight", 576, Kind.Q8_0),
        ("q4_k_m", "blk.0.ffn_down.weight", 1536, Kind.Q6_K),
        ("q4_k_m", "blk.3.ffn_down.weight", 1536, Kind.Q4_K),
        ("q5_k_m", "blk.3.attn_v.weight", 2048, Kind.Q5_K),
        ("q5_k_m", "blk.5.attn_v.weight", 2048, Kind.Q6_K),
        ("q4_0", "blk.2.ffn_down.weight", 1536, Kind.Q4_1),
        ("q4_0", "blk.3.ffn_down.weight", 1536, Kind.Q4_0),
        ("q4_0", "blk.3.attn_q.weight", 36, Kind.F16),
        ("q4_k_m", "blk.3.attn_q.weight", 36, Kind.F16),
        ("f16", "blk.3.attn_q.weight", 36, Kind.F16),
    ],
)
def test_a_tensor_gets_the_type_that_llama_cpp_gives_it(quant: Quant, name: str, columns: int, expected: Kind) -> None:
    mix = Mix(quant, arch="llama", layers=30, tied=True, importance=True)
    assert mix.kind(name, (512, columns)) == expected


def test_the_layers_with_more_bits() -> None:
    """Of 16: the first two, the last two, and every third from the fifth on, counted by hand from llama.cpp's rule."""
    mix = Mix("q4_k_m", arch="llama", layers=16, tied=True)
    assert [i for i in range(16) if mix.kind(f"blk.{i}.ffn_down.weight", (8, 256)) == Kind.Q6_K] == [
        0,
        1,
        4,
        7,
        10,
        13,
        14,
        15,
    ]


def test_what_differs_by_head_architecture_and_matrix() -> None:
    untied = Mix("q4_k_m", arch="qwen2", layers=24, tied=False)
    assert untied.kind("token_embd.weight", (8, 256)) == Kind.Q4_K
    assert untied.kind("output.weight", (8, 256)) == Kind.Q6_K
    assert untied.kind("blk.0.attn_q.bias", (256,)) == untied.kind("blk.0.attn_norm.weight", (256,)) == Kind.F32
    plain = Mix("q4_0", arch="llama", layers=30, tied=True)
    assert plain.kind("blk.0.ffn_down.weight", (8, 256)) == Kind.Q4_0
    large = Mix("q4_k_m", arch="llama", layers=80, tied=False, grouped=True)
    assert large.kind("blk.10.attn_v.weight", (8, 256)) == Kind.Q5_K
    assert (
        Mix("q4_k_m", arch="qwen2", layers=80, tied=False, grouped=True).kind("blk.10.attn_v.weight", (8, 256))
        == Kind.Q4_K
    )


# ---------------------------------------------------------------------------------------------------------- the files


@pytest.fixture(scope="module")
def wide_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama whose rows 256 divides."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("wide"), make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        initializer_range=0.1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("quant", get_args(Quant))
def test_llama_cpp_reads_every_type(tmp_path: Path, wide_model: Path, tiny_model: Path, quant: Quant) -> None:
    for folder in (wide_model, tiny_model):
        path = tmp_path / "model.gguf"
        write_gguf(folder, path, quant=quant, name="m")
        reader = GGUFReader(path)
        assert reader.fields["general.file_type"].parts[-1][0] == FILE_TYPES[quant].number
        for tensor in reader.tensors:
            block, width = GGML_QUANT_SIZES[tensor.tensor_type]
            assert tensor.n_bytes == tensor.n_elements // block * width
        with LlamaEngine(path, context_tokens=256) as engine:
            answer = "".join(d.text for d in engine.stream([Message("user", "the fox")], max_tokens=4, temperature=0.0))
            hidden = engine.get("/props")
        assert isinstance(answer, str)
        assert hidden["total_slots"] >= 1


def test_a_broken_weight_is_named(tmp_path: Path) -> None:
    folder = make_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for quant in ("f16", "q4_0"):
        with pytest.raises(InputError, match=r"model.layers.1.mlp.up_proj.weight holds a value that is not finite"):
            write_gguf(folder, tmp_path / "m.gguf", quant=quant, name="m")  # type: ignore[arg-type]


def test_pieces_are_the_whole(tmp_path: Path, tiny_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tiny_model, tmp_path / "whole.gguf", quant="q4_k_m", name="m")
    monkeypatch.setattr("lorikeet.export.gguf.PIECE_VALUES", 700)
    write_gguf(tiny_model, tmp_path / "pieces.gguf", quant="q4_k_m", name="m")
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "pieces.gguf").read_bytes()
