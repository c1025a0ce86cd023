"""DuckDuckGo through the real `ddgs`, against a stand-in that speaks its protocol over TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorikeet.errors import InputError
from lorikeet.messages import Source
from lorikeet.serve.search.clean import clean
from lorikeet.serve.search.provider import DuckDuckGo, NothingFoundError, RefusedError, SearchError, load_provider

from .duckduckgo import Site, make_authority, serve_duckduckgo


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def search(site: Site, tmp_path: Path) -> Iterator[DuckDuckGo]:
    authority, certificate = make_authority(tmp_path)
    with serve_duckduckgo(site, certificate) as proxy:
        yield DuckDuckGo(timeout_s=1, proxy=proxy, verify=str(authority))


def test_results_become_sources(search: DuckDuckGo, site: Site) -> None:
    site.results(
        ("Tide <b>times</b>", "https://tides.example/a", "High water at <b>06:12</b> &amp; 18:40."),
        ("An advertisement", "https://duckduckgo.com/y.js?ad_domain=x", "Buy"),
        ("Script", "javascript:alert(1)", "Tide times"),
        ("Harbour", "https://harbour.example/", "Tide times of today."),
    )
    found = clean(search.search("tide times"))
    assert site.queries == ["tide times"]
    assert found == [
        Source("Tide times", "https://tides.example/a", "High water at 06:12 & 18:40."),
        Source("Harbour", "https://harbour.example/", "Tide times of today."),
    ]


def test_no_more_than_asked_for(search: DuckDuckGo, site: Site) -> None:
    site.results(*((f"Page {n}", f"https://p{n}.example/", f"Text {n} of tides") for n in range(9)))
    assert len(search.search("tides", limit=4)) == 4


@pytest.mark.parametrize("status", ["202 Accepted", "403 Forbidden", "429 Too Many Requests"])
def test_a_refusal_is_told_from_an_empty_page(search: DuckDuckGo, site: Site, status: str) -> None:
    site.status, site.body = status, "<html>anomaly</html>"
    with pytest.raises(RefusedError, match=f"refused: too many searches from here .status {status[:3]}"):
        search.search("tides")


def test_a_puzzle_in_place_of_results_is_a_refusal(search: DuckDuckGo, site: Site) -> None:
    site.body = "<html><div class='anomaly-modal__title'>Unfortunately, bots use DuckDuckGo too.</div></html>"
    with pytest.raises(RefusedError):
        search.search("tides")


def test_a_failing_service_and_an_empty_page_are_said(search: DuckDuckGo, site: Site) -> None:
    site.status, site.body = "500 Internal Server Error", "<html></html>"
    with pytest.raises(SearchError, match="answered with status 500"):
        search.search("tides")
    site.status = "200 OK"
    site.results()
    with pytest.raises(NothingFoundError, match="found nothing"):
        search.search("tides")


def test_a_late_answer_is_said(search: DuckDuckGo, site: Site) -> None:
    site.delay_s = 3
    with pytest.raises(SearchError, match="did not answer in time"):
        search.search("tides")


def test_an_unknown_certificate_is_not_trusted(site: Site, tmp_path: Path) -> None:
    _, certificate = make_authority(tmp_path)
    site.results(("a", "https://a.example/", "b"))
    with serve_duckduckgo(site, certificate) as proxy, pytest.raises(SearchError, match="cannot be reached"):
        DuckDuckGo(timeout_s=2, proxy=proxy).search("tides")
    assert site.queries == []


def test_nobody_there_is_said() -> None:
    with pytest.raises(SearchError, match="cannot be reached"):
        DuckDuckGo(timeout_s=2, proxy="http://127.0.0.1:9").search("tides")


def test_names_of_providers() -> None:
    assert load_provider("off", deadline_s=1) is None
    assert isinstance(load_provider("ddg", deadline_s=1), DuckDuckGo)
    with pytest.raises(InputError, match="--search bing is not known"):
        load_provider("bing", deadline_s=1)
