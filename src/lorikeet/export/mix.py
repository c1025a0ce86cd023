"""Which block type each tensor of a GGUF file gets: llama.cpp's own mixes, tensor for tensor.

    mix = Mix("q4_k_m", arch="llama", layers=30, tied=True, importance=True)
    mix.kind("blk.0.ffn_down.weight", (576, 1536))      # GGMLQuantizationType.Q6_K

The rules are those of llama.cpp's `llama-quantize` for dense models: more bits for the head, and for the values and the
down projections of every third layer and of the first and last eighth. It knows names and shapes, never a weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NamedTuple

from gguf import GGMLQuantizationType as Kind
from gguf import LlamaFileType
from gguf.constants import GGML_QUANT_SIZES

from lorikeet.config import Quant

FLOATS = frozenset({Kind.F32, Kind.F16})


class FileType(NamedTuple):
    """How a file of one `Quant` is made."""

    default: Kind
    """What a tensor gets that no rule names."""
    number: LlamaFileType
    """`general.file_type`."""
    four_bit: bool = False
    """Whether most weights have four bits: an importance matrix is used if there is one."""


FILE_TYPES: dict[Quant, FileType] = {
    "f16": FileType(Kind.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": FileType(Kind.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q6_k": FileType(Kind.Q6_K, LlamaFileType.MOSTLY_Q6_K),
    "q5_k_m": FileType(Kind.Q5_K, LlamaFileType.MOSTLY_Q5_K_M),
    "q4_k_m": FileType(Kind.Q4_K, LlamaFileType.MOSTLY_Q4_K_M, four_bit=True),
    "q4_0": FileType(Kind.Q4_0, LlamaFileType.MOSTLY_Q4_0, four_bit=True),
}

FALLBACKS = {Kind.Q4_K: Kind.Q5_0, Kind.Q5_K: Kind.Q5_1, Kind.Q6_K: Kind.Q8_0}
"""Block of 256 -> block of 32, for rows that 256 does not divide."""

LAYERS_OF_70B = 80
"""A llama of so many layers with grouped heads is Llama 70B to llama.cpp; its few value weights get five bits."""


@dataclass(frozen=True, slots=True)
class Mix:
    """The types of one file's tensors."""

    quant: Quant
    arch: str
    """llama.cpp's name of the architecture."""
    layers: int
    tied: bool
    """Whether the token embeddings are the head as well: no `output.weight`."""
    grouped: bool = False
    """Whether several query heads share a key head."""
    importance: bool = False
    """Whether an importance matrix is used."""

    def kind(self, name: str, shape: tuple[int, ...]) -> Kind:
        """Return the type of the tensor that llama.cpp calls `name`, of `shape` (rows, columns) or (elements,).

        Vectors stay float32; two-dimensional tensors that are no weights, and rows that no block divides, become F16.
        """
        if len(shape) < 2:
            return Kind.F32
        if self.quant == "f16" or not name.endswith(".weight") or name.endswith("_norm.weight"):
            return Kind.F16
        return _that_divides(self._wanted(name, shape[-1]), shape[-1])

    def _wanted(self, name: str, columns: int) -> Kind:
        """Return what llama.cpp would give the tensor if its rows divided."""
        default = FILE_TYPES[self.quant].default
        if name == "output.weight" or (self.tied and name in {"token_embd.weight", "per_layer_token_embd.weight"}):
            divides = columns % GGML_QUANT_SIZES[default][0] == 0
            return Kind.Q6_K if divides and default != Kind.Q8_0 else Kind.Q8_0
        found = re.fullmatch(r"blk\.(\d+)\.(attn_v|attn_qkv|ffn_down)\.weight", name)
        if found is None:
            return default
        layer, down = int(found[1]), found[2] == "ffn_down"
        if self.quant in {"q4_k_m", "q5_k_m"} and _more_bits(layer, self.layers):
            return Kind.Q6_K
        if self.quant == "q4_0" and self.importance and down and layer < self.layers // 8:
            return Kind.Q4_1
        if default == Kind.Q4_K and not down and self._is_70b():
            return Kind.Q5_K
        return default

    def _is_70b(self) -> bool:
        return self.arch == "llama" and self.layers == LAYERS_OF_70B and self.grouped


def _more_bits(layer: int, layers: int) -> bool:
    """Say whether a layer is in the first or last eighth, or every third between."""
    return layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2


def _that_divides(kind: Kind, columns: int) -> Kind:
    """Return `kind`, or the block of 32 nearest to it, or F16, whichever first divides rows of `columns`."""
    for candidate in (kind, FALLBACKS.get(kind, kind)):
        if columns % GGML_QUANT_SIZES[candidate][0] == 0:
            return candidate
    return Kind.F16
