"""AdamW over the adapter's parameters, with its moments in 32 or in 8 bits.

optimizer = make_optimizer(parameters, config)
"""

from __future__ import annotations

import torch

from lorikeet.config import TuneConfig
from lorikeet.errors import MissingExtraError


def make_optimizer(parameters: dict[str, torch.nn.Parameter], config: TuneConfig) -> torch.optim.Optimizer:
    """Return the optimizer of `config.optim` (AdamW: Loshchilov and Hutter, 2017, arXiv 1711.05101).

    Each of its groups has a key `scale`: what the step's learning rate is multiplied by (LoRA+ speeds up B).
    Raises MissingExtraError if bitsandbytes is asked for and not installed.
    """
    faster = [p for name, p in parameters.items() if ".lora_B." in name]
    others = [p for name, p in parameters.items() if ".lora_B." not in name]
    groups = [{"params": others, "scale": 1.0}, {"params": faster, "scale": config.loraplus_lr_ratio}]
    if config.optim == "adamw_8bit":
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise MissingExtraError("bitsandbytes", "gpu") from error
        made: torch.optim.Optimizer = AdamW8bit(groups, lr=config.learning_rate, weight_decay=config.weight_decay)
        return made
    return torch.optim.AdamW(groups, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of the next step in every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["scale"]
