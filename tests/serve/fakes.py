"""Small true implementations of the protocols: a scripted engine, a provider, ears and a voice."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence

import numpy as np

from lorikeet.errors import EngineError, RequestError
from lorikeet.messages import Delta, Message, Source, Usage
from lorikeet.serve.search.provider import SearchError
from lorikeet.speech import Samples, Transcript


class EchoEngine:
    """Says the last message back, a character at a time; notes what it was asked and whether it was stopped."""

    name = "echo"

    def __init__(self, *, delay_s: float = 0.0) -> None:
        self.delay_s = delay_s
        self.asked: list[list[Message]] = []
        self.settings: list[dict[str, object]] = []
        self.said = 0
        self.stopped = threading.Event()
        self.alive = True

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float = 0.3,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: Sequence[str] = (),
    ) -> Iterator[Delta]:
        self.asked.append(list(messages))
        self.settings.append(
            {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": tuple(stop)}
        )
        text = messages[-1].content.rsplit("\n", 1)[-1]
        if "refuse" in text:
            raise RequestError("the request exceeds the available context size")
        finished = False
        try:
            for count, character in enumerate(text[:max_tokens]):
                if text.startswith("break") and count == 5:
                    raise EngineError("the engine stopped in the middle of an answer; ask again")
                self.said += 1
                yield Delta(character)
                time.sleep(self.delay_s)
            cut = len(text) > max_tokens
            yield Delta("", "length" if cut else "stop", Usage(7, min(len(text), max_tokens)))
            finished = True
        finally:
            if not finished:
                self.stopped.set()

    def healthy(self) -> bool:
        return self.alive

    def close(self) -> None:
        self.alive = False


class OneSource:
    """Finds one page, or fails with a reason."""

    name = "test"

    def __init__(self, failure: str = "") -> None:
        self.failure = failure
        self.queries: list[str] = []

    def search(self, query: str, *, limit: int = 5) -> list[Source]:
        self.queries.append(query)
        if self.failure:
            raise SearchError(self.failure)
        return [Source("Tides <b>today</b>", "https://tides.example/a", "High water at 06:12.")]


class LoudEars:
    """Hears the loudness."""

    name = "loud"

    def transcribe(self, samples: Samples) -> Transcript:
        return Transcript(f"level {np.abs(samples).max():.1f}", samples.size / 16_000)


class ToneVoice:
    """Says every word as a tenth of a second of tone."""

    name = "tone"
    sample_rate_hz = 8_000

    def speak(self, text: str) -> Iterator[Samples]:
        for _ in text.split():
            yield np.sin(np.arange(800) / 4).astype(np.float32) / 2
