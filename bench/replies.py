"""Account for replies: every command and every message must get its one reply, in order.

Clients send a message and, 0 to 2 commit times after its final dot, `NOOP`, `MAIL`, a second message or `QUIT`: while
the server is still committing the message, when it has just finished, or together with the dot. The commit time is
measured first, for each server and transport. Some clients pipeline, some wait for each reply; some messages fit into
memory, some do not; some commands arrive in two segments.

Each server is a separate process and is reached over TCP, in plain text, by STARTTLS and by implicit TLS:

    spool, maildir, passthrough    `penstock serve` with this delivery
    mailbox                        a bare `penstock serve`: the spool, and routes to mailboxes
    sink                           `penstock sink --keep mbox:FILE`

each without a policy, and with policies that await at MAIL and RCPT, at the end of the message, and at all of them.

For each session the replies are compared with the commands: a reply is lost, unexpected (sent twice, or the wrong one),
or out of order; a session is broken if it ends without QUIT's 221, by a TLS error or by a timeout. Afterwards the
stored messages are counted: one for each 250. The exit code is 1 if anything does not match.

    python -m bench.replies [--plain 10000] [--tls 2000] [--servers spool,sink] [--seed N] [--python PATH]

--plain and --tls are sessions per server, a quarter with each policy. --python runs another installation of Penstock.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from tests.ports import free_port

from bench.measure import Peer, Running, machine, running
from bench.processes import ENVIRONMENT

SERVERS: Final = ("spool", "mailbox", "maildir", "passthrough", "sink")
_CLIENTS: Final = 4
"""Sessions at a time."""
_TIMEOUT: Final = 20.0
"""Seconds without an octet before a session counts as broken."""
_SIZES: Final = (200, 200, 200, 4_000, 4_000, 70_000)
"""Octets of a message; the largest do not fit into one read."""

_LISTENERS = """hostname = "bench.example"
data_dir = "data"
journal = {{ events = "errors" }}
[[listener]]
address = "127.0.0.1:{port}"
[[listener]]
address = "127.0.0.1:{implicit}"
tls.mode = "implicit"
"""
_DELIVERIES = {
    "spool": '[delivery]\nkind = "spool"\n[[route]]\nnext_hop = "smtp://127.0.0.1:{hop}"\n',
    "mailbox": '[delivery]\nkind = "spool"\n',  # its default route leads to mailboxes
    "maildir": '[delivery]\nkind = "maildir"\n',
    "passthrough": '[delivery]\nkind = "passthrough"\n[[route]]\nnext_hop = "smtp://127.0.0.1:{hop}"\n',
    "sink": "",
}
_CHECK = '[[check]]\nhook = "{file}:{policy}"\n'
_POLICY = '''"""A policy that awaits: half of its answers take up to 2 ms."""

import random

import trio


async def wait():
    if random.random() < 0.5:
        await trio.sleep(random.random() * 0.002)


class OnEnvelope:
    async def on_mail(self, transaction, sender, parameters):
        await wait()

    async def on_rcpt(self, transaction, recipient):
        await wait()


class OnMessage:
    async def on_message(self, transaction, message):
        await wait()


class OnAll(OnEnvelope, OnMessage):
    pass
'''


POLICIES: Final = ("", "OnEnvelope", "OnMessage", "OnAll")
"""The policies a server is run with, "" for none."""


# ---- the servers


@dataclass(frozen=True)
class Target:
    """A server under test."""

    server: Running
    implicit_port: int
    """The port of the listener with implicit TLS."""
    count_stored: Callable[[], int]
    """Returns how many messages the server has stored."""


@contextmanager
def target(kind: str, *, policy: str = "", python: str = sys.executable) -> Iterator[Target]:
    """Run a server of a kind, with what it delivers to, until the end of the block."""
    implicit = free_port()
    with ExitStack() as stack:
        hop = 9  # the discard port: nothing listens there, and what is spooled stays spooled
        kept = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="penstock-bench-")))
        if kind == "passthrough":
            hop = stack.enter_context(running(_next_hop(kept / "maildir", python))).port

        def command(port: int, folder: Path) -> Sequence[str]:
            config = folder / "penstock.toml"
            text = _LISTENERS.format(port=port, implicit=implicit) + _DELIVERIES[kind].format(hop=hop)
            if policy:
                (folder / "policy.py").write_text(_POLICY)
                text += _CHECK.format(file=folder / "policy.py", policy=policy)
            config.write_text(text)
            if kind == "sink":
                return [python, "-m", "penstock", "sink", "--config", str(config), "--keep", f"mbox:{folder / 'mbox'}"]
            return [python, "-m", "penstock", "serve", "--config", str(config)]

        server = stack.enter_context(running(Peer(kind, command, python)))

        def count_stored() -> int:
            if kind == "spool":
                words = [python, "-m", "penstock", "spool", "stats", "--json"]
                words += ["--config", str(server.folder / "penstock.toml")]
                stats = subprocess.run(words, check=True, capture_output=True, env=ENVIRONMENT).stdout
                return int(json.loads(stats)["messages"])
            if kind == "sink":
                return len(re.findall(rb"^From ", (server.folder / "mbox").read_bytes(), re.MULTILINE))
            folder = kept if kind == "passthrough" else server.folder / "data"
            return len(list((folder / "maildir" / "new").iterdir()))

        yield Target(server, implicit, count_stored)


def _next_hop(folder: Path, python: str) -> Peer:
    """Return a sink that keeps what passthrough sends it: its replies have an ID each."""
    return Peer(
        "next hop",
        lambda port, _: [
            python, "-m", "penstock", "sink", "--listen", f"127.0.0.1:{port}", "--keep", f"maildir:{folder}",
        ],
        python,
    )  # fmt: skip


# ---- one session


class Connection:
    """A client's connection: sends octets, reads replies."""

    def __init__(self, target: Target, transport: str) -> None:
        port = target.implicit_port if transport == "implicit" else target.server.port
        self._sock = socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT)
        self._sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._received = b""
        if transport == "implicit":
            self._start_tls()
        self.read()
        self.ask(b"EHLO client.example\r\n")
        if transport == "starttls":
            self.ask(b"STARTTLS\r\n")
            self._start_tls()
            self.ask(b"EHLO client.example\r\n")

    def _start_tls(self) -> None:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE  # the server makes its certificate for each run
        self._sock = context.wrap_socket(self._sock, server_hostname="localhost")

    def send(self, data: bytes) -> None:
        """Send octets at once."""
        self._sock.sendall(data)

    def read(self) -> str | None:
        """Return the last line of the next reply, or None if the server has closed the connection."""
        while True:
            line, found, rest = self._received.partition(b"\r\n")
            if found:
                self._received = rest
                if line[3:4] != b"-":
                    return line.decode("ascii", "backslashreplace")
                continue
            data = self._sock.recv(65536)
            if not data:
                return None
            self._received += data

    def ask(self, command: bytes) -> str:
        """Send a command and return the last line of its reply. Raise ConnectionError if there is none."""
        self.send(command)
        line = self.read()
        if line is None:
            raise ConnectionError(f"closed after {command!r}")
        return line

    def close(self) -> None:
        """Close the connection."""
        self._sock.close()


MAIL, RCPT, DATA = b"MAIL FROM:<a@example.com>\r\n", b"RCPT TO:<b@example.org>\r\n", b"DATA\r\n"
_COMMANDS = {"MAIL": MAIL, "RCPT": RCPT, "DATA": DATA, "NOOP": b"NOOP\r\n", "RSET": b"RSET\r\n", "QUIT": b"QUIT\r\n"}


def learn_replies(target: Target, transport: str) -> dict[str, str]:
    """Return the command of each reply line that a command gets. A message's reply must differ from all of them."""
    connection = Connection(target, transport)
    learned = {connection.ask(_COMMANDS[name]): name for name in ("NOOP", "MAIL", "RCPT", "DATA")}
    connection.send(_text(200))
    accepted = connection.read()
    learned |= {connection.ask(_COMMANDS[name]): name for name in ("RSET", "QUIT")}
    connection.close()
    if accepted is None or not accepted.startswith("250") or accepted in learned or len(learned) != len(_COMMANDS):
        raise RuntimeError(f"replies that cannot be distinguished: {accepted!r}, {learned}")
    return learned


def commit_time(target: Target, transport: str, sessions: int = 24) -> float:
    """Return the median of the seconds between a final dot and its reply, with as many clients as later."""

    def one(_: int) -> float:
        connection = Connection(target, transport)
        for name in ("MAIL", "RCPT", "DATA"):
            connection.ask(_COMMANDS[name])
        sent = time.perf_counter()
        connection.ask(_text(200))
        seconds = time.perf_counter() - sent
        connection.ask(_COMMANDS["QUIT"])
        connection.close()
        return seconds

    with ThreadPoolExecutor(_CLIENTS) as pool:
        return statistics.median(pool.map(one, range(sessions)))


def _text(octets: int) -> bytes:
    line = b"x" * 70 + b"\r\n"
    return b"Subject: replies\r\n\r\n" + line * (octets // len(line) + 1) + b".\r\n"


class Session:
    """One client: what it has sent and which replies it has read."""

    def __init__(self, connection: Connection, rng: random.Random, commit: float) -> None:
        self.sent: list[str] = []
        """A command for each expected reply, "message" for a message."""
        self.read: list[str] = []
        """The reply lines."""
        self._connection = connection
        self._rng = rng
        self._commit = commit
        self._pipelines = rng.random() < 0.5

    def play(self) -> None:
        """Send one or two messages and what follows each; read until the server closes the connection."""
        commands = self._envelope()
        follow = self._rng.choice(["QUIT", "NOOP", "MAIL", "message"])
        self._message(commands)
        if follow == "message":
            self._pause()
            self._message(self._envelope())
        elif follow != "QUIT":
            self._pause()
            self._send(follow)
        self._pause()
        self._send("QUIT")
        while (line := self._connection.read()) is not None:
            self.read.append(line)

    def _envelope(self) -> list[str]:
        return ["MAIL", *["RCPT"] * self._rng.choice([1, 1, 3]), "DATA"]

    def _message(self, commands: list[str]) -> None:
        """Send an envelope, wait for 354 and send the text."""
        if self._pipelines:
            self._send(*commands)
            self._read_until_354()
        else:
            for name in commands[:-1]:
                self._send(name)
            self._send(commands[-1])
            self._read_until_354()
        text = _text(self._rng.choice(_SIZES))
        self.sent.append("message")
        if self._rng.random() < 0.1:
            # The reply to NOOP may not overtake that of the message, although both arrive in one segment.
            self.sent.append("NOOP")
            text += _COMMANDS["NOOP"]
        self._connection.send(text)

    def _read_until_354(self) -> None:
        while (line := self._connection.read()) is not None:
            self.read.append(line)
            if line.startswith("354"):
                return
        raise ConnectionError("closed before 354")

    def _send(self, *names: str) -> None:
        """Send commands, in one segment or in two."""
        data = b"".join(_COMMANDS[name] for name in names)
        self.sent += names
        cut = self._rng.randrange(len(data)) if self._rng.random() < 0.2 else 0
        if cut:
            self._connection.send(data[:cut])
            self._pause()
        self._connection.send(data[cut:])

    def _pause(self) -> None:
        """Wait for 0 to 2 commit times."""
        time.sleep(self._rng.random() * 2 * self._commit)


# ---- accounting


@dataclass
class Accounts:
    """The replies of many sessions. Shared by the clients' threads."""

    sessions: int = 0
    replies: int = 0
    """Replies that are due."""
    messages: int = 0
    """Messages sent to the end."""
    lost: int = 0
    unexpected: int = 0
    """Replies sent twice, or with another text or code than the command gets."""
    out_of_order: int = 0
    """Sessions with all replies, but in another order."""
    broken: int = 0
    """Sessions that ended without 221: by a TLS error, a reset or a timeout."""
    examples: list[str] = field(default_factory=list)
    """The first few sessions that went wrong."""
    _accepted: set[str] = field(default_factory=set)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def add(self, session: Session, learned: dict[str, str], failure: Exception | None) -> None:
        """Account for a session."""
        read = [self._name_of(line, learned) for line in session.read]
        with self._lock:
            for number, (name, line) in enumerate(zip(read, session.read, strict=True)):
                if name == "message" and line in self._accepted:
                    read[number] = f"twice: {line}"
                elif name == "message":
                    self._accepted.add(line)
            due, found = Counter(session.sent), Counter(read)
            self.sessions += 1
            self.replies += len(session.sent)
            self.messages += due["message"]
            self.lost += (due - found).total()
            self.unexpected += (found - due).total()
            self.out_of_order += due == found and session.sent != read
            self.broken += failure is not None
            if (failure is not None or session.sent != read) and len(self.examples) < 3:
                self.examples.append(f"sent {session.sent}, read {session.read}{f', {failure!r}' if failure else ''}")

    @staticmethod
    def _name_of(line: str, learned: dict[str, str]) -> str:
        if line in learned:
            return learned[line]
        return "message" if line.startswith("250") else line

    @property
    def errors(self) -> int:
        """Everything that is not as it should be."""
        return self.lost + self.unexpected + self.out_of_order + self.broken


def run_sessions(target: Target, transports: Sequence[str], count: int, seed: int) -> tuple[Accounts, float]:
    """Run sessions, a random transport each. Return their accounts and the commit time in seconds."""
    learned = {transport: learn_replies(target, transport) for transport in transports}
    commits = {transport: commit_time(target, transport) for transport in transports}
    accounts = Accounts()

    def one(number: int) -> None:
        rng = random.Random(f"{seed}/{number}")
        transport = rng.choice(transports)
        connection = Connection(target, transport)
        session = Session(connection, rng, commits[transport])
        failure: Exception | None = None
        try:
            session.play()
        except OSError as exc:  # with ssl.SSLError, TimeoutError and ConnectionError
            failure = exc
        finally:
            connection.close()
        accounts.add(session, learned[transport], failure)

    with ThreadPoolExecutor(_CLIENTS) as pool:
        for _ in pool.map(one, range(count)):
            pass
    return accounts, statistics.mean(commits.values())


def count_stored(target: Target, expected: int) -> int:
    """Return the stored messages, once they are as many as expected, or after 10 seconds."""
    deadline = time.monotonic() + 10
    while (stored := target.count_stored()) < expected and time.monotonic() < deadline:
        time.sleep(0.1)
    return stored


PROBES: Final = 1 + 24
"""Messages that `learn_replies` and `commit_time` send for a transport."""
TRANSPORTS: Final = {"plain": ("plain",), "TLS": ("starttls", "implicit")}


def measure(
    kind: str, counts: dict[str, int], seed: int, python: str = sys.executable, *, is_quiet: bool = False
) -> int:
    """Return the number of errors of a kind of server, and print its rows unless `is_quiet`."""
    errors = 0
    for policy in POLICIES:
        with target(kind, policy=policy, python=python) as server:
            due = 0
            for name, transports in TRANSPORTS.items():
                accounts, commit = run_sessions(server, transports, counts[name] // len(POLICIES), seed)
                due += accounts.messages + PROBES * len(transports)
                errors += accounts.errors
                if is_quiet:
                    continue
                print(
                    f"{kind:<12} {policy or '-':<10} {name:<6} {accounts.sessions:>8} "
                    f"{commit * 1e3:>7.2f} ms {accounts.replies:>8} {accounts.lost:>6} {accounts.unexpected:>10} "
                    f"{accounts.out_of_order:>12} {accounts.broken:>7}",
                    flush=True,
                )
                for example in accounts.examples:
                    print(f"    {example[:600]}")
            stored = count_stored(server, due)
            errors += stored != due
            if not is_quiet:
                print(f"    {stored} of {due} messages stored", flush=True)
    return errors


def main() -> None:
    """Run all sessions and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plain", type=int, default=10_000)
    parser.add_argument("--tls", type=int, default=2_000)
    parser.add_argument("--servers", default=",".join(SERVERS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--python", default=sys.executable)
    arguments = parser.parse_args()
    print(machine())
    print(
        f"{'server':<12} {'policy':<10} {'':<6} {'sessions':>8} {'commit':>10} {'replies':>8} {'lost':>6} "
        f"{'unexpected':>10} {'out of order':>12} {'broken':>7}",
        flush=True,
    )
    counts = {"plain": arguments.plain, "TLS": arguments.tls}
    errors = sum(measure(kind, counts, arguments.seed, arguments.python) for kind in arguments.servers.split(","))
    print("every command and message got its one reply, in order" if not errors else f"{errors} errors")
    raise SystemExit(1 if errors else 0)


if __name__ == "__main__":
    main()
