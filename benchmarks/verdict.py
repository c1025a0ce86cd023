"""Can the verdict say no? The same short tuning on good data and on the same data with its answers shuffled.

    .venv/bin/python benchmarks/verdict.py [--data shared/data/chat/instruct-2k.jsonl ...] [--minutes 1.5] [--json PATH]

Prints a table of verdicts and writes JSON with hardware and commit. Each data file is one row; the last row is the first
file with its answers dealt out at random.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from report import SHARED, stamp, table

from lorikeet.data.load import load_conversations

FLAGS = ["--model", "smollm2-135m-instruct", "--max-length", "1024", "--lora-dropout", "0", "--learning-rate", "1e-3"]


def lorikeet(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from lorikeet.cli import main; main()", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)


def prove(data: Path, root: Path, minutes: float) -> dict[str, Any]:
    """Tune, export and prove; return the proof and its exit code."""
    assert (
        lorikeet("tune", *FLAGS, "--data", str(data), "--max-minutes", str(minutes), "--out", str(root)).returncode == 0
    )
    assert lorikeet("export", str(root), "--quant", "q8_0").returncode == 0
    done = lorikeet("prove", str(root), "--json")
    proof: dict[str, Any] = json.loads(done.stdout)
    return {"data": data.name, "exit_code": done.returncode, **proof}


def shuffled(data: Path, target: Path, *, rows: int = 600) -> Path:
    """Write the first rows of `data` with their last answers dealt out at random."""
    talks = [[m.as_dict() for m in c.messages] for c in load_conversations(str(data)).conversations[:rows]]
    answers = [talk[-1]["content"] for talk in talks]
    random.Random(1).shuffle(answers)
    for talk, answer in zip(talks, answers, strict=True):
        talk[-1]["content"] = answer
    target.write_text("\n".join(json.dumps({"messages": talk}) for talk in talks))
    return target


def verdict(result: dict[str, Any]) -> str:
    """Return the verdict and what it failed on."""
    failed = [check["name"] for check in result["checks"] if not check["pass"]]
    return f"{result['verdict']}: {', '.join(failed)}" if failed else str(result["verdict"])


def main() -> None:
    names = ("instruct-2k.jsonl", "sharegpt-200.json", "alpaca-200.json")
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, nargs="+", default=[SHARED / "chat" / name for name in names])
    parser.add_argument("--minutes", type=float, default=1.5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/verdict.json"))
    options = parser.parse_args()
    if missing := [str(path) for path in options.data if not path.is_file()]:
        sys.exit(f"not here: {', '.join(missing)}; name data with --data")
    with tempfile.TemporaryDirectory() as folder:
        files = [
            *options.data,
            shuffled(options.data[0], Path(folder) / f"{options.data[0].stem}, answers shuffled.jsonl"),
        ]
        results = [prove(path, Path(folder) / f"run-{number}", options.minutes) for number, path in enumerate(files)]
    rows = [
        (
            result["data"],
            f"{result['heldout']['difference']:+.3f} ({result['heldout']['ci95'][0]:+.3f} to {result['heldout']['ci95'][1]:+.3f})",
            f"{result['answers_follow_questions']['value']:+.2f} ({result['answers_follow_questions']['low']:+.2f} to {result['answers_follow_questions']['high']:+.2f})",
            f"{result['forgetting']['difference']:+.3f} (to {result['forgetting']['ci95'][1]:+.3f})",
            f"{result['instructions']['base']['instruction_strict']['value']:.0%} to {result['instructions']['tuned']['instruction_strict']['value']:.0%}",
            verdict(result),
        )
        for result in results
    ]
    print(
        table(
            (
                "Data",
                "Loss, tuned minus base (95 %)",
                "Cost of a stranger's question (99 %)",
                "Plain prose (95 %)",
                "Instructions followed",
                "Verdict",
            ),
            rows,
        )
    )
    kept = (
        "data",
        "exit_code",
        "verdict",
        "heldout",
        "checks",
        "answers_follow_questions",
        "speakability",
        "forgetting",
        "instructions",
        "noise",
    )
    stamp(options.json, {"rows": [{key: result[key] for key in kept} for result in results]})


if __name__ == "__main__":
    main()
