"""What a run will take, before it starts: time, memory and disk, from a few measured micro-steps.

require_room_for_weights(base_folder, dtype, device)         # before anything is loaded
forecast = measure(scorer, rows, ...)                        # nothing is changed by it
forecast.require(config, run.root)                           # MachineError for what cannot fit
"""

from __future__ import annotations

import time
from collections.abc import Sequence
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
from lorikeet.tune.batches import Batch, pack_all
from lorikeet.tune.fast import Scorer
from lorikeet.tune.loss import CHUNK

PROBES = 3
"""Micro-batches that are measured; the first of them warms up and is not timed."""

MARGIN = 1.1
"""What is measured and what is taken differ: allocators round up, and gradients come on top."""

SMALLEST_LENGTH = 64


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a run is expected to take."""

    steps: int
    tokens_per_s: float
    seconds: float
    largest_tokens: int
    """Tokens of the largest micro-batch."""
    bytes_per_token: float
    """What the forward pass keeps for the backward pass."""
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
        """Raise MachineError, naming settings that would do, if memory or the disk of `folder` is too small."""
        self._require_disk(config, folder)
        if self.memory_bytes <= self.available_bytes:
            return
        raise MachineError(
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
        return int(torch.cuda.mem_get_info(device)[0])
    return free_bytes()


def require_room_for_weights(folder: Path, dtype: torch.dtype, device: torch.device, *, in_4bit: bool) -> None:
    """Raise MachineError if the weights in `folder` alone do not fit into memory."""
    stored = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    per_weight = 0.6 if in_4bit else dtype.itemsize
    needed = int(stored / _stored_itemsize(folder) * per_weight)
    free = available_bytes(device)
    if needed > free:
        less = "--load-in-4bit" if device.type == "cuda" else "--dtype bfloat16"
        is_least = in_4bit or (device.type == "cpu" and dtype == torch.bfloat16)
        raise MachineError(
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

    Gradients and the state of every random generator are as before.
    """
    device = next(scorer.model.parameters()).device
    per_step = config.batch_size * config.gradient_accumulation_steps
    typical = pack_all(rows[: per_step * PROBES], max_tokens=scorer.packed_tokens, share=scorer.fast)
    batches = [batch.to(device) for batch in typical[len(typical) // 2 :][:PROBES]]
    batches = (batches * PROBES)[:PROBES]
    parameters = trained_parameters(scorer.model)
    held = resident_bytes()
    devices = [device] if device.type == "cuda" else []
    was_training = scorer.model.training
    scorer.model.train()
    with torch.random.fork_rng(devices=devices):
        scorer.start_step(batches)
        kept = _kept_bytes(scorer, batches[0])
        seconds = [_time_step(scorer, batch) for batch in batches]
    for parameter in parameters.values():
        parameter.grad = None
    scorer.model.train(was_training)
    rate = sum(batch.tokens for batch in batches[1:]) / sum(seconds[1:])
    tokens_per_step = sum(len(row.ids) for row in rows) / len(rows) * per_step
    validations = 2 + steps // config.eval_steps
    # Forward alone takes about a third of a step.
    total_s = steps * tokens_per_step / rate + validations * validation_tokens / (3 * rate)
    lengths = sorted((len(row.ids) for row in rows), reverse=True)
    largest = max(lengths[0], min(scorer.packed_tokens, sum(lengths[:per_step])))
    text = scorer.model.config.get_text_config()
    each = kept / batches[0].row_tokens
    layers = int(text.num_hidden_layers)
    recomputed = layers * text.hidden_size * scorer.dtype.itemsize + each / layers
    weights = sum(parameter.numel() for parameter in parameters.values())
    logits = CHUNK * text.vocab_size * scorer.dtype.itemsize
    # On a GPU only what lies there counts, and of that what is there already is not free any more.
    fixed = (held if device.type == "cpu" else 0) + 12 * weights + logits
    free = available_bytes(device) + (held if device.type == "cpu" else 0)
    one = checkpoint.size_bytes(parameters)
    disk = (config.save_total_limit + 2) * one + 4 * weights
    return Forecast(steps, rate, total_s, largest, each, recomputed, fixed, free, disk, one)


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
