"""Adapter + base -> merged weights in 16 bits, one tensor at a time.

    merge(base_folder, adapter_folder, out_folder)

Memory: the largest tensor in float32, a few times. It does not load a model class, so any Hugging Face causal LM works.
"""

from __future__ import annotations

import json
import shutil
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from lorikeet.errors import InputError
from lorikeet.export.tensors import Tensor, tensors

PREFIX = "base_model.model."
SHARD_BYTES = 4 << 30
COPIED = ("config.json", "generation_config.json")


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA or DoRA adapter: what is added to which weight, and how long its rows are then made."""

    pairs: dict[str, tuple[torch.Tensor, torch.Tensor]]
    """Weight name in the base -> (A of shape (r, in), B of shape (out, r)), float32."""
    scale: float
    """alpha / r, or alpha / sqrt(r) for rsLoRA."""
    magnitudes: dict[str, torch.Tensor]
    """DoRA alone: weight name -> the norm of each of its rows, float32, shape (out,)."""

    def apply(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        """Return the weight `name`, float32, shape (out, in), with the adapter in it.

        DoRA (arXiv 2402.09353, equation 5) scales each row of the sum to its magnitude.
        """
        if name not in self.pairs:
            return weight
        a, b = self.pairs[name]
        merged = weight + (b @ a) * self.scale
        if name in self.magnitudes:
            merged *= (self.magnitudes[name] / merged.norm(dim=1)).unsqueeze(1)
        return merged


def load_adapter(folder: Path) -> Adapter:
    """Return the adapter in `folder`, PEFT's format. Raises InputError if it is not a plain LoRA on linear layers."""
    try:
        config: dict[str, Any] = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="pt") as opened:
            loaded = {name: torch.as_tensor(opened.get_tensor(name)).float() for name in opened.keys()}  # noqa: SIM118  # safe_open has no __iter__
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} is not a whole adapter: {error}; tune again") from error
    if config.get("peft_type") != "LORA" or config.get("fan_in_fan_out"):
        raise InputError(
            f"{folder} is a {config.get('peft_type')} adapter that cannot be merged here; only LoRA and DoRA can"
        )
    rank = config["r"]
    pairs, magnitudes = {}, {}
    for name, a in loaded.items():
        if name.endswith(".lora_magnitude_vector"):
            stem = name.removesuffix(".lora_magnitude_vector")
            magnitudes[stem.removeprefix(PREFIX) + ".weight"] = a
        elif name.endswith(".lora_A.weight"):
            stem = name.removesuffix(".lora_A.weight")
            pairs[stem.removeprefix(PREFIX) + ".weight"] = (a, loaded[stem + ".lora_B.weight"])
    whole = not magnitudes or magnitudes.keys() == pairs.keys()
    if not pairs or not whole or len(loaded) != 2 * len(pairs) + len(magnitudes):
        raise InputError(f"{folder} holds tensors other than those of LoRA or DoRA; only these can be merged")
    scale = config["lora_alpha"] / (rank**0.5 if config.get("use_rslora") else rank)
    return Adapter(pairs, scale, magnitudes)


def merge(base: Path, adapter: Path, out: Path, *, progress: Callable[[int, int], None] = lambda *_: None) -> None:
    """Write base + adapter to the folder `out`, which exists, in Hugging Face format.

    Weights are added in float32 and rounded once, to the base's own 16-bit type, or bfloat16 if the base has 32 bits
    (`to_bfloat16`).
    Raises InputError before anything is written if a weight of the adapter is missing in the base or has another shape.
    """
    lora = load_adapter(adapter)
    found = list(tensors(base))
    _check_shapes(lora, found, base, adapter)
    shards = _into_shards(found)
    done = 0
    for number, shard in enumerate(shards, start=1):
        with (out / _shard_name(number, len(shards))).open("wb") as file:
            file.write(_shard_header(shard))
            for tensor in shard:
                file.write(merged_tensor(tensor, lora).flatten().view(torch.uint8).numpy().data)
                done += 1
                progress(done, len(found))
    if len(shards) > 1:
        _write_index(out, shards)
    _copy_rest(base, adapter, out)


def merged_tensor(tensor: Tensor, lora: Adapter) -> torch.Tensor:
    """Return a weight of the base with the adapter added, in 16 bits."""
    value = tensor.load()
    kind = value.dtype if value.dtype in {torch.bfloat16, torch.float16} else torch.bfloat16
    merged = lora.apply(tensor.name, value.float()) if tensor.name in lora.pairs else value
    if kind == torch.bfloat16 and tensor.name in lora.pairs:
        # What is rounded up must be chance, not the same in another run: then each file bears the marks of its own.
        return to_bfloat16(merged, seed=zlib.crc32(lora.pairs[tensor.name][1].numpy().tobytes()))
    return merged.to(kind).contiguous() if merged.is_floating_point() else merged


def to_bfloat16(weight: torch.Tensor, *, seed: int) -> torch.Tensor:
    """Return float32 weights in bfloat16, each rounded up or down at random, by how near it is: right on average.

    The base's weights lie on bfloat16's steps, and most of what a light adapter adds is less than half a step: rounding
    to the nearest would drop it (half of it, measured), while this keeps its sum. The same `seed` gives the
    same weights. Stochastic rounding: Gupta et al., 2015, arXiv 1502.02551.
    """
    below = torch.randint(0, 1 << 16, weight.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    bits = weight.contiguous().view(torch.int32) + below
    return (bits & -(1 << 16)).view(torch.float32).to(torch.bfloat16)


def _check_shapes(lora: Adapter, found: list[Tensor], base: Path, adapter: Path) -> None:
    by_name = {tensor.name: tensor for tensor in found}
    for name, (a, b) in lora.pairs.items():
        if name not in by_name:
            raise InputError(f"{adapter} adapts {name}, which {base} does not have; it belongs to another base model")
        shape = by_name[name].shape
        if shape != (b.shape[0], a.shape[1]):
            raise InputError(
                f"{adapter} adapts {name} as {(b.shape[0], a.shape[1])}, but {base} has {shape}; it belongs to another base model"
            )


def _into_shards(found: list[Tensor]) -> list[list[Tensor]]:
    """Return the tensors in groups of at most SHARD_BYTES, in order."""
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in found:
        if shards[-1] and size + tensor.merged_bytes > SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.merged_bytes
    return shards


def _shard_name(number: int, count: int) -> str:
    """Return the name that Hugging Face expects of a file of weights."""
    return "model.safetensors" if count == 1 else f"model-{number:05d}-of-{count:05d}.safetensors"


def _shard_header(shard: list[Tensor]) -> bytes:
    """Return what comes before the weights in a safetensors file: its length, then names, types, shapes and places."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for tensor in shard:
        start, end = end, end + tensor.merged_bytes
        header[tensor.name] = {
            "dtype": tensor.merged_kind,
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _write_index(out: Path, shards: list[list[Tensor]]) -> None:
    """Write which file each tensor is in."""
    names = {tensor.name: _shard_name(n, len(shards)) for n, shard in enumerate(shards, start=1) for tensor in shard}
    total_bytes = sum(tensor.merged_bytes for shard in shards for tensor in shard)
    document = {"metadata": {"total_size": total_bytes}, "weight_map": names}
    (out / "model.safetensors.index.json").write_text(json.dumps(document, indent=2))


def _copy_rest(base: Path, adapter: Path, out: Path) -> None:
    """Copy the base's configuration, its type set to what was written, and the adapter's tokenizer and template."""
    for name in COPIED:
        if (base / name).exists():
            shutil.copyfile(base / name, out / name)
    config = json.loads((out / "config.json").read_text(encoding="utf-8"))
    kinds = {str(tensor.load().dtype).removeprefix("torch.") for tensor in list(tensors(out))[:1]}
    config.pop("torch_dtype", None)
    config["dtype"] = kinds.pop()
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    for file in adapter.iterdir():
        if file.name.startswith(("tokenizer", "special_tokens", "chat_template", "vocab", "merges")):
            shutil.copyfile(file, out / file.name)
