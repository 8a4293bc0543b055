"""What is counted of other nodes: each event once for a server, whatever is exchanged when."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import pytest

from penstock.auth.throttle import AuthThrottle
from penstock.cluster.exchange import Exchange, Failures, _decode_failures
from penstock.cluster.jetstream import JetStream, Stored
from penstock.cluster.node import Node
from penstock.cluster.settings import JetStreamSettings
from penstock.cluster.setup import make_client, make_layout
from penstock.cluster.state import SharedState
from penstock.journal import Journal, JournalSettings
from penstock.metrics._shared import SharedTable
from penstock.metrics.segment import private_segment
from penstock.server.limits import AdmissionSettings
from penstock.spool.spool import Spool, SpoolSettings
from penstock.state import Charge, Learned
from penstock.state.local import LocalState
from penstock.state.tables import Tables

HOUR = 3600 * 10**9
NETWORK = "192.0.2.1"
SETTINGS = JetStreamSettings(servers=("nats://127.0.0.1:1",), monitors=("http://127.0.0.1:1",), node="g1")


class Machine:
    """An exchange and what it counts; `hear` brings what another one has to say, as the bucket does."""

    def __init__(self, folder: Path, name: str) -> None:
        client = make_client(SETTINGS, folder)
        self.exchange = Exchange(
            JetStream(client), make_layout(SETTINGS), node=name, machine=name, report=_fail, clock=lambda: self.now
        )
        self.now = 1e9
        self.entries: dict[str, bytes] = {}
        """What the bucket has of this machine."""
        self.throttle = AuthThrottle(AdmissionSettings(auth_failures=3, auth_window=600))
        self.throttle.on_change = self.exchange.note_failures
        self.exchange.on_failures = self.throttle.learn

    def hear(self, other: Machine) -> None:
        """Exchange once."""
        self.now += 1
        other.now += 1
        for subject, (value, _) in other.exchange._changed.items():
            other.entries[subject] = value
            self.exchange._count(subject, _decode_failures(value))
        other.exchange._changed.clear()

    def failures_left(self, network: str, name: str) -> int:
        """Return how many more failures a client may have."""
        attempts = []
        while (attempt := self.throttle.begin(network)) is not None and attempt.claim(name):
            attempts.append(attempt)
        for attempt in attempts:
            attempt.withdrawn()
        return len(attempts)

    def fail(self, network: str, name: str, count: int = 1) -> None:
        """Fail to authenticate."""
        for _ in range(count):
            attempt = self.throttle.begin(network)
            assert attempt is not None
            assert attempt.claim(name)


def _fail(exc: Exception) -> None:
    raise exc


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Machine, Machine]]:
    yield Machine(tmp_path, "a"), Machine(tmp_path, "b")


@pytest.mark.parametrize("ends", ["succeeded", "withdrawn"])
def test_an_attempt_taken_back_counts_at_no_node(machines: tuple[Machine, Machine], ends: str) -> None:
    here, there = machines
    for _ in range(5):
        attempt = here.throttle.begin(NETWORK)
        assert attempt is not None
        assert attempt.claim("alice")
        there.hear(here)  # while the password is verified
        getattr(attempt, ends)()
        there.hear(here)
    assert there.failures_left(NETWORK, "bob") == 3
    assert there.failures_left("192.0.2.2", "alice") == 3


def test_a_withdrawn_attempt_forgets_no_failures_elsewhere(machines: tuple[Machine, Machine]) -> None:
    here, there = machines
    there.fail("192.0.2.7", "alice", 2)
    attempt = here.throttle.begin(NETWORK)
    assert attempt is not None
    assert attempt.claim("alice")
    there.hear(here)
    attempt.withdrawn()
    there.hear(here)
    assert there.failures_left("192.0.2.2", "alice") == 1


def test_a_success_forgets_the_failures_of_its_name_everywhere(machines: tuple[Machine, Machine]) -> None:
    here, there = machines
    there.fail("192.0.2.7", "alice", 2)
    here.fail(NETWORK, "alice")
    there.hear(here)
    assert there.failures_left("192.0.2.2", "alice") == 0
    here.throttle.forget("alice")
    here.fail("192.0.2.3", "alice")  # before it hears of the others
    there.hear(here)
    assert there.failures_left("192.0.2.2", "alice") == 2
    assert there.failures_left("192.0.2.7", "bob") == 1, "those of the network stay"


def test_what_others_give_back_does_not_raise_a_limit(tmp_path: Path) -> None:
    inner = LocalState(tmp_path / "state.db", pytest.fail)
    exchange = Machine(tmp_path, "a").exchange
    SharedState(inner, exchange)
    charge = Charge("a", HOUR, 4, 4)
    assert inner.take([charge]) < 0
    exchange.on_rates([charge._replace(cost=-4)])
    assert inner.available([charge._replace(cost=1)]) == 0


def test_charges_that_no_limit_has_are_ignored(tmp_path: Path) -> None:
    told: list[Charge] = []

    class Noting(LocalState):
        def note(self, charges: Sequence[Charge]) -> None:
            told.extend(charges)
            super().note(charges)

    exchange = Machine(tmp_path, "a").exchange
    SharedState(Noting(tmp_path / "state.db", pytest.fail), exchange)
    good = Charge("a", HOUR, 4, 1)
    bad = [
        Charge("a", *numbers)
        for number in (0, -1, 1 << 63)
        for numbers in ((number, 4, 1), (HOUR, number, 1), (HOUR, 4, number))
    ]
    exchange.on_rates([*bad, good])
    assert told == [good]


def test_a_worker_that_starts_again_counts_others_once(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    here, there = machines
    there.fail(NETWORK, "alice", 2)
    here.hear(there)
    entries = dict(there.entries)
    again = Machine(tmp_path, "a")  # with the table that the worker before it has filled
    again.now = here.now
    again.throttle = here.throttle
    again.exchange.on_failures = here.throttle.learn
    for subject, value in entries.items():
        again.exchange._count(subject, _decode_failures(value))
    assert again.failures_left(NETWORK, "alice") == 1
    there.fail("192.0.2.9", "alice", 1)
    again.hear(there)
    assert again.failures_left("192.0.2.8", "alice") == 0
    assert again.failures_left(NETWORK, "bob") == 1


def test_a_worker_that_was_replaced_counts_others_once(machines: tuple[Machine, Machine], tmp_path: Path) -> None:
    here, there = machines
    segment = private_segment(3)

    def start() -> SharedTable:
        page = segment.page(segment.claim())
        page.start(os.getpid())
        return SharedTable(page)

    def throttle() -> AuthThrottle:
        return AuthThrottle(AdmissionSettings(auth_failures=4, auth_window=600), table=start())

    here.throttle = throttle()
    here.exchange.on_failures = here.throttle.learn
    there.fail(NETWORK, "alice", 2)
    here.hear(there)
    again = Machine(
        tmp_path, "a"
    )  # the first worker of the next configuration: it begins when the one before has ended
    again.now = here.now
    again.throttle = throttle()
    segment.free(0)
    again.exchange.on_failures = again.throttle.learn
    for subject, value in there.entries.items():
        again.exchange._count(subject, _decode_failures(value))
    assert again.failures_left(NETWORK, "alice") == 2
    start()  # the next worker that is replaced gets the page that has become free
    assert again.failures_left(NETWORK, "alice") == 2


def test_an_empty_count_read_first_lets_others_be_counted_once(
    machines: tuple[Machine, Machine], tmp_path: Path
) -> None:
    here, there = machines
    there.fail(NETWORK, "alice", 2)
    here.hear(there)
    again = Machine(tmp_path, "a")  # with the table that the worker before it has filled
    again.now = here.now
    again.throttle = here.throttle
    again.exchange.on_failures = here.throttle.learn
    for kind, key in ((ord("f"), NETWORK), (ord("u"), "alice")):  # of a node that has taken its attempt back
        again.exchange._count(f"f.c.{kind}", Failures("c", kind, key, 1.0, 0, 2e9))
    for subject, value in there.entries.items():
        again.exchange._count(subject, _decode_failures(value))
    assert again.failures_left("192.0.2.2", "alice") == 1
    assert again.failures_left(NETWORK, "bob") == 1


@pytest.mark.parametrize("wrong", [{"count": 1 << 63}, {"count": -5}, {"kind": ord("n")}, {"kind": 1 << 40}])
def test_impossible_counts_are_ignored(machines: tuple[Machine, Machine], wrong: dict[str, int]) -> None:
    here, _ = machines
    failures = Failures("b", ord("f"), NETWORK, 1.0, 1, 2e9)
    here.exchange._count("f.b.x", msgspec.structs.replace(failures, **wrong))
    assert here.failures_left(NETWORK, "alice") == 3


def test_impossible_entries_keep_no_others_away(machines: tuple[Machine, Machine]) -> None:
    here, _ = machines
    learned: list[Learned] = []
    answers: list[tuple[str, float]] = []
    here.exchange.on_greylist = learned.extend
    here.exchange.on_recipient = lambda key, seconds, _: answers.append((key, seconds))
    values = [
        b'["k",1,2000000000000000000,true]',
        b'["k",1,99999999999999999999,true]',
        b'["k",1',
        b"",
        b'["k",1,2000000000000000001,true]',
    ]
    batch = [Stored(f"$KV.x.g.{place}", place, _headers(value), b"") for place, value in enumerate(values, 1)]
    batch += [Stored("$KV.x.r.1", 9, _headers(b'["a",1e300,null]'), b""), Stored("$KV.x.r", 10, b"", b"")]
    here.exchange._take(batch)
    assert [each.expires for each in learned] == [2000000000000000000, 2000000000000000001]
    assert answers == [("a", 30 * 24 * 3600.0)]


def _headers(value: bytes) -> bytes:
    return b"NATS/1.0\r\nP-Value: %s\r\n\r\n" % value


def node_of(folder: Path, index: str) -> Node:
    journal = Journal(JournalSettings())
    spool = Spool(SpoolSettings(), folder / f"spool-{index}")
    return Node(SETTINGS, spool, data_dir=folder, index=index, version="1", journal=journal)


def test_one_worker_of_a_server_counts_what_others_have_found(tmp_path: Path) -> None:
    tables = Tables()
    throttle = AuthThrottle(AdmissionSettings(auth_failures=3, auth_window=600))
    throttle_of_worker = AuthThrottle(AdmissionSettings(auth_failures=3, auth_window=600))
    nodes = [node_of(tmp_path, index) for index in ("index", "index-1", "index-2")]
    for node in nodes:
        node.share(LocalState(tmp_path / "state.db", pytest.fail, tables=tables))  # as the supervisor has it
        node.share_failures(throttle, is_shared=True)
    for node in nodes:
        node.exchange.on_rates([Charge("a", HOUR, 3, 1)])
        node.exchange.on_failures(ord("f"), NETWORK, 1)
    assert tables.available([Charge("a", HOUR, 3, 2)]) < 0
    assert tables.available([Charge("a", HOUR, 3, 3)]) == 0
    assert sum(throttle.begin(NETWORK) is not None for _ in range(5)) == 2
    # Without a table of all workers, each worker counts for itself.
    nodes[1].share_failures(throttle_of_worker, is_shared=False)
    nodes[1].exchange.on_failures(ord("f"), NETWORK, 3)
    assert throttle_of_worker.begin(NETWORK) is None
