"""One session of a run: a task that makes connections to a target, one after the other, and sends messages.

The protocol is `ClientSession` (penstock.smtp.client_session). While a connection is open the task is parked, and the
poller calls `_on_reply` with each reply (penstock.net.client): it counts the reply and returns what is sent next. The
task wakes for the TLS handshake and at the end of the connection.
"""

from __future__ import annotations

import errno
import socket
import ssl
from time import perf_counter_ns
from typing import Final, NamedTuple, Protocol

import trio

from penstock import sequence
from penstock.load.counts import Counts
from penstock.load.plan import Plan, Target
from penstock.load.texts import Text
from penstock.net._poller import Poller
from penstock.net.client import ClientConnection, HandshakeError
from penstock.net.connect import connect
from penstock.smtp.client import CannotSendError, Credentials, ProtocolError, ServerReply
from penstock.smtp.client_session import ClientSession, ClientTransaction, ClosingError, OpeningError, Step

_PHASES: Final = {
    Step.GREETING: "banner",
    Step.EHLO: "ehlo",
    Step.HELO: "ehlo",
    Step.LHLO: "ehlo",
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


class Job(NamedTuple):
    """A message to send."""

    number: int
    text: Text
    intended: int
    """When it was to start, in nanoseconds of the clock; 0 in a closed loop."""


class SessionPool(Protocol):
    """What the sessions of a run share."""

    plan: Plan
    counts: Counts
    poller: Poller
    tls: ssl.SSLContext | None
    tls_sessions: dict[Target, ssl.SSLSession | None]
    """The last TLS session with each target, to be resumed."""

    def next_job(self, session: Session) -> Job | None:
        """Return the next message; None if there is none now."""

    def wait_for_job(self, session: Session) -> bool:
        """Have `begin` called when there is a message. Return False if there will be none."""

    def ended(self, session: Session) -> float | None:
        """Note that a connection is over. Return the seconds until the next one; None if there is no more work."""


class Session:
    """Connections to a target, one at a time."""

    def __init__(self, pool: SessionPool, target: Target, source: str) -> None:
        self.target = target
        self.asked_at = 0
        """When the last commands were sent, in nanoseconds of the clock."""
        self.is_promised = False
        """A message is kept for it."""
        self.concluded = 0
        """Messages of this connection that were answered."""
        self._pool = pool
        self._source = source
        self._session: ClientSession
        self._connection: ClientConnection | None = None
        self._left = 0
        """Messages that this connection may still send; negative without a limit."""
        self._job: Job | None = None
        self._job_begun = 0
        """When its MAIL was sent, or was to be, in nanoseconds of the clock."""
        self._is_done = False
        """The server has replied to QUIT."""
        self._timed_out = ""

    @property
    def is_waiting(self) -> bool:
        """A reply or the handshake is awaited."""
        return self._connection is not None and self._session.step is not Step.READY

    def time_out(self, seconds: float) -> None:
        """End the connection: nothing has come for this time."""
        assert self._connection is not None
        self._timed_out = f"no reply within {seconds:g} s"
        self._connection.close_nowait()

    async def run(self) -> None:
        """Make connections as long as there is work. Whatever fails is counted."""
        while True:
            await self._run_connection()
            pause = self._pool.ended(self)
            if pause is None:
                return
            if pause:
                await trio.sleep(pause)

    async def _run_connection(self) -> None:
        counts = self._pool.counts
        counts.connections += 1
        self.concluded = 0
        self._left = self._pool.plan.per_connection or -1
        self._is_done = False
        self._timed_out = ""
        begun_at = self.asked_at = perf_counter_ns()
        kind, text = "", ""
        try:
            await self._converse()
            if self._is_done:
                counts.phases["session"].record(perf_counter_ns() - begun_at)
            else:
                kind, text = "closed", "the server closed the connection"
        except Exception as exc:  # noqa: BLE001 - whatever it is, it costs this connection alone
            kind, text = _kind_of(exc), str(exc.__cause__ or exc)
            if self._timed_out:
                kind, text = "timeout", self._timed_out
            elif self._connection is None and kind == "timeout":
                kind = "connect timeout"
        finally:
            self._close()
        if kind:
            counts.error(kind, f"{self.target}: {text}")

    async def _converse(self) -> None:
        """Be a client, from the connection to the reply to QUIT."""
        pool, plan, target = self._pool, self._pool.plan, self.target
        if target.path:
            stream = await connect(socket.AF_UNIX, target.path, pool.poller)
        else:
            assert target.place is not None
            stream = await connect(target.family, target.place, pool.poller, source=self._source, timeout=plan.timeout)
        self._session = session = ClientSession(
            plan.hello,
            lmtp=plan.lmtp,
            starttls="required" if plan.tls == "starttls" else "never",
            credentials=Credentials(plan.user, plan.password) if plan.user else None,
            is_private=True,
        )
        self._connection = connection = ClientConnection(stream, session)
        now = perf_counter_ns()
        pool.counts.phases["connect"].record(now - self.asked_at)
        self.asked_at = now
        if plan.tls == "implicit":
            await self._start_tls(connection)
        while await connection.run(self._on_reply) and not self._is_done:
            if session.step is Step.HANDSHAKE:
                await self._start_tls(connection)

    async def _start_tls(self, connection: ClientConnection) -> None:
        pool = self._pool
        assert pool.tls is not None
        resumed = pool.tls_sessions.get(self.target) if pool.plan.resumption else None
        await connection.start_tls(pool.tls, self.target.host or "localhost", is_private=True, resumed=resumed)
        now = perf_counter_ns()
        pool.counts.phases["tls"].record(now - self.asked_at)
        self.asked_at = now

    def _close(self) -> None:
        """Close the connection. A message that was not answered is lost."""
        connection, self._connection = self._connection, None
        if connection is not None:
            if self._pool.plan.resumption and connection.tls_session is not None:
                self._pool.tls_sessions[self.target] = connection.tls_session
            connection.close_nowait()
        if self._job is not None:
            self._job = None
            self._pool.counts.lost += 1

    # ---- turns

    def _on_reply(self, reply: ServerReply) -> bytes | None:
        """Count a reply, and return what is sent next. None wakes the task."""
        now = perf_counter_ns()
        session = self._session
        transaction = session.transaction
        self._count(session.step, reply, now)
        output = session.handle(reply)
        if transaction is not None:
            if transaction.step is Step.TEXT:
                output = self._text(transaction)
            elif transaction.has_result:
                if self._job is not None:
                    self._conclude(is_accepted=transaction.is_accepted)
                if session.transaction is None:
                    output = self._next()
        elif session.step is Step.READY:
            _check_capabilities(self._pool.plan, session)
            output = self._next()
        elif session.step is Step.CLOSED:
            self._is_done = True
            return None
        if output or session.step is Step.HANDSHAKE:
            self.asked_at = now
        return output

    def _count(self, step: Step, reply: ServerReply, now: int) -> None:
        phase = _PHASES.get(step)
        if phase is None:
            return  # a reply to no command
        counts, code = self._pool.counts, reply.code
        counts.phases[phase].record(now - self.asked_at)
        counts.replies[phase, code] += 1
        if code >= 400:
            counts.remember(f"{phase} {code}", reply.text)
            if code == 421 and self._job is not None:  # RFC 5321 3.8: the server leaves; this message was answered
                self._conclude(is_accepted=False)

    def _next(self) -> bytes:
        """Return the commands of the next message, or QUIT; nothing while a message is waited for."""
        if self._left:
            job = self._pool.next_job(self)
            if job is not None:
                return self._begin(job)
            if self._pool.wait_for_job(self):
                return b""
        return self._session.quit()

    def begin(self) -> None:
        """Go on after a wait for a message."""
        assert self._connection is not None
        output = self._next()
        self.asked_at = perf_counter_ns()
        try:
            self._connection.send_nowait(output)
        except (trio.BrokenResourceError, ssl.SSLError):
            self._connection.interrupt()  # the task finds out how it was lost

    def _begin(self, job: Job) -> bytes:
        """Begin a message. Return its commands."""
        plan, counts = self._pool.plan, self._pool.counts
        self._left -= 1
        self._job = job
        self._job_begun = perf_counter_ns()
        if job.intended:
            counts.phases["late_start"].record(self._job_begun - job.intended)
            self._job_begun = job.intended
        counts.attempted += 1
        sender = plan.sender or f"{sequence.mark(plan.run, job.number)}@load.invalid"
        return self._session.begin(
            ClientTransaction(
                b"MAIL FROM:<%s>\r\n" % sender.encode(),
                self._rcpts(job),
                pipelining=plan.pipelining,
                chunking=plan.chunking,
                lmtp=plan.lmtp,
            )
        )

    def _rcpts(self, job: Job) -> list[bytes]:
        plan = self._pool.plan
        recipient = plan.to[(job.number - 1) % len(plan.to)]
        if plan.recipients == 1:
            return [b"RCPT TO:<%s>\r\n" % recipient.encode()]
        local, _, domain = recipient.rpartition("@")
        return [b"RCPT TO:<%s@%s>\r\n" % (f"{local}{n}".encode(), domain.encode()) for n in range(plan.recipients)]

    def _text(self, transaction: ClientTransaction) -> bytes:
        """Return the text as it is sent, with its end."""
        job, plan = self._job, self._pool.plan
        assert job is not None
        transaction.end_text()
        sent = job.text.sent(sequence.mark(plan.run, job.number) if plan.header else None)
        return b"BDAT %d LAST\r\n%s" % (len(sent), sent) if plan.chunking else sent

    def _conclude(self, *, is_accepted: bool) -> None:
        """Count the outcome of the message."""
        job, self._job = self._job, None
        assert job is not None
        self.concluded += 1
        counts = self._pool.counts
        took = perf_counter_ns() - self._job_begun
        counts.phases["message"].record(took)
        counts.current.record(took)
        if is_accepted:
            counts.accepted += 1
            counts.octets += job.text.size
        else:
            counts.refused += 1


def _check_capabilities(plan: Plan, session: ClientSession) -> None:
    """Raise CannotSendError if the server does not offer what the plan needs."""
    if plan.pipelining and not session.capabilities.pipelining:
        raise CannotSendError("5.5.1", "PIPELINING is not offered")
    if plan.chunking and not session.capabilities.chunking:
        raise CannotSendError("5.5.1", "CHUNKING is not offered")


def _kind_of(exc: BaseException) -> str:
    """Return the kind of an error, as it is counted."""
    if isinstance(exc, ClosingError) or (isinstance(exc, OpeningError) and exc.reply is not None):
        return "refused"
    if isinstance(exc, OpeningError | CannotSendError):
        return "not offered"
    if isinstance(exc, HandshakeError) and isinstance(exc.__cause__, trio.BrokenResourceError):
        exc = exc.__cause__
    cause = exc.__cause__ if isinstance(exc, trio.BrokenResourceError) and exc.__cause__ is not None else exc
    if isinstance(cause, ssl.SSLError | HandshakeError):
        return "tls"
    if isinstance(cause, ProtocolError):
        return "protocol"
    if isinstance(cause, ConnectionRefusedError):
        return "connect refused"
    if isinstance(cause, TimeoutError):
        return "timeout"
    if isinstance(cause, ConnectionResetError | BrokenPipeError):
        return "reset"
    if isinstance(cause, OSError):
        return errno.errorcode.get(cause.errno or 0, "os").lower()
    return type(cause).__name__
