"""Clients in Python: smtplib and aiosmtplib."""

from __future__ import annotations

import asyncio
import smtplib
import socket
import ssl
import subprocess
import sys
from email.message import EmailMessage
from pathlib import Path

import aiosmtplib
import pytest

from tests.e2e.running import ENVIRONMENT, Server, body_of, digest, hard_bodies, serving

AUTH = """
hostname = "localhost"
[[listener]]
address = "127.0.0.1:0"
[listener.auth]
required = true
"""


def add_user(folder: Path, name: str, password: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "penstock", "user", "add", name, "--password-stdin", "--file", str(folder / "users")],
        input=password + "\n",
        text=True,
        check=True,
        capture_output=True,
        env=ENVIRONMENT,
    )


def context_of(server: Server) -> ssl.SSLContext:
    return ssl.create_default_context(cafile=str(server.ca_file))


def test_smtplib_bodies_arrive_byte_for_byte(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        bodies = hard_bodies()
        with smtplib.SMTP("127.0.0.1", server.port, timeout=30) as client:
            for body in bodies.values():
                client.sendmail("a@example.com", ["b@example.org"], b"Subject: x\r\n\r\n" + body, ["BODY=8BITMIME"])
        received = server.messages(len(bodies))
        assert server.stop() == 0
        assert sorted(digest(body_of(m)) for m in received) == sorted(map(digest, bodies.values()))


def test_smtplib_over_starttls_verifies_the_generated_certificate(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        with smtplib.SMTP("localhost", server.port, timeout=30) as client:
            client.starttls(context=context_of(server))
            client.send_message(message())
        assert b"with ESMTPS id" in server.messages(1)[0]


def test_smtplib_over_implicit_tls(tmp_path: Path) -> None:
    toml = 'hostname = "localhost"\n[[listener]]\naddress = "127.0.0.1:0"\ntls.mode = "implicit"\n'
    with serving(tmp_path / "data", toml) as server:
        with smtplib.SMTP_SSL("localhost", server.port, timeout=30, context=context_of(server)) as client:
            client.send_message(message())
        assert len(server.messages(1)) == 1


def test_smtplib_authenticates_and_a_wrong_password_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    add_user(folder, "alice", "secret")
    with serving(folder, AUTH) as server:
        with smtplib.SMTP("localhost", server.port, timeout=30) as client:
            client.starttls(context=context_of(server))
            with pytest.raises(smtplib.SMTPAuthenticationError) as error:
                client.login("alice", "wrong")
            assert error.value.smtp_code == 535
            add_user(folder, "bob", "later")  # the running server reads the file again
            client.login("bob", "later")
            client.send_message(message())
        assert b"with ESMTPSA id" in server.messages(1)[0]


def test_lmtp_over_a_unix_socket(tmp_path: Path) -> None:
    path = tmp_path / "lmtp"
    toml = f"""
[[listener]]
address = "127.0.0.1:0"
[[listener]]
address = "unix:{path}"
kind = "lmtp"
"""
    with serving(tmp_path / "data", toml) as server:
        with smtplib.LMTP(str(path)) as client:
            refused = client.sendmail("a@example.com", ["b@example.org"], "Subject: x\r\n\r\nhi\r\n")
        assert refused == {}
        assert b"with LMTP id" in server.messages(1)[0]
        assert server.stop() == 0
    assert not path.exists()


def test_aiosmtplib_sends_concurrently(tmp_path: Path) -> None:
    async def send_all(server: Server) -> None:
        await asyncio.gather(
            *(
                aiosmtplib.send(
                    message(str(number)),
                    hostname="localhost",
                    port=server.port,
                    start_tls=True,
                    tls_context=context_of(server),
                    timeout=60,
                )
                for number in range(20)
            )
        )

    with serving(tmp_path / "data") as server:
        asyncio.run(send_all(server))
        assert len(server.messages(20)) == 20


def test_a_connection_cut_in_the_text_delivers_nothing(tmp_path: Path) -> None:
    with serving(tmp_path / "data") as server:
        with socket.create_connection(("127.0.0.1", server.port)) as sock:
            sock.sendall(b"EHLO x\r\nMAIL FROM:<a@example.com>\r\nRCPT TO:<b@example.org>\r\nDATA\r\n")
            while b"354" not in sock.recv(65536):
                pass
            sock.sendall(b"half a message\r\n" * 100_000)
        assert server.stop() == 0
        assert server.messages() == []
        assert b'"event":"lost"' in server.journal.read_bytes()


def test_the_sink_counts_and_stops_after_its_messages(tmp_path: Path) -> None:
    with serving(tmp_path / "data", "", "sink", "--messages", "3", "--json") as server:
        client = smtplib.SMTP("127.0.0.1", server.port, timeout=30)
        for _ in range(3):
            client.sendmail("a@example.com", ["b@example.org", "c@example.org"], "Subject: x\r\n\r\nhi\r\n")
        assert server.process.wait(timeout=60) == 0
        client.close()
        counts = server.out.read_text()
        assert '"messages":3' in counts
        assert '"recipients":6' in counts


def message(text: str = "hello") -> EmailMessage:
    mail = EmailMessage()
    mail["From"] = "a@example.com"
    mail["To"] = "b@example.org"
    mail["Subject"] = "test"
    mail.set_content(text)
    return mail
