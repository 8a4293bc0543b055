"""The fault engine: conditions, and the same faults for the same seed and input."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest

from penstock import sequence
from penstock.reply import Reply
from penstock.sink.faults import Decision, FaultEngine, FaultLog, Occasion, seconds_of
from penstock.sink.magic import Magic
from penstock.sink.plan import DelaySettings, Phase, parse_plan


class Clock:
    """A clock that only moves when it is set."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def engine_of(plan: str, clock: Clock | None = None) -> FaultEngine:
    return FaultEngine(parse_plan(plan), clock=clock or Clock())


def rule(phase: Phase, does: str = 'reply = "450"', **tables: str) -> str:
    lines = [f"{name} = {{ {table} }}" for name, table in tables.items()]
    return "\n".join(["[[rule]]", f'phase = "{phase}"', does, *lines]) + "\n"


def mail(sender: str = "a@example.com", *recipients: str, phase: Phase = "dot", **further: Any) -> Occasion:
    return Occasion(phase, "192.0.2.1", sender=sender, recipients=recipients or ("b@example.org",), **further)


def is_hit(engine: FaultEngine, occasion: Occasion) -> bool:
    return engine.decide(occasion) is not None


# ---- matching


@pytest.mark.parametrize(
    ("match", "hit", "missed"),
    [
        ('network = ["192.0.2.0/24"]', mail(), Occasion("dot", "198.51.100.1", sender="a@b", recipients=("c@d",))),
        ('network = ["192.0.2.0/24"]', mail(), Occasion("dot", "", sender="a@b", recipients=("c@d",))),
        (
            'network = ["2001:db8::/32", "192.0.2.1"]',
            mail(),
            Occasion("dot", "2001:db9::1", sender="", recipients=("c@d",)),
        ),
        ('hello = ["*.example"]', mail(hello="mx.Example"), mail(hello="mx.example.org")),
        ('sender = ["*@EXAMPLE.com"]', mail(), mail("a@example.net")),
        ('sender = [""]', mail(""), mail()),
        ('recipient = ["c@*", "d@*"]', mail("a@b", "b@x", "d@x"), mail("a@b", "b@x")),
        ("tls = true", mail(is_tls=True), mail()),
        ("tls = false", mail(), mail(is_tls=True)),
        ("sequence = [5, 7]", mail("seq-r-7@x"), mail("seq-r-8@x")),
        ("sequence = [5, 7]", mail("seq-r-5@x"), mail("a@x")),
    ],
)
def test_a_rule_applies_if_its_match_holds(match: str, hit: Occasion, missed: Occasion) -> None:
    engine = engine_of(rule("dot", match=match))
    assert is_hit(engine, hit)
    assert not is_hit(engine, missed)
    assert not is_hit(engine, Occasion("mail", hit.address, sender=hit.sender))


def test_all_keys_of_a_match_must_hold() -> None:
    engine = engine_of(rule("dot", match='sender = ["a@*"], recipient = ["b@*"]'))
    assert is_hit(engine, mail("a@x", "b@x"))
    assert not is_hit(engine, mail("a@x", "c@x"))
    assert not is_hit(engine, mail("c@x", "b@x"))


def test_a_time_window_counts_from_the_first_decision() -> None:
    clock = Clock()
    engine = engine_of(rule("dot", match="since = 10, until = 20"), clock)
    hits = []
    for seconds in (0, 9.9, 10, 19.9, 20, 1000):
        clock.now = 1000 + seconds
        hits.append(is_hit(engine, mail()))
    assert hits == [False, False, True, True, False, False]


def test_an_outage_is_periodic() -> None:
    clock = Clock()
    engine = engine_of(rule("connect", 'end = "reset"', outage="down = 30, every = 300, begin = 60"), clock)
    down = []
    for seconds in range(0, 1000, 10):
        clock.now = 1000 + seconds
        if is_hit(engine, Occasion("connect", "192.0.2.1")):
            down.append(seconds)
    assert down == [60, 70, 80, 360, 370, 380, 660, 670, 680, 960, 970, 980]


def test_first_and_after_depend_on_arrival() -> None:
    engine = engine_of(rule("dot", match='after = 2, first = 3, sender = ["a@*"]'))
    assert [is_hit(engine, mail(f"a@{number}")) for number in range(8)] == [False] * 2 + [True] * 3 + [False] * 3
    engine.reset()
    assert [is_hit(engine, mail(f"c@{number}")) for number in range(8)] == [False] * 8
    assert [is_hit(engine, mail("a@x")) for _ in range(4)] == [False, False, True, True]


def test_attempts_are_those_of_the_same_message() -> None:
    engine = engine_of(rule("dot", match="attempts = 2"))
    assert [is_hit(engine, mail()) for _ in range(4)] == [True, True, False, False]
    assert is_hit(engine, mail("a@example.com", "another@example.org"))


def test_after_a_rule_without_verdict_the_next_is_evaluated() -> None:
    plan = (
        rule("dot", "delay = { seconds = 1 }\nread_rate = 5")
        + rule("dot", "read_rate = 7")
        + rule("dot", "split = true\nreply = '550'")
    )
    decision = engine_of(plan + rule("dot", "reply = '451'")).decide(mail())
    assert decision == Decision(
        delay=1, read_rate=7, split=True, reply=Reply(550, "5.0.0", "Mailbox unavailable"), has_verdict=True
    )


# ---- conditions with state


@pytest.mark.parametrize(
    ("per", "same", "other"),
    [
        (
            "address",
            mail("x@y", "z@w"),
            Occasion("dot", "192.0.2.2", sender="a@example.com", recipients=("b@example.org",)),
        ),
        ("sender", mail("A@example.com", "z@w"), mail("c@example.com")),
        ("sender-domain", mail("c@EXAMPLE.com", "z@w"), mail("a@example.net")),
        ("recipient", mail("x@y", "b@example.ORG"), mail("a@example.com", "c@example.org")),
        ("recipient-domain", mail("x@y", "z@example.org"), mail("a@example.com", "b@example.net")),
        ("everybody", mail("x@y", "z@w"), None),
    ],
)
def test_a_rate_is_a_token_bucket(per: str, same: Occasion, other: Occasion | None) -> None:
    clock = Clock()
    engine = engine_of(rule("dot", "", rate=f'per = "{per}", count = 2, seconds = 10, burst = 3'), clock)
    assert [is_hit(engine, mail()) for _ in range(4)] == [False, False, False, True]
    assert is_hit(engine, same)
    if other is not None:
        assert not is_hit(engine, other)
    clock.now += 5
    assert [is_hit(engine, mail()) for _ in range(2)] == [False, True]
    clock.now += 1000
    assert [is_hit(engine, mail()) for _ in range(4)] == [False, False, False, True]
    decision = engine.decide(mail())
    assert decision is not None
    assert decision.reply == Reply(421, "4.7.0", "Rate limit exceeded, please try again later", closes=True)


def test_a_greylist_accepts_a_triplet_after_the_wait() -> None:
    clock = Clock()
    engine = engine_of(rule("rcpt", "", greylist="wait = 60, forget = 1000"), clock)
    hits = []
    for seconds in (0, 59, 60, 500, 1001, 1062):
        clock.now = 1000 + seconds
        hits.append(is_hit(engine, mail(phase="rcpt")))
    assert hits == [True, True, False, False, True, False]
    assert is_hit(engine, mail("c@example.com", phase="rcpt"))
    assert is_hit(engine, mail("a@example.com", "c@example.org", phase="rcpt"))


def test_a_greylist_checks_every_recipient() -> None:
    clock = Clock()
    engine = engine_of(rule("dot", "", greylist="wait = 60"), clock)
    assert is_hit(engine, mail("a@x", "b@example.org", "c@example.org"))
    clock.now += 61
    assert not is_hit(engine, mail("a@x", "c@example.org"))
    assert is_hit(engine, mail("a@x", "b@example.org", "d@example.org"))


def test_a_magic_greylist_survives_a_new_plan() -> None:
    clock, magic = Clock(), Magic().rule("greylist-1s")
    assert magic is not None
    engine = engine_of("", clock)
    clock.now += 8
    assert engine.decide(mail(phase="rcpt"), [magic]) is not None
    engine.reset()
    clock.now += 2
    assert engine.decide(mail(phase="rcpt"), [magic]) is None


def test_a_rate_below_one_per_second_still_allows_one() -> None:
    clock = Clock()
    engine = engine_of(rule("dot", "", rate="count = 0.5, seconds = 1"), clock)
    hits = []
    for _ in range(5):
        hits.append(is_hit(engine, mail()))
        clock.now += 1
    assert hits == [False, True, False, True, False]


def test_a_mailbox_is_full_of_messages() -> None:
    engine = engine_of(rule("rcpt", 'reply = "552 5.2.2 Full"', mailbox="messages = 2"))
    for full in (False, False, True):
        assert is_hit(engine, mail("a@x", "b@example.org", phase="rcpt")) is full
        engine.taken(mail("a@x", "c@Example.org", "d@example.org"))
    assert not is_hit(engine, mail("a@x", "b@example.net", phase="rcpt"))


def test_a_mailbox_is_full_of_octets_at_the_dot() -> None:
    engine = engine_of(rule("dot", "", mailbox='octets = 100, per = "recipient"'))
    assert not is_hit(engine, mail(octets=60))
    engine.taken(mail(octets=60))
    assert is_hit(engine, mail(octets=41))
    assert not is_hit(engine, mail(octets=40))
    assert not is_hit(engine, mail("a@x", "c@example.org", octets=100))
    decision = engine.decide(mail(octets=1000))
    assert decision is not None
    assert decision.reply is not None
    assert decision.reply.code == 452


def test_remembered_state_is_bounded() -> None:
    engine = engine_of("remember = 10\n" + rule("dot", match="attempts = 1"))
    assert all(is_hit(engine, mail(f"{number}@x")) for number in range(100))
    assert len(engine._loaded.counters) == 10
    assert not is_hit(engine, mail("99@x"))
    assert is_hit(engine, mail("0@x"))  # forgotten


# ---- the seed


def marked(run: str, numbers: Iterable[int]) -> list[Occasion]:
    return [mail(f"{sequence.mark(run, number)}@load.invalid") for number in numbers]


def hits_of(engine: FaultEngine, occasions: Iterable[Occasion]) -> set[str]:
    return {str(each.sender) for each in occasions if is_hit(engine, each)}


@pytest.mark.parametrize("match", ["probability = 0.1", "every = 10"])
def test_the_order_of_arrival_changes_nothing(match: str) -> None:
    messages = marked("r", range(1, 3001))
    shuffled = list(messages)
    random.Random(4).shuffle(shuffled)
    plan = "seed = 5\n" + rule("dot", match=match)
    hits = hits_of(engine_of(plan), messages)
    assert hits == hits_of(engine_of(plan), shuffled)
    assert 240 <= len(hits) <= 360
    if match.startswith("every"):
        assert hits == {f"seq-r-{number}@load.invalid" for number in range(10, 3001, 10)}


def test_another_seed_is_another_set() -> None:
    messages = marked("r", range(1000))
    one, other = (
        hits_of(engine_of(f"seed = {seed}\n" + rule("dot", match="probability = 0.5")), messages) for seed in (1, 2)
    )
    assert one != other
    assert abs(len(one) - len(other)) < 150


def test_rules_draw_independently() -> None:
    plan = rule("dot", "delay = { seconds = 1 }", match="probability = 0.5") + rule("dot", match="probability = 0.5")
    engine = engine_of(plan)
    decisions = Counter(
        (decision.delay > 0, decision.reply is not None) if decision else None
        for decision in map(engine.decide, marked("r", range(4000)))
    )
    assert all(900 < count < 1100 for count in decisions.values())
    assert len(decisions) == 4


def test_another_run_of_the_same_messages_gets_the_same_faults() -> None:
    engine = engine_of(rule("dot", match="probability = 0.3"))
    first = {each.replace("-one-", "-") for each in hits_of(engine, marked("one", range(500)))}
    second = {each.replace("-two-", "-") for each in hits_of(engine, marked("two", range(500)))}
    assert first == second


def test_every_attempt_is_decided_separately() -> None:
    engine = engine_of(rule("dot", match="probability = 0.5"))
    messages = marked("r", range(1000))
    first, second = hits_of(engine, messages), hits_of(engine, messages)
    assert 180 < len(first & second) < 320


def test_equal_messages_are_hit_equally_often_in_any_order() -> None:
    plan = rule("dot", match="probability = 0.2")
    alike = [mail(f"{number % 3}@x") for number in range(3000)]
    shuffled = random.Random(1).sample(alike, len(alike))
    one, other = engine_of(plan), engine_of(plan)
    assert Counter(each.sender for each in alike if is_hit(one, each)) == Counter(
        each.sender for each in shuffled if is_hit(other, each)
    )


def test_every_nth_of_equal_messages_is_exact() -> None:
    engine = engine_of(rule("dot", match="every = 4"))
    hits = [is_hit(engine, mail()) for _ in range(40)]
    assert sum(hits) == 10
    assert hits[:4] * 10 == hits


def test_every_nth_connection_of_an_address_is_exact() -> None:
    engine = engine_of(rule("connect", 'end = "drop"', match="every = 3"))
    assert [is_hit(engine, Occasion("connect", "192.0.2.1")) for _ in range(6)] == [False, False, True] * 2
    assert [is_hit(engine, Occasion("connect", "192.0.2.2")) for _ in range(3)] == [False, False, True]


def test_a_client_is_recognized_by_its_ehlo_name() -> None:
    plan = rule("ehlo", match="probability = 0.5")
    clients = [Occasion("ehlo", "192.0.2.1", hello=f"client-{number}") for number in range(200)]
    one, other = engine_of(plan), engine_of(plan)
    assert {each.hello for each in clients if is_hit(one, each)} == {
        each.hello for each in reversed(clients) if is_hit(other, each)
    }


@pytest.mark.parametrize(
    ("identity", "occasion"),
    [
        ('where = "recipient"', lambda n: mail("a@x", f"list+seq-r-{n}@x")),
        ('where = "header"', lambda n: mail(header=f"seq-r-{n}")),
        ('where = "header"\nany_counter = true', lambda n: mail(header=f"<nightly-{n}>")),
        ("any_counter = true", lambda n: mail(f"bounces-{n}@x")),
    ],
)
def test_a_number_may_be_in_recipient_or_header(identity: str, occasion: Any) -> None:
    engine = engine_of(rule("dot", match="sequence = [3, 4], every = 2") + "[identity]\n" + identity)
    assert [n for n in range(1, 9) if is_hit(engine, occasion(n))] == [4]
    assert isinstance(engine.receipts, FaultLog)
    assert engine.receipts.last[0].sequence.endswith("-4")


def test_recipients_of_a_message_are_decided_separately() -> None:
    plan = rule("rcpt", match="probability = 0.5")
    hits = {
        recipient
        for recipient in (f"{number}@x" for number in range(100))
        if is_hit(engine_of(plan), mail("seq-r-1@x", recipient, phase="rcpt"))
    }
    assert 30 < len(hits) < 70


# ---- delays


@pytest.mark.parametrize(
    ("delay", "least", "median", "most"),
    [
        (DelaySettings(seconds=2), 2, 2, 2),
        (DelaySettings(uniform=(1, 3)), 1, 2, 3),
        (DelaySettings(exponential=1), 0, 0.693, 3600),
        (DelaySettings(percentiles=((50, 0.1), (90, 1.0), (100, 10.0))), 0.1, 0.1, 10),
        (DelaySettings(percentiles=((0, 0), (100, 10))), 0, 5, 10),
        (DelaySettings(seconds=1, odds=50), 1, 1, 3600),
        (DelaySettings(exponential=10, longest=4), 0, 4, 4),
    ],
)
def test_a_delay_is_drawn_from_its_distribution(delay: DelaySettings, least: float, median: float, most: float) -> None:
    rng = random.Random(3)
    seconds = sorted(seconds_of(delay, rng.getrandbits(64), rng.getrandbits(64)) for _ in range(4001))
    assert least <= seconds[0]
    assert seconds[-1] <= most
    assert abs(seconds[2000] - median) <= 0.1 * median


def test_odds_repeat_a_delay_geometrically() -> None:
    rng = random.Random(3)
    delay = DelaySettings(seconds=1, odds=75)
    casts = Counter(seconds_of(delay, 0, rng.getrandbits(64)) for _ in range(10_000))
    assert 2300 < casts[1] < 2700  # one of four delays is repeated
    assert 1700 < casts[2] < 2050


def test_the_last_percentile_limits_a_delay() -> None:
    delay = DelaySettings(percentiles=((50, 1), (90, 2)))
    assert seconds_of(delay, (1 << 64) - 1, 0) == 2
    assert seconds_of(delay, 0, 0) == 1
    assert seconds_of(delay, int(0.7 * (1 << 64)), 0) == pytest.approx(1.5)


def test_a_random_delay_is_repeatable() -> None:
    plan = rule("dot", "delay = { uniform = [0, 10] }")
    one, other = engine_of(plan), engine_of(plan)
    messages = marked("r", range(50))
    drawn = [one.decide(each) for each in messages]
    assert drawn == [other.decide(each) for each in reversed(messages)][::-1]
    assert len({decision.delay for decision in drawn if decision}) == 50


# ---- control


@pytest.mark.parametrize(
    ("phase", "reply", "count", "expected"),
    [
        ("RCTP", 450, 1, "unknown phase 'RCTP'; expected one of"),
        ("connect", 450, 1, "unknown phase 'connect'"),
        ("rcpt", 99, 1, "expected a reply such as"),
        ("rcpt", "450 5.1.1 No", 1, "expected an enhanced status code such as '4.1.1' for 450"),
        ("rcpt", 450, 0, "count must be between 1 and"),
    ],
)
def test_fail_next_reports_mistakes(phase: str, reply: int | str, count: int, expected: str) -> None:
    with pytest.raises(ValueError, match=expected):
        FaultEngine().fail_next(phase, reply, count)


def test_reset_restarts_the_plan() -> None:
    clock = Clock()
    engine = engine_of(rule("dot", match="attempts = 1, until = 10"), clock)
    assert is_hit(engine, mail())
    clock.now += 100
    assert not is_hit(engine, mail("c@x"))
    engine.fail_next("mail", 450)
    engine.reset()
    assert engine.pending() == {}
    assert is_hit(engine, mail())


def test_the_log_is_bounded() -> None:
    engine = engine_of(rule("dot"))
    for number in range(2000):
        engine.decide(mail(f"{number}@x"))
    log = engine.receipts
    assert isinstance(log, FaultLog)
    assert log.counts == {("dot-1", "dot", "reply 450 4.0.0"): 2000}
    assert len(log.last) == 1000
    log.clear()
    assert not log.counts


def test_unnamed_rules_are_named_by_phase_and_number() -> None:
    engine = engine_of(rule("mail") + rule("dot"))
    engine.decide(mail())
    assert isinstance(engine.receipts, FaultLog)
    assert engine.receipts.last[0].rule == "dot-2"
