"""A next hop that answers as it is told, and the messages that are sent to it."""

from __future__ import annotations

import socket
import ssl
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager
from typing import Any

import trio

from penstock.message import NULL_PATH, Envelope, Path, Recipient
from penstock.relay.hop import Delivered, Hop, TlsPolicy
from penstock.relay.pool import Pool

CLOSE, RESET, STALL = "!close", "!reset", "!stall"
"""In the place of an answer, or behind one: the end of the connection, its sudden end, or silence."""
PLAIN = TlsPolicy(mode="none")
ORDINARY = ("PIPELINING", "SIZE", "8BITMIME", "SMTPUTF8", "DSN")
CHUNKING = (*ORDINARY, "CHUNKING", "BINARYMIME")
DEFAULTS = {"CONNECT": "220 hop ready", "DATA": "354 go on", "QUIT": "221 bye!close", "STARTTLS": "220 go on"}


class FakeHop:
    """A server whose answers are given by command, each used once and then the ordinary one.

    Steps are CONNECT, the verbs, TEXT (the answer to the final dot), and DOT: in its place a text is received up to the
    dot and then what it says is done.
    """

    def __init__(self, offer: Sequence[str] = ORDINARY, **answers: str | list[str]) -> None:
        self.offer = offer
        self.answers = {step: [said] if isinstance(said, str) else list(said) for step, said in answers.items()}
        self.is_lmtp = False
        self.tls: ssl.SSLContext | None = None
        self.tls_at_once = False
        self.heard: list[str] = []
        """All lines, but for those of texts."""
        self.texts: list[bytes] = []
        """What was taken, as it came over the wire."""
        self.connections = 0
        self.port = 0

    def hop(self, **settings: Any) -> Hop:
        """Return the hop that this is."""
        return Hop(host="127.0.0.1", port=self.port, **{"tls": PLAIN, **settings})

    def verbs(self) -> str:
        """Return the verbs of all lines."""
        return " ".join(line.split(" ")[0].split(":")[0] for line in self.heard)

    async def serve(self, stream: trio.SocketStream) -> None:
        self.connections += 1
        try:
            await _Session(self, stream).run()
        except (trio.BrokenResourceError, trio.ClosedResourceError, ssl.SSLError, _GoneError):
            pass
        finally:
            with trio.CancelScope(shield=True, deadline=trio.current_time() + 1):
                await trio.aclose_forcefully(stream)


class _GoneError(Exception):
    pass


class _Session:
    def __init__(self, hop: FakeHop, stream: trio.SocketStream) -> None:
        self.hop = hop
        self.raw = stream
        self.stream: trio.abc.Stream = stream
        self.buffer = b""
        self.accepted = 0
        self.has_sender = False

    async def run(self) -> None:
        hop = self.hop
        if hop.tls_at_once:
            await self.start_tls()
        await self.answer("CONNECT")
        while True:
            line = (await self.until(b"\r\n")).decode()
            hop.heard.append(line)
            verb = line.split(" ")[0].upper()
            if verb in ("EHLO", "LHLO"):
                self.accepted = 0
                lines = ["hop", *hop.offer]
                default = "\r\n".join([f"250-{each}" for each in lines[:-1]] + [f"250 {lines[-1]}"])
                await self.answer(verb, default)
            elif verb == "BDAT":
                await self.bdat(line)
            elif verb == "DATA":
                if (await self.answer("DATA")).startswith("3"):
                    await self.data()
            else:
                said = await self.answer(verb, "503 MAIL first" if verb == "RCPT" and not self.has_sender else "250 ok")
                if verb == "MAIL":
                    self.accepted = 0
                    self.has_sender = said.startswith("2")
                elif verb == "RCPT":
                    self.accepted += said.startswith("2")
                elif verb == "STARTTLS" and said.startswith("2"):
                    await self.start_tls()

    async def start_tls(self) -> None:
        assert self.hop.tls is not None
        self.stream = stream = trio.SSLStream(self.raw, self.hop.tls, server_side=True)
        try:
            await stream.do_handshake()
        except trio.BrokenResourceError:
            await self.raw.send_all(stream._outgoing.read())  # the alert, which trio keeps to itself
            raise
        self.buffer = b""

    async def data(self) -> None:
        if "TEXT_CUT" in self.hop.answers:
            await self.until(b"\r\n")  # a line of it
            await self.answer("TEXT_CUT")
        self.buffer = b"\r\n" + self.buffer
        text = await self.until(b"\r\n.\r\n") + b"\r\n.\r\n"
        await self.end(text[2:])

    async def bdat(self, line: str) -> None:
        _, size, *last = line.split(" ")
        text = await self.exactly(int(size))
        if last:
            await self.end(text, "BDAT")
        else:
            self.hop.texts.append(text)
            await self.answer("BDAT")

    async def end(self, text: bytes, step: str = "TEXT") -> None:
        answers = self.accepted if self.hop.is_lmtp else 1
        for _ in range(answers):
            said = await self.answer(step, "250 2.0.0 taken" if self.accepted else "503 nobody wants it")
        if said.startswith("2"):
            self.hop.texts.append(text)

    async def answer(self, step: str, default: str = "250 ok") -> str:
        waiting = self.hop.answers.get(step)
        said = waiting.pop(0) if waiting else DEFAULTS.get(step, default)
        text, mark, deed = said.partition("!")
        if text:
            await self.stream.send_all(text.encode("utf-8", "surrogateescape") + b"\r\n")
        if not mark:
            return text
        if deed == "stall":
            await trio.sleep_forever()
        if deed == "reset":
            self.raw.socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
            await trio.aclose_forcefully(self.raw)
        raise _GoneError

    async def until(self, mark: bytes) -> bytes:
        while mark not in self.buffer:
            await self.more()
        found, _, self.buffer = self.buffer.partition(mark)
        return found

    async def exactly(self, octets: int) -> bytes:
        while len(self.buffer) < octets:
            await self.more()
        found, self.buffer = self.buffer[:octets], self.buffer[octets:]
        return found

    async def more(self) -> None:
        data = await self.stream.receive_some(65536)
        if not data:
            raise _GoneError
        self.buffer += data


@asynccontextmanager
async def serving(*hops: FakeHop) -> AsyncIterator[None]:
    """Have these hops listen on ports of their own."""
    async with trio.open_nursery() as nursery:
        for hop in hops:
            listeners = await nursery.start(trio.serve_tcp, hop.serve, 0)
            hop.port = listeners[0].socket.getsockname()[1]
        yield
        nursery.cancel_scope.cancel()


# ---- messages


class Text:
    """A body; one that is said to be in memory, or one that is read in a thread."""

    def __init__(self, *pieces: bytes, in_memory: bool = True, size: int | None = None) -> None:
        self.pieces = pieces
        self.size = sum(map(len, pieces)) if size is None else size
        self.in_memory = in_memory

    def chunks(self) -> Iterator[bytes]:
        return iter(self.pieces)

    def close(self) -> None:
        """Nothing to close."""


PREFIX = b"Received: by test\r\n"
TEXT = b"Subject: x\r\n\r\nHello\r\n.dot\r\n"
STUFFED = PREFIX + TEXT.replace(b"\r\n.", b"\r\n..") + b".\r\n"


def path(text: str) -> Path:
    local, _, domain = text.rpartition("@")
    return Path(text, local, domain)


def envelope(*recipients: str, sender: str = "a@example.com", **fields: Any) -> Envelope:
    to = tuple(Recipient(path(text)) for text in recipients or ("b@example.org",))
    return Envelope(path(sender) if sender else NULL_PATH, to, **fields)


async def send(
    pool: Pool, hop: Hop, *recipients: str, body: Text | None = None, prefix: bytes = PREFIX, **fields: Any
) -> Delivered:
    """Send a message. Messages with the same prefix are the same."""
    body = body or Text(TEXT)
    return await pool.deliver(hop, envelope(*recipients, **fields), prefix, body, len(prefix) + body.size)


def told(results: Delivered) -> str:
    """Return outcomes and codes in short: "delivered 250, failed 550"; without a code when the text is ours."""
    return ", ".join(f"{one.kind.value} {one.text[:3] if one.is_said else one.status}" for one in results)
