"""The converter beside llama.cpp's own `convert_hf_to_gguf.py`: the same tensors, bytes and metadata?

    python benchmarks/convert.py --reference llama.cpp/convert_hf_to_gguf.py

SmolLM2 itself, and small random models of each family with SmolLM2's tokenizer, are written by both as f16. Every
tensor is compared by name, shape, type and bytes, every metadata key by value. The reference runs with this Python and
imports `sentencepiece`, which must be on PYTHONPATH. Gemma 1 and 2, which it converts only from a SentencePiece file, are
left to the tests.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import stamp
from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING, AutoTokenizer

from lorikeet.export.gguf import write_gguf
from lorikeet.weights import resolve_model

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500_000.0,
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, untied, biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama 3.2": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3, "max_position_embeddings": 131_072},
    ),
    "mistral": ("mistral", {"sliding_window": None}),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "gemma3": ("gemma3_text", {"query_pre_attn_scalar": 32, "sliding_window": 512}),
}
NAMES_OF_THE_MODEL = "general."
"""Keys that describe a model card, not the model; the reference guesses them from the folder's name."""


def make(folder: Path, tokenizer: Any, family: str, config: dict[str, Any]) -> Path:
    """Save a random model of six layers, bfloat16."""
    import torch

    kind = CONFIG_MAPPING[family]
    sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"num_hidden_layers": 6, "head_dim": 32, "vocab_size": 49_152}
    torch.manual_seed(1)
    model = MODEL_FOR_CAUSAL_LM_MAPPING[kind](kind(**{**sizes, **config})).to(torch.bfloat16)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 or "norm" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def compare(mine: Path, theirs: Path) -> dict[str, Any]:
    """Return the tensors that are equal and those that are not, and the metadata keys that differ."""
    from gguf import GGUFReader

    from lorikeet.gguf_header import read_header

    ours, others = ({tensor.name: tensor for tensor in GGUFReader(path).tensors} for path in (mine, theirs))
    differ = [
        name
        for name in sorted(ours.keys() | others.keys())
        if name not in ours
        or name not in others
        or ours[name].tensor_type != others[name].tensor_type
        or ours[name].shape.tolist() != others[name].shape.tolist()
        or ours[name].data.tobytes() != others[name].data.tobytes()
    ]
    a, b = read_header(mine).metadata, read_header(theirs).metadata
    keys = {key for key in a.keys() | b.keys() if not key.startswith(NAMES_OF_THE_MODEL)}
    return {
        "tensors": len(others),
        "tensors_that_differ": differ,
        "metadata_equal": sum(key in a and key in b and a[key] == b[key] for key in keys),
        "metadata_here_only": {key: short(a[key]) for key in sorted(keys) if key not in b},
        "metadata_there_only": {key: short(b[key]) for key in sorted(keys) if key not in a},
        "metadata_other": {
            key: difference(a[key], b[key]) for key in sorted(keys) if key in a and key in b and a[key] != b[key]
        },
    }


def short(value: Any) -> Any:
    """Return a value as it fits a table."""
    return value if isinstance(value, int | float) else f"{str(value)[:60]}"


def difference(ours: Any, theirs: Any) -> Any:
    """Return two values, or how many places of two lists differ with the first of them."""
    if not isinstance(ours, list) or len(ours) != len(theirs):
        return [short(ours), short(theirs)]
    places = [place for place, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b]
    return {"places": len(places), "first": [places[0], ours[places[0]], theirs[places[0]]]}


def main() -> None:
    """Convert everything twice, compare, print a table and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, required=True, help="llama.cpp's convert_hf_to_gguf.py")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "convert.json")
    options = parser.parse_args()
    smollm = resolve_model("smollm2-135m-instruct")
    tokenizer = AutoTokenizer.from_pretrained(smollm)
    rows = []
    for name in ["SmolLM2-135M", *FAMILIES]:
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "model"
            if name in FAMILIES:
                make(folder, tokenizer, *FAMILIES[name])
            else:
                shutil.copytree(smollm, folder)
            mine, theirs = Path(scratch) / "mine.gguf", Path(scratch) / "theirs.gguf"
            began = time.monotonic()
            write_gguf(folder, mine, quant="f16", name="model")
            seconds = time.monotonic() - began
            command = [sys.executable, options.reference, folder, "--outfile", theirs, "--outtype", "f16"]
            began = time.monotonic()
            done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
            if done.returncode:
                print(f"{name:24} the reference fails: {done.stderr.strip().splitlines()[-1]}", flush=True)
                continue
            row = {"model": name, "seconds": round(seconds, 2), "reference_s": round(time.monotonic() - began, 2)}
            rows.append(row | compare(mine, theirs))
        last = rows[-1]
        equal = last["tensors"] - len(last["tensors_that_differ"])
        print(f"{name:24} {equal}/{last['tensors']} tensors equal, metadata: {last['metadata_equal']} equal,", end=" ")
        print(f"{len(last['metadata_other'])} other, here only {list(last['metadata_here_only'])}, ", end="")
        print(f"there only {list(last['metadata_there_only'])}", flush=True)
    stamp(options.out, {"models": rows})


if __name__ == "__main__":
    main()
