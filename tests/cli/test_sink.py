"""`penstock sink` from the command line."""

from __future__ import annotations

import json
import mailbox
import smtplib
import ssl
from base64 import b64encode
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
import trustme
from click.testing import CliRunner

from penstock.cli.main import main
from penstock.sequence import mark
from penstock.sink.control import describe_faults
from tests.e2e.running import serving

PLAN = """
[[rule]]
name = "half"
phase = "rcpt"
match.probability = 0.5
reply = "450 4.2.1 Busy"
"""


def test_describe_faults_prints_the_reference() -> None:
    result = CliRunner().invoke(main, ["sink", "--describe-faults"])
    assert result.exit_code == 0
    assert result.output == describe_faults()


def refused(tmp_path: Path, *arguments: str) -> set[str]:
    """Return which of 50 recipients a sink with the plan refuses."""
    file = tmp_path / "plan.toml"
    file.write_text(PLAN)
    with (
        serving(tmp_path / "data", "", "sink", "--faults", str(file), *arguments) as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
    ):
        client.ehlo()
        client.mail("a@example.com")
        recipients = [f"{number}@example.org" for number in range(50)]
        return {recipient for recipient in recipients if client.rcpt(recipient)[0] == 450}


def test_the_seed_determines_the_faults(tmp_path: Path) -> None:
    one, same, other = (refused(tmp_path, "--no-magic", "--seed", seed) for seed in ("1", "1", "2"))
    assert one == same
    assert one != other
    assert 10 < len(one) < 40


@pytest.mark.parametrize(
    ("rule", "why"),
    [
        (
            "phase = 'rcpt'\nreplay = '450'",
            "rule[0].replay: unknown key (did you mean reply?); expected one of: at, delay",
        ),
        (
            "phase = 'rctp'\nreply = '450'",
            "rule[0].phase: unknown value 'rctp' (did you mean rcpt?); expected one of: connect, banner, ehlo",
        ),
    ],
)
def test_a_wrong_plan_prevents_the_start(tmp_path: Path, rule: str, why: str) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(f"[[rule]]\n{rule}")
    result = CliRunner().invoke(main, ["sink", "--faults", str(file)])
    assert result.exit_code == 1
    assert f"plan.toml: {why}" in result.output


def test_the_report_counts_faults(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with serving(tmp_path / "data", "", "sink", "--report", str(report)) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
            client.sendmail("a@example.com", ["b@example.org", "450-4.2.2@example.org"], "Hello")
            with pytest.raises(smtplib.SMTPDataError, match="552"):
                client.sendmail("a@example.com", ["dot-552-5.2.2@example.org"], "Hello")
        assert server.stop() == 0
    told = json.loads(report.read_text())
    assert told["messages"]["accepted"] == 1
    assert {(each["rule"], each["phase"], each["action"]) for each in told["faults"]} == {
        ("magic", "rcpt", "reply 450 4.2.2"),
        ("magic", "dot", "reply 552 5.2.2"),
    }


def test_a_report_on_standard_output_is_the_only_output(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "sink", "--report", "-") as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
            client.sendmail("a@example.com", ["b@example.org"], "Hello")
        assert server.stop() == 0
        assert json.loads(server.out.read_text())["messages"]["accepted"] == 1
        assert "sessions=1 messages=1" in server.journal.read_text()


def test_an_unwritable_report_leaves_other_output_intact(tmp_path: Path) -> None:
    report = tmp_path / "no" / "report.json"
    result = CliRunner().invoke(main, ["sink", "--report", str(report)])
    assert result.exit_code == 2
    assert "cannot be written" in result.output
    report.parent.mkdir()
    with serving(tmp_path / "data", "", "sink", "--report", str(report)) as server:
        report.parent.rmdir()
        assert server.stop() == 1
        assert "sessions=0 messages=0" in server.out.read_text()
        assert "No such file or directory" in server.journal.read_text()


def test_the_fault_log_has_every_fault(tmp_path: Path) -> None:
    """Two runs with the same seed have the same log, with any number of sessions."""
    plan = tmp_path / "plan.toml"
    plan.write_text(PLAN)
    logs = []
    for order in (1, -1):
        log = tmp_path / f"faults{order}.jsonl"
        arguments = ("--faults", str(plan), "--seed", "4", "--fault-log", str(log))
        with serving(tmp_path / "data", "", "sink", *arguments) as server:
            for number in range(1, 31)[::order]:
                with (
                    smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
                    suppress(smtplib.SMTPRecipientsRefused),
                ):
                    client.sendmail(f"{mark('run', number)}@x.example", ["b@example.org"], "Hello")
            assert server.stop() == 0
        logs.append([json.loads(line) for line in log.read_text().splitlines()])
    one, other = ({each["sequence"] for each in log} for log in logs)
    assert one == other
    assert 5 < len(one) < 25
    assert logs[0][0]["rule"] == "half"
    assert logs[0][0]["action"] == "reply 450 4.2.1"


@pytest.mark.parametrize("workers", ["1", "2"])
def test_a_full_disk_below_the_fault_log_costs_no_report(tmp_path: Path, workers: str) -> None:
    report = tmp_path / "report.json"
    options = ("--fault-log", "/dev/full", "--report", str(report), "--workers", workers)
    with serving(tmp_path / "data", "", "sink", *options) as server:
        with (
            smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
            pytest.raises(smtplib.SMTPRecipientsRefused),
        ):
            client.sendmail("a@example.com", "450-4.2.2@example.org", "Hello")
        assert server.stop() == 1
    assert [each["count"] for each in json.loads(report.read_bytes())["faults"]] == [1]
    assert "refusals=1 lost=0 duplicates=0 faults=1" in server.out.read_text()
    assert "Error: --fault-log: No space left on device" in server.journal.read_text()


def test_an_unwritable_fault_log_is_reported(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["sink", "--fault-log", str(tmp_path / "no" / "such" / "folder")])
    assert result.exit_code == 1
    assert "No such file or directory" in result.output


def test_without_magic_all_recipients_are_ordinary(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "data", "", "sink", "--no-magic") as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
    ):
        assert client.sendmail("a@example.com", ["450@example.org", "drop@example.org"], "Hello") == {}


@pytest.mark.parametrize("name", ["alice", ""])
def test_auth_accepts_every_name_in_every_mechanism(tmp_path: Path, name: str) -> None:
    with serving(tmp_path / "data", "", "sink", "--auth", "--config", str(journaling_sink(tmp_path))) as server:
        for mechanism, responses in {
            "PLAIN": [f"\0{name}\0"],
            "LOGIN": [name, "secret"],
            "CRAM-MD5": [f"{name} 0123456789abcdef"],
            "XOAUTH2": [f"user={name}\1auth=Bearer token\1\1"],
            "OAUTHBEARER": [f"n,a={name},\1auth=Bearer token\1\1"],
        }.items():
            with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
                client.ehlo()
                assert mechanism in client.esmtp_features["auth"].split()
                assert client.docmd("AUTH", mechanism)[0] == 334
                replies = [client.docmd(b64encode(text.encode()).decode())[0] for text in responses]
                assert replies == [334] * (len(responses) - 1) + [235]
                assert client.sendmail("a@example.com", ["b@example.org"], "Hello") == {}
        server.stop()
        lines = [json.loads(line) for line in server.journal.read_text().splitlines() if line.startswith("{")]
        found = [(line["mechanism"], line.get("name", "")) for line in lines if line["event"] == "authenticated"]
        assert found == [(each, name) for each in ("PLAIN", "LOGIN", "CRAM-MD5", "XOAUTH2", "OAUTHBEARER")]


def journaling_sink(folder: Path) -> Path:
    """Return a configuration of a sink that journals as JSON."""
    file = folder / "sink.toml"
    file.write_text('journal.format = "json"\n[[listener]]\naddress = "127.0.0.1:0"\n')
    return file


def test_authentication_can_fail(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('[[rule]]\nphase = "auth"\nreply = "535 5.7.8 Wrong"\nmatch.first = 3\n')
    with (
        serving(tmp_path / "data", "", "sink", "--auth", "--faults", str(file)) as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
    ):
        with pytest.raises(smtplib.SMTPAuthenticationError, match="Wrong"):
            client.login("alice", "secret", initial_response_ok=True)  # which tries three mechanisms
        assert client.login("alice", "secret")[0] == 235


def test_only_verifying_clients_notice_certificate_faults(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text('[[rule]]\nphase = "starttls"\ntls = "expired"\n')
    with serving(tmp_path / "data", "", "sink", "--faults", str(file)) as server:
        with smtplib.SMTP("localhost", server.port, timeout=20) as client:
            with pytest.raises(ssl.SSLCertVerificationError):
                client.starttls(context=ssl.create_default_context())
            client.close()
        with smtplib.SMTP("localhost", server.port, timeout=20) as client:
            context = ssl._create_unverified_context()
            client.starttls(context=context)
            client.sendmail("a@example.com", ["b@example.org"], "Hello")


# ---- listeners


def test_clients_can_verify_implicit_tls(tmp_path: Path) -> None:
    ca_file = tmp_path / "ca.pem"
    with serving(tmp_path / "data", "", "sink", "--tls", "implicit", "--ca-file", str(ca_file)) as server:
        context = ssl.create_default_context(cafile=str(ca_file))
        with smtplib.SMTP_SSL("127.0.0.1", server.port, timeout=20, context=context) as client:
            assert client.sendmail("a@example.com", ["b@example.org"], "Hello") == {}


def test_a_given_certificate_is_used(tmp_path: Path) -> None:
    authority = trustme.CA()
    leaf = authority.issue_cert("127.0.0.1")
    chain, key = tmp_path / "chain.pem", tmp_path / "key.pem"
    chain.write_bytes(b"".join(each.bytes() for each in leaf.cert_chain_pems))
    key.write_bytes(leaf.private_key_pem.bytes())
    context = ssl.create_default_context()
    authority.configure_trust(context)
    with (
        serving(tmp_path / "data", "", "sink", "--certificate", str(chain), "--key", str(key)) as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
    ):
        client.starttls(context=context)
        assert client.sendmail("a@example.com", ["b@example.org"], "Hello") == {}


def test_a_sink_without_tls(tmp_path: Path) -> None:
    with (
        serving(tmp_path / "data", "", "sink", "--tls", "none") as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client,
    ):
        client.ehlo()
        assert not client.has_extn("starttls")


CONFIG = """
hostname = "mx.example.org"
domains = ["example.org"]
[[listener]]
address = "127.0.0.1:0"
max_size = 1000
[[listener]]
name = "submissions"
address = "127.0.0.1:0"
tls.mode = "implicit"
[[route]]
next_hop = "smtp://192.0.2.1:25"
[delivery]
kind = "spool"
"""


def test_config_sets_listeners_and_limits(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    with serving(tmp_path / "data", CONFIG, "sink", "--report", str(report)) as server:
        port = int(server.said(r"sink on 127\.0\.0\.1:\d+, 127\.0\.0\.1:(\d+)")[1])
        with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
            assert client.sendmail("a@example.com", ["b@example.org"], "Hello") == {}
            assert client.docmd("MAIL", "FROM:<a@example.com> SIZE=1001")[0] == 552
            client.rset()
            client.mail("a@example.com")
            assert client.rcpt("b@elsewhere.example")[0] == 550
        with smtplib.SMTP_SSL("127.0.0.1", port, timeout=20, context=ssl._create_unverified_context()) as client:
            assert client.sendmail("a@example.com", ["b@example.org"], "Hello") == {}
        assert server.stop() == 0
    assert json.loads(report.read_text())["messages"]["accepted"] == 2


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--key", "key.pem"], "--key requires --certificate"),
        (["--config", "nowhere.toml"], "nowhere.toml"),
        (["--certificate", "nowhere.pem"], "nowhere.pem"),
        (["--ca-file", "nowhere/ca.pem"], "nowhere/ca.pem"),
    ],
)
def test_unusable_files_of_options_are_named(arguments: list[str], told: str) -> None:
    result = CliRunner().invoke(main, ["sink", *arguments])
    assert result.exit_code in (1, 2)
    assert told in result.output


def test_the_fault_log_names_time_session_and_message(tmp_path: Path) -> None:
    plan, log = tmp_path / "plan.toml", tmp_path / "faults.jsonl"
    plan.write_text('[[rule]]\nphase = "dot"\nreply = "450 4.2.1 Busy"\n')
    with serving(tmp_path / "data", "", "sink", "--faults", str(plan), "--fault-log", str(log)) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client, suppress(smtplib.SMTPDataError):
            client.sendmail("a@x.example", ["b@example.org"], "Subject: x\nMessage-ID: <1@x.example>\n\nHello")
        assert server.stop() == 0
    [fault] = [json.loads(line) for line in log.read_text().splitlines()]
    assert (fault["session"], fault["message_id"]) == (1, "<1@x.example>")
    assert datetime.fromisoformat(fault["time"]).tzinfo is not None


def test_the_summary_has_refusals_duplicates_and_faults(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--keep", "last:10", "--report", str(report))
    with serving(tmp_path / "data", "", "sink", *options) as server:
        for recipient in ("b@example.org", "b@example.org", "450-4.2.2@example.org"):
            with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client, suppress(smtplib.SMTPRecipientsRefused):
                client.sendmail("a@x.example", [recipient], "Message-ID: <1@x.example>\n\nHello")
        assert server.stop() == 0
    assert "refusals=1 lost=0 duplicates=1 faults=1" in server.out.read_text()
    found = json.loads(report.read_text())["sequences"]["message_ids"]
    assert (found["distinct"], found["duplicates"], found["duplicate_examples"]) == (1, 1, ["<1@x.example>"])


def test_two_workers_write_one_report(tmp_path: Path) -> None:
    file = tmp_path / "report.json"
    options = ("--workers", "2", "--report", str(file), "--expect", "40", "--json")
    with serving(tmp_path / "data", "", "sink", *options) as server:
        for number in range(1, 41):
            with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
                client.sendmail(f"{mark('run', number)}@example.com", "b@example.org", "Subject: x\r\n\r\nHello")
        server.stop()
    summary = json.loads(server.out.read_text().splitlines()[-1])
    assert (summary["sessions"], summary["messages"], summary["duplicates"]) == (40, 40, 0)
    report = json.loads(file.read_bytes())
    assert report["messages"]["accepted"] == report["sessions"]["ends"]["QUIT"] == 40
    assert report["latencies"]["MAIL"]["histogram"]["count"] == 40
    assert [(run["received"], run["missing"]) for run in report["sequences"]["runs"]] == [(40, 0)]
    assert sum(sample["messages"] for sample in report["samples"]) == 40


def test_two_workers_stop_after_the_messages_of_both(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "sink", "--workers", "2", "--messages", "6") as server:
        for _ in range(6):
            with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
                client.sendmail("a@example.com", "b@example.org", "Subject: x\r\n\r\nHello")
        assert server.process.wait(60) == 0


def test_two_workers_keep_mail_and_inject_faults(tmp_path: Path) -> None:
    plan, log, mbox, lines = (tmp_path / name for name in ("plan.toml", "log.jsonl", "mbox", "kept.jsonl"))
    plan.write_text("""[[rule]]\nphase = "dot"\nmatch = { sender = ["bad*"] }\nreply = "451 4.3.0 Later"\n""")
    report = tmp_path / "report.json"
    options = ("--workers", "2", "--faults", str(plan), "--fault-log", str(log), "--report", str(report))
    stores = ("--keep", f"mbox:{mbox}", "--keep", f"jsonl:{lines}", "--keep", f"maildir:{tmp_path / 'kept'}")
    with serving(tmp_path / "data", "", "sink", *options, *stores) as server:
        for number in range(40):
            sender = f"{'bad' if number % 4 == 0 else 'good'}{number}@example.com"
            with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client, suppress(smtplib.SMTPDataError):
                client.sendmail(sender, "b@example.org", f"Subject: {number}\r\n\r\nHello")
        assert server.stop() == 0
    kept = {f"good{number}@example.com" for number in range(40) if number % 4}
    assert {json.loads(line)["sender"] for line in lines.read_bytes().splitlines()} == kept
    with closing(mailbox.mbox(mbox)) as found:
        assert len(found) == len(list((tmp_path / "kept" / "new").iterdir())) == len(kept) == 30
    assert len([json.loads(line) for line in log.read_bytes().splitlines()]) == 10
    assert [each["count"] for each in json.loads(report.read_bytes())["faults"]] == [10]


@pytest.mark.parametrize("condition", ["match.first = 1", "match.attempts = 1", "mailbox = { messages = 1 }"])
def test_rules_that_count_are_refused_with_workers(tmp_path: Path, condition: str) -> None:
    plan = tmp_path / "plan.toml"
    plan.write_text(f'[[rule]]\nphase = "rcpt"\nreply = "450"\n{condition}\n')
    result = CliRunner().invoke(main, ["sink", "--workers", "2", "--faults", str(plan)])
    assert result.exit_code == 2
    assert f"rule[0].{condition.partition(' ')[0]} cannot be combined with --workers" in result.output


def test_two_workers_have_one_page(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--workers", "2", "--web", "127.0.0.1:0", "--keep", "last:30", "--report", str(report))
    plan = '[[rule]]\nname = "full"\nphase = "rcpt"\nreply = "452 4.2.2 Full"\n'
    with serving(tmp_path / "data", "", "sink", *options) as server:
        url = server.said(r"live page at (http://\S+/)")[1]
        with httpx.Client(base_url=url, timeout=20) as api:

            def send(count: int) -> None:
                for number in range(count):
                    with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
                        client.sendmail("a@x.example", "b@example.org", f"Message-ID: <{number % 20}@x>\r\n\r\nHello")

            def wait(is_so: Callable[[dict[str, Any]], bool]) -> None:
                with api.stream("GET", "/api/events") as events:
                    found = (json.loads(line[5:]) for line in events.iter_lines() if line.startswith("data:"))
                    assert any(map(is_so, found))

            send(40)
            wait(lambda live: live["report"]["messages"]["accepted"] == 40)
            live = api.get("/api/live").json()
            assert (live["kept"], live["report"]["sessions"]["total"]) == (30, 40)
            assert live["report"]["sequences"]["message_ids"]["duplicates"] == 20
            found = api.get("/api/messages?q=hello&limit=100").json()["messages"]
            assert len(found) == 30
            assert api.delete(f"/api/messages/{found[0]['id']}").json() == {"deleted": 1}
            counting = plan.replace('reply = "452 4.2.2 Full"', "match.first = 1\nreply = '450'")
            assert "each process counts separately" in api.put("/api/plan", content=counting).json()["error"]
            failing = api.post("/api/fail-next", json={"phase": "rcpt", "reply": "450"})
            assert (failing.status_code, "each process counts separately" in failing.text) == (400, True)
            assert api.post("/api/receipts/reset").json() == {"generation": 1}
            assert api.put("/api/plan", content=plan).json() == {"plan": "in force"}
            assert api.get("/api/plan").text == plan
            for _ in range(10):
                with pytest.raises(smtplib.SMTPRecipientsRefused):
                    send(1)
            wait(lambda live: [(each["rule"], each["count"]) for each in live["faults"]] == [("full", 10)])
        assert server.stop() == 0
    counts = json.loads(report.read_bytes())
    assert (counts["messages"]["accepted"], counts["sessions"]["total"]) == (0, 10)
    assert [each["count"] for each in counts["faults"]] == [10]


def test_two_workers_find_duplicates_by_message_id(tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    options = ("--workers", "2", "--keep", f"mbox:{tmp_path / 'mbox'}", "--report", str(report))
    with serving(tmp_path / "data", "", "sink", *options) as server:
        for number in range(20):
            with smtplib.SMTP("127.0.0.1", server.port, timeout=20) as client:
                client.sendmail("a@x.example", "b@example.org", f"Message-ID: <{number % 5}@x>\r\n\r\nHello")
        assert server.stop() == 0
    found = json.loads(report.read_bytes())["sequences"]["message_ids"]
    assert (found["distinct"], found["duplicates"], found["missing_id"]) == (5, 15, 0)
    assert "duplicates=15" in server.out.read_text()
