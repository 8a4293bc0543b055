"""A worker in a thread of its own, with a loop of its own: it shares nothing with the loop of a test."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import trio

from penstock.app import Server

_STARTING: Final = 30.0
"""Seconds a start may take: it needs a few milliseconds."""
_STOPPING: Final = 30.0
"""Seconds a stop may take beyond its grace: it needs as little, unless a policy of the test hangs."""
_numbers = itertools.count(1)


class WorkerThread:
    """Runs a worker once. `start` and `stop` are called in the test's thread, and block it for milliseconds."""

    def __init__(self, *, grace: float, failed: Callable[[BaseException], None]) -> None:
        """`grace` is the seconds that sessions have to end by themselves; `failed` is told what the worker died of."""
        self._grace = grace
        self._failed = failed
        self._ready = threading.Event()
        self._token: trio.lowlevel.TrioToken | None = None
        self._stop_wanted = trio.Event()
        self._session_ended = trio.Event()
        self._is_patient = True
        """Sessions may still end by themselves."""
        self._thread: threading.Thread | None = None

    def start(self, server: Server) -> None:
        """Run the worker; return once it serves, or has failed."""
        name = f"penstock-test-server-{next(_numbers)}"
        self._thread = threading.Thread(target=self._run, args=(server,), name=name, daemon=True)
        self._thread.start()
        if not self._ready.wait(_STARTING):
            raise RuntimeError(f"the server has not started within {_STARTING:g} s")

    def stop(self) -> None:
        """Let the sessions end within the grace, then end them; return once the thread is gone. Raise RuntimeError."""
        assert self._thread is not None
        self._tell(self._stop_wanted.set)
        self._thread.join(self._grace)  # this thread keeps the time: a test may have stopped the clock of the loop
        self._tell(self._lose_patience)
        self._thread.join(_STOPPING)
        if self._thread.is_alive():
            raise RuntimeError(f"the server has not stopped within {_STOPPING:g} s: is a policy of the test blocking?")

    def note_end(self) -> None:
        """Look again whether sessions are left. Called in the worker's thread when one has ended."""
        self._session_ended.set()

    def _tell(self, call: Callable[[], None]) -> None:
        """Have something called in the worker's thread, unless it is over."""
        if self._token is not None:
            with suppress(trio.RunFinishedError):
                self._token.run_sync_soon(call)

    def _lose_patience(self) -> None:
        self._is_patient = False
        self._session_ended.set()

    def _run(self, server: Server) -> None:
        """Be the thread."""
        try:
            trio.run(self._serve, server)
        except BaseException as exc:  # noqa: BLE001 - whatever it is, the test's thread has to hear of it
            self._failed(exc)
        finally:
            server.close()  # the worker has closed them already, unless the start has failed
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
