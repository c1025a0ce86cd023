"""How serving starts and ends: listen at once, load in the background, say when it is ready, end within a bound.

serve(gguf, ServeConfig(), system_prompt="...", model_name="mine")
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path

from lorikeet.config import ServeConfig
from lorikeet.engine import HttpEngine, LlamaEngine
from lorikeet.errors import InputError, LorikeetError, MachineError, MissingExtraError
from lorikeet.gguf_header import read_header
from lorikeet.serve.search.provider import load_provider
from lorikeet.speech.hear import load_ears
from lorikeet.speech.speak import load_voice

GRACE_S = 8
"""Open answers have this long to end when the server is told to stop."""

SLOTS = 2
"""Conversations answered at once."""


def serve(target: Path | str, config: ServeConfig, *, system_prompt: str, model_name: str) -> None:
    """Serve the GGUF file or the OpenAI-compatible URL `target` until Ctrl-C or SIGTERM.

    Raises InputError for an address that cannot be had or is not allowed, and whatever loading raises.
    """
    if config.host not in {"127.0.0.1", "localhost", "::1"} and not config.api_key:
        raise InputError(f"--host {config.host} can be reached by others; give --api-key KEY, or leave --host out")
    if config.api_key is not None and len(config.api_key) < 8:
        raise InputError("--api-key is shorter than 8 characters; choose a longer one")
    if isinstance(target, Path):
        read_header(target)
    provider = load_provider(config.search)
    try:
        import uvicorn

        from lorikeet.serve.assistant import Assistant, Sampling
        from lorikeet.serve.http import Service, create_app
    except ImportError as error:
        raise MissingExtraError(error.name or "fastapi", "serve") from error

    listener = _listen(config)
    host, port = listener.getsockname()[:2]
    service = Service(model_name, sampling=Sampling(config.max_answer_tokens, config.temperature))
    app = create_app(service, api_key=config.api_key, loopback=config.host in {"127.0.0.1", "localhost", "::1"})
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=GRACE_S, lifespan="on"))
    failures: list[Exception] = []
    engines: list[HttpEngine] = []

    def load() -> None:
        began = time.monotonic()
        try:
            engine = _engine(target, config, model_name)
            engines.append(engine)
            service.ears = None if config.ears == "off" else load_ears(config.ears)
            service.voice = None if config.voice == "off" else load_voice(config.voice)
            service.assistant = Assistant(
                engine, system_prompt=system_prompt, provider=provider, context_tokens=config.context_tokens
            )
        except Exception as error:  # noqa: BLE001  # a thread's edge: it is raised again by the main thread
            failures.append(error)
            service.status = "failed"
            server.should_exit = True
            return
        service.status = "ready"
        shown = f"[{host}]" if ":" in host else host
        _say(f"{model_name} is ready after {time.monotonic() - began:.1f} s: http://{shown}:{port}  (Ctrl-C ends)")

    loader = threading.Thread(target=load, daemon=True)
    loader.start()
    # uvicorn raises the signal again when it has shut down; then there is nothing left to do.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    try:
        server.run(sockets=[listener])
    finally:
        listener.close()
        for engine in engines:
            engine.close()
    if failures:
        raise failures[0] if isinstance(failures[0], LorikeetError) else MachineError(f"cannot start: {failures[0]}")
    _say("stopped")


def _engine(target: Path | str, config: ServeConfig, name: str) -> HttpEngine:
    if isinstance(target, str):
        return HttpEngine.connect(target, api_key=os.environ.get("OPENAI_API_KEY", ""))
    return LlamaEngine(target, name=name, context_tokens=config.context_tokens, slots=SLOTS)


def _listen(config: ServeConfig) -> socket.socket:
    """Return a listening socket. Raises InputError if the address is taken or does not exist."""
    if not 0 <= config.port <= 65535:
        raise InputError(f"--port {config.port} is not a port; choose one from 0 to 65535")
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((config.host, config.port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        raise InputError(
            f"cannot listen on {config.host} port {config.port}: {error.strerror}; choose another with --port, or 0 for a free one"
        ) from error
    return listener


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
