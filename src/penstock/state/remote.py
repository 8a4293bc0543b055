"""The state of a worker: the keeper of the supervisor has it.

Rules
-----
1. An answer takes the keeper a few microseconds; to switch tasks would cost more than to wait for it. So the whole
   worker waits for the answer, at most PATIENCE; only then it goes on, and the task that has asked waits alone.
2. If an answer takes longer than DEADLINE, or the keeper reads no questions, the check that has asked is left out;
   after some failures in a row the keeper is not asked for a while, so that it costs no session the deadline.

Measured on two cores, with the keeper in another process: see bench/state.py.
"""

from __future__ import annotations

import select
import socket
from collections.abc import Callable, Sequence
from typing import Final

import outcome
import trio

from penstock.breaker import Breaker
from penstock.state.base import Charge, GreylistTimes, Later, Learned, StateUnavailableError
from penstock.state.wire import (
    ANSWER_OCTETS,
    Answer,
    Available,
    GiveBack,
    Greylist,
    Learn,
    Note,
    Take,
    decode_answer,
    encode,
)

DEADLINE: Final = 0.05
"""Seconds."""
PATIENCE: Final = 1
"""Milliseconds."""
_LEARNED: Final = 200
"""Entries of one packet."""
_FAILURES: Final = 5
_PAUSE: Final = 5.0


class RemoteState:
    """Asks the keeper (penstock.state.base.State)."""

    def __init__(
        self,
        sock: socket.socket,
        report: Callable[[str], None],
        *,
        deadline: float = DEADLINE,
        patience: int = PATIENCE,
    ) -> None:
        """`sock` is what `Keeper.connect` has returned; it is closed by `run`. `report` gets what fails, in a line."""
        sock.setblocking(False)
        self._socket = sock
        self._report = report
        self._deadline = deadline
        self._patience = patience
        self._buffer = memoryview(bytearray(ANSWER_OCTETS))
        """A new buffer for each packet would cost more than the rest."""
        self._poll = select.poll()
        self._poll.register(sock, select.POLLIN)
        self._number = 0
        self._waiting: dict[int, trio.lowlevel.Task] = {}
        self._breaker = Breaker(_FAILURES, _PAUSE, _PAUSE)

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Hand answers to the tasks that wait for them, until cancelled."""
        with self._socket:
            task_status.started()
            while True:
                await trio.lowlevel.wait_readable(self._socket)
                if not self._read_answers():
                    break
        # The supervisor has died: no answer is going to come, and the worker is about to stop.
        for task in self._waiting.values():
            trio.lowlevel.reschedule(task, outcome.Error(StateUnavailableError("the keeper has ended")))
        self._waiting.clear()

    def _read_answers(self) -> bool:
        """Hand on the answers that have come. Return False at the end."""
        try:
            while octets := self._socket.recv_into(self._buffer):
                self._hand_on(decode_answer(self._buffer[:octets]))
        except BlockingIOError:
            return True
        except OSError:
            return False
        return False

    def _hand_on(self, answer: Answer) -> None:
        task = self._waiting.pop(answer.number, None)
        if task is not None:
            trio.lowlevel.reschedule(task, outcome.Value(answer.value))

    def _wait_briefly(self, number: int) -> int | None:
        """Return the answer to a question if it comes at once (rule 1). Raise OSError at the end."""
        while self._poll.poll(self._patience):
            octets = self._socket.recv_into(self._buffer)
            if not octets:
                raise ConnectionResetError("the supervisor has ended")
            answer = decode_answer(self._buffer[:octets])
            if answer.number == number:
                return answer.value
            self._hand_on(answer)  # that of a task that waits already
        return None

    def available(self, charges: Sequence[Charge]) -> Later:
        """Return the index of the first charge that is not available now, -1 if all are."""
        self._number += 1
        return self._ask(self._number, encode(Available(self._number, tuple(charges))))

    def take(self, charges: Sequence[Charge]) -> Later:
        """Take all charges and return -1, or take none and return the index of the first that is not available."""
        self._number += 1
        return self._ask(self._number, encode(Take(self._number, tuple(charges))))

    def greylist(self, key: str, times: GreylistTimes) -> Later:
        """Note an attempt. Return 0 if it passes, otherwise the nanoseconds after which another one would."""
        self._number += 1
        return self._ask(self._number, encode(Greylist(self._number, key, times)))

    def give_back(self, charges: Sequence[Charge]) -> None:
        """Undo a take."""
        self._tell(encode(GiveBack(tuple(charges))))

    def note(self, charges: Sequence[Charge]) -> None:
        """Take charges as far as they are available."""
        self._tell(encode(Note(tuple(charges))))

    def learn(self, entries: Sequence[Learned]) -> None:
        """Take over what other servers have noted, as far as the keeper reads it at once.

        A node that starts gets very many entries: that its keeper is behind with them does not mean that it fails.
        """
        for start in range(0, len(entries), _LEARNED):
            try:
                self._socket.send(encode(Learn(tuple(entries[start : start + _LEARNED]))))
            except OSError:
                return

    def _tell(self, packet: bytes) -> None:
        try:
            self._socket.send(packet)
        except OSError as exc:
            self._fail(str(exc))

    def _ask(self, number: int, packet: bytes) -> Later:
        breaker = self._breaker
        if breaker.blocks(trio.current_time()):
            raise StateUnavailableError("the keeper has not answered, and is not asked for a while")
        breaker.probe()
        try:
            self._socket.send(packet)
            value = self._wait_briefly(number)
        except OSError as exc:  # its queue is full, or it has ended
            raise self._fail(str(exc)) from exc
        if value is None:
            return self._wait(number)
        breaker.succeeded()
        return value

    async def _wait(self, number: int) -> int:
        """Wait for an answer until the deadline."""
        waiting = self._waiting

        def abort(_: object) -> trio.lowlevel.Abort:
            waiting.pop(number, None)
            return trio.lowlevel.Abort.SUCCEEDED

        waiting[number] = trio.lowlevel.current_task()
        try:
            with trio.move_on_after(self._deadline):
                value: int = await trio.lowlevel.wait_task_rescheduled(abort)
                self._breaker.succeeded()
                return value
        except trio.Cancelled:
            self._breaker.abandon()
            raise
        raise self._fail(f"no answer within {self._deadline:g} s")

    def _fail(self, cause: str) -> StateUnavailableError:
        if self._breaker.failed(trio.current_time()):
            self._report(f"greylisting and rates are left out for {_PAUSE:g} s: the supervisor gives {cause}")
        return StateUnavailableError(cause)
