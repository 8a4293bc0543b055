"""Signals, the watchdog, the service manager and draining: through `penstock serve`, from outside."""

from __future__ import annotations

import array
import json
import os
import signal
import smtplib
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from bench import processes
from bench.operations import PASS_ON

from tests.e2e.running import ENVIRONMENT, Server, serving
from tests.e2e.test_reload import wait_for_event
from tests.e2e.test_workers import workers_of

MESSAGE = b"Subject: x\r\n\r\nHello\r\n"


def send(server: Server) -> None:
    with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
        assert client.sendmail("a@example.com", ["b@example.org"], MESSAGE) == {}


def wait_for_text(path: Path, text: str) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() or text not in path.read_text():
        assert time.monotonic() < deadline, f"{path} does not contain {text!r}"
        time.sleep(0.02)


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_rotated_journal_file_is_opened_again(tmp_path: Path, workers: str) -> None:
    config = '[[listener]]\naddress = "127.0.0.1:0"\n[journal]\nfile = "log"\n'
    with serving(tmp_path, config, "serve", "--workers", workers) as server:
        log, old = tmp_path / "log", tmp_path / "log.1"
        wait_for_text(log, '"listening"')
        log.rename(old)
        server.process.send_signal(signal.SIGUSR1)
        deadline = time.monotonic() + 60
        while not log.exists() or '"accepted"' not in log.read_text():
            assert time.monotonic() < deadline
            send(server)
        size = old.stat().st_size
        for _ in range(4):
            send(server)
        assert server.stop() == 0
        assert log.read_text().count('"stopped"') == int(workers)
        assert old.stat().st_size == size


def test_a_truncated_journal_has_no_hole(tmp_path: Path) -> None:
    """copytruncate of logrotate: the server goes on at the beginning of the file, not at its old offset."""
    with serving(tmp_path, "") as server:
        send(server)
        wait_for_event(server, "delivered")
        os.truncate(server.journal, 0)
        send(server)
        wait_for_event(server, "accepted")
        assert b"\0" not in server.journal.read_bytes()


@pytest.mark.parametrize("workers", ["1", "2"])
def test_the_state_is_written_to_the_journal(tmp_path: Path, workers: str) -> None:
    with serving(tmp_path, "", "serve", "--workers", workers) as server, smtplib.SMTP("127.0.0.1", server.port):
        server.process.send_signal(signal.SIGUSR2)
        wait_for_event(server, "state", int(workers) + 1)
        lines = [json.loads(line) for line in server.journal.read_text().splitlines() if '"state"' in line]
        assert [line["of"] for line in lines] == ["worker"] * int(workers) + ["server"]
        assert sum(line.get("sessions", 0) for line in lines) == 1
        assert lines[-1]["phase"] == "running"
        assert lines[-1]["is_ready"] is True


def test_sigquit_prints_the_stacks_of_a_worker(tmp_path: Path) -> None:
    with serving(tmp_path, "", "serve", "--workers", "2") as server:
        os.kill(workers_of(server)[1], signal.SIGQUIT)
        wait_for_text(server.journal, "most recent call first")
        send(server)
        assert server.stop() == 0


def test_a_worker_that_hangs_is_replaced(tmp_path: Path) -> None:
    config = '[[listener]]\naddress = "127.0.0.1:0"\n[server]\nworkers = 2\nwatchdog = 5\n'
    with serving(tmp_path, config) as server:
        before = workers_of(server)
        stopped_at = time.monotonic()
        os.kill(before[1], signal.SIGSTOP)
        server.said("worker 1 did not answer the watchdog, and is started again")
        clients = [smtplib.SMTP("127.0.0.1", server.port, timeout=60) for _ in range(20)]  # all are greeted
        assert time.monotonic() - stopped_at < 20  # 10 s on an idle machine, which bench/operations.py measures
        for client in clients:
            client.close()
        after = workers_of(server)
        assert after[0] == before[0]
        assert after[1] != before[1]
        assert server.stop() == 0


# ---- the service manager


class Manager:
    """A service manager: keeps what it is told, and the sockets."""

    def __init__(self, folder: Path) -> None:
        self.address = folder / "notify"
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(str(self.address))
        self._socket.settimeout(60)
        self.store: list[tuple[str, int]] = []
        self.told: list[dict[str, str]] = []

    def wait_for(self, line: str) -> dict[str, str]:
        """Receive until a datagram has a line; return the datagram."""
        while True:
            data, ancillary, _, _ = self._socket.recvmsg(4096, socket.CMSG_SPACE(4 * 253))
            words = dict(each.split("=", 1) for each in data.decode().splitlines())
            self.told.append(words)
            for _, _, passed in ancillary:
                descriptors = array.array("i")
                descriptors.frombytes(passed[: len(passed) - len(passed) % 4])
                self.store += [(words["FDNAME"], each) for each in descriptors]
            if line in data.decode().splitlines():
                return words

    def close(self) -> None:
        self._socket.close()
        for _, descriptor in self.store:
            os.close(descriptor)


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[Manager]:
    made = Manager(tmp_path)
    yield made
    made.close()


@contextmanager
def managed(manager: Manager, folder: Path, config: str, run: int = 0, **environment: str) -> Iterator[Server]:
    """Run a server under a service manager, with the sockets that it has stored; wait until it is ready."""
    (folder / "penstock.toml").write_text(config)
    names, descriptors = [name for name, _ in manager.store], [each for _, each in manager.store]
    environment = ENVIRONMENT | {"NOTIFY_SOCKET": str(manager.address)} | environment
    if descriptors:
        environment |= {"LISTEN_FDS": str(len(descriptors)), "LISTEN_FDNAMES": ":".join(names)}
    out, journal = folder / f"out{run}", folder / f"journal{run}"
    command = [sys.executable, "-c", PASS_ON, ",".join(map(str, descriptors)), "serve"]
    with out.open("wb") as stdout, journal.open("wb") as stderr:
        process = subprocess.Popen(
            [*command, "--config", str(folder / "penstock.toml"), "--data", str(folder)],
            stdout=stdout, stderr=stderr, env=environment, pass_fds=descriptors,
        )  # fmt: skip
    try:
        manager.wait_for("READY=1")
        server = Server(process, 0, folder, out, journal)
        server.port = int(server.said(r"listening on 127\.0\.0\.1:(\d+)")[1])
        yield server
    finally:
        processes.stop(process, grace=60)


CONFIG = '[[listener]]\naddress = "127.0.0.1:0"\nname = "smtp"\n'


def test_the_service_manager_is_notified_of_every_change(tmp_path: Path, manager: Manager) -> None:
    with managed(manager, tmp_path, CONFIG, WATCHDOG_USEC="400000") as server:
        began = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
        manager.wait_for("WATCHDOG=1")
        server.process.send_signal(signal.SIGHUP)
        reloading = manager.wait_for("RELOADING=1")
        assert int(reloading["MONOTONIC_USEC"]) > began
        manager.wait_for("READY=1")
        assert "NOTIFY_SOCKET" not in Path(f"/proc/{workers_of(server)[0]}/environ").read_text()
        assert server.stop() == 0
        manager.wait_for("STOPPING=1")


def test_sockets_in_the_store_outlive_a_restart(tmp_path: Path, manager: Manager) -> None:
    two = CONFIG + "[server]\nworkers = 2\n"
    with managed(manager, tmp_path, two) as server:
        port = server.port
        send(server)
        assert {name for name, _ in manager.store} == {"smtp"}
        assert len(manager.store) == 2
        assert server.stop() == 0
    # Nobody accepts now, and nobody is refused: these clients wait in the queues of the stored sockets.
    waiting = [socket.create_connection(("127.0.0.1", port), timeout=60) for _ in range(10)]
    with managed(manager, tmp_path, CONFIG, 1) as server:  # with fewer workers, too
        assert server.port == port
        for client in waiting:
            assert client.recv(3) == b"220"
            client.close()
        send(server)
        assert server.stop() == 0


def test_activated_sockets_are_used_instead_of_binding(tmp_path: Path, manager: Manager) -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock, socket.create_server(("127.0.0.1", 0)) as other:
        manager.store = [("unknown", os.dup(sock.fileno())), ("unknown", os.dup(other.fileno()))]
        port = sock.getsockname()[1]
        with managed(manager, tmp_path, CONFIG.replace(":0", f":{port}")) as server:
            assert server.port == port
            send(server)
            server.said(
                f"127.0.0.1:{other.getsockname()[1]} was passed by the service manager, but no listener uses it"
            )
            assert server.stop() == 0


def test_a_worker_that_hangs_stops_the_signs_of_life(tmp_path: Path, manager: Manager) -> None:
    quiet = threading.Event()
    with managed(manager, tmp_path, CONFIG + "[server]\nwatchdog = 0\n", WATCHDOG_USEC="400000") as server:
        os.kill(workers_of(server)[0], signal.SIGSTOP)
        manager._socket.settimeout(3)
        try:
            while True:
                manager.wait_for("WATCHDOG=1")
        except TimeoutError:
            quiet.set()
        os.kill(workers_of(server)[0], signal.SIGCONT)
        manager._socket.settimeout(60)
        manager.wait_for("WATCHDOG=1")
    assert quiet.is_set()


POLICY = """
import time
def wait_for_ever():
    time.sleep(1000)
class Hangs:
    def on_mail(self, transaction, sender, parameters):
        if sender.local == "hang":
            wait_for_ever()
"""


def test_a_policy_that_blocks_is_found_in_the_stacks(tmp_path: Path) -> None:
    (tmp_path / "policies.py").write_text(POLICY)
    config = '[[check]]\nhook = "policies.py:Hangs"\n[[listener]]\naddress = "127.0.0.1:0"\n'
    config += "[server]\nworkers = 2\nwatchdog = 2\n"
    with serving(tmp_path, config) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
            client.ehlo()
            with pytest.raises(smtplib.SMTPServerDisconnected):
                client.mail("hang@example.com")
        assert "in wait_for_ever" in server.journal.read_text()
        server.said("did not answer the watchdog, and is started again")
        for _ in range(10):
            send(server)
        assert server.stop() == 0


def test_too_few_descriptors_lower_the_connections(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "penstock", "serve", "--data", str(tmp_path), "--listen", "127.0.0.1:0"]
    limited = ["sh", "-c", 'ulimit -n 300; exec "$@"', "sh", *command]
    out, journal = tmp_path / "out", tmp_path / "journal"
    with processes.started(limited, out, errors=journal) as process:
        server = Server(process, 0, tmp_path, out, journal)
        server.port = int(server.said(r"listening on 127\.0\.0\.1:(\d+)")[1])
        told = wait_for_event(server, "limited")
        assert (told["key"], told["wanted"], told["value"]) == ("admission.connections", 20_000, 150)
        clients = [socket.create_connection(("127.0.0.1", server.port), timeout=60) for _ in range(151)]
        assert [client.recv(3) for client in clients] == [b"220"] * 150 + [b"421"]
        for client in clients:
            client.close()


def test_one_process_drains_resumes_and_ends(tmp_path: Path) -> None:
    def ctl(*words: str) -> None:
        command = [sys.executable, "-m", "penstock", "ctl", *words, "--data", str(tmp_path)]
        subprocess.run(command, check=True, env=ENVIRONMENT, timeout=60)

    with serving(tmp_path, "") as server:
        assert workers_of(server) == {}
        with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as idle:
            ctl("drain", "--delay", "0", "--stay", "--wait")
            assert idle.docmd("NOOP")[0] == 421
            with socket.create_connection(("127.0.0.1", server.port), timeout=60) as refused:
                assert refused.recv(3) == b"421"
            idle.close()
        ctl("resume")
        send(server)
        ctl("drain", "--delay", "0", "--wait")
        assert server.process.wait(60) == 0
        assert len(server.messages(1)) == 1


def test_a_unix_socket_survives_new_workers(tmp_path: Path, manager: Manager) -> None:
    path = tmp_path / "smtp.sock"
    config = CONFIG + f'[[listener]]\naddress = "unix:{path}"\n[server]\nworkers = 2\n'

    def greet() -> None:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(60)
            client.connect(str(path))
            assert client.recv(3) == b"220"

    with managed(manager, tmp_path, config) as server:
        greet()
        (tmp_path / "penstock.toml").write_text(config + "[body]\nmemory_total = 50_000_000\n")
        server.process.send_signal(signal.SIGHUP)
        wait_for_event(server, "reloaded")
        greet()
        assert server.stop() == 0
    assert path.exists()  # the store has it, so that clients wait
    with managed(manager, tmp_path, config, 1) as server:
        greet()
        assert server.stop() == 0
