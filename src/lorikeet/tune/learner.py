"""What learns: the base with its adapter, the optimizer, and a step of them.

learner = Learner.load(config, base_folder)
loss = learner.step(batches, rate=2e-4)
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lorikeet.config import TuneConfig
from lorikeet.tune.adapter import apply_lora, load_base, pick_device, pick_dtype, trained_parameters
from lorikeet.tune.batches import Batch
from lorikeet.tune.fast import Scorer
from lorikeet.tune.forecast import require_room_for_weights
from lorikeet.tune.optimizer import make_optimizer, set_learning_rate


@dataclass(frozen=True, slots=True)
class Learner:
    """A model that is being tuned, and all that a step of it changes."""

    config: TuneConfig
    model: Any
    """A PEFT model."""
    parameters: dict[str, torch.nn.Parameter]
    """What is trained, float32."""
    start: dict[str, torch.Tensor] | None
    """The parameters before the first step, where the adapter is saved as the difference from them (PiSSA)."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    """Scales the loss in float16; does nothing in other types."""
    scorer: Scorer
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def load(cls, config: TuneConfig, base_folder: Path) -> Learner:
        """Return the base with a new adapter, by the configured seed. Raises MachineError where its weights have no room."""
        device = pick_device()
        dtype = pick_dtype(config.dtype, device)
        _compute_repeatably(device)
        torch.manual_seed(config.seed)
        require_room_for_weights(base_folder, dtype, device, in_4bit=config.load_in_4bit)
        model = apply_lora(load_base(base_folder, dtype, device, in_4bit=config.load_in_4bit), config)
        parameters = trained_parameters(model)
        keeps_start = config.init_lora_weights == "pissa"
        scorer = Scorer.build(model, config, dtype=dtype)
        if device.type == "cuda" and not scorer.fast:  # an unknown model may need what a GPU can only sum in any order
            torch.use_deterministic_algorithms(True, warn_only=True)
        return cls(
            config,
            model,
            parameters,
            {name: p.detach().clone() for name, p in parameters.items()} if keeps_start else None,
            make_optimizer(parameters, config),
            torch.amp.GradScaler(device.type, enabled=dtype == torch.float16),
            scorer,
            device,
            dtype,
        )

    @property
    def precision(self) -> str:
        """The name of the type that is computed in."""
        return str(self.dtype).removeprefix("torch.")

    @property
    def gpu(self) -> dict[str, Any]:
        """The GPU's `name` and the most memory taken on it so far, `peak_bytes`; empty on a CPU."""
        if self.device.type != "cuda":
            return {}
        return {
            "name": torch.cuda.get_device_name(self.device),
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
        }

    def step(self, batches: Sequence[Batch], *, rate: float) -> float:
        """Learn from a step's micro-batches at the learning rate `rate`; return the mean loss of a token, in nats.

        Every supervised token weighs the same. Where the loss is no finite number, nothing is learned.
        """
        batches = [batch.to(self.device) for batch in batches]
        supervised = sum(len(batch.labels) for batch in batches)
        loss = 0.0
        self.scorer.start_step(batches)
        for batch in batches:
            partial = self.scorer.summed_loss(batch) / supervised
            self.scaler.scale(partial).backward()  # type: ignore[no-untyped-call]  # torch leaves it unannotated
            loss += partial.item()
        if loss < float("inf"):
            self.scaler.unscale_(self.optimizer)
            torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.config.max_grad_norm)
            set_learning_rate(self.optimizer, rate)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return loss


def _compute_repeatably(device: torch.device) -> None:
    """Let a GPU add up in the same order every time, as a CPU does; must come before its first product."""
    if device.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # With warn_only=True the backward pass of FlashAttention would stay as it is.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a module of its own kind
