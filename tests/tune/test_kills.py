"""Twenty kills at random and at planted moments: twenty adapters that equal the uninterrupted one, bit for bit."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

from lorikeet.config import TuneConfig

SCRIPT = Path(__file__).with_name("killed_runs.py")


def test_killed_at_any_moment_and_resumed_it_is_the_same_adapter(tiny_model: Path, chats: Path, tmp_path: Path) -> None:
    config = TuneConfig(
        model=str(tiny_model),
        data=str(chats),
        max_steps=12,
        learning_rate=1e-2,
        eval_steps=4,
        save_steps=2,
        dtype="float32",
    )
    settings = tmp_path / "config.json"
    settings.write_text(json.dumps(asdict(config)))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), str(settings), str(tmp_path), "20", "11"],
        capture_output=True,
        text=True,
        check=False,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *killed = (json.loads(line) for line in done.stdout.splitlines())
    assert len(killed) == 20
    assert [run["ended"] for run in killed[:5]] == [-9] * 5  # the planted ones
    assert {run["sha256"] for run in killed} == {whole["sha256"]}
    assert [run for run in killed if run["leftovers"]] == []
