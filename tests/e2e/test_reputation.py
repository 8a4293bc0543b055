"""DNS lists, reverse DNS and pregreet with `penstock serve` and a real name server; clients come through a proxy."""

from __future__ import annotations

import socket
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.dns.nsd import running_nsd
from tests.e2e.running import Server, serving

ZONES = {
    "bl.example": '2.0.0.127 A 127.0.0.2\n6.2.0.192 A 127.0.0.3\n6.2.0.192 TXT "a source of spam"\n'
    "7.2.0.192 A 127.255.255.254\n",
    "2.0.192.in-addr.arpa": "5 PTR mail.good.example.\n6 PTR mail.bad.example.\n7 PTR mail.good.example.\n",
    "good.example": "mail A 192.0.2.5\n",
    "bad.example": "mail A 192.0.2.99\n",
}
SETTINGS = """
hostname = "mx.example.org"
domains = ["example.org"]
[[listener]]
address = "127.0.0.1:0"
proxy_networks = ["127.0.0.1"]
[delivery]
kind = "maildir"
[resolver]
servers = ["{dns}"]
[policy]
mode = "enforce"
[policy.fcrdns]
[policy.pregreet]
wait = 0.3
[[policy.dnsbl]]
zone = "bl.example"
"""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with ExitStack() as stack:
        dns = stack.enter_context(running_nsd(tmp_path_factory.mktemp("nsd"), ZONES))
        yield stack.enter_context(serving(tmp_path_factory.mktemp("server"), SETTINGS.format(dns=dns)))


class Client:
    """A client whose address a PROXY header names."""

    def __init__(self, server: Server, address: str, early: str = "") -> None:
        self._sock = socket.create_connection(("127.0.0.1", server.port), timeout=60)
        self._file = self._sock.makefile("rb")
        self._sock.sendall(f"PROXY TCP4 {address} 192.0.2.25 4711 25\r\n{early}".encode())

    def reply(self) -> str:
        """Return the last line of the next reply; "" at the end."""
        while (line := self._file.readline().decode())[3:4] == "-":
            pass
        return line.strip()

    def say(self, *lines: str) -> list[str]:
        """Send commands one after the other; return their replies."""
        replies = []
        for line in lines:
            self._sock.sendall(f"{line}\r\n".encode())
            replies.append(self.reply())
        return replies

    def close(self) -> None:
        self._file.close()
        self._sock.close()


MakeClient = Callable[..., Client]


@pytest.fixture
def client_of(server: Server) -> Iterator[MakeClient]:
    """Return what makes clients of the server."""
    made: list[Client] = []

    def make(address: str, early: str = "") -> Client:
        made.append(Client(server, address, early))
        return made[-1]

    yield make
    for client in made:
        client.close()


DIALOG = ("EHLO client.example", "MAIL FROM:<joe@good.example>", "RCPT TO:<bob@example.org>")


def test_a_listed_client_is_refused_at_rcpt_and_reaches_postmaster(client_of: MakeClient) -> None:
    client = client_of("192.0.2.6")
    assert client.reply().startswith("220 ")
    *_, refusal, exempt = client.say(*DIALOG, "RCPT TO:<postmaster@example.org>")
    assert refusal == "554 5.7.1 Client host [192.0.2.6] blocked using bl.example; a source of spam"
    assert exempt.startswith("250 ")
    assert client.say("DATA", "Subject: help\r\n\r\nwhy?\r\n.")[1].startswith("250 ")


@pytest.mark.parametrize(("address", "result"), [("192.0.2.5", "pass"), ("192.0.2.7", "fail"), ("192.0.2.8", "perm")])
def test_others_are_accepted_and_their_name_is_reported(
    server: Server, client_of: MakeClient, address: str, result: str
) -> None:
    client = client_of(address)
    client.reply()
    *_, accepted = client.say(*DIALOG, "DATA", f"From: joe@good.example\r\nSubject: {address}\r\n\r\nhello\r\n.")
    assert accepted.startswith("250 ")
    (message,) = [message for message in server.messages() if address.encode() in message.partition(b"Subject")[2]]
    assert f"Authentication-Results: mx.example.org; iprev={result}".encode() in message
    assert f"smtp.remote-ip={address};".encode() in message.replace(b"\n\t", b" ")


def test_data_before_the_greeting_is_refused(client_of: MakeClient) -> None:
    client = client_of("192.0.2.50", "EHLO hasty.example\r\n")
    assert client.reply() == "554 5.5.1 Protocol error: data received before the greeting"
    assert client.reply() == ""


def test_a_client_that_has_waited_once_does_not_wait_again(client_of: MakeClient) -> None:
    assert client_of("192.0.2.51").reply().startswith("220 ")
    hasty = client_of("192.0.2.51", "EHLO hasty.example\r\n")
    assert [hasty.reply()[:4] for _ in range(2)] == ["220 ", "250 "]


def test_an_error_of_a_list_is_journaled_and_refuses_no_client(server: Server, client_of: MakeClient) -> None:
    client = client_of("192.0.2.7")
    client.reply()
    assert client.say(*DIALOG)[-1].startswith("250 ")
    server.said(r'"event":"list-failed","zone":"bl.example","cause":"the list has answered 127.255.255.254"')
