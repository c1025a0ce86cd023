"""How far a run is, on a terminal or in a log.

with progress(config, state) as show:
    show(state, row)
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from lorikeet.config import TuneConfig
from lorikeet.tune.checkpoint import State
from lorikeet.tune.live import draw_line
from lorikeet.tune.plot import running_mean

PLOT_WIDTH, PLOT_HEIGHT = 60, 6
"""Characters of the plot of the loss in a terminal."""


def say(line: str) -> None:
    """Write one line of progress to stderr."""
    print(line, file=sys.stderr, flush=True)


class _PlottedProgress(Progress):
    """A progress bar under a small plot of the loss."""

    losses: tuple[float, ...] = ()

    def get_renderables(self) -> Iterable[RenderableType]:
        """Yield the plot, once there is something to plot, and the bar."""
        for number, line in enumerate(draw_line(self.losses, width=PLOT_WIDTH, height=PLOT_HEIGHT)):
            label = {0: f"{max(self.losses):.2f}", PLOT_HEIGHT - 1: f"{min(self.losses):.2f}"}.get(number, "")
            yield Text(f"{label:>8} {line}", style="green")
        yield self.make_tasks_table(self.tasks)


@contextmanager
def progress(config: TuneConfig, state: State) -> Iterator[Callable[[State, dict[str, Any]], None]]:
    """Give a function that shows a step by its row of metrics: a plot and a bar on a terminal, now and then a line elsewhere."""
    console = Console(stderr=True)
    columns = (
        TextColumn("tuning"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("loss {task.fields[loss]:.3f}  {task.fields[rate]:.0f} tokens/s"),
        TimeElapsedColumn(),
        TextColumn("{task.fields[left]} left"),
    )
    began, first = time.monotonic(), state.step
    with _PlottedProgress(*columns, console=console, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=state.total_steps, completed=state.step, loss=0.0, rate=0.0, left="?")
        losses: list[float] = []

        def show(now: State, row: dict[str, Any]) -> None:
            losses.append(row["loss"])
            each = (time.monotonic() - began) / (now.step - first)
            left_s = each * (now.total_steps - now.step)
            left = f"{int(left_s // 60)}:{int(left_s % 60):02d}"
            loss = sum(losses[-20:]) / len(losses[-20:])
            if not config.track:
                bar.losses = tuple(running_mean(losses))
            bar.update(task, completed=now.step, total=now.total_steps, loss=loss, rate=row["tokens_per_s"], left=left)
            if not console.is_terminal and (now.step % 10 == 0 or now.step == now.total_steps):
                say(
                    f"step {now.step}/{now.total_steps}  loss {loss:.3f}  {row['tokens_per_s']:.0f} tokens/s  {left} left"
                )

        yield show
