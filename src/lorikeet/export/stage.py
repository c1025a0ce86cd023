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

from lorikeet.card import write_card
from lorikeet.config import ExportConfig
from lorikeet.errors import InputError
from lorikeet.export.gguf import write_gguf
from lorikeet.export.merge import merge
from lorikeet.export.modelfile import write_modelfile
from lorikeet.files import atomic_file, atomic_folder, require_disk
from lorikeet.run import RunFolder
from lorikeet.weights import base_gguf_path, base_name, cache_folder, model_identity, resolve_model


def export(root: Path, config: ExportConfig) -> RunFolder:
    """Write the artefacts that `config` asks for and return the run.

    What is there already and was made from this adapter is kept. Raises InputError if the run has no adapter.
    """
    run = RunFolder.open(root)
    adapter = run.require("adapter", command="lorikeet tune --resume")
    run.verify("adapter")
    wanted = set(config.formats)
    if not wanted & {"merged", "gguf"}:
        write_card(run)
        return run
    recorded = run.manifest()["base"]
    base = resolve_model(base_name(recorded))
    if model_identity(recorded["id"], base)["sha256"] != recorded["sha256"]:
        raise InputError(
            f"{base} is not the model that {root} was tuned on (its weights differ); restore it, or tune again"
        )
    weights_bytes = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    require_disk(root, int(weights_bytes * (1.1 + 2.2 * ("gguf" in wanted))))
    merged = _merged(run, base, adapter)
    if "gguf" in wanted:
        for quant in config.quant:
            _tuned_gguf(run, merged, quant)
            _base_gguf(run, base, adapter, quant)
        if why := write_modelfile(run):
            print(f"no Modelfile for Ollama: {why}", file=sys.stderr, flush=True)
    write_card(run)
    return run


def convert(name: str, quant: str) -> Path:
    """Return the GGUF of a model that is no run, a hub id or a folder, written into the cache the first time.

    Raises InputError for a name that is no model or an architecture that cannot be written.
    """
    folder = resolve_model(name)
    path = cache_folder() / "gguf" / model_identity(name, folder)["sha256"][:16] / f"model-{quant}.gguf"
    if not path.is_file():
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


def _tuned_gguf(run: RunFolder, merged: Path, quant: str) -> None:
    name = f"gguf/model-{quant}.gguf"
    manifest = run.manifest()
    source = manifest["artefacts"]["adapter"]["sha256"]["adapter_model.safetensors"]
    path = run.root / name
    if manifest["artefacts"].get(name, {}).get("adapter_sha256") == source and path.is_file():
        return
    with _report(f"writing {quant}", path) as progress, atomic_file(path) as beside:
        write_gguf(merged, beside, quant=quant, name=run.root.resolve().name, progress=progress)
    run.record(name, path, adapter_sha256=source)


def _base_gguf(run: RunFolder, base: Path, adapter: Path, quant: str) -> None:
    """Write the base with the run's frozen template into the cache, unless it is there."""
    manifest = run.manifest()
    path = base_gguf_path(manifest, quant)
    if path.is_file():
        return
    with _report(f"writing the base as {quant}", path) as progress, atomic_file(path) as beside:
        if not (adapter / "tokenizer.json").is_file():
            raise InputError(f"{adapter} has no tokenizer; tune again")
        write_gguf(base, beside, quant=quant, name=manifest["base"]["id"], vocabulary=adapter, progress=progress)


@contextmanager
def _report(what: str, path: Path) -> Iterator[Callable[[int, int], None]]:
    """Show progress on a terminal and one line with size and time at the end."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    began = time.monotonic()
    columns = (TextColumn(what), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
    size = sum(f.stat().st_size for f in path.rglob("*") if f.is_file()) if path.is_dir() else path.stat().st_size
    print(f"{path}: {size / 1e6:.0f} MB in {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
