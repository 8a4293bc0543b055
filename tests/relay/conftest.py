from __future__ import annotations

from collections.abc import AsyncIterator, Callable

import pytest
import trio

import penstock.relay.pool
from penstock.relay.pool import Pool, PoolSettings

MakePool = Callable[..., "object"]


@pytest.fixture(params=["poller", "trio"])
async def pool(
    request: pytest.FixtureRequest, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[Pool]:
    """A pool that runs, with both ways of waiting."""
    if request.param == "trio":
        monkeypatch.setattr(penstock.relay.pool, "HAS_EPOLL", False)
    pool = Pool(PoolSettings(), hostname="client.example.org")
    await nursery.start(pool.run)
    yield pool
    await pool.aclose()
    assert pool.connections == 0
    nursery.cancel_scope.cancel()
