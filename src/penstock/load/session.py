# cython: wraparound=True
"""One session of a run: what it sends to a target on one connection after the other, and what it counts. No waiting.

The protocol is `ClientSession` (penstock.smtp.client_session). While a connection is open, the task of the session
(penstock.load.runner) is parked, and the poller calls `on_reply` with each reply (penstock.net.turns): it counts the
reply and returns what is sent next. Where a run makes a new connection for each message, in clear text, the next one is
begun here as well, if it is made at once: waking the task for it would cost as much as the message.

This file is compiled as it stands (session.pxd has the C types).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import cython  # type: ignore[import-untyped]  # it has no types, and is not needed at run time
import trio

from penstock import sequence
from penstock.smtp.client import CannotSendError, Credentials, ServerReply
from penstock.smtp.client_session import ClientSession, ClientTransaction, Step

if TYPE_CHECKING:
    from penstock.load.counts import Counts
    from penstock.load.generator import Generator
    from penstock.load.jobs import Job
    from penstock.load.plan import Plan, Target
    from penstock.load.texts import Text
    from penstock.metrics._histogram import Histogram
    from penstock.net.client import ClientConnection

if not cython.compiled:  # compiled, these are the C functions of session.pxd
    from penstock.net._poller import now, open_connection

_PHASES: Final = {
    Step.GREETING: "greeting",
    Step.EHLO: "hello",
    Step.HELO: "hello",
    Step.LHLO: "hello",
    Step.STARTTLS: "starttls",
    Step.AUTH: "auth",
    Step.MAIL: "mail",
    Step.RCPT: "rcpt",
    Step.DATA: "data",
    Step.TEXT: "dot",
    Step.FINAL: "dot",
    Step.RSET: "rset",
    Step.QUIT: "quit",
}
"""The phase (penstock.load.counts) that the reply to each step ends."""
# Global names, as in penstock.smtp.client_session.
_TEXT: Final = Step.TEXT
_READY: Final = Step.READY
_CLOSED: Final = Step.CLOSED
_HANDSHAKE: Final = Step.HANDSHAKE


class Session:
    """Connections to a target, one at a time."""

    def __init__(self, pool: Generator, target: Target, source: str) -> None:
        plan = pool.plan
        self.pool = pool
        self.target = target
        self.source = source
        """The IP address to connect from; "" for any."""
        self.asked_at = 0
        """When the last commands were sent, in nanoseconds of the clock."""
        self._is_promised = False
        self.is_rested = False
        """Its think time is over."""
        self.concluded = 0
        """Messages of this connection that were answered."""
        self.is_done = False
        """The server has replied to QUIT."""
        self.timed_out = ""
        """Why the connection was given up."""
        self.opened: tuple[int, int] | None = None
        """The descriptor of the next connection and the code of connect(2), where it has to be waited for."""
        self.connection: ClientConnection | None = None
        self._begun_at = 0
        self._left = 0
        self._job: Job | None = None
        self._job_begun = 0
        self._text: Text | None = None
        self._text_sent = b""
        self._plan = plan
        self._jobs = pool.jobs
        self._thinks = plan.think > 0
        self._pipelining = plan.pipelining
        self._chunking = plan.chunking
        self._has_header = plan.header
        place = target.place
        self._address = str(place[0]) if place else ""
        self._can_replace = plan.tls == "none" and place is not None and not any(place[2:]) and not source
        self._port = target.port
        self._sender = plan.sender
        self._tag = sequence.mark(plan.run, 0)[:-1]
        self._rcpts = [_rcpts(recipient.encode(), plan.recipients) for recipient in plan.to]
        """The RCPTs of a message, for each recipient of the plan."""
        self._counts: Counts | None = None
        self._histograms: dict[Step, Histogram] = {}

    @property
    def is_waiting(self) -> bool:
        """A reply or the handshake is awaited."""
        return self.connection is not None and self.protocol.step is not _READY

    def time_out(self, seconds: float) -> None:
        """End the connection: nothing was received for this time."""
        assert self.connection is not None
        self.timed_out = f"no reply within {seconds:g} s"
        self.connection.close_nowait()

    @property
    def has_to_think(self) -> bool:
        """Its think time is due before the next message."""
        return self._thinks and self.concluded > 0 and not self.is_rested

    def promise(self) -> None:
        """Reserve a message while the session connects."""
        self._is_promised = True
        self._jobs.promised += 1

    def release(self) -> None:
        """Give up the reserved message, if there is one."""
        if self._is_promised:
            self._is_promised = False
            self._jobs.promised -= 1

    # ---- the life of a connection

    def start(self) -> None:
        """Note that a connection is begun."""
        self.pool.counts.connections += 1
        self.concluded = 0
        self.is_rested = False
        self._left = self._plan.per_connection or -1
        self.timed_out = ""
        self._begun_at = self.asked_at = now()

    def begin_connection(self) -> ClientSession:
        """Note that the connection is made. Return the session on it."""
        plan = self._plan
        self.is_done = False
        self.protocol = session = ClientSession(
            plan.hello,
            lmtp=plan.lmtp,
            starttls="required" if plan.tls == "starttls" else "never",
            credentials=Credentials(plan.user, plan.password) if plan.user else None,
            is_private=True,
        )
        self.note_phase("connect")
        return session

    def use(self, connection: ClientConnection | None) -> None:
        """Send through this connection from now on; None for none, which loses a message that was not answered."""
        self.connection = connection
        if connection is None and self._job is not None:
            self._job = None
            self.pool.counts.lost += 1

    def note_phase(self, phase: str) -> None:
        """Note that a phase without a command has ended: the connection is made, or TLS negotiated."""
        at = now()
        self.pool.counts.phases[phase].record(at - self.asked_at)
        self.asked_at = at

    def finish(self) -> None:
        """Note that the connection has ended after its QUIT."""
        self.pool.counts.phases["session"].record(now() - self._begun_at)

    def _replace(self) -> bool:
        """Begin the next connection if it is due now. Return whether it is made, and in use."""
        if not self._can_replace or not self.concluded or self._thinks or not self._jobs.has_work():
            return False
        self.pool.on_success()
        self.promise()
        self.finish()
        self.start()
        fd, code = open_connection(self._address, self._port)
        if code:
            self.opened = fd, code
            return False
        connection = self.connection
        assert connection is not None
        connection.replace(fd, self.begin_connection())
        return True

    # ---- turns

    def on_reply(self, reply: ServerReply) -> bytes | None:
        """Count a reply, and return what is sent next. None wakes the task."""
        at = now()
        session = self.protocol
        transaction = session.transaction
        self._count(session.step, reply, at)
        output = session.handle(reply)
        if transaction is not None:
            if transaction.step is _TEXT:
                output = self._text_of(transaction)
            elif transaction.has_result:
                if self._job is not None:
                    self._conclude(transaction.is_accepted)
                if session.transaction is None:
                    output = self._next()
        elif session.step is _READY:
            _check_capabilities(self._plan, session)
            output = self._next()
        elif session.step is _CLOSED:
            if self._replace():
                return b""
            self.is_done = True
            return None
        if output or session.needs_handshake:
            self.asked_at = at
        return output

    def _use(self, counts: Counts) -> None:
        """Count here from now on: the warm-up has counts of its own."""
        self._counts = counts
        self._histograms = {step: counts.phases[phase] for step, phase in _PHASES.items()}
        self._replies = counts.replies
        self._messages = counts.phases["message"]

    def _count(self, step: Step, reply: ServerReply, at: int) -> None:
        counts, code = self.pool.counts, reply.code
        if counts is not self._counts:
            self._use(counts)
        histogram = self._histograms.get(step)
        if histogram is None:
            return  # a reply to no command
        histogram.record(at - self.asked_at)
        phases = _PHASES
        phase = phases[step]
        key = (phase, code)
        self._replies[key] = self._replies.get(key, 0) + 1
        if code >= 400:
            counts.remember(f"{phase} {code}", reply.text)
            if code == 421 and self._job is not None:  # RFC 5321 3.8: the server leaves; this message was answered
                self._conclude(False)

    def _next(self) -> bytes:
        """Return the commands of the next message, or QUIT; nothing while a message is waited for."""
        if self._left:
            self.release()
            if not self._thinks or not self.has_to_think:
                self.is_rested = False
                job = self._jobs.take()
                if job is not None:
                    return self._begin(job)
            if self.pool.wait_for_job(self):
                return b""
        return self.protocol.quit()

    def begin(self) -> None:
        """Go on after a wait for a message."""
        assert self.connection is not None
        output = self._next()
        self.asked_at = now()
        try:
            self.connection.send_nowait(output)
        except (trio.BrokenResourceError, OSError):  # ssl.SSLError among them
            self.connection.interrupt()  # the task finds out how it was lost

    def _begin(self, job: Job) -> bytes:
        """Begin a message. Return its commands."""
        counts = self.pool.counts
        self._left -= 1
        self._job = job
        self._job_begun = now()
        if job.intended:
            counts.phases["late_start"].record(self._job_begun - job.intended)
            self._job_begun = job.intended
        counts.attempted += 1
        sender = self._sender or f"{self._tag}{job.number}@load.invalid"
        transaction = ClientTransaction(
            f"MAIL FROM:<{sender}>\r\n".encode(),
            self._rcpts[(job.number - 1) % len(self._rcpts)],
            pipelining=self._pipelining,
            chunking=self._chunking,
            lmtp=self._plan.lmtp,
        )
        return self.protocol.begin(transaction)

    def _text_of(self, transaction: ClientTransaction) -> bytes:
        """Return the text as it is sent, with its end."""
        job = self._job
        assert job is not None
        transaction.end_text()
        if self._has_header:
            sent = job.text.sent(f"{self._tag}{job.number}")
        elif job.text is self._text:
            sent = self._text_sent
        else:
            sent = job.text.sent(None)
            self._text, self._text_sent = job.text, sent
        return b"BDAT %d LAST\r\n%b" % (len(sent), sent) if self._chunking else sent

    def _conclude(self, is_accepted: bool) -> None:
        """Count the outcome of the message."""
        job, self._job = self._job, None
        assert job is not None
        self.concluded += 1
        counts = self.pool.counts
        if counts is not self._counts:
            self._use(counts)
        took = now() - self._job_begun
        self._messages.record(took)
        counts.current.record(took)
        if is_accepted:
            counts.accepted += 1
            counts.octets += job.text.size
        else:
            counts.refused += 1


def _rcpts(recipient: bytes, count: int) -> list[bytes]:
    """Return the RCPTs of a message; several recipients have a number in their local part."""
    if count == 1:
        return [b"RCPT TO:<" + recipient + b">\r\n"]
    local, _, domain = recipient.rpartition(b"@")
    return [b"RCPT TO:<%b%d@%b>\r\n" % (local, n, domain) for n in range(count)]


def _check_capabilities(plan: Plan, session: ClientSession) -> None:
    """Raise CannotSendError if the server does not offer what the plan needs."""
    if plan.pipelining and not session.capabilities.pipelining:
        raise CannotSendError("5.5.1", "PIPELINING is not offered")
    if plan.chunking and not session.capabilities.chunking:
        raise CannotSendError("5.5.1", "CHUNKING is not offered")
