"""The task of a session: it makes connections, negotiates TLS, and is parked while the poller handles the replies.

What is sent and counted is in penstock.load.session.
"""

from __future__ import annotations

import errno
import socket
import ssl
from typing import TYPE_CHECKING

import trio

from penstock.net.client import ClientConnection, HandshakeError
from penstock.net.connect import connect, finish_connect
from penstock.smtp.client import CannotSendError, ProtocolError
from penstock.smtp.client_session import ClosingError, OpeningError, Step

if TYPE_CHECKING:
    from penstock.load.session import Session
    from penstock.net.stream import SocketStream


async def run_session(session: Session) -> None:
    """Make connections as long as there is work. Whatever fails is counted."""
    session.start()
    while True:
        await _run_connection(session)
        if session.opened is None:  # else the next connection was begun already
            if not await session.pool.next_connection(session):
                return
            session.start()


async def _run_connection(session: Session) -> None:
    counts_error = ""
    kind = ""
    try:
        await _converse(session)
        if session.is_done:
            if session.opened is None:
                session.finish()
        else:
            kind, counts_error = "closed", "the server closed the connection"
    except Exception as exc:  # noqa: BLE001 - whatever it is, it costs this connection alone
        kind, counts_error = _kind_of(exc), str(exc.__cause__ or exc)
        if session.timed_out:
            kind, counts_error = "timeout", session.timed_out
        elif session.connection is None and kind == "timeout":
            kind = "connect timeout"
    finally:
        _close(session)
    if kind:
        session.pool.counts.error(kind, f"{session.target}: {counts_error}")


async def _converse(session: Session) -> None:
    """Be a client, from the connection to the reply to QUIT."""
    stream = await _connect(session)
    protocol = session.begin_connection()
    connection = ClientConnection(stream, protocol)
    session.use(connection)
    if session.pool.plan.tls == "implicit":
        await _start_tls(session, connection)
    while await connection.run(session.on_reply) and not session.is_done:
        if protocol.step is Step.HANDSHAKE:
            await _start_tls(session, connection)


async def _connect(session: Session) -> SocketStream:
    pool, target, timeout = session.pool, session.target, session.pool.plan.timeout
    if session.opened is not None:
        (fd, code), session.opened = session.opened, None
        return await finish_connect(socket.socket(fileno=fd), code, pool.poller, timeout=timeout)
    if target.path:
        return await connect(socket.AF_UNIX, target.path, pool.poller)
    assert target.place is not None
    return await connect(target.family, target.place, pool.poller, source=session.source, timeout=timeout)


async def _start_tls(session: Session, connection: ClientConnection) -> None:
    pool = session.pool
    assert pool.tls is not None
    resumed = pool.tls_sessions.get(session.target) if pool.plan.resumption else None
    await connection.start_tls(pool.tls, session.target.host or "localhost", is_private=True, resumed=resumed)
    session.note_phase("tls")


def _close(session: Session) -> None:
    """Close the connection."""
    connection = session.connection
    if connection is not None:
        pool = session.pool
        if pool.plan.resumption and connection.tls_session is not None:
            pool.tls_sessions[session.target] = connection.tls_session
        connection.close_nowait()
    session.use(None)


def _kind_of(exc: BaseException) -> str:
    """Return the kind of an error, as it is counted."""
    if isinstance(exc, ClosingError) or (isinstance(exc, OpeningError) and exc.reply is not None):
        return "refused"
    if isinstance(exc, OpeningError | CannotSendError):
        return "not offered"
    if isinstance(exc, HandshakeError) and isinstance(exc.__cause__, trio.BrokenResourceError):
        exc = exc.__cause__
    cause = exc.__cause__ if isinstance(exc, trio.BrokenResourceError) and exc.__cause__ is not None else exc
    if isinstance(cause, ssl.SSLError | HandshakeError):
        return "tls"
    if isinstance(cause, ProtocolError):
        return "protocol"
    if isinstance(cause, ConnectionRefusedError):
        return "connect refused"
    if isinstance(cause, TimeoutError):
        return "timeout"
    if isinstance(cause, ConnectionResetError | BrokenPipeError):
        return "reset"
    if isinstance(cause, OSError):
        return errno.errorcode.get(cause.errno or 0, "os").lower()
    return type(cause).__name__
