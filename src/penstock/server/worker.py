"""A worker: listening sockets, one nursery task per connection, one sweeper, one journal writer.

On shutdown, listeners close at once; sessions get a grace period. `stop` may be called from the task of a signal
handler or from a test; `run` returns when the last session is over. A worker that drains refuses mail in the same way,
but keeps its listeners, and can resume.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import AF_UNIX
from socket import socket as Socket  # noqa: N812 - a field is called socket
from typing import Final

import trio

from penstock import reply as replies
from penstock.journal import Journal
from penstock.metrics._session import Metrics
from penstock.net._poller import HAS_EPOLL, Poller, close, send
from penstock.net.listen import accept_forever, close_listener, name_of
from penstock.net.stream import SocketStream, watch_sockets
from penstock.reply import Reply
from penstock.server.connection import Connection
from penstock.server.deadlines import Sweeper
from penstock.server.limits import Admission
from penstock.server.listener import Listener
from penstock.server.shortage import Shortage
from penstock.transaction import Peer

_JOURNAL_INTERVAL: Final = 0.25
"""Seconds a journal line may wait before it is written."""
_TASK_NAME: Final = "connection"
"""The same for all: trio would make a name for each task."""


@dataclass(slots=True)
class BoundListener:
    """A listening socket and the settings of its new connections, which a reload replaces."""

    socket: Socket
    listener: Listener
    number: int = 0
    """Index of the listener in the settings."""
    is_own: bool = True
    """No other process listens there: the path of a unix socket is removed at the end."""

    @property
    def local_address(self) -> tuple[str, int]:
        """The address and port it is bound to; ("", 0) for a unix socket."""
        if self.socket.family == AF_UNIX:
            return ("", 0)
        address, port, *_ = self.socket.getsockname()
        return (address, port)


class Worker:
    """Serves the sessions of some listeners in one trio loop."""

    def __init__(
        self,
        listeners: Sequence[BoundListener],
        admission: Admission,
        sweeper: Sweeper,
        journal: Journal,
        write_journal: Callable[[bytes], None],
        *,
        grace: float = 30.0,
        metrics: Metrics | None = None,
        ended: Callable[[], None] | None = None,
    ) -> None:
        """`grace`: seconds in which messages in progress may be completed after `stop`.

        `write_journal` is called in the event loop with complete lines: it must neither wait nor raise. `metrics` are
        those of the listeners, if any. `ended` is called whenever a connection has ended.
        """
        self.connections: set[Connection] = sweeper.watched
        """The connections that are open."""
        self.admission = admission
        self.is_stopping = False
        """No new mail is accepted: the worker drains or ends. Connections without a message in progress are closed."""
        self.sessions = 0
        """Connections so far, those that were refused before the greeting among them."""
        self._listeners = listeners
        self._sweeper = sweeper
        self._journal = journal
        self._write_journal = write_journal
        self.grace = grace
        self._ended = ended
        self._nursery: trio.Nursery | None = None
        self._poller = Poller() if HAS_EPOLL else None
        if self._poller is not None:
            self._poller.metrics = metrics
        self._shortage = Shortage(journal, trio.current_time)
        self._stop_wanted = trio.Event()
        self._accepting: list[trio.CancelScope] = []
        self._serving = trio.CancelScope()

    # ---- what others see

    @property
    def open_connections(self) -> int:
        """Connections that are open."""
        return len(self.connections)

    @property
    def octets_under_way(self) -> int:
        """Octets received over the open connections."""
        return sum(connection.pump.octets for connection in self.connections)

    @property
    def watched(self) -> int:
        """Sockets that the poller watches."""
        return 0 if self._poller is None else len(self._poller)

    @property
    def admitted(self) -> int:
        """Connections that count for the limits."""
        return self.admission.total

    # ---- what connections use

    def ended(self, connection: Connection) -> None:
        """Note that a connection is closed."""
        self.connections.discard(connection)
        if self._ended is not None:
            self._ended()

    # ---- the life of a worker

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` was called and the last session is over; `started` once all listeners accept."""
        async with trio.open_nursery() as background:
            background.start_soon(self._sweeper.run)
            background.start_soon(self._keep_journal)
            if self._poller is not None:
                background.start_soon(watch_sockets, self._poller)
            try:
                with self._serving:
                    async with trio.open_nursery() as self._nursery:
                        self._nursery.start_soon(self._stop_wanted.wait)  # a worker may have no listener of its own
                        for bound in self._listeners:
                            self._journal.listening(name_of(bound.socket), bound.listener.name)
                            self._nursery.start_soon(self._accept, bound)
                        task_status.started()
            finally:
                for bound in self._listeners:
                    close_listener(bound.socket, unlinks=bound.is_own)
                background.cancel_scope.cancel()
        if self._poller is not None:
            self._poller.close()
        self._shortage.close()
        self._journal.stopped()
        self._write_journal(self._journal.drain())

    def stop(self) -> None:
        """Stop accepting; idle clients receive 421, messages in progress may be completed within the grace period."""
        if self._stop_wanted.is_set():
            return
        self._stop_wanted.set()
        self._journal.stopping(len(self.connections))
        for scope in self._accepting:
            scope.cancel()
        if self._poller is not None:
            for bound in self._listeners:  # the cancelled tasks do it later, and a client accepted before it gets 421
                self._poller.ignore(bound.socket.fileno())
        self.drain()
        # Cancels everything that has not ended by then, such as a hook or a disk that hangs.
        self._serving.deadline = trio.current_time() + self.grace * 2

    def drain(self) -> None:
        """Refuse new and idle clients with 421; messages in progress may be completed within the grace period."""
        if self.is_stopping:
            return
        self.is_stopping = True
        for connection in list(self.connections):
            connection.stop(self.grace)

    def resume(self) -> None:
        """Undo `drain`. Has no effect after `stop`."""
        self.is_stopping = self._stop_wanted.is_set()

    def watch_timeouts(self, shortest: float) -> None:
        """Check often enough for timeouts of `shortest` seconds and more."""
        self._sweeper.look_for(shortest)

    def abort(self) -> None:
        """End every session now, including messages in progress."""
        self.stop()
        self._serving.cancel()

    # ---- accepting

    async def _accept(self, bound: BoundListener) -> None:
        """Accept connections until the worker stops."""
        ends = bound.local_address

        def serve(fd: int, address: str, port: int) -> None:
            self._serve(fd, Peer(address, port, *ends), bound.listener)

        def refuse(fd: int, address: str, port: int) -> None:
            self.sessions += 1
            self._refuse(fd, Peer(address, port, *ends), bound.listener, replies.TOO_BUSY)

        def report_shortage(exc: OSError) -> None:
            self._shortage.note(exc)
            self._shortage.refuse(bound.socket, refuse)

        with trio.CancelScope() as scope:
            self._accepting.append(scope)
            if not self._stop_wanted.is_set():  # `stop` may have been called before this task has begun
                await accept_forever(bound.socket, serve, report_shortage, self._poller)
        close_listener(bound.socket, unlinks=bound.is_own)

    def _serve(self, fd: int, peer: Peer, listener: Listener) -> None:
        """Start the connection of an accepted socket in its own task, or refuse it first."""
        assert self._nursery is not None
        self.sessions += 1
        if self.is_stopping:
            self._refuse(fd, peer, listener, replies.SHUTTING_DOWN)
            return
        network: str | None = None
        if not listener.proxy_networks:  # otherwise the client of a proxy is known later
            network = peer.network
            refusal = self.admission.admit(network)
            if refusal is not None:
                self._refuse(fd, peer, listener, refusal)
                return
        stream: SocketStream | None = None
        try:
            stream = SocketStream(fd, self._poller)
            connection = Connection(stream, peer, listener, self, self.sessions, network)
        except Exception as exc:  # noqa: BLE001 - whatever it is, it costs this client and no other
            self._journal.error(self.sessions, "accept", exc)
            if network is not None:
                self.admission.release(network)
            if stream is None:
                close(fd)
            else:
                stream.close_nowait()
            return
        self._nursery.start_soon(connection.run, name=_TASK_NAME)

    def _refuse(self, fd: int, peer: Peer, listener: Listener, refusal: Reply) -> None:
        """Refuse a client in place of the greeting, without waiting."""
        self._journal.rejected_connection(self.sessions, peer, listener.name, refusal)
        if listener.metrics is not None:
            listener.metrics.count_refused_connection(refusal.encoded)
        try:
            if not listener.is_implicit_tls:
                send(fd, refusal.encoded)
        except OSError:
            pass  # it has left already
        finally:
            close(fd)

    async def _keep_journal(self) -> None:
        """Write the journal periodically, outside of the sessions that made its lines."""
        while True:
            await trio.sleep(_JOURNAL_INTERVAL)
            lines = self._journal.drain()
            if lines:
                self._write_journal(lines)
