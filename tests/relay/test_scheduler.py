"""The scheduler: what goes when, what waits, and what no bug, no dead hop and no restart may do to it."""

from __future__ import annotations

import email
import email.message
import email.policy
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, cast

import pytest
import trio

import penstock.relay.ledger
import penstock.relay.scheduler
from penstock.message import Recipient
from penstock.net.resolver import Exchanger, ResolveError
from penstock.relay.hop import NextHopUnavailable, Outcome, Result
from penstock.relay.pool import Pool
from penstock.reply import Reply
from penstock.spool.admin import Filter, QueueAdmin
from tests.relay.fake import CLOSE, FakeHop, serving
from tests.relay.harness import BUSY, DELIVERED, REFUSED, FakePool, Relay, Sent, message_of, path_of, relaying

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


async def test_a_message_goes_out_as_it_came_and_leaves_the_spool(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        message = message_of("bob@example.org", "eve@example.org")
        await relay.accept(message)
        await relay.quiet()
        (sent,) = relay.pool.sent
        assert sent.envelope == message.envelope
        assert sent.text == b"Received: from test\r\nSubject: Hello\r\n\r\nHow are you?\r\n"
        assert await relay.waiting() == []
        assert [event["to"] for event in relay.events("delivered")] == [["bob@example.org"], ["eve@example.org"]]


async def test_recipients_with_the_same_next_hop_go_in_one_transaction(tmp_path: Path) -> None:
    routes: list[dict[str, Any]] = [{"domains": ["z.org"], "next_hop": "smtp://other"}, {"next_hop": "smtp://hop"}]
    async with relaying(tmp_path, routes=routes) as relay:
        await relay.accept(message_of("a@x.org", "b@y.org", "c@x.org", "d@z.org"))
        await relay.quiet()
        assert sorted(sent.to for sent in relay.pool.sent) == [["a@x.org", "c@x.org", "b@y.org"], ["d@z.org"]]
        assert await relay.waiting() == []


async def test_what_is_tried_again_goes_by_its_domain(tmp_path: Path) -> None:
    pool = FakePool(lambda _: BUSY)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("a@x.org", "b@y.org", "c@x.org"))
        await relay.quiet()
        assert [(address, wait) for address, _, _, wait in await relay.waiting()] == [
            ("a@x.org", 60.0), ("b@y.org", 60.0), ("c@x.org", 60.0)
        ]  # fmt: skip
        pool.answer = lambda _: DELIVERED
        relay.advance(61)
        await relay.quiet()
        assert sorted(sent.to for sent in pool.sent[1:]) == [["a@x.org", "c@x.org"], ["b@y.org"]]
        assert await relay.waiting() == []


async def test_recipients_of_each_domain_go_in_one_transaction_to_its_mx(tmp_path: Path) -> None:
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


async def test_more_than_fits_into_memory_waits_in_the_spool_and_goes_out_too(tmp_path: Path) -> None:
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


async def test_a_hop_gets_no_more_than_it_has_room_for(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None, most=3)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of(f"bob@d{n % 7}.org") for n in range(50)))
        for _ in range(50):
            await relay.until(lambda: pool.open.get("hop", 0) > 0)
            pool.reply(next(sent for sent in pool.sent if not hasattr(sent, "over")), DELIVERED)
            pool.sent[:] = pool.sent[1:]
        await relay.quiet()
        assert pool.peak == {"hop": 3}


async def test_a_new_hop_gets_few_at_a_time_until_it_has_taken_some(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of("bob@example.org") for _ in range(100)))
        assert pool.open == {"hop": 4}
        pool.reply(pool.sent[0], DELIVERED)
        assert pool.open == {"hop": 8}


async def test_the_lanes_of_a_hop_take_turns(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None, most=1)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of("bob@many.org") for _ in range(20)))
        await relay.accept(*(message_of("bob@few.org") for _ in range(3)))
        for n in range(23):
            pool.reply(pool.sent[n], DELIVERED)
        order = [sent.to[0] for sent in pool.sent]
        assert order[1:7].count("bob@few.org") == 3


async def test_a_hop_that_says_nothing_keeps_nobody_else_waiting(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: None if sent.hop.host == "slow" else DELIVERED)
    routes: list[dict[str, Any]] = [{"domains": ["slow.org"], "next_hop": "smtp://slow"}, {"next_hop": "smtp://fast"}]
    async with relaying(tmp_path, pool, routes=routes, memory_messages=100) as relay:
        await relay.accept(*(message_of("bob@slow.org") for _ in range(500)))
        await relay.accept(*(message_of(f"bob@d{n % 5}.org") for n in range(100)))
        await relay.until(lambda: sum(sent.hop.host == "fast" for sent in pool.sent) == 100)
        assert len(pool.to("slow.org")) == 4


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


async def test_what_is_refused_for_now_is_tried_again_by_the_schedule(tmp_path: Path) -> None:
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


async def test_what_is_due_again_soon_is_not_left_for_later(tmp_path: Path) -> None:
    pool = FakePool(lambda _: BUSY)
    async with relaying(tmp_path, pool, retry={"schedule": [1]}) as relay:
        await relay.until(lambda: relay.scheduler._looks_at >= relay.now + 5)  # there is nothing to look for
        await relay.accept(message_of("bob@example.org"))
        await relay.until(lambda: relay.scheduler._looks_at == relay.now + 1)


async def test_each_recipient_has_an_end_of_its_own(tmp_path: Path) -> None:
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


async def test_a_failure_comes_back_to_the_sender_as_mail_from_nobody(tmp_path: Path) -> None:
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


async def test_the_sender_of_a_late_message_hears_of_it_once(tmp_path: Path) -> None:
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
async def test_who_wants_to_hear_of_success_does_so_from_the_last_server_that_can(
    tmp_path: Path, url: str, reports: bool, action: str | None
) -> None:
    pool = FakePool(lambda _: DELIVERED._replace(reports=reports))
    async with relaying(tmp_path, pool, routes=[{"next_hop": url}]) as relay:
        await relay.accept(message_of(wishing("bob@example.org", "SUCCESS")))
        await relay.quiet()
        told = [report_in(sent)[0]["Action"] for sent in pool.to("example.com")]
        assert told == ([] if action is None else [action])


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


async def test_a_busy_first_hop_is_no_reason_to_use_the_second(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None, most=2)
    routes = [{"next_hops": [{"url": "smtp://a", "priority": 1}, {"url": "smtp://b", "priority": 2}]}]
    async with relaying(tmp_path, pool, routes=routes) as relay:
        await relay.accept(*(message_of("bob@example.org") for _ in range(10)))
        assert pool.peak == {"a": 2}


async def test_when_all_hops_are_down_each_message_waits_by_its_own_schedule(tmp_path: Path) -> None:
    pool = FakePool(lambda sent: NextHopUnavailable(sent.hop.name, "Connection refused"))
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", "Connection refused", 1, 60.0)]
        relay.advance(60)
        await relay.until(lambda: len(pool.sent) == 2)
        await relay.quiet()
        assert await relay.waiting() == [("bob@example.org", "Connection refused", 2, 300.0)]


async def test_mail_for_a_hop_that_is_left_alone_is_put_off_without_trying(tmp_path: Path) -> None:
    async with relaying(tmp_path, runs=False) as relay:
        await relay.accept(*(message_of("bob@dead.org") for _ in range(300)))
    pool = FakePool(down={"dead": 1e12})
    routes: list[dict[str, Any]] = [{"domains": ["dead.org"], "next_hop": "smtp://dead"}, {"next_hop": "smtp://hop"}]
    async with relaying(tmp_path, pool, routes=routes) as relay:
        lane = "dead.org"
        await relay.until(lambda: relay.scheduler._lanes.get(lane) is not None and relay.scheduler._lanes[lane].is_down)
        await relay.accept(*(message_of("bob@dead.org") for _ in range(100)))
        assert relay.scheduler.held == 0  # they stay on the disk, and are not handed over
        await relay.accept(*(message_of("bob@live.org") for _ in range(100)))
        await relay.until(lambda: len(pool.to("live.org")) == 100)
        assert pool.to("dead.org") == []
        waiting = [each for each in await relay.waiting() if each[0] == "bob@dead.org"]
        assert len(waiting) == 400
        put_off = [each for each in waiting if each[2] == 1]
        assert put_off and all(wait == 60.0 and reply == "the next hop is down" for _, reply, _, wait in put_off)


async def test_a_hop_that_is_back_gets_its_mail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
async def left_alone(folder: Path, pool: Pool, hop: FakeHop, messages: int) -> AsyncIterator[Relay]:
    """Run a relay to a hop that is left alone after the first message, with clocks that go."""
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
    with QueueAdmin.opened(folder, relay.scheduler._clock) as desk:
        desk.retry(Filter())
    relay.scheduler._look.set()


@pytest.fixture
def no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(penstock.relay.scheduler, "_SWEEP_PAUSE", 0.001)


@pytest.mark.usefixtures("no_pause")
async def test_an_operators_retry_tries_a_hop_that_is_left_alone(tmp_path: Path, pool: Pool) -> None:
    hop = FakeHop(CONNECT=[f"421 4.3.2 no{CLOSE}"])
    async with serving(hop), left_alone(tmp_path, pool, hop, 20) as relay:
        retry(relay, tmp_path)
        await relay.quiet()
        assert await relay.waiting() == []
        assert len(hop.texts) == 20
        assert relay.events("deferred") == []
        await pool.aclose()


@pytest.mark.usefixtures("no_pause")
async def test_an_operators_retry_of_much_mail_costs_a_dead_hop_one_connection(tmp_path: Path, pool: Pool) -> None:
    hop = FakeHop(CONNECT=[f"421 4.3.2 no{CLOSE}"] * 99)
    async with serving(hop), left_alone(tmp_path, pool, hop, 20) as relay:
        for tries in (2, 3):
            retry(relay, tmp_path)
            await relay.quiet()
            assert hop.connections == tries
            said = [event["said"] for event in relay.events("deferred")]
            assert sorted(said) == ["421 4.3.2 no", *["the next hop is down: 421 4.3.2 no"] * 19]
        await pool.aclose()


# ---- the DNS


def exchanger(host: str, preference: int = 10) -> Exchanger:
    return Exchanger(preference, host, ("192.0.2.1",))


async def test_the_dns_is_asked_once_for_a_lane_and_lanes_with_the_same_hosts_share_them(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    dns: dict[str, list[Exchanger] | ResolveError] = {
        domain: [exchanger("mx.example.net"), exchanger("backup.example.net", 20)] for domain in ("a.org", "b.org")
    }
    async with relaying(tmp_path, pool, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(*(message_of(f"bob@{domain}") for _ in range(10) for domain in dns))
        await relay.until(lambda: len(pool.sent) == 4)
        assert {sent.hop.host for sent in pool.sent} == {"mx.example.net"}
        assert len(relay.scheduler._outlets) == 1
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


async def test_a_dns_that_does_not_answer_puts_off(tmp_path: Path) -> None:
    dns: dict[str, list[Exchanger] | ResolveError] = {
        "a.org": ResolveError("4.4.3", "no answer", is_permanent=False),
        "b.org": [exchanger("mx.b.org")],
    }
    async with relaying(tmp_path, routes=[{"next_hop": "mx"}], dns=dns) as relay:
        await relay.accept(message_of("bob@a.org"), message_of("bob@b.org"), message_of("bob@unknown.org"))
        await relay.quiet()
        waiting = [(address, reply) for address, reply, _, _ in await relay.waiting()]
        assert waiting == [("bob@a.org", "no answer"), ("bob@unknown.org", "looking up the domain failed")]
        assert [event["where"] for event in relay.events("error")] == ["resolver"]  # KeyError: a bug of the test's DNS


# ---- here


async def test_a_route_to_the_maildir_ends_here(tmp_path: Path) -> None:
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
        (OSError(5, "on fire", "/secret/path"), "the mailbox can not be written"),
    ],
)
async def test_a_mailbox_that_can_not_be_written_is_tried_again(
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


# ---- the end, and what breaks


async def test_what_was_not_begun_when_the_relay_stops_has_not_been_attempted(tmp_path: Path) -> None:
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


async def test_what_was_under_way_when_the_process_ends_is_due_again(tmp_path: Path) -> None:
    pool = FakePool(lambda _: None)
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(*(message_of(f"b{n}@example.org") for n in range(10)))
        assert len(pool.sent) == 4
    async with relaying(tmp_path) as relay:
        await relay.quiet()
        assert len(relay.pool.sent) == 10


async def test_a_bug_in_one_delivery_costs_that_message_a_delay_and_nobody_else_anything(tmp_path: Path) -> None:
    def answer(sent: Sent) -> Result | Exception:
        return ZeroDivisionError("a bug") if sent.to == ["bad@example.org"] else DELIVERED

    async with relaying(tmp_path, FakePool(answer)) as relay:
        await relay.accept(message_of("bad@example.org"), *(message_of("good@example.org") for _ in range(20)))
        await relay.quiet()
        assert len(relay.pool.sent) == 21
        assert await relay.waiting() == [("bad@example.org", "an error on our side", 1, 60.0)]
        assert [event["error"] for event in relay.events("error")] == ["ZeroDivisionError: a bug"]


async def test_an_outcome_that_can_not_be_accounted_for_is_tried_again(tmp_path: Path) -> None:
    pool = FakePool(lambda _: [DELIVERED, DELIVERED])  # for one recipient
    async with relaying(tmp_path, pool) as relay:
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert [(reply, wait) for _, reply, _, wait in await relay.waiting()] == [("an error on our side", 300.0)]


async def test_a_spool_that_can_not_be_written_is_tried_until_it_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penstock.relay.ledger, "_FIRST_PAUSE", 0.001)
    async with relaying(tmp_path) as relay:
        settle, failures = relay.spool.settle, [OSError(28, "No space left on device")] * 3

        async def fail(*arguments: object) -> None:
            if failures:
                raise failures.pop()
            await settle(*arguments)  # type: ignore[arg-type]

        monkeypatch.setattr(relay.spool, "settle", fail)
        await relay.accept(message_of("bob@example.org"))
        await relay.quiet()
        assert failures == []
        assert len(relay.pool.sent) == 1
        assert await relay.waiting() == []
        assert len(relay.events("error")) == 3


async def test_lanes_with_nothing_to_do_are_forgotten(tmp_path: Path) -> None:
    async with relaying(tmp_path) as relay:
        await relay.accept(*(message_of(f"bob@d{n}.org") for n in range(100)))
        await relay.quiet()
        assert len(relay.scheduler._lanes) == 100
        relay.scheduler._evict(trio.current_time() + 100)
        assert relay.scheduler._lanes == {}
        assert relay.scheduler._outlets == {}


def test_a_result_of_ours_is_deferred() -> None:
    assert NextHopUnavailable("hop", "down").as_result().kind is Outcome.DEFERRED
