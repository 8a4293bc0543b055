"""A connection that misbehaves as its engine says.

As long as nothing may go wrong it answers like any other: the compiled session accepts by itself, and asks only about
recipients that begin like magic ones. Once there is a plan, or something was asked for, every event is put to the
engine first; what it decides is done here. A fault that waits gives the connection a task, others need none.

Replies that go out wrong are made by letting the ordinary handler answer, and changing the octets before they are
sent: so the state of the session is that of the ordinary answer, whatever its client makes of it. The receipts have
what was sent: while such an answer is made the metrics is held, and what goes out is told to it.
"""

from __future__ import annotations

import re
import socket
import ssl
import struct
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, ClassVar, Final

import trio

from penstock import reply as replies
from penstock.message import Message
from penstock.metrics._session import PHASES as COUNTED_PHASES
from penstock.net.stream import SocketStream
from penstock.reply import Reply
from penstock.server.connection import Connection
from penstock.sink.certificates import SPOILED_CONTEXTS, Certificates
from penstock.sink.corrupt import dress, readable
from penstock.sink.faults import Decision, FaultEngine, Occasion, Rule
from penstock.sink.magic import WATCHED_PREFIXES, Magic
from penstock.sink.pace import PacedStream
from penstock.sink.plan import Ending, Phase, TlsFault
from penstock.smtp._wire import VERBS
from penstock.smtp.events import (
    Auth,
    BeginData,
    BodyChunk,
    Command,
    EndOfMessage,
    Hello,
    Mail,
    Quit,
    Rcpt,
    StartTls,
)
from penstock.smtp.server import INTERCEPTABLE_VERBS, NO_VERBS
from penstock.smtp.states import State

_LINGER_ZERO: Final = struct.pack("ii", 1, 0)
"""SO_LINGER of no seconds: close(2) then resets the connection."""
_SMALL_WINDOW: Final = 4096
"""SO_RCVBUF of a client that is read slowly; otherwise the kernel would take megabytes off it."""
_LOOK: Final = 1.0
"""Seconds between two looks whether a stalled client has left."""
_MOST_HEAD: Final = 65_536
"""Octets of a header in which a number is looked for."""
_BANNER: Final = COUNTED_PHASES.index("banner")
_IN_PLACE_OF_HELLO: Final = b"554 5.7.0 TLS is broken here\r\n"

Handlers = dict[type, Callable[[Any, Any], Coroutine[Any, Any, None] | None]]


class FaultyConnection(Connection):
    """Made by `faulty`, which gives it its engine."""

    engine: ClassVar[FaultEngine]
    magic: ClassVar[Magic]
    certificates: ClassVar[Certificates]
    ordinary: ClassVar[Handlers]
    """The handlers of a connection to which nothing happens. `handlers` has magic recipients put to the engine."""
    armed: ClassVar[Handlers]
    """The handlers that ask the engine."""

    # As in Connection, what most never change stands in the class.
    _calmly_unasked: int | None = None
    """What the session accepts by itself while nothing may go wrong; None before anything did."""
    _has_magic = False
    """A magic recipient was named on this connection."""
    _is_pausing = False
    _spoiler: TlsFault | None = None
    _stops: Sequence[int] = ()
    """Octets of the body at which there is something to decide."""
    _passed = 0
    """Octets of the body that have come."""
    _head: bytearray | None = None
    """The header of the message, when its number stands there."""

    def follow(self) -> None:
        """Look again whether faults are wanted. May be called in any thread."""
        session = self._session
        if self._calmly_unasked is None:
            self._calmly_unasked = session.unasked
        if self.engine.is_armed or self._has_magic:
            session.unasked = 0
            session.intercepted_verbs = INTERCEPTABLE_VERBS
            self._handlers = self.armed
        else:
            session.unasked = self._calmly_unasked
            session.intercepted_verbs = NO_VERBS
            self._handlers = self.handlers

    def start(self) -> bool:
        """Begin without a task, unless the beginning may go wrong."""
        engine = self.engine
        if engine.is_armed:
            self.follow()
            if engine.watches("connect") or engine.watches("banner"):
                return False
        return super().start()

    def check_clocks(self, now: float) -> None:
        """Look at the clocks, which stand still while the client is kept waiting on purpose."""
        if not self._is_pausing or self._host.is_stopping:
            super().check_clocks(now)

    # ---- asking

    def _occasion(self, phase: Phase, *, hello: str | None = None, octets: int = 0, at: int = 0) -> Occasion:
        """Return what is known of the session."""
        transaction = self._transaction
        return Occasion(
            phase,
            self._peer.address,
            self.number,
            transaction.hello if hello is None else hello,
            transaction.tls is not None,
            None if transaction.sender is None else transaction.sender.text,
            tuple(recipient.path.text for recipient in transaction.recipients),
            octets,
            at=at,
        )

    def _magic_rules(self, phase: Phase) -> Sequence[Rule]:
        """Return what the recipients of the message ask for."""
        if not self._has_magic:
            return ()
        rules = (self.magic.rule(recipient.path.local) for recipient in self._transaction.recipients)
        return [rule for rule in rules if rule is not None and rule.phase == phase]

    def _meet(self, occasion: Occasion, event: object, magic: Sequence[Rule] = ()) -> Coroutine[Any, Any, None] | None:
        """Answer an event as the engine says."""
        decision = self.engine.decide(occasion, magic)
        if decision is None:
            return self.ordinary[type(event)](self, event)
        return self._suffer(decision, event)

    # ---- the events

    def _on_hello_or_fault(self, event: Hello) -> Coroutine[Any, Any, None] | None:
        phase: Phase = "helo" if event.verb == "HELO" else "ehlo"
        occasion = self._occasion(phase, hello=event.name)
        occasion.sender = None  # EHLO in a transaction is no message
        return self._meet(occasion, event)

    def _on_starttls_or_fault(self, event: StartTls) -> Coroutine[Any, Any, None] | None:
        decision = self.engine.decide(self._of_connection("starttls"))
        if decision is None and self._spoiler is not None and self._spoiler not in SPOILED_CONTEXTS:
            decision = Decision(tls=self._spoiler, has_verdict=True)  # as a rule of phase connect has said
        return self.ordinary[StartTls](self, event) if decision is None else self._suffer(decision, event)

    def _on_auth_or_fault(self, event: Auth) -> Coroutine[Any, Any, None] | None:
        return self._meet(self._of_connection("auth"), event)

    def _on_quit_or_fault(self, event: Quit) -> Coroutine[Any, Any, None] | None:
        return self._meet(self._of_connection("quit"), event)

    def _of_connection(self, phase: Phase) -> Occasion:
        """Return what is known of the session where its message does not matter."""
        occasion = self._occasion(phase)
        occasion.sender, occasion.recipients = None, ()
        return occasion

    def _on_command(self, event: Command) -> Coroutine[Any, Any, None] | None:
        """Do what RSET, NOOP, VRFY, EXPN or HELP ask for."""
        aborted = self._session.obey()
        return None if aborted is None else self.ordinary[type(aborted)](self, aborted)

    def _on_command_or_fault(self, event: Command) -> Coroutine[Any, Any, None] | None:
        phase: Any = event.verb.lower()
        decision = self.engine.decide(self._of_connection(phase))
        return self._on_command(event) if decision is None else self._suffer(decision, event)

    def _on_mail_or_fault(self, event: Mail) -> Coroutine[Any, Any, None] | None:
        occasion = self._occasion("mail", octets=event.parameters.size or 0)
        occasion.sender = event.path.text
        return self._meet(occasion, event)

    def _on_rcpt_or_magic(self, event: Rcpt) -> Coroutine[Any, Any, None] | None:
        """See whether a recipient that looks like magic is: from then on, this connection asks the engine."""
        if self.magic.rule(event.recipient.path.local) is None:
            return self.ordinary[Rcpt](self, event)
        self._has_magic = True
        self.follow()
        return self._on_rcpt_or_fault(event)

    def _on_rcpt_or_fault(self, event: Rcpt) -> Coroutine[Any, Any, None] | None:
        path = event.recipient.path
        occasion = self._occasion("rcpt", octets=self._transaction.parameters.size or 0)
        occasion.recipients = (path.text,)
        rule = None
        if self.engine.has_magic and path.local.startswith(WATCHED_PREFIXES):
            rule = self.magic.rule(path.local)
            self._has_magic = self._has_magic or rule is not None
        magic = (rule,) if rule is not None and rule.phase == "rcpt" else ()
        return self._meet(occasion, event, magic)

    def _on_begin_or_fault(self, event: BeginData) -> Coroutine[Any, Any, None] | None:
        self._stops = self.engine.stops()
        if self._magic_rules("body") and 0 not in self._stops:
            self._stops = [0, *self._stops]
        self._passed = 0
        occasion = self._occasion("data", octets=event.size or 0)
        occasion.is_chunk = VERBS[self._session.last_verb] == "BDAT"
        decision = self.engine.decide(occasion, self._magic_rules("data"))
        if decision is None and 0 not in self._stops:
            pending = self.ordinary[BeginData](self, event)
            self._look_into_body()
            return pending
        return self._begin(decision, event)

    async def _begin(self, decision: Decision | None, event: BeginData) -> None:
        """Begin a message where something goes wrong."""
        await self._suffer(decision or Decision(), event)
        if self._is_in_message:
            self._look_into_body()
            await self._pass_stops()

    def _look_into_body(self) -> None:
        """Have the body come here, where somebody waits for an octet or a field of it."""
        self._head = bytearray() if self.engine.header else None
        if self._head is not None or any(self._stops):
            self._wire.discard = False

    def _on_chunk_or_fault(self, event: BodyChunk) -> Coroutine[Any, Any, None] | None:
        self._passed += len(event.data)
        if self._head is not None and len(self._head) < _MOST_HEAD:
            self._head += event.data[: _MOST_HEAD - len(self._head)]
        if self._stops and self._passed >= self._stops[0]:
            return self._take_chunk(event)
        return self.ordinary[BodyChunk](self, event)

    async def _take_chunk(self, event: BodyChunk) -> None:
        await self._pass_stops()
        if self._is_in_message:
            await _complete(self.ordinary[BodyChunk](self, event))

    async def _pass_stops(self) -> None:
        """Do what goes wrong at the octets that have been reached."""
        while self._stops and self._passed >= self._stops[0] and self._is_in_message:
            at, *self._stops = self._stops
            decision = self.engine.decide(self._occasion("body", at=at), self._magic_rules("body") if not at else ())
            if decision is not None:
                await self._suffer(decision, None)

    def _on_end_or_fault(self, event: EndOfMessage) -> Coroutine[Any, Any, None] | None:
        occasion = self._occasion("dot", octets=event.size)
        occasion.header = self._number_in_header()
        decision = self.engine.decide(occasion, self._magic_rules("dot"))
        refuses = decision is not None and decision.has_verdict and not decision.keeps and not _lets_through(decision)
        if not refuses:
            self.engine.taken(occasion)
        return self.ordinary[EndOfMessage](self, event) if decision is None else self._suffer(decision, event)

    def _settle(self, message: Message, reply: Reply) -> None:
        """Answer a message that was handed over. The receipts have it even when its client has left meanwhile."""
        is_alone = self._has_ended or self._session.state is State.CLOSED
        super()._settle(message, reply)
        if is_alone and reply.accepts and self._metrics is not None:
            self._metrics.takes_unheard(self._transaction, message.body.size)

    def _number_in_header(self) -> str:
        """Return the value of the field that the plan looks for; "" without it."""
        head, self._head = self._head, None
        if not head:
            return ""
        pattern = rb"^%b[ \t]*:[ \t]*([^\r\n]*)" % re.escape(self.engine.header).encode()
        found = re.search(pattern, head.partition(b"\r\n\r\n")[0], re.IGNORECASE | re.MULTILINE)
        return "" if found is None else found[1].decode("ascii", "replace").strip()

    # ---- before the first command

    async def _open(self) -> bool:
        if self.engine.is_armed:
            self.follow()
        decision = self.engine.decide(self._of_connection("connect"))
        if decision is not None:
            await self._pace_and_delay(decision)
            if decision.tls is not None:
                await self._spoil_implicit_tls(decision.tls)
            if decision.end is not None or decision.reply is not None:
                if self._metrics is not None:
                    self._metrics.says([(b"", "none")])
                await self._break_off(decision.end or "drop")
        if not await super()._open():
            return False
        decision = self.engine.decide(self._of_connection("banner"))
        if decision is None:
            return True
        self._take_back(self._listener.offer.greeting)
        greeting = self._session.data_to_send()
        await self._pace_and_delay(decision)
        if decision.reply is not None and decision.reply.accepts:
            greeting = decision.reply.encoded
        elif decision.reply is not None:
            greeting = self._close_with(decision.reply)
        await self._send_wrong(greeting, decision)
        return self._session.state is not State.CLOSED

    async def _spoil_implicit_tls(self, fault: TlsFault) -> None:
        """Do what spoils a handshake that begins with the connection; for a later one, remember it."""
        if fault in SPOILED_CONTEXTS or not self._listener.is_implicit_tls:
            self._spoiler = fault
            return
        self._handshake_fails()
        if fault == "plaintext":
            await self._flush(_IN_PLACE_OF_HELLO)
        await self._break_off("stall" if fault == "stall" else "drop")

    def _handshake_fails(self) -> None:
        """Have a handshake counted that does not come to its end."""
        if self._metrics is not None:
            self._metrics.tls_begins()

    # ---- what goes wrong

    async def _suffer(self, decision: Decision, event: object) -> None:
        """Do what the engine has decided, then what the event asks for, as far as that is left of it."""
        earlier, said = self._take_said(event)
        if event is None and self._metrics is not None:
            self._metrics.pauses_text()
        await self._flush_wire(earlier)
        await self._pace_and_delay(decision)
        if decision.tls is not None:
            await self._spoil_starttls(decision.tls, event)
        elif decision.has_verdict:
            is_awaited = event is not None
            said = await self._answer_held(decision, event) or said
            await self._send_wrong(said, decision, is_awaited=is_awaited)
            if self._session.state is State.TLS:
                await self._start_tls()
        else:
            if said:
                await self._send_wrong(said, decision)
            if event is not None:
                await self._do(event)

    def _take_said(self, event: object) -> tuple[bytes, bytes]:
        """Return the replies to earlier commands, and the one to this command where the session has made it already."""
        if not isinstance(event, Quit):
            return self._session.data_to_send(), b""
        bye = replies.BYE.encoded
        self._take_back(bye)
        return self._session.data_to_send().removesuffix(bye), bye

    def _take_back(self, encoded: bytes) -> None:
        """Have a reply counted only when it is sent, as it is sent."""
        if self._metrics is not None:
            self._metrics.takes_back(encoded)

    async def _do(self, event: object) -> None:
        """Answer an event as if nothing were wrong."""
        if isinstance(event, Command):
            await _complete(self._on_command(event))
        else:
            self._takes_turns = False  # the reply is wanted now
            await _complete(self.ordinary[type(event)](self, event))

    async def _answer_held(self, decision: Decision, event: object) -> bytes:
        """Answer an event, while no reply is counted: `_send_wrong` has to follow, which tells what is sent."""
        metrics = self._metrics
        if metrics is None:
            return await self._answer(decision, event)
        metrics.hold()
        try:
            return await self._answer(decision, event)
        except BaseException:
            metrics.says([])
            raise

    async def _answer(self, decision: Decision, event: object) -> bytes:
        """Answer an event, and return the reply that is to be sent."""
        reply = decision.reply
        if event is None or isinstance(event, Quit):
            return self._answer_unasked(reply, event)
        if decision.end is not None and reply is None and decision.dress is None and not decision.keeps:
            return b""  # the end is all that the client hears
        if reply is not None and not reply.accepts and not decision.keeps:
            self._turn_down(reply, event)
            return self._session.data_to_send()
        if isinstance(event, StartTls):
            self._session.reply(reply or replies.GO_AHEAD_TLS)
            return self._session.data_to_send()
        await self._do(event)
        said = self._session.data_to_send()
        if decision.end is not None and reply is None and decision.dress is None:
            return b""
        return said if reply is None else reply.encoded * len(readable(said))  # in LMTP there is one a recipient

    def _answer_unasked(self, reply: Reply | None, event: object) -> bytes:
        """Return what is said in the midst of a body, or in the place of the 221."""
        if reply is None:
            return b""
        if event is None:
            self._drop_body(reply.text, will_be_refused=not reply.accepts)
            self._session.close_with(reply)
            return self._session.data_to_send()
        return reply.encoded

    def _close_with(self, reply: Reply) -> bytes:
        """Refuse a client in the place of the greeting. Return what is to be sent."""
        metrics = self._metrics
        if metrics is not None:
            metrics.hold()
        self._session.close_with(reply)
        if metrics is not None:
            metrics.phase = _BANNER  # the session took it for words that nobody has asked for
        return self._session.data_to_send()

    def _turn_down(self, reply: Reply, event: object) -> None:
        """Refuse what an event asks for."""
        if isinstance(event, EndOfMessage):
            self._is_in_message = False
            if self._body is not None:
                self._body.discard()
                self._body = None
            self._journal_refusal(reply)
            self._say(reply)
        elif isinstance(event, Mail):
            self._refuse(reply, event.path.text)
        elif isinstance(event, Rcpt):
            self._refuse(reply, event.recipient.path.text)
        else:
            self._refuse(reply, "")

    async def _send_wrong(self, said: bytes, decision: Decision, *, is_awaited: bool = True) -> None:
        """Send a reply as it is meant to go out, and end the connection when that is meant, too.

        `is_awaited` says that the client waits for a reply, so that the end of the connection is in the place of one.
        """
        is_said = bool(said) and (decision.end is None or decision.reply is not None or decision.dress is not None)
        ordinary = readable(said)
        if is_said and decision.dress is not None:
            said = dress(said, decision.dress, decision.drawn)
        metrics = self._metrics
        if metrics is not None and is_said:
            metrics.says([(each, None if each in ordinary else decision.dress) for each in readable(said)])
            metrics.sends(len(said))
        elif metrics is not None and decision.end is not None and is_awaited:
            metrics.says([(b"", "none")])
        elif metrics is not None:
            metrics.says([])
        if is_said:
            await self._flush_wire(said)
        if decision.end is not None:
            await self._break_off(decision.end)

    async def _spoil_starttls(self, fault: TlsFault, event: object) -> None:
        """Answer STARTTLS, and spoil what follows."""
        if fault == "refuse":
            self._refuse(replies.TLS_UNAVAILABLE, "")
            return
        if fault in SPOILED_CONTEXTS:
            self._spoiler = fault
            await self._do(event)
            return
        self._session.reply(replies.GO_AHEAD_TLS)
        await self._flush_replies()
        self._handshake_fails()
        if fault == "plaintext":
            await self._flush(_IN_PLACE_OF_HELLO)
            await self._break_off("drop")
        await self._break_off("stall")

    def _tls_context(self) -> ssl.SSLContext:
        spoiler, self._spoiler = self._spoiler, None
        return self.certificates.context(spoiler) if spoiler in SPOILED_CONTEXTS else super()._tls_context()

    # ---- waiting and ending

    async def _pace_and_delay(self, decision: Decision) -> None:
        if decision.sets_pace:
            self._set_pace(decision)
        if decision.delay:
            await self._pause(decision.delay)

    async def _pause(self, seconds: float) -> None:
        """Wait while the clocks of the connection stand still. It is cut short when the server stops."""
        began = trio.current_time()
        self._is_pausing = True
        try:
            await self._wait(trio.sleep(seconds))  # noqa: ASYNC105 - awaited within
        finally:
            self._is_pausing = False
            if self._clocks is not None:  # otherwise they have not begun to run
                self._clocks.stand_still(trio.current_time() - began)

    def _set_pace(self, decision: Decision) -> None:
        """Read and write at a pace from now on. The poller can not, so that the task has to do it."""
        sock = self._socket
        if sock is not None and decision.read_rate:
            with suppress(OSError):
                sock.set_option(socket.SOL_SOCKET, socket.SO_RCVBUF, _SMALL_WINDOW)
        stream = self._stream
        if not isinstance(stream, PacedStream):
            stream = self._stream = PacedStream(stream)
        self._socket = None
        self._takes_turns = False
        stream.read_rate = decision.read_rate or stream.read_rate
        stream.write_rate = decision.write_rate or stream.write_rate
        stream.split = decision.split or stream.split

    async def _receive(self) -> int:
        """Receive, through the TLS of a socket that has got a pace, too."""
        if self._tls is None:
            return await super()._receive()
        data = await self._stream.receive_some()
        self._octets += len(data)
        self._tls.feed(bytes(data))
        if not data or not self._tls.decrypt_into(self._wire.feed):
            return 0
        return len(data)

    async def _flush_wire(self, said: bytes) -> None:
        """Send replies, through TLS where it is active."""
        await self._flush(said if self._tls is None else self._tls.encrypt(said))

    def _innermost(self) -> trio.abc.Stream:
        """Return the stream below TLS and pace."""
        stream: trio.abc.Stream = self._stream
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
                with trio.move_on_after(self.engine.longest_stall):
                    await self._wait_for_end(stream)
            elif how == "reset" and isinstance(stream, SocketStream):
                stream.set_option(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_ZERO)
        if isinstance(stream, SocketStream):
            stream.close_nowait()
        else:
            await stream.aclose()
        raise trio.BrokenResourceError(f"a fault: {how}")

    async def _stall(self, stream: trio.abc.Stream) -> None:
        """Keep silent until the client leaves, but no longer than the plan allows."""
        until = trio.current_time() + self.engine.longest_stall
        while (left := until - trio.current_time()) > 0:
            await self._pause(min(left, _LOOK))
            if isinstance(stream, SocketStream) and stream.has_hung_up:
                return

    async def _wait_for_end(self, stream: trio.abc.Stream) -> None:
        """Read until the client closes, and forget it."""
        self._is_pausing = True
        while await self._wait(stream.receive_some()):
            pass


async def _complete(pending: Coroutine[Any, Any, None] | None) -> None:
    """Await what a handler has left to be awaited."""
    if pending is not None:
        await pending


def _lets_through(decision: Decision) -> bool:
    """Say whether a message is taken although something goes wrong at its dot."""
    if decision.reply is not None:
        return decision.reply.accepts
    return decision.dress is not None


_FAULTY: Final[Handlers] = {
    Hello: FaultyConnection._on_hello_or_fault,
    StartTls: FaultyConnection._on_starttls_or_fault,
    Auth: FaultyConnection._on_auth_or_fault,
    Command: FaultyConnection._on_command_or_fault,
    Mail: FaultyConnection._on_mail_or_fault,
    Rcpt: FaultyConnection._on_rcpt_or_fault,
    BeginData: FaultyConnection._on_begin_or_fault,
    BodyChunk: FaultyConnection._on_chunk_or_fault,
    EndOfMessage: FaultyConnection._on_end_or_fault,
    Quit: FaultyConnection._on_quit_or_fault,
}


def faulty(
    engine: FaultEngine, base: type[Connection] = Connection, certificates: Certificates | None = None
) -> type[Connection]:
    """Return a kind of connection that misbehaves as the engine says, and otherwise is like `base`.

    Give it to `assemble` as the `kind`. `certificates` are those whose authority the clients trust; without them,
    whoever meets a TLS fault does not know the authority either.
    """
    bases = (FaultyConnection,) if base is Connection else (FaultyConnection, base)
    return type(
        "FaultyConnection",
        bases,
        {
            "engine": engine,
            "magic": Magic(),
            "certificates": certificates or Certificates(["localhost", "127.0.0.1", "::1"]),
            "open": engine.followers,
            "watched_prefixes": WATCHED_PREFIXES if engine.has_magic else None,
            "ordinary": base.handlers,
            "handlers": {
                **base.handlers,
                Command: FaultyConnection._on_command,
                Rcpt: FaultyConnection._on_rcpt_or_magic,
            },
            "armed": {**base.handlers, **_FAULTY},
        },
    )
