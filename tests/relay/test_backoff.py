"""Retries: when, how long, and how spread."""

from __future__ import annotations

import pytest

from penstock.relay.backoff import Backoff, RetrySettings

EXACT = Backoff(RetrySettings(jitter=0))
HOUR = 3600.0


def test_the_default_schedule_is_that_of_the_readme_and_ends_after_five_days() -> None:
    now, waits = 0.0, []
    for attempts in range(1, 1000):
        if EXACT.is_expired(0.0, now):
            break
        upcoming = EXACT.next_try(7, attempts, 0.0, now)
        waits.append(upcoming - now)
        now = upcoming
    assert waits[:8] == [60, 300, 900, 1800, HOUR, 2 * HOUR, 4 * HOUR, 4 * HOUR]
    assert now == 5 * 24 * HOUR
    assert 30 < len(waits) < 50


def test_a_mass_that_failed_together_comes_back_apart() -> None:
    backoff = Backoff(RetrySettings(jitter=0.2))
    times = sorted(backoff.next_try(number, 5, 0.0, 1000.0) for number in range(10_000))
    assert 1000 + 0.9 * HOUR <= times[0] < 1000 + 0.91 * HOUR
    assert 1000 + 1.09 * HOUR < times[-1] <= 1000 + 1.1 * HOUR
    tenths = [sum(1 for t in times if int((t - 1000 - 0.9 * HOUR) / (0.02 * HOUR)) == n) for n in range(10)]
    assert all(900 < tenth < 1100 for tenth in tenths), tenths


def test_the_same_question_has_the_same_answer_and_the_next_attempt_another() -> None:
    backoff = Backoff(RetrySettings())
    assert backoff.next_try(1, 9, 0.0, 0.0) == backoff.next_try(1, 9, 0.0, 0.0)
    assert backoff.next_try(1, 9, 0.0, 0.0) != backoff.next_try(1, 8, 0.0, 0.0)


def test_the_last_try_is_at_the_end_and_never_in_the_past() -> None:
    assert EXACT.next_try(1, 20, queued_at=0.0, now=4.9 * 24 * HOUR) == 5 * 24 * HOUR
    assert EXACT.next_try(1, 20, queued_at=0.0, now=6 * 24 * HOUR) == 6 * 24 * HOUR


@pytest.mark.parametrize(("age", "is_late"), [(0, False), (4 * HOUR - 1, False), (4 * HOUR, True)])
def test_the_sender_hears_of_a_delay_after_four_hours(age: float, is_late: bool) -> None:
    assert EXACT.is_late(100.0, 100.0 + age) is is_late


def test_a_delay_of_zero_means_no_notice() -> None:
    assert not Backoff(RetrySettings(delay_notice_after=0)).is_late(0.0, 1e9)
