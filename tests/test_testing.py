"""The server for tests: with real clients, each kind of loop, and what it does when something fails."""

from __future__ import annotations

import asyncio
import doctest
import os
import re
import smtplib
import ssl
import subprocess
import sys
import threading
import tomllib
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from email.message import EmailMessage
from pathlib import Path
from typing import Any

import aiosmtplib
import freezegun
import pytest
import trio
import trio.testing

import penstock.testing
from penstock import Reply, Transaction
from penstock.message import Recipient
from penstock.testing import Authority, Inbox, PlanError, ReceivedMessage, SmtpServer
from penstock.testing.links import links_of

ALICE = "alice@example.org"
BOB = "bob@example.org"
TEXT = "From: alice@example.org\r\nSubject: Hello\r\n\r\nHow are you?\r\n"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"))


def send(server: SmtpServer, text: str = TEXT, recipients: tuple[str, ...] = (BOB,)) -> None:
    with smtplib.SMTP(server.host, server.port) as client:
        client.sendmail(ALICE, recipients, text)


@contextmanager
def meanwhile(function: Callable[..., object], *arguments: object) -> Iterator[None]:
    """Do something in another thread, and see to it that it has ended."""
    thread = threading.Thread(target=function, args=arguments)
    thread.start()
    yield
    thread.join(20)
    assert not thread.is_alive()


# ---- clients


def test_smtplib_sends_and_the_message_is_there_before_the_250() -> None:
    with SmtpServer() as server:
        send(server)
        message = server.inbox.last
    assert (message.sender, message.recipients) == (ALICE, (BOB,))
    assert message.raw == TEXT.encode()
    assert (message.subject, message.text, message.html) == ("Hello", "How are you?\n", "")
    assert isinstance(message.email, EmailMessage)
    assert (message.tls, message.identity, message.protocol) == (None, None, "ESMTP")
    assert message.peer.address == "127.0.0.1"
    assert message.envelope.size == len(message.raw)


def test_smtplib_checks_the_certificate_of_starttls(made: Authority) -> None:
    with SmtpServer(tls="starttls", require_tls=True, authority=made) as server:
        with smtplib.SMTP("localhost", server.port) as client:
            with pytest.raises(smtplib.SMTPSenderRefused, match="Send STARTTLS first"):
                client.sendmail(ALICE, [BOB], TEXT)
            client.starttls(context=server.ssl_context())
            client.sendmail(ALICE, [BOB], TEXT)
        tls = server.inbox.last.tls
    assert tls is not None
    assert tls.version == "TLSv1.3"


def test_a_client_that_trusts_other_authorities_does_not_trust_this_one(made: Authority) -> None:
    with (
        SmtpServer(tls="starttls", authority=made) as server,
        smtplib.SMTP("localhost", server.port) as client,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        client.starttls(context=ssl.create_default_context())


def test_smtplib_begins_with_tls(made: Authority) -> None:
    with SmtpServer(tls="implicit", authority=made) as server:
        with smtplib.SMTP_SSL(server.host, server.port, context=server.ssl_context()) as client:
            client.sendmail(ALICE, [BOB], TEXT)
        assert server.inbox.last.protocol == "ESMTPS"


@pytest.mark.parametrize("tls", ["none", "starttls"])
def test_smtplib_logs_in(made: Authority, tls: Any) -> None:
    with SmtpServer(tls=tls, users={"alice": "secret"}, require_auth=True, authority=made) as server:
        with smtplib.SMTP("localhost", server.port) as client:
            if tls == "starttls":
                client.starttls(context=server.ssl_context())
            with pytest.raises(smtplib.SMTPSenderRefused, match="Authentication required"):
                client.sendmail(ALICE, [BOB], TEXT)
            with pytest.raises(smtplib.SMTPAuthenticationError):
                client.login("alice", "wrong")
            client.login("alice", "secret")
            client.sendmail(ALICE, [BOB], TEXT)
        assert server.inbox.last.identity == "alice"


def test_passwords_go_through_tls_only_where_there_is_tls(made: Authority) -> None:
    with (
        SmtpServer(tls="starttls", users={"alice": "secret"}, authority=made) as server,
        smtplib.SMTP("localhost", server.port) as client,
    ):
        client.ehlo()
        assert client.esmtp_features["auth"].split() == ["SCRAM-SHA-256"]


def test_smtplib_speaks_lmtp_over_a_unix_socket(tmp_path: Path) -> None:
    with SmtpServer(lmtp=True, address=f"unix:{tmp_path}/lmtp") as server:
        assert (server.host, server.port) == (f"{tmp_path}/lmtp", 0)
        with smtplib.LMTP(server.host) as client:
            client.sendmail(ALICE, [BOB], TEXT)
        assert server.inbox.last.protocol == "LMTP"


def test_a_message_beyond_the_limit_is_refused() -> None:
    with SmtpServer(max_size=1000) as server:
        with pytest.raises(smtplib.SMTPSenderRefused, match="Message too big"):
            send(server, TEXT + "x\r\n" * 1000)
        assert len(server.inbox) == 0


def test_aiosmtplib_sends_in_asyncio(made: Authority) -> None:
    async def main(server: SmtpServer) -> ReceivedMessage:
        message = EmailMessage()
        message["From"], message["To"], message["Subject"] = ALICE, BOB, "Grüße"
        message.set_content("Wie geht's?")
        await aiosmtplib.send(
            message,
            hostname="localhost",
            port=server.port,
            start_tls=True,
            tls_context=server.ssl_context(),
            username="alice",
            password="secret",
        )
        return await server.inbox.wait_for_async(subject="Grüße")

    with SmtpServer(tls="starttls", users={"alice": "secret"}, authority=made) as server:
        message = asyncio.run(main(server))
    assert (message.text, message.identity, message.protocol) == ("Wie geht's?\n", "alice", "ESMTPSA")


async def test_smtplib_sends_in_a_thread_of_trio() -> None:
    with SmtpServer() as server:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(lambda: trio.to_thread.run_sync(send, server))
            messages = await server.inbox.wait_async()
    assert [message.subject for message in messages] == ["Hello"]


# ---- the inbox


def test_a_wait_ends_when_the_message_comes() -> None:
    with SmtpServer() as server, meanwhile(send, server), meanwhile(send, server, TEXT.replace("Hello", "Good bye")):
        assert server.inbox.wait_for(subject="Good").subject == "Good bye"
        messages = server.inbox.wait(2)
        assert sorted(message.subject for message in messages) == ["Good bye", "Hello"]


def test_asyncio_waits_for_a_message_that_comes_later() -> None:
    async def main() -> list[ReceivedMessage]:
        with meanwhile(send, server), meanwhile(send, server):
            return await server.inbox.wait_async(2)

    with SmtpServer() as server:
        assert len(asyncio.run(main())) == 2


def test_a_wait_in_vain_tells_what_came_instead() -> None:
    with SmtpServer() as server:
        with pytest.raises(TimeoutError, match="waited 0 s for 1 message; 0 messages in the inbox\nno client"):
            server.inbox.wait(timeout=0)
        send(server)
        with pytest.raises(TimeoutError) as caught:
            server.inbox.wait_for(lambda message: "else" in message.text, recipient="eve@example.org", timeout=0)
    told = str(caught.value)
    assert told.startswith("waited 0 s for a message with recipient 'eve@example.org' and <lambda>; 1 message in")
    assert "<alice@example.org> -> <bob@example.org>\n    Subject: Hello" in told
    assert "c: rcpt to:<bob@example.org>\n#1 s: 250 2.1.5 recipient ok" in told.lower()  # smtplib's case differs


async def test_an_async_wait_in_vain_says_so_in_trio() -> None:
    with SmtpServer() as server, pytest.raises(TimeoutError, match=r"waited 0\.001 s for 3 messages"):
        await server.inbox.wait_async(3, timeout=0.001)


def test_an_async_wait_in_vain_says_so_in_asyncio() -> None:
    with SmtpServer() as server, pytest.raises(TimeoutError, match="a message with sender 'nobody'"):
        asyncio.run(server.inbox.wait_for_async(sender="nobody", timeout=0.001))


def test_the_inbox_is_a_sequence_that_can_be_cleared() -> None:
    with SmtpServer() as server:
        inbox = server.inbox
        with pytest.raises(IndexError, match="the inbox is empty"):
            _ = inbox.last
        for name in ("one", "two", "three"):
            send(server, TEXT.replace("Hello", name))
        assert [message.subject for message in inbox] == ["one", "two", "three"]
        assert (inbox[0].subject, inbox[-1].subject, len(inbox[1:])) == ("one", "three", 2)
        assert inbox[1] in inbox
        assert inbox.octets == sum(len(message.raw) for message in inbox)
        assert repr(inbox) == "<Inbox of 3 messages>"
        inbox.clear()
        assert (len(inbox), inbox.octets) == (0, 0)


@pytest.mark.parametrize("room", [{"max_messages": 2}, {"max_octets": 2 * len(TEXT)}])
def test_a_full_inbox_refuses_what_is_more_and_forgets_nothing(room: dict[str, Any]) -> None:
    with SmtpServer(**room) as server:
        send(server)
        send(server)
        with pytest.raises(smtplib.SMTPDataError, match="The inbox of this test is full: max_"):
            send(server)
        assert len(server.inbox) == 2
        server.inbox.clear()
        send(server)


@pytest.mark.parametrize("timeout", [-1, float("inf"), float("nan")])
def test_a_wait_has_a_bound(timeout: float) -> None:
    with pytest.raises(ValueError, match="a timeout is a number of seconds"):
        Inbox(max_messages=1, max_octets=1).wait(timeout=timeout)


def test_a_wait_for_anything_is_refused() -> None:
    with pytest.raises(ValueError, match="say what to wait for"):
        Inbox(max_messages=1, max_octets=1).wait_for()


def test_a_message_of_two_kinds_of_text_shows_both() -> None:
    message = EmailMessage()
    message["Subject"] = "Both"
    message.set_content("plain\n")
    message.add_alternative("<p>html</p>\n", subtype="html")
    with SmtpServer() as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.send_message(message, ALICE, [BOB])
        got = server.inbox.last
    assert (got.text, got.html) == ("plain\n", "<p>html</p>\n")


@pytest.mark.parametrize(
    "head",
    [
        "Content-Type: text/plain;b*\r\n",
        "Subject: =?utf-7?q?+2AA-?=\r\n",
        "Content-Type: text/plain; charset=x-foo\r\n",
        "Content-Type: multipart/mixed; boundary=a\r\n\r\n--a\r\nContent-Type: multipart/related\r\n\r\nx\r\n--a--\r\n",
    ],
)
def test_a_message_that_can_not_be_read_does_not_hide_another(head: str) -> None:
    with SmtpServer() as server:
        send(server, f"{head}\r\nbody\r\n")
        send(server)
        assert server.inbox.wait_for(subject="Hello").text == "How are you?\n"
        assert "Subject" in server.inbox[0].describe()


def test_what_nobody_can_decode_is_shown_as_it_stands() -> None:
    with SmtpServer() as server:
        send(server, "Subject: =?utf-7?q?+2AA-?=\r\nContent-Type: text/plain; charset=x-foo\r\n\r\nbody\r\n")
        assert server.inbox.last.subject == "=?utf-7?q?+2AA-?="
        assert server.inbox.last.text == "body\n"


def test_a_predicate_does_not_hold_up_the_server() -> None:
    with SmtpServer() as server:
        send(server)

        def sends_another(_: ReceivedMessage) -> bool:
            if len(server.inbox) == 1:
                send(server)
            return len(server.inbox) == 2

        assert server.inbox.wait_for(sends_another) is server.inbox[0]


async def test_a_wait_that_is_over_at_once_is_a_checkpoint_in_trio() -> None:
    with SmtpServer() as server:
        await trio.to_thread.run_sync(send, server)
        with trio.testing.assert_checkpoints():
            await server.inbox.wait_async()


def test_a_wait_that_is_over_at_once_lets_others_have_a_turn_in_asyncio() -> None:
    async def poll(server: SmtpServer) -> None:
        turns = asyncio.create_task(asyncio.sleep(0))
        while not turns.done():
            await server.inbox.wait_async()

    with SmtpServer() as server:
        send(server)
        asyncio.run(asyncio.wait_for(poll(server), 20))


async def test_a_wait_takes_real_time_where_that_of_trio_runs_ahead(autojump_clock: object) -> None:
    with SmtpServer() as server, meanwhile(send, server):
        assert len(await server.inbox.wait_async()) == 1


def test_clocks_that_a_test_has_stopped_stop_nothing(made: Authority) -> None:
    with freezegun.freeze_time("2012-01-14"), SmtpServer(tls="starttls", authority=made) as server:
        with smtplib.SMTP("localhost", server.port) as client:
            client.starttls(context=server.ssl_context())
            client.sendmail(ALICE, [BOB], TEXT)
        with pytest.raises(TimeoutError):
            server.inbox.wait(2, timeout=0.01)
        client = smtplib.SMTP("localhost", server.port)  # and is left open
    client.close()


def test_certificates_are_good_whatever_day_a_test_has_set() -> None:
    with freezegun.freeze_time("2012-01-14"):
        context = SmtpServer(tls="starttls").ssl_context()
    with SmtpServer(tls="starttls") as server, smtplib.SMTP("localhost", server.port) as client:
        client.starttls(context=context)


def test_a_child_of_the_process_takes_nothing_away() -> None:
    script = """if True:
        import os, sys, warnings
        from penstock.testing import SmtpServer
        warnings.simplefilter("ignore")
        with SmtpServer(tls="starttls") as server:
            child = os.fork()
            if child == 0:
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
            server.ssl_context()
            assert server.inbox.wait(0) == []
        """
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


# ---- the dialog


def test_the_dialog_has_each_reply_below_its_command_and_no_password() -> None:
    with SmtpServer(users={"alice": "a very secret word"}) as server:
        with smtplib.SMTP("localhost", server.port, local_hostname="client.example.org") as client:
            client.login("alice", "a very secret word")
            client.docmd("AUTH", "LOGIN")
            client.noop()
            client.docmd("XPASS", "one two")
            client.sendmail(ALICE, [BOB], TEXT)
        lines = [line.partition(" ")[2] for line in server.dialog.lines()]
    start = lines.index("C: AUTH PLAIN (initial response, not shown)")
    assert lines[start + 1 : start + 3] == ["-- is alice, by PLAIN", "S: 235 2.7.0 Authentication succeeded"]
    assert lines[lines.index("C: AUTH LOGIN") + 1] == "S: 503 5.5.1 Already authenticated"
    assert lines[lines.index("C: XPASS one two") + 1] == "S: 500 5.5.1 Command unrecognized"
    assert lines[lines.index(f"C: ({len(TEXT)} octets of text)") + 1].startswith("S: 250 2.0.0 Ok: received as ")
    assert "secret" not in "\n".join(lines)


@pytest.mark.parametrize("is_refused", [False, True])
@pytest.mark.parametrize(
    "lines",
    [
        "AUTH\tPLAIN AGFsaWNlAHNlY3JldHdvcmQ=",
        "AUTH PLAIN\tAGFsaWNlAHNlY3JldHdvcmQ=",
        "AUTH PLAIN=AGFsaWNlAHNlY3JldHdvcmQ=",
        "AUTHPLAIN AGFsaWNlAHNlY3JldHdvcmQ=",
        "AUTH LOGIN\r\nYWxpY2U=\r\nc2VjcmV0d29yZA==",
        "AUTH LOGIN\r\n*\r\nYWxpY2U=\r\nc2VjcmV0d29yZA==",
        "AUTH NONE\r\nYWxpY2U=\r\nc2VjcmV0d29yZA==",
        "AUTH LOGIN\r\n?\r\nYWxpY2U=\r\nc2VjcmV0d29yZA==",
    ],
)
def test_no_password_is_in_the_dialog_however_it_is_said(lines: str, is_refused: bool) -> None:
    with SmtpServer(users={"alice": "secretword"}) as server:
        if is_refused:
            server.fail_next("AUTH", 454)
        with closing(smtplib.SMTP(server.host, server.port)) as client:
            client.ehlo("client.example.org")
            client.send(f"{lines}\r\nQUIT\r\n")
            while client.getreply()[0] != 221:
                pass
        dialog = "\n".join(server.dialog.lines())
    assert "c2VjcmV0d29yZA" not in dialog
    assert "AHNlY3JldHdvcmQ" not in dialog
    assert "C: QUIT" in dialog


def test_a_handshake_that_fails_is_told_with_its_reason(made: Authority) -> None:
    with (
        SmtpServer(tls="starttls", authority=made) as server,
        closing(smtplib.SMTP("localhost", server.port)) as client,
        pytest.raises(ssl.SSLCertVerificationError),
    ):
        client.starttls(context=ssl.create_default_context())
    assert re.search("connection lost: .*unknown ca", "\n".join(server.dialog.lines()))


def test_the_dialog_stands_in_order_when_commands_are_pipelined() -> None:
    with SmtpServer() as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.ehlo("client.example.org")
            client.send(f"MAIL FROM:<{ALICE}>\r\nRCPT TO:<{BOB}>\r\nRCPT TO:<>\r\nRSET\r\n")
            for _ in range(4):
                client.getreply()
        lines = [line.partition(" ")[2] for line in server.dialog.lines()]
    start = lines.index(f"C: MAIL FROM:<{ALICE}>")
    assert [line[:7] for line in lines[start : start + 8]] == [
        "C: MAIL", "S: 250 ", "C: RCPT", "S: 250 ", "C: RCPT", "S: 501 ", "C: RSET", "S: 250 ",
    ]  # fmt: skip


# ---- faults


@pytest.mark.parametrize(
    ("phase", "error"),
    [
        ("banner", smtplib.SMTPConnectError),
        ("MAIL", smtplib.SMTPSenderRefused),
        ("rcpt", smtplib.SMTPRecipientsRefused),
        ("Data", smtplib.SMTPDataError),
        (".", smtplib.SMTPDataError),
    ],
)
def test_the_next_command_fails_as_often_as_asked(phase: str, error: type[Exception]) -> None:
    with SmtpServer() as server:
        server.fail_next(phase, 452, status="4.2.2", text="Mailbox full", times=2)
        for _ in range(2):
            with pytest.raises(error, match=r"452.*4\.2\.2 Mailbox full"):
                send(server)
        send(server)
        assert len(server.inbox) == 1
        assert [fault.action for fault in server.applied_faults] == ["reply 452 4.2.2"] * 2


def test_failures_wait_for_their_turn_on_an_open_connection() -> None:
    with SmtpServer() as server, smtplib.SMTP(server.host, server.port) as client:
        client.ehlo()
        server.fail_next("RCPT", 450)
        server.fail_next("RCPT", 550, text="No such user")
        client.docmd(f"MAIL FROM:<{ALICE}>")
        replies = [client.docmd(f"RCPT TO:<{BOB}>") for _ in range(3)]
    assert replies == [
        (450, b"4.0.0 Mailbox unavailable, please try again later"),
        (550, b"5.0.0 No such user"),
        (250, b"2.1.5 Recipient ok"),
    ]


def test_421_ends_the_connection() -> None:
    with SmtpServer() as server, closing(smtplib.SMTP(server.host, server.port)) as client:
        server.fail_next("MAIL", 421)
        client.ehlo()
        assert client.docmd(f"MAIL FROM:<{ALICE}>")[0] == 421
        with pytest.raises(smtplib.SMTPServerDisconnected):
            client.noop()


PLAN = """
[[rule]]
name = "full"
phase = "rcpt"
match = { recipient = ["*@full.example"] }
reply = "452 4.2.2 Mailbox full"
"""


def test_a_plan_is_a_table_a_text_or_a_file(tmp_path: Path) -> None:
    file = tmp_path / "plan.toml"
    file.write_text(PLAN)
    for plan in (tomllib.loads(PLAN), PLAN, file):
        with SmtpServer(faults=plan) as server, smtplib.SMTP(server.host, server.port) as client:
            refused = client.sendmail(ALICE, [BOB, "bob@full.example"], TEXT)
            assert refused == {"bob@full.example": (452, b"4.2.2 Mailbox full")}
            server.faults({})
            assert client.sendmail(ALICE, [BOB, "bob@full.example"], TEXT) == {}
            assert [(fault.rule, fault.recipient) for fault in server.applied_faults] == [("full", "bob@full.example")]


def test_what_is_wrong_with_a_plan_is_named(tmp_path: Path) -> None:
    for plan, told in (
        ({"rule": [{"phase": "rcpt", "replay": "450"}]}, r"rule\[0\].replay: unknown key"),
        (
            "[[rule]]\nphase = 'rctp'\nreply = '450'",
            r"rule\[0\].phase: unknown value 'rctp' .*; expected one of: connect",
        ),
        (tmp_path / "nowhere.toml", "nowhere.toml: No such file"),
        ("rule", "invalid TOML"),
    ):
        with pytest.raises(PlanError, match=told):
            SmtpServer(faults=plan)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("RCTP", 450), "unknown phase 'RCTP'; expected one of: banner"),
        (("RCPT", 999), "expected a reply such as"),
        (("RCPT", 450, 0), "count must be between 1 and"),
    ],
)
def test_what_is_wrong_with_a_failure_is_named(arguments: tuple[Any, ...], told: str) -> None:
    phase, code, *times = arguments
    with pytest.raises(ValueError, match=told):
        SmtpServer().fail_next(phase, code, **({"times": times[0]} if times else {}))


@pytest.mark.parametrize(
    ("fault", "told"), [("expired", "certificate has expired"), ("wrong-name", "Hostname mismatch")]
)
def test_a_certificate_is_wrong_in_one_way_only(made: Authority, fault: str, told: str) -> None:
    plan = {"rule": [{"phase": "starttls", "tls": fault}]}
    with SmtpServer(tls="starttls", faults=plan, authority=made, grace=0) as server:
        client = smtplib.SMTP("localhost", server.port)
        with closing(client), pytest.raises(ssl.SSLCertVerificationError, match=told):
            client.starttls(context=server.ssl_context())
        server.faults({})
        with smtplib.SMTP("localhost", server.port) as client:
            client.starttls(context=server.ssl_context())
            client.sendmail(ALICE, [BOB], TEXT)
        assert server.inbox.last.tls is not None


def test_magic_recipients_are_asked_for() -> None:
    magic = "450-4.2.1@example.org"
    with SmtpServer() as server:
        send(server, recipients=(magic,))
    with SmtpServer(magic_recipients=True) as server, pytest.raises(smtplib.SMTPRecipientsRefused, match=r"4\.2\.1"):
        send(server, recipients=(magic,))


def test_the_report_tells_of_faults_and_of_those_that_nobody_met() -> None:
    with SmtpServer() as server:
        server.fail_next("RCPT", 450)
        server.fail_next("DATA", 451, times=3)
        with pytest.raises(smtplib.SMTPRecipientsRefused):
            send(server)
        told = server.report()
    assert "fail_next of 3 data was not used" in told
    assert "#1 -- fault 'fail-next' in phase rcpt: reply 450 4.0.0" in told


# ---- policies


class NoEve:
    """A policy as a user has it."""

    def on_rcpt(self, transaction: Transaction, recipient: Recipient) -> Reply | None:
        return Reply(550, "5.1.1", "No Eve here") if recipient.path.local == "eve" else None


def test_a_policy_is_tested_as_it_is() -> None:
    with SmtpServer(policies=[NoEve()]) as server:
        with smtplib.SMTP(server.host, server.port) as client:
            refused = client.sendmail(ALICE, [BOB, "eve@example.org"], TEXT)
        assert refused == {"eve@example.org": (550, b"5.1.1 No Eve here")}
        assert server.inbox.last.recipients == (BOB,)


# ---- its life


def descriptors() -> list[str]:
    return os.listdir("/proc/self/fd")


def test_nothing_is_left_of_a_server(made: Authority) -> None:
    with SmtpServer(tls="starttls", authority=made) as server:  # whatever is made once is made now
        send(server)
    threads, before = threading.active_count(), len(descriptors())
    with SmtpServer(tls="starttls", authority=made, grace=0) as server:
        idle = smtplib.SMTP(server.host, server.port)
        inside = smtplib.SMTP("localhost", server.port)
        inside.starttls(context=server.ssl_context())
        inside.docmd("MAIL", f"FROM:<{ALICE}>")
        inside.docmd("RCPT", f"TO:<{BOB}>")
        inside.docmd("DATA")
    idle.close()
    inside.close()
    assert (threading.active_count(), len(descriptors())) == (threads, before)
    assert server.inbox.octets == 0
    assert repr(server).endswith("stopped>")


def test_a_sender_that_nobody_waits_for_hears_the_rest() -> None:
    server = SmtpServer(grace=20).start()
    with meanwhile(send, server):
        server.inbox.wait()  # its 250 is still to be read, its QUIT to be said
        server.stop()
    assert server.dialog.lines()[-2].endswith("S: 221 2.0.0 Bye")


def test_idle_clients_hear_that_the_server_stops() -> None:
    with SmtpServer() as server:
        client = smtplib.SMTP(server.host, server.port)
    with client:
        assert client.getreply() == (421, b"4.3.2 Service shutting down, please try again later")


def test_two_servers_share_nothing() -> None:
    with SmtpServer() as one, SmtpServer() as other:
        assert one.port != other.port
        send(one)
        assert (len(one.inbox), len(other.inbox)) == (1, 0)


def test_a_server_is_started_once() -> None:
    server = SmtpServer()
    with pytest.raises(RuntimeError, match="not started"):
        _ = server.port
    with server, pytest.raises(RuntimeError, match="make another one"):
        server.start()
    with pytest.raises(RuntimeError, match="make another one"):
        server.start()
    server.stop()  # again, which is nothing


def test_an_address_that_is_taken_is_an_error_of_the_start() -> None:
    with SmtpServer() as server, pytest.raises(OSError, match=f"127.0.0.1:{server.port}"):
        SmtpServer(address=f"127.0.0.1:{server.port}").start()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"require_auth": True}, "require_auth=True needs users"),
        ({"accept_any_auth": True, "users": {"a": "b"}}, "mutually exclusive"),
        ({"require_tls": True}, "require_tls=True needs tls"),
        ({"users": {"alice": ""}}, "users are names and their passwords"),
        ({"users": {"alice": 1}}, "users are names and their passwords"),
        ({"max_size": -1}, r"listener\[0\].max_size: expected an integer >= 0"),
        ({"tls": "smtps"}, r"listener\[0\].tls.mode: unknown value 'smtps'.*; expected one of"),
        ({"listener": {"limit": {}}}, r"listener\[0\].limit: unknown key .*; expected one of: address"),
        ({"domains": ["*.example.org"]}, "is not a domain"),
        ({"address": "localhost"}, "a listen address looks like"),
        ({"grace": 60}, "grace is 0 to 20 seconds"),
        ({"max_messages": 0}, "room for at least one message"),
    ],
)
def test_wrong_options_are_named_at_once(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        SmtpServer(**options)


def test_something_that_is_no_policy_is_named_at_the_start() -> None:
    with pytest.raises(ValueError, match="unknown hook on_rctp"):
        SmtpServer(policies=[type("Typo", (), {"on_rctp": None})()]).start()


def test_further_keys_of_the_listener_are_taken() -> None:
    with SmtpServer(listener={"extensions": {"pipelining": False}}) as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.ehlo()
        assert "pipelining" not in client.esmtp_features


class BrokenError(RuntimeError):
    """Something that should not happen."""


def test_what_breaks_inside_the_server_breaks_the_test(monkeypatch: pytest.MonkeyPatch) -> None:
    def put(inbox: Inbox, message: ReceivedMessage) -> Reply:
        raise BrokenError("on purpose")

    monkeypatch.setattr(Inbox, "put", put)
    server = SmtpServer().start()
    with pytest.raises(smtplib.SMTPDataError, match="Temporary failure"):
        send(server)
    with pytest.raises(RuntimeError, match="the server has failed: BrokenError: on purpose") as caught:
        server.stop()
    assert isinstance(caught.value.__cause__, BrokenError)
    assert "failed: BrokenError: on purpose" in server.report()


def test_what_the_test_throws_is_not_hidden_by_what_breaks_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Inbox, "put", lambda inbox, message: 1 / 0)
    with pytest.raises(smtplib.SMTPDataError) as caught, SmtpServer() as server:
        send(server)
    assert caught.value.__notes__ == ["the server has failed: ZeroDivisionError: division by zero"]


def die(server: SmtpServer) -> None:
    """Let the loop of a server end as it never should."""

    def throw() -> None:
        raise BrokenError("the end")

    assert server._thread._token is not None
    server._thread._token.run_sync_soon(throw)


def test_a_server_that_dies_wakes_those_who_wait() -> None:
    server = SmtpServer().start()
    die(server)
    with pytest.raises(RuntimeError, match="the server has died"):
        server.inbox.wait(timeout=20)
    with pytest.raises(RuntimeError, match="the server has failed: TrioInternalError"):
        server.stop()


async def wait_until_death(server: SmtpServer) -> None:
    with pytest.raises(RuntimeError, match="the server has died"):
        await server.inbox.wait_async(timeout=20)


async def test_a_server_that_dies_wakes_a_task_that_waits() -> None:
    server = SmtpServer().start()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(wait_until_death, server)
        await trio.testing.wait_all_tasks_blocked()
        die(server)
    with pytest.raises(RuntimeError, match="the server has failed"):
        server.stop()


def test_a_server_that_can_not_run_says_why_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(*arguments: object, **keywords: object) -> None:
        raise BrokenError("no legs")

    monkeypatch.setattr("penstock.server.worker.Worker.run", run)
    server = SmtpServer()
    with pytest.raises(RuntimeError, match="the server has failed"):
        server.start()


# ---- what is written about it


def test_the_examples_of_the_documentation_run() -> None:
    for module in (penstock.testing, penstock.testing.server):
        failed, tried = doctest.testmod(module, extraglobs={"smtplib": smtplib}, optionflags=doctest.ELLIPSIS)
        assert tried
        assert not failed


# ---- assertions and links


def test_assert_sent_returns_what_matches() -> None:
    with SmtpServer() as server:
        send(server)
        send(server, "Subject: Your order\r\n\r\n", (BOB, "eve@example.org"))
        assert len(server.assert_sent()) == 2
        assert [message.subject for message in server.assert_sent(to=BOB, count=2)] == ["Hello", "Your order"]
        assert len(server.inbox.assert_sent(to="eve@example.org", subject="order", count=1)) == 1
        assert server.assert_sent(to="nobody@example.org", count=0) == []
        assert server.latest().subject == "Your order"
        assert server.latest(to=BOB, subject="Hello").text == "How are you?\n"


def test_a_failed_assertion_shows_what_was_sent() -> None:
    with SmtpServer() as server:
        with pytest.raises(AssertionError, match="expected at least 1 message, found 0; 0 messages in the inbox"):
            server.assert_sent()
        send(server)
        with pytest.raises(
            AssertionError, match=r"(?s)expected 2 messages with recipient 'bob.*found 1.*Subject: Hello"
        ):
            server.assert_sent(to=BOB, count=2)
        with pytest.raises(AssertionError, match="there is no message with subject 'order'; 1 message in the inbox"):
            server.latest(subject="order")


def test_a_failed_assertion_shows_the_last_of_many_messages() -> None:
    with SmtpServer() as server:
        for number in range(1, 13):
            send(server, f"Subject: order {number}\r\n\r\n")
        with pytest.raises(AssertionError) as failed:
            server.assert_sent(subject="order", count=11)
    lines = str(failed.value).splitlines()
    assert lines[0] == (
        "expected 11 messages with subject 'order', found 12; 12 messages in the inbox, the last 10 of them"
    )
    assert lines[1].startswith("[2] ")
    assert any(line.startswith("[11] ") for line in lines)
    assert "order 2" not in str(failed.value)
    assert "order 12" in str(failed.value)


def test_reset_forgets_mail_faults_and_the_dialog() -> None:
    with SmtpServer(faults={"rule": [{"phase": "rcpt", "greylist": {"wait": 60}}]}) as server:
        server.faults("")
        send(server)
        server.fail_next("MAIL", 450)
        server.reset()
        assert (len(server.inbox), server.dialog.lines(), server.applied_faults) == (0, [], [])
        with pytest.raises(smtplib.SMTPRecipientsRefused, match="Greylisted"):
            send(server)


@pytest.mark.parametrize("ending", [b"\n", b"\r"])
def test_bare_line_ends_are_accepted_unless_refused(ending: bytes) -> None:
    text = b"Subject: Hello\r\n\r\nHow are" + ending + b"you?\r\n"
    for wire, codes in ((None, (354, 250)), ({"bare_lf": "reject", "bare_cr": "reject"}, (354, 550))):
        with SmtpServer(listener=wire and {"wire": wire}) as server:
            with smtplib.SMTP(server.host, server.port) as client:
                client.ehlo()
                client.mail(ALICE)
                client.rcpt(BOB)
                assert client.docmd("DATA")[0] == codes[0]
                client.send(text + b".\r\n")
                assert client.getreply()[0] == codes[1]
            assert [message.raw for message in server.inbox] == ([text] if codes[1] == 250 else [])


@pytest.mark.parametrize(
    ("html", "text", "links"),
    [
        ('<a href="https://a.example/?x=1&amp;y=2">A</a>', "", ["https://a.example/?x=1&y=2"]),
        ("<a href='http://a.example/?a=1&copy=2&lt=3&region=4&notit;&ampx&amp'>", "",
         ["http://a.example/?a=1&copy=2&lt=3&region=4&notit;&ampx&"]),
        ("<a href='http://a.example/&copy;&copy-&#x2f;&#47=&#47;=&lt;='>", "", ["http://a.example/\xa9\xa9-//=/=<="]),
        (f"<a href='http://a.example/&#{'1' * 5000};'>", "", ["http://a.example/\ufffd"]),
        ("<A HREF='HTTP://A.example/'>A</A><area href=http://b.example>", "", ["HTTP://A.example/", "http://b.example"]),
        ('<a name="x">A</a><a href="#top">B</a><a href="mailto:a@b.example">C</a><img src="http://c.example">', "", []),
        ("", "See https://a.example/x, (http://b.example/y) or http://c.example/z_(1).",
         ["https://a.example/x", "http://b.example/y", "http://c.example/z_(1)"]),
        ("", "<https://a.example/x> https://a.example/x\n\"http://b.example\"", ["https://a.example/x", "http://b.example"]),
        ('<a href="https://a.example/">A</a>', "https://a.example/ https://b.example/",
         ["https://a.example/", "https://b.example/"]),
        ("<a href='http://unclosed.example/", "", []),
        ("<img alt='<a href=\"http://a.example\">'><a b= c href = http://b.example href=http://c.example>", "",
         ["http://b.example"]),
        ("<!-- <a href=http://a.example> --><!--><a href=http://b.example></a href=http://c.example>", "",
         ["http://b.example"]),
        ("<script>'<a href=http://a.example>'</script><title><a href=http://b.example></TITLE><a href=http://c.example>",
         "", ["http://c.example"]),
        ("<!x <a href=http://a.example><a/href=http://b.example/><abbr href=http://c.example>1 < 2", "",
         ["http://b.example/"]),
        ("", "(http://a.example/(b)). [http://c.example]))", ["http://a.example/(b)", "http://c.example"]),
        ("", "no links: http:// https:/x ftp://a.example", []),
    ],
)  # fmt: skip
def test_links_are_found_in_html_and_in_text(html: str, text: str, links: list[str]) -> None:
    assert list(links_of(html, text)) == links


def test_links_of_a_message_come_from_its_parts() -> None:
    mail = EmailMessage()
    mail.set_content("Plain: https://a.example/plain\n")
    mail.add_alternative('<a href="https://a.example/html">x</a>', subtype="html")
    with SmtpServer() as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.send_message(mail, ALICE, [BOB])
        assert server.latest().links == ("https://a.example/html", "https://a.example/plain")


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("AUTH PLAIN " + b64encode(b"\0shop\0anything").decode(), "shop"),
        ("AUTH XOAUTH2 " + b64encode(b"user=shop\x01auth=Bearer t\x01\x01").decode(), "shop"),
        ("AUTH PLAIN " + b64encode(b"\0\0").decode(), ""),
    ],
)
def test_any_name_and_password_can_be_accepted(line: str, name: str) -> None:
    with SmtpServer(accept_any_auth=True, require_auth=True) as server:
        with smtplib.SMTP(server.host, server.port) as client:
            client.ehlo()
            assert "XOAUTH2" in client.esmtp_features["auth"]
            assert client.docmd(line)[0] == 235
            client.sendmail(ALICE, [BOB], TEXT)
        assert server.inbox.last.identity == name
