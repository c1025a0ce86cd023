"""Export when disk or memory run out, another export is at work, or the process is killed: nothing lost, nothing half."""

from __future__ import annotations

import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock
from safetensors import safe_open

from lorikeet import cli
from lorikeet import run as running
from lorikeet.config import ExportConfig, TuneConfig
from lorikeet.errors import InputError, MachineError
from lorikeet.export import merge as merging
from lorikeet.export import stage
from lorikeet.export.stage import export
from lorikeet.files import atomic_folder, remove_leftovers, require_disk, sha256_tree
from lorikeet.run import RunFolder
from lorikeet.tune import loop

from ..conftest import make_conversations, make_model, write_jsonl

ONE = ExportConfig(quant=("q8_0",))


@pytest.fixture(scope="module")
def tuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tuned run that nothing was exported from."""
    folder = tmp_path_factory.mktemp("tuned")
    data = write_jsonl(folder / "chats.jsonl", make_conversations())
    model = make_model(folder / "base")
    config = TuneConfig(model=str(model), data=str(data), max_steps=2, dtype="float32")
    return loop.tune(config, out=folder / "run").root


@pytest.fixture
def run(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    """A copy of it, and a cache of its own."""
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    return RunFolder(shutil.copytree(tuned, tmp_path / "run"))


def artefacts(run: RunFolder) -> dict[str, dict[str, str]]:
    """Return the hashes of what export writes."""
    return {name: sha256_tree(run.root / name) for name in ("merged", "gguf") if (run.root / name).exists()}


def leftovers(folder: Path) -> list[Path]:
    return [*folder.rglob("*.part"), *folder.rglob("*.old")]


def again_merged(run: RunFolder) -> None:
    """Make the next export merge and write everything again."""
    manifest = run.manifest()
    manifest["artefacts"]["merged"]["adapter_sha256"] = "that of an older adapter"
    run.update(artefacts=manifest["artefacts"])


@contextmanager
def largest_file(size_bytes: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("limit_bytes", [20_000, 150_000])
def test_a_file_that_cannot_grow_leaves_what_was_there(run: RunFolder, limit_bytes: int) -> None:
    export(run.root, ONE)
    before, recorded = artefacts(run), run.manifest()["artefacts"]
    again_merged(run)
    with largest_file(limit_bytes), pytest.raises(MachineError, match="File too large; what was there is kept"):
        export(run.root, ONE)
    assert artefacts(run) == before
    assert run.manifest()["artefacts"]["gguf/model-q8_0.gguf"] == recorded["gguf/model-q8_0.gguf"]
    assert not leftovers(run.root)
    export(run.root, ONE)
    assert artefacts(run) == before


def test_a_disk_that_is_full_at_any_phase_leaves_what_was_there(
    run: RunFolder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = ["--no-verify", "--quant", "f16,q4_k_m"]
    assert cli.run(["export", str(run.root), *asked]) == 0
    whole = {**artefacts(run), "data": sha256_tree(run.root / "data")}
    used = sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file())
    for name in ("merged", "gguf"):
        shutil.rmtree(run.root / name)
    (run.root / "data" / "imatrix.gguf").unlink()
    shutil.rmtree(tmp_path / "cache")
    disk = tmp_path / "disk"
    disk.mkdir()
    room = sum(file.stat().st_size for file in run.root.rglob("*") if file.is_file()) + 100_000
    if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small disk cannot be mounted here")
    try:
        small = RunFolder(shutil.copytree(run.root, disk / "run"))
        monkeypatch.setenv("LORIKEET_CACHE", str(disk / "cache"))
        with monkeypatch.context() as patched:
            patched.setattr(stage, "require_disk", lambda *_, **__: None)
            stopped_at = []
            while code := cli.run(["export", str(small.root), *asked]):
                (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("lorikeet:")]
                assert code == 3
                assert "what was there is kept: free some space" in line
                assert f"could go: {small.root / 'checkpoints'}" in line
                stopped_at.append(line.partition("cannot write ")[2].partition(": ")[0].rpartition("/")[2])
                assert not leftovers(disk)
                for name, entry in small.manifest()["artefacts"].items():
                    assert entry["complete"]
                    if (small.root / name).exists():
                        small.verify(name)
                room += 40_000
                assert room < 4 * used, "it never fits"
                subprocess.run(["mount", "-o", f"remount,size={room}", disk], check=True)
        assert {"merged", "model-f16.gguf", "model-q4_k_m.gguf"} <= set(stopped_at)
        assert {**artefacts(small), "data": sha256_tree(small.root / "data")} == whole
    finally:
        subprocess.run(["umount", disk], check=True)


def test_an_export_that_will_not_fit_writes_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stage, "BYTES_PER_WEIGHT", dict.fromkeys(stage.BYTES_PER_WEIGHT, 1e12))
    with pytest.raises(MachineError, match=r"free and .* are needed; .*could go: .*checkpoints"):
        export(run.root, ONE)
    assert not (run.root / "merged").exists()


def test_another_strength_that_will_not_fit_changes_nothing(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    export(run.root, replace(ONE, strength="1"))
    before, adapter = run.manifest(), sha256_tree(run.root / "adapter")
    with monkeypatch.context() as patch:
        patch.setattr(stage, "BYTES_PER_WEIGHT", dict.fromkeys(stage.BYTES_PER_WEIGHT, 1e12))
        with pytest.raises(MachineError, match=r"free and .* are needed"):
            export(run.root, replace(ONE, strength="0.5"))
    assert run.manifest() == before and sha256_tree(run.root / "adapter") == adapter


@pytest.mark.parametrize("phase", ["merge", "write_gguf"])
def test_the_last_export_is_served_until_the_next_strength_is_there(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, phase: str
) -> None:
    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    export(run.root, ExportConfig(quant=("q8_0", "q4_0"), imatrix=False, strength="1"))
    weaker = replace(ONE, strength="0.5")
    with monkeypatch.context() as patch:
        patch.setattr(stage, phase, killed)
        with pytest.raises(KeyboardInterrupt):
            export(run.root, weaker)
    for quant in ("q8_0", "q4_0"):
        run.require(f"gguf/model-{quant}.gguf", command="lorikeet export")
        run.verify(f"gguf/model-{quant}.gguf")
    first = artefacts(run)
    export(run.root, weaker)
    found = run.manifest()["artefacts"]
    assert found["merged"]["strength"] == found["gguf/model-q8_0.gguf"]["strength"] == 0.5
    assert "gguf/model-q4_0.gguf" not in found
    assert artefacts(run)["gguf"]["model-q8_0.gguf"] != first["gguf"]["model-q8_0.gguf"]


@pytest.mark.parametrize("allocate", [lambda: torch.empty(1 << 46, dtype=torch.uint8), lambda: np.empty(1 << 46)])
def test_memory_that_runs_out_is_said_in_one_line(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch, allocate: Any
) -> None:
    export(run.root, ONE)
    before = artefacts(run)
    again_merged(run)
    monkeypatch.setattr(merging, "merged_tensor", lambda *_: allocate())
    with pytest.raises(MachineError, match=r"^out of memory while exporting .*close other programs") as caught:
        export(run.root, ONE)
    assert "\n" not in str(caught.value)
    assert artefacts(run) == before
    assert not leftovers(run.root)


CHILD = """
import os, resource, sys
from lorikeet import cli
from lorikeet import run as running
from lorikeet.export import imatrix, stage

owner, name = {"merge": (stage, "merge"), "write": (stage, "write_gguf"), "collect": (imatrix, "collect")}[sys.argv[1]]
real = getattr(owner, name)

def no_more_memory(*values, **named):
    size_bytes = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (size_bytes, size_bytes))
    return real(*values, **named)

setattr(owner, name, no_more_memory)
sys.exit(cli.run(["export", *sys.argv[2:]]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
@pytest.mark.parametrize("phase", ["merge", "collect", "write"])
def test_memory_that_runs_out_in_a_phase_ends_the_command_with_one_line(run: RunFolder, phase: str) -> None:
    export(run.root, ONE)
    before = artefacts(run)
    again_merged(run)
    if phase != "merge":
        export(run.root, ExportConfig(formats=("merged",)))
    command = [sys.executable, "-c", CHILD, phase, str(run.root), "--no-verify", "--quant", "q8_0,q4_0"]
    done = subprocess.run(command, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if not line.startswith(str(run.root))]
    assert done.returncode == 3, done.stderr
    assert said[-1].startswith("lorikeet: out of memory while exporting")
    assert "close other programs" in said[-1]
    assert "Traceback" not in done.stderr
    assert artefacts(run) == before
    assert not leftovers(run.root.parent)


@pytest.mark.skipif(sys.platform != "linux", reason="address space is limited on Linux alone")
def test_too_little_address_space_is_said_before_the_libraries_are_loaded(run: RunFolder) -> None:
    command = [sys.executable, "-c", "from lorikeet.cli import main; main()", "export", str(run.root)]
    limit = 1_500_000_000
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (limit, limit)),
    )
    assert done.returncode == 3
    (line,) = done.stderr.splitlines()
    assert "the libraries alone take 2.0 GB; raise the limit" in line
    assert not (run.root / "merged").exists()


def test_a_model_that_does_not_fit_is_refused_before_it_is_loaded(
    run: RunFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "free_bytes", lambda: 100_000)
    with pytest.raises(MachineError, match=r"close other programs, or export with --strength 1$"):
        export(run.root, ONE)
    four = ExportConfig(quant=("q4_0",), strength="1")
    with pytest.raises(MachineError, match=r"close other programs, or export with --no-imatrix$"):
        export(run.root, four)
    export(run.root, ExportConfig(quant=("q4_0",), strength="1", imatrix=False))
    assert (run.root / "gguf" / "model-q4_0.gguf").is_file()


def test_a_limit_of_addresses_counts_as_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that fits the machine and not `ulimit -v` must be computed in the smaller type, or refused."""
    monkeypatch.setattr(running, "free_address_bytes", lambda: 1_000_000)
    assert running.free_bytes() <= 1_000_000


def test_two_exports_of_one_run_exclude_each_other(run: RunFolder) -> None:
    with FileLock(run.root / ".export.lock"), pytest.raises(InputError, match="another lorikeet export is writing"):
        export(run.root, ONE)
    assert not (run.root / "merged").exists()


def test_too_little_room_names_what_could_go(run: RunFolder) -> None:
    with pytest.raises(MachineError, match=r"are needed; free some or choose another disk; could go: .*checkpoints"):
        require_disk(run.root, 1 << 60, removable=[run.root / "checkpoints", run.root / "nothing"])


def test_a_folder_moved_aside_comes_back_if_its_successor_never_came(tmp_path: Path) -> None:
    (tmp_path / ".merged.17.old").mkdir()
    (tmp_path / ".merged.17.old" / "weights").write_text("old")
    (tmp_path / ".merged.17.part").mkdir()
    remove_leftovers(tmp_path, of="merged")
    assert (tmp_path / "merged" / "weights").read_text() == "old"
    assert not leftovers(tmp_path)
    with atomic_folder(tmp_path / "merged") as folder:
        (folder / "weights").write_text("new")
    (tmp_path / ".merged.17.old").mkdir()
    remove_leftovers(tmp_path)
    assert (tmp_path / "merged" / "weights").read_text() == "new"
    assert not leftovers(tmp_path)


def test_merged_weights_come_in_shards_that_transformers_reads(run: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM

    export(run.root, ONE)
    whole = AutoModelForCausalLM.from_pretrained(run.root / "merged").state_dict()
    monkeypatch.setattr(merging, "SHARD_BYTES", 50_000)
    again_merged(run)
    export(run.root, ONE)
    files = sorted((run.root / "merged").glob("*.safetensors"))
    assert len(files) > 2
    with safe_open(files[0], framework="pt") as opened:
        assert opened.metadata() == {"format": "pt"}
    parts = AutoModelForCausalLM.from_pretrained(run.root / "merged").state_dict()
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_the_same(tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORIKEET_CACHE", str(tmp_path / "cache"))
    config = ExportConfig(quant=("f16", "q8_0", "q4_k_m"))
    calm = RunFolder(shutil.copytree(tuned, tmp_path / "calm" / "run"))
    export(calm.root, config)
    shutil.rmtree(tmp_path / "cache" / "gguf")
    killed = RunFolder(shutil.copytree(tuned, tmp_path / "killed" / "run"))
    moments = random.Random(7)
    for _ in range(10):
        kill_an_export(killed.root, after_s=moments.uniform(0.0, 2.0))
        for name, entry in killed.manifest()["artefacts"].items():
            if entry.get("complete") and (killed.root / name).exists():
                killed.verify(name)
    export(killed.root, config)
    assert artefacts(killed) == artefacts(calm)
    assert not leftovers(killed.root) + leftovers(tmp_path / "cache")


def kill_an_export(root: Path, *, after_s: float) -> None:
    """Start an export, and kill it some time after it has begun to work."""
    lock = root / ".export.lock"
    lock.unlink(missing_ok=True)
    command = [
        sys.executable,
        "-c",
        "from lorikeet.cli import main; main()",
        "export",
        str(root),
        "--quant",
        "f16,q8_0,q4_k_m",
    ]
    with subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as process:
        while not lock.exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(after_s)
        process.kill()
