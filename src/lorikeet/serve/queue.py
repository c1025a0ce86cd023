"""The line before the engine: how many are answered at once, who is next, and when to say no.

    queue = Queue(slots=4, places=32)
    with queue.join() as ticket:          # BusyError, at once, if the line is full; `ready=False` lets others go first
        while not ticket.wait(0.25):
            ...                           # still in line, at ticket.position
        ...                               # answered now; leaving the block makes room

First come, first served. A voice conversation is urgent: it goes before every text, and one slot more than `slots` is kept
for it, so nobody who types can make somebody who speaks wait. One line serves all models, because they share the cores. It
knows no model and no HTTP.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from typing import Self

from lorikeet.errors import MachineError

MOST_RETRY_S = 60
FIRST_GUESS_S = 2.0
"""How long an answer takes, before one was seen."""


class BusyError(MachineError):
    """The line is full."""

    def __init__(self, before: int, *, retry_after_s: int) -> None:
        """Say how many were before it, and when to come back."""
        super().__init__(f"the server is busy: {before} requests wait already; try again in {retry_after_s} s")
        self.retry_after_s = retry_after_s


class Ticket:
    """A place in the line, then in a slot; leaving gives up either."""

    def __init__(self, queue: Queue, *, urgent: bool, is_ready: bool) -> None:
        """Stand in `queue`; `Queue.join` makes tickets."""
        self.urgent = urgent
        self.is_ready = is_ready
        """Whether it can be let in; what still searches keeps its place, and lets others go first."""
        self.ready_s = time.monotonic()
        """Since when it could be let in: what a search takes is no waiting."""
        self.admitted_s: float | None = None
        self._queue = queue
        self._turn = threading.Event()

    def __enter__(self) -> Self:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Leave."""
        self.leave()

    @property
    def position(self) -> int:
        """How many are to be answered before this one, itself included; 0 when it is being answered."""
        return self._queue.position(self)

    def wait(self, timeout_s: float) -> bool:
        """Wait for its turn, so long at most, and say whether it has come."""
        return self._turn.wait(timeout_s)

    def ready(self) -> None:
        """Let it be let in from now on."""
        self._queue.ready(self)

    def admit(self) -> None:
        """Let it in; the queue calls this."""
        self.admitted_s = time.monotonic()
        self._turn.set()

    def leave(self) -> None:
        """Make room for the next; a second time does nothing."""
        self._queue.remove(self)


class Queue:
    """The line; any thread may call it."""

    def __init__(self, *, slots: int, places: int) -> None:
        """Answer `slots` texts at once and one urgent request more, and let `places` texts wait."""
        self.slots, self.places = slots, places
        self.refused = 0
        """How many were turned away."""
        self.on_admitted: Callable[[float], object] = lambda _: None
        """Given the seconds that each request waited."""
        self._line: list[Ticket] = []
        self._inside: set[Ticket] = set()
        self._answer_s = FIRST_GUESS_S
        self._lock = threading.Lock()

    @property
    def waiting(self) -> int:
        """How many stand in line."""
        return len(self._line)

    @property
    def answering(self) -> int:
        """How many are being answered."""
        return len(self._inside)

    def join(self, *, urgent: bool = False, ready: bool = True) -> Ticket:
        """Return a place, at the end of those as urgent. Raises BusyError if no text may wait any more.

        One that is not `ready` has a place and takes no slot until `Ticket.ready`.
        """
        ticket = Ticket(self, urgent=urgent, is_ready=ready)
        with self._lock:
            texts = sum(not waiting.urgent for waiting in self._line)
            free = max(0, self.slots - len(self._inside))  # with somebody in line only while they are not ready
            if not urgent and texts - free >= self.places:
                self.refused += 1
                raise BusyError(texts or len(self._inside), retry_after_s=self._retry_after_s())
            place = len(self._line) - texts if urgent else len(self._line)
            self._line.insert(place, ticket)
            admitted = self._admit()
        self._tell(admitted)
        return ticket

    def ready(self, ticket: Ticket) -> None:
        """Let a ticket be let in from now on."""
        with self._lock:
            if not ticket.is_ready:
                ticket.is_ready, ticket.ready_s = True, time.monotonic()
            admitted = self._admit()
        self._tell(admitted)

    def remove(self, ticket: Ticket) -> None:
        """Take a ticket out of the line or its slot."""
        with self._lock:
            if ticket in self._inside:
                self._inside.remove(ticket)
                if ticket.admitted_s is not None:
                    self._answer_s += 0.1 * (time.monotonic() - ticket.admitted_s - self._answer_s)
            elif ticket in self._line:
                self._line.remove(ticket)
            admitted = self._admit()
        self._tell(admitted)

    def position(self, ticket: Ticket) -> int:
        """Return its place in line, from 1, among those that can be let in; 0 if it is in none."""
        with self._lock:
            if ticket not in self._line:
                return 0
            return 1 + sum(before.is_ready for before in self._line[: self._line.index(ticket)])

    def _has_room(self, ticket: Ticket) -> bool:
        return len(self._inside) < self.slots + ticket.urgent

    def _admit(self) -> list[Ticket]:
        """Let in as many as there is room for, and return them. The urgent stand first, so the first decides for all."""
        admitted = []
        for ticket in [ticket for ticket in self._line if ticket.is_ready]:
            if not self._has_room(ticket):
                break
            self._line.remove(ticket)
            self._inside.add(ticket)
            ticket.admit()
            admitted.append(ticket)
        return admitted

    def _tell(self, admitted: list[Ticket]) -> None:
        for ticket in admitted:
            self.on_admitted((ticket.admitted_s or ticket.ready_s) - ticket.ready_s)

    def _retry_after_s(self) -> int:
        """Return when about half of the line will have been answered."""
        return max(1, min(MOST_RETRY_S, math.ceil(self._answer_s * len(self._line) / self.slots / 2)))
