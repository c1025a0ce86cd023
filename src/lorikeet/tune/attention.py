"""Causal attention inside each document of a packed row, and nowhere else.

    name = use_document_attention(model)
    model(input_ids=ids, position_ids=positions, documents=bounds, room=weights_kept(bounds), native=False, spans=None,
          use_cache=False)

A packed row holds documents one after the other; `documents` holds their bounds. What lies before the first of them is
the start of them all: each document sees it as its own, and it is computed once. Work and memory grow with the sum of the
squared lengths, not with the square of the row. Scores exist for one block of queries at a time and are computed
again in the backward pass (FlashAttention's idea, Dao et al., 2022, arXiv 2205.14135). The query heads that share a key
head are stacked as rows of one matrix, so a document takes few, large products: on a CPU the backward pass of short
documents is several times faster than SDPA's. On a GPU torch's FlashAttention takes all documents at once, where it is there
and agrees (`why_no_flash`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention import varlen
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from lorikeet.errors import is_out_of_memory

NAME = "lorikeet_documents"
"""What transformers knows this attention by."""

BLOCK = 128
"""Queries whose scores are held at once, about: a document is cut into equal blocks of nearest to so many."""

KEPT = 512
"""Documents up to this length keep their attention weights for the backward pass; longer ones compute them again."""

OVERHEAD = 3000
"""What a block costs besides, in pairs of a query and a key: it takes 0.2 ms of a thread, and 17,000 pairs of nine heads 1."""

HALF = (torch.bfloat16, torch.float16)
"""The types that FlashAttention computes in."""

AGREES = 0.02
"""FlashAttention may differ from `document_attention` by so much of the result: both round to 16 bits, at other places."""

TRIED_WINDOW = 40
"""The window with which FlashAttention is tried: any that hides some of the keys will do."""

STARTS = 4
"""The gradients of the shared start that threads hold may take so many times the keys and values of the row."""

BUSY, LEAST_BUSY = 1.1, 1.6
"""The busiest thread may have so many times its share. Products that threads share reach about 60 % of the speed."""


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
    room: int,
    native: bool,
    spans: Spans | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """Return what transformers asks of an attention: (1, tokens, heads, head size), and no weights."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    window = sliding_window or 0
    if spans is not None:
        return flash_attention(query[0], key[0], value[0], spans, scale, window).transpose(0, 1).unsqueeze(0), None
    out = document_attention(query[0], key[0], value[0], documents, room, scale, window, native=native)
    return out.transpose(0, 1).unsqueeze(0), None


class Spans(NamedTuple):
    """Where FlashAttention finds the documents of a row."""

    bounds: torch.Tensor
    """Where each starts, and the end, int32, shape (documents + 1,), on the GPU."""
    longest: int
    """Tokens of the longest."""

    @classmethod
    def of(cls, documents: torch.Tensor, device: torch.device) -> Spans:
        """Return the spans of the bounds `documents`, the first of which is 0."""
        assert not documents[0], "FlashAttention has no shared start"
        return cls(documents.to(device, torch.int32), int(documents.diff().max()))


class _Block(NamedTuple):
    """Queries whose scores are held at once, and the keys that they see."""

    document: int
    """The number of its document; a shared start counts as the first."""
    head: slice
    """Keys of the shared start; empty where there is none, or none is seen."""
    own: slice
    """The document's own keys, up to the last query."""
    queries: slice
    keeps: bool
    """Whether its attention weights are kept for the backward pass."""

    @property
    def shape(self) -> tuple[int, int]:
        """How many queries and how many keys there are."""
        return self.queries.stop - self.queries.start, self.head.stop - self.head.start + self.own.stop - self.own.start

    def pick(self, part: torch.Tensor) -> torch.Tensor:
        """Return the block's keys or values, (key heads, keys, size), of those of the row."""
        own = part[:, self.own]
        return torch.cat([part[:, self.head], own], 1) if self.head.stop > self.head.start else own

    def add(self, total: torch.Tensor, part: torch.Tensor) -> None:
        """Add the gradient of the block's keys or values to that of the row's."""
        count = self.head.stop - self.head.start
        total[:, self.own] += part[:, count:]
        if count:
            total[:, self.head] += part[:, :count]


def _blocks(documents: torch.Tensor, window: int) -> Iterator[_Block]:
    """Yield the blocks of the shared start, if there is one, then those of every document."""
    bounds = documents.tolist()
    shared = bounds[0]
    parts = [(0, shared, 0)] if shared else []
    parts += [(start, end, shared) for start, end in itertools.pairwise(bounds)]
    for document, (start, end, before) in enumerate(parts):
        count = max(1, round((end - start) / BLOCK))
        for block in range(count):
            first, last = (start + (end - start) * edge // count for edge in (block, block + 1))
            lowest = max(0, before + first - start - window + 1) if window else 0
            head, own = slice(min(lowest, before), before), slice(start + max(0, lowest - before), last)
            yield _Block(document, head, own, slice(first, last), before + end - start <= KEPT)


def weights_kept(documents: torch.Tensor) -> int:
    """Return how many attention weights a head keeps for the backward pass, at most."""
    return sum(queries * keys for queries, keys in (block.shape for block in _blocks(documents, 0) if block.keeps))


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


def _scheduled(documents: torch.Tensor, window: int, key: torch.Tensor) -> torch.Tensor | None:
    """Return the `_schedule` of a row."""
    return _schedule(tuple(documents.tolist()), window, key.shape[0], torch.get_num_threads())


@lru_cache(maxsize=32)
def _schedule(bounds: tuple[int, ...], window: int, key_heads: int, threads: int) -> torch.Tensor | None:
    """Return which thread computes which blocks, the rows of `Block` in attention.cpp, int64; None where too few have work.

    A document's key head is computed by one thread, since its blocks add to the same keys: all heads of a document at once
    if that keeps the threads busy, else each for itself. Of a shared start each thread holds the gradient, so a long one is
    not for many threads.
    """
    if threads * bounds[0] > STARTS * bounds[-1]:
        return None
    blocks, place = [], 0
    for block in _blocks(torch.tensor(bounds), window):
        queries, keys = block.shape
        blocks.append((block, place if block.keeps else -1, queries * keys + OVERHEAD))
        place += queries * keys if block.keeps else 0
    for heads in (key_heads, 1):
        parts = [(document, low) for document in range(len(bounds)) for low in range(0, key_heads, heads)]
        costs = dict.fromkeys(parts, 0)
        for block, _, cost in blocks:
            for low in range(0, key_heads, heads):
                costs[block.document, low] += cost * heads
        loads = [0] * threads
        chosen = {}
        for part in sorted(parts, key=lambda part: -costs[part]):
            chosen[part] = loads.index(min(loads))
            loads[chosen[part]] += costs[part]
        if max(loads) * threads <= BUSY * sum(loads):
            break
    else:
        if max(loads) * threads > LEAST_BUSY * sum(loads):
            return None
    rows = []
    for block, kept_at, _ in blocks:
        for low in range(0, key_heads, heads):
            spans = (span for part in (block.head, block.own, block.queries) for span in (part.start, part.stop))
            rows.append((chosen[block.document, low], *spans, kept_at, low, low + heads))
    return torch.tensor(rows)


@torch.library.custom_op("lorikeet::document_attention", mutates_args=())
def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor,
    room: int,
    scale: float,
    window: int,
    native: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the attention and, one after the other, the weights that are kept: `room` of them for each head, at most."""
    if native and (schedule := _scheduled(documents, window, key)) is not None:
        attended: tuple[torch.Tensor, torch.Tensor] = torch.ops.lorikeet_cpu.document_attention(
            query, key, value, schedule, room, scale, window
        )
        return attended
    groups = query.shape[0] // key.shape[0]
    out = torch.empty_like(query)
    kept = query.new_empty(query.shape[0] * room)
    place = 0
    for block in _blocks(documents, window):
        q = _stacked(query[:, block.queries], groups)
        queries, keys = block.shape
        target = None
        if block.keeps:
            target = kept[place : place + query.shape[0] * queries * keys]
            place += target.numel()
        weights = _softmax(q, block.pick(key), scale, groups, window, target)
        out[:, block.queries] = torch.bmm(weights, block.pick(value)).view(query.shape[0], queries, -1)
    return out, kept


@_forward.register_fake
def _(
    query: torch.Tensor, _key: torch.Tensor, _value: torch.Tensor, _documents: torch.Tensor, room: int, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty(query.shape[0] * room)


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
    native: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value."""
    if native and (schedule := _scheduled(documents, window, key)) is not None:
        gradients: tuple[torch.Tensor, torch.Tensor, torch.Tensor] = torch.ops.lorikeet_cpu.document_attention_backward(
            grad, query, key, value, schedule, kept, scale, window, int(documents[0])
        )
        return gradients
    heads, groups = query.shape[0], query.shape[0] // key.shape[0]
    d_query, d_key, d_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
    place = 0
    for block in _blocks(documents, window):
        queries, keys = block.shape
        q, k, v = _stacked(query[:, block.queries], groups), block.pick(key), block.pick(value)
        upper = _stacked(grad[:, block.queries], groups)
        if block.keeps:
            weights = kept[place : place + heads * queries * keys].view(key.shape[0], groups * queries, keys)
            place += weights.numel()
        else:
            weights = _softmax(q, k, scale, groups, window)
        block.add(d_value, torch.bmm(weights.transpose(1, 2), upper))
        d_scores = torch._softmax_backward_data(torch.bmm(upper, v.transpose(1, 2)), weights, -1, weights.dtype)
        d_query[:, block.queries] = torch.bmm(d_scores, k).view(heads, queries, -1)
        block.add(d_key, torch.bmm(d_scores.transpose(1, 2), q))
    return d_query.mul_(scale), d_key.mul_(scale), d_value


@_backward.register_fake
def _(
    _grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, documents, _, ctx.scale, ctx.window, ctx.native = inputs
    ctx.save_for_backward(query, key, value, documents, output[1])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: torch.Tensor, _: None) -> tuple[torch.Tensor | None, ...]:
    query, key, value, documents, kept = ctx.saved_tensors
    return (
        *_backward(grad, query, key, value, documents, kept, ctx.scale, ctx.window, ctx.native),
        None,
        None,
        None,
        None,
        None,
    )


_forward.register_autograd(_differentiate, setup_context=_save)


def document_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor,
    room: int,
    scale: float,
    window: int = 0,
    *,
    native: bool = False,
) -> torch.Tensor:
    """Return softmax(scale * query @ key^T) @ value, causal, inside each document.

    `query` is (heads, tokens, head size), `key` and `value` (key heads, tokens, head size); heads is a multiple of key
    heads. `documents`, int64 on the CPU, shape (documents + 1,), holds where each starts, and the end; what lies before
    the first is the start of each. `room` is `weights_kept(documents)`. `window` is how many keys a query sees, 0 for all. With
    `native` the library that `native.load_attention` loads computes it, float32 or bfloat16. The result has the shape and type of `query`.
    """
    out: torch.Tensor = _forward(query, key, value, documents, room, scale, window, native)[0]
    return out


def flash_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, spans: Spans, scale: float, window: int = 0
) -> torch.Tensor:
    """Return what `document_attention` does where documents share no start, by FlashAttention, in bfloat16 or float16.

    Shapes and `window` are as there. FlashAttention-2: Dao, 2023, arXiv 2307.08691.
    """
    q, k, v = (part.to(value.dtype).transpose(0, 1) for part in (query, key, value))
    seen = (window - 1 if window else -1, 0)  # it counts the keys before the query's own
    longest = spans.longest
    out = varlen.varlen_attn(
        q, k, v, spans.bounds, spans.bounds, longest, longest, scale=scale, window_size=seen, enable_gqa=True
    )
    assert isinstance(out, torch.Tensor)  # it gives more only where more is asked for
    return out.transpose(0, 1)


def why_no_flash(
    device: torch.device, dtype: torch.dtype, *, heads: int, key_heads: int, size: int, window: int = 0
) -> str:
    """Return '' if FlashAttention is there on `device` for such heads and agrees with `document_attention`; else why not.

    Three short documents go through both, forward and backward, with a window that is shorter than the longest.
    """
    window = min(window, TRIED_WINDOW)
    if dtype not in HALF:
        return f"FlashAttention does not compute in {str(dtype).removeprefix('torch.')}"
    documents = torch.tensor([0, 5, 70, 200])
    generator = torch.Generator(device).manual_seed(0)
    shapes = [(heads, 200, size), (key_heads, 200, size), (key_heads, 200, size)]
    given = [torch.randn(s, generator=generator, device=device, dtype=dtype).requires_grad_() for s in shapes]
    query, key, value = given
    upper = torch.randn(shapes[0], generator=generator, device=device, dtype=dtype)
    scale = size**-0.5
    try:
        found = flash_attention(query, key, value, Spans.of(documents, device), scale, window)
        expected = document_attention(query, key, value, documents, weights_kept(documents), scale, window)
        gradients = torch.autograd.grad(found, given, upper), torch.autograd.grad(expected, given, upper)
        pairs = [(found, expected), *zip(*gradients, strict=True)]
        worst = max(((a - b).float().norm() / b.float().norm()).item() for a, b in pairs)
    except (RuntimeError, ValueError, NotImplementedError, AssertionError) as error:  # what a card or a build lacks
        if is_out_of_memory(error):
            raise
        return f"FlashAttention is not to be had here: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return "" if worst <= AGREES else f"FlashAttention is off by {worst:.0%} here"
