"""Where search results come from: DuckDuckGo.

    provider = load_provider("ddg")
    sources = provider.search("ferry timetable", limit=5)

A search that fails raises SearchError, whose text is for the user; it is never an empty list in disguise.
"""

from __future__ import annotations

from typing import Protocol

from lorikeet.errors import InputError, LorikeetError, MissingExtraError
from lorikeet.messages import Source

DEADLINE_S = 8
"""Longest wait for results; the answer goes on without them."""

MAX_QUERY_CHARACTERS = 300


class SearchError(LorikeetError):
    """The search failed; the answer can go on without it."""


class Provider(Protocol):
    """A search service."""

    name: str

    def search(self, query: str, *, limit: int = 5) -> list[Source]:
        """Return at least one and at most `limit` results. Raises SearchError."""
        ...


class DuckDuckGo:
    """DuckDuckGo's text search, through `ddgs`."""

    name = "DuckDuckGo"

    def __init__(self, *, proxy: str | None = None, verify: bool | str = True) -> None:
        """Search through `proxy`, if given; `verify` is False or a file of certificate authorities to trust instead."""
        self._proxy = proxy
        self._verify = verify

    def search(self, query: str, *, limit: int = 5) -> list[Source]:
        """Return the results for `query`. Raises SearchError, saying whether it was refused, late or empty."""
        from ddgs import DDGS
        from ddgs.exceptions import DDGSException, RatelimitException, TimeoutException

        try:
            with DDGS(proxy=self._proxy, timeout=DEADLINE_S, verify=self._verify) as client:
                rows = client.text(query[:MAX_QUERY_CHARACTERS], backend="duckduckgo", max_results=limit)
        except RatelimitException as error:
            raise SearchError("DuckDuckGo refused: too many searches; try again in a minute") from error
        except TimeoutException as error:
            raise SearchError(f"DuckDuckGo did not answer within {DEADLINE_S} s") from error
        except DDGSException as error:
            if "No results" in str(error):
                # ddgs reads "202 Ratelimit" as an empty page, so the two cannot be told apart.
                raise SearchError(
                    "DuckDuckGo gave no results: it found nothing, or refused because of too many searches"
                ) from error
            raise SearchError("DuckDuckGo cannot be reached") from error
        sources = [Source(row.get("title", ""), row.get("href", ""), row.get("body", "")) for row in rows]
        sources = [source for source in sources if source.url.startswith(("http://", "https://")) and source.snippet]
        if not sources:
            raise SearchError("DuckDuckGo found nothing")
        return sources[:limit]


def load_provider(name: str) -> Provider | None:
    """Return the provider `ddg`, or None for `off`. Raises InputError for another name."""
    if name == "off":
        return None
    if name != "ddg":
        raise InputError(f"--search {name} is not known; there are: ddg, off")
    from importlib.util import find_spec

    if find_spec("ddgs") is None:
        raise MissingExtraError("ddgs", "serve")
    return DuckDuckGo()
