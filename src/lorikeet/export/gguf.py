"""A Hugging Face folder -> one GGUF file with tokenizer and chat template inside, one tensor at a time.

    write_gguf(folder, out_file, quant="q8_0")

Tensor names come from the `gguf` package's own table. `families` knows the architectures and their metadata, `mix`
the type of each tensor, `vocabulary` the tokenizer; here is what llama.cpp expects of the weights themselves.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGML_QUANT_VERSION, GGMLQuantizationType, GGUFWriter, get_tensor_name_map, quants
from numpy.typing import NDArray

from lorikeet.config import Quant
from lorikeet.errors import InputError
from lorikeet.export.families import Family, add_metadata, read_family, rotary_factors
from lorikeet.export.imatrix import Importance
from lorikeet.export.mix import FILE_TYPES, FLOATS, Mix
from lorikeet.export.quantize import check_finite, quantize
from lorikeet.export.tensors import Tensor, tensors
from lorikeet.export.vocabulary import add_vocabulary

Progress = Callable[[int, int], None]

PIECE_VALUES = 1 << 23
"""Weights that are in memory at once, as float32 and as bytes, while a tensor is written."""


def write_gguf(
    folder: Path,
    out: Path,
    *,
    quant: Quant,
    name: str,
    vocabulary: Path | None = None,
    importance: Importance | None = None,
    progress: Progress = lambda *_: None,
) -> None:
    """Write the model in `folder` to the file `out` as `quant`, with the tokenizer in `vocabulary` or `folder`.

    Vectors and rotary factors stay float32, as llama.cpp wants them; the errors of quantised weights are weighed by
    `importance`. `progress` is told weights, done and in all. Raises InputError for an architecture or a tokenizer that
    is not known here, before anything is written, and for weights that are not finite.
    """
    family, config = read_family(folder)
    plan = _plan(folder, config, family, _mix(config, family, quant, importance=importance is not None))
    writer = GGUFWriter(out, arch=family.name)
    try:
        writer.add_type("model")
        writer.add_name(name)
        writer.add_file_type(FILE_TYPES[quant].number)
        writer.add_quantization_version(GGML_QUANT_VERSION)
        add_metadata(writer, family, config)
        if importance is not None:
            importance.describe(writer)
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
        _write_tensors(writer, plan, importance, progress)
    finally:
        writer.close()


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor of the file to be: where it comes from and how it is stored."""

    name: str
    source: Tensor
    heads: int
    """Rotary heads whose rows are reordered; 0 for none."""
    shift: float
    """What is added to the values: to norms, in a family that multiplies by one more than they hold."""
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

    def pieces(self, importance: NDArray[np.float32] | None) -> Iterator[NDArray[Any]]:
        """Yield the array to be written, some rows at a time; `importance` is of its columns.

        Raises InputError, naming the tensor, if a weight is not finite or float16 cannot hold it.
        """
        for start, stop in self._spans():
            value = self.source.load(start, stop).float() + self.shift
            if self.heads:
                value = permute(value, (stop - start) // self._head_rows)
            try:
                yield _packed(value.numpy(), self.kind, importance)
            except ValueError as error:
                raise InputError(
                    f"{self.source.file}: {self.source.name} holds {error}; the weights are broken"
                ) from error

    @property
    def _head_rows(self) -> int:
        return self.logical[0] // (self.heads or 1)

    def _spans(self) -> Iterator[tuple[int, int]]:
        """Yield first row and row after the last of each piece: whole heads where rows are reordered."""
        rows = self.logical[0]
        unit = self._head_rows if self.heads else 1
        step = max(1, PIECE_VALUES // (math.prod(self.logical[1:]) * unit)) * unit
        for start in range(0, rows, step):
            yield start, min(rows, start + step)


def _packed(
    values: NDArray[np.float32], kind: GGMLQuantizationType, importance: NDArray[np.float32] | None
) -> NDArray[Any]:
    """Return `values` as they are stored in a tensor of `kind`. Raises ValueError for what cannot be stored."""
    if kind not in FLOATS:
        return quantize(values, kind, importance=importance)
    check_finite(values)
    return values.astype(np.float16 if kind == GGMLQuantizationType.F16 else np.float32)


def _write_tensors(writer: GGUFWriter, plan: list[_Entry], importance: Importance | None, progress: Progress) -> None:
    """Write every tensor, a piece at a time, with the padding between them."""
    file = writer.fout[0]
    total, done = sum(math.prod(entry.logical) for entry in plan), 0
    for entry in plan:
        writer.write_padding(file, file.tell())
        for piece in entry.pieces(importance.of(entry.name) if importance else None):
            file.write(np.ascontiguousarray(piece).data)  # numpy's tofile hides which error a disk had
            done += math.prod(entry.logical[1:]) * len(piece)
            progress(done, total)
        writer.write_padding(file, entry.n_bytes)


def permute(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Return a rotary projection's rows reordered from halves (Hugging Face) to neighbouring pairs (llama.cpp).

    `weight` has shape (heads * width, in) or (heads * width,).
    """
    width = weight.shape[0] // heads
    split = weight.reshape(heads, 2, width // 2, *weight.shape[1:])
    return split.transpose(1, 2).reshape(weight.shape).contiguous()


def namer(folder: Path) -> Callable[[str], str | None]:
    """Return what gives llama.cpp's name of a tensor of the model in `folder`, None for one that has no place there."""
    family, config = read_family(folder)
    names = get_tensor_name_map(family.arch, config["num_hidden_layers"])
    return lambda name: names.get_name(name, try_suffixes=(".weight", ".bias"))


def _mix(config: dict[str, Any], family: Family, quant: Quant, *, importance: bool) -> Mix:
    """Return the types of this model's tensors."""
    heads, layers = config["num_attention_heads"], config["num_hidden_layers"]
    return Mix(
        quant,
        arch=family.name,
        layers=layers,
        tied=bool(config.get("tie_word_embeddings")),
        grouped=(config.get("num_key_value_heads") or heads) != heads,
        importance=importance,
    )


def _plan(folder: Path, config: dict[str, Any], family: Family, mix: Mix) -> list[_Entry]:
    """Return every tensor with its name and type.

    Raises InputError for one that has no place in this architecture, and for weights that are missing.
    """
    heads = config["num_attention_heads"]
    rotary = {"q_proj": heads, "k_proj": config.get("num_key_value_heads") or heads} if family.permuted else {}
    name_of = namer(folder)
    plan = []
    for tensor in tensors(folder):
        if tensor.name == "lm_head.weight" and config["tie_word_embeddings"]:
            continue
        name, shape = name_of(tensor.name), tensor.shape
        if name is None:
            raise InputError(f"{folder}: the tensor {tensor.name} has no place in llama.cpp's {family.name}")
        shift = family.norm_shift if tensor.name.endswith("norm.weight") else 0.0
        plan.append(_Entry(name, tensor, rotary.get(tensor.module, 0), shift, shape, mix.kind(name, shape)))
    _check_whole(folder, config, {entry.name: entry.logical for entry in plan})
    return plan


def _check_whole(folder: Path, config: dict[str, Any], shapes: dict[str, tuple[int, ...]]) -> None:
    """Raise InputError if a tensor is missing that a model of this configuration has."""
    layers = config["num_hidden_layers"]
    kinds = {name.split(".", 2)[2] for name in shapes if name.startswith("blk.")}
    wanted = [f"blk.{layer}.{kind}" for layer in range(layers) for kind in sorted(kinds)] + ["token_embd.weight"]
    wanted += [] if config["tie_word_embeddings"] else ["output.weight"]
    missing = [name for name in wanted if name not in shapes]
    if missing or not kinds:
        raise InputError(
            f"{folder} has no weights for {missing[0] if missing else 'its layers'} ({len(missing)} tensors missing)"
        )
    rows = shapes["token_embd.weight"][0]
    if rows != config["vocab_size"]:
        raise InputError(f"{folder}: config.json says {config['vocab_size']} tokens, the embedding has {rows} rows")
