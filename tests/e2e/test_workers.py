"""`penstock serve --workers`: a server of several processes, from outside."""

from __future__ import annotations

import json
import os
import re
import signal
import smtplib
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

from tests.e2e.running import ENVIRONMENT, Server, serving

DEAD = """
[[listener]]
address = "127.0.0.1:0"
[[route]]
next_hop = "smtp://127.0.0.1:9"
"""
ALIVE = """
[[listener]]
address = "127.0.0.1:0"
"""


def send(server: Server, count: int) -> None:
    """Send so many messages, each on a connection of its own."""
    for number in range(count):
        with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
            client.sendmail("a@example.com", [f"b{number}@example.org"], f"Subject: {number}\r\n\r\nHello")


def workers_of(server: Server) -> dict[int, int]:
    """Return the process ids of the workers, by their number, as the system knows them."""
    tasks = Path(f"/proc/{server.process.pid}/task").glob("*/children")  # a thread has started them
    children = [pid for task in tasks for pid in task.read_text().split()]
    told = ((int(pid), Path(f"/proc/{pid}/cmdline").read_text()) for pid in children)
    return {int(found[1]): pid for pid, words in told if (found := re.search(r'"index":(\d+)', words))}


def events(server: Server, name: str) -> list[dict[str, Any]]:
    lines = server.journal.read_text().splitlines()
    records = [json.loads(line) for line in lines if line.startswith("{")]
    return [record for record in records if record["event"] == name]


def spool(folder: Path, *words: str) -> str:
    command = [sys.executable, "-m", "penstock", "spool", *words, "--data", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=True, env=ENVIRONMENT, timeout=60).stdout


def wait_for_empty_spool(server: Server) -> None:
    """Wait until every delivery is recorded; fail after a minute."""
    deadline = time.monotonic() + 60
    while json.loads(spool(server.folder, "stats", "--json"))["messages"]:
        assert time.monotonic() < deadline, "mail stays in the spool"


def wait_for_recovered(server: Server, count: int) -> None:
    """Wait until the journal says that workers have opened their spools `count` times."""
    deadline = time.monotonic() + 60
    while len(events(server, "recovered")) < count:
        assert time.monotonic() < deadline, "the worker was not started again"
        time.sleep(0.02)


def test_all_workers_take_mail_and_deliver_it(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "serve", "--workers", "3") as server:
        assert sorted(workers_of(server)) == [0, 1, 2]
        send(server, 60)
        assert len(server.messages(60)) == 60
        assert server.stop() == 0
    sessions = [record["session"] for record in events(server, "accepted")]
    assert {session // 10**12 for session in sessions} == {0, 1, 2}
    assert len(set(sessions)) == 60
    assert json.loads(spool(server.folder, "stats", "--json"))["messages"] == 0


def test_a_killed_worker_is_started_again_and_nothing_is_lost(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "serve", "--workers", "2") as server:
        send(server, 20)
        # What a worker has delivered but not yet recorded, it delivers again after a kill: wait for the records.
        wait_for_empty_spool(server)
        before = workers_of(server)
        os.kill(before[1], signal.SIGKILL)
        server.said("worker 1 was ended by SIGKILL, and is started again")
        send(server, 20)
        assert len(server.messages(40)) == 40
        after = workers_of(server)
        assert after[0] == before[0]
        assert after[1] != before[1]
        assert server.stop() == 0


def test_a_kill_repeats_only_what_was_being_delivered(tmp_path: Path) -> None:
    toml = '[journal]\nformat = "json"\nevents = "all"\n[[listener]]\naddress = "127.0.0.1:0"\n'
    with serving(tmp_path / "data", toml, "serve", "--workers", "2") as server:
        wait_for_recovered(server, 2)  # a line of the journal is lost with a worker that is killed before it is written
        for kills in (1, 2):
            send(server, 20)
            os.kill(workers_of(server)[1], signal.SIGKILL)  # at once: some deliveries are not recorded yet
            wait_for_recovered(server, 2 + kills)
        wait_for_empty_spool(server)
        interrupted = sum(event["interrupted"] for event in events(server, "recovered"))
        files = [path.name for path in (server.folder / "maildir" / "new").iterdir()]
        copies = Counter(match[1] for name in files if (match := re.search(r"I([0-9A-Z]{20})\.", name)))
        assert sum(copies.values()) == len(files)
        assert len(copies) == 40, "a message was lost"
        assert set(copies) >= {event["id"] for event in events(server, "accepted")}
        assert len(files) - 40 <= interrupted
        assert server.stop() == 0


def test_fewer_workers_deliver_what_more_have_left(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    with serving(folder, DEAD, "serve", "--workers", "3") as server:
        send(server, 30)
        server.stop()
    left = json.loads(spool(folder, "list", "--json"))
    assert len(left) == 30
    assert [each["received_at"] for each in left] == sorted(each["received_at"] for each in left)
    assert "the spool is consistent: 30 messages" in spool(folder, "check")
    one = left[17]["id"]
    assert one in spool(folder, "show", one)
    assert spool(folder, "drop", one, "--yes") == "1 recipient dropped\n"
    assert spool(folder, "retry", "--all") == "29 recipients due now\n"
    with serving(folder, ALIVE, "serve", "--workers", "1") as server:
        assert len(server.messages(29)) == 29
        assert server.stop() == 0
    with serving(folder, ALIVE) as server:  # nothing is left: one process again
        assert workers_of(server) == {}


def test_workers_end_with_a_supervisor_that_was_killed(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "serve", "--workers", "2") as server:
        pids = workers_of(server).values()
        server.process.kill()
        deadline = time.monotonic() + 60
        while any(Path(f"/proc/{pid}/stat").exists() for pid in pids):
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_second_server_reports_that_the_address_is_in_use(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "serve", "--workers", "2") as server:
        command = [sys.executable, "-m", "penstock", "serve", "--workers", "2", "--listen", server.address]
        command += ["--data", str(tmp_path / "other")]
        found = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=60)
        assert found.returncode == 1
        assert "Address already in use" in found.stderr


def test_a_worker_that_cannot_start_ends_the_server(tmp_path: Path) -> None:
    (tmp_path / "spool-1").write_text("in the way")
    command = [sys.executable, "-m", "penstock", "serve", "--workers", "2", "--listen", "127.0.0.1:0"]
    command += ["--data", str(tmp_path)]
    found = subprocess.run(command, capture_output=True, text=True, check=False, env=ENVIRONMENT, timeout=60)
    assert found.returncode == 1
    assert "worker 1 ended with code 1 before it was ready" in found.stderr


def test_workers_share_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "lmtp"
    toml = f'[[listener]]\nkind = "lmtp"\naddress = "unix:{path}"\n'
    with serving(tmp_path / "data", toml, "serve", "--workers", "2") as server:
        for number in range(10):
            with smtplib.LMTP(str(path)) as client:
                client.sendmail("a@example.com", [f"b{number}@example.org"], "Hello")
        assert len(server.messages(10)) == 10
        assert server.stop() == 0
    assert not path.exists()
