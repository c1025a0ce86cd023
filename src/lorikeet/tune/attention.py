"""Causal attention inside each document of a packed row, and nowhere else.

    name = use_document_attention(model)
    model(input_ids=ids, position_ids=positions, documents=batch.documents, use_cache=False)

A packed row holds documents one after the other; `documents` holds their bounds. Work and memory grow with the sum of
the squared lengths, not with the square of the row. Scores exist for one block of queries at a time and are computed
again in the backward pass (FlashAttention's idea, Dao et al., 2022, arXiv 2205.14135). The query heads that share a key
head are stacked as rows of one matrix, so a document takes few, large products: on a CPU the backward pass of short
documents is several times faster than SDPA's.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

NAME = "lorikeet_documents"
"""What transformers knows this attention by."""

BLOCK = 128
"""Queries whose scores are held at once; shorter documents take one block."""

KEPT = 512
"""Documents up to this length keep their attention weights for the backward pass; longer ones compute them again."""


def use_document_attention(model: Any) -> None:
    """Make `model`, of transformers, attend with `document_attention`; it must be called with `documents`."""
    AttentionInterface.register(NAME, _attend)
    AttentionMaskInterface.register(NAME, _no_mask)
    model.set_attn_implementation(NAME)


def _no_mask(*_: Any, **__: Any) -> None:
    """Build no (tokens, tokens) mask: the documents' bounds say it all."""


def _attend(
    _module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    _mask: torch.Tensor | None,
    *,
    documents: torch.Tensor,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers asks of an attention: (1, tokens, heads, head size), and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = document_attention(query[0], key[0], value[0], documents, scale, sliding_window or 0)
    return out.transpose(0, 1).unsqueeze(0), None


def _blocks(documents: torch.Tensor, window: int, most: int) -> Iterator[tuple[int, int, int, bool]]:
    """Yield (first key, first query, end, whether its weights are kept) of every block; its keys end where it ends."""
    bounds = documents.tolist()
    for start, end in itertools.pairwise(bounds):
        for first in range(start, end, BLOCK):
            last = min(first + BLOCK, end)
            yield (max(start, first - window + 1) if window else start), first, last, end - start <= most


@lru_cache(maxsize=32)
def _bias(queries: int, keys: int, groups: int, window: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Return what is added to the scores: 0 for what a query sees, else -inf; shape (1, groups * queries, keys)."""
    place = torch.arange(queries, device=device).unsqueeze(1) + (keys - queries)
    seen = torch.arange(keys, device=device)
    hidden = seen > place
    if window:
        hidden |= seen <= place - window
    bias = torch.zeros(queries, keys, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
    return bias.repeat(groups, 1).unsqueeze(0)


def _stacked(part: torch.Tensor, groups: int) -> torch.Tensor:
    """Return (heads, tokens, size) as (key heads, groups * tokens, size), contiguous."""
    heads, tokens, size = part.shape
    return part.reshape(heads // groups, groups * tokens, size)


def _softmax(
    q: torch.Tensor, k: torch.Tensor, scale: float, groups: int, window: int, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the attention weights, shape (key heads, groups * queries, keys), written to `out` if it is given."""
    bias = _bias(q.shape[1] // groups, k.shape[1], groups, window, q.dtype, q.device)
    scores = torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)
    return torch.softmax(scores, -1) if out is None else torch.softmax(scores, -1, out=out.view(scores.shape))


@torch.library.custom_op("lorikeet::document_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor,
    scale: float,
    window: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention and, one after the other, the weights of the documents of at most `most` tokens.

    `most` is an argument because a compiled graph that is found in a cache is known by its arguments alone.
    """
    groups = query.shape[0] // key.shape[0]
    out = torch.empty_like(query)
    kept = query.new_empty(query.shape[0] * query.shape[1] * most)  # room for any; what is not written takes no memory
    place = 0
    for start, first, end, keeps in _blocks(documents, window, most):
        q = _stacked(query[:, first:end], groups)
        size = query.shape[0] * (end - first) * (end - start) if keeps else 0
        room = kept[place : place + size] if keeps else None
        weights = _softmax(q, key[:, start:end], scale, groups, window, room)
        place += size
        out[:, first:end] = torch.bmm(weights, value[:, start:end]).view(query.shape[0], end - first, -1)
    return out, kept


@_forward.register_fake
def _(query: torch.Tensor, *others: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[0] * query.shape[1] * others[-1])


@torch.library.custom_op("lorikeet::document_attention_backward", mutates_args=())
def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor,
    kept: torch.Tensor,
    scale: float,
    window: int,
    most: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value."""
    heads, groups = query.shape[0], query.shape[0] // key.shape[0]
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    place = 0
    for start, first, end, keeps in _blocks(documents, window, most):
        q, k, v = _stacked(query[:, first:end], groups), key[:, start:end], value[:, start:end]
        upper = _stacked(grad[:, first:end], groups)
        if keeps:
            shape = (key.shape[0], groups * (end - first), end - start)
            weights = kept[place : place + shape[0] * shape[1] * shape[2]].view(shape)
            place += weights.numel()
        else:
            weights = _softmax(q, k, scale, groups, window)
        d_value[:, start:end] += torch.bmm(weights.transpose(1, 2), upper)
        d_scores = torch._softmax_backward_data(torch.bmm(upper, v.transpose(1, 2)), weights, -1, weights.dtype)
        d_query[:, first:end] = torch.bmm(d_scores, k).view(heads, end - first, -1)
        d_key[:, start:end] += torch.bmm(d_scores.transpose(1, 2), q)
    return d_query.mul_(scale), d_key.mul_(scale), d_value


@_backward.register_fake
def _(
    _grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, documents, ctx.scale, ctx.window, ctx.most = inputs
    ctx.save_for_backward(query, key, value, documents, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    query, key, value, documents, kept = ctx.saved_tensors
    return (
        *_backward(grad, query, key, value, documents, kept, ctx.scale, ctx.window, ctx.most),
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def document_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: torch.Tensor, scale: float, window: int = 0
) -> torch.Tensor:
    """Return softmax(scale * query @ key^T) @ value, causal, inside each document.

    `query` is (heads, tokens, head size), `key` and `value` (key heads, tokens, head size); heads is a multiple of key
    heads. `documents`, int64 on the CPU, shape (documents + 1,), holds where each starts, and the end. `window` is how
    many keys a query sees, 0 for all. The result has the shape and type of `query`.
    """
    out: torch.Tensor = _forward(query, key, value, documents, scale, window, KEPT)[0]
    return out
