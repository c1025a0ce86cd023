"""The export stage: a tuned run folder -> `adapter/`, `merged/`, `gguf/`, and the base's GGUF in the cache.

    export(Path("runs/mine"), ExportConfig())

The base is written as GGUF too, with the same converter, types and template, so that `prove` compares like with like.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lorikeet.card import write_card
from lorikeet.config import ExportConfig, Quant
from lorikeet.data.encode import encode_all
from lorikeet.data.load import load_conversations
from lorikeet.errors import InputError
from lorikeet.export import imatrix, strength
from lorikeet.export.gguf import namer, write_gguf
from lorikeet.export.imatrix import Importance
from lorikeet.export.merge import merge
from lorikeet.export.mix import FILE_TYPES
from lorikeet.export.modelfile import write_modelfile
from lorikeet.files import atomic_file, atomic_folder, require_disk
from lorikeet.prompt import PromptFormat
from lorikeet.run import RunFolder
from lorikeet.weights import base_gguf_path, base_name, cache_folder, model_identity, resolve_model

CALIBRATION = "data/calibration.jsonl"
"""Where `tune` keeps some of the training conversations."""


def export(root: Path, config: ExportConfig) -> RunFolder:
    """Write the artefacts that `config` asks for and return the run.

    What is there already and was made from this adapter is kept. Raises InputError if the run has no adapter.
    """
    run = RunFolder.open(root)
    adapter = run.require("adapter", command="lorikeet tune --resume")
    strength.finish(run)
    run.verify("adapter")
    wanted = set(config.formats)
    base = _base(run)
    strength.settle(run, base, asked=config.strength)
    if not wanted & {"merged", "gguf"}:
        write_card(run)
        return run
    weights_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    require_disk(root, int(weights_bytes * (1.1 + 2.2 * ("gguf" in wanted))))
    merged = _merged(run, base, adapter)
    if "gguf" in wanted:
        for quant in config.quant:
            calibration = _calibration(run, config, quant)
            _tuned_gguf(run, merged, quant, calibration)
            _base_gguf(run, base, adapter, quant, calibration)
        if why := write_modelfile(run):
            print(f"no Modelfile for Ollama: {why}", file=sys.stderr, flush=True)
    write_card(run)
    return run


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


def _merged(run: RunFolder, base: Path, adapter: Path) -> Path:
    manifest = run.manifest()
    source = manifest["artefacts"]["adapter"]["sha256"]["adapter_model.safetensors"]
    entry = manifest["artefacts"].get("merged", {})
    path = run.root / "merged"
    if entry.get("adapter_sha256") == source and path.is_dir():
        return path
    run.forget("merged", *(name for name in manifest["artefacts"] if name.startswith("gguf/")))
    with _report("merging", path) as progress, atomic_folder(path) as folder:
        merge(base, adapter, folder, progress=progress)
    run.record("merged", path, adapter_sha256=source)
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


def _tuned_gguf(run: RunFolder, merged: Path, quant: Quant, calibration: Path | None) -> None:
    name = f"gguf/model-{quant}.gguf"
    manifest = run.manifest()
    made_from = _made_from(manifest, calibration)
    path = run.root / name
    entry = manifest["artefacts"].get(name, {})
    if path.is_file() and {key: entry.get(key) for key in MADE_FROM} == {key: made_from.get(key) for key in MADE_FROM}:
        return
    importance = None
    if calibration:
        matrix = run.root / MATRIX
        known = {key: manifest["artefacts"].get(MATRIX, {}).get(key) for key in MADE_FROM} == made_from
        if not known or not matrix.is_file():
            _collect(merged, run.root / "adapter", calibration, manifest, matrix)
            run.record(MATRIX, matrix, **made_from)
        importance = Importance.load(matrix)
    with _report(f"writing {quant}", path) as progress, atomic_file(path) as beside:
        write_gguf(merged, beside, quant=quant, name=run.root.resolve().name, importance=importance, progress=progress)
    run.record(name, path, **made_from)


MATRIX = f"data/{imatrix.FILE}"
"""The tuned model's importance matrix in a run."""

MADE_FROM = ("adapter_sha256", "calibration_sha256")


def _made_from(manifest: dict[str, Any], calibration: Path | None) -> dict[str, str]:
    """Return what a GGUF's entry in the manifest says of its sources: the adapter, and the conversations if any."""
    artefacts = manifest["artefacts"]
    made_from = {"adapter_sha256": artefacts["adapter"]["sha256"]["adapter_model.safetensors"]}
    if calibration:
        made_from["calibration_sha256"] = artefacts[CALIBRATION]["sha256"][calibration.name]
    return made_from


def _base_gguf(run: RunFolder, base: Path, adapter: Path, quant: Quant, calibration: Path | None) -> None:
    """Write the base with the run's frozen template into the cache, unless it is there."""
    manifest = run.manifest()
    path = base_gguf_path(manifest, quant)
    if path.is_file():
        return
    if not (adapter / "tokenizer.json").is_file():
        raise InputError(f"{adapter} has no tokenizer; tune again")
    importance = None
    if calibration:
        matrix = path.with_name(imatrix.FILE)
        if not matrix.is_file():
            _collect(base, adapter, calibration, manifest, matrix)
        importance = Importance.load(matrix)
    with _report(f"writing the base as {quant}", path) as progress, atomic_file(path) as beside:
        write_gguf(
            base,
            beside,
            quant=quant,
            name=manifest["base"]["id"],
            vocabulary=adapter,
            importance=importance,
            progress=progress,
        )


def _collect(model: Path, adapter: Path, calibration: Path, manifest: dict[str, Any], out: Path) -> None:
    """Write the importance matrix of a model on the run's training conversations, in the run's prompt format, to `out`."""
    conversations = load_conversations(str(calibration)).conversations
    rows = encode_all(PromptFormat.load(adapter), conversations, max_length=imatrix.MAX_LENGTH, on_long="truncate").rows
    with _report("collecting the importance matrix", out) as progress, atomic_file(out) as beside:
        found = imatrix.collect(
            model,
            [row.ids for row in rows],
            name_of=namer(model),
            dtype=manifest.get("dtype", "float32"),
            progress=progress,
        )
        found.save(beside, dataset=calibration.name)


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


@contextmanager
def _report(what: str, path: Path) -> Iterator[Callable[[int, int], None]]:
    """Show progress on a terminal and one line with size and time at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    began = time.monotonic()
    columns = (TextColumn(what), BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
    print(f"{path}: {size / 1e6:.0f} MB in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
