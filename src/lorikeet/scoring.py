"""How probable the engine that serves finds each next token of a text.

    with LlamaEngine(gguf, scoring=True) as engine:
        scores = Scorer(engine).score(rows)             # losses
        for logits in Scorer(engine).logits(ids, places): ...

llama.cpp's server has no route for the log-probability of a prompt. It does give the final hidden state of every token,
so the logits are those states times the file's own output matrix, which is what llama.cpp computes too. It does not
know what the numbers are compared with.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from gguf import GGUFReader, quants
from numpy.typing import NDArray

from lorikeet.engine import LlamaEngine
from lorikeet.gguf_header import read_header
from lorikeet.prompt import Encoded

CHUNK_TOKENS = 128
"""Rows of logits computed at once: 128 rows of a 128,256-token vocabulary are 66 MB in float32."""


@dataclass(frozen=True, slots=True)
class Scores:
    """The losses of some conversations, in the order given."""

    by_token: list[NDArray[np.float64]]
    """Per conversation, -ln p of each supervised token in nats, shape (supervised tokens,)."""

    @property
    def loss(self) -> NDArray[np.float64]:
        """Summed loss of each conversation, shape (conversations,)."""
        return np.array([losses.sum() for losses in self.by_token])

    @property
    def tokens(self) -> NDArray[np.int64]:
        """Supervised tokens of each conversation, shape (conversations,)."""
        return np.array([len(losses) for losses in self.by_token])

    @property
    def mean(self) -> float:
        """Mean loss of a supervised token, in nats."""
        return float(self.loss.sum() / self.tokens.sum())

    def last(self, counts: Sequence[int]) -> Scores:
        """Return the losses of the last `counts[i]` supervised tokens of each conversation."""
        return Scores([losses[-count:] for losses, count in zip(self.by_token, counts, strict=True)])


class Scorer:
    """Scores conversations with a running engine (`LlamaEngine(..., scoring=True)`) and its file."""

    def __init__(self, engine: LlamaEngine) -> None:
        """Read the output matrix of the engine's file."""
        self._engine = engine
        self._matrix = output_matrix(engine.path)
        self._softcap = output_softcap(engine.path)

    def score(self, rows: Sequence[Encoded], *, done: Callable[[], None] = lambda: None) -> Scores:
        """Return the losses of `rows`, each at most the engine's context long; `done` is called after each."""
        losses = []
        for row in rows:
            losses.append(self._losses(row))
            done()
        return Scores(losses)

    def logits(self, ids: Sequence[int], places: NDArray[np.int64]) -> Iterator[NDArray[np.float32]]:
        """Yield the logits of the token after each of `places`, in chunks of shape (chunk, vocabulary)."""
        hidden = self._engine.hidden(ids)
        for start in range(0, len(places), CHUNK_TOKENS):
            logits = hidden[places[start : start + CHUNK_TOKENS]] @ self._matrix.T
            yield np.tanh(logits / self._softcap) * self._softcap if self._softcap else logits

    def _losses(self, row: Encoded) -> NDArray[np.float64]:
        """Return the loss of each supervised token."""
        places = np.flatnonzero(np.array(row.supervised[1:]))
        targets = np.array(row.ids)[places + 1]
        parts = []
        for start, logits in zip(range(0, len(places), CHUNK_TOKENS), self.logits(row.ids, places), strict=True):
            top = logits.max(axis=1)
            normaliser = top + np.log(np.exp(logits - top[:, None]).sum(axis=1, dtype=np.float64))
            parts.append(normaliser - logits[np.arange(len(logits)), targets[start : start + CHUNK_TOKENS]])
        return np.concatenate(parts)


def output_matrix(gguf: Path) -> NDArray[np.float32]:
    """Return the matrix that turns hidden states into logits, float32, shape (vocabulary, width).

    It is the file's `output.weight`, or its token embedding where the two are tied.
    """
    by_name = {tensor.name: tensor for tensor in GGUFReader(gguf).tensors}
    tensor = by_name.get("output.weight") or by_name["token_embd.weight"]
    matrix: NDArray[np.float32] = quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False)
    return matrix


def output_softcap(gguf: Path) -> float:
    """Return c where the file says that logits x become c tanh(x / c) (Gemma 2, arXiv 2408.00118); 0 where it does not."""
    metadata = read_header(gguf).metadata
    return float(metadata.get(f"{metadata['general.architecture']}.final_logit_softcapping", 0.0))
