"""Reloads of a server of several processes that fail half-way; its workers are answers of a test."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import trio

from penstock.cli.notify import ServiceManager
from penstock.cli.operating import RollError
from penstock.cli.sockets import ListeningSockets
from penstock.cli.workers import Launcher, SupervisorOperations
from penstock.config import Settings
from penstock.control import ControlError
from penstock.operations.observation import Observation
from penstock.state.keeper import Keeper
from penstock.supervisor import Launch
from tests.cli.outfits import Written, settings_of
from tests.ports import free_port


class Worker:
    """A worker that answers requests with success or with an error."""

    def __init__(self, *answers: str) -> None:
        self.ended = trio.Event()
        self.asked: list[str] = []
        self._answers = list(answers)

    async def ask(self, verb: str, **_: Any) -> None:
        await trio.lowlevel.checkpoint()
        self.asked.append(verb)
        if self._answers and (problem := self._answers.pop(0)):
            raise ControlError(problem)


class Workers:
    """A supervisor whose workers are replaced at once."""

    def __init__(self, *workers: Worker) -> None:
        self.living = workers
        self.rolls = 0
        self.processes = {0: 1}
        self.watchdog = self.patience = 0.0
        self.broken_part: Path | None = None
        """A part of the spool that is unreadable after the replacement."""

    async def roll(self, launch: Launch, indexes: list[int]) -> None:
        await trio.lowlevel.checkpoint()
        self.rolls += 1
        self.processes = {0: 1 + self.rolls}
        if self.broken_part is not None:
            break_part(self.broken_part)

    async def add(self, launch: Launch, index: int) -> None:
        await trio.lowlevel.checkpoint()


def break_part(folder: Path) -> None:
    """Make a part of the spool that is no database."""
    folder.mkdir()
    (folder / "spool.db").write_bytes(b"no database " * 1000)


class Supervising:
    """A server of several processes, without its processes."""

    def __init__(self, settings: Settings, sockets: ListeningSockets, launcher: Launcher, observation: Observation):
        self.settings = settings
        self.operations = SupervisorOperations(Written(settings).outfit, sockets, launcher, [0], observation)
        self.sockets = sockets

    def use(self, workers: Workers) -> Workers:
        self.operations.supervisor = workers  # type: ignore[assignment]
        return workers

    async def apply(self, settings: Settings, *rolling: str) -> None:
        await self.operations._apply(settings, self.operations.certificates, list(rolling))


@contextmanager
def supervising(folder: Path) -> Iterator[Supervising]:
    settings = settings_of(folder)
    sockets = ListeningSockets({}, ServiceManager())
    observation = Observation(settings, workers=1)
    with Keeper(folder / "state", print) as keeper:
        try:
            sockets.prepare(settings, 1)
            launcher = Launcher(settings, [None], sockets, None, observation, keeper)
            yield Supervising(settings, sockets, launcher, observation)
        finally:
            sockets.close()
            observation.close()


async def test_a_worker_that_cannot_be_changed_changes_none(tmp_path: Path) -> None:
    with supervising(tmp_path) as made:
        workers = made.use(Workers(Worker(), Worker("no memory")))
        with pytest.raises(ControlError, match="no memory"):
            await made.apply(settings_of(tmp_path, domains=["example.org"]))
        await made.apply(settings_of(tmp_path, domains=["example.org"]))
        assert [each.asked for each in workers.living] == [["reload"] * 3] * 2
        assert workers.rolls == 0


async def test_a_worker_that_cannot_be_changed_back_is_replaced_later(tmp_path: Path) -> None:
    with supervising(tmp_path) as made:
        workers = made.use(Workers(Worker("", "no memory"), Worker("disk full")))
        with pytest.raises(RollError, match="disk full; some workers may have the new settings"):
            await made.apply(settings_of(tmp_path, domains=["example.org"]))
        assert workers.rolls == 0
        await made.apply(made.settings)
        assert workers.rolls == 1
        await made.apply(made.settings)
        assert workers.rolls == 1


def moved(folder: Path) -> tuple[Settings, str]:
    """Return settings with another address, which is free."""
    address = f"127.0.0.1:{free_port()}"
    return settings_of(folder, listener=[{"address": address, "tls": {"mode": "none"}}]), address


async def test_a_spool_that_breaks_during_a_roll_causes_another_roll(tmp_path: Path) -> None:
    with supervising(tmp_path) as made:
        workers = made.use(Workers())
        workers.broken_part = tmp_path / "spool-7"
        settings, address = moved(tmp_path)
        with pytest.raises(RollError, match=r"spool\.path: .*all workers were replaced"):
            await made.apply(settings, "listener")
        assert made.sockets.addresses(settings) == [address], "the new workers accept from it"
        (tmp_path / "spool-7" / "spool.db").unlink()
        workers.broken_part = None
        await made.apply(settings)
        assert workers.rolls == 2


async def test_an_unreadable_spool_changes_nothing(tmp_path: Path) -> None:
    with supervising(tmp_path) as made:
        workers = made.use(Workers())
        break_part(tmp_path / "spool-7")
        settings, _ = moved(tmp_path)
        with pytest.raises(ControlError, match=r"spool\.path"):
            await made.apply(settings, "listener")
        assert workers.rolls == 0
        with pytest.raises(KeyError):
            made.sockets.addresses(settings)
        await made.apply(made.settings)
        assert workers.rolls == 0
