"""Real senders and fault plans: Postfix retries and delivers, swaks and smtplib report the faults."""

from __future__ import annotations

import json
import smtplib
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.running import ENVIRONMENT, Server, serving
from tests.e2e.test_postfix import postfix
from tests.tagged import marked, send_marked

IMPATIENT = """
queue_run_delay = 1s
minimal_backoff_time = 3s
maximal_backoff_time = 3s
transport_retry_time = 1s
"""
HARD_TIMES = """
seed = 3
[[rule]]
name = "outage"
phase = "connect"
outage = { down = 2, every = 1000 }
end = "reset"

[[rule]]
name = "closing"
phase = "mail"
match = { every = 3, attempts = 1 }
reply = "421 4.3.2 Closing, come back later"

[[rule]]
name = "greylist"
phase = "rcpt"
greylist = { wait = 1 }

[[rule]]
name = "busy"
phase = "dot"
match = { every = 2, attempts = 1 }
reply = "452 4.3.1 Full, come back later"
"""
MESSAGES = 6


def sink(tmp_path: Path, plan: str, *arguments: str) -> Any:
    """Run a sink with a plan and write its report to report.json."""
    (tmp_path / "plan.toml").write_text(plan)
    more = ("--faults", str(tmp_path / "plan.toml"), "--report", str(tmp_path / "report.json"), *arguments)
    return serving(tmp_path / "data", "", "sink", *more)


def receipts(tmp_path: Path) -> dict[str, Any]:
    report: dict[str, Any] = json.loads((tmp_path / "report.json").read_text())
    return report


def faults(report: dict[str, Any]) -> dict[str, int]:
    return {f"{each['rule']}: {each['action']}": each["count"] for each in report["faults"]}


def test_postfix_delivers_once_after_outages_and_refusals(tmp_path: Path) -> None:
    expected = ("--messages", str(MESSAGES), "--expect", str(MESSAGES))
    with sink(tmp_path, HARD_TIMES, *expected) as server, postfix(server, tls=False, settings=IMPATIENT) as port:
        send_marked(port, [marked("postfix", number) for number in range(1, MESSAGES + 1)])
        assert server.process.wait(timeout=90) == 0  # none is missing or duplicated
    report = receipts(tmp_path)
    assert report["messages"]["accepted"] == MESSAGES
    (run,) = report["sequences"]["runs"]
    assert (run["distinct"], run["missing"], run["duplicates"]) == (MESSAGES, 0, 0)
    met = faults(report)
    assert met["outage: reset"] >= 1
    assert met["closing: reply 421 4.3.2"] == 2  # 3 and 6
    assert met["greylist: reply 451 4.7.1"] >= MESSAGES
    assert met["busy: reply 452 4.3.1"] == 3  # 2, 4 and 6
    refused = {(each["phase"], each["code"]): each["count"] for each in report["replies"] if each["code"] >= 400}
    assert refused["MAIL", 421] == 2
    assert refused["message", 452] == 3


def test_postfix_resends_unanswered_messages(tmp_path: Path) -> None:
    # RFC 1047: the sink has the message, its client does not know; the report finds it by its number.
    plan = '[[rule]]\nname = "lost"\nphase = "dot"\nmatch.attempts = 1\nend = "reset"\nkeeps = true\n'
    with sink(tmp_path, plan, "--messages", "2") as server, postfix(server, tls=False, settings=IMPATIENT) as port:
        send_marked(port, [marked("twice", 1)])
        assert server.process.wait(timeout=90) == 0
    report = receipts(tmp_path)
    assert faults(report) == {"lost: reset": 1}
    assert (report["messages"]["accepted"], report["messages"]["unheard"]) == (1, 1)
    (run,) = report["sequences"]["runs"]
    assert (run["distinct"], run["duplicates"]) == (1, 1)


def test_postfix_bounces_for_a_magic_recipient(tmp_path: Path) -> None:
    with sink(tmp_path, "", "--messages", "1") as server, postfix(server, tls=False, settings=IMPATIENT) as port:
        with smtplib.SMTP("127.0.0.1", port, timeout=60) as client:
            client.sendmail("alice@example.com", ["550-5.1.1@example.org"], "Hello")
        assert server.process.wait(timeout=90) == 0  # the bounce arrived through the same relay
    report = receipts(tmp_path)
    assert faults(report) == {"magic: reply 550 5.1.1": 1}
    assert report["messages"]["accepted"] == 1


def swaks(server: Server, recipient: str, *arguments: str) -> tuple[int, str]:
    command = ["swaks", "--server", server.address, "--from", "a@example.com", "--to", recipient, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)
    return done.returncode, done.stdout + done.stderr


def test_swaks_receives_the_requested_faults(tmp_path: Path) -> None:
    with sink(tmp_path, "") as server:
        for recipient, said in (
            ("450-4.2.2@example.org", "<** 450 4.2.2 "),
            ("dot-451@example.org", "<** 451 4.0.0 "),
            ("data-552-5.3.4@example.org", "<** 552 5.3.4 "),
            ("drop@example.org", "Remote host closed connection unexpectedly"),
            ("dot-reset@example.org", "***"),
        ):
            code, output = swaks(server, recipient)
            assert code != 0
            assert said in output
        code, output = swaks(server, "bob@example.org")
        assert code == 0, output


def test_swaks_refuses_an_expired_certificate(tmp_path: Path) -> None:
    with sink(tmp_path, '[[rule]]\nphase = "starttls"\ntls = "expired"\n') as server:
        code, output = swaks(server, "bob@example.org", "-tls", "--tls-verify")
        assert code != 0
        assert "certificate" in output
        code, output = swaks(server, "bob@example.org", "-tls")
        assert code == 0, output


MISBEHAVIOUR = """
[[rule]]
phase = "mail"
match.sender = ["garbage@*"]
dress = "garbage"
[[rule]]
phase = "mail"
match.sender = ["long@*"]
dress = "too-long"
[[rule]]
phase = "mail"
match.sender = ["lines@*"]
dress = "many-lines"
[[rule]]
phase = "mail"
match.sender = ["latin@*"]
dress = "non-ascii"
[[rule]]
phase = "data"
match.sender = ["drop@*"]
end = "drop"
[[rule]]
phase = "data"
match.sender = ["reset@*"]
end = "reset"
[[rule]]
phase = "ehlo"
match.hello = ["split"]
split = true
"""


def test_smtplib_survives_every_fault(tmp_path: Path) -> None:
    def send(sender: str, hello: str = "client") -> dict[str, Any]:
        with smtplib.SMTP("127.0.0.1", server.port, hello, timeout=20) as client:
            return client.sendmail(f"{sender}@example.com", ["bob@example.org"], "Hello")

    with sink(tmp_path, MISBEHAVIOUR) as server:
        assert send("alice") == {}
        assert send("alice", "split") == {}
        assert send("latin") == {}
        assert send("long") == {}
        assert send("lines") == {}
        with pytest.raises(smtplib.SMTPException):
            send("garbage")
        with pytest.raises(smtplib.SMTPServerDisconnected):
            send("drop")
        with pytest.raises((smtplib.SMTPServerDisconnected, ConnectionResetError)):
            send("reset")
        assert server.stop() == 0
    assert receipts(tmp_path)["messages"]["accepted"] == 5
