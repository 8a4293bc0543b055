"""SPF, DKIM and DMARC with `penstock serve`, a real name server and really signed mail, in both modes."""

from __future__ import annotations

import re
import smtplib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import rsa

from penstock.mailauth.dkim import DkimSigner
from penstock.mailauth.header import Header
from tests.dns.nsd import running_nsd
from tests.e2e.running import Server, serving
from tests.mailauth.test_dkim import RSA, record

WEAK = rsa.generate_private_key(public_exponent=65537, key_size=1024)


def key_line(name: str, text: str) -> str:
    return f"{name} TXT " + " ".join(f'"{text[at : at + 250]}"' for at in range(0, len(text), 250)) + "\n"


HERE = '@ TXT "v=spf1 ip4:127.0.0.1 -all"\n'
ZONES = {
    # Our client may send for it, and its mail is signed.
    "good.example": HERE + '_dmarc TXT "v=DMARC1; p=reject"\n' + key_line("s1._domainkey", record(RSA).decode()),
    # Our client may not send for it.
    "strict.example": '@ TXT "v=spf1 ip4:192.0.2.1 exp=why.strict.example -all"\nwhy TXT "%{i} is not ours"\n'
    '_dmarc TXT "v=DMARC1; p=reject"\n' + key_line("s1._domainkey", record(RSA).decode()),
    "lenient.example": '@ TXT "v=spf1 -all"\n_dmarc TXT "v=DMARC1; p=quarantine"\n',
    "watching.example": '@ TXT "v=spf1 -all"\n_dmarc TXT "v=DMARC1; p=none"\n',
    "silent.example": "@ A 192.0.2.1\n",
    # The name server refuses to answer about other.test.
    "waiting.example": '@ TXT "v=spf1 include:other.test -all"\n_dmarc TXT "v=DMARC1; p=reject"\n'
    "s1._domainkey CNAME key.other.test.\n",
    "relaxed.example": '@ TXT "v=spf1 include:other.test -all"\n_dmarc TXT "v=DMARC1; p=none"\n',
    "broken.example": '@ TXT "v=spf1 nonsense:x -all"\n_dmarc TXT "v=DMARC1; p=reject"\n'
    's1._domainkey TXT "v=DKIM1; p="\n',
}
SETTINGS = """
hostname = "mx.example.org"
domains = ["example.org"]
[[listener]]
address = "127.0.0.1:0"
[delivery]
kind = "maildir"
[resolver]
servers = ["{dns}"]
[policy]
mode = "{mode}"
trusted = []
{more}
"""


@pytest.fixture(scope="module")
def dns(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with running_nsd(tmp_path_factory.mktemp("nsd"), ZONES) as address:
        yield address


@pytest.fixture(scope="module")
def servers(dns: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Server]]:
    """Run a server in each mode."""
    with ExitStack() as stack:
        yield {
            mode: stack.enter_context(
                serving(tmp_path_factory.mktemp(mode), SETTINGS.format(dns=dns, mode=mode, more=""))
            )
            for mode in ("monitor", "enforce")
        }


@dataclass
class Mail:
    """A message: its envelope sender, the domain in From, and who has signed it."""

    sender: str
    author: str
    signer: str = ""
    changed: bool = False
    header: str = ""

    def text(self) -> bytes:
        header = f"From: Joe <joe@{self.author}>\r\nTo: bob@example.org\r\nSubject: Dinner\r\n{self.header}".encode()
        body = b"Is dinner ready?\r\n"
        if self.signer:
            hashes = DkimSigner.start()
            hashes.feed(body)
            hashes.finish()
            signer = DkimSigner(self.signer, "s1", RSA)
            header = signer.finish(Header(header), hashes, now=int(time.time())) + header
        return header + b"\r\n" + (body + b"Buy now!\r\n" if self.changed else body)


def send(server: Server, mail: Mail) -> str:
    """Send a message; return the reply that decides about it: "550 5.7.1", or "250 2.0.0"."""
    sender = f"joe@{mail.sender}" if mail.sender else ""
    try:
        with smtplib.SMTP("127.0.0.1", server.port, "silent.example", timeout=60) as client:
            client.sendmail(sender, ["bob@example.org"], mail.text())
    except smtplib.SMTPResponseException as exc:  # at MAIL or at the end of the text
        return f"{exc.smtp_code} {bytes(exc.smtp_error).decode()}"  # type: ignore[arg-type]
    return "250"


def results_of(message: bytes) -> str:
    """Return our Authentication-Results, unfolded, which must be the first field after those of the Maildir."""
    header = re.sub(rb"\n[ \t]+", b" ", message.replace(b"\r\n", b"\n").partition(b"\n\n")[0]).decode()
    fields = [line for line in header.split("\n") if not line.startswith(("Return-Path:", "Delivered-To:"))]
    assert fields[0].startswith("Authentication-Results: mx.example.org;"), header
    assert header.count("Authentication-Results: mx.example.org") == 1
    return fields[0]


def only_message(server: Server) -> bytes:
    """Return the one message in the Maildir, and remove it."""
    (message,) = server.messages(1)
    for path in (server.folder / "maildir" / "new").iterdir():
        path.unlink()
    return message


CASES = {
    "all pass": (Mail("good.example", "good.example", "good.example"), ["spf=pass", "dkim=pass", "dmarc=pass"], "250"),
    "a forged author": (
        Mail("good.example", "strict.example"), ["spf=pass", "dkim=none", "dmarc=fail"], "550 5.7.1",
    ),
    "a forwarded message": (  # SPF fails, the signature does not
        Mail("strict.example", "good.example", "good.example"), ["spf=fail", "dkim=pass", "dmarc=pass"], "250",
    ),
    "a changed message": (
        Mail("strict.example", "strict.example", "strict.example", changed=True),
        ["spf=fail", "dkim=fail", "dmarc=fail"], "550 5.7.1",
    ),
    "no records at all": (Mail("silent.example", "silent.example"), ["spf=none", "dkim=none", "dmarc=none"], "250"),
    "a null sender": (Mail("", "silent.example"), ["spf=none smtp.helo=silent.example"], "250"),
    "p=none": (Mail("watching.example", "watching.example"), ["spf=fail", "dmarc=fail"], "250"),
    "p=quarantine": (Mail("lenient.example", "lenient.example"), ["spf=fail", "dmarc=fail"], "250"),
    "a key that is not answered about": (
        Mail("silent.example", "waiting.example", "waiting.example"), ["dkim=temperror", "dmarc=temperror"],
        "451 4.4.3",
    ),
    "an SPF record that is not answered about": (
        Mail("waiting.example", "waiting.example"), ["spf=temperror", "dmarc=temperror"], "451 4.4.3",
    ),
    "the same with p=none": (Mail("relaxed.example", "relaxed.example"), ["spf=temperror", "dmarc=temperror"], "250"),
    "a DMARC record that is not answered about": (
        Mail("silent.example", "a.other.test"), ["dmarc=temperror"], "451 4.4.3",
    ),
    "broken records": (
        Mail("broken.example", "silent.example", "broken.example"), ["spf=permerror", "dkim=permerror"], "250",
    ),
    "broken records and p=reject": (
        Mail("broken.example", "broken.example", "broken.example"),
        ["spf=permerror", "dkim=permerror", "dmarc=fail"], "550 5.7.1",
    ),
    "two authors": (
        Mail("good.example", "good.example", "good.example", header="From: eve@strict.example\r\n"),
        ["dmarc=permerror"], "550 5.6.0",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_mail_is_delivered_in_monitor_mode_with_the_results(servers: dict[str, Server], name: str) -> None:
    mail, expected, _ = CASES[name]
    assert send(servers["monitor"], mail) == "250"
    message = only_message(servers["monitor"])
    found = results_of(message)
    for each in expected:
        assert f" {each}" in found
    assert b"X-Spam" not in message


@pytest.mark.parametrize("name", CASES)
def test_mail_is_decided_about_in_enforce_mode(servers: dict[str, Server], name: str) -> None:
    mail, expected, reply = CASES[name]
    assert send(servers["enforce"], mail).startswith(reply)
    if reply == "250":
        message = only_message(servers["enforce"])
        assert all(f" {each}" in results_of(message) for each in expected)
        assert (b"\nX-Spam-Flag: YES" in message) is (name == "p=quarantine")
    else:
        assert servers["enforce"].messages() == []


# ---- quarantine

SPOOLING = SETTINGS.replace('[delivery]\nkind = "maildir"\n', "")


def test_mail_in_quarantine_is_held_until_it_is_released(dns: str, tmp_path: Path) -> None:
    settings = SPOOLING.format(dns=dns, mode="enforce", more='quarantine = "hold"')
    with serving(tmp_path / "server", settings) as server:
        assert send(server, Mail("lenient.example", "lenient.example")) == "250"
        assert send(server, Mail("good.example", "good.example", "good.example")) == "250"
        assert b"dmarc=pass" in only_message(server)
        spool = [sys.executable, "-m", "penstock", "spool"]
        config = ["--config", str(server.folder / "penstock.toml"), "--data", str(server.folder)]
        listed = subprocess.run([*spool, "list", "--json", *config], capture_output=True, check=True, text=True).stdout
        assert '"state":"held"' in listed.replace(" ", "")
        subprocess.run([*spool, "release", "--all", *config], capture_output=True, check=True)
        assert b"dmarc=fail" in only_message(server)


def test_mail_in_quarantine_takes_the_route_of_that_name(dns: str, servers: dict[str, Server], tmp_path: Path) -> None:
    hop = servers["monitor"]
    routes = f'[[route]]\nnext_hop = "maildir"\n[[route]]\nname = "junk"\nnext_hop = "smtp://{hop.address}"\n'
    settings = SPOOLING.format(dns=dns, mode="enforce", more=f'quarantine = "route:junk"\n{routes}')
    with serving(tmp_path / "server", settings) as server:
        assert send(server, Mail("lenient.example", "lenient.example")) == "250"
        assert send(server, Mail("good.example", "good.example", "good.example")) == "250"
        assert b"From: Joe <joe@lenient.example>" in only_message(hop)
        assert b"From: Joe <joe@good.example>" in only_message(server)


# ---- without DMARC, and who is judged

ALONE = """
[policy.dmarc]
mode = "off"
[policy.dkim]
require_aligned = true
[[listener]]
address = "127.0.0.1:0"
name = "behind a proxy"
proxy_networks = ["127.0.0.1"]
"""


@pytest.fixture(scope="module")
def alone(dns: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Run a server that enforces SPF and DKIM, and not DMARC."""
    settings = SETTINGS.format(dns=dns, mode="enforce", more=ALONE)
    with serving(tmp_path_factory.mktemp("alone"), settings) as server:
        yield server


def test_without_dmarc_spf_refuses_with_the_explanation(alone: Server) -> None:
    assert send(alone, Mail("strict.example", "strict.example", "strict.example")) == (
        "550 5.7.23 SPF validation of strict.example failed; strict.example explains: 127.0.0.1 is not ours"
    )
    assert send(alone, Mail("waiting.example", "good.example", "good.example")).startswith("451 4.7.24 ")


def test_without_dmarc_dkim_refuses_where_it_must_be_aligned(alone: Server) -> None:
    assert send(alone, Mail("good.example", "good.example")).startswith("550 5.7.20 ")
    assert send(alone, Mail("good.example", "silent.example", "good.example")).startswith("550 5.7.22 ")
    assert send(alone, Mail("good.example", "good.example", "good.example")) == "250"
    assert "dmarc=" not in results_of(only_message(alone))


def test_clients_of_a_proxy_are_judged_by_their_own_address(alone: Server) -> None:
    port = int(alone.said(r'"address":"127\.0\.0\.1:(\d+)","listener":"behind a proxy"')[1])
    replies = {}
    for address in ("127.0.0.1", "192.0.2.77"):
        with socket.create_connection(("127.0.0.1", port), timeout=60) as sock, sock.makefile("rb") as file:
            proxied = f"PROXY TCP4 {address} 192.0.2.25 4711 25\r\n"
            sock.sendall(f"{proxied}EHLO c.example\r\nMAIL FROM:<joe@good.example>\r\nQUIT\r\n".encode())
            replies[address] = next(line.decode() for line in file if line.startswith((b"250 2.1.0", b"550")))
    assert replies["127.0.0.1"].startswith("250 ")
    assert replies["192.0.2.77"].startswith("550 5.7.23 ")


FORGED = """\
Authentication-Results: mx.example.org; dmarc=pass
AUTHENTICATION-RESULTS : (a comment) MX.example.ORG. 1; spf=pass
Authentication-Results:
\t"mx.example.org" ; dkim=pass
Authentication-Results: other.example; dmarc=pass
ARC-Authentication-Results: i=1; mx.example.org; spf=pass
X-Authentication-Results: mx.example.org; spf=pass
"""


def test_forged_results_of_ours_are_left_out_and_no_others(servers: dict[str, Server]) -> None:
    mail = Mail("good.example", "good.example", "good.example", header=FORGED.replace("\n", "\r\n"))
    assert send(servers["enforce"], mail) == "250"
    message = only_message(servers["enforce"]).replace(b"\r\n", b"\n")
    text = message.partition(b"DKIM-Signature")[2]
    assert text.count(b"mx.example.org") == 2
    assert b"\nSubject: Dinner\nAuthentication-Results: other.example; dmarc=pass\nARC-Auth" in text
    assert message.endswith(b"X-Authentication-Results: mx.example.org; spf=pass\n\nIs dinner ready?\n")


def test_trusted_clients_are_not_judged_by_default(dns: str, tmp_path: Path) -> None:
    settings = SETTINGS.format(dns=dns, mode="enforce", more="").replace("trusted = []", "")
    with serving(tmp_path / "server", settings) as server:
        assert send(server, Mail("strict.example", "strict.example")) == "250"
        assert b"Authentication-Results" not in only_message(server)
        with smtplib.SMTP("127.0.0.1", server.port) as client:
            assert client.sendmail("a@strict.example", ["b@example.org"], b"no header\r\n") == {}


@pytest.mark.parametrize("mode", ["monitor", "enforce"])
def test_while_the_dns_is_silent_mail_flows_or_waits(mode: str, tmp_path: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        silent.bind(("127.0.0.1", 0))
        dns = f"127.0.0.1:{silent.getsockname()[1]}"
        settings = SETTINGS.format(dns=dns, mode=mode, more="")
        settings = settings.replace("[resolver]", "[resolver]\ntimeout = 0.1\nlifetime = 0.2")
        with serving(tmp_path / "server", settings) as server:
            reply = send(server, Mail("good.example", "good.example", "good.example"))
            if mode == "enforce":
                assert reply.startswith("451 4.4.3 ")
            else:
                assert reply == "250"
                found = results_of(only_message(server))
                assert all(f"{method}=temperror" in found for method in ("spf", "dkim", "dmarc"))
