"""Eight times the octets cost about eight times as much, also inside regular expressions and compiled code.

`test_parsers` counts the steps of Python; here the CPU time of C code is compared, whose square would be 64 times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial

import pytest

from penstock.mailauth import dkim, dmarc, results
from penstock.mailauth.header import Header, author_domains
from penstock.net import proxyline
from penstock.policy import delegate, milterwire
from penstock.policy.filters import FilterError
from penstock.relay import mtasts, tlsreport
from penstock.sink.web import fields, html
from penstock.sink.web.search import Query, QueryError
from penstock.smtp import _wire, grammar
from penstock.smtp.client import Capabilities, ProtocolError, ReplyReader, ServerReply
from penstock.smtp.extensions import Extensions
from penstock.testing.links import links_of
from tests.steps import is_square, steps_of

_OFFER = Extensions(mechanisms=("PLAIN",))
_FILLERS = (b" ", b"a", b";", b"(", b'"', b",", b"=", b"\\", b"<", b"\r\n ", b"\0", b"a@b ")
_SMALL, _LARGE = 3_000, 24_000


def read_replies(data: bytes) -> None:
    reader = ReplyReader()
    for start in range(0, len(data), 512):
        reader.feed(data[start : start + 512])
        while reader.next() is not None:
            pass


def read_header(data: bytes) -> None:
    header = Header(data)
    author_domains(header)
    results.forged_fields(header, "mx.example.org")


def decoded(parse: Callable[[str], object]) -> Callable[[bytes], object]:
    return lambda data: parse(data.decode("latin-1"))


PARSERS: dict[str, tuple[Callable[[bytes], object], list[bytes]]] = {
    "MAIL": (
        lambda data: grammar.parse_mail(data, _OFFER, esmtp=True, tls=True),
        [b"FROM:", b"FROM:<", b'FROM:<"', b"FROM:<@a,", b"FROM:<a@b> AUTH=", b"FROM:<a@b> ENVID=", b"FROM:<a@b> "],
    ),
    "RCPT": (
        lambda data: grammar.parse_rcpt(data, _OFFER, esmtp=True, smtputf8=True),
        [b"TO:", b"TO:<", b'TO:<"', b"TO:<a@", b"TO:<a@b> ORCPT=rfc822;", b"TO:<a@b> NOTIFY="],
    ),
    "EHLO": (grammar.parse_hello_name, [b""]),
    "replies": (read_replies, [b"", b"250-", b"250 ", b"250-a\r\n"]),
    "capabilities": (
        lambda data: Capabilities.of(ServerReply(250, tuple(data.decode("latin-1").split("\r\n")))),
        [b"x\r\nSIZE ", b"x\r\nAUTH ", b"x\r\nLIMITS ", b"x\r\n"],
    ),
    "MTA-STS": (lambda data: mtasts.parse_policy("a", "b", data, 0), [b"", b"mx:", b"a: x", b"mx: a\n", b"max_age: "]),
    "MTA-STS record": (lambda data: mtasts.record_id([data]), [b"v=STSv1", b"v=STSv1;", b"v=STSv1; id=a"]),
    "TLSRPT record": (
        lambda data: tlsreport.addresses_of([data]),
        [b"v=TLSRPTv1", b"v=TLSRPTv1;", b"v=TLSRPTv1; rua=", b"v=TLSRPTv1; rua=mailto:a@b"],
    ),
    "DKIM tags": (dkim.parse_tags, [b"", b"a=b;", b"v"]),
    "DMARC record": (dmarc.parse, [b"v=DMARC1", b"v=DMARC1;", b"v=DMARC1;p=none;rua="]),
    "header": (read_header, [b"From:", b"From: a <", b'From: "', b"From: (", b"Authentication-Results:", b""]),
    "PROXY": (proxyline.parse, [b"PROXY ", b"PROXY TCP4 192.0.2.1 "]),
    "delegate": (decoded(delegate.parse_answer), [b"action=", b"action=PREPEND ", b"action=550 "]),
    "parameters": (decoded(fields.read_parameters), [b"", b"text/plain; ", b'a/b; name="', b"a/b; name*0="]),
    "words": (decoded(fields.decode_words), [b"", b"=?utf-8?q?", b"=?utf-8?b?", b"=?"]),
    "addresses": (decoded(fields.read_addresses), [b"", b"a <", b'"', b"("]),
    "HTML": (decoded(html.has_remote_content), [b"", b'<img src="', b"url(", b"<style>"]),
    "search": (decoded(Query), [b"", b'"', b"from:", b"-"]),
}
"""By name: what reads octets, and beginnings that lead to its expressions."""
_DOCUMENTED = (ValueError, FilterError, ProtocolError, QueryError, dkim.Invalid)


@pytest.mark.parametrize("name", PARSERS)
def test_eight_times_the_octets_cost_no_square(name: str) -> None:
    parse, beginnings = PARSERS[name]

    def read(data: bytes) -> None:
        with suppress(*_DOCUMENTED):
            parse(data)

    for beginning in beginnings:
        for filler in _FILLERS:
            small, large = (beginning + filler * (octets // len(filler)) + b"x" for octets in (_SMALL, _LARGE))
            assert not is_square(partial(read, small), partial(read, large)), (beginning, filler)


def read_text(data: bytes, step: int) -> int:
    """Return how many chunks the wire makes of a text."""
    wire = _wire.Wire(max_octets=1 << 30, reject=(), normalize=("bare_lf", "bare_cr", "nul", "long_line"))
    wire.expect_text()
    chunks = 0
    for start in range(0, len(data), step):
        wire.feed(data[start : start + step])
        while (token := wire.next()) != _wire.NEED_DATA:
            chunks += token == _wire.CHUNK
    return chunks


def read_commands(data: bytes, step: int) -> int:
    wire = _wire.Wire()
    lines = 0
    for start in range(0, len(data), step):
        wire.feed(data[start : start + step])
        while wire.next() != _wire.NEED_DATA:
            lines += 1
    return lines


def read_chunks(data: bytes, step: int) -> int:
    """Read as many BDAT chunks of `step` octets as there are."""
    wire = _wire.Wire(max_octets=1 << 30)
    chunks = 0
    for start in range(0, len(data), step):
        piece = data[start : start + step]
        wire.feed(b"BDAT %d\r\n" % len(piece) + piece)
        assert wire.next() == _wire.COMMAND
        wire.expect_octets(len(piece), last=False, text=True, first=not start)
        while wire.next() != _wire.NEED_DATA:
            chunks += 1
    return chunks


_TEXTS: Sequence[bytes] = (
    b".",
    b"..\r\n",
    b"\r\n.",
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b"a",
    b"\r\n.\r",
    b"x" * 2000 + b"\r\n",
)
_LINES: Sequence[bytes] = (b"NOOP\r\n", b"\r\n", b"\r", b"\n", b"\0\r\n", b"a", b"BDAT 1\r\n")


@pytest.mark.parametrize("read", [read_text, read_commands, read_chunks])
@pytest.mark.parametrize("step", [1, 7, 16_384])
def test_the_wire_reads_octets_once(read: Callable[[bytes, int], int], step: int) -> None:
    octets = 8_000 if step < 100 else 64_000
    for word in _LINES if read is read_commands else _TEXTS:
        small, large = (word * (size // len(word)) for size in (octets, 8 * octets))
        assert not is_square(partial(read, small, step), partial(read, large, step)), word


def test_a_packet_of_a_filter_may_arrive_in_small_pieces() -> None:
    def read(packet: bytes) -> None:
        reader = milterwire.Reader()
        for start in range(0, len(packet), 32):
            assert reader.next() is None
            reader.feed(packet[start : start + 32])
        assert reader.next() == (packet[4:5], packet[5:])
        assert reader.is_empty

    small, large = (milterwire.packet(b"b", b"x" * octets) for octets in (250_000, 2_000_000))
    assert not is_square(partial(read, small), partial(read, large))


_MARKUP = ("<!--", "<!--x--", "<a ", "<a\n", "<a/", '<a b="', "<a b='x", '<a b="x"', "<a b=", "<a =", "</", "<!", "<?",
           "<", "&", "<script>", "<script></script ", "<title></", '<a href="http://x/"><b ')  # fmt: skip
_ENDS_OF_LINKS = (")", "]", ".", "(", "])", "(.", "http://", "http://a)", "https://a/(")


def test_links_are_found_in_linear_time() -> None:
    """html.parser and trimming one octet after the other were squares."""
    for find, words in (
        (lambda text: links_of(text, ""), _MARKUP),
        (lambda text: links_of("", text), _ENDS_OF_LINKS),
        (lambda text: links_of(f"<a href='{text}='>", ""), ("&", "&a", "&#", "&#1", "1")),
    ):
        for word in words:
            small, large = ("http://a" + word * (octets // len(word)) for octets in (_SMALL, _LARGE))
            assert not is_square(partial(find, small), partial(find, large)), word
            assert steps_of(partial(find, large)) <= 9 * steps_of(partial(find, small)) + 400, word
