"""What the tests share: tiny models made on the spot, conversations, and the folder of optional data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorikeet.messages import Conversation, Message

SHARED = Path(__file__).resolve().parents[2] / "shared"

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

WORDS = [
    "the",
    "quick",
    "brown",
    "fox",
    "jumps",
    "over",
    "lazy",
    "dogs",
    "while",
    "seven",
    "clever",
    "lorikeets",
    "sing",
    "about",
    "weather",
    "trains",
    "bread",
    "numbers",
    "colours",
    "music",
    "winter",
    "summer",
    "mountains",
    "rivers",
    "letters",
    "questions",
    "answers",
    "please",
    "thank",
    "you",
    "yes",
    "no",
    "maybe",
    "today",
    "tomorrow",
]


@pytest.fixture
def shared() -> Path:
    """The folder of optional data; the test is skipped where it is absent."""
    if not (SHARED / "data").is_dir():
        pytest.skip("the optional data in shared/ is not here")
    return SHARED / "data"


def make_tokenizer(template: str = CHATML, *, bos: str | None = None) -> Any:
    """Return a small byte-level BPE tokenizer with ChatML's special tokens, and a BOS that it adds if one is named."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"] + ([bos] if bos else [])
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS), "system\nuser\nassistant\n" * 4], trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, tokenizer.token_to_id(bos))]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", bos_token=bos
    )
    fast.chat_template = template
    return fast


def make_model(
    folder: Path,
    *,
    family: str = "llama",
    tied: bool = True,
    tokenizer: Any = None,
    seed: int = 0,
    hidden_size: int = 64,
) -> Path:
    """Save a random model of two layers with its tokenizer to `folder`, float32, and return it."""
    import torch
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    tokenizer = tokenizer or make_tokenizer()
    config_class = CONFIG_MAPPING[family]
    torch.manual_seed(seed)
    more = {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]} if "gemma3" in family else {}
    config = config_class(
        **more,
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
    )
    MODEL_FOR_CAUSAL_LM_MAPPING[config_class](config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of two layers in Hugging Face layout."""
    return make_model(tmp_path_factory.mktemp("tiny"))


def make_conversations(count: int = 60) -> list[Conversation]:
    """Return short different conversations in which the answer depends on the question."""
    rows = []
    for number in range(count):
        a, b, c = (WORDS[(number * step + step) % len(WORDS)] for step in (1, 3, 7))
        question = f"{a} {b} {number}?"
        rows.append(
            Conversation((Message("user", question), Message("assistant", f"{c} {b} {a}. {number}")), f"row-{number}")
        )
    return rows


def write_jsonl(path: Path, conversations: list[Conversation]) -> Path:
    """Write conversations in the `messages` layout and return the path."""
    lines = [json.dumps({"messages": [m.as_dict() for m in c.messages]}) for c in conversations]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def chats(tmp_path: Path) -> Path:
    """A file of sixty conversations."""
    return write_jsonl(tmp_path / "chats.jsonl", make_conversations())
