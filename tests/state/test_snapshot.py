"""The copy of the state on disk."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest
import trio

from penstock.state import Charge
from penstock.state.local import LocalState
from penstock.state.snapshot import Snapshot
from penstock.state.tables import Changes, Tables
from tests.state.clock import Clock
from tests.state.test_tables import HOUR, TIMES, charge


def saved(path: Path, tables: Tables) -> None:
    Snapshot(path).save(tables, tables.take_changes())


def loaded(path: Path, clock: Clock) -> Tables:
    tables = Tables(clock)
    assert Snapshot(path).load(tables) == ""
    return tables


def test_limits_and_passes_survive_a_restart(tmp_path: Path) -> None:
    clock = Clock()
    tables = Tables(clock)
    tables.take([charge(cost=7)])
    tables.greylist("a", TIMES)
    clock.advance(60)
    assert tables.greylist("a", TIMES) == 0
    tables.greylist("b", TIMES)
    saved(tmp_path / "state.db", tables)
    tables = loaded(tmp_path / "state.db", clock)
    assert tables.take([charge()]) == 0
    assert tables.greylist("a", TIMES) == 0
    assert tables.greylist("b", TIMES) == TIMES.delay
    clock.advance(60)
    assert tables.greylist("b", TIMES) == 0


def test_what_was_forgotten_is_not_loaded(tmp_path: Path) -> None:
    clock = Clock()
    tables = Tables(clock)
    tables.take([charge()])
    tables.greylist("a", TIMES)
    saved(tmp_path / "state.db", tables)
    clock.advance(50 * 3600)
    tables.sweep(10)
    saved(tmp_path / "state.db", tables)
    with sqlite3.connect(tmp_path / "state.db") as database:
        assert database.execute("SELECT count(*) FROM buckets").fetchone() == (0,)
        assert database.execute("SELECT count(*) FROM greylist").fetchone() == (0,)
    database.close()


def test_a_clock_that_was_set_back_delays_no_client(tmp_path: Path) -> None:
    clock = Clock()
    tables = Tables(clock)
    tables.take([charge(limit=1)])
    tables.greylist("a", TIMES)
    saved(tmp_path / "state.db", tables)
    clock.advance(-3 * 86_400)
    tables = loaded(tmp_path / "state.db", clock)
    clock.advance(3600)
    assert tables.take([charge(limit=1)]) == -1
    assert tables.greylist("a", TIMES) == 0


def test_a_damaged_file_is_put_aside(tmp_path: Path) -> None:
    path = tmp_path / "state.db"
    path.write_bytes(b"no database" * 1000)
    tables = Tables(Clock())
    assert "start empty" in Snapshot(path).load(tables)
    assert (tmp_path / "state.db.damaged").read_bytes().startswith(b"no database")
    tables.take([charge(limit=1)])
    saved(path, tables)
    assert loaded(path, Clock()).take([charge(limit=1)]) == 0


def test_only_the_owner_can_read_the_file(tmp_path: Path) -> None:
    tables = Tables(Clock())
    tables.take([charge()])
    saved(tmp_path / "state.db", tables)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o600}


async def test_what_cannot_be_saved_now_is_saved_later(tmp_path: Path) -> None:
    folder, reported = tmp_path / "folder", list[str]()
    folder.write_text("not a folder")
    state = LocalState(folder / "state.db", reported.append, interval=0.001)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(state.run)
        assert state.take([Charge("a", HOUR, 1)]) == -1
        while not reported:
            await trio.lowlevel.checkpoint()
        folder.unlink()
        nursery.cancel_scope.cancel()
    assert len(reported) == 1, "once until it works again"
    tables = Tables()
    assert Snapshot(folder / "state.db").load(tables) == ""
    assert tables.take([Charge("a", HOUR, 1)]) == 0


async def test_a_pass_is_saved_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, saves, save = Clock(), [], Snapshot.save

    def noted(snapshot: Snapshot, tables: Tables, changes: Changes) -> None:
        save(snapshot, tables, changes)
        saves.append(changes)

    monkeypatch.setattr(Snapshot, "save", noted)
    state = LocalState(tmp_path / "state.db", pytest.fail, tables=Tables(clock), interval=10**6)
    async with trio.open_nursery() as nursery:
        await nursery.start(state.run)
        state.greylist("a", TIMES)
        clock.advance(60)
        assert state.greylist("a", TIMES) == 0
        while not saves:  # a file that is being made cannot be read
            await trio.lowlevel.checkpoint()
        assert loaded(tmp_path / "state.db", clock).greylist("a", TIMES) == 0
        nursery.cancel_scope.cancel()
