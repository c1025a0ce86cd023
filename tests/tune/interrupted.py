"""A run that Ctrl-C ends between two checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from lorikeet.config import TuneConfig
from lorikeet.errors import Interrupted
from lorikeet.run import RunFolder
from lorikeet.tune import loop


def tune_interrupted(config: TuneConfig, out: Path, monkeypatch: pytest.MonkeyPatch, *, at_step: int) -> None:
    """Tune into `out` until the metrics of `at_step` are written, and no further; what follows is not interrupted."""
    append = RunFolder.append_metrics

    def interrupted(run: RunFolder, row: dict[str, Any]) -> None:
        append(run, row)
        if row["step"] == at_step:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(RunFolder, "append_metrics", interrupted)
        with pytest.raises(Interrupted, match="go on with: lorikeet tune --resume"):
            loop.tune(config, out=out)
