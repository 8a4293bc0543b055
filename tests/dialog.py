r"""Dialogs: one rule a file, readable aloud, played against a whole connection.

A file begins with comments that tell the rule. Then come

    @ key = value     settings of the listener, TOML with dotted keys; `domains` and `check` are those of the file
    C: text           the client sends the line and CR LF
    C| text           the client sends this without CR LF; \r \n \t \\ and \xNN are octets; `{a*70}` repeats
    S: pattern        the server says this line; `*` is any text
    S. code           the server says a whole reply with this code, whatever its lines
    C! starttls       the client does a TLS handshake
    C! close          the client closes
    S! close          the server closes, and has said nothing more
    M: key = value    what the last delivered message has: sender, recipients, body, with, ...
    M: none           nothing was delivered

Lines of the client in a row are sent in one go. Each dialog is played three ways: as it is, octet by octet, and each
line in two pieces.
"""

from __future__ import annotations

import fnmatch
import re
import ssl
import tomllib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio
import trio.testing

Splitter = Callable[[bytes], list[bytes]]


def whole(data: bytes) -> list[bytes]:
    """Send in one piece."""
    return [data]


def octet_by_octet(data: bytes) -> list[bytes]:
    """Send each octet for itself."""
    return [data[i : i + 1] for i in range(len(data))]


def in_two(data: bytes) -> list[bytes]:
    """Send all but the last two octets, then those."""
    return [piece for piece in (data[:-2], data[-2:]) if piece]


SPLITTERS: dict[str, Splitter] = {"whole": whole, "octets": octet_by_octet, "in two": in_two}


@dataclass
class Dialog:
    """A file, read."""

    name: str
    rule: str
    settings: dict[str, Any] = field(default_factory=dict)
    steps: list[tuple[str, str]] = field(default_factory=list)


def unescape(text: str) -> bytes:
    """Return the octets that a `C|` line stands for."""
    text = re.sub(r"\{(.+?)\*(\d+)\}", lambda m: m.group(1) * int(m.group(2)), text)
    return re.sub(
        rb"\\(r|n|t|\\|x[0-9a-fA-F]{2})",
        lambda m: {b"r": b"\r", b"n": b"\n", b"t": b"\t", b"\\": b"\\"}.get(m[1]) or bytes([int(m[1][1:], 16)]),
        text.encode(),
    )


def repeat(text: str) -> bytes:
    """Return the octets that a `C:` line stands for."""
    return re.sub(r"\{(.+?)\*(\d+)\}", lambda m: m.group(1) * int(m.group(2)), text).encode()


def read_dialog(path: Path) -> Dialog:
    """Read a file. Raise ValueError, with the line, when it is not a dialog."""
    dialog = Dialog(path.stem, "")
    comments: list[str] = []
    toml: list[str] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        mark, rest = line[:2], line[3:]
        if line.startswith("#"):
            comments.append(line.removeprefix("#").strip())
        elif line.startswith("@ "):
            toml.append(line[2:])
        elif mark in ("C:", "C|", "S:", "S.", "C!", "S!", "M:"):
            dialog.steps.append((mark, rest))
        elif line.strip():
            raise ValueError(f"{path.name}:{number}: a line begins with C: C| S: S. C! S! M: @ or #, not {line!r}")
    dialog.rule = " ".join(comments)
    dialog.settings = tomllib.loads("\n".join(toml))
    if not dialog.rule or not dialog.steps:
        raise ValueError(f"{path.name}: a dialog tells its rule in a comment, and has steps")
    return dialog


class Client:
    """The client of a dialog: sends pieces, reads lines."""

    def __init__(self, stream: trio.abc.Stream, tls: ssl.SSLContext, split: Splitter) -> None:
        self.stream = stream
        self._tls = tls
        self._split = split
        self._buffer = b""

    async def send(self, data: bytes) -> None:
        """Send, in pieces. A server that has closed hears nothing more, which is no error."""
        for piece in self._split(data):
            try:
                await self.stream.send_all(piece)
            except trio.BrokenResourceError:
                return
            await trio.testing.wait_all_tasks_blocked()

    async def line(self) -> str | None:
        """Return the next line of the server; None when it has closed."""
        while b"\r\n" not in self._buffer:
            try:
                data = await self.stream.receive_some(65536)
            except trio.BrokenResourceError:
                data = b""
            if not data:
                assert not self._buffer, self._buffer
                return None
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\r\n")
        return line.decode()

    async def starttls(self) -> None:
        """Do the handshake."""
        assert not self._buffer
        stream = trio.SSLStream(self.stream, self._tls, server_hostname="localhost")
        await stream.do_handshake()
        self.stream = stream


async def play(dialog: Dialog, client: Client, delivered: Sequence[dict[str, str]]) -> None:
    """Play a dialog as the client; `delivered` is what the server has delivered so far."""
    waiting = b""
    for mark, text in [*dialog.steps, ("", "")]:
        if mark == "C:":
            waiting += repeat(text) + b"\r\n"
            continue
        if mark == "C|":
            waiting += unescape(text)
            continue
        if waiting:
            await client.send(waiting)
            waiting = b""
        if mark == "S:":
            line = await client.line()
            pattern = re.sub(r"([\[?])", r"[\1]", text)
            assert line is not None, f"expected {text!r}, and the server has closed"
            assert fnmatch.fnmatchcase(line, pattern), f"expected {text!r}, got {line!r}"
        elif mark == "S.":
            while True:
                line = await client.line()
                assert line is not None, f"expected {text}, and the server has closed"
                assert line.startswith(text), f"expected {text}, got {line!r}"
                if line[3:4] != "-":
                    break
        elif mark == "S!":
            line = await client.line()
            assert line is None, f"expected the end, got {line!r}"
        elif mark == "C!" and text == "starttls":
            await client.starttls()
        elif mark == "C!" and text == "close":
            await client.stream.aclose()
        elif mark == "M:" and text == "none":
            await trio.testing.wait_all_tasks_blocked()
            assert not delivered, delivered
        elif mark == "M:":
            key, _, value = text.partition(" = ")
            await trio.testing.wait_all_tasks_blocked()
            assert delivered, "nothing was delivered"
            assert delivered[-1][key].encode("utf-8", "surrogateescape") == unescape(value), (
                key,
                delivered[-1][key],
            )
        elif mark:
            raise ValueError(f"there is no step {mark} {text}")
