"""The run folder: metrics that were cut off, a manifest that is damaged, a folder that is free."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorikeet.cli import run as run_cli
from lorikeet.errors import InputError, MachineError
from lorikeet.run import RunFolder

from .disk import largest_file


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    return RunFolder.create(tmp_path / "run", config={})


def test_metrics_on_a_full_disk_are_the_machines_fault_and_the_whole_rows_stay(run: RunFolder) -> None:
    run.append_metrics({"step": 0, "val_loss": 3.0})
    size_bytes = run.metrics_path.stat().st_size
    with (
        largest_file(size_bytes + 5),
        pytest.raises(MachineError, match=r"cannot write .*metrics.jsonl: File too large"),
    ):
        run.append_metrics({"step": 1, "loss": 2.0})
    assert run.metrics_path.stat().st_size == size_bytes + 5
    assert run.metrics() == [{"step": 0, "val_loss": 3.0}]


@pytest.mark.parametrize("end", [b'{"step": 1, "lo', b"\0\0\0\0", b"\xff\xfe"])
def test_a_last_line_that_is_no_row_is_left_out(run: RunFolder, end: bytes) -> None:
    run.metrics_path.write_bytes(b'{"step": 0}\n' + end)
    assert run.metrics() == [{"step": 0}]


@pytest.mark.parametrize(
    "manifest",
    [
        [],
        {},
        {"artefacts": []},
        {"artefacts": {"adapter": {"complete": True}}},
        {"artefacts": {"adapter": "complete"}},
        {"artefacts": {"adapter": {"complete": True, "sha256": "ab"}}},
    ],
    ids=json.dumps,
)
def test_a_manifest_that_is_none_is_refused_by_every_stage_in_one_line(
    run: RunFolder, manifest: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run.manifest_path.write_text(json.dumps(manifest))
    with pytest.raises(InputError, match="is not a run's manifest"):
        RunFolder.open(run.root)
    assert run_cli(["tune", "--resume", str(run.root)]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_folder_with_leftovers_and_a_lock_is_free_for_a_run(tmp_path: Path) -> None:
    RunFolder.require_free(tmp_path / "new")
    for name in (".run.json.17.part", ".tune.lock"):
        (tmp_path / name).touch()
    RunFolder.require_free(tmp_path)
    (tmp_path / "mine").touch()
    for taken in (tmp_path, tmp_path / "mine"):
        with pytest.raises(InputError, match="is there already"):
            RunFolder.require_free(taken)
    with pytest.raises(InputError, match="name another place"):
        RunFolder.require_free(tmp_path / ("x" * 400))
