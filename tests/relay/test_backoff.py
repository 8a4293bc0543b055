"""Retries: when, for how long, and how they are spread."""

from __future__ import annotations

import pytest

from penstock.relay.backoff import Backoff, RetrySettings

EXACT = Backoff(RetrySettings(jitter=0))
HOUR = 3600.0


def test_the_default_schedule_ends_after_five_days() -> None:
    now, waits = 0.0, []
    for attempts in range(1, 1000):
        if EXACT.is_expired(0.0, now):
            break
        upcoming = EXACT.next_try(7, attempts, 0.0, now, delay_told=True)
        waits.append(upcoming - now)
        now = upcoming
    assert waits[:8] == [60, 300, 900, 1800, HOUR, 2 * HOUR, 4 * HOUR, 4 * HOUR]
    assert now == 5 * 24 * HOUR
    assert 30 < len(waits) < 50


def test_messages_that_failed_together_are_spread() -> None:
    backoff = Backoff(RetrySettings(jitter=0.2))
    times = sorted(backoff.next_try(number, 5, 0.0, 1000.0) for number in range(10_000))
    assert 1000 + 0.9 * HOUR <= times[0] < 1000 + 0.91 * HOUR
    assert 1000 + 1.09 * HOUR < times[-1] <= 1000 + 1.1 * HOUR
    tenths = [sum(1 for t in times if int((t - 1000 - 0.9 * HOUR) / (0.02 * HOUR)) == n) for n in range(10)]
    assert all(900 < tenth < 1100 for tenth in tenths), tenths


def test_the_jitter_depends_on_message_and_attempt() -> None:
    backoff = Backoff(RetrySettings())
    assert backoff.next_try(1, 4, 0.0, 0.0) == backoff.next_try(1, 4, 0.0, 0.0)
    assert backoff.next_try(1, 6, 0.0, 0.0) != backoff.next_try(1, 7, 0.0, 0.0)


def test_the_last_try_is_at_the_expiry_and_never_in_the_past() -> None:
    assert EXACT.next_try(1, 20, queued_at=0.0, now=4.9 * 24 * HOUR) == 5 * 24 * HOUR
    assert EXACT.next_try(1, 20, queued_at=0.0, now=6 * 24 * HOUR) == 6 * 24 * HOUR


@pytest.mark.parametrize(("age", "is_late"), [(0, False), (4 * HOUR - 1, False), (4 * HOUR, True)])
def test_a_delay_is_notified_after_four_hours(age: float, is_late: bool) -> None:
    assert EXACT.is_late(100.0, 100.0 + age) is is_late


def test_a_notice_after_zero_seconds_is_never_sent() -> None:
    assert not Backoff(RetrySettings(delay_notice_after=0)).is_late(0.0, 1e9)


@pytest.mark.parametrize("jitter", [0.0, 0.9])
def test_the_next_try_is_not_later_than_the_notice(jitter: float) -> None:
    backoff = Backoff(RetrySettings(jitter=jitter))
    for number in range(100):
        assert backoff.next_try(number, 7, 0.0, 3.5 * HOUR) == 4 * HOUR
        assert backoff.next_try(number, 7, 0.0, 3.5 * HOUR, delay_told=True) > 5 * HOUR
        assert backoff.next_try(number, 7, 0.0, 4 * HOUR) > 5 * HOUR


def test_expiry_and_notices_can_be_put_off() -> None:
    backoff = Backoff(RetrySettings(jitter=0))
    now = 6 * 24 * HOUR
    backoff.put_off(now + HOUR)
    assert not backoff.is_expired(0.0, now)
    assert not backoff.is_late(0.0, now)
    assert backoff.next_try(1, 20, 0.0, now) == now + HOUR, "and not again and again until then"
    assert backoff.is_expired(0.0, now + HOUR)
    assert backoff.is_late(0.0, now + HOUR)


def test_no_wait_is_longer_than_the_longest() -> None:
    backoff = Backoff(RetrySettings(jitter=0.9, delay_notice_after=0))
    longest = max(backoff.next_try(number, 7, 0.0, 0.0) for number in range(10_000))
    assert 0.99 * backoff.longest_wait < longest <= backoff.longest_wait
