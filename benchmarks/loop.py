"""The whole loop, timed: `lorikeet quickstart` in a fresh process, and what its proof says.

    .venv/bin/python benchmarks/loop.py [--minutes 5] [--json PATH]

Prints the table of the README and writes JSON with hardware and commit.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from report import stamp, table


def measure(minutes: float, folder: Path) -> dict[str, Any]:
    root = folder / "run"
    began = time.monotonic()
    command = [sys.executable, "-c", "from lorikeet.cli import main; main()", "quickstart", "--no-serve"]
    subprocess.run([*command, "--out", str(root), "--minutes", str(minutes)], check=True)
    seconds = time.monotonic() - began
    run = json.loads((root / "run.json").read_text())
    proof = json.loads((root / "reports" / "proof.json").read_text())
    return {"minutes": round(seconds / 60, 2), "tuned": run["tuned"], "data": run["data"], **proof}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/loop.json"))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options.minutes, Path(folder))
    heldout, speech, tuned = result["heldout"], result["speakability"], result["tuned"]
    low, high = heldout["ci95"]
    rows = [
        ("Whole loop, tuning to verdict", f"{result['minutes']:.1f} min"),
        ("Tuning", f"{tuned['tokens_per_s']:.0f} tokens/s, {tuned['peak_rss_bytes'] / 1e9:.1f} GB at most"),
        ("Held-out loss, base to tuned", f"{heldout['base_loss']:.3f} to {heldout['tuned_loss']:.3f}"),
        (
            "Difference, 95 % interval",
            f"{heldout['difference']:+.3f} ({low:+.3f} to {high:+.3f}), {heldout['n']} conversations",
        ),
        ("Answers that can be spoken", f"{speech['base']['speakable']:.0%} to {speech['tuned']['speakable']:.0%}"),
        ("Words in an answer", f"{speech['base']['mean_words']:.0f} to {speech['tuned']['mean_words']:.0f}"),
        ("Decoding, q8_0", f"{result['decode_tokens_per_s']['tuned']:.0f} tokens/s"),
        ("Verdict", result["verdict"]),
    ]
    print(table(("What", "Measured"), rows))
    stamp(options.json, {key: value for key, value in result.items() if key not in {"answers", "per_conversation"}})


if __name__ == "__main__":
    main()
