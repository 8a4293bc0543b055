"""Three servers for all tests of a process; each test has streams of its own."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from bench.nats_servers import NatsServers


@pytest.fixture(scope="session")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[NatsServers]:
    with NatsServers.running(tmp_path_factory.mktemp("nats"), store="64GB") as running:
        yield running
