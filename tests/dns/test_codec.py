"""The codec of DNS messages, with dnspython as the oracle."""

from __future__ import annotations

import string

import dns.exception
import dns.flags
import dns.message
import dns.name
import dns.rdatatype
import dns.rrset
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from penstock.dns import _codec as codec
from penstock.dns.resolver import KINDS

LABELS = st.text(string.ascii_letters + string.digits + "-_", min_size=1, max_size=63)
NAMES = st.lists(LABELS, min_size=1, max_size=5).map(".".join).filter(lambda name: len(name) <= 253)
A, CNAME, TXT = KINDS["A"], KINDS["CNAME"], KINDS["TXT"]


def response(
    name: str, kind: str, *records: str, rcode: int = 0, others: tuple[dns.rrset.RRset, ...] = ()
) -> tuple[bytes, bytes]:
    """Return a response that dnspython wrote, and our query."""
    query = codec.encode_query(77, name, dns.rdatatype.from_text(kind))
    message = dns.message.make_response(dns.message.from_wire(query))
    message.flags |= dns.flags.RA
    message.set_rcode(rcode)  # type: ignore[arg-type]
    if records:
        message.answer.append(dns.rrset.from_text(f"{name}.", 300, "IN", kind, *records))
    message.answer.extend(others)
    return message.to_wire(), query


@given(NAMES, st.sampled_from(sorted(KINDS)), st.integers(0, 65535), st.booleans())
def test_a_query_is_read_as_it_was_meant(name: str, kind: str, ident: int, edns: bool) -> None:
    message = dns.message.from_wire(codec.encode_query(ident, name, dns.rdatatype.from_text(kind), edns))
    assert message.id == ident
    assert message.question[0].name == dns.name.from_text(name)
    assert dns.rdatatype.to_text(message.question[0].rdtype) == kind
    assert message.flags == dns.flags.RD | dns.flags.AD
    assert message.payload == (codec.MAX_PAYLOAD if edns else 0)
    assert message.edns == (0 if edns else -1)


@pytest.mark.parametrize("name", ["a..b", ".a", "a" * 64, "a.b..", ".".join(["a" * 63] * 4), ".."])
def test_a_name_that_is_none_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match="octets"):
        codec.encode_query(1, name, A)


@pytest.mark.parametrize("name", ["", ".", "example.org.", ".".join(["a" * 63] * 3 + ["b" * 61])])
def test_the_root_and_the_longest_name_are_names(name: str) -> None:
    assert dns.message.from_wire(codec.encode_query(1, name, A)).question[0].name == dns.name.from_text(name or ".")


@pytest.mark.parametrize(
    ("kind", "records", "expected"),
    [
        ("A", ["192.0.2.1"], (b"\xc0\x00\x02\x01",)),
        ("AAAA", ["2001:db8::1"], (bytes.fromhex("20010db8000000000000000000000001"),)),
        ("MX", ["10 Mx.Example.ORG."], ((10, "mx.example.org"),)),
        ("MX", ["0 ."], ((0, ""),)),
        ("TXT", ['"v=spf1 " "-all"'], (b"v=spf1 -all",)),
        ("TXT", ['""'], (b"",)),
        ("PTR", ["host.example."], ("host.example",)),
        ("PTR", ["a\\.b.example."], ("a\\046b.example",)),
        ("TLSA", ["3 1 1 " + "ab" * 32], ((3, 1, 1, b"\xab" * 32),)),
    ],
)
def test_records_have_the_form_of_their_type(kind: str, records: list[str], expected: tuple[object, ...]) -> None:
    wire, query = response("example.org", kind, *records)
    assert codec.decode_response(wire, query) == (0, False, False, True, "example.org", expected, 300)


def test_aliases_are_followed_in_any_order_and_only_to_their_end() -> None:
    others = (
        dns.rrset.from_text("c.example.", 50, "IN", "A", "192.0.2.9"),
        dns.rrset.from_text("other.example.", 10, "IN", "A", "192.0.2.66"),
        dns.rrset.from_text("b.example.", 40, "IN", "CNAME", "c.example."),
        dns.rrset.from_text("A.example.", 60, "IN", "CNAME", "B.example."),
    )
    wire, query = response("a.example", "A", others=others)
    assert codec.decode_response(wire, query) == (0, False, False, True, "c.example", (b"\xc0\x00\x02\x09",), 40)


def test_a_ring_of_aliases_is_malformed() -> None:
    others = (
        dns.rrset.from_text("a.example.", 60, "IN", "CNAME", "b.example."),
        dns.rrset.from_text("b.example.", 60, "IN", "CNAME", "a.example."),
    )
    with pytest.raises(codec.MalformedMessageError, match="aliases"):
        codec.decode_response(*response("a.example", "A", others=others))


def test_records_of_other_names_are_not_believed() -> None:
    wire, query = response("a.example", "A", others=(dns.rrset.from_text("bank.example.", 60, "IN", "A", "192.0.2.1"),))
    assert codec.decode_response(wire, query)[5] == ()


def test_an_absence_lasts_as_long_as_its_soa_says() -> None:
    wire, query = response("a.example", "A", rcode=3)
    message = dns.message.from_wire(wire)
    message.authority.append(dns.rrset.from_text("example.", 900, "IN", "SOA", "ns.example. h.example. 1 2 3 4 60"))
    assert codec.decode_response(message.to_wire(), query) == (3, False, False, True, "a.example", (), 60)
    assert codec.decode_response(wire, query)[6] is None


def test_a_question_in_other_letters_is_the_same_and_another_is_not() -> None:
    wire, query = response("a.example", "A", "192.0.2.1")
    assert codec.is_response_to(wire.replace(b"example", b"eXaMple", 1), query)
    assert not codec.is_response_to(wire.replace(b"example", b"exbmple", 1), query)
    assert not codec.is_response_to(b"\0\0" + wire[2:], query)
    assert not codec.is_response_to(query, query)
    for cut in range(len(wire)):
        codec.is_response_to(wire[:cut], query)


def header(answers: int = 1) -> tuple[bytes, bytes]:
    """Return the start of a response to `a.example A`, and the query."""
    query = codec.encode_query(1, "a.example", A)
    return b"\0\1\x81\x80\0\1" + bytes([answers >> 8, answers & 255]) + b"\0\0\0\0" + query[12:-11], query


RECORD = b"\0\1\0\1\0\0\0\x3c\0\4\xc0\0\2\1"


@pytest.mark.parametrize(
    "name",
    [b"\xc0\x1b", b"\xc0\x1c", b"\xc0\xff", b"\xc0", b"\xc0\x00", b"\x40a", b"\x01a\xc0\x1b", b"\x3f" + b"a" * 20],
    ids=["itself", "behind", "outside", "cut", "header", "label type", "loop", "cut label"],
)
def test_a_name_that_loops_or_leaves_the_message_is_malformed(name: bytes) -> None:
    start, query = header()
    assert len(start) == 0x1B
    with pytest.raises(codec.MalformedMessageError):
        codec.decode_response(start + name + RECORD, query)


def test_a_name_made_too_long_by_a_pointer_is_malformed() -> None:
    query = codec.encode_query(1, ".".join(["a" * 63] * 3), A)
    start = b"\0\1\x81\x80\0\1\0\1\0\0\0\0" + query[12:-11]
    assert codec.decode_response(start + b"\x3b" + b"b" * 59 + b"\xc0\x0c" + RECORD, query)[5] == ()
    with pytest.raises(codec.MalformedMessageError, match="too long"):
        codec.decode_response(start + b"\x3f" + b"b" * 63 + b"\xc0\x0c" + RECORD, query)


def test_too_many_records_are_malformed() -> None:
    start, query = header(codec.MAX_RECORDS + 1)
    with pytest.raises(codec.MalformedMessageError, match="too many"):
        codec.decode_response(start + (b"\xc0\x0c" + RECORD) * (codec.MAX_RECORDS + 1), query)


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_every_cut_of_a_response_is_malformed(kind: str) -> None:
    data = {"A": "192.0.2.1", "AAAA": "::1", "MX": "1 m.example.", "TXT": '"a" "b"', "TLSA": "3 0 0 abcd"}
    wire, query = response("example.org", kind, data.get(kind, "b.example."))
    for cut in range(len(wire)):
        with pytest.raises(codec.MalformedMessageError):
            codec.decode_response(wire[:cut], query)


@given(st.data())
def test_a_damaged_response_is_read_as_dnspython_does_or_refused(data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["A", "MX", "TXT", "PTR"]))
    text = {"A": "192.0.2.1", "MX": "1 m.example.org.", "TXT": '"some text"', "PTR": "b.example.org."}[kind]
    wire, query = response("a.example.org", kind, text)
    damaged = bytearray(wire)
    for _ in range(data.draw(st.integers(1, 4))):
        damaged[data.draw(st.integers(0, len(wire) - 1))] = data.draw(st.integers(0, 255))
    try:
        rcode, truncated, _, _, name, records, _ = codec.decode_response(bytes(damaged), query)
    except codec.MalformedMessageError:
        return
    try:
        message = dns.message.from_wire(bytes(damaged), ignore_trailing=True, raise_on_truncation=False)
    except (dns.exception.DNSException, ValueError, KeyError):
        return  # stricter than we need to be: additional records, classes, options
    assert rcode == message.rcode()
    found = [rrset for rrset in message.answer if rrset.rdtype == dns.rdatatype.from_text(kind)]
    owners = {rrset.name.to_text(omit_final_dot=True).lower() for rrset in found if rrset.rdclass == 1}
    assert truncated or len(records) <= sum(map(len, found))
    assert not records or name in owners


@given(st.binary(max_size=300))
@example(b"\0" * 12)
def test_any_octets_are_a_response_or_malformed(tail: bytes) -> None:
    query = codec.encode_query(1, "a.example", A)
    for start in (header(3)[0], header(65535)[0], b"", query[:2] + b"\x80\0\0\1"):
        try:
            result = codec.decode_response(start + tail, query)
        except codec.MalformedMessageError:
            continue
        assert len(result) == 7
