"""What the benchmarks share: the real server, tables for the README, and results with hardware and commit beside them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorikeet.run import environment

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Optional data, read in place."""


@dataclass(frozen=True)
class Server:
    """A server under way."""

    url: str
    pid: int


@contextmanager
def served(target: str, *flags: str) -> Iterator[Server]:
    """Start the server as a user would, without search, and end it with the block."""
    command = [sys.executable, "-u", "-c", "from lorikeet.cli import main; main()", "serve", target]
    command += ["--port", "0", "--search", "off", *flags]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        try:
            for line in process.stderr:
                if line.startswith("ready: "):
                    yield Server(line.split()[1], process.pid)
                    return
            sys.exit("the server did not start")
        finally:
            process.terminate()


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [" | ".join(head), " | ".join("---" for _ in head), *(" | ".join(row) for row in rows)]
    return "\n".join(f"| {line} |" for line in lines)


def stamp(path: Path, result: dict[str, Any]) -> None:
    """Write `result` to `path` with the machine, the versions and the commit that it was measured on."""
    done = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"commit": done.stdout.strip(), **environment(), **result}, indent=2) + "\n")
    print(f"\n{path}")


if __name__ == "__main__":
    print("this file is used by the other benchmarks")
