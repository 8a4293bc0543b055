"""What gateways share beside mail: greylisting, recipients, failed passwords and rates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import trio
from bench.nats_servers import NatsServers

from penstock.app import Server
from penstock.cluster.exchange import Exchange
from penstock.cluster.setup import make_layout
from penstock.cluster.state import SharedState
from penstock.reply import Reply
from penstock.state import Charge
from penstock.state.local import LocalState
from penstock.state.tables import Tables
from tests.cluster.nodes import NextHop, gateway, made, next_hop, node_of, owns, send, until
from tests.cluster.test_outages import halted

POLICY: dict[str, Any] = {"mode": "enforce", "trusted": []}


def tables_of(server: Server) -> Tables:
    """Return what a gateway knows itself."""
    state = server.policy_state
    assert isinstance(state, SharedState)
    assert isinstance(state._inner, LocalState)
    return state._inner.tables


async def test_who_has_passed_greylisting_passes_at_all_nodes(servers: NatsServers, tmp_path: Path) -> None:
    policy = {"policy": {**POLICY, "greylist": {"when": "always", "delay": "1s"}}}
    async with made(servers, tmp_path) as (_, settings), next_hop(tmp_path, NextHop()) as url:
        async with (
            gateway(tmp_path, settings, url, "g1", **policy) as first,
            gateway(tmp_path, settings, url, "g2", **policy) as second,
        ):
            assert (await send(first, "text")).startswith("451 4.7.1 Greylisted")
            while not (await send(first, "text")).startswith("250"):  # noqa: ASYNC110 - it is asked, as clients do
                await trio.sleep(0.1)
            (key,) = tables_of(first)._greylist
            await until(lambda: getattr(tables_of(second).greylisted(key), "has_passed", False))
            assert (await send(second, "text")).startswith("250")
        async with gateway(tmp_path, settings, url, "g3", **policy) as third:  # it was not there
            await until(lambda: tables_of(third).greylisted(key))
            assert (await send(third, "text")).startswith("250")


async def test_without_the_cluster_each_node_uses_what_it_knows(servers: NatsServers, tmp_path: Path) -> None:
    policy = {"policy": {**POLICY, "greylist": {"when": "always", "delay": "1h"}}}
    async with (
        made(servers, tmp_path) as (_, settings),
        gateway(tmp_path, settings, "smtp://h:1", "g1", **policy) as one,
    ):
        with halted(servers):
            for _ in range(2):
                assert (await send(one, "text")).startswith("451 4.7.1 Greylisted")
        await until(lambda: not node_of(one).exchange._changed)  # and shares it afterwards


async def test_a_next_hop_is_asked_about_a_recipient_once(servers: NatsServers, tmp_path: Path) -> None:
    hop = NextHop(replies={"no@example.org": Reply(550, "5.1.1", "No such user")})
    more: dict[str, Any] = {"domains": ["example.org"], "recipients": {"verify": "next-hop"}}
    async with made(servers, tmp_path) as (jetstream, settings), next_hop(tmp_path, hop) as url:
        subject = f"$KV.{settings.name}-state.r.>"
        async with gateway(tmp_path, settings, url, "g1", **more) as first:
            assert (await send(first, "text", to=("no@example.org",))).startswith("550 5.1.1")
            assert hop.asked == 1
            await until(lambda: not node_of(first).exchange._changed)
        assert len(await jetstream.subjects(f"KV_{settings.name}-state", subject)) == 1
        async with gateway(tmp_path, settings, url, "g2", **more) as second:
            await until(lambda: node_of(second).exchange._next > 1)
            assert (await send(second, "text", to=("no@example.org",))).startswith("550 5.1.1")
        assert hop.asked == 1


async def test_failed_passwords_count_at_all_nodes(servers: NatsServers, tmp_path: Path) -> None:
    more = {"admission": {"auth_failures": 3}}
    async with (
        made(servers, tmp_path) as (_, settings),
        gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g1", **more) as first,
        gateway(tmp_path, settings, "smtp://127.0.0.1:1", "g2", **more) as second,
    ):
        here, there = first.shared.throttle, second.shared.throttle
        for _ in range(3):
            attempt = here.begin("192.0.2.1/32")
            assert attempt is not None
            assert attempt.claim("alice")
        assert here.begin("192.0.2.1/32") is None

        def is_refused(network: str, name: str) -> bool:
            attempt = there.begin(network)
            if attempt is None:
                return True
            is_claimed = attempt.claim(name)
            attempt.withdrawn()
            return not is_claimed

        await until(lambda: is_refused("192.0.2.1/32", "bob"))
        await until(lambda: is_refused("192.0.2.2/32", "alice"))
        assert not is_refused("192.0.2.2/32", "bob")
        here.forget("alice")  # she has remembered it
        await until(lambda: not is_refused("192.0.2.2/32", "alice"))
        assert is_refused("192.0.2.1/32", "bob")


async def test_rates_count_at_all_nodes(servers: NatsServers, tmp_path: Path) -> None:
    policy = {"policy": {**POLICY, "rate": [{"by": ["network"], "count": "messages", "limit": "4/h"}]}}
    async with (
        made(servers, tmp_path) as (_, settings),
        next_hop(tmp_path, NextHop()) as url,
        gateway(tmp_path, settings, url, "g1", **policy) as first,
        gateway(tmp_path, settings, url, "g2", **policy) as second,
    ):
        await owns(first, 2)
        await owns(second, 2)
        for _ in range(3):
            assert (await send(first, "text")).startswith("250")
        (key,) = tables_of(first)._buckets
        # Three are counted at the other node: two more are too many there.
        await until(lambda: tables_of(second).available([Charge(key, 3600 * 10**9, 4, 2)]) == 0)
        assert (await send(second, "text")).startswith("250")
        assert (await send(second, "text")).startswith("450 4.7.1")
        await until(lambda: tables_of(first).available([Charge(key, 3600 * 10**9, 4, 1)]) == 0)
        assert (await send(first, "text")).startswith("450 4.7.1")


async def test_a_bucket_that_begins_again_is_read_from_its_begin(servers: NatsServers, tmp_path: Path) -> None:
    async with made(servers, tmp_path) as (jetstream, settings), trio.open_nursery() as nursery:
        exchanges = [
            Exchange(jetstream, make_layout(settings), node=name, machine=name, report=_fail) for name in ("g1", "g2")
        ]
        first, second = exchanges
        first.note_recipient("a@example.org", 600, None)
        await first.send()
        heard = trio.Event()
        second.on_recipient = lambda *_: heard.set()
        second._next = 1 << 40
        nursery.start_soon(second._keep_reading)
        with trio.fail_after(60):
            await heard.wait()
        nursery.cancel_scope.cancel()


def _fail(exc: Exception) -> None:
    raise exc
