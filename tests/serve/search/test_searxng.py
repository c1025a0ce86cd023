"""SearXNG by its JSON, against a stand-in that answers as an instance does."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from lorikeet.errors import InputError
from lorikeet.messages import Source
from lorikeet.serve.search.provider import NothingFoundError, RefusedError, SearchError, SearXNG, load_provider
from lorikeet.serve.search.service import load_search

ROW = {
    "url": "https://harbour.example/tides", "title": "Tides", "content": "High water at 06:12.", "engine": "brave",
    "engines": ["brave"], "positions": [1], "score": 1.0, "category": "general", "template": "default.html",
}  # fmt: skip


class Instance:
    """What the instance answers next, and what it was asked."""

    def __init__(self) -> None:
        self.status = 200
        self.headers: dict[str, str] = {}
        self.body = b""
        self.asked: list[dict[str, list[str]]] = []
        self.heads: list[dict[str, str]] = []

    def results(self, *rows: dict[str, Any], silent: list[list[str]] | None = None) -> None:
        """Answer with these rows in the frame that SearXNG puts around them."""
        answer = {
            "query": "q", "number_of_results": 0, "results": list(rows), "answers": [], "corrections": [],
            "infoboxes": [], "suggestions": [], "unresponsive_engines": silent or [],
        }  # fmt: skip
        self.body = json.dumps(answer).encode()


@contextmanager
def serve_searxng(instance: Instance) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            if parts.path != "/search":
                self.send_error(404)
                return
            instance.asked.append(parse_qs(parts.query))
            instance.heads.append(dict(self.headers))
            self.send_response(instance.status)
            for name, value in instance.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(instance.body)))
            self.end_headers()
            with suppress(OSError):
                self.wfile.write(instance.body)

        def log_message(self, format: str, *args: Any) -> None:  # noqa: A002  # the name is http.server's
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


@pytest.fixture
def instance() -> Instance:
    return Instance()


@pytest.fixture
def search(instance: Instance) -> Iterator[SearXNG]:
    with serve_searxng(instance) as url:
        yield SearXNG(url, timeout_s=2)


def test_results_become_sources(search: SearXNG, instance: Instance) -> None:
    instance.results(ROW, {**ROW, "content": None}, {"url": "https://b.example"}, silent=[["google", "CAPTCHA"]])
    found = search.search("high water & tides?")
    assert found[:2] == [
        Source("Tides", ROW["url"], "High water at 06:12."),  # type: ignore[arg-type]
        Source("Tides", ROW["url"], ""),  # type: ignore[arg-type]
    ]
    assert found[2] == Source("", "https://b.example", "")
    assert instance.asked == [{"q": ["high water & tides?"], "format": ["json"]}]
    # Its limiter takes who sends none of these for a bot.
    assert "text/html" in instance.heads[0]["Accept"] and instance.heads[0]["Accept-Language"]


def test_json_that_is_switched_off_is_said(search: SearXNG, instance: Instance) -> None:
    instance.status = 403
    with pytest.raises(SearchError, match=r"add json to search\.formats in its settings\.yml"):
        search.search("tides")


def test_a_limit_is_a_refusal_with_its_wish(search: SearXNG, instance: Instance) -> None:
    instance.status, instance.headers = 429, {"Retry-After": "75"}
    with pytest.raises(RefusedError, match="too many searches") as caught:
        search.search("tides")
    assert caught.value.retry_after_s == 75


def test_an_empty_sweep_says_whose_engines_failed(search: SearXNG, instance: Instance) -> None:
    instance.results(silent=[["brave", "Suspended: too many requests"], ["google<b>", "CAPTCHA"]])
    with pytest.raises(NothingFoundError, match=r"found nothing; its engines failed: brave \(Suspended: too many"):
        search.search("tides")
    instance.results()
    with pytest.raises(NothingFoundError, match=r"found nothing$"):
        search.search("tides")


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"<html>", "did not answer in JSON"),
        (b'{"error": "No query"}', "no results that can be read"),
        (b"[1]", "no results that can be read"),
        (b"[" * 100_000, "did not answer in JSON"),
        (b" " * (3 << 20), "more than 2 MiB"),
    ],
)
def test_what_is_no_answer_is_said(search: SearXNG, instance: Instance, body: bytes, said: str) -> None:
    instance.body = body
    with pytest.raises(SearchError, match=said):
        search.search("tides")


def test_redirects_are_not_followed(search: SearXNG, instance: Instance) -> None:
    other = Instance()
    other.results(ROW)
    with serve_searxng(other) as elsewhere:
        instance.status, instance.headers = 302, {"Location": f"{elsewhere}/search?q=x&format=json"}
        with pytest.raises(SearchError, match="not followed"):
            search.search("tides")
    assert other.asked == []


def test_nobody_there_is_said() -> None:
    with pytest.raises(SearchError, match=r"SearXNG at 127\.0\.0\.1:9 cannot be reached"):
        SearXNG("http://127.0.0.1:9", timeout_s=1).search("tides")


@pytest.mark.parametrize(
    "url", ["", "example", "ftp://a.example", "http://", "http://a.example:x", "file:///etc/passwd"]
)
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(InputError, match="is no address"):
        load_provider(f"searxng:{url}", deadline_s=1)


def test_a_deadline_must_leave_time() -> None:
    with pytest.raises(InputError, match="leaves no time"):
        load_search("off", deadline_s=0)
