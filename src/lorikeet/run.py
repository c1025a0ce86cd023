"""The run folder, the contract between stages: manifest, hashes, metrics.

    run = RunFolder.create(Path("runs/mine"), stage="tune", config={...})
    run.record("adapter", run.root / "adapter")     # hashes, and the mark `complete`
    RunFolder.open(path).require("adapter", command="lorikeet tune")

It does not know what the artefacts contain. Layout: `run.json`, `metrics.jsonl`, `checkpoints/`, `adapter/`,
`merged/`, `gguf/`, `reports/`, `README.md`.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from lorikeet.errors import InputError, MachineError
from lorikeet.files import is_leftover, sha256_tree, write_atomic, writing

NO_LIMIT_BYTES = 1 << 62

LIBRARIES_ADDRESS_BYTES = 2_000_000_000
"""Addresses that torch, transformers and numba take with a model of no size; what they hold in memory is a quarter of it."""

VERSIONED = ("lorikeet", "torch", "transformers", "peft", "tokenizers", "gguf", "xllamacpp", "numpy")


def usable_cores() -> int:
    """Return how many cores this process may use: fewer than the machine has where it, or its container, is bound to some."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def resident_bytes(*, peak: bool = False) -> int:
    """Return the memory that this process holds now, or at its `peak`."""
    status = Path("/proc/self/status")
    if status.exists():
        key = "VmHWM:" if peak else "VmRSS:"
        for line in status.read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    import resource

    usage = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return usage if sys.platform == "darwin" else usage * 1024


def free_bytes() -> int:
    """Return the memory that this process may still take: the machine's or, if less, the container's or its own limit's.

    Where the system does not say, it is more than any machine has.
    """
    free = free_address_bytes()
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        lines = (line.split() for line in meminfo.read_text().splitlines())
        free = min(free, next((int(words[1]) * 1024 for words in lines if words[0] == "MemAvailable:"), free))
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        if Path(limit).is_file() and (text := Path(limit).read_text().strip()).isdigit():
            free = min(free, max(0, int(text) - int(Path(used).read_text())))
    return free


def free_address_bytes() -> int:
    """Return how much address space this process may still take (`ulimit -v`); more than any machine has without a limit."""
    try:
        import resource
    except ImportError:
        return NO_LIMIT_BYTES  # Windows has none
    limit = resource.getrlimit(resource.RLIMIT_AS)[0]
    status = Path("/proc/self/statm")
    if limit == resource.RLIM_INFINITY or not status.is_file():
        return NO_LIMIT_BYTES
    return max(0, limit - int(status.read_text().split()[0]) * resource.getpagesize())


def require_memory(needed_bytes: int, *, to: str, instead: str = "") -> None:
    """Raise MachineError if less than `needed_bytes` of memory are free, before it runs out; `to` says what they are for."""
    free = free_bytes()
    if free < needed_bytes:
        raise MachineError(
            f"{free / 1e9:.1f} GB of memory are free and {to} takes {needed_bytes / 1e9:.1f} GB; close other programs"
            + (f", or {instead}" if instead else "")
        )


def require_address_space() -> None:
    """Raise MachineError if the libraries do not fit what `ulimit -v` leaves: some of them end the process without a word."""
    free = free_address_bytes()
    if free < LIBRARIES_ADDRESS_BYTES:
        raise MachineError(
            f"this process may take {free / 1e9:.1f} GB of addresses (ulimit -v), and the libraries alone take "
            f"{LIBRARIES_ADDRESS_BYTES / 1e9:.1f} GB; raise the limit and try again"
        )


def environment() -> dict[str, Any]:
    """Return `{"versions": {...}, "hardware": {...}}` of this machine."""
    versions = {"python": platform.python_version()}
    for package in VERSIONED:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "hardware": {
            "machine": platform.machine(),
            "system": platform.system(),
            "processor": _processor(),
            "cores": os.cpu_count(),
        },
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor()


@dataclass(frozen=True)
class RunFolder:
    """A run folder on the disk; nothing of it is kept in memory."""

    root: Path

    @classmethod
    def create(cls, root: Path, *, config: dict[str, Any]) -> RunFolder:
        """Make a run folder with a manifest that holds the resolved `config`, the environment and status `created`.

        Raises InputError if `root` is a file or a folder that holds anything.
        """
        cls.require_free(root)
        run = cls(root)
        run._write({"status": "created", "config": config, "artefacts": {}, **environment()})
        return run

    @classmethod
    def require_free(cls, root: Path) -> None:
        """Raise InputError if `root` cannot be a new run: it is a file, or a folder that holds more than a lock or leftovers."""
        with writing(root):
            held = root.is_dir() and any(not is_leftover(path) for path in root.iterdir())
            if held or (root.exists() and not root.is_dir()):
                raise InputError(
                    f"{root} is there already; name another folder with --out, or go on with: lorikeet tune --resume {root}"
                )

    @classmethod
    def open(cls, root: Path) -> RunFolder:
        """Return the run at `root`. Raises InputError if there is none or its manifest cannot be read."""
        run = cls(root)
        if not run.manifest_path.is_file():
            raise InputError(f"{root} is not a run folder (no run.json); lorikeet tune --out {root} makes one")
        try:
            manifest = json.loads(run.manifest_path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise InputError(f"{run.manifest_path} cannot be read ({error}); restore it or tune again") from error
        if not isinstance(manifest, dict) or not _are_artefacts(manifest.get("artefacts")):
            raise InputError(f"{run.manifest_path} is not a run's manifest; restore it or tune again")
        return run

    @property
    def manifest_path(self) -> Path:
        """`run.json`."""
        return self.root / "run.json"

    @property
    def metrics_path(self) -> Path:
        """`metrics.jsonl`, one object a step."""
        return self.root / "metrics.jsonl"

    @property
    def reports(self) -> Path:
        """The folder of reports; it need not exist yet."""
        return self.root / "reports"

    def manifest(self) -> dict[str, Any]:
        """Return the manifest as it is on the disk."""
        manifest: dict[str, Any] = json.loads(self.manifest_path.read_text(encoding="utf-8"))
        return manifest

    def update(self, **values: Any) -> None:
        """Set top-level `values` in the manifest, atomically."""
        self._write({**self.manifest(), **values})

    def record(self, name: str, path: Path, **about: Any) -> None:
        """Enter the artefact at `path` into the manifest: hashes of its files, `about`, and the mark `complete`."""
        manifest = self.manifest()
        manifest["artefacts"][name] = {"complete": True, "sha256": sha256_tree(path), **about}
        self._write(manifest)

    def forget(self, *names: str) -> None:
        """Take artefacts out of the manifest, before what they were made from is replaced."""
        manifest = self.manifest()
        for name in names:
            manifest["artefacts"].pop(name, None)
        self._write(manifest)

    def require(self, name: str, *, command: str) -> Path:
        """Return the path of a complete artefact, such as `adapter` or `gguf/model-q8_0.gguf`.

        Raises InputError, naming the `command` that makes it, if it is missing, or not complete, or a file differs in
        name from what was recorded.
        """
        entry = self.manifest()["artefacts"].get(name)
        path = self.root / name
        if not entry or not entry.get("complete") or not path.exists():
            raise InputError(f"{self.root} has no complete {name}; make it with: {command} {self.root}")
        for file in entry["sha256"]:
            if path.is_dir() and not (path / file).is_file():
                raise InputError(f"{path / file} is missing; make it again with: {command} {self.root}")
        return path

    def verify(self, name: str) -> None:
        """Compare an artefact's files with the hashes in the manifest. Raises InputError naming the one that differs."""
        entry = self.manifest()["artefacts"][name]
        path = self.root / name
        found = sha256_tree(path)
        for file, expected in entry["sha256"].items():
            if found.get(file) != expected:
                raise InputError(
                    f"{path if path.is_file() else path / file} is not the file that was recorded; export again"
                )

    def certificate(self) -> dict[str, Any]:
        """Return `reports/parity.json`, if it passed for exactly the artefacts that are here now.

        Raises InputError where there is none, where it did not pass, and where an artefact was changed or added since.
        """
        path = self.reports / "parity.json"
        again = f"check with: lorikeet verify {self.root}"
        try:
            certificate: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            passed, certified = certificate["pass"], certificate["artefacts"]
        except FileNotFoundError as error:
            raise InputError(f"{self.root} has no parity certificate; {again}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path} cannot be read ({error}); {again}") from error
        if passed is not True:
            failed = ", ".join(check["name"] for check in certificate["checks"] if not check["pass"])
            raise InputError(f"{self.root} did not pass its parity certificate ({failed}); see {path}, export again")
        for name in self.certifiable():
            if certified.get(name) != sha256_tree(self.root / name):
                raise InputError(f"{self.root / name} is not what its parity certificate is about; {again}")
        return certificate

    def report(self, name: str) -> dict[str, Any] | None:
        """Return `reports/NAME.json`, of `proof` or `parity`, if it is about the files that are here now, else None.

        A proof's tuned file, or every artefact of a certificate, must have the hash that is in the manifest.
        """
        try:
            report = json.loads((self.reports / f"{name}.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        if not isinstance(report, dict) or not isinstance(report.get("checks"), list):
            return None
        files = report.get("files", {})
        named = {files["tuned"]: files["tuned_sha256"]} if "tuned" in files else report.get("artefacts", {})
        artefacts = self.manifest()["artefacts"]
        recorded = {artefact: artefacts.get(artefact, {}).get("sha256") for artefact in named}
        return report if named and recorded == named else None

    def certifiable(self) -> list[str]:
        """Return the artefacts that a parity certificate is about: those of adapter, merged and GGUF files that are here."""
        names = [
            name for name in self.manifest()["artefacts"] if name in {"adapter", "merged"} or name.startswith("gguf/")
        ]
        return [name for name in names if (self.root / name).exists()]

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Append one JSON object to `metrics.jsonl`. Raises MachineError when the disk is at fault."""
        with writing(self.metrics_path), self.metrics_path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def metrics(self) -> list[dict[str, Any]]:
        """Return the rows of `metrics.jsonl`; a last line that was cut off is left out."""
        if not self.metrics_path.exists():
            return []
        rows = []
        for line in self.metrics_path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                rows.append(json.loads(line))
            except ValueError:
                break
        return rows

    def _write(self, manifest: dict[str, Any]) -> None:
        write_atomic(self.manifest_path, json.dumps(manifest, indent=2, default=str) + "\n")


def _are_artefacts(entries: Any) -> bool:
    """Say whether `entries` is what `record` leaves in a manifest: every artefact with the hashes of its files."""
    return isinstance(entries, dict) and all(
        isinstance(entry, dict) and isinstance(entry.get("sha256"), dict) for entry in entries.values()
    )
