"""Mail through a gateway: a client, Penstock with its spool and its relay, and a next hop that is a real server."""

from __future__ import annotations

import email
import email.policy
import smtplib
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import EmailMessage, Message
from pathlib import Path
from typing import cast

import pytest

from tests.e2e.running import ENVIRONMENT, Server, body_of, digest, hard_bodies, serving
from tests.e2e.test_python_clients import add_user
from tests.ports import free_port

GATEWAY = """
hostname = "localhost"
[[listener]]
address = "127.0.0.1:0"
max_size = 0
{more}
"""
LAST = """
hostname = "localhost"
{top}
[delivery]
kind = "maildir"
[[listener]]
address = "127.0.0.1:0"
max_size = 0
{listener}
"""
RETRIES = "[relay.retry]\nschedule = [1]\n"


@contextmanager
def last_hop(folder: Path, *, top: str = "", listener: str = "") -> Iterator[Server]:
    """Run the server at the end, which delivers into its Maildir."""
    with serving(folder / "last", LAST.format(top=top, listener=listener)) as server:
        yield server


@contextmanager
def gateway(folder: Path, more: str) -> Iterator[Server]:
    with serving(folder / "gateway", GATEWAY.format(more=more)) as server:
        yield server


def route_to(server: Server, more: str = "") -> str:
    return f'[[route]]\nnext_hop = "smtp://{server.address}"\n{more}\n'


def send(server: Server, body: bytes, *, sender: str = "a@example.com", to: str = "b@example.org") -> None:
    with smtplib.SMTP("127.0.0.1", server.port, timeout=120) as client:
        client.sendmail(sender, [to], b"Subject: test\r\n\r\n" + body, ["BODY=8BITMIME"])


def eventually(condition: Callable[[], object], server: Server) -> None:
    """Wait until something is so, for a minute at most."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, server.journal.read_text()[-3000:]
        time.sleep(0.02)


def waiting(server: Server) -> str:
    """Return what `penstock spool` lists."""
    command = ["-m", "penstock", "spool", "list", "--data", str(server.folder)]
    done = subprocess.run(
        [server.python, *command], capture_output=True, text=True, env=ENVIRONMENT, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


# ---- octet for octet


@pytest.mark.parametrize(
    "listener",
    ["", "extensions.chunking = false", "extensions = { chunking = false, pipelining = false }"],
    ids=["BDAT", "DATA", "step by step"],
)
def test_hard_bodies_arrive_byte_for_byte(tmp_path: Path, listener: str) -> None:
    bodies = hard_bodies()
    with last_hop(tmp_path, listener=listener) as last, gateway(tmp_path, route_to(last)) as server:
        for body in bodies.values():
            send(server, body)
        received = last.messages(len(bodies))
        assert sorted(digest(body_of(m)) for m in received) == sorted(map(digest, bodies.values()))
        assert all(message.count(b"\r\nReceived: ") == 2 for message in received)


def test_a_message_of_100_megabytes_passes(tmp_path: Path) -> None:
    line = b"." + b"x" * 76 + b"\r\n"
    body = line * (100_000_000 // len(line))
    with last_hop(tmp_path) as last, gateway(tmp_path, route_to(last)) as server:
        send(server, body)
        (received,) = last.messages(1)
        assert digest(body_of(received)) == digest(body)
        eventually(lambda: [p for p in (server.folder / "spool" / "bodies").rglob("*") if p.is_file()] == [], server)


def test_bdat_and_binary_pass(tmp_path: Path) -> None:
    body = bytes(range(256)) * 300 + b"\r\n.\r\n no line end"
    accept = 'wire = { bare_lf = "accept", bare_cr = "accept", nul = "accept", long_line = "accept" }'
    with (
        last_hop(tmp_path, listener=accept) as last,
        gateway(tmp_path, route_to(last)) as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client,
    ):
        client.ehlo()
        client.mail("a@example.com", ["BODY=BINARYMIME"])
        client.rcpt("b@example.org")
        text = b"Subject: binary\r\n\r\n" + body
        for start in range(0, len(text), 997):
            piece = text[start : start + 997]
            end = b" LAST" if start + 997 >= len(text) else b""
            client.send(b"BDAT %d%b\r\n%b" % (len(piece), end, piece))
            assert client.getreply()[0] == 250
        (received,) = last.messages(1)
        assert digest(body_of(received)) == digest(body)


def test_addresses_and_headers_in_unicode_pass(tmp_path: Path) -> None:
    with last_hop(tmp_path) as last, gateway(tmp_path, route_to(last)) as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
            client.ehlo()
            client.command_encoding = "utf-8"
            client.mail("grüße@bücher.example", ["SMTPUTF8", "BODY=8BITMIME"])
            assert client.rcpt("李@例子.example")[0] == 250
            client.data("Subject: Grüße\r\n\r\n你好\r\n".encode())
        (received,) = last.messages(1)
        assert "Return-Path: <grüße@bücher.example>\r\nDelivered-To: 李@例子.example\r\n".encode() in received
        assert "Subject: Grüße\r\n\r\n你好\r\n".encode() in received
        assert b"with UTF8SMTP id" in received


def test_smtp_sink_gets_what_was_sent(tmp_path: Path) -> None:
    bodies = {name: body for name, body in hard_bodies().items() if name != "from lines"}
    port = free_port()
    folder = tmp_path / "dumps"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    command = ["smtp-sink", "-u", "root", "-d", f"{folder}/%s.", f"127.0.0.1:{port}", "100"]
    sink = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        with gateway(tmp_path, f'{RETRIES}[[route]]\nnext_hop = "smtp://127.0.0.1:{port}"\n') as server:
            for body in bodies.values():
                send(server, body)
            eventually(lambda: server.journal.read_text().count('"delivered"') == len(bodies), server)
        dumped = [path.read_bytes().replace(b"\r\n", b"\n") for path in folder.iterdir()]
        assert len(dumped) == len(bodies)
        found = sorted(digest(dump.partition(b"Subject: test\n\n")[2].rstrip(b"\n")) for dump in dumped)
        assert found == sorted(digest(body.replace(b"\r\n", b"\n").rstrip(b"\n")) for body in bodies.values())
    finally:
        sink.terminate()
        sink.wait()


def test_lmtp_over_a_unix_socket_is_a_next_hop(tmp_path: Path) -> None:
    path = tmp_path / "lmtp"
    listener = f'[[listener]]\naddress = "unix:{path}"\nkind = "lmtp"\n'
    route = f'[[route]]\nnext_hop = "lmtp+unix://{path}"\n'
    with last_hop(tmp_path, listener=listener) as last, gateway(tmp_path, route) as server:
        send(server, b"hello\r\n")
        (received,) = last.messages(1)
        assert b"with LMTP id" in received or b"with LMTPS id" in received


def test_a_smart_host_is_verified_and_gets_our_credentials(tmp_path: Path) -> None:
    folder = tmp_path / "last"
    folder.mkdir()
    add_user(folder, "relay", "secret")
    with last_hop(tmp_path, listener="auth = { required = true }") as last:
        (tmp_path / "gateway").mkdir()
        (tmp_path / "gateway" / "password").write_text("secret\n")
        more = f"""
[[route]]
next_hop = "smtp://localhost:{last.port}"
tls = {{ mode = "verify", ca_file = "{last.ca_file}" }}
auth = {{ user = "relay", password_file = "password" }}
"""
        with gateway(tmp_path, more) as server:
            send(server, b"hello\r\n")
            (received,) = last.messages(1)
            assert b"with ESMTPSA id" in received


# ---- what cannot be delivered


def report_of(message: bytes) -> dict[str, str]:
    """Return the fields of the only recipient of a report."""
    parsed = email.message_from_bytes(message, policy=email.policy.default)
    assert parsed.get_content_type() == "multipart/report"
    assert parsed.get_param("report-type") == "delivery-status"
    text, status, returned = (cast(EmailMessage, part) for part in parsed.iter_parts())
    assert text.get_content_type() == "text/plain"
    assert returned.get_content_type() in ("message/rfc822", "text/rfc822-headers")
    of_message, of_recipient = cast(list[Message], status.get_payload())
    assert of_message["Reporting-MTA"] == "dns; localhost"
    return dict(of_recipient.items())


def test_a_refused_recipient_comes_back_as_a_report(tmp_path: Path) -> None:
    with last_hop(tmp_path, top='domains = ["example.com"]') as last, gateway(tmp_path, route_to(last)) as server:
        send(server, "Grüße\r\n".encode(), to="nobody@refused.example")
        (received,) = last.messages(1)
        assert received.startswith(b"Return-Path: <>\r\nDelivered-To: a@example.com\r\n")
        fields = report_of(received)
        assert fields["Final-Recipient"] == "rfc822; nobody@refused.example"
        assert fields["Action"] == "failed"
        assert fields["Status"].startswith("5.7.")
        assert fields["Remote-MTA"] == "dns; 127.0.0.1"
        assert fields["Diagnostic-Code"].startswith("smtp; 55")
        assert "Grüße".encode() in received
        eventually(lambda: "nobody" not in waiting(server), server)


def test_what_stays_undelivered_is_reported_as_late_and_then_returned(tmp_path: Path) -> None:
    with last_hop(tmp_path) as last:
        dead = free_port()
        more = f"""
[relay.retry]
schedule = [1]
expire_after = 4
delay_notice_after = 1
[[route]]
domains = ["dead.example"]
next_hop = "smtp://127.0.0.1:{dead}"
limits = {{ breaker_failures = 1000 }}
{route_to(last)}"""
        with gateway(tmp_path, more) as server:
            send(server, b"hello\r\n", to="bob@dead.example")
            reports = sorted((report_of(m) for m in last.messages(2)), key=lambda fields: fields["Action"])
        assert [(fields["Action"], fields["Status"]) for fields in reports] == [
            ("delayed", "4.4.1"), ("failed", "4.4.7"),
        ]  # fmt: skip
        assert "refused" in reports[1]["Diagnostic-Code"].lower()


def test_queued_mail_survives_a_restart_and_is_delivered_later(tmp_path: Path) -> None:
    with last_hop(tmp_path) as last:
        port = last.port
        assert last.stop() == 0
    retry = f'{RETRIES}[[route]]\nnext_hop = "smtp://127.0.0.1:{port}"\n[route.limits]\nbreaker_pause = 0.5\n'
    with gateway(tmp_path, retry) as server:
        for n in range(20):
            send(server, b"hello\r\n", to=f"bob@d{n % 3}.example")
        eventually(lambda: server.journal.read_text().count('"deferred"') >= 3, server)
        assert server.stop() == 0
    with gateway(tmp_path, retry) as server:
        eventually(lambda: '"messages":20' in server.journal.read_text(), server)
        toml = LAST.format(top="", listener="").replace("127.0.0.1:0", f"127.0.0.1:{port}")
        with serving(tmp_path / "again", toml) as last:
            assert len(last.messages(20)) == 20
            eventually(lambda: "bob" not in waiting(server), server)


def test_a_dead_hop_with_many_messages_delays_no_other_mail(tmp_path: Path) -> None:
    with last_hop(tmp_path) as last:
        dead = free_port()
        more = f"""
[[route]]
domains = ["dead.example"]
next_hop = "smtp://127.0.0.1:{dead}"
{route_to(last)}"""
        with gateway(tmp_path, more) as server:
            source = ["smtp-source", "-d", "-s", "20", "-l", "1000", "-f", "a@example.com"]
            for count, domain in ((2000, "dead.example"), (300, "live.example")):
                command = [*source, "-m", str(count), "-t", f"b@{domain}", server.address]
                subprocess.run(command, check=True, env=ENVIRONMENT, timeout=120, capture_output=True)
            assert len(last.messages(300)) == 300
            journal = server.journal.read_text()
            assert '"hop-down"' in journal


# ---- while the client waits


def test_mail_for_a_mailbox_is_written_at_once_or_spooled(tmp_path: Path) -> None:
    with gateway(tmp_path, RETRIES) as server:
        maildir = server.folder / "maildir"

        def data(line: bytes) -> bytes:
            with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
                client.ehlo()
                client.mail("a@example.com")
                client.rcpt("b@example.org")
                code, text = client.data(b"Subject: x\r\n\r\n" + line)
            assert code == 250
            return text

        assert b"delivered as" in data(b"one\r\n")
        assert [file.read_bytes().endswith(b"one\r\n") for file in (maildir / "new").iterdir()] == [True]
        maildir.rename(maildir.with_name("moved"))
        maildir.write_bytes(b"a file where the folder should be")
        assert b"spooled as" in data(b"two\r\n")
        maildir.unlink()
        eventually(lambda: [*maildir.glob("new/*")], server)
        assert [file.read_bytes().endswith(b"two\r\n") for file in (maildir / "new").iterdir()] == [True]
        assert b"delivered as" in data(b"three\r\n")


def test_a_message_is_passed_on_with_the_reply_of_the_hop(tmp_path: Path) -> None:
    with last_hop(tmp_path) as last, gateway(tmp_path, f'[delivery]\nkind = "passthrough"\n{route_to(last)}') as server:
        bodies = hard_bodies()
        with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
            for body in bodies.values():
                client.ehlo_or_helo_if_needed()
                client.mail("a@example.com", ["BODY=8BITMIME"])
                client.rcpt("b@example.org")
                code, text = client.data(b"Subject: x\r\n\r\n" + body)
                assert code == 250
                assert b"delivered as" in text  # the words of the last hop
        received = last.messages(len(bodies))
        assert sorted(digest(body_of(m)) for m in received) == sorted(map(digest, bodies.values()))


def test_a_message_that_cannot_be_passed_on_is_spooled(tmp_path: Path) -> None:
    port = free_port()
    more = f'[delivery]\nkind = "passthrough"\n{RETRIES}[[route]]\nnext_hop = "smtp://127.0.0.1:{port}"\n'
    with gateway(tmp_path, more + "[route.limits]\nbreaker_pause = 0.5\n") as server:
        with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
            client.ehlo()
            client.mail("a@example.com")
            client.rcpt("b@example.org")
            code, text = client.data(b"Subject: x\r\n\r\nhello\r\n")
            assert (code, b"spooled as" in text) == (250, True)
        toml = LAST.format(top="", listener="").replace("127.0.0.1:0", f"127.0.0.1:{port}")
        with serving(tmp_path / "last", toml) as last:
            assert len(last.messages(1)) == 1


def test_a_recipient_unknown_to_the_next_hop_is_refused_at_rcpt(tmp_path: Path) -> None:
    (tmp_path / "last").mkdir()
    (tmp_path / "last" / "known").write_text("bob@example.org\n")
    verify = '[recipients]\nverify = "next-hop"\n'
    with (
        last_hop(tmp_path, top='[recipients]\nfile = "known"') as last,
        gateway(tmp_path, verify + route_to(last)) as server,
        smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client,
    ):
        client.ehlo()
        client.mail("a@example.com")
        assert client.rcpt("bob@example.org")[0] == 250
        code, text = client.rcpt("eve@example.org")
        assert (code, text[:5]) == (550, b"5.1.1")
