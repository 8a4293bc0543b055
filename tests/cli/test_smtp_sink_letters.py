"""The options of smtp-sink, each tried on a real sink; unsupported ones name an alternative."""

from __future__ import annotations

import os
import pwd
import socket
import struct
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
from click.testing import CliRunner

from penstock.cli.main import main
from penstock.cli.smtpsink import LETTERS, smtp_sink_help
from tests.e2e.running import Server, serving


class Client:
    """A client that sees every octet."""

    def __init__(self, server: Server) -> None:
        self.socket = socket.create_connection(("127.0.0.1", server.port), timeout=20)
        self._file = self.socket.makefile("rb")

    def reply(self) -> list[str]:
        """Return the lines of the next reply; [] if the server has closed."""
        lines = []
        while line := self._file.readline().decode():
            lines.append(line.rstrip())
            if line[3:4] != "-":
                break
        return lines

    def ask(self, *lines: str) -> str:
        """Send lines, and return the last line of the last reply; "" if the server has closed."""
        said: list[str] = []
        for line in lines:
            self.socket.sendall(f"{line}\r\n".encode())
            said = self.reply()
        return said[-1] if said else ""

    def mail(self) -> str:
        """Send a message, and return the reply to its dot."""
        self.ask("EHLO client.example", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>", "DATA")
        return self.ask("Hello\r\n.")

    def close(self) -> None:
        self._file.close()
        self.socket.close()


@contextmanager
def client_of(server: Server) -> Iterator[Client]:
    client = Client(server)
    try:
        yield client
    finally:
        client.close()


@dataclass(frozen=True)
class Row:
    """Options, and the observations of clients, one after the other."""

    arguments: tuple[str, ...]
    probes: tuple[Callable[[Server, Client], None], ...]

    def __str__(self) -> str:
        return " ".join(self.arguments)


def dumps_a_message(server: Server, client: Client) -> None:
    assert client.reply()[0].startswith("220")
    assert client.mail().startswith("250")
    (one,) = server.folder.glob("one.*")
    assert one.read_text().startswith("x-X-Client-Addr: ")
    assert "X-Mail-Args: <a@example.com>" in (server.folder / "all").read_text()


def offers_not(*keywords: str) -> Callable[[Server, Client], None]:
    def probe(server: Server, client: Client) -> None:
        client.reply()
        client.socket.sendall(b"EHLO client.example\r\n")
        offered = [line[4:].split(" ")[0] for line in client.reply()]
        assert "SIZE" in offered
        assert not set(keywords) & set(offered)

    return probe


def greets(*greeting: str) -> Callable[[Server, Client], None]:
    def probe(server: Server, client: Client) -> None:
        assert client.reply() == list(greeting)

    return probe


def says(expected: str, *lines: str) -> Callable[[Server, Client], None]:
    """Expect a reply to the last of some lines; "" is the end of the connection."""

    def probe(server: Server, client: Client) -> None:
        client.reply()
        said = client.ask(*lines)
        assert said.startswith(expected) if expected else not said

    return probe


BEGIN = ("EHLO client.example", "MAIL FROM:<a@example.com>", "RCPT TO:<b@example.org>")
HARD, SOFT = "500 5.3.0 Error: command failed", "450 4.3.0 Error: command failed"


def waits(seconds: float, *lines: str) -> Callable[[Server, Client], None]:
    def probe(server: Server, client: Client) -> None:
        client.reply()
        client.ask(*lines[:-1])
        began = time.monotonic()
        assert client.ask(lines[-1])[:1] in "23"
        assert time.monotonic() - began >= seconds * 0.9  # the clocks of two processors may differ by a millisecond

    return probe


def is_abandoned(server: Server, client: Client) -> None:
    client.reply()
    assert client.ask(*BEGIN, "DATA").startswith("354")
    assert client.reply() == ["550 5.0.0 This violates SMTP"]
    assert client.reply() == []


def speaks_no_esmtp(server: Server, client: Client) -> None:
    assert client.reply() == ["220 localhost"]
    assert client.ask("EHLO client.example") == "500 5.5.1 Error: unknown command"
    assert client.ask("HELO client.example") == "250 localhost"


def looks_like_a_pix(server: Server, client: Client) -> None:
    assert client.reply() == ["220 ********"]
    assert client.ask("EHLO client.example").startswith("500")


def speaks_lmtp(server: Server, client: Client) -> None:
    client.reply()
    assert client.ask("EHLO client.example").startswith("500")
    assert client.ask("LHLO client.example").startswith("250")


def takes_two_connections(server: Server, client: Client) -> None:
    client.reply()
    with client_of(server) as second, client_of(server) as third:
        assert second.reply()[0].startswith("220")
        assert third.reply()[0].startswith("421")


def ends_after_two_messages(server: Server, client: Client) -> None:
    client.reply()
    client.mail()
    assert client.mail().startswith("250")
    assert server.process.wait(timeout=60) == 0


def ends_after_two_sessions(server: Server, client: Client) -> None:
    client.reply()
    client.ask("QUIT")
    with client_of(server) as second:
        second.reply()
        assert second.ask("QUIT").startswith("221")
    assert server.process.wait(timeout=60) == 0


def is_sent_away(server: Server, client: Client) -> None:
    client.reply()
    assert client.reply()[0].startswith("421 4.4.2")


def has_a_small_window(server: Server, client: Client) -> None:
    # tcpi_rcv_space belongs to the peer; this end only sees how much the peer buffers without reading.
    client.reply()
    with client_of(server) as later:
        later.reply()
        window = struct.unpack_from("I", later.socket.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 228)[0]
        assert 0 < window < 20_000


def journals_mail(server: Server, client: Client) -> None:
    client.reply()
    client.mail()
    server.stop()
    assert '"event":"accepted"' in server.journal.read_text()


def journals_all(server: Server, client: Client) -> None:
    journals_mail(server, client)
    assert '"event":"connected"' in server.journal.read_text()


def shows_counters(server: Server, client: Client) -> None:
    client.reply()
    client.mail()
    deadline = time.monotonic() + 20
    while " 1 messages " not in server.journal.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert " 1 messages " in server.journal.read_text()


ROWS = (
    Row(("-4",), (says("250", *BEGIN),)),
    Row(("-6",), (says("250", *BEGIN),)),
    Row(
        ("-8", "-a", "-C", "-E", "-F", "-N", "-p"),
        (offers_not("8BITMIME", "AUTH", "XCLIENT", "ENHANCEDSTATUSCODES", "XFORWARD", "DSN", "PIPELINING"),),
    ),
    Row(("-A", "0"), (is_abandoned,)),
    Row(
        ("-f", "rcpt", "-B", "553 5.1.3 No", "-r", "noop", "-b", "451 4.7.1 Later"),
        (says("553 5.1.3 No", *BEGIN), says("451 4.7.1 Later", "NOOP")),
    ),
    Row(("-c", "-s", "MAIL,RCPT"), (shows_counters, journals_mail)),
    Row(("-d", "FOLDER/one.", "-D", "FOLDER/all", "-S", "x-"), (dumps_a_message,)),
    Row(("-e",), (speaks_no_esmtp,)),
    Row(("-f", "rset, HELO"), (says(HARD, "RSET"), says(HARD, "HELO x"), offers_not("PIPELINING"))),
    Row(("-f", "connect"), (greets(HARD),)),
    Row(
        ("-f", ".", "-h", "mx.example.org"),
        (says(HARD, *BEGIN, "DATA", "."), greets("220 mx.example.org ESMTP Penstock")),
    ),
    Row(("-L",), (speaks_lmtp,)),
    Row(("-m", "2"), (takes_two_connections,)),
    Row(("-M", "2"), (ends_after_two_messages,)),
    Row(("-n", "2"), (ends_after_two_sessions,)),
    Row(("-P",), (looks_like_a_pix,)),
    Row(
        ("-q", "MAIL", "-Q", "RSET", "-r", "EHLO VRFY"),
        (
            says("", "HELO x", "MAIL FROM:<a@example.com>"),
            says("421 4.0.0 Server closing connection", "RSET"),
            says(SOFT, "EHLO client.example"),
            says(SOFT, "VRFY bob"),
        ),
    ),
    Row(("-q", "CONNECT"), (greets(),)),
    Row(("-t", "0.3"), (is_sent_away,)),
    Row(("-T", "4096"), (has_a_small_window,)),
    Row(("-u", pwd.getpwuid(os.geteuid()).pw_name), (says("250", "NOOP"),)),
    Row(("-v",), (journals_all,)),
    Row(
        ("-w", "0.05", "-H", "0.05", "-W", "noop:0.05", "-W", "MAIL:0.05:20"),
        (
            waits(0.05, *BEGIN, "DATA"),
            waits(0.05, *BEGIN, "DATA", "."),
            waits(0.05, "NOOP"),
            waits(0.05, *BEGIN[:2]),
        ),
    ),
)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_smtp_sink_options_work(tmp_path: Path, row: Row) -> None:
    arguments = [each.replace("FOLDER", str(tmp_path / "data")) for each in row.arguments]
    with serving(tmp_path / "data", "", "sink", *arguments) as server:
        for probe in row.probes:
            with client_of(server) as client:
                probe(server, client)


def run(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["sink", *arguments])
    return result.exit_code, " ".join(result.output.split())


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("-S", "x"), "-S requires -d or -D"),
        (("-R", "/srv"), "systemd RootDirectory="),
        (("-u", "nobody-at-all"), "there is no user 'nobody-at-all'"),
        (("-u", "nobody", "--user", "nobody"), "-u and --user are mutually exclusive"),
        (("-4", "-6"), "-4 and -6 are mutually exclusive"),
        (("-a", "--auth"), "-a and --auth are mutually exclusive"),
        (("-f", "RCTP"), "-f: unknown command 'RCTP'; expected one of: CONNECT, HELO"),
        (("-s", "RCTP"), "-s: unknown command 'RCTP'"),
        (("-W", "RCPT"), "-W takes COMMAND:SECONDS or COMMAND:SECONDS:ODDS"),
        (("-W", "RCPT:1:100"), "-W takes COMMAND:SECONDS"),
        (("-W", "RCTP:1"), "-W: unknown command 'RCTP'"),
        (("-B", "250 Fine", "-f", "RCPT"), "-B: '250 Fine' is not a 4xx or 5xx reply"),
        (("-b", "Fine", "-r", "RCPT"), "expected a reply such as"),
        (("-M", "0"), "x>=1"),
        ((":2525", "100"), "open relay"),
        (("inet:0.0.0.0:2525", "100"), "open relay"),
        (("--faults", "no-such-plan.toml"), "no-such-plan.toml: No such file"),
    ],
)
def test_unsupported_smtp_sink_options_name_an_alternative(arguments: tuple[str, ...], expected: str) -> None:
    code, output = run(*arguments)
    assert code in (1, 2)
    assert expected in output


def test_addresses_are_parsed_like_those_of_smtp_sink(tmp_path: Path) -> None:
    place = tmp_path / "socket"
    with serving(tmp_path / "data", "", "sink", f"unix:{place}", "5") as server:
        assert place.is_socket()
        with client_of(server) as client:
            assert client.reply()[0].startswith("220")


def test_the_host_of_an_address_is_optional(tmp_path: Path) -> None:
    for option in ((), ("-4",)):
        with (
            serving(tmp_path / "data", "", "sink", "--open", "--allow-root", *option, "inet::0", "100") as server,
            client_of(server) as client,
        ):
            assert client.reply()[0].startswith("220")


def test_every_letter_is_tested() -> None:
    tried = {argument[1:] for row in ROWS for argument in row.arguments if argument.startswith("-")}
    refused = {letter.letter for letter in LETTERS if letter.meaning.startswith("refused")}
    assert tried | refused == {letter.letter for letter in LETTERS}
    assert len(LETTERS) == 36


def test_help_lists_every_letter() -> None:
    for arguments in (("-h",), ("--help",)):
        code, output = run(*arguments)
        assert code == 0
        assert "--describe-faults" in output
        for letter in LETTERS:
            assert f"-{letter.letter} " in output
    assert all(len(line) < 110 for line in smtp_sink_help().splitlines())
