"""One connection that sends messages, in turns.

What is said is a script: a generator that yields groups of commands, each with the phases its answers belong to, and
gets the answers. It knows nothing of sockets. The turns around it are plain functions that the poller calls
(penstock.net.stream): a session costs no task, and a message no more than its script and four turns.

The answer of the fast path, one line that came whole, is never parsed beyond its code.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import ssl
from collections.abc import Generator, Sequence
from time import perf_counter_ns
from typing import Final, NamedTuple, Protocol

import trio

from penstock import sequence
from penstock.load.counts import Counts
from penstock.load.plan import Place, Plan, Target
from penstock.load.texts import Text
from penstock.net import _poller
from penstock.net._poller import Poller, Taker
from penstock.net.stream import SocketStream
from penstock.net.tls import TlsLayer
from penstock.smtp.client import Answer, AnswerReader, AuthDialog, CannotSendError, Capabilities, ProtocolError

_READ: Final = 65_536
Group = tuple[bytes, Sequence[str]]
"""Commands that are sent together, and the phases of the answers they get, in their order."""
Script = Generator[Group, list[int], None]
_SHAKE: Final[Sequence[str]] = ("the handshake",)
"""No answer, but a handshake is awaited."""
_HELLO: Final[Sequence[str]] = ("hello",)
_LAST_LINE: Final = re.compile(rb"(?:^|\n)250 [^\n]*\r\n\Z")
_CODES: Final = {b"%d " % code: code for code in range(200, 600)}
"""The beginnings of answers of one line (RFC 5321 4.2)."""
_UNDER_WAY: Final = (errno.EINPROGRESS, errno.EALREADY)
_NOTHING: Final[Group] = (b"", ())
"""Nothing is said until `begin` is called."""


class Job(NamedTuple):
    """A message to send."""

    number: int
    text: Text
    intended: int
    """When it was to start, in nanoseconds of the clock; 0 in a closed loop."""


class Crew(Protocol):
    """What sessions have in common."""

    plan: Plan
    counts: Counts
    poller: Poller
    tls: ssl.SSLContext | None
    tls_sessions: dict[Target, ssl.SSLSession | None]
    """The last session of TLS with each target, to be resumed."""
    known_offer: tuple[bytes, Capabilities]
    """The last answer to EHLO that came whole, and what it says: most connections hear the same."""

    def next_job(self, session: Session) -> Job | None:
        """Return the next message; None when there is none now."""

    def wait_for_job(self, session: Session) -> bool:
        """Have `begin` called when there is a message. Return False when there will be none."""

    def ended(self, session: Session) -> None:
        """A connection is over."""

    def spawn(self, session: Session, unsent: bytes) -> None:
        """Give a session a task that runs `push`."""


class _Refused(Exception):  # noqa: N818 - the end of a script
    """The server does not want to talk."""


class Session(Taker):
    """A connection to a target, made anew as often as it is wanted."""

    def __init__(self, crew: Crew, target: Target, source: str) -> None:
        self.target = target
        self.asked_at = 0
        """When the last group was sent, in nanoseconds of the clock."""
        self._begun_at = 0
        """When the connection was begun."""
        self.is_open = False
        self.is_connecting = False
        self.is_promised = False
        """A message is kept for it."""
        self.concluded = 0
        """Messages of this connection that were answered."""
        self._crew = crew
        self._source = source
        self._stream: SocketStream
        self._data = b""
        self._unsent = b""
        """What the socket did not take of what `begin` has said."""
        self._layer: TlsLayer | None = None
        self._is_shaking = False
        self._reader: AnswerReader | None = None
        self._hello_answer = b""
        """The answer to EHLO, or what came of it first."""
        self._answer: Answer | bytes = b""
        """The last one, parsed when somebody asks."""
        self._phases: Sequence[str] = ()
        self._codes: list[int] = []
        self._script: Script
        self._job: Job | None = None
        self._job_begun = 0
        """When its MAIL was sent, or was to be, in nanoseconds of the clock."""
        self._is_done = False

    @property
    def is_waiting(self) -> bool:
        """An answer is owed."""
        return self.is_open and (self.is_connecting or bool(self._phases) or self._is_shaking)

    @property
    def answer(self) -> Answer:
        """The last answer."""
        if isinstance(self._answer, bytes):
            line = self._answer
            return Answer(int(line[:3]), (line[4:].rstrip(b"\r\n").decode("utf-8", "replace"),))
        return self._answer

    # ---- connecting

    def connect(self) -> None:
        """Begin a connection, without waiting for it. Whatever fails is counted."""
        crew = self._crew
        self._layer = None
        self._is_shaking = False
        self._reader = None
        self._unsent = b""
        self._codes = []
        self._job = None
        self._is_done = False
        self.concluded = 0
        self._script = self._conversation()
        self.asked_at = self._begun_at = perf_counter_ns()
        crew.counts.connections += 1
        try:
            sock, is_connected = self._socket()
            self._stream = SocketStream.of(sock, crew.poller)
            self.is_connecting = not is_connected
            if not is_connected:
                self._stream.when_connected(self._connected)
        except OSError as exc:
            crew.counts.error(_kind_of(exc), f"{self.target}: {exc}")
            crew.ended(self)
            return
        self.is_open = True
        self._phases = ()
        self._stream.attend_alone(self)
        if is_connected:
            self._connected()

    def _connected(self) -> None:
        """Begin the conversation on a connection that is made. Whatever fails is counted."""
        now = perf_counter_ns()
        crew = self._crew
        crew.counts.phases["connect"].record(now - self.asked_at)
        self.asked_at = now
        self.is_connecting = False
        if crew.plan.tls == "implicit":
            try:
                self._wrap()
            except trio.BrokenResourceError as exc:
                self._woken(0, exc)
        else:
            _, self._phases = next(self._script)

    def _socket(self) -> tuple[socket.socket, bool]:
        """Return a socket that is connected, or being connected, and whether it is. Raise OSError.

        connect(2) says of any TCP connection that it is under way, even where the handshake is over before it returns,
        as on loopback. Asking it a second time costs one call of the kernel and tells; only those that are under way
        then cost an event of the poller.
        """
        target = self.target
        if target.path:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            place: str | Place = target.path
        else:
            sock = socket.socket(target.family, socket.SOCK_STREAM)
            assert target.place is not None
            place = target.place
        try:
            sock.setblocking(False)
            if not target.path:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                if self._source:
                    sock.bind((self._source, 0))
            code = sock.connect_ex(place)
            if code == errno.EINPROGRESS:
                code = sock.connect_ex(place)
        except BaseException:
            sock.close()
            raise
        if code not in (0, errno.EISCONN, *_UNDER_WAY):
            sock.close()
            raise OSError(code, os.strerror(code))
        return sock, code not in _UNDER_WAY

    def _wrap(self) -> None:
        """Begin a handshake; what is to be sent first comes with the next turn."""
        crew = self._crew
        assert crew.tls is not None
        self._layer = TlsLayer(crew.tls, server_name=self.target.host or "localhost")
        known = crew.tls_sessions.get(self.target)
        if crew.plan.resumption and known is not None:
            self._layer.object.session = known
        self._is_shaking = True
        if crew.plan.tls == "implicit":
            said = self._layer.shake()
            assert said is not None
            self._stream.send_nowait(said)

    # ---- turns

    def recv(self, fd: int, octets: int = _READ, /) -> int:
        """Receive for the next turn; see `Wire.recv`."""
        data = _poller.recv(fd, octets)
        if data is None:
            return -1
        if self._layer is not None:
            self._layer.feed(data)
        else:
            self._data = data
        return len(data)

    def _turn(self, _: int) -> bytes | None:
        """Answer what has come. Return None when the conversation is over."""
        layer = self._layer
        if layer is None:
            return self._answer_to(self._data)
        if self._is_shaking:
            said = layer.shake()
            if said is not None:
                return said
            self._is_shaking = False
            now = perf_counter_ns()
            self._crew.counts.phases["tls"].record(now - self.asked_at)
            said = self._go_on(now)
            if said is None:
                return None
            first = layer.encrypt(said)
        else:
            first = b""
        plain: list[bytes] = []  # the greeting may have come with the end of the handshake
        is_alive = layer.decrypt_into(plain.append)
        said = self._answer_to(b"".join(plain)) if plain else b""
        return first + layer.encrypt(said) if is_alive and said is not None else None

    def _answer_to(self, data: bytes) -> bytes | None:
        """Take in octets of answers, and return what is said next."""
        now = perf_counter_ns()
        reader = self._reader
        if reader is None:
            code = _CODES.get(data[:4])
            if code is not None and self._phases and data.find(b"\n") == len(data) - 1:
                self._answer = data
                return self._take(code, now)
            if self._phases is _HELLO:
                self._hello_answer = data
                if data == self._crew.known_offer[0]:
                    return self._take(250, now)
            reader = self._reader = AnswerReader()
        reader.feed(data)
        said = b""
        while (answer := reader.next()) is not None:
            if not self._phases:
                if answer.code == 421:
                    raise _Refused(answer.text)
                raise ProtocolError(f"an answer that nobody asked for: {answer.text}")
            self._answer = answer
            more = self._take(answer.code, now)
            if more is None:
                return None
            said += more
        if reader.is_empty:
            self._reader = None
        return said

    def _take(self, code: int, now: int) -> bytes | None:
        """Take an answer; go on with the script when it was the last of its group."""
        codes, phases = self._codes, self._phases
        phase = phases[len(codes)]
        counts = self._crew.counts
        counts.phases[phase].record(now - self.asked_at)
        counts.replies[phase, code] += 1
        if code >= 400:
            counts.remember(f"{phase} {code}", self.answer.text)
        elif (code >= 300) is not (phase == "data") and phase != "auth":
            raise ProtocolError(f"{code} is no answer to {phase}: {self.answer.text}")  # RFC 5321 4.3.2
        if code == 421 and self._job is not None:  # RFC 5321 3.8: the server leaves; this message was answered
            self._conclude([])
            raise _Refused(self.answer.text)
        codes.append(code)
        return b"" if len(codes) < len(phases) else self._go_on(now)

    def _go_on(self, now: int) -> bytes | None:
        """Go on with the script; what it says next is asked now."""
        codes, self._codes = self._codes, []
        try:
            said, self._phases = self._script.send(codes) if codes or self._phases else next(self._script)
        except StopIteration:
            self._is_done = True
            self._phases = ()
            return None
        if self._phases is _SHAKE:
            if self._reader is not None and not self._reader.is_empty:  # RFC 3207 6: who has said it, nobody knows
                raise ProtocolError("the server said something between STARTTLS and TLS")
            self._reader = None
            self._wrap()
            assert self._layer is not None
            said = self._layer.shake() or b""
            self._phases = ()
            self.asked_at = now
            self._stream.send_nowait(said)
            return b""
        if said:  # otherwise the rest of the answers to the last group is awaited
            self.asked_at = now
        return said

    def begin(self) -> None:
        """Go on after a wait for a job."""
        try:
            said = self._go_on(perf_counter_ns())
            if said is None:
                self._woken(1, None)
                return
            if self._layer is not None:
                said = self._layer.encrypt(said)
            sent = self._stream.send_nowait(said)
            if sent < len(said):
                self._unsent = said[sent:]
                self._stream.nudge()  # nobody else may take turns meanwhile
        except Exception as exc:  # noqa: BLE001 - see push
            self._end(_kind_of(exc), str(exc.__cause__ or exc))

    def abandon(self) -> None:
        """Leave everything as it is: the run is over."""
        if self.is_open:
            self.is_open = False
            self._crew.counts.lost += self._job is not None
            self._stream.close_nowait()

    # ---- the end

    def _woken(self, received: int, failure: BaseException | None) -> bool:
        """See to it that the turns have come to an end. Return whether there is a task to run."""
        if failure is not None:
            kind = "refused" if isinstance(failure, _Refused) else _kind_of(failure)
            self._end(f"connect {kind}" if kind == "timeout" and self.is_connecting else kind, str(failure))
        elif self._is_done:
            self._end("", "")
        elif received == -1:
            unsent, self._unsent = self._unsent, b""
            self._crew.spawn(self, unsent or self._stream.take_unsent())
            return True
        else:
            self._end("closed", "the server closed the connection")
        return False

    async def push(self, unsent: bytes) -> None:
        """Send what the socket did not take at once, and go on with a task."""
        stream = self._stream
        try:
            await stream.send_now(unsent)
            received = await stream.attend(self, self._turn)
        except Exception as exc:  # noqa: BLE001 - as with turns that the poller takes, it costs this connection alone
            if self.is_open and self._stream is stream:  # otherwise it was timed out, and is another one by now
                self._woken(0, exc)
        else:
            if self.is_open and self._stream is stream:
                self._woken(received, None)

    def time_out(self, seconds: float) -> None:
        """End the connection: nothing has come for so long."""
        if self.is_connecting:
            self._end("connect timeout", f"no connection within {seconds:g} s")
        else:
            self._end("timeout", f"no answer within {seconds:g} s")

    def _end(self, kind: str, text: str) -> None:
        """Close the connection, and count how it ended; kind is "" when it ended well."""
        self.is_open = False
        crew = self._crew
        if self._layer is not None and not self._is_shaking and crew.plan.resumption:
            crew.tls_sessions[self.target] = self._layer.object.session
        self._stream.close_nowait()
        self._script.close()
        if self._job is not None:
            self._job = None
            crew.counts.lost += 1
        if not kind:
            crew.counts.phases["session"].record(perf_counter_ns() - self._begun_at)
        else:
            crew.counts.error(kind, f"{self.target}: {text}")
        crew.ended(self)

    # ---- the script

    def _conversation(self) -> Script:
        """Be a client, from the greeting to the QUIT."""
        plan = self._crew.plan
        (code,) = yield b"", ("greeting",)
        if code != 220:
            raise _Refused(self.answer.text)
        offer = yield from self._greet()
        if plan.tls == "starttls":
            (code,) = yield b"STARTTLS\r\n", ("starttls",)
            if code != 220:
                raise _Refused(self.answer.text)
            yield b"", _SHAKE
            offer = yield from self._greet()
        if plan.user:
            yield from self._authenticate(offer)
        _check_offer(plan, offer)
        yield from self._send_messages()
        yield b"QUIT\r\n", ("quit",)

    def _greet(self) -> Generator[Group, list[int], Capabilities]:
        hello = "LHLO" if self._crew.plan.lmtp else "EHLO"
        crew = self._crew
        self._hello_answer = b""
        (code,) = yield f"{hello} {crew.plan.hello}\r\n".encode(), _HELLO
        if code != 250:
            raise _Refused(self.answer.text)
        known, offer = crew.known_offer
        if not self._hello_answer or self._hello_answer != known:
            offer = Capabilities.of(self.answer)
            if _LAST_LINE.search(self._hello_answer):
                crew.known_offer = (self._hello_answer, offer)
        return offer

    def _authenticate(self, offer: Capabilities) -> Script:
        plan = self._crew.plan
        dialog = AuthDialog(plan.user, plan.password, offer, is_private=True)
        (code,) = yield dialog.start(), ("auth",)
        while code == 334:
            (code,) = yield dialog.respond(self.answer), ("auth",)
        if code != 235:
            raise _Refused(self.answer.text)
        dialog.finish()

    def _send_messages(self) -> Script:
        """Send messages until the connection has had its share, or there are no more."""
        crew = self._crew
        left = crew.plan.per_connection or -1
        transact = self._in_groups if crew.plan.pipelining else self._one_by_one
        while left:
            job = crew.next_job(self)
            if job is None:
                if not crew.wait_for_job(self):
                    return
                yield _NOTHING
                continue
            left -= 1
            self._job = job
            self._job_begun = perf_counter_ns()
            if job.intended:
                crew.counts.phases["late_start"].record(self._job_begun - job.intended)
                self._job_begun = job.intended
            crew.counts.attempted += 1
            yield from transact(job)

    def _conclude(self, answers: Sequence[int]) -> None:
        """Count what became of the message: the answers to its text, none when it was not sent."""
        job, self._job = self._job, None
        assert job is not None
        self.concluded += 1
        counts = self._crew.counts
        took = perf_counter_ns() - self._job_begun
        counts.phases["message"].record(took)
        counts.current.record(took)
        if answers and all(code < 300 for code in answers):
            counts.accepted += 1
            counts.octets += job.text.size
        else:
            counts.refused += 1

    def _commands(self, job: Job) -> list[bytes]:
        """Return MAIL and the RCPTs of a message."""
        plan = self._crew.plan
        sender = plan.sender or f"{sequence.mark(plan.run, job.number)}@load.invalid"
        commands = [b"MAIL FROM:<%s>\r\n" % sender.encode()]
        recipient = plan.to[(job.number - 1) % len(plan.to)]
        if plan.recipients == 1:
            return [*commands, b"RCPT TO:<%s>\r\n" % recipient.encode()]
        local, _, domain = recipient.rpartition("@")
        commands += [b"RCPT TO:<%s@%s>\r\n" % (f"{local}{n}".encode(), domain.encode()) for n in range(plan.recipients)]
        return commands

    def _text(self, job: Job) -> bytes:
        plan = self._crew.plan
        sent = job.text.sent(sequence.mark(plan.run, job.number) if plan.header else None)
        return b"BDAT %d LAST\r\n%s" % (len(sent), sent) if plan.chunking else sent

    def _one_by_one(self, job: Job) -> Script:
        """Send a message, waiting for each answer."""
        plan = self._crew.plan
        mail, *rcpts = self._commands(job)
        (code,) = yield mail, ("mail",)
        if code >= 400:
            self._conclude([])
            return
        accepted = 0
        for rcpt in rcpts:
            (code,) = yield rcpt, ("rcpt",)
            accepted += code < 400
        if accepted:
            if not plan.chunking:
                (code,) = yield b"DATA\r\n", ("data",)
            if plan.chunking or code < 400:
                self._conclude((yield self._text(job), ("dot",) * (accepted if plan.lmtp else 1)))
                return
        self._conclude([])
        yield b"RSET\r\n", ("rset",)

    def _in_groups(self, job: Job) -> Script:
        """Send a message in two groups (RFC 2920); with BDAT in one."""
        plan = self._crew.plan
        commands = self._commands(job)
        phases = ["mail", *["rcpt"] * plan.recipients]
        if plan.chunking:
            codes = yield b"".join(commands) + self._text(job), phases
            accepted = sum(code < 400 for code in codes[1:])
            # One answer for each recipient (RFC 2033 4.2, which counts BDAT LAST in); without any it is one refusal.
            self._conclude((yield b"", ("dot",) * (accepted if plan.lmtp and accepted else 1)))
            if not accepted:
                yield b"RSET\r\n", ("rset",)
            return
        codes = yield b"".join(commands) + b"DATA\r\n", [*phases, "data"]
        accepted = sum(code < 400 for code in codes[1:-1])
        if codes[-1] < 400:
            text = self._text(job) if accepted else b".\r\n"
            answers = yield text, ("dot",) * (accepted if plan.lmtp and accepted else 1)
            self._conclude(answers if accepted else [])
            return
        self._conclude([])
        yield b"RSET\r\n", ("rset",)


def _check_offer(plan: Plan, offer: Capabilities) -> None:
    """Raise CannotSendError when the server does not offer what the plan needs."""
    if plan.pipelining and not offer.pipelining:
        raise CannotSendError("5.5.1", "PIPELINING is not offered")
    if plan.chunking and not offer.chunking:
        raise CannotSendError("5.5.1", "CHUNKING is not offered")


def _kind_of(exc: BaseException) -> str:
    """Name the kind of an error."""
    cause = exc.__cause__ if isinstance(exc, trio.BrokenResourceError) and exc.__cause__ is not None else exc
    if isinstance(cause, ssl.SSLError):
        return "tls"
    if isinstance(cause, ProtocolError):
        return "protocol"
    if isinstance(cause, CannotSendError):
        return "not offered"
    if isinstance(cause, ConnectionRefusedError):
        return "connect refused"
    if isinstance(cause, TimeoutError):
        return "timeout"
    if isinstance(cause, ConnectionResetError | BrokenPipeError):
        return "reset"
    if isinstance(cause, OSError):
        return errno.errorcode.get(cause.errno or 0, "os").lower()
    return type(cause).__name__
