"""The model as it was trained, base and adapter in torch, and the merged weights as transformers loads them.

    with AdapterModel(base, adapter) as trained:
        reference = trained.log_probs(rows)             # what the exported files are compared with

PEFT applies and merges the adapter here, apart from the code that exports it. One model is held at a time.
"""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from lorikeet.export.contents import Weights
from lorikeet.prompt import Encoded
from lorikeet.weights import quiet_transformers

Floats = NDArray[np.float32]
Done = Callable[[], None]

FLOAT32_SHARE = 0.7
"""Share of the free memory that the weights may take in float32; larger models are computed in bfloat16."""


@dataclass(frozen=True, slots=True)
class Row:
    """A held-out conversation and the places at which predictions are compared."""

    ids: list[int]
    places: NDArray[np.int64]
    """Positions whose next token is the assistant's, shape (places,)."""


@dataclass(frozen=True, slots=True)
class Greedy:
    """A greedy answer and how sure of it the model was."""

    ids: list[int]
    """The answer's tokens, the one that ended it included."""
    logits: Floats
    """Logits at each token, shape (tokens, vocabulary)."""
    ended: bool


def choose_places(rows: Sequence[Encoded], *, most: int) -> list[Row]:
    """Return the rows with their supervised places, evenly thinned to `most` in all."""
    share = -(-most // max(1, len(rows)))
    chosen = []
    for row in rows:
        places = np.flatnonzero(np.array(row.supervised[1:]))
        if len(places) > share:
            places = places[np.linspace(0, len(places) - 1, share).astype(np.int64)]
        chosen.append(Row(row.ids, places))
    return chosen


def pick_dtype(weights: Weights, available_bytes: int) -> torch.dtype:
    """Return float32, in which arithmetic adds no error worth naming, or bfloat16 where that does not fit."""
    values = sum(int(np.prod(weights.shape(name))) for name in weights)
    return torch.float32 if 4 * values <= FLOAT32_SHARE * available_bytes else torch.bfloat16


def _contiguous(_head: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Return the head's inputs without strides: for the last places of a batch oneDNN would copy the head once for each."""
    return tuple(part.contiguous() for part in inputs)


class TorchModel:
    """A causal language model in torch, evaluated without gradients on the CPU."""

    def __init__(self, model: Any) -> None:
        """Take a loaded model."""
        self._model: Any = model.eval()
        model.get_output_embeddings().register_forward_pre_hook(_contiguous)

    @classmethod
    def load(cls, folder: Path, dtype: torch.dtype | str) -> Self:
        """Return the model in `folder`; raises OSError, ValueError or KeyError if it cannot be read."""
        return cls(_load(folder, dtype))

    def __enter__(self) -> Self:
        """Return itself; its memory is freed at the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Free the memory."""
        self._model = None
        gc.collect()

    @torch.no_grad()
    def log_probs(self, rows: Sequence[Row], *, done: Done = lambda: None) -> list[Floats]:
        """Return ln p of every token at the places of each row, float32, shape (places, vocabulary)."""
        found = []
        for row in rows:
            logits = self._model(
                input_ids=torch.tensor([row.ids]), logits_to_keep=torch.from_numpy(row.places), use_cache=False
            ).logits[0]
            found.append(torch.log_softmax(logits.float(), dim=-1).numpy())
            done()
        return found

    def mean_loss(self, rows: Sequence[Encoded]) -> float:
        """Return the mean of -ln p over the supervised tokens of `rows`."""
        sums, counts = self.losses(rows)
        return float(sums.sum() / counts.sum())

    @torch.no_grad()
    def losses(
        self, rows: Sequence[Encoded], *, done: Callable[[int], None] = lambda _: None
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """Return the sum of -ln p over the supervised tokens of each row, and how many they are, shape (rows,) both.

        `done` is told the tokens of each row.
        """
        sums, counts = [], []
        for row in rows:
            places = torch.tensor(row.supervised[1:]).nonzero().flatten()
            logits = self._model(input_ids=torch.tensor([row.ids]), logits_to_keep=places, use_cache=False).logits[0]
            targets = torch.tensor(row.ids)[places + 1]
            sums.append(torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum").item())
            counts.append(len(places))
            done(len(row.ids))
        return np.array(sums, dtype=np.float64), np.array(counts, dtype=np.int64)

    @torch.no_grad()
    def answer(
        self, prompts: Sequence[Sequence[int]], *, stop_ids: set[int], most_tokens: int, keep_logits: bool = True
    ) -> list[Greedy]:
        """Return the greedy answers to `prompts`, all at once; the shorter prompts are padded on the left.

        Without `keep_logits` those of the answers are empty: they take answers * tokens * vocabulary * 4 bytes.
        """
        width = max(len(prompt) for prompt in prompts)
        ids = torch.tensor([[0] * (width - len(prompt)) + list(prompt) for prompt in prompts])
        mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        chosen: list[torch.Tensor] = []
        kept: list[torch.Tensor] = []
        cache, inputs = None, ids
        ended = torch.zeros(len(prompts), dtype=torch.bool)
        while len(chosen) < most_tokens and not ended.all():
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -inputs.shape[1] :]
            output = self._model(
                input_ids=inputs,
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
                logits_to_keep=1,
            )
            logits, cache = output.logits[:, -1].float(), output.past_key_values
            inputs = logits.argmax(dim=1, keepdim=True)
            chosen.append(inputs[:, 0])
            kept.append(logits if keep_logits else logits.new_empty(len(prompts), 0))
            ended |= torch.isin(inputs[:, 0], torch.tensor(sorted(stop_ids)))
            mask = torch.cat([mask, torch.ones_like(inputs)], dim=1)
        return _split(torch.stack(chosen, 1), torch.stack(kept, 1), stop_ids)


class AdapterModel(TorchModel):
    """The base with its adapter on top, as PEFT applies it."""

    @classmethod
    def on(cls, base: Path, adapter: Path, dtype: torch.dtype) -> Self:
        """Return base + adapter; raises OSError, ValueError, KeyError or RuntimeError if they do not go together."""
        from peft import PeftModel

        model = _load(base, dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT warns of what transformers renamed, and of keys it leaves out
            return cls(PeftModel.from_pretrained(model, str(adapter)))

    def adapted(self) -> set[str]:
        """Return the names, in the base, of the weights that the adapter changes."""
        return {name for name, _ in self._layers()}

    def _layers(self) -> list[tuple[str, Any]]:
        from peft.tuners.lora import LoraLayer

        return [
            (path.removeprefix("base_model.model.") + ".weight", layer)
            for path, layer in self._model.named_modules()
            if isinstance(layer, LoraLayer)
        ]

    @contextmanager
    def at_strength(self, factor: float) -> Iterator[None]:
        """Multiply what the adapter adds by `factor` inside the block; 0 is the base."""
        layers = [layer for _, layer in self._layers()]
        before = [dict(layer.scaling) for layer in layers]
        try:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update({name: scale * factor for name, scale in scaling.items()})
            yield
        finally:
            for layer, scaling in zip(layers, before, strict=True):
                layer.scaling.update(scaling)

    def base_answer(self, prompts: Sequence[Sequence[int]], *, stop_ids: set[int], most_tokens: int) -> list[Greedy]:
        """Return the untuned base's greedy answers."""
        with self._model.disable_adapter():
            return self.answer(prompts, stop_ids=stop_ids, most_tokens=most_tokens)

    @torch.no_grad()
    def compare_merged(self, merged: Weights, *, done: Done = lambda: None) -> MergedWeights:
        """Merge each layer in float32 as PEFT does, and return how far `merged` is from it.

        The model cannot be used afterwards: its layers are merged and let go one by one.
        """
        result = MergedWeights()
        for name, layer in self._layers():
            linear = layer.get_base_layer()
            linear.weight.data = linear.weight.data.float()
            before = linear.weight.data.clone()
            layer.merge(safe_merge=False)
            result.add(name, before, linear.weight.data, merged)
            linear.weight.data = torch.empty(0)
            done()
        return result


class MergedWeights:
    """How the merged weights of the adapted layers compare with those that PEFT makes."""

    def __init__(self) -> None:
        """Start with none."""
        self.names: set[str] = set()
        self.faults: list[str] = []
        self.worst = 0.0
        """Largest error of a weight, in steps of its 16-bit type: less than 1 is what rounding up or down can make."""
        self.worst_tensor = ""
        self._along = self._size = 0.0

    @property
    def scale(self) -> float:
        """How often the adapter is in the merged weights: 1 for once. NaN if it changes nothing."""
        return self._along / self._size if self._size else float("nan")

    def add(self, name: str, before: torch.Tensor, wanted: torch.Tensor, merged: Weights) -> None:
        """Take in the weight `name`: the base's, what PEFT makes of it, both float32, and what `merged` holds."""
        self.names.add(name)
        if name not in merged or merged.shape(name) != tuple(wanted.shape):
            self.faults.append(f"merged: {name} is {'missing' if name not in merged else 'of another shape'}")
            return
        stored = merged[name]
        found = stored.float()
        step = 2**-7 if stored.dtype == torch.bfloat16 else 2**-10
        # Sums in another order differ by a few float32 steps of the terms, which matters where they cancel out.
        allowed = wanted.abs() * step + 4e-7 * (before.abs() + (wanted - before).abs()) + 2**-24
        worst = float(((found - wanted).abs() / allowed).max())
        if not worst <= self.worst:
            self.worst, self.worst_tensor = worst, name
        change = wanted - before
        self._along += float(((found - before) * change).sum(dtype=torch.float64))
        self._size += float((change * change).sum(dtype=torch.float64))


def _load(folder: Path, dtype: torch.dtype | str) -> Any:
    from transformers import AutoModelForCausalLM

    quiet_transformers()
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def _split(chosen: torch.Tensor, logits: torch.Tensor, stop_ids: set[int]) -> list[Greedy]:
    """Return each answer up to its first stop token."""
    answers = []
    for row, scores in zip(chosen.tolist(), logits, strict=True):
        end = next((place + 1 for place, index in enumerate(row) if index in stop_ids), len(row))
        answers.append(Greedy(row[:end], scores[:end].numpy(), row[end - 1] in stop_ids))
    return answers
