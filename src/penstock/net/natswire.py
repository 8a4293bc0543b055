# cython: wraparound=True
"""The protocol of NATS without I/O: what a client reads and writes, headers, and keys for authentication.

https://docs.nats.io/reference/reference-protocols/nats-protocol describes the lines; ADR-4 of nats-architecture-and-
design the headers.

This file is compiled as it stands (natswire.pxd has the C types).
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple, Protocol

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from trio.lowlevel import Abort, RaiseCancelT, Task, reschedule

_MAX_LINE: Final = 1 << 20
"""Octets of a line of the server; INFO with many URLs is the longest."""
_MAX_PAYLOAD: Final = 64 << 20
"""Octets of headers and payload; a server is limited to 64 MiB."""
_FIRST_LINE: Final = b"NATS/1.0"
_NO_RESPONDERS: Final = 503


class ProtocolError(Exception):
    """The server sent something that is not NATS."""


class NatsError(Exception):
    """A request has failed."""


class DisconnectedError(NatsError):
    """There is no connection, or it was lost before the answer."""


class RequestTimeoutError(NatsError):
    """No answer came in time."""


class NoRespondersError(NatsError):
    """The subject has no subscriber; for JetStream: there is no leader now."""


class OverloadedError(NatsError):
    """Too much is waiting for answers."""


class Info(msgspec.Struct, frozen=True):
    """INFO of a server: sent first, and when it changes."""

    server_name: str = ""
    version: str = ""
    max_payload: int = 1 << 20
    headers: bool = False
    tls_required: bool = False
    nonce: str = ""
    connect_urls: tuple[str, ...] = ()
    ldm: bool = False
    """Lame duck mode: the server is about to shut down."""


class Message(NamedTuple):
    """A message that was received."""

    subject: str
    """"" for an answer."""
    reply: str
    """The subject for an answer; "" if none is expected."""
    headers: bytes
    """The header block as received; b"" without headers."""
    data: bytes

    @property
    def status(self) -> int:
        """The status that the server sends in place of an answer, such as 503 without responders; 0 if none."""
        word = self.headers[len(_FIRST_LINE) + 1 : len(_FIRST_LINE) + 4]
        return int(word) if word.isdigit() else 0

    @property
    def fields(self) -> dict[str, str]:
        """The headers by name."""
        return parse_headers(self.headers)


def parse_headers(block: bytes) -> dict[str, str]:
    """Return the headers of a block by name; of several with one name, the last."""
    found: dict[str, str] = {}
    for line in block.decode("utf-8", "replace").split("\r\n")[1:]:
        name, colon, value = line.partition(":")
        if colon:
            found[name] = value.strip(" ")
    return found


class Receiver(Protocol):
    """What takes the operations of a server."""

    def on_message(self, sid: bytes, subject: bytes, reply: bytes, headers: bytes, data: bytes) -> None:
        """Take a message of the subscription `sid`."""

    def on_info(self, info: Info) -> None:
        """Handle the INFO of the server."""

    def on_ping(self) -> None:
        """Answer with PONG."""

    def on_pong(self) -> None:
        """Take the answer to a PING."""

    def on_error(self, text: str) -> None:
        """Take an error; the server closes the connection after most of them."""


class Parser:
    """Splits what a server sends into operations. An incomplete one waits for the rest."""

    def __init__(self, receiver: Receiver, requests: Requests | None = None) -> None:
        """`requests` gets the messages of the subscription 1, the answers."""
        self._receiver = receiver
        self._requests = requests
        self._pending = bytearray()
        """An operation that is not complete."""
        self._needed = 0
        """Octets that it has at least; 0: the end of its line has not come."""

    def feed(self, data: bytes) -> None:
        """Take octets. Raise ProtocolError if they are not NATS."""
        pending = self._pending
        if pending:
            pending += data
            # The first LF ends a line, and the one of a line that waits was not there.
            if len(pending) < self._needed or (not self._needed and b"\n" not in data):
                if not self._needed and len(pending) > _MAX_LINE:
                    raise ProtocolError("the server sent a line without an end")
                return
            data = bytes(pending)
            pending.clear()
        start = 0
        self._needed = 0
        length = len(data)
        while start < length:
            end = data.find(b"\r\n", start)
            if end < 0:
                if length - start > _MAX_LINE:
                    raise ProtocolError("the server sent a line without an end")
                break
            line = data[start:end]
            if line.startswith(b"MSG ") or line.startswith(b"HMSG "):  # noqa: PIE810 - a tuple is slower
                after = self._message(data, line, end + 2)
                if after > length:
                    self._needed = after - start
                    break
                start = after
            else:
                self._other(line)
                start = end + 2
        if start < length:
            pending += data[start:]

    def _message(self, buffer: bytes, line: bytes, start: int) -> int:
        """Handle a message whose payload starts here, if it is complete. Return where it ends."""
        words = line.split()
        count = len(words)
        has_headers = line.startswith(b"H")
        place = count - 2 if has_headers else count - 1
        if not 3 <= place <= 4:
            raise ProtocolError(f"malformed line {line[:100]!r}")
        try:
            size = int(words[count - 1])
            header_size = int(words[place]) if has_headers else 0
        except (ValueError, OverflowError) as exc:
            raise ProtocolError(f"malformed line {line[:100]!r}") from exc
        if not 0 <= header_size <= size <= _MAX_PAYLOAD:
            raise ProtocolError(f"malformed line {line[:100]!r}")
        end = start + size
        if end + 2 <= len(buffer):
            middle = start + header_size
            requests = self._requests
            if requests is not None and words[2] == b"1":
                requests.answer(words[1], buffer[start:middle], buffer[middle:end])
                return end + 2
            reply = words[3] if place == 4 else b""
            self._receiver.on_message(words[2], words[1], reply, buffer[start:middle], buffer[middle:end])
        return end + 2

    def _other(self, line: bytes) -> None:
        verb, _, rest = line.partition(b" ")
        if verb == b"PING":
            self._receiver.on_ping()
        elif verb == b"PONG":
            self._receiver.on_pong()
        elif verb == b"INFO":
            self._receiver.on_info(decode_info(rest))
        elif verb == b"-ERR":
            self._receiver.on_error(rest.strip(b" '").decode("utf-8", "replace"))
        elif verb != b"+OK":
            raise ProtocolError(f"unknown operation {line[:100]!r}")


Done = Callable[[Message | NatsError], object]


class Answer:
    """The answer that a task waits for. The task is resumed with it: it stands in for an `outcome.Outcome`.

    One compiled object for each request, in the place of two closures and an outcome.
    """

    def __init__(self, requests: Requests, task: Task) -> None:
        self.number = 0
        """That of the request, to be set once it is sent."""
        self._requests = requests
        self._task = task
        self._found: Message | NatsError | None = None

    def __call__(self, found: Message | NatsError) -> None:
        """Take the answer, and resume the task."""
        self._found = found
        reschedule(self._task, self)  # type: ignore[arg-type] # trio calls `unwrap`, and nothing else

    def unwrap(self) -> Message:
        """Return the answer, or raise the error."""
        found = self._found
        if isinstance(found, NatsError):
            raise found
        assert found is not None
        return found

    def abort(self, _: RaiseCancelT) -> Abort:
        """Wait for the answer no more: the task was cancelled."""
        self._requests.forget(self.number)
        return Abort.SUCCEEDED


class Waiting:
    """A request that waits for its answer."""

    def __init__(self, done: Done, deadline: float, octets: int) -> None:
        self.done = done
        self.deadline = deadline
        self.octets = octets


class Requests:
    """The requests of a connection that wait for answers, and the octets that wait to be sent."""

    def __init__(self, inbox: str, *, most_waiting: int, most_octets: int) -> None:
        """`inbox` is the beginning of the subjects for answers; the number of the request follows.

        At most `most_waiting` requests of `most_octets` octets wait for answers, and about as many octets to be sent.
        """
        self.octets = 0
        """Octets of the requests that wait for an answer."""
        self.now = 0.0
        """The clock of the loop, read once for many requests (`_Connection._sweep`): it is ahead by up to a sweep."""
        self.unsent = 0
        """About how many octets were given to `send` and not yet sent."""
        self._waiting: dict[int, Waiting] = {}
        self._inbox = inbox.encode()
        self._most_waiting = most_waiting
        self._most_octets = most_octets
        self._last = 0
        self._out: list[bytes] = []

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def has_output(self) -> bool:
        """Something waits to be sent."""
        return bool(self._out)

    @property
    def is_behind(self) -> bool:
        """The server does not read fast enough: too much waits to be sent."""
        return self.unsent > self._most_octets

    def send(self, data: bytes) -> None:
        """Have octets sent."""
        self._out.append(data)

    def publish(self, subject: str, reply: str, headers: bytes, data: bytes) -> None:
        """Have a message sent."""
        self.unsent += len(headers) + len(data)
        self._publish(subject, reply.encode(), headers, data)

    def take_output(self) -> bytes:
        """Return what waits to be sent."""
        out, self._out = self._out, []
        return b"".join(out)

    def add(self, subject: str, data: bytes, headers: bytes, done: Done, deadline: float) -> int:
        """Have a request sent; `done` gets the answer or the error. Return its number. Raise OverloadedError."""
        octets = len(data) + len(headers)
        most = self._most_octets
        if len(self._waiting) >= self._most_waiting or (self.octets and self.octets + octets > most):
            raise OverloadedError(f"{len(self._waiting)} requests of {self.octets} octets are waiting")
        if self.unsent > most:
            raise OverloadedError("the server does not read fast enough")
        self._last += 1
        number = self._last
        self._publish(subject, b"%b%d" % (self._inbox, number), headers, data)
        self._waiting[number] = Waiting(done, deadline, octets)
        self.octets += octets
        self.unsent += octets
        return number

    def _publish(self, subject: str, reply: bytes, headers: bytes, data: bytes) -> None:
        """Append a PUB, or an HPUB with headers."""
        out = self._out
        size = len(headers)
        if size:
            out.append(b"HPUB %b %b %d %d\r\n" % (subject.encode(), reply, size, size + len(data)))
            out.append(headers)
        else:
            out.append(b"PUB %b %b %d\r\n" % (subject.encode(), reply, len(data)))
        out.append(data)
        out.append(b"\r\n")

    def forget(self, number: int) -> Waiting | None:
        """Wait for an answer no more."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            self.octets -= waiting.octets
        return waiting

    def answer(self, subject: bytes, headers: bytes, data: bytes) -> None:
        """Hand an answer to the one who waits for it. One that is too late, or invented, changes nothing."""
        number = subject[len(self._inbox) :]
        waiting = self.forget(int(number)) if len(number) < 20 and number.isdigit() else None
        if waiting is None:
            return
        message = tuple.__new__(Message, ("", "", headers, data))  # a constructor in Python would cost a microsecond
        if headers and not data and message.status == _NO_RESPONDERS:
            waiting.done(NoRespondersError("no one answers; JetStream may have no leader now"))
        else:
            waiting.done(message)

    def end_late(self, now: float, server: str) -> None:
        """End the requests that have waited too long."""
        late = [number for number, waiting in self._waiting.items() if waiting.deadline <= now]
        for number in late:
            waiting = self.forget(number)
            if waiting is not None:
                waiting.done(RequestTimeoutError(f"{server} did not answer in time"))

    def end_all(self, error: NatsError) -> None:
        """End all requests: the connection is lost."""
        left, self._waiting, self.octets = list(self._waiting.values()), {}, 0
        for waiting in left:
            waiting.done(type(error)(*error.args))


def decode_info(data: bytes) -> Info:
    """Return an INFO. Raise ProtocolError."""
    try:
        return msgspec.json.decode(data, type=Info)
    except (msgspec.MsgspecError, RecursionError) as exc:
        raise ProtocolError(f"malformed INFO: {exc}") from exc


# ---- nkeys: Ed25519 keys in base32 with a prefix and a checksum

_SEED_PREFIX: Final = 18 << 3
_USER_PREFIX: Final = 20 << 3


class NkeyError(ValueError):
    """A seed cannot be used."""


class Nkey:
    """The key of a user; it signs the nonce of the server."""

    def __init__(self, seed: str) -> None:
        """`seed` is what `nk -gen user` prints: it begins with SU. Raise NkeyError."""
        try:
            raw = base64.b32decode(seed + "=" * (-len(seed) % 8))
        except binascii.Error as exc:
            raise NkeyError("an nkey seed has 58 letters and digits, and begins with SU") from exc
        is_user = len(raw) == 36 and raw[0] & 0xF8 == _SEED_PREFIX and (raw[0] & 7) << 5 | raw[1] >> 3 == _USER_PREFIX
        if not is_user or _checksum(raw[:-2]) != raw[-2:]:
            raise NkeyError("not the seed of a user nkey: it begins with SU and has a checksum")
        self._key = Ed25519PrivateKey.from_private_bytes(raw[2:34])
        public = self._key.public_key().public_bytes(serialization.Encoding.Raw, serialization.PublicFormat.Raw)
        named = bytes([_USER_PREFIX]) + public
        self.public = base64.b32encode(named + _checksum(named)).decode().rstrip("=")
        """The public key, as the configuration of the server has it."""

    def sign(self, nonce: str) -> str:
        """Return the signature of a nonce, as CONNECT has it."""
        return base64.urlsafe_b64encode(self._key.sign(nonce.encode())).decode().rstrip("=")


def read_nkey(path: Path) -> Nkey:
    """Return the key whose seed is the first line of a file. Raise OSError or NkeyError."""
    return Nkey(path.read_text(encoding="utf-8").partition("\n")[0].strip())


def _checksum(data: bytes) -> bytes:
    return binascii.crc_hqx(data, 0).to_bytes(2, "little")
