"""Policies of MTA-STS: the syntax, when they are fetched, and how long they last."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import trio

from penstock.dns import ResolveError
from penstock.journal import Journal, JournalSettings
from penstock.relay.https import FetchError
from penstock.relay.mtasts import StsPolicies, parse_policy, record_id
from tests.dns.lying import Lying, resolving, zone_of
from tests.relay.outbound import policy, until

NOW = 1_700_000_000.0
NAME = "_mta-sts.example.org", "TXT"


@pytest.mark.parametrize(
    ("records", "ident"),
    [
        ([b"v=STSv1; id=20160831085700Z;"], "20160831085700Z"),
        ([b"v=STSv1;id=1"], "1"),
        ([b"v=STSv1; id=1; more=x"], "1"),
        ([b"v=spf1 -all", b"v=STSv1; id=1;"], "1"),
        ([b"v=STSv1; id=1", b"v=STSv1; id=2"], None),
        ([b"v=STSv2; id=1"], None),
        ([b"v=STSv1; id=a-b"], None),
        ([b"v=STSv1; id=" + b"1" * 33], None),
        ([b"v=STSv1"], None),
        ([], None),
    ],
)
def test_one_record_has_the_id(records: list[bytes], ident: str | None) -> None:
    assert record_id(records) == ident


def test_a_policy_is_read() -> None:
    text = (
        b"version: STSv1\nmode:testing\nmx: Mail.Example.ORG\nmx : *.example.net\nmode: none\nnew_1: x\nmax_age: 60\n"
    )
    found = parse_policy("example.org", "1", text, NOW)
    assert (found.mode, found.mx, found.max_age) == ("testing", ("mail.example.org", "*.example.net"), 60)
    assert parse_policy("example.org", "1", policy(mode="none", max_age=99_999_999), NOW).max_age == 31_557_600


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (b"mode: none\nmax_age: 1", "version"),
        (b"version: STSv2\nmode: none\nmax_age: 1", "version"),
        (b"version: STSv1\nmode: strict\nmax_age: 1", "mode"),
        (b"version: STSv1\nmode: none\nmax_age: -1", "max_age"),
        (b"version: STSv1\nmode: none", "max_age"),
        (b"version: STSv1\nmode: enforce\nmax_age: 1", "mx"),
        (b"version: STSv1\nmode: enforce\nmax_age: 1\nmx: a b", "mx"),
        (b"version: STSv1\nmode: enforce\nmax_age: 1\nmx: mx.*.example.org", "mx"),
        (b"version: STSv1\nmode: enforce\nmax_age: 1\n" + b"mx: a.example\n" * 257, "mx"),
        (b"<html>", "not a field"),
        (b"version: STSv1\xff", "utf-8"),
    ],
)
def test_a_policy_that_breaks_the_rules_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        parse_policy("example.org", "1", text, NOW)


def test_a_wildcard_stands_for_one_label() -> None:
    found = parse_policy("example.org", "1", policy("mx.example.org", "*.example.net"), NOW)
    hosts = ["mx.example.org", "a.example.net", "a.b.example.net", "example.net", "mx2.example.org", "net"]
    assert [host for host in hosts if found.allows(host)] == ["mx.example.org", "a.example.net"]


@dataclass
class World:
    """A domain whose policy changes."""

    policies: StsPolicies
    dns: Lying
    now: float = NOW
    answers: list[bytes | FetchError] = field(default_factory=list)
    fetched: int = 0
    stalled: dict[str, trio.Event] = field(default_factory=dict)
    """Domains whose server does not answer before the event."""
    failures: list[str] = field(default_factory=list)

    async def mode(self) -> str | None:
        found = await self.policies.find("example.org")
        return None if found is None else found.mode

    def record(self, ident: str | None) -> None:
        """Change the record in the DNS, whose answers are not cached any more."""
        self.dns.zone.records[NAME] = [] if ident is None else [f'"v=STSv1; id={ident}"']
        self.policies._resolver._cache.clear()


@asynccontextmanager
async def world(folder: Path, *answers: bytes | FetchError) -> AsyncIterator[World]:
    dns = Lying(zone_of('_mta-sts.example.org TXT "v=STSv1; id=1"'))

    async def fetch(domain: str) -> bytes:
        await trio.lowlevel.checkpoint()
        made.fetched += 1
        if domain in made.stalled:
            await made.stalled[domain].wait()
        answer = made.answers.pop(0) if made.answers else FetchError("no answer")
        if isinstance(answer, FetchError):
            raise answer
        return answer

    def note(domain: str, kind: str, cause: str) -> None:
        made.failures.append(kind)

    async with trio.open_nursery() as nursery, resolving(dns) as resolver:
        journal = Journal(JournalSettings())
        policies = StsPolicies(resolver, fetch, folder / "sts", journal, clock=lambda: made.now, on_failure=note)
        made = World(policies, dns, answers=list(answers))
        await nursery.start(policies.run)
        yield made
        nursery.cancel_scope.cancel()


async def test_a_policy_is_fetched_when_its_id_changes(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mx.example.org"), policy(mode="none")) as it:
        assert [await it.mode(), await it.mode()] == ["enforce", "enforce"]
        assert it.fetched == 1
        it.record("2")
        assert [await it.mode(), it.fetched] == ["none", 2]


async def test_a_policy_in_force_is_used_without_its_record(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mx.example.org", max_age=1000)) as it:
        await it.mode()
    async with world(tmp_path) as it:  # a restart
        it.record(None)
        it.now += 999
        assert [await it.mode(), it.fetched] == ["enforce", 0]
        it.dns.zone.failures[NAME[0]] = "SERVFAIL"
        it.policies._resolver._cache.clear()
        assert await it.mode() == "enforce"
        it.now += 1
        assert await it.mode() is None


async def test_a_policy_in_force_outlives_failed_fetches(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mx.example.org"), FetchError("404"), b"<html>") as it:
        await it.mode()
        it.record("2")
        assert [await it.mode(), await it.mode(), it.fetched] == ["enforce", "enforce", 2]
        it.now += 301
        assert [await it.mode(), it.fetched] == ["enforce", 3]
    assert it.failures == ["sts-policy-fetch-error", "sts-policy-invalid"]


async def test_a_failed_fetch_is_not_repeated_at_once(tmp_path: Path) -> None:
    certificate = FetchError("bad certificate", is_certificate=True)
    async with world(tmp_path, certificate, policy("mx.example.org")) as it:
        assert [await it.mode(), await it.mode(), it.fetched] == [None, None, 1]
        it.now += 300
        assert [await it.mode(), it.fetched] == ["enforce", 2]
    assert it.failures == ["sts-webpki-invalid"]


async def test_a_policy_in_use_is_renewed_before_it_expires(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mx.example.org", max_age=1000), policy("mx2.example.org")) as it:
        await it.mode()
        it.now += 500
        found = await it.policies.find("example.org")
    assert found is not None
    assert found.mx == ("mx2.example.org",)


async def test_a_policy_of_the_future_is_renewed(tmp_path: Path) -> None:
    """The clock was set back."""
    async with world(tmp_path, policy("mx.example.org"), policy("mx2.example.org")) as it:
        await it.mode()
        it.now -= 30 * 24 * 3600
        assert [await it.mode(), await it.mode(), it.fetched] == ["enforce", "enforce", 2]


async def test_tasks_that_want_the_same_policy_share_a_fetch(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mx.example.org")) as it:
        async with trio.open_nursery() as nursery:
            for _ in range(10):
                nursery.start_soon(it.mode)
        assert it.fetched == 1


async def test_slow_servers_make_few_others_wait_for_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.relay.mtasts._MAX_FETCHES", 1)
    monkeypatch.setattr("penstock.relay.mtasts._MAX_WAITING", 1)
    found: list[str | None] = []
    async with world(tmp_path, FetchError("too slow"), policy("mx.example.org")) as it:
        for domain in ("slow.example", "third.example"):
            it.dns.zone.records[f"_mta-sts.{domain}", "TXT"] = ['"v=STSv1; id=1"']
        it.stalled["slow.example"] = trio.Event()

        async def wanted() -> None:
            found.append(await it.mode())

        async with trio.open_nursery() as nursery:
            nursery.start_soon(it.policies.find, "slow.example")
            await until(lambda: it.fetched == 1)
            nursery.start_soon(wanted)
            await until(lambda: it.policies._fetching.statistics().tasks_waiting == 1)
            with pytest.raises(ResolveError) as error:
                await it.policies.find("third.example")
            assert not error.value.is_permanent
            assert (it.fetched, found) == (1, []), "one waits for its turn, the next one is deferred"
            it.stalled["slow.example"].set()
    assert found == ["enforce"]


async def test_mail_does_not_wait_for_another_version_of_a_policy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("penstock.relay.mtasts._PATIENCE", 0.0)
    async with world(tmp_path, policy("mx.example.org"), policy(mode="none")) as it:
        await it.mode()
        it.record("2")
        it.stalled["example.org"] = trio.Event()
        assert [await it.mode(), await it.mode()] == ["enforce", "enforce"]
        renewed = it.policies._renewing["example.org"]
        it.stalled["example.org"].set()
        await renewed.wait()
        assert [await it.mode(), it.fetched] == ["none", 2]


async def test_a_mistake_in_the_background_ends_no_relay(tmp_path: Path) -> None:
    async with world(tmp_path, policy("mx.example.org")) as it:
        await it.mode()
        it.record("2")
        it.policies._fetch = broken
        assert [await it.mode(), await it.mode()] == ["enforce", "enforce"]
        assert it.policies._renewing == {}
        assert it.policies._journal.drain().count(b"no such attribute") == 1, "there is a pause"


async def broken(domain: str) -> bytes:
    raise AttributeError(f"no such attribute: {domain}")


async def test_the_folder_is_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("penstock.relay.mtasts._MAX_FILES", 1)
    (tmp_path / "sts").mkdir()
    (tmp_path / "sts" / "damaged.json").write_bytes(b"{")
    async with world(tmp_path, policy("mx.example.org", max_age=1000)) as it:
        await it.mode()
        (kept,) = (tmp_path / "sts").iterdir()
        it.policies._write(parse_policy("example.org", "2", policy("mx.example.org"), NOW))
        with pytest.raises(OSError, match="has 1 policies already"):
            it.policies._write(parse_policy("example.com", "1", policy("mx.example.com"), NOW))
    kept.write_bytes(b"[]")
    async with world(tmp_path, policy("mx.example.org")) as it:
        assert [await it.mode(), it.fetched] == ["enforce", 1]
