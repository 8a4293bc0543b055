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
from typing import Final

import trio

from penstock.net.stream import SocketStream
from penstock.net.tls import TlsTurns, sent_chain
from penstock.net.turns import ClientTurns, OnReply
from penstock.smtp.client_session import ClientSession


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
        self._turns = turns = ClientTurns(session)
        self._stream = stream
        self._ssl: trio.SSLStream[trio.abc.Stream] | None = None
        self._waiting: trio.CancelScope | None = None
        """Interrupts the task where the stream cannot."""
        self.queue: Final = turns.queue
        """Has something sent by the next `send`, `flush` or `run`."""

    @property
    def session(self) -> ClientSession:
        """The session of the connection."""
        return self._turns.session

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
            self._stream.is_in_handshake = True
            self._ssl = trio.SSLStream(self._stream, context, server_hostname=server_name, https_compatible=True)
            if resumed is not None:
                self._ssl.session = resumed
            await self._ssl.do_handshake()
        except (trio.BrokenResourceError, ValueError) as exc:
            raise HandshakeError(f"the TLS handshake failed: {reason_of(exc)}") from exc
        self._stream.is_in_handshake = False
        self._turns.tls = TlsTurns.of(self._ssl)
        self._turns.has_pending = True  # the greeting may have come with the end of the handshake
        self.queue(self.session.tls_started(is_private=is_private))

    def peer_chain(self) -> list[bytes]:
        """Return the certificates that the server has sent, in DER, its own first; none without TLS."""
        return [] if self._ssl is None else sent_chain(self._ssl)

    # ---- sending

    async def send(self, data: bytes) -> None:
        """Send what is queued, then this."""
        self.queue(data)
        await self.flush()

    async def flush(self) -> None:
        """Send what is queued."""
        turns = self._turns
        unsent, turns.unsent = turns.unsent, b""
        if not unsent:
            return
        if self._is_awaited:
            assert self._ssl is not None
            await self._ssl.send_all(unsent)
        else:
            await self._stream.send_now(unsent)

    @property
    def _is_awaited(self) -> bool:
        """Octets go through the methods of the TLS stream: its parts cannot be borrowed."""
        return self._ssl is not None and self._turns.tls is None

    def send_nowait(self, data: bytes) -> None:
        """Send at once what the socket takes; the task, which is parked in `run`, is woken to send the rest."""
        turns = self._turns
        if self._is_awaited:
            turns.unsent += data
        else:
            octets = data if turns.tls is None else turns.tls.encrypt(data)
            sent = self._stream.send_nowait(octets)
            turns.unsent += octets[sent:]
        if turns.unsent:
            self.interrupt()

    # ---- turns

    async def run(self, on_reply: OnReply) -> bool:
        """Hand each reply to `on_reply` and send what it returns, until it returns None or `interrupt` is called.

        Sends first what is queued. Returns as well when the session waits for the handshake. Return False at the end
        of the stream.
        """
        turns = self._turns
        turns.on_reply = on_reply
        await self.flush()
        if turns.has_pending:
            turns.has_pending = False
            output = turns.data_received(0)
            if output is None:
                return await self._after_turns(-1)
            turns.unsent += output
            await self.flush()
        if turns.is_interrupted:
            await trio.lowlevel.checkpoint()
            return await self._after_turns(-1)
        if self._is_awaited:
            return await self._after_turns(await self._run_on_stream())
        return await self._after_turns(await self._run_in_poller())

    async def _after_turns(self, received: int) -> bool:
        turns = self._turns
        turns.is_interrupted = False
        reply, turns.costly = turns.costly, None
        if reply is None:
            return received != 0 and not turns.has_ended
        output = await trio.to_thread.run_sync(turns.on_reply, reply)
        turns.has_pending = True
        if output is not None:
            self.queue(output)
            return await self.run(turns.on_reply)
        return True

    async def _run_in_poller(self) -> int:
        if self._stream.has_poller:
            return await self._stream.run_protocol(self._turns)
        with trio.CancelScope() as self._waiting:
            return await self._stream.run_protocol(self._turns)
        return -1

    async def _run_on_stream(self) -> int:
        """Take turns with the public methods of a TLS stream. Return 0 at its end, -1 otherwise."""
        turns, stream = self._turns, self._ssl
        assert stream is not None
        while True:
            data: bytes | None = None
            with trio.CancelScope() as self._waiting:
                data = bytes(await stream.receive_some())
            if data is None:
                return -1
            if not data:
                return 0
            output = turns.handle(data)
            if output is None:
                return -1
            if output:
                await stream.send_all(output)
            if turns.is_interrupted:
                return -1

    def interrupt(self) -> None:
        """Make `run` return, now or the next time it would wait. Not while an answer of a turn is being sent."""
        self._turns.is_interrupted = True
        if self._turns.is_in_turn:
            return  # the turn sees to it: a task that was woken now would lose what the turn returns
        if self._waiting is not None:
            self._waiting.cancel()
        else:
            self._stream.interrupt()

    def replace(self, fd: int, session: ClientSession) -> None:
        """Go on with a new connection, in clear text, and a new session on it: the task in `run` sleeps on.

        For `on_reply`, in place of waking the task to make the connection. Needs a poller. Raise OSError.
        """
        self._stream.replace(fd)
        self._turns.session = session

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
