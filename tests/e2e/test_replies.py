"""The short form of bench/replies.py: one reply for each command and each message, in order, whenever they arrive."""

from __future__ import annotations

import pytest
from bench.replies import POLICIES, PROBES, SERVERS, TRANSPORTS, count_stored, run_sessions, target


@pytest.mark.parametrize("policy", POLICIES, ids=lambda policy: policy or "no policy")
@pytest.mark.parametrize("kind", SERVERS)
def test_commands_sent_during_a_commit_are_answered_in_order(kind: str, policy: str) -> None:
    with target(kind, policy=policy) as server:
        messages = 0
        for transports, sessions in ((TRANSPORTS["plain"], 40), (TRANSPORTS["TLS"], 20)):
            accounts, _ = run_sessions(server, transports, sessions, seed=7)
            assert accounts.examples == []
            assert accounts.errors == 0
            messages += accounts.messages + PROBES * len(transports)
        assert count_stored(server, messages) == messages
