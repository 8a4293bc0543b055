"""A small HTTPS client: one request to a named host, without redirects.

`fetch_text` gets a short text (RFC 8461 3.3), `post` submits a report (RFC 8460 3).
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from typing import Final

import h11
import trio

_MOST_HEAD: Final = 16_384
_READ: Final = 16_384
_MOST_ANSWER: Final = 65_536
"""Octets of the answer to a report, which is not used."""
Headers = list[tuple[str, str]]


class FetchError(Exception):
    """A text could not be fetched, or a report not submitted."""

    def __init__(self, text: str, *, is_certificate: bool = False) -> None:
        super().__init__(text)
        self.is_certificate = is_certificate
        """The certificate of the host was refused."""


async def fetch_text(
    host: str, addresses: Sequence[str], path: str, context: ssl.SSLContext, *, port: int, most: int, seconds: float
) -> bytes:
    """Return the body of a text/plain answer of at most `most` octets, within `seconds`. Raise FetchError.

    `addresses` are those of the host, which are tried in turn; `context` verifies its certificate.
    """
    url = f"https://{host}{path}"
    request = h11.Request(method="GET", target=path, headers=[*_headers(host), ("Accept", "text/plain")])
    return await _exchange(url, host, addresses, request, b"", context, port=port, most=most, seconds=seconds)


async def post(
    host: str,
    addresses: Sequence[str],
    path: str,
    context: ssl.SSLContext,
    *,
    kind: str,
    data: bytes,
    port: int,
    seconds: float,
) -> None:
    """Submit data of a media type within `seconds`. Raise FetchError unless the host accepts it (2xx).

    `path` has the query, `addresses` and `context` are as in `fetch_text`.
    """
    url = f"https://{host}{path}"
    authority = host if port == 443 else f"{host}:{port}"
    headers = [*_headers(authority), ("Content-Type", kind), ("Content-Length", str(len(data)))]
    request = h11.Request(method="POST", target=path, headers=headers)
    await _exchange(url, host, addresses, request, data, context, port=port, most=_MOST_ANSWER, seconds=seconds)


def _headers(host: str) -> Headers:
    return [("Host", host), ("User-Agent", "Penstock"), ("Connection", "close")]


async def _exchange(
    url: str,
    host: str,
    addresses: Sequence[str],
    request: h11.Request,
    data: bytes,
    context: ssl.SSLContext,
    *,
    port: int,
    most: int,
    seconds: float,
) -> bytes:
    """Return the body of the answer to a request with its data. Raise FetchError."""
    try:
        with trio.fail_after(seconds):
            stream = await _connect(addresses, port, seconds / max(1, len(addresses)))
            async with trio.SSLStream(stream, context, server_hostname=host, https_compatible=True) as secured:
                return await _answer(secured, url, request, data, most)
    except trio.TooSlowError as exc:
        raise FetchError(f"{url}: no answer within {seconds:g} s") from exc
    except (trio.BrokenResourceError, ssl.SSLError, h11.RemoteProtocolError, OSError) as exc:
        cause = exc.__cause__ if isinstance(exc, trio.BrokenResourceError) and exc.__cause__ is not None else exc
        is_certificate = isinstance(cause, ssl.SSLCertVerificationError)
        text = cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else str(cause)
        raise FetchError(f"{url}: {text}", is_certificate=is_certificate) from exc


async def _connect(addresses: Sequence[str], port: int, seconds: float) -> trio.SocketStream:
    """Connect to the first address that answers. Raise OSError."""
    failure = OSError("the host has no address")
    for address in addresses:
        try:
            with trio.fail_after(seconds):
                return await trio.open_tcp_stream(address, port)
        except trio.TooSlowError:
            failure = OSError(f"{address} did not answer within {seconds:g} s")
        except OSError as exc:
            failure = exc
    raise failure


async def _answer(
    stream: trio.SSLStream[trio.SocketStream], url: str, request: h11.Request, data: bytes, most: int
) -> bytes:
    """Raise FetchError, h11.RemoteProtocolError, and what the stream raises."""
    connection = h11.Connection(h11.CLIENT, max_incomplete_event_size=_MOST_HEAD)
    out = connection.send(request) or b""
    if data:
        out += connection.send(h11.Data(data=data)) or b""
    await stream.send_all(out + (connection.send(h11.EndOfMessage()) or b""))
    is_text = request.method == b"GET"
    body = bytearray()
    received = 0
    while True:
        event = connection.next_event()
        if event is h11.NEED_DATA:
            octets = await stream.receive_some(_READ)
            received += len(octets)
            if received > 2 * most + 4 * _MOST_HEAD:
                raise FetchError(f"{url}: the answer does not end")
            connection.receive_data(bytes(octets))
        elif isinstance(event, h11.Response):
            _check_head(event, url, is_text=is_text)
            if not is_text:
                return b""
        elif isinstance(event, h11.Data):
            body += event.data
            if len(body) > most:
                raise FetchError(f"{url}: longer than {most} octets")
        elif isinstance(event, h11.EndOfMessage):
            return bytes(body)
        elif not isinstance(event, h11.InformationalResponse):
            raise FetchError(f"{url}: the connection was closed")


def _check_head(response: h11.Response, url: str, *, is_text: bool) -> None:
    """Raise FetchError unless the request has succeeded, and the response has a text where one is wanted."""
    if response.status_code != 200 and (is_text or not 200 <= response.status_code < 300):
        more = "; redirects are not followed" if 300 <= response.status_code < 400 else ""
        raise FetchError(f"{url}: status {response.status_code}{more}")
    kinds = [value for name, value in response.headers if name == b"content-type"]
    if is_text and (not kinds or kinds[0].partition(b";")[0].strip().lower() != b"text/plain"):
        raise FetchError(f"{url}: not text/plain")
