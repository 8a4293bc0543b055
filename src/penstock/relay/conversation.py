"""One connection to a next hop: SMTP or LMTP, as a client.

A connection has a task, which connects, says EHLO, begins TLS and proves who we are; then it sleeps. Transactions are
the business of turns (penstock.net.stream): plain functions that the poller calls when answers have come, and that
return what is to be said next. The task wakes for what has to be awaited (a body in a file, or one that is still being
received), and for the end. An idle connection sleeps in the same place, so that a hop which closes it is noticed at
once, and not by the next message.

Where PIPELINING is offered, a small message costs the hop and us one round trip:

- with CHUNKING, MAIL, RCPT and the whole text in one BDAT leave in one send;
- without it, MAIL, RCPT and DATA leave together, and where another message is waiting they leave behind the final dot
  of the one before it (RFC 2920 3.1 allows that).

Clocks (RFC 5321 4.5.3.2) are looked at by the pool's sweeper: a turn notes a time and spends nothing on scopes.
"""

from __future__ import annotations

import math
import ssl
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from contextlib import aclosing, suppress
from dataclasses import replace
from typing import Annotated, Final, Protocol, TypeVar

import msgspec
import trio

from penstock.net import _poller
from penstock.net.stream import SocketStream
from penstock.net.tls import TlsLayer
from penstock.relay.exchange import BodyError, Closing, Exchange, Phase
from penstock.relay.hop import Hop, NextHopUnavailable, Outcome, Result
from penstock.relay.job import Job
from penstock.smtp.client import (
    Answer,
    AnswerReader,
    AuthDialog,
    CannotSendError,
    Capabilities,
    ProtocolError,
    check_sendable,
)

_READ_OCTETS: Final = 65_536
_ANSWER_OCTETS: Final = 4096
"""Octets of answers received at a time: what the stream takes for a receive that may have left some."""
_AT_ONCE: Final = 65_536
"""Octets of a message that is sent before its recipients were accepted: not worth the wait."""
_IN_TURNS: Final = 262_144
"""Octets of a message in memory that is sent in one piece; larger ones are for the task."""
_HANDSHAKE: Final = "the TLS handshake"
_NOT_KNOWN: Final = frozenset({500, 501, 502, 503, 504, 550, 554, 555})
"""Answers to EHLO after which HELO is worth a try (RFC 5321 3.2, 4.1.4)."""

_CLOCKS: Final = {
    Phase.RESET: "mail",
    Phase.MAIL: "mail",
    Phase.RCPT: "rcpt",
    Phase.DATA: "data",
    Phase.TEXT: "block",
    Phase.FINAL: "final",
}
"""Which clock runs while the answer to a phase is awaited."""

T = TypeVar("T")


class ClockSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds that a next hop has for its answers (RFC 5321 4.5.3.2)."""

    connect: Annotated[float, msgspec.Meta(gt=0, le=600, description="For the connection, and for TLS")] = 30.0
    greeting: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For the greeting")] = 300.0
    hello: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For EHLO, STARTTLS and AUTH")] = 300.0
    mail: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For MAIL and RSET")] = 300.0
    rcpt: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For each RCPT")] = 300.0
    data: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For the 354 after DATA")] = 120.0
    block: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For taking a block of the text")] = 180.0
    final: Annotated[float, msgspec.Meta(gt=0, le=3600, description="For the answer to the text")] = 600.0
    quit: Annotated[float, msgspec.Meta(gt=0, le=60, description="For the answer to QUIT")] = 5.0

    @property
    def shortest(self) -> float:
        """The clock that runs out first."""
        return min(self.connect, self.greeting, self.hello, self.mail, self.rcpt, self.data, self.block, self.final)


class Manner(msgspec.Struct, frozen=True, kw_only=True):
    """How conversations are led."""

    hostname: str = "localhost"
    """What we say in EHLO."""
    clocks: ClockSettings = ClockSettings()
    messages: int = 1000
    """Transactions on a connection before it is closed."""
    recipients: int = 1000
    """Recipients of a transaction, where the hop takes as many."""
    chunking: bool = True
    """Use CHUNKING where it is offered."""


class Owner(Protocol):
    """Who has the jobs: the pool's side of a conversation. None of these may block or raise."""

    def next_job(self) -> Job | None:
        """Return the next job, None when there is none now."""

    def release(self, job: Job) -> None:
        """Take a job back after a transaction: it is done, or has recipients left for another one."""

    def give_back(self, job: Job) -> None:
        """Take a job back that did not begin after all."""

    def worked(self) -> None:
        """Note that a transaction came to its end."""

    def rest(self, conversation: Conversation) -> None:
        """Note that a conversation has nothing to do: `begin` wakes it up."""


class LostError(Exception):
    """The connection is of no use any more; the text says why."""


class HandshakeError(NextHopUnavailable):
    """TLS did not come about. Without it a new connection may work."""


class _Inbox:
    """What a plaintext connection receives into."""

    __slots__ = ("_feed",)

    def __init__(self, feed: Callable[[bytes], None]) -> None:
        self._feed = feed

    def recv(self, fd: int, octets: int = _READ_OCTETS, /) -> int:
        """Receive; see `Wire.recv`."""
        data = _poller.recv(fd, min(octets, _ANSWER_OCTETS))
        if data is None:
            return -1
        self._feed(data)
        return len(data)


class Conversation:
    """A connection to a next hop. `open` it, then `serve`; `begin` is how it hears that there may be a job."""

    def __init__(self, hop: Hop, stream: SocketStream, owner: Owner, manner: Manner) -> None:
        self.hop = hop
        self.name = hop.name
        self.deadline = trio.current_time() + manner.clocks.greeting
        """When the hop has taken too long; looked at by `check_clock`."""
        self.resting_since = math.inf
        """Since when it has nothing to do; infinity while it has."""
        self.transactions = 0
        """Those that came to their end."""
        self.is_encrypted = False
        self._awaited = "the greeting"
        self._stream = stream
        self._owner = owner
        self._manner = manner
        self._reader = AnswerReader()
        self._receiver: _poller.Receiver = _Inbox(self._reader.feed)
        self._tls: TlsLayer | None = None
        self._offer = Capabilities()
        self._at_once = 0
        """Octets of a message that may be sent with its opening."""
        self._now: Exchange | None = None
        """The transaction whose answers come next."""
        self._next: Exchange | None = None
        """The one that was begun behind it."""
        self._needs_reset = False
        self._begun = 0
        self._unsent = b""
        """What the task has to send."""
        self._has_rested = False
        """It has worked before, or has waited for work: the hop may have gone meanwhile."""
        self._has_text = False
        """The task has to send a text."""
        self._is_ending = False
        self._timed_out = ""
        self._cut = trio.CancelScope()
        self._scope: trio.CancelScope | None = None

    @property
    def is_busy(self) -> bool:
        """A transaction is under way."""
        return self._now is not None

    # ---- the opening: greeting, EHLO, TLS, AUTH

    async def open(self, context: ssl.SSLContext | None) -> None:
        """Lead the conversation up to the first transaction; `context` is for TLS, None is without.

        Raise NextHopUnavailable when the hop does not want us, or not as we want it.
        """
        try:
            await self._within(self._open(context))
        except (LostError, ProtocolError) as exc:
            if self._timed_out and self._awaited == _HANDSHAKE:
                raise HandshakeError(self.name, self._timed_out, "4.7.5") from exc
            raise NextHopUnavailable(self.name, f"{exc}", "4.4.2") from exc

    async def _open(self, context: ssl.SSLContext | None) -> None:
        policy, clocks = self.hop.tls, self._manner.clocks
        if policy.implicit and context is not None:
            await self._shake_hands(context)
        greeting = await self._hear("the greeting", clocks.greeting)
        if greeting.code != 220:
            raise NextHopUnavailable(self.name, greeting.text, greeting.status, is_said=True)
        await self._say_hello()
        if context is not None and not self.is_encrypted:
            await self._start_tls(context)
        if policy.mode in ("require", "verify") and not self.is_encrypted:
            raise NextHopUnavailable(self.name, "TLS is required, and the hop does not offer it", "4.7.4")
        if self.hop.user:
            await self._authenticate()
        if self._manner.chunking and self._offer.chunking and self._offer.pipelining and self.hop.kind == "smtp":
            self._at_once = _AT_ONCE
        self.deadline = math.inf

    async def _say_hello(self) -> None:
        """Say EHLO, HELO to a server of old, or LHLO, and note what is offered."""
        clocks, name = self._manner.clocks, self._manner.hostname.encode("ascii", "replace")
        verb = "LHLO" if self.hop.kind == "lmtp" else "EHLO"
        answer = await self._ask(verb.encode() + b" " + name, verb, clocks.hello)
        if answer.code == 250:
            self._offer = Capabilities.of(answer)
            if not self._manner.chunking:
                self._offer = replace(self._offer, chunking=False)
            return
        if answer.code in _NOT_KNOWN and verb == "EHLO":
            answer = await self._ask(b"HELO " + name, "HELO", clocks.hello)
            self._offer = Capabilities()
        if answer.code != 250:
            raise NextHopUnavailable(self.name, answer.text, answer.status, is_said=True)

    async def _start_tls(self, context: ssl.SSLContext) -> None:
        """Begin TLS where it is offered (RFC 3207). Without it, whether to go on is the caller's decision."""
        if not self._offer.starttls:
            return
        answer = await self._ask(b"STARTTLS", "STARTTLS", self._manner.clocks.hello)
        if answer.code != 220:
            if self.hop.tls.mode != "opportunistic":
                raise NextHopUnavailable(self.name, f"STARTTLS was refused: {answer.text}", "4.7.4")
            return
        if not self._reader.is_empty:  # somebody in between has added it, to be read as if it were encrypted
            raise ProtocolError("the hop said something between STARTTLS and TLS")
        await self._shake_hands(context)
        try:
            await self._say_hello()  # RFC 3207 4.2: what was offered before means nothing
        except LostError as exc:  # in TLS 1.3 the hop judges what we showed when we are done (RFC 8446 4.4.2.4)
            raise HandshakeError(self.name, f"{exc}, right behind the TLS handshake", "4.7.5") from exc

    async def _shake_hands(self, context: ssl.SSLContext) -> None:
        self._await(_HANDSHAKE, self._manner.clocks.connect)
        try:
            layer = TlsLayer(context, server_name=self.hop.tls.name or self.hop.host or "localhost")
            said = layer.shake()
            if said is not None:
                await self._stream.send_now(said)
                layer.expect_more(await self._stream.attend(layer, layer.shake))
            await self._stream.send_now(layer.encrypt(b""))
            layer.decrypt_into(self._reader.feed)  # what came in the breath of the handshake
        except (ssl.SSLError, ValueError, trio.BrokenResourceError) as exc:
            raise HandshakeError(self.name, f"the TLS handshake failed: {_reason(exc)}", "4.7.5") from exc
        self._tls = self._receiver = layer
        self.is_encrypted = True

    async def _authenticate(self) -> None:
        """Prove who we are (RFC 4954). A unix socket is as private as TLS."""
        clock = self._manner.clocks.hello
        is_private = self.is_encrypted or bool(self.hop.path)
        try:
            dialog = AuthDialog(self.hop.user, self.hop.password, self._offer, is_private=is_private)
        except CannotSendError as exc:
            raise NextHopUnavailable(self.name, f"AUTH: {exc}", exc.status) from exc
        answer = await self._ask(dialog.start().rstrip(b"\r\n"), "AUTH", clock)
        while answer.code == 334:
            answer = await self._ask(dialog.respond(answer).rstrip(b"\r\n"), "AUTH", clock)
        if answer.code != 235:
            raise NextHopUnavailable(self.name, f"AUTH was refused: {answer.text}", answer.status)
        dialog.finish()

    async def _ask(self, command: bytes, what: str, seconds: float) -> Answer:
        """Say one command and return its answer."""
        self._await(what, seconds)
        try:
            await self._send(command + b"\r\n")
        except (trio.BrokenResourceError, ssl.SSLError) as exc:
            raise LostError(f"the connection was lost at {what}: {_reason(exc)}") from exc
        return await self._hear(what, seconds)

    async def _hear(self, what: str, seconds: float) -> Answer:
        """Wait for an answer. Raise LostError when the connection ends instead."""
        self._await(what, seconds)
        is_open = True
        while (answer := self._reader.next()) is None:
            if not is_open:
                raise LostError(f"the hop closed the connection at {what}")
            try:
                received = await self._stream.fill(self._receiver)
                is_open = received > 0 and (self._tls is None or self._tls.decrypt_into(self._reader.feed))
            except (trio.BrokenResourceError, ssl.SSLError) as exc:
                raise LostError(f"the connection was lost at {what}: {_reason(exc)}") from exc
        if answer.code == 421:
            raise NextHopUnavailable(self.name, answer.text, answer.status, is_said=True)
        return answer

    # ---- transactions, in turns

    def begin(self) -> bool:
        """Take the owner's next job, if there is one, and say its opening. For a conversation that rests.

        Return False when there was none.
        """
        said = self._open_next()
        if self._now is None:
            return False
        try:
            data = said if self._tls is None else self._tls.encrypt(said)
            sent = self._stream.send_nowait(data)
        except (trio.BrokenResourceError, ssl.SSLError):
            sent, data = 0, b"?"  # it is lost, and the task will find out how
        if sent < len(data):
            self._unsent = data[sent:]
            self._wake()
        return True

    def _open_next(self) -> bytes:
        """Begin with the owner's next job that this hop can take. Return what is to be said, b"" when there is none."""
        while not self._is_worn and not self._is_ending:
            job = self._owner.next_job()
            if job is None:
                break
            said = self._begin_with(job)
            if said:
                return said
        if self._now is None:
            if self._is_worn:
                self._is_ending = True
            if not self._is_ending:
                self._rest()
        return b""

    def _begin_with(self, job: Job) -> bytes:
        """Begin a transaction and return its opening; b"" when the job can not be done, which it has been told then."""
        try:
            exchange = self._exchange(job)
            said = exchange.opening()
        except CannotSendError as exc:
            result = Result(Outcome.FAILED, str(exc), exc.status, self.name, is_said=False)
        except BodyError as exc:
            result = Result(Outcome.DEFERRED, str(exc), "4.3.0", self.name, is_said=False)
        else:
            self._begun += 1
            self._needs_reset = False
            self.resting_since = math.inf
            if self._now is None:
                self._now = exchange
            else:
                self._next = exchange
            self._note_phase()
            return said
        job.settle_rest(result)
        self._owner.release(job)
        return b""

    @property
    def _is_worn(self) -> bool:
        return self._begun >= self._manner.messages

    def _exchange(self, job: Job) -> Exchange:
        """Return the transaction of a job. Raise CannotSendError when the hop can not take it."""
        offer = self._offer
        check_sendable(job.envelope, job.size, offer)
        if job.envelope.requiretls and not (self.is_encrypted and self.hop.tls.mode == "verify"):
            raise CannotSendError("5.7.30", "the message asks for REQUIRETLS, and this hop is not verified")
        at_once = job.in_memory and job.size <= self._at_once and bool(job.size)
        binary = job.envelope.body_type == "BINARYMIME"
        chunks = offer.chunking and (at_once or binary or (job.coming is None and bool(job.size)))
        return Exchange(
            job,
            offer,
            self.name,
            recipients=self._manner.recipients,
            is_lmtp=self.hop.kind == "lmtp",
            resets=self._needs_reset,
            chunks=chunks,
            at_once=at_once,
        )

    def _rest(self) -> None:
        now = trio.current_time()
        self.deadline = math.inf
        self.resting_since = now
        self._has_rested = True
        self._owner.rest(self)

    def _turn(self, received: int) -> bytes | None:
        """Take what has come, and return what is to be said. None: the task has to go on.

        Raise LostError, ProtocolError and Closing: then the connection is at its end.
        """
        if self._tls is not None and received and not self._tls.decrypt_into(self._reader.feed):
            self._take_answers()
            raise LostError("the hop closed the connection")
        said = self._take_answers()
        if self._tls is not None:
            said = self._tls.encrypt(said)
        if self._has_text or self._is_ending or self._unsent:
            self._unsent += said
            return None
        return said

    def _take_answers(self) -> bytes:
        """Give the answers that are there to the transactions they are for. Return what is to be said."""
        said = b""
        next_answer = self._reader.next
        while True:
            exchange = self._now
            if exchange is not None:
                self._awaited = exchange.phase  # should the next answer be none
            answer = next_answer()
            if answer is None:
                break
            if exchange is None:
                if answer.code == 421:
                    raise Closing(answer)
                raise ProtocolError(f"the hop said something that nobody asked for: {answer.text}")
            said += exchange.take(answer)
            if exchange.phase is Phase.TEXT and not self._has_text:
                said += self._say_text(exchange)
            elif exchange.is_done:
                said += self._end_exchange(exchange)
        if self._now is not None:
            self._note_phase()
        return said

    def _say_text(self, exchange: Exchange) -> bytes:
        """Return the text, and the opening of the next transaction; or leave it to the task."""
        job = exchange.job
        if not job.in_memory or job.size > _IN_TURNS:
            self._has_text = True
            return b""
        return exchange.text() + self._look_ahead(exchange)

    def _look_ahead(self, exchange: Exchange) -> bytes:
        """Return the opening of the next transaction, to be sent behind the text of this one."""
        if not self._offer.pipelining or self._at_once or exchange.job.waiting:
            return b""
        return self._open_next()

    def _end_exchange(self, exchange: Exchange) -> bytes:
        """Go on behind a transaction. Return what is to be said."""
        self.transactions += 1
        self._has_rested = True
        self._needs_reset = self._needs_reset or exchange.needs_reset
        self._has_text = False
        self._now, self._next = self._next, None
        self._owner.worked()
        self._owner.release(exchange.job)
        if exchange.is_spoiled:
            raise LostError("the hop refused the text before its end")
        return self._open_next() if self._now is None else b""

    def _note_phase(self) -> None:
        """Set the clock for the answer that comes next."""
        exchange = self._now
        assert exchange is not None
        phase, clocks = exchange.phase, self._manner.clocks
        self._await(phase, getattr(clocks, _CLOCKS[phase]))

    # ---- what needs the task

    async def serve(self) -> None:
        """Do the owner's jobs until the connection ends. Jobs that are under way then have heard what became of them.

        Return when we have ended it; raise LostError when it was lost, Closing when the hop has closed it.
        """
        try:
            await self._within(self._serve())
        except trio.BrokenResourceError as exc:
            await self._hear_last_words()
            raise LostError(f"the connection was lost at {self._awaited}: {_reason(exc)}") from exc
        except (ssl.SSLError, ProtocolError) as exc:
            raise LostError(f"{_reason(exc)}, at {self._awaited}") from exc

    async def _serve(self) -> None:
        self._unsent = self._open_next()
        if self._tls is not None:
            self._unsent = self._tls.encrypt(self._unsent)
        while True:
            unsent, self._unsent = self._unsent, b""
            if unsent:
                await self._stream.send_now(unsent)
            if self._has_text:
                await self._send_text()
                continue
            if self._is_ending and self._now is None:
                await self._quit()
                return
            if not await self._attend():
                raise LostError(f"the hop closed the connection at {self._awaited}")

    async def _attend(self) -> int:
        """Sleep while turns are taken; see `SocketStream.attend`."""
        if self._stream.can_be_nudged:
            return await self._stream.attend(self._receiver, self._turn)
        with trio.CancelScope() as self._scope:
            return await self._stream.attend(self._receiver, self._turn)
        return -1

    def _wake(self) -> None:
        """Wake the task of a conversation that rests, or have it not fall asleep."""
        if self._stream.can_be_nudged:
            self._stream.resume()
        elif self._scope is not None:
            self._scope.cancel()

    async def _send(self, data: bytes) -> None:
        await self._stream.send_now(data if self._tls is None else self._tls.encrypt(data))

    async def _send_text(self) -> None:
        """Send a text that does not lie in memory, or is large. Raise BodyError when it can not be read."""
        exchange = self._now
        assert exchange is not None
        job, block = exchange.job, self._manner.clocks.block
        await self._send(exchange.begin_text())
        async with aclosing(self._chunks(job)) as chunks:
            async for chunk in chunks:
                self._await("the text", block)
                await self._send(exchange.feed_text(chunk))
                self.deadline = math.inf  # the next chunk is not the hop's to give
        self._await("the text", block)
        await self._send(exchange.finish_text() + self._look_ahead(exchange))
        self._has_text = False
        self._note_phase()

    async def _chunks(self, job: Job) -> AsyncGenerator[bytes, None]:
        """Yield the text of a job. Reads a file in a thread."""
        if job.coming is not None:
            try:
                async for piece in job.coming:
                    yield piece
            except OSError as exc:
                raise BodyError(f"the message did not come to its end: {exc}") from exc
            return
        assert job.body is not None
        yield job.prefix
        chunks: Iterator[bytes] = job.body.chunks()
        while True:
            try:
                chunk = _read(chunks) if job.in_memory else await trio.to_thread.run_sync(_read, chunks)
            except (OSError, ValueError) as exc:
                raise BodyError(f"the body can not be read: {exc}") from exc
            if chunk is None:
                return
            yield chunk

    async def _hear_last_words(self) -> None:
        """Take the answers that came before the connection broke: a refusal of the text may be among them."""
        self.deadline = trio.current_time() + self._manner.clocks.quit
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, ProtocolError, LostError):
            while await self._within(self._stream.fill(self._receiver)) > 0:
                self._turn(1)

    async def _quit(self) -> None:
        """Say good-bye; the answer is of no interest."""
        self._await("QUIT", self._manner.clocks.quit)
        with suppress(trio.BrokenResourceError, ssl.SSLError):
            await self._send(b"QUIT\r\n")
            while await self._stream.fill(self._receiver) > 0:
                if self._tls is None or not self._tls.decrypt_into(self._reader.feed) or self._reader.next():
                    break

    # ---- clocks, and the end

    def _await(self, what: str, seconds: float) -> None:
        self._awaited = what
        self.deadline = trio.current_time() + seconds

    async def _within(self, waiting: Awaitable[T]) -> T:
        """Await something that `check_clock` can cut short. Raise LostError then."""
        with trio.CancelScope() as scope:
            self._cut = scope
            return await waiting
        raise LostError(self._timed_out)

    def check_clock(self, now: float) -> None:
        """End the conversation when the hop has taken too long."""
        if now >= self.deadline and not self._timed_out:
            self._timed_out = f"the hop took too long for {self._awaited}"
            self._cut.cancel()

    def retire(self) -> None:
        """End the conversation, politely: now when it rests, otherwise after its transactions."""
        self._is_ending = True
        if self._now is None:
            self._wake()

    def end(self, cause: BaseException | str) -> None:
        """Close the connection, and tell the jobs that are under way what that means for them.

        A job of which the hop has said nothing, on a connection that has worked before, is given back: it costs no
        attempt. The hop had closed an idle connection, and we had not heard of it yet. That holds for a message that
        left with its MAIL in one send, too, and a hop that breaks at the wrong moment may then have it twice.
        """
        self._stream.close_nowait()
        said = cause.answer if isinstance(cause, Closing) else None
        text = str(cause) or "the connection was lost"
        for exchange in (self._now, self._next):
            if exchange is None:
                continue
            is_reused = self._has_rested and not self._timed_out
            is_fresh = not exchange.is_answered and (exchange is self._next or is_reused)
            if is_fresh and exchange.job.coming is None:
                exchange.withdraw()
                self._owner.give_back(exchange.job)
            else:
                exchange.lose(text, said)
                self._owner.release(exchange.job)
        self._now = self._next = None


def _read(chunks: Iterator[bytes]) -> bytes | None:
    """Return the next chunk of a body, None at its end. May block on the disk."""
    return next(chunks, None)


def _reason(exc: BaseException) -> str:
    """Return what went wrong, printable: a text of OpenSSL or of the system, without our own wrapping."""
    cause = exc.__cause__ or exc
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError):
        reason = getattr(cause, "reason", None)  # an error that was not OpenSSL's has none
        return (reason or str(cause)).replace("_", " ").lower()
    return getattr(cause, "strerror", None) or str(cause)
