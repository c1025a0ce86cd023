"""Listening: a port taken before anything slow, an honest 503 until the application is ready, and an orderly end.

    with Listener("127.0.0.1", 7860) as listener:
        app = build()                               # meanwhile /health says "starting"
        run_server(app, listener, on_ready=print)   # until Ctrl-C or SIGTERM

It knows nothing of what it serves.
"""

from __future__ import annotations

import asyncio
import errno
import json
import logging
import socket
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self

from lorikeet.errors import InputError

GRACE_S = 5
"""How long answers under way may go on after the server was asked to stop."""

MAX_MESSAGE_BYTES = 4 << 20
"""Longest WebSocket message: about a minute of audio."""


class Listener:
    """A port that is listened on, answering "starting" until the application takes over."""

    def __init__(self, host: str, port: int) -> None:
        """Take `port` of `host`; 0 is any free one. Raises InputError for one that cannot be had."""
        self.socket = _bind(host, port)
        self.port = int(self.socket.getsockname()[1])
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
        self.url = f"http://{shown}:{self.port}"
        self._waiting = _Waiting(self.socket.dup())
        self._thread = threading.Thread(target=self._waiting.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Give the port back."""
        self.stop_waiting()
        self.socket.close()

    def stop_waiting(self) -> None:
        """Stop answering "starting"; who connects now waits for the application."""
        if self._thread.is_alive():
            self._waiting.shutdown()
            self._thread.join()
            self._waiting.server_close()


def run_server(app: Any, listener: Listener, *, proxy: str = "", on_ready: Callable[[str], object] = str) -> None:
    """Serve the ASGI `app` until SIGTERM or Ctrl-C; `on_ready` is given the URL once it answers.

    Answers under way have `GRACE_S` to end. A signal's handler that was set before is called at the end.
    """
    import uvicorn

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            if self.started:
                on_ready(listener.url)

    settings = server_settings(app, proxy=proxy)
    logging.getLogger("uvicorn.error").addFilter(_is_no_cut_answer)
    listener.stop_waiting()
    Server(settings).run(sockets=[listener.socket])


def _is_no_cut_answer(record: logging.LogRecord) -> bool:
    """Say whether a line of the log is more than the trace of an answer that was cut at the end; how many were has a line."""
    return not (record.exc_info and isinstance(record.exc_info[1], asyncio.CancelledError))


def server_settings(app: Any, *, proxy: str = "") -> Any:
    """Return uvicorn's settings. `proxy` is the address or network of a proxy in front, '' for none.

    X-Forwarded-For and X-Forwarded-Proto are anybody's to write. They are read on connections from `proxy` alone, and of
    the addresses the last one that is not `proxy`'s counts: the one that the proxy itself saw.
    """
    import uvicorn

    return uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=GRACE_S,
        server_header=False,
        proxy_headers=bool(proxy),
        forwarded_allow_ips=proxy or "",
        ws="websockets-sansio",
        ws_max_size=MAX_MESSAGE_BYTES,
    )


def _bind(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65535:
        raise InputError(f"--port {port} is no port; give one from 1 to 65535, or 0 for a free one")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        bound = socket.socket(family, kind, protocol)
    except (OSError, UnicodeError) as error:
        raise InputError(f"--host {host} is no address of this machine; try 127.0.0.1") from error
    try:
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        bound.listen(128)
    except OSError as error:
        bound.close()
        if error.errno == errno.EADDRINUSE:
            raise InputError(f"port {port} is in use; choose another with --port (0 takes a free one)") from error
        if error.errno == errno.EACCES:
            raise InputError(f"port {port} is reserved for the system; choose one from 1024 with --port") from error
        raise InputError(f"--host {host} is no address of this machine; try 127.0.0.1") from error
    return bound


class _Waiting(ThreadingHTTPServer):
    """What answers while the application is being built."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, bound: socket.socket) -> None:
        super().__init__(("", 0), _Starting, bind_and_activate=False)
        self.socket.close()
        self.socket = bound


class _Starting(BaseHTTPRequestHandler):
    """Answers every request with 503 and `{"status": "starting"}`."""

    timeout = 5
    server_version = "lorikeet"
    sys_version = ""

    def do_GET(self) -> None:
        """Say that the server is starting."""
        body = json.dumps({"status": "starting"}).encode()
        self.send_response(503)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Retry-After", "2")
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_GET  # noqa: N815  # the names are http.server's

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is http.server's
        """Keep quiet."""
