"""All checks of a message, and what they decide."""

from __future__ import annotations

from typing import Any

import pytest

from penstock.mailauth import DecisionSettings, Judgement, MessageCheck, MethodResult, Told, spf
from penstock.mailauth.lookup import Answer, Kind
from tests.mailauth.test_dkim import BODY, HEAD, NOW, RSA, record, sign
from tests.mailauth.zone import Table, run

ENFORCE = DecisionSettings(spf="enforce", dkim="enforce", dmarc="enforce")


def zone(policy: str = "v=DMARC1; p=reject", spf_record: str = "v=spf1 ip4:192.0.2.1 -all") -> Table:
    table = Table().add("s1._domainkey.example.com", "TXT", record(RSA))
    if policy:
        table.add("_dmarc.example.com", "TXT", policy.encode())
    if spf_record:
        table.add("example.com", "TXT", spf_record.encode())
    return table


def judge(
    table: Table,
    head: bytes = HEAD,
    *,
    settings: DecisionSettings = ENFORCE,
    address: str = "192.0.2.1",
    sender: str = "joe@example.com",
    body: bytes = BODY,
) -> Judgement:
    async def main() -> Judgement:
        found = await spf.check(table.query, address=address, sender=sender, helo="client.example")
        check = MessageCheck(head, settings, now=NOW)
        check.feed(body)
        told = Told(
            "mx.example.org",
            found if settings.spf != "off" else None,
            sender,
            "client.example",
            [MethodResult("iprev", "pass", (("smtp.remote-ip", address),))],
        )
        judgement = await check.finish(table.query, **told._asdict())
        assert check.finish_known(lambda *question: run(table.query(*question)), told) == judgement
        return judgement

    judgement = run(main())
    assert isinstance(judgement, Judgement)
    return judgement


def field(judgement: Judgement) -> str:
    return judgement.header_field.decode().replace("\r\n\t", " ").strip()


def test_genuine_mail_passes() -> None:
    judgement = judge(zone(), sign())
    assert judgement.decisions.enforced.action == "accept"
    assert field(judgement) == (
        "Authentication-Results: mx.example.org; iprev=pass smtp.remote-ip=192.0.2.1;"
        " spf=pass smtp.mailfrom=joe@example.com; dkim=pass header.d=example.com header.s=s1;"
        " dmarc=pass header.from=example.com; arc=none"
    )


def test_forwarded_mail_with_an_aligned_signature_is_accepted() -> None:
    judgement = judge(zone(), sign(), address="198.51.100.9", sender="bounce@list.example")
    assert judgement.decisions.enforced.action == "accept"
    assert "spf=none smtp.mailfrom=bounce@list.example" in field(judgement)
    assert "dmarc=pass" in field(judgement)


def test_forged_mail_is_refused_or_only_counted() -> None:
    judgement = judge(zone(), address="198.51.100.9")
    decision = judgement.decisions.enforced
    assert (decision.action, decision.code, decision.status, decision.check) == ("reject", 550, "5.7.1", "dmarc")
    judgement = judge(zone(), address="198.51.100.9", settings=DecisionSettings())
    assert judgement.decisions.enforced.action == "accept"
    assert judgement.decisions.monitored == decision


def test_the_null_sender_is_reported_with_its_helo() -> None:
    table = zone().add("client.example", "TXT", b"v=spf1 -all")
    assert "spf=fail smtp.helo=client.example;" in field(judge(table, sender=""))


@pytest.mark.parametrize(
    ("policy", "action"),
    [("reject", "reject"), ("quarantine", "quarantine"), ("none", "accept"), ("reject; t=y", "quarantine")],
)
def test_the_policy_of_the_domain_decides(policy: str, action: str) -> None:
    assert judge(zone(f"v=DMARC1; p={policy}"), address="198.51.100.9").decisions.enforced.action == action


@pytest.mark.parametrize(
    ("failing", "policy", "action"),
    [
        ("_dmarc.example.com", "reject", "defer"),
        ("s1._domainkey.example.com", "reject", "defer"),
        ("s1._domainkey.example.com", "quarantine", "defer"),
        ("s1._domainkey.example.com", "none", "accept"),
        ("example.com", "reject", "defer"),
        ("example.com", "none", "accept"),
    ],
)
def test_temporary_trouble_defers_only_what_could_be_refused(failing: str, policy: str, action: str) -> None:
    table = zone(f"v=DMARC1; p={policy}")
    table.failing.add(failing)
    head = HEAD if failing == "example.com" else sign()
    judgement = judge(table, head, address="198.51.100.9")
    assert "dmarc=temperror" in field(judgement)
    decision = judgement.decisions.enforced
    assert decision.action == action
    assert decision.code == (451 if action == "defer" else 250)
    accepting = DecisionSettings(spf="enforce", dkim="enforce", dmarc="enforce", temperror="accept")
    assert judge(table, head, address="198.51.100.9", settings=accepting).decisions.enforced.action == "accept"


def test_a_dead_dns_does_not_matter_when_something_aligned_passes() -> None:
    table = zone()
    table.failing.add("s1._domainkey.example.com")
    assert judge(table, sign()).decisions.enforced.action == "accept"


def test_spf_refuses_only_without_dmarc_and_explains() -> None:
    table = zone("", "v=spf1 -all exp=why.example").add("why.example", "TXT", b"%{i} is not ours")
    assert judge(table).decisions.enforced.action == "accept"
    off: dict[str, Any] = {"spf": "enforce", "dkim": "enforce", "dmarc": "off"}
    decision = judge(table, settings=DecisionSettings(**off)).decisions.enforced
    assert (decision.code, decision.status) == (550, "5.7.23")
    assert decision.text.endswith("example.com explains: 192.0.2.1 is not ours")
    table.failing.add("example.com")
    decision = judge(table, settings=DecisionSettings(**off)).decisions.enforced
    assert (decision.code, decision.status) == (451, "4.7.24")
    assert judge(zone("", "v=spf1 nonsense"), settings=DecisionSettings(**off)).decisions.enforced.action == "accept"
    assert judge(zone("", "v=spf1 ~all"), settings=DecisionSettings(**off)).decisions.enforced.action == "accept"


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (sign(), ""),
        (HEAD, "5.7.20"),
        (sign().replace(b"dinner", b"supper"), "5.7.20"),
        (sign().replace(b"rsa-sha256", b"rsa-sha1"), "5.7.21"),
        (sign(head=HEAD.replace(b"example.com", b"other.example")), "5.7.22"),
    ],
)
def test_an_aligned_signature_may_be_required(head: bytes, status: str) -> None:
    required = DecisionSettings(spf="off", dkim="enforce", dmarc="off", require_aligned=True)
    decision = judge(zone(), head, settings=required).decisions.enforced
    assert (decision.status, decision.code) == (status, 550 if status else 250)


@pytest.mark.parametrize(
    "head",
    [HEAD + b"From: joe@example.com\r\n", b"From: joe@example.com, eve@example.net\r\n"],
    ids=["two fields", "two domains"],
)
def test_several_authors_never_pass(head: bytes) -> None:
    judgement = judge(zone(), head)
    decision = judgement.decisions.enforced
    assert (decision.code, decision.status) == (550, "5.6.0")
    assert "dmarc=permerror" in field(judgement)
    watched = judge(zone(), head, settings=DecisionSettings())
    assert watched.decisions.enforced.action == "accept"
    assert watched.decisions.monitored == decision


def test_several_authors_of_one_domain_are_one() -> None:
    judgement = judge(zone(), b"From: joe@example.com, ann@example.com\r\n")
    assert "dmarc=pass" in field(judgement)


def test_a_message_without_an_author_is_accepted_without_pass() -> None:
    judgement = judge(zone(), b"Subject: x\r\n")
    assert judgement.decisions.enforced.action == "accept"
    assert "dmarc=permerror;" in field(judgement)


def test_forged_results_are_named_and_hints_are_what_is_asked() -> None:
    head = b"Authentication-Results: MX.example.org; dmarc=pass\r\n" + sign()
    judgement = judge(zone(), head)
    assert [head[each.start : each.stop] for each in judgement.forged] == [head.partition(b"\r\n")[0] + b"\r\n"]
    assert MessageCheck(head, ENFORCE, now=NOW).hints == [
        ("s1._domainkey.example.com", "TXT"),
        ("_dmarc.example.com", "TXT"),
    ]


def test_hints_for_a_subdomain_leave_no_question_to_wait_for() -> None:
    # example.com asks for DMARC, and nobody else does: the walk goes up to the top-level domain.
    head = HEAD.replace(b"@example.com", b"@news.example.com")
    table = zone()
    asked: list[tuple[str, Kind]] = []

    async def main() -> Judgement:
        check = MessageCheck(head, ENFORCE, now=NOW)
        check.feed(BODY)
        hints = check.hints

        async def query(name: str, kind: Kind) -> Answer:
            if (name, kind) not in hints:
                asked.append((name, kind))
            return await table.query(name, kind)

        return await check.finish(query, authserv_id="mx", spf=None, mail_from="", helo="client.example")

    judgement = run(main())
    assert "dmarc=fail header.from=news.example.com" in field(judgement)
    assert asked == []


def test_the_hints_of_any_header_are_bounded() -> None:
    labels = b".".join(b"a%d" % number for number in range(40))
    seals = b"".join(
        b"DKIM-Signature: v=1; a=rsa-sha256; d=d%d.example; s=s; h=from; bh=YQ==; b=YQ==\r\n" % number
        for number in range(60)
    )
    hints = MessageCheck(seals + b"From: joe@" + labels + b".example\r\n", ENFORCE, now=NOW).hints
    assert len(hints) == 5 + 8


def test_a_judgement_is_known_when_all_that_it_needs_is_cached() -> None:
    table = zone()
    check = MessageCheck(sign(), ENFORCE, now=NOW)
    check.feed(BODY)
    told = Told("mx.example.org", None, "joe@example.com", "client.example")
    for unknown in check.hints:

        def cached(*question: Any, unknown: Any = unknown) -> Answer | None:
            return None if question == unknown else run(table.query(*question))

        assert check.finish_known(cached, told) is None
    judgement = check.finish_known(lambda *question: run(table.query(*question)), told)
    assert judgement is not None
    assert judgement.decisions.enforced.action == "accept"


def test_spf_is_known_when_all_that_it_needs_is_cached() -> None:
    table = Table()
    table.add("example.com", "TXT", b"v=spf1 include:a.example include:b.example -all")
    table.add("a.example", "TXT", b"v=spf1 ip4:198.51.100.0/24 -all").add(
        "b.example", "TXT", b"v=spf1 ip4:192.0.2.0/24 ?all"
    )
    known: set[str] = set()

    def check() -> str | None:
        found = spf.check_known(
            lambda name, kind: run(table.query(name, kind)) if name in known else None,
            address="192.0.2.1",
            sender="joe@example.com",
            helo="client.example",
        )
        return None if found is None else found.result

    for name in ("example.com", "a.example", "b.example"):
        assert check() is None
        known.add(name)
    assert check() == "pass"
