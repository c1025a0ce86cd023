"""What the benchmarks share: tables for the README, and results with hardware and commit beside them."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lorikeet.run import environment

ROOT = Path(__file__).resolve().parents[1]
SHARED = ROOT.parent / "shared" / "data"
"""Optional data, read in place."""


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
