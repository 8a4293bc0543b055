"""`python -m bench.cluster_cost`: what the replicated queue costs beside the local spool, on one machine.

    accept      messages per second and CPU of the gateway, spool and jetstream in turn (smtp-source, kept sessions);
                the next hop does not exist
    latency     from the end of a message to its 250, at 2,000 new messages per second (penstock load, kept sessions)
    publish     CPU of the client for each message of 4 KB, a hundred in flight
    rebuild     the index of a node that takes over everything
    syncs       fsyncs of each server with one message in flight (strace): at least one per message on a majority

Three servers, the gateway and the senders share the cores and the disk: on three machines there is less contention.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import trio
from crc32c import crc32c
from tests.cluster.nodes import gateway, made, node_of
from tests.contracts.delivery import make_message
from tests.e2e.running import Server, serving

from bench.nats_servers import NatsServers
from bench.processes import ENVIRONMENT
from penstock.cluster.layout import Layout, encode_envelope, message_headers
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.writer import Writer
from penstock.net.nats import Request

_SERVER: Final = """
hostname = "localhost"
[[listener]]
address = "127.0.0.1:0"
tls.mode = "none"
[journal]
events = "errors"
[[route]]
next_hop = "smtp://127.0.0.1:1"
"""


def cpu_of(pid: int) -> float:
    """Return the seconds of CPU that a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def send(server: Server, messages: int) -> tuple[float, float]:
    """Send messages; return how many per second, and microseconds of CPU for each."""
    before, begun = cpu_of(server.process.pid), time.perf_counter()
    command = ["smtp-source", "-s", "100", "-m", str(messages), "-l", "4096", "-d", "-f", "a@example.com"]
    subprocess.run([*command, "-t", "b@example.org", server.address], check=True, env=ENVIRONMENT)
    seconds = time.perf_counter() - begun
    return messages / seconds, (cpu_of(server.process.pid) - before) / messages * 1e6


def configuration(settings: JetStreamSettings) -> str:
    """Return the configuration of a gateway of the cluster, without its node."""
    return _SERVER + (
        f'[delivery]\nkind = "jetstream"\n[jetstream]\nservers = {list(settings.servers)}\n'
        f'name = "{settings.name}"\n'
        f"monitors = {list(settings.monitors)}\nmax_octets = {settings.max_octets}\n"
    ).replace("'", '"')


async def latency(servers: NatsServers, folder: Path, rate: int = 2000, seconds: int = 10) -> None:
    """Print the time from the end of a message to its 250."""
    report = folder / "latency.json"
    async with made(servers, folder, partitions=64, lease=10.0, max_octets=2 << 30) as (_, settings):
        with serving(folder / "latency", configuration(settings) + 'node = "latency"\n') as server:
            await trio.sleep(2)
            command = [sys.executable, "-m", "penstock", "load", server.address, "--sessions", "200", "--reuse"]
            command += ["--rate", str(rate), "--duration", f"{seconds}s", "--report", str(report)]
            await trio.run_process(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, check=False)
    found = json.loads(report.read_text())
    dot = found["phases"]["dot"]
    p50, p99 = dot["p50"] * 1e3, dot["p99"] * 1e3
    print(f"{'latency':12}{found['rate']:>9,.0f}/s of {rate:,}/s, p50 {p50:.1f} ms, p99 {p99:.1f} ms (bound: 40 ms)")


async def accept(servers: NatsServers, folder: Path, messages: int, rounds: int) -> None:
    """Print rate and CPU of both deliveries, and the medians of their ratios."""
    rates, costs = [], []
    for number in range(rounds):
        # With streams of its own for each round: a node that loads what was sent before does that at the same time.
        async with made(servers, folder, partitions=64, lease=10.0, max_octets=2 << 30) as (_, settings):
            found = {}
            for kind, text in (("spool", _SERVER), ("jetstream", configuration(settings) + f'node = "n{number}"\n')):
                with serving(folder / f"{kind}{number}", text) as server:
                    if kind == "jetstream":
                        await trio.sleep(2)  # it takes over the partitions
                    rate, cost = await trio.to_thread.run_sync(send, server, messages)
                found[kind] = rate, cost
                print(f"{kind:12}{rate:>9,.0f}/s {cost:>6.0f} us", flush=True)
            rates.append(found["jetstream"][0] / found["spool"][0])
            costs.append(found["jetstream"][1] / found["spool"][1])
    print(f"{'ratio':12}{statistics.median(rates):>9.2f}   {statistics.median(costs):>6.2f}")


async def publish(servers: NatsServers, folder: Path) -> None:
    """Print the CPU of the client."""
    async with made(servers, folder, max_octets=1 << 30) as (jetstream, settings):
        body = os.urandom(2048).hex().encode()

        async def send_some(sender: int) -> None:
            for number in range(100):
                headers = b"NATS/1.0\r\nNats-Msg-Id: %d-%d\r\nNats-Expected-Last-Subject-Sequence: 0\r\n\r\n"
                subject = f"{settings.name}.b.0.{sender}.{number}"
                await jetstream.client.request(subject, body, headers % (sender, number), timeout=30)

        before, begun = time.process_time(), time.perf_counter()
        async with trio.open_nursery() as nursery:
            for sender in range(100):
                nursery.start_soon(send_some, sender)
        seconds = time.perf_counter() - begun
        print(f"{'publish':12}{10_000 / seconds:>9,.0f}/s {(time.process_time() - before) * 100:>6.1f} us")


async def rebuild(servers: NatsServers, folder: Path, messages: int) -> None:
    """Print how fast an index is rebuilt."""
    gc.freeze()
    gc.set_threshold(20_000, 20, 100)  # as penstock.cli.running has it
    async with made(servers, folder, partitions=64, lease=10.0, max_octets=6 << 30) as (jetstream, settings):
        layout = Layout(settings.name, streams=1, partitions=64)
        text = b"x" * 300
        pattern = make_message(text)._replace(received_at=time.time())  # otherwise all are too old, and returned
        headers = message_headers(pattern, *encode_envelope(pattern.envelope), crc=crc32c(text), pieces=0)
        for start in range(0, messages, 2000):
            requests = []
            for number in range(start, min(messages, start + 2000)):
                name = f"{number:020d}"
                mine = headers.replace(pattern.id.encode(), name.encode())
                requests.append(Request(layout.message(number % 64, name), text, mine))
            await jetstream.client.request_many(requests, timeout=60)
        async with gateway(folder, settings, "smtp://127.0.0.1:1", "rebuilt") as server:
            begun, before = time.perf_counter(), time.process_time()
            with trio.fail_after(600):
                while len(node_of(server).queue.owned) < 64:  # noqa: ASYNC110 - there is no event
                    await trio.sleep(0.05)
            seconds, cpu = time.perf_counter() - begun, time.process_time() - before
        print(f"{'rebuild':12}{messages / seconds:>9,.0f}/s {cpu / messages * 1e6:>6.1f} us, {seconds:.1f} s in all")


@contextlib.contextmanager
def traced(servers: NatsServers, folder: Path) -> Iterator[list[Path]]:
    """Trace the fsyncs of all servers."""
    logs = [folder / f"strace{number}" for number in servers.processes]
    tracers = []
    try:
        for log, process in zip(logs, servers.processes.values(), strict=True):
            command = ["strace", "-f", "-e", "trace=fsync,fdatasync", "-o", str(log), "-p", str(process.pid)]
            tracers.append(subprocess.Popen(command, stderr=subprocess.DEVNULL))
        yield logs
    finally:
        for tracer in tracers:
            tracer.send_signal(signal.SIGINT)
            tracer.wait()


async def syncs(servers: NatsServers, folder: Path, messages: int = 300) -> None:
    """Print the fsyncs of each server."""
    async with made(servers, folder) as (jetstream, settings):
        writer = Writer(jetstream, Layout(settings.name, streams=1, partitions=4))
        with traced(servers, folder) as logs:
            await trio.sleep(2)
            before = [log.read_text().count("sync(") for log in logs]
            for number in range(messages):
                await writer.write(make_message(b"x" * 4000), number % 4, patience=10)
            await trio.sleep(1)
            counts = [log.read_text().count("sync(") - count for log, count in zip(logs, before, strict=True)]
        print(f"{'syncs':12}{messages} messages, one in flight: {counts} fsyncs of the servers")


def main() -> None:
    """Run the selected measurements."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("what", nargs="*", default=["accept", "latency", "publish", "rebuild", "syncs"])
    parser.add_argument("--messages", type=int, default=20_000, help="messages of a round, or of the index")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()

    async def measure(servers: NatsServers, folder: Path) -> None:
        for what in options.what:
            if what == "accept":
                await accept(servers, folder, options.messages, options.rounds)
            elif what == "latency":
                await latency(servers, folder)
            elif what == "publish":
                await publish(servers, folder)
            elif what == "rebuild":
                await rebuild(servers, folder, options.messages)
            else:
                await syncs(servers, folder)

    with tempfile.TemporaryDirectory() as name, NatsServers.running(Path(name) / "nats", store="20GB") as servers:
        trio.run(measure, servers, Path(name))


if __name__ == "__main__":
    main()
