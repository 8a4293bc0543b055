"""The same messages in one session and in two hundred meet the same faults: a real worker, real sockets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest
import trio

from penstock.app import Overrides, assemble
from penstock.config import DeliverySettings, ListenerSettings, Settings
from penstock.journal import Journal, JournalSettings
from penstock.net.tls import TlsSettings
from penstock.server.connection import Component
from penstock.sink.faults import AppliedFault, FaultEngine, FaultLog
from penstock.sink.injector import fault_injection
from penstock.sink.plan import parse_plan
from tests.tagged import marked

PLAN = """
seed = 11
[[rule]]
name = "slow"
phase = "mail"
match.probability = 0.1
delay = { uniform = [0.0, 0.002] }
[[rule]]
name = "busy"
phase = "rcpt"
match.probability = 0.15
reply = "450 4.2.1 Busy"
[[rule]]
name = "tenth"
phase = "dot"
match = { every = 10, attempts = 1 }
reply = "451 4.3.0 Later"
[[rule]]
name = "gone"
phase = "data"
match.probability = 0.1
end = "reset"
[[rule]]
name = "cut"
phase = "body"
at = 20
match.probability = 0.1
end = "drop"
"""
MESSAGES = 400
ATTEMPTS = 6


class Faults(FaultLog):
    """Keeps every fault."""

    def __init__(self) -> None:
        super().__init__()
        self.all: list[AppliedFault] = []

    def on_fault(self, fault: AppliedFault) -> None:
        self.all.append(fault)

    def without_sessions(self) -> list[AppliedFault]:
        return sorted(fault._replace(session=0) for fault in self.all)


class Sender:
    """Sends messages in one session after the other, each until it is taken or has failed too often."""

    def __init__(self, port: int, reuses: bool) -> None:
        self._port = port
        self._reuses = reuses
        self._stream: trio.SocketStream | None = None
        self._buffer = b""

    async def send(self, numbers: Sequence[int], run: str) -> None:
        for number in numbers:
            for _ in range(ATTEMPTS):
                try:
                    is_over = await self._try(number, run)
                except trio.BrokenResourceError:
                    await self._leave()
                    is_over = False
                if is_over:
                    break
            if not self._reuses:
                await self._leave()
        await self._leave()

    async def _leave(self) -> None:
        if self._stream is not None:
            await self._stream.aclose()
            self._stream = None

    async def _try(self, number: int, run: str) -> bool:
        if self._stream is None:
            self._stream, self._buffer = await trio.open_tcp_stream("127.0.0.1", self._port), b""
            await self._reply()
            await self._ask("EHLO client.example")
        message = marked(run, number)
        for line in ("RSET", f"MAIL FROM:<{message.sender}>", f"RCPT TO:<{message.recipient}>", "DATA"):
            code = await self._ask(line)
            if code not in (250, 354):
                return False
        return await self._ask(f"{message.text}.") == 250

    async def _ask(self, line: str) -> int:
        assert self._stream is not None
        await self._stream.send_all(line.encode() + b"\r\n")
        return await self._reply()

    async def _reply(self) -> int:
        assert self._stream is not None
        while True:
            line, end, rest = self._buffer.partition(b"\r\n")
            if end:
                self._buffer = rest
                if line[3:4] == b" ":
                    return int(line[:3])
                continue
            data = await self._stream.receive_some(4096)
            if not data:
                raise trio.BrokenResourceError("closed")
            self._buffer += data


async def run_against(folder: Path, faults: Component, sessions: int, *, reuses: bool, run: str) -> int:
    """Send the messages to a worker in so many sessions at a time. Return how many it has taken."""
    listener = ListenerSettings(address="127.0.0.1:0", tls=TlsSettings(mode="none"), max_hops=0)
    settings = Settings(data_dir=str(folder), listener=(listener,), delivery=DeliverySettings(kind="discard"))
    journal = Journal(JournalSettings(events="errors"))
    lines: list[bytes] = []
    parts = assemble(settings, journal, lines.append, overrides=Overrides(components=(faults,)))
    async with trio.open_nursery() as nursery:
        await nursery.start(parts.run)
        port = parts.listeners[0].local_address[1]
        async with trio.open_nursery() as senders:
            for first in range(sessions):
                numbers = range(1 + first, MESSAGES + 1, sessions)
                senders.start_soon(Sender(port, reuses).send, numbers, run)
        parts.stop()
    assert not [line for line in lines if b"error" in line]
    return int(parts.delivery.messages)  # type: ignore[attr-defined]  # it is the one that counts


@pytest.mark.parametrize(
    ("sessions", "reuses", "run"), [(200, True, "first"), (10, False, "first"), (200, False, "second")]
)
async def test_the_number_of_sessions_changes_no_fault(tmp_path: Path, sessions: int, reuses: bool, run: str) -> None:
    one, many = Faults(), Faults()
    plan = parse_plan(PLAN)
    taken = await run_against(tmp_path, fault_injection(FaultEngine(plan, receipts=one)), 1, reuses=True, run="first")
    faults = fault_injection(FaultEngine(plan, receipts=many))
    again = await run_against(tmp_path, faults, sessions, reuses=reuses, run=run)
    assert taken == again
    expected = one.without_sessions()
    if run != "first":
        expected = [
            msgspec.convert(
                [part.replace("first", run) if isinstance(part, str) else part for part in fault], AppliedFault
            )
            for fault in expected
        ]
    assert many.without_sessions() == sorted(expected)
    assert {fault.rule for fault in one.all} == {"slow", "busy", "tenth", "gone", "cut"}
    tenth = {fault.sequence for fault in one.all if fault.rule == "tenth"}
    assert tenth <= {f"seq-first-{number}" for number in range(10, MESSAGES + 1, 10)}
    assert len(one.all) > 150


async def test_another_seed_gives_other_faults(tmp_path: Path) -> None:
    one, other = Faults(), Faults()
    for seed, receipts in ((11, one), (12, other)):
        engine = FaultEngine(msgspec.structs.replace(parse_plan(PLAN), seed=seed), receipts=receipts)
        await run_against(tmp_path, fault_injection(engine), 20, reuses=True, run="first")
    assert one.without_sessions() != other.without_sessions()
