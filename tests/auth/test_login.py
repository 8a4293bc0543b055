"""Logins: the exchange, the authenticator and the throttle together."""

from __future__ import annotations

from pathlib import Path

import argon2
import pytest
import scramp
import trio

from penstock import reply as replies
from penstock.auth.login import NAME_THROTTLED, Login
from penstock.auth.throttle import AuthThrottle
from penstock.auth.users import UsersAuthenticator, UsersFile
from penstock.reply import Reply
from penstock.server.limits import AdmissionSettings
from penstock.smtp.sasl import Challenge, Failure, ScramKeys, Success

KEYS = ScramKeys(*scramp.ScramMechanism("SCRAM-SHA-256").make_auth_info("secret", iteration_count=4096, salt=b"x" * 16))
GOOD, BAD = b"\0alice\0secret", b"\0alice\0wrong"


class Alice:
    """Knows alice, whose password is secret; verifies only when it is let."""

    def __init__(self) -> None:
        self.asked = 0
        self.go = trio.Event()
        self.go.set()

    async def verify(self, name: str, password: str) -> bool:
        self.asked += 1
        await self.go.wait()
        if password == "broken":
            raise OSError("the backend is down")
        return (name, password) == ("alice", "secret")

    def scram_keys(self, name: str) -> ScramKeys:
        return KEYS


def throttle_of(limit: int) -> AuthThrottle:
    return AuthThrottle(AdmissionSettings(auth_failures=limit, exempt=("127.0.0.0/8",)), lambda: 0.0)


async def plain(throttle: AuthThrottle, message: bytes, alice: Alice, network: str = "192.0.2.1") -> Reply:
    """Log in with PLAIN and return the reply."""
    login = Login("PLAIN", alice, throttle, network)
    step = await login.start(message)
    if isinstance(step, Success):
        login.finish(replies.AUTHENTICATED)
        return replies.AUTHENTICATED
    assert isinstance(step, Failure)
    return step.reply


async def test_guesses_at_once_cannot_pass_the_limit() -> None:
    alice, throttle = Alice(), throttle_of(30)
    alice.go = trio.Event()
    found: list[Reply] = []

    async def guess() -> None:
        found.append(await plain(throttle, BAD, alice))

    async with trio.open_nursery() as nursery:
        for _ in range(150):
            nursery.start_soon(guess)
        await trio.testing.wait_all_tasks_blocked()
        alice.go.set()
    assert alice.asked == 30
    assert found.count(replies.AUTH_THROTTLED) == 120


async def test_an_own_good_login_does_not_clear_the_failures_of_the_network() -> None:
    alice, throttle = Alice(), throttle_of(5)
    for number in range(5):
        assert await plain(throttle, b"\0bob%d\0x" % number, alice) == replies.AUTH_FAILED
        if number < 4:
            assert await plain(throttle, GOOD, alice) == replies.AUTHENTICATED
    assert await plain(throttle, GOOD, alice) == replies.AUTH_THROTTLED


async def test_a_webmail_on_loopback_is_throttled_by_name_only() -> None:
    alice, throttle = Alice(), throttle_of(3)
    for network in ("127.0.0.1", ""):
        replies_of_bob = [await plain(throttle, f"\0bob{network}\0x".encode(), alice, network) for _ in range(5)]
        assert replies_of_bob == [replies.AUTH_FAILED] * 3 + [NAME_THROTTLED] * 2
        assert await plain(throttle, GOOD, alice, network) == replies.AUTHENTICATED


async def test_names_are_throttled_over_networks() -> None:
    alice, throttle = Alice(), throttle_of(3)
    found = [await plain(throttle, BAD, alice, f"192.0.2.{number}") for number in range(5)]
    assert found == [replies.AUTH_FAILED] * 3 + [NAME_THROTTLED] * 2
    assert alice.asked == 3
    assert await plain(throttle, GOOD, alice, "192.0.2.9") == NAME_THROTTLED


@pytest.mark.parametrize(
    ("mechanism", "message"),
    [
        ("PLAIN", b""),
        ("PLAIN", b"\0" + b"a" * 256 + b"\0x"),
        ("LOGIN", b"\xff"),
        ("SCRAM-SHA-256", b"garbage"),
        ("SCRAM-SHA-256", b"n,,n=" + b"a" * 9000 + b",r=abc"),
    ],
)
async def test_malformed_exchanges_count_as_failures(mechanism: str, message: bytes) -> None:
    alice, throttle = Alice(), throttle_of(3)
    for _ in range(3):
        step = await Login(mechanism, alice, throttle, "192.0.2.1").start(message)
        assert isinstance(step, Failure)
        assert step.reply.code == 501
    assert await plain(throttle, GOOD, alice) == replies.AUTH_THROTTLED


async def test_cancelled_exchanges_count_as_failures() -> None:
    alice, throttle = Alice(), throttle_of(3)
    for _ in range(3):
        assert isinstance(await Login("LOGIN", alice, throttle, "192.0.2.1").start(None), Challenge)
    assert await plain(throttle, GOOD, alice) == replies.AUTH_THROTTLED


async def test_a_backend_that_fails_is_not_a_wrong_password() -> None:
    alice, throttle = Alice(), throttle_of(2)
    for _ in range(5):
        with pytest.raises(OSError, match="the backend is down"):
            await plain(throttle, b"\0alice\0broken", alice)
    assert await plain(throttle, GOOD, alice) == replies.AUTHENTICATED


async def test_a_policy_decides_whether_a_login_counts() -> None:
    alice, throttle = Alice(), throttle_of(2)
    for _ in range(5):
        login = Login("PLAIN", alice, throttle, "192.0.2.1")
        assert isinstance(await login.start(GOOD), Success)
        login.finish(Reply(454, "4.7.0", "Later"))
    for _ in range(2):
        login = Login("PLAIN", alice, throttle, "192.0.2.1")
        assert isinstance(await login.start(GOOD), Success)
        login.finish(Reply(535, "5.7.8", "Not you"))
    assert await plain(throttle, GOOD, alice) == replies.AUTH_THROTTLED


async def scram(throttle: AuthThrottle, password: str, network: str) -> Success | Failure:
    login = Login("SCRAM-SHA-256", Alice(), throttle, network)
    client = scramp.ScramClient(["SCRAM-SHA-256"], "alice", password)
    step = await login.start(client.get_client_first().encode())
    assert login.name == "alice" or isinstance(step, Failure)
    for peer_takes, peer_says in (
        (client.set_server_first, client.get_client_final),
        (client.set_server_final, lambda: ""),
    ):
        if isinstance(step, Challenge):
            peer_takes(step.data.decode())
            step = await login.respond(peer_says().encode())
    assert not isinstance(step, Challenge)
    if isinstance(step, Success):
        login.finish(replies.AUTHENTICATED)
    return step


async def test_scram_is_throttled_by_name_before_the_proof_is_verified() -> None:
    throttle = throttle_of(3)
    for number in range(10):
        assert isinstance(await scram(throttle, "secret", f"192.0.2.{number}"), Success)
    for number in range(3):
        step = await scram(throttle, "wrong", f"192.0.2.{number}")
        assert isinstance(step, Failure)
        assert step.reply == replies.AUTH_FAILED
    step = await scram(throttle, "secret", "192.0.2.9")
    assert isinstance(step, Failure)
    assert step.reply == NAME_THROTTLED


async def test_the_identity_is_spelled_as_in_the_users_file(tmp_path: Path) -> None:
    file = UsersFile(tmp_path / "users", argon2.PasswordHasher(time_cost=1, memory_cost=8, parallelism=1))
    file.add("Alice", "secret")
    login = Login("PLAIN", UsersAuthenticator(file), throttle_of(3), "192.0.2.1")
    assert await login.start(b"\0ALICE\0secret") == Success("Alice", "")
