"""What operators see of `penstock serve` and ask of it: shared limits, /metrics, the control socket."""

from __future__ import annotations

import http.client
import json
import os
import re
import resource
import signal
import smtplib
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

from bench import processes
from prometheus_client.parser import text_string_to_metric_families

from tests.e2e.running import Server, serving
from tests.ports import free_port

WORKERS = """
hostname = "mx.example.org"
[server]
workers = 2
[[listener]]
address = "127.0.0.1:0"
name = "in"
[delivery]
kind = "discard"
"""


def wait_until(happened: Callable[[], bool]) -> None:
    """Ask another process until something has happened, for at most a minute."""
    deadline = time.monotonic() + 60
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def penstock(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a command of the command line for a server."""
    command = [sys.executable, "-m", "penstock", *arguments, "--config", str(server.folder / "penstock.toml")]
    command += ["--data", str(server.folder)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=processes.ENVIRONMENT, check=False)


def status(server: Server) -> dict[str, Any]:
    found = penstock(server, "status", "--json")
    assert found.returncode == 0, found.stderr
    return dict(json.loads(found.stdout))


def get(port: int, path: str) -> tuple[int, str]:
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.read().decode()


def samples(port: int) -> Counter[str]:
    """Return the sums of all samples by name."""
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(get(port, "/metrics")[1]):
        for sample in family.samples:
            found[sample.name] += int(sample.value)
    return found


def connect(server: Server) -> tuple[socket.socket, bytes]:
    """Open a connection; return it and the code of the greeting."""
    sock = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    return sock, sock.recv(1000)[:3]


def test_limits_hold_for_all_workers_and_a_killed_one_leaks_nothing(tmp_path: Path) -> None:
    port = free_port()
    toml = WORKERS + f'[admission]\nper_network = 10\nexempt = []\n[metrics]\naddress = "127.0.0.1:{port}"\n'
    with serving(tmp_path, toml) as server, ExitStack() as stack:

        def fill() -> list[bytes]:
            """Connect eleven times, and leave again."""
            with ExitStack() as clients:
                found = []
                for _ in range(11):
                    sock, code = connect(server)
                    clients.enter_context(closing(sock))
                    found.append(code)
                sessions = samples(port)
                assert sessions["penstock_sessions"] == 10
                return found

        def left() -> int:
            return samples(port)["penstock_sessions"]

        assert fill() == [b"220"] * 10 + [b"421"]
        wait_until(lambda: left() == 0)
        for _ in range(10):
            stack.enter_context(closing(connect(server)[0]))
        victim = next(worker for worker in status(server)["workers"] if worker["sessions"])
        os.kill(victim["pid"], signal.SIGKILL)
        stack.close()
        wait_until(lambda: left() == 0 and samples(port)["penstock_workers"] == 2)
        assert fill() == [b"220"] * 10 + [b"421"]
        wait_until(lambda: left() == 0)
        found = samples(port)
        assert found["penstock_admission_refused_total"] == 2
        assert found["penstock_worker_restarts_total"] == 1
        assert 22 <= found["penstock_sessions_total"] < 32  # not those that the killed worker had open


def test_status_and_ctl_find_a_server_by_its_data_directory(tmp_path: Path) -> None:
    with serving(tmp_path, WORKERS.replace("discard", "maildir").replace("workers = 2", "workers = 1")) as server:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nhello\r\n")
        state = status(server)
        assert (state["phase"], state["is_ready"], state["messages_accepted"]) == ("running", True, 1)
        assert state["workers"][0]["messages_accepted"] == 1 and state["workers"][0]["resident_octets"] > 1 << 20
        shown = penstock(server, "status").stdout
        assert re.search(r"penstock \S+: running, ready; process \d+, since ", shown)
        assert "listener in: 127.0.0.1:" in shown and "certificate until" in shown
        assert re.search(r"accepted .* 1 total", penstock(server, "top", "--once").stdout)
        assert (server.folder / "run" / "control").stat().st_mode & 0o777 == 0o600
        assert penstock(server, "ctl", "reload").stdout == "reloaded\n"
        assert penstock(server, "ctl", "rotate").stdout == "rotated\n"
        (server.folder / "penstock.toml").write_text("[server]\ngrce = 3\n")
        refused = penstock(server, "ctl", "reload")
        assert (refused.returncode, refused.stdout) == (1, "")
        assert "server.grce: unknown key (did you mean grace?)" in refused.stderr
        hop = penstock(server, "ctl", "hop", "mx.example.org", "suspend")
        assert hop.returncode == 1 and "has no next hops" in hop.stderr
    gone = penstock(server, "status")
    assert gone.returncode == 1 and "no server is running" in gone.stderr


def test_a_drained_server_is_not_ready_and_ends_with_code_0(tmp_path: Path) -> None:
    port = free_port()
    toml = f'[[listener]]\naddress = "127.0.0.1:0"\n[metrics]\naddress = "127.0.0.1:{port}"\n'
    with serving(tmp_path, toml) as server:
        assert get(port, "/readyz")[0] == 200
        assert penstock(server, "ctl", "drain", "--delay", "0", "--stay", "--wait").stdout == "drained\n"
        assert (get(port, "/readyz")[0], get(port, "/livez")[0]) == (503, 200)
        assert samples(port)["penstock_draining"] == 1
        assert penstock(server, "ctl", "resume").stdout == "resumed\n"
        assert get(port, "/readyz")[0] == 200
        assert penstock(server, "ctl", "drain", "--delay", "0").stdout == "draining\n"
        assert server.process.wait(timeout=60) == 0
    assert not (server.folder / "run" / "control").exists()


def test_a_next_hop_is_suspended_resumed_and_tried_again(tmp_path: Path) -> None:
    toml = f'[[listener]]\naddress = "127.0.0.1:0"\n[[route]]\nnext_hop = "smtp://127.0.0.1:{free_port()}"\n'
    with serving(tmp_path, toml) as server:
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\nhello\r\n")
        server.said('"deferred"')
        assert penstock(server, "ctl", "hop", "127.0.0.1", "suspend").stdout == "127.0.0.1: suspended\n"
        wait_until(lambda: "127.0.0.1" in status(server)["workers"][0]["suspended"])
        assert "127.0.0.1: suspended" in penstock(server, "status").stdout
        assert penstock(server, "ctl", "hop", "127.0.0.1", "resume").stdout == "127.0.0.1: resumed\n"
        assert status(server)["spool"]["recipients"] == 1
        drained = penstock(server, "ctl", "drain", "--delay", "0", "--timeout", "0", "--stay", "--wait").stdout
        assert drained == "drained, but for mail that is left in the spool: the timeout is over\n"


def test_clients_receive_421_when_descriptors_run_out(tmp_path: Path) -> None:
    toml = WORKERS.replace("workers = 2", "workers = 1")
    with serving(tmp_path, toml) as server, ExitStack() as stack:
        open_now = len(os.listdir(f"/proc/{server.process.pid}/fd"))
        resource.prlimit(server.process.pid, resource.RLIMIT_NOFILE, (open_now + 20, open_now + 20))
        codes: Counter[bytes] = Counter()
        for _ in range(60):
            sock, code = connect(server)
            stack.enter_context(closing(sock))
            codes[code] += 1
        assert codes[b"220"] + codes[b"421"] == 60 and 10 <= codes[b"220"] <= 20
        server.said('"event":"shortage"')
        assert server.journal.read_text().count('"event":"shortage"') == 1
        stack.close()

        def is_served() -> bool:
            sock, code = connect(server)
            sock.close()
            return code == b"220"

        wait_until(is_served)
