"""DuckDuckGo through the real `ddgs`, against a stand-in that speaks its protocol over TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from lorikeet.errors import InputError
from lorikeet.messages import Source
from lorikeet.serve.search import provider
from lorikeet.serve.search.provider import DuckDuckGo, SearchError, load_provider

from .duckduckgo import Site, make_authority, serve_duckduckgo


@pytest.fixture
def site() -> Site:
    return Site()


@pytest.fixture
def search(site: Site, tmp_path: Path) -> Iterator[DuckDuckGo]:
    authority, certificate = make_authority(tmp_path)
    with serve_duckduckgo(site, certificate) as proxy:
        yield DuckDuckGo(proxy=proxy, verify=str(authority))


def test_results_become_sources(search: DuckDuckGo, site: Site) -> None:
    site.results(
        ("Tide <b>times</b>", "https://tides.example/a", "High water at <b>06:12</b> &amp; 18:40."),
        ("An advertisement", "https://duckduckgo.com/y.js?ad_domain=x", "Buy"),
        ("Script", "javascript:alert(1)", "Tide times"),
        ("Harbour", "https://harbour.example/", "Tide times of today."),
    )
    found = search.search("tide times")
    assert site.queries == ["tide times"]
    assert set(found) == {
        Source("Tide times", "https://tides.example/a", "High water at 06:12 & 18:40."),
        Source("Harbour", "https://harbour.example/", "Tide times of today."),
    }


def test_no_more_than_asked_for(search: DuckDuckGo, site: Site) -> None:
    site.results(*((f"Page {n}", f"https://p{n}.example/", f"Text {n} of tides") for n in range(9)))
    assert len(search.search("tides", limit=4)) == 4


@pytest.mark.parametrize("status", ["202 Accepted", "403 Forbidden", "500 Internal Server Error"])
def test_a_refusal_is_said(search: DuckDuckGo, site: Site, status: str) -> None:
    site.status, site.body = status, "<html>anomaly</html>"
    with pytest.raises(SearchError, match="gave no results: it found nothing, or refused"):
        search.search("tides")


def test_an_empty_page_is_said(search: DuckDuckGo, site: Site) -> None:
    site.results()
    with pytest.raises(SearchError, match="gave no results"):
        search.search("tides")


def test_a_late_answer_is_said(search: DuckDuckGo, site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "DEADLINE_S", 1)
    site.delay_s = 3
    with pytest.raises(SearchError, match=r"did not answer within 1 s|gave no results"):
        search.search("tides")


def test_an_unknown_certificate_is_not_trusted(site: Site, tmp_path: Path) -> None:
    _, certificate = make_authority(tmp_path)
    site.results(("a", "https://a.example/", "b"))
    with serve_duckduckgo(site, certificate) as proxy, pytest.raises(SearchError, match="cannot be reached"):
        DuckDuckGo(proxy=proxy).search("tides")
    assert site.queries == []


def test_nobody_there_is_said() -> None:
    with pytest.raises(SearchError, match="cannot be reached"):
        DuckDuckGo(proxy="http://127.0.0.1:9").search("tides")


def test_names_of_providers() -> None:
    assert load_provider("off") is None
    assert isinstance(load_provider("ddg"), DuckDuckGo)
    with pytest.raises(InputError, match="--search bing is not known"):
        load_provider("bing")
