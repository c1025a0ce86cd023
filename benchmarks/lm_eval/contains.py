"""The metric of `capitals.yaml`: does the answer name the capital?"""

from __future__ import annotations

import re
from typing import Any


def process_results(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Return 1 if the one answer in `results` holds the capital of `doc` as a word of its own, whatever its case."""
    return {"contains": float(bool(re.search(rf"\b{re.escape(doc['capital'])}\b", results[0], re.IGNORECASE)))}


if __name__ == "__main__":
    print("this file is used by lm-eval; see docs/guide/lm-eval.md")
