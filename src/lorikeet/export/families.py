"""The architectures that can be written as GGUF: what llama.cpp computes for each, and what it must be told.

    family, config = read_family(folder)
    add_metadata(writer, family, config)

llama.cpp fixes much of an architecture in its code: activations, how queries are scaled, which layers look back how
far. A model that differs there is refused, because it would run and answer otherwise than it was trained to.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import MODEL_ARCH, GGUFWriter, RopeScalingType
from gguf.constants import MODEL_ARCH_NAMES
from numpy.typing import NDArray

from lorikeet.errors import InputError

SLIDING, FULL = "sliding_attention", "full_attention"
"""The kinds of layers in a configuration's `layer_types`."""


@dataclass(frozen=True, slots=True)
class Family:
    """How one Hugging Face architecture is written, and what llama.cpp takes for granted of it."""

    arch: MODEL_ARCH
    activations: tuple[str, ...] = ("silu",)
    """What `hidden_act` may say."""
    permuted: bool = False
    """Whether q and k rows are reordered: llama.cpp rotates neighbouring pairs in this architecture."""
    norm_shift: float = 0.0
    """What is added to the weights of norms: Gemma's multiply by one more than they hold."""
    always_tied: bool = False
    """Whether the output matrix is always the embedding."""
    window_every: int = 0
    """Of so many layers all but the last look back a window only; 0 where llama.cpp knows no windows."""
    scaled_by_width: int = 0
    """The number of layers of the one size whose queries are scaled by width / heads, not by the head's own width."""

    @property
    def name(self) -> str:
        """llama.cpp's name of the architecture, the prefix of its metadata."""
        return str(MODEL_ARCH_NAMES[self.arch])


_GELU = ("gelu_pytorch_tanh", "gelu")
FAMILIES = {
    "LlamaForCausalLM": Family(MODEL_ARCH.LLAMA, permuted=True),
    "MistralForCausalLM": Family(MODEL_ARCH.LLAMA, permuted=True),
    "Qwen2ForCausalLM": Family(MODEL_ARCH.QWEN2),
    "Qwen3ForCausalLM": Family(MODEL_ARCH.QWEN3),
    "GemmaForCausalLM": Family(MODEL_ARCH.GEMMA, _GELU, norm_shift=1.0, always_tied=True),
    "Gemma2ForCausalLM": Family(
        MODEL_ARCH.GEMMA2, _GELU[:1], norm_shift=1.0, always_tied=True, window_every=2, scaled_by_width=46
    ),
    "Gemma3ForCausalLM": Family(
        MODEL_ARCH.GEMMA3, _GELU[:1], norm_shift=1.0, always_tied=True, window_every=6, scaled_by_width=62
    ),
}


def read_family(folder: Path) -> tuple[Family, dict[str, Any]]:
    """Return the family of the model in `folder` and its configuration, with what config.json leaves to defaults.

    Raises InputError for an architecture that is not known here, or one that llama.cpp would compute otherwise.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    written = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (written.get("architectures") or ["none"])[0]
    if architecture not in FAMILIES:
        raise InputError(f"{folder}: {architecture} cannot be written as GGUF here; known are {', '.join(FAMILIES)}")
    try:
        config: dict[str, Any] = AutoConfig.from_pretrained(folder, local_files_only=True).to_dict()
    except (ValueError, KeyError, TypeError, StrictDataclassError) as error:
        why = str(error.__cause__ or error).splitlines()[0]
        raise InputError(f"{folder / 'config.json'} cannot be read: {why}") from error
    family = FAMILIES[architecture]
    for what, given, taken in _taken_for_granted(family, config):
        if given not in taken:
            raise InputError(
                f"{folder}: {what} is {given}, and llama.cpp computes {family.name} with {' or '.join(map(str, taken))}"
            )
    return family, config


def _taken_for_granted(family: Family, config: dict[str, Any]) -> list[tuple[str, Any, tuple[Any, ...]]]:
    """Return what llama.cpp fixes in its code: what it is called, what this model has, what it must be."""
    rope = rope_of(config, FULL)
    facts: list[tuple[str, Any, tuple[Any, ...]]] = [
        ("hidden_act", config.get("hidden_activation") or config.get("hidden_act"), family.activations),
        ("rope_type", rope["rope_type"], ("default", "llama3", "linear", "yarn")),
        ("partial_rotary_factor", rope.get("partial_rotary_factor") or 1.0, (1.0,)),
    ]
    if family.always_tied:
        facts.append(("tie_word_embeddings", config["tie_word_embeddings"], (True,)))
    if family.window_every:
        layers, width = config["num_hidden_layers"], head_width(config)
        scale = config["hidden_size"] // config["num_attention_heads"] if layers == family.scaled_by_width else width
        facts.append(("query_pre_attn_scalar", config["query_pre_attn_scalar"], (scale,)))
        facts.append(("use_bidirectional_attention", bool(config.get("use_bidirectional_attention")), (False,)))
    if family.arch == MODEL_ARCH.GEMMA2:
        facts.append(("attn_logit_softcapping", bool(config["attn_logit_softcapping"]), (True,)))
        facts.append(("final_logit_softcapping", bool(config["final_logit_softcapping"]), (True,)))
    if family.arch == MODEL_ARCH.GEMMA3:
        facts.append(("attn_logit_softcapping", config["attn_logit_softcapping"], (None,)))
        facts.append(("rope_type of sliding layers", rope_of(config, SLIDING)["rope_type"], ("default",)))
    return facts


def head_width(config: dict[str, Any]) -> int:
    """Return the width of an attention head."""
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def rope_of(config: dict[str, Any], layers: str) -> dict[str, Any]:
    """Return the rotary settings of a kind of layers, with `rope_type` and `rope_theta`."""
    rope = config["rope_parameters"]
    return dict(rope.get(layers, rope))


def rotary_factors(config: dict[str, Any]) -> NDArray[np.float32] | None:
    """Return what each rotary frequency is divided by, shape (head width / 2,), for Llama 3's scaling; None without it.

    The formula is Meta's, of the Llama 3.1 release: long wavelengths are stretched by `factor`, short ones kept, and
    those between are blended.
    """
    rope = rope_of(config, FULL)
    if rope["rope_type"] != "llama3":
        return None
    width = head_width(config)
    frequencies = 1.0 / (rope["rope_theta"] ** (np.arange(0, width, 2, dtype=np.float64) / width))
    wavelengths = 2 * np.pi / frequencies
    low, high, factor = rope["low_freq_factor"], rope["high_freq_factor"], rope["factor"]
    turns = rope["original_max_position_embeddings"] / wavelengths
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    factors: NDArray[np.float32] = (1.0 / ((1 - smooth) / factor + smooth)).astype(np.float32)
    return factors


def add_metadata(writer: GGUFWriter, family: Family, config: dict[str, Any]) -> None:
    """Write the sizes of the model and how its attention works."""
    heads = config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(_context_length(family, config))
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.get("num_key_value_heads") or heads)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(head_width(config))
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_vocab_size(config["vocab_size"])
    _add_rope(writer, family, config)
    if family.window_every:
        _add_windows(writer, family, config)
    if family.arch == MODEL_ARCH.GEMMA2:
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
    if config.get("final_logit_softcapping"):
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])


def _context_length(family: Family, config: dict[str, Any]) -> int:
    """Return how long a text may be; where llama.cpp knows no windows, no longer than a window of the model's."""
    longest = int(config["max_position_embeddings"])
    windowed = config.get("sliding_window") and SLIDING in (config.get("layer_types") or [SLIDING])
    return min(longest, config["sliding_window"]) if windowed and not family.window_every else longest


def _add_rope(writer: GGUFWriter, family: Family, config: dict[str, Any]) -> None:
    rope = rope_of(config, FULL)
    writer.add_rope_freq_base(rope["rope_theta"])
    if family.arch == MODEL_ARCH.GEMMA3:
        writer.add_rope_freq_base_swa(rope_of(config, SLIDING)["rope_theta"])
    if rope["rope_type"] not in {"linear", "yarn"}:
        return
    writer.add_rope_scaling_type(RopeScalingType(rope["rope_type"]))
    writer.add_rope_scaling_factor(rope["factor"])
    if rope["rope_type"] == "yarn":
        writer.add_rope_scaling_orig_ctx_len(rope["original_max_position_embeddings"])


def _add_windows(writer: GGUFWriter, family: Family, config: dict[str, Any]) -> None:
    """Write the window, and which layers have one unless it is llama.cpp's own pattern."""
    writer.add_sliding_window(config["sliding_window"])
    windowed = [kind == SLIDING for kind in config["layer_types"]]
    if windowed != [(layer + 1) % family.window_every != 0 for layer in range(len(windowed))]:
        writer.add_sliding_window_pattern(windowed)
