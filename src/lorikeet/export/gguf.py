"""A Hugging Face folder -> one GGUF file with tokenizer and chat template inside, one tensor at a time.

    write_gguf(folder, out_file, quant="q8_0")

It knows the families of `FAMILIES`. Tensor names come from the `gguf` package's own table; what is written here is
what llama.cpp expects beyond names: permuted rotary weights, rotary scaling factors and metadata; `vocabulary` adds the tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import (
    MODEL_ARCH,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    get_tensor_name_map,
    quants,
)
from numpy.typing import NDArray

from lorikeet.errors import InputError
from lorikeet.export.merge import Tensor, tensors
from lorikeet.export.vocabulary import add_vocabulary

Progress = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Family:
    """How one Hugging Face architecture is written."""

    arch: MODEL_ARCH
    permuted: bool
    """Whether q and k rows are reordered: llama.cpp rotates neighbouring pairs in this architecture."""


FAMILIES = {
    "LlamaForCausalLM": Family(MODEL_ARCH.LLAMA, permuted=True),
    "Qwen2ForCausalLM": Family(MODEL_ARCH.QWEN2, permuted=False),
    "Qwen3ForCausalLM": Family(MODEL_ARCH.QWEN3, permuted=False),
}

FILE_TYPES = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}


def write_gguf(
    folder: Path,
    out: Path,
    *,
    quant: str,
    name: str,
    vocabulary: Path | None = None,
    progress: Progress = lambda *_: None,
) -> None:
    """Write the model in `folder` to the file `out` as `f16` or `q8_0`, with the tokenizer in `vocabulary` or `folder`.

    Vectors and rotary factors stay float32, as llama.cpp wants them. Raises InputError for an architecture or a
    tokenizer that is not known here, before anything is written.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    family = _family(config, folder)
    kind, file_type = FILE_TYPES[quant]
    names = get_tensor_name_map(family.arch, config["num_hidden_layers"])
    plan = _plan(folder, config, family, names, kind)
    writer = GGUFWriter(out, arch=_arch_name(family))
    try:
        _add_metadata(writer, config, name=name, file_type=file_type)
        add_vocabulary(writer, vocabulary or folder, config)
        factors = rotary_factors(config)
        if factors is not None:
            writer.add_tensor_info("rope_freqs.weight", factors.shape, np.dtype(np.float32), factors.nbytes)
        for entry in plan:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(entry.dtype), entry.n_bytes, entry.raw_dtype)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if factors is not None:
            writer.write_tensor_data(factors)
        for done, entry in enumerate(plan, start=1):
            writer.write_tensor_data(entry.data())
            progress(done, len(plan))
    finally:
        writer.close()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the file to be: where it comes from and how it is stored."""

    name: str
    source: Tensor
    heads: int
    """Rotary heads whose rows are reordered; 0 for none."""
    logical: tuple[int, ...]
    kind: GGMLQuantizationType

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape as the writer wants it: of the bytes for quantised tensors, of the values otherwise."""
        if self.raw_dtype is None:
            return self.logical
        return tuple(quants.quant_shape_to_byte_shape(self.logical, self.kind))

    @property
    def dtype(self) -> type[np.generic]:
        """Type of the array that is written."""
        floats: dict[GGMLQuantizationType, type[np.generic]] = {
            GGMLQuantizationType.F32: np.float32,
            GGMLQuantizationType.F16: np.float16,
        }
        return floats.get(self.kind, np.uint8)

    @property
    def raw_dtype(self) -> GGMLQuantizationType | None:
        """The quantised type; None for plain floats."""
        return None if self.kind in {GGMLQuantizationType.F32, GGMLQuantizationType.F16} else self.kind

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return math.prod(self.shape) * np.dtype(self.dtype).itemsize

    def data(self) -> NDArray[Any]:
        """Return the array to be written."""
        value = self.source.load().float()
        if self.heads:
            value = permute(value, self.heads)
        array = value.numpy()
        if self.raw_dtype is None:
            return array.astype(self.dtype)
        packed: NDArray[Any] = quants.quantize(array, self.kind)
        return packed


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a rotary projection's rows reordered from halves (Hugging Face) to neighbouring pairs (llama.cpp).

    `weight` has shape (heads * width, in) or (heads * width,).
    """
    width = weight.shape[0] // heads
    split = weight.reshape(heads, 2, width // 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape).contiguous()


def rotary_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """Return what each rotary frequency is divided by, shape (head width / 2,), for Llama 3's scaling; None without it.

    The formula is Meta's, of the Llama 3.1 release: long wavelengths are stretched by `factor`, short ones kept, and
    those between are blended.
    """
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type")) != "llama3":
        return None
    width = _head_width(config)
    frequencies = 1.0 / (_rope_theta(config) ** (np.arange(0, width, 2, dtype=np.float64) / width))
    wavelengths = 2 * np.pi / frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def _family(config: dict[str, Any], folder: Path) -> Family:
    name = (config.get("architectures") or ["none"])[0]
    if name not in FAMILIES:
        raise InputError(f"{folder}: {name} cannot be written as GGUF here; known are {', '.join(FAMILIES)}")
    return FAMILIES[name]


def _arch_name(family: Family) -> str:
    from gguf.constants import MODEL_ARCH_NAMES

    return str(MODEL_ARCH_NAMES[family.arch])


def _head_width(config: dict[str, Any]) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def _rope_theta(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or {}
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10_000.0)


def _plan(folder: Path, config: dict[str, Any], family: Family, names: Any, kind: GGMLQuantizationType) -> list[_Entry]:
    """Return every tensor with its name and type. Raises InputError for one that has no name in this architecture."""
    from safetensors import safe_open

    heads, kv_heads = config["num_attention_heads"], config.get("num_key_value_heads") or config["num_attention_heads"]
    plan = []
    for tensor in tensors(folder):
        if tensor.name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        name = names.get_name(tensor.name, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise InputError(f"{folder}: the tensor {tensor.name} has no place in llama.cpp's {_arch_name(family)}")
        with safe_open(tensor.file, framework="pt") as opened:
            shape = tuple(opened.get_slice(tensor.name).get_shape())
        rotary = 0
        if family.permuted and tensor.name.rsplit(".", 2)[-2] in {"q_proj", "k_proj"}:
            rotary = heads if ".q_proj." in tensor.name else kv_heads
        plan.append(_Entry(name, tensor, rotary, shape, _stored_as(shape, kind)))
    return plan


def _stored_as(shape: tuple[int, ...], kind: GGMLQuantizationType) -> GGMLQuantizationType:
    """Return the type of a tensor: vectors stay float32, rows that no block divides become F16."""
    if len(shape) < 2:
        return GGMLQuantizationType.F32
    from gguf.constants import GGML_QUANT_SIZES

    return kind if shape[-1] % GGML_QUANT_SIZES[kind][0] == 0 else GGMLQuantizationType.F16


def _add_metadata(writer: GGUFWriter, config: dict[str, Any], *, name: str, file_type: LlamaFileType) -> None:
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(2)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config.get("num_key_value_heads") or config["num_attention_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_theta(config))
    writer.add_rope_dimension_count(_head_width(config))
    writer.add_key_length(_head_width(config))
    writer.add_value_length(_head_width(config))
    writer.add_vocab_size(config["vocab_size"])
