"""Every family and both kinds of tokenizer: torch against llama.cpp, number by number and token by token."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lorikeet.engine import LlamaEngine
from lorikeet.errors import InputError
from lorikeet.export.families import FAMILIES
from lorikeet.export.gguf import write_gguf
from lorikeet.export.vocabulary import BYTES, PRE_TOKENIZERS, SPACE, scores
from lorikeet.gguf_header import read_header
from lorikeet.scoring import output_matrix

from ..conftest import CHATML, WORDS, make_model, make_tokenizer

NASTY = [
    "Hello, world!",
    " leading and trailing ",
    "two  three   four    spaces and     more          still",
    "tabs\tand\t\ttabs\nlines\n\nblank\n\n\n\nmore\r\nwindows\r\n",
    "1 22 333 4444 55555 3.14 1,000,000 2024-11-25 0x1F ½ ² ௧ Ⅳ",
    "1.\n\n2. second\n   3) third",
    "I've don't WE'RE he'll 'tis o'clock 'S 'LL",
    "émigré naïve Zürich Łódź İstanbul ß ﬁ",
    "日本語のテキスト、中文文本。한국어 문장",
    "Привет мир Ελλάδα שלום مرحبا हिन्दी ไทย",
    "🦜🚀 👩‍👩‍👧‍👦 🏳️‍🌈 ✅",
    "\u200b\u00a0\u2003\ufeff\u0000\u007f",
    "a\u0301e\u0308 combining",
    "\U0001f99c\U00020000\U0010ffff",
    "<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\n",
    "<|im_end|>  x<|im_end|>y <|im_end|>\n\n",
    "▁already▁▁escaped <0x41> [PAD7]",
    "def f(x):\n    return x**2  # ok\n\n\n",
    "https://example.org/a?b=c&d=%20#e",
    "!!!???...---===~~~```\"\"\"''',,,;;;",
    "",
    " ",
    "\n",
]


def make_sentencepiece(*, prefix: str = "never", bos: bool = True, template: str = CHATML) -> Any:
    """Return a small tokenizer in SentencePiece's manner: byte fallback, spaces as ▁, every cut of a token a merge.

    `prefix` is Metaspace's `prepend_scheme`, or `normalizer` for the older form of `always`.
    """
    pieces = [SPACE, *sorted({letter for word in WORDS for letter in word} | set("HT.,!?'0123456789éñ日本"))]
    pieces += [SPACE * length for length in range(2, 9)]
    ranked = []
    for word in WORDS:
        ranked += [word[:length] for length in range(2, len(word) + 1)]
        ranked += [SPACE + word[:length] for length in range(1, len(word) + 1)]
    ranked = list(dict.fromkeys(sorted(ranked, key=len)))
    specials = ["<pad>", "<eos>", "<bos>", "<unk>", "<|im_start|>", "<|im_end|>"]
    vocabulary = {piece: index for index, piece in enumerate(dict.fromkeys([*specials, *BYTES, *pieces, *ranked]))}
    order = [SPACE * length for length in range(8, 1, -1)] + ranked
    merges = [
        (token[:cut], token[cut:])
        for token in order
        for cut in range(1, len(token))
        if token[:cut] in vocabulary and token[cut:] in vocabulary
    ]
    model = models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    if prefix == "normalizer":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)])
    elif prefix == "never":
        tokenizer.normalizer = normalizers.Replace(" ", SPACE)
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(SPACE, prepend_scheme=prefix, split=False)
    tokenizer.add_special_tokens([AddedToken(token, normalized=False) for token in specials])
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False), AddedToken(SPACE * 2, normalized=False)])
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    fast.chat_template = template
    return fast


def write(folder: Path, quant: Any = "f16") -> Path:
    out = folder / f"{quant}.gguf"
    write_gguf(folder, out, quant=quant, name="tiny")
    return out


def edit_config(folder: Path, **values: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


SENTENCEPIECE = {"llama", "mistral", "gemma", "gemma2", "gemma3_text"}


def family_model(folder: Path, family: str, *, tied: bool | None = None, **config: Any) -> Path:
    """Save a random model of a family, its norms as random as its weights; tied unless it is Mistral's, or as `tied` says."""
    tokenizer = make_sentencepiece() if family in SENTENCEPIECE else make_tokenizer()
    make_model(folder, family=family, tied=family != "mistral" if tied is None else tied, tokenizer=tokenizer, seed=3)
    gemma = {"query_pre_attn_scalar": 16} if family in {"gemma2", "gemma3_text"} else {}
    edit_config(folder, **gemma, **config)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name or "bias" in name:
                weight.add_(torch.randn_like(weight) * 0.3)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("family", "config"),
    [
        ("llama", {}),
        ("llama", {"attention_bias": True, "mlp_bias": True}),
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}}),
        (
            "qwen2",
            {
                "rope_parameters": {
                    "rope_type": "yarn",
                    "factor": 4.0,
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 32,
                }
            },
        ),
        ("mistral", {"sliding_window": None}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma", {}),
        ("gemma2", {"sliding_window": 24}),
        ("gemma3_text", {}),
        ("gemma3_text", {"final_logit_softcapping": 20.0}),
    ],
)
def test_llama_cpp_computes_what_torch_does(tmp_path: Path, family: str, config: dict[str, Any]) -> None:
    folder = family_model(tmp_path / "model", family, **config)
    path = write(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    ids = torch.randint(8, model.config.vocab_size, (1, 96), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=ids).logits[0], -1).numpy()
    with LlamaEngine(path, scoring=True, context_tokens=128) as engine:
        logits = engine.hidden(ids[0].tolist()) @ output_matrix(path).T
    cap = read_header(path).metadata.get(f"{FAMILIES[model.config.architectures[0]].name}.final_logit_softcapping")
    if cap:
        logits = cap * np.tanh(logits / cap)
    served = torch.log_softmax(torch.from_numpy(logits), -1).numpy()
    kl = (np.exp(expected) * (expected - served)).sum(-1)
    assert kl.mean() < 2e-4
    assert kl.max() < 2e-3


@pytest.mark.parametrize("prefix", ["never", "normalizer", "always"])
def test_sentencepiece_tokens_are_equal(tmp_path: Path, prefix: str) -> None:
    # where a space goes before every text, Hugging Face adds none to a text that begins with one; llama.cpp does
    assert_equal_tokens(tmp_path, make_sentencepiece(prefix=prefix), first_space_kept=prefix != "never")


def test_a_first_word_prefix_is_left_out_after_a_special_token(tmp_path: Path) -> None:
    tokenizer = make_sentencepiece(prefix="first")
    path = write(make_model(tmp_path, tokenizer=tokenizer))
    text = tokenizer.apply_chat_template([{"role": "user", "content": "the fox  jumps"}], tokenize=False)
    with LlamaEngine(path) as engine:
        assert engine.tokenize(text) == tokenizer(text).input_ids


@pytest.mark.parametrize(("digits", "pattern", "whole"), list(PRE_TOKENIZERS))
def test_byte_level_tokens_are_equal(tmp_path: Path, digits: str, pattern: str, whole: bool) -> None:
    from tokenizers import Regex

    tokenizer = make_tokenizer()
    backend = tokenizer.backend_tokenizer
    steps: list[Any] = [pre_tokenizers.Digits(individual_digits=True)] if digits else []
    steps += [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.model.ignore_merges = whole
    assert_equal_tokens(tmp_path, tokenizer)


def assert_equal_tokens(folder: Path, tokenizer: Any, *, first_space_kept: bool = False) -> None:
    """Assert that llama.cpp gives the ids of `tokenizer` for every nasty text."""
    path = write(make_model(folder, tokenizer=tokenizer))
    with LlamaEngine(path) as engine:
        for text in NASTY:
            if "\u0000" in text or (first_space_kept and re.search(f"^ |> |{SPACE}", text)):
                continue
            assert engine.tokenize(text) == tokenizer(text).input_ids, text


def test_special_ids_types_and_scores_are_written(tmp_path: Path) -> None:
    tokenizer = make_sentencepiece()
    path = write(make_model(tmp_path, tokenizer=tokenizer))
    metadata = read_header(path).metadata
    kinds = dict(zip(metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.token_type"], strict=True))
    assert kinds["<0x0A>"] == TokenType.BYTE
    assert kinds["<|im_end|>"] == TokenType.CONTROL
    assert kinds["\n\n"] == TokenType.USER_DEFINED
    assert kinds[SPACE * 2] == kinds["the"] == TokenType.NORMAL
    assert metadata["tokenizer.ggml.eos_token_id"] == tokenizer.eos_token_id
    assert metadata["tokenizer.ggml.eot_token_id"] == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert metadata["tokenizer.ggml.add_bos_token"] is True
    assert metadata["tokenizer.ggml.add_space_prefix"] is False
    assert len(GGUFReader(path).tensors) == len(read_header(path).tensors)


def test_scores_follow_the_order_of_merges() -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    merges = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
    assert scores(tokens, [TokenType.NORMAL] * 6, merges, Path("x")) == [-3.0, -4.0, -5.0, -1.0, 0.0, -2.0]


@pytest.mark.parametrize(
    ("merges", "why"),
    [
        ([("a", "b"), ("b", "c"), ("a", "bc")], "'ab' and 'c' do not merge"),
        ([("a", "bc"), ("b", "c"), ("ab", "c"), ("a", "b")], "made in turns"),
    ],
)
def test_merges_that_scores_cannot_say_are_refused(merges: list[tuple[str, str]], why: str) -> None:
    tokens = ["a", "b", "c", "ab", "bc", "abc"]
    with pytest.raises(InputError, match=why):
        scores(tokens, [TokenType.NORMAL] * 6, merges, Path("x"))


@pytest.mark.parametrize(
    ("family", "config", "message"),
    [
        ("llama", {"hidden_act": "gelu"}, "hidden_act is gelu, and llama.cpp computes llama with silu"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope_type"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "query_pre_attn_scalar is 144"),
        ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping"),
        ("gemma3_text", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
        ("llama", {"num_hidden_layers": 3}, "has no weights for blk.2."),
        ("qwen2", {"num_hidden_layers": 3}, "config.json cannot be read: `num_hidden_layers`"),
        ("qwen2", {"tie_word_embeddings": False}, "has no weights for output.weight"),
        ("llama", {"vocab_size": 9999}, "says 9999 tokens, the embedding has"),
        ("llama", {"architectures": ["PhiForCausalLM"]}, "PhiForCausalLM cannot be written"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, config: dict[str, Any], message: str
) -> None:
    folder = family_model(tmp_path / "model", family)
    edit_config(folder, **config)
    with pytest.raises(InputError, match=message):
        write_gguf(folder, tmp_path / "out.gguf", quant="f16", name="x")
    assert not (tmp_path / "out.gguf").exists()


def test_a_tokenizer_that_rewrites_texts_is_refused(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(InputError, match="normalizer Lowercase"):
        write(make_model(tmp_path, tokenizer=tokenizer))
    assert not (tmp_path / "f16.gguf").exists()


def test_a_window_that_llama_cpp_does_not_know_bounds_the_context(tmp_path: Path) -> None:
    folder = family_model(tmp_path, "mistral", sliding_window=64)
    assert read_header(write(folder)).metadata["llama.context_length"] == 64
