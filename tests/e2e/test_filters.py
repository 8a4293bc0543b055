"""Filters, the check of senders and our signatures in `penstock serve`, with rspamd as a milter."""

from __future__ import annotations

import base64
import smtplib
import subprocess
import sys
from pathlib import Path

import dkim  # type: ignore[import-untyped]
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from tests.e2e.running import ENVIRONMENT, Server, serving
from tests.policy.peers import rspamd
from tests.ports import free_port

SETTINGS = """
hostname = "mx.example.org"
[[listener]]
address = "127.0.0.1:0"
auth = {{ users = "users", without_tls = true }}
[delivery]
kind = "maildir"
[policy]
mode = "enforce"
trusted = []
spf = {{ mode = "off" }}
dkim = {{ mode = "off" }}
dmarc = {{ mode = "off" }}
[policy.sender_login]
[[policy.sign]]
domain = "example.org"
selector = "s1"
key = "key.pem"
[[policy.milter]]
address = "inet:127.0.0.1:{port}"
fail = "{fail}"
connect = 2
"""
SPAM = "Subject: x\r\n\r\nXJS*C4JDBQADN1.NSBN3*2IDNEN*GTUBE-STANDARD-ANTI-UBE-TEST-EMAIL*C.34X\r\n"


def prepare(folder: Path) -> rsa.RSAPrivateKey:
    """Write a key and the user alice."""
    folder.mkdir()
    key = rsa.generate_private_key(public_exponent=65_537, key_size=2048)
    form = serialization.PrivateFormat.PKCS8
    (folder / "key.pem").write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()))
    command = [sys.executable, "-m", "penstock", "user", "add", "alice", "--password-stdin"]
    command += ["--file", str(folder / "users")]
    subprocess.run(command, input=b"secret\n", check=True, env=ENVIRONMENT, capture_output=True, timeout=60)
    return key


def send(server: Server, text: str, sender: str = "a@example.com", *, user: str = "") -> tuple[int, bytes]:
    with smtplib.SMTP("127.0.0.1", server.port, timeout=60) as client:
        if user:
            client.login(user, "secret")
        try:
            client.sendmail(sender, ["bob@example.org"], text)
        except (smtplib.SMTPSenderRefused, smtplib.SMTPDataError) as exc:
            assert isinstance(exc.smtp_error, bytes)
            return exc.smtp_code, exc.smtp_error
    return 250, b""


def test_filters_judge_strangers_and_users_send_signed_mail(tmp_path: Path) -> None:
    key = prepare(tmp_path / "data")
    form = serialization.PublicFormat.SubjectPublicKeyInfo
    record = b"v=DKIM1; p=" + base64.b64encode(key.public_key().public_bytes(serialization.Encoding.DER, form))
    (tmp_path / "rspamd").mkdir()
    with (
        rspamd(tmp_path / "rspamd") as (port, _),
        serving(tmp_path / "data", SETTINGS.format(port=port, fail="defer")) as server,
    ):
        assert send(server, SPAM) == (554, b"5.7.1 Gtube pattern")
        assert send(server, "Subject: wanted\r\n\r\nHello\r\n")[0] == 250
        (message,) = server.messages(1)
        assert b"\nX-Rspamd-Action: no action\n" in message.replace(b"\r\n", b"\n")
        assert b"DKIM-Signature" not in message
        for path in (server.folder / "maildir" / "new").iterdir():
            path.unlink()
        assert send(server, SPAM, "ceo@example.org", user="alice") == (553, b"5.7.1 You may not send from this address")
        forged = "From: ceo@example.org\r\n\r\nHello\r\n"
        assert send(server, forged, "alice@example.org", user="alice")[0] == 550
        mail = "From: Alice <alice@example.org>\r\nSubject: Hi\r\n\r\nHello\r\n"
        assert send(server, mail, "alice@example.org", user="alice")[0] == 250
        (message,) = server.messages(1)
        assert dkim.verify(message, dnsfunc=lambda *_, **__: record)


def test_a_dead_filter_defers_mail_or_is_left_out(tmp_path: Path) -> None:
    prepare(tmp_path / "data")
    with serving(tmp_path / "data", SETTINGS.format(port=free_port(), fail="defer")) as server:
        assert send(server, SPAM)[0] == 451
    with serving(tmp_path / "data", SETTINGS.format(port=free_port(), fail="accept")) as server:
        assert send(server, SPAM)[0] == 250
