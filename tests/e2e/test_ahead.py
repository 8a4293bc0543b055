"""`penstock serve` in front of another server: messages passed on, recipients known beforehand."""

from __future__ import annotations

import smtplib
from pathlib import Path

import pytest

from penstock.message import Recipient
from penstock.reply import Reply
from penstock.testing import SmtpServer
from tests.e2e.running import Server, body_of, hard_bodies, serving


class NoEve:
    """A policy of the server behind."""

    def on_rcpt(self, transaction: object, recipient: Recipient) -> Reply | None:
        return Reply(550, "5.1.1", "who is that?") if recipient.path.local == "eve" else None


def settings(behind: SmtpServer, more: str) -> str:
    return f"""
        [[listener]]
        address = "127.0.0.1:0"
        tls.mode = "none"
        [[route]]
        next_hop = "smtp://127.0.0.1:{behind.port}"
        tls.mode = "none"
        {more}
    """


def send(server: Server, text: bytes, recipient: str = "bob@example.org") -> tuple[int, bytes]:
    """Send a message, and return what is said of it."""
    with smtplib.SMTP("127.0.0.1", server.port, local_hostname="client") as client:
        client.ehlo()
        assert client.mail("alice@example.com")[0] == 250
        code, said = client.rcpt(recipient)
        if code != 250:
            return code, said
        code, said = client.data(text)
        client.quit()
        return code, said


def test_messages_are_passed_on_and_spooled_while_the_hop_is_away(tmp_path: Path) -> None:
    bodies = {**hard_bodies(), "large": b"".join(b"%07d\r\n" % number for number in range(500_000))}
    with SmtpServer() as behind:
        address = f"127.0.0.1:{behind.port}"
        toml = settings(behind, '[delivery]\nkind = "passthrough"\n[relay.retry]\nschedule = [1.0]')
        with serving(tmp_path / "front", toml) as server:
            for name, body in bodies.items():
                code, said = send(server, b"Subject: x\r\n\r\n" + body)
                assert (code, b"passed on as" in said) == (250, True), name
                assert body_of(behind.inbox.last.raw) == body, name
            behind.stop()
            assert b"spooled as" in send(server, b"Subject: waits\r\n\r\nHello\r\n")[1]
            with SmtpServer(address=address) as again:
                assert again.inbox.wait_for(subject="waits", timeout=60).text == "Hello\n"
            assert server.stop() == 0


def test_a_recipient_that_the_hop_does_not_know_is_refused_at_rcpt(tmp_path: Path) -> None:
    with SmtpServer(policies=(NoEve(),)) as behind:
        toml = settings(behind, '[recipients]\nverify = "next-hop"')
        with serving(tmp_path / "front", toml) as server:
            assert send(server, b"Subject: x\r\n\r\n")[0] == 250
            for _ in range(2):
                assert send(server, b"", "eve@example.org") == (550, b"5.1.1 No such user here")
            server.said("who is that?")
            behind.inbox.wait_for(recipient="bob@example.org", timeout=60)
            questions = [line for line in behind.dialog.lines() if "eve@" in line]
            assert len(questions) == 1, "the answer is kept"
            behind.stop()
            assert send(server, b"", "bob@example.org")[0] == 250, "this one, too"
            assert send(server, b"", "carol@example.org")[0] == 451
            assert server.stop() == 0


def test_recipients_of_a_file_are_known_and_others_are_not(tmp_path: Path) -> None:
    front = tmp_path / "front"
    front.mkdir()
    (front / "recipients").write_text("bob@example.org\n")
    toml = '[[listener]]\naddress = "127.0.0.1:0"\ntls.mode = "none"\n[recipients]\nfile = "recipients"\n'
    with serving(front, toml) as server:
        assert send(server, b"Subject: x\r\n\r\n")[0] == 250
        assert send(server, b"", "eve@example.org") == (550, b"5.1.1 No such user here")
        assert send(server, b"Subject: x\r\n\r\n", "postmaster@example.org")[0] == 250
        assert len(server.messages(2)) == 2


def test_a_file_that_is_not_there_ends_the_start(tmp_path: Path) -> None:
    toml = '[[listener]]\naddress = "127.0.0.1:0"\n[recipients]\nfile = "recipients"'
    with pytest.raises(AssertionError, match="No such file"), serving(tmp_path / "front", toml):
        pass
