"""The header of a GGUF file, read strictly and without loading weights.

    header = read_header(path)          # header.metadata, header.tensors
    header.special_tokens()

A file from elsewhere reaches llama.cpp only after this has accepted it: every count, length and offset is checked
against the file's size, so a truncated or hostile one is refused in one line. The format is GGUF version 2 and 3, as
documented in ggml's `docs/gguf.md`.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorikeet.errors import InputError

CONTROL_TOKEN = 3
"""The token type of special tokens, `LLAMA_TOKEN_TYPE_CONTROL`."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_MOST_TENSORS, _MOST_PAIRS, _MOST_DIMENSIONS = 1 << 16, 1 << 16, 4


class _DamageError(Exception):
    """What is wrong with the file."""


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself."""

    metadata: dict[str, Any]
    tensors: dict[str, tuple[int, ...]]
    """Name -> shape, the fastest dimension first."""

    def special_tokens(self) -> list[str]:
        """Return the texts of the special tokens."""
        tokens = self.metadata.get("tokenizer.ggml.tokens", [])
        types = self.metadata.get("tokenizer.ggml.token_type", [])
        return [token for token, kind in zip(tokens, types, strict=False) if kind == CONTROL_TOKEN]


def read_header(path: Path) -> Header:
    """Return the header of the language model at `path`. Raises InputError, saying what is wrong, if it is not one."""
    from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

    if not path.is_file():
        raise InputError(f"{path} is not there; name a GGUF file, a run folder or a model")
    size = path.stat().st_size
    with path.open("rb") as file:
        if file.read(4) != b"GGUF":
            raise InputError(f"{path} is not a GGUF file (it does not begin with GGUF); make one with: lorikeet export")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            reader = _Reader(data)
            try:
                metadata, tensors, placed = reader.header()
                alignment = metadata.get("general.alignment", 32)
                if not isinstance(alignment, int) or not 8 <= alignment <= 4096:
                    raise _DamageError(f"alignment {alignment}")
                start = -(-reader.place // alignment) * alignment
                for name, (kind, offset) in placed.items():
                    block, width = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
                    count = 1
                    for extent in tensors[name]:
                        count *= extent
                    end = start + offset + count // block * width
                    if end > size:
                        raise _DamageError(f"{name} ends at byte {end} of {size}")
            except (_DamageError, struct.error, ValueError, KeyError, IndexError) as error:
                raise InputError(f"{path} is damaged or truncated ({error}); fetch or export it again") from error
    if not tensors or not isinstance(metadata.get("tokenizer.ggml.tokens"), list):
        raise InputError(f"{path} holds no language model (no tensors or no vocabulary); export it again")
    types = metadata.get("tokenizer.ggml.token_type", [])
    if not all(isinstance(token, str) for token in metadata["tokenizer.ggml.tokens"]) or not isinstance(types, list):
        raise InputError(
            f"{path} is damaged (its tokens are no texts, or have no list of types); fetch or export it again"
        )
    return Header(metadata, tensors)


class _Reader:
    """Reads values in their order."""

    def __init__(self, data: mmap.mmap) -> None:
        self.data = data
        self.place = 4

    def header(self) -> tuple[dict[str, Any], dict[str, tuple[int, ...]], dict[str, tuple[int, int]]]:
        """Return metadata, shapes by tensor, and (type, offset) by tensor."""
        (version,) = self._unpack("I")
        if version not in {2, 3}:
            raise _DamageError(f"version {version}")
        tensor_count, pair_count = self._unpack("QQ")
        if tensor_count > _MOST_TENSORS or pair_count > _MOST_PAIRS:
            raise _DamageError(f"{tensor_count} tensors and {pair_count} metadata pairs")
        metadata = {}
        for _ in range(pair_count):
            key = self._string()
            (kind,) = self._unpack("I")
            metadata[key] = self._value(kind, depth=0)
        shapes: dict[str, tuple[int, ...]] = {}
        placed = {}
        for _ in range(tensor_count):
            name = self._string()
            (dimensions,) = self._unpack("I")
            if not 1 <= dimensions <= _MOST_DIMENSIONS or name in shapes:
                raise _DamageError(f"tensor {name[:40]!r}")
            shapes[name] = self._unpack("Q" * dimensions)
            placed[name] = self._unpack("IQ")
        return metadata, shapes, placed

    def _unpack(self, form: str) -> Any:
        values = struct.unpack_from("<" + form, self.data, self.place)
        self.place += struct.calcsize("<" + form)
        return values

    def _string(self) -> str:
        (length,) = self._unpack("Q")
        end = self.place + length
        if end > len(self.data):
            raise _DamageError(f"a text of {length} bytes")
        text = self.data[self.place : end].decode("utf-8", "replace")
        self.place = end
        return text

    def _value(self, kind: int, *, depth: int) -> Any:
        if kind in _SCALARS:
            return self._unpack(_SCALARS[kind])[0]
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY or depth > 1:
            raise _DamageError(f"value type {kind}")
        item, count = self._unpack("IQ")
        if count > len(self.data):
            raise _DamageError(f"an array of {count}")
        if item in _SCALARS:
            return list(self._unpack(f"{count}{_SCALARS[item]}"))
        return [self._value(item, depth=depth + 1) for _ in range(count)]
