"""A public server: each visitor's share, who a visitor is, and what starts only when it is asked for."""

from __future__ import annotations

import gc
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import httpx
import openai
import pytest
import uvicorn
from websockets.exceptions import InvalidStatus
from websockets.sync.client import connect

from lorikeet.config import ServeConfig
from lorikeet.errors import InputError
from lorikeet.serve.assistant import Assistant
from lorikeet.serve.http import create_app
from lorikeet.serve.launch import check_exposure
from lorikeet.serve.limits import BUSY_RETRY_S, LIMITS, Limit, Limits, TooManyError, kind_of_request, network_of
from lorikeet.serve.server import Listener, server_settings
from tests.serve.fakes import CountingEars, ScriptedEngine, ToneVoice, serving

HI: Any = [{"role": "user", "content": "Hi"}]
SMALL = {kind: Limit(per_minute=60, burst=3, at_once=2) for kind in LIMITS}


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


def asks(limits: Limits, address: str = "192.0.2.1", times: int = 1) -> int:
    """Ask and be answered at once, so often; return how often that was too much."""
    refused = 0
    for _ in range(times):
        try:
            with limits.enter(address, "answers"):
                pass
        except TooManyError:
            refused += 1
    return refused


def test_a_bucket_holds_a_burst_and_is_filled_again_at_its_rate() -> None:
    clock = Clock()
    limits = Limits(SMALL, now_s=clock)
    assert asks(limits, times=5) == 2
    clock.now_s += 0.99
    with pytest.raises(TooManyError, match="60 answers a minute") as refused, limits.enter("192.0.2.1", "answers"):
        pass
    assert refused.value.retry_after_s == 1
    clock.now_s += 0.01
    assert asks(limits, times=2) == 1
    clock.now_s += 3600
    assert asks(limits, times=5) == 2  # an hour's rest fills it, and no more than that


def test_who_was_refused_waits_no_longer_for_it() -> None:
    clock = Clock()
    limits = Limits({**SMALL, "answers": Limit(per_minute=6, burst=1, at_once=1)}, now_s=clock)
    assert asks(limits, times=100) == 99
    with pytest.raises(TooManyError) as refused, limits.enter("192.0.2.1", "answers"):
        pass
    assert refused.value.retry_after_s == 10
    clock.now_s += 10
    assert asks(limits) == 0


def test_visitors_and_kinds_have_shares_of_their_own() -> None:
    limits = Limits(SMALL, now_s=Clock())
    assert asks(limits, "192.0.2.1", 4) == 1
    assert asks(limits, "192.0.2.2", 3) == 0
    with limits.enter("192.0.2.1", "sound files"):
        pass


def test_so_many_are_under_way_at_once_also_after_a_failure() -> None:
    clock = Clock()
    limits = Limits(SMALL, now_s=clock)
    with ExitStack() as stack:
        stack.enter_context(limits.enter("192.0.2.1", "answers"))
        stack.enter_context(limits.enter("192.0.2.1", "answers"))
        with pytest.raises(TooManyError, match="2 answers of yours") as refused:
            stack.enter_context(limits.enter("192.0.2.1", "answers"))
        assert refused.value.retry_after_s == BUSY_RETRY_S
    clock.now_s += 60
    for _ in range(3):
        with pytest.raises(ZeroDivisionError), limits.enter("192.0.2.1", "answers"):
            raise ZeroDivisionError
    clock.now_s += 60
    assert asks(limits) == 0


def test_the_table_is_bounded_and_forgets_nobody_who_waits() -> None:
    limits = Limits(SMALL, most_visitors=100, now_s=Clock())
    with limits.enter("192.0.2.1", "answers"), limits.enter("192.0.2.1", "answers"):
        for number in range(5000):
            assert asks(limits, f"198.51.{number // 256}.{number % 256}") == 0
        assert len(limits) == 100
        with pytest.raises(TooManyError, match="under way"), limits.enter("192.0.2.1", "answers"):
            pass


@pytest.mark.parametrize(
    ("address", "name"),
    [
        ("192.0.2.1", "192.0.2.1"),
        ("::ffff:192.0.2.1", "192.0.2.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::"),
        ("2001:db8:1:2::ffff", "2001:db8:1:2::"),
        ("fe80::1%eth0", "fe80::"),
        ("", "unknown"),
        ("_hidden", "unknown"),
        ("192.0.2.1, 192.0.2.2", "unknown"),
        ("x" * 10_000, "unknown"),
    ],
)
def test_who_an_address_stands_for(address: str, name: str) -> None:
    assert network_of(address) == name


def test_every_route_has_a_share() -> None:
    app = create_app(serving(Assistant(ScriptedEngine())), ears=CountingEars(), voice=ToneVoice(), page=False)
    kinds = {
        (method, path): kind_of_request(method, path)
        for route in app.routes
        for path in [getattr(route, "path", "")]
        for method in getattr(route, "methods", None) or ["WEBSOCKET"]
    }
    assert {key for key, kind in kinds.items() if kind is None} == {("GET", "/health"), ("HEAD", "/health")}
    assert kinds["POST", "/v1/chat/completions"] == "answers"
    assert kinds["POST", "/v1/audio/speech"] == kinds["POST", "/v1/audio/transcriptions"] == "sound files"
    assert kinds["WEBSOCKET", "/v1/realtime"] == "spoken sessions"
    assert kinds["GET", "/v1/models"] == "requests"
    assert (
        kind_of_request("POST", "/gradio_api/queue/join") == kind_of_request("POST", "/gradio_api/call/x") == "answers"
    )
    assert kind_of_request("POST", "/gradio_api/upload") == "sound files"


@contextmanager
def public(*, proxy: str = "", limits: Limits | None = None, delay_s: float = 0.0, page: bool = False) -> Iterator[str]:
    """Serve with the settings of the command, and give the URL."""
    engine = ScriptedEngine(*["word "] * 5, delay_s=delay_s)
    app = create_app(
        serving(Assistant(engine)),
        ears=CountingEars(),
        voice=ToneVoice(),
        hosts=None,
        page=page,
        limits=limits or Limits(SMALL),
    )
    with Listener("127.0.0.1", 0) as listener:
        listener.stop_waiting()
        server = uvicorn.Server(server_settings(app, proxy=proxy))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener.socket]}, daemon=True)
        thread.start()
        while not server.started:
            time.sleep(0.01)
        try:
            yield listener.url
        finally:
            server.should_exit = True
            thread.join(10)
            assert not thread.is_alive()


def chat(url: str, forwarded: str | None = None) -> httpx.Response:
    headers = {} if forwarded is None else {"X-Forwarded-For": forwarded}
    return httpx.post(f"{url}/v1/chat/completions", json={"messages": HI}, headers=headers, timeout=20)


def frozen() -> Limits:
    """Limits that no passing time relaxes."""
    return Limits(SMALL, now_s=Clock())


def test_more_than_a_share_is_429_in_openais_terms() -> None:
    with public(limits=frozen()) as url:
        assert [chat(url).status_code for _ in range(4)] == [200, 200, 200, 429]
        refused = chat(url)
        assert refused.headers["retry-after"] == "1"
        assert refused.headers["x-content-type-options"] == "nosniff"
        assert refused.json()["error"] == {
            "message": "that is more than 60 answers a minute, the most for one visitor; try again in 1 s",
            "type": "requests",
            "param": None,
            "code": "rate_limit_exceeded",
        }
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=0)
        with pytest.raises(openai.RateLimitError, match="a minute"):
            client.chat.completions.create(model="parrot", messages=HI)
        assert [httpx.get(f"{url}/v1/models").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert {httpx.get(f"{url}/health").status_code for _ in range(20)} == {200}


def test_openais_client_comes_back_when_it_was_told_to() -> None:
    with public() as url:
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="any", max_retries=2)
        for _ in range(4):
            assert client.chat.completions.create(model="parrot", messages=HI).choices


def test_answers_at_once_are_bounded_until_they_end() -> None:
    with public(delay_s=0.1) as url:
        codes: list[int] = []
        threads = [threading.Thread(target=lambda: codes.append(chat(url).status_code)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(codes) == [200, 200, 429]
        assert chat(url).status_code == 200


def test_sound_and_spoken_sessions_are_limited_too() -> None:
    with public(limits=frozen()) as url:
        speech = [httpx.post(f"{url}/v1/audio/speech", json={"input": "One."}).status_code for _ in range(4)]
        assert speech == [200, 200, 200, 429]
        address = f"ws{url[4:]}/v1/realtime"
        with connect(address), connect(address), pytest.raises(InvalidStatus) as refused, connect(address):
            pass
        assert refused.value.response.status_code == 429
        assert refused.value.response.headers["Retry-After"] == str(BUSY_RETRY_S)


# Gradio leaves event loops and sockets open when an app is let go; they are collected here, and not in another test.
@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_the_pages_own_routes_are_limited() -> None:
    with public(limits=frozen(), page=True) as url:
        body = {"data": [], "fn_index": 0, "session_hash": "abc"}
        joined = [httpx.post(f"{url}/gradio_api/queue/join", json=body).status_code for _ in range(5)]
        assert joined[3:] == [429, 429]
        assert 429 not in joined[:3]
        files = {"files": ("a.wav", b"x")}
        uploaded = [httpx.post(f"{url}/gradio_api/upload", files=files).status_code for _ in range(4)]
        assert uploaded == [200, 200, 200, 429]
    gc.collect()


def test_a_forwarded_address_is_believed_from_the_proxy_alone() -> None:
    with public(limits=frozen()) as url:  # no proxy is named: whatever a visitor writes, it is one visitor
        assert [chat(url, f"203.0.113.{n}").status_code for n in range(4)] == [200, 200, 200, 429]
    with public(limits=frozen(), proxy="10.0.0.0/8") as url:  # nor is one that is not the named one
        assert [chat(url, f"203.0.113.{n}").status_code for n in range(4)] == [200, 200, 200, 429]


def test_behind_the_proxy_each_address_is_a_visitor_and_invented_ones_change_nothing() -> None:
    with public(limits=frozen(), proxy="127.0.0.0/8") as url:
        assert [chat(url, "203.0.113.1").status_code for _ in range(4)] == [200, 200, 200, 429]
        assert chat(url, "203.0.113.2").status_code == 200
        # What the visitor wrote itself stands before what the proxy adds.
        assert [chat(url, f"198.51.100.{n}, 203.0.113.1").status_code for n in range(3)] == [429] * 3
        assert chat(url, "203.0.113.1, 127.0.0.9").status_code == 429  # two proxies in a row


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"host": "0.0.0.0"}, "--public"),
        ({"host": "0.0.0.0", "public": True, "memory": "memory.db"}, "--memory would keep strangers' conversations"),
        ({"public": True, "memory": "memory.db"}, "--memory"),
        ({"proxy": "127.0.0.1"}, "--proxy 127.0.0.1 lets other machines in"),
        ({"proxy": "127.0.0.1", "memory": "memory.db"}, "--proxy 127.0.0.1 lets other machines in"),
        ({"proxy": "127.0.0.1", "public": True, "memory": "memory.db"}, "--memory would keep strangers' conversations"),
        ({"proxy": "0.0.0.0/0", "api_key": "k"}, "believe everybody"),
        ({"proxy": "::/0", "api_key": "k"}, "believe everybody"),
        ({"proxy": "*", "public": True}, "no address or network"),
        ({"proxy": "proxy.example", "public": True}, "no address or network"),
    ],
)
def test_what_would_expose_more_than_was_asked_for_does_not_start(settings: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_exposure(ServeConfig(**settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"host": "0.0.0.0", "public": True},
        {"host": "0.0.0.0", "public": True, "proxy": "10.0.0.0/8"},
        {"host": "0.0.0.0", "public": True, "api_key": "k", "memory": "memory.db"},
        {"memory": "memory.db"},
        {"proxy": "127.0.0.1", "api_key": "k"},
    ],
)
def test_what_was_asked_for_starts(settings: Any) -> None:
    check_exposure(ServeConfig(**settings))
