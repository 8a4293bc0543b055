"""Limits: admission, wrong passwords, clocks."""

from __future__ import annotations

import trio
import trio.testing

from penstock import reply as replies
from penstock.inbound.limits import Admission, AdmissionSettings, AuthThrottle, Deadlines, LimitSettings, Sweeper
from penstock.reply import Reply
from penstock.transaction import Peer


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_the_total_counts_for_everybody() -> None:
    admission = Admission(AdmissionSettings(connections=2), Clock())
    assert admission.admit("127.0.0.1") is None
    assert admission.admit("") is None
    assert admission.admit("192.0.2.1") == replies.TOO_BUSY
    admission.release("")
    assert admission.admit("192.0.2.1") is None


def test_a_network_has_its_own_bound() -> None:
    admission = Admission(AdmissionSettings(per_network=2), Clock())
    networks = [Peer("2001:db8:0:1::1", 1).network, Peer("2001:db8:0:1::2", 1).network]
    assert networks[0] == networks[1] == "2001:db8:0:1::/64"
    assert [admission.admit(network) for network in networks] == [None, None]
    assert admission.admit(networks[0]) == replies.TOO_MANY_FROM_HERE
    assert admission.admit(Peer("2001:db8:0:2::1", 1).network) is None
    admission.release(networks[1])
    assert admission.admit(networks[0]) is None


def test_a_network_has_a_bound_a_minute() -> None:
    clock = Clock()
    admission = Admission(AdmissionSettings(per_network_per_minute=10), clock)

    def come_and_go(times: int) -> list[Reply | None]:
        answers = []
        for _ in range(times):
            answers.append(admission.admit("192.0.2.1"))
            if answers[-1] is None:
                admission.release("192.0.2.1")
        return answers

    assert come_and_go(11) == [None] * 10 + [replies.TOO_FAST_FROM_HERE]
    clock.now += 150
    assert come_and_go(1) == [None]


def test_exempt_networks_are_bound_by_the_total_alone() -> None:
    admission = Admission(AdmissionSettings(per_network=1, exempt=("10.0.0.0/8",)), Clock())
    assert [admission.admit("10.1.2.3") for _ in range(5)] == [None] * 5
    assert [admission.admit("127.0.0.1") for _ in range(2)] == [None, replies.TOO_MANY_FROM_HERE]


def test_what_was_let_go_is_forgotten() -> None:
    admission = Admission(AdmissionSettings(), Clock())
    for number in range(1000):
        network = f"192.0.{number // 250}.{number % 250}"
        admission.admit(network)
        admission.release(network)
    assert admission.total == 0
    assert admission._of_network == {}


def test_wrong_passwords_are_counted_over_connections() -> None:
    clock = Clock()
    throttle = AuthThrottle(AdmissionSettings(auth_failures=3, auth_window=600), clock)
    for _ in range(3):
        assert not throttle.is_blocked("192.0.2.1")
        throttle.failed("192.0.2.1")
    assert throttle.is_blocked("192.0.2.1")
    assert not throttle.is_blocked("192.0.2.2")
    clock.now += 1300
    assert not throttle.is_blocked("192.0.2.1")


def test_a_right_password_forgives() -> None:
    throttle = AuthThrottle(AdmissionSettings(auth_failures=1), Clock())
    throttle.failed("192.0.2.1")
    throttle.succeeded("192.0.2.1")
    assert not throttle.is_blocked("192.0.2.1")


def test_the_three_clocks() -> None:
    limits = LimitSettings(command_timeout=10, data_timeout=100, session_timeout=1000)
    clocks = Deadlines(limits, 0)
    assert (clocks.next_at, clocks.expired(9), clocks.expired(10)) == (10, None, replies.IDLE_TIMEOUT)
    clocks.arm_idle(5, 1)
    assert clocks.next_at == 15
    clocks.arm_idle(8, 1)  # no new command
    assert clocks.next_at == 15
    clocks.begin_data(20)
    assert (clocks.next_at, clocks.expired(120)) == (120, replies.DATA_TIMEOUT)
    clocks.shorten_data(200)
    assert clocks.next_at == 120
    clocks.shorten_data(50)
    assert clocks.next_at == 50
    clocks.end_data(40)
    assert clocks.next_at == 50
    clocks.begin_data(950)
    assert (clocks.next_at, clocks.expired(1000)) == (1000, replies.SESSION_TIMEOUT)


class Watched:
    """A connection as the sweeper sees it."""

    def __init__(self, command_timeout: float) -> None:
        self.deadlines = Deadlines(LimitSettings(command_timeout=command_timeout), trio.current_time())
        self.ended: list[tuple[float, Reply]] = []

    def expire(self, last_words: Reply) -> None:
        self.ended.append((trio.current_time(), last_words))


async def test_the_sweeper_ends_those_whose_clock_ran_out(autojump_clock: trio.testing.MockClock) -> None:
    sweeper = Sweeper(4)
    started = trio.current_time()
    first, second, gone = Watched(5), Watched(50), Watched(5)
    for watched in (first, second, gone):
        sweeper.add(watched)
    sweeper.remove(gone)
    with trio.move_on_after(20):
        await sweeper.run()
    assert 5 <= first.ended[0][0] - started <= 6.5
    assert second.ended == gone.ended == []
