"""The tensors of a Hugging Face folder, each read when it is asked for, into memory of its own.

    for tensor in tensors(folder):
        tensor.load()

Files are read, not mapped: a process whose address space is limited has no room for a mapping of a whole model, and the
library's own reader makes two.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open

from lorikeet.errors import InputError

TYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the names that safetensors gives them."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in a file, not yet read."""

    name: str
    file: Path
    shape: tuple[int, ...]
    kind: str
    """Its type, one of TYPES."""
    begin: int
    """Where its first byte lies in the file."""

    def load(self, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return it, or its rows from `start` to before `stop`, in the type it is stored in."""
        first, end, _ = slice(start, stop).indices(self.shape[0]) if self.shape else (0, 1, 1)
        shape = (max(0, end - first), *self.shape[1:]) if self.shape else ()
        data = torch.empty(shape, dtype=TYPES[self.kind])
        row = math.prod(self.shape[1:]) * data.itemsize
        if data.numel():
            into = data.view(-1).view(torch.uint8).numpy()
            with self.file.open("rb") as opened:
                opened.seek(self.begin + first * row)
                if opened.readinto(into.data) != into.nbytes:
                    raise InputError(f"{self.file} ends inside {self.name}; make it again")
        return data

    @property
    def merged_kind(self) -> str:
        """Its type once merged: 16 bits for every float."""
        return "BF16" if self.kind in {"F32", "F64"} else self.kind

    @property
    def merged_bytes(self) -> int:
        """Its size once merged."""
        return math.prod(self.shape) * TYPES[self.merged_kind].itemsize

    @property
    def module(self) -> str:
        """Last name of the module that it belongs to, such as `q_proj`."""
        return self.name.split(".")[-2]


def tensors(folder: Path) -> Iterator[Tensor]:
    """Yield the tensors of a Hugging Face folder, in the order of its files.

    Raises OSError or safetensors.SafetensorError for a file that is damaged, InputError for a type that cannot be computed with.
    """
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as opened:  # it checks the header, and that it describes the whole file
            names = list(opened.keys())
        with file.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
        for name in names:
            entry = header[name]
            if entry["dtype"] not in TYPES:
                raise InputError(
                    f"{file}: {name} is stored as {entry['dtype']}; only {', '.join(TYPES)} can be exported"
                )
            yield Tensor(name, file, tuple(entry["shape"]), entry["dtype"], 8 + length + entry["data_offsets"][0])
