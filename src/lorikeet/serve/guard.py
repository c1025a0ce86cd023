"""What stands before every route: who may ask, from where, how much, and the headers of every answer.

It is plain ASGI, so it covers the API, the page and its sockets alike.

- Key: where one is set, everything but `/health` and `/login` needs it, as a bearer token or as the page's cookie.
- Host: on loopback only loopback names are answered, so that a name rebound to 127.0.0.1 reaches nothing.
- Origin: a browser's request from another site is refused.
- Size: a body beyond the limit is refused, whatever its length header says.
"""

from __future__ import annotations

import hmac
import json
import secrets
from http.cookies import CookieError, SimpleCookie
from typing import Any
from urllib.parse import parse_qs, urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

JSON_LIMIT_BYTES = 1 << 20
UPLOAD_LIMIT_BYTES = 25 << 20
COOKIE = "lorikeet_session"
LOOPBACK = frozenset({"localhost", "127.0.0.1", "::1"})
OPEN_PATHS = frozenset({"/health", "/login"})

HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "SAMEORIGIN",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=(self)",
}

LOGIN_PAGE = """<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Lorikeet</title><style>:root{color-scheme:light dark}body{font:1rem/1.5 system-ui,sans-serif;display:grid;place-items:center;
min-height:90vh;margin:0}form{display:grid;gap:.75rem;width:min(20rem,90vw)}input,button{font:inherit;padding:.6rem .8rem;
border-radius:.5rem;border:1px solid #8888}button{background:#12714f;color:#fff;border:0}p{margin:0;color:#c23b1f}</style>
<form method="post" action="/login"><h1>Lorikeet</h1>%s<label for="key">Key</label>
<input id="key" name="key" type="password" autocomplete="current-password" autofocus required><button>Open</button></form></html>"""


class TooLargeError(Exception):
    """The body went over its limit while it was being read."""


def error_response(
    status: int, message: str, *, kind: str = "invalid_request_error", code: str | None = None
) -> Response:
    """Return an error in the shape that OpenAI's clients read."""
    return JSONResponse(error_body(message, kind=kind, code=code), status_code=status)


def error_body(message: str, *, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    """Return the JSON of an error in OpenAI's shape."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """The ASGI application around the application."""

    def __init__(self, app: ASGIApp, *, api_key: str | None, loopback: bool) -> None:
        """Guard `app` with `api_key`, if there is one; `loopback` says that only this machine is meant to reach it."""
        self.app = app
        self.loopback = loopback
        self._key = api_key.encode() if api_key else None
        self._sessions: set[str] = set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer or refuse one request or socket."""
        if scope["type"] not in {"http", "websocket"}:
            await self.app(scope, receive, send)
            return
        refusal = await self._refusal(scope, receive)
        if refusal is not None:
            await _refuse(refusal, scope, receive, send)
            return
        limit = _limit_bytes(scope)
        body = _Body(receive, limit)

        async def dressed(message: Message) -> None:
            if message["type"] == "http.response.start":
                if body.too_large:  # however the application took it, this is why it failed
                    raise TooLargeError
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            await self.app(scope, body, dressed)
        except TooLargeError:
            await _too_large(limit)(scope, receive, send)

    async def _refusal(self, scope: Scope, receive: Receive) -> Response | None:
        """Return why the request is not answered by the application, or None."""
        headers = Headers(scope=scope)
        host = urlsplit(f"//{headers.get('host', '')}").hostname or ""
        if self.loopback and host not in LOOPBACK:
            return error_response(403, f"this server answers to localhost, not to {host[:100]!r}")
        origin = headers.get("origin")
        if origin and urlsplit(origin).netloc != headers.get("host"):
            return error_response(403, "requests from other sites are refused")
        length = headers.get("content-length", "0")
        limit = _limit_bytes(scope)
        if not length.isdecimal() or int(length) > limit:
            return _too_large(limit)
        if self._key is None:
            return None
        if scope["path"] == "/login" and scope["type"] == "http":
            return await self._login(scope, receive)
        if scope["path"] in OPEN_PATHS or self._is_known(headers):
            return None
        if scope["path"] == "/" and scope["type"] == "http":
            return RedirectResponse("/login", status_code=303)
        return error_response(401, "a valid API key is needed: Authorization: Bearer KEY", code="invalid_api_key")

    def _is_known(self, headers: Headers) -> bool:
        scheme, _, token = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer" and self._matches(token.strip()):
            return True
        try:
            morsel = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            return False
        return morsel is not None and any(
            hmac.compare_digest(morsel.value.encode(), s.encode()) for s in self._sessions
        )

    def _matches(self, token: str) -> bool:
        return self._key is not None and hmac.compare_digest(token.encode("utf-8", "surrogatepass"), self._key)

    async def _login(self, scope: Scope, receive: Receive) -> Response:
        """Show the form, or take the key from it and give the page a session that is not the key."""
        if scope["method"] != "POST":
            return HTMLResponse(LOGIN_PAGE % "", headers=HEADERS)
        body = b""
        limited = _Body(receive, 4096)
        try:
            while True:
                message = await limited()
                body += message.get("body", b"")
                if not message.get("more_body"):
                    break
        except TooLargeError:
            return _too_large(4096)
        given = parse_qs(body.decode("utf-8", "replace")).get("key", [""])[0]
        if not self._matches(given):
            return HTMLResponse(LOGIN_PAGE % "<p>That is not the key.</p>", status_code=401, headers=HEADERS)
        session = secrets.token_urlsafe(32)
        self._sessions.add(session)
        response = RedirectResponse("/", status_code=303)
        response.set_cookie(COOKIE, session, httponly=True, samesite="strict", secure=scope.get("scheme") == "https")
        return response


class _Body:
    """A request's body, read no further than its limit."""

    def __init__(self, receive: Receive, limit_bytes: int) -> None:
        self._receive = receive
        self._left_bytes = limit_bytes
        self.too_large = False

    async def __call__(self) -> Message:
        """Return the next message. Raises TooLargeError once more than the limit has come."""
        message = await self._receive()
        if message["type"] == "http.request":
            self._left_bytes -= len(message.get("body", b""))
            if self._left_bytes < 0:
                self.too_large = True
                raise TooLargeError
        return message


def _limit_bytes(scope: Scope) -> int:
    return JSON_LIMIT_BYTES if scope["path"].startswith("/v1/chat") else UPLOAD_LIMIT_BYTES


def _too_large(limit_bytes: int) -> Response:
    return error_response(413, f"the body is larger than {limit_bytes} bytes", code="request_too_large")


async def _refuse(response: Response, scope: Scope, receive: Receive, send: Send) -> None:
    if scope["type"] == "http":
        await response(scope, receive, send)
        return
    await receive()
    await send(
        {"type": "websocket.close", "code": 4401, "reason": json.loads(bytes(response.body))["error"]["message"]}
    )
