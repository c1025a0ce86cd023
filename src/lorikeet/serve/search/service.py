"""A search service asked with care: in bounded time, nothing twice, and not at all while it refuses.

    service = load_search("ddg", deadline_s=4)
    sources = service.search("ferry timetable")

Any number of threads may ask at once. It knows no conversation and no page; it is a `Provider` itself.
"""

from __future__ import annotations

import logging
import math
import re
import threading
import time
import unicodedata
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

from lorikeet.errors import InputError
from lorikeet.messages import Source
from lorikeet.serve.search.clean import clean
from lorikeet.serve.search.provider import NothingFoundError, Provider, RefusedError, SearchError, load_provider

FETCHED = 10
"""Results asked of the service, from which the best are chosen."""

KEPT_S = 600.0
"""How long results are used again."""
NOTHING_KEPT_S = 60.0
"""How long it counts that nothing was found."""
KEPT_QUERIES = 256

FIRST_PAUSE_S = 30.0
"""Pause after a refusal; it doubles with each refusal that follows."""
LONGEST_PAUSE_S = 900.0
"""Longest pause, also where the service asks for more."""

MAX_AT_ONCE = 8
"""Searches under way at once, those included that nobody waits for any more."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Kept:
    outcome: list[Source] | NothingFoundError
    until_s: float


class SearchService:
    """A provider behind a cache, a deadline and a back-off."""

    def __init__(self, provider: Provider, *, deadline_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        """Ask `provider`; a search that takes longer than `deadline_s` is given up, and its results kept for the next."""
        self.name = provider.name
        self._provider = provider
        self._deadline_s = deadline_s
        self._clock = clock
        self._lock = threading.Lock()
        self._kept: OrderedDict[str, _Kept] = OrderedDict()
        self._under_way: dict[str, Future[list[Source]]] = {}
        self._refusals = 0
        self._paused_until_s = -math.inf

    def search(self, query: str, *, limit: int = FETCHED) -> list[Source]:
        """Return at least one and at most `limit` clean results. Raises SearchError, in words for the user."""
        future = self._ask(query)
        try:
            return future.result(timeout=self._deadline_s)[:limit]
        except TimeoutError:
            raise SearchError(f"{self.name} did not answer within {self._deadline_s:g} s") from None
        except SearchError as error:
            # A new one for each who waits: raising an exception writes into it.
            raise SearchError(str(error)) from None

    def _ask(self, query: str) -> Future[list[Source]]:
        """Return what will hold the results: kept ones, those of the same search under way, or a new one's."""
        key = _key(query)
        with self._lock:
            known = self._known(key)
            if known is not None:
                return known
            paused_s = self._paused_until_s - self._clock()
            if paused_s > 0:
                raise SearchError(
                    f"{self.name} refused too many searches; search is paused for {math.ceil(paused_s)} s"
                )
            if len(self._under_way) >= MAX_AT_ONCE:
                raise SearchError(f"{MAX_AT_ONCE} searches are under way already; ask again in a moment")
            future: Future[list[Source]] = Future()
            self._under_way[key] = future
        # Not a pool: its threads are joined when the program ends, however long they hang.
        threading.Thread(target=self._work, args=(key, query, future), name="search", daemon=True).start()
        return future

    def _known(self, key: str) -> Future[list[Source]] | None:
        kept = self._kept.get(key)
        if kept is None or kept.until_s < self._clock():
            return self._under_way.get(key)
        self._kept.move_to_end(key)
        done: Future[list[Source]] = Future()
        _settle(done, kept.outcome)
        return done

    def _work(self, key: str, query: str, future: Future[list[Source]]) -> None:
        outcome: list[Source] | SearchError
        try:
            outcome = clean(self._provider.search(query, limit=FETCHED))
            if not outcome:
                outcome = NothingFoundError(f"{self.name} found nothing that can be used")
        except SearchError as error:
            outcome = error
        # The edge of a thread: who waits must be told, whatever the service's page did to its parser.
        except Exception as error:  # noqa: BLE001
            _log.exception("a search failed")
            outcome = SearchError(f"{self.name} failed ({type(error).__name__}); the server's log says more")
        with self._lock:
            outcome = self._note(key, outcome)
            del self._under_way[key]
        _settle(future, outcome)

    def _note(self, key: str, outcome: list[Source] | SearchError) -> list[Source] | SearchError:
        """Keep an outcome, or pause after a refusal; return what those who wait are told."""
        now_s = self._clock()
        if isinstance(outcome, RefusedError):
            pause_s = min(LONGEST_PAUSE_S, max(FIRST_PAUSE_S * 2**self._refusals, outcome.retry_after_s or 0.0))
            self._refusals = min(self._refusals + 1, 10)
            self._paused_until_s = max(self._paused_until_s, now_s + pause_s)
            return SearchError(f"{outcome}; search is paused for {math.ceil(pause_s)} s")
        if isinstance(outcome, SearchError) and not isinstance(outcome, NothingFoundError):
            return outcome
        self._refusals = 0
        kept_s = NOTHING_KEPT_S if isinstance(outcome, NothingFoundError) else KEPT_S
        self._kept[key] = _Kept(outcome, now_s + kept_s)
        self._kept.move_to_end(key)
        while len(self._kept) > KEPT_QUERIES:
            self._kept.popitem(last=False)
        return outcome


def _settle(future: Future[list[Source]], outcome: list[Source] | SearchError) -> None:
    if isinstance(outcome, SearchError):
        future.set_exception(outcome)
    else:
        future.set_result(outcome)


def _key(query: str) -> str:
    """Return what two queries share that ask the same."""
    text = " ".join(unicodedata.normalize("NFKC", query).casefold().split())
    return re.sub(r"[\s?!.,]+$", "", text)


def load_search(name: str, *, deadline_s: float) -> SearchService | None:
    """Return the service `ddg` or `searxng:URL`, or None for `off`. Raises InputError for what cannot be asked."""
    if deadline_s <= 0:
        raise InputError(f"--search-deadline-s {deadline_s:g} leaves no time; give more than 0, or --search off")
    provider = load_provider(name, deadline_s=deadline_s)
    return SearchService(provider, deadline_s=deadline_s) if provider else None
