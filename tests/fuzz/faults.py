"""Fuzz the sink with random fault plans and random dialogs.

    python -m tests.fuzz.faults [seconds]

runs for 20 seconds by default; tests/fuzz/test_faults.py is a short form in the suite. A failure prints the seed, and
`python -m tests.fuzz.faults --seed N` repeats it.

For every plan and every input:

1. Nothing raises, and the conversation ends.
2. The same plan, seed and input get the same replies.
3. The statistics count the octets that the client received.
4. The statistics count each delivered message, as accepted or as unheard.
5. The client was sent a readable 2xx reply for each message that is counted as accepted.
6. The statistics have a latency for each reply.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, get_args

import trio
from trio.testing import MockClock

from penstock.journal import Journal, JournalSettings
from penstock.metrics._session import PHASES, Metrics
from penstock.sink.plan import PHASES as PLANNED
from penstock.sink.plan import Corruption, PlanError, parse_plan
from tests.helpers import Recorder
from tests.sink.playing import talking

LINES = [
    "EHLO c.example", "HELO c.example", "LHLO c.example", "MAIL FROM:<a@x.example>", "MAIL FROM:<seq-r-7@x.example>",
    "MAIL FROM:<> SIZE=5000", "RCPT TO:<b@y.example>", "RCPT TO:<450@y.example>", "RCPT TO:<dot-552-5.2.2@y.example>",
    "RCPT TO:<body-delay-2s@y.example>", "RCPT TO:<dot-drop@y.example>", "RCPT TO:<slow-2000@y.example>", "DATA",
    "Subject: x", "", "text", "x" * 300, "..", ".", "RSET", "NOOP", "VRFY x", "EXPN x", "HELP", "BDAT 4\r\nabcd",
    "BDAT 4 LAST\r\nabc.", "BDAT 0 LAST", "BDAT 700 LAST\r\n" + "y" * 700, "QUIT", "rubbish", "AUTH PLAIN AGEAYg==",
]  # fmt: skip
TRANSACTION = [LINES[0], LINES[3], LINES[6], "DATA", "Subject: x\r\n\r\ntext", "."]
REPLIES = ["450 4.2.1 Busy", "550", "421 4.3.2 Later", "250 2.0.0 Fine", "354 Go on", "220 Hello", "552 5.3.4 Too big"]
CORRUPTIONS = get_args(Corruption)
_ID = re.compile(rb"kept as [0-9A-Z]+")
CONDITIONS = [
    "probability = 0.5", "every = 2", "attempts = 1", "first = 1", "after = 1", 'sender = ["seq-*"]',
    'recipient = ["b@*"]', "since = 1", "until = 5",
]  # fmt: skip


def rule_of(rng: random.Random, number: int) -> str:
    """Return a random rule, which may be invalid."""
    phase = rng.choice(PLANNED)
    lines = ["[[rule]]", f'name = "r{number}"', f'phase = "{phase}"']
    if phase == "body":
        lines.append(f"at = {rng.choice([0, 1, 5, 200])}")
    for chance, does in (
        (0.4, f'reply = "{rng.choice(REPLIES)}"'),
        (0.25, f'dress = "{rng.choice(CORRUPTIONS)}"'),
        (0.25, f'end = "{rng.choice(["drop", "half-close", "stall", "reset"])}"'),
        (0.4, f"delay.seconds = {rng.choice([0.5, 3])}"),
        (0.1, "read_rate = 1000"),
        (0.1, "write_rate = 2000"),
        (0.1, "split = true"),
        (0.2, "keeps = true"),
        (0.3, f"match = {{ {rng.choice(CONDITIONS)} }}"),
    ):
        if rng.random() < chance:
            lines.append(does)
    return "\n".join(lines) + "\n"


def plan_of(rng: random.Random) -> str:
    """Return a random plan of valid rules."""
    plan = f"seed = {rng.randrange(100)}\nlongest_stall = 30\n"
    for number in range(rng.randint(1, 5)):
        rule = rule_of(rng, number)
        try:
            parse_plan(plan + rule)
        except PlanError:
            continue
        plan += rule
    return plan


def dialog_of(rng: random.Random) -> list[bytes]:
    """Return what a client sends, split into segments."""
    lines: list[str] = []
    while len(lines) < 25:
        lines += TRANSACTION if rng.random() < 0.4 else [rng.choice(LINES)]
    lines.append("QUIT")
    sent: list[bytes] = []
    while lines:
        step = rng.choice([1, 1, 2, 5, 30])
        sent.append("".join(f"{line}\r\n" for line in lines[:step]).encode())
        lines = lines[step:]
    return sent


class Errors(Journal):
    """A journal that collects errors."""

    def __init__(self) -> None:
        super().__init__(JournalSettings())
        self.raised: list[BaseException] = []

    def error(self, session: int, where: str, exc: BaseException, *args: Any) -> None:
        """Collect the exception."""
        self.raised.append(exc)


class Outcome:
    """The result of a conversation."""

    def __init__(self) -> None:
        self.received = b""
        self.metrics = Metrics()
        self.recorder = Recorder()
        self.journal = Errors()
        self.recorder.delivered = []


async def converse(folder: Path, plan: str, dialog: list[bytes], *, is_lmtp: bool) -> Outcome:
    """Run a dialog against a plan, on a virtual clock."""
    outcome = Outcome()
    settings = {"kind": "lmtp"} if is_lmtp else {}
    async with (
        talking(
            folder,
            plan,
            metrics=outcome.metrics,
            recorder=outcome.recorder,
            journal=outcome.journal,
            settings=settings,
            has_magic=True,
            greeted=False,
        ) as talk,
        trio.open_nursery() as nursery,
    ):

        async def listen() -> None:
            async for data in talk.stream:
                outcome.received += data

        nursery.start_soon(listen)
        try:
            for piece in dialog:
                await talk.stream.send_all(piece)
                await trio.sleep(0.25)
            assert isinstance(talk.stream, trio.abc.HalfCloseableStream)
            await talk.stream.send_eof()
        except (trio.BrokenResourceError, trio.ClosedResourceError):
            pass
        await trio.sleep(200)
        nursery.cancel_scope.cancel()
    return outcome


def one(seed: int, folder: Path) -> None:
    """Run the plan and the dialog of a seed and check the invariants."""
    rng = random.Random(seed)
    plan, dialog, is_lmtp = plan_of(rng), dialog_of(rng), rng.random() < 0.3

    def play() -> Outcome:
        return trio.run(lambda: converse(folder, plan, dialog, is_lmtp=is_lmtp), clock=MockClock(autojump_threshold=0))

    outcome = play()
    metrics, received = outcome.metrics, outcome.received
    assert outcome.journal.raised == [], f"1. {outcome.journal.raised}"
    assert metrics.open_sessions == 0, "1. the conversation has not ended"
    assert _ID.sub(b"", play().received) == _ID.sub(b"", received), "2. other replies the second time"
    assert metrics.sent == len(received), f"3. {metrics.sent} octets counted, {len(received)} received"
    delivered, taken = len(outcome.recorder.delivered), metrics.accepted + metrics.unheard
    assert delivered == taken, f"4. {delivered} delivered, {metrics.accepted} accepted, {metrics.unheard} unheard"
    read = len(re.findall(rb"^2[0-9][0-9](?: [^\n]*)?\r?$", received, re.MULTILINE))
    assert metrics.accepted <= read, f"5. {metrics.accepted} accepted, {read} replies of 2xx"
    latencies = sum(metrics.latency(phase).count for phase in PHASES if phase not in {"text", "tls", "think"})
    assert metrics.replies == latencies, f"6. {metrics.replies} replies, {latencies} latencies"


def main() -> None:
    """Run for a while, or run one seed."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seconds", nargs="?", type=float, default=20.0)
    parser.add_argument("--seed", type=int)
    words = parser.parse_args()
    rounds, end = 0, time.monotonic() + words.seconds
    with tempfile.TemporaryDirectory() as folder:
        if words.seed is not None:
            one(words.seed, Path(folder))
            return
        seed = random.SystemRandom().randrange(1 << 40)
        while time.monotonic() < end:
            try:
                one(seed + rounds, Path(folder))
            except BaseException:
                print(f"seed {seed + rounds}", file=sys.stderr)
                raise
            rounds += 1
    print(f"{rounds} rounds from seed {seed}, every invariant held")


if __name__ == "__main__":
    main()
