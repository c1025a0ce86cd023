"""What the server counts and times, as Prometheus reads it.

metrics = Metrics()
metrics.note_turn({"endpoint_ms": 430.0, "first_audio_ms": 512.0})
metrics.text()
"""

from __future__ import annotations

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Gauge, Histogram, generate_latest

from lorikeet.serve.queue import Queue

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_BUCKETS_S = (0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.8, 1.0, 1.3, 1.6, 2.0, 3.0, 5.0, 10.0)


class Metrics:
    """One server's numbers."""

    def __init__(self) -> None:
        """Begin at nothing."""
        self.registry = CollectorRegistry()
        self._stages = Histogram(
            "lorikeet_voice_stage_seconds",
            "From the end of a user's speech to each stage of the spoken answer.",
            ("stage",),
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        self._last = Gauge(
            "lorikeet_voice_last_turn_seconds",
            "The waterfall of the last spoken answer: from the end of speech to each stage.",
            ("stage",),
            registry=self.registry,
        )

    def watch(self, queue: Queue) -> None:
        """Show a queue: who waits, who is answered, who was refused, and how long those who came in had waited."""
        for name, about, read in (
            ("waiting", "Requests that wait for their turn.", lambda: queue.waiting),
            ("answering", "Requests that are being answered.", lambda: queue.answering),
            ("refused_total", "Requests that were refused because the line was full.", lambda: queue.refused),
        ):
            Gauge(f"lorikeet_queue_{name}", about, registry=self.registry).set_function(read)
        waited = Histogram(
            "lorikeet_queue_wait_seconds",
            "How long a request waited for its turn.",
            buckets=_BUCKETS_S,
            registry=self.registry,
        )
        queue.on_admitted = waited.observe

    def note_turn(self, waterfall: Mapping[str, float]) -> None:
        """Count a spoken answer: stage names that end in `_ms`, and milliseconds after the end of speech."""
        for name, ms in waterfall.items():
            stage = name.removesuffix("_ms")
            self._stages.labels(stage).observe(max(0.0, ms) / 1000)
            self._last.labels(stage).set(ms / 1000)

    def text(self) -> str:
        """Return all of it in Prometheus's text format."""
        return generate_latest(self.registry).decode()
