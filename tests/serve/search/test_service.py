"""A search service asked with care: deadline, cache, back-off, one search for many who ask the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from lorikeet.messages import Source
from lorikeet.serve.search import service as module
from lorikeet.serve.search.provider import NothingFoundError, RefusedError, SearchError
from lorikeet.serve.search.service import SearchService

TIDES = Source("Tides", "https://tides.example/", "High water at 06:12.")


class Site:
    """A service that does what it is told, and remembers what it was asked."""

    name = "the site"

    def __init__(self) -> None:
        self.queries: list[str] = []
        self.act: Callable[[], list[Source]] = lambda: [TIDES]

    def search(self, query: str, *, limit: int = 10) -> list[Source]:
        self.queries.append(query)
        return self.act()


class Clock:
    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def refuse(retry_after_s: float | None = None) -> Callable[[], list[Source]]:
    def act() -> list[Source]:
        raise RefusedError("refused", retry_after_s=retry_after_s)

    return act


def nothing() -> list[Source]:
    raise NothingFoundError("found nothing")


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def service(site: Site, clock: Clock) -> SearchService:
    return SearchService(site, deadline_s=5, clock=clock)


def test_the_same_question_is_asked_once(service: SearchService, site: Site, clock: Clock) -> None:
    for query in ("High  tides?", "high tides", " HIGH TIDES!"):
        assert service.search(query) == [TIDES]
    assert site.queries == ["High  tides?"]
    clock.now_s += module.KEPT_S + 1
    service.search("high tides")
    assert len(site.queries) == 2


def test_nothing_found_is_kept_for_less_long(service: SearchService, site: Site, clock: Clock) -> None:
    site.act = nothing
    for _ in range(2):
        with pytest.raises(SearchError, match="found nothing"):
            service.search("tides")
    assert len(site.queries) == 1
    clock.now_s += module.NOTHING_KEPT_S + 1
    site.act = lambda: [TIDES]
    assert service.search("tides") == [TIDES]


def test_the_cache_is_bounded(service: SearchService, site: Site) -> None:
    for number in range(module.KEPT_QUERIES + 1):
        service.search(f"tide {number}")
    service.search(f"tide {module.KEPT_QUERIES}")
    assert len(site.queries) == module.KEPT_QUERIES + 1
    service.search("tide 0")
    assert len(site.queries) == module.KEPT_QUERIES + 2


def test_a_refusal_pauses_twice_as_long_each_time(service: SearchService, site: Site, clock: Clock) -> None:
    site.act = refuse()
    for asked, pause_s in enumerate((30, 60, 120), start=1):
        with pytest.raises(SearchError, match=f"refused; search is paused for {pause_s} s"):
            service.search("tides")
        clock.now_s += 1
        with pytest.raises(
            SearchError, match=f"the site refused too many searches; search is paused for {pause_s - 1} s"
        ):
            service.search("other tides")
        assert len(site.queries) == asked
        clock.now_s += pause_s
    site.act = lambda: [TIDES]
    assert service.search("tides") == [TIDES]
    site.act = refuse()
    with pytest.raises(SearchError, match="paused for 30 s"):
        service.search("new tides")


def test_the_services_own_wish_counts_up_to_a_bound(service: SearchService, site: Site, clock: Clock) -> None:
    site.act = refuse(200)
    with pytest.raises(SearchError, match="paused for 200 s"):
        service.search("tides")
    clock.now_s += 201
    site.act = refuse(1e9)
    with pytest.raises(SearchError, match="paused for 900 s"):
        service.search("tides")


def test_what_is_known_is_given_while_paused(service: SearchService, site: Site) -> None:
    service.search("tides")
    site.act = refuse()
    with pytest.raises(SearchError):
        service.search("other")
    assert service.search("tides") == [TIDES]


def test_a_failure_is_not_kept_and_pauses_nothing(service: SearchService, site: Site) -> None:
    def fail() -> list[Source]:
        raise SearchError("cannot be reached")

    site.act = fail
    with pytest.raises(SearchError, match="cannot be reached"):
        service.search("tides")
    site.act = lambda: [TIDES]
    assert service.search("tides") == [TIDES]


def test_a_defect_is_an_error_and_not_silence(service: SearchService, site: Site) -> None:
    site.act = lambda: [None]  # type: ignore[list-item]
    with pytest.raises(SearchError, match=r"the site failed .AttributeError."):
        service.search("tides")


def test_a_late_search_is_given_up_and_its_results_are_kept(site: Site) -> None:
    go = threading.Event()

    def late() -> list[Source]:
        go.wait(5)
        return [TIDES]

    site.act = late
    service = SearchService(site, deadline_s=0.1)
    began_s = time.monotonic()
    with pytest.raises(SearchError, match=r"the site did not answer within 0\.1 s"):
        service.search("tides")
    assert time.monotonic() - began_s < 2
    go.set()
    deadline_s = time.monotonic() + 5
    while time.monotonic() < deadline_s:
        try:
            assert service.search("tides") == [TIDES]
            break
        except SearchError:
            continue
    else:
        pytest.fail("the results never came")
    assert site.queries == ["tides"]


def test_many_who_ask_the_same_at_once_cost_one_search(site: Site) -> None:
    go = threading.Event()

    def slow() -> list[Source]:
        go.wait(5)
        return [TIDES]

    site.act = slow
    service = SearchService(site, deadline_s=5)
    with ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(service.search, "tides") for _ in range(12)]
        time.sleep(0.1)
        go.set()
        assert [answer.result() for answer in answers] == [[TIDES]] * 12
    assert site.queries == ["tides"]


def test_hanging_searches_are_bounded(site: Site) -> None:
    go = threading.Event()

    def hang() -> list[Source]:
        go.wait(5)
        return [TIDES]

    site.act = hang
    service = SearchService(site, deadline_s=0.02)
    for number in range(module.MAX_AT_ONCE):
        with pytest.raises(SearchError, match="did not answer"):
            service.search(f"tide {number}")
    with pytest.raises(SearchError, match="searches are under way already"):
        service.search("one more")
    go.set()
    assert len(site.queries) == module.MAX_AT_ONCE
