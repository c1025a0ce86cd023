"""The export stage: a tuned run folder -> `adapter/`, `merged/`, `gguf/`, and the base's GGUF in the cache.

    export(Path("runs/mine"), ExportConfig())

The base is written as GGUF too, with the same converter, types and template, so that `prove` compares like with like.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock

from lorikeet.card import write_card
from lorikeet.config import ExportConfig, Quant
from lorikeet.data.encode import encode_all
from lorikeet.data.load import load_conversations
from lorikeet.errors import InputError, MachineError, is_out_of_memory
from lorikeet.export import imatrix, strength
from lorikeet.export.gguf import namer, write_gguf
from lorikeet.export.imatrix import Importance
from lorikeet.export.merge import merge
from lorikeet.export.mix import FILE_TYPES
from lorikeet.export.modelfile import write_modelfile
from lorikeet.export.tensors import tensors
from lorikeet.files import alone, atomic_file, atomic_folder, could_go, is_full, remove_leftovers, require_disk
from lorikeet.prompt import PromptFormat
from lorikeet.run import RunFolder, require_memory
from lorikeet.weights import base_gguf_path, base_name, cache_folder, model_identity, resolve_model

CALIBRATION = "data/calibration.jsonl"
"""Where `tune` keeps some of the training conversations."""


def export(root: Path, config: ExportConfig) -> RunFolder:
    """Write the artefacts that `config` asks for and return the run.

    What is there already and was made from this adapter is kept. Raises InputError if the run has no adapter or another
    export is writing there, MachineError if disk or memory do not suffice; the artefacts that were there stay.
    """
    if not config.budget_s >= 0:
        raise InputError(f"--budget-s is {config.budget_s:g}; it must be 0 or more seconds")
    run = RunFolder.open(root)
    with alone(root, command="export"), _with_remedies(run, config):
        for made in ("merged", "model-*.gguf", imatrix.FILE):
            remove_leftovers(root, of=made)
        return _export(run, config)


def _export(run: RunFolder, config: ExportConfig) -> RunFolder:
    adapter = run.require("adapter", command="lorikeet tune --resume")
    strength.finish(run)
    run.verify("adapter")
    wanted = set(config.formats)
    base = _base(run)
    if strength.must_measure(run, asked=config.strength, budget_s=config.budget_s):
        _require_memory(run, base, to="choosing the adapter's strength", instead="export with --strength 1")
    calibrations = {quant: _calibration(run, config, quant) for quant in config.quant} if "gguf" in wanted else {}

    def require_disk(chosen: float) -> None:
        if wanted & {"merged", "gguf"}:
            _require_disk(run, base, calibrations, chosen=chosen)

    with _progress("choosing the strength") as progress:
        strength.settle(
            run, base, asked=config.strength, budget_s=config.budget_s, before=require_disk, progress=progress
        )
    merged = _merged(run, base, adapter) if wanted & {"merged", "gguf"} else run.root / "merged"
    if "gguf" in wanted:
        for quant, calibration in calibrations.items():
            _tuned_gguf(run, merged, quant, calibration, budget_s=config.budget_s)
            _base_gguf(run, base, adapter, quant, calibration, budget_s=config.budget_s)
        if why := write_modelfile(run):
            print(f"no Modelfile for Ollama: {why}", file=sys.stderr, flush=True)
    _forget_older(run)
    write_card(run)
    return run


def _forget_older(run: RunFolder) -> None:
    """Take what was made from another adapter, or from another strength of it, out of the manifest, and say so."""
    manifest = run.manifest()
    now = _made_from(manifest, None)
    older = [
        name
        for name, entry in manifest["artefacts"].items()
        if (name == "merged" or name.startswith("gguf/")) and any(entry.get(key) != now[key] for key in now)
    ]
    if older:
        _say(f"no longer part of the run, as the adapter is another now: {', '.join(older)}")
        run.forget(*older)


def _base(run: RunFolder) -> Path:
    """Return the folder of the base that the run was tuned on. Raises InputError if its weights differ."""
    recorded = run.manifest()["base"]
    base = resolve_model(base_name(recorded))
    if model_identity(recorded["id"], base)["sha256"] != recorded["sha256"]:
        raise InputError(
            f"{base} is not the model that {run.root} was tuned on (its weights differ); restore it, or tune again"
        )
    return base


def convert(name: str, quant: Quant) -> Path:
    """Return the GGUF of a model that is no run, a hub id or a folder, written into the cache the first time.

    Raises InputError for a name that is no model or an architecture that cannot be written.
    """
    folder = resolve_model(name)
    path = cache_folder() / "gguf" / model_identity(name, folder)["sha256"][:16] / f"model-{quant}.gguf"
    if not path.is_file():
        if FILE_TYPES[quant].four_bit:
            _say(f"{name} comes without training conversations: {quant} is made without an importance matrix")
        with _report(f"writing {quant}", path) as progress, atomic_file(path) as beside:
            write_gguf(folder, beside, quant=quant, name=name, progress=progress)
    return path


@contextmanager
def _with_remedies(run: RunFolder, config: ExportConfig) -> Iterator[None]:
    """Turn what is raised when memory runs out into MachineError, and let that of a full disk say what could go."""
    try:
        yield
    except MachineError as error:
        if not is_full(error.__cause__):
            raise
        raise MachineError(f"{error}{could_go(_removable(run, config.quant))}") from error
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise MachineError(
            f"out of memory while exporting {run.root}; what was there is kept: close other programs and export again"
        ) from error


BYTES_PER_WEIGHT = {"f16": 2.0, "q8_0": 1.07, "q6_k": 0.83, "q5_k_m": 0.75, "q4_k_m": 0.67, "q4_0": 0.62}
"""Size of a GGUF over its weights, at most, for models whose embedding is a large part of them."""


LOADED = 1.3
"""What a model takes while it is asked, over its weights."""


def _require_disk(run: RunFolder, base: Path, calibrations: dict[Quant, Path | None], *, chosen: float) -> None:
    """Raise MachineError if what is still to be written at the strength `chosen` will not fit, saying what could go.

    `calibrations` has each type that is wanted, and the conversations that weigh its errors.
    """
    quants = [*calibrations]
    weights = sum(math.prod(tensor.shape) for tensor in tensors(base))
    manifest = {**run.manifest(), "strength": {"strength": chosen}}
    mine = [] if _is_merged(run, manifest) else [2.0]
    mine += [
        BYTES_PER_WEIGHT[quant]
        for quant, calibration in calibrations.items()
        if mine or not _is_made(run, manifest, quant, calibration)
    ]
    bases = [
        BYTES_PER_WEIGHT[quant]
        for quant, calibration in calibrations.items()
        if not base_gguf_path(
            manifest, quant, calibration_sha256=_made_from(manifest, calibration).get("calibration_sha256", "")
        ).is_file()
    ]
    removable = _removable(run, quants)
    here, cache = int(weights * sum(mine)), int(weights * sum(bases))
    cache_folder().mkdir(parents=True, exist_ok=True)
    if run.root.stat().st_dev == cache_folder().stat().st_dev:
        here, cache = here + cache, 0
    require_disk(run.root, here, removable=removable)
    require_disk(cache_folder(), cache, removable=removable)


def _removable(run: RunFolder, quants: Sequence[Quant]) -> list[Path]:
    """Return what can be done without: checkpoints, files of types that were not asked for, bases in the cache."""
    others = [file for file in (run.root / "gguf").glob("*.gguf") if file.stem.removeprefix("model-") not in quants]
    return [run.root / "checkpoints", *others, cache_folder() / "gguf"]


def _require_memory(run: RunFolder, model: Path, *, to: str, instead: str) -> None:
    """Raise MachineError before a model is loaded that does not fit; merging and quantising never load one."""
    weights = sum(math.prod(tensor.shape) for tensor in tensors(model))
    weight_bytes = 2 if run.manifest().get("dtype") == "bfloat16" else 4
    require_memory(int(LOADED * weights * weight_bytes), to=to, instead=instead)


def _is_merged(run: RunFolder, manifest: dict[str, Any]) -> bool:
    """Say whether `merged/` is there and was made from this adapter."""
    entry = manifest["artefacts"].get("merged", {})
    return _is_from(_made_from(manifest, None), entry) and (run.root / "merged").is_dir()


def _merged(run: RunFolder, base: Path, adapter: Path) -> Path:
    manifest = run.manifest()
    path = run.root / "merged"
    if _is_merged(run, manifest):
        return path
    with _report("merging", path) as progress, atomic_folder(path) as folder:
        merge(base, adapter, folder, progress=progress)
        run.forget("merged")
    run.record("merged", path, **_made_from(manifest, None))
    return path


def _calibration(run: RunFolder, config: ExportConfig, quant: Quant) -> Path | None:
    """Return the training conversations that weigh the errors of `quant`; None where none are wanted or there."""
    if not FILE_TYPES[quant].four_bit or not config.imatrix:
        return None
    if CALIBRATION not in run.manifest()["artefacts"]:
        _say(f"{run.root} keeps no {CALIBRATION}: {quant} is made without an importance matrix")
        return None
    run.verify(CALIBRATION)
    return run.root / CALIBRATION


def _tuned_gguf(run: RunFolder, merged: Path, quant: Quant, calibration: Path | None, *, budget_s: float) -> None:
    manifest = run.manifest()
    if _is_made(run, manifest, quant, calibration):
        return
    name = f"gguf/model-{quant}.gguf"
    made_from = _made_from(manifest, calibration)
    path = run.root / name
    importance = None
    if calibration:
        matrix = run.root / MATRIX
        if not _is_from(made_from, manifest["artefacts"].get(MATRIX, {})) or not matrix.is_file():
            base = base_gguf_path(manifest, quant, calibration_sha256=made_from["calibration_sha256"])
            run.forget(MATRIX)
            _collect(run, merged, calibration, matrix, like=base.with_name(imatrix.FILE), budget_s=budget_s)
            run.record(MATRIX, matrix, **made_from)
        importance = Importance.load(matrix)
    with _report(f"writing {quant}", path) as progress, atomic_file(path) as beside:
        write_gguf(merged, beside, quant=quant, name=run.root.resolve().name, importance=importance, progress=progress)
        run.forget(name)
    run.record(name, path, **made_from)


MATRIX = f"data/{imatrix.FILE}"
"""The tuned model's importance matrix in a run."""

MADE_FROM = ("adapter_sha256", "strength", "calibration_sha256")


def _made_from(manifest: dict[str, Any], calibration: Path | None) -> dict[str, Any]:
    """Return what an artefact's entry in the manifest says of its sources: the adapter, its strength, and conversations if any."""
    artefacts = manifest["artefacts"]
    made_from = {
        "adapter_sha256": artefacts["adapter"]["sha256"]["adapter_model.safetensors"],
        "strength": manifest["strength"]["strength"],
    }
    if calibration:
        made_from["calibration_sha256"] = artefacts[CALIBRATION]["sha256"][calibration.name]
    return made_from


def _is_made(run: RunFolder, manifest: dict[str, Any], quant: Quant, calibration: Path | None) -> bool:
    """Say whether the run's GGUF of this type is there and was made from this adapter, with or without a matrix as now."""
    name = f"gguf/model-{quant}.gguf"
    made_from = _made_from(manifest, calibration)
    needed = [name, MATRIX] if calibration else [name]  # a file cannot be certified without its matrix
    return _is_from(made_from, manifest["artefacts"].get(name, {})) and all((run.root / n).is_file() for n in needed)


def _is_from(made_from: dict[str, Any], entry: dict[str, Any]) -> bool:
    """Say whether an entry of the manifest names these sources and no others."""
    return all(entry.get(key) == made_from.get(key) for key in MADE_FROM)


def _base_gguf(
    run: RunFolder, base: Path, adapter: Path, quant: Quant, calibration: Path | None, *, budget_s: float
) -> None:
    """Write the base with the run's frozen template into the cache, unless it is there."""
    manifest = run.manifest()
    path = base_gguf_path(manifest, quant)
    if path.is_file():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(path.with_name(".lock")):
        remove_leftovers(path.parent)
        if not path.is_file():
            _write_base_gguf(path, run, base, adapter, quant, calibration, budget_s=budget_s)


def _write_base_gguf(
    path: Path,
    run: RunFolder,
    base: Path,
    adapter: Path,
    quant: Quant,
    calibration: Path | None,
    *,
    budget_s: float,
) -> None:
    if not (adapter / "tokenizer.json").is_file():
        raise InputError(f"{adapter} has no tokenizer; tune again")
    importance = None
    if calibration:
        matrix = path.with_name(imatrix.FILE)
        if not matrix.is_file():
            _collect(run, base, calibration, matrix, like=run.root / MATRIX, budget_s=budget_s)
        importance = Importance.load(matrix)
    with _report(f"writing the base as {quant}", path) as progress, atomic_file(path) as beside:
        write_gguf(
            base,
            beside,
            quant=quant,
            name=run.manifest()["base"]["id"],
            vocabulary=adapter,
            importance=importance,
            progress=progress,
        )


def _collect(run: RunFolder, model: Path, calibration: Path, out: Path, *, like: Path, budget_s: float) -> None:
    """Write the importance matrix of a model on the run's training conversations, in the run's prompt format, to `out`.

    Tuned model and base get as many conversations: those of the matrix `like` where it is there, else what fits the budget.
    """
    _require_memory(run, model, to="collecting the importance matrix", instead="export with --no-imatrix")
    conversations = load_conversations(str(calibration)).conversations
    rows = encode_all(
        PromptFormat.load(run.root / "adapter"), conversations, max_length=imatrix.MAX_LENGTH, on_long="truncate"
    ).rows
    if like.is_file():
        rows, budget_s = rows[: Importance.load(like).conversations], math.inf
        _say(f"importance matrix: {len(rows)} conversations, as many as the other model's has")
    with _report("collecting the importance matrix", out) as progress, atomic_file(out) as beside:
        found = imatrix.collect(
            model,
            [row.ids for row in rows],
            name_of=namer(model),
            dtype=run.manifest().get("dtype", "float32"),
            budget_s=budget_s,
            progress=progress,
            say=_say,
        )
        found.save(beside, dataset=calibration.name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _report(what: str, path: Path) -> Iterator[Callable[[int, int], None]]:
    """Show progress on a terminal and one line with size and time at the end."""
    began = time.monotonic()
    with _progress(what) as progress:
        yield progress
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
    _say(f"{path}: {size / 1e6:.0f} MB in {time.monotonic() - began:.1f} s")


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show what is done and the time left on a terminal; nothing elsewhere, and nothing before the first of it is done."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None, visible=False)
        yield lambda done, total: bar.update(task, completed=done, total=total, visible=True)
