"""Who may ask: keys, cookies, hosts, other sites' pages, and bodies that are too large."""

from __future__ import annotations

import http.client
from collections.abc import Iterator
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from lorikeet.serve.assistant import Assistant
from lorikeet.serve.guard import AUDIO_LIMIT_BYTES, COOKIE
from lorikeet.serve.http import create_app
from tests.serve.fakes import API_KEY, CountingEars, ScriptedEngine, served, serving

ROUTES = [
    ("GET", "/v1/models"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/audio/speech"),
    ("GET", "/v1/x"),
    ("GET", "/"),
]


@pytest.fixture(scope="module")
def locked() -> Iterator[str]:
    app = create_app(serving(Assistant(ScriptedEngine()), "parrot"), ears=CountingEars(), api_key=API_KEY, page=False)
    with served(app) as url:
        yield url


@pytest.fixture(scope="module")
def open_() -> Iterator[str]:
    app = create_app(serving(Assistant(ScriptedEngine()), "parrot"), ears=CountingEars(), page=False)
    with served(app) as url:
        yield url


def bearer(key: str) -> dict[str, bytes]:
    return {"Authorization": f"Bearer {key}".encode()}


@pytest.mark.parametrize(("method", "path"), ROUTES)
def test_everything_but_health_asks_for_the_key(locked: str, method: str, path: str) -> None:
    for headers in (
        {},
        bearer("wrong"),
        {"Authorization": b"Bearer"},
        bearer(API_KEY + "x"),
        {"Authorization": API_KEY.encode()},
    ):
        response = httpx.request(method, locked + path, headers=headers)
        assert response.status_code == 401, headers
        assert response.json()["error"]["code"] == "invalid_api_key"
    assert httpx.request(method, locked + path, headers=bearer(API_KEY)).status_code != 401
    assert httpx.get(f"{locked}/health").status_code == 200


def test_openais_client_is_told_in_its_own_terms(locked: str) -> None:
    with pytest.raises(openai.AuthenticationError):
        openai.OpenAI(base_url=f"{locked}/v1", api_key="wrong", max_retries=0).models.list()


def test_the_form_trades_the_key_for_a_cookie(locked: str) -> None:
    with httpx.Client(base_url=locked, headers={"Accept": "text/html"}) as browser:
        asked = browser.get("/")
        assert asked.status_code == 401
        assert 'action="/login"' in asked.text
        wrong = browser.post("/login", data={"key": "<b>wrong"})
        assert (wrong.status_code, COOKIE in browser.cookies) == (401, False)
        right = browser.post("/login", data={"key": API_KEY}, headers={"Origin": locked})
        assert (right.status_code, right.headers["location"]) == (303, "/")
        cookie = right.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=strict" in cookie
        assert API_KEY not in cookie
        assert browser.get("/v1/models").status_code == 200
        browser.cookies.set(COOKIE, "0" * 128)
    assert httpx.get(f"{locked}/v1/models", cookies={COOKIE: ""}).status_code == 401
    assert httpx.get(f"{locked}/v1/models", cookies={COOKIE: "0" * 128}).status_code == 401


def test_a_huge_login_is_refused(locked: str) -> None:
    response = httpx.post(f"{locked}/login", data={"key": "x" * 200_000})
    assert response.status_code in {400, 413}


@pytest.mark.parametrize("host", ["evil.example", "evil.example:7860", "127.0.0.1.evil.example", "169.254.169.254", ""])
def test_a_name_that_was_made_to_point_here_is_refused(open_: str, host: str) -> None:
    response = httpx.get(f"{open_}/v1/models", headers={"Host": host})
    assert response.status_code == 403
    assert "error" in response.json()


def test_this_machines_names_pass(open_: str) -> None:
    port = urlsplit(open_).port
    for host in ("localhost", f"localhost:{port}", f"127.0.0.1:{port}", f"[::1]:{port}", "LOCALHOST"):
        assert httpx.get(f"{open_}/v1/models", headers={"Host": host}).status_code == 200, host


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "http://localhost", "file://"]
)
def test_other_sites_pages_are_refused(open_: str, origin: str) -> None:
    body = {"messages": [{"role": "user", "content": "Hi"}]}
    for method in ("POST", "OPTIONS", "GET"):
        response = httpx.request(method, f"{open_}/v1/chat/completions", json=body, headers={"Origin": origin})
        assert response.status_code == 403
        assert "access-control-allow-origin" not in response.headers
    own = httpx.post(f"{open_}/v1/chat/completions", json=body, headers={"Origin": open_})
    assert own.status_code == 200


def test_a_form_of_another_site_is_no_request(open_: str) -> None:
    crossed = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}
    assert httpx.get(f"{open_}/v1/models", headers=crossed).status_code == 403
    assert httpx.get(f"{open_}/v1/models", headers={**crossed, "Sec-Fetch-Mode": "navigate"}).status_code == 200
    text = httpx.post(
        f"{open_}/v1/chat/completions", content='{"messages": []}', headers={"Content-Type": "text/plain"}
    )
    assert text.status_code == 400


def test_every_answer_has_the_security_headers(locked: str, open_: str) -> None:
    for response in (httpx.get(f"{locked}/"), httpx.get(f"{open_}/health"), httpx.get(open_, headers={"Host": "x"})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert "frame-ancestors 'none'" in response.headers["content-security-policy"]
        assert response.headers["referrer-policy"] == "same-origin"


def test_a_body_beyond_the_limit_is_413(open_: str) -> None:
    big = '{"messages": [{"role": "user", "content": "' + "x" * (1 << 20) + '"}]}'
    headers = {"Content-Type": "application/json"}
    response = httpx.post(f"{open_}/v1/chat/completions", content=big, headers=headers)
    assert response.status_code == 413
    assert response.json()["error"]["message"] == "the request is too large; at most 1 MiB are taken here"
    # Without a Content-Length, in pieces: counted as they come.
    pieces = (big[at : at + 65_536].encode() for at in range(0, len(big), 65_536))
    assert httpx.post(f"{open_}/v1/chat/completions", content=pieces, headers=headers).status_code == 413


def test_sound_has_a_larger_limit(open_: str) -> None:
    route = f"{open_}/v1/audio/transcriptions"
    assert httpx.post(route, files={"file": ("a.wav", b"x" * (2 << 20))}).status_code == 400  # read, and no sound
    assert httpx.post(route, files={"file": ("a.wav", b"x" * (AUDIO_LIMIT_BYTES + 1))}, timeout=30).status_code == 413


def test_a_length_that_is_no_number_is_refused(open_: str) -> None:
    parts = urlsplit(open_)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("Content-Length", "-5")
    connection.endheaders()
    assert connection.getresponse().status == 400
    connection.close()


def test_a_form_that_spells_half_a_character_is_a_wrong_key(locked: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="key"\r\n\r\n\\ud800\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=unicode_escape"}
    assert httpx.post(f"{locked}/login", content=body, headers=headers).status_code == 401
    body = body.replace(b'"key"', b'"prompt"').replace(
        b"--x--", b'--x\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\nx\r\n--x--'
    )
    answer = httpx.post(f"{locked}/v1/audio/transcriptions", content=body, headers=headers | bearer(API_KEY))
    assert answer.status_code == 400


def test_a_form_in_a_charset_that_only_raises_is_refused(locked: str) -> None:
    body = b'--x\r\nContent-Disposition: form-data; name="key"\r\n\r\nkey\r\n--x--\r\n'
    headers = {"Content-Type": "multipart/form-data; boundary=x; charset=undefined"}
    assert httpx.post(f"{locked}/login", content=body, headers=headers).status_code == 400
    answer = httpx.post(f"{locked}/v1/audio/transcriptions", content=body, headers=headers | bearer(API_KEY))
    assert answer.status_code == 400
