"""Encoded conversations -> steps of packed micro-batches, in an order that depends on the seed alone.

A micro-batch is one row: its conversations stand one after the other, positions restart at each, and `documents` says
where, so that none sees another. There is no padding. It does not know the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorikeet.prompt import Encoded


@dataclass(frozen=True, slots=True)
class Batch:
    """One packed row."""

    ids: torch.Tensor
    """Token ids, int64, shape (1, tokens)."""
    positions: torch.Tensor
    """Position of each token in its conversation, int64, shape (1, tokens)."""
    scored: torch.Tensor
    """Places whose next token is supervised, int64, shape (scored,)."""
    labels: torch.Tensor
    """The tokens that follow those places, int64, shape (scored,)."""
    documents: torch.Tensor
    """Where each conversation starts, and the end of the row, int64, shape (conversations + 1,), always on the CPU."""

    @property
    def tokens(self) -> int:
        """Tokens in the row."""
        return self.ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        ids, positions, scored, labels = (p.to(device) for p in (self.ids, self.positions, self.scored, self.labels))
        return Batch(ids, positions, scored, labels, self.documents)


def pack(rows: Sequence[Encoded]) -> Batch:
    """Return one packed row of whole conversations."""
    ids: list[int] = []
    positions: list[int] = []
    scored: list[int] = []
    bounds = [0]
    for row in rows:
        start = len(ids)
        ids += row.ids
        positions += range(len(row.ids))
        scored += [start + place - 1 for place in range(1, len(row.ids)) if row.supervised[place]]
        bounds.append(len(ids))
    token_ids = torch.tensor([ids])
    places = torch.tensor(scored)
    return Batch(token_ids, torch.tensor([positions]), places, token_ids[0, places + 1], torch.tensor(bounds))


def pack_all(rows: Sequence[Encoded], *, batch_size: int, max_tokens: int) -> list[Batch]:
    """Return the rows, shortest first, in micro-batches of at most `batch_size` conversations and `max_tokens` tokens.

    A single conversation may be longer than `max_tokens`. How rows are put together changes no sum over them, only the
    memory that the largest micro-batch takes.
    """
    groups: list[list[Encoded]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if not groups or len(groups[-1]) == batch_size or tokens + len(row.ids) > max_tokens:
            groups.append([])
            tokens = 0
        groups[-1].append(row)
        tokens += len(row.ids)
    return [pack(group) for group in groups]


def count_steps(rows: int, *, conversations_per_step: int, epochs: float) -> int:
    """Return how many steps `epochs` passes take; the last step of a pass may be smaller."""
    return max(1, round(epochs * -(-rows // conversations_per_step)))


def steps(
    rows: Sequence[Encoded], *, batch_size: int, accumulation: int, max_tokens: int, seed: int, first_step: int = 0
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step without end, from step `first_step`, a new random order every pass."""
    per_step = batch_size * accumulation
    per_pass = -(-len(rows) // per_step)
    for step in _count_from(first_step):
        pass_number, place = divmod(step, per_pass)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + pass_number)
        order = torch.randperm(len(rows), generator=generator).tolist()
        chosen = [rows[i] for i in order[place * per_step : (place + 1) * per_step]]
        yield pack_all(chosen, batch_size=batch_size, max_tokens=max_tokens)


def _count_from(first: int) -> Iterator[int]:
    while True:
        yield first
        first += 1
