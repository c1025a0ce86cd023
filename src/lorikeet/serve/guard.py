"""Who may ask: hosts, origins, the key and its cookie, and how much; an ASGI layer around the whole application.

    app.add_middleware(Guard, api_key="...", hosts=LOOPBACK_HOSTS)

- A request must name this machine in its Host header when only this machine is served: a page whose name was
  made to point here (DNS rebinding) does not.
- A browser's request from another page is refused, so no site can use the assistant behind the user's back.
- With a key, everything but `/health` asks for it: as a bearer token, or through the login form that trades it for
  a cookie, which is what the page's own requests carry.
- No body is read beyond its route's limit.
- On a public server, a visitor who asks for more than `limits` allow is told when to come back.

It knows no route's meaning but `/health` and `/login`.
"""

from __future__ import annotations

import hashlib
import hmac
import html
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection, Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lorikeet.serve.limits import Limits, TooManyError, kind_of_request

LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "::1")
JSON_LIMIT_BYTES = 1 << 20
AUDIO_LIMIT_BYTES = 25 << 20
AUDIO_PATHS = ("/v1/audio/transcriptions", "/v1/audio/translations", "/gradio_api/upload")
ENVELOPE_BYTES = 64 << 10
"""What multipart puts around a file."""

COOKIE = "lorikeet_session"
COOKIE_AGE_S = 30 * 24 * 3600

SECURITY_HEADERS = {
    "X-Content-Type-Options": "nosniff",
    # Not no-referrer: with it a browser sends the login form with `Origin: null`.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # The page needs inline scripts and styles; nothing may come from, or go to, another host.
    "Content-Security-Policy": (
        "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
        "img-src 'self' data: blob:; media-src 'self' data: blob:; font-src 'self' data:; "
        "connect-src 'self' data: blob:; worker-src 'self' blob:; object-src 'none'; base-uri 'self'; "
        "form-action 'self'; frame-ancestors 'none'"
    ),
}


def error_body(
    message: str, *, kind: str = "invalid_request_error", param: str | None = None, code: str | None = None
) -> Any:
    """Return an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


FETCHING = re.compile(r"(?:/gradio_api)?/(?:proxy=|file=[a-z][a-z0-9+.-]+:)", re.IGNORECASE)
"""Paths by which Gradio fetches an address for whoever asks, and follows its redirects."""


class Guard:
    """The layer that refuses what is not for this server."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        api_key: str | None = None,
        hosts: Sequence[str] | None = LOOPBACK_HOSTS,
        limits: Limits | None = None,
    ) -> None:
        """Wrap `app`. `hosts` are the names that a request may give this server; None for any. None of `limits` is no limit."""
        self._app = app
        self._hosts = hosts
        self._limits = limits
        self._key = api_key.encode() if api_key else None
        # The cookie outlives a restart, ends with the key, and does not give the key away.
        self._session = _derive_session(self._key) if self._key else ""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer in the application's place what it must not see; pass on the rest, limited, with headers added."""
        if scope["type"] == "lifespan":
            return await self._app(scope, receive, send)
        try:
            with self._visit(scope):
                await self._serve(scope, receive, send)
        except TooManyError as error:
            await _answer(_too_many(error), scope, receive, send)

    def _visit(self, scope: Scope) -> AbstractContextManager[None]:
        """Return the block in which a request counts as its visitor's, who may be anybody: keys come after it."""
        kind = kind_of_request(scope.get("method", "WEBSOCKET"), scope["path"])
        if self._limits is None or kind is None:
            return nullcontext()
        return self._limits.enter(scope["client"][0] if scope.get("client") else "", kind)

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = HTTPConnection(scope)
        refusal = self._refusal(request)
        if refusal is None and self._key and scope["type"] == "http" and request.url.path == "/login":
            refusal = await self._login(Request(scope, _limited(receive, ENVELOPE_BYTES)))
        if refusal is None:
            limit = AUDIO_LIMIT_BYTES + ENVELOPE_BYTES if request.url.path in AUDIO_PATHS else JSON_LIMIT_BYTES
            if int(request.headers.get("content-length") or 0) > limit:
                refusal = _too_large(limit)
            else:
                return await self._app(scope, _limited(receive, limit), _with_headers(send))
        return await _answer(refusal, scope, receive, send)

    def _refusal(self, request: HTTPConnection) -> Response | None:
        """Return the answer to a request that may not pass, None for one that may."""
        headers = request.headers
        host = headers.get("host", "")
        if self._hosts is not None and _hostname(host) not in self._hosts:
            return _forbidden(f"this server is not {host[:100]!r}; reach it as http://127.0.0.1 with its port")
        if FETCHING.match(request.scope["path"]):
            return _forbidden("a file must be uploaded; its address is not followed")
        if _is_foreign(request):
            return _forbidden("requests from other sites' pages are refused")
        if not headers.get("content-length", "0").isdecimal():
            return JSONResponse(error_body("the header Content-Length is not a number"), status_code=400)
        if self._key is None or request.url.path in {"/health", "/login"} or self._knows(request):
            return None
        if "text/html" in headers.get("accept", ""):
            return _login_page("")
        message = "the API key is wrong" if "authorization" in headers else "this server asks for an API key"
        body = error_body(f"{message}; send it in the header Authorization: Bearer KEY", code="invalid_api_key")
        return JSONResponse(body, status_code=401, headers={"WWW-Authenticate": "Bearer"})

    def _knows(self, request: HTTPConnection) -> bool:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        # Starlette decodes headers as latin-1; the bytes are the client's, UTF-8 by custom.
        if scheme.lower() == "bearer" and self._is_key(token.strip().encode("latin-1")):
            return True
        return hmac.compare_digest(request.cookies.get(COOKIE, "").encode(), self._session.encode())

    def _is_key(self, candidate: bytes) -> bool:
        """Compare with the key in constant time."""
        return self._key is not None and hmac.compare_digest(candidate, self._key)

    async def _login(self, request: Request) -> Response:
        """Trade the key of the form for the cookie."""
        if request.method != "POST":
            return _login_page("", status=200)
        try:
            async with request.form(max_files=0, max_fields=4) as form:
                key = form.get("key")
        except HTTPException as error:
            return JSONResponse(error_body(error.detail), status_code=error.status_code)
        except UnicodeError:  # Python has codecs, `undefined` among them, that raise more than its decode errors
            return JSONResponse(error_body("the form's charset cannot be read"), status_code=400)
        # A form may name a charset that makes halves of characters, which UTF-8 has not.
        if not isinstance(key, str) or not self._is_key(key.strip().encode("utf-8", "surrogatepass")):
            return _login_page("That key is not right.")
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(
            COOKIE,
            self._session,
            max_age=COOKIE_AGE_S,
            httponly=True,
            samesite="strict",
            secure=_is_encrypted(request),
        )
        return response


async def _answer(refusal: Response, scope: Scope, receive: Receive, send: Send) -> None:
    """Answer in the application's place; a WebSocket's handshake too, where the server can."""
    if scope["type"] == "websocket" and "websocket.http.response" not in scope.get("extensions", {}):
        return await send({"type": "websocket.close", "code": 1008})
    return await refusal(scope, receive, _with_headers(send))


def _is_encrypted(request: HTTPConnection) -> bool:
    """Say whether the browser came by https, here or as far as a proxy, whose word can only make a cookie stricter."""
    forwarded = request.headers.get("x-forwarded-proto", "").partition(",")[0].strip().lower()
    return request.url.scheme == "https" or forwarded == "https"


def _derive_session(key: bytes) -> str:
    return hashlib.scrypt(key, salt=b"lorikeet session", n=1 << 14, r=8, p=1).hex()


def _hostname(host: str) -> str:
    """Return the name in a Host header, without its port; '' if it is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _is_foreign(request: HTTPConnection) -> bool:
    """Say whether a browser sent this for another site's page; following a link to here is no such request."""
    origin = request.headers.get("origin")
    if origin is not None:
        return _site(origin) != _without_default_port(request.headers.get("host", ""))
    cross_site = request.headers.get("sec-fetch-site") == "cross-site"
    return cross_site and request.headers.get("sec-fetch-mode") != "navigate"


def _site(origin: str) -> str | None:
    """Return host and port of an Origin header as a Host header writes them; None for one that names no site."""
    try:
        parts = urlsplit(origin)
    except ValueError:
        return None
    if parts.scheme not in {"http", "https"} or not parts.netloc:
        return None
    return _without_default_port(parts.netloc)


def _without_default_port(host: str) -> str:
    return host.lower().removesuffix(":80").removesuffix(":443")


def _limited(receive: Receive, limit: int) -> Receive:
    """Return a `receive` that raises 413 once a body, whatever its header says, grows beyond `limit` bytes."""
    total = 0

    async def receive_limited() -> Message:
        nonlocal total
        message = await receive()
        if message["type"] == "http.request":
            total += len(message.get("body", b""))
            if total > limit:
                raise HTTPException(413, _too_large_text(limit))
        return message

    return receive_limited


def _with_headers(send: Send) -> Send:
    """Return a `send` that adds the security headers."""

    async def send_with_headers(message: Message) -> None:
        if message["type"] in {"http.response.start", "websocket.http.response.start"}:
            headers = MutableHeaders(scope=message)
            for name, value in SECURITY_HEADERS.items():
                headers[name] = value
            if message["status"] == 413:
                headers["Connection"] = "close"  # or the server would go on reading what it has refused
        await send(message)

    return send_with_headers


def _forbidden(message: str) -> Response:
    return JSONResponse(error_body(message, code="forbidden"), status_code=403)


def _too_many(error: TooManyError) -> Response:
    body = error_body(str(error), kind="requests", code="rate_limit_exceeded")
    return JSONResponse(body, status_code=429, headers={"Retry-After": str(error.retry_after_s)})


def _too_large(limit: int) -> Response:
    body = error_body(_too_large_text(limit), code="too_large")
    return JSONResponse(body, status_code=413)


def _too_large_text(limit: int) -> str:
    return f"the request is too large; at most {limit >> 20} MiB are taken here"


def _login_page(message: str, *, status: int = 401) -> Response:
    return HTMLResponse(_LOGIN.replace("{message}", html.escape(message)), status_code=status)


_LOGIN = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Lorikeet</title><style>
:root { color-scheme: light dark; --ground: #f6f7f3; --card: #fff; --ink: #17251e; --soft: #5a6b62; --line: #dde3dc;
  --green: #14663f; --red: #b3361e }
@media (prefers-color-scheme: dark) { :root { --ground: #0f1613; --card: #17211c; --ink: #e6eee8; --soft: #97a89e;
  --line: #2a3831; --green: #2f9d68; --red: #f0805f } }
body { margin: 0; min-height: 100vh; display: grid; place-items: center; background: var(--ground); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif }
form { width: min(22rem, calc(100vw - 3rem)); padding: 2rem; box-sizing: border-box; background: var(--card);
  border: 1px solid var(--line); border-radius: 16px }
h1 { margin: 0 0 .25rem; font-size: 1.35rem } p { margin: 0 0 1.25rem; color: var(--soft) }
input, button { width: 100%; box-sizing: border-box; padding: .7rem .9rem; border-radius: 10px; font: inherit }
input { border: 1px solid var(--line); background: var(--ground); color: inherit }
button { margin-top: .75rem; border: 0; background: var(--green); color: #fff; font-weight: 600; cursor: pointer }
.wrong { min-height: 1.5rem; margin: .5rem 0 0; color: var(--red) }
</style></head><body><form method="post" action="/login"><h1>Lorikeet</h1>
<p>This assistant asks for its key, once.</p>
<input name="key" type="password" aria-label="Key" placeholder="Key" autocomplete="current-password" autofocus required>
<button>Open</button><p class="wrong" role="alert">{message}</p></form></body></html>
"""
