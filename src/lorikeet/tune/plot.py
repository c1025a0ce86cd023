"""`reports/loss.png`: training and validation loss over the steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

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
    axes.set(title=title, xlabel="step", ylabel="loss (nats a supervised token)")
    axes.grid(color=GREY, alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
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
