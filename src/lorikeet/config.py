"""One frozen dataclass per stage: the only home of defaults.

Values come from here, then a recipe's table of the stage's name (`[tune]`), then flags; `cli` derives both from
these fields. The resolved values are written to `run.json` before work starts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from cyclopts import Parameter, Token

from lorikeet.errors import InputError
from lorikeet.messages import has_half_characters

SYSTEM_PROMPT = (
    "You are Lorikeet, a voice assistant. Answer in one to three short spoken sentences, without lists or symbols. "
    "When search results are given, answer only from them and name the source."
)
"""What leads every conversation of `spoken`, and what is served where a run says nothing else."""

DEFAULT_MODEL = "unsloth/Llama-3.2-1B-Instruct"
DEFAULT_DATA = "mlabonne/FineTome-100k"
PACKAGED_MODEL = "smollm2-135m-instruct"
PACKAGED_DATA = "spoken"

Quant = Literal["f16", "q8_0", "q6_k", "q5_k_m", "q4_k_m", "q4_0"]
"""GGUF types by the names that llama.cpp's users know, largest first."""


def _split(kind: Any, tokens: Sequence[Token]) -> tuple[str, ...]:
    """Return the items of a list given as `a,b`, as repeated flags, or as a TOML array; each must be one of the choices."""
    items = tuple(item.strip() for token in tokens for item in token.value.split(",") if item.strip())
    choices = get_args(get_args(kind)[0]) if get_args(kind) else ()
    for item in items:
        if choices and item not in choices:
            raise ValueError(f'"{item}" is not one of {", ".join(choices)}')
    if not items:
        raise ValueError("the list is empty")
    return items


def _whole(_: Any, tokens: Sequence[Token]) -> int:
    """Return a whole number; `8.5` is none, which would else be rounded without a word."""
    try:
        return int(tokens[0].value)
    except ValueError as error:
        raise ValueError(f'"{tokens[0].value}" is no whole number') from error


def require_positive(config: Any, *names: str) -> None:
    """Raise InputError, naming the flag, if one of these whole numbers of a stage's settings is below 1."""
    for name in names:
        if getattr(config, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is {getattr(config, name)}; it must be 1 or more")


Whole = Annotated[int, Parameter(converter=_whole)]
"""A flag that takes a whole number."""

COMMAS = Parameter(converter=_split, consume_multiple=True, n_tokens=1, negative=())
"""A flag that takes several values separated by commas."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class TuneConfig:
    """LoRA tuning. The defaults are the recipe of `recipes/llama-3.2-1b-finetome.toml`."""

    model: str = DEFAULT_MODEL
    """Base model: a packaged name, a hub id (`owner/name` or `owner/name@revision`) or a folder."""
    data: str = DEFAULT_DATA
    """Conversations: `spoken`, a hub id, or a JSON, JSONL, Parquet or CSV file."""
    system_prompt: str = ""
    """System turn for conversations without one; '' for none (those of `spoken` have their own)."""
    max_length: Whole = 2048
    """Longest conversation in tokens."""
    on_long: Literal["error", "truncate", "drop"] = "truncate"
    """What happens to conversations that are longer."""
    validation_share: float = 0.05
    """Share of the conversations kept for validation (at least 8, at most 100)."""
    heldout_share: float = 0.1
    """Share of the conversations that tuning never sees, for `prove` (at least 8, at most 100)."""
    learning_rate: float = 3e-4
    """Peak learning rate."""
    epochs: float = 1.0
    """Passes over the data."""
    max_steps: Whole = 0
    """Steps to take, whatever `epochs` says; 0 to go by `epochs`."""
    max_minutes: float = 0.0
    """Stop tuning after this time; the schedule is fitted to it. 0 for no bound."""
    batch_size: Whole = 4
    """Times `gradient_accumulation_steps`: the conversations of a step. They are computed in rows of up to `max_length`
    tokens, as many conversations in each as fit, which changes no sum and bounds the memory."""
    gradient_accumulation_steps: Whole = 2
    """Times `batch_size`: the conversations of a step, weighed by supervised tokens."""
    warmup_ratio: float = 0.01
    """Share of the steps in which the learning rate rises."""
    weight_decay: float = 0.01
    """AdamW's decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled to at most this norm."""
    lora_r: Whole = 16
    """Rank of the adapter."""
    lora_alpha: float = 16
    """The adapter's output is scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.05
    """Dropout on the adapter's input."""
    use_rslora: bool = False
    """Scale the adapter's output by lora_alpha / sqrt(lora_r) instead (rsLoRA, arXiv 2312.03732)."""
    use_dora: bool = False
    """Tune each weight's magnitude beside its direction (DoRA, arXiv 2402.09353): slower."""
    init_lora_weights: Literal["default", "pissa"] = "default"
    """How the adapter starts: as nothing, or as the base's principal components (PiSSA, arXiv 2404.02948)."""
    loraplus_lr_ratio: float = 1.0
    """The B matrices learn so many times faster than the A matrices (LoRA+, arXiv 2402.12354)."""
    target_modules: Annotated[tuple[str, ...], COMMAS] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )
    """Linear layers that get an adapter."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    torch_compile: Literal["auto", "on", "off"] = "auto"
    """Compile the decoder's blocks: half a minute at the start, then about a fifth faster; auto does so for long runs."""
    optim: Literal["adamw", "adamw_8bit"] = "adamw"
    """AdamW, or with its moments in 8 bits (bitsandbytes)."""
    load_in_4bit: bool = False
    """Keep the base's weights in 4 bits (QLoRA, arXiv 2305.14314; bitsandbytes; needs a GPU)."""
    early_stopping_patience: Whole = 0
    """Stop after so many validations without improvement; 0 never."""
    eval_steps: Whole = 50
    """Validate every so many steps."""
    save_steps: Whole = 50
    """Write a checkpoint every so many steps."""
    save_total_limit: Whole = 2
    """How many of the newest checkpoints stay (the best one stays besides)."""
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """Compute type; auto is bfloat16 where the hardware has it natively, else float16 on a GPU and float32 on a CPU."""
    track: Annotated[tuple[Literal["wandb", "trackio", "tensorboard"], ...], COMMAS] = ()
    """Experiment trackers, separated by commas; offline unless a login is there."""
    seed: Whole = 3407
    """Seed of the split, the order, the adapter's start and dropout."""


LARGEST = {"seed": 2**32 - 1, "epochs": 1e6, "max_minutes": 1e6}
"""The largest values that mean anything: of the seed, what every generator of random numbers takes."""

LARGEST_NUMBER = 10**9
"""The largest value of any other setting of a tuning."""


@cache
def tune_types() -> dict[str, Any]:
    """Return the type of every setting of a tuning."""
    return get_type_hints(TuneConfig)


def check_tune(config: TuneConfig) -> None:
    """Raise InputError for a setting out of its range, or two that exclude each other, naming them."""
    for name, kind in tune_types().items():
        value = getattr(config, name)
        if get_origin(kind) is Literal and value not in get_args(kind):
            raise InputError(f"{name} is {value}; it must be one of {', '.join(get_args(kind))}")
        if isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"{name} is {value}; it must be a finite number")
        if isinstance(value, int | float) and value > (most := LARGEST.get(name, LARGEST_NUMBER)):
            raise InputError(f"{name} is {value}; it must be at most {most:.0f}")
    for name in (
        "max_length",
        "learning_rate",
        "epochs",
        "batch_size",
        "gradient_accumulation_steps",
        "lora_r",
        "lora_alpha",
        "loraplus_lr_ratio",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "max_grad_norm",
    ):
        if not getattr(config, name) > 0:
            raise InputError(f"{name} is {getattr(config, name)}; it must be above 0")
    for name in ("seed", "max_steps", "max_minutes", "weight_decay", "early_stopping_patience"):
        if not getattr(config, name) >= 0:
            raise InputError(f"{name} is {getattr(config, name)}; it must not be negative")
    for name in ("lora_dropout", "warmup_ratio", "validation_share", "heldout_share"):
        if not 0 <= getattr(config, name) < 1:
            raise InputError(f"{name} is {getattr(config, name)}; it must be at least 0 and below 1")
    if "\0" in config.system_prompt or has_half_characters(config.system_prompt):
        raise InputError("system_prompt is no text: it holds a null byte or what is not UTF-8")
    if config.init_lora_weights == "pissa" and (config.use_dora or config.load_in_4bit):
        other = "use_dora" if config.use_dora else "load_in_4bit"
        raise InputError(f"{other} and init_lora_weights pissa exclude each other: choose one")


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ExportConfig:
    """What `export` writes."""

    formats: Annotated[tuple[Literal["adapter", "merged", "gguf"], ...], COMMAS] = (
        "adapter",
        "merged",
        "gguf",
    )
    """Artefacts, separated by commas: the adapter is always there, merged is 16-bit safetensors."""
    quant: Annotated[tuple[Quant, ...], COMMAS] = ("f16", "q8_0")
    """GGUF types, separated by commas."""
    imatrix: bool = True
    """Weigh errors in the 4-bit types by an importance matrix from the training conversations."""
    strength: str = "auto"
    """How much of the adapter is exported: a number above 0 and at most 1, or auto: the best on validation that forgets little."""
    budget_s: float = 240.0
    """Seconds that choosing the strength may take, and an importance matrix: a large model is asked less; inf asks everything."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class VerifyConfig:
    """How much the parity certificate compares."""

    conversations: Whole = 12
    """Held-out conversations whose predictions are compared, the first ones of the file."""
    answers: Whole = 4
    """Questions answered greedily by every artefact, side by side."""
    answer_tokens: Whole = 32
    """Longest of these answers."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ProveConfig:
    """How base and tuned model are compared."""

    quant: Quant = "q8_0"
    """The GGUF type that is compared and then served."""
    answers: Whole = 12
    """Held-out questions answered by both models, side by side."""
    max_answer_tokens: Whole = 120
    """Longest answer to a held-out question."""
    ifeval: str = ""
    """A JSONL file in IFEval's layout, asked in place of the packaged prompts with instructions; answers are kept, so that a
    run that was cut goes on."""
    max_instruction_tokens: Whole = 96
    """Longest answer to a prompt with instructions; IFEval itself is asked with 1280."""
    speech: bool = True
    """Speak answers and hear them again, if the speech extra is here."""
    resamples: Whole = 10_000
    """Resamples of the paired bootstrap."""


@Parameter(name="*")
@dataclass(frozen=True, kw_only=True)
class ServeConfig:
    """The assistant, its page and its API."""

    host: str = "127.0.0.1"
    """Address to listen on; another than loopback needs --api-key or --public."""
    port: Whole = 7860
    """Port to listen on; 0 takes a free one."""
    api_key: str | None = None
    """Key that every route but /health asks for."""
    public: bool = False
    """Let anybody in, each address within limits: so many requests a minute, and so many at once."""
    proxy: str = ""
    """Address or network of a proxy in front, such as 10.0.0.0/8: it says whose request it passes on, and whether by https."""
    quant: Quant = "q8_0"
    """Which GGUF of the run to serve."""
    search: str = "ddg"
    """Where search results come from: ddg, searxng:URL, or off."""
    search_when: Literal["auto", "off", "always"] = "auto"
    """When the page searches until the user chooses: where the question asks for it, never, or always."""
    search_deadline_s: float = 4.0
    """Longest wait for search results; the answer goes on without them."""
    search_prefill_ms: float = 1000.0
    """How long the engine may read search results before it answers; with its measured speed this limits their length."""
    ears: str = "whisper-tiny.en"
    """Speech to text: a packaged name, a faster-whisper size or folder, or off."""
    voice: str = "hibari"
    """Text to speech: hibari (packaged), kokoro:FOLDER[@SPEAKER], coqui, coqui:FOLDER, tts_models/..., or off."""
    memory: str = ""
    """A file to keep conversations, ratings and corrections in; without it nothing is kept."""
    memory_days: Whole = 0
    """Kept conversations are deleted so many days after they began; 0 keeps them until they are deleted."""
    context_tokens: Whole = 4096
    """Longest conversation, prompt and answer together."""
    slots: Whole = 4
    """How many written requests are answered at once; a spoken one has a slot besides."""
    queue: Whole = 32
    """How many more may wait; beyond that the answer is 503."""
    max_answer_tokens: Whole = 512
    """Longest answer unless the request says otherwise; with --public longest of all."""
    temperature: float = 0.3
    """Sampling temperature unless the request says otherwise."""
