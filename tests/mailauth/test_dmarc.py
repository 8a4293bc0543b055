"""DMARC (RFC 9989), with the examples of its appendix."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from penstock.mailauth import dmarc
from penstock.mailauth.dkim import DkimResult
from penstock.mailauth.spf import SpfResult
from tests.mailauth.zone import Table, run


def table_of(**records: str) -> Table:
    """Return a zone of policy records; "_" in a name stands for a dot."""
    table = Table()
    for name, record in records.items():
        table.add("_dmarc." + name.replace("_", "."), "TXT", record.encode())
    return table


def check(table: Table, domain: str, *, spf: str = "", dkim: str = "", results: str = "pass") -> dmarc.DmarcResult:
    spf_result = SpfResult(results, spf, "mailfrom") if spf else None  # type: ignore[arg-type]
    dkim_results = [DkimResult(results, each, "s") for each in dkim.split()]  # type: ignore[arg-type]
    result = run(dmarc.check(table.query, domain, spf_result, dkim_results))
    assert isinstance(result, dmarc.DmarcResult)
    return result


REJECT = "v=DMARC1; p=reject"


def test_eight_names_are_asked_for_at_most() -> None:
    asked = dmarc.names_to_ask("a.b.c.d.e.f.g.h.i.j.mail.example.com")
    assert asked == [
        "a.b.c.d.e.f.g.h.i.j.mail.example.com", "g.h.i.j.mail.example.com", "h.i.j.mail.example.com",
        "i.j.mail.example.com", "j.mail.example.com", "mail.example.com", "example.com", "com",
    ]  # fmt: skip
    assert dmarc.names_to_ask("a.b.c.d.e.f.example.com")[1] == "b.c.d.e.f.example.com"
    assert dmarc.names_to_ask("com") == ["com"]


def test_the_simple_example_of_the_rfc() -> None:
    table = table_of(example_com=REJECT, signing_example_com=REJECT)
    assert check(table, "example.com", dkim="signing.example.com").result == "pass"
    assert check(table, "example.com", spf="example.com").result == "pass"


def test_the_deep_example_of_the_rfc() -> None:
    table = table_of(example_com=REJECT, signing_example_com=REJECT)
    result = check(table, "a.b.c.d.e.f.g.h.i.j.k.example.com", dkim="signing.example.com")
    assert (result.result, result.policy_domain, result.policy) == ("pass", "example.com", "reject")
    assert ("_dmarc.f.g.h.i.j.k.example.com", "TXT") not in table.asked
    assert len([name for name, _ in table.asked if name.startswith("_dmarc.")]) <= 1 + 8 + 3


def test_the_public_suffix_example_of_the_rfc() -> None:
    table = table_of(bank_example="v=DMARC1; psd=y; p=reject", giant_bank_example="v=DMARC1; p=quarantine")
    assert check(table, "giant.bank.example", spf="mail.giant.bank.example").result == "pass"
    result = check(table, "giant.bank.example", dkim="mail.mega.bank.example")
    assert (result.result, result.policy, result.policy_domain) == ("fail", "quarantine", "giant.bank.example")
    result = check(table, "mail.mega.bank.example", dkim="mega.bank.example")
    assert (result.result, result.policy_domain) == ("pass", "bank.example")


@pytest.mark.parametrize(
    ("record", "domain", "authenticated", "expected"),
    [
        ("v=DMARC1; p=reject", "example.com", "example.com", "pass"),
        ("v=DMARC1; p=reject", "example.com", "mail.example.com", "pass"),
        ("v=DMARC1; p=reject", "mail.example.com", "example.com", "pass"),
        ("v=DMARC1; p=reject", "a.example.com", "b.example.com", "pass"),
        ("v=DMARC1; p=reject", "example.com", "notexample.com", "fail"),
        ("v=DMARC1; p=reject", "example.com", "example.com.evil.net", "fail"),
        ("v=DMARC1; p=reject", "example.com", "com", "fail"),
        ("v=DMARC1; p=reject; adkim=s", "example.com", "mail.example.com", "fail"),
        ("v=DMARC1; p=reject; adkim=s", "example.com", "example.com", "pass"),
        ("v=DMARC1; p=reject; aspf=s", "example.com", "mail.example.com", "pass"),
        ("v=DMARC1; p=reject; psd=n", "a.example.com", "b.example.com", "pass"),
        ("v=DMARC1; p=reject; psd=y", "a.example.com", "b.example.com", "fail"),
    ],
)
def test_alignment_is_strict_or_by_organization(record: str, domain: str, authenticated: str, expected: str) -> None:
    assert check(table_of(example_com=record), domain, dkim=authenticated).result == expected


def test_an_organization_below_another_is_one_of_its_own() -> None:
    table = table_of(example_com=REJECT, dept_example_com="v=DMARC1; p=none; psd=n")
    assert check(table, "a.dept.example.com", dkim="example.com").result == "fail"
    assert check(table, "example.com", dkim="dept.example.com").result == "fail"


@pytest.mark.parametrize(
    ("record", "domain", "expected"),
    [
        ("v=DMARC1; p=reject", "example.com", "reject"),
        ("v=DMARC1;p=REJECT;", "example.com", "reject"),
        ("v=DMARC1; p=reject; sp=none", "example.com", "reject"),
        ("v=DMARC1; p=reject; sp=none", "real.example.com", "none"),
        ("v=DMARC1; p=none; np=reject", "real.example.com", "none"),
        ("v=DMARC1; p=none; np=reject", "fake.example.com", "reject"),
        ("v=DMARC1; p=none; sp=quarantine", "fake.example.com", "quarantine"),
        ("v=DMARC1; p=reject; t=y", "example.com", "quarantine"),
        ("v=DMARC1; p=quarantine; t=y", "example.com", "none"),
        ("v=DMARC1; p=none; t=y", "example.com", "none"),
        ("v=DMARC1; pct=0; p=reject", "example.com", "reject"),
        ("v=DMARC1", "example.com", "none"),
        ("v=DMARC1; p=nonsense; rua=mailto:a@example.com", "example.com", "none"),
        ("v=DMARC1; p=reject; sp=nonsense; rua=mailto:a@example.com", "example.com", "none"),
        ("v = DMARC1 ; p = reject ; unknown=1; nonsense", "example.com", "reject"),
    ],
)
def test_the_policy_is_that_of_the_domain(record: str, domain: str, expected: str) -> None:
    table = table_of(example_com=record).add("real.example.com", "A", b"\xc0\0\2\1")
    result = check(table, domain)
    assert (result.result, result.policy) == ("fail", expected)


@pytest.mark.parametrize(
    "record",
    [
        "v=DMARC2; p=reject",
        "V=dmarc1; p=reject",
        "p=reject; v=DMARC1",
        "v=DMARC1; p=nonsense",
        "v=spf1 -all",
        "",
        "x" * 9,
    ],
)
def test_what_is_no_record_is_none(record: str) -> None:
    assert check(table_of(example_com=record), "example.com").result == "none"


def test_two_records_are_none() -> None:
    table = table_of(example_com=REJECT).add("_dmarc.example.com", "TXT", b"v=DMARC1; p=none")
    assert check(table, "example.com").result == "none"
    table.records["_dmarc.example.com", "TXT"][1] = b"v=spf1 -all"
    assert check(table, "example.com").result == "fail"


@pytest.mark.parametrize("name", ["_dmarc.mail.example.com", "_dmarc.example.com"])
def test_a_silent_dns_is_a_temporary_error(name: str) -> None:
    table = table_of(mail_example_com=REJECT)
    table.failing.add(name)
    assert check(table, "mail.example.com", dkim="other.net").result == "temperror"
    own = check(table, "mail.example.com", dkim="mail.example.com").result
    assert own == ("temperror" if "mail" in name else "pass")


def test_a_silent_top_level_domain_has_no_record() -> None:
    table = table_of(example_com=REJECT)
    table.failing.add("_dmarc.com")
    assert check(table, "example.com", dkim="other.net").result == "fail"
    assert check(table, "example.net", dkim="other.net").result == "none"


def test_a_temporary_result_counts_when_it_could_have_passed() -> None:
    table = table_of(example_com=REJECT)
    assert check(table, "example.com", dkim="example.com", results="temperror").result == "temperror"
    assert check(table, "example.com", spf="other.net", results="temperror").result == "fail"
    assert check(table, "example.com", spf="mail.example.com", results="temperror").policy == "reject"
    assert check(table, "example.com", dkim="example.com", results="permerror").result == "fail"


def test_a_pass_needs_one_question_when_all_is_one_domain() -> None:
    table = table_of(example_com=REJECT)
    assert check(table, "example.com", dkim="example.com").result == "pass"
    assert table.asked == [("_dmarc.example.com", "TXT")]


def test_walks_are_bounded() -> None:
    table = table_of(example_com=REJECT, **{f"d{n}_example_com": "v=DMARC1; p=none; psd=n" for n in range(9)})
    result = check(table, "example.com", dkim=" ".join(f"d{number}.example.com" for number in range(9)))
    assert result.result == "fail"
    assert len(table.asked) < 1 + 8 * (dmarc.MAX_WALKS + 1)


@given(st.binary(max_size=100))
def test_any_octets_are_a_record_or_none(junk: bytes) -> None:
    for record in (dmarc.parse(junk), dmarc.parse(b"v=DMARC1;" + junk)):
        assert record is None or record.policy in {"none", "quarantine", "reject"}
