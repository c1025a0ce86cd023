"""The metric of `capitals.yaml`: does the answer name the capital?"""

from __future__ import annotations

from typing import Any


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 if the one answer in `results` holds the capital of `doc`, whatever its case."""
    return {"contains": float(doc["capital"].lower() in results[0].lower())}


if __name__ == "__main__":
    print("this file is used by lm-eval; see docs/guide/lm-eval.md")
