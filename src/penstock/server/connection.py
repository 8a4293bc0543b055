"""One connection: read this first.

The loop asks the session for the next event, answers it, and goes on; when the session needs more input, what was
said is sent in one go and the socket is read. The session knows the language (penstock.smtp.server); what is decided
here is whether a sender, a recipient, a message is wanted, and what becomes of the message.

Rules
-----
1. A hook_point that has no hook is answered without a coroutine: handlers return None, or something to await.
2. Only waiting for the client can be cut short (a clock, the end of the server). A message that is being committed is
   committed, and its reply is tried, because the client will send again whatever it hears nothing of.
3. A connection on a socket of our own has no task until something has to be awaited: its turns are taken by the poller
   (penstock.net.stream), from the greeting to the 221. Idle clients, and those that only fill a sink, cost no task;
   nor does a delivery that answers later (penstock.delivery.base.Defers): until then the client is not read from.
4. A bug costs one connection: 421 to the client, a trace in the journal (RFC 5321 3.8).
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Final, TypeVar

import outcome
import trio

from penstock import reply as replies
from penstock.delivery.base import Defers
from penstock.message import Body, CountedBody, Message
from penstock.net.proxyline import ProxyError
from penstock.net.proxyline import parse as parse_proxy
from penstock.net.stream import AheadStream
from penstock.net.tls import Agreed, TlsLayer, tls_info
from penstock.reply import Reply
from penstock.server._turns import TurnTaker
from penstock.server.limits import Deadlines
from penstock.server.received import received_field
from penstock.smtp import sasl
from penstock.smtp._wire import VERBS
from penstock.smtp.events import (
    Auth,
    AuthAborted,
    AuthResponse,
    BeginData,
    BodyChunk,
    EndOfMessage,
    Hello,
    Mail,
    MessageAborted,
    Quit,
    Rcpt,
    StartTls,
)
from penstock.smtp.states import State
from penstock.transaction import Peer

_LAST_WORDS: Final = 5.0
"""Seconds in which a last reply may be sent after a clock ran out."""
_LINGER: Final = 1.0
"""Seconds in which a client that is sent away mid-sentence may read why, before the connection is reset."""
_LINGER_OCTETS: Final = 1 << 20
_PROXY_OCTETS: Final = 8192
_READ_OCTETS: Final = 65_536


if TYPE_CHECKING:
    pass

T = TypeVar("T")


class _SentAway(Exception):  # noqa: N818 - no error, but the end of a wait
    """The client is to be sent away with `_last_words`."""


class Connection(TurnTaker):
    """A client, its stream and its session. `run` is the task of one connection."""

    handlers: ClassVar[dict[type, Callable[[Any, Any], Coroutine[Any, Any, None] | None]]] = {}
    """What each event is for; each handler returns None, or something to await. A kind of connection that answers
    otherwise has a table of its own, and is asked about all events."""

    __slots__ = ()

    # ---- the life of a connection

    async def run(self, woken: outcome.Outcome[int] | None = None) -> None:
        """Serve the client until it leaves, breaks off, or is sent away. Raises nothing but cancellation.

        `woken` is what the turns of a conversation have come to that began with `start`.
        """
        cause = "the session ended"
        try:
            if woken is None:
                self._host.connections.add(self)
                if not await self._open():
                    return
            else:
                woken.unwrap()
                assert self._socket is not None
                await self._flush(self._socket.take_unsent())
            if not await self._converse():
                cause = "the client closed the connection"
        except _SentAway:
            assert self._last_words is not None
            cause = self._last_words.text
            await self._say_last_words()
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError) as exc:
            cause = f"connection lost: {exc.__cause__ or exc}"
        except Exception as exc:  # noqa: BLE001 - rule 4: whatever it is, it costs this connection and no other
            self._listener.journal.error(self.number, "connection", exc)
            self._last_words = replies.UNEXPECTED
            await self._say_last_words()
        finally:
            try:
                self._drop_body(cause)
                await self._linger()
            finally:
                self._end(cause)

    @property
    def octets(self) -> int:
        """Octets that have come so far, as the socket had them."""
        return self._octets

    def abort(self) -> None:
        """End a connection that has no task, at once."""
        self._end("the server stopped")

    def expire(self, last_words: Reply) -> None:
        """Send the client away with these words: now if it is being waited for, otherwise at the next wait."""
        if self._last_words is None:
            self._last_words = last_words
            if self._scope is not None:
                self._scope.cancel()
            elif self._is_attending and self._pending is None and self._committing is None:
                assert self._socket is not None
                self._socket.nudge()

    def check_clocks(self, now: float) -> None:
        """Send the client away when one of its clocks has run out."""
        message = self._begun if self._is_in_message else 0
        last_words = self._deadlines(now).expired(now, self._session.commands, message)
        if last_words is not None:
            self.expire(last_words)

    def _deadlines(self, now: float) -> Deadlines:
        """Return the clocks, which begin to run when the sweeper first looks."""
        if self._clocks is None:
            self._clocks = Deadlines(self._listener.limits, now)
        return self._clocks

    def stop(self, grace: float) -> None:
        """Let a message that is under way arrive within `grace` seconds; send every other client away."""
        if self._is_in_message:
            now = trio.current_time()
            self._deadlines(now).shorten_data(now + grace)
        else:
            self.expire(replies.SHUTTING_DOWN)

    async def _open(self) -> bool:
        """Do what comes before the first command. Return False when there will be none."""
        listener = self._listener
        if listener.must_announce(self._peer) and not await self._read_proxy():
            return False
        refusal = None if self._is_admitted else self._host.admit(self._peer)
        if refusal is None:
            self._is_admitted = True
            listener.journal.connected(self.number, self._peer, listener.name)
            if listener.is_implicit_tls:
                await self._start_tls()
            if listener.pipeline.connect:
                refusal = await listener.pipeline.on_connect(self._peer, listener.name)
                refusal = refusal if refusal is not None and not refusal.accepts else None
        if refusal is None:
            self._session.greet()
            return True
        listener.journal.rejected_connection(self.number, self._peer, listener.name, refusal)
        if self._is_admitted or not listener.is_implicit_tls:  # a reply in the clear would only break a handshake
            self._session.greet(refusal)
            await self._flush_replies()
        return False

    async def _converse(self) -> bool:
        """Answer the client up to the end of the conversation. Return False when the client just leaves."""
        while True:
            said = self._turn(0)
            if said is None:
                if self._has_left:
                    return False
                if self._pending is None:
                    await self._flush_replies()
                    return True
                pending, self._pending = self._pending, None
                await pending
                continue
            await self._flush(said)
            if self._socket is None:
                received = await self._wait(self._receive())
            elif not self._takes_turns:
                received = await self._wait(self._socket.attend(self._receiver, self._turn))
            else:
                self._is_attending = True
                received = await self._socket.attend(self._receiver, self._turn)
                self._is_attending = False
            if not received:
                return False

    def _leave(self) -> None:
        """End the session: that was asked for while it could not be, or the server stops."""
        last_words = self._last_words or replies.SHUTTING_DOWN
        self._drop_body(last_words.text)
        self._session.close_with(last_words)

    async def _receive(self) -> int:
        """Receive through TLS, or any other stream. Return the octets received, 0 at the end."""
        data = await self._stream.receive_some(_READ_OCTETS)
        self._wire.feed(data)
        self._octets += len(data)
        return len(data)

    async def _flush_replies(self) -> None:
        """Send what was said."""
        said = self._session.data_to_send()
        await self._flush(said if self._tls is None else self._tls.encrypt(said))

    async def _flush(self, data: bytes) -> None:
        """Send, as it is, however long that takes."""
        if not data:
            return
        if self._socket is not None:
            sent = self._socket.send_nowait(data)
            if sent == len(data):
                return
            data = data[sent:]
        if self._last_words is None:
            await self._wait(self._stream.send_all(data), is_sending=True)
        else:
            with trio.move_on_after(_LAST_WORDS):
                await self._stream.send_all(data)

    async def _wait(self, waiting: Awaitable[T], *, is_sending: bool = False) -> T:
        """Wait for the client. Raise _SentAway when it is sent away meanwhile."""
        with trio.CancelScope() as scope:
            self._scope = scope
            self._is_sending = is_sending
            result = await waiting
            self._scope = None
            self._is_sending = False
            return result
        raise _SentAway

    async def _say_last_words(self) -> None:
        """Say why the connection ends, unless half a reply or half a handshake is on its way already."""
        assert self._last_words is not None
        self._drop_body(self._last_words.text)
        self._session.close_with(self._last_words)
        if self._is_sending:
            return
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError):
            await self._flush_replies()

    async def _linger(self) -> None:
        """Close a stream that is not ours; let a client that is still talking read the last reply before a reset."""
        stream, session = self._socket, self._session
        if stream is None:
            with trio.move_on_after(_LINGER, shield=True):
                await self._stream.aclose()
            return
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            if self._tls is not None:
                stream.send_nowait(self._tls.end())
            if session.state is State.CLOSED and not session.has_quit:
                with trio.move_on_after(_LINGER):
                    await stream.send_eof()
                    left = _LINGER_OCTETS
                    while left > 0 and (data := await stream.receive_some(_READ_OCTETS)):
                        left -= len(data)

    # ---- before the first command

    async def _read_proxy(self) -> bool:
        """Read the PROXY header of a trusted proxy, and take the client it names for the peer."""
        buffer = b""
        while True:
            data = await self._wait(self._stream.receive_some(_PROXY_OCTETS))
            buffer += data
            try:
                line = parse_proxy(buffer)
            except ProxyError as exc:
                self._listener.journal.rejected_connection(
                    self.number,
                    self._peer,
                    self._listener.name,
                    Reply(554, "5.5.0", "Bad PROXY header", cause=str(exc)),
                )
                return False
            if line is not None:
                break
            if not data:
                return False
        rest = buffer[line.consumed :]
        if self._listener.is_implicit_tls:
            self._ahead = rest
        else:
            self._wire.feed(rest)
        if not line.is_local:
            self._peer = self._transaction.peer = Peer(
                line.source_address,
                line.source_port,
                line.destination_address,
                line.destination_port,
                proxy=self._peer.address or "unix",
            )
        return True

    def _tls_context(self) -> ssl.SSLContext:
        """Return what the handshake is done with."""
        assert self._listener.tls is not None
        return self._listener.tls

    async def _start_tls(self) -> None:
        """Do the handshake, with the clocks running. Raise BrokenResourceError when it fails."""
        listener, context = self._listener, self._tls_context()
        agreed: Agreed
        if self._metrics is not None:
            self._metrics.tls_begins()
        if self._socket is not None:
            agreed = await self._shake_hands(TlsLayer(context, self._ahead))
        else:
            transport = AheadStream(self._ahead, self._stream) if self._ahead else self._stream
            agreed = self._stream = stream = trio.SSLStream(transport, context, server_side=True)
            await self._wait(stream.do_handshake(), is_sending=True)
        info = tls_info(agreed)
        if self._metrics is not None:
            self._metrics.tls_begun()
        self._session.tls_started(info)
        if self._tls is not None:
            self._tls.decrypt_into(self._wire.feed)  # what came in the breath of the client's Finished
        listener.journal.tls(self.number, self._peer, info)

    async def _shake_hands(self, layer: TlsLayer) -> Agreed:
        """Do the handshake on a socket of our own."""
        assert self._socket is not None
        try:
            said = layer.shake()
            if said is not None:
                await self._flush(said)
                received = await self._wait(self._socket.attend(layer, layer.shake), is_sending=True)
                layer.expect_more(received)
        except (ssl.SSLError, trio.BrokenResourceError) as exc:
            with suppress(ssl.SSLError, trio.BrokenResourceError):
                self._socket.send_nowait(layer.encrypt(b""))  # the alert that says why
            raise trio.BrokenResourceError(f"the handshake failed: {exc}") from exc
        await self._flush(layer.encrypt(b""))
        self._tls = self._receiver = layer
        return layer.object

    # ---- HELO MAIL RCPT

    def _on_hello(self, event: Hello) -> Coroutine[Any, Any, None] | None:
        self._drop_body(event.verb)
        pipeline = self._listener.pipeline
        if pipeline.helo:
            return self._ask(replies.OK, event.name, pipeline.on_helo(self._transaction, event.name))
        self._session.reply(replies.OK)
        return None

    def _on_mail(self, event: Mail) -> Coroutine[Any, Any, None] | None:
        listener = self._listener
        if listener.room is not None:
            refusal = listener.room.check_capacity(event.parameters.size or 0)
            if refusal is not None:
                self._refuse(refusal, event.path.text)  # RFC 1870 6.1
                return None
        pipeline = listener.pipeline
        if pipeline.mail:
            verdict = pipeline.on_mail(self._transaction, event.path, event.parameters)
            return self._ask(replies.SENDER_OK, event.path.text, verdict)
        self._session.reply(replies.SENDER_OK)
        return None

    def _on_rcpt(self, event: Rcpt) -> Coroutine[Any, Any, None] | None:
        listener = self._listener
        if listener.domains is not None and not listener.may_send(self._transaction, event.recipient.path):
            self._refuse(replies.RELAY_DENIED, event.recipient.path.text)
            return None
        if listener.pipeline.rcpt:
            verdict = listener.pipeline.on_rcpt(self._transaction, event.recipient)
            return self._ask(replies.RECIPIENT_OK, event.recipient.path.text, verdict)
        self._session.reply(replies.RECIPIENT_OK)
        return None

    async def _ask(self, accepted: Reply, subject: str, verdict: Awaitable[Reply | None]) -> None:
        """Answer an event with the verdict of the policies, or with the ordinary reply when they have none."""
        reply = await verdict
        if reply is None or reply.accepts:
            self._session.reply(reply or accepted)
        else:
            self._refuse(reply, subject)

    def _refuse(self, reply: Reply, subject: str) -> None:
        """Answer an event with a refusal, and journal it."""
        self._journal_refusal(reply, subject)
        self._session.reply(reply)

    def _journal_refusal(self, reply: Reply, subject: str = "") -> None:
        verb = VERBS[self._session.last_verb]
        self._listener.journal.refused(self.number, self._peer, verb, reply, self._transaction.sender, subject)

    # ---- the message

    def _on_chunk(self, event: BodyChunk) -> Coroutine[Any, Any, None] | None:
        body = self._body
        if body is None or body.add_nowait(event.data):
            return None
        return body.add(event.data)

    def _on_aborted(self, event: MessageAborted) -> None:
        self._drop_body(event.cause, will_be_refused=event.will_be_refused)

    async def _judge(self, event: EndOfMessage) -> None:
        listener, collector = self._listener, self._body
        hops = 0 if collector is None else collector.received_fields()
        body: Body = CountedBody(event.size) if collector is None else await collector.finish()
        self._body = None
        self._is_in_message = False
        try:
            message = self._message(body)
            if collector is not None and collector.failure is not None:
                reply = collector.failure
            elif listener.max_hops and hops >= listener.max_hops:
                reply = replies.MAIL_LOOP  # RFC 5321 6.3
            else:
                reply = await self._take(message)
        finally:
            body.close()
        self._note(message, reply)
        self._say(reply)

    def _hand_over(self, defers: Defers, event: EndOfMessage) -> bool:
        """Give a whole message to a delivery that answers later. Return False when that needs a task."""
        listener, collector = self._listener, self._body
        hops = 0 if collector is None else collector.received_fields()
        body = CountedBody(event.size) if collector is None else collector.finish_nowait()
        if body is None:
            return False
        self._body = None
        self._is_in_message = False
        message = self._committing = self._message(body)
        if listener.max_hops and hops >= listener.max_hops:
            self._settle(message, replies.MAIL_LOOP)
            return True
        try:
            defers.accept_later(message, partial(self._settle, message))
        except Exception as exc:  # noqa: BLE001 - a delivery that breaks has not taken the message
            listener.journal.error(self.number, "delivery", exc)
            if self._committing is message:
                self._settle(message, replies.TRY_LATER)
        return True

    def _settle(self, message: Message, reply: Reply) -> None:
        """Answer a message that was handed over, whether the client is still there or not."""
        if self._committing is not message:
            raise RuntimeError(f"message {message.id} was settled before")
        self._committing = None
        message.body.close()
        self._note(message, reply)
        if self._has_ended or self._session.state is State.CLOSED:
            return  # there is nobody left to tell
        self._say(reply)
        assert self._socket is not None
        if self._socket.is_held:
            self._socket.resume()

    def _note(self, message: Message, reply: Reply) -> None:
        """Count and journal what became of a message."""
        if reply.accepts:
            self._messages += 1
            sender, recipients = message.envelope[:2]
            self._listener.journal.accepted(
                self.number, self._peer, message.id, sender, recipients, message.body.size, reply
            )
        else:
            self._journal_refusal(reply)

    def _message(self, body: Body) -> Message:
        listener, transaction = self._listener, self._transaction
        message_id, now = listener.ids.next(), time.time()
        only = transaction.recipients[0].path if len(transaction.recipients) == 1 else None
        prefix = (
            received_field(transaction, message_id, listener.offer.hostname, now, only) if listener.keeps_body else b""
        )
        return Message(message_id, transaction.envelope(), prefix, body, now)

    async def _take(self, message: Message) -> Reply:
        """Return the reply to a message: what the policies say, or what the delivery says."""
        listener = self._listener
        accepted: Reply | None = None
        if listener.pipeline.message:
            accepted = await listener.pipeline.on_message(self._transaction, message)
            if accepted is not None and not accepted.accepts:
                return accepted
        try:
            reply = await self._deliver(message)
        except Exception as exc:  # noqa: BLE001 - a delivery that breaks has not taken the message
            listener.journal.error(self.number, "delivery", exc)
            return replies.TRY_LATER
        return accepted if accepted is not None and reply.accepts else reply

    def _deliver(self, message: Message) -> Awaitable[Reply]:
        return self._listener.delivery.accept(message)

    def _drop_body(self, cause: str, *, will_be_refused: bool = False) -> None:
        """Forget a message that had begun and will not end, or will be refused when it does."""
        if not self._is_in_message:
            return
        self._is_in_message = False
        if self._metrics is not None:
            if will_be_refused:
                self._metrics.dooms()
            else:
                self._metrics.loses(cause)
        self._listener.journal.lost(self.number, self._peer, self._transaction.sender, cause)
        if self._body is not None:
            self._body.discard()
            self._body = None

    # ---- STARTTLS AUTH

    async def _on_starttls(self, event: StartTls) -> None:
        self._drop_body("STARTTLS")
        self._session.reply(replies.GO_AHEAD_TLS)
        await self._flush_replies()
        await self._start_tls()

    def _on_auth(self, event: Auth) -> Coroutine[Any, Any, None]:
        listener = self._listener
        assert listener.authenticator is not None
        # Without -PLUS on offer there is nothing to bind to: a client that says it could ("y") is right (RFC 5802 6).
        offered = listener.offer.mechanisms_for(tls=self._transaction.tls is not None)
        binding = listener.binding if "SCRAM-SHA-256-PLUS" in offered else None
        self._exchange = sasl.start_exchange(
            event.mechanism, scram_keys=listener.authenticator.scram_keys, binding=binding
        )
        return self._step(self._exchange.start, event.initial)

    def _on_auth_response(self, event: AuthResponse) -> Coroutine[Any, Any, None]:
        assert self._exchange is not None
        return self._step(self._exchange.respond, event.data)

    def _on_auth_aborted(self, event: AuthAborted) -> None:
        self._exchange = None

    async def _step(self, take: Callable[[Any], sasl.Step], data: bytes | None) -> None:
        """Take one step of an authentication, and answer it."""
        listener, session = self._listener, self._session
        if listener.auth_throttle.is_blocked(self._peer.network):
            self._refuse(replies.AUTH_THROTTLED, "")
            return
        step = take(data)
        if isinstance(step, sasl.Challenge):
            session.challenge(step.data)
        elif isinstance(step, sasl.Failure):
            self._fail_auth("", step.reply, step.cause)
        elif isinstance(step, sasl.Success):
            await self._prove(step.name)
        else:
            assert listener.authenticator is not None
            if await listener.authenticator.verify(step.name, step.password):
                await self._prove(step.name)
            else:
                self._fail_auth(step.name, replies.AUTH_FAILED, "wrong name or password")

    async def _prove(self, name: str) -> None:
        """Answer a client that has proved to be somebody."""
        listener, exchange = self._listener, self._exchange
        assert exchange is not None
        if listener.pipeline.auth:
            verdict = await listener.pipeline.on_auth(self._transaction, name, exchange.mechanism)
            if verdict is not None and not verdict.accepts:
                self._fail_auth(name, verdict, "policy")
                return
        self._exchange = None
        listener.auth_throttle.succeeded(self._peer.network)
        listener.journal.authenticated(self.number, self._peer, name, exchange.mechanism)
        self._session.authenticated(name)

    def _fail_auth(self, name: str, reply: Reply, cause: str) -> None:
        listener, exchange = self._listener, self._exchange
        mechanism = exchange.mechanism if exchange is not None else ""
        self._exchange = None
        if reply.code == 535:
            listener.auth_throttle.failed(self._peer.network)
        listener.journal.auth_failed(self.number, self._peer, name, mechanism, cause)
        self._session.reply(reply)

    def _on_quit(self, event: Quit) -> None:
        self._drop_body("QUIT")


_HANDLERS: Final[dict[type, Callable[[Any, Any], Coroutine[Any, Any, None] | None]]] = {
    Hello: Connection._on_hello,
    Mail: Connection._on_mail,
    Rcpt: Connection._on_rcpt,
    BeginData: Connection._on_begin_data,
    BodyChunk: Connection._on_chunk,
    EndOfMessage: Connection._on_end,
    MessageAborted: Connection._on_aborted,
    StartTls: Connection._on_starttls,
    Auth: Connection._on_auth,
    AuthResponse: Connection._on_auth_response,
    AuthAborted: Connection._on_auth_aborted,
    Quit: Connection._on_quit,
}
Connection.handlers = _HANDLERS
