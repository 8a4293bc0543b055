"""Who may speak to the HTTP API, and how much.

A page in somebody's browser can send requests to any address of that machine. So an API without a token answers only
requests that name it as this machine does (a foreign name means that a name server lies: DNS rebinding), and changes
nothing for a page of another origin. An address that other machines can reach needs a token.
"""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any, Final
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
_PATIENCE: Final = 15
"""Seconds for a request's body."""
_LOCAL: Final = frozenset({"localhost", "127.0.0.1", "::1"})
_COOKIE: Final = "penstock-token"
_MOST_FIELDS: Final = 10
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
PART_POLICY: Final = (
    "sandbox; default-src 'none'; style-src 'unsafe-inline'; img-src data:; frame-ancestors 'self'; "
    "base-uri 'none'; form-action 'none'"
)
"""Content-Security-Policy of a part of a message: no program, no network, an origin of its own."""


class Guard:
    """Stands before an ASGI application."""

    def __init__(self, app: App, *, token: str | None = None) -> None:
        """With a token, every request has to have it; without one, the address has to be a loopback one."""
        self._app = app
        self._token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Let a request through, or answer it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refusal = self._refusal(scope, headers)
        if refusal is not None:
            await _answer(send, *refusal)
            return
        if self._token is not None and scope["method"] == "GET" and scope["path"] == "/" and scope["query_string"]:
            await _answer(send, 303, "", (b"location", b"/"), (b"set-cookie", self._cookie()))
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                there = {name for name, _ in message["headers"]}
                policy = (b"content-security-policy", PAGE_POLICY.encode())
                message["headers"] = [
                    *message["headers"],
                    *(each for each in (*_HEADERS, policy) if each[0] not in there),
                ]
            await send(message)

        with trio.move_on_after(_PATIENCE) as scope_of_body:
            body = None if _is_too_long(headers.get("content-length", "")) else await _read(receive)
        if scope_of_body.cancelled_caught:
            await _answer(send, 408, f"a body has to come within {_PATIENCE} s")
            return
        if body is None:
            await _answer(send, 413, f"a body has at most {MAX_BODY} octets here")
            return
        await self._app(scope, _once(body, receive), send_with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str] | None:
        """Say why a request is not let through."""
        host = headers.get("host", "")
        if self._token is not None:
            if not self._has_token(scope, headers):
                return 401, "a token is needed: Authorization: Bearer TOKEN, or open /?token=TOKEN in a browser"
        elif _name_of(f"//{host}") not in _LOCAL:
            return 421, f"this is not {host!r}: use localhost, 127.0.0.1 or [::1]"
        origin = headers.get("origin")
        if scope["method"] not in ("GET", "HEAD") and origin is not None and not _is_of(origin, host):
            return 403, f"a page of {origin} may not change anything here"
        return None

    def _has_token(self, scope: Scope, headers: dict[str, str]) -> bool:
        kind, _, given = headers.get("authorization", "").partition(" ")
        offered = [given.strip()] if kind.lower() == "bearer" else []
        # Not SimpleCookie, which reads nothing more behind a cookie of somebody else's that it does not like.
        cookies = (each.partition("=") for each in headers.get("cookie", "").split(";"))
        offered += [value.strip() for name, _, value in cookies if name.strip() == _COOKIE]
        if scope["path"] == "/":
            fields = scope["query_string"].decode("latin-1").split("&")[:_MOST_FIELDS]
            offered += parse_qs("&".join(fields)).get("token", [])
        assert self._token is not None
        return any(hmac.compare_digest(each.encode(), self._token.encode()) for each in offered)

    def _cookie(self) -> bytes:
        return f"{_COOKIE}={self._token}; Path=/; HttpOnly; SameSite=Strict".encode()


def _name_of(url: str) -> str | None:
    try:
        return urlsplit(url).hostname
    except ValueError:
        return None


def _is_of(origin: str, host: str) -> bool:
    """Say whether an origin is this host. What is no origin is not."""
    try:
        return urlsplit(origin).netloc == host
    except ValueError:
        return False


def _is_too_long(intercepted_verbs: str) -> bool:
    """Say whether a Content-Length is above the bound; what is no number is found out by reading."""
    return intercepted_verbs.isdigit() and (len(intercepted_verbs) > 12 or int(intercepted_verbs) > MAX_BODY)


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
    """Return what gives a body that was read already, then what comes behind it."""
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
