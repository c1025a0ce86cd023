"""Runs that are killed and resumed, each in a fork of one process that has done the imports but started no threads.

    python killed_runs.py CONFIG.json FOLDER COUNT SEED

Prints one JSON line a run: where it was killed, and the sha256 of its adapter after it was resumed. The first line is
the run that nobody killed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorikeet.config import TuneConfig
from lorikeet.files import write_atomic
from lorikeet.run import RunFolder
from lorikeet.tune import checkpoint, loop


def forked(work: Callable[[], None], *, kill_after_s: float | None = None) -> int:
    """Do `work` in a fork, kill it with SIGKILL after a time if one is given, and return how it ended."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            import torch

            torch.set_num_threads(1)
            with open(os.devnull, "w") as null, contextlib.redirect_stderr(null):
                work()
            status = 0
        except BaseException:  # noqa: BLE001  # the fork must not go on as if it were the parent
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def dying_at(place: str) -> None:
    """Make this process kill itself at a place of the code: in a checkpoint's write, after run.json, in the end."""
    wanted, _, number = place.partition(":")
    seen = [0]

    def die(when: Callable[[], bool], original: Callable[..., Any], *, before: bool) -> Callable[..., Any]:
        def wrapped(*given: Any, **named: Any) -> Any:
            hit = when()
            if hit and before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = original(*given, **named)
            if hit:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return wrapped

    def nth() -> bool:
        seen[0] += 1
        return seen[0] == int(number or 1)

    if wanted == "checkpoint":  # after the adapter's file, before the optimizer's
        checkpoint.save_file = die(nth, checkpoint.save_file, before=False)  # type: ignore[assignment]
    elif wanted == "created":
        RunFolder.update = die(nth, RunFolder.update, before=True)  # type: ignore[method-assign]
    elif wanted == "adapter":  # the adapter is in its place, the manifest does not know
        RunFolder.record = die(lambda: nth() and seen[0] == 2, RunFolder.record, before=True)  # type: ignore[method-assign]
    else:
        raise ValueError(place)


def adapter_hash(root: Path) -> str:
    return hashlib.sha256((root / "adapter" / "adapter_model.safetensors").read_bytes()).hexdigest()


def go_on(config: TuneConfig, root: Path) -> None:
    """Resume, as a person would: a run that never wrote its manifest is started again, a tuned one is left alone."""
    if not (root / "run.json").is_file():
        loop.tune(config, out=root)
    elif RunFolder.open(root).manifest()["status"] != "tuned":
        loop.resume(root)


def main() -> None:
    fields = json.loads(Path(sys.argv[1]).read_text())
    config = TuneConfig(**{key: tuple(v) if isinstance(v, list) else v for key, v in fields.items()})
    folder, count, dice = Path(sys.argv[2]), int(sys.argv[3]), random.Random(int(sys.argv[4]))
    began = time.monotonic()
    assert forked(lambda: _quietly(loop.tune, config, folder / "whole")) == 0
    whole_s = time.monotonic() - began
    print(json.dumps({"killed": "never", "sha256": adapter_hash(folder / "whole")}), flush=True)
    places = ["created", "checkpoint:1", "checkpoint:2", "checkpoint:5", "adapter:2"]
    for number in range(count):
        root = folder / f"killed-{number}"
        if number < len(places):
            place = places[number]

            def work(place: str = place, root: Path = root) -> None:
                dying_at(place)
                loop.tune(config, out=root)

            ended = forked(work)
        else:
            delay = dice.uniform(0.02, whole_s)
            place = f"after {delay:.2f} s"
            ended = forked(lambda root=root: _quietly(loop.tune, config, root), kill_after_s=delay)  # type: ignore[misc]
        assert ended in {-signal.SIGKILL, 0}, f"{place}: ended with {ended}"
        assert forked(lambda root=root: go_on(config, root)) == 0, place  # type: ignore[misc]
        leftovers = [str(path) for path in root.rglob("*.part")] + [str(path) for path in root.rglob("*.old")]
        print(
            json.dumps({"killed": place, "ended": ended, "sha256": adapter_hash(root), "leftovers": leftovers}),
            flush=True,
        )


def _quietly(work: Callable[..., Any], config: TuneConfig, out: Path) -> None:
    work(config, out=out)


if __name__ == "__main__":
    write_atomic(Path(sys.argv[2]) / "started", "")
    main()
