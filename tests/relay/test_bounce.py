"""Reports, read by the parser of the standard library and held against RFC 3464."""

from __future__ import annotations

import email
import email.policy
import re
from email.message import EmailMessage
from email.message import Message as ParsedMessage
from email.utils import parsedate_to_datetime
from typing import Any, cast

import pytest

from penstock.message import NULL_PATH, Envelope, Message, MessageId, MessageIds, Path, Recipient
from penstock.relay.bounce import Action, Reporter, ReportSettings
from penstock.relay.hop import Outcome, Result
from penstock.reports import TextBody

NOW = 1_700_000_000.0
ALICE = Path("alice@example.com", "alice", "example.com")
HEADER = b"From: alice@example.com\r\nSubject: Hello\r\n"
PREFIX = b"Received: from client.example ([192.0.2.1])\r\n\tby mx.example.org with ESMTP id 1; date\r\n"
HOP = "mx.example.net[192.0.2.9]:25"


def path_of(text: str) -> Path:
    local, _, domain = text.rpartition("@")
    return Path(text, local, domain)


def failed(
    address: str, text: str = "550 5.1.1 No such user", *, hop: str = HOP, is_said: bool = True, **wishes: str
) -> tuple[Recipient, Result]:
    to = Recipient(path_of(address), orcpt=wishes.get("orcpt"))
    return to, Result(Outcome.FAILED, text, wishes.get("status", "5.1.1"), hop, is_said)


TOLD = [failed("bob@example.net")]


def original(body: bytes = HEADER + b"\r\nHow are you?\r\n", **fields: Any) -> Message:
    envelope = Envelope(ALICE, tuple(to for to, _ in TOLD))._replace(**fields)
    return Message(MessageId("0123456789"), envelope, PREFIX, TextBody(body), NOW - 3600)


def report(
    message: Message | None = None,
    told: list[tuple[Recipient, Result]] | None = None,
    action: Action = "failed",
    *,
    most: int = 65_536,
    until: float | None = None,
) -> tuple[Message, EmailMessage]:
    """Return a report, raw and parsed, without defects."""
    reporter = Reporter(ReportSettings(return_most=most), "mx.example.org", MessageIds())
    made = reporter.report(action, message or original(), TOLD if told is None else told, NOW, retry_until=until)
    raw = b"".join(made.body.chunks())
    assert made.body.size == len(raw)
    assert not re.search(rb"(?<!\r)\n|\r(?!\n)|\x00|[^\r\n]{999}", raw)
    parsed = email.message_from_bytes(raw, policy=email.policy.default)
    assert all(not part.defects for part in parsed.walk())
    return made, parsed


def parts_of(parsed: EmailMessage) -> list[EmailMessage]:
    return [cast(EmailMessage, part) for part in parsed.iter_parts()]


def fields_of(parsed: EmailMessage) -> list[ParsedMessage]:
    """Return the groups of fields: those of the message, then those of each recipient (RFC 3464 2.1)."""
    groups = parts_of(parsed)[1].get_payload()
    return cast(list[ParsedMessage], groups)


def test_a_failure_report_has_three_parts_and_a_null_sender() -> None:
    made, parsed = report()
    assert made.envelope.sender == NULL_PATH
    assert made.envelope.recipients == (Recipient(ALICE),)
    assert parsed.get_content_type() == "multipart/report"
    assert parsed.get_param("report-type") == "delivery-status"
    assert [part.get_content_type() for part in parts_of(parsed)] == [
        "text/plain", "message/delivery-status", "message/rfc822",
    ]  # fmt: skip
    assert parsed["From"].addresses[0].addr_spec == "MAILER-DAEMON@mx.example.org"
    assert parsed["To"].addresses[0].addr_spec == "alice@example.com"
    assert parsed["Auto-Submitted"] == "auto-replied"
    assert parsed["MIME-Version"] == "1.0"
    assert parsed["Date"].datetime.timestamp() == NOW
    assert re.fullmatch(r"<\w+@mx\.example\.org>", parsed["Message-ID"])


def test_the_fields_are_those_of_rfc_3464() -> None:
    told = [failed("bob@example.net", orcpt="rfc822;Bob+2Bold@example.net")]
    message, recipient = fields_of(report(original(envid="QQ+3D314159"), told)[1])
    assert message["Original-Envelope-Id"] == "QQ=314159"
    assert message["Reporting-MTA"] == "dns; mx.example.org"
    assert parsedate_to_datetime(message["Arrival-Date"]).timestamp() == NOW - 3600
    assert recipient["Original-Recipient"] == "rfc822; Bob+old@example.net"
    assert recipient["Final-Recipient"] == "rfc822; bob@example.net"
    assert recipient["Action"] == "failed"
    assert recipient["Status"] == "5.1.1"
    assert recipient["Remote-MTA"] == "dns; mx.example.net"
    assert recipient["Diagnostic-Code"] == "smtp; 550 5.1.1 No such user"
    assert parsedate_to_datetime(recipient["Last-Attempt-Date"]).timestamp() == NOW
    assert recipient["Will-Retry-Until"] is None


def test_each_recipient_has_its_own_fields_in_order() -> None:
    told = [failed("a@example.net"), failed("b@example.net", "552 5.2.2 Full", status="5.2.2"), failed("c@example.net")]
    parsed = report(told=told)[1]
    _, *recipients = fields_of(parsed)
    assert [fields["Final-Recipient"] for fields in recipients] == [f"rfc822; {c}@example.net" for c in "abc"]
    assert [fields["Status"] for fields in recipients] == ["5.1.1", "5.2.2", "5.1.1"]
    text = parts_of(parsed)[0].get_content()
    assert all(f"<{c}@example.net>" in text for c in "abc")
    assert f"{HOP} said: 552 5.2.2 Full" in text.replace("\n    ", " ")


def test_our_own_words_are_not_smtp_and_name_no_remote_mta() -> None:
    told = [failed("bob@example.net", "the domain example.net does not exist", hop="", is_said=False, status="5.1.2")]
    _, recipient = fields_of(report(told=told)[1])
    assert recipient["Diagnostic-Code"] == "x-penstock; the domain example.net does not exist"
    assert recipient["Remote-MTA"] is None


@pytest.mark.parametrize(
    ("hop", "field"),
    [
        ("mx.example.net[192.0.2.9]:25", "dns; mx.example.net"),
        ("smart.example.net:587", "dns; smart.example.net"),
        ("192.0.2.9:25", "dns; 192.0.2.9"),
        ("unix:/run/lmtp", "x-unix; /run/lmtp"),
    ],
)
def test_the_remote_server_is_named_without_its_port(hop: str, field: str) -> None:
    assert fields_of(report(told=[failed("bob@example.net", hop=hop)])[1])[1]["Remote-MTA"] == field


def test_a_delay_report_has_the_expiry_and_the_header() -> None:
    told = [(TOLD[0][0], Result(Outcome.DEFERRED, "450 4.2.1 Busy", "4.2.1", HOP))]
    parsed = report(original(ret="FULL"), told, "delayed", until=NOW + 86_400)[1]
    _, recipient = fields_of(parsed)
    assert recipient["Action"] == "delayed"
    assert recipient["Status"] == "4.2.1"
    assert parsedate_to_datetime(recipient["Will-Retry-Until"]).timestamp() == NOW + 86_400
    assert parts_of(parsed)[2].get_content_type() == "text/rfc822-headers"
    assert "need not send it again" in " ".join(parts_of(parsed)[0].get_content().split())


@pytest.mark.parametrize("action", ["delivered", "relayed"])
def test_a_success_has_no_diagnostic(action: Action) -> None:
    told = [(TOLD[0][0], Result(Outcome.DELIVERED, "250 2.0.0 Ok", "2.0.0", HOP))]
    parsed = report(told=told, action=action)[1]
    _, recipient = fields_of(parsed)
    assert (recipient["Action"], recipient["Status"]) == (action, "2.0.0")
    assert recipient["Diagnostic-Code"] is None
    assert parts_of(parsed)[2].get_content_type() == "text/rfc822-headers"


# ---- what is returned


@pytest.mark.parametrize(("ret", "is_whole"), [(None, True), ("FULL", True), ("HDRS", False)])
def test_ret_selects_what_is_returned(ret: str | None, is_whole: bool) -> None:
    returned = parts_of(report(original(ret=ret))[1])[2]
    assert returned.get_content_type() == ("message/rfc822" if is_whole else "text/rfc822-headers")
    text = returned.as_string()
    assert "Subject: Hello" in text and "Received: from client.example" in text
    assert ("How are you?" in text) is is_whole


def test_a_large_message_is_returned_as_its_header() -> None:
    returned = parts_of(report(original(HEADER + b"\r\n" + b"x" * 70 + b"\r\n"), most=200)[1])[2]
    assert returned.get_content_type() == "text/rfc822-headers"
    assert "xxx" not in returned.as_string()


def test_a_small_message_is_returned_octet_for_octet() -> None:
    body = HEADER + b"\r\n" + "Grüße\r\n.\r\n--=_boundary\r\n".encode() * 3 + b"no line end"
    made, parsed = report(original(body))
    raw = b"".join(made.body.chunks())
    assert PREFIX + body in raw
    assert made.envelope.body_type == "8BITMIME"
    assert parts_of(parsed)[2]["Content-Transfer-Encoding"] == "8bit"


@pytest.mark.parametrize(
    "body",
    [
        b"Subject: x\r\n\r\nNUL \x00\r\n",
        b"Subject: x\r\n\r\nbare\nline\r\n",
        b"Subject: x\r\n\r\nbare\rline\r\n",
        b"Subject: x\r\n\r\n" + b"y" * 999 + b"\r\n",
        b"Subject: x\ny\r\nZ: \x00" + b"z" * 2000 + b"\r\n\r\nbody",
    ],
    ids=["NUL", "LF", "CR", "long", "header"],
)
def test_an_unsafe_text_is_returned_as_its_header(body: bytes) -> None:
    returned = parts_of(report(original(body))[1])[2]
    assert returned.get_content_type() == "text/rfc822-headers"


def test_a_binary_message_is_returned_as_its_header() -> None:
    returned = parts_of(report(original(body_type="BINARYMIME"))[1])[2]
    assert returned.get_content_type() == "text/rfc822-headers"


@pytest.mark.parametrize("body", [b"", b"\r\nonly a body\r\n", b"no header at all", b"x" * 500_000], ids=len)
def test_a_message_without_a_header_returns_what_was_added_here(body: bytes) -> None:
    made, parsed = report(original(body, ret="HDRS"))
    assert "Received: from client.example" in parts_of(parsed)[2].as_string()
    assert made.size < 80_000


def test_a_boundary_does_not_occur_in_the_returned_message() -> None:
    class Always(MessageIds):
        def next(self) -> MessageId:
            return MessageId("SAME")

    body = HEADER + b"\r\n--=_SAME\r\n--=_SAME_--\r\n"
    made = Reporter(ReportSettings(), "mx.example.org", Always()).report("failed", original(body), TOLD, NOW)
    parsed = email.message_from_bytes(b"".join(made.body.chunks()), policy=email.policy.default)
    assert parsed.get_boundary() == "=_SAME__"
    assert len(parts_of(parsed)) == 3


def test_a_reply_cannot_add_fields() -> None:
    told = [failed("bob@example.net", "550 no\r\nAction: delivered\r\n\r\n" + "ü" * 3000)]
    _, *recipients = fields_of(report(told=told)[1])
    assert len(recipients) == 1
    assert recipients[0]["Action"] == "failed"
    assert recipients[0]["Diagnostic-Code"].isascii()


# ---- RFC 6533


def test_non_ascii_addresses_have_the_types_of_rfc_6533() -> None:
    told = [failed("bücher@example.net", "550 5.1.1 Gibt es nicht: bücher", orcpt="utf-8;b\\x{FC}cher@example.net")]
    sender = path_of("grüße@example.com")
    made, parsed = report(original(HEADER + "X: ü\r\n\r\nü\r\n".encode(), smtputf8=True, sender=sender), told)
    assert made.envelope.smtputf8
    assert made.envelope.body_type == "8BITMIME"
    text, status, returned = parts_of(parsed)
    assert parsed.get_param("report-type") == "global-delivery-status"
    assert status.get_content_type() == "message/global-delivery-status"
    assert returned.get_content_type() == "message/global"
    raw = b"".join(made.body.chunks()).decode()
    assert "Final-Recipient: utf-8; bücher@example.net\r\n" in raw
    assert "Original-Recipient: utf-8; b\\x{FC}cher@example.net\r\n" in raw
    assert "Diagnostic-Code: smtp; 550 5.1.1 Gibt es nicht: bücher\r\n" in raw
    assert "To: <grüße@example.com>\r\n" in raw
    assert "bücher" in text.get_content()


def test_an_smtputf8_message_all_in_ascii_has_an_ordinary_report() -> None:
    made, parsed = report(original(smtputf8=True))
    assert not made.envelope.smtputf8
    assert parsed.get_param("report-type") == "delivery-status"


# ---- RFC 3461


@pytest.mark.parametrize(
    ("notify", "wished"),
    [
        (None, {"FAILURE", "DELAY"}),
        ({"NEVER"}, set()),
        ({"SUCCESS"}, {"SUCCESS"}),
        ({"FAILURE"}, {"FAILURE"}),
        ({"DELAY", "SUCCESS"}, {"DELAY", "SUCCESS"}),
    ],
)
def test_notify_selects_the_reports(notify: set[str] | None, wished: set[str]) -> None:
    to = Recipient(ALICE, None if notify is None else frozenset(notify))
    assert {wish for wish in ("SUCCESS", "FAILURE", "DELAY") if to.wants(wish)} == wished
