"""Limits: admission, wrong passwords, clocks."""

from __future__ import annotations

import trio
import trio.testing

from penstock import reply as replies
from penstock.reply import Reply
from penstock.server.deadlines import Deadlines, Sweeper
from penstock.server.limits import Admission, AdmissionSettings, LimitSettings
from penstock.transaction import Peer


class Clock:
    """A clock that is set by hand."""

    def __init__(self) -> None:
        self.now = 1_000_000.0

    def __call__(self) -> float:
        return self.now


def test_the_total_applies_to_all_networks() -> None:
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


def test_the_ipv6_loopback_is_exempt_and_not_its_network() -> None:
    admission = Admission(AdmissionSettings(per_network=1), Clock())
    assert [admission.admit(Peer("::1", 1).network) for _ in range(3)] == [None] * 3
    mapped = [Peer(f"::ffff:192.0.2.{number}", 1).network for number in (1, 2, 2)]
    assert mapped == ["192.0.2.1", "192.0.2.2", "192.0.2.2"]
    assert [admission.admit(network) for network in mapped] == [None, None, replies.TOO_MANY_FROM_HERE]


def test_what_was_let_go_is_forgotten() -> None:
    admission = Admission(AdmissionSettings(), Clock())
    for number in range(1000):
        network = f"192.0.{number // 250}.{number % 250}"
        admission.admit(network)
        admission.release(network)
    assert admission.total == 0
    assert admission._table.total == admission._table.opened(ord("n"), "192.0.2.1") == 0


def test_exempt_networks_may_be_written_as_ipv4_mapped() -> None:
    admission = Admission(AdmissionSettings(per_network=1, exempt=("::ffff:10.0.0.0/104",)), Clock())
    assert [admission.admit(Peer(address, 1).network) for address in ("10.1.2.3", "::ffff:10.1.2.3")] == [None] * 2


def test_the_idle_clock_starts_again_with_a_whole_command() -> None:
    clocks = Deadlines(LimitSettings(command_timeout=10), 0)
    assert clocks.expired(9, 0, 0, 0) is None
    assert clocks.expired(9.5, 1, 0, 0) is None
    assert clocks.expired(19, 1, 0, 0) is None
    assert clocks.expired(19.5, 1, 0, 0) == replies.IDLE_TIMEOUT


def test_a_text_is_cut_when_it_makes_no_progress() -> None:
    clocks = Deadlines(LimitSettings(command_timeout=10, data_timeout=100, data_rate=0), 0)
    assert clocks.expired(5, 4, 1, 10) is None
    assert clocks.expired(104, 4, 1, 10) is None  # the idle timeout does not count meanwhile
    assert clocks.expired(104.5, 4, 1, 11) is None  # progress: another hundred seconds
    assert clocks.expired(204, 4, 1, 11) is None
    assert clocks.expired(204.5, 4, 1, 11) == replies.DATA_TIMEOUT
    assert clocks.expired(205, 8, 0, 11) is None
    assert clocks.expired(215, 8, 0, 11) == replies.IDLE_TIMEOUT


def test_another_text_has_its_own_timeout() -> None:
    clocks = Deadlines(LimitSettings(data_timeout=100, data_rate=0), 0)
    assert clocks.expired(5, 4, 1, 10) is None
    assert clocks.expired(104, 8, 2, 10) is None
    assert clocks.expired(203, 8, 2, 10) is None
    assert clocks.expired(204, 8, 2, 10) == replies.DATA_TIMEOUT


def test_a_large_text_may_take_as_long_as_it_comes() -> None:
    clocks = Deadlines(LimitSettings(data_timeout=180, data_rate=100), 0)
    for second in range(0, 3000, 60):  # 25 MiB at 300 kbit/s take 700 s
        assert clocks.expired(second, 4, 1, second * 37_500) is None


def test_a_text_that_comes_too_slowly_is_cut() -> None:
    clocks = Deadlines(LimitSettings(data_timeout=100, data_rate=100), 0)
    assert clocks.expired(0, 4, 1, 1000) is None
    assert clocks.expired(100, 4, 1, 1001) is None
    assert clocks.expired(101, 4, 1, 1000 + 10_101) is None
    assert clocks.expired(150, 4, 1, 1000 + 14_999) == replies.DATA_TIMEOUT


def test_a_shortened_text_is_not_lengthened_again() -> None:
    clocks = Deadlines(LimitSettings(data_timeout=100), 0)
    assert clocks.expired(0, 1, 1, 1) is None
    clocks.shorten_data(50)
    assert clocks.expired(49, 1, 1, 1) is None
    assert clocks.expired(50, 1, 1, 1) == replies.DATA_TIMEOUT
    clocks.shorten_data(500)
    assert clocks.expired(101, 1, 1, 1) == replies.DATA_TIMEOUT


def test_the_session_timeout_is_never_armed_again() -> None:
    clocks = Deadlines(LimitSettings(session_timeout=1000), 0)
    assert clocks.expired(999, 99, 0, 0) is None
    assert clocks.expired(1000, 100, 0, 0) == replies.SESSION_TIMEOUT


def test_the_session_timeout_spares_a_text_that_makes_progress() -> None:
    clocks = Deadlines(LimitSettings(session_timeout=1000), 0)
    assert clocks.expired(999, 99, 9, 1) is None
    assert clocks.expired(1000, 99, 9, 100_000) is None
    assert clocks.expired(1001, 99, 0, 100_000) == replies.SESSION_TIMEOUT


class Watched:
    """A connection as the sweeper sees it."""

    def __init__(self) -> None:
        self.looked: list[float] = []

    def check_deadlines(self, now: float) -> None:
        self.looked.append(now)


async def test_the_sweeper_looks_at_all_it_was_given(autojump_clock: trio.testing.MockClock) -> None:
    sweeper = Sweeper(2)
    started = trio.current_time()
    some = [Watched() for _ in range(1200)]
    for watched in some:
        sweeper.watched.add(watched)
    sweeper.watched.discard(some[0])
    with trio.move_on_after(2.1):
        await sweeper.run()
    assert some[0].looked == []
    assert all([now - started for now in watched.looked] == [0.5, 1.0, 1.5, 2.0] for watched in some[1:])
