"""`reports/loss.png`: training and validation loss over the steps; `reports/sweep.png`: trials side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lorikeet.errors import printable

GREEN, ORANGE, GREY = "#1b7f5c", "#e4572e", "#8a939b"


def plot_loss(rows: list[dict[str, Any]], path: Path, *, title: str) -> None:
    """Draw the rows of `metrics.jsonl`: each step's loss, its running mean, validation, and the best step marked."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), dpi=120)
    trained = [row for row in rows if row.get("loss") is not None]
    steps = [row["step"] for row in trained]
    losses = [row["loss"] for row in trained]
    axes.plot(steps, losses, color=GREEN, alpha=0.25, linewidth=1, label="training, each step")
    axes.plot(steps, running_mean(losses), color=GREEN, linewidth=2, label="training, running mean")
    validated = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
    if validated:
        axes.plot(
            *zip(*validated, strict=True), color=ORANGE, marker="o", markersize=4, linewidth=2, label="validation"
        )
        best = min(validated, key=lambda point: point[1])
        axes.annotate(
            f"best {best[1]:.3f} at step {best[0]}",
            best,
            xytext=(-8, 24),
            textcoords="offset points",
            ha="right",
            color=ORANGE,
            arrowprops={"arrowstyle": "-", "color": ORANGE},
        )
    # A path may hold dollars, which would be read as formulas, and bytes that are no text.
    axes.set_title(printable(title.encode("utf-8", "replace").decode()), parse_math=False)
    axes.set(xlabel="step", ylabel="loss (nats a supervised token)")
    axes.grid(color=GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)


def plot_sweep(
    trials: list[tuple[dict[str, Any], float | None]], curves: list[list[dict[str, Any]]], path: Path, *, best: int
) -> None:
    """Draw a sweep: best validation loss against each swept value, and every trial's validation curve."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(trials[0][0])
    figure, axes = pyplot.subplots(1, len(names) + 1, figsize=(5 * (len(names) + 1), 4.2), dpi=110)
    for panel, name in zip(axes, names, strict=False):
        points = [(values[name], loss, n == best) for n, (values, loss) in enumerate(trials) if loss is not None]
        numeric = all(isinstance(value, int | float) and not isinstance(value, bool) for value, _, _ in points)
        for value, loss, is_best in points:
            panel.plot(value if numeric else str(value), loss, "o", color=ORANGE if is_best else GREEN, markersize=8)
        if name == "learning_rate":
            panel.set_xscale("log")
        panel.set(xlabel=name, ylabel="best validation loss (nats a token)")
    for number, rows in enumerate(curves):
        curve = [(row["step"], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
        label = ", ".join(f"{k} {v:g}" if isinstance(v, float) else f"{k} {v}" for k, v in trials[number][0].items())
        if curve:
            color = ORANGE if number == best else GREEN
            alpha = 1.0 if number == best else 0.3 + 0.5 * number / len(curves)
            axes[-1].plot(*zip(*curve, strict=True), color=color, alpha=alpha, linewidth=2, marker="o", markersize=3)
            axes[-1].annotate(label, curve[-1], fontsize=7, xytext=(4, 0), textcoords="offset points", va="center")
    axes[-1].set(xlabel="step", ylabel="validation loss")
    axes[-1].margins(x=0.3)
    for panel in axes:
        panel.grid(color=GREY, alpha=0.2)
        panel.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, format="png")
    pyplot.close(figure)


def running_mean(values: list[float], *, weight: float = 0.9) -> list[float]:
    """Return the exponential running mean of `values`, its start corrected as in Adam (1412.6980)."""
    means: list[float] = []
    mean = 0.0
    for count, value in enumerate(values, start=1):
        mean = weight * mean + (1 - weight) * value
        means.append(mean / (1 - weight**count))
    return means
