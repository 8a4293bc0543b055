"""Haraka as a sender, with fault plans: it retries, and the statistics explain each message."""

from __future__ import annotations

import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.other_servers import haraka

from tests.e2e.running import ENVIRONMENT, Server
from tests.e2e.test_postfix import wait_for
from tests.e2e.test_sink_faults import faults, receipts, sink
from tests.ports import free_port
from tests.tagged import marked, send_marked

MESSAGES = 6
RELAY = """
exports.hook_connect = function (next, connection) { connection.relaying = true; next(); };
exports.hook_rcpt = function (next) { next(OK); };
exports.hook_deferred = function (next) { next(DENYSOFT, '1'); };  // retry after a second, not a minute
exports.hook_get_mx = function (next) { next(OK, {priority: 0, exchange: '127.0.0.1', port: PORT}); };
"""
OUTBOUND = "enable_tls={tls}\nlocal_mx_ok=true\n"
FAULTS = """
seed = 3
[[rule]]
name = "closing"
phase = "mail"
match = { every = 3, attempts = 1 }
reply = "421 4.3.2 Closing, come back later"

[[rule]]
name = "busy"
phase = "rcpt"
match = { every = 2, attempts = 1 }
reply = "450 4.2.1 Mailbox busy"

[[rule]]
name = "cut"
phase = "dot"
match = { sequence = [5, 5], attempts = 1 }
end = "drop"
"""


@contextmanager
def relaying(next_hop: Server, *, tls: bool) -> Iterator[int]:
    """Run a Haraka that relays everything to a server; yield its port."""
    port = free_port()
    with tempfile.TemporaryDirectory(prefix="penstock-haraka-") as name:
        folder = Path(name)
        (folder / "queue").mkdir()
        command = haraka(
            port,
            folder,
            plugins={"relay": RELAY.replace("PORT", str(next_hop.port))},
            settings={"outbound.ini": OUTBOUND.format(tls=str(tls).lower())},
        )
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=ENVIRONMENT)
        try:
            wait_for(port)
            yield port
        except BaseException:
            print((folder / "log").read_text(errors="replace")[-4000:])  # noqa: T201 - pytest shows it
            raise
        finally:
            process.terminate()
            process.wait(timeout=60)


def test_haraka_retries_and_delivers_each_message_once(tmp_path: Path) -> None:
    expected = ("--messages", str(MESSAGES), "--expect", str(MESSAGES))
    with sink(tmp_path, FAULTS, *expected) as server, relaying(server, tls=False) as port:
        send_marked(port, [marked("haraka", number) for number in range(1, MESSAGES + 1)])
        assert server.process.wait(timeout=90) == 0  # nothing is missing or came twice
    report = receipts(tmp_path)
    assert report["messages"]["accepted"] == MESSAGES
    (run,) = report["sequences"]["runs"]
    assert (run["distinct"], run["missing"], run["duplicates"]) == (MESSAGES, 0, 0)
    assert faults(report) == {
        "closing: reply 421 4.3.2": 2,  # 3 and 6
        "busy: reply 450 4.2.1": 3,  # 2, 4 and 6
        "cut: drop": 1,
    }


def test_haraka_delivers_over_starttls_once_it_is_offered(tmp_path: Path) -> None:
    plan = '[[rule]]\nphase = "starttls"\nmatch.first = 1\ntls = "refuse"\n'
    with sink(tmp_path, plan, "--messages", "2") as server, relaying(server, tls=True) as port:
        send_marked(port, [marked("tls", number) for number in (1, 2)])
        assert server.process.wait(timeout=90) == 0
    report = receipts(tmp_path)
    assert report["messages"]["accepted"] == 2
    assert report["sessions"]["tls"] >= 1
