"""`reports/proof.html`: the proof on one page that opens anywhere, with nothing loaded from elsewhere.

The plots are SVG, drawn here as numbers and by the template as shapes; everything that is text is escaped by the template.
"""

from __future__ import annotations

import math
from importlib import resources
from typing import Any

from lorikeet.files import write_atomic
from lorikeet.prove.words import next_steps, reasons, surety
from lorikeet.run import RunFolder

CHECK_MEANINGS = {
    "heldout_loss": "Upper end of the 95 % interval of tuned minus base loss",
    "answers_follow_questions": "Loss that a stranger's question adds to an answer, lower end of the 99 % interval",
    "answers_end": "Share of the tuned model's answers that end by themselves",
    "prompt_parity": "Share of prompts with exactly the tokens that tuning saw",
    "plain_text_loss": "Loss that tuning adds on plain prose, upper end of the 95 % interval",
    "instructions_followed": "Share of instructions followed, tuned minus base, upper end of the 95 % interval",
    "orders_in_results": "Share of orders in search results obeyed, tuned minus base, lower end of the 95 % interval",
}

PLOT_WIDTH, PLOT_HEIGHT = 640, 200
LEFT, RIGHT, TOP, BOTTOM = 48, 24, 12, 30
"""Margins of a plot, in its own units."""


def write_html(proof: dict[str, Any], manifest: dict[str, Any], run: RunFolder) -> None:
    """Write `proof.html` into the reports of `run`, with the loss curve of its metrics."""
    from jinja2 import Environment, StrictUndefined

    source = resources.files("lorikeet.prove").joinpath("proof.html.jinja").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(source).render(
        proof=proof,
        run=manifest,
        failed=[check["name"] for check in proof["checks"] if not check["pass"]],
        reasons=reasons(proof),
        surety=surety(proof),
        steps=next_steps(proof, run=str(run.root)),
        parts=parts(proof["seconds"]),
        meanings=CHECK_MEANINGS,
        differences=histogram([row["tuned"] - row["base"] for row in proof["per_conversation"]], proof["heldout"]),
        curve=loss_curve(run.metrics()),
        rates=rates(proof),
    )
    write_atomic(run.reports / "proof.html", page)


def histogram(values: list[float], heldout: dict[str, Any]) -> dict[str, Any]:
    """Return bars, ticks and the interval of the mean, in plot units, for the per-conversation differences `values`."""
    ends = [*values, 0.0, *heldout["ci95"]]
    low, high, step = nice_range(min(ends), max(ends))
    bins = max(1, round((high - low) / step)) * 2
    width = (high - low) / bins
    counts = [0] * bins
    for value in values:
        counts[min(bins - 1, int((value - low) / width))] += 1
    x = scale(low, high, LEFT, PLOT_WIDTH - RIGHT)
    y = scale(0, max(counts), PLOT_HEIGHT - BOTTOM, TOP + 22)
    bars = [
        {
            "x": round(x(low + place * width) + 1, 1),
            "width": round(x(low + (place + 1) * width) - x(low + place * width) - 2, 1),
            "y": round(y(count), 1),
            "height": round(PLOT_HEIGHT - BOTTOM - y(count), 1),
            "better": low + (place + 0.5) * width < 0,
            "label": f"{count} conversations from {low + place * width:+.2f} to {low + (place + 1) * width:+.2f}",
        }
        for place, count in enumerate(counts)
        if count
    ]
    return {
        "bars": bars,
        "rows": [(round(y(count), 1), str(count)) for count in (0, max(counts))],
        "zero": round(x(0.0), 1),
        "ticks": ticks(low, high, step, x, signed=True),
        "mean": round(x(heldout["difference"]), 1),
        "interval": [round(x(end), 1) for end in heldout["ci95"]],
    }


def loss_curve(metrics: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Return the training and validation losses as points of two lines, with ticks; None without steps."""
    train = [(row["step"], row["loss"]) for row in metrics if row.get("loss") is not None]
    validation = [(row["step"], row["val_loss"]) for row in metrics if row.get("val_loss") is not None]
    points = [*train, *validation]
    if len(train) < 2:
        return None
    low, high, step = nice_range(min(loss for _, loss in points), max(loss for _, loss in points))
    last = max(at for at, _ in points)
    x = scale(0, last, LEFT, PLOT_WIDTH - RIGHT)
    y = scale(low, high, PLOT_HEIGHT - BOTTOM, TOP)
    _, _, stride = nice_range(0, last)
    return {
        "train": " ".join(f"{x(at):.1f},{y(loss):.1f}" for at, loss in train),
        "validation": [(round(x(at), 1), round(y(loss), 1), f"step {at}: {loss:.3f}") for at, loss in validation],
        "rows": ticks(low, high, step, y),
        "columns": [
            (round(x(at), 1), f"{at:g}") for at in (n * max(1, stride) for n in range(int(last / max(1, stride)) + 1))
        ],
    }


def parts(seconds: dict[str, Any]) -> list[tuple[str, float]]:
    """Return what took how long, both models' parts together, the longest first."""
    together: dict[str, float] = {name: seconds[name] for name in ("noise", "round_trip")}
    for who in ("base", "tuned"):
        for part, value in seconds[who].items():
            together[part] = together.get(part, 0.0) + value
    return sorted(((name.replace("_", " "), value) for name, value in together.items()), key=lambda pair: -pair[1])


def rates(proof: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the rows of the plot of rates: a name, of how many, whether more is better, and (value, low, high) of base and tuned in percent."""
    asked, grounding, heard = proof["instructions"], proof["grounding"], proof["round_trip"]
    instructions = f"{asked['instructions']} instructions"
    rows = [
        ("Instructions followed, strict", instructions, True, _both(asked, "instruction_strict")),
        ("Instructions followed, loose", instructions, True, _both(asked, "instruction_loose")),
        *(
            (name, f"{grounding[key]['n']} questions", more, grounding[key])
            for name, key, more in (
                ("Says so when results lack the answer", "declines", True),
                ("Uses the answer that results hold", "uses_answer", True),
                ("Obeys an order inside results", "obeys_orders", False),
                ("Reads such an order aloud", "recites_orders", False),
            )
        ),
    ]
    if "skipped" not in heard:
        rows.append(("Words lost when spoken and heard", f"{heard['compared']} answers", False, heard))
    return [
        {
            "name": name,
            "of": of,
            "more": more,
            "marks": [_mark(who, values[who], row) for row, who in enumerate(("base", "tuned"))],
        }
        for name, of, more, values in rows
    ]


def _both(asked: dict[str, Any], key: str) -> dict[str, Any]:
    return {who: asked[who][key] for who in ("base", "tuned")}


def _mark(who: str, rate: dict[str, float], row: int) -> dict[str, Any]:
    value, low, high = (100 * min(1.0, rate[key]) for key in ("value", "low", "high"))
    return {
        "who": who,
        "value": round(value, 1),
        "low": round(low, 1),
        "high": round(high, 1),
        "y": 9 + 14 * row,
        "text": f"{100 * rate['value']:.0f} %",
    }


def scale(low: float, high: float, first: float, last: float) -> Any:
    """Return the function that takes [low, high] to [first, last]."""
    size = (high - low) or 1.0
    return lambda value: first + (value - low) / size * (last - first)


def nice_range(low: float, high: float) -> tuple[float, float, float]:
    """Return a range around [low, high] that begins and ends on ticks, and the distance between ticks: 1, 2 or 5 times a power of ten."""
    size = (high - low) or 1.0
    power = 10 ** math.floor(math.log10(size / 5))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power * 5 >= size * 0.999)
    return math.floor(low / step) * step, math.ceil(high / step) * step, step


def ticks(low: float, high: float, step: float, place: Any, *, signed: bool = False) -> list[tuple[float, str]]:
    """Return (place, label) of each tick."""
    digits = max(0, -math.floor(math.log10(step)))
    values = [low + number * step for number in range(round((high - low) / step) + 1)]
    return [(round(place(v), 1), f"{v:+.{digits}f}" if signed and abs(v) > step / 2 else f"{abs(v) if abs(v) < step / 2 else v:.{digits}f}") for v in values]  # fmt: skip
