"""The compiled wire: lines, text, octets, whatever the split of the input."""

from __future__ import annotations

import itertools
import os
import re
import socket
from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from penstock.smtp import _wire
from penstock.smtp._wire import VERBS, Wire
from tests.reference.text import Text, read_text

NAMES = {
    0: "",
    _wire.BARE_LF: "bare_lf",
    _wire.BARE_CR: "bare_cr",
    _wire.NUL: "nul",
    _wire.LONG_LINE: "long_line",
    _wire.TOO_BIG: "too_big",
}
RULES = ("bare_lf", "bare_cr", "nul", "long_line")


def splits(data: bytes) -> Iterator[list[bytes]]:
    """Yield the input whole, byte by byte, and split at each position."""
    yield [data]
    yield [data[i : i + 1] for i in range(len(data))]
    for i in range(1, len(data)):
        yield [data[:i], data[i:]]


def commands(wire: Wire, pieces: Sequence[bytes]) -> list[tuple[int, str, bytes]]:
    """Feed pieces and return (token, verb, argument) of each command."""
    found = []
    for piece in pieces:
        wire.feed(piece)
        while (token := wire.next()) != _wire.NEED_DATA:
            is_command = token == _wire.COMMAND
            found.append((token, VERBS[wire.verb] if is_command else "", wire.argument if is_command else b""))
    return found


def text(wire: Wire, pieces: Sequence[bytes]) -> Text:
    """Feed the text behind a 354 and return what the wire makes of it."""
    wire.expect_text()
    body = b""
    for number, piece in enumerate(pieces):
        wire.feed(piece)
        while (token := wire.next()) != _wire.NEED_DATA:
            if token == _wire.CHUNK:
                assert not wire.violation
                body += wire.chunk
            elif token in (_wire.TEXT_END, _wire.TEXT_BROKEN):
                outcome = "end" if token == _wire.TEXT_END else "broken"
                violation = NAMES[wire.violation]
                data = b"".join(pieces)
                behind = wire.waiting + sum(map(len, pieces[number + 1 :]))
                return Text(outcome, body, violation, data[len(data) - behind :])
            else:
                assert token == _wire.VIOLATION
                assert wire.violation
    return Text("more", body, NAMES[wire.violation], b"")


# ---- commands

COMMANDS = [
    (b"NOOP\r\n", [(1, "NOOP", b"")]),
    (b"noop\r\nQuIt\r\n", [(1, "NOOP", b""), (1, "QUIT", b"")]),
    (b"MAIL FROM:<a@b>  \t\r\n", [(1, "MAIL", b"FROM:<a@b>")]),
    (b"MAIL \t FROM:<a@b> SIZE=1\r\n", [(1, "MAIL", b"FROM:<a@b> SIZE=1")]),
    (b"STARTTLS\r\n", [(1, "STARTTLS", b"")]),
    (b"BDAT 12 LAST\r\n", [(1, "BDAT", b"12 LAST")]),
    (b"XYZZY foo\r\n", [(1, "", b"XYZZY foo")]),
    (b" NOOP\r\n", [(1, "", b" NOOP")]),
    (b"\r\n", [(1, "", b"")]),
    (b"GET / HTTP/1.1\r\n", [(1, "HTTP", b"/ HTTP/1.1")]),
    (b"NOOP\n", [(_wire.LINE_BAD_END, "", b"")]),
    (b"NO\rOP\r\n", [(_wire.LINE_BAD_END, "", b"")]),
    (b"NOOP\r\r\n", [(_wire.LINE_BAD_END, "", b"")]),
    (b"NO\0OP\r\n", [(_wire.LINE_NUL, "", b"")]),
    (b"x" * 63 + b"\r\nNOOP\r\n", [(_wire.LINE_TOO_LONG, "", b""), (1, "NOOP", b"")]),
    (b"x" * 62 + b"\r\n", [(1, "", b"x" * 62)]),
    (b"x" * 200 + b"\r\nNOOP\r\n", [(_wire.LINE_TOO_LONG, "", b""), (1, "NOOP", b"")]),
]


@pytest.mark.parametrize(("data", "expected"), COMMANDS)
def test_commands_are_cut_the_same_whatever_the_split(data: bytes, expected: list[tuple[int, str, bytes]]) -> None:
    for pieces in splits(data):
        assert commands(Wire(line_limit=64), pieces) == expected, pieces


@pytest.mark.parametrize("verb", [verb for verb in VERBS if verb and verb != "HTTP"])
def test_every_verb_is_known_in_any_case(verb: str) -> None:
    for form in (verb, verb.lower(), verb.capitalize()):
        assert commands(Wire(), [form.encode() + b"\r\n"]) == [(1, verb, b"")]
        assert commands(Wire(), [form.encode() + b"x\r\n"])[0][1] == ""


@pytest.mark.parametrize("method", ["GET", "POST", "PUT", "HEAD", "DELETE", "CONNECT", "OPTIONS", "PATCH", "TRACE"])
def test_http_methods_are_distinguished_from_unknown_verbs(method: str) -> None:
    assert commands(Wire(), [f"{method} / HTTP/1.1\r\n".encode()])[0][1] == "HTTP"


def test_a_bare_lf_ends_a_command_where_it_is_accepted() -> None:
    for reject, normalize in (((), ()), ((), ("bare_lf",))):
        assert commands(Wire(reject=reject, normalize=normalize), [b"NOOP\nQUIT\n"]) == [
            (1, "NOOP", b""),
            (1, "QUIT", b""),
        ]


def test_lines_of_an_exchange_are_left_as_they_are() -> None:
    wire = Wire(line_limit=64)
    wire.expect_line()
    wire.feed(b" quit \r\n\r\n" + b"x" * 100 + b"\r\n")
    assert (wire.next(), wire.argument) == (_wire.COMMAND, b" quit ")
    assert (wire.next(), wire.argument) == (_wire.COMMAND, b"")
    assert wire.next() == _wire.LINE_TOO_LONG


@given(st.binary(max_size=300), st.integers(1, 20))
def test_commands_are_parsed_alike_for_any_split_of_the_input(data: bytes, step: int) -> None:
    pieces = [data[i : i + step] for i in range(0, len(data), step)]
    assert commands(Wire(line_limit=64), pieces) == commands(Wire(line_limit=64), [data])


# ---- text

TEXTS = [
    b".\r\n",
    b"\r\n.\r\n",
    b"hello\r\n.\r\nQUIT\r\n",
    b"..\r\n.\r\n",
    b"...\r\n..x\r\n.\r\n",
    b".x\r\n.\r\n",
    b"a\r\n.\n.\r\n.\r\n",
    b"a\n.\nb\r\n.\r\nrest",
    b"a\n.\r\nMAIL FROM:<x@y>\r\n.\r\n",
    b"a\r.\rb\r\n.\r\n",
    b"a\r\n.\rb\r\n.\r\n",
    b"a\r\n\r.\r\n.\r\nrest",
    b"a\r\n.\r\r\n.\r\n",
    b"a\r\r\n.\r\nQUIT\r\n",
    b"nul\0l\r\n.\r\n",
    b"\0\r\n.\r\n",
    b"x" * 64 + b"\r\n.\r\n",
    b"x" * 65 + b"\r\n.\r\n",
    b"x" * 64 + b"\r",
    b"x" * 64 + b"\ry\r\n.\r\n",
    b"." + b"x" * 64 + b"\r\n.\r\n",
    b"x" * 400 + b"\r\n.\r\n",
    (b"y" * 62 + b"\r\n") * 3 + b".\r\n",
    (b"y" * 61 + b"\r\n") * 3 + b".." + b"\r\n" * 70 + b".\r\n",
    b"\n" * 70 + b"\r\n.\r\n",
    b".\n.\n",
    b"a\r\n.\n",
    b"a\n.\r\n",
    b"\r",
    b".",
    b".\r",
    b"",
]
SETTINGS: list[tuple[Sequence[str], Sequence[str]]] = [
    (RULES, ()),
    ((), RULES),
    ((), ()),
    (("bare_lf",), ("nul", "long_line")),
    (("nul", "long_line"), ("bare_cr", "bare_lf")),
]


@pytest.mark.parametrize("vectors", [True, False])
@pytest.mark.parametrize(("reject", "normalize"), SETTINGS)
@pytest.mark.parametrize("data", TEXTS)
def test_text_reads_as_the_reference_does_whatever_the_split(
    data: bytes, reject: Sequence[str], normalize: Sequence[str], vectors: bool
) -> None:
    expected = read_text(data, reject=reject, normalize=normalize, limit=64)
    for pieces in splits(data):
        wire = Wire(text_line_limit=64, reject=reject, normalize=normalize, vectors=vectors)
        got = text(wire, pieces)
        assert same(got, expected), (pieces, got, expected)


def same(got: Text, expected: Text) -> bool:
    """Compare; the text before a violation may have been given out or not, since it is void."""
    if expected.violation:
        return (got.outcome, got.violation, got.rest) == (
            expected.outcome,
            expected.violation,
            expected.rest,
        ) and (expected.body.startswith(got.body))
    return got == expected


mail_octets = st.lists(
    st.sampled_from([b"\r\n", b"\r", b"\n", b".", b"\0", b"x", b"y" * 30, b"z" * 63, b"\r\n.", b".\r\n", b"\r\n.\r\n"])
    | st.binary(max_size=4),
    max_size=40,
).map(b"".join)


@settings(max_examples=400)
@given(
    data=mail_octets,
    cuts=st.lists(st.integers(0, 300), max_size=6),
    reject=st.sets(st.sampled_from(RULES)),
    normalize=st.sets(st.sampled_from(RULES)),
    most=st.sampled_from([0, 10, 100]),
    vectors=st.booleans(),
)
@example(data=b"x" * 63 + b"\r\n" * 40, cuts=[64], reject=set(), normalize=set(), most=0, vectors=True)
def test_any_text_reads_as_the_reference_does(
    data: bytes, cuts: list[int], reject: set[str], normalize: set[str], most: int, vectors: bool
) -> None:
    normalize -= reject
    places = [0, *sorted(cut for cut in cuts if cut < len(data)), len(data)]
    pieces = [data[a:b] for a, b in itertools.pairwise(places)]
    wire = Wire(
        text_line_limit=64,
        reject=sorted(reject),
        normalize=sorted(normalize),
        max_octets=most,
        vectors=vectors,
    )
    expected = read_text(data, reject=reject, normalize=normalize, limit=64, most=most)
    got = text(wire, pieces)
    if expected.violation == "too_big" or got.violation == "too_big":
        # How far a text is too big is told per piece, and another rule may be broken in the same one.
        assert got.violation
        assert expected.violation
        assert got.outcome == expected.outcome
        assert got.rest == expected.rest
    else:
        assert same(got, expected), (pieces, got, expected)


def test_a_discarded_body_is_counted_and_not_made() -> None:
    wire = Wire()
    wire.discard = True
    wire.expect_text()
    wire.feed(b"..a\r\nb\r\n.\r\nQUIT\r\n")
    assert wire.next() == _wire.TEXT_END
    assert wire.octets == len(b".a\r\nb\r\n")
    assert (wire.next(), VERBS[wire.verb]) == (_wire.COMMAND, "QUIT")


def test_a_text_that_is_too_big_is_dropped_up_to_its_end() -> None:
    wire = Wire(max_octets=10)
    wire.expect_text()
    tokens = []
    for piece in (b"12345\r\n", b"12345\r\n", b"more\r\n" * 1000, b".\r\nQUIT\r\n"):
        wire.feed(piece)
        while (token := wire.next()) != _wire.NEED_DATA:
            tokens.append(token)
    assert tokens == [_wire.CHUNK, _wire.VIOLATION, _wire.TEXT_END, _wire.COMMAND]
    assert wire.violation == _wire.TOO_BIG


# ---- octets


def octets(wire: Wire, data: bytes, chunks: Sequence[int], step: int) -> tuple[bytes, str]:
    """Read data as BDAT chunks of the given sizes, fed in pieces of `step` octets."""
    body = b""
    fed = 0
    for number, size in enumerate(chunks):
        wire.expect_octets(size, first=number == 0, last=number == len(chunks) - 1)
        while (token := wire.next()) != _wire.TEXT_END:
            if token == _wire.CHUNK:
                body += wire.chunk
            elif token == _wire.NEED_DATA:
                assert fed < len(data)
                wire.feed(data[fed : fed + step])
                fed += step
    return body, NAMES[wire.violation]


@pytest.mark.parametrize("tail", [b"\n\r", b"x\r", b"\r\r"])
def test_a_bdat_chunk_may_begin_and_end_next_to_a_cr(tail: bytes) -> None:
    data = b"abcd\r" + tail
    assert octets(Wire(reject=()), data, [5, len(tail)], 9) == (data, "")


@given(mail_octets, st.integers(0, 100), st.integers(1, 9))
def test_bdat_chunks_give_the_octets_as_they_are(data: bytes, cut: int, step: int) -> None:
    cut = min(cut, len(data))
    assert octets(Wire(reject=()), data, [cut, len(data) - cut], step) == (data, "")


@pytest.mark.parametrize(
    ("data", "cut", "violation"),
    [
        (b"a\r\nb\r\n", 2, ""),
        (b"a\r\nb\r\n", 6, ""),
        (b"a\rb", 2, "bare_cr"),
        (b"a\r", 2, "bare_cr"),
        (b"a\r", 1, "bare_cr"),
        (b"a\nb", 1, "bare_lf"),
        (b"\r\n.\r\n", 3, ""),
        (b"no line end", 4, ""),
        (b"a\0b", 1, "nul"),
        (b"x" * 70, 40, "long_line"),
    ],
)
def test_the_lines_of_bdat_chunks_are_looked_at_across_their_borders(data: bytes, cut: int, violation: str) -> None:
    for step in (1, 2, 3, 100):
        body, found = octets(Wire(text_line_limit=64), data, [cut, len(data) - cut], step)
        assert found == violation
        if not violation:
            assert body == data


@given(mail_octets, st.integers(0, 100), st.integers(0, 100), st.integers(1, 9))
def test_bdat_chunks_are_normalized_across_their_borders(data: bytes, cut: int, length: int, step: int) -> None:
    cut = min(cut, len(data))
    length = min(length, len(data) - cut)
    wire = Wire(text_line_limit=2000, reject=(), normalize=("bare_lf", "bare_cr"))
    expected = re.sub(rb"(?<!\r)\n", b"\r\n", re.sub(rb"\r(?!\n)", b" ", data))
    assert octets(wire, data, [cut, length, len(data) - cut - length], step) == (expected, "")
    assert wire.octets == len(expected)


def test_a_line_after_the_octets_is_a_command() -> None:
    wire = Wire()
    wire.feed(b"12345NOOP\r\n")
    wire.expect_octets(5)
    assert [wire.next(), wire.next(), wire.next()] == [_wire.CHUNK, _wire.TEXT_END, _wire.COMMAND]
    assert wire.chunk == b"12345"


# ---- the buffer


def test_a_wire_refuses_more_than_its_bound() -> None:
    wire = Wire()
    with pytest.raises(BufferError):
        for _ in range(20):
            wire.feed(b"NOOP\r\n" * 11_000)


def test_an_endless_line_takes_no_memory() -> None:
    wire = Wire()
    for _ in range(1000):
        wire.feed(b"x" * 60_000)
        assert wire.next() == _wire.NEED_DATA
        assert wire.waiting == 0
    wire.feed(b"\r\n")
    assert wire.next() == _wire.LINE_TOO_LONG


def test_rest_keeps_what_waits() -> None:
    wire = Wire()
    wire.feed(b"NOOP\r\nNO")
    assert wire.next() == _wire.COMMAND
    wire.rest()
    wire.feed(b"OP\r\n")
    assert wire.next() == _wire.COMMAND
    wire.rest()
    assert wire.waiting == 0


def test_drop_input_forgets_what_was_fed() -> None:
    wire = Wire()
    wire.feed(b"STARTTLS\r\nMAIL FROM:<evil@x>\r\nRC")
    wire.next()
    assert wire.drop_input() == len(b"MAIL FROM:<evil@x>\r\nRC")
    assert wire.next() == _wire.NEED_DATA


def test_a_wire_receives_from_a_socket() -> None:
    left, right = socket.socketpair()
    with left, right:
        right.setblocking(False)
        wire = Wire()
        assert wire.recv(right.fileno()) == -1
        left.send(b"NOOP\r\n")
        assert wire.recv(right.fileno()) == 6
        assert wire.next() == _wire.COMMAND
        left.close()
        assert wire.recv(right.fileno()) == 0


def test_a_wire_reports_a_broken_socket() -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(OSError, match="Bad file descriptor"):
        Wire().recv(read_end)


def test_wrong_settings_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 64"):
        Wire(text_line_limit=10)
    with pytest.raises(ValueError, match="one of: bare_lf"):
        Wire(reject=["bare_vowel"])
