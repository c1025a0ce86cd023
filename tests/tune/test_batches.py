"""Packing keeps conversations apart, counts what it leaves out, and orders them by the seed alone."""

from __future__ import annotations

from itertools import islice, pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from lorikeet.config import TuneConfig
from lorikeet.data.encode import LEAST_SHARED, encode_all, shared_start
from lorikeet.errors import InputError
from lorikeet.prompt import Encoded, PromptFormat
from lorikeet.tune.adapter import apply_lora
from lorikeet.tune.batches import count_steps, pack, pack_all, read_tokens, steps
from lorikeet.tune.fast import Scorer

from ..conftest import make_conversations


def rows_of(tiny_model: Path, count: int = 12) -> list[Encoded]:
    return encode_all(PromptFormat.load(tiny_model), make_conversations(count), max_length=100, on_long="error").rows


def test_the_loss_is_the_models_own(tiny_model: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model).eval()
    (row,) = rows_of(tiny_model, 1)
    labels = torch.tensor(
        [[token if counted else -100 for token, counted in zip(row.ids, row.supervised, strict=True)]]
    )
    expected = model(input_ids=torch.tensor([row.ids]), labels=labels).loss.item()
    config = TuneConfig()
    tuned = apply_lora(model, config)
    scorer = Scorer.build(tuned, config, dtype=torch.float32)
    assert scorer.mean_loss([pack([row])], device=torch.device("cpu")) == pytest.approx(expected, rel=1e-5)


def test_every_pass_sees_every_row_once_in_another_order(tiny_model: Path) -> None:
    rows = rows_of(tiny_model)
    drawn = [
        tuple(b.ids.flatten().tolist())
        for step in islice(steps(rows, per_step=2, max_tokens=1, share=False, seed=1), 12)
        for b in step
    ]
    everything = sorted(tuple(row.ids[: read_tokens(row)]) for row in rows)
    assert sorted(drawn[:12]) == everything and sorted(drawn[12:]) == everything
    assert drawn[:12] != drawn[12:]


def test_a_later_start_gives_the_same_steps(tiny_model: Path) -> None:
    rows = rows_of(tiny_model)
    whole = list(islice(steps(rows, per_step=4, max_tokens=500, share=True, seed=9), 7))
    rest = list(islice(steps(rows, per_step=4, max_tokens=500, share=True, seed=9, first_step=4), 3))
    assert [[b.ids.tolist() for b in step] for step in whole[4:]] == [[b.ids.tolist() for b in step] for step in rest]


def test_long_rows_are_counted(tiny_model: Path) -> None:
    prompt = PromptFormat.load(tiny_model)
    talk = make_conversations(6)
    lengths = [len(prompt.encode(c).ids) for c in talk]
    limit = sorted(lengths)[3] - 1
    long = sum(length > limit for length in lengths)
    cut = encode_all(prompt, talk, max_length=limit, on_long="truncate")
    assert cut.truncated == long and max(len(row.ids) for row in cut.rows) == limit
    dropped = encode_all(prompt, talk, max_length=limit, on_long="drop")
    assert dropped.dropped == long and len(dropped.rows) == 6 - long
    with pytest.raises(InputError, match="more than max_length"):
        encode_all(prompt, talk, max_length=limit, on_long="error")


def test_what_cannot_be_learned_from_is_named(tiny_model: Path) -> None:
    nothing = encode_all(PromptFormat.load(tiny_model), make_conversations(4), max_length=3, on_long="truncate")
    assert nothing.rows == [] and nothing.truncated == 0
    assert nothing.reasons == {"no supervised token within max_length": 4}
    assert [entry.origin for entry in nothing.left_out] == ["row-0", "row-1", "row-2", "row-3"]


def test_steps_are_counted_as_drawn() -> None:
    assert [count_steps(n, conversations_per_step=8, epochs=e) for n, e in ((80, 1), (81, 1), (80, 2.5), (3, 0.1))] == [
        10,
        11,
        25,
        1,
    ]


def test_a_micro_batch_is_bound_in_tokens(tiny_model: Path) -> None:
    rows = rows_of(tiny_model)
    longest = max(len(row.ids) for row in rows)
    batches = pack_all(rows, max_tokens=3 * longest, share=False)
    assert all(batch.row_tokens < batch.tokens <= 3 * longest for batch in batches)
    assert 1 < len(batches) < len(rows)
    drawn = sorted(tuple(b.ids[0, s:e].tolist()) for b in batches for s, e in pairwise(b.documents.tolist()))
    assert drawn == sorted(tuple(row.ids[: read_tokens(row)]) for row in rows)
    assert len(pack_all(rows, max_tokens=1, share=False)) == len(rows)


def test_what_all_start_with_stands_once_and_every_conversation_is_whole(tiny_model: Path) -> None:
    prompt = PromptFormat.load(tiny_model)
    led = [conversation.with_system("You are a helpful bird.") for conversation in make_conversations(9)]
    rows = encode_all(prompt, led, max_length=200, on_long="error").rows
    shared = shared_start(rows)
    assert shared > LEAST_SHARED and all(row.ids[:shared] == rows[0].ids[:shared] for row in rows)
    assert len({row.ids[shared] for row in rows}) > 1
    batches = pack_all(rows, max_tokens=150, share=True)
    assert len(batches) > 1
    found, labels = [], []
    for batch in batches:
        bounds = batch.documents.tolist()
        assert bounds[0] == shared and batch.row_tokens <= 150
        for start, end in pairwise(bounds):
            places = [*range(shared), *range(start, end)]
            found.append((batch.ids[0, places].tolist(), batch.positions[0, places].tolist()))
        last = batch.documents[1:] - 1
        inside = ~torch.isin(batch.scored, last)
        assert batch.ids[0, batch.scored[inside] + 1].tolist() == batch.labels[inside].tolist()
        assert set(last.tolist()) <= set(batch.scored.tolist())  # a document ends where its last label is predicted
        labels += batch.labels.tolist()
    assert sorted(ids for ids, _ in found) == sorted(row.ids[: read_tokens(row)] for row in rows)
    assert all(positions == list(range(len(ids))) for ids, positions in found)
    assert sum(batch.tokens for batch in batches) == sum(len(row.ids) for row in rows)
    expected = [i for row in rows for i, kept in zip(row.ids[1:], row.supervised[1:], strict=True) if kept]
    assert sorted(labels) == sorted(expected)


def test_a_row_is_read_up_to_its_last_supervised_token() -> None:
    row = Encoded([*range(10, 20)], [place in (4, 5, 7) for place in range(10)])
    batch = pack([row, row], shared=2)
    assert batch.ids.tolist() == [[10, 11, 12, 13, 14, 15, 16, 12, 13, 14, 15, 16]]
    assert batch.positions.tolist() == [[*range(7), *range(2, 7)]] and batch.documents.tolist() == [2, 7, 12]
    assert batch.scored.tolist() == [3, 4, 6, 8, 9, 11] and batch.labels.tolist() == [14, 15, 17] * 2
    assert batch.tokens == 20


@pytest.mark.parametrize(
    ("supervised_from", "expected"), [((30, 30), 20), ((12, 30), 11), ((30, 9), 8), ((5, 30), 0), ((1, 1), 0)]
)
def test_a_shared_start_ends_before_what_is_supervised(supervised_from: tuple[int, int], expected: int) -> None:
    rows = [
        Encoded([*range(20), *([tail] * 20)], [place >= first for place in range(40)])
        for tail, first in zip((77, 88), supervised_from, strict=True)
    ]
    assert shared_start(rows) == expected
    assert shared_start([rows[0], rows[0]]) == (supervised_from[0] - 1 if supervised_from[0] > 8 else 0)
