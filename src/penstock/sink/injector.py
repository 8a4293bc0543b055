"""Fault injection: the component that applies a fault plan to a connection.

While no fault is possible, the connection works as any other, and only recipients with a magic prefix are passed to the
injector. Once there is a plan, or a fault was requested, every event is passed to it: the engine (penstock.sink.faults)
decides, and the decision is applied here, in the task of the connection.

To corrupt a reply, the connection handles the event as usual, and the octets are changed before they are sent: the
session is in the state of the ordinary reply, however the client understands it. The statistics count what was sent:
the session's metrics are held while such a reply is made, and what is sent is reported to them.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, Final

import trio

from penstock import reply as replies
from penstock.metrics._session import PHASES as COUNTED_PHASES
from penstock.net.stream import SocketStream
from penstock.reply import Reply
from penstock.server.connection import Component, Connection
from penstock.sink.certificates import FAULTY_CONTEXTS, Certificates
from penstock.sink.corrupt import complete_replies, corrupt
from penstock.sink.faults import Decision, FaultEngine, Occasion, Rule
from penstock.sink.magic import WATCHED_PREFIXES, Magic
from penstock.sink.messageids import message_id_of
from penstock.sink.pace import PacedStream
from penstock.sink.plan import Ending, Phase, TlsFault
from penstock.smtp._wire import VERBS
from penstock.smtp.events import (
    Auth,
    BeginData,
    BodyChunk,
    Command,
    EndOfMessage,
    Event,
    Hello,
    Mail,
    Quit,
    Rcpt,
    StartTls,
)
from penstock.smtp.server import INTERCEPTABLE_VERBS
from penstock.smtp.states import State

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of no seconds: close(2) then resets the connection."""
_SMALL_WINDOW: Final = 4096
"""SO_RCVBUF for a client that is read slowly; otherwise the kernel would buffer megabytes."""
_HANG_UP_CHECK: Final = 1.0
"""Seconds between two checks whether a stalled client has closed the connection."""
_MAX_HEADER: Final = 65_536
"""Octets of a header in which a sequence number is looked for."""
_BANNER: Final = COUNTED_PHASES.index("banner")
_IN_PLACE_OF_HELLO: Final = b"554 5.7.0 TLS is broken here\r\n"


def fault_injection(engine: FaultEngine, certificates: Certificates | None = None) -> Component:
    """Return the component that gives each connection an injector (`penstock.app.Overrides.components`).

    `certificates` are those whose authority the clients trust; without them, the client of a TLS fault does not know
    the authority either.
    """
    magic = Magic()
    used = certificates or Certificates(["localhost", "127.0.0.1", "::1"])
    prefixes = WATCHED_PREFIXES if engine.has_magic else None

    def attach(connection: Connection) -> None:
        pattern = connection.listener.session
        if pattern.watched_prefixes != prefixes:
            pattern.watch(prefixes)  # for all later connections of the listener
            connection.session.watch(prefixes)
        connection.faults = FaultInjector(connection, engine, magic, used)

    return attach


class _Text:
    """State of the text of one message."""

    __slots__ = ("head", "number", "octets", "stops")

    def __init__(self, number: int, stops: Sequence[int]) -> None:
        self.number = number
        """The number of the text on its connection; 0 for none."""
        self.stops = stops
        """Offsets at which the engine is asked."""
        self.octets = 0
        """Octets received."""
        self.head: bytearray | None = None
        """The start of the text, up to the end of the header; None if it is not needed."""


_NO_TEXT: Final = _Text(0, ())


class FaultInjector:
    """The faults of one connection (penstock.server.connection.Faults)."""

    _has_magic = False
    """A magic recipient was named on this connection."""
    _tls_fault: TlsFault | None = None
    """The fault of the next handshake."""
    _text = _NO_TEXT
    """The text that is being received, if the injector was active at its start; see `_current_text`."""

    def __init__(self, connection: Connection, engine: FaultEngine, magic: Magic, certificates: Certificates) -> None:
        self._connection = connection
        self._session = connection.session
        self._engine = engine
        self._magic = magic
        self._certificates = certificates
        engine.followers.add(self)
        if engine.is_armed:  # otherwise the connection is as `follow` would make it
            self.follow()

    @property
    def are_possible(self) -> bool:
        """Whether a fault is possible before the first command."""
        return self._engine.is_armed

    def follow(self) -> None:
        """Check again whether faults are possible. May be called from any thread."""
        session = self._session
        if self._engine.is_armed or self._has_magic:
            session.auto_accept = 0
            session.intercepted_verbs = INTERCEPTABLE_VERBS
            self._connection.use_sync_handlers(False)
        else:
            pattern = self._connection.listener.session
            session.auto_accept = pattern.auto_accept
            session.intercepted_verbs = pattern.intercepted_verbs
            self._connection.use_sync_handlers(True)

    def close(self) -> None:
        """Forget the connection."""
        self._engine.followers.discard(self)

    # ---- deciding

    def _occasion(self, phase: Phase, *, hello: str | None = None, octets: int = 0, at: int = 0) -> Occasion:
        """Return the state of the session and its message, for the engine."""
        transaction = self._connection.transaction
        return Occasion(
            phase,
            self._connection.peer.address,
            self._connection.number,
            transaction.hello if hello is None else hello,
            transaction.tls is not None,
            None if transaction.sender is None else transaction.sender.text,
            tuple(recipient.path.text for recipient in transaction.recipients),
            octets,
            at=at,
        )

    def _occasion_of_connection(self, phase: Phase, *, hello: str | None = None) -> Occasion:
        """Return the state of the session without its message."""
        occasion = self._occasion(phase, hello=hello)
        occasion.sender, occasion.recipients = None, ()
        return occasion

    def _magic_rules(self, phase: Phase) -> Sequence[Rule]:
        """Return the rules requested by the recipients of the message."""
        if not self._has_magic:
            return ()
        rules = (self._magic.rule(recipient.path.local) for recipient in self._connection.transaction.recipients)
        return [rule for rule in rules if rule is not None and rule.phase == phase]

    # ---- the events

    async def handle(self, event: Event) -> None:
        """Handle an event: ask the engine, and apply its decision."""
        if isinstance(event, Rcpt):
            await self._handle_rcpt(event)
        elif isinstance(event, BeginData):
            await self._handle_begin_data(event)
        elif isinstance(event, BodyChunk):
            await self._handle_chunk(event)
        elif isinstance(event, EndOfMessage):
            await self._handle_end_of_message(event)
        else:
            decision = self._decide(event)
            if decision is None:
                await self._connection.handle(event)
            else:
                await self._apply(decision, event)
        if not self._connection.is_receiving:
            self._text = _NO_TEXT  # ended by its last octet, RSET, EHLO, STARTTLS or a disconnect

    def _decide(self, event: Event) -> Decision | None:
        """Ask the engine about an event that needs nothing but the occasion."""
        if isinstance(event, Hello):
            occasion = self._occasion("helo" if event.verb == "HELO" else "ehlo", hello=event.name)
            occasion.sender = None  # EHLO in a transaction is no message
            return self._engine.decide(occasion)
        if isinstance(event, Mail):
            occasion = self._occasion("mail", octets=event.parameters.size or 0)
            occasion.sender = event.path.text
            return self._engine.decide(occasion)
        if isinstance(event, StartTls):
            decision = self._engine.decide(self._occasion_of_connection("starttls"))
            if decision is None and self._tls_fault is not None and self._tls_fault not in FAULTY_CONTEXTS:
                return Decision(tls=self._tls_fault, has_verdict=True)  # decided by a rule of phase connect
            return decision
        if isinstance(event, Auth | Quit):
            return self._engine.decide(self._occasion_of_connection("auth" if isinstance(event, Auth) else "quit"))
        if isinstance(event, Command):
            phase: Any = event.verb.lower()
            return self._engine.decide(self._occasion_of_connection(phase))
        return None

    async def _handle_rcpt(self, event: Rcpt) -> None:
        path = event.recipient.path
        rule = None
        if self._engine.has_magic and path.local.startswith(WATCHED_PREFIXES):
            rule = self._magic.rule(path.local)
            if rule is not None and not self._has_magic:
                self._has_magic = True
                self.follow()
        occasion = self._occasion("rcpt", octets=self._connection.transaction.parameters.size or 0)
        occasion.recipients = (path.text,)
        magic = (rule,) if rule is not None and rule.phase == "rcpt" else ()
        decision = self._engine.decide(occasion, magic)
        if decision is None:
            await self._connection.handle(event)
        else:
            await self._apply(decision, event)

    async def _handle_begin_data(self, event: BeginData) -> None:
        stops = self._engine.stops()
        if self._magic_rules("body") and 0 not in stops:
            stops = [0, *stops]
        occasion = self._occasion("data", octets=event.size or 0)
        occasion.is_chunk = VERBS[self._session.last_verb] == "BDAT"
        decision = self._engine.decide(occasion, self._magic_rules("data"))
        if decision is None and 0 not in stops:
            await self._connection.handle(event)
            self._begin_text(stops)
            return
        await self._apply(decision or Decision(), event)
        if self._connection.is_receiving:
            self._begin_text(stops)
            await self._pass_stops(self._text)

    def _begin_text(self, stops: Sequence[int]) -> None:
        """Request the octets of the text, if a rule or the log needs an offset or a field of it."""
        self._text = text = _Text(self._text_number(), stops)
        if self._engine.header or self._engine.receipts.wants_message_ids:
            text.head = bytearray()
        if text.head is not None or any(stops):
            self._session.wire.discard = False

    def _text_number(self) -> int:
        return self._connection.texts + self._connection.pump.texts

    def _current_text(self) -> _Text:
        """Return the text that is being received; `_NO_TEXT` if it began while no fault was possible."""
        return self._text if self._text.number == self._text_number() else _NO_TEXT

    async def _handle_chunk(self, event: BodyChunk) -> None:
        text = self._current_text()
        if text is not _NO_TEXT:
            text.octets += len(event.data)
            if text.head is not None and len(text.head) < _MAX_HEADER:
                text.head += event.data[: _MAX_HEADER - len(text.head)]
            await self._pass_stops(text)
        if self._connection.is_receiving:
            await self._connection.handle(event)

    async def _pass_stops(self, text: _Text) -> None:
        """Inject the faults whose offsets have been reached."""
        while text.stops and text.octets >= text.stops[0] and self._connection.is_receiving:
            at, *text.stops = text.stops
            magic = self._magic_rules("body") if not at else ()
            occasion = self._occasion("body", at=at)
            occasion.message_id = self._message_id(text)
            decision = self._engine.decide(occasion, magic)
            if decision is not None:
                await self._apply(decision, None)

    async def _handle_end_of_message(self, event: EndOfMessage) -> None:
        text = self._current_text()
        occasion = self._occasion("dot", octets=event.size)
        occasion.message_id = self._message_id(text)
        occasion.header = self._number_in_header(text)
        decision = self._engine.decide(occasion, self._magic_rules("dot"))
        refuses = decision is not None and decision.has_verdict and not decision.keeps and not _accepts(decision)
        if not refuses:
            self._engine.taken(occasion)
        if decision is None:
            await self._connection.handle(event)
        else:
            await self._apply(decision, event)

    def _message_id(self, text: _Text) -> str:
        """Return the Message-ID, as far as the header has arrived, if the log wants it."""
        if not text.head or not self._engine.receipts.wants_message_ids:
            return ""
        return message_id_of(bytes(text.head.partition(b"\r\n\r\n")[0]))

    def _number_in_header(self, text: _Text) -> str:
        """Return the value of the field that the plan looks for; "" without it."""
        if not text.head or not self._engine.header:
            return ""
        pattern = rb"^%b[ \t]*:[ \t]*([^\r\n]*)" % re.escape(self._engine.header).encode()
        found = re.search(pattern, text.head.partition(b"\r\n\r\n")[0], re.IGNORECASE | re.MULTILINE)
        return "" if found is None else found[1].decode("ascii", "replace").strip()

    # ---- before the first command

    async def open(self) -> None:
        """Apply the faults of phase connect, before admission. Raise BrokenResourceError to end the connection."""
        decision = self._engine.decide(self._occasion_of_connection("connect"))
        if decision is None:
            return
        await self._pace_and_delay(decision)
        if decision.tls is not None:
            await self._fail_implicit_tls(decision.tls)
        if decision.end is not None or decision.reply is not None:
            if self._connection.metrics is not None:
                self._connection.metrics.count_replies([(b"", "none")])
            await self._break_off(decision.end or "drop")

    async def greet(self) -> bool:
        """Apply the faults of phase banner. Return False if the client was refused."""
        decision = self._engine.decide(self._occasion_of_connection("banner"))
        if decision is None:
            return True
        self._uncount(self._connection.listener.extensions.greeting)
        greeting = self._session.take_output()
        await self._pace_and_delay(decision)
        if decision.reply is not None and decision.reply.accepts:
            greeting = decision.reply.encoded
        elif decision.reply is not None:
            greeting = self._close_with(decision.reply)
        await self._send_reply(greeting, decision)
        return self._session.state is not State.CLOSED

    async def _fail_implicit_tls(self, fault: TlsFault) -> None:
        """Inject the fault into a handshake that begins with the connection; keep it for a later one."""
        if fault in FAULTY_CONTEXTS or not self._connection.listener.is_implicit_tls:
            self._tls_fault = fault
            return
        self._count_failed_handshake()
        if fault == "plaintext":
            await self._connection.send(_IN_PLACE_OF_HELLO)
        await self._break_off("stall" if fault == "stall" else "drop")

    def _count_failed_handshake(self) -> None:
        if self._connection.metrics is not None:
            self._connection.metrics.begin_tls()  # and will not be completed

    # ---- applying a decision

    async def _apply(self, decision: Decision, event: Event | None) -> None:
        """Apply a decision, then handle the rest of the event. None: an offset within a body."""
        earlier, output = self._take_output(event)
        if event is None and self._connection.metrics is not None:
            self._connection.metrics.pause_text()
        await self._connection.send(earlier)
        await self._pace_and_delay(decision)
        if decision.tls is not None:
            await self._fail_starttls(decision.tls, event)
        elif decision.has_verdict:
            output = await self._answer_uncounted(decision, event) or output
            await self._send_reply(output, decision, is_awaited=event is not None)
            if self._session.state is State.TLS:
                await self._connection.start_tls()
        else:
            if output:
                await self._send_reply(output, decision)
            if event is not None:
                await self._connection.handle(event)

    def _take_output(self, event: Event | None) -> tuple[bytes, bytes]:
        """Return the replies to earlier commands, and that to this one where the session has made it already (QUIT)."""
        if not isinstance(event, Quit):
            return self._session.take_output(), b""
        bye = replies.BYE.encoded
        self._uncount(bye)
        return self._session.take_output().removesuffix(bye), bye

    def _uncount(self, encoded: bytes) -> None:
        """Count a reply only when it is sent, in the form in which it is sent."""
        if self._connection.metrics is not None:
            self._connection.metrics.uncount(encoded)

    async def _answer_uncounted(self, decision: Decision, event: Event | None) -> bytes:
        """Answer an event while no reply is counted; `_send_reply` has to follow, which reports what is sent."""
        metrics = self._connection.metrics
        if metrics is None:
            return await self._answer(decision, event)
        metrics.suspend()
        try:
            return await self._answer(decision, event)
        except BaseException:
            metrics.count_replies([])
            raise

    async def _answer(self, decision: Decision, event: Event | None) -> bytes:
        """Answer an event, and return the reply that is to be sent."""
        reply, session = decision.reply, self._session
        if event is None or isinstance(event, Quit):
            return self._reply_early(reply, event)
        ends_silently = decision.end is not None and reply is None and decision.corruption is None
        if ends_silently and not decision.keeps:
            return b""  # the connection ends without a reply
        if reply is not None and not reply.accepts and not decision.keeps:
            self._refuse(reply, event)
            return session.take_output()
        if isinstance(event, StartTls):
            session.reply(reply or replies.GO_AHEAD_TLS)
            if session.state is State.TLS:
                self._connection.drop_message("STARTTLS")  # RFC 3207 4.2: between two BDATs it ends the message
            return session.take_output()
        await self._connection.handle(event)
        output = session.take_output()
        if ends_silently:
            return b""
        if reply is None:
            return output
        return reply.encoded * len(complete_replies(output))  # in LMTP there is one per recipient

    def _reply_early(self, reply: Reply | None, event: Event | None) -> bytes:
        """Return what is sent within a body, or in place of the 221."""
        if reply is None:
            return b""
        if event is None:
            self._connection.drop_message(reply.text, will_be_refused=not reply.accepts)
            self._session.close_with(reply)
            return self._session.take_output()
        return reply.encoded

    def _close_with(self, reply: Reply) -> bytes:
        """Refuse a client in place of the greeting. Return what is to be sent."""
        metrics = self._connection.metrics
        if metrics is not None:
            metrics.suspend()
        self._session.close_with(reply)
        if metrics is not None:
            metrics.phase = _BANNER  # the session has counted it as a reply to no command
        return self._session.take_output()

    def _refuse(self, reply: Reply, event: Event) -> None:
        """Refuse what an event asks for."""
        connection = self._connection
        if isinstance(event, EndOfMessage):
            incoming, connection.incoming = connection.incoming, None
            connection.pump.is_counting = False
            if incoming is not None:
                incoming.close()
            connection.journal_refusal(reply)
            connection.session.reply(reply)
        elif isinstance(event, Mail):
            connection.refuse(reply, event.path.text)
        elif isinstance(event, Rcpt):
            connection.refuse(reply, event.recipient.path.text)
        else:
            connection.refuse(reply, "")

    async def _send_reply(self, output: bytes, decision: Decision, *, is_awaited: bool = True) -> None:
        """Send a reply as decided, and end the connection if decided.

        `is_awaited` says that the client waits for a reply, so that the end of the connection comes in place of one.
        """
        is_sent = bool(output) and (
            decision.end is None or decision.reply is not None or decision.corruption is not None
        )
        ordinary = complete_replies(output)
        if is_sent and decision.corruption is not None:
            output = corrupt(output, decision.corruption, decision.random_bits)
        metrics = self._connection.metrics
        if metrics is not None and is_sent:
            metrics.count_replies(
                [(each, None if each in ordinary else decision.corruption) for each in complete_replies(output)]
            )
            metrics.before_sending(len(output))
        elif metrics is not None and decision.end is not None and is_awaited:
            metrics.count_replies([(b"", "none")])
        elif metrics is not None:
            metrics.count_replies([])
        if is_sent:
            await self._connection.send(output)
        if decision.end is not None:
            await self._break_off(decision.end)

    async def _fail_starttls(self, fault: TlsFault, event: Event | None) -> None:
        """Reply to STARTTLS, and inject the fault into the handshake."""
        if fault == "refuse":
            self._connection.refuse(replies.TLS_UNAVAILABLE, "")
            return
        if fault in FAULTY_CONTEXTS:
            self._tls_fault = fault
            assert event is not None
            await self._connection.handle(event)
            return
        self._session.reply(replies.GO_AHEAD_TLS)
        await self._connection.send_output()
        self._count_failed_handshake()
        if fault == "plaintext":
            await self._connection.send(_IN_PLACE_OF_HELLO)
            await self._break_off("drop")
        await self._break_off("stall")

    def tls_context(self, ordinary: ssl.SSLContext) -> ssl.SSLContext:
        """Return the context for the next handshake."""
        fault, self._tls_fault = self._tls_fault, None
        return self._certificates.context(fault) if fault in FAULTY_CONTEXTS else ordinary

    # ---- waiting and ending

    async def _pace_and_delay(self, decision: Decision) -> None:
        if decision.sets_pace:
            self._set_pace(decision)
        if decision.delay:
            await self._connection.pause(decision.delay)

    def _set_pace(self, decision: Decision) -> None:
        """Read and write at a pace from now on."""
        inner = self._innermost()
        if isinstance(inner, SocketStream) and decision.read_rate:
            with suppress(OSError):
                inner.set_option(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_WINDOW)
        stream: trio.abc.Stream = self._connection.stream
        if isinstance(stream, trio.SSLStream):
            stream = stream.transport_stream
        if not isinstance(stream, PacedStream):
            stream = PacedStream(stream)
            self._connection.use_stream(stream)
        stream.read_rate = decision.read_rate or stream.read_rate
        stream.write_rate = decision.write_rate or stream.write_rate
        stream.split = decision.split or stream.split

    def _innermost(self) -> trio.abc.Stream:
        """Return the stream below TLS and pace."""
        stream: trio.abc.Stream = self._connection.stream
        while isinstance(stream, PacedStream | trio.SSLStream):
            stream = stream.stream if isinstance(stream, PacedStream) else stream.transport_stream
        return stream

    async def _break_off(self, how: Ending) -> None:
        """End the connection. Raise BrokenResourceError, always."""
        stream = self._innermost()
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, OSError):
            if how == "stall":
                await self._stall(stream)
            elif how == "half-close" and isinstance(stream, trio.abc.HalfCloseableStream):
                await stream.send_eof()
                with trio.move_on_after(self._engine.longest_stall):
                    await self._connection.drain(stream)
            elif how == "reset" and isinstance(stream, SocketStream):
                stream.set_option(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        if isinstance(stream, SocketStream):
            stream.close_nowait()
        else:
            await stream.aclose()
        raise trio.BrokenResourceError(f"a fault: {how}")

    async def _stall(self, stream: trio.abc.Stream) -> None:
        """Keep silent until the client leaves, but no longer than the plan allows."""
        until = trio.current_time() + self._engine.longest_stall
        while (left := until - trio.current_time()) > 0:
            await self._connection.pause(min(left, _HANG_UP_CHECK))
            if isinstance(stream, SocketStream) and stream.has_hung_up:
                return


def _accepts(decision: Decision) -> bool:
    """Return whether a message is accepted although something goes wrong at its end."""
    if decision.reply is not None:
        return decision.reply.accepts
    return decision.corruption is not None
