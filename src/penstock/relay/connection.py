"""One connection to a next hop: SMTP or LMTP, as a client.

A connection has a task, which opens it (greeting, EHLO, TLS, AUTH) and then parks. Transactions are the business of
turns (penstock.net.client): `_on_reply` gets each reply and returns what is to be sent. The task wakes for what has to
be awaited (a body in a file, or one that is still being received), and for the end. An idle connection is parked in the
same place, so that a hop which closes it is noticed at once, and not by the next message.

Where PIPELINING is offered, a small message costs one round trip when others are queued: MAIL, RCPT and DATA are
sent together, after the final dot of the message before (RFC 2920 3.1). With CHUNKING it is the same without DATA.

Timeouts (RFC 5321 4.5.3.2) are checked by the pool's sweeper, so that a turn spends nothing on them: a timeout may be
late by the interval between two sweeps.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncGenerator, Awaitable, Iterator
from contextlib import aclosing, suppress
from typing import Annotated, Final, Literal, Protocol, TypeVar

import msgspec
import trio

from penstock.net.client import ClientConnection, reason_of
from penstock.net.client import HandshakeError as TlsHandshakeError
from penstock.net.stream import SocketStream
from penstock.relay.hop import Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.job import Job
from penstock.relay.tlsreport import OTHER_FAILURE, failure_of
from penstock.relay.transaction import HopTransaction
from penstock.smtp.client import CannotSendError, Credentials, ProtocolError, ServerReply, check_sendable
from penstock.smtp.client_session import BodyError, ClientSession, ClosingError, OpeningError, Step

_IN_TURNS: Final = 262_144
"""Octets of a message in memory that is sent by a turn in one piece; the task sends larger ones."""
_MAX_HEADER: Final = 1 << 20
"""Octets of a message that are searched for a header that needs SMTPUTF8."""

T = TypeVar("T")


class ClockSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds to wait for the replies of a next hop (RFC 5321 4.5.3.2)."""

    connect: Annotated[float, msgspec.Meta(gt=0, le=600, description="For the connection, and for TLS")] = 30.0
    greeting: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For the greeting")] = 300.0
    hello: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For EHLO, STARTTLS and AUTH")] = 300.0
    mail: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For MAIL and RSET")] = 300.0
    rcpt: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For each RCPT")] = 300.0
    data: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For the 354 after DATA")] = 120.0
    block: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For the hop to accept a block of the text")] = (
        180.0
    )
    final: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For the reply to the text")] = 600.0
    quit: Annotated[float, msgspec.Meta(gt=0, le=60, description="For the reply to QUIT")] = 5.0

    @property
    def shortest(self) -> float:
        """The shortest timeout."""
        return min(self.connect, self.greeting, self.hello, self.mail, self.rcpt, self.data, self.block, self.final)

    def by_step(self) -> dict[Step, float]:
        """Return the timeout of each step; none for a connection that has nothing to do."""
        return {
            Step.GREETING: self.greeting,
            Step.EHLO: self.hello,
            Step.LHLO: self.hello,
            Step.HELO: self.hello,
            Step.STARTTLS: self.hello,
            Step.HANDSHAKE: self.connect,
            Step.AUTH: self.hello,
            Step.RSET: self.mail,
            Step.MAIL: self.mail,
            Step.RCPT: self.rcpt,
            Step.DATA: self.data,
            Step.TEXT: self.block,
            Step.FINAL: self.final,
            Step.QUIT: self.quit,
        }


class ClientSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How the relay behaves as a client."""

    hostname: str = "localhost"
    """The argument of EHLO."""
    clocks: ClockSettings = ClockSettings()
    messages: int = 1000
    """Transactions on a connection before it is closed."""
    recipients: int = 1000
    """Recipients of a transaction, if the hop accepts as many."""
    chunking: bool = True
    """Use CHUNKING if offered."""
    smtputf8_downgrade: Literal["refuse", "send"] = "refuse"
    """What to do with a header that needs SMTPUTF8 if the hop does not offer it."""


class JobSource(Protocol):
    """Where a connection gets its jobs: the pool. None of these may block or raise."""

    def next_job(self) -> Job | None:
        """Return the next job, None if no job waits now."""

    def release(self, job: Job) -> None:
        """Take a job back after a transaction: it is done, or has recipients left for another one."""

    def give_back(self, job: Job) -> None:
        """Take a job back that did not begin after all."""

    def worked(self) -> None:
        """Note that a transaction came to its end."""

    def reset(self, connection: HopConnection, *, is_done: bool) -> None:
        """Note that a connection waits for the reply to RSET, and then asks for the next job; or that it has got it."""

    def rest(self, connection: HopConnection) -> None:
        """Note that a connection has nothing to do: `begin` gives it a job."""

    def learned(self, *, recipients: int | None = None, no_chunking: bool = False) -> None:
        """Remember a limit of the hop that its EHLO does not announce."""


class LostError(Exception):
    """The connection is of no more use; the text is the reason."""


class HandshakeError(NextHopUnavailable):
    """TLS could not be negotiated. A new connection without it may work."""


class HopConnection:
    """A connection to a next hop. `open` it, then `serve`; call `begin` when there may be a job."""

    def __init__(
        self,
        hop: Hop,
        stream: SocketStream,
        source: JobSource,
        settings: ClientSettings,
        *,
        is_fallback: bool = False,
    ) -> None:
        """`is_fallback`: the handshake of the connection before failed; this one does without TLS, for one message."""
        self.hop = hop
        self.name = hop.name
        self.resting_since = math.inf
        """Since when it has nothing to do; infinity while it has."""
        self.transactions = 0
        """Transactions that came to their end."""
        self._source = source
        self._settings = settings
        self._timeouts = settings.clocks.by_step()
        self._messages = 1 if is_fallback else settings.messages
        self._is_fallback = is_fallback
        self._lmtp = hop.kind == "lmtp"
        self._session = ClientSession(
            settings.hostname,
            lmtp=self._lmtp,
            starttls=_starttls(hop, is_fallback=is_fallback),
            credentials=Credentials(hop.user, hop.password, hop.auth.mechanisms) if hop.user else None,
            is_private=bool(hop.path),
            chunking=settings.chunking,
            max_recipients=settings.recipients,
        )
        self._connection = ClientConnection(stream, self._session)
        self._current: HopTransaction | None = None
        """The transaction whose replies come next."""
        self._following: HopTransaction | None = None
        """The transaction that was started after it."""
        self._begun = 0
        self._has_rested = False
        """It has worked before, or has waited for work: the hop may have closed it meanwhile."""
        self._sends_text = False
        """The task has to send a text."""
        self._is_ending = False
        self._deadline: float | None = None
        """When the hop has taken too long; None if `check_clock` has to find out."""
        self._timed_out = ""
        self._cut = trio.CancelScope()

    @property
    def is_busy(self) -> bool:
        """A transaction is under way."""
        return self._current is not None

    @property
    def current_prefix(self) -> bytes:
        """Our header fields of the message under way, which have its id; b"" if they are not known."""
        return b"" if self._current is None else self._current.job.prefix

    @property
    def is_encrypted(self) -> bool:
        """TLS was negotiated."""
        return self._session.is_encrypted

    @property
    def is_sending_text(self) -> bool:
        """A text is being sent, or its reply is awaited."""
        return self._current is not None and self._current.is_sending

    @property
    def has_greeted(self) -> bool:
        """The hop has sent its greeting."""
        return self._session.step is not Step.GREETING

    # ---- the opening: greeting, EHLO, TLS, AUTH

    async def open(self, context: ssl.SSLContext | None) -> None:
        """Open the session up to the first transaction; `context` is for TLS.

        Raise NextHopUnavailable if the hop does not accept us, or not as the settings ask.
        """
        session = self._session
        try:
            await self._within(self._open(context))
        except OpeningError as exc:
            is_said = exc.reply is not None and str(exc) == exc.reply.text
            has_no_tls = not session.is_encrypted and exc.status == "4.7.4" and not is_said
            failure = "starttls-not-supported" if has_no_tls else ""
            raise NextHopUnavailable(self.name, str(exc), exc.status, is_said=is_said, tls_failure=failure) from exc
        except ClosingError as exc:
            raise NextHopUnavailable(self.name, exc.reply.text, exc.reply.status, is_said=True) from exc
        except (LostError, ProtocolError, trio.BrokenResourceError, ssl.SSLError) as exc:
            text = str(exc) if isinstance(exc, LostError | ProtocolError) else self._lost_at(exc)
            if session.step is Step.HANDSHAKE and self._timed_out:
                raise HandshakeError(self.name, self._timed_out, "4.7.5", tls_failure=OTHER_FAILURE) from exc
            is_first = session.is_encrypted and session.step is Step.EHLO
            if is_first and not self._timed_out and not isinstance(exc, ProtocolError):
                # In TLS 1.3 the hop judges our side after we have finished (RFC 8446 4.4.2.4).
                text = f"{text}, right after the TLS handshake"
                raise HandshakeError(self.name, text, "4.7.5", tls_failure=OTHER_FAILURE) from exc
            raise NextHopUnavailable(self.name, text, "4.4.2") from exc

    async def _open(self, context: ssl.SSLContext | None) -> None:
        session = self._session
        if self.hop.tls.implicit and context is not None:
            await self._start_tls(context)
        while True:
            is_open = await self._connection.run(self._on_opening_reply)
            if session.step is Step.READY:
                return
            if session.step is Step.HANDSHAKE:
                assert context is not None
                await self._start_tls(context)
            elif not is_open:
                raise LostError(f"the hop closed the connection at {session.step}")

    def _on_opening_reply(self, reply: ServerReply) -> bytes | None:
        output = self._session.handle(reply)
        self._deadline = None
        return None if self._session.step is Step.READY else output

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        hop = self.hop
        self._deadline = trio.current_time() + self._settings.clocks.connect
        # A password is given away to a hop whose certificate was not verified only if the settings allow it.
        is_private = hop.is_verified or hop.auth.unverified_tls
        try:
            await self._connection.start_tls(context, hop.tls.name or hop.host or "localhost", is_private=is_private)
        except TlsHandshakeError as exc:
            raise HandshakeError(self.name, str(exc), "4.7.5", tls_failure=failure_of(exc)) from exc
        if hop.dane is not None:
            wrong = hop.dane.check(self._connection.peer_chain())
            if wrong:
                raise HandshakeError(self.name, wrong, "4.7.5", tls_failure=OTHER_FAILURE)
        self._deadline = None

    # ---- transactions, in turns

    def begin(self) -> bool:
        """Take the next job, if there is one, and send its commands. For a connection that rests.

        Return False if there was none.
        """
        output = self._open_next()
        if self._current is None:
            return False
        try:
            self._connection.send_nowait(output)
        except (trio.BrokenResourceError, ssl.SSLError):
            self._connection.interrupt()  # the task finds out how it was lost
        return True

    def _open_next(self) -> bytes:
        """Begin with the next job that this hop can take. Return what is to be sent, b"" without such a job."""
        session = self._session
        while session.can_begin and not self._is_worn and not self._is_ending:
            job = self._source.next_job()
            if job is None:
                break
            output = self._begin_with(job)
            if output:
                return output
        if self._current is None and session.transaction is None:
            if self._is_worn:
                self._is_ending = True
            if not self._is_ending:
                self._rest()
        return b""

    def _begin_with(self, job: Job) -> bytes:
        """Begin a transaction and return its commands; b"" if the hop cannot take the job, which is recorded then."""
        try:
            transaction = self._transaction(job)
        except CannotSendError as exc:
            kind = Outcome.DEFERRED if exc.status.startswith("4") else Outcome.FAILED
            result = Result(kind, str(exc), exc.status, self.name, is_said=False)
        except (BodyError, OSError) as exc:
            result = Result(Outcome.DEFERRED, str(exc), "4.3.0", self.name, is_said=False)
        else:
            self._begun += 1
            self.resting_since = math.inf
            self._deadline = None
            if self._current is None:
                self._current = transaction
            else:
                self._following = transaction
            return self._session.begin(transaction.transaction)
        job.record_rest(result)
        self._source.release(job)
        return b""

    @property
    def _is_worn(self) -> bool:
        return self._begun >= self._messages

    def _transaction(self, job: Job) -> HopTransaction:
        """Return the transaction of a job. Raise CannotSendError if the hop cannot take it."""
        session, envelope = self._session, job.envelope
        capabilities = session.capabilities
        check_sendable(envelope, job.size, capabilities)
        if envelope.requiretls and not (session.is_encrypted and self.hop.is_verified):
            raise CannotSendError("5.7.30", "the message requires REQUIRETLS, and this hop is not verified")
        if envelope.smtputf8 and not capabilities.smtputf8 and not job.is_question:
            self._check_header(job)
        binary = envelope.body_type == "BINARYMIME"
        chunking = capabilities.chunking and (binary or (job.coming is None and bool(job.size)))
        return HopTransaction(
            job, capabilities, self.name, recipients=session.max_recipients, lmtp=self._lmtp, chunking=chunking
        )

    def _check_header(self, job: Job) -> None:
        """Raise CannotSendError if a header needs SMTPUTF8, which this hop does not offer (RFC 6531 3.2).

        Only for a message received with SMTPUTF8: other raw 8-bit headers pass, as with Postfix.
        """
        if self._settings.smtputf8_downgrade == "send":
            return
        if job.body is None:  # not read yet: the message is tried again from the spool
            raise CannotSendError("4.6.7", "the message may need SMTPUTF8, which the hop does not offer")
        if not _has_ascii_header(job):
            raise CannotSendError("5.6.7", "the header needs SMTPUTF8, which the hop does not offer")

    def _rest(self) -> None:
        self.resting_since = trio.current_time()
        self._deadline = math.inf
        self._has_rested = True
        self._source.rest(self)

    def _on_reply(self, reply: ServerReply) -> bytes | None:
        """Take a reply. Return what is to be sent. None: the task has to go on."""
        session, current = self._session, self._current
        output = session.handle(reply)
        self._deadline = None
        if current is None:
            if session.transaction is None:  # that was the reply to RSET
                self._source.reset(self, is_done=True)
                output += self._open_next()
        elif current.transaction.step is Step.TEXT and not self._sends_text:
            output += self._say_text(current)
        elif current.transaction.has_result:
            output += self._end_transaction(current)
        if self._sends_text or (self._is_ending and session.transaction is None):
            self._connection.queue(output)
            return None
        return output

    def _say_text(self, current: HopTransaction) -> bytes:
        """Return the text, and the commands of the next transaction; or leave both to the task."""
        job = current.job
        if not job.in_memory or job.size > _IN_TURNS:
            self._sends_text = True
            return b""
        return current.text() + self._look_ahead(current)

    def _look_ahead(self, current: HopTransaction) -> bytes:
        """Return the commands of the next transaction, to be sent after the text of this one."""
        return b"" if current.job.waiting or current.transaction.too_many else self._open_next()

    def _end_transaction(self, current: HopTransaction) -> bytes:
        """Record the results of a transaction and go on. Return what is to be sent."""
        transaction = current.transaction
        self.transactions += 1
        self._has_rested = True
        self._sends_text = False
        self._current, self._following = self._following, None
        current.record(is_fallback=self._is_fallback or self._session.starttls_refused)
        limit = current.recipient_limit
        if limit is not None:
            self._session.max_recipients = limit
        self._source.learned(recipients=limit, no_chunking=transaction.chunking_refused)
        self._source.worked()
        if current.wants_tls:
            self._is_ending = True
        self._source.release(current.job)
        if transaction.is_broken:
            raise LostError("the hop refused the text before its end")
        output = self._open_next() if self._current is None else b""
        if self._current is None and self._session.transaction is not None:
            self._source.reset(self, is_done=False)
        return output

    # ---- what needs the task

    async def serve(self) -> None:
        """Do jobs until the connection ends. `end` then says what that means for jobs under way.

        Return if it was ended here; raise LostError if it was lost, ClosingError if the hop has closed it, BodyError
        if a body cannot be read.
        """
        try:
            await self._within(self._serve())
        except trio.BrokenResourceError as exc:
            await self._read_last_replies()
            raise LostError(self._lost_at(exc)) from exc
        except (ssl.SSLError, ProtocolError) as exc:
            raise LostError(f"{reason_of(exc)}, at {self._session.step}") from exc

    async def _serve(self) -> None:
        self._connection.queue(self._open_next())
        while True:
            if self._sends_text:
                await self._send_text()
            elif self._is_ending and self._session.transaction is None:
                await self._quit()
                return
            elif not await self._connection.run(self._on_reply):
                raise LostError(f"the hop closed the connection at {self._session.step}")

    async def _send_text(self) -> None:
        """Send a text that is not in memory, or is large. Raise BodyError if it cannot be read."""
        current = self._current
        assert current is not None
        transaction = current.transaction
        await self._connection.send(transaction.begin_text())
        async with aclosing(self._chunks(current.job)) as chunks:
            async for chunk in chunks:
                self._deadline = None
                await self._connection.send(transaction.feed_text(chunk))
                self._deadline = math.inf  # it is not the hop that we wait for now
        self._deadline = None
        last = transaction.finish_text()
        self._sends_text = False
        await self._connection.send(last + self._look_ahead(current))
        self._deadline = None

    async def _chunks(self, job: Job) -> AsyncGenerator[bytes, None]:
        """Yield the text of a job. Reads a file in a thread."""
        if job.coming is not None:
            try:
                async for piece in job.coming:
                    yield piece
            except OSError as exc:
                raise BodyError(f"the message was not received completely: {exc}") from exc
            return
        assert job.body is not None
        yield job.prefix
        chunks: Iterator[bytes] = job.body.chunks()
        while True:
            try:
                chunk = _read(chunks) if job.in_memory else await trio.to_thread.run_sync(_read, chunks)
            except (OSError, ValueError) as exc:
                raise BodyError(f"the body cannot be read: {exc}") from exc
            if chunk is None:
                return
            yield chunk

    async def _read_last_replies(self) -> None:
        """Take the replies that came before the connection broke: a refusal of the text may be among them."""
        self._is_ending = True
        self._deadline = trio.current_time() + self._settings.clocks.quit
        with suppress(
            trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, ProtocolError, LostError, ClosingError
        ):
            while await self._within(self._connection.run(self._on_reply)):
                pass

    async def _quit(self) -> None:
        """Send QUIT; the reply is of no interest."""
        session = self._session
        self._connection.queue(session.quit())
        self._deadline = None
        with suppress(trio.BrokenResourceError, ssl.SSLError, ClosingError):
            await self._connection.run(self._on_quit_reply)

    def _on_quit_reply(self, reply: ServerReply) -> bytes | None:
        self._session.handle(reply)
        return None

    # ---- timeouts, and the end

    def _lost_at(self, exc: BaseException) -> str:
        return f"the connection was lost at {self._session.step}: {reason_of(exc)}"

    async def _within(self, waiting: Awaitable[T]) -> T:
        """Await something that `check_clock` can end. Raise LostError then."""
        with trio.CancelScope() as scope:
            self._cut = scope
            return await waiting
        raise LostError(self._timed_out)

    def check_clock(self, now: float) -> None:
        """End the connection if the hop has taken too long. `now` is in trio's time."""
        if self._deadline is None:
            self._deadline = now + self._timeouts.get(self._session.step, math.inf)
        if now >= self._deadline and not self._timed_out:
            self.time_out(f"the hop took too long for {self._session.step}")

    def time_out(self, text: str) -> None:
        """End the connection for lack of progress."""
        self._timed_out = text
        self._cut.cancel()

    def retire(self) -> None:
        """End the connection with QUIT: now if it rests, otherwise after its transactions."""
        self._is_ending = True
        if self._session.transaction is None:
            self._connection.interrupt()

    def end(self, cause: BaseException | str) -> None:
        """Close the connection, and record what that means for the jobs under way.

        A job that the hop has not answered, on a connection that has worked before, is given back and costs no attempt:
        the hop had closed an idle connection before it read the message.
        """
        self._connection.close_nowait()
        closing = cause.reply if isinstance(cause, ClosingError) else None
        text = str(cause) or "the connection was lost"
        status = "4.3.0" if isinstance(cause, BodyError) else "4.4.2"  # a body of ours: no other hop is asked
        following = self._following
        for each in (self._current, following):
            if each is None:
                continue
            is_reused = self._has_rested and not self._timed_out
            if each.is_unanswered and each.job.coming is None and (each is following or is_reused):
                each.withdraw()
                self._source.give_back(each.job)
            else:
                each.lose(text, closing, status=status)
                self._source.release(each.job)
        self._current = self._following = None


def _starttls(hop: Hop, *, is_fallback: bool) -> Literal["never", "offered", "required"]:
    if hop.tls.mode == "none" or is_fallback:
        return "never"
    return "offered" if hop.tls.mode == "opportunistic" else "required"


def _has_ascii_header(job: Job) -> bool:
    """Return whether the header that came with a message is ASCII, as far as it is read: 1 MiB. May read the disk.

    Messages for which this is needed are rare: received with SMTPUTF8, with ASCII addresses, to a hop without it. A
    longer header counts as one that is not ASCII. What comes after an empty line below our fields is no header.
    """
    assert job.body is not None
    if job.prefix.endswith(b"\r\n\r\n"):
        return True
    octets, tail = 0, b"\r\n"
    for chunk in job.body.chunks():
        piece = tail + chunk
        end = piece.find(b"\r\n\r\n")
        if end >= 0 or not piece.isascii():
            return piece[: end if end >= 0 else None].isascii()
        octets, tail = octets + len(chunk), piece[-3:]
        if octets >= _MAX_HEADER:
            return False
    return True


def _read(chunks: Iterator[bytes]) -> bytes | None:
    """Return the next chunk of a body, None at its end. May block on the disk."""
    return next(chunks, None)
