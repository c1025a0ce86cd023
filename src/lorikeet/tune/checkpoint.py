"""Checkpoints: everything that the next step depends on, written whole or not at all.

    save(run, state, parameters, optimizer, scaler)    # RUN/checkpoints/step-000100/
    state = restore(latest(run), parameters, optimizer, scaler)

A checkpoint holds the adapter, the optimizer's moments, the loss scale, the random state and the counters; the data's position follows
from the step. Tensors are safetensors: nothing in it can execute.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorikeet.errors import InputError
from lorikeet.files import atomic_folder, require_disk
from lorikeet.run import RunFolder

STATE = "state.json"
ADAPTER = "adapter.safetensors"
OPTIMIZER = "optimizer.safetensors"
SCALER = "scaler:"


@dataclass(frozen=True, slots=True)
class State:
    """The counters of a run."""

    step: int
    """Steps that are done."""
    total_steps: int
    best_step: int
    best_loss: float
    """Lowest validation loss so far, in nats a token."""
    elapsed_s: float
    """Tuning time so far, over all sessions of the run."""
    validation_s: float
    """How long the first validation took."""
    tokens: int
    """Tokens seen so far."""
    since_best: int = 0
    """Validations since the best one."""


def folder(run: RunFolder, step: int) -> Path:
    """Return where the checkpoint of `step` lies."""
    return run.root / "checkpoints" / f"step-{step:06d}"


def save(
    run: RunFolder,
    state: State,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> None:
    """Write the checkpoint of `state.step`, atomically. Raises MachineError, before it starts, if the disk is too full."""
    tensors = {
        # bitsandbytes has one code book for all parameters, and what shares memory cannot be written.
        f"{name}:{key}": value.clone(memory_format=torch.contiguous_format)
        if torch.is_tensor(value)
        else torch.tensor([value])
        for name, parameter in parameters.items()
        for key, value in optimizer.state[parameter].items()
    }
    tensors |= {f"{SCALER}{key}": torch.tensor([float(value)]) for key, value in scaler.state_dict().items()}
    require_disk(run.root, sum(t.nbytes for t in (*tensors.values(), *parameters.values())))
    tensors["random"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["random_cuda"] = torch.cuda.get_rng_state()
    with atomic_folder(folder(run, state.step)) as target:
        save_file({name: parameter.detach().contiguous() for name, parameter in parameters.items()}, target / ADAPTER)
        save_file(tensors, target / OPTIMIZER)
        (target / STATE).write_text(json.dumps(asdict(state)))


def size_bytes(parameters: dict[str, torch.nn.Parameter]) -> int:
    """Return about how many bytes a checkpoint takes: the parameters and AdamW's two moments, in float32."""
    return 3 * sum(parameter.numel() * 4 for parameter in parameters.values())


def latest(run: RunFolder) -> Path | None:
    """Return the newest checkpoint, or None before the first."""
    found = sorted((run.root / "checkpoints").glob("step-*"))
    return found[-1] if found else None


def spare(run: RunFolder) -> list[Path]:
    """Return the checkpoints that going on does not need: all but the newest, and the best that it knows of."""
    *older, newest = sorted((run.root / "checkpoints").glob("step-*"))
    best = json.loads((newest / STATE).read_text())["best_step"]
    return [path for path in older if path != folder(run, best)]


def restore(
    path: Path,
    parameters: dict[str, torch.nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
) -> State:
    """Set parameters, optimizer, loss scale and random state to the checkpoint's and return its counters.

    Raises InputError if it cannot be read or does not belong to this run's adapter.
    """
    with _readable(path):
        load_parameters(path, parameters)
        tensors = load_file(path / OPTIMIZER)
        for name, parameter in parameters.items():
            entries = {
                key.rpartition(":")[2]: value for key, value in tensors.items() if key.rpartition(":")[0] == name
            }
            optimizer.state[parameter] = {
                key: _step(value) if key == "step" else value
                for key, value in ((key, value.to(parameter.device)) for key, value in entries.items())
            }
        scale = {key.removeprefix(SCALER): value.item() for key, value in tensors.items() if key.startswith(SCALER)}
        if scale:
            scaler.load_state_dict(
                {key: int(v) if key.endswith(("interval", "tracker")) else v for key, v in scale.items()}
            )
        torch.set_rng_state(tensors["random"])
        if "random_cuda" in tensors:
            torch.cuda.set_rng_state(tensors["random_cuda"])
        return State(**json.loads((path / STATE).read_text()))


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turn what a damaged checkpoint raises in the block into InputError."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise InputError(
            f"{path} cannot be read ({type(error).__name__}: {error}); remove it to go on from the checkpoint before it"
        ) from error


def _step(value: torch.Tensor) -> torch.Tensor | int:
    """Return a step count as its optimizer keeps it: torch as a tensor of shape (), bitsandbytes as a number."""
    return value if value.dim() == 0 else int(value.item())


def load_parameters(path: Path, parameters: dict[str, torch.nn.Parameter]) -> None:
    """Set the adapter's parameters to the checkpoint's. Raises InputError if it cannot be read, or names or shapes differ."""
    with _readable(path):
        saved = load_file(path / ADAPTER)
    if {name: tuple(value.shape) for name, value in saved.items()} != {
        name: tuple(value.shape) for name, value in parameters.items()
    }:
        raise InputError(f"{path} holds another adapter than run.json describes; tune into a new folder")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def prune(run: RunFolder, *, keep: int, best_step: int) -> None:
    """Remove all checkpoints but the newest `keep` and the best."""
    found = sorted((run.root / "checkpoints").glob("step-*"))
    for path in found[: max(0, len(found) - keep)]:
        if path != folder(run, best_step):
            shutil.rmtree(path)
