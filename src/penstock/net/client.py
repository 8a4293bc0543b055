"""A connection to a server, as a client: the socket, TLS, and the session. The relay and the load generator use it.

The task of a connection opens it, negotiates TLS and then parks in `run`. While it is parked, the poller calls
a plain function for each reply, which returns what is to be sent (penstock.net.stream). The task wakes when the
function returns None: something has to be awaited, or the connection is over.

STARTTLS and implicit TLS are `trio.SSLStream`. After the handshake, turns borrow its SSLObject and BIOs
(`penstock.net.tls.TlsTurns`); with a version of trio whose streams do not allow that, turns use the public methods of
the stream, which costs more and behaves the same.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable
from typing import Final

import trio

from penstock.net import _poller
from penstock.net._poller import TaskProtocol
from penstock.net.stream import SocketStream
from penstock.net.tls import TlsTurns
from penstock.smtp.client import ServerReply
from penstock.smtp.client_session import ClientSession

_RECEIVE_OCTETS: Final = 4096
"""Octets received at a time: replies are short, and this is what the poller takes for a receive that may leave some."""

OnReply = Callable[[ServerReply], bytes | None]
"""Takes a reply, hands it to `ClientSession.handle`, and returns what is to be sent; None wakes the task.

What is to be sent as well is then given to `ClientConnection.queue`.
"""


class HandshakeError(Exception):
    """TLS could not be negotiated. A new connection without TLS may work."""


class ClientConnection:
    """A connected socket, TLS on it after `start_tls`, and the `ClientSession` that it carries.

    `interrupt` and `send_nowait` may be called while the task is parked; everything else is for the task. Methods
    raise trio.BrokenResourceError or ssl.SSLError if the connection is lost, trio.ClosedResourceError if it was closed
    here, and what the session raises.
    """

    def __init__(self, stream: SocketStream, session: ClientSession) -> None:
        """Take over a stream."""
        self.session = session
        self._stream = stream
        self._ssl: trio.SSLStream[trio.abc.Stream] | None = None
        self._turns: TlsTurns | None = None
        """None in clear text, or if the parts of the stream cannot be borrowed."""
        self._on_reply: OnReply = session.handle
        self._received = b""
        self._unsent = b""
        """What `flush` sends: encrypted, unless `SSLStream.send_all` does that."""
        self._costly: ServerReply | None = None
        """A reply that is handled in a thread."""
        self._has_pending = False
        """Something may have been received that was not handled: after the handshake, or when the task is woken."""
        self._is_interrupted = False
        self._in_turn = False
        self._has_ended = False
        """The server has ended TLS."""
        self._waiting: trio.CancelScope | None = None
        """Interrupts the task where the stream cannot."""

    @property
    def tls_session(self) -> ssl.SSLSession | None:
        """The TLS session, which another connection may resume."""
        return None if self._ssl is None else self._ssl.session

    # ---- TLS

    async def start_tls(
        self, context: ssl.SSLContext, server_name: str, *, is_private: bool, resumed: ssl.SSLSession | None = None
    ) -> None:
        """Negotiate TLS: for the session, after a 220 to STARTTLS, or before the greeting.

        `resumed` is the TLS session of an earlier connection; `is_private`: see `ClientSession.tls_started`. Raise
        HandshakeError.
        """
        try:
            self._ssl = trio.SSLStream(self._stream, context, server_hostname=server_name, https_compatible=True)
            if resumed is not None:
                self._ssl.session = resumed
            await self._ssl.do_handshake()
        except (trio.BrokenResourceError, ValueError) as exc:
            raise HandshakeError(f"the TLS handshake failed: {reason_of(exc)}") from exc
        borrowed = TlsTurns.of(self._ssl)
        if borrowed is not None:
            self._turns, self._unsent = borrowed
        self._has_pending = True  # the greeting may have come with the end of the handshake
        self.queue(self.session.tls_started(is_private=is_private))

    # ---- sending

    def queue(self, data: bytes) -> None:
        """Have something sent by the next `send`, `flush` or `run`."""
        if data:
            self._unsent += data if self._turns is None else self._turns.encrypt(data)

    async def send(self, data: bytes) -> None:
        """Send what is queued, then this."""
        self.queue(data)
        await self.flush()

    async def flush(self) -> None:
        """Send what is queued."""
        unsent, self._unsent = self._unsent, b""
        if not unsent:
            return
        if self._ssl is not None and self._turns is None:
            await self._ssl.send_all(unsent)
        else:
            await self._stream.send_now(unsent)

    def send_nowait(self, data: bytes) -> None:
        """Send at once what the socket takes; the task, which is parked in `run`, is woken to send the rest."""
        if self._ssl is not None and self._turns is None:
            self._unsent += data
        else:
            octets = data if self._turns is None else self._turns.encrypt(data)
            sent = self._stream.send_nowait(octets)
            self._unsent += octets[sent:]
        if self._unsent:
            self.interrupt()

    # ---- turns

    async def run(self, on_reply: OnReply) -> bool:
        """Hand each reply to `on_reply` and send what it returns, until it returns None or `interrupt` is called.

        Sends first what is queued. Returns as well when the session waits for the handshake. Return False at the end
        of the stream.
        """
        self._on_reply = on_reply
        await self.flush()
        if self._has_pending:
            self._has_pending = False
            self._received = b""
            output = self._take_turn(0)
            if output is None:
                return await self._after_turns(-1)
            self._unsent += output
            await self.flush()
        if self._is_interrupted:
            await trio.lowlevel.checkpoint()
            return await self._after_turns(-1)
        if self._ssl is not None and self._turns is None:
            return await self._after_turns(await self._run_on_stream(self._ssl))
        return await self._after_turns(await self._attend())

    async def _after_turns(self, received: int) -> bool:
        self._is_interrupted = False
        reply, self._costly = self._costly, None
        if reply is None:
            return received != 0 and not self._has_ended
        output = await trio.to_thread.run_sync(self._on_reply, reply)
        self._has_pending = True
        if output is not None:
            self.queue(output)
            return await self.run(self._on_reply)
        return True

    async def _attend(self) -> int:
        if self._stream.has_poller:
            return await self._stream.run_protocol(TaskProtocol(self, self._take_turn))
        with trio.CancelScope() as self._waiting:
            return await self._stream.run_protocol(TaskProtocol(self, self._take_turn))
        return -1

    async def _run_on_stream(self, stream: trio.SSLStream[trio.abc.Stream]) -> int:
        """Take turns with the public methods of a TLS stream. Return 0 at its end, -1 otherwise."""
        while True:
            data: bytes | None = None
            with trio.CancelScope() as self._waiting:
                data = bytes(await stream.receive_some())
            if data is None:
                return -1
            if not data:
                return 0
            output = self._handle(data)
            if output is None:
                return -1
            if output:
                await stream.send_all(output)
            if self._is_interrupted:
                return -1

    def recv(self, fd: int, octets: int = _RECEIVE_OCTETS, /) -> int:
        """Receive for the next turn; see `Wire.recv`."""
        if self._turns is not None:
            received = self._turns.recv(fd)
        else:
            data = _poller.recv(fd, octets)
            self._received = data or b""
            received = -1 if data is None else len(data)
        if received < 0 and self._is_interrupted:
            return 1  # a turn without octets, which ends the turns
        return received

    def _take_turn(self, _: int) -> bytes | None:
        """Handle what was received. Return what is to be sent, encrypted; None wakes the task."""
        turns = self._turns
        self._in_turn = True
        try:
            if turns is None:
                return self._handle(self._received)
            pieces: list[bytes] = []
            is_open = turns.decrypt_into(pieces.append)
            output = self._handle(b"".join(pieces))
            if not is_open:
                self._has_ended = True
                return None
            return None if output is None else turns.encrypt(output)
        finally:
            self._in_turn = False

    def _handle(self, data: bytes) -> bytes | None:
        """Hand the replies in some octets to the session. Return what is to be sent; None wakes the task."""
        session = self.session
        reply = session.single_reply(data)
        if reply is not None and reply.code != 334:
            more = self._on_reply(reply)
            if more is None or session.needs_handshake:
                return None
            if self._is_interrupted:
                self.queue(more)
                return None
            return more
        session.receive_data(data)
        output = b""
        while (reply := session.next_reply()) is not None:
            if reply.code == 334 and session.is_costly:
                self._costly = reply
                more = None
            else:
                more = self._on_reply(reply)
            if more is None or session.needs_handshake:
                self.queue(output)
                self._has_pending = True
                return None
            output += more
        if self._is_interrupted:
            self.queue(output)
            return None
        return output

    def interrupt(self) -> None:
        """Make `run` return, now or the next time it would wait. Not while an answer of a turn is being sent."""
        self._is_interrupted = True
        if self._in_turn:
            return  # the turn sees to it: a task that was woken now would lose what the turn returns
        if self._waiting is not None:
            self._waiting.cancel()
        else:
            self._stream.interrupt()

    # ---- the end

    def close_nowait(self) -> None:
        """Close the socket; a task that waits on it gets trio.ClosedResourceError."""
        self._stream.close_nowait()


def reason_of(exc: BaseException) -> str:
    """Return what went wrong, printable: the text of OpenSSL or of the system, without wrapping exceptions."""
    cause = exc.__cause__ or exc
    if isinstance(cause, ssl.SSLCertVerificationError):
        return cause.verify_message
    if isinstance(cause, ssl.SSLError):
        reason = getattr(cause, "reason", None)  # set by OpenSSL only
        return (reason or str(cause)).replace("_", " ").lower()
    return getattr(cause, "strerror", None) or str(cause)
