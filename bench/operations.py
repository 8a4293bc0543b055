"""`python -m bench.operations`: a server is reloaded, rolled, hung and restarted under load, and loses no mail.

Senders connect to `penstock serve` all the time and send numbered messages, most on short connections, some on one
connection for the whole time. Each row does something to the server meanwhile. Afterwards every message that was
answered with 250 must be in the Maildir once; nothing may be refused, and no handshake may fail. Exit code 1 if a bound
is missed.

    reload        SIGHUP, with another limit each time: changed in place
    roll          SIGHUP with another memory limit each time: workers are replaced, so open sessions hear 421
    certificate   certificate and key are replaced by renames; SCRAM-SHA-256-PLUS before and after
    drain         `penstock ctl drain --wait`; /readyz answers 503 at once
    limit         the 11th connection of a network, before and after a worker is killed
    hang          SIGSTOP of one of two workers, with watchdog = 5
    restart       the server ends and starts again, with its sockets in the store of a service manager
"""

from __future__ import annotations

import argparse
import array
import base64
import contextlib
import fcntl
import http.client
import itertools
import os
import re
import shutil
import signal
import smtplib
import socket
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import scramp
import trustme
from tests.ports import free_port

from bench.processes import ENVIRONMENT, family_of, stop
from penstock.auth.users import UsersFile
from penstock.net.tls import end_point_binding

_PATIENCE = 60.0
_NUMBER = re.compile(rb"^Subject: n(\d+)\r?$", re.MULTILINE)
CONTEXT = ssl.create_default_context()
CONTEXT.check_hostname, CONTEXT.verify_mode = False, ssl.CERT_NONE


_GONE = ("SMTPServerDisconnected", "SMTPDataError 421", "SMTPResponseException 421")
"""What a client of an open session sees when its worker ends: 421 to DATA or QUIT, then the end."""


class MissedError(Exception):
    """A bound is missed."""


# ---- the server


def make_pair(folder: Path, name: str = "mx.example.org") -> bytes:
    """Replace the certificate and the key in a folder, each by a rename; return the certificate as DER."""
    leaf = trustme.CA().issue_cert(name)
    for file, blob in (("cert.pem", leaf.cert_chain_pems[0]), ("key.pem", leaf.private_key_pem)):
        blob.write_to_path(folder / f"{file}.new")
        (folder / f"{file}.new").rename(folder / file)
    return ssl.PEM_cert_to_DER_cert(leaf.cert_chain_pems[0].bytes().decode())


_CONFIG = """hostname = "mx.example.org"
domains = ["example.org"]
data_dir = "data"
[body]
memory_total = {memory}
[server]
workers = {workers}
watchdog = {watchdog}
reload_check = {reload_check}
[metrics]
address = "{metrics}"
[admission]
per_network = {per_network}
exempt = []
[[listener]]
name = "smtp"
address = "127.0.0.1:0"
max_size = {max_size}
auth = {{ users = "users" }}
[listener.tls]
certificate = "../cert.pem"
key = "../key.pem"
"""
_DEFAULTS = {
    "workers": 2,
    "watchdog": 30.0,
    "reload_check": 0.0,
    "max_size": 10_000_000,
    "memory": 50_000_000,
    "metrics": "",
    "per_network": 1000,
}


class Server:
    """A `penstock serve` with a Maildir, on a free port."""

    def __init__(self, folder: Path, **settings: object) -> None:
        self.folder = folder
        self.settings = {**_DEFAULTS, **settings}
        self.journal = folder / "journal"
        self.port = 0
        self.process: subprocess.Popen[bytes] | None = None
        (folder / "data").mkdir(parents=True, exist_ok=True)
        if not (folder / "cert.pem").exists():
            make_pair(folder)
            UsersFile(folder / "data" / "users").add("alice", "secret")
        self.configure()

    def configure(self, **settings: object) -> None:
        """Write the configuration."""
        self.settings |= settings
        (self.folder / "penstock.toml").write_text(_CONFIG.format(**self.settings))

    def start(self, command: list[str] | None = None, **options: object) -> None:
        """Start, and wait until it listens."""
        out = self.folder / "out"
        with out.open("wb") as output, self.journal.open("ab") as journal:
            self.process = subprocess.Popen(  # type: ignore[call-overload]
                [*(command or [sys.executable, "-m", "penstock"]), "serve", "--config", self.folder / "penstock.toml"],
                stdout=output, stderr=journal, **{"env": ENVIRONMENT, **options},
            )  # fmt: skip
        found = wait_until(lambda: re.search(r"listening on 127\.0\.0\.1:(\d+)", out.read_text()), "it does not listen")
        self.port = int(found[1])

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the supervisor."""
        assert self.process is not None
        self.process.send_signal(number)

    def count(self, event: str) -> int:
        """Return how many events of a kind are in the journal."""
        return self.journal.read_text().count(f'"event":"{event}"')

    def workers(self) -> list[int]:
        """Return the process ids of the workers."""
        assert self.process is not None
        return sorted(family_of(self.process.pid)[1:])

    def certificate(self) -> bytes:
        """Return the certificate that a new client is shown."""
        with smtplib.SMTP("127.0.0.1", self.port, timeout=_PATIENCE) as client:
            client.starttls(context=CONTEXT)
            assert isinstance(client.sock, ssl.SSLSocket)
            return client.sock.getpeercert(binary_form=True) or b""

    def stop(self) -> int:
        """Stop gracefully; return the exit code."""
        assert self.process is not None
        return stop(self.process, grace=_PATIENCE)


def wait_until(found: Callable[[], Any], otherwise: str, seconds: float = _PATIENCE) -> Any:
    """Return what a function returns as soon as that is true. Raise MissedError after some seconds."""
    deadline = time.monotonic() + seconds
    while not (value := found()):
        if time.monotonic() > deadline:
            raise MissedError(otherwise)
        time.sleep(0.02)
    return value


# ---- the senders


@dataclass
class Account:
    """What was sent, and what became of it. Shared by the threads of senders."""

    accepted: set[int] = field(default_factory=set)
    refused: Counter[str] = field(default_factory=Counter)
    """Replies other than expected, by command and code; connections that were refused or cut."""
    sessions: int = 0
    handshakes: int = 0
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    is_over: threading.Event = field(default_factory=threading.Event)


class Senders:
    """Threads that send until the end of the block."""

    def __init__(self, port: Callable[[], int], *, short: int = 4, long: int = 2, tls: bool = False) -> None:
        """`short` of them send a few messages on each connection, `long` of them all on one."""
        self.account = Account()
        self._port = port
        self._tls = tls
        self._threads = [threading.Thread(target=self._run, args=(5,), daemon=True) for _ in range(short)]
        self._threads += [threading.Thread(target=self._run, args=(1 << 30,), daemon=True) for _ in range(long)]

    def __enter__(self) -> Account:
        for thread in self._threads:
            thread.start()
        wait_until(lambda: len(self.account.accepted) > 20, "the senders do not begin")
        return self.account

    def __exit__(self, *_: object) -> None:
        self.account.is_over.set()
        for thread in self._threads:
            thread.join(_PATIENCE)

    def _run(self, most: int) -> None:
        while not self.account.is_over.is_set():
            try:
                self._converse(most)
            except smtplib.SMTPResponseException as exc:
                self.account.refused[f"{type(exc).__name__} {exc.smtp_code}"] += 1
            except (OSError, smtplib.SMTPException) as exc:
                self.account.refused[type(exc).__name__] += 1

    def _converse(self, most: int) -> None:
        account = self.account
        with smtplib.SMTP("127.0.0.1", self._port(), local_hostname="client.example", timeout=_PATIENCE) as client:
            account.sessions += 1
            client.ehlo()
            if self._tls:
                client.starttls(context=CONTEXT)
                account.handshakes += 1
                client.ehlo()
            for _ in range(most):
                if account.is_over.is_set():
                    return
                number = next(account.numbers)
                client.mail("a@example.com")
                client.rcpt("b@example.org")
                code, text = client.data(f"Subject: n{number}\r\n\r\nHello\r\n")
                if code != 250:
                    raise smtplib.SMTPDataError(code, text)
                account.accepted.add(number)
                time.sleep(0.002)


def check_mail(server: Server, account: Account) -> str:
    """Compare what was accepted with the Maildir. Return both numbers; raise MissedError when they differ."""
    folder = server.folder / "data" / "maildir" / "new"

    def arrived() -> Counter[int]:
        found = (_NUMBER.search(path.read_bytes()) for path in folder.iterdir())
        return Counter(int(each[1]) for each in found if each is not None)

    with contextlib.suppress(MissedError):
        wait_until(lambda: account.accepted <= set(arrived()), "", 30)
    there = arrived()
    lost = account.accepted - set(there)
    twice = [number for number, count in there.items() if count > 1]
    if lost or twice:
        raise MissedError(f"{len(lost)} of {len(account.accepted)} messages lost, {len(twice)} duplicated")
    return f"{len(account.accepted)} accepted, 0 lost, 0 duplicated"


def check_refused(account: Account, *allowed: str) -> str:
    """Return how many connections were refused or cut: none but those that are allowed."""
    unexpected = {what: count for what, count in account.refused.items() if what not in allowed}
    if unexpected:
        raise MissedError(f"refused: {unexpected}")
    return f"{sum(account.refused.values())} refused"


# ---- the rows


def reloads(folder: Path, count: int) -> str:
    """Send SIGHUP under load."""
    server = Server(folder)
    server.start()
    pids = server.workers()
    with Senders(lambda: server.port) as account:
        for number in range(1, count + 1):
            server.configure(max_size=10_000_000 + number)
            server.signal(signal.SIGHUP)
            wait_until(lambda number=number: server.count("reloaded") >= number, "no reload")  # type: ignore[misc]
    same = server.workers() == pids
    if server.stop() != 0 or not same:
        raise MissedError("a worker or the server has ended")
    return f"{count} reloads: {check_refused(account)}, {check_mail(server, account)}"


def rolls(folder: Path, count: int) -> str:
    """Replace the workers under load."""
    server = Server(folder)
    server.start()
    with Senders(lambda: server.port) as account:
        for number in range(1, count + 1):
            before = server.workers()
            server.configure(memory=50_000_000 + number)
            server.signal(signal.SIGHUP)
            wait_until(lambda number=number: server.count("reloaded") >= number, "no roll")  # type: ignore[misc]
            if set(before) & set(server.workers()):
                raise MissedError("a worker was not replaced")
    if server.stop() != 0:
        raise MissedError("exit code")
    # Open sessions are closed with 421 between two messages; no connection is refused.
    return f"{count} rolls: {check_refused(account, *_GONE)} (open sessions), {check_mail(server, account)}"


def certificates(folder: Path, count: int) -> str:
    """Replace the certificate under load."""
    server = Server(folder, reload_check=1.0)
    server.start()
    slowest = 0.0
    with Senders(lambda: server.port, tls=True) as account:
        log_in(server)
        for _ in range(count):
            new = make_pair(server.folder)
            began = time.monotonic()
            wait_until(lambda new=new: all(server.certificate() == new for _ in range(4)), "old certificate")  # type: ignore[misc]
            slowest = max(slowest, time.monotonic() - began)
            log_in(server)
    if server.stop() != 0:
        raise MissedError("exit code")
    if slowest > 2.0 + 1.0:  # reload_check + 1 s, and up to a second for the eight handshakes that look
        raise MissedError(f"{slowest:.1f} s until the new certificate was in use")
    return (
        f"{count} certificates: {account.handshakes} handshakes, {check_refused(account)}, new one after at most "
        f"{slowest:.1f} s (reload_check = 1), SCRAM-SHA-256-PLUS before and after; {check_mail(server, account)}"
    )


def log_in(server: Server) -> None:
    """Log in with the channel binding of the certificate that is shown (RFC 5802, RFC 5929)."""
    with smtplib.SMTP("127.0.0.1", server.port, timeout=_PATIENCE) as client:
        client.starttls(context=CONTEXT)
        client.ehlo()
        assert isinstance(client.sock, ssl.SSLSocket)
        with tempfile.NamedTemporaryFile("w") as file:
            file.write(ssl.DER_cert_to_PEM_cert(client.sock.getpeercert(binary_form=True) or b""))
            file.flush()
            binding = ("tls-server-end-point", end_point_binding(Path(file.name)))
        scram = scramp.ScramClient(["SCRAM-SHA-256-PLUS"], "alice", "secret", channel_binding=binding)
        first = base64.b64encode(scram.get_client_first().encode()).decode()
        code, text = client.docmd("AUTH", f"SCRAM-SHA-256-PLUS {first}")
        if code == 334:
            scram.set_server_first(base64.b64decode(text).decode())
            code, text = client.docmd(base64.b64encode(scram.get_client_final().encode()).decode())
        if code == 334:
            scram.set_server_final(base64.b64decode(text).decode())
            code, text = client.docmd("")
        if code != 235:
            raise MissedError(f"SCRAM-SHA-256-PLUS: {code} {text.decode()}")


def drain(folder: Path) -> str:
    """Drain the server under load."""
    address = f"127.0.0.1:{free_port()}"
    server = Server(folder, metrics=address)
    server.start()
    if status_of(address) != 200:
        raise MissedError("it is not ready at the start")
    with Senders(lambda: server.port) as account:
        command = [sys.executable, "-m", "penstock", "ctl", "drain", "--config", str(folder / "penstock.toml")]
        subprocess.run([*command, "--delay", "1", "--stay"], check=True, env=ENVIRONMENT, timeout=_PATIENCE)
        if status_of(address) != 503:
            raise MissedError("/readyz does not answer 503 at once")
        wait_until(lambda: any("421" in what for what in account.refused), "nothing is refused")
        subprocess.run([*command[:-3], "resume", *command[-2:]], check=True, env=ENVIRONMENT, timeout=_PATIENCE)
        before = len(account.accepted)
        wait_until(lambda: len(account.accepted) > before + 20, "it does not resume")
        done = subprocess.run([*command, "--wait"], check=False, env=ENVIRONMENT, timeout=_PATIENCE)
        account.is_over.set()
    assert server.process is not None
    code = server.process.wait(_PATIENCE)
    if (done.returncode, code) != (0, 0):
        raise MissedError(f"exit codes {done.returncode} of ctl and {code} of the server")
    left = Path(folder / "data" / "spool" / "spool.db")
    if not left.exists():
        raise MissedError("there is no spool")
    return f"/readyz 503 at once, resumed, drained, exit code 0; {check_mail(server, account)}"


def status_of(address: str) -> int:
    """Return the status of /readyz."""
    connection = http.client.HTTPConnection(address, timeout=_PATIENCE)
    connection.request("GET", "/readyz")
    status = connection.getresponse().status
    connection.close()
    return status


def limit(folder: Path) -> str:
    """Connect more often than a network may, before and after a worker is killed."""
    server = Server(folder, per_network=10)
    server.start()

    def greetings() -> list[bytes]:
        clients = []
        codes = []
        for _ in range(11):
            clients.append(socket.create_connection(("127.0.0.1", server.port), timeout=_PATIENCE))
            codes.append(clients[-1].recv(3))
        for client in clients:
            client.close()
        return codes

    wanted = [b"220"] * 10 + [b"421"]
    first = wait_until(lambda: (codes := greetings()) == wanted and codes, "the 11th connection was not refused")
    workers = server.workers()
    os.kill(workers[0], signal.SIGKILL)
    wait_until(lambda: len(now := server.workers()) == 2 and workers[0] not in now, "not started again")
    wait_until(lambda: greetings() == wanted, "other counts after the kill")
    server.stop()
    return f"{first.count(b'220')} of 11 greeted with per_network = 10, also after kill -9 of a worker"


def hang(folder: Path) -> str:
    """Stop a worker with SIGSTOP."""
    server = Server(folder, watchdog=5.0)
    server.start()
    before = server.workers()
    began = time.monotonic()
    os.kill(before[1], signal.SIGSTOP)

    def is_replaced() -> bool:
        now = server.workers()
        return len(now) == 2 and before[1] not in now

    wait_until(is_replaced, "the worker was not replaced")
    clients = [socket.create_connection(("127.0.0.1", server.port), timeout=_PATIENCE) for _ in range(40)]
    greeted = [client.recv(3) for client in clients]
    seconds = time.monotonic() - began
    for client in clients:
        client.close()
    if server.stop() != 0 or set(greeted) != {b"220"} or seconds > 10:
        raise MissedError(f"{seconds:.1f} s, {Counter(greeted)}")
    return f"killed, started again, and 40 of 40 clients greeted {seconds:.1f} s after SIGSTOP"


PASS_ON = """
import fcntl, os, sys
passed = [int(each) for each in sys.argv[1].split(",") if each]
safe = [fcntl.fcntl(each, fcntl.F_DUPFD, 100) for each in passed]
for place, descriptor in enumerate(safe):
    os.dup2(descriptor, 3 + place, inheritable=True)
os.environ["LISTEN_PID"] = str(os.getpid())
os.execv(sys.executable, [sys.executable, "-m", "penstock", *sys.argv[2:]])
"""
"""What a service manager does between fork and exec: puts descriptors at 3, 4 and so on, where ours may be in use."""


class Store:
    """The service manager's side of the store of descriptors."""

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self.address)
        self._socket.settimeout(0.2)
        self.sockets: list[int] = []
        self._is_over = False
        self._thread = threading.Thread(target=self._take, daemon=True)
        self._thread.start()

    def _take(self) -> None:
        while not self._is_over:
            with contextlib.suppress(OSError):  # nothing came, or the sender has ended
                _, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
                for _, _, data in ancillary:
                    passed = array.array("i", data[: len(data) // 4 * 4])
                    self.sockets += [fcntl.fcntl(each, fcntl.F_DUPFD_CLOEXEC, 100) for each in passed]
                    for each in passed:
                        os.close(each)

    def close(self) -> None:
        """Forget everything."""
        self._is_over = True
        self._thread.join()
        self._socket.close()
        for each in self.sockets:
            os.close(each)


def restarts(folder: Path, count: int) -> str:
    """Restart the server under load, with its sockets in the store of a service manager."""
    server = Server(folder)
    store = Store(folder)
    environment = ENVIRONMENT | {"NOTIFY_SOCKET": store.address}
    server.start(env=environment)
    port = server.port
    wait_until(lambda: len(store.sockets) == 2, "the sockets are not stored")
    codes = []
    with Senders(lambda: port) as account:
        for _ in range(count):
            codes.append(server.stop())
            environment |= {"LISTEN_FDS": "2", "LISTEN_FDNAMES": "smtp:smtp"}
            descriptors = ",".join(map(str, store.sockets))
            server.start([sys.executable, "-c", PASS_ON, descriptors], env=environment, pass_fds=store.sockets)
            if server.port != port:
                raise MissedError("another port")
    codes.append(server.stop())
    store.close()
    if set(codes) != {0}:
        raise MissedError(f"exit codes {codes}")
    return f"{count} restarts: {check_refused(account, *_GONE)} (open sessions), {check_mail(server, account)}"


def main() -> None:
    """Run the rows and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", default="", help="only rows whose names have one of these words")
    parser.add_argument("--scale", type=float, default=1.0, help="0.1: a tenth of the reloads")
    arguments = parser.parse_args()
    scale: float = arguments.scale

    def times(count: int) -> int:
        return max(1, round(count * scale))

    rows: dict[str, Callable[[Path], str]] = {
        "reload": lambda folder: reloads(folder, times(50)),
        "roll": lambda folder: rolls(folder, times(5)),
        "certificate": lambda folder: certificates(folder, times(10)),
        "drain": drain,
        "limit": limit,
        "hang": hang,
        "restart": lambda folder: restarts(folder, times(5)),
    }
    wanted = [name for name in rows if not arguments.rows or any(word in name for word in arguments.rows.split(","))]
    missed = 0
    for name in wanted:
        folder = Path(tempfile.mkdtemp(prefix=f"penstock-{name}-"))
        try:
            said = f"kept    {rows[name](folder)}"
            shutil.rmtree(folder)
        except (MissedError, subprocess.SubprocessError) as exc:
            said, missed = f"MISSED  {exc}; see {folder}", missed + 1
        print(f"{name:12} {said}", flush=True)
    sys.exit(1 if missed else 0)


if __name__ == "__main__":
    main()
