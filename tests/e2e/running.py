"""Real servers in processes of their own, and real messages."""

from __future__ import annotations

import hashlib
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from bench import processes

ENVIRONMENT = processes.ENVIRONMENT


@dataclass
class Server:
    """A running server."""

    process: subprocess.Popen[bytes]
    port: int
    folder: Path
    out: Path
    journal: Path

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    @property
    def python(self) -> str:
        """The interpreter that runs it."""
        return sys.executable

    @property
    def ca_file(self) -> Path:
        return self.folder / "tls" / "ca.pem"

    def messages(self, count: int = 0) -> list[bytes]:
        """Return the messages in the Maildir, in no order, once they are `count` or more, or after a minute."""
        folder = self.folder / "maildir" / "new"
        deadline = time.monotonic() + 60
        while len(list(folder.iterdir())) < count and time.monotonic() < deadline:
            time.sleep(0.02)
        return [path.read_bytes() for path in folder.iterdir()]

    def said(self, pattern: str) -> re.Match[str]:
        """Wait until the server's output has a match and return it."""
        return _wait_for(self.process, pattern, self.out, self.journal)

    def stop(self) -> int:
        """Stop with SIGTERM; return the exit code."""
        return processes.stop(self.process, grace=60)


@contextmanager
def serving(
    folder: Path,
    toml: str = "",
    command: str = "serve",
    *arguments: str,
    has_address: bool = False,
    environment: Mapping[str, str] = ENVIRONMENT,
) -> Iterator[Server]:
    """Run `penstock serve`, or another command, until the end of the block.

    It listens on a free port, unless the settings or, with `has_address`, the arguments have an address.
    """
    folder.mkdir(exist_ok=True)
    command_line = [sys.executable, "-m", "penstock", command]
    if command == "serve":
        command_line += ["--data", str(folder)]
    if toml:
        (folder / "penstock.toml").write_text(toml)
        command_line += ["--config", str(folder / "penstock.toml")]
    elif not has_address:
        command_line += ["--listen", "127.0.0.1:0"]
    out, journal = folder / "out", folder / "journal"
    with processes.started([*command_line, *arguments], out, errors=journal, environment=environment) as process:
        found = _wait_for(process, r"(?:listening|sink) on (?:127\.0\.0\.1:(\d+)|unix:)", out, journal)
        yield Server(process, int(found[1] or 0), folder, out, journal)


def _wait_for(process: subprocess.Popen[bytes], pattern: str, *places: Path) -> re.Match[str]:
    """Wait until the output of another process has a match: it reports nowhere else that it is ready."""
    deadline = time.monotonic() + 60
    output = ""
    while time.monotonic() < deadline and process.poll() is None:
        output = "".join(place.read_text(errors="replace") for place in places)
        if match := re.search(pattern, output):
            return match
        time.sleep(0.02)
    raise AssertionError(f"the output has no match for {pattern!r}: {output}")


def body_of(message: bytes) -> bytes:
    """Return the body of a message: servers add to the header."""
    return message.partition(b"\r\n\r\n")[2]


def digest(body: bytes) -> str:
    """Return the digest that bodies are compared by."""
    return hashlib.sha256(body).hexdigest()


def hard_bodies(seed: int = 1) -> dict[str, bytes]:
    """Return bodies that servers are known to damage, by name. Lines end in CRLF."""
    rng = random.Random(seed)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(1, 12))) for _ in range(500)]
    ordinary = b"".join(" ".join(rng.choices(words, k=11)).encode() + b"\r\n" for _ in range(300))
    return {
        "ordinary": ordinary,
        "dots": b".\r\n..\r\n...\r\n.a\r\n..b\r\n.\r\n.\r\nend .\r\n",
        "eight bit": "Grüße aus Köln, 你好, ¡hola!\r\n".encode() * 50,
        "long lines": b"x" * 998 + b"\r\n" + b"." * 997 + b"\r\n",
        "from lines": b"From here on\r\n>From there\r\n",
        "empty lines": b"\r\n\r\n\r\ntext\r\n\r\n\r\n",
        "commands": b"QUIT\r\nMAIL FROM:<x@example.com>\r\nRSET\r\n.QUIT\r\n",
    }
