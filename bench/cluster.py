"""`python -m bench.cluster`: no mail that the replicated queue has accepted is lost, in any failure.

Three nats-servers, two gateways that share a queue, senders, and a next hop that notes what arrives. Each message has a
number and a checksum; a sender notes which were answered with 250. Each round is a failure, at a random moment:

    leader, follower    a server of the stream
    connected           the server that a gateway is connected to
    two                 two of three servers, for ten seconds
    all                 all three servers
    gateway, gateways   the gateways themselves, while they relay

and how: `kill` (SIGKILL, started again later), `stop` (SIGSTOP, continued later), `cut` (a proxy between gateways and
servers cuts all connections at a random octet, or lets nothing through for a while), `wipe` (SIGKILL, and the server
comes back with an empty disk; of one server only).

At the end the queue is emptied. Every message with a 250 must have arrived, none may be damaged, and what came more
than once must have been under way at a failure: it was in the stream when the failure began, or when everything was
relayed again, or it arrived in between. Exit code 1 otherwise.

    python -m bench.cluster --rounds 30 --messages 100000 --how kill,stop,cut,wipe     # the long form
    python -m bench.cluster --rounds 1 --kinds all --how stop --down 60                # an outage of a minute
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
import trio
from tests.ports import free_port

from bench.nats_servers import NatsServers
from bench.processes import ENVIRONMENT
from penstock.app import Overrides, open_server
from penstock.cluster.jetstream import JetStream
from penstock.cluster.layout import Layout
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import connected, make_layout, make_streams
from penstock.cluster.status import owners
from penstock.config import from_table, to_toml
from penstock.delivery.base import Delivery
from penstock.message import Message
from penstock.net.nats import NatsError
from penstock.reply import Reply
from penstock.transaction import Transaction

SERVER_KINDS: Final = ("leader", "follower", "connected", "two", "all")
GATEWAY_KINDS: Final = ("gateway", "gateways")
KINDS: Final = (*SERVER_KINDS, *GATEWAY_KINDS)
_PATIENCE: Final = 120.0
"""Seconds to empty the queue at the end."""
_RECOVERY: Final = 120.0
"""Seconds after which a cluster that has not recovered from a failure is given up."""
_NUMBER: Final = re.compile(rb"X-Number: (\d+) ([0-9a-f]{64})\r\n")
_LEASE: Final = 3.0


class Failure(NamedTuple):
    """A failure, from the look at the stream before it to the one after it."""

    begin: float
    end: float
    name: str
    under_way: frozenset[str]
    """The messages in the stream at the begin or at the end."""


@dataclass
class Account:
    """What was sent, and what became of it."""

    sent: int = 0
    accepted: dict[int, str] = field(default_factory=dict)
    """The first word of the replies: replicated or spooled."""
    ids: dict[int, str] = field(default_factory=dict)
    """The ids in the replies."""
    refused: Counter[str] = field(default_factory=Counter)
    broken: int = 0
    arrived: dict[int, list[float]] = field(default_factory=dict)
    damaged: int = 0
    failures: list[Failure] = field(default_factory=list)
    waits: list[float] = field(default_factory=list)
    """Seconds from the dot to the reply."""

    @property
    def missing(self) -> list[int]:
        """Numbers answered with 250 that have not arrived."""
        return [number for number in self.accepted if number not in self.arrived]

    @property
    def duplicates(self) -> list[int]:
        """Numbers that have arrived more than once."""
        return [number for number, times in self.arrived.items() if len(times) > 1]

    def is_explained(self, number: int) -> bool:
        """Return whether each repeated delivery followed one that was under way at a failure."""
        name = self.ids.get(number, "")  # a sender may have been cut off before its 250
        return all(
            any(each.begin <= moment <= each.end or name in each.under_way for each in self.failures)
            for moment in self.arrived[number][:-1]
        )


class Hop(Delivery):
    """The next hop: notes what arrives."""

    def __init__(self, account: Account) -> None:
        self.account = account

    async def accept(self, message: Message, transaction: Transaction) -> Reply:  # noqa: ARG002 - the interface
        """Note a message."""
        text = b"".join(message.body.chunks())
        found = _NUMBER.search(text)
        if found is None or hashlib.sha256(text[found.end() :]).hexdigest().encode() != found[2]:
            self.account.damaged += 1
        else:
            self.account.arrived.setdefault(int(found[1]), []).append(time.time())
        return Reply(250, "2.0.0", "Ok")


def body_of(number: int, size: int) -> bytes:
    """Return the text of a message."""
    rest = b"".join([b"\r\n", random.Random(number).randbytes(size // 2).hex().encode(), b"\r\n"])
    return b"X-Number: %d %s\r\n%s" % (number, hashlib.sha256(rest).hexdigest().encode(), rest)


# ---- a proxy between gateways and servers


class Proxy:
    """Forwards connections to a server; cuts them, delays them or holds them up."""

    def __init__(self, target: int) -> None:
        self._target = target
        self._links: set[trio.CancelScope] = set()
        self.left = -1
        """Octets until all connections are cut; -1: they are not."""
        self.delay = 0.0
        self.flows = trio.Event()
        self.flows.set()

    def cut(self) -> None:
        """Cut all connections now."""
        self.left = -1
        for scope in list(self._links):
            scope.cancel()

    async def serve(self, stream: trio.SocketStream) -> None:
        """Forward one connection."""
        with suppress(OSError, trio.BrokenResourceError), trio.CancelScope() as scope:
            self._links.add(scope)
            try:
                async with await trio.open_tcp_stream("127.0.0.1", self._target) as server, trio.open_nursery() as both:
                    both.start_soon(self._forward, stream, server, both.cancel_scope)
                    both.start_soon(self._forward, server, stream, both.cancel_scope)
            except* (OSError, trio.BrokenResourceError):
                pass
            finally:
                self._links.discard(scope)

    async def _forward(self, source: trio.SocketStream, target: trio.SocketStream, scope: trio.CancelScope) -> None:
        while data := await source.receive_some(65_536):
            await self.flows.wait()
            if self.delay:
                await trio.sleep(self.delay)
            if self.left >= 0:
                self.left -= len(data)
                if self.left < 0:
                    await target.send_all(data[: len(data) // 2])
                    self.cut()
                    return
            await target.send_all(data)
        scope.cancel()


# ---- gateways


class Gateway:
    """A `penstock serve` process."""

    def __init__(self, name: str, folder: Path, table: dict[str, Any]) -> None:
        self.name = name
        self.port = free_port()
        self._folder = folder / name
        self._folder.mkdir()
        listener = {"address": f"127.0.0.1:{self.port}", "tls": {"mode": "none"}, "max_size": 0}
        jetstream = {**table["jetstream"], "node": name}
        settings = from_table(
            {**table, "listener": [listener], "jetstream": jetstream, "hostname": f"{name}.example.org"}
        )
        self._file = self._folder / "penstock.toml"
        self._file.write_text(to_toml(settings, only_changed=True))
        self.process: trio.Process | None = None

    async def start(self) -> None:
        """Start it, and wait until it listens."""
        command = [sys.executable, "-m", "penstock", "serve", "--config", str(self._file)]
        command += ["--data", str(self._folder / "data")]
        with (self._folder / "journal").open("ab") as journal:
            self.process = await trio.lowlevel.open_process(command, stdout=journal, stderr=journal, env=ENVIRONMENT)
        with trio.fail_after(60):
            while True:
                with suppress(OSError):
                    await (await trio.open_tcp_stream("127.0.0.1", self.port)).aclose()
                    return
                if self.process.poll() is not None:
                    raise RuntimeError((self._folder / "journal").read_text()[-2000:])
                await trio.sleep(0.05)

    def signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(number)

    async def kill(self) -> None:
        """End it at once."""
        self.signal(signal.SIGKILL)
        if self.process is not None:
            await self.process.wait()

    @property
    def journal(self) -> str:
        """What it has written."""
        return (self._folder / "journal").read_text()


# ---- senders


async def send_all(account: Account, gateways: list[Gateway], stop: trio.Event, *, rate: float, size: int) -> None:
    """Send messages until `stop`, over kept sessions."""
    sessions = 20
    async with trio.open_nursery() as nursery:
        for number in range(sessions):
            nursery.start_soon(_send, account, gateways[number % len(gateways)], stop, sessions / rate, size)


async def _send(account: Account, gateway: Gateway, stop: trio.Event, pause: float, size: int) -> None:
    while not stop.is_set():
        with suppress(OSError, trio.BrokenResourceError, EOFError, trio.TooSlowError):
            async with await trio.open_tcp_stream("127.0.0.1", gateway.port) as stream:
                await _reply(stream)
                await _say(stream, b"EHLO bench.example.com\r\n")
                while not stop.is_set():
                    await _send_one(account, stream, size)
                    await trio.sleep(random.uniform(0, 2 * pause))
        await trio.sleep(0.1)


async def _send_one(account: Account, stream: trio.SocketStream, size: int) -> None:
    number = account.sent
    account.sent += 1
    # A few are large, so that pieces are under way, too.
    text = body_of(number, size if number % 500 else 3_000_000)
    is_over = False
    try:
        for line in (b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.org>\r\n", b"DATA\r\n"):
            reply = await _say(stream, line)
            if reply[:1] not in b"23":
                account.refused[reply[:9].decode()] += 1
                is_over = True
                await _say(stream, b"RSET\r\n")
                return
        begun = trio.current_time()
        reply = await _say(stream, text + b".\r\n")
        is_over = True
        account.waits.append(trio.current_time() - begun)
        if reply.startswith(b"250"):
            account.accepted[number] = reply.split()[3].decode()
            account.ids[number] = reply.split()[-1].decode()
        else:
            account.refused[reply[:9].decode()] += 1
    finally:
        if not is_over:
            account.broken += 1


async def _say(stream: trio.SocketStream, data: bytes) -> bytes:
    await stream.send_all(data)
    return await _reply(stream)


async def _reply(stream: trio.SocketStream) -> bytes:
    received = b""
    with trio.fail_after(60):
        while not received.endswith(b"\n") or received.split(b"\r\n")[-2][3:4] == b"-":
            data = await stream.receive_some()
            if not data:
                raise EOFError
            received += data
    return received


# ---- failures


class Bench:
    """Servers, proxies, gateways and what happens to them."""

    def __init__(
        self, servers: NatsServers, gateways: list[Gateway], proxies: list[Proxy], jetstream: JetStream, layout: Layout
    ) -> None:
        self.servers = servers
        self._jetstream = jetstream
        self._layout = layout
        self.gateways = gateways
        self.proxies = proxies
        self.stream = layout.stream(0)

    async def _look(self) -> frozenset[str]:
        """Return the ids of the messages in the stream, once it answers and each partition has a node that lives."""
        layout = self._layout
        with trio.fail_after(_RECOVERY):
            while True:
                with suppress(NatsError):
                    if not (await owners(self._jetstream, layout)).free:
                        subjects = await self._jetstream.subjects(self.stream, f"{layout.name}.m.>")
                        return frozenset(subject.rpartition(".")[2] for subject in subjects)
                await trio.sleep(0.1)

    async def fail(self, kind: str, how: str, account: Account, seconds: float, rng: random.Random) -> None:
        """Let something fail for some seconds."""
        begin, before = time.time(), await self._look()
        if kind in GATEWAY_KINDS:
            await self._fail_gateways(
                self.gateways if kind == "gateways" else [rng.choice(self.gateways)], how, seconds
            )
        else:
            chosen = await trio.to_thread.run_sync(self._choose, kind, rng)
            seconds = 10.0 if kind == "two" and how != "cut" else seconds
            await self._fail_servers(chosen, how, seconds, rng)
        after = await self._look()
        account.failures.append(Failure(begin, time.time(), f"{kind} {how}", before | after))

    def _choose(self, kind: str, rng: random.Random) -> list[int]:
        leader = max(0, self.servers.leader(self.stream))
        if kind == "leader":
            return [leader]
        if kind == "follower":
            return [(leader + rng.choice([1, 2])) % 3]
        if kind == "connected":
            return [self._connected()]
        return rng.sample(range(3), 2) if kind == "two" else [0, 1, 2]

    def _connected(self) -> int:
        for number, url in enumerate(self.servers.monitors):
            with suppress(OSError, ValueError), urllib.request.urlopen(f"{url}/connz", timeout=2) as answer:
                if any(
                    each.get("name") == f"penstock {self.gateways[0].name}" for each in json.load(answer)["connections"]
                ):
                    return number
        return 0

    async def _fail_servers(self, chosen: list[int], how: str, seconds: float, rng: random.Random) -> None:
        if how in ("kill", "wipe"):
            for number in chosen:
                await trio.to_thread.run_sync(self.servers.kill, number)
            await trio.sleep(seconds)
            if how == "wipe":
                shutil.rmtree(self.servers.folder / f"n{chosen[0] + 1}" / "js")
            for number in chosen:
                self.servers.start(number)
        elif how == "stop":
            for number in chosen:
                self.servers.signal(number, signal.SIGSTOP)
            await trio.sleep(seconds)
            for number in chosen:
                self.servers.signal(number, signal.SIGCONT)
        else:
            for number in chosen:
                proxy = self.proxies[number]
                if rng.random() < 0.7:
                    proxy.left = rng.randrange(200_000)
                else:
                    proxy.delay, proxy.flows = rng.choice([0.0, 0.05]), trio.Event()
            await trio.sleep(seconds)
            for number in chosen:
                self.proxies[number].delay = 0.0
                self.proxies[number].left = -1
                self.proxies[number].flows.set()

    async def _fail_gateways(self, chosen: list[Gateway], how: str, seconds: float) -> None:
        for gateway in chosen:
            if how == "stop":
                gateway.signal(signal.SIGSTOP)
            else:
                await gateway.kill()
        await trio.sleep(seconds)
        for gateway in chosen:
            if how == "stop":
                gateway.signal(signal.SIGCONT)
            else:
                await gateway.start()


@asynccontextmanager
async def set_up(folder: Path, account: Account, *, has_proxies: bool) -> AsyncIterator[Bench]:
    """Start everything."""
    async with AsyncExitStack() as stack:
        nursery = await stack.enter_async_context(trio.open_nursery())
        servers = stack.enter_context(NatsServers.running(folder / "nats", advertise=has_proxies))
        proxies = [Proxy(port) for port in servers.client]
        if has_proxies:
            for proxy, port in zip(proxies, servers.advertised, strict=True):
                await nursery.start(trio.serve_tcp, proxy.serve, port)
        hop = from_table(
            {
                "hostname": "hop.example.org",
                "data_dir": str(folder / "hop"),
                "listener": [{"address": "127.0.0.1:0", "tls": {"mode": "none"}, "max_size": 0}],
                "journal": {"events": "none"},
            }
        )
        server = await stack.enter_async_context(open_server(hop, overrides=Overrides(delivery=Hop(account))))
        urls = [f"nats://127.0.0.1:{port}" for port in (servers.advertised if has_proxies else servers.client)]
        table = {
            "delivery": {"kind": "jetstream"},
            "jetstream": {
                "servers": urls,
                "monitors": servers.monitors,
                "partitions": 8,
                "lease": _LEASE,
                "patience": 3.0,
                "max_octets": 1 << 30,
            },
            "journal": {"format": "json"},
            "route": [{"next_hop": f"smtp://{server.addresses[0]}"}],
            "relay": {"retry": {"schedule": [1]}},
        }
        settings = msgspec.convert({**table["jetstream"], "servers": servers.urls}, JetStreamSettings)  # type: ignore[dict-item]
        jetstream = await stack.enter_async_context(connected(settings, folder))
        await make_streams(jetstream, settings)
        gateways = [Gateway(name, folder, table) for name in ("g1", "g2")]
        try:
            for gateway in gateways:
                await gateway.start()
            yield Bench(servers, gateways, proxies, jetstream, make_layout(settings))
        finally:
            with trio.CancelScope(shield=True):
                for gateway in gateways:
                    gateway.signal(signal.SIGCONT)
                    await gateway.kill()
            nursery.cancel_scope.cancel()


async def run(
    rounds: list[tuple[str, str]],
    folder: Path,
    *,
    rate: float = 300,
    size: int = 4000,
    pause: float = 4.0,
    down: float = 2.0,
    seed: int = 1,
    settle: float = 2 * _LEASE,
    messages: int = 0,
    told: Callable[[str], None] = lambda _: None,
) -> Account:
    """Run rounds of failures under load, and until `messages` were accepted.

    Return the account once the queue is empty, or after two minutes.
    """
    account = Account()
    rng = random.Random(seed)
    async with set_up(folder, account, has_proxies=any(how == "cut" for _, how in rounds)) as bench:
        stop = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: send_all(account, bench.gateways, stop, rate=rate, size=size))
            await trio.sleep(1)
            for number, (kind, how) in enumerate(rounds, 1):
                before, begun = len(account.accepted), time.monotonic()
                await trio.sleep(rng.uniform(0, 1))
                await bench.fail(kind, how, account, down, rng)
                await trio.sleep(pause)
                told(
                    f"round {number:3}: {kind} {how}: {len(account.accepted) - before} accepted in "
                    f"{time.monotonic() - begun:.1f} s"
                )
            while len(account.accepted) < messages:  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.1)
            stop.set()
        with trio.move_on_after(_PATIENCE):
            while account.missing:  # noqa: ASYNC110 - there is no event
                await trio.sleep(0.1)
        await trio.sleep(settle)  # what would come twice comes now
    return account


def report(account: Account) -> tuple[str, bool]:
    """Return the table of an account, and whether it is as it must be."""
    unexplained = [number for number in account.duplicates if not account.is_explained(number)]
    words = Counter(account.accepted.values())
    waits = sorted(account.waits) or [0.0]
    lines = [
        f"{'sent':24}{account.sent:>9}",
        *(f"{f'250 {word}':24}{count:>9}" for word, count in sorted(words.items())),
        f"{'refused':24}{account.refused.total():>9}  {dict(account.refused) or ''}",
        f"{'without a reply':24}{account.broken:>9}",
        f"{'arrived':24}{len(account.arrived):>9}",
        f"{'dot to reply, p50':24}{waits[len(waits) // 2] * 1000:>9.1f} ms",
        f"{'dot to reply, p99':24}{waits[len(waits) * 99 // 100] * 1000:>9.1f} ms",
        f"{'longest wait for a reply':24}{waits[-1]:>9.1f} s",
        f"{'lost':24}{len(account.missing):>9}  {account.missing[:10] or ''}",
        f"{'damaged':24}{account.damaged:>9}",
        f"{'duplicates':24}{len(account.duplicates):>9}",
        f"{'  not under way':24}{len(unexplained):>9}  {unexplained[:10] or ''}",
    ]
    return "\n".join(lines), not (account.missing or account.damaged or unexplained)


def main() -> None:
    """Run the failures that were asked for, in turn."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=14, help="number of failures")
    parser.add_argument("--kinds", default=",".join(KINDS), help="failures, in turn")
    parser.add_argument("--how", default="kill", help="kill, stop, cut, wipe, in turn")
    parser.add_argument("--rate", type=float, default=300, help="messages per second")
    parser.add_argument("--messages", type=int, default=0, help="go on until this number of messages was accepted")
    parser.add_argument("--down", type=float, default=2.0, help="seconds of a failure")
    parser.add_argument("--size", type=int, default=4000, help="octets of a message")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", action="store_true", help="keep the files")
    options = parser.parse_args()
    kinds, hows = options.kinds.split(","), options.how.split(",")
    # A gateway has no proxy before it: where connections are cut, the others fail.
    rounds = [
        ("follower" if how == "wipe" else kind if how != "cut" or kind in SERVER_KINDS else "connected", how)
        for kind, how in ((kinds[n % len(kinds)], hows[n // len(kinds) % len(hows)]) for n in range(options.rounds))
    ]
    folder = Path(tempfile.mkdtemp(prefix="penstock-cluster-"))

    def told(line: str) -> None:
        print(line, flush=True)

    account = trio.run(
        lambda: run(
            rounds,
            folder,
            rate=options.rate,
            size=options.size,
            seed=options.seed,
            messages=options.messages,
            down=options.down,
            told=told,
        )
    )
    text, is_good = report(account)
    print(text)
    if options.keep or not is_good:
        print(f"files: {folder}")
    if not is_good:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
