from __future__ import annotations

from collections.abc import AsyncIterator

import pytest
import trio

import penstock.relay.pool
from penstock.journal import Journal, JournalSettings
from penstock.relay.pool import Pool, PoolSettings


@pytest.fixture(params=["poller", "trio"])
async def pool(
    request: pytest.FixtureRequest, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pool]:
    """A pool that runs, with both ways of waiting."""
    if request.param == "trio":
        monkeypatch.setattr(penstock.relay.pool, "HAS_EPOLL", False)
    journal = Journal(JournalSettings(format="human"))
    pool = Pool(PoolSettings(), hostname="client.example.org", journal=journal)
    await nursery.start(pool.run)
    yield pool
    await pool.aclose()
    assert pool.connections == 0
    assert b" error " not in (lines := journal.drain()), lines.decode()
    nursery.cancel_scope.cancel()
