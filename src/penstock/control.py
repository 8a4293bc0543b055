"""What operators can do with a running server, and the channel between a supervisor and its workers.

`Control` has two implementations: a server of one process acts itself, a supervisor asks its workers. The control
socket, /metrics and the signals use nothing else.

The channel is a socket pair with one JSON object per line. A supervisor that runs as root decodes what a worker sends,
so a line from a worker is plain JSON of bounded length, and its requests are not answered.
"""

from __future__ import annotations

import dataclasses
import itertools
import socket
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any, Final, Literal, Protocol

import msgspec
import trio

LONGEST_LINE: Final = 64 << 20
"""Octets of a line to a worker: settings and certificates."""
LONGEST_ANSWER: Final = 4 << 20
"""Octets of a line from a worker."""
_MOST_WAITING: Final = 64
"""Lines that may wait for the other side to read."""
_READ: Final = 65_536
_TIMEOUT: Final = 10.0
"""Default seconds to wait for an answer of the other side."""

Phase = Literal["starting", "running", "draining", "drained", "stopping"]
HopAction = Literal["suspend", "resume", "retry"]
ReloadResult = Literal["ok", "refused", "failed"]
"""refused: the configuration is wrong, nothing was changed; failed: a file or a new worker cannot be used."""


class ControlError(Exception):
    """A request cannot be carried out. The text says why."""


# ---- state


class ListenerState(msgspec.Struct, frozen=True, kw_only=True):
    """A listener."""

    name: str
    address: str
    certificate_not_after: float = 0.0
    """Unix time at which the certificate in use expires; 0 without TLS."""


class SpoolState(msgspec.Struct, frozen=True, kw_only=True):
    """A part of the spool."""

    messages: int
    recipients: int
    octets: int
    oldest_seconds: float
    """Age of the oldest message; 0 for an empty spool."""


class WorkerState(msgspec.Struct, frozen=True, kw_only=True):
    """A process that serves clients. Only the first five fields are known of one that does not answer."""

    index: int
    pid: int
    since: float = 0.0
    """Unix time of its start."""
    is_ready: bool = False
    restarts: int = 0
    sessions: int = 0
    """Open connections."""
    connections: int = 0
    """Connections so far."""
    tasks: int = 0
    listeners: tuple[ListenerState, ...] = ()
    spool: SpoolState | None = None
    hops_down: tuple[str, ...] = ()
    suspended: tuple[str, ...] = ()


class ReloadState(msgspec.Struct, frozen=True, kw_only=True):
    """The last reload."""

    at: float = 0.0
    """Unix time; 0: none yet."""
    result: ReloadResult = "ok"
    reason: str = ""
    """What is wrong, with the key."""


class ServerState(msgspec.Struct, frozen=True, kw_only=True):
    """A server: the supervisor and its workers, or one process."""

    version: str
    pid: int
    since: float
    phase: Phase
    is_ready: bool
    """It accepts mail: all workers are ready, and it is neither draining nor stopping (/readyz)."""
    workers: tuple[WorkerState, ...]
    last_reload: ReloadState


@dataclasses.dataclass
class Counters:
    """What the supervisor counts, for /metrics. Plain numbers, changed in the loop of the supervisor only."""

    reloads: dict[str, int] = dataclasses.field(default_factory=lambda: {"ok": 0, "refused": 0, "failed": 0})
    """By `ReloadResult`. A certificate, users or policy file that is read again or cannot be used counts as well."""
    last_reload_success: float = dataclasses.field(default_factory=time.time)
    """Unix time of the start, or of the last reload that has succeeded."""
    restarts: dict[str, int] = dataclasses.field(default_factory=lambda: {"exit": 0, "signal": 0, "watchdog": 0})
    """Workers that were started again, by the reason."""


class Control(Protocol):
    """A running server, as operators see and change it. Methods raise ControlError."""

    counters: Counters

    @property
    def is_ready(self) -> bool:
        """Whether it accepts mail; no other process is asked."""

    async def state(self) -> ServerState:
        """Ask all workers. One that does not answer within two seconds has no details."""

    async def reload(self) -> ReloadState:
        """Read the configuration and its files again, as SIGHUP does. Errors are in the result."""

    def drain(self, *, delay: float = 5.0, timeout: float = 600.0, stay: bool = False) -> None:
        """Begin to drain and return: `is_ready` is False at once, mail is refused with 421 after `delay` seconds.

        The relay goes on until the spool is empty or `timeout` seconds have passed. Then the process ends with code 0;
        with `stay`, it goes on refusing mail until `resume`.
        """

    async def wait_drained(self) -> bool:
        """Return, when draining is over, whether nothing was left. Raise ControlError on `resume`."""

    async def resume(self) -> None:
        """Accept mail again."""

    async def rotate(self) -> None:
        """Open the journal file again, as SIGUSR1 does."""

    async def hop(self, hop: str, action: HopAction) -> int:
        """Suspend or resume a next hop, or retry what waits for it. Return the recipients or workers concerned."""


# ---- the channel

Handler = Callable[[str, dict[str, Any]], Awaitable[Any]]
"""Carries out a request: gets its verb and arguments, returns what JSON can express. ControlError is sent back."""


class _Line(msgspec.Struct, omit_defaults=True):
    """A request (verb and number), a notice (verb without a number), or an answer (number without a verb)."""

    verb: str = ""
    number: int = 0
    arguments: dict[str, Any] = {}
    result: Any = None
    error: str = ""


class Channel:
    """One end of a socket pair: requests and notices to the other process, and answers to its requests."""

    def __init__(
        self,
        sock: socket.socket,
        *,
        handle: Handler | None = None,
        notice: Callable[[str, dict[str, Any]], None] | None = None,
        longest: int = LONGEST_LINE,
    ) -> None:
        """Take over a socket. `notice` is called with each notice; without `handle`, requests are not answered.

        The channel ends when the other side sends a line of more than `longest` octets, or no JSON.
        """
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(sock))
        self._handle = handle
        self._notice = notice
        self._longest = longest
        self._outgoing, self._waiting = trio.open_memory_channel[bytes](_MOST_WAITING)
        self._received = bytearray()
        self._numbers = itertools.count(1)
        self._asked: dict[int, _Question] = {}
        self._is_over = False

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Read until the other side has closed its end. All requests that are not answered then fail."""
        decoder = msgspec.json.Decoder(_Line)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                task_status.started()
                while (line := await self._next_line()) is not None:
                    try:
                        self._take(decoder.decode(line), nursery)
                    except (msgspec.MsgspecError, RecursionError):  # nested too deeply
                        break
                nursery.cancel_scope.cancel()
        finally:
            self._is_over = True
            for question in self._asked.values():
                question.error = "the process has ended"
                question.answered.set()
            self._stream.socket.close()

    async def _next_line(self) -> bytes | None:
        """Return the next line; None at the end, and when it is too long."""
        received, start = self._received, 0
        while (end := received.find(b"\n", start)) < 0:
            start = len(received)
            if start > self._longest:
                return None
            try:
                data = await self._stream.receive_some(_READ)
            except (trio.BrokenResourceError, trio.ClosedResourceError):
                return None
            if not data:
                return None
            received += data
        line = bytes(received[:end])
        del received[: end + 1]
        return line

    def _take(self, line: _Line, nursery: trio.Nursery) -> None:
        if not line.verb:
            question = self._asked.get(line.number)
            if question is not None:
                question.result, question.error = line.result, line.error
                question.answered.set()
        elif line.number:
            if self._handle is not None:
                nursery.start_soon(self._answer, self._handle, line)
        elif self._notice is not None:
            self._notice(line.verb, line.arguments)

    async def _answer(self, handle: Handler, line: _Line) -> None:
        try:
            answer = _Line(number=line.number, result=await handle(line.verb, line.arguments))
        except ControlError as exc:
            answer = _Line(number=line.number, error=str(exc) or "refused")
        except Exception as exc:  # noqa: BLE001 - a bug costs this request, not the process
            answer = _Line(number=line.number, error=f"{type(exc).__name__}: {exc}")
        with suppress(ControlError):
            self._send(answer)

    async def ask(self, verb: str, *, seconds: float = _TIMEOUT, **arguments: Any) -> Any:
        """Send a request and return its result. Raise ControlError when it fails or is not answered in time."""
        number = next(self._numbers)
        question = self._asked[number] = _Question()
        try:
            self._send(_Line(verb=verb, number=number, arguments=arguments))
            with trio.move_on_after(seconds):
                await question.answered.wait()
        finally:
            del self._asked[number]
        if not question.answered.is_set():
            raise ControlError(f"no answer within {seconds:g} seconds")
        if question.error:
            raise ControlError(question.error)
        return question.result

    def tell(self, verb: str, **arguments: Any) -> None:
        """Send a notice. Raise ControlError when the other process has ended or does not read."""
        self._send(_Line(verb=verb, arguments=arguments))

    def _send(self, line: _Line) -> None:
        if self._is_over:
            raise ControlError("the process has ended")
        try:
            self._outgoing.send_nowait(msgspec.json.encode(line) + b"\n")
        except trio.WouldBlock:
            raise ControlError("the process does not read its requests") from None

    async def _write(self) -> None:
        """Send what waits, whole lines only: nothing but the end of the channel cancels this task."""
        with suppress(trio.BrokenResourceError, trio.ClosedResourceError):
            async for data in self._waiting:
                await self._stream.send_all(data)


class _Question:
    """A request that is not answered yet."""

    def __init__(self) -> None:
        self.answered = trio.Event()
        self.result: Any = None
        self.error = ""
