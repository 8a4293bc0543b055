"""One connection: read this first.

A connection is one task in the nursery of its worker, from the greeting to the close (`Connection.run`). The task
gets the next event and handles it, until the session ends. The session implements the protocol (penstock.smtp.server);
this module decides whether a sender, a recipient or a message is accepted, and where the message goes.

    run -> _open -> next_event <-> HANDLERS[type(event)] -> _close

`next_event` parks the task while the pump (ext/pump.pyx) handles the commands that need no decision. Policies,
passwords and deliveries are awaited here. Nothing is read from the client during that time, so no reply can be lost or
reordered, whenever octets arrive.

Rules
-----
1. Only waits for the client can be interrupted (by a timeout or a shutdown), by `expire`: in `next_event` and `_wait`.
   A commit in progress is completed, and its reply is sent, because the client repeats a message without a reply.
2. Handlers that do not wait are synchronous, named `..._now`; they return False to leave the event to the
   task. Listeners without policies have synchronous handlers for nearly everything.
3. A bug costs one connection: 421 to the client, a traceback in the journal (RFC 5321 3.8).
4. Components are optional and composed: `faults` (the sink's fault plan), `metrics` (statistics), a stream that is
   paced. Without them they cost nothing.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from typing import TYPE_CHECKING, Any, ClassVar, Final, Protocol, TypeVar

import trio

from penstock import reply as replies
from penstock.auth.login import Login
from penstock.message import CountedBody, Message
from penstock.net.proxyline import ProxyError
from penstock.net.proxyline import parse as parse_proxy
from penstock.net.stream import AheadStream, SocketStream
from penstock.net.tls import TlsTurns, tls_info
from penstock.policy.asking import WAIT
from penstock.reply import Reply
from penstock.server._pump import Pump
from penstock.server.deadlines import Deadlines
from penstock.server.incoming import COUNTED, CountedMessage, IncomingMessage
from penstock.server.received import received_field
from penstock.smtp import sasl
from penstock.smtp._wire import VERBS
from penstock.smtp.events import (
    CLOSED,
    NEED_DATA,
    TURN_OVER,
    Auth,
    AuthAborted,
    AuthResponse,
    BeginData,
    BodyChunk,
    Command,
    EndOfMessage,
    Event,
    Hello,
    Mail,
    MessageAborted,
    Quit,
    Rcpt,
    StartTls,
)
from penstock.smtp.states import State
from penstock.transaction import Peer, Transaction

if TYPE_CHECKING:
    from penstock.policy.judge import Judge
    from penstock.server.limits import Admission
    from penstock.server.listener import Listener

_FINAL_REPLY: Final = 5.0
"""Seconds in which the final reply may be sent after a timeout."""
_LINGER: Final = 1.0
"""Seconds for a client that is still sending to read the final reply before the connection is reset."""
_LINGER_OCTETS: Final = 1 << 20
_PROXY_OCTETS: Final = 8192
_READ_OCTETS: Final = 65_536

T = TypeVar("T")
SyncHandlers = dict[type, Callable[["Connection", Any], bool]]


class Host(Protocol):
    """The worker, as used by a connection."""

    connections: set[Connection]
    is_stopping: bool
    admission: Admission

    def ended(self, connection: Connection) -> None:
        """Note that a connection is closed."""


class Faults(Protocol):
    """The component that injects faults (penstock.sink.injector)."""

    @property
    def are_possible(self) -> bool:
        """Return False if no fault can apply before the first command."""

    async def open(self) -> None:
        """Apply faults before the admission. Raise BrokenResourceError to end the connection."""

    async def greet(self) -> bool:
        """Change the greeting that is in the output. Return False when it has refused the client."""

    async def handle(self, event: Event) -> None:
        """Handle an event in place of `Connection.handle`."""

    def tls_context(self, ordinary: ssl.SSLContext) -> ssl.SSLContext:
        """Return the context for the next handshake."""

    def close(self) -> None:
        """Release the connection."""


Component = Callable[["Connection"], object]
"""Called with each new connection: may set its `faults`, or the `observer` of its session."""


class _Dismissed(Exception):  # noqa: N818 - no error, but the end of a wait
    """The connection ends with `final_reply`."""


class Connection:
    """A client, its stream and its session. `run` is the task of one connection."""

    # Attributes that most connections never change are in the class, so that creating a connection costs less.
    faults: Faults | None = None
    incoming: IncomingMessage | CountedMessage | None = None
    """The message whose text is being received; None without one."""
    texts = 0
    """Texts so far, including the one that is being received."""
    messages = 0
    """Messages accepted so far."""
    final_reply: Reply | None = None
    """The final reply, sent at the next wait for the client."""
    _login: Login | None = None
    _clocks: Deadlines | None = None
    _paused = False
    _scope: trio.CancelScope | None = None
    _is_sending = False
    """A reply or a handshake is being sent; after an interruption, only part of it may have been."""
    _received_ahead = b""
    _rest = b""
    """The unsent part of the 221."""

    def __init__(
        self,
        stream: trio.abc.Stream,
        peer: Peer,
        listener: Listener,
        worker: Host,
        number: int = 0,
        network: str | None = None,
    ) -> None:
        """`network` is the one that the limits have counted the client for; otherwise `run` does that."""
        self.stream = stream
        """The stream of the session: the socket, or TLS or a paced stream on top of it."""
        self._socket = stream if type(stream) is SocketStream and stream.has_poller else None
        """The socket stream, if the pump may use it directly; None if all octets go through `stream`."""
        self.peer = peer
        self.listener = listener
        self.worker = worker
        self.number = number
        """The number of the session in the journal."""
        self.transaction = transaction = Transaction(peer, listener.name)
        transaction.number = number
        self.session = session = listener.session.fresh(listener.session.wire.fresh(), transaction)
        self.metrics = metrics = None if listener.metrics is None else listener.metrics.new_session()
        session.metrics = metrics
        self.pump = pump = Pump(session, listener.sync_handlers, self)
        pump.counting = listener.counts
        if worker.is_stopping:
            self.use_sync_handlers(False)
        self._network = network
        self._started = time.monotonic()
        for component in listener.components:
            component(self)

    # ---- the life of a connection

    async def run(self) -> None:
        """Serve the client until the connection ends. Raise only cancellation."""
        cause = "the session ended"
        self.worker.connections.add(self)
        try:
            if await self._open():
                while (event := await self.next_event()) is not None and event is not CLOSED:
                    if self.faults is None:
                        await self.HANDLERS[type(event)](self, event)
                    else:
                        await self.faults.handle(event)
                cause = self._cause(event)
        except _Dismissed:
            assert self.final_reply is not None
            cause = self.final_reply.text
            await self._dismiss(self.final_reply)
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as exc:
            cause = f"connection lost: {exc.__cause__ or exc}"
        except trio.Cancelled:
            cause = "the server stopped"
            self._dismiss_nowait()
            raise
        except Exception as exc:  # noqa: BLE001 - rule 3: whatever it is, it costs this connection and no other
            self.listener.journal.error(self.number, "connection", exc)
            cause = replies.UNEXPECTED.text
            await self._dismiss(replies.UNEXPECTED)
        finally:
            try:
                if not self._leave(cause):
                    await self._close()
            finally:
                self._end(cause)
        if self.listener.pipeline.disconnect:
            await self.listener.pipeline.on_disconnect(self.transaction)

    def _cause(self, last: Event | None) -> str:
        """Return the cause of the end of the session; its last event was CLOSED or None."""
        if last is None:
            return "the client closed the connection"
        return "QUIT" if self.session.has_quit else "the session ended"

    async def handle(self, event: Event) -> None:
        """Handle an event without faults."""
        await self.HANDLERS[type(event)](self, event)

    async def next_event(self) -> Event | None:
        """Return the next event that needs this task; None when the client has closed the connection.

        The output is sent first, together with the replies to further input.
        """
        pump = self.pump
        while True:
            event: Event | None = pump.advance()
            if event is not NEED_DATA and event is not TURN_OVER:
                return event
            output = pump.take_output()
            if output:
                await self._send_octets(output)
            self._check_dismissal()
            if event is TURN_OVER:
                await trio.lowlevel.checkpoint()
            elif self._socket is None:
                if not await self._receive():
                    return None
            elif pump.has_ended:
                return None
            else:
                received = await self._socket.run_turns(pump)
                event = pump.take_event()
                if event is not None:
                    return event
                unsent = self._socket.take_unsent()
                if unsent:
                    await self._send_octets(unsent)
                elif received == 0:
                    return None

    async def _receive(self) -> bool:
        """Receive through the stream, if the pump cannot. Return False at its end."""
        data = await self._wait(self.stream.receive_some, _READ_OCTETS)
        self.pump.feed(data)
        return bool(data)

    def _check_dismissal(self) -> None:
        """Raise _Dismissed if there is a final reply to send."""
        if self.worker.is_stopping and not self.is_receiving:
            self.expire(replies.SHUTTING_DOWN)
        if self.final_reply is not None:
            raise _Dismissed

    async def _wait(self, wait: Callable[..., Awaitable[T]], *arguments: Any) -> T:
        """Wait for the client. Raise _Dismissed if the connection expires during the wait.

        The turns of the pump need no cancel scope: `expire` interrupts them.
        """
        if self.final_reply is None:
            try:
                with trio.CancelScope() as self._scope:
                    return await wait(*arguments)
            finally:  # also when the caller cancels the wait: from then on `expire` interrupts the pump again
                self._scope = None
        raise _Dismissed

    async def _open(self) -> bool:
        """Do everything before the first command. Return False if the connection ends before it."""
        listener, pipeline = self.listener, self.listener.pipeline
        if self.faults is not None and self.faults.are_possible:
            await self.faults.open()
        if listener.proxy_networks and listener.must_announce(self.peer) and not await self._read_proxy():
            return False
        refusal = self._admit() if self._network is None else None
        if refusal is None:
            listener.journal.connected(self.number, self.peer, listener.name)
            if listener.is_implicit_tls:
                await self.start_tls()
            if pipeline.connect:
                refusal = await pipeline.on_connect(self.transaction)
                refusal = refusal if refusal is not None and not refusal.accepts else None
            if refusal is None and pipeline.judge is not None and not listener.is_implicit_tls:
                refusal = await self._wait_in_silence(pipeline.judge)
        if refusal is None:
            self.session.greet()
            return self.faults is None or not self.faults.are_possible or await self.faults.greet()
        listener.journal.rejected_connection(self.number, self.peer, listener.name, refusal)
        if self._network is not None or not listener.is_implicit_tls:  # a reply in clear text would break the handshake
            self.session.greet(refusal)
        return False

    def _admit(self) -> Reply | None:
        """Count the client, which is known by now, or return the refusal."""
        network = self.peer.network
        refusal = self.worker.admission.admit(network)
        if refusal is None:
            self._network = network
        return refusal

    async def _wait_in_silence(self, judge: Judge) -> Reply | None:
        """Delay the greeting (pregreet). Return the refusal if the client sends data before it."""
        found = judge.pregreet_of(self.transaction)
        if found is None:
            return None
        check, seconds = found
        if not self.pump.octets:  # otherwise some came with the PROXY header
            data: bytes | bytearray = b""
            with trio.move_on_after(seconds) as scope:
                data = await self._wait(self.stream.receive_some, _READ_OCTETS)
            if scope.cancelled_caught:
                check.passed(self.transaction)
            if not data:
                return None
            self.pump.feed(data)
        return judge.spoke_early(self.transaction)

    async def _read_proxy(self) -> bool:
        """Read the PROXY header of a trusted proxy; the client it names is the peer from now on."""
        buffer = b""
        while True:
            data = await self._wait(self.stream.receive_some, _PROXY_OCTETS)
            buffer += data
            try:
                line = parse_proxy(buffer)
            except ProxyError as exc:
                refusal = Reply(554, "5.5.0", "Bad PROXY header", cause=str(exc))
                self.listener.journal.rejected_connection(self.number, self.peer, self.listener.name, refusal)
                return False
            if line is not None:
                break
            if not data:
                return False
        rest = buffer[line.consumed :]
        if self.listener.is_implicit_tls:
            self._received_ahead = rest
        else:
            self.pump.feed(rest)
        if not line.is_local:
            self.peer = self.transaction.peer = Peer(
                line.source_address,
                line.source_port,
                line.destination_address,
                line.destination_port,
                proxy=self.peer.address or "unix",
            )
        return True

    # ---- sending

    async def send_output(self) -> None:
        """Send the output of the session and of TLS."""
        await self._send_octets(self.pump.take_output())

    async def send(self, data: bytes) -> None:
        """Send octets, through TLS where it is active."""
        await self._send_octets(data if self.pump.tls is None else self.pump.tls.encrypt(data))

    async def _send_octets(self, data: bytes) -> None:
        """Send octets on this level, without a limit of time."""
        if not data:
            return
        if self._socket is not None:
            sent = self._socket.send_nowait(data)
            if sent == len(data):
                return
            data = data[sent:]
        send = self.stream.send_all if self._socket is None else self._socket.send_now
        self._is_sending = True
        if self.final_reply is None:
            await self._wait(send, data)
        else:  # the connection expires, but the output so far is sent completely
            with trio.move_on_after(_FINAL_REPLY) as scope:
                await send(data)
            if scope.cancelled_caught:
                raise _Dismissed
        self._is_sending = False

    @property
    def is_receiving(self) -> bool:
        """The text of a message is being received."""
        return self.incoming is not None or self.pump.is_counting

    def use_sync_handlers(self, wanted: bool) -> None:
        """Choose whether synchronous handlers handle events without the task."""
        listener, pump = self.listener, self.pump
        if not wanted or self.worker.is_stopping:  # then the task must handle the end of the message
            pump.sync_handlers, pump.counting = {}, None
            return
        pump.sync_handlers = listener.sync_handlers
        pump.counting = listener.counts

    # ---- timeouts and the end

    def expire(self, final_reply: Reply) -> None:
        """End the connection with this reply: now if it waits for the client, otherwise at the next wait."""
        if self.final_reply is None:
            self.final_reply = final_reply
            if self._scope is not None:
                self._scope.cancel()
            elif self._socket is not None:
                self._socket.interrupt()

    def check_deadlines(self, now: float) -> None:
        """End the connection if one of its timeouts has expired."""
        if self._paused and not self.worker.is_stopping:
            return
        # A text that is refused already is still a text: its reply comes at its end.
        text = self.texts + self.pump.texts if self.is_receiving or self.session.in_body else 0
        final_reply = self._deadlines(now).expired(now, self.session.commands, text, self.pump.octets)
        if final_reply is not None:
            self.expire(final_reply)

    def _deadlines(self, now: float) -> Deadlines:
        """Return the timeouts, which start at the first check of the sweeper."""
        if self._clocks is None:
            self._clocks = Deadlines(self.listener.limits, now)
        return self._clocks

    def stop(self, grace: float) -> None:
        """End the connection: at once, or within `grace` seconds if a message is being received."""
        if self.is_receiving:
            now = trio.current_time()
            self._deadlines(now).shorten_data(now + grace)
            self.use_sync_handlers(False)  # so that the task handles the end of the message, and ends
        else:
            self.expire(replies.SHUTTING_DOWN)

    async def pause(self, seconds: float) -> None:
        """Keep the client waiting on purpose, without effect on its timeouts. Ends early if the server stops."""
        began = trio.current_time()
        self._paused = True
        try:
            await self._wait(trio.sleep, seconds)
        finally:
            self._paused = False
            if self._clocks is not None:  # otherwise they have not started
                self._clocks.stand_still(trio.current_time() - began)

    @property
    def _has_cut_output(self) -> bool:
        """Part of a reply or handshake may have been sent, so nothing else can be sent."""
        return self._is_sending or (self._socket is not None and self._socket.has_cut_output)

    async def drain(self, stream: trio.abc.Stream) -> None:
        """Read and discard until the client closes the stream, without effect on its timeouts."""
        self._paused = True
        try:
            while await self._wait(stream.receive_some, _READ_OCTETS):
                pass
        finally:
            self._paused = False

    async def _dismiss(self, final_reply: Reply) -> None:
        """Send the final reply, unless part of another one or of a handshake was sent."""
        self.drop_message(final_reply.text)
        if self._has_cut_output:
            return
        self.final_reply = final_reply
        self.session.close_with(final_reply)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, _Dismissed):
            await self.send_output()

    def _dismiss_nowait(self) -> None:
        """Send the final reply without waiting, as far as it fits into the socket: the task must end."""
        self.drop_message(replies.SHUTTING_DOWN.text)
        if self._socket is None or self._has_cut_output:
            return
        self.session.close_with(self.final_reply or replies.SHUTTING_DOWN)
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            self._socket.send_nowait(self.pump.take_output())

    def _leave(self, cause: str) -> bool:
        """Discard an unfinished message, and reply to a QUIT without TLS. Return False if there is more to do."""
        if self.is_receiving:
            self.drop_message(cause)
        socket = self._socket
        if socket is None or not self.session.has_quit or self.pump.tls is not None or self._has_cut_output:
            return False
        output = self.pump.take_output()
        sent = socket.send_and_close_nowait(output)  # one packet has the 221 and the end of the stream
        self._rest = output[sent:]
        return not self._rest

    async def _close(self) -> None:
        """Send the remaining output, and close the stream."""
        lost = (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError)
        socket, pump = self._socket, self.pump
        output = self._rest
        with suppress(*lost):
            output += b"" if self._has_cut_output else pump.take_output()
        if socket is None:
            with trio.move_on_after(_LINGER, shield=True), suppress(*lost):
                await self.stream.send_all(output)
                await self._linger(self.stream)
                await self.stream.aclose()
            await trio.aclose_forcefully(self.stream)
            return
        with suppress(*lost):
            sent = socket.send_nowait(output)
            if sent < len(output):
                if not self.session.has_quit:
                    return  # the client does not read the final reply
                with trio.move_on_after(_FINAL_REPLY) as scope:
                    await socket.send_now(output[sent:])
                if scope.cancelled_caught:
                    return
            if pump.tls is not None:
                socket.send_nowait(pump.tls.end())
            if not self.session.has_quit:
                with trio.move_on_after(_LINGER):
                    await self._linger(socket)

    async def _linger(self, stream: trio.abc.Stream) -> None:
        """Wait until the client has read the final reply: unread input would reset the connection."""
        if self.session.state is not State.CLOSED or self.session.has_quit or not isinstance(stream, SocketStream):
            return
        await stream.send_eof()
        left = _LINGER_OCTETS
        while left > 0 and (data := await stream.receive_some(_READ_OCTETS)):
            left -= len(data)

    def _end(self, cause: str) -> None:
        """Count the end of the connection and release everything."""
        session, pump, journal = self.session, self.pump, self.listener.journal
        if self.metrics is not None:
            self.metrics.ended("QUIT" if session.has_quit else cause, pump.octets)
        if self._network is not None:
            self.worker.admission.release(self._network)
            if journal.logs_connections:
                seconds = time.monotonic() - self._started
                messages = self.messages + pump.messages
                journal.disconnected(self.number, self.peer, messages, session.errors, pump.octets, seconds, cause)
        if self._socket is not None:
            self._socket.close_nowait()
        if self.faults is not None:
            self.faults.close()
            self.faults = None
        pump.close()
        self.worker.ended(self)
        if self.transaction.evidence is not None:  # last: whatever a check does, the connection was counted out
            self.listener.pipeline.close(self.transaction)

    # ---- TLS

    async def start_tls(self) -> None:
        """Do the TLS handshake, within the timeouts. Raise BrokenResourceError if it fails."""
        assert self.listener.tls is not None
        context = self.listener.tls if self.faults is None else self.faults.tls_context(self.listener.tls)
        if self.metrics is not None:
            self.metrics.begin_tls()
        ahead, self._received_ahead = self._received_ahead, b""
        transport = AheadStream(ahead, self.stream) if ahead else self.stream
        if isinstance(transport, SocketStream):
            transport.is_in_handshake = True
        self.stream = stream = trio.SSLStream(transport, context, server_side=True)
        self._is_sending = True
        try:
            await self._wait(stream.do_handshake)
        except trio.BrokenResourceError:
            with suppress(trio.BrokenResourceError, trio.ClosedResourceError), trio.move_on_after(_LINGER):
                await transport.send_all(TlsTurns.unsent_alert(stream))
            raise
        self._is_sending = False
        info = tls_info(stream)
        if self.metrics is not None:
            self.metrics.end_tls()
        self.session.tls_started(info)
        if isinstance(transport, SocketStream):
            transport.is_in_handshake = False
        self.pump.tls = TlsTurns.of(stream) if self._socket is not None and not ahead else None
        if self.pump.tls is None:
            self._socket = None
        else:
            self.pump.feed_tls()  # input that arrived together with the client's Finished
        self.listener.journal.tls(self.number, self.peer, info)

    def use_stream(self, stream: trio.abc.Stream) -> None:
        """Use this stream from now on, in the task; it wraps the one used so far.

        With TLS, it goes below TLS.
        """
        self._socket = None
        self.pump.tls = None
        if isinstance(self.stream, trio.SSLStream):
            self.stream.transport_stream = stream
        else:
            self.stream = stream

    async def _on_starttls(self, _: StartTls) -> None:
        self.drop_message("STARTTLS")
        self.session.reply(replies.GO_AHEAD_TLS)
        await self.send_output()
        await self.start_tls()

    # ---- HELO MAIL RCPT

    async def _on_hello(self, event: Hello) -> None:
        pipeline = self.listener.pipeline
        verdict = await pipeline.on_helo(self.transaction, event.name) if pipeline.helo else None
        if verdict is None or verdict.accepts:  # a refused one leaves the transaction, and its text, as they are
            self.drop_message(event.verb)
        self._reply(verdict, replies.OK, event.name)

    async def _on_mail(self, event: Mail) -> None:
        if self._refuse_mail(event):
            return
        pipeline = self.listener.pipeline
        verdict = await pipeline.on_mail(self.transaction, event.path, event.parameters) if pipeline.mail else None
        self._reply(verdict, replies.SENDER_OK, event.path.text)

    def _on_mail_now(self, event: Mail) -> bool:
        if not self._refuse_mail(event):
            pipeline = self.listener.pipeline
            verdict = pipeline.mail_now(self.transaction, event.path, event.parameters) if pipeline.mail else None
            if verdict is WAIT:
                return False
            self._reply(verdict, replies.SENDER_OK, event.path.text)
        return True

    def _refuse_mail(self, event: Mail) -> bool:
        """Refuse a message that there is no space for (RFC 1870 6.1). Return False when there is."""
        delivery = self.listener.checks_capacity
        refusal = None if delivery is None else delivery.check_capacity(event.parameters.size or 0)
        if refusal is None:
            return False
        self.refuse(refusal, event.path.text)
        return True

    async def _on_rcpt(self, event: Rcpt) -> None:
        if self._refuse_rcpt(event):
            return
        pipeline = self.listener.pipeline
        verdict = await pipeline.on_rcpt(self.transaction, event.recipient) if pipeline.rcpt else None
        self._reply(verdict, replies.RECIPIENT_OK, event.recipient.path.text)

    def _on_rcpt_now(self, event: Rcpt) -> bool:
        if self.faults is not None:  # the recipient may ask for one
            return False
        if not self._refuse_rcpt(event):
            self.session.reply(replies.RECIPIENT_OK)
        return True

    def _refuse_rcpt(self, event: Rcpt) -> bool:
        """Refuse a recipient that the client may not send to. Return False when it may."""
        refusal = self.listener.refusal(self.transaction, event.recipient.path)
        if refusal is None:
            return False
        self.refuse(refusal, event.recipient.path.text)
        return True

    def _reply(self, verdict: Reply | None, accepted: Reply, subject: str) -> None:
        """Reply with the verdict of the policies, or the ordinary reply if they have none."""
        if verdict is None or verdict.accepts:
            self.session.reply(verdict or accepted)
        else:
            self.refuse(verdict, subject)

    def refuse(self, reply: Reply, subject: str) -> None:
        """Refuse an event, and journal it."""
        self.journal_refusal(reply, subject)
        self.session.reply(reply)

    def journal_refusal(self, reply: Reply, subject: str = "") -> None:
        """Journal that the last command was refused."""
        verb = VERBS[self.session.last_verb]
        self.listener.journal.refused(self.number, self.peer, verb, reply, self.transaction.sender, subject)

    async def _on_command(self, event: Command) -> None:
        if event.verb == "RSET" and self.listener.pipeline.reset and not event.argument:
            await self.listener.pipeline.on_reset(self.transaction)
        aborted = self.session.execute()
        if aborted is not None:
            await self.handle(aborted)

    # ---- the message

    def _begin_message(self) -> None:
        """Prepare for a text."""
        self.texts += 1
        listener = self.listener
        self.session.wire.discard = not listener.keeps_body
        if not listener.keeps_body:
            self.incoming = COUNTED
        else:
            head = self._message(CountedBody(0)) if listener.streams is not None else None
            if head is not None:
                head = head._replace(prefix=self.transaction.added_fields + head.prefix)
            judge = listener.pipeline.judge
            watcher = None if judge is None else judge.begin(self.transaction)
            self.incoming = IncomingMessage(listener, head, watcher)

    async def _on_begin_data(self, event: BeginData) -> None:
        self._on_begin_data_now(event)

    def _on_begin_data_now(self, event: BeginData) -> bool:
        self._begin_message()
        self.session.reply(replies.GO_AHEAD_DATA)
        return True

    async def _on_chunk(self, event: BodyChunk) -> None:
        if self.incoming is not None:
            await self.incoming.add(event.data)

    def _on_chunk_now(self, event: BodyChunk) -> bool:
        return self.incoming is None or self.incoming.add_nowait(event.data)

    async def _on_aborted(self, event: MessageAborted) -> None:
        self._on_aborted_now(event)

    def _on_aborted_now(self, event: MessageAborted) -> bool:
        self.drop_message(event.cause, will_be_refused=event.will_be_refused)
        return True

    async def _on_end_of_message(self, event: EndOfMessage) -> None:
        """Judge and deliver a complete message. Until the reply, only the end of the process interrupts it."""
        if self.incoming is None and self.listener.keeps_body:
            raise RuntimeError("a message ends that has not begun")
        incoming, self.incoming = self.incoming or COUNTED, None
        self.pump.is_counting = False
        try:
            is_looping = self._is_looping(incoming)
            body = await incoming.finish(event.size)
            message = incoming.head._replace(body=body) if incoming.head is not None else self._message(body)
            if incoming.separator:
                message = message._replace(prefix=message.prefix + incoming.separator)
            reply = incoming.failure or (replies.MAIL_LOOP if is_looping else None)
            if reply is None:
                reply = await self._judge_and_deliver(message, incoming)
        finally:
            incoming.close()
        self._note(message, reply)
        self.session.reply(reply)

    def _on_end_of_message_now(self, event: EndOfMessage) -> bool:
        """Count a message that is not kept, and journal it."""
        listener, transaction = self.listener, self.transaction
        assert listener.discards is not None
        self.incoming = None
        self.pump.is_counting = False
        reply = listener.discards.discard(len(transaction.recipients), event.size)
        if listener.journal.logs_mail:
            recipients, message_id = transaction.recipients, listener.ids.next()
            sender = transaction.sender
            listener.journal.accepted(self.number, self.peer, message_id, sender, recipients, event.size, reply)
        self.messages += 1
        self.session.reply(reply)
        return True

    def _is_looping(self, incoming: IncomingMessage | CountedMessage) -> bool:
        """Return True if a message has passed more servers than `max_hops`: it is looping (RFC 5321 6.3)."""
        most = self.listener.max_hops
        return bool(most) and incoming.received_fields() >= most

    async def _judge_and_deliver(self, message: Message, incoming: IncomingMessage | CountedMessage) -> Reply:
        """Return the reply to a message: the refusal of a policy, or the reply of the delivery."""
        listener, transaction = self.listener, self.transaction
        accepted: Reply | None = None
        if listener.pipeline.message:
            accepted, message = await listener.pipeline.on_message(transaction, message)
            if accepted is not None and not accepted.accepts:
                return accepted
        elif incoming.head is None and (fields := transaction.added_fields):
            message = message._replace(prefix=fields + message.prefix)
        try:
            if incoming.flow is None:
                reply = await listener.delivery.accept(message, transaction)
            else:
                reply = await incoming.flow.finish(message, transaction)
        except Exception as exc:  # noqa: BLE001 - a delivery that raises has not accepted the message
            listener.journal.error(self.number, "delivery", exc)
            reply = replies.TRY_LATER
        if listener.pipeline.judge is not None:
            listener.pipeline.judge.answered(transaction, message, reply)
        return accepted if accepted is not None and reply.accepts else reply

    def _message(self, body: Any) -> Message:
        listener, transaction = self.listener, self.transaction
        message_id, now = listener.ids.next(), time.time()
        only = transaction.recipients[0].path if len(transaction.recipients) == 1 else None
        prefix = b""
        if listener.keeps_body:
            prefix = received_field(transaction, message_id, listener.extensions.hostname, now, only)
        if self.session.tolerated:
            listener.journal.tolerated(self.number, self.peer, message_id, self.session.tolerated)
        return Message(message_id, transaction.envelope(), prefix, body, now)

    def _note(self, message: Message, reply: Reply) -> None:
        """Count and journal a message after its reply."""
        if not reply.accepts:
            self.journal_refusal(reply)
            return
        self.messages += 1
        sender, recipients = message.envelope[:2]
        size = message.body.size
        self.listener.journal.accepted(self.number, self.peer, message.id, sender, recipients, size, reply)

    def drop_message(self, cause: str, *, will_be_refused: bool = False) -> None:
        """Discard a message that is incomplete, or will be refused at its end."""
        incoming, self.incoming = self.incoming, None
        if self.pump.is_counting:
            incoming, self.pump.is_counting = COUNTED, False
        if incoming is None:
            return
        if self.metrics is not None:
            if will_be_refused:
                self.metrics.expect_refusal()
            else:
                self.metrics.lose_message(cause)
        self.listener.journal.lost(self.number, self.peer, self.transaction.sender, cause)
        incoming.close()

    async def _on_quit(self, _: Quit) -> None:
        self.drop_message("QUIT")

    # ---- AUTH (RFC 4954)

    async def _on_auth(self, event: Auth) -> None:
        listener = self.listener
        assert listener.authenticator is not None
        # Where -PLUS is not offered there is nothing to bind to: a client that says it could ("y") is right
        # (RFC 5802 6).
        offered = listener.extensions.mechanisms_for(tls=self.transaction.tls is not None)
        binding = listener.binding if "SCRAM-SHA-256-PLUS" in offered else None
        self._login = login = Login(
            event.mechanism, listener.authenticator, listener.auth_throttle, self.peer.network, binding
        )
        await self._answer_auth(login, await login.start(event.initial))

    async def _on_auth_response(self, event: AuthResponse) -> None:
        login = self._login
        assert login is not None
        await self._answer_auth(login, await login.respond(event.data))

    async def _on_auth_aborted(self, _: AuthAborted) -> None:
        self._login = None

    async def _answer_auth(self, login: Login, step: sasl.Challenge | sasl.Success | sasl.Failure) -> None:
        """Answer one step of an authentication."""
        journal = self.listener.journal
        if isinstance(step, sasl.Challenge):
            self.session.challenge(step.data)
            return
        if isinstance(step, sasl.Success) and self.listener.pipeline.auth:
            verdict = await self.listener.pipeline.on_auth(self.transaction, step.name, login.mechanism)
            if verdict is not None and not verdict.accepts:
                step = sasl.Failure(verdict, "policy")
        self._login = None
        if isinstance(step, sasl.Failure):
            login.finish(step.reply)
            journal.auth_failed(self.number, self.peer, login.name, login.mechanism, step.cause)
            self.session.reply(step.reply)
        else:
            login.finish(replies.AUTHENTICATED)
            journal.authenticated(self.number, self.peer, step.name, login.mechanism)
            self.session.authenticated(step.name)

    # ---- which handler has which event

    HANDLERS: ClassVar[dict[type, Callable[[Connection, Any], Coroutine[Any, Any, None]]]] = {
        Hello: _on_hello,
        Mail: _on_mail,
        Rcpt: _on_rcpt,
        Command: _on_command,
        BeginData: _on_begin_data,
        BodyChunk: _on_chunk,
        EndOfMessage: _on_end_of_message,
        MessageAborted: _on_aborted,
        StartTls: _on_starttls,
        Auth: _on_auth,
        AuthResponse: _on_auth_response,
        AuthAborted: _on_auth_aborted,
        Quit: _on_quit,
    }

    @staticmethod
    def sync_handlers_for(listener: Listener) -> SyncHandlers:
        """Return the events of a listener's connections that need neither a decision nor a wait."""
        connection, pipeline = Connection, listener.pipeline
        handlers: SyncHandlers = {
            BeginData: connection._on_begin_data_now,
            BodyChunk: connection._on_chunk_now,
            MessageAborted: connection._on_aborted_now,
        }
        handlers[Mail] = connection._on_mail_now
        if not pipeline.rcpt:
            handlers[Rcpt] = connection._on_rcpt_now
        if listener.discards is not None:
            handlers[EndOfMessage] = connection._on_end_of_message_now
        return handlers
