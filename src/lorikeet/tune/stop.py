"""How a run is stopped from outside: Ctrl-C and SIGTERM, and what is said of how to go on.

with stoppable(way_on):                  # at once, wherever the run is
    with between_steps() as stopped:     # after a step and its checkpoint
        ...
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from lorikeet.errors import Interrupted
from lorikeet.tune.progress import say


@contextmanager
def stoppable(way_on: Callable[[], str]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the block at once, as Interrupted with what `way_on` then says of how to go on."""

    def stop(_: int, __: FrameType | None) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt as error:
        raise Interrupted(way_on()) from error
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def between_steps() -> Iterator[Callable[[], bool]]:
    """Give a function that says whether Ctrl-C or SIGTERM came; a second Ctrl-C ends at once."""
    came: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        if came and number == signal.SIGINT:
            raise KeyboardInterrupt
        came.append(number)
        say("stopping after this step; the checkpoint follows")

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: bool(came)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
