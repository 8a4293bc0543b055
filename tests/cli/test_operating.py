"""Reloads whose parts cannot be used at first: services of operators, certificates."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import trio
import trio.testing
from bench.operations import make_pair

from penstock.cli.certificates import Certificates
from penstock.cli.operating import Operations
from penstock.config import Settings
from penstock.control import ControlError, WorkerState
from penstock.net.tls import KeyPair
from tests.cli.outfits import Written, settings_of

A, B, C = "127.0.0.1:9001", "127.0.0.1:9002", "127.0.0.1:9003"


class Server(Operations):
    """A server that applies everything but certificates that it refuses."""

    refusals: tuple[str, ...] = ()
    pairs: tuple[KeyPair | None, ...] = ()

    def stop(self) -> None:
        self.stopping()

    async def _apply(self, settings: Settings, certificates: Certificates, rolling: list[str]) -> None:
        self.pairs = tuple(certificates.pairs)

    async def _use_certificates(self) -> None:
        if self.refusals:
            cause, *others = self.refusals
            self.refusals = tuple(others)
            raise ControlError(cause)
        self.pairs = tuple(self.certificates.pairs)

    async def _check_policies(self) -> None:
        pass

    async def _set_draining(self, is_draining: bool) -> None:
        pass

    async def _is_empty(self) -> bool:
        return True

    async def _worker_states(self) -> list[WorkerState]:
        return []

    async def _rotate_workers(self) -> None:
        pass

    @property
    def is_alive(self) -> bool:
        return True


# ---- certificates


async def look(server: Server) -> None:
    await server._look(1000.0)
    server.flush()


async def test_a_certificate_that_could_not_be_used_is_tried_again(tmp_path: Path) -> None:
    make_pair(tmp_path)
    tls = {"mode": "starttls", "certificate": "cert.pem", "key": "key.pem"}
    written = Written(settings_of(tmp_path, listener=[{"address": "127.0.0.1:0", "tls": tls}]))
    server = Server(written.outfit)
    make_pair(tmp_path)
    server.refusals = ("a worker is busy", "a worker is busy", "another cause")
    for _ in range(5):
        await look(server)
    assert server.pairs == (KeyPair.read(tmp_path / "cert.pem", tmp_path / "key.pem"),)
    assert written.events() == ["reload-failed", "reload-failed", "reloaded"], "each cause is reported once"


async def test_a_reload_ends_the_attempts_with_a_certificate(tmp_path: Path) -> None:
    make_pair(tmp_path)
    tls = {"mode": "starttls", "certificate": "cert.pem", "key": "key.pem"}
    written = Written(settings_of(tmp_path, listener=[{"address": "127.0.0.1:0", "tls": tls}]))
    server = Server(written.outfit)
    make_pair(tmp_path)
    server.refusals = ("a worker is busy",)
    await look(server)
    server._is_started.set()
    assert (await server.reload()).result == "ok"
    await look(server)
    assert written.events() == ["reload-failed", "reloaded"]


# ---- services


class Services:
    """Services of which only some addresses can be bound."""

    def __init__(self) -> None:
        self.taken: set[str] = set()
        self.tried: list[str] = []
        self.running = ""
        self.binding: trio.Event | None = None
        """Attempts wait for it."""

    async def run(self, settings: Settings, *, task_status: trio.TaskStatus[None]) -> None:
        address = settings.metrics.address
        self.tried.append(address)
        if self.binding is not None:
            await self.binding.wait()
        if address in self.taken:
            raise OSError(f"{address} is in use")
        self.running = address
        task_status.started()
        try:
            await trio.sleep_forever()
        finally:
            self.running = ""


class Configured:
    """A server whose services are at an address that reloads change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.address = A
        self.services = Services()
        self.server = Server(Written(self.load(), self.load).outfit)
        self.server.started()

    def load(self) -> Settings:
        return settings_of(self.folder, metrics={"address": self.address})

    async def reload(self, address: str) -> None:
        self.address = address
        assert (await self.server.reload()).result == "ok"
        await trio.testing.wait_all_tasks_blocked(0.01)
        await trio.sleep(1)
        await trio.testing.wait_all_tasks_blocked(0.01)


@asynccontextmanager
async def configured(folder: Path) -> AsyncIterator[Configured]:
    made = Configured(folder)
    async with trio.open_nursery() as nursery:
        await nursery.start(partial(made.server.keep_services, made.services.run))
        yield made
        nursery.cancel_scope.cancel()


async def test_a_reload_tries_an_address_again_that_was_in_use(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with configured(tmp_path) as made:
        made.services.taken = {B}
        await made.reload(B)
        assert made.services.running == A
        made.services.taken.clear()
        await made.reload(B)
        assert made.services.running == B
        await made.reload(B)
        assert made.services.tried == [A, B, A, B], "what runs is not started again"


async def test_a_reload_starts_services_of_which_none_runs(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with configured(tmp_path) as made:
        made.services.taken = {A, B}
        await made.reload(B)
        assert made.services.running == ""
        made.services.taken = {B}
        await made.reload(A)
        assert made.services.running == A


async def test_a_reload_during_a_start_that_fails_is_not_lost(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    async with configured(tmp_path) as made:
        made.services.taken = {B}
        made.services.binding = trio.Event()
        await made.reload(B)
        await made.reload(C)
        made.services.binding.set()
        await trio.sleep(1)
        assert made.services.running == C
        assert made.services.tried == [A, B, C]
