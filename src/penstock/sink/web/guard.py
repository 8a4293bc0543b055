"""Access control of the HTTP API, and the bounds of a request.

A web page anywhere can make its visitors' browsers send requests to addresses of their own machines. An API without a
token therefore answers only requests whose Host names this machine (another name means DNS rebinding), and pages of
other origins cannot change anything. An address that other machines can reach needs a token.

Behind a reverse proxy the browser's origin is not this server's address: --web-origin says what it is. The page works
below any path, and its events are not buffered, so that nginx needs no more than

    location /sink/ {
        proxy_pass http://127.0.0.1:8025;       # --web-origin https://mail.example.org/sink/
    }

The proxy decides who has access then, or passes the token on. With or without a "/" after the port, which makes nginx
remove the path, the page finds its way.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final, NamedTuple
from urllib.parse import parse_qs, urlsplit

import msgspec
import trio

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

MAX_BODY: Final = 262_144
"""Octets of a request's body."""
_TIMEOUT: Final = 15
"""Seconds for a request's body."""
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_COOKIE: Final = "penstock-token"
_MAX_FIELDS: Final = 10
"""Fields of a query in which a token is looked for."""
_HEADERS: Final = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
    (b"cache-control", b"no-store"),
)
PAGE_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "frame-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy of the page: nothing from elsewhere, nothing inline."""
_PART: Final = "frame-ancestors 'self'; base-uri 'none'; form-action 'none'"
PART_POLICY: Final = (
    "sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'; style-src 'unsafe-inline'; "
    f"img-src data:; font-src data:; {_PART}"
)
"""Of a part of a message: no scripts, no network, an origin of its own. Links may open a new tab."""
REMOTE_PART_POLICY: Final = (
    "sandbox allow-popups allow-popups-to-escape-sandbox; default-src 'none'; "
    "style-src 'unsafe-inline' http: https:; img-src data: http: https:; font-src data: http: https:; "
    f"media-src http: https:; {_PART}"
)
"""Of HTML whose reader has asked for remote content: still no scripts."""
PDF_POLICY: Final = f"default-src 'none'; object-src 'self'; style-src 'unsafe-inline'; {_PART}"
"""Of a PDF: browsers do not start their viewer in a sandbox. The viewer has its own."""


class WebOrigin(NamedTuple):
    """The URL under which browsers reach the page, where that is a reverse proxy's."""

    origin: str
    """Scheme, host and port: "https://mail.example.org"."""
    host: str
    prefix: str
    """The path without its last "/"; "" for the root."""

    @classmethod
    def parse(cls, url: str) -> WebOrigin:
        """Read "https://mail.example.org/sink/". Raise ValueError."""
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment:
            raise ValueError(f"a web origin looks like https://mail.example.org/sink/, not {url!r}")
        return cls(f"{parts.scheme}://{parts.netloc.lower()}", parts.hostname, parts.path.rstrip("/"))


class Guard:
    """Wraps an ASGI application."""

    def __init__(self, app: App, *, token: str | None = None, origin: WebOrigin | None = None) -> None:
        """With a token, every request needs it; without one, the server has to listen on a loopback address."""
        self._app = app
        self._token = token
        self._origin = origin
        self._prefix = "" if origin is None else origin.prefix
        self._hosts = _LOCAL if origin is None else _LOCAL | {origin.host}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        scope = self._without_prefix(scope)
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
        elif scope["path"] == "":  # relative URLs of the page need the slash
            await _answer(send, 303, "", (b"location", f"{self._prefix}/".encode()))
        elif self._token is not None and scope["method"] == "GET" and scope["path"] == "/" and scope["query_string"]:
            await _answer(send, 303, "", (b"location", b"./"), (b"set-cookie", self._cookie()))
        else:
            await self._pass_on(scope, headers, receive, send)

    def _without_prefix(self, scope: Scope) -> Scope:
        """Remove the prefix of the path, if the proxy has not removed it."""
        path: str = scope["path"]
        if self._prefix and (path == self._prefix or path.startswith(f"{self._prefix}/")):
            return {**scope, "path": path.removeprefix(self._prefix)}
        return scope

    async def _pass_on(self, scope: Scope, headers: dict[str, str], receive: Receive, send: Send) -> None:
        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                policy = (b"content-security-policy", PAGE_POLICY.encode())
                message["headers"] = [
                    *message["headers"],
                    *(each for each in (*_HEADERS, policy) if each[0] not in there),
                ]
            await send(message)

        with trio.move_on_after(_TIMEOUT) as scope_of_body:
            body = None if _is_too_long(headers.get("content-length", "")) else await _read(receive)
        if scope_of_body.cancelled_caught:
            await _answer(send, 408, f"the body of the request did not arrive within {_TIMEOUT} s")
        elif body is None:
            await _answer(send, 413, f"the body of a request has at most {MAX_BODY} octets")
        else:
            await self._app(scope, _once(body, receive), send_with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Return the status and the error of a request that is refused."""
        host = headers.get("host", "")
        if self._token is not None:
            if not self._has_token(scope, headers):
                return 401, "this page needs a token: send Authorization: Bearer TOKEN, or open /?token=TOKEN"
        elif _name_of(f"//{host}") not in self._hosts:
            return 421, f"unknown host {host!r}: use localhost, 127.0.0.1 or [::1], or start the sink with --web-origin"
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and not self._is_own(origin, host):
            return 403, f"pages of {origin} may not change anything here; behind a proxy, use --web-origin"
        return None

    def _is_own(self, origin: str, host: str) -> bool:
        """Return whether an Origin header names this page."""
        if self._origin is not None and origin.lower() == self._origin.origin:
            return True
        try:
            return urlsplit(origin).netloc == host
        except ValueError:
            return False

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        offered = [given.strip()] if kind.lower() == "bearer" else []
        # Not SimpleCookie: it stops at the first cookie that it does not like, which another site may have set.
        cookies = (each.partition("=") for each in headers.get("cookie", "").split(";"))
        offered += [value.strip() for name, _, value in cookies if name.strip() == _COOKIE]
        if scope["path"] == "/":
            fields = scope["query_string"].decode("latin-1").split("&")[:_MAX_FIELDS]
            offered += parse_qs("&".join(fields)).get("token", [])
        assert self._token is not None
        return any(hmac.compare_digest(each.encode(), self._token.encode()) for each in offered)

    def _cookie(self) -> bytes:
        is_secure = self._origin is not None and self._origin.origin.startswith("https:")
        path = f"Path={self._prefix}/; HttpOnly; SameSite=Strict{'; Secure' if is_secure else ''}"
        return f"{_COOKIE}={self._token}; {path}".encode()


def _name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_too_long(length: str) -> bool:
    """Return whether a Content-Length exceeds the bound. A malformed one is found by reading the body."""
    return length.isdigit() and (len(length) > 12 or int(length) > MAX_BODY)


async def _read(receive: Receive) -> bytes | None:
    """Return the body of a request, None when it is too long."""
    body = b""
    while True:
        message = await receive()
        if message["type"] != "http.request":
            return body
        piece: bytes = message.get("body", b"")
        body += piece
        if len(body) > MAX_BODY:
            return None
        if not message.get("more_body", False):
            return body


def _once(body: bytes, receive: Receive) -> Receive:
    """Return an ASGI `receive` that gives a body that was read before, then what follows."""
    is_given = False

    async def give() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return give


async def _answer(send: Send, status: int, error: str, *headers: tuple[bytes, bytes]) -> None:
    body = msgspec.json.encode({"error": error}) if error else b""
    kind = (b"content-type", b"application/json")
    length = (b"content-length", str(len(body)).encode())
    await send({"type": "http.response.start", "status": status, "headers": [kind, length, *_HEADERS, *headers]})
    await send({"type": "http.response.body", "body": body})
