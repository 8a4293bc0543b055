"""A worker in its own thread with its own event loop, which shares nothing with the loop of a test."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from penstock.app import Server

_STARTING: Final = 30.0
"""Seconds that a start may take; it needs a few milliseconds."""
_STOPPING: Final = 30.0
"""Seconds that a stop may take beyond its grace; more means that a policy of the test hangs."""
_numbers = itertools.count(1)


class WorkerThread:
    """Runs a worker once. `start` and `stop` are called by the test's thread and block it for milliseconds."""

    def __init__(self, *, grace: float, failed: Callable[[BaseException], None]) -> None:
        """`grace`: seconds that open sessions have to end. `failed` gets the exception that ended the worker."""
        self._grace = grace
        self._failed = failed
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop_wanted = trio.Event()
        self._session_ended = trio.Event()
        self._is_patient = True
        """The grace is not over."""
        self._thread: threading.Thread | None = None

    def start(self, server: Server) -> None:
        """Run the worker; return when it serves or has failed."""
        name = f"penstock-test-server-{next(_numbers)}"
        self._thread = threading.Thread(target=self._run, args=(server,), name=name, daemon=True)
        self._thread.start()
        if not self._ready.wait(_STARTING):
            raise RuntimeError(f"the server has not started within {_STARTING:g} s")

    def stop(self) -> None:
        """Let the sessions end within the grace, then end them. Raise RuntimeError if the thread does not end."""
        assert self._thread is not None
        self._tell(self._stop_wanted.set)
        self._thread.join(self._grace)  # this thread keeps the time: a test may have frozen the clock of the loop
        self._tell(self._lose_patience)
        self._thread.join(_STOPPING)
        if self._thread.is_alive():
            raise RuntimeError(f"the server has not stopped within {_STOPPING:g} s: is a policy of the test blocking?")

    def note_end(self) -> None:
        """Check whether sessions are left. Called in the worker's thread when one has ended."""
        self._session_ended.set()

    def _tell(self, call: Callable[[], None]) -> None:
        """Call something in the worker's thread, unless it has ended."""
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(call)

    def _lose_patience(self) -> None:
        self._is_patient = False
        self._session_ended.set()

    def _run(self, server: Server) -> None:
        """Run in the thread."""
        try:
            trio.run(self._serve, server)
        except BaseException as exc:  # noqa: BLE001 - the test's thread must get every failure
            self._failed(exc)
        finally:
            server.close()  # the worker closes its sockets unless the start has failed
            self._ready.set()

    async def _serve(self, server: Server) -> None:
        self._token = trio.lowlevel.current_trio_token()
        async with trio.open_nursery() as nursery:
            await nursery.start(server.run)
            self._ready.set()
            await self._stop_wanted.wait()
            while self._is_patient and server.worker.open_connections:
                self._session_ended = trio.Event()
                await self._session_ended.wait()
            server.abort()
