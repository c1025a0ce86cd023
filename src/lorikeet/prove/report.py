"""`reports/proof.html`: the proof on one page that opens anywhere, with nothing loaded from elsewhere."""

from __future__ import annotations

import base64
from importlib import resources
from pathlib import Path
from typing import Any

from lorikeet.files import write_atomic

CHECK_MEANINGS = {
    "heldout_loss": "Upper end of the 95 % interval of tuned minus base loss",
    "answers_follow_questions": "Loss that a stranger's question adds to an answer, lower end of the 99 % interval",
    "answers_end": "Share of the tuned model's answers that end by themselves",
    "prompt_parity": "Share of prompts with exactly the tokens that tuning saw",
}


def write_html(proof: dict[str, Any], manifest: dict[str, Any], reports: Path) -> None:
    """Write `proof.html` into the folder `reports`; the loss plot there is put inside."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("lorikeet.prove").joinpath("proof.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    plot = reports / "loss.png"
    page = environment.from_string(source).render(
        proof=proof,
        run=manifest,
        meanings=CHECK_MEANINGS,
        bars=bars(proof["per_conversation"]),
        loss_plot=base64.b64encode(plot.read_bytes()).decode() if plot.is_file() else "",
    )
    write_atomic(reports / "proof.html", page)


def bars(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return one bar a conversation for the plot of tuned minus base loss, best first.

    Coordinates are percentages of the plot's width and height; zero is the line at 50, and better hangs below it.
    """
    differences = sorted((row["tuned"] - row["base"], row["id"]) for row in rows)
    largest = max((abs(value) for value, _ in differences), default=0.0) or 1.0
    width = 100 / len(differences)
    return [
        {
            "x": round(index * width, 3),
            "width": round(width * 0.8, 3),
            "y": round(50 - 48 * max(value, 0.0) / largest, 3),
            "height": round(48 * abs(value) / largest, 3),
            "better": value < 0,
            "label": f"{name}: {value:+.3f}",
        }
        for index, (value, name) in enumerate(differences)
    ]
