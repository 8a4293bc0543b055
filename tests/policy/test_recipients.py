"""Recipients that are known at RCPT: from a file, and from the next hop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import trio
import trio.testing

from penstock.journal import Journal, JournalSettings
from penstock.message import Path as MailPath
from penstock.message import Recipient
from penstock.policy.recipients import (
    CANNOT_SAY,
    UNKNOWN,
    FileRecipients,
    NextHopRecipients,
    RecipientsError,
    RecipientSettings,
)
from penstock.reply import Reply
from penstock.transaction import Transaction
from tests.helpers import PEER

SOMEBODY = Transaction(PEER)


def recipient(text: str) -> Recipient:
    local, _, domain = text.rpartition("@")
    return Recipient(MailPath(text, local, domain.lower()))


def ours(domain: str) -> bool:
    return domain.endswith(".org")


async def ask(policy: FileRecipients | NextHopRecipients, address: str) -> Reply | None:
    answer: Any = policy.on_rcpt(SOMEBODY, recipient(address))
    found = await answer if inspect.isawaitable(answer) else answer
    assert found is None or isinstance(found, Reply)
    return found


# ---- a file

FILE = """# who there is
Bob@example.org   # a comment
@all.example.org
every.example.org

jörg@example.org
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "recipients"
    path.write_text(FILE)
    return path


def journal() -> Journal:
    return Journal(JournalSettings(format="human"))


@pytest.mark.parametrize(
    ("address", "is_known"),
    [
        ("bob@example.org", True),
        ("BOB@Example.ORG", True),
        ("eve@example.org", False),
        ("jörg@example.org", True),
        ("anybody@all.example.org", True),
        ("anybody@every.example.org", True),
        ("anybody@none.example.org", False),
        ("postmaster@none.example.org", True),
        ("Postmaster", True),
        ("anybody@elsewhere.com", True),  # not ours to know
    ],
)
async def test_recipients_in_the_file_are_known(file: Path, address: str, is_known: bool) -> None:
    policy = FileRecipients(file, ours, journal())
    assert await ask(policy, address) == (None if is_known else UNKNOWN)


async def test_a_file_that_changes_is_read_again(file: Path, mock_clock: trio.testing.MockClock) -> None:
    policy = FileRecipients(file, ours, journal())
    assert await ask(policy, "eve@example.org") == UNKNOWN
    file.write_text(FILE + "eve@example.org\n")
    assert await ask(policy, "eve@example.org") == UNKNOWN, "it is looked at once a second"
    mock_clock.jump(1.0)
    assert await ask(policy, "eve@example.org") is None


@pytest.mark.parametrize("text", [None, "bob at example.org\n", "\udcff", "bob@"])
async def test_a_file_that_becomes_useless_changes_nothing(
    file: Path, mock_clock: trio.testing.MockClock, text: str | None
) -> None:
    lines = journal()
    policy = FileRecipients(file, ours, lines)
    if text is None:
        file.unlink()
    else:
        file.write_bytes(text.encode("utf-8", "surrogateescape"))
    mock_clock.jump(1.0)
    assert await ask(policy, "bob@example.org") is None
    assert await ask(policy, "eve@example.org") == UNKNOWN
    assert lines.drain().count(b"read before remain") == 1


@pytest.mark.parametrize(
    ("text", "words"),
    [("a b.org", r"recipients:1: a line is"), ("\n@", "recipients:2"), ("x@", "recipients:1"), ("\udcff", "UTF-8")],
)
def test_a_useless_file_is_said_to_be(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "recipients"
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(RecipientsError, match=words):
        FileRecipients(path, ours, journal())
    with pytest.raises(FileNotFoundError):
        FileRecipients(tmp_path / "missing", ours, journal())


# ---- the next hop


class Hops:
    """Next hops that know bob."""

    def __init__(self, answer: Callable[[str], Reply | None] | None = None) -> None:
        self.asked: list[str] = []
        self.answer = answer or (lambda text: None if text.startswith("bob") else Reply(550, "5.1.1", "who?"))
        self.delay = 0.0

    async def ask(self, recipient: Recipient) -> Reply | None:
        self.asked.append(recipient.path.text)
        await trio.sleep(self.delay)
        return self.answer(recipient.path.text)


def policy_of(hops: Hops, **settings: Any) -> NextHopRecipients:
    return NextHopRecipients(RecipientSettings(verify="next-hop", **settings), hops, ours)


async def test_only_what_the_hop_does_not_know_is_refused(autojump_clock: trio.testing.MockClock) -> None:
    hops = Hops()
    policy = policy_of(hops)
    assert await ask(policy, "bob@example.org") is None
    refusal = await ask(policy, "eve@example.org")
    assert refusal == UNKNOWN
    assert refusal.cause == "who?"
    for address in ("postmaster@example.org", "Postmaster", "eve@elsewhere.com"):
        assert await ask(policy, address) is None
    assert hops.asked == ["bob@example.org", "eve@example.org"]


async def test_a_full_mailbox_is_452_and_is_asked_for_again(autojump_clock: trio.testing.MockClock) -> None:
    full = Reply(452, "4.2.2", "The mailbox is full")
    hops = Hops(lambda _: full)
    policy = policy_of(hops, breaker_failures=1)
    for _ in range(3):
        assert await ask(policy, "bob@example.org") == full
    assert len(hops.asked) == 3


async def test_answers_are_kept_for_a_while(autojump_clock: trio.testing.MockClock) -> None:
    hops = Hops()
    policy = policy_of(hops, positive_ttl=100, negative_ttl=10)
    for _ in range(3):
        assert await ask(policy, "bob@example.org") is None
        assert await ask(policy, "eve@example.org") == UNKNOWN
    assert len(hops.asked) == 2
    await trio.sleep(11)
    assert await ask(policy, "bob@example.org") is None
    assert await ask(policy, "eve@example.org") == UNKNOWN
    assert hops.asked[2:] == ["eve@example.org"]
    await trio.sleep(100)
    assert await ask(policy, "bob@example.org") is None
    assert len(hops.asked) == 4


async def test_there_are_only_so_many_answers(autojump_clock: trio.testing.MockClock) -> None:
    hops = Hops()
    policy = policy_of(hops, cache=2)
    for name in ("bob1", "bob2", "bob3", "bob3", "bob1"):
        assert await ask(policy, f"{name}@example.org") is None
    assert [text[:4] for text in hops.asked] == ["bob1", "bob2", "bob3", "bob1"]
    nothing = policy_of(hops, cache=0)
    for _ in range(2):
        assert await ask(nothing, "bob@example.org") is None
    assert len(hops.asked) == 6


@pytest.mark.parametrize("kind", ["4yz", "throws", "slow"])
async def test_an_unavailable_answer_is_451_and_not_cached(autojump_clock: trio.testing.MockClock, kind: str) -> None:
    def fail(_: str) -> Reply | None:
        if kind == "4yz":
            return Reply(451, "4.3.0", "later", cause="mx: 451 4.3.0 later")
        raise OSError("no DNS")

    hops = Hops(fail)
    hops.delay = 60.0 if kind == "slow" else 0.0
    policy = policy_of(hops, breaker_failures=3, breaker_pause=30)
    causes = {"4yz": "later", "throws": "no DNS", "slow": "no answer"}
    for _ in range(3):
        refusal = await ask(policy, "bob@example.org")
        assert refusal == CANNOT_SAY
        assert refusal is not None
        assert causes[kind] in refusal.cause
    assert len(hops.asked) == 3
    refusal = await ask(policy, "carol@example.org")  # the domain is left alone
    assert refusal is not None
    assert "unanswered" in refusal.cause
    assert len(hops.asked) == 3
    await trio.sleep(30)
    hops.answer, hops.delay = (lambda _: None), 0.0
    assert await ask(policy, "bob@example.org") is None
    assert await ask(policy, "carol@example.org") is None


async def test_a_question_is_asked_once_for_all_that_wait(autojump_clock: trio.testing.MockClock) -> None:
    hops = Hops()
    hops.delay = 5.0
    policy = policy_of(hops)
    answers: list[Reply | None] = []

    async def one() -> None:
        answers.append(await ask(policy, "eve@example.org"))

    async with trio.open_nursery() as nursery:
        for _ in range(10):
            nursery.start_soon(one)
    assert answers == [UNKNOWN] * 10
    assert len(hops.asked) == 1


async def test_a_cancelled_question_ends_the_wait_of_others(
    autojump_clock: trio.testing.MockClock,
) -> None:
    hops = Hops()
    hops.delay = 5.0
    policy = policy_of(hops)
    async with trio.open_nursery() as asker:
        asker.start_soon(ask, policy, "bob@example.org")
        await trio.testing.wait_all_tasks_blocked()
        async with trio.open_nursery() as nursery:

            @nursery.start_soon
            async def waiting() -> None:
                assert await ask(policy, "bob@example.org") == CANNOT_SAY

            await trio.testing.wait_all_tasks_blocked()
            asker.cancel_scope.cancel()
    assert await ask(policy, "bob@example.org") is None
