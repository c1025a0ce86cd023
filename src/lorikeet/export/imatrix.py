"""The importance matrix: how much each column of each weight matters, from what the user's own conversations put through it.

    importance = collect(folder, rows, name_of=namer(folder), dtype="bfloat16")    # rows: token ids of conversations
    importance.of("blk.0.ffn_down.weight")                                         # mean squared input of each column
    importance.save(path, dataset="calibration.jsonl")                             # what llama-imatrix writes

An error in a weight changes the output by the error times the input, so its square counts by the mean square of the
input: llama.cpp's definition. The model runs in torch, one conversation at a time and without its head; what is kept is
one sum for each column. It knows neither block types nor run folders.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import GGUFReader, GGUFWriter
from numpy.typing import NDArray

from lorikeet.errors import InputError
from lorikeet.export.budget import Clock
from lorikeet.weights import quiet_transformers

MAX_TOKENS = 8192
"""Tokens that are run through the model at most; see docs/decisions/0004-quantisation.md for what more would give."""

LEAST_CONVERSATIONS = 16
"""So many are run whatever the budget of time; they already lower KL, see docs/decisions/0004-quantisation.md."""

MAX_LENGTH = 2048
"""Longest part of one conversation that is run, in tokens."""

FILE = "imatrix.gguf"

Progress = Callable[[int, int], None]
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Importance:
    """Sums of squared inputs, by llama.cpp's name of the weight."""

    sums: dict[str, NDArray[np.float32]]
    """Shape (columns,) each."""
    counts: dict[str, int]
    """Over how many tokens each was summed; 0 for a weight that nothing went through."""
    conversations: int

    def of(self, name: str) -> NDArray[np.float32] | None:
        """Return the mean squared input of each column, shape (columns,), or None if nothing is known of this weight."""
        count = self.counts.get(name, 0)
        return self.sums[name] / np.float32(count) if count else None

    @property
    def tokens(self) -> int:
        """How many tokens went through the busiest weight."""
        return max(self.counts.values(), default=0)

    def save(self, path: Path, *, dataset: str) -> None:
        """Write the matrix as llama.cpp's `llama-imatrix` does; `dataset` names what it was collected from."""
        writer = GGUFWriter(path, arch="")
        try:
            writer.kv_data[0].clear()  # no architecture: it is no model
            writer.add_type("imatrix")
            writer.add_array("imatrix.datasets", [dataset])
            writer.add_uint32("imatrix.chunk_count", self.conversations)
            writer.add_uint32("imatrix.chunk_size", max(1, self.tokens // max(1, self.conversations)))
            for name in sorted(self.sums):
                writer.add_tensor(f"{name}.in_sum2", self.sums[name])
                writer.add_tensor(f"{name}.counts", np.array([self.counts[name]], dtype=np.float32))
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_tensors_to_file()
        finally:
            writer.close()

    @classmethod
    def load(cls, path: Path) -> Importance:
        """Return the matrix in a file that `save` or `llama-imatrix` wrote. Raises InputError if it is none."""
        try:
            reader = GGUFReader(path)
            conversations = int(reader.fields["imatrix.chunk_count"].parts[-1][0])
            found = {tensor.name: np.array(tensor.data, dtype=np.float32).reshape(-1) for tensor in reader.tensors}
            names = [name.removesuffix(".in_sum2") for name in found if name.endswith(".in_sum2")]
            counts = {name: int(found[f"{name}.counts"].max()) for name in names}
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"{path} is not an importance matrix ({error}); remove it and export again") from error
        return cls({name: found[f"{name}.in_sum2"] for name in names}, counts, conversations)

    def describe(self, writer: GGUFWriter) -> None:
        """Add what llama.cpp writes into a file that was quantised with an importance matrix."""
        writer.add_string("quantize.imatrix.file", FILE)
        writer.add_uint32("quantize.imatrix.entries_count", len(self.sums))
        writer.add_uint32("quantize.imatrix.chunks_count", self.conversations)


def collect(
    folder: Path,
    rows: Sequence[Sequence[int]],
    *,
    name_of: Callable[[str], str | None],
    dtype: str,
    budget_s: float = math.inf,
    progress: Progress = lambda *_: None,
    say: Say = lambda _: None,
) -> Importance:
    """Run the model in `folder` on `rows` of token ids, up to `MAX_TOKENS`, and return the matrix of its linear layers.

    The first `LEAST_CONVERSATIONS` are always run; at their rate, as many more as fit into `budget_s` follow. `say` is told
    how many, at what rate. `name_of` gives llama.cpp's name of a weight; the head is left out, as llama.cpp leaves it. `dtype`
    is what the model computes in. Raises InputError if an input is not finite.
    """
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = torch.float32 if (device, dtype) == ("cpu", "float16") else getattr(torch, dtype)
    loaded: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=precision, local_files_only=True)
    model = loaded.to(device).eval()
    named = {name_of(f"{name}.weight") or "": module for name, module in model.named_modules()}
    linear = {name: module for name, module in named.items() if _is_layer(name, module)}
    sums = {name: torch.zeros(module.in_features, device=device) for name, module in linear.items()}
    counts = dict.fromkeys(linear, 0)
    conversations = 0
    with _watched(linear, sums, counts), torch.inference_mode():
        for ids in _within(_up_to(rows, MAX_TOKENS), Clock(seconds=budget_s), progress, say):
            model.base_model(input_ids=torch.tensor([ids], device=device), use_cache=False)
            conversations += 1
    for name, total in sums.items():
        if not bool(torch.isfinite(total).all()):
            raise InputError(f"{folder}: the inputs of {name} are not finite; the model is broken")
    return Importance({name: total.cpu().numpy() for name, total in sums.items()}, counts, conversations)


def _within(rows: Sequence[Sequence[int]], clock: Clock, progress: Progress, say: Say) -> Iterator[Sequence[int]]:
    """Yield the first rows, and as many of the others as fit into the clock's time; each is run before the next is asked for."""
    costs = [len(row) for row in rows]
    count = len(rows)
    for done, row in enumerate(rows, start=1):
        if done > count:
            return
        yield row
        clock.tick(len(row))
        if done == min(LEAST_CONVERSATIONS, len(rows)):
            count = done + clock.fit(costs[done:])
            say(_plan(done, count, costs, clock))
        progress(done, count)


def _plan(done: int, count: int, costs: Sequence[int], clock: Clock) -> str:
    """Say what is run, at what rate, how long that takes, and how long all of the conversations would."""
    rate = f"{clock.tokens_per_s:.0f} tokens/s" if math.isfinite(clock.tokens_per_s) else "one conversation"
    left_s = clock.needs_s(sum(costs[done:count]))
    line = f"importance matrix: {count} of {len(costs)} conversations, {rate}, {left_s:.0f} s left"
    if count == len(costs):
        return line
    whole_s = clock.spent_s + clock.needs_s(sum(costs[done:]))
    return f"{line}; all of them would take {whole_s:.0f} s"


def _up_to(rows: Sequence[Sequence[int]], tokens: int) -> list[Sequence[int]]:
    """Return the first rows, each cut to `MAX_LENGTH`, that have `tokens` tokens together; at least one if there is one."""
    chosen: list[Sequence[int]] = []
    for row in rows:
        cut = row[:MAX_LENGTH]
        if chosen and len(cut) > tokens:
            break
        chosen.append(cut)
        tokens -= len(cut)
    return chosen


def _is_layer(name: str, module: Any) -> bool:
    return name.startswith("blk.") and isinstance(module, torch.nn.Linear)


@contextmanager
def _watched(modules: dict[str, Any], sums: dict[str, torch.Tensor], counts: dict[str, int]) -> Iterator[None]:
    """Add the squares of what goes into each module to its sums, as long as the block runs."""

    def watch(name: str) -> Callable[[Any, tuple[torch.Tensor, ...]], None]:
        def add(_: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            flat = inputs[0].reshape(-1, inputs[0].shape[-1]).float()
            sums[name] += flat.square().sum(dim=0)
            counts[name] += len(flat)

        return add

    hooks = [module.register_forward_pre_hook(watch(name)) for name, module in modules.items()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
