"""Stand-ins that truly implement the protocols, and a server on a free port that ends by itself."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import uvicorn

from lorikeet.errors import EngineError, RequestError
from lorikeet.messages import AnswerOptions, Delta, Message, Source, Usage
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.models import Models, Served
from lorikeet.serve.search.provider import SearchError
from lorikeet.serve.server import Listener
from lorikeet.speech import HEARING_HZ, Samples, Segment, TimedTranscript, Transcript, Word

API_KEY = "a key with spaces and ümlauts"


class ScriptedEngine:
    """Answers every conversation with the same pieces, and remembers what it was asked."""

    def __init__(self, *pieces: str | Delta, delay_s: float = 0.0) -> None:
        """Answer with texts, or with deltas as they are; one with a finish reason ends the answer."""
        self.name = "scripted"
        self.pieces = pieces or ("Hello", " there", ".")
        self.delay_s = delay_s
        self.asked: list[list[Message]] = []
        self.options: list[dict[str, Any]] = []
        self.answer_options: list[AnswerOptions | None] = []
        self.given = 0
        self.closed = threading.Event()
        self.down = False
        self.streams: list[Iterator[Delta]] = []
        """Kept, so that only who closes a stream ends it, and not the collector."""

    def stream(
        self,
        messages: Sequence[Message],
        *,
        max_tokens: int = 512,
        temperature: float = 0.3,
        top_p: float = 0.95,
        seed: int | None = None,
        stop: Sequence[str] = (),
        options: AnswerOptions | None = None,
    ) -> Iterator[Delta]:
        self.asked.append(list(messages))
        self.answer_options.append(options)
        self.options.append(
            {"max_tokens": max_tokens, "temperature": temperature, "top_p": top_p, "seed": seed, "stop": list(stop)}
        )
        if self.down:
            raise EngineError("the engine at nowhere does not answer")
        if "too long" in messages[-1].content:
            raise RequestError("the request exceeds the context size")
        self.streams.append(self._pieces(max_tokens))
        return self.streams[-1]

    def _pieces(self, max_tokens: int) -> Iterator[Delta]:
        try:
            for number, piece in enumerate(self.pieces):
                if number == max_tokens:
                    yield Delta("", "length", Usage(7, number))
                    return
                if piece == "<fail>":
                    raise EngineError("the engine stopped in the middle of an answer; ask again")
                time.sleep(self.delay_s)
                self.given += 1
                yield piece if isinstance(piece, Delta) else Delta(piece)
                if isinstance(piece, Delta) and piece.finish_reason:
                    return
            yield Delta("", "stop", Usage(7, len(self.pieces)))
        finally:
            self.closed.set()

    def healthy(self) -> bool:
        return not self.down

    def problem(self) -> str:
        return "the engine at nowhere does not answer" if self.down else ""

    def close(self) -> None:
        self.down = True


class ScriptedProvider:
    """A search service with fixed results, or a failure."""

    name = "scripted search"

    def __init__(self, *sources: Source, failure: str = "") -> None:
        self.sources = list(sources)
        self.failure = failure
        self.queries: list[str] = []

    def search(self, query: str, *, limit: int = 5) -> list[Source]:
        self.queries.append(query)
        if self.failure:
            raise SearchError(self.failure)
        return self.sources[:limit]


class ToneVoice:
    """Says every sentence as a tone of a tenth of a second."""

    name = "tone"
    sample_rate_hz = 24_000

    def speak(self, text: str) -> Iterator[Samples]:
        for sentence in filter(str.strip, text.split(".")):
            time_s = np.arange(self.sample_rate_hz // 10) / self.sample_rate_hz
            yield (0.4 * np.sin(2 * np.pi * (200 + 10 * len(sentence)) * time_s)).astype(np.float32)


class CountingEars:
    """Hears how long a sound is, and nothing in silence."""

    name = "counting"

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def transcribe(self, samples: Samples) -> Transcript:
        loud = samples.size and float(np.abs(samples).max()) > 0.01
        seconds = samples.size / HEARING_HZ
        return Transcript(f"I heard {seconds:.1f} seconds." if loud else "", seconds)

    def transcribe_timed(
        self, samples: Samples, *, language: str = "", prompt: str = "", temperature: float = 0.0, words: bool = False
    ) -> Generator[Segment, None, TimedTranscript]:
        """Hear the same in one segment, from a quarter of the sound to its end, whose words share the time."""
        self.asked.append({"language": language, "prompt": prompt, "temperature": temperature, "words": words})
        heard = self.transcribe(samples)
        said, start_s = heard.text.split(), heard.duration_s / 4
        each_s = (heard.duration_s - start_s) / max(1, len(said))
        timed = [Word(word, start_s + n * each_s, start_s + (n + 1) * each_s) for n, word in enumerate(said)]
        segment = Segment(
            text=heard.text, start_s=start_s, end_s=heard.duration_s, words=tuple(timed) if words else (), tokens=(1, 2)
        )
        if said:
            yield segment
        return TimedTranscript((segment,) if said else (), language or "en", heard.duration_s)


def serving(assistant: Assistant, name: str = "parrot") -> Models:
    """Return the models of a server that serves one."""
    return Models(Served(name=name, assistant=assistant))


@contextmanager
def served(app: Any) -> Iterator[str]:
    """Serve the application in a thread and give its URL."""
    with Listener("127.0.0.1", 0) as listener:
        listener.stop_waiting()
        config = uvicorn.Config(
            app, log_level="warning", ws="websockets-sansio", ws_max_size=4 << 20, timeout_graceful_shutdown=2
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.socket]}, daemon=True)
        thread.start()
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            time.sleep(0.01)
        try:
            yield listener.url
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive(), "the server did not end"


@contextmanager
def silent_server() -> Iterator[tuple[str, threading.Semaphore]]:
    """A server that takes every request, says nothing, and counts the clients that have left."""
    left = threading.Semaphore(0)

    def wait(connection: socket.socket) -> None:
        with connection:
            while connection.recv(65536):
                pass
            left.release()

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=wait, args=(connection,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", left
        listener.shutdown(socket.SHUT_RDWR)
