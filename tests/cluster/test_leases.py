"""How leases are kept and given up while requests fail; a client stands in for the cluster."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import msgspec
import pytest
import trio
import trio.testing

from penstock.cluster.jetstream import JetStream
from penstock.cluster.layout import WRONG_LAST_SEQUENCE, Layout
from penstock.cluster.leases import LeaseKeeper
from penstock.net.nats import DisconnectedError, Message, NatsClient, NatsError, Request, RequestTimeoutError

LEASE = 10.0


def answer(**fields: Any) -> Message:
    return Message("", "", b"", msgspec.json.encode(fields))


@dataclass
class Bucket:
    """Stores the last record of each key, as JetStream does; the next requests fail as `failures` says."""

    records: dict[str, tuple[int, bytes]] = field(default_factory=dict)
    sequence: int = 0
    failures: list[str] = field(default_factory=list)
    timeouts: list[float] = field(default_factory=list)
    writes: int = 0
    waits: trio.Event | None = None
    """Answers wait for it."""

    async def request_many(self, requests: Sequence[Request], *, timeout: float) -> list[Message | NatsError]:  # noqa: ASYNC109
        answers = [self._write(request) for request in requests]
        self.timeouts.append(timeout)
        if self.waits is not None:
            await self.waits.wait()
        await trio.lowlevel.checkpoint()
        return answers

    def _write(self, request: Request) -> Message | NatsError:
        self.writes += 1
        how = self.failures.pop(0) if self.failures else ""
        if how == "lost":
            return DisconnectedError("lost")
        last = int(request.headers.split(b"Sequence: ")[1].split()[0])
        if last != self.records.get(request.subject, (0, b""))[0]:
            error = {"code": 400, "err_code": WRONG_LAST_SEQUENCE, "description": "wrong last sequence"}
            return answer(error=error)
        self.sequence += 1
        self.records[request.subject] = self.sequence, request.data
        return RequestTimeoutError("late") if how == "late" else answer(seq=self.sequence)

    async def request(self, subject: str, data: bytes = b"", headers: bytes = b"", *, timeout: float) -> Message:  # noqa: ASYNC109
        self.timeouts.append(timeout)
        await trio.lowlevel.checkpoint()
        if not subject.startswith("$JS.API"):
            return answer(seq=1)
        name = msgspec.json.decode(data)["last_by_subj"]
        if name not in self.records:
            return answer(error={"code": 404, "description": "no message found"})
        sequence, record = self.records[name]
        return answer(message={"subject": name, "seq": sequence, "data": base64.b64encode(record).decode()})

    def owner(self, partition: int) -> str:
        return str(msgspec.json.decode(self.records[f"$KV.x-lease.{partition}"][1])["node"])


async def claim(keeper: LeaseKeeper, *partitions: int) -> None:
    """Get the leases of partitions that have no owner."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("penstock.cluster.leases.read_leases", no_leases)
        patch.setattr("random.sample", lambda _free, _count: list(partitions))
        await keeper._claim(len(partitions), ())


async def holding(bucket: Bucket, *partitions: int, lease: float = LEASE) -> LeaseKeeper:
    """Return a keeper that has just got the leases of some partitions."""
    layout = Layout("x", streams=1, partitions=4)
    jetstream = JetStream(cast(NatsClient, bucket))
    keeper = LeaseKeeper(jetstream, layout, node="g1", version="1", lease=lease)
    await claim(keeper, *partitions)
    assert keeper.held == list(partitions)
    return keeper


async def no_leases(*_: object) -> dict[int, object]:
    return {}


@pytest.mark.parametrize("how", ["lost", "late"])
async def test_a_renewal_that_fails_once_is_made_again_and_reported(
    autojump_clock: trio.testing.MockClock, how: str
) -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0, 1)
    lost: list[int] = []
    reports: list[Exception] = []
    keeper.on_lose, keeper.report = lost.append, reports.append
    bucket.failures = [how] * 2
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper._expire)
        nursery.start_soon(keeper._keep_renewing)
        await trio.sleep(LEASE * 2)
        nursery.cancel_scope.cancel()
    assert (lost, keeper.held) == ([], [0, 1])
    assert [str(report) for report in reports] == [how]


async def test_a_renewal_is_reported_once_while_it_fails(autojump_clock: trio.testing.MockClock) -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0)
    reports: list[Exception] = []
    keeper.report = reports.append
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper._keep_renewing)
        for _ in range(2):
            bucket.failures = ["lost"] * 4
            await trio.sleep(LEASE * 2)
        nursery.cancel_scope.cancel()
    assert len(reports) == 2


@pytest.mark.parametrize("lease", [1.0, 10.0, 600.0])
async def test_an_answer_is_awaited_no_longer_than_a_lease_is_left(lease: float) -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0, lease=lease)
    await keeper._rewrite([0], "g1")
    assert max(bucket.timeouts) <= lease / 3


async def test_a_partition_is_released_while_it_is_renewed() -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0)
    bucket.waits = trio.Event()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper._rewrite, [0], "g1")
        await trio.testing.wait_all_tasks_blocked()
        keeper._held[0].is_leaving = True
        nursery.start_soon(keeper.release, 0)
        await trio.testing.wait_all_tasks_blocked()
        bucket.waits.set()
    assert (bucket.owner(0), keeper._held) == ("", {})


@pytest.mark.parametrize("how", ["lost", "late"])
async def test_a_release_that_fails_is_made_again(autojump_clock: trio.testing.MockClock, how: str) -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0)
    bucket.failures = [how]
    keeper._held[0].is_leaving = True
    await keeper.release(0)
    assert (bucket.owner(0), keeper._held) == ("", {})


async def test_a_lease_that_was_lost_and_gained_again_is_not_released() -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0)
    keeper._held[0].is_leaving = True
    keeper._lose(0)
    bucket.records.clear()
    await claim(keeper, 0)
    await keeper.release(0)  # too late
    assert (bucket.owner(0), keeper.held) == ("g1", [0])


async def test_everything_is_released_after_a_renewal_without_an_answer() -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0, 1)
    bucket.failures = ["late", "lost"]
    await keeper._rewrite([0, 1], "g1")
    await keeper.release_all()
    assert [bucket.owner(0), bucket.owner(1)] == ["", ""]


async def test_a_partition_of_another_node_is_not_released() -> None:
    bucket = Bucket()
    keeper = await holding(bucket, 0)
    bucket.sequence += 1
    bucket.records["$KV.x-lease.0"] = bucket.sequence, b'{"node":"g2","process":"another"}'
    lost: list[int] = []
    keeper.on_lose = lost.append
    await keeper.release_all()
    assert (bucket.owner(0), lost) == ("g2", [0])


async def test_a_claim_that_fails_is_reported() -> None:
    bucket = Bucket(failures=["lost"])
    with pytest.raises(DisconnectedError):
        await holding(bucket, 0)


async def test_a_node_soon_balances_again_when_that_has_failed(
    autojump_clock: trio.testing.MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    keeper = await holding(Bucket(), lease=600.0)
    times: list[float] = []

    async def fail_once() -> None:
        times.append(trio.current_time())
        if len(times) == 1:
            raise NatsError("there is no leader now")

    monkeypatch.setattr(keeper, "_balance", fail_once)
    begun = trio.current_time()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(keeper.run)
        await trio.sleep(300)
        nursery.cancel_scope.cancel()
    assert [round(when - begun) for when in times] == [0, 1, 201]
