"""Where search results come from: DuckDuckGo, or a SearXNG of the user's own.

    provider = load_provider("searxng:http://127.0.0.1:8888", deadline_s=4)
    sources = provider.search("ferry timetable", limit=10)

A search that fails raises SearchError, whose text is for the user; it is never an empty list in disguise. Results come as the
service gave them: `clean` makes them fit to be read. It knows no cache and no deadline of a turn: those are `service`'s.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any, Protocol
from urllib.parse import SplitResult, unquote, urlsplit

import httpx

from lorikeet.errors import InputError, LorikeetError, MissingExtraError
from lorikeet.messages import Source

MAX_RESPONSE_BYTES = 2 << 20
"""A page of results is about 40 kB; what is longer is not read on."""

_REFUSALS = {202, 403, 418, 429}
"""How DuckDuckGo refuses: 202 with a puzzle in place of results is its usual way."""

_PUZZLE = re.compile(r"anomaly-modal|/anomaly\.js|challenge-form")
_REDIRECT = re.compile(r"(?:https?:)?//duckduckgo\.com/l/\?uddg=(.+?)(?:&rut=[0-9a-f]+)?")


class SearchError(LorikeetError):
    """The search failed; the answer can go on without it."""


class RefusedError(SearchError):
    """The service will not be asked for a while."""

    def __init__(self, message: str, *, retry_after_s: float | None = None) -> None:
        """Say so; `retry_after_s` is the service's own wish."""
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NothingFoundError(SearchError):
    """The service answered, with no results."""


class Provider(Protocol):
    """A search service."""

    name: str

    def search(self, query: str, *, limit: int = 10) -> list[Source]:
        """Return at least one and at most `limit` results. Raises SearchError."""
        ...


class DuckDuckGo:
    """DuckDuckGo's text search, by the engine of `ddgs`."""

    name = "DuckDuckGo"

    def __init__(self, *, timeout_s: float, proxy: str | None = None, verify: bool | str = True) -> None:
        """Search through `proxy`, if given; `verify` is False or a file of certificate authorities to trust instead."""
        self._timeout_s = timeout_s
        self._proxy = proxy
        self._verify = verify

    def search(self, query: str, *, limit: int = 10) -> list[Source]:
        """Return the results for `query`. Raises SearchError, saying whether it was refused, late or empty."""
        from lxml.etree import LxmlError  # type: ignore[import-untyped]  # ddgs brings it; it ships no types

        engine = _watched_engine()(proxy=self._proxy, timeout=max(1, math.ceil(self._timeout_s)), verify=self._verify)
        try:
            rows = engine.search(query) or []
        except (LxmlError, ValueError) as error:
            raise SearchError("DuckDuckGo's page cannot be read") from error
        sources = [Source(row.title, _direct(row.href), row.body) for row in rows]
        if not sources:
            raise NothingFoundError("DuckDuckGo found nothing")
        return sources[:limit]


@cache
def _watched_engine() -> Any:
    """Return ddgs's engine for DuckDuckGo with a request that says what the status was.

    The one of `ddgs` makes an empty page of a refusal, follows redirects anywhere and reads without a bound.
    """
    import primp
    from ddgs.engines.duckduckgo import Duckduckgo

    class Watched(Duckduckgo):  # type: ignore[misc]  # ddgs ships no types that can be followed
        def request(self, method: str, url: str, **options: Any) -> str:
            try:
                response = self.http_client.client.request(method, url, stream=True, follow_redirects=False, **options)
                page = _bounded(response.iter_bytes()).decode("utf-8", "replace")
            except primp.TimeoutError as error:
                raise SearchError("DuckDuckGo did not answer in time") from error
            except primp.PrimpError as error:
                raise SearchError("DuckDuckGo cannot be reached") from error
            status = response.status_code
            if status in _REFUSALS or _PUZZLE.search(page):
                raise RefusedError(
                    f"DuckDuckGo refused: too many searches from here (status {status})",
                    retry_after_s=_retry_after_s(response.headers.get("retry-after")),
                )
            if status != httpx.codes.OK:
                raise SearchError(f"DuckDuckGo answered with status {status} and no results")
            return page

    return Watched


def _direct(url: str) -> str:
    """Return where a result leads, without DuckDuckGo's own redirect in front of it."""
    found = _REDIRECT.fullmatch(url)
    return unquote(found.group(1)) if found else url


class SearXNG:
    """A SearXNG instance, by its JSON."""

    def __init__(self, url: str, *, timeout_s: float) -> None:
        """Ask the instance at `url`, such as `http://127.0.0.1:8888`. Raises InputError if that is no such address."""
        parts = _split(url)
        self.name = f"SearXNG at {parts.netloc.rpartition('@')[2]}"
        # An instance's limiter takes who sends none of these for a bot.
        headers = {"Accept": "application/json, text/html;q=0.5", "Accept-Language": "en", "User-Agent": "lorikeet"}
        self._url = url.rstrip("/").removesuffix("/search") + "/search"
        self._http = httpx.Client(
            headers=headers,
            timeout=timeout_s,
            follow_redirects=False,
            trust_env=parts.hostname not in {"127.0.0.1", "localhost", "::1"},
        )

    def search(self, query: str, *, limit: int = 10) -> list[Source]:
        """Return the results for `query`. Raises SearchError, saying what to do where the instance can be mended."""
        with self._failures(), self._http.stream("GET", self._url, params={"q": query, "format": "json"}) as response:
            self._check(response)
            answer = json.loads(_bounded(response.iter_bytes()))
        if not isinstance(answer, dict) or "error" in answer or not isinstance(answer.get("results"), list):
            raise SearchError(f"{self.name} answered with no results that can be read")
        rows = [row for row in answer["results"] if isinstance(row, dict)]
        sources = [Source(*(str(row.get(field) or "") for field in ("title", "url", "content"))) for row in rows]
        if not sources:
            silent = _silent_engines(answer.get("unresponsive_engines"))
            raise NothingFoundError(
                f"{self.name} found nothing" + (f"; its engines failed: {silent}" if silent else "")
            )
        return sources[:limit]

    def _check(self, response: httpx.Response) -> None:
        status = response.status_code
        if status == httpx.codes.FORBIDDEN:
            raise SearchError(
                f"{self.name} refused (403): add json to search.formats in its settings.yml, or let this machine in"
            )
        if status == httpx.codes.TOO_MANY_REQUESTS:
            raise RefusedError(
                f"{self.name} refused: too many searches (429)",
                retry_after_s=_retry_after_s(response.headers.get("retry-after")),
            )
        if response.is_redirect:
            raise SearchError(f"{self.name} sends elsewhere ({status}), which is not followed; give its final address")
        if status != httpx.codes.OK:
            raise SearchError(f"{self.name} answered with status {status} and no results")

    @contextmanager
    def _failures(self) -> Iterator[None]:
        """Turn the client's exceptions into SearchError."""
        try:
            yield
        except httpx.TimeoutException as error:
            raise SearchError(f"{self.name} did not answer in time") from error
        except httpx.HTTPError as error:
            raise SearchError(f"{self.name} cannot be reached") from error
        except (ValueError, RecursionError) as error:
            raise SearchError(f"{self.name} did not answer in JSON") from error


def _split(url: str) -> SplitResult:
    try:
        parts = urlsplit(url)
        known = parts.scheme in {"http", "https"} and parts.hostname and not parts.query and not parts.fragment
        parts.port  # noqa: B018  # raises for a port that is none
    except ValueError:
        known = False
    if not known:
        raise InputError(f"--search searxng:{url} is no address; give one such as searxng:http://127.0.0.1:8888")
    return parts


def _silent_engines(listed: Any) -> str:
    """Return which of an instance's engines did not answer, and why, such as `brave (too many requests)`."""
    pairs = [row for row in listed if isinstance(row, list) and len(row) == 2] if isinstance(listed, list) else []
    words = (f"{name} ({why})" for name, why in pairs[:5])
    return re.sub(r"[^\w .:()-]", "", ", ".join(str(word)[:60] for word in words).replace(",", " -"))


def _bounded(pieces: Iterable[bytes]) -> bytes:
    """Return the body that comes in `pieces`. Raises SearchError beyond MAX_RESPONSE_BYTES."""
    body = b""
    for piece in pieces:
        body += piece
        if len(body) > MAX_RESPONSE_BYTES:
            raise SearchError(
                f"the search service sent more than {MAX_RESPONSE_BYTES >> 20} MiB; nothing of it is used"
            )
    return body


def _retry_after_s(header: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, by its number or date (RFC 9110, 10.2.3); None if none."""
    if not header:
        return None
    if header.strip().isdecimal():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except (TypeError, ValueError):
        return None


def load_provider(name: str, *, deadline_s: float) -> Provider | None:
    """Return the provider `ddg` or `searxng:URL`, or None for `off`. Raises InputError for another name."""
    if name == "off":
        return None
    if name.startswith("searxng:"):
        return SearXNG(name.removeprefix("searxng:"), timeout_s=deadline_s)
    if name != "ddg":
        raise InputError(f"--search {name} is not known; there are: ddg, searxng:URL, off")
    from importlib.util import find_spec

    if find_spec("ddgs") is None:
        raise MissingExtraError("ddgs", "serve")
    return DuckDuckGo(timeout_s=deadline_s)
