"""A GGUF file at work: in the engine alone, and behind the routes of the real server.

    with serving(run, "q8_0") as url:                   # `lorikeet serve`, a process of its own
        answer = ask(url, messages, most_tokens=32)

The server is asked from outside, over HTTP, as any client would. It knows nothing of what the answers are compared with.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from lorikeet.engine import LlamaEngine
from lorikeet.errors import EngineError
from lorikeet.export.trained import Row
from lorikeet.messages import Message
from lorikeet.scoring import Scorer

Floats = NDArray[np.float32]
Done = Callable[[], None]

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 20.0
_SERVER = """
import os, signal, threading

def end_with_parent():
    os.read(0, 1)
    os.kill(os.getpid(), signal.SIGTERM)

threading.Thread(target=end_with_parent, daemon=True).start()
from lorikeet.cli import main
main()
"""
"""The server, which ends as on SIGTERM when its stdin closes: so it never outlives whoever asks, however that one ends."""

SEED = 7
"""With a seed no cached prefix is used, so that the same question gives the same answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer."""

    text: str
    ended: bool
    """Whether a stop token ended it, not the limit."""
    prompt_tokens: int
    ids: list[int]
    """Its tokens, without the one that ended it; [] where only the text is known."""


def log_probs(gguf: Path, rows: Sequence[Row], *, done: Done = lambda: None) -> Iterator[Floats]:
    """Yield what llama.cpp with the file `gguf` gives at the places of each row: ln p, shape (places, vocabulary).

    Raises InputError for a damaged file, EngineError if llama.cpp does not take it.
    """
    with LlamaEngine(gguf, scoring=True, context_tokens=max(len(row.ids) for row in rows) + 1) as engine:
        scorer = Scorer(engine)
        for row in rows:
            logits = np.concatenate(list(scorer.logits(row.ids, row.places)))
            logits -= logits.max(axis=1, keepdims=True)
            yield logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
            done()


def answer_alone(engine: LlamaEngine, prompt: Sequence[int], *, most_tokens: int) -> Answer:
    """Return the engine's greedy answer to the tokens `prompt`: no template, no server."""
    done = _complete(engine, prompt, n_predict=most_tokens)
    ended = done["stop_type"] == "eos"
    return Answer(done["content"], ended, done["tokens_evaluated"], list(done["tokens"]))


def stops_at(engine: LlamaEngine, prompt: Sequence[int], token: int) -> bool:
    """Say whether generation ends when the model says `token`: it is made certain, and two more may follow."""
    done = _complete(engine, prompt, n_predict=3, logit_bias=[[token, 1e4]])
    return bool(done["stop_type"] == "eos")


def _complete(engine: LlamaEngine, prompt: Sequence[int], **options: Any) -> dict[str, Any]:
    body = {"prompt": list(prompt), "temperature": 0.0, "seed": SEED, "cache_prompt": False, "return_tokens": True}
    done: dict[str, Any] = engine.post("/completion", {**body, **options})
    return done


@contextmanager
def serving(run: Path, quant: str) -> Iterator[str]:
    """Run `lorikeet serve RUN` on a free port for as long as the block, and give its URL.

    Raises EngineError, with the server's last line, if it does not come up.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-c", _SERVER, "serve", str(run)]
    command += ["--quant", quant, "--host", "127.0.0.1", "--port", str(port)]
    command += ["--search", "off", "--ears", "off", "--voice", "off"]
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=os.environ)
        try:
            url = f"http://127.0.0.1:{port}"
            if not _wait(process, url):
                log.seek(0)
                lines = [line.strip() for line in log.read().decode("utf-8", "replace").splitlines() if line.strip()]
                raise EngineError(f"the server does not come up: {lines[-1] if lines else 'it says nothing'}")
            yield url
        finally:
            _end(process)


def ask(url: str, messages: Sequence[Message], *, most_tokens: int) -> Answer:
    """Return the server's greedy answer. Raises EngineError if it gives none."""
    body = {
        "messages": [message.as_dict() for message in messages],
        "max_tokens": most_tokens,
        "temperature": 0,
        "seed": SEED,
    }
    try:
        response = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=300.0, trust_env=False)
        response.raise_for_status()
        found = response.json()
        choice = found["choices"][0]
        return Answer(
            choice["message"]["content"], choice["finish_reason"] == "stop", found["usage"]["prompt_tokens"], []
        )
    except (httpx.HTTPError, ValueError, KeyError, IndexError, TypeError) as error:
        raise EngineError(f"the server gives no answer: {str(error).splitlines()[0]}") from error


def _wait(process: subprocess.Popen[bytes], url: str) -> bool:
    """Wait until the server is ready; False if it ends or takes too long."""
    deadline = time.monotonic() + START_TIMEOUT_S
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if httpx.get(f"{url}/health", timeout=5.0, trust_env=False).status_code == httpx.codes.OK:
                return True
        except httpx.HTTPError:
            pass  # it does not listen yet
        time.sleep(0.1)
    return False


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(STOP_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    if process.stdin:
        process.stdin.close()
