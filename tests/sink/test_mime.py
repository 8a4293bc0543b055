"""The structure of messages: every part is found, can be decoded whole, and costs what its octets cost."""

from __future__ import annotations

import base64
import email
import itertools
import quopri

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.sink.web import mime
from penstock.sink.web.mime import Abandoned, Part, Work, read
from tests.sink.mails import FORWARDED, INVITATION, NEWSLETTER, REPORT, encoded, mixed, nested

_MIXED = b"Content-Type: multipart/mixed; boundary=b\r\n\r\n"


def parts(raw: bytes) -> list[Part]:
    return read(raw, Work()).parts


def tree(raw: bytes) -> list[tuple[int, str]]:
    return [(part.depth, part.type) for part in parts(raw)]


def contents(raw: bytes) -> list[bytes]:
    return [part.content(Work()) for part in parts(raw) if not part.has_parts]


def test_a_newsletter_has_its_parts_in_order() -> None:
    assert tree(NEWSLETTER) == [
        (0, "multipart/mixed"), (1, "multipart/alternative"), (2, "text/plain"), (2, "multipart/related"),
        (3, "text/html"), (3, "image/png"), (1, "application/pdf"),
    ]  # fmt: skip
    assert [part.content_id for part in parts(NEWSLETTER)][5] == "logo@example"
    assert parts(NEWSLETTER)[6].filename == "a b.pdf"


def test_an_embedded_message_is_whole_and_so_are_its_parts() -> None:
    assert tree(FORWARDED) == [(0, "multipart/mixed"), (1, "text/plain"), (1, "message/rfc822"), (2, "text/html")]
    _, _, embedded, inner = parts(FORWARDED)
    assert embedded.content(Work()).startswith(b"From: Inner")
    assert embedded.content(Work()).endswith(b"<b>inner</b>")
    assert (inner.within, inner.content(Work())) == (3, b"<b>inner</b>")


def test_an_embedded_message_in_base64_is_read() -> None:
    raw = encoded(b"Subject: x\r\n\r\ninner", b"Content-Type: message/rfc822\r\n")
    assert tree(raw) == [(0, "message/rfc822"), (1, "text/plain")]
    assert parts(raw)[0].content(Work()) == b"Subject: x\r\n\r\ninner"
    assert parts(raw)[1].content(Work()) == b"inner"


def test_the_parts_of_a_delivery_report_have_their_octets() -> None:
    assert contents(REPORT)[1].startswith(b"Reporting-MTA: dns; mx.example.org\r\n\r\nFinal-Recipient:")
    assert contents(REPORT)[2] == b"Subject: original"


def test_parts_of_a_digest_are_messages() -> None:
    raw = mixed(b"\r\nSubject: one\r\n\r\nfirst", kind=b"digest")
    assert tree(raw) == [(0, "multipart/digest"), (1, "message/rfc822"), (2, "text/plain")]


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        (b'Content-Type: multipart/mixed; boundary="b"\r\n\r\n--b\r\n\r\none\r\n--b\r\n\r\ntwo', [b"one", b"two"]),
        (b"Content-Type: multipart/mixed; boundary=b\n\n--b\n\none\n--b--\nepilogue", [b"one"]),
        (_MIXED + b"--b\r\nX: y\r\n--b--", [b""]),
        (_MIXED + b"--b \t\r\n\r\n--bb\r\n --b\r\nx--b\r\n--b--\r\n", [b"--bb\r\n --b\r\nx--b"]),
        (_MIXED + b"preamble\r\n--b--\r\n--b\r\n\r\nlate", [b"preamble\r\n--b--\r\n--b\r\n\r\nlate"]),
        (b"Content-Type: multipart/mixed\r\n\r\n--b\r\n\r\none", [b"--b\r\n\r\none"]),
        (b'Content-Type: multipart/mixed; boundary=""\r\n\r\n--\r\n\r\none', [b"--\r\n\r\none"]),
        (b"", [b""]),
    ],
)  # fmt: skip
def test_malformed_multiparts_lose_nothing_that_belongs_to_a_part(raw: bytes, found: list[bytes]) -> None:
    assert contents(raw) == found


def test_an_inner_multipart_without_an_end_stops_at_the_outer_one() -> None:
    inner = mixed(b"\r\none", boundary=b"in").removesuffix(b"--in--\r\n")
    assert contents(mixed(inner, b"\r\ntwo")) == [b"one\r\n", b"two"]


@given(
    st.recursive(
        st.binary(max_size=20).map(lambda data: b"\r\n" + data.replace(b"\n", b"").replace(b"\r", b"") + b"."),
        lambda inner: st.lists(inner, min_size=1, max_size=3).map(
            lambda each: mixed(*each, boundary=b"b%d" % len(b"".join(each)))
        ),
        max_leaves=8,
    )
)
def test_well_formed_mail_is_read_as_the_standard_library_reads_it(raw: bytes) -> None:
    walked = [part for part in email.message_from_bytes(raw).walk() if not part.is_multipart()]
    assert contents(raw) == [part.get_payload(decode=True) for part in walked]


@given(
    raw=st.sampled_from([NEWSLETTER, FORWARDED, REPORT, INVITATION]),
    cuts=st.lists(st.tuples(st.integers(0, 1200), st.integers(0, 80), st.binary(max_size=4)), max_size=4),
)
def test_damaged_mail_has_a_structure_whose_parts_are_within_each_other(
    raw: bytes, cuts: list[tuple[int, int, bytes]]
) -> None:
    for at, length, data in cuts:
        raw = raw[:at] + data + raw[at + length :]
    found = parts(raw)
    for part in found:
        assert part.start <= part.body <= part.end <= len(part.data)
        assert part.size(Work()) == len(part.content(Work()))
        assert part.within <= part.number < len(found)
    for one, other in itertools.pairwise(found):
        assert other.depth <= one.depth + 1
        if other.depth > one.depth and other.data is one.data:
            assert one.body <= other.start <= other.end <= one.end
        elif other.data is one.data:
            assert one.end <= other.start


@given(data=st.binary(max_size=300), cut=st.integers(0, 76))
def test_what_is_encoded_is_decoded(data: bytes, cut: int) -> None:
    text = base64.b64encode(data)
    lines = text[:cut] + b"\r\n !" + text[cut:] + b"\r\n"
    quoted = quopri.encodestring(data).replace(b"\n", b"\r\n")
    header = b"Content-Transfer-Encoding: "
    assert contents(header + b"BASE64\r\n\r\n" + lines) == [data]
    if b"\r" not in data and b"\n" not in data:
        assert contents(header + b"quoted-printable\r\n\r\n" + quoted) == [data]


@pytest.mark.parametrize(
    ("encoding", "text", "data"),
    [
        ("base64", b"YQ==YmM=", b"abc"),
        ("base64", b"YWJjZ", b"abc"),
        ("base64", b"YWI", b"ab"),
        ("base64", b"====", b""),
        ("quoted-printable", b"a=\r\nb=C3=BC=zz", b"ab\xc3\xbc=zz"),
        ("x-uuencode", b"begin 644 a\r\n#86)C\r\n#~~~~\r\n`\r\nend\r\n", b"abc"),
        ("binary", b"\x00\xff\r\n", b"\x00\xff\r\n"),
        ("x-unknown", b"as it is", b"as it is"),
    ],
)
def test_malformed_encodings_give_what_can_be_decoded(encoding: str, text: bytes, data: bytes) -> None:
    raw = b"Content-Transfer-Encoding: %b\r\n\r\n%b" % (encoding.encode(), text)
    (part,) = parts(raw)
    assert part.content(Work()) == data
    assert part.size(Work()) == len(data)
    assert part.content(Work(), 1) == data[:1]


@pytest.mark.parametrize("levels", [10, 200, 800])
def test_nested_multiparts_are_searched_once_per_level(levels: int) -> None:
    raw = nested(levels, 1_100_000)
    reader = mime._Reader(Work())
    reader.read(raw, 0, len(raw))
    assert len(reader.parts) == min(levels, mime.MAX_DEPTH) + 1
    assert reader.is_partial == (levels > mime.MAX_DEPTH)
    assert reader._scanned <= 2 * len(raw) * (min(levels, mime.MAX_DEPTH) + 1)


def test_parts_beyond_the_bound_stay_in_their_container() -> None:
    raw = mixed(*[b"\r\nx"] * 1500)
    structure = read(raw, Work())
    assert (len(structure.parts), structure.is_partial) == (mime.MAX_PARTS, True)
    assert len(structure.parts[0].content(Work())) > 1500 * 8


def test_lines_that_only_look_like_delimiters_have_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mime, "MAX_SCANNED", 1 << 20)
    raw = mixed(b"\r\n" + b"--bX\r\n" * 10_000, b"\r\nlast")
    structure = read(raw, Work())
    assert structure.is_partial
    assert structure.parts[-1].end == len(raw)


def test_work_that_nobody_waits_for_ends() -> None:
    work = Work()
    work.abandon()
    with pytest.raises(Abandoned):
        read(NEWSLETTER, work)
    (part,) = parts(INVITATION)[:1]
    with pytest.raises(Abandoned):
        part.content(work)


def test_a_text_that_is_not_base64_is_shown_as_it_is() -> None:
    text = b"\r\nHello, this is plain text.\r\nAGVsbG8=\r\n"
    (part,) = read(b"Content-Transfer-Encoding: base64\r\n\r\n" + text, Work()).parts
    assert part.content(Work()) == text
    assert part.size(Work()) == len(text)
    (part,) = read(b"Content-Transfer-Encoding: base64\r\n\r\naGVs \r\nbG8=\r\n-- \r\n", Work()).parts
    assert part.content(Work()) == b"hello"
