"""What the relay and the policies read from strangers: any octets give a result or the documented error."""

from __future__ import annotations

import email
import email.policy
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import cast

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.message import Envelope, Message, MessageId, MessageIds, Path, Recipient
from penstock.policy.delegate import read_answer
from penstock.policy.filters import FilterConnection, FilterError
from penstock.relay.bounce import Reporter, ReportSettings
from penstock.relay.dane import MAX_RECORDS, policy_of
from penstock.relay.hop import Outcome, Result
from penstock.relay.mtasts import StsPolicy, parse_policy, record_id
from penstock.relay.tlsreport import AppliedPolicy, Counts, Failure, addresses_of, report_json
from penstock.reports import TextBody
from tests.steps import steps_of

_LINES = [
    b"version: STSv1\n",
    b"mode: enforce\r\n",
    b"mx: *.example.org\n",
    b"max_age: 9\n",
    b"mx:",
    b" \t",
    b"\xff",
    b"\n",
]
_RECORDS = [
    b"v=STSv1;",
    b" id=1;",
    b"v=TLSRPTv1;",
    b"rua=mailto:a@b.example",
    b",",
    b"https://x",
    b" ",
    b"%0a",
    b"\xff",
]


@given(st.lists(st.one_of(st.sampled_from(_LINES), st.binary(max_size=4)), max_size=20))
@settings(deadline=None)
def test_any_text_is_a_policy_or_an_error(lines: list[bytes]) -> None:
    with suppress(ValueError):
        policy = parse_policy("example.org", "1", b"".join(lines), 0.0)
        assert isinstance(policy, StsPolicy)
        assert policy.mx or policy.mode == "none"
        assert parse_policy("example.org", "1", "\n".join(policy.lines()).encode(), 0.0) == policy


@given(st.lists(st.lists(st.sampled_from(_RECORDS), max_size=8).map(b"".join), max_size=4))
def test_any_txt_records_have_an_id_or_addresses_or_nothing(records: list[bytes]) -> None:
    ident = record_id(records)
    assert ident is None or ident.isalnum()
    for address in addresses_of(records):
        assert address.isprintable() and ("@" in address or address.startswith("https://"))


def test_twice_the_lines_of_a_policy_cost_at_most_twice_the_steps() -> None:
    for line in _LINES:

        def read(count: int, line: bytes = line) -> None:
            with suppress(ValueError):
                parse_policy("example.org", "1", line * count, 0.0)

        assert steps_of(lambda: read(2000)) <= 2 * steps_of(lambda: read(1000)) + 400, line


@given(
    st.lists(st.tuples(*[st.integers(0, 255)] * 3, st.binary(max_size=70)), min_size=1, max_size=80),
    st.lists(st.binary(max_size=40), max_size=10),
)
@settings(deadline=None)
def test_any_tlsa_records_and_chains_are_compared(
    records: list[tuple[int, int, int, bytes]], chain: list[bytes]
) -> None:
    policy = policy_of(records, ["mx.example.org", "example.org"])
    assert len(policy.records) <= MAX_RECORDS
    assert all(each.is_usable for each in policy.records)
    assert policy == policy_of(records[::-1], ["mx.example.org", "example.org"])
    assert isinstance(policy.check(chain), str)


@given(*[st.text(max_size=60)] * 4)
def test_any_words_of_a_hop_are_in_a_valid_tls_report(kind: str, reason: str, host: str, source: str) -> None:
    counts = Counts()
    counts.failures = 1
    counts.details[Failure(kind=kind, reason=reason, host=host, source=source, address="192.0.2.1")] = 1
    applied = AppliedPolicy("sts", "example.org", (), ())
    made = report_json({applied: counts}, report_id="1", organization="x", contact="a@b", begin=0, end=86_399)
    (policy,) = json.loads(made)["policies"]
    assert policy["summary"]["total-failure-session-count"] == 1


class _Server:
    """A policy server that sends octets in pieces, and closes the connection."""

    def __init__(self, data: bytes, step: int) -> None:
        self._pieces: Iterator[bytes] = (data[at : at + step] for at in range(0, len(data), step))

    async def receive(self) -> bytes:
        for piece in self._pieces:
            return piece
        raise FilterError("closed")


def read(data: bytes, step: int) -> bytes | None:
    """Return the answer; None without one."""
    coroutine = read_answer(cast("FilterConnection", _Server(data, step)))
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return cast("bytes", stop.value)
    except FilterError:
        return None
    raise AssertionError("it waits")


@given(
    st.lists(st.sampled_from([b"action=", b"DUNNO", b"\n", b"\n\n", b"\r\n", b"x=y\n"]), max_size=12), st.integers(1, 9)
)
def test_an_answer_of_a_policy_server_ends_at_its_empty_line(words: list[bytes], step: int) -> None:
    data = b"".join(words)
    found, whole = read(data, step), read(data, max(1, len(data)))
    assert (found is None) == (whole is None) == (b"\n\n" not in data)
    if found is not None and whole is not None:
        assert found.partition(b"\n\n")[0] == whole.partition(b"\n\n")[0]


def test_an_endless_answer_of_a_policy_server_is_given_up_in_linear_time() -> None:
    assert read(b"x" * 100_000, 1) is None
    assert steps_of(lambda: read(b"x" * 4000, 1)) <= 2 * steps_of(lambda: read(b"x" * 2000, 1)) + 400


@given(st.text(max_size=200))
@settings(deadline=None)
def test_any_reply_of_a_hop_makes_a_report_that_can_be_read(text: str) -> None:
    sender, bob = Path("a@b.example", "a", "b.example"), Path("bob@c.example", "bob", "c.example")
    message = Message(MessageId("1"), Envelope(sender, (Recipient(bob),)), b"", TextBody(b"Subject: x\r\n\r\n"), 0.0)
    result = Result(Outcome.FAILED, f"550 {text}", "5.0.0", "mx.c.example", is_said=True)
    reporter = Reporter(ReportSettings(), "mx.example.org", MessageIds())
    report = b"".join(reporter.report("failed", message, [(Recipient(bob), result)], 0.0).body.chunks())
    assert all(len(line) <= 998 for line in report.split(b"\r\n"))
    assert b"\n" not in report.replace(b"\r\n", b"") and b"\r" not in report.replace(b"\r\n", b"")
    parsed = email.message_from_bytes(report, policy=email.policy.default)
    assert [part.get_content_type() for part in parsed.iter_parts()][1] == "message/delivery-status"
    assert not parsed.defects
