"""Coming from smtp-sink, Mailpit or MailHog: what each of their options is here, each row tried.

`python -m tests.journeys.test_migration` prints the rows as the table of README.md.
"""

from __future__ import annotations

import re
import smtplib
import socket
import ssl
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import pytest

from penstock.net.tls import generated_certificate
from penstock.testing import SmtpServer
from tests.journeys.running import ENVIRONMENT, Server, serving

ALICE, BOB, EVE = "alice@example.org", "bob@example.org", "eve@example.org"
TEXT = "From: alice@example.org\r\nSubject: Hello Bob\r\n\r\nHow are you?\r\n"


@dataclass(frozen=True)
class Row:
    """An option of another program."""

    theirs: str
    ours: str
    """What the table says: an option of the command, or the keys of the configuration."""
    probe: Callable[[Server], None]
    """Tries it on the server of the setup."""


@dataclass(frozen=True)
class Setup:
    """A server, and the rows that it has the options of."""

    name: str
    rows: tuple[Row, ...]
    command: str = "serve"
    arguments: tuple[str, ...] = ()
    """FOLDER stands for the server's folder."""
    toml: str = ""
    prepare: Callable[[Path], None] = lambda folder: None


# ---- what the rows are tried with


def plain(server: Server) -> smtplib.SMTP:
    return smtplib.SMTP("127.0.0.1", server.port, timeout=20)


def send(server: Server, *recipients: str, text: str = TEXT) -> None:
    with plain(server) as client:
        client.sendmail(ALICE, recipients or [BOB], text)


def takes_mail(server: Server) -> None:
    send(server)


def takes_mail_at_its_unix_socket(server: Server) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.connect(str(server.folder / "socket"))
        assert sock.makefile("rb").readline().startswith(b"220 ")


def offers_no_auth(server: Server) -> None:
    with plain(server) as client:
        client.ehlo()
        assert not client.has_extn("auth")


def prints_its_counts(server: Server) -> None:
    send(server)
    assert server.stop() == 0
    counts = r"^sessions=\d+ messages=[1-9]\d* recipients=\d+ octets=\d+$"
    assert re.search(counts, server.out.read_text(), re.MULTILINE)


def ends_after_three(server: Server) -> None:
    for _ in range(3):
        send(server)
    assert server.process.wait(timeout=20) == 0
    assert "messages=3 " in server.out.read_text()


def calls_itself(server: Server) -> None:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        assert sock.makefile("rb").readline().startswith(b"220 mx.example.org ")


def does_not_offer(*extensions: str) -> Callable[[Server], None]:
    def probe(server: Server) -> None:
        with plain(server) as client:
            client.ehlo()
            assert client.has_extn("size")
            assert not [extension for extension in extensions if client.has_extn(extension)]

    return probe


def sends_the_idle_away(server: Server) -> None:
    with closing(plain(server)) as client:
        assert client.getreply()[0] == 421


def speaks_lmtp(server: Server) -> None:
    with smtplib.LMTP("127.0.0.1", server.port) as client:
        client.sendmail(ALICE, [BOB, EVE], TEXT)
        assert client.getreply()[0] == 250  # smtplib has read one reply, and there is one for each recipient


def keeps_the_message(server: Server) -> None:
    before = len(server.messages())
    send(server)
    messages = server.messages()
    assert len(messages) == before + 1
    assert all(message.endswith(TEXT.encode()) for message in messages)
    assert all(b"Delivered-To: bob@example.org\r\n" in message for message in messages)


def journals(server: Server) -> None:
    send(server)
    assert server.stop() == 0
    assert '"event":"accepted"' in server.journal.read_text()


def context_of(server: Server) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.load_verify_locations(server.folder / "own" / "ca.pem")
    return context


def make_certificate(folder: Path) -> None:
    generated_certificate(folder / "own", ["localhost"])


def shows_its_own_certificate(server: Server) -> None:
    with smtplib.SMTP("localhost", server.port, timeout=20) as client:
        client.starttls(context=context_of(server))
        client.sendmail(ALICE, [BOB], TEXT)


def refuses_without_starttls(server: Server) -> None:
    with pytest.raises(smtplib.SMTPSenderRefused, match="Send STARTTLS first"):
        send(server)


def begins_with_tls(server: Server) -> None:
    with smtplib.SMTP_SSL("localhost", server.port, timeout=20, context=context_of(server)) as client:
        client.sendmail(ALICE, [BOB], TEXT)


def add_alice(folder: Path) -> None:
    command = [sys.executable, "-m", "penstock", "user", "add", "alice", "--password-stdin"]
    command += ["--file", str(folder / "users")]
    subprocess.run(command, input=b"secret\n", check=True, capture_output=True, env=ENVIRONMENT)


def knows_its_users(server: Server) -> None:
    with plain(server) as client:
        with pytest.raises(smtplib.SMTPAuthenticationError):
            client.login("alice", "wrong")
        client.login("alice", "secret")
        client.sendmail(ALICE, [BOB], TEXT)


def takes_passwords_in_the_clear(server: Server) -> None:
    with plain(server) as client:
        client.ehlo()
        assert {"PLAIN", "LOGIN"} <= set(client.esmtp_features["auth"].split())


def takes_a_hundred_recipients(server: Server) -> None:
    with plain(server) as client:
        recipients = [f"user{number}@example.org" for number in range(101)]
        assert client.sendmail(ALICE, recipients, TEXT) == {
            recipients[100]: (452, b"4.5.3 Too many recipients; send the rest in another transaction")
        }


def takes_three_connections(server: Server) -> None:
    opened = [plain(server) for _ in range(3)]
    with pytest.raises(smtplib.SMTPConnectError, match="Too many connections"):
        plain(server)
    for client in opened:
        client.close()


def write_policy(folder: Path) -> None:
    (folder / "recipients.py").write_text("""
import re
from penstock import Reply

class Only:
    def __init__(self, pattern):
        self.pattern = re.compile(pattern)

    def on_rcpt(self, transaction, recipient):
        if not self.pattern.search(recipient.path.text):
            return Reply(550, "5.1.1", "Not one of ours")
""")


def takes_matching_recipients_only(server: Server) -> None:
    with plain(server) as client:
        assert client.sendmail(ALICE, [BOB, "bob@example.com"], TEXT) == {
            "bob@example.com": (550, b"5.1.1 Not one of ours")
        }


def refuses_bare_cr(server: Server) -> None:
    with plain(server) as client:
        client.ehlo()
        client.docmd(f"MAIL FROM:<{ALICE}>")
        client.docmd(f"RCPT TO:<{BOB}>")
        client.docmd("DATA")
        client.send(b"Subject: x\r\r\n\r\nHello\r\n.\r\n")
        assert client.getreply()[0] == 550


# ---- the rows

CONFIGURED = 'hostname = "mx.example.org"\n[[listener]]\naddress = "127.0.0.1:0"\n'

SETUPS = (
    Setup(
        "a sink",
        command="sink",
        arguments=("--listen", "unix:FOLDER/socket"),
        rows=(
            Row("smtp-sink `127.0.0.1:2525 100`", "`penstock sink --listen 127.0.0.1:2525`", takes_mail),
            Row("smtp-sink `unix:/path 100`", "`penstock sink --listen unix:/path`", takes_mail_at_its_unix_socket),
            Row("smtp-sink `-a` (no AUTH)", "as it is: AUTH is offered where it is set up", offers_no_auth),
            Row("smtp-sink `-C`, `-F`", "as it is: no XCLIENT, no XFORWARD", does_not_offer("xclient", "xforward")),
            Row("smtp-sink `-c` (counters)", "counts at the end, `--json` for a program", prints_its_counts),
        ),
    ),
    Setup(
        "a sink with an end",
        command="sink",
        arguments=("--messages", "3"),
        rows=(Row("smtp-sink `-M 3`", "`penstock sink --messages 3`", ends_after_three),),
    ),
    Setup(
        "a language of its own",
        toml=CONFIGURED
        + "[listener.extensions]\neightbitmime = false\npipelining = false\ndsn = false\n"
        + "[listener.limits]\ncommand_timeout = 0.5\n",
        rows=(
            Row("smtp-sink `-h mx.example.org`", '`hostname = "mx.example.org"`', calls_itself),
            Row("MailHog `-hostname mx.example.org`", '`hostname = "mx.example.org"`', calls_itself),
            Row("smtp-sink `-8`", "`[listener.extensions] eightbitmime = false`", does_not_offer("8bitmime")),
            Row("smtp-sink `-p`", "`[listener.extensions] pipelining = false`", does_not_offer("pipelining")),
            Row("smtp-sink `-N`", "`[listener.extensions] dsn = false`", does_not_offer("dsn")),
            Row("smtp-sink `-t 100`", "`[listener.limits] command_timeout = 100`", sends_the_idle_away),
        ),
    ),
    Setup(
        "LMTP",
        toml=CONFIGURED + 'kind = "lmtp"\n',
        rows=(Row("smtp-sink `-L`", '`[[listener]] kind = "lmtp"`', speaks_lmtp),),
    ),
    Setup(
        "a Maildir",
        rows=(
            Row("Mailpit `--smtp 127.0.0.1:1025`", "`penstock serve --listen 127.0.0.1:1025`", takes_mail),
            Row("MailHog `-smtp-bind-addr 127.0.0.1:1025`", "`penstock serve --listen 127.0.0.1:1025`", takes_mail),
            Row("smtp-sink `-d`, `-D` (dump files)", "`penstock serve --data DIR`: DIR/maildir", keeps_the_message),
            Row("Mailpit `--database FILE`", "`penstock serve --data DIR`: DIR/maildir", keeps_the_message),
            Row(
                "MailHog `-storage maildir -maildir-path DIR`",
                "`penstock serve --data DIR`: DIR/maildir",
                keeps_the_message,
            ),
            Row("smtp-sink `-v`, Mailpit `--verbose`", "the journal on standard error", journals),
        ),
    ),
    Setup(
        "STARTTLS",
        toml=CONFIGURED + '[listener.tls]\ncertificate = "own/server.pem"\nkey = "own/server.pem"\nrequired = true\n',
        prepare=make_certificate,
        rows=(
            Row(
                "Mailpit `--smtp-tls-cert`, `--smtp-tls-key`",
                "`[listener.tls] certificate`, `key` (generated without them)",
                shows_its_own_certificate,
            ),
            Row("Mailpit `--smtp-require-starttls`", "`[listener.tls] required = true`", refuses_without_starttls),
        ),
    ),
    Setup(
        "implicit TLS",
        toml=CONFIGURED + '[listener.tls]\nmode = "implicit"\ncertificate = "own/server.pem"\n',
        prepare=make_certificate,
        rows=(Row("Mailpit `--smtp-require-tls`", '`[listener.tls] mode = "implicit"`', begins_with_tls),),
    ),
    Setup(
        "users",
        toml=CONFIGURED + "[listener.auth]\nwithout_tls = true\n",
        prepare=add_alice,
        rows=(
            Row("Mailpit `--smtp-auth-file`", "`[listener.auth]`, `penstock user add NAME`", knows_its_users),
            Row(
                "Mailpit `--smtp-auth-allow-insecure`",
                "`[listener.auth] without_tls = true`",
                takes_passwords_in_the_clear,
            ),
        ),
    ),
    Setup(
        "limits",
        toml=CONFIGURED + "[listener.limits]\nrecipients = 100\n[admission]\nconnections = 3\n",
        rows=(
            Row(
                "Mailpit `--smtp-max-recipients 100`",
                "`[listener.limits] recipients = 100`",
                takes_a_hundred_recipients,
            ),
            Row("smtp-sink `-m 3`", "`[admission] connections = 3`; more hear 421", takes_three_connections),
            Row("Mailpit `--smtp-strict-rfc-headers`", "as it is: a bare CR is refused", refuses_bare_cr),
        ),
    ),
    Setup(
        "a policy",
        toml=CONFIGURED
        + "[[check]]\nhook = 'FOLDER/recipients.py:Only'\narguments = { pattern = '@example\\.org$' }\n",
        prepare=write_policy,
        rows=(
            Row(
                "Mailpit `--smtp-allowed-recipients REGEX`",
                "`domains`, or a `[[check]]` of your own in Python",
                takes_matching_recipients_only,
            ),
        ),
    ),
)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_what_the_table_says_is_so(tmp_path: Path, setup: Setup) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    setup.prepare(folder)
    arguments = [argument.replace("FOLDER", str(folder)) for argument in setup.arguments]
    with serving(folder, setup.toml.replace("FOLDER", str(folder)), setup.command, *arguments) as server:
        for row in setup.rows:
            row.probe(server)


# ---- the interfaces of programs: here the inbox is an object of the test

API_ROWS = (
    ("Mailpit `GET /api/v1/messages`, MailHog `GET /api/v2/messages`", "`smtp_server.inbox`"),
    ("Mailpit `GET /api/v1/message/latest`", "`inbox.last`"),
    ("Mailpit `GET /api/v1/message/ID/raw`", "`inbox[n].raw`"),
    ("Mailpit `GET /api/v1/search?query=to:bob@...`, MailHog `/api/v2/search`", "`inbox.wait_for(recipient=...)`"),
    ("Mailpit and MailHog `DELETE /api/v1/messages`", "`inbox.clear()`"),
)


def test_the_inbox_does_what_their_interfaces_do() -> None:
    with SmtpServer() as server:
        inbox = server.inbox
        with smtplib.SMTP(server.host, server.port) as client:
            client.sendmail(ALICE, [BOB], TEXT)
            client.sendmail(BOB, [EVE], TEXT.replace("Hello Bob", "Hello Eve"))
        assert [message.subject for message in inbox] == ["Hello Bob", "Hello Eve"]
        assert inbox.last.recipients == (EVE,)
        assert inbox[0].raw == TEXT.encode()
        assert inbox.wait_for(recipient=BOB, subject="Hello").sender == ALICE
        inbox.clear()
        assert len(inbox) == 0


def table() -> str:
    """Return the rows as a table in Markdown, in the order of the programs.

    Keys of the configuration are those of a file for `penstock serve --config FILE`.
    """
    rows = [(row.theirs, row.ours) for setup in SETUPS for row in setup.rows] + list(API_ROWS)
    programs = ["smtp-sink", "Mailpit", "MailHog"]
    rows.sort(key=lambda row: programs.index(row[0].split()[0]))
    return "\n".join(["| there | here |", "|---|---|", *(f"| {theirs} | {ours} |" for theirs, ours in rows)])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
