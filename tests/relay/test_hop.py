"""What a hop is called, and what its answers mean."""

from __future__ import annotations

import pytest

from penstock.relay.hop import Hop, Outcome, Result, TlsPolicy
from penstock.smtp.client import ServerReply


@pytest.mark.parametrize(
    ("hop", "name"),
    [
        (Hop(host="mx.example.org"), "mx.example.org:25"),
        (Hop(host="mx.example.org", address="192.0.2.1", port=26), "mx.example.org[192.0.2.1]:26"),
        (Hop(host="192.0.2.1", address="192.0.2.1"), "192.0.2.1:25"),
        (Hop(path="/run/lmtp", kind="lmtp"), "unix:/run/lmtp"),
    ],
)
def test_a_hop_has_a_name(hop: Hop, name: str) -> None:
    assert hop.name == name


def test_equal_hops_are_one_key_and_a_policy_makes_them_differ() -> None:
    assert len({Hop(host="a"), Hop(host="a"), Hop(host="a", tls=TlsPolicy(mode="verify"))}) == 2


def test_no_password_is_shown() -> None:
    assert "secret" not in repr(Hop(host="a", user="bob", password="secret"))


@pytest.mark.parametrize(
    ("code", "kind", "status"),
    [
        (250, Outcome.DELIVERED, "2.0.0"),
        (354, Outcome.DEFERRED, "3.0.0"),
        (450, Outcome.DEFERRED, "4.0.0"),
        (550, Outcome.FAILED, "5.1.1"),
    ],
)
def test_a_reply_is_an_outcome(code: int, kind: Outcome, status: str) -> None:
    assert Result.of(ServerReply(code, ("5.1.1 x",)), "mx") == Result(kind, f"{code} 5.1.1 x", status, "mx")
