"""A worker: listening sockets, the sessions they bring, one sweeper, one journal writer.

Two fates at the end: the listeners are cancelled at once, the sessions get a grace. `stop` may be called from a signal
handler's task or from a test; `run` returns when the last session is over.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from socket import AF_UNIX
from socket import socket as Socket  # noqa: N812 - a field is called socket
from typing import Final

import outcome
import trio

from penstock.journal import Journal
from penstock.metrics._session import Metrics
from penstock.net._poller import HAS_EPOLL, Poller, close, send
from penstock.net.listen import accept_forever, close_listener, name_of
from penstock.net.stream import watch_sockets
from penstock.reply import Reply
from penstock.server._turns import Acceptor, Host
from penstock.server.connection import Connection
from penstock.server.limits import Admission, Sweeper
from penstock.server.listener import Listener
from penstock.transaction import Peer

_JOURNAL_INTERVAL: Final = 0.25
"""Seconds a journal line may wait before it is written."""


@dataclass(frozen=True, slots=True)
class BoundListener:
    """A listening socket and the listener behind it."""

    socket: Socket
    listener: Listener
    kind: type[Connection] = Connection
    """What becomes of the sockets it accepts."""
    is_own: bool = True
    """Nobody else listens there: the path of a unix socket ends with it."""

    @property
    def local_address(self) -> tuple[str, int]:
        """The address and port it is bound to; ("", 0) for a unix socket."""
        if self.socket.family == AF_UNIX:
            return ("", 0)
        address, port, *_ = self.socket.getsockname()
        return (address, port)


class Worker(Host):
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
    ) -> None:
        """`grace` is the seconds a message under way has to arrive once the worker stops.

        `write_journal` gets whole lines, in the loop: it must neither wait nor raise.

        `metrics` is that of the listeners, when they have one.
        """
        super().__init__(sweeper.watched, admission)
        self._listeners = listeners
        self._sweeper = sweeper
        self._journal = journal
        self._write_journal = write_journal
        self._grace = grace
        self._stop_wanted = trio.Event()
        self._all_gone = trio.Event()
        self._sessions: trio.Nursery | None = None
        self._poller = Poller() if HAS_EPOLL else None
        if self._poller is not None:
            self._poller.metrics = metrics
        self._accepting: list[trio.CancelScope] = []
        self._serving = trio.CancelScope()

    # ---- what connections see

    @property
    def open_connections(self) -> int:
        """Connections that are open."""
        return len(self.connections)

    @property
    def octets_under_way(self) -> int:
        """Octets that have come over the connections that are open."""
        return sum(connection.octets for connection in self.connections)

    @property
    def watched(self) -> int:
        """Sockets that the poller watches."""
        return 0 if self._poller is None else len(self._poller)

    @property
    def admitted(self) -> int:
        """Connections that count for the limits."""
        return self.admission.total

    def ended(self) -> None:
        """A connection is over while the worker wants to end."""
        if not self.connections:
            self._all_gone.set()

    def serve(self, connection: Connection) -> None:
        """Give a new connection the task that it needs."""
        assert self._sessions is not None
        self._sessions.start_soon(connection.run)

    def spawn(self, connection: Connection, woken: outcome.Outcome[int]) -> None:
        """Give a connection that has come without a task one that goes on with `run`."""
        assert self._sessions is not None
        self._sessions.start_soon(connection.run, woken)

    # ---- the life of a worker

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve until `stop` was called and the last session is over; `started` once all listeners are open."""
        async with trio.open_nursery() as background:
            background.start_soon(self._sweeper.run)
            background.start_soon(self._keep_journal)
            if self._poller is not None:
                background.start_soon(watch_sockets, self._poller)
            try:
                with self._serving:
                    async with trio.open_nursery() as sessions:
                        self._sessions = sessions
                        sessions.start_soon(self._outlast)
                        for bound in self._listeners:
                            self._journal.listening(name_of(bound.socket), bound.listener.name)
                            sessions.start_soon(self._serve_listener, bound)
                        task_status.started()
            finally:
                for connection in list(self.connections):
                    connection.abort()
                for bound in self._listeners:
                    close_listener(bound.socket, unlinks=bound.is_own)
                background.cancel_scope.cancel()
        if self._poller is not None:
            self._poller.close()
        self._journal.stopped()
        self._write_journal(self._journal.drain())

    def stop(self) -> None:
        """Stop accepting; send idle clients away, and let messages under way arrive within the grace."""
        if self.is_stopping:
            return
        self.is_stopping = True
        self._stop_wanted.set()
        self._journal.stopping(len(self.connections))
        for scope in self._accepting:
            scope.cancel()
        for connection in list(self.connections):
            connection.stop(self._grace)
        # Whatever does not end by itself (a hook, a disk that hangs) ends with this.
        self._serving.deadline = trio.current_time() + self._grace * 2

    def abort(self) -> None:
        """End every session now, messages under way among them."""
        self.stop()
        self._serving.cancel()

    async def _outlast(self) -> None:
        """Keep the nursery open while connections are, which may have no task in it."""
        await self._stop_wanted.wait()
        while self.connections:
            self._all_gone = trio.Event()
            await self._all_gone.wait()

    async def _serve_listener(self, bound: BoundListener) -> None:

        porter = Acceptor(self, self._poller, bound.listener, bound.kind, *bound.local_address)

        def report_shortage(exc: OSError) -> None:
            self._journal.error(0, "accept", exc)

        with trio.CancelScope() as scope:
            self._accepting.append(scope)
            await accept_forever(bound.socket, porter, report_shortage, self._poller)
        close_listener(bound.socket, unlinks=bound.is_own)

    def report(self, exc: Exception) -> None:
        """Journal why a client that was accepted is not served."""
        self._journal.error(self.sessions, "accept", exc)

    def turn_away(self, fd: int, peer: Peer, listener: Listener, refusal: Reply) -> None:
        """Refuse a client before it costs a task: one send, no waiting."""
        self._journal.rejected_connection(self.sessions, peer, listener.name, refusal)
        if listener.metrics is not None:
            listener.metrics.turned_away(refusal.encoded)
        try:
            if not listener.is_implicit_tls:
                send(fd, refusal.encoded)
        except OSError:
            pass  # it has left, which is what it was asked for
        finally:
            close(fd)

    async def _keep_journal(self) -> None:
        """Write the journal from time to time, away from the sessions that made its lines."""
        while True:
            await trio.sleep(_JOURNAL_INTERVAL)
            lines = self._journal.drain()
            if lines:
                self._write_journal(lines)
