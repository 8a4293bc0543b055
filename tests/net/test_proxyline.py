"""PROXY headers: the client's address, in both versions, however they are split."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.net.proxyline import MAX_HEADER, ProxyError, ProxyLine, parse
from tests.steps import steps_of

SIGNATURE = b"\r\n\r\n\0\r\nQUIT\n"


def v2(command: int, family: int, data: bytes) -> bytes:
    return SIGNATURE + struct.pack("!BBH", 0x20 | command, family, len(data)) + data


TCP4 = bytes([192, 0, 2, 1, 192, 0, 2, 25]) + struct.pack("!HH", 4711, 25)
TCP6 = bytes.fromhex("20010db8" + "00" * 11 + "01" + "20010db8" + "00" * 11 + "19") + struct.pack("!HH", 4711, 25)
_MAPPED = "00" * 10 + "ffffc6336407" + "00" * 10 + "ffffc0000219"
MAPPED = bytes.fromhex(_MAPPED) + struct.pack("!HH", 4711, 25)

HEADERS = [
    (b"PROXY TCP4 192.0.2.1 192.0.2.25 4711 25\r\n", ("192.0.2.1", 4711, "192.0.2.25", 25)),
    (b"PROXY TCP6 2001:db8::1 2001:db8::19 4711 25\r\n", ("2001:db8::1", 4711, "2001:db8::19", 25)),
    (b"PROXY TCP6 ::ffff:198.51.100.7 ::FFFF:C000:0219 4711 25\r\n", ("198.51.100.7", 4711, "192.0.2.25", 25)),
    (b"PROXY TCP6 2001:DB8:0:0::1 2001:db8::19 4711 25\r\n", ("2001:db8::1", 4711, "2001:db8::19", 25)),
    (b"PROXY UNKNOWN\r\n", None),
    (b"PROXY UNKNOWN ffff::1 ffff::2 1 2\r\n", None),
    (v2(1, 0x11, TCP4), ("192.0.2.1", 4711, "192.0.2.25", 25)),
    (v2(1, 0x11, TCP4 + b"\x04\0\x01x"), ("192.0.2.1", 4711, "192.0.2.25", 25)),
    (v2(1, 0x21, TCP6), ("2001:db8::1", 4711, "2001:db8::19", 25)),
    (v2(1, 0x21, MAPPED), ("198.51.100.7", 4711, "192.0.2.25", 25)),
    (v2(0, 0x11, TCP4), None),
    (v2(0, 0, b""), None),
    (v2(1, 0x31, b"\0" * 216), None),
]


@pytest.mark.parametrize(("header", "expected"), HEADERS)
def test_a_header_names_the_client_once_it_is_whole(header: bytes, expected: tuple[str, int, str, int] | None) -> None:
    for end in range(len(header)):
        assert parse(header[:end]) is None
    line = parse(header + b"EHLO x\r\n")
    assert line == ProxyLine(len(header), expected is None, *(expected or ()))


@pytest.mark.parametrize(
    "data",
    [
        b"EHLO x\r\n",
        b"PROXX",
        b"PROXY TCP4 192.0.2.1 192.0.2.25 4711\r\n",
        b"PROXY TCP4 2001:db8::1 192.0.2.25 4711 25\r\n",
        b"PROXY TCP6 fe80::1%eth0 2001:db8::19 4711 25\r\n",
        b"PROXY TCP4 192.0.2.999 192.0.2.25 4711 25\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.25 4711 65536\r\n",
        b"PROXY TCP4 192.0.2.1 192.0.2.25 -1 25\r\n",
        b"PROXY UDP4 192.0.2.1 192.0.2.25 4711 25\r\n",
        b"PROXY " + b"x" * 200,
        v2(2, 0x11, TCP4),
        v2(1, 0x11, TCP4[:-1]),
        SIGNATURE + b"\x11\x11\0\x0c" + TCP4,
        SIGNATURE + struct.pack("!BBH", 0x21, 0x11, MAX_HEADER),
    ],
)
def test_what_is_no_header_is_refused(data: bytes) -> None:
    with pytest.raises(ProxyError):
        parse(data)


@given(st.binary(max_size=200) | st.binary(max_size=100).map(lambda data: b"PROXY " + data + b"\r\n"))
def test_no_octets_raise_anything_else(data: bytes) -> None:
    for buffer in (data, SIGNATURE + data):
        with suppress(ProxyError):
            parse(buffer)


@pytest.mark.parametrize("start", [b"PROXY ", b"PROXY TCP4 ", SIGNATURE + b"\x21\x11", SIGNATURE, b"PROXY TCP6 ::"])
@pytest.mark.parametrize("octet", [b" ", b":", b"1", b"\xff", b"\0"])
def test_the_cost_does_not_grow_with_the_buffer(start: bytes, octet: bytes) -> None:
    def steps(length: int) -> int:
        def run() -> None:
            with suppress(ProxyError):
                parse(start + octet * length)

        return steps_of(run)

    assert steps(40_000) <= steps(20_000)
