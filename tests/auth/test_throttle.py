"""The throttle of password guessing."""

from __future__ import annotations

from penstock.auth.throttle import AuthThrottle
from penstock.server.limits import AdmissionSettings


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def throttle_of(limit: int, *exempt: str, clock: Clock | None = None) -> AuthThrottle:
    return AuthThrottle(AdmissionSettings(auth_failures=limit, auth_window=600, exempt=exempt), clock or Clock())


def fail(throttle: AuthThrottle, network: str, name: str) -> bool:
    """Fail with a name; return False when the attempt was not allowed."""
    attempt = throttle.begin(network)
    return attempt is not None and attempt.claim(name)


def test_failures_of_a_network_are_counted_whatever_the_names() -> None:
    clock = Clock()
    throttle = throttle_of(3, clock=clock)
    assert [fail(throttle, "192.0.2.1", name) for name in "abcd"] == [True, True, True, False]
    assert fail(throttle, "192.0.2.2", "d")
    clock.now += 1300
    assert fail(throttle, "192.0.2.1", "a")


def test_failures_of_a_name_count_for_all_networks_and_any_case() -> None:
    throttle = throttle_of(3)
    names = ["alice", "ALICE", "Alice", "aLICE"]
    assert [fail(throttle, f"192.0.2.{number}", name) for number, name in enumerate(names)] == [True] * 3 + [False]
    assert fail(throttle, "192.0.2.9", "bob")


def test_an_attempt_counts_before_its_password_is_verified() -> None:
    throttle = throttle_of(30)
    attempts = [throttle.begin("192.0.2.1") for _ in range(150)]
    assert sum(attempt is not None for attempt in attempts) == 30


def test_attempts_at_once_cannot_pass_the_limit_of_a_name() -> None:
    throttle = throttle_of(30)
    assert sum(fail(throttle, f"192.0.2.{number}", "alice") for number in range(150)) == 30


def test_a_success_forgets_its_name_and_itself_only() -> None:
    throttle = throttle_of(3)
    fail(throttle, "192.0.2.1", "bob")
    fail(throttle, "192.0.2.2", "alice")
    attempt = throttle.begin("192.0.2.1")
    assert attempt is not None
    assert attempt.claim("alice")
    attempt.succeeded()
    attempt.succeeded()
    assert fail(throttle, "192.0.2.1", "bob")
    assert fail(throttle, "192.0.2.1", "carol")
    assert throttle.begin("192.0.2.1") is None
    assert all(fail(throttle, f"192.0.2.{number}", "alice") for number in (3, 4, 5))


def test_successes_do_not_use_up_the_limit() -> None:
    throttle = throttle_of(2)
    for _ in range(10):
        attempt = throttle.begin("192.0.2.1")
        assert attempt is not None
        assert attempt.claim("alice")
        attempt.succeeded()


def test_an_attempt_that_the_server_could_not_verify_is_taken_back() -> None:
    throttle = throttle_of(2)
    for _ in range(10):
        attempt = throttle.begin("192.0.2.1")
        assert attempt is not None
        assert attempt.claim("alice")
        attempt.withdrawn()


def test_a_name_is_counted_once_for_each_attempt() -> None:
    throttle = throttle_of(2)
    attempt = throttle.begin("192.0.2.1")
    assert attempt is not None
    assert all(attempt.claim("alice") for _ in range(10))


def test_exempt_networks_and_unix_sockets_are_limited_by_name_only() -> None:
    for network in ("10.1.2.3", ""):
        throttle = throttle_of(3, "::ffff:10.0.0.0/104")
        assert all(fail(throttle, network, f"user{number}") for number in range(50))
        assert [fail(throttle, network, "alice") for _ in range(5)] == [True] * 3 + [False] * 2
