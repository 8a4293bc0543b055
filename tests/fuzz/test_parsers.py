"""What other programs and files send: any octets give a result or the documented error, at a cost in proportion.

The parsers of the session, of addresses, DNS, SASL, PROXY headers, SPF, DKIM and DMARC have such tests beside them.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock import config
from penstock.cluster.layout import LayoutError, read_envelope, read_message, read_state
from penstock.mailauth.arc import ArcVerifier
from penstock.mailauth.dkim import BodyHashes
from penstock.mailauth.header import Header, author_domains
from penstock.mailauth.results import forged_fields
from penstock.net.natswire import Parser, ProtocolError, parse_headers
from penstock.operations.endpoint import Answer, Endpoint
from penstock.policy.delegate import parse_answer
from penstock.policy.filters import FilterConnection, FilterError
from penstock.policy.milterwire import MilterError, Packet, Reader, headers, parse_negotiation, parse_reply
from penstock.policy.rspamd import _decode, read_answer
from penstock.schema import SchemaError, parse_table
from penstock.sink.plan import PlanError, parse_plan
from penstock.sink.web import mime
from penstock.sink.web.fields import read_addresses
from tests.steps import steps_of

_PIECE = 512
"""Octets in which a stream arrives."""


def pieces(data: bytes) -> list[bytes]:
    return [data[start : start + _PIECE] for start in range(0, len(data), _PIECE)]


@dataclass
class Received:
    """What a NATS server has sent."""

    operations: list[tuple[Any, ...]] = field(default_factory=list)

    def on_message(self, *parts: bytes) -> None:
        self.operations.append(parts)

    def on_info(self, info: object) -> None:
        self.operations.append((info,))

    def on_ping(self) -> None:
        self.operations.append(())

    on_pong = on_ping

    def on_error(self, text: str) -> None:
        self.operations.append((text,))


def read_nats(data: bytes, step: int = _PIECE) -> list[tuple[Any, ...]]:
    received = Received()
    parser = Parser(received)
    with suppress(ProtocolError):
        for start in range(0, len(data), step):
            parser.feed(data[start : start + step])
    return received.operations


def read_milter(data: bytes) -> None:
    reader = Reader()
    with suppress(MilterError):
        for piece in pieces(data):
            reader.feed(piece)
            while (found := reader.next()) is not None:
                with suppress(MilterError):
                    parse_negotiation(found)
                with suppress(MilterError):
                    assert parse_reply(found.data).code in range(400, 600)


class Sent:
    """A filter that has sent something, and closes the connection."""

    can_be_kept = False

    def __init__(self, data: bytes) -> None:
        self._pieces = iter(pieces(data))

    async def receive(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise FilterError("closed")


def read_rspamd(data: bytes) -> None:
    async def read() -> None:
        with suppress(FilterError):
            await read_answer(cast("FilterConnection", Sent(data)))

    coroutine = read()
    with pytest.raises(StopIteration):
        coroutine.send(None)
    with suppress(msgspec.MsgspecError):
        _decode(data)


def read_delegate(data: bytes) -> None:
    with suppress(FilterError):
        parse_answer(data.decode("utf-8", "replace"))


def read_arc(data: bytes) -> None:
    hashes = BodyHashes()
    verifier = ArcVerifier(Header(data), hashes)
    hashes.feed(b"body\r\n")
    hashes.finish()
    assert verifier.finish({}).result in {"none", "fail", "pass", "temperror", "permerror"}


def read_fields(data: bytes) -> None:
    header = Header(data)
    author_domains(header)
    forged_fields(header, "mx.example.org")
    list(headers(data, 0))


def read_mime(data: bytes) -> None:
    work = mime.Work()
    for part in mime.read(data, work).parts:
        assert 0 <= part.start <= part.body <= part.end <= len(data)
        assert len(part.content(work)) == part.size(work)


def read_toml(data: bytes) -> None:
    text = data.decode("latin-1")
    with suppress(SchemaError):
        parse_table(text)
    with suppress(PlanError):
        parse_plan(text)
    with suppress(config.ConfigError):
        config.parse(text)


def read_stored(data: bytes) -> None:
    with suppress(LayoutError):
        read_message("mail.1.ID", 1, data)
    with suppress(LayoutError):
        read_state(data)
    with suppress(LayoutError):
        read_envelope(data)


PARSERS: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
    "nats": (read_nats, [b"MSG a 1 3\r\n", b"HMSG a 1 _ 2 4\r\n", b"abc\r\n", b"PING\r\n", b"INFO {", b"-ERR 'x'\r\n"]),
    "nats headers": (parse_headers, [b"NATS/1.0", b"\r\n", b"a: b", b":", b" 503"]),
    "stored": (
        read_stored,
        [
            b"NATS/1.0\r\n",
            b"P-V: 1\r\n",
            b"P-Size: 1 2 3 4\r\n",
            b"P-Env: {",
            b"P-State: [",
            b"P-CRC: ff\r\n",
            b"P-At: 1.5\r\n",
            b"[",
            b'"a"',
            b"\r\n",
        ],
    ),
    "milter": (
        read_milter,
        [b"\0\0\0\1", b"\0\0\0\x0dO\0\0\0\6", b"\0\0\1\xff", b"550 5.7.1 no\r\n", b"4%%", b"\0", b"y"],
    ),
    "delegate": (
        read_delegate,
        [b"action=", b"DUNNO", b"550 5.7.1 ", b"PREPEND X: y", b" ", b"\n", b"defer_if_permit"],
    ),
    "rspamd": (
        read_rspamd,
        [b"HTTP/1.1 200 OK\r\n", b"Content-Length: 9\r\n", b"\r\n", b'{"action":', b"[", b'"reject"}'],
    ),
    "arc": (
        read_arc,
        [
            b"ARC-Seal: i=1; a=rsa-sha256; cv=none; d=a.example; s=s; b=AA==\r\n",
            b"ARC-Message-Signature: i=1; a=rsa-sha256; bh=AA==; d=a.example; s=s; h=from; b=AA==\r\n",
            b"ARC-Authentication-Results: i=1; x\r\n",
            b" i=2;",
            b"\r\n",
        ],
    ),
    "fields": (
        read_fields,
        [b"From: ", b"Authentication-Results: ", b"mx.example.org", b"(", b'"', b"<a@b>", b"\r\n", b";"],
    ),
    "mime": (
        read_mime,
        [
            b"Content-Type: multipart/mixed; boundary=a\r\n",
            b"\r\n",
            b"--a\r\n",
            b"--a--\r\n",
            b"=",
            b"begin 644 a\r\n",
            b"Content-Transfer-Encoding: base64\r\n",
            b"Content-Transfer-Encoding: quoted-printable\r\n",
            b"Content-Type: message/rfc822\r\n",
        ],
    ),
    "addresses": (
        lambda data: read_addresses(data.decode("latin-1")),
        [b"a@b", b",", b"(", b'"', b"<", b">", b":", b";", b"\\"],
    ),
    "toml": (
        read_toml,
        [
            b"a.",
            b"[",
            b"[[rule]]\n",
            b"[[listener]]\n",
            b"]",
            b"{",
            b"=",
            b'"x"',
            b"\n",
            b"9",
            b"'''",
            b"reply",
            b'phase="rcpt"\n',
            b'hostname="a.example"\n',
            b'domains=["a.example"]\n',
            b'address="127.0.0.1:25"\n',
        ],
    ),
}
"""By name: what reads octets, and words that get it into its states."""


@pytest.mark.parametrize("name", PARSERS)
@given(data=st.data())
@settings(max_examples=40)
def test_any_octets_give_a_result_or_the_documented_error(name: str, data: st.DataObject) -> None:
    parse, words = PARSERS[name]
    parse(b"".join(data.draw(st.lists(st.one_of(st.sampled_from(words), st.binary(max_size=6)), max_size=30))))


@pytest.mark.parametrize("name", PARSERS)
def test_twice_the_octets_cost_at_most_twice_the_steps(name: str) -> None:
    parse, words = PARSERS[name]
    for word in words:
        data = word * (4096 // len(word))
        parse(data)  # what is made once is not counted
        once, twice = steps_of(lambda data=data: parse(data)), steps_of(lambda data=data: parse(data + data))  # type: ignore[misc]
        assert twice <= 2 * once + 400, word


@given(st.lists(st.sampled_from(PARSERS["nats"][1]), max_size=12), st.integers(1, 9))
def test_what_a_server_sends_does_not_depend_on_the_split(words: list[bytes], step: int) -> None:
    data = b"".join(words)
    assert read_nats(data, step) == read_nats(data, max(len(data), 1))


@pytest.mark.parametrize(
    ("parse", "error"),
    [
        (lambda: Parser(Received()).feed(b'INFO {"x":' + b"[" * 100_000 + b"\r\n"), ProtocolError),
        (lambda: parse_plan("a=" + "[" * 10_000), PlanError),
        (lambda: config.parse("a=" + "[" * 10_000), config.ConfigError),
        (lambda: parse_plan("a." * 100_000 + "a=1"), PlanError),
    ],
    ids=["INFO", "plan", "configuration", "key"],
)
def test_input_that_is_nested_too_deeply_is_an_error(parse: Callable[[], object], error: type[Exception]) -> None:
    with pytest.raises(error):
        parse()


def test_a_packet_of_a_filter_is_read_once() -> None:
    reader = Reader()
    reader.feed(b"\0\0\0\2yz\0\0\0\1c")
    assert [reader.next(), reader.next(), reader.next()] == [Packet(b"y", b"z"), Packet(b"c", b""), None]


@given(st.lists(st.sampled_from([b"GET /x HTTP/1.1\r\n", b"Host: a\r\n", b"\r\n", b"GET ", b"\0", b": "]), max_size=8))
@settings(max_examples=40)
def test_any_request_has_one_answer_or_none(words: list[bytes]) -> None:
    async def page() -> Answer:
        return Answer(200, "ok")

    async def ask() -> bytes:
        ours, theirs = trio.testing.memory_stream_pair()
        await ours.send_all(b"".join(words))
        await ours.send_eof()
        await Endpoint({"/x": page}, token_file=None, protected=frozenset())._serve(cast("trio.SocketStream", theirs))
        return bytes(await ours.receive_some())

    answer = trio.run(ask)
    assert answer == b"" or answer.startswith((b"HTTP/1.1 200", b"HTTP/1.1 4"))
    assert answer.count(b"Content-Length: ") <= 1
