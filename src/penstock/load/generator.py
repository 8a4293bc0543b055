"""One run of one process: which session starts which message when, in a closed or an open loop.

In a closed loop a session that is free starts the next message, after its think time if it has one. In an open loop
messages have intended starts (penstock.load.schedule); a message that finds no free session waits for one, and its
latency counts from its intended start. So a server that stalls is charged for all the messages it delayed, and not only
for the few that were in flight (coordinated omission).
"""

from __future__ import annotations

import gc
import itertools
import resource
import ssl
import time
from collections.abc import Awaitable, Callable
from time import perf_counter, perf_counter_ns
from typing import Any, Final

import trio

from penstock.load.counts import Counts, Interval
from penstock.load.jobs import JobSource
from penstock.load.pace import Pace
from penstock.load.plan import Plan, Target
from penstock.load.resolve import resolved
from penstock.load.runner import run_session
from penstock.load.session import Session
from penstock.load.texts import text_of
from penstock.net._poller import Poller
from penstock.net.stream import watch_sockets
from penstock.net.tls import client_context

_MAX_WAITING: Final = 1_000_000
"""Messages that may wait for a session; further ones are dropped and counted."""
_RETRY: Final = 0.05
"""Seconds before a session reconnects after a failed connection."""
_MAX_FAILURES: Final = 10
"""Failed connections in a row, per session, after which the run is given up."""


class Generator:
    """A run. `run` returns when it is over."""

    def __init__(
        self,
        plan: Plan,
        *,
        number: Callable[[], int] | None = None,
        on_interval: Callable[[Interval], Awaitable[None]] | None = None,
    ) -> None:
        """Raise PlanError, OSError.

        `number` returns the number of the next message, from 1 on. `on_interval` gets what was counted in each second,
        but for the last.
        """
        plan.check()
        self.plan = plan
        self.counts = Counts()
        self.warm_up: Counts | None = None
        """The counts of the warm-up, once it is over."""
        self.poller = Poller()
        self.tls: ssl.SSLContext | None = None
        if plan.tls != "none":
            self.tls = client_context(verify=plan.ca_file is not None, ca_file=str(plan.ca_file or ""))
        self.tls_sessions: dict[Target, ssl.SSLSession | None] = {}
        self.last_interval: Interval | None = None
        """What was counted in the last second, once the run is over."""
        self._on_interval = on_interval
        self._total = plan.total
        self._targets: list[Target] = []
        self.jobs = JobSource(
            plan.total,
            number or itertools.count(1).__next__,
            text_of(plan.size, plan.folder, plan.seed, chunking=plan.chunking),
            is_open_loop=plan.is_open_loop,
        )
        self._sessions: list[Session] = []
        self._idle: list[Session] = []
        """Sessions that wait for a message to be due."""
        self._thinking: dict[Session, trio.CancelScope] = {}
        self._pace: Pace | None = None
        self.open_sessions = 0
        """Connections that are open."""
        self._failures = 0
        """Connections in a row that completed no message."""
        self._cpu_begun = 0.0
        """CPU time of the process when the figures began."""
        self._over = trio.Event()
        self._stopped = trio.Event()
        self._scope = trio.CancelScope()
        self._nursery: trio.Nursery

    @property
    def accepted(self) -> int:
        """Accepted messages so far."""
        return self.counts.accepted

    @property
    def failed(self) -> int:
        """Failed messages so far."""
        return self.counts.failed

    def so_far(self) -> dict[str, Any] | None:
        """Return what was counted until now, as `Counts.as_report` does; None during the warm-up."""
        return None if self.plan.warm_up and self.warm_up is None else self.counts.as_report()

    def stop(self) -> None:
        """Start no more messages; those in flight may end. Messages that wait for a session are dropped and counted."""
        self.jobs.is_stopping = True
        self._stopped.set()
        self.counts.dropped += len(self.jobs.intended)
        self.jobs.intended.clear()
        self._end_pace()
        for session in list(self._thinking):
            self._rest(session)

    def abort(self) -> None:
        """End the run now; messages in flight are lost."""
        self.stop()
        self._scope.cancel()

    # ---- called by sessions

    def wait_for_job(self, session: Session) -> bool:
        """Call `begin` when there is a message. Return False if there will be none."""
        if self.jobs.has_more and session.has_to_think:
            scope = self._thinking[session] = trio.CancelScope()
            self._nursery.start_soon(self._think, session, scope)
            return True
        if not self.jobs.is_pacing:
            return False
        self._idle.append(session)
        return True

    def on_success(self) -> None:
        """Note that a connection has completed a message: the target can be reached."""
        self._failures = 0

    async def next_connection(self, session: Session) -> bool:
        """Note that a connection has ended, and wait until the next is due. Return False if there is no more work."""
        self.open_sessions -= 1
        session.release()
        if session in self._idle:
            self._idle.remove(session)
        if session in self._thinking:
            self._thinking.pop(session).cancel()
        if session.concluded:
            self._failures = 0
        else:
            self._failures += 1
        if self._failures > _MAX_FAILURES * self.plan.sessions:
            self.counts.has_given_up = True
            self.stop()
        if not self.jobs.has_work():
            self._finish_if_idle()
            return False
        self.open_sessions += 1
        # No message waits for a target that may be gone for good, or for a session that thinks.
        pause = _RETRY if self._failures else self.plan.think
        if not pause:
            session.promise()
            return True
        with trio.move_on_after(pause):
            await self._stopped.wait()
        if self.jobs.has_work():
            return True
        self.open_sessions -= 1
        self._finish_if_idle()
        return False

    def _finish_if_idle(self) -> None:
        if self.open_sessions == 0:
            self._over.set()

    async def _think(self, session: Session, scope: trio.CancelScope) -> None:
        with scope:
            await trio.sleep(self.plan.think)
        if not scope.cancel_called:
            self._rest(session)

    def _rest(self, session: Session) -> None:
        """End the think time of a session."""
        self._thinking.pop(session).cancel()
        session.is_rested = True
        session.begin()

    # ---- the run

    async def resolve(self) -> None:
        """Resolve the targets. Raise PlanError if one has no address."""
        plan = self.plan
        self._targets = [await resolved(target, plan.sources, plan.timeout) for target in plan.targets]

    async def run(self) -> Counts:
        """Send everything, and return the counts. Raise PlanError if a target has no address."""
        plan = self.plan
        if not self._targets:
            await self.resolve()
        _raise_descriptor_limit()
        gc.collect()
        gc.freeze()
        sources = plan.sources or ("",)
        self._sessions = [
            Session(self, self._targets[n % len(self._targets)], sources[n % len(sources)])
            for n in range(plan.worker, min(plan.sessions, plan.messages or plan.sessions), plan.workers)
        ]
        self.counts = Counts()
        self._cpu_begun = time.process_time()
        try:
            with self._scope:
                await self._send_all()
        finally:
            self._end()
        return self.counts

    def _end(self) -> None:
        """Complete the counts; messages in flight after a second signal are lost."""
        counts = self.counts
        counts.ended = perf_counter()
        counts.cpu = time.process_time() - self._cpu_begun
        plan = self.plan
        if self._total is not None and (plan.is_open_loop or plan.duration is None):  # else the time decides how many
            dropped = counts.dropped + (self.warm_up.dropped if self.warm_up is not None else 0)
            counts.unsent = max(0, self._total - self.jobs.started - dropped)
        self.last_interval = counts.tick(0, is_last=True)
        self.poller.close()
        gc.unfreeze()

    async def _send_all(self) -> None:
        plan = self.plan
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(watch_sockets, self.poller)
            nursery.start_soon(self._tick)
            nursery.start_soon(self._sweep)
            self.open_sessions = len(self._sessions)
            if self._total == 0:  # one of several processes, with less messages than processes
                self.stop()
            elif plan.is_open_loop:
                self._pace = Pace(
                    self.poller, plan.schedule, self._total, self._due, first=plan.worker, step=plan.workers
                )
            elif plan.duration is not None:
                nursery.start_soon(self._stop_after, plan.duration)
            nursery.start_soon(self._start_sessions)
            await self._over.wait()
            nursery.cancel_scope.cancel()

    async def _start_sessions(self) -> None:
        """Start the sessions, in a closed loop evenly within the ramp."""
        pause = 0.0 if self.plan.is_open_loop else self.plan.ramp / len(self._sessions)
        for session in self._sessions:
            session.promise()
        for number, session in enumerate(self._sessions):
            if self.jobs.is_stopping:
                self.open_sessions -= len(self._sessions) - number
                for unused in self._sessions[number:]:
                    unused.release()
                self._finish_if_idle()
                return
            self._nursery.start_soon(run_session, session)
            if pause:
                with trio.move_on_after(pause):
                    await self._stopped.wait()
            elif number % 100 == 99:
                await trio.lowlevel.checkpoint()

    async def _stop_after(self, seconds: float) -> None:
        """Stop after the duration of a closed loop."""
        await trio.sleep(seconds)
        self.stop()

    def _due(self, at: int) -> None:
        """Give a message that is due to an idle session, or let it wait."""
        intended = self.jobs.intended
        if len(intended) >= _MAX_WAITING:
            self.counts.dropped += 1
        elif self.plan.give_up_at is not None and len(intended) >= self.plan.give_up_at:
            self.counts.dropped += 1
            self.stop()
        else:
            intended.append(at)
            if self._idle:
                self._idle.pop().begin()
            else:
                self.counts.late += 1
        if self._pace is not None and self._pace.is_over:
            self._end_pace()

    def _end_pace(self) -> None:
        """No more messages become due: idle sessions send QUIT."""
        self.jobs.is_pacing = False
        if self._pace is not None:
            self._pace.close()
            self._pace = None
        idle, self._idle = self._idle, []
        for session in idle:
            session.begin()

    async def _tick(self) -> None:
        """End the warm-up, then each second."""
        due = trio.current_time()
        if self.plan.warm_up:
            due += self.plan.warm_up
            await trio.sleep_until(due)
            self.warm_up = self.counts
            # A message that began in the warm-up counts where it ends: a server that stalls then is charged for it.
            self.counts = Counts(attempted=self.warm_up.in_flight)
            self._cpu_begun = time.process_time()
        while True:
            due += 1
            await trio.sleep_until(due)
            interval = self.counts.tick(self.open_sessions)
            if self._on_interval is not None:
                await self._on_interval(interval)

    async def _sweep(self) -> None:
        """End connections whose reply is overdue."""
        timeout = self.plan.timeout
        while True:
            await trio.sleep(min(1.0, timeout / 4))
            before = perf_counter_ns() - int(timeout * 1e9)
            for session in self._sessions:
                if session.is_waiting and session.asked_at < before:
                    session.time_out(timeout)


def _raise_descriptor_limit() -> None:
    """Raise the limit of open files to the hard limit."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
