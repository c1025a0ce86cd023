"""A tokenizer folder -> the vocabulary of a GGUF file: tokens, their types, merges or scores, special ids, template.

    add_vocabulary(writer, folder, config)

Two kinds of tokenizer are known: byte-level BPE (Llama 3, Qwen, SmolLM) and BPE in SentencePiece's manner (Llama 2,
Mistral, Gemma). What llama.cpp would split otherwise than Hugging Face's tokenizer is refused. It reads the tokenizer
as transformers runs it, because that one gave the tokens that were trained on, and knows nothing of weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from gguf import GGUFWriter, TokenType

from lorikeet.errors import InputError
from lorikeet.messages import Conversation, Message
from lorikeet.prompt import PromptFormat, chat_template

SPACE = "▁"
"""What stands for a space in SentencePiece's tokens."""

BYTES = [f"<0x{byte:02X}>" for byte in range(256)]
"""SentencePiece's tokens for the bytes of characters that it has no token for."""

FAR_SCORE = -1000.0
"""Score of tokens that merging never makes, as the reference converter writes it."""

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_QWEN2 = _LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
PRE_TOKENIZERS = {
    ("digits", _GPT2, False): "smollm",
    ("", _GPT2, False): "gpt-2",
    ("", _LLAMA3, True): "llama-bpe",
    ("", _LLAMA3, False): "smaug-bpe",
    ("", _QWEN2, False): "qwen2",
}
"""(digit splitter, pattern, whole words before merges) of a byte-level BPE tokenizer -> llama.cpp's name for it."""


def add_vocabulary(writer: GGUFWriter, folder: Path, config: dict[str, Any]) -> None:
    """Write tokens, their types, merges or scores, special ids and the chat template of `folder`'s tokenizer.

    Raises InputError for a tokenizer that llama.cpp would not follow token by token.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    backend = json.loads(tokenizer.backend_tokenizer.to_str())
    size = config["vocab_size"]
    if len(tokenizer) > size:
        raise InputError(f"{folder}: its tokenizer has {len(tokenizer)} tokens, its weights have rows for {size}")
    if backend["model"].get("type") != "BPE":
        raise InputError(f"{folder}: a {backend['model'].get('type')} tokenizer cannot be written as GGUF; BPE can")
    if backend["model"].get("byte_fallback"):
        _add_sentencepiece(writer, tokenizer, backend, size=size, folder=folder)
    else:
        _add_byte_level(writer, tokenizer, backend, size=size, folder=folder)
    _add_special_ids(writer, tokenizer)
    if template := chat_template(tokenizer):
        writer.add_chat_template(template)


def _add_byte_level(writer: GGUFWriter, tokenizer: Any, backend: dict[str, Any], *, size: int, folder: Path) -> None:
    tokens, types = _tokens(tokenizer, size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(backend, folder))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([" ".join(pair) for pair in _merges(backend)])
    writer.add_add_space_prefix(False)


def _add_sentencepiece(writer: GGUFWriter, tokenizer: Any, backend: dict[str, Any], *, size: int, folder: Path) -> None:
    """Write a BPE tokenizer with byte fallback as llama.cpp's SentencePiece kind, which merges by score."""
    vocabulary = backend["model"]["vocab"]
    missing = [byte for byte in BYTES if byte not in vocabulary]
    if missing:
        raise InputError(f"{folder}: its tokenizer has no token {missing[0]}; llama.cpp needs one for every byte")
    tokens, types = _tokens(tokenizer, size)
    for byte in BYTES:
        types[vocabulary[byte]] = TokenType.BYTE
    for index, token in tokenizer.added_tokens_decoder.items():
        # Hugging Face looks for such a token in the text itself, where spaces are spaces, and finds none; merging makes it.
        if SPACE in token.content and not token.normalized and token.content in vocabulary:
            types[index] = TokenType.NORMAL
    prefix = _space_prefix(tokenizer, backend, folder)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores(tokens, types, _merges(backend), folder))
    writer.add_token_types(types)
    writer.add_add_space_prefix(prefix)


def _tokens(tokenizer: Any, size: int) -> tuple[list[str], list[TokenType]]:
    """Return the text and type of each of `size` ids; ids that the tokenizer has no token for get a name of their own."""
    added = tokenizer.added_tokens_decoder
    by_id = {index: token for token, index in tokenizer.get_vocab().items()}
    tokens, types = [], []
    for index in range(size):
        if index not in by_id:
            tokens.append(f"[PAD{index}]")
            types.append(TokenType.UNUSED)
        elif index in added:
            tokens.append(added[index].content)
            types.append(TokenType.CONTROL if added[index].special else TokenType.USER_DEFINED)
        else:
            tokens.append(by_id[index])
            types.append(TokenType.NORMAL)
    return tokens, types


def _merges(backend: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the pairs that merge, most urgent first."""
    pairs = []
    for merge in backend["model"]["merges"]:
        left, right = merge.split(" ") if isinstance(merge, str) else merge
        pairs.append((left, right))
    return pairs


def end_of_turn(prompt: PromptFormat) -> int:
    """Return the token that ends an answer: the last one that tuning supervises. Raises InputError as `encode` does."""
    row = prompt.encode(Conversation((Message("user", "Hello"), Message("assistant", "Yes"))))
    return row.ids[max(place for place, counted in enumerate(row.supervised) if counted)]


def _add_special_ids(writer: GGUFWriter, tokenizer: Any) -> None:
    """Write the ids of BOS, EOS, UNK and PAD, and whether a text gets a BOS before it and an EOS after it.

    Where another special token than EOS ends a turn, as Gemma's does, llama.cpp is told of it.
    """
    ends = tokenizer("").input_ids
    bos, eos = tokenizer.bos_token_id, tokenizer.eos_token_id
    starts = bool(ends) and ends[0] == bos
    writer.add_add_bos_token(starts)
    if eos is not None and ends[starts:] == [eos]:
        writer.add_add_eos_token(True)
    for role, index in (("bos", bos), ("eos", eos), ("unk", tokenizer.unk_token_id), ("pad", tokenizer.pad_token_id)):
        if index is not None:
            getattr(writer, f"add_{role}_token_id")(index)
    if tokenizer.chat_template:
        prompt = PromptFormat(tokenizer)
        with suppress(InputError):  # a template that no answer can be found in was not tuned with
            ending = end_of_turn(prompt)
            if ending != eos and ending in prompt.special_ids:
                writer.add_eot_token_id(ending)


# ------------------------------------------------------------------------------------------------------- byte level


def pre_tokenizer(backend: dict[str, Any], folder: Path) -> str:
    """Return llama.cpp's name for the pre-tokenizer of a `tokenizer.json`. Raises InputError for one it has no name for.

    llama.cpp does not compose characters (Unicode's NFC), which Qwen's tokenizer does: texts are taken as composed.
    """
    digits, pattern, byte_level = "", "", False
    for step in _steps(backend.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Digits" and step["individual_digits"] and not pattern:
            digits = "digits"
        elif step["type"] == "Split" and _is_cut(step) and not pattern:
            pattern = step["pattern"].get("Regex", "")
        elif step["type"] == "ByteLevel" and not step["add_prefix_space"] and bool(step["use_regex"]) != bool(pattern):
            pattern, byte_level = pattern or _GPT2, True
        else:
            raise _refusal(folder, "pre-tokenizer", step)
    for step in _steps(backend.get("normalizer"), "normalizers"):
        if step["type"] != "NFC":
            raise _refusal(folder, "normalizer", step)
    known = PRE_TOKENIZERS.get((digits, pattern, bool(backend["model"].get("ignore_merges"))))
    if known is None or not byte_level:
        raise InputError(
            f"{folder}: its pre-tokenizer has no name in llama.cpp that is known here; it would split words otherwise"
        )
    return known


def _steps(part: dict[str, Any] | None, inside: str) -> list[dict[str, Any]]:
    """Return the steps of a normalizer or pre-tokenizer, a sequence or one alone."""
    if not part:
        return []
    return [deeper for step in part[inside] for deeper in _steps(step, inside)] if inside in part else [part]


def _is_cut(step: dict[str, Any]) -> bool:
    """Say whether a Split step keeps exactly what its pattern matches, and what lies between, as pieces."""
    return (step["behavior"], bool(step["invert"])) in {("Isolated", False), ("Removed", True)}


def _refusal(folder: Path, part: str, step: dict[str, Any]) -> InputError:
    return InputError(f"{folder}: the {part} {step['type']} of its tokenizer has no counterpart in llama.cpp")


# ---------------------------------------------------------------------------------------------------- SentencePiece


def _space_prefix(tokenizer: Any, backend: dict[str, Any], folder: Path) -> bool:
    """Return whether llama.cpp must put a space before a text and after each special token.

    Where Metaspace puts one always, it leaves a text alone that begins with a space, and llama.cpp does not: they agree
    on texts that do not. Raises InputError if the tokenizer does anything else but write spaces as SPACE.
    """
    scheme, escaped = "never", False
    for step in _steps(backend.get("normalizer"), "normalizers"):
        if step["type"] == "Prepend" and step["prepend"] == SPACE:
            scheme = "always"
        elif step["type"] == "Replace" and step["pattern"] == {"String": " "} and step["content"] == SPACE:
            escaped = True
        else:
            raise _refusal(folder, "normalizer", step)
    for step in _steps(backend.get("pre_tokenizer"), "pretokenizers"):
        if step["type"] == "Metaspace" and step["replacement"] == SPACE and not step["split"]:
            scheme, escaped = step["prepend_scheme"], True
        elif not (step["type"] == "Split" and step["pattern"] == {"String": " "} and escaped):
            raise _refusal(folder, "pre-tokenizer", step)
    if not escaped:
        raise InputError(f"{folder}: its tokenizer does not write spaces as {SPACE}, as llama.cpp does for its kind")
    return scheme == "always" or (scheme == "first" and not _starts_special(tokenizer))


def _starts_special(tokenizer: Any) -> bool:
    """Say whether a rendered conversation begins with a special token, so that nothing of it is the first word."""
    if not tokenizer.chat_template:
        return False
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "x"}]
    text = str(tokenizer.apply_chat_template(turns, tokenize=False))
    return text.startswith(tuple(token.content for token in tokenizer.added_tokens_decoder.values()))


def scores(tokens: list[str], types: list[TokenType], merges: Iterable[tuple[str, str]], folder: Path) -> list[float]:
    """Return the score of each token such that merging by score is merging by rank.

    SentencePiece merges the neighbours whose joint token has the best score, whichever way that token came to be; a
    tokenizer.json lists the pairs. They agree if every way to cut a token into two pieces is listed, and all ways to
    one token come before those to the next. Raises InputError if they do not.
    """
    normal = {token for token, kind in zip(tokens, types, strict=True) if kind == TokenType.NORMAL}
    first: dict[str, int] = {}
    last: dict[str, int] = {}
    pairs = set()
    for rank, (left, right) in enumerate(merges):
        first.setdefault(left + right, rank)
        last[left + right] = rank
        pairs.add((left, right))
    for token in normal:
        for cut in range(1, len(token)):
            left, right = token[:cut], token[cut:]
            apart = (len(left) == 1 or left in normal) and (len(right) == 1 or right in normal)
            if apart and (left, right) not in pairs:
                raise _other_merges(folder, f"{left!r} and {right!r} do not merge")
    made = [token for token in first if token in normal]
    ends = -1
    for token in made:
        if len(set(token)) > 1:  # runs of one character grow from the left by either rule
            if first[token] < ends:
                raise _other_merges(folder, f"{token!r} is made in turns with another token")
            ends = last[token]
    order = {token: -float(place) for place, token in enumerate(made)}
    for token, kind in zip(tokens, types, strict=True):
        if kind == TokenType.NORMAL:
            order.setdefault(token, -float(len(order)))
    rare = {TokenType.BYTE: 0.0}
    return [
        order[token] if kind == TokenType.NORMAL else rare.get(kind, FAR_SCORE)
        for token, kind in zip(tokens, types, strict=True)
    ]


def _other_merges(folder: Path, why: str) -> InputError:
    return InputError(
        f"{folder}: its merges are not those of a SentencePiece model ({why}); llama.cpp cannot follow them"
    )
