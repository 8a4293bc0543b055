"""Header fields: encoded words, parameters, addresses, and what malformed ones become."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sink.web.fields import (
    Address,
    decode_words,
    read_addresses,
    read_header,
    read_parameters,
)


@pytest.mark.parametrize(
    ("raw", "fields", "body"),
    [
        (b"A: 1\r\nB:\r\n two\r\n\r\nbody", [("A", "1"), ("B", "two")], b"body"),
        (b"A: 1\nB : 2\n\nbody", [("A", "1"), ("B", "2")], b"body"),
        (b"\r\nbody", [], b"body"),
        (b"no field\r\nA: 1\r\n", [], b"no field\r\nA: 1\r\n"),
        (b"A: 1\r\nno field\r\n\r\n", [("A", "1")], b"no field\r\n\r\n"),
        (b"From me Mon Jan 1\r\nA: 1\r\n\r\nx", [("A", "1")], b"x"),
        (b"A: gr\xc3\xbc\xdf", [("A", "grÃ¼ß")], b""),
        (b"", [], b""),
    ],
)
def test_a_header_ends_at_an_empty_line_or_no_field(raw: bytes, fields: list[tuple[str, str]], body: bytes) -> None:
    found, at = read_header(raw, 0, len(raw))
    assert [(each.name, each.value) for each in found] == fields
    assert raw[at:] == body


@pytest.mark.parametrize(
    ("text", "decoded"),
    [
        ("=?utf-8?q?gr=C3=BC=C3=9Fe_x?= y", "grüße x y"),
        ("a =?iso-8859-1*de?Q?=80?= b", "a € b"),
        ("=?utf-8?b?w7w?= =?utf-8?b?w58=?=", "üß"),
        ("=?utf-8?q?=C3?= =?utf-8?q?=BC?=", "ü"),
        ("=?utf-8?q?a?= =?koi8-r?q?=C1?=", "aа"),
        ("=?no-such?b?////?= =?utf-8?q?a?x", "ÿÿÿ =?utf-8?q?a?x"),
        ("=?utf-8?q?two words?=", "two words"),
        ("=?iso-2022-jp?b?GyRCLSEbKEI=?=", "①"),
        ("=?utf-7?q?+2AA-?=", "+2AA-"),
    ],
)
def test_encoded_words_are_decoded(text: str, decoded: str) -> None:
    assert decode_words(text) == decoded


@pytest.mark.parametrize(
    ("value", "name"),
    [
        ("attachment; filename=a b c.pdf", "a b c.pdf"),
        ('attachment; filename="a;b \\"c\\".pdf"; size=1', 'a;b "c".pdf'),
        (r'attachment; filename="C:\dir\a.txt"', r"C:\dir\a.txt"),
        ("attachment; filename*=utf-8''gr%C3%BC%C3%9Fe.txt", "grüße.txt"),
        ("attachment; filename*=iso-8859-1'de'%80.txt; filename=euro.txt", "€.txt"),
        ('attachment; filename*0=a; filename*1="b c"; filename*2=.txt', "ab c.txt"),
        ("attachment; filename*0*=utf-8''%C3; filename*1*=%BC; filename*2=.txt", "ü.txt"),
        ("attachment; filename*1=b; filename*0=a", "ab"),
        ('attachment; filename="=?utf-8?q?gr=C3=BC=C3=9Fe.txt?="', "grüße.txt"),
        ("attachment; filename==?utf-8?q?=C3=BC.txt?=", "ü.txt"),
        ('attachment; filename="unfinished', "unfinished"),
        ("attachment; FILENAME=a; filename=b", "a"),
        ("attachment; filename*=a\0b''x", "x"),
        ("attachment; filename*=", ""),
        ("attachment; filename*3=x", ""),
    ],
)
def test_file_names_are_read_in_every_encoding(value: str, name: str) -> None:
    kind, parameters = read_parameters(value)
    assert (kind, parameters["filename"]) == ("attachment", name)


@pytest.mark.parametrize(
    ("value", "addresses"),
    [
        ("Alice <a@b.c>, b@c.d", [("Alice", "a@b.c"), ("", "b@c.d")]),
        ('"Smith, J." <j@b.c>', [("Smith, J.", "j@b.c")]),
        ("=?utf-8?q?J=C3=BCrgen=2C_A?= <j@b.c>", [("Jürgen, A", "j@b.c")]),
        ("=?utf-8?q?a:b,c?= <j@b.c>", [("a:b,c", "j@b.c")]),
        ('"=?utf-8?q?=C3=BC?=" <j@b.c>', [("ü", "j@b.c")]),
        ("j@b.c (Jürgen)", [("Jürgen", "j@b.c")]),
        ("group: a@b.c, d@e.f;", [("", "a@b.c"), ("", "d@e.f")]),
        ("undisclosed-recipients:;", []),
        ("nobody", [("nobody", "")]),
        ("<>", []),
        ('"unfinished <a@b', [("", "unfinished<a@b")]),
        ("", []),
    ],
)
def test_addresses_are_read(value: str, addresses: list[tuple[str, str]]) -> None:
    assert read_addresses(value) == [Address(*each) for each in addresses]


@given(st.text(alphabet="a=?qb:;,\"<>()*'\\ @%\t", max_size=60))
def test_every_field_can_be_read(value: str) -> None:
    decode_words(value)
    read_parameters(value)
    read_addresses(value)


@pytest.mark.parametrize("piece", ["=?utf-8?q?", '"', "a <", "; a=", "; a*0=", "(", "=?", "\\", "a@b,"])
def test_long_fields_take_linear_time(piece: str) -> None:
    """Twice the length takes twice the steps: counted in characters that the functions return, not in seconds."""
    value = piece * (200_000 // len(piece))
    assert len(decode_words(value)) <= len(value)
    assert len(read_addresses(value)) <= 1000
    assert len(read_parameters(value)[1]) <= 200
