"""`python -m bench.crash`: no accepted mail is lost or damaged by crashes, full disks, I/O errors and lost connections.

A gateway (`penstock serve`, spool, one route) relays from senders to a next hop (another Penstock that delivers into a
Maildir and syncs before its 250). Each message has a number; senders record which ones were answered with 250.
Meanwhile a scenario injects failures, at random moments from a seed and for a bounded time:

    kill     the gateway is killed with SIGKILL and restarted
    mailbox  the same, without a next hop: it writes into a Maildir itself
    hop      the next hop is killed and restarted
    full     the spool is on a small file system that is filled and emptied by others
    write    some writes, syncs and opens below the spool fail with EIO or ENOSPC (an LD_PRELOAD library)
    cut      proxies on both sides cut connections at random octets, preferably during replies to the final dot

Then the failures end and the spool is emptied. Every message with a 250 must have arrived, none may be damaged, and
each duplicate must have been in flight when something was killed or cut, according to the spool or the journal. Exit
code 1 if any of this does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import hashlib
import json
import random
import re
import shutil
import signal
import smtplib
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.ports import free_port

from bench.cutting_proxy import CuttingProxy
from bench.failing_disk import FailingWrites
from bench.processes import ENVIRONMENT

_SENDERS = 8
_PATIENCE = 120.0
"""Seconds to empty the spool after the last failure."""
_DELIVERED_TO = re.compile(rb"^Delivered-To: ([^\r\n]+)", re.MULTILINE)
_BLUR = 0.1
"""Seconds by which a moment and the clock of the journal may differ."""
_NUMBER = re.compile(rb"^X-Number: (\d+) ([0-9a-f]{64})\r?$", re.MULTILINE)


@dataclass
class Account:
    """What was sent, and what became of it. Shared by the sender threads."""

    seed: int
    accepted: dict[tuple[int, bytes], None] = field(default_factory=dict)
    """Numbers and recipients answered with 250."""
    refused: Counter[int] = field(default_factory=Counter)
    """Other answers, by code."""
    broken: int = 0
    """Attempts without a reply."""
    in_flight: set[int] = field(default_factory=set)
    """Numbers that were being delivered when something was killed or cut."""
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def number(self) -> int:
        """Return a number for the next message."""
        with self._lock:
            self._next += 1
            return self._next

    @property
    def sent(self) -> int:
        """Messages attempted."""
        return self._next


def text_of(number: int, seed: int) -> bytes:
    """Return a message with its number and digest in the header; some are large, some full of dots and 8-bit octets."""
    rng = random.Random(f"{seed}/{number}")
    size = rng.choice([200, 2_000, 2_000, 20_000, 20_000, 300_000])
    lines = []
    while size > 0:
        line = rng.choice([b".", b"..", b"", b"From x", b"\xc3\xa9" * 20, rng.randbytes(24).hex().encode()])
        lines.append(line)
        size -= len(line) + 2
    body = b"\r\n".join(lines) + b"\r\n"
    digest = hashlib.sha256(body).hexdigest()
    return b"Subject: crash\r\nX-Number: %d %s\r\n\r\n" % (number, digest.encode()) + body


class Program:
    """A `penstock serve` that can be killed and restarted on the same port."""

    def __init__(self, folder: Path, toml: str, environment: dict[str, str] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = free_port()
        self.journal = folder / "journal"
        self.config = folder / "penstock.toml"
        self.config.write_text(toml.replace("{port}", str(self.port)))
        self._environment = {**ENVIRONMENT, **(environment or {})}
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start, and wait until it greets."""
        with self.journal.open("ab") as journal:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "penstock", "serve", "--config", str(self.config)],
                stdout=journal,
                stderr=journal,
                env=self._environment,
            )
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                break
            with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.port), timeout=5) as sock:
                if sock.recv(512).startswith((b"220", b"421")):
                    return
            time.sleep(0.05)
        raise RuntimeError(f"it did not start: {self.journal.read_text(errors='replace')[-2000:]}")

    def kill(self) -> None:
        """Kill it as a power failure would."""
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()

    def stop(self) -> int:
        """Stop it gracefully and return its exit code."""
        assert self._process is not None
        self._process.send_signal(signal.SIGTERM)
        return self._process.wait(timeout=60)

    def end(self) -> None:
        """Kill it if it still runs."""
        if self._process is not None and self._process.poll() is None:
            self.kill()

    def spool(self, *words: str) -> bytes:
        """Return what `penstock spool` prints."""
        command = [sys.executable, "-m", "penstock", "spool", *words, "--config", str(self.config)]
        return subprocess.run(command, check=True, capture_output=True, env=ENVIRONMENT).stdout


_HOP = """hostname = "hop.example"
data_dir = "data"
delivery = { kind = "maildir" }
journal = { events = "errors" }
[[listener]]
address = "127.0.0.1:{port}"
max_size = 0
tls.mode = "none"
"""
_GATEWAY = """hostname = "gateway.example"
data_dir = "data"
journal = { format = "json", events = "mail" }
delivery = { kind = "spool" }
spool = { reserve_octets = 4_000_000, reserve_inodes = 0 }
[relay.retry]
schedule = [1.0]
jitter = 0.5
{route}
[[listener]]
address = "127.0.0.1:{port}"
max_size = 0
tls.mode = "none"
"""
_ROUTE = """[[route]]
next_hop = "smtp://127.0.0.1:{hop}"
tls.mode = "none"
limits = { breaker_pause = 0.2, breaker_longest = 1.0 }"""


@dataclass
class Setup:
    """A gateway, its next hop, and the connections between them."""

    gateway: Program
    hop: Program
    end: Program
    """The one of them in whose Maildir the mail arrives."""
    account: Account
    entrance: int
    """The port that senders connect to."""
    rng: random.Random
    failures: int
    """How many failures are injected."""
    moments: list[float] = field(default_factory=list)
    """When deliveries were interrupted, in seconds since the epoch."""

    def note_in_flight(self) -> None:
        """Store the deliveries in progress according to the spool of a stopped gateway."""
        for line in json.loads(self.gateway.spool("list", "--state", "attempting", "--limit", "0", "--json")):
            found = re.match(r"n(\d+)@", line["sender"])
            assert found is not None, line
            self.account.in_flight.add(int(found[1]))


def _send_until(stop: threading.Event, port: int, account: Account, seed: int) -> None:
    """Send a few messages per connection, each with a new number, and continue after any error."""
    rng = random.Random(seed)
    while not stop.is_set():
        try:
            with smtplib.SMTP("127.0.0.1", port, local_hostname="sender.example", timeout=30) as client:
                for _ in range(rng.randrange(1, 20)):
                    number = account.number()
                    recipients = [f"r{i}@example.org" for i in range(rng.choice([1, 1, 1, 3]))]
                    client.sendmail(f"n{number}@example.com", recipients, text_of(number, account.seed))
                    account.accepted.update({(number, to.encode()): None for to in recipients})
                    if stop.is_set():
                        return
        except smtplib.SMTPResponseException as exc:
            account.refused[exc.smtp_code] += 1
            stop.wait(0.05)
        except (smtplib.SMTPException, OSError):
            account.broken += 1
            stop.wait(0.02)


@contextlib.contextmanager
def _senders(setup: Setup) -> Iterator[None]:
    stop = threading.Event()
    threads = [
        threading.Thread(target=_send_until, args=(stop, setup.entrance, setup.account, setup.rng.randrange(1 << 30)))
        for _ in range(_SENDERS)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


# ---- the scenarios: each injects its failures while mail is sent


def kill_gateway(setup: Setup) -> None:
    """Kill the gateway."""
    for _ in range(setup.failures):
        time.sleep(setup.rng.uniform(0.05, 0.8))
        setup.gateway.kill()
        setup.note_in_flight()
        setup.gateway.start()


def kill_hop(setup: Setup) -> None:
    """Kill the next hop."""
    for _ in range(setup.failures):
        time.sleep(setup.rng.uniform(0.1, 0.8))
        setup.hop.kill()
        setup.moments.append(time.time())
        time.sleep(setup.rng.uniform(0, 0.5))
        setup.hop.start()


def fill_disk(setup: Setup) -> None:
    """Fill the file system that the spool lies on, and empty it again."""
    ballast = setup.gateway.folder / "data" / "ballast"
    for _ in range(setup.failures):
        with contextlib.suppress(OSError), ballast.open("wb") as file:
            while True:
                file.write(bytes(65_536))
        time.sleep(setup.rng.uniform(0.3, 1.0))
        ballast.unlink()
        time.sleep(setup.rng.uniform(0.3, 1.0))


def wait_for_failures(setup: Setup) -> None:
    """Wait while failures occur on their own."""
    time.sleep(setup.failures * 0.5)


# ---- accounting


def _wait_until_empty(setup: Setup) -> None:
    """Wait until the gateway has delivered everything."""
    deadline = time.monotonic() + _PATIENCE
    while time.monotonic() < deadline:
        if json.loads(setup.gateway.spool("stats", "--json"))["messages"] == 0:
            return
        time.sleep(0.2)
    raise RuntimeError(f"the spool did not run empty: {setup.gateway.spool('stats').decode()}")


def _in_flight(journal: Path, moments: Sequence[float]) -> set[int]:
    """Return the numbers that were on their way at one of these moments: accepted, and the attempt not ended."""
    numbers: dict[str, tuple[int, float]] = {}
    flying: set[int] = set()
    for line in journal.read_bytes().splitlines():
        record = json.loads(line) if line.startswith(b'{"time"') else {}
        event, message_id = record.get("event"), record.get("id", "")
        if event == "accepted":
            number = int(record["from"].partition("@")[0].removeprefix("n"))
            numbers[message_id] = (number, _seconds(record["time"]))
        elif event in ("delivered", "deferred") and message_id in numbers:
            number, begun = numbers[message_id]
            ended = _seconds(record["time"])
            if any(begun - _BLUR <= moment <= ended + _BLUR for moment in moments):
                flying.add(number)
            if event == "deferred":
                numbers[message_id] = (number, ended)  # the next attempt begins after it
    return flying


def _seconds(stamp: str) -> float:
    return datetime.datetime.fromisoformat(stamp).timestamp()


Arrivals = Counter[tuple[int, bytes]]


def _arrived(setup: Setup) -> tuple[Arrivals, list[str]]:
    """Return how often each number has arrived for each recipient, and what is damaged."""
    counts: Arrivals = Counter()
    damaged = []
    for path in (setup.end.folder / "data" / "maildir" / "new").iterdir():
        data = path.read_bytes()
        head, _, body = data.partition(b"\r\n\r\n")
        found = _NUMBER.search(head)
        if found is None or hashlib.sha256(body).hexdigest().encode() != found[2]:
            damaged.append(path.name)
        else:
            counts.update((int(found[1]), recipient) for recipient in _DELIVERED_TO.findall(head))
    return counts, damaged


def check_account(setup: Setup) -> list[str]:
    """Compare accepted with received messages; print the result, and return the violations."""
    account = setup.account
    account.in_flight |= _in_flight(setup.gateway.journal, setup.moments)
    counts, damaged = _arrived(setup)
    lost = account.accepted.keys() - counts.keys()
    duplicates = {arrival for arrival, count in counts.items() if count > 1}
    unexplained = {number for number, _ in duplicates if number not in account.in_flight}
    unasked = len(counts.keys() - account.accepted.keys())
    print(
        f"  {account.sent} messages tried, {len(account.accepted)} recipients answered with 250, "
        f"refused {dict(account.refused)}, "
        f"{account.broken} attempts interrupted\n"
        f"  arrived {len(counts)} ({unasked} of them without a 250); lost {len(lost)}, damaged {len(damaged)}; "
        f"{len(duplicates)} arrived more than once, {len(unexplained)} of them not in flight "
        f"({len(account.in_flight)} were in flight when a failure occurred)",
        flush=True,
    )
    return [
        *(f"lost: {number}" for number, _ in sorted(lost)[:10]),
        *(f"damaged: {name}" for name in damaged[:10]),
        *(f"more than once, and not in flight: {number}" for number in sorted(unexplained)[:10]),
    ]


@contextlib.contextmanager
def _small_disk(folder: Path) -> Iterator[None]:
    """Mount a small file system (needs root)."""
    folder.mkdir(parents=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


SCENARIOS: dict[str, Callable[[Setup], None]] = {
    "kill": kill_gateway,
    "mailbox": kill_gateway,
    "hop": kill_hop,
    "full": fill_disk,
    "write": wait_for_failures,
    "cut": wait_for_failures,
}


def run(name: str, failures: int, seed: int, folder: Path) -> list[str]:
    """Run a scenario and return the violations."""
    rng = random.Random(f"{seed}/{name}")
    with contextlib.ExitStack() as stack:
        hop = Program(folder / "hop", _HOP)
        way_out = stack.enter_context(CuttingProxy(hop.port, rng.randrange(1 << 30))) if name == "cut" else None
        home = folder / "gateway"
        if name == "full":
            stack.enter_context(_small_disk(home / "data"))
        failing = FailingWrites(folder, home / "data" / "spool", rng.randrange(1 << 30)) if name == "write" else None
        route = _ROUTE.replace("{hop}", str(way_out.port if way_out else hop.port))
        gateway = Program(
            home,
            _GATEWAY.replace("{route}", "" if name == "mailbox" else route),
            None if failing is None else failing.environment,
        )
        way_in = stack.enter_context(CuttingProxy(gateway.port, rng.randrange(1 << 30))) if name == "cut" else None
        entrance = way_in.port if way_in else gateway.port
        end = gateway if name == "mailbox" else hop
        setup = Setup(gateway, hop, end, Account(seed), entrance, rng, failures)
        for program in (hop, gateway):
            stack.callback(program.end)
            program.start()
        if failing is not None:
            failing.begin()
        with _senders(setup):
            SCENARIOS[name](setup)
        for proxy in (way_in, way_out):
            if proxy is not None:
                proxy.stop_cutting()
                setup.moments += proxy.moments
        if failing is not None:
            failing.end()
        _wait_until_empty(setup)
        wrong = check_account(setup)
        wrong += [f"`penstock spool check`: {line}" for line in _check(gateway)]
        for program in (gateway, hop):
            if program.stop() != 0:
                wrong.append("a server did not end with exit code 0")
        return wrong


def _check(gateway: Program) -> list[str]:
    try:
        gateway.spool("check")
    except subprocess.CalledProcessError as exc:
        return [(exc.stdout + exc.stderr).decode()]
    return []


def main() -> None:
    """Run the scenarios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--harm", type=int, default=50, help="number of failures in each scenario")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--scenarios", default=",".join(SCENARIOS))
    parser.add_argument("--keep", action="store_true", help="keep the folder of a scenario with violations")
    arguments = parser.parse_args()
    failed = False
    for name in arguments.scenarios.split(","):
        folder = Path(tempfile.mkdtemp(prefix=f"penstock-crash-{name}-"))
        print(f"{name}: {arguments.harm} failures, seed {arguments.seed}", flush=True)
        wrong = run(name, arguments.harm, arguments.seed, folder)
        for line in wrong:
            print(f"  WRONG: {line}")
        failed = failed or bool(wrong)
        if wrong and arguments.keep:
            print(f"  kept: {folder}")
        else:
            shutil.rmtree(folder)
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
