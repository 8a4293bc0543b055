"""Who starts when: closed loop and open loop, ramps, the clocks, the end.

In a closed loop a session that is free starts the next message. In an open loop messages have intended starts, evenly
at the rate; one that finds no session free waits for it, and its latency counts from when it was to start. So a server
that stalls is charged for all the messages that it kept from starting, not for the few that happened to be under way
(coordinated omission).
"""

from __future__ import annotations

import gc
import resource
import ssl
from collections import deque
from time import perf_counter, perf_counter_ns
from typing import Final

import trio

from penstock.load.counts import Counts
from penstock.load.pace import Pace, starts_within
from penstock.load.plan import Plan, Target
from penstock.load.resolve import resolved
from penstock.load.session import Job, Session
from penstock.load.texts import text_of
from penstock.net._poller import Poller
from penstock.net.stream import watch_sockets
from penstock.net.tls import client_context

_MOST_WAITING: Final = 1_000_000
"""Intended starts that may wait for a session; more are dropped, and counted."""
_RETRY: Final = 0.05
"""Seconds before a session that could not connect tries again."""
_FAILURES: Final = 10
"""Connections in a row that came to nothing, per session, before the run is given up."""


class Generator:
    """A run. `run` returns when it is over."""

    def __init__(self, plan: Plan) -> None:
        """Raise PlanError, OSError."""
        plan.check()
        self.plan = plan
        self.counts = Counts()
        self.poller = Poller()
        self.tls: ssl.SSLContext | None = None
        if plan.tls != "none":
            self.tls = client_context(verify=plan.ca_file is not None, ca_file=str(plan.ca_file or ""))
        self.tls_sessions: dict[Target, ssl.SSLSession | None] = {}
        self._targets: list[Target] = []
        self._text_of = text_of(plan.size, plan.folder, plan.seed, chunking=plan.chunking)
        self._sessions: list[Session] = []
        self._idle: list[Session] = []
        self._started = 0
        """Messages that were given a session."""
        self._promised = 0
        """Sessions that connect, and have not asked for a message yet."""
        self._intended: deque[int] = deque()
        self._is_pacing = plan.rate is not None
        """There are messages that are not due yet."""
        self._pace: Pace | None = None
        self.is_stopping = False
        """`stop` was called."""
        self._open = 0
        self._failures = 0
        """Connections in a row that brought no message to an end."""
        self._over = trio.Event()
        self._stopped = trio.Event()
        self._nursery: trio.Nursery

    @property
    def open_sessions(self) -> int:
        """Connections that are open."""
        return self._open

    @property
    def is_over(self) -> bool:
        """The last session has ended."""
        return self._over.is_set()

    def stop(self) -> None:
        """Start nothing any more; what is under way may end. Intended starts that wait are dropped, and counted."""
        self.is_stopping = True
        self._stopped.set()
        self.counts.dropped += len(self._intended)
        self._intended.clear()
        self._end_pace()

    # ---- what sessions see

    def next_job(self, session: Session) -> Job | None:
        """Return the next message; None when there is none now."""
        plan = self.plan
        if session.is_promised:
            session.is_promised = False
            self._promised -= 1
        if self.is_stopping or (plan.messages is not None and self._started >= plan.messages):
            return None
        intended = 0
        if plan.rate is not None:
            if not self._intended:
                return None
            intended = self._intended.popleft()
        self._started += 1
        return Job(self._started, self._text_of(self._started), intended)

    def wait_for_job(self, session: Session) -> bool:
        """Have `begin` called when there is a message. Return False when there will be none."""
        if not self._is_pacing:
            return False
        self._idle.append(session)
        return True

    def ended(self, session: Session) -> float | None:
        """Note that a connection is over. Return the seconds until the next one; None if there is no more work."""
        self._open -= 1
        if session.is_promised:
            self._promised -= 1
        if session in self._idle:
            self._idle.remove(session)
        if session.concluded:
            self._failures = 0
        else:
            self._failures += 1
        if self._failures > _FAILURES * self.plan.sessions:
            self.counts.has_given_up = True
            self.stop()
        if not self._has_work():
            if self._open == 0:
                self._over.set()
            return None
        self._open += 1
        if self._failures:  # no message waits for a target that may be gone for good
            return _RETRY
        self._promise(session)
        return 0.0

    def _promise(self, session: Session) -> None:
        """Keep a message for a session that connects."""
        session.is_promised = True
        self._promised += 1

    def _has_work(self) -> bool:
        if self.is_stopping:
            return False
        return self._is_pacing or (
            len(self._intended) > self._promised
            if self.plan.rate is not None
            else self.plan.messages is None or self._started + self._promised < self.plan.messages
        )

    # ---- the run

    async def resolve(self) -> None:
        """Look the targets up. Raise PlanError when one has no address."""
        plan = self.plan
        self._targets = [await resolved(target, plan.sources, plan.timeout) for target in plan.targets]

    async def run(self) -> Counts:
        """Send everything, and return what was counted. Raise PlanError when a target has no address."""
        plan = self.plan
        if not self._targets:
            await self.resolve()
        _raise_limit()
        gc.collect()
        gc.freeze()
        sources = plan.sources or ("",)
        self._sessions = [
            Session(self, self._targets[n % len(self._targets)], sources[n % len(sources)])
            for n in range(min(plan.sessions, plan.messages or plan.sessions))
        ]
        self.counts = Counts()
        try:
            await self._send_all()
        finally:
            self._end()
        return self.counts

    def _end(self) -> None:
        """Settle the counts; what is under way after a second signal is lost."""
        counts = self.counts
        counts.ended = perf_counter()
        plan = self.plan
        wanted = _starts(plan)
        if wanted is not None and (plan.rate is not None or plan.duration is None):  # not a matter of the time it took
            counts.unsent = max(0, wanted - counts.attempted - counts.dropped)
        counts.tick(0)
        self.poller.close()
        gc.unfreeze()

    async def _send_all(self) -> None:
        plan = self.plan
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            nursery.start_soon(watch_sockets, self.poller)
            nursery.start_soon(self._tick)
            nursery.start_soon(self._sweep)
            self._open = len(self._sessions)
            if plan.rate is not None:
                self._pace = Pace(self.poller, plan.rate, plan.ramp, _starts(plan), self._due)
            elif plan.duration is not None:
                nursery.start_soon(self._stop_after, plan.duration)
            nursery.start_soon(self._start_sessions)
            await self._over.wait()
            nursery.cancel_scope.cancel()

    async def _start_sessions(self) -> None:
        """Start the sessions, one after the other within the ramp of a closed loop."""
        pause = self.plan.ramp / len(self._sessions) if self.plan.rate is None else 0.0
        for session in self._sessions:
            self._promise(session)
        for number, session in enumerate(self._sessions):
            if self.is_stopping:
                self._open -= len(self._sessions) - number
                self._promised -= len(self._sessions) - number
                if self._open == 0:
                    self._over.set()
                return
            self._nursery.start_soon(session.run)
            if pause:
                with trio.move_on_after(pause):
                    await self._stopped.wait()
            elif number % 100 == 99:
                await trio.lowlevel.checkpoint()

    async def _stop_after(self, seconds: float) -> None:
        """Start nothing any more after the duration of a closed loop."""
        await trio.sleep(seconds)
        self.stop()

    def _due(self, at: int) -> None:
        """Give a message that is due to a session, or let it wait for one."""
        if len(self._intended) >= _MOST_WAITING:
            self.counts.dropped += 1
        else:
            self._intended.append(at)
            if self._idle:
                self._idle.pop().begin()
            else:
                self.counts.late += 1
        if self._pace is not None and self._pace.is_over:
            self._end_pace()

    def _end_pace(self) -> None:
        """Have no more messages become due; sessions that wait for one say QUIT."""
        self._is_pacing = False
        if self._pace is not None:
            self._pace.close()
            self._pace = None
        self._dismiss_idle()

    def _dismiss_idle(self) -> None:
        """Let sessions that wait say QUIT."""
        idle, self._idle = self._idle, []
        for session in idle:
            session.begin()

    async def _tick(self) -> None:
        """End the seconds."""
        due = trio.current_time()
        while True:
            due += 1
            await trio.sleep_until(due)
            self.counts.tick(self._open)

    async def _sweep(self) -> None:
        """End the connections that wait too long for an answer."""
        timeout = self.plan.timeout
        while True:
            await trio.sleep(min(1.0, timeout / 4))
            before = perf_counter_ns() - int(timeout * 1e9)
            for session in self._sessions:
                if session.is_waiting and session.asked_at < before:
                    session.time_out(timeout)


def _starts(plan: Plan) -> int | None:
    """Return how many messages an open loop starts: all that are due within its duration, however late."""
    if plan.duration is None or plan.rate is None:
        return plan.messages
    due = starts_within(plan.duration, plan.rate, plan.ramp)
    return due if plan.messages is None else min(plan.messages, due)


def _raise_limit() -> None:
    """Allow as many descriptors as the system lets us have."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
