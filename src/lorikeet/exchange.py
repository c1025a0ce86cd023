"""One streamed answer of an HTTP server, read by a thread of its own, so that whoever waits for it can leave at any moment.

    with Exchange(client, "/v1/chat/completions", body, read=read) as exchange:
        for item in exchange.items():      # None for each moment of silence
            ...                            # leaving the block breaks the connection off: the server can stop

A read that waits for a silent server ends with nothing but its connection. It knows no protocol: `read` makes items of the
response, and may raise.
"""

from __future__ import annotations

import queue
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, Self

import httpx

LIFE_S = 0.5
"""After so long a silence whoever waits looks around."""

MOST_AHEAD = 256
"""Items that are read before they are asked for."""

_CONNECTED = ("connect_tcp.complete", "start_tls.complete")
_END = object()


class Exchange:
    """A request under way."""

    def __init__(
        self,
        client: httpx.Client,
        route: str,
        body: Any,
        *,
        read: Callable[[httpx.Response], Iterator[Any]],
    ) -> None:
        """POST `body` as JSON; `read` gets the response before its body is read, and yields its items."""
        self._client, self._route, self._body, self._read = client, route, body, read
        self._items: queue.Queue[Any] = queue.Queue(MOST_AHEAD)
        self._stream: Any = None
        self._left = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Self:
        """Send the request."""
        threading.Thread(target=self._run, name="exchange", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        """Break the connection off, whatever is read from it now."""
        with self._lock:
            self._left.set()
            self._cut()

    def items(self) -> Iterator[Any]:
        """Yield the items as they come, and None after each `LIFE_S` without one. Raises what the reading raised."""
        while True:
            try:
                item = self._items.get(timeout=LIFE_S)
            except queue.Empty:
                yield None
                continue
            if item is _END:
                return
            if isinstance(item, Exception):
                raise item
            yield item

    def _run(self) -> None:
        try:
            extensions = {"trace": self._trace}
            with self._client.stream("POST", self._route, json=self._body, extensions=extensions) as response:
                for item in self._read(response):
                    self._put(item)
                    if self._left.is_set():
                        return
        # The edge of a thread: whoever waits must be told, whatever it is.
        except Exception as error:  # noqa: BLE001
            self._put(error)
        else:
            self._put(_END)

    def _put(self, item: Any) -> None:
        while not self._left.is_set():
            with suppress(queue.Full):
                self._items.put(item, timeout=LIFE_S)
                return

    def _trace(self, event: str, details: Mapping[str, Any]) -> None:
        """Remember the connection, which httpx itself shows to nobody while it waits."""
        if event.endswith(_CONNECTED):
            with self._lock:
                self._stream = details["return_value"]
                if self._left.is_set():
                    self._cut()

    def _cut(self) -> None:
        connection = self._stream.get_extra_info("socket") if self._stream else None
        if connection is not None:
            with suppress(OSError):  # it has ended by itself
                connection.shutdown(socket.SHUT_RDWR)
