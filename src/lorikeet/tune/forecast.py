"""What a run will take, before it starts: time, memory and disk, from a few measured micro-steps.

require_room_for_weights(base_folder, dtype, device)         # before anything is loaded
forecast = measure(scorer, rows, ...)                        # nothing is changed by it
forecast.require(config, run.root)                           # MachineError for what cannot fit
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorikeet.config import TuneConfig
from lorikeet.errors import InputError, MachineError
from lorikeet.files import require_disk
from lorikeet.prompt import Encoded
from lorikeet.run import free_bytes, resident_bytes
from lorikeet.tune import checkpoint
from lorikeet.tune.adapter import trained_parameters
from lorikeet.tune.batches import Batch, pack, read_tokens
from lorikeet.tune.fast import Scorer
from lorikeet.tune.loss import working_bytes

PROBES = 3
"""Micro-batches that are measured; the first of them warms up and is not timed."""

MARGIN = 1.1
"""What is measured and what is taken differ: allocators round up, and gradients come on top."""

FEW = 256
"""Tokens that are measured first, and half of them: they tell whether more may be tried."""

BESIDES = 300_000_000
"""Bytes that a CPU's libraries and allocator come to hold besides: without it 3.0 and 1.5 GB were forecast where a run of
SmolLM2 took 3.3, and one that computes activations again 1.8."""

SMALLEST_LENGTH = 64


class TooLargeError(MachineError):
    """The run does not fit into memory."""


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run is expected to take."""

    steps: int
    tokens_per_s: float
    seconds: float
    largest_tokens: int
    """Tokens of the largest micro-batch."""
    bytes_per_token: float
    """What is kept for the backward pass, with gradient checkpointing if the run has it."""
    checkpointed_bytes_per_token: float
    """The same with gradient checkpointing."""
    fixed_bytes: int
    """Weights, adapter, optimizer and program."""
    available_bytes: int
    """What this process may take, what it holds already included."""
    disk_bytes: int
    """Checkpoints and the adapter."""
    checkpoint_bytes: int
    """One checkpoint."""

    @property
    def memory_bytes(self) -> int:
        """The most that is expected to be held."""
        return self.at(self.largest_tokens, self.bytes_per_token)

    def at(self, tokens: int, each: float) -> int:
        """Return the memory for micro-batches of so many tokens."""
        return int(self.fixed_bytes + MARGIN * tokens * each)

    def sentence(self, config: TuneConfig) -> str:
        """Return the forecast for a person."""
        minutes = self.seconds / 60
        bound = f", bound to {config.max_minutes:g} min" if config.max_minutes and config.max_minutes < minutes else ""
        took = f"{minutes / 60:.1f} h" if minutes > 90 else f"{minutes:.1f} min"
        return (
            f"forecast: {took}{bound} ({self.steps} steps at {self.tokens_per_s:.0f} tokens/s), "
            f"{self.memory_bytes / 1e9:.1f} of {self.available_bytes / 1e9:.1f} GB of memory, "
            f"{self.disk_bytes / 1e9:.2f} GB of disk"
        )

    def require(self, config: TuneConfig, folder: Path) -> None:
        """Raise TooLargeError, or MachineError for the disk of `folder`, naming settings that would do, for what cannot fit."""
        self._require_disk(config, folder)
        if self.memory_bytes <= self.available_bytes:
            return
        raise TooLargeError(
            f"tuning needs about {self.memory_bytes / 1e9:.1f} GB of memory and {self.available_bytes / 1e9:.1f} GB are "
            f"free; {' or '.join(self._remedies(config)) or 'close other programs or choose a smaller model'}"
        )

    def _require_disk(self, config: TuneConfig, folder: Path) -> None:
        least = self.disk_bytes - (config.save_total_limit - 1) * self.checkpoint_bytes
        try:
            require_disk(folder, self.disk_bytes)
        except MachineError as error:
            if config.save_total_limit == 1:
                raise
            raise MachineError(f"{error}; --save-total-limit 1 needs {least / 1e9:.1f} GB") from error

    def _remedies(self, config: TuneConfig) -> list[str]:
        room = (self.available_bytes - self.fixed_bytes) / MARGIN
        found = []
        length = int(room / self.bytes_per_token) // SMALLEST_LENGTH * SMALLEST_LENGTH
        if length >= SMALLEST_LENGTH:
            found.append(f"--max-length {min(length, config.max_length)} would do")
        if not config.gradient_checkpointing and self.largest_tokens * self.checkpointed_bytes_per_token <= room:
            found.append("--gradient-checkpointing would do")
        return found


def available_bytes(device: torch.device) -> int:
    """Return the memory that this process may still take: the GPU's, else the machine's or the container's."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + unused
    return free_bytes()


def require_room_for_weights(folder: Path, dtype: torch.dtype, device: torch.device, *, in_4bit: bool) -> None:
    """Raise TooLargeError if the weights in `folder` alone do not fit into memory."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    per_weight = 0.6 if in_4bit else dtype.itemsize
    needed = int(stored / _stored_itemsize(folder) * per_weight)
    free = available_bytes(device)
    if needed > free:
        less = "--load-in-4bit" if device.type == "cuda" else "--dtype bfloat16"
        is_least = in_4bit or (device.type == "cpu" and dtype == torch.bfloat16)
        raise TooLargeError(
            f"the weights of {folder.name} take {needed / 1e9:.1f} GB and {free / 1e9:.1f} GB of memory are free; "
            f"close other programs or choose {'' if is_least else f'{less} or '}a smaller model"
        )


def _stored_itemsize(folder: Path) -> int:
    """Return the bytes of a stored weight. Raises InputError for a file of weights that cannot be read."""
    from safetensors import SafetensorError, safe_open

    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt") as opened:
                for name in opened.keys():  # noqa: SIM118  # it is no mapping
                    return {"F32": 4, "F64": 8}.get(str(opened.get_slice(name).get_dtype()), 2)
        except (OSError, SafetensorError) as error:
            raise InputError(f"{file} cannot be read ({error}); restore the model's files") from error
    return 2


def measure(
    scorer: Scorer, rows: Sequence[Encoded], config: TuneConfig, *, steps: int, validation_tokens: int
) -> Forecast:
    """Return the forecast of `steps` steps over `rows`, from micro-steps on some of them.

    Two short micro-batches tell what a token takes, and what is taken whatever their length; typical ones are tried only
    where they fit by that. Gradients and the state of every random generator are as before.
    """
    device = next(scorer.model.parameters()).device
    per_step = config.batch_size * config.gradient_accumulation_steps
    text = scorer.model.config.get_text_config()
    parameters = trained_parameters(scorer.model)
    weights = sum(parameter.numel() for parameter in parameters.values())
    # On a GPU only what lies there counts, and what is there already is not free any more.
    held = resident_bytes() if device.type == "cpu" else 0
    fixed = held + 12 * weights + working_bytes(text.vocab_size, scorer.dtype, device)
    fixed += BESIDES if device.type == "cpu" else 0
    free = held + available_bytes(device)

    longest = max(rows, key=lambda row: len(row.ids))
    little, half = (pack([_last_tokens(longest, count)]).to(device) for count in (FEW, FEW // 2))
    with scorer.probing([little]), _without_checkpointing(scorer.model):
        kept = [_kept_bytes(scorer, batch) for batch in (little, half)]
    more = little.row_tokens - half.row_tokens
    each = (kept[0] - kept[1]) / more if more else kept[0] / little.row_tokens
    constant = max(0, int(kept[0] - each * little.row_tokens))
    fixed += constant
    layers = int(text.num_hidden_layers)
    recomputed = layers * text.hidden_size * scorer.dtype.itemsize + each / layers
    taken = recomputed if config.gradient_checkpointing else each
    typical = scorer.pack(rows[: per_step * PROBES])
    batches = [batch.to(device) for batch in typical[len(typical) // 2 :][:PROBES]]
    fit = fixed + MARGIN * taken * max(batch.row_tokens for batch in batches) <= free
    batches = ((batches if fit else [little]) * PROBES)[:PROBES]
    with scorer.probing(batches):
        if fit and not config.gradient_checkpointing:
            taken = (_kept_bytes(scorer, batches[0]) - constant) / batches[0].row_tokens
        seconds = [_time_step(scorer, batch) for batch in batches]

    rate = sum(batch.tokens for batch in batches[1:]) / sum(seconds[1:])
    tokens_per_step = sum(len(row.ids) for row in rows) / len(rows) * per_step
    validations = 2 + steps // config.eval_steps
    # Forward alone takes about a third of a step.
    total_s = steps * tokens_per_step / rate + validations * validation_tokens / (3 * rate)
    lengths = sorted((len(row.ids) for row in rows), reverse=True)
    largest = max(lengths[0], min(scorer.packed_tokens, sum(lengths[:per_step])))
    one = checkpoint.size_bytes(parameters)
    disk = (config.save_total_limit + 2) * one + 4 * weights
    return Forecast(steps, rate, total_s, largest, taken, recomputed, fixed, free, disk, one)


def _last_tokens(row: Encoded, count: int) -> Encoded:
    """Return at most `count` tokens of a row, two at least, up to its last supervised one."""
    end = read_tokens(row) + 1
    part = slice(max(0, end - count), end)
    return Encoded(row.ids[part], row.supervised[part])


@contextmanager
def _without_checkpointing(model: Any) -> Iterator[None]:
    """Let the block keep for the backward pass all that it needs, whatever the run does."""
    parts = [part for part in model.modules() if getattr(part, "gradient_checkpointing", False)]
    try:
        for part in parts:
            part.gradient_checkpointing = False
        yield
    finally:
        for part in parts:
            part.gradient_checkpointing = True


def _kept_bytes(scorer: Scorer, batch: Batch) -> int:
    """Return how many bytes the forward pass of `batch` keeps for the backward pass, weights not counted."""
    weights = {p.untyped_storage().data_ptr() for p in scorer.model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # an output that is kept as it is would hold its own graph, which then is never freed

    def give(tensor: Any) -> Any:
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, give):
        loss = scorer.summed_loss(batch)
    total = sum(kept.values())
    del loss
    return total


def _time_step(scorer: Scorer, batch: Batch) -> float:
    """Return the seconds of one forward and backward pass."""
    began = time.perf_counter()
    scorer.summed_loss(batch).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
    if batch.ids.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
