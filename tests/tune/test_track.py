"""Trackers keep the numbers of `metrics.jsonl`, read back by each library itself, without network; a plot in dots."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from lorikeet.config import TuneConfig
from lorikeet.run import RunFolder
from lorikeet.tune import loop, track
from lorikeet.tune.live import draw_line

from .interrupted import tune_interrupted

SCRIPT = """
import json, socket, sys
from pathlib import Path

connect = socket.socket.connect
def loopback_only(self, address):
    if self.family != socket.AF_UNIX and address[0] not in {"127.0.0.1", "::1", "localhost"}:
        print("NETWORK", address, file=sys.stderr)
        raise OSError("no network in this test")
    return connect(self, address)
socket.socket.connect = loopback_only

from lorikeet.config import TuneConfig
from lorikeet.tune import loop
fields = json.loads(sys.argv[1])
config = TuneConfig(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()})
loop.tune(config, out=Path(sys.argv[2]))
"""


@pytest.fixture
def config(tiny_model: Path, chats: Path) -> TuneConfig:
    return TuneConfig(
        model=str(tiny_model), data=str(chats), max_steps=5, eval_steps=2, learning_rate=1e-2, dtype="float32"
    )


def scalars(folder: Path) -> dict[str, dict[int, float]]:
    """Return what TensorBoard's own reader finds: name -> step -> value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {name: {e.step: e.value for e in events.Scalars(name)} for name in events.Tags()["scalars"]}


def test_all_trackers_keep_the_metrics_offline(config: TuneConfig, tmp_path: Path) -> None:
    settings = asdict(config) | {"track": ["tensorboard", "wandb", "trackio"]}
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("WANDB", "TRACKIO"))}
    environment |= {"TRACKIO_DIR": str(tmp_path / "trackio"), "HOME": str(tmp_path)}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SCRIPT, json.dumps(settings), str(tmp_path / "run")],
        capture_output=True,
        text=True,
        env=environment,
        stdin=subprocess.DEVNULL,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert time.monotonic() - began < 90
    assert done.stdout == "" and "NETWORK" not in done.stderr
    hints = [line for line in done.stderr.splitlines() if line.startswith("tracked: ")]
    assert [hint.split()[1] for hint in hints] == ["tensorboard", "wandb", "trackio"], done.stderr
    run = RunFolder.open(tmp_path / "run")
    rows = [row for row in run.metrics() if row["step"]]
    expected = {row["step"]: row["loss"] for row in rows}
    validated = {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}

    board = scalars(run.root / "track" / "tensorboard")
    assert board["loss"] == pytest.approx(expected, rel=1e-6)
    assert board["val_loss"] == pytest.approx(validated, rel=1e-6)

    assert wandb_losses(next((run.root / "track" / "wandb").glob("offline-run-*/*.wandb"))) == pytest.approx(expected)

    read = (
        "import json; from trackio.sqlite_storage import SQLiteStorage as S; run = S.get_runs('lorikeet')[0];"
        "print(json.dumps([r for r in S.get_logs('lorikeet', run)]))"
    )
    logged = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", read], capture_output=True, text=True, env=environment, check=True
    )
    kept = {row["step"]: row["loss"] for row in json.loads(logged.stdout) if "loss" in row}
    assert kept == pytest.approx(expected)


def wandb_losses(path: Path) -> dict[int, float]:
    """Return step -> loss from an offline run's file, its records read with wandb's own protocol buffers."""
    from wandb.proto import wandb_internal_pb2

    found = {}
    for data in leveldb_records(path.read_bytes(), header=7):
        record = wandb_internal_pb2.Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found[int(items["_step"])] = float(items["loss"])
    return found


def leveldb_records(data: bytes, *, header: int) -> Iterator[bytes]:
    """Yield the records of a LevelDB log: blocks of 32 KiB of (checksum 4, length 2, type 1, data); type 1 is whole,
    2 first, 3 middle, 4 last."""
    block, at, parts = 32768, header, b""
    while at + 7 <= len(data):
        if block - at % block < 7:
            at += block - at % block
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            yield parts
            parts = b""


def test_resumed_tracking_has_each_step_once(config: TuneConfig, tmp_path: Path, monkeypatch: Any) -> None:
    from dataclasses import replace

    config = replace(config, track=("tensorboard",), max_steps=6, eval_steps=3, save_steps=2)
    tune_interrupted(config, tmp_path / "run", monkeypatch, at_step=5)
    run = loop.resume(tmp_path / "run")
    board = scalars(run.root / "track" / "tensorboard")
    assert board["loss"] == pytest.approx({row["step"]: row["loss"] for row in run.metrics() if row["step"]}, rel=1e-6)


def test_a_tracker_that_fails_is_left_out_and_the_run_goes_on(
    config: TuneConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from dataclasses import replace

    def broken(*_: Any) -> None:
        raise OSError("No space left on device\nand more")

    monkeypatch.setattr(track.TensorBoard, "log", broken)
    run = loop.tune(replace(config, track=("tensorboard",)), out=tmp_path / "run")
    assert run.manifest()["status"] == "tuned"
    errors = capsys.readouterr().err
    assert errors.count("tensorboard failed and is left out from here on: No space left on device\n") == 1
    assert "tracked:" not in errors


def test_a_plot_in_dots() -> None:
    falling = draw_line([3.0, 2.0, 1.0, 0.0], width=2, height=1)
    assert falling == ["⠑⢄"]
    assert draw_line([1.0], width=9, height=3) == []
    lines = draw_line(list(range(1000)), width=20, height=4)
    assert len(lines) == 4 and all(len(line) == 20 for line in lines)
    assert lines[0][-1] != "⠀" and lines[0][0] == "⠀" and lines[3][0] != "⠀"
    assert draw_line([2.0, 2.0], width=2, height=1)[0].strip("⠀")
