"""The stub resolver, against name servers that fail, lie and keep silent."""

from __future__ import annotations

import errno
import itertools
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dns.flags
import dns.message
import dns.rcode
import dns.rrset
import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.dns import Answer, Budget, Kind, Resolver, ResolverSettings
from penstock.dns import _codec as codec
from penstock.dns.server import FAILURES, open_socket
from penstock.dns.settings import system_servers
from tests.dns.lying import Clock, Lying, Reply, resolving, running, serving, truncated, zone_of

ONE = b"\xc0\x00\x02\x01"
OPEN: dict[str, Any] = {"timeout": 0.05, "lifetime": 0.1}


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await trio.lowlevel.checkpoint()


async def test_an_answer_is_found_missing_or_empty() -> None:
    lying = Lying(zone_of("example.org A 192.0.2.1", 'example.org TXT "a b"'))
    async with resolving(lying) as resolver:
        answer = await resolver.query("EXAMPLE.org.", "A")
        assert (answer.status, answer.records, answer.name) == ("found", (ONE,), "example.org")
        assert (await resolver.query("example.org", "TXT")).records == (b"a b",)
        assert (await resolver.query("example.org", "MX")).status == "empty"
        assert (await resolver.query("no.example.org", "MX")).status == "missing"


@pytest.mark.parametrize("name", ["a..example", "x" * 64 + ".example", "y." * 200])
async def test_what_is_no_name_is_missing_and_not_asked(name: str) -> None:
    lying = Lying()
    async with resolving(lying) as resolver:
        assert (await resolver.query(name, "A")).status == "missing"
    assert lying.zone.asked == []


async def test_answers_are_cached_as_long_as_they_hold() -> None:
    lying, clock = Lying(zone_of("a.example A 192.0.2.1", ttl=300, negative_ttl=60)), Clock()
    async with resolving(lying, clock=clock) as resolver:
        for step, asked in ((0, 2), (59, 2), (2, 3), (238, 4), (2, 5)):
            clock.now += step
            await resolver.query("a.example", "A")
            await resolver.query("b.example", "A")
            assert len(lying.zone.asked) == asked, step
        assert resolver.cached("A.example.", "A") is not None
        assert resolver.cached("c.example", "A") is None


async def test_the_settings_bound_how_long_and_how_many() -> None:
    lying, clock = Lying(zone_of("a.example A 192.0.2.1", ttl=0)), Clock()
    async with resolving(lying, clock=clock, ttl_least=10.0, cache_entries=1) as resolver:
        await resolver.query("a.example", "A")
        clock.now += 9
        await resolver.query("a.example", "A")
        assert len(lying.zone.asked) == 1
        await resolver.query("b.example", "A")
        await resolver.query("a.example", "A")
        assert len(lying.zone.asked) == 3


async def test_aliases_the_server_does_not_follow_are_followed() -> None:
    lying = Lying(zone_of("a.example CNAME b.example.", "b.example A 192.0.2.1", follows=False))
    async with resolving(lying) as resolver:
        answer = await resolver.query("a.example", "A")
        assert (answer.records, answer.name) == ((ONE,), "b.example")
        lying.zone.add("ring.example", "CNAME", "ring.example.")
        answer = await resolver.query("ring.example", "A")
        assert answer.is_failure


async def test_the_same_question_is_asked_once_at_a_time() -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1"))
    async with resolving(lying) as resolver, trio.open_nursery() as nursery:
        for _ in range(50):
            nursery.start_soon(resolver.query, "a.example", "A")
    assert len(lying.zone.asked) == 1


async def test_a_cancelled_question_is_taken_over_by_one_that_waits() -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1", failures={"a.example": "silence"}))
    answers = []
    async with resolving(lying) as resolver, trio.open_nursery() as nursery:

        async def wait() -> None:
            answers.append(await resolver.query("a.example", "A"))

        with trio.CancelScope() as first:
            nursery.start_soon(wait)

            async def cancel_when_asked() -> None:
                while not lying.zone.asked:
                    await trio.lowlevel.checkpoint()
                lying.zone.failures.clear()
                first.cancel()

            nursery.start_soon(cancel_when_asked)
            await resolver.query("a.example", "A")
        assert first.cancelled_caught
    assert [answer.records for answer in answers] == [(ONE,)]


async def test_a_failure_is_shared_and_remembered_for_a_second() -> None:
    lying, clock = Lying(zone_of("a.example A 192.0.2.1", failures={"a.example": "SERVFAIL"})), Clock()
    async with resolving(lying, clock=clock) as resolver:
        answer = await resolver.query("a.example", "A")
        assert answer.is_failure
        assert "SERVFAIL" in answer.cause
        lying.zone.failures.clear()
        assert (await resolver.query("a.example", "A")).is_failure
        clock.now += 1
        assert not (await resolver.query("a.example", "A")).is_failure
    assert len(lying.zone.asked) == 2


@pytest.mark.parametrize("fault", ["SERVFAIL", "REFUSED", "NOTIMP", "silence", "garbage"])
async def test_another_server_is_asked_after_a_failure(fault: str) -> None:
    bad = Lying(zone_of(failures={"a.example": fault}))
    good = Lying(zone_of("a.example A 192.0.2.1"))
    async with resolving(bad, good, timeout=0.05) as resolver:
        assert (await resolver.query("a.example", "A")).records == (ONE,)


async def test_a_lost_datagram_is_asked_for_again() -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1"))
    seen = []

    def lose_first(wire: bytes) -> list[bytes]:
        seen.append(wire)
        answer = lying.zone.answer(wire)
        assert answer is not None
        return [] if len(seen) == 1 else [answer]

    lying.udp = lose_first
    async with resolving(lying, timeout=0.05) as resolver:
        assert (await resolver.query("a.example", "A")).records == (ONE,)
    assert seen[0][:2] != seen[1][:2]


async def test_a_referral_is_not_an_absence() -> None:
    def refer(wire: bytes) -> list[bytes]:
        message = dns.message.make_response(dns.message.from_wire(wire))
        message.authority.append(dns.rrset.from_text("example.", 60, "IN", "NS", "ns.example."))
        return [message.to_wire()]

    async with resolving(Lying(udp=refer)) as resolver:
        answer = await resolver.query("a.example", "A")
    assert answer.is_failure
    assert "referral" in answer.cause


async def test_a_truncated_answer_is_asked_for_by_tcp() -> None:
    lying = Lying(zone_of(*(f'big.example TXT "{n:03} {"x" * 200}"' for n in range(100))))
    async with resolving(lying) as resolver:
        answer = await resolver.query("big.example", "TXT")
    assert len(answer.records) == 100
    assert lying.asked_tcp == 1


async def test_an_unreadable_answer_is_asked_for_by_tcp() -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1"))
    lying.udp = lambda wire: [(lying.zone.answer(wire) or b"")[:-4]]
    async with resolving(lying) as resolver:
        assert (await resolver.query("a.example", "A")).records == (ONE,)
    assert lying.asked_tcp == 1


def framed(message: bytes) -> list[bytes]:
    return [len(message).to_bytes(2, "big"), message]


TCP_LIES: dict[str, Reply] = {
    "nothing": lambda wire: [],
    "cut length": lambda wire: [b"\0"],
    "cut message": lambda wire: [b"\0\xff", wire],
    "the query": framed,
    "empty": lambda wire: [b"\0\0"],
    "truncated again": lambda wire: framed(truncated(wire)),
}


@pytest.mark.parametrize("lie", TCP_LIES)
async def test_a_bad_answer_by_tcp_is_a_failure(lie: str) -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1"), tcp=TCP_LIES[lie])
    lying.udp = lambda wire: [truncated(wire)]
    async with resolving(lying, **OPEN) as resolver:
        assert (await resolver.query("a.example", "A")).is_failure


FORGERIES = {
    "another id": lambda answer: bytes([answer[0] ^ 1]) + answer[1:],
    "a query": lambda answer: answer[:2] + bytes([answer[2] & 0x7F]) + answer[3:],
    "another question": lambda answer: answer.replace(b"\x01a\x07example", b"\x01b\x07example"),
    "another type": lambda answer: answer.replace(b"example\0\0\1", b"example\0\0\x10", 1),
    "no question": lambda answer: answer[:4] + b"\0\0" + answer[6:],
    "short": lambda answer: answer[:11],
    "empty": lambda answer: b"",
}


@pytest.mark.parametrize("forgery", FORGERIES)
async def test_a_forged_answer_is_ignored_until_the_true_one_comes(forgery: str) -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1"))

    def forge(wire: bytes) -> list[bytes]:
        answer = lying.zone.answer(wire) or b""
        false = FORGERIES[forgery](answer[:-15].replace(ONE, b"\x06\x06\x06\x06") + answer[-15:])  # type: ignore[no-untyped-call]
        return [false, false, answer]

    lying.udp = forge
    async with resolving(lying, timeout=5.0) as resolver:
        assert (await resolver.query("a.example", "A")).records == (ONE,)
    assert len(lying.zone.asked) == 1


async def test_a_server_without_edns_is_asked_without() -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1", "b.example A 192.0.2.1"))
    edns = []

    def refuse_edns(wire: bytes) -> list[bytes]:
        message = dns.message.from_wire(wire)
        edns.append(message.edns)
        if message.edns < 0:
            return [lying.zone.answer(wire) or b""]
        return [wire[:2] + b"\x80\x01" + bytes(8)]

    lying.udp = refuse_edns
    async with resolving(lying) as resolver:
        assert (await resolver.query("a.example", "A")).records == (ONE,)
        assert (await resolver.query("b.example", "A")).records == (ONE,)
    assert edns == [0, -1, -1]


async def test_an_alias_without_dnssec_leads_to_nothing_authentic() -> None:
    lying = Lying(zone_of("a.example CNAME b.example.", "b.example A 192.0.2.1", follows=False))

    def answer(wire: bytes) -> list[bytes]:
        octets = bytearray(lying.zone.answer(wire) or b"")
        octets[3] |= 0x20 * (lying.zone.asked[-1][0] == "b.example")
        return [bytes(octets)]

    lying.udp = answer
    async with resolving(lying) as resolver:
        found = await resolver.query("a.example", "A")
        assert (found.records, found.authentic) == ((ONE,), False)
        assert (await resolver.query("b.example", "A")).authentic


async def test_a_stale_answer_stays_authentic() -> None:
    lying, clock = Lying(zone_of("a.example A 192.0.2.1")), Clock()

    def answer(wire: bytes) -> list[bytes]:
        octets = bytearray(lying.zone.answer(wire) or b"")
        octets[3] |= 0x20
        return [bytes(octets)]

    lying.udp = answer
    async with resolving(lying, clock=clock) as resolver:
        await resolver.query("a.example", "A")
        clock.now += 400
        lying.zone.failures["a.example"] = "SERVFAIL"
        found = await resolver.query("a.example", "A")
        assert (found.is_stale, found.authentic) == (True, True)


async def test_the_ad_bit_counts_where_it_is_trusted() -> None:
    def authentic(wire: bytes) -> list[bytes]:
        message = dns.message.make_response(dns.message.from_wire(wire))
        message.flags |= dns.flags.AD | dns.flags.RA
        message.answer.append(dns.rrset.from_text("a.example.", 60, "IN", "A", "192.0.2.1"))
        return [message.to_wire()]

    async with resolving(Lying(udp=authentic)) as resolver:
        assert (await resolver.query("a.example", "A")).authentic
        resolver._servers[0].trust_ad = False
        resolver._cache.clear()
        assert not (await resolver.query("a.example", "A")).authentic
    elsewhere = Resolver(ResolverSettings(servers=("192.0.2.53",)))
    assert [server.trust_ad for server in elsewhere._rounds()] == [False] * 3
    trusted = Resolver(ResolverSettings(servers=("192.0.2.53",), trust_ad=True))
    assert [server.trust_ad for server in trusted._rounds()] == [True] * 3


async def test_ports_and_ids_change() -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1", ttl=0))
    idents = set()

    def answer(wire: bytes) -> list[bytes]:
        idents.add(wire[:2])
        return [lying.zone.answer(wire) or b""]

    lying.udp = answer
    async with resolving(lying, cache_entries=0) as resolver:
        for _ in range(2000):
            await resolver.query("a.example", "A")
        assert not resolver._servers[0].is_waiting
    assert len(set(lying.clients)) > 6
    assert len(idents) > 1900


async def test_an_expired_answer_serves_while_no_server_answers() -> None:
    lying, clock = Lying(zone_of("a.example A 192.0.2.1", ttl=60)), Clock()
    async with resolving(lying, clock=clock, stale=100.0, **OPEN) as resolver:
        await resolver.query("a.example", "A")
        lying.zone.failures["a.example"] = "silence"
        clock.now += 61
        answer = await resolver.query("a.example", "A")
        assert (answer.records, answer.is_stale) == ((ONE,), True)
        asked = len(lying.zone.asked)
        clock.now += 29
        assert (await resolver.query("a.example", "A")).is_stale
        assert len(lying.zone.asked) == asked  # not asked again for 30 seconds
        lying.zone.failures.clear()
        clock.now += 2
        assert not (await resolver.query("a.example", "A")).is_stale
        lying.zone.failures["a.example"] = "SERVFAIL"
        clock.now += 161
        assert (await resolver.query("a.example", "A")).is_failure


async def test_a_dead_server_is_left_out_until_it_answers_a_probe() -> None:
    lying = Lying(zone_of("x.example A 192.0.2.1"))
    async with serving(lying) as port:
        pass  # the port is free again, and nothing listens there
    resolver = Resolver(ResolverSettings(servers=(f"127.0.0.1:{port}",)), clock=Clock(), probe_interval=0.01)
    async with running(resolver):
        for number in range(FAILURES):
            answer = await resolver.query(f"{number}.example", "A")
            assert answer.is_failure
        server = resolver._servers[0]
        assert server.is_open
        asked = resolver.statistics.questions
        answer = await resolver.query("x.example", "A")
        assert answer.cause == "no DNS server answers"
        assert resolver.statistics.questions == asked
        async with serving(lying, port):
            await until(lambda: not server.is_open)
            resolver._cache.clear()
            assert (await resolver.query("x.example", "A")).records == (ONE,)


async def test_what_fails_on_this_machine_does_not_count_against_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    lying = Lying(zone_of("x.example A 192.0.2.1"))
    async with resolving(lying) as resolver:
        assert (await resolver.query("x.example", "A")).records == (ONE,)
        server = resolver._servers[0]
        server._sockets.most = 0
        for number in range(2 * FAILURES):
            assert "too many questions" in (await resolver.query(f"{number}.example", "A")).cause
        server._sockets.most = 1024

        def full(*_: object) -> None:
            raise OSError(errno.EMFILE, "Too many open files")

        with monkeypatch.context() as patch:
            patch.setattr("penstock.dns.server.open_socket", full)
            for number in range(2 * FAILURES):
                assert "Too many open files" in (await resolver.query(f"{number}.example", "TXT")).cause
        assert not server.is_open
        assert not (await resolver.query("y.example", "A")).is_failure


async def test_the_silence_of_one_name_does_not_open_the_breaker() -> None:
    lying, clock = Lying(zone_of("x.example A 192.0.2.1", failures={"a.example": "silence"})), Clock()
    async with resolving(lying, clock=clock, **OPEN) as resolver:
        for _ in range(FAILURES):
            assert (await resolver.query("a.example", "A")).is_failure
            clock.now += 2
        assert not resolver._servers[0].is_open


async def test_short_of_time_a_lost_answer_is_asked_for_again(autojump_clock: trio.testing.MockClock) -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1", failures={"a.example": "silence"}))
    async with resolving(lying) as resolver:
        assert (await resolver.query("a.example", "A", 5.0)).is_failure
        assert resolver.statistics.questions == 3


async def test_questions_of_checks_leave_some_for_the_relay() -> None:
    lying = Lying(udp=lambda _: [])
    async with resolving(lying) as resolver, trio.open_nursery() as nursery:
        budget = Budget(resolver, seconds=60, questions=5000)
        for number in range(1024):
            nursery.start_soon(budget.query, f"{number}.silent.example", "A")
        await trio.testing.wait_all_tasks_blocked()
        assert len(resolver._pending) == 768
        with trio.move_on_after(0):
            await resolver.query_all([("listed.example", "A")])
        assert len(resolver._pending) == 768
        lying.udp = None
        assert (await resolver.query("relay.example", "MX")).status == "missing"
        nursery.cancel_scope.cancel()


async def test_questions_under_way_are_bounded() -> None:
    lying = Lying(zone_of(failures={"a.example": "silence"}))
    async with resolving(lying) as resolver, trio.open_nursery() as nursery:
        for number in range(1024):
            nursery.start_soon(resolver.query, f"{number}.silent.example", "A")
        lying.udp = lambda _: []
        await trio.testing.wait_all_tasks_blocked()
        answer = await resolver.query("a.example", "A")
        assert answer.cause == "too many DNS questions at once"
        nursery.cancel_scope.cancel()
    assert resolver._pending == {}


async def test_questions_fail_when_the_resolver_stops() -> None:
    lying = Lying(udp=lambda _: [])
    answers: list[Answer] = []

    async def ask(resolver: Resolver) -> None:
        answers.append(await resolver.query("a.example", "A"))

    async with trio.open_nursery() as outer:  # noqa: SIM117 - the task outlives the resolver
        async with resolving(lying) as resolver:
            outer.start_soon(ask, resolver)
            await trio.testing.wait_all_tasks_blocked()
    assert [answer.status for answer in answers] == ["failed"]
    with pytest.raises(RuntimeError, match="not running"):
        await resolver.query("b.example", "A")


DAMAGES = st.lists(
    st.tuples(st.lists(st.tuples(st.integers(2, 60), st.integers(0, 255)), max_size=3), st.integers(20, 100)),
    min_size=1,
    max_size=8,
)


@settings(max_examples=40)
@given(DAMAGES)
def test_a_hostile_server_cannot_break_the_resolver(damages: list[tuple[list[tuple[int, int]], int]]) -> None:
    lying = Lying(zone_of("a.example A 192.0.2.1", "a.example MX 10 b.example.", 'a.example TXT "text"'))
    turns = itertools.cycle(damages)

    def damage(wire: bytes) -> list[bytes]:
        answer = bytearray(lying.zone.answer(wire) or b"")
        octets, length = next(turns)
        for place, octet in octets:
            answer[place % len(answer)] = octet
        return [bytes(answer[:length])]

    lying.udp = damage
    lying.tcp = lambda wire: framed(damage(wire)[0])

    async def main() -> None:
        kinds: tuple[Kind, ...] = ("A", "MX", "TXT")
        async with resolving(lying, timeout=0.01, lifetime=0.02) as resolver:
            for kind in kinds:
                answer = await resolver.query("a.example", kind)
                assert answer.status in {"found", "empty", "missing", "failed"}
                assert (answer.status == "found") == bool(answer.records)
            assert resolver._pending == {}

    trio.run(main)


def test_the_servers_of_resolv_conf_are_read(tmp_path: Path) -> None:
    path = tmp_path / "resolv.conf"
    assert system_servers(path) == [("127.0.0.1", 53)]
    path.write_text(
        "# nameserver 192.0.2.9\nsearch example\nnameserver 192.0.2.1\nnameserver nonsense\nnameserver ::1 \n"
    )
    assert system_servers(path) == [("192.0.2.1", 53), ("::1", 53)]


def test_a_query_that_is_given_up_late_takes_no_socket_from_another() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind(("127.0.0.1", 0))
        pool = codec.UdpPool(lambda: open_socket(socket.AF_INET, server.getsockname()), 100, lambda: None)

        def ask(count: int) -> list[codec.UdpQuery]:
            queries = [pool.send(f"{number}.example", 1, True, 0.0) for number in range(count)]
            for _ in queries:
                query, client = server.recvfrom(4096)
                server.sendto(truncated(query), client)
            return queries

        first = ask(8)
        assert all(each.receive() for each in first)
        second = ask(8)  # on the same sockets
        for each in first:
            each.abandon()
        assert all(each.receive() for each in second)
        pool.close()
