"""How much one visitor may ask of a public server: so many requests a minute, and so many at once.

    limits = Limits()
    with limits.enter("203.0.113.7", kind_of_request("POST", "/v1/chat/completions")):   # raises TooManyError
        ...                                                                             # answered here

Each visitor has a token bucket for each kind of request: it holds `burst` requests and is filled again at `per_minute`.
Time is the monotonic clock's, so a clock that is set back lets nobody in and keeps nobody out. It knows no HTTP but
the names of routes; one event loop's thread calls it.
"""

from __future__ import annotations

import ipaddress
import math
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal

from lorikeet.errors import LorikeetError

Kind = Literal["answers", "sound files", "spoken sessions", "requests"]
"""What is counted, in the words that a visitor is told."""

SOUND_PATHS = ("/v1/audio/", "/gradio_api/upload")
MOST_VISITORS = 10_000
"""Visitors that are remembered. Who was not seen for longest is forgotten first, and begins anew."""

BUSY_RETRY_S = 5
"""When to come back, where requests of one's own are still being answered."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """How much of one kind a visitor may ask."""

    per_minute: int
    burst: int
    """So many may come in one go, after a pause."""
    at_once: int


LIMITS: Mapping[Kind, Limit] = {
    "answers": Limit(per_minute=20, burst=10, at_once=2),
    "sound files": Limit(per_minute=20, burst=10, at_once=2),
    "spoken sessions": Limit(per_minute=6, burst=3, at_once=2),
    # The page itself is a few hundred small files, some of which stay open.
    "requests": Limit(per_minute=600, burst=600, at_once=40),
}


class TooManyError(LorikeetError):
    """A visitor asks for more than its share."""

    def __init__(self, message: str, *, retry_after_s: int) -> None:
        """Say what was too much, and when to come back."""
        super().__init__(f"{message}; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


@dataclass(slots=True)
class _Count:
    """One visitor's requests of one kind."""

    tokens: float
    at_s: float
    under_way: int = 0


@dataclass(slots=True)
class _Visitor:
    counts: dict[Kind, _Count] = field(default_factory=dict)

    def is_idle(self) -> bool:
        return not any(count.under_way for count in self.counts.values())


class Limits:
    """Every visitor's share."""

    def __init__(
        self,
        limits: Mapping[Kind, Limit] = LIMITS,
        *,
        most_visitors: int = MOST_VISITORS,
        now_s: Callable[[], float] = time.monotonic,
    ) -> None:
        """Hold visitors to `limits`, by the clock `now_s`, which never goes back."""
        self._limits = limits
        self._most_visitors = most_visitors
        self._now_s = now_s
        self._visitors: OrderedDict[str, _Visitor] = OrderedDict()

    def __len__(self) -> int:
        """Return how many visitors are remembered."""
        return len(self._visitors)

    @contextmanager
    def enter(self, address: str, kind: Kind) -> Iterator[None]:
        """Count a request of the visitor at `address` while the block runs. Raises TooManyError, which counts nothing."""
        count, limit = self._count(network_of(address), kind), self._limits[kind]
        if count.under_way >= limit.at_once:
            message = f"{limit.at_once} {kind} of yours are under way, the most for one visitor"
            raise TooManyError(message, retry_after_s=BUSY_RETRY_S)
        if count.tokens < 1:
            wait_s = math.ceil((1 - count.tokens) * 60 / limit.per_minute)
            message = f"that is more than {limit.per_minute} {kind} a minute, the most for one visitor"
            raise TooManyError(message, retry_after_s=wait_s)
        count.tokens -= 1
        count.under_way += 1
        try:
            yield
        finally:
            count.under_way -= 1

    def _count(self, name: str, kind: Kind) -> _Count:
        """Return a visitor's count of a kind, with what its bucket has gained since."""
        now_s, limit = self._now_s(), self._limits[kind]
        visitor = self._visitors.get(name)
        if visitor is None:
            self._make_room()
            visitor = self._visitors[name] = _Visitor()
        self._visitors.move_to_end(name)
        count = visitor.counts.setdefault(kind, _Count(tokens=limit.burst, at_s=now_s))
        count.tokens = min(limit.burst, count.tokens + (now_s - count.at_s) * limit.per_minute / 60)
        count.at_s = now_s
        return count

    def _make_room(self) -> None:
        """Forget the visitor that was not seen for longest and waits for nothing."""
        if len(self._visitors) < self._most_visitors:
            return
        # At most as many are busy as the process has sockets, so that this ends soon.
        idle = next((name for name, visitor in self._visitors.items() if visitor.is_idle()), None)
        if idle is not None:
            del self._visitors[idle]


def kind_of_request(method: str, path: str) -> Kind | None:
    """Return what a request counts as; None for `/health`, which whoever watches the server may ask at any time.

    A WebSocket's `method` is `WEBSOCKET`. Whatever else changes something counts as an answer: most of it has the model
    answer, and who adds a route forgets nothing here.
    """
    if path == "/health":
        return None
    if method == "WEBSOCKET":
        return "spoken sessions"
    if method in {"GET", "HEAD", "OPTIONS"}:
        return "requests"
    return "sound files" if path.startswith(SOUND_PATHS) else "answers"


def network_of(address: str) -> str:
    """Return who an address stands for: itself, or the /64 that one subscriber of IPv6 has to themselves.

    What is no address stands for one visitor, together with all others that have none.
    """
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv4Address):
        return str(parsed)
    if parsed.ipv4_mapped:
        return str(parsed.ipv4_mapped)
    return str(ipaddress.ip_network((int(parsed), 64), strict=False).network_address)
