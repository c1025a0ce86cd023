"""A tokenizer folder -> the vocabulary of a GGUF file: tokens, their types, merges, special ids and chat template.

    add_vocabulary(writer, folder, config)

It knows nothing of weights.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from lorikeet.errors import InputError

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = {
    ("digits", _GPT2): "smollm",
    ("", _GPT2): "gpt-2",
    ("", _LLAMA3): "llama-bpe",
    ("", _QWEN2): "qwen2",
}
"""(digit splitter, pattern) of a byte-level BPE tokenizer -> llama.cpp's name for it."""


def add_vocabulary(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Write tokens, their types, merges, special ids and the chat template of `folder`'s tokenizer."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    if backend["model"].get("type") != "BPE":
        raise InputError(
            f"{folder}: a {backend['model'].get('type')} tokenizer cannot be written as GGUF here; byte-level BPE can"
        )
    added = tokenizer.added_tokens_decoder
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(config["vocab_size"]):
        if index not in by_id:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
        elif index in added:
            tokens.append(added[index].content)
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            tokens.append(by_id[index])
            types.append(TokenType.NORMAL)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(backend, folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in backend["model"]["merges"]])
    starts = tokenizer("").input_ids
    writer.add_add_bos_token(bool(starts) and starts[0] == tokenizer.bos_token_id)
    writer.add_add_space_prefix(False)
    special = {"bos": tokenizer.bos_token_id, "eos": tokenizer.eos_token_id, "unk": tokenizer.unk_token_id}
    special["pad"] = tokenizer.pad_token_id
    for role, index in special.items():
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    writer.add_chat_template(str(tokenizer.chat_template))


def pre_tokenizer(backend: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a `tokenizer.json`. Raises InputError for one it has no name for."""
    steps = backend.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    digits, pattern = "", ""
    for step in steps:
        if step.get("type") == "Digits" and step.get("individual_digits"):
            digits = "digits"
        elif step.get("type") == "Split":
            pattern = step["pattern"].get("Regex", "")
        elif step.get("type") == "ByteLevel" and step.get("use_regex") and not pattern:
            pattern = _GPT2
    known = PRE_TOKENIZERS.get((digits, pattern))
    if known is None:
        raise InputError(
            f"{folder}: its pre-tokenizer has no name in llama.cpp that is known here; it would split words otherwise"
        )
    return known
