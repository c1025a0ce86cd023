"""LoRA on linear layers that share their input, as few large products.

    masks = fuse_linears(model)     # a PEFT model; parameters keep their names, values and places
    masks.draw(tokens, ...)         # before each step: new dropout

`q_proj`, `k_proj` and `v_proj` read the same input, and so do `gate_proj` and `up_proj`: their frozen weights become
views of one matrix, so a block multiplies by four frozen matrices instead of seven, and dropout masks four inputs
instead of seven. The backward pass is written out: frozen weights get no gradient, the adapter's part is added in
place, and nothing is cast but the adapter's own small matrices. LoRA: Hu et al., 2021, arXiv 2106.09685.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that read the same input, in the order in which the parent calls them."""

ADAPTER = "default"
"""PEFT's name of the adapter that is tuned."""

POOL_USES = 4
"""The pool of dropout masks holds so many times what its largest use takes."""


class Masks:
    """Dropout masks for one step: windows, at random places, of one pool of independent draws.

    Within an input every element is dropped independently, as in `torch.nn.Dropout`; between inputs windows may overlap.
    Drawing each mask for itself took 16 % of a step, the pool takes under 1 %.
    """

    def __init__(self, probability: float, *, widest: int) -> None:
        """Drop elements with `probability`, in [0, 1), and scale the others; no input is wider than `widest`."""
        self.probability, self.widest = probability, widest
        self.pool = torch.empty(0)

    def draw(self, tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Draw a new pool for inputs of at most `tokens` rows."""
        if self.probability:
            ones = torch.ones(POOL_USES * tokens * self.widest, dtype=dtype, device=device)
            self.pool = functional.dropout(ones, self.probability)

    def like(self, x: torch.Tensor) -> torch.Tensor:
        """Return a mask of the shape of `x`: 0 or 1 / (1 - probability)."""
        first = int(torch.randint(self.pool.numel() - x.numel() + 1, ()))
        return self.pool[first : first + x.numel()].view(x.shape)


class SharedInput:
    """LoRA layers that read one input; the first that is called computes all."""

    def __init__(self, layers: list[LoraLinear], masks: Masks) -> None:
        """Take PEFT's layers; their frozen weights become views of one matrix."""
        self.layers, self.masks = layers, masks
        bases = [layer.base_layer for layer in layers]
        self.sizes = [base.out_features for base in bases]
        self.weight = torch.cat([base.weight.data for base in bases])
        self.bias = torch.cat([base.bias.data for base in bases]) if bases[0].bias is not None else None
        for base, part in zip(bases, torch.split(self.weight, self.sizes), strict=True):
            base.weight.data = part
        self.waiting: list[torch.Tensor] = []

    def call(self, index: int, x: torch.Tensor) -> torch.Tensor:
        """Return the output of the layer at `index` for the input `x`, (..., in) -> (..., out)."""
        if index == 0:
            self.waiting = list(self.compute(x))[::-1]
        return self.waiting.pop()

    def compute(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the outputs of all layers."""
        a = torch.cat([layer.lora_A[ADAPTER].weight for layer in self.layers]).to(x.dtype)
        parts = [layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER] for layer in self.layers]
        b = torch.block_diag(*parts).to(x.dtype)  # type: ignore[no-untyped-call]  # torch leaves it unannotated
        rows = x.reshape(-1, x.shape[-1])
        mask = self.masks.like(rows) if self.masks.probability and self.layers[0].training else None
        y: torch.Tensor = _LoraProduct.apply(rows, self.weight, self.bias, a, b, mask)  # type: ignore[no-untyped-call]  # as above
        return torch.split(y.view(*x.shape[:-1], -1), self.sizes, -1)


class _LoraProduct(torch.autograd.Function):
    """x @ weight^T + bias + (x * mask) @ a^T @ b^T.

    Shapes: x and mask (tokens, in), weight (out, in), bias (out,), a (rank, in), b (out, rank); all of one type.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> torch.Tensor:
        dropped = x if mask is None else x * mask
        inner = dropped @ a.t()
        ctx.save_for_backward(dropped, inner, weight, a, b, mask)
        return functional.linear(x, weight, bias).addmm_(inner, b.t())

    @staticmethod
    def backward(ctx: Any, upper: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        dropped, inner, weight, a, b, mask = ctx.saved_tensors
        d_inner = upper @ b
        d_x = upper @ weight
        if mask is None:
            d_x.addmm_(d_inner, a)
        else:
            d_x.addcmul_(d_inner @ a, mask)
        return d_x, None, None, d_inner.t() @ dropped, upper.t() @ inner, None


def fuse_linears(model: nn.Module) -> Masks:
    """Make every LoRA layer of the PEFT `model` compute with those that share its input; return their dropout.

    Raises ValueError if a layer is not plain LoRA on an ordinary linear layer.
    """
    found = [layer for layer in model.modules() if isinstance(layer, LoraLinear)]
    for layer in found:
        if layer.use_dora.get(ADAPTER) or type(layer.base_layer) is not nn.Linear or layer.fan_in_fan_out:
            raise ValueError(f"{layer} is not plain LoRA on a linear layer")
    dropout = found[0].lora_dropout[ADAPTER]
    widest = max(layer.base_layer.in_features for layer in found)
    masks = Masks(dropout.p if isinstance(dropout, nn.Dropout) else 0.0, widest=widest)
    for parent in list(model.modules()):
        children = {name: child for name, child in parent.named_children() if isinstance(child, LoraLinear)}
        for names in TOGETHER:
            if all(name in children for name in names) and _alike([children[name] for name in names]):
                _share([children.pop(name) for name in names], masks)
        for child in children.values():
            _share([child], masks)
    return masks


def _alike(layers: list[LoraLinear]) -> bool:
    """Return whether all have a bias or none has."""
    return len({layer.base_layer.bias is None for layer in layers}) == 1


def _share(layers: list[LoraLinear], masks: Masks) -> None:
    group = SharedInput(layers, masks)
    for index, layer in enumerate(layers):
        layer.forward = lambda x, index=index: group.call(index, x)
