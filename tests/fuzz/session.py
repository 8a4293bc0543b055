"""Fuzz the server session from every state.

    python -m tests.fuzz.session [seconds]

runs for 20 seconds by default; tests/fuzz/test_session.py is a short form in the suite. A failure prints the seed and
the input, and `python -m tests.fuzz.session --seed N` repeats it.

For every input, from every state, however it is split:

1. Nothing raises, and every reply is a reply: lines of at most 512 octets, a code of three digits, CRLF.
2. The same octets in another split get the same replies and the same messages.
3. A message is delivered only after a CRLF.CRLF, or the octets of its last BDAT; never two for one.
4. A closed session stays closed and sends nothing more.
5. Commands that arrive together with STARTTLS are never executed.
6. Text is never executed: no octet of a BDAT, in any state, and no line between a 354 and the final dot.
7. A session that accepts on its own (`auto_accept`) replies and delivers like one whose driver accepts.
"""

from __future__ import annotations

import itertools
import os
import random
import re
import sys
import time
from dataclasses import dataclass, field

from penstock import reply as replies
from penstock.smtp._wire import Wire
from penstock.smtp.events import (
    CLOSED,
    NEED_DATA,
    Auth,
    AuthAborted,
    AuthResponse,
    BodyChunk,
    EndOfMessage,
    MessageAborted,
    Quit,
    StartTls,
    Verify,
)
from penstock.smtp.extensions import Extensions
from penstock.smtp.server import AUTO_ACCEPT_HELLO, AUTO_ACCEPT_MAIL, AUTO_ACCEPT_QUIT, AUTO_ACCEPT_RCPT, ServerSession
from penstock.transaction import Peer, TlsInfo, Transaction

REPLY_LINE = re.compile(rb"[2-5][0-9][0-9][ -][\x20-\x7e]{0,506}\r\n")
TLS = TlsInfo("TLSv1.3", "TLS_AES_256_GCM_SHA384", 256)

STATES: dict[str, bytes] = {
    "greeted": b"",
    "hello": b"EHLO client\r\n",
    "helo": b"HELO client\r\n",
    "mail": b"EHLO c\r\nMAIL FROM:<a@b>\r\n",
    "rcpt": b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n",
    "body": b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\n",
    "in a line": b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nsome text",
    "after a line": b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nDATA\r\nsome text\r\n",
    "chunks": b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 3\r\nx\r\n",
    "octets": b"EHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\nBDAT 30 LAST\r\n",
    "auth": b"EHLO c\r\nAUTH LOGIN\r\n",
}

WORDS = [
    b"EHLO c\r\n", b"HELO c\r\n", b"LHLO c\r\n", b"MAIL FROM:<a@b>\r\n", b"MAIL FROM:<> SIZE=99999\r\n",
    b"MAIL FROM:<x@y> BODY=BINARYMIME\r\n", b"RCPT TO:<c@d>\r\n", b"RCPT TO:<bad@d>\r\n", b"DATA\r\n", b"RSET\r\n",
    b"NOOP\r\n", b"VRFY x\r\n", b"EXPN x\r\n", b"HELP\r\n", b"HELP MAIL\r\n", b"QUIT\r\n", b"STARTTLS\r\n",
    b"AUTH PLAIN AGEAYg==\r\n", b"AUTH LOGIN\r\n", b"*\r\n", b"YQ==\r\n", b"BDAT 5\r\n", b"BDAT 5 LAST\r\n",
    b"BDAT 0 LAST\r\n", b"BDAT x\r\n", b"BDAT 99999 LAST\r\n", b"GET / HTTP/1.1\r\n", b".\r\n", b"\r\n.\r\n",
    b"\n.\n", b"\n.\r\n", b"\r.\r", b"\r\n.\r", b"..\r\n", b".", b"\r", b"\n", b"\r\n", b"\0", b" ", b"text\r\n",
    b"x" * 70, b"y" * 600 + b"\r\n", b"\xff\xfe", b"<>:@",
]  # fmt: skip


@dataclass
class Play:
    """The output and the messages of a session."""

    output: bytes = b""
    messages: list[tuple[int, bytes]] = field(default_factory=list)
    handshakes: int = 0
    closed: bool = False


class Driver:
    """Drives a session as a connection does: `bad` recipients are refused, every third AUTH step succeeds."""

    def __init__(self, *, is_lmtp: bool = False, is_patient: bool = False, auto_accept: int = 0) -> None:
        offer = Extensions(
            hostname="mx", is_lmtp=is_lmtp, max_size=3000, max_recipients=100, max_messages=0 if is_patient else 5,
            max_errors=1000 if is_patient else 12,
            starttls=True, mechanisms=("PLAIN", "LOGIN"), auth_without_tls=True, can_verify=True,
        )  # fmt: skip
        self.session = ServerSession(
            offer, Wire(text_line_limit=64, max_octets=3000), Transaction(Peer("192.0.2.1", 1)), auto_accept
        )
        self.play = Play()
        self.session.greet()
        self._body = b""
        self._steps = 0

    def feed(self, data: bytes) -> None:
        """Feed octets and answer every event."""
        session, play = self.session, self.play
        if play.closed:
            assert session.next_event() is CLOSED, "4. a closed session goes on"
            assert session.take_output() == b"", "4. a closed session sends"
            return
        session.receive(data)
        while True:
            event = session.next_event()
            if event is NEED_DATA:
                break
            if event is CLOSED:
                play.closed = True
                break
            self._answer(event)
        play.output += session.take_output()

    def _answer(self, event: object) -> None:
        session, play = self.session, self.play
        assert not (isinstance(event, Verify) and event.argument == "canary"), "6. text was executed"
        if isinstance(event, BodyChunk):
            self._body += event.data
        elif isinstance(event, MessageAborted):
            self._body = b""
        elif isinstance(event, EndOfMessage):
            recipients = len(session.transaction.recipients)
            assert recipients > 0
            assert event.size == len(self._body)
            play.messages.append((recipients, self._body))
            self._body = b""
            session.reply(replies.OK)
        elif isinstance(event, StartTls):
            self._body = b""
            session.reply(replies.GO_AHEAD_TLS)
            play.handshakes += 1
            session.tls_started(TLS)
        elif isinstance(event, Auth | AuthResponse):
            self._steps += 1
            if self._steps % 3 == 0:
                session.authenticated("a")
            elif self._steps % 3 == 1:
                session.challenge(b"Password:")
            else:
                session.reply(replies.AUTH_FAILED)
        elif not isinstance(event, AuthAborted | Quit):
            name = type(event).__name__
            if name == "Hello":
                self._body = b""
            session.reply(replies.RELAY_DENIED if "bad@" in repr(event) else _ACCEPTED.get(name, replies.OK))


_ACCEPTED = {"BeginData": replies.GO_AHEAD_DATA, "Mail": replies.SENDER_OK, "Rcpt": replies.RECIPIENT_OK}
_AUTO_ACCEPT = AUTO_ACCEPT_HELLO | AUTO_ACCEPT_MAIL | AUTO_ACCEPT_RCPT | AUTO_ACCEPT_QUIT


def play(pieces: list[bytes], *, is_lmtp: bool = False, is_patient: bool = False, auto_accept: int = 0) -> Play:
    """Feed pieces to a new session; a patient one has no limits on errors and messages."""
    driver = Driver(is_lmtp=is_lmtp, is_patient=is_patient, auto_accept=auto_accept)
    for piece in [b"", *pieces]:
        driver.feed(piece)
    return driver.play


def check(prefix: bytes, data: bytes, cuts: list[int], *, is_lmtp: bool) -> None:
    """Raise AssertionError if an invariant does not hold for a state, an input and a split."""
    octets = prefix + data
    if is_lmtp:
        octets = octets.replace(b"EHLO c", b"LHLO c")
    # 5. STARTTLS depends on the split by its nature: what stands behind it in one piece is refused.
    comparable = b"STARTTLS" not in octets.upper()
    places = [0, *sorted(cut for cut in cuts if cut < len(octets)), len(octets)]
    whole = play([octets], is_lmtp=is_lmtp)
    parted = play([octets[a:b] for a, b in itertools.pairwise(places)], is_lmtp=is_lmtp)
    single = play([octets[i : i + 1] for i in range(len(octets))], is_lmtp=is_lmtp)
    if b"bad@" not in octets:
        alone = play([octets], is_lmtp=is_lmtp, auto_accept=_AUTO_ACCEPT)
        assert alone == whole, "7. a session that is not asked differs"
    for each in (whole, parted, single):
        check_replies(each)
        ends = (b"\r\n" + octets).count(b"\r\n.\r\n") + octets.upper().count(b"LAST")
        assert len(each.messages) <= ends, "3. a message without an end"
    if comparable:
        assert whole.output == parted.output == single.output, "2. another split, other replies"
        assert whole.messages == parted.messages == single.messages, "2. another split, other messages"


def check_replies(each: Play) -> None:
    """Invariant 1: every reply has the form of a reply."""
    left = each.output
    while left:
        match = REPLY_LINE.match(left)
        assert match, f"1. this is no reply: {left[:80]!r}"
        left = left[match.end() :]


def one(seed: int) -> None:
    """Run the round of a seed."""
    rng = random.Random(seed)
    prefix = rng.choice(list(STATES.values()))
    words = [rng.choice(WORDS) for _ in range(rng.randint(1, 14))]
    data = b"".join(words)
    if rng.random() < 0.3:
        damaged = bytearray(data)
        for _ in range(rng.randint(1, 4)):
            damaged[rng.randrange(len(damaged))] = rng.choice(b"\r\n.\0 <>:A\xff")
        data = bytes(damaged)
    cuts = [rng.randrange(len(prefix) + len(data) + 1) for _ in range(rng.randint(0, 5))]
    try:
        check(prefix, data, cuts, is_lmtp=rng.random() < 0.3)
    except Exception:
        print(f"seed {seed}: {prefix!r} + {data!r} cut at {cuts}", file=sys.stderr)
        raise


_CANARY = b"VRFY canary\r\n"
_TRANSACTION = b"RSET\r\nEHLO c\r\nMAIL FROM:<a@b>\r\nRCPT TO:<c@d>\r\n"


def sing(seed: int) -> None:
    """Run the round of a seed whose text is full of commands, which must not be executed."""
    rng = random.Random(seed)
    octets = STATES[rng.choice(["greeted", "hello", "helo", "mail", "rcpt", "chunks"])]
    for _ in range(rng.randint(1, 6)):
        text = b"".join(
            rng.choice([_CANARY, b".." + _CANARY, b"x\r\n", b"y" * 70, b"\n", b"\0"]) for _ in range(rng.randint(1, 6))
        )
        if rng.random() < 0.6:
            octets += b"BDAT %d%s\r\n" % (len(text), rng.choice([b"", b" LAST"])) + text
        else:
            octets += (
                _TRANSACTION + b"DATA\r\n" + text + rng.choice([b"\n.\r\n", b"\n.\n", b""]) + _CANARY + b"\r\n.\r\n"
            )
        octets += rng.choice([b"", b"RSET\r\n", _TRANSACTION, b"MAIL FROM:<a@b>\r\n", b"NOOP\r\n"])
    cuts = [0, *sorted(rng.randrange(len(octets)) for _ in range(rng.randint(0, 8))), len(octets)]
    try:
        play([octets[a:b] for a, b in itertools.pairwise(cuts)], is_patient=True)
    except Exception:
        print(f"seed {seed}: {octets!r} cut at {cuts}", file=sys.stderr)
        raise


def main() -> None:
    """Run rounds until the time is over."""
    if "--seed" in sys.argv:
        seed = int(sys.argv[sys.argv.index("--seed") + 1])
        one(seed)
        sing(seed)
        return
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 20.0
    end = time.monotonic() + seconds
    seed = first = int(os.environ.get("PENSTOCK_FUZZ_SEED", time.time_ns() % 1_000_000_000))
    while time.monotonic() < end:
        one(seed)
        sing(seed)
        seed += 1
    print(f"session fuzz: {seed - first} rounds from seed {first}, every invariant held")


if __name__ == "__main__":
    main()
