"""The scheduler: order, retries, reports, hops that are down, operators, clocks, shutdown and bugs."""

from __future__ import annotations

import email
import email.message
import email.policy
import sqlite3
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import msgspec
import pytest
import trio

import penstock.relay.recorder
import penstock.relay.scheduler
import penstock.spool.store
from penstock.dns.exchangers import Exchanger, ResolveError
from penstock.message import Path as MailPath
from penstock.message import Recipient
from penstock.relay.bounce import Reporter
from penstock.relay.hop import Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.pool import Pool
from penstock.relay.route import RouteSettings
from penstock.relay.scheduler import RelaySettings
from penstock.reply import Reply
from penstock.spool.admin import Filter, QueueAdmin
from penstock.spool.store import Store
from tests.relay.fake import CLOSE, FakeHop, serving
from tests.relay.harness import BUSY, DELIVERED, REFUSED, START, FakePool, Relay, Sent, message_of, path_of, relaying

HOUR = 3600.0


def wishing(address: str, *notify: str) -> Recipient:
    return Recipient(path_of(address), frozenset(notify))


def report_in(sent: Sent) -> list[dict[str, str]]:
    """Return the fields of the recipients of a report."""
    parsed = email.message_from_bytes(sent.text, policy=email.policy.default)
    assert parsed.get_content_type() == "multipart/report"
    _, status, _ = parsed.iter_parts()
    groups = cast(list[email.message.Message], status.get_payload())
    return [dict(fields.items()) for fields in groups[1:]]


# ---- delivery


async def test_a_message_is_delivered_unchanged_and_leaves_the_spool(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        message = message_of("bob@example.org", "eve@example.org")
        await relay.accept(message)
        await relay.quiet()
        (sent,) = relay.pool.sent
        assert sent.envelope == message.envelope
        assert sent.text == b"Received: from test\r\nSubject: Hello\r\n\r\nHow are you?\r\n"
        assert await relay.waiting() == []
        assert [event["to"] for event in relay.events("delivered")] == [["bob@example.org"], ["eve@example.org"]]


async def test_recipients_with_the_same_next_hop_share_a_transaction(tmp_path: Path) -> None:
    routes: list[dict[str, Any]] = [{"domains": ["z.org"], "next_hop": "smtp://other"}, {"next_hop": "smtp://hop"}]
    async with relaying(tmp_path, routes=routes) as relay:
        await relay.accept(message_of("a@x.org", "b@y.org", "c@x.org", "d@z.org"))
        await relay.quiet()
        assert sorted(sent.to for sent in relay.pool.sent) == [["a@x.org", "c@x.org", "b@y.org"], ["d@z.org"]]
        assert await relay.waiting() == []


async def test_retries_are_grouped_by_route(tmp_path: Path) -> None:
    pool = FakePool(lambda _: BUSY)
    recipients = [f"bob@d{number}.org" for number in range(200)]
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of(*recipients))
        await relay.quiet()
        assert {wait for *_, wait in await relay.waiting()} == {60.0}
        assert len(pool.sent) == 1
        relay.advance(61)
        await relay.until(lambda: len(pool.sent) > 1)
        await relay.quiet()
        assert [sorted(sent.to) for sent in pool.sent[1:]] == [sorted(recipients)]
        pool.answer = lambda sent: DELIVERED if sent.envelope.sender.text == "" else REFUSED
        relay.advance(301)
        await relay.quiet()
        (report,) = pool.to("example.com")
        assert len(report_in(report)) == 200
        assert await relay.waiting() == []


async def test_a_message_to_several_next_hops_has_one_report(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else REFUSED)
    routes: list[dict[str, Any]] = [{"domains": ["z.org"], "next_hop": "smtp://other"}, {"next_hop": "smtp://hop"}]
    async with relaying(tmp_path, pool, routes=routes) as relay:
        await relay.accept(message_of("a@x.org", "d@z.org"))
        await relay.quiet()
        (report,) = pool.to("example.com")
        assert sorted(fields["Final-Recipient"] for fields in report_in(report)) == [
            "rfc822; a@x.org",
            "rfc822; d@z.org",
        ]


async def test_recipients_of_a_domain_share_a_transaction_to_its_mx(tmp_path: Path) -> None:
    dns: dict[str, Any] = {domain: [exchanger(f"mx.{domain}")] for domain in ("x.org", "y.org")}
    async with relaying(tmp_path, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(message_of("a@x.org", "b@y.org", "c@x.org"))
        await relay.quiet()
        assert sorted(sent.to for sent in relay.pool.sent) == [["a@x.org", "c@x.org"], ["b@y.org"]]


async def test_what_was_in_the_spool_before_the_start_goes_out(tmp_path: Path) -> None:
    async with relaying(tmp_path, runs=False) as relay:
        await relay.accept(*(message_of(f"bob@d{n % 30}.org") for n in range(300)))
        assert relay.pool.sent == []
    async with relaying(tmp_path) as relay:
        await relay.quiet()
        assert len(relay.pool.sent) == 300
        assert await relay.waiting() == []


async def test_mail_beyond_the_memory_limit_is_delivered_too(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool, memory_messages=20) as relay:
        await relay.accept(*(message_of("bob@example.org") for _ in range(200)))
        assert relay.scheduler.held <= 20
        pool.answer = lambda _: DELIVERED
        for sent in list(pool.sent):
            pool.reply(sent, DELIVERED)
        await relay.quiet()
        assert len(pool.sent) == 200
        assert await relay.waiting() == []


async def test_octets_in_memory_are_bounded_too(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    body = b"x" * 100_000
    async with relaying(tmp_path, pool, memory_octets=1 << 20) as relay:
        await relay.accept(*(message_of("bob@example.org", body=body) for _ in range(30)))
        assert relay.scheduler.held <= 11
        pool.answer = lambda _: DELIVERED
        for sent in list(pool.sent):
            pool.reply(sent, DELIVERED)
        await relay.quiet()
        assert len(pool.sent) == 30


async def test_memory_is_reserved_while_the_spool_is_read(tmp_path: Path) -> None:
    async with relaying(tmp_path, runs=False) as relay, trio.open_nursery() as nursery:
        for n in range(48):
            nursery.start_soon(relay.accept, message_of(f"bob@d{n % 8}.org", body=b"x" * 100_000))
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool, memory_messages=20, memory_octets=1 << 20) as relay:
        peaks = await peaks_of(relay, lambda: relay.scheduler.held >= 8)
        assert peaks[0] <= 14
        assert peaks[1] <= (1 << 20) + 4 * 100_100  # each taker takes at least one message
        pool.answer = lambda _: DELIVERED
        for sent in list(pool.sent):
            pool.reply(sent, DELIVERED)
        await relay.quiet()
        assert len(pool.sent) == 48
        await relay.until(lambda: relay.scheduler._claimed == 0)
        assert relay.scheduler._claimed_octets == 0


async def peaks_of(relay: Relay, condition: Callable[[], bool]) -> tuple[int, int]:
    """Return the most messages and octets in memory until a condition holds and the spool has been read."""
    scheduler, hold = relay.scheduler, relay.scheduler._hold
    peaks = [0, 0]

    def note(*arguments: Any) -> None:
        hold(*arguments)
        peaks[:] = max(peaks[0], scheduler.held), max(peaks[1], scheduler._octets)

    scheduler._hold = note  # type: ignore[assignment,method-assign]
    await relay.until(condition)
    await relay.until(lambda: scheduler._claimed == 0)
    return peaks[0], peaks[1]


async def test_memory_is_reserved_while_messages_are_put(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool, memory_messages=20) as relay:
        async with trio.open_nursery() as nursery:
            for n in range(50):
                nursery.start_soon(relay.accept, message_of(f"bob@d{n}.org"))
            peak, _ = await peaks_of(relay, lambda: relay.scheduler.held >= 10)
        assert peak <= 20
        pool.answer = lambda _: DELIVERED
        for sent in list(pool.sent):
            pool.reply(sent, DELIVERED)
        await relay.quiet()
        assert len(pool.sent) == 50
        await relay.until(lambda: relay.scheduler._claimed == 0)
        assert relay.scheduler._claimed_octets == 0


async def test_a_hop_gets_no_more_than_its_capacity(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None, most=3)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of(f"bob@d{n % 7}.org") for n in range(50)))
        for _ in range(50):
            await relay.until(lambda: pool.open.get("hop", 0) > 0)
            pool.reply(next(sent for sent in pool.sent if not hasattr(sent, "over")), DELIVERED)
            pool.sent[:] = pool.sent[1:]
        await relay.quiet()
        assert pool.peak == {"hop": 3}


async def test_a_new_hop_gets_few_messages_until_it_accepts_some(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of("bob@example.org") for _ in range(100)))
        assert pool.open == {"hop": 4}
        pool.reply(pool.sent[0], DELIVERED)
        assert pool.open == {"hop": 8}


async def test_the_domains_of_a_hop_take_turns(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None, most=1)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of("bob@many.org") for _ in range(20)))
        await relay.accept(*(message_of("bob@few.org") for _ in range(3)))
        for n in range(23):
            pool.reply(pool.sent[n], DELIVERED)
        order = [sent.to[0] for sent in pool.sent]
        assert order[1:7].count("bob@few.org") == 3


async def test_a_hop_that_does_not_answer_delays_no_other(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: None if sent.hop.host == "slow" else DELIVERED)
    routes: list[dict[str, Any]] = [{"domains": ["slow.org"], "next_hop": "smtp://slow"}, {"next_hop": "smtp://fast"}]
    async with relaying(tmp_path, pool, routes=routes, memory_messages=100) as relay:
        await relay.accept(*(message_of("bob@slow.org") for _ in range(500)))
        await relay.accept(*(message_of(f"bob@d{n % 5}.org") for n in range(100)))
        await relay.until(lambda: sum(sent.hop.host == "fast" for sent in pool.sent) == 100)
        assert len(pool.to("slow.org")) == 4


async def test_replaced_routes_apply_to_all_that_is_not_being_sent(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: None if sent.hop.host == "hop" else DELIVERED)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of(f"u{n}@one.org", f"u{n}@two.org") for n in range(40)))
        begun = list(pool.sent)
        assert 0 < len(begun) < 40, "some wait in memory, for one route together"
        routes = [{"domains": ["two.org"], "next_hop": "smtp://second"}, {"next_hop": "smtp://first"}]
        table = relay.scheduler._routes
        changed = msgspec.convert(routes, tuple[RouteSettings, ...])
        assert table.use(changed, tmp_path, "mx.example.org")
        assert not table.use(changed, tmp_path, "mx.example.org")
        relay.scheduler.reroute()
        for sent in begun:
            pool.reply(sent, DELIVERED)
        await relay.quiet()
        later = [(sent.hop.host, to) for sent in pool.sent[len(begun) :] for to in sent.to]
        assert {(host, to.partition("@")[2]) for host, to in later} == {("first", "one.org"), ("second", "two.org")}
        everyone = [to for sent in pool.sent for to in sent.to]
        assert sorted(everyone) == sorted(f"u{n}@{domain}" for n in range(40) for domain in ("one.org", "two.org"))
        assert relay.events("attempted") == [], "what is given back counts no attempt"


async def test_an_answer_of_replaced_routes_fails_no_mail(tmp_path: Path) -> None:
    asked, answer = trio.Event(), trio.Event()

    async def exchangers(_: str) -> list[Exchanger]:
        asked.set()
        await answer.wait()
        raise ResolveError("5.1.2", "there is no such domain", is_permanent=True)

    async with relaying(tmp_path, routes=[{"next_hop": "mx"}]) as relay:
        table: Any = relay.scheduler._routes
        table._resolver.exchangers = exchangers
        await relay.accept(message_of("u@one.org"))
        await asked.wait()
        table.use(msgspec.convert([{"next_hop": "smtp://hop"}], tuple[RouteSettings, ...]), tmp_path, "mx.example.org")
        relay.scheduler.reroute()
        answer.set()
        await relay.quiet()
        assert [(sent.hop.host, sent.to) for sent in relay.pool.sent] == [("hop", ["u@one.org"])]
        assert relay.events("bounced") == []


async def test_the_number_of_messages_filed_at_a_time_changes_in_place(tmp_path: Path) -> None:
    async with relaying(tmp_path, routes=[{"next_hop": "maildir"}]) as relay:
        await relay.accept(message_of("u@one.org"))
        await relay.quiet()
        relay.scheduler.use_settings(msgspec.convert({"local_writers": 3}, RelaySettings))
        assert [each.limit for each in relay.scheduler._route_queues.values()] == [3]


async def test_old_mail_and_fresh_mail_take_turns(tmp_path: Path) -> None:
    async with relaying(tmp_path, runs=False) as relay:
        await relay.accept(*(message_of("old@example.org") for _ in range(50)))
    pool = FakePool(lambda _: None, most=1)
    async with relaying(tmp_path, pool) as relay:
        await relay.until(lambda: len(pool.sent) == 1)
        await relay.accept(*(message_of("fresh@example.org") for _ in range(10)))
        for n in range(15):
            await relay.until(lambda: len(pool.sent) > n)  # noqa: B023 - at once
            pool.reply(pool.sent[n], DELIVERED)
        names = [sent.to[0] for sent in pool.sent[1:13]]
        assert 4 <= names.count("fresh@example.org") <= 8


# ---- again later


async def test_a_deferred_message_is_tried_again_by_the_schedule(tmp_path: Path) -> None:
    pool = FakePool(lambda _: BUSY)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", "450 4.2.1 Busy", 1, 60.0)]
        relay.advance(59)
        await relay.quiet()
        assert len(pool.sent) == 1
        relay.advance(1)
        await relay.until(lambda: len(pool.sent) == 2)
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", "450 4.2.1 Busy", 2, 300.0)]
        pool.answer = lambda _: DELIVERED
        relay.advance(300)
        await relay.until(lambda: len(pool.sent) == 3)
        await relay.quiet()
        assert await relay.waiting() == []
        events = [(event["event"], event.get("attempts")) for event in relay.events()]
        assert events[-2:] == [("attempted", 3), ("delivered", 3)]


async def test_what_is_due_again_soon_is_found_in_time(tmp_path: Path) -> None:
    pool = FakePool(lambda _: BUSY)
    async with relaying(tmp_path, pool, retry={"schedule": [1]}) as relay:
        await relay.until(lambda: relay.scheduler._looks_at >= relay.now + 5)  # there is nothing to look for
        await relay.accept(message_of("bob@example.org"))
        await relay.until(lambda: relay.scheduler._looks_at == relay.now + 1)


async def test_each_recipient_has_its_own_result(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: [DELIVERED, BUSY, REFUSED] if len(sent.to) == 3 else DELIVERED)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("a@x.org", "b@x.org", "c@x.org"))
        await relay.quiet()
        assert [address for address, *_ in await relay.waiting()] == ["b@x.org"]
        (report,) = pool.to("example.com")
        assert [fields["Final-Recipient"] for fields in report_in(report)] == ["rfc822; c@x.org"]
        relay.advance(60)
        await relay.until(lambda: len(pool.to("x.org")) == 2)
        assert pool.to("x.org")[1].to == ["b@x.org"]


# ---- bounces and other reports


async def test_a_failure_is_returned_from_the_null_sender(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: REFUSED if sent.to == ["bob@example.org"] else DELIVERED)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        (report,) = pool.to("example.com")
        assert report.to == ["alice@example.com"]
        assert report.envelope.sender.text == ""
        (fields,) = report_in(report)
        assert (fields["Action"], fields["Status"]) == ("failed", "5.1.1")
        assert await relay.waiting() == []
        kinds = [event["event"] for event in relay.events()]
        assert kinds == ["bounced", "reported", "delivered"]


async def test_a_report_that_fails_is_dropped_and_journaled(tmp_path: Path) -> None:
    pool = FakePool(lambda _: REFUSED)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert len(pool.sent) == 2
        assert await relay.waiting() == []
        assert [event["report"] for event in relay.events("bounced")] == ["sent", "null sender: dropped"]


@pytest.mark.parametrize(("notify", "reports"), [(("NEVER",), 0), (("SUCCESS",), 0), (("FAILURE",), 1), ((), 1)])
async def test_notify_decides_about_a_failure(tmp_path: Path, notify: tuple[str, ...], reports: int) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else REFUSED)
    to = wishing("bob@example.org", *notify) if notify else Recipient(path_of("bob@example.org"))
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of(to))
        await relay.quiet()
        assert len(pool.to("example.com")) == reports
        assert await relay.waiting() == []


async def test_a_large_message_that_fails_has_a_report_with_its_header(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else REFUSED)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org", body=b"Subject: Large\r\n\r\n" + b"x\r\n" * 200_000))
        await relay.quiet()
        (report,) = pool.to("example.com")
        assert b"Subject: Large" in report.text
        assert len(report.text) < 5000
        assert [path for path in (tmp_path / "bodies").rglob("*") if path.is_file()] == []


async def test_a_message_that_is_too_old_comes_back(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else BUSY)
    async with relaying(tmp_path, pool, retry={"delay_notice_after": 0}) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        for _ in range(100):
            waiting = await relay.waiting()
            if not waiting:
                break
            relay.advance(waiting[0][3])
            count = len(pool.sent)
            await relay.until(lambda: len(pool.sent) > count)  # noqa: B023 - at once
            await relay.quiet()
        (report,) = pool.to("example.com")
        (fields,) = report_in(report)
        assert (fields["Action"], fields["Status"]) == ("failed", "4.4.7")
        assert fields["Diagnostic-Code"] == "smtp; 450 4.2.1 Busy"
        assert 30 < len(pool.to("example.org")) < 50


async def test_a_delay_is_notified_once(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else BUSY)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        for tries in range(2, 5):
            relay.advance(5 * HOUR)
            await relay.until(lambda: len(pool.to("example.org")) == tries)  # noqa: B023 - at once
            await relay.quiet()
        (report,) = pool.to("example.com")
        (fields,) = report_in(report)
        assert (fields["Action"], fields["Status"]) == ("delayed", "4.2.1")
        assert "Will-Retry-Until" in fields
        assert len(await relay.waiting()) == 1


@pytest.mark.parametrize(
    ("url", "reports", "action"),
    [("smtp://hop", False, "relayed"), ("smtp://hop", True, None), ("lmtp://hop", False, "delivered")],
)
async def test_success_is_reported_by_the_last_server_with_dsn(
    tmp_path: Path, url: str, reports: bool, action: str | None
) -> None:
    pool = FakePool(lambda _: DELIVERED._replace(reports=reports))
    async with relaying(tmp_path, pool, routes=[{"next_hop": url}]) as relay:
        await relay.accept(message_of(wishing("bob@example.org", "SUCCESS")))
        await relay.quiet()
        told = [report_in(sent)[0]["Action"] for sent in pool.to("example.com")]
        assert told == ([] if action is None else [action])


# ---- the next host in the same attempt (RFC 5321 5.1)

TWO_HOSTS: list[dict[str, Any]] = [
    {"next_hops": [{"url": "smtp://a", "priority": 1}, {"url": "smtp://b", "priority": 2}]}
]
IN_DOUBT = Result(Outcome.DEFERRED, "in doubt: lost", "4.4.2", "a:25", is_said=False, in_doubt=True)
LOST = Result(Outcome.DEFERRED, "the connection was lost", "4.4.2", "a:25", is_said=False)


@pytest.mark.parametrize(
    "deferral", [BUSY, LOST, NextHopUnavailable("a", "421 no", "4.3.2")], ids=["450", "lost", "421"]
)
async def test_what_a_host_defers_is_offered_to_the_next(tmp_path: Path, deferral: Result | NextHopUnavailable) -> None:
    pool = FakePool(lambda sent: deferral if sent.hop.host == "a" else DELIVERED)
    async with relaying(tmp_path, pool, routes=TWO_HOSTS) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [sent.hop.host for sent in pool.sent] == ["a", "b"]
        assert await relay.waiting() == []


@asynccontextmanager
async def two_hosts(folder: Path, pool: Pool, **answers: str) -> AsyncIterator[tuple[Relay, FakeHop, FakeHop]]:
    """Run a relay to a host that answers as given, and a second one that accepts everything."""
    first, second = FakeHop(**answers), FakeHop()
    async with serving(first), serving(second):
        hops = [{"url": f"smtp://127.0.0.1:{hop.port}", "priority": n} for n, hop in enumerate((first, second))]
        routes = [{"next_hops": hops, "tls": {"mode": "none"}}]
        async with relaying(folder, cast(FakePool, pool), routes=routes) as relay:
            yield relay, first, second
            await pool.aclose()


@pytest.mark.parametrize("step", ["CONNECT", "EHLO", "MAIL", "RCPT", "DATA", "TEXT"])
async def test_a_452_at_any_step_leads_to_the_next_host(tmp_path: Path, pool: Pool, step: str) -> None:
    async with two_hosts(tmp_path, pool, **{step: "452 4.3.1 full"}) as (relay, first, second):
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert (len(first.texts), len(second.texts)) == (0, 1)
        assert await relay.waiting() == []
        assert relay.events("deferred") == []


async def test_a_connection_lost_at_the_dot_does_not(tmp_path: Path, pool: Pool) -> None:
    async with two_hosts(tmp_path, pool, TEXT=CLOSE) as (relay, _, second):
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert second.connections == 0
        ((_, reply, attempts, _),) = await relay.waiting()
        assert (reply.startswith("in doubt"), attempts) == (True, 1)


async def test_only_deferred_recipients_are_offered_again(tmp_path: Path) -> None:
    def answer(sent: Sent) -> list[Result]:
        return [DELIVERED, BUSY, REFUSED, BUSY] if sent.hop.host == "a" else [DELIVERED, BUSY]

    pool = FakePool(lambda sent: answer(sent) if sent.envelope.sender.text else DELIVERED)
    async with relaying(tmp_path, pool, routes=TWO_HOSTS) as relay:
        await relay.accept(message_of("a@x.org", "b@x.org", "c@x.org", "d@x.org"))
        await relay.quiet()
        assert [sent.to for sent in pool.to("x.org")] == [
            ["a@x.org", "b@x.org", "c@x.org", "d@x.org"],
            ["b@x.org", "d@x.org"],
        ]
        assert [(address, wait) for address, _, _, wait in await relay.waiting()] == [("d@x.org", 60.0)]
        (report,) = pool.to("example.com")
        assert [fields["Final-Recipient"] for fields in report_in(report)] == ["rfc822; c@x.org"]


@pytest.mark.parametrize("result", [IN_DOUBT, REFUSED], ids=["in doubt", "refused"])
async def test_what_may_be_delivered_is_not_offered_again(tmp_path: Path, result: Result) -> None:
    pool = FakePool(lambda sent: result if sent.envelope.sender.text else DELIVERED)
    async with relaying(tmp_path, pool, routes=TWO_HOSTS) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [sent.hop.host for sent in pool.to("example.org")] == ["a"]


async def test_hosts_of_an_attempt_are_bounded(tmp_path: Path) -> None:
    pool = FakePool(lambda _: BUSY)
    routes = [{"next_hops": [{"url": f"smtp://h{n}", "priority": n} for n in range(30)]}]
    async with relaying(tmp_path, pool, routes=routes) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [sent.hop.host for sent in pool.sent] == ["h0", "h1", "h2", "h3", "h4"]


async def test_each_address_of_a_static_next_hop_is_tried(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: BUSY if sent.hop.address == "192.0.2.1" else DELIVERED)
    hosts = {"hop": ["192.0.2.1", "2001:db8::2"]}
    async with relaying(tmp_path, pool, hosts=hosts) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [sent.hop.name for sent in pool.sent] == ["hop[192.0.2.1]:25", "hop[2001:db8::2]:25"]
        assert await relay.waiting() == []


async def test_many_dead_addresses_do_not_hide_the_next_host(tmp_path: Path) -> None:
    dead = tuple(f"192.0.2.{number}" for number in range(26))
    dns: dict[str, Any] = {"example.org": [Exchanger(10, "mx1", dead), Exchanger(20, "mx2", ("198.51.100.1",))]}
    pool = FakePool(lambda sent: NextHopUnavailable(sent.hop.name, "timeout") if sent.hop.host == "mx1" else DELIVERED)
    async with relaying(tmp_path, pool, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert pool.sent[-1].hop.host == "mx2"
        assert await relay.waiting() == []


# ---- hops that are down


async def test_the_next_hop_is_tried_when_the_first_is_down(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: NextHopUnavailable("a", "refused") if sent.hop.host == "a" else DELIVERED)
    routes = [{"next_hops": [{"url": "smtp://a", "priority": 1}, {"url": "smtp://b", "priority": 2}]}]
    async with relaying(tmp_path, pool, routes=routes) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [sent.hop.host for sent in pool.sent] == ["a", "b"]
        pool.down = {"a": trio.current_time() + 60}
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [sent.hop.host for sent in pool.sent] == ["a", "b", "b"]
        assert await relay.waiting() == []


async def test_a_busy_first_hop_does_not_divert_to_the_second(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None, most=2)
    routes = [{"next_hops": [{"url": "smtp://a", "priority": 1}, {"url": "smtp://b", "priority": 2}]}]
    async with relaying(tmp_path, pool, routes=routes) as relay:
        await relay.accept(*(message_of("bob@example.org") for _ in range(10)))
        assert pool.peak == {"a": 2}


async def test_with_all_hops_down_each_message_has_its_own_schedule(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: NextHopUnavailable(sent.hop.name, "Connection refused"))
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", "Connection refused", 1, 60.0)]
        relay.advance(60)
        await relay.until(lambda: len(pool.sent) == 2)
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", "Connection refused", 2, 300.0)]


async def test_mail_for_a_hop_backing_off_is_put_off_untried(tmp_path: Path) -> None:
    async with relaying(tmp_path, runs=False) as relay:
        await relay.accept(*(message_of("bob@dead.org") for _ in range(300)))
    pool = FakePool(down={"dead": 1e12})
    routes: list[dict[str, Any]] = [{"domains": ["dead.org"], "next_hop": "smtp://dead"}, {"next_hop": "smtp://hop"}]
    async with relaying(tmp_path, pool, routes=routes) as relay:
        queue = "dead.org"
        await relay.until(
            lambda: relay.scheduler._queues.get(queue) is not None and relay.scheduler._queues[queue].is_down
        )
        await relay.accept(*(message_of("bob@dead.org") for _ in range(100)))
        assert relay.scheduler.held == 0  # they stay on the disk, and are not handed over
        await relay.accept(*(message_of("bob@live.org") for _ in range(100)))
        await relay.until(lambda: len(pool.to("live.org")) == 100)
        assert pool.to("dead.org") == []
        waiting = [each for each in await relay.waiting() if each[0] == "bob@dead.org"]
        assert len(waiting) == 400
        put_off = [each for each in waiting if each[2] == 1]
        assert put_off and all(wait == 60.0 and reply == "the next hop is down" for _, reply, _, wait in put_off)


async def test_a_hop_that_recovers_gets_its_mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penstock.relay.scheduler, "_SWEEP_PAUSE", 0.001)
    pool = FakePool(down={"hop": 1e12})
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of("bob@example.org") for _ in range(20)))
        await relay.quiet()
        assert pool.sent == []
        pool.down.clear()
        relay.advance(60)
        await relay.until(lambda: len(pool.sent) == 20)
        await relay.quiet()
        assert await relay.waiting() == []


@asynccontextmanager
async def backing_off(folder: Path, pool: Pool, hop: FakeHop, messages: int) -> AsyncIterator[Relay]:
    """Run a relay to a hop that backs off after the first message, with running clocks."""
    route = {
        "next_hop": f"smtp://127.0.0.1:{hop.port}",
        "tls": {"mode": "none"},
        "limits": {"breaker_failures": 1, "breaker_pause": 300},
    }
    async with relaying(folder, cast(FakePool, pool), routes=[route]) as relay:
        begun = trio.current_time()
        relay.scheduler._clock = lambda: relay.now + trio.current_time() - begun
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert hop.connections == 1
        await relay.accept(*(message_of("bob@example.org") for _ in range(messages - 1)))
        await relay.quiet()
        assert hop.connections == 1
        relay.events()
        yield relay


def retry(relay: Relay, folder: Path) -> None:
    """Do what `penstock spool retry --all` does."""
    with QueueAdmin.opened(folder, relay.scheduler._clock) as admin:
        admin.retry(Filter())
    relay.scheduler.look()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penstock.relay.scheduler, "_SWEEP_PAUSE", 0.001)


@pytest.mark.usefixtures("no_pause")
async def test_a_retry_tries_a_hop_that_is_backing_off(tmp_path: Path, pool: Pool) -> None:
    hop = FakeHop(CONNECT=[f"421 4.3.2 no{CLOSE}"])
    async with serving(hop), backing_off(tmp_path, pool, hop, 20) as relay:
        retry(relay, tmp_path)
        await relay.quiet()
        assert await relay.waiting() == []
        assert len(hop.texts) == 20
        assert relay.events("deferred") == []
        await pool.aclose()


@pytest.mark.usefixtures("no_pause")
async def test_a_retry_of_all_mail_costs_a_dead_hop_one_connection(tmp_path: Path, pool: Pool) -> None:
    hop = FakeHop(CONNECT=[f"421 4.3.2 no{CLOSE}"] * 99)
    async with serving(hop), backing_off(tmp_path, pool, hop, 20) as relay:
        for tries in (2, 3):
            retry(relay, tmp_path)
            await relay.quiet()
            assert hop.connections == tries
            said = [event["reply"] for event in relay.events("deferred")]
            assert sorted(said) == ["421 4.3.2 no", *["backing off: 421 4.3.2 no"] * 19]
        await pool.aclose()


# ---- the DNS


def exchanger(host: str, preference: int = 10) -> Exchanger:
    return Exchanger(preference, host, ("192.0.2.1",))


async def test_domains_with_the_same_hosts_share_a_route(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    dns: dict[str, list[Exchanger] | ResolveError] = {
        domain: [exchanger("mx.example.net"), exchanger("backup.example.net", 20)] for domain in ("a.org", "b.org")
    }
    async with relaying(tmp_path, pool, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(*(message_of(f"bob@{domain}") for _ in range(10) for domain in dns))
        await relay.until(lambda: len(pool.sent) == 4)
        assert {sent.hop.host for sent in pool.sent} == {"mx.example.net"}
        assert len(relay.scheduler._route_queues) == 1
        assert {sent.to[0] for sent in pool.sent} == {"bob@a.org", "bob@b.org"}


async def test_a_domain_that_does_not_exist_bounces(tmp_path: Path) -> None:
    dns: dict[str, list[Exchanger] | ResolveError] = {
        "gone.org": ResolveError("5.1.2", "the domain gone.org does not exist", is_permanent=True),
        "example.com": [exchanger("mx.example.com")],
    }
    async with relaying(tmp_path, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(message_of("bob@gone.org"))
        await relay.until(lambda: len(relay.pool.sent) == 1)
        (fields,) = report_in(relay.pool.sent[0])
        assert fields["Status"] == "5.1.2"
        assert fields["Diagnostic-Code"] == "x-penstock; the domain gone.org does not exist"
        await relay.quiet()
        assert await relay.waiting() == []


async def test_a_dns_timeout_defers(tmp_path: Path) -> None:
    dns: dict[str, list[Exchanger] | ResolveError] = {
        "a.org": ResolveError("4.4.3", "no answer", is_permanent=False),
        "b.org": [exchanger("mx.b.org")],
    }
    async with relaying(tmp_path, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(message_of("bob@a.org"), message_of("bob@b.org"), message_of("bob@unknown.org"))
        await relay.quiet()
        waiting = [(address, reply) for address, reply, _, _ in await relay.waiting()]
        assert waiting == [("bob@a.org", "no answer"), ("bob@unknown.org", "DNS lookup failed")]
        assert [event["where"] for event in relay.events("error")] == ["resolver"]  # KeyError: a bug of the test's DNS


async def test_a_retry_after_a_dns_failure_tries_at_once(tmp_path: Path) -> None:
    dns: dict[str, Any] = {"a.org": ResolveError("4.4.3", "no answer", is_permanent=False)}
    async with relaying(tmp_path, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(message_of("bob@a.org"))
        await relay.quiet()
        dns["a.org"] = [exchanger("mx.a.org")]
        relay.advance(1)
        with QueueAdmin.opened(tmp_path, lambda: relay.now) as admin:
            assert admin.retry(Filter()).changed == 1
        relay.scheduler.look()
        await relay.until(lambda: len(relay.pool.sent) == 1)
        await relay.quiet()
        assert await relay.waiting() == []


# ---- local delivery


async def test_a_route_to_maildir_is_delivered_locally(tmp_path: Path) -> None:
    async with relaying(tmp_path, routes=[{"next_hop": "maildir"}]) as relay:
        messages = [message_of(f"bob@d{n % 3}.org", "eve@d1.org") for n in range(50)]
        await relay.accept(*messages)
        await relay.quiet()
        got = {(message.id, str(to)) for message in relay.local.got for to in message.envelope.recipients}
        assert got == {(message.id, str(to)) for message in messages for to in message.envelope.recipients}
        assert relay.local.got[0].prefix == messages[0].prefix
        assert await relay.waiting() == []


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (Reply(452, "4.3.1", "Disk full"), "452 4.3.1 Disk full"),
        (OSError(5, "on fire", "/secret/path"), "the mailbox cannot be written"),
    ],
)
async def test_a_mailbox_that_cannot_be_written_is_tried_again(
    tmp_path: Path, answer: Reply | Exception, reply: str
) -> None:
    async with relaying(tmp_path, routes=[{"next_hop": "maildir"}]) as relay:
        relay.local.answer = answer
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", reply, 1, 60.0)]
        relay.local.answer = Reply(250, "2.0.0", "Ok")
        relay.advance(61)
        await relay.quiet()
        assert await relay.waiting() == []
        assert [event["hop"] for event in relay.events("attempted")] == ["maildir"]


async def test_mail_for_mailboxes_is_known(tmp_path: Path) -> None:
    routes = [{"domains": ["x.org"], "next_hop": "smtp://hop"}, {"domains": ["y.org"], "next_hop": "mx"}]
    async with relaying(tmp_path, routes=[*routes, {"next_hop": "maildir"}]) as relay:
        scheduler = relay.scheduler
        assert scheduler.are_mailboxes(["a.org", "b.org"])
        for elsewhere in ("x.org", "y.org"):
            assert not scheduler.are_mailboxes(["a.org", elsewhere])
        scheduler.set_suspended(frozenset({"b.org"}))
        assert not scheduler.are_mailboxes(["a.org", "b.org"])
        assert scheduler.are_mailboxes(["a.org"])


async def test_what_was_written_to_mailboxes_is_noted_as_delivered(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        counted: list[tuple[str, int, int, float]] = []
        message = message_of("a@a.org", "b@b.org")
        relay.scheduler.note_delivered(message, ["a.org", "b.org"], Reply(250, "2.0.0", "Ok"))  # without statistics
        relay.recorder.on_result = lambda *args: counted.append(args)
        relay.scheduler.note_delivered(message, ["a.org", "b.org"], Reply(250, "2.0.0", "Ok"))
        assert [each[:3] for each in counted] == [("a.org", 0, 1), ("b.org", 0, 1)]
        told = [(event["id"], event["to"], event["reply"]) for event in relay.events("delivered")]
        assert told == [(message.id, ["a@a.org", "b@b.org"], "250 2.0.0 Ok")] * 2


async def test_postmaster_without_a_domain_gets_the_first_domain(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        await relay.accept(message_of(Recipient(MailPath("Postmaster", "Postmaster", ""))))
        await relay.quiet()
        (sent,) = relay.pool.sent
        assert sent.envelope.recipients[0].path == MailPath("Postmaster@mx.example.org", "Postmaster", "mx.example.org")


async def test_a_recipient_named_three_times_gets_one_copy(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        await relay.accept(message_of("bob@x.org", "eve@x.org", "bob@x.org", "bob@x.org"))
        await relay.quiet()
        assert [sent.to for sent in relay.pool.sent] == [["bob@x.org", "eve@x.org"]]


# ---- times and reports


async def test_the_delay_notice_comes_when_it_is_due(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else BUSY)
    async with relaying(tmp_path, pool, retry={"delay_notice_after": 4 * HOUR}) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        while not pool.to("example.com"):
            ((*_, wait),) = await relay.waiting()
            count = len(pool.sent)
            relay.advance(wait)
            await relay.until(lambda: len(pool.sent) > count)  # noqa: B023 - at once
            await relay.quiet()
        assert relay.now == START + 4 * HOUR


async def test_the_status_of_a_delay_is_transient(tmp_path: Path) -> None:
    greeting = NextHopUnavailable("mx.example.org[192.0.2.1]:25", "554 5.7.1 go away", "5.7.1", is_said=True)
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else greeting)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        relay.advance(4 * HOUR)
        await relay.until(lambda: bool(pool.to("example.com")))
        (fields,) = report_in(pool.to("example.com")[0])
        assert (fields["Action"], fields["Status"]) == ("delayed", "4.7.1")
        assert fields["Remote-MTA"] == "dns; mx.example.org"
        assert fields["Diagnostic-Code"] == "smtp; 554 5.7.1 go away"


async def test_a_clock_set_forward_returns_nothing(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else BUSY)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        await relay.set_clock(6 * 24 * HOUR)
        await relay.until(lambda: len(pool.sent) == 2)
        await relay.quiet()
        assert pool.to("example.com") == []
        ((*_, wait),) = await relay.waiting()
        assert 0 < wait <= HOUR
        (event,) = relay.events("clock-jumped")
        assert (event["seconds"], event["rescheduled"]) == (6 * 24 * HOUR, 0)
        relay.advance(HOUR)  # from here on notices are sent, but the message is an hour old
        await relay.until(lambda: len(pool.sent) == 3)
        await relay.quiet()
        assert pool.to("example.com") == []
        relay.advance(4 * HOUR)
        await relay.until(lambda: bool(pool.to("example.com")))
        assert report_in(pool.to("example.com")[0])[0]["Action"] == "delayed"
        relay.advance(6 * 24 * HOUR)
        await relay.until(lambda: len(pool.to("example.com")) == 2)
        assert report_in(pool.to("example.com")[1])[0]["Action"] == "failed"


async def ages(relay: Relay) -> dict[str, float]:
    """Return the hours since messages were received, by their senders."""
    found = await relay.spool._committer.do(
        lambda store: store._database.execute("SELECT sender, received_at FROM message").fetchall()
    )
    return {sender: (relay.now - received_at) / HOUR for sender, received_at in found}


async def test_a_clock_that_is_wrong_for_a_while_changes_no_age(tmp_path: Path) -> None:
    day = 24 * HOUR
    for jump in (6 * day, -3 * day):
        pool = FakePool(lambda _: BUSY)
        async with relaying(tmp_path / str(jump), pool) as relay:
            await relay.accept(message_of("bob@example.org", sender="before@example.com", at=relay.now))
            await relay.quiet()
            relay.advance(HOUR)
            await relay.quiet()
            await relay.set_clock(jump)
            await relay.accept(message_of("bob@example.org", sender="while@example.com", at=relay.now))
            await relay.quiet()
            assert await ages(relay) == {"before@example.com": 1, "while@example.com": 0}
            await relay.set_clock(-jump)
            assert await ages(relay) == {"before@example.com": 1, "while@example.com": 0}


async def test_a_message_tried_right_after_a_jump_is_not_returned(tmp_path: Path) -> None:
    """An attempt may end before the clock is looked at the next time."""
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else BUSY)
    async with relaying(tmp_path, pool) as relay:
        await relay.scheduler.check_clock()
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        relay.set_by += 6 * 24 * HOUR
        relay.advance(6 * 24 * HOUR)
        await relay.until(lambda: len(pool.sent) == 2)
        await relay.quiet()
        assert pool.to("example.com") == []
        assert [event["seconds"] for event in relay.events("clock-jumped")] == [6 * 24 * HOUR]


def full(*_: Any) -> Any:
    raise sqlite3.OperationalError("database or disk is full")


def returning_pool() -> FakePool:
    """Return a hop that is busy, except for reports."""
    return FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else BUSY)


async def test_ages_are_corrected_once_although_the_disk_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each failure comes after the work, in the transaction: before the first, the second and the last commit."""
    monkeypatch.setattr(penstock.spool.store, "_SHIFTED", 1)
    shift, calls = Store.shift_received, 0

    def failing(*arguments: Any) -> int | None:
        nonlocal calls
        calls += 1
        done = shift(*arguments)
        return full() if calls in (1, 3, 5) else done

    monkeypatch.setattr(Store, "shift_received", failing)
    async with relaying(tmp_path, runs=False) as relay:
        # So old that they would be corrected again by another pass.
        await relay.accept(*(message_of("b@example.org", sender=f"{n}@example.com") for n in range(3)))
        relay.advance(3 * HOUR)
        for jump in (HOUR, None, None):
            with pytest.raises(sqlite3.OperationalError):
                await (relay.scheduler.check_clock() if jump is None else relay.set_clock(jump))
        await relay.accept(message_of("b@example.org", sender="later@example.com", at=relay.now))
        relay.advance(2 * HOUR)  # the disk was full for long
        await relay.scheduler.check_clock()
        assert await ages(relay) == {**{f"{n}@example.com": 5 for n in range(3)}, "later@example.com": 2}


async def test_no_mail_is_returned_before_ages_are_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pool = returning_pool()
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        with monkeypatch.context() as patch:
            patch.setattr(Store, "shift_received", full)
            with pytest.raises(sqlite3.OperationalError):
                await relay.set_clock(6 * 24 * HOUR)
            await relay.until(lambda: len(pool.sent) == 2)
            await relay.quiet()
            relay.advance(2 * HOUR)
            await relay.until(lambda: len(pool.sent) == 3)
            await relay.quiet()
        await relay.scheduler.check_clock()
        assert await ages(relay) == {"alice@example.com": 2}
        assert pool.to("example.com") == []


async def test_jumps_that_wait_for_the_disk_are_corrected_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relaying(tmp_path, runs=False) as relay:
        await relay.accept(message_of("bob@example.org", sender="before@example.com"))
        relay.advance(HOUR)
        with monkeypatch.context() as patch:
            patch.setattr(Store, "shift_received", full)
            for days in (-6, 30, -1):
                with pytest.raises(sqlite3.OperationalError):
                    await relay.set_clock(days * 24 * HOUR)
                await relay.accept(message_of("bob@example.org", sender=f"after{days}@example.com"))
        relay.advance(HOUR)
        await relay.scheduler.check_clock()
        after = {f"after{days}@example.com": 1 for days in (-6, 30, -1)}
        assert await ages(relay) == {"before@example.com": 2, **after}


async def test_ages_are_corrected_through_a_log_of_bounded_size(tmp_path: Path) -> None:
    async with relaying(tmp_path, runs=False) as relay:
        await relay.accept(*(message_of("bob@example.org") for _ in range(10)))
        before = relay.spool._store.checkpoints.logged
        await relay.set_clock(HOUR)
        assert relay.spool._store.checkpoints.logged >= before + 10 * 4096, "or no checkpoint would be made"


async def test_a_clock_set_forward_and_back_at_once_returns_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next hop answers while the spool is being corrected."""
    pool = returning_pool()
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        await relay.scheduler.check_clock()
        reschedule = relay.spool.reschedule

        async def meanwhile(*arguments: Any) -> int:
            relay.scheduler.look()
            await relay.until(lambda: len(pool.sent) == 2)
            await relay.quiet()
            return await reschedule(*arguments)

        monkeypatch.setattr(relay.spool, "reschedule", meanwhile)
        for jump in (7 * 24 * HOUR, -HOUR):
            relay.now += jump
            relay.set_by += jump
            relay.scheduler.notice_clock()
        await relay.scheduler.check_clock()
        assert len(pool.sent) == 2 and pool.to("example.com") == []
        assert await ages(relay) == {"alice@example.com": 0}


async def test_a_message_in_flight_during_a_jump_is_not_returned(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else None)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.set_clock(6 * 24 * HOUR)
        relay.advance(2 * HOUR)  # a very slow hop
        pool.reply(pool.sent[0], BUSY)
        await relay.quiet()
        assert len(pool.sent) == 1, "neither returned nor notified"
        relay.advance(3 * HOUR)
        await relay.until(lambda: len(pool.sent) == 2)
        pool.reply(pool.sent[1], BUSY)
        await relay.until(lambda: bool(pool.to("example.com")))
        assert report_in(pool.to("example.com")[0])[0]["Action"] == "delayed", "after five hours"


async def test_a_message_whose_age_cannot_be_read_is_not_returned(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = returning_pool()
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        with monkeypatch.context() as patch:
            patch.setattr(Store, "received_at", full)
            relay.advance(6 * 24 * HOUR)
            await relay.until(lambda: len(pool.sent) == 2)
            await relay.quiet()
            assert pool.to("example.com") == []
        relay.advance(HOUR)
        await relay.until(lambda: bool(pool.to("example.com")))
        assert report_in(pool.to("example.com")[0])[0]["Action"] == "failed"


async def test_a_result_written_after_a_jump_back_delays_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock.relay.recorder, "_FIRST_PAUSE", 0.001)
    async with relaying(tmp_path, FakePool(lambda _: BUSY)) as relay:
        await relay.scheduler.check_clock()
        record, calls = relay.spool.record, 0

        async def failing(*arguments: Any) -> None:
            nonlocal calls
            calls += 1
            if calls == 1:
                await relay.set_clock(-3 * 24 * HOUR)
                full()
            await record(*arguments)

        monkeypatch.setattr(relay.spool, "record", failing)
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet_but_due()
        ((*_, wait),) = await relay.waiting()
        assert wait <= 4 * HOUR, "the longest wait of the schedule"


async def test_operators_are_answered_although_the_clock_cannot_be_corrected(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with relaying(tmp_path, runs=False) as relay:
        await relay.accept(message_of("bob@example.org"))
        answered = trio.Event()

        async def look() -> None:
            answered.set()

        await relay.scheduler.check_clock()
        monkeypatch.setattr(Store, "shift_received", full)
        monkeypatch.setattr(relay.operators, "look", look)
        relay.now += HOUR
        relay.set_by += HOUR
        async with trio.open_nursery() as nursery:
            nursery.start_soon(relay.operators.run)
            with trio.fail_after(30):
                await answered.wait()
            nursery.cancel_scope.cancel()
        assert {event["where"] for event in relay.events("error")} == {"clock"}


async def test_a_clock_set_back_delays_nothing(tmp_path: Path) -> None:
    pool = FakePool(lambda _: BUSY)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"), message_of("eve@example.org"))
        await relay.quiet()
        await relay.set_clock(-3 * 24 * HOUR)
        assert {wait for *_, wait in await relay.waiting()} == {60.0}
        (event,) = relay.events("clock-jumped")
        assert (event["seconds"], event["rescheduled"]) == (-3 * 24 * HOUR, 2)
        relay.advance(61)
        await relay.until(lambda: len(pool.sent) == 4)


async def test_small_corrections_of_the_clock_change_nothing(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        for seconds in (59.0, -59.0, 599.0):
            await relay.set_clock(seconds)
        assert relay.events("clock-jumped") == []


# ---- what operators do (penstock spool)


async def ask(relay: Relay, folder: Path, act: Callable[[QueueAdmin], Any]) -> Any:
    """Do what a command does, in its own thread, while the server answers."""

    def work() -> Any:
        with QueueAdmin.opened(folder, lambda: relay.now) as admin:
            return act(admin)

    answer: list[Any] = []

    async def wait() -> None:
        answer.append(await trio.to_thread.run_sync(work))

    with trio.fail_after(30):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(wait)
            while not answer:
                await relay.operators.look()
                await trio.sleep(0.001)
            await relay.operators.look()
    return answer[0]


@asynccontextmanager
async def with_waiting(folder: Path) -> AsyncIterator[Relay]:
    """Run a relay with four messages in flight and six that only wait in memory."""
    pool = FakePool(lambda _: None)
    async with relaying(folder, pool) as relay:
        await relay.accept(*(message_of(f"b{n}@example.org") for n in range(10)))
        assert (len(pool.sent), relay.scheduler.held) == (4, 10)
        yield relay


async def test_hold_reaches_what_waits_in_memory(tmp_path: Path) -> None:
    async with with_waiting(tmp_path) as relay:
        assert await ask(relay, tmp_path, lambda admin: admin.hold(Filter())) == (6, 4, 0)
        assert relay.scheduler.held == 4
        for sent in list(relay.pool.sent):
            relay.pool.reply(sent, DELIVERED)
        await relay.quiet()
        assert len(relay.pool.sent) == 4
        assert await ask(relay, tmp_path, lambda admin: admin.release(Filter())) == (6, 0, 0)
        relay.pool.answer = lambda _: DELIVERED
        relay.scheduler.look()
        await relay.until(lambda: len(relay.pool.sent) == 10)
        await relay.quiet()
        assert [event["recipients"] for event in relay.events("operated") if event["action"] == "release"] == [1] * 6


async def test_drop_reaches_what_waits_in_memory(tmp_path: Path) -> None:
    async with with_waiting(tmp_path) as relay:
        assert await ask(relay, tmp_path, lambda admin: admin.drop(Filter())) == (6, 4, 0)
        assert len(await relay.waiting()) == 4


async def test_retry_of_what_waits_in_memory_counts_no_attempt(tmp_path: Path) -> None:
    async with with_waiting(tmp_path) as relay:
        assert await ask(relay, tmp_path, lambda admin: admin.retry(Filter())) == (6, 4, 0)
        await relay.until(lambda: relay.scheduler.held == 10)
        assert {attempts for _, _, attempts, _ in await relay.waiting()} == {1}


async def test_an_operator_returns_a_message_to_its_sender(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.envelope.sender.text == "" else BUSY)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org", "eve@example.org"), message_of("zoe@example.org"))
        await relay.quiet()
        assert await ask(relay, tmp_path, lambda admin: admin.bounce(Filter(recipient="bob@*"))) == (1, 0, 0)
        await relay.quiet()
        (report,) = pool.to("example.com")
        (fields,) = report_in(report)
        assert (fields["Final-Recipient"], fields["Action"], fields["Status"]) == (
            "rfc822; bob@example.org",
            "failed",
            "5.0.0",
        )
        assert [address for address, *_ in await relay.waiting()] == ["eve@example.org", "zoe@example.org"]
        assert [event["action"] for event in relay.events("operated")] == ["bounce"]


async def test_bounce_reaches_what_waits_in_memory(tmp_path: Path) -> None:
    async with with_waiting(tmp_path) as relay:
        assert await ask(relay, tmp_path, lambda admin: admin.bounce(Filter())) == (6, 4, 0)
        await relay.until(lambda: len(relay.events("bounced")) == 6)


@pytest.mark.parametrize("name", ["Example.org", "hop", "hop[192.0.2.9]:25"])
async def test_mail_to_what_is_suspended_waits(tmp_path: Path, name: str) -> None:
    async with relaying(tmp_path) as relay:
        assert await ask(relay, tmp_path, lambda admin: admin.suspend(name)) is True
        await relay.accept(*(message_of("bob@example.org") for _ in range(20)))
        await relay.quiet_but_due()
        assert relay.pool.sent == []
        assert {attempts for _, _, attempts, _ in await relay.waiting()} == {0}
        assert await ask(relay, tmp_path, lambda admin: admin.resume(name)) is True
        await relay.until(lambda: len(relay.pool.sent) == 20)
        await relay.quiet()


@pytest.mark.parametrize("name", ["example.org", "hop"])
async def test_reports_to_a_suspended_domain_wait_as_well(tmp_path: Path, name: str) -> None:
    pool = FakePool(lambda _: None, most=1)
    async with relaying(tmp_path, pool) as relay:
        for _ in range(2):
            await relay.spool.put(message_of("tls@example.org"), ["clear:example.org"])
        await relay.until(lambda: len(pool.sent) == 1)
        await ask(relay, tmp_path, lambda admin: admin.suspend(name))
        await relay.until(lambda: relay.scheduler.suspended == {name})
        assert relay.scheduler._queues["clear:example.org"].is_suspended
        pool.reply(pool.sent[0], DELIVERED)
        await relay.quiet_but_due()
        relay.scheduler.reroute()  # the queue is suspended before its route is known, unless the name is that of a hop
        assert relay.scheduler._queues["clear:example.org"].is_suspended is (name == "example.org")
        await relay.spool.put(message_of("tls@example.org"), ["clear:example.org"])
        await relay.quiet_but_due()
        assert len(pool.sent) == 1
        pool.answer = lambda _: DELIVERED
        await ask(relay, tmp_path, lambda admin: admin.resume(name))
        await relay.until(lambda: len(pool.sent) == 3)
        await relay.quiet()


async def test_suspending_a_domain_reaches_a_message_that_waits_for_several(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None, most=1)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("x@z.org"))
        await relay.accept(message_of("a@a.org", "b@b.org"))
        await relay.until(lambda: len(pool.sent) == 1)
        await ask(relay, tmp_path, lambda admin: admin.suspend("b.org"))
        await relay.until(lambda: relay.scheduler.suspended == {"b.org"})
        assert [event["name"] for event in relay.events("route-suspended")] == ["b.org"]
        pool.reply(pool.sent[0], DELIVERED)
        await relay.until(lambda: len(pool.sent) == 2)
        assert pool.sent[1].to == ["a@a.org"]
        pool.reply(pool.sent[1], DELIVERED)
        await ask(relay, tmp_path, lambda admin: admin.resume("b.org"))
        await relay.until(lambda: len(pool.sent) == 3)
        assert pool.sent[2].to == ["b@b.org"]
        pool.reply(pool.sent[2], DELIVERED)
        await relay.quiet()


async def test_a_suspended_hop_leaves_the_mail_to_others(tmp_path: Path) -> None:
    async with relaying(tmp_path, routes=TWO_HOSTS) as relay:
        await ask(relay, tmp_path, lambda admin: admin.suspend("a"))
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [sent.hop.host for sent in relay.pool.sent] == ["b"]


async def test_an_attempt_does_not_go_on_to_a_hop_suspended_meanwhile(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool, routes=TWO_HOSTS) as relay:
        await relay.accept(message_of("bob@example.org"))
        await ask(relay, tmp_path, lambda admin: admin.suspend("b"))
        pool.reply(pool.sent[0], BUSY)
        await relay.quiet()
        assert [sent.hop.host for sent in pool.sent] == ["a"]
        assert await relay.waiting() == [("bob@example.org", "450 4.2.1 Busy", 1, 60.0)]


async def test_operators_see_which_hops_are_down_and_why(tmp_path: Path) -> None:
    pool = FakePool()

    def answer(sent: Sent) -> NextHopUnavailable:
        pool.down["hop"] = trio.current_time() + 60
        return NextHopUnavailable(sent.hop.name, "Connection refused")

    pool.answer = answer
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        await relay.operators.look()
        (hop,) = await ask(relay, tmp_path, lambda admin: admin.hops())
        assert (hop.name, hop.reason, hop.since) == ("hop[192.0.2.9]:25", "Connection refused", START)
        assert 55 < hop.until - START <= 60
        pool.down.clear()
        await relay.operators.look()
        assert await ask(relay, tmp_path, lambda admin: admin.hops()) == []


async def test_hops_shown_as_down_are_bounded_and_do_not_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock.relay.scheduler, "_MAX_HOPS_SHOWN", 3)
    hops = [Hop(host=f"mx{number}") for number in range(5)]
    now = trio.current_time()
    pool = FakePool(down={hop.host: now - 1000 for hop in hops}, backing_off=[(hop, START - 5, "no") for hop in hops])
    async with relaying(tmp_path, pool, runs=False) as relay:
        relay.scheduler._clock = lambda: relay.now + trio.current_time() - now
        relay.scheduler.note_unavailable(hops[4], NextHopUnavailable("mx4", "no"))
        shown = list(relay.scheduler.hops_down())
        assert [hop.name for hop in shown] == ["mx4:25", "mx0:25", "mx1:25"]
        assert {hop.until for hop in shown} == {START - 1000}, "the pause is over, and stays over"
        assert {hop.since for hop in shown[1:]} == {START - 5}
        relay.now += 10  # the wall clock is set
        assert [hop.since for hop in relay.scheduler.hops_down()] == [hop.since for hop in shown]


# ---- shutdown, and bugs


async def test_a_delivery_cut_by_our_shutdown_costs_nothing(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org", "eve@example.org"), message_of("zoe@example.org"))
        relay.scheduler.stop()
        pool.reply(pool.sent[0], [DELIVERED, LOST])
        pool.reply(pool.sent[1], BUSY)
        await relay.quiet_but_due()
        assert [(address, attempts, wait) for address, _, attempts, wait in await relay.waiting()] == [
            ("eve@example.org", 0, 0.0),
            ("zoe@example.org", 1, 60.0),
        ]


async def test_what_was_not_started_at_shutdown_was_not_attempted(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of(f"b{n}@example.org") for n in range(10)))
        relay.scheduler.stop()
        for sent in pool.sent:
            pool.reply(sent, NextHopUnavailable("hop", "the relay is stopping"))
        await relay.accept(message_of("late@example.org"))
    async with relaying(tmp_path, runs=False) as relay:
        waiting = await relay.waiting()
        assert len(waiting) == 11
        assert {(attempts, wait) for _, _, attempts, wait in waiting} == {(0, 0.0)}


async def test_what_was_in_flight_when_the_process_ends_is_due_again(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of(f"b{n}@example.org") for n in range(10)))
        assert len(pool.sent) == 4
    async with relaying(tmp_path) as relay:
        await relay.quiet()
        assert len(relay.pool.sent) == 10


async def test_a_bug_in_one_delivery_delays_only_that_message(tmp_path: Path) -> None:
    def answer(sent: Sent) -> Result | Exception:
        return ZeroDivisionError("a bug") if sent.to == ["bad@example.org"] else DELIVERED

    async with relaying(tmp_path, FakePool(answer)) as relay:
        await relay.accept(message_of("bad@example.org"), *(message_of("good@example.org") for _ in range(20)))
        await relay.quiet()
        assert len(relay.pool.sent) == 21
        assert await relay.waiting() == [("bad@example.org", "internal error", 1, 60.0)]
        assert [event["error"] for event in relay.events("error")] == ["ZeroDivisionError: a bug"]


async def test_a_result_that_cannot_be_recorded_is_tried_again(tmp_path: Path) -> None:
    pool = FakePool(lambda _: [DELIVERED, DELIVERED])  # for one recipient
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [(reply, wait) for _, reply, _, wait in await relay.waiting()] == [("internal error", 300.0)]


async def test_a_failure_that_cannot_be_reported_is_not_forgotten(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = FakePool(lambda sent: DELIVERED if sent.to == ["eve@example.org"] else REFUSED)
    async with relaying(tmp_path, pool) as relay:

        def bug(*_: Any, **__: Any) -> None:
            raise ZeroDivisionError("a bug")

        monkeypatch.setattr(Reporter, "report", bug)
        await relay.accept(message_of("bob@example.org"), message_of("eve@example.org"))
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", "no report: 550 5.1.1 No such user", 1, 300.0)]
        assert {event["error"] for event in relay.events("error")} == {"ZeroDivisionError: a bug"}
        monkeypatch.undo()
        pool.answer = lambda sent: DELIVERED if sent.envelope.sender.text == "" else REFUSED
        relay.advance(301)
        await relay.until(lambda: bool(pool.to("example.com")))
        await relay.quiet()
        assert await relay.waiting() == []


async def test_a_spool_that_fails_is_written_again_until_it_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock.relay.recorder, "_FIRST_PAUSE", 0.001)
    async with relaying(tmp_path) as relay:
        record, failures = relay.spool.record, [OSError(28, "No space left on device")] * 3

        async def fail(*arguments: object) -> None:
            if failures:
                raise failures.pop()
            await record(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(relay.spool, "record", fail)
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert failures == []
        assert len(relay.pool.sent) == 1
        assert await relay.waiting() == []
        assert len(relay.events("error")) == 3


async def test_idle_queues_are_forgotten(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        await relay.accept(*(message_of(f"bob@d{n}.org") for n in range(100)))
        await relay.quiet()
        assert len(relay.scheduler._queues) == 100
        relay.scheduler._evict(trio.current_time() + 100)
        assert relay.scheduler._queues == {}
        assert relay.scheduler._route_queues == {}


def test_a_result_of_ours_is_deferred() -> None:
    assert NextHopUnavailable("hop", "down").as_result().kind is Outcome.DEFERRED
