"""The tuned model as the loop sees it: one call that scores a packed batch, by the fast path or the plain one.

    scorer = Scorer.build(model, config, dtype=dtype)
    scorer.summed_loss(batch).backward()

The fast path is the Hugging Face model with three parts swapped in: attention inside each document (`attention`), LoRA
on layers that share their input (`linear`), and cross-entropy in chunks (`loss`). Where a family or a method does not
allow a part, the plain one stays and `Scorer.plain` says why.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from torch.utils._triton import has_triton

from lorikeet.config import TuneConfig
from lorikeet.errors import causes, is_out_of_memory
from lorikeet.prompt import Encoded
from lorikeet.tune.adapter import trained_parameters
from lorikeet.tune.attention import Spans, use_document_attention, weights_kept, why_no_flash
from lorikeet.tune.batches import Batch, pack_all
from lorikeet.tune.linear import Masks, fuse_linears
from lorikeet.tune.loss import chunked_loss
from lorikeet.tune.native import load_attention

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma3_text")
"""Model types whose fast path is compared with their plain one by the tests, number against number."""

MEMORY_BUDGET = 0.9
"""Share of a compiled block's activations that is kept for the backward pass; the cheapest to compute again are not. Measured
on SmolLM2: 2.5 instead of 2.6 GB at the same speed; 0.8 takes 1.7 GB and a fifth of the speed."""

DEFAULT_COMPILER = "clang++" if sys.platform == "darwin" else "g++"
"""The one that torch.compile takes where CXX names none."""

COMPILER_SAYS = re.compile(r"(^|\s)(fatal )?error: |out of memory")
"""The line in which a compiler says what is wrong."""

LONGEST_REASON = 300
"""Of what a compiler says, so many characters are told to a person."""

KERNELS = 128
"""Compiled products that oneDNN keeps. With its own 1,024 memory grows as long as steps bring documents of other lengths."""

PREPARED = 64
"""Products that torch keeps prepared above oneDNN, which has a store of 1,024 too: the same growth, by 20 to 30 MB a step."""


class LastBlock:
    """The decoder's last block, whose MLP computes only what is scored; mixed into the class of a block.

    No other token's output is used, and about half of all tokens are not scored.
    """

    input_layernorm: Any
    self_attn: Any
    post_attention_layernorm: Any
    mlp: Any

    def forward(self, hidden_states: torch.Tensor, *, scored: torch.Tensor, **given: Any) -> torch.Tensor:
        """Return the block's output at the places `scored`, (1, tokens, size) -> (1, scored, size)."""
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **given)
        hidden_states = (hidden_states + attended)[:, scored]
        out: torch.Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


def shorten_last_block(block: Any) -> None:
    """Make the `block` of transformers a LastBlock, if it has the four parts that most families have, and no others."""
    if {name for name, _ in block.named_children()} == set(LastBlock.__annotations__):
        block.__class__ = type("LastBlock", (LastBlock, block.__class__), {})


def _cpp_compiler() -> str:
    """Return the C++ compiler that torch.compile takes."""
    return os.environ.get("CXX", DEFAULT_COMPILER)


def _no_compiler(device: torch.device) -> str:
    """Return what torch.compile needs on `device` and does not find here; '' if nothing."""
    if device.type == "cuda":
        if not has_triton():
            return "Triton, which compiles for a GPU, is not here, or the GPU is older than it supports (compute capability 7.0)"
        named = os.environ.get("CC", "")
        if not any(map(shutil.which, [named] if named else ["gcc", "clang"])):  # those that Triton looks for
            return f"there is no C compiler {named or 'gcc or clang'} (set CC, or on Debian, Ubuntu: apt-get install gcc python3-dev)"
    elif not shutil.which(compiler := _cpp_compiler()):
        return f"there is no C++ compiler {compiler} (set CXX, or on Debian, Ubuntu: apt-get install g++ python3-dev)"
    if not (Path(sysconfig.get_path("include")) / "Python.h").is_file():
        return "Python's headers are not here (Debian, Ubuntu: apt-get install python3-dev)"
    return ""


def _why_no_flash(base: Any, dtype: torch.dtype) -> str:
    """Return why attention on the GPU that the model `base` is on is not FlashAttention; '' if it is."""
    text = base.config.get_text_config()
    heads = text.num_attention_heads
    size = getattr(text, "head_dim", None) or text.hidden_size // heads
    windows = {0, getattr(text, "sliding_window", None) or 0}
    found = (
        why_no_flash(base.device, dtype, heads=heads, key_heads=text.num_key_value_heads, size=size, window=window)
        for window in sorted(windows)
    )
    return next(filter(None, found), "")


def _reason(error: BaseException) -> str:
    """Return in one line why compiling failed: what the compiler said, or the error's own first line."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return next((line for line in lines if COMPILER_SAYS.search(line)), lines[0])[:LONGEST_REASON]


def _is_compilers(error: BaseException) -> bool:
    """Say whether a compiler failed, a process of its own whose lack of memory is not this one's."""
    return any(isinstance(seen, subprocess.SubprocessError) or "CppCompileError" in str(seen) for seen in causes(error))


@dataclass
class Scorer:
    """A PEFT model and how a batch goes through it."""

    model: Any
    dtype: torch.dtype
    """What is computed in; float32 parameters of the adapter are cast to it."""
    fast: bool
    """Whether attention and loss are those of the fast path."""
    masks: Masks | None
    """Dropout of the fused LoRA layers; None where PEFT's own layers compute."""
    packed_tokens: int
    """Up to so many tokens of several conversations make one row; 0 on the plain path, where each is a row of its own: a
    family that is not known may have layers other than attention, which would go on from one conversation into the next."""
    native: bool = False
    """Whether attention is that of `attention.cpp`."""
    flash: bool = False
    """Whether attention is FlashAttention, on a GPU."""
    plain: list[str] = field(default_factory=list)
    """What is computed the plain way, each with its reason, for a person to read."""

    @classmethod
    def build(cls, model: Any, config: TuneConfig, *, dtype: torch.dtype) -> Scorer:
        """Swap the fast parts into the PEFT `model` where they can be, and return it."""
        os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", str(KERNELS))  # both are read at the first product
        os.environ.setdefault("LRU_CACHE_CAPACITY", str(PREPARED))
        base = model.get_base_model()
        kind = str(base.config.model_type)
        plain: list[str] = []
        fast = kind in FAMILIES
        flash = fast and base.device.type == "cuda"
        if fast:
            use_document_attention(base)
            shorten_last_block(base.get_decoder().layers[-1])
            if flash and (why_not := _why_no_flash(base, dtype)):
                flash = False
                plain.append(f"attention: {why_not}")
        else:
            plain.append(f"attention, LoRA and loss: {kind} is not one of {', '.join(FAMILIES)}")
        masks = None
        if fast and not config.use_dora and not config.load_in_4bit:
            masks = fuse_linears(model)
        elif fast:
            plain.append(f"LoRA: {'DoRA' if config.use_dora else 'a 4-bit base'} has layers of its own")
        return cls(model, dtype, fast, masks, config.max_length if fast else 0, flash=flash, plain=plain)

    @property
    def shares(self) -> bool:
        """Whether what all conversations of a micro-batch start with may stand in it once."""
        return self.fast and not self.flash

    def pack(self, rows: Sequence[Encoded]) -> list[Batch]:
        """Return the rows in micro-batches as this path takes them."""
        return pack_all(rows, max_tokens=self.packed_tokens, share=self.shares)

    def compile(self, batch: Batch, *, native: bool = True) -> str:
        """Compile the decoder's blocks and, if `native`, attention, now, for micro-batches such as `batch`; return ''.

        Where blocks cannot be compiled, return why and leave all; where attention cannot, `plain` gets why. Gradients and
        the state of every random generator are as before. The same batch gives the same code.
        """
        if not self.fast:
            return "only blocks of the fast path are compiled"
        device = next(self.model.parameters()).device
        if why_not := _no_compiler(device):
            return why_not
        plain = list(self.plain)
        if native and device.type == "cpu" and sys.platform == "linux":
            why_not = load_attention(_cpp_compiler())
            self.native = not why_not
            self.plain += [f"attention: {why_not}"] if why_not else []
        from torch._functorch import config as partitioner

        partitioner.activation_memory_budget = MEMORY_BUDGET
        # A last block has a graph of its own, which would take seconds to compile for one block.
        blocks = [b for b in self.model.get_base_model().get_decoder().layers if not isinstance(b, LastBlock)]
        for block in blocks:
            block.compile(dynamic=True)
        try:
            batch = batch.to(device)
            with self.probing([batch]):
                self.summed_loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
                self.mean_loss([batch], device=device)
        except Exception as error:  # whatever compilers, and what torch does with them, raise
            if is_out_of_memory(error) and not _is_compilers(error):
                raise
            for block in blocks:
                block._compiled_call_impl = None
            self.native, self.plain = False, plain
            return _reason(error)
        return ""

    @contextmanager
    def probing(self, batches: Sequence[Batch]) -> Iterator[None]:
        """Let the block score `batches` in training mode; then gradients, mode and random generators are as before."""
        device, was_training = batches[0].ids.device, self.model.training
        self.model.train()
        try:
            with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
                self.start_step(batches)
                yield
        finally:
            self.model.train(was_training)
            for parameter in trained_parameters(self.model).values():
                parameter.grad = None

    def summed_loss(self, batch: Batch) -> torch.Tensor:
        """Return the sum over the batch's supervised tokens of -ln p(token), in nats, float32, shape ().

        A step divides the sum of its micro-batches by their supervised tokens, so that every token weighs the same
        whichever micro-batch it is in.
        """
        base = self.model.get_base_model()
        given: dict[str, Any] = {"input_ids": batch.ids, "position_ids": batch.positions, "use_cache": False}
        mixed = self.masks is None and self.dtype != torch.float32
        with torch.autocast(batch.ids.device.type, self.dtype) if mixed else nullcontext():
            if not self.fast:
                logits = self.model(**given, logits_to_keep=batch.scored).logits[0]
                return functional.cross_entropy(logits.float(), batch.labels, reduction="sum")
            spans = Spans.of(batch.documents, batch.ids.device) if self.flash else None
            room = 0 if self.flash else weights_kept(batch.documents)
            given |= {"documents": batch.documents, "room": room, "native": self.native, "spans": spans}
            given["scored"] = batch.scored
            hidden = base.get_decoder()(**given).last_hidden_state[0]
            if len(hidden) != len(batch.scored):  # where the last block computes all, and not all is scored
                hidden = hidden[batch.scored]
        head = base.get_output_embeddings().weight
        return chunked_loss(hidden.to(head.dtype), head, batch.labels)

    def start_step(self, batches: Sequence[Batch]) -> None:
        """Draw new dropout for the micro-batches of a step."""
        if self.masks is not None:
            self.masks.draw(max(b.row_tokens for b in batches), dtype=self.dtype, device=batches[0].ids.device)

    @torch.no_grad()
    def mean_loss(self, batches: Sequence[Batch], *, device: torch.device) -> float:
        """Return the mean of -ln p over all supervised tokens of `batches`, in nats, the model in evaluation mode."""
        was_training = self.model.training
        self.model.eval()
        try:
            total = sum(self.summed_loss(batch.to(device)).item() for batch in batches)
        finally:
            self.model.train(was_training)
        return total / sum(len(batch.labels) for batch in batches)
