"""Encoded conversations -> steps of packed micro-batches, in an order that depends on the seed alone.

A micro-batch is one row: what all its conversations start with (a system prompt, most often) stands first and once, then
the rest of each. Positions go on from there, and `documents` says where each rest is, so that no conversation sees
another. There is no padding, and what follows the last supervised token, from that token on, is not read: nothing learned
depends on it. It does not know the model.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from lorikeet.data.encode import shared_start
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
    """Where each conversation's own part starts, and the end of the row, int64, shape (conversations + 1,), always on the
    CPU. What lies before the first of them is the start of every conversation."""
    tokens: int
    """Tokens of the conversations, each with its start and with its end, which the row leaves out."""

    @property
    def row_tokens(self) -> int:
        """Tokens in the row, a shared start once."""
        return self.ids.shape[1]

    def to(self, device: torch.device) -> Batch:
        """Return the batch on `device`."""
        ids, positions, scored, labels = (p.to(device) for p in (self.ids, self.positions, self.scored, self.labels))
        return Batch(ids, positions, scored, labels, self.documents, self.tokens)


def read_tokens(row: Encoded) -> int:
    """Return how many tokens of a row are read: those before the last supervised one, which is only predicted."""
    return max(place for place, kept in enumerate(row.supervised) if kept)


def pack(rows: Sequence[Encoded], *, shared: int = 0) -> Batch:
    """Return one packed row of conversations, whose first `shared` tokens are the same and stand in it once."""
    ids, positions, bounds = rows[0].ids[:shared], list(range(shared)), [shared]
    scored, labels = list[int](), list[int]()
    for row in rows:
        offset, read = len(ids) - shared, read_tokens(row)
        ids = ids + row.ids[shared:read]
        positions += range(shared, read)
        predicted = [place for place in range(1, read + 1) if row.supervised[place]]
        scored += [offset + place - 1 for place in predicted]
        labels += [row.ids[place] for place in predicted]
        bounds.append(len(ids))
    return Batch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        torch.tensor(scored),
        torch.tensor(labels),
        torch.tensor(bounds),
        tokens=sum(len(row.ids) for row in rows),
    )


def pack_all(rows: Sequence[Encoded], *, max_tokens: int, share: bool) -> list[Batch]:
    """Return the rows, shortest first, in micro-batches of at most `max_tokens` tokens.

    A single conversation may be longer than `max_tokens`. `share` holds the start that all rows have in common once in a
    micro-batch. How rows are put together changes no sum over them, only the memory that the largest micro-batch takes
    and that dropout is drawn once for a shared start.
    """
    shared = shared_start(rows) if share and len(rows) > 1 else 0
    groups: list[list[Encoded]] = []
    tokens = 0
    for row in sorted(rows, key=lambda row: len(row.ids)):
        if not groups or tokens + len(row.ids) - shared > max_tokens:
            groups.append([])
            tokens = shared
        groups[-1].append(row)
        tokens += len(row.ids) - shared
    return [pack(group, shared=shared) for group in groups]


def count_steps(rows: int, *, conversations_per_step: int, epochs: float) -> int:
    """Return how many steps `epochs` passes take; the last step of a pass may be smaller."""
    return max(1, round(epochs * -(-rows // conversations_per_step)))


def steps(
    rows: Sequence[Encoded], *, per_step: int, max_tokens: int, share: bool, seed: int, first_step: int = 0
) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each step without end, from step `first_step`, a new random order every pass."""
    per_pass = -(-len(rows) // per_step)
    for step in itertools.count(first_step):
        pass_number, place = divmod(step, per_pass)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + pass_number)
        order = torch.randperm(len(rows), generator=generator).tolist()
        chosen = [rows[i] for i in order[place * per_step : (place + 1) * per_step]]
        yield pack_all(chosen, max_tokens=max_tokens, share=share)
