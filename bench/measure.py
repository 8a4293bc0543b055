"""What the benchmarks share: servers to compare with, their CPU time and memory, smtp-source as the client.

CPU time is that of the server's process and its descendants, from /proc, in microseconds, with user and system time
apart. The kernel counts it in ticks of 10 ms: a round has to use some hundred ticks to be exact to a percent.
"""

from __future__ import annotations

import os
import resource
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import trustme
from tests.ports import free_port

from bench.processes import ENVIRONMENT, family_of, started

_TICK = 1_000_000 // os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True)
class Cpu:
    """Microseconds of CPU."""

    user: int
    system: int

    @property
    def total(self) -> int:
        """User and system."""
        return self.user + self.system

    def __sub__(self, other: Cpu) -> Cpu:
        return Cpu(self.user - other.user, self.system - other.system)


def cpu_of(pid: int) -> Cpu:
    """Return the CPU time of a process, its descendants, and the children it has waited for."""
    user = system = 0
    for each in family_of(pid):
        try:
            fields = Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # ended meanwhile: its time is counted with its parent's
        user += (int(fields[11]) + int(fields[13])) * _TICK
        system += (int(fields[12]) + int(fields[14])) * _TICK
    return Cpu(user, system)


def rss_of(pid: int) -> int:
    """Return the resident octets of a process and its descendants; each shared page counts once."""
    total = 0
    for each in family_of(pid):
        for line in Path(f"/proc/{each}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                total += int(line.split()[1]) * 1024
    return total


@dataclass(frozen=True)
class Peer:
    """A server to measure."""

    name: str
    command: Callable[[int, Path], Sequence[str]]
    """Returns the command line for a port and a working folder."""
    program: str
    """The program that must be installed."""
    prepare: Callable[[], bool] | None = None
    """Installs or builds the rest; returns whether that succeeded."""
    share: float = 1.0
    """The share of a case's messages that suffices: slow servers need few."""
    most_connections: int | None = None
    """Connections it can hold, if they are few."""

    @property
    def is_installed(self) -> bool:
        """Whether the program and all it needs are installed."""
        is_there = shutil.which(self.program, path=ENVIRONMENT["PATH"]) is not None
        return is_there and (self.prepare is None or self.prepare())


@dataclass(frozen=True)
class Running:
    """A running server."""

    pid: int
    port: int
    folder: Path

    @property
    def address(self) -> str:
        """Its address and port."""
        return f"127.0.0.1:{self.port}"


@contextmanager
def running(peer: Peer) -> Iterator[Running]:
    """Run a server on a free port, in a new folder, until the end of the block. Raise RuntimeError."""
    with tempfile.TemporaryDirectory(prefix="penstock-bench-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        port = free_port()
        with started(peer.command(port, folder), folder / "log", folder=folder) as process:
            _wait_for_greeting(port, process, folder / "log")
            yield Running(process.pid, port, folder)


def _wait_for_greeting(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with socket.socket() as sock:
            if sock.connect_ex(("127.0.0.1", port)) == 0:
                sock.settimeout(10)
                if sock.recv(512).startswith(b"220"):
                    sock.sendall(b"QUIT\r\n")
                    return
        time.sleep(0.05)
    raise RuntimeError(f"the server did not start: {log.read_text(errors='replace')[-2000:]}")


@dataclass(frozen=True)
class Round:
    """One run of the client against one server."""

    messages: int
    seconds: float
    cpu: Cpu

    @property
    def cpu_per_message(self) -> float:
        """Microseconds."""
        return self.cpu.total / self.messages

    @property
    def rate(self) -> float:
        """Messages per second."""
        return self.messages / self.seconds


class Stalled(Exception):  # noqa: N818 - the word in the table
    """A round that failed or took too long."""


def smtp_source(
    server: Running, *, messages: int, sessions: int, size: int, extra: Sequence[str] = (), timeout: float = 600
) -> Round:
    """Send messages with Postfix's smtp-source and return what they cost the server.

    Raise Stalled if that fails or takes longer than `timeout` seconds.
    """
    command = ["smtp-source", "-s", str(sessions), "-m", str(messages), "-l", str(size), *extra, server.address]
    before, started = cpu_of(server.pid), time.monotonic()
    try:
        subprocess.run(command, check=True, env=ENVIRONMENT, timeout=timeout, capture_output=True)
    except subprocess.TimeoutExpired as exc:
        raise Stalled(f"stalled: not done after {timeout:.0f} s") from exc
    except subprocess.CalledProcessError as exc:
        raise Stalled(f"failed: {exc.stderr.decode(errors='replace').strip()[-200:]}") from exc
    seconds = time.monotonic() - started
    return Round(messages, seconds, cpu_of(server.pid) - before)


def summary(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the minimum and the maximum."""
    return statistics.median(values), min(values), max(values)


def ratio_of(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the minimum and the maximum of the ratios, round by round."""
    return summary([a / b for a, b in zip(ours, theirs, strict=False)])  # one of the two may have stalled early


def verdict(is_kept: bool) -> str:
    """Return the text after a bound in a table."""
    return "kept" if is_kept else "MISSED"


def raise_file_limit() -> int:
    """Allow this process, and the programs it starts, as many open files as the system does. Return the number."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard


def machine() -> str:
    """Return the processor, kernel and Python version, for the head of a table."""
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if "model name" in line
        ),
        os.uname().machine,
    )
    return f"{os.cpu_count()} x {model}, Linux {os.uname().release.partition('-')[0]}, Python {sys.version.split()[0]}"


# ---- the servers that need only a command line


def _penstock_sink(port: int, _: Path) -> Sequence[str]:
    return [sys.executable, "-m", "penstock", "sink", "--listen", f"127.0.0.1:{port}"]


def _penstock_serve(port: int, folder: Path) -> Sequence[str]:
    return [
        sys.executable, "-m", "penstock", "serve", "--listen", f"127.0.0.1:{port}", "--data", str(folder),
    ]  # fmt: skip


def _smtp_sink(port: int, _: Path) -> Sequence[str]:
    return ["smtp-sink", "-u", "nobody", "-m", "20000", f"127.0.0.1:{port}", "4096"]


def make_certificate(folder: Path) -> tuple[Path, Path]:
    """Make a certificate like those that Penstock generates. Return its file and the file of its key."""
    issued = trustme.CA(key_type=trustme.KeyType.ECDSA).issue_cert("localhost", key_type=trustme.KeyType.ECDSA)
    certificate, key = folder / "certificate.pem", folder / "key.pem"
    issued.cert_chain_pems[0].write_to_path(str(certificate))
    issued.private_key_pem.write_to_path(str(key))
    return certificate, key


def _aiosmtpd(port: int, folder: Path) -> Sequence[str]:
    certificate, key = make_certificate(folder)
    return [
        sys.executable, "-m", "aiosmtpd", "-n", "-c", "aiosmtpd.handlers.Sink", "-l", f"127.0.0.1:{port}",
        "--tlscert", str(certificate), "--tlskey", str(key), "--no-requiretls",
    ]  # fmt: skip


POSTFIX_MAIN = """compatibility_level = 3.6
queue_directory = {folder}/queue
data_directory = {folder}/data
command_directory = /usr/sbin
daemon_directory = /usr/lib/postfix/sbin
mail_owner = postfix
setgid_group = postdrop
inet_interfaces = 127.0.0.1
mydestination =
relay_domains = static:ALL
mynetworks = 127.0.0.0/8
relay_transport = discard
default_transport = discard
smtpd_relay_restrictions = permit_mynetworks, reject
maillog_file = {folder}/maillog
maillog_file_prefixes = {folder}
smtpd_client_connection_rate_limit = 0
smtpd_client_connection_count_limit = 0
smtpd_tls_security_level = may
smtpd_tls_cert_file = {certificate}
smtpd_tls_key_file = {key}
"""
POSTFIX_MASTER = """127.0.0.1:{port} inet n - n - 100 smtpd
pickup unix n - n 60 1 pickup
cleanup unix n - n - 0 cleanup
qmgr unix n - n 300 1 qmgr
tlsmgr unix - - n 1000? 1 tlsmgr
rewrite unix - - n - - trivial-rewrite
bounce unix - - n - 0 bounce
defer unix - - n - 0 bounce
discard unix - - n - - discard
anvil unix - - n - 1 anvil
proxymap unix - - n - - proxymap
postlog unix-dgram n - n - 1 postlogd
"""


def _postfix(port: int, folder: Path) -> Sequence[str]:
    for name in ("config", "queue", "data"):
        (folder / name).mkdir(mode=0o755)
    shutil.chown(folder / "data", "postfix")
    certificate, key = make_certificate(folder)
    main = POSTFIX_MAIN.format(folder=folder, certificate=certificate, key=key)
    (folder / "config" / "main.cf").write_text(main)
    (folder / "config" / "master.cf").write_text(POSTFIX_MASTER.format(port=port))
    return ["postfix", "-c", str(folder / "config"), "start-fg"]


PENSTOCK_SINK = Peer("penstock sink", _penstock_sink, sys.executable)
PENSTOCK_SERVE = Peer("penstock serve", _penstock_serve, sys.executable, share=0.5)
SMTP_SINK = Peer("smtp-sink", _smtp_sink, "smtp-sink")
AIOSMTPD = Peer("aiosmtpd", _aiosmtpd, sys.executable, share=0.25)
POSTFIX = Peer("postfix", _postfix, "postfix", share=0.1, most_connections=90)
"""Syncs the queue file, then discards; a process for each connection. Needs root."""
