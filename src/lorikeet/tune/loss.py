"""Cross-entropy at the supervised tokens, and nowhere else.

Logits are computed only where they are scored, so the full (tokens, vocabulary) array never exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from lorikeet.tune.batches import Batch


def summed_loss(model: Any, batch: Batch, *, autocast_dtype: torch.dtype) -> torch.Tensor:
    """Return the sum over the batch's supervised tokens of -ln p(token), in nats, float32, shape ().

    A step divides the sum of its micro-batches by their supervised tokens, so that every token weighs the same
    whichever micro-batch it is in.
    """
    device = batch.ids.device.type
    with torch.autocast(device, autocast_dtype, enabled=autocast_dtype != torch.float32):
        logits = model(
            input_ids=batch.ids, position_ids=batch.positions, use_cache=False, logits_to_keep=batch.scored
        ).logits
    return functional.cross_entropy(logits[0].float(), batch.labels, reduction="sum")


@torch.no_grad()
def mean_loss(model: Any, batches: Sequence[Batch], *, autocast_dtype: torch.dtype) -> float:
    """Return the mean of -ln p over all supervised tokens of `batches`, in nats, the model in evaluation mode."""
    was_training = model.training
    model.eval()
    try:
        total = sum(summed_loss(model, batch, autocast_dtype=autocast_dtype).item() for batch in batches)
    finally:
        model.train(was_training)
    return total / sum(len(batch.labels) for batch in batches)
