"""The turns of a client connection that its task sleeps through: replies in, commands out.

This file is compiled (turns.pxd has the C types): the poller calls it with each reply to the relay and the load
generator.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

import cython  # type: ignore[import-untyped]  # it has no types, and is not needed at run time

from penstock.smtp.client import ServerReply

if TYPE_CHECKING:
    from penstock.net.tls import TlsTurns
    from penstock.smtp.client_session import ClientSession

if not cython.compiled:  # compiled, these are the C types and functions of turns.pxd
    from penstock.net._poller import Protocol
    from penstock.net._poller import recv as receive_octets

_RECEIVE_OCTETS: Final = 4096
"""Octets received at a time: replies are short, and this is what the poller takes for a receive that may leave some."""

OnReply = Callable[[ServerReply], bytes | None]
"""Takes a reply, hands it to `ClientSession.handle`, and returns what is to be sent; None wakes the task.

What is to be sent as well is then given to `ClientConnection.queue`.
"""


class ClientTurns(Protocol):
    """Receives for a session, hands it the replies, and returns what is to be sent."""

    def __init__(self, session: ClientSession) -> None:
        self.session = session
        """May be replaced by `on_reply` when the connection is."""
        self.on_reply: OnReply = session.handle
        self.tls: TlsTurns | None = None
        """None in clear text, or if the parts of the TLS stream cannot be borrowed."""
        self.costly: ServerReply | None = None
        """A reply that the task handles in a thread."""
        self.unsent = b""
        """What the task sends next: encrypted, unless `SSLStream.send_all` does that."""
        self.has_pending = False
        """Something may have been received that was not handled: after the handshake, or when the task is woken."""
        self.is_interrupted = False
        self.is_in_turn = False
        self.has_ended = False
        """The server has ended TLS."""
        self._received = b""

    def queue(self, data: bytes) -> None:
        """Have something sent by the task."""
        if data:
            self.unsent += data if self.tls is None else self.tls.encrypt(data)

    # ---- called by the poller

    def receive(self, fd: int) -> int:
        """Receive for the next turn."""
        if self.tls is not None:
            received = self.tls.recv(fd)
        else:
            data = receive_octets(fd, _RECEIVE_OCTETS)
            self._received = data or b""
            received = -1 if data is None else len(data)
        if received < 0 and self.is_interrupted:
            return 1  # a turn without octets, which ends the turns
        return received

    def take_turn(self, received: int) -> bytes | None:
        """Handle what was received, 0 for what is pending. Return what is to be sent; None wakes the task."""
        if not received:
            self._received = b""
        self.is_in_turn = True
        try:
            return self.handle(self._received) if self.tls is None else self.take_encrypted_turn()
        finally:
            self.is_in_turn = False

    def take_encrypted_turn(self) -> bytes | None:
        """Take a turn in TLS."""
        tls = self.tls
        assert tls is not None
        pieces: list[bytes] = []
        is_open = tls.decrypt_into(pieces.append)
        output = self.handle(b"".join(pieces))
        if not is_open:
            self.has_ended = True
            return None
        return None if output is None else tls.encrypt(output)

    def handle(self, data: bytes) -> bytes | None:
        """Hand the replies in some octets to the session. Return what is to be sent; None wakes the task."""
        session = self.session
        reply = session.single_reply(data)
        if reply is not None and reply.code != 334:
            more = self.on_reply(reply)
            if more is None or session.needs_handshake:
                return None
            if self.is_interrupted:
                self.queue(more)
                return None
            return more
        session.receive_data(data)
        output = b""
        while (reply := session.next_reply()) is not None:
            if reply.code == 334 and session.is_costly:
                self.costly = reply
                more = None
            else:
                more = self.on_reply(reply)
            if more is None or session.needs_handshake:
                self.queue(output)
                self.has_pending = True
                return None
            output += more
            if session is not self.session:
                break  # everything after a 221 is ignored
        if self.is_interrupted:
            self.queue(output)
            return None
        return output

    def recv(self, fd: int, octets: int = _RECEIVE_OCTETS, /) -> int:  # noqa: ARG002 - as Wire.recv
        """Receive outside of the poller."""
        return self.receive(fd)

    def data_received(self, received: int) -> bytes | None:
        """Take a turn outside of the poller."""
        return self.take_turn(received)
