"""Short forms of bench.cluster: every accepted message is accounted for."""

from __future__ import annotations

from pathlib import Path

import pytest
from bench.cluster import report, run


@pytest.mark.parametrize(
    "rounds", [[("leader", "kill"), ("follower", "wipe")], [("connected", "cut"), ("gateways", "kill")]]
)
async def test_no_accepted_message_is_lost(rounds: list[tuple[str, str]], tmp_path: Path) -> None:
    account = await run(rounds, tmp_path, rate=100, pause=1.0, down=1.0, settle=0.5)
    text, is_good = report(account)
    assert is_good, text
    assert len(account.accepted) > 20, text
    assert not account.refused, text
