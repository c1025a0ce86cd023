"""What the files of a run hold, read without running a model: weights, headers, vocabularies, templates.

    compare_weights(path, base, merged, adapted)        # each tensor of a GGUF file against the merged weights

Tensors are decoded by the `gguf` package's own reader, a few rows at a time. What a file should hold is worked out here
from the base and the configuration, apart from the code that writes it; only `changed_blocks` asks that code again.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, quants
from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType
from numpy.typing import NDArray
from safetensors import safe_open

from lorikeet.export.imatrix import Importance
from lorikeet.export.quantize import KINDS, quantize
from lorikeet.export.tensors import tensors
from lorikeet.export.vocabulary import end_of_turn, pre_tokenizer
from lorikeet.gguf_header import CONTROL_TOKEN, Header
from lorikeet.prompt import PromptFormat

Floats = NDArray[np.float32]

CHUNK_VALUES = 1 << 22
"""Values compared at once: 16 MB in float32, a few times."""

BLOCK_ROWS = 16
"""Rows of each adapted weight that are rounded again: some hundred thousand blocks of a small model, in a second."""

ROW_ERROR_LIMITS = {
    GGMLQuantizationType.F32: 1e-6,
    GGMLQuantizationType.F16: 2**-11,
    GGMLQuantizationType.BF16: 2**-8,
    GGMLQuantizationType.Q8_0: 0.02,
    GGMLQuantizationType.Q6_K: 0.2,
    GGMLQuantizationType.Q5_K: 0.25,
    GGMLQuantizationType.Q5_0: 0.25,
    GGMLQuantizationType.Q5_1: 0.25,
    GGMLQuantizationType.Q4_K: 0.4,
    GGMLQuantizationType.Q4_0: 0.4,
    GGMLQuantizationType.Q4_1: 0.4,
}
"""Largest relative error (RMS of the error over RMS of the row) of any row of a tensor, by the type it is stored in."""

SAME_CONFIG = frozenset({"dtype", "torch_dtype", "transformers_version", "_name_or_path"})
"""Keys of config.json that may differ between base and merged."""


class Weights(Mapping[str, Any]):
    """The tensors of a Hugging Face folder by name, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """List the tensors in the safetensors files of `folder`; raises what `tensors` does."""
        self._tensors = {tensor.name: tensor for tensor in tensors(folder)}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return a tensor in the type it is stored in."""
        return self._tensors[name].load()

    def __contains__(self, name: object) -> bool:
        """Return whether there is a tensor of this name, without reading it."""
        return name in self._tensors

    def __iter__(self) -> Iterator[str]:
        """Yield the names in order."""
        return iter(sorted(self._tensors))

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape without reading it."""
        return self._tensors[name].shape


@dataclass(frozen=True, slots=True)
class Model:
    """A Hugging Face model folder."""

    folder: Path
    config: dict[str, Any]
    """config.json with the defaults of its class filled in."""
    weights: Weights

    @classmethod
    def open(cls, folder: Path) -> Model:
        """Return the model in `folder`; raises OSError or ValueError if it is none."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
        return cls(folder, config, Weights(folder))

    @property
    def tied(self) -> bool:
        """Whether head and token embedding are one matrix, as the configuration says."""
        return bool(self.config.get("tie_word_embeddings"))

    @property
    def head_width(self) -> int:
        """Width of an attention head."""
        return int(self.config.get("head_dim") or self.config["hidden_size"] // self.config["num_attention_heads"])

    def stop_ids(self) -> set[int]:
        """Return the tokens at which generation with transformers ends."""
        path = self.folder / "generation_config.json"
        generation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        ids = generation.get("eos_token_id", self.config.get("eos_token_id"))
        return set(ids) if isinstance(ids, list) else {ids} if isinstance(ids, int) else set()


def changed_settings(base: Path, merged: Path) -> list[str]:
    """Return what differs between the configurations of base and merged, but for the type of the weights."""
    changed: list[str] = []
    for file in ("config.json", "generation_config.json"):
        before, after = (json.loads(p.read_text()) if (p := f / file).is_file() else {} for f in (base, merged))
        changed += [
            f"merged/{file}: {key} is {after.get(key)!r}, the base has {before.get(key)!r}"
            for key in sorted((before.keys() | after.keys()) - SAME_CONFIG)
            if before.get(key) != after.get(key)
        ]
    return changed


def changed_weights(base: Weights, merged: Weights, adapted: set[str]) -> list[str]:
    """Return the tensors that the adapter does not touch and that are not the base's, rounded to 16 bits, bit for bit."""
    wrong = [f"merged has no {name}" for name in base if name not in merged]
    wrong += [f"merged has {name}, which the base has not" for name in merged if name not in base]
    for name in base:
        if name in adapted or name not in merged:
            continue
        after = merged[name]
        if not torch.equal(base[name].to(after.dtype), after):
            wrong.append(f"merged: {name} is not the base's")
    return wrong


def checkpoint_faults(checkpoint: Path, adapter: Path, *, grown: bool) -> list[str]:
    """Return the tensors of the file `adapter` that are not those of the checkpoint that it was written from.

    With `grown` (PiSSA) the file holds more rows of A and columns of B: what the adapter began with, after what was tuned.
    """
    with safe_open(checkpoint, framework="pt") as before, safe_open(adapter, framework="pt") as after:
        saved = {_saved_name(name): before.get_tensor(name) for name in before.keys()}  # noqa: SIM118  # safe_open has no __iter__
        found = set(after.keys())
        if saved.keys() != found:
            return [f"adapter: {name} is not in both it and its checkpoint" for name in sorted(saved.keys() ^ found)]
        return [
            f"adapter: {name} is not what the best checkpoint holds"
            for name in sorted(found)
            if not _is_saved(after.get_tensor(name), saved[name], grown=grown)
        ]


def _is_saved(found: torch.Tensor, saved: torch.Tensor, *, grown: bool) -> bool:
    if grown:
        found = found[tuple(slice(length) for length in saved.shape)]
    return torch.equal(found, saved.to(found.dtype))


def _saved_name(name: str) -> str:
    """Return PEFT's name in a file for a parameter's name in the model."""
    bare = name.replace(".default", "")
    return bare.removesuffix(".weight") if bare.endswith("lora_magnitude_vector.weight") else bare


def head_faults(base: Model, merged: Model | None, headers: Mapping[str, Header]) -> list[str]:
    """Return each file whose head and embedding are tied where the base's are not, or the other way."""
    faults = []
    if merged is not None:
        if merged.tied != base.tied:
            faults.append(f"merged/config.json ties the head: {merged.tied}; the base: {base.tied}")
        elif base.tied and "lm_head.weight" in merged.weights and "lm_head.weight" not in base.weights:
            faults.append("merged has an lm_head.weight of its own; the base's head is its embedding")
    for name, header in headers.items():
        if ("output.weight" in header.tensors) == base.tied:
            faults.append(
                f"{name} has {'an' if base.tied else 'no'} output.weight; the base's head is tied: {base.tied}"
            )
    return faults


def header_faults(header: Header, model: Model, quant: str) -> list[str]:
    """Return the settings of a GGUF file that are not those of `model`'s configuration, and those it does not call for."""
    metadata, arch = header.metadata, str(header.metadata.get("general.architecture"))
    expected = {key.format(arch=arch): wanted for key, wanted in _expected_header(model, quant, arch).items()}
    faults = [] if arch in _architectures() else [f"general.architecture is {arch}, which llama.cpp does not know"]
    for key, wanted in expected.items():
        found = metadata.get(key)
        if found is None and not key.endswith(OPTIONAL):
            faults.append(f"{key} is missing; it should be {wanted}")
        elif found is not None and not _equal(found, wanted):
            faults.append(f"{key} is {found}; it should be {wanted}")
    known = expected.keys() | TOKENIZER_KEYS
    strangers = [key for key in metadata if key.startswith((f"{arch}.", *STEERING)) and key not in known]
    return [*faults, *(f"{key} is not called for; it is {str(metadata[key])[:40]}" for key in strangers)]


OPTIONAL = (
    *("vocab_size", "key_length", "value_length", "dimension_count", "sliding_window", "sliding_window_pattern"),
    *("file_type", "softcapping", "freq_base_swa"),
)
"""Settings that llama.cpp can do without; if a file has them they must be right."""

STEERING = ("general.sampling.", "tokenizer.")
"""Beside the architecture's own, keys with these starts change what a file answers."""

TOKENIZER_KEYS = frozenset(
    {"tokenizer.chat_template"}
    | {f"tokenizer.ggml.{key}" for key in ("model", "pre", "tokens", "token_type", "scores", "merges")}
    | {f"tokenizer.ggml.{role}_token_id" for role in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    | {f"tokenizer.ggml.add_{what}" for what in ("bos_token", "eos_token", "space_prefix")}
)
"""What a file may say of its tokenizer; what it says is compared with the tokenizer and by the tokens that it gives."""


def _expected_header(model: Model, quant: str, arch: str) -> dict[str, Any]:
    """Return GGUF keys and values for a Hugging Face configuration, in llama.cpp's architecture `arch`."""
    from gguf import LlamaFileType

    config = model.config
    expected = {
        "{arch}.context_length": _longest_context(config, arch),
        "{arch}.embedding_length": config["hidden_size"],
        "{arch}.block_count": config["num_hidden_layers"],
        "{arch}.feed_forward_length": config["intermediate_size"],
        "{arch}.attention.head_count": config["num_attention_heads"],
        "{arch}.attention.head_count_kv": config.get("num_key_value_heads") or config["num_attention_heads"],
        "{arch}.attention.layer_norm_rms_epsilon": config["rms_norm_eps"],
        "{arch}.attention.key_length": model.head_width,
        "{arch}.attention.value_length": model.head_width,
        "{arch}.rope.dimension_count": model.head_width,
        "{arch}.vocab_size": config["vocab_size"],
        "general.file_type": int(LlamaFileType[f"MOSTLY_{quant.upper()}"]),
        **_expected_rope(config),
    }
    if arch in WINDOWED and config.get("sliding_window"):
        expected["{arch}.attention.sliding_window"] = config["sliding_window"]
        expected["{arch}.attention.sliding_window_pattern"] = [k == "sliding_attention" for k in config["layer_types"]]
    if config.get("final_logit_softcapping"):
        expected["{arch}.final_logit_softcapping"] = config["final_logit_softcapping"]
    if arch == "gemma2":
        expected["{arch}.attn_logit_softcapping"] = config["attn_logit_softcapping"]
    return expected


WINDOWED = ("gemma2", "gemma3")
"""llama.cpp's architectures of which some layers look back a window only."""


def _longest_context(config: Mapping[str, Any], arch: str) -> int:
    """Return how long a text may be: no longer than a window where llama.cpp would look back further."""
    longest, window = int(config["max_position_embeddings"]), config.get("sliding_window")
    sliding = "sliding_attention" in (config.get("layer_types") or ["sliding_attention"])
    return min(longest, int(window)) if window and sliding and arch not in WINDOWED else longest


def _expected_rope(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the rotary settings; those of Llama 3 are a tensor, `rope_freqs.weight`."""
    kinds = config.get("rope_parameters") or {}
    rope = kinds.get("full_attention", kinds)
    expected = {"{arch}.rope.freq_base": rope.get("rope_theta") or config.get("rope_theta") or 10_000.0}
    if "sliding_attention" in kinds:
        expected["{arch}.rope.freq_base_swa"] = kinds["sliding_attention"]["rope_theta"]
    if rope.get("rope_type") in {"linear", "yarn"}:
        expected["{arch}.rope.scaling.type"] = rope["rope_type"]
        expected["{arch}.rope.scaling.factor"] = rope["factor"]
    if rope.get("rope_type") == "yarn":
        expected["{arch}.rope.scaling.original_context_length"] = rope["original_max_position_embeddings"]
    return expected


def _equal(found: Any, wanted: Any) -> bool:
    if isinstance(wanted, float) or isinstance(found, float):
        return math.isclose(float(found), float(wanted), rel_tol=1e-6)
    return bool(found == wanted)


def vocabulary_faults(header: Header, prompt: PromptFormat) -> list[str]:
    """Return how the tokens of a GGUF file differ, id by id, from those of the base's tokenizer."""
    tokenizer, metadata = prompt.tokenizer, header.metadata
    tokens = metadata["tokenizer.ggml.tokens"]
    types = metadata.get("tokenizer.ggml.token_type", [])
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    by_id |= {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    faults = []
    if by_id and max(by_id) >= len(tokens):
        faults.append(f"{len(tokens)} tokens; the tokenizer has ids up to {max(by_id)}")
    wrong = [i for i, token in by_id.items() if i < len(tokens) and tokens[i] != token]
    if wrong:
        first = min(wrong)
        faults.append(f"{len(wrong)} tokens differ, the first is {first}: {tokens[first]!r}, not {by_id[first]!r}")
    control = {index for index, kind in enumerate(types) if kind == CONTROL_TOKEN} & by_id.keys()
    if control != prompt.special_ids:
        faults.append(f"special tokens are {sorted(control)[:8]}, not {sorted(prompt.special_ids)[:8]}")
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    faults += _merge_faults(metadata, backend["model"])
    if metadata.get("tokenizer.ggml.model") == "gpt2":
        wanted = pre_tokenizer(backend, Path(str(tokenizer.name_or_path)))
        if metadata.get("tokenizer.ggml.pre") != wanted:
            faults.append(f"tokenizer.ggml.pre is {metadata.get('tokenizer.ggml.pre')}; it should be {wanted}")
    for role, index in (("bos", tokenizer.bos_token_id), ("eos", tokenizer.eos_token_id)):
        if metadata.get(f"tokenizer.ggml.{role}_token_id") != index:
            faults.append(f"{role}_token_id is {metadata.get(f'tokenizer.ggml.{role}_token_id')}, not {index}")
    ends = prompt.stop_ids | {end_of_turn(prompt)}
    for role in ("eot", "eom"):
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        if index is not None and index not in ends:
            faults.append(f"{role}_token_id is {index}, which ends no answer")
    return faults


def _merge_faults(metadata: dict[str, Any], backend: dict[str, Any]) -> list[str]:
    if "tokenizer.ggml.merges" not in metadata:
        return []
    wanted = [m if isinstance(m, str) else " ".join(m) for m in backend["merges"]]
    return (
        []
        if metadata["tokenizer.ggml.merges"] == wanted
        else ["the merges are not the tokenizer's, or in another order"]
    )


@dataclass(frozen=True, slots=True)
class Comparison:
    """A GGUF file's tensors against the merged weights."""

    faults: list[str]
    """Tensors that are missing, too many, of another shape or of a type not known here."""
    worst: float
    """Largest relative error of a row, as a share of its type's limit."""
    worst_tensor: str
    by_type: dict[str, dict[str, float]]
    """Type -> tensors, bits stored, relative error of all weights (RMS) and of the worst row."""
    kept: float
    """How much of the adapter's change is in the file: 1 for all of it. NaN if the adapter changes nothing."""
    kept_error: float
    """Standard error of `kept` that the rounding alone makes."""


def compare_weights(path: Path, base: Model, merged: Model, adapted: set[str]) -> Comparison:
    """Return how the tensors of the GGUF file `path` compare with `merged`, and how much of merged - base they hold.

    `kept` is the projection of (file - base) on (merged - base), over all adapted weights at once: rounding errors
    average out over millions of weights, so it tells a file of this run from one of another, whatever the type.
    """
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    arch = _architecture(path)
    layout = Layout(arch, merged)
    faults: list[str] = []
    sums: dict[str, _Sums] = {}
    change = _Projection()
    worst, worst_tensor = 0.0, ""
    for name, wanted in layout.sources.items():
        tensor = tensors.pop(name, None)
        if tensor is None or tuple(int(n) for n in reversed(tensor.shape)) != merged.weights.shape(wanted):
            faults.append(f"{name} is {'missing' if tensor is None else 'of another shape'}")
            continue
        if tensor.tensor_type not in ROW_ERROR_LIMITS:
            faults.append(f"{name} is stored as {tensor.tensor_type.name}, a type without a limit here")
            continue
        limit = ROW_ERROR_LIMITS[tensor.tensor_type]
        entry = sums.setdefault(tensor.tensor_type.name, _Sums())
        has_base = wanted in adapted and merged.weights.shape(wanted) == _shape(base.weights, wanted)
        before = layout.rows(wanted, base) if has_base else None
        row = _compare_tensor(tensor, layout.rows(wanted, merged), before, entry, change)
        if not row / limit <= worst:
            worst, worst_tensor = row / limit, f"{name} ({tensor.tensor_type.name}, row error {row:.4f} of {limit})"
    faults += layout.check_rest(tensors)
    by_type = {kind: entry.row() for kind, entry in sums.items()}
    return Comparison(faults, worst, worst_tensor, by_type, *change.result())


def _shape(weights: Weights, name: str) -> tuple[int, ...] | None:
    return weights.shape(name) if name in weights else None


def _architectures() -> dict[str, Any]:
    """Return what the `gguf` package calls each architecture that it knows, by the name that a file has."""
    from gguf import MODEL_ARCH_NAMES

    return {name: arch for arch, name in MODEL_ARCH_NAMES.items()}


def changed_blocks(path: Path, merged: Model, adapted: set[str], importance: Importance | None) -> float:
    """Return the share of a quantised file's blocks that rounding `merged` does not give, byte for byte; NaN for a float file.

    `BLOCK_ROWS` rows of each adapted weight are rounded again, their errors weighed by `importance` as when the file was
    made: the same weights give the same bytes on any machine.
    """
    tensors = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    layout = Layout(_architecture(path), merged)
    changed: list[NDArray[np.bool_]] = []
    for name, wanted in layout.sources.items():
        tensor = tensors.get(name)
        if wanted not in adapted or tensor is None or tensor.tensor_type not in KINDS:
            continue
        rows = layout.rows(wanted, merged)
        if (len(rows), rows.shape[1]) != tuple(int(n) for n in reversed(tensor.shape)):
            return 1.0
        chosen = np.unique(np.linspace(0, len(rows) - 1, BLOCK_ROWS).astype(np.int64))
        weighed = importance.of(name) if importance else None
        packed = quantize(np.ascontiguousarray(rows[chosen]), tensor.tensor_type, importance=weighed)
        block_bytes = GGML_QUANT_SIZES[tensor.tensor_type][1]
        differs = packed != tensor.data.reshape(len(rows), -1)[chosen]
        changed.append(differs.reshape(-1, block_bytes).any(axis=1))
    return float(np.concatenate(changed).mean()) if changed else math.nan


def _architecture(path: Path) -> str:
    from lorikeet.gguf_header import read_header

    return str(read_header(path).metadata["general.architecture"])


def _compare_tensor(tensor: Any, wanted: Floats, before: Floats | None, entry: _Sums, change: _Projection) -> float:
    """Return the largest relative error of a row, and add the tensor to the sums."""
    data = tensor.data.reshape(-1, tensor.data.shape[-1])
    wanted = wanted.reshape(len(data), -1)
    step = max(1, CHUNK_VALUES // wanted.shape[1])
    worst = 0.0
    for start in range(0, len(data), step):
        part = slice(start, start + step)
        decoded = quants.dequantize(data[part], tensor.tensor_type).astype(np.float32, copy=False)
        error = decoded - wanted[part]
        errors = np.einsum("ij,ij->i", error, error)
        norms = np.einsum("ij,ij->i", wanted[part], wanted[part])
        worst = max(worst, float(np.sqrt(errors / np.maximum(norms, 1e-20)).max()))
        entry.add(errors, norms, error.size)
        if before is not None:
            change.add(decoded, before[part], wanted[part], float(errors.sum()) / error.size)
    entry.end(worst, tensor.n_bytes)
    return worst


@dataclass(slots=True)
class _Sums:
    """Errors of the tensors of one type."""

    tensors: int = 0
    values: int = 0
    n_bytes: int = 0
    error: float = 0.0
    norm: float = 0.0
    worst_row: float = 0.0

    def add(self, errors: Floats, norms: Floats, values: int) -> None:
        self.error += float(errors.sum(dtype=np.float64))
        self.norm += float(norms.sum(dtype=np.float64))
        self.values += values

    def end(self, worst_row: float, n_bytes: int) -> None:
        self.tensors += 1
        self.n_bytes += n_bytes
        self.worst_row = max(self.worst_row, worst_row)

    def row(self) -> dict[str, float]:
        return {
            "tensors": self.tensors,
            "bits": round(8 * self.n_bytes / self.values, 2),
            "relative_error": round(math.sqrt(self.error / max(self.norm, 1e-20)), 6),
            "worst_row": round(self.worst_row, 6),
        }


@dataclass(slots=True)
class _Projection:
    """Sums for the projection of what a file changed on what the adapter changed."""

    along: float = 0.0
    size: float = 0.0
    noise: float = 0.0

    def add(self, decoded: Floats, before: Floats, after: Floats, variance: float) -> None:
        change = after - before
        size = float(np.vdot(change, change))
        if size:
            self.along += float(np.vdot(decoded - before, change))
            self.size += size
            self.noise += variance * size

    def result(self) -> tuple[float, float]:
        """Return the projection, 1 if all is there, and its standard error by rounding."""
        if not self.size:
            return math.nan, math.nan
        return self.along / self.size, math.sqrt(self.noise) / self.size


class Layout:
    """Where llama.cpp keeps each tensor of a Hugging Face model, and in what order."""

    def __init__(self, arch: str, model: Model) -> None:
        """Take llama.cpp's name of the architecture and the model."""
        self.arch = arch
        self.model = model

    @cached_property
    def sources(self) -> dict[str, str]:
        """GGUF name -> Hugging Face name. A name without a place maps to itself, so that it is found missing."""
        from gguf import get_tensor_name_map

        names = get_tensor_name_map(_architectures()[self.arch], self.model.config["num_hidden_layers"])
        tied = {"lm_head.weight"} if self.model.tied else set()
        return {
            names.get_name(name, try_suffixes=(".weight", ".bias")) or name: name
            for name in self.model.weights
            if name not in tied
        }

    def rows(self, name: str, model: Model) -> Floats:
        """Return `model`'s tensor `name` as a file keeps it, float32."""
        value = model.weights[name].float().numpy()
        part = name.rsplit(".", 2)[-2]
        if self.arch == "llama" and part in {"q_proj", "k_proj"}:
            return value[self._paired(len(value))]
        if self.arch.startswith("gemma") and part.endswith("norm"):
            return np.asarray(value + 1, dtype=np.float32)
        return np.asarray(value)

    def check_rest(self, tensors: Mapping[str, Any]) -> list[str]:
        """Return what is wrong with tensors that come from no weight: rotary factors, or strangers."""
        wanted = self._rotary_factors()
        faults = [f"{name} belongs to no weight of the model" for name in tensors if name != "rope_freqs.weight"]
        found = tensors.get("rope_freqs.weight")
        if (found is None) != (wanted is None):
            faults.append(f"rope_freqs.weight is {'missing' if found is None else 'not called for'}")
        elif found is not None and wanted is not None and not np.allclose(found.data, wanted, rtol=1e-4):
            faults.append("rope_freqs.weight does not hold the factors of the configuration")
        return faults

    def _paired(self, count: int) -> NDArray[np.int64]:
        """Return which rows of a projection stand where: rotary halves side by side, head after head."""
        width = self.model.head_width
        within = np.stack([np.arange(width // 2), np.arange(width // 2, width)], axis=1).reshape(-1)
        starts = np.arange(0, count, width)[:, None]
        order: NDArray[np.int64] = (starts + within).reshape(-1)
        return order

    def _rotary_factors(self) -> Floats | None:
        """Return transformers' own factors for Llama 3's scaling; None for models without it."""
        rope = self.model.config.get("rope_parameters") or {}
        if rope.get("rope_type") != "llama3":
            return None
        from transformers import AutoConfig
        from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

        config = AutoConfig.from_pretrained(self.model.folder, local_files_only=True)
        scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
        plain = rope["rope_theta"] ** (-np.arange(0, self.model.head_width, 2) / self.model.head_width)
        return np.asarray(plain / scaled.numpy(), dtype=np.float32)
