"""LoRA on linear layers that share their input, as few large products.

    masks = fuse_linears(model)     # a PEFT model; parameters keep their names, values and places
    masks.draw(tokens, ...)         # before each step: new dropout

`q_proj`, `k_proj` and `v_proj` read the same input, and so do `gate_proj` and `up_proj`: their frozen weights become
views of one matrix, so a block multiplies by four frozen matrices instead of seven, and dropout masks four inputs
instead of seven. Their A are one matrix, too; each B multiplies its own part of what A gives. The backward pass is written out: frozen weights get no gradient, the adapter's part is added in
place, and nothing is cast but the adapter's own small matrices. LoRA: Hu et al., 2021, arXiv 2106.09685.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import nn
from torch.nn import functional

TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one parent that read the same input, in the order in which the parent calls them."""

ADAPTER = "default"
"""PEFT's name of the adapter that is tuned."""

POOL_USES = 2
"""The pool of dropout masks holds so many times what its largest use takes."""


class Masks:
    """Dropout masks for one step: windows of one pool of independent draws, which each step draws anew.

    Within an input every element is dropped independently, as in `torch.nn.Dropout`; between inputs windows may overlap.
    Drawing each mask for itself took 16 % of a step, the pool takes half a percent. Probabilities are multiples of 2^-16.
    """

    def __init__(self, probability: float, *, widest: int) -> None:
        """Drop elements with `probability`, in [0, 1), and scale the others; no input is wider than `widest`."""
        self.probability, self.widest = probability, widest
        self.pool = torch.empty(0)

    def draw(self, tokens: int, *, dtype: torch.dtype, device: torch.device) -> None:
        """Draw a new pool for inputs of at most `tokens` rows."""
        if self.probability:
            size = POOL_USES * tokens * self.widest
            bits = torch.empty(-(-size // 4), dtype=torch.int64, device=device).random_(-(2**63), None)
            draws = bits.view(torch.int16)[:size]  # four of one number: drawing takes less than half of the time
            kept = draws >= round(self.probability * 2**16) - 2**15
            self.pool = kept.to(dtype).mul_(1 / (1 - self.probability))


def window(pool: torch.Tensor, place: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return the mask at `place`, in [0, 1), of the pool: 0 or 1 / (1 - probability), in the shape of `x`."""
    first = int(float(place) * (pool.numel() - x.numel()))
    return pool[first : first + x.numel()].view(x.shape)


class SharedInput:
    """LoRA layers that read one input; the first that is called computes all."""

    def __init__(self, layers: list[LoraLinear], masks: Masks, *, place: float) -> None:
        """Take PEFT's layers, whose frozen weights become views of one matrix, and where their masks are taken from."""
        self.layers, self.masks = layers, masks
        self.place = torch.tensor(place, dtype=torch.float64)
        bases = [layer.base_layer for layer in layers]
        self.sizes = [base.out_features for base in bases]
        self.mask_again = bases[0].in_features > sum(self.sizes)
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
        b = torch.cat([layer.lora_B[ADAPTER].weight * layer.scaling[ADAPTER] for layer in self.layers]).to(x.dtype)
        drops = bool(self.masks.probability) and self.layers[0].training
        pool = self.masks.pool if drops else None
        rows = x.reshape(-1, x.shape[-1])
        y, _, _ = _product(rows, self.weight, self.bias, a, b, self.sizes, pool, self.place, self.mask_again)
        return torch.split(y.view(*x.shape[:-1], -1), self.sizes, -1)


class SharedLinear(LoraLinear):  # type: ignore[misc]  # PEFT ships no types
    """PEFT's LoRA layer, computing with those that share its input."""

    group: SharedInput
    index: int

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the layer's output, (..., in) -> (..., out)."""
        return self.group.call(self.index, x)


def _parts(sizes: list[int], rank: int) -> list[tuple[slice, slice]]:
    """Return where each layer's outputs are among those of all, and its rows of `a` among all."""
    ends = list(itertools.accumulate(sizes))
    return [
        (slice(end - size, end), slice(rank * place, rank * (place + 1)))
        for place, (size, end) in enumerate(zip(sizes, ends, strict=True))
    ]


@torch.library.custom_op("lorikeet::lora_product", mutates_args=())
def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    a: torch.Tensor,
    b: torch.Tensor,
    sizes: list[int],
    pool: torch.Tensor | None,
    place: torch.Tensor,
    mask_again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return x @ weight^T + bias + (x * mask) @ a^T @ b^T, (x * mask) @ a^T, and x * mask.

    `a` and `b` hold those of several layers one below the other, each layer with `sizes` outputs, and a layer's a meets
    its own b alone.

    The mask is that of `pool` at `place`; without a pool there is none. The third is empty without a mask, and with
    `mask_again`, which has the backward pass multiply again: for wide inputs that costs less than keeping the product.
    Shapes: x (tokens, in), weight (out, in), bias (out,), a (layers * rank, in), b (out, rank); all of one type.
    """
    masked = x if pool is None else x * window(pool, place, x)
    inner = masked @ a.t()
    kept = x.new_empty(0) if pool is None or mask_again else masked
    y = functional.linear(x, weight, bias)
    for outputs, ranks in _parts(sizes, b.shape[1]):
        y[:, outputs].addmm_(inner[:, ranks], b[outputs].t())
    return y, inner, kept


@_product.register_fake
def _(
    x: torch.Tensor,
    weight: torch.Tensor,
    _bias: torch.Tensor | None,
    a: torch.Tensor,
    _b: torch.Tensor,
    _sizes: list[int],
    pool: torch.Tensor | None,
    _place: torch.Tensor,
    mask_again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    kept = x.new_empty(0) if pool is None or mask_again else torch.empty_like(x)
    return x.new_empty(x.shape[0], weight.shape[0]), x.new_empty(x.shape[0], a.shape[0]), kept


@torch.library.custom_op("lorikeet::lora_product_backward", mutates_args=())
def _backward(
    upper: torch.Tensor,
    kept: torch.Tensor,
    inner: torch.Tensor,
    weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    pool: torch.Tensor | None,
    place: torch.Tensor,
    sizes: list[int],
    mask_again: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of x, a and b; `kept` is x where there is no mask or it is applied again, else x * mask."""
    d_inner, d_b = torch.empty_like(inner), torch.empty_like(b)
    for outputs, ranks in _parts(sizes, b.shape[1]):
        torch.mm(upper[:, outputs], b[outputs], out=d_inner[:, ranks])
        torch.mm(upper[:, outputs].t(), inner[:, ranks], out=d_b[outputs])
    d_x = upper @ weight
    masked = kept
    if pool is None:
        d_x.addmm_(d_inner, a)
    else:
        mask = window(pool, place, kept)
        d_x.addcmul_(d_inner @ a, mask)
        masked = kept * mask if mask_again else kept
    return d_x, d_inner.t() @ masked, d_b


@_backward.register_fake
def _(
    _upper: torch.Tensor,
    kept: torch.Tensor,
    _inner: torch.Tensor,
    _weight: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(kept), torch.empty_like(a), torch.empty_like(b)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor, torch.Tensor]) -> None:
    x, weight, _, a, b, ctx.sizes, pool, place, ctx.mask_again = inputs
    _, inner, masked = output
    kept = x if pool is None or ctx.mask_again else masked
    ctx.save_for_backward(kept, inner, weight, a, b, pool, place)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, upper: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
    d_x, d_a, d_b = _backward(upper, *ctx.saved_tensors, ctx.sizes, ctx.mask_again)
    return d_x, None, None, d_a, d_b, None, None, None, None


_product.register_autograd(_differentiate, setup_context=_save)


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
    places = iter(torch.rand(len(found), generator=torch.Generator().manual_seed(0)).tolist())
    for parent in list(model.modules()):
        children = {name: child for name, child in parent.named_children() if isinstance(child, LoraLinear)}
        for names in TOGETHER:
            if all(name in children for name in names) and _alike([children[name] for name in names]):
                _share([children.pop(name) for name in names], masks, place=next(places))
        for child in children.values():
            _share([child], masks, place=next(places))
    return masks


def _alike(layers: list[LoraLinear]) -> bool:
    """Return whether all have a bias or none has, and all the same rank."""
    return len({(layer.base_layer.bias is None, layer.r[ADAPTER]) for layer in layers}) == 1


def _share(layers: list[LoraLinear], masks: Masks, *, place: float) -> None:
    group = SharedInput(layers, masks, place=place)
    for index, layer in enumerate(layers):
        layer.__class__ = SharedLinear  # a method of a class, unlike one of an object, is compiled once for all blocks
        layer.group, layer.index = group, index
