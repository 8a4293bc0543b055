"""SPF beyond the public suite."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.mailauth import spf
from tests.mailauth.zone import Table, run

ADDRESS = "192.0.2.1"


def check(
    table: Table, sender: str = "joe@example.com", address: str = ADDRESS, helo: str = "h.example"
) -> spf.SpfResult:
    result = run(spf.check(table.query, address=address, sender=sender, helo=helo))
    assert isinstance(result, spf.SpfResult)
    return result


def test_the_null_sender_is_judged_by_the_name_in_ehlo() -> None:
    result = check(Table().add("h.example", "TXT", b"v=spf1 ip4:192.0.2.0/24 -all"), sender="")
    assert (result.result, result.domain, result.identity) == ("pass", "h.example", "helo")


def test_a_mapped_address_is_its_ipv4_address() -> None:
    table = Table().add("example.com", "TXT", b"v=spf1 ip4:192.0.2.1 -all")
    assert check(table, address="::ffff:192.0.2.1").result == "pass"


def test_a_domain_in_unicode_is_asked_for_as_a_label() -> None:
    table = Table().add("xn--bcher-kva.example", "TXT", b"v=spf1 +all")
    result = check(table, sender="a@b\u00fccher.example")
    assert (result.result, result.domain) == ("pass", "xn--bcher-kva.example")


@pytest.mark.parametrize("name", ["example.com", "inc.example"])
def test_a_silent_dns_is_a_temporary_error(name: str) -> None:
    table = Table(failing={name}).add("example.com", "TXT", b"v=spf1 include:inc.example -all")
    assert check(table).result == "temperror"


def test_a_record_cannot_make_us_ask_without_end() -> None:
    table = Table()
    for number in range(40):
        table.add(f"{number}.example", "TXT", f"v=spf1 include:{number + 1}.example -all".encode())
    table.add("ring.example", "TXT", b"v=spf1 include:ring.example redirect=ring.example")
    assert check(table, "a@0.example").result == "permerror"
    assert len(table.asked) == 11
    assert check(table, "a@ring.example").result == "permerror"
    assert check(Table().add("example.com", "TXT", b"v=spf1 " + b"a " * 5000)).cause.endswith("too long")


def test_an_explanation_is_printable_and_short() -> None:
    table = Table().add("example.com", "TXT", b"v=spf1 -all exp=why.example")
    table.add("why.example", "TXT", b"%{s} may not send " + b"x" * 1000)
    result = check(table, sender="j\u00f6\r\n@example.com")
    assert result.explanation.startswith("j???@example.com may not send xxx")
    assert len(result.explanation) == spf.MAX_EXPLANATION


@pytest.mark.parametrize("record", [b"v=spf1 exp=no.example -all", b"v=spf1 exp=bad.example -all"])
def test_a_broken_explanation_is_none(record: bytes) -> None:
    table = Table(failing={"no.example"}).add("example.com", "TXT", record).add("bad.example", "TXT", b"%{x}")
    result = check(table)
    assert (result.result, result.explanation) == ("fail", "")


TERMS = """
all a mx ptr ip4:192.0.2.1 ip4:192.0.2.0/24 ip6:::1 include:b.example exists:%{i}.example redirect=b.example -all ~a
?mx exp=%{d} a:b.example/24//64 a/33 ip4:1.2.3 mx:%{l1r-}.b.example %{p} x=%{z} ptr:b.example =
"""
WORDS = st.lists(st.sampled_from(TERMS.split()))


@given(WORDS, st.sampled_from([ADDRESS, "2001:db8::1"]), st.binary(max_size=40))
def test_any_record_has_a_result_within_the_limits(words: list[str], address: str, junk: bytes) -> None:
    table = Table().add("b.example", "TXT", b"v=spf1 a mx ptr -all").add("b.example", "A", b"\xc0\0\2\1")
    table.add("example.com", "TXT", ("v=spf1 " + " ".join(words)).encode())
    table.add("junk.example", "TXT", b"v=spf1 " + junk)
    for sender in ("joe@example.com", "joe@junk.example"):
        table.asked.clear()
        result = check(table, sender, address)
        assert result.result in {"pass", "fail", "softfail", "neutral", "none", "permerror"}
        assert len(table.asked) <= 11 + 10 * 11
