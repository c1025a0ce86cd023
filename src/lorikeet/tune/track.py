"""Experiment trackers: Weights & Biases, Trackio, TensorBoard. The real libraries, offline unless a login is there.

    trackers = Trackers.open(("tensorboard",), run, config, first_step=0)
    trackers.log(row)                 # a row of metrics.jsonl
    trackers.finish(summary)

A tracker that fails is closed with one line; the run goes on. `metrics.jsonl` is written in any case and is what counts.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import netrc
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any, Protocol

from lorikeet.config import TuneConfig
from lorikeet.errors import MissingExtraError
from lorikeet.run import RunFolder
from lorikeet.tune.progress import say

PROJECT = "lorikeet"


class Tracker(Protocol):
    """What a library is asked to do."""

    hint: str
    """How a person looks at what was tracked."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Keep the values of a step."""

    def finish(self, summary: dict[str, Any]) -> None:
        """Keep the summary and close."""


class TensorBoard:
    """Event files in RUN/track/tensorboard."""

    def __init__(self, run: RunFolder, config: dict[str, Any], *, first_step: int) -> None:
        """Go on after `first_step`; what was tracked beyond it is purged."""
        from torch.utils.tensorboard import SummaryWriter

        folder = run.root / "track" / "tensorboard"
        self.hint = f"tensorboard --logdir {folder}"
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1)
        lines = "".join(f"    {key}: {value}\n" for key, value in config.items())
        self._writer.add_text("settings", lines, first_step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write one scalar a value."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Write the summary as text and close the file."""
        self._writer.add_text("summary", "".join(f"    {k}: {v}\n" for k, v in summary.items()))
        self._writer.close()


class WandB:
    """Weights & Biases: online with WANDB_API_KEY or a login, else offline in RUN/track/wandb."""

    def __init__(self, run: RunFolder, config: dict[str, Any], *, track_id: str) -> None:
        """Start, or go on with the tracked run of this id."""
        import wandb

        folder = run.root / "track"
        folder.mkdir(parents=True, exist_ok=True)
        mode = os.environ.get("WANDB_MODE") or ("online" if _has_login() else "offline")
        settings = wandb.Settings(silent=True, console="off", x_disable_stats=True)
        self._run = wandb.init(
            project=PROJECT,
            id=track_id,
            name=run.root.name,
            dir=str(folder),
            config=config,
            mode=mode,  # type: ignore[arg-type]  # what WANDB_MODE holds is wandb's to judge
            resume="allow" if mode == "online" else None,
            settings=settings,
        )
        self.hint = f"wandb sync {folder}/wandb/offline-run-*-{track_id}" if mode == "offline" else str(self._run.url)

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values at their step."""
        self._run.log(values, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Set the run's summary and wait until it is written."""
        self._run.summary.update(summary)
        self._run.finish()


class Trackio:
    """Trackio's local database: where TRACKIO_DIR says, or its own default."""

    def __init__(self, run: RunFolder, config: dict[str, Any], *, track_id: str) -> None:
        """Start, or go on with the tracked run of this id."""
        import trackio

        self.hint = f"trackio show --project {PROJECT}"
        with _quiet():
            self._run = trackio.init(
                PROJECT,
                name=f"{run.root.name}-{track_id}",
                config=config,
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log the values at their step."""
        self._run.log(values, step=step)

    def finish(self, summary: dict[str, Any]) -> None:
        """Log the summary and close."""
        import trackio

        with _quiet():
            self._run.log({f"summary/{k}": v for k, v in summary.items() if isinstance(v, int | float)})
            trackio.finish()


def require_trackers(names: Sequence[str]) -> None:
    """Raise MissingExtraError if the library of one of these trackers is not installed."""
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise MissingExtraError(name, "track")


class Trackers:
    """The trackers of a run; those that failed are left out."""

    def __init__(self, opened: dict[str, Tracker]) -> None:
        """Take trackers by name."""
        self._opened = opened

    @classmethod
    def open(cls, run: RunFolder, config: TuneConfig, *, first_step: int) -> Trackers:
        """Return the trackers of `config.track`, going on after `first_step`.

        Raises MissingExtraError if one's library is not installed.
        """
        if not config.track:
            return cls({})
        track_id = run.manifest().get("track_id") or secrets.token_hex(4)
        run.update(track_id=track_id)
        settings = asdict(config)
        opened: dict[str, Tracker] = {}
        for name in config.track:
            try:
                opened[name] = _open(name, run, settings, track_id, first_step)
            except ImportError as error:
                raise MissingExtraError(name, "track") from error
            except Exception as error:  # noqa: BLE001  # whatever a tracker's library raises, tuning goes on without it
                say(f"{name} could not start and is left out: {_first_line(error)}")
        return cls(opened)

    def log(self, row: dict[str, Any]) -> None:
        """Give a row of `metrics.jsonl` to every tracker."""
        values = {key: float(value) for key, value in row.items() if key != "step"}
        self._each(lambda tracker: tracker.log(row["step"], values))

    def finish(self, summary: dict[str, Any]) -> None:
        """Close every tracker and say how to look at it."""
        self._each(lambda tracker: tracker.finish(summary))
        for tracker in self._opened.values():
            say(f"tracked: {tracker.hint}")

    def _each(self, do: Any) -> None:
        for name, tracker in list(self._opened.items()):
            try:
                do(tracker)
            except Exception as error:  # noqa: BLE001  # as above
                del self._opened[name]
                say(f"{name} failed and is left out from here on: {_first_line(error)}")


def _open(name: str, run: RunFolder, settings: dict[str, Any], track_id: str, first_step: int) -> Tracker:
    if name == "tensorboard":
        return TensorBoard(run, settings, first_step=first_step)
    if name == "wandb":
        return WandB(run, settings, track_id=track_id)
    return Trackio(run, settings, track_id=track_id)


def _has_login() -> bool:
    """Return whether Weights & Biases would find a key, so that it never asks for one."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep what a library prints off our output."""
    with contextlib.redirect_stdout(io.StringIO()):
        yield


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
