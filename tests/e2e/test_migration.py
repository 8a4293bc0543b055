"""Migration from smtp-sink, Mailpit or MailHog: the equivalent of each of their options, every row tried.

`python -m tests.e2e.test_migration` prints the rows as the table of README.md.
"""

from __future__ import annotations

import mailbox
import re
import shlex
import smtplib
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from penstock.net.tls import generated_certificate
from penstock.testing import SmtpServer
from tests.e2e.running import ENVIRONMENT, Server, serving

ALICE, BOB, EVE = "alice@example.org", "bob@example.org", "eve@example.org"
TEXT = "From: alice@example.org\r\nSubject: Hello Bob\r\n\r\nHow are you?\r\n"
SHORT = 0.2
"""Seconds of a delay that is distinguishable from none."""

Probe = Callable[[Server], None]


@dataclass(frozen=True)
class Row:
    """An option of another program."""

    theirs: str
    ours: str
    """The equivalent: an option of a command, or keys of a configuration or a fault plan."""
    probe: Probe
    """Tries the row on the server of the setup."""


@dataclass(frozen=True)
class Setup:
    """A server, and the rows whose options it has. FOLDER stands for the folder of the server."""

    name: str
    rows: tuple[Row, ...]
    command: str = "sink"
    arguments: str = ""
    has_address: bool = False
    toml: str = ""
    """The configuration of the server."""
    prepare: Callable[[Path], None] = lambda folder: None


# ---- clients


def plain(server: Server) -> smtplib.SMTP:
    return smtplib.SMTP("127.0.0.1", server.port, timeout=20)


@contextmanager
def greeted(server: Server) -> Iterator[smtplib.SMTP]:
    """Yield a client that has sent EHLO and is closed without QUIT."""
    client = plain(server)
    with closing(client):
        client.ehlo("client.example.org")
        yield client


def send(server: Server, *recipients: str, sender: str = ALICE) -> None:
    with plain(server) as client:
        client.sendmail(sender, recipients or [BOB], TEXT)


def greeting_of(server: Server) -> bytes:
    with socket.create_connection(("127.0.0.1", server.port), timeout=20) as sock:
        return sock.makefile("rb").readline()


def takes_mail(server: Server) -> None:
    send(server)


def does_not_offer(*extensions: str) -> Probe:
    def probe(server: Server) -> None:
        with greeted(server) as client:
            assert client.has_extn("chunking")
            assert not [extension for extension in extensions if client.has_extn(extension)]

    return probe


def greets_with(text: bytes) -> Probe:
    def probe(server: Server) -> None:
        assert text in greeting_of(server)

    return probe


def answers(command: str, code: int, text: str = "") -> Probe:
    """Return a probe: the command receives this reply; 421 closes the connection."""

    def probe(server: Server) -> None:
        with greeted(server) as client:
            found, said = client.docmd(command)
            assert (found, text in said.decode()) == (code, True), said
            if code == 421:
                with pytest.raises(smtplib.SMTPServerDisconnected):
                    client.noop()

    return probe


def hangs_up_at(command: str) -> Probe:
    def probe(server: Server) -> None:
        with greeted(server) as client, pytest.raises(smtplib.SMTPServerDisconnected):
            client.docmd(command)

    return probe


def waits_at(command: str, *before: str) -> Probe:
    """Return a probe: the reply to the command is delayed, those to others are not."""

    def probe(server: Server) -> None:
        with greeted(server) as client:
            for each in before:
                client.docmd(each)
            began = time.monotonic()
            client.docmd(command)
            assert time.monotonic() - began >= SHORT * 0.9  # the clocks of two processors may differ

    return probe


def reads_no_text_for_a_while(server: Server) -> None:
    began = time.monotonic()
    send(server)
    assert time.monotonic() - began >= SHORT * 0.9  # the clocks of two processors may differ


def refuses_the_text_before_its_end(server: Server) -> None:
    with greeted(server) as client:
        client.docmd(f"MAIL FROM:<{ALICE}>")
        client.docmd(f"RCPT TO:<{BOB}>")
        assert client.docmd("DATA")[0] == 354
        assert client.getreply()[0] == 550


def knows_no_ehlo(server: Server) -> None:
    with closing(plain(server)) as client:
        assert client.ehlo()[0] == 500
        assert client.helo()[0] == 250
    send(server)  # as a client that falls back to HELO


def serves_lmtp_at_its_socket(server: Server) -> None:
    with smtplib.LMTP(str(server.folder / "socket")) as client:
        client.sendmail(ALICE, [BOB, EVE], TEXT)
        assert client.getreply()[0] == 250  # smtplib reads one reply; LMTP has one for each recipient


def takes_three_connections(server: Server) -> None:
    opened = [plain(server) for _ in range(3)]
    with pytest.raises(smtplib.SMTPConnectError, match="Too many connections"):
        plain(server)
    for client in opened:
        client.close()
    for _ in range(10_000):  # a connection counts until the server has seen its end
        try:
            plain(server).close()
        except smtplib.SMTPConnectError:
            continue
        return
    raise AssertionError("the server counts connections that have ended")


def sends_the_idle_away(server: Server) -> None:
    with closing(plain(server)) as client:
        assert client.getreply()[0] == 421


def shows_counters(server: Server) -> None:
    send(server)
    assert server.stop() == 0
    server_said = server.out.read_text() + server.journal.read_text()
    assert re.search(r"messages\W+[1-9]", server_said)


def ends_after_three_messages(server: Server) -> None:
    for _ in range(3):
        send(server)
    assert server.process.wait(timeout=20) == 0
    assert "messages=3 " in server.out.read_text()


def ends_after_two_sessions(server: Server) -> None:
    for _ in range(2):
        with plain(server):
            pass
    assert server.process.wait(timeout=20) == 0


def journals(server: Server) -> None:
    send(server)
    assert server.stop() == 0
    assert '"event":"accepted"' in server.journal.read_text()


# ---- kept messages, web page and API


def kept_in_a_maildir(server: Server) -> None:
    before = len(server.messages())
    send(server)
    assert len(server.messages(before + 1)) == before + 1
    assert [message["Subject"] for message in mailbox.Maildir(server.folder / "maildir")][-1:] == ["Hello Bob"]


def writes_dumps(server: Server) -> None:
    send(server)
    (one,) = server.folder.glob("one.*")
    for path in (one, server.folder / "all"):
        assert path.read_text().startswith("--X-Client-Addr: 127.0.0.1\nX-Client-Proto: ESMTP\n")


def kept_in_a_file(server: Server) -> None:
    send(server)
    assert "Hello Bob" in (server.folder / "mail.mbox").read_text()
    assert "bob@example.org" in (server.folder / "mail.jsonl").read_text()


def asking(server: Server) -> httpx.Client:
    return httpx.Client(base_url=server.said(r"live page at (http://\S+)")[1], timeout=20)


def shows_a_page(server: Server) -> None:
    with asking(server) as client:
        assert client.get("/").headers["content-type"].startswith("text/html")
        assert client.get("/api/health").json() == {"status": "ok"}


def keeps_three_messages(server: Server) -> None:
    with asking(server) as client:
        for _ in range(4):
            send(server)
        assert len(client.get("/api/messages").json()["messages"]) == 3


def lists_reads_finds_and_forgets(server: Server) -> None:
    with asking(server) as client:
        send(server, EVE)
        newest = client.get("/api/messages").json()["messages"][0]
        assert (newest["subject"], newest["recipients"]) == ("Hello Bob", [EVE])
        assert client.get(f"/api/messages/{newest['id']}").json()
        assert client.get(f"/api/messages/{newest['id']}/raw").text == TEXT
        assert client.get(f"/api/messages/{newest['id']}/parts/0").text.strip() == "How are you?"
        assert [each["id"] for each in client.get("/api/messages?q=eve@").json()["messages"]] == [newest["id"]]
        assert client.delete("/api/messages").status_code == 200
        assert client.get("/api/messages").json()["messages"] == []


def takes_a_plan_while_it_runs(server: Server) -> None:
    with asking(server) as client:
        plan = '[[rule]]\nphase = "mail"\nreply = "451"\nmatch = { probability = 1.0 }\n'
        assert client.put("/api/plan", content=plan).status_code == 200
        assert 'phase = "mail"' in client.get("/api/plan").text
        with pytest.raises(smtplib.SMTPSenderRefused):
            send(server)
        assert client.put("/api/plan", content="").status_code == 200
        send(server)


def wants_a_token(server: Server) -> None:
    with asking(server) as client:
        assert client.get("/api/receipts").status_code == 401
        assert client.get("/api/receipts", headers={"Authorization": "Bearer open-sesame"}).status_code == 200


def lets_anybody_in(server: Server) -> None:
    with plain(server) as client:
        client.login("whoever", "whatever")
        client.sendmail(ALICE, [BOB], TEXT)


# ---- TLS, users, limits and policies of a listener


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
    with greeted(server) as client:
        assert {"PLAIN", "LOGIN"} <= set(client.esmtp_features["auth"].split())


def takes_a_hundred_recipients(server: Server) -> None:
    with plain(server) as client:
        recipients = [f"user{number}@example.org" for number in range(101)]
        assert client.sendmail(ALICE, recipients, TEXT) == {
            recipients[100]: (452, b"4.5.3 Too many recipients; send the rest in another transaction")
        }


def write_policy(folder: Path) -> None:
    (folder / "recipients.py").write_text("""
import re
import shlex
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
        refused = client.sendmail(ALICE, [BOB, "bob@example.com"], TEXT)
    assert refused == {"bob@example.com": (550, b"5.1.1 Not one of ours")}


def refuses_bare_cr(server: Server) -> None:
    with greeted(server) as client:
        client.docmd(f"MAIL FROM:<{ALICE}>")
        client.docmd(f"RCPT TO:<{BOB}>")
        client.docmd("DATA")
        client.send(b"Subject: x\r\r\n\r\nHello\r\n.\r\n")
        assert client.getreply()[0] == 550


# ---- probabilities with a seed

MANY = 40


def some(happens: Callable[[Server, int], bool]) -> Probe:
    """Return a probe: the outcome differs among many attempts. The seed makes it repeatable."""

    def probe(server: Server) -> None:
        assert 0 < sum(happens(server, number) for number in range(MANY)) < MANY

    return probe


def sender_is_refused(server: Server, number: int) -> bool:
    with greeted(server) as client:
        return client.docmd(f"MAIL FROM:<sender{number}@example.org>")[0] == 451


def recipient_is_refused(server: Server, number: int) -> bool:
    with greeted(server) as client:
        client.docmd("MAIL FROM:<>")
        return client.docmd(f"RCPT TO:<rcpt{number}@example.org>")[0] == 451


def login_is_refused(server: Server, number: int) -> bool:
    with greeted(server) as client:
        return client.docmd("AUTH PLAIN AGEAYg==")[0] == 535


def connection_is_refused(server: Server, number: int) -> bool:
    with closing(smtplib.SMTP()) as client:
        try:
            return client.connect("127.0.0.1", server.port)[0] != 220
        except (smtplib.SMTPServerDisconnected, ConnectionResetError):
            return True


def connection_is_cut(server: Server, number: int) -> bool:
    with closing(smtplib.SMTP()) as client:
        try:
            client.connect("127.0.0.1", server.port)
            client.ehlo("client.example.org")
            return client.docmd("MAIL FROM:<>")[0] != 250
        except (smtplib.SMTPServerDisconnected, ConnectionResetError):
            return True


CHAOS = """
[[rule]]
phase = "mail"
reply = "451"
match = { probability = 0.4, sender = ["sender*"] }

[[rule]]
phase = "rcpt"
reply = "451"
match = { probability = 0.4, recipient = ["rcpt*"] }

[[rule]]
phase = "auth"
reply = "535"
match = { probability = 0.4 }
"""

JIM = """
[[rule]]
phase = "connect"
end = "drop"
match = { probability = 0.3 }

[[rule]]
phase = "mail"
end = "drop"
match = { probability = 0.4 }
"""

SLOW = """
[[rule]]
phase = "connect"
read_rate = 400
"""


def write_plan(text: str) -> Callable[[Path], None]:
    def prepare(folder: Path) -> None:
        (folder / "plan.toml").write_text(text)

    return prepare


def reads_slowly(server: Server) -> None:
    began = time.monotonic()
    send(server)
    assert time.monotonic() - began >= SHORT * 0.9  # the clocks of two processors may differ


# ---- the rows

CONFIGURED = 'hostname = "mx.example.org"\n[[listener]]\naddress = "127.0.0.1:0"\n'
KEEPING = "--keep last:3 --keep maildir:FOLDER/maildir --keep mbox:FOLDER/mail.mbox --keep jsonl:FOLDER/mail.jsonl"
PLAN = "--faults FOLDER/plan.toml --seed 1"


def same(letter: str, probe: Probe) -> Row:
    """Return the row of an option that `penstock sink` has as well."""
    return Row(f"smtp-sink `{letter}`", f"the same: `penstock sink {letter}`", probe)


SETUPS = (
    Setup(
        "letters of smtp-sink for what is offered",
        arguments="-4 -8 -a -C -E -F -N -p -T 65000 -h sink.example.org -m 3 -t 1 -c 127.0.0.1:0 100",
        has_address=True,
        rows=(
            same("[inet:][host]:port backlog", takes_mail),
            same("-4", takes_mail),
            same("-8", does_not_offer("8bitmime")),
            same("-a", does_not_offer("auth")),
            same("-C", does_not_offer("xclient")),
            same("-E", does_not_offer("enhancedstatuscodes")),
            same("-F", does_not_offer("xforward")),
            same("-N", does_not_offer("dsn")),
            same("-p", does_not_offer("pipelining")),
            same("-T 65000", takes_mail),
            same("-h NAME", greets_with(b"220 sink.example.org ")),
            Row(
                "smtp-sink `-m 3`",
                "the same, but further clients receive 421 instead of waiting",
                takes_three_connections,
            ),
            same("-t 1", sends_the_idle_away),
            same("-c", shows_counters),
        ),
    ),
    Setup(
        "letters of smtp-sink for replies",
        arguments="-f VRFY -B '554 5.9.1 Hard' -r RSET -b '459 4.9.1 Soft' -q NOOP -Q HELP",
        rows=(
            same("-f COMMAND,...", answers("VRFY bob", 554)),
            same("-B REPLY", answers("VRFY bob", 554, "5.9.1 Hard")),
            same("-r COMMAND,...", answers("RSET", 459)),
            same("-b REPLY", answers("RSET", 459, "4.9.1 Soft")),
            same("-q COMMAND,...", hangs_up_at("NOOP")),
            same("-Q COMMAND,...", answers("HELP", 421)),
        ),
    ),
    Setup(
        "letters of smtp-sink for delays",
        arguments=f"-w {SHORT} -W NOOP:{SHORT} -W RSET:{SHORT}:50 -H {SHORT}",
        rows=(
            same("-w DELAY", waits_at("DATA", f"MAIL FROM:<{ALICE}>", f"RCPT TO:<{BOB}>")),
            same("-W COMMAND:DELAY", waits_at("NOOP")),
            same("-W COMMAND:DELAY:ODDS", waits_at("RSET")),
            same("-H DELAY", reads_no_text_for_a_while),
        ),
    ),
    Setup("smtp-sink -e", arguments="-e", rows=(same("-e", knows_no_ehlo),)),
    Setup("smtp-sink -P", arguments="-P", rows=(same("-P", greets_with(b"********")), same("-P", knows_no_ehlo))),
    Setup("smtp-sink -A", arguments="-A 0", rows=(same("-A DELAY", refuses_the_text_before_its_end),)),
    Setup(
        "smtp-sink -L",
        arguments="-L unix:FOLDER/socket 100",
        has_address=True,
        rows=(same("-L", serves_lmtp_at_its_socket), same("unix:PATH backlog", serves_lmtp_at_its_socket)),
    ),
    Setup("smtp-sink -M", arguments="-M 3", rows=(same("-M COUNT", ends_after_three_messages),)),
    Setup("smtp-sink -n", arguments="-n 2", rows=(same("-n COUNT", ends_after_two_sessions),)),
    Setup(
        "letters of smtp-sink for the log",
        arguments="-v -s MAIL",
        rows=(
            Row("smtp-sink `-v`", "the same; all events are journaled on standard error", takes_mail),
            Row("smtp-sink `-s COMMAND,...`", "the same; all mail events are journaled on standard error", journals),
        ),
    ),
    Setup(
        "dumps",
        arguments="-d FOLDER/one. -D FOLDER/all -S --",
        rows=(
            Row(
                "smtp-sink `-d TEMPLATE`, `-D TEMPLATE`, `-S STRING`",
                "the same options; the order of the parameters of MAIL and RCPT differs",
                writes_dumps,
            ),
        ),
    ),
    Setup(
        "keeping and showing",
        arguments=f"{KEEPING} --web 127.0.0.1:0",
        rows=(
            Row(
                "MailHog `-storage maildir -maildir-path DIR`", "`penstock sink --keep maildir:DIR`", kept_in_a_maildir
            ),
            Row("Mailpit `--database FILE`", "`penstock sink --keep mbox:FILE`, `jsonl:FILE`", kept_in_a_file),
            Row("Mailpit `--smtp ADDRESS`", "`penstock sink --listen ADDRESS`", takes_mail),
            Row("Mailpit `--listen ADDRESS`", "`penstock sink --web ADDRESS`", shows_a_page),
            Row("Mailpit `--max 3`", "`penstock sink --keep last:3`", keeps_three_messages),
            Row("Mailpit `/readyz`, `/livez`", "`GET /api/health`", shows_a_page),
            Row(
                "Mailpit `/api/v1/messages`, `/message/ID`, `/message/ID/raw`, `/search`",
                "`/api/messages`, `/api/messages/ID`, `/api/messages/ID/raw`, `?q=`; in a test, `smtp_server.inbox`",
                lists_reads_finds_and_forgets,
            ),
            Row("Mailpit `PUT /api/v1/chaos`", "`PUT /api/plan`", takes_a_plan_while_it_runs),
            Row("MailHog `-smtp-bind-addr ADDRESS`", "`penstock sink --listen ADDRESS`", takes_mail),
            Row("MailHog `-ui-bind-addr`, `-api-bind-addr`", "`penstock sink --web ADDRESS`", shows_a_page),
            Row("MailHog `-storage memory`", "`penstock sink --keep last:N`", keeps_three_messages),
            Row(
                "MailHog `/api/v2/messages`, `/api/v2/search`, `/api/v1/messages/ID/download`",
                "`/api/messages`, `?q=`, `/api/messages/ID/raw`; in a test, `smtp_server.inbox`",
                lists_reads_finds_and_forgets,
            ),
            Row("MailHog `PUT /api/v2/jim`", "`PUT /api/plan`", takes_a_plan_while_it_runs),
        ),
    ),
    Setup(
        "a page with a lock",
        arguments="--web 127.0.0.1:0 --web-token open-sesame --auth",
        rows=(
            Row("Mailpit `--ui-auth-file`", "`penstock sink --web-token TOKEN`", wants_a_token),
            Row("MailHog `-auth-file`", "`penstock sink --web-token TOKEN`", wants_a_token),
            Row("Mailpit `--smtp-auth-accept-any`", "`penstock sink --auth`", lets_anybody_in),
            Row("Mailpit `--smtp-auth-allow-insecure`", "`penstock sink --auth`", takes_passwords_in_the_clear),
        ),
    ),
    Setup(
        "chaos of Mailpit",
        arguments=f"{PLAN} --auth",
        prepare=write_plan(CHAOS),
        rows=(
            Row(
                "Mailpit `--chaos-triggers Sender:451:40`",
                '`phase = "mail"`, `reply = "451"`, `match.probability = 0.4` in `--faults PLAN`',
                some(sender_is_refused),
            ),
            Row(
                "Mailpit `--chaos-triggers Recipient:451:40`",
                '`phase = "rcpt"`, `reply = "451"`, `match.probability = 0.4`',
                some(recipient_is_refused),
            ),
            Row(
                "Mailpit `--chaos-triggers Authentication:535:40`",
                '`phase = "auth"`, `reply = "535"`, `match.probability = 0.4`',
                some(login_is_refused),
            ),
            Row(
                "MailHog `-jim-reject-sender=0.4`",
                '`phase = "mail"`, `reply = "451"`, `match.probability = 0.4`',
                some(sender_is_refused),
            ),
            Row(
                "MailHog `-jim-reject-recipient=0.4`",
                '`phase = "rcpt"`, `reply = "451"`, `match.probability = 0.4`',
                some(recipient_is_refused),
            ),
            Row(
                "MailHog `-jim-reject-auth=0.4`",
                '`phase = "auth"`, `reply = "535"`, `match.probability = 0.4`',
                some(login_is_refused),
            ),
        ),
    ),
    Setup(
        "Jim of MailHog",
        arguments=PLAN,
        prepare=write_plan(JIM),
        rows=(
            Row(
                "MailHog `-jim-accept=0.7`",
                '`phase = "connect"`, `end = "drop"`, `match.probability = 0.3`',
                some(connection_is_refused),
            ),
            Row(
                "MailHog `-jim-disconnect=0.4`",
                '`phase = "mail"` (or another), `end = "drop"`, `match.probability = 0.4`',
                some(connection_is_cut),
            ),
        ),
    ),
    Setup(
        "Jim's slow link",
        arguments=PLAN,
        prepare=write_plan(SLOW),
        rows=(
            Row(
                "MailHog `-jim-linkspeed-affect`, `-min`, `-max`",
                '`phase = "connect"`, `read_rate`, `write_rate`, `match.probability`',
                reads_slowly,
            ),
        ),
    ),
    Setup(
        "a name",
        command="serve",
        toml=CONFIGURED + '[listener.wire]\nbare_cr = "reject"\n',
        rows=(
            Row(
                "MailHog `-hostname mx.example.org`",
                '`penstock sink -h mx.example.org`; `hostname = "mx.example.org"` of `penstock serve`',
                greets_with(b"220 mx.example.org "),
            ),
            Row(
                "Mailpit `--smtp-strict-rfc-headers`",
                '`penstock serve`: `[listener.wire] bare_cr = "reject"`',
                refuses_bare_cr,
            ),
        ),
    ),
    Setup(
        "STARTTLS",
        toml=CONFIGURED + "[listener.tls]\nrequired = true\n",
        arguments="--certificate FOLDER/own/server.pem --key FOLDER/own/server.pem",
        prepare=make_certificate,
        rows=(
            Row(
                "Mailpit `--smtp-tls-cert`, `--smtp-tls-key`",
                "`penstock sink --certificate FILE --key FILE`; a generated certificate: `--ca-file FILE`",
                shows_its_own_certificate,
            ),
            Row(
                "Mailpit `--smtp-require-starttls`",
                "`penstock sink --config FILE`: `[listener.tls] required = true`",
                refuses_without_starttls,
            ),
        ),
    ),
    Setup(
        "implicit TLS",
        arguments="--tls implicit --certificate FOLDER/own/server.pem",
        prepare=make_certificate,
        rows=(Row("Mailpit `--smtp-require-tls`", "`penstock sink --tls implicit`", begins_with_tls),),
    ),
    Setup(
        "users",
        toml='data_dir = "."\n' + CONFIGURED + "[listener.auth]\nwithout_tls = true\n",
        prepare=add_alice,
        rows=(
            Row(
                "Mailpit `--smtp-auth-file`",
                "`penstock sink --config FILE`: `[listener.auth]`, and `penstock user add NAME`",
                knows_its_users,
            ),
        ),
    ),
    Setup(
        "limits",
        toml=CONFIGURED + "[listener.limits]\nrecipients = 100\n",
        rows=(
            Row(
                "Mailpit `--smtp-max-recipients 100`",
                "`penstock sink --config FILE`: `[listener.limits] recipients = 100`",
                takes_a_hundred_recipients,
            ),
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
                "`penstock sink --config FILE`: `domains`, or a `[[check]]` policy in Python",
                takes_matching_recipients_only,
            ),
        ),
    ),
)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: setup.name)
def test_every_row_of_the_table_works(tmp_path: Path, setup: Setup) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    setup.prepare(folder)
    here = str(folder)
    arguments = [each.replace("FOLDER", here) for each in shlex.split(setup.arguments)]
    toml = setup.toml.replace("FOLDER", here)
    with serving(folder, toml, setup.command, *arguments, has_address=setup.has_address) as server:
        for row in setup.rows:
            row.probe(server)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("-R /var/empty", "-R of smtp-sink"),
        ("-S From", "-S requires -d or -D"),
        ("-u nobody-like-this", "there is no user 'nobody-like-this'"),
    ],
)
def test_unsupported_options_name_an_alternative(arguments: str, told: str) -> None:
    command = [sys.executable, "-m", "penstock", "sink", *arguments.split(), "127.0.0.1:0", "100"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=60, env=ENVIRONMENT, check=False)
    assert found.returncode == 2
    assert told in found.stderr


def test_the_inbox_replaces_their_apis() -> None:
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
    """Return the rows as a Markdown table, ordered by program; identical options of smtp-sink share one row."""
    rows = list(dict.fromkeys((row.theirs, row.ours) for setup in SETUPS for row in setup.rows))
    letters = [theirs.removeprefix("smtp-sink ") for theirs, ours in rows if ours.startswith("the same: `penstock")]
    rest = [row for row in rows if not row[1].startswith("the same: `penstock")]
    programs = ["smtp-sink", "Mailpit", "MailHog"]
    rest.sort(key=lambda row: programs.index(row[0].split()[0]))
    shown = [(f"smtp-sink {', '.join(letters)}", "the same options of `penstock sink`"), *rest]
    return "\n".join(["| there | here |", "|---|---|", *(f"| {theirs} | {ours} |" for theirs, ours in shown)])


if __name__ == "__main__":
    sys.stdout.write(table() + "\n")
